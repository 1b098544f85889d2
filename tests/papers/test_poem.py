"""POEM: the rounds of mining, the batches' statistics, and its contract."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import ood
from jaxpapers.ops import posterior as blr
from jaxpapers.papers import poem
from tests.contract import Contract
from tests.programs import KEY, params_like, together

CONTRACT = Contract(
    small={
        "data.images": 32, "data.batch": 8, "data.eval_batch": 64, "net.norm": "group",
        "net.hidden": (8, 8, 8), "method.pool": 64, "method.pool_batch": 32,
        "optim.momentum": 0.0, "optim.nesterov": False, "optim.weight_decay": 0.0,
        "optim.schedule": "constant", "optim.lr": 0.1,
    },
    refused={
        "method.prior": (0.0, "method.prior must be > 0"),
        "method.noise": (-1.0, "method.noise must be > 0"),
        "method.select": ("best", "method.select"),
        "method.loss": ("extra_class", "needs it: got net.outlier_class=False"),
        "method.pool": (16, "method.pool must be at least method.pool_batch"),
        "net.classes": (1, "net.classes"),
        "net.std": ((0.0,), "net.std"),
    },
)  # fmt: skip

NET = poem.Net(
    model="conv",
    size=8,
    channels=1,
    hidden=(4, 4, 6),
    classes=3,
    mean=(0.0,),
    std=(1.0,),
)
OPTIONS = poem.Options(m_in=-3.0, m_out=-1.0, augment=False)


def images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32)


def drawn(net=NET):
    params = params_like(lambda key: poem.init(key, net), KEY)
    return params, jax.eval_shape(lambda p: poem.statistics(p, net), params)


def fresh(statistics):
    """Moving statistics of mean 0 and variance 1."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.full(x.shape, float("var" in str(path[-1])), x.dtype),
        statistics,
    )


def test_the_loss_is_that_of_one_pass_over_both_halves():
    params, shapes = drawn()
    state = fresh(shapes)
    image, outlier = images(6, 8, 8, 1), images(6, 2, 8, 8, 1, seed=1)
    labels = np.arange(6) % 3

    def body(params, state, image, outlier):
        label = jnp.asarray(labels)
        batch = {"image": image, "label": label, "outlier": outlier}
        extra = {"net": state, "round": jnp.int32(3)}
        value, (terms, new) = poem.loss(
            params, extra, batch, jax.random.key(0), net=NET, options=OPTIONS
        )
        both = jnp.concatenate([image, outlier.reshape(-1, 8, 8, 1)])
        logits, z, moved = poem.apply(params, state, both, net=NET, train=True)
        by_hand, _ = ood.energy_loss(
            logits[:6], label, logits[6:], m_in=-3.0, m_out=-1.0, beta=0.1
        )
        plain = poem.loss(
            params, extra, batch, jax.random.key(0), net=NET,
            options=dataclasses.replace(OPTIONS, select="none"),
        )[0]  # fmt: skip
        alone = poem.apply(params, state, image, net=NET, train=True)[0]
        return value, terms, new, by_hand, moved, z, plain, alone

    value, terms, new, by_hand, moved, z, plain, alone = together(
        body, params, state, image, outlier
    )
    assert value == pytest.approx(by_hand, rel=1e-5)
    hinges = 0.1 * (terms["in_energy"] + terms["out_energy"])
    assert value == pytest.approx(terms["ce"] + hinges, rel=1e-6)
    assert new["round"] == 3 and (z >= 0).all()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        new["net"], moved,
    )  # fmt: skip
    log_p = alone - np.log(np.exp(alone).sum(1, keepdims=True))
    assert plain == pytest.approx(-log_p[np.arange(6), labels].mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "extra_class"])
def test_other_losses_of_outliers(kind):
    """Cross-entropy to equal probabilities, or in a class of the outliers' own."""
    extra_class = kind == "extra_class"
    net = dataclasses.replace(NET, outlier_class=extra_class)
    options = dataclasses.replace(OPTIONS, loss=kind, exposure=0.7)
    params, shapes = drawn(net)
    state = fresh(shapes)
    image, outlier = images(6, 8, 8, 1), images(6, 2, 8, 8, 1, seed=1)
    labels = np.arange(6) % 3

    def body(params, state, image, outlier):
        batch = {"image": image, "label": jnp.asarray(labels), "outlier": outlier}
        value, (terms, _) = poem.loss(
            params, {"net": state}, batch, jax.random.key(0), net=net, options=options
        )
        both = jnp.concatenate([image, outlier.reshape(-1, 8, 8, 1)])
        logits = poem.apply(params, state, both, net=net, train=True)[0]
        return value, terms, logits, poem.detection_score(logits, options)

    value, terms, logits, score = together(body, params, state, image, outlier)
    logits = logits.astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert logits.shape == (18, 4 if extra_class else 3)
    out = -np.log(p[6:, 3] if extra_class else p[6:]).mean()
    ce = -np.log(p[np.arange(6), labels]).mean()
    assert value == pytest.approx(ce + 0.7 * out, rel=1e-5)
    assert terms["out_ce"] == pytest.approx(out, rel=1e-5)
    best = logits[:6, :3].argmax(1)
    assert terms["accuracy"] == pytest.approx((best == labels).mean())
    expected = np.log(1 / p[:, 3] - 1) if extra_class else np.log(p.max(1))
    np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-5)


def test_separate_batches_hide_what_sets_outliers_apart():
    """Three times as bright, nothing else: gone where each half has own statistics."""
    params, shapes = drawn()
    state, image = fresh(shapes), images(16, 8, 8, 1)

    def body(params, state, image):
        bright = 3 * image[:, None]
        dark = jnp.zeros_like(bright)
        forward = functools.partial(poem.forward, params, state, image, net=NET)
        return {
            "joint": forward(bright),
            "separate": forward(bright, batch_norm="separate"),
            "dark": forward(dark, batch_norm="separate"),
            "alone": poem.apply(params, state, image, net=NET, train=True),
        }

    got = together(body, params, state, image)
    inside, outside, moved = got["separate"]
    np.testing.assert_allclose(outside[:, 0], inside, rtol=1e-2, atol=1e-3)
    inside, outside, _ = got["joint"]
    assert np.abs(outside[:, 0] - inside).max() > 0.3
    # The moving statistics and the ID logits are those of ID images alone.
    for name in ("separate", "dark"):
        np.testing.assert_allclose(got[name][0], got["alone"][0], rtol=1e-5, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        moved, got["alone"][2],
    )  # fmt: skip


def test_ring_and_weights_of_seven_rounds():
    options = dataclasses.replace(OPTIONS, buffer=4)
    seen = [poem.buffer_slots(r, options) for r in range(8)]
    assert [len(x) for x in seen] == [0, 1, 2, 3, 4, 4, 4, 4]
    assert seen[7] == [(0, 4), (1, 5), (2, 6), (3, 3)]

    def body():
        extra = poem.start({}, NET, options, 5)
        for r in range(9):
            extra = poem.remember(extra, 10 * r + jnp.arange(5))
        return extra

    extra = together(body)
    assert extra["ring"][:, 0].tolist() == [80, 50, 60, 70]
    assert extra["shown"][:, 0].tolist() == [80, 10, 20, 30, 40, 50, 60, 70]
    assert extra["shown"][0, :6].tolist() == [80, 81, 82, 83, 84, -1]
    assert poem.latest(extra).tolist() == [80, 81, 82, 83, 84]


def test_draws_and_targets():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(50, 6)), rng.normal(size=50)
    reference = dataclasses.replace(OPTIONS, covariance="reference")
    noisy = dataclasses.replace(OPTIONS, shared_noise=True)
    stats = jax.tree.map(np.asarray, blr.Statistics(z.T @ z, z.T @ y, y @ y, 50.0))
    post = poem.solve(stats, OPTIONS)
    precision = z.T @ z / OPTIONS.noise + np.eye(6) / OPTIONS.prior
    expected = np.linalg.solve(precision, z.T @ y / OPTIONS.noise)
    assert post.mean.dtype == np.float64
    np.testing.assert_allclose(post.mean, expected, rtol=1e-9)
    key = jax.random.key(1)
    narrow, wide = (np.asarray(poem.draw(key, post, o)) for o in (OPTIONS, reference))
    ratio = (wide - expected) / (narrow - expected)
    np.testing.assert_allclose(ratio, OPTIONS.prior**0.5, rtol=1e-3)
    assert poem.targets("id", OPTIONS) == -3 and poem.targets("outlier", OPTIONS) == 3
    # One shift for all rows.
    both = [float(poem.targets(k, noisy, key)) for k in ("id", "outlier")]
    assert both[1] - both[0] == pytest.approx(6) and both[1] != 3
    with pytest.raises(ValueError, match="not finite"):
        poem.solve(stats._replace(moment=np.full(6, np.nan)), OPTIONS)


@pytest.mark.parametrize("scan", ["random", "consecutive"])
def test_a_round_scans_each_item_once(scan):
    options = dataclasses.replace(OPTIONS, pool=40, pool_batch=8, scan=scan)
    key = jax.random.key(0)
    got = [np.asarray(poem.scanned(key, r, size=100, options=options)) for r in (0, 1)]
    for items in got:
        assert len(set(items.tolist())) == 40 and (np.diff(items) > 0).all()
        assert 0 <= items.min() and items.max() < 100
    assert (got[0] != got[1]).any()
    if scan == "consecutive":
        steps = np.diff(np.concatenate([got[0], [got[0][0] + 100]]))
        assert sorted(steps)[-2:] == [1, 61]
    whole = poem.scanned(key, 0, size=30, options=options)
    assert np.asarray(whole).tolist() == list(range(30))


def test_mined_outliers_find_the_boundary_with_fewer():
    """Two Gaussians, a pool mostly far away: fewer errors than as many random ones."""
    rng = np.random.default_rng(0)
    d, n = 4, 40
    centre = np.full(d, 0.8)

    def features(x):
        return np.concatenate([x, np.ones((len(x), 1))], 1)

    ids = features(rng.normal(size=(400, d)) - centre)
    near = rng.normal(size=(200, d)) + centre
    pool = features(np.concatenate([rng.normal(size=(1800, d)) + 12 * centre, near]))
    test = features(rng.normal(size=(4000, d)) - centre)
    test_near = features(rng.normal(size=(4000, d)) + centre)

    def error(w):
        return ((test @ w > 0).mean() + (test_near @ w < 0).mean()) / 2

    def fitted(outliers):
        z = np.concatenate([ids, outliers])
        weight = np.repeat([n / len(ids), 1.0], [len(ids), len(outliers)])
        y = np.repeat([-3.0, 3.0], [len(ids), len(outliers)])
        stats = blr.Statistics(
            (z * weight[:, None]).T @ z, (z * weight[:, None]).T @ y, y @ y, 1.0
        )
        return poem.solve(stats, OPTIONS)

    errors = {"mined": [], "random": []}
    for seed in range(5):
        chosen = pool[np.random.default_rng(seed).choice(len(pool), n, replace=False)]
        errors["random"].append(error(fitted(chosen).mean))
        for r in range(4):
            w = np.asarray(
                poem.draw(jax.random.key(10 * seed + r), fitted(chosen), OPTIONS)
            )
            chosen = pool[np.argsort(np.abs(pool @ w))[:n]]
        errors["mined"].append(error(fitted(chosen).mean))
    best = error(np.append(centre, 0.0))
    excess = {k: np.mean(v) - best for k, v in errors.items()}
    assert excess["mined"] < 0.5 * excess["random"]


@pytest.mark.parametrize(
    "net, width",
    [
        (poem.Net(depth=10, growth=4, classes=4, size=8), 9),
        (poem.Net(model="wrn", depth=10, width=1, size=8, classes=4), 64),
        (NET, 6),
    ],
    ids=["densenet", "wrn", "conv"],
)
def test_nets(net, width):
    assert poem.features(net) == width
    x = jax.ShapeDtypeStruct((2, net.size, net.size, net.channels), jnp.float32)
    params = jax.eval_shape(lambda key: poem.init(key, net), KEY)
    state = jax.eval_shape(lambda p: poem.statistics(p, net), params)
    logits, z, new = jax.eval_shape(
        lambda *a: poem.apply(*a, net=net, train=True), params, state, x
    )
    assert logits.shape == (2, net.classes) and z.shape == (2, width)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def test_the_papers_net_has_342_features():
    assert poem.features(poem.Net()) == 342
    assert poem.features(poem.Net(model="wrn", depth=40)) == 128
    shapes = jax.eval_shape(lambda key: poem.init(key, poem.Net(init="poem")), KEY)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    # Huang et al. say 0.8 M for L = 100, k = 12.
    assert count == 769_162


def test_refuses():
    with pytest.warns(UserWarning, match="reversed"):
        poem.Options(m_in=-5.0, m_out=-25.0)
    with pytest.raises(ValueError, match=r"weights \(3,\) need features \(B, 3\)"):
        poem.boundary_score(
            jnp.asarray(np.ones(3, "f")), jnp.asarray(np.ones((2, 4), "f"))
        )
    for fields, words in (
        ({"quantile": 1.0}, "quantile must be < 1"),
        ({"batch_norm": "none"}, "batch_norm"),
        ({"pool": 1, "pool_batch": 2}, "at least method.pool_batch"),
        ({"prior": float("nan")}, "method.prior must be > 0"),
    ):
        with pytest.raises(ValueError, match=words):
            poem.Options(**fields)
    for fields, words in (
        ({"depth": 12}, "depth 6 L"),
        ({"mean": (0.0,)}, "for each of 3 channels"),
        ({"model": "wrn", "depth": 12}, "net.depth of a wrn"),
        ({"model": "conv", "hidden": (8,)}, "needs 3 widths"),
    ):
        with pytest.raises(ValueError, match=words):
            poem.Net(**fields)
