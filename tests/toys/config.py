"""Configs of the toy papers."""

from ml_collections import ConfigDict

from jaxpapers import blocks


def get_config(preset=None):
    """``line`` trains, ``none`` does not."""
    if preset == "none":
        data = {"task": "constants", "path": "", "scale": 1.0}
        return ConfigDict({"data": data}).lock()
    method = {
        "staged": False,
        "half": False,
        "parts": False,
        "others": False,
        "mined": 0,
        "drawn": False,
    }
    return ConfigDict(
        {
            "data": {"task": "lines", "batch": 8},
            "optim": {"lr": 0.1},
            "method": method,
            "train": blocks.train(8),
        }
    ).lock()
