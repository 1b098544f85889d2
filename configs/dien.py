"""Click models that read a user's behaviour in order: DIEN and its ablations.

    jaxpapers train dien:ml100k          AUGRU without auxiliary loss, MovieLens-100k
    jaxpapers train dien:ml100k --config.method.aux_weight=1.0    with it
    jaxpapers train dien:ml100k --config.net.variant=agru | aigru | gru
    jaxpapers train dien:smoke           a small one, < 20 s
    jaxpapers train dien                 Amazon, the released code's sizes

Gates on ml100k (task N of the next item, mean of 3 seeds, 2 epochs, AUC): without the
auxiliary loss >= .830 and >= DIN with softmax + .010; with it >= .815.
"""

from ml_collections import ConfigDict

PRESETS = ("paper", "ml100k", "smoke")


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: paper), locked."""
    preset = preset or "paper"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset dien:{preset}; expected one of {PRESETS}")
    config = ConfigDict(
        {
            "data": {
                "task": "click",
                "source": "amazon",
                "protocol": "dien",  # of amazon: who is tested, which negatives; din
                "path": "",
                "target": "next_item",  # rating; of ml-100k
                "order": "row",  # of equal times in ml-100k; id
                "categories": "first",  # genre of ml-100k; combination
                "split": "test",  # validation: of some training users, to tune on
                "shuffled": False,  # labels permuted: nothing can be learned
                "baselines": True,  # Base, logistic regression and DIN trained beside it
                "item_buckets": 0,  # rows that all items share by a hash; 0: one each
                "history": 100,  # last items of a user's past
                "batch": 128,
                "eval_batch": 512,
                "seed": 1234,
            },
            "net": {
                # Ids 0 (padding) and 1 (unknown) included; the task sets what it has.
                "item_vocab": 63_003,
                "cate_vocab": 803,
                "user_vocab": 192_405,
                "item_dim": 18,
                "cate_dim": 18,
                "user_dim": 18,  # 0: no table of users
                "rows_multiple": 128,  # rows of tables divide over up to so many shards
                "std": 0.0,  # of the tables' first values; 0: Glorot uniform
                "item_bias": False,
                "state": 36,  # width of both recurrent layers
                "variant": "augru",  # gru, aigru, agru, augru_released
                "attention": "bilinear",  # din: the released code's
                "unit": (80, 40),  # hidden layers of the latter
                "unit_chunk": 0,  # rows of a training step at a time; 0: all
                "aux": "concat",  # inner
                "aux_hidden": (100, 50),
                "pooled": "sum",  # mean, none: of the history, as input of the MLP
                "product": True,  # candidate * pooled history as further input
                "hidden": (200, 80),
                "activation": "dice",
                "dice_decay": 0.99,
                "dice_eps": 1e-8,
                "unroll": 1,  # steps of a recurrent layer per iteration of its loop
                "chunk": 0,  # steps between kept states; 0: all are kept
                "dtype": "float32",  # of products without a state; bfloat16
            },
            "optim": {
                "name": "adam",  # adagrad, sgd
                "tables": "lazy_adam",  # row_adagrad, row_sgd, dense: as the others
                "lr": 1e-3,
                "schedule": "drop",  # constant, cosine
                "drop_every": 2706,  # steps after which lr is multiplied by drop_by
                "drop_by": 0.5,
                "clip": 0.0,  # global gradient norm; 0: none
            },
            "method": {
                "aux_weight": 1.0,  # alpha
                "aux_reduce": "valid_mean",  # padded_mean, per_sample
            },
            "train": {
                "steps": 8118,  # 3 epochs of 346,325 rows (Electronics)
                "accumulate": 1,
                "seed": 0,
                "eval_every": 2706,
                "save_every": 0,
                "save_minutes": 5.0,
                "keep": 2,
                "init_from": "",
                "sample": 0,
            },
        }
    )
    if preset in ("ml100k", "smoke"):
        config.data.update(source="ml-100k", history=50, batch=512)
        config.net.update(item_vocab=1684, cate_vocab=21, user_vocab=945)
        config.net.update(item_dim=16, cate_dim=8, user_dim=0, rows_multiple=8)
        config.net.update(std=0.05, item_bias=True, state=24, pooled="mean")
        config.net.update(product=False, hidden=(64, 32), aux_hidden=(50,))
        # The rate is the best of 2, 4 and 8e-3 on held-out training users.
        config.optim.update(tables="dense", lr=8e-3, schedule="constant")
        config.method.aux_weight = 0.0
        # 2 epochs of 179,254 rows.
        config.train.update(steps=700, eval_every=350, save_minutes=1.0)
    if preset == "smoke":
        config.optim.tables = "lazy_adam"
        config.data.update(history=20, batch=256, baselines=False)
        config.method.aux_weight = 1.0
        config.optim.lr = 0.01
        config.train.update(steps=100, eval_every=0)
    return config.lock()
