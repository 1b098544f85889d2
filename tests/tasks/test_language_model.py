"""Bits of a language model that has diverged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers.config import load_config
from jaxpapers.data import text
from jaxpapers.method import Method, State
from jaxpapers.tasks import language_model


def test_batches_without_a_finite_code_length_are_named():
    config = load_config("dion:smoke", ["--config.data.eval_batch=2"])
    stream = np.arange(6 * config.data.context, dtype=np.uint16) % 200
    corpus = text.Corpus("test", [stream], [stream], True)

    def loss(params, batch, key):
        weight = batch["weight"].sum()
        first = (batch["tokens"][0, 0] == text.SEPARATOR) & (weight > 0)
        return jnp.where(first, params, 1.0), {"weight": weight}

    grid = meshes.make_mesh({"data": 1}, jax.devices()[:1])

    def bits(value):
        state = State(0, jnp.float32(value), (), (), 0)
        method = Method(None, loss, None)
        return language_model._bits(config, corpus, grid, method, state, [stream])

    assert bits(1.0) == pytest.approx(1 / np.log(2))
    with pytest.warns(RuntimeWarning, match="1 of . code lengths of batches .*: 0;"):
        assert np.isnan(bits(np.nan))
