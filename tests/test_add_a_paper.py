"""docs/add_a_paper.md, followed to the letter in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpapers import config, own, papers, tasks

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "add_a_paper.md"
NAMES = "NAMES: dict[str, Paper] = {\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the page's files; they are five, and a script."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("jaxpapers", "configs"):
        shutil.copytree(ROOT / name, root / name,
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    (root / "tests" / "papers").mkdir(parents=True)
    for name in ("conftest.py", "contract.py", "programs.py", "parity.py",
                 "test_contract.py"):  # fmt: skip
        if (ROOT / "tests" / name).exists():
            shutil.copy(ROOT / "tests" / name, root / "tests" / name)
    shutil.copy(ROOT / "pyproject.toml", root)
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == len({path for path, _ in blocks}) == 6
    for path, code in blocks:
        if (root / path).exists():
            text = (root / path).read_text()
            # The toy alone: the other papers' tests are not in the copy.
            head, rest = text.split(NAMES)
            rest = rest[rest.index("\n}\n") + 1 :]
            (root / path).write_text(head + NAMES + code + rest)
        else:
            (root / path).write_text(code)
    return root


def run(copy, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=copy, env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.matrix
def test_the_page_passes_the_contract(copy):
    """On a mesh of fake devices, without a line of the page's code changed."""
    done = run(copy, "pytest", "-q", "-x", "tests", "-m", "not matrix")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 10, done.stdout[-500:]


def test_the_page_is_formatted(copy):
    done = run(copy, "ruff", "check", "configs/toy.py", "jaxpapers/papers/toy.py",
               "jaxpapers/tasks/sums.py", "tests/papers/test_toy.py")  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.matrix
def test_the_page_runs(copy):
    options = ("--seeds=2", "--quiet", "--config.train.alone=False")
    done = run(copy, "jaxpapers", "run", "toy:smoke", *options)
    assert done.returncode == 0, done.stderr
    for label in ("this model", "one hidden unit", "mean"):
        assert label in done.stdout
    assert (copy / "runs" / "toy-smoke" / "comparison.json").exists()
    shown = run(copy, "jaxpapers", "show", "toy:smoke")
    assert shown.returncode == 0 and "A linear model" in shown.stdout


@pytest.fixture
def mine(tmp_path):
    """The page's files as a folder of one's own beside the installed package."""
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(), re.S)
    for path, code in blocks:
        if path.startswith(("jaxpapers/papers/toy", "jaxpapers/tasks", "configs")):
            path = "mine/" + path.removeprefix("jaxpapers/")
        elif path != "my_papers.py":
            continue
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(code)
    return tmp_path


@pytest.mark.matrix
def test_a_paper_outside_the_package(mine):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def call(*arguments):
        return subprocess.run(
            [sys.executable, "my_papers.py", *arguments], cwd=mine, env=environment,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    done = call("run", "toy:smoke", "--quiet")
    assert done.returncode == 0 and "this model" in done.stdout, done.stderr
    done = call("eval", "runs/toy-smoke")
    assert done.returncode == 0 and "this model" in done.stdout, done.stderr
    assert "A linear model" in call("list").stdout
    assert "--config.net.hidden" in call("run", "toy", "--help").stdout


def test_what_cannot_be_added(mine, monkeypatch):
    for module, name in (
        (papers, "__path__"),
        (tasks, "__path__"),
        (config, "FOLDERS"),
    ):
        monkeypatch.setattr(module, name, [*getattr(module, name)])
    monkeypatch.setattr(papers, "NAMES", dict(papers.NAMES))
    row = papers.NAMES["din"]
    folder, other = mine / "mine", mine / "other"
    with pytest.raises(ValueError, match="must be that of a module, got 'a-b'"):
        own.add("a-b", row, folder)
    with pytest.raises(FileNotFoundError, match="no module of the paper 'x': .*x.py"):
        own.add("x", row, folder)
    (folder / "papers" / "x.py").touch()
    with pytest.raises(FileNotFoundError, match="no config of the paper 'x'"):
        own.add("x", row, folder)
    for place in (folder, other):
        for name in ("din", "toy"):
            for part in ("papers", "configs"):
                (place / part).mkdir(parents=True, exist_ok=True)
                (place / part / f"{name}.py").touch()
    for title in ({}, {"title": "another"}):
        with pytest.raises(ValueError, match="there is a paper 'din' already"):
            own.add("din", row._replace(**title), folder)
    own.add("toy", row, folder)
    assert papers.load("toy").__file__ == str(folder / "papers" / "toy.py")
    assert config.load_config("toy:smoke").train.steps == 50
    # Again, as a cell of a notebook may be run; but no other one of that name.
    places = [*papers.__path__], [*tasks.__path__], [*config.FOLDERS]
    own.add("toy", row, folder)
    assert places == ([*papers.__path__], [*tasks.__path__], [*config.FOLDERS])
    for what in ((row._replace(title="another"), folder), (row, other)):
        with pytest.raises(ValueError, match="there is a paper 'toy' already"):
            own.add("toy", *what)
    # Nor of a module that an earlier folder has, which would be the one imported.
    for part in ("papers", "configs"):
        (other / part / "x.py").touch()
    with pytest.raises(ValueError, match="there is a paper 'x' already"):
        own.add("x", row, other)
    (folder / "tasks" / "click.py").touch()
    with pytest.raises(ValueError, match="there is a task 'click' already"):
        own.add("toy", row, folder)
    del sys.modules["jaxpapers.papers.toy"]
