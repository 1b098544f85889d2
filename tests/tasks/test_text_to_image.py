"""Images for prompts: rewards, held-out classifiers, unseen prompts, tuning."""

import gzip
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import papers, run, stages, tasks
from jaxpapers.data import emoji
from jaxpapers.study import with_fields
from jaxpapers.tasks import captioned, classifiers, text_to_image

DIGITS = {
    "data.source": "digits", "data.eval_each": 4, "data.batch": 40, "net.width": 16,
    "net.blocks": 1,
    "net.value": "(16,)", "sampler.steps": 4, "method.transitions": 2,
    "method.value_transitions": 2, "pretrain.steps": 3, "train.steps": 2,
}  # fmt: skip
EMOJI = {
    "net.shape": (8, 8, 3), "net.channels": 8, "net.multipliers": (1,),
    "net.attention": (), "net.groups": 4, "net.vocab": 12, "net.value": (8,),
    "sampler.steps": 5, "method.prompts": 14, "method.value_steps": 1,
    "method.policy_steps": 1, "data.batch": 28, "data.length": 2, "data.eval_each": 1,
    "method.lora_rank": 1, "method.transitions": 1,
}  # fmt: skip


def config(preset, fields):
    arguments = [f"--config.{k}={v}" for k, v in fields.items()]
    return run.load_config(f"dpok:{preset}", arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scans whose class is how many triples of the first pixels are on."""
    folder = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    with gzip.open(folder / "digits.csv.gz", "wt") as f:
        for i in range(320):
            row = rng.integers(0, 6, 64)
            row[: 3 * (i % 10)] = 16
            f.write(",".join(map(str, [*row, i % 10])) + "\n")
    return folder


def digits(folder, preset="smoke", **fields):
    return config(preset, {**DIGITS, "data.path": folder, **fields})


@pytest.fixture
def untrained(monkeypatch):
    """Images that classifiers would be trained on; their parameters are zero."""
    seen = []

    def train(image, label, classes, seed=0):
        net = classifiers.Classifier(classes=classes)
        shapes = jax.eval_shape(net.init, jax.random.key(0), image[:1])["params"]
        seen.append(image)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        return classifiers.Trained(net, zeros)

    monkeypatch.setattr(classifiers, "train", train)
    captioned._read.cache_clear()
    yield seen
    captioned._read.cache_clear()


def rows_of(c):
    grid = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    study = tasks.study("dpok", c, tasks.read(c), grid)
    assert study.metric == "accuracy" and study.rising
    return {row.label: row for row in study.rows(2)}


# Parameters of two classifiers are drawn one by one.
@pytest.mark.matrix
@pytest.mark.programs(40)
def test_one_classifier_rewards_and_another_one_evaluates(folder):
    c = digits(folder)
    source = captioned.load(c)
    assert len(source.image) == 160 and len(source.held_out) == 80
    reward_fn = tasks.read(c).facts["reward_fn"]
    reward = jax.jit(reward_fn)(jnp.asarray(source.held_out), np.arange(80) % 10)
    assert reward.shape == (80,) and float(reward.min()) >= 0
    # Half of the captions are drawn anew, a tenth of those to what they were.
    on = source.image.reshape(160, -1)[:, :27] > 0.9
    real = on.sum(1) // 3
    assert 0.3 < (source.tokens - 1 != real).mean() < 0.6
    assert source.tokens.min() >= 1 and source.tokens.max() <= 10
    scores = text_to_image._scores(source, source.image, real)
    assert scores["accuracy"] > 0.9 and scores["reward_accuracy"] > 0.9
    assert scores["frechet"] == pytest.approx(0, abs=1e-3)
    assert "unseen_accuracy" not in scores
    broken = np.where(np.arange(160)[:, None, None, None] == 5, np.nan, source.image)
    with pytest.warns(RuntimeWarning, match="1 of 160 images are NaN or infinite: 5;"):
        broken_scores = text_to_image._scores(source, np.float32(broken), real)
    assert broken_scores.keys() == scores.keys()
    assert all(map(np.isnan, broken_scores.values()))
    far = np.full((1, *source.image.shape[1:]), 1e38, np.float32)
    net = classifiers.untrained(far.shape[1:], 10)
    assert classifiers.accuracy(net, far * np.nan, np.zeros(1)) != 0  # NaN.
    assert classifiers.accuracy(net, far, np.zeros(1)) == 0


@pytest.mark.parametrize("preset", ["smoke", "colours"])
def test_model_reward_and_evaluation_see_different_scans(folder, preset, untrained):
    source = captioned.load(config(preset, {"data.path": folder}))

    def scans(images):
        # The same scan in another ink is the same scan.
        return {x.max(-1).tobytes() for x in images}

    half = len(untrained) // 2
    rewarding, held_out = (
        scans(np.concatenate(v)) for v in (untrained[:half], untrained[half:])
    )
    assert not rewarding & held_out
    assert not scans(source.image) & (rewarding | held_out)


def test_colours_hold_out_combinations(folder, untrained):
    source = captioned.load(config("colours", {"data.path": folder}))
    assert source.prompts[17] == "a green seven" and source.unseen.sum() == 8
    assert source.tokens.shape == (160, 2)
    prompt = np.array([0, 17, 25, 39])
    reward = jax.jit(source.reward)(jnp.asarray(source.held_out[:4]), prompt)
    # Log-probabilities of a digit and of a colour.
    np.testing.assert_allclose(reward, -np.log(40) * np.ones(4), rtol=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"data.source": "faces"}, "digits"),
        ({"data.eval_each": 0}, "eval_each"),
        ({"net.vocab": 5}, "vocab"),
        ({"net.shape": "(9, 8, 1)"}, "shape"),
        ({"data.length": 3}, "length"),
        ({"method.prompts": 11}, "prompts"),
    ],
)
def test_what_does_not_fit_is_refused(folder, fields, message, untrained):
    with pytest.raises(ValueError, match=message):
        tasks.read(digits(folder, **fields))


def test_rows_are_tuned_from_one_pretraining(folder, untrained):
    """Each at the same number of rewards; a stage is named by what it reads."""
    c = digits(folder)
    rows = rows_of(c)
    variants = {
        "no KL",
        "hard clip",
        "supervised",
        "supervised KL-D",
        "supervised KL-O",
    }
    assert set(rows) == {"this model", *variants, "before tuning", "chance"}
    before = rows["before tuning"].stage
    assert before.config.method.stage == "pretrain" and before.after is None
    assert before.config.train.seed == 2 and before.config.train.steps == 3
    for label in ("this model", *variants):
        stage = rows[label].stage
        assert stages.same(stage.after, before)
        assert stage.config.train.to_dict() == {**c.train.to_dict(), "seed": 2}
        assert not any(
            stages.same(stage, rows[other].stage) for other in rows if other != label
        )
    assert rows["chance"].measure().numbers == {"accuracy": 0.1}
    # Tuning for longer starts from the same pretraining, another net from another one.
    for field, same in (("train.steps", True), ("net.width", False)):
        other = rows_of(with_fields(c, {field: 24}))["this model"].stage
        assert stages.same(other.after, before) == same
    # The pretraining alone, and a run that starts from another one's folder.
    first = rows_of(with_fields(c, {"method.stage": "pretrain"}))
    assert set(first) == {"this model", "chance"}
    started = rows_of(with_fields(c, {"train.init_from": "x"}))
    assert set(started) == set(rows) - {"before tuning"}
    assert all(row.stage.after is None for row in started.values() if row.stage)


@pytest.mark.matrix
# Two stages, three guidance weights, two classifiers.
@pytest.mark.programs(150)
def test_a_run_pretrains_tunes_and_continues(folder, tmp_path):
    """One command, and the same in two."""
    fields = [f"--config.{k}={v}" for k, v in {**DIGITS, "data.path": folder}.items()]

    def call(workdir, *more):
        return run.run(
            "dpok:smoke", [*fields, *(f"--config.{x}" for x in more)],
            workdir=str(workdir), alone=True, quiet=True,
        )  # fmt: skip

    def numbers(summary):
        return {row["label"]: row["numbers"][0] for row in summary.content["rows"]}

    whole, first, second = (tmp_path / x for x in ("whole", "first", "second"))
    summary = call(whole)
    (before,) = [r for r in summary.content["rows"] if r["label"] == "before tuning"]
    (stage,) = before["folders"]
    assert (whole / stage / "checkpoints" / "3").is_dir()
    assert (whole / "checkpoints" / "2").is_dir()
    for name in ("samples.png", "samples.npz", f"{stage}/samples.npz"):
        assert (whole / name).exists()
    values = numbers(summary)
    assert values["chance"] == {"accuracy": pytest.approx(0.1)}
    assert 0 <= values["before tuning"]["accuracy"] <= 1
    assert {"best_of_4_accuracy", "guidance_4_accuracy"} <= set(values["before tuning"])
    assert {"path_kl", "reward_accuracy"} <= set(values["this model"])
    records = [
        json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()
    ]
    assert records[-1]["validation_path_kl"] == values["this model"]["path_kl"]

    call(first, "method.stage=pretrain", "train.steps=3", "data.batch=128")
    call(second, f"train.init_from={first}")
    samples = [np.load(x / "samples.npz")["samples"] for x in (whole, second)]
    np.testing.assert_array_equal(*samples)
    again = run.evaluate(str(whole))
    for name in ("accuracy", "path_kl"):
        assert again[name] == pytest.approx(values["this model"][name], rel=1e-5)

    # Fields with several numbers are stored as JSON and still are the same.
    call(whole, "train.steps=3")
    assert (whole / "checkpoints" / "3").is_dir()
    with pytest.raises(ValueError, match="stage before this one"):
        call(tmp_path / "third", f"train.init_from={second}")


def square(ink, side):
    """A square of one colour in the left or the right half of a white image."""
    x = np.ones((8, 8, 3), np.float32)
    x[2:6, 4 * side : 4 * side + 3] = ink
    return x


@pytest.fixture
def glyphs(monkeypatch):
    """Two emoji of every ink, and two whose names say no colour or two."""
    inks = captioned.INKS
    names = [f"{n} {kind}" for n in inks for kind in ("heart", "ball")]
    image = [square(ink, i) for ink in inks.values() for i in (0, 1)]
    names += ["ball", "red blue"]
    image += [square((0, 0, 0), 0), square((0.5, 0.2, 0.5), 1)]
    pairs = emoji.Captioned(np.stack(image), tuple(names), np.arange(len(names)))
    monkeypatch.setattr(captioned.emoji, "emoji", lambda path: pairs)
    captioned._read.cache_clear()
    yield pairs
    captioned._read.cache_clear()


def test_emoji_prompts_rewards_and_accuracy(glyphs):
    source = captioned.load(config("emoji", EMOJI))
    assert source.prompts == glyphs.caption[:14]  # Those that say one colour.
    assert source.chance == pytest.approx(1 / 7)
    own = 2 * glyphs.image[:14] - 1
    prompt = np.arange(14)
    assert source.agrees(own, prompt).all() and source.correct(own, prompt).all()
    other = (prompt + 2) % 14  # Another colour, the same kind.
    assert not source.agrees(own, other).any() and not source.correct(own, other).any()
    reward = jax.jit(source.reward)
    right, wrong = (np.asarray(reward(jnp.asarray(own), p)) for p in (prompt, other))
    np.testing.assert_allclose(right, 0, atol=0.05)
    assert (wrong < right - 0.1).all()
    # All of it in the right colour: the reward is content, accuracy sees no emoji...
    flat = np.ones((1, 8, 8, 3)) * (2 * np.array(captioned.INKS["blue"]) - 1)
    blue = np.array([source.prompts.index("blue heart")])
    assert source.agrees(flat, blue).all()
    # ... and asks for the colour of the nearest one, which is not the reward's rule.
    red = 2 * square(captioned.INKS["red"], 1)[None] - 1
    red[0, :, 0] = 2 * np.array(captioned.INKS["blue"]) - 1
    heart = np.array([source.prompts.index("red heart")])
    assert source.correct(red, heart).all()
    # A tenth is held out, and those prompts are told apart.
    assert len(source.held_out) == 2 and len(source.image) == 14
    assert 0 < source.unseen.sum() <= 2
    with pytest.raises(ValueError, match="prompts must be 14"):
        tasks.read(config("emoji", {**EMOJI, "method.prompts": 3}))


@pytest.mark.matrix
@pytest.mark.programs(40)  # Rewards and distances outside of the step.
def test_emoji_are_tuned_and_evaluated(glyphs):
    """With a U-Net, prompts of several tokens, and prompts without images."""
    c = config("emoji", EMOJI)
    data = tasks.read(c)
    method = papers.load("dpok").make(c, **data.facts)
    batch = data.examples.batch(0, c.data.batch)
    assert set(batch) == {"tokens", "prompt"} and batch["tokens"].shape == (28, 2)

    @jax.jit
    def step(key, batch):
        return method.update(method.init(key, batch), batch)

    state, metrics = step(jax.random.key(0), batch)
    assert np.isfinite(float(metrics["reward"])) and float(metrics["reward"]) < 0
    numbers = rows_of(c)["this model"].watch(method, state)
    assert 0 <= numbers["accuracy"] <= 1 and 0 <= numbers["unseen_accuracy"] <= 1
    assert numbers["path_kl"] == pytest.approx(0, abs=1e-2)


def test_real_images_stand_in_the_rows_of_their_prompts():
    image = np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1) / 10
    label = np.array([1, 0, 1, 1, 2, 0])
    source = types.SimpleNamespace(image=image, agrees=lambda x, p: label == p)
    rows = text_to_image._real(source, np.array([0, 2, 1]), 2).reshape(3, 2)
    np.testing.assert_allclose(rows, [[0.1, 0.5], [0.4, -1], [0, 0.2]])
