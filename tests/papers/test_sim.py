"""SIM: recorded numbers, its searches inside the model, gradients, serving, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import run
from jaxpapers import train as trainer
from jaxpapers.ops import search
from jaxpapers.papers import sim
from tests.contract import CLICK, Contract, write_clicks

CONTRACT = Contract(
    small={**CLICK, "net.unit": (8,), "net.k": 4, "net.short": 4, "net.time_dim": 0},
    data=write_clicks,
    refused={
        "net.search": ("random", "search"),
        "net.k": (0, "net.k"),
        "train.accumulate": (0, "train.accumulate"),
    },
)

B, T, N = 8, 12, 5
# LLVM's optimisations are most of a compile.
QUICK = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=QUICK)
SMALL = {
    "item_vocab": 40, "cate_vocab": 6, "user_vocab": 10, "item_dim": 4, "cate_dim": 2,
    "k": 3, "short": 2, "unit": (5,), "hidden": (6,), "gsu_hidden": (5,), "gsu_dim": 3,
    "heads": 2, "head_dim": 3, "time_dim": 2, "std": 0.5, "gsu_pool": "sum",
}  # fmt: skip


def config(**changes):
    found = run.load_config("sim:smoke").copy_and_resolve_references().unlock()
    found.net.update({**SMALL, **changes})
    return found


def batch(seed=0, candidates=None, size=B):
    rng = np.random.default_rng(seed)
    shape = (size,) if candidates is None else (size, candidates)
    length = rng.integers(0, T + 1, size)
    length[:2] = 0, T
    here = np.arange(T)[None] < length[:, None]
    cate = 1 + np.arange(40) % 5
    item, hist = rng.integers(2, 40, shape), rng.integers(2, 40, (size, T)) * here
    time = np.sort(rng.integers(1, 10**6, (size, T)), 1) * here
    return {
        "user": jnp.arange(size) % 10, "item": jnp.array(item),
        "cate": jnp.array(cate[item]), "time": jnp.full(size, 10**6 + 5),
        "hist_item": jnp.array(hist), "hist_cate": jnp.array(cate[hist] * here),
        "hist_time": jnp.array(time), "length": jnp.array(length),
        "label": jnp.array(rng.integers(0, 2, size)),
    }  # fmt: skip


@functools.cache
def started(kind, **changes):
    """(net, method, params with a spread head, statistics)."""
    c = config(search=kind, **changes)
    method = sim.make(c)
    state = jit(method.init)(jax.random.key(0), batch())
    return c.net, method, state.params, state.extra


def has(*names):
    return lambda entry: set(names) <= set(entry["arrays"])


def arrays(case, dtype):
    folder, _, entry = case
    with np.load(folder / entry["file"]) as file:
        data = {k: v.astype(dtype) if v.dtype == float else v for k, v in file.items()}
    tol = entry["tolerance_float64" if dtype == np.float64 else "tolerance_float32"]
    return {k: jnp.asarray(v) for k, v in data.items()}, tol


DTYPES = [np.float64, np.float32]


@pytest.mark.parity("ctr", only=has("pooled_aux", "topk_index", "hard_index"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_search(case, dtype):
    with jax.enable_x64(dtype == np.float64):
        x, tol = arrays(case, dtype)
        k = int(x["K"])
        mask = jnp.arange(x["seq"].shape[1])[None] < x["lengths"][:, None]
        scores = sim.soft_scores(x["W_a"], x["W_b"], x["seq"], x["target"])
        # The file's scores are those of valid positions; elsewhere they count nowhere.
        want = np.asarray(x["scores"])
        ours = np.where(np.asarray(mask), scores, np.where(mask, 0, want))
        scale = max(1, np.abs(want[np.isfinite(want)]).max())
        np.testing.assert_allclose(ours, want, rtol=0, atol=tol * scale)
        pooled = sim.gsu_pool(scores, x["seq"], mask)
        size = max(1, float(jnp.abs(x["pooled_aux"]).max()))
        np.testing.assert_allclose(pooled, x["pooled_aux"], rtol=0, atol=tol * size)
        found = sim.topk_masked(scores, mask, k)
        np.testing.assert_array_equal(found.idx, x["topk_index"])
        np.testing.assert_array_equal(found.valid, x["topk_valid"])
        hard = sim.hard_search(x["cats"], mask, x["target_cat"], k)
        np.testing.assert_array_equal(hard.idx, x["hard_index"])
        np.testing.assert_allclose(
            search.take(x["seq"], found), x["selected"], rtol=0, atol=tol
        )


@pytest.mark.parity("ctr", only=has("W_q", "W_o", "esu_output"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_attention_of_the_peer(case, dtype):
    """With values, output projection and scale; heads of the index's number."""
    folder, _, entry = case
    heads = entry.get("heads", 2)
    with jax.enable_x64(dtype == np.float64):
        x, tol = arrays(case, dtype)
        split = {
            ours: x[theirs].reshape(heads, -1, x[theirs].shape[1])
            for ours, theirs in (("W_a", "W_q"), ("W_b", "W_k"), ("W_v", "W_v"))
        }
        params = {**split, "W_o": x["W_o"]}
        out = sim.esu(params, x["selected"], x["topk_valid"], x["target"], scaled=True)
        np.testing.assert_allclose(out, x["esu_output"], rtol=0, atol=tol)


@pytest.mark.parity("ctr", only=has("z", "valid", "U_lt", "att"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_recorded_attention_of_the_paper(case, dtype):
    with jax.enable_x64(dtype == np.float64):
        x, tol = arrays(case, dtype)
        params = {"W_a": x["W_a"], "W_b": x["W_b"]}
        out = sim.esu(params, x["z"], x["valid"], x["target"])
        np.testing.assert_allclose(out, x["U_lt"], rtol=0, atol=tol)
        # The weights themselves: what attention makes of a one-hot part of z.
        slots = x["z"].shape[1]
        hot = jnp.broadcast_to(jnp.eye(slots, dtype=dtype), (len(x["z"]), slots, slots))
        wide = jnp.pad(x["W_b"], ((0, 0), (0, 0), (0, slots)))
        weights = sim.esu(
            {**params, "W_b": wide}, jnp.concatenate([x["z"], hot], -1), x["valid"],
            x["target"],
        )  # fmt: skip
        weights = weights.reshape(len(hot), len(wide), -1)[..., -slots:]
        np.testing.assert_allclose(weights, x["att"], rtol=0, atol=tol)
        none = sim.esu(params, x["z"], jnp.zeros_like(x["valid"]), x["target"])
        assert not np.asarray(none).any()


def test_the_fast_scores_are_the_plain_ones(key):
    a, b, hist, target = (
        jax.random.normal(jax.random.fold_in(key, i), s)
        for i, s in enumerate([(3, 6), (3, 6), (B, T, 6), (B, N, 6)])
    )
    plain = jnp.einsum("bth,bnh->bnt", hist @ b.T, target @ a.T)
    fast = sim.soft_scores(a, b, hist, target)
    np.testing.assert_allclose(fast, plain, rtol=1e-6, atol=1e-6 * jnp.abs(plain).max())
    one = sim.soft_scores(a, b, hist, target[:, 0])
    np.testing.assert_allclose(one, plain[:, 0], atol=1e-6 * jnp.abs(plain).max())


def test_means_of_the_searched(key):
    scores, hist = jnp.ones((B, T)), jax.random.normal(key, (B, T, 3))
    mask = jnp.arange(T)[None] < jnp.arange(B)[:, None]
    mean = sim.gsu_pool(scores, hist, mask, pool="mean")
    np.testing.assert_allclose(mean[5], hist[5, :5].mean(0), rtol=1e-5)
    assert not np.asarray(mean[0]).any()


def esu_gradient(kind, alpha, beta):
    net, _, params, extra = started(kind)
    value = functools.partial(sim.loss, net=net, alpha=alpha, beta=beta)
    grad = jit(jax.grad(value, has_aux=True))
    return grad(params, extra, batch(), jax.random.key(1))[0]


def test_the_search_learns_from_its_own_loss_alone():
    grads = esu_gradient("soft", 0.0, 1.0)
    for leaf in jax.tree.leaves(grads["gsu"]):
        assert not np.asarray(leaf).any()
    grads = esu_gradient("soft", 1.0, 1.0)
    for name in ("W_a", "W_b"):
        assert np.asarray(grads["gsu"][name]).any()
    # And the tables learn from it too: they are shared.
    only = esu_gradient("soft", 1.0, 0.0)
    assert np.asarray(only["tables"]["item"]).any()
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(only["esu"]))


def test_the_searchs_gradient_is_its_difference_quotient():
    net, _, params, extra = started("soft")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, extra))

        def gsu(w):
            changed = {**wide[0], "gsu": {**wide[0]["gsu"], "W_a": w}}
            out, _ = sim.forward(changed, wide[1], batch(), net=net, train=True)
            label = batch()["label"].astype(jnp.float64)
            return optax.sigmoid_binary_cross_entropy(out.gsu, label).mean()

        w = wide[0]["gsu"]["W_a"]
        step = 1e-6 * jax.random.normal(jax.random.key(2), w.shape)
        both = jit(jax.vmap(gsu))(jnp.stack([w + step, w - step]))
        quotient = (both[0] - both[1]) / 2
        exact = (jit(jax.grad(gsu))(w) * step).sum()
        assert float(quotient) == pytest.approx(float(exact), rel=1e-6)


def test_only_the_soft_search_has_parameters():
    assert "gsu" in started("soft")[2]
    assert "gsu" not in started("hard")[2] and "esu" in started("hard")[2]
    assert not {"gsu", "esu", "gaps"} & set(started("average")[2])


def test_hard_mode_reads_k_rows_and_not_t():
    """Ids are gathered before they are embedded; all that the loss reads are there."""
    net, method, params, _ = started("hard")
    few = sim.ids(batch(), net=net)
    assert few["item"].shape == (B, 1 + net.k + net.short)
    assert sim.ids(batch(), net=started("soft")[0])["item"].shape == (B, 1 + T)
    state = jit(method.init)(jax.random.key(0), batch())
    new, metrics = jit(method.update)(state, batch())
    value, _ = jit(method.loss)(params, batch(), jax.random.key(0))
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
    moved = np.asarray(new.params["tables"]["item"] != params["tables"]["item"]).any(1)
    read = np.unique(few["item"])
    assert set(np.flatnonzero(moved)) <= set(read[read > 0].tolist())
    shapes = [
        x.aval.shape
        for e in jax.make_jaxpr(method.loss)(params, batch(), jax.random.key(0)).eqns
        for x in e.outvars
    ]
    assert not [s for s in shapes if s[:2] == (B, T) and len(s) > 2]


def test_k_beyond_t_is_attention_over_everything_valid():
    """Then selection changes nothing: soft, and hard when all share the category."""
    x = batch()
    x = {**x, "cate": jnp.ones(B, int), "hist_cate": jnp.ones((B, T), int)}
    net, _, params, extra = started("soft", k=T + 3)
    out, _ = sim.forward(params, extra, x, net=net, train=False)
    np.testing.assert_array_equal(out.valid.sum(1), x["length"])
    # Hard selects the same set; only its order differs, which attention does not see.
    hard = started("hard", k=T + 3)[0]
    other, _ = sim.forward(params, extra, x, net=hard, train=False)
    np.testing.assert_allclose(other.logit, out.logit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", sim.SEARCH)
def test_padding_and_its_contents_change_nothing(kind):
    net, _, params, extra = started(kind)
    x = batch()
    run_ = jit(lambda x: sim.score_candidates(params, extra, x, net=net))
    short = run_(x)
    wide = {
        k: jnp.pad(v, ((0, 0), (0, 4)), constant_values=7) if k[:4] == "hist" else v
        for k, v in x.items()
    }
    here = jnp.arange(T)[None] < x["length"][:, None]
    dirty = {k: jnp.where(here, v, 7) if k[:4] == "hist" else v for k, v in x.items()}
    np.testing.assert_array_equal(run_(dirty), short)
    np.testing.assert_allclose(run_(wide), short, rtol=1e-6, atol=1e-6)


def test_the_time_gap_reaches_the_score():
    for kind in ("hard", "soft"):
        net, _, params, extra = started(kind)
        x = batch()
        score = functools.partial(sim.score_candidates, params, extra, net=net)
        later = {**x, "time": x["time"] + 10**8}
        assert (score(x) != score(later)).any()
        # After the request counts as just now.
        early = {**x, "time": jnp.zeros(B, int)}
        now = {**x, "hist_time": jnp.zeros((B, T), int), "time": jnp.zeros(B, int)}
        np.testing.assert_array_equal(score(early), score(now))


def test_recent_behaviours_can_be_left_out_of_the_search():
    net, _, params, extra = started("hard", skip=2)
    x = batch()
    x = {**x, "cate": jnp.ones(B, int), "hist_cate": jnp.ones((B, T), int)}
    out, _ = sim.forward(params, extra, x, net=net, train=False)
    expected = np.clip(np.asarray(x["length"]) - 2, 0, net.k)
    np.testing.assert_array_equal(out.valid.sum(1), expected)


@pytest.mark.parametrize(
    "kind, distinct", [("hard", 2), ("hard", 20), ("soft", 20), ("average", 20)]
)
def test_n_candidates_are_n_calls(kind, distinct):
    """Few distinct categories, and more of them than the bound."""
    net, _, params, extra = started(kind)
    x = batch(candidates=N)
    score = jit(functools.partial(sim.score_candidates, net=net, distinct=distinct))
    many = score(params, extra, x)
    assert many.shape == (B, N)
    assert max(len(set(r)) for r in np.asarray(x["cate"]).tolist()) > 2
    one = jit(functools.partial(sim.score_candidates, net=net))
    for n in range(N):
        single = one(
            params, extra, {**x, "item": x["item"][:, n], "cate": x["cate"][:, n]}
        )
        np.testing.assert_allclose(many[:, n], single, rtol=1e-5, atol=1e-6)


def test_serving_from_the_tree_is_scoring_from_the_history():
    net, _, params, extra = started("hard")
    x = batch(candidates=N)
    rows = [(u, t) for u in range(B) for t in range(int(x["length"][u]))]
    at = tuple(np.array(rows).T)
    tree = sim.build_ubt(
        at[0], *(np.asarray(x[n])[at] for n in ("hist_item", "hist_cate", "hist_time")),
        users=B,
    )  # fmt: skip
    recent = dict(x)
    for name in ("hist_item", "hist_cate", "hist_time"):
        cut = np.zeros((B, net.short), int)
        for u in range(B):
            last = np.asarray(x[name])[u, : int(x["length"][u])][-net.short :]
            cut[u, : len(last)] = last
        recent[name] = jnp.array(cut)
    recent["length"] = jnp.minimum(x["length"], net.short)
    served = jit(functools.partial(sim.serve, net=net))(params, extra, tree, recent)
    scored = sim.score_candidates(params, extra, x, net=net)
    np.testing.assert_allclose(served, scored, rtol=1e-5, atol=1e-6)


def test_projected_copies_find_what_the_model_selects():
    net, _, params, extra = started("soft")
    x = batch()
    # Small integers: their products are exact in bfloat16.
    params = jax.tree.map(lambda p: jnp.clip(jnp.round(p * 3), -2, 2), params)
    parts = tuple(
        (copy, x["hist_" + name]) for name, copy in sim.projected(params, net).items()
    )
    vectors = [params["tables"][n][x[n]] for n in ("item", "cate")]
    query = jnp.concatenate(vectors, -1) @ params["gsu"]["W_a"].T
    keys = [params["tables"][n][x["hist_" + n]] for n in ("item", "cate")]
    keys = jnp.concatenate(keys, -1)
    scores = jnp.einsum("btd,hd,bh->bt", keys, params["gsu"]["W_b"], query)
    mask = jnp.arange(T)[None] < x["length"][:, None]
    expected = sim.topk_masked(scores, mask, net.k)
    found = search.soft_search(parts, x["length"], query, net.k, chunk=5)
    np.testing.assert_array_equal(found.idx, expected.idx)
    assert (np.asarray(found.idx) != np.arange(net.k)).any()


def test_gsu_learns_from_a_random_subset():
    net, method, params, extra = started("soft", gsu_sample=4)
    step = jit(method.loss)
    values = {
        float(step(params, batch(), jax.random.key(i))[1]["gsu"]) for i in range(4)
    }
    assert len(values) > 1
    assert len({float(step(params, batch(), jax.random.key(0))[1]["esu"])}) == 1
    full = started("soft", gsu_sample=T)
    whole = started("soft")
    assert float(full[1].loss(params, batch(), jax.random.key(0))[0]) == pytest.approx(
        float(whole[1].loss(params, batch(), jax.random.key(3))[0]), rel=1e-6
    )
    with pytest.raises(ValueError, match="needs a key"):
        sim.forward(params, extra, batch(), net=net, train=True)


def test_weights_are_means_and_zero_rows_count_nowhere():
    net, method, params, _ = started("soft")
    x, key = batch(), jax.random.key(0)
    half = {**x, "weight": jnp.array([1.0] * 4 + [0.0] * 4)}
    first = {k: v[:4] for k, v in x.items()}
    value, metrics = method.loss(params, half, key)
    expected, others = method.loss(params, first, key)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics["weight"]) == 4
    for name, v in others.items():
        assert float(metrics[name]) == pytest.approx(float(v), rel=1e-5), name


def grid(data, model):
    return meshes.make_mesh(
        {"data": data, "model": model}, jax.devices()[: data * model]
    )


def steps(kind, mesh, count=2):
    # Adam would make a step of rounding where a gradient is zero.
    c = config(search=kind)
    c.optim.update(name="sgd", tables="row_sgd", lr=0.5)
    compiled = trainer.compile(sim.make(c), mesh, batch())
    state, losses = compiled.init(jax.random.key(0)), []
    for i in range(count):
        placed = meshes.put_batch(jax.tree.map(np.asarray, batch(i)), mesh, B)
        with jax.set_mesh(mesh):
            state, metrics = compiled.step(state, placed)
        losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_same_numbers_on_a_mesh(kind):
    """Rows of tables over ``model``, and in soft mode the sequences too."""
    expected, losses = steps(kind, grid(1, 1))
    state, found = steps(kind, grid(4, 2))
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(expected.params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_loss_falls():
    method = started("soft")[1]
    state, step = method.init(jax.random.key(0), batch()), jit(method.update)
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < 0.9 * losses[0]


def test_empty_histories_run_and_have_finite_gradients():
    x = {**batch(), "length": jnp.zeros(B, int)}
    for kind in sim.SEARCH:
        net, method, params, _ = started(kind)
        grads, _ = jit(jax.grad(method.loss, has_aux=True))(
            params, x, jax.random.key(0)
        )
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"search": "fuzzy"}, "config.net.search must be one of .*hard"),
        ({"k": 0}, "config.net.k must be >= 1, got 0"),
        ({"gsu_pool": "max"}, "config.net.gsu_pool"),
        ({"normalize": "l1"}, "config.net.normalize"),
        ({"heads": 0}, "config.net.heads"),
        ({"activation": "gelu"}, "config.net.activation"),
        ({"skip": -1}, "config.net.skip"),
    ],
)
def test_make_refuses_nets(changes, message):
    with pytest.raises(ValueError, match=message):
        sim.make(config(**changes))


@pytest.mark.parametrize(
    "group, field, value, message",
    [
        ("optim", "name", "lion", "optim.name"),
        ("optim", "tables", "hash", "optim.tables"),
        ("optim", "lr", 0.0, "optim.lr"),
        ("method", "alpha", -1.0, "method.alpha"),
        ("train", "accumulate", 0, "train.accumulate"),
    ],
)
def test_make_refuses(group, field, value, message):
    c = config()
    c[group][field] = value
    with pytest.raises(ValueError, match=message):
        sim.make(c)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"time": jnp.full(B, 5)}, "after the request at time 5"),
        ({"hist_time": jnp.arange(B * T)[::-1].reshape(B, T)}, "sort it, oldest first"),
        ({"hist_cate": jnp.full((B, T), 6)}, "hist_cate: ids must be within 0 .. 5"),
        ({"cate": jnp.full(B, -1)}, "cate: ids must be within"),
        ({"length": jnp.full(B, T + 1)}, "length must be within"),
        ({"time": jnp.ones((B, 2), int)}, "time must have shape"),
        ({"hist_time": jnp.ones((B, 3), int)}, "hist_time must have shape"),
        ({"hist_time": None}, "no 'hist_time'"),
    ],
)
def test_check_batch_refuses(changes, message):
    net = started("hard")[0]
    sim.check_batch(batch(), net=net)
    x = {k: v for k, v in {**batch(), **changes}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        sim.check_batch(x, net=net)


def test_other_errors():
    net, method, params, extra = started("soft")
    none = {k: v[:, :0] if k[:4] == "hist" else v for k, v in batch().items()}
    with pytest.raises(ValueError, match="hist_item must be"):
        method.loss(params, none, jax.random.key(0))
    with pytest.raises(ValueError, match="hard search, got net.search='soft'"):
        tree = sim.build_ubt([0], [2], [1], [3])
        sim.serve(params, extra, tree, batch(), net=net)
    with pytest.raises(ValueError, match="only the soft search"):
        sim.projected(params, started("hard")[0])
    with pytest.raises(ValueError, match="pool must be sum or mean"):
        sim.gsu_pool(
            jnp.ones((1, 2)), jnp.ones((1, 2, 3)), jnp.ones((1, 2), bool), pool="x"
        )


@pytest.mark.parametrize("preset", ["paper", "ml100k", "smoke"])
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
