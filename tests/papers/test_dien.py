"""DIEN: recorded numbers, its auxiliary loss, its layers, steps, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import train as trainer
from jaxpapers.papers import dien
from tests import clicks
from tests.clicks import (
    ITEMS,
    SIZES,
    B,
    T,
    batch,
    candidate,
    device,
    overlong,
    pad_histories,
)
from tests.contract import CLICK, Contract, write_clicks
from tests.programs import KEY, together

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

SMALL = {**SIZES, "state": 6, "aux_hidden": (5,), "user_dim": 0}
NET = dien.Net(**SMALL)
matrix = pytest.mark.matrix


config = functools.partial(clicks.config, "dien:smoke", SMALL)
drawn = functools.partial(clicks.drawn, dien)
gradient = functools.partial(clicks.gradient, dien)


@functools.cache
def loss_of(net):
    """(params, statistics, batch, key) -> loss."""
    return jax.jit(functools.partial(dien.loss, net=net))


# Recorded numbers


def read(case, dtype):
    data = {k: v.astype(dtype) if v.dtype == float else v
            for k, v in case.arrays.items()}  # fmt: skip
    data["mask"] = np.arange(data["lengths"].max())[None] < data["lengths"][:, None]
    return data


def layers(data, names):
    return {
        f"layer_{i}": {"kernel": data[w].T, "bias": data[b]}
        for i, (w, b) in enumerate(names)
    }


def cell(data, keep):
    """torch's rows r, z, n; ``keep``: z is 1 - our u."""
    width = len(data["W_hh"]) // 3
    sign = np.repeat(np.array([1, -1 if keep else 1, 1]), width).astype(
        data["W_hh"].dtype
    )
    return {
        name: {"kernel": (data[w] * sign[:, None]).T, "bias": data[b] * sign}
        for name, w, b in (("input", "W_ih", "b_ih"), ("hidden", "W_hh", "b_hh"))
    }


DTYPES = ["float64", pytest.param("float32", marks=matrix)]


@pytest.mark.parity("ctr", only=lambda entry: "aux_loss" in entry["arrays"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_auxiliary_loss(case, dtype):
    data, tol = read(case, dtype), case.tolerance(dtype)
    params = layers(data, (("A1", "a1"), ("A2", "a2"), ("A3", "a3")))

    def check(gru, params, keys, neg, mask):
        states, _ = dien.gru_scan(gru, keys, mask)
        return states, dien.aux_loss(params, states, keys, neg, mask)[0]

    given = (data[n] for n in ("keys", "neg_keys", "mask"))
    with jax.enable_x64(dtype == "float64"):
        states, value = together(check, cell(data, True), params, *given)
    np.testing.assert_allclose(states, data["interests"], rtol=0, atol=tol)
    # Recorded is the mean over both kinds, ours their sum's.
    np.testing.assert_allclose(value / 2, data["aux_loss"], rtol=0, atol=tol)


@pytest.mark.parity(
    "ctr", only=lambda entry: {"interests", "query", "W_ih"} <= set(entry["arrays"])
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_evolving_layer(case, dtype):
    variant = case.name.split("_")[2]
    data = read(case, dtype)
    params = {
        "attention": {"unit": layers(data, (("W1", "b1"), ("W2", "b2"), ("W3", "b3")))},
        "cell": cell(data, variant in ("gru", "aigru")),
    }
    with jax.enable_x64(dtype == "float64"):
        found = together(
            functools.partial(dien.evolve, variant=variant),
            params, data["interests"], data["query"], data["mask"],
        )  # fmt: skip
    np.testing.assert_allclose(
        found, data["output"], rtol=0, atol=case.tolerance(dtype)
    )


# Auxiliary loss


LENGTHS = (T, 3, 1, 0)


def aux_inputs():
    rng = np.random.default_rng(0)
    states, pos, neg = rng.normal(size=(3, len(LENGTHS), T, 6))
    return states, pos, neg, np.arange(T)[None] < np.array(LENGTHS)[:, None]


@pytest.mark.matrix
@pytest.mark.usefixtures("float64")
def test_reductions_and_the_inner_product():
    """Against a loop over samples and steps; weights as rows that are repeated."""
    states, pos, neg, mask = aux_inputs()
    weight = np.array([2.0, 1.0, 1.0, 0.0])
    repeated = [x[np.array([0, 0, 1, 2])] for x in (states, pos, neg, mask)]
    aux = drawn(NET)[0]["aux"]

    def check(aux, given, repeated, weight):
        return {
            r: (
                dien.aux_loss({}, *given, r),
                dien.aux_loss(aux, *given, r, weight=weight),
                dien.aux_loss(aux, *repeated, r),
            )
            for r in dien.REDUCE
        }

    found = together(check, aux, (states, pos, neg, mask), repeated, weight)
    total = above = 0.0
    for i, length in enumerate(LENGTHS):
        for t in range(length - 1):
            p, n = (
                1 / (1 + np.exp(-np.dot(states[i, t], e[i, t + 1]))) for e in (pos, neg)
            )
            total -= np.log(p) + np.log(1 - n)
            above += p > n
    by = {"per_sample": 4, "padded_mean": 4 * (T - 1), "valid_mean": T - 1 + 2}
    for reduce, (plain, weighted, expected) in found.items():
        assert plain[0] == pytest.approx(total / by[reduce], rel=1e-12)
        assert plain[1]["aux_accuracy"] == pytest.approx(above / (T + 1))
        np.testing.assert_allclose(weighted[0], expected[0], rtol=1e-12)
        np.testing.assert_allclose(
            *(x[1]["aux_accuracy"] for x in (weighted, expected))
        )


@pytest.mark.usefixtures("float64")
def test_padding_has_no_gradient_and_one_behaviour_no_loss():
    states, pos, neg, mask = aux_inputs()
    aux = drawn(NET)[0]["aux"]
    wild = np.where(mask[..., None], neg, np.inf)
    alone = np.arange(T)[None] < np.ones((len(LENGTHS), 1), int)

    def check(aux, states, pos, neg, mask, wild, alone):
        def value(neg, states, mask=mask, params=aux):
            return dien.aux_loss(params, states, pos, neg, mask)[0]

        def short(params):
            """One step of each, and one slot of each."""
            one = [x[:, :1] for x in (states, pos, neg, mask)]
            cut = dien.aux_loss(params, *one)[0]
            return cut, jax.value_and_grad(value, (0, 1))(neg, states, alone, params)

        grads = jax.grad(value, (0, 1))(neg, states)
        return grads, value(neg, states), value(wild, states), short(aux), short({})

    (grad, to_states), plain, with_wild, *short = together(
        check, aux, states, pos, neg, mask, wild, alone
    )
    used = mask.copy()
    used[:, 0] = False  # Nothing comes before the first.
    assert not grad[~used].any() and grad[used].all(1).all()
    assert not to_states[:, -1].any()
    assert with_wild == pytest.approx(plain, rel=1e-12)
    for leaf in jax.tree.leaves(short):
        assert not leaf.any()


def test_sampled_negatives_avoid_their_item_and_follow_the_pool():
    pool = np.array([9, 5, 7, 7, 7, 6, 9, 9])
    mask = np.array([0, 1, 1, 1, 1, 1, 0, 0], bool)
    avoid = np.full(4000, 5)

    def check(key, pool, avoid, mask):
        small = functools.partial(dien.sample_negatives, pool=jnp.array([2, 3]))
        keys = jax.random.split(key, 5)
        return (
            dien.sample_negatives(key, pool, avoid, mask),
            jax.vmap(lambda k: small(k, avoid=jnp.array([2, 3, 3])))(keys),
            dien.sample_negatives(key, pool, avoid[:2], mask & False),
        )

    many, few, none = together(check, jax.random.key(0), pool, avoid, mask)
    found = pool[many]
    assert set(found) == {6, 7}
    # 7 has 3 of the 4 other places; hitting 5 twice (1 in 25) takes the place after it.
    expected = (1 + 1 / 5) * 3 / 5 + 1 / 25
    assert abs((found == 7).mean() - expected) < 4 * 0.5 / np.sqrt(4000)
    assert (few == np.array([1, 0, 0])).all()
    assert none.tolist() == [7, 7]


def test_the_loss_is_its_parts_and_counts_collisions(key):
    params, state = drawn(NET)
    same = batch(negatives=True)
    same["neg_hist_item"] = same["hist_item"]
    value = gradient(NET, aux_weight=0.5)
    x = batch(negatives=True)
    (total, (metrics, _)), _ = value(params, state, x, key)
    expected = metrics["target"] + 0.5 * metrics["aux"]
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    assert float(metrics["aux_collisions"]) == 0 and float(metrics["aux"]) > 0
    (_, (metrics, _)), _ = value(params, state, same, key)
    assert float(metrics["aux_collisions"]) == pytest.approx(1)
    empty = {**x, "length": np.zeros(B, np.int32)}
    (_, (found, _)), grads = value(params, state, empty, key)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert float(found["aux"]) == 0
    assert not np.asarray(grads["tables"]["item"][0]).any()
    plain = functools.partial(dien.loss, net=NET, aux_weight=0.0)
    total, (found, _) = together(plain, params, state, batch(), key)
    assert float(total) == pytest.approx(float(metrics["target"]), rel=1e-5)
    assert "aux" not in found


def test_negatives_are_drawn_from_the_batch_by_the_key():
    params, state = drawn(NET)
    weight = np.ones(B, np.float32)
    weight[1] = 0.0
    x = {**batch(), "weight": weight}
    # A row of weight 0 is not drawn from, and counts nowhere.
    hidden = {k: v.copy() for k, v in x.items()}
    hidden["hist_item"][1], hidden["label"][1] = ITEMS - 1, 1 - x["label"][1]

    value = loss_of(NET)
    first, again, other = (
        value(params, state, b, jax.random.key(k))
        for b, k in ((x, 0), (hidden, 0), (x, 1))
    )
    np.testing.assert_allclose(first[0], again[0], rtol=1e-6)
    assert first[1][0]["aux"] != other[1][0]["aux"]
    assert first[1][0]["aux_collisions"] < 0.2


@pytest.mark.matrix
def test_losses_agree_on_a_mesh():
    """Tables over ``model``, the batch and the pool of drawn negatives over ``data``."""
    params, state = drawn(NET)
    x = {**batch(), "weight": np.ones(B, np.float32)}
    expected, _ = loss_of(NET)(params, state, x, jax.random.key(0))
    mesh = clicks.grid((4, 2))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    tables = jax.device_put(params["tables"], split)
    with jax.set_mesh(mesh):
        placed = meshes.put_batch(x, mesh, B)
        value = jax.jit(functools.partial(dien.loss, net=NET))
        found, _ = value({**params, "tables": tables}, state, placed, jax.random.key(0))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


# The model


def test_attention_is_a_softmax_over_the_history():
    rng = np.random.default_rng(0)
    states, target = rng.normal(size=(3, T, 6)), rng.normal(size=(3, 4))
    kernel, length = rng.normal(size=(6, 4)), np.array([T, 2, 0])
    mask = np.arange(T)[None] < length[:, None]
    with jax.enable_x64(True):
        found = together(dien.bilinear_attention, kernel, states, target, mask)
    scores = np.exp(np.einsum("bth,ha,ba->bt", states, kernel, target)) * mask
    expected = scores / np.maximum(scores.sum(1, keepdims=True), 1e-300)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert found.sum(1) == pytest.approx([1, 1, 0])


@pytest.mark.matrix
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "fields",
    [
        {"variant": "augru"},
        pytest.param(
            {"variant": "gru", "attention": "din", "user_dim": 3, "pooled": "mean"},
            marks=matrix,
        ),
        pytest.param(
            {"variant": "aigru", "pooled": "none", "product": False}, marks=matrix
        ),
    ],
    ids=lambda f: f["variant"],
)
def test_scores_of_candidates_are_those_of_rows(fields):
    """And padding changes nothing, but the order does."""
    net = dataclasses.replace(NET, **fields)
    x, plain = batch(candidates=2), batch()
    back = {k: v.copy() for k, v in plain.items()}
    for name in ("hist_item", "hist_cate"):
        back[name][1] = plain[name][1, ::-1]
    rows = (candidate(x, 0), candidate(x, 1), plain, back, overlong(plain))
    rows = {k: np.concatenate([r[k] for r in rows]) for k in plain}

    def check(params, state, *batches):
        return [dien.predict(params, state, b, net=net) for b in batches]

    many, single, padded = together(
        check, *drawn(net), x, rows, pad_histories(plain, 4)
    )
    zero, one, expected, turned, longer = single.reshape(5, B)
    np.testing.assert_allclose(longer, expected, rtol=1e-10, atol=1e-12)
    assert many.shape == (B, 2) and np.ptp(many, 1).max() > 1e-6
    np.testing.assert_allclose(many, np.stack([zero, one], 1), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(padded, expected, rtol=1e-10, atol=1e-12)
    changed = np.abs(turned - expected)
    assert changed[1] > 1e-5 and np.delete(changed, 1).max() < 1e-12


@pytest.mark.matrix
def test_nan_attention_is_found_by_checkify():
    from jax.experimental import checkify

    params, state = drawn(NET)
    forward = functools.partial(dien.forward, net=NET, train=False)
    run = jax.jit(checkify.checkify(forward, errors=checkify.float_checks))
    run(params, state, batch())[0].throw()
    kernel = params["evolve"]["attention"]["kernel"] * np.nan
    params = {**params, "evolve": {**params["evolve"], "attention": {"kernel": kernel}}}
    with pytest.raises(checkify.JaxRuntimeError, match="nan"):
        run(params, state, batch())[0].throw()


# Steps


@functools.cache
def steps(sizes, negatives, tables="lazy_adam", **fields):
    """Parameters before and after steps on a mesh, and their metrics."""
    fields = {"net__user_dim": 3, **fields}
    method = dien.make(config(optim__tables=tables, **fields))
    mesh = clicks.grid(sizes)
    compiled = trainer.compile(method, mesh, batch(negatives=negatives))
    state, metrics = compiled.init(jax.random.key(0)), []
    first = jax.device_get(state.params)
    for i in range(2):
        placed = meshes.put_batch(batch(i, negatives=negatives), mesh, B)
        with jax.set_mesh(mesh):
            state, found = compiled.step(state, placed)
        metrics.append({k: float(v) for k, v in found.items()})
    return first, jax.device_get(state.params), metrics


@pytest.mark.matrix
def test_steps_agree_on_a_mesh():
    _, expected, metrics = steps((1, 1), False)
    _, found, others = steps((4, 2), False)
    for a, b in zip(metrics, others):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for a, b in zip(*(jax.tree.leaves(p) for p in (expected, found))):
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(a)


def test_the_batchs_negatives_are_among_the_ids_read():
    """Else a sparse step would read zeros for them and not move their rows."""
    x = batch(negatives=True)
    x["neg_hist_item"] = np.where(x["neg_hist_item"] > 0, ITEMS - 1, 0)
    x["hist_item"] = np.where(x["hist_item"] == ITEMS - 1, 2, x["hist_item"])
    x["item"] = np.minimum(x["item"], ITEMS - 2)
    found = together(functools.partial(dien.ids, net=NET), x)
    assert set(found["item"].ravel()) == {
        0, ITEMS - 1, *x["item"].tolist(), *x["hist_item"].ravel().tolist()
    }  # fmt: skip
    weight = np.zeros(B, np.float32)
    weight[0] = 1  # Its history is empty.
    found = together(functools.partial(dien.ids, net=NET), {**x, "weight": weight})
    assert set(found["item"].ravel()) == {0, int(x["item"][0])}


@pytest.mark.matrix
def test_sparse_steps_read_all_that_the_loss_does():
    sparse, dense = (
        steps((1, 1), True, tables)[2][0] for tables in ("lazy_adam", "dense")
    )
    names = ("loss", "aux", "grad_norm")
    assert [sparse[n] for n in names] == pytest.approx([dense[n] for n in names])


# What is refused


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("net.variant", "lstm", "net.variant must be .*'augru'"),
        ("net.attention", "dot", "bilinear"),
        ("net.aux", "none", "concat"),
        ("net.pooled", "max", "'mean'"),
        ("net.dtype", "float64", "bfloat16"),
        ("net.activation", "tanh", "dice"),
        ("net.item_vocab", 1, "item_vocab"),
        ("net.state", 0, "net.state"),
        ("net.aux_hidden", (0,), "net.aux_hidden"),
        ("optim.tables", "sgd", "lazy_adam"),
        ("optim.lr", 0.0, "optim.lr"),
        ("optim.drop_every", -1, "optim.drop_every"),
        ("method.aux_weight", -1.0, "method.aux_weight must be >= 0"),
        ("method.aux_reduce", "mean", "method.aux_reduce must be .*valid_mean"),
        ("train.accumulate", 0, "accumulate"),
    ],
)
def test_make_refuses(field, value, message):
    with pytest.raises(ValueError, match=message):
        dien.make(config(**{field.replace(".", "__"): value}))


def test_the_inner_product_needs_equal_widths():
    with pytest.raises(ValueError, match="net.aux=inner; got 5"):
        dataclasses.replace(NET, aux="inner", state=5)
    states, pos, neg, mask = device(aux_inputs())
    with pytest.raises(ValueError, match="as wide as"):
        dien.aux_loss({}, states[..., :5], pos, neg, mask)
    with pytest.raises(ValueError, match="per_sample"):
        dien.aux_loss({}, states, pos, neg, mask, "sum")
    net = dataclasses.replace(NET, aux="inner")
    params, state = drawn(net)
    assert "aux" not in params
    value = functools.partial(dien.loss, net=net)
    shapes = jax.eval_shape(value, params, state, batch(), KEY)
    assert "aux" in shapes[1][0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hist_item": np.zeros((B, T, 2), int)}, "hist_item"),
        ({"hist_item": np.zeros((B, 0), int)}, "hist_item"),
        ({"hist_cate": np.zeros((B, T + 1), int)}, "hist_cate"),
        ({"length": np.full(B, T + 1)}, "length"),
        ({"label": np.full(B, 2)}, "label"),
        ({"item": np.full(B, ITEMS)}, "item"),
    ],
)
def test_bad_batches(change, message):
    with pytest.raises(ValueError, match=message):
        dien.check_batch({**batch(), **change}, net=NET)
