"""Token streams: Python's standard library, text files, or token shards.

Text is tokenized to bytes, tokens 0-255; ``SEPARATOR`` ends every document. Files are
concatenated in the order of their relative paths, and a hash of the path assigns each to
training or validation, so the split depends on the files alone.
"""

import gzip
import hashlib
import lzma
import math
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxpapers.data import documents, files

SEPARATOR = 256
# 257 symbols, rounded up so that a vocabulary axis divides over 8 devices.
VOCAB_SIZE = 264
TERMS = "The sources of Python's standard library are under the PSF License Version 2."

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER = 256  # int32 words

_SKIPPED_PARTS = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
_SKIPPED_PARTS |= {"idle_test", "lib2to3"}
_VALIDATION = re.compile(r"(^|[_.-])val")


class Corpus(NamedTuple):
    """Token streams of the training and the validation split.

    Attributes:
      name: of the source.
      train, validation: token arrays, uint16, memory-mapped for shards.
      byte_level: whether tokens are bytes, which bits per byte need.
      notes: which files were skipped, and why; "" for none.
    """

    name: str
    train: list[np.ndarray]
    validation: list[np.ndarray]
    byte_level: bool
    notes: str = ""


def load(path: str | None = None, *, validation_fraction: float = 0.05) -> Corpus:
    """Reads a corpus.

    Text is UTF-8, plain or gzipped. Of a folder other files are skipped, and
    ``Corpus.notes`` says which; hidden ones without a word.

    Args:
      path: a text file; a folder of text files; a token shard ``*.bin`` or a folder of
        them (val* and *_val* are the validation split); None: the sources of the running
        Python's standard library.
      validation_fraction: expected share of files in the validation split, or the share
        at the end of a single file.

    Raises:
      FileNotFoundError: no such path.
      ValueError: a file that is no text, an empty split, or a malformed shard.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction must be in (0, 1), got {validation_fraction}"
        )
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        corpus = _from_files("stdlib", root, _python_files(root), validation_fraction)
    else:
        corpus = _from_path(path, validation_fraction)
    for split in ("train", "validation"):
        streams = getattr(corpus, split)
        # Each stream of bytes ends by a separator.
        if sum(map(len, streams)) <= (len(streams) if corpus.byte_level else 0):
            raise ValueError(
                f"data.path: {corpus.name!r} gives an empty {split} split at "
                f"validation_fraction={validation_fraction}; give more text"
                + (f" ({corpus.notes})" if corpus.notes else "")
            )
    return corpus


def in_validation(name: str, fraction: float) -> bool:
    """Whether a file is in the validation split, by a hash of its relative POSIX path.

    Example:
      >>> [n for n in ("abc.py", "io.py", "os.py") if in_validation(n, 0.5)]
      ['io.py']
    """
    # MD5: its validation split has 5.2 - 5.5 % of the standard library's bytes on Python
    # 3.11 to 3.13; that of SHA-256 has one file of 0.8 MB.
    digest = hashlib.md5(name.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def check_tokens(corpus: Corpus, vocab_size: int) -> None:
    """Refuses a validation token beyond the vocabulary (ValueError).

    An out-of-range label gives a wrong loss without an error. ``Windows`` checks the
    training streams, which are too long to read at the start.
    """
    for stream in corpus.validation:
        highest = int(stream.max(initial=0))
        if highest >= vocab_size:
            raise ValueError(
                f"data: {corpus.name}: token {highest} in the validation split, but "
                f"config.net.vocab_size={vocab_size}; raise it (GPT-2 tokens: 50304)"
            )


def encode(text: bytes) -> np.ndarray:
    """Bytes to uint16 tokens."""
    return np.frombuffer(text, np.uint8).astype(np.uint16)


def decode(tokens: Sequence[int] | np.ndarray) -> bytes:
    """Tokens to bytes; separators become form feeds."""
    return bytes(12 if t >= SEPARATOR else int(t) for t in tokens)


def baselines(stream: np.ndarray) -> dict[str, float]:
    """Bits per byte of a byte-level stream under baselines without training.

    Args:
      stream: tokens; separators are skipped.

    Returns:
      ``order0``: entropy of the byte histogram; ``gzip`` and ``xz``: compression of the
      whole stream at level 9.
    """
    data = bytes(stream[stream < 256].astype(np.uint8))
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    p = counts[counts > 0] / len(data)
    return {
        "order0": float(-(p * np.log2(p)).sum()),
        "gzip": 8 * len(gzip.compress(data, 9, mtime=0)) / len(data),
        "xz": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }


class Windows:
    """Shuffled training windows, addressed by a global example index.

    An example is a window of ``context + 1`` tokens. Each epoch has a random offset and a
    random permutation of all windows. The only state of a run is the index of its next
    example, for any number of hosts.
    """

    def __init__(
        self,
        streams: Sequence[np.ndarray],
        context: int,
        seed: int = 0,
        vocab_size: int | None = None,
    ):
        """Windows of token streams.

        Args:
          streams: token arrays; those shorter than two windows are dropped.
          context: tokens of an example, minus one.
          seed: of offsets and permutations.
          vocab_size: tokens must be below it; None: unchecked.

        Raises:
          ValueError: no stream has two windows.
        """
        self.streams = [s for s in streams if len(s) >= 2 * context + 1]
        self.context = context
        self.seed = seed
        self.vocab_size = vocab_size
        if not self.streams:
            raise ValueError(
                f"data: no training document stream has {2 * context + 1} tokens, which "
                f"context={context} needs; longest is "
                f"{max((len(s) for s in streams), default=0)}"
            )
        # One window less than the stream has: room for the epoch's offset.
        counts = [(len(s) - 1) // context - 1 for s in self.streams]
        self._ends = np.cumsum(counts)
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Windows in an epoch."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        """Window of the global example ``index``, int32 (context + 1,)."""
        epoch, i = divmod(index, len(self))
        rng = np.random.default_rng((self.seed, epoch))
        offset = int(rng.integers(self.context))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, rng.permutation(len(self)))
        i = int(self._epoch[1][i])
        which = int(np.searchsorted(self._ends, i, side="right"))
        i -= int(self._ends[which - 1]) if which else 0
        start = offset + i * self.context
        window = self.streams[which][start : start + self.context + 1]
        window = np.asarray(window, np.int32)
        if self.vocab_size is not None and window.max() >= self.vocab_size:
            # An out-of-range label gives a wrong loss without an error.
            raise ValueError(
                f"data: token {window.max()} in a training stream, but "
                f"config.net.vocab_size={self.vocab_size}; raise it (GPT-2 tokens: 50304)"
            )
        return window

    def batch(self, start: int, size: int, rows: slice = slice(None)) -> dict:
        """Examples start .. start + size - 1 as {"tokens": int32 (rows, context + 1)}.

        Args:
          start: global index of the first example.
          size: of the global batch.
          rows: the part of the batch that this host builds.
        """
        index = range(start, start + size)[rows]
        return {"tokens": np.stack([self[i] for i in index])}


def score_windows(
    streams: Sequence[np.ndarray], context: int, batch: int, overlap: float = 0.25
) -> Iterator[dict[str, np.ndarray]]:
    """Evaluation batches that score each token once, after some context.

    A token is scored in the first window that has it. A separator precedes every stream,
    so its first token is scored too.

    Args:
      streams: tokens; documents of one stream follow each other.
      context: tokens of a window.
      batch: windows of a batch.
      overlap: share of a window that it has in common with the one before. A token is
        scored after that much of its stream, or all there is; windows are
        1 / (1 - overlap) as many as tokens need.

    Yields:
      {"tokens": int32 (batch, context + 1), "weight": float32 (batch, context)}, with
      weight 0 for unscored tokens and padding.

    Raises:
      ValueError: an overlap that leaves no token to score.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be in [0, 1), got {overlap}")
    shared = int(context * overlap)
    tokens = np.full((batch, context + 1), SEPARATOR, np.int32)
    weight = np.zeros((batch, context), np.float32)
    row = 0
    for stream in streams:
        stream = np.concatenate([np.array([SEPARATOR], stream.dtype), stream])
        done = 1  # stream[:done] is scored, or is the leading separator
        while done < len(stream):
            start = max(done - 1 - shared, 0)
            stop = min(start + context + 1, len(stream))
            tokens[row, : stop - start] = stream[start:stop]
            weight[row, done - start - 1 : stop - start - 1] = 1
            done, row = stop, row + 1
            if row == batch:
                yield {"tokens": tokens.copy(), "weight": weight.copy()}
                tokens[:], weight[:], row = SEPARATOR, 0, 0
    if row:
        yield {"tokens": tokens, "weight": weight}


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Writes tokens in the shard format: 256 int32 header words, then uint16 tokens."""
    tokens = np.asarray(tokens)
    if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= 2**16:
        raise ValueError(f"{path}: shard tokens must be in [0, 65535]")
    header = np.zeros(SHARD_HEADER, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    with open(path, "wb") as f:
        f.write(header.tobytes())
        f.write(tokens.astype("<u2").tobytes())


def read_shard(path: str | Path) -> np.ndarray:
    """Memory-maps a token shard in the layout of the Dion repository's FineWeb shards.

    Raises:
      FileNotFoundError: no such file.
      ValueError: wrong magic number or version, or another number of tokens than the
        header's.
    """
    path, size = files.check(path)
    header = np.fromfile(path, "<i4", SHARD_HEADER)
    if len(header) < SHARD_HEADER or header[0] != SHARD_MAGIC:
        raise ValueError(
            f"{path}: not a token shard, got magic {header[:1].tolist()}, expected "
            f"{SHARD_MAGIC}; raw tokens, as nanoGPT writes, are not read: write shards "
            "with jaxpapers.data.text.write_shard"
        )
    if header[1] != SHARD_VERSION:
        raise ValueError(f"{path}: shard version {header[1]}, expected {SHARD_VERSION}")
    offset, count = SHARD_HEADER * 4, int(header[2])
    if size != offset + 2 * count or not count:
        what = "truncated" if size < offset + 2 * count else "malformed"
        raise ValueError(
            f"{path}: {what} shard, header says {count} tokens, file has "
            f"{(size - offset) / 2:g}"
        )
    return np.memmap(path, "<u2", mode="r", offset=offset, shape=(count,))


def _python_files(root: Path) -> list[Path]:
    """Sources of the standard library, without site-packages and tests."""
    return sorted(
        p
        for p in root.rglob("*.py")
        if not _SKIPPED_PARTS & set(p.relative_to(root).parts)
    )


def _from_path(path: str, fraction: float) -> Corpus:
    root = Path(path).expanduser()
    try:
        folder = files.is_folder(root)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data.path: {path!r} does not exist; give a text file, a folder of text "
            "files, a token shard (*.bin) or a folder of shards, or leave it empty for "
            "the standard library's sources"
        ) from None
    if not folder and root.suffix == ".bin":
        return _from_shards(path, [root], fraction)
    if not folder:
        return _from_document(path, documents.read(root), fraction)
    inside = [p for p in sorted(root.rglob("*")) if not p.is_dir()]
    inside = [p for p in inside if not _hidden(p.relative_to(root))]
    shards = [p for p in inside if p.suffix == ".bin" and _is_shard(p)]
    if not shards:
        return _from_files(path, root, inside, fraction)
    other = [p.relative_to(root).as_posix() for p in inside if p not in set(shards)]
    notes = documents.notes([f"{x} (no token shard)" for x in other], len(inside))
    return _from_shards(path, shards, fraction)._replace(notes=notes)


def _from_files(name, root, paths, fraction) -> Corpus:
    found, notes = documents.folder(root, paths)
    if len(found) == 1:
        return _from_document(name, found[0].data, fraction)._replace(notes=notes)
    splits: dict[bool, list[bytes]] = {False: [], True: []}
    for document in found:
        splits[in_validation(document.name, fraction)].append(document.data)
    for empty in (True, False):  # Too few files for the hash.
        if not splits[empty] and len(splits[not empty]) > 1:
            splits[empty] = [splits[not empty].pop()]
    return _byte_corpus(name, splits[False], splits[True])._replace(notes=notes)


def _from_document(name, data: bytes, fraction: float) -> Corpus:
    cut = int(len(data) * (1 - fraction))
    return _byte_corpus(name, [data[:cut]], [data[cut:]])


def _byte_corpus(name, train: list[bytes], validation: list[bytes]) -> Corpus:
    def join(documents: list[bytes]) -> list[np.ndarray]:
        parts = []
        for document in documents:
            parts += [encode(document), np.array([SEPARATOR], np.uint16)]
        return [np.concatenate(parts)] if parts else []

    return Corpus(str(name), join(train), join(validation), True)


def _from_shards(name, shards, fraction) -> Corpus:
    arrays = [(p, read_shard(p)) for p in shards]
    validation = [a for p, a in arrays if _VALIDATION.search(p.name)]
    train = [a for p, a in arrays if not _VALIDATION.search(p.name)]
    if not validation and train:
        last = train.pop()
        cut = int(len(last) * (1 - fraction))
        train, validation = [*train, last[:cut]], [last[cut:]]
    return Corpus(str(name), train, validation, False)


def _is_shard(path: Path) -> bool:
    """Whether a *.bin file has the magic number of a token shard."""
    if not path.is_file():  # A pipe would wait for ever.
        return False
    header = np.fromfile(path, "<i4", 1)
    return bool(len(header) and header[0] == SHARD_MAGIC)


def _hidden(path: Path) -> bool:
    return any(files.is_hidden(part) for part in path.parts)


def bits_per_byte(nats: float, count: int) -> float:
    """Total negative log-likelihood in nats over ``count`` bytes, as bits per byte."""
    return nats / math.log(2) / count
