"""Rocket Launching: recorded numbers, identities, costs, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers import papers, run
from jaxpapers import train as trainer
from jaxpapers.nets import wide_resnet
from jaxpapers.papers import rocket
from jaxpapers.papers.rocket import Part, export_light, feature_hint, hint_loss
from tests.contract import CLICK, Contract, write_clicks

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

    def draw(sizes):
        def layer(key, fan_in, fan_out):
            return {"W": jax.random.normal(key, (fan_out, fan_in)) / fan_in**0.5,
                    "b": jnp.full(fan_out, 0.1)}  # fmt: skip

        def init(key):
            keys = jax.random.split(key, len(sizes))
            made = [layer(k, *s) for k, s in zip(keys, sizes)]
            return {str(i + 1): m for i, m in enumerate(made)} if made[1:] else made[0]

        return init

    return rocket.rocket(
        Part(draw([(D, D)]), shared),
        Part(draw([(D, C)]), light),
        Part(draw([(D, H), (H, C)]), booster),
        **options,
    )


@pytest.mark.parity("ctr", only=lambda entry: "mimic_block_hint" in entry["arrays"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_recorded_losses_and_gradients(case, dtype):
    folder, _, entry = case
    tol = entry[f"tolerance_{dtype}"]
    with jax.enable_x64(dtype == "float64"), np.load(folder / entry["file"]) as z:
        z = {k: jnp.asarray(v, dtype) for k, v in z.items()}
        params = {
            "shared": {"W": z["W_s"], "b": z["b_s"]},
            "light": {"W": z["W_l"], "b": z["b_l"]},
            "booster": {
                "1": {"W": z["W_b1"], "b": z["b_b1"]},
                "2": {"W": z["W_b2"], "b": z["b_b2"]},
            },
        }
        batch = {"x": z["x"], "label": z["y"].astype(jnp.int32)}
        for hint in HINTS:
            for block in ("block", "noblock"):
                nets = toy_nets(
                    hint=hint, block={"block": "logits", "noblock": "none"}[block],
                    lam=float(z["lam"]), temperature=float(z["temperature"]),
                )  # fmt: skip
                state = nets.statistics(params)
                (value, (metrics, _)), grads = jax.value_and_grad(
                    nets.loss, has_aux=True
                )(params, state, batch, jax.random.key(0))
                start = f"{hint}_{block}_"
                check = functools.partial(
                    np.testing.assert_allclose, rtol=tol, atol=tol
                )
                check(value, z[start + "loss"])
                check(metrics["hint"], z[start + "hint"])
                check(metrics["ce_light"], z["ce_light"])
                check(metrics["ce_booster"], z["ce_booster"])
                own = {
                    "s": grads["shared"], "l": grads["light"],
                    "b1": grads["booster"]["1"], "b2": grads["booster"]["2"],
                }  # fmt: skip
                for name, g in own.items():
                    check(g["W"], z[f"{start}grad_W_{name}"])
                    check(g["b"], z[f"{start}grad_b_{name}"])


def test_the_boosters_layers_can_be_computed_again():
    """The same loss and gradients, and nothing else is computed twice."""
    x = jax.random.normal(jax.random.key(1), (B, D))
    batch = {"x": x, "label": jnp.arange(B) % C}
    found, counts = [], []
    for remat in (False, True):
        nets = toy_nets(remat=remat)
        params = nets.init(jax.random.key(0))
        state = nets.statistics(params)
        step = jax.value_and_grad(nets.loss, has_aux=True)
        args = params, state, batch, jax.random.key(0)
        found.append(jax.jit(step)(*args))
        jaxpr = jax.make_jaxpr(nets.loss)(*args)
        counts.append([e for e in jaxpr.eqns if e.primitive.name.startswith("remat")])
    jax.tree.map(np.testing.assert_array_equal, *found)
    plain, (own,) = counts
    assert not plain
    # Both layers of the booster, whose hidden one is H wide, and no other net's.
    products = [
        e for e in own.params["jaxpr"].eqns if e.primitive.name == "dot_general"
    ]
    assert [e.outvars[0].aval.shape for e in products] == [(B, H), (B, C)]


# Hints


def draws(seed=0, shape=(B, C)):
    keys = jax.random.split(jax.random.key(seed))
    return tuple(jax.random.normal(k, shape) for k in keys)


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("shape", [(B, C), (B,)])
def test_equal_logits_have_no_gradient(hint, shape):
    l, _ = draws(shape=shape)
    grad = jax.grad(lambda x: hint_loss(hint, x, l, 2.0).sum())(l)
    np.testing.assert_allclose(grad, 0, atol=1e-7)
    if hint != "kd":  # The cross-entropy's least value is the entropy.
        np.testing.assert_array_equal(hint_loss(hint, l, l), 0)


@pytest.mark.parametrize("hint", ["mimic"])
def test_without_block_the_hint_pulls_both_alike(hint):
    l, z = draws()
    at_l, at_z = jax.grad(lambda l, z: hint_loss(hint, l, z).sum(), (0, 1))(l, z)
    np.testing.assert_array_equal(at_l, -at_z)


def test_gradient_of_probabilities_is_the_papers():
    l, z = draws()
    p, q = jax.nn.softmax(l), jax.nn.softmax(z)
    expected = 2 * p * ((p - q) - (p * (p - q)).sum(-1, keepdims=True))
    found = jax.grad(lambda x: hint_loss("mse", x, z).sum())(l)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_high_temperature_matches_centred_logits():
    with jax.enable_x64():
        l, z = draws()
        t = 100 * float(jnp.abs(jnp.stack([l, z])).max())
        found = jax.grad(lambda x: hint_loss("kd", x, z, t).sum())(l)
        centred = (l - l.mean(-1, keepdims=True)) - (z - z.mean(-1, keepdims=True))
        np.testing.assert_allclose(
            found, centred / (C * t**2), rtol=0.01, atol=0.01 / (C * t**2)
        )


def test_a_constant_changes_logits_and_not_probabilities():
    l, z = draws()
    for hint in HINTS:
        a, b = (hint_loss(hint, x, z, 2.0) for x in (l, l + 3.0))
        if hint == "mimic":
            assert (jnp.abs(a - b) > 0.1).all()
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hint", HINTS)
def test_one_logit_is_two_classes(hint):
    l, z = draws(shape=(B,))
    one = hint_loss(hint, l, z, 2.0)
    zero = jnp.zeros(B)
    two = hint_loss(hint, jnp.stack([l, zero], 1), jnp.stack([z, zero], 1), 2.0)
    np.testing.assert_allclose(one, two, rtol=1e-6)


def test_distillation_is_the_divergence():
    l, t = draws()
    same = rocket.distillation_loss(t, t)
    np.testing.assert_allclose(same, 0, atol=1e-6)
    batch = rocket.distillation_loss(l, t, 4.0, 0.9, "batch")
    p, q = (np.asarray(jax.nn.softmax(x / 4.0), np.float64) for x in (t, l))
    expected = 2 * 0.9 * 16 * (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(batch, expected, rtol=1e-3)
    elements = rocket.distillation_loss(l, t, 4.0, 0.9)
    np.testing.assert_allclose(elements, batch / C, rtol=1e-6)
    at_teacher = jax.grad(lambda t: rocket.distillation_loss(l, t).sum())(t)
    np.testing.assert_array_equal(at_teacher, 0)


def test_feature_hints():
    h, g = draws()
    wide, _ = draws(1, (B, H))
    np.testing.assert_allclose(feature_hint("cosine", [h], [wide, 2 * h]), 0, atol=1e-6)
    np.testing.assert_allclose(
        feature_hint("l2", [h, wide], [g, wide]), jnp.square(h - g).sum(-1), rtol=1e-6
    )
    zero = jnp.zeros((B, C))
    grad = jax.grad(lambda x: feature_hint("cosine", [x], [h]).sum())(zero)
    assert np.isfinite(grad).all()
    with pytest.raises(ValueError, match="equal width"):
        feature_hint("l2", [h], [wide])


# The combination


def toy(seed=0, **options):
    nets = toy_nets(**options)
    params = nets.init(jax.random.key(seed))
    keys = jax.random.split(jax.random.key(seed + 1))
    batch = {
        "x": jax.random.normal(keys[0], (B, D)),
        "label": jax.random.randint(keys[1], (B,), 0, C),
    }
    return nets, params, nets.statistics(params), batch


def gradients(nets, params, state, batch):
    return jax.grad(lambda p: nets.loss(p, state, batch, jax.random.key(2))[0])(params)


def cross_entropy(nets, name, state, batch):
    def value(params):
        logits = getattr(nets, f"predict_{name}")(params, state, batch)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["label"]
        ).mean()

    return value


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("block", ["logits", "booster_params"])
def test_block_leaves_the_booster_alone(hint, block):
    nets, params, state, batch = toy(hint=hint, block=block, lam=5.0)
    found = gradients(nets, params, state, batch)["booster"]
    expected = jax.grad(cross_entropy(nets, "booster", state, batch))(params)["booster"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_blocks_differ_in_the_shared_layers():
    """The literal text lets the hint reach them through z, and no block W_B too."""
    found = {}
    for block in BLOCKS:
        nets, params, state, batch = toy(block=block, lam=5.0)
        found[block] = gradients(nets, params, state, batch)
    w = {block: np.asarray(g["shared"]["W"]) for block, g in found.items()}
    np.testing.assert_allclose(w["booster_params"], w["none"], rtol=1e-5, atol=1e-6)
    assert np.abs(w["logits"] - w["none"]).max() > 1e-2
    for g in found.values():
        np.testing.assert_array_equal(g["light"]["W"], found["none"]["light"]["W"])
    free = found["none"]["booster"]["1"]["W"]
    assert np.abs(free - found["logits"]["booster"]["1"]["W"]).max() > 1e-3


def test_without_hint_the_heads_are_independent():
    nets, params, state, batch = toy(lam=0.0)
    found = gradients(nets, params, state, batch)
    alone = {
        name: jax.grad(cross_entropy(nets, name, state, batch))(params)
        for name in ("light", "booster")
    }
    for name, grad in alone.items():
        jax.tree.map(np.testing.assert_array_equal, found[name], grad[name])
    total = jax.tree.map(jnp.add, *(g["shared"] for g in alone.values()))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
        found["shared"], total,
    )  # fmt: skip


def test_without_sharing_each_net_has_its_own_layers():
    nets, params, state, batch = toy(share=False, lam=0.0)
    found = gradients(nets, params, state, batch)["shared"]
    for name in ("light", "booster"):
        alone = jax.grad(cross_entropy(nets, name, state, batch))(params)["shared"]
        other = "booster" if name == "light" else "light"
        jax.tree.map(np.testing.assert_array_equal, found[name], alone[name])
        assert not any(np.abs(x).max() for x in jax.tree.leaves(alone[other]))
    lit = gradients(toy_nets(share=False, lam=1.0), params, state, batch)["shared"]
    jax.tree.map(np.testing.assert_array_equal, lit["booster"], found["booster"])


@pytest.mark.parametrize("name", ["light", "booster"])
def test_one_net_alone_trains_on_its_cross_entropy(name):
    both, params, state, batch = toy()
    alone = toy_nets(nets=name)
    own = {n: params[n] for n in ("shared", name)}
    value, (metrics, _) = alone.loss(own, state, batch, jax.random.key(0))
    expected = cross_entropy(both, name, state, batch)(params)
    np.testing.assert_array_equal(value, expected)
    assert set(metrics) == {f"ce_{name}", f"acc_{name}"}
    assert jax.tree.structure(alone.init(jax.random.key(0))) == jax.tree.structure(own)


def test_weights_are_those_of_repeated_rows():
    nets, params, state, batch = toy()
    weight = jnp.array([2.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    rows = jnp.array([0, 0, 1, 3])
    few = jax.tree.map(lambda x: x[rows], batch)
    key = jax.random.key(0)
    value, (metrics, _) = nets.loss(params, state, {**batch, "weight": weight}, key)
    expected, (other, _) = nets.loss(params, state, few, key)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert metrics["weight"] == 4
    for name in other:
        np.testing.assert_allclose(metrics[name], other[name], rtol=1e-5)


def test_exported_net_predicts_the_same_bits():
    nets, params, state, batch = toy()
    small = export_light(params)
    assert set(small) == {"shared", "light"}
    predict = jax.jit(nets.predict_light)
    np.testing.assert_array_equal(
        predict(params, state, batch), predict(small, export_light(state), batch)
    )


# The nets of this package


CLICK = {
    "net.item_vocab": 30, "net.cate_vocab": 7, "net.item_dim": 4, "net.cate_dim": 2,
    "net.std": 0.5, "net.unit_chunk": 0, "data.history": 6, "data.batch": 8,
    "net.light.hidden": (4,),
    "net.booster.hidden": (12, 8),
}  # fmt: skip
DIGITS = {"net.base": 4, "data.batch": 8, "net.booster_blocks": 2}


def config(preset, **fields):
    c = run.load_config(f"rocket:{preset}").copy_and_resolve_references().unlock()
    base = DIGITS if preset == "digits" else CLICK
    c.update_from_flattened_dict(
        {**base, **{k.replace("__", "."): v for k, v in fields.items()}}
    )
    return c.lock()


def click_batch(seed=0, slots=6):
    rng = np.random.default_rng(seed)
    length = rng.integers(0, slots + 1, 8)
    here = np.arange(slots) < length[:, None]
    x = {
        "item": rng.integers(2, 30, 8),
        "cate": rng.integers(2, 7, 8),
        "hist_item": rng.integers(2, 30, (8, slots)) * here,
        "hist_cate": rng.integers(2, 7, (8, slots)) * here,
        "length": length,
        "label": rng.integers(0, 2, 8),
    }
    return {k: jnp.asarray(v, jnp.int32) for k, v in x.items()}


def image_batch():
    key_image, key_label = jax.random.split(jax.random.key(3))
    return {
        "image": jax.random.normal(key_image, (8, 8, 8, 1)),
        "label": jax.random.randint(key_label, (8,), 0, 10),
    }


CASES = {
    "din": ("ml100k", {}, click_batch),
    "dien": ("dien", {"net__light__state": 3, "net__booster__state": 6}, click_batch),
    "wrn": ("digits", {}, image_batch),
    "wrn, bottom": ("digits", {"net__sharing": "bottom"}, image_batch),
}


@functools.cache
def built(name, **fields):
    preset, own, batch = CASES[name]
    method = rocket.make(config(preset, **own, **fields))
    return method, batch(), jax.jit(method.init)(jax.random.key(0), batch())


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_every_model(name):
    method, batch, state = built(name)
    new, metrics = jax.jit(method.update)(state, batch)
    assert {"ce_light", "ce_booster", "hint", "acc_light", "acc_booster"} <= set(
        metrics
    )
    total = metrics["ce_light"] + metrics["ce_booster"] + 0.03 * metrics["hint"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    moved = jax.tree.map(
        lambda a, b: jnp.abs(a - b).max() > 0, state.params, new.params
    )
    for part in ("shared", "light", "booster"):
        assert any(jax.tree.leaves(moved[part])), part

    predict = jax.jit(method.sampler)
    both = predict(new.params, jax.random.key(0), batch, new.extra)
    light = predict(export_light(new.params), jax.random.key(0), batch, new.extra)
    np.testing.assert_array_equal(both.light, light)
    assert both.booster.shape == light.shape
    assert np.abs(both.booster - both.light).max() > 0


@pytest.mark.parametrize("name", ["wrn", "wrn, bottom"])
def test_residual_nets_share_convolutions_and_nothing_else(name):
    _, _, state = built(name)
    params = state.params
    assert set(params["light"]) == {"norms", "last", "linear"}
    assert set(params["booster"]) == {"norms", "last", "linear", "convs"}
    shared, own = set(params["shared"]["convs"]), set(params["booster"]["convs"])
    assert not shared & own
    assert shared == set(params["light"]["norms"])
    assert shared | own == set(params["booster"]["norms"])
    if name == "wrn":
        assert shared == {f"group_{g}_block_0" for g in range(3)}
    else:
        assert own == {f"group_2_block_{i}" for i in range(2)}


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


def test_batch_norm_is_masked_and_moves():
    x = jax.random.normal(jax.random.key(0), (4, 3, 3, 2)) * 2 + 1
    params = {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.0, 1.0])}
    start = wide_resnet.Moments(jnp.zeros(2), jnp.ones(2))
    mask = jnp.array([True, True, True, False])
    spoiled = x.at[3].set(1e6)
    y, moved = wide_resnet.batch_norm(params, start, spoiled, train=True, mask=mask)
    part = np.asarray(x[:3], np.float64)
    mean, var = part.mean((0, 1, 2)), part.var((0, 1, 2))
    expected = (part - mean) / np.sqrt(var + 1e-5) * [1, 2] + [0, 1]
    np.testing.assert_allclose(y[:3], expected, atol=1e-5)
    np.testing.assert_allclose(moved.mean, 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(moved.var, 0.9 + 0.1 * var * 27 / 26, rtol=1e-5)
    same, kept = wide_resnet.batch_norm(params, moved, x, train=False)
    assert kept is moved and np.abs(same - y).max() > 0


def test_shared_layers_run_once():
    """A step costs what both nets alone cost, less the shared layers once."""

    def flops(preset, **fields):
        fields = {"net__item_dim": 32, "net__unit": (64,), "net__product": False,
                  "optim__tables": "dense", "optim__name": "sgd", **fields}  # fmt: skip
        method = rocket.make(config(preset, **fields))
        batch = click_batch(slots=24)
        shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
        loss = jax.grad(
            lambda p: method.loss(p, batch, jax.random.key(0))[0]
        )  # The step's cost but the optimizer's.
        return jax.jit(loss).lower(shapes.params).compile().cost_analysis()["flops"]

    light, booster, both = (
        flops("ml100k", method__nets=n) for n in ("light", "booster", "both")
    )
    # A net whose head is one number is the shared layers.
    shared = flops("ml100k", method__nets="light", net__light__hidden=())
    assert shared > 0.3 * both
    assert both <= 1.1 * (light + booster - shared)


@pytest.mark.parametrize("mesh", [{"data": 4, "model": 2}, {"data": 2, "model": 4}])
def test_split_booster_gives_the_same_numbers(mesh):
    from jaxpapers import mesh as meshes

    fields = {
        "net__booster__hidden": (16, 8), "net__activation": "relu",
        "optim__tables": "row_sgd", "optim__name": "sgd", "optim__lr": 0.1,
    }  # fmt: skip
    plain = rocket.make(config("ml100k", **fields))
    split = rocket.make(config("ml100k", net__split_booster=True, **fields))
    results = []
    for method, shape in ((plain, {"data": 1, "model": 1}), (split, mesh)):
        grid = meshes.make_mesh(shape, jax.devices()[: shape["data"] * shape["model"]])
        compiled = trainer.compile(method, grid, click_batch())
        state = compiled.init(jax.random.key(0))
        with jax.set_mesh(grid):
            for i in range(2):
                batch = meshes.put_batch(click_batch(i), grid, 8)
                state, _ = compiled.step(state, batch)
        results.append(state.params)
    kernel = results[1]["booster"]["mlp"]["layer_0"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "model")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        *jax.device_get(results),
    )


def test_rivals_train_each_net_alone():
    found = papers.rivals("rocket", config("ml100k"))
    assert [c.method.nets for c in found.values()] == ["light", "booster", "both"]
    assert found["without block"].method.block == "none"
    assert not papers.rivals("rocket", found["light alone"])


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "lam must be >= 0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"hint": "l1"}, "mimic"),
        ({"block": "some"}, "booster_params"),
        ({"features": "l1"}, "cosine"),
        ({"nets": "none"}, "booster"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        toy_nets(**options)


def test_bad_inputs():
    nets, params, state, batch = toy()
    with pytest.raises(ValueError, match="'booster'"):
        nets.loss({**params, "booster": {}}, state, batch, jax.random.key(0))
    with pytest.raises(ValueError, match="same classes"):
        hint_loss("mimic", jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="teacher"):
        toy_nets(alpha=0.9).loss(params, state, batch, jax.random.key(0))
    for fields, message in (
        ({"net__model": "mlp"}, "model"),
        ({"method__share": False, "optim__tables": "lazy_adam"}, "dense"),
        ({"optim__lr": 0.0}, "lr"),
    ):
        with pytest.raises(ValueError, match=message):
            rocket.make(config("ml100k", **fields))
    for fields, message in (
        ({"net__sharing": "top"}, "bottom"),
        ({"net__light_blocks": 2}, "light_blocks"),
        ({"optim__name": "lion"}, "optim.name must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            rocket.make(config("digits", **fields))


def test_empty_history_and_one_row():
    method, batch, state = built("din")
    one = jax.tree.map(lambda x: x[:1], {**batch, "length": jnp.zeros(8, jnp.int32)})
    value, _ = method.loss(state.params, one, jax.random.key(0))
    assert np.isfinite(value)
