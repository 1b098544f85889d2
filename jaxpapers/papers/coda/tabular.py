r"""The augmented problem with finitely many states, and its values by iteration.

$$ V^+(s, c) = \max(1[s \in G_c],\ \gamma \max_a E V^+(s', c)) $$

is the original problem's value, E gamma^(steps to G_c) under the best policy.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def augmented_mdp(
    transitions: Float[Array, "S A S"], goal: Bool[Array, " S"], *, shift: bool = False
) -> tuple[Float[Array, "S+1 A+1 S+1"], Float[Array, "S+1 A+1"]]:
    """Transitions and rewards of the augmented problem of one context.

    Args:
      transitions: P(s' | s, a).
      goal: the context's goal set.
      shift: the released code's rewards: -1 for real actions, 0 for the fictitious one
        in the goal set. Outside it that code's data have no fictitious action, which
        is a reward of -infinity.

    Returns:
      P+ and R+; state S is s+, which is absorbing, and action A is a+.

    Example:
      >>> P = jnp.array([[[0.0, 1.0]], [[0.0, 1.0]]])
      >>> P_plus, R_plus = jax.jit(augmented_mdp)(P, jnp.array([False, True]))
      >>> R_plus.tolist()
      [[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    states, actions, _ = transitions.shape
    p = jnp.zeros((states + 1, actions + 1, states + 1), transitions.dtype)
    p = p.at[:states, :actions, :states].set(transitions)
    p = p.at[:, actions, states].set(1.0).at[states, :, states].set(1.0)
    r = jnp.zeros((states + 1, actions + 1), transitions.dtype)
    if shift:
        r = r.at[:states, :actions].set(-1.0)
        r = r.at[:states, actions].set(jnp.where(goal, 0.0, -jnp.inf))
    else:
        r = r.at[:states, actions].set(goal.astype(r.dtype))
    return p, r


def value_iteration(
    transitions: Float[Array, "S A S"],
    rewards: Float[Array, "S A"],
    discount: float,
    iterations: int = 3000,
) -> tuple[Float[Array, " S"], Float[Array, "S A"]]:
    """Optimal values and action values.

    Args:
      transitions: P(s' | s, a).
      rewards: of states and actions.
      discount: gamma.
      iterations: of the Bellman operator, from 0.
    """

    def backup(v):
        # The product has no NaN: v is finite.
        return rewards + discount * jnp.einsum("ijk,k->ij", transitions, v)

    v = jax.lax.fori_loop(
        0, iterations, lambda _, v: backup(v).max(1), jnp.zeros(len(rewards))
    )
    return v, backup(v)
