"""Axes that do not divide over a mesh: JAX has no such arrays, only values inside jit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim import scale_by_dion, scale_by_dion2, scale_by_muon
from tests.programs import together

MAKERS = {
    "dion": functools.partial(scale_by_dion, 0.25, orthogonalize="cqr2"),
    "normuon": functools.partial(scale_by_muon, b2=0.9),
    "dion2": functools.partial(scale_by_dion2, 0.25),
}
A, X = (
    np.random.default_rng(n).normal(size=(18, n)).astype(np.float32) for n in (18, 32)
)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_jax_has_no_uneven_arrays(kind, make_mesh):
    """What docs/dion.md says; if it changes, the optimizers have to pad."""
    mesh = make_mesh((4, 2), kind)
    where = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="18"):
            jax.device_put(X, where)
        with pytest.raises(ValueError, match="18"):
            jax.jit(lambda x: x, out_shardings=where)(X)
        with pytest.raises(ValueError, match="18"):
            jax.jit(lambda x: x, in_shardings=where)(X)


@pytest.mark.parametrize("name", MAKERS)
def test_an_uneven_sharding_is_refused_by_name(name, make_mesh):
    match = (
        r"layer/w: axis 0 of shape \(18, 32\) does not divide over .*data.* of size 4"
    )
    with jax.set_mesh(make_mesh((4, 2))):
        tx = MAKERS[name](sharding=P("data"))
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(tx.init, {"layer": {"w": jnp.asarray(X)}})


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "dion" else pytest.mark.matrix) for n in MAKERS],
)
def test_a_gradient_that_is_split_unevenly_inside_jit(name, make_mesh):
    """The step takes it to the momentum's sharding, and its padding counts nowhere."""
    mesh = make_mesh((4, 2))
    tx = MAKERS[name]()
    want, _ = together(lambda x: tx.update({"w": x}, tx.init({"w": x})), A @ X)
    uneven, even = (NamedSharding(mesh, spec) for spec in (P("data"), P(None, "data")))
    tx = MAKERS[name](sharding=even)

    @jax.jit
    def update(x):
        state = tx.init({"w": x})
        g = jax.lax.with_sharding_constraint(A @ x, uneven)
        return tx.update({"w": g}, state)[0]["w"]

    with jax.set_mesh(mesh):
        x = jax.device_put(X, even)
        text = update.lower(x).compile().as_text()
        got = update(x)
    # Five rows on a device, of which the last has three.
    assert "f32[5,32]" in text
    assert got.sharding.is_equivalent_to(even, 2)
    np.testing.assert_allclose(got, want["w"], atol=5e-5)
