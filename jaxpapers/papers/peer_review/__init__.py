r"""Peer review as data: letters to coded opinions, opinions to measures, measures to
regressions of citations.

Huihuang Jiang, Heyang Li, Zifan Wang, Ying Fan, An Zeng. "Demanding peer review is
associated with higher impact in published science", arXiv 2604.14047, 2026.

Reports and responses of accepted papers are split into opinions by a language model with
fixed prompts; each opinion has strength, constructiveness, quality and revision cost,
type, target and the authors' answer. Stronger criticism and larger burden go with more
citations later. Nothing is trained.

With opinions o of paper p, round r and reviewer i, strength s(o) and cost c(o), critical
opinions being those that are no praise:

$$ P_r = \textstyle\sum_{o \in r, critical} s(o), \quad S_r = P_r / \sum_r P_r, \quad
   B = \textstyle\sum_o c(o), \quad
   \log E[cites_p] = \beta^\top x_p + a_{field(p), year(p)} $$

with z-scores x of mean strength (over reviewers of their means), mean quality, burden and
team size, by least squares of log(1 + cites), Poisson pseudo-likelihood, negative
binomial and logit of the top tenth (``ops.regression``).

Departures. The paper's body was not at hand; only the directions of its findings are
public. Reconstructed: prompts, the five-step scales, categories, the formulas above, the
citation window of two years and the specification of the regressions. No coefficient of
the paper is known, and none is claimed. Added: a grammar of the journal's letters, JATS
and OpenReview, with offsets that cover the text; a rule extractor; a generator with known
truth. All of it describes accepted papers, and association, not effects.
"""

from jaxpapers.papers.peer_review.extraction import (
    Extraction,
    extract,
    locate,
    validate,
)
from jaxpapers.papers.peer_review.measuring import (
    Opinions,
    disagreement_null,
    measures,
    opinions,
    outcomes,
    standardise,
)
from jaxpapers.papers.peer_review.models import (
    Coverage,
    Models,
    attenuation,
    compare_fields,
    coverage,
    deciles,
    fit,
)
from jaxpapers.papers.peer_review.reading import (
    parse_bytes,
    parse_jats,
    parse_openreview,
    parse_review_file,
)
from jaxpapers.papers.peer_review.rendering import LAYOUTS, Letter, render
from jaxpapers.papers.peer_review.rules import rule_extract
from jaxpapers.papers.peer_review.schema import (
    Link,
    Opinion,
    Point,
    Report,
    ReviewFile,
    Segment,
    Span,
    to_dict,
)
from jaxpapers.papers.peer_review.world import Options, World, simulate

__all__ = [
    "LAYOUTS", "Coverage", "Extraction", "Letter", "Link", "Models", "Opinion",
    "Opinions", "Options", "Point", "Report", "ReviewFile", "Segment", "Span", "World",
    "attenuation", "compare_fields", "coverage", "deciles", "disagreement_null",
    "extract", "fit", "locate", "measures", "opinions", "outcomes", "parse_bytes",
    "parse_jats", "parse_openreview", "parse_review_file", "render", "rule_extract",
    "simulate", "standardise", "to_dict", "validate",
]  # fmt: skip
