"""Detection data: ID images, a pool of outliers to mine, test sets of outliers.

``digits_among_letters``: handwritten digits; a pool of clothes with a few letters in it,
the only outliers that are near digits; letters of other fonts, textures and photos as
test sets. ``segments``: the same in small, drawn without any file. Pools of the original
data sets are in ``data.pools``.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.data.image_files import idx, pillow
from jaxpapers.data.images import Split, segment_glyphs

# Without look-alikes of digits.
ALPHABET = "ACEFGHJKLMNPQRTUVWXYacdefhjkmnprtuvwxy"
POOL_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
)  # fmt: skip
TEST_FONTS = (
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10",
    "cmb10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip
TEXTURES = ("brick.png", "grass.png", "gravel.png")
PHOTOS = ("china.jpg", "flower.jpg", "astronaut.png", "coffee.png", "chelsea.png")
SIZE = 28


class Pool:
    """Images in memory; pools of files have the same two methods.

    Args:
      images: uint8 (n, H, W, C).
    """

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def read(self, index: np.ndarray) -> np.ndarray:
        """Images uint8 (len(index), H, W, C)."""
        return self.images[index]


class Detection(NamedTuple):
    """Data of a detector; all images are uint8 (n, H, W, C).

    Attributes:
      name: for titles.
      train: ID images and their classes.
      calibration: held-out ID images, for a threshold.
      test: ID images.
      classes: number of classes.
      pool: has ``len`` and ``read(index)``.
      marks: kind -> bool (pool,), of items that are known: the near outliers of a pool,
        ID images hidden in it. Never seen by a method.
      outliers: test set -> images, the near ones first.
    """

    name: str
    train: Split
    calibration: Split
    test: Split
    classes: int
    pool: Any
    marks: Mapping[str, np.ndarray]
    outliers: Mapping[str, np.ndarray]


def digits_among_letters(
    digits: Split,
    easy: np.ndarray,
    photos: str | Path,
    textures: str | Path,
    *,
    train: int = 3000,
    letters: int = 1200,
    contaminants: int = 0,
    count: int = 2000,
) -> Detection:
    """Digits against a pool of other images with a few letters in it.

    Args:
      digits: 10,000 images uint8 (n, 28, 28) with their classes. A permutation by
        ``RandomState(0)`` gives training (the first), calibration (4,000 to 5,000),
        contaminants (6,000 to 8,000) and test (from 8,000 on).
      easy: uint8 (n, 28, 28), most of the pool.
      photos: folder of scikit-learn's ``PHOTOS``, with scikit-image's in ``textures``.
      textures: folder of scikit-image's images.
      train: ID images for training, at most 4,000.
      letters: of ``POOL_FONTS``, at the end of the pool.
      contaminants: unlabelled digits in the pool, after the letters, at most 2,000.
      count: images of each test set.

    Raises:
      ValueError: sizes out of range, or fewer than 10,000 digits.
      FileNotFoundError: a missing font or photo.
      ModuleNotFoundError: Pillow or matplotlib, whose fonts are used, is not installed.
    """
    if len(digits.label) < 10_000 or not 1 <= train <= 4000:
        raise ValueError(
            f"the task needs 10,000 digits and trains on 1 to 4,000 of them, got "
            f"{len(digits.label):,} and {train:,}"
        )
    if not 0 <= contaminants <= 2000 or letters < 1:
        raise ValueError(
            "the pool takes at least 1 letter and at most 2,000 contaminants, got "
            f"{letters} and {contaminants}"
        )
    order = np.random.RandomState(0).permutation(len(digits.label))
    image = digits.image[..., None]

    def part(rows):
        return Split(image[rows], digits.label[rows])

    hidden = image[order[6000 : 6000 + contaminants]]
    pool = np.concatenate([easy[..., None], glyphs(letters, 1, POOL_FONTS), hidden])
    kind = np.repeat([0, 1, 2], [len(easy), letters, contaminants])
    folders = [Path(textures), Path(photos)]
    return Detection(
        "handwritten digits",
        part(order[:train]),
        part(order[4000:5000]),
        part(order[8000:]),
        10,
        Pool(pool),
        {"letters": kind == 1, "contaminants": kind == 2},
        {
            "letters": glyphs(count, 2, TEST_FONTS),
            "textures": patches(count, 3, _grey(TEXTURES, folders)),
            "photos": patches(count, 4, _grey(PHOTOS, folders)),
        },
    )


def fashion_images(folder: str | Path) -> np.ndarray:
    """The 60,000 training images of Fashion-MNIST, uint8 (n, 28, 28).

    Raises:
      FileNotFoundError, ValueError: see ``image_files.idx``.
    """
    path = Path(folder) / "train-images-idx3-ubyte"
    return idx(path if path.exists() else path.with_name(path.name + ".gz"))


def patterns(count: int = 60_000, seed: int = 0) -> np.ndarray:
    """Gratings, discs, boxes and smoothed noise, uint8 (n, 28, 28), from no file."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) - SIZE / 2
    images = np.empty((count, SIZE, SIZE), np.uint8)
    for i, kind in enumerate(rng.randint(4, size=count)):
        level, phase, turn = rng.uniform(0.4, 1), *rng.uniform(0, 2 * np.pi, 2)
        along = x * np.cos(turn) + y * np.sin(turn)
        across = y * np.cos(turn) - x * np.sin(turn)
        if kind == 0:
            image = 0.5 + 0.5 * np.sin(along * rng.uniform(0.3, 1.5) + phase)
        elif kind == 1:
            image = np.hypot(along, across * rng.uniform(0.6, 1.6)) < rng.uniform(6, 12)
        elif kind == 2:
            wide, high = rng.uniform(5, 12, 2)
            image = (np.abs(along) < wide) & (np.abs(across) < high)
        else:
            coarse = rng.uniform(0, 1, (7, 7)).repeat(4, 0).repeat(4, 1)
            image = (coarse + np.roll(coarse, 2, 0) + np.roll(coarse, 2, 1)) / 3
        images[i] = np.rint(255 * level * image)
    return images


def glyphs(
    count: int, seed: int, fonts: Sequence[str], alphabet: str = ALPHABET
) -> np.ndarray:
    """Letters, white on black, shifted and turned: uint8 (n, 28, 28, 1).

    Args:
      count: images.
      seed: of ``RandomState``.
      fonts: names of files in matplotlib's folder of fonts.
      alphabet: letters.

    Raises:
      FileNotFoundError: a font is missing.
      ModuleNotFoundError: Pillow or matplotlib is not installed.
    """
    from_pillow = pillow()
    from PIL import ImageDraw, ImageFont

    folder, rng = font_folder(), np.random.RandomState(seed)
    loaded: dict[tuple[str, int], Any] = {}
    images = np.empty((count, SIZE, SIZE, 1), np.uint8)
    for target in images:
        font, letter = (
            fonts[rng.randint(len(fonts))],
            alphabet[rng.randint(len(alphabet))],
        )
        size, angle = rng.randint(18, 25), rng.uniform(-15, 15)
        dx, dy = rng.uniform(-2, 2, 2)
        if (font, size) not in loaded:
            path = folder / f"{font}.ttf"
            if not path.exists():
                raise FileNotFoundError(f"no font {path}; install matplotlib >= 3.8")
            loaded[font, size] = ImageFont.truetype(str(path), size)
        image = from_pillow.new("L", (SIZE, SIZE))
        ImageDraw.Draw(image).text(
            (SIZE / 2 + dx, SIZE / 2 + dy), letter, fill=255, anchor="mm",
            font=loaded[font, size],
        )  # fmt: skip
        turned = image.rotate(angle, from_pillow.Resampling.BICUBIC)
        target[..., 0] = np.asarray(turned)
    return images


def font_folder() -> Path:
    """Folder of matplotlib's fonts, found without importing it.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "letters are drawn in the fonts that matplotlib carries: "
            "pip install 'jaxpapers[plot]'"
        )
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"


def patches(count: int, seed: int, sources: Sequence[np.ndarray]) -> np.ndarray:
    """Square cut-outs of grey images, of 28, 56 or 84 pixels, as means: (n, 28, 28, 1).

    Args:
      count: images.
      seed: of ``RandomState``.
      sources: uint8 (H, W), at least 84 pixels on each side.
    """
    rng = np.random.RandomState(seed)
    images = np.empty((count, SIZE, SIZE, 1), np.uint8)
    for target in images:
        source = sources[rng.randint(len(sources))]
        times = 1 + rng.randint(3)
        side = SIZE * times
        y, x = (rng.randint(n - side + 1) for n in source.shape)
        cut = source[y : y + side, x : x + side].reshape(SIZE, times, SIZE, times)
        target[..., 0] = np.rint(cut.mean((1, 3)))
    return images


# Glyphs of seven segments that are no digits.
_NEAR = "abfg aef adef cdeg bcefg abcef bcdef adg bcdeg cefg acfg degf".split()
_TEST_NEAR = "abef bcg aceg bdfg abdf cdefg abeg".split()


def segments(train: int = 512, pool: int = 2000, seed: int = 0) -> Detection:
    """Digits of seven segments on 8 x 8 pixels, for trials without any file.

    The pool is gratings and noise, a tenth of it glyphs that are no digits; the test
    sets are glyphs of other segments, and noise.
    """
    rng = np.random.default_rng(seed)

    def digits(count, seed):
        image, label = segment_glyphs(None, count, seed)
        return Split(_bytes(image), label)

    def noise(count, rng):
        waves = np.sin(np.arange(8) * rng.uniform(0.5, 3, (count, 1)))[:, None, :, None]
        grain = rng.uniform(0, 1, (count, 8, 8, 1))
        return _bytes(np.clip(0.5 * waves + grain, 0, 1))

    near = pool // 10
    glyph = _bytes(segment_glyphs(_NEAR, near, seed + 1)[0])
    return Detection(
        "digits of seven segments",
        digits(train, seed + 2),
        digits(256, seed + 3),
        digits(256, seed + 4),
        10,
        Pool(np.concatenate([noise(pool - near, rng), glyph])),
        {
            "letters": np.arange(pool) >= pool - near,
            "contaminants": np.zeros(pool, bool),
        },
        {
            "letters": _bytes(segment_glyphs(_TEST_NEAR, 256, seed + 5)[0]),
            "noise": noise(256, np.random.default_rng(seed + 6)),
        },
    )


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(255 * image).astype(np.uint8)


def _grey(names: Sequence[str], folders: Sequence[Path]) -> list[np.ndarray]:
    """Images of the first folder that has them, as grey levels."""
    image, found = pillow(), []
    for name in names:
        paths = [folder / name for folder in folders if (folder / name).exists()]
        if not paths:
            raise FileNotFoundError(
                f"no file {name} in {' or '.join(map(str, folders))}"
            )
        with image.open(paths[0]) as file:
            found.append(np.asarray(file.convert("L")))
    return found
