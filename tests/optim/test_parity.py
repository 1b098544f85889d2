"""The numbers of microsoft/dion: every recorded run, on one device and on meshes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim import (
    DimensionNumbers,
    DionState,
    dion_state_sharding,
    replica_specs,
    scale_by_dion,
    scale_by_muon,
    sync_for_checkpoint,
)
from jaxpapers.optim.orthonormalize import METHODS

OUT_IN = DimensionNumbers(1, 0)  # The recorded weights are PyTorch's.
# LLVM's optimisations are most of a compile, and not what the meshes are about.
QUICK = {"xla_backend_optimization_level": 0}
MESHES = [
    ((8,), "Auto"),
    ((8,), "Explicit"),
    ((4, 2), "Auto"),
    ((4, 2), "Explicit"),
    ((2, 4), "Auto"),
    ((2, 4), "Explicit"),
]


def is_muon(entry):
    return entry["implementation"] == "muon_reference"


def is_dion(entry):
    return not is_muon(entry)


def has_replicas(entry):
    return is_dion(entry) and len(entry["arrays"]["G"][0]) == 4


def is_small(entry):
    return is_dion(entry) and min(entry["shape"]) <= 16


@pytest.mark.parity("dion", only=is_dion)
@pytest.mark.parametrize("method", METHODS)
def test_one_device(case, method):
    check(case, method)


@pytest.mark.parity("dion", only=is_dion)
@pytest.mark.parametrize("sizes, kind", MESHES)
def test_mesh(case, sizes, kind, make_mesh):
    check(case, "scqr", make_mesh(sizes, kind))


@pytest.mark.parity("dion", only=is_small)
@pytest.mark.parametrize("method", ["cqr2", "rcqr", "qr"])
def test_mesh_other_methods(case, method, make_mesh):
    check(case, method, make_mesh((4, 2)))


@pytest.mark.parity("dion", only=has_replicas)
@pytest.mark.parametrize("others", [(), (2,), (2, 2)])
def test_replicas_with_momenta_of_their_own(case, others):
    """Compressed synchronisation: every replica's M, not only their mean."""
    folder, _, entry = case
    with np.load(folder / entry["file"]) as file:
        data = dict(file)
    sizes = (len(data["G"]), *others)
    mesh = jax.make_mesh(
        sizes,
        ("replica", "data", "model")[: len(sizes)],
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[: math.prod(sizes)],
    )
    x, hyper = data["X0"], entry["hyper"]
    where = best_sharding(mesh, x.shape, but="replica")
    tx = scale_by_dion(
        hyper["rank_fraction"],
        mu=hyper["mu"],
        weight_dimension_numbers=OUT_IN,
        scale=None,
        sharding=where,
        replicate_axis="replica",
    )
    x_tol, m_tol, _ = tolerances(entry, x)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(x, where)}
        state = tx.init(params)
        q0 = jax.device_put(data["Q0"], state.q["w"].sharding)
        state = state._replace(q={"w": q0})
        specs = replica_specs(state, params, "replica")
        update = jax.shard_map(
            lambda g, s: tx.update({"w": g[0]}, s),
            in_specs=(P("replica"), specs),
            out_specs=(P(), specs),
            axis_names={"replica"},
        )
        update = jax.jit(update, compiler_options=QUICK)
        for t in range(data["G"].shape[1]):
            direction, state = update(data["G"][:, t], state)
            keep, rate = factors(
                data["lr"][t], hyper["weight_decay"], x.shape[0] / x.shape[1], x.dtype
            )
            x = keep * x - rate * np.asarray(direction["w"])
            close(x, data["X"][t], x_tol, f"X after step {t}")
            close(state.momentum["w"], data["M"][:, t], m_tol, f"M after step {t}")
        synced = sync_for_checkpoint(state, params).momentum["w"]
        for m in synced:
            close(m, data["M_synced"], m_tol, "synchronised M")


@pytest.mark.parity("dion", only=is_muon)
@pytest.mark.parametrize("sizes", [None, (8,), (4, 2), (2, 4)])
def test_muon(case, sizes, make_mesh):
    """The reference iterates in bfloat16, hence the digest's 5e-3 on X."""
    folder, _, entry = case
    with np.load(folder / entry["file"]) as file:
        data = dict(file)
    x, hyper = data["X0"], entry["hyper"]
    mesh = make_mesh(sizes) if sizes else None
    where = best_sharding(mesh, x.shape)
    tx = scale_by_muon(
        hyper["mu"],
        hyper["nesterov"],
        weight_dimension_numbers=OUT_IN,
        scale=None,
        sharding=where,
    )
    state = tx.init({"w": jax.device_put(x, where)})
    update = jax.jit(tx.update, compiler_options=QUICK if mesh else None)
    for t in range(len(data["G"])):
        direction, state = update({"w": jax.device_put(data["G"][t], where)}, state)
        ratio = x.shape[0] / x.shape[1]
        ratio = ratio if hyper["adjust_lr"] == "spectral_norm" else 1.0
        keep, rate = factors(data["lr"][t], hyper["weight_decay"], ratio, x.dtype)
        x = keep * x - rate * np.asarray(direction["w"])
        np.testing.assert_allclose(x, data["X"][t], atol=5e-3, rtol=0)
        close(state.momentum["w"], data["M"][t], 1e-6, f"M after step {t}")
    # The update is of this size: the comparison is one of it, not of X0.
    moved = np.abs(data["X"][-1] - data["X0"]).max()
    assert np.abs(x - data["X"][-1]).max() < 0.1 * moved


def check(case, method, mesh=None):
    """Replays a case and compares X, M after every step and Q after the last."""
    folder, name, entry = case
    with np.load(folder / entry["file"]) as file:
        data = dict(file)
    double = data["X0"].dtype == np.float64
    with jax.enable_x64(double):
        if mesh is None:
            replay(entry, data, method, None)
        else:
            with jax.set_mesh(mesh):
                replay(entry, data, method, mesh)


def replay(entry, data, method, mesh):
    x0, g, hyper = data["X0"], data["G"], entry["hyper"]
    replicas = g.ndim == 4  # Compressed data-parallel runs: (replica, step, m, n).
    if replicas:
        g = g.mean(0)  # P and R are linear in G: the mean gradient gives the same X.
    m, n = x0.shape
    rounded = single if x0.dtype == np.float64 else float
    # The educational version never transposes.
    side = "output" if entry["implementation"] == "simple" else "longer"
    where = best_sharding(mesh, x0.shape)
    tx = scale_by_dion(
        hyper.get("rank_fraction", entry["rank"] / min(m, n)),
        mu=rounded(hyper["mu"]),
        eps=rounded(hyper.get("eps", 1e-8)),
        power_iters=hyper.get("power_iters", 1),
        orthogonalize=method,
        weight_dimension_numbers=OUT_IN,
        momentum_dtype=entry.get("momentum_dtype"),
        q_dtype=entry.get("Q_dtype"),
        scale=None,
        sharding=where,
        p_side=side,
    )
    state = jax.eval_shape(tx.init, {"w": x0})
    assert state.q["w"].shape == data["Q0"].shape
    state = DionState(
        jnp.zeros((), jnp.int32),
        {"w": jnp.zeros_like(x0, state.momentum["w"].dtype)},
        {"w": jnp.asarray(data["Q0"], state.q["w"].dtype)},
    )
    if mesh is not None:
        placed = dion_state_sharding(
            state, {"w": x0}, {"w": where}, weight_dimension_numbers=OUT_IN, p_side=side
        )
        state = jax.device_put(state, placed)
    update = jax.jit(tx.update, compiler_options=QUICK if mesh else None)
    x_tol, m_tol, q_tol = tolerances(entry, x0)
    x = x0
    for t in range(len(g)):
        direction, state = update({"w": jax.device_put(g[t], where)}, state)
        keep, rate = factors(data["lr"][t], hyper["weight_decay"], m / n, x0.dtype)
        x = keep * x - rate * np.asarray(direction["w"])
        close(x, data["X"][t], x_tol, f"X after step {t}")
        if not replicas:
            close(state.momentum["w"], data["M"][t], m_tol, f"M after step {t}")
    if replicas:
        close(state.momentum["w"], data["M_synced"], m_tol, "synchronised M")
    got, want = (np.asarray(a, np.float64) for a in (state.q["w"], data["Q"][-1]))
    close(got * np.sign((got * want).sum(0)), want, q_tol, "Q after the last step")


def factors(lr, weight_decay, ratio, dtype):
    """1 - lr wd and lr sqrt(m/n); the reference holds its scalars in float32 tensors."""
    if dtype == np.float64:
        keep = np.float32(1) - np.float32(lr) * np.float32(weight_decay)
        return dtype.type(keep), dtype.type(single(single(lr) * math.sqrt(ratio)))
    return dtype.type(1 - lr * weight_decay), dtype.type(lr * math.sqrt(ratio))


def single(x):
    return float(np.float32(x))


def tolerances(entry, x0):
    """Of X, M and Q, relative to max|.|: the digest's."""
    if x0.dtype == np.float64:
        return 1e-12, 1e-12, 1e-12
    if "bfloat16" in (entry.get("momentum_dtype"), entry.get("Q_dtype")):
        return 5e-3, 3e-2, 1e-1
    x_tol, q_tol = 2e-6, 1e-5
    if entry["gradients"] == "decay":
        # Trailing columns are ill-determined: the reference itself is 4e-6 away from a
        # float64 computation of the same steps.
        q_tol = 1e-4
    if x0.shape[0] == x0.shape[1] == entry["rank"]:
        x_tol, q_tol = 1e-5, 1e-3  # The last column is what the others leave over.
    return x_tol, 1e-6, q_tol


def close(got, want, tol, what):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.abs(got - want).max() / (np.abs(want).max() or 1.0)
    assert error <= tol, f"{what}: relative error {error:.1e} > {tol:.0e}"


def best_sharding(mesh, shape, but=None):
    """Shards a (m, n) array over as many devices as divide it, on both sides if equal."""
    if mesh is None:
        return None
    specs = []
    names = [a for a in mesh.axis_names if a != but]
    for sides in itertools.product((0, 1, None), repeat=len(names)):
        spec = [tuple(a for a, s in zip(names, sides) if s == d) for d in (0, 1)]
        parts = [math.prod(mesh.shape[a] for a in axes) for axes in spec]
        if not any(size % part for size, part in zip(shape, parts)):
            specs.append((math.prod(parts), min(parts), P(*(a or None for a in spec))))
    used, _, spec = max(specs, key=lambda s: s[:2])
    divides = any(size % mesh.shape[a] == 0 for size in shape for a in names)
    assert used > 1 or not divides
    return NamedSharding(mesh, spec)
