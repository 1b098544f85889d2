"""The delayed-feedback family on CDNOW's repeat purchases, by the streaming protocol.

    python benchmarks/delayed_feedback.py             three seeds (two minutes)

Every method starts from the same pretrained model of its seed, trains on the events of a
day and is tested on the next day's clicks with their true labels. Writes
results/delayed_feedback.json and .png beside this and prints the table as Markdown.
"""

import json
import os
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from timing import header  # noqa: E402

from jaxpapers import figures  # noqa: E402
from jaxpapers.config import load_config  # noqa: E402
from jaxpapers.study import Finding, Result, Row, Study  # noqa: E402
from jaxpapers.tasks import delayed_family  # noqa: E402

OUT = Path(__file__).parent / "results" / "delayed_feedback.json"
SEEDS = (0, 1, 2)


def draw(rows: dict) -> None:
    """The log loss of every method and seed, from the rows of the JSON."""

    def result(method: str, values: dict) -> Result:
        findings = [Finding({"nll": x}) for x in values["nll"]]
        return Result(Row(method, None, lambda: findings[0]), findings, [])

    title = "NLL of the next day's clicks, CDNOW's repeat purchases"
    study = Study(title, "nll", False, lambda seed: [])
    results = [result(*row) for row in rows.items()]
    figures.comparison(study, results, OUT.with_suffix(".png"))


def main() -> None:
    """Measures and writes the table."""
    began = time.monotonic()
    rows = delayed_family.table(
        load_config("defer:cdnow"),
        SEEDS,
        progress=lambda name: print(f"{name} ...", flush=True),
    )
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    result = {
        **header("python benchmarks/delayed_feedback.py", *packages),
        "seeds": SEEDS,
        "seconds": time.monotonic() - began,
        "rows": {r.method: {k: v.tolist() for k, v in r.values.items()} for r in rows},
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(delayed_family.render(rows))
    draw(result["rows"])


if __name__ == "__main__":
    main()
