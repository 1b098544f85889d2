"""Arrays that would broadcast to a matrix are refused, traced or not."""

import functools
import inspect

import jax
import numpy as np
import pytest

from jaxpapers.ops import diffusion, means, policy
from jaxpapers.ops.shapes import one_per_row, same_shape, whole_numbers
from jaxpapers.papers import defer, sft_pg
from jaxpapers.papers.dpok import value

ROW, COLUMN = np.ones(4, np.float32), np.ones((4, 1), np.float32)
IDS = np.zeros(4, np.int32)
SCHEDULE = diffusion.ddim_schedule(diffusion.alpha_bars(diffusion.linear_betas(8)), 4)


def stats():
    return policy.init_prompt_stats(2, 4)


@pytest.mark.parametrize(
    "f, args",
    [
        (means.weighted_mean, (ROW, COLUMN)),
        (policy.reinforce, (ROW, COLUMN)),
        (policy.clipped_surrogate, (ROW, COLUMN)),
        (policy.explained_variance, (COLUMN, ROW)),
        (lambda x, i: inspect.unwrap(policy.group_advantage)(x, i, 2), (COLUMN, IDS)),
        (lambda x, i: policy_of("push_prompt_stats")(stats(), x, i), (COLUMN, IDS)),
        (lambda x, i: policy_of("prompt_advantage")(stats(), x, i), (COLUMN, IDS)),
        (diffusion.q_sample, (COLUMN, ROW, ROW)),
        (functools.partial(diffusion.step_kl, SCHEDULE, 0), (ROW, COLUMN)),
        (defer.event_losses, (ROW, COLUMN, ROW, ROW)),
        (defer.dfm_losses, (ROW, ROW, COLUMN, ROW)),
        (functools.partial(defer.importance_weights, "defer"), (ROW, COLUMN)),
        (lambda x, c: inspect.unwrap(sft_pg.advantage)(
            lambda y: y, lambda x, k: x[:, 0], x, IDS, x), (COLUMN, ROW)),
    ],
)  # fmt: skip
def test_functions_refuse_columns_for_rows(f, args):
    raw = f if isinstance(f, functools.partial) else inspect.unwrap(f)
    if isinstance(f, functools.partial):
        raw = functools.partial(inspect.unwrap(f.func), *f.args)
    with pytest.raises(ValueError, match=r"\(4, 1\)"):
        jax.eval_shape(raw, *args)


def policy_of(name):
    return inspect.unwrap(getattr(policy, name))


def test_a_value_net_of_columns_is_refused():
    batch = value.Transitions(IDS, COLUMN, COLUMN, COLUMN, IDS)
    with pytest.raises(ValueError, match=r"value must be one number .* 4 rows"):
        inspect.unwrap(value.value_loss)(lambda x, k, z: x, batch, ROW)


def test_what_is_equal_passes():
    same_shape("f", x=ROW, y=IDS, z=None, w=[1.0, 2.0, 3.0, 4.0])
    one_per_row("f", 4, x=ROW, y=None)
    whole_numbers("f", x=IDS, y=np.int64(3))
    with pytest.raises(ValueError, match="y must be one number for each of 4 rows"):
        one_per_row("f", 4, x=ROW, y=COLUMN)
    for ids in (ROW, IDS > 0):
        with pytest.raises(TypeError, match="prompt must be whole numbers"):
            whole_numbers("f", prompt=ids)
