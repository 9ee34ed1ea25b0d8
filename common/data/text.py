"""Text files to polars frames of strings, with the number of every line, so that a bad row can be named.

Frames hold a column ``line`` (u32, from 1) and one column per role: user, item, time, rating, behaviour, domain. A line
with too few or too many fields has nulls everywhere; `common.data.table.checked` counts it.
"""

import csv
import io
from pathlib import Path

import polars as pl

from common.data.names import unknown
from common.errors import DataError
from common.files import explained


def decode(path: Path, encoding: str = "utf-8") -> str:
    """Read a whole text file.

    Raises
    ------
    DataError
        If it cannot be read, is binary, or is encoded otherwise; it names the line.
    """
    with explained(path, DataError):
        raw = path.read_bytes()
    if b"\0" in raw:
        raise DataError(f"{path} is not a text file (packed, binary or UTF-16?)")
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not {encoding.upper()}; convert it, e.g. iconv -f LATIN1 -t UTF-8"
        ) from None


def lines(text: str) -> pl.DataFrame:
    """Cut a text into lines that are not blank, as columns ``line`` (u32) and ``text`` (str)."""
    cut = pl.Series("text", [text]).str.split("\n").explode()
    numbered = cut.str.strip_chars_end("\r").to_frame().with_row_index("line", offset=1)
    return numbered.filter(pl.col("text").str.contains(r"\S"))


def words(path: Path) -> pl.DataFrame:
    """Cut a file's lines at white space, as columns ``line`` and ``fields`` (list of str)."""
    return lines(decode(path)).select("line", pl.col("text").str.extract_all(r"\S+").alias("fields"))


def records(path: Path, separator: str, *, quoted: bool = False, encoding: str = "utf-8") -> pl.DataFrame:
    """Cut a file's lines at a separator, as columns ``line`` and ``fields`` (list of str).

    With `quoted` a field may stand in double quotes (RFC 4180) and then hold separators and line ends; ``line`` is the
    record's last one.
    """
    text = decode(path, encoding)
    if quoted and '"' in text:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        try:
            rows = [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from None
        return pl.DataFrame(rows, schema={"line": pl.UInt32, "fields": pl.List(pl.String)}, orient="row")
    return lines(text).select("line", pl.col("text").str.split(separator).alias("fields"))


def headed(path: Path, found: pl.DataFrame) -> tuple[list[str], pl.DataFrame]:
    """Split records into the names of the first one and all others.

    Raises
    ------
    DataError
        If there is nothing but a header, or not even that, or if a name comes twice.
    """
    if found.height < 2:
        raise DataError(f"{path} has no rows" if found.height else f"{path} is empty")
    names = [name.strip() for name in found["fields"][0]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} has two columns {twice!r}")
    return names, found.slice(1)


def pick(path: Path, found: pl.DataFrame, names: list[str], roles: dict[str, str]) -> pl.DataFrame:
    """Take the columns that play a role out of records.

    Parameters
    ----------
    path : Path
        For messages.
    found : DataFrame
        From `records` or `words`.
    names : list of str
        Names of all fields of a record.
    roles : dict
        Role to name, such as ``{"user": "userId"}``.

    Raises
    ------
    DataError
        If a name is missing; it names the nearest one.
    """
    for name in roles.values():
        if name not in names:
            raise DataError(f"{path}: {unknown('column', name, names)}")
    whole = pl.col("fields").list.len() == len(names)
    fields = [
        pl.when(whole).then(pl.col("fields").list.get(names.index(name), null_on_oob=True)).alias(role)
        for role, name in roles.items()
    ]
    return found.select("line", *fields)
