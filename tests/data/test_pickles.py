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
        return self.call[0], self.call[1:]


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
    # A shape that NumPy's own function would allocate before it reads the values.
    content = pickle.dumps(
        Call(np._core.multiarray._reconstruct, np.ndarray, (1 << 40,), b"b")
    )
    read = pickles.load(write(tmp_path, content), allowed=pickles.ARRAYS)
    assert read.nbytes == 0
