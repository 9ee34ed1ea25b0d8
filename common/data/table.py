"""A checked table of events, whatever file it came from."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from common.errors import DataError

_SHOWN = 5
_YEAR = re.compile(r"%[-_0]?[YyFDcxsGC+]")


@dataclass(frozen=True)
class Table:
    """Events in the file's order.

    Attributes
    ----------
    frame : DataFrame
        user: str, item: str, time: i64 (the row's number where the file has no times), and where known
        rating: f32 (NaN where a row has none), behaviour: str, domain: str.
    timed : bool
        Whether the file has times, or its order is the time order.
    bad_rows : int
        Number of malformed rows that were left out.
    bad_lines : list of int
        Where the first of them stand, counted from 1.
    about : DataFrame or None
        item: str, and title: str, genres: list[str] of the catalogue, where known.
    per_second : int
        Units of time in a second; numbers without fractions are taken for seconds.
    """

    frame: pl.DataFrame
    timed: bool
    bad_rows: int = 0
    bad_lines: list[int] = field(default_factory=list)
    about: pl.DataFrame | None = None
    per_second: int = 1


def checked(
    path: Path,
    raw: pl.DataFrame,
    *,
    expected: str,
    strict: bool,
    time_format: str | None = None,
    about: pl.DataFrame | None = None,
) -> Table:
    """Give the columns their types and put malformed rows aside.

    Parameters
    ----------
    path : Path
        For messages.
    raw : DataFrame
        ``line``, and a column per role: strings, or whatever a Parquet file holds.
    expected : str
        What a row should look like, for messages.
    strict : bool
        Refuse malformed rows instead of leaving them out.
    time_format : str, optional
        strptime format of the times.
    about : DataFrame, optional
        Goes into the table as it is.

    Raises
    ------
    DataError
        If no row is good, or if one is bad and `strict`.
    """
    try:
        time, per_second = _time(raw, path, time_format) if "time" in raw.columns else (None, 1)
        typed = raw.select("line", *_typed(raw, time))
    except pl.exceptions.PolarsError as error:  # a Parquet column of lists, say
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from None
    timed = time is not None
    if not timed:
        typed = typed.with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("time"))
    good = pl.all_horizontal(pl.exclude("line").is_not_null())
    bad = typed.filter(~good)["line"].unique(maintain_order=True)  # one line may hold many events
    where = f"{len(bad)} malformed row(s), first on line {', '.join(map(str, bad.head(_SHOWN)))}; expected {expected}"
    if len(bad) and strict:
        raise DataError(f"{path}: {where}; strict: true refuses them")
    frame = typed.filter(good).drop("line")
    if frame.is_empty():
        raise DataError(f"{path} holds no events: {where}" if len(bad) else f"{path} is empty")
    return Table(frame, timed, len(bad), bad.head(_SHOWN).to_list(), about, per_second)


def _typed(raw: pl.DataFrame, time: pl.Expr | None) -> list[pl.Expr]:
    names = [role for role in ("user", "item", "behaviour", "domain") if role in raw.columns]
    columns: dict[str, pl.Expr] = {role: _name(role) for role in names}
    if "domain" in columns:
        columns["item"] = pl.concat_str(columns["domain"], columns["item"], separator="/")
    if "rating" in raw.columns:
        rating = pl.col("rating").cast(pl.Float32, strict=False)
        empty = pl.col("rating").is_null() | (pl.col("rating").cast(pl.String, strict=False) == "")
        columns["rating"] = pl.when(empty).then(float("nan")).otherwise(pl.when(rating.is_finite()).then(rating))
    if time is not None:
        columns["time"] = time
    return [expression.alias(role) for role, expression in columns.items()]


def _name(role: str) -> pl.Expr:
    """Ids are names, never numbers; an empty one is no id."""
    text = pl.col(role).cast(pl.String, strict=False).str.strip_chars()
    return pl.when(text != "").then(text)


def _time(raw: pl.DataFrame, path: Path, time_format: str | None) -> tuple[pl.Expr, int]:
    """Read times as integers: numbers as they are, dates and fractions in microseconds; and units in a second."""
    time = pl.col("time")
    if raw["time"].dtype.is_temporal():
        return time.cast(pl.Datetime("us"), strict=False).cast(pl.Int64), 10**6
    if time_format is not None:
        return _date(raw, path, time_format).cast(pl.Int64), 10**6
    if raw["time"].dtype == pl.String:
        time = time.str.strip_chars()
    whole, number = time.cast(pl.Int64, strict=False), time.cast(pl.Float64, strict=False)
    if raw["time"].dtype.is_float() or raw.select(whole.is_null().any()).item():
        fractions = (number != number.floor()) & number.is_finite()
        if raw.select(fractions.any()).item():
            return (number * 1e6).round().cast(pl.Int64, strict=False), 10**6
        return pl.coalesce(whole, number.cast(pl.Int64, strict=False)), 1
    return whole, 1


def _date(raw: pl.DataFrame, path: Path, time_format: str) -> pl.Expr:
    # chrono's name for a fraction of a second; plain `.%f` would read its digits as nanoseconds.
    pattern, text = time_format.replace(".%f", "%.f"), pl.col("time").cast(pl.String).str.strip_chars()
    if not _YEAR.search(pattern):
        pattern, text = f"%Y {pattern}", pl.lit("2000 ") + text  # a leap year, so that 29 February exists
    return text.str.strptime(pl.Datetime("us"), pattern, strict=False)
