"""Compiled programs are what tests cost: one for all values that a test looks at.

An eager ``jax.numpy`` operation on a new shape is a program of its own, 45-70 ms of
the compiler's time. So tests compute inputs and expected values with NumPy and call
what they test inside one jitted function.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
import pytest

# A key without data, for init functions of which only the shapes are wanted.
KEY = jax.eval_shape(lambda: jax.random.key(0))
# Fires for every executable that is compiled or read from the cache on disk.
COMPILED = "/jax/core/compile/backend_compile_duration"
MAX_PROGRAMS = 12
# Counts are those of the oldest JAX. Products in the matrix are counted, not limited.
ENFORCED = version("jaxlib").startswith("0.10.")
UNLIMITED = ("matrix", "slow")


def together(f: Callable, *args: Any) -> Any:
    """``f(*args)`` in one compiled program; the leaves of the result on the host.

    Examples:
        >>> together(lambda x: {"max": x.max(), "sum": x.sum()}, np.arange(3))
        {'max': array(2, dtype=int32), 'sum': array(3, dtype=int32)}
    """
    return jax.device_get(jax.jit(f)(*args))


def params_like(init: Callable, *args: Any, seed: int = 0) -> Any:
    """Parameters of the shapes that ``init(*args)`` has, drawn with NumPy.

    Matrices and kernels are normal with variance 1 / fan-in. Scales and variances lie
    in (0.5, 1.5), other vectors are normal with standard deviation 0.1, so that no term
    of an equation is zero or one. Integers are zero.

    Args:
        init: a function of shapes only: `KEY` serves as its key.
        *args: arrays or `jax.ShapeDtypeStruct`.
        seed: of the NumPy generator.

    Examples:
        >>> init = lambda key: {"kernel": jax.random.normal(key, (3, 2))}
        >>> params_like(init, KEY)["kernel"].shape
        (3, 2)
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"init returns a random key at {jax.tree_util.keystr(path)}"
            )
        if not jax.dtypes.issubdtype(leaf.dtype, np.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        name = jax.tree_util.keystr(path[-1:]) if path else ""
        if len(leaf.shape) > 1:
            fan_in = np.prod(leaf.shape[:-1])
            values = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        elif "scale" in name or "var" in name:
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = 0.1 * rng.normal(size=leaf.shape)
        return np.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, *args))


def group(nodeid: str) -> str:
    """Tests that share programs: those of a file, of the contract those of a case."""
    path, _, name = nodeid.partition("::")
    if not path.endswith("test_contract.py") or "[" not in name:
        return path
    # "din pretrain-4x2": the paper, its stage, another parameter of the test.
    return f"{path}[{re.split('[ -]', name.partition('[')[2].rstrip(']'))[0]}]"


class ProgramGuard:
    """A pytest plugin: counts the programs that each test compiles.

    A test with more than `MAX_PROGRAMS` fails unless ``@pytest.mark.programs(n)`` allows
    them. Fixtures of a wider scope than one test count for themselves.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        # Who pays: at the top of the stack, below it who waits for its result.
        self.owners = ["collection"]
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **kwargs: Any) -> None:
        if event == COMPILED:
            self.counts[self.owners[-1]] += 1

    @contextmanager
    def _paid_by(self, owner: str) -> Iterator[None]:
        self.owners.append(owner)
        try:
            yield
        finally:
            self.owners.pop()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        with self._paid_by(item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef):
        if fixturedef.scope == "function":
            return (yield)
        with self._paid_by(f"fixture {fixturedef.argname} of {fixturedef.baseid}"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item):
        result = yield
        if (text := self.excess(item)) and ENFORCED:
            pytest.fail(
                f"{text}: jit the body (tests.programs.together), or mark it "
                "programs(n) and say why",
                pytrace=False,
            )
        return result

    def excess(self, item: pytest.Item) -> str:
        """What a test costs above its limit; "" if it keeps it."""
        marker = item.get_closest_marker("programs")
        limit = marker.args[0] if marker else MAX_PROGRAMS
        count = self.counts[item.nodeid]
        if count <= limit or any(map(item.get_closest_marker, UNLIMITED)):
            return ""
        return f"{count} programs compiled, expected at most {limit}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None):
        """Sends the counts with the report; frees the programs after a group."""
        result = yield
        item.user_properties.append(("programs", dict(self.counts)))
        item.user_properties.append(("excess", self.excess(item)))
        self.counts.clear()
        if nextitem is None or group(nextitem.nodeid) != group(item.nodeid):
            jax.clear_caches()
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter):
        """The 15 tests that cost the most programs, the sum of all, the excess."""
        counts: Counter[str] = Counter()
        excess = []
        for reports in terminalreporter.stats.values():
            for report in reports:
                if getattr(report, "when", None) == "teardown":
                    properties = dict(report.user_properties)
                    counts.update(properties.get("programs", {}))
                    if text := properties.get("excess"):
                        excess.append(f"{report.nodeid}: {text}")
        if not counts:
            return
        terminalreporter.section("compiled programs")
        for name, count in counts.most_common(15):
            terminalreporter.write_line(f"{count:5d} {name}")
        terminalreporter.write_line(f"{counts.total():5d} in all")
        if not ENFORCED:
            for line in sorted(excess):
                terminalreporter.write_line(line)
