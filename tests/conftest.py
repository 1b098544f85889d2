"""Eight fake devices, strict ranks, a compile cache on disk: before any device use."""

import gc
import importlib.util
import os
import platform
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
    # Modules of LLVM: splitting costs more than it gains where other tests run beside.
    FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")
    # Devices that wait 60 s for each other end the process, and shared machines stall.
    FLAGS.append("--xla_cpu_collective_call_terminate_timeout_seconds=300")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.parity import Case, cases  # noqa: E402
from tests.programs import ProgramGuard, group  # noqa: E402

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
# Nobody reads the lines of a test's program.
jax.config.update("jax_traceback_in_locations_limit", 0)

REFERENCE = Path(
    os.environ.get("JAXPAPERS_REFERENCE") or Path(__file__).parent / "reference"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "run only this eighth (0 to 7) of the matrix tests"
    parser.addoption("--eighth", type=int, help=help)
    help = "all matrix tests of these files too, separated by commas"
    parser.addoption("--covering", default="", help=help)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    """``--eighth``: a commit runs a part of the matrix, eight in a row run all."""
    eighth = config.getoption("--eighth")
    if eighth is None:
        return
    covering = set(config.getoption("--covering").split(","))

    def chosen(item: pytest.Item) -> bool:
        if item.get_closest_marker("matrix") is None:
            return True
        path = item.nodeid.partition("::")[0]
        return path in covering or zlib.crc32(item.nodeid.encode()) % 8 == eighth

    config.hook.pytest_deselected(items=[x for x in items if not chosen(x)])
    items[:] = filter(chosen, items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Imported modules live to the end: the collector need not visit them each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


def pytest_configure(config: pytest.Config) -> None:
    # As a plugin: hooks of this file do not see the doctests of the package.
    config.pluginmanager.register(ProgramGuard())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadgroup``: a worker gets a whole file, of the contract one case."""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Scheduler(config, log)


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Fails a parity test that passes but skips parts of its entry."""
    result = yield
    recorded = getattr(item, "funcargs", {}).get("case")
    if isinstance(recorded, Case) and recorded.unread():
        left = ", ".join(recorded.unread())
        pytest.fail(f"the test does not use the entry's {left}", pytrace=False)
    return result


@pytest.fixture
def key() -> jax.Array:
    """``jax.random.key(0)``, without the two programs that it costs."""
    return jax.random.wrap_key_data(np.zeros(2, np.uint32))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def sketched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are put together, and rendered only where a test looks at them."""
    if not {"figures", "rendered"} & set(request.fixturenames):
        monkeypatch.setattr("jaxpapers.plots.save", _sketch)


def _sketch(figure: Any, out: str | Path) -> Path:
    Path(out).write_bytes(b"\x89PNG, not rendered")
    return Path(out)


@pytest.fixture
def rendered() -> None:
    """The figures of the test are rendered."""


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
def call(capsys: pytest.CaptureFixture) -> Any:
    """Runs the command line; (exit code, stdout, stderr)."""
    from jaxpapers import cli

    def call(*arguments):
        try:
            code = cli.main([str(x) for x in arguments])
        except SystemExit as e:
            code = e.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def libtpu():
    """Only where libtpu cannot be installed is nothing compiled for a TPU."""
    if importlib.util.find_spec("libtpu") is None:
        linux = platform.system() == "Linux" and platform.machine() == "x86_64"
        assert not linux, "the test extra installs libtpu on Linux x86-64"
        pytest.skip(f"no libtpu for {platform.system()} {platform.machine()}")


@pytest.fixture
def users_options() -> dict[str, bool]:
    """Compiler options for a program as users compile it, where the tests' matter."""
    return {"xla_cpu_use_fusion_emitters": True} if EMITTERS_CAN_BE_OFF else {}
