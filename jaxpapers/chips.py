"""Public figures of TPU chips, and the least time that a step needs of each resource."""

from typing import NamedTuple


class Chip(NamedTuple):
    """What one chip has, in bytes and seconds.

    Attributes:
      memory: of its HBM.
      flops: bfloat16 multiplications and additions of its matrix units.
      hbm: bytes to and from HBM.
      ici: bytes sent over all its links inside a slice, half of the figure for both
        directions.
      dcn: bytes sent over the data-centre network, its share of its host's.
    """

    memory: float
    flops: float
    hbm: float
    ici: float
    dcn: float


CHIPS = {
    "v5e": Chip(16e9, 197e12, 819e9, 200e9, 25e9 / 8),
    "v5p": Chip(95e9, 459e12, 2765e9, 600e9, 50e9 / 8),
    "v6e": Chip(32e9, 918e12, 1638e9, 400e9, 100e9 / 8),
}
"""By kind, as Google's pages say them (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e):
peak bfloat16 compute, HBM capacity and bandwidth, bidirectional ICI bandwidth (400, 1200
and 800 GB/s). DCN: 50 Gbit/s per chip (v5p), 6.4 and 25.6 Tbit/s per pod of 256 chips
(v5e, v6e)."""


def chip_of(topology: str) -> Chip | None:
    """The chip of a topology such as ``v5p:8x8x8``; None of any other name."""
    return CHIPS.get(topology.partition(":")[0])


def least_seconds(
    chip: Chip,
    *,
    flops: int | float,
    memory: int | float,
    ici: int | float,
    dcn: int | float,
) -> dict[str, float]:
    """Seconds that a step takes at least, by resource.

    No measurement: each resource alone, at its peak, with perfect overlap and links that
    all carry the same.

    Args:
      chip: its peaks.
      flops: of the matrix units, each bfloat16 pass counted.
      memory: bytes read and written.
      ici: bytes sent inside the slice.
      dcn: bytes sent to other slices.

    Example:
      >>> least = least_seconds(CHIPS["v5p"], flops=459e9, memory=0, ici=6e9, dcn=0)
      >>> least["matrix units"], least["ICI"]
      (0.001, 0.01)
    """
    return {
        "matrix units": flops / chip.flops,
        "HBM": memory / chip.hbm,
        "ICI": ici / chip.ici,
        "DCN": dcn / chip.dcn,
    }
