"""Readers of MovieLens into the arrays of ``data.ctr``.

``data.fetch`` downloads MovieLens-100k. The error for a malformed line has its number;
``progress`` is called with (bytes read, size of the file) for each file in turn.
"""

import csv
from array import array
from pathlib import Path

import numpy as np

from jaxpapers.data.ctr import Clicks
from jaxpapers.data.ctr_tasks import Ratings, task_rating
from jaxpapers.data.ids import categories
from jaxpapers.data.lines import Progress, records


def ml_100k(folder: str | Path, *, category: str = "first") -> Ratings:
    """Reads MovieLens-100k in RecBole's atomic files (``data.fetch.get("ml-100k")``).

    Args:
      folder: with ml-100k.inter and ml-100k.item.
      category: "first" genre of a film (19) or its "combination" of genres (216).

    Raises:
      ValueError: unknown category, or a malformed line.
    """

    def film(line: str) -> tuple[int, str]:
        item, _, _, genres = line.split("\t")
        return int(item) + 1, genres

    def rated(line: str) -> tuple[int, int, float, int]:
        user, item, rating, time = line.split("\t")
        return int(user), int(item), float(rating), int(time)

    genres = dict(records(Path(folder) / "ml-100k.item", film, header=True))
    table, cates = categories(genres, category)
    inter = Path(folder) / "ml-100k.inter"
    return _ratings(inter, rated, table, cates, None)


def movielens_20m(
    ratings: str | Path,
    movies: str | Path,
    *,
    train_users: int = 100_000,
    category: str = "first",
    seed: int = 1234,
    progress: Progress | None = None,
) -> Clicks:
    """MovieLens-20M in DIN's protocol: is a film rated 4 or more.

    The paper does not say which of several genres is the category, nor whether histories
    have films rated below 4; here, as in ``ctr_tasks.task_rating``, the first genre, and
    only films rated 4 or more.

    Args:
      ratings: ratings.csv with the header userId,movieId,rating,timestamp.
      movies: movies.csv with the header movieId,title,genres.
      train_users: number of random users in the training split.
      category: "first" genre or the "combination" of genres.
      seed: of the permutation of users.
      progress: see the module.
    """

    def film(line: str) -> tuple[int, str]:
        item, _, genres = next(csv.reader([line]))
        return int(item) + 1, genres.replace(" ", "-")

    def rated(line: str) -> tuple[int, int, float, int]:
        user, item, rating, time = line.split(",")
        return int(user), int(item), float(rating), int(time)

    genres = dict(records(movies, film, header=True, progress=progress))
    table, cates = categories(genres, category)
    data = _ratings(Path(ratings), rated, table, cates, progress)
    users = len(np.unique(data.user))
    if not 0 < train_users < users:
        raise ValueError(
            f"train_users must be between 1 and {users - 1}, the users in {ratings}, "
            f"got {train_users}"
        )
    return task_rating(data, test_users=users - train_users, seed=seed)


def _ratings(path, parse, table, cates, progress) -> Ratings:
    columns = array("i"), array("i"), array("f"), array("i")

    def rated(line: str) -> None:
        who, what, stars, when = parse(line)
        if who < 1 or not 1 <= what < len(table) - 1:
            raise ValueError(f"user {who}, item {what}")
        if not 0 <= stars <= 5:
            raise ValueError(f"rating {stars}")
        for column, value in zip(columns, (who + 1, what + 1, stars, when)):
            column.append(value)

    for _ in records(path, rated, header=True, progress=progress):
        pass
    user, item, rating, time = (np.array(x) for x in columns)
    if not len(user):
        raise ValueError(f"{path}: no ratings")
    rows = {"user": int(user.max()) + 1, "item": len(table), "cate": cates}
    return Ratings(user, item, rating, time, table, rows)
