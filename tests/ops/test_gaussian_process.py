"""Gaussian processes: recorded posteriors, closed forms, buffers, theorems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from jaxpapers.ops import gaussian_process as gp
from jaxpapers.ops import posterior as blr
from tests.programs import together

# What the index says of the kernels in words.
RECORDED = {
    "rbf": (1.3, [0.8, 1.2, 2.0]),
    "matern52": (0.7, [1.0, 1.5, 0.6]),
}


def process(**fields):
    lengths = fields.pop("lengths", [0.7, 1.3])
    fields = {"variance": 1.5, "noise": 0.05, "dtype": np.float64} | fields
    return gp.model(fields.pop("variance"), lengths, fields.pop("noise"), **fields)


def rows(n=12, d=2, actions=0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    if actions:
        x = np.concatenate([x, rng.integers(0, actions, (n, 1))], 1)
    return x, rng.normal(size=n)


def kernel_by_hand(model, a, b):
    """In NumPy, from the definition."""
    d = len(model.log_lengths)
    lengths = np.exp(np.asarray(model.log_lengths, float))
    r = np.sqrt((((a[:, None, :d] - b[None, :, :d]) / lengths) ** 2).sum(-1))
    v = np.exp(float(model.log_variance))
    root = np.sqrt(5) * r
    k = {
        "rbf": v * np.exp(-(r**2) / 2),
        "matern52": v * (1 + root + root**2 / 3) * np.exp(-root),
    }[model.kind]
    return k * (a[:, None, -1] == b[None, :, -1]) if model.actions else k


def by_hand(model, x, y, q):
    """Mean and covariance of the posterior at q."""
    noise = np.exp(float(model.log_noise))
    c = kernel_by_hand(model, x, x) + noise * np.eye(len(x))
    k = kernel_by_hand(model, q, x)
    mean = model.mean + k @ np.linalg.solve(c, y - model.mean)
    return mean, kernel_by_hand(model, q, q) - k @ np.linalg.solve(c, k.T), c


def close(a, b, tol=1e-8):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@pytest.mark.parity("rl", only=lambda entry: entry["kind"] == "gp_posterior")
def test_recorded_posteriors(case, float64):
    a, tol = case.arrays, case.tolerance("float64", otherwise=1e-8)
    for kind, (variance, lengths) in RECORDED.items():
        model = gp.model(variance, lengths, 0.0025, kind=kind, dtype=np.float64)

        def body(x, y, q, z, model=model):
            post = gp.fit(model, x, y)
            return {
                "mean": gp.predict(post, q)[0],
                "variance": gp.predict(post, q)[1],
                "cov": gp.covariance(post, q),
                "lml": gp.log_evidence(post),
                "sample": gp.sample_joint(z, post, q),
                "jitter": post.jitter,
            }

        got = together(body, a["X"], a["y"], a["Xs"], a["z"])
        for name in ("mean", "cov", "lml", "sample"):
            close(got[name], a[f"{kind}_{name}"], tol)
        close(got["variance"], np.diag(a[f"{kind}_cov"]), tol)
        assert got["jitter"] == 0


@pytest.mark.parity("rl", only=lambda entry: entry["kind"] == "gptd")
def test_recorded_temporal_differences(case, float64):
    a, tol = case.arrays, case.tolerance("float64", otherwise=1e-8)
    model = gp.model(1.0, [0.7, 0.7], float(a["noise_var"]), dtype=np.float64)
    s, gamma = a["states"], float(a["gamma"])

    def body(s, r, done, q):
        posts = {
            name: gp.fit_td(model, s[:-1], s[1:], r, done, gamma, noise=noise)
            for name, noise in (("det", "deterministic"), ("mc", "monte_carlo"))
        }
        return {
            name: (gp.predict(post, q)[0], gp.covariance(post, q))
            for name, post in posts.items()
        }

    got = together(body, s, a["rewards"], a["terminal"], a["query"])
    for name, (mean, cov) in got.items():
        close(mean, a[f"{name}_mean"], tol)
        close(cov, a[f"{name}_cov"], tol)
    # H as the code has it: +1 at a row's state, -gamma at the next one's.
    h = np.eye(50, 51) - gamma * np.eye(50, 51, 1) * ~a["terminal"][:, None]
    close(h, a["H"])


@pytest.mark.parametrize(
    "kind, actions",
    [
        ("rbf", 3),
        ("matern52", 0),
        pytest.param("rbf", 0, marks=pytest.mark.matrix),
        pytest.param("matern52", 3, marks=pytest.mark.matrix),
    ],
)
def test_posterior_by_hand(kind, actions, float64):
    model = process(kind=kind, actions=actions, mean=0.3)
    x, y = rows(actions=actions)
    q, _ = rows(7, actions=actions, seed=1)

    def body(x, y, q):
        post = gp.fit(model, x, y)
        objective = lambda m: gp.evidence(  # noqa: E731
            m, gp.observations(m, x, y, jnp.ones(len(x), bool))
        )
        return {
            "predict": gp.predict(post, q),
            "cov": gp.covariance(post, q),
            "part": gp.covariance(post, q, q[:2]),
            "other targets": gp.predict(gp.refit(post, 2 * y), q)[0],
            "evidence": gp.log_evidence(post),
            "gain": gp.information_gain(post),
            "gradient": jax.value_and_grad(objective)(model),
        }

    got = together(body, x, y, q)
    mean, cov, c = by_hand(model, x, y, q)
    close(got["predict"][0], mean)
    close(got["predict"][1], np.diag(cov))
    close(got["cov"], cov)
    close(got["part"], cov[:, :2])
    close(got["other targets"], by_hand(model, x, 2 * y, q)[0])
    normal = scipy_stats.multivariate_normal(np.full(12, 0.3), c)
    close(got["evidence"], normal.logpdf(y))
    close(got["gain"], np.linalg.slogdet(c / 0.05)[1] / 2)
    value, slopes = got["gradient"]
    close(value, normal.logpdf(y))
    for name in ("log_variance", "log_lengths", "log_noise"):
        start = np.atleast_1d(getattr(model, name))
        for i in range(len(start)):
            ends = []
            for sign in (1, -1):
                moved = start.copy()
                moved[i] += sign * 1e-5
                at = moved if name == "log_lengths" else moved[0]
                other = gp.Model(**(vars(model) | {name: at}))
                far = by_hand(other, x, y, q)[2]
                ends.append(
                    scipy_stats.multivariate_normal(np.full(12, 0.3), far).logpdf(y)
                )
            slope = (ends[0] - ends[1]) / 2e-5
            assert np.atleast_1d(getattr(slopes, name))[i] == pytest.approx(
                slope, rel=1e-5, abs=1e-6
            )


def test_temporal_differences_by_hand(float64):
    """gamma = 0 is regression; 2005's noise is regression on the returns (Engel)."""
    x, r = rows(10)
    q, _ = rows(5, seed=1)
    model, gamma = process(), 0.9
    ends = np.arange(10) == 9
    returns = r.copy()
    for i in range(8, -1, -1):
        returns[i] += gamma * returns[i + 1]
    after = np.roll(x, -1, 0)
    mixed = np.random.default_rng(3).permutation(10)

    def body(x, after, r, ends, q, returns):
        def both(post):
            return gp.predict(post, q)[0], gp.covariance(post, q), gp.log_evidence(post)

        chain = (model, x, after, r, ends)
        shuffled = (model, *(v[mixed] for v in (x, after, r, ends)))
        return {
            "regression": both(gp.fit(model, x, r)),
            "no future": both(gp.fit_td(*chain, 0.0)),
            "no future, 2005": both(gp.fit_td(*chain, 0.0, noise="monte_carlo")),
            "returns": both(gp.fit(model, x, returns)),
            "2005": both(gp.fit_td(*chain, gamma, noise="monte_carlo")),
            "2005, shuffled": both(
                gp.fit_td(
                    *shuffled, gamma, noise="monte_carlo", order=jnp.asarray(mixed)
                )
            ),
            "2003": both(gp.fit_td(*chain, gamma)),
        }

    got = together(body, x, after, r, ends, q, returns)
    for name in ("no future", "no future, 2005"):
        jax.tree.map(close, got[name], got["regression"])
    # The evidence too: the map from returns to rewards has determinant 1.
    for name in ("2005", "2005, shuffled"):
        jax.tree.map(close, got[name], got["returns"])
    assert np.abs(got["2003"][0] - got["2005"][0]).max() > 1e-3


def test_padding_and_appended_rows(float64):
    """Padding changes nothing, whatever is in it; appending is fitting."""
    x, y = rows(9)
    q, _ = rows(4, seed=1)
    model = process(mean=-0.5)
    mask = np.arange(16) < 9
    after, done = np.roll(x, -1, 0), np.arange(9) == 4

    def padded(v, c):
        return np.concatenate([v, np.full((7, *v.shape[1:]), c, v.dtype)])

    junk = [[padded(v, c) for v in (x, y, after)] for c in (0.0, 1e9, np.nan)]
    # What follows an end is not read either.
    for rows_ in junk:
        rows_[2][4] = rows_[2][-1]

    def values(post, q):
        return (
            *gp.predict(post, q), gp.log_evidence(post), gp.information_gain(post)
        )  # fmt: skip

    def temporal(q, x, y, after, done, mask):
        post = gp.fit_td(model, x, after, y, done, 0.9, noise="monte_carlo", mask=mask)
        return (*gp.predict(post, q), gp.log_evidence(post))

    def grown(x, y):
        empty = gp.fit(model, jnp.zeros((16, 2)), jnp.zeros(16), jnp.zeros(16, bool))
        return jax.lax.scan(
            lambda post, row: (gp.append(post, *row), gp.log_evidence(post)),
            empty, (x, y),
        )[0], empty  # fmt: skip

    def body(x, y, junk, q, after, done, mask, every):
        post, empty = grown(x, y)
        return {
            "plain": values(gp.fit(model, x, y), q),
            "padded": [values(gp.fit(model, *v[:2], mask), q) for v in junk],
            "appended": (values(post, q), post.root),
            "empty": values(empty, q),
            "root": gp.fit(model, *junk[0][:2], mask).root,
            "td": temporal(q, x, y, after, done, None),
            "td, padded": [temporal(q, *v, every, mask) for v in junk],
        }

    got = together(body, x, y, junk, q, after, done, mask, padded(done, True))
    for name, plain in (("padded", "plain"), ("td, padded", "td")):
        for other in got[name]:
            jax.tree.map(lambda a, b: close(a, b, 1e-11), other, got[plain])
            jax.tree.map(np.testing.assert_array_equal, other, got[name][0])
    jax.tree.map(close, got["appended"][0], got["plain"])
    close(got["appended"][1], got["root"])
    # Without observations: the prior, exactly.
    assert (got["empty"][0] == -0.5).all() and got["empty"][2:] == (0, 0)
    close(got["empty"][1], 1.5, 1e-15)


def test_theorems_of_the_variance(float64):
    """T1: never larger with more data; T2: by how much; T4: gains are submodular."""
    x, y = rows(20)
    q, _ = rows(40, seed=1)
    model = process()

    def body(x, y, q):
        def gain(rows):
            return gp.information_gain(gp.fit(model, x[rows], y[rows]))

        few, many = gp.fit(model, x[:8], y[:8]), gp.fit(model, x, y)
        one = gp.append(gp.fit(model, x[:9], y[:9], jnp.arange(9) < 8), x[12], y[12])
        noise = jnp.exp(model.log_noise)
        k = gp.covariance(few, q, x[12:13])[:, 0]
        _, own = gp.predict(few, x[12:13])
        return {
            "drop": gp.covariance(few, q) - gp.covariance(many, q),
            "prior": gp.covariance(gp.fit(model, x, y, jnp.zeros(20, bool)), q)
            - gp.covariance(few, q),
            "others": gp.predict(gp.refit(many, 5 - 3 * y), q)[1]
            - gp.predict(many, q)[1],
            "measured": gp.expected_variance(few, q) - gp.expected_variance(one, q),
            "formula": jnp.square(k).mean() / (own[0] + noise),
            "weighted": gp.expected_variance(few, q, jnp.arange(40.0)),
            "variances": gp.predict(few, q)[1],
            "gains": {
                "A": gain(np.r_[:6]), "B": gain(np.r_[6:20]), "AB": gain(np.r_[:20]),
                "Ax": gain(np.r_[:6, 19]), "ABx": gain(np.r_[:19, 19]),
                "AB-": gain(np.r_[:19]), "twice": gain(np.r_[:6, 0]),
            },
        }  # fmt: skip

    got = together(body, x, y, q)
    for name in ("drop", "prior"):
        assert np.linalg.eigvalsh(got[name]).min() > -1e-10
        assert np.diag(got[name]).max() > 0.01
    assert (got["others"] == 0).all()
    close(got["measured"], got["formula"])
    weight = np.arange(40.0)
    close(got["weighted"], (weight * got["variances"]).sum() / weight.sum())
    gains = got["gains"]
    # What later data still say is at most what they would say alone.
    assert 0 < gains["AB"] - gains["A"] < gains["B"]
    assert gains["ABx"] - gains["AB-"] < gains["Ax"] - gains["A"]
    assert gains["twice"] - gains["A"] < np.log(1 + 1.5 / 0.05) / 2


@pytest.mark.parametrize(
    "kind, actions, count, draws",
    [
        ("matern52", 0, 1024, 1000),
        pytest.param("matern52", 0, 4096, 4000, marks=pytest.mark.matrix),
        pytest.param("rbf", 2, 4096, 4000, marks=pytest.mark.matrix),
    ],
)
def test_drawn_functions_have_the_posteriors_law(kind, actions, count, draws):
    """Mean and covariance of paths within five standard errors."""
    x, y = rows(6, actions=actions)
    q, _ = rows(4, actions=actions, seed=1)
    model = process(kind=kind, actions=actions, mean=0.2, dtype=np.float32)
    rng = np.random.default_rng(2)
    shape = (draws, actions, count) if actions else (draws, count)
    weights = rng.standard_normal(shape, np.float32)
    noises = 0.05**0.5 * rng.standard_normal((draws, 6), np.float32)

    def body(x, y, q, weights, noises, key):
        post = gp.fit(model, x, y)
        features = gp.random_features(key, model, count)

        def path(weights, noise):
            drawn = gp.pathwise(post, gp.Function(model, features, weights), noise)
            return gp.evaluate(drawn, post, q)

        whole = gp.sample(key, post, 64)
        unweighted = gp.Function(model, features, weights[0])
        return {
            "paths": jax.vmap(path)(weights, noises),
            "again": [gp.evaluate(whole, post, v) for v in (q, q[:3])],
            "joint": jax.lax.map(
                lambda k: gp.sample_joint(k, post, q, jitter=1e-6),
                jax.random.split(key, draws // 2),
            ),
            "kernel": gp.prior_covariance(unweighted, q)
            - gp.kernel_matrix(model, q, q),
        }

    x, y, q = (v.astype(np.float32) for v in (x, y, q))
    got = together(body, x, y, q, weights, noises, jax.random.key(1))
    mean, cov, _ = by_hand(model, x.astype(float), y.astype(float), q.astype(float))
    sd = np.sqrt(np.diag(cov))
    # Of F features, a kernel of variance v is off by about v / sqrt(F).
    bias = 5 * 1.5 / np.sqrt(count)
    assert np.abs(got["kernel"]).max() < bias
    for name, slack in (("paths", bias), ("joint", 0.0)):
        v = got[name].astype(float)
        off = np.abs(v.mean(0) - mean) - slack
        assert (off < 5 * sd / np.sqrt(len(v))).all(), name
        error = np.sqrt((np.outer(sd, sd) ** 2 + cov**2) / len(v))
        assert (np.abs(np.cov(v.T) - cov) - slack < 5 * error).all(), name
    np.testing.assert_allclose(got["again"][0][:3], got["again"][1], atol=1e-5)


def test_weight_space_is_function_space(float64):
    """A regression on features is the process whose kernel they are."""
    x, y = rows(10)
    q, _ = rows(4, seed=1)
    model = process()

    def body(x, y, q, key):
        features = gp.random_features(key, model, 30, jnp.float64)
        phi, at = (gp.feature_map(features, model, v) for v in (x, q))
        post = blr.posterior(blr.statistics(phi, y), 1.0, model.noise)
        c = phi @ phi.T + model.noise * jnp.eye(10)
        given = gp.Observations(x, None, jnp.ones(10, bool), c, y)
        process_ = gp.condition(model, given)
        k = at @ phi.T
        variance = (at**2).sum(1) - (k * gp.solve(process_.root, k.T).T).sum(1)
        return {
            "mean": (at @ post.mean, k @ process_.alpha),
            "variance": (blr.variance(post, at), variance),
            "evidence": (
                blr.log_evidence(post, 1.0, model.noise), gp.log_evidence(process_)
            ),
        }  # fmt: skip

    for pair in together(body, x, y, q, jax.random.key(0)).values():
        close(*pair)


def test_evidence_is_maximised_within_bounds(float64):
    optax = pytest.importorskip("optax")
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (60, 2))
    truth = process(lengths=[0.5, 5.0], variance=2.0, noise=0.1)
    c = kernel_by_hand(truth, x, x) + 0.1 * np.eye(60)
    y = np.linalg.cholesky(c) @ rng.normal(size=60)
    start = process(lengths=[1.5, 1.5], variance=0.5, noise=0.5)
    low = process(lengths=[0.1, 0.1], variance=0.1, noise=0.2)
    high = process(lengths=[10.0, 10.0], variance=10.0, noise=1.0)
    adam = optax.adam(0.1)

    def body(x, y):
        def objective(m):
            return gp.evidence(m, gp.observations(m, x, y, jnp.ones(60, bool)))

        def broken(m):
            # Not finite in part of the box: no step into it counts.
            return jnp.where(m.log_noise < jnp.log(0.45), jnp.nan, objective(m))

        return {
            "best": gp.maximise(objective, start, low, high, adam, 60),
            "none": gp.maximise(objective, start, low, high, adam, 0),
            "broken": gp.maximise(broken, start, low, high, adam, 20),
        }

    got = together(body, x, y)
    best = got["best"]
    assert best.value > best.start + 10
    # The best within the bounds is better than the truth, moved into them.
    normal = scipy_stats.multivariate_normal(np.zeros(60), c + 0.1 * np.eye(60))
    assert best.value > normal.logpdf(y)
    lengths = np.exp(best.model.log_lengths)
    assert lengths[1] > 2 * lengths[0]
    # The noise that the data ask for lies below the bound.
    assert np.exp(best.model.log_noise) == pytest.approx(0.2)
    assert got["none"].value == got["none"].start
    assert np.exp(got["none"].model.log_noise) == pytest.approx(0.5)
    assert np.isfinite(got["broken"].value)
    assert np.exp(got["broken"].model.log_noise) >= 0.45
    with pytest.raises(ValueError, match="must not exceed"):
        gp.maximise(lambda m: 0.0, start, high, low, adam)


def test_what_is_kept_is_what_the_rest_does_not_say():
    rng = np.random.default_rng(0)
    far = np.float32([[0, 0], [5, 0], [0, 5], [5, 5]])
    close_ = far[0] + 0.01 * rng.normal(size=(8, 2)).astype("f")
    x = np.concatenate([close_, far[1:], np.full((4, 2), np.nan, "f")])
    model = process(dtype=np.float32)
    mask = np.arange(15) < 11

    def body(x, mask):
        four = gp.keep_by_variance(model, x, mask, 4)
        # The greedy rule by posterior variances, one fit at a time.
        return {
            "four": four,
            "more": gp.keep_by_variance(model, x, mask, 13),
            "rest": gp.predict(
                gp.fit(model, x[four[0]], jnp.zeros(4)), jnp.where(mask[:, None], x, 0)
            )[1],
        }

    got = together(body, x, mask)
    kept, real = got["four"]
    assert real.all() and sorted(kept)[1:] == [8, 9, 10] and kept[0] < 8
    assert got["rest"][mask].max() < 0.1
    kept, real = got["more"]
    assert (
        kept[:11].tolist() == list(range(11))
        and real.tolist() == [True] * 11 + [False] * 2
    )


def test_jitter_grows_until_the_factor_exists_then_it_is_an_error():
    x = np.zeros((30, 1), np.float32)
    x[:, 0] = np.linspace(0, 1e-3, 30)
    tiny = gp.model(1.0, [1.0], 1e-12)
    broken = np.float32([[1, 2], [2, 1]])

    def body(x, broken):
        post = gp.fit(tiny, x, jnp.sin(x[:, 0]))
        return {
            "post": post,
            "predict": gp.predict(post, x),
            "failed": gp.factor(broken, jnp.ones(2)),
        }

    got = together(body, x, broken)
    assert 1e-7 < got["post"].jitter <= 1.01e-2
    assert np.isfinite(got["predict"][0]).all()
    assert np.isnan(got["failed"][0]).all() and np.isnan(got["failed"][1])
    gp.check_finite(got["post"])
    with pytest.raises(ValueError, match="not positive definite"):
        gp.check_finite(got["post"]._replace(jitter=np.float32(np.nan)))


@pytest.mark.programs(40)  # Eager on purpose: errors of values that are known.
def test_refuses():
    x, y = (v.astype(np.float32) for v in rows(4))
    x, y = jnp.asarray(x), jnp.asarray(y)
    model = process(dtype=np.float32)
    for fields, words in (
        ({"noise": 0.0}, "noise must be > 0"),
        ({"noise": -1.0}, "noise must be > 0"),
        ({"lengths": [1.0, 0.0]}, "lengths must be > 0"),
        ({"lengths": 1.0}, "lengths must be a vector"),
        ({"variance": float("nan")}, "variance must be > 0"),
        ({"kind": "linear"}, "kind must be one of"),
        ({"actions": -1}, "actions must be >= 0"),
    ):
        with pytest.raises(ValueError, match=words):
            process(**fields)
    with pytest.raises(ValueError, match=r"\(N, 2\): 2 inputs; got \(4, 1\)"):
        gp.fit(model, x[:, :1], y)
    with pytest.raises(ValueError, match="need the same N"):
        gp.fit(model, x, y[:3])
    with pytest.raises(ValueError, match="observations must be finite"):
        gp.fit(model, x, y.at[1].set(jnp.nan))
    with pytest.raises(ValueError, match="inputs must be finite"):
        gp.fit(model, x.at[1].set(jnp.inf), y)
    none = jnp.zeros(4, bool)
    for gamma in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\]"):
            gp.fit_td(model, x, x, y, none, gamma)
    with pytest.raises(ValueError, match="noise must be one of"):
        gp.fit_td(model, x, x, y, none, 0.9, noise="white")
    with pytest.raises(ValueError, match="successors and ends"):
        gp.fit_td(model, x, x[:2], y, none, 0.9)
    post = jax.jit(gp.fit)(model, x, y)
    with pytest.raises(ValueError, match="buffer of 4 rows is full"):
        gp.append(post, x[0], y[0])
    full = jax.jit(gp.append)(post, x[0], y[0])
    with pytest.raises(ValueError, match="not positive definite"):
        gp.check_finite(full)
    with pytest.raises(ValueError, match=r"count must be in \[1, 4\]"):
        gp.keep_by_variance(model, x, ~none, 5)
    with pytest.raises(ValueError, match="at least 1 random feature"):
        gp.random_features(jax.random.key(0), model, 0)
    with pytest.raises(ValueError, match="z must have the shape"):
        gp.sample_joint(y[:2], post, x)
    linked = post._replace(link=gp.Link(x, y))
    with pytest.raises(ValueError, match="posterior of values"):
        gp.append(linked, x[0], y[0])


def test_copies_of_an_input_are_averaged():
    """Ten observations of one input, each of noise s2, are one of noise s2 / 10."""
    y = np.arange(10, dtype=np.float32)
    one = gp.model(1.0, [1.0], 0.5)
    mean, variance = together(
        lambda x, y: gp.predict(gp.fit(one, x, y), x[:1]), np.ones((10, 1), "f"), y
    )
    assert mean == pytest.approx(4.5 / 1.05, rel=1e-5)
    assert variance == pytest.approx(1 - 1 / 1.05, rel=1e-4)


def test_nothing_is_compiled_again_as_data_grow():
    model = process(dtype=np.float32)
    x, y = (v.astype(np.float32) for v in rows(8))
    traces = []

    @jax.jit
    def fitted(x, y, mask):
        traces.append(1)
        return gp.predict(gp.fit(model, x, y, mask), x)

    for n in range(9):
        fitted(x, y, np.arange(8) < n)
    assert len(traces) == 1
