"""Figures of runs and of samples: what is drawn, in which panel, on which axis."""

import json

import numpy as np
import pytest

from jaxpapers import plots

pytestmark = pytest.mark.usefixtures("rendered")


def test_panels_against_a_metric_have_their_own_axes(tmp_path, figures):
    (tmp_path / "run").mkdir()
    rows = [{"step": i, "time": 0, "w": 0.1 * i, "bound": i, "log": -i} for i in (1, 2)]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    plots.plot_against(
        {"a": [tmp_path / "run"]}, "w", {"bound": "xy=", "log": "x"}, tmp_path / "a.png"
    )
    left, right = figures[0].axes
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert (right.get_xscale(), right.get_yscale()) == ("log", "linear")
    (line,) = [x for x in left.lines if x.get_label() == "equal"]
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert not [x for x in right.lines if x.get_label() == "equal"]


def test_contact_sheets_place_images_row_by_row():
    x = np.zeros((6, 2, 2, 1), np.float32) - 1
    x[4] = 1
    sheet = plots.contact_sheet(x, 2)
    assert sheet.shape == (2 * 3 - 1, 3 * 3 - 1)
    assert sheet[3:5, 3:5].tolist() == [[1, 1], [1, 1]]
    assert sheet[:2, :2].sum() == 0
    assert plots.contact_sheet(np.zeros((4, 2, 2, 3)), 2).shape == (5, 5, 3)
