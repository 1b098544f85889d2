"""CODA: recorded updates, the augmented problem, encodings, options, its contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers.papers import coda
from tests.contract import Contract
from tests.programs import KEY, params_like, together

CONTRACT = Contract(
    small={
        "data.batch": 16, "data.steps": 6000, "data.hold": 10, "data.episodes": 2,
        "data.horizon": 3, "data.maze": "medium", "net.hidden": (8, 8),
        "method.updates": 2, "optim.name": "sgd", "optim.lr": 0.05,
    },
    refused={
        "method.discount": (1.0, "discount must be in"),
        "method.expectile": (1.0, "expectile must be in"),
        "method.rate": (0.0, "rate must be in"),
        "net.hidden": ((), "hidden must be widths"),
        "train.accumulate": (2, "accumulate must be 1"),
        "method.order": ("x", "order"),
    },
    noisy=True,
    # The targets fall with V, which starts near 0.
    falling=("q_loss", 0.85),
)  # fmt: skip
COMMON = {"discount", "rate", "clip", "tau", "beta"}


def layers(arrays, prefix):
    """A perceptron of torch's names and [out, in] weights."""
    found = {}
    for name, x in arrays.items():
        if name.startswith(prefix) and name.endswith("_weight"):
            number = int(name[len(prefix) :].split("_")[0]) // 2
            bias = arrays[name.replace("weight", "bias")]
            found[f"layer_{number}"] = {"kernel": x.T, "bias": bias}
    return found


def tree(arrays, when):
    return {
        "v": layers(arrays, f"{when}_v_v_"),
        "q": {f"q{i}": layers(arrays, f"{when}_q_q{i}_") for i in (1, 2)},
        "pi": {
            "net": layers(arrays, f"{when}_pi_net_"),
            "log_std": arrays[f"{when}_pi_log_std"],
        },
    }


def recorded_net(case):
    read = case.read
    hidden = (read("hidden"),) * read("layers")
    return coda.Net(
        state=read("state_dim"), action=read("actions"), context=read("context_dim"),
        hidden=hidden, encoding="reference",
    )  # fmt: skip


@pytest.mark.parity("rl", only=lambda entry: entry["kind"].startswith("coda_iql"))
def test_recorded_updates(case):
    """The authors' code on recorded batches: metrics and weights after each update."""
    z, net = case.arrays, recorded_net(case)
    options = coda.Options(
        discount=case.read("discount"), expectile=case.read("tau"),
        temperature=case.read("beta"), rate=case.read("rate"), clip=case.read("clip"),
    )  # fmt: skip
    tx = optax.adam(case.read("lr"))
    clipped = optax.chain(optax.clip_by_global_norm(options.clip), tx)
    txs = {"v": tx, "q": tx, "pi": clipped}
    params = tree(z, "init")
    count, size = case.read("updates"), case.read("batch")
    real = size - round(size * case.read("ratio"))
    named = {"observation": "observations", "action": "actions", "reward": "rewards",
             "next": "next_observations", "done": "terminals"}  # fmt: skip
    batches = {
        k: np.stack([z[f"b{i}_{v}"] for i in range(count)]) for k, v in named.items()
    }
    policy = {
        k: np.stack([z[f"p{i}_{named[k]}"] for i in range(count)])
        for k in ("observation", "action")
    }

    def one(carry, batches):
        params, opt_state, target = carry
        value, policy = batches
        *carry, metrics = coda.iql_update(
            params, opt_state, target, value, policy, txs=txs, options=options, net=net
        )
        # The recorded means are those of the new targets.
        q = coda.iql.smaller(carry[2], value["observation"], value["action"])
        parts = (q[:real].mean(), q[real:].mean())
        numbers = (metrics["v_loss"], metrics["q_loss"], *parts, metrics["weight_mean"])
        return tuple(carry), jnp.stack(numbers)

    def run(params, batches, policy):
        opt_state = {name: txs[name].init(params[name]) for name in txs}
        carry = (params, opt_state, coda.target_of(params))
        return jax.lax.scan(one, carry, (batches, policy))

    (params, _, target), metrics = together(run, params, batches, policy)
    np.testing.assert_allclose(metrics[:, :4], z["metrics"][:, :4], atol=1e-5, rtol=0)
    # The exponent multiplies rounding by beta.
    np.testing.assert_allclose(metrics[:, 4], z["metrics"][:, 4], rtol=1e-4)
    expected = tree(z, "final")
    targets = {f"q{i}": layers(z, f"final_qt_q{i}_") for i in (1, 2)}
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5),
        (params, target), (expected, targets),
    )  # fmt: skip
    assert np.isin(case.read("contexts"), ("goal", "fourrooms"))


@pytest.mark.parity("rl", only=lambda entry: entry["kind"].startswith("coda_iql"))
def test_recorded_augmentation(case):
    """The recorded batches are the encodings of the raw data with contexts."""
    z, net = case.arrays, recorded_net(case)
    n, k = net.state, net.context
    raw, examples = z["raw_observations"], z["ctx_observations"]
    contexts, states = z["ctx_next_observations"][:, :k], examples[:, k:]
    if case.read("contexts") == "goal":
        # Of transitions that reached their goal, the states that they reached.
        reached = z["raw_next_observations"][z["raw_terminals"]]
        np.testing.assert_array_equal(states, reached)
        np.testing.assert_array_equal(contexts, states[:, :2])
    assert not examples[:, :k].any() and not z["ctx_next_observations"][:, k:].any()
    size = case.read("batch")
    real = size - round(size * case.read("ratio"))
    for key in ("updates", "hidden", "layers", "lr", *COMMON):
        case.read(key)
    value, policy = z["b0_observations"], z["p0_observations"]
    rows = [np.flatnonzero((raw == x).all(1))[0] for x in value[:real, k : k + n]]
    found = [
        np.flatnonzero(
            (states == x[k : k + n]).all(1) & (contexts == x[k + n : 2 * k + n]).all(1)
        )[0]
        for x in value[real:]
    ]
    policy_rows = [np.flatnonzero((raw == x).all(1))[0] for x in policy[:, k : k + n]]
    fictitious = np.repeat(np.float32([0, 1]), [real, size - real])
    zeros = np.zeros((size - real, net.action), np.float32)
    batch = {
        "state": np.concatenate([raw[rows], states[found]]),
        "action": np.concatenate([z["raw_actions"][rows], zeros]),
        "next": np.concatenate([z["raw_next_observations"][rows], states[found]]),
        "context": value[:, k + n : 2 * k + n],
        "fictitious": fictitious,
        "goal": fictitious,
        "policy_state": raw[policy_rows],
        "policy_action": z["raw_actions"][policy_rows],
        "policy_context": policy[:, k + n : 2 * k + n],
    }
    encoded, fitted = together(lambda b: coda.encode_batch(b, net), batch)
    for name, column in [("observation", "observations"), ("action", "actions"),
                         ("next", "next_observations"), ("reward", "rewards"),
                         ("done", "terminals")]:  # fmt: skip
        np.testing.assert_array_equal(encoded[name], z[f"b0_{column}"], name)
    np.testing.assert_array_equal(fitted["observation"], policy)
    np.testing.assert_array_equal(fitted["action"], z["p0_actions"])
    np.testing.assert_array_equal(encoded["action"][-1], z["ctx_action0"])


@pytest.mark.parity("rl", only=lambda entry: entry["kind"] == "expectile")
def test_recorded_expectiles(case, float64):
    z = case.arrays
    for tau in (0.5, 0.7, 0.9, 0.95):
        name = str(tau).replace(".", "_")
        u, best = np.float64(z["u"]), z[f"expectile_{name}"]
        f = functools.partial(coda.expectile_loss, tau=tau)
        value, slope = together(lambda u, m, f=f: (f(u), jax.grad(lambda m: f(u - m))(m)),
                                u, best)  # fmt: skip
        np.testing.assert_allclose(value, z[f"loss_{name}"], rtol=1e-6)
        assert abs(slope) < 1e-6  # The expectile is the minimiser.


@pytest.mark.parametrize("seed", [0, 1])
def test_augmented_problem_has_the_same_values(seed, float64):
    """Random finite problems: values, steps to the goal, and where a+ is best."""
    rng = np.random.default_rng(seed)
    states, actions, discount = 20, 3, 0.9
    p = rng.dirichlet(np.full(states, 0.05), (states, actions))
    goal = rng.random(states) < 0.2
    goal[0] = True
    # The original problem: 1 in the goal set, which ends it.
    hit = np.zeros(states)
    for _ in range(2000):
        hit = np.where(goal, 1.0, discount * (p @ hit).max(1))

    def solve(p, goal):
        plain = coda.value_iteration(*coda.augmented_mdp(p, goal), discount)
        shifted = coda.value_iteration(
            *coda.augmented_mdp(p, goal, shift=True), discount
        )
        return plain, shifted

    (v, q), (v_shift, q_shift) = together(solve, p, goal)
    np.testing.assert_allclose(v[:-1], hit, atol=1e-10)
    np.testing.assert_allclose(v_shift[:-1], -(1 - hit) / (1 - discount), atol=1e-9)
    best = q[:-1].argmax(1) == actions
    np.testing.assert_array_equal(best, goal)
    np.testing.assert_array_equal(q_shift[:-1].argmax(1) == actions, goal)
    # Without a+ the greedy policy of the augmented problem loses nothing.
    greedy = q[:-1, :actions].argmax(1)
    chain = p[np.arange(states), greedy]
    value = np.linalg.solve(
        np.eye(states) - discount * np.where(goal[:, None], 0, chain), goal * 1.0
    )
    np.testing.assert_allclose(value, hit, atol=1e-10)


def test_encodings_agree_on_what_a_table_knows():
    """Both encodings tell the same transitions apart, and nothing else."""
    rng = np.random.default_rng(0)
    state = rng.integers(0, 3, (64, 2)).astype(np.float32)
    context = rng.choice(np.float32([2, 3, 4]), (64, 1))
    action = rng.integers(-1, 2, (64, 1)).astype(np.float32)
    fictitious = (rng.random(64) < 0.5).astype(np.float32)
    action[fictitious > 0] = 0

    drawn = (state, context, action, fictitious)

    def classes(encoding, state, context, action, fictitious):
        net = coda.Net(state=2, action=1, context=1, known=(2.0, 3.0, 4.0),
                       encoding=encoding)  # fmt: skip
        assert coda.encode_observation(state, context, net).shape[-1] == net.observation
        return jnp.concatenate(
            [
                coda.encode_observation(state, context, net),
                coda.encode_action(action, fictitious, net),
            ],
            -1,
        )

    both = together(lambda *a: [classes(e, *a) for e in coda.ENCODINGS], *drawn)
    labels = [np.unique(x, axis=0, return_inverse=True)[1] for x in both]
    same = [x[:, None] == x[None] for x in labels]
    np.testing.assert_array_equal(*same)


def test_targets_are_clipped_and_a_plus_is_drawn_to_zero():
    net = coda.Net(state=2, action=1, context=1, hidden=(4, 4))
    options = coda.Options(low=-1.5)
    params = params_like(lambda key: coda.init(key, net), KEY)
    batch = {
        "observation": np.zeros((3, 3)), "action": np.zeros((3, 2)),
        "next": np.zeros((3, 3)), "reward": np.array([-1.0, 0.0, -1.0]),
        "done": np.array([0.0, 1.0, 0.0]),
    }  # fmt: skip
    high = np.array([-50.0, -50.0, 50.0])
    examples = {**batch, "done": np.ones(3), "reward": np.zeros(3)}

    def f(q, batch, examples, high):
        def slopes(shift):
            moved = jax.tree.map(lambda x: x, q)
            for one in moved.values():
                one["layer_2"]["bias"] = one["layer_2"]["bias"] + shift
            grads = jax.grad(lambda q: coda.q_loss(q, examples, high, options)[0])(
                moved
            )
            return grads["q1"]["layer_2"]["bias"], grads["q2"]["layer_2"]["bias"]

        target = coda.q_loss(q, batch, high, options)[1]["target"]
        return target, slopes(5.0), slopes(-5.0)

    target, above, below = together(f, params["q"], batch, examples, high)
    np.testing.assert_allclose(target, (-1.5 + 0 + 0) / 3, rtol=1e-6)
    assert min(above) > 0 > max(below)


def test_orders_differ_where_they_should():
    """IQL's own order: the critics see the new V, and both errors are summed."""
    net = coda.Net(state=2, action=1, context=1, hidden=(8,))
    params = params_like(lambda key: coda.init(key, net), KEY)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    batch = {"observation": draw(6, 3), "action": draw(6, 2), "next": draw(6, 3),
             "reward": -np.ones(6, np.float32),
             "done": np.zeros(6, np.float32)}  # fmt: skip
    policy = {"observation": draw(6, 3), "action": draw(6, 2)}
    tx = optax.sgd(0.5)
    txs = {"v": tx, "q": tx, "pi": tx}

    def f(params, batch, policy):
        def after(order):
            opt_state = {name: tx.init(params[name]) for name in txs}
            return coda.iql_update(
                params, opt_state, params["q"], batch, policy, txs=txs,
                options=coda.Options(order=order), net=net,
            )  # fmt: skip

        def by_hand(v, share, slow):
            o, a = batch["observation"], batch["action"]
            y = batch["reward"] + 0.99 * coda.iql.value(v, batch["next"])
            error = sum(
                jnp.square(jnp.clip(y, -110, 0) - q).mean()
                for q in coda.iql.critics(params["q"], o, a)
            )
            o, a = policy["observation"], policy["action"]
            advantage = coda.iql.smaller(slow, o, a) - coda.iql.value(ours["v"], o)
            return share * error, jnp.minimum(jnp.exp(10 * advantage), 100).mean()

        (ours, _, _, m), (theirs, _, _, n) = after("coda"), after("iql")
        slow = jax.tree.map(lambda a, b: 0.995 * a + 0.005 * b, params["q"], ours["q"])
        expected = [
            by_hand(params["v"], 0.5, slow), by_hand(ours["v"], 1.0, params["q"])
        ]  # fmt: skip
        return ours, theirs, [m, n], expected

    ours, theirs, metrics, expected = together(f, params, batch, policy)
    jax.tree.map(np.testing.assert_array_equal, ours["v"], theirs["v"])
    for m, (error, weight) in zip(metrics, expected):
        np.testing.assert_allclose(m["q_loss"], error, rtol=1e-5)
        np.testing.assert_allclose(m["weight_mean"], weight, rtol=1e-4)
    assert metrics[0]["q_loss"] < 0.6 * metrics[1]["q_loss"]


def test_reward_models():
    """Pessimism, and positives alone or with negatives."""
    net = coda.Net(state=2, action=1, context=1, known=(1.0, 2.0))
    shared = {"members": 3, "model_hidden": (4,)}
    options = coda.Options(**shared)
    pds = coda.Options(**shared, pessimism="min", width=0.5)
    alone = coda.Options(**shared, negatives=False)
    labels = coda.labels
    params = params_like(lambda key: labels.init_reward(key, net, options), KEY)
    rng = np.random.default_rng(0)
    batch = {"state": rng.normal(size=(4, 2)), "context": np.ones((4, 1)),
             "goal": np.array([1.0, 1.0, 0.0, 0.0])}  # fmt: skip

    def f(params, batch):
        z = labels.logits(params, batch["state"], batch["context"], net)
        return (
            jax.nn.sigmoid(z),
            labels.goal_probability(params, batch, net, options),
            labels.goal_probability(params, batch, net, pds),
            labels.reward_loss(params, batch, net, options)[0],
            labels.reward_loss(params, batch, net, alone)[0],
        )

    p, mean, least, both, positives = together(f, params, batch)
    np.testing.assert_allclose(mean, p.mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        least, np.maximum(p.min(0) - 0.5 * p.std(0), 0), rtol=1e-5
    )
    np.testing.assert_allclose(positives, -np.log(p[:, :2]).mean(), rtol=1e-5)
    errors = -np.log(p[:, :2]).sum() - np.log(1 - p[:, 2:]).sum()
    np.testing.assert_allclose(both, errors / 12, rtol=1e-5)


def test_goal_model():
    """Its likelihood is that of the mixture; samples have its moments."""
    net = coda.Net(state=4, action=1, context=2, examples=(1.0, 2.0))
    options = coda.Options(learn="goals", goals=2, model_hidden=(4,))
    labels = coda.labels
    params = params_like(lambda key: labels.init_goals(key, net, options), KEY)
    context, goal = np.float32([[1.0], [2.0]]), np.float32([[0.3, -0.2], [1.0, 0.5]])

    def f(params, key, context, goal):
        batch = {"example_context": context, "example_goal": goal}
        many = jnp.ones((4000, 1))
        return (
            labels.mixture(params, context, net, options),
            labels.goals_loss(params, batch, net, options)[0],
            labels.sample_goals(params, key, many, net, options),
        )

    key = jax.random.wrap_key_data(np.uint32([0, 2]))
    (weight, mean, std), loss, drawn = together(f, params, key, context, goal)
    normal = (
        np.exp(-0.5 * ((goal[:, None] - mean) / std) ** 2) / std / np.sqrt(2 * np.pi)
    )
    density = np.exp(weight) * normal.prod(-1)
    np.testing.assert_allclose(loss, -np.log(density.sum(1)).mean(), rtol=1e-5)
    expected = (np.exp(weight[0])[:, None] * mean[0]).sum(0)
    np.testing.assert_allclose(drawn.mean(0), expected, atol=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"discount": 1.0}, "discount must be in"),
        ({"expectile": 0.0}, "expectile must be in"),
        ({"rate": 2.0}, "rate must be in"),
        ({"cap": 0.0}, "cap must be > 0"),
        ({"low": 0.0}, "low must be < 0"),
        ({"learn": "goals"}, "goals must be >= 1"),
        ({"order": "other"}, "order"),
        ({"updates": 0}, "updates must be >= 1"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        coda.Options(**options)


def test_refused_nets():
    with pytest.raises(ValueError, match="known lists contexts that are numbers"):
        coda.Net(state=1, action=1, context=2, known=(1.0,))
    with pytest.raises(ValueError, match="encoding"):
        coda.Net(state=1, action=1, context=1, encoding="x")
