"""Orthonormal bases: the digest's table of conditions, on one device and on eight."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxpapers.optim import orthonormalize
from jaxpapers.optim.orthonormalize import (
    METHODS,
    SCQR_MAX_PASSES,
    _shifted_cholesky_qr,
)
from tests.programs import together

L, R = 1024, 64  # The digest's; its numbers depend on them.
CONDITIONS = (0, 2, 3, 4, 5, 6, 7, 8, 10)
GOOD = ("cond1e0", "cond1e2", "cond1e3", "cond1e4")  # Where CQR2 is accurate.


@functools.cache
def inputs():
    """name -> (L, R) matrix in float64."""
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.normal(size=(L, R)))[0]
    v = np.linalg.qr(rng.normal(size=(R, R)))[0]
    cases = {
        f"cond1e{c}": u @ np.diag(10.0 ** (-c * np.arange(R) / (R - 1))) @ v.T
        for c in CONDITIONS
    }
    for rank in (2, 32):
        cases[f"rank{rank}"] = rng.normal(size=(L, rank)) @ rng.normal(size=(rank, R))
    noise = rng.normal(size=(L, R))
    cases["tiny"], cases["huge"] = noise * 1e-20, noise * 1e20
    cases["squares underflow"] = noise * 1e-30
    cases["every other column zero"] = noise * (np.arange(R) % 2)
    cases["one column"] = noise * (np.arange(R) == 0)
    for rows in (8, 40):
        cases[f"{rows} rows"] = noise * (np.arange(L) < rows)[:, None]
    cases["one entry"] = np.zeros((L, R))
    cases["one entry"][3, 5] = 1
    return cases


NAMES = tuple(inputs())
# The default method; the others are in the matrix.
SOME = [
    pytest.param(x, marks=() if x == "scqr" else pytest.mark.matrix) for x in METHODS
]


@functools.cache
def stacked(method):
    """All inputs, then a zero matrix and one with a NaN, as one batch."""
    broken = inputs()["cond1e2"].copy()
    broken[7, 9] = np.nan
    batch = np.stack([*inputs().values(), np.zeros((L, R)), broken]).astype(np.float32)
    q = jax.jit(functools.partial(orthonormalize, method=method))(batch)
    return np.asarray(q, np.float64)


def basis(method, name):
    return stacked(method)[NAMES.index(name)]


def defect(q):
    """2-norm of q^T q - 1."""
    return np.abs(np.linalg.eigvalsh(q.T @ q) - 1).max()


def length(q):
    """Largest singular value."""
    return np.sqrt(np.linalg.eigvalsh(q.T @ q).max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method, tol", [("scqr", 2e-6), ("qr", 2e-6), ("rcqr", 1e-5)])
def test_orthonormal_always(method, tol, name):
    assert defect(basis(method, name)) <= tol


@pytest.mark.matrix
@pytest.mark.parametrize("name", NAMES)
def test_cqr2_orthonormal_or_bounded(name):
    q = basis("cqr2", name)
    assert np.isfinite(q).all()
    assert length(q) <= 1 + 1e-5
    if name in GOOD:
        assert defect(q) <= 2e-6


def passes(*ps):
    """Gram matrices that scqr takes for a batch."""
    return int(_passes(np.stack([p / np.abs(p).max() for p in ps]).astype(np.float32)))


@jax.jit
def _passes(p):
    return _shifted_cholesky_qr(p, (), jnp.arange(p.shape[-2]))[1]


def test_passes_are_two_unless_more_are_needed():
    """The plan's closed form counts two: what a language model's momentum takes."""
    noise = inputs()["tiny"]
    assert (
        passes(inputs()["cond1e0"]) == passes(noise) == passes(inputs()["cond1e2"]) == 2
    )
    # Columns of any length are no difficulty.
    assert passes(noise * 10.0 ** -(np.arange(R) % 7)) == 2
    counts = {name: passes(inputs()[name]) for name in NAMES}
    assert max(counts.values()) < SCQR_MAX_PASSES, counts
    assert counts["rank2"] > 3
    # One bad matrix makes its batch wait, and no pass follows the last one needed.
    assert passes(noise, inputs()["rank2"]) == counts["rank2"]


@pytest.mark.matrix
def test_companions_change_nothing():
    noise, bad = inputs()["tiny"], inputs()["rank2"]
    both = np.stack([noise, bad, np.zeros((L, R))]).astype(np.float32)
    batch, alone = together(lambda p: (orthonormalize(p), orthonormalize(p[:1])), both)
    np.testing.assert_allclose(batch[:1], alone, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method, tol", [("scqr", 4e-7), ("qr", 2e-6), ("rcqr", 1e-5)])
def test_spans_the_columns(method, tol, name):
    q, p = basis(method, name), inputs()[name].astype(np.float32).astype(np.float64)
    assert np.linalg.norm(p - q @ (q.T @ p)) <= tol * np.linalg.norm(p)


@pytest.mark.parametrize("method", METHODS)
def test_same_column_space(method):
    # Subspaces of float32 matrices are known to u * cond: compare well-conditioned ones.
    q, u = basis(method, "cond1e0"), np.linalg.qr(inputs()["cond1e0"])[0]
    # The sine of the largest angle, for q orthonormal.
    assert length(q - u @ (u.T @ q)) <= 2e-6


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("method", METHODS)
def test_triangular_factor_has_positive_diagonal(method, name):
    p = inputs()[name]
    factor = basis(method, name).T @ p
    assert (np.diagonal(factor) > 0).all()
    assert np.abs(np.tril(factor, -1)).max() <= 1e-6 * np.linalg.norm(p, 2)


@pytest.mark.parametrize("method", METHODS)
def test_zero_stays_zero(method):
    assert (stacked(method)[-2] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_nan_spreads_over_its_own_matrix_only(method):
    broken = np.isnan(stacked(method)[-1])
    # Householder leaves the columns before the NaN; in P = B Q all columns have one.
    assert broken[:, 9:].all() if method == "qr" else broken.all()
    assert np.isfinite(stacked(method)[:-1]).all()


@pytest.mark.parametrize("method", SOME)
def test_float64(method):
    with jax.enable_x64(True):
        p = inputs()["cond1e2"][:256]
        q = together(functools.partial(orthonormalize, method=method), p)
        assert q.dtype == np.float64
    assert defect(q) <= 1e-12
    assert np.linalg.norm(p - q @ (q.T @ p)) <= 1e-12 * np.linalg.norm(p)


def test_bfloat16_input_is_computed_in_float32():
    q = together(orthonormalize, inputs()["cond1e2"][:256].astype(jnp.bfloat16))
    assert q.dtype == np.float32
    assert defect(np.asarray(q, np.float64)) <= 2e-6


# Surplus directions of a dense rank-deficient matrix are rounding noise, which differs
# between layouts: such inputs must stay orthonormal and span P, entries may differ.
DETERMINED = ("cond1e0", "tiny", "huge")
DEGENERATE = ("rank2", "8 rows", "every other column zero", "one entry", "cond1e10")


IN_TURN = [("scqr", ("data", "model")), ("rcqr", ("data",))]


@pytest.mark.matrix
@pytest.mark.parametrize(
    "method, axes",
    [
        pytest.param(*x, marks=() if x in IN_TURN else pytest.mark.matrix)
        for x in itertools.product(METHODS, [("data",), ("data", "model")])
    ],
)
def test_sharded(method, axes, make_mesh):
    names = DETERMINED + DEGENERATE
    mesh = make_mesh((8,) if len(axes) == 1 else (4, 2))
    zero = np.zeros((L, R))
    p = np.stack([inputs()[n] for n in names] + [zero]).astype(np.float32)

    def body(p, rows):
        return orthonormalize(p, method, axis_name=axes, rows=rows)

    spec = P(None, axes, None)
    sharded = jax.shard_map(body, mesh=mesh, in_specs=(spec, P(axes)), out_specs=spec)
    q = np.asarray(jax.jit(sharded)(p, np.arange(L, dtype=np.int32)), np.float64)
    assert (q[-1] == 0).all()
    for name, got, want in zip(names, q, p.astype(np.float64)):
        if name in DETERMINED:
            np.testing.assert_allclose(got, basis(method, name), atol=2e-6, rtol=0)
        if method == "cqr2":
            assert length(got) <= 1 + 1e-5
            continue
        assert defect(got) <= (1e-5 if method == "rcqr" else 2e-6), name
        assert np.linalg.norm(want - got @ (got.T @ want)) <= 1e-5 * np.linalg.norm(
            want
        ), name


@pytest.mark.matrix
@pytest.mark.parametrize("method", SOME)
def test_rows_per_device_fewer_than_columns(method, make_mesh):
    # 16 rows on 8 devices, 8 columns: every shard is wide.
    p = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
    run = jax.shard_map(
        lambda p, rows: orthonormalize(p, method, axis_name="data", rows=rows),
        mesh=make_mesh((8,)),
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
    )
    q = together(run, p, np.arange(16, dtype=np.int32))
    want = together(functools.partial(orthonormalize, method=method), p)
    np.testing.assert_allclose(q, want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("method", SOME)
def test_no_batched_lapack_on_cpu(method):
    # Such calls wait for the thread pool that they occupy: two at once on two cores
    # (stacked layers of two shapes) never return.
    p = jax.ShapeDtypeStruct((3, 32, 8), jnp.float32)
    run = jax.jit(functools.partial(orthonormalize, method=method))
    text = run.lower(p).compile().as_text()
    calls = re.findall(
        r"= \(?f32\[([\d,]+)\].*custom_call_target=\"(?:lapack|blas)_", text
    )
    assert calls
    assert all(math.prod(map(int, c.split(",")[:-2])) == 1 for c in calls)


def test_errors():
    with pytest.raises(ValueError, match="got 'svd', expected one of"):
        orthonormalize(jnp.asarray(np.ones((4, 2))), "svd")
    with pytest.raises(ValueError, match=r"as many rows as columns, got \(2, 4\)"):
        orthonormalize(jnp.asarray(np.ones((2, 4))))


@pytest.mark.parametrize("size", [96, pytest.param(160, marks=pytest.mark.matrix)])
def test_square_and_degenerate(size):
    """Full-rank Dion meets these in its first steps; two shifted passes gave NaN."""
    kinds = []
    for kind in ("decay", "rank 2", "half the columns 0", "8 rows"):
        rng = np.random.default_rng(size)
        p = rng.normal(size=(size, size))
        if kind == "decay":
            left, right = (np.linalg.qr(rng.normal(size=p.shape))[0] for _ in range(2))
            p = left * 10.0 ** (-14 * np.arange(size) / size) @ right @ p
        elif kind == "rank 2":
            p = rng.normal(size=(size, 2)) @ p[:2]
        elif kind == "half the columns 0":
            p[:, ::2] = 0
        else:
            p[8:] = 0
        kinds.append(p.astype(np.float32))
    one = jax.jit(orthonormalize)  # Alone: a batch takes the passes of its worst.
    for q in (np.asarray(one(p), np.float64) for p in kinds):
        assert np.linalg.norm(q.T @ q - np.eye(size), 2) <= 2e-6


DRAWS = [((64, 16), 1), ((256, 32), 2)]


@pytest.mark.matrix
@pytest.mark.parametrize(
    "shape, rank",
    [
        pytest.param(*x, marks=() if x in DRAWS else pytest.mark.matrix)
        for x in itertools.product([(256, 32), (64, 16), (192, 24)], (1, 2))
    ],
)
def test_rank_deficient_batches_of_many_draws(shape, rank):
    """Rounding of such Gram matrices is larger than u times their trace in some draws."""
    rng = np.random.default_rng(1)
    left, right = (
        rng.normal(size=(60, shape[0], rank)),
        rng.normal(size=(60, rank, shape[1])),
    )
    q = together(orthonormalize, (left @ right).astype(np.float32)).astype(np.float64)
    gram = np.swapaxes(q, 1, 2) @ q
    assert np.abs(gram - np.eye(shape[1])).max() <= 2e-6


def graded(name, l, r):
    """Columns far from the ones before them, and yet a matrix that is nearly singular."""
    rng = np.random.default_rng(2)
    ones, next_ = np.triu(np.ones((r, r)), 1), np.eye(r, k=1)
    upper = {
        "I - 2 S": np.eye(r) - 2 * next_,
        "0.2 I - S": 0.2 * np.eye(r) - next_,
        "I - 0.3 U": np.eye(r) - 0.3 * ones,
        "I + 0.5 N": np.eye(r) + 0.5 * np.triu(rng.normal(size=(r, r)), 1),
    }[name]
    return np.linalg.qr(rng.normal(size=(l, r)))[0] @ upper


@pytest.mark.matrix
@pytest.mark.parametrize(
    "l, r", [(256, 32), pytest.param(512, 128, marks=pytest.mark.matrix)]
)
def test_span_of_nearly_singular_triangles(l, r):
    one = jax.jit(orthonormalize)
    for name in ("I - 2 S", "0.2 I - S", "I - 0.3 U", "I + 0.5 N"):
        p = graded(name, l, r).astype(np.float32)
        q, p = np.asarray(one(p), np.float64), p.astype(np.float64)
        assert defect(q) <= 2e-6, name
        assert np.linalg.norm(p - q @ (q.T @ p)) <= 5e-6 * np.linalg.norm(p), name
