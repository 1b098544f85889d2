"""The numbers of microsoft/dion: every recorded run, on one device and on meshes."""

import itertools
import math
import zlib
from pathlib import Path

import jax
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


# A recorded run sees one of these in the default tests, all meshes in the matrix.
IN_TURN = [None, ((4, 2), "Explicit"), ((2, 4), "Auto")]
# The factorisations beside ``scqr``, each on one of the recorded runs.
OTHERS = {"f64_tall_r4_wd": "qr", "tall_full_rcqr": "rcqr", "f64_wide_r2_decay": "cqr2"}


def is_muon(entry):
    return entry["implementation"] == "muon_reference"


def is_dion(entry):
    return not is_muon(entry)


def has_replicas(entry):
    return is_dion(entry) and "replicas" in entry["hyper"]


def is_small(entry):
    return is_dion(entry) and min(entry["shape"]) <= 16


@pytest.mark.parity("dion", only=is_dion)
def test_recorded_run(case, make_mesh):
    turn = IN_TURN[zlib.crc32(case.name.encode()) % len(IN_TURN)]
    check(case, "scqr", turn and make_mesh(*turn))


@pytest.mark.parity("dion", only=lambda x: Path(x["file"]).stem in OTHERS)
def test_other_methods(case):
    check(case, OTHERS[case.name])


@pytest.mark.matrix
@pytest.mark.parity("dion", only=is_dion)
@pytest.mark.parametrize("method", METHODS)
def test_one_device(case, method):
    check(case, method)


@pytest.mark.matrix
@pytest.mark.parity("dion", only=is_dion)
@pytest.mark.parametrize("sizes, kind", MESHES)
def test_mesh(case, sizes, kind, make_mesh):
    check(case, "scqr", make_mesh(sizes, kind))


@pytest.mark.matrix
@pytest.mark.parity("dion", only=is_small)
@pytest.mark.parametrize("method", ["cqr2", "rcqr", "qr"])
def test_mesh_other_methods(case, method, make_mesh):
    check(case, method, make_mesh((4, 2)))


@pytest.mark.parity("dion", only=has_replicas)
@pytest.mark.parametrize(
    "others",
    [
        pytest.param((), marks=pytest.mark.matrix),
        (2,),
        pytest.param((2, 2), marks=pytest.mark.matrix),
    ],
)
def test_replicas_with_momenta_of_their_own(case, others):
    """Compressed synchronisation: every replica's M, not only their mean."""
    data = case.arrays
    sizes = (case.read("replicas"), *others)
    mesh = jax.make_mesh(
        sizes,
        ("replica", "data", "model")[: len(sizes)],
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[: math.prod(sizes)],
    )
    x = data["X0"]
    where = best_sharding(mesh, x.shape, but="replica")
    tx = transformation(case, "scqr", where, replicate_axis="replica")
    x_tol, m_tol, _ = tolerances(case)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(x, where)}
        state = tx.init(params)
        assert state.q["w"].shape == q_shape(case)
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
        for t, (keep, rate) in enumerate(factors(case)):
            direction, state = update(data["G"][:, t], state)
            x = keep * x - rate * np.asarray(direction["w"])
            close(x, data["X"][t], x_tol, f"X after step {t}")
            close(state.momentum["w"], data["M"][:, t], m_tol, f"M after step {t}")
        synced = sync_for_checkpoint(state, params).momentum["w"]
        for m in synced:
            close(m, data["M_synced"], m_tol, "synchronised M")


@pytest.mark.parity("dion", only=is_muon)
@pytest.mark.parametrize(
    "sizes",
    [None, (4, 2)]
    + [pytest.param(sizes, marks=pytest.mark.matrix) for sizes in ((8,), (2, 4))],
)
def test_muon(case, sizes, make_mesh):
    """The reference iterates in bfloat16, hence the digest's 5e-3 on X."""
    data = case.arrays
    x = data["X0"]
    assert case.read("implementation") == "muon_reference"
    assert {case.read(key) for key in ("dtype", "momentum_dtype", "Q_dtype")} == {
        str(x.dtype)
    }
    mesh = make_mesh(sizes) if sizes else None
    where = best_sharding(mesh, x.shape)
    tx = scale_by_muon(
        case.read("mu"),
        case.read("nesterov"),
        weight_dimension_numbers=OUT_IN,
        scale=None,
        sharding=where,
    )
    spectral = case.read("adjust_lr") == "spectral_norm"
    state = tx.init({"w": jax.device_put(x, where)})
    update = jax.jit(tx.update, compiler_options=QUICK if mesh else None)
    x_tol, m_tol = (
        case.tolerance("X", otherwise=5e-3),
        case.tolerance("M", otherwise=1e-6),
    )
    for t, (keep, rate) in enumerate(factors(case, spectral=spectral)):
        direction, state = update({"w": jax.device_put(data["G"][t], where)}, state)
        x = keep * x - rate * np.asarray(direction["w"])
        np.testing.assert_allclose(x, data["X"][t], atol=x_tol, rtol=0)
        close(state.momentum["w"], data["M"][t], m_tol, f"M after step {t}")
    # The update is of this size: the comparison is one of it, not of X0.
    moved = np.abs(data["X"][-1] - data["X0"]).max()
    assert np.abs(x - data["X"][-1]).max() < 0.1 * moved


def check(case, method, mesh=None):
    """Replays a case and compares X, M after every step and Q after the last."""
    with jax.enable_x64(case.arrays["X0"].dtype == np.float64):
        if mesh is None:
            replay(case, method, None)
        else:
            with jax.set_mesh(mesh):
                replay(case, method, mesh)


def replay(case, method, mesh):
    data = case.arrays
    x, g = data["X0"], data["G"]
    replicas = case.read("replicas", 1)
    if replicas > 1:
        assert len(g) == replicas
        g = g.mean(0)  # P and R are linear in G: the mean gradient gives the same X.
    assert case.read("dtype") == str(x.dtype)
    where = best_sharding(mesh, x.shape)
    tx = transformation(case, method, where)
    state = jax.eval_shape(tx.init, {"w": x})
    assert state.q["w"].shape == data["Q0"].shape == q_shape(case)
    state = DionState(
        np.zeros((), np.int32),
        {"w": np.zeros_like(x, state.momentum["w"].dtype)},
        {"w": np.asarray(data["Q0"], state.q["w"].dtype)},
    )
    if mesh is not None:
        placed = dion_state_sharding(
            state, {"w": x}, {"w": where}, weight_dimension_numbers=OUT_IN,
            p_side=p_side(case),
        )  # fmt: skip
        state = jax.device_put(state, placed)
    update = jax.jit(tx.update, compiler_options=QUICK if mesh else None)
    x_tol, m_tol, q_tol = tolerances(case)
    for t, (keep, rate) in enumerate(factors(case)):
        direction, state = update({"w": jax.device_put(g[t], where)}, state)
        x = keep * x - rate * np.asarray(direction["w"])
        close(x, data["X"][t], x_tol, f"X after step {t}")
        if replicas == 1:
            close(state.momentum["w"], data["M"][t], m_tol, f"M after step {t}")
    if replicas > 1:
        close(state.momentum["w"], data["M_synced"], m_tol, "synchronised M")
    got, want = (np.asarray(a, np.float64) for a in (state.q["w"], data["Q"][-1]))
    close(got * np.sign((got * want).sum(0)), want, q_tol, "Q after the last step")


def transformation(case, method, where, **options):
    """Dion with the case's hyper-parameters; ``qr_method`` is ``method``'s to replace."""
    rounded = single if case.read("dtype") == "float64" else float
    # Of the educational version alone, which states the rank.
    rank, shorter = case.read("rank"), min(case.arrays["X0"].shape)
    assert case.read("qr_method", method) in METHODS
    return scale_by_dion(
        case.read("rank_fraction", rank / shorter),
        case.read("rank_multiple_of", 1),
        mu=rounded(case.read("mu")),
        eps=rounded(case.read("eps", 1e-8)),
        power_iters=case.read("power_iters", 1),
        orthogonalize=method,
        weight_dimension_numbers=OUT_IN,
        momentum_dtype=case.read("momentum_dtype", None),
        q_dtype=case.read("Q_dtype", None),
        scale=None,
        sharding=where,
        p_side=p_side(case),
        **options,
    )


def q_shape(case):
    """P lies on the output side, the recorded weight's rows, unless it is transposed."""
    m, n = case.arrays["X0"].shape
    return (m if case.read("transposed") else n), case.read("rank")


def p_side(case):
    """The educational version never transposes."""
    return "output" if case.read("implementation") == "simple" else "longer"


def factors(case, *, spectral=True):
    """(1 - lr wd, lr sqrt(m/n)) of every step.

    The reference holds its scalars in float32 tensors.
    """
    x = case.arrays["X0"]
    ratio = x.shape[0] / x.shape[1] if spectral else 1.0
    decay, dtype = case.read("weight_decay"), x.dtype
    rates = np.broadcast_to(case.read("lr"), case.arrays["lr"].shape)
    np.testing.assert_allclose(rates, case.arrays["lr"], rtol=1e-6)
    for lr in rates:
        if dtype == np.float64:
            keep = np.float32(1) - np.float32(lr) * np.float32(decay)
            rate = single(single(lr) * math.sqrt(ratio))
        else:
            keep, rate = 1 - lr * decay, lr * math.sqrt(ratio)
        yield dtype.type(keep), dtype.type(rate)


def single(x):
    return float(np.float32(x))


def tolerances(case):
    """Of X, M and Q, relative to max|.|: the entry's, or from its float64 oracle."""
    shape, rank = case.arrays["X0"].shape, case.read("rank")
    x, m, q = (
        case.tolerance(*names, case.read("dtype"), otherwise=otherwise)
        for names, otherwise in (
            (("X",), 2e-6), (("M",), 1e-6), (("Q", "Q_up_to_sign"), 1e-5)
        )
    )  # fmt: skip
    if any(key.startswith("tolerance") for key in case.entry):
        return x, m, q
    if case.read("dtype") == "float64":
        # The oracle does not round the hyper-parameters to float32; the replay does.
        return 1e-12, 1e-12, 1e-12
    if case.read("gradients") == "decay":
        q = max(q, 1e-4)  # Trailing columns are ill-determined in float32.
    if shape[0] == shape[1] == rank:
        x = max(x, 1e-5)  # The last column is what the others leave over.
    return x, m, q


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
