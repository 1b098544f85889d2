"""Frames of episodes, drawn from observations: no renderer is needed."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import extras, plots
from jaxpapers.ops.environments import arm_points

SHOWN = 8
"""Frames of an episode."""


def episodes(results: Sequence[Any], out: str | Path, *, kind: str) -> Path | None:
    """Draws the last episode of the first seed of every row, a line of frames each.

    Args:
      results: with files ``episode.npz``: observations (T, S) and rewards (T,).
      out: image file; not written where no row has an episode.
      kind: the environment, a key of ``DRAW``.
    """
    with extras.named():
        from matplotlib.figure import Figure

    shown = {}
    for result in results:
        episode = result.findings[0].files.get("episode.npz")
        if episode is not None and len(episode["observations"]):
            shown[result.row.label] = episode
    if not shown or kind not in DRAW:
        return None
    figure = Figure(figsize=(1.5 * SHOWN, 0.5 + 1.7 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), SHOWN, squeeze=False)
    for line, (label, episode) in zip(grid, shown.items()):
        observations = np.asarray(episode["observations"], float)
        last = len(observations) - 1
        steps = np.unique(np.linspace(0, last, SHOWN).round().astype(int))
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(False)
        for axes, t in zip(line, steps):
            DRAW[kind](axes, observations[t])
            axes.set_xlabel(f"step {t}", fontsize=7)
        total = float(np.sum(episode["rewards"]))
        line[0].set_ylabel(f"{textwrap.fill(label, 20)}\n{total:.1f}", fontsize=8)
    return plots.save(figure, out)


def _cart_pole(axes: Any, observation: np.ndarray) -> None:
    """The cart on its rail between the limits, and the pole."""
    x, _, theta, _ = observation
    axes.plot([-2.4, 2.4], [0, 0], color="0.8", lw=1)
    for limit in (-2.4, 2.4):
        axes.plot([limit, limit], [-0.15, 0.15], color="0.6", lw=1)
    middle = float(np.clip(x, -3, 3))
    axes.add_patch(_rectangle(middle - 0.3, -0.15, 0.6, 0.3))
    tip = (middle + 1.2 * np.sin(theta), 1.2 * np.cos(theta))
    axes.plot([middle, tip[0]], [0, tip[1]], color="C1", lw=2.5)
    axes.set(xlim=(-3.4, 3.4), ylim=(-1.4, 1.6), aspect="equal")


def _pendulum(axes: Any, observation: np.ndarray) -> None:
    """The rod; upright is the goal."""
    cos, sin, _ = observation
    axes.plot([0, 0], [0, 1], color="0.85", lw=1)
    axes.plot([0, -sin], [0, cos], color="C1", lw=3)
    axes.plot([0], [0], "o", color="C0", ms=5)
    axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")


def _swing_up(axes: Any, observation: np.ndarray) -> None:
    """The cart on its rail and the pole; upright is the goal."""
    x, theta = observation[:2]
    axes.plot([-2.5, 2.5], [0, 0], color="0.8", lw=1)
    axes.add_patch(_rectangle(x - 0.2, -0.1, 0.4, 0.2))
    axes.plot(
        [x, x - 0.6 * np.sin(theta)], [0, -0.6 * np.cos(theta)], color="C1", lw=2.5
    )
    axes.set(xlim=(-2.9, 2.9), ylim=(-0.8, 0.8), aspect="equal")


def _reacher(axes: Any, observation: np.ndarray) -> None:
    """The arm from above: shoulder, lifting joint, elbow, wrist, hand; its target."""
    points = np.asarray(jax.jit(arm_points)(jnp.asarray(observation[:7])))
    points = np.concatenate([[[0, -0.188, 0]], points])
    axes.plot(points[:, 0], points[:, 1], "o-", color="C0", lw=2, ms=2.5)
    axes.plot(*observation[7:9], "x", color="C3", ms=6)
    axes.set(xlim=(-0.7, 1.1), ylim=(-1.1, 1.0), aspect="equal")


def _pusher(axes: Any, observation: np.ndarray) -> None:
    """From above: the fork at the end of the arm, the cylinder and its goal."""
    from matplotlib.patches import Circle

    axes.plot([0, observation[14]], [-0.6, observation[15]], color="0.85", lw=2)
    axes.plot(*observation[14:16], "o", color="C0", ms=4)
    axes.add_patch(Circle(tuple(observation[17:19]), 0.05, color="C1"))
    axes.plot(0.45, -0.05, "x", color="C3", ms=6)
    axes.set(xlim=(-0.3, 1.0), ylim=(-0.8, 0.4), aspect="equal")


def _mountain_car(axes: Any, observation: np.ndarray) -> None:
    """The valley, the flag at the goal, and the car."""
    x = np.linspace(-1.2, 0.6, 60)
    axes.plot(x, np.sin(3 * x), color="0.6", lw=1)
    axes.plot([0.5, 0.5], [np.sin(1.5), np.sin(1.5) + 0.5], color="C2", lw=2)
    position = float(observation[0])
    axes.plot([position], [np.sin(3 * position) + 0.12], "o", color="C0", ms=6)
    axes.set(xlim=(-1.3, 0.7), ylim=(-1.2, 1.7))


def _rectangle(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, color="C0")


DRAW: dict[str, Callable] = {
    "cartpole": _cart_pole,
    "pendulum": _pendulum,
    "swing_up": _swing_up,
    "reacher3d": _reacher,
    "pusher": _pusher,
    "mountain_car": _mountain_car,
    "mountain_car_continuous": _mountain_car,
}
"""Kind of environment -> (axes, observation) -> None."""
