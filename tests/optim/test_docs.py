"""The examples of docs/dion.md run, on eight devices."""

import dataclasses
import doctest
import functools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import optax
import pytest

PAGE = Path(__file__).parent.parent.parent / "docs" / "dion.md"
SECTION = PAGE.read_text().partition("\n## In your training loop\n")[2]
START, *REST = re.split(r"^### ", SECTION.partition("\n## ")[0], flags=re.MULTILINE)
EXAMPLES = {text.partition("\n")[0]: text for text in REST}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"]
)
@dataclasses.dataclass
class NamedArray:
    """haliax's, as far as a tree of parameters goes."""

    array: Any
    axes: tuple


@dataclasses.dataclass
class OptimizerConfig:
    """levanter's, as far as ``build`` goes."""

    learning_rate: float = 6e-4
    weight_decay: float = 0.1

    @classmethod
    def register_subclass(cls, name):
        return lambda subclass: subclass

    def lr_scheduler(self, num_train_steps):
        return optax.cosine_decay_schedule(self.learning_rate, num_train_steps)


@pytest.fixture
def not_installed(monkeypatch):
    """Modules in the place of packages that need another Python or TensorFlow."""
    haliax, levanter = ModuleType("haliax"), ModuleType("levanter")
    haliax.named = NamedArray
    levanter.optim = ModuleType("levanter.optim")
    levanter.optim.OptimizerConfig = OptimizerConfig
    for module in (haliax, levanter, levanter.optim):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_page_has_what_people_look_for():
    wanted = ("linen", "nnx", "equinox", "MaxText", "levanter")
    assert [w for w in wanted if any(w in title for title in EXAMPLES)] == [*wanted]


@pytest.mark.programs(30)  # As users do, arrays are made outside jit.
@pytest.mark.parametrize("title", EXAMPLES)
def test_example(title, not_installed):
    text = re.sub(r"^```.*$", "", START + EXAMPLES[title], flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, {}, title, str(PAGE), 0)
    report: list[str] = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert tried > 5 and not failed, "".join(report)
