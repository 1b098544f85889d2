"""``plan_dion`` against the compiled program: the same bytes, to the byte."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo, products
from jaxpapers.optim import (
    DimensionNumbers,
    dion_state_sharding,
    orthonormalize,
    plan_dion,
    replica_specs,
    scale_by_dion,
)
from jaxpapers.optim.layout import make_layout
from jaxpapers.optim.orthonormalize import METHODS, RESCUE, sketch_rows

R, D, M = "replica", "data", "model"
# Every way to write 8 as a product of three axes.
SIZES = [
    (a, b, 8 // a // b) for a in (1, 2, 4, 8) for b in (1, 2, 4, 8) if 8 % (a * b) == 0
]
# Both orientations, long enough to split rows; a stack to share matrices of; a spec
# with both axes on P's side, and one whose batch axis is split.
SHAPES = {
    "tall": ((64, 1024), DimensionNumbers(), P(D, M)),
    "wide": ((1024, 64), DimensionNumbers(), P(D, M)),
    "stack": ((8, 32, 64), DimensionNumbers(1, 2), P(None, D, M)),
    "side": ((32, 128), DimensionNumbers(), P(None, (D, M))),
    "padded": ((7, 16, 64), DimensionNumbers(1, 2), P(None, D, M)),
    "pipe": ((16, 16, 32), DimensionNumbers(1, 2), P(D, M)),
}
FRACTIONS = (1 / 4, 1 / 16)
QUICK = {"xla_backend_optimization_level": 0}


def compile_step(sizes, options, dtypes=jnp.float32):
    """(mesh, leaves with their fractions, compiled step) of one mesh and all SHAPES."""
    mesh = jax.make_mesh(sizes, (R, D, M), axis_types=(AxisType.Auto,) * 3)
    leaves = {
        f"{name}{i}": (*SHAPES[name], fraction)
        for name in SHAPES
        for i, fraction in enumerate(FRACTIONS)
        if name in ("tall", "wide") or i == 0
    }
    where = {n: NamedSharding(mesh, spec) for n, (_, _, spec, _) in leaves.items()}
    dimensions = {n: d for n, (_, d, _, _) in leaves.items()}
    tx = scale_by_dion(
        {n: fraction for n, (_, _, _, fraction) in leaves.items()},
        weight_dimension_numbers=dimensions,
        sharding=where,
        batch="none",
        replicate_axis=R if sizes[0] > 1 else None,
        **options,
    )
    params = {
        n: jax.ShapeDtypeStruct(shape, dtypes, sharding=where[n])
        for n, (shape, _, _, _) in leaves.items()
    }
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        placed = dion_state_sharding(
            state, params, where, weight_dimension_numbers=dimensions, replicate_axis=R
        )
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            placed,
        )
        update = tx.update
        if sizes[0] > 1:
            specs = replica_specs(state, params, R)
            update = jax.shard_map(
                lambda g, s: tx.update(jax.tree.map(lambda x: x[0], g), s),
                in_specs=(P(R), specs),
                out_specs=(P(), specs),
                axis_names={R},
            )
            params = {
                n: jax.ShapeDtypeStruct(
                    (sizes[0], *x.shape),
                    x.dtype,
                    sharding=NamedSharding(mesh, P(R, *where[n].spec)),
                )
                for n, x in params.items()
            }
        compiled = jax.jit(update).lower(params, state).compile(QUICK)
    return mesh, leaves, compiled


def bound(shape, dimensions, spec, mesh, leaf, options):
    """The digest's: blocks of P and R, r x r and k x r, never a matrix (section 9b)."""
    layout = make_layout("leaf", shape, dimensions or DimensionNumbers())
    n, l, s = (math.prod(shape[a] for a in axes)
               for axes in (layout.batch, layout.p_axes, layout.q_axes))  # fmt: skip
    t, f = (
        math.prod(mesh.shape[a] for a in axes) for axes in (leaf.p_axis, leaf.q_axis)
    )
    r, method = leaf.rank, options.get("orthogonalize", "scqr")
    # Rows that are scattered before their QR give t f factors of r x r.
    factors = {"qr": t * f * min(l // t, r) * r, "rcqr": sketch_rows(r) * r}
    share = n * max(l // t * r, s // f * r, r * r, factors.get(method, 0))
    if leaf.split == "exchange":  # What the device holds, the stack filled up to f.
        f = math.prod(mesh.shape[a] for a in leaf.q_axis)
        share = max(share // n, l // t * s // f) * f * -(-n // f)
    if leaf.compressed or not mesh.shape[R] > 1:
        return share
    return max(share, n * (l // t) * (s // f))  # Replicas average the gradient's block.


def check(sizes, **options):
    mesh, leaves, compiled = compile_step(sizes, options)
    usual, rescue, largest = {}, {}, 0
    for shape, dimensions, spec, fraction in leaves.values():
        leaf = plan_dion(
            shape,
            spec,
            mesh,
            fraction,
            dimensions=dimensions,
            replicate_axis=R if sizes[0] > 1 else None,
            **options,
        )
        largest = max(largest, leaf.largest)
        assert leaf.largest <= bound(shape, dimensions, spec, mesh, leaf, options)
        for total, part in (
            (usual, leaf.bytes_per_step),
            (rescue, leaf.bytes_of_rescue),
        ):
            for key, size in part.items():
                total[key] = total.get(key, 0) + size
    found = hlo.collectives(compiled.as_text(), mesh)
    for expected, kind in ((usual, False), (rescue, True)):
        part = [c for c in found if (f"/{RESCUE}/" in c.op_name) == kind]
        assert hlo.wire_bytes(part) == pytest.approx(expected, abs=1e-6)
    assert max(c.elements for c in found) <= largest
    return found


@pytest.mark.matrix
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(x, marks=() if x in ((2, 2, 2), (1, 4, 2)) else pytest.mark.matrix)
        for x in SIZES
    ],
    ids=str,
)
def test_bytes_on_every_mesh(sizes):
    check(sizes)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"orthogonalize": "cqr2"}, marks=pytest.mark.matrix),
        {"orthogonalize": "rcqr"},
        pytest.param({"orthogonalize": "qr"}, marks=pytest.mark.matrix),
        pytest.param({"right_factor": "orth"}, marks=pytest.mark.matrix),
        {"power_iters": 2, "split_p": "whole"},
        {"nesterov": True, "normalize_rows": True},
    ],
    ids=str,
)
def test_bytes_of_other_options(options):
    check((2, 2, 2), **options)


@pytest.mark.parametrize(
    "sizes", [pytest.param((1, 2, 4), marks=pytest.mark.matrix), (1, 4, 2)], ids=str
)
def test_bytes_of_the_residual(sizes):
    check(sizes, nesterov=True, residual=1.0, normalize_rows=True)


@pytest.mark.matrix
@pytest.mark.parametrize("method", [m for m in METHODS if m != "scqr"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bytes_of_all_methods_on_every_mesh(sizes, method):
    check(sizes, orthogonalize=method)


@functools.cache
def example(rank, **options):
    """The digest's: 1024 x 4096 on 4 x 2, where optax's Muon sends 84480 KiB."""
    return plan_dion(
        (1024, 4096), P(D, M), {D: 4, M: 2}, rank / 1024, split_p="whole", **options
    )


def test_example_of_the_digest():
    assert example(256).total_bytes <= 84480 * 1024 / 21
    assert example(64).total_bytes <= 84480 * 1024 / 94
    assert example(256).largest == 4096 // 2 * 256
    halved = example(256, communication_dtype=jnp.bfloat16)
    assert example(256).total_bytes - halved.total_bytes == 1.5 * 2048 * 256 * 2
    assert not example(256).transposed
    assert plan_dion((64, 16), P(), {}).transposed


def test_bytes_between_slices():
    """Inside a slice as without replicas; between them each device's share of P and R."""
    shape, spec, mesh = (1024, 2048), P(D, M), {R: 4, D: 4, M: 2}
    for options, size in (({}, 4), ({"communication_dtype": jnp.bfloat16}, 2)):
        plain = plan_dion(shape, spec, mesh, 1 / 16, **options)
        low = plan_dion(
            shape, spec, mesh, 1 / 16, replicate_axis=R, slices=R, **options
        )
        between = low.bytes_per_step.pop(("all-reduce", (R,)))
        assert between == 2 * 3 / 4 * (1024 + 2048) * 64 / 8 * size
        # Of replicas R, too, is rounded before it is summed.
        r = plain.bytes_per_step["all-reduce", (M,)] * size / 4
        expected = {**plain.bytes_per_step, ("all-reduce", (M,)): r}
        assert low.bytes_per_step == expected
    full = plan_dion(shape, spec, mesh, 1.0, replicate_axis=R, slices=R)
    assert full.bytes_per_step["all-reduce", (R,)] == 1.5 * 256 * 1024 * 4


def test_bytes_of_replicas():
    shape, spec, mesh = (1024, 1024), P(D, M), {R: 4, D: 2, M: 2}
    plain = plan_dion(shape, spec, mesh, 1 / 16)
    low = plan_dion(shape, spec, mesh, 1 / 16, replicate_axis=R)
    full = plan_dion(shape, spec, mesh, 1.0, replicate_axis=R)
    assert low.compressed and not full.compressed
    # The gradient of a device's block, averaged over 4.
    assert full.bytes_per_step["all-reduce", (R,)] == 1.5 * 512 * 512 * 4
    assert low.total_bytes - plain.total_bytes < full.bytes_per_step["all-reduce", (R,)]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"rank_fraction": -1}, "rank_fraction must be in"),
        ({"rank_fraction": 2.0}, "rank_fraction must be in"),
        ({"shape": (63, 64)}, "does not divide"),
        ({"spec": P(D, D)}, "uses a mesh axis twice"),
        ({"spec": P("pod")}, "names the mesh axis 'pod'"),
        ({"replicate_axis": "pod"}, "is no axis of the mesh"),
        ({"split_p": "x"}, "split_p must be one of"),
        ({"right_factor": "x"}, "right_factor must be one of"),
        ({"orthogonalize": "x"}, "orthogonalize must be one of"),
    ],
    ids=str,
)
def test_bad_input(options, match):
    options = {"shape": (64, 64), "spec": P(D, M), **options}
    with pytest.raises(ValueError, match=match):
        plan_dion(mesh={D: 2, M: 2}, **options)


def test_flops_and_state_against_the_compiler():
    mesh = jax.make_mesh((4, 2), (D, M), axis_types=(AxisType.Auto,) * 2)
    where = NamedSharding(mesh, P(D, M))
    g = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=where)}
    tx = scale_by_dion(1 / 8, sharding=where, q_dtype=jnp.bfloat16)
    state = jax.eval_shape(tx.init, g)
    placed = dion_state_sharding(state, g, {"w": where})
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
    )
    compiled = jax.jit(tx.update).lower(g, state).compile()
    plan = plan_dion((512, 1024), P(D, M), mesh, 1 / 8, q_dtype=jnp.bfloat16)
    # The compiler does not see into LAPACK's Cholesky, but counts elementwise work. Of
    # the loop of two passes it counts one, and both branches of a choice: the refinement
    # of an ill-conditioned P, two products as in a pass.
    assert compiled.cost_analysis()["flops"] == pytest.approx(plan.flops, rel=0.05)
    arguments = compiled.memory_analysis().argument_size_in_bytes
    assert arguments == plan.state_bytes + 512 * 1024 * 4 // 8 + 4  # And the count.


@pytest.mark.matrix
@pytest.mark.parametrize("rank", [64, pytest.param(256, marks=pytest.mark.matrix)])
def test_temporary_memory(rank):
    """At most one float32 block and three thin factors per matrix (digest, 9b)."""
    mesh = jax.make_mesh((4, 2), (D, M), axis_types=(AxisType.Auto,) * 2)
    where = NamedSharding(mesh, P(D, M))
    g = {"w": jax.ShapeDtypeStruct((1024, 4096), jnp.float32, sharding=where)}
    tx = scale_by_dion(rank / 1024, sharding=where)
    state = jax.eval_shape(tx.init, g)
    placed = dion_state_sharding(state, g, {"w": where})
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
    )
    compiled = jax.jit(tx.update, donate_argnums=(0, 1)).lower(g, state).compile()
    block, thin = 1024 * 4096 // 8 * 4, 4096 // 2 * rank * 4
    assert compiled.memory_analysis().temp_size_in_bytes <= block + 3 * thin


@pytest.mark.parametrize("method", ["scqr", "cqr2"])
def test_factorisations_are_counted(method):
    """The compiler's count leaves LAPACK out, so the traced step is counted."""
    l, s, r = 96, 64, 16
    p = jax.ShapeDtypeStruct((l, r), jnp.float32)
    traced = jax.make_jaxpr(lambda p: orthonormalize(p, method))(p)

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            total += eqn.primitive.name == "cholesky"
            total += sum(count(j) for j in products._inner_jaxprs(eqn.params))
        return total

    # One for all passes of scqr, shifted or not, and one for each pass of cqr2.
    assert count(traced.jaxpr) == (1 if method == "scqr" else 2)
    flops = plan_dion((s, l), P(), {}, r / s, orthogonalize=method).flops
    # A pass multiplies twice by (l, r).
    expected = 8 * l * s * r + 2 * (4 * l * r**2 + 4 * r**3 / 3)
    assert flops == pytest.approx(expected)


def test_further_passes():
    """A batch that shares its Gram matrices sends each as a scatter and a gather."""
    mesh = {D: 2, M: 4}
    plan = plan_dion((8, 64, 128), P(None, D, M), mesh, 1 / 4,
                     dimensions=DimensionNumbers(1, 2))  # fmt: skip
    triangles, ring = 4 * 16 * 17 // 2, 3 / 4 * 4  # Of the half that D scatters.
    assert plan.bytes_per_pass == {
        ("reduce-scatter", (M,)): ring * triangles,
        ("all-gather", (M,)): ring * (triangles + 4),
    }
    assert plan.bytes_of_rescue == {
        ("all-reduce", (M,)): 2 * ring * 4,
        ("all-gather", (M,)): ring * triangles,
    }
    assert plan_dion((64, 64), P(D, M), mesh, orthogonalize="qr").bytes_per_pass == {}
