"""Fused leaves: the numbers of matrices that are stored apart, states, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxpapers import optim
from jaxpapers.optim import (
    DimensionNumbers,
    scale_by_dion,
    scale_by_dion2,
    scale_by_muon,
)
from jaxpapers.optim.paths import named_leaves
from tests.fused import MAKERS, dion_direction, in_turn, normal, train
from tests.programs import together

# Shape, dimension numbers, sizes, axis of the blocks.
LEAVES = {
    "qkv": ((8, 20), DimensionNumbers(), (12, 4, 4), 1),
    # More inputs than outputs.
    "torch": ((14, 16), DimensionNumbers(1, 0), (8, 6), 0),
    "stack": ((2, 6, 16), DimensionNumbers(1, 2), (8, 8), 2),
    # Heads of q, k and v, each with its head_dim.
    "heads": ((8, 6, 3), DimensionNumbers(0, (1, 2)), (4, 1, 1), 1),
    # Two groups, in each three heads of q, one of k and one of v: P is on the output side
    # of q, on the input side of k and v.
    "groups": ((8, 2, 5, 3), DimensionNumbers(0, (2, 1, 3)), (3, 1, 1), 2),
}
NUMBERS = {name: d for name, (_, d, _, _) in LEAVES.items()}
SIZES = {name: sizes for name, (_, _, sizes, _) in LEAVES.items()}


def tree(seed, dtype=np.float32):
    return {n: normal(seed, *x[0], dtype=dtype) for n, x in LEAVES.items()}


def apart(tree):
    """The tree with a tuple of matrices for each leaf."""
    return {
        n: tuple(np.split(x, np.cumsum(LEAVES[n][2])[:-1], LEAVES[n][3]))
        for n, x in tree.items()
    }


def together_again(tree):
    return {n: np.concatenate(x, LEAVES[n][3]) for n, x in tree.items()}


@pytest.mark.parametrize(
    "name, leaves", in_turn(("torch", "groups"), ("ahead",), ("normuon",))
)
def test_equals_matrices_stored_apart(name, leaves, float64):
    make = functools.partial(MAKERS[name], weight_dimension_numbers=NUMBERS)
    gradients = [
        {n: x for n, x in tree(t, np.float64).items() if n in (leaves or LEAVES)}
        for t in range(2)
    ]
    got, state = train(make(split_sizes=SIZES), gradients)
    want, other = train(make(), [apart(g) for g in gradients])
    for a, b in zip(got, want):
        for n, x in together_again(b).items():
            np.testing.assert_allclose(a[n], x, rtol=0, atol=1e-12, err_msg=n)
    # The momentum has the leaf's shape.
    for n, x in together_again(other.momentum).items():
        np.testing.assert_allclose(state.momentum[n], x, rtol=0, atol=1e-12)
    if hasattr(state, "q"):
        jax.tree.map(np.testing.assert_allclose, state.q, other.q)


def test_every_block_has_its_own_scale(float64):
    """sqrt(fan_out / fan_in) of a block; that of the whole leaf is 2."""
    tx = scale_by_muon(split_sizes=(16, 8, 8), coefficients="polar_express")
    (updates,), _ = train(tx, [{"w": normal(0, 8, 32)}])
    for block, fan_out in zip(np.split(updates["w"], [16, 24], 1), (16, 8, 8)):
        singular = np.linalg.svd(block, compute_uv=False)
        np.testing.assert_allclose(singular, np.sqrt(fan_out / 8), rtol=0.15)


def test_nnx_variables():
    tx = optim.dion(
        0.1, 0.5, orthogonalize="cqr2", split_sizes=lambda path, _: SIZES.get(path)
    )
    net = nnx.State({"qkv": nnx.Param(jnp.asarray(tree(0)["qkv"]))})

    state = jax.eval_shape(tx.init, net)
    updates, after = jax.eval_shape(tx.update, net, state, net)
    assert jax.tree.structure((updates, after)) == jax.tree.structure((net, state))
    assert updates["qkv"].get_value().shape == (8, 20)
    paths = [path for path, _ in named_leaves(state)[0] if "/q/" in path]
    assert [p.rpartition("/q/")[2] for p in paths] == ["qkv/0", "qkv/1", "qkv/2"]


@pytest.mark.parametrize("form", ["tree", "function", "node"])
def test_is_given_leaf_by_leaf(form):
    """As the other options are; leaves without sizes are one matrix."""
    x = {
        "attn": {"qkv": normal(0, 8, 20), "out": normal(1, 8, 8)},
        "mlp": normal(2, 8, 16),
    }
    given = {
        "tree": {"attn": {"qkv": [12, 4, 4], "out": None}, "mlp": (16,)},
        "function": lambda path, leaf: (12, 4, 4) if leaf.shape == (8, 20) else None,
        "node": {"attn": None, "mlp": (8, 8)},
    }[form]
    tx = scale_by_dion({"attn": 0.5, "mlp": 0.25}, split_sizes=given)
    state = jax.eval_shape(tx.init, x)
    counts = jax.tree.map(lambda _: 1, x) | {"mlp": 2 if form == "node" else 1}
    counts["attn"]["qkv"] = 1 if form == "node" else 3
    got = jax.tree.map(lambda q, _: len(q) if isinstance(q, tuple) else 1, state.q, x,
                       is_leaf=lambda q: isinstance(q, tuple))  # fmt: skip
    assert got == counts
    # A fraction is that of every block.
    ranks = [q.shape[-1] for _, q in named_leaves(state.q)[0]]
    assert ranks == {"node": [4, 4, 2, 2]}.get(form, [4, 4, 2, 2, 2])


def test_injected_rank_and_momentum_only_state():
    """Under inject_hyperparams ranks are the state's; Muon's state says no sizes."""
    g = {"w": jnp.asarray(normal(0, 8, 20))}
    tx = optax.inject_hyperparams(scale_by_dion)(
        0.5, split_sizes=(12, 4, 4), orthogonalize="cqr2"
    )
    state = tx.init(g)
    updates, after = jax.eval_shape(tx.update, g, state)
    assert updates["w"].shape == (8, 20)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    muon, fused = scale_by_muon(), scale_by_muon(split_sizes=(12, 4, 4))
    assert jax.tree.structure(muon.init(g)) == jax.tree.structure(fused.init(g))


def test_another_rank():
    """Every block has the rank of its own sides; M is kept."""
    x, sizes = {"w": normal(0, 8, 20)}, (12, 4, 4)
    low, high = (dion_direction(f, split_sizes=sizes) for f in (0.25, 0.5))

    def run(x):
        state = low.init(x)
        more = optim.rescale_rank(state, x, 0.5, split_sizes=sizes)
        resized = optim.resize(state, jax.eval_shape(high.init, x))
        less = optim.rescale_rank(more, x, 0.25, split_sizes=sizes)
        return state, more, resized, less

    state, more, resized, less = together(run, x)
    jax.eval_shape(high.update, x, more)
    assert [q.shape for q in more.q["w"]] == [(8, 4), (4, 2), (4, 2)]
    jax.tree.map(np.testing.assert_array_equal, more, resized)
    jax.tree.map(np.testing.assert_array_equal, less, state)
    with pytest.raises(ValueError, match="w/0: the state has.*pass the split_sizes"):
        jax.eval_shape(lambda s: optim.rescale_rank(s, x, 0.5), state)
    with pytest.raises(ValueError, match="cannot resize.*'w/0'.*to one of.*'w'"):
        whole = jax.eval_shape(scale_by_dion(0.5).init, x)
        jax.eval_shape(lambda s: optim.resize(s, whole), state)
    with pytest.raises(ValueError, match="w: Dion state has Q of w/0.*split_sizes"):
        jax.eval_shape(scale_by_dion(0.25).update, x, state)
    with pytest.raises(ValueError, match="w/2: Dion state has no Q.*split_sizes"):
        short = state._replace(q={"w": state.q["w"][:2]})
        jax.eval_shape(low.update, x, short)
    with pytest.raises(ValueError, match="w/2: Dion state has Q of w/2, expected none"):
        two = dion_direction(0.25, split_sizes=(12, 8))
        jax.eval_shape(two.update, x, state._replace(
            q={"w": (*jax.eval_shape(two.init, x).q["w"], state.q["w"][2])}))  # fmt: skip


BAD = {
    "sum": ((12, 4), ValueError, r"w: split_sizes \(12, 4\) sum to 16, expected 20"),
    "float": ((12.0, 4.0, 4.0), TypeError, "w: split_sizes must be a tuple of integers"),
    "bool": ((True, 19), TypeError, "w: split_sizes must be a tuple of integers"),
    "number": (20, TypeError, "w: split_sizes must be a tuple .*got 20"),
    "zero": ((20, 0), ValueError, "w: split_sizes must be at least 1"),
    "missing": ({"v": (12, 8)}, ValueError, "split_sizes has no entry for the parameter"),
    "text": (lambda path, leaf: "qkv", TypeError, "w: split_sizes must be a tuple"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    sizes, error, match = BAD[case]
    for make in (scale_by_dion, scale_by_muon, scale_by_dion2):
        with pytest.raises(error, match=match):
            jax.eval_shape(make(split_sizes=sizes).init, {"w": np.ones((8, 20))})


def test_report_and_config():
    shapes = {"qkv": {"kernel": jax.ShapeDtypeStruct((8, 20), "float32")}}
    table = optim.routing_table(shapes, split_sizes=(12, 4, 4))
    assert table[0].reason == "matrix of 8 x 20, in blocks of 8 x 12, 8 x 4, 8 x 4"
    config = {"name": "dion", "lr": 0.1, "rank_fraction": 0.5}
    tx = optim.from_config(config, 2, split_sizes=(12, 4, 4))
    state = jax.eval_shape(tx.init, shapes)
    ends = [path.rpartition("/q/")[2] for path, _ in named_leaves(state)[0]]
    assert {"qkv/kernel/0", "qkv/kernel/1", "qkv/kernel/2"} <= set(ends)
