"""Thousands of refits in one program: pairs bootstrap and permutation tests.

A replicate's draw depends on the key and its number alone, so that chunks and meshes do
not change it. Resampled rows are counts: a refit is a weighted fit, and the Gram matrices
of many replicates are one matrix product.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.ops.regression.covariance import HIGHEST, dot
from jaxpapers.ops.regression.design import group_codes
from jaxpapers.ops.regression.result import in_float64
from jaxpapers.ops.regression.systems import solve, symmetric

CHUNK = 64
STEPS = 30


def bootstrap(
    key: Key[Array, ""],
    statistic: Callable[..., Any],
    data: Any,
    replicates: int,
    *,
    mesh: Any = None,
    chunk: int = CHUNK,
) -> Any:
    """Values of a statistic on resampled rows.

    Args:
      key: of the resamples.
      statistic: function of ``data`` resampled, a pytree of arrays; jax.
      data: pytree of arrays of n rows each.
      replicates: number of resamples.
      mesh: replicates are divided over its axis ``data``; None: one device.
      chunk: resamples computed at once.

    Returns:
      The statistic's pytree with a leading axis of ``replicates``, float64 NumPy.

    Raises:
      ValueError: no rows, rows of different numbers, no replicates.
    """
    leaves = jax.tree.leaves(data)
    sizes = {len(x) for x in leaves}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"data must be arrays of n >= 1 rows each, got {sorted(sizes)}"
        )
    (n,) = sizes

    def one(key, data):
        rows = jax.random.randint(key, (n,), 0, n, jnp.int32)
        return statistic(jax.tree.map(lambda x: x[rows], data))

    return spread(key, one, data, replicates, mesh=mesh, chunk=chunk)


def permutation_test(
    key: Key[Array, ""],
    statistic: Callable[..., Any],
    x: Any,
    data: Any,
    replicates: int,
    *,
    within: Any = None,
    mesh: Any = None,
    chunk: int = CHUNK,
) -> tuple[float, float, np.ndarray]:
    """Two-sided test of a statistic whose null is that rows of ``x`` are exchangeable.

    Args:
      key: of the permutations.
      statistic: function (x, data) -> number; jax.
      x: (n, ...) values that are permuted.
      data: what stays.
      replicates: number of permutations.
      within: (n,) labels; rows are exchanged within them only.
      mesh, chunk: see ``bootstrap``.

    Returns:
      The statistic, its p-value (1 + as far from the null's mean) / (1 + replicates), and
      the (replicates,) values under the null.

    Raises:
      ValueError: labels of another length, missing labels, no replicates.
    """
    x = np.asarray(x)
    codes = group_codes("within", np.zeros(len(x)) if within is None else within)
    if codes.shape != x.shape[:1]:
        raise ValueError(f"within must have {len(x)} labels, got {codes.shape}")
    codes = codes.astype(np.int32)
    place = np.argsort(codes, kind="stable")

    def one(key, args):
        x, data, codes, place = args
        # Rows of a group in a random order, at the places of that group.
        order = jnp.lexsort((jax.random.uniform(key, codes.shape), codes))
        return statistic(x.at[place].set(x[order]), data)

    null = spread(key, one, (x, data, codes, place), replicates, mesh=mesh, chunk=chunk)
    observed = float(in_float64(jax.jit(statistic), x, data))
    centre = null.mean()
    far = np.abs(null - centre) >= abs(observed - centre) * (1 - 1e-12)
    return observed, float((1 + far.sum()) / (1 + len(null))), null


def spread(
    key: Key[Array, ""],
    one: Callable[..., Any],
    data: Any,
    replicates: int,
    *,
    mesh: Any = None,
    chunk: int = CHUNK,
    together: bool = False,
) -> Any:
    """``one(key_i, data)`` for i below ``replicates``, in chunks, divided over a mesh.

    Args:
      key: key_i is ``fold_in(key, i)``.
      one: jax function; with ``together`` of a chunk of keys.
      data: its second argument.
      replicates, mesh, chunk: see ``bootstrap``.
      together: ``one`` takes all keys of a chunk.

    Raises:
      ValueError: no replicates, no chunk.
    """
    if replicates < 1 or chunk < 1:
        raise ValueError(
            f"replicates and chunk must be >= 1, got {replicates} and {chunk}"
        )
    devices = 1 if mesh is None else mesh.shape["data"]
    chunk = min(chunk, -(-replicates // devices))
    rounds = -(-replicates // (devices * chunk))
    inner = one if together else jax.vmap(one, (0, None))

    def device(numbers, key, data):
        def body(i):
            return inner(jax.vmap(jax.random.fold_in, (None, 0))(key, i), data)

        out = lax.map(body, numbers.reshape(rounds, chunk))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    numbers = np.arange(devices * rounds * chunk, dtype=np.uint32)
    if mesh is not None:
        P = jax.P
        device = jax.shard_map(
            device, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"),
            check_vma=False,
        )  # fmt: skip
    out = in_float64(jax.jit(device), numbers, key, data)
    return jax.tree.map(lambda x: x[:replicates], out)


def resample_counts(keys: Key[Array, " B"], n: int) -> Float[Array, "n B"]:
    """How often each row is drawn in n draws with replacement, a column a key."""
    rows = jax.vmap(lambda k: jax.random.randint(k, (n,), 0, n, jnp.int32))(keys)
    columns = jnp.broadcast_to(jnp.arange(len(keys))[:, None], rows.shape)
    counts = jnp.zeros((n, len(keys)), jnp.float64)
    return counts.at[rows, columns].add(1.0)


def bootstrap_ols(
    key: Key[Array, ""],
    y: Any,
    x: Any,
    replicates: int = 10_000,
    *,
    mesh: Any = None,
    chunk: int = 256,
) -> np.ndarray:
    """Coefficients of least squares on resampled pairs (rows of y and x).

    Args:
      key: of the resamples; the rows of replicate i are
        ``randint(fold_in(key, i), (n,), 0, n)``.
      y: (n,).
      x: (n, k) with its intercept.
      replicates, mesh, chunk: see ``bootstrap``.

    Returns:
      (replicates, k); NaN where the resampled columns are collinear.

    Raises:
      ValueError: shapes, values that are not finite, no replicates.
    """
    y, x = _matrix(y, x)
    n, k = x.shape
    table = np.concatenate([x, y[:, None]], 1)
    upper = np.triu_indices(k + 1)
    products = table[:, upper[0]] * table[:, upper[1]]

    def many(keys, products):
        sums = dot(resample_counts(keys, n).T, products)
        gram = symmetric(sums, upper, k + 1)
        return solve(gram[:, :k, :k], gram[:, :k, k])

    return spread(
        key, many, products, replicates, mesh=mesh, chunk=chunk, together=True
    )


def bootstrap_ppml(
    key: Key[Array, ""],
    y: Any,
    x: Any,
    fe: Any = (),
    replicates: int = 10_000,
    *,
    mesh: Any = None,
    chunk: int = 128,
    tol: float = 1e-8,
) -> np.ndarray:
    """Coefficients of Poisson pseudo-likelihood with fixed effects on resampled pairs.

    Newton's method on all coefficients, those of the fixed effects as dummies, started at
    the fit of all rows: for effects of tens of levels. Levels whose resampled outcome is
    0 throughout leave their replicate, as in ``ppml``.

    Args:
      key: of the resamples, see ``bootstrap_ols``.
      y: (n,) counts.
      x: (n, k) regressors; without fixed effects with an intercept.
      fe: (n,) labels of each fixed effect.
      replicates, mesh, chunk: see ``bootstrap``.
      tol: largest change of a coefficient of x that ends the iteration.

    Returns:
      (replicates, k); NaN where a replicate does not converge.

    Raises:
      ValueError: shapes, negative counts, values that are not finite, no replicates.
    """
    y, x = _matrix(y, x)
    if (y < 0).any():
        raise ValueError(f"counts must be >= 0, got {y.min():g}")
    effects = [group_codes("a fixed effect", f) for f in fe]
    if any(f.shape != y.shape for f in effects):
        raise ValueError(f"fixed effects must have {len(y)} labels each")
    hot = [np.eye(int(f.max()) + 1)[f] for f in effects]
    # Scaled columns: one small ridge fits all.
    centre = x.mean(0) * bool(hot)
    scale = np.maximum((x - centre).std(0), 1e-12) if hot else np.ones(x.shape[1])
    z = np.concatenate([(x - centre) / scale, *hot], 1)
    k, width = x.shape[1], z.shape[1]
    data = (z, y, *_blocks(z[:, :k], effects, hot))
    given = np.ones((len(y), 1)), np.zeros((1, width))
    fit = jax.jit(lambda data, c, t: _steps(data, c, t, k, tol, 60))
    first = in_float64(fit, data, *given)
    if not np.isfinite(first).all():
        raise ValueError(
            "the Poisson fit of all rows did not converge; look for separated columns"
        )

    def many(keys, args):
        z, y, *_ = args
        counts = resample_counts(keys, len(y))
        # A level without a positive outcome has no estimate: its rows leave.
        for _ in range(2 if hot else 0):
            for i, part in enumerate(_parts(width, k, hot)):
                some = dot(z[:, part].T, counts * y[:, None]) > 0
                counts = counts * some[effects[i]]
        start = jnp.broadcast_to(jnp.asarray(first[0]), (len(keys), width))
        theta = _steps(args, counts, start, k, tol, STEPS)
        return theta[:, :k] / scale[None]

    return spread(key, many, data, replicates, mesh=mesh, chunk=chunk, together=True)


def _parts(width: int, k: int, hot: list[np.ndarray]) -> list[slice]:
    """Columns of each fixed effect."""
    ends = np.cumsum([k, *(h.shape[1] for h in hot)])
    assert ends[-1] == width
    return [slice(a, b) for a, b in zip(ends, ends[1:])]


def _blocks(x, effects, hot):
    """What the Gram matrix is made of: products of x, and rows by level of each effect.

    A dummy is 0 on all rows but its level's: rows are sorted by level and padded, so that
    its products are small matrix products; see ``_curvature``.
    """
    upper = np.triu_indices(x.shape[1])
    blocks = []
    for a, codes in enumerate(effects):
        counts = np.bincount(codes)
        index = np.full((len(counts), counts.max()), len(codes))
        order = np.argsort(codes, kind="stable")
        place = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
        index[codes[order], place] = order
        columns = np.concatenate([x, *hot[a + 1 :], np.ones((len(codes), 1))], 1)
        padded = np.concatenate([columns, np.zeros((1, columns.shape[1]))])
        blocks.append((index, padded[index]))
    return x[:, upper[0]] * x[:, upper[1]], blocks


def _curvature(mu, squares, blocks, k, width):
    """Gram matrices (B, width, width) with weights mu (n, B)."""
    gram = jnp.zeros((mu.shape[1], width, width), mu.dtype)
    upper = np.triu_indices(k)
    gram = gram.at[:, upper[0], upper[1]].set(dot(mu.T, squares))
    padded = jnp.concatenate([mu, jnp.zeros((1, mu.shape[1]), mu.dtype)])
    at = k
    for index, table in blocks:
        sums = jnp.einsum("lmb,lmc->blc", padded[index], table, precision=HIGHEST)
        rows = np.arange(at, at + len(index))
        gram = gram.at[:, :k, rows].set(jnp.swapaxes(sums[:, :, :k], 1, 2))
        gram = gram.at[:, rows, rows[-1] + 1 :].set(sums[:, :, k:-1])
        gram = gram.at[:, rows, rows].set(sums[:, :, -1])
        at += len(index)
    diagonal = np.eye(width, dtype=bool)[None]
    return jnp.where(diagonal, gram, gram + jnp.swapaxes(gram, 1, 2))


def _steps(data, counts, theta, k, tol, steps):
    """Newton steps (B, width) of the weighted Poisson likelihoods; NaN if unfinished.

    The curvature is computed in the first two steps and kept after: near the estimate it
    hardly moves, and a gradient costs a tenth of it. Where that does not converge, every
    step computes it again.
    """
    z, y, squares, blocks = data
    width = z.shape[1]
    total = counts.sum(0)
    ridge = 1e-9 * total[:, None, None] * jnp.eye(width)[None]
    target = dot((counts * y[:, None]).T, z)

    def curvature(mu):
        return _curvature(mu, squares, blocks, k, width) + ridge

    def body(carry):
        theta, gram, moved, i = carry
        # An outcome far above its mean must not overflow the first steps.
        mu = counts * jnp.exp(jnp.clip(dot(z, theta.T), -40, 40))
        fresh = (i < 2) | (i > 8)
        gram = lax.cond(fresh, lambda: curvature(mu), lambda: gram)
        step = solve(gram, target - dot(mu.T, z))
        step = step * jnp.minimum(1, 4 / jnp.abs(step).max(1, keepdims=True))
        # A replicate that is done stays: what others of its chunk need is not its own.
        open_ = moved > tol
        step = jnp.where(open_[:, None], step, 0)
        moved = jnp.where(open_, jnp.abs(step[:, :k]).max(1), moved)
        return theta + step, gram, moved, i + 1

    def unfinished(carry):
        _, _, moved, i = carry
        return (moved.max() > tol) & (i < steps)

    inf = jnp.full(len(theta), jnp.inf, theta.dtype)
    start = (theta, jnp.zeros_like(ridge), inf, 0)
    theta, _, moved, _ = lax.while_loop(unfinished, body, start)
    return jnp.where(moved[:, None] > tol, jnp.nan, theta)


def _matrix(y: Any, x: Any) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.asarray(y, np.float64), np.asarray(x, np.float64)
    if y.ndim != 1 or x.ndim != 2 or len(x) != len(y) or not len(y):
        raise ValueError(
            f"expected y (n,) and x (n, k) of the same rows, got {y.shape}, {x.shape}"
        )
    if not (np.isfinite(y).all() and np.isfinite(x).all()):
        raise ValueError("y and x must be finite; leave out rows with missing values")
    return y, x
