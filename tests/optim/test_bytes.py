"""What optimizers of matrices send beside optax's Muon, as the benchmark counts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
OURS = ("dion 1/4", "dion 1/16", "muon", "normuon", "dion2 1/4")


@pytest.mark.parametrize(
    "topology", ["cpu:16", pytest.param("v5e:4x4", marks=pytest.mark.slow)]
)
def test_a_tenth_of_what_optaxs_muon_sends(topology, request, tmp_path):
    """On 4 x 4 devices, of matrices as in docs/dion.md, each side divided by 32 or 8."""
    if topology != "cpu:16":
        request.getfixturevalue("libtpu")
    shape = "28,64,256" if topology == "cpu:16" else "28,256,1024"
    script, out = ROOT / "benchmarks" / "optimizer_meshes.py", tmp_path / "rows.json"
    command = [
        sys.executable, script, "--topology", topology, "--meshes", "4x4",
        "--shape", shape, "--rows", ";".join(("optax muon", *OURS)), "--out", out,
    ]  # fmt: skip
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["meshes"]["4x4"]
    sent = {label: rows[label]["sent_bytes"] for label in ("optax muon", *OURS)}
    limit = sent.pop("optax muon") / 10
    assert not {label: size for label, size in sent.items() if not 0 < size <= limit}
