"""Row-sparse optimizers and the method built on them."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers import hlo
from jaxpapers import mesh as meshes
from jaxpapers import train as trainer
from jaxpapers.method import gradient
from jaxpapers.method.tables import row_gradient
from jaxpapers.nets import embedding
from jaxpapers.optim import rows
from jaxpapers.optim.rows import FILL, Rows
from tests.programs import KEY, together

V, D, B, T = 64, 4, 8, 3
RULES = (*rows.STATE_RULES, *embedding.RULES)
ADAM = functools.partial(rows.lazy_adam, 0.1, b1=0.8, b2=0.9)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch(step=0, vocab=V):
    rng = np.random.default_rng(10 + step)
    ids = rng.integers(0, vocab, (B, T + 1)).astype(np.int32)
    ids[0], ids[1], ids[2, 0] = 0, 7, vocab + 5
    label = rng.integers(0, 2, B).astype(np.float32)
    return {"item": ids[:, 0], "hist": ids[:, 1:], "label": label}


def init_params(key, batch, vocab=V):
    key_table, key_dense = jax.random.split(key)
    return {
        "tables": {
            "item": embedding.normal(key_table, vocab, D, 1.0),
            "bias": jnp.zeros((vocab, 1)),
        },
        "dense": jax.random.normal(key_dense, (2 * D,)),
    }


def loss(params, batch, key):
    del key
    read = functools.partial(embedding.lookup, params["tables"]["item"])
    x = jnp.concatenate([read(batch["item"]), read(batch["hist"]).sum(1)], -1)
    bias = embedding.lookup(params["tables"]["bias"], batch["item"])[:, 0]
    logit = x @ params["dense"] + bias
    nats = optax.sigmoid_binary_cross_entropy(logit, batch["label"])
    return nats.mean(), {"logit": logit.mean()}


def ids(batch):
    return {
        "item": jnp.concatenate([batch["item"][:, None], batch["hist"]], 1),
        "bias": batch["item"],
    }


def method(table_tx, vocab=V, **options):
    start = functools.partial(init_params, vocab=vocab)
    return row_gradient(
        start, loss, optax.sgd(0.1), table_tx=table_tx, ids=ids, rules=RULES, **options
    )


def run(method, steps=3):
    state, losses = jax.jit(method.init)(jax.random.key(0), batch()), []
    update = jax.jit(method.update)
    for i in range(steps):
        state, metrics = update(state, batch(i))
        losses.append(float(metrics["loss"]))
    return state, losses, metrics


def test_gradients_of_positions_become_rows():
    gradient = np.arange(10, dtype=np.float32).reshape(5, 2)
    found = together(rows.rows_of, gradient, np.array([5, 0, 3, 5, -2], np.int32))
    assert found.ids.tolist() == [1, 3, 5, FILL, FILL]
    assert found.values[:3].tolist() == [[8.0, 9.0], [4.0, 5.0], [6.0, 8.0]]


def test_row_adagrad_is_its_formula():
    tx = rows.row_adagrad(0.5, eps=1e-3, initial=0.25)
    start, batches = normal(6, 2), ([1, 4], [4, 5])
    g = np.array([[1.0, -2.0], [0.5, 0.0]], np.float32)

    def train(table):
        state = tx.init({"t": table})
        for ids in batches:
            updates, state = tx.update({"t": Rows(jnp.array(ids), g)}, state)
            table = rows.apply_rows({"t": table}, updates)["t"]
        return table, state

    table, state = together(train, start)
    total, expected = np.full(6, 0.25), start.astype(np.float64)
    for ids in batches:
        total[ids] += (g**2).mean(1)
        expected[ids] -= 0.5 * g / (np.sqrt(total[ids]) + 1e-3)[:, None]
    np.testing.assert_allclose(table, expected, rtol=1e-6)
    np.testing.assert_allclose(state.sum_of_squares["t"], total, rtol=1e-6)


def test_lazy_adam_is_adam_when_every_row_is_touched():
    sparse, dense = ADAM(), optax.adam(0.1, 0.8, 0.9)

    def train(table, gradients):
        state, other = sparse.init(table), dense.init(table)
        a = b = table
        for g in gradients:
            updates, state = sparse.update(Rows(jnp.arange(6), g), state)
            a = rows.apply_rows(a, updates)
            updates, other = dense.update(g, other)
            b = optax.apply_updates(b, updates)
        return a, b

    a, b = together(train, normal(6, 2), [normal(6, 2, seed=i) for i in range(1, 5)])
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "tx",
    [ADAM()]
    + [
        pytest.param(tx, marks=pytest.mark.matrix)
        for tx in (rows.row_adagrad(0.1), rows.row_sgd(0.1))
    ],
)
def test_rows_that_are_not_in_the_batch_keep_their_bits(tx):
    state = jax.jit(method(tx).init)(jax.random.key(0), batch())
    after, _ = jax.jit(method(tx).update)(state, batch())
    wanted = np.concatenate([batch()["item"][:, None], batch()["hist"]], 1)
    used = np.setdiff1d(np.where(wanted >= V, 1, wanted), [0])
    others = np.setdiff1d(np.arange(V), used)
    old, new = (np.asarray(s.params["tables"]["item"]) for s in (state, after))
    np.testing.assert_array_equal(old[others], new[others])
    assert (old[used] != new[used]).any(1).all()
    for leaf in jax.tree.leaves(after.opt_state["rows"]):
        if leaf.ndim and leaf.shape[-1] != 1:
            assert not np.asarray(leaf)[others].any()
    assert not new[0].any()


def test_row_sgd_is_sgd_on_the_dense_gradient():
    expected, losses, metrics = run(gradient(init_params, loss, optax.sgd(0.1)))
    state, found, other = run(method(rows.row_sgd(0.1)))
    assert found == pytest.approx(losses, rel=1e-6)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5, atol=1e-6)
    assert float(other["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), 1e-5)


@pytest.mark.matrix
def test_clip_is_of_all_gradients_together():
    tx = optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.1))
    expected, _, metrics = run(gradient(init_params, loss, tx))
    assert metrics["grad_norm"] > 0.05
    state, _, _ = run(method(rows.row_sgd(0.1), clip=0.05))
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5, atol=1e-6)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "tx", [ADAM(), pytest.param(rows.row_adagrad(0.1), marks=pytest.mark.matrix)]
)
def test_accumulation_is_one_update_of_the_whole_batch(tx):
    whole, losses, _ = run(method(tx))
    parts, found, _ = run(method(tx, accumulate=4))
    assert found == pytest.approx(losses, rel=1e-5)
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-4, atol=1e-5)


@pytest.mark.matrix
def test_extra_goes_through_every_micro_batch():
    def counting(params, extra, batch, key):
        value, metrics = loss(params, batch, key)
        return value, (metrics, {"n": extra["n"] + len(batch["label"])})

    def start(params):
        return {"n": jnp.zeros((), jnp.int32)}

    built = row_gradient(
        init_params, counting, optax.sgd(0.1), table_tx=rows.row_sgd(0.1), ids=ids,
        init_extra=start, accumulate=2,
    )  # fmt: skip
    state, losses, _ = run(built)
    assert int(state.extra["n"]) == 3 * B
    assert losses == pytest.approx(run(method(rows.row_sgd(0.1)))[1], rel=1e-6)
    dense = gradient(
        init_params, counting, optax.sgd(0.1), init_extra=start, accumulate=2
    )
    assert int(run(dense)[0].extra["n"]) == 3 * B
    value, metrics = jax.eval_shape(built.loss, state.params, batch(), KEY)
    assert value.shape == () and set(metrics) == {"logit"}


TXS = {
    "adam": ADAM(),
    "adagrad": rows.row_adagrad(0.1),
    "mba": optax.chain(
        rows.mba_transform(0.1, {"tables": {"item": np.arange(V), "bias": np.ones(V)}}),
        rows.row_adagrad(0.1),
    ),
}


CASES = [
    pytest.param(("adam", 1, (8, 1)), marks=pytest.mark.matrix),
    pytest.param(("adam", 1, (4, 2)), marks=pytest.mark.matrix),
    ("adam", 2, (2, 4)),
    pytest.param(("mba", 1, (2, 4)), marks=pytest.mark.matrix),
]


@functools.cache
def compiled_step(name, accumulate, sizes):
    mesh = meshes.make_mesh(dict(zip(("data", "model"), sizes)))
    built = method(TXS[name], accumulate=accumulate)
    return mesh, trainer.compile(built, mesh, batch())


@functools.cache
def expected_run(name):
    return run(method(TXS[name]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_numbers_on_every_mesh(case):
    expected, losses, _ = expected_run(case[0])
    mesh, compiled = compiled_step(*case)
    state, found = compiled.init(jax.random.key(0)), []
    for i in range(3):
        with jax.set_mesh(mesh):
            state, metrics = compiled.step(state, meshes.put_batch(batch(i), mesh, B))
        found.append(float(metrics["loss"]))
    assert found == pytest.approx(losses, rel=1e-5)
    chex.assert_trees_all_close(
        jax.device_get((state.params, state.opt_state)),
        jax.device_get((expected.params, expected.opt_state)),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    if case[2][1] > 1:
        tables = jax.tree.leaves((state.params["tables"], state.opt_state["rows"]))
        assert not any(x.sharding.is_fully_replicated for x in tables if x.ndim)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_moves_only_what_the_batch_has(case):
    """The rows of all ids of the batch are the largest; the tables are larger."""
    largest = B * (T + 1) * D
    assert largest < V * D
    mesh, compiled = compiled_step(*case)
    found = hlo.collectives(compiled.executable.as_text(), mesh)
    assert found and max(c.elements for c in found) <= largest


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name", ["adam", pytest.param("adagrad", marks=pytest.mark.matrix)]
)
def test_cost_does_not_grow_with_the_vocabulary(name, users_options):
    """Nothing but gathers and scatters in place sees a table.

    The "bytes accessed" of XLA's cost analysis count the whole operand of a gather or
    scatter, so they say nothing here. FLOPs and temporary memory do, and the operations
    whose result is as large as a table: each would read or write all of it.
    """
    mesh = meshes.make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    found = []
    for vocab in (10_000, 1_000_000):
        # The tests' own options expand a scatter to a loop.
        compiled = trainer.compile(
            method(TXS[name], vocab),
            mesh,
            batch(),
            users_options,
        )
        step = compiled.executable
        memory = step.memory_analysis()
        tables = memory.argument_size_in_bytes
        assert memory.alias_size_in_bytes > 0.99 * tables > 4 * vocab * (D + 1)
        found.append((step.cost_analysis()["flops"], memory.temp_size_in_bytes))
        whole = re.findall(rf"= \w+\[{vocab}[,\]]\S* ([\w-]+)\(", step.as_text())
        assert set(whole) == {"parameter", "scatter", "fusion"}
        fusions = re.findall(rf"= \w+\[{vocab}[,\]].* fusion\(.*", step.as_text())
        assert all("calls=%wrapped_scatter" in line for line in fusions)
    assert found[0] == found[1]


def test_mba_adds_the_penalty_once_per_row():
    tx, table = rows.mba_transform(0.1, np.array([0, 5, 2, 0, 4])), normal(5, 2)
    ids = np.array([1, 3, 4, FILL], np.int32)

    def update(table, values):
        gradient = Rows(jnp.asarray(ids), jnp.zeros((4, 2)))
        params = Rows(jnp.asarray(ids), values)
        return tx.update(gradient, tx.init(table), params)[0].values

    values = np.concatenate([table[[1, 3, 4]], np.zeros((1, 2), np.float32)])
    added = together(update, table, values)
    expected = 0.1 * table[[1, 4]] / np.array([[5.0], [4.0]])
    np.testing.assert_allclose(added[[0, 2]], expected, rtol=1e-6)
    assert not added[[1, 3]].any()


def test_schedules_see_the_step():
    tx = rows.row_sgd(lambda count: 1.0 / (count + 1))

    def train():
        state, g = tx.init(()), Rows(jnp.array([1]), jnp.ones((1, 1)))
        steps = []
        for _ in range(3):
            updates, state = tx.update(g, state)
            steps.append(updates.values[0, 0])
        return steps

    steps = [float(x) for x in together(train)]
    assert steps == pytest.approx([-1, -1 / 2, -1 / 3])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rows.mba_transform(-1.0, ()), "lam must be"),
        (lambda: rows.mba_transform(1.0, np.ones(3)).init(np.ones((4, 2))), "counts"),
        (
            lambda: rows.mba_transform(1.0, np.ones(3)).update(
                Rows(np.array([1]), np.ones((1, 2))), rows.MbaState(np.ones(3))
            ),
            "needs params",
        ),
        (lambda: method(ADAM(), accumulate=0), "train.accumulate"),
        (lambda: run(method(ADAM(), accumulate=3)), "does not divide"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
