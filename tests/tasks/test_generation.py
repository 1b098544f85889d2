"""The tasks of samples: distances by hand, judges, rewards, stages of a run."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import papers, plots, run, tasks
from jaxpapers.method import Method, State
from jaxpapers.tasks import generation, judges, text_to_image

STATE = State(jnp.zeros(()), {}, (), (), jnp.zeros(()))


def write_digits(folder, count=320):
    """Scans whose class is how many of the first pixels are on."""
    rng = np.random.default_rng(0)
    with gzip.open(folder / "digits.csv.gz", "wt") as f:
        for i in range(count):
            row = rng.integers(0, 6, 64)
            row[: 3 * (i % 10)] = 16
            f.write(",".join(map(str, [*row, i % 10])) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"))


def grid():
    return meshes.make_mesh({"data": 1}, jax.devices()[:1])


def config(target, **fields):
    return run.load_config(target, [f"--config.{k}={v}" for k, v in fields.items()])


def sampling(sampler, **kwargs):
    return Method(None, None, None, sampler, **kwargs)


def test_points_are_measured_against_held_out_ones():
    c = config("sft_pg:smoke", **{"data.count": 400, "data.eval_count": 300})
    source = generation.read(c)
    assert len(source.train) == 400 and len(source.held_out) == 300
    shifted = jnp.asarray(source.held_out + np.float32([3.0, 4.0]))
    method = sampling(lambda params, key, shape, extra: shifted)
    task = tasks.load(c, method, grid())
    found = task.evaluate(STATE)
    assert found["validation_w1"] == pytest.approx(5, rel=1e-4)
    assert found["validation_w2"] == pytest.approx(5, rel=1e-4)
    assert 3 < found["validation_sliced_w2"] < 4.5
    assert set(task.evaluate(STATE, quick=True)) == {"validation_sliced_w2"}
    base = task.baselines()
    assert base["two-sample floor"] < 0.5 * base["fitted Gaussian"]
    picture = task.picture(STATE)
    assert picture["samples"].shape == picture["data"].shape == (300, 2)


def test_what_a_method_diagnoses_is_in_its_evaluation():
    c = config("sft_pg:smoke", **{"data.count": 100, "data.eval_count": 50})
    method = sampling(
        lambda params, key, shape, extra: jnp.zeros(shape),
        diagnose=lambda params, extra, batch, key: {"size": batch["x"].size * 1.0},
    )
    assert tasks.load(c, method, grid()).evaluate(STATE)["size"] == 100


def test_large_logarithms_of_a_certificate_warn():
    c = config("sft_pg:smoke", **{"data.count": 100, "data.eval_count": 50})
    for size in (19.0, 21.0):
        method = sampling(
            lambda params, key, shape, extra: jnp.zeros(shape),
            diagnose=lambda *args, size=size: {"log_factor": size},
        )
        task = tasks.load(c, method, grid())
        if size < 20:
            assert task.evaluate(STATE)["log_factor"] == 19
        else:
            with pytest.warns(RuntimeWarning, match="float64"):
                task.evaluate(STATE)


@pytest.mark.parametrize("dim, target", [(1, "line"), (3, "digits"), (5, "gaussian")])
def test_a_score_model_in_other_dimensions_than_two(folder, tmp_path, dim, target):
    """Data, a step, certificate and picture: on a line, and beyond a plane."""
    c = config(
        f"score_wasserstein:{target}",
        **{"net.shape": (dim,), "net.widths": (8,), "data.eval_count": 100,
           "data.count": 200, "data.path": folder if target == "digits" else ""},
    )  # fmt: skip
    source = generation.read(c)
    assert source.train.shape[1:] == source.held_out.shape[1:] == (dim,)
    if target == "line":
        assert ((source.train > 0).sum(), np.abs(source.train).min() > 0.05) == (
            100,
            True,
        )
    method = papers.load("score_wasserstein").make(c)
    task = tasks.load(c, method, grid())
    batch = task.examples.batch(0, c.data.batch)
    state = jax.jit(method.init)(jax.random.key(0), batch)
    state, _ = jax.jit(method.update)(state, batch)
    found = task.evaluate(state)
    assert found["certified_w2"] <= found["bound"]
    plots.plot_samples(None, task.picture(state), tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 5000


def test_panels_against_a_metric_have_their_own_axes(tmp_path, figures):
    (tmp_path / "run").mkdir()
    rows = [{"step": i, "time": 0, "w": 0.1 * i, "bound": i, "log": -i} for i in (1, 2)]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    plots.plot_against(
        {"a": [tmp_path / "run"]}, "w", {"bound": "xy=", "log": "x"}, tmp_path / "a.png"
    )
    left, right = figures[0].axes
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert (right.get_xscale(), right.get_yscale()) == ("log", "linear")
    (line,) = [x for x in left.lines if x.get_label() == "equal"]
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert not [x for x in right.lines if x.get_label() == "equal"]


def test_pictures_are_measured_by_a_judge_of_other_pictures(folder):
    c = config("sft_pg:digits", **{"data.path": folder, "data.eval_count": 160})
    source = generation.read(c)
    real = jnp.asarray(source.train)
    method = sampling(
        lambda params, key, shape, extra, chain=None: (
            real if chain is None else jnp.zeros_like(real)
        )
    )
    task = tasks.load(c, method, grid())
    found = task.evaluate(STATE)
    assert found["validation_frechet"] == pytest.approx(0, abs=1e-3)
    assert found["validation_full_chain_frechet"] > 1
    assert 0 < task.baselines()["two-sample floor"] < 1000
    assert judges.accuracy(source.judge, source.train, _labels(source)) > 0.9


def _labels(source):
    """The class is how many triples of first pixels are on."""
    flat = source.train.reshape(len(source.train), -1)[:, :27]
    return (flat > 0.9).sum(1) // 3


@pytest.mark.parametrize("start", ["data", "prior"])
def test_a_certificate_of_unequal_halves(folder, start):
    """Digits have one scan more to train on than to compare with."""
    write_digits(folder, 321)
    c = config(
        "score_wasserstein:digits",
        **{"data.path": folder, "method.start": start, "net.widths": "(8,)"},
    )
    method = papers.load("score_wasserstein").make(c)
    state = method.init(jax.random.key(0), {"x": jnp.zeros((4, 2))})
    task = tasks.load(c, method, grid())
    found = task.evaluate(state)
    assert len(generation.read(c).train) == 161
    assert np.isfinite(found["validation_w2"])
    assert found["certified_w2"] <= found["bound"]
    write_digits(folder)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"data.source": "spiral"}, ValueError, "swiss_roll"),
        ({"data.eval_count": 0}, ValueError, "eval_count"),
        ({"data.source": "fashion"}, FileNotFoundError, "data.path"),
        ({"data.source": "moons", "net.shape": "(3,)"}, ValueError, "net.shape"),
    ],
)
def test_generation_refuses(fields, error, message):
    with pytest.raises(error, match=message):
        generation.read(config("sft_pg:smoke", **fields))


SMALL = {
    "data.eval_each": 4, "data.batch": 40, "net.width": 16, "net.blocks": 1,
    "net.value": "(16,)", "sampler.steps": 4, "method.transitions": 2,
    "method.value_transitions": 2, "pretrain.steps": 3, "train.steps": 2,
}  # fmt: skip


def test_prompts_are_rewarded_by_one_classifier_and_judged_by_another(folder):
    c = config("dpok:smoke", **{**SMALL, "data.path": folder})
    source = text_to_image.read(c)
    complete, options = tasks.prepare(c)
    assert complete is c
    label = (source.tokens - 1)[:40]
    assert len(source.image) == 160 and len(source.held_out) == 80
    reward = options["reward_fn"](jnp.asarray(source.held_out), np.arange(80) % 10)
    assert reward.shape == (80,) and float(reward.min()) >= 0
    # Half of the captions are drawn anew, a tenth of those to what they were.
    flat = source.image.reshape(160, -1)[:, :27]
    real = (flat > 0.9).sum(1) // 3
    wrong = (source.tokens - 1 != real).mean()
    assert 0.3 < wrong < 0.6 and label.max() <= 9
    found = text_to_image._scores(source, source.image, real)
    assert found["validation_judge_accuracy"] > 0.9
    assert found["validation_frechet"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("preset", ["smoke", "colours"])
def test_model_reward_and_judge_see_different_scans(folder, preset, monkeypatch):
    seen = []

    def untrained(image, label, classes, seed=0):
        seen.append(image)
        return judges.untrained(image.shape[1:], classes)

    monkeypatch.setattr(judges, "train", untrained)
    text_to_image._read.cache_clear()
    source = text_to_image.read(config(f"dpok:{preset}", **{"data.path": folder}))
    text_to_image._read.cache_clear()

    def scans(images):
        # The same scan in another ink is the same scan.
        return {x.max(-1).tobytes() for x in images}

    half = len(seen) // 2
    paid, judge = (scans(np.concatenate(v)) for v in (seen[:half], seen[half:]))
    assert not paid & judge and not scans(source.image) & (paid | judge)


def test_colours_hold_out_combinations(folder):
    c = config("dpok:colours", **{"data.path": folder})
    source = text_to_image.read(c)
    assert source.prompts[17] == "a green seven" and source.unseen.sum() == 8
    assert source.tokens.shape == (160, 2)
    inked = source.held_out[:4]
    reward = source.reward(jnp.asarray(inked), np.array([0, 17, 25, 39]))
    assert reward.shape == (4,) and float(reward.max()) <= 0


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
def test_text_to_image_refuses(folder, fields, message):
    c = config("dpok:smoke", **{**SMALL, "data.path": folder, **fields})
    with pytest.raises(ValueError, match=message):
        tasks.prepare(c)


def test_a_run_pretrains_tunes_and_continues(folder, tmp_path):
    """One command, and the same in two; rivals share the pretraining."""
    fields = [f"--config.{k}={v}" for k, v in {**SMALL, "data.path": folder}.items()]
    whole = tmp_path / "whole"
    found = run.train("dpok:smoke", fields, workdir=str(whole), alone=True, quiet=True)
    assert (whole / "pretrain" / "checkpoints" / "3").is_dir()
    assert (whole / "checkpoints" / "2").is_dir()
    for name in ("samples.png", "samples.npz", "pretrain/samples.png"):
        assert (whole / name).exists()
    assert found["chance"] == pytest.approx(0.1)
    assert 0 <= found["before tuning"] <= 1
    assert {"validation_path_kl", "validation_reward_accuracy"} <= set(found)

    first, second = tmp_path / "first", tmp_path / "second"
    stage = [*fields, "--config.method.stage=pretrain", "--config.train.steps=3"]
    stage += ["--config.data.batch=128"]
    run.train("dpok:smoke", stage, workdir=str(first), quiet=True)
    start = [*fields, f"--config.train.init_from={first}"]
    run.train("dpok:smoke", start, workdir=str(second), alone=True, quiet=True)
    samples = [np.load(x / "samples.npz")["samples"] for x in (whole, second)]
    np.testing.assert_array_equal(*samples)
    again = run.evaluate(str(whole))
    for name in ("validation_judge_accuracy", "validation_path_kl"):
        assert again[name] == pytest.approx(found[name], rel=1e-5)

    # Fields with several numbers are stored as JSON and still are the same.
    longer = [*fields, "--config.train.steps=3"]
    run.train("dpok:smoke", longer, workdir=str(whole), alone=True, quiet=True)
    assert (whole / "checkpoints" / "3").is_dir()

    with pytest.raises(ValueError, match="stage before this one"):
        run.train(
            "dpok:smoke", [*fields, f"--config.train.init_from={second}"],
            workdir=str(tmp_path / "third"), alone=True, quiet=True,
        )  # fmt: skip

    one = run.train(
        "sft_pg:smoke",
        [
            "--config.data.count=200", "--config.data.eval_count=50",
            "--config.data.batch=40", "--config.pretrain.steps=2",
            "--config.train.steps=1", "--config.net.widths=(8,)",
            "--config.net.critic=(8,)", "--config.net.value=(8,)",
        ],
        workdir=str(tmp_path / "roll"), quiet=True,
    )  # fmt: skip
    summary = json.loads((tmp_path / "roll" / "comparison.json").read_text())
    assert summary["baselines"]["before tuning"] == one["before tuning"]


def test_contact_sheets_place_pictures_row_by_row():
    x = np.zeros((6, 2, 2, 1), np.float32) - 1
    x[4] = 1
    sheet = plots.contact_sheet(x, 2)
    assert sheet.shape == (2 * 3 - 1, 3 * 3 - 1)
    assert sheet[3:5, 3:5].tolist() == [[1, 1], [1, 1]]
    assert sheet[:2, :2].sum() == 0
    assert plots.contact_sheet(np.zeros((4, 2, 2, 3)), 2).shape == (5, 5, 3)
