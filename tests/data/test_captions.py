"""Captions: tokens there and back, which are wrong and how often, files of prompts."""

import json

import numpy as np
import pytest

from jaxpapers.data import captions

WORDS = captions.Vocabulary(("red", "green", "x-ray", "seven"))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a green seven", [2, 4]),
        ("  A GREEN, seven. ", [2, 4]),
        ("the x-ray", [3]),
        ("seven seven", [4, 4]),
    ],
)
def test_encode(text, tokens):
    encoded = WORDS.encode(text)
    assert encoded.tolist() == tokens and encoded.dtype == np.int32
    assert WORDS.encode(text, 3).tolist() == (tokens + [0, 0])[:3]
    assert WORDS.encode(WORDS.decode(encoded)).tolist() == tokens


def test_encode_all_fills_with_the_null_token():
    encoded = WORDS.encode_all(("red", "a red seven"))
    assert encoded.tolist() == [[1, 0], [1, 4]] and encoded.dtype == np.int32
    assert WORDS.encode_all(("red",), 3).tolist() == [[1, 0, 0]]
    assert WORDS.decode(encoded[0]) == "red" and WORDS.decode([0]) == ""


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        ("a gren seven", None, "unknown word 'gren' in 'a gren seven'; nearest: green"),
        ("zzz", None, "nearest: red, green, x-ray, seven"),
        ("", None, "must have a word of the vocabulary, got ''"),
        ("a ?", None, "must have a word of the vocabulary"),
        ("red seven", 1, "has 2 words, more than 1"),
    ],
)
def test_encode_refuses(text, length, message):
    with pytest.raises(ValueError, match=message):
        WORDS.encode(text, length)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "at least one word"),
        (("red", "green", "red"), "got twice: red"),
        (("Red",), "single and lower-case, got 'Red'"),
        (("two words",), "single"),
        (("the",), "'the' is ignored too"),
    ],
)
def test_vocabulary_refuses(words, message):
    with pytest.raises(ValueError, match=message):
        captions.Vocabulary(words)


def test_other_errors_of_a_vocabulary():
    with pytest.raises(ValueError, match="0 .. 4, got"):
        WORDS.decode([5])
    with pytest.raises(ValueError, match="got none"):
        WORDS.encode_all(())


def test_vocabulary_of_texts():
    texts = ("Red apple", "letter a", "the green apple")
    assert captions.Vocabulary.of(texts).words == ("apple", "green", "letter", "red")
    whole = captions.Vocabulary.of(texts, ignored=())
    assert whole.decode(whole.encode("letter a")) == "letter a" and len(whole) == 7


def test_digit_captions_have_one_token_each():
    words = captions.digit_vocabulary()
    encoded = words.encode_all(captions.digit_captions(np.arange(10)))
    assert len(words) == 11 and encoded.tolist() == [[i] for i in range(1, 11)]
    with pytest.raises(ValueError, match=r"0 \.\. 9, got 3 \.\. 10"):
        captions.digit_captions(np.array([3, 10]))
    with pytest.raises(ValueError, match="must be integers"):
        captions.digit_captions(np.array([0.5]))


def test_misaligned_share_and_law():
    n, share = 20000, 0.5
    label = np.full(n, 3)
    noisy = captions.misaligned(label, 10, share, seed=0)
    assert noisy.dtype == np.int32
    # A tenth of the redrawn labels is right by chance; four deviations.
    expected = np.full(10, share / 10)
    expected[3] += 1 - share
    counts = np.bincount(noisy, minlength=10)
    assert (abs(counts - n * expected) < 4 * np.sqrt(n * expected)).all()
    np.testing.assert_array_equal(noisy, captions.misaligned(label, 10, share, seed=0))
    assert (noisy != captions.misaligned(label, 10, share, seed=1)).any()
    assert (captions.misaligned(label, 10, 0.0, seed=0) == 3).all()
    counts = np.bincount(captions.misaligned(label, 10, 1.0, seed=0), minlength=10)
    assert (abs(counts - n / 10) < 4 * np.sqrt(n / 10)).all()


def test_misaligned_does_not_depend_on_the_label():
    # Which labels are redrawn, and to what, is the seed's matter alone.
    zero, one = (captions.misaligned(np.full(100, i), 10, seed=5) for i in range(2))
    assert ((zero == one) | ((zero == 0) & (one == 1))).all()
    assert 0 < (zero == one).sum() < 100


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_misaligned_refuses(share):
    with pytest.raises(ValueError, match="share must be a probability"):
        captions.misaligned(np.zeros(3, int), 10, share, seed=0)


def drawn(n=4000):
    rng = np.random.default_rng(1)
    image = rng.random((n, 8, 8, 1)).astype(np.float32)
    return image, rng.integers(0, 10, n)


def test_inked_digits():
    image, label = drawn()
    digits = captions.inked(image, label, 0)
    assert digits.image.shape == (4000, 8, 8, 3) and digits.image.dtype == np.float32
    channels = {0: [0], 1: [1], 2: [2], 3: [0, 1]}
    for colour, used in channels.items():
        mine = digits.colour == colour
        assert abs(mine.sum() - 1000) < 4 * np.sqrt(750)
        for c in range(3):
            expected = image[mine, ..., 0] if c in used else 0 * image[mine, ..., 0]
            np.testing.assert_array_equal(digits.image[mine, ..., c], expected)
    np.testing.assert_array_equal(digits.digit, label)


def test_held_out_combinations_are_never_captioned_rightly():
    digits = captions.inked(*drawn(), 0)
    prompts = captions.colour_prompts()
    right = np.array([prompts[10 * c + d] for d, c in zip(digits.digit, digits.colour)])
    wrong = (digits.digit + digits.colour) % 5 == 0
    np.testing.assert_array_equal(captions.held_out(digits.digit, digits.colour), wrong)
    np.testing.assert_array_equal(np.array(digits.caption) == right, ~wrong)
    # All others are drawn, among them prompts that are held out themselves.
    assert len(set(np.array(digits.caption)[wrong])) == 40
    words = captions.colour_vocabulary()
    assert len(words) == 15 and words.encode_all(digits.caption).shape == (4000, 2)
    assert len(set(prompts)) == 40 and "a green seven" in prompts
    again = captions.inked(*drawn(), 0)
    assert again.caption == digits.caption
    assert captions.inked(*drawn(), 1).caption != digits.caption


def test_inked_refuses():
    image, label = drawn(4)
    for bad, message in (
        (image[:3], r"shape \(4, height, width, 1\), got \(3, 8, 8, 1\)"),
        (np.repeat(image, 3, -1), "got .4, 8, 8, 3"),
        (2 * image - 1, "must lie in"),
        (np.full_like(image, np.nan), "must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            captions.inked(bad, label, 0)


def test_drawbench(tmp_path):
    path = tmp_path / "data_meta.json"
    path.write_text(
        '{"A red car. ": {"category": "Colors"}, "Ü": {"category": "Text"}}', "utf-8"
    )
    assert captions.drawbench(path) == (("A red car.", "Colors"), ("Ü", "Text"))
    assert captions.drawbench(path)[1].category == "Text"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "data_meta.json: not JSON"),
        ("[]", "expected an object"),
        ("{}", "expected an object"),
        ('{"a": {"category": "Text"}, "b": "Text"}', "prompt 'b': expected"),
        ('{"b": {"kind": "Text"}}', "prompt 'b': expected"),
        ('{" ": {"category": "Text"}}', "prompt ' '"),
    ],
)
def test_drawbench_refuses(tmp_path, text, message):
    path = tmp_path / "data_meta.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        captions.drawbench(path)


def test_coco(tmp_path):
    path = tmp_path / "captions_val2014.json"

    def write(annotations):
        path.write_text(json.dumps({"info": {}, "annotations": annotations}))

    write([{"image_id": 1, "caption": "A cat.\n"}, {"image_id": 1, "caption": "Two"}])
    assert captions.coco(path) == ("A cat.", "Two")
    write([{"caption": "A cat."}, {"image_id": 1}])
    with pytest.raises(
        ValueError, match=r'annotations\[1\]: expected a text "caption"'
    ):
        captions.coco(path)
    for bad in ([], {"a": 1}, None):
        write(bad)
        with pytest.raises(ValueError, match='"annotations" must be a list'):
            captions.coco(path)
    with pytest.raises(FileNotFoundError):
        captions.coco(tmp_path / "no.json")
