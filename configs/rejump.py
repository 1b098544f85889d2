"""ReJump: metrics of reasoning traces, of search programs or of your own.

    jaxpapers run rejump                   five search programs on the 1,362 puzzles
    jaxpapers run rejump TRACE.json ...    your traces: metrics, similarities, drawings
    jaxpapers run rejump:smoke             twelve puzzles, seconds

Nothing is trained. Texts instead of traces need a language model, ``chat.model``: see
docs/reasoning_traces.md.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxpapers.papers.rejump.search import Options

PRESETS = ("paper", "smoke")
# Share of puzzles that the sample with the longest jumps solves.
EXPECTED = {"paper": 0.062, "smoke": 0.083}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: paper), locked."""
    preset = preset or "paper"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset rejump:{preset}; expected one of {PRESETS}")
    config = ConfigDict(
        {
            "data": {
                "task": "reasoning",
                "path": (),  # files of traces or texts; instead of the puzzles
                "strict": True,  # False: measure walks that are broken, and say so
                "count": 1362,  # puzzles
                "seed": 0,
            },
            "search": dataclasses.asdict(Options()),
            "method": {
                "order": "walk",  # of the leaves; reference_math: by name
                "samples": 8,  # of the weak searcher for each puzzle
                "leaves": 8,  # that the weak searcher visits before it gives up
                "held_out": 1000,  # texts for the rule extractor
                "penalty": 1e-3,  # of the classifiers' weights, squared
                "replicates": 2000,  # of the bootstrap
            },
            "chat": {  # reads texts that are no search traces
                "model": "",  # name at the endpoint; local: SmolLM2, for a try-out
                "url": "https://api.openai.com/v1",  # any OpenAI-compatible endpoint
                "key": "OPENAI_API_KEY",  # environment variable; "": none is needed
                "kind": "math",  # of the texts' problems: math, game24
                "max_tokens": 8192,  # of a reply
                "retries": 4,  # of a request, after transient failures
                "repairs": 4,  # of a reply that does not pass its checks
                "workers": 4,  # requests at a time
                "cache": "runs/rejump-replies",  # folder of the replies
                "recorded": False,  # send nothing: every reply is in the cache
                "budget": 0,  # tokens; 0: no limit
                "price": (0.0, 0.0),  # of a million prompt tokens, of replies' tokens
            },
        }
    )
    if preset == "smoke":
        config.data.count = 12
        config.method.update(leaves=12, held_out=20, replicates=50)
    return config.lock()
