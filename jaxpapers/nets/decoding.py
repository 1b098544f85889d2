"""Text from a language model: prefill, a cache of keys and values, drawing, stopping.

``generate`` is one pure function, so one compiled program holds the whole of it::

    program = jax.jit(functools.partial(generate, net, options=Options(length=64)))
    program(params, prompt, key, mask=mask).tokens

Under a mesh with axes ``data`` and ``model`` rows are split over the first, heads and
weights over the second, as ``transformer.RULES`` says.

Names of shapes: B rows, T positions of the prompt, L of the answer, V vocabulary, S
states of an automaton.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpapers.nets.block import Block
from jaxpapers.nets.transformer import Transformer, look_up, readout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How tokens are drawn and when a row ends.

    Attributes:
      length: L, tokens to draw at most.
      temperature: of the softmax; 0 takes the most probable token.
      top_p: draw from the fewest most probable tokens whose probabilities reach this sum
        (Holtzman et al., arXiv 1904.09751); tokens as probable as the last of them too.
      min_p: draw from tokens with at least this share of the largest probability
        (Nguyen et al., arXiv 2407.01082).
      stop: ids that end a row; they are part of it.
      pad: id after the end of a row.
      vocab_size: draw only ids below it; None: all.
      unstack: decode with the weights of each layer apart, which reads them in place; it
        copies them once if ``params`` has them stacked. False: with a scan over layers,
        whose program is compiled sooner and copies the weights at each token.

    Raises:
      ValueError: numbers out of range.
    """

    length: int
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[int, ...] = ()
    pad: int = 0
    vocab_size: int | None = None
    unstack: bool = True

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length must be >= 1, got {self.length}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size must be >= 1, got {self.vocab_size}")


class Generated(NamedTuple):
    """Answers.

    Attributes:
      tokens: int32 (B, L); after a row's end the id ``pad``.
      lengths: int32 (B,): tokens of each row, one that ends it included.
      stopped: bool (B,): whether the row ended before L by a token or a string.
    """

    tokens: jax.Array
    lengths: jax.Array
    stopped: jax.Array


def generate(
    net: Transformer,
    params: Mapping[str, Any],
    prompt: Int[Array, "B T"],
    key: Key[Array, ""] | None = None,
    *,
    options: Options,
    mask: Bool[Array, "B T"] | None = None,
    table: Int[Array, "S V"] | None = None,
) -> Generated:
    """Continues prompts of one or of several lengths.

    Rows that ended keep their place in the batch, and the program ends when all have. A
    row's tokens do not depend on its padding, nor, if greedy, on the other rows.

    Args:
      net: the model.
      params: of it; or ``unstacked`` ones, which save a copy of the weights per call.
      prompt: ids.
      key: of the draws; needed with a temperature above 0.
      options: see ``Options``.
      mask: which of ``prompt`` are real tokens; None: all. Padding may stand on either
        side. A row without any token gets an answer of length 0.
      table: automaton that ends a row at a stop string: state and token -> next state,
        the last one for the end; see ``data.tokenizer.stop_table``.

    Raises:
      ValueError: an empty prompt, a temperature without a key, a table for another
        vocabulary.
    """
    if prompt.shape[1] < 1:
        raise ValueError("generate needs a prompt of one token at least")
    if table is not None:
        vocab = options.vocab_size or net.vocab_size
        if table.shape[1] != vocab:
            raise ValueError(
                f"table is for {table.shape[1]} tokens, expected {vocab}; "
                "options.vocab_size limits those that are drawn"
            )
    if options.unstack and "layers" in params:
        params = unstacked(net, params) | {"stacked": params["layers"]}
    done = jnp.zeros(prompt.shape[0], bool)
    if mask is not None:
        prompt, mask, done = _left(prompt, mask)
    logits, step, carry = prefill(net, params, prompt, options.length, mask)
    return decode(step, logits, carry, key, options=options, table=table, done=done)


def decode(
    step: Callable[[Array, Any], tuple[Array, Any]],
    logits: Float[Array, "B V"],
    carry: Any,
    key: Key[Array, ""] | None = None,
    *,
    options: Options,
    table: Int[Array, "S V"] | None = None,
    done: Bool[Array, " B"] | None = None,
) -> Generated:
    """Draws tokens one after the other, of any model with a step.

    Args:
      step: tokens (B,) and the carry -> logits (B, V) of the next ones and the carry.
      logits: of the first tokens.
      carry: of the first step, such as a cache.
      key: see ``generate``.
      options: see ``Options``.
      table: see ``generate``.
      done: rows that are to get no token.

    Raises:
      ValueError: a temperature above 0 without a key.
    """
    if options.temperature > 0 and key is None:
        raise ValueError("a temperature above 0 needs a key")
    rows, length = logits.shape[0], options.length
    keys = None if key is None else jax.random.split(key, length)
    done = jnp.zeros(rows, bool) if done is None else done
    tokens = jnp.full((rows, length), options.pad, jnp.int32)
    state = jnp.zeros(rows, jnp.int32)

    def drawn(i, logits, tokens, lengths, state, done):
        """One more token of the rows that go on."""
        token = draw(logits, None if keys is None else keys[i], options)
        token = jnp.where(done, options.pad, token)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, i))
        lengths = lengths + ~done
        if table is not None:
            state = jnp.where(done, state, table[state, token])
            done |= state == table.shape[0] - 1
        for stop in options.stop:
            done |= token == stop
        return token, tokens, lengths, state, done

    def go_on(loop):
        i, (*_, done), _ = loop
        return (i < length) & ~done.all()

    def body(loop):
        i, (token, *rest), carry = loop
        logits, carry = step(token, carry)
        return i + 1, drawn(i, logits, *rest), carry

    first = drawn(0, logits, tokens, jnp.zeros(rows, jnp.int32), state, done)
    start = (jnp.ones((), jnp.int32), first, carry)
    _, (_, tokens, lengths, _, done), _ = jax.lax.while_loop(go_on, body, start)
    return Generated(tokens, lengths, done & (lengths > 0))


def draw(
    logits: Float[Array, "B V"], key: Key[Array, ""] | None, options: Options
) -> Int[Array, " B"]:
    """A token of each row.

    Raises:
      ValueError: ``vocab_size`` above V.
    """
    if (options.vocab_size or 0) > logits.shape[-1]:
        raise ValueError(
            f"vocab_size {options.vocab_size} exceeds the {logits.shape[-1]} logits"
        )
    logits = logits[:, : options.vocab_size]
    if options.temperature == 0 or key is None:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / options.temperature
    kept = jnp.ones((), bool)
    if options.top_p < 1 or options.min_p > 0:
        share = jax.nn.softmax(logits.astype(jnp.float32))
        if options.top_p < 1:
            order = -jnp.sort(-share, axis=-1)
            before = jnp.cumsum(order, -1) - order
            # The first is kept even where rounding says otherwise.
            count = jnp.maximum((before < options.top_p).sum(-1), 1)
            least = jnp.take_along_axis(order, count[:, None] - 1, 1)
            kept = share >= least
        largest = share.max(-1, keepdims=True)
        kept &= share >= options.min_p * largest
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def prefill(
    net: Transformer,
    params: Mapping[str, Any],
    prompt: Int[Array, "B T"],
    length: int,
    mask: Bool[Array, "B T"] | None = None,
) -> tuple[Array, Callable, Any]:
    """The model after prompts that are padded on the left, if at all.

    Args:
      net: the model.
      params: of it, stacked, ``unstacked``, or unstacked with ``stacked`` for this.
      prompt: ids.
      length: tokens that are to come.
      mask: of real tokens.

    Returns:
      The logits (B, V) of the first token, and ``step`` and ``carry`` of ``decode``.
    """
    rows, before = prompt.shape
    room = before + length
    seen = positions = keys = None
    offset = jnp.full((rows,), before, jnp.int32)
    if mask is not None:
        positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0).astype(jnp.int32)
        offset = mask.sum(1).astype(jnp.int32)
        seen = jnp.pad(mask, ((0, 0), (0, length)), constant_values=True)
        keys = jnp.broadcast_to(seen[:, None], (rows, before, room))
    layers, stacked = params.get("each"), params.get("layers", params.get("stacked"))
    if stacked is not None:
        whole = {k: v for k, v in params.items() if k not in ("each", "stacked")}
        whole["layers"] = stacked
        cache = jax.tree.map(_over_layers, net.init_cache(rows, room))
        x, cache = _apply(net, whole, prompt, cache, positions=positions, mask=keys)
        caches: Any = cache
        if layers is not None:
            caches = tuple((cache.key[i], cache.value[i]) for i in range(net.layers))
    else:
        kv_heads, head_dim, _ = net.sizes()
        empty = jnp.zeros((rows, room, kv_heads, head_dim), net.dtype)
        x, caches = _blocks(net, params, prompt, ((empty, empty),) * net.layers,
                            jnp.zeros((), jnp.int32), positions, keys)  # fmt: skip
    if layers is not None:
        caches = jax.tree.map(_over, caches)

    def step(token, carry):
        caches, i = carry
        mask = None if seen is None else seen[:, None]
        # Without padding all rows are at one position: fewer angles to compute.
        at = (before + i)[None] if seen is None else (offset + i)[:, None]
        if layers is None:
            x, caches = _apply(
                net, params, token[:, None], caches, positions=at, mask=mask
            )
        else:
            x, caches = _blocks(
                net, params, token[:, None], caches, before + i, at, mask
            )
        return readout(net, params, x[:, 0]), (caches, i + 1)

    return readout(net, params, x[:, -1]), step, (caches, jnp.zeros((), jnp.int32))


def unstacked(net: Transformer, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters whose layers are a tuple ``each`` in place of the stacked ``layers``.

    ``generate`` takes them as they are, and so reads every weight where it lies.
    """
    leaves, tree = jax.tree.flatten(params["layers"])
    each = tuple(
        jax.tree.unflatten(tree, [x[i] for x in leaves]) for i in range(net.layers)
    )
    return {**{k: v for k, v in params.items() if k != "layers"}, "each": each}


def token_log_probs(
    net: Transformer,
    params: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    chunk: int = 64,
) -> Float[Array, "B T-1"]:
    """Log-probability of each token after the first, given those before it.

    Logits exist for ``chunk`` positions at a time only.

    Args:
      net: the model.
      params: of it, stacked or ``unstacked``.
      tokens: ids.
      mask: of real tokens; those after padding on the left count from the first real one.
        A token that is padding, or follows padding, has log-probability 0.
      chunk: positions, of all rows.
    """
    if tokens.shape[0] == 0 or tokens.shape[1] < 2:
        return jnp.zeros((tokens.shape[0], max(tokens.shape[1] - 1, 0)))
    positions = keys = None
    if mask is not None:
        positions = jnp.maximum(jnp.cumsum(mask, 1) - 1, 0).astype(jnp.int32)[:, :-1]
        wide = (mask.shape[0], mask.shape[1] - 1, mask.shape[1] - 1)
        keys = jnp.broadcast_to(mask[:, None, :-1], wide)
    if "each" in params:
        start, none = jnp.zeros((), jnp.int32), ((),) * net.layers
        x, _ = _blocks(net, params, tokens[:, :-1], none, start, positions, keys)
    else:
        x = _apply(net, params, tokens[:, :-1], positions=positions, mask=keys)
    rows, targets = x.reshape(-1, x.shape[-1]), tokens[:, 1:].reshape(-1)
    extra = -len(rows) % min(chunk, len(rows))
    rows = jnp.pad(rows, ((0, extra), (0, 0)))
    parts = (
        rows.reshape(-1, min(chunk, len(rows)), rows.shape[-1]),
        jnp.pad(targets, (0, extra)).reshape(-1, min(chunk, len(rows))),
    )

    def part(xs):
        logits = readout(net, params, xs[0])
        own = jnp.take_along_axis(logits, xs[1][:, None], 1)[:, 0]
        return own - jax.nn.logsumexp(logits, axis=-1)

    values = jax.lax.map(part, parts).reshape(-1)[: targets.size]
    values = values.reshape(tokens.shape[0], -1)
    if mask is None:
        return values
    return jnp.where(mask[:, 1:] & mask[:, :-1], values, 0.0)


def _apply(net, params, *args, **kwargs) -> Any:
    """States after the final norm; with a cache, it too."""
    return net.apply({"params": params}, *args, hidden=True, **kwargs)


def _blocks(net, params, tokens, caches, start, positions, mask):
    """States after the final norm, layer by layer with weights of their own."""
    x = look_up(params["embed"]["embedding"], tokens).astype(net.dtype)
    if positions is None:
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    block, new = Block(net.kind, None), []
    for layer, cache in zip(params["each"], caches):
        x, cache = block.apply({"params": layer}, x, cache, positions, start, mask)
        new.append(cache)
    norm = net.kind.normalise("norm")
    return norm.apply({"params": params["norm"]}, x), tuple(new)


def _left(prompt, mask):
    """Rows with their padding moved to the left, and those that are nothing else."""
    order = jnp.argsort(mask, axis=1, stable=True)
    moved = [jnp.take_along_axis(x, order, 1) for x in (prompt, mask)]
    return *moved, ~mask.any(1)


def _over(x):
    """A layer's keys or values (B, S, K, H): rows over ``data``, heads over ``model``."""
    return _split(x, 0, 2)


def _over_layers(x):
    return _split(x, 1, 3) if x.ndim == 5 else x


def _split(x, row_axis, head_axis):
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    spec: list[str | None] = [None] * x.ndim
    for axis, name in ((row_axis, "data"), (head_axis, "model")):
        if kinds.get(name) == AxisType.Auto and x.shape[axis] % mesh.shape[name] == 0:
            spec[axis] = name
    return jax.lax.with_sharding_constraint(x, P(*spec)) if any(spec) else x
