"""Hyper-parameters of CODA, and what its nets read of states, contexts and actions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpapers.options import check_choices, check_least

ENCODINGS = ("compact", "reference")
LEARN = ("iql", "bc", "reward", "goals")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    """Options of the nets: V(o), two of Q(o, a), and a Gaussian policy.

    Attributes:
      state: size of a state, n.
      action: size of an action, A.
      context: size of a context, k.
      known: values of contexts that are numbers, which ``compact`` embeds as one-hot
        vectors; (): contexts are vectors.
      example: size of the examples' contexts that a goal model reads.
      examples: their values where they are numbers, as ``known``.
      encoding: ``reference``: observations [0_k, s, c, 0_n] and actions [a, 0] or
        [0_A, fake]; ``compact``: [s, embed(c)] and [a, flag].
      fake: the fictitious action's number in ``reference``.
      hidden: widths of the ReLU layers.
      squash: tanh of the policy's mean, as the original IQL has it.
      init: ``torch``: kernels and biases uniform within 1 / sqrt(fan-in);
        ``orthogonal``: kernels of gain sqrt 2, biases 0.
    """

    state: int
    action: int
    context: int
    known: tuple = ()
    example: int = 1
    examples: tuple = ()
    encoding: str = "compact"
    fake: float = 10.0
    hidden: tuple[int, ...] = (256, 256, 256)
    squash: bool = False
    init: str = "torch"

    def __post_init__(self):
        check_least(self, "net", state=1, action=1, context=1)
        check_choices(self, "net", encoding=ENCODINGS, init=("torch", "orthogonal"))
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"net.hidden must be widths >= 1, got {self.hidden}")
        if self.known and self.context != 1:
            raise ValueError(
                f"net.known lists contexts that are numbers, got net.context="
                f"{self.context}"
            )

    @property
    def observation(self) -> int:
        """Size of an encoded observation."""
        if self.encoding == "reference":
            return 2 * (self.context + self.state)
        return self.state + (len(self.known) or self.context)

    @property
    def outputs(self) -> int:
        """Size of the policy's mean."""
        return self.action + (self.encoding == "reference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the learner; defaults are the authors'.

    Attributes:
      learn: ``iql``, ``bc`` (behaviour cloning), or a model for the baselines:
        ``reward`` (probabilities that a state is in a context's goal set), ``goals`` (a
        mixture of Gaussians over goals, given a context).
      order: ``coda``: V and Q from the old V, then the policy from the new targets;
        ``iql``: V, policy, Q from the new V, and the two critics' errors are summed.
      updates: of a step, in one scan.
      discount: gamma.
      expectile: tau of V.
      temperature: beta, of the advantages' exponent.
      cap: largest weight of an action.
      rate: of the target critics.
      low: smallest target of Q; the largest is 0.
      clip: norm that the policy's gradient is clipped to; 0: never.
      label: ``given``: the batch says which states are goals; ``model``: a reward model
        of the stage before.
      pessimism: ``mean`` of the reward models; ``min``: their least minus ``width``
        standard deviations (PDS).
      width: see ``pessimism``.
      members: reward models.
      negatives: whether reward models are told that unlabelled pairs are no goals (UDS).
      goals: Gaussians of the goal model that the policy's contexts come from; 0: none.
      model_hidden: widths of reward and goal models.
    """

    learn: str = "iql"
    order: str = "coda"
    updates: int = 1
    discount: float = 0.99
    expectile: float = 0.9
    temperature: float = 10.0
    cap: float = 100.0
    rate: float = 0.005
    low: float = -110.0
    clip: float = 0.1
    label: str = "given"
    pessimism: str = "mean"
    width: float = 1.0
    members: int = 10
    negatives: bool = True
    goals: int = 0
    model_hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self):
        check_choices(self, "method", learn=LEARN, order=("coda", "iql"),
                      label=("given", "model"), pessimism=("mean", "min"))  # fmt: skip
        check_least(self, "method", updates=1, members=1, goals=0, clip=0, width=0,
                    temperature=0)  # fmt: skip
        between = {"discount": self.discount, "expectile": self.expectile}
        for name, value in between.items():
            if not 0 < value < 1:
                raise ValueError(f"method.{name} must be in (0, 1), got {value}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"method.rate must be in (0, 1], got {self.rate}")
        if not self.cap > 0:
            raise ValueError(f"method.cap must be > 0, got {self.cap}")
        if not self.low < 0:
            raise ValueError(f"method.low must be < 0, got {self.low}")
        if not self.model_hidden or min(self.model_hidden) < 1:
            raise ValueError(
                f"method.model_hidden must be widths >= 1, got {self.model_hidden}"
            )
        if self.learn == "goals" and not self.goals:
            raise ValueError("method.goals must be >= 1 with method.learn=goals, got 0")


def encode_observation(
    state: Float[Array, "*batch n"], context: Float[Array, "*batch k"], net: Net
) -> Float[Array, "*batch O"]:
    """What the nets read of a state and a context."""
    if net.encoding == "compact":
        return jnp.concatenate([state, embed(context, net)], -1)
    zeros = jnp.zeros_like
    return jnp.concatenate([zeros(context), state, context, zeros(state)], -1)


def encode_next(
    state: Float[Array, "*batch n"],
    context: Float[Array, "*batch k"],
    fictitious: Float[Array, "*batch"],
    net: Net,
) -> Float[Array, "*batch O"]:
    """The observation after a transition; that of s+ is never looked at."""
    real = encode_observation(state, context, net)
    if net.encoding == "compact":
        return real
    zeros = jnp.zeros_like(state)
    terminal = jnp.concatenate([context, zeros, context, zeros], -1)
    return jnp.where(fictitious[..., None] > 0, terminal, real)


def embed(context: Float[Array, "*batch k"], net: Net) -> Float[Array, "*batch E"]:
    """A context vector, or the one-hot vector of a known number."""
    if not net.known:
        return context
    return one_hot(context, net.known)


def one_hot(
    context: Float[Array, "*batch 1"], known: tuple
) -> Float[Array, "*batch E"]:
    """One-hot vectors of numbers; of a number that is not known, zeros."""
    values = jnp.asarray(known, context.dtype)
    values = values.reshape((1,) * (context.ndim - 1) + (-1,))
    return (context == values).astype(context.dtype)


def encode_action(
    action: Float[Array, "*batch A"], fictitious: Float[Array, "*batch"], net: Net
) -> Float[Array, "*batch A+1"]:
    """[a, 0] of real actions, [0, fake] of the fictitious one; compact: [0, 1]."""
    fictitious = fictitious[..., None]
    fake = net.fake if net.encoding == "reference" else 1.0
    return jnp.concatenate([action * (1 - fictitious), fake * fictitious], -1)


def encode_batch(
    batch: Mapping[str, Array], net: Net
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Value batch and policy batch of the nets.

    Args:
      batch: ``state, action, next, context`` of a transition; ``fictitious``, 1 for a+;
        ``goal``, the probability that the transition ends the problem, 1 for a+;
        ``policy_state, policy_action, policy_context`` of real transitions.
      net: whose encoding it is.

    Returns:
      Value batch ``observation, action, reward, next, done``: reward goal - 1, done
      goal; policy batch ``observation, action``, the action as ``Net.outputs`` has it.
    """
    fictitious = batch["fictitious"]
    value = {
        "observation": encode_observation(batch["state"], batch["context"], net),
        "action": encode_action(batch["action"], fictitious, net),
        "reward": batch["goal"] - 1,
        "next": encode_next(batch["next"], batch["context"], fictitious, net),
        "done": batch["goal"],
    }
    zero = jnp.zeros_like(batch["policy_action"][..., 0])
    action = encode_action(batch["policy_action"], zero, net)
    policy = {
        "observation": encode_observation(
            batch["policy_state"], batch["policy_context"], net
        ),
        "action": action,
    }
    return value, policy
