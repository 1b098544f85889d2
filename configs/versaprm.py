"""Process reward models of several domains on solutions with exact labels.

    jaxpapers run versaprm           multi-domain and math-only models, 20 minutes each
    jaxpapers run versaprm:smollm2   SmolLM2-135M (fetched once, 98 MB) tuned by adapters
        on generated solutions in text and on its own; --config.data.path=FILE adds those
        of a file, of the form --config.data.kind (pip install 'jaxpapers[language]')
    jaxpapers run versaprm:smoke     a few steps
    jaxpapers run versaprm:paper     the paper's sizes (an accelerator)

The fields of the group ``net`` are described at ``Net`` of
``jaxpapers.papers.versaprm.network``.

Goals, 3 seeds: AUC of steps >= 0.9 in the domains of training; the multi-domain model
above the math-only one on the others; weighted majority (min) of 16 solutions 5 points
above the majority, which the chance of an error is chosen to have right in about 60 %.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers import blocks
from jaxpapers.ops import reasoning
from jaxpapers.papers import versaprm

PRESETS = ("default", "smollm2", "paper", "smoke")
# Weighted majority of 16 solutions; seeds and processors differ.
EXPECTED = {"smoke": 0.5}
DOMAINS = ("arithmetic", "dates", "logic", "sets")


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: default), locked."""
    preset = preset or "default"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset versaprm:{preset}; expected one of {PRESETS}")
    words = reasoning.VOCABULARY
    net = versaprm.Net(
        vocab_size=len(words), width=128, layers=4, heads=4, plus=words["+"],
        minus=words["-"], separator=words[reasoning.STEP], unroll=4,
    )  # fmt: skip
    net = dataclasses.asdict(net)
    del net["vocab_size"]  # Of the data.
    config = ConfigDict(
        {
            "data": {
                "task": "process_rewards",
                "path": "",  # none: solutions are generated
                "domains": DOMAINS,  # of the training
                "test_domains": tuple(reasoning.DOMAINS),  # of the test
                "steps": (2, 4),  # operations of a problem, fewest and most
                "below": 100,  # bound of operands and of right numbers
                "options": 4,  # of a question
                "error": 0.34,  # chance that the solver errs in a step
                "habit": 0.5,  # share of errors that a problem always provokes
                "errors": reasoning.ERRORS,  # their types
                "label_last_n": 0,  # labelled words of a step; the paper: 1
                # 0: all words, each by whether the step is right up to there
                "length": 128,  # tokens of a row, in which several solutions are
                "batch": 8,  # rows
                "examples": 17,  # solutions that are put into them
                "eval_length": 128,  # tokens of a row of the test
                "eval_batch": 64,
                "questions": 100,  # of each test domain
                "solutions": 16,  # N
                "how": "min",  # aggregation of a solution's steps
                "search_questions": 10,  # of each domain; 0: no search
                "seed": 0,
            },
            "net": net,
            "method": {
                "objective": "process",  # language: the base model
                "language": 1.0,  # weight of the next token's loss; the paper: 0
            },
            "base": {"steps": 0, "lr": 0.01},  # language model that both start from
            "optim": {
                "name": "muon",  # of AdamW's steps it takes half as many
                "lr": 0.01,
                "weight_decay": 0.01,
                "clip": 1.0,
                "schedule": "trapezoid",
                "warmup": 0.05,
                "cooldown": 0.5,
            },
            "train": blocks.train(12000),
        }
    )
    if preset == "paper":
        config.data.update(
            batch=32, length=750, examples=32, solutions=128, label_last_n=1,
            domains=tuple(reasoning.DOMAINS),
        )  # fmt: skip
        config.net.update(
            width=4096, layers=32, heads=32, kv_heads=8, hidden=14336, unroll=1,
            rope_theta=500_000.0, epsilon=1e-5, dtype="bfloat16", remat=True,
            lora_rank=16, lora_alpha=32.0, lora_dropout=0.1,
        )  # fmt: skip
        config.method.language = 0.0
        config.optim.update(
            name="adamw", lr=1e-4, b2=0.999, schedule="cosine", warmup=0.1, cooldown=0.0
        )
        config.train.update(steps=2628)  # 84,096 solutions, an epoch of the paper's.
    elif preset == "smollm2":
        _smollm2(config)
    elif preset == "smoke":
        config.data.update(
            batch=16, examples=24, questions=4, solutions=4, eval_batch=16,
            test_domains=("arithmetic", "logic"), domains=("arithmetic", "logic"),
            search_questions=1,
        )  # fmt: skip
        config.net.update(width=32, heads=2, layers=2, unroll=2)
        config.train.update(steps=20, alone=True)
    return config.lock()


def _smollm2(config: ConfigDict) -> None:
    """A real language model, its sizes and its tokens."""
    c = config.data
    config.data = {
        "task": "process_texts",
        "model": "smollm2-135m",  # or a folder, or a GGUF file
        "vocab_size": 49152,
        "path": "",  # file of labelled solutions to train on too
        "kind": "nested",  # of the file: prm800k, math-shepherd, trl, processbench
        "domains": DOMAINS,
        "test_domains": (*DOMAINS, "equations", "units"),
        "write_domain": "arithmetic",  # of the solutions that the model writes
        "generated": 400,  # solutions to train on
        "written": 96,  # solutions to train on that the model writes
        "temperature": 0.7,  # of writing
        "steps": (2, 3),
        "below": 20,
        "options": 4,
        "error": c.error,
        "habit": c.habit,
        "errors": c.errors,
        "label_last_n": 1,
        "length": 128,
        "batch": 4,
        "eval_length": 256,
        "eval_batch": 4,
        "questions": 12,  # of each test set
        "solutions": 4,
        "search_questions": 3,
        "seed": 0,
    }
    config.net.update(
        width=576, layers=30, heads=9, kv_heads=3, hidden=1536, tied=True, unroll=1,
        rope_theta=100_000.0, epsilon=1e-5, plus=27, minus=29, separator=22342,
        lora_rank=8, lora_alpha=16.0,
    )  # fmt: skip
    config.method.language = 0.0
    del config.base
    config.optim.update(name="adamw", lr=3e-4, weight_decay=0.0, warmup=0.1)
    config.train.update(steps=60)
