"""Every paper's loss and predictions from a notebook: default options, no config file.

A row per paper: a function and random arrays; its results are a loss, its metrics, and
predictions or samples.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.papers import defer, dien, din, dion, dpok, poem, rocket, sft_pg, sim
from jaxpapers.papers import score_wasserstein as sw
from tests import clicks
from tests.programs import KEY, params_like, together

VOCABULARIES = {"item_vocab": clicks.ITEMS, "cate_vocab": clicks.CATES,
                "user_vocab": clicks.USERS}  # fmt: skip
FORBIDDEN: list[str] = []


def _audit(event: str, args: tuple) -> None:
    if event == "open" and FORBIDDEN and "configs" in Path(str(args[0])).parts:
        raise PermissionError(f"{FORBIDDEN[0]} reads {args[0]}")


sys.addaudithook(_audit)


def click(paper, net):
    """A click model's loss, and its scores of three candidates."""

    def init(key):
        params = paper.init(key, net)
        return params, statistics(params)

    def statistics(params):
        return paper.statistics(params, *([net] if paper is rocket else []))

    def run(params, extra, x, many):
        key = jax.random.key(0)
        value, (metrics, extra) = paper.loss(params, extra, x, key, net=net)
        return value, metrics, paper.predict(params, extra, many, net=net)

    batches = clicks.batch(times=True), clicks.batch(times=True, candidates=3)
    return run, (*params_like(init, KEY), *batches)


def delayed_feedback():
    """DEFER's loss and predictions with the paper's network on Criteo's features."""
    net, rng = defer.Net(), np.random.default_rng(0)
    x = [rng.integers(0, size, 4) for size in (*net.bins, *net.buckets)]
    batch = {"x": np.stack(x, 1).astype("i"), "label": np.array([1, 0, 0, 1], "f"),
             "weight": np.ones(4, "f")}  # fmt: skip
    params = params_like(defer.network(net).init, KEY, batch)

    def run(params, batch):
        value, metrics = defer.loss(params, batch, net=net)
        return value, metrics, defer.predict(params, (), batch, net=net)

    return run, (params, batch)


def policy():
    """DPOK's loss with a reward in JAX, and an image for each prompt."""
    model = dpok.model(reward_fn=lambda images, prompt: images.mean((1, 2, 3)))
    prompt = np.arange(4, dtype=np.int32)
    batch = {"tokens": prompt + 1, "prompt": prompt}

    def run(params, batch):
        key = jax.random.key(0)
        value, metrics = dpok.loss(params, batch, key, model=model)
        return value, metrics, dpok.sampler(params, key, batch["tokens"], model=model)

    return run, (params_like(lambda key: dpok.init_params(key, model), KEY), batch)


def few_step_sampler():
    """SFT-PG's losses and samples with the swiss roll's nets."""
    model = sft_pg.model()
    x = np.random.default_rng(0).normal(size=(4, 2)).astype("f")

    def run(params, x):
        key = jax.random.key(0)
        value, metrics = sft_pg.loss(params, {"x": x}, key, model=model)
        return value, metrics, sft_pg.sampler(params, key, (4, 2), model=model)

    return run, (params_like(lambda key: sft_pg.init_params(key, model), KEY), x)


def score_model():
    """The score model's loss and samples of four clusters."""
    model = sw.model()
    x = np.random.default_rng(0).normal(size=(4, 2)).astype("f")

    def run(params, x):
        key = jax.random.key(0)
        value, metrics = sw.loss(params, {"x": x}, key, model=model)
        return value, metrics, sw.sampler(params, key, x, model=model)

    return run, (params_like(lambda key: sw.init_params(key, model), KEY), x)


def detector():
    """POEM's loss on images and outliers, and logits with features."""
    net, rng = poem.Net(model="conv"), np.random.default_rng(0)
    options = poem.Options()
    batch = {"image": rng.uniform(0, 1, (4, 32, 32, 3)).astype("f"),
             "outlier": rng.uniform(0, 1, (4, 1, 32, 32, 3)).astype("f"),
             "label": np.array([0, 1, 9, 0], "i")}  # fmt: skip
    params = params_like(lambda key: poem.init(key, net), KEY)

    def run(params, batch):
        extra = {"net": poem.statistics(params, net)}
        key = jax.random.key(0)
        value, (metrics, extra) = poem.loss(
            params, extra, batch, key, net=net, options=options
        )
        return value, metrics, poem.predict(params, extra, batch, net=net)

    return run, (params, batch)


def language_model():
    """The next-token loss, and a continuation of the first tokens."""
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)

    def init(key):
        return dion.network(dion.Net()).init(key, jnp.asarray(tokens))["params"]

    def run(params, batch):
        key = jax.random.key(0)
        value, metrics = dion.loss(params, batch, key)
        return value, metrics, dion.sampler(params, key, batch["tokens"], length=3)

    return run, (params_like(init, KEY), {"tokens": tokens})


ROWS = {
    "dion": language_model,
    "din": lambda: click(din, din.Net(**VOCABULARIES)),
    "dien": lambda: click(dien, dien.Net(**VOCABULARIES)),
    "sim": lambda: click(sim, sim.Net(**VOCABULARIES)),
    "rocket": lambda: click(rocket, rocket.DinNet(**VOCABULARIES)),
    "defer": delayed_feedback,
    "dpok": policy,
    "sft_pg": few_step_sampler,
    "score_wasserstein": score_model,
    "poem": detector,
}


@pytest.mark.parametrize("name", ROWS)
def test_it_needs_no_config(name):
    FORBIDDEN.append(name)
    try:
        run, arrays = ROWS[name]()
        found = together(run, *arrays)
    finally:
        FORBIDDEN.clear()
    value, metrics, outputs = found
    assert np.shape(value) == () and metrics
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert any(np.ptp(x) for x in jax.tree.leaves(outputs))


@pytest.mark.matrix
def test_residual_nets_of_the_paper_take_images():
    """By shapes: 40 layers take a minute to compile."""
    net = rocket.WrnNet()
    batch = {"image": np.zeros((2, 32, 32, 3), "f"), "label": np.zeros(2, "i")}

    def run(key, batch):
        params = rocket.init(key, net)
        extra = rocket.statistics(params, net)
        value, _ = rocket.loss(params, extra, batch, key, net=net)
        return value, rocket.predict(params, extra, batch, net=net)

    value, logits = jax.eval_shape(run, KEY, batch)
    assert value.shape == () and logits.light.shape == logits.booster.shape == (2, 10)


def test_reading_a_config_would_be_noticed():
    FORBIDDEN.append("it")
    try:
        with pytest.raises(PermissionError, match="it reads"):
            open(Path("configs") / "din.py")
    finally:
        FORBIDDEN.clear()
