"""The n largest of a stream: as a full sort, ties included, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxpapers.ops import selection
from tests.programs import together


def by_sort(scores, n, valid=None):
    scores = np.where(np.isnan(scores), -np.inf, scores)
    if valid is not None:
        scores = np.where(valid, scores, -np.inf)
    return np.lexsort((np.arange(len(scores)), -scores))[:n]


def tied(size=97, seed=0):
    """Scores with many equal ones, both signs and both zeros."""
    scores = np.random.default_rng(seed).integers(-4, 5, size).astype(np.float32) / 2
    scores[::7] *= -0.0
    return scores


@pytest.mark.parametrize("n", [1, 30, 97])
def test_as_a_full_sort(n):
    valid = np.random.default_rng(1).random(97) < 0.7
    distinct = np.random.default_rng(2).normal(size=97).astype(np.float32)
    broken = tied()
    broken[5:9] = np.nan

    def body(ties, distinct, broken, valid):
        return [
            selection.top_n(ties, n),
            selection.top_n(distinct, n),
            selection.top_n(broken, n),
            selection.top_n(ties, n, valid=valid),
            selection.top_n(distinct, n, ordered=False),
        ]

    *got, loose = together(body, tied(), distinct, broken, valid)
    rows = [(tied(), None), (distinct, None), (broken, None), (tied(), valid)]
    for top, (scores, kept) in zip(got, rows):
        expected = by_sort(scores, n, kept)
        count = min(n, int((~np.isnan(scores) if kept is None else kept).sum()))
        np.testing.assert_array_equal(top.index[:count], expected[:count])
        np.testing.assert_array_equal(top.score[:count], scores[expected][:count])
        assert (top.score[count:] == -np.inf).all()
    np.testing.assert_array_equal(loose.index, np.sort(by_sort(distinct, n)))


def test_a_stream_in_any_order_is_the_whole():
    scores, chunk, n = tied(96), 16, 21
    given = jnp.asarray(scores)

    def stream(order):
        def body(top, start):
            part = order[start + jnp.arange(chunk)]
            inside = part < 90
            return selection.merge(top, given[part], part, inside), None

        top = jax.lax.scan(body, selection.empty(n), jnp.arange(0, 96, chunk))[0]
        return selection.ordered(top)

    orders = [np.arange(96), np.random.default_rng(3).permutation(96)]
    got = together(lambda *x: [stream(jnp.asarray(o)) for o in x], *orders)
    for top in got:
        np.testing.assert_array_equal(top.index, by_sort(scores[:90], n))
    few = together(
        lambda s: selection.merge(selection.empty(9), s, jnp.arange(4)), scores[:4]
    )
    assert np.isfinite(few.score).sum() == 4
    with pytest.raises(ValueError, match="9 outliers are to be chosen of 4"):
        selection.check_full(few, "outliers")


def test_memory_does_not_grow_with_the_stream():
    """What a scan over chunks holds is the slots and a chunk."""

    def size(chunks):
        def body(top, i):
            scores = jnp.sin(i + jnp.arange(512.0))
            return selection.merge(top, scores, 512 * i + jnp.arange(512)), None

        def scan():
            return jax.lax.scan(body, selection.empty(64), jnp.arange(chunks))[0]

        analysis = jax.jit(scan).lower().compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    # The counter of the chunks itself is four bytes of each.
    assert size(400) - size(4) <= 4 * 400


@pytest.mark.parametrize("devices", [2, 8])
def test_shards_select_what_one_device_does(devices):
    scores, n = tied(64), 20
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        devices=jax.devices()[:devices],
        axis_types=(jax.sharding.AxisType.Auto,),
    )

    def local(scores, index):
        own = min(n, len(scores))
        top = selection.merge(selection.empty(n), scores, index)
        first = selection.top_n(scores, own, index=index)
        both = [selection.across(top, "data"), selection.across(first, "data")]
        return jax.tree.map(lambda x: x[None], both[0]), both[1].index[None]

    top, few = together(
        jax.shard_map(
            local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
        ),
        scores,
        np.arange(64, dtype=np.int32),
    )
    for index in top.index:
        np.testing.assert_array_equal(index, by_sort(scores, n))
    assert set(few[0]) <= set(by_sort(scores, n).tolist())


def test_the_mean_of_the_nearest_is_that_of_the_order_statistics():
    f = np.random.default_rng(0).normal(0.3, 2, 4096).astype(np.float32)
    top = together(lambda f: selection.top_n(-jnp.abs(f), 400, ordered=False), f)
    expected = np.partition(np.abs(f), 400)[:400].mean()
    assert -top.score.mean() == pytest.approx(expected, rel=1e-6)


def test_refuses():
    scores = jnp.asarray(np.zeros(4, np.float32))
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"got n={n}"):
            selection.top_n(scores, n)
    with pytest.raises(ValueError, match="n must be >= 1"):
        selection.empty(0)
