"""Domains: recorded splits, rotations and colours; batches; refusals."""

import re

import numpy as np
import pytest

from jaxpapers.data import domains


@pytest.mark.parity(
    "ood_dg", only=lambda entry: any(k.startswith("hash_") for k in entry["arrays"])
)
def test_recorded_splits(case):
    read = 0
    for name, expected in case.arrays.items():
        if match := re.fullmatch(r"hash_t(\d+)_e(\d+)", name):
            assert domains.seed_hash(*map(int, match.groups())) == expected
        else:
            trial, domain, count = map(
                int, re.fullmatch(r"out_t(\d+)_e(\d+)_n(\d+)", name).groups()
            )
            inside, out = domains.split(count, trial, domain)
            np.testing.assert_array_equal(out, expected)
            assert sorted([*inside, *out]) == list(range(count))
        read += 1
    assert read == len(case.arrays)


@pytest.mark.parity("ood_dg", only=lambda entry: "rot_bilinear" in entry["arrays"])
def test_recorded_rotations(case):
    a = case.arrays
    for method in domains.RESAMPLE:
        expected = a[f"rot_{method}"]
        count = expected.shape[1]
        for i in range(count):
            turned = domains.rotate(a["images"], 15 * i, method)
            np.testing.assert_array_equal(turned, expected[:, i], f"{method} {15 * i}")


@pytest.mark.parity("ood_dg", only=lambda entry: "u_color_0.1" in entry["arrays"])
def test_recorded_colours(case):
    a = case.arrays
    names = [name.removeprefix("x_") for name in a if name.startswith("x_")]
    for name in names:
        x, y = domains.colour(
            a["images"], a["labels"], a[f"u_label_{name}"], a[f"u_color_{name}"],
            float(name),
        )  # fmt: skip
        np.testing.assert_array_equal(x, a[f"x_{name}"])
        np.testing.assert_array_equal(y, a[f"y_{name}"])
    assert names


def test_rotations_as_pillow_turns():
    pil = pytest.importorskip("PIL.Image")
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 12)).astype(np.uint8)
    for angle in (-30, 90, 133.7, 360):
        for method in domains.RESAMPLE:
            how = getattr(pil.Resampling, method.upper())
            expected = [pil.fromarray(x).rotate(angle, resample=how) for x in images]
            np.testing.assert_array_equal(
                domains.rotate(images, angle, method), np.stack(expected)
            )


def test_domains_are_dealt_like_cards():
    order = np.random.RandomState(0).permutation(11)
    dealt = domains.deal(11, 3)
    assert [len(x) for x in dealt] == [4, 4, 3]
    np.testing.assert_array_equal(dealt[1], order[[1, 4, 7, 10]])


def toy(counts=(6, 4)):
    return [
        domains.Domain(f"d{e}", 100 * e + np.arange(n), np.arange(n, dtype=np.int32))
        for e, n in enumerate(counts)
    ]


def test_batches_have_as_many_of_every_domain():
    batches = domains.Batches(toy(), [np.arange(6), np.arange(1, 4)])
    seen = [batches.batch(i * 6, 6) for i in range(4)]
    for batch in seen:
        assert batch["domain"].tolist() == [0] * 3 + [1] * 3
        np.testing.assert_array_equal(
            batch["x"], 100 * batch["domain"] + batch["label"]
        )
    first = np.concatenate([b["x"][:3] for b in seen])
    assert sorted(first[:6]) == sorted(first[6:]) == list(range(6))
    assert all(sorted(b["x"][3:]) == [101, 102, 103] for b in seen)
    parts = [batches.batch(6, 6, slice(i, i + 2)) for i in (0, 2, 4)]
    for name, whole in seen[1].items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole)


def test_small_domains_repeat_with_a_warning():
    batches = domains.Batches(toy(), [np.arange(6), np.arange(2)])
    with pytest.warns(UserWarning, match=r"3 examples of every domain.*'d1 \(2\)'"):
        batch = batches.batch(0, 6)
    assert set(batch["x"][3:]) == {100, 101}


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: domains.split(10, 0, 0, 1.0), r"must be in \(0, 1\), got 1.0"),
        (lambda: domains.split(10, 0, 0, float("nan")), "got nan"),
        (lambda: domains.split(4, 0, 2), "domain 2 has 4 examples"),
        (lambda: domains.rotate(np.zeros((1, 2, 2), np.uint8), 9, "cubic"), "cubic"),
        (
            lambda: domains.rotate(np.zeros((1, 2, 2)), 9),
            r"uint8 \(n, H, W\), got float",
        ),
        (
            lambda: domains.rotate(np.zeros((1, 2, 2), np.uint8), float("nan")),
            "angle must be finite, got nan",
        ),
        (
            lambda: domains.colour(
                np.zeros((2, 2, 2), np.uint8), *[np.zeros(2)] * 3, 2.0
            ),
            r"in \[0, 1\], got lengths \[2\], 2.0 and 0.25",
        ),
        (lambda: domains.Batches([], []), "no domain to train on"),
        (
            lambda: domains.Batches(toy(), [np.arange(3)] * 2).batch(0, 7),
            "multiple of the 2 training domains, e.g. 8",
        ),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()
