"""Rocket Launching: recorded numbers, identities, costs, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import method as method_api
from jaxpapers import run
from jaxpapers import train as trainer
from jaxpapers.papers import rocket
from jaxpapers.papers.rocket import Part, export_light, feature_hint, hint_loss
from tests import clicks
from tests.contract import CLICK, Contract, write_clicks
from tests.programs import KEY, params_like, together

CONTRACT = Contract(
    small={
        **CLICK, "net.unit": (8,), "net.light.hidden": (4,),
        "net.booster.hidden": (8, 4),
    },
    data=write_clicks,
    refused={
        "net.model": ("mlp", "net.model"),
        "method.lam": (-1.0, "lam"),
        "method.hint": ("l1", "mimic"),
        "train.accumulate": (0, "train.accumulate"),
    },
)  # fmt: skip

B, C, D, H = 6, 4, 5, 9
HINTS, BLOCKS = ("mimic", "mse", "kd"), ("logits", "booster_params", "none")
matrix = pytest.mark.matrix
rng = np.random.default_rng


# Recorded numbers


def dense(p, x):
    return x @ p["W"].T + p["b"][None]


def toy_nets(**options):
    """The recorded nets: a shared ReLU layer, a linear head and one of two layers."""

    def shared(p, state, batch, key, train):
        return jax.nn.relu(dense(p, batch["x"])), state

    def light(p, lower, state, x, batch, key, train):
        return dense(p, x), [x], state

    def booster(p, lower, state, x, batch, key, train):
        hidden = jax.nn.relu(dense(p["1"], x))
        return dense(p["2"], hidden), [x, hidden], state

    def layer(fan_in, fan_out):
        return {"W": jnp.zeros((fan_out, fan_in)), "b": jnp.zeros(fan_out)}

    return rocket.rocket(
        Part(lambda key: layer(D, D), shared),
        Part(lambda key: layer(D, C), light),
        Part(lambda key: {"1": layer(D, H), "2": layer(H, C)}, booster),
        options=rocket.Options(**options),
    )


@pytest.mark.parity("ctr", only=lambda entry: "mimic_block_hint" in entry["arrays"])
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=matrix)])
def test_recorded_losses_and_gradients(case, dtype):
    tol = case.tolerance(dtype)
    z = {k: v.astype(dtype) for k, v in case.arrays.items()}
    params = {
        "shared": {"W": z["W_s"], "b": z["b_s"]},
        "light": {"W": z["W_l"], "b": z["b_l"]},
        "booster": {
            "1": {"W": z["W_b1"], "b": z["b_b1"]},
            "2": {"W": z["W_b2"], "b": z["b_b2"]},
        },
    }
    batch = {"x": z["x"], "label": z["y"].astype(np.int32)}
    options = {"lam": float(z["lam"]), "temperature": float(z["temperature"])}

    def check(params, batch):
        found = {}
        for hint in HINTS:
            for name, block in (("block", "logits"), ("noblock", "none")):
                nets = toy_nets(hint=hint, block=block, **options)
                value = jax.value_and_grad(nets.loss, has_aux=True)
                state = nets.statistics(params)
                found[f"{hint}_{name}_"] = value(
                    params, state, batch, jax.random.key(0)
                )
        return found

    with jax.enable_x64(dtype == "float64"):
        found = together(check, params, batch)
    for start, ((value, (metrics, _)), grads) in found.items():
        close = functools.partial(np.testing.assert_allclose, rtol=tol, atol=tol)
        close(value, z[start + "loss"])
        close(metrics["hint"], z[start + "hint"])
        close(metrics["ce_light"], z["ce_light"])
        close(metrics["ce_booster"], z["ce_booster"])
        named = {
            "s": grads["shared"], "l": grads["light"],
            "b1": grads["booster"]["1"], "b2": grads["booster"]["2"],
        }  # fmt: skip
        for name, g in named.items():
            close(g["W"], z[f"{start}grad_W_{name}"])
            close(g["b"], z[f"{start}grad_b_{name}"])


# Hints


def draws(shape=(B, C)):
    return rng(0).normal(size=(2, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(B, C), (B,)])
def test_hints_of_equal_shifted_and_single_logits(shape):
    l, z = draws(shape)

    def check(l, z):
        def of(hint, l):
            grad = jax.grad(lambda x: hint_loss(hint, x, l, 2.0).sum())(l)
            return {
                "grad": grad,
                "equal": hint_loss(hint, l, l),
                "plain": hint_loss(hint, l, z, 2.0),
                "shifted": hint_loss(hint, l + 3.0, z, 2.0),
            }

        pulled = jax.grad(lambda l, z: hint_loss("mimic", l, z).sum(), (0, 1))(l, z)
        return {hint: of(hint, l) for hint in HINTS}, pulled

    found, (at_l, at_z) = together(check, l, z)
    # Without block the hint pulls both nets alike.
    np.testing.assert_array_equal(at_l, -at_z)
    for hint, x in found.items():
        np.testing.assert_allclose(x["grad"], 0, atol=1e-7)
        if hint != "kd":  # The cross-entropy's least value is the entropy.
            np.testing.assert_array_equal(x["equal"], 0)
        if hint == "mimic":
            assert (np.abs(x["plain"] - x["shifted"]) > 0.05).all()
        elif len(shape) == 2:
            np.testing.assert_allclose(x["plain"], x["shifted"], rtol=1e-5, atol=1e-6)
    if len(shape) == 1:
        # One logit is two classes.
        pairs = [np.stack([x, np.zeros(B, "f")], 1) for x in (l, z)]
        two = together(lambda l, z: {h: hint_loss(h, l, z, 2.0) for h in HINTS}, *pairs)
        for hint, value in two.items():
            np.testing.assert_allclose(found[hint]["plain"], value, rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_gradients_of_probabilities_and_of_a_high_temperature():
    """That of mse is the paper's; that of kd is that of centred logits."""
    l, z = rng(0).normal(size=(2, B, C))
    t = 100 * np.abs([l, z]).max()

    def grads(l, z):
        return [
            jax.grad(lambda x, h=h, t=t: hint_loss(h, x, z, t).sum())(l)
            for h, t in (("mse", 1.0), ("kd", t))
        ]

    mse, kd = together(grads, l, z)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (l, z))
    expected = 2 * p * ((p - q) - (p * (p - q)).sum(-1, keepdims=True))
    np.testing.assert_allclose(mse, expected, rtol=1e-10, atol=1e-14)
    centred = (l - l.mean(-1, keepdims=True)) - (z - z.mean(-1, keepdims=True))
    np.testing.assert_allclose(
        kd, centred / (C * t**2), rtol=0.01, atol=0.01 / (C * t**2)
    )


def test_distillation_is_the_divergence():
    l, t = draws()

    def check(l, t):
        loss = rocket.distillation_loss
        at_teacher = jax.grad(lambda t: loss(l, t).sum())(t)
        both = loss(l, t, 4.0, 0.9, "batch"), loss(l, t, 4.0, 0.9)
        return loss(t, t), both, at_teacher

    same, (batch, elements), at_teacher = together(check, l, t)
    np.testing.assert_allclose(same, 0, atol=1e-6)
    p, q = (np.exp(x / 4.0, dtype=float) for x in (t, l))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    expected = 2 * 0.9 * 16 * (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(batch, expected, rtol=1e-3)
    np.testing.assert_allclose(elements, batch / C, rtol=1e-6)
    np.testing.assert_array_equal(at_teacher, 0)


def test_feature_hints():
    h, g = draws()
    wide = rng(1).normal(size=(B, H)).astype(np.float32)

    def check(h, g, wide):
        grad = jax.grad(lambda x: feature_hint("cosine", [x], [h]).sum())(0 * h)
        same = feature_hint("cosine", [h], [wide, 2 * h])
        return grad, same, feature_hint("l2", [h, wide], [g, wide])

    grad, same, distance = together(check, h, g, wide)
    assert np.isfinite(grad).all()
    np.testing.assert_allclose(same, 0, atol=1e-6)
    np.testing.assert_allclose(distance, np.square(h - g).sum(-1), rtol=1e-5)
    with pytest.raises(ValueError, match="equal width"):
        feature_hint("l2", *clicks.device(([h], [wide])))


# The combination


def toy(**options):
    nets = toy_nets(**options)
    params = params_like(nets.init, KEY)
    batch = {
        "x": rng(1).normal(size=(B, D)).astype(np.float32),
        "label": rng(2).integers(0, C, B),
    }
    return params, {name: {} for name in ("shared", "light", "booster")}, batch


def gradients(params, state, batch, **options):
    nets = toy_nets(**options)
    state = nets.statistics(params)
    return jax.grad(lambda p: nets.loss(p, state, batch, jax.random.key(2))[0])(params)


def cross_entropy(name, state, batch, **options):
    def value(params):
        nets = toy_nets(**options)
        logits = getattr(nets, f"predict_{name}")(
            params, nets.statistics(params), batch
        )
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["label"]
        ).mean()

    return value


equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
close = functools.partial(
    jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
)


def test_block_leaves_the_booster_alone_and_blocks_differ_in_the_shared_layers():
    """The literal text lets the hint reach them through z, and no block W_B too."""
    params, state, batch = toy()

    def check(params, batch):
        found = {
            (hint, block): gradients(
                params, state, batch, hint=hint, block=block, lam=5.0
            )
            for hint in HINTS
            for block in BLOCKS
        }
        found = {f"{hint} {block}": g for (hint, block), g in found.items()}
        alone = {
            name: jax.grad(cross_entropy(name, state, batch))(params)
            for name in ("light", "booster")
        }
        return found, alone, gradients(params, state, batch, lam=0.0)

    found, alone, without = together(check, params, batch)
    for hint in HINTS:
        for block in ("logits", "booster_params"):
            close(found[f"{hint} {block}"]["booster"], alone["booster"]["booster"])
    by = {block: found[f"mimic {block}"] for block in BLOCKS}
    w = {block: g["shared"]["W"] for block, g in by.items()}
    np.testing.assert_allclose(w["booster_params"], w["none"], rtol=1e-5, atol=1e-6)
    assert np.abs(w["logits"] - w["none"]).max() > 1e-2
    close(by["logits"]["light"], by["none"]["light"])
    free, blocked = (by[b]["booster"]["1"]["W"] for b in ("none", "logits"))
    assert np.abs(free - blocked).max() > 1e-3
    # Without a hint the heads are independent.
    for name in ("light", "booster"):
        close(without[name], alone[name][name])
    total = jax.tree.map(np.add, *(g["shared"] for g in alone.values()))
    close(without["shared"], total)


@pytest.mark.matrix
def test_without_sharing_each_net_has_its_own_layers():
    own, _, batch = toy(share=False)
    assert set(own["shared"]) == {"light", "booster"}
    state = None

    def check(params, batch):
        without, lit = (
            gradients(params, state, batch, share=False, lam=lam)["shared"]
            for lam in (0.0, 1.0)
        )
        alone = {
            name: jax.grad(cross_entropy(name, state, batch, share=False))(params)
            for name in ("light", "booster")
        }
        return without, lit, alone

    without, lit, alone = together(check, own, batch)
    close(lit["booster"], without["booster"])
    for name, other in (("light", "booster"), ("booster", "light")):
        close(without[name], alone[name]["shared"][name])
        assert not any(x.any() for x in jax.tree.leaves(alone[name]["shared"][other]))


@pytest.mark.matrix
def test_nets_alone_weights_export_and_recomputed_layers():
    params, state, batch = toy()
    key, weight = jax.random.key(0), np.array([2, 1, 0, 1, 0, 0], np.float32)
    few = {k: v[np.array([0, 0, 1, 3])] for k, v in batch.items()}
    both = toy_nets()

    def check(params, batch, few, weight):
        alone = {
            name: toy_nets(nets=name).loss(
                {n: params[n] for n in ("shared", name)}, state, batch, key
            )[:2]
            for name in ("light", "booster")
        }
        expected = {n: cross_entropy(n, state, batch)(params) for n in alone}
        weighted = both.loss(params, state, {**batch, "weight": weight}, key)
        remat = jax.value_and_grad(toy_nets(remat=True).loss, has_aux=True)
        plain = jax.value_and_grad(both.loss, has_aux=True)
        exported = export_light(params), export_light(state)
        return (
            alone, expected, weighted, both.loss(params, state, few, key),
            [f(params, state, batch, key) for f in (plain, remat)],
            both.predict_light(params, state, batch),
            both.predict_light(*exported, batch),
        )  # fmt: skip

    alone, expected, weighted, repeated, steps, *exported = together(
        check, params, batch, few, weight
    )
    for name, (value, (metrics, _)) in alone.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)
        assert set(metrics) == {f"ce_{name}", f"acc_{name}"}
        init = jax.eval_shape(toy_nets(nets=name).init, KEY)
        assert set(init) == {"shared", name}
    # Weights are repeated rows.
    np.testing.assert_allclose(weighted[0], repeated[0], rtol=1e-6)
    assert weighted[1][0].pop("weight") == 4
    close(weighted[1][0], repeated[1][0])
    close(*steps)
    assert set(export_light(params)) == {"shared", "light"}
    np.testing.assert_array_equal(*exported)


def test_only_the_boosters_layers_are_computed_again():
    params, state, batch = toy()
    remats = []
    for remat in (False, True):
        loss = toy_nets(remat=remat).loss
        jaxpr = jax.make_jaxpr(loss)(params, state, batch, jax.random.key(0))
        remats.append([e for e in jaxpr.eqns if e.primitive.name.startswith("remat")])
    plain, (booster,) = remats
    assert not plain
    # Both layers of the booster, whose hidden one is H wide, and no other net's.
    products = [
        e for e in booster.params["jaxpr"].eqns if e.primitive.name == "dot_general"
    ]
    assert [e.outvars[0].aval.shape for e in products] == [(B, H), (B, C)]


# The nets of this package


SIZES = {n: v for n, v in clicks.SIZES.items() if n != "hidden"} | {"user_dim": 0}
CLICK = {
    **{f"net.{n}": v for n, v in SIZES.items()}, "data.history": 6, "data.batch": 8,
    "net.light.hidden": (4,), "net.booster.hidden": (12, 8),
}  # fmt: skip
DIGITS = {"net.base": 4, "data.batch": 8, "net.booster_blocks": 2}
SMALL, LARGE = {"hidden": (4,)}, {"hidden": (12, 8)}
WRN = {"size": 8, "channels": 1, "base": 4, "light_blocks": 1, "booster_blocks": 2,
       "augment": False}  # fmt: skip
NETS = {
    "din": rocket.DinNet(
        **SIZES, light=rocket.Mlp(**SMALL), booster=rocket.Mlp(**LARGE)
    ),
    "dien": rocket.DienNet(
        **SIZES,
        light=rocket.Recurrent(**SMALL, state=3),
        booster=rocket.Recurrent(**LARGE, state=6),
    ),
    "wrn": rocket.WrnNet(**WRN),
    "wrn, bottom": rocket.WrnNet(**WRN, sharing="bottom"),
}


def config(preset, **fields):
    c = run.load_config(f"rocket:{preset}").copy_and_resolve_references().unlock()
    base = DIGITS if preset == "digits" else CLICK
    c.update_from_flattened_dict(
        {**base, **{k.replace("__", "."): v for k, v in fields.items()}}
    )
    return c.lock()


def image_batch():
    return {
        "image": rng(3).normal(size=(8, 8, 8, 1)).astype(np.float32),
        "label": rng(4).integers(0, 10, 8),
    }


def drawn(net):
    def init(key):
        params = rocket.init(key, net)
        return params, rocket.statistics(params, net)

    return params_like(init, KEY)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name",
    ["wrn", *(pytest.param(n, marks=matrix) for n in ("dien", "din", "wrn, bottom"))],
)
def test_loss_and_predictions_of_every_model(name):
    net = NETS[name]
    batch = clicks.batch() if name in ("din", "dien") else image_batch()

    def check(params, extra, batch):
        value = functools.partial(rocket.loss, net=net)
        step = jax.value_and_grad(value, has_aux=True)
        both = rocket.predict(params, extra, batch, net=net)
        return step(params, extra, batch, jax.random.key(0)), both

    params, extra = drawn(net)
    ((value, (metrics, _)), grads), both = together(check, params, extra, batch)
    total = metrics["ce_light"] + metrics["ce_booster"] + 0.03 * metrics["hint"]
    np.testing.assert_allclose(value, total, rtol=1e-5)
    for part in ("shared", "light", "booster"):
        assert any(x.any() for x in jax.tree.leaves(grads[part])), part
    assert np.abs(both.booster - both.light).max() > 0
    # The exported net has one array of logits; toy nets test that it is the same one.
    predict = functools.partial(rocket.predict, net=net)
    light = jax.eval_shape(predict, export_light(params), export_light(extra), batch)
    assert light.shape == both.light.shape == both.booster.shape


@pytest.mark.matrix
def test_empty_history_and_one_row():
    net = NETS["din"]
    one = {**clicks.batch(size=1), "length": np.zeros(1, np.int32)}
    loss = functools.partial(rocket.loss, net=net)
    value, _ = together(loss, *drawn(net), one, jax.random.key(0))
    assert np.isfinite(value)


@pytest.mark.parametrize("name", ["wrn", "wrn, bottom"])
def test_residual_nets_share_convolutions_and_nothing_else(name):
    params, _ = drawn(NETS[name])
    assert set(params["light"]) == {"norms", "last", "linear"}
    assert set(params["booster"]) == {"norms", "last", "linear", "convs"}
    shared, deep = set(params["shared"]["convs"]), set(params["booster"]["convs"])
    assert not shared & deep
    assert shared == set(params["light"]["norms"])
    assert shared | deep == set(params["booster"]["norms"])
    if name == "wrn":
        assert shared == {f"group_{g}_block_0" for g in range(3)}
    else:
        assert deep == {f"group_2_block_{i}" for i in range(2)}


def test_residual_net_of_the_paper_has_its_size():
    """WRN-16-1 and WRN-40-1 have 0.18 and 0.56 million parameters."""
    c = run.load_config("rocket")
    shapes = jax.eval_shape(rocket.make(c).init, jax.random.key(0), None).params

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    light = count(shapes["shared"]) + count(shapes["light"])
    assert light == pytest.approx(0.175e6, rel=0.03)
    booster = count(shapes["shared"]) + count(shapes["booster"])
    assert booster == pytest.approx(0.564e6, rel=0.03)


@pytest.mark.matrix
def test_shared_layers_run_once():
    """A loss costs what both nets alone cost, less the shared layers once."""

    def flops(**fields):
        fields = {"net__item_dim": 32, "net__unit": (64,), "net__product": False,
                  "optim__tables": "dense", "optim__name": "sgd", **fields}  # fmt: skip
        method = rocket.make(config("ml100k", **fields))
        batch = clicks.batch(slots=24)
        shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
        lowered = jax.jit(method.loss).lower(shapes.params, batch, KEY)
        return lowered.cost_analysis()["flops"]

    light, booster, both = (flops(method__nets=n) for n in ("light", "booster", "both"))
    # A net whose head is one number is the shared layers.
    shared = flops(method__nets="light", net__light__hidden=())
    assert shared > 0.3 * both
    assert both <= 1.1 * (light + booster - shared)


def test_split_rules_cut_columns_and_rows_in_turn():
    spec = jax.sharding.PartitionSpec
    rules = rocket.split_rules(NETS["din"])
    cuts = [spec(None, "model"), spec("model", None), spec()]
    for i, expected in enumerate(cuts):
        path = f"params/booster/mlp/layer_{i}/kernel"
        assert method_api.param_spec(rules, path) == expected
        assert method_api.param_spec(rules, path.replace("booster", "light")) == spec()
    convs = "params/booster/convs/group_0_block_1/first"
    expected = spec(None, None, None, "model")
    assert method_api.param_spec(rocket.split_rules(NETS["wrn"]), convs) == expected


@pytest.mark.matrix
@pytest.mark.parametrize("sizes", [(4, 2), (2, 4)])
def test_split_booster_gives_the_same_numbers(sizes):
    fields = {
        "net__booster__hidden": (16, 8), "net__activation": "relu",
        "optim__tables": "row_sgd", "optim__name": "sgd", "optim__lr": 0.1,
    }  # fmt: skip
    results = []
    for split, shape in ((False, (1, 1)), (True, sizes)):
        method = rocket.make(config("ml100k", net__split_booster=split, **fields))
        grid = clicks.grid(shape)
        compiled = trainer.compile(method, grid, clicks.batch())
        state = compiled.init(jax.random.key(0))
        with jax.set_mesh(grid):
            for i in range(2):
                batch = meshes.put_batch(clicks.batch(i), grid, 8)
                state, _ = compiled.step(state, batch)
        results.append(state.params)
    kernel = results[1]["booster"]["mlp"]["layer_0"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "model")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        *jax.device_get(results),
    )


def test_ablations_train_each_net_alone_and_without_block():
    c = config("ml100k")
    fields = rocket.ablations(c)
    assert [*fields.values()] == [
        {"method.nets": "light"}, {"method.nets": "booster"}, {"method.block": "none"}
    ]  # fmt: skip
    alone = config("ml100k", method__nets="booster")
    assert not rocket.ablations(alone)
    # Only the light net of two is served.
    tree = {"shared": 1, "light": 2, "booster": 3}
    assert rocket.make(c).served(tree) == {"shared": 1, "light": 2}
    assert rocket.make(alone).served is None


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "method.lam must be >= 0"),
        ({"temperature": 0.0}, "method.temperature must be > 0"),
        ({"temperature": float("nan")}, "method.temperature must be > 0"),
        ({"hint": "l1"}, "method.hint must be .*mimic"),
        ({"block": "some"}, "method.block must be .*booster_params"),
        ({"features": "l1"}, "method.features must be .*cosine"),
        ({"nets": "none"}, "method.nets must be .*booster"),
        ({"alpha": -1.0}, "method.alpha must be >= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        rocket.Options(**options)


def test_bad_inputs():
    params, state, batch = toy()
    loss = functools.partial(jax.eval_shape, toy_nets().loss)
    with pytest.raises(ValueError, match="'booster'"):
        loss({**params, "booster": {}}, state, batch, KEY)
    with pytest.raises(ValueError, match="same classes"):
        hint_loss("mimic", jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="teacher"):
        jax.eval_shape(toy_nets(alpha=0.9).loss, params, state, batch, KEY)


@pytest.mark.parametrize(
    "preset, fields, message",
    [
        ("ml100k", {"net__model": "mlp"}, "net.model must be one of"),
        ("ml100k", {"method__share": False, "optim__tables": "lazy_adam"}, "dense"),
        ("ml100k", {"optim__lr": 0.0}, "optim.lr must be > 0"),
        ("digits", {"net__sharing": "top"}, "net.sharing must be .*bottom"),
        ("digits", {"net__light_blocks": 2}, "net.light_blocks must be <"),
        ("digits", {"optim__name": "lion"}, "optim.name must be one of"),
    ],
)
def test_make_refuses(preset, fields, message):
    with pytest.raises(ValueError, match=message):
        rocket.make(config(preset, **fields))
