"""Emoji: a font that the test builds, with glyphs of known pixels."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest

from jaxpapers.data import captions, emoji

fontTools = pytest.importorskip("fontTools")
Image = pytest.importorskip("PIL.Image")

RED = (255, 0, 0, 255)
GLYPHS = {
    "apple": (0x1F34E, Image.new("RGBA", (6, 4), RED)),
    "heart": (0x1F499, Image.new("RGBA", (4, 4), (0, 0, 255, 128))),
    "private": (0xE000, Image.new("RGBA", (4, 4), RED)),
    # No code point of its own, as flags and families.
    "sequence": (None, Image.new("RGBA", (4, 4), RED)),
}


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def strike(ppem, names):
    from fontTools.ttLib.tables import E_B_L_C_

    strike = E_B_L_C_.Strike()
    size = strike.bitmapSizeTable
    size.hori, size.vert = (E_B_L_C_.SbitLineMetrics() for _ in range(2))
    for line in (size.hori, size.vert):
        for name in (
            *("ascender", "descender", "widthMax", "caretSlopeNumerator"),
            *("caretSlopeDenominator", "caretOffset", "minOriginSB", "minAdvanceSB"),
            *("maxBeforeBL", "minAfterBL", "pad1", "pad2"),
        ):
            setattr(line, name, 0)
    size.colorRef, size.flags, size.bitDepth = 0, 1, 32
    size.startGlyphIndex = size.endGlyphIndex = 0
    size.ppemX = size.ppemY = ppem
    table = E_B_L_C_.eblc_index_sub_table_1(b"", None)
    table.names, table.imageFormat, table.indexFormat = names, 17, 1
    table.imageDataOffset = 0
    strike.indexSubTables = [table]
    return strike


def bitmaps(images):
    from fontTools.ttLib.tables import C_B_D_T_, BitmapGlyphMetrics

    glyphs = {}
    for name, data in images.items():
        glyph = C_B_D_T_.cbdt_bitmap_format_17(b"", None)
        glyph.metrics = BitmapGlyphMetrics.SmallGlyphMetrics()
        for value in ("height", "width", "BearingX", "BearingY", "Advance"):
            setattr(glyph.metrics, value, 4)
        glyph.imageData = data
        glyphs[name] = glyph
    return glyphs


def write_font(path, images=None, strikes=(10, 20)):
    """Strikes of these sizes, the largest with the right glyphs."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.ttLib import newTable

    images = images or {name: png(image) for name, (_, image) in GLYPHS.items()}
    black = {name: png(Image.new("RGBA", (4, 4), "black")) for name in images}
    font = FontBuilder(1024, isTTF=True)
    names = [".notdef", *images]
    font.setupGlyphOrder(names)
    codes = {GLYPHS[name][0]: name for name in images}
    font.setupCharacterMap({c: n for c, n in codes.items() if c} | {0x41: ".notdef"})
    font.setupHorizontalMetrics({name: (1024, 0) for name in names})
    font.setupHorizontalHeader(), font.setupPost(), font.setupOS2()
    cbdt, cblc = newTable("CBDT"), newTable("CBLC")
    cbdt.version = cblc.version = 3.0
    cblc.strikes = [strike(ppem, list(images)) for ppem in strikes]
    cbdt.strikeData = [bitmaps(images if p == max(strikes) else black) for p in strikes]
    font.font["CBDT"], font.font["CBLC"] = cbdt, cblc
    font.save(path)
    return path


@pytest.mark.parametrize("strikes", [(20,), (10, 20), (20, 10)])
def test_named_single_code_points_in_order(tmp_path, strikes):
    pairs = emoji.emoji(write_font(tmp_path / "font.ttf", strikes=strikes), 6)
    assert pairs.caption == ("red apple", "blue heart")
    assert pairs.code.tolist() == [0x1F34E, 0x1F499] and pairs.code.dtype == np.int32
    assert pairs.image.shape == (2, 6, 6, 3) and pairs.image.dtype == np.float32
    # 6 x 4 pixels in the middle of 6 x 6 white ones.
    np.testing.assert_array_equal(pairs.image[0, 1:5], np.full((4, 6, 3), [1, 0, 0]))
    assert (pairs.image[0, [0, 5]] == 1).all()
    # Half transparent on white.
    np.testing.assert_allclose(
        pairs.image[1], np.full((6, 6, 3), [127, 127, 255]) / 255
    )


def test_refused_fonts(tmp_path):
    path = tmp_path / "font.ttf"
    with pytest.raises(FileNotFoundError, match="package fonts-noto-color-emoji"):
        emoji.emoji(path)
    path.write_bytes(b"no font at all")
    with pytest.raises(ValueError, match="font.ttf: not a font"):
        emoji.emoji(path)
    write_font(path, {"apple": png(GLYPHS["apple"][1])[:45]})
    with pytest.raises(ValueError, match=r"broken glyph of U\+1F34E"):
        emoji.emoji(path)
    write_font(path, {"private": png(GLYPHS["private"][1])})
    with pytest.raises(ValueError, match="no glyphs of named code points"):
        emoji.emoji(path)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        emoji.emoji(path, 0)
    with fontTools.ttLib.TTFont(path) as font:
        font["CBLC"] = fontTools.ttLib.tables.DefaultTable.DefaultTable("CBLC")
        font["CBLC"].data = b"\0\3\0\0\0\0\0\1"
        font.save(tmp_path / "broken.ttf")
        font["cmap"] = fontTools.ttLib.tables.DefaultTable.DefaultTable("cmap")
        font["cmap"].data = struct.pack(
            ">HHHHI HHIIIIII", 0, 1, 3, 10, 12, 12, 0, 28, 0, 1, 0, 2**32 - 2, 0
        )
        font.save(tmp_path / "bomb.ttf")
        del font["CBDT"], font["CBLC"]
        font.save(tmp_path / "plain.ttf")
    with pytest.raises(ValueError, match="a broken one"):
        emoji.emoji(tmp_path / "broken.ttf")
    # Four thousand million code points in 28 bytes.
    with pytest.raises(ValueError, match="bomb.ttf: has 4,294,967,295 code points"):
        emoji.emoji(tmp_path / "bomb.ttf")
    with pytest.raises(ValueError, match="no CBDT table"):
        emoji.emoji(tmp_path / "plain.ttf")


def test_the_default_is_the_packages_font(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "FONT", tmp_path / "absent.ttf")
    with pytest.raises(FileNotFoundError, match="absent.ttf"):
        emoji.emoji()


@pytest.mark.parametrize("module", ["fontTools", "PIL"])
def test_an_absent_extra_is_named(tmp_path, monkeypatch, module):
    path = write_font(tmp_path / "font.ttf")
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxpapers\[emoji\]'"):
        emoji.emoji(path)


def pairs(count):
    code = np.arange(count, dtype=np.int32)
    image = np.ones((count, 2, 2, 3), np.float32) * code[:, None, None, None]
    return emoji.Captioned(image, tuple(map(str, code)), code)


def test_split_is_disjoint_and_keeps_pairs():
    train, test = emoji.split(pairs(20), 0.25, seed=1)
    assert len(train.code) == 15 and len(test.code) == 5
    assert sorted([*train.code, *test.code]) == list(range(20))
    for part in (train, test):
        assert part.caption == tuple(map(str, part.code))
        np.testing.assert_array_equal(part.image[:, 0, 0, 0], part.code)
    again = emoji.split(pairs(20), 0.25, seed=1)[0]
    assert again.caption == train.caption
    assert emoji.split(pairs(20), 0.25, seed=2)[0].caption != train.caption


@pytest.mark.parametrize("share", [0.0, 1.0, 0.01, 0.99, -1.0])
def test_split_refuses(share):
    with pytest.raises(ValueError, match=f"of 20 pairs in both splits, got {share}"):
        emoji.split(pairs(20), share)


@pytest.mark.skipif(not Path(emoji.FONT).exists(), reason="no fonts-noto-color-emoji")
def test_the_real_font():
    pairs = emoji.emoji(size=8)
    assert len(pairs.code) >= 1405
    for name in ("red apple", "green apple", "blue heart", "orange book"):
        assert name in pairs.caption
    apple = pairs.image[pairs.caption.index("red apple"), 3:6, 2:6]
    assert apple[..., 0].mean() > 2 * apple[..., 1:].mean()
    words = captions.Vocabulary.of(pairs.caption, ignored=())
    assert words.decode(words.encode(pairs.caption[0])) == pairs.caption[0]
