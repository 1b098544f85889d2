"""R3-VAE, a reconstruction: semantic IDs of items, and retrieval by generating them.

    jaxpapers run r3_vae               MovieLens-100k, vectors of titles, 10 rows
    jaxpapers run r3_vae:tokenizers    the tokenizers alone, without a recommender
    jaxpapers run r3_vae:equations     ratings as transcribed: their softmax, tau 1
    jaxpapers run r3_vae:amazon --config.data.path=FOLDER    the paper's data and sizes
    jaxpapers run r3_vae:recboard --config.data.path=FOLDER  a public implementation's
    jaxpapers run r3_vae:smoke         a generated catalogue, seconds

Vectors are those of all-MiniLM-L6-v2, fetched once (90 MB) and cached, unless the folder
has ``vectors.npy``. The fields of ``tokenizer``, ``net`` and ``method`` are described at
``Tokenizer``, ``Net`` and ``Retrieval`` of ``jaxpapers.papers.r3_vae``. The tokenizer is
trained first, as a stage of the run, by the group ``pretrain``.

Gates, 3 seeds, fixed before the runs. ml-100k: recall@10 >= .10, above popularity and
random SIDs; above Markov is a stretch. tokenizers: soft tau .05 unique >= .96, usage
>= .94 and perplexity >= 50 at every level; mp unique >= .955, usage 1, perplexity >= 48,
PD <= -1.75, SC of item vectors >= .79; spread of unique over seeds <= .02 for both; top1
unique >= .93, PD <= -1.5.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.papers import r3_vae

PRESETS = ("ml-100k", "equations", "tokenizers", "amazon", "recboard", "smoke")
EXPECTED = {"ml-100k": 0.121, "smoke": 0.09}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: ml-100k), locked."""
    preset = preset or "ml-100k"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset r3_vae:{preset}; expected one of {PRESETS}")
    # Matching pursuit: ours, the transcribed equations are the preset "equations".
    tokenizer = r3_vae.Tokenizer(quantizer="mp", codes=64)
    config = ConfigDict(
        {
            "data": {
                "task": "semantic_ids",
                "source": "ml-100k",  # generated, amazon, p5, csv
                "path": "",
                "core": 5,  # least events of a user and of an item
                "count": 1682,  # items of generated; of others what a plan assumes
                "batch": 32,  # windows of a step
                "eval_batch": 41,
                "split": "test",  # validation
                "rows": (
                    "all",
                ),  # labels of the rows trained beside the first; (): none
                "seed": 0,
            },
            "tokenizer": dataclasses.asdict(tokenizer),
            "net": dataclasses.asdict(
                r3_vae.Net(history=12, width=48, layers=2, heads=2)
            ),
            "pretrain": {
                "batch": 512,
                "steps": 300,
                "eval_every": 0,
                "optim": {
                    "name": "adamw",
                    "lr": 5e-3,
                    "weight_decay": 1e-5,
                    "schedule": "constant",
                },
            },
            "optim": {
                "name": "adamw",
                "lr": 4e-3,
                "weight_decay": 0.1,
                "schedule": "cosine",
                "clip": 1.0,
            },
            "method": {
                "stage": "retrieve",  # tokenize
                **dataclasses.asdict(
                    r3_vae.Retrieval(exclude_seen=True, collision_codes=128, restarts=3)
                ),
            },
            "train": blocks.train(500, eval_every=0),
        }
    )
    if preset == "equations":
        config.tokenizer.quantizer = "soft"
    elif preset == "tokenizers":
        return _tokenizers(config)
    elif preset in ("amazon", "recboard"):
        _amazon(config, preset)
    elif preset == "smoke":
        config.data.update(source="generated", count=400, batch=32, eval_batch=40)
        config.data.rows = ()
        config.tokenizer.update(features=16, codes=16, levels=2)
        config.method.collision_codes = 64
        config.net.update(history=10, width=32, layers=1)
        config.pretrain.update(batch=128, steps=50)
        config.train.update(steps=100, eval_every=0, alone=True)
    return config.lock()


def _tokenizers(config: ConfigDict) -> ConfigDict:
    """The stage before alone, as a comparison of tokenizers."""
    del config.net, config.method, config.optim
    own = config.pretrain
    config.optim, config.method = own.optim, {"stage": "tokenize"}
    config.data.batch = own.batch
    config.train.update(steps=own.steps)
    del config.pretrain
    for field in ("eval_batch", "split"):
        del config.data[field]
    return config.lock()


def _amazon(config: ConfigDict, preset: str) -> None:
    """Sizes of the transcriptions, and of the public code."""
    config.data.update(source="amazon", count=12_101, batch=256, eval_batch=64)
    config.tokenizer.update(quantizer="soft", codes=256)
    config.net.update(width=128, layers=4, heads=4)
    config.pretrain.update(batch=1024, steps=20_000)
    config.pretrain.optim.lr = 5e-4
    config.method.exclude_seen = False
    config.optim.lr = 1e-3
    config.train.update(steps=100_000, eval_every=5000)
    if preset == "recboard":
        d = config.tokenizer.features
        config.tokenizer.update(
            quantizer="top1", decoder=(4 * d,), loss="cosine", sc=0.1, pd=0.05,
            sc_form="levels", balanced=True, restarts=10,
        )  # fmt: skip
        config.pretrain.steps = 100_000
