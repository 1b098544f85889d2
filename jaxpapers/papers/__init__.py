"""The list of papers. Modules are imported when asked for."""

import difflib
import importlib
from types import ModuleType
from typing import NamedTuple


class Paper(NamedTuple):
    """One row of the list.

    Attributes:
      title: of the paper.
      authors: first author and others.
      year: of the arXiv version or publication.
      arxiv: id on arXiv; "" for none.
      field: a tag.
      smoke: what the smoke preset does, in at most 30 CPU seconds and without any file.
      trained: whether the module has ``make``; False for papers that train nothing.
      venue: where it was published, for papers that are not on arXiv.
      result: one number beside its rivals'; README's table repeats it.
      cost: minutes of a seed on two CPU cores.
    """

    title: str
    authors: str
    year: int
    arxiv: str
    field: str
    smoke: str
    trained: bool = True
    venue: str = ""
    result: str = ""
    cost: str = ""

    @property
    def reference(self) -> str:
        """arXiv id, or venue and year."""
        return f"arXiv {self.arxiv}" if self.arxiv else f"{self.venue} {self.year}"


NAMES: dict[str, Paper] = {
    "dion": Paper(
        "Dion: Distributed Orthonormalized Updates",
        "Ahn, Kwangjun and Xu, Byron and Abreu, Natalie and Fan, Ying and Magakyan, "
        "Gagik and Sharma, Pratyusha and Zhan, Zheng and Langford, John",
        2025,
        "2504.05295",
        "optimization",
        "byte-level language model on the standard library",
        result="1.65 bits per byte of held-out code (1.73 by the paper's Dion); "
        "gzip -9 1.937, xz -9 1.658",
        cost="2 to 6 minutes",
    ),
    "din": Paper(
        "Deep Interest Network for Click-Through Rate Prediction",
        "Zhou, Guorui and Song, Chengru and Zhu, Xiaoqiang and Fan, Ying and Zhu, Han "
        "and Ma, Xiao and Yan, Yanghui and Jin, Junqi and Li, Han and Gai, Kun",
        2017,
        "1706.06978",
        "recommendation",
        "next click in a generated log",
        result="AUC 0.825; mean pooling 0.816",
        cost="1 minute a seed",
    ),
    "dien": Paper(
        "Deep Interest Evolution Network for Click-Through Rate Prediction",
        "Zhou, Guorui and Mou, Na and Fan, Ying and Pi, Qi and Bian, Weijie and Zhou, "
        "Chang and Zhu, Xiaoqiang and Gai, Kun",
        2018,
        "1809.03672",
        "recommendation",
        "next click in a generated log, in order, with the auxiliary loss",
        result="AUC 0.858; DIN in as many epochs 0.809",
        cost="8 minutes a seed",
    ),
    "defer": Paper(
        "Real Negatives Matter: Continuous Training with Real Negatives for Delayed "
        "Feedback Modeling",
        "Gu, Siyu and Sheng, Xiang-Rong and Fan, Ying and Zhou, Guorui and Zhu, "
        "Xiaoqiang",
        2021,
        "2104.14121",
        "recommendation",
        "late conversions of synthetic clicks",
        result="NLL 0.570; oracle 0.558, pretrained 0.608",
        cost="2 minutes",
    ),
    "sim": Paper(
        "Search-based User Interest Modeling with Lifelong Sequential Behavior Data for "
        "Click-Through Rate Prediction",
        "Pi, Qi and Zhu, Xiaoqiang and Zhou, Guorui and Zhang, Yujing and Wang, Zhe and "
        "Ren, Lejian and Fan, Ying and Gai, Kun",
        2020,
        "2006.05639",
        "recommendation",
        "next click in a generated log, from whole histories",
        result="AUC 0.837; average of the long history 0.831",
        cost="1 minute a seed",
    ),
    "rocket": Paper(
        "Rocket Launching: A Universal and Efficient Framework for Training "
        "Well-performing Light Net",
        "Zhou, Guorui and Fan, Ying and Cui, Runpeng and Bian, Weijie and Zhu, Xiaoqiang "
        "and Gai, Kun",
        2017,
        "1708.04106",
        "recommendation",
        "next click in a generated log, DIN with two MLPs",
        result="AUC of the light net 0.825; trained alone 0.822",
        cost="2 minutes a seed",
    ),
    "dpok": Paper(
        "DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models",
        "Fan, Ying and Watkins, Olivia and Du, Yuqing and Liu, Hao and Ryu, Moonkyung "
        "and Boutilier, Craig and Abbeel, Pieter and Ghavamzadeh, Mohammad and Lee, "
        "Kangwook and Lee, Kimin",
        2023,
        "2305.16381",
        "diffusion",
        "drawn digits for prompts, and the tuning of the model to a reward",
        result="accuracy of a held-out classifier 0.955; before tuning 0.882",
        cost="3 minutes a seed",
    ),
    "score_wasserstein": Paper(
        "Score-based Generative Modeling Secretly Minimizes the Wasserstein Distance",
        "Kwon, Dohyun and Fan, Ying and Lee, Kangwook",
        2022,
        "2212.06359",
        "diffusion",
        "a score model of four clusters and the bound of its distance",
        result="W2 0.087, its bound holds at every logged point",
        cost="2 minutes",
    ),
    "sft_pg": Paper(
        "Optimizing DDPM Sampling with Shortcut Fine-Tuning",
        "Fan, Ying and Lee, Kangwook",
        2023,
        "2301.13362",
        "diffusion",
        "a denoiser of a swiss roll and the tuning of its sampler",
        result="sliced W2 of 10 steps 0.019; before tuning 0.085",
        cost="2 minutes",
    ),
    "nuclear_norm": Paper(
        "Domain Generalization via Nuclear Norm Regularization",
        "Shi, Zhenmei and Ming, Yifei and Fan, Ying and Sala, Frederic and Liang, Yingyu",
        2023,
        "2303.07527",
        "generalization",
        "classes of generated signs, of which most mislead in the test's domain",
        result="accuracy where shortcuts mislead 1.00 on 5 of 5 seeds; ERM 0.86, "
        "weight decay 0.14",
        cost="1 minute a seed",
    ),
    "poem": Paper(
        "POEM: Out-of-Distribution Detection with Posterior Sampling",
        "Ming, Yifei and Fan, Ying and Li, Yixuan",
        2022,
        "2206.13687",
        "detection",
        "digits of seven segments against other glyphs, seconds",
        result="FPR95 of letters against digits 0.071; random outliers 0.162",
        cost="1 minute a seed",
    ),
    "mpc_psrl": Paper(
        "Model-based Reinforcement Learning for Continuous Control with Posterior "
        "Sampling",
        "Fan, Ying and Ming, Yifei",
        2020,
        "2012.09613",
        "reinforcement learning",
        "a cart-pole in short episodes",
        result="a cart-pole balanced (200 of 200) within 6 episodes by 3 of 3 "
        "seeds; certainty equivalence as fast; the pendulum swung up within"
        " 7 episodes by 2 of 3",
        cost="2 minutes a seed",
    ),
    "looped_transformer": Paper(
        "Looped Transformers for Length Generalization",
        "Fan, Ying and Du, Yilun and Ramchandran, Kannan and Lee, Kangwook",
        2024,
        "2409.15647",
        "language models",
        "parity of up to three bits",
        result="parity trained to 10 bits, exact match at 20 of 0.96, 0.99 and "
        "0.04 on three seeds; ten layers of next-token prediction at "
        "chance, 0.5",
        cost="8 minutes a seed",
    ),
    "versaprm": Paper(
        "VersaPRM: Multi-Domain Process Reward Model via Synthetic Reasoning Data",
        "Zeng, Thomas and Zhang, Shuibai and Wu, Shutong and Classen, Christian and "
        "Chae, Daewon and Ewer, Ethan and Lee, Minjae and Kim, Heeju and Kang, Wonjun "
        "and Kunde, Jackson and Fan, Ying and Kim, Jungtaek and Koo, Hyung Il and "
        "Ramchandran, Kannan and Papailiopoulos, Dimitris and Lee, Kangwook",
        2025,
        "2502.06737",
        "language models",
        "rewards of steps in arithmetic and logic",
        result="the authors' votes, sequences and loss reproduced to the digit; in"
        " the domains of training, weighted majority of 16 right in 71 % "
        "where the majority is in 56 %, AUC of steps 0.87 (goal 0.9); "
        "chance in others",
        cost="40 minutes",
    ),
    "gppstd": Paper(
        "Efficient Model-Free Reinforcement Learning Using Gaussian Process "
        "(reconstructed)",
        "Fan, Ying and Chen, Letian and Wang, Yizhou",
        2018,
        "1812.04359",
        "reinforcement learning",
        "two agents find the reward of a Deep Sea of 5 x 5",
        result="Deep Sea of 10 x 10 solved by 5 of 5 agents in 53 episodes; "
        "epsilon-greedy by none in 300",
        cost="3 minutes",
    ),
    "rejump": Paper(
        "ReJump: A Tree-Jump Representation for Analyzing and Improving LLM Reasoning",
        "Zeng, Yuchen and Zhang, Shuibai and Kang, Wonjun and Wu, Shutong and Zou, "
        "Lynnix and Fan, Ying and Kim, Heeju and Lin, Ziqian and Kim, Jungtaek and Koo, "
        "Hyung Il and Papailiopoulos, Dimitris and Lee, Kangwook",
        2025,
        "2512.00831",
        "language models",
        "search traces of twelve puzzles and their metrics",
        trained=False,
        result="of 8 samples, the one with the longest jumps solves 5.4 % of 1,362"
        " puzzles; one at random 3.8 %",
        cost="2 minutes a seed",
    ),
    "dnw": Paper(
        "Efficient learning strategy of Chinese characters based on network approach",
        "Yan, Xiaoyong and Fan, Ying and Di, Zengru and Havlin, Shlomo and Wu, Jinshan",
        2013,
        "1303.1599",
        "learning orders",
        "a learning order of 30 characters and its cost",
        trained=False,
        result="cost to read 90 % of text 3134; by frequency 5073, by density 2468",
        cost="1 minute",
    ),
    "peer_review": Paper(
        "Demanding peer review is associated with higher impact in published science",
        "Jiang, Huihuang and Li, Heyang and Wang, Zifan and Fan, Ying and Zeng, An",
        2026,
        "2604.14047",
        "science of science",
        "120 generated papers: letters parsed, opinions coded, citations regressed",
        trained=False,
        result="239 of 240 generated letters recovered exactly; strength by rules "
        "correlates 0.82 with the truth, length 0.17",
        cost="2 minutes",
    ),
    "coda": Paper(
        "How to Solve Contextual Goal-Oriented Problems with Offline Datasets?",
        "Fan, Ying and Li, Jingling and Swaminathan, Adith and Modi, Aditya and Cheng, "
        "Ching-An",
        2024,
        "2408.07753",
        "reinforcement learning",
        "a point mass to three rooms of a maze, from random walks",
        result="success in three rooms of a maze 0.82, behind its oracle and UDS, "
        "1.00; behaviour cloning 0",
        cost="2 minutes a seed",
    ),
    "r3_vae": Paper(
        "R3-VAE: Reference Vector-Guided Rating Residual Quantization VAE for Generative "
        "Recommendation",
        "Wan, Qiang and Yang, Ze and Yang, Dawei and Fan, Ying and Yan, Xin and Liu, "
        "Siyang",
        2026,
        "2604.11440",
        "recommendation",
        "semantic IDs of a generated catalogue and the next item by generating them; a "
        "reconstruction",
        result="recall@10 on MovieLens-100k 0.121; random SIDs 0.072, popularity "
        "0.087, but first-order Markov 0.144 and SASRec 0.147",
        cost="1 minute a row and seed",
    ),
}


def load(name: str) -> ModuleType:
    """The module of a paper.

    Raises:
      ValueError: no such paper.
    """
    check(name)
    return importlib.import_module(f"jaxpapers.papers.{name}")


def check(name: str, where: str = "") -> Paper:
    """The list's row of a paper; ValueError with a suggestion if there is none.

    Args:
      name: of the paper.
      where: the name stands, for the error.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{where and where + ': '}unknown paper {name!r}; expected one of "
            f"{sorted(NAMES)}{hint}"
        )
    return NAMES[name]


def bibtex(name: str) -> str:
    """BibTeX entry of a paper."""
    paper = check(name)
    first = paper.authors.split(",")[0].lower()
    source = (
        f"  eprint = {{{paper.arxiv}}},\n  archivePrefix = {{arXiv}}\n"
        if paper.arxiv
        else f"  howpublished = {{{paper.venue}}}\n"
    )
    return (
        f"@misc{{{first}{paper.year}{name},\n"
        f"  title = {{{{{paper.title}}}}},\n"
        f"  author = {{{paper.authors}}},\n"
        f"  year = {{{paper.year}}},\n{source}}}"
    )
