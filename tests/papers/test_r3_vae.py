"""R3-VAE: the tokenizer's equations, SIDs, retrieval and the exhaustive ranking."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import run, tasks
from jaxpapers.ops import trie as tries
from jaxpapers.papers import r3_vae
from jaxpapers.papers.r3_vae import retrieval, sids, starts, tokenizer
from tests.contract import Contract, grid
from tests.programs import KEY, params_like, together

CONTRACT = Contract(
    small={
        "data.batch": 8, "data.eval_batch": 8, "data.count": 40, "tokenizer.codes": 8,
        "tokenizer.features": 8, "tokenizer.sc": 0.0, "tokenizer.pd": 0.0,
        "net.width": 16, "net.history": 4, "optim.name": "sgd",
        "optim.lr": 0.3, "optim.weight_decay": 0.0, "optim.schedule": "constant",
        "pretrain.optim.name": "sgd", "pretrain.optim.weight_decay": 0.0,
        "pretrain.optim.lr": 0.1, "pretrain.batch": 16,
    },
    refused={
        "tokenizer.tau": (0.0, "tokenizer.tau must be > 0"),
        "tokenizer.levels": (0, "tokenizer.levels must be >= 1"),
        "tokenizer.quantizer": ("hard", "tokenizer.quantizer"),
        "tokenizer.features": (9, "the item vectors have 8"),
        "tokenizer.encoder": ((4,), "need tokenizer.decoder"),
        "method.beam": (3, "at least method.top=10"),
        "method.source": ("vae", "method.source"),
        "method.stage": ("both", "method.stage must be"),
        "net.heads": (3, "net.heads must divide"),
    },
    stages=("", "before"),
)  # fmt: skip

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 6)).astype(np.float32)
SMALL = r3_vae.Tokenizer(levels=2, codes=5, features=6, tau=0.5, sc=0.3, pd=0.2)


def drawn(options, seed=1):
    params = params_like(lambda key: tokenizer.init(key, options), KEY, seed=seed)
    if "codebook" in params:
        params["codebook"] = RNG.normal(size=params["codebook"].shape).astype(
            np.float32
        )
    return params


def with_quantizer(name, **fields):
    if name == "fsq":
        fields = {"fsq": (2, 2), "encoder": (4,), "decoder": (4,), "reference": False}
    return dataclasses.replace(SMALL, quantizer=name, **fields)


def by_hand(params, x, options):
    """The loss of R3-VAE with soft ratings, in NumPy and float64."""
    x = x.astype(float)
    r, books = (params[k].astype(float) for k in ("r", "codebook"))

    def unit(v):
        return v / np.linalg.norm(v, axis=-1, keepdims=True)

    alpha = x @ r / (r @ r)
    e = x - alpha[:, None] * r
    q, sid, hard = np.zeros_like(e), [], np.zeros_like(e)
    for book in books:
        w = np.exp(unit(e) @ unit(book).T / options.tau)
        w /= w.sum(1, keepdims=True)
        q, e = q + w @ book, e - w @ book
        sid.append(w.argmax(1))
        hard += book[sid[-1]]
    error = np.square(x - alpha[:, None] * r - q).sum(1).mean()
    groups = [np.flatnonzero(sid[0] == k) for k in range(options.codes)]
    u = unit(q)
    cosines = [
        np.mean([u[i] @ u[j] for i in g for j in g if i < j])
        for g in groups
        if len(g) > 1
    ]
    pd = []
    for book in books:
        c = unit(book) @ unit(book).T
        off = ~np.eye(len(c), dtype=bool)
        pd.append(np.log(np.exp(-options.t * (1 - c[off])).mean()))
    value = error - options.sc * np.mean(cosines) + options.pd * np.mean(pd)
    hard_error = np.square(x - alpha[:, None] * r - hard).sum(1).mean()
    return value, error, hard_error, np.stack(sid, 1)


def test_the_loss_as_in_numpy_and_its_gradient_by_differences():
    params = drawn(SMALL)
    batch = {"x": X}

    def value(params, batch):
        def of(params):
            return tokenizer.loss(params, (), batch, jax.random.key(0), options=SMALL)

        (loss, (metrics, _)), grads = jax.value_and_grad(of, has_aux=True)(params)
        return (
            loss,
            metrics,
            grads,
            tokenizer.quantize(params, (), batch["x"], SMALL).sid,
        )

    loss, metrics, grads, sid = together(value, params, batch)
    expected, error, hard, codes = by_hand(params, X, SMALL)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert metrics["reconstruction"] == pytest.approx(error, rel=1e-5)
    assert metrics["hard_reconstruction"] == pytest.approx(hard, rel=1e-5)
    np.testing.assert_array_equal(sid, codes)
    # Central differences of the reference, along a random direction of each parameter.
    for name, grad in grads.items():
        direction = RNG.normal(size=grad.shape)
        ends = [
            by_hand({**params, name: params[name] + h * direction}, X, SMALL)[0]
            for h in (1e-4, -1e-4)
        ]
        slope = (ends[0] - ends[1]) / 2e-4
        assert (grad * direction).sum() == pytest.approx(slope, rel=2e-3, abs=1e-3), (
            name
        )


def test_nearest_codes_are_pulled_by_their_residuals_alone():
    """Codebook and commitment losses, and whose gradient each is (straight-through)."""
    options = dataclasses.replace(
        SMALL, quantizer="ste", beta=0.3, sc=0.0, pd=0.0, reference=False
    )
    params = drawn(options)

    def values(params, x):
        def of(params, x):
            return tokenizer.loss(
                params, (), {"x": x}, jax.random.key(0), options=options
            )[0]

        found = tokenizer.quantize(params, (), x, options)
        return of(params, x), jax.grad(of, (0, 1))(params, x), found

    loss, (grads, of_x), found = together(values, params, X)
    books, e = params["codebook"].astype(float), X.astype(float)
    expected, slopes, rest = 0.0, np.zeros_like(books), 0.0
    for level, book in enumerate(books):
        code = np.square(e[:, None] - book[None]).sum(-1).argmin(1)
        np.testing.assert_array_equal(found.sid[:, level], code)
        gap = e - book[code]
        expected += 1.3 * np.square(gap).sum(1).mean()
        np.add.at(slopes[level], code, -2 * gap / len(X))
        rest = rest + 0.3 * 2 * gap / len(X)
        e = gap
    assert loss == pytest.approx(expected + np.square(e).sum(1).mean(), rel=1e-5)
    np.testing.assert_allclose(grads["codebook"], slopes, atol=1e-5)
    # The reconstruction is x itself to the gradient, the commitment is not.
    np.testing.assert_allclose(of_x, rest, atol=1e-5)


def test_the_public_implementations_objective():
    """Cosine loss, cohesion of levels with the first residual, soft centres apart."""
    options = dataclasses.replace(
        SMALL, quantizer="top1", loss="cosine", sc_form="levels", pd_form="soft", sc=0.1,
        pd=0.05,
    )  # fmt: skip
    params = drawn(options)

    def values(params, x):
        loss, (metrics, _) = tokenizer.loss(
            params, (), {"x": x}, jax.random.key(0), options=options
        )
        found = tokenizer.quantize(params, (), x, options)
        one = tokenizer.loss(
            params, (), {"x": x[:1]}, jax.random.key(0), options=options
        )[0]
        return loss, metrics, found, tokenizer.decode(params, *found[:2], options), one

    loss, metrics, found, y, one = together(values, params, X)

    def cosine(a, b):
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return (a * b).sum(-1) / norms

    error = np.mean(1 - cosine(X, y))
    parts = np.cumsum(found.parts, 1)
    sc = np.mean(cosine(found.residuals[:, :1], parts))
    weights = np.float64(found.weights[:, 0])
    centres = weights.T @ found.q / np.maximum(weights.sum(0), 1e-12)[:, None]
    centres = centres[weights.sum(0) > 1e-6]
    pairs = [
        np.exp(-options.t * (1 - cosine(a, b)))
        for i, a in enumerate(centres)
        for j, b in enumerate(centres)
        if i != j
    ]
    pd = np.log(np.mean(pairs))
    assert metrics["sc"] == pytest.approx(sc, rel=1e-4)
    assert metrics["pd"] == pytest.approx(pd, rel=1e-4)
    assert loss == pytest.approx(error - 0.1 * sc + 0.05 * pd, rel=1e-4)
    assert np.isfinite(one)  # One first code: no pair of centres.


NAMES = ["soft", "top1", "mp", "ste", "rotation", "gumbel", "ema", "simvq", "fsq"]


@pytest.mark.parametrize("name", NAMES)
def test_every_quantizer_is_trained_by_the_same_functions(name):
    options = with_quantizer(name)
    if name in ("ste", "rotation", "gumbel", "simvq", "ema"):
        options = dataclasses.replace(options, encoder=(4,), decoder=(4,))
    params = drawn(options)

    def values(params, x):
        extra = tokenizer.init_extra(params, options)

        def of(params):
            return tokenizer.loss(
                params, extra, {"x": x}, jax.random.key(0), options=options
            )

        (_, (metrics, after)), grads = jax.value_and_grad(of, has_aux=True)(params)
        found = tokenizer.quantize(params, extra, x, options)
        return (
            grads,
            metrics,
            found,
            (extra, after),
            tokenizer.codebooks(params, extra, options),
        )

    grads, metrics, found, (extra, after), books = together(values, params, X)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 0, (name, path)
    assert all(np.isfinite(v) for v in jax.tree.leaves(metrics))
    assert found.sid.min() >= 0 and (found.sid < options.codes).all()
    if name == "ema":
        assert np.abs(after.counts - extra.counts).max() > 0
    if name != "fsq":
        # The residual of a level is what those before left.
        taken = found.residuals[:, 0] - found.parts[:, 0]
        np.testing.assert_allclose(found.residuals[:, 1], taken, atol=1e-5)
    if name in ("ste", "rotation", "ema", "simvq"):
        hard = sum(books[i][found.sid[:, i]] for i in range(2))
        np.testing.assert_allclose(found.q, hard, atol=1e-5)
    if name == "mp":
        assert (np.diff(found.norms, axis=1) <= 1e-6).all()


def test_the_loss_is_that_of_one_device_on_eight():
    params = drawn(SMALL)
    x = RNG.normal(size=(16, 6)).astype(np.float32)

    def value(params, x):
        return tokenizer.loss(params, (), {"x": x}, jax.random.key(0), options=SMALL)[0]

    one = together(jax.value_and_grad(value), params, x)
    mesh = grid("8x1")
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("data")))
    many = together(jax.value_and_grad(value), params, spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, many)


@pytest.mark.programs(40)  # k-means and its first point, twice; encode, revive.
def test_codes_start_at_k_means_and_dead_ones_are_revived():
    options = dataclasses.replace(SMALL, quantizer="mp", codes=4)
    x = np.repeat(RNG.normal(size=(4, 6)), 6, 0) + 0.01 * RNG.normal(size=(24, 6))
    x = (x + 3).astype(np.float32)
    method = r3_vae.make(_config(options), items=24, features=6)
    state = method.init(jax.random.key(0), {"x": x[:8]})
    begun = starts.start(state, x, options, jax.random.key(1))
    np.testing.assert_allclose(begun.params["r"], x.mean(0), rtol=1e-5)
    first = starts.quantized(begun.params, (), x, options)
    assert len(np.unique(first.sid[:, 0])) == 4
    # Every code but one points away from all items.
    away = np.tile(-first.residuals.mean(0)[:, None], (1, 4, 1)).astype(np.float32)
    away[:, 0] = first.residuals[0]
    dead = begun._replace(params={**begun.params, "codebook": jnp.asarray(away)})
    used = starts.quantized(dead.params, (), x, options).sid[:, 0]
    revived, count = starts.revive(dead, x, options, jax.random.key(0))
    assert count >= 4 - len(np.unique(used)) > 0
    after = starts.quantized(revived.params, (), x, options).sid[:, 0]
    assert len(np.unique(after)) >= len(np.unique(used))
    kept = np.unique(used)
    np.testing.assert_array_equal(revived.params["codebook"][0][kept], away[0][kept])


def _config(options, **method):
    from ml_collections import ConfigDict

    return ConfigDict(
        {
            "tokenizer": dataclasses.asdict(options),
            "method": {"stage": "tokenize", **method},
            "optim": {"name": "sgd", "lr": 0.1},
            "train": {"steps": 1, "accumulate": 1},
        }
    )


def test_collisions_as_in_a_loop_over_a_dictionary():
    sid = RNG.integers(0, 3, (30, 2))
    prefer = RNG.normal(size=(30, 16))
    found = sids.resolve(sid, 16, "token", limit=12)
    seen: dict[tuple, int] = {}
    for row, own in zip(found.table.tolist(), sid.tolist()):
        assert row == [*own, seen.get(tuple(own), 0)]
        seen[tuple(own)] = seen.get(tuple(own), 0) + 1
    assert found.sizes == (16, 16, 12) and found.offsets == (0, 16, 32)
    assert found.tokens([3])[0].tolist() == (found.table[3] + [0, 16, 32]).tolist()
    again = sids.resolve(sid, 16, "reassign", preference=prefer)
    assert len(np.unique(again.table, axis=0)) == 30
    taken: dict[int, set] = {}
    firsts = {tuple(s): i for i, s in reversed(list(enumerate(sid.tolist())))}
    for (a, b), i in firsts.items():
        taken.setdefault(a, set()).add(b)
        assert again.table[i].tolist() == [a, b]
    for i, (a, b) in enumerate(sid.tolist()):
        if firsts[(a, b)] != i:
            best = next(c for c in np.argsort(-prefer[i]) if c not in taken[a])
            assert again.table[i].tolist() == [a, best]
            taken[a].add(best)
    # Identical items differ in the last token only, and no policy keeps the SIDs.
    assert sids.resolve(sid, 16, "none").table.tolist() == sid.tolist()
    groups = sids.resolve(sid, 16, "none").items()
    assert sum(map(len, groups.values())) == 30
    assert all(sid[i].tolist() == list(k) for k, own in groups.items() for i in own)


def test_files_and_report(tmp_path):
    sid = RNG.integers(0, 4, (20, 2))
    found = sids.resolve(sid, 4, limit=9)
    found.save(tmp_path / "sids.json")
    loaded = sids.SIDs.load(tmp_path / "sids.json")
    np.testing.assert_array_equal(loaded.table, found.table)
    assert loaded.sizes == found.sizes
    (tmp_path / "bad.json").write_text('{"sizes": [2], "table": [[0], [5]]}')
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        sids.SIDs.load(tmp_path / "bad.json")
    for bad in ('{"sizes": [2.5], "table": [[0]]}', '{"sizes": [2], "table": [[0.9]]}'):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ValueError, match="expected whole numbers"):
            sids.SIDs.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="expected SIDs"):
        sids.resolve([0, 1], 4)
    numbers = r3_vae.diagnose(sid, 4, RNG.normal(size=(20, 3)), np.eye(4)[sid[:, 0]])
    # Vectors of the first code alone: groups by it are one direction.
    assert numbers["sc_1"] == pytest.approx(1) and numbers["sc"] == pytest.approx(1)
    assert numbers["pd_1"] == pytest.approx(-2)
    assert numbers["sc_x_1"] < 0.9 and 0 < numbers["neighbours"] < 1


NET = r3_vae.Net(history=3, width=8, layers=1, heads=2)
SIZES = (3, 3, 2)


@pytest.mark.parametrize("tied", [False, True])
def test_beam_search_is_the_exhaustive_ranking(tied):
    net = dataclasses.replace(NET, tied=tied, users=4)
    table = np.stack(np.unravel_index(RNG.permutation(18)[:11], SIZES), 1).astype(
        np.int32
    )
    params = params_like(lambda key: retrieval.init(key, net, SIZES), KEY)
    history = np.int32([[-1, -1, 4], [3, 0, 10], [-1, 7, 7]])
    user = np.int32([0, 5, 9])
    trie = tries.build(table)
    seen = np.zeros((3, 11), bool)
    seen[0, 4], seen[1, [3, 0, 10]], seen[2, 7] = True, True, True

    def values(params, table, history, user, seen):
        own = {"net": net, "sizes": SIZES}
        args = (params, table, history, user)
        find = retrieval.recommend
        return (
            retrieval.score_items(*args, jnp.arange(11), **own),
            find(*args, trie, beam=11, **own),
            find(*args, trie, beam=11, seen=seen, **own),
            find(*args, trie, beam=3, **own),
        )

    scores, found, unseen, narrow = together(values, params, table, history, user, seen)
    items, best = tries.items_of(found, trie, 11)
    order = np.argsort(-scores, axis=1)
    np.testing.assert_array_equal(items, order)
    np.testing.assert_allclose(best, np.take_along_axis(scores, order, 1), atol=1e-4)
    # All SIDs of a code's vocabulary have mass 1; the catalogue's have less.
    assert (np.exp(scores).sum(1) < 1).all()
    kept, _ = tries.items_of(unseen, trie, 11, ~seen[:, trie.items])
    for row in range(3):
        expected = [i for i in order[row] if not seen[row, i]]
        assert kept[row].tolist() == expected + [-1] * (11 - len(expected))
    assert narrow.leaf.shape == (3, 3) and (narrow.leaf >= 0).all()


def test_padding_and_later_items_change_nothing():
    table = np.stack(np.unravel_index(np.arange(18), SIZES), 1).astype(np.int32)
    params = params_like(lambda key: retrieval.init(key, NET, SIZES), KEY)

    def values(params, table, user):
        def log_probs(items):
            items = jnp.asarray([items], jnp.int32)
            own = {"net": NET, "sizes": SIZES}
            return retrieval.log_probs(params, table, items, user, **own)[0]

        batch = {"items": jnp.asarray([[-1, 5, 2]], jnp.int32), "user": user}
        loss = retrieval.loss(
            params, {"sid": table}, batch, jax.random.key(0), net=NET, sizes=SIZES
        )
        return (
            log_probs([5, 2]), log_probs([-1, -1, 5, 2]), log_probs([5, 9]), loss
        )  # fmt: skip

    two, padded, other, (loss, (metrics, _)) = together(
        values, params, table, np.zeros(1, np.int32)
    )
    np.testing.assert_allclose(padded[2:], two, atol=1e-5)
    np.testing.assert_allclose(other[0], two[0], atol=1e-6)
    assert np.abs(other[1] - two[1]).max() > 1e-3
    assert loss == pytest.approx(-two.sum() / 6, rel=1e-5)
    assert metrics["weight"] == 2


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"2 of 3 item vectors .* rows \[0, 2\]"):
        tokenizer.check_vectors([[0.0, 0.0], [1.0, 0.0], [np.nan, 1.0]])
    with pytest.raises(ValueError, match="3 items share one SID"):
        sids.resolve(np.zeros((3, 2), int), 4, limit=2)
    with pytest.raises(ValueError, match="no last code is free"):
        sids.resolve(np.zeros((3, 2), int), 2, "reassign")
    with pytest.raises(ValueError, match="policy must be"):
        sids.resolve(np.zeros((3, 2), int), 2, "drop")
    with pytest.raises(ValueError, match="codes out of"):
        sids.resolve(np.full((3, 2), 7), 2)
    with pytest.raises(ValueError, match="items must be in"):
        sids.resolve(np.zeros((1, 2), int), 2).tokens([1])
    with pytest.raises(ValueError, match="20 items need as many SIDs"):
        retrieval.enumerated(20, (3, 3))
    trie = tries.build(np.zeros((1, 2), int))
    empty = jnp.zeros((1, 0), jnp.int32)
    with pytest.raises(ValueError, match="at least one place"):
        retrieval.recommend(
            {}, jnp.zeros((1, 3), jnp.int32), empty, empty[:, 0:0].sum(1), trie, net=NET,
            sizes=SIZES, beam=2,
        )  # fmt: skip
    with pytest.raises(ValueError, match="needs a trained tokenizer"):
        starts.assign(None, X, SMALL, r3_vae.Retrieval())


@pytest.mark.parametrize("source", ["item", "random"])
def test_rows_that_train_no_tokenizer_are_laid_out_on_a_mesh(source):
    """Every sharding rule has a leaf, with a head of its own and without."""
    arguments = [
        f"--config.method.source={source}",
        f"--config.net.tied={source == 'item'}",
    ]
    config = run.load_config("r3_vae:smoke", arguments)
    data = tasks.abstract(config)
    method = r3_vae.make(config, **data.facts)
    with jax.set_mesh(grid("4x2")):
        shapes = jax.eval_shape(method.init, jax.random.key(0), data.shapes)
        meshes.state_shardings(shapes, method.rules, grid("4x2"))
