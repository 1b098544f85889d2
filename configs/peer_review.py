"""Peer review as data: letters to coded opinions, opinions to regressions.

    jaxpapers run peer_review              2,000 generated papers with known coefficients
    jaxpapers run peer_review FILE ...     letters of your own: JATS XML, text, OpenReview
    jaxpapers run peer_review:smoke        120 papers, seconds

Nothing is trained. data.citations names saved OpenAlex or Crossref JSON, or a CSV (doi,
year, field, cites), and adds the regressions to a run on letters. extract.model asks a
language model beside the rules.
"""

from ml_collections import ConfigDict

PRESETS = ("paper", "smoke")
# Rank correlation of the rules' strength with the truth; data.seed draws all.
EXPECTED = {"smoke": 0.859}


def get_config(preset: str | None = None) -> ConfigDict:
    """The config of a preset (None: paper), locked."""
    preset = preset or "paper"
    if preset not in PRESETS:
        raise ValueError(
            f"unknown preset peer_review:{preset}; expected one of {PRESETS}"
        )
    config = ConfigDict(
        {
            "data": {
                "task": "reviews",
                "path": (),  # letters, or folders of them; instead of the generator
                "citations": "",  # of the letters: OpenAlex, Crossref, CSV
                "nlpeer": "",  # folder of one data set of NLPeer or NLPeer v2
                "rotten": "",  # human_annotation_data.jsonl of RottenReviews
                "papers": 2000,  # generated
                "texts": 240,  # of them written as letters and parsed
                "fields": 6,  # of science
                "years": 8,  # of publication
                "strength": 0.15,  # coefficient of the z-score in log citations
                "quality": 0.08,  # of mean quality
                "burden": 0.05,  # of revision burden
                "log_team": 0.1,  # of the log of team size
                "alpha": 0.6,  # overdispersion of citations
                "seed": 0,
            },
            "method": {
                "replications": 200,  # draws for coverage
                "bootstrap": 10_000,  # resamples of the tenths' means
                "permutations": 999,  # of the disagreement
                "fields": 2000,  # resamples of the fields' shares of variance
                "window": 2,  # years of citations
                "noise": 0.6,  # of a rater, for the attenuation
            },
            "extract": {
                "model": "",  # at an endpoint, or smollm2-135m here; "": rules
                "url": "",  # of the endpoint; "": the client's default
                "key": "OPENAI_API_KEY",  # environment variable with the key
                "cache": "",  # folder of replies; "": replies in the user's cache
                "recorded": False,  # replies from the cache only
                "texts": 20,  # letters that the model codes
            },
        }
    )
    if preset == "smoke":
        config.data.update(papers=120, texts=9, fields=3, years=2)
        config.method.update(replications=10, bootstrap=100, permutations=19, fields=50)
    return config.lock()
