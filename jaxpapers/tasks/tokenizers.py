"""Tokenizers of one catalogue side by side, by the use of their codes."""

import functools
from typing import Any

import jax
import numpy as np

from jaxpapers.papers import r3_vae
from jaxpapers.papers.r3_vae import starts
from jaxpapers.study import Finding, Row, Stage, Study, with_fields, with_seed

COLUMNS = (
    "usage", "perplexity", "sc_x", "sc_x_1", "pd", "reconstruction",
    "hard_reconstruction",
)  # fmt: skip


def variants(config: Any) -> dict[str, dict[str, Any]]:
    """Label -> fields of the tokenizers that are trained beside the config's own."""
    width = min(32, config.tokenizer.features)
    vq = {
        "tokenizer.reference": False,
        "tokenizer.encoder": (4 * width, width),
        "tokenizer.decoder": (4 * width,),
        "tokenizer.sc": 0.0,
        "tokenizer.pd": 0.0,
        "optim.lr": 1e-3,
    }
    levels, codes = config.tokenizer.levels, config.tokenizer.codes
    grid = (8, codes // 8) if codes >= 16 else (codes,)

    def rated(quantizer, tau=1.0, **fields):
        own = {"tokenizer.quantizer": quantizer, "tokenizer.tau": tau}
        return {**own, **{f"tokenizer.{k}": v for k, v in fields.items()}}

    return {
        "R3-VAE soft tau .05": rated("soft", 0.05),
        "R3-VAE soft tau .1": rated("soft", 0.1),
        "R3-VAE soft tau 1 (equations)": rated("soft"),
        "R3-VAE top1": rated("top1"),
        "R3-VAE mp, no reference": rated("mp", reference=False),
        "R3-VAE mp, random start": rated("mp", start="random"),
        "R3-VAE mp, random start, dead codes": rated(
            "mp", start="random", dead_every=50
        ),
        "RQ-VAE": {**vq, "tokenizer.quantizer": "ste"},
        "RQ-VAE, random start": {
            **vq, "tokenizer.quantizer": "ste", "tokenizer.start": "random",
        },
        "RQ-VAE, rotation": {**vq, "tokenizer.quantizer": "rotation"},
        "RQ-VAE, Gumbel": {**vq, "tokenizer.quantizer": "gumbel"},
        "RQ-VAE, EMA": {**vq, "tokenizer.quantizer": "ema"},
        "RQ-VAE, SimVQ": {**vq, "tokenizer.quantizer": "simvq"},
        "FSQ": {
            **vq, "tokenizer.quantizer": "fsq", "tokenizer.fsq": grid,
            "tokenizer.encoder": (4 * width, levels * len(grid)),
        },
    }  # fmt: skip


UNTRAINED = {
    "RQ-KMeans": ("rq_kmeans", 1),
    "RQ-KMeans, 5 restarts": ("rq_kmeans", 5),
    "RQ-KMeans, balanced": ("rq_kmeans_balanced", 1),
    "PQ-KMeans": ("pq_kmeans", 1),
    "random codes": ("random", 1),
}


def compared(name: str, config: Any, x: np.ndarray) -> Study:
    """The study of ``config.method.stage=tokenize``.

    Args:
      name: of the paper.
      config: of the tokenizer.
      x: item vectors.
    """

    def rows(seed):
        own = with_seed(config, seed)
        measure = functools.partial(measured, x)
        others = chosen(config, {**variants(own), **UNTRAINED})
        trained = {f"R3-VAE {own.tokenizer.quantizer}, reconstruction": {}}
        trained |= {k: v for k, v in others.items() if k not in UNTRAINED}
        stages = {k: Stage(name, with_fields(own, v)) for k, v in trained.items()}
        return [
            *(
                Row(label, stage, functools.partial(measure, stage.config))
                for label, stage in stages.items()
            ),
            *(
                Row(label, None, functools.partial(untrained, own, x, seed, *how))
                for label, how in others.items()
                if label in UNTRAINED
            ),
        ]

    return Study(
        title=f"SIDs of {len(x):,} items, {config.data.source}, "
        f"{config.tokenizer.levels} levels of {config.tokenizer.codes} codes: share of "
        "distinct ones",
        metric="unique",
        rising=True,
        rows=rows,
        columns=COLUMNS,
    )


def chosen(config: Any, known: dict[str, Any]) -> dict[str, Any]:
    """The rows that ``data.rows`` names, of those known; all for ("all",).

    Raises:
      ValueError: an unknown label.
    """
    names = tuple(config.data.rows)
    if names == ("all",):
        return known
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"config.data.rows must be all, or some of {sorted(known)}, got {unknown}"
        )
    return {name: known[name] for name in names}


def measured(x: np.ndarray, config: Any, method: Any, state: Any) -> Finding:
    """The report on a trained tokenizer's SIDs, and its reconstruction errors."""
    del method
    options, _, _ = r3_vae.read(config)
    state = jax.device_get(state._replace(key=()))
    found = starts.quantized(state.params, state.extra, x, options)
    numbers = r3_vae.diagnose(found.sid, options.codes, x, found.q, t=options.t)
    y = starts.decoded(state.params, found, options)
    for key, value in (("reconstruction", y[0]), ("hard_reconstruction", y[1])):
        numbers[key] = float(np.square(x - value).sum(1).mean())
    numbers["top_weight"] = float(found.weights.max(-1).mean())
    return finding(numbers, np.asarray(found.sid), options.codes)


def untrained(
    config: Any, x: np.ndarray, seed: int, source: str, restarts: int
) -> Finding:
    """The report on SIDs of k-means or random codes."""
    options, _, _ = r3_vae.read(config)
    how = r3_vae.Retrieval(source=source, restarts=restarts)
    key = jax.random.key(seed)
    sid, q, _ = starts.assign(key, x, options, how)
    numbers = r3_vae.diagnose(sid, options.codes, x, q, t=options.t)
    if source != "random":
        numbers["hard_reconstruction"] = float(np.square(x - q).sum(1).mean())
    return finding(numbers, sid, options.codes)


def finding(numbers: dict[str, float], sid: np.ndarray, codes: int) -> Finding:
    """Numbers with the least usage and perplexity of a level, a curve of code shares."""
    levels = range(1, sid.shape[1] + 1)
    for key in ("usage", "perplexity"):
        numbers[key] = min(numbers[f"{key}_{level}"] for level in levels)
    curves = {}
    for level in levels:
        counts = np.bincount(sid[:, level - 1], minlength=codes)
        share = (-np.sort(-counts) / len(sid)).tolist()
        curves[f"share of items against code of level {level}, the largest first"] = (
            list(range(1, codes + 1)), share,
        )  # fmt: skip
    numbers = {k: v for k, v in numbers.items() if np.isfinite(v)}
    return Finding(numbers, curves=curves)
