"""What tests are held to: programs per test, keys of a recorded case, groups."""

import json
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import programs
from tests.parity import Case, cases
from tests.programs import KEY, ProgramGuard, group, params_like


@pytest.fixture
def guard(monkeypatch):
    monkeypatch.setattr(programs, "ENFORCED", True)
    guard = ProgramGuard()
    yield guard
    jax.monitoring.unregister_event_duration_listener(guard._listen)


def finish(guard, count, marker=None, name="programs"):
    """Ends the call of a test that has cost so many programs."""
    markers = {name: marker}
    item = SimpleNamespace(nodeid="a test", get_closest_marker=markers.get)
    guard.counts["a test"] = count
    call = guard.pytest_runtest_call(item)
    next(call)
    with pytest.raises(StopIteration):
        call.send(None)


def test_programs_from_the_compiler_and_from_disk_count(guard):
    def run():
        jax.jit(lambda x: jnp.tanh(x) * 3)(np.arange(7.0))

    with guard._paid_by("first"):
        run()
    jax.clear_caches()
    with guard._paid_by("second"):
        run()
        with guard._paid_by("fixture"):
            jax.jit(lambda x: jnp.tanh(x) * 5)(np.arange(7.0))
    assert guard.counts == {"first": 1, "second": 1, "fixture": 1}


def test_too_many_programs_fail(guard):
    finish(guard, 12)
    finish(guard, 99, pytest.mark.matrix, "matrix")
    with pytest.raises(pytest.fail.Exception, match="13 programs.*at most 12"):
        finish(guard, 13)
    finish(guard, 30, pytest.mark.programs(30))
    with pytest.raises(pytest.fail.Exception, match="31 programs.*at most 30"):
        finish(guard, 31, pytest.mark.programs(30))


def test_groups():
    assert group("tests/ops/test_sde.py::test_a[x]") == "tests/ops/test_sde.py"
    cases = [
        group(f"tests/test_contract.py::{name}")
        for name in ("test_a[din-4x2]", "test_b[din]", "test_a[dpok tuning-4x2]")
    ]
    assert cases[0] == cases[1] != cases[2]


def test_params_like_draws_what_init_has():
    def init(key):
        kernel = jax.random.normal(key, (64, 64), jnp.bfloat16)
        return {"kernel": kernel, "scale": jnp.ones(100), "count": jnp.zeros((), int)}

    params = params_like(init, KEY)
    assert params["kernel"].dtype == jnp.bfloat16
    assert abs(params["kernel"].astype(float).std() * 8 - 1) < 0.05
    assert params["scale"].min() > 0.5 and params["scale"].std() > 0.2
    assert params["count"] == 0
    again = params_like(init, KEY)
    chex.assert_trees_all_equal(params, again)
    other = params_like(init, KEY, seed=1)
    assert (params["kernel"] != other["kernel"]).any()
    with pytest.raises(TypeError, match="random key"):
        params_like(lambda: {"key": jax.random.key(0)})


def test_a_case_knows_what_was_read(tmp_path):
    entry = {
        "file": "a.npz",
        "arrays": {"x": [[2], "float64"]},
        "what": "for people",
        "hyper": {"mu": 0.9},
        "params": {"kappa": 1.0},
        "heads": 2,
        "tolerance_float32": 1e-5,
        "tolerance_float64": 1e-10,
        "tolerance_tau": 1e-6,
        "max_rel_diff_to_float64_oracle": {"x": 1e-3},
    }
    np.savez(tmp_path / "a.npz", x=np.arange(2.0))
    (tmp_path / "index.json").write_text(json.dumps({"files": [entry]}))
    [recorded] = cases(tmp_path)
    case = Case(*recorded)
    np.testing.assert_array_equal(case.arrays["x"], [0, 1])
    assert case.read("mu") == 0.9 and case.read("alpha", 3) == 3
    with pytest.raises(KeyError, match="no 'alpha'"):
        case.read("alpha")
    assert case.tolerance("tau", "float64") == 1e-6
    assert case.tolerance("x", "float64") == 1e-10
    assert case.unread() == ["heads", "kappa", "max_rel_diff_to_float64_oracle"]
    assert case.tolerance("x") == 4e-3
    case.read("heads"), case.read("kappa")
    assert case.unread() == []
    assert cases(tmp_path, lambda entry: "y" in entry["arrays"]) == []
    assert cases(tmp_path / "absent") == []


@pytest.mark.parametrize("index", [{"cases": {"a": {}}}, {"a": {}, "_meta": {}}])
def test_cases_by_name(tmp_path, index):
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert cases(tmp_path) == [(tmp_path, "a", {})]


def test_no_tolerance(tmp_path):
    case = Case(tmp_path, "a", {})
    assert case.tolerance("x", otherwise=1e-3) == 1e-3
    with pytest.raises(KeyError, match="no tolerance for x"):
        case.tolerance("x")
