"""What every trained paper promises: the case that a paper's test file describes.

    CONTRACT = Contract(small={"data.batch": 8, ...}, refused={"net.width": (0, "width")})

``tests/test_contract.py`` builds the method of the smoke preset with these fields, once,
and at most ten programs of it, which its tests share.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpapers import mesh as meshes
from jaxpapers import papers, run, tasks
from jaxpapers import train as trainer
from jaxpapers.method import Method, State
from jaxpapers.stages import same

MESHES = {"1x1": (1, 1), "8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4)}


class Contract(NamedTuple):
    """One paper's case.

    Attributes:
      small: fields that make the smoke preset a matter of seconds, and two ways of
        computing the same step comparable to rounding: plain SGD, no statistics of the
        batch. (Adam makes a step of a gradient that is zero but for rounding.)
      refused: field -> value that ``make`` refuses, and a word of the message.
      data: folder -> ``data.path``, after writing tiny data there; None: no files.
      noisy: the loss draws noise for every row, so that micro-batches draw other noise.
      falling: metric of the paper's own stage that falls in 20 steps on one batch, and
        to which share of its first value.
      stages: "" for the paper's own stage, "before" for the one that it starts from.
      batch: config -> a batch for ``Method.loss`` where the environment lives in the
        state, so that the steps' batches are empty.
    """

    small: Mapping[str, Any]
    refused: Mapping[str, tuple[Any, str]] = {}
    data: Callable[[Path], Any] | None = None
    noisy: bool = False
    falling: tuple[str, float] = ("loss", 0.8)
    stages: tuple[str, ...] = ("",)
    batch: Callable[[Any], dict] | None = None


class Case:
    """A method of a paper, its data, and the programs that were compiled of it."""

    def __init__(self, name: str, stage: str, contract: Contract, folder: Path):
        self.name, self.stage, self.contract = name, stage, contract
        files = {"data.path": contract.data(folder)} if contract.data else {}
        fields = {**contract.small, **files}
        arguments = [f"--config.{k}={v}" for k, v in fields.items()]
        own = run.load_config(f"{name}:smoke", arguments)
        self.own = own
        self.study, row = self.studied("1x1")
        self.config = row.stage.config
        self.data = tasks.read(self.config)
        self.traces = 0
        self.falling = contract.falling[0] if not stage else "loss"
        self.method = self.make(self.config)
        self._programs: dict[Any, Any] = {}

    def studied(self, mesh: str) -> tuple[Any, Any]:
        """A study and the row in it of the case's stage, measured on a mesh."""

        def of(config):
            return tasks.study(self.name, config, tasks.read(config), grid(mesh))

        study = of(self.own)
        first, *others = study.rows(0)
        if not self.stage:
            return study, first
        before = first.stage.after
        for row in others:
            if row.stage and same(row.stage, before):
                return study, row
        # No row of the same study: it is one of its own.
        study = of(before.config)
        return study, study.rows(0)[0]

    def make(self, config: Any) -> Method:
        method = papers.load(self.name).make(config, **self.data.facts)

        def update(state, batch):
            self.traces += 1
            return method.update(state, batch)

        return method._replace(update=update)

    def on(self, mesh: str) -> trainer.Compiled:
        """Init and step on a mesh."""
        return self.program(
            mesh,
            lambda: trainer.compile(self.method, grid(mesh), self.data.shapes),
        )

    def program(self, key: Any, build: Callable) -> Any:
        """What ``build`` gives, built once."""
        if key not in self._programs:
            self._programs[key] = build()
        return self._programs[key]

    @functools.cached_property
    def examples(self) -> Any:
        """Batches; where the state chooses them, those of a run's first steps."""
        given = self.data.examples
        if not callable(given):
            return given
        with jax.set_mesh(grid("4x2")):
            state = self.init("4x2")
            return given(self.data.refresh[1](state) if self.data.refresh else state)

    @property
    def size(self) -> int:
        """Rows of a batch; 1 where the environment lives in the state."""
        return self.config.data.get("batch", 1)

    def batch(self, index: int) -> dict:
        """The batch of a step; {} where the environment lives in the state."""
        if self.data.examples is None:
            return {}
        return self.examples.batch(index * self.size, self.size)

    def init(self, mesh: str) -> State:
        """The first state, drawn by the program of 4x2 and laid out on any mesh."""
        state = self.on("4x2").init(jax.random.key(0))
        if mesh == "4x2":
            return state
        return jax.tree.map(
            lambda x, s: jax.device_put(x, s.sharding), state, self.on(mesh).shapes
        )

    def step(self, state: State, mesh: str, index: int, compiled: Any = None):
        """(state, metrics) after the step of batch ``index``."""
        placed = meshes.put_batch(self.batch(index), grid(mesh), self.size)
        with jax.set_mesh(grid(mesh)):
            return (compiled or self.on(mesh)).step(state, placed)

    def steps(self, mesh: str, count: int) -> tuple[State, list[float]]:
        """The state and the falling metric of a run's first steps; run once."""

        def build():
            state, values = self.init(mesh), []
            for i in range(count):
                state, metrics = self.step(state, mesh, i)
                values.append(float(metrics[self.falling]))
            return jax.device_get(state), values

        return self.program((mesh, count), build)

    def fit(self, mesh: str, steps: int, workdir: Any = None, **kwargs: Any) -> State:
        return trainer.fit(
            self.method,
            self.data.examples,
            compiled=self.on(mesh),
            refresh=self.data.refresh,
            steps=steps,
            batch=self.size,
            mesh=grid(mesh),
            workdir=workdir,
            **kwargs,
        )

    def opened(self, params: Any, steps: int = 4) -> tuple[Any, Any]:
        """Params after a few plain steps, and their gradient, in one program.

        What starts at zero (a head, adapters) stops the gradient of what is below it, one
        after the other: the steps open them. Their length is bounded, since a policy's
        gradient is as large as its schedule is narrow.
        """
        given = self.contract.batch
        batch = given(self.config) if given else self.batch(0)
        batch = jax.tree.map(jnp.asarray, batch)
        grad = jax.grad(self.method.loss, has_aux=True)

        @jax.jit
        def descend(params):
            def body(carry, _):
                params, g = carry
                size = 0.1 / jnp.maximum(1.0, optax.tree.norm(g))
                params = jax.tree.map(lambda p, g: p - size * g, params, g)
                return (params, grad(params, batch, jax.random.key(1))[0]), None

            start = (params, jax.tree.map(jnp.zeros_like, params))
            return jax.lax.scan(body, start, None, steps + 1)[0]

        return descend(params)


@functools.cache
def grid(name: str) -> jax.sharding.Mesh:
    """Mesh "4x2" of data and model over the first fake devices."""
    data, model = MESHES[name]
    shape = {"data": data, "model": model}
    return meshes.make_mesh(shape, jax.devices()[: data * model])


def relative(a: Any, b: Any) -> float:
    """Norm of the difference by the norm of the first."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-6))


def largest_difference(a: Any, b: Any) -> tuple[float, str]:
    """The leaf that differs most between two trees, by ``relative``."""
    names = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(a)
    ]
    values = map(relative, jax.tree.leaves(a), jax.tree.leaves(jax.device_get(b)))
    return max(zip(values, names))


def write_clicks(folder: Path) -> Path:
    """A log in DIEN's text form, where even users click on even items."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        lines = []
        for user in range(60):
            count = int(rng.integers(1, 12))
            history = [f"i{2 * k + user % 2}" for k in rng.integers(0, 10, count)]
            for label in (1, 0):
                parity = user % 2 if label else 1 - user % 2
                item = 2 * int(rng.integers(10)) + parity
                categories = "\x02".join(f"c{int(x[1:]) % 4}" for x in history)
                items = "\x02".join(history)
                lines.append(
                    f"{label}\tu{user}\ti{item}\tc{item % 4}\t{items}\t{categories}\n"
                )
        (folder / f"local_{split}_splitByUser").write_text("".join(lines))
    return folder


CLICK = {
    "data.source": "dien", "data.history": 8, "data.batch": 8, "data.eval_batch": 8,
    "net.item_dim": 4, "net.cate_dim": 4, "net.hidden": (8, 4), "train.steps": 20,
    "net.activation": "relu", "optim.name": "sgd", "optim.tables": "row_sgd",
    "optim.lr": 0.3, "net.std": 1.0,
}  # fmt: skip
"""Fields of a click model's case."""
