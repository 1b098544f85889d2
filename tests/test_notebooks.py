"""The notebooks run as they are; their pages are of the same cells."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))


def cells(text):
    """Code of a notebook's source, cell by cell."""
    found = [x.partition("\n") for x in text.split("# %%")[1:]]
    return [body.strip() for kind, _, body in found if "[markdown]" not in kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda x: x.stem)
def test_page_has_every_cell(path):
    page = path.with_suffix(".md").read_text()
    for code in cells(path.read_text()):
        assert code in page, f"make notebooks NAMES={path.stem}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda x: x.stem)
def test_runs(path, tmp_path):
    pytest.importorskip("equinox")
    code = f"import matplotlib; matplotlib.use('Agg'); exec(open({str(path)!r}).read())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
