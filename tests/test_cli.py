"""The command line, in this process where it can be."""

import contextlib
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpapers import __version__, checkpoint, cli, run

ROOT = Path(__file__).parent.parent
LINES = "".join(f"def f{i}(x):\n    return x + {i % 7}\n\n\n" for i in range(400))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments of a run of seconds, its text a FILE of the user's own."""
    corpus = tmp_path_factory.mktemp("corpus") / "text.py"
    corpus.write_text(LINES)
    fields = {
        "data.context": 16, "data.batch": 8, "data.eval_batch": 8,
        "net.width": 32, "net.heads": 2, "net.layers": 1, "optim.name": "adamw",
        "train.steps": 20, "train.eval_every": 10, "train.sample": 6,
    }  # fmt: skip
    return [
        "dion:smoke",
        str(corpus),
        *(f"--config.{k}={v}" for k, v in fields.items()),
    ]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run: its workdir and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["run", *tiny, f"--workdir={workdir}"]) == 0
    return SimpleNamespace(workdir=workdir, out=out.getvalue())


def records(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("preset, quick", [(":smoke", True), ("", False)])
def test_smoke_presets_are_compiled_without_optimisations(
    call, monkeypatch, preset, quick
):
    monkeypatch.delenv("XLA_FLAGS")
    assert call("show", "dnw" + preset)[0] == 0
    assert ("optimization_level=0" in os.environ.get("XLA_FLAGS", "")) == quick
    monkeypatch.setenv("XLA_FLAGS", "")  # What the user sets stays.
    assert call("show", "dnw:smoke")[0] == 0 and os.environ["XLA_FLAGS"] == ""


def test_list_show_version(call):
    code, out, _ = call("list")
    assert code == 0 and "dion" in out and "Dion: Distributed" in out
    code, out, _ = call("show", "dion:smoke")
    assert code == 0 and "2504.05295" in out and "embed/embedding" in out
    code, out, _ = call("show", "dion", "--bibtex")
    assert code == 0 and out.startswith("@misc{ahn2025dion") and "2504.05295" in out
    assert call("--version")[1].strip() == __version__
    code, out, _ = call()
    assert code == 0 and "run a paper's study" in out


def test_help_lists_fields_without_a_device(call, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *a: pytest.fail("asked for devices"))
    monkeypatch.setattr(jax, "device_count", lambda *a: pytest.fail("counted devices"))
    code, out, _ = call("run", "dion:smoke", "--help")
    assert code == 0
    lines = [" ".join(x.split()) for x in out.splitlines()]
    assert "--config.net.width int 64" in lines
    assert "--config.optim.name str 'dion'" in lines
    assert "--config.train.save_minutes float 1.0" in lines
    code, out, _ = call("run", "--help")
    assert code == 0 and "--workdir" in out and "with a NAME" in out


def test_print_config_and_typed_override(call):
    code, out, _ = call(
        "run", "dion", "--print-config", "--config.optim.lr=1e-3",
        "--config.net.layers=7", "--config.net.qk_norm=true",
    )  # fmt: skip
    assert code == 0
    fields = {x.strip() for x in out.splitlines()}
    assert {"lr: 0.001", "layers: 7", "qk_norm: true"} <= fields


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "dion", "--config.optim.lrr=1"], "Did you mean"),
        (["run", "dion", "--config.net.layers=many"], "many"),
        (["run", "dion", "--config.net.layers=1.5"], "1.5"),
        (["run", "dyon"], "did you mean 'dion'?"),
        (["show", "dyon"], "did you mean 'dion'?"),
        (["run", "dion:huge"], "unknown preset dion:huge"),
        (["run", "dion", "--config=/nowhere.py"], "no config file"),
        (["run", "dion:smoke", "--mesh=data:3"], "needs 3 devices, got 8"),
        (["run", "dion:smoke", "--mesh=rows:8"], "--mesh: cannot read"),
        (["run", "dion:smoke", "--profile=5"], "expected FIRST:LAST"),
        (["run", "dion:smoke", "/nowhere"], "does not exist"),
        (["run", "dion:smoke", "a.py", "b.py"], "one file or folder expected"),
        (["run", "dion:smoke", "--config.data.task=chess"], "config.data.task"),
        (["eval", "/nowhere"], "holds no run"),
        (["sample", "/nowhere"], "holds no run"),
        (["export", "/nowhere", "x.safetensors"], "holds no run"),
        (["plot", "/nowhere"], "no metrics.jsonl"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_refused(call, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*arguments)
    assert code == 1, err
    assert err.startswith("jaxpapers: ") and message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def broken_ours(*_):
    return np.zeros(3) + np.zeros(2)


def raised(error):
    def function(*_):
        raise error

    return function


@pytest.mark.parametrize(
    "function, error",
    [
        (broken_ours, ValueError),  # Raised by NumPy, out of our code.
        (lambda *_: int("x"), ValueError),
        (raised(KeyError("x")), KeyError),
        (raised(TypeError("x")), TypeError),
        (raised(ZeroDivisionError("x")), ZeroDivisionError),
    ],
)
def test_a_bug_keeps_its_traceback(monkeypatch, function, error):
    monkeypatch.setattr(run, "data", function)
    with pytest.raises(error):
        cli.main(["data", "digits"])


def test_a_refusal_is_one_line(call, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "data", raised(OSError(28, "No space left", "f.txt")))
    assert call("data", "digits")[0::2] == (1, "jaxpapers: f.txt: No space left\n")
    monkeypatch.undo()
    (tmp_path / "my.py").write_text("def get_config(preset)\n")
    code, _, error = call("run", "dion", f"--config={tmp_path / 'my.py'}")
    assert code == 1 and error.startswith(
        f"jaxpapers: config file {tmp_path}/my.py, li"
    )
    (tmp_path / "my.py").write_text(
        "def get_config(preset):\n raise ValueError('no')\n"
    )
    assert call("run", "dion", f"--config={tmp_path / 'my.py'}")[2] == "jaxpapers: no\n"
    # Of the same size within the same second: no bytecode of the old one.
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for word in ("why", "who"):
        text = f"def get_config(preset):\n raise ValueError({word!r})\n"
        (tmp_path / "my.py").write_text(text)
        os.utime(tmp_path / "my.py", (1e9, 1e9))
        error = call("run", "dion", f"--config={tmp_path / 'my.py'}")[2]
        assert error == f"jaxpapers: {word}\n"
    rows = "character,components,frequency\na,b,1\nb,a,1\n"
    (tmp_path / "net.csv").write_text(rows)
    code, _, error = call("run", "dnw", str(tmp_path / "net.csv"),
                          f"--workdir={tmp_path / 'run'}")  # fmt: skip
    assert code == 1 and f"{tmp_path}/net.csv: the network has a cycle: " in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "dion", "--stepz=3"], "unknown argument '--stepz=3'"),
        (["eval", "runs/x", "--config.net.width=3"], "eval takes no config fields"),
        (["eval", "runs/x", "runs/y"], "unknown argument 'runs/y'"),
        (["fly"], "invalid choice"),
    ],
)
def test_unknown_arguments(call, arguments, message):
    code, _, err = call(*arguments)
    assert code == 2 and message in err


@pytest.mark.parametrize("verb", ["run", "train"])
def test_files_stand_before_or_after_the_options(call, verb):
    """The older name of the verb is the same command."""
    for arguments in (
        ["x.py", "--quiet"],
        ["--quiet", "--config.net.layers=3", "x.py"],
    ):
        code, out, _ = call(verb, "dion:smoke", *arguments, "--print-config")
        assert code == 0 and "path: x.py" in out


def test_own_config_file(call, tmp_path):
    mine = tmp_path / "my.py"
    mine.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(preset=None):\n"
        "    return ConfigDict({'data': {'preset': str(preset), 'x': 1}}).lock()\n"
    )
    code, out, _ = call(
        "run", "dion", f"--config={mine}:wide", "--print-config", "--config.data.x=4"
    )
    assert code == 0 and "preset: wide" in out and "x: 4" in out
    mine.write_text("x = 1\n")
    code, _, err = call("run", "dion", f"--config={mine}", "--print-config")
    assert code == 1 and "get_config" in err


@pytest.mark.matrix
@pytest.mark.parametrize(
    "mesh", [None, pytest.param("data:4,model:2", marks=pytest.mark.matrix)]
)
def test_dry_run_writes_nothing(call, tiny, tmp_path, monkeypatch, mesh):
    monkeypatch.chdir(tmp_path)
    options = [f"--mesh={mesh}"] if mesh else []
    code, out, _ = call("run", *tiny, "--dry-run", *options)
    assert code == 0 and not list(tmp_path.iterdir())
    assert "nothing written" in out and "per device: parameters" in out
    assert ("'model': 2" in out) == bool(mesh)
    assert "layers/mlp/down/kernel" in out and "parameters" in out


def test_what_a_run_prints_and_writes(finished):
    for word in ("order0", "gzip", "xz", "this model", "sample", "20/20", "total"):
        assert word in finished.out, word
    workdir = finished.workdir
    assert {p.name for p in workdir.iterdir()} >= {
        "checkpoints", "comparison.json", "config.json", "loss.png", "metrics.jsonl"
    }  # fmt: skip
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["paper"] == "dion" and stored["config"]["net"]["width"] == 32
    lines = records(workdir)
    assert [x["step"] for x in lines if "loss" in x] == [10, 20]
    assert [x["step"] for x in lines if "validation_bits_quick" in x] == [10, 20]
    assert {"validation_bits", "baseline_gzip"} <= set(lines[-1])
    summary = json.loads((workdir / "comparison.json").read_text())
    labels = [row["label"] for row in summary["rows"]]
    assert labels == ["this model", "order0", "gzip", "xz"]
    assert summary["rows"][0]["numbers"] == [{"bits": lines[-1]["validation_bits"]}]


@pytest.mark.matrix
def test_same_command_again_is_left_alone_and_fresh_refuses(call, tiny, finished):
    workdir = finished.workdir
    before = records(workdir)[-1]["validation_bits"]
    code, out, _ = call("run", *tiny, f"--workdir={workdir}")
    assert code == 0 and "continuing from step 20" in out
    assert records(workdir)[-1]["validation_bits"] == before
    code, _, err = call("run", *tiny, f"--workdir={workdir}", "--fresh")
    assert code == 1 and "holds checkpoints" in err


@pytest.mark.matrix
def test_a_run_is_measured_anew_with_another_overlap(call, tiny, finished, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "run")
    before = records(workdir)[-1]["validation_bits"]
    options = [*tiny, f"--workdir={workdir}"]
    code, out, _ = call("run", *options, "--config.data.overlap=0.9")
    assert code == 0 and "continuing from step 20" in out
    assert records(workdir)[-1]["validation_bits"] != before


def test_another_network_is_refused_and_the_run_stays_readable(call, tiny, finished):
    workdir = finished.workdir
    stored = (workdir / "config.json").read_text()
    code, _, err = call("run", *tiny, f"--workdir={workdir}", "--config.net.hidden=64")
    assert code == 1 and "config.net.hidden=0, got 64" in err
    assert (workdir / "config.json").read_text() == stored


def test_eval_sample_plot_export(call, finished, tmp_path):
    workdir = finished.workdir
    code, out, _ = call("eval", workdir)
    bits = records(workdir)[-1]["validation_bits"]
    assert code == 0 and f"{bits:.4f}" in out and "gzip" in out

    texts = [
        call("sample", workdir, "--prompt=def f", "--length=9", f"--seed={seed}")[1]
        for seed in (0, 1)
    ]
    assert texts[0] != texts[1]
    assert all(x.startswith("def f") and 6 < len(x) <= 15 for x in texts)

    code, out, _ = call("plot", workdir, "--metric=loss", "-o", tmp_path / "a.png")
    assert code == 0 and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    code, _, err = call("plot", workdir, "--metric=los", "-o", tmp_path / "b.png")
    assert code == 1 and "has no metric 'los'" in err

    out = tmp_path / "params.safetensors"
    assert call("export", workdir, out)[0] == 0
    exported = load_file(out)
    params = run.load_run(str(workdir))[-1].params
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    assert len(flat) == len(exported)
    for path, leaf in flat:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(exported[name], leaf)
    with checkpoint.open_manager(workdir / "checkpoints", read_only=True) as manager:
        assert checkpoint.read_config(manager)["net"]["width"] == 32


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "jaxpapers", "show", "dion", "--bibtex"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("@misc{ahn2025dion")


@pytest.mark.matrix
def test_fake_devices_and_mesh_and_profile(tiny, tmp_path):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "jaxpapers", "run", *tiny, "--fake-devices=2",
         "--mesh=data:1,model:2", "--profile=1:2", f"--workdir={tmp_path}",
         "--config.train.steps=3", "--config.train.sample=0", "--quiet"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "this model" in done.stdout
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "Traceback" not in done.stderr


def test_data_says_terms_and_where_files_go(call, tmp_path, monkeypatch):
    code, out, _ = call("data")
    assert code == 0 and "ml-100k" in out and "Terms" in out and "cdnow" in out
    monkeypatch.setattr(run, "data", lambda name, cache: tmp_path)
    code, out, _ = call("data", "ml-100k", "--cache", tmp_path)
    assert code == 0 and out.strip().endswith(f"ml-100k: {tmp_path}")
    monkeypatch.undo()
    code, _, err = call("data", "netflix")
    assert code == 1 and "netflix" in err


def test_every_command_is_one_function_of_run():
    actions = {"list": "list_papers", "eval": "evaluate", "train": "run"}
    parser = cli._parser()
    commands = next(a for a in parser._actions if a.dest == "command").choices
    assert set(commands) >= {
        "list", "show", "run", "train", "eval", "sample", "plot", "export", "data", "plan"
    }  # fmt: skip
    for command in commands:
        function = getattr(run, actions.get(command, command))
        assert inspect.getdoc(function), command
