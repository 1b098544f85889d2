"""Click models on long histories: SIM, and the average of the history beside it.

    jaxpapers train sim:ml100k           hard search, MovieLens-100k
    jaxpapers train sim:ml100k --config.net.search=soft      average: pooling, no search
    jaxpapers train sim:smoke            a small one, < 20 s
    jaxpapers train sim                  Taobao: 400 behaviours to search, 100 recent

Gates on ml100k (task N of the next item, mean of 3 seeds, 2 epochs, AUC): hard >= .812,
>= DIN with softmax + .003, and within .008 of the average. Soft is reported.
"""

from ml_collections import ConfigDict

PRESETS = ("paper", "ml100k", "smoke")


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: paper), locked."""
    preset = preset or "paper"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset sim:{preset}; expected one of {PRESETS}")
    config = ConfigDict(
        {
            "data": {
                "task": "click",
                "source": "taobao",
                "path": "",
                "target": "next_item",  # rating; of ml-100k
                "order": "row",  # of equal times in ml-100k; id
                "categories": "first",  # genre of ml-100k; combination
                "split": "test",  # validation: of some training users, to tune on
                "shuffled": False,  # labels permuted: nothing can be learned
                "baselines": True,  # Base, logistic regression and DIN trained beside it
                "item_buckets": 0,  # rows that all items share by a hash; 0: one each
                "history": 500,  # last items of a user's past
                "batch": 128,
                "eval_batch": 512,
                "seed": 1234,
            },
            "net": {
                # Ids 0 (padding) and 1 (unknown) included; the task sets what it has.
                "item_vocab": 4_162_026,
                "cate_vocab": 9_441,
                "user_vocab": 987_996,
                "item_dim": 16,
                "cate_dim": 16,
                "user_dim": 0,  # 0: no table of users
                "rows_multiple": 128,  # rows of tables divide over up to so many shards
                "std": 0.0,  # of the tables' first values; 0: Glorot uniform
                "search": "soft",  # hard, average
                "k": 50,
                "skip": 100,  # most recent behaviours that the search leaves out
                "chunk": 0,  # of a two-level top-k; 0: one
                "gsu_dim": 16,
                "gsu_hidden": (200, 80),
                "gsu_pool": "sum",  # mean
                "gsu_sample": 0,  # behaviours per row of the GSU's task; 0: all
                "heads": 2,
                "head_dim": 16,
                "time_dim": 8,  # of time gaps; 0: none
                "time_buckets": 26,
                "time_unit": 1,  # seconds
                "short": 100,  # recent behaviours for DIN; 0: no short-term part
                "normalize": "softmax",  # of DIN; none, softmax_scaled
                "unit": (80, 40),
                "unit_chunk": 0,  # rows of a training step at a time; 0: all
                "unit_activation": "sigmoid",
                "hidden": (200, 80),
                "activation": "dice",
                "item_bias": False,
                "dice_decay": 0.99,
                "dice_eps": 1e-8,
            },
            "optim": {
                "name": "adam",  # adagrad, sgd
                "tables": "lazy_adam",  # row_adagrad, row_sgd, dense: as the others
                "lr": 1e-3,
                "clip": 0.0,  # global gradient norm; 0: none
            },
            "method": {
                "alpha": 1.0,  # weight of the soft search's own loss
                "beta": 1.0,
            },
            "train": {
                "steps": 5_400,  # one epoch of 70 % of the public file's users
                "accumulate": 1,
                "seed": 0,
                "eval_every": 10_000,
                "save_every": 0,
                "save_minutes": 5.0,
                "keep": 2,
                "init_from": "",
                "sample": 0,
            },
        }
    )
    if preset in ("ml100k", "smoke"):
        config.data.update(source="ml-100k", history=150, batch=512)
        config.net.update(item_vocab=1684, cate_vocab=21, user_vocab=945)
        config.net.update(item_dim=16, cate_dim=8)
        config.net.update(rows_multiple=8, std=0.05, search="hard", k=20, skip=0)
        config.net.update(gsu_hidden=(64, 32), gsu_pool="mean", heads=1, short=20)
        config.net.update(unit=(36,), hidden=(64, 32), item_bias=True)
        # The rate is the best of 2, 4 and 8e-3 on held-out training users.
        config.optim.update(tables="dense", lr=8e-3)
        # 2 epochs of 179,254 rows.
        config.train.update(steps=700, eval_every=350, save_minutes=1.0)
    if preset == "ml100k":
        config.net.unit_chunk = 64  # For CPUs.
    if preset == "smoke":
        config.optim.tables = "lazy_adam"
        config.data.update(history=50, baselines=False)
        config.optim.lr = 0.01
        config.train.update(steps=100, eval_every=0)
    return config.lock()
