"""The looped transformer: one block of layers, applied T times with the same weights."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int, Key

from jaxpapers import options
from jaxpapers.method import param_spec
from jaxpapers.nets import transformer
from jaxpapers.nets.block import Kind, LayerNorm
from jaxpapers.nets.transformer import Stack, look_up

RULES = (
    *transformer.RULES,
    *transformer.BIAS_RULES,
    (r"inject/kernel", jax.P("data", "model")),
)

Steps = int | Int[Array, " B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    """Hyper-parameters of the network; the defaults are the paper's for parity.

    Attributes:
      vocab_size: V.
      width: D.
      heads: of the attention.
      layers: of the block.
      hidden: of the MLP; 0 uses four times the width.
      position: ``none``: order comes from the causal mask alone; ``rope``.
      inject: what a step makes of the state h and the embedded input e: ``add`` h + e,
        ``concat`` a linear map of both, ``none`` h, which then starts as e.
      norm_in_loop: the final norm is the last operation of a step; False: of the output.
      loops: steps of every input; 0: T(n), which comes with the input.
      loop_rows: learned embeddings of the step, added to its input; later steps take the
        last one. 0: none.
      scale_residual: a step moves h by 1/T of the way to the block's output.
      grad_loops: gradients flow through this many last steps; 0: through all.
      remat: recompute each step in the backward pass; False: all but its products.
      form: ``scan`` over the steps, or ``unroll``: a program per number of steps.
      tied: the output head is the transposed embedding.
      dtype: of activations; parameters are float32.
      epsilon: of the norms.
      init_std: standard deviation of matrices and embeddings (GPT-2).

    Raises:
      ValueError: sizes that do not fit each other, or unknown choices.
    """

    vocab_size: int = 8
    width: int = 256
    heads: int = 8
    layers: int = 1
    hidden: int = 0
    position: str = "none"
    inject: str = "add"
    norm_in_loop: bool = True
    loops: int = 0
    loop_rows: int = 0
    scale_residual: bool = False
    grad_loops: int = 0
    remat: bool = False
    form: str = "scan"
    tied: bool = False
    dtype: str = "float32"
    epsilon: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self):
        options.check_least(
            self, "net", vocab_size=1, width=1, heads=1, layers=1, hidden=0, loops=0,
            loop_rows=0, grad_loops=0,
        )  # fmt: skip
        options.check_choices(
            self, "net", position=("none", "rope"), inject=("add", "concat", "none"),
            form=("scan", "unroll"), dtype=("float32", "bfloat16", "float64"),
        )  # fmt: skip
        options.check_positive(self, "net", "init_std")
        kind(self).sizes(self.width)


def kind(net: Net) -> Kind:
    """The block of GPT-2, without positions."""
    return Kind(
        heads=net.heads,
        hidden=net.hidden,
        norm="layer",
        mlp="gelu",
        bias="all",
        position=net.position,
        epsilon=net.epsilon,
        dtype=jnp.dtype(net.dtype),
        init_std=net.init_std,
    )


def stack(net: Net) -> Stack:
    """The layers of a step; the final norm is applied by ``step`` or ``readout``."""
    # Few layers, on a CPU faster unrolled than as a loop.
    unroll = net.layers if net.layers <= 4 else 1
    return Stack(kind(net), net.layers, unroll=unroll, final_norm=False)


def rules(net: Net) -> list[tuple[str, Any]]:
    """Sharding rules of the network's parameters."""
    absent = {"head": net.tied, "inject": net.inject != "concat"}
    return [(r, s) for r, s in RULES if not absent.get(r.split("/")[0], False)]


def init(key: Key[Array, ""], net: Net) -> dict[str, Any]:
    """Parameters: normal with ``init_std``; biases 0; scales 1.

    Projections into the residual stream have the standard deviation
    init_std / sqrt(2 layers), as in GPT-2.
    """
    keys = jax.random.split(key, 5)

    def normal(key, *shape, std=net.init_std):
        return std * jax.random.normal(key, shape)

    width, vocab = net.width, net.vocab_size
    x = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
    params = {
        "embed": {"embedding": normal(keys[0], vocab, width)},
        "layers": stack(net).init(keys[1], jnp.zeros(x.shape))["params"]["layers"],
        "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
    }
    if not net.tied:
        params["head"] = {"kernel": normal(keys[2], width, vocab)}
    if net.inject == "concat":
        kernel = normal(keys[3], 2 * width, width, std=(2 * width) ** -0.5)
        params["inject"] = {"kernel": kernel}
    if net.loop_rows:
        params["loop"] = {"embedding": normal(keys[4], net.loop_rows, width)}
    return params


def embed(params: dict, tokens: Int[Array, "B L"], net: Net) -> Float[Array, "B L D"]:
    """e, the embedded input."""
    return look_up(params["embed"]["embedding"], tokens).astype(net.dtype)


def step(
    params: dict,
    h: Float[Array, "B L D"],
    e: Float[Array, "B L D"],
    *,
    net: Net,
    t: int | Int[Array, ""] = 0,
    n_steps: Steps = 1,
) -> Float[Array, "B L D"]:
    """One step of the loop, h_t = M(h_{t-1} + e).

    Args:
      params: of ``init``.
      h: state.
      e: embedded input.
      net: hyper-parameters.
      t: number of the step, from 0, for ``loop_rows``.
      n_steps: T, for ``scale_residual``.
    """
    z = h
    if net.inject == "add":
        z = h + e
    elif net.inject == "concat":
        both = jnp.concatenate([h, e], -1).reshape(-1, 2 * net.width)
        z = (both @ params["inject"]["kernel"].astype(h.dtype)).reshape(h.shape)
    if net.loop_rows:
        row = params["loop"]["embedding"][jnp.minimum(t, net.loop_rows - 1)]
        z = z + jnp.broadcast_to(row.astype(z.dtype), z.shape)
    new: Any = stack(net).apply({"params": {"layers": params["layers"]}}, z)
    if net.norm_in_loop:
        new = normalised(params, new, net)
    if net.scale_residual:
        share = jnp.reshape(1.0 / jnp.asarray(n_steps, jnp.float32), (-1, 1, 1))
        new = h + jnp.broadcast_to(share.astype(h.dtype), h.shape) * (new - h)
    return new


def readout(params: dict, h: Float[Array, "B L D"], net: Net) -> Float[Array, "B L V"]:
    """Logits of a state, in float32 at least."""
    h = h if net.norm_in_loop else normalised(params, h, net)
    if net.tied:
        kernel = params["embed"]["embedding"].T
    else:
        kernel = params["head"]["kernel"]
    rows = h.reshape(-1, net.width) @ kernel.astype(h.dtype)
    logits = rows.reshape(*h.shape[:-1], -1)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def forward(
    params: dict,
    tokens: Int[Array, "B L"],
    n_steps: Steps | None = None,
    *,
    net: Net,
    max_steps: int = 0,
) -> Float[Array, "B L V"]:
    """Logits after T steps.

    Args:
      params: of ``init``.
      tokens: ids below V.
      n_steps: T, of all rows or of each; not read where ``net.loops`` says it.
      net: hyper-parameters.
      max_steps: the largest T of the rows, which a compiled program has to know. Rows
        keep their state after T steps. 0: that of ``n_steps``, if its values are known.

    Raises:
      ValueError: T below 1 or above ``max_steps``, or unknown where it is needed; T of
        another number of rows; tokens that are no (B, L), or known and outside the
        vocabulary.
      TypeError: T that is no whole number, tokens that are no integers.
    """
    check_tokens(tokens, net)
    n_steps, max_steps = check_steps(n_steps, max_steps, net)
    if np.ndim(n_steps) and np.shape(n_steps) != tokens.shape[:1]:
        raise ValueError(
            f"n_steps must be one number or one for each of {len(tokens)} rows, got "
            f"shape {np.shape(n_steps)}"
        )
    params = gathered(params, net)
    e = embed(params, tokens, net)
    h = e if net.inject == "none" else jnp.zeros_like(e)
    one = functools.partial(step, net=net, n_steps=n_steps)
    # Writing and reading what is element-wise costs more than computing it again.
    policy = jax.checkpoint_policies.dots_saveable
    one = jax.checkpoint(
        one,
        policy=None if net.remat else policy,
        prevent_cse=net.remat and net.form == "unroll",
    )
    if isinstance(n_steps, int):
        cut = n_steps - net.grad_loops if net.grad_loops else 0
        if cut > 0:
            h = jax.lax.stop_gradient(_repeat(one, params, h, e, 0, cut, net.form))
        h = _repeat(one, params, h, e, max(cut, 0), n_steps, net.form)
        return readout(params, h, net)

    def masked(params, h, e, *, t):
        if net.grad_loops:
            h = _where(t <= n_steps - net.grad_loops, jax.lax.stop_gradient(h), h)
        return _where(t < n_steps, one(params, h, e, t=t), h)

    h = _repeat(masked, params, h, e, 0, max_steps, net.form)
    return readout(params, h, net)


class Trace(NamedTuple):
    """Every step of a forward pass.

    Attributes:
      logits: after steps 1 .. T.
      distance: norm of the state's change in a step by the norm of the new state.
    """

    logits: Float[Array, "T B L V"]
    distance: Float[Array, "T B"]


def forward_all(
    params: dict, tokens: Int[Array, "B L"], max_steps: int, *, net: Net
) -> Trace:
    """Logits after every one of ``max_steps`` steps, for stopping and for curves.

    With ``scale_residual`` T is ``max_steps``.

    Raises:
      ValueError: ``max_steps`` below 1.
    """
    check_tokens(tokens, net)
    check_steps(max_steps, 0, dataclasses.replace(net, loops=0))
    params = gathered(params, net)
    e = embed(params, tokens, net)
    h = e if net.inject == "none" else jnp.zeros_like(e)

    def body(h, t):
        new = step(params, h, e, net=net, t=t, n_steps=max_steps)
        size = jnp.sqrt(jnp.square(new.astype(jnp.float32)).sum((1, 2)))
        change = jnp.sqrt(jnp.square((new - h).astype(jnp.float32)).sum((1, 2)))
        return new, Trace(readout(params, new, net), change / size)

    return jax.lax.scan(body, h, jnp.arange(max_steps))[1]


def check_tokens(tokens: Any, net: Net) -> None:
    """Refuses tokens that ``embed`` has no row for, where their values are known.

    Raises:
      ValueError, TypeError: see ``forward``.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be (B, L), got {tokens.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if not isinstance(tokens, jax.core.Tracer) and tokens.size:
        values = np.asarray(tokens)
        low, high = values.min(), values.max()
        if low < 0 or high >= net.vocab_size:
            raise ValueError(
                f"tokens must be in 0 .. {net.vocab_size - 1}, net.vocab_size, got "
                f"{low} .. {high}"
            )


def check_steps(n_steps: Any, max_steps: int, net: Net) -> tuple[Any, int]:
    """T and its maximum, as static numbers where their values are known.

    Raises:
      ValueError: see ``forward``.
    """
    if net.loops:
        return net.loops, net.loops
    if n_steps is None:
        raise ValueError(
            "net.loops=0 takes as many steps as the input asks for: pass n_steps"
        )
    if not jnp.issubdtype(jnp.result_type(n_steps), jnp.integer):
        raise TypeError(f"n_steps must be whole numbers, got {n_steps}")
    known = not isinstance(n_steps, jax.core.Tracer)
    values = np.asarray(n_steps) if known else np.ones(1, int)
    largest = int(values.max()) if known else 0
    if values.min() < 1:
        raise ValueError(f"n_steps must be >= 1, got {values.min()}")
    if known and max_steps and largest > max_steps:
        raise ValueError(
            f"n_steps must be at most max_steps={max_steps}, got {largest}; raise "
            "max_steps"
        )
    if not known and not max_steps:
        raise ValueError(
            "n_steps is traced: pass max_steps, the largest number of steps"
        )
    if known and values.ndim == 0:
        return largest, largest
    return n_steps, max_steps or largest


def gathered(params: dict, net: Net) -> dict:
    """Parameters whole over ``data``: FSDP gathers them once, not in every step."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    if {kinds.get(name) for name in ("data", "model")} != {AxisType.Auto}:
        return params

    def gather(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("embed"):
            return leaf  # ``look_up`` does.
        spec = [None if axis == "data" else axis for axis in param_spec(RULES, name)]
        return jax.lax.with_sharding_constraint(leaf, jax.P(*spec))

    return jax.tree_util.tree_map_with_path(gather, params)


def normalised(params: dict, h: Float[Array, "B L D"], net: Net) -> Any:
    """The final norm of a state."""
    return LayerNorm(net.epsilon).apply({"params": params["norm"]}, h)


def _where(condition, new, old):
    return jnp.where(condition[:, None, None], new, old)


def _repeat(one: Callable, params, h, e, start: int, stop: int, form: str):
    """Steps start .. stop - 1 of the loop."""
    if form == "unroll":
        for t in range(start, stop):
            h = one(params, h, e, t=t)
        return h

    def body(h, t):
        return one(params, h, e, t=t), None

    return jax.lax.scan(body, h, jnp.arange(start, stop))[0]
