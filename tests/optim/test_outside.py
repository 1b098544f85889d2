"""Code that is not ours beside ours: optax's own tests, and microsoft/dion step by step.

Neither is copied. optax's tests are those of the installed package, or of a checkout:

    git clone https://github.com/google-deepmind/optax
    JAXPAPERS_OPTAX=optax make test-slow TESTS=tests/optim/test_outside.py

and microsoft/dion needs PyTorch and a checkout, named by JAXPAPERS_MICROSOFT_DION.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxpapers.optim import DimensionNumbers, dion

ROOT = Path(__file__).parent.parent.parent
NAMES = ("dion", "dion_residual", "muon", "normuon", "dion2")


def run(command, *folders):
    """Standard output of a process that finds packages in ``folders`` first."""
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


# Tests of an optimizer: 16 in optax 0.2.8; a stack as matrices, and all of it to AdamW.
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "file, least", [("_common_test.py", 16), ("_sharding_test.py", 2)]
)
def test_optaxs_tests_of_contributed_optimizers(file, least, name):
    checkout = os.environ.get("JAXPAPERS_OPTAX")
    folder = Path(checkout, "optax") if checkout else Path(optax.__file__).parent
    path = folder / "contrib" / file
    if not path.is_file() and not checkout:
        pytest.skip(
            f"optax {optax.__version__} comes without {file}: set JAXPAPERS_OPTAX to a "
            "checkout of google-deepmind/optax"
        )
    script = ROOT / "tests" / "optim" / "optax_tests.py"
    folders = [Path(checkout).resolve()] if checkout else []
    out = run([script, path.resolve(), name], *folders)
    ran, skipped = map(int, out.splitlines()[-1].split())
    assert ran >= least and not skipped


REFERENCE = """
import sys
import numpy as np, torch
from dion import Dion

torch.manual_seed(0)
m, n, steps = map(int, sys.argv[2:])
weight = torch.nn.Parameter(torch.randn(m, n) / n**0.5)
optimizer = Dion([weight], lr=0.1, rank_fraction=0.25)
record = {"x0": weight.detach().numpy().copy(), "g": torch.randn(steps, m, n).numpy()}
draw = torch.randn
def first_draw(*args, **kwargs):
    record["q0"] = draw(*args, **kwargs)
    torch.randn = draw
    return record["q0"].clone()
torch.randn = first_draw
xs = []
for g in record["g"]:
    weight.grad = torch.from_numpy(g)
    optimizer.step()
    xs.append(weight.detach().numpy().copy())
np.savez(sys.argv[1], xs=xs, **record)
"""


@pytest.mark.slow
@pytest.mark.parametrize("m, n", [(80, 336), (300, 130), (192, 192)])
def test_microsoft_dion_over_20_steps(m, n, tmp_path):
    """Weights stay within 1e-6 of the largest, some 8 float32 roundings."""
    checkout = os.environ.get("JAXPAPERS_MICROSOFT_DION")
    if not checkout or importlib.util.find_spec("torch") is None:
        pytest.skip(
            "needs PyTorch, and JAXPAPERS_MICROSOFT_DION set to a checkout of "
            "microsoft/dion; tests/reference/dion has shorter recorded runs of it"
        )
    out = tmp_path / "run.npz"
    run(["-c", REFERENCE, out, m, n, 20], Path(checkout).resolve())
    data = np.load(out)
    tx = dion(
        0.1,
        0.25,
        weight_dimension_numbers=DimensionNumbers(1, 0),
        labels=lambda params: {"w": "dion"},
    )
    state = jax.jit(tx.init)({"w": data["x0"]})
    state = optax.tree.set(state, q={"w": data["q0"]})

    @jax.jit
    def step(x, g, state):
        updates, state = tx.update({"w": g}, state, {"w": x})
        return optax.apply_updates({"w": x}, updates)["w"], state

    x = data["x0"]
    for g, theirs in zip(data["g"], data["xs"]):
        x, state = step(x, g, state)
        assert np.abs(x - theirs).max() <= 1e-6 * np.abs(theirs).max()
    assert np.abs(x - data["x0"]).max() > 0.1 * np.abs(x).max()
