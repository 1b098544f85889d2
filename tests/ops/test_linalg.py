"""LAPACK on stacks of matrices, as on each by itself."""

import jax.numpy as jnp
import numpy as np
import pytest

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
