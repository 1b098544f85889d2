"""Pickles: plain data comes back, nothing is called, sizes are bounded by the file."""

import pickle

import numpy as np
import pytest

from jaxpapers.data import pickles


def write(tmp_path, content):
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(5))
def test_plain_data_and_arrays(tmp_path, protocol):
    plain = {"照": [["昭", "灬"], []], "n": (1, 2.5, None, True, b"\xff" * 300)}
    if protocol >= 3:  # Older ones spell bytes as a call of a codec.
        assert pickles.load(write(tmp_path, pickle.dumps(plain, protocol))) == plain
    arrays = {"x": np.arange(6, dtype=np.uint8).reshape(2, 3), "y": np.float32([0.5])}
    path = write(tmp_path, pickle.dumps(arrays | plain, protocol))
    read = pickles.load(path, allowed=pickles.ARRAYS)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype
    assert read["n"] == plain["n"] and read["照"] == plain["照"]


class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        state = getattr(self, "state", None)
        return (self.call[0], self.call[1:], *([] if state is None else [state]))


@pytest.mark.parametrize(
    "content, message",
    [
        (pickle.dumps(Call(print, "called")), "print, which is not allowed"),
        (pickle.dumps(Call(np.ndarray, (1 << 40,))), "not allowed to be called"),
        (pickle.dumps(np.array([None])), "arrays of object are not allowed"),
        (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0hex\x86R.", "codec 'hex'"),
        (b"r\xff\xff\xff\x7f.", "memo slot 2147483647"),  # 16 GB of slots.
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f.", "x.pkl: not a pickle"),
        (b"", "x.pkl: not a pickle"),
        (b"nonsense", "x.pkl: not a pickle"),
        (pickle.dumps(list("abc"))[:-4], "x.pkl: not a pickle"),
    ],
)
def test_refused(tmp_path, capsys, content, message):
    with pytest.raises(ValueError, match=message):
        pickles.load(write(tmp_path, content), allowed=pickles.ARRAYS)
    assert not capsys.readouterr().out


def test_arrays_and_large_files_only_where_allowed(tmp_path):
    path = write(tmp_path, pickle.dumps(np.arange(3)))
    with pytest.raises(ValueError, match="_reconstruct, which is not allowed"):
        pickles.load(path)
    with pytest.raises(ValueError, match="bytes, more than the 10 allowed"):
        pickles.load(path, allowed=pickles.ARRAYS, max_bytes=10)


def test_an_array_has_the_bytes_of_its_shape(tmp_path):
    """Whatever a file claims, no array is made before its bytes are counted."""
    rebuild, dtype = np._core.multiarray._reconstruct, np.dtype
    whole = [1, (2, 3), Call(dtype, "u1", False, True), False, b"abcdef"]
    for i, wrong, message in [
        (None, None, None),
        (1, (1 << 40,), "6 bytes for an array of shape .1099511627776,"),
        (1, (-1, -6), "without shape, dtype and bytes"),
        (1, 6, "without shape, dtype and bytes"),
        (2, Call(dtype, "u1,u1"), "arrays of u1,u1 are not allowed"),
        (2, Call(dtype, "V8"), "arrays of V8 are not allowed, of uint8, int32"),
        (2, Call(dtype, "<<u1"), "arrays of <<u1 are not allowed"),
        (2, "u1", "without shape, dtype and bytes"),
        (4, [b"a"], "without shape, dtype and bytes"),
    ]:
        state = [*whole]
        if i is not None:
            state[i] = wrong
        array = Call(rebuild, np.ndarray, (0,), b"b")
        array.state = tuple(state)
        path = write(tmp_path, pickle.dumps(array, 2))
        if message is None:
            read = pickles.load(path, allowed=("uint8",))
            assert read.tolist() == [[97, 98, 99], [100, 101, 102]]
            continue
        with pytest.raises(ValueError, match=message):
            pickles.load(path, allowed=pickles.ARRAYS)


def with_state(function, state):
    call = Call(
        function, *(("u1", False, True) if function is np.dtype else ("x", "y"))
    )
    call.state = state
    return pickle.dumps(call, 2)


@pytest.mark.parametrize(
    "content, message",
    [
        # Fields of a dtype reach raw pointers through an array of it.
        (
            with_state(np.dtype, (3, "|", None, ("a",), {"a": 1}, 1 << 40, 1, 16)),
            "a dtype with fields",
        ),
        (with_state(np.dtype, {"kind": 1}), "a dtype with fields"),
        (b"\x80\x02cnumpy\ndtype\n}X\x01\0\0\0aK\x01sb.", "state of _Name is not"),
        (b"\x80\x02cnumpy\ndtype\n.", "a function or a dtype instead of a v"),
        (b"]cnumpy\ndtype\na.", "a function or a dtype instead of a v"),
        (b"\x80\x02]\x85K\x01\x86.", None),
        (b"}(]K\x01u.", "a key of a dict is list"),
        (b"}((K\x01tK\x01u.", "a key of a dict is tuple"),
        (b"\x80\x04\x8f.", "the instruction EMPTY_SET is not allowed"),
        (b"\x80\x02cnumpy\ndtype\n)\x81.", "the instruction NEWOBJ is not allowed"),
        (b"(inumpy\ndtype\n.", "the instruction INST is not allowed"),
        (b"Pid\n.", "the instruction PERSID is not allowed"),
        (b"\x80\x02\x82\x01.", "the instruction EXT1 is not allowed"),
        (b"\xfe.", "unknown instruction"),
        (b"p-1\n.", "memo slot -1"),
        (b"]g7\n.", "without its values .*7"),
    ],
)
def test_instructions(tmp_path, content, message):
    path = write(tmp_path, content)
    if message is None:
        assert pickles.load(path) == (([],), 1)
        return
    with pytest.raises(ValueError, match=f"x.pkl: not a pickle of plain .*{message}"):
        pickles.load(path, allowed=pickles.ARRAYS)


def test_strings_of_python_2(tmp_path):
    path = write(tmp_path, b"(dp0\nS'caf\\xc3\\xa9\\n'\np1\nI5\nsS\"it's\"\nL3L\ns.")
    assert pickles.load(path, encoding="utf-8") == {"caf\xe9\n": 5, "it's": 3}
    assert pickles.load(path, encoding="bytes") == {b"caf\xc3\xa9\n": 5, b"it's": 3}
    with pytest.raises(ValueError, match="'ascii' codec can't decode"):
        pickles.load(path)


def test_arrays_of_protocol_5_and_other_orders(tmp_path):
    arrays = {
        "big": np.arange(6, dtype=">i4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "none": np.zeros((0, 3), np.uint8),
    }
    for protocol in (2, 5):
        read = pickles.load(
            write(tmp_path, pickle.dumps(arrays, protocol)), allowed=pickles.ARRAYS
        )
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[name], array)
            assert read[name].flags.writeable and read[name].shape == array.shape


def test_steps_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_STEPS", 10)
    with pytest.raises(ValueError, match="more than 10 instructions"):
        pickles.load(write(tmp_path, b"(" + b"]" * 100 + b"l."))
