"""The nuclear norm's objective beside others, the theorem, choices; the contract."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.config import load_config
from jaxpapers.mesh import make_mesh, put_batch
from jaxpapers.papers import nuclear_norm as nu
from jaxpapers.papers.nuclear_norm import objectives
from tests.contract import Contract
from tests.programs import params_like, together

CONTRACT = Contract(
    small={
        "data.batch": 24, "data.eval_batch": 512, "optim.name": "sgd", "optim.lr": 0.1,
        "method.warmup": 0, "net.features": 8, "data.validate_every": 2,
    },
    refused={
        "method.theta": (float("nan"), "method.theta must be >= 0, got nan"),
        "method.algorithm": ("dann", "method.algorithm must be one of"),
        "method.norm.method": ("qr", "norm.method must be one of"),
        "method.norm.steps": (0, "norm.steps must be >= 1"),
        "method.valley.n_converge": (0, "n_converge and swad.n_tolerance must be >= 1"),
        "net.model": ("vit", "net.model must be one of"),
        "data.test": ((4,), r"domains 0 .. 3, each once and not all, got \(4,\)"),
        "data.validate_every": (10**6, "must be <= train.steps"),
        "train.accumulate": (2, "train.accumulate must be 1, got 2"),
    },
    # Micro-batches have norms of their own, and make refuses them.
    noisy=True,
)  # fmt: skip

NET = nu.LinearNet(inputs=5, features=4, classes=3)
COUNT, EACH = 3, 4


def batch(seed=0):
    rng = np.random.default_rng(seed)
    n = COUNT * EACH
    return {
        "x": rng.normal(size=(n, NET.inputs)).astype(np.float32),
        "label": rng.integers(0, NET.classes, n).astype(np.int32),
        "domain": np.repeat(np.arange(COUNT, dtype=np.int32), EACH),
    }


def logits_and_features(seed=1):
    rng = np.random.default_rng(seed)
    n = COUNT * EACH
    return rng.normal(size=(n, 3)), rng.normal(size=(n, 4))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def domain_losses(z, y):
    return -np.log(softmax(z)[np.arange(len(y)), y]).reshape(COUNT, EACH)


def test_objectives_by_hand(float64):
    """CORAL, IRM, V-REx and GroupDRO, from the domains one by one."""
    z, f = logits_and_features()
    b = batch()
    y = b["label"]
    q = np.array([0.5, 0.3, 0.2])
    names = ("erm", "coral", "irm", "vrex", "group_dro")

    def run(z, f, b, q):
        return {
            (name, updates): objectives.combined(
                z, f, b, q, jnp.array(updates), nu.Options(algorithm=name, coral=0.7)
            )[:2]
            for name in names
            for updates in (499, 500)
        }

    got = together(run, z, f, b, q)
    losses = domain_losses(z, y).mean(1)
    parts = f.reshape(COUNT, EACH, -1)
    pairs = [(0, 1), (0, 2), (1, 2)]
    coral = np.mean([
        np.square(parts[i].mean(0) - parts[j].mean(0)).mean()
        + np.square(np.cov(parts[i].T) - np.cov(parts[j].T)).mean()
        for i, j in pairs
    ])  # fmt: skip
    # d/dw of the cross-entropy of w z at 1.
    slope = ((softmax(z) * z).sum(1) - z[np.arange(len(y)), y]).reshape(COUNT, EACH)
    irm = (slope[:, ::2].mean(1) * slope[:, 1::2].mean(1)).mean()
    vrex = losses.var()
    grown = q * np.exp(0.01 * losses)
    expected = {
        ("erm", 499): losses.mean(), ("erm", 500): losses.mean(),
        ("coral", 499): losses.mean() + 0.7 * coral,
        ("irm", 499): losses.mean() + irm, ("irm", 500): losses.mean() + 100 * irm,
        ("vrex", 499): losses.mean() + vrex, ("vrex", 500): losses.mean() + 10 * vrex,
        ("group_dro", 500): grown / grown.sum() @ losses,
    }  # fmt: skip
    for key, value in expected.items():
        np.testing.assert_allclose(got[key][0], value, rtol=1e-10, err_msg=str(key))
    np.testing.assert_allclose(got["group_dro", 499][1], grown / grown.sum())
    np.testing.assert_array_equal(got["irm", 500][1], q)


def test_mixtures_pair_every_domain_with_another():
    b = batch()
    b["x"] = np.repeat(10.0 ** np.arange(COUNT, dtype=np.float32), EACH)[:, None]

    def run(b):
        keys = jax.random.split(jax.random.key(0), 50)
        return jax.lax.map(lambda k: objectives.mixed(k, b, COUNT, 0.2), keys)

    x, second, share = together(run, b)
    share, x = share.reshape(50, COUNT, EACH), x.reshape(50, COUNT, EACH)
    assert (share == share[..., :1]).all() and share.min() >= 0 and share.max() <= 1
    cycles = set()
    for lam, mixture, labels in zip(share[..., 0], x[..., 0], second):
        own = 10.0 ** np.arange(COUNT)
        other = (mixture - lam * own) / np.maximum(1 - lam, 1e-9)
        after = [int(np.abs(own - o).argmin()) for o in other]
        for e in range(COUNT):
            if lam[e] < 0.9:
                assert after[e] != e
                rows = slice(after[e] * EACH, (after[e] + 1) * EACH)
                np.testing.assert_array_equal(
                    labels[e * EACH : (e + 1) * EACH], b["label"][rows]
                )
        if (lam < 0.9).all():
            cycles.add(tuple(after))
    assert cycles == {(1, 2, 0), (2, 0, 1)}


def test_warm_up_and_no_weight_are_erm_bit_by_bit():
    """Parameters after updates 0 .. warmup, and one later, where the norm counts."""
    config = load_config("nuclear_norm:smoke", ["--config.optim.lr=0.1"])
    batches = [batch(i) for i in range(5)]
    rows = {"erm": {"theta": 0.0}, "nu": {"theta": 0.1, "warmup": 3}, "never":
            {"theta": 0.1, "warmup": 99}}  # fmt: skip
    changed = config.copy_and_resolve_references().unlock()
    changed.net.update(inputs=5, features=4, classes=3)
    results = {}
    for name, fields in rows.items():
        changed.method.update(fields)
        method = nu.make(changed, domains=COUNT + 1)
        state = jax.jit(method.init)(jax.random.key(0), batches[0])
        step, results[name] = jax.jit(method.update), []
        for b in batches:
            state, _ = step(state, b)
            results[name].append(jax.device_get(state.params))
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(results["erm"], results["never"])
    same(results["erm"][:4], results["nu"][:4])
    moved = results["nu"][4]["featurizer"]["weight"]
    assert np.abs(moved - results["erm"][4]["featurizer"]["weight"]).max() > 1e-4


def test_the_loss_of_a_batch_is_that_of_its_arrays():
    """``loss`` against ``nu_loss`` on its own features, and mixup's two classes."""
    params = params_like(lambda: nu.init(jax.random.key(0), NET))
    b = batch()
    extra = nu.start(params, NET, COUNT) | {"updates": np.int32(101)}
    options = nu.Options(theta=0.3, normalize="sqrt")

    def run(params, extra, b, key):
        f, _ = nu.featurize(params, {}, b["x"], NET)
        z = nu.classify(params, f)
        direct = [
            nu.nu_loss(f, z, b["label"], jnp.array(0.3), s, normalize="sqrt")
            for s in (100, 101)
        ]
        whole, (metrics, after) = nu.loss(
            params, extra, b, key, net=NET, options=options
        )
        mixup = dataclasses.replace(options, algorithm="mixup", theta=0.0, alpha=1e4)
        half = nu.loss(params, extra, b, key, net=NET, options=mixup)[0]
        return direct, (whole, metrics, after), half, f

    direct, (whole, metrics, after), half, f = together(
        run, params, extra, b, jax.random.key(3)
    )
    s = np.linalg.svd(f.astype(np.float64), compute_uv=False)
    ce = direct[1][1]["ce"]
    assert direct[0][0] == ce
    assert whole == pytest.approx(float(direct[1][0]), rel=1e-6)
    assert whole - ce == pytest.approx(0.3 * s.sum() / len(f) ** 0.5, rel=1e-5)
    assert metrics["ratio"] == pytest.approx(s.sum() / s[0], rel=1e-5)
    assert metrics["rank"] == pytest.approx(s.sum() ** 2 / np.square(s).sum(), rel=1e-5)
    assert after["updates"] == 102 and np.isfinite(half)


def test_choices_of_a_step():
    """Ties take the first, the last is the last recorded, LOO needs every pair."""
    record = np.full((5, 3, 2, 2), -1.0)
    record[:4] = 0.5
    record[:4, :, 1, 0] = [[0.7, 0.1, 0.2], [0.8, 0.2, 0.6], [0.6, 0.4, 0.6], [0, 0, 0]]
    record[:4, 0, 0, 0] = [0.1, 0.2, 0.3, 0.4]
    assert nu.select_iid(record, (0,)) == (2, 0.5, 0.3)
    assert nu.select_oracle(record, (0,)) == (1, 0.8, 0.2)
    assert nu.select_last(record, (0,)) == (3, 0.0, 0.4)
    record[1, 1, 1, 0] = 0.4  # A tie of means.
    assert nu.select_iid(record, (0,)).index == 1
    pairs = {e: np.full((5, 3, 2, 2), -1.0) for e in (1, 2)}
    for e, values in ((1, [0.1, 0.6, 0.2, 0.9]), (2, [0.1, 0.3, 0.8, 0.0])):
        pairs[e][:4] = 0.0
        pairs[e][:4, e, 0, 0] = values
    assert nu.select_loo(record, (0,), pairs) == (2, 0.5, 0.3)
    assert nu.select_iid(record[:1], (0,)) == pytest.approx((0, 0.15, 0.1))
    for call, says in (
        (lambda: nu.select_loo(record, (0,), {1: pairs[1]}), "leaves out domain 2"),
        (lambda: nu.select_iid(record, (3,)), r"must be in 0 .. 2, got \(3,\)"),
        (lambda: nu.select_iid(record, ()), r"got \(\)"),
        (lambda: nu.select_iid(record[4:], (0,)), "no evaluation"),
        (lambda: nu.select_iid(record, (0, 1, 2)), "all domains are test domains"),
        (
            lambda: nu.select_iid(record[0], (0,)),
            r"\(evaluations, domains, 2, 2\), got",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            call()


@pytest.mark.matrix
@pytest.mark.parametrize("algorithm", objectives.ALGORITHMS)
def test_objectives_are_the_same_on_a_mesh(algorithm):
    """Value and gradient of every algorithm, rows over four devices."""
    params = params_like(lambda: nu.init(jax.random.key(0), NET))
    b, extra = batch(), nu.start(params, NET, COUNT) | {"updates": np.int32(600)}
    options = nu.Options(algorithm=algorithm, theta=0.1)
    f = functools.partial(nu.loss, net=NET, options=options)
    run = jax.jit(jax.value_and_grad(f, has_aux=True))
    alone = jax.device_get(run(params, extra, b, jax.random.key(1)))
    grid = make_mesh({"data": 4, "model": 1}, jax.devices()[:4])
    with jax.set_mesh(grid):
        placed = put_batch(b, grid, len(b["label"]))
        split = jax.device_get(run(params, extra, placed, jax.random.key(1)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), alone, split)


@pytest.mark.parametrize("swad", [False, True])
def test_a_longer_run_has_room_for_its_evaluations(swad):
    def state(steps):
        config = load_config(
            "nuclear_norm:smoke",
            [f"--config.method.swad={swad}", f"--config.train.steps={steps}"],
        )
        method = nu.make(config, domains=4)
        one = {k: v[:1] for k, v in batch().items()}
        return method, jax.eval_shape(method.init, jax.random.key(0), one)

    method, old = state(200)
    _, new = state(500)
    filled = jax.tree.map(lambda x: np.full(x.shape, 7, np.float32), old.extra)
    longer = together(lambda e: method.resize(old._replace(extra=e), new).extra, filled)
    records = nu.own_extra(longer)["records"]
    assert records.shape == (5, 4, 2, 2)
    assert (records[:2] == 7).all() and (records[2:] == -1).all()


THEOREM = [
    (2, 4, 0.7), (2, 4, 0.8), (2, 4, 0.85), (1, 4, 0.7), (1, 4, 0.72), (3, 5, 0.8),
    (1, 6, 0.9),
]  # fmt: skip


def patterns(m, gamma):
    """Sign patterns of m coordinates that agree with mean gamma; their weights."""
    signs = np.array(np.meshgrid(*[[1.0, -1.0]] * m)).reshape(m, -1).T
    return signs, np.prod(np.where(signs > 0, (1 + gamma) / 2, (1 - gamma) / 2), 1)


@pytest.mark.parametrize("r, m, gamma", THEOREM)
def test_the_nuclear_norm_drops_what_misleads(r, m, gamma, float64):
    """By enumeration: the environment's weights are zero iff gamma^2 <= r (1 - gamma^2).

    Features x * w, a head of ones, squared loss over all sign patterns. The problem is
    convex and equal coordinates have equal weights, u or v: two nested searches.
    """
    signs, p = patterns(m, gamma)
    x = np.concatenate([np.ones((len(p), r)), signs], 1) * np.sqrt(p)[:, None]
    y, lam = np.sqrt(p), 0.3
    norm = nu.Norm(method="svd")

    def objective(u, v):
        w = jnp.concatenate([jnp.full(r, u), jnp.full(m, v)])
        fit = 0.5 * jnp.square(x @ w - y).sum()
        return fit + lam * nu.nuclear_norm(x * w[None], norm)[0]

    def lowest(f):
        def thirds(_, ends):
            low, high = ends
            a, b = low + (high - low) / 3, high - (high - low) / 3
            left = f(a) < f(b)
            return jnp.where(left, low, a), jnp.where(left, b, high)

        low, high = jax.lax.fori_loop(0, 40, thirds, (-0.3, 1.0))
        return (low + high) / 2

    def run(_):
        def best_u(v):
            return lowest(lambda u: objective(u, v))

        v = lowest(lambda v: objective(best_u(v), v))
        return best_u(v), v

    u, v = together(run, 0.0)
    if gamma**2 <= r * (1 - gamma**2):
        assert abs(v) < 1e-4 * abs(u)
        assert u == pytest.approx((1 - lam / r**0.5) / r, rel=1e-3)
    else:
        assert abs(v) > 1e-3 * abs(u)


def test_ridge_is_misled():
    """v / u = gamma alpha / (1 - gamma^2 + alpha), and the mean score in the test."""
    r, m, gamma, alpha = 2, 12, 0.7, 0.5
    signs, p = patterns(m, gamma)
    x = np.concatenate([np.ones((len(p), r)), signs], 1)
    gram = (x * p[:, None]).T @ x + alpha * np.eye(r + m)
    w = np.linalg.solve(gram, x.T @ p)
    assert w[r:] / w[0] == pytest.approx(
        gamma * alpha / (1 - gamma**2 + alpha), rel=1e-10
    )
    assert w[r] / w[0] == pytest.approx(0.3465, abs=1e-4)
    score = w[:r].sum() - gamma * w[r:].sum()
    assert score == pytest.approx(-0.168, abs=1e-3)


def _nu_loss(theta=0.1, label=0, **options):
    x = jnp.asarray(np.ones((3, 2), np.float32))
    labels = jnp.asarray(np.full(3, label))
    return inspect.unwrap(nu.nu_loss)(x, x, labels, theta, 1, **options)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: nu.Options(theta=-1.0), "method.theta must be >= 0, got -1.0"),
        (lambda: nu.Options(alpha=0.0), "method.alpha must be > 0"),
        (lambda: nu.Options(normalize="rows"), "method.normalize must be one of"),
        (
            lambda: nu.CnnNet(widths=(8, 8, 8)),
            r"4 multiples of net.groups=8, got \(8, 8",
        ),
        (lambda: nu.ResNet(depth=20), "depth must be one of"),
        (lambda: nu.ResNet(dropout=1.0), "net.dropout must be < 1, got 1.0"),
        (
            lambda: inspect.unwrap(nu.nu_loss)(
                jnp.ones((3, 2)), jnp.ones((3, 2)), jnp.ones(2, int), 1, 1
            ),
            "must have the same rows",
        ),
        (lambda: _nu_loss(theta=-1.0), "theta must be >= 0, got -1.0"),
        (lambda: _nu_loss(theta=float("nan")), "theta must be >= 0, got nan"),
        (lambda: _nu_loss(label=2), r"labels must be in 0 .. 1, .* got 2 .. 2"),
        (lambda: _nu_loss(normalize="rows"), "normalize must be one of .* got 'rows'"),
        (lambda: _nu_loss(warmup=-1), "warmup must be >= 0, got -1"),
        (
            lambda: nu.make(load_config("nuclear_norm:smoke"), domains=1),
            "2 domains at least, got 1",
        ),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
