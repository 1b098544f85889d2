"""Metadata of the package: links of the README that work on a package index."""

import re
import tomllib
from pathlib import Path

import pytest

from jaxpapers import papers

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINK = re.compile(r"\]\(([^)]+)\)")


def test_links_of_the_readme_are_absolute_in_the_package():
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "".join((ROOT / part["path"]).read_text() for part in hook["fragments"])
    relative = [x for x in LINK.findall(text) if "://" not in x and x[0] != "#"]
    assert relative and all((ROOT / x.partition("#")[0]).exists() for x in relative)
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    base = PROJECT["project"]["urls"]["Repository"] + "/blob/main/"
    links = LINK.findall(text)
    assert all(x.startswith(("https://", "#")) for x in links)
    assert [x.removeprefix(base) for x in links if x.startswith(base)] == relative


def test_metadata_of_the_package():
    project = PROJECT["project"]
    assert project["authors"] and {"Repository", "Changelog"} <= set(project["urls"])
    assert {"version", "readme"} <= set(project["dynamic"])


def test_one_version():
    import jaxpapers

    source = (ROOT / "jaxpapers" / "__init__.py").read_text()
    assert f'__version__ = "{jaxpapers.__version__}"' in source
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "jaxpapers/__init__.py"
    for name in ("pyproject.toml", "CITATION.cff"):
        assert not re.search(r"^version\s*[:=]", (ROOT / name).read_text(), re.M)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_what_the_guides_name_is_there(name):
    text = (ROOT / name).read_text()
    for link in LINK.findall(text):
        assert (ROOT / link).exists(), link
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, target
    for path in re.findall(r"`([\w/]+\.py)`", text):
        assert (
            any(x.match(path) for x in (ROOT / "jaxpapers").rglob("*.py"))
            or (ROOT / path).exists()
        ), path


def test_error_texts_of_the_questions_are_those_of_the_program():
    text = (ROOT / "docs" / "faq.md").read_text()
    headings = re.findall(r"^## `(.+)`$", text, re.M)
    assert len(headings) > 8
    # Messages are split over lines of source.
    sources = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text())
        for path in (ROOT / "jaxpapers").rglob("*.py")
    )
    assert not [x for x in headings if x not in sources]


def test_the_table_of_the_readme_is_that_of_the_list():
    """Every paper's result and cost, which ``jaxpapers list`` shows too."""
    rows = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        found = re.match(
            r"\| \[[^]]+\]\(jaxpapers/papers/(\w+)(/__init__)?\.py\)", line
        )
        if found:
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            rows[found[1]] = (cells[1], *cells[3:])
    listed = {k: (p.field, p.result, p.cost) for k, p in papers.NAMES.items()}
    assert rows == listed
