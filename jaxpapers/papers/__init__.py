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
    """

    title: str
    authors: str
    year: int
    arxiv: str
    field: str
    smoke: str
    trained: bool = True
    venue: str = ""

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
    ),
    "din": Paper(
        "Deep Interest Network for Click-Through Rate Prediction",
        "Zhou, Guorui and Song, Chengru and Zhu, Xiaoqiang and Fan, Ying and Zhu, Han "
        "and Ma, Xiao and Yan, Yanghui and Jin, Junqi and Li, Han and Gai, Kun",
        2017,
        "1706.06978",
        "recommendation",
        "next click in a generated log",
    ),
    "dien": Paper(
        "Deep Interest Evolution Network for Click-Through Rate Prediction",
        "Zhou, Guorui and Mou, Na and Fan, Ying and Pi, Qi and Bian, Weijie and Zhou, "
        "Chang and Zhu, Xiaoqiang and Gai, Kun",
        2018,
        "1809.03672",
        "recommendation",
        "next click in a generated log, in order, with the auxiliary loss",
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
    ),
    "score_wasserstein": Paper(
        "Score-based Generative Modeling Secretly Minimizes the Wasserstein Distance",
        "Kwon, Dohyun and Fan, Ying and Lee, Kangwook",
        2022,
        "2212.06359",
        "diffusion",
        "a score model of four clusters and the bound of its distance",
    ),
    "sft_pg": Paper(
        "Optimizing DDPM Sampling with Shortcut Fine-Tuning",
        "Fan, Ying and Lee, Kangwook",
        2023,
        "2301.13362",
        "diffusion",
        "a denoiser of a swiss roll and the tuning of its sampler",
    ),
    "nuclear_norm": Paper(
        "Domain Generalization via Nuclear Norm Regularization",
        "Shi, Zhenmei and Ming, Yifei and Fan, Ying and Sala, Frederic and Liang, Yingyu",
        2023,
        "2303.07527",
        "generalization",
        "classes of generated signs, of which most mislead in the test's domain",
    ),
    "poem": Paper(
        "POEM: Out-of-Distribution Detection with Posterior Sampling",
        "Ming, Yifei and Fan, Ying and Li, Yixuan",
        2022,
        "2206.13687",
        "detection",
        "digits of seven segments against other glyphs, seconds",
    ),
    "mpc_psrl": Paper(
        "Model-based Reinforcement Learning for Continuous Control with Posterior "
        "Sampling",
        "Fan, Ying and Ming, Yifei",
        2020,
        "2012.09613",
        "reinforcement learning",
        "a cart-pole in short episodes",
    ),
    "looped_transformer": Paper(
        "Looped Transformers for Length Generalization",
        "Fan, Ying and Du, Yilun and Ramchandran, Kannan and Lee, Kangwook",
        2024,
        "2409.15647",
        "language models",
        "parity of up to three bits",
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
    ),
    "gppstd": Paper(
        "Efficient Model-Free Reinforcement Learning Using Gaussian Process "
        "(reconstructed)",
        "Fan, Ying and Chen, Letian and Wang, Yizhou",
        2018,
        "1812.04359",
        "reinforcement learning",
        "two agents find the reward of a Deep Sea of 5 x 5",
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
    ),
    "dnw": Paper(
        "Efficient learning strategy of Chinese characters based on network approach",
        "Yan, Xiaoyong and Fan, Ying and Di, Zengru and Havlin, Shlomo and Wu, Jinshan",
        2013,
        "1303.1599",
        "networks",
        "a learning order of 30 characters and its cost",
        trained=False,
    ),
    "peer_review": Paper(
        "Demanding peer review is associated with higher impact in published science",
        "Jiang, Huihuang and Li, Heyang and Wang, Zifan and Fan, Ying and Zeng, An",
        2026,
        "2604.14047",
        "science of science",
        "120 generated papers: letters parsed, opinions coded, citations regressed",
        trained=False,
    ),
    "coda": Paper(
        "How to Solve Contextual Goal-Oriented Problems with Offline Datasets?",
        "Fan, Ying and Li, Jingling and Swaminathan, Adith and Modi, Aditya and Cheng, "
        "Ching-An",
        2024,
        "2408.07753",
        "reinforcement learning",
        "a point mass to three rooms of a maze, from random walks",
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
