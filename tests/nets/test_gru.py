"""Recurrent layers against recorded numbers, their identities, and collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo
from jaxpapers import mesh as meshes
from jaxpapers.nets import gru
from jaxpapers.nets.gru import augru_scan, gru_scan
from tests.programs import KEY, together

B, T, I, H = 4, 8, 5, 6
MASK = np.arange(T)[None] < np.array([8, 1, 0, 5])[:, None]
matrix = pytest.mark.matrix
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)


def drawn(seed=0, dtype="float32"):
    """Parameters, inputs, attention, a first state."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: gru.init(key, I, H), KEY)
    params = jax.tree.map(lambda p: rng.normal(0, 0.4, p.shape), shapes)
    x, att = rng.normal(size=(B, T, I)), rng.uniform(0.05, 1, (B, T)) * MASK
    h0 = rng.normal(size=(B, H))
    return jax.tree.map(lambda v: v.astype(dtype), (params, x, att, h0))


# Recorded numbers

DTYPES = ["float64", pytest.param("float32", marks=matrix)]


def from_torch(data, keep=False):
    """Stacked (3 H, in) weights, rows r, z, n; ``keep``: z is 1 - our u."""
    sign = np.repeat([1.0, -1.0 if keep else 1.0, 1.0], len(data["W_hh"]) // 3)
    return {
        name: {"kernel": (data[w] * sign[:, None]).T, "bias": data[b] * sign}
        for name, w, b in (("input", "W_ih", "b_ih"), ("hidden", "W_hh", "b_hh"))
    }


def from_tensorflow(data):
    """Kernels over inputs and state together, columns r, u, candidate."""
    width = data["x"].shape[-1]
    kernel = np.concatenate([data["W_gates"], data["W_cand"]], 1)
    bias = np.concatenate([data["b_gates"], data["b_cand"]])
    return {
        "input": {"kernel": kernel[:width], "bias": bias},
        "hidden": {"kernel": kernel[width:], "bias": np.zeros_like(bias)},
    }


@pytest.mark.parity("ctr", only=lambda e: {"x", "states"} <= set(e["arrays"]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_layers(case, dtype):
    data = case.arrays
    mask = np.arange(data["x"].shape[1])[None] < data["lengths"][:, None]
    variant = {"gru_extractor": "gru", "augru_released_tf": "augru_released"}.get(
        case.name, case.name
    )
    torch = "W_ih" in data
    params = from_torch(data, variant == "gru") if torch else from_tensorflow(data)
    args = jax.tree.map(
        lambda v: v.astype(dtype), (params, data["x"], data.get("att", mask))
    )

    def value(params, x, att, mask):
        if variant == "gru":
            states, last = gru_scan(params, x, mask)
        else:
            states, last = augru_scan(params, x, att, mask, variant)
        return 0.5 * jnp.sum(last**2), (states, last)

    with jax.enable_x64(dtype == "float64"):
        (grads, x, att), (states, last) = together(
            jax.grad(value, (0, 1, 2), has_aux=True), *args, mask
        )
    found = {"states": states, "last": last, "grad_x": x, "grad_att": att}
    if torch:
        found |= {"grad_W_ih": grads["input"]["kernel"].T,
                  "grad_W_hh": grads["hidden"]["kernel"].T}  # fmt: skip
    assert states.dtype == dtype
    for name, value in found.items():
        if name in data:
            close(value, data[name], atol=case.tolerance(dtype), err_msg=name)


# Identities


@pytest.mark.usefixtures("float64")
def test_identities():
    params, x, att, h0 = drawn(dtype="float64")
    # AGRU is AUGRU whose gate is open.
    bias = params["input"]["bias"].copy()
    bias[H : 2 * H] = 1e3
    open_gate = {**params, "input": {**params["input"], "bias": bias}}

    def check(params, open_gate, x, att, h0, mask):
        scan = functools.partial(augru_scan, mask=mask)
        zero, one = 0 * att, 0 * att + 1
        return {
            "frozen": [scan(params, x, zero, variant=v, h0=h0)
                       for v in ("agru", "augru")],
            "released": scan(params, x, zero, variant="augru_released", h0=h0),
            "full": [scan(params, x, one, variant=v) for v in ("augru", "aigru")],
            "plain": gru_scan(params, x, mask),
            "agru": scan(params, x, att, variant="agru"),
            "open": scan(open_gate, x, att, variant="augru"),
            "aigru": scan(params, x, att, variant="aigru"),
            "scaled": gru_scan(params, x * att[..., None], mask),
            "augru": scan(params, x, att),
        }  # fmt: skip

    found = together(check, params, open_gate, x, att, h0, MASK)
    for states, last in found["frozen"]:
        np.testing.assert_array_equal(last, h0)
        np.testing.assert_array_equal(states, MASK[..., None] * h0[:, None])
    assert np.abs(found["released"][1] - h0)[0].max() > 0.1
    for states, _ in found["full"]:
        close(states, found["plain"][0])
    close(found["agru"][0], found["open"][0])
    close(found["aigru"][1], found["scaled"][1])
    others = (found[n][1] for n in ("plain", "agru", "aigru"))
    assert min(np.abs(found["augru"][1] - o)[0].max() for o in others) > 1e-3


@pytest.mark.usefixtures("float64")
def test_the_equations_step_by_step():
    """Eq 2-5 and 11-12, in plain NumPy."""
    params, x, att, _ = drawn(3, "float64")
    _, last = together(augru_scan, params, x, att, MASK)
    w, u = params["input"]["kernel"], params["hidden"]["kernel"]
    b, d = params["input"]["bias"], params["hidden"]["bias"]
    h = np.zeros((B, H))
    for t in range(T):
        i, s = x[:, t] @ w + b, h @ u + d
        r, z = (1 / (1 + np.exp(-(i + s)[:, k * H : (k + 1) * H])) for k in (0, 1))
        c = np.tanh(i[:, 2 * H :] + r * s[:, 2 * H :])
        z = z * att[:, t, None]
        h = np.where(MASK[:, t, None], (1 - z) * h + z * c, h)
    close(last, h)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "variant",
    ["augru", *(pytest.param(v, marks=matrix) for v in gru.VARIANTS if v != "augru")],
)
def test_gradients_are_finite_differences(variant):
    """Of everything that the written-out backward pass returns, in random directions."""
    args = dict(zip(("params", "x", "att", "h0"), drawn(1, "float64")))
    if variant == "gru":
        del args["att"]
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(B, T, H)), rng.normal(size=(B, H))
    steps = jax.tree.map(lambda p: rng.normal(size=p.shape), args)

    def check(args, steps, weight, mask):
        def value(args):
            states, last = augru_scan(
                args["params"], args["x"], args.get("att"), mask, variant, args["h0"]
            )
            return (states * weight[0]).sum() + (last * weight[1]).sum()

        def along(name, size):
            moved = jax.tree.map(lambda p, d: p + size * d, args[name], steps[name])
            return value({**args, name: moved})

        ends = {n: jax.vmap(functools.partial(along, n))(jnp.array([1e-5, -1e-5]))
                for n in args}  # fmt: skip
        products = jax.tree.map(
            lambda g, d: (g * d).sum(), jax.grad(value)(args), steps
        )
        return ends, products

    ends, products = together(check, args, steps, weight, MASK)
    for name, (right, left) in ends.items():
        found = sum(jax.tree.leaves(products[name]))
        assert found == pytest.approx((right - left) / 2e-5, rel=1e-6), name


@pytest.mark.matrix
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "variant, options",
    [
        ("augru", ({"chunk": 3},)),
        pytest.param("augru", ({"unroll": T}, {"unroll": 4}), marks=matrix),
        pytest.param("augru", ({"chunk": 99},), marks=matrix),
        pytest.param("aigru", ({"chunk": 4},), marks=matrix),
        pytest.param("augru_released", ({"chunk": 3},), marks=matrix),
    ],
)
def test_unrolling_and_chunks_change_nothing(variant, options):
    params, x, att, _ = drawn(4, "float64")

    def check(params, x, att, mask):
        def value(params, x, att, options):
            states, last = augru_scan(params, x, att, mask, variant, **options)
            return jnp.sin(states).sum() + (last**2).sum(), states

        step = jax.value_and_grad(value, (0, 1, 2), has_aux=True)
        return [step(params, x, att, o) for o in ({}, *options)]

    expected, *others = together(check, params, x, att, MASK)
    for found in others:
        jax.tree.map(close, found, expected)


def test_chunks_keep_fewer_states():
    params, x, att, _ = drawn()
    wide = [np.repeat(v, 16, 1) for v in (x, att, MASK)]

    def kept(chunk):
        def residuals(params, x, att, mask):
            def value(p):
                states, last = augru_scan(p, x, att, mask, chunk=chunk)
                return (last**2).sum()

            return jax.vjp(value, params)[1]

        shapes = jax.eval_shape(residuals, params, *wide)
        return sum(a.size for a in jax.tree.leaves(shapes))

    assert kept(16) < kept(0) / 2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("variant", ["augru", pytest.param("aigru", marks=matrix)])
def test_candidates_share_their_history(variant):
    params, x, _, _ = drawn(5, "float64")
    n = 2
    att = np.random.default_rng(0).uniform(size=(B, n, T)) * MASK[:, None]

    def check(params, x, att, mask):
        def shared(params, x, att):
            states, last = augru_scan(params, x[:, None], att, mask[:, None], variant)
            return (last**3).sum(), last

        def apart(params, x, att):
            last = [augru_scan(params, x, att[:, i], mask, variant)[1]
                    for i in range(n)]  # fmt: skip
            return (jnp.stack(last, 1) ** 3).sum(), jnp.stack(last, 1)

        return [
            jax.value_and_grad(f, (0, 1, 2), has_aux=True)(params, x, att)
            for f in (shared, apart)
        ]

    found, expected = together(check, params, x, att, MASK)
    jax.tree.map(close, found, expected)


@pytest.mark.usefixtures("float64")
def test_padding_changes_nothing_and_order_does():
    params, x, att, _ = drawn(6, "float64")
    longer = [
        np.pad(a, [(0, 0), (0, 5)] + [(0, 0)] * (a.ndim - 2), constant_values=7)
        for a in (x, att)
    ]
    mask = np.pad(MASK, [(0, 0), (0, 5)])

    def check(params, short, long):
        def value(params, x, att, mask):
            states, last = augru_scan(params, x, att, mask)
            return (last**2).sum() + states.sum(), (states, last)

        run = jax.value_and_grad(value, (0, 1, 2), has_aux=True)
        x, att, mask = short
        orders = [augru_scan(params, x[:, ::step], att[:, ::step], mask | True)[1]
                  for step in (1, -1)]  # fmt: skip
        return run(params, *short), run(params, *long), orders

    short, long, (ahead, back) = together(
        check, params, (x, att, MASK), (*longer, mask)
    )
    close(short[0][1][0], long[0][1][0][:, :T])
    assert not long[0][1][0][~mask].any()
    close(short[0][1][1], long[0][1][1])
    jax.tree.map(close, short[1][0], long[1][0])
    for a, b in zip(short[1][1:], long[1][1:]):
        close(a, b[:, :T])
        assert not b[~mask].any()
    assert np.abs(ahead - back)[0].max() > 1e-2


def test_initial_kernels_are_glorot_over_inputs_and_state(key):
    params = together(lambda key: gru.init(key, 60, 40, update_bias=0.5), key)
    kernel = np.concatenate([params["input"]["kernel"], params["hidden"]["kernel"]])
    for columns, fan in ((slice(0, 80), 180), (slice(80, 120), 140)):
        bound = np.sqrt(6 / fan)
        assert 0.98 * bound < np.abs(kernel[:, columns]).max() <= bound
    bias = params["input"]["bias"].reshape(3, 40)
    np.testing.assert_array_equal(bias, np.repeat([[1.0], [0.5], [0.0]], 40, 1))


def test_bfloat16_products_are_close_and_states_float32():
    params, x, att, _ = drawn(8)
    exact, found = together(
        lambda *args: [augru_scan(*args, dtype=d)[0] for d in (None, jnp.bfloat16)],
        params, x, att, MASK,
    )  # fmt: skip
    assert found.dtype == np.float32
    assert 0 < np.abs(found - exact).max() < 4e-2


def test_no_collective_inside_the_scan():
    """Forward and backward, with the batch over 8 devices."""
    mesh = meshes.make_mesh({"data": 8})
    params, x, att, _ = drawn()

    def value(params, x, att):
        x = x @ params["input"]["kernel"][:, :I]
        states, last = augru_scan(params, x, att, jnp.ones(att.shape, bool))
        return (last**2).mean()

    split = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        args = [
            jax.ShapeDtypeStruct((16, 64, *a.shape[2:]), a.dtype, sharding=split)
            for a in (x, att)
        ]
        compiled = jax.jit(jax.grad(value, (0, 1, 2))).lower(shapes, *args).compile()
    text = compiled.as_text()
    assert " while(" in text
    found = hlo.collectives(text, mesh)
    assert found and not [c for c in found if c.count > 1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"variant": "lstm"}, "aigru"),
        ({"att": None}, "needs attention"),
        ({"x": np.zeros((B, T, I + 1))}, "channels"),
        ({"mask": MASK[:, :-1]}, "same number of steps"),
        ({"unroll": 0}, "unroll"),
        ({"chunk": -1}, "chunk"),
    ],
)
def test_refusals(change, message):
    params, x, att, _ = drawn()
    arrays = {"x": x, "att": att, "mask": MASK}
    arrays |= {k: v for k, v in change.items() if k in arrays}
    options = {k: v for k, v in change.items() if k not in arrays}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(augru_scan, **options), params, **arrays)


def test_sizes_are_refused():
    with pytest.raises(ValueError, match="sizes >= 1"):
        gru.init(jax.random.key(0), 0, 3)


@pytest.mark.matrix
def test_nan_attention_is_found_by_checkify():
    from jax.experimental import checkify

    params, x, att, _ = drawn()
    run = jax.jit(checkify.checkify(augru_scan, errors=checkify.float_checks))
    error, _ = run(params, x, att, MASK)
    error.throw()
    error, _ = run(params, x, att * np.nan, MASK)
    with pytest.raises(checkify.JaxRuntimeError, match="nan"):
        error.throw()
