"""The rating residual quantiser, and its neighbours behind the same functions.

Shapes: B items of d features, L levels of K codes with D features each.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers.nets import mlp
from jaxpapers.ops import semantic_ids as measures
from jaxpapers.ops import vector_quantization as ops
from jaxpapers.papers.r3_vae.options import RATED, Tokenizer

HIGHEST = lax.Precision.HIGHEST


class Quantized(NamedTuple):
    """Items after quantisation.

    Attributes:
      alpha: (B,), component along the reference vector; 0 without one.
      q: (B, D), sum of what the levels took off, without the reference.
      hard: (B, D), the same from the codes alone: each code's vector, with ``top1`` and
        ``mp`` its direction times the mean rating of the batch's items that have it.
      sid: (B, L) int32.
      weights: (B, L, K).
      norms: (B, L + 1), length of the residual before each level and at the end.
      parts: (B, L, D), what each level took off.
      penalty: (), codebook and commitment losses of nearest codes.
      preference: (B, K), of the last level's codes, larger is better.
      residuals: (B, L, D), what each level was given.
    """

    alpha: Float[Array, " B"]
    q: Float[Array, "B D"]
    hard: Float[Array, "B D"]
    sid: Int[Array, "B L"]
    weights: Float[Array, "B L K"]
    norms: Float[Array, "B M"]
    parts: Float[Array, "B L D"]
    penalty: Float[Array, ""]
    preference: Float[Array, "B K"]
    residuals: Float[Array, "B L D"]


def init(key: Key[Array, ""], options: Tokenizer) -> dict:
    """Parameters: ``r`` (d), ``codebook`` (L, K, D), ``encoder``, ``decoder``, ``mix``.

    Those that the options need. Codes and r are uniform in (-1, 1), codes divided by
    sqrt(D); ``mix`` of simvq is the identity of each level.
    """
    keys = dict(zip(("r", "book", "in", "out"), jax.random.split(key, 4)))
    d, width = options.features, options.width
    params: dict[str, Any] = {}
    if options.reference:
        params["r"] = jax.random.uniform(keys["r"], (d,), minval=-1.0)
    if options.quantizer not in ("ema", "fsq"):
        shape = (options.levels, options.codes, width)
        params["codebook"] = jax.random.uniform(keys["book"], shape, minval=-1.0)
        params["codebook"] /= width**0.5
    if options.quantizer == "simvq":
        # The codes are fixed: they move to the extra state.
        del params["codebook"]
        params["mix"] = jnp.tile(jnp.eye(width)[None], (options.levels, 1, 1))
    if options.encoder:
        params["encoder"] = mlp.init(keys["in"], (d, *options.encoder))
    if options.decoder:
        params["decoder"] = mlp.init(keys["out"], (width, *options.decoder, d))
    return params


def init_extra(params: dict, options: Tokenizer) -> Any:
    """State without gradients: statistics of ``ema``, fixed codes of ``simvq``, or ()."""
    if options.quantizer not in ("ema", "simvq"):
        return ()
    shape = (options.levels, options.codes, options.width)
    codes = jax.random.normal(jax.random.key(0), shape) / options.width**0.5
    return ops.ema_start(codes) if options.quantizer == "ema" else codes


def codebooks(params: dict, extra: Any, options: Tokenizer) -> Float[Array, "L K D"]:
    """The codes of all levels; none, (L, K, 0), for ``fsq``."""
    if options.quantizer == "fsq":
        return jnp.zeros((options.levels, options.codes, 0))
    if options.quantizer == "ema":
        return ops.ema_codes(lax.stop_gradient(extra))
    if options.quantizer == "simvq":
        codes = lax.stop_gradient(extra)
        return jnp.einsum("lkd,lde->lke", codes, params["mix"], precision=HIGHEST)
    return params["codebook"]


def encode(
    params: dict, x: Float[Array, "B d"], options: Tokenizer
) -> tuple[Float[Array, " B"], Float[Array, "B D"]]:
    """Components along the reference, and what the first level is given."""
    alpha = jnp.zeros(len(x), x.dtype)
    if options.reference:
        alpha, x = ops.project(params["r"], x)
    if options.encoder:
        x = mlp.apply(params["encoder"], {}, x, activation="relu", train=False)[0]
    return alpha, x


def decode(
    params: dict, alpha: Float[Array, " B"], q: Float[Array, "B D"], options: Tokenizer
) -> Float[Array, "B d"]:
    """Item vectors from quantised ones."""
    if options.decoder:
        q = mlp.apply(params["decoder"], {}, q, activation="relu", train=False)[0]
    return q + alpha[:, None] * params["r"][None] if options.reference else q


def choose(
    e: Float[Array, "B D"],
    codes: Float[Array, "K D"],
    options: Tokenizer,
    key: Key[Array, ""] | None = None,
) -> tuple[ops.Choice, Float[Array, "B K"]]:
    """One level of a quantiser with a codebook, and the preference among its codes.

    Args:
      e: what the level is given.
      codes: of the level.
      options: of the quantiser.
      key: noise of ``gumbel``; None: none.
    """
    if options.quantizer in RATED:
        choice = ops.rated(e, codes, options.quantizer, options.tau)
        return choice, ops.rate(e, codes, options.tau)[0]
    code, distance = ops.nearest(e, codes)
    if options.quantizer == "gumbel":
        weights = ops.gumbel(key, -distance, options.tau)
        value = jnp.matmul(weights, codes, precision=HIGHEST)
        return ops.Choice(value, code, weights), -distance
    weights = jax.nn.one_hot(code, len(codes), dtype=e.dtype)
    return ops.Choice(codes[code], code, weights), -distance


def quantize(
    params: dict,
    extra: Any,
    x: Float[Array, "B d"],
    options: Tokenizer,
    key: Key[Array, ""] | None = None,
) -> Quantized:
    """Items through the reference projection, the encoder and all levels.

    The residual after a nearest code is e - sg(c): its gradient reaches the encoder at
    every level, which it would not past a straight-through value.

    Args:
      params, extra: of ``init`` and ``init_extra``.
      x: item vectors, none zero.
      options: of the quantiser.
      key: noise of ``gumbel``; None: none, as for SIDs.
    """
    alpha, e = encode(params, x, options)
    if options.quantizer == "fsq":
        return _finite(alpha, e, options)
    books = codebooks(params, extra, options)
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(books))
    relaxed = options.quantizer in (*RATED, "gumbel")

    def level(e, inputs):
        codes, own = inputs
        choice, preference = choose(e, codes, options, None if key is None else own)
        value = choice.value
        target = lax.stop_gradient(e)
        commit = jnp.square(e - lax.stop_gradient(value)).sum(-1).mean()
        book = jnp.square(target - value).sum(-1).mean()
        penalty = options.beta * commit + (0 if options.quantizer == "ema" else book)
        after = e - (value if relaxed else lax.stop_gradient(value))
        given = {
            "residual": e,
            "value": value,
            "hard": _from_code(choice, codes, options),
            "code": choice.code,
            "weights": choice.weights,
            "penalty": jnp.zeros(()) if relaxed else penalty,
            "preference": preference,
        }
        return after, given

    last, out = lax.scan(level, e, (books, keys))
    values = out["value"]
    q = values.sum(0)
    if options.quantizer == "rotation":
        q = ops.rotate(e, lax.stop_gradient(q))
    elif not relaxed:
        q = ops.straight_through(e, q)
    norms = jnp.concatenate([out["residual"], last[None]])
    return Quantized(
        alpha,
        q,
        out["hard"].sum(0),
        out["code"].T,
        out["weights"].swapaxes(0, 1),
        jnp.sqrt(jnp.square(norms).sum(-1)).T,
        values.swapaxes(0, 1),
        out["penalty"].sum(),
        out["preference"][-1],
        out["residual"].swapaxes(0, 1),
    )


def _from_code(choice, codes, options):
    """What is known of a level's value from the code alone."""
    if options.quantizer not in ("top1", "mp"):
        return codes[choice.code]
    direction = ops.unit(codes)
    size = (choice.value * direction[choice.code]).sum(-1)
    count = jnp.maximum(choice.weights.sum(0), 1)
    mean = jnp.matmul(choice.weights.T, size, precision=HIGHEST) / count
    return (mean[:, None] * direction)[choice.code]


def _finite(alpha, z, options) -> Quantized:
    """Quantisation without a codebook: each level has features of its own."""
    parts = z.reshape(len(z), options.levels, -1)
    pairs = [ops.fsq(parts[:, i], options.fsq) for i in range(options.levels)]
    values = jnp.stack([value for value, _ in pairs], 1)
    sid = jnp.stack([index for _, index in pairs], 1)
    weights = jax.nn.one_hot(sid, options.codes, dtype=z.dtype)
    q = values.reshape(len(z), -1)
    norms = jnp.zeros((len(z), options.levels + 1), z.dtype)
    return Quantized(
        alpha, q, q, sid, weights, norms, values, jnp.zeros(()), weights[:, -1], parts
    )


def objective(
    x: Float[Array, "B d"], y: Float[Array, "B d"], form: str
) -> Float[Array, " B"]:
    """Error of a reconstruction: squared, sum over features, or 1 - cosine."""
    if form == "square":
        return jnp.square(x - y).sum(-1)
    return 1 - (ops.unit(x) * ops.unit(y)).sum(-1)


def loss(
    params: dict,
    extra: Any,
    batch: Any,
    key: Key[Array, ""],
    *,
    options: Tokenizer,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], Any]]:
    r"""Reconstruction, cohesion and discrimination (R3-VAE, section on the loss).

    $$ L = \|x - (\alpha r + \sum_l \hat e^l)\|^2 - \lambda_{SC} SC + \lambda_{PD} PD $$

    With nearest codes the codebook and commitment losses come to it.

    Args:
      params, extra: see ``quantize``.
      batch: ``x`` (B, d).
      key: of gumbel's noise.
      options: of the quantiser.

    Returns:
      The loss; metrics: ``reconstruction``, ``hard_reconstruction`` (from the codes
      alone), ``top_weight`` (mean of the largest weight), ``code_norm``, ``sc``, ``pd``,
      ``usage`` (least share of codes that a level uses in the batch); new extra state.
    """
    x = batch["x"]
    quantized = quantize(params, extra, x, options, key)
    y = decode(params, quantized.alpha, quantized.q, options)
    error = objective(x, y, options.loss).mean()
    sc, pd = (
        cohesion(quantized, options),
        _discrimination(params, extra, quantized, options),
    )
    value = error - options.sc * sc + options.pd * pd + quantized.penalty
    hard = decode(params, quantized.alpha, quantized.hard, options)
    books = codebooks(params, extra, options)
    used = (
        quantized.weights.argmax(-1)[..., None] == jnp.arange(options.codes)[None, None]
    )
    metrics = {
        "reconstruction": error,
        "hard_reconstruction": objective(x, hard, options.loss).mean(),
        "top_weight": quantized.weights.max(-1).mean(),
        "code_norm": jnp.sqrt(jnp.square(books).sum(-1)).mean(),
        "sc": sc,
        "pd": pd,
        "usage": used.any(0).mean(-1).min(),
    }
    if options.quantizer == "ema":
        extra = _moved(extra, quantized, options)
    return value, (lax.stop_gradient(metrics), lax.stop_gradient(extra))


def cohesion(quantized: Quantized, options: Tokenizer) -> Float[Array, ""]:
    """SC of a batch as the options have it; 0 where no two items share a first code."""
    if options.sc_form == "groups":
        first = lax.stop_gradient(quantized.sid[:, 0])
        return measures.cohesion_or(quantized.q, first, options.codes)
    target = ops.unit(lax.stop_gradient(quantized.residuals[:, 0]))
    so_far = ops.unit(jnp.cumsum(quantized.parts, 1))
    return (target[:, None] * so_far).sum(-1).mean()


def _discrimination(params, extra, quantized, options):
    if options.quantizer == "fsq":  # No codebook, and codes on a grid.
        return jnp.zeros(())
    if options.pd_form == "soft":
        first = quantized.weights[:, 0]
        centres = measures.soft_centres(quantized.q, first)
        present = lax.stop_gradient(first.sum(0)) > 1e-6
        # Of one centre there is no pair: every code counts, and the result does not.
        some = present.sum() > 1
        pd = measures.discrimination(centres, options.t, present=present | ~some)
        return jnp.where(some, pd, 0)
    books = codebooks(params, extra, options)
    each = [measures.discrimination(book, options.t) for book in books]
    return jnp.stack(each).mean()


def _moved(ema, quantized, options):
    levels = [
        ops.ema_update(
            ops.EMA(ema.counts[i], ema.sums[i]), quantized.residuals[:, i],
            quantized.sid[:, i], options.decay,
        )
        for i in range(options.levels)
    ]  # fmt: skip
    return jax.tree.map(lambda *x: jnp.stack(x), *levels)


def predict(
    params: dict, extra: Any, batch: Any, *, options: Tokenizer
) -> Float[Array, " B"]:
    """Error of the reconstruction of each item, see ``objective``."""
    quantized = quantize(params, extra, batch["x"], options)
    y = decode(params, quantized.alpha, quantized.q, options)
    return objective(batch["x"], y, options.loss)


def check_vectors(x: Any) -> np.ndarray:
    """Item vectors as float32.

    Raises:
      ValueError: not (N, d), no rows, NaN, infinities, or rows of zeros, whose cosine is
        not defined; with the rows.
    """
    x = np.asarray(x, np.float32)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"item vectors must be (items, features), got shape {x.shape}")
    bad = ~np.isfinite(x).all(1) | ~(np.abs(np.nan_to_num(x)).max(1) > 0)
    if bad.any():
        rows = np.flatnonzero(bad)
        raise ValueError(
            f"{len(rows)} of {len(x)} item vectors are zero, NaN or infinite, rows "
            f"{rows[:10].tolist()}: they have no direction to quantise; drop these items "
            "or give them a text"
        )
    return x
