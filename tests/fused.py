"""Optimizers on fused leaves and their runs: see ``jaxpapers.optim.fused``."""

import functools

import jax
import numpy as np
import pytest

from jaxpapers.optim import scale_by_dion, scale_by_dion2, scale_by_muon
from tests.programs import together

# Cholesky loops cost a compiler seconds, and are not what is tested.
dion_direction = functools.partial(scale_by_dion, orthogonalize="cqr2")
AHEAD = {"nesterov": True, "residual": 1.0, "normalize_rows": True}
MAKERS = {
    "dion": functools.partial(dion_direction, 0.5),
    "ahead": functools.partial(dion_direction, 0.25, **AHEAD),
    "orth": functools.partial(dion_direction, 0.5, right_factor="orth", scale="rms"),
    "muon": functools.partial(scale_by_muon, nesterov=True),
    "normuon": functools.partial(scale_by_muon, b2=0.9, scale="rms"),
    "dion2": functools.partial(scale_by_dion2, 0.5),
}


def normal(seed, *shape, dtype=np.float32):
    """A normal matrix."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def train(tx, gradients):
    """Updates of all steps, and the state after them."""

    def run(gradients):
        def step(state, g):
            return tx.update(g, state)[::-1]

        first = jax.tree.map(lambda g: g[0], gradients)
        return jax.lax.scan(step, tx.init(first), gradients)[::-1]

    updates, state = together(run, jax.tree.map(lambda *x: np.stack(x), *gradients))
    return [
        jax.tree.map(lambda x, t=t: x[t], updates) for t in range(len(gradients))
    ], state


def in_turn(few, *some):
    """Rows of some optimizers on few leaves, and in the matrix of all on all leaves."""
    rows = [pytest.param(*x, few, id="-".join([*x, "few"])) for x in some]
    kinds = [()] if len(some[0]) == 1 else [("Auto",), ("Explicit",)]
    return rows + [
        pytest.param(name, *kind, None, marks=pytest.mark.matrix)
        for name in MAKERS
        for kind in kinds
    ]


def close(got, want, atol=5e-6):
    """Asserts that two trees agree."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), got, want
    )
