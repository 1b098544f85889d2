"""Options of the tokenizers and of the recommender."""

import dataclasses
import math

from jaxpapers.options import check_choices, check_least, check_positive

RATED = ("soft", "top1", "mp")
NEAREST = ("ste", "rotation", "gumbel", "ema", "simvq", "fsq")
MAX_CODES = 2**20
"""Bound of codes and of items in a group, so that no array of either is huge."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Options of a quantiser of item vectors that is trained; R3-VAE's by default.

    Attributes:
      quantizer: how a level chooses. R3-VAE's ratings: ``soft`` (the paper's equations),
        ``top1``, ``mp`` (``ops.vector_quantization.rated``). RQ-VAE's nearest code:
        ``ste`` (straight-through), ``rotation``, ``gumbel``, ``ema`` (codes are moving
        means), ``simvq`` (a linear map of fixed codes). ``fsq``: no codebook.
      levels: L.
      codes: K of each level; of fsq at least the product of ``fsq``.
      features: d of the item vectors.
      tau: temperature of the ratings' softmax and of gumbel; the paper's equations have
        none, which is 1.
      reference: take out the component along a learned reference vector first.
      encoder: widths of the MLP before the quantiser, the last that of the codes; ():
        none.
      decoder: hidden widths of the MLP after it; (): none, which needs no encoder.
      loss: of the reconstruction: ``square`` (sum over features), or ``cosine``.
      sc: weight of the semantic cohesion.
      pd: weight of the preference discrimination.
      t: inverse temperature of the preference discrimination.
      sc_form: ``groups`` of a batch by their first code, or ``levels``: cosine of what is
        to be quantised and the sum so far, mean over levels, as public code has it.
      pd_form: distances of ``codewords``, or of ``soft`` means of the first level.
      beta: commitment of the nearest code.
      decay: of ema.
      fsq: values of each feature of a level.
      start: ``kmeans`` of the residuals, level by level, or ``random``.
      restarts: of that k-means.
      balanced: clusters of nearly equal size in that k-means.
      dead_every: steps after which codes that no item has are replaced by random
        residuals; 0: never.

    Raises:
      ValueError: unknown choices, values out of range.
    """

    quantizer: str = "soft"
    levels: int = 3
    codes: int = 256
    features: int = 384
    tau: float = 1.0
    reference: bool = True
    encoder: tuple[int, ...] = ()
    decoder: tuple[int, ...] = ()
    loss: str = "square"
    sc: float = 0.01
    pd: float = 0.01
    t: float = 2.0
    sc_form: str = "groups"
    pd_form: str = "codewords"
    beta: float = 0.25
    decay: float = 0.99
    fsq: tuple[int, ...] = (8, 8)
    start: str = "kmeans"
    restarts: int = 1
    balanced: bool = False
    dead_every: int = 0

    def __post_init__(self):
        check_choices(
            self, "tokenizer", quantizer=(*RATED, *NEAREST), loss=("square", "cosine"),
            sc_form=("groups", "levels"), pd_form=("codewords", "soft"),
            start=("kmeans", "random"),
        )  # fmt: skip
        check_least(
            self, "tokenizer", levels=1, codes=2, features=1, encoder=1, decoder=1, sc=0,
            pd=0, beta=0, decay=0, fsq=2, restarts=1, dead_every=0,
        )  # fmt: skip
        check_positive(self, "tokenizer", "tau", "t")
        if self.codes > MAX_CODES:
            raise ValueError(
                f"tokenizer.codes must be <= {MAX_CODES}, got {self.codes}"
            )
        if not self.decay < 1:
            raise ValueError(f"tokenizer.decay must be < 1, got {self.decay}")
        if (self.encoder or self.quantizer == "fsq") and not self.decoder:
            raise ValueError(
                "tokenizer.encoder and quantizer=fsq need tokenizer.decoder, the hidden "
                f"widths of the way back, got {self.decoder}"
            )
        if self.quantizer == "fsq":
            if self.codes < math.prod(self.fsq):
                raise ValueError(
                    f"tokenizer.fsq={self.fsq} has {math.prod(self.fsq)} codes, "
                    f"tokenizer.codes is {self.codes}: raise it"
                )
            if not self.encoder or self.encoder[-1] != self.levels * len(self.fsq):
                raise ValueError(
                    "quantizer=fsq needs tokenizer.encoder to end with levels x features "
                    f"of a level, {self.levels * len(self.fsq)}, got {self.encoder}"
                )

    @property
    def width(self) -> int:
        """Features of a code."""
        return self.encoder[-1] if self.encoder else self.features


SOURCES = (
    "trained", "rq_kmeans", "rq_kmeans_balanced", "pq_kmeans", "random", "item",
)  # fmt: skip
POLICIES = ("token", "reassign", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Options of generative retrieval.

    Attributes:
      source: of the SIDs: a tokenizer that was ``trained`` before, ``rq_kmeans``,
        ``rq_kmeans_balanced``, ``pq_kmeans``, ``random`` codes, or ``item``: one code for
        each item, which is SASRec.
      collisions: what becomes of items with one SID: a further ``token`` with the item's
        place among them, ``reassign`` of the last code to the best free one, ``none``:
        an SID gives its items by popularity.
      collision_codes: items of one SID at most, with ``token``.
      restarts: of k-means.
      beam: SIDs kept by the search.
      top: items that every search has to find; the beam holds at least as many.
      exclude_seen: whether items that a user has had are never found.

    Raises:
      ValueError: unknown choices, values out of range, a beam below ``top``.
    """

    source: str = "trained"
    collisions: str = "token"
    collision_codes: int = 256
    restarts: int = 1
    beam: int = 20
    top: int = 10
    exclude_seen: bool = False

    def __post_init__(self):
        check_choices(self, "method", source=SOURCES, collisions=POLICIES)
        check_least(self, "method", collision_codes=1, restarts=1, beam=1, top=1)
        if self.collision_codes > MAX_CODES:
            raise ValueError(
                f"method.collision_codes must be <= {MAX_CODES}, got "
                f"{self.collision_codes}"
            )
        if self.beam < self.top:
            raise ValueError(
                f"method.beam must be at least method.top={self.top}, got {self.beam}"
            )

    def sizes(self, tokenizer: Tokenizer, items: int) -> tuple[int, ...]:
        """Codes of each place of an SID."""
        if self.source == "item":
            return (items,)
        sizes = (tokenizer.codes,) * tokenizer.levels
        return (*sizes, self.collision_codes) if self.collisions == "token" else sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    """Options of the decoder-only transformer; see ``nets.transformer.Transformer``.

    Attributes:
      history: items of a user that it reads at most.
      width: of the hidden states.
      layers: number of blocks.
      heads: of attention.
      hidden: of the MLPs; 0: 8/3 width.
      tied: the output is the product with the input embedding.
      users: buckets that users are hashed to, a token before the history; 0: none.

    Raises:
      ValueError: values out of range, heads that do not divide the width.
    """

    history: int = 20
    width: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 0
    tied: bool = False
    users: int = 0

    def __post_init__(self):
        check_least(
            self, "net", history=1, width=1, layers=1, heads=1, hidden=0, users=0
        )
        if self.width % self.heads:
            raise ValueError(
                f"net.heads must divide net.width={self.width}, got {self.heads}"
            )
