"""Option dataclasses from config groups, and what they refuse."""

import dataclasses

import pytest
from ml_collections import ConfigDict, FieldReference

from jaxpapers import blocks, options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    hidden: tuple[int, ...] = (4,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    vocab: int
    rate: float = 0.5
    kind: str = "sum"
    head: Head = Head()
    second: Head | None = None

    def __post_init__(self):
        options.check_choices(self, "net", kind=("sum", "mean"))
        options.check_least(self, "net", vocab=2)
        options.check_positive(self, "net", "rate")


def test_a_group_of_a_config_is_an_instance():
    group = ConfigDict(dataclasses.asdict(Net(vocab=5, second=Head())))
    assert options.from_config(Net, group, "net") == Net(vocab=5, second=Head())
    group.update(vocab=7, kind="mean")
    group.head.hidden = (8, 9)
    found = options.from_config(Net, group.lock(), "net")
    assert found == Net(vocab=7, kind="mean", head=Head(hidden=(8, 9)), second=Head())
    hash(found)  # A static argument of jit.


def test_lists_of_json_and_references_of_a_config_are_values():
    group = ConfigDict({"vocab": FieldReference(3), "head": {"hidden": [1, 2]}})
    found = options.from_config(Net, group, "net")
    assert found == Net(vocab=3, head=Head(hidden=(1, 2))) and type(found.vocab) is int


@pytest.mark.parametrize(
    "group, message",
    [
        ({"vocab": 3, "knid": "sum"}, "unknown field net.knid; did you mean net.kind?"),
        ({"vocab": 3, "head": {"hiden": ()}}, "did you mean net.head.hidden?"),
        ({"rate": 1.0}, "net.vocab is missing"),
        ({"vocab": 1}, "net.vocab must be >= 2, got 1"),
        ({"vocab": 3, "kind": "max"}, "net.kind must be one of .*'mean'.* got 'max'"),
        ({"vocab": 3, "rate": float("nan")}, "net.rate must be > 0, got nan"),
        ({"vocab": 3.5}, "net.vocab must be of type int, got 3.5"),
        ({"vocab": True}, "net.vocab must be of type int, got True"),
        ({"vocab": 3, "rate": "1"}, "net.rate must be of type float, got '1'"),
        ({"vocab": 3, "head": {"hidden": ["a"]}}, "net.head.hidden must be of type "),
        ({"vocab": 3, "head": {"hidden": 4}}, "net.head.hidden must be of type tuple"),
    ],
)
def test_refused_groups(group, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        options.from_config(Net, ConfigDict(group), "net")


def test_every_number_of_a_tuple_is_checked():
    options.check_least(Head(hidden=()), "net", hidden=1)
    with pytest.raises(ValueError, match=r"net.hidden must be >= 1, got \(4, 0\)"):
        options.check_least(Head(hidden=(4, 0)), "net", hidden=1)


def test_blocks_take_other_values_and_further_fields():
    train = blocks.train(10, eval_every=5, accumulate=2, prompt="x")
    assert (train["steps"], train["accumulate"], train["prompt"]) == (10, 2, "x")
    assert blocks.train(3).keys() == train.keys() - {"prompt"}
