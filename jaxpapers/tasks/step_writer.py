"""A language model that writes solutions of the generator's problems, step by step.

Its prompt shows a few solved problems; a line of its answer is a step, which the verifier
reads. These are real errors, not drawn ones.
"""

import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpapers.data import fetch, tokenizer, weights
from jaxpapers.nets import decoding
from jaxpapers.nets.transformer import Transformer
from jaxpapers.ops import reasoning
from jaxpapers.ops.reasoning import DOMAINS

# Prompts are padded to multiples, so that few programs are compiled.
MULTIPLE = 64
SHOWN = 4  # Solved problems of a prompt.
END = "\n\n"


class Model(NamedTuple):
    """A language model, its weights and its tokenizer."""

    net: Mapping[str, Any]
    params: Mapping[str, Any]
    tokens: tokenizer.Tokenizer


class Written(NamedTuple):
    """A solution in text.

    Attributes:
      steps: lines.
      first_error: index of the first wrong one; -1: none.
      answer: what the last step comes to; "" for a solution that ended early.
      correct: whether it is the problem's.
    """

    steps: tuple[str, ...]
    first_error: int
    answer: str
    correct: bool

    @property
    def labels(self) -> list[int]:
        """Of the steps, see ``reasoning.labels_of``."""
        return reasoning.labels_of(self.first_error, len(self.steps))


@functools.lru_cache(maxsize=1)
def load(name: str) -> Model:
    """A model by its package's name, or of a folder or GGUF file.

    Raises:
      FileNotFoundError, ValueError: see ``data.weights.load``.
      ModuleNotFoundError: the extra ``language`` is not installed.
    """
    path = fetch.get(name) if name in fetch.NAMES else name
    loaded = weights.load(path, place=lambda _, x: jax.device_put(x))
    return Model(loaded.net, loaded.params, tokenizer.load(path))


def question(problem: reasoning.Problem) -> str:
    """The problem in text, without options."""
    return reasoning.text([problem.domain, *problem.told])


def told(problem: reasoning.Problem, trace: reasoning.Trace) -> Written:
    """A solver's solution in text, without the step that names an option."""
    return read(problem, "\n".join(map(reasoning.text, trace.steps[:-1])))


def read(problem: reasoning.Problem, answer: str) -> Written:
    """The solution in a text: its lines up to an empty one, at most those needed."""
    stripped = (line.strip() for line in answer.strip().splitlines())
    lines = list(itertools.takewhile(bool, stripped))[: len(problem.program)]
    steps = [[*reasoning.words(line), reasoning.STEP] for line in lines]
    wrong = reasoning.first_error(problem, steps)
    whole = len(lines) == len(problem.program)
    last = lines[-1].partition(" = ")[2] if whole else ""
    right = reasoning.text(DOMAINS[problem.domain].write(reasoning.result(problem)))
    return Written(tuple(lines), wrong, last, last == right)


def prompt(
    problem: reasoning.Problem, before: Sequence[str] = (), **fields: Any
) -> str:
    """Solved problems of the same domain, the problem, and the steps so far.

    Args:
      problem: to solve.
      before: steps.
      fields: of ``reasoning.problem``: sizes of the problems that are shown.
    """
    parts = []
    for number in range(SHOWN):
        shown = reasoning.problem(problem.domain, number, seed=-1, **fields)
        trace = reasoning.solve(shown, random.Random(number), error=0.0)
        parts.append("\n".join([question(shown), *told(shown, trace).steps]))
    return END.join([*parts, "\n".join([question(problem), *before]) + "\n"])


class Writer:
    """Draws continuations of prompts in batches of one size.

    Args:
      model: see ``load``.
      batch: prompts of a call of the program.
      length: tokens to draw at most.
      temperature: of the softmax.
      stop: string that ends an answer.
    """

    def __init__(
        self, model: Model, batch: int, length: int, temperature: float, stop: str
    ):
        self.model, self.batch, self.stop = model, batch, stop
        self.table = tokenizer.stop_table(model.tokens.token_bytes, [stop])
        options = decoding.Options(
            # Prompts have several lengths, and an unrolled program takes a minute.
            length=length, temperature=temperature, pad=self._pad, unstack=False,
            stop=() if model.tokens.eos is None else (model.tokens.eos,),
        )  # fmt: skip
        net = Transformer(**model.net)
        self.program = jax.jit(
            functools.partial(decoding.generate, net, options=options)
        )

    @property
    def _pad(self) -> int:
        return self.model.tokens.eos or 0

    def __call__(self, prompts: Sequence[str], key: jax.Array) -> list[str]:
        """A drawn continuation of each prompt, up to the stop string."""
        found = []
        for at in range(0, len(prompts), self.batch):
            part = [*prompts[at : at + self.batch]]
            some = len(part)
            part += [part[-1]] * (self.batch - some)
            ids, mask = tokenizer.left_padded(
                [self.model.tokens.encode(x) for x in part],
                self._pad,
                multiple=MULTIPLE,
            )
            made = jax.device_get(
                self.program(
                    self.model.params, ids, jax.random.fold_in(key, at), mask=mask,
                    table=self.table,
                )
            )  # fmt: skip
            for tokens, length in list(zip(made.tokens, made.lengths))[:some]:
                text = self.model.tokens.decode(np.asarray(tokens[:length]).tolist())
                found.append(tokenizer.cut(text, [self.stop]))
        return found
