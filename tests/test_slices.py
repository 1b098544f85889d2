"""Plans of several TPU slices: what crosses the network between them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import cli, hlo, optim, plan, run, tasks
from jaxpapers import mesh as meshes
from jaxpapers.config import load_config
from jaxpapers.method import param_spec, path_name
from jaxpapers.nets import transformer
from jaxpapers.optim import plan_dion
from jaxpapers.papers import dion

SMALL = ["--config.data.context=16", "--config.data.batch=8"]


def test_only_the_axis_slice_crosses_slices(libtpu):
    chips = plan.topology_devices("v5e:2x2", 2)
    assert dict(meshes.make_mesh(None, chips).shape) == {
        "slice": 2, "data": 4, "model": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="on 2 TPU slices: expected the axis slice:2"):
        meshes.make_mesh({"data": 8}, chips)
    with pytest.raises(ValueError, match="on 2 TPU slices: .*--mesh slice:2,data:4"):
        meshes.make_mesh({"slice": 4, "data": 2}, chips)
    with pytest.raises(ValueError, match="does not fit the topology"):
        chips = plan.topology_devices("v5e:4x4", 2)
        meshes.make_mesh({"slice": 2, "data": 8, "replica": 2}, chips)


def test_a_sum_over_slices_is_found_in_a_tpus_program(libtpu):
    """Inside a slice it is scattered first, so a chip sends its share, in every turn."""
    devices = plan.topology_devices("v5e:2x2", 2)
    grid = meshes.make_mesh({"slice": 2, "data": 2, "model": 2}, devices)
    assert [{d.slice_index for d in half.flat} for half in grid.devices] == [{0}, {1}]

    def repeat(x):
        def turn(x, _):
            return jax.lax.pmean(jnp.sin(x), ("slice", "data")), None

        return jax.lax.scan(turn, x, length=5)[0]

    spec = P("data", "model")
    f = jax.jit(jax.shard_map(
        repeat, mesh=grid, in_specs=spec, out_specs=spec, check_vma=False
    ))  # fmt: skip
    x = jax.ShapeDtypeStruct(
        (512, 512), jnp.float32, sharding=NamedSharding(grid, spec)
    )
    found = hlo.collectives(f.lower(x).compile().as_text(), grid)
    slow = [c for c in found if c.between_slices]
    assert {(c.kind, c.axes, c.count) for c in slow} == {("all-reduce", ("slice",), 5)}
    # A block has 256 x 256 numbers, of which each of the two on `data` sends half.
    assert sum(c.wire_bytes for c in slow) == hlo.ring_bytes(
        "all-reduce", 256 * 256 * 4 / 2, 2
    )
    fast = {(c.kind, c.axes, c.count) for c in found if not c.between_slices}
    assert fast == {("reduce-scatter", ("data",), 5), ("all-gather", ("data",), 5)}


@pytest.mark.matrix
@pytest.mark.parametrize(
    "dtype", [pytest.param(None, marks=pytest.mark.matrix), jnp.bfloat16]
)
def test_slices_exchange_the_closed_form_and_no_gradient(libtpu, dtype):
    devices = plan.topology_devices("v5e:2x2", 2)
    grid = meshes.make_mesh({"slice": 2, "data": 2, "model": 2}, devices)
    shape, spec = (1024, 2048), P("data", "model")
    where = NamedSharding(grid, spec)
    options = {"communication_dtype": dtype, "replicate_axis": "slice"}
    tx = optim.scale_by_dion(1 / 4, sharding=where, **options)

    def local(grads, state):
        return tx.update(jax.tree.map(lambda g: g[0], grads), state)

    with jax.set_mesh(grid):
        params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)}
        state = jax.eval_shape(tx.init, params)
        placed = optim.dion_state_sharding(
            state, params, {"w": where}, replicate_axis="slice"
        )
        specs = optim.replica_specs(state, params, "slice")
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            placed,
        )
        each = NamedSharding(grid, P("slice", *spec))
        grads = {"w": jax.ShapeDtypeStruct((2, *shape), jnp.float32, sharding=each)}
        update = jax.shard_map(
            local, in_specs=(P("slice"), specs), out_specs=(P(), specs),
            axis_names={"slice"},
        )  # fmt: skip
        text = jax.jit(update).lower(grads, state).compile().as_text()
    slow = [c for c in hlo.collectives(text, grid) if c.between_slices]
    expected = plan_dion(shape, spec, grid, 1 / 4, slices="slice", **options)
    key = ("all-reduce", ("slice",))
    assert hlo.wire_bytes(slow) == {key: expected.bytes_per_step[key]}
    # A chip's share of the gradient would be this large.
    assert max(c.elements for c in slow) < 1024 * 2048 / 4


@pytest.mark.matrix
def test_plan_of_two_slices(libtpu):
    found = run.plan(
        "dion:smoke", SMALL, topology="v5e:2x2", slices=2, mesh="slice:2,data:4"
    )
    assert found.devices == 8 and found.mesh == {"slice": 2, "data": 4, "model": 1}
    assert set(found.links) <= {"DCN", "ICI data", "ICI ?"}
    assert found.links["DCN"] == sum(
        r["wire_bytes"] for r in found.collectives if r["axes"] == "slice"
    )
    # The gradient's average, of which each of the four chips of a slice sends its share.
    assert found.links["DCN"] >= found.parameters * 4 / 4
    assert any(row["part"] == "optimizer" for row in found.collectives)
    lines = plan.format_plan(found)
    assert "2 slices of v5e:2x2, 8 devices" in lines[0] and "DCN" in lines[-2]
    assert "by the chip's public figures (bounds, not measured)" in lines[-1]
    inside = sum(size for link, size in found.links.items() if link != "DCN")
    assert found.bounds["ICI"] == pytest.approx(inside / 200e9)  # 400 both ways.
    # 6.4 Tbit/s of a pod of 256 chips.
    assert found.bounds["DCN"] == pytest.approx(found.links["DCN"] / (6.4e12 / 8 / 256))
    state = found.parameter_bytes + found.optimizer_bytes
    assert found.bounds["HBM"] >= 2 * state / 819e9
    assert found.bounds["matrix units"] >= found.flops / 197e12


def on_two_slices(fields):
    """The plan of the small model on two slices of sixteen chips."""
    where = {"topology": "v5e:4x4", "slices": 2, "mesh": "slice:2,data:4,model:4"}
    return run.plan("dion:smoke", fields, **where)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [0, 4])
def test_compressed_slices_send_no_more_inside(libtpu, kv_heads):
    """Left to itself the compiler splits the residual stream once it is per slice."""
    fields = [
        "--config.data.context=64", "--config.data.batch=8", "--config.net.width=512",
        "--config.net.heads=8", f"--config.net.kv_heads={kv_heads}",
        "--config.net.layers=4", "--config.net.unroll=1", "--config.net.remat=True",
        "--config.net.dtype=bfloat16", "--config.optim.clip=0.0",
        "--config.optim.residual=0",
    ]  # fmt: skip
    low = ["--config.train.replica_sync=lowrank", "--config.train.replica_axis=slice"]
    sent = [on_two_slices(x).links["ICI model"] for x in (fields, fields + low)]
    assert sent[1] < 1.25 * sent[0]


@pytest.mark.slow
def test_stacks_of_few_matrices_cross_without_padding(libtpu):
    """Of twelve matrices each of four chips has three: a tile has 128 of them."""
    fields = [
        "--config.data.context=16", "--config.data.batch=8", "--config.net.width=512",
        "--config.net.heads=8", "--config.net.kv_heads=4", "--config.net.layers=4",
        "--config.optim.clip=0.0", "--config.optim.residual=0",
        "--config.train.replica_sync=lowrank", "--config.train.replica_axis=slice",
    ]  # fmt: skip
    found = on_two_slices(fields)
    # Less than a chip's share of the gradients.
    assert found.links["DCN"] < found.parameters * 4 / 16


@pytest.mark.slow
def test_a_step_sends_factors_and_no_gradients_between_slices(libtpu):
    """Of the whole model: P and R of its matrices, means of all other gradients."""
    fields = [
        "--config.data.context=16", "--config.data.batch=8", "--config.net.width=512",
        "--config.net.heads=4", "--config.net.vocab_size=256", "--config.optim.clip=0.0",
        "--config.optim.residual=0", "--config.train.replica_sync=lowrank",
        "--config.train.replica_axis=slice",
        "--config.optim.communication_dtype=bfloat16",
    ]  # fmt: skip
    found = on_two_slices(fields)
    slow = [r for r in found.collectives if r["link"] == "DCN"]
    config = load_config("dion:smoke", fields)
    sizes = {"slice": 2, "data": 4, "model": 4}
    grid = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    with jax.sharding.use_abstract_mesh(grid):
        params = jax.eval_shape(
            dion.make(config).init, jax.random.key(0), tasks.abstract(config).shapes
        ).params
    expected = 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params["layers"])[0]:
        spec = param_spec(transformer.RULES, path_name(path))
        if leaf.ndim == 2:  # Norms' gains.
            continue
        cost = plan_dion(
            leaf.shape, spec, sizes, 1 / 4, dimensions=dion.dimensions("", leaf),
            replicate_axis="slice", slices="slice", communication_dtype="bfloat16",
        )  # fmt: skip
        expected += cost.bytes_per_step["all-reduce", ("slice",)]
    # Embedding, head and gains, a sixteenth on each chip.
    expected += 2 * 256 * 512 / 16 * 2
    gains, padding = 3 * 512 * 2 / 16, 1024 * 2 * sum(r["count"] for r in slow)
    got = sum(r["wire_bytes"] for r in slow)
    assert expected + gains <= got <= expected + gains + padding


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--slices=2"], "needs the --topology of a slice"),
        (["--slices=0", "--topology=v5e:2x2"], "--slices must be >= 1, got 0"),
    ],
)
def test_slices_that_cannot_be(arguments, message, capsys):
    assert cli.main(["plan", "dion:smoke", *SMALL, *arguments]) == 1
    assert message in capsys.readouterr().err
