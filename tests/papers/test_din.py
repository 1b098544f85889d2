"""DIN: recorded numbers, identities of the digest, meshes, and what it refuses."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxpapers import mesh as meshes
from jaxpapers import run
from jaxpapers import train as trainer
from jaxpapers.nets import embedding, mlp
from jaxpapers.nets.mlp import DiceState
from jaxpapers.papers import din
from tests.contract import CLICK, Contract, write_clicks

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

B, T, ITEMS, CATES = 8, 6, 30, 7
SMALL = {
    "net.item_vocab": ITEMS, "net.cate_vocab": CATES,
    "net.item_dim": 4, "net.cate_dim": 2,
    "net.unit": (5,), "net.hidden": (6, 4), "data.history": T, "data.batch": B,
    "net.std": 0.5,
}  # fmt: skip


def config(preset="smoke", **fields):
    c = run.load_config(f"din:{preset}").copy_and_resolve_references().unlock()
    c.update_from_flattened_dict(
        {**SMALL, **{k.replace("__", "."): v for k, v in fields.items()}}
    )
    return c.lock()


def batch(seed=0, slots=T):
    rng = np.random.default_rng(seed)
    length = rng.integers(0, slots + 1, B)
    length[:2] = 0, slots
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
    return {k: jnp.asarray(v, jnp.int32) for k, v in x.items()}


def logits(net, params, x, state=None, train=False):
    state = din.statistics(params) if state is None else state
    return din.forward(params, state, x, net=net, train=train)[0]


@functools.cache
def drawn(**fields):
    """Parameters with nothing left at zero."""
    net = config(**fields).net
    params = din.init(jax.random.key(0), net)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    params = jax.tree.unflatten(treedef, noisy)
    tables = params["tables"]
    params["tables"] = {n: t.at[0].set(0.0) for n, t in tables.items()}
    return net, params


# Recorded numbers


def is_attention(entry):
    return {"scores", "output", "query", "keys", "W3"} <= set(
        entry["arrays"]
    ) and "att" not in entry["arrays"]


@pytest.mark.parity("ctr", only=is_attention)
@pytest.mark.parametrize("double", [True, False])
def test_unit_and_pooling(case, double):
    folder, name, entry = case
    data = load(folder, entry, double)
    tol = entry["tolerance_float64" if double else "tolerance_float32"]
    with jax.enable_x64(double):
        data = jax.tree.map(jnp.asarray, data)
        params = {
            f"layer_{i}": {"kernel": data[f"W{i + 1}"].T, "bias": data[f"b{i + 1}"]}
            for i in range(3)
        }
        slots = data["keys"].shape[1]
        mask = jnp.arange(slots)[None, :] < data["lengths"][:, None]
        normalize = "softmax" if "softmax" in name else "none"

        def value(query, keys):
            scores, _ = din.activation_unit(params, query, keys)
            output = din.attention_pool(scores, keys, mask, normalize)
            return 0.5 * (output**2).sum(), (scores, output)

        grads, (scores, output) = jax.grad(value, (0, 1), has_aux=True)(
            data["query"], data["keys"]
        )
    if normalize == "none":
        close(np.where(mask, scores, 0), np.where(mask, data["scores"], 0), tol)
    close(output, data["output"], tol)
    close(grads[0], data["grad_query"], tol)
    close(grads[1], data["grad_keys"], tol)


@pytest.mark.parity("ctr", only=lambda entry: "running_mean" in entry["arrays"])
@pytest.mark.parametrize("double", [True, False])
def test_dice_recorded(case, double):
    folder, _, entry = case
    data = load(folder, entry, double)
    tol = entry["tolerance_float64" if double else "tolerance_float32"]
    with jax.enable_x64(double):
        data = jax.tree.map(jnp.asarray, data)
        x, alpha = data["x"], data["alpha"]
        c = (jnp.arange(x.size) + 1.0).reshape(x.shape).astype(x.dtype) / x.size
        start = DiceState(jnp.zeros_like(alpha), jnp.ones_like(alpha))
        options = {"decay": 0.9, "eps": 1e-8, "correction": 1}

        def value(x, alpha):
            y, state = din.dice(x, alpha, start, train=True, **options)
            return (y * c).sum(), (y, state)

        grads, (y, state) = jax.grad(value, (0, 1), has_aux=True)(x, alpha)
        evaluated, same = din.dice(x, alpha, state, train=False, **options)
    close(y, data["y_train"], tol)
    close(grads[0], data["grad_x"], tol)
    close(grads[1], data["grad_alpha"], tol)
    close(state.mean, data["running_mean"], tol)
    close(state.var, data["running_var_unbiased"], tol)
    close(evaluated, data["y_eval"], tol)
    chex.assert_trees_all_equal(same, state)


@pytest.mark.parity("ctr", only=lambda entry: "grad_W" in entry["arrays"])
@pytest.mark.parametrize("double", [True, False])
def test_mini_batch_aware_regularisation_recorded(case, double):
    folder, _, entry = case
    data = load(folder, entry, double)
    tol = entry["tolerance_float64" if double else "tolerance_float32"]
    with jax.enable_x64(double):
        data = jax.tree.map(jnp.asarray, data)
        slots = data["ids"].shape[1]
        mask = jnp.arange(slots)[None, :] < data["lengths"][:, None]
        lam, counts = float(data["lam"]), data["counts"]

        def value(w):
            return din.mba_regularizer(w, data["ids"], mask, counts, lam)

        reg, grad = jax.value_and_grad(value)(data["W"])
        used = np.unique(np.asarray(data["ids"])[np.asarray(mask)])
        # The optimizer's form: what it adds to a zero gradient of the batch's rows.
        tx = din.mba_transform(lam, counts)
        w = din.rows.Rows(jnp.asarray(used), data["W"][used])
        zero = din.rows.Rows(jnp.asarray(used), jnp.zeros_like(w.values))
        added, _ = tx.update(zero, tx.init(data["W"]), w)
    close(reg, data["reg"], tol)
    close(grad, data["grad_W"], tol)
    close(added.values, data["grad_W"][used], tol)
    others = np.setdiff1d(np.arange(len(grad)), used)
    assert not np.asarray(grad)[others].any()


def load(folder, entry, double):
    with np.load(folder / entry["file"]) as file:
        return {
            k: v if double or v.dtype != np.float64 else v.astype(np.float32)
            for k, v in file.items()
        }


def close(got, want, tol):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < tol


# Identities


@pytest.mark.parametrize("mesh", [None, {"data": 4, "model": 2}])
def test_chunks_are_the_whole_batch(mesh):
    """Rows at a time: the same numbers and gradients, and less memory."""
    # Not the unit's default, which a chunk could fall back to.
    net, params = drawn(net__unit_activation="relu")
    x, state = batch(), din.statistics(params)
    grid = mesh and meshes.make_mesh(mesh)
    found = []
    for chunk in (0, 4):
        own = net.copy_and_resolve_references().unlock()
        own.unit_chunk = chunk
        value = jax.jit(
            jax.value_and_grad(
                lambda p, own=own: din.loss(p, state, x, jax.random.key(0), net=own)[0]
            )
        )
        with jax.set_mesh(grid) if grid else contextlib.nullcontext():
            found.append(jax.device_get(value(params)))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)
    for fields in ({"unit_chunk": 3}, {"unit_chunk": 4, "unit_activation": "dice"}):
        own = net.copy_and_resolve_references().unlock()
        own.update(fields)
        params = din.init(jax.random.key(0), own)
        with pytest.raises(ValueError, match="unit_chunk"):
            din.loss(params, din.statistics(params), x, jax.random.key(0), net=own)


@pytest.mark.usefixtures("float64")
def test_split_weights_are_the_concatenated_unit():
    key_query, key_keys, key_net = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(key_query, (3, 2, 4))
    keys = jax.random.normal(key_keys, (3, T, 4))
    params = mlp.init(key_net, (16, 7, 5, 1), "dice")
    q = jnp.broadcast_to(query[:, :, None], (3, 2, T, 4))
    k = jnp.broadcast_to(keys[:, None], q.shape)
    z = jnp.concatenate([q, k, q - k, q * k], -1)
    state = mlp.statistics(params)
    expected, after = mlp.apply(params, state, z, activation="dice", train=True)
    scores, moved = din.activation_unit(
        params, query, keys[:, None], state=state, activation="dice", train=True
    )
    np.testing.assert_allclose(scores, expected[..., 0], rtol=1e-12)
    chex.assert_trees_all_close(moved, after, rtol=1e-12)
    text = str(
        jax.make_jaxpr(functools.partial(din.activation_unit, params))(q[:, 0, 0], keys)
    )
    assert f"3,{T},16]" not in text and f"3,{T},4]" in text


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("normalize", ["none", "softmax", "softmax_scaled"])
def test_order_padding_and_empty_histories(normalize):
    net, params = drawn(net__normalize=normalize)
    x = batch()
    expected = logits(net, params, x)
    order = jnp.array([3, 0, 5, 1, 4, 2])
    full = {**x, "length": jnp.full(B, T), "hist_item": jnp.maximum(x["hist_item"], 2)}
    turned = {k: v[:, order] if k.startswith("hist") else v for k, v in full.items()}
    np.testing.assert_allclose(
        logits(net, params, turned), logits(net, params, full), rtol=1e-10
    )
    padded = {
        k: jnp.pad(v, ((0, 0), (0, 3)), constant_values=9)
        if k.startswith("hist")
        else v
        for k, v in x.items()
    }
    np.testing.assert_array_equal(logits(net, params, padded), expected)

    scores = jax.random.normal(jax.random.key(0), (B, T))
    keys = jax.random.normal(jax.random.key(1), (B, T, 4))
    mask = jnp.arange(T)[None, :] < x["length"][:, None]

    def pool(scores, keys):
        return din.attention_pool(scores, keys, mask, normalize)

    assert not np.asarray(pool(scores, keys)[0]).any()
    huge = jnp.where(mask, scores, 1e30)
    grads = jax.grad(lambda *x: (pool(*x) ** 2).sum(), (0, 1))(huge, keys)
    chex.assert_tree_all_finite(grads)


def test_doubling_a_history_doubles_the_plain_sum_only():
    scores = jax.random.normal(jax.random.key(0), (2, T))
    keys = jax.random.normal(jax.random.key(1), (2, T, 4))
    mask = jnp.ones((2, T), bool)
    twice = [jnp.concatenate([x, x], 1) for x in (scores, keys, mask)]
    for normalize, factor in (("none", 2.0), ("softmax", 1.0), ("softmax_scaled", 1.0)):
        once = din.attention_pool(scores, keys, mask, normalize)
        np.testing.assert_allclose(
            din.attention_pool(*twice, normalize), factor * once, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("pooling", ["attention", "mean", "sum"])
def test_scores_of_candidates_are_those_of_rows(pooling):
    net, params = drawn(net__pooling=pooling, net__user_dim=3, net__user_vocab=9)
    x = batch()
    items = jax.random.randint(jax.random.key(3), (B, 4), 2, ITEMS)
    cates = jax.random.randint(jax.random.key(4), (B, 4), 2, CATES)
    state = din.statistics(params)
    many = jax.jit(functools.partial(din.score_candidates, net=net))(
        params, state, {**x, "item": items, "cate": cates}
    )
    assert many.shape == (B, 4)
    for i in range(4):
        one = logits(net, params, {**x, "item": items[:, i], "cate": cates[:, i]})
        np.testing.assert_allclose(many[:, i], one, rtol=1e-5, atol=1e-5)


def test_base_pools_by_the_mean_of_the_history():
    net, params = drawn(net__pooling="mean", net__hidden=())
    x = batch()
    table = {n: np.asarray(t) for n, t in params["tables"].items()}
    kernel = np.asarray(params["mlp"]["layer_0"]["kernel"])
    for i, logit in enumerate(np.asarray(logits(net, params, x))):
        n = int(x["length"][i])
        hist = np.concatenate(
            [
                table["item"][x["hist_item"][i, :n]],
                table["cate"][x["hist_cate"][i, :n]],
            ],
            1,
        )
        pooled = hist.mean(0) if n else np.zeros(6)
        own = [table["item"][x["item"][i]], table["cate"][x["cate"][i]]]
        value = np.concatenate([pooled, *own]) @ kernel
        value = (
            value + params["mlp"]["layer_0"]["bias"] + table["item_bias"][x["item"][i]]
        )
        assert logit == pytest.approx(value.item(), rel=1e-4, abs=1e-5)


def test_closed_forms_of_dice():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    state = DiceState(jnp.zeros(3), jnp.full(3, 4.0))
    same, _ = din.dice(x, jnp.ones(3), state, train=True)
    np.testing.assert_allclose(same, x, rtol=1e-6)
    y, _ = din.dice(x, jnp.zeros(3), state, train=False)
    np.testing.assert_allclose(y, x * jax.nn.sigmoid(x / 2), rtol=1e-5)
    sharp = DiceState(jnp.zeros(3), jnp.zeros(3))
    y, _ = din.dice(x, jnp.full(3, 0.1), sharp, train=False, eps=1e-12)
    np.testing.assert_allclose(y, jnp.where(x > 0, x, 0.1 * x), rtol=1e-5)


def test_dice_sees_only_what_is_not_masked():
    x = jax.random.normal(jax.random.key(0), (4, T, 3))
    mask = jnp.arange(T)[None, :] < jnp.array([2, 6, 0, 3])[:, None]
    alpha, state = jnp.zeros(3), DiceState(jnp.zeros(3), jnp.ones(3))
    y, moved = din.dice(
        jnp.where(mask[..., None], x, 1e3), alpha, state, train=True, mask=mask
    )
    few, expected = din.dice(x[mask], alpha, state, train=True)
    np.testing.assert_allclose(y[mask], few, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(moved, expected, rtol=1e-4)
    _, kept = din.dice(x, alpha, state, train=True, mask=jnp.zeros_like(mask))
    chex.assert_trees_all_equal(kept, state)


def test_dice_over_a_named_axis_is_that_of_the_whole_batch():
    x = jax.random.normal(jax.random.key(0), (8, 3))
    alpha, state = jnp.zeros(3), DiceState(jnp.zeros(3), jnp.ones(3))
    expected, after = din.dice(x, alpha, state, train=True)
    one = functools.partial(din.dice, train=True, axis_name="i")
    y, moved = jax.vmap(one, (0, None, None), axis_name="i")(
        x.reshape(4, 2, 3), alpha, state
    )
    np.testing.assert_allclose(y.reshape(8, 3), expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[2], moved), after, rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_penalty_gradient_is_its_finite_difference():
    table = jax.random.normal(jax.random.key(0), (7, 2))
    ids, counts = jnp.array([[1, 2, 2], [5, 2, 0]]), jnp.array([9, 1, 3, 2, 1, 0, 4])

    def value(table):
        return din.mba_regularizer(jnp.asarray(table), ids, None, counts, 0.3)

    check_grads(value, (table,), order=1, modes=["rev"], atol=1e-8, rtol=1e-8)
    grad = np.asarray(jax.grad(value)(table))
    assert grad[[1, 2]].all() and not grad[[0, 3, 4, 5, 6]].any()


def test_an_epoch_of_penalties_is_the_norm_of_what_was_seen():
    """If the samples of a batch share no id; with repeats it is less."""
    table = jax.random.normal(jax.random.key(0), (7, 2))
    batches = [[1, 2, 3], [2, 4, 1], [1, 5, 4]]
    counts = jnp.asarray(np.bincount(sum(batches, []), minlength=7))
    value = functools.partial(
        din.mba_regularizer, table, mask=None, counts=counts, lam=2.0
    )
    total = sum(float(value(jnp.array(b))) for b in batches)
    assert total == pytest.approx(float(jnp.square(table[1:6]).sum()), rel=1e-5)
    assert float(value(jnp.array([1, 1, 1]))) < float(value(jnp.array([1, 2, 3])))


def test_penalty_of_the_optimizer_is_the_gradient_of_its_value():
    """Sparse rows with mba_transform move as dense ones with the value in the loss."""
    counts = {"item": np.arange(ITEMS) + 1, "cate": np.arange(CATES) + 1}
    fields = {"method__mba": 3.0, "optim__name": "sgd", "optim__lr": 0.1}
    states = [
        step(din.make(config(**fields, optim__tables=t), counts), 2)[0]
        for t in ("row_sgd", "dense")
    ]
    chex.assert_trees_all_close(
        states[0].params, states[1].params, rtol=1e-4, atol=1e-6
    )
    without, _ = step(din.make(config(**{**fields, "method__mba": 0.0},
                                      optim__tables="row_sgd")), 2)  # fmt: skip
    moved = states[0].params["tables"]["item"] - without.params["tables"]["item"]
    assert np.abs(moved).max() > 1e-3


# Steps


def step(method, count, start=batch):
    state, losses = method.init(jax.random.key(0), start()), []
    update = jax.jit(method.update)
    for i in range(count):
        state, metrics = update(state, start(i))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("tables", ["lazy_adam", "row_adagrad", "row_sgd"])
def test_rows_outside_of_the_batch_keep_their_bits(tables):
    method = din.make(config(optim__tables=tables))
    before = method.init(jax.random.key(0), batch())
    after, _ = jax.jit(method.update)(before, batch())
    for name, used in din.ids(batch(), net=config().net).items():
        used = np.setdiff1d(used, [0])
        old, new = (np.asarray(s.params["tables"][name]) for s in (before, after))
        others = np.setdiff1d(np.arange(len(old)), used)
        np.testing.assert_array_equal(old[others], new[others])
        assert (old[used] != new[used]).any()
        assert not new[0].any()


def test_sparse_and_dense_sgd_agree():
    fields = {"optim__name": "sgd", "optim__lr": 0.1, "net__unit_activation": "dice"}
    (sparse, losses), (dense, expected) = (
        step(din.make(config(**fields, optim__tables=t)), 2)
        for t in ("row_sgd", "dense")
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    chex.assert_trees_all_close(sparse.params, dense.params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(sparse.extra, dense.extra, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2), (2, 4)], ids=str)
def test_same_numbers_on_every_mesh(sizes):
    method = din.make(config(net__unit_activation="dice", net__normalize="none"))
    expected, losses = expected_steps()
    mesh = meshes.make_mesh(dict(zip(("data", "model"), sizes)))
    compiled = trainer.compile(method, mesh, batch())
    state, found = compiled.init(jax.random.key(0)), []
    for i in range(3):
        with jax.set_mesh(mesh):
            state, metrics = compiled.step(state, meshes.put_batch(batch(i), mesh, B))
        found.append(float(metrics["loss"]))
    assert found == pytest.approx(losses, rel=1e-5)
    chex.assert_trees_all_close(
        jax.device_get((state.params, state.extra)),
        jax.device_get((expected.params, expected.extra)),
        rtol=1e-3, atol=1e-5,
    )  # fmt: skip


@functools.cache
def expected_steps():
    method = din.make(config(net__unit_activation="dice", net__normalize="none"))
    return step(method, 3)


def test_rows_without_weight_change_nothing():
    method = din.make(config(net__unit_activation="dice"))
    weight = jnp.ones(B).at[5:].set(0.0)
    one = {**batch(), "weight": weight}
    other = {k: v.at[5:].set(1) if k != "weight" else v for k, v in one.items()}
    state = method.init(jax.random.key(0), one)
    update = jax.jit(method.update)
    (a, metrics), (b, same) = update(state, one), update(state, other)
    chex.assert_trees_all_equal(a.params, b.params)
    chex.assert_trees_all_equal(a.extra, b.extra)
    assert float(metrics["weight"]) == 5 and float(metrics["loss"]) == float(
        same["loss"]
    )


def test_empty_histories_train():
    empty = {**batch(), "length": jnp.zeros(B, jnp.int32)}
    for activation in ("dice", "sigmoid"):
        method = din.make(config(net__unit_activation=activation))
        state, losses = step(method, 2, lambda i=0: empty)
        chex.assert_tree_all_finite((state.params, state.extra))
        assert np.isfinite(losses).all()


def test_it_learns_what_depends_on_history_and_candidate():
    """The label is whether the candidate's category is in the history."""

    def task(seed=0):
        x = batch(seed)
        hit = (x["hist_cate"] == x["cate"][:, None]).any(1)
        return {**x, "label": hit.astype(jnp.int32)}

    def large(seed=0):
        many = [task(16 * seed + i) for i in range(16)]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *many)

    method = din.make(config(optim__lr=3e-2, net__unit=(16,), net__cate_dim=6))
    data = [large(i) for i in range(4)]
    _, losses = step(method, 100, lambda i=0: data[i % 4])
    assert losses[0] > 0.6 and np.mean(losses[-10:]) < 0.35


def test_presets_build():
    for preset in ("paper", "released", "ml100k", "smoke"):
        c = run.load_config(f"din:{preset}")
        method = din.make(c)
        n = c.data.batch
        rows = {
            k: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
            for k, x in batch().items()
        }
        state = jax.eval_shape(method.init, jax.random.key(0), rows)
        assert state.params["tables"]["item"].shape[0] >= c.net.item_vocab
        shapes = jax.eval_shape(method.update, state, rows)[0]
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)


# What is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"net__normalize": "max"}, "normalize must be one of .*softmax_scaled"),
        ({"net__pooling": "max"}, "pooling must be one of"),
        ({"net__activation": "tanh"}, "net.activation must be one of"),
        ({"net__unit_activation": "tanh"}, "unit_activation must be one of"),
        ({"net__dtype": "float64"}, "bfloat16"),
        ({"net__item_vocab": 0}, "net.item_vocab=0"),
        ({"net__item_dim": 0}, "item_dim"),
        ({"net__product": True, "net__project": 5}, "net.project"),
        ({"optim__name": "lion"}, "optim.name"),
        ({"optim__tables": "adam"}, "lazy_adam"),
        ({"optim__lr": 0.0}, "optim.lr"),
        ({"method__mba": 0.1}, "counts="),
        ({"method__mba": -0.1}, "method.mba"),
        ({"train__accumulate": 0}, "train.accumulate"),
    ],
)
def test_make_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        din.make(config(**fields))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hist_item": jnp.zeros((B, 0), int), "hist_cate": jnp.zeros((B, 0), int)},
         "hist_item must be .*slots >= 1"),
        ({"hist_cate": jnp.zeros((B, 2), int)}, "hist_cate must have shape"),
        ({"label": jnp.zeros(3)}, "label must have shape"),
        ({"cate": jnp.zeros((B, 2), int)}, "cate must have shape"),
    ],
)  # fmt: skip
def test_shapes_are_refused_while_tracing(change, message):
    net, params = drawn()
    x = {**batch(), **change}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(logits, net), params, x)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"length": jnp.full(B, T + 1)}, "length must be within 0 .. 6"),
        ({"item": jnp.full(B, ITEMS)}, "item: ids must be within 0 .. 29"),
        ({"hist_cate": jnp.full((B, T), -1)}, "hist_cate: ids"),
        ({"label": jnp.full(B, 2)}, "label must be 0 or 1"),
        ({"label": jnp.full(B, jnp.nan)}, "label must be 0 or 1"),
    ],
)
def test_values_are_refused_on_the_host(change, message):
    net = config().net
    din.check_batch(batch(), net=net)
    with pytest.raises(ValueError, match=message):
        din.check_batch({**batch(), **change}, net=net)


def test_counts_of_zero_are_refused():
    net = config().net
    counts = np.ones(ITEMS)
    din.check_batch(batch(), net=net, counts={"item": counts})
    counts[int(batch()["item"][0])] = 0
    with pytest.raises(ValueError, match="counts of 'item' are 0"):
        din.check_batch(batch(), net=net, counts={"item": counts})


def test_unknown_ids_read_the_row_for_them_and_not_a_neighbour():
    net, params = drawn()
    x = batch()
    far = {**x, "item": jnp.full(B, ITEMS + 1)}
    unknown = {**x, "item": jnp.full(B, embedding.OOV)}
    last = {**x, "item": jnp.full(B, ITEMS - 1)}
    assert ITEMS + 1 < len(params["tables"]["item"])  # A row, but of no id.
    np.testing.assert_array_equal(
        logits(net, params, far), logits(net, params, unknown)
    )
    assert (logits(net, params, far) != logits(net, params, last)).all()
