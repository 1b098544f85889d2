r"""Distributed node weights: an efficient order in which to learn Chinese characters.

Xiaoyong Yan, Ying Fan, Zengru Di, Shlomo Havlin, Jinshan Wu. "Efficient learning strategy
of Chinese characters based on network approach", arXiv 1303.1599, 2013 (PLoS ONE 8(8)
e69745).

Characters are nodes of a directed acyclic graph; a link runs from a component to every
character that directly uses it. A component inherits a fraction b of the weight of its
characters, and learning by decreasing weight reaches a share of running text at a lower
cost than learning by frequency. Nothing is trained. The same holds for any precedence
graph with utilities and costs: curricula, builds, skill trees.

With f (n) the usage frequencies, A (n, n) 1 where a component (row) is a direct part of a
whole (column):

$$ W = f + b A W = (I - b A)^{-1} f = \textstyle\sum_k b^k A^k f $$

A is nilpotent, so the sum ends with the longest path and W exists for every b; b = 0 is
the usage frequency order. In networkx, W is the Katz centrality of the reversed graph
with alpha = b and beta = f.

Departures. The paper's body was not at hand; its abstract and the authors' published
table are the reference. Reconstructed: b = 0.35, the own cost of a
compound (its number of components, 1 for a primitive), ties (frequency, then code point)
and that components of a target are paid for but not learned with it (``transient``).
Under the other reading (``learn``) the frequency and the W order differ by less than 0.1
percent, and the paper's claim could not have been observed. Added: one pass over the
levels instead of a fixpoint, the density greedy order and Smith's bound, Plackett-Luce
sampling, b per level by gradient descent (``fit``).
"""

from jaxpapers.papers.dnw.fit import fit, level_b, level_scores, loss
from jaxpapers.papers.dnw.learning import (
    CREDITS,
    SHARES,
    Curve,
    Metrics,
    completion,
    curve_metrics,
    simulate,
    simulate_learn,
    simulate_transient,
    smith_lower_bound,
    target_costs,
    weighted_completion,
)
from jaxpapers.papers.dnw.measure import (
    Contribution,
    LevelLinks,
    dnw,
    dnw_levels,
    explain,
    level_links,
    sweep,
)
from jaxpapers.papers.dnw.network import (
    COSTS,
    CharNet,
    Closures,
    build_network,
    check_order,
    closures,
    padded,
    weights,
)
from jaxpapers.papers.dnw.orders import (
    by_level,
    components_first,
    density_greedy,
    first_needed,
    frequency_per_cost,
    loach_order,
    log_prob,
    noo_all,
    noo_direct,
    order_from_score,
    rank_of,
    sample_order,
    ufo,
)

__all__ = [
    "COSTS", "CREDITS", "SHARES", "CharNet", "Closures", "Contribution", "Curve",
    "LevelLinks", "Metrics", "build_network", "by_level", "check_order", "closures",
    "completion", "components_first", "curve_metrics", "density_greedy", "dnw",
    "dnw_levels", "explain", "first_needed", "fit", "frequency_per_cost", "level_b",
    "level_links", "level_scores", "loach_order", "log_prob", "loss", "noo_all",
    "noo_direct", "order_from_score", "padded", "rank_of", "sample_order", "simulate",
    "simulate_learn", "simulate_transient", "smith_lower_bound", "sweep",
    "target_costs", "ufo", "weighted_completion", "weights",
]  # fmt: skip
