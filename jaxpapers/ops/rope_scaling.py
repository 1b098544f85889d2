"""Which scaling of rotary frequencies a model has; see ``nets.rope`` for what it does."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """How frequencies change for contexts longer than those trained on.

    Attributes:
      kind: ``linear``: all are divided by ``factor``; ``llama3``: long wavelengths are,
        short ones are kept, and those between are interpolated.
      factor: of the context's length.
      low: llama3: wavelengths above ``trained / low`` are divided.
      high: llama3: wavelengths below ``trained / high`` are kept.
      trained: llama3: context of the pretraining.

    Raises:
      ValueError: an unknown kind, or numbers out of range.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    trained: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(
                "the scaling of RoPE must be linear or llama3, got "
                f"{self.kind!r}; none of the others is written"
            )
        if not self.factor > 0 or not 0 < self.low < self.high or self.trained < 1:
            raise ValueError(
                "the scaling of RoPE needs factor > 0, 0 < low < high and trained >= 1, "
                f"got {self.factor}, {self.low}, {self.high} and {self.trained}"
            )
