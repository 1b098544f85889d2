"""Pictures for prompts: a reward to tune for, and a judge that the reward never saw.

``digits``: scanned digits, half of whose captions are wrong in pretraining, so that the
pretrained model is misaligned. The reward is the probability of the prompted digit under
a classifier; accuracy is counted by another one, trained on other scans, so that
over-optimisation shows as a gap. ``colours``: the same scans in four inks, with
combinations that are never captioned rightly. ``emoji``: glyphs and their Unicode names;
the reward is how near the ink is to the colour that the name says, the judge asks for the
colour that the name of the nearest real emoji says.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpapers.data import arrays, captions, emoji, fetch, images
from jaxpapers.ops import distance
from jaxpapers.tasks import Task, judges

SOURCES = ("digits", "colours", "emoji")
# Colours that names of emoji say, as (red, green, blue).
INKS = {
    "red": (0.85, 0.15, 0.15), "orange": (0.95, 0.55, 0.1), "yellow": (0.98, 0.8, 0.2),
    "green": (0.35, 0.65, 0.25), "blue": (0.2, 0.5, 0.85), "purple": (0.55, 0.25, 0.7),
    "brown": (0.5, 0.3, 0.2),
}  # fmt: skip


class Source(NamedTuple):
    """Captioned pictures and what judges new ones.

    Attributes:
      image: (n, H, W, C) in [-1, 1].
      word: (n,) or (n, L) int32, captions as they are told to the model.
      prompts: texts, P of them.
      prompt_word: (P,) or (P, L), their words.
      unseen: (P,) bool, prompts that no picture was rightly captioned with.
      reward: (pictures, prompt ids) -> (B,), jits.
      agrees: (pictures, prompt ids) -> (B,) bool, by the classifiers of the reward.
      correct: the same by those that the reward never saw.
      chance: share that guessing gets right.
      features: pictures -> (n, F), for the Frechet distance.
      held_out: pictures that the model and the features' classifier did not see.
      name: for people.
    """

    image: np.ndarray
    word: np.ndarray
    prompts: tuple[str, ...]
    prompt_word: np.ndarray
    unseen: np.ndarray
    reward: Callable
    agrees: Callable
    correct: Callable
    chance: float
    features: Callable
    held_out: np.ndarray
    name: str


def prepare(config: Any) -> tuple[Any, dict[str, Any]]:
    """The config, and the reward that its data and ``method.reward`` give."""
    if config.method.reward == "none":
        return config, {}
    source = read(config)
    if len(source.prompts) != config.method.prompts:
        raise ValueError(
            f"config.method.prompts must be {len(source.prompts)}, the prompts of "
            f"{config.data.source}, got {config.method.prompts}"
        )
    return config, {"reward_fn": source.reward}


def stand_ins(config: Any) -> dict[str, Any]:
    """An untrained reward of the same cost, to compile a step without data."""
    shape = tuple(config.net.shape)
    net = judges.untrained(shape, 10)
    return {"reward_fn": _probability(net)}


def batch_shapes(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global training batch: captioned pictures, or prompts to draw."""
    size, length = config.data.batch, config.data.length
    word = (size, length) if length else (size,)
    shapes = {"word": jax.ShapeDtypeStruct(word, jnp.int32)}
    if config.method.stage == "pretrain":
        shapes["x"] = jax.ShapeDtypeStruct((size, *config.net.shape), jnp.float32)
    else:
        shapes["prompt"] = jax.ShapeDtypeStruct((size,), jnp.int32)
    return shapes


def load(config: Any, method: Any, mesh: Any) -> Task:
    """Reads ``config.data`` and binds the evaluation to a method and mesh."""
    source = read(config)
    tune = config.method.stage == "tune"
    each = config.data.eval_each
    prompt = np.repeat(np.arange(len(source.prompts), dtype=np.int32), each)
    draw = _drawer(method, mesh, source)

    def evaluate(state, quick=False):
        values = _scores(source, draw(state, prompt), prompt)
        if not tune and not quick:
            values |= _selected(source, draw, state, prompt)
            values |= _sweep(source, draw, state, prompt)
        if method.diagnose:
            batch = {"word": jnp.asarray(source.prompt_word[prompt])}
            with jax.set_mesh(mesh):
                found = jax.jit(method.diagnose)(
                    state.params, state.extra, batch, jax.random.key(1)
                )
            return values | {k: float(v) for k, v in found.items()}
        return values

    fields = {"x": source.image, "word": source.word}
    if tune:
        count = np.arange(len(source.prompts), dtype=np.int32)
        fields = {"word": source.prompt_word, "prompt": count}
    return Task(
        arrays.Examples(fields, config.data.seed),
        1,
        "pictures",
        "judge_accuracy",
        f"share of {len(prompt):,} pictures that the judge finds right, {source.name}",
        evaluate,
        lambda: baselines(source),
        None,
        f"{source.name}: {len(source.image):,} to train on, "
        f"{len(source.prompts)} prompts",
        rising=True,
        against=(
            "validation_path_kl",
            {
                "validation_reward": "x",
                "validation_judge_accuracy": "x",
                "validation_frechet": "x",
            },
        )
        if method.diagnose
        else None,
        curve="reward" if tune else "loss",
        picture=lambda state: _gallery(source, draw, state),
    )


def baselines(source: Source) -> dict[str, float]:
    """What guessing gives."""
    return {"chance": source.chance}


def read(config: Any) -> Source:
    """The data that ``config.data`` names.

    Raises:
      ValueError: unknown source, or pictures and words that do not fit ``config.net``.
      FileNotFoundError: no files.
    """
    c = config.data
    if c.source not in SOURCES:
        raise ValueError(
            f"config.data.source must be one of {SOURCES}, got {c.source!r}"
        )
    if c.eval_each < 1:
        raise ValueError(f"config.data.eval_each must be >= 1, got {c.eval_each}")
    source = _read(c.source, c.path, c.misaligned)
    shape, length = tuple(config.net.shape), source.word.shape[1:]
    words = int(max(source.word.max(), source.prompt_word.max())) + 1
    if source.image.shape[1:] != shape or config.net.words < words:
        raise ValueError(
            f"config.net: shape and words are {shape} and {config.net.words}, but "
            f"{c.source} has {source.image.shape[1:]} and {words}"
        )
    if length != ((c.length,) if c.length else ()):
        raise ValueError(
            f"config.data.length must be {length[0] if length else 0}, the words of a "
            f"caption of {c.source}, got {c.length}"
        )
    return source


@functools.lru_cache(maxsize=2)
def _read(name: str, path: str, misaligned: float) -> Source:
    if name == "emoji":
        return _emoji(path)
    parts = images.digit_parts(path or fetch.get("digits"))
    return _digits(parts, misaligned) if name == "digits" else _colours(parts)


def _digits(parts, share):
    signed = [images.to_signed(p.image) for p in parts]
    label = [p.label for p in parts]
    paid = judges.train(signed[1], label[1], 10, seed=0)
    judge = judges.train(signed[2], label[2], 10, seed=1)
    told = captions.misaligned(label[0], 10, share, seed=0)
    return Source(
        signed[0],
        told + 1,
        captions.digit_captions(np.arange(10)),
        np.arange(1, 11, dtype=np.int32),
        np.zeros(10, bool),
        _probability(paid),
        lambda x, prompt: _classes(paid, x) == prompt,
        lambda x, prompt: _classes(judge, x) == prompt,
        1 / 10,
        functools.partial(judges.features, judge),
        signed[1],
        "scanned digits",
    )


def _colours(parts):
    inked = [captions.inked(p.image, p.label, seed) for seed, p in enumerate(parts)]
    signed = [images.to_signed(p.image) for p in inked]
    paid, judge = (
        (
            judges.train(signed[i], inked[i].digit, 10, seed=i),
            judges.train(signed[i], inked[i].colour, 4, seed=i),
        )
        for i in (1, 2)
    )
    words = captions.colour_vocabulary()
    prompts = captions.colour_prompts()
    number = np.arange(len(prompts))

    def reward(x, prompt):
        logs = [jax.nn.log_softmax(net(x)[0]) for net in paid]
        rows = jnp.arange(len(prompt))
        return logs[0][rows, prompt % 10] + logs[1][rows, prompt // 10]

    def right(nets, x, prompt):
        digit, colour = (_classes(net, x) for net in nets)
        return (digit == prompt % 10) & (colour == prompt // 10)

    return Source(
        signed[0],
        words.encode_all(inked[0].caption),
        prompts,
        words.encode_all(prompts),
        captions.held_out(number % 10, number // 10),
        reward,
        functools.partial(right, paid),
        functools.partial(right, judge),
        1 / 40,
        lambda x: np.concatenate([judges.features(net, x) for net in judge], 1),
        signed[1],
        "inked digits",
    )


def _emoji(path):
    pairs = emoji.emoji(path or None)
    kept, held = emoji.split(pairs)
    words = captions.Vocabulary.of(pairs.caption, ignored=())
    length = max(len(words.encode(text)) for text in pairs.caption)
    names = list(INKS)
    said = [[n for n in names if n in text.split()] for text in pairs.caption]
    prompts = tuple(t for t, found in zip(pairs.caption, said) if len(found) == 1)
    ink = np.array([names.index(found[0]) for found in said if len(found) == 1])

    def reward(x, prompt):
        gap = _ink(x)[:, None] - jnp.asarray(list(INKS.values()))[None]
        distance_to = jnp.sqrt(jnp.square(gap).sum(-1))
        return -distance_to[jnp.arange(len(prompt)), jnp.asarray(ink)[prompt]]

    def agrees(x, prompt):
        gap = np.asarray(_ink(jnp.asarray(x)))[:, None] - np.array(list(INKS.values()))
        return np.square(gap).sum(-1).argmin(1) == ink[prompt]

    real = images.to_signed(pairs.image[[len(found) == 1 for found in said]])

    def nearest(x, prompt):
        own, known = pooled(np.asarray(x)), pooled(real)
        gap = np.square(known).sum(1)[None] - 2 * own @ known.T
        return ink[gap.argmin(1)] == ink[prompt]

    def pooled(x):
        side = x.shape[1] // 4
        return x.reshape(len(x), 4, side, 4, side, 3).mean((2, 4)).reshape(len(x), -1)

    return Source(
        images.to_signed(kept.image),
        words.encode_all(kept.caption, length),
        prompts,
        words.encode_all(prompts, length),
        np.isin(prompts, held.caption),
        reward,
        agrees,
        nearest,
        1 / len(INKS),
        pooled,
        images.to_signed(held.image),
        "emoji",
    )


def _ink(x):
    """Mean colour of what is not white, weighted by how far from white it is."""
    colour = jnp.clip((x + 1) / 2, 0, 1)
    weight = (1 - colour).max(-1, keepdims=True)
    return (weight * colour).sum((1, 2)) / (weight.sum((1, 2)) + 1e-3)


def _probability(net):
    def reward(x, prompt):
        return jax.nn.softmax(net(x)[0])[jnp.arange(len(prompt)), prompt]

    return reward


def _classes(net, x):
    return judges.logits(net, x).argmax(-1)


def _drawer(method, mesh, source):
    """(state, prompt ids, guidance, seed) -> pictures, numpy."""
    replicated = NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, static_argnames=("guidance",))
    def sample(state, key, word, guidance=None):
        found = method.sampler(
            state.params, key, word, extra=state.extra, guidance=guidance
        )
        return jax.lax.with_sharding_constraint(found, replicated)

    def draw(state, prompt, guidance=None, seed=0):
        state = state._replace(opt_state=(), step=(), key=())
        word = source.prompt_word[prompt]
        with jax.set_mesh(mesh):
            return np.asarray(sample(state, jax.random.key(seed), word, guidance))

    return draw


def _scores(source, x, prompt):
    right = source.correct(x, prompt)
    with jax.enable_x64():
        features = (
            jnp.asarray(source.features(v), jnp.float64) for v in (x, source.image)
        )
        frechet = float(distance.frechet_distance(*features))
    found = {
        "validation_judge_accuracy": float(right.mean()),
        "validation_reward_accuracy": float(source.agrees(x, prompt).mean()),
        "validation_reward": float(np.mean(source.reward(jnp.asarray(x), prompt))),
        "validation_frechet": frechet,
    }
    if source.unseen.any():
        unseen = source.unseen[prompt]
        found["validation_unseen_accuracy"] = float(right[unseen].mean())
    return found


def _selected(source, draw, state, prompt):
    """The best of four by the reward: what choosing without training gives."""
    tries = [draw(state, prompt, seed=seed) for seed in range(4)]
    rewards = np.stack([source.reward(jnp.asarray(x), prompt) for x in tries])
    best = np.stack(tries)[rewards.argmax(0), np.arange(len(prompt))]
    found = _scores(source, best, prompt)
    with jax.enable_x64():
        real = (
            jnp.asarray(source.features(v), jnp.float64)
            for v in (source.held_out, source.image)
        )
        floor = float(distance.frechet_distance(*real))
    return {
        "best_of_4_judge_accuracy": found["validation_judge_accuracy"],
        "best_of_4_frechet": found["validation_frechet"],
        "real_frechet": floor,
    }


def _sweep(source, draw, state, prompt):
    found = {}
    for guidance in (1.0, 2.0, 4.0):
        right = source.correct(draw(state, prompt, guidance), prompt)
        found[f"guidance_{guidance:g}_judge_accuracy"] = float(right.mean())
    return found


def _gallery(source, draw, state):
    """Eight pictures of up to ten prompts, beside real ones."""
    chosen = np.unique(np.linspace(0, len(source.prompts) - 1, 10).astype(np.int32))
    prompt = np.repeat(chosen, 8)
    return {
        "samples": draw(state, prompt, seed=7),
        "data": source.image[: len(prompt)],
        "rows": np.array([source.prompts[i] for i in chosen]),
    }
