"""How fast a run goes, and how long it still takes."""

from collections import deque

RECENT = 50  # steps that the rate is of


class Pace:
    """Rate of the recent steps, and the time left with the evaluations on the way.

    The time before the first step is reported counts as nothing (programs that it
    compiles), and that of evaluations not as steps.
    """

    def __init__(self, first: int, steps: int, eval_every: int, now: float):
        """Args: step of the start and of the end, steps between evaluations, seconds."""
        self._steps, self._every = steps, eval_every
        self._done, self._at, self._began = first, now, now
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._evaluations: list[float] = []
        self._started = False

    def step(self, step: int, now: float) -> None:
        """A step is done."""
        if self._started:
            self._recent.append((step - self._done, now - self._at))
        self._done, self._at, self._started = step, now, True

    def evaluation(self, now: float) -> None:
        """An evaluation after the last step is done."""
        if self._started:
            self._evaluations.append(now - self._at)
        self._at = now

    @property
    def rate(self) -> float:
        """Steps a second; of the only step there is, with all that came before it."""
        recent = self._recent or [(1, self._at - self._began)]
        return sum(n for n, _ in recent) / max(sum(s for _, s in recent), 1e-9)

    @property
    def seconds_left(self) -> float:
        """Until the last step's evaluation is done.

        Without an evaluation so far they count as nothing, see ``complete``.
        """
        mean = sum(self._evaluations) / max(len(self._evaluations), 1)
        return (self._steps - self._done) / self.rate + self._left() * mean

    @property
    def complete(self) -> bool:
        """Whether ``seconds_left`` knows how long an evaluation takes."""
        return bool(self._evaluations) or not self._left()

    def _left(self) -> int:
        """Evaluations that are to come; the last step has one in any case."""
        every = self._every or self._steps or 1
        left = self._steps // every - self._done // every
        return left + bool(self._steps % every and self._done < self._steps)
