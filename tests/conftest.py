"""Eight fake devices, strict ranks, a compile cache on disk: before any device use."""

import os
from importlib.metadata import version
from pathlib import Path

# Before SciPy is imported: OpenBLAS threads spin against XLA's and the other workers'.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of the time is the compiler's, for programs that run once: a third with these.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
# XLA ends the process at a flag that it does not know, and later ones lost this one.
EMITTERS_CAN_BE_OFF = version("jaxlib").startswith("0.10.")
if EMITTERS_CAN_BE_OFF:
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.parity import Case, cases  # noqa: E402
from tests.programs import Programs  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# An empty folder here measures a run without a cache.
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
    Path(__file__).parent.parent / ".jax_cache"
)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

REFERENCE = Path(
    os.environ.get("JAXPAPERS_REFERENCE") or Path(__file__).parent / "reference"
)
PROGRAMS = Programs()


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "compiled programs that a test may cost without a programs mark"
    parser.addini("max_programs", help, default="12")
    help = "whether a test with more programs fails or is only listed"
    parser.addini("enforce_programs", help, type="bool", default=True)


# Parity with recorded runs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``@pytest.mark.parity("dion")``: the test's ``case`` runs over that family's index.

    ``only=`` takes some of its entries. See `tests.parity.Case`.
    """
    marker = metafunc.definition.get_closest_marker("parity")
    if marker is None or "case" not in metafunc.fixturenames:
        return
    only = marker.kwargs.get("only", lambda entry: True)
    recorded = cases(REFERENCE / marker.args[0], only)
    names = [name for _, name, _ in recorded]
    metafunc.parametrize("case", recorded, ids=names, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """The recorded run of a parity test."""
    return Case(*request.param)


# Groups of tests that one worker runs, and compiled programs


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker gets a whole file, of the contract the tests of one paper."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item: pytest.Item) -> str:
    group = str(item.path.relative_to(item.config.rootpath))
    if item.path.name != "test_contract.py" or not hasattr(item, "callspec"):
        return group
    return f"{group}:{item.callspec.params.get('case', '')}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    PROGRAMS.owners.append(item.nodeid)
    try:
        return (yield)
    finally:
        PROGRAMS.owners.pop()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef):
    """A fixture of many tests counts for itself, not for the test that comes first."""
    if fixturedef.scope == "function":
        return (yield)
    PROGRAMS.owners.append(f"fixture {fixturedef.argname} ({fixturedef.baseid})")
    try:
        return (yield)
    finally:
        PROGRAMS.owners.pop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Fails a test that passes but costs too many programs or skips parts of a case."""
    result = yield
    recorded = getattr(item, "funcargs", {}).get("case")
    if isinstance(recorded, Case) and recorded.unread():
        left = ", ".join(recorded.unread())
        pytest.fail(f"the test reads nothing of the entry's {left}", pytrace=False)
    marker = item.get_closest_marker("programs")
    limit = marker.args[0] if marker else int(item.config.getini("max_programs"))
    count = PROGRAMS.counts[item.nodeid]
    if count > limit and item.config.getini("enforce_programs"):
        pytest.fail(
            f"{count} programs compiled, expected at most {limit}: "
            "jit the body (tests.programs.together) or mark it programs(n) and say why",
            pytrace=False,
        )
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None):
    """Sends the counts with the report; frees the programs after a group."""
    result = yield
    item.user_properties.append(("programs", dict(PROGRAMS.counts)))
    PROGRAMS.counts.clear()
    if nextitem is None or _group(nextitem) != _group(item):
        jax.clear_caches()
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tests that cost the most programs, and the sum of all."""
    counts: dict[str, int] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                for name, count in dict(report.user_properties)["programs"].items():
                    counts[name] = counts.get(name, 0) + count
    if not counts:
        return
    terminalreporter.section("compiled programs")
    for name in sorted(counts, key=lambda name: -counts[name])[:15]:
        terminalreporter.write_line(f"{counts[name]:5d} {name}")
    terminalreporter.write_line(f"{sum(counts.values()):5d} in all")


# Fixtures


@pytest.fixture
def key() -> jax.Array:
    """``jax.random.key(0)``, without the two programs that it costs."""
    return jax.random.wrap_key_data(np.zeros(2, np.uint32))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that are saved, for a look at their axes."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)),
    )
    return drawn


@pytest.fixture
def users_options() -> dict[str, bool]:
    """Compiler options for a program as users compile it, where the tests' matter."""
    return {"xla_cpu_use_fusion_emitters": True} if EMITTERS_CAN_BE_OFF else {}
