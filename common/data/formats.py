"""Plain files of events: pairs, sequences, RecBole's atomic files, and tables with named columns."""

from pathlib import Path

import polars as pl

from common.data import text
from common.data.names import unknown
from common.data.table import Table, checked
from common.errors import DataError
from common.sources import PairsData, RecBoleData, SequencesData, TableData


def pairs(config: PairsData, found: list[Path]) -> Table:
    """Read one ``user item`` pair a line, in time order (Kang & McAuley, ICDM 2018)."""
    names = ["user", "item"]
    raw = text.pick(found[0], text.words(found[0]), names, {name: name for name in names})
    return checked(found[0], raw, expected="'user item'", strict=config.strict)


def sequences(config: SequencesData, found: list[Path]) -> Table:
    """Read one user a line, id first, then the items in time order (Zhou et al., S3-Rec, CIKM 2020)."""
    part = pl.col("fields").list
    items = pl.when(part.len() > 1).then(part.slice(1)).otherwise([None])  # a user without items is malformed
    raw = text.words(found[0]).select("line", part.first().alias("user"), items.alias("item")).explode("item")
    return checked(found[0], raw, expected="'user item item ...'", strict=config.strict)


def recbole(config: RecBoleData, found: list[Path]) -> Table:
    """Read RecBole's ``.inter``: tab-separated, with types in the header, such as ``user_id:token``."""
    typed, rows = text.headed(found[0], text.records(found[0], "\t"))
    names = [name.partition(":")[0] for name in typed]
    optional = {"time": "timestamp", "rating": "rating"}
    roles = {"user": "user_id", "item": "item_id"} | {role: name for role, name in optional.items() if name in names}
    raw = text.pick(found[0], rows, names, roles)
    return checked(found[0], raw, expected=repr("\t".join(typed)), strict=config.strict)


def table(config: TableData, found: list[Path]) -> Table:
    """Read a CSV, TSV or Parquet file with named columns."""
    roles = {role: name for role, name in config.columns.model_dump().items() if name is not None}
    if found[0].suffix == ".parquet":
        raw = _parquet(found[0], roles)
    else:
        names, rows = text.headed(found[0], text.records(found[0], config.separator, quoted=True))
        raw = text.pick(found[0], rows, names, roles)
    expected = repr(config.separator.join(roles.values()))
    if config.time_format is not None:
        expected += f" with times as {config.time_format!r}"
    return checked(found[0], raw, expected=expected, strict=config.strict, time_format=config.time_format)


def _parquet(path: Path, roles: dict[str, str]) -> pl.DataFrame:
    try:
        known = list(pl.read_parquet_schema(path))
        for name in roles.values():
            if name not in known:
                raise DataError(f"{path}: {unknown('column', name, known)}")
        frame = pl.read_parquet(path, columns=list(dict.fromkeys(roles.values())))
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"cannot read {path} as Parquet: {str(error).splitlines()[0]}") from None
    columns = [pl.col(name).alias(role) for role, name in roles.items()]
    return frame.select(pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).alias("line"), *columns)
