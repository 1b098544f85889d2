"""The language model's loss, sampler, schedule and presets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers import checkpoint, run
from jaxpapers import mesh as meshes
from jaxpapers import train as trainer
from jaxpapers.nets.transformer import Transformer
from jaxpapers.papers import dion
from tests.contract import Contract

LINES = "".join(f"def f{i}(x):\n    return x + {i % 7}\n\n\n" for i in range(400))


def write_text(folder):
    (folder / "text.py").write_text(LINES)
    return folder / "text.py"


CONTRACT = Contract(
    small={
        "data.context": 16, "data.batch": 8, "data.eval_batch": 8, "net.width": 32,
        "net.layers": 2, "net.heads": 2, "net.init_residual": "scaled",
        "train.steps": 20, "train.sample": 0,
    },
    data=write_text,
    refused={
        "net.heads": (5, "multiple of heads"),
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

NET = Transformer(40, 32, 1, 2)
TOKENS = jax.random.randint(jax.random.key(0), (3, 9), 0, 40)


@pytest.fixture(scope="module")
def params():
    params = NET.init(jax.random.key(0), TOKENS)["params"]
    noise = jax.random.normal(jax.random.key(2), params["head"]["kernel"].shape)
    params["head"]["kernel"] = 0.3 * noise
    return params


def test_loss_of_uniform_logits_is_log_of_the_vocabulary(key):
    def apply(variables, tokens):
        return jnp.zeros((*tokens.shape, 40))

    value, metrics = dion.loss({}, {"tokens": TOKENS}, key, apply=apply)
    assert float(value) == pytest.approx(np.log(40), rel=1e-6)
    assert float(metrics["bits"]) == pytest.approx(np.log2(40), rel=1e-6)


def test_weighted_loss_is_the_mean_over_the_weighted_targets(params, key):
    weight = jnp.zeros((3, 8)).at[1, 2:5].set(1.0)
    value, metrics = dion.loss(
        params, {"tokens": TOKENS, "weight": weight}, key, apply=NET.apply
    )
    logits = np.asarray(NET.apply({"params": params}, TOKENS[:, :-1]), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nats = (
        log_z - np.take_along_axis(logits, np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]
    )
    assert float(value) == pytest.approx(nats[1, 2:5].mean(), rel=1e-5)
    assert float(metrics["weight"]) == 3.0


def test_sampler_follows_the_model(params, key):
    """Temperature 0 is greedy; at 1 the first token's frequencies are the softmax."""
    prompt = TOKENS[:1, :4]
    greedy = dion.sampler(params, key, prompt, net=NET, length=3, temperature=0.0)
    tokens = prompt
    for _ in range(3):
        logits = NET.apply({"params": params}, tokens)[:, -1]
        tokens = jnp.concatenate([tokens, logits.argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(greedy, tokens[:, 4:])

    many = jnp.repeat(prompt, 4000, axis=0)
    drawn = dion.sampler(params, key, many, net=NET, length=1, vocab_size=30)
    expected = jax.nn.softmax(NET.apply({"params": params}, prompt)[0, -1, :30])
    found = np.bincount(np.asarray(drawn).ravel(), minlength=30) / 4000
    assert found.shape == (30,)
    # Five standard deviations of a frequency over 4000 draws.
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / 4000))
    assert np.abs(found - 1 / 30).max() > 0.02


def test_sampler_refuses_bad_arguments(params, key):
    for options in ({"length": 0}, {"length": 3, "temperature": -1.0}):
        with pytest.raises(ValueError, match="sampler needs"):
            dion.sampler(params, key, TOKENS, net=NET, **options)
    with pytest.raises(ValueError, match="prompt of one token"):
        dion.sampler(params, key, TOKENS[:, :0], net=NET, length=2)


@pytest.mark.parametrize("preset", ["default", "smoke", "standard", "160m"])
def test_presets_route_every_leaf(preset):
    """Hidden matrices to Dion; embedding, head and norms to AdamW."""
    config = run.load_config(f"dion:{preset}")
    method = dion.make(config)
    batch = {"tokens": jax.ShapeDtypeStruct((2, 9), jnp.int32)}
    state = jax.eval_shape(method.init, jax.random.key(0), batch)
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
        ("name", "lion", "dion, dion2, muon"),
        ("warmup", 0.8, "at most 1 together"),
        ("rank_fraction", 1.5, r"rank_fraction must be in \(0, 1\]"),
        ("mu", -0.1, "mu must be in"),
        ("scalar", "sgd", "scalar must be one of"),
        ("orthogonalize", "svd", "orthogonalize must be one of"),
    ],
)
def test_make_refuses(field, value, message):
    config = run.load_config("dion:smoke", [f"--config.optim.{field}={value}"])
    batch = {"tokens": jax.ShapeDtypeStruct((2, 9), jnp.int32)}
    with pytest.raises(ValueError, match=message):
        method = dion.make(config)
        jax.eval_shape(method.init, jax.random.key(0), batch)


FAMILY = ("dion", "dion2", "muon", "normuon")
SMALL = {
    "data.context": 16, "net.width": 32, "net.heads": 2, "net.layers": 2,
    "optim.scalar_lr": 0.001, "optim.cooldown": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [{"optim.name": name} for name in FAMILY[1:]]
    + [{"optim.right_factor": "orth", "optim.communication_dtype": "float32"}],
    ids=str,
)
def test_the_family_by_config(fields, key):
    """Three steps on data x model equal those of one device; states keep their place."""
    fields = [f"--config.{k}={v}" for k, v in {**SMALL, **fields}.items()]
    method = dion.make(run.load_config("dion:smoke", fields))
    tokens = np.asarray(jax.random.randint(key, (3, 8, 17), 0, 256))
    ends = []
    for sizes in ((1, 1), (2, 2)):
        count = sizes[0] * sizes[1]
        mesh = meshes.make_mesh(
            dict(zip(("data", "model"), sizes)), jax.devices()[:count]
        )
        compiled = trainer.compile(method, mesh, {"tokens": tokens[0]})
        state = compiled.init(key)
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
    start = method.init(key, {"tokens": tokens[0]}).params
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), start, params)
    assert min(jax.tree.leaves(moved)) > 2 * 2e-4


@pytest.mark.parametrize("name", [*FAMILY, "adamw", "optax_muon"])
@pytest.mark.slow
def test_learns_the_standard_library(name, tmp_path):
    """300 steps of a small model: far below the order-0 entropy of the same bytes."""
    lr = 0.004 if name == "adamw" else 0.02
    result = run.train(
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
    assert result["validation_bits"] < 0.75 * result["order0"]


def test_own_network_and_optimizer():
    config = run.load_config("dion:smoke")
    method = dion.make(config, NET, optax.sgd(0.1))
    assert method.labels is None
    state = method.init(jax.random.key(0), {"tokens": TOKENS})
    state, metrics = jax.jit(method.update)(state, {"tokens": TOKENS})
    assert int(state.step) == 1 and np.isfinite(float(metrics["loss"]))


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


def test_an_adamw_run_goes_on_with_dion(tiny, tmp_path):
    """Dion starts from AdamW's parameters, with a fresh state and its own first step."""
    before, after = tmp_path / "adamw", tmp_path / "dion"
    run.train(
        "dion:smoke",
        [*tiny, "--config.optim.name=adamw", "--config.train.steps=3"],
        workdir=str(before),
        quiet=True,
    )
    start = run.load_run(str(before))[-1].params
    given = [*tiny, "--config.train.steps=1", f"--config.train.init_from={before}"]
    run.train("dion:smoke", given, workdir=str(after), quiet=True)
    end = run.load_run(str(after))[-1].params
    old, new = (x["layers"]["attention"]["query"]["kernel"] for x in (start, end))
    change = new - (1 - 0.01 * 0.01) * old
    # One update of rank 1/4: orthonormal columns on both sides, scaled by lr.
    singular = np.linalg.svd(np.asarray(change, np.float64), compute_uv=False)
    assert (singular[:, 8:] < 1e-3 * singular[:, :1]).all()
    assert (singular[:, 0] <= 0.01 * np.sqrt(8) * (1 + 1e-4)).all()
    assert (singular[:, 0] > 0.001).all()


def test_rank_schedule(tiny, tmp_path):
    """A run whose rank changes twice, stopped in between, goes on bitwise."""
    fields = [*tiny, "--config.optim.rank_schedule=2:0.5,5:1.0"]

    def train(folder, steps):
        workdir = str(tmp_path / folder)
        fields_now = [*fields, f"--config.train.steps={steps}"]
        run.train("dion:smoke", fields_now, workdir=workdir, quiet=True)
        with checkpoint.open_manager(f"{workdir}/checkpoints", read_only=True) as m:
            forms = checkpoint._stored_forms(m, m.latest_step())
            ranks = {v[0][-1] for k, v in forms.items() if "/q/layers/attention" in k}
        return run.load_run(workdir)[-1].params, ranks

    whole, ranks = train("whole", 7)
    assert ranks == {32}
    _, ranks = train("parts", 4)
    assert ranks == {16}
    parts, ranks = train("parts", 7)
    assert ranks == {32}
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
        np.testing.assert_array_equal(a, b)
    constant = dion.phases(run.load_config("dion:smoke"))
    assert [last for last, _ in constant] == [100]


@pytest.mark.parametrize(
    "field, match",
    [
        ("optim.rank_schedule=5:0.5,2:0.25", "steps must be >= 1 and rise"),
        ("optim.rank_schedule=0:0.5", "steps must be >= 1 and rise"),
        ("optim.rank_schedule=half", "must be step:fraction"),
        ("optim.rank_schedule=5:1.5", "fractions must be in"),
        ("optim.rank_schedule=5:nan", "fractions must be in"),
    ],
)
def test_bad_rank_schedule(field, match):
    config = run.load_config("dion:smoke", [f"--config.{field}"])
    with pytest.raises(ValueError, match=match):
        dion.phases(config)
    config = run.load_config("dion:adamw", ["--config.optim.rank_schedule=5:0.5"])
    with pytest.raises(ValueError, match="needs optim.name=dion"):
        dion.phases(config)
