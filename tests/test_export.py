"""Runs as folders for a model hub, which transformers reads where it knows the model."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpapers import run
from jaxpapers.data import weights
from jaxpapers.folder import load_run
from jaxpapers.method import path_name
from jaxpapers.nets.transformer import Transformer
from tests.toys.command import CONFIG, register


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run.run("dion:smoke", ["--config.train.steps=2"], workdir=str(folder), quiet=True)
    return folder


def test_a_decoder(language_model, tmp_path):
    out = run.export(str(language_model), str(tmp_path / "hub"))
    assert sorted(x.name for x in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["jaxpapers"] == "dion"
    model, state = weights.load(out), load_run(str(language_model))[-1]
    jax.tree.map(np.testing.assert_array_equal, model.params, dict(state.params))
    assert (
        model.net["hidden"] == state.params["layers"]["mlp"]["up"]["kernel"].shape[-1]
    )
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "`jaxpapers run dion:smoke --config.train.steps=2`" in card
    assert "PSF" in card and "arXiv 2504.05295" in card and "@" in card
    assert "this model" in card and "gzip" in card
    with pytest.raises(ValueError, match="is there; expected a file such as model"):
        run.export(str(language_model), str(out))


@pytest.mark.slow
def test_transformers_reads_a_decoder(language_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    out = run.export(str(language_model), str(tmp_path / "hub"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    model, tokens = weights.load(out), np.arange(24, dtype=np.int32).reshape(2, 12)
    net, params = (
        Transformer(**model.net),
        jax.tree.map(jax.numpy.asarray, model.params),
    )
    ours = net.apply({"params": params}, jax.numpy.asarray(tokens))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_any_other_model(tmp_path, monkeypatch):
    register(monkeypatch.setattr, monkeypatch.setitem)
    folder = tmp_path / "run"
    run.run("line", config_path=CONFIG, workdir=str(folder), quiet=True, seeds=2)
    out = run.export(str(folder / "seed1"), str(tmp_path / "hub"))
    state = load_run(str(folder / "seed1"))[-1]
    flat = jax.tree_util.tree_flatten_with_path(state.params)[0]
    found = load_file(out / "model.safetensors")
    assert set(found) == {path_name(k) for k, _ in flat}
    config = json.loads((out / "config.json").read_text())
    assert config["paper"] == "line" and config["config"]["train"]["seed"] == 1
    card = (out / "README.md").read_text()
    assert "library_name: jaxpapers" in card and "--seeds=2" in card
    assert "Terms of the data: not known" in card
    with pytest.raises(FileNotFoundError, match="no folder"):
        run.export(str(folder / "seed1"), str(tmp_path / "none" / "hub"))
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(ValueError, match="is a folder, expected a file"):
        run.export(str(folder / "seed1"), str(tmp_path / "x.safetensors"))
