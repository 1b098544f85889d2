"""DIEN on behaviour sequences in time order, and its ablations.

    jaxpapers run dien:ml100k          AUGRU without auxiliary loss, MovieLens-100k
    jaxpapers run dien:ml100k --config.method.aux_weight=1.0    with it
    jaxpapers run dien:ml100k --config.net.variant=agru | aigru | gru
    jaxpapers run dien:smoke           a generated log
    jaxpapers run dien                 Amazon, the released code's sizes

The fields of ``net`` are described at ``jaxpapers.papers.dien.Net``.

Gates on ml100k (task N of the next item, mean of 3 seeds, 2 epochs, AUC): without the
auxiliary loss >= .830 and >= DIN with softmax + .010; with it >= .815.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.papers import dien

PRESETS = ("paper", "ml100k", "smoke")
# AUC that the paper's own row ends with; seeds and processors differ.
EXPECTED = {"ml100k": 0.858, "smoke": 0.728}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: paper), locked."""
    preset = preset or "paper"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset dien:{preset}; expected one of {PRESETS}")
    # The task replaces the vocabularies by those of its data.
    net = dien.Net(item_vocab=63_003, cate_vocab=803, user_vocab=192_405)
    config = ConfigDict(
        {
            "data": blocks.click_data(
                "amazon", history=100, batch=128,
                protocol="dien",  # users to test and negatives, of amazon; din
            ),
            "net": dataclasses.asdict(net),
            "optim": blocks.click_optim(
                "adam", "lazy_adam", 1e-3,
                schedule="drop",  # constant, cosine
                drop_every=2706,  # steps after which lr is multiplied by drop_by
                drop_by=0.5,
            ),
            "method": {
                "aux_weight": 1.0,  # alpha
                "aux_reduce": "valid_mean",  # padded_mean, per_sample
            },
            # 3 epochs of 346,325 rows (Electronics).
            "train": blocks.train(8118, eval_every=2706),
        }
    )  # fmt: skip
    if preset in ("ml100k", "smoke"):
        config.data.update(source="ml-100k", history=50, batch=512)
        config.net.update(blocks.ML_100K)
        config.net.update(user_dim=0, state=24, pooled="mean", product=False)
        config.net.update(hidden=(64, 32), aux_hidden=(50,))
        # The rate is the best of 2, 4 and 8e-3 on held-out training users.
        config.optim.update(tables="dense", lr=8e-3, schedule="constant")
        config.method.aux_weight = 0.0
        # 2 epochs of 179,254 rows.
        config.train.update(steps=700, eval_every=350, save_minutes=1.0)
    if preset == "smoke":
        config.optim.tables = "lazy_adam"
        config.data.update(source="generated", history=10, batch=128)
        config.method.aux_weight = 1.0
        config.optim.lr = 0.01
        config.train.update(steps=80, eval_every=0, alone=True)
    return config.lock()
