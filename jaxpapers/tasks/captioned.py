"""Captioned images, the rewards to tune for, and the classifiers that evaluate.

``digits``: scanned digits, half of whose captions are wrong in pretraining, so that the
pretrained model is misaligned. The reward is the probability of the prompted digit under
a classifier; accuracy is counted by another one, trained on other scans, so that
over-optimisation shows as a gap. ``colours``: the same scans in four inks, with
combinations that are never captioned rightly. ``emoji``: glyphs and their Unicode names;
the reward is minus the distance of the mean colour to the colour in the prompt, accuracy
counts images whose nearest real emoji has that colour in its name.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers.data import captions, emoji, fetch, images
from jaxpapers.tasks import classifiers

SOURCES = ("digits", "segments", "colours", "emoji")
# Colours in names of emoji, as (red, green, blue).
INKS = {
    "red": (0.85, 0.15, 0.15), "orange": (0.95, 0.55, 0.1), "yellow": (0.98, 0.8, 0.2),
    "green": (0.35, 0.65, 0.25), "blue": (0.2, 0.5, 0.85), "purple": (0.55, 0.25, 0.7),
    "brown": (0.5, 0.3, 0.2),
}  # fmt: skip


class Source(NamedTuple):
    """Captioned images with reward and held-out classifier.

    Attributes:
      image: (n, H, W, C) in [-1, 1].
      tokens: (n,) or (n, L) int32, tokens of the captions in pretraining.
      prompts: texts, P of them.
      prompt_tokens: (P,) or (P, L), their tokens.
      unseen: (P,) bool, prompts that no image was rightly captioned with.
      reward: (images, prompt ids) -> (B,), jits.
      agrees: (images, prompt ids) -> (B,) bool, by the classifiers of the reward.
      correct: the same by those that the reward never saw.
      chance: share that guessing gets right.
      features: images -> (n, F), for the Frechet distance.
      held_out: images that the model and the features' classifier did not see.
      name: shown in titles.
    """

    image: np.ndarray
    tokens: np.ndarray
    prompts: tuple[str, ...]
    prompt_tokens: np.ndarray
    unseen: np.ndarray
    reward: Callable
    agrees: Callable
    correct: Callable
    chance: float
    features: Callable
    held_out: np.ndarray
    name: str


def load(config: Any) -> Source:
    """The data that ``config.data`` names.

    Raises:
      ValueError: unknown source, or images and captions that do not fit ``config.net``.
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
    shape, length = tuple(config.net.shape), source.tokens.shape[1:]
    vocab = int(max(source.tokens.max(), source.prompt_tokens.max())) + 1
    if source.image.shape[1:] != shape or config.net.vocab < vocab:
        raise ValueError(
            f"config.net: shape and vocab are {shape} and {config.net.vocab}, but "
            f"{c.source} has {source.image.shape[1:]} and {vocab}"
        )
    if length != ((c.length,) if c.length else ()):
        raise ValueError(
            f"config.data.length must be {length[0] if length else 0}, the tokens of a "
            f"caption of {c.source}, got {c.length}"
        )
    return source


@functools.lru_cache(maxsize=2)
def _read(name: str, path: str, misaligned: float) -> Source:
    if name == "emoji":
        return _emoji(path)
    if name == "segments":
        return _digits(images.segment_digits(), misaligned, "digits of seven segments")
    parts = images.digit_parts(path or fetch.get("digits"))
    return _digits(parts, misaligned) if name == "digits" else _colours(parts)


def _digits(parts, share, title="scanned digits"):
    signed = [images.to_signed(p.image) for p in parts]
    label = [p.label for p in parts]
    rewarding = classifiers.train(signed[1], label[1], 10, seed=0)
    held_out = classifiers.train(signed[2], label[2], 10, seed=1)
    noisy_labels = captions.misaligned(label[0], 10, share, seed=0)
    return Source(
        signed[0],
        noisy_labels + 1,
        captions.digit_captions(np.arange(10)),
        np.arange(1, 11, dtype=np.int32),
        np.zeros(10, bool),
        probability(rewarding),
        lambda x, prompt: classifiers.predicted(rewarding, x) == prompt,
        lambda x, prompt: classifiers.predicted(held_out, x) == prompt,
        1 / 10,
        functools.partial(classifiers.features, held_out),
        signed[1],
        title,
    )


def _colours(parts):
    inked = [captions.inked(p.image, p.label, seed) for seed, p in enumerate(parts)]
    signed = [images.to_signed(p.image) for p in inked]
    rewarding, held_out = (
        (
            classifiers.train(signed[i], inked[i].digit, 10, seed=i),
            classifiers.train(signed[i], inked[i].colour, 4, seed=i),
        )
        for i in (1, 2)
    )
    words = captions.colour_vocabulary()
    prompts = captions.colour_prompts()
    number = np.arange(len(prompts))

    def reward(x, prompt):
        logs = [jax.nn.log_softmax(net(x)[0]) for net in rewarding]
        rows = jnp.arange(len(prompt))
        return logs[0][rows, prompt % 10] + logs[1][rows, prompt // 10]

    def right(nets, x, prompt):
        digit, colour = (classifiers.predicted(net, x) for net in nets)
        return (digit == prompt % 10) & (colour == prompt // 10)

    return Source(
        signed[0],
        words.encode_all(inked[0].caption),
        prompts,
        words.encode_all(prompts),
        captions.held_out(number % 10, number // 10),
        reward,
        functools.partial(right, rewarding),
        functools.partial(right, held_out),
        1 / 40,
        lambda x: np.concatenate([classifiers.features(net, x) for net in held_out], 1),
        signed[1],
        "inked digits",
    )


def _emoji(path):
    pairs = emoji.emoji(path or None)
    train, held = emoji.split(pairs)
    words = captions.Vocabulary.of(pairs.caption, ignored=())
    length = max(len(words.encode(text)) for text in pairs.caption)
    names = list(INKS)
    named_colours = [[n for n in names if n in text.split()] for text in pairs.caption]
    # Prompts are the captions that name one colour.
    single = [len(colours) == 1 for colours in named_colours]
    prompts = tuple(text for text, kept in zip(pairs.caption, single) if kept)
    target_colour = np.array([names.index(x[0]) for x in named_colours if len(x) == 1])

    def reward(x, prompt):
        gap = _mean_colour(x)[:, None] - jnp.asarray(list(INKS.values()))[None]
        distance_to = jnp.sqrt(jnp.square(gap).sum(-1))
        return -distance_to[jnp.arange(len(prompt)), jnp.asarray(target_colour)[prompt]]

    def agrees(x, prompt):
        colour = np.asarray(_mean_colour(jnp.asarray(x)))
        gap = colour[:, None] - np.array(list(INKS.values()))
        return np.square(gap).sum(-1).argmin(1) == target_colour[prompt]

    real = images.to_signed(pairs.image[single])

    def nearest(x, prompt):
        drawn, known = pooled(np.asarray(x)), pooled(real)
        gap = np.square(known).sum(1)[None] - 2 * drawn @ known.T
        return target_colour[gap.argmin(1)] == target_colour[prompt]

    def pooled(x):
        side = x.shape[1] // 4
        return x.reshape(len(x), 4, side, 4, side, 3).mean((2, 4)).reshape(len(x), -1)

    return Source(
        images.to_signed(train.image),
        words.encode_all(train.caption, length),
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


@jax.jit
def _mean_colour(x):
    """Mean colour (B, 3) of images, pixels weighted by their distance from white."""
    colour = jnp.clip((x + 1) / 2, 0, 1)
    weight = (1 - colour).max(-1, keepdims=True)
    return (weight * colour).sum((1, 2)) / (weight.sum((1, 2)) + 1e-3)


def probability(net: classifiers.Trained) -> Callable:
    """(images, classes (B,)) -> the classifier's probability (B,) of those classes."""

    def reward(x, prompt):
        return jax.nn.softmax(net(x)[0])[jnp.arange(len(prompt)), prompt]

    return reward
