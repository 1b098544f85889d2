"""Packages that only some uses need, and the extra of jaxpapers that brings each."""

import contextlib
import importlib.util
from collections.abc import Generator

EXTRAS = {
    "matplotlib": "plot", "tensorboardX": "tb", "wandb": "wandb",
    "trackio": "trackio", "PIL": "emoji",
    "fontTools": "emoji", "libtpu": "tpu", "gymnasium": "rl", "gymnasium_robotics": "rl",
    "mujoco": "rl", "glfw": "rl", "h5py": "rl", "minari": "rl",
    "tokenizers": "language", "openai": "language",
}  # fmt: skip


def text(module: str) -> str:
    """How to get a module that is missing."""
    top = module.partition(".")[0]
    install = (
        f"pip install 'jaxpapers[{EXTRAS[top]}]'" if top in EXTRAS else "install it"
    )
    return f"{top} is not installed: {install}"


def need(module: str) -> None:
    """Raises ModuleNotFoundError, with the extra, where a module is missing."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(text(module), name=module)


@contextlib.contextmanager
def named() -> Generator[None, None, None]:
    """Imports inside it that fail name the extra."""
    try:
        yield
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] not in EXTRAS:
            raise
        raise ModuleNotFoundError(text(e.name), name=e.name) from None
