"""Captioned images: the glyphs of Noto Color Emoji with their Unicode names.

Linux distributions have the font, under the SIL Open Font License; jaxpapers does not
ship it.
"""

import io
import struct
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.data import files
from jaxpapers.data.image_files import pillow

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""Path of the font in Debian's package fonts-noto-color-emoji."""

_MAX_FONT = 1 << 28  # bytes
_MAX_GLYPH = 2048  # pixels of a side


class Captioned(NamedTuple):
    """Images with captions.

    Attributes:
      image: float32 (n, size, size, 3) in [0, 1], on white.
      caption: Unicode names in lower case, e.g. "red apple".
      code: code points, int32 (n,), ascending unless split.
    """

    image: np.ndarray
    caption: tuple[str, ...]
    code: np.ndarray


def emoji(path: str | Path | None = None, size: int = 32) -> Captioned:
    """Images of all glyphs of a single, named code point, sorted by code point.

    Glyphs of 136 x 128 pixels are composed on a white square and resized (bilinear with
    anti-aliasing). Version 2.042 of the font has 1,405 with the Unicode 14 of Python
    3.11, and a few more with a newer Python.

    Their vocabulary is ``captions.Vocabulary.of(pairs.caption, ignored=())``: in names
    like "button a" the letter is no article.

    Args:
      path: of NotoColorEmoji.ttf, or of another font with PNG glyphs in a CBDT table;
        None: ``FONT``.
      size: pixels of a side.

    Raises:
      FileNotFoundError: no font.
      ModuleNotFoundError: fontTools or Pillow is not installed.
      ValueError: a font without PNG glyphs, or a broken glyph.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    path = FONT if path is None else Path(path)
    try:
        path, size_of = files.check(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no font {path}; Debian's package fonts-noto-color-emoji has it, or give "
            "the path of NotoColorEmoji.ttf"
        ) from None
    if size_of > _MAX_FONT:
        raise ValueError(
            f"{path}: {size_of:,} bytes, more than the {_MAX_FONT:,} allowed"
        )
    glyphs = _glyphs(path)
    image = np.empty((len(glyphs), size, size, 3), np.float32)
    for target, (code, data) in zip(image, glyphs.items()):
        target[:] = _glyph_image(path, code, data, size) / np.float32(255)
    names = tuple(unicodedata.name(chr(code)).lower() for code in glyphs)
    return Captioned(image, names, np.array(list(glyphs), np.int32))


def split(
    pairs: Captioned, held_out: float = 0.1, seed: int = 0
) -> tuple[Captioned, Captioned]:
    """Training and test split.

    Args:
      pairs: images with captions.
      held_out: share of the test split.
      seed: of the permutation.

    Raises:
      ValueError: an empty split.
    """
    total = len(pairs.code)
    count = round(held_out * total) if 0 < held_out < 1 else 0
    if not 0 < count < total:
        raise ValueError(
            f"held_out must leave some of {total} pairs in both splits, got {held_out}"
        )
    order = np.random.default_rng(seed).permutation(total)
    return _part(pairs, order[: total - count]), _part(pairs, order[total - count :])


def _part(pairs: Captioned, index: np.ndarray) -> Captioned:
    captions = tuple(pairs.caption[i] for i in index)
    return Captioned(pairs.image[index], captions, pairs.code[index])


def _glyphs(path: Path) -> dict[int, bytes]:
    """Code point -> PNG in the largest strike, for code points with a name."""
    try:
        from fontTools import ttLib
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            "reading fonts needs fontTools: pip install 'jaxpapers[emoji]'"
        ) from e
    with files.parsing(path, "not a font, or a broken one"):
        # Opened here: TTFont leaves a malformed file open.
        with path.open("rb") as file, ttLib.TTFont(file, lazy=True) as font:
            if not {"CBDT", "CBLC", "cmap"} <= set(font.keys()):
                raise ValueError(f"{path}: has no CBDT table of PNG glyphs")
            reader: Any = font.reader
            _check_codes(path, reader["cmap"])
            sizes = [s.bitmapSizeTable.ppemY for s in font["CBLC"].strikes]
            best = font["CBDT"].strikeData[sizes.index(max(sizes))] if sizes else {}
            codes = font.getBestCmap() or {}
            glyphs = {
                code: _png(path, code, best[codes[code]])
                for code in sorted(codes)
                if codes[code] in best and unicodedata.name(chr(code), "")
            }
    if not glyphs:
        raise ValueError(f"{path}: has no glyphs of named code points")
    return glyphs


def _check_codes(path: Path, table: bytes) -> None:
    """Refuses ranges beyond Unicode, which fontTools would list one by one."""
    count = struct.unpack(">H", table[2:4])[0]
    for i in range(count):
        (start,) = struct.unpack(">I", table[8 + 8 * i : 12 + 8 * i])
        if struct.unpack(">H", table[start : start + 2])[0] not in (12, 13):
            continue
        (groups,) = struct.unpack(">I", table[start + 12 : start + 16])
        ranges = table[start + 16 : start + 16 + 12 * groups]
        limits = np.frombuffer(ranges[: len(ranges) // 12 * 12], ">u4").reshape(-1, 3)
        sizes = limits[:, 1].astype(np.int64) - limits[:, 0] + 1
        if sizes.clip(0).sum() > 0x110000:
            raise ValueError(f"{path}: has {sizes.clip(0).sum():,} code points")


def _png(path: Path, code: int, glyph: Any) -> bytes:
    data = getattr(glyph, "imageData", None)
    if data is None:
        raise ValueError(f"{path}: the glyph of U+{code:04X} is not a PNG")
    return data


def _glyph_image(path: Path, code: int, data: bytes, size: int) -> np.ndarray:
    image = pillow()
    with (
        files.parsing(path, f"broken glyph of U+{code:04X}"),
        image.open(io.BytesIO(data), formats=["PNG"]) as file,
    ):
        if max(file.size) > _MAX_GLYPH:
            raise ValueError(
                f"{file.size} pixels, at most {_MAX_GLYPH} each are allowed"
            )
        glyph = file.convert("RGBA")
    side = max(glyph.size)
    white = image.new("RGBA", (side, side), "white")
    left, top = ((side - length) // 2 for length in glyph.size)
    white.alpha_composite(glyph, (left, top))
    resized = white.convert("RGB").resize((size, size), image.Resampling.BILINEAR)
    return np.asarray(resized)
