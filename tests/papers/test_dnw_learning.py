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
    hand_made,
    parts,
    random_net,
    stack,
    stack_closures,
)
from tests.programs import together

NETS, SIZE = 200, 10


def learn(order, net, credit):
    """Points (C, F, N) after each target, as section 2 of the paper's digest reads."""
    below, known, points = parts(net), set(), []
    cost = usage = 0.0
    for target in order:
        if target in known:
            points.append((cost, usage, len(known)))
            continue
        closure, todo = {int(target)}, [int(target)]
        while todo:
            fresh = below[todo.pop()] - known - closure
            closure |= fresh
            todo += fresh
        cost += net.own_cost[list(closure)].sum()
        new = closure if credit == "learn" else {int(target)}
        known |= new
        usage += net.freq[list(new)].sum()
        points.append((cost, usage, len(known)))
    return np.array(points).T


@pytest.fixture(scope="module")
def random_courses():
    """200 networks, an order each, and the curves of both credits by either order."""
    nets = [random_net(seed, SIZE) for seed in range(NETS)]
    rng = np.random.default_rng(0)
    orders = np.stack([rng.permutation(SIZE) for _ in nets]).astype(np.int32)

    def both(order, net, closures):
        first = dnw.components_first(order, net)
        return {
            "learn": dnw.simulate_learn(order, net),
            "transient": dnw.simulate_transient(order, net, closures, chunk=4),
            "first learn": dnw.simulate_learn(first, net),
            "first transient": dnw.simulate_transient(first, net, closures),
        }

    with jax.enable_x64(True):
        curves = together(
            jax.vmap(both), orders, stack(nets), stack_closures(nets)
        )  # fmt: skip
    return nets, orders, curves


@pytest.mark.parametrize("credit", dnw.CREDITS)
def test_against_sets_and_loops(random_courses, credit):
    nets, orders, curves = random_courses
    for i, (net, order) in enumerate(zip(nets, orders)):
        found = np.stack([x[i] for x in curves[credit]])
        np.testing.assert_allclose(found, learn(order, net, credit), rtol=1e-9)


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

    def body(curve):
        return (
            dnw.curve_metrics(curve, 6.0, (0.4, 0.5, 0.6, 0.9, 0.95)),
            dnw.curve_metrics(curve, 10.0).area,
        )

    metrics, beyond = together(body, curve)
    np.testing.assert_array_equal(metrics.cost, [1, 3, 3, 8, np.nan])
    np.testing.assert_array_equal(metrics.known, [1, 2, 2, 4, np.nan])
    # Triangle, two trapezoids, a rectangle: .75 is halfway from .6 to .9.
    assert metrics.area == pytest.approx((0.2 + 1.0 + 0.6 + 2 * 0.675) / 6)
    assert beyond == pytest.approx((0.2 + 1.0 + 0.6 + 4 * 0.75 + 2 * 0.9) / 10)
    assert metrics.completion == pytest.approx(0.4 * 1 + 0.2 * 3 + 0.3 * 8)


def test_the_hand_made_network():
    """C of both credits for 照 first: 2 + 2 + 2 and three primitives; then 召."""
    net = hand_made()
    closures = dnw.closures(net)
    index = {c: i for i, c in enumerate(net.chars)}
    ahead = [index[c] for c in "照召口"]
    order = np.array(ahead + [i for i in range(30) if i not in ahead], np.int32)
    mesh = make_mesh({"data": 8})

    def body(order, net, closures):
        curves = [dnw.simulate(order, net, closures, credit) for credit in dnw.CREDITS]
        per_target = dnw.simulate_learn(order, net)
        split = dnw.simulate_transient(order, net, closures, mesh=mesh, chunk=3)
        limit = net.own_cost.sum() / 2
        pair = jax.tree.map(lambda *x: jnp.stack(x), *curves)
        metrics = jax.vmap(dnw.curve_metrics, (0, None))(pair, limit)
        s = dnw.weighted_completion(order, net, closures, "learn")
        return curves, per_target, split, metrics, s

    (transient, by_node), per_target, split, metrics, s = together(
        body, order, net, closures
    )
    # 照 is 昭 灬, 日 召, 刀 口: 2 + 2 + 1 + 1 + 2 + 1 + 1.
    assert transient.cost[:3].tolist() == [10, 14, 15]
    assert per_target.cost[:3].tolist() == [10, 10, 10]
    assert per_target.known[:3].tolist() == [7, 7, 7]
    assert by_node.cost[:7].tolist() == [1, 2, 3, 4, 6, 8, 10]
    assert by_node.known.tolist() == list(range(1, 31))
    for x, y in zip(split, transient):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert s == pytest.approx(metrics.completion[1])
    assert metrics.area[0] < metrics.area[1]
    with pytest.raises(ValueError, match="credit must be one of"):
        dnw.simulate(jnp.asarray(order), net, closures, "half")


def test_b_per_level(float64):
    """The loss goes to S as tau goes to 0, its gradient is right, fitting lowers it."""
    net = random_net(5, n=8)
    freq = np.random.default_rng(1).permutation(8) + 1.0  # Ties would leave S open.
    net = dataclasses.replace(net, freq=freq / freq.sum())
    closures = dnw.closures(net)
    start = np.full(net.n_levels, np.log(0.35 / 0.65))
    params = np.random.default_rng(0).normal(size=net.n_levels)
    bump = np.eye(net.n_levels)[0] * 1e-5
    points = np.stack([params, start, start + bump, start - bump])
    taus = np.array([1e-6, 0.3, 0.3, 0.3])
    rate = 1e-3

    def body(net, closures, points, taus):
        def loss(p, tau, top=8):
            return dnw.loss(p, net, closures, tau=tau, top=top)[0]

        w = dnw.level_scores(dnw.level_b(points[0]), net)
        order = dnw.order_from_score(w, net.freq)
        same = dnw.level_scores(dnw.level_b(points[1]), net)
        weight = dnw.weights(net)
        plain = dnw.dnw(
            net.freq, net.comp, net.whole, weight, 0.35, n_levels=net.n_levels
        )
        return {
            "s": dnw.weighted_completion(order, net, closures),
            "loss": jax.vmap(loss)(points, taus),
            "scalar": (same, plain),
            "fit": dnw.fit(net, closures, optax.sgd(rate), steps=3, tau=0.3),
            "top": loss(points[1], taus[1], top=3),
        }

    x = together(body, net, closures, points, taus)
    exact, value, up, down = x["loss"]
    assert exact == pytest.approx(x["s"], rel=1e-6)
    np.testing.assert_allclose(*x["scalar"], rtol=1e-12)
    b, losses = x["fit"]
    # Three short steps, each against the slope.
    moved = np.log(b / (1 - b)) - start
    assert moved[0] == pytest.approx(-3 * rate * (up - down) / 2e-5, rel=1e-2)
    assert losses[0] == pytest.approx(value) and (np.diff(losses) < 0).all()
    assert x["top"] < value
