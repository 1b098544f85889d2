"""Generation: distances by hand, certificates, baselines, stages before a row."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import papers, run, stages, tasks
from jaxpapers.method import Method, State
from jaxpapers.study import Result
from jaxpapers.tasks import classifiers, generation

STATE = State(0, {}, (), (), 0)


def write_digits(folder, count=320):
    """Scans whose class is how many triples of the first pixels are on."""
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


def config(target, **fields):
    return run.load_config(target, [f"--config.{k}={v}" for k, v in fields.items()])


def study_of(name, c):
    grid = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    return tasks.study(name, c, tasks.read(c), grid)


def rows_of(name, c):
    return {row.label: row for row in study_of(name, c).rows(c.train.seed)}


def sampling(sampler, **kwargs):
    return Method(None, None, None, sampler, **kwargs)


def test_points_are_compared_with_held_out_ones():
    c = config("sft_pg:smoke", **{"data.count": 400, "data.eval_count": 300})
    source = generation.load(c)
    assert len(source.train) == 400 and len(source.held_out) == 300
    shifted = source.held_out + np.float32([3.0, 4.0])
    method = sampling(
        lambda params, key, shape, **options: jnp.asarray(shifted[: shape[0]]),
        diagnose=lambda params, extra, batch, key: {"size": batch["x"].size * 1.0},
    )
    rows = rows_of("sft_pg", c)
    finding = rows["this model"].measure(method, STATE)
    numbers = finding.numbers
    for name in ("w1", "w2", "certified_w2"):
        assert numbers[name] == pytest.approx(5, rel=1e-4)
    assert 3 < numbers["sliced_w2"] < 4.5
    # What the method says of itself stands beside.
    assert numbers["size"] == 2 * generation.CERTIFIED
    quick = rows["this model"].watch(method._replace(diagnose=None), STATE)
    assert quick == {"sliced_w2": numbers["sliced_w2"]}
    floor, gaussian = (
        rows[k].measure().numbers["sliced_w2"]
        for k in ("two-sample floor", "fitted Gaussian")
    )
    assert floor < 0.5 * gaussian < numbers["sliced_w2"]
    images = finding.files["samples.npz"]
    assert images["samples"].shape == images["data"].shape == (300, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_named(value):
    c = config("sft_pg:smoke", **{"data.count": 60, "data.eval_count": 50})

    def sample(params, key, shape, **options):
        rows = jnp.arange(shape[0])[:, None]
        return jnp.where((rows == 7) | (rows == 11), value, jnp.ones(shape))

    method = sampling(sample, diagnose=lambda *args: {"size": jnp.ones(())})
    row = rows_of("sft_pg", c)["this model"]
    with pytest.warns(
        RuntimeWarning, match="2 of 50 .*samples are NaN or inf.*: 7, 11"
    ):
        numbers = row.measure(method, STATE).numbers
        quick = row.watch(method, STATE)
    assert numbers.pop("size") == quick.pop("size") == 1
    assert set(numbers) >= {"sliced_w2", "w1", "w2", "certified_w2"}
    assert all(map(np.isnan, [*numbers.values(), *quick.values()]))


def test_large_logarithms_of_a_certificate_warn():
    """Compiled, the certificate cannot."""
    c = config("sft_pg:smoke", **{"data.count": 60, "data.eval_count": 50})
    row = rows_of("sft_pg", c)["this model"]
    method = sampling(
        lambda params, key, shape, **options: jnp.zeros(shape),
        diagnose=lambda params, *args: {"log_factor": params},
    )
    state = STATE._replace(params=np.float32(19))
    assert row.watch(method, state)["log_factor"] == 19
    with pytest.warns(RuntimeWarning, match="float64"):
        row.watch(method, state._replace(params=np.float32(21)))


def test_tuning_starts_from_the_row_before_it():
    c = config("sft_pg:smoke", **{"data.count": 60, "data.eval_count": 50})
    rows = rows_of("sft_pg", c)
    own, before = rows["this model"].stage, rows["before tuning"].stage
    assert stages.same(own.after, before) and before.after is None
    assert before.config.method.stage == "pretrain"
    assert before.config.train.steps == c.pretrain.steps
    assert before.config.data.batch == c.pretrain.batch
    alone = config("sft_pg:smoke", **{"train.init_from": "x", "data.count": 60})
    rows = rows_of("sft_pg", alone)
    assert "before tuning" not in rows and rows["this model"].stage.after is None
    # The regularizers of the certificate's constant are rows of the plain model only.
    for value, others in (("none", {"spectral norm", "weight clip"}), ("clip", set())):
        c = config("score_wasserstein:smoke", **{"net.regularizer": value})
        rows = rows_of("score_wasserstein", c)
        trained = {k: row for k, row in rows.items() if row.stage}
        assert set(trained) == {"this model", *others}
        values = {row.stage.config.net.regularizer for row in trained.values()}
        assert len(values) == len(trained)
        assert all(row.stage.after is None for row in trained.values())


@pytest.mark.matrix
@pytest.mark.parametrize(
    "dim, target",
    [
        (1, "line"),
        pytest.param(3, "digits", marks=pytest.mark.matrix),
        pytest.param(5, "gaussian", marks=pytest.mark.matrix),
    ],
)
def test_a_score_model_in_other_dimensions_than_two(
    folder, tmp_path, dim, target, rendered
):
    """Data, a step, certificate and figures: on a line, and beyond a plane."""
    c = config(
        f"score_wasserstein:{target}",
        **{"net.shape": (dim,), "net.widths": (8,), "data.eval_count": 200,
           "data.count": 200, "data.path": folder if target == "digits" else ""},
    )  # fmt: skip
    source = generation.load(c)
    assert source.train.shape[1:] == source.held_out.shape[1:] == (dim,)
    if target == "line":
        assert (source.train > 0).sum() == 100 and np.abs(source.train).min() > 0.05
    study = study_of("score_wasserstein", c)
    own = study.rows(0)[0]
    method, state = started("score_wasserstein", c, step=True)
    finding = own.measure(method, state)
    assert finding.numbers["certified_w2"] <= finding.numbers["bound"]
    record = {f"validation_{k}": v for k, v in finding.numbers.items()}
    text = json.dumps({"step": 1, "time": 0, **record})
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    for name, draw in study.pictures.items():
        draw([Result(own, [finding], [tmp_path])], tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def started(name, c, step=False):
    """A method and its initial state, or that after a step, in one program."""
    data = tasks.read(c)
    method = papers.load(name).make(c, **data.facts)
    batch = data.examples.batch(0, c.data.batch)

    @jax.jit
    def start(key, batch):
        state = method.init(key, batch)
        return method.update(state, batch)[0] if step else state

    return method, start(jax.random.key(0), batch)


# Parameters of a classifier are drawn one by one.
@pytest.mark.matrix
@pytest.mark.programs(40)
def test_images_are_compared_in_the_features_of_a_classifier_of_others(folder):
    c = config("sft_pg:digits", **{"data.path": folder, "data.eval_count": 160})
    source = generation.load(c)
    real = jnp.asarray(source.train)
    method = sampling(
        lambda params, key, shape, extra, schedule: (
            real if len(schedule.std) == c.sampler.steps else jnp.zeros_like(real)
        )
    )
    rows = rows_of("sft_pg", c)
    numbers = rows["this model"].measure(method, STATE).numbers
    assert numbers["frechet"] == pytest.approx(0, abs=1e-3)
    # In all of training's steps it draws something else.
    assert numbers["full_chain_frechet"] > 1
    assert 0 < rows["two-sample floor"].measure().numbers["frechet"] < 1000
    on = source.train.reshape(len(source.train), -1)[:, :27] > 0.9
    label = on.sum(1) // 3
    assert classifiers.accuracy(source.classifier, source.train, label) > 0.9


@pytest.mark.matrix
@pytest.mark.parametrize("start", ["data", "prior"])
def test_a_certificate_of_unequal_halves(tmp_path, start):
    """Digits have one scan more to train on than to compare with."""
    write_digits(tmp_path, 321)
    c = config(
        "score_wasserstein:digits",
        **{"data.path": tmp_path, "method.start": start, "net.widths": "(8,)"},
    )
    assert len(generation.load(c).train) == 161
    own = rows_of("score_wasserstein", c)["this model"]
    numbers = own.measure(*started("score_wasserstein", c)).numbers
    assert np.isfinite(numbers["w2"])
    assert numbers["certified_w2"] <= numbers["bound"]


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"data.source": "spiral"}, ValueError, "swiss_roll"),
        ({"data.eval_count": 0}, ValueError, "eval_count"),
        ({"data.source": "fashion"}, FileNotFoundError, "data.path"),
        ({"data.source": "moons", "net.shape": "(3,)"}, ValueError, "net.shape"),
    ],
)
def test_sources_that_cannot_be_read(fields, error, message):
    with pytest.raises(error, match=message):
        generation.load(config("sft_pg:smoke", **fields))


@pytest.mark.matrix
def test_a_run_trains_both_stages(tmp_path):
    fields = {
        "data.count": 200, "data.eval_count": 50, "data.batch": 40, "train.steps": 1,
        "pretrain.steps": 2, "net.widths": "(8,)", "net.critic": "(8,)",
        "net.value": "(8,)",
    }  # fmt: skip
    overrides = [f"--config.{k}={v}" for k, v in fields.items()]
    summary = run.run("sft_pg:smoke", overrides, workdir=str(tmp_path), quiet=True)
    rows = {row["label"]: row for row in summary.content["rows"]}
    (folder,) = rows["before tuning"]["folders"]
    assert rows["this model"]["folders"] == ["."]
    values = [rows[k]["numbers"][0]["w2"] for k in ("this model", "before tuning")]
    assert np.isfinite(values).all() and values[0] != values[1]
    for name in ("samples.png", "samples.npz", f"{folder}/samples.npz"):
        assert (tmp_path / name).exists()
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["samples"].shape == (generation.EXACT, 2)
