"""The study of semantic IDs: its rows, the SIDs of a run, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import run, tasks
from jaxpapers.papers import r3_vae
from jaxpapers.tasks import item_vectors, tokenizers
from tests.contract import grid

SMALL = [
    "--config.data.count=40", "--config.data.eval_batch=8", "--config.tokenizer.codes=8",
    "--config.tokenizer.features=8", "--config.net.width=16",
]  # fmt: skip


def config(*arguments):
    return run.load_config("r3_vae:smoke", [*SMALL, *arguments])


def test_rows_share_tokenizers_and_can_be_chosen():
    own = config("--config.data.rows=('all',)")
    study = tasks.study("r3_vae", own, tasks.read(own), grid("1x1"))
    rows = study.rows(3)
    assert [row.label for row in rows] == [
        "R3-VAE, reconstruction", "R3-VAE, soft tau .05", "RQ-VAE", "RQ-KMeans",
        "RQ-KMeans, balanced", "PQ-KMeans", "random SIDs", "SASRec", "Markov",
        "popularity",
    ]  # fmt: skip
    assert [row.stage.after is not None for row in rows[:8]] == [True] * 3 + [False] * 5
    assert rows[0].stage.after.config.train.steps == own.pretrain.steps
    for row in rows[:8]:
        r3_vae.read(row.stage.config)
    counted = [rows[8].measure(), rows[9].measure()]
    assert all(0 < f.numbers["recall_10"] < 1 for f in counted)
    few = config("--config.data.rows=('SASRec',)")
    rows = tasks.study("r3_vae", few, tasks.read(few), grid("1x1")).rows(0)
    assert [row.label for row in rows][1:] == ["SASRec", "Markov", "popularity"]
    wrong = config("--config.data.rows=('TIGER',)")
    with pytest.raises(ValueError, match=r"config.data.rows .* got \['TIGER'\]"):
        tasks.study("r3_vae", wrong, tasks.read(wrong), grid("1x1")).rows(0)


def test_tokenizers_alone():
    own = run.load_config("r3_vae:tokenizers", ["--config.tokenizer.features=16"])
    rows = tokenizers.compared("r3_vae", own, np.eye(16, dtype=np.float32)).rows(0)
    assert len(rows) == 1 + 14 + 5
    for row in rows[:15]:
        r3_vae.read(row.stage.config)
        assert row.stage.after is None


@pytest.mark.programs(14)  # The first state, a draw of the SIDs.
def test_a_run_begins_with_the_sids_of_its_source():
    own = config("--config.method.source=random")
    data = tasks.read(own)
    method = r3_vae.make(own, **data.facts)
    state = jax.jit(method.init)(jax.random.key(0), data.shapes)
    assert len(np.unique(state.extra["sid"], axis=0)) == 40
    every, refresh = data.refresh
    after = refresh(state)
    table = np.asarray(after.extra["sid"])
    assert every > 10**9 and table.shape == (40, 3)
    assert len(np.unique(table, axis=0)) == 40
    assert (table != np.asarray(state.extra["sid"])).any()
    # The collision code counts the items of one SID.
    same = (table[:, None, :2] == table[None, :, :2]).all(-1)
    np.testing.assert_array_equal(table[:, 2], np.tril(same, -1).sum(1))
    assert jnp.shape(after.extra["sid"]) == jnp.shape(state.extra["sid"])


def test_items_without_a_text_are_named():
    with pytest.raises(ValueError, match="1 of 2 items have no text .*: b;"):
        item_vectors.of_texts(["x", " "], ["a", "b"])
