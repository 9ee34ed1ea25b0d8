"""From a data section of the configuration to a prepared folder in the cache: read once, memory-mapped ever after."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from common.config import digest
from common.data import attributes, itemrows, readers, rules, synthetic
from common.data import folder as disk
from common.data.catalogue import Catalogue
from common.data.heldout import hold_out
from common.data.holdout import cold_of
from common.data.sequences import Sequences
from common.errors import DataError
from common.files import sha256, write_json
from common.sources import DataConfig, SyntheticData


def prepare(config: DataConfig) -> Path:
    """Give the prepared folder of a data section, made now unless an intact one is in the cache.

    The cache is $HUSHREC_CACHE, or $XDG_CACHE_HOME/hushrec, or ~/.cache/hushrec.

    Raises
    ------
    DataError
        If the source cannot be read, or its filters leave nothing.
    """
    files = [*readers.files(config), *attributes.files(config.features)]
    names = [file.name for file in files]
    named = (name if names.index(name) == i else f"{name} ({i})" for i, name in enumerate(names))
    sums = {name: sha256(file, DataError) for name, file in zip(named, files, strict=True)}
    options = config.model_dump(mode="json", exclude={"path"})  # where files lie changes nothing; what they hold does
    key = digest({"format": disk.FORMAT, "options": options, "files": sums})
    target = _cache() / f"{_name(config)}-{key}"
    if target.exists():
        if intact(target):
            return target
        shutil.rmtree(target, ignore_errors=True)
    with disk.being_made(target) as draft:
        facts = _write(config, draft)
        facts |= {"kept": {**facts["kept"], "events": hold_out(config, draft, facts)}}
        source = {"kind": config.kind, "path": getattr(config, "path", None), "files": sums}
        manifest = {
            "format": disk.FORMAT,
            "digest": key,
            "source": source,
            "options": config.model_dump(mode="json"),
            **facts,
        }
        write_json(draft / disk.MANIFEST, manifest, DataError)
        if config.features.columns:
            from common.data.features import fit

            known = itemrows.save(draft, fit(Catalogue.open(draft), config.features))
            write_json(draft / disk.MANIFEST, {**manifest, "features": known}, DataError)
    return target


def describe(config: DataConfig) -> dict[str, Any]:
    """Count what a source holds, and what its filters keep; prepares it on the way.

    Returns
    -------
    dict
        users, items, events, mean_length, density and tied_last_pair_share as read, before any filter (see
        `common.data.rules.measure`), and ``kept``: users, items and events.
    """
    manifest = disk.read_manifest(prepare(config))
    return {**manifest["read"], "kept": manifest["kept"]}


def bad_rows(folder: Path) -> str:
    """One line on the malformed rows that a prepared data set left out; empty where there were none."""
    found = disk.read_manifest(folder)["bad_rows"]
    lines = ", ".join(map(str, found["first_lines"]))
    return f"{found['count']:,} malformed row(s) left out, first on line {lines}" if found["count"] else ""


def intact(folder: Path) -> bool:
    """Tell whether a prepared folder is there, whole and of today's format."""
    try:
        sequences, manifest = Sequences.open(folder), disk.read_manifest(folder)
        items = sequences.items
        if len(items) and not (items.min() >= 0 and items.max() < manifest["kept"]["items"]):
            return False
        if not sequences.ordered():
            return False
        for name in manifest["extras"]:
            disk.load_array(folder, name, len(items))
        if "behaviours" in manifest["extras"]:
            codes = disk.load_array(folder, "behaviours", len(items))
            if len(codes) and not (codes.min() >= 0 and codes.max() < len(manifest["behaviours"])):
                return False
        if "domains" in manifest:
            disk.load_array(folder, disk.DOMAINS, manifest["kept"]["items"])
        for name in (disk.USERS, disk.CATALOGUE):
            pl.read_parquet_schema(folder / name)
        itemrows.load(folder)
    except (DataError, OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return False
    return True


def _write(config: DataConfig, draft: Path) -> dict[str, Any]:
    """Write everything but the split and the manifest; give the manifest's facts."""
    write: Callable[..., dict[str, Any]] = _write_table
    if (
        isinstance(config, SyntheticData)
        and not config.cold
        and max(config.min_user_events, config.min_item_events) <= 1
    ):
        write = synthetic.write  # nothing to filter, so the whole need not be in memory at once
    return write(config, draft)


def _write_table(config: DataConfig, draft: Path) -> dict[str, Any]:
    table = readers.read(config)
    if config.split == "global-time" and not table.timed:
        raise DataError("data.split=global-time needs times, and this source has none; use leave-one-out")
    whole = rules.ordered(table.frame, config.target if config.ties == "target-first" else None)
    read = rules.measure(table, whole)
    frame = rules.kept(config, whole)

    catalogue = frame.select("item", *(["domain"] if "domain" in frame.columns else []))
    # By id, numbers before names: the catalogue is public, and in the order of events it would tell first histories.
    number = pl.col("item").cast(pl.Int64, strict=False)
    catalogue = catalogue.unique("item").sort(number, "item", nulls_last=True)
    numbers = catalogue.select("item", pl.int_range(pl.len(), dtype=pl.Int32).alias("number"))
    frame = frame.join(numbers, on="item", how="left", maintain_order="left")
    if config.cold:
        frame = _without_cold(frame, cold_of(config, catalogue.height))
    lengths = frame.group_by("user", maintain_order=True).len()

    arrays = {
        "items": frame["number"].to_numpy(),
        "times": frame["time"].to_numpy(),
        "offsets": np.concatenate([[0], np.cumsum(lengths["len"].to_numpy(), dtype=np.int64)]),
    }
    facts: dict[str, Any] = {"per_second": table.per_second}
    if "rating" in frame.columns:
        arrays["ratings"] = frame["rating"].to_numpy()
    if "behaviour" in frame.columns:
        arrays["behaviours"], facts["behaviours"] = _coded(frame["behaviour"])
    for name, array in arrays.items():
        np.save(draft / f"{name}.npy", array)
    lengths.select("user").write_parquet(draft / disk.USERS)
    if table.about is not None:
        catalogue = catalogue.join(table.about, on="item", how="left", maintain_order="left")
    catalogue.write_parquet(draft / disk.CATALOGUE)
    if "domain" in catalogue.columns:
        numbers_of, facts["domains"] = _coded(catalogue["domain"])
        np.save(draft / f"{disk.DOMAINS}.npy", numbers_of)
    counts = {"users": lengths.height, "items": catalogue.height, "events": frame.height}
    bad = {"count": table.bad_rows, "first_lines": table.bad_lines}
    extras = sorted(disk.EXTRAS.keys() & arrays.keys())
    return {"read": read, "kept": counts, "bad_rows": bad, "extras": extras, "timed": table.timed, **facts}


def _without_cold(frame: pl.DataFrame, cold: np.ndarray[Any, np.dtype[np.int64]]) -> pl.DataFrame:
    """Leave out all events on cold items but those that will be somebody's test item.

    That is the last event of a user of whom two others are left; with fewer all of a history is trained on.
    """
    last = pl.int_range(pl.len()).over("user") == pl.len().over("user") - 1
    warm = ~pl.col("number").is_in(cold.tolist())
    return frame.filter(warm | (last & (warm.sum().over("user") >= 2)))


def _coded(column: pl.Series) -> tuple[Any, list[str]]:
    """Give behaviours or domains as int8 codes, and their names in the order of the alphabet."""
    names = column.unique().sort().to_list()
    if len(names) > np.iinfo(np.int8).max:
        raise DataError(f"data.columns.{column.name}: {len(names)} different {column.name}s; is it the right column?")
    return column.replace_strict(names, range(len(names)), return_dtype=pl.Int8).to_numpy(), names


def _name(config: DataConfig) -> str:
    if isinstance(config, SyntheticData):
        return config.kind
    return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(config.path).stem).strip("._") or config.kind


def _cache() -> Path:
    if root := os.environ.get("HUSHREC_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hushrec"
