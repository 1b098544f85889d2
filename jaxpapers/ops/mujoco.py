"""MuJoCo as JAX operations: a step is a pure function of the whole physics state.

MuJoCo runs on the host, behind ``ops.host.on_host``. What it integrates from
(``mjSTATE_INTEGRATION``: time, positions, velocities, activations, controls, applied
forces, the solver's warm start) is float64; programs carry its bits as uint32 words, so
that a run which is stopped and continued is bitwise the uninterrupted one, without x64
too. Any number of environments are stepped in one call, inside ``lax.scan`` as well.

``Simulator`` steps a model that is given as XML or a path: rewards and observations are
JAX functions of what a step reads. ``ops.gymnasium`` has whole environments.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxpapers import extras
from jaxpapers.ops.host import on_host, vectorized

LARGEST = 1e10
"""mjMAXVAL: MuJoCo resets a simulation that holds a larger number."""


class Reading(NamedTuple):
    """What a step reads of the simulation, in the program's float type.

    Attributes:
      time: seconds.
      qpos: generalised positions, nq.
      qvel: generalised velocities, nv.
      bodies: positions of the frames of the named bodies, (bodies, 3).
      sites: positions of the named sites, (sites, 3).
    """

    time: Any
    qpos: Any
    qvel: Any
    bodies: Any
    sites: Any


class Simulator:
    """A MuJoCo model as pure functions of its state.

    A state is an array (..., words) of uint32; leading axes are environments, as those
    that ``jax.vmap`` adds: the host is called once for all.

    Args:
      source: XML text, the path of an XML or MJB file, or a ``mujoco.MjModel``, which is
        copied.
      frame_skip: physics steps of a step, with the control held.
      bodies: names of bodies whose positions a step reads.
      sites: names of sites whose positions a step reads.
      before: called with (MjModel, MjData) before each step, after the control is set;
        it may change the data, e.g. clip velocities.
      fresh: whether body and site positions belong to the state after the step. False:
        those that the last physics step computed, from the state before its integration,
        which is what gymnasium's environments read.
      threads: of the host, among which the environments of a call are divided.

    Attributes:
      model: the ``mujoco.MjModel``; not to be changed.
      words: size of a state.
      controls: size of a control, nu.

    Raises:
      ModuleNotFoundError: MuJoCo is not installed; names the extra.
      ValueError: XML that MuJoCo refuses, unknown names, counts below 1.
      FileNotFoundError: no such file.

    Example:
      >>> xml = '''<mujoco><worldbody><body name="ball"><freejoint/>
      ...   <geom size=".1"/></body></worldbody></mujoco>'''
      >>> ball = Simulator(xml, bodies=("ball",), fresh=True)
      >>> state = ball.start(jnp.float32([0, 0, 2, 1, 0, 0, 0]), jnp.zeros(6))
      >>> state, reading = jax.jit(ball.step)(state, jnp.zeros(0))
      >>> bool(reading.bodies[0, 2] < 2), reading.qvel.shape
      (True, (6,))
    """

    def __init__(
        self,
        source: Any,
        *,
        frame_skip: int = 1,
        bodies: Sequence[str] = (),
        sites: Sequence[str] = (),
        before: Callable[[Any, Any], None] | None = None,
        fresh: bool = False,
        threads: int = 1,
    ):
        for name, value in {"frame_skip": frame_skip, "threads": threads}.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        mujoco = module()
        self.model = _model(source)
        self.frame_skip, self.before, self.fresh = frame_skip, before, fresh
        self.bodies = _indices(self.model, mujoco.mjtObj.mjOBJ_BODY, "body", bodies)
        self.sites = _indices(self.model, mujoco.mjtObj.mjOBJ_SITE, "site", sites)
        self.size = state_size(self.model)
        self.words, self.controls = 2 * self.size, self.model.nu
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads) if threads > 1 else None
        # Not thread-local: XLA's threads lose Python's state, and that, after a call.
        self._free: list[Any] = []

    def start(
        self, qpos: Float[Array, "... nq"], qvel: Float[Array, "... nv"]
    ) -> UInt32[Array, "... words"]:
        """States at rest but for positions and velocities, at time 0."""
        sizes = {"qpos": self.model.nq, "qvel": self.model.nv}
        return self._call(self.start_on_host, self._state, sizes, qpos, qvel)

    def start_on_host(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """``start`` of NumPy arrays, whose float64 is kept.

        Raises:
          ValueError: numbers that are not finite or larger than 1e10.
        """
        lead = qpos.shape[:-1]
        positions = qpos.reshape(-1, self.model.nq)
        velocities = qvel.reshape(-1, self.model.nv)
        check_size({"qpos": positions, "qvel": velocities})
        out = np.empty((len(positions), self.size))
        with self._borrowed() as data:
            for q, v, row in zip(positions, velocities, out):
                module().mj_resetData(self.model, data)
                data.qpos[:], data.qvel[:] = q, v
                module().mj_forward(self.model, data)
                read_state(self.model, data, row)
        return to_words(out).reshape(*lead, self.words)

    def step(
        self, state: UInt32[Array, "... words"], control: Float[Array, "... nu"]
    ) -> tuple[UInt32[Array, "... words"], Reading]:
        """States and readings after ``frame_skip`` physics steps under a control.

        Raises:
          ValueError: shapes that do not fit. While running, as JAX's runtime error: a
            control that is not finite, a simulation that became unstable, which MuJoCo
            itself would reset.
        """
        sizes = {"state": self.words, "control": self.controls}
        return self._call(
            self.step_on_host,
            lambda lead: (self._state(lead), self._readings(lead)),
            sizes, state, control,
        )  # fmt: skip

    def read(self, state: UInt32[Array, "... words"]) -> Reading:
        """What a state holds, after the forward computation of positions."""
        sizes = {"state": self.words}
        return self._call(self.read_on_host, self._readings, sizes, state)

    def step_on_host(
        self, state: np.ndarray, control: np.ndarray
    ) -> tuple[np.ndarray, Reading]:
        """``step`` of NumPy arrays; readings are float64."""
        lead = state.shape[:-1]
        n = math.prod(lead)
        old = from_words(state.reshape(n, self.words))
        control = control.reshape(n, self.controls)
        check_size({"the control": control, "the state": old})
        new, bodies, sites = np.empty_like(old), *self._positions(n)

        def part(rows: slice) -> None:
            with self._borrowed() as data:
                count = unstable(data)
                for i in range(*rows.indices(n)):
                    write_state(self.model, data, old[i])
                    if self.controls:
                        data.ctrl[:] = control[i]
                    if self.before is not None:
                        self.before(self.model, data)
                    module().mj_step(self.model, data, nstep=self.frame_skip)
                    read_state(self.model, data, new[i])
                    if self.fresh:
                        module().mj_kinematics(self.model, data)
                    self._fill(data, bodies, sites, i)
                check_stable(data, count, old[rows, 0], new[rows, 0], rows.start)

        if self._executor is None or n < 2:
            part(slice(0, n))
        else:
            each = -(-n // self._threads)
            parts = (slice(i, i + each) for i in range(0, n, each))
            list(self._executor.map(part, parts))
        readings = self._read(new, bodies, sites, lead)
        return to_words(new).reshape(state.shape), readings

    def read_on_host(self, state: np.ndarray) -> Reading:
        """``read`` of NumPy arrays; readings are float64."""
        lead = state.shape[:-1]
        rows = from_words(state.reshape(-1, self.words))
        bodies, sites = self._positions(len(rows))
        with self._borrowed() as data:
            for i, row in enumerate(rows):
                write_state(self.model, data, row)
                module().mj_kinematics(self.model, data)
                self._fill(data, bodies, sites, i)
        return self._read(rows, bodies, sites, lead)

    def _positions(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        return np.empty((n, len(self.bodies), 3)), np.empty((n, len(self.sites), 3))

    def _fill(self, data: Any, bodies: np.ndarray, sites: np.ndarray, i: int) -> None:
        if self.bodies:
            bodies[i] = data.xpos[self.bodies]
        if self.sites:
            sites[i] = data.site_xpos[self.sites]

    def _read(self, rows, bodies, sites, lead) -> Reading:
        """Readings of states: time, qpos and qvel are their first numbers."""
        end = 1 + self.model.nq
        parts = rows[:, 0], rows[:, 1:end], rows[:, end : end + self.model.nv]
        arrays = (*parts, bodies, sites)
        return Reading(*(x.reshape((*lead, *x.shape[1:])) for x in arrays))

    def _readings(self, lead: tuple[int, ...]) -> Reading:
        m = self.model
        shapes = [(), (m.nq,), (m.nv,), (len(self.bodies), 3), (len(self.sites), 3)]
        dtype = jnp.result_type(float)
        return Reading(*(jax.ShapeDtypeStruct((*lead, *s), dtype) for s in shapes))

    def _state(self, lead: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, self.words), jnp.uint32)

    def _call(self, f: Callable, shapes: Callable, sizes: dict[str, int], *args: Any):
        """A host function of arrays with these last axes and equal leading ones."""

        def operation(*arrays):
            return on_host(f, shapes(arrays[0].shape[:-1]))(*arrays)

        arrays = [jnp.asarray(x) for x in args]
        for (name, size), x in zip(sizes.items(), arrays):
            if x.ndim < 1 or x.shape[-1] != size:
                raise ValueError(
                    f"{name} must have a last axis of {size}, got shape {x.shape}"
                )
            if name == "state" and x.dtype != jnp.uint32:
                raise TypeError(f"a state is uint32 words, got {x.dtype}; see start")
        leads = {name: x.shape[:-1] for name, x in zip(sizes, arrays)}
        if len(set(leads.values())) > 1:
            raise ValueError(f"leading axes (environments) must be equal, got {leads}")
        return vectorized(operation)(*arrays)

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[Any]:
        """An MjData that nobody else uses meanwhile."""
        try:
            data = self._free.pop()
        except IndexError:
            data = module().MjData(self.model)
        try:
            yield data
        finally:
            self._free.append(data)


@functools.cache
def module() -> Any:
    """The package mujoco.

    Raises:
      ModuleNotFoundError: it, or the glfw that it imports, is not installed.
    """
    with extras.named():
        import glfw  # noqa: F401
        import mujoco

    return mujoco


def state_size(model: Any) -> int:
    """Float64 numbers of a model's state."""
    mujoco = module()
    return mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION)


def read_state(model: Any, data: Any, out: np.ndarray) -> None:
    """Copies the state of an MjData to a vector."""
    mujoco = module()
    mujoco.mj_getState(model, data, out, mujoco.mjtState.mjSTATE_INTEGRATION)


def write_state(model: Any, data: Any, state: np.ndarray) -> None:
    """Copies a vector to the state of an MjData."""
    mujoco = module()
    mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)


def to_words(values: np.ndarray) -> np.ndarray:
    """Float64 (..., n) as uint32 (..., 2 n).

    Example:
      >>> to_words(np.float64([1.5])).shape, from_words(to_words(np.float64([1.5])))
      ((2,), array([1.5]))
    """
    return np.ascontiguousarray(values, np.float64).view(np.uint32)


def from_words(words: np.ndarray) -> np.ndarray:
    """Float64 (..., n) of uint32 words (..., 2 n)."""
    return np.ascontiguousarray(words, np.uint32).view(np.float64)


def check_size(arrays: dict[str, np.ndarray]) -> None:
    """Refuses numbers at which MuJoCo silently resets or zeroes.

    Raises:
      ValueError: names the array and the environments, rows of the arrays.
    """
    for name, array in arrays.items():
        bad = np.flatnonzero(~(np.abs(array) <= LARGEST).all(1))
        if len(bad):
            raise ValueError(
                f"{name} of environment {bad[:10].tolist()} is not finite or larger than "
                f"{LARGEST:g}: {array[bad[0]]}"
            )


def unstable(data: Any) -> int:
    """How often MuJoCo has called an MjData unstable."""
    return int(data.warning.number[_unstable()].sum())


def check_stable(
    data: Any, before: int, times: np.ndarray, after: np.ndarray, first: int
) -> None:
    """Refuses simulations that ``unstable`` has counted again.

    Args:
      data: MjData that stepped them.
      before: the count of before.
      times: before the step.
      after: times after it; MuJoCo sets those of unstable simulations to 0.
      first: number of the first environment.

    Raises:
      ValueError: names the environments, where their times say which.
    """
    if unstable(data) == before:
        return
    bad = (first + np.flatnonzero(~(after > times))).tolist()
    which = f"environment {bad[:10]}" if bad else "an environment at time 0"
    raise ValueError(
        f"the simulation of {which} became unstable (NaN, infinite or huge positions, "
        "velocities or accelerations); try smaller controls or a smaller time step"
    )


@functools.cache
def _unstable() -> list[int]:
    w = module().mjtWarning
    kinds = (w.mjWARN_BADQPOS, w.mjWARN_BADQVEL, w.mjWARN_BADQACC, w.mjWARN_BADCTRL)
    return [int(kind) for kind in kinds]


def _model(source: Any) -> Any:
    mujoco = module()
    if isinstance(source, mujoco.MjModel):
        return copy.deepcopy(source)
    text = str(source)
    if text.lstrip().startswith("<"):
        return mujoco.MjModel.from_xml_string(text)
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(
            f"no MuJoCo model at {path}; expected XML text, the path of an XML or MJB "
            "file, or an MjModel"
        )
    if path.suffix == ".mjb":
        return mujoco.MjModel.from_binary_path(str(path))
    return mujoco.MjModel.from_xml_path(str(path))


def _indices(model: Any, kind: Any, word: str, names: Sequence[str]) -> list[int]:
    """Indices of named objects."""
    mujoco = module()
    if isinstance(names, str):
        raise TypeError(f"names of a {word} must be a tuple, got the string {names!r}")
    indices = [mujoco.mj_name2id(model, kind, name) for name in names]
    missing = [name for name, i in zip(names, indices) if i < 0]
    if missing:
        count = model.nbody if word == "body" else model.nsite
        known = [mujoco.mj_id2name(model, kind, i) for i in range(count)]
        raise ValueError(f"the model has no {word} {missing}; it has {known}")
    return indices
