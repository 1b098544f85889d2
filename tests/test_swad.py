"""SWAD against recorded traces, in a scan, and as a part of a training run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.method import gradient, swad
from jaxpapers.train import fit
from tests.programs import together


def trace(params, losses, freq, valley):
    """As the authors' loop: a validation after updates 0, freq, 2 freq, ..."""

    def step(state, now):
        i, p = now
        state = swad.accumulate(state, p, i)
        state = jax.lax.cond(
            i % freq == 0,
            lambda s: swad.validate(s, losses[i // freq], i, valley),
            lambda s: s,
            state,
        )
        return state, None

    start = swad.init({"w": params[0]}, valley)
    steps = (jnp.arange(len(params)), {"w": params})
    state, _ = jax.lax.scan(step, start, steps)
    return state, swad.finalize(state, valley)


@pytest.mark.parity("ood_dg", only=lambda entry: "val_losses" in entry["arrays"])
def test_recorded_traces(case, float64):
    a = case.arrays
    valley = swad.Valley(
        int(a["n_converge"]), int(a["n_tolerance"]), float(a["tolerance_ratio"])
    )
    params, freq = a["params"], int(a["freq"])
    dead = int(a["dead_step"])
    if dead >= 0:  # The authors' program stops there.
        params = params[: dead + 1]
    state, mean = together(
        lambda p, losses: trace(p, losses, freq, valley), params, a["val_losses"]
    )
    tolerance = case.tolerance("avg", otherwise=1e-12)
    np.testing.assert_allclose(mean.params["w"], a["avg"], atol=0, rtol=tolerance)
    assert (mean.start, mean.end) == (a["start_step"], a["end_step"])
    assert mean.count == a["n_averaged"]
    assert state.dead_step == a["dead_step"]
    assert state.converge_step == a["converge_step"]
    if state.converge_step >= 0:
        np.testing.assert_allclose(state.threshold, a["threshold"], rtol=tolerance)


def by_hand(params, losses, freq, valley):
    """The rules of the module's docstring, with lists."""
    nc, nt = valley.n_converge, valley.n_tolerance
    queue, segment, terms, begun, threshold = [], [], None, -1, 0.0
    for i, p in enumerate(params):
        segment.append((i, p))
        if i % freq:
            continue
        steps, values = zip(*segment)
        queue.append((steps[0], steps[-1], np.mean(values, 0), losses[i // freq]))
        segment = []
        recent = [q[3] for q in queue[-nc:]]
        smooth = queue[-nt:]
        if begun < 0:
            if len(recent) == nc and min(recent) == recent[0]:
                begun, threshold = (
                    queue[-nc][1],
                    np.mean(recent) * (1 + valley.tolerance),
                )
                terms, first = [], queue[-nc]
                if nt < nc:
                    terms += queue[-nc:][1 : nc - nt + 1]
                if nt > nc:
                    window = smooth[: nt - nc + 1]
                    high = [k for k, q in enumerate(window) if q[3] > threshold]
                    terms += window[(high[-1] + 1 if high else 0) + 1 :]
        elif smooth[0][1] >= begun:
            if min(q[3] for q in smooth) > threshold:
                return first, terms, i
            terms.append(smooth[0])
    if begun < 0:
        return queue[-1], None, -1
    left = queue[-nt:][1:]
    while left and min(q[3] for q in left) <= threshold:
        terms.append(left.pop(0))
    return first, terms, -1


@pytest.mark.parametrize("nc, nt", [(3, 6), (4, 2), (3, 3), (1, 2)])
def test_traces_by_hand(nc, nt):
    """Many losses at once: valleys that die, that last, and none."""
    rng = np.random.default_rng(nc)
    freq, count = 3, 15
    params = rng.normal(size=(1 + freq * (count - 1), 2)).astype(np.float32)
    fall = 1 / np.arange(1, count + 1) + 0.05 * np.arange(count)
    losses = fall + 0.3 * rng.random((40, count))
    losses[0] = -np.arange(count)
    valley = swad.Valley(nc, nt, 0.1)

    def every(params, losses):
        return jax.vmap(lambda x: trace(params, x, freq, valley))(losses)

    state, mean = together(every, params, losses.astype(np.float32))
    kinds = set()
    for i, x in enumerate(losses.astype(np.float32)):
        first, terms, dead = by_hand(params, x, freq, valley)
        assert state.dead_step[i] == dead
        kinds.add((dead < 0, terms is None))
        values = [q[2] for q in terms or [first]]
        np.testing.assert_allclose(mean.params["w"][i], np.mean(values, 0), atol=1e-5)
        if terms:
            assert mean.count[i] == len(terms)
            assert (mean.start[i], mean.end[i]) == (terms[0][0], terms[-1][1])
    # The first of one segment is always the smallest.
    assert len(kinds) > 1 or nc == 1


class Targets:
    """Batches of one target, which moves from batch to batch."""

    def batch(self, start, size, rows=None):
        return {"y": np.sin(np.arange(start, start + size, dtype=np.float32))[rows]}


def method():
    def loss(params, batch, key):
        return jnp.square(params["w"] - batch["y"]).mean(), {}

    import optax

    inner = gradient(
        lambda key, batch: {"w": jnp.zeros(())},
        loss,
        optax.sgd(0.2),
        predict=lambda params, extra, batch: params["w"] + 0 * batch["y"],
    )
    return swad.averaged(inner, swad.Valley(1, 2))


# Init, step and validation of a run, three times with its checkpoints.
@pytest.mark.programs(18)
def test_a_training_run_resumes_bit_by_bit(tmp_path):
    """And predicts with the mean of the valley, not with the last parameters."""
    refresh = swad.refresh(
        2, lambda state: float(jnp.square(state.params["w"])) + 1, swad.Valley(1, 2)
    )
    kind = method()

    def run(steps, workdir):
        return fit(
            kind, Targets(), steps=steps, batch=2, refresh=refresh, workdir=workdir,
            mesh=jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1],
                               axis_types=(jax.sharding.AxisType.Auto,) * 2),
        )  # fmt: skip

    whole = jax.device_get(run(7, None).extra)
    run(5, tmp_path)
    state = run(7, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, whole, jax.device_get(state.extra))
    kept = state.extra["swad"]
    assert int(kept.pushed) == 2 and int(kept.converge_step) == 1
    y = together(kind.predict, state.params, state.extra, {"y": np.ones(1, "f")})
    mean = together(lambda s: swad.finalize(s, swad.Valley(1, 2)), kept)
    assert y == mean.params["w"] != float(state.params["w"])


def test_refusals():
    with pytest.raises(
        ValueError, match="n_converge and swad.n_tolerance must be >= 1"
    ):
        swad.Valley(0, 6)
    with pytest.raises(TypeError, match="n_converge"):
        swad.Valley(n_converge=2.5)
    with pytest.raises(ValueError, match="tolerance must be >= 0, got nan"):
        swad.Valley(tolerance=float("nan"))
    state = jax.eval_shape(method().init, jax.random.key(0), {"y": np.ones(1, "f")})
    state = state._replace(step=np.int32(4))
    with pytest.raises(ValueError, match="finite validation loss, got nan at step 4"):
        swad.validated(state, float("nan"))
