"""Eight fake devices, strict ranks, a compile cache on disk: before any device use."""

import json
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
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
CACHE = Path(__file__).parent.parent / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

REFERENCE = Path(
    os.environ.get("JAXPAPERS_REFERENCE") or Path(__file__).parent / "reference"
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``@pytest.mark.parity("dion")``: the test's ``case`` runs over that family's index.

    Each case is (folder, name, entry of the index). A family without a folder has none;
    ``only=`` takes some of its entries.
    """
    marker = metafunc.definition.get_closest_marker("parity")
    if marker is None or "case" not in metafunc.fixturenames:
        return
    folder = REFERENCE / marker.args[0]
    index = folder / "index.json"
    listed = json.loads(index.read_text()) if index.exists() else {"cases": {}}
    # Some families list their files, some have the cases at the top of the index.
    if "files" in listed:
        cases = {Path(entry["file"]).stem: entry for entry in listed["files"]}
    else:
        cases = listed.get("cases", listed)
        cases = {name: x for name, x in cases.items() if not name.startswith("_")}
    only = marker.kwargs.get("only", lambda entry: True)
    cases = {name: entry for name, entry in cases.items() if only(entry)}
    metafunc.parametrize(
        "case",
        [(folder, name, entry) for name, entry in cases.items()],
        ids=list(cases),
    )


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


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
