"""DIEN: recorded numbers, identities of the digest, meshes, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxpapers import mesh as meshes
from jaxpapers import run
from jaxpapers import train as trainer
from jaxpapers.papers import dien
from tests.contract import CLICK, Contract, write_clicks

CONTRACT = Contract(
    # Without the auxiliary loss, a mean over steps that micro-batches weigh otherwise.
    small={
        **CLICK, "net.state": 6, "net.aux_hidden": (6,), "method.aux_weight": 0.0,
    },
    data=write_clicks,
    refused={
        "net.variant": ("lstm", "variant"),
        "net.attention": ("dot", "attention"),
        "method.aux_reduce": ("sum", "aux_reduce"),
        "train.accumulate": (0, "train.accumulate"),
    },
)  # fmt: skip

B, T, ITEMS, CATES = 8, 6, 30, 7
SMALL = {
    "net.item_vocab": ITEMS, "net.cate_vocab": CATES,
    "net.item_dim": 4, "net.cate_dim": 2, "net.state": 6,
    "net.unit": (5,), "net.aux_hidden": (5,), "net.hidden": (6, 4),
    "net.std": 0.5, "data.history": T, "data.batch": B,
}  # fmt: skip


def config(**fields):
    c = run.load_config("dien:smoke").copy_and_resolve_references().unlock()
    c.update_from_flattened_dict(
        {**SMALL, **{k.replace("__", "."): v for k, v in fields.items()}}
    )
    return c.lock()


def batch(seed=0, slots=T, negatives=True):
    rng = np.random.default_rng(seed)
    length = rng.integers(0, slots + 1, B)
    length[:3] = 0, slots, 1
    here = np.arange(slots) < length[:, None]
    x = {
        "user": rng.integers(2, 9, B),
        "item": rng.integers(2, ITEMS, B),
        "cate": rng.integers(2, CATES, B),
        "hist_item": rng.integers(2, ITEMS, (B, slots)) * here,
        "hist_cate": rng.integers(2, CATES, (B, slots)) * here,
        "length": length,
        "label": rng.integers(0, 2, B),
    }
    if negatives:
        # Another item than the history's: the collisions are tested apart.
        x["neg_hist_item"] = (2 + (x["hist_item"] - 1) % (ITEMS - 2)) * here
        x["neg_hist_cate"] = rng.integers(2, CATES, (B, slots)) * here
    return {k: jnp.asarray(v, jnp.int32) for k, v in x.items()}


@functools.cache
def drawn(**fields):
    """Parameters with nothing left at zero."""
    net = config(**fields).net
    params = dien.init(jax.random.key(0), net)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    params = jax.tree.unflatten(treedef, noisy)
    tables = params["tables"]
    params["tables"] = {n: t.at[0].set(0.0) for n, t in tables.items()}
    return net, params


@functools.cache
def scorer(net_fields=()):
    net, _ = drawn(**dict(net_fields))
    return jax.jit(functools.partial(dien.forward, net=net, train=False))


def logits(params, x, **fields):
    return scorer(tuple(fields.items()))(params, dien.statistics(params), x)[0]


# Recorded numbers


def read(case, tolerance):
    folder, _, entry = case
    with np.load(folder / entry["file"]) as file:
        data = {name: jnp.asarray(file[name]) for name in file.files}
    data["mask"] = jnp.arange(data["lengths"].max())[None] < data["lengths"][:, None]
    return data, entry[tolerance]


def layers(data, names):
    return {
        f"layer_{i}": {"kernel": data[w].T, "bias": data[b]}
        for i, (w, b) in enumerate(names)
    }


def cell(data, keep):
    """torch's rows r, z, n; ``keep``: z is 1 - our u."""
    width = len(data["W_hh"]) // 3
    sign = jnp.repeat(jnp.array([1, -1 if keep else 1, 1]), width)
    return {
        name: {"kernel": (data[w] * sign[:, None]).T, "bias": data[b] * sign}
        for name, w, b in (("input", "W_ih", "b_ih"), ("hidden", "W_hh", "b_hh"))
    }


@pytest.mark.parity("ctr", only=lambda entry: "aux_loss" in entry["arrays"])
@pytest.mark.parametrize("double", [True, False])
def test_auxiliary_loss(case, double):
    with jax.enable_x64(double):
        data, tol = read(case, "tolerance_float64" if double else "tolerance_float32")
        states, _ = jax.jit(dien.gru_scan)(cell(data, True), data["keys"], data["mask"])
        params = layers(data, (("A1", "a1"), ("A2", "a2"), ("A3", "a3")))
        value, _ = jax.jit(dien.aux_loss)(
            params, states, data["keys"], data["neg_keys"], data["mask"]
        )
    np.testing.assert_allclose(states, data["interests"], rtol=0, atol=tol)
    # Recorded is the mean over both kinds, ours their sum's.
    np.testing.assert_allclose(float(value) / 2, data["aux_loss"], rtol=0, atol=tol)


@pytest.mark.parity(
    "ctr", only=lambda entry: {"interests", "query", "W_ih"} <= set(entry["arrays"])
)
@pytest.mark.parametrize("double", [True, False])
def test_evolving_layer(case, double):
    variant = case[1].split("_")[2]
    with jax.enable_x64(double):
        data, tol = read(case, "tolerance_float64" if double else "tolerance_float32")
        unit = layers(data, (("W1", "b1"), ("W2", "b2"), ("W3", "b3")))
        params = {
            "attention": {"unit": unit},
            "cell": cell(data, variant in ("gru", "aigru")),
        }
        run = jax.jit(functools.partial(dien.evolve, variant=variant))
        found = run(params, data["interests"], data["query"], data["mask"])
    np.testing.assert_allclose(found, data["output"], rtol=0, atol=tol)


# Auxiliary loss


def aux_inputs(seed=0):
    rng = np.random.default_rng(seed)
    states, pos, neg = (jnp.asarray(rng.normal(size=(4, T, 6))) for _ in range(3))
    length = jnp.array([T, 3, 1, 0])
    return states, pos, neg, jnp.arange(T)[None] < length[:, None]


def test_reductions_and_the_inner_product():
    """Against a loop over samples and steps."""
    with jax.enable_x64(True):
        states, pos, neg, mask = aux_inputs()
        found = {r: float(dien.aux_loss({}, states, pos, neg, mask, r)[0])
                 for r in dien.REDUCE}  # fmt: skip
        accuracy = dien.aux_loss({}, states, pos, neg, mask)[1]["aux_accuracy"]
    total = above = 0.0
    for i, length in enumerate((T, 3, 1, 0)):
        for t in range(length - 1):
            p, n = (
                1 / (1 + np.exp(-np.dot(states[i, t], e[i, t + 1]))) for e in (pos, neg)
            )
            total -= np.log(p) + np.log(1 - p + p - n)
            above += p > n
    by = {"per_sample": 4, "padded_mean": 4 * (T - 1), "valid_mean": T - 1 + 2}
    assert found == pytest.approx({r: total / n for r, n in by.items()}, rel=1e-12)
    assert float(accuracy) == pytest.approx(above / (T + 1))


def test_weights_of_rows_are_copies():
    states, pos, neg, mask = (x[:3] for x in aux_inputs())
    _, params = drawn()
    weight = jnp.array([2.0, 1.0, 0.0])
    twice = [jnp.concatenate([x[:1], x[:2]]) for x in (states, pos, neg, mask)]
    for reduce in dien.REDUCE:
        run = jax.jit(functools.partial(dien.aux_loss, params["aux"], reduce=reduce))
        value, found = run(states, pos, neg, mask, weight=weight)
        expected = run(*twice)
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        np.testing.assert_allclose(found["aux_accuracy"], expected[1]["aux_accuracy"])


@pytest.mark.parametrize("steps", [1, 4])
def test_one_behaviour_gives_no_auxiliary_loss(steps):
    _, params = drawn()
    mask = jnp.arange(steps)[None] < jnp.ones((2, 1), int)
    x = jax.random.normal(jax.random.key(0), (3, 2, steps, 6))

    def value(params, x):
        return dien.aux_loss(params, *x, mask)[0]

    for given in (params["aux"], {}):
        found, grads = jax.jit(jax.value_and_grad(value, (0, 1)))(given, x)
        assert float(found) == 0.0
        assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_padded_negatives_have_no_gradient():
    states, pos, neg, mask = aux_inputs()
    _, params = drawn()

    def value(neg, states):
        return dien.aux_loss(params["aux"], states, pos, neg, mask)[0]

    grad, to_states = jax.jit(jax.grad(value, (0, 1)))(neg, states)
    used = np.asarray(mask).copy()
    used[:, 0] = False  # Nothing comes before the first.
    assert not np.asarray(grad)[~used].any() and np.asarray(grad)[used].all()
    assert not np.asarray(to_states)[:, -1].any()
    # Whatever padding holds.
    wild = jnp.where(mask[..., None], neg, jnp.inf)
    assert float(value(wild, states)) == pytest.approx(float(value(neg, states)))


def test_sampled_negatives_avoid_their_item_and_follow_the_pool():
    pool = jnp.array([9, 5, 7, 7, 7, 6, 9, 9])
    mask = jnp.array([0, 1, 1, 1, 1, 1, 0, 0], bool)
    avoid = jnp.full((4000,), 5)
    found = np.asarray(
        pool[dien.sample_negatives(jax.random.key(0), pool, avoid, mask)]
    )
    assert set(found) == {6, 7}
    # 7 has 3 of the 4 other places; hitting 5 twice (1 in 25) takes the place after it.
    expected = (1 + 1 / 5) * 3 / 5 + 1 / 25
    assert abs((found == 7).mean() - expected) < 4 * 0.5 / np.sqrt(4000)
    for key in jax.random.split(jax.random.key(1), 5):
        two = jnp.array([2, 3])
        found = two[dien.sample_negatives(key, two, jnp.array([2, 3, 3]))]
        assert found.tolist() == [3, 2, 2]
    assert dien.sample_negatives(key, pool, avoid[:2], mask & False).tolist() == [7, 7]


def test_loss_is_its_parts_and_counts_collisions(key):
    net, params = drawn()
    state, x = dien.statistics(params), batch()
    value = jax.jit(functools.partial(dien.loss, net=net, aux_weight=0.5))
    total, (metrics, _) = value(params, state, x, key)
    expected = metrics["target"] + 0.5 * metrics["aux"]
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    assert float(metrics["aux_collisions"]) == 0.0 and float(metrics["aux"]) > 0
    x["neg_hist_item"] = x["hist_item"]
    same = value(params, state, x, key)[1][0]
    assert float(same["aux_collisions"]) == pytest.approx(1.0)
    value = jax.jit(functools.partial(dien.loss, net=net, aux_weight=0.0))
    plain = value(params, state, batch(), key)
    assert float(plain[0]) == pytest.approx(float(metrics["target"]), rel=1e-5)
    assert "aux" not in plain[1][0]


def test_negatives_are_drawn_from_the_batch_by_the_key():
    net, params = drawn()
    x = batch(negatives=False)
    value = jax.jit(
        functools.partial(dien.loss, params, dien.statistics(params), net=net)
    )
    first, again, other = (value(x, jax.random.key(k))[1][0] for k in (0, 0, 1))
    assert float(first["aux"]) == float(again["aux"]) != float(other["aux"])
    assert float(first["aux_collisions"]) < 0.1
    # Rows of weight 0 are not drawn from, and count nowhere.
    weight = jnp.ones(B).at[1].set(0.0)
    found = value({**x, "weight": weight}, jax.random.key(0))
    hidden = dict(x)
    hidden["hist_item"] = x["hist_item"].at[1].set(ITEMS - 1)
    hidden["label"] = x["label"].at[1].set(1 - x["label"][1])
    np.testing.assert_allclose(
        found[0], value({**hidden, "weight": weight}, jax.random.key(0))[0], rtol=1e-6
    )


# The model


def test_attention_is_a_softmax_over_the_history():
    rng = np.random.default_rng(0)
    states, target = rng.normal(size=(3, T, 6)), rng.normal(size=(3, 4))
    kernel, length = rng.normal(size=(6, 4)), np.array([T, 2, 0])
    mask = np.arange(T)[None] < length[:, None]
    with jax.enable_x64(True):
        found = dien.bilinear_attention(
            *(jnp.asarray(a) for a in (kernel, states, target, mask))
        )
    scores = np.exp(np.einsum("bth,ha,ba->bt", states, kernel, target)) * mask
    expected = scores / np.maximum(scores.sum(1, keepdims=True), 1e-300)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert np.asarray(found).sum(1) == pytest.approx([1, 1, 0])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "fields",
    [
        {"net__variant": "augru"},
        {"net__variant": "gru", "net__attention": "din", "net__user_dim": 3,
         "net__pooled": "sum", "net__product": True},
        {"net__variant": "aigru", "net__pooled": "none"},
    ],
    ids=lambda f: f["net__variant"],
)  # fmt: skip
def test_candidates_score_as_in_forwards_of_their_own(fields):
    net, params = drawn(**fields)
    x, n = batch(negatives=False), 3
    rng = np.random.default_rng(1)
    item = jnp.asarray(rng.integers(2, ITEMS, (B, n)), jnp.int32)
    cate = jnp.asarray(rng.integers(2, CATES, (B, n)), jnp.int32)
    state = dien.statistics(params)
    many = jax.jit(functools.partial(dien.sampler, net=net))(
        params, jax.random.key(0), {**x, "item": item, "cate": cate}, state
    )
    assert many.shape == (B, n)
    for i in range(n):
        one = logits(params, {**x, "item": item[:, i], "cate": cate[:, i]}, **fields)
        np.testing.assert_allclose(many[:, i], one, rtol=1e-10, atol=1e-12)
    assert np.abs(np.diff(many)).min() > 1e-6


def test_padding_changes_nothing_and_order_matters():
    _, params = drawn()
    x = batch(negatives=False)
    expected = logits(params, x)
    longer = dict(x)
    for name in ("hist_item", "hist_cate"):
        # Whatever is beyond the end.
        longer[name] = jnp.pad(x[name], ((0, 0), (0, 13)), constant_values=3)
    np.testing.assert_allclose(logits(params, longer), expected, rtol=1e-5, atol=1e-6)
    back = dict(x)
    for name in ("hist_item", "hist_cate"):
        back[name] = x[name].at[1].set(x[name][1, ::-1])
    changed = np.abs(logits(params, back) - expected)
    assert changed[1] > 1e-3 and not np.delete(changed, 1).any()


def test_empty_histories_have_finite_gradients(key):
    net, params = drawn()
    x = batch()
    x |= {"length": jnp.zeros(B, jnp.int32)}
    value = functools.partial(dien.loss, net=net)
    grads, (metrics, _) = jax.jit(jax.grad(value, has_aux=True))(
        params, dien.statistics(params), x, key
    )
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert float(metrics["aux"]) == 0.0
    assert not np.asarray(grads["tables"]["item"][0]).any()


def steps(method, mesh, negatives, count=3):
    compiled = trainer.compile(method, mesh, batch(0, negatives=negatives))
    state, losses = compiled.init(jax.random.key(0)), []
    for i in range(count):
        placed = meshes.put_batch(batch(i, negatives=negatives), mesh, B)
        with jax.set_mesh(mesh):
            state, metrics = compiled.step(state, placed)
        losses.append({k: float(v) for k, v in metrics.items()})
    return jax.device_get(state), losses


def test_meshes_agree():
    """Tables over ``model``, batch and the pool of drawn negatives over ``data``."""
    method = dien.make(config(net__attention="din", net__user_dim=3))
    one = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    many = meshes.make_mesh({"data": 4, "model": 2})
    (expected, losses), (found, others) = (steps(method, m, False) for m in (one, many))
    for a, b in zip(losses, others):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for a, b in zip(*(jax.tree.leaves(s.params) for s in (expected, found))):
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(a)


def test_sparse_steps_read_all_that_the_loss_does():
    one = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    sparse, dense = (
        steps(dien.make(config(optim__tables=name)), one, True, 1)[1][0]
        for name in ("lazy_adam", "dense")
    )
    names = ("loss", "aux", "grad_norm")
    assert [sparse[n] for n in names] == pytest.approx([dense[n] for n in names])


def test_negatives_move_their_rows():
    x = batch()
    x["neg_hist_item"] = jnp.where(x["neg_hist_item"] > 0, ITEMS - 1, 0)
    hist = jnp.where(x["hist_item"] == ITEMS - 1, 2, x["hist_item"])
    x |= {"hist_item": hist, "item": jnp.minimum(x["item"], ITEMS - 2)}
    method = dien.make(config())
    state = jax.jit(method.init)(jax.random.key(0), x)
    new, metrics = jax.jit(method.update)(state, x)
    moved = np.abs(new.params["tables"]["item"] - state.params["tables"]["item"]).max(1)
    assert moved[ITEMS - 1] > 1e-4 and float(metrics["aux"]) > 0
    used = np.unique(np.concatenate([np.ravel(hist), np.ravel(x["item"]), [ITEMS - 1]]))
    assert not np.delete(moved, used[used > 0]).any()


# What it refuses


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("net.variant", "lstm", "'augru'"),
        ("net.attention", "dot", "bilinear"),
        ("net.aux", "none", "concat"),
        ("net.pooled", "max", "'mean'"),
        ("net.dtype", "float64", "bfloat16"),
        ("net.activation", "tanh", "dice"),
        ("net.item_vocab", 1, "item_vocab"),
        ("net.state", 0, "net.state"),
        ("optim.tables", "sgd", "lazy_adam"),
        ("optim.lr", 0.0, "optim"),
        ("method.aux_weight", -1.0, "aux_weight"),
        ("method.aux_reduce", "mean", "valid_mean"),
        ("train.accumulate", 0, "accumulate"),
    ],
)
def test_make_refuses(field, value, message):
    with pytest.raises(ValueError, match=message):
        dien.make(config(**{field.replace(".", "__"): value}))


def test_inner_product_needs_equal_widths():
    with pytest.raises(ValueError, match="aux=inner"):
        dien.make(config(net__aux="inner", net__state=5))
    states, pos, neg, mask = aux_inputs()
    with pytest.raises(ValueError, match="as wide as"):
        dien.aux_loss({}, states[..., :5], pos, neg, mask)
    with pytest.raises(ValueError, match="per_sample"):
        dien.aux_loss({}, states, pos, neg, mask, "sum")
    net, params = drawn(net__aux="inner")
    assert "aux" not in params
    value = jax.jit(functools.partial(dien.loss, net=net))
    _, (metrics, _) = value(params, dien.statistics(params), batch(), jax.random.key(0))
    assert float(metrics["aux"]) > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hist_item": jnp.zeros((B, T, 2), jnp.int32)}, "hist_item"),
        ({"hist_item": jnp.zeros((B, 0), jnp.int32)}, "hist_item"),
        ({"hist_cate": jnp.zeros((B, T + 1), jnp.int32)}, "hist_cate"),
        ({"length": jnp.full(B, T + 1)}, "length"),
        ({"label": jnp.full(B, 2)}, "label"),
        ({"item": jnp.full(B, ITEMS)}, "item"),
    ],
)
def test_bad_batches(change, message):
    with pytest.raises(ValueError, match=message):
        dien.check_batch({**batch(), **change}, net=config().net)


def test_one_step_histories_train(key):
    """T < 2 with the auxiliary loss on: allowed, and it is 0."""
    net, params = drawn()
    x = batch(slots=1)
    value = jax.jit(functools.partial(dien.loss, net=net))
    _, (metrics, _) = value(params, dien.statistics(params), x, key)
    assert float(metrics["aux"]) == 0.0


def test_nan_attention_is_found_by_checkify():
    net, params = drawn()
    forward = functools.partial(dien.forward, net=net, train=False)
    run = jax.jit(checkify.checkify(forward, errors=checkify.float_checks))
    args = dien.statistics(params), batch(negatives=False)
    run(params, *args)[0].throw()
    kernel = params["evolve"]["attention"]["kernel"] * np.nan
    params = {**params, "evolve": {**params["evolve"], "attention": {"kernel": kernel}}}
    with pytest.raises(checkify.JaxRuntimeError, match="nan"):
        run(params, *args)[0].throw()
