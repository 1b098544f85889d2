"""Checks what lies in a wheel and an sdist; exits with what is wrong.

python .ci/contents.py WHEEL SDIST
"""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of both together; the wheel of today has 1 MB.
LARGEST = 5_000_000


def problems(wheel: Path, sdist: Path) -> list[str]:
    """What a release must not lack or hold."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        sources = {x.name.partition("/")[2] for x in archive.getmembers()}
    tops = {n.partition("/")[0] for n in names}
    found = [
        f"the wheel has {top}/, expected the package and its metadata alone"
        for top in tops
        if top != "jaxpapers" and not top.endswith(".dist-info")
    ]
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "jaxpapers").rglob("*.py")}
    configs = {f"jaxpapers/_configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    for name in sorted((modules | configs | {"jaxpapers/py.typed"}) - names):
        found.append(f"the wheel lacks {name}")
    licences = [n for n in names if n.endswith("/licenses/LICENSE")]
    found += [] if licences else ["the wheel lacks the licence"]
    for name in (
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "configs/dion.py",
    ):
        found += [] if name in sources else [f"the sdist lacks {name}"]
    bad = [n for n in names | sources if ".venv" in n or "__pycache__" in n]
    found += [f"not to be published: {n}" for n in sorted(bad)[:5]]
    if wheel.stat().st_size > LARGEST:
        found.append(f"the wheel has {wheel.stat().st_size} bytes, at most {LARGEST}")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(*map(Path, sys.argv[1:]))) or 0)
