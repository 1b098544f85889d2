"""Domain generalisation: train on several domains, test on one that was left out.

DomainBed's protocol: see ``data.domains``. Every fold is a test domain, a column of the
table; rows are the paper's methods and what they are compared with. Domains are evaluated
every ``data.validate_every`` updates, and the record of a run, which its state carries,
chooses a step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import figures
from jaxpapers import mesh as meshes
from jaxpapers.data import domain_sources
from jaxpapers.data.domains import Batches, seed_hash
from jaxpapers.study import Data, Row, Stage, Study, with_fields
from jaxpapers.tasks import domain_records, domain_tables

SELECTIONS = ("iid", "last", "oracle")
# Fields of a stage that differ from the paper's own, by the label of the row.
ROWS: dict[str, dict[str, Any]] = {
    "ERM-NU": {},
    "SWAD-NU": {"method.swad": True},
    "ERM-NU, theta 0.1": {"method.theta": 0.1},
    "ERM": {"method.theta": 0.0},
    "L2": {"method.theta": 0.0},
    "SWAD": {"method.theta": 0.0, "method.swad": True},
    "CORAL": {"method.theta": 0.0, "method.algorithm": "coral"},
    "IRM": {"method.theta": 0.0, "method.algorithm": "irm"},
    "VREx": {"method.theta": 0.0, "method.algorithm": "vrex"},
    "GroupDRO": {"method.theta": 0.0, "method.algorithm": "group_dro"},
    "Mixup": {"method.theta": 0.0, "method.algorithm": "mixup"},
}
# Fields of the study, which no training run reads. Its own fold and the selection stay,
# for a run that is measured by itself.
OF_STUDY = {"rows": (), "l2": 0.0, "trials": 1, "loo": False}


def abstract(config: Any) -> Data:
    """Shapes of a global training batch; of a folder that is not there, 4 domains."""
    net, n = config.net, config.data.batch
    image = {"cnn": np.float32, "resnet": np.uint8}
    shape = (net.get("inputs", 0),)
    if net.model in image:
        shape = (net.size, net.size, net.get("channels", 3))
    counts = {"rotated": len(domain_sources.ANGLES)}
    counts["coloured"] = len(domain_sources.ENVIRONMENTS)
    count = counts.get(config.data.source, 4)
    if config.data.source == "folder" and config.data.path:
        count = len(config.data.names) or domain_sources.count(config.data.path)
    return Data(
        None,
        {
            "x": jax.ShapeDtypeStruct((n, *shape), image.get(net.model, np.float32)),
            "label": jax.ShapeDtypeStruct((n,), jnp.int32),
            "domain": jax.ShapeDtypeStruct((n,), jnp.int32),
        },
        facts={"domains": count},
        unit="images" if net.model in image else "rows",
    )


def read(config: Any) -> Data:
    """Batches of the training domains; ``refresh`` evaluates all of them."""
    loaded, c = domain_records.load(config), config.data
    trained = [e for e in range(len(loaded.domains)) if e not in c.test]
    if not trained or not c.test or not {*c.test} < {*range(len(loaded.domains))}:
        raise ValueError(
            f"data.test must be some of the domains 0 .. {len(loaded.domains) - 1} and "
            f"not all, got {tuple(c.test)}"
        )
    names = [loaded.domains[e].name for e in c.test]
    examples = Batches(
        [loaded.domains[e] for e in trained],
        [loaded.splits[e].inside for e in trained],
        c.seed,
    )
    examples.batch(0, c.batch, slice(0, 1))  # Refuses a size that does not fit.
    count = sum(len(d.label) for d in loaded.domains)
    return abstract(config)._replace(
        examples=examples,
        facts={"domains": len(loaded.domains)},
        refresh=(c.validate_every, functools.partial(domain_records.refresh, config)),
        summary=f"{loaded.what}: {count:,} examples of {len(loaded.domains)} domains, "
        f"{loaded.classes} classes; tested on {', '.join(names)}",
    )


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The paper's methods and others, in every fold."""
    del data  # Each stage reads the data of its config.
    loaded, c = domain_records.load(config), config.data
    meshes.batch_rows(mesh, c.eval_batch, name="data.eval_batch")
    if c.selection not in SELECTIONS:
        raise ValueError(
            f"data.selection must be one of {SELECTIONS}, got {c.selection!r}"
        )
    unknown = [label for label in c.rows if label not in ROWS]
    if unknown:
        raise ValueError(f"data.rows must be of {tuple(ROWS)}, got {unknown[0]!r}")
    if not c.l2 >= 0:
        raise ValueError(f"data.l2 must be >= 0, got {c.l2}")
    if c.trials < 1:
        raise ValueError(f"data.trials must be >= 1, got {c.trials}")
    folds = tuple(c.folds) or tuple(range(len(loaded.domains)))
    if not {*folds} <= {*range(len(loaded.domains))} or len({*folds}) < len(folds):
        raise ValueError(
            f"data.folds must be among the domains 0 .. {len(loaded.domains) - 1}, each "
            f"once, got {folds}"
        )
    labels = dict.fromkeys(("ERM-NU", *(c.rows or ROWS)))

    def row(seed, label, fold, trial, without=None):
        fields = _fields(config, seed, label, fold, trial)
        if without is not None:
            fields["data.test"] = (fold, without)
        stage = with_fields(config, fields)
        measure = functools.partial(
            domain_records.measure, config.data.selection, stage, mesh
        )
        column = loaded.domains[fold].name if len(folds) > 1 else ""
        title = f"{label}, trial {trial}" if trial else label
        if without is not None:
            title += f"{domain_tables.WITHOUT}{loaded.domains[without].name}"
        watch = functools.partial(domain_records.watch, stage, mesh)
        return Row(title, Stage(name, stage), measure, column, watch)

    def others(fold):
        return [e for e in range(len(loaded.domains)) if e != fold]

    def rows(seed):
        return [
            row(seed, label, fold, trial, without)
            for label in labels
            for fold in folds
            for trial in range(c.trials)
            for without in (None, *(others(fold) if c.loo and not trial else ()))
        ]

    pictures: dict[str, Any] = {
        "domains.csv": domain_tables.write_csv,
        "domains.txt": domain_tables.write_text,
    }
    if c.loo:
        names = [d.name for d in loaded.domains]
        pictures["loo.csv"] = functools.partial(domain_tables.write_loo, names, folds)
    if config.net.model != "linear":
        pictures["domains.png"] = functools.partial(_draw, loaded.domains)
    return Study(
        title=f"accuracy on the left-out domain, {loaded.what}",
        metric="accuracy",
        rising=True,
        rows=rows,
        columns=() if len(folds) > 1 else ("validation", "last", "oracle", "ratio"),
        pictures=pictures,
        unit="loss of the training domains",
        errors=True,
    )


def _fields(config, seed, label, fold, trial) -> dict[str, Any]:
    """Fields of the training run of a row."""
    fields = {f"data.{k}": v for k, v in OF_STUDY.items()}
    fields |= {"train.seed": seed, "data.seed": seed}
    fields |= {"data.test": (fold,), "data.folds": (fold,)}
    fields |= ROWS[label]
    if label == "L2":
        fields["optim.weight_decay"] = config.data.l2
    return fields | (_drawn(config, label, seed, trial) if trial else {})


def _drawn(config, label, seed, trial) -> dict[str, float]:
    """DomainBed's random hyper-parameters of a trial; trial 0 has the defaults."""
    small = config.net.model != "resnet"
    ranges = {
        "optim.lr": ("lr", (-4.5, -2.5) if small else (-5, -3.5)),
        "method.theta": ("theta", (-2.5, -1.5)),
        "method.coral": ("mmd_gamma", (-1, 1)),
        "method.irm": ("irm_lambda", (-1, 5)),
        "method.vrex": ("vrex_lambda", (-1, 5)),
        "method.eta": ("groupdro_eta", (-3, -1)),
        "method.alpha": ("mixup_alpha", (-1, 1)),
    }
    own = {"CORAL": "coral", "IRM": "irm", "VREx": "vrex", "GroupDRO": "eta",
           "Mixup": "alpha"}  # fmt: skip
    read = {"optim.lr", f"method.{own.get(label, 'theta')}"}
    if ROWS[label].get("method.theta") == 0.0:
        read -= {"method.theta"}
    if not small and label != "L2":
        ranges["optim.weight_decay"] = ("weight_decay", (-6, -2))
        read |= {"optim.weight_decay"}
    base = seed_hash(trial, seed)
    return {
        field: float(
            10 ** np.random.RandomState(seed_hash(base, key)).uniform(*low_high)
        )
        for field, (key, low_high) in ranges.items()
        if field in read
    }


def _draw(domains, results, out):
    """Twelve examples of every domain."""
    del results
    index = np.arange(12)
    rows = {d.name: d.x[index[: len(d.label)]] for d in domains}
    figures.images(rows, out)
