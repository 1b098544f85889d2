"""What accelerators compute in another form: blocked factors, products in passes."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxpapers.ops.linalg import blocked_inverse_factor, stack_product
from jaxpapers.optim import (
    dion_step as dion_step_module,
)
from jaxpapers.optim import (
    from_config,
    orthonormalize,
    power_iteration,
    scale_by_dion,
    scale_by_muon,
)
from jaxpapers.optim.dion_step import StepOptions, dion_step
from jaxpapers.optim.orthonormalize import _shifted_cholesky_qr
from tests.programs import together

# Products of pieces of 8 bits that one, three and six bfloat16 passes of a TPU add up.
PASSES = {
    lax.Precision.DEFAULT: [(0, 0)],
    lax.Precision.HIGH: [(0, 0), (0, 1), (1, 0)],
    lax.Precision.HIGHEST: [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)],
}


def decaying(l, r, cond, seed=0):
    """(l, r) of a condition number."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(n, r)))[0] for n in (l, r))
    return u * cond ** (-np.arange(r) / (r - 1)) @ v.T


@pytest.mark.parametrize("r", [5, 200])
def test_blocked_factor_is_lapacks(r):
    ps = [decaying(2 * r, r, cond) for cond in (1, 1e2, 1e3)]
    ps.append(ps[1] * 10.0 ** -(np.arange(r) % 7))
    grams = np.stack([p.T @ p for p in ps]).astype(np.float32)
    lower, inverse = together(blocked_inverse_factor, grams)
    assert not np.triu(lower, 1).any() and not np.triu(inverse, 1).any()
    lower, inverse = lower.astype(float), inverse.astype(float)
    lapack = np.linalg.cholesky(grams).astype(float)
    for gram, l, x, reference in zip(grams.astype(float), lower, inverse, lapack):
        size = np.sqrt(np.outer(gram.diagonal(), gram.diagonal()))
        errors = [np.abs((f @ f.T - gram) / size).max() for f in (l, reference)]
        assert errors[0] <= max(16 * errors[1], 3e-7)
        scale = np.sqrt(gram.diagonal())
        l, x = l / scale[:, None], x * scale
        assert np.abs(l @ x - np.eye(r)).max() <= 4e-7 * np.linalg.cond(l)


def test_blocked_factor_fails_as_lapack():
    """NaN for a matrix without a factor, and for no other one of its stack."""
    r = 200
    good = np.eye(r) + 0.1
    indefinite, zero, nan = good.copy(), good.copy(), good.copy()
    indefinite[150, 150] = -1
    zero[3] = zero[:, 3] = 0
    nan[190, 20] = nan[20, 190] = np.nan
    grams = np.stack([good, indefinite, zero, nan, good]).astype(np.float32)
    for x in together(blocked_inverse_factor, grams):
        assert np.isnan(x[1:4]).all()
        assert np.isfinite(x[[0, 4]]).all()
    # One column: the square root of 0 is a number, its inverse is not.
    small = np.float32([1, 0, 4]).reshape(3, 1, 1)
    for x in together(blocked_inverse_factor, small):
        assert np.isnan(x[1]) and np.isfinite(x[[0, 2]]).all()


def test_scqr_as_on_a_tpu(monkeypatch):
    """Blocked factors, one product in a loop: the same passes, and as good bases."""
    l, r = 320, 136
    noise = np.random.default_rng(1).normal(size=(l, r))
    ps = [decaying(l, r, 10.0**c) for c in (0, 3, 5, 8)]
    ps += [noise * (np.arange(r) % 2), noise[:, :5] @ noise[:5], noise]
    ps = np.stack([p / np.abs(p).max() for p in ps]).astype(np.float32)

    def each(p):
        basis, count = _shifted_cholesky_qr(p[None], (), jnp.arange(l))
        return basis[0], count

    _, counts = together(lambda ps: lax.map(each, ps), ps)
    # The package's name is that of the function.
    module = sys.modules["jaxpapers.optim.orthonormalize"]
    monkeypatch.setattr(module, "inverse_factor", blocked_inverse_factor)
    monkeypatch.setattr(module, "_solve", module._solve_in_a_loop)
    bases, blocked = together(lambda ps: lax.map(lambda p: each(p), ps), ps)
    np.testing.assert_array_equal(blocked, counts)
    for p, q in zip(ps.astype(float), bases.astype(float)):
        assert np.abs(np.linalg.eigvalsh(q.T @ q) - 1).max() <= 2e-6
        assert np.linalg.norm(p - q @ (q.T @ p)) <= 4e-7 * np.linalg.norm(p)


def tpu_text(f, *shapes):
    """The program of ``f`` for a TPU, before its compiler."""
    args = [jax.ShapeDtypeStruct(s, np.float32) for s in shapes]
    lowered = jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",))
    return lowered.as_text()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_tpus_program_has_no_factorisation_to_expand(make_mesh, sharded):
    """Also lowered here, where the default backend is a CPU."""
    run, shape = orthonormalize, (8, 256, 64)
    if sharded:
        run = jax.shard_map(
            lambda p: orthonormalize(
                p, axis_name="data", rows=64 * lax.axis_index("data") + jnp.arange(64)
            ),
            mesh=make_mesh((4, 2)),
            in_specs=P(None, "data"),
            out_specs=P(None, "data"),
        )
    text = tpu_text(run, shape)
    assert "stablehlo.while" in text
    assert not re.search("cholesky|triangular_solve|lapack|callback", text)


def test_a_tpus_solve_holds_one_product():
    """Those of refinement are further trips of its loop."""
    module = sys.modules["jaxpapers.optim.orthonormalize"]
    shapes = (2, 64, 16), (2, 16, 16), (2, 16, 16), (2, 1, 1)

    def solve(f):
        return lambda *x: f(*x[:3], x[3] > 0)

    run, loop = solve(module._solve), solve(module._solve_in_a_loop)
    assert tpu_text(run, *shapes).count("dot_general") == 1
    rng = np.random.default_rng(0)
    p = rng.normal(size=shapes[0]).astype(np.float32)
    lower = np.tril(rng.normal(size=shapes[1]) + 4 * np.eye(16)).astype(np.float32)
    # A poor inverse: one step squares its error, where it is taken.
    inverse = (np.linalg.inv(lower.astype(float)) * (1 + 1e-3)).astype(np.float32)
    for refined in ([0, 0], [1, 0], [1, 1]):
        args = p, lower, inverse, np.float32(refined).reshape(shapes[3])
        found = [jax.jit(f)(*args) for f in (run, loop)]
        np.testing.assert_allclose(*found, rtol=1e-6, atol=1e-7)
        errors = np.abs(np.asarray(found[0]) @ lower.mT - p).max((1, 2))
        np.testing.assert_array_equal(errors < 1e-4, np.array(refined) > 0)


def test_large_stacks_are_multiplied_one_by_one_on_a_tpu():
    def run(x, y):
        return stack_product("sl,sr->lr", x, y)

    def results(*shapes):
        return re.findall(
            r"dot_general.*-> tensor<([\dx]+)xf32>", tpu_text(run, *shapes)
        )

    assert results((2, 3, 1024, 512), (2, 3, 1024, 128)) == ["512x128"]
    assert results((2, 3, 64, 32), (2, 3, 64, 8)) == ["2x3x32x8"]
    # Very large ones, of a single matrix too, in pieces of 2**28 multiplications.
    assert results((1, 2048, 8192), (1, 2048, 512)) == ["256x512"]
    # Of 256 rows at least.
    assert results((1, 4096, 1024), (1, 4096, 1024)) == ["256x1024"]
    # 2**30 of them are one piece.
    assert results((2, 1024, 1024), (2, 1024, 1024)) == ["1024x1024"]


def products(text):
    """How many products have each precision."""
    found = re.findall(r"dot_general.*precision = \[(\w+), ", text)
    return {name: found.count(name) for name in ("DEFAULT", "HIGH")}


@pytest.mark.parametrize(
    "options, dtype, expected",
    [
        ({}, "float32", {"DEFAULT": 0, "HIGH": 4}),
        ({}, "bfloat16", {"DEFAULT": 4, "HIGH": 0}),
        ({"residual": 1.0}, "float32", {"DEFAULT": 0, "HIGH": 3}),
        ({"precision": "highest"}, "bfloat16", {"DEFAULT": 0, "HIGH": 0}),
        ({"precision": "default"}, "float32", {"DEFAULT": 4, "HIGH": 0}),
    ],
)
def test_precision_is_that_of_the_large_products(options, dtype, expected):
    tx = scale_by_dion(0.25, momentum_dtype=dtype, **options)
    params = {"w": jax.ShapeDtypeStruct((64, 32), np.float32)}
    state = jax.eval_shape(tx.init, params)
    traced = jax.jit(tx.update).trace(params, state)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    # XLA's default is not printed where both operands have it.
    count = products(text)
    count["DEFAULT"] += len(re.findall(r"dot_general(?!.*precision)", text))
    assert count == expected
    assert "HIGHEST" in text


def test_muons_precision():
    for precision, expected in ((None, 1), ("highest", 0)):
        tx = scale_by_muon(precision=precision)
        params = {"w": jax.ShapeDtypeStruct((64, 32), np.float32)}
        traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert products(text)["HIGH"] == expected


def test_unknown_precision():
    for make in (scale_by_dion, scale_by_muon):
        with pytest.raises(ValueError, match="precision must be one of .*got 'tf32'"):
            make(precision="tf32")
    group = {"name": "dion", "lr": 0.1, "precision": "tf32"}
    with pytest.raises(ValueError, match="precision must be one of .*got 'tf32'"):
        from_config(group, 1)


def pieces(x):
    """x as a sum of three bfloat16 numbers."""
    parts = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16).astype(x.dtype))
        x = x - parts[-1]
    return parts


def in_passes(spec, x, y, precision):
    """``stack_product`` as a TPU computes it, with exact sums."""
    x, y = pieces(x), pieces(y)
    left, right = spec.split("->")
    spec = f"...{left.replace(',', ',...')}->...{right}"
    return sum(jnp.einsum(spec, x[i], y[j]) for i, j in PASSES[precision])


@pytest.mark.parametrize("residual", [None, 1.0])
def test_errors_of_passes(residual, monkeypatch):
    """Of whole steps in float64 with P of condition 1 to 1e7, of products in passes.

    The momentum loses a rounding of what it gives, however ill-conditioned P is. What
    is lost of the update's columns grows with the condition, as it does in float32.
    """
    l, s, r = 256, 96, 24
    conditions = np.asarray([1, 1e1, 1e2, 1e3, 1e5, 1e7])
    bs, qs = [], []
    for i, cond in enumerate(conditions):
        rng = np.random.default_rng(i)
        u, v = (np.linalg.qr(rng.normal(size=(n, s)))[0] for n in (l, s))
        values = cond ** -np.minimum(np.arange(s) / (r - 1), 1.0)
        values[r:] /= 2
        bs.append(u * values @ v.T)
        qs.append(v[:, :r] @ np.linalg.qr(rng.normal(size=(r, r)))[0])
    # 2^-8, 2^-16 and 2^-24 are what pieces of one, two and three bfloat16 leave out.
    units = {None: 0, "default": 2**-8, "high": 2**-16, "highest": 2**-24}

    def step(x, name):
        # One matrix at a time: a loop is a smaller program than a batch.
        b, q = (x[None] for x in x)
        options = StepOptions(precision=name, orthogonalize="qr", residual=residual)
        out = dion_step([b], [0 * b], [q], options)
        return out[0][0][0], out[1][0][0]

    def steps(*names):
        def loops(*stacks):
            return {n: lax.map(functools.partial(step, name=n), stacks) for n in names}

        return together(loops, np.stack(bs), np.stack(qs))

    with jax.enable_x64(True):
        names = ("default", "high", "highest")
        exact = steps(*names)
        for module in (dion_step_module, power_iteration):
            monkeypatch.setattr(module, "stack_product", in_passes)
        rounded = steps(*names)
    sizes = (np.sqrt(s if residual else r), np.linalg.norm(np.stack(bs), axis=(1, 2)))
    for name, found in rounded.items():
        update, momentum = (
            np.linalg.norm(x - y, axis=(1, 2)) / (size * units[name])
            for x, y, size in zip(found, exact[name], sizes)
        )
        assert (momentum <= 0.1).all()
        # The residual D is known to a round-off of |N| by its product and by P's span,
        # and |N| / |D| is half the condition here. From 1e5 on the floor rules, which in
        # float64 is another one.
        few = conditions[: 4 if residual else None]
        bound = 2 + (1 if residual else 0.05) * few
        assert (update[: len(few)] <= bound).all()
        assert 0.01 < update.min(), "products that are exact test nothing"
