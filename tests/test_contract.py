"""What every paper's method promises, on its smoke config made small."""

import shutil
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers import checkpoint, papers, run, tasks
from jaxpapers import mesh as meshes
from jaxpapers import train as trainer

CLICK = {
    "data.source": "dien", "data.history": 8, "data.batch": 8, "data.eval_batch": 8,
    "net.item_dim": 4, "net.cate_dim": 4, "net.hidden": (8, 4), "optim.lr": 0.05,
    "train.steps": 20,
}  # fmt: skip
SMALL = {
    "dion": {
        "data.context": 16, "data.batch": 8, "data.eval_batch": 8,
        "net.width": 32, "net.layers": 2, "net.heads": 2,
        "train.steps": 20, "train.sample": 0,
    },
    "din": {**CLICK, "net.unit": (8,)},
    "dien": {
        **CLICK, "net.state": 6, "net.aux_hidden": (6,), "method.aux_weight": 0.1,
    },
    "sim": {**CLICK, "net.unit": (8,), "net.k": 4, "net.short": 4, "net.time_dim": 0},
    "defer": {
        "data.clicks": 2000, "data.batch": 32, "train.steps": 20, "optim.lr": 0.03,
        "net.widths": (8, 4),
    },
    "rocket": {
        **CLICK, "net.unit": (8,), "net.light.hidden": (4,),
        "net.booster.hidden": (8, 4),
    },
    "score_wasserstein": {
        "data.batch": 64, "data.count": 200, "data.eval_count": 64,
        "net.widths": (8, 8), "method.ascend_steps": 0, "method.high": 0.9,
        "optim.lr": 0.02,
    },
    "sft_pg": {
        "data.batch": 32, "data.count": 200, "data.eval_count": 64, "net.model": "mlp",
        "net.width": 16, "net.blocks": 1, "net.critic": (16,), "net.value": (8,),
        "method.n_critic": 2, "method.n_generator": 2, "optim.lr": 1e-3,
        "method.beta_end": 0.9, "pretrain.optim.lr": 0.01,
    },
    "dpok": {
        "data.batch": 40, "data.eval_each": 2, "net.width": 16, "net.blocks": 1,
        "net.value": (16,), "method.steps": 4, "method.timesteps": 40,
        "method.transitions": 2, "method.value_transitions": 2,
        "method.policy_steps": 2, "method.value_steps": 4, "method.lora_rank": 2,
        "method.beta_end": 0.3, "pretrain.optim.lr": 0.02,
    },
}  # fmt: skip
# Stages of a run that are methods of their own.
STAGES = {"sft_pg": "pretrain", "dpok": "pretrain"}
CASES = (*papers.NAMES, *(f"{name} {stage}" for name, stage in STAGES.items()))
# Values that `make` has to refuse, and a word of the message.
BAD = {
    "dion": {
        "net.heads": (5, "multiple of heads"),
        "net.dtype": ("float64", "bfloat16"),
        "optim.name": ("lion", "dion, dion2, muon"),
        "optim.rank_fraction": (1.5, "rank_fraction"),
        "optim.mu": (-0.5, "mu"),
        "optim.orthogonalize": ("lu", "orthogonalize"),
        "optim.scalar": ("sgd", "scalar"),
        "optim.cooldown": (1.5, "shares of the run"),
        "train.accumulate": (0, "train.accumulate"),
    },
    "din": {
        "net.pooling": ("max", "pooling"),
        "net.normalize": ("l1", "normalize"),
        "net.activation": ("gelu", "activation"),
        "net.item_dim": (0, "item_dim"),
        "optim.name": ("lion", "optim.name"),
        "method.mba": (-1.0, "method.mba"),
        "train.accumulate": (0, "train.accumulate"),
    },
    "dien": {
        "net.variant": ("lstm", "variant"),
        "net.attention": ("dot", "attention"),
        "method.aux_reduce": ("sum", "aux_reduce"),
        "train.accumulate": (0, "train.accumulate"),
    },
    "sim": {
        "net.search": ("random", "search"),
        "net.k": (0, "net.k"),
        "train.accumulate": (0, "train.accumulate"),
    },
    "defer": {
        "method.name": ("hope", "method.name"),
        "train.accumulate": (0, "train.accumulate"),
    },
    "score_wasserstein": {
        "method.steps": (0, "method.steps"),
        "method.weight": ("flat", "weight"),
        "net.regularizer": ("l2", "regularizer"),
    },
    "sft_pg": {
        "method.beta_end": (1.5, "betas"),
        "method.steps": (0, "steps"),
        "net.model": ("cnn", "net.model"),
    },
    "dpok": {
        "method.clip": ("soft", "clip"),
        "method.steps": (7, "divide"),
        "net.model": ("cnn", "net.model"),
    },
    "rocket": {
        "net.model": ("mlp", "net.model"),
        "method.lam": (-1.0, "method.lam"),
        "method.hint": ("l1", "mimic"),
        "train.accumulate": (0, "train.accumulate"),
    },
}
# What makes two ways of computing the same comparable to rounding. Statistics of a batch
# make micro-batches another thing than the whole batch, the auxiliary loss is a mean over
# steps and not rows, and Adam makes a step of a gradient that is zero but for rounding
# (the attention unit's first bias, under a softmax).
SGD = {
    "net.activation": "relu", "optim.name": "sgd", "optim.tables": "row_sgd",
    "optim.lr": 0.1,
}  # fmt: skip
PLAIN = {
    "score_wasserstein": {"optim.name": "sgd", "optim.weight_decay": 0.0},
    "din": SGD, "dien": {**SGD, "method.aux_weight": 0.0}, "sim": SGD, "rocket": SGD,
}  # fmt: skip
# Those whose loss draws noise for each row: micro-batches draw other noise.
NOISY = {"score_wasserstein", "sft_pg", "dpok"}
# What falls where the loss is a policy's, whose value says nothing.
FALLING = {"sft_pg": "value_loss", "dpok": "value_loss"}
MESHES = {"1x1": (1, 1), "8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4)}
LINES = "".join(f"def f{i}(x):\n    return x + {i % 7}\n\n\n" for i in range(400))


def grid(name):
    data, model = MESHES[name]
    shape = {"data": data, "model": model}
    return meshes.make_mesh(shape, jax.devices()[: data * model])


class Case(NamedTuple):
    """One paper's method and data, and what was compiled of it."""

    name: str
    config: object
    options: dict
    method: object
    examples: object
    compiled: dict

    def make(self, config):
        return papers.load(self.name).make(config, **self.options)

    def on(self, mesh):
        if mesh not in self.compiled:
            self.compiled[mesh] = trainer.compile(
                self.method, grid(mesh), self.batch(0)
            )
        return self.compiled[mesh]

    def batch(self, index):
        size = self.config.data.batch
        return self.examples.batch(index * size, size)

    def steps(self, mesh, count):
        compiled = self.on(mesh)
        state, losses = compiled.init(jax.random.key(0)), []
        tuning = self.config.get("method", {}).get("stage") == "tune"
        falling = FALLING[self.name] if tuning else "loss"
        for i in range(count):
            placed = meshes.put_batch(self.batch(i), grid(mesh), self.config.data.batch)
            with jax.set_mesh(grid(mesh)):
                state, metrics = compiled.step(state, placed)
            losses.append(float(metrics[falling]))
        return jax.device_get(state), losses

    def fit(self, mesh, steps, workdir=None, **kwargs):
        return trainer.fit(
            self.method, self.examples, steps=steps, batch=self.config.data.batch,
            mesh=grid(mesh), workdir=workdir, **kwargs,
        )  # fmt: skip


def write_data(name, folder):
    """Tiny data for a paper; the path that its config takes."""
    if name == "dion":
        (folder / "text.py").write_text(LINES)
        return folder / "text.py"
    if SMALL[name].get("data.source") == "dien":
        rng = np.random.default_rng(0)
        for split in ("train", "test"):
            lines = []
            for user in range(60):
                # Even users click on even items.
                n = int(rng.integers(1, 12))
                hist = [f"i{2 * k + user % 2}" for k in rng.integers(0, 10, n)]
                for label in (1, 0):
                    item = 2 * int(rng.integers(10)) + (
                        user % 2 if label else 1 - user % 2
                    )
                    cates = "\x02".join(f"c{int(x[1:]) % 4}" for x in hist)
                    lines.append(f"{label}\tu{user}\ti{item}\tc{item % 4}\t"
                                 + "\x02".join(hist) + f"\t{cates}\n")  # fmt: skip
            (folder / f"local_{split}_splitByUser").write_text("".join(lines))
        return folder
    return ""


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    name, _, stage = request.param.partition(" ")
    path = write_data(name, tmp_path_factory.mktemp(name))
    fields = {**SMALL[name], "data.path": path}
    config = run.load_config(
        f"{name}:smoke", [f"--config.{k}={v}" for k, v in fields.items()]
    )
    if stage:
        config = papers.pretraining(name, config)
    config, options = tasks.prepare(config)
    method = papers.load(name).make(config, **options)
    examples = tasks.load(config, method, grid("1x1")).examples
    return Case(name, config, options, method, examples, {})


@pytest.fixture(scope="module")
def plain(case):
    """The paper without what only rounding can tell apart."""
    if case.name not in PLAIN:
        return case
    config = case.config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(PLAIN[case.name])
    method = case.make(config)
    return case._replace(config=config, method=method, compiled={})


class Record:
    """A report that keeps everything."""

    def __init__(self):
        self.metrics = {}

    def start(self, *args):
        pass

    def step(self, step, metrics):
        self.metrics[step] = metrics


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)


def assert_bitwise(a, b):
    chex.assert_trees_all_equal(*(jax.tree.map(_bits, x) for x in (a, b)))


def _bits(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).view(np.uint8) if np.ndim(x) else np.asarray(x)


def relative(a, b):
    norm = np.linalg.norm(np.asarray(a, np.float64))
    return np.linalg.norm(np.asarray(a, np.float64) - b) / max(norm, 1e-6)


def test_init_needs_only_shapes_and_agrees_with_them(case):
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.batch(0)
    )
    abstract = jax.eval_shape(case.method.init, jax.random.key(0), shapes)
    state = case.on("4x2").init(jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)
    assert int(state.step) == 0


def test_step_keeps_shapes_dtypes_and_shardings(case):
    compiled, mesh = case.on("4x2"), grid("4x2")
    state = compiled.init(jax.random.key(0))
    before = types(state)
    assert before == types(compiled.shapes)
    batch = meshes.put_batch(case.batch(0), mesh, case.config.data.batch)
    with jax.set_mesh(mesh):
        state, metrics = compiled.step(state, batch)
    assert types(state) == before
    assert int(state.step) == 1
    assert all(np.isfinite(float(x)) and x.ndim == 0 for x in metrics.values())
    assert {"loss", "grad_norm"} <= set(metrics)
    if case.method.rules:
        shardings = [x.sharding for x in jax.tree.leaves(state.params)]
        assert not all(s.is_fully_replicated for s in shardings)


def test_one_trace_per_step(case):
    count = 0

    def update(state, batch):
        nonlocal count
        count += 1
        return case.method.update(state, batch)

    counted = case._replace(method=case.method._replace(update=update), compiled={})
    assert int(counted.steps("1x1", 3)[0].step) == 3
    assert count == 1


def test_gradient_reaches_every_parameter(case):
    """Zero-initialised projections hide those below, so they are drawn here."""
    config = case.config.copy_and_resolve_references().unlock()
    if "init_residual" in config.get("net", {}):
        config.net.init_residual = "scaled"
    method = case.make(config)
    batch = jax.tree.map(jnp.asarray, case.batch(0))
    state = jax.jit(method.init)(jax.random.key(0), batch)
    grad = jax.jit(jax.grad(method.loss, has_aux=True))
    key = jax.random.key(1)
    params = state.params
    # What starts at zero (a head, adapters) stops the gradient of what is below it, one
    # after the other: plain steps open them.
    for _ in range(4):
        found, _ = grad(params, batch, key)
        chex.assert_tree_all_finite(found)
        # Bounded: a policy's gradient is as large as its chain is narrow.
        size = 0.1 / jnp.maximum(1.0, optax.tree.norm(found))
        params = jax.tree.map(lambda p, g, size=size: p - size * g, params, found)
    paths = jax.tree_util.tree_flatten_with_path(found)[0]
    labels = method.labels(params) if method.labels else params
    frozen = [x == "frozen" for x in jax.tree.leaves(labels)] if method.labels else []
    moving = [x for x, still in zip(paths, frozen or [False] * len(paths)) if not still]
    dead = [jax.tree_util.keystr(k) for k, g in moving if not jnp.abs(g).max() > 0]
    assert not dead


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x4"])
def test_same_numbers_on_every_mesh(plain, mesh):
    expected, losses = plain.steps("1x1", 3)
    state, found = plain.steps(mesh, 3)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    differences = jax.tree.map(relative, expected.params, state.params)
    assert max(jax.tree.leaves(differences)) < 1e-4, differences


def test_loss_falls(case):
    _, losses = case.steps("1x1", 20)
    # A denoiser's loss starts at 1, and what noise can be told falls far less.
    share = 0.9 if case.name in NOISY else 0.8
    assert np.mean(losses[-3:]) < share * losses[0], losses


def test_resume_is_bitwise_and_works_on_another_mesh(case, tmp_path):
    whole, parts = Record(), Record()
    expected = case.fit("4x2", 4, report=whole)
    case.fit("4x2", 2, tmp_path / "run", report=Record(), save_every=2)
    other = case.fit("2x4", 3, shutil.copytree(tmp_path / "run", tmp_path / "other"))
    state = case.fit("4x2", 4, tmp_path / "run", report=parts)
    assert_bitwise(expected, state)
    assert set(parts.metrics) == {3, 4}
    assert parts.metrics == {k: whole.metrics[k] for k in (3, 4)}
    with checkpoint.open_manager(tmp_path / "run" / "checkpoints") as manager:
        assert manager.latest_step() == 4
        position = checkpoint.restore(manager, case.on("4x2").shapes)[1]
        assert position == 4 * case.config.data.batch

    three, _ = case.steps("4x2", 3)
    differences = jax.tree.map(relative, three.params, jax.device_get(other.params))
    assert max(jax.tree.leaves(differences)) < 1e-4, differences
    assert types(other) == types(case.on("2x4").shapes)


def test_make_refuses_bad_values(case):
    def attempt(config):
        method = case.make(config)
        jax.eval_shape(method.init, jax.random.key(0), case.batch(0))

    for field, (value, message) in BAD[case.name].items():
        config = case.config.copy_and_resolve_references().unlock()
        config.update_from_flattened_dict({field: value})
        with pytest.raises((ValueError, TypeError), match=message):
            attempt(config)


def test_accumulation_agrees_with_the_whole_batch(plain):
    if plain.name in NOISY:
        pytest.skip("micro-batches draw other noise")
    config = plain.config.copy_and_resolve_references().unlock()
    config.train.accumulate = 2
    method = plain.make(config)
    compiled = trainer.compile(method, grid("1x1"), plain.batch(0))
    batch = meshes.put_batch(plain.batch(0), grid("1x1"), config.data.batch)
    with jax.set_mesh(grid("1x1")):
        state, metrics = compiled.step(compiled.init(jax.random.key(0)), batch)
    expected, losses = plain.steps("1x1", 1)
    assert float(metrics["loss"]) == pytest.approx(losses[0], rel=1e-6)
    differences = jax.tree.map(relative, expected.params, jax.device_get(state.params))
    assert max(jax.tree.leaves(differences)) < 1e-4, differences


def test_evaluation_and_baselines(case):
    """A trained state is evaluated by the task, on a mesh as on one device."""
    numbers = []
    for mesh in ("1x1", "4x2"):
        task = tasks.load(case.config, case.method, grid(mesh))
        state = case.on(mesh).init(jax.random.key(0))
        numbers.append(task.evaluate(state, quick=True))
    assert any(k.startswith(f"validation_{task.metric}") for k in numbers[0])
    for name, value in numbers[0].items():
        assert np.isfinite(value)
        assert numbers[1][name] == pytest.approx(value, rel=1e-4), name


@pytest.fixture(scope="module")
def trained(case):
    return jax.tree.map(jnp.asarray, case.steps("1x1", 20)[0].params)


def test_dion_sampler(case, trained):
    if case.name != "dion":
        pytest.skip("samplers have signatures of their own")
    prompt = jnp.asarray(case.batch(0)["tokens"][:3, :5])
    sample = jax.jit(
        lambda key, temperature=1.0: case.method.sampler(
            trained, key, prompt, length=7, temperature=temperature, vocab_size=256
        ),
        static_argnums=1,
    )
    first = sample(jax.random.key(0))
    chex.assert_shape(first, (3, 7))
    assert first.dtype == jnp.int32 and int(first.max()) < 256
    np.testing.assert_array_equal(first, sample(jax.random.key(0)))
    assert (first != sample(jax.random.key(1))).any()
    greedy = np.asarray(sample(jax.random.key(0), 0.0))
    np.testing.assert_array_equal(greedy, sample(jax.random.key(1), 0.0))

    # The cache's choice at every position is that of the full forward pass.
    net = papers.load("dion").network(case.config)
    tokens = jnp.concatenate([prompt, greedy], 1)
    logits = net.apply({"params": trained}, tokens)[:, 4:-1, :256]
    np.testing.assert_array_equal(logits.argmax(-1), greedy)


@pytest.mark.parametrize(
    "change", [{"length": 0}, {"temperature": -1.0}, {"prompt": jnp.zeros((1, 0), int)}]
)
def test_dion_sampler_refuses(case, trained, change):
    if case.name != "dion":
        pytest.skip("samplers have signatures of their own")
    options = {"prompt": jnp.zeros((1, 2), int), "length": 1, **change}
    with pytest.raises(ValueError, match="sampler needs"):
        case.method.sampler(trained, jax.random.key(0), **options)
