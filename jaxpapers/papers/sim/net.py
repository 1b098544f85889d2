"""SIM's hyper-parameters."""

import dataclasses

from jaxpapers import options
from jaxpapers.nets import behaviour, mlp
from jaxpapers.ops.attention import NORMALIZE

SEARCH = ("hard", "soft", "average")
GSU_POOL = ("sum", "mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net(behaviour.Net):
    """Hyper-parameters of SIM (arXiv 2006.05639); sizes not in the paper are DIEN's."""

    item_dim: int = 16
    """Width of an item's embedding."""
    cate_dim: int = 16
    """Width of a category's embedding; 0: the model reads no categories."""
    hidden: tuple[int, ...] = (200, 80)
    """Widths of the MLP's hidden layers."""
    search: str = "soft"
    """One of ``SEARCH``; average is mean pooling, which selects nothing."""
    k: int = 50
    """K: behaviours that the search selects."""
    skip: int = 100
    """Most recent behaviours that the search leaves out."""
    chunk: int = 0
    """Positions of a chunk of the two-level top-k, see ``ops.search.topk_masked``."""
    gsu_dim: int = 16
    """Width of the soft search's projections."""
    gsu_hidden: tuple[int, ...] = (200, 80)
    """Widths of the hidden layers of GSU's click model."""
    gsu_pool: str = "sum"
    """Of its history, one of ``GSU_POOL``."""
    gsu_sample: int = 0
    """Behaviours per row that GSU trains on, drawn at random; 0: all."""
    heads: int = 2
    """Heads of ESU's attention."""
    head_dim: int = 16
    """Width of a head's projections."""
    time_dim: int = 8
    """Width of an embedded time gap; 0: none."""
    time_buckets: int = 26
    """Buckets of time gaps, see ``ops.search.time_bucket``."""
    time_unit: int = 1
    """Seconds per unit of the bucket's logarithm."""
    short: int = 100
    """Recent behaviours that DIN's interest reads; 0: no short-term part."""
    normalize: str = "softmax"
    """Of DIN's attention weights, one of ``ops.attention.NORMALIZE``."""
    unit_activation: str = "sigmoid"
    """Of DIN's attention unit, one of ``nets.mlp.ACTIVATIONS``."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        super().__post_init__()
        options.check_choices(
            self, "net", search=SEARCH, normalize=NORMALIZE, gsu_pool=GSU_POOL,
            unit_activation=mlp.ACTIVATIONS,
        )  # fmt: skip
        options.check_least(
            self, "net", k=1, heads=1, head_dim=1, gsu_dim=1, gsu_hidden=1,
            time_buckets=1, time_unit=1, time_dim=0, short=0, skip=0, chunk=0,
            gsu_sample=0,
        )  # fmt: skip
