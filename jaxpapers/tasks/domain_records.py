"""Records of a run on several domains: evaluations in its state, and what they choose.

The state of a run carries the accuracy and the loss of every domain at every evaluation,
``nuclear_norm.start``, so a run that was stopped has them all.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpapers import mesh as meshes
from jaxpapers.data import backbones, domain_sources, fetch, letters, mnist
from jaxpapers.data.domains import Domain, Splits, split
from jaxpapers.data.files import refuse_path
from jaxpapers.method import State, swad
from jaxpapers.nets import resnet
from jaxpapers.papers import nuclear_norm as nu
from jaxpapers.study import Finding, Table

SOURCES = ("latent", "rotated", "coloured", "fonts", "folder")
# Singular values that are drawn.
SPECTRUM = 16


class Loaded(NamedTuple):
    """Domains with their splits, and the names of the classes."""

    domains: list[Domain]
    splits: list[Splits]
    classes: int
    what: str


def load(config: Any) -> Loaded:
    """The domains that ``config.data`` names, with the splits of its seed.

    Raises:
      ValueError: an unknown source, or examples that do not fit ``config.net``.
      FileNotFoundError: no files.
    """
    c, net = config.data, config.net
    size = net.get("size", 0)
    if c.names and c.source != "folder":
        raise ValueError(
            f"data.names={tuple(c.names)} are folders, but data.source is {c.source}"
        )
    if c.backbone and net.model != "resnet":
        raise ValueError(
            f"data.backbone={c.backbone!r} is a residual network, but net.model is "
            f"{net.model}"
        )
    drawn = c.seed if c.source == "latent" else 0
    domains, classes, what = _load(
        c.source, c.path, tuple(c.names), size, c.count, c.resample, drawn, c.mixed
    )
    shape, expected = _shape(domains[0].x), {"classes": classes}
    names = ("inputs",) if net.model == "linear" else ("channels",)
    expected |= {name: shape[-1] for name in names if shape and name in net}
    for name, actual in expected.items():
        if net[name] != actual:
            raise ValueError(
                f"config.net.{name} is {net[name]}, but {what} has {actual}"
            )
    splits = [split(len(d.label), c.seed, e, c.held_out) for e, d in enumerate(domains)]
    return Loaded(domains, splits, classes, what)


def _shape(x) -> tuple[int, ...]:
    """Of an example; () of files, which are decoded later to what the net takes."""
    return x.shape[1:] if isinstance(x, np.ndarray) else ()


@functools.lru_cache(maxsize=4)
def _load(source, path, names, size, count, resample, seed, mixed):
    if source not in SOURCES:
        raise ValueError(f"config.data.source must be one of {SOURCES}, got {source!r}")
    if source == "latent":
        refuse_path(path, source, SOURCES)
        made = domain_sources.latent(rotated=mixed, seed=seed)
        return made, 2, "latent signs"
    if source in ("rotated", "coloured"):
        digits = mnist.digits(fetch.get("mnist-10k", path=path))
        if source == "coloured":
            return domain_sources.coloured(digits, size=size), 2, "coloured digits"
        made = domain_sources.rotated(digits, size=size, resample=resample)
        return made, 10, "rotated digits"
    if source == "fonts":
        folder = fetch.get("font-families", path=path)
        made = letters.families(folder, count, size)
        return made, len(letters.LETTERS), "letters"
    if not path:
        raise FileNotFoundError(
            "config.data.path: not given; it is a folder of domains, each with a folder "
            "of images for every class, such as PACS, VLCS or office_home"
        )
    made, classes = domain_sources.folders(path, size, names)
    return made, len(classes), Path(path).name


def refresh(config: Any, state: State) -> State:
    """Evaluates all domains into the state's record; before the first step, pretrains."""
    if int(state.step) == 0:
        return _pretrained(config, state)
    values = _evaluate(config, state.params, nu.own_extra(state.extra)["moments"])
    return _recorded(config, state, values)


def _recorded(config: Any, state: State, values: np.ndarray) -> State:
    """The state with an evaluation, which SWAD sees too."""
    own = nu.own_extra(state.extra)
    index = int(state.step) // config.data.validate_every - 1
    records = np.array(own["records"])
    if index < len(records):
        records[index] = values
    extra = nu.with_own_extra(state.extra, {**own, "records": jnp.asarray(records)})
    state = state._replace(extra=extra)
    if config.method.swad:
        trained = [e for e in range(len(values)) if e not in config.data.test]
        state = swad.validated(
            state, float(values[trained, 1, 1].mean()), _valley(config)
        )
    return state


def _valley(config):
    return nu.options_of(config).valley


def _pretrained(config: Any, state: State) -> State:
    """The state with the net of ``data.backbone``."""
    path = config.data.backbone
    if not path:
        return state
    if config.net.base != 64:
        raise ValueError(
            f"data.backbone={path!r} has a stem of 64 channels, but net.base is "
            f"{config.net.base}"
        )
    body, moments = resnet.from_torchvision(backbones.arrays(path), config.net.depth)
    own = {**nu.own_extra(state.extra), "moments": moments}
    arrays = {**state.params, "featurizer": body}
    return state._replace(
        params=jax.tree.map(jnp.asarray, arrays),
        extra=jax.tree.map(jnp.asarray, nu.with_own_extra(state.extra, own)),
    )


@functools.lru_cache(maxsize=4)
def _scorer(net: Any, mesh: Any):
    """(params, moments, x, label) -> correct, cross-entropy, features of each row."""

    def score(params, moments, x, label):
        features, _ = nu.featurize(params, moments, x, net)
        logits = nu.classify(params, features)
        return logits.argmax(-1) == label, nu.cross_entropy(logits, label), features

    return jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _evaluate(config, params, moments, mesh=None, only=None) -> np.ndarray:
    """(domains, 2, 2): accuracy and loss of each domain, inside and held out."""
    loaded, size = load(config), config.data.eval_batch
    parts = [(e, s) for e in only or range(len(loaded.domains)) for s in (0, 1)]
    index = {p: loaded.splits[p[0]][p[1]] for p in parts}
    flat = [(e, i) for (e, _), rows in index.items() for i in rows]
    correct, loss = [], []
    for start in range(0, len(flat), size):
        chunk = flat[start : start + size]
        right, ce, _ = _scores(config, params, moments, chunk, mesh)
        correct.append(right)
        loss.append(ce)
    values = np.full((len(loaded.domains), 2, 2), -1.0)
    ends = np.cumsum([len(rows) for rows in index.values()])[:-1]
    pairs = (np.split(np.concatenate(v), ends) for v in (correct, loss))
    for (e, s), right, ce in zip(parts, *pairs):
        values[e, s] = right.mean(), ce.mean()
    return values


def _scores(config, params, moments, chunk, mesh=None):
    """Correct, cross-entropy and features of some (domain, index), on the host."""
    loaded, size = load(config), config.data.eval_batch
    mesh = mesh or jax.sharding.get_mesh()
    rows = meshes.batch_rows(mesh, size, name="data.eval_batch")
    xs, labels = [], []
    domains = np.array([e for e, _ in chunk])
    for e in dict.fromkeys(domains.tolist()):
        own = np.array([i for d, i in chunk if d == e])
        xs.append(loaded.domains[e].x[own])
        labels.append(loaded.domains[e].label[own])
    x, label = np.concatenate(xs), np.concatenate(labels)
    pad = [(0, size - len(label))]
    batch = {"x": np.pad(x, pad + [(0, 0)] * (x.ndim - 1)), "label": np.pad(label, pad)}
    batch = {k: v[rows] for k, v in batch.items()}
    net = nu.net_of(config)
    with jax.set_mesh(mesh):
        placed = meshes.put_batch(batch, mesh, size)
        scores = _scorer(net, mesh)(params, moments, placed["x"], placed["label"])
    return [np.asarray(v)[: len(label)] for v in scores]


def measure(
    selection: str, config: Any, mesh: Any, method: Any, state: State
) -> Finding:
    """What the record of a run says, and for SWAD the mean of its valley."""
    del method
    own = nu.own_extra(state.extra)
    values = _evaluate(config, state.params, own["moments"], mesh)
    every, test = config.data.validate_every, tuple(config.data.test)
    record = np.array(own["records"], float)
    # A state that was loaded to be measured has no step of its own.
    state = state._replace(step=own["updates"])
    done = int(own["updates"])
    if done and done % every == 0 and done // every <= len(record):
        state = _recorded(config, state, values)
        record[done // every - 1] = values
        steps = every * np.arange(1, len(record) + 1)
    else:
        record = np.concatenate([record, values[None]])
        steps = np.append(every * np.arange(1, len(record)), done)
    choose = {"iid": nu.select_iid, "last": nu.select_last, "oracle": nu.select_oracle}
    choices = {k: f(record, test) for k, f in choose.items()}
    chosen, params = choices[selection], state.params
    numbers = {k: c.accuracy for k, c in choices.items()}
    numbers |= {"accuracy": chosen.accuracy, "validation": chosen.validation}
    numbers["step"] = float(steps[chosen.index])
    final = record[chosen.index]
    if config.method.swad:
        mean = swad.finalize(state.extra["swad"], _valley(config))
        if int(mean.count):
            params = mean.params
            final = _evaluate(config, params, own["moments"], mesh)
            trained = [e for e in range(len(final)) if e not in test]
            numbers |= {
                "accuracy": final[test[0], 0, 0],
                "validation": final[trained, 1, 0].mean(),
                "swad_start": float(mean.start),
                "swad_end": float(mean.end),
            }
    s = _singular_values(config, params, own["moments"], mesh)
    numbers["ratio"] = float(s.sum() / max(s[0], 1e-30))
    numbers |= _hyper(config)
    known = record[:, test[0], 0, 0] >= 0
    curves: dict[str, Any] = {
        "test accuracy against updates": (steps[known], record[known, test[0], 0, 0]),
        "singular value / largest against number": (
            np.arange(1, len(s) + 1)[:SPECTRUM], (s / max(s[0], 1e-30))[:SPECTRUM]
        ),
    }  # fmt: skip
    return Finding(
        {k: float(v) for k, v in numbers.items()},
        [_by_domain(config, final)],
        curves,
        {"record.npz": {"record": record, "steps": steps}},
    )


def _hyper(config) -> dict[str, float]:
    """Hyper-parameters of the run, which a sweep chooses among."""
    m, o = config.method, config.optim
    values = {"theta": m.theta, "lr": o.lr, "weight_decay": o.get("weight_decay", 0.0)}
    own = {"coral": "coral", "irm": "irm", "vrex": "vrex", "group_dro": "eta",
           "mixup": "alpha"}.get(m.algorithm)  # fmt: skip
    if own:
        values[own] = m[own]
    return {f"hyper_{k}": float(v) for k, v in values.items()}


def _by_domain(config, values) -> Table:
    """Accuracies of every domain, at the chosen step."""
    names = [d.name for d in load(config).domains]
    rows = [
        [f"{name} (test)" if e in config.data.test else name, *values[e, :, 0].tolist()]
        for e, name in enumerate(names)
    ]
    return Table("accuracy by domain", ("domain", "80 %", "20 % held out"), rows)


def _singular_values(config, params, moments, mesh) -> np.ndarray:
    """Of the features of a batch of the training domains' held-out parts."""
    loaded, c = load(config), config.data
    trained = [e for e in range(len(loaded.domains)) if e not in c.test]
    each = min(c.batch, c.eval_batch) // len(trained)
    chunk = [(e, i) for e in trained for i in loaded.splits[e].out[:each]]
    features = _scores(config, params, moments, chunk, mesh)[2]
    return np.linalg.svd(features.astype(np.float64), compute_uv=False)


def watch(config: Any, mesh: Any, method: Any, state: State) -> Mapping[str, float]:
    """Accuracy on the test domain, of the parameters themselves with SWAD too."""
    del method
    if int(state.step) == config.train.steps:
        return {}  # Measured right after training.
    moments, test = nu.own_extra(state.extra)["moments"], config.data.test[0]
    values = _evaluate(config, state.params, moments, mesh, only=(test,))
    return {"accuracy": float(values[test, 0, 0])}
