"""The learning simulators of DNW, their metrics, and b per level."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers.mesh import make_mesh
from jaxpapers.papers import dnw
from tests.papers.dnw_networks import (
    course,
    hand_made,
    random_net,
    stack,
    stack_closures,
)
from tests.programs import together

NETS, SIZE = 200, 10


@pytest.fixture(scope="module")
def random_courses():
    """200 networks, an order each, and the curves of both credits by either order."""
    nets = [random_net(seed, SIZE) for seed in range(NETS)]
    rng = np.random.default_rng(0)
    orders = np.stack([rng.permutation(SIZE) for _ in nets]).astype(np.int32)

    def both(order, net, closures):
        first = dnw.components_first(order, net)
        two = jnp.stack([order, first])
        learn = jax.vmap(lambda x: dnw.simulate_learn(x, net))(two)
        transient = jax.vmap(
            lambda x: dnw.simulate_transient(x, net, closures, chunk=5)
        )(two)  # fmt: skip
        return {"learn": learn, "transient": transient}

    with jax.enable_x64(True):
        pairs = together(jax.vmap(both), orders, stack(nets), stack_closures(nets))
    curves = {
        prefix + name: dnw.Curve(*(x[:, i] for x in pair))
        for name, pair in pairs.items()
        for i, prefix in enumerate(("", "first "))
    }
    return nets, orders, curves


@pytest.mark.parametrize("credit", dnw.CREDITS)
def test_against_sets_and_loops(random_courses, credit):
    nets, orders, curves = random_courses
    for i, (net, order) in enumerate(zip(nets, orders)):
        found = np.stack([x[i] for x in curves[credit]])
        np.testing.assert_allclose(found, course(order, net, credit), rtol=1e-9)


def test_invariants(random_courses):
    nets, _, curves = random_courses
    total = np.array([net.own_cost.sum() for net in nets])
    for name, curve in curves.items():
        np.testing.assert_allclose(curve.usage[:, -1], 1)
        assert (curve.known[:, -1] == SIZE).all()
        assert (np.diff(curve.cost) >= 0).all() and (np.diff(curve.usage) >= 0).all()
        if name != "transient":  # Everything is paid for once, in any order.
            np.testing.assert_allclose(curve.cost[:, -1], total)
    # The credits differ where a component comes late, and nowhere else.
    for x, y in zip(curves["first learn"], curves["first transient"]):
        np.testing.assert_allclose(x, y)
    extra = curves["transient"].cost - curves["learn"].cost
    assert (extra >= -1e-9).all() and (extra.max(1) > 0).mean() > 0.5


def test_metrics_by_hand(float64):
    curve = dnw.Curve(
        np.array([1.0, 3.0, 4.0, 8.0]), np.array([0.4, 0.6, 0.6, 0.9]), np.arange(1, 5)
    )

    limits, shares = np.array([6.0, 10.0]), (0.4, 0.5, 0.6, 0.9, 0.95)
    both = together(
        lambda curve: jax.vmap(lambda x: dnw.curve_metrics(curve, x, shares))(limits),
        curve,
    )
    metrics, beyond = (dnw.Metrics(*(x[i] for x in both)) for i in range(2))
    np.testing.assert_array_equal(metrics.cost, [1, 3, 3, 8, np.nan])
    np.testing.assert_array_equal(metrics.known, [1, 2, 2, 4, np.nan])
    # Triangle, two trapezoids, a rectangle: .75 is halfway from .6 to .9.
    assert metrics.area == pytest.approx((0.2 + 1.0 + 0.6 + 2 * 0.675) / 6)
    assert beyond.area == pytest.approx((0.2 + 1.0 + 0.6 + 4 * 0.75 + 2 * 0.9) / 10)
    assert metrics.completion == pytest.approx(0.4 * 1 + 0.2 * 3 + 0.3 * 8)


def test_the_hand_made_network():
    """C of both credits for 照 first: 2 + 2 + 2 and three primitives; then 召."""
    net = hand_made()
    closures = dnw.closures(net)
    index = {c: i for i, c in enumerate(net.chars)}
    ahead = [index[c] for c in "照召口"]
    order = np.array(ahead + [i for i in range(30) if i not in ahead], np.int32)

    def body(order, net, closures):
        curves = [dnw.simulate(order, net, closures, credit) for credit in dnw.CREDITS]
        limit = net.own_cost.sum() / 2
        pair = jax.tree.map(lambda *x: jnp.stack(x), *curves)
        metrics = jax.vmap(dnw.curve_metrics, (0, None))(pair, limit)
        return curves, metrics

    (transient, by_node), metrics = together(body, order, net, closures)
    # 照 is 昭 灬, 日 召, 刀 口: 2 + 2 + 1 + 1 + 2 + 1 + 1.
    assert transient.cost[:3].tolist() == [10, 14, 15]
    assert by_node.cost[:7].tolist() == [1, 2, 3, 4, 6, 8, 10]
    assert by_node.known.tolist() == list(range(1, 31))
    steps = np.diff(transient.usage, prepend=0)
    assert metrics.completion[0] == pytest.approx((steps * transient.cost).sum())
    assert metrics.area[0] < metrics.area[1]
    with pytest.raises(ValueError, match="credit must be one of"):
        dnw.simulate(jnp.asarray(order), net, closures, "half")
    with pytest.raises(ValueError, match="permutation of 0 .. 29"):
        dnw.simulate(jnp.asarray(order[:-1]), net, closures)


@pytest.mark.matrix
def test_targets_on_eight_devices_and_in_chunks():
    net = hand_made()
    order = np.random.default_rng(0).permutation(30).astype(np.int32)

    def body(order, net, closures):
        mesh = make_mesh({"data": 8})
        whole = dnw.simulate_transient(order, net, closures)
        split = dnw.simulate_transient(order, net, closures, mesh=mesh, chunk=3)
        s = dnw.weighted_completion(order, net, closures)
        return whole, split, dnw.completion(whole), s

    whole, split, *s = together(body, order, net, dnw.closures(net))
    for x, y in zip(split, whole):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert s[0] == pytest.approx(s[1])


@pytest.fixture
def untied(float64):
    """A small network whose frequencies differ: ties have no order, so no one S."""
    net = random_net(5, n=8)
    freq = np.random.default_rng(1).permutation(8) + 1.0
    return dataclasses.replace(net, freq=freq / freq.sum())


def test_the_loss_goes_to_s_as_tau_goes_to_0(untied):
    params = np.random.default_rng(0).normal(size=untied.n_levels)

    def body(net, closures, params):
        w = dnw.level_scores(dnw.level_b(params), net)
        order = dnw.order_from_score(w, net.freq)
        loss = dnw.loss(params, net, closures, tau=1e-6)[0]
        return loss, dnw.weighted_completion(order, net, closures)

    loss, s = together(body, untied, dnw.closures(untied), params)
    assert loss == pytest.approx(s, rel=1e-6)


@pytest.mark.matrix
def test_b_per_level(untied):
    """The gradient is right, fitting follows it, one b for all levels is that of DNW."""
    net = untied
    start = np.full(net.n_levels, np.log(0.35 / 0.65))
    bump = np.eye(net.n_levels)[0] * 1e-5
    points = np.stack([start, start + bump, start - bump])
    rate = 1e-3

    def body(net, closures, points):
        def loss(p, top=8):
            return dnw.loss(p, net, closures, tau=0.3, top=top)[0]

        same = dnw.level_scores(dnw.level_b(points[0]), net)
        weight = dnw.weights(net)
        plain = dnw.dnw(
            net.freq, net.comp, net.whole, weight, 0.35, n_levels=net.n_levels
        )
        return {
            "loss": jax.vmap(loss)(points),
            "scalar": (same, plain),
            "fit": dnw.fit(net, closures, optax.sgd(rate), steps=3, tau=0.3),
            "top": loss(points[0], top=3),
        }

    x = together(body, net, dnw.closures(net), points)
    value, up, down = x["loss"]
    np.testing.assert_allclose(*x["scalar"], rtol=1e-12)
    b, losses = x["fit"]
    # Three short steps, each against the slope.
    moved = np.log(b / (1 - b)) - start
    assert moved[0] == pytest.approx(-3 * rate * (up - down) / 2e-5, rel=1e-2)
    assert losses[0] == pytest.approx(value) and (np.diff(losses) < 0).all()
    assert x["top"] < value
