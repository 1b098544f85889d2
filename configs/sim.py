"""SIM on long behaviour sequences, and the average of the history beside it.

    jaxpapers run sim:ml100k           hard search, MovieLens-100k
    jaxpapers run sim:ml100k --config.net.search=soft      average: pooling, no search
    jaxpapers run sim:smoke            a generated log
    jaxpapers run sim                  Taobao: 400 behaviours to search, 100 recent

The fields of ``net`` are described at ``jaxpapers.papers.sim.Net``.

Gates on ml100k (task N of the next item, mean of 3 seeds, 2 epochs, AUC): hard >= .812,
>= DIN with softmax + .003, and within .008 of the average. Soft is reported.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.papers import sim

PRESETS = ("paper", "ml100k", "smoke")
# AUC that the paper's own row ends with; seeds and processors differ.
EXPECTED = {"ml100k": 0.837, "smoke": 0.854}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: paper), locked."""
    preset = preset or "paper"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset sim:{preset}; expected one of {PRESETS}")
    # The task replaces the vocabularies by those of its data.
    net = sim.Net(item_vocab=4_162_026, cate_vocab=9_441, user_vocab=987_996)
    config = ConfigDict(
        {
            "data": blocks.click_data("taobao", history=500, batch=128),
            "net": dataclasses.asdict(net),
            "optim": blocks.click_optim("adam", "lazy_adam", 1e-3),
            "method": {
                "alpha": 1.0,  # weight of the soft search's own loss
                "beta": 1.0,  # weight of the click loss
            },
            # One epoch of 70 % of the public file's users.
            "train": blocks.train(5_400, eval_every=10_000),
        }
    )
    if preset in ("ml100k", "smoke"):
        config.data.update(source="ml-100k", history=150, batch=512)
        config.net.update(blocks.ML_100K)
        config.net.update(search="hard", k=20, skip=0, heads=1, short=20)
        config.net.update(gsu_hidden=(64, 32), gsu_pool="mean")
        config.net.update(unit=(36,), hidden=(64, 32))
        # The rate is the best of 2, 4 and 8e-3 on held-out training users.
        config.optim.update(tables="dense", lr=8e-3)
        # 2 epochs of 179,254 rows.
        config.train.update(steps=700, eval_every=350, save_minutes=1.0)
    if preset == "ml100k":
        config.net.unit_chunk = 64  # For CPUs.
    if preset == "smoke":
        config.optim.tables = "lazy_adam"
        config.data.update(source="generated", history=30, batch=128)
        config.optim.lr = 0.01
        config.train.update(steps=100, eval_every=0, alone=True)
    return config.lock()
