"""DNW: a learning order of Chinese characters, and of any network of parts.

    jaxpapers run dnw                    3,500 common characters by IDS, HSK 3.0 beside
    jaxpapers run dnw NETWORK.csv        a network of your own; columns: docs/dnw.md
    jaxpapers run dnw:gb2312             the 3,755 common characters of GB 2312
    jaxpapers run dnw:decomp | dnw:chaizi    other decompositions
    jaxpapers run dnw:smoke              30 characters, seconds

Nothing is trained. Expected cost to 90 % of running text, in components learned under
``transient`` credit: 3,134 by DNW (b = .35), 5,073 by frequency; areas .736 and .653.
"""

from ml_collections import ConfigDict

PRESETS = ("paper", "gb2312", "decomp", "chaizi", "smoke")
# Cost to 90 % of usage; nothing is drawn.
EXPECTED = {"paper": 3134, "smoke": 26}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: paper), locked."""
    preset = preset or "paper"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset dnw:{preset}; expected one of {PRESETS}")
    config = ConfigDict(
        {
            "data": {
                "task": "characters",
                "path": "",  # CSV of a network; instead of all below
                "close": False,  # of path: components without a row become primitives
                "source": "ids",  # cjk-decomp, chaizi, example
                "seeds": "frequent",  # gb2312
                "count": 3500,  # of the most frequent characters
                "grades": True,  # HSK 3.0 levels as a graded order
            },
            "method": {
                "b": 0.35,  # weight exponent of the learning order
                "others": (0.1, 0.2, 0.5, 1.0),  # rows of the table
                "sweep": 21,  # values of b from 0 to 1 in the figure
                "use_multiplicity": False,  # a component counts as often as it occurs
                "credit": "transient",  # learn
                "cost": "parts",  # or combinations
                "primitive": "unit",  # strokes, tenth_strokes: 1 + strokes / 10
            },
            "fit": {  # b per level
                "steps": 60,  # 0: no such row
                "lr": 0.1,  # learning rate
                "tau": 0.3,  # temperature of the soft ranks
                "top": 2000,  # characters whose cost is minimised
            },
        }
    )
    if preset == "gb2312":
        config.data.seeds = "gb2312"
    elif preset in ("decomp", "chaizi"):
        config.data.source = "cjk-decomp" if preset == "decomp" else preset
    elif preset == "smoke":
        config.data.source = "example"
        config.method.sweep = 5
        config.fit.steps = 0
    return config.lock()
