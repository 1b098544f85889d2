"""What every trained paper's method promises, on its smoke preset made small.

The cases are the ``CONTRACT`` of tests/papers/test_<name>.py, see tests/contract.py.
"""

import importlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import checkpoint, papers
from jaxpapers import train as trainer
from jaxpapers.study import with_fields
from tests.contract import Case, grid, largest_difference

TRAINED = [name for name, paper in papers.NAMES.items() if paper.trained]
CONTRACTS = {
    name: importlib.import_module(f"tests.papers.test_{name}").CONTRACT
    for name in TRAINED
}
# Stages before the paper's own are gradient descent and averages: ``test_method``.
CASES = [
    pytest.param(f"{name} {stage}", marks=pytest.mark.matrix) if stage else name
    for name, contract in CONTRACTS.items()
    for stage in contract.stages
]
# A step, init and a scorer on two meshes, accumulation, gradients.
pytestmark = pytest.mark.programs(20)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    name, _, stage = request.param.partition(" ")
    contract = CONTRACTS[name]
    return Case(name, stage, contract, tmp_path_factory.mktemp(name))


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
    def bits(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).view(np.uint8) if np.ndim(x) else np.asarray(x)

    chex.assert_trees_all_equal(*(jax.tree.map(bits, x) for x in (a, b)))


def test_init_needs_only_shapes_and_a_step_keeps_them(case):
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.batch(0)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, dict(case.data.shapes))
    with jax.set_mesh(grid("4x2")):
        abstract = jax.eval_shape(case.method.init, jax.random.key(0), shapes)
    state = case.init("4x2")
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)
    assert int(state.step) == 0
    before = types(state)
    assert before == types(case.on("4x2").shapes)
    if case.method.rules:
        shardings = [x.sharding for x in jax.tree.leaves(state.params)]
        assert not all(s.is_fully_replicated for s in shardings)
    state, metrics = case.step(state, "4x2", 0)
    assert types(state) == before
    assert int(state.step) == 1
    assert all(np.isfinite(float(x)) and x.ndim == 0 for x in metrics.values())
    # What only acts takes no step of gradient descent.
    acts = case.data.examples is None
    assert {"loss", *(() if acts else ("grad_norm",))} <= set(metrics)


def test_one_trace_however_many_steps(case):
    case.steps("1x1", 3)
    case.steps("4x2", 3)
    # One for each mesh.
    assert case.traces == 2


def assert_none_is_dead(case, params, moved):
    """Every leaf that is trained has a number that is not zero."""
    labels = case.method.labels(params) if case.method.labels else params
    dead = [
        jax.tree_util.keystr(path)
        for (path, x), label in zip(
            jax.tree_util.tree_leaves_with_path(jax.device_get(moved)),
            jax.tree.leaves(labels),
        )
        if not (isinstance(label, str) and label == "frozen")
        and not np.abs(x).max() > 0
    ]
    assert not dead


def test_every_parameter_moves(case):
    """In steps without weight decay, which would move those that have no gradient."""
    c = case.config.optim
    assert c.name == "sgd" or not c.get("weight_decay", 0.0)
    params = jax.device_get(case.init("1x1").params)
    after = case.steps("1x1", 3)[0].params
    chex.assert_tree_all_finite(after)
    assert_none_is_dead(case, params, jax.tree.map(np.subtract, after, params))


@pytest.mark.matrix
def test_gradient_reaches_every_parameter(case):
    params, grads = case.opened(case.init("1x1").params)
    chex.assert_tree_all_finite(grads)
    assert_none_is_dead(case, params, grads)


@pytest.mark.parametrize(
    "mesh",
    ["4x2", *(pytest.param(m, marks=pytest.mark.matrix) for m in ("8x1", "2x4"))],
)
def test_same_numbers_on_every_mesh(case, mesh):
    expected, values = case.steps("1x1", 3)
    state, sharded = case.steps(mesh, 3)
    np.testing.assert_allclose(sharded, values, rtol=1e-5)
    difference, leaf = largest_difference(expected.params, state.params)
    assert difference < 1e-4, leaf


def test_loss_of_a_batch_falls(case):
    """Twenty steps on one batch, which any model of these sizes can learn."""
    state, values = case.init("1x1"), []
    for _ in range(20):
        state, metrics = case.step(state, "1x1", 0)
        values.append(float(metrics[case.falling]))
    assert np.mean(values[-3:]) < case.contract.falling[1] * values[0], values


def test_resume_is_bitwise_and_works_on_another_mesh(case, tmp_path):
    whole, parts = Record(), Record()
    expected = case.fit("4x2", 4, report=whole)
    case.fit("4x2", 2, tmp_path / "run", report=Record(), save_every=2)
    other = case.fit("1x1", 4, shutil.copytree(tmp_path / "run", tmp_path / "other"))
    state = case.fit("4x2", 4, tmp_path / "run", report=parts)
    assert_bitwise(expected, state)
    assert set(parts.metrics) == {3, 4}
    assert parts.metrics == {k: whole.metrics[k] for k in (3, 4)}
    with checkpoint.open_manager(tmp_path / "run" / "checkpoints") as manager:
        assert manager.latest_step() == 4
        position = checkpoint.restore(manager, case.on("4x2").shapes)[1]
        assert position == 4 * case.size
    difference, leaf = largest_difference(expected.params, other.params)
    assert difference < 1e-4, leaf
    assert types(other) == types(case.on("1x1").shapes)


def test_make_refuses_bad_values(case):
    if case.stage:
        pytest.skip("the values are those of the paper's own stage")
    for field, (value, message) in case.contract.refused.items():
        config = with_fields(case.config, {field: value})
        with pytest.raises((ValueError, TypeError), match=message):
            method = papers.load(case.name).make(config, **case.data.facts)
            jax.eval_shape(method.init, jax.random.key(0), case.data.shapes)


@pytest.mark.matrix
def test_accumulation_agrees_with_the_whole_batch(case):
    if case.data.examples is None:
        pytest.skip("no batch that could be divided")
    if case.contract.noisy:
        pytest.skip("micro-batches draw other noise")
    method = case.make(with_fields(case.config, {"train.accumulate": 2}))
    compiled = trainer.compile(method, grid("1x1"), case.data.shapes)
    state, metrics = case.step(case.init("1x1"), "1x1", 0, compiled)
    case.traces -= 1
    expected, values = case.steps("1x1", 1)
    assert float(metrics[case.falling]) == pytest.approx(values[0], rel=1e-6)
    difference, leaf = largest_difference(expected.params, state.params)
    assert difference < 1e-4, leaf


def measured(case, mesh):
    """The numbers of the case's row before the first step."""
    _, row = case.studied(mesh)
    finding = (row.watch or row.measure)(case.method, case.init(mesh))
    return getattr(finding, "numbers", finding)


def test_row_is_measured_on_a_mesh(case):
    numbers = measured(case, "4x2")
    assert any(k.startswith(case.study.metric) for k in numbers)
    assert all(map(np.isfinite, numbers.values()))


@pytest.mark.matrix
def test_row_is_measured_on_a_mesh_as_on_one_device(case):
    numbers = measured(case, "4x2")
    for name, value in measured(case, "1x1").items():
        assert numbers[name] == pytest.approx(value, rel=1e-4), name


def test_predictions_and_draws(case):
    """Scores need no key; samples are a function of it."""
    method = case.method
    assert method.predict or method.sampler
    if method.predict:
        batch = jax.tree.map(jnp.asarray, case.batch(0))
        state = case.init("1x1")
        scores = jax.jit(method.predict)(state.params, state.extra, batch)
        rows = {len(x) for x in jax.tree.leaves(scores)}
        assert rows == {case.size}
