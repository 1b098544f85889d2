"""Looped transformers: recorded numbers, both forms of the loop, stopping, contract."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import run
from jaxpapers.ops import algorithmic
from jaxpapers.papers import looped_transformer as looped
from jaxpapers.papers.looped_transformer import Net
from jaxpapers.papers.looped_transformer.network import check_steps, check_tokens
from tests.contract import Contract
from tests.programs import KEY, params_like, together

CONTRACT = Contract(
    small={
        "data.batch": 16, "data.length": 2, "data.interval": 0, "data.eval_batch": 8,
        "data.eval_count": 8, "data.lengths": (2,), "net.width": 16, "net.heads": 2,
        "net.init_std": 0.2, "optim.name": "sgd", "optim.lr": 0.2, "optim.clip": 1.0,
        "optim.weight_decay": 0.0, "optim.schedule": "constant", "optim.hold": 0,
        "train.steps": 20,
    },
    refused={
        "net.heads": (3, "net.width must be a multiple of net.heads"),
        "net.inject": ("multiply", "net.inject must be one of"),
        "optim.name": ("x", "optim.name"),
    },
)  # fmt: skip
NET = Net(vocab_size=6, width=16, heads=2, layers=2, init_std=0.3)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 6, (3, 7)), jnp.int32)


def params_of(net=NET):
    return params_like(functools.partial(looped.init, net=net), KEY)


def from_torch(w):
    """Parameters of recorded weights, whose linear layers are (out, in)."""
    count = 1 + max(int(m[1]) for k in w if (m := re.match(r"blocks\.(\d+)", k)))

    def stacked(name):
        return np.stack([w[f"blocks.{i}.{name}"] for i in range(count)])

    def linear(name):
        return {
            "kernel": stacked(f"{name}.weight").swapaxes(1, 2),
            "bias": stacked(f"{name}.bias"),
        }

    def norm(name):
        return {"scale": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    qkv = linear("qkv")
    parts = {k: np.split(v, 3, -1) for k, v in qkv.items()}
    attention = {
        name: {k: v[i] for k, v in parts.items()}
        for i, name in enumerate(("query", "key", "value"))
    }
    # Without positions it adds the same to all scores of a query.
    del attention["key"]["bias"]
    return {
        "embed": {"embedding": w["emb.weight"]},
        "layers": {
            "attention": {**attention, "out": linear("o")},
            "attention_norm": norm("ln1"),
            "mlp": {"up": linear("f1"), "down": linear("f2")},
            "mlp_norm": norm("ln2"),
        },
        "norm": {"scale": w["lnf.weight"], "bias": w["lnf.bias"]},
        "head": {"kernel": w["head.weight"].T},
    }


def assert_close(a, b, tolerance, name=""):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name


@pytest.mark.parity("lm", only=lambda entry: entry.get("kind") == "looped")
def test_recorded_run(case):
    z = case.arrays
    params = from_torch({k[2:]: v for k, v in z.items() if k.startswith("w/")})
    vocab, width = params["embed"]["embedding"].shape
    net = Net(
        vocab_size=vocab,
        width=width,
        heads=case.read("heads", 4),
        layers=len(params["layers"]["mlp_norm"]["scale"]),
        epsilon=case.read("epsilon", 1e-5),
    )
    count = len([k for k in z if k.startswith("logits_T")])
    mask = jnp.asarray(z["mask"], jnp.float32)
    tokens, targets, steps = (jnp.asarray(z[k], jnp.int32) for k in ("x", "y", "T"))
    batch = {"tokens": tokens, "targets": targets, "weights": mask, "n_steps": steps}

    def compute(params):
        trace = looped.forward_all(params, tokens, count, net=net)
        objective = functools.partial(
            looped.loss, batch=batch, net=net, buckets=((count, tokens.shape[1]),)
        )
        (value, _), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return (
            trace.logits, value, grads, looped.self_cross_entropy(trace.logits, mask),
            looped.stop_max_confidence(trace.logits, mask),
            looped.stop_max_confidence(trace.logits, mask, "batch"),
        )  # fmt: skip

    logits, value, grads, entropy, each, together_ = together(compute, params)
    tolerance = case.tolerance("logits", "float32", otherwise=1e-4)
    for t in range(count):
        assert_close(logits[t], z[f"logits_T{t + 1}"], tolerance, t)
    assert value == pytest.approx(float(z["loss"]), rel=tolerance)
    expected = from_torch({k[2:]: v for k, v in z.items() if k.startswith("g/")})
    limit = case.tolerance("gradients", "float32", otherwise=1e-3)
    jax.tree.map(lambda a, b: assert_close(a, b, limit), grads, expected)
    assert_close(entropy, z["self_ce"], tolerance)
    # Recorded steps count from 1, as everywhere.
    np.testing.assert_array_equal(each, z["stop_per_sample"])
    assert int(together_) == int(z["stop_batch"])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"inject": "none"}, marks=pytest.mark.matrix),
        pytest.param({"inject": "concat", "tied": True}, marks=pytest.mark.matrix),
        {"norm_in_loop": False, "loop_rows": 2, "scale_residual": True, "remat": True},
        pytest.param({"position": "rope"}, marks=pytest.mark.matrix),
    ],
    ids=lambda fields: "-".join(fields) or "paper",
)
def test_masked_scan_is_the_loop_by_hand(fields):
    """Rows of 1, 3 and 5 steps: one masked scan, one program each, and the equations."""
    net = Net(**{**vars(NET), **fields})
    unrolled = Net(**{**vars(net), "form": "unroll"})
    params, steps = params_of(net), jnp.array([1, 3, 5], jnp.int32)

    def by_hand(params, row, count):
        e = params["embed"]["embedding"][TOKENS[row : row + 1]]
        h = e if net.inject == "none" else jnp.zeros_like(e)
        for t in range(count):
            h = looped.step(params, h, e, net=net, t=t, n_steps=count)
        return looped.readout(params, h, net)[0]

    def compute(params, steps):
        masked = looped.forward(params, TOKENS, steps, net=net, max_steps=6)
        static = [
            looped.forward(params, TOKENS[i : i + 1], n, net=unrolled)[0]
            for i, n in enumerate((1, 3, 5))
        ]
        hand = [by_hand(params, i, n) for i, n in enumerate((1, 3, 5))]
        return masked, static, hand

    masked, static, hand = together(compute, params, steps)
    np.testing.assert_allclose(masked, static, atol=1e-5)
    np.testing.assert_allclose(masked, hand, atol=1e-5)


def test_causal_and_of_no_fixed_length():
    """Logits before a changed token stay; no parameter knows a length."""
    other = TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % 6)
    params, long = params_of(), jnp.tile(TOKENS, (1, 30))

    def compute(params):
        forward = functools.partial(looped.forward, params, n_steps=3, net=NET)
        return forward(TOKENS), forward(other), forward(long)

    a, b, c = together(compute, params)
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert np.abs(a[:, 4:] - b[:, 4:]).max() > 1e-3
    np.testing.assert_allclose(a, c[:, :7], atol=1e-5)
    assert 7 not in {n for x in jax.tree.leaves(params) for n in x.shape}


def test_gradient_of_the_last_steps_only():
    """Truncated after k steps: that of k steps from a state that is a constant."""
    params, steps = params_of(), jnp.array([2, 5, 4], jnp.int32)
    k = 2
    net = Net(**{**vars(NET), "grad_loops": k})

    def value(params, row, count, net):
        y = looped.forward(params, TOKENS[row : row + 1], count, net=net)
        return jnp.square(y).mean()

    def by_hand(params, frozen, row, count):
        e = params["embed"]["embedding"][TOKENS[row : row + 1]]
        h, constant = (
            jnp.zeros_like(e),
            frozen["embed"]["embedding"][TOKENS[row : row + 1]],
        )
        for _ in range(count - k):
            h = looped.step(frozen, h, constant, net=NET)
        for _ in range(k):
            h = looped.step(params, h, e, net=NET)
        return jnp.square(looped.readout(params, h, NET)).mean()

    def compute(params, steps):
        def masked(p):
            y = looped.forward(p, TOKENS, steps, net=net, max_steps=5)
            return jnp.square(y).mean((1, 2)).sum()

        static = [jax.grad(value)(params, i, n, net) for i, n in enumerate((2, 5, 4))]
        hand = [
            jax.grad(by_hand)(params, jax.lax.stop_gradient(params), i, n)
            for i, n in enumerate((2, 5, 4))
        ]
        total = [jax.tree.map(lambda *x: sum(x), *g) for g in (static, hand)]
        return jax.grad(masked)(params), *total

    masked, static, hand = together(compute, params, steps)
    for other in (static, hand):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), masked, other
        )


def test_gradient_by_finite_differences(float64):
    net = Net(**{**vars(NET), "dtype": "float64"})
    params = jax.tree.map(np.float64, params_of())
    batch = _batch("copy", 3, steps=(2, 3, 3))
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)

    def compute(params, direction):
        def along(size):
            moved = jax.tree.map(lambda p, d: p + size * d, params, direction)
            return looped.loss(moved, batch, net=net, buckets=((2, 3), (3, 7)))[0]

        return jax.grad(along)(0.0), (along(1e-4) - along(-1e-4)) / 2e-4

    slope, difference = together(compute, params, direction)
    # The softmax of the attention is in float32.
    assert slope == pytest.approx(difference, rel=1e-4)


def _batch(name, n, steps=None):
    key = jax.random.key(0)
    batch = together(lambda: algorithmic.lay_out(algorithmic.draw(name, key, n, 3)))
    batch = {**batch, "n_steps": np.array(steps or batch["n_steps"], np.int32)}
    return jax.tree.map(jnp.asarray, batch)


def test_buckets_change_nothing_but_the_cost():
    """Branches for short and for long batches; more steps than the last has are seen."""
    short, long = _batch("parity", 2), _batch("parity", 5)
    short = {
        k: jnp.pad(v, ((0, 0), (0, 3)))[:, :7] if v.ndim == 2 else v
        for k, v in short.items()
    }
    params = params_of()

    def compute(params, short, long):
        both = []
        for batch in (short, long):
            logits = looped.predict(
                params, (), batch, net=NET, buckets=((2, 4), (5, 7))
            )
            whole = looped.forward(
                params, batch["tokens"], batch["n_steps"], net=NET, max_steps=5
            )
            counted = batch["weights"][..., None]
            both.append((logits * counted, whole * counted))

        def value(params, buckets):
            return looped.loss(params, long, net=NET, buckets=buckets)

        few = value(params, ((3, 7),))[1]["clamped"]
        gradient = jax.grad(value, has_aux=True)
        return (
            both,
            few,
            gradient(params, ((2, 4), (5, 7))),
            gradient(params, ((5, 7),)),
        )

    both, few, (grads, metrics), (expected, _) = together(compute, params, short, long)
    for bucketed, whole in both:
        np.testing.assert_allclose(bucketed, whole, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected
    )
    assert (float(few), float(metrics["clamped"])) == (1, 0)
    assert float(metrics["weight"]) == 6


def test_metrics_by_hand():
    logits = np.full((2, 3, 4), -5.0, np.float32)
    targets = np.array([[1, 2, 0], [1, 2, 0]], np.int32)
    best = np.array([[0, 2, 0], [0, 3, 0]])
    np.put_along_axis(logits, best[..., None], 5.0, -1)
    weights = np.array([[0, 1, 1], [0, 1, 1]], np.float32)
    right = together(looped.exact_match, logits, targets, weights)
    np.testing.assert_array_equal(right, [1, 0])


def test_stopping():
    """Smallest own cross-entropy, first of equal ones; first state that hardly moves."""
    sharp = np.array([[0, 4], [2, 4], [2, 1], [1, 1]], np.float32)  # (T, B)
    logits = np.zeros((4, 2, 3, 2), np.float32)
    logits[:, :, 1, 0] = sharp
    logits[:, :, 2, 1] = 9  # A position without weight.
    logits, mask = jnp.asarray(logits), jnp.array([[1.0, 1, 0], [1, 1, 0]])
    distance = np.array([[0.5, 0.3], [0.04, 0.2], [0.01, 0.1], [0.3, 0.2]], np.float32)

    def compute(logits, distance):
        each = looped.stop_max_confidence(logits, mask)
        whole = looped.stop_max_confidence(logits, mask, "batch")
        return (
            each,
            whole,
            looped.stop_fixed_point(distance),
            looped.at_step(logits, each),
        )

    each, whole, fixed, chosen = together(compute, logits, distance)
    np.testing.assert_array_equal(each, [2, 1])
    assert int(whole) == 2
    np.testing.assert_array_equal(fixed, [2, 4])
    np.testing.assert_array_equal(chosen[:, 1, 0], [2, 4])
    with pytest.raises(ValueError, match="sample or batch, got 'row'"):
        looped.stop_max_confidence(logits, mask, "row")


def test_decode_cuts_at_the_end():
    tokens = np.array([[3, 2, 1, 0, 0, 0]], np.int32)
    logits = np.eye(6, dtype=np.float32)[[[5, 5, 3, 2, 0, 3]]]
    answer = together(looped.decode, logits, tokens)
    np.testing.assert_array_equal(answer, [[3, 2, 0, 0, 0, 0]])


@pytest.mark.parametrize("loops", [1, pytest.param(3, marks=pytest.mark.matrix)])
def test_generation_with_caches_is_the_argmax_of_the_full_forward(loops):
    net = Net(**{**vars(NET), "loops": loops})
    params = params_of(net)

    def compute(params):
        new = looped.generate_ntp(params, TOKENS, 4, net=net)
        fed = jnp.concatenate([TOKENS, new], 1)
        return new, looped.forward(params, fed, net=net).argmax(-1)[:, 6:-1]

    new, best = together(compute, params)
    np.testing.assert_array_equal(new, best)


def test_bad_input():
    params = params_of()
    with pytest.raises(ValueError, match="n_steps must be >= 1, got 0"):
        looped.forward(params, TOKENS, 0, net=NET)
    with pytest.raises(ValueError, match="at most max_steps=2, got 5"):
        looped.forward(params, TOKENS, jnp.array([1, 2, 5]), net=NET, max_steps=2)
    with pytest.raises(ValueError, match=r"each of 3 rows, got shape \(2,\)"):
        inspect.unwrap(looped.forward)(params, TOKENS, jnp.array([1, 2]), net=NET)
    with pytest.raises(TypeError, match="whole numbers, got 2.5"):
        check_steps(2.5, 0, NET)
    with pytest.raises(ValueError, match="in 0 .. 5, net.vocab_size, got 0 .. 6"):
        looped.forward(params, TOKENS.at[0].set(jnp.arange(7)), 1, net=NET)
    with pytest.raises(ValueError, match=r"tokens must be \(B, L\), got \(7,\)"):
        check_tokens(TOKENS[0], NET)
    batch = _batch("parity", 3)
    for buckets in (((3, 4),), ((3, 5), (2, 5))):
        with pytest.raises(ValueError, match="the last one to the 5 tokens"):
            looped.loss(params, batch, net=NET, buckets=buckets)
    with pytest.raises(ValueError, match="pass n_steps"):
        looped.forward(params, TOKENS, net=NET)
    with pytest.raises(ValueError, match="pass max_steps"):
        jax.eval_shape(
            lambda n: check_steps(n, 0, NET), jax.ShapeDtypeStruct((), "int32")
        )
    with pytest.raises(ValueError, match="multiple of net.heads"):
        Net(width=30, heads=8)
    with pytest.raises(ValueError, match="length >= 1 and net.loops >= 1, got 4 and 0"):
        looped.generate_ntp(params, TOKENS, 4, net=NET)


@pytest.mark.slow
def test_learns_the_parity_of_four_bits(tmp_path):
    """Exact match at the training length; chance, and a new model, are at 0.5."""
    summary = run.run(
        "looped_transformer",
        [
            "--config.data.length=4", "--config.data.lengths=(4,)",
            "--config.train.steps=1500", "--config.optim.hold=1200",
            "--config.train.eval_every=0",
        ],
        workdir=str(tmp_path / "run"), alone=True, quiet=True,
    )  # fmt: skip
    assert summary.content["rows"][0]["numbers"][0]["length_4"] >= 0.98
