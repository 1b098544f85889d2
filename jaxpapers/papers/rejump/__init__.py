r"""ReJump: reasoning traces as a tree of steps and a walk that jumps over it.

Yuchen Zeng, Shuibai Zhang, Wonjun Kang, Shutong Wu, Lynnix Zou, Ying Fan, Heeju Kim,
Ziqian Lin, Jungtaek Kim, Hyung Il Koo, Dimitris Papailiopoulos, Kangwook Lee. "ReJump: A
Tree-Jump Representation for Analyzing and Improving LLM Reasoning", arXiv 2512.00831,
2025 (ICML 2026).

A trace becomes a tree of intermediate steps and a walk over its nodes, each jump a
calculation, a verification or a backtracking. Six metrics of a trace and two similarities
of pairs say how it explores, checks, forgets and goes on after the answer. Nothing is
trained.

With leaves $F_1 .. F_m$ that the walk visits (the same leaf again counts once it was left
by more than verification), d the distance in the tree, n the counts of jumps:

$$ d_{jump} = \tfrac{1}{m - 1} \textstyle\sum_i d(F_i, F_{i+1}), \quad
   r_{ver} = n_{ver} / (n_{calc} + n_{ver} + n_{back}), \quad
   r_{fgt} = [n_{calc} \ge |tree|] $$
$$ r_{suc} = \tfrac{1}{m} \textstyle\sum_i [F_i \text{ correct}], \quad
   r_{over} = (m - \min \{i : F_i \text{ correct}\}) / m $$

and the number of solutions, the tree's leaves. Trees are compared by their ordered edit
distance, $1 - TED / \max(|T_1|, |T_2|)$; walks by the Jensen-Shannon divergence of the
shares with which one kind of jump follows another.

Departures. Definitions are those of the released code (commit 30627142), whose recorded
numbers these functions give; corrected in it: answers of the Game of 24 are parsed and
computed in fractions with the puzzle's numbers, not run as Python and compared in floats;
a divergence that rounding makes negative is 0, not 1; leaves of MATH are in the order of
the walk (``order="reference_math"`` sorts their names as texts, as the code does); edit
distances have a limit of size, not of two seconds. A trace that is not sound is refused
with everything that is wrong with it. The paper's language models are commercial, so
search programs whose trees are known stand in for them (``search``); prompts are our own.
"""

from jaxpapers.papers.rejump.arrays import TraceBatch, to_arrays
from jaxpapers.papers.rejump.classifier import Fit, fit, log_probability
from jaxpapers.papers.rejump.edit_distance import (
    size,
    tree_edit_distances,
    tree_similarity,
)
from jaxpapers.papers.rejump.export import (
    to_dot,
    to_html,
    to_json,
    to_mermaid,
    to_svg,
)
from jaxpapers.papers.rejump.extraction import extract
from jaxpapers.papers.rejump.game24 import is_correct, puzzles, reference_correct
from jaxpapers.papers.rejump.measures import (
    Measures,
    measure,
    similar_walks,
    similarities,
)
from jaxpapers.papers.rejump.search import STRATEGIES, Options, label, run, sample
from jaxpapers.papers.rejump.selection import (
    Interval,
    best_of_n,
    bootstrap,
    select_prompt,
)
from jaxpapers.papers.rejump.similarity import transition_matrix, walk_similarity
from jaxpapers.papers.rejump.text import is_search_text, read, render
from jaxpapers.papers.rejump.trace import (
    CATEGORIES,
    TOLERABLE,
    Issue,
    Node,
    Step,
    Trace,
    TraceError,
    parse_trace,
    to_dict,
    validate,
)
from jaxpapers.papers.rejump.tree_walk import (
    NAMES,
    Metrics,
    filtered_leaf_mask,
    metrics,
    pairwise_distance,
    tree_info,
    visits,
)

__all__ = [
    "CATEGORIES", "NAMES", "STRATEGIES", "TOLERABLE",
    "Fit", "Interval", "Issue", "Measures",
    "Metrics", "Node", "Options", "Step", "Trace", "TraceBatch", "TraceError",
    "best_of_n", "bootstrap", "extract", "filtered_leaf_mask", "fit", "is_correct",
    "is_search_text", "label", "log_probability", "measure", "metrics",
    "pairwise_distance", "parse_trace", "puzzles", "read", "reference_correct", "render",
    "run", "sample", "select_prompt", "similar_walks", "similarities", "size",
    "to_arrays", "to_dict",
    "to_dot", "to_html", "to_json", "to_mermaid", "to_svg", "transition_matrix",
    "tree_edit_distances", "tree_info", "tree_similarity", "validate", "visits",
    "walk_similarity",
]  # fmt: skip
