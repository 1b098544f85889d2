"""Meshes for the optimizer's tests: a fixture, since test modules share no package."""

import jax
import pytest
from jax.sharding import AxisType

NAMES = ("data", "model", "expert")


@pytest.fixture(scope="session")
def make_mesh():
    """(sizes, "Auto" or "Explicit") -> mesh of that many leading devices."""

    def make(sizes, kind="Auto"):
        count = 1
        for size in sizes:
            count *= size
        return jax.make_mesh(
            sizes,
            NAMES[: len(sizes)],
            axis_types=(AxisType[kind],) * len(sizes),
            devices=jax.devices()[:count],
        )

    return make
