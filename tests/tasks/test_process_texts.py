"""Rewards of text: what is read of it by hand, the data with a tiny model in place of the
real one, and, slow, the real one."""

import itertools
import json
import os
import random
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxpapers import papers, run, tasks
from jaxpapers.nets.transformer import Transformer
from jaxpapers.ops import reasoning
from jaxpapers.papers import versaprm
from jaxpapers.tasks import process_texts, step_writer
from jaxpapers.tasks.step_writer import Written
from tests.contract import grid

SEPARATOR = 256
PROBLEM = reasoning.Problem(
    "arithmetic", 34, (("plus", 57), ("times", 2)), ("from", "3", "4", "plus", "5", "7"),
    (182, 3), 5,
)  # fmt: skip


class Bytes:
    """A tokenizer of bytes, with one token for the end of a step."""

    eos = 0
    token_bytes = [bytes([i]) for i in range(SEPARATOR)] + [b"\n\n\n\n"]

    def encode(self, text):
        parts = [list(x.encode()) for x in text.split("\n\n\n\n")]
        return sum((p + [SEPARATOR] for p in parts[:-1]), []) + parts[-1]

    def decode(self, ids):
        return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")


NET = {"vocab_size": 257, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1,
       "hidden": 32, "tied": True, "rope_theta": 1e4, "epsilon": 1e-5}  # fmt: skip
FIELDS = {
    "data.vocab_size": 257, "net.width": 16, "net.layers": 2, "net.heads": 2,
    "net.kv_heads": 1, "net.hidden": 32, "net.rope_theta": 1e4, "net.plus": 43,
    "net.minus": 45, "net.separator": SEPARATOR, "net.lora_rank": 2,
    "data.generated": 12, "data.written": 2, "data.length": 256, "data.questions": 2,
    "data.solutions": 2, "data.test_domains": ("dates",), "data.search_questions": 0,
}  # fmt: skip


def config(**fields):
    arguments = [f"--config.{k}={v}" for k, v in {**FIELDS, **fields}.items()]
    return run.load_config("versaprm:smollm2", arguments)


@pytest.fixture
def tiny(monkeypatch):
    """A model of random weights; its answers are noise."""
    shapes = jax.eval_shape(
        Transformer(**NET).init, jax.random.key(0), np.zeros((1, 1), np.int32)
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.float32(0.3 * rng.normal(size=x.shape)), shapes["params"]
    )
    model = step_writer.Model({**NET, "rope_scaling": None}, params, Bytes())
    monkeypatch.setattr(step_writer, "load", lambda name: model)
    process_texts._program.cache_clear()
    yield model
    process_texts._program.cache_clear()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("34 plus 57 = 91\n91 times 2 = 182\n\nmore", (-1, "182", True)),
        (" 34 plus 57 = 91\n91 times 2 = 183", (1, "183", False)),
        ("35 plus 57 = 92\n92 times 2 = 182", (0, "182", True)),  # Right by chance.
        ("34 plus 57 = 91", (-1, "", False)),
        ("34 plus 57 = 91\n \n91 times 2 = 182", (-1, "", False)),
        ("so it is\n91 times 2 = 182\nand more", (0, "182", True)),
        ("", (-1, "", False)),
    ],
)
def test_answers_are_read(answer, expected):
    found = step_writer.read(PROBLEM, answer)
    assert (found.first_error, found.answer, found.correct) == expected
    assert found.steps == tuple(
        line.strip() for line in answer.split("\n\n")[0].split("\n \n")[0].splitlines()
    )[:2]  # fmt: skip
    good = len(found.steps) if found.first_error < 0 else found.first_error
    assert found.labels == [1] * good + [-1] * (len(found.steps) - good)


def test_prompt_shows_right_solutions_and_ends_where_the_answer_begins():
    text = step_writer.prompt(PROBLEM, ["34 plus 57 = 91"], steps=(2, 2), below=50)
    *shown, last = text.split("\n\n")
    assert last == "arithmetic from 34 plus 57\n34 plus 57 = 91\n"
    assert len(shown) == step_writer.SHOWN
    for part in shown:
        first, *steps = part.splitlines()
        assert first.startswith("arithmetic from") and len(steps) == 2


def test_solver_in_text_has_its_own_first_error():
    for number in range(60):
        problem = reasoning.problem("sets", number)
        trace = reasoning.solve(problem, random.Random(number), error=0.3)
        found = step_writer.told(problem, trace)
        late = trace.first_error == len(problem.program)  # A wrong option is no step.
        assert found.first_error == (-1 if late else trace.first_error)
        assert len(found.steps) == len(problem.program)


def test_data_and_weights_before_the_first_step(tiny, tmp_path):
    file = tmp_path / "own.jsonl"
    record = {"question": "1 + 1?", "steps": ["2", "3"], "labels": [1, -1]}
    file.write_text(json.dumps(record) + "\n")
    c = config(**{"data.path": file})
    data = tasks.read(c)
    assert "12 generated solutions, 2 that the model wrote" in data.summary
    assert "1 questions, 1 solutions" in data.summary
    batch = data.examples.batch(0, len(data.examples))
    ends = batch["ids"] == SEPARATOR
    assert ((batch["labels"] >= 0) == ends).all()  # The paper's label_last_n = 1.
    assert {0.0, 1.0} == set(batch["labels"][ends].tolist())
    text = tiny.tokens.decode(batch["ids"].ravel().tolist())
    assert "1 + 1?" in text and "arithmetic from" in text and "dates from" in text

    method = papers.load("versaprm").make(c, **data.facts)
    with jax.set_mesh(grid("4x2")):
        state = jax.jit(method.init)(jax.random.key(0), data.shapes)
        placed = data.refresh[1](state)
    old, new = state.params["decoder"], placed.params["decoder"]
    for a, b, given in zip(*map(jax.tree.leaves, (old, new, tiny.params)), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(b, given)
    assert placed.params["lora"] is state.params["lora"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"net.width": 32}, r"\{'width': 16\}: set config.net"),
        ({"data.vocab_size": 300}, "'vocab_size': 257"),
        ({"data.generated": -1}, "data.generated must be >= 0"),
        ({"data.domains": ("law",)}, "data.domains must be among"),
        ({"data.length": 8}, "no solution fits into data.length=8"),
        ({"data.kind": "x", "data.path": "f.json"}, "kind must be one of"),
    ],
)
def test_refused(tiny, fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.read(config(**{"data.written": 0, **fields}))


def test_votes_by_hand():
    """An early end agrees with nothing, not even with another one."""

    def solution(answer, correct=False):
        return Written(("a",) if answer else (), -1, answer, correct)

    solved = process_texts.Solved(
        PROBLEM, [solution(""), solution(""), solution("182", True), solution("3")]
    )
    scores = [[np.zeros(0), np.zeros(0), np.array([0.9]), np.array([0.2])]]
    votes = process_texts._votes([solved], scores)
    assert votes["accuracy"] == votes["best_of_n"] == 1
    assert votes["majority"] < 1  # All four answers differ: the first one drawn.


@pytest.mark.slow
def test_smollm2_is_tuned_and_searches(tmp_path):
    """From the package to the table; a few steps teach nothing, and are not asked to."""
    arguments = {
        "data.generated": 8, "data.written": 8, "train.steps": 2, "data.questions": 2,
        "data.solutions": 2, "data.search_questions": 1,
        "data.test_domains": ("arithmetic",),
    }  # fmt: skip
    fields = [f"--config.{k}={v}" for k, v in arguments.items()]
    # In a process of its own: one device, not the eight of the tests.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "jaxpapers", "run", "versaprm:smollm2", *fields]
    subprocess.run(
        [*command, "--workdir", str(tmp_path / "run")], check=True, env=environment
    )
    summary = json.loads((tmp_path / "run" / "comparison.json").read_text())
    tuned = summary["rows"][0]["numbers"][0]
    assert 0 <= tuned["auc_arithmetic"] <= 1 and 0 <= tuned["auc_written"] <= 1
    assert {"search_beam_search", "search_dvts"} <= set(tuned)


def test_a_solver_remembers_the_scores_of_its_search(tiny):
    calls = itertools.count(1)

    def scores(ids, segments):
        valid = (ids == SEPARATOR) & (segments > 0)
        order = np.argsort(~valid, axis=1, kind="stable")
        valid = np.take_along_axis(valid, order, 1)
        return versaprm.Scores(np.full(ids.shape, float(next(calls))), valid)

    solver = process_texts.TextSolver(config(), PROBLEM, scores)
    once = solver.score([("34 + 57 = 91",), ()], [True, False])
    more = solver.score([("34 + 57 = 91", "91 * 2 = 182")], [True])
    assert once == [[1.0], []] and more == [[1.0, 2.0]]
