"""One-line mistakes in the equations of each paper, which the default tests must catch.

``python tests/mutations.py [paper ...]`` makes each in a copy of the tree and runs the
tests named beside it; it exits with 1 if they pass, or if a line is no longer there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutation(NamedTuple):
    """``before`` occurs once in ``file``; with ``after`` one of ``tests`` must fail."""

    paper: str
    file: str
    before: str
    after: str
    tests: list[str]


# Rows are (file, before, after, tests).
DION = [
    # Error feedback: only what the update used decays.
    (
        "jaxpapers/optim/dion_step.py",
        "b - (1 - mu) * x for b, x in",
        "b - mu * x for b, x in",
        ["tests/optim/test_parity.py"],
    ),
    # The whole momentum decays beside a residual.
    (
        "jaxpapers/optim/dion_step.py",
        "taken = [back(*x) for x in zip(orders, ps, rs)] if plain else None",
        "taken = [back(*x) for x in zip(orders, ps, rs)]",
        ["tests/optim/test_residual.py::test_equals_the_equations"],
    ),
    # |N - P R^T|^2 = |N|^2 - |R|^2.
    (
        "jaxpapers/optim/residual.py",
        "jnp.maximum(whole - taken, floor * whole)",
        "jnp.maximum(whole, floor * whole)",
        ["tests/optim/test_residual.py::test_equals_the_equations"],
    ),
    # Below its least exponent N is noise.
    (
        "jaxpapers/optim/residual.py",
        "zero | (exponent < LEAST)",
        "zero",
        ["tests/optim/test_residual.py::test_gradients_at_the_end_of_the_range"],
    ),
    # Where N Q is all zero, R is not N^T P.
    (
        "jaxpapers/optim/residual.py",
        "zero | (exponent < LEAST)",
        "exponent < LEAST",
        ["tests/optim/test_residual.py::test_no_residual_where_q_sees_nothing"],
    ),
    # eps in both denominators.
    (
        "jaxpapers/optim/residual.py",
        "rest + math.sqrt(left) * eps",
        "rest",
        ["tests/optim/test_residual.py::test_a_layer_that_gets_no_gradients_any_more"],
    ),
    # What is rounding error is no direction.
    (
        "jaxpapers/optim/residual.py",
        "FLOOR = 1024",
        "FLOOR = 0",
        ["tests/optim/test_residual.py::test_what_is_rounding_error_stays_small"],
    ),
    # Fused matrices lie along the first output axis.
    (
        "jaxpapers/optim/layout.py",
        "(self.q_axes if self.p_axes == self.reduction else self.p_axes)[0]",
        "self.p_axes[0]",
        ["tests/optim/test_fused.py::test_equals_matrices_stored_apart"],
    ),
    # The mesh axes of the split axis follow those of the axis that takes them.
    (
        "jaxpapers/optim/fused.py",
        "moved = mesh_axes(entries[a]) + names",
        "moved = names + mesh_axes(entries[a])",
        ["tests/optim/test_fused_sharded.py"],
    ),
    # Cautious decay: where the update goes towards zero.
    (
        "jaxpapers/optim/weight_decay.py",
        "jnp.sign(u) * jnp.sign(x) >= 0",
        "jnp.sign(u) * jnp.sign(x) <= 0",
        ["tests/optim/test_weight_decay.py::test_is_the_papers_formula"],
    ),
    # The momentum one step ahead.
    (
        "jaxpapers/optim/dion_step.py",
        "mu * b + x * g.astype(dtype) for b, g",
        "b + x * g.astype(dtype) for b, g",
        ["tests/optim/test_residual.py::test_equals_the_equations"],
    ),
    # What the update takes of a momentum comes back too, but not beside a residual.
    (
        "jaxpapers/optim/exchange.py",
        "return 3 if residual is None else 2",
        "return 2 if residual is None else 3",
        ["tests/optim/test_exchange.py::test_plan_of_an_fsdp_mesh"],
    ),
    # Stacks of one scale each.
    (
        "jaxpapers/optim/exchange.py",
        "inputs.append((n, q, small[members[0]], order))",
        "inputs.append((n, q, 1.0, order))",
        ["tests/optim/test_exchange.py::test_equals_one_device"],
    ),
    # Q goes with the matrices that devices exchange.
    (
        "jaxpapers/optim/exchange.py",
        "(arrays * l + 2 * rank) * item",
        "(arrays * l) * item",
        ["tests/optim/test_exchange.py::test_fewer_bytes_decide"],
    ),
    # Replicas must not have more to average.
    (
        "jaxpapers/optim/exchange.py",
        "whole_average > thin_average",
        "whole_average > 3 * thin_average",
        ["tests/optim/test_exchange.py::test_fewer_bytes_decide"],
    ),
    # Q with columns of unit length.
    (
        "jaxpapers/optim/dion_step.py",
        "length = norm + x * eps",
        "length = norm.max(-1, keepdims=True) + x * eps",
        ["tests/optim/test_dion.py::test_invariants"],
    ),
    # sqrt(fan_out / fan_in).
    (
        "jaxpapers/optim/layout.py",
        "return math.sqrt(self.fan_out / self.fan_in)",
        "return math.sqrt(self.fan_in / self.fan_out)",
        ["tests/optim/test_dion.py::test_chained_update_is_the_papers_step"],
    ),
]

MUON = [
    (
        "jaxpapers/optim/muon.py",
        "saturated_sum(options.mu * m.astype(dtype), g) for m, g",
        "saturated_sum(m.astype(dtype), options.mu * g) for m, g",
        ["tests/optim/test_muon.py::test_same_direction_as_optax"],
    ),
    (
        "jaxpapers/optim/muon.py",
        "    if options.nesterov:",
        "    if not options.nesterov:",
        ["tests/optim/test_muon.py::test_same_direction_as_optax"],
    ),
    (
        "jaxpapers/optim/newton_schulz.py",
        "(3.4445, -4.7750, 2.0315)",
        "(3.4445, -4.7750, 2.3015)",
        ["tests/optim/test_muon.py::test_the_published_polynomials"],
    ),
]

NORMUON = [
    (
        "jaxpapers/optim/neurons.py",
        "factor = 1 / (jnp.sqrt(v) + eps)",
        "factor = 1 / (v + eps)",
        ["tests/optim/test_muon.py::test_normuon_has_equal_rows_and_the_old_norm"],
    ),
    # The norm of before.
    (
        "jaxpapers/optim/neurons.py",
        "jnp.sqrt(before / jnp.where(after == 0, 1, after))",
        "jnp.sqrt(1 / jnp.where(after == 0, 1, after))",
        ["tests/optim/test_muon.py::test_normuon_has_equal_rows_and_the_old_norm"],
    ),
    (
        "jaxpapers/optim/muon.py",
        "v = options.b2 * v + (1 - options.b2) * square",
        "v = options.b2 * v + options.b2 * square",
        ["tests/optim/test_muon.py::test_normuon_is_its_formula"],
    ),
]

DION2 = [
    (
        "jaxpapers/optim/dion2.py",
        "momentum = jnp.where(columns.chosen, options.mu * b, b)",
        "momentum = jnp.where(columns.chosen, b, options.mu * b)",
        [
            "tests/optim/test_muon.py::test_dion2_uses_the_largest_rows_and_keeps_the_rest"
        ],
    ),
    # The largest L1 norms.
    (
        "jaxpapers/optim/dion2.py",
        "index = lax.top_k(norms, ",
        "index = lax.top_k(-norms, ",
        [
            "tests/optim/test_muon.py::test_dion2_uses_the_largest_rows_and_keeps_the_rest"
        ],
    ),
    # A slice lands behind those of the devices before.
    (
        "jaxpapers/optim/columns.py",
        "share * k + start,",
        "share * k,",
        ["tests/optim/test_columns.py::test_columns_there_and_back"],
    ),
]

SFT_PG = [
    (
        "jaxpapers/papers/sft_pg/objectives.py",
        "policy.reinforce(score, -cost).mean()",
        "policy.reinforce(score, cost).mean()",
        [
            "tests/papers/test_sft_pg.py::test_policy_gradient_is_that_of_the_expected_cost"
        ],
    ),
    (
        "jaxpapers/papers/sft_pg/objectives.py",
        "return jnp.square(norm - 1).mean()",
        "return (norm - 1).mean()",
        ["tests/papers/test_sft_pg.py::test_recorded_gradient_penalty"],
    ),
    (
        "jaxpapers/papers/sft_pg/objectives.py",
        "target = cost if leak else lax.stop_gradient(cost)",
        "target = cost",
        ["tests/papers/test_sft_pg.py::test_recorded_critic_and_value_losses"],
    ),
]

DPOK = [
    (
        "jaxpapers/papers/dpok/objective.py",
        "total = alpha * surrogate + beta * divergence",
        "total = alpha * surrogate - beta * divergence",
        ["tests/papers/test_dpok.py::test_recorded_losses"],
    ),
    (
        "jaxpapers/papers/dpok/value.py",
        "return jnp.repeat(rollout.reward, each) - v",
        "return jnp.repeat(rollout.reward, each) + v",
        ["tests/papers/test_dpok.py::test_advantages_of_transitions"],
    ),
    (
        "jaxpapers/papers/dpok/supervised.py",
        "total = total + gamma * _mean_square(target - eps)",
        "total = total + gamma * _mean_square(target + eps)",
        ["tests/papers/test_dpok.py::test_kl_d_is_sft_with_a_shifted_reward"],
    ),
]

SCORE_WASSERSTEIN = [
    (
        "jaxpapers/papers/score_wasserstein/discrete.py",
        "return integrating_factor(0.5 * betas, L_s, betas, None)",
        "return integrating_factor(-0.5 * betas, L_s, betas, None)",
        [
            "tests/papers/test_score_wasserstein.py::test_certificate_of_a_translated_score"
        ],
    ),
    (
        "jaxpapers/papers/score_wasserstein/bound.py",
        "_log_integral(_log(g2) + log_I + 0.5 * _log(b), t)",
        "_log_integral(_log(g2) + log_I + _log(b), t)",
        [
            "tests/papers/test_score_wasserstein.py::test_certificate_of_a_translated_score"
        ],
    ),
    (
        "jaxpapers/papers/score_wasserstein/matching.py",
        'log = log + (2 if name == "I2" else 1) * log_I',
        "log = log + log_I",
        ["tests/papers/test_score_wasserstein_losses.py::test_discrete_weights"],
    ),
]

DIN = [
    (
        "jaxpapers/nets/attention.py",
        "product(query * keys, w_product) + product(keys, w_key - w_difference)",
        "product(query * keys, w_product) + product(keys, w_key + w_difference)",
        ["tests/papers/test_din.py"],
    ),
    (
        "jaxpapers/nets/mlp.py",
        "y = s * (p + (1 - p) * channels(alpha, s))",
        "y = s * (p + (1 + p) * channels(alpha, s))",
        ["tests/nets/test_mlp.py"],
    ),
    (
        "jaxpapers/papers/din.py",
        "return 0.5 * lam * (scale * jnp.square(table).sum(-1)).sum()",
        "return lam * (scale * jnp.square(table).sum(-1)).sum()",
        ["tests/papers/test_din.py"],
    ),
]

DIEN = [
    (
        "jaxpapers/nets/gru.py",
        '"augru": (jnp.zeros_like(seen), seen * a),',
        '"augru": (jnp.zeros_like(seen), seen),',
        ["tests/nets/test_gru.py"],
    ),
    (
        "jaxpapers/nets/gru.py",
        "to_candidate = e * strength * (1 - candidate**2)",
        "to_candidate = e * strength * (1 - candidate)",
        ["tests/nets/test_gru.py"],
    ),
    (
        "jaxpapers/papers/dien/auxiliary.py",
        "nats = jax.nn.softplus(-logit[0]) + jax.nn.softplus(logit[1])",
        "nats = jax.nn.softplus(-logit[0]) - jax.nn.softplus(logit[1])",
        ["tests/papers/test_dien.py"],
    ),
]

SIM = [
    (
        "jaxpapers/papers/sim/gsu.py",
        "(target @ w_a.T) @ w_b, hist_emb)",
        "(target @ w_b.T) @ w_a, hist_emb)",
        ["tests/papers/test_sim.py"],
    ),
    (
        "jaxpapers/papers/sim/units.py",
        'read["length"][:, None] - net.skip',
        'read["length"][:, None] + net.skip',
        ["tests/papers/test_sim.py"],
    ),
    (
        "jaxpapers/papers/sim/__init__.py",
        'value = beta * metrics["esu"]',
        'value = metrics["esu"]',
        ["tests/papers/test_sim.py"],
    ),
]

ROCKET = [
    (
        "jaxpapers/papers/rocket/objective.py",
        "target, deep = lax.stop_gradient((target, deep))",
        "target, deep = (target, deep)",
        ["tests/papers/test_rocket.py"],
    ),
    (
        "jaxpapers/papers/rocket/objective.py",
        'total = total + options.lam * metrics["hint"]',
        'total = total + metrics["hint"]',
        ["tests/papers/test_rocket.py"],
    ),
    (
        "jaxpapers/papers/rocket/hints.py",
        "target = jax.nn.softmax(booster / temperature)",
        "target = jax.nn.softmax(light / temperature)",
        ["tests/papers/test_rocket.py"],
    ),
]

DEFER = [
    (
        "jaxpapers/papers/defer/weights.py",
        "    p = jax.lax.stop_gradient(p)\n",
        "",
        ["tests/papers/test_defer_weights.py::test_no_gradient_through_weights"],
    ),
    (
        "jaxpapers/papers/defer/weights.py",
        "w_pos = p / jnp.maximum(p - late / 2, 1e-6)",
        "w_pos = p / jnp.maximum(p - late, 1e-6)",
        ["tests/papers/test_defer_weights.py"],
    ),
    (
        "jaxpapers/papers/defer/weights.py",
        "pending = -jnp.logaddexp(log_not, log_p - rate * elapsed)",
        "pending = -jnp.logaddexp(log_not, log_p + rate * elapsed)",
        ["tests/papers/test_defer_weights.py"],
    ),
]

POEM = [
    # Nearest to the boundary, not farthest on the outliers' side.
    (
        "jaxpapers/papers/poem/mining.py",
        "return -jnp.abs(jnp.matmul(z, w, precision=HIGHEST))",
        "return jnp.matmul(z, w, precision=HIGHEST)",
        [
            "tests/tasks/test_outliers.py::test_a_round_by_hand_on_one_device_and_on_several"
        ],
    ),
    # The ID rows count once for each round of the buffer.
    (
        "jaxpapers/tasks/mining.py",
        "np.arange(len(train)), len(rounds))]",
        "np.arange(len(train)), 1)]",
        [
            "tests/tasks/test_outliers.py::test_a_round_by_hand_on_one_device_and_on_several"
        ],
    ),
    # Outliers are pushed above their margin.
    (
        "jaxpapers/ops/ood.py",
        "jax.nn.relu(m_out - energy(logits_out))",
        "jax.nn.relu(energy(logits_out) - m_out)",
        ["tests/ops/test_ood.py"],
    ),
    # The outliers' class is the last one.
    (
        "jaxpapers/ops/ood.py",
        "return (jax.nn.logsumexp(logits_out, -1) - logits_out[:, -1]).mean()",
        "return (jax.nn.logsumexp(logits_out, -1) - logits_out[:, 0]).mean()",
        ["tests/ops/test_ood.py::test_scores_by_hand"],
    ),
    # One pass over both halves.
    (
        "jaxpapers/papers/poem/objective.py",
        'if batch_norm == "separate":',
        'if batch_norm != "separate":',
        [
            "tests/papers/test_poem.py::test_separate_batches_hide_what_sets_outliers_apart"
        ],
    ),
    # sigma_n divides the moment too.
    (
        "jaxpapers/ops/posterior.py",
        'target = solve_triangular(root, stats.moment / noise, trans="T")',
        'target = solve_triangular(root, stats.moment, trans="T")',
        ["tests/ops/test_posterior.py::test_closed_forms"],
    ),
    # Of equal scores the lower index.
    (
        "jaxpapers/ops/selection.py",
        "bits, early = _bits(scores), ~index.astype(jnp.uint32)",
        "bits, early = _bits(scores), index.astype(jnp.uint32)",
        ["tests/ops/test_selection.py::test_as_a_full_sort"],
    ),
    # The average precision of the positive class.
    (
        "jaxpapers/ops/detection.py",
        "precision, recall = hits / (hits + false), hits / hits[-1]",
        "precision, recall = hits / (hits + false[-1]), hits / hits[-1]",
        ["tests/ops/test_detection.py"],
    ),
]

LOOPED_TRANSFORMER = [
    # The input is injected in every step.
    (
        "jaxpapers/papers/looped_transformer/network.py",
        "        z = h + e\n",
        "        z = h\n",
        ["tests/papers/test_looped_transformer.py::test_recorded_run"],
    ),
    # A row keeps its state after T steps.
    (
        "jaxpapers/papers/looped_transformer/network.py",
        "return _where(t < n_steps, one(params, h, e, t=t), h)",
        "return _where(t <= n_steps, one(params, h, e, t=t), h)",
        [
            "tests/papers/test_looped_transformer.py"
            "::test_masked_scan_is_the_loop_by_hand"
        ],
    ),
    # Truncation stops the gradient before the last steps.
    (
        "jaxpapers/papers/looped_transformer/network.py",
        "h = _where(t <= n_steps - net.grad_loops,",
        "h = _where(t < n_steps - net.grad_loops,",
        [
            "tests/papers/test_looped_transformer.py"
            "::test_gradient_of_the_last_steps_only"
        ],
    ),
    # The step of the smallest cross-entropy.
    (
        "jaxpapers/papers/looped_transformer/stopping.py",
        "return entropy.argmin(0)",
        "return entropy.argmax(0)",
        ["tests/papers/test_looped_transformer.py::test_stopping"],
    ),
    # XOR.
    (
        "jaxpapers/ops/rasp.py",
        "_right(s) ^ bits",
        "_right(s) | bits",
        ["tests/ops/test_algorithmic.py::test_answers_and_programs"],
    ),
]

PEER_REVIEW = [
    # G / (G - 1) of clustered errors.
    (
        "jaxpapers/ops/regression/covariance.py",
        "return g / (g - 1) * (n - 1) / (n - full)",
        "return (n - 1) / (n - full)",
        ["tests/ops/test_regression_parity.py"],
    ),
    # HC2 has the root of 1 - h.
    (
        "jaxpapers/ops/regression/linear.py",
        'e / jnp.sqrt(1 - h) if kind == "HC2" else e / (1 - h)',
        'e / (1 - h) if kind == "HC2" else e / jnp.sqrt(1 - h)',
        ["tests/ops/test_regression_parity.py"],
    ),
    # Effects are refitted without the cluster.
    (
        "jaxpapers/ops/regression/covariance.py",
        "kept = (cluster != g).astype(x.dtype)",
        "kept = (cluster == g).astype(x.dtype)",
        ["tests/ops/test_regression_errors.py"],
    ),
    # Praise presses nobody.
    (
        "jaxpapers/papers/peer_review/measuring.py",
        "critical = (polarity != PRAISE) * 1.0",
        "critical = (polarity == PRAISE) * 1.0",
        ["tests/papers/test_peer_review.py::test_measures_by_hand"],
    ),
]

DNW = [
    (
        "jaxpapers/papers/dnw/measure.py",
        "        return freq + b * inherited\n",
        "        return w + b * inherited\n",
        ["tests/papers/test_dnw.py::test_closed_forms"],
    ),
    (
        "jaxpapers/papers/dnw/learning.py",
        "later = place[nodes] > place[nodes[0]]",
        "later = place[nodes] < place[nodes[0]]",
        ["tests/papers/test_dnw_learning.py"],
    ),
    (
        "jaxpapers/papers/dnw/orders.py",
        "order_from_score(jnp.log(score) / temperature + noise)",
        "order_from_score(jnp.log(score) / temperature - noise)",
        ["tests/papers/test_dnw.py::test_plackett_luce"],
    ),
]

REJUMP = [
    # The same leaf again is a visit once it was left by more than a check.
    (
        "jaxpapers/papers/rejump/tree_walk.py",
        "kept = is_leaf & ((leaf != walk.leaf) | moved)",
        "kept = is_leaf & (leaf != walk.leaf)",
        ["tests/papers/test_rejump.py::test_metrics_by_hand"],
    ),
    # Visits after the first correct one, without it.
    (
        "jaxpapers/papers/rejump/tree_walk.py",
        "over = jnp.where(right > 0, total - 1 - first, 0)",
        "over = jnp.where(right > 0, total - first, 0)",
        ["tests/papers/test_rejump.py::test_recorded_metrics"],
    ),
    # Matching costs 1 where either text is empty.
    (
        "jaxpapers/papers/rejump/edit_distance.py",
        "match += jnp.where(trees, blank | empty, within)",
        "match += jnp.where(trees, blank & empty, within)",
        ["tests/papers/test_rejump.py::test_edit_distance_by_definition"],
    ),
    # The divergence is the mean of two.
    (
        "jaxpapers/papers/rejump/similarity.py",
        "q * jnp.log2(q / middle)).sum(-1) / 2",
        "q * jnp.log2(q / middle)).sum(-1)",
        ["tests/papers/test_rejump.py::test_recorded_metrics"],
    ),
]

NUCLEAR_NORM = [
    # The polar factor: its singular values are 1, not those of the features.
    (
        "jaxpapers/papers/nuclear_norm/polar.py",
        "inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)\n    root",
        "inverse = jnp.where(kept, 1 / jnp.where(kept, s * s, 1), 0)\n    root",
        ["tests/papers/test_nuclear_norm_penalty.py"],
    ),
    # Update ``warmup`` itself is still plain.
    (
        "jaxpapers/papers/nuclear_norm/__init__.py",
        "jnp.where(updates > options.warmup, options.theta, 0.0)",
        "jnp.where(updates >= options.warmup, options.theta, 0.0)",
        ["tests/papers/test_nuclear_norm.py"],
    ),
    # A mean of n + 1 terms.
    (
        "jaxpapers/method/swad.py",
        "(new - old) / (n + 1).astype",
        "(new - old) / (n + 2).astype",
        ["tests/test_swad.py"],
    ),
    # The segment at the start of the window is skipped.
    (
        "jaxpapers/method/swad.py",
        "chosen = window & (place > high.max())",
        "chosen = window & (place >= high.max())",
        ["tests/test_swad.py"],
    ),
    # Covariances have n - 1.
    (
        "jaxpapers/papers/nuclear_norm/objectives.py",
        "unbiased = weights * (rows / (rows - 1))[:, None]",
        "unbiased = weights * (rows / rows)[:, None]",
        ["tests/papers/test_nuclear_norm.py::test_objectives_by_hand"],
    ),
    # The rows of all devices.
    (
        "jaxpapers/papers/nuclear_norm/penalty.py",
        "return lax.psum(nuclear, axis), lax.pmax(largest, axis)",
        "return lax.pmean(nuclear, axis), lax.pmax(largest, axis)",
        ["tests/papers/test_nuclear_norm_penalty.py"],
    ),
]

MPC_PSRL = [
    # One model is drawn for an episode.
    (
        "jaxpapers/papers/mpc_psrl/models.py",
        'return blr.sample(key, post) if options.agent == "sample" else post.mean',
        "return post.mean",
        ["tests/papers/test_mpc_psrl_agents.py::test_models_of_the_regressing_agents"],
    ),
    # sigma_n is a standard deviation.
    (
        "jaxpapers/papers/mpc_psrl/regression.py",
        "return blr.update(start, z, y, jnp.square(noise), weight)",
        "return blr.update(start, z, y, noise, weight)",
        ["tests/papers/test_mpc_psrl.py::test_recorded_regressions"],
    ),
    # Particles change their network in every step with TS1 only.
    (
        "jaxpapers/papers/mpc_psrl/models.py",
        'if options.propagation == "ts1":',
        'if options.propagation != "ts1":',
        [
            "tests/papers/test_mpc_psrl_agents.py"
            "::test_an_ensemble_averages_over_its_networks"
        ],
    ),
    # Targets are differences of observations.
    (
        "jaxpapers/papers/mpc_psrl/__init__.py",
        '"y": jnp.diff(seen, axis=0),',
        '"y": seen[1:],',
        [
            "tests/papers/test_mpc_psrl_agents.py"
            "::test_an_episode_is_remembered_and_regressed_on"
        ],
    ),
    # Samples stay two deviations inside the bounds.
    (
        "jaxpapers/ops/planning/methods.py",
        "jnp.minimum(search.variance, jnp.square(room / 2))",
        "jnp.minimum(search.variance, jnp.square(room))",
        ["tests/ops/test_planning.py::test_limits_of_cem"],
    ),
    # Elites share 1 - alpha.
    (
        "jaxpapers/ops/planning/methods.py",
        "variance=alpha * search.variance + (1 - alpha) * elites.var(0),",
        "variance=alpha * search.variance + (1 - alpha) * elites.var(0, ddof=1),",
        ["tests/ops/test_planning.py::test_recorded_plans"],
    ),
    # The angle moves with the velocity before it is clipped.
    (
        "jaxpapers/ops/environments/pendulum.py",
        "(clipped if self.clip_first else speed) * self.dt",
        "clipped * self.dt",
        ["tests/ops/test_environments.py::test_the_pendulum_at_its_largest_velocity"],
    ),
]

CODA = [
    # The expectile's asymmetry.
    (
        "jaxpapers/papers/coda/iql.py",
        "jnp.abs(tau - (u < 0))",
        "jnp.abs(tau - (u > 0))",
        ["tests/papers/test_coda.py::test_recorded_expectiles"],
    ),
    # The fictitious transition's reward is 0 and ends the problem.
    (
        "jaxpapers/papers/coda/options.py",
        '"reward": batch["goal"] - 1,',
        '"reward": -batch["goal"],',
        ["tests/papers/test_coda.py::test_recorded_augmentation"],
    ),
    # The weights of actions come from the new slow critics.
    (
        "jaxpapers/papers/coda/iql.py",
        """    if options.order == "coda":
        step_policy(target)
""",
        """    if options.order == "coda":
        step_policy(params["q"])
""",
        ["tests/papers/test_coda.py::test_recorded_updates"],
    ),
    # Contexts are drawn independently of the transitions.
    (
        "jaxpapers/tasks/goal_data.py",
        "context[first:] = p.contexts[drawn]",
        "context[first:] = p.contexts[drawn[::-1]]",
        ["tests/tasks/test_goals.py::test_a_batch_has_exactly_its_share_of_"
         "fictitious_transitions"],
    ),
]  # fmt: skip

GPPSTD = [
    # No value follows the end of an episode.
    (
        "jaxpapers/papers/gppstd/values.py",
        "jnp.where(done, 0, after.max(1))",
        "after.max(1)",
        [
            "tests/papers/test_gppstd.py::test_sweeps_end_in_a_fixed_point_of_one_factorisation"
        ],
    ),
    # The noise of a row ends where that of the next one starts.
    (
        "jaxpapers/ops/gaussian_process/temporal.py",
        "- shared - shared.T",
        "+ shared + shared.T",
        ["tests/ops/test_gaussian_process.py::test_recorded_temporal_differences"],
    ),
    # Matheron's rule: what the draw of the prior has at the data is taken off.
    (
        "jaxpapers/ops/gaussian_process/samples.py",
        "means - observed(post, function) - noise",
        "means - noise",
        ["tests/ops/test_gaussian_process.py"],
    ),
]

R3_VAE = [
    # Commitment moves the residual, not the code.
    (
        "jaxpapers/papers/r3_vae/tokenizer.py",
        'penalty = options.beta * commit + (0 if options.quantizer == "ema" else book)',
        'penalty = commit + (0 if options.quantizer == "ema" else options.beta * book)',
        [
            "tests/papers/test_r3_vae.py::test_nearest_codes_are_pulled_by_their_residuals_alone"
        ],
    ),
    # What is left is orthogonal to the reference.
    (
        "jaxpapers/ops/vector_quantization.py",
        "return alpha, x - alpha[:, None] * r[None]",
        "return alpha, x + alpha[:, None] * r[None]",
        ["tests/ops/test_vector_quantization.py::test_the_projection"],
    ),
    # Pairs of different items only.
    (
        "jaxpapers/ops/semantic_ids.py",
        "each = (jnp.square(sums).sum(-1) - n) / pairs",
        "each = jnp.square(sums).sum(-1) / pairs",
        ["tests/ops/test_semantic_ids.py::test_cohesion_as_the_loop_over_pairs"],
    ),
    # Cohesion is to rise.
    (
        "jaxpapers/papers/r3_vae/tokenizer.py",
        "value = error - options.sc * sc",
        "value = error + options.sc * sc",
        [
            "tests/papers/test_r3_vae.py::test_the_loss_as_in_numpy_and_its_gradient_by_differences"
        ],
    ),
    # A branch of forbidden items takes no place in the beam.
    (
        "jaxpapers/ops/trie.py",
        "valid &= left > 0",
        "valid &= left >= 0",
        ["tests/ops/test_trie.py::test_forbidden_branches_take_no_place_in_the_beam"],
    ),
    # What a centre has moved is added to the bound.
    (
        "jaxpapers/ops/lloyd.py",
        "upper = s.upper + shift[s.labels]",
        "upper = s.upper - shift[s.labels]",
        ["tests/ops/test_kmeans.py::test_bounds_change_no_assignment"],
    ),
]

VERSAPRM = [
    # The logits at the separator itself, right above wrong.
    (
        "jaxpapers/papers/versaprm/objective.py",
        "    margin = logits[..., 1] - logits[..., 0]\n    nats",
        "    margin = logits[..., 0] - logits[..., 1]\n    nats",
        ["tests/papers/test_versaprm.py::test_recorded_loss"],
    ),
    # Nothing after the first wrong step.
    (
        "jaxpapers/papers/versaprm/encoding.py",
        "count = wrong[0] + 1",
        "count = wrong[-1] + 1",
        ["tests/papers/test_versaprm.py::test_recorded_sequences"],
    ),
    # Ties go to the answer that was seen first.
    (
        "jaxpapers/ops/voting.py",
        "return right[max(votes, key=lambda a: votes[a])]",
        "return right[max(reversed(votes), key=lambda a: votes[a])]",
        ["tests/ops/test_voting.py::test_recorded_curves"],
    ),
    # Of a tree the best continuation is kept.
    (
        "jaxpapers/papers/versaprm/search.py",
        "_sorted([next(every) for _ in range(width)], options)[0]",
        "_sorted([next(every) for _ in range(width)], options)[-1]",
        ["tests/papers/test_versaprm_search.py::test_trees_of_dvts_do_not_compete"],
    ),
    # The bound of tree search has a root.
    (
        "jaxpapers/papers/versaprm/search.py",
        "options.explore * math.sqrt(log / c.visits)",
        "options.explore * (log / c.visits)",
        [
            "tests/papers/test_versaprm_search.py::test_the_bound_weighs_value_against_visits"
        ],
    ),
    # The next token is learned of right steps alone.
    (
        "jaxpapers/papers/versaprm/objective.py",
        "net.logits(decoder, hidden), batch, labels > 0.5)",
        "net.logits(decoder, hidden), batch, labels > -0.5)",
        ["tests/papers/test_versaprm.py::test_next_tokens_of_right_steps_are_learned"],
    ),
]

LANGUAGE_MODELS = [
    # Rows of queries and keys, ordered for halves of a head.
    (
        "jaxpapers/data/tensors.py",
        "return pairs.swapaxes(1, 2).reshape(rows.shape)",
        "return pairs.reshape(rows.shape)",
        ["tests/data/test_weights.py::test_gguf_is_the_same_model"],
    ),
    # Low halves of a block's bytes come first.
    (
        "jaxpapers/ops/quantize.py",
        "concat([packed & 15, packed >> 4], axis=1)",
        "concat([packed >> 4, packed & 15], axis=1)",
        ["tests/data/test_weights.py::test_blocks"],
    ),
    # Padded rows count their positions from their first token.
    (
        "jaxpapers/nets/decoding.py",
        "offset = mask.sum(1).astype(jnp.int32)",
        "offset = (mask.sum(1) + 1).astype(jnp.int32)",
        [
            "tests/nets/test_decoding.py"
            "::test_cached_decoding_equals_the_full_forward[llama]"
        ],
    ),
    # The sum of the probabilities before a token.
    (
        "jaxpapers/nets/decoding.py",
        "before = jnp.cumsum(order, -1) - order",
        "before = jnp.cumsum(order, -1)",
        [
            "tests/nets/test_decoding.py"
            "::test_draws_from_the_kept_tokens_in_their_proportions"
        ],
    ),
    # A sentence's vector is the mean of its real tokens.
    (
        "jaxpapers/nets/encoder.py",
        "mean = (states * weight).sum(1)",
        "mean = states.sum(1)",
        ["tests/nets/test_encoder.py::test_vectors_against_numpy"],
    ),
]

MUTATIONS = [
    Mutation(paper, *row)
    for paper, rows in {
        "dion": DION,
        "muon": MUON,
        "normuon": NORMUON,
        "dion2": DION2,
        "sft_pg": SFT_PG,
        "dpok": DPOK,
        "score_wasserstein": SCORE_WASSERSTEIN,
        "din": DIN,
        "dien": DIEN,
        "sim": SIM,
        "rocket": ROCKET,
        "defer": DEFER,
        "dnw": DNW,
        "rejump": REJUMP,
        "peer_review": PEER_REVIEW,
        "nuclear_norm": NUCLEAR_NORM,
        "poem": POEM,
        "gppstd": GPPSTD,
        "looped_transformer": LOOPED_TRANSFORMER,
        "versaprm": VERSAPRM,
        "mpc_psrl": MPC_PSRL,
        "coda": CODA,
        "language_models": LANGUAGE_MODELS,
        "r3_vae": R3_VAE,
    }.items()
    for row in rows
]


def text(mutation: Mutation, root: Path = ROOT) -> str:
    """The source with the mutation's line, which must be there exactly once."""
    source = (root / mutation.file).read_text()
    count = source.count(mutation.before)
    if count != 1:
        raise ValueError(
            f"{mutation.file} has {count} times {mutation.before!r}, expected once"
        )
    return source


def survives(mutation: Mutation) -> bool:
    """Whether the tests pass with the mistake in a copy of the tree."""
    mutated = text(mutation).replace(mutation.before, mutation.after)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        # Neither the environment nor the history, nor what runs wrote.
        ignored = shutil.ignore_patterns(".*", "__pycache__", "runs")
        shutil.copytree(ROOT, copy, ignore=ignored)
        (copy / mutation.file).write_text(mutated)
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
        env = os.environ | {
            "PYTHONPATH": str(copy),
            "JAX_COMPILATION_CACHE_DIR": cache,
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "not slow and not matrix", *mutation.tests]
        result = subprocess.run(command, cwd=copy, env=env, capture_output=True)
    # 1: a test failed. Others (no test collected, a usage error) say nothing of them.
    if result.returncode not in (0, 1):
        raise RuntimeError(result.stdout.decode() + result.stderr.decode())
    return result.returncode == 0


def main(papers: list[str]) -> int:
    """Runs the mutations of these papers, of all without a name."""
    unknown = set(papers) - {m.paper for m in MUTATIONS}
    if unknown:
        raise SystemExit(f"no mutations of {', '.join(sorted(unknown))}")
    survivors = 0
    for mutation in MUTATIONS:
        if papers and mutation.paper not in papers:
            continue
        survived = survives(mutation)
        survivors += survived
        verdict = "SURVIVED" if survived else "killed  "
        change = f"{mutation.before.strip()} -> {mutation.after.strip() or 'nothing'}"
        print(verdict, mutation.paper, mutation.file, change, flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
