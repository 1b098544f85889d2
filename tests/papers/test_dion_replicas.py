"""The language model trained by replicas that average P and R instead of gradients."""

import shutil

import chex
import jax
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import run, tasks, train
from jaxpapers.config import load_config
from jaxpapers.papers import dion

SMALL = [
    "--config.data.context=16", "--config.data.batch=8", "--config.net.width=32",
    "--config.net.layers=1", "--config.net.heads=2", "--config.optim.clip=0.0",
    "--config.train.steps=6", "--config.train.sample=0", "--config.optim.residual=0",
]  # fmt: skip
LOWRANK = "--config.train.replica_sync=lowrank"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        lines = [f"def f{j}(x):\n    return x + {(i * j) % 7}\n\n" for j in range(20)]
        (folder / f"{i}.py").write_text("".join(lines))
    return f"--config.data.path={folder}"


class Losses:
    """A report that keeps the losses."""

    def __init__(self):
        self.values = []

    def start(self, *args):
        pass

    def step(self, step, metrics):
        self.values.append(metrics["loss"])

    def evaluation(self, step, values):
        pass


def fit(corpus, mesh, *overrides, workdir=None, **options):
    """(final state, losses) of a small run on a mesh of 8 devices."""
    config = load_config("dion:smoke", [*SMALL, corpus, *overrides])
    grid = meshes.make_mesh(meshes.parse_mesh(mesh))
    method = dion.make(config)
    report = Losses()
    state = train.fit(
        method,
        tasks.read(config).examples,
        steps=config.train.steps,
        batch=config.data.batch,
        mesh=grid,
        workdir=workdir,
        report=report,
        **options,
    )
    return jax.device_get(state._replace(key=jax.random.key_data(state.key))), np.array(
        report.values
    )


@pytest.fixture(scope="module")
def plain_run(corpus, tmp_path_factory):
    """Workdir of a finished run."""
    folder = tmp_path_factory.mktemp("plain")
    fit(corpus, "data:8", workdir=folder)
    return folder


@pytest.fixture(scope="module")
def plain(corpus):
    return fit(corpus, "replica:2,data:2,model:2")


@pytest.mark.matrix
@pytest.mark.parametrize(
    "mesh, extra",
    [
        ("replica:2,data:2,model:2", ()),
        pytest.param("replica:4,data:2", (), marks=pytest.mark.matrix),
        ("slice:2,data:2,model:2", ("--config.train.replica_axis=slice",)),
        pytest.param(
            "replica:2,data:2,model:2",
            ("--config.train.accumulate=2",),
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_same_loss_curve_as_averaged_gradients(corpus, plain, mesh, extra):
    state, losses = fit(corpus, mesh, LOWRANK, *extra)
    np.testing.assert_allclose(losses, plain[1], rtol=2e-5)
    assert losses[-1] < losses[0] - 0.5
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(plain[0].params)):
        np.testing.assert_allclose(x, y, atol=2e-4)
    momentum = state.opt_state.inner_states["dion"].inner_state[0].momentum
    up = momentum["layers"]["mlp"]["up"]["kernel"]
    assert up.ndim == 4  # One for each replica, and they differ.
    assert np.ptp(up, 0).max() > 0.1 * np.abs(up).max()


@pytest.mark.matrix
def test_slices_that_exchange_bfloat16(corpus, plain):
    """P, R and all other gradients, rounded to 8 bits on their way."""
    _, losses = fit(
        corpus, "slice:2,data:2,model:2", LOWRANK, "--config.train.replica_axis=slice",
        "--config.optim.communication_dtype=bfloat16",
    )  # fmt: skip
    np.testing.assert_allclose(losses, plain[1], rtol=2.0**-8)


@pytest.mark.matrix
@pytest.mark.programs(80)  # Five runs of the trainer.
def test_resumes_bitwise_and_on_other_replicas_and_ranks(corpus, tmp_path):
    mesh = "replica:2,data:2,model:2"
    want, _ = fit(corpus, mesh, LOWRANK)
    fit(corpus, mesh, LOWRANK, "--config.train.steps=6", workdir=tmp_path / "a",
        save_every=3)  # fmt: skip
    # What a run stopped at step 3 leaves behind.
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "6")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    got, _ = fit(corpus, mesh, LOWRANK, workdir=tmp_path / "a")
    chex.assert_trees_all_equal(got, want)
    got, _ = fit(corpus, "replica:4,data:2", LOWRANK, workdir=tmp_path / "b")
    for x, y in zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params)):
        np.testing.assert_allclose(x, y, atol=2e-4)
    got, losses = fit(
        corpus, "data:8", "--config.optim.rank_fraction=0.5", workdir=tmp_path / "c"
    )
    q = got.opt_state.inner_states["dion"].inner_state[0].q
    assert q["layers"]["mlp"]["up"]["kernel"].shape[-1] == 16
    assert len(losses) == 3 and np.isfinite(losses).all()


@pytest.mark.matrix
@pytest.mark.programs(40)  # Two runs of the trainer.
@pytest.mark.parametrize("other", ["net.width=16", "net.vocab_size=512"])
def test_another_network_is_no_matter_of_resizing(corpus, tmp_path, other, plain_run):
    shutil.copytree(plain_run, tmp_path / "run")
    with pytest.raises(ValueError, match="has shape .*, this config expects"):
        fit(corpus, "data:8", f"--config.{other}", workdir=tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["6"]


@pytest.mark.matrix
@pytest.mark.programs(80)  # A run, its evaluation and its sample.
def test_a_run_of_replicas_is_read_without_them(corpus, tmp_path):
    folder = str(tmp_path / "run")
    summary = run.run(
        "dion:smoke", [*SMALL, corpus, LOWRANK], workdir=folder, quiet=True,
        mesh="replica:2,data:4",
    )  # fmt: skip
    bits = summary.content["rows"][0]["numbers"][0]["bits"]
    assert run.evaluate(folder)["bits"] == pytest.approx(bits, rel=1e-5)
    assert len(run.sample(folder, length=3)) > 0
    assert run.export(folder, str(tmp_path / "p.safetensors")).exists()


@pytest.mark.matrix
def test_replicas_compute_nothing_twice(corpus):
    """Of the same batch, a device of replica 2 x data 4 does what one of data 8 does."""
    config = load_config("dion:smoke", [*SMALL, corpus])
    batch = tasks.abstract(config).shapes
    flops = {}
    for mesh in ("data:8", "replica:2,data:4"):
        grid = meshes.make_mesh(meshes.parse_mesh(mesh))
        compiled = train.compile(dion.make(config), grid, batch)
        flops[mesh] = compiled.executable.cost_analysis()["flops"]
    # Dion's factors are split over data alone.
    assert flops["replica:2,data:4"] < 1.3 * flops["data:8"]


def test_errors(corpus):
    with pytest.raises(
        ValueError, match="needs optim.name=dion, optim.clip=0 and optim"
    ):
        fit(corpus, "replica:2,data:4", LOWRANK, "--config.optim.clip=1.0")
    with pytest.raises(ValueError, match="must be gradient or lowrank"):
        fit(corpus, "data:8", "--config.train.replica_sync=half")
    with pytest.raises(ValueError, match="replica_axis must be replica or slice"):
        fit(corpus, "data:8", "--config.train.replica_axis=data")
    with pytest.raises(ValueError, match="'replica'.*--mesh replica:2,data:4"):
        fit(corpus, "data:8", LOWRANK)
    with pytest.raises(ValueError, match="need more than one device on mesh axis 'rep"):
        fit(corpus, "replica:1,data:8", LOWRANK)
