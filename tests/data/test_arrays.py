"""Batches of arrays: epochs, orders, parts of a batch, refusals."""

import numpy as np
import pytest

from jaxpapers.data import arrays


def fields(count=7):
    x = np.random.default_rng(0).normal(size=(count, 2))
    return {"x": x, "row": np.arange(count)}


def test_every_epoch_has_every_row_once_in_its_own_order():
    examples = arrays.Examples(fields(), seed=3)
    first, second = (examples.batch(7 * i, 7) for i in range(2))
    for batch in (first, second):
        assert sorted(batch["row"]) == list(range(7))
        np.testing.assert_array_equal(batch["x"], fields()["x"][batch["row"]])
    assert (first["row"] != second["row"]).any()
    assert len(examples) == 7


def test_a_batch_does_not_depend_on_how_it_is_asked_for():
    examples = arrays.Examples(fields(), seed=3)
    whole = examples.batch(3, 8)["row"]
    np.testing.assert_array_equal(whole[2:6], examples.batch(3, 8, slice(2, 6))["row"])
    again = arrays.Examples(fields(), seed=3).batch(3, 8)["row"]
    np.testing.assert_array_equal(again, whole)
    other = arrays.Examples(fields(), seed=4).batch(3, 8)["row"]
    assert (other != whole).any()
    assert examples.batch(0, 0)["x"].shape == (0, 2)


def test_what_is_done_to_a_batch():
    examples = arrays.Examples(fields(), transform=lambda batch: {"y": 2 * batch["x"]})
    plain = arrays.Examples(fields())
    np.testing.assert_array_equal(examples.batch(0, 7)["y"], 2 * plain.batch(0, 7)["x"])


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"x": np.zeros((0, 2))}, "same number"),
        ({"x": np.zeros(3), "y": np.zeros(2)}, "same number"),
        ({"x": np.array([1.0, np.nan])}, "x must be finite"),
    ],
)
def test_refusals(bad, message):
    with pytest.raises(ValueError, match=message):
        arrays.Examples(bad)
