"""The task of domains: sources, records, tables, a sweep that a kill does not change."""

import csv
import json

import jax
import numpy as np
import pytest

from jaxpapers import run, tasks
from jaxpapers.data import backbones, domain_sources, domains, image_files, letters
from jaxpapers.data.images import Split
from jaxpapers.study import Finding, Result, Row
from jaxpapers.tasks import domain_tables
from jaxpapers.tasks import domains as task


def config(*fields):
    return run.load_config("nuclear_norm", [f"--config.{f}" for f in fields])


def test_latent_signs_mislead_in_the_test():
    made = domain_sources.latent(counts=(4000,) * 4, rotated=False)
    for domain, p in zip(made, (0.75, 0.85, 0.95, 0.1)):
        y = 2 * domain.label - 1
        np.testing.assert_array_equal(domain.x[:, :2], np.stack([y, y], 1))
        agree = (domain.x[:, 2:] == y[:, None]).mean(0)
        assert np.abs(agree - p).max() < 0.03
    mixed = domain_sources.latent(counts=(4000,) * 4)
    q = np.linalg.qr(np.random.RandomState(77).normal(size=(14, 14)))[0]
    np.testing.assert_allclose(mixed[0].x @ q, made[0].x, atol=1e-5)


def digits(count=60):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
    return Split(image, np.arange(count, dtype=np.int32) % 10)


def test_turned_and_coloured_digits():
    data = digits()
    turned = domain_sources.rotated(data, size=28)
    assert [d.name for d in turned] == [f"{a} deg" for a in (0, 15, 30, 45, 60, 75)]
    index = domains.deal(60, 6)[2]
    expected = domains.rotate(data.image[index], 30) / 255
    np.testing.assert_allclose(turned[2].x[..., 0], expected, atol=1e-6)
    half = domain_sources.rotated(data, size=14)[2].x[0, :, :, 0]
    pooled = expected[0].reshape(14, 2, 14, 2).mean((1, 3))
    np.testing.assert_allclose(half, pooled, atol=1e-6)
    coloured = domain_sources.coloured(data, size=14)
    assert [d.x.shape for d in coloured] == [(20, 14, 14, 2)] * 3
    assert all(((d.x.max((1, 2)) > 0).sum(1) == 1).all() for d in coloured)
    with pytest.raises(ValueError, match="net.size must be 28 or 14, got 20"):
        domain_sources.coloured(data, size=20)


def tree(folder, classes=("cat", "dog"), names=("b", "a", "c"), size=(9, 6)):
    """Images whose grey level is the class: colour, grey, with alpha, JPEG."""
    pil = pytest.importorskip("PIL.Image")
    for d, name in enumerate(names):
        for k, label in enumerate(classes):
            place = folder / name / label
            place.mkdir(parents=True)
            for i, mode in enumerate(("RGB", "L", "RGBA")[: 2 + d % 2]):
                level = 60 * k + 10
                colour = {
                    "L": level,
                    "RGB": (level,) * 3,
                    "RGBA": (level,) * 3 + (255,),
                }
                pil.new(mode, size, colour[mode]).save(place / f"{i}.png")
            pil.new("L", size, level).save(place / "z.jpg")
            (place / ".hidden.png").write_bytes(b"x")
    return folder


def test_folders_in_the_order_of_their_names(tmp_path):
    made, classes = domain_sources.folders(tree(tmp_path), 8)
    assert [d.name for d in made] == ["a", "b", "c"] and classes == ["cat", "dog"]
    assert [len(d.label) for d in made] == [8, 6, 6]
    for d in made:
        x = d.x[np.arange(len(d.label))]
        assert x.shape == (len(d.label), 8, 8, 3) and x.dtype == np.uint8
        np.testing.assert_allclose(x.mean((1, 2, 3)), 10 + 60 * d.label, atol=1)
    made, _ = domain_sources.folders(tmp_path, 8, ("c", "a"))
    assert [d.name for d in made] == ["a", "c"]
    (tmp_path / domain_sources.DUPLICATES).write_text(
        "a/cat/0.png 1\n\nc/dog/1.png 0\n"
    )
    made, _ = domain_sources.folders(tmp_path, 8)
    assert [len(d.label) for d in made] == [7, 6, 5]
    # Terra Incognita's order in DomainBed is that of the text too.
    locations = tree(tmp_path / "terra", names=("location_38", "location_100"))
    made, _ = domain_sources.folders(locations, 8)
    assert [d.name for d in made] == ["location_100", "location_38"]


def test_folders_that_are_refused(tmp_path):
    root = tree(tmp_path / "x")
    (root / "a" / "dog" / "0.png").write_bytes(b"no image")
    made, _ = domain_sources.folders(root, 8)
    with pytest.raises(ValueError, match=r"a/dog/0.png: broken image"):
        made[0].x[np.arange(8)]
    (root / "b" / "dog" / "notes.txt").write_text("")
    with pytest.warns(UserWarning, match="1 files are no images, e.g. notes.txt"):
        domain_sources.folders(root, 8)
    (root / "b" / "dog" / "notes.txt").unlink()
    (root / "c" / "emu").mkdir()
    with pytest.raises(
        ValueError, match=r"/a: has no class 'emu', which other domains"
    ):
        domain_sources.folders(root, 8)
    (root / "c" / "emu").rmdir()
    for path in (root / "c" / "cat").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="c/cat: no images"):
        domain_sources.folders(root, 8)
    with pytest.raises(ValueError, match=r"at least 2 domains, .* got \['a'\]"):
        domain_sources.folders(root, 8, ("a",))
    with pytest.raises(FileNotFoundError, match="no file"):
        domain_sources.folders(tmp_path / "none", 8)


def test_letters_of_families():
    path = pytest.importorskip("matplotlib").get_data_path() + "/fonts/ttf"
    made = letters.families(path, count=2, size=16)
    assert [d.name for d in made] == list(letters.FAMILIES)
    for d in made:
        assert d.x.shape == (52, 16, 16, 1) and d.x.min() == 0 and d.x.max() > 0.8
        assert (d.x.reshape(52, -1).sum(1) > 5).all()
    again = letters.families(path, count=2, size=16)
    np.testing.assert_array_equal(again[1].x, made[1].x)
    with pytest.raises(ValueError, match="at least 8 pixels, got 4"):
        letters.families(path, size=4)
    with pytest.raises(FileNotFoundError, match="DejaVuSans.ttf"):
        letters.families("/nowhere")


@pytest.mark.parametrize(
    "fields, says",
    [
        (["data.source=mnist"], "config.data.source must be one of"),
        (["data.source=folder"], "folder of domains, each with a folder of images"),
        (["data.rows=('DANN',)"], "data.rows must be of .* got 'DANN'"),
        (["data.selection=best"], "data.selection must be one of"),
        (["data.test=(7,)"], r"domains 0 .. 3 and not all, got \(7,\)"),
        (["data.held_out=1.5"], r"must be in \(0, 1\), got 1.5"),
        (["data.batch=95"], "data.batch=95 must be a multiple of the 3 training"),
        (["net.classes=3"], "net.classes is 3, but latent signs has 2"),
        (["net.inputs=3"], "net.inputs is 3, but latent signs has 14"),
        (["data.folds=(7,)"], r"data.folds must be among the domains 0 .. 3.*\(7,\)"),
        (["data.trials=0"], "data.trials must be >= 1, got 0"),
        (["data.l2=-1"], "data.l2 must be >= 0, got -1"),
        (["data.names=('a',)"], "are folders, but data.source is latent"),
        (
            ["data.backbone=x.safetensors"],
            "a residual network, but net.model is linear",
        ),
    ],
)
def test_configs_that_are_refused(fields, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        c = config(*fields)
        data = tasks.read(c)
        tasks.study("nuclear_norm", c, data, jax.make_mesh((1,), ("data",)))


def test_files_that_are_no_safetensors(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones(2, np.float32)}, path)
    np.testing.assert_array_equal(backbones.arrays(path)["a"], [1, 1])
    path.write_bytes(b"PK\x03\x04 a checkpoint of torch")
    with pytest.raises(
        ValueError, match=r"save_file\(torch.load\('x.pth', weights_only"
    ):
        backbones.arrays(path)


def test_trials_are_drawn_as_in_domainbed():
    c = config("data.trials=3")
    fields = task._fields(c, 1, "ERM-NU", 3, 2)
    base = domains.seed_hash(2, 1)
    lr = np.random.RandomState(domains.seed_hash(base, "lr")).uniform(-4.5, -2.5)
    assert fields["optim.lr"] == 10**lr
    assert 10**-2.5 < fields["method.theta"] < 10**-1.5
    assert task._fields(c, 1, "ERM", 3, 2)["method.theta"] == 0
    assert "method.irm" in task._fields(c, 1, "IRM", 3, 2)
    own = task._fields(c, 1, "ERM-NU", 3, 0)
    assert "optim.lr" not in own
    # A run that is evaluated by itself is measured in its own fold.
    assert own["data.test"] == own["data.folds"] == (3,)


def finding(accuracy, validation, lr):
    numbers = {"accuracy": accuracy, "validation": validation, "hyper_lr": lr}
    return Finding(numbers)


def test_tables_have_standard_errors_and_what_was_chosen(tmp_path):
    def result(label, column, *findings):
        return Result(Row(label, None, lambda: None, column), findings, [])

    results = [
        result("NU", "a", finding(0.5, 0.9, 1.0), finding(0.7, 0.9, 1.0)),
        result("NU, trial 1", "a", finding(0.6, 0.9, 2.0), finding(0.9, 0.95, 3.0)),
        result("NU", "b", finding(0.3, 0.9, 1.0), finding(0.3, 0.9, 1.0)),
    ]
    rows = domain_tables.chosen(results)
    assert [r.trial for r in rows] == [0, 1, 0, 0]
    domain_tables.write_text(results, tmp_path / "x.txt")
    assert (tmp_path / "x.txt").read_text().splitlines()[1:] == [
        "method             a            b          mean",
        "NU      70.0 +- 20.0  30.0 +- 0.0  50.0 +- 10.0",
    ]
    domain_tables.write_csv(results, tmp_path / "x.csv")
    with open(tmp_path / "x.csv") as f:
        lines = list(csv.DictReader(f))
    assert lines[1] == {
        "label": "NU", "fold": "a", "seed": "1", "accuracy": "0.9", "validation": "0.95",
        "trial": "1", "lr": "3.0",
    }  # fmt: skip


def record(*accuracies):
    """A record of three domains whose accuracies are those of every evaluation."""
    values = np.zeros((len(accuracies[0]), 3, 2, 2))
    values[..., 0, 0] = np.transpose(accuracies)
    steps = 10 * np.arange(1, len(values) + 1)
    return Finding({"accuracy": 0.0, "validation": 0.0}, files={
        "record.npz": {"record": values, "steps": steps}
    })  # fmt: skip


def test_domains_left_out_in_turn_choose_a_step(tmp_path):
    c = config("data.loo=True", "data.rows=('ERM',)")
    study = tasks.study(
        "nuclear_norm", c, tasks.read(c), jax.make_mesh((1,), ("data",))
    )
    rows = study.rows(0)
    assert [r.label for r in rows[:4]] == [
        "ERM-NU",
        *(f"ERM-NU without p = {p}" for p in (0.75, 0.85, 0.95)),
    ]
    assert tuple(rows[2].stage.config.data.test) == (3, 1)
    assert "loo.csv" in study.pictures
    nothing = [0.0, 0.0, 0.0]
    findings = {
        "NU": record([0.1, 0.2, 0.3], nothing, nothing),
        "NU without b": record(nothing, [0.5, 0.7, 0.4], nothing),
        "NU without c": record(nothing, nothing, [0.2, 0.6, 0.8]),
    }
    results = [
        Result(Row(label, None, lambda: None), [f], []) for label, f in findings.items()
    ]
    domain_tables.write_loo(["a", "b", "c"], (0,), results, tmp_path / "loo.csv")
    line = (tmp_path / "loo.csv").read_text().splitlines()[1].split(",")
    assert line[:4] == ["NU", "a", "0", "20"]
    np.testing.assert_allclose([float(x) for x in line[4:]], [0.2, 0.65])
    assert [x.label for x in domain_tables.chosen(results)] == ["NU"]


def sweep(workdir):
    fields = [
        "train.steps=6", "data.validate_every=2", "data.trials=2", "data.selection=iid",
        "data.rows=('ERM','SWAD')", "data.folds=(0,3)", "method.valley.n_converge=1",
        "method.warmup=1",
    ]  # fmt: skip
    return run.run(
        "nuclear_norm", [f"--config.{f}" for f in fields], workdir=str(workdir),
        seeds=2, quiet=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_sweep_after_a_kill_gives_the_same_table(tmp_path, monkeypatch):
    """Byte for byte: a kill in the middle, then the same command."""
    sweep(tmp_path / "whole")
    from jaxpapers import train

    fit, calls = train.fit, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(train, "fit", dying)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "killed")
    monkeypatch.setattr(train, "fit", fit)
    sweep(tmp_path / "killed")
    for name in ("domains.csv", "domains.txt"):
        one, other = ((tmp_path / x / name).read_bytes() for x in ("whole", "killed"))
        assert one == other
    content = json.loads((tmp_path / "whole" / "comparison.json").read_text())
    labels = {(r["label"], r["column"]) for r in content["rows"]}
    assert ("SWAD, trial 1", "p = 0.1") in labels and len(labels) == 12
    assert {"hyper_lr", "validation", "oracle"} <= set(content["rows"][0]["numbers"][0])


def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    made, _ = domain_sources.folders(tree(tmp_path), 8)
    calls, read = [], image_files.stretched
    monkeypatch.setattr(
        image_files, "stretched", lambda *a: (calls.append(a), read(*a))[1]
    )
    pictures = domain_sources.Pictures(made[0].x.paths, 8, keep=2 * 3 * 64)
    for _ in range(2):
        pictures[np.arange(3)]
    assert len(calls) == 3 + 1  # The third does not fit.


@pytest.mark.slow
def test_a_folder_from_a_pretrained_net(tmp_path):
    """ResNet-18 of a safetensors file, frozen statistics, on a tree of images."""
    from safetensors.numpy import save_file

    from jaxpapers.checkpoint import restore_params
    from jaxpapers.nets import resnet
    from tests.nets.test_resnet import state_dict

    params, extra, arrays = state_dict(18)
    save_file(
        {k: np.ascontiguousarray(v) for k, v in arrays.items()},
        tmp_path / "x.safetensors",
    )
    tree(tmp_path / "tree", size=(40, 50))
    fields = [
        f"data.backbone={tmp_path / 'x.safetensors'}", "data.batch=8", "net.depth=18",
        "net.size=32", "net.classes=2", "train.steps=2", "data.validate_every=1",
        "data.eval_batch=8", "optim.name=sgd", "optim.lr=1e-9", "train.eval_every=0",
        "data.folds=(1,)", "data.rows=('SWAD-NU',)", "method.valley.n_converge=1",
    ]  # fmt: skip
    result = run.run(
        "nuclear_norm:folder", [f"--config.{f}" for f in fields],
        files=[str(tmp_path / "tree")], workdir=str(tmp_path / "run"), quiet=True,
    )  # fmt: skip
    numbers = {r["label"]: r["numbers"][0] for r in result.content["rows"]}
    assert numbers["SWAD-NU"]["swad_end"] >= 0
    assert 0 <= numbers["ERM-NU"]["accuracy"] <= 1
    shapes = jax.eval_shape(
        lambda: {
            "featurizer": resnet.init(jax.random.key(0), 18),
            "head": {"kernel": np.zeros((512, 2), "f"), "bias": np.zeros(2, "f")},
        }
    )
    trained = restore_params(str(tmp_path / "run"), shapes)["featurizer"]
    np.testing.assert_allclose(trained["conv1"], params["conv1"], atol=1e-6)
    names = (tmp_path / "run" / "domains.txt").read_text().splitlines()
    assert names[1].split() == ["method", "accuracy"]


def test_the_consoles_table_has_standard_errors():
    from jaxpapers.study import Study
    from jaxpapers.tables import comparison

    def result(column, *accuracies):
        findings = [Finding({"accuracy": a}) for a in accuracies]
        return Result(Row("NU", None, lambda: None, column), findings, [])

    study = Study("t", "accuracy", True, lambda seed: [], errors=True)
    table = comparison(study, [result("a", 0.2, 0.4), result("b", 0.5, 0.5)])
    cells = [str(next(iter(c.cells))) for c in table.columns]
    assert cells == ["NU", "0.3000 ± 0.1000", "0.5000 ± 0.0000", "0.4000 ± 0.0500"]
