"""The same leaf has one path, in the boxes and modules of every library."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxpapers.optim import DimensionNumbers, dion, muon, normuon, route, scale_by_dion
from jaxpapers.optim.paths import named_leaves, per_leaf, with_leaves
from tests.programs import together

WI, WO = np.ones((2, 8, 16), np.float32), np.ones((16, 8), np.float32)
PLAIN = {"layers": {"wi": WI}, "wo": WO}
PATHS = ["layers/wi", "wo"]


class Layers(NamedTuple):
    wi: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["layers", "wo"], meta_fields=["name"]
)
@dataclasses.dataclass
class Module:
    """Keys and calls like an equinox module."""

    layers: Any
    wo: Any
    name: str = "net"

    def __call__(self, *args):
        raise AssertionError("a tree of values was called")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"]
)
@dataclasses.dataclass
class NamedArray:
    """Keys like a haliax array."""

    array: Any
    axes: tuple = ("in", "out")


def nnx_state(wi=WI, wo=WO):
    return nnx.State({"layers": {"wi": nnx.Param(wi)}, "wo": nnx.Param(wo)})


FORMS = {
    "dict": PLAIN,
    "nnx": nnx_state(),
    "linen": {"layers": {"wi": nn.Partitioned(WI, (None, "a", None))}, "wo": WO},
    "logical": {"layers": {"wi": WI}, "wo": nn.LogicallyPartitioned(WO, ("x", "y"))},
    "module": Module(Layers(WI), NamedArray(WO)),
    "haiku": {"layers": {"wi": WI}, "wo": WO},
}


@pytest.mark.parametrize("form", FORMS)
def test_one_path_per_leaf(form):
    named, treedef = named_leaves(FORMS[form])
    assert [path for path, _ in named] == PATHS
    assert [x.shape for _, x in named] == [WI.shape, WO.shape]
    again = treedef.unflatten([x for _, x in named])
    assert jax.tree.structure(again) == jax.tree.structure(FORMS[form])


def test_a_layer_called_value_keeps_its_name():
    attention = Module({"value": {"kernel": WO}, "key": {"kernel": WO}}, None)
    assert [p for p, _ in named_leaves(attention)[0]] == [
        "layers/key/kernel", "layers/value/kernel",
    ]  # fmt: skip
    assert [p for p, _ in named_leaves({"value": WO})[0]] == ["value"]
    layer = functools.partial(jax.tree.map, lambda x: x, is_leaf=lambda x: x is WO)
    assert [p for p, _ in named_leaves(layer({"a": {"value": WO}}))[0]] == ["a/value"]


@pytest.mark.parametrize("form", FORMS)
def test_options_match_whatever_has_boxes(form):
    values = [DimensionNumbers(1, 2), None]
    # The option in the form of FORMS[form], the parameters in any.
    option = named_leaves(FORMS[form])[1].unflatten(values)
    for params in FORMS.values():
        got = route(params, option)
        assert jax.tree.structure(got) == jax.tree.structure(params)
        assert jax.tree.leaves(got) == ["dion", "scalar"]
        labels = named_leaves(FORMS[form])[1].unflatten(["scalar", "dion"])
        state = jax.eval_shape(dion(0.1, labels=labels).init, params)
        q = state.inner_states["dion"].inner_state[0].q
        assert [p for p, _ in named_leaves(q)[0]] == ["wo"]


def test_entries_of_a_node_are_those_of_its_leaves():
    named = [("a/b/c", 0), ("a/d", 0), ("e", 0)]
    option = {"a": "x", "e": "y"}
    assert per_leaf(option, named, lambda x: isinstance(x, str), "o") == ["x", "x", "y"]
    with pytest.raises(ValueError, match="no entry for the parameter 'e'"):
        per_leaf({"a": "x"}, named, lambda x: isinstance(x, str), "o")


def test_options_of_callable_modules_are_trees():
    params = Module(Layers(WI), WO)
    options = {
        "labels": Module("scalar", "dion"),
        "weight_decay_mask": Module(False, True),
        "rank_fraction": Module(0.5, 0.25),
        "weight_dimension_numbers": Module(None, DimensionNumbers()),
    }
    tx = dion(1.0, weight_decay=0.5, **options)
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.leaves(state.inner_states["dion"])[-1].shape == (8, 2)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = together(lambda g, p: tx.update(g, tx.init(p), p), zeros, params)
    np.testing.assert_allclose(updates.wo, -0.5 * WO)
    np.testing.assert_allclose(updates.layers.wi, 0)


def test_muon_dimension_numbers_are_ours():
    m = optax.contrib.MuonDimensionNumbers(1, 2)
    params = {"k": jnp.ones((4, 8, 16)), "b": jnp.ones((4, 8))}
    for option in (
        {"k": m, "b": None}, {"k": m, "b": optax.MaskedNode()},
        lambda path, leaf: m if leaf.ndim == 3 else None,
    ):  # fmt: skip
        assert route(params, option) == {"k": "dion", "b": "scalar"}
    assert jax.eval_shape(scale_by_dion(0.5, weight_dimension_numbers=m).init, {
        "k": params["k"]}).q["k"].shape == (4, 8, 4)  # fmt: skip
    with pytest.raises(
        TypeError, match="b: weight_dimension_numbers must be Dim.*'ab'"
    ):
        route(params, lambda path, leaf: "ab")
    with pytest.raises(ValueError, match="b: .* is None for this parameter.*masked"):
        scale_by_dion(weight_dimension_numbers={"k": m, "b": None}).init(params)


def test_boxes_of_other_shapes_name_their_own_axes():
    layers = {
        "a": nn.Partitioned(WI, (None, "data", "model")),
        "b": nnx.Param(WI, out_sharding=(None, "data", "model"), eager_sharding=False),
        "c": NamedArray(WO),
        "d": nn.Partitioned(optax.MaskedNode(), ("data",)),
        "e": WO,
    }
    short = np.ones((2, 8, 4))
    new = with_leaves(layers, [short] * 4, [lambda s: P(s[0], s[2], None)] * 4)
    assert new["a"].names == (None, "model", None) and new["a"].value is short
    assert new["b"].get_metadata()["out_sharding"] == (None, "model", None)
    assert isinstance(new["b"], nnx.Param) and new["b"].get_value() is short
    # What no metadata describes has no box; what holds nothing stays.
    assert new["c"] is short and new["d"] == layers["d"] and new["e"] is short


@pytest.mark.parametrize("make", [dion, muon, normuon])
def test_a_number_is_a_leaf_and_what_has_no_dtype_is_named(make):
    params = {"t": 2.0, "w": np.ones((4, 8))}
    tx = make(0.5, weight_decay=0.0)
    updates, _ = together(lambda: tx.update(params, tx.init(params), params))
    np.testing.assert_allclose(updates["t"], -0.5, rtol=1e-5)
    assert updates["w"].dtype == np.float32
    with pytest.raises(TypeError, match="t: .*got str.*masked"):
        tx.init({"t": "text"})
    with pytest.raises(TypeError, match="t: .*got int32"):
        tx.init({"t": 2})


def test_gradients_of_other_parameters_are_named():
    tx = scale_by_dion(0.5)
    state = jax.eval_shape(tx.init, {"a": WO, "b": WO})
    with pytest.raises(ValueError, match=r"missing \['b'\], unknown \['c'\]"):
        tx.update({"a": WO, "c": WO}, state)
