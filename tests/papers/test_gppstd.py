"""GPPSTD: the sampled values by hand, buffers, acting, demonstrations, its contract."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers.method import population
from jaxpapers.ops import environments as envs
from jaxpapers.ops import gaussian_process as gp
from jaxpapers.papers import gppstd
from tests.contract import Contract
from tests.programs import KEY, together

CONTRACT = Contract(
    small={
        "data.size": 3, "train.members": 8, "train.steps": 24, "method.features": 8,
        "method.buffer": 8, "method.evidence_every": 1, "method.evidence_steps": 2,
        "optim.name": "sgd", "prior.lengths": (0.5,),
    },
    refused={
        "train.accumulate": (2, "train.accumulate must be 1: a step of gppstd"),
        "prior.noise": (0.0, "prior.noise must be > 0"),
        "prior.lengths": ((0.1, 0.1, 0.1), "prior.lengths must be 1 or 2 numbers"),
        "method.gamma": (1.5, r"method.gamma must be in \[0, 1\]"),
        "method.eviction": ("none", "holds no 24 transitions"),
        "train.members": (0, "at least 1 member"),
    },
    falling=("uncertainty", 0.8),
)  # fmt: skip

IN_MATRIX = functools.partial(pytest.param, marks=pytest.mark.matrix)
SEA = gppstd.Problem(envs.DeepSea(size=4, mapping_seed=None))
# Lengths so small that no cell tells of another one: a table.
TABLE = gppstd.Prior(lengths=(0.01,), noise=0.1, variance=2.0)
STAGED = gppstd.Options(buffer=6, features=16)
SWEPT = gppstd.Options(form="stationary", gamma=0.8, buffer=24, features=16)


def transitions(options, episodes=5, seed=0):
    """A buffer of random episodes of the sea, stepped in NumPy: 1 moves right."""
    rng = np.random.default_rng(seed)
    staged = options.form == "staged"
    shape = (4, options.buffer) if staged else (1, options.buffer)
    zeros = functools.partial(np.zeros, dtype=np.float32)
    buffer = gppstd.Transitions(
        zeros((*shape, 3)), zeros(shape), zeros((*shape, 2)), zeros((*shape, 1)),
        np.zeros(shape, bool), np.zeros(shape, np.int32), np.zeros(shape, bool),
    )  # fmt: skip
    for episode in range(episodes):
        column, actions = 0, rng.integers(0, 2, 5)
        for t in range(4):
            right = actions[t]
            at = (t, episode) if staged else (0, 4 * episode + t)
            buffer.x[at] = t / 3, column / 3, right
            buffer.reward[at] = (right and column == 3) - 0.0025 * right
            column = min(max(column + 2 * right - 1, 0), 3)
            buffer.successor[at] = (t + 1) / 3, column / 3
            buffer.follower[at] = actions[t + 1]
            buffer.done[at], buffer.time[at] = t == 3, 5 * episode + t
            buffer.mask[at] = True
    return buffer


def kernel(model, x):
    """k(x, x) in NumPy; RBF."""
    d = x.shape[1] - bool(model.actions)
    r2 = ((x[:, None, :d] - x[None, :, :d]) / np.exp(model.log_lengths)) ** 2
    k = np.exp(model.log_variance) * np.exp(-r2.sum(-1) / 2)
    return k * (x[:, None, -1] == x[None, :, -1]) if model.actions else k


def drawn(options, buffer, prior=TABLE, problem=SEA):
    """Values of a draw, and what they are at the buffer's inputs and their successors."""

    def body(key, buffer):
        model = problem.model(prior)
        values = gppstd.draw_values(key, model, buffer, problem, options)
        tried = gppstd.candidates(key, problem, options)

        def at(pair):
            stage, rows = pair
            q = gppstd.with_actions(rows.successor, tried)
            return {
                "own": gppstd.q_values(stage, rows.x, options),
                "after": gppstd.q_values(stage, q, options).reshape(-1, len(tried)),
                "prior": gp.evaluate_prior(stage.function, rows.x),
            }

        return values, jax.lax.map(at, (values, buffer))

    return together(body, jax.random.key(1), buffer)


@pytest.mark.parametrize("explore", ["sample", IN_MATRIX("mean")])
def test_staged_draws_are_tabular_backward_induction(explore):
    """9(a)8: independent cells, randomised least squares cell by cell (RLSVI)."""
    options = dataclasses.replace(STAGED, explore=explore)
    buffer = transitions(options)
    assert buffer.mask.sum(1).tolist() == [5] * 4
    values, at = drawn(options, buffer)
    noises = []
    for h in range(4):
        rows = jax.tree.map(lambda v: v[h], buffer)  # noqa: B023
        real = rows.mask
        y = values.target[h][real]
        if h == 3:
            expected = rows.reward[real]
        else:
            # The next stage's function, at this stage's successors: by the same cells.
            nxt = jax.tree.map(lambda v: v[h + 1], buffer)  # noqa: B023
            best = []
            for s in rows.successor[real]:
                q = []
                for a in (0.0, 1.0):
                    same = nxt.mask & (np.abs(nxt.x - [*s, a]).max(1) < 1e-6)
                    q.append(at["own"][h + 1][same][0] if same.any() else None)
                best.append(q)
            known = [i for i, q in enumerate(best) if None not in q]
            expected = y.copy()
            for i in known:
                expected[i] = rows.reward[real][i] + max(best[i])
        np.testing.assert_allclose(y, expected, atol=1e-5)
        k = kernel(SEA.model(TABLE), rows.x[real])
        alpha = values.function.alpha[h][real]
        prior = at["prior"][h][real]
        # Q = f0 + K alpha, (K + s2) alpha = y - f0 - noise.
        np.testing.assert_allclose(at["own"][h][real], prior + k @ alpha, atol=1e-4)
        noises.append(y - prior - k @ alpha - 0.1 * alpha)
        for x in np.unique(rows.x[real], axis=0):
            cell = (rows.x[real] == x).all(1)
            n = cell.sum()
            shrunk = 2.0 * n / (2.0 * n + 0.1)
            mean = (y - prior - noises[-1])[cell].mean()
            np.testing.assert_allclose(
                at["own"][h][real][cell], prior[cell] + shrunk * mean, atol=1e-4
            )
    noises = np.concatenate(noises)
    if explore == "mean":
        assert np.abs(noises).max() < 1e-4 and not values.function.weights.any()
    else:
        assert 0.05 < noises.var() < 0.2 and abs(noises.mean()) < 5 * (0.1 / 20) ** 0.5


def loops(jaxpr, name):
    """How often a primitive is called, and how often inside of while loops' loops."""
    counts = [0, 0]

    def walk(jaxpr, depth):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == name:
                counts[min(depth, 1)] += 1
            inner = depth + (eqn.primitive.name == "while")
            for value in jax.tree.leaves(
                eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
            ):
                body = getattr(value, "jaxpr", value)
                if hasattr(body, "eqns"):
                    walk(body, inner)

    walk(jaxpr, 0)
    return counts


@pytest.mark.parametrize("explore", ["sample", IN_MATRIX("rlsvi")])
def test_sweeps_end_in_a_fixed_point_of_one_factorisation(explore):
    options = dataclasses.replace(
        SWEPT, explore=explore, sweeps=200, tolerance=1e-5, clip=(-1.0, 2.0)
    )
    prior = gppstd.Prior(lengths=(0.3,), noise=0.1)
    buffer = transitions(options)
    values, at = drawn(options, buffer, prior)
    rows, mask = jax.tree.map(lambda v: v[0], buffer), buffer.mask[0]
    y = rows.reward + 0.8 * np.where(rows.done, 0, at["after"][0].max(1))
    np.testing.assert_allclose(
        values.target[0][mask], np.clip(y, -1, 2)[mask], atol=1e-4
    )
    assert values.change[0] <= 1e-5 and 5 < values.sweeps[0] < 200
    draw = functools.partial(
        gppstd.draw_values, model=SEA.model(prior), problem=SEA, options=options
    )
    jaxpr = jax.make_jaxpr(lambda key, buffer: draw(key, buffer=buffer))(KEY, buffer)
    # One where the covariance is formed, one in the loop over jitters; RLSVI's own.
    outside, inside = loops(jaxpr.jaxpr, "cholesky")
    assert inside == 1 and outside == (1 if explore == "sample" else 2)


@pytest.mark.parametrize("noise", ["monte_carlo", IN_MATRIX("deterministic")])
def test_temporal_draws_are_of_the_posterior_of_rewards(noise):
    options = dataclasses.replace(
        SWEPT, likelihood="temporal", noise=noise, explore="mean", gamma=0.9
    )
    prior = gppstd.Prior(lengths=(0.3,), noise=0.1)
    buffer = transitions(options)
    values, at = drawn(options, buffer, prior)
    again, best = drawn(dataclasses.replace(options, relinearise=40), buffer, prior)

    def body(buffer, successor):
        rows = jax.tree.map(lambda v: v[0], buffer)
        post = gp.fit_td(
            SEA.model(prior), rows.x, successor, rows.reward, rows.done, 0.9,
            noise=noise, order=rows.time, mask=rows.mask,
        )  # fmt: skip
        return gp.predict(post, rows.x)[0]

    rows = jax.tree.map(lambda v: v[0], buffer)
    taken = np.concatenate([rows.successor, rows.follower], 1)
    greedy = best["after"][0].argmax(1)[:, None].astype(np.float32)
    optimal = np.concatenate([rows.successor, greedy], 1)
    for got, successor in ((at, taken), (best, optimal)):
        expected = together(body, buffer, successor)
        np.testing.assert_allclose(got["own"][0], expected, atol=2e-3)
    assert values.sweeps[0] == 1 and again.sweeps[0] == 41
    live = rows.mask & ~rows.done
    # Better next actions are worth no less, as far as the function knows.
    assert best["own"][0][live].mean() > at["own"][0][live].mean() - 1e-3


def test_noise_of_differences_has_their_covariance():
    model = gp.model(1.0, [1.0], 0.5)
    n = 5
    order = np.int32([3, 4, 9, 5, 0])
    done = np.array([False, False, False, True, False])
    mask = np.array([True, True, True, True, False])
    x = np.arange(n, dtype=np.float32)[:, None]

    def body(key):
        post = gp.fit_td(
            model, x_, x_, jnp.zeros(n), jnp.asarray(done), 0.9,
            noise="monte_carlo", order=jnp.asarray(order), mask=jnp.asarray(mask),
        )  # fmt: skip
        return jax.vmap(
            lambda k: gp.draw_td_noise(k, post, "monte_carlo", jnp.asarray(order))
        )(jax.random.split(key, 20_000))

    x_ = jnp.asarray(x)
    draws = together(body, jax.random.key(0))
    w = np.where(done | ~mask, 0, 0.9)
    sigma = np.diag(1 + w**2)
    for i, j in ((0, 1), (1, 3)):
        sigma[i, j] = sigma[j, i] = -w[i]
    sigma = 0.5 * sigma * mask[:, None] * mask[None]
    np.testing.assert_allclose(draws.T @ draws / len(draws), sigma, atol=0.04)


def test_a_full_buffer_keeps_what_the_others_do_not_say():
    options = dataclasses.replace(SWEPT, buffer=4)
    prior = gppstd.Prior(lengths=(0.1,))
    x = np.zeros((8, 3), np.float32)
    x[:, 0] = [0, 0, 0, 0, 0.9, 0.5, 0.01, 0.7]
    mask = np.array([True] * 6 + [False, False])
    rows = gppstd.Transitions(
        x, np.arange(8.0, dtype=np.float32), x[:, :2], x[:, 2:], mask & False,
        np.arange(8, dtype=np.int32), mask,
    )  # fmt: skip

    def body(rows):
        few = jax.tree.map(lambda v: v[:3], rows)
        model = SEA.model(prior)
        # Buffers of one stage and four rows, episodes of eight and of three.
        empty = gppstd.empty(SEA, options)
        return (
            gppstd.add(empty, rows, model, options),
            gppstd.add(gppstd.add(empty, few, model, options), few, model, options),
        )

    full, copies = together(body, rows)
    assert full.mask.all() and copies.mask.all()
    assert full.reward[0, 2:].tolist() == [4, 5] and full.time[0].tolist()[2:] == [4, 5]
    assert copies.reward.shape == (1, 4)
    staged = together(
        lambda e: gppstd.add(gppstd.empty(SEA, STAGED), e, SEA.model(prior), STAGED),
        jax.tree.map(lambda v: v[:4], rows),
    )
    assert staged.reward[:, 0].tolist() == [0, 1, 2, 3]
    assert staged.mask.tolist() == [[True] + [False] * 5] * 4


@pytest.mark.matrix
def test_continuous_actions_ascend():
    pendulum = gppstd.Problem(envs.PENDULUM_V1)
    options = gppstd.Options(
        form="stationary", gamma=0.9, buffer=8, candidates=4, ascent=30
    )
    prior = gppstd.Prior(action_length=0.3)
    state = np.float32([0.5, 0.5, 0.5])

    def ascend(key):
        model = pendulum.model(prior)
        empty = gppstd.empty(pendulum, options)
        values = gppstd.draw_values(key, model, empty, pendulum, options)
        stage = jax.tree.map(lambda v: v[0], values)
        grid = jnp.linspace(0, 1, 200)[:, None]
        q = gppstd.q_values(
            stage, gppstd.with_actions(jnp.asarray(state)[None], grid), options
        )
        actions = jax.vmap(
            lambda k: gppstd.act(k, stage, jnp.asarray(state), pendulum, options)
        )(jax.random.split(key, 50))
        chosen = gppstd.q_values(
            stage, gppstd.with_actions(jnp.asarray(state)[None], actions), options
        )
        return q, actions, chosen

    q, actions, chosen = together(ascend, jax.random.key(3))
    assert (0 <= actions).all() and (actions <= 1).all()
    peaks = [q[i] for i in range(200) if q[max(i - 1, 0) : i + 2].max() == q[i]]
    # Each ends on a peak, most on the highest.
    assert np.abs(chosen[:, None] - np.array(peaks)[None]).min(1).max() < 1e-2
    assert (np.abs(chosen - q.max()) < 1e-2).mean() > 0.5


def test_discrete_actions():
    """Ties are broken uniformly; the best action; a share at random."""

    def tied(key):
        greedy = dataclasses.replace(STAGED, explore="mean")
        mixed = dataclasses.replace(STAGED, explore="epsilon", epsilon=0.5)
        model = SEA.model(TABLE)
        x = jnp.zeros((1, 3)).at[0, 2].set(1.0)
        buffer = gppstd.empty(SEA, STAGED)
        one = buffer._replace(
            x=buffer.x.at[:, 0].set(x), reward=buffer.reward.at[:, 0].set(1.0),
            done=buffer.done.at[:, 0].set(True), mask=buffer.mask.at[:, 0].set(True),
        )  # fmt: skip
        both = jax.tree.map(lambda *v: jnp.stack(v), buffer, one)
        values = jax.lax.map(
            lambda rows: gppstd.draw_values(key, model, rows, SEA, greedy), both
        )
        tie, best = (jax.tree.map(lambda v: v[i, 0], values) for i in (0, 1))  # noqa: B023

        def actions(stage, options):
            def one(key):
                return gppstd.act(key, stage, jnp.zeros(2), SEA, options)[0]

            return jax.vmap(one)(jax.random.split(key, 400))

        return {
            "tie": actions(tie, greedy), "best": actions(best, greedy),
            "mixed": actions(best, mixed),
        }  # fmt: skip

    got = together(tied, jax.random.key(0))
    assert 0.35 < got["tie"].mean() < 0.65
    assert (got["best"] == 1).all()
    assert 0.65 < got["mixed"].mean() < 0.85


def test_demonstrations_are_data():
    """Experts, noise, halves; what they visit is less uncertain, nothing more so (T1)."""
    car = gppstd.Problem(envs.MountainCar())
    base = dataclasses.replace(SWEPT, buffer=400)

    def body(key):
        out = {}
        for kind in ("noisy", "partial"):
            options = dataclasses.replace(
                base, demonstrations=kind, demonstration_episodes=2
            )
            starts = jax.vmap(lambda k: car.reset(k, ()))(jax.random.split(key, 2))
            out[kind] = gppstd.demonstrate(key, starts, car, options)
        expert = dataclasses.replace(
            base, demonstrations="expert", demonstration_episodes=2
        )
        prior = gppstd.Prior()
        _, extra = gppstd.init(key, car, prior, expert, 2)
        model = car.model(prior)
        q = jax.random.uniform(key, (40, 3)).at[:, 2].set(0.0)
        rows = jax.tree.map(lambda v: v[0], extra["buffer"])
        none = jnp.zeros_like(rows.mask)
        spread = [
            gp.predict(gp.fit(model, rows.x, rows.reward, mask), q)[1]
            for mask in (none, rows.mask)
        ]
        return out, spread, extra["buffer"]

    shown, (before, after), buffer = together(body, jax.random.key(0))
    partial = shown["partial"]  # Whole episodes are told; half of each is kept.
    assert partial.terminated.all()
    assert (90 < partial.steps).all() and (partial.steps < 160).all()
    assert (shown["noisy"].steps > partial.steps).all()
    half = partial.rows.mask.sum(1)
    np.testing.assert_array_equal(half, (partial.steps + 1) // 2)
    kept = buffer.mask[0].sum()
    assert 180 < kept < 320 and buffer.done[0].sum() == 2
    # Times of two episodes do not touch, and lie before the agent's.
    time = buffer.time[0][:kept]
    assert (
        (np.diff(time) > 0).all() and (np.diff(time) > 1).sum() == 1 and time.max() < 0
    )
    assert (after <= before + 1e-4).all() and after.mean() < 0.95 * before.mean()


@pytest.mark.parametrize("members", [1, IN_MATRIX(2)])
def test_one_program_for_a_whole_run(members, key):
    """Data grow, are evicted, hyper-parameters move: nothing is compiled again."""
    options = dataclasses.replace(
        SWEPT, buffer=10, evidence_every=members - 1, evidence_steps=3, sweeps=5
    )
    prior = gppstd.Prior(lengths=(0.3,))
    agent = gppstd.single(SEA, prior, options, optax.adam(0.05), 5)
    agents = population(agent, members, aggregate=lambda metrics: metrics)
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        return agents.update(state, {})

    state = start = jax.jit(lambda key: agents.init(key, {}))(key)
    rows = []
    for _ in range(5):
        state, metrics = step(state)
        rows.append(metrics["rows"].tolist())
    assert len(traces) == 1
    assert rows == [[n] * members for n in (4, 8, 10, 10, 10)]
    assert (np.asarray(state.extra["steps"]) == 4).all()
    for name in state.params if members > 1 else ():
        assert (np.asarray(state.params[name]) != np.asarray(start.params[name])).all()
    histories = np.asarray(state.extra["returns"])
    assert histories.shape == (members, 5) and np.isfinite(histories).all()


def test_a_run_can_be_made_longer():
    agent = functools.partial(gppstd.single, SEA, TABLE, STAGED, optax.sgd(1.0))
    short, long = (jax.eval_shape(agent(n).init, KEY, {}) for n in (3, 5))
    state = jax.tree.map(lambda s: np.ones(s.shape, np.float32), short)
    longer = together(functools.partial(gppstd.longer, target=long), state)
    assert longer.extra["returns"].tolist() == [1, 1, 1, 0, 0]
    shorter = together(functools.partial(gppstd.longer, target=short), longer)
    assert shorter.extra["returns"].tolist() == [1, 1, 1]
    other = dataclasses.replace(STAGED, buffer=7)
    wide = jax.eval_shape(
        gppstd.single(SEA, TABLE, other, optax.sgd(1.0), 3).init, KEY, {}
    )
    with pytest.raises(ValueError, match=r"buffer.*expected \(4, 7"):
        jax.eval_shape(functools.partial(gppstd.longer, target=wide), state)


def test_refuses():
    for fields, words in (
        ({"likelihood": "temporal"}, "needs method.form='stationary'"),
        ({"form": "stationary"}, "method.gamma must be < 1"),
        ({"clip": (1.0, 0.0)}, "low < high"),
        ({"demonstrations": "expert"}, "belong together"),
        ({"explore": "ucb"}, "method.explore must be one of"),
        ({"gamma": float("nan")}, r"method.gamma must be in \[0, 1\]"),
        ({"buffer": 0}, "method.buffer must be >= 1"),
        ({"reward_scale": 0.0}, "method.reward_scale must be > 0"),
    ):
        with pytest.raises(ValueError, match=words):
            gppstd.Options(**fields)
    for fields, words in (
        ({"lengths": (0.1, -1.0)}, "prior.lengths must be > 0"),
        ({"noise": 0.0}, "prior.noise must be > 0"),
        ({"mean": float("inf")}, "prior.mean must be finite"),
        ({"kind": "linear"}, "prior.kind must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            gppstd.Prior(**fields)
    with pytest.raises(ValueError, match="observations without bounds"):
        gppstd.Problem(envs.CartPole())
    with pytest.raises(ValueError, match="no expert of Pendulum"):
        gppstd.Problem(envs.PENDULUM_V1).expert_known()


@pytest.mark.slow
def test_deep_sea_is_solved_where_dithering_is_not():
    """9(b): 10 x 10 within 300 episodes by 5 of 5 agents; epsilon-greedy by at most 1."""
    problem = gppstd.Problem(envs.DeepSea(size=10))
    solved = {}
    for explore in ("sample", "epsilon"):
        options = gppstd.Options(buffer=64, explore=explore)
        agent = gppstd.single(problem, gppstd.Prior(), options, optax.sgd(1.0), 300)
        agents = population(agent, 5)
        state = jax.jit(functools.partial(agents.init, batch={}))(jax.random.key(0))
        step = jax.jit(agents.update)
        for _ in range(300):
            state, _ = step(state, {})
        last = np.asarray(state.extra["returns"])[:, -10:]
        solved[explore] = int(((last > 0.5).sum(1) >= 8).sum())
    assert solved["sample"] == 5 and solved["epsilon"] <= 1
