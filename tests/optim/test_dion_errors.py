"""Wrong input is refused with what was got, what was expected and what to do."""

import jax
import numpy as np
import pytest

from jaxpapers.optim import DimensionNumbers, dion, scale_by_dion
from jaxpapers.optim.layout import make_layout

W = {"w": np.ones((8, 4), np.float32)}


def state_of(tx):
    """Shapes are enough: what is refused is refused before anything is computed."""
    return jax.eval_shape(tx.init, W)


def update(tx, grads, state=None):
    return jax.eval_shape(tx.update, grads, state or state_of(tx))


OPTIONS = {
    "learning rate": (dict(learning_rate=-1.0), "learning_rate must be in .*got -1.0"),
    "scalar learning rate": (
        dict(scalar_learning_rate=-1.0),
        "scalar_learning_rate must be in",
    ),
    "mu below 0": (dict(mu=-0.1), "mu must be in .*got -0.1"),
    "mu above 1": (dict(mu=1.1), "mu must be in .*got 1.1"),
    "eps": (dict(eps=-1e-8), "eps must be in"),
    "beta 1": (dict(scalar_b1=1.0), r"scalar_b1 must be in \[0, 1\), got 1.0"),
    "beta 2": (dict(scalar_b2=-0.5), "scalar_b2 must be in .*got -0.5"),
    "weight decay": (dict(weight_decay=-0.01), "weight_decay must be in .*got -0.01"),
    "power iterations": (dict(power_iters=0), "power_iters must be .*got 0"),
    "half an iteration": (dict(power_iters=1.5), "power_iters must be .*got 1.5"),
    "noise guard": (dict(noise_guard=1.0), "noise_guard must be in"),
    "orthogonalize": (dict(orthogonalize="svd"), "orthogonalize must be one of.*'svd'"),
    "right factor": (dict(right_factor="qr"), "right_factor must be one of.*'qr'"),
    "batch": (dict(batch="all"), "batch must be one of.*'all'"),
    "scale": (dict(scale="muon"), "scale must be one of.*'muon'"),
    "scalar": (dict(scalar="sgd"), "scalar must be one of.*'sgd'"),
    "unknown sharding": (dict(unknown_sharding="ask"), "unknown_sharding must be one"),
    "rank 0": (dict(rank_fraction=0.0), r"w: rank_fraction must be in \(0, 1\], got 0"),
    "rank above 1": (dict(rank_fraction=1.5), "w: rank_fraction must be .*got 1.5"),
    "rank below 0": (dict(rank_fraction=-0.5), "w: rank_fraction must be .*got -0.5"),
    "multiple of 0": (dict(rank_multiple_of=0), "rank_multiple_of must be .*got 0"),
    "multiple of 1.5": (dict(rank_multiple_of=1.5), "rank_multiple_of must be.*1.5"),
    "p_side": (dict(p_side="left"), "p_side must be one of.*'left'"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    options, match = OPTIONS[name]
    with pytest.raises(ValueError, match=match):
        dion(**{"learning_rate": 0.1, **options}).init(W)


@pytest.mark.parametrize("shape", [(), (8,), (2, 8, 4)])
def test_leaf_that_is_no_matrix(shape):
    match = rf"w: nothing says which axes of a {len(shape)}-D parameter .*pass "
    with pytest.raises(ValueError, match=match):
        scale_by_dion().init({"w": np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    "numbers, match",
    [
        ((0, 0), "w: reduction and output axes .*disjoint, got"),
        (((0, 1), 1), "w: reduction and output axes .*disjoint, got"),
        (((), 1), "w: reduction and output axes .*non-empty"),
        (((0, 0), 1), "w: reduction_axis names an axis twice"),
        ((0, 2), r"w: output_axis 2 is out of range for shape \(8, 4\)"),
        ((-3, 1), "w: reduction_axis -3 is out of range"),
    ],
)
def test_dimension_numbers(numbers, match):
    with pytest.raises(ValueError, match=match):
        scale_by_dion(weight_dimension_numbers=DimensionNumbers(*numbers)).init(W)


def test_empty_leaf():
    with pytest.raises(ValueError, match=r"w: parameter has no elements.*\(0, 4\)"):
        make_layout("w", (0, 4))


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
def test_leaf_that_is_not_real(dtype):
    with pytest.raises(TypeError, match=f"w: Dion needs real .*got {dtype}.*masked"):
        scale_by_dion().init({"w": np.ones((8, 4), dtype)})


def test_gradient_that_is_not_real():
    tx = scale_by_dion()
    with pytest.raises(TypeError, match="w: Dion needs real"):
        update(tx, {"w": np.ones((8, 4), np.complex64)})


@pytest.mark.parametrize("grads", [{"v": W["w"]}, {**W, "v": W["w"]}, {}, [W["w"]]])
def test_gradients_of_another_tree(grads):
    tx = scale_by_dion()
    with pytest.raises(ValueError, match="gradients and state have different struct"):
        update(tx, grads)


@pytest.mark.parametrize("shape", [(4, 8), (8, 5), (2, 8, 4)])
def test_gradient_of_another_shape(shape):
    tx = scale_by_dion()
    match = r"w: gradient has shape .*the state's momentum \(8, 4\); call init"
    with pytest.raises(ValueError, match=match):
        update(tx, {"w": np.ones(shape, np.float32)})


def test_state_of_another_rank():
    state = state_of(scale_by_dion(0.5))
    match = (
        r"w: Dion state has Q of shape \(4, 2\), expected \(4, 4\) for rank_fraction"
    )
    with pytest.raises(ValueError, match=match):
        update(scale_by_dion(1.0), W, state)
    with pytest.raises(ValueError, match="made with another rank or other dimension"):
        state = state_of(scale_by_dion(0.5, p_side="output"))
        update(scale_by_dion(0.5, p_side="input"), W, state)


def test_missing_params_with_weight_decay():
    tx = dion(0.1)
    with pytest.raises(ValueError, match="params"):
        update(tx, W)


def test_sharding_of_another_kind():
    with pytest.raises((TypeError, ValueError), match="w"):
        scale_by_dion(sharding={"w": "data"}).init(W)
    with pytest.raises(ValueError, match="sharding has no entry for the parameter 'w'"):
        scale_by_dion(sharding={"v": None}).init(W)


@pytest.mark.parametrize("name", ["momentum_dtype", "q_dtype", "communication_dtype"])
def test_dtypes_are_real_numbers(name):
    with pytest.raises(ValueError, match=f"{name} must be a real floating-point dtype"):
        scale_by_dion(**{name: np.int8})


@pytest.mark.matrix
def test_repeated_iterations_keep_the_scale():
    g = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    tx = scale_by_dion(0.25, power_iters=3, eps=0.0)
    direction = jax.jit(lambda g: tx.update({"w": g}, tx.init({"w": g}))[0]["w"])
    want = direction(g)
    for scale in (1e-20, 1e20):
        np.testing.assert_allclose(direction(g * np.float32(scale)), want, atol=2e-5)
