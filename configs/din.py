"""Click models on users' behaviour: DIN, and the model without attention beside it.

    jaxpapers train din:ml100k           DIN, softmax weights, MovieLens-100k
    jaxpapers train din:ml100k --config.net.pooling=mean     the Base model
    jaxpapers train din:smoke            a small one
    jaxpapers train din | din:released   Amazon Electronics, the paper's and the code's

Gates on ml100k (task N of the next item, mean of 3 seeds, 3 epochs, AUC): Base >= .795,
DIN with softmax >= .812 and >= Base + .005.
"""

from ml_collections import ConfigDict

PRESETS = ("paper", "released", "ml100k", "smoke")


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: paper), locked."""
    preset = preset or "paper"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset din:{preset}; expected one of {PRESETS}")
    config = ConfigDict(
        {
            "data": {
                "task": "click",
                "source": "amazon",
                "protocol": "din",  # of amazon: who is tested, which negatives; dien
                "path": "",
                "target": "next_item",  # rating; of ml-100k
                "order": "row",  # of equal times in ml-100k; id
                "categories": "first",  # genre of ml-100k; combination
                "split": "test",  # validation: of some training users, to tune on
                "shuffled": False,  # labels permuted: nothing can be learned
                "baselines": True,  # Base, logistic regression and DIN trained beside it
                "item_buckets": 0,  # rows that all items share by a hash; 0: one each
                "history": 100,  # last items of a user's past
                "batch": 32,
                "eval_batch": 512,
                "seed": 1234,
            },
            "net": {
                # Ids 0 (padding) and 1 (unknown) included; the task sets what it has.
                "item_vocab": 63_003,
                "cate_vocab": 803,
                "user_vocab": 192_405,
                "item_dim": 64,
                "cate_dim": 64,
                "user_dim": 0,  # 0: no table of users
                "rows_multiple": 128,  # rows of tables divide over up to so many shards
                "std": 0.0,  # of the tables' first values; 0: Glorot uniform
                "pooling": "attention",  # mean, sum: the Base model
                "normalize": "none",  # softmax, softmax_scaled
                "unit": (80, 40),
                "unit_chunk": 0,  # rows of a training step at a time; 0: all
                "unit_activation": "sigmoid",
                "hidden": (80, 40),
                "activation": "dice",
                "item_bias": True,
                "product": False,  # candidate * pooled history as further input
                "project": 0,  # width of a linear map after pooling; 0: none
                "affine": False,  # the released code's frozen batch normalisation
                "dice_decay": 0.99,
                "dice_eps": 1e-8,
                "dice_padding": False,  # padding in Dice's statistics
                "dtype": "float32",  # of the unit's products; bfloat16
            },
            "optim": {
                "name": "sgd",  # adam, adagrad
                "tables": "row_sgd",  # lazy_adam, row_adagrad, dense: as the others
                "lr": 1.0,
                "schedule": "drop",  # constant, cosine
                "drop_at": (336_000,),  # steps after which lr is multiplied by drop_by
                "drop_by": 0.1,
                "clip": 0.0,  # global gradient norm; 0: none
            },
            "method": {
                "mba": 0.0,  # lambda of the mini-batch aware L2; paper: 0.01 (Alibaba)
            },
            "train": {
                "steps": 815_000,  # 10 epochs of 2.6 M rows
                "accumulate": 1,
                "seed": 0,
                "eval_every": 80_000,
                "save_every": 0,
                "save_minutes": 5.0,
                "keep": 2,
                "init_from": "",
                "sample": 0,
            },
        }
    )
    if preset == "released":
        config.net.update(normalize="softmax_scaled", activation="sigmoid")
        config.net.update(product=True, project=128, affine=True)
        config.optim.clip = 5.0
    elif preset in ("ml100k", "smoke"):
        config.data.update(source="ml-100k", history=50, batch=512)
        config.net.update(
            item_vocab=1684, cate_vocab=21, user_vocab=945, item_dim=16, cate_dim=8
        )
        config.net.update(rows_multiple=8, unit=(36,), hidden=(64, 32))
        config.net.update(normalize="softmax", std=0.05)
        # A small table: every row moves, as in the runs that the gates are from. The rate
        # is the best of 1, 2, 4, 8 and 16e-3 on held-out training users.
        config.optim.update(name="adam", tables="dense", lr=8e-3)
        config.optim.schedule = "constant"
        # 3 epochs of 179,254 rows.
        config.train.update(steps=1050, eval_every=350, save_minutes=1.0)
    if preset == "ml100k":
        config.net.unit_chunk = 64  # For CPUs.
    if preset == "smoke":
        config.data.baselines = False
        config.optim.tables = "lazy_adam"
        config.optim.lr = 0.01
        config.train.update(steps=100, eval_every=0)
    return config.lock()
