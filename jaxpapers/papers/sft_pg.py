r"""SFT-PG: optimizing DDPM sampling with shortcut fine-tuning.

Ying Fan, Kangwook Lee. "Optimizing DDPM Sampling with Shortcut Fine-Tuning", ICML 2023,
arXiv 2301.13362.

A sampler of a few steps need not imitate the backward diffusion. A pretrained denoiser
keeps S of its steps and is tuned so that the law of the last state alone minimises an
integral probability metric to the data. The reverse chain is the policy, a learned
critic's value of the last state its terminal cost, and the gradient is REINFORCE's with a
learned baseline: nothing is differentiated through the chain.

With policy $p_\theta(x_{k+1} | x_k) = N(a_k x_k + c_k \epsilon_\theta(x_k, t_k),
\sigma_k^2 I)$, k = 0 .. S-1 from noise to the sample $y = x_S$ (B, ...), critic f, which
is high on fakes, and baseline $V_w(x_k, k)$:

$$ \Phi = \sup_f E_{p_\theta} f(y) - E_{data} f(x) $$
$$ \nabla \Phi = E [f(y) \textstyle\sum_k \nabla_\theta \log p_\theta(x_{k+1}|x_k)] $$
$$ L_f = E f(x) - E f(y) + \lambda_{GP} E (|\nabla f(\hat x)| - 1)^2, \quad
   L_w = E \textstyle\sum_k (V_w(x_k, k) - f(y))^2 $$
$$ L_\theta = E [\mathrm{sg}(f(y) - V_w(x_k, k)) \log p_\theta(x_{k+1} | x_k)] $$

One update: ``n_critic`` times, draw chains with the present policy and take a step of f
and w on them; then ``n_generator`` steps of the policy on those chains.

Departures. ``leak=True`` is the released code's variant (B): $L_w$ is differentiated with
respect to f too, which keeps f predictable instead of Lipschitz. The released code draws
the policy's transitions from one permutation of all; here each step takes one transition
of every chain of a round, no two alike, so that chains stay on their device. The toy's
released code takes one policy step whatever ``n_generator`` says. The paper's gradient
penalty is not in the released code; its weight here is WGAN-GP's 10.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers.method import Method, State, WarmStart, averaged, gradient
from jaxpapers.nets import diffusion as nets
from jaxpapers.nets.critic import clip_weights, spectral_normalize
from jaxpapers.ops import chains, diffusion, policy
from jaxpapers.ops.diffusion import Chain, Trajectory, over_data
from jaxpapers.optim import named

REGULARIZERS = ("none", "spectral", "clip")
STAGES = ("pretrain", "tune")


def gradient_penalty(
    f: Callable, x: Float[Array, "B ..."], y: Float[Array, "B ..."], mix: Any
) -> Float[Array, ""]:
    r"""$E (|\nabla f(\hat x)| - 1)^2$ at points between data and samples (WGAN-GP).

    With weight w the critic's estimate of a translation by d tends to d (1 + d / 2 w):
    steeper than 1 pays off where the gap is large against the weight.

    Args:
      f: (B, *X) -> (B,).
      x: data.
      y: samples.
      mix: (B,) of U(0, 1), the share of the data.
    """
    mix = jnp.reshape(mix, (-1, *(1,) * (x.ndim - 1)))
    grads = jax.grad(lambda z: f(z).sum())(mix * x + (1 - mix) * y)
    square = jnp.square(grads.reshape(len(x), -1)).sum(1)
    # The root's own gradient is infinite where a ReLU net is flat.
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return jnp.square(norm - 1).mean()


def value_loss(
    v: Callable, states: Float[Array, "S B ..."], cost: Float[Array, " B"]
) -> Float[Array, ""]:
    """Mean over steps and chains of (V(x_k, k) - f(y))^2."""
    count, rows = states.shape[:2]
    # Chains first, so that the rows of a device stay together.
    flat = states.swapaxes(0, 1).reshape(rows * count, *states.shape[2:])
    found = v(flat, jnp.tile(jnp.arange(count), rows)).reshape(rows, count)
    return jnp.square(found - cost[:, None]).mean()


def critic_loss(
    f: Callable,
    v: Callable,
    x: Float[Array, "B ..."],
    trajectory: Trajectory,
    key: Key[Array, ""],
    *,
    leak: bool = True,
    value_weight: float = 1.0,
    penalty: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    r"""$L_f + L_w$: one loss for critic and baseline.

    Args:
      f: critic, (B, *X) -> (B,).
      v: baseline, (B, *X), k (B,) -> (B,).
      x: data.
      trajectory: chains of the present policy, with their states.
      key: of the gradient penalty's points.
      leak: whether the baseline's loss moves f.
      value_weight: of the baseline's loss; S makes the mean over steps their sum.
      penalty: weight of the gradient penalty.

    Returns:
      The loss; metrics wasserstein (the critic's estimate of the distance), value_loss,
      critic_max, and gradient_penalty where it has a weight.
    """
    y = trajectory.sample
    real, cost = f(x), f(y)
    gap = real.mean() - cost.mean()
    target = cost if leak else lax.stop_gradient(cost)
    value = value_loss(v, trajectory.states[:-1], target)
    total = gap + value_weight * value
    metrics = {
        "wasserstein": -gap,
        "value_loss": value,
        "critic_max": jnp.abs(cost).max(),
    }
    if penalty:
        mix = jax.random.uniform(key, (len(x),))
        metrics["gradient_penalty"] = gradient_penalty(f, x, y, mix)
        total = total + penalty * metrics["gradient_penalty"]
    return total, metrics


def advantage(
    f: Callable,
    v: Callable,
    x: Float[Array, "B ..."],
    k: Int[Array, " B"],
    y: Float[Array, "B ..."],
    *,
    normalize: bool = False,
    clip: float = 0.0,
) -> Float[Array, " B"]:
    """Cost of a transition's chain less its baseline, f(y) - V(x_k, k); no gradient.

    Args:
      f, v: see ``critic_loss``.
      x: states.
      k: their steps.
      y: last states of the same chains.
      normalize: to mean 0 and deviation 1 (not in the paper).
      clip: bound of its size (not in the paper); 0: none.
    """
    found = f(y) - v(x, k)
    found = policy.standardize(found) if normalize else found
    return lax.stop_gradient(jnp.clip(found, -clip, clip) if clip else found)


def policy_loss(
    eps_fn: Callable,
    chain: Chain,
    k: Int[Array, " B"],
    x: Float[Array, "B ..."],
    x_next: Float[Array, "B ..."],
    cost: Float[Array, " B"],
    *,
    reduce: str = "sum",
) -> Float[Array, ""]:
    r"""$L_\theta$: mean of the advantage times the step's log-probability, descended.

    Args:
      eps_fn: the policy, (x, time) -> predicted noise.
      chain: see ``ops.diffusion``.
      k: steps of the transitions.
      x: states.
      x_next: where they went.
      cost: advantages; high is bad.
      reduce: of the log-probability over coordinates; the toy's code sums, that for
        images takes the mean.
    """
    time = jnp.asarray(chain.time, jnp.float32)[k]
    score = diffusion.step_log_prob(chain, k, x, x_next, eps_fn(x, time), reduce)
    return policy.reinforce(score, -cost).mean()


def pathwise_loss(
    key: Key[Array, ""],
    f: Callable,
    eps_fn: Callable,
    chain: Chain,
    shape: tuple[int, ...],
) -> Float[Array, ""]:
    """E f(y), differentiable through the whole chain: what the paper avoids, for tests.

    Memory is that of S states and one net.
    """
    return f(diffusion.rollout(key, eps_fn, chain, shape, remat=True).sample).mean()


def transitions(
    trajectory: Trajectory, k: Int[Array, " B"]
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."], Float[Array, "B ..."]]:
    """(x_k, x_{k+1}, predicted noise) of each chain at its own step k."""
    step, states = k[:, None], trajectory.states
    x, x_next, eps = (
        diffusion.of_each(*pair)[:, 0]
        for pair in ((states, step), (states, step + 1), (trajectory.eps, step))
    )
    return x, x_next, eps


def pretrain_loss(
    params: dict,
    batch: dict,
    key: Key[Array, ""],
    *,
    parts: nets.Parts,
    alpha_bar: Any,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The denoiser's own loss: mean square of the noise it missed, all steps alike.

    Args:
      params: dict of net.
      batch: x (B, *X).
      key: of steps, noise and dropout.
      parts: functions of the nets.
      alpha_bar: (T,) of the forward process.
    """
    key, key_drop = jax.random.split(key)
    eps_fn = functools.partial(parts.eps, params["net"], train=True, key=key_drop)
    return diffusion.noise_loss(eps_fn, batch["x"], key, alpha_bar).mean(), {}


def loss(
    params: dict,
    batch: dict,
    key: Key[Array, ""],
    *,
    parts: nets.Parts,
    chain: Chain,
    options: Any,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """All three objectives on one round of chains; each moves its own net only.

    Args:
      params: dict of net, critic and value.
      batch: x (B, *X).
      key: of the chains.
      parts: functions of the nets.
      chain: see ``ops.chains.chain``.
      options: ``config.method``.
    """
    key_roll, key_mix = jax.random.split(key)
    eps_fn = functools.partial(parts.eps, params["net"])
    f, v = _critics(params, parts, options)
    found = diffusion.rollout(key_roll, eps_fn, chain, batch["x"].shape, store="all")
    found = lax.stop_gradient(found)
    total, metrics = critic_loss(
        f, v, batch["x"], found, key_mix, leak=options.leak,
        value_weight=options.value_weight, penalty=options.penalty,
    )  # fmt: skip
    count, rows = found.eps.shape[:2]
    k = jnp.tile(jnp.arange(count), rows)
    x, x_next = (
        s.swapaxes(0, 1).reshape(-1, *s.shape[2:])
        for s in (found.states[:-1], found.states[1:])
    )
    cost = advantage(f, v, x, k, jnp.repeat(found.sample, count, axis=0))
    own = policy_loss(eps_fn, chain, k, x, x_next, cost, reduce=options.reduce)
    return total + own, {**metrics, "policy_loss": own}


def update(
    state: State,
    batch: dict,
    *,
    parts: nets.Parts,
    chain: Chain,
    options: Any,
    txs: Mapping[str, optax.GradientTransformation],
) -> tuple[State, dict[str, Array]]:
    """One cycle: rounds of chains with critic steps, then policy steps on the chains.

    Args:
      state: params and opt_state are dicts of net, critic and value.
      batch: x (n_critic B, *X), the data of all rounds.
      parts, chain, options: see ``loss``.
      txs: an optimizer for each net.

    Returns:
      The state, and means of ``critic_loss``'s metrics over the rounds and of
      policy_loss, advantage_std, ratio_deviation (0 at the first step: the policy that is
      trained is the one that acted) and grad_norm (of the policy) over the steps.
    """
    key = jax.random.fold_in(state.key, state.step)
    key_rounds, key_order = jax.random.split(key)
    rounds = options.n_critic
    _check_batch(batch["x"], parts.shape, rounds)
    # Rows of a device stay there: each round takes every rounds-th of them.
    x = over_data(batch["x"])
    x = x.reshape(-1, rounds, *x.shape[1:]).swapaxes(0, 1)
    critics = {name: state.params[name] for name in ("critic", "value")}
    critic_opt = {name: state.opt_state[name] for name in critics}
    acting = functools.partial(parts.eps, state.params["net"])

    def critic_step(carry, inputs):
        params, opt = carry
        x, key = inputs
        key_roll, key_mix = jax.random.split(key)
        found = diffusion.rollout(key_roll, acting, chain, x.shape, store="all")

        def objective(params):
            return critic_loss(
                *_critics(params, parts, options), x, found, key_mix,
                leak=options.leak, value_weight=options.value_weight,
                penalty=options.penalty,
            )  # fmt: skip

        grads, metrics = jax.grad(objective, has_aux=True)(params)
        params, opt = _apply(txs, params, opt, grads)
        if options.regularizer == "clip":
            params["critic"] = clip_weights(params["critic"], options.weight_bound)
        return (params, opt), (found, metrics)

    keys = jax.random.split(key_rounds, rounds)
    (critics, critic_opt), (found, metrics) = lax.scan(
        critic_step, (critics, critic_opt), (x, keys)
    )
    f, v = _critics(critics, parts, options)
    order = jax.random.uniform(key_order, (*x.shape[:2], len(chain.std))).argsort(-1)

    def policy_step(carry, j):
        params, opt = carry
        round_ = j % rounds
        own = jax.tree.map(lambda s: s[round_], found)
        k = order[round_, :, j // rounds]
        x, x_next, eps_old = transitions(own, k)
        cost = advantage(
            f, v, x, k, own.sample, normalize=options.normalize, clip=options.cost_clip
        )

        def objective(params):
            eps_fn = functools.partial(parts.eps, params["net"])
            return _policy_objective(
                eps_fn, chain, k, x, x_next, eps_old, cost, options
            )

        (value, log_ratio), grads = jax.value_and_grad(objective, has_aux=True)(params)
        params, opt = _apply(txs, params, opt, grads)
        return (params, opt), {
            "policy_loss": value,
            "advantage_std": cost.std(),
            "ratio_deviation": jnp.abs(jnp.exp(log_ratio) - 1).max(),
            "grad_norm": optax.tree.norm(grads),
        }

    net = {"net": state.params["net"]}
    net_opt = {"net": state.opt_state["net"]}
    steps = jnp.arange(options.n_generator)
    (net, net_opt), policy_metrics = lax.scan(policy_step, (net, net_opt), steps)
    metrics = jax.tree.map(lambda m: m.mean(0), {**metrics, **policy_metrics})
    metrics["first_ratio_deviation"] = policy_metrics["ratio_deviation"][0]
    # The objectives' sum, as in ``loss``: none of them falls by itself.
    metrics["loss"] = (
        metrics["policy_loss"]
        - metrics["wasserstein"]
        + options.value_weight * metrics["value_loss"]
        + options.penalty * metrics.get("gradient_penalty", 0.0)
    )
    state = state._replace(
        step=state.step + 1,
        params={**net, **critics},
        opt_state={**net_opt, **critic_opt},
    )
    return state, metrics


def sampler(
    params: dict,
    key: Key[Array, ""],
    shape: tuple[int, ...],
    *,
    parts: nets.Parts,
    chain: Chain,
) -> Float[Array, "B ..."]:
    """Samples of shape (B, *X) by the chain, from N(0, I).

    Args:
      params: dict with net.
      key: of the chains.
      shape: of the result.
      parts: functions of the nets.
      chain: any chain over the same net, e.g. all of training's steps.
    """
    eps_fn = functools.partial(parts.eps, params["net"])
    return diffusion.rollout(key, eps_fn, chain, shape).sample


def make(config: Any) -> Method:
    """Binds ``config`` (see configs/sft_pg.py) at its ``method.stage``.

    Args:
      config: groups ``data``, ``net``, ``pretrain``, ``optim``, ``method``, ``train``.

    Raises:
      ValueError: unknown names, or values out of range.
    """
    options = config.method
    if options.stage not in STAGES:
        raise ValueError(
            f"config.method.stage must be one of {STAGES}, got {options.stage!r}"
        )
    chain = chains.chain(options)
    parts = nets.parts(config.net, options.steps, options.timesteps)
    sample = functools.partial(sampler, parts=parts, chain=chain)
    if options.stage == "pretrain":
        return _pretrain(config, parts, sample)
    _check(config, chain)
    txs = {
        "net": optax.chain(
            optax.clip_by_global_norm(config.optim.clip)
            if config.optim.clip
            else optax.identity(),
            optax.adam(config.optim.lr),
        ),
        "critic": optax.adam(config.optim.critic_lr),
        "value": optax.adam(config.optim.value_lr),
    }
    bound = {"parts": parts, "chain": chain, "options": options}

    def init(key, batch):
        del batch
        key, *keys = jax.random.split(key, 4)
        params = {
            "net": parts.init_net(keys[0]),
            "critic": parts.init_critic(keys[1]),
            "value": parts.init_value(keys[2]),
        }
        if options.regularizer == "clip":
            params["critic"] = clip_weights(params["critic"], options.weight_bound)
        opt_state = {name: tx.init(params[name]) for name, tx in txs.items()}
        return State(jnp.zeros((), jnp.int32), params, opt_state, (), key)

    def adopt(state, found):
        return state._replace(
            params={**state.params, "net": found["extra"]["ema"]["net"]}
        )

    return Method(
        init,
        functools.partial(loss, **bound),
        functools.partial(update, txs=txs, **bound),
        lambda params, key, shape, extra=None, **kw: sample(params, key, shape, **kw),
        nets.RULES[config.net.model],
        warm_start=WarmStart(
            lambda shapes: {"extra": {"ema": {"net": shapes.params["net"]}}}, adopt
        ),
    )


def _pretrain(config, parts, sample):
    alpha_bar = diffusion.alpha_bars(chains.betas(config.method))
    method = gradient(
        lambda key, batch: {"net": parts.init_net(key)},
        functools.partial(pretrain_loss, parts=parts, alpha_bar=alpha_bar),
        named.by_name(config.pretrain, config.train.steps),
        sampler=sample,
        rules=nets.RULES[config.net.model],
        accumulate=config.train.accumulate,
    )
    return averaged(method, config.pretrain.ema)


def _critics(params, parts, options):
    critic = params["critic"]
    if options.regularizer == "spectral":
        # The power method: an exact decomposition of every kernel would be the step.
        critic = spectral_normalize(critic, iterations=20)
    return (
        functools.partial(parts.critic, critic),
        functools.partial(parts.value, params["value"]),
    )


def _policy_objective(eps_fn, chain, k, x, x_next, eps_old, cost, options):
    """The policy's loss and the log-ratios to the policy that acted."""
    time = jnp.asarray(chain.time, jnp.float32)[k]
    eps = eps_fn(x, time)
    log_ratio = diffusion.step_log_ratio(
        chain, k, x, x_next, eps, eps_old, options.reduce
    )
    if options.ratio_clip:
        own = policy.clipped_surrogate(log_ratio, -cost, options.ratio_clip)
        return own.mean(), log_ratio
    own = policy_loss(lambda *_: eps, chain, k, x, x_next, cost, reduce=options.reduce)
    return own, log_ratio


def _apply(txs, params, opt, grads):
    changed, states = {}, {}
    for name in params:
        updates, states[name] = txs[name].update(grads[name], opt[name], params[name])
        changed[name] = optax.apply_updates(params[name], updates)
    return changed, states


def _check_batch(x, shape, rounds):
    if x.shape[1:] != shape or len(x) % rounds:
        raise ValueError(
            f"a cycle needs x of shape (n, {', '.join(map(str, shape))}) with n a "
            f"multiple of method.n_critic={rounds}, got {x.shape}"
        )


def _check(config, chain):
    c, optim = config.method, config.optim
    if c.regularizer not in REGULARIZERS:
        raise ValueError(
            f"config.method.regularizer must be one of {REGULARIZERS}, got "
            f"{c.regularizer!r}"
        )
    for name in ("n_critic", "n_generator"):
        if c[name] < 1:
            raise ValueError(f"config.method.{name} must be >= 1, got {c[name]}")
    if config.data.batch % c.n_critic:
        raise ValueError(
            f"config.data.batch must be a multiple of method.n_critic, which is "
            f"{c.n_critic}, got {config.data.batch}"
        )
    if c.n_generator > c.n_critic * c.steps:
        raise ValueError(
            "config.method.n_generator must be <= n_critic * steps, "
            f"{c.n_critic * c.steps}, so that no transition comes twice; got "
            f"{c.n_generator}"
        )
    if c.reduce not in diffusion.REDUCTIONS:
        raise ValueError(
            f"config.method.reduce must be one of {diffusion.REDUCTIONS}, got "
            f"{c.reduce!r}"
        )
    if c.regularizer == "clip" and c.weight_bound == 0:
        raise ValueError(
            "config.method.weight_bound must be > 0 to clip weights, got 0"
        )
    whole = (chain.time == np.round(chain.time)).all()
    if config.net.model == "steps" and not whole:
        raise ValueError(
            "config.net.model='steps' has a vector for each whole step; the times of "
            f"method.sampler={c.sampler!r} are not whole: use mlp or unet"
        )
    for name in ("penalty", "value_weight", "ratio_clip", "cost_clip", "weight_bound"):
        if c[name] < 0:
            raise ValueError(f"config.method.{name} must be >= 0, got {c[name]}")
    for name in ("lr", "critic_lr", "value_lr"):
        if optim[name] <= 0:
            raise ValueError(f"config.optim.{name} must be > 0, got {optim[name]}")
    if optim.clip < 0:
        raise ValueError(f"config.optim.clip must be >= 0, got {optim.clip}")
    if config.train.accumulate != 1:
        raise ValueError(
            "config.train.accumulate must be 1: a cycle's rounds are its parts, got "
            f"{config.train.accumulate}"
        )
    diffusion.check_density(chain)
