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


def test_an_overlap_of_whole_windows_is_refused_before_training():
    config = load_config("dion:smoke", ["--config.data.overlap=1.0"])
    grid = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    with pytest.raises(ValueError, match=r"config.data.overlap .* \[0, 1\), got 1.0"):
        language_model.study("dion", config, language_model.abstract(config), grid)


def test_the_overlap_of_the_config_is_what_a_score_has_before_it():
    """A loss that counts the tokens before the first scored one, one batch at a time."""
    stream = np.arange(40 * 64, dtype=np.uint16) % 200
    corpus = text.Corpus("test", [stream], [stream], True)

    def loss(params, batch, key):
        before = jnp.argmax(batch["weight"] > 0, axis=1)
        return params + before.max().astype(jnp.float32), {"weight": jnp.float32(1)}

    grid = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    method = Method(None, loss, None)
    state = State(0, jnp.float32(0), (), (), 0)
    # The first window scores all of its 64 tokens, each other what is new in it.
    for overlap, windows in ((0.25, 53), (0.5, 79)):
        fields = {"data.overlap": overlap, "data.eval_batch": 1, "data.context": 64}
        config = load_config(
            "dion:smoke", [f"--config.{k}={v}" for k, v in fields.items()]
        )
        nats = language_model._bits(config, corpus, grid, method, state, [stream])
        total = nats * np.log(2) * len(stream)
        assert total == pytest.approx((windows - 1) * 64 * overlap, rel=1e-6)
