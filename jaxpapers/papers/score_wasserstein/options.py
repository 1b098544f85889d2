"""Hyper-parameters of score_wasserstein."""

import dataclasses

from jaxpapers.nets.denoiser import ACTIVATIONS
from jaxpapers.options import check_choices, check_least, check_positive

REGULARIZERS = ("none", "spectral", "clip")
STARTS = ("data", "prior")
WEIGHTS = ("g2", "g2I", "I2", "simple")


@dataclasses.dataclass(frozen=True)
class Net:
    """A score model of points; the config group ``net``.

    Attributes:
      widths: hidden layers of the ``StepMLP``.
      shape: (d,) of a point.
      activation: "softplus" or "relu".
      regularizer: "spectral" divides kernels by their spectral norm if it exceeds 1, in
        every use; "clip" bounds the weights after every step; "none".
      clip: bound of "clip".

    Raises:
      ValueError: values out of range.
    """

    widths: tuple[int, ...] = (64, 64, 64)
    shape: tuple[int, ...] = (2,)
    activation: str = "softplus"
    regularizer: str = "none"
    clip: float = 0.1

    def __post_init__(self) -> None:
        check_choices(
            self, "net", regularizer=REGULARIZERS, activation=tuple(ACTIVATIONS)
        )
        check_least(self, "net", widths=1, shape=1)
        if self.regularizer == "clip":
            check_positive(self, "net", "clip")


@dataclasses.dataclass(frozen=True)
class Options:
    """Hyper-parameters of training; the config group ``method``.

    Attributes:
      weight: of the loss, see ``matching.discrete_weights``.
      start: where sampling starts: noised "data", or the "prior" N(0, I).
      ascend_steps: first steps, which maximise the loss.

    Raises:
      ValueError: values out of range.
    """

    weight: str = "g2"
    start: str = "data"
    ascend_steps: int = 320

    def __post_init__(self) -> None:
        check_choices(self, "method", weight=WEIGHTS, start=STARTS)
        check_least(self, "method", ascend_steps=0)
