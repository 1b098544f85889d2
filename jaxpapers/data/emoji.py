"""Captioned pictures: the glyphs of Noto Color Emoji and their names in Unicode.

Real pairs of text and picture, from a font that Linux distributions carry. The font is
under the SIL Open Font License; jaxpapers does not ship it.
"""

import io
import struct
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.data.image_files import pillow

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""Where Debian's package fonts-noto-color-emoji puts the font."""


class Captioned(NamedTuple):
    """Pictures with their captions.

    Attributes:
      image: float32 (n, size, size, 3) in [0, 1], on white.
      caption: the names in lower case, "red apple".
      code: the code points, int32 (n,), rising unless split.
    """

    image: np.ndarray
    caption: tuple[str, ...]
    code: np.ndarray


def emoji(path: str | Path | None = None, size: int = 32) -> Captioned:
    """The font's pictures of single code points that have a name, by code point.

    Words for them: ``captions.Vocabulary.of(pairs.caption, ignored=())``; some names end
    in the letter "a", which is no article there.

    Transparent parts become white, the 136 x 128 pixels are centred on a white square
    and resized (bilinear, averaging). Version 2.042 of the font has 1,405 with Python
    3.11, whose Unicode is 14; a newer Python knows the names of a few more.

    Args:
      path: of NotoColorEmoji.ttf, or of another font with PNG pictures in a CBDT table;
        None: ``FONT``.
      size: pixels of a side.

    Raises:
      FileNotFoundError: no font.
      ModuleNotFoundError: no fontTools or no Pillow.
      ValueError: a font without such pictures, or a broken picture.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    path = FONT if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no font {path}; Debian's package fonts-noto-color-emoji has it, or give "
            "the path of NotoColorEmoji.ttf"
        )
    glyphs = _glyphs(path)
    image = np.empty((len(glyphs), size, size, 3), np.float32)
    for target, (code, data) in zip(image, glyphs.items()):
        target[:] = _picture(path, code, data, size) / np.float32(255)
    names = tuple(unicodedata.name(chr(code)).lower() for code in glyphs)
    return Captioned(image, names, np.array(list(glyphs), np.int32))


def split(
    pairs: Captioned, held_out: float = 0.1, seed: int = 0
) -> tuple[Captioned, Captioned]:
    """Two disjoint parts in random order: to train on, to test on.

    Args:
      pairs: all of them.
      held_out: share of the second part.
      seed: of the order.

    Raises:
      ValueError: a part would be empty.
    """
    total = len(pairs.code)
    count = round(held_out * total) if 0 < held_out < 1 else 0
    if not 0 < count < total:
        raise ValueError(
            f"held_out must leave some of {total} pairs on both sides, got {held_out}"
        )
    order = np.random.default_rng(seed).permutation(total)
    return _part(pairs, order[: total - count]), _part(pairs, order[total - count :])


def _part(pairs: Captioned, index: np.ndarray) -> Captioned:
    captions = tuple(pairs.caption[i] for i in index)
    return Captioned(pairs.image[index], captions, pairs.code[index])


def _glyphs(path: Path) -> dict[int, bytes]:
    """Code point -> PNG of the largest strike that has it, for those with a name."""
    try:
        from fontTools import ttLib
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            "reading fonts needs fontTools: pip install 'jaxpapers[emoji]'"
        ) from e
    try:
        # Opened here: a font that is none would leave its file open.
        with path.open("rb") as file, ttLib.TTFont(file, lazy=True) as font:
            if not {"CBDT", "CBLC", "cmap"} <= set(font.keys()):
                raise ValueError(f"{path}: has no table CBDT of PNG pictures")
            sizes = [s.bitmapSizeTable.ppemY for s in font["CBLC"].strikes]
            best = font["CBDT"].strikeData[sizes.index(max(sizes))] if sizes else {}
            codes = font.getBestCmap() or {}
            found = {
                code: _png(path, code, best[codes[code]])
                for code in sorted(codes)
                if codes[code] in best and unicodedata.name(chr(code), "")
            }
    except (ttLib.TTLibError, struct.error, AssertionError, LookupError) as e:
        raise ValueError(f"{path}: not a font, or a broken one ({e!r})") from e
    if not found:
        raise ValueError(f"{path}: has no pictures of code points with a name")
    return found


def _png(path: Path, code: int, glyph: Any) -> bytes:
    data = getattr(glyph, "imageData", None)
    if data is None:
        raise ValueError(f"{path}: the picture of U+{code:04X} is not a PNG")
    return data


def _picture(path: Path, code: int, data: bytes, size: int) -> np.ndarray:
    image = pillow()
    try:
        with image.open(io.BytesIO(data), formats=["PNG"]) as file:
            glyph = file.convert("RGBA")
    except (OSError, SyntaxError, EOFError) as e:
        raise ValueError(f"{path}: broken picture of U+{code:04X} ({e})") from e
    side = max(glyph.size)
    white = image.new("RGBA", (side, side), "white")
    left, top = ((side - length) // 2 for length in glyph.size)
    white.alpha_composite(glyph, (left, top))
    resized = white.convert("RGB").resize((size, size), image.Resampling.BILINEAR)
    return np.asarray(resized)
