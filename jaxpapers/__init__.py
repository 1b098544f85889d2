"""jaxpapers: the systems of 20 papers in JAX, with the Dion optimizer as centrepiece."""

from typing import TYPE_CHECKING

__version__ = "0.2.0.dev0"
__all__ = ["__version__", "dion"]

if TYPE_CHECKING:
    from jaxpapers.optim import dion


def __getattr__(name: str):
    # Lazy: `jaxpapers --version` and `--help` must not import jax.
    if name == "dion":
        from jaxpapers.optim import dion

        return dion
    raise AttributeError(f"module 'jaxpapers' has no attribute {name!r}")
