"""From a data section of the configuration to a table of events: which files, and who reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.data import formats, movielens, synthetic
from common.data.paths import resolve
from common.data.table import Table
from common.errors import DataError
from common.files import explained
from common.sources import DataConfig, SyntheticData

READERS: dict[str, Callable[[Any, list[Path]], Table]] = {
    "movielens": movielens.read,
    "pairs": formats.pairs,
    "sequences": formats.sequences,
    "recbole": formats.recbole,
    "table": formats.table,
    "synthetic": synthetic.table,
}
"""Every kind of source; each reader gets the section and the files from `files`."""


def read(config: DataConfig) -> Table:
    """Read a source.

    Raises
    ------
    DataError
        If a file is missing, unreadable, empty, not of the expected form, or, with ``strict``, not wholly so.
    """
    return READERS[config.kind](config, files(config))


def files(config: DataConfig) -> list[Path]:
    """All files that a source is read from, the events' file first.

    Raises
    ------
    DataError
        If the path is missing, or is a folder in which the file cannot be told.
    """
    if isinstance(config, SyntheticData):
        return []
    path = resolve(config.path, "data.path")
    with explained(path, DataError):
        if config.kind == "movielens":
            return movielens.files(path)
        if not path.is_dir():
            return [path]
        inside = sorted(child for child in path.iterdir() if child.is_file())
    atomic = [child for child in inside if child.suffix == ".inter"]
    if config.kind == "recbole" and len(atomic) == 1:
        return atomic
    names = ", ".join(child.name for child in inside[:8]) or "nothing"
    raise DataError(f"data.path: {path} is a folder, name one of its files ({names})")
