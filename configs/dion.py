"""Language models trained with Dion, and the same model with AdamW and Muon.

    jaxpapers run dion                 default: two to six minutes on 2 cores
    jaxpapers run dion:paper           the same without what is not in the paper
    jaxpapers run dion:smoke           a few steps
    jaxpapers run dion:standard        30 minutes
    jaxpapers run dion:adamw | dion:muon    the default model, other optimizers
    jaxpapers run dion:160m --config.data.path=SHARDS   the paper's model
    jaxpapers plan dion:3b --topology v5p:8x8x8 --mesh data:64,model:8
                                         3.1 B parameters, for pods

Expected: see docs/results.md, whose numbers these presets and benchmarks/ produce.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.papers import dion

PRESETS = ("default", "paper", "smoke", "standard", "adamw", "muon", "160m", "3b")
# Bits per byte that the paper's own row ends with; seeds and processors differ.
EXPECTED = {"default": 1.65, "paper": 1.73, "smoke": 3.53}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: default), locked."""
    preset = preset or "default"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset dion:{preset}; expected one of {PRESETS}")
    config = ConfigDict(
        {
            "data": {
                "task": "language_model",
                "path": "",  # text file, folder or *.bin shards; "": standard library
                "validation_fraction": 0.05,
                "context": 128,
                "batch": 8,
                "eval_batch": 64,
                "overlap": 0.5,  # of an evaluation's windows: read before what is scored
                "quick_tokens": 16_384,  # of an evaluation during training
                "seed": 0,
            },
            "net": dataclasses.asdict(dion.Net()),
            "optim": {
                "name": "dion",  # dion2, muon, normuon; baselines: optax_muon, adamw
                "lr": 0.01,
                "scalar_lr": 0.01,  # for all other parameters; 0 uses lr
                "weight_decay": 0.01,
                "cautious_weight_decay": False,  # only where the update agrees
                "schedule": "trapezoid",  # constant, cosine
                "warmup": 0.0,  # shares of the run
                "cooldown": 0.8,
                "clip": 1.0,  # global gradient norm; 0: none
                "rank_fraction": 0.25,  # of dion; of dion2, its share of rows
                "rank_multiple_of": 1,
                "rank_schedule": "",  # "1000:0.125,2000:0.5": other ranks from steps on
                "mu": 0.95,
                "orthogonalize": "scqr",
                "right_factor": "colnorm",  # orth: Orth-Dion
                "nesterov": True,  # of dion and muon: the momentum one step ahead
                "residual": 1.0,  # of dion: weight of what the rank leaves out; 0: none
                "normalize_rows": True,  # of dion: equal steps for all outputs
                "momentum_dtype": "",  # "": float32, as the parameters
                "q_dtype": "",
                "communication_dtype": "",  # of P, and what replicas average; "": float32
                "precision": "",  # of large products on TPUs: default, high, highest
                "scalar": "adamw",
                "b1": 0.9,
                "b2": 0.95,
            },
            "train": blocks.train(
                2800,
                eval_every=700,
                save_minutes=1.0,
                sample=400,  # bytes
                replica_sync="gradient",  # lowrank: replicas average P and R
                replica_axis="replica",  # mesh axis of these replicas, or slice
                prompt="def ",
                temperature=0.7,
            ),
        }
    )
    if preset in ("paper", "160m", "3b"):
        config.optim.update(nesterov=False, residual=0.0, normalize_rows=False)
    if preset in ("smoke", "standard"):
        config.optim.update(cooldown=0.4)
    if preset == "smoke":
        config.data.update(context=64, quick_tokens=4096, validation_fraction=0.01)
        config.net.update(width=64, layers=1, heads=2, unroll=1)
        config.train.update(steps=100, eval_every=0, sample=80, alone=True)
    elif preset == "standard":
        config.data.update(context=256)
        config.net.update(width=192, layers=6, heads=3, unroll=6)
        config.train.update(steps=3000, eval_every=500, save_minutes=5.0)
    elif preset == "adamw":
        config.optim.update(name="adamw", lr=0.002, scalar_lr=0.0)
    elif preset == "muon":
        config.optim.update(name="optax_muon")
    elif preset == "160m":
        config.data.update(context=1024, batch=1024, eval_batch=64)
        config.net.update(vocab_size=50304, width=768, layers=12, heads=6, unroll=1)
        config.net.update(dtype="bfloat16", remat=True)
        config.optim.update(lr=0.02, scalar_lr=0.0, scalar="lion", b2=0.98)
        config.optim.update(rank_fraction=0.5, cooldown=0.2, clip=0.0, b1=0.95)
        config.train.update(steps=3000, eval_every=250, save_minutes=20.0, sample=0)
    elif preset == "3b":
        config.data.update(context=2048, batch=1024, eval_batch=256)
        config.net.update(vocab_size=50304, width=3072, layers=28, heads=24)
        config.net.update(kv_heads=8, hidden=8192, rope_theta=500_000.0, unroll=1)
        config.net.update(dtype="bfloat16", remat=True)
        config.optim.update(lr=0.01, scalar_lr=0.002, warmup=0.01, cooldown=0.2)
        config.train.update(steps=30_000, eval_every=1000, save_minutes=20.0, sample=0)
    return config.lock()
