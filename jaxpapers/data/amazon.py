"""Lines of Amazon's review and meta files: the releases of 2014, 2018 and 2023.

========  ===========================================  ===================================
release   a review has                                 a product has
========  ===========================================  ===================================
2014      reviewerID, asin, unixReviewTime (seconds)   asin, categories: a list of paths
2018      the same                                     asin, category: a path
2023      user_id, parent_asin, timestamp              parent_asin, categories: a path
          (milliseconds)
========  ===========================================  ===================================

A path is a list of names, from the department down. Categories may be absent or empty.
"""

from typing import Any, NamedTuple

from jaxpapers.data.lines import literal, seconds

_REVIEWS = {
    "2014 or 2018": ("reviewerID", "asin", "unixReviewTime"),
    "2023": ("user_id", "parent_asin", "timestamp"),
}


# Seconds of the years 1973 to 5138; as milliseconds, of 1970 to 1973.
_LIKE_SECONDS = 10**8, 10**11


class Review(NamedTuple):
    """Who reviewed what, and when in seconds."""

    user: str
    item: str
    time: int


class Product(NamedTuple):
    """A product's id and its paths of categories; () without any."""

    item: str
    paths: tuple[tuple[str, ...], ...]


class Reviews:
    """Reads the lines of one file of reviews; all must be of one release.

    Attributes:
      release: of the file, "" before its first line.
    """

    def __init__(self):
        self.release = ""

    def __call__(self, line: str) -> Review:
        """The review of a line (ValueError)."""
        row = literal(line)
        release = next(
            (name for name, keys in _REVIEWS.items() if all(k in row for k in keys)), ""
        )
        if not release or self.release not in ("", release):
            raise ValueError(
                f"expected a review of {self.release or 'one of the releases'}, by keys "
                + " or ".join(f"{', '.join(k)} ({n})" for n, k in _REVIEWS.items())
                + f", got {_listed(row)}"
            )
        self.release = release
        user, item, time = (row[key] for key in _REVIEWS[release])
        return Review(_name(user, "user"), _name(item, "product"), _time(time, release))


def product(line: str) -> Product:
    """The product of a line of a meta file (ValueError)."""
    row = literal(line)
    key = "parent_asin" if "parent_asin" in row else "asin"
    if key not in row:
        raise ValueError(
            f"expected a product with asin or parent_asin, got the keys {_listed(row)}"
        )
    value = row.get("categories") or row.get("category")
    return Product(_name(row[key], "product"), _paths(value))


def _name(value: Any, kind: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"the {kind} must be a text, got {value!r:.60}")
    return value


def _time(value: Any, release: str) -> int:
    if type(value) not in (int, float):
        raise ValueError(f"the time must be a number, got {value!r:.60}")
    if release != "2023":
        return seconds(value)
    if _LIKE_SECONDS[0] <= value < _LIKE_SECONDS[1]:
        raise ValueError(f"expected a time in milliseconds, got {value}: seconds?")
    return seconds(value // 1000)


def _paths(value: Any) -> tuple[tuple[str, ...], ...]:
    """Paths that are not empty, of a list of them or of a single one."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"categories must be a list, got {value!r:.60}")
    paths = value if all(isinstance(x, list) for x in value) else [value]
    if not all(isinstance(name, str) for path in paths for name in path):
        raise ValueError(
            f"categories must be names or lists of names, got {value!r:.60}"
        )
    named = (tuple(name for name in path if name) for path in paths)
    return tuple(path for path in named if path)


def _listed(row: dict) -> str:
    return ", ".join(str(key) for key in row)[:120] or "none"
