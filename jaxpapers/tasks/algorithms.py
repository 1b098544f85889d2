"""Algorithmic problems: trained on short ones, measured on long ones.

Full-output prediction in a loop, beside the same without the input's injection and beside
models of the next token: a deep one, one with pauses, and a block that is looped a fixed
number of times.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import figures
from jaxpapers import mesh as meshes
from jaxpapers.method import State
from jaxpapers.ops import algorithmic
from jaxpapers.papers import looped_transformer as looped
from jaxpapers.study import Data, Finding, Row, Stage, Study, Table, with_fields

STOPS = ("oracle", "sample", "batch", "fixed point")
SOLVED = 0.985  # Exact match at which a curriculum by accuracy goes on.
CHOICES = {"rule": ("accuracy", "interval"), "layout": ("full", "next")}
# Test lengths, as shares of the largest training length.
SHARES = (0.2, 0.4, 0.6, 0.8, 1, 1.2, 1.5, 2, 2.5, 3, 4)


class Problems:
    """An unlimited stream of batches; lengths are uniform from 1 to the largest.

    Args:
      c: config group ``data``.
      most: largest length that is drawn; sequences are padded to ``c.length``.
    """

    def __init__(self, c: Any, most: int):
        self.c, self.most = c, most

    def batch(self, start: int, size: int, rows: slice | None = None) -> dict:
        """Problems ``start`` .. ``start + size - 1`` of the stream."""
        c = self.c
        rng = np.random.default_rng([c.seed, start])
        several = size if c.mixed else 1
        drawn = np.stack(
            [
                rng.integers(1, self.most + 1, several),
                rng.integers(1, _operand(c) + 1, several),
            ],
            1,
        )
        key = jax.random.fold_in(jax.random.key(c.seed), start)
        length = sequence_length(c, c.length)
        # Problems of each length that occurs, of which every row takes one.
        unique, index = np.unique(drawn, axis=0, return_inverse=True)
        every = [draw(c, key, int(n), int(m), size, length) for n, m in unique]
        index = np.broadcast_to(index.reshape(-1), (size,))
        return {
            name: np.stack([x[name] for x in every])[index, np.arange(size)][
                rows or slice(None)
            ]
            for name in every[0]
        }


def draw(c: Any, key: jax.Array, n: int, first: int, count: int, length: int) -> dict:
    """Problems of one length in the model's layout, on the host."""
    generate = _generator(
        c.problem, n, first, count, c.alphabet, c.layout, c.pauses, length
    )
    return jax.device_get(generate(key))


@functools.lru_cache(maxsize=512)
def _generator(problem, n, first, count, alphabet, layout, pauses, length):
    pause = algorithmic.vocabulary(problem, alphabet)

    @jax.jit
    def generate(key):
        drawn = algorithmic.draw(problem, key, n, count, first=first, alphabet=alphabet)
        return algorithmic.lay_out(
            drawn, layout, pauses=pauses, pause=pause, length=length
        )

    return generate


def sequence_length(c: Any, n: int) -> int:
    """L of the longest problem of length n, pauses included."""
    return algorithmic.sequence_length(c.problem, n, _operand(c)) + c.pauses


def _operand(c) -> int:
    """Largest length of the first operand, where there is one of its own."""
    return c.operand if c.problem == "multi" else 1


def abstract(config: Any) -> Data:
    """Shapes of a global training batch, and the facts of the problem."""
    c = config.data
    whole = (c.batch, sequence_length(c, c.length))
    shapes = {
        "tokens": jax.ShapeDtypeStruct(whole, jnp.int32),
        "targets": jax.ShapeDtypeStruct(whole, jnp.int32),
        "weights": jax.ShapeDtypeStruct(whole, jnp.float32),
        "n_steps": jax.ShapeDtypeStruct((c.batch,), jnp.int32),
    }
    count = min(c.buckets, c.length)
    largest = [-(-c.length * (i + 1) // count) for i in range(count)]
    buckets = [
        (algorithmic.n_steps(c.problem, n, _operand(c)), sequence_length(c, n))
        for n in largest
    ]
    size = algorithmic.vocabulary(c.problem, c.alphabet) + 1  # And the pause.
    facts = {
        "vocab_size": -(-size // 8) * 8,
        "buckets": tuple(buckets),
        "start_length": c.first if c.rule == "accuracy" else 0,
    }
    return Data(None, shapes, facts, unit="problems")


def read(config: Any) -> Data:
    """The stream of a training run, and its curriculum.

    Raises:
      ValueError: an unknown problem, rule or layout, or lengths that do not rise.
    """
    c = config.data
    algorithmic.check(c.problem, c.length, _operand(c))
    if c.path:
        raise ValueError(f"data.path: problems are drawn, not read; got {c.path!r}")
    for name, known in CHOICES.items():
        if c[name] not in known:
            raise ValueError(f"data.{name} must be one of {known}, got {c[name]!r}")
    least = {"interval": 0, "pauses": 0, "buckets": 1, "extra_loops": 0, "alphabet": 1,
             "tolerance": 0}  # fmt: skip
    for name, low in least.items():
        if c[name] < low:
            raise ValueError(f"data.{name} must be >= {low}, got {c[name]}")
    if c.pauses and c.layout != "next":
        raise ValueError(
            f"data.pauses={c.pauses} needs data.layout=next: an answer that is predicted "
            "at once has none before it"
        )
    if min(c.lengths, default=1) < 1:
        raise ValueError(f"data.lengths must be >= 1, got {tuple(c.lengths)}")
    if not 1 <= c.first <= c.length:
        raise ValueError(
            f"data.first must be in 1 to data.length={c.length}, got {c.first}"
        )
    data = abstract(config)._replace(
        examples=Problems(c, c.length),
        summary=f"{c.problem}, trained on lengths 1 to {c.length}",
    )
    if c.rule != "accuracy":
        return data
    return data._replace(
        examples=lambda state: Problems(c, int(state.extra["length"])),
        refresh=(
            max(c.interval, 1),
            functools.partial(
                _grow, c, looped.net_of(config, data.facts["vocab_size"])
            ),
        ),
    )


def _grow(c: Any, net: looped.Net, state: State) -> State:
    """The state with a longer curriculum, if its largest length is solved."""
    n = int(state.extra["length"])
    if n >= c.length:
        return state
    key = jax.random.fold_in(jax.random.key(c.seed + 1), int(state.step))
    batch = draw(c, key, n, _operand(c), 512, 0)
    steps = algorithmic.n_steps(c.problem, n, _operand(c))
    solved = float(_accuracy(net, steps)(state.params, batch)) > SOLVED
    return state._replace(extra={"length": jnp.int32(n + solved)})


@functools.lru_cache(maxsize=64)
def _accuracy(net: looped.Net, steps: int):
    @jax.jit
    def accuracy(params, batch):
        logits = looped.forward(params, batch["tokens"], steps, net=net)
        return looped.exact_match(logits, batch["targets"], batch["weights"]).mean()

    return accuracy


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The looped model and its baselines: exact match by length and stopping rule."""
    c = config.data
    meshes.batch_rows(mesh, c.eval_batch, name="data.eval_batch")

    def rows(seed):
        variants = baselines(config) if c.baselines else {}
        made = []
        for label, fields in {"looped": {}, **variants}.items():
            own = with_fields(config, {**fields, "train.seed": seed}).unlock()
            del own["baselines"]
            own = own.lock()
            net = looped.net_of(own, data.facts["vocab_size"])
            measure = functools.partial(_measure, own, net, mesh)
            watch = functools.partial(_watch, own.data, net, mesh)
            made.append(Row(label, _stages(name, own), measure, watch=watch))
        return made

    far = 2 * c.length
    return Study(
        title=f"{c.problem}, exact match at length {far}, trained to {c.length}",
        metric=f"length_{far}",
        rising=True,
        rows=rows,
        columns=(
            f"length_{c.length}",
            *(f"length_{far}_{stop}" for stop in STOPS[1:]),
            f"length_{4 * c.length}",
            "trained_to",
        ),
        pictures={
            "lengths.png": functools.partial(figures.by_length, trained=c.length),
            "steps.png": figures.by_step,
        },
        states=("lengths.png", "steps.png"),
    )


def baselines(config: Any) -> dict[str, dict[str, Any]]:
    """Rows beside the paper's own: label -> fields of the config."""
    b, c = config.baselines, config.data
    for name, low in {"depth": 1, "pauses": 0}.items():
        if b[name] < low:
            raise ValueError(f"baselines.{name} must be >= {low}, got {b[name]}")
    deep = {"data.layout": "next", "net.loops": 1, "net.layers": b.depth}
    steps = algorithmic.n_steps(c.problem, c.length, _operand(c))
    every = {
        "without injection": {"net.inject": "none"},
        "NTP": deep,
        "NTP-pause": {**deep, "data.pauses": b.pauses},
        "NTP-loop": {"data.layout": "next", "net.loops": steps},
    }
    unknown = sorted(set(b.rows) - set(every))
    if unknown:
        raise ValueError(
            f"baselines.rows must be among {tuple(every)}, got {tuple(unknown)}"
        )
    return {label: every[label] for label in b.rows}


def lengths_of(trained: int, chosen: Sequence[int] = ()) -> list[int]:
    """Lengths to measure: those chosen, or shares of the largest training length.

    The training length, its double and its fourfold are among them.

    Example:
      >>> lengths_of(10)
      [2, 4, 6, 8, 10, 12, 15, 20, 25, 30, 40]
    """
    chosen = chosen or [max(round(share * trained), 1) for share in SHARES]
    return sorted({*chosen, trained, 2 * trained, 4 * trained})


def _stages(name: str, config: Any) -> Stage:
    """The run: one stage, or with the rule ``interval`` one for each training length.

    A length is a shape, so each is a program of its own that goes on from the state of
    the one before it.
    """
    c, stage = config.data, None
    if c.rule == "accuracy":
        return Stage(name, config)
    for length, until in algorithmic.curriculum(
        c.first, c.length, c.interval, config.train.steps
    ):
        part = with_fields(config, {"data.length": length})
        stage = Stage(name, part, stage, continues=stage is not None, until=until)
    assert stage is not None
    return stage


def _watch(c, net, mesh, method, state) -> dict[str, float]:
    """Exact match of the largest training length and of its double, of few problems."""
    numbers = {}
    for n in (c.length, 2 * c.length):
        exact = _steps_of(c, net, mesh, state.params, n, 1)["exact"]
        numbers[f"length_{n}_quick"] = float(exact[_oracle(c, net, n)].mean())
    return numbers


def _measure(config, net, mesh, method, state) -> Finding:
    """Exact match by length, and for each stopping rule."""
    c = config.data
    every = lengths_of(c.length, c.lengths)
    chunks = -(-c.eval_count // c.eval_batch)
    exact, means = {stop: [] for stop in STOPS}, {}
    for n in every:
        found = _steps_of(c, net, mesh, state.params, n, chunks)
        rows = np.arange(found["exact"].shape[1])
        told = _oracle(c, net, n)
        stops: dict[str, Any] = {"oracle": told}
        if not net.loops:
            stops["sample"] = found["sample"] - 1
            stops["batch"] = found["entropy"].mean(1).argmin()
            stops["fixed point"] = found["fixed"] - 1
        for stop, at in stops.items():
            exact[stop].append(float(found["exact"][at, rows].mean()))
        means[n] = found["exact"].mean(1)
    numbers = {f"length_{n}": x for n, x in zip(every, exact["oracle"])}
    curves: dict[str, Any] = {"exact match against length": (every, exact["oracle"])}
    if net.loops:
        table = Table("exact match by length", ("length", "exact"),
                      list(zip(every, exact["oracle"])))  # fmt: skip
    else:
        far = every.index(2 * c.length)
        for stop in STOPS[1:]:
            numbers[f"length_{2 * c.length}_{stop}"] = exact[stop][far]
            curves[f"exact match against length, stop: {stop}"] = (every, exact[stop])
        for n in (c.length, 2 * c.length):
            at = np.arange(1, len(means[n]) + 1).tolist()
            curves[f"exact match against step, length {n}"] = (at, means[n].tolist())
        table = Table(
            f"exact match by length and stopping rule ({chunks * c.eval_batch} problems)",
            ("length", *STOPS),
            list(zip(every, *(exact[stop] for stop in STOPS))),
        )
    if c.rule == "accuracy":
        numbers["trained_to"] = float(state.extra["length"])
    return Finding(numbers, (table,), curves)


def _oracle(c, net, n) -> int:
    """Index of the step that the problem needs, of those that ``_steps_of`` gives."""
    return 0 if net.loops else algorithmic.n_steps(c.problem, n, _operand(c)) - 1


def _steps_of(c, net, mesh, params, n, chunks) -> dict[str, np.ndarray]:
    """Every step's exact match and confidence on test problems of a length."""
    steps = algorithmic.n_steps(c.problem, n, _operand(c)) + c.extra_loops
    size, parts = c.eval_batch, []
    run = _tracer(net, mesh, 0 if net.loops else steps, c.pauses, c.tolerance)
    rows = meshes.batch_rows(mesh, size, name="data.eval_batch")
    with jax.set_mesh(mesh):
        for i in range(chunks):
            # Test problems are those of no training seed, the same for every model.
            key = jax.random.fold_in(
                jax.random.fold_in(jax.random.key(2**31 - 1), n), i
            )
            batch = draw(c, key, n, _operand(c), size, 0)
            placed = meshes.put_batch(
                {k: v[rows] for k, v in batch.items()}, mesh, size
            )
            parts.append(jax.device_get(run(params, placed)))
    return {k: np.concatenate([p[k] for p in parts], -1) for k in parts[0]}


@functools.lru_cache(maxsize=128)
def _tracer(net, mesh, steps, pauses, tolerance):
    def run(params, batch):
        tokens, targets = batch["tokens"], batch["targets"]
        if not steps:
            logits = looped.forward(params, tokens, net=net)[None]
            return {"exact": looped.exact_match(logits, targets, batch["weights"])}
        logits, distance = looped.forward_all(params, tokens, steps, net=net)
        mask = algorithmic.answer_positions(tokens, pauses)
        return {
            "exact": looped.exact_match(logits, targets, batch["weights"]),
            "entropy": looped.self_cross_entropy(logits, mask),
            "sample": looped.stop_max_confidence(logits, mask),
            "fixed": looped.stop_fixed_point(distance, tolerance),
        }

    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    return jax.jit(run, out_shardings=replicated)
