"""Recurrent layers against recorded numbers, their identities, and collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo
from jaxpapers import mesh as meshes
from jaxpapers.nets import gru
from jaxpapers.nets.gru import augru_scan, gru_scan

B, T, I, H = 4, 8, 5, 6
LENGTHS = np.array([8, 1, 0, 5])
MASK = jnp.asarray(np.arange(T)[None] < LENGTHS[:, None])


def from_torch(data, keep=False):
    """Stacked (3 H, in) weights, rows r, z, n; ``keep``: z is 1 - our u."""
    sign = np.repeat([1.0, -1.0 if keep else 1.0, 1.0], len(data["W_hh"]) // 3)
    return {
        name: {"kernel": (data[w] * sign[:, None]).T, "bias": data[b] * sign}
        for name, w, b in (("input", "W_ih", "b_ih"), ("hidden", "W_hh", "b_hh"))
    }


def read(case):
    folder, _, entry = case
    with np.load(folder / entry["file"]) as file:
        data = dict(file)
    data["mask"] = np.arange(data["x"].shape[1])[None] < data["lengths"][:, None]
    with jax.enable_x64(True):
        data = {name: jnp.asarray(x) for name, x in data.items()}
    return data, entry["tolerance_float64"], entry["tolerance_float32"]


def single(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else None), tree
    )


def drawn(seed=0):
    """Parameters, inputs and attention; float64 under ``jax.enable_x64``."""
    rng = np.random.default_rng(seed)
    params = gru.init(jax.random.key(seed), I, H)
    params = jax.tree.map(
        lambda p: np.asarray(p, float) + rng.normal(0, 0.1, p.shape), params
    )
    x = rng.normal(size=(B, T, I))
    att = np.where(MASK, rng.uniform(0.05, 1, (B, T)), 0.0)
    return jax.tree.map(jnp.asarray, (params, x, att))


def is_scan(entry, name):
    return entry["file"].startswith(name) and {"x", "states"} <= set(entry["arrays"])


@pytest.mark.parity("ctr", only=lambda e: is_scan(e, "gru_extractor"))
def test_extractor(case):
    data, tol, tol32 = read(case)
    with jax.enable_x64(True):
        params = from_torch(data, keep=True)
        states, last = jax.jit(gru_scan)(params, data["x"], data["mask"])
        np.testing.assert_allclose(states, data["states"], rtol=0, atol=tol)
        np.testing.assert_allclose(last, data["last"], rtol=0, atol=tol)
    states, last = jax.jit(gru_scan)(*single((params, data["x"], data["mask"])))
    np.testing.assert_allclose(states, data["states"], rtol=0, atol=tol32)
    assert states.dtype == np.float32


@pytest.mark.parity(
    "ctr",
    only=lambda e: any(is_scan(e, n + ".") or is_scan(e, n + "_t") for n in
                       ("agru", "augru")) and "W_ih" in e["arrays"],
)  # fmt: skip
def test_attention_cells_and_their_gradients(case):
    data, tol, tol32 = read(case)
    variant = case[2]["file"].split(".")[0].split("_")[0]

    def value(params, x, att):
        states, last = augru_scan(params, x, att, data["mask"], variant)
        return 0.5 * jnp.sum(last**2), (states, last)

    with jax.enable_x64(True):
        args = from_torch(data), data["x"], data["att"]
        run = jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))
        (grads, x, att), (states, last) = run(*args)
    np.testing.assert_allclose(states, data["states"], rtol=0, atol=tol)
    np.testing.assert_allclose(last, data["last"], rtol=0, atol=tol)
    np.testing.assert_allclose(x, data["grad_x"], rtol=0, atol=tol)
    np.testing.assert_allclose(att, data["grad_att"], rtol=0, atol=tol)
    for name, w in (("input", "grad_W_ih"), ("hidden", "grad_W_hh")):
        np.testing.assert_allclose(grads[name]["kernel"].T, data[w], rtol=0, atol=tol)
    (_, x, _), (states, _) = run(*single(args))
    np.testing.assert_allclose(states, data["states"], rtol=0, atol=tol32)
    np.testing.assert_allclose(x, data["grad_x"], rtol=0, atol=tol32)


@pytest.mark.parity("ctr", only=lambda e: is_scan(e, "augru_released"))
@pytest.mark.parametrize("double", [True, False])
def test_released_cell(case, double):
    data, *tols = read(case)
    tol = tols[0 if double else 1]
    width = data["x"].shape[-1]
    kernel = np.concatenate([data["W_gates"], data["W_cand"]], 1)
    bias = np.concatenate([data["b_gates"], data["b_cand"]])
    params = {
        "input": {"kernel": kernel[:width], "bias": bias},
        "hidden": {"kernel": kernel[width:], "bias": np.zeros_like(bias)},
    }
    given = (params, data["x"], data["att"], data["mask"])
    with jax.enable_x64(double):
        found = jax.jit(augru_scan, static_argnums=4)(
            *(given if double else single(given)), "augru_released"
        )
    np.testing.assert_allclose(found[0], data["states"], rtol=0, atol=tol)
    np.testing.assert_allclose(found[1], data["last"], rtol=0, atol=tol)


def test_identities():
    with jax.enable_x64(True):
        params, x, att = drawn()
        jitted = jax.jit(augru_scan, static_argnames="variant")
        scan = functools.partial(jitted, mask=MASK)
        plain = jax.jit(gru_scan)(params, x, MASK)
        h0 = jnp.asarray(np.random.default_rng(1).normal(size=(B, H)))
        for variant in ("agru", "augru"):
            frozen = scan(params, x, jnp.zeros_like(att), variant=variant, h0=h0)
            np.testing.assert_array_equal(frozen[1], h0)
            np.testing.assert_array_equal(frozen[0], MASK[..., None] * h0[:, None])
        moved = scan(params, x, jnp.zeros_like(att), variant="augru_released", h0=h0)
        assert np.abs(moved[1] - h0)[0].max() > 0.1
        for variant in ("augru", "aigru"):
            found = scan(params, x, jnp.ones_like(att), variant=variant)
            np.testing.assert_allclose(found[0], plain[0], rtol=0, atol=1e-12)
        # AGRU is AUGRU whose gate is open.
        bias = params["input"]["bias"].at[H : 2 * H].set(1e3)
        open_gate = {**params, "input": {**params["input"], "bias": bias}}
        agru, opened = (
            scan(p, x, att, variant=v)
            for p, v in ((params, "agru"), (open_gate, "augru"))
        )
        np.testing.assert_allclose(agru[0], opened[0], rtol=0, atol=1e-12)
        scaled = jax.jit(gru_scan)(params, x * att[..., None], MASK)
        found = scan(params, x, att, variant="aigru")
        np.testing.assert_allclose(found[1], scaled[1], rtol=0, atol=1e-12)
        augru = scan(params, x, att)
        assert (
            min(np.abs(augru[1] - o[1])[0].max() for o in (plain, agru, found)) > 1e-3
        )


def test_the_equations_step_by_step():
    """Eq 2-5 and 11-12, in plain NumPy."""
    with jax.enable_x64(True):
        params, x, att = drawn(3)
        _, last = jax.jit(augru_scan)(params, x, att, MASK)
    params, x, att, mask = jax.tree.map(np.asarray, (params, x, att, MASK))
    w, u = params["input"]["kernel"], params["hidden"]["kernel"]
    b, d = params["input"]["bias"], params["hidden"]["bias"]
    h = np.zeros((B, H))
    for t in range(T):
        i, s = x[:, t] @ w + b, h @ u + d
        r, z = (1 / (1 + np.exp(-(i + s)[:, k * H : (k + 1) * H])) for k in (0, 1))
        c = np.tanh(i[:, 2 * H :] + r * s[:, 2 * H :])
        z = z * att[:, t, None]
        h = np.where(mask[:, t, None], (1 - z) * h + z * c, h)
    np.testing.assert_allclose(last, h, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", gru.VARIANTS)
def test_gradients_are_finite_differences(variant):
    """Of everything the written-out backward pass returns, in random directions."""
    with jax.enable_x64(True):
        params, x, att = drawn(1)
        rng = np.random.default_rng(2)
        weight = rng.normal(size=(B, T, H)), rng.normal(size=(B, H))
        h0 = jnp.asarray(rng.normal(size=(B, H)))
        args = {"params": params, "x": x, "att": att, "h0": h0}

        @jax.jit
        def value(args):
            states, last = augru_scan(
                args["params"], args["x"], args["att"], MASK, variant, args["h0"]
            )
            return (states * weight[0]).sum() + (last * weight[1]).sum()

        grads = jax.jit(jax.grad(value))(args)
        for name in args:
            if name == "att" and variant == "gru":
                continue
            step = jax.tree.map(lambda p: rng.normal(size=p.shape), args[name])
            ends = [
                value({**args, name: jax.tree.map(
                    lambda p, d: p + s * 1e-5 * d, args[name], step)})  # noqa: B023
                for s in (1, -1)
            ]  # fmt: skip
            expected = (ends[0] - ends[1]) / 2e-5
            found = sum(
                (g * d).sum()
                for g, d in zip(jax.tree.leaves(grads[name]), jax.tree.leaves(step))
            )
            assert float(found) == pytest.approx(float(expected), rel=1e-6), name


@pytest.mark.parametrize(
    "variant, options",
    [
        ("augru", {"unroll": 1}),
        ("augru", {"unroll": T}),
        ("augru", {"chunk": 3}),
        ("augru", {"chunk": 99}),
        ("aigru", {"chunk": 4}),
        ("augru_released", {"chunk": 3}),
    ],
)
def test_unrolling_and_chunks_change_nothing(variant, options):
    with jax.enable_x64(True):
        params, x, att = drawn(4)

        def value(params, x, att, options):
            states, last = augru_scan(params, x, att, MASK, variant, **options)
            return jnp.sin(states).sum() + (last**2).sum(), states

        both = [
            jax.jit(jax.value_and_grad(
                functools.partial(value, options=o), (0, 1, 2), has_aux=True
            ))(params, x, att)
            for o in ({"unroll": 4}, options)
        ]  # fmt: skip
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), *both
        )


def test_chunks_keep_fewer_states():
    params, x, att = single(drawn(0))
    wide = {"x": jnp.repeat(x, 16, 1), "att": jnp.repeat(att, 16, 1)}
    mask = jnp.repeat(MASK, 16, 1)

    def kept(chunk):
        def value(p):
            states, last = augru_scan(p, **wide, mask=mask, chunk=chunk)
            return (last**2).sum()

        _, pullback = jax.vjp(value, params)
        return sum(a.size for a in jax.tree.leaves(pullback))

    assert kept(16) < kept(0) / 2


def test_candidates_share_their_history():
    with jax.enable_x64(True):
        params, x, _ = drawn(5)
        n = 3
        att = jnp.asarray(np.random.default_rng(0).uniform(size=(B, n, T)))
        att = att * MASK[:, None]

        def together(params, x, att, variant):
            states, last = augru_scan(params, x[:, None], att, MASK[:, None], variant)
            return (last**3).sum(), last

        def apart(params, x, att, variant):
            last = [augru_scan(params, x, att[:, i], MASK, variant)[1]
                    for i in range(n)]  # fmt: skip
            return (jnp.stack(last, 1) ** 3).sum(), jnp.stack(last, 1)

        for variant in ("augru", "aigru"):
            both = [
                jax.jit(jax.value_and_grad(
                    functools.partial(f, variant=variant), (0, 1, 2), has_aux=True
                ))(params, x, att)
                for f in (together, apart)
            ]  # fmt: skip
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), *both
            )


def test_padding_changes_nothing():
    with jax.enable_x64(True):
        params, x, att = drawn(6)
        check_padding(params, x, att)


def check_padding(params, x, att):
    longer = [
        jnp.pad(a, [(0, 0), (0, 13)] + [(0, 0)] * (a.ndim - 2), constant_values=7)
        for a in (x, att)
    ]
    mask = jnp.pad(MASK, [(0, 0), (0, 13)])

    def value(params, x, att, mask):
        states, last = augru_scan(params, x, att, mask)
        return (last**2).sum() + states.sum(), (states, last)

    run = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))
    short, long = run(params, x, att, MASK), run(params, *longer, mask)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
    close(short[0][1][0], long[0][1][0][:, :T])
    assert not np.asarray(long[0][1][0])[~mask].any()
    close(short[0][1][1], long[0][1][1])
    jax.tree.map(close, short[1][0], long[1][0])
    for a, b in zip(short[1][1:], long[1][1:]):
        close(a, b[:, :T])
        assert not np.asarray(b)[~mask].any()


def test_time_order_matters():
    params, x, att = single(drawn(7))
    full = jnp.ones((B, T), bool)
    scan = jax.jit(augru_scan)
    ahead = scan(params, x, att, full)[1]
    back = scan(params, x[:, ::-1], att[:, ::-1], full)[1]
    assert np.abs(ahead - back)[0].max() > 1e-2


def test_initial_kernels_are_glorot_over_inputs_and_state():
    params = gru.init(jax.random.key(0), 60, 40, update_bias=0.5)
    kernel = np.concatenate([params["input"]["kernel"], params["hidden"]["kernel"]])
    for columns, fan in ((slice(0, 80), 180), (slice(80, 120), 140)):
        bound = np.sqrt(6 / fan)
        assert 0.98 * bound < np.abs(kernel[:, columns]).max() <= bound
    bias = np.asarray(params["input"]["bias"]).reshape(3, 40)
    np.testing.assert_array_equal(bias, np.repeat([[1.0], [0.5], [0.0]], 40, 1))


def test_bfloat16_products_are_close_and_states_float32():
    params, x, att = single(drawn(8))
    scan = jax.jit(augru_scan, static_argnames="dtype")
    exact = scan(params, x, att, MASK)[0]
    found = scan(params, x, att, MASK, dtype=jnp.bfloat16)[0]
    assert found.dtype == np.float32
    error = np.abs(found - exact).max()
    assert 0 < error < 2e-2


def test_no_collective_inside_the_scan():
    """Forward and backward, with the batch over 8 devices."""
    mesh = meshes.make_mesh({"data": 8})
    params, x, att = single(drawn(0))

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
        ({"x": jnp.zeros((B, T, I + 1))}, "channels"),
        ({"mask": MASK[:, :-1]}, "same number of steps"),
        ({"unroll": 0}, "unroll"),
        ({"chunk": -1}, "chunk"),
    ],
)
def test_refusals(change, message):
    params, x, att = single(drawn(0))
    args = {"params": params, "x": x, "att": att, "mask": MASK, **change}
    with pytest.raises(ValueError, match=message):
        augru_scan(**args)
    with pytest.raises(ValueError, match="sizes >= 1"):
        gru.init(jax.random.key(0), 0, 3)


def test_nan_attention_is_found_by_checkify():
    params, x, att = single(drawn(0))
    run = jax.jit(checkify.checkify(augru_scan, errors=checkify.float_checks))
    error, _ = run(params, x, att, MASK)
    error.throw()
    error, _ = run(params, x, att * np.nan, MASK)
    with pytest.raises(checkify.JaxRuntimeError, match="nan"):
        error.throw()
