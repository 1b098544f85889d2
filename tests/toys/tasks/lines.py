"""A task of the tests: sums of eight numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers.study import (
    Data,
    Finding,
    Row,
    Stage,
    Study,
    Table,
    with_fields,
    with_seed,
)

READ = []  # Configs that were read, for the tests.


class Sums:
    """y = sum of x, example by example, of all or of the chosen ones."""

    def __init__(self, chosen=None):
        self.chosen = chosen

    def batch(self, start, size, rows=slice(None)):
        index = np.arange(start, start + size)[rows]
        if self.chosen is not None:
            index = self.chosen[index % len(self.chosen)]
        x = np.stack([np.random.default_rng(i).normal(size=8) for i in index])
        return {"x": x.astype(np.float32), "y": x.sum(1).astype(np.float32)}


def hardest(state):
    """The examples with the largest errors, of the first 64."""
    rows = Sums().batch(0, 64)
    error = np.abs(rows["x"] @ np.asarray(state.params["w"]) - rows["y"])
    chosen = np.argsort(-error, kind="stable")[:16].astype(np.int32)
    return state._replace(extra={"chosen": jnp.asarray(chosen)})


def abstract(config):
    """Shapes of a batch."""
    n = config.data.batch
    return Data(
        None,
        {
            "x": jax.ShapeDtypeStruct((n, 8), jnp.float32),
            "y": jax.ShapeDtypeStruct((n,), jnp.float32),
        },
        {"size": 8},
    )


def read(config):
    """Sums; the hardest ones where the method mines."""
    READ.append(config)
    data = abstract(config)._replace(examples=Sums(), summary="sums of eight numbers")
    every = config.method.get("mined")
    if not every:
        return data
    return data._replace(
        examples=lambda state: Sums(np.asarray(state.extra["chosen"])),
        refresh=(every, hardest),
    )


def weights(results, out):
    """A picture of the first row's weights, a pixel each."""
    from matplotlib.image import imsave

    imsave(out, results[0].findings[0].files["weights.npz"]["w"][None], vmin=0, vmax=1)


def study(name, config, data, mesh):
    """The model, a twin, another rate, one fold more, two constants."""
    del data, mesh
    test = Sums().batch(1000, 32)

    def measure(method, state):
        error = np.asarray(state.params["w"]) @ test["x"].T - test["y"]
        mse = float(np.square(error).mean())
        table = Table(
            "weights", ("index", "weight"), [[0, float(state.params["w"][0])]]
        )
        curves = {"error against example": (range(32), np.abs(error).tolist())}
        files = {"note.txt": "done"}
        if config.method.get("drawn"):
            files["weights.npz"] = {"w": np.asarray(state.params["w"])}
        return Finding({"mse": mse, "one": 1.0}, [table], curves, files)

    def constant(value):
        return Finding({"mse": float(np.square(test["y"] - value).mean())})

    def rows(seed):
        own = with_seed(config, seed)
        before = None
        if config.method.get("staged"):
            first = with_fields(own, {"train.steps": 3, "method.half": False})
            before = Stage(name, first)
        stage = Stage(name, own, before)
        if config.method.get("parts"):
            first = Stage(name, with_fields(own, {"optim.lr": 0.05}), until=4)
            stage = Stage(name, own, first, continues=True)
        rows = [Row("this model", stage, measure)]
        if config.method.get("others"):
            slow = with_fields(own, {"optim.lr": config.optim.lr / 2})
            rows.append(Row("twin", stage, measure))
            rows.append(Row("slow", Stage(name, slow, before), measure))
        if before:
            rows.append(Row("before", before, measure))
        rows.append(Row("zero", None, lambda: constant(0.0)))
        return [*rows, Row("mean", None, lambda: constant(test["y"].mean()))]

    drawn = {"weights.png": weights} if config.method.get("drawn") else {}
    return Study(
        "mean square error", "mse", False, rows, columns=("one",), pictures=drawn,
        states=tuple(drawn),
    )  # fmt: skip
