"""MovieLens as GroupLens distributes it, in its three forms (Harper & Konstan, ACM TiiS 5(4), 2015).

========  ==========================  =================================  ========
ratings   form                        titles and genres beside it        releases
========  ==========================  =================================  ========
u.data    user TAB item TAB ...       u.item (``|``), names in u.genre   100k
.dat      user::item::rating::time    movies.dat (``::``)                1m, 10m
.csv      header userId,movieId,...   movies.csv                         20m, 25m, 32m, latest
========  ==========================  =================================  ========

Titles of the first two are Latin-1.
"""

from pathlib import Path

import polars as pl

from common.data import text
from common.data.table import Table, checked
from common.errors import DataError
from common.sources import MovieLensData

_FIELDS = ["user", "item", "rating", "time"]
_TITLES = {"u.data": ("u.item", "u.genre"), "ratings.dat": ("movies.dat",), "ratings.csv": ("movies.csv",)}
_NO_GENRES = "(no genres listed)"


def files(path: Path) -> list[Path]:
    """Find the ratings in a folder, and the titles beside them.

    Returns
    -------
    list of Path
        The ratings first.

    Raises
    ------
    DataError
        If there are no ratings.
    """
    ratings = path
    if path.is_dir():
        present = [path / name for name in _TITLES if (path / name).is_file()]
        if not present:
            found = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
            raise DataError(f"{path} has none of {', '.join(_TITLES)}; it holds {found}")
        ratings = present[0]
    beside = [ratings.with_name(name) for name in _TITLES.get(_form(ratings), ())]
    return [ratings, *(file for file in beside if file.is_file())]


def _form(ratings: Path) -> str:
    """Name of the release whose form the file has: by its suffix, for it may have been given another name."""
    return {".csv": "ratings.csv", ".dat": "ratings.dat"}.get(ratings.suffix, "u.data")


def read(config: MovieLensData, found: list[Path]) -> Table:
    """Read ratings, titles and genres."""
    path, form, beside = found[0], _form(found[0]), {file.name: file for file in found[1:]}
    if form == "ratings.csv":
        names, rows = text.headed(path, text.records(path, ",", quoted=True))
        roles = dict(zip(_FIELDS, ("userId", "movieId", "rating", "timestamp"), strict=True))
        expected = "userId,movieId,rating,timestamp"
    else:
        separator = "\t" if form == "u.data" else "::"
        names, rows = _FIELDS, text.records(path, separator)
        roles, expected = dict(zip(_FIELDS, _FIELDS, strict=True)), repr(separator.join(_FIELDS))
    raw = text.pick(path, rows, names, roles)
    return checked(path, raw, expected=expected, strict=config.strict, about=_about(beside))


def _about(beside: dict[str, Path]) -> pl.DataFrame | None:
    """Titles and genres: item, title (str), genres (list of str)."""
    if "u.item" in beside:
        return _flags(beside["u.item"], beside.get("u.genre"))
    if "movies.dat" in beside:
        fields = text.records(beside["movies.dat"], "::", encoding="latin-1")
    elif "movies.csv" in beside:
        fields = text.records(beside["movies.csv"], ",", quoted=True)
    else:
        return None
    part = pl.col("fields").list
    known = fields.filter(part.len() == 3).select(
        part.get(0).alias("item"),
        part.get(1).alias("title"),
        part.get(2).replace(_NO_GENRES, "").str.extract_all(r"[^|]+").alias("genres"),
    )
    return known.unique("item", keep="first", maintain_order=True)


def _flags(titles: Path, genres: Path | None) -> pl.DataFrame:
    """Titles with a 0/1 flag per genre in the last fields, the genres' names in a file of ``name|number`` lines."""
    names = [] if genres is None else [fields[0] for fields in _latin(genres, "|")]
    rows = []
    for fields in _latin(titles, "|"):
        if len(fields) >= 2 + len(names):
            flags = zip(names, fields[len(fields) - len(names) :], strict=True)
            rows.append((fields[0], fields[1], [name for name, flag in flags if flag == "1"]))
    schema: dict[str, pl.DataType] = {"item": pl.String(), "title": pl.String(), "genres": pl.List(pl.String)}
    return pl.DataFrame(rows, schema=schema, orient="row").unique("item", keep="first", maintain_order=True)


def _latin(path: Path, separator: str) -> list[list[str]]:
    return text.records(path, separator, encoding="latin-1")["fields"].to_list()
