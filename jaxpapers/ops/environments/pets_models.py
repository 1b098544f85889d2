"""MuJoCo models of PETS: a cart-pole and two tasks of one seven-jointed arm, as XML.

Lengths, masses, limits and solver settings are those of the model files of
kchua/handful-of-trials 77fd880 (Chua et al., 2018, arXiv 1805.12114); what is only seen
by a renderer is left out. Units are m, kg, rad and s.
"""

import dataclasses
from typing import Any

ARM = ("shoulder_pan", "shoulder_lift", "upper_arm_roll", "elbow_flex", "forearm_roll",
       "wrist_flex", "wrist_roll")  # fmt: skip
"""Joints of the arm, from the shoulder on."""
AXES = ((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 0), (1, 0, 0), (0, 1, 0), (1, 0, 0))
REACH = (0.1, 0.4, 0.321)
"""Distances from pan to lift, from lift to elbow, from elbow to wrist."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """What the two tasks of the arm differ in.

    Attributes:
      base: position of the shoulder.
      ranges: of the seven joints; None: not limited.
      damping: of the seven joints.
      torque: bound of the seven motors.
      forearm: length of the forearm's capsule.
      density: of everything, in kg / m^3.
      friction: sliding friction of contacts.
      integrator: of MuJoCo.
      hand: XML inside the last joint's body.
      world: XML beside the arm, before and after it.
    """

    base: tuple[int | float, ...]
    ranges: tuple[tuple[int | float, ...] | None, ...]
    damping: tuple[float, ...]
    torque: float
    forearm: float
    density: float
    friction: float
    integrator: str
    hand: str
    world: tuple[str, str]


def _attributes(**values: Any) -> str:
    def text(value):
        if isinstance(value, tuple):
            return " ".join(map(str, value))
        return str(value).lower() if isinstance(value, bool) else str(value)

    return " ".join(f'{k}="{text(v)}"' for k, v in values.items())


def _capsule(start: tuple, end: tuple, size: float, **more: Any) -> str:
    fields = _attributes(type="capsule", fromto=(*start, *end), size=size, **more)
    return f"<geom {fields}/>"


def _sphere(at: tuple, size: float, **more: Any) -> str:
    return f"<geom {_attributes(type='sphere', pos=at, size=size, **more)}/>"


def _slide(name: str, axis: tuple, **more: Any) -> str:
    return f"<joint {_attributes(name=name, type='slide', axis=axis, **more)}/>"


def _body(at: tuple, *content: str, name: str = "") -> str:
    named = {"name": name} if name else {}
    return f"<body {_attributes(**named, pos=at)}>{''.join(content)}</body>"


def arm(task: Arm) -> str:
    """XML of an arm and what is around it."""
    joints = []
    for name, axis, limits, damping in zip(ARM, AXES, task.ranges, task.damping):
        limit = {"limited": False} if limits is None else {"range": limits}
        fields = _attributes(
            name=name, type="hinge", axis=axis, damping=damping, **limit
        )
        joints.append(f"<joint {fields}/>")
    across, along = (0, 0.1, 0), (0.1, 0, 0)
    lift, elbow, wrist = ((x, 0, 0) for x in REACH)

    def back(point):
        return tuple(-x for x in point)

    hand = _body((0, 0, 0), joints[6], task.hand)
    hand = _body(wrist, _capsule((0, -0.02, 0), (0, 0.02, 0), 0.01), joints[5], hand)
    forearm = _body((0, 0, 0), _capsule((0, 0, 0), (task.forearm, 0, 0), 0.05), hand)
    forearm = _body((0, 0, 0), _capsule(back(along), along, 0.02), joints[4], forearm)
    upper = _body(
        elbow, _capsule((0, -0.02, 0), (0, 0.02, 0), 0.06), joints[3], forearm
    )
    upper = _body((0, 0, 0), _capsule((0, 0, 0), elbow, 0.06), upper)
    upper = _body((0, 0, 0), _capsule(back(along), along, 0.02), joints[2], upper)
    upper = _body(lift, _capsule(back(across), across, 0.1), joints[1], upper)
    head = [
        _sphere((x, y, 0.2), size)
        for y, size in ((0.05, 0.05), (0.09, 0.03))
        for x in (-0.06, 0.06)
    ]
    trunk = _capsule((0, 0, -0.4), (0, 0, 0.2), 0.1)
    whole = _body(task.base, *head, trunk, joints[0], upper)
    option = _attributes(timestep=0.01, gravity=(0, 0, 0), iterations=20,
                         integrator=task.integrator)  # fmt: skip
    geom = _attributes(friction=(task.friction, 0.1, 0.1), density=task.density,
                       margin=0.002, condim=1, contype=0, conaffinity=0)  # fmt: skip
    motors = "".join(
        f"<motor {_attributes(joint=name, ctrlrange=(-task.torque, task.torque))}/>"
        for name in ARM
    )
    before, after = task.world
    return (
        '<mujoco><compiler inertiafromgeom="true" angle="radian"/>'
        f'<option {option}/><default><joint armature="0.04" damping="1" limited="true"/>'
        f"<geom {geom}/></default><worldbody>{before}{whole}{after}</worldbody>"
        f"<actuator>{motors}</actuator></mujoco>"
    )


def _pusher() -> Arm:
    touching = {"contype": 1, "conaffinity": 1}
    tips = _body((0, 0, 0), _sphere((0.1, -0.1, 0), 0.01), _sphere((0.1, 0.1, 0), 0.01),
                 name="tips_arm")  # fmt: skip
    fork = [
        _capsule((0, -0.1, 0), end, 0.02, **touching)
        for end in ((0, 0.1, 0), (0.1, -0.1, 0))
    ]
    fork.append(_capsule((0, 0.1, 0), (0.1, 0.1, 0), 0.02, **touching))
    table = _attributes(
        type="plane", pos=(0, 0.5, -0.325), size=(1, 1, 0.1), **touching
    )

    def sliding(name, at, *geoms):
        limits = {"range": (-10.3213, 10.3), "damping": 0.5}
        joints = [
            _slide(f"{name}_{letter}", axis, **limits)
            for letter, axis in (("y", (0, 1, 0)), ("x", (1, 0, 0)))
        ]
        return _body(at, *geoms, *joints, name=name)

    light = {"density": 1e-5, "conaffinity": 0}
    cylinder = _attributes(type="cylinder", size=(0.05, 0.05), contype=1, **light)
    disc = _attributes(type="cylinder", size=(0.08, 0.001), contype=0, **light)
    ball = _sphere((0, 0, 0), 0.05, **light)
    thing = sliding("object", (0.45, -0.05, -0.275), ball, f"<geom {cylinder}/>")
    goal = sliding("goal", (0.45, -0.05, -0.323), f"<geom {disc}/>")
    return Arm(
        base=(0, -0.6, 0),
        ranges=((-2.2854, 2.0), (-0.5236, 1.3963), (-1.5, 1.7), (-2.3213, 0),
                (-1.5, 1.5), (-1.094, 0), (-1.5, 1.5)),
        damping=(1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1),
        torque=2.0, forearm=0.291, density=300.0, friction=0.8, integrator="Euler",
        hand=tips + "".join(fork),
        world=(f"<geom {table}/>", thing + goal),
    )  # fmt: skip


def _reacher() -> Arm:
    palm = _capsule((0.05, 0, -0.02), (0.05, 0, 0.02), 0.05)
    fingers = []
    for side in (1, -1):
        tip = _body((0.09137, side * 0.00495, 0),
                    _capsule((0, 0, 0), (0.09137, 0, 0), 0.01))  # fmt: skip
        bone = _capsule((0, 0, 0), (0.09137, side * 0.00495, 0), 0.01)
        fingers.append(_body((0.07691, side * 0.03, 0), bone, tip))
    hand = _capsule((-0.02, 0, 0), (0.02, 0, 0), 0.01)
    free = {"armature": 0, "damping": 0, "limited": False}
    axes = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}
    slides = [
        _slide(f"target_{k}", axis, ref=0.25 if k == "y" else 0, **free)
        for k, axis in axes.items()
    ]
    ball = _sphere((0, 0, 0), 0.035)
    return Arm(
        base=(0, -0.188, 0),
        ranges=((-2.2854, 1.714602), (-0.5236, 1.3963), (-3.9, 0.8), (-2.3213, 0), None,
                (-2.094, 0), None),
        damping=(10.0, 10.0, 0.1, 1.0, 0.1, 0.1, 0.1),
        torque=20.0, forearm=0.321, density=1000.0, friction=0.5, integrator="RK4",
        hand=hand + _body((0, 0, 0), palm, *fingers),
        world=("", _body((0, 0.25, 0), *slides, ball, name="target")),
    )  # fmt: skip


PUSHER, REACHER = _pusher(), _reacher()
"""Pushes a cylinder to a goal; moves its hand to a target."""

CART_POLE = (
    '<mujoco><compiler inertiafromgeom="true"/>'
    '<default><joint damping="1" armature="0"/>'
    '<geom contype="0" conaffinity="0"/></default>'
    '<option gravity="0 0 -9.81" integrator="RK4" timestep="0.02"/>'
    '<worldbody><body><joint name="slider" type="slide" axis="1 0 0" limited="true" '
    'range="-2.5 2.5"/><geom type="capsule" quat="0.707 0 0.707 0" size="0.1 0.1"/>'
    '<body><joint name="hinge" type="hinge" axis="0 1 0"/>'
    '<geom type="capsule" fromto="0 0 0 0.001 0 -0.6" size="0.049"/></body></body>'
    '</worldbody><actuator><motor joint="slider" gear="100" ctrlrange="-3 3"/>'
    "</actuator></mujoco>"
)
"""A pole that hangs from a cart on a rail of 5 m, to be swung up."""
