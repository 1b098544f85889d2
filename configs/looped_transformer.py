"""Looped transformers: trained on short problems, tested on long ones.

    jaxpapers run looped_transformer             parity to length 10, tested to 40
    jaxpapers run looped_transformer:copy        copy to length 8, tested to 32
    jaxpapers run looped_transformer:PROBLEM-20  the paper's scale: lengths to 20, width
                                                 256 (a GPU); PROBLEM is parity, copy,
                                                 addition, sum_reverse, multi or dict
    jaxpapers run looped_transformer:smoke       a few steps

The fields of the group ``net`` are described at ``Net`` of
``jaxpapers.papers.looped_transformer``.

Goal, 3 seeds, parity to length 10: exact match at length 20 of 0.95 or more, where models
of the next token are near chance, 0.5.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.ops import algorithmic
from jaxpapers.papers import looped_transformer as looped

SCALED = tuple(f"{name}-20" for name in algorithmic.NAMES)
PRESETS = ("parity", "copy", *SCALED, "smoke")
# Exact match at twice the training length; seeds and processors differ.
EXPECTED = {"smoke": 0.5}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: parity), locked."""
    preset = preset or "parity"
    if preset not in PRESETS:
        raise ValueError(
            f"unknown preset looped_transformer:{preset}; expected one of {PRESETS}"
        )
    net = dataclasses.asdict(looped.Net(width=128, heads=4))
    del net["vocab_size"]  # Of the problem.
    config = ConfigDict(
        {
            "data": {
                "task": "algorithms",
                "path": "",  # none: problems are drawn
                "problem": "parity",  # copy, addition, sum_reverse, multi, dict
                "layout": "full",  # next: the next token is predicted
                "pauses": 0,  # next: tokens between query and answer
                "length": 10,  # largest in training
                "first": 5,  # largest at the start of the curriculum
                "rule": "accuracy",  # interval: it grows by 1 every so many steps
                "interval": 50,  # accuracy: steps between looks at the largest length
                "mixed": True,  # a length for each row, not one for the batch
                "operand": 2,  # multi: largest length of the first operand
                "alphabet": 50,  # dict: symbols
                "buckets": 4,  # programs of a step, for short and for long batches
                "batch": 64,
                "eval_batch": 256,
                "eval_count": 1024,  # test problems of each length
                "lengths": (),  # tested; (): shares of the largest in training
                "extra_loops": 10,  # steps after T(n) among which the surest is sought
                "tolerance": 0.05,  # of the fixed point, share of the state's norm
                "baselines": True,  # train those of the group beside the model
                "seed": 0,
            },
            "net": net,
            "baselines": {
                "rows": ("without injection", "NTP", "NTP-loop"),  # NTP-pause
                "depth": 10,  # layers of NTP
                "pauses": 20,  # of NTP-pause, between query and answer
            },
            "optim": {
                "name": "adamw",
                "lr": 1e-3,
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 0.01,
                "clip": 1.0,
                "schedule": "cosine",
                "hold": 1000,  # steps at the full rate, those of the curriculum
            },
            # Parts of 16 rows take less memory, and less time on a CPU.
            "train": blocks.train(1600, eval_every=400, accumulate=4),
        }
    )
    if preset == "copy":
        # A length of 5 is not learned at once, unlike parity's, and needs a lower rate.
        config.data.update(problem="copy", length=8, first=1)
        config.net.layers = 2
        config.optim.update(lr=5e-4, hold=3000)
        config.train.update(steps=4000, eval_every=1000)
    elif preset in SCALED:
        problem = preset.removesuffix("-20")
        layers = algorithmic.DEPTHS[problem]
        interval = {"addition": 1600, "multi": 500}.get(problem, 1000)
        config.data.update(
            problem=problem, length=20, rule="interval", interval=interval, first=1,
            mixed=False,
        )  # fmt: skip
        config.data.buckets = 20
        config.net.update(width=256, heads=8, layers=layers)
        config.optim.update(lr=1e-4, clip=0.0, hold=20 * interval)
        config.baselines.update(
            rows=("without injection", "NTP", "NTP-pause", "NTP-loop"),
            depth=20 * layers,
        )
        config.train.update(steps=100_000, eval_every=2000, accumulate=1)
    elif preset == "smoke":
        config.data.update(
            length=3, first=1, mixed=False, rule="interval", interval=10, buckets=1,
            eval_batch=64, eval_count=64, lengths=(3,), extra_loops=2,
        )  # fmt: skip
        config.net.update(width=32, heads=4)
        config.optim.hold = 20
        config.train.update(steps=40, eval_every=0, alone=True, accumulate=1)
    return config.lock()
