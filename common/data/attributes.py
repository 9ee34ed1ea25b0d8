"""The public columns that item features are made of: from the catalogue, a table of attributes, and files of vectors.

No user's events are read, so the server may open all this.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from common.data import text
from common.data.catalogue import Catalogue
from common.data.names import unknown
from common.data.paths import resolve
from common.errors import DataError
from common.features import ItemFeatures, VectorsFeature
from common.files import read_json

CATALOGUE = "data.features.columns: the catalogue"
"""What its columns are called in a message; the file is a draft that will be gone."""
_FAULTS = (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException)


class Column(NamedTuple):
    """One column of all items, and what to call it in a message.

    Attributes
    ----------
    values : Series, (I,)
        null where nothing is known.
    items : Series of str, (I,)
        Ids of the items.
    place : str
        Where the values come from.
    pattern : str, optional
        What found the values in a text.
    """

    values: pl.Series
    items: pl.Series
    place: str
    pattern: str | None = None

    def matched(self, pattern: str | None) -> "Column":
        """What the group of a pattern matches in a column of text; `DataError` where it cannot be looked for."""
        if pattern is None:
            return self
        if self.values.dtype not in (pl.String, pl.Categorical, pl.Enum, pl.Null):
            raise self.fault(f"is of type {self.values.dtype}; a pattern looks into text")
        found = self._replace(pattern=pattern)
        try:
            return found._replace(values=self.values.cast(pl.String).str.extract(pattern))
        except pl.exceptions.PolarsError:  # Rust's dialect, which takes time linear in the text's length
            raise found.fault("look-around, back-references and huge repeats are not known; write it without") from None

    def fault(self, why: str, row: int | None = None) -> DataError:
        """Build the error for a column, or for one item's value in it."""
        item = "" if row is None else f", item {self.items[row]!r}"
        by = "" if self.pattern is None else f", pattern {self.pattern!r}"
        return DataError(f"{self.place}, column {self.values.name!r}{by}{item}: {why}")


def gather(catalogue: Catalogue, config: ItemFeatures) -> dict[str, Column]:
    """Read the column of each feature, by the feature's name, one value an item in the order of their numbers.

    Items that a file lacks have null there; items that the catalogue lacks are passed over.

    Raises
    ------
    DataError
        If a file cannot be read or is not of the form described in `ItemFeatures`, if a column is missing, if an item
        comes twice, or if no item of a file is one of the catalogue's.
    """
    table = catalogue.table
    wanted = [feature.read for feature in config.columns if not isinstance(feature, VectorsFeature)]
    source, found = pl.DataFrame(), Path()
    if config.source is not None:
        found = _find("source", config.source)
        source = _joined(table["item"], _read(found, wanted), found)
    columns = {}
    for feature in config.columns:
        if isinstance(feature, VectorsFeature):
            path = _find("columns.path", feature.path)
            values, at = _vectors(table["item"], path), str(path)
        elif feature.read in source.columns:
            values, at = source[feature.read], str(found)
        elif feature.read in table.columns:
            values, at = table[feature.read], CATALOGUE
        else:
            known = list(dict.fromkeys(source.columns + table.columns))
            if config.source is None:
                raise DataError(f"{CATALOGUE} has no column {feature.read!r}; it has {', '.join(map(repr, known))}")
            raise DataError(f"{found}: {unknown('column', feature.read, known)}")
        columns[feature.name] = Column(values.alias(feature.read), table["item"], at)
    return columns


def files(config: ItemFeatures) -> list[Path]:
    """All files that features are read from; errors as in `gather`."""
    named = [] if config.source is None else [("source", config.source)]
    named += [("columns.path", feature.path) for feature in config.columns if isinstance(feature, VectorsFeature)]
    found = [_find(key, path) for key, path in named]
    return found + [_beside(path) for path in found if path.suffix == ".npy"]


def _find(key: str, path: str) -> Path:
    place = f"data.features.{key}"
    found = resolve(path, place)
    if not found.is_file():
        raise DataError(f"{place}: {found} is no file; name one")
    return found


def _beside(path: Path) -> Path:
    """The file that says whose the rows of an array are."""
    found = path.with_suffix(".items")
    if not found.is_file():
        raise DataError(f"{found}: is not there; {path.name} needs it: the id of each row's item, one a line")
    return found


def rows_of(path: Path, wanted: list[str]) -> pl.DataFrame:
    """Read ``item``, which no two rows share, and those of the wanted columns that a table of attributes has.

    Raises
    ------
    DataError
        If the file cannot be read or is not of the form described in `ItemFeatures.source`.
    """
    return _named(_read(path, wanted), path)


def _named(rows: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Rows whose ``item`` is a text, each another."""
    if rows["item"].dtype.is_nested() or rows["item"].dtype == pl.Binary:
        raise DataError(f"{path}, column 'item': is of type {rows['item'].dtype}; give each row one item's id")
    rows = rows.with_columns(pl.col("item").cast(pl.String).str.strip_chars())
    nameless = rows["item"].is_null() | (rows["item"] == "")
    if nameless.any():
        raise DataError(f"{path}: row {nameless.arg_max()} has no item (rows from 0); give each row its item's id")
    if rows["item"].is_duplicated().any():
        twice = rows["item"].filter(rows["item"].is_duplicated())[0]
        raise DataError(f"{path}: item {twice!r} comes twice; keep one row an item")
    return rows


def _joined(items: pl.Series, rows: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Put rows, which have a column ``item``, into the order of the items."""
    rows = _named(rows, path).join(items.to_frame("item"), on="item", how="semi", maintain_order="left")
    if rows.is_empty():
        raise DataError(
            f"{path}: none of its items is in the catalogue, which has e.g. {items[0]!r}; are ids the same?"
        )
    return items.to_frame("item").join(rows, on="item", how="left", maintain_order="left")


def _read(path: Path, wanted: list[str]) -> pl.DataFrame:
    """Read ``item`` and those of the wanted columns that a table of attributes has."""
    if path.suffix == ".json":
        return _mapping(path)
    if path.suffix == ".parquet":
        return _parquet(path, wanted)
    names, rows = text.headed(path, text.records(path, "\t" if path.suffix == ".tsv" else ",", quoted=True))
    short = rows.filter(pl.col("fields").list.len() != len(names))
    if short.height:
        raise DataError(f"{path}, line {short['line'][0]}: {len(short['fields'][0])} fields, expected {len(names)}")
    roles = {name: name for name in dict.fromkeys(["item", *wanted]) if name in names or name == "item"}
    return text.pick(path, rows, names, roles).drop("line")


def _parquet(path: Path, wanted: list[str]) -> pl.DataFrame:
    try:
        known = list(pl.read_parquet_schema(path))
        if "item" in known:
            columns = [name for name in dict.fromkeys(["item", *wanted]) if name in known]
            return pl.read_parquet(path, columns=columns)
    except _FAULTS as error:
        raise DataError(f"cannot read {path} as Parquet: {str(error).splitlines()[0]}") from None
    raise DataError(f"{path}: {unknown('column', 'item', known)}")


def _mapping(path: Path) -> pl.DataFrame:
    """Read item to list of values, as S3-Rec distributes attributes (Zhou et al., CIKM 2020)."""
    content = read_json(path, DataError)
    if not isinstance(content, dict) or any(not isinstance(values, list) for values in content.values()):
        raise DataError(f"{path}: expected one JSON object, item to list of values")
    values = [[str(value) for value in entry if value is not None] for entry in content.values()]
    return pl.DataFrame(
        {"item": list(content), "attributes": values}, {"item": pl.String, "attributes": pl.List(pl.String)}
    )


def _vectors(items: pl.Series, path: Path) -> pl.Series:
    """Read each item's vector: a list or an array of numbers, or null."""
    if path.suffix != ".npy":
        rows = _parquet(path, ["vector"])
        if "vector" not in rows.columns:
            raise DataError(f"{path}: no column 'vector'; give item and vector, or a .npy with items beside it")
        return _joined(items, rows, path)["vector"]
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, and a damaged one can raise nearly anything
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(matrix, np.ndarray):
        raise DataError(f"{path} is an archive of arrays (.npz); save the one array as .npy")
    beside = _beside(path)
    ids = text.lines(text.decode(beside))["text"]
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu" or len(matrix) != len(ids) or not matrix.size:
        expected = f"one row of numbers for each of the {len(ids)} lines of {beside.name}"
        raise DataError(f"{path} is {matrix.dtype} {matrix.shape}, expected {expected}")
    places = _joined(items, pl.DataFrame({"item": ids, "place": range(len(ids))}), beside)["place"]
    rows = matrix[places.fill_null(0).to_numpy()]  # of a mapped file, so that only the catalogue's rows are read
    rows = rows.astype(np.float64 if rows.dtype == np.float64 else np.float32)  # polars has no arrays of halves
    vectors = pl.DataFrame({"vector": rows, "known": places.is_not_null()})
    return vectors.select(pl.when("known").then("vector").alias("vector"))["vector"]
