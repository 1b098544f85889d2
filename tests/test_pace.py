"""The rate and the time left, with a clock of the test's own."""

import pytest

from jaxpapers import report
from jaxpapers.pace import RECENT, Pace
from tests.test_report import compiled


def test_compilation_and_evaluations_are_no_steps():
    pace, now = Pace(0, 100, 10, 0.0), 60.0  # A minute of compiling and the first step.
    pace.step(1, now)
    for step in range(2, 21):
        pace.step(step, now := now + 0.5)
        if step % 10 == 0:
            pace.evaluation(now := now + 7.0)
    assert pace.rate == pytest.approx(2.0)
    assert pace.complete
    # 80 steps of half a second and the evaluations of 30, 40, ... 100.
    assert pace.seconds_left == pytest.approx(40 + 8 * 7)


def test_only_recent_steps_count():
    pace, now = Pace(0, 10_000, 0, 0.0), 0.0
    for step in range(1, 1001):
        pace.step(step, now := now + 10.0)
    for step in range(1001, 1001 + RECENT):
        pace.step(step, now := now + 0.1)
    assert pace.rate == pytest.approx(10.0)


def test_resumed_in_the_middle():
    pace = Pace(900, 1000, 0, 5.0)
    pace.step(901, 6.0)
    assert pace.rate == pytest.approx(1.0)  # Nothing better is known.
    pace.step(902, 6.5)
    assert pace.rate == pytest.approx(2.0)
    assert pace.seconds_left == pytest.approx(49.0)
    assert not pace.complete  # The last step's evaluation, of unknown length.


@pytest.mark.parametrize(
    "done, steps, every, left",
    [(0, 10, 0, 1), (10, 10, 0, 0), (4, 10, 5, 2), (5, 10, 5, 1), (4, 12, 5, 3),
     (10, 12, 5, 1), (12, 12, 5, 0), (0, 0, 0, 0), (3, 4, 10, 1)],
)  # fmt: skip
def test_evaluations_to_come(done, steps, every, left):
    assert Pace(done, steps, every, 0.0)._left() == left


def test_what_is_printed_and_written(capsys, monkeypatch):
    class Kept:
        records = []

        def start(self, step):
            pass

        def write(self, step, values):
            self.records.append((step, values))

        def picture(self, step, path):
            pass

        def close(self):
            pass

    now = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    lines = report.Report(
        tokens_per_step=10, trackers=[Kept()], unit="rows", every=2, eval_every=4
    )
    lines.start(*compiled(), 0, 8)
    now[0] = 100.0
    for step in range(1, 7):
        lines.step(step, {"loss": 1.0})
        now[0] += 0.25
        if step == 4:
            now[0] += 3.75
            lines.evaluation(4, {"validation_x": 1.0})
            now[0] += 0.25
    lines.close()
    rates = [v["steps_per_second"] for _, v in Kept.records if "loss" in v]
    assert rates == [4.0, 4.0, 4.0]
    out = [" ".join(x.split()) for x in capsys.readouterr().out.splitlines()]
    assert "2/8 loss 1.0000 4.00 steps/s 40 rows/s ETA 2 s and evaluations" in out
    # Two steps and the evaluation of the last one, 4 seconds as the one before.
    assert "6/8 loss 1.0000 4.00 steps/s 40 rows/s ETA 4 s" in out
