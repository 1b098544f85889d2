"""Capital letters in families of fonts, each family a domain.

The fonts are those that matplotlib's wheel carries (``data.fetch.get("font-families")``):
DejaVu Sans, DejaVu Serif, STIX and Computer Modern, four faces each.
"""

from pathlib import Path

import numpy as np

from jaxpapers.data import files
from jaxpapers.data.domains import Domain
from jaxpapers.data.image_files import pillow

FAMILIES = {
    "DejaVu Sans": (
        "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf",
        "DejaVuSans-BoldOblique.ttf",
    ),
    "DejaVu Serif": (
        "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf",
        "DejaVuSerif-BoldItalic.ttf",
    ),
    "STIX": (
        "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf",
        "STIXGeneralBolIta.ttf",
    ),
    "Computer Modern": ("cmr10.ttf", "cmb10.ttf", "cmti10.ttf", "cmtt10.ttf"),
}  # fmt: skip
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def families(
    folder: str | Path, count: int = 40, size: int = 16, seed: int = 0
) -> list[Domain]:
    """A domain for each family: float32 (n, size, size, 1), white on black.

    Every image is a letter of a random face, height, place and slant of up to 15 degrees,
    drawn at twice the size and averaged.

    Args:
      folder: of the fonts.
      count: images of each letter.
      size: pixels of a side.
      seed: of the draws.

    Raises:
      FileNotFoundError: a font is missing.
      ModuleNotFoundError: Pillow is not installed.
      ValueError: a file that is no font; a size below 8.
    """
    if size < 8:
        raise ValueError(f"letters need at least 8 pixels, got {size}")
    rng = np.random.default_rng(seed)
    label = np.tile(np.arange(len(LETTERS), dtype=np.int32), count)
    made = []
    for name, faces in FAMILIES.items():
        fonts = [_face(Path(folder) / face, 2 * size) for face in faces]
        x = np.stack([_letter(LETTERS[k], fonts, 2 * size, rng) for k in label])
        x = x.reshape(len(x), size, 2, size, 2).mean((2, 4)) / 255
        made.append(Domain(name, x[..., None].astype(np.float32), label))
    return made


def _face(path: Path, side: int):
    """A face at every height that is drawn."""
    pillow()
    from PIL import ImageFont

    path, _ = files.check(path)
    with files.parsing(path, "not a font"):
        heights = np.linspace(0.55, 0.9, 8) * side
        return [ImageFont.truetype(str(path), round(h)) for h in heights]


def _letter(letter, fonts, side, rng):
    image = pillow()
    from PIL import ImageDraw

    face = fonts[rng.integers(len(fonts))]
    font = face[rng.integers(len(face))]
    shift = rng.uniform(-0.08, 0.08, 2) * side
    angle = rng.uniform(-15, 15)
    canvas = image.new("L", (side, side), 0)
    place = tuple(side / 2 + shift)
    ImageDraw.Draw(canvas).text(place, letter, 255, font, anchor="mm")
    turned = canvas.rotate(angle, image.Resampling.BILINEAR)
    return np.asarray(turned, np.float32)
