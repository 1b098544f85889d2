"""LAPACK on stacks of matrices, as on each by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import linalg
from jaxpapers.ops.linalg import per_matrix
from tests.programs import together


@pytest.mark.parametrize("stack", [(), (1,), (2, 3)])
def test_each_matrix_by_itself(stack):
    x = np.random.default_rng(0).normal(size=(*stack, 5, 4))
    gram = (np.swapaxes(x, -1, -2) @ x + np.eye(4)).astype(np.float32)
    right = x[..., :4, :2].astype(np.float32)

    def body(gram, right):
        lower = per_matrix(jnp.linalg.cholesky, gram)
        return lower, per_matrix(lambda a, b: (a @ b, a[0]), gram, right)

    lower, (product, row) = together(body, gram, right)
    np.testing.assert_allclose(lower, np.linalg.cholesky(gram), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(product, gram @ right, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(row, gram[..., 0, :])


@pytest.mark.parametrize(
    "spec, x, y",
    [
        ("ls,sr->lr", (2, 24, 6), (2, 6, 5)),
        ("sl,sr->lr", (2, 6, 24), (2, 6, 5)),
        ("lr,sr->sl", (1, 7, 5), (1, 16, 5)),
        ("ls,lr->sr", (2, 3, 7, 12), (2, 3, 7, 5)),
        ("lr,ls->rs", (2, 9, 7), (2, 9, 7)),  # An odd number of rows: one piece.
    ],
)
def test_products_in_pieces_are_those_of_the_whole(monkeypatch, spec, x, y):
    """The form for a TPU, run here."""
    monkeypatch.setattr(linalg, "WORTH_A_LOOP", 1)
    monkeypatch.setattr(linalg, "WORTH_PIECES", 100)
    monkeypatch.setattr(linalg, "PIECE", 100)
    monkeypatch.setattr(linalg, "LEAST_ROWS", 2)
    monkeypatch.setattr(
        linalg.lax, "platform_dependent", lambda *xs, tpu, default: tpu(*xs)
    )
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s).astype(np.float32) for s in (x, y))
    got = jax.jit(linalg.stack_product, static_argnums=0)(spec, a, b)
    left, right = spec.split("->")
    first, second = left.split(",")
    want = np.einsum(f"...{first},...{second}->...{right}", a, b)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
