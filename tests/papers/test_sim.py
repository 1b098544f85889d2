"""SIM: recorded numbers, its searches inside the model, gradients, serving, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import run
from jaxpapers import train as trainer
from jaxpapers.ops import search
from jaxpapers.papers import sim
from jaxpapers.papers.sim import units
from tests import clicks
from tests.clicks import SIZES, B, candidate, overlong, pad_histories
from tests.contract import CLICK, Contract, write_clicks
from tests.programs import together

CONTRACT = Contract(
    small={**CLICK, "net.unit": (8,), "net.k": 4, "net.short": 4, "net.time_dim": 0},
    data=write_clicks,
    refused={
        "net.search": ("random", "search"),
        "net.k": (0, "net.k"),
        "train.accumulate": (0, "train.accumulate"),
    },
)

T, N = 12, 5
SMALL = {
    **SIZES, "hidden": (6,), "k": 3, "short": 2, "skip": 0, "gsu_hidden": (5,),
    "gsu_dim": 3, "heads": 2, "head_dim": 3, "time_dim": 2, "gsu_pool": "sum",
    "user_dim": 0, "item_bias": True,
}  # fmt: skip
matrix = pytest.mark.matrix
batch = functools.partial(clicks.batch, slots=T, times=True)


def net_of(kind, **fields):
    return sim.Net(**{**SMALL, "search": kind, **fields})


config = functools.partial(clicks.config, "sim:smoke", SMALL)
drawn = functools.partial(clicks.drawn, sim)
gradient = functools.partial(clicks.gradient, sim)


# Recorded numbers

DTYPES = ["float64", pytest.param("float32", marks=matrix)]


def has(*names):
    return lambda entry: set(names) <= set(entry["arrays"])


def arrays(case, dtype):
    return {
        k: v.astype(dtype) if v.dtype == float else v for k, v in case.arrays.items()
    }


@pytest.mark.parity("ctr", only=has("pooled_aux", "topk_index", "hard_index"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_search_and_attention_of_the_peer(case, dtype):
    """Its attention has values, an output projection and a scale."""
    x, tol, heads = arrays(case, dtype), case.tolerance(dtype), case.read("heads")
    k = int(x["K"])
    mask = np.arange(x["seq"].shape[1])[None] < x["lengths"][:, None]
    x |= {"mask": mask}

    def check(x):
        mask, params = x["mask"], {"W_o": x["W_o"]}
        for ours, theirs in (("W_a", "W_q"), ("W_b", "W_k"), ("W_v", "W_v")):
            params[ours] = x[theirs].reshape(heads, -1, x[theirs].shape[1])
        scores = sim.soft_scores(x["W_a"], x["W_b"], x["seq"], x["target"])
        found = sim.topk_masked(scores, mask, k)
        args = x["selected"], x["topk_valid"], x["target"]
        return {
            "scores": jnp.where(mask, scores, 0),
            "pooled_aux": sim.gsu_pool(scores, x["seq"], mask),
            "topk_index": found.idx,
            "topk_valid": found.valid,
            "hard_index": sim.hard_search(x["cats"], mask, x["target_cat"], k).idx,
            "selected": search.take(x["seq"], found),
            "esu_output": sim.esu(params, *args, scaled=True),
        }

    with jax.enable_x64(dtype == "float64"):
        found = together(check, x)
    # The file's scores are those of valid positions; elsewhere they count nowhere.
    x["scores"] = np.where(mask, x["scores"], 0)
    for name, value in found.items():
        scale = max(1, np.abs(x[name]).max())
        np.testing.assert_allclose(
            value, x[name], rtol=0, atol=tol * scale, err_msg=name
        )


@pytest.mark.parity("ctr", only=has("z", "valid", "U_lt", "att"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_attention_of_the_paper(case, dtype):
    x, tol = arrays(case, dtype), case.tolerance(dtype)
    slots = x["z"].shape[1]
    # The weights themselves: attention pools a one-hot part of z.
    hot = np.broadcast_to(np.eye(slots, dtype=dtype), (len(x["z"]), slots, slots))
    x["hot"] = np.concatenate([x["z"], hot], -1)
    wide = x["wide"] = np.pad(x["W_b"], ((0, 0), (0, 0), (0, slots)))

    def check(x):
        params = {"W_a": x["W_a"], "W_b": x["W_b"]}
        esu = functools.partial(sim.esu, target=x["target"])
        return (
            esu(params, x["z"], x["valid"]),
            esu({**params, "W_b": x["wide"]}, x["hot"], x["valid"]),
            esu(params, x["z"], jnp.zeros_like(x["valid"])),
        )

    with jax.enable_x64(dtype == "float64"):
        out, weights, none = together(check, x)
    np.testing.assert_allclose(out, x["U_lt"], rtol=0, atol=tol)
    weights = weights.reshape(len(hot), len(wide), -1)[..., -slots:]
    np.testing.assert_allclose(weights, x["att"], rtol=0, atol=tol)
    assert not none.any()


# The searches


def test_soft_scores_of_candidates_and_the_mean_of_the_searched():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 6)).astype(np.float32)
    hist = rng.normal(size=(B, T, 6)).astype(np.float32)
    target = rng.normal(size=(B, N, 6)).astype(np.float32)
    mask = np.arange(T)[None] < np.arange(B)[:, None]
    many, one, mean = together(
        lambda a, b, hist, target, mask: (
            sim.soft_scores(a, b, hist, target),
            sim.soft_scores(a, b, hist, target[:, 0]),
            sim.gsu_pool(jnp.ones((B, T)), hist, mask, pool="mean"),
        ),
        a, b, hist, target, mask,
    )  # fmt: skip
    plain = np.einsum("bth,bnh->bnt", hist @ b.T, target @ a.T)
    np.testing.assert_allclose(many, plain, rtol=1e-6, atol=1e-6 * np.abs(plain).max())
    np.testing.assert_allclose(one, plain[:, 0], atol=1e-6 * np.abs(plain).max())
    np.testing.assert_allclose(mean[5], hist[5, :5].mean(0), rtol=1e-5)
    assert not mean[0].any()


def test_each_loss_trains_its_own_unit(key):
    """And empty histories have finite gradients."""
    net = net_of("soft")

    @jax.jit
    def jacobian(params, extra, x):
        def losses(params):
            options = {"net": net, "alpha": 0.5, "beta": 2.0}
            value, (metrics, _) = sim.loss(params, extra, x, key, **options)
            parts = jnp.stack([metrics["esu"], metrics["gsu"]])
            return parts, (value, parts)

        return jax.jacrev(losses, has_aux=True)(params)

    params, extra = drawn(net)
    grads, (value, (esu, gsu)) = jax.device_get(jacobian(params, extra, batch()))
    assert value == pytest.approx(0.5 * gsu + 2 * esu, rel=1e-6)
    of_esu, of_gsu = (jax.tree.map(lambda g, i=i: g[i], grads) for i in range(2))
    # Selection has no gradient: the search learns from its own loss alone.
    assert not any(g.any() for g in jax.tree.leaves(of_esu["gsu"]))
    assert all(of_gsu["gsu"][name].any() for name in ("W_a", "W_b"))
    # The tables, which are shared, learn from it too; the exact search does not.
    assert of_gsu["tables"]["item"].any()
    assert not any(g.any() for g in jax.tree.leaves(of_gsu["esu"]))
    empty = {**batch(), "length": np.zeros(B, np.int32)}
    for leaf in jax.tree.leaves(jacobian(params, extra, empty)):
        assert np.isfinite(leaf).all()


@pytest.mark.usefixtures("float64")
def test_the_searchs_gradient_is_its_difference_quotient():
    net = net_of("soft")
    params, extra = drawn(net)
    w = params["gsu"]["W_a"]
    step = 1e-6 * np.random.default_rng(2).normal(size=w.shape)

    def check(params, extra, x):
        def gsu(w):
            changed = {**params, "gsu": {**params["gsu"], "W_a": w}}
            out, _ = sim.forward(changed, extra, x, net=net, train=True)
            return (jax.nn.softplus(out.gsu) - x["label"] * out.gsu).mean()

        return jax.vmap(gsu)(jnp.stack([w + step, w - step])), jax.grad(gsu)(w)

    both, grad = together(check, params, extra, batch())
    quotient = (both[0] - both[1]) / 2
    assert quotient == pytest.approx((grad * step).sum(), rel=1e-6)


def test_only_the_soft_search_has_parameters():
    params = {kind: drawn(net_of(kind))[0] for kind in sim.SEARCH}
    assert "gsu" in params["soft"]
    assert "gsu" not in params["hard"] and "esu" in params["hard"]
    assert not {"gsu", "esu", "gaps"} & set(params["average"])


@pytest.mark.matrix
def test_hard_mode_reads_k_rows_and_not_t(key):
    """Ids are gathered before they are embedded; all that the loss reads are there."""
    net = net_of("hard")
    params, extra = drawn(net)
    few = together(functools.partial(sim.ids, net=net), batch())
    assert few["item"].shape == (B, 1 + net.k + net.short)
    soft = functools.partial(sim.ids, net=net_of("soft"))
    assert jax.eval_shape(soft, batch())["item"].shape == (B, 1 + T)
    _, grads = gradient(net)(params, extra, batch(), key)
    read = np.asarray(grads["tables"]["item"]).any(1)
    assert set(np.flatnonzero(read)) == set(few["item"].ravel().tolist()) - {0}
    value = functools.partial(sim.loss, net=net)
    jaxpr = jax.make_jaxpr(value)(params, extra, batch(), key)
    shapes = [x.aval.shape for e in jaxpr.eqns for x in e.outvars]
    assert not [s for s in shapes if s[:2] == (B, T) and len(s) > 2]


def test_the_most_recent_can_be_left_out_of_the_search():
    x, net = batch(), net_of("hard", skip=2)
    mask = together(lambda x: units.fields(x, net)["long_mask"], x)
    np.testing.assert_array_equal(mask.sum(1), np.maximum(x["length"] - 2, 0))


@pytest.mark.matrix
def test_k_beyond_t_is_attention_over_everything_valid():
    """Then selection changes nothing: soft, and hard when all share the category."""
    x = batch()
    x = {**x, "cate": np.ones(B, int), "hist_cate": np.ones((B, T), int)}
    soft, hard, few = (
        net_of(kind, k=k, skip=skip)
        for kind, k, skip in (("soft", T + 3, 0), ("hard", T + 3, 0), ("hard", 3, 2))
    )

    def check(params, extra, x):
        return [
            sim.forward(params, extra, x, net=net, train=False)[0]
            for net in (soft, hard, few)
        ]

    out, other, skipped = together(check, *drawn(soft), x)
    np.testing.assert_array_equal(out.valid.sum(1), x["length"])
    # Hard selects the same set; only its order differs, which attention does not see.
    np.testing.assert_allclose(other.logit, out.logit, rtol=1e-5, atol=1e-6)
    # The most recent ones can be left out of the search.
    expected = np.clip(x["length"] - 2, 0, few.k)
    np.testing.assert_array_equal(skipped.valid.sum(1), expected)


@pytest.mark.parametrize(
    "kind", ["hard", *(pytest.param(x, marks=matrix) for x in ("soft", "average"))]
)
def test_padding_changes_nothing_and_the_time_gap_does(kind):
    """And N candidates score as N rows, with more categories than the bound and fewer."""
    net, x, many = net_of(kind), batch(), batch(candidates=N)
    assert max(len(set(row)) for row in many["cate"].tolist()) > 2
    within = np.arange(T)[None] < x["length"][:, None]
    zero = np.zeros_like(x["time"])
    dirty = {k: np.where(within, v, 7) if k.startswith("hist") else v
             for k, v in x.items()}  # fmt: skip
    rows = (
        x,
        dirty,
        {**x, "time": x["time"] + 10**8},
        # After the request counts as just now.
        {**x, "time": zero},
        {**x, "time": zero, "hist_time": np.zeros_like(x["hist_time"])},
        candidate(many, 0),
        candidate(many, 1),
        overlong(x),
    )
    count = len(rows)
    rows = {k: np.concatenate([r[k] for r in rows]) for k in x}
    bounds = (2, 20) if kind == "hard" else (20,)

    def check(params, extra, rows, wide, many):
        score = functools.partial(sim.predict, params, extra, net=net)
        several = [score(many, distinct=d) for d in bounds]
        return score(rows), score(wide), several

    found, wide, several = together(
        check, *drawn(net), rows, pad_histories(x, 4, fill=7), many
    )
    plain, dirty, later, early, now, *single, longer = found.reshape(count, B)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(wide, plain)
    close(dirty, plain)
    close(longer, plain)
    close(early, now)
    assert (later != plain).any() == (kind != "average")
    for scores in several:
        assert scores.shape == (B, N)
        close(scores[:, :2], np.stack(single, 1))


@pytest.mark.matrix
def test_serving_from_the_tree_is_scoring_from_the_history():
    net, x = net_of("hard"), batch(candidates=N)
    hist = ("hist_item", "hist_cate", "hist_time")
    rows = np.nonzero(np.arange(T)[None] < x["length"][:, None])
    tree = sim.build_ubt(
        2 + rows[0], *(x[n][rows] for n in hist), users=clicks.USERS
    )  # fmt: skip
    recent = {**x, "length": np.minimum(x["length"], net.short)}
    for name in hist:
        recent[name] = np.zeros((B, net.short), np.int32)
        for u, n in enumerate(x["length"]):
            last = x[name][u, :n][-net.short :]
            recent[name][u, : len(last)] = last

    def check(params, extra, tree, recent, x):
        return (
            sim.serve(params, extra, tree, recent, net=net),
            sim.predict(params, extra, x, net=net),
        )

    served, scored = together(check, *drawn(net), tree, recent, x)
    np.testing.assert_allclose(served, scored, rtol=1e-5, atol=1e-6)


def test_projected_copies_find_what_the_model_selects():
    net, x = net_of("soft"), batch()
    # Small integers: their products are exact in bfloat16.
    params = jax.tree.map(lambda p: np.clip(np.round(p * 3), -2, 2), drawn(net)[0])
    tables, gsu = params["tables"], params["gsu"]
    query = np.concatenate([tables[n][x[n]] for n in ("item", "cate")], -1)
    query = query @ gsu["W_a"].T
    keys = np.concatenate([tables[n][x["hist_" + n]] for n in ("item", "cate")], -1)
    scores = np.einsum("btd,hd,bh->bt", keys, gsu["W_b"], query)
    mask = np.arange(T)[None] < x["length"][:, None]

    def check(params, x, query, scores, mask):
        copies = sim.projected(params, net)
        parts = tuple((c, x["hist_" + n]) for n, c in copies.items())
        found = search.soft_search(parts, x["length"], query, net.k, chunk=5)
        return found.idx, sim.topk_masked(scores, mask, net.k).idx

    found, expected = together(check, params, x, query, scores, mask)
    np.testing.assert_array_equal(found, expected)
    assert (found != np.arange(net.k)).any()


@pytest.mark.matrix
def test_gsu_learns_from_a_random_subset():
    net = net_of("soft", gsu_sample=4)
    params, extra = drawn(net)
    value = jax.jit(functools.partial(sim.loss, net=net))
    metrics = [value(params, extra, batch(), jax.random.key(i))[1][0] for i in range(4)]
    assert len({float(m["gsu"]) for m in metrics}) > 1
    np.testing.assert_allclose([m["esu"] for m in metrics], metrics[0]["esu"])
    # As many as there are slots are all of them.
    arrays = object(), object(), np.ones((B, T), bool)
    for sample in (0, T):
        every = dataclasses.replace(net, gsu_sample=sample)
        assert sim.units.subset(*arrays, None, every) == arrays
    with pytest.raises(ValueError, match="needs a key"):
        forward = functools.partial(sim.forward, net=net, train=True)
        jax.eval_shape(forward, params, extra, batch())


@pytest.mark.matrix
def test_weights_are_means_and_zero_rows_count_nowhere(key):
    """Four rows and four of weight 0 are those four rows twice."""
    args = drawn(net_of("soft"))
    value = jax.jit(functools.partial(sim.loss, key=key, net=net_of("soft")))
    x, twice = batch(), {k: np.concatenate([v[:4], v[:4]]) for k, v in batch().items()}
    found, (metrics, _) = value(*args, {**x, "weight": np.repeat([1.0, 0.0], 4)})
    expected, (others, _) = value(*args, {**twice, "weight": np.ones(B)})
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics.pop("weight")) == 4
    for name, x in metrics.items():
        assert float(x) == pytest.approx(float(others[name]), rel=1e-5), name


# Steps


@pytest.mark.matrix
def test_the_soft_search_agrees_on_a_mesh():
    """Rows of tables over ``model``, and the sequences too."""
    score = functools.partial(sim.predict, net=net_of("soft"))
    params, extra = drawn(net_of("soft"))
    mesh = clicks.grid((4, 2))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    tables = jax.device_put(params["tables"], split)
    expected = together(score, params, extra, batch())
    with jax.set_mesh(mesh):
        placed = meshes.put_batch(batch(), mesh, B)
        found = jax.jit(score)({**params, "tables": tables}, extra, placed)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@functools.cache
def steps(kind, sizes, count=2):
    """Parameters and losses after steps on a mesh."""
    # Adam would make a step of rounding where a gradient is zero.
    sgd = {"optim__name": "sgd", "optim__tables": "row_sgd", "optim__lr": 0.5}
    method, mesh = sim.make(config(net__search=kind, **sgd)), clicks.grid(sizes)
    compiled = trainer.compile(method, mesh, batch())
    state, losses = compiled.init(jax.random.key(0)), []
    for i in range(count):
        placed = meshes.put_batch(batch(i), mesh, B)
        with jax.set_mesh(mesh):
            state, metrics = compiled.step(state, placed)
        losses.append(float(metrics["loss"]))
    return jax.device_get(state.params), losses


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_same_steps_on_a_mesh(kind):
    expected, losses = steps(kind, (1, 1))
    found, others = steps(kind, (4, 2))
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (expected, found))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_loss_falls():
    method = sim.make(config(net__search="soft"))
    state, step = method.init(jax.random.key(0), batch()), jax.jit(method.update)
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < 0.9 * losses[0]


# What is refused


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("net.search", "fuzzy", "net.search must be one of .*hard"),
        ("net.k", 0, "net.k must be >= 1, got 0"),
        ("net.gsu_pool", "max", "net.gsu_pool must be one of"),
        ("net.normalize", "l1", "net.normalize must be one of"),
        ("net.heads", 0, "net.heads must be >= 1"),
        ("net.activation", "gelu", "net.activation must be one of"),
        ("net.skip", -1, "net.skip must be >= 0"),
        ("optim.name", "lion", "optim.name"),
        ("optim.tables", "hash", "optim.tables"),
        ("optim.lr", 0.0, "optim.lr must be > 0"),
        ("method.alpha", -1.0, "method.alpha must be >= 0"),
        ("method.beta", 0.0, "method.beta must be > 0"),
        ("train.accumulate", 0, "train.accumulate"),
    ],
)
def test_make_refuses(field, value, message):
    with pytest.raises(ValueError, match=message):
        sim.make(config(**{field.replace(".", "__"): value}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"time": np.full(B, 5)}, "after the request at time 5"),
        ({"hist_time": np.arange(B * T)[::-1].reshape(B, T)}, "sort it, oldest first"),
        ({"hist_cate": np.full((B, T), 7)}, "hist_cate: ids must be within 0 .. 6"),
        ({"cate": np.full(B, -1)}, "cate: ids must be within"),
        ({"length": np.full(B, T + 1)}, "length must be within"),
        ({"time": np.ones((B, 2), int)}, "time must have shape"),
        ({"hist_time": np.ones((B, 3), int)}, "hist_time must have shape"),
        ({"hist_time": None}, "no 'hist_time'"),
    ],
)
def test_check_batch_refuses(changes, message):
    net = net_of("hard")
    sim.check_batch(batch(), net=net)
    early = batch()  # Rises by more than 32 bits hold.
    early["hist_time"] = np.where(np.arange(T) < 1, -(2**31), early["hist_time"])
    sim.check_batch({**early, "time": np.full(B, 2**31 - 1)}, net=net)
    x = {k: v for k, v in {**batch(), **changes}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        sim.check_batch(x, net=net)


def test_other_errors():
    net = net_of("soft")
    params, extra = drawn(net)
    none = {k: v[:, :0] if k.startswith("hist") else v for k, v in batch().items()}
    with pytest.raises(ValueError, match="hist_item must be"):
        jax.eval_shape(functools.partial(sim.predict, net=net), params, extra, none)
    tree = sim.build_ubt([0], [2], [1], [3])
    with pytest.raises(ValueError, match="hard search, got net.search='soft'"):
        sim.serve(params, extra, tree, clicks.device(batch()), net=net)
    with pytest.raises(ValueError, match="only the soft search"):
        sim.projected(params, net_of("hard"))
    with pytest.raises(ValueError, match="pool must be one of"):
        arrays = jnp.zeros((1, 2)), jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), bool)
        sim.gsu_pool(*arrays, pool="x")


@pytest.mark.matrix
@pytest.mark.parametrize("preset", ["paper", "ml100k"])
def test_presets_make_methods(preset):
    c = run.load_config(f"sim:{preset}")
    method = sim.make(c)
    shapes = {
        k: jax.ShapeDtypeStruct((c.data.batch, *v.shape[1:]), jnp.int32)
        for k, v in batch().items()
    }
    state = jax.eval_shape(method.init, jax.random.key(0), shapes)
    assert state.params["tables"]["item"].shape[1] == c.net.item_dim
    value, _ = jax.eval_shape(method.loss, state.params, shapes, jax.random.key(0))
    assert value.shape == ()
