"""A paper of the tests: the weights of a linear function, by gradient descent."""

import functools

import jax
import jax.numpy as jnp
import optax

from jaxpapers.method import gradient
from jaxpapers.method.protocol import WarmStart


def loss(params, batch, key):
    """Mean square error, with a little noise on the targets."""
    noise = 0.01 * jax.random.normal(key, batch["y"].shape)
    error = predict(params, (), batch) - batch["y"] - noise
    return jnp.square(error).mean(), {"worst": jnp.abs(error).max()}


def predict(params, extra, batch):
    """Values (B,)."""
    del extra
    return batch["x"] @ params["w"]


def init_params(key, batch):
    """Weights (8,)."""
    return {"w": jax.random.normal(key, batch["x"].shape[1:])}


def make(config, size=8):
    """Binds a config; ``size`` is a fact of the data."""
    if config.optim.lr <= 0:
        raise ValueError(f"optim.lr must be > 0, got {config.optim.lr}")
    assert size == 8
    method = gradient(
        init_params, loss, optax.sgd(config.optim.lr), predict=predict,
        rules=[("w$", jax.P("data"))],
    )  # fmt: skip
    if config.method.get("mined"):
        method = mining(method)
    if config.method.get("half"):
        # The second stage starts from half of the first one's weights.
        half = functools.partial(jax.tree.map, lambda w: w / 2)
        start = WarmStart(
            lambda shapes: {"params": shapes.params},
            lambda state, fields: state._replace(params=half(fields["params"])),
        )
        method = method._replace(warm_start=start)
    return method


def mining(method):
    """The method with the examples that a refresh chose in its extra state."""

    def init(key, batch):
        state = method.init(key, batch)
        return state._replace(extra={"chosen": jnp.zeros(16, jnp.int32)})

    def update(state, batch):
        new, metrics = method.update(state._replace(extra=()), batch)
        return new._replace(extra=state.extra), metrics

    return method._replace(init=init, update=update)
