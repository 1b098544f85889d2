"""Readers of MovieLens into the arrays of ``data.ctr``.

``data.fetch`` downloads MovieLens-100k. The error for a malformed line has its number;
``progress`` is called with (bytes read, size of the file) for each file in turn.
"""

from array import array
from pathlib import Path

import numpy as np

from jaxpapers.data.ctr import OOV, Clicks
from jaxpapers.data.ctr_tasks import Ratings, task_rating
from jaxpapers.data.ids import categories, check_highest
from jaxpapers.data.lines import Progress, fields, identity, number, rows, seconds

_LEAST = 0.5  # share of the ratings whose film must be in the films' file


def ml_100k(folder: str | Path, *, category: str = "first", max_id: int = 0) -> Ratings:
    """Reads MovieLens-100k in RecBole's atomic files (``data.fetch.get("ml-100k")``).

    Args:
      folder: with ml-100k.inter and ml-100k.item.
      category: "first" genre of a film (19) or its "combination" of genres (216).
      max_id: highest id of a user or a film, see ``ids.check_highest``.

    Raises:
      FileNotFoundError: a missing file.
      ValueError: unknown category, other columns, or a malformed line.
    """
    names = ("item_id", "class"), ("user_id", "item_id", "rating", "timestamp")
    paths = (Path(folder) / f"ml-100k.{suffix}" for suffix in ("item", "inter"))
    (films, inter), split = paths, lambda line: line.split("\t")
    table, cates = _films(films, names[0], split, category, max_id, None)
    return _ratings(inter, names[1], split, table, cates, max_id, None)


def movielens_20m(
    ratings: str | Path,
    movies: str | Path,
    *,
    train_users: int = 100_000,
    category: str = "first",
    seed: int = 1234,
    max_id: int = 0,
    progress: Progress | None = None,
) -> Clicks:
    """MovieLens-20M in DIN's protocol: is a film rated 4 or more.

    The paper does not say which of several genres is the category, nor whether histories
    have films rated below 4; here, as in ``ctr_tasks.task_rating``, the first genre, and
    only films rated 4 or more.

    Args:
      ratings: ratings.csv with the columns userId,movieId,rating,timestamp, by the
        header's names or, without a header, in this order.
      movies: movies.csv with the columns movieId,title,genres, likewise.
      train_users: number of random users in the training split.
      category: "first" genre or the "combination" of genres.
      seed: of the permutation of users.
      max_id: highest id of a user or a film, see ``ids.check_highest``.
      progress: see the module.
    """

    names = ("movieId", "title", "genres"), ("userId", "movieId", "rating", "timestamp")
    table, cates = _films(movies, names[0], fields, category, max_id, progress)
    data = _ratings(ratings, names[1], fields, table, cates, max_id, progress)
    users = len(np.unique(data.user))
    if not 0 < train_users < users:
        raise ValueError(
            f"train_users must be between 1 and {users - 1}, the users in {ratings}, "
            f"got {train_users}"
        )
    clicks = task_rating(data, test_users=users - train_users, seed=seed)
    share = float((data.cate[data.item] != OOV).mean())
    return clicks._replace(notes=f"films of {share:.1%} of the ratings are known")


def _films(path, names, split, category, max_id, progress) -> tuple[np.ndarray, int]:
    """Category of each row of the item table, and the size of the category table."""

    def film(item: str, *rest: str) -> tuple[int, str]:
        return identity(item, 1) + 1, rest[-1].replace(" ", between)

    # RecBole separates genres by spaces, GroupLens by "|".
    between = " " if names[-1] == "class" else "-"
    genres: dict[int, str] = {}
    for item, text in rows(path, names, film, split=split, progress=progress):
        if item in genres:
            raise ValueError(f"{path}: the film {item - 1} is there twice")
        genres[item] = text
    check_highest(f"{path}: films", max(genres, default=1) - 1, len(genres), max_id)
    return categories(genres, category)


def _ratings(path, names, split, table, cates, max_id, progress) -> Ratings:
    columns: tuple[array, ...] = array("i"), array("i"), array("f"), array("i")

    def rated(user: str, item: str, rating: str, time: str) -> None:
        who, what, when = identity(user, 1), identity(item, 1), seconds(time)
        if what >= len(table) - 1:
            raise ValueError(f"the film {what} is not among the {len(table) - 2} films")
        values = who + 1, what + 1, number(rating, 0.0, 5.0), when
        for column, value in zip(columns, values):
            column.append(value)

    for _ in rows(path, names, rated, split=split, progress=progress):
        pass
    user, item, rating, time = (np.array(x) for x in columns)
    if not len(user):
        raise ValueError(f"{path}: no ratings")
    share = float((table[item] != OOV).mean())
    if share < _LEAST:
        raise ValueError(
            f"{path}: only {share:.1%} of {len(item):,} ratings are of films in the "
            f"films' file, "
            f"expected at least {_LEAST:.0%}; give that of the same release"
        )
    check_highest(f"{path}: users", int(user.max()) - 1, len(user), max_id)
    sizes = {"user": int(user.max()) + 1, "item": len(table), "cate": cates}
    return Ratings(user, item, rating, time, table, sizes)
