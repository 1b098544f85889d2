"""Captioned pictures as a task: what emoji are rewarded, judged and held out for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import run, tasks
from jaxpapers.data import emoji
from jaxpapers.papers import dpok
from jaxpapers.tasks import text_to_image

SMALL = {
    "net.shape": (8, 8, 3), "net.channels": 8, "net.multipliers": (1,),
    "net.attention": (), "net.groups": 4, "net.vocab": 12, "net.value": (8,),
    "sampler.steps": 5, "method.prompts": 14, "method.value_steps": 1,
    "method.policy_steps": 1, "data.batch": 28, "data.length": 2, "data.eval_each": 1,
    "method.lora_rank": 1, "method.transitions": 1,
}  # fmt: skip


def disc(ink, side):
    """A square of one colour in the left or the right half of a white picture."""
    x = np.ones((8, 8, 3), np.float32)
    x[2:6, 4 * side : 4 * side + 3] = ink
    return x


@pytest.fixture
def glyphs(monkeypatch):
    """Two emoji of every ink, and two whose names say no colour or two."""
    inks = text_to_image.INKS
    names = [f"{n} {kind}" for n in inks for kind in ("heart", "ball")]
    image = [disc(ink, i) for ink in inks.values() for i in (0, 1)]
    names += ["ball", "red blue"]
    image += [disc((0, 0, 0), 0), disc((0.5, 0.2, 0.5), 1)]
    found = emoji.Captioned(np.stack(image), tuple(names), np.arange(len(names)))
    monkeypatch.setattr(text_to_image.emoji, "emoji", lambda path: found)
    text_to_image._read.cache_clear()
    yield found
    text_to_image._read.cache_clear()


def config():
    return run.load_config(
        "dpok:emoji", [f"--config.{k}={v}" for k, v in SMALL.items()]
    )


def test_emoji_prompts_rewards_and_judge(glyphs):
    source = text_to_image.read(config())
    assert source.prompts == glyphs.caption[:14]  # Those that say one colour.
    assert source.chance == pytest.approx(1 / 7)
    own = 2 * jnp.asarray(glyphs.image[:14]) - 1
    prompt = np.arange(14)
    assert source.agrees(own, prompt).all() and source.correct(own, prompt).all()
    other = (prompt + 2) % 14  # Another colour, the same kind.
    assert not source.agrees(own, other).any() and not source.correct(own, other).any()
    paid, unpaid = (np.asarray(source.reward(own, p)) for p in (prompt, other))
    np.testing.assert_allclose(paid, 0, atol=0.05)
    assert (unpaid < paid - 0.1).all()
    # All of it in the right colour: the reward is content, the judge sees no emoji...
    flat = np.ones((1, 8, 8, 3)) * (2 * np.array(text_to_image.INKS["blue"]) - 1)
    blue = np.array([source.prompts.index("blue heart")])
    assert source.agrees(flat, blue).all()
    # ... and asks for the colour of the nearest one, which is not the reward's rule.
    red = 2 * disc(text_to_image.INKS["red"], 1)[None] - 1
    red[0, :, 0] = 2 * np.array(text_to_image.INKS["blue"]) - 1
    heart = np.array([source.prompts.index("red heart")])
    assert source.correct(red, heart).all()
    # A tenth is held out, and those prompts are told apart.
    assert len(source.held_out) == 2 and len(source.image) == 14
    assert 0 < source.unseen.sum() <= 2


def test_emoji_are_tuned_and_evaluated(glyphs):
    c = config()
    complete, options = tasks.prepare(c)
    method, mesh = (
        dpok.make(complete, **options),
        meshes.make_mesh({"data": 1}, jax.devices()[:1]),
    )
    task = tasks.load(c, method, mesh)
    batch = task.examples.batch(0, c.data.batch)
    assert set(batch) == {"tokens", "prompt"} and batch["tokens"].shape == (28, 2)
    with jax.set_mesh(mesh):
        state = jax.jit(method.init)(jax.random.key(0), batch)
        state, metrics = jax.jit(method.update)(state, batch)
    assert np.isfinite(float(metrics["reward"])) and float(metrics["reward"]) < 0
    found = task.evaluate(state)
    assert 0 <= found["validation_judge_accuracy"] <= 1
    assert found["validation_path_kl"] == pytest.approx(0, abs=1e-2)
    with pytest.raises(ValueError, match="prompts must be 14"):
        tasks.prepare(run.load_config("dpok:emoji", [
            f"--config.{k}={v}" for k, v in {**SMALL, "method.prompts": 3}.items()
        ]))  # fmt: skip
