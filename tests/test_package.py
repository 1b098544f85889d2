"""Metadata of the package: links of the README that work on a package index."""

import re
import tomllib
from pathlib import Path

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
