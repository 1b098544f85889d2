"""Plans: closed forms against the compiler, and the TPU compiler without a TPU."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import cli, hlo, optim, plan, products, run
from jaxpapers import mesh as meshes
from jaxpapers.optim import plan_dion
from jaxpapers.optim.orthonormalize import RESCUE
from jaxpapers.papers import dion

SMALL = [
    "--config.data.context=16", "--config.data.batch=8", "--config.net.width=64",
    "--config.net.layers=4", "--config.net.heads=2", "--config.optim.clip=0.0",
    "--config.net.unroll=1",
]  # fmt: skip


def sent(rows, part):
    return sum(row["wire_bytes"] for row in rows if row["part"] == part)


@pytest.fixture(scope="module")
def planned():
    """A plan of the smallest model on 4 x 2 devices."""
    return run.plan("dion:smoke", SMALL, mesh="data:4,model:2")


@pytest.mark.matrix
def test_optimizer_sends_what_the_closed_form_says(planned):
    grid = meshes.make_mesh({"data": 4, "model": 2})
    into, out = P(None, "data", "model"), P(None, "model", "data")
    expected = {}
    for shape, spec, count in (
        ((4, 64, 64), into, 3),  # query, key, value
        ((4, 64, 64), out, 1),
        ((4, 64, 192), into, 3),  # gate, up; and down, with P on the same side
    ):
        dimensions = dion.dimensions("", jax.ShapeDtypeStruct(shape, jnp.float32))
        leaf = plan_dion(
            shape, spec, grid, 0.25, dimensions=dimensions, count=count,
            nesterov=True, residual=1.0, normalize_rows=True,
        )  # fmt: skip
        for (kind, axes), size in leaf.bytes_per_step.items():
            key = (kind, ",".join(axes))
            expected[key] = expected.get(key, 0) + size
    rows = [r for r in planned.collectives if r["part"] == "optimizer"]
    got = {(r["kind"], r["axes"]): r["wire_bytes"] for r in rows}
    assert set(got) == set(expected)
    for key, size in expected.items():
        # The compiler merges all-reduces of the optimizer into the backward pass's.
        assert got[key] <= size + 1 if key[0] == "all-reduce" else got[key] == size
    assert sent(planned.collectives, "forward/backward") > 0
    assert (
        planned.parameters
        == 4 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 64 + 2 * 264 * 64
    )
    assert planned.fits is None and planned.devices == 8 and planned.bounds == {}
    lines = plan.format_plan(planned)
    assert "nothing was run" in lines[0] and lines[-1].startswith("by link: data ")


def test_product_flops_of_loops_gradients_and_shards():
    def ones(*shape):
        return np.ones(shape, np.float32)

    a, b = ones(3, 4), ones(4, 5)

    def flops(f, *args):
        return products.product_flops(jax.make_jaxpr(f)(*args).jaxpr)

    def passes(f, *args):
        return products.product_flops(jax.make_jaxpr(f)(*args).jaxpr, passes=True)

    assert flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5
    batched = ones(7, 3, 4), ones(7, 4, 5)
    assert flops(jnp.matmul, *batched) == 7 * 120
    # Both gradients of a product cost as much as it did.
    assert flops(jax.grad(lambda a, b: (a @ b).sum(), (0, 1)), a, b) == 3 * 120

    def loop(w):
        return jax.lax.scan(lambda x, _: (x @ w, None), jnp.ones((2, 4)), length=6)[0]

    assert flops(loop, ones(4, 4)) == 6 * 2 * 2 * 4 * 4
    mesh = meshes.make_mesh({"data": 8})
    split = jax.shard_map(
        lambda x, y: x @ y, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    assert flops(split, ones(16, 4), b) == 2 * 16 * 4 * 5
    high, highest = (
        passes(lambda a, b, p=p: jnp.matmul(a, b, precision=p), a, b)
        for p in ("high", "highest")
    )
    assert (high, highest, passes(jnp.matmul, a, b)) == (360, 720, 120)
    half = [x.astype(jnp.bfloat16) for x in (a, b)]
    narrow = passes(lambda a, b: jnp.matmul(a, b, precision="highest"), *half)
    assert narrow == 120
    choice = lambda a, b: jax.lax.cond(True, lambda: a @ b, lambda: a @ b * 2)  # noqa: E731
    assert flops(choice, a, b) == 120
    # A Dion step's are those of well-conditioned factors, as in the closed form. Two
    # factorisations are counted as a TPU's products: 4 r^3 and 4 r^3 for a single block.
    tx, g = optim.scale_by_dion(1 / 4), {"w": ones(64, 256)}
    pieces = optim.plan_dion((64, 256), P(), {}, 1 / 4).flops + 2 * (8 - 4 / 3) * 16**3
    assert flops(tx.update, g, jax.eval_shape(tx.init, g)) == pytest.approx(pieces)


def optimizer_rows(found):
    return [r for r in found.collectives if r["part"].startswith("optimizer")]


@pytest.mark.matrix
def test_compiles_for_a_tpu_slice(libtpu):
    found = run.plan("dion:smoke", SMALL, topology="v5e:4x4", mesh="data:8,model:2")
    assert found.devices == 16 and found.fits and found.hbm_bytes == 16e9
    optimizer = optimizer_rows(found)
    # The largest is P of the three stacked MLP kernels, or their packed Grams.
    assert {r["axes"] for r in optimizer} <= {"data", "model", "data,model"}
    assert max(r["largest"] for r in optimizer) <= 12 * (192 // 2) * 16
    # Of the matrices, only those that are exchanged travel, split over model.
    thin = [r["matrix"] for r in optimizer if r["kind"] != "all-to-all"]
    assert max(thin) < 64 * 64
    assert max(r["matrix"] for r in optimizer) <= 64 * 192 // 2
    assert all(r["largest"] < 4 * 64 * 192 for r in optimizer)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "dtype", [pytest.param(None, marks=pytest.mark.matrix), jnp.bfloat16]
)
def test_a_tpu_sends_the_closed_form_to_the_byte(libtpu, dtype):
    """P in bfloat16 too: a CPU's compiler would promote that sum to float32."""
    grid = meshes.make_mesh({"data": 8, "model": 2}, plan.topology_devices("v5e:4x4"))
    spec = P("data", "model")
    where = NamedSharding(grid, spec)
    options = {"communication_dtype": dtype, "split_p": "whole"}
    tx = optim.scale_by_dion(1 / 4, sharding=where, **options)
    grads = {"w": jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=where)}
    with jax.set_mesh(grid):
        state = jax.eval_shape(tx.init, grads)
        placed = optim.dion_state_sharding(state, grads, {"w": where})
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            placed,
        )
        text = jax.jit(tx.update).lower(grads, state).compile().as_text()
    found = [c for c in hlo.collectives(text, grid) if f"/{RESCUE}/" not in c.op_name]
    expected = plan_dion((256, 1024), spec, grid, 1 / 4, **options)
    assert hlo.wire_bytes(found) == pytest.approx(expected.bytes_per_step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, mesh, fields",
    [
        ("v5p:8x8x8", "data:64,model:8", []),
        ("v6e:16x16", "data:16,model:16", ["--config.train.accumulate=2"]),
    ],
)
def test_3b_fits_and_sends_no_whole_matrix(libtpu, topology, mesh, fields):
    found = run.plan("dion:3b", fields, topology=topology, mesh=mesh)
    assert found.fits and found.parameters > 3e9
    # Six times parameters times tokens, and a recomputed forward pass, at most 459 or
    # 918 TFLOP a second.
    assert found.bounds["matrix units"] > 6 * 3e9 * 2**21 / found.devices / 918e12
    smallest = 3072 * 1024  # Key and value.
    assert max(r["matrix"] for r in optimizer_rows(found)) < smallest


@pytest.mark.matrix
def test_compressed_replicas_of_two_split_axes_compile_for_a_tpu(libtpu):
    """XLA's partitioner ended the process at the scatter of the embedding's gradient."""
    fields = ["--config.data.context=16", "--config.data.batch=8",
              "--config.net.width=32", "--config.optim.clip=0.0",
              "--config.optim.residual=0",
              "--config.train.replica_sync=lowrank"]  # fmt: skip
    found = run.plan(
        "dion:smoke", fields, topology="v5p:2x2x2", mesh="replica:2,data:2,model:2"
    )
    assert found.fits and any("replica" in r["axes"] for r in optimizer_rows(found))


def test_a_topology_that_does_not_exist(capsys):
    assert cli.main(["plan", "dion:smoke", *SMALL, "--topology", "v9:1"]) == 1
    assert "cannot describe 'v9:1'" in capsys.readouterr().err


@pytest.mark.matrix
def test_command_line(planned, capsys, monkeypatch):
    """The text and the JSON of a plan."""
    arguments = ["plan", "dion:smoke", *SMALL, "--mesh", "data:4,model:2"]
    monkeypatch.setattr(plan, "plan", lambda *args, **kwargs: planned)
    assert cli.main(arguments) == 0
    assert "forward/backward" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == 8 and found["mesh"] == {"data": 4, "model": 2}
    parts = {row["part"] for row in found["collectives"]}
    assert parts >= {"forward/backward", "optimizer"} and found["flops"] > 0


@pytest.mark.matrix
def test_fake_devices_and_json(tmp_path):
    """As a user calls it: nothing but the JSON on standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxpapers", "plan", "dion:smoke", *SMALL, "--json",
         "--fake-devices=4", "--mesh=data:2,model:2"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == 4 and found["mesh"] == {"data": 2, "model": 2}
    parts = {row["part"] for row in found["collectives"]}
    assert parts >= {"forward/backward", "optimizer"}
    assert found["flops"] > 0
