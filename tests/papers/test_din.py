"""DIN: recorded numbers, identities, steps of sparse and dense tables, refusals."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import run
from jaxpapers import train as trainer
from jaxpapers.nets import embedding, mlp
from jaxpapers.papers import din
from tests import clicks
from tests.clicks import (
    CATES,
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
from tests.programs import KEY, params_like, together

CONTRACT = Contract(
    small={**CLICK, "net.unit": (8,)},
    data=write_clicks,
    refused={
        "net.pooling": ("max", "pooling"),
        "net.normalize": ("l1", "normalize"),
        "net.activation": ("gelu", "activation"),
        "net.item_dim": (0, "item_dim"),
        "optim.name": ("lion", "optim.name"),
        "method.mba": (-1.0, "mba"),
        "train.accumulate": (0, "train.accumulate"),
    },
)

NET = din.Net(**SIZES)
matrix = pytest.mark.matrix


config = functools.partial(clicks.config, "din:smoke", SIZES)
drawn = functools.partial(clicks.drawn, din)
gradient = functools.partial(clicks.gradient, din)


# Recorded numbers


@pytest.mark.parity(
    "ctr",
    only=lambda e: {"scores", "output", "W3", "grad_query"} <= set(e["arrays"]),
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_recorded_unit_and_pooling(case, dtype):
    data = {k: v.astype(dtype) if v.dtype == float else v
            for k, v in case.arrays.items()}  # fmt: skip
    mask = np.arange(data["keys"].shape[1])[None] < data["lengths"][:, None]
    normalize = "softmax" if "softmax" in case.name else "none"
    params = {
        f"layer_{i}": {"kernel": data[f"W{i + 1}"].T, "bias": data[f"b{i + 1}"]}
        for i in range(3)
    }

    def value(query, keys, params, mask):
        scores, _ = din.activation_unit(params, query, keys)
        output = din.attention_pool(scores, keys, mask, normalize)
        return 0.5 * (output**2).sum(), (scores, output)

    with jax.enable_x64(dtype == "float64"):
        grads, (scores, output) = together(
            jax.grad(value, (0, 1), has_aux=True),
            data["query"], data["keys"], params, mask,
        )  # fmt: skip
    found = {"output": output, "grad_query": grads[0], "grad_keys": grads[1]}
    if normalize == "none":
        found["scores"] = np.where(mask, scores, data["scores"])
    for name, x in found.items():
        np.testing.assert_allclose(
            x, data[name], rtol=0, atol=case.tolerance(dtype), err_msg=name
        )


@pytest.mark.parity("ctr", only=lambda entry: "grad_W" in entry["arrays"])
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=matrix)])
def test_recorded_mini_batch_aware_regularisation(case, dtype):
    data = case.arrays
    mask = np.arange(data["ids"].shape[1])[None] < data["lengths"][:, None]
    lam, counts = float(data["lam"]), data["counts"]
    used = np.unique(data["ids"][mask])
    table = data["W"].astype(dtype)

    def check(table):
        ids, n = device((data["ids"], counts))
        value = functools.partial(
            din.mba_regularizer, ids=ids, mask=jnp.asarray(mask), counts=n, lam=lam
        )
        # The optimizer's form adds to a zero gradient of the batch's rows.
        tx = din.mba_transform(lam, counts)
        w = din.rows.Rows(jnp.asarray(used), table[used])
        zero = din.rows.Rows(w.ids, jnp.zeros_like(w.values))
        added, _ = tx.update(zero, tx.init(table), w)
        return jax.value_and_grad(value)(table), added.values

    with jax.enable_x64(dtype == "float64"):
        (reg, grad), added = together(check, table)
    close = functools.partial(
        np.testing.assert_allclose, rtol=0, atol=case.tolerance(dtype)
    )
    close(reg, data["reg"])
    close(grad, data["grad_W"])
    close(added, data["grad_W"][used])
    assert not np.delete(grad, used, 0).any()


# Identities


@pytest.mark.parametrize("sizes", [(4, 2), pytest.param((1, 1), marks=matrix)])
def test_chunks_are_the_whole_batch(sizes):
    """Rows at a time and on a mesh: the same scores and gradients."""
    unit = drawn(NET)[0]["unit"]
    rng = np.random.default_rng(0)
    query, keys, weight = (
        rng.normal(size=n).astype(np.float32) for n in ((B, 6), (B, T, 6), (B, T))
    )

    def check(*arrays, chunk):
        def value(unit, query, keys, weight):
            scores, _ = din.activation_unit(
                unit, query, keys, activation="relu", train=True, chunk=chunk
            )
            return (scores * weight).sum(), scores

        return jax.grad(value, (0, 1, 2), has_aux=True)(*arrays)

    whole = functools.partial(check, chunk=0)
    expected = together(whole, unit, query, keys, weight)
    mesh = clicks.grid(sizes)
    with jax.set_mesh(mesh):
        rows = meshes.put_batch({"x": (query, keys, weight)}, mesh, B)["x"]
        found = jax.jit(functools.partial(check, chunk=4))(unit, *rows)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.matrix
def test_chunks_inside_of_the_model():
    # Not the default activation, which a chunk could fall back to.
    net = dataclasses.replace(NET, unit_activation="relu")
    args = *drawn(net), batch()
    found = gradient(dataclasses.replace(net, unit_chunk=4))(*args)
    chex.assert_trees_all_close(found, gradient(net)(*args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields", [{"unit_chunk": 3}, {"unit_chunk": 4, "unit_activation": "dice"}]
)
def test_chunks_that_are_refused(fields):
    net = dataclasses.replace(NET, **fields)
    with pytest.raises(ValueError, match="unit_chunk"):
        jax.eval_shape(gradient(net), *drawn(net), batch())


@pytest.mark.usefixtures("float64")
def test_split_weights_are_the_concatenated_unit():
    rng = np.random.default_rng(0)
    query, keys = rng.normal(size=(3, 2, 4)), rng.normal(size=(3, T, 4))
    params, state = params_like(
        lambda key: (
            p := mlp.init(key, (16, 7, 5, 1), "dice"), mlp.statistics(p)
        ),
        KEY,
    )  # fmt: skip
    q = np.broadcast_to(query[:, :, None], (3, 2, T, 4))
    k = np.broadcast_to(keys[:, None], q.shape)
    z = np.concatenate([q, k, q - k, q * k], -1)

    def both(params, state, z, query, keys):
        whole = mlp.apply(params, state, z, activation="dice", train=True)
        split = din.activation_unit(
            params, query, keys[:, None], state=state, activation="dice", train=True
        )
        return whole, split

    (expected, after), (scores, moved) = together(both, params, state, z, query, keys)
    np.testing.assert_allclose(scores, expected[..., 0], rtol=1e-12)
    chex.assert_trees_all_close(moved, after, rtol=1e-12)
    text = str(jax.make_jaxpr(din.activation_unit)(params, q[:, 0, 0], keys))
    assert f"3,{T},16]" not in text and f"3,{T},4]" in text


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "normalize",
    ["none", *(pytest.param(x, marks=matrix) for x in ("softmax_scaled", "softmax"))],
)
def test_order_padding_and_empty_histories(normalize):
    net = dataclasses.replace(NET, normalize=normalize)
    x = batch()
    full = {**x, "length": np.full(B, T, np.int32),
            "hist_item": np.maximum(x["hist_item"], 2)}  # fmt: skip
    order = np.array([3, 0, 5, 1, 4, 2])
    turned = {k: v[:, order] if k.startswith("hist") else v for k, v in full.items()}
    rng = np.random.default_rng(0)
    mask = np.arange(T)[None] < x["length"][:, None]
    scores = np.where(mask, rng.normal(size=(B, T)), 1e300)  # Overflows, if it is read.
    keys = rng.normal(size=(B, T, 4))

    def check(params, state, arrays, *batches):
        def square(scores, keys):
            pooled = din.attention_pool(scores, keys, arrays[2], normalize)
            return (pooled**2).sum(), pooled

        score = functools.partial(din.predict, params, state, net=net)
        pooling = jax.grad(square, (0, 1), has_aux=True)(*arrays[:2])
        return [score(b) for b in batches], pooling

    batches = (x, full, turned, overlong(x))
    rows = {k: np.concatenate([b[k] for b in batches]) for k in x}
    (logits, padded), (grads, pooled) = together(
        check, *drawn(net), (scores, keys, mask), rows, pad_histories(x, 3)
    )
    plain, ordered, other, longer = logits.reshape(4, B)
    np.testing.assert_allclose(padded, plain, rtol=1e-12)
    np.testing.assert_allclose(longer, plain, rtol=1e-12)
    np.testing.assert_allclose(other, ordered, rtol=1e-10)
    assert not pooled[0].any() and pooled[1].any()
    chex.assert_tree_all_finite(grads)


def test_doubling_a_history_doubles_the_plain_sum_only():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, T)).astype(np.float32)
    keys = rng.normal(size=(2, T, 4)).astype(np.float32)
    once = scores, keys, np.ones((2, T), bool)
    twice = tuple(np.concatenate([x, x], 1) for x in once)
    factors = {"none": 2.0, "softmax": 1.0, "softmax_scaled": 1.0}

    def pool(arrays):
        return {n: din.attention_pool(*arrays, n) for n in factors}

    found = together(lambda *x: tuple(map(pool, x)), once, twice)
    for name, factor in factors.items():
        one, two = (x[name] for x in found)
        np.testing.assert_allclose(two, factor * one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "pooling", ["attention", *(pytest.param(p, marks=matrix) for p in ("mean", "sum"))]
)
def test_scores_of_candidates_are_those_of_rows(pooling):
    net = dataclasses.replace(NET, pooling=pooling, user_dim=3, product=True)
    x = batch(candidates=3)

    def check(params, state, x):
        score = functools.partial(din.predict, params, state, net=net)
        return score(x), jnp.stack([score(candidate(x, n)) for n in range(3)], 1)

    many, single = together(check, *drawn(net), x)
    assert many.shape == (B, 3) and np.ptp(many, 1).min() > 1e-5
    np.testing.assert_allclose(many, single, rtol=1e-5, atol=1e-5)


def test_base_pools_by_the_mean_of_the_history():
    """The whole model in NumPy, with linear features; rows of unknown ids, too."""
    net = dataclasses.replace(NET, pooling="mean", hidden=())
    params, state = drawn(net)
    x = batch()
    x["item"][2:5] = ITEMS + 1, embedding.OOV, ITEMS - 1
    x["cate"][2:5] = 2
    for name in ("hist_item", "hist_cate", "length"):
        x[name][2:5] = x[name][1]
    table = params["tables"]
    assert ITEMS + 1 < len(table["item"])  # A row, but of no id.
    found = together(functools.partial(din.predict, net=net), params, state, x)
    for i, logit in enumerate(found):
        n = int(x["length"][i])
        item = x["item"][i] if x["item"][i] < ITEMS else embedding.OOV
        hist = [table[t][x[f"hist_{t}"][i, :n]] for t in ("item", "cate")]
        pooled = np.concatenate(hist, 1).mean(0) if n else np.zeros(6)
        features = [pooled, table["item"][item], table["cate"][x["cate"][i]]]
        layer = params["mlp"]["layer_0"]
        value = np.concatenate(features) @ layer["kernel"] + layer["bias"]
        value = value + table["item_bias"][item]
        assert logit == pytest.approx(value.item(), rel=1e-4, abs=1e-5)


@pytest.mark.usefixtures("float64")
def test_the_penalty_counts_each_id_once_and_over_an_epoch_is_the_norm():
    """Over an epoch whose batches have no id twice, each row is penalised n/n times."""
    table = np.random.default_rng(0).normal(size=(7, 2))
    batches = np.array([[1, 2, 3], [2, 4, 1], [1, 5, 4]])
    counts = np.bincount(batches.reshape(-1), minlength=7)
    repeated = np.array([1, 1, 0, 2])

    def check(table, batches, repeated, counts):
        value = functools.partial(
            din.mba_regularizer, mask=None, counts=counts, lam=2.0
        )
        epoch = sum(value(table, b) for b in batches)
        return epoch, jax.value_and_grad(value)(table, repeated)

    epoch, (penalty, grad) = together(check, table, batches, repeated, counts)
    assert epoch == pytest.approx(np.square(table[1:6]).sum(), rel=1e-12)
    squares = np.square(table).sum(1)
    expected = squares[1] / counts[1] + squares[2] / counts[2]
    assert penalty == pytest.approx(expected, rel=1e-12)
    expected = np.zeros_like(table)
    expected[1:3] = 2 * table[1:3] / counts[1:3, None]
    np.testing.assert_allclose(grad, expected, rtol=1e-12)


# Steps


SGD = {"optim__name": "sgd", "optim__lr": 0.1, "net__unit_activation": "dice",
       "net__normalize": "none", "net__hidden": (4,), "method__mba": 3.0}  # fmt: skip
COUNTS = {"item": np.arange(ITEMS) + 1, "cate": np.arange(CATES) + 1}


def test_sparse_steps_are_dense_ones_and_leave_other_rows_alone():
    """The optimizer adds the penalty's gradient where a dense loss has its value."""
    methods = {
        tables: din.make(config(**SGD, optim__tables=tables), COUNTS)
        for tables in ("row_sgd", "dense")
    }
    start = jax.jit(methods["row_sgd"].init)(jax.random.key(0), batch())
    first, states, losses = jax.device_get(start.params), {}, {}
    for tables, method in methods.items():
        # SGD has no state but the counts of the sparse one.
        shapes = jax.eval_shape(method.init, KEY, batch())
        state = start
        if tables == "dense":
            assert not jax.tree.leaves(shapes.opt_state)
            state = start._replace(opt_state=shapes.opt_state)
        update, losses[tables] = jax.jit(method.update), []
        for i in range(2):
            state, metrics = update(state, batch(i))
            losses[tables].append(float(metrics["loss"]))
        states[tables] = jax.device_get((state.params, state.extra))
    sparse, dense = states.values()
    chex.assert_trees_all_close(sparse, dense, rtol=1e-4, atol=1e-6)
    penalty, used = 0.0, {}
    for name, hist in (("item", "hist_item"), ("cate", "hist_cate")):
        used[name] = np.unique(np.append(batch()[name], batch()[hist]))
        squares = np.square(first["tables"][name][used[name]]).sum(1)
        penalty += 1.5 * (squares / COUNTS[name][used[name]])[used[name] > 0].sum()
    penalised = losses["dense"][0] - losses["row_sgd"][0]
    assert penalised == pytest.approx(penalty, rel=1e-4)
    both = np.append(batch(1)["item"], batch(1)["hist_item"])
    used = np.setdiff1d(np.append(used["item"], both), [0])
    old, new = first["tables"]["item"], sparse[0]["tables"]["item"]
    np.testing.assert_array_equal(np.delete(old, used, 0), np.delete(new, used, 0))
    assert (old[used] != new[used]).any(1).all() and not new[0].any()


@pytest.mark.matrix
@pytest.mark.parametrize("tables", ["lazy_adam", "row_adagrad"])
def test_rows_outside_of_the_batch_keep_their_bits(tables):
    method = din.make(config(optim__tables=tables))
    before = jax.jit(method.init)(jax.random.key(0), batch())
    after, _ = jax.jit(method.update)(before, batch())
    for name, ids in together(functools.partial(din.ids, net=NET), batch()).items():
        used = np.setdiff1d(ids, [0])
        old, new = (np.asarray(s.params["tables"][name]) for s in (before, after))
        np.testing.assert_array_equal(np.delete(old, used, 0), np.delete(new, used, 0))
        assert (old[used] != new[used]).any() and not new[0].any()


@pytest.mark.matrix
@pytest.mark.parametrize("sizes", [(4, 2), (8, 1), (2, 4)])
def test_same_numbers_on_every_mesh(sizes):
    """Dice's statistics, padded counts and updated rows over ``model`` and ``data``."""
    method, results = din.make(config(**SGD, optim__tables="row_sgd"), COUNTS), []
    for mesh in (clicks.grid((1, 1)), clicks.grid(sizes)):
        compiled, losses = trainer.compile(method, mesh, batch()), []
        state = compiled.init(jax.random.key(0))
        for i in range(2):
            placed = meshes.put_batch(batch(i), mesh, B)
            with jax.set_mesh(mesh):
                state, metrics = compiled.step(state, placed)
            losses.append(float(metrics["loss"]))
        results.append((jax.device_get((state.params, state.extra)), losses))
    (expected, losses), (found, others) = results
    assert others == pytest.approx(losses, rel=1e-5)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("activation", ["dice", pytest.param("sigmoid", marks=matrix)])
def test_padded_rows_change_nothing_and_empty_histories_train(activation):
    net = dataclasses.replace(NET, unit_activation=activation)
    params, state = drawn(net)
    weight = np.ones(B, np.float32)
    weight[5:] = 0
    one = {**batch(), "weight": weight}
    other = {k: np.append(v[:5], 1 + v[5:] * 0, 0) if k != "weight" else v
             for k, v in one.items()}  # fmt: skip
    found = gradient(net)(params, state, one)
    chex.assert_trees_all_equal(found, gradient(net)(params, state, other))
    assert float(found[0][1][0]["weight"]) == 5
    empty = {**one, "length": np.zeros(B, np.int32)}
    chex.assert_tree_all_finite(gradient(net)(params, state, empty))


@pytest.mark.slow
def test_it_learns_what_depends_on_history_and_candidate():
    """The label is whether the candidate's category is in the history."""

    def task(seed=0):
        x = batch(seed, size=16 * B)
        hit = (x["hist_cate"] == x["cate"][:, None]).any(1)
        return {**x, "label": hit.astype(np.int32)}

    method = din.make(config(optim__lr=3e-2, net__unit=(16,), net__cate_dim=6))
    data, losses = [task(i) for i in range(4)], []
    state, update = method.init(jax.random.key(0), data[0]), jax.jit(method.update)
    for i in range(100):
        state, metrics = update(state, data[i % 4])
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0.6 and np.mean(losses[-10:]) < 0.35


@pytest.mark.parametrize("preset", ["paper", "released", "ml100k"])
def test_presets_build(preset):
    c = run.load_config(f"din:{preset}")
    method = din.make(c)
    rows = {
        k: jax.ShapeDtypeStruct((c.data.batch, *x.shape[1:]), x.dtype)
        for k, x in batch().items()
    }
    state = jax.eval_shape(method.init, jax.random.key(0), rows)
    assert state.params["tables"]["item"].shape[0] >= c.net.item_vocab
    scores = jax.eval_shape(method.predict, state.params, state.extra, rows)
    assert scores.shape == (c.data.batch,)


# What is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"net__normalize": "max"}, "net.normalize must be one of .*softmax_scaled"),
        ({"net__pooling": "max"}, "net.pooling must be one of"),
        ({"net__activation": "tanh"}, "net.activation must be one of"),
        ({"net__unit_activation": "tanh"}, "net.unit_activation must be one of"),
        ({"net__dtype": "float64"}, "net.dtype must be .*bfloat16"),
        ({"net__item_vocab": 0}, "net.item_vocab must be >= 2 with net.item_dim=4"),
        ({"net__cate_vocab": 1}, "net.cate_dim=0 is without"),
        ({"net__item_dim": 0}, "net.item_dim must be >= 1, got 0"),
        ({"net__hidden": (4, 0)}, "net.hidden must be >= 1"),
        ({"net__unit": ()}, "net.unit must have"),
        ({"net__product": True, "net__project": 5}, "net.project must be 0 or 6"),
        ({"optim__name": "lion"}, "optim.name"),
        ({"optim__tables": "adam"}, "lazy_adam"),
        ({"optim__lr": 0.0}, "optim.lr must be > 0"),
        ({"optim__clip": -1.0}, "optim.clip must be >= 0"),
        ({"method__mba": 0.1}, "counts="),
        ({"method__mba": -0.1}, "method.mba must be >= 0"),
        ({"train__accumulate": 0}, "train.accumulate"),
    ],
)
def test_make_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        din.make(config(**fields))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hist_item": np.zeros((B, 0), int), "hist_cate": np.zeros((B, 0), int)},
         "hist_item must be .*slots >= 1"),
        ({"hist_cate": np.zeros((B, 2), int)}, "hist_cate must have shape"),
        ({"label": np.zeros(3)}, "label must have shape"),
        ({"cate": np.zeros((B, 2), int)}, "cate must have shape"),
    ],
)  # fmt: skip
def test_shapes_are_refused_while_tracing(change, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(gradient(NET), *drawn(NET), {**batch(), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"length": np.full(B, T + 1)}, "length must be within 0 .. 6"),
        ({"item": np.full(B, ITEMS)}, "item: ids must be within 0 .. 29"),
        ({"hist_cate": np.full((B, T), -1)}, "hist_cate: ids"),
        ({"label": np.full(B, 2)}, "label must be 0 or 1"),
        ({"label": np.full(B, np.nan)}, "label must be 0 or 1"),
    ],
)
def test_values_are_refused_on_the_host(change, message):
    din.check_batch(batch(), net=NET)
    with pytest.raises(ValueError, match=message):
        din.check_batch({**batch(), **change}, net=NET)


def test_counts_of_zero_are_refused():
    counts = np.ones(ITEMS)
    din.check_batch(batch(), net=NET, counts={"item": counts})
    counts[int(batch()["item"][0])] = 0
    with pytest.raises(ValueError, match="counts of 'item' are 0"):
        din.check_batch(batch(), net=NET, counts={"item": counts})
