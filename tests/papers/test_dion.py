"""The language model's loss, sampler, rank schedule and presets."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import optim, run
from jaxpapers import train as trainer
from jaxpapers.config import load_config
from jaxpapers.folder import load_run
from jaxpapers.papers import dion
from tests.contract import Contract
from tests.programs import KEY, params_like, together

LINES = "".join(f"def f{i}(x):\n    return x + {i % 7}\n\n\n" for i in range(400))


def write_text(folder):
    (folder / "text.py").write_text(LINES)
    return folder / "text.py"


CONTRACT = Contract(
    small={
        "data.context": 16, "data.batch": 8, "data.eval_batch": 8, "net.width": 32,
        "net.layers": 2, "net.heads": 2, "net.init_residual": "scaled",
        "train.steps": 20, "train.sample": 0, "optim.weight_decay": 0.0,
    },
    data=write_text,
    refused={
        "net.heads": (5, "multiple of net.heads"),
        "net.dtype": ("float64", "bfloat16"),
        "optim.name": ("lion", "optim.name"),
        "optim.rank_fraction": (1.5, "rank_fraction"),
        "optim.mu": (-0.5, "mu"),
        "optim.orthogonalize": ("lu", "orthogonalize"),
        "optim.scalar": ("sgd", "scalar"),
        "optim.cooldown": (1.5, "shares of the run"),
        "train.accumulate": (0, "train.accumulate"),
    },
)  # fmt: skip

NET = dion.Net(vocab_size=40, width=32, layers=1)
MODULE = dion.network(NET)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (3, 9)), jnp.int32)
BATCH = {"tokens": TOKENS}


@pytest.fixture(scope="module")
def params():
    return params_like(MODULE.init, KEY, TOKENS)["params"]


class Uniform(nn.Module):
    """All tokens equally probable."""

    @nn.compact
    def __call__(self, tokens):
        return jnp.zeros((*tokens.shape, 40))


def test_loss(params, key):
    """Cross-entropy of the next token, over the weighted targets where there are some."""
    weight = np.zeros((3, 8), np.float32)
    weight[1, 2:5] = 1

    def losses(params, weight):
        loss = functools.partial(dion.loss, key=key)
        return (
            dion.loss({}, BATCH, key, net=Uniform()),
            loss(params, BATCH, net=NET),
            loss(params, {**BATCH, "weight": weight}, net=NET),
            MODULE.apply({"params": params}, TOKENS[:, :-1]),
        )

    uniform, (plain, _), (weighted, metrics), logits = together(losses, params, weight)
    np.testing.assert_allclose(uniform[0], np.log(40), rtol=1e-6)
    np.testing.assert_allclose(uniform[1]["bits"], np.log2(40), rtol=1e-6)
    logits = logits.astype(np.float64)
    target = np.take_along_axis(logits, np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]
    nats = np.log(np.exp(logits).sum(-1)) - target
    np.testing.assert_allclose(plain, nats.mean(), rtol=1e-5)
    np.testing.assert_allclose(weighted, nats[1, 2:5].mean(), rtol=1e-5)
    assert metrics["weight"] == 3


@pytest.mark.matrix
def test_sampler_follows_the_model(params, key):
    """Temperature 0 is greedy; at 1 the first token's frequencies are the softmax."""
    prompt = TOKENS[:1, :4]

    def draw(params):
        greedy = dion.sampler(params, key, prompt, net=NET, length=3, temperature=0.0)
        many = jnp.repeat(prompt, 4000, axis=0)
        drawn = dion.sampler(params, key, many, net=NET, length=1, vocab_size=30)
        whole = jnp.concatenate([prompt, greedy], axis=1)
        return greedy, drawn, MODULE.apply({"params": params}, whole)[0]

    greedy, drawn, logits = together(draw, params)
    # The logits are causal: those of the whole sequence are those of its prefixes.
    np.testing.assert_array_equal(greedy[0], logits[3:-1].argmax(-1))
    odds = np.exp(logits[3, :30])
    expected = odds / odds.sum()
    frequencies = np.bincount(drawn.ravel(), minlength=30) / 4000
    assert frequencies.shape == (30,)
    # Five standard deviations of a frequency over 4000 draws.
    np.testing.assert_allclose(frequencies, expected, atol=5 * np.sqrt(0.25 / 4000))
    assert np.abs(frequencies - 1 / 30).max() > 0.02


def test_sampler_refuses_bad_arguments(params, key):
    for options in ({"length": 0}, {"length": 3, "temperature": -1.0}):
        with pytest.raises(ValueError, match="sampler needs"):
            dion.sampler(params, key, TOKENS, net=NET, **options)
    with pytest.raises(ValueError, match="prompt of one token"):
        dion.sampler(params, key, TOKENS[:, :0], net=NET, length=2)


@pytest.mark.matrix
@pytest.mark.parametrize("preset", ["default", "smoke", "standard", "160m"])
def test_presets_route_every_leaf(preset):
    """Hidden matrices to Dion; embedding, head and norms to AdamW."""
    config = load_config(f"dion:{preset}")
    method = dion.make(config)
    batch = {"tokens": jax.ShapeDtypeStruct((2, 9), jnp.int32)}
    state = jax.eval_shape(method.init, KEY, batch)
    labels = method.labels(state.params)
    flat = jax.tree_util.tree_flatten_with_path(labels)[0]
    found = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in flat}
    matrices = {k for k in found if k.startswith("layers/") and k.endswith("kernel")}
    assert {k for k, v in found.items() if v == "dion"} == matrices
    assert len(matrices) == 7
    if preset == "160m":
        count = sum(x.size for x in jax.tree.leaves(state.params))
        # Width 768, 12 layers, untied 50304-symbol embedding and head.
        assert count == 162_220_800


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "lion", "optim.name must be one of"),
        ("warmup", 0.8, "at most 1 together"),
        ("rank_fraction", 1.5, r"rank_fraction must be in \(0, 1\]"),
        ("mu", -0.1, "mu must be in"),
        ("scalar", "sgd", "scalar must be one of"),
        ("orthogonalize", "svd", "orthogonalize must be one of"),
    ],
)
def test_make_refuses(field, value, message):
    config = load_config("dion:smoke", [f"--config.optim.{field}={value}"])
    batch = {"tokens": jax.ShapeDtypeStruct((2, 9), jnp.int32)}
    with pytest.raises(ValueError, match=message):
        method = dion.make(config)
        jax.eval_shape(method.init, KEY, batch)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"width": 30, "heads": 4}, "net.width must be a multiple of net.heads"),
        ({"layers": 0}, "net.layers must be >= 1, got 0"),
        ({"dtype": "float16"}, "net.dtype must be one of"),
    ],
)
def test_net_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        dion.Net(**fields)


FAMILY = ("dion", "dion2", "muon", "normuon")
SMALL = {
    "data.context": 16, "net.width": 32, "net.heads": 2, "net.layers": 1,
    "optim.scalar_lr": 0.001, "optim.cooldown": 0.0,
}  # fmt: skip


@pytest.mark.matrix
@pytest.mark.parametrize(
    "fields",
    [{"optim.name": "normuon"}]
    + [
        pytest.param(fields, marks=pytest.mark.matrix)
        for fields in (
            {"optim.name": "dion2"},
            {"optim.name": "muon"},
            {"optim.right_factor": "orth", "optim.communication_dtype": "float32"},
        )
    ],
    ids=str,
)
def test_the_family_by_config(fields, key):
    """Three steps on data x model equal those of one device; states keep their place."""
    fields = [f"--config.{k}={v}" for k, v in {**SMALL, **fields}.items()]
    method = dion.make(load_config("dion:smoke", fields))
    tokens = np.random.default_rng(0).integers(0, 256, (3, 8, 17)).astype(np.int32)
    ends = []
    for sizes in ((1, 1), (2, 2)):
        count = sizes[0] * sizes[1]
        mesh = meshes.make_mesh(
            dict(zip(("data", "model"), sizes)), jax.devices()[:count]
        )
        compiled = trainer.compile(method, mesh, {"tokens": tokens[0]})
        state = compiled.init(key)
        start = jax.device_get(state.params)
        for batch in tokens:
            placed = meshes.put_batch({"tokens": batch}, mesh, len(batch))
            state, metrics = compiled.executable(state, placed)
        ends.append((jax.device_get(state.params), float(metrics["loss"])))
        if fields[-1].endswith("normuon") and count > 1:
            rows = [
                leaf.sharding.spec
                for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
                if "row_square" in jax.tree_util.keystr(path)
            ]
            assert any("model" in spec or "data" in spec for spec in rows)
    (params, loss), (other, other_loss) = ends
    assert loss == pytest.approx(other_loss, rel=1e-4)
    # Five Newton-Schulz steps enlarge what rounds to a small singular value 3.4^5 times.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-4), params, other
    )
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), start, params)
    assert min(jax.tree.leaves(moved)) > 2 * 2e-4


@pytest.mark.parametrize("name", [*FAMILY, "adamw", "optax_muon"])
@pytest.mark.slow
def test_learns_the_standard_library(name, tmp_path):
    """300 steps of a small model: far below the order-0 entropy of the same bytes."""
    lr = 0.004 if name == "adamw" else 0.02
    summary = run.run(
        "dion:smoke",
        [
            f"--config.optim.name={name}",
            f"--config.optim.lr={lr}",
            "--config.optim.scalar_lr=0.004",
            "--config.train.steps=300",
            "--config.train.sample=0",
        ],
        workdir=str(tmp_path),
        quiet=True,
    )
    bits = {row["label"]: row["numbers"][0]["bits"] for row in summary.content["rows"]}
    assert bits["this model"] < 0.75 * bits["order0"]


@pytest.mark.matrix
def test_own_network_and_optimizer(key):
    method = dion.make(load_config("dion:smoke"), MODULE, optax.sgd(0.1))
    assert method.labels is None
    state, metrics = together(lambda b: method.update(method.init(key, b), b), BATCH)
    assert state.step == 1 and np.isfinite(metrics["loss"])


@pytest.mark.matrix
def test_another_rank(key):
    """``resize`` between two parts of a run: Q's leading columns stay, M as it is."""
    states = {
        rank: dion.make(
            load_config("dion:smoke", [f"--config.optim.rank_fraction={rank}"]),
            MODULE,
            optim.dion(0.1, rank, weight_dimension_numbers=dion.dimensions),
        ).init
        for rank in (0.25, 0.5)
    }
    target = jax.eval_shape(states[0.5], KEY, BATCH)

    def change(batch):
        state = states[0.25](key, batch)
        return state, dion.resize(state, target)

    before, after = (
        x.opt_state.inner_states["dion"].inner_state[0] for x in together(change, BATCH)
    )
    for old, new, shape in zip(
        *map(jax.tree.leaves, (before.q, after.q, target_q(target)))
    ):
        assert new.shape == shape.shape
        np.testing.assert_allclose(new[..., : old.shape[-1]], old, atol=1e-6)


def target_q(state):
    return state.opt_state.inner_states["dion"].inner_state[0].q


@pytest.fixture
def tiny(tmp_path):
    """Overrides of a run that takes seconds, on a text of its own."""
    corpus = tmp_path / "text.py"
    corpus.write_text("".join(f"x{i} = {i * i % 11}\n" for i in range(2000)))
    fields = {
        "data.path": corpus, "data.context": 16, "data.batch": 8, "data.eval_batch": 8,
        "net.width": 32, "net.heads": 2, "train.sample": 0, "optim.cooldown": 0.0,
    }  # fmt: skip
    return [f"--config.{k}={v}" for k, v in fields.items()]


@pytest.mark.matrix
@pytest.mark.programs(40)  # Two runs of the trainer.
def test_an_adamw_run_goes_on_with_dion(tiny, tmp_path):
    """Dion starts from AdamW's parameters, with a fresh state and its own first step."""
    before, after = tmp_path / "adamw", tmp_path / "dion"
    run.run(
        "dion:smoke",
        [*tiny, "--config.optim.name=adamw", "--config.train.steps=3"],
        workdir=str(before),
        quiet=True,
    )
    start = load_run(str(before))[-1].params
    paper = ["--config.optim.residual=0", "--config.optim.normalize_rows=False"]
    given = [*tiny, "--config.train.steps=1", f"--config.train.init_from={before}"]
    given += paper
    run.run("dion:smoke", given, workdir=str(after), quiet=True)
    end = load_run(str(after))[-1].params
    old, new = (x["layers"]["attention"]["query"]["kernel"] for x in (start, end))
    change = new - (1 - 0.01 * 0.01) * old
    # One update of rank 1/4: orthonormal columns on both sides, scaled by lr.
    singular = np.linalg.svd(np.asarray(change, np.float64), compute_uv=False)
    assert (singular[:, 8:] < 1e-3 * singular[:, :1]).all()
    assert (singular[:, 0] <= 0.01 * np.sqrt(8) * (1 + 1e-4)).all()
    assert (singular[:, 0] > 0.001).all()


@pytest.mark.matrix
@pytest.mark.programs(80)  # Three runs of the trainer, of up to three ranks.
def test_run_with_a_rank_schedule(tiny, tmp_path):
    """A run whose rank changes twice, stopped in between, goes on bitwise."""
    fields = [*tiny, "--config.optim.rank_schedule=2:0.5,5:1.0"]

    def train(folder, steps):
        workdir = str(tmp_path / folder)
        fields_now = [*fields, f"--config.train.steps={steps}"]
        run.run("dion:smoke", fields_now, workdir=workdir, quiet=True)
        return load_run(workdir)[-1].params

    whole = train("whole", 7)
    train("parts", 4)
    parts = train("parts", 7)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
        np.testing.assert_array_equal(a, b)


def scheduled(text, steps=7, preset="smoke"):
    fields = [f"optim.rank_schedule={text}", f"train.steps={steps}"]
    return load_config(f"dion:{preset}", [f"--config.{field}" for field in fields])


def test_rank_schedule():
    parts = dion.rank_schedule(scheduled("2:0.5,5:1.0,9:0.25"))
    assert parts == [(2, 0.25), (5, 0.5), (7, 1.0)]
    assert dion.rank_schedule(scheduled("")) == [(7, 0.25)]


@pytest.mark.parametrize(
    "text, match",
    [
        ("5:0.5,2:0.25", "steps must be >= 1 and rise"),
        ("0:0.5", "steps must be >= 1 and rise"),
        ("half", "must be step:fraction"),
        ("5:1.5", "fractions must be in"),
        ("5:nan", "fractions must be in"),
    ],
)
def test_bad_rank_schedule(text, match):
    with pytest.raises(ValueError, match=match):
        dion.rank_schedule(scheduled(text))


def test_rank_schedule_of_another_optimizer():
    with pytest.raises(ValueError, match="needs optim.name=dion"):
        dion.rank_schedule(scheduled("5:0.5", preset="adamw"))
