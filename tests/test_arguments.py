"""What the command line says to mistakes, and its help."""

import subprocess
import sys

import pytest

from jaxpapers import cli, config, extras, papers, plots, report, run, tables
from jaxpapers.config import expected, load_config
from jaxpapers.describe import describe
from jaxpapers.trackers import TRACKERS
from tests.toys.command import CONFIG, register


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("rum dion", "did you mean 'run'?"),
        ("exprot x y", "did you mean 'export'?"),
        ("run dion --quite", "unknown argument '--quite'; did you mean --quiet?"),
        ("run dion --worksdir=x", "did you mean --workdir?"),
        ("eval x --mehs=data:1", "did you mean --mesh?"),
        ("plot x --metrc=loss", "did you mean --metric?"),
        ("run dion --stepz=3", "did you mean --config.train.steps?"),
        ("run dion --optim.lr=3", "did you mean --config.optim.lr?"),
        ("plan dion --batch=3", "did you mean --config.data.batch?"),
        ("run dion --zzz", "unknown argument '--zzz'; see run --help"),
    ],
)
def test_a_mistyped_argument_gets_a_suggestion(call, arguments, message):
    code, _, err = call(*arguments.split())
    assert code == 2 and message in err


def test_a_field_with_spaces_is_no_file(call):
    code, _, err = call("run", "din:smoke", "--config.optim.lrr=(1, 2)")
    assert code == 1 and "Did you mean --config.optim.lr?" in err, err


@pytest.mark.parametrize(
    "target, field, message",
    [
        ("dion:smok", "", "did you mean dion:smoke?"),
        ("dion:160", "", "did you mean dion:160m?"),
        ("doin", "", "did you mean 'din'?"),
        ("dion", "optimizer.lr=1", "Did you mean --config.optim.lr?"),
        ("dion", "lr=1", "Did you mean --config.optim.lr?"),
        ("dion", "net.layrs=1", "Did you mean --config.net.layers?"),
        ("dpok", "pretrain.optimizer.lr=1", "Did you mean --config.pretrain.optim.lr?"),
        ("dion", "data.bach=1", "Did you mean --config.data.batch?"),
        ("dion", "zzz=1", "unknown field --config.zzz. It has data.batch,"),
        ("dion", "optim.lr=-1", "optim.lr must be > 0, got -1.0"),
        ("dion", "optim.lr=0", "optim.lr must be > 0, got 0.0"),
        ("dion", "optim.lr=nan", "optim.lr must be a number, got nan"),
        ("dion", "optim.lr=inf", "optim.lr must be finite, got inf"),
        ("dion", "optim.scalar_lr=-1", "optim.scalar_lr must be >= 0, got -1.0"),
        ("dpok", "pretrain.optim.lr=-1", "pretrain.optim.lr must be > 0"),
        ("dpok", "optim.value_lr=-1", "optim.value_lr must be >= 0"),
        ("dion", "optim.mu=nan", "optim.mu must be a number, got nan"),
        ("dion", "data.batch=0", "data.batch must be >= 1, got 0"),
        ("dpok", "pretrain.batch=0", "pretrain.batch must be >= 1, got 0"),
        ("din", "data.eval_batch=-8", "data.eval_batch must be >= 1, got -8"),
        ("dion", "train.steps=-5", "train.steps must be >= 0, got -5"),
        ("dion", "train.accumulate=0", "train.accumulate must be >= 1, got 0"),
        ("dion", "train.eval_every=-1", "train.eval_every must be >= 0, got -1"),
        ("dion", "train.save_minutes=-1", "train.save_minutes must be >= 0"),
        ("dion", "train.keep=0", "train.keep must be >= 1, got 0"),
        ("dion", "train.seed=-1", "train.seed must be >= 0, got -1"),
        ("dion", "train.seed=9999999999", "train.seed must be <= 4294967295"),
        ("din", "data.max_id=-1", "data.max_id must be >= 0, got -1"),
        ("din", "net.std=inf", "net.std must be finite, got inf"),
        ("din", "net.dice_decay=2", "net.dice_decay must be in"),
        ("dpok", "pretrain.ema=-0.5", "pretrain.ema must be in [0, 1], got -0.5"),
        (
            "dien:smoke",
            "train.alone=maybe",
            "train.alone=maybe: expected True or False",
        ),
    ],
)
def test_fields_and_presets_are_refused_by_name(call, target, field, message):
    fields = [f"--config.{field}"] if field else []
    code, _, err = call("run", target, "--print-config", *fields)
    assert code == 1 and message in err and err.count("\n") == 1


OWN = """
from jaxpapers.config import _load, config_file
def get_config(preset=None):
    c = _load(config_file("din")).get_config("smoke").unlock()
    {}
    return c.lock()
"""


@pytest.mark.parametrize(
    "change, message",
    [
        ("1 / 0", "own.py, line 5: ZeroDivisionError: division by zero"),
        ("return {}", "own.py: get_config must return a ConfigDict, got dict"),
        ("del c.optim", "own.py: field 'optim' is missing; jaxpapers run din --print"),
        ("del c.train.steps", "own.py: field 'steps' is missing"),
        ("del c.net; c.net = 3", "own.py: field 'config.net' must be an object of"),
        (
            "del c.train.steps; c.train.steps = '5'",
            "own.py: field 'config.train.steps' must be of type int, got '5'",
        ),
        ("c.net.f = len", "net.f must be a plain value, got <built-in function len>"),
    ],
)
def test_mistakes_in_ones_own_config(call, tmp_path, change, message):
    own = tmp_path / "own.py"
    own.write_text(OWN.replace("{}", change, 1))
    code, _, err = call("run", "din", "--config", str(own), "--dry-run")
    assert code == 1 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "target",
    ["din", "defer", "score_wasserstein", "poem", "nuclear_norm"],
)
def test_files_for_a_source_that_reads_none(call, target):
    code, _, err = call("run", f"{target}:smoke", "mine.csv", "--dry-run")
    assert code == 1 and err.count("\n") == 1
    assert "config.data.path: 'mine.csv' is not read with config.data.source=" in err


def test_a_run_without_memory_ends_with_one_line(call, monkeypatch):
    def run_out(*args, **kwargs):
        raise MemoryError("Unable to allocate 7.28 TiB")

    monkeypatch.setattr(run, "run", run_out)
    code, _, err = call("run", "din:smoke")
    assert code == 1 and err.count("\n") == 1
    assert "out of memory: Unable to allocate 7.28 TiB; lower config.data.batch" in err


@pytest.mark.parametrize("name", papers.NAMES)
def test_every_field_of_every_paper_is_described(name):
    config = run.load_config(name)
    described = describe(name, config)
    assert len(described) > 15
    assert [f.name for f in described if not f.text] == []
    if papers.NAMES[name].trained:
        assert any(f.choices for f in described)


def test_help_shows_descriptions_and_choices(call):
    code, out, _ = call("run", "din:smoke", "--help")
    lines = [" ".join(x.split()) for x in out.splitlines()]
    assert code == 0
    at = lines.index("--config.net.item_dim int 16")
    assert lines[at + 1] == "Width of an item's embedding."
    at = lines.index("--config.net.pooling str 'attention'")
    assert lines[at + 1].startswith("Of the history, one of attention, mean, sum;")
    at = lines.index("--config.optim.name str 'adam'")
    assert lines[at + 1].startswith("one of adagrad, adam, adamw,")
    at = lines.index("--config.train.keep int 2")
    assert lines[at + 1] == "checkpoints kept"


def test_help_of_ones_own_config(call, tmp_path):
    mine = tmp_path / "my.py"
    mine.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(preset=None):\n"
        "    return ConfigDict({'data': {\n"
        "        'speed': 1,  # in metres a second\n"
        "    }}).lock()\n"
    )
    code, out, _ = call("run", "dion", f"--config={mine}", "--help")
    assert code == 0 and "in metres a second" in out


@pytest.mark.parametrize("module, extra", extras.EXTRAS.items())
def test_a_missing_package_names_its_extra(monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"'jaxpapers\[{extra}\]'"):
        with extras.named():
            __import__(module)
    error = ModuleNotFoundError(f"No module named '{module}'", name=f"{module}.inside")
    assert f"pip install 'jaxpapers[{extra}]'" in cli._text(error)


def test_figures_and_trackers_name_theirs(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    code, _, err = call("plot", tmp_path, "--metric=loss", "-o", tmp_path / "x.png")
    assert code == 1 and "pip install 'jaxpapers[plot]'" in err
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    for name, extra in zip(TRACKERS, ("tb", "wandb", "trackio"), strict=True):
        code, _, err = call("run", "dion:smoke", f"--{name}", f"--workdir={tmp_path}/r")
        assert code == 1 and f"pip install 'jaxpapers[{extra}]'" in err
    assert not (tmp_path / "r").exists()


def test_square_brackets_and_colons_are_text(tmp_path, monkeypatch, capsys):
    """Paths, titles, labels, columns: nothing of them is markup or an emoji."""
    register(monkeypatch.setattr, monkeypatch.setitem)
    monkeypatch.setattr(plots, "plot", lambda *a: None)
    monkeypatch.setitem(
        papers.NAMES, "none", papers.NAMES["none"]._replace(title="A [bold] :fire: one")
    )
    from jaxpapers import tasks

    config = run.load_config("none", (), f"{CONFIG}:none")
    task = tasks.load(config)
    study = task.study

    def named(*args):
        made = study(*args)

        def rows(seed):
            return [
                row._replace(label=f"[red]{row.label}[/]", column=f"[{row.column}]")
                for row in made.rows(seed)
            ]

        return made._replace(title="[x] of y", rows=rows)

    monkeypatch.setattr(task, "study", named)
    workdir = tmp_path / "[plot] :smile:"
    run.run("none", config_path=f"{CONFIG}:none", workdir=str(workdir))
    out = capsys.readouterr().out
    for text in (
        "A [bold] :fire: one",
        "[x] of y",
        "[red]ours[/]",
        "[left]",
        "[plot] :smile:",
    ):
        assert text in out, text


def test_a_cell_is_text():
    table = tables.small_table(
        run.studies.Table("a [b]", ("[c]", "d"), [["[e]", 1.0], ["f[g]", 2]])
    )
    console = report.make_console()
    with console.capture() as capture:
        console.print(table)
    for text in ("a [b]", "[c]", "[e]", "f[g]"):
        assert text in capture.get()


@pytest.mark.parametrize("name", papers.NAMES)
def test_presets_with_an_expected_value_are_presets(name):
    assert isinstance(expected(f"{name}:smoke"), (int, float))
    module = config._load(config.config_file(name))
    assert set(module.EXPECTED) <= set(module.PRESETS)
    assert not load_config(f"{name}:smoke").get("data").get("path", "")


def test_a_reader_that_has_had_enough():
    """As in ``jaxpapers run din --help | head``: no traceback."""
    command = [sys.executable, "-m", "jaxpapers", "run", "din", "--help"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().startswith("usage:")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
