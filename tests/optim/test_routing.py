"""Routes by names and shapes, their reasons, and what warns."""

import warnings

import jax
import numpy as np
import pytest

from jaxpapers.optim import DimensionNumbers, dion, muon, route, routing_table
from jaxpapers.optim.routing import table

V, D = 96, 8


def tree(**shapes):
    """{"a/b": shape} as a nested dict of shapes."""
    out = {}
    for path, shape in shapes.items():
        *parents, leaf = path.split("/")
        node = out
        for p in parents:
            node = node.setdefault(p, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, np.float32)
    return out


MODEL = tree(**{
    "wte/embedding": (V, D), "wpe/embedding": (4 * D, D), "ln_f/scale": (D,),
    "layers/0/up/kernel": (D, 4 * D), "layers/0/down/kernel": (4 * D, D),
    "last/kernel": (D, V),
})  # fmt: skip


def groups(params, *args, **kwargs):
    return {r.path: r.group for r in routing_table(params, *args, **kwargs)}


def test_a_side_of_the_vocabulary_is_a_head():
    rows = {r.path: r for r in routing_table(MODEL)}
    assert rows["last/kernel"].group == "head"
    assert rows["last/kernel"].reason == "a side of 96, the rows of wte/embedding"
    # Rows of positions are no vocabulary.
    assert rows["layers/0/up/kernel"][2:] == ("dion", "matrix of 8 x 32")
    assert route(MODEL)["last"]["kernel"] == "head"


def test_hidden_sides_may_equal_the_vocabulary():
    # A byte-level model: both matrices of the MLP have a side of 4 D = V.
    small = tree(**{
        "embed/embedding": (4 * D, D), "up/kernel": (D, 4 * D), "down/kernel": (4 * D, D),
        "square/kernel": (4 * D, 4 * D), "layers/up/kernel": (D, 4 * D),
    })  # fmt: skip
    assert set(groups(small).values()) == {"embedding", "dion"}
    # Several heads are much wider than they are high.
    several = tree(**{
        "embed/embedding": (V, D), "a/kernel": (D, V), "b/kernel": (V, D),
        "layers/c/kernel": (D, V),
    })  # fmt: skip
    got = groups(several)
    assert [got[k] for k in ("a/kernel", "b/kernel", "layers/c/kernel")] == [
        "head", "head", "dion",
    ]  # fmt: skip


def test_the_vocabulary_can_be_given():
    plain = tree(**{"first/kernel": (V, D), "mid/kernel": (D, D), "fc/kernel": (D, V)})
    assert set(groups(plain).values()) == {"dion"}
    assert groups(plain, vocabulary=V) == {
        "first/kernel": "head", "mid/kernel": "dion", "fc/kernel": "head",
    }  # fmt: skip
    assert route(plain, vocabulary=V)["fc"]["kernel"] == "head"


def test_the_report_says_why_and_what_looks_like_a_vocabulary():
    params = MODEL | tree(**{"wide/kernel": (D, 5000), "cls/token": (1, D)})

    def numbers(path, leaf):
        excluded = path.startswith("layers/0/up") or len(leaf.shape) < 2
        return None if excluded else DimensionNumbers()

    report = routing_table(params, numbers)
    reasons = {r.path: r.reason for r in report}
    assert reasons["layers/0/up/kernel"] == "None in weight_dimension_numbers"
    assert reasons["wte/embedding"] == "named 'embedding'"
    assert reasons["ln_f/scale"] == "1-D"
    assert reasons["cls/token"] == "named 'token'"
    text = str(report).splitlines()
    assert text[0].split() == ["leaf", "shape", "group", "reason"]
    assert len(text) == 1 + len(report) + 1
    assert text[-1].startswith("hint: wide/kernel (8, 5000)") and "labels=" in text[-1]
    assert report.hints == (text[-1][len("hint: ") :],)


def test_given_labels_are_reported():
    labels = jax.tree.map(lambda _: "dion", MODEL)
    assert {(r.group, r.reason) for r in routing_table(MODEL, labels=labels)} == {
        ("dion", "labels=")
    }
    assert table(MODEL, labels)[0] == ("last/kernel", (D, V), "dion")


@pytest.mark.parametrize("option", ["tree", "function"])
def test_none_excludes_a_matrix(option):
    params = tree(**{"a/kernel": (8, 32), "b/kernel": (8, 16)})
    numbers = {"a": {"kernel": None}, "b": {"kernel": DimensionNumbers()}}
    if option == "function":
        # A function of (path, leaf).
        numbers = {"a/kernel": None, "b/kernel": DimensionNumbers()}.get
    assert groups(params, numbers) == {"a/kernel": "scalar", "b/kernel": "dion"}
    tx = dion(0.1, 0.5, weight_dimension_numbers=numbers)
    state = jax.eval_shape(tx.init, params)
    assert [x.shape for x in jax.tree.leaves(state.inner_states["dion"])][1:] == [
        (8, 16), (8, 4),
    ]  # fmt: skip


def warned(f):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        f()
    return [str(w.message) for w in seen]


@pytest.mark.parametrize("make", [dion, muon])
def test_what_is_left_out_is_said_once(make):
    params = tree(**{"conv/kernel": (3, 3, 8, 16), "layers/kernel": (2, 8, 16)})

    def train(numbers):
        tx = make(0.1, weight_dimension_numbers=numbers)
        state = jax.eval_shape(tx.init, params)
        for _ in range(2):
            jax.eval_shape(lambda g, s: tx.update(g, s, g), params, state)

    (text,) = warned(lambda: train(None))
    assert "2 parameter(s)" in text and "'conv/kernel' first" in text
    stacked = DimensionNumbers(1, 2)
    (text,) = warned(lambda: train(lambda p, x: stacked if x.ndim == 3 else None))
    assert "1 parameter(s)" in text and "'conv/kernel' first" in text
    tree_of = {"conv": {"kernel": None}, "layers": {"kernel": stacked}}
    assert warned(lambda: train(tree_of)) == []


def test_heads_of_stacked_layers_and_empty_leaves():
    params = tree(**{"layers/up/w": (2, 8, 4), "layers/x/w": (2, 8, 1), "e/w": (0, 4)})
    rows = routing_table(params, DimensionNumbers(-2, -1))
    assert [r[2:] for r in rows] == [
        ("scalar", "a side of its matrix is at most 1"),
        ("dion", "2 matrices of 8 x 4"),
        ("scalar", "a side of its matrix is at most 1"),
    ]
