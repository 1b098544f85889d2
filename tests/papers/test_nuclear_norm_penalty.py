"""The nuclear norm: recorded values, identities, degenerate batches, sharded batches."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo
from jaxpapers.mesh import make_mesh
from jaxpapers.papers.nuclear_norm import penalty
from jaxpapers.papers.nuclear_norm import polar as polar_module
from jaxpapers.papers.nuclear_norm.penalty import Norm, nuclear_norm
from tests.programs import together

NORMS = {method: Norm(method=method) for method in penalty.METHODS}
# Relative error of values and gradients, and whether it holds at any conditioning.
EXACT = {"svd": 1e-10, "newton_schulz": 1e-10, "gram": 1e-3}
SINGLE = {"svd": 1e-4, "newton_schulz": 1e-4, "gram": 1e-3}
BOTH = jax.value_and_grad(lambda x, norm: nuclear_norm(x, norm)[0])


def every(x):
    """Value and gradient of every back end."""
    return {name: BOTH(x, norm) for name, norm in NORMS.items()}


def polar(a):
    u, s, vt = np.linalg.svd(np.asarray(a, np.float64), full_matrices=False)
    kept = s > 1e-10 * max(s[0], 1e-300)
    return s.sum(), u[:, kept] @ vt[kept]


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / max(np.linalg.norm(b), 1e-12)


def recorded(entry):
    return {"nuc_grad", "features"} <= set(entry["arrays"])


def total(features, w, b, labels, theta, norm):
    """The released loss: cross-entropy + theta / B times the nuclear norm."""
    logits = features @ w.T + b[None]
    ce = -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()
    nuclear, _ = nuclear_norm(features, norm)
    return ce + theta * nuclear / len(features), (ce, nuclear)


@pytest.mark.parity("ood_dg", only=recorded)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_recorded_losses_and_gradients(case, dtype):
    a = case.arrays
    bounds = EXACT if dtype == "float64" else SINGLE
    arrays = [np.asarray(a[k], dtype) for k in ("features", "W", "b")]
    labels, theta = a["labels"], float(a["theta"])

    def run(*arrays):
        def one(norm):
            f = functools.partial(total, labels=labels, theta=theta, norm=norm)
            return jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*arrays)

        return {k: (one(norm), BOTH(arrays[0], norm)) for k, norm in NORMS.items()}

    with jax.enable_x64(dtype == "float64"):
        results = together(run, *arrays)
    s = a["s"]
    kept = s > 1e-10 * s[0]
    expected, ours = polar(a["features"])
    deficient = not kept.all()
    # At rank deficiency the recorded gradient has some Z beside U_r V_r^T.
    nuc_grad = ours if deficient else a["nuc_grad"]
    grad_features = a["grad_features"]
    if deficient:
        count = len(a["features"])
        grad_features = grad_features + theta / count * (ours - a["nuc_grad"])
    for name, (((value, (ce, nuclear)), grads), (_, gradient)) in results.items():
        bound = case.tolerance(name, dtype, otherwise=bounds[name])
        if dtype == "float32" and s[kept][-1] < 5e-5 * s[0]:
            # Rounding of the features alone turns the polar factor by so much.
            bound = max(bound, 1e-6 * s[0] / s[kept][-1])
        if name == "gram" and s[kept][-1] / s[0] < 1e-3:
            continue
        assert abs(nuclear - a["nuc"]) <= bound * a["nuc"], name
        assert abs(ce - a["ce"]) <= bound * max(a["ce"], 1)
        assert abs(value - a["total"]) <= bound * a["total"]
        u, _, vt = np.linalg.svd(a["features"], full_matrices=False)
        u, vt = u[:, kept], vt[kept]
        assert relative(u @ (u.T @ gradient @ vt.T) @ vt, nuc_grad) <= bound, name
        for got, known in zip(grads, (grad_features, a["grad_W"], a["grad_b"])):
            if known is grad_features and deficient:
                inner = u @ (u.T @ (got - known) @ vt.T) @ vt
                assert np.linalg.norm(inner) <= bound * np.linalg.norm(known)
            else:
                assert relative(got, known) <= bound, name


def orthogonal(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def test_identities(float64):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 9))
    turned = orthogonal(rng, 6) @ a @ orthogonal(rng, 9)
    low = a[:, :2] @ b[:2]
    results = [together(every, x) for x in (a, b)] + [
        together(lambda *x: [every(y) for y in x], turned, -3 * a, a + b, low, low[:3])
    ]
    one, two, (turned, scaled, summed, deficient, rows) = results
    for name in NORMS:
        value, grad = one[name]
        assert np.vdot(a, grad) == pytest.approx(value, rel=1e-9)
        assert np.linalg.norm(grad, 2) <= 1 + 1e-5
        assert turned[name][0] == pytest.approx(value, rel=1e-9)
        assert scaled[name][0] == pytest.approx(3 * value, rel=1e-9)
        assert summed[name][0] <= value + two[name][0]
        frobenius = np.linalg.norm(low)
        assert frobenius <= deficient[name][0] * (1 + 1e-6)
        assert deficient[name][0] <= 2**0.5 * frobenius * (1 + 1e-6)
        # A sum over row blocks is an upper bound.
        assert deficient[name][0] <= 2 * rows[name][0] + np.linalg.norm(low, "nuc")
        for _ in range(100):
            y = rng.normal(size=a.shape)
            assert np.vdot(y / np.linalg.norm(y, 2), a) <= value * (1 + 1e-9)
    assert relative(scaled["svd"][1], -one["svd"][1]) < 1e-9


def test_finite_differences(float64):
    rng = np.random.default_rng(1)
    a, direction, h = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), 1e-6
    low = np.outer(a[:, 0], a[0])

    def run(a, low):
        sides = [[nuclear_norm(a + s * h * direction, n)[0] for s in (1, -1)]
                 for n in NORMS.values()]  # fmt: skip
        smooth = []
        for x in (a, low, 0 * a):
            f = functools.partial(penalty.smoothed_nuclear_norm, mu=0.1)
            ends = [f(x + s * h * direction) for s in (1, -1)]
            smooth.append((ends, jax.value_and_grad(f)(x)))
        return every(a), sides, smooth

    grads, sides, smooth = together(run, a, low)
    for (name, (_, grad)), (up, down) in zip(grads.items(), sides):
        bound = 1e-6 if name == "gram" else 1e-7
        expected = np.vdot(grad, direction)
        assert (up - down) / (2 * h) == pytest.approx(expected, rel=bound), name
    for x, ((up, down), (value, grad)) in zip((a, low, 0 * a), smooth):
        expected = np.sqrt(np.linalg.svd(x)[1] ** 2 + 0.01) - 0.1
        assert value == pytest.approx(expected.sum(), abs=1e-9)
        assert (up - down) / (2 * h) == pytest.approx(
            np.vdot(grad, direction), abs=1e-6
        )


def test_gradients_can_be_differentiated_again(float64):
    """At ties too, where derivatives of U and V are not finite."""
    rng = np.random.default_rng(7)
    turn = orthogonal(rng, 3), orthogonal(rng, 4)[:3]
    stack = [(turn[0] * s) @ turn[1] for s in ([2.0, 2.0, 2.0], [3.0, 1.0, 1.0])]
    direction, h = rng.normal(size=(3, 4)), 1e-5
    exact = Norm(method="svd")

    def gradient(x):
        return jax.grad(lambda x: nuclear_norm(x, exact)[0])(x)

    def run(stack):
        again = [jax.grad(lambda x: jnp.vdot(gradient(x), direction))(x) for x in stack]
        sides = [[gradient(x + s * h * direction) for s in (1, -1)] for x in stack]
        library = Norm(method="svd", gradient="library")
        at_zero = jax.grad(lambda x: nuclear_norm(x, library)[0])(0 * stack[0])
        return again, sides, at_zero

    again, sides, at_zero = together(run, stack)
    for hessian, (up, down) in zip(again, sides):
        np.testing.assert_allclose(hessian, (up - down) / (2 * h), atol=1e-8)
    assert np.linalg.norm(at_zero, 2) == pytest.approx(1)


def test_degenerate_batches():
    """Zero, one row, equal rows, signs, tiny and huge numbers: never NaN."""
    x = np.float32([[3.0, -4.0, 0.0]])
    diagonal = np.diag(np.float32([2, -1, 0.5]))
    cases = {
        "zero": 0 * diagonal,
        "row": x.repeat(1, 0),
        "equal": x.repeat(4, 0),
        "signs": diagonal,
        "tiny": diagonal * 1e-30,
        "subnormal": diagonal * 1e-42,
        "huge": diagonal * 1e30,
        "huge rank one": np.full((4, 3), 3e38, np.float32),
    }
    results = together(lambda c: {k: every(v) for k, v in c.items()}, cases)
    for name, each in results.items():
        for method, (value, grad) in each.items():
            where = f"{name} {method}"
            assert np.isfinite(grad).all() and not np.isnan(value), where
            if name in ("subnormal", "huge rank one"):
                continue  # The value may be zero, or infinite.
            expected, factor = polar(cases[name])
            assert value == pytest.approx(expected, rel=1e-5), where
            np.testing.assert_allclose(grad, factor, atol=2e-3, err_msg=where)
    for _, grad in results["zero"].values():
        assert not grad.any()
    assert results["equal"]["gram"][0] == pytest.approx(2 * 5, rel=1e-5)


def test_ill_conditioned_batches_are_never_nan():
    """Where squares lose the small values Newton-Schulz goes on with the features."""
    rng = np.random.default_rng(2)
    u, v = orthogonal(rng, 12), orthogonal(rng, 20)[:12]
    spectra = [np.logspace(0, -e, 12) for e in (1, 3, 8, 30)]
    spectra += [np.r_[np.ones(6), np.zeros(6)], np.r_[1.0, np.full(11, 1e-3)]]
    stack = np.stack([(u * s) @ v for s in spectra]).astype(np.float32)

    def run(stack):
        good = [polar_module._coupled(x @ x.T / 1.02**2, 40)[1] for x in stack[:2]]
        return [every(x) for x in stack], good

    results, good = together(run, stack)
    assert good == [True, False]
    for s, each in zip(spectra, results):
        for method, (value, grad) in each.items():
            assert np.isfinite(grad).all()
            bound = 2e-2 if method == "gram" else 1e-3
            assert np.linalg.norm(grad, 2) <= 1 + bound, method
            assert value == pytest.approx(s.sum(), rel=bound), (method, s)
    for i, bound in ((0, 1e-4), (1, 1e-2)):
        _, factor = polar(stack[i])
        assert relative(results[i]["newton_schulz"][1], factor) < bound


def test_a_row_of_nan_gives_nan_and_bfloat16_one_percent():
    rng = np.random.default_rng(3)
    a = rng.normal(size=(5, 7)).astype(np.float32)
    spoiled = a.copy()
    spoiled[2] = np.nan

    def run(a, spoiled):
        return (
            every(spoiled),
            every(a.astype(jnp.bfloat16)),
            jax.vmap(lambda x: nuclear_norm(x)[0])(jnp.stack([a, 2 * a])),
        )

    bad, half, mapped = together(run, a, spoiled)
    expected, _ = polar(a)
    for name in NORMS:
        assert np.isnan(bad[name][0]) and np.isnan(bad[name][1]).all()
        assert float(half[name][0]) == pytest.approx(expected, rel=1e-2)
        assert half[name][0].dtype == np.float32 and half[name][1].dtype == jnp.bfloat16
    np.testing.assert_allclose(mapped, [expected, 2 * expected], rtol=1e-5)


def test_moreau(float64):
    a, t = np.random.default_rng(4).normal(size=(5, 8)), 0.7
    u, s, vt = np.linalg.svd(a / t, full_matrices=False)
    ball = u * np.minimum(s, 1) @ vt
    prox = together(lambda a: penalty.prox_nuclear(a, t), a)
    np.testing.assert_allclose(prox + t * ball, a, atol=1e-10)


def test_effective_ranks():
    s = np.float32([2, 1, 1, 0])
    p = np.array([0.5, 0.25, 0.25])
    kinds = ("ratio", "squares", "entropy")
    ranks = together(lambda s: [penalty.effective_rank(s, k) for k in kinds], s)
    expected = [2, 16 / 6, np.exp(-(p * np.log(p)).sum())]
    np.testing.assert_allclose(ranks, expected, rtol=1e-5)


SHAPES = {"wide": (8, 24), "tall": (24, 8)}


def sharded(mesh, spec, norm):
    """Value and gradient of features laid out on a mesh, compiled."""
    f = jax.jit(lambda x: BOTH(x * 1.0, norm))
    return f, NamedSharding(mesh, spec)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "mesh, norm",
    [
        ((4, 2), "gram"),
        ((8, 1), "newton_schulz"),
        *(pytest.param(m, n, marks=pytest.mark.matrix)
          for m in ((1, 1), (2, 1), (4, 2), (2, 4), (8, 1)) for n in NORMS),
    ],
)  # fmt: skip
def test_the_norm_is_that_of_the_global_batch(shape, mesh, norm):
    grid = make_mesh(
        dict(zip(("data", "model"), mesh)), jax.devices()[: mesh[0] * mesh[1]]
    )
    x = np.random.default_rng(5).normal(size=SHAPES[shape]).astype(np.float32)
    f, layout = sharded(grid, P("data", "model"), NORMS[norm])
    with jax.set_mesh(grid):
        value, grad = jax.device_get(f(jax.device_put(x, layout)))
    expected, factor = polar(x)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad, factor, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_sent(shape):
    """Wide: all features once. Tall: the D x D matrix of products, reduced once."""
    grid = make_mesh({"data": 4, "model": 1}, jax.devices()[:4])
    b, d = SHAPES[shape]
    f, layout = sharded(grid, P("data"), Norm())
    x = jax.ShapeDtypeStruct((b, d), np.float32, sharding=layout)
    with jax.set_mesh(grid):
        text = f.lower(x).compile().as_text()
    sent = {}
    for c in hlo.collectives(text, grid):
        if c.elements > 1:  # The largest number, and whether all are finite.
            sent[c.kind] = sent.get(c.kind, 0) + c.wire_bytes * c.count
    if shape == "wide":
        assert sent == {"all-gather": hlo.ring_bytes("all-gather", 4 * b * d, 4)}
    else:
        assert sent == {"all-reduce": hlo.ring_bytes("all-reduce", 4 * d * d, 4)}


def test_per_device_is_another_estimator():
    """The sum over devices bounds the norm from above and sends one number."""
    grid = make_mesh({"data": 4, "model": 1}, jax.devices()[:4])
    x = np.random.default_rng(6).normal(size=(8, 5)).astype(np.float32)
    f, layout = sharded(grid, P("data"), Norm(per_device=True))
    with jax.set_mesh(grid):
        program = f.lower(jax.device_put(x, layout)).compile()
        value, grad = jax.device_get(program(jax.device_put(x, layout)))
    parts = [polar(x[i : i + 2]) for i in range(0, 8, 2)]
    assert value == pytest.approx(sum(p[0] for p in parts), rel=1e-5)
    assert value > 1.1 * polar(x)[0]
    np.testing.assert_allclose(grad, np.concatenate([p[1] for p in parts]), atol=1e-5)
    assert all(c.elements == 1 for c in hlo.collectives(program.as_text(), grid))
    # Without a mesh it is the norm itself.
    alone = together(lambda x: nuclear_norm(x, Norm(per_device=True))[0], x)
    assert alone == pytest.approx(polar(x)[0], rel=1e-5)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: Norm(method="qr"), "norm.method must be one of .* got 'qr'"),
        (lambda: Norm(steps=0), "norm.steps must be >= 1, got 0"),
        (lambda: Norm(tau=float("nan")), "norm.tau must be >= 0, got nan"),
        (lambda: Norm(tau=1.0), "norm.tau must be < 1, got 1.0"),
        (lambda: Norm(gradient="library"), "library needs norm.method=svd, got 'gram'"),
        (lambda: Norm(gradient="other"), "norm.gradient must be one of"),
        (
            lambda: inspect.unwrap(nuclear_norm)(jnp.zeros(3)),
            r"a matrix \(B, D\) .* got \(3,\)",
        ),
        (lambda: nuclear_norm(jnp.zeros((0, 3))), r"at least one row, got \(0, 3\)"),
        (lambda: penalty.smoothed_nuclear_norm(jnp.eye(2), 0.0), "mu must be > 0"),
        (lambda: penalty.effective_rank(jnp.ones(2), "rank"), "kind must be ratio"),
        (lambda: penalty.effective_rank(jnp.ones(0)), r"K >= 1, got \(0,\)"),
        (lambda: penalty.prox_nuclear(jnp.eye(2), -1.0), "t must be >= 0, got -1.0"),
        (lambda: penalty.polar_factor(jnp.zeros((0, 3))), "at least one row"),
        (lambda: penalty.smoothed_nuclear_norm(jnp.zeros((0, 3)), 1.0), "at least one"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_refusals_of_kinds():
    x = jnp.asarray(np.eye(2, dtype=np.float32))
    function = inspect.unwrap(nuclear_norm)
    with pytest.raises(TypeError, match=r"such as Norm\(method='svd'\), got 'svd'"):
        function(x, "svd")
    with pytest.raises(TypeError, match="must be real, got complex64"):
        function(jnp.asarray(np.eye(2, dtype=np.complex64)))
