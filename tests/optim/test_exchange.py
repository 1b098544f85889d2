"""Whole matrices that Dion exchanges: the numbers of thin factors, for fewer bytes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo
from jaxpapers.optim import (
    DimensionNumbers,
    collectives,
    dion_state_sharding,
    plan_dion,
    replica_specs,
    scale_by_dion,
)
from jaxpapers.optim.exchange import exchange_pays
from jaxpapers.optim.orthonormalize import RESCUE

D, M, R = "data", "model", "replica"
# A group: one l and one rank. Stored with either side first, as many as devices and not,
# two shorter sides.
SHAPES = {"up": (5, 32, 64), "down": (3, 64, 32), "narrow": (2, 24, 64)}
NUMBERS = DimensionNumbers(1, 2)
AHEAD = {"nesterov": True, "residual": 1.0, "normalize_rows": True}
QUICK = {"xla_backend_optimization_level": 0}


def specs(mesh):
    model = M if M in mesh.shape else None
    side = {"up": P(None, D, model), "down": P(None, model, D)}
    return side | {"narrow": side["up"]}


def gradients(seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}


def transformation(**options):
    return scale_by_dion(
        0.5, rank_multiple_of=16, weight_dimension_numbers=NUMBERS, **options
    )


def three_steps(tx, params):
    """Updates and state after three gradients, the last of "down" all zero; program."""
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update, compiler_options=QUICK)
    for t in range(3):
        grads = gradients(t)
        if t == 2:
            grads["down"] *= 0
        where = jax.tree.map(lambda x: x.sharding, params)
        updates, state = update(jax.device_put(grads, where), state)
    program = update.lower(updates, state).compile(QUICK).as_text()
    return jax.tree.map(np.asarray, (updates, state)), program


def sent(program, mesh):
    """Bytes by kind and axes, of well-conditioned factors."""
    found = hlo.collectives(program, mesh)
    return hlo.wire_bytes([c for c in found if f"/{RESCUE}/" not in c.op_name])


def wanted(split, mesh, **options):
    """The closed form of the group: "up" and "down" are one stack, "narrow" another."""
    total: dict = {}
    for shape in ((8, 32, 64), (2, 24, 64)):
        plan = plan_dion(
            shape, P(None, D, *mesh.axis_names[1:]), mesh, 16 / shape[1],
            dimensions=NUMBERS, split_p=split, **options,
        )  # fmt: skip
        for key, size in plan.bytes_per_step.items():
            total[key] = total.get(key, 0) + size
    return total


@pytest.mark.parametrize(
    "sizes, options",
    [
        ((8,), AHEAD | {"communication_dtype": jnp.bfloat16}),  # Of P alone.
        ((4, 2), AHEAD | {"eps": 3.0}),
        *(
            pytest.param(*x, marks=pytest.mark.matrix)
            for x in (
                ((8,), {}),
                ((8,), AHEAD),
                ((8,), {"right_factor": "orth"}),
                ((8,), {"orthogonalize": "qr"}),
                ((4, 2), {"power_iters": 2}),
                ((4, 2), {"power_iters": np.int64(2)}),
                ((8,), {"momentum_dtype": jnp.bfloat16}),
            )
        ),
    ],
    ids=str,
)
def test_equals_one_device(sizes, options, make_mesh):
    mesh = make_mesh(sizes)
    where = {n: NamedSharding(mesh, s) for n, s in specs(mesh).items()}
    params = jax.device_put(gradients(), where)
    one = jax.device_put(gradients(), jax.devices()[0])
    want, _ = three_steps(transformation(**options), one)
    tx = transformation(sharding=where, **options)
    got, program = three_steps(tx, params)
    # A rounding that differs moves a momentum of 16 bits by one of its steps.
    bound = 2e-2 if "momentum_dtype" in options else 2e-5
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=bound), got, want
    )
    kinds = {kind for kind, _ in sent(program, mesh)}
    assert "all-to-all" in kinds
    if sizes == (8,) and not options.get("normalize_rows"):
        assert kinds == {"all-to-all"}


@pytest.mark.parametrize(
    "spec", [P(None, D, M), pytest.param(P(M, D), marks=pytest.mark.matrix)], ids=str
)
@pytest.mark.parametrize(
    "kind", ["Explicit", pytest.param("Auto", marks=pytest.mark.matrix)]
)
def test_equals_thin_factors_of_any_rank(spec, kind, make_mesh):
    """Zero, low-rank and other matrices, and a NaN that stays in its own.

    Shares of the stack take different numbers of Gram passes, and each pass sums over the
    devices that split the longer side.
    """
    mesh, rng = make_mesh((4, 2), kind), np.random.default_rng(0)
    stack = rng.normal(size=(8, 16, 24)).astype(np.float32)
    stack[0] = 0
    stack[3] = np.outer(stack[3, :, 0], stack[3, 0])
    spoiled = stack.copy()
    spoiled[5] = np.nan
    where = NamedSharding(mesh, spec)
    found = {}
    for split in ("auto", "thin"):
        tx = scale_by_dion(
            0.5, weight_dimension_numbers=NUMBERS, sharding=where, split_p=split,
            **AHEAD,
        )  # fmt: skip
        with jax.set_mesh(mesh):
            grads = jax.device_put(stack, where)
            state = jax.jit(tx.init)(grads)
            update = jax.jit(tx.update, compiler_options=QUICK)
            for _ in range(2):
                updates, state = update(grads, state)
            worse, _ = update(jax.device_put(spoiled, where), state)
            program = update.lower(grads, state).compile(QUICK).as_text()
        found[split] = jax.tree.map(np.asarray, (updates, state.momentum)), worse
        assert ("all-to-all" in program) == (split == "auto")
        bad = np.isnan(np.asarray(worse)).all((1, 2))
        assert bad.tolist() == [i == 5 for i in range(8)]
    (auto, _), (thin, _) = found["auto"], found["thin"]
    # What a rank of one leaves is known to a round-off of the whole.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3), auto, thin)
    assert not auto[0][0].any() and auto[0][3].any()


def test_bytes_are_the_closed_form(make_mesh):
    """One stack of all leaves of a shape, however each is stored."""
    mesh, options = make_mesh((8,)), {"nesterov": True, "residual": 1.0}
    where = {n: NamedSharding(mesh, s) for n, s in specs(mesh).items()}
    tx = transformation(sharding=where, **options)
    grads = {
        n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=where[n])
        for n, s in SHAPES.items()
    }
    state = jax.eval_shape(tx.init, grads)
    placed = dion_state_sharding(state, grads, where, weight_dimension_numbers=NUMBERS)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
    )
    compiled = jax.jit(tx.update).lower(grads, state).compile(QUICK)
    total = wanted("auto", mesh, **options)
    assert sent(compiled.as_text(), mesh) == pytest.approx(total)
    assert set(total) == {("all-to-all", (D,))}
    assert sum(total.values()) < 0.7 * sum(wanted("thin", mesh, **options).values())


def test_a_stack_of_several_layouts(make_mesh):
    """A CPU's compiler refused slices of it (HLO all-to-all has operands with ...)."""
    columns, rows = P(None, None, D), P(None, D)

    def local(x, y, z):
        stack = jnp.concatenate([x + 1, jnp.swapaxes(y, 1, 2), jnp.swapaxes(z, 1, 2)])
        whole, back = collectives.all_to_all(stack, D, 0, 2)
        assert whole.shape == (1, 96, 32)
        x, y, z = (x[None] for x in back(jnp.cumsum(whole, 2)))
        return x, jnp.swapaxes(y, 1, 2), jnp.swapaxes(z, 1, 2)

    specs = (columns, rows, rows)
    local = jax.shard_map(local, mesh=make_mesh((8,)), in_specs=specs, out_specs=specs)
    x = np.arange(96 * 32, dtype=np.float32).reshape(1, 96, 32) % 7
    y = np.swapaxes(x, 1, 2)
    found = jax.jit(local)(x, y, 2 * y)  # As a user compiles it, not QUICK.
    wanted = np.cumsum(x + 1, 2), np.cumsum(y, 1), np.cumsum(2 * y, 1)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_fewer_bytes_decide():
    sizes = {"arrays": 3, "item": 4, "wire": 4, "shared": True}

    def choice(n, s, l, rank, devices, **options):
        columns = s // devices
        return exchange_pays([(n, columns)], l, rank, devices, **sizes | options)

    # 2 n l r against f ceil(n / f) (3 l + 2 r) s / f, by hand: 2^13 against 7 * 2^10.
    assert choice(8, 32, 64, 8, 8) and not choice(8, 32, 64, 4, 8)
    assert not choice(8, 32, 64, 8, 8, wire=2)
    assert choice(8, 32, 64, 4, 8, iters=2)
    # Q goes with its matrix: 12.8 kB against 12.5, 6.4 against 6.7.
    assert choice(8, 24, 40, 5, 8) and not choice(8, 24, 20, 5, 8)
    # A stack of one is filled up to all devices, and one matrix never pays.
    for devices in (1, 2, 8, 64, 512):
        assert not choice(1, 1024, 4096, 1024, devices, arrays=2)
    assert choice(28, 2048, 8192, 512, 16, arrays=2)
    assert not choice(28, 2048, 8192, 512, 4, arrays=2)
    # Two dozen matrices on 256 devices: a device with one computes ten times its share,
    # which the bytes are worth for small matrices only.
    assert choice(24, 2048, 8192, 512, 256) and not choice(24, 16384, 65536, 4096, 256)
    # Replicas would average a whole matrix in place of 24 / 64 of one.
    assert choice(24, 768, 3072, 192, 64)
    assert not choice(24, 768, 3072, 192, 64, averaged=True)
    assert choice(64, 768, 3072, 192, 64, averaged=True)


def test_plan_of_an_fsdp_mesh():
    """28 matrices over 16 devices: less than a third of the bytes at rank 1/4."""
    shape, spec, mesh = (28, 2048, 8192), P(None, D), {D: 16}
    plan = functools.partial(
        plan_dion, shape, spec, mesh, 0.25, dimensions=NUMBERS, residual=1.0
    )
    auto, thin, whole = (plan(split_p=x) for x in ("auto", "thin", "whole"))
    assert (auto.split, thin.split, whole.split) == ("exchange", "rows", "whole")
    assert auto.total_bytes == 2 * 15 / 16 * 32 * 128 * (8192 + 512) * 4
    assert auto.total_bytes < thin.total_bytes / 3
    assert auto.state_bytes == thin.state_bytes
    # Four of 32 places are empty.
    assert auto.flops == pytest.approx(thin.flops * 32 / 28, rel=0.02)
    # Of what crosses nothing is larger than the share that a device holds, filled up.
    assert auto.largest == 32 * 128 * 8192
    one = plan_dion((2048, 8192), P(D), mesh, 0.25)
    assert one.split == "rows"


def test_replicas_average_shares(make_mesh):
    """Of a replica of four devices each averages the P and R of its own matrices."""
    mesh = jax.make_mesh((2, 4), (R, D), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shape, spec = (4, 32, 64), P(None, D)
    where = NamedSharding(mesh, spec)
    options = {"weight_dimension_numbers": NUMBERS, "mu": 0.9}
    tx = scale_by_dion(0.5, sharding=where, replicate_axis=R, **options)
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(2, *shape)).astype(np.float32)
    params = jax.device_put(np.zeros(shape, np.float32), where)
    state = jax.jit(tx.init)(params)
    inside = replica_specs(state, params, R)
    update = jax.jit(
        jax.shard_map(
            lambda g, s: tx.update(g[0], s), mesh=mesh, in_specs=(P(R), inside),
            out_specs=(P(), inside), axis_names={R},
        )
    )  # fmt: skip
    split = jax.device_put(grads, NamedSharding(mesh, P(R, *spec)))
    plan = functools.partial(
        plan_dion, shape, spec, mesh, 0.5, dimensions=NUMBERS, replicate_axis=R
    )
    found = sent(update.lower(split, state).compile(QUICK).as_text(), mesh)
    assert plan().split == "exchange" and found == pytest.approx(plan().bytes_per_step)
    assert found["all-reduce", (R,)] == (32 + 64) * 16 * 4
    updates, state = update(split, state)

    alone = scale_by_dion(0.5, **options)
    want, after = jax.jit(alone.update)(grads.mean(0), jax.jit(alone.init)(grads[0]))
    np.testing.assert_allclose(updates, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(state.q, after.q, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        np.mean(state.momentum, 0), after.momentum, rtol=0, atol=1e-5
    )


def test_math_of_padding():
    """Five matrices on four devices fill eight places."""
    mesh = {D: 4}
    five, eight = (
        plan_dion((n, 32, 512), P(None, D), mesh, 1.0, dimensions=NUMBERS)
        for n in (5, 8)
    )
    assert five.split == eight.split == "exchange"
    assert five.total_bytes == eight.total_bytes
    assert math.isclose(five.flops, eight.flops)
