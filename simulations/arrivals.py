"""Items that came after training, of which nothing but features is known: `hushrec recommend --new`."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import Tensor

from client.device import Device
from common.data import itemrows
from common.data.attributes import rows_of
from common.data.features import apply
from common.errors import DataError, UsageError
from common.files import read_json
from common.models.items import later_vectors


class Arrivals(NamedTuple):
    """n of them."""

    ids: list[str]
    """As the file has them."""
    titles: list[str]
    """The id where none is told."""
    vectors: Tensor
    """Made of their features, ``(n, D)``."""
    domains: NDArray[np.int8] | None
    """Numbers of their domains, ``(n,)``, where there are several."""


def read(path: Path, device: Device, table: Tensor) -> Arrivals:
    """Read new items, and make their vectors by what was fitted on the catalogue.

    Parameters
    ----------
    path : Path
        Of the form of `data.features.source`: ``item``, perhaps ``title``, and the columns that features are read from;
        of a feature of vectors a column by its name. With several domains items are called ``domain/item``.
    device : Device
        The run's data.
    table : Tensor
        As trained, ``(R, D)``.

    Raises
    ------
    UsageError
        Where the run's items are not made of features.
    DataError
        Where the file cannot be read or lacks a column, an item is in the catalogue or of no known domain, or nothing
        is known of it.
    """
    experiment, catalogue = device.experiment, device.catalogue
    if experiment.model.items == "own":
        raise UsageError(
            "--new: model.items is own, so a new item has nothing to be known by; train with features or both"
        )
    fitted = read_json(catalogue.folder / itemrows.FITTED, DataError)
    wanted = [column["column"] for column in fitted["columns"]]
    rows = rows_of(path, [*wanted, "title"])
    if not rows.height:
        raise DataError(f"{path}: holds no item")
    if lacking := [name for name in wanted if name not in rows.columns]:
        raise DataError(f"{path}: no column {lacking[0]!r}; new items want {', '.join(dict.fromkeys(wanted))}")
    made = itemrows.rows_of(apply(fitted, rows, str(path)))
    ids, known = rows["item"].to_list(), set(catalogue.item_ids())
    told = itemrows.told(made, fitted)  # (I, F)
    for item, something in zip(ids, told.sum(1), strict=True):
        if item in known:
            raise DataError(f"{path}: item {item!r} is in the catalogue already; leave it out")
        if not something:
            raise DataError(
                f"{path}: item {item!r} has no value that training knew, in {', '.join(wanted)}; leave it out"
            )
    titles = ids
    if "title" in rows.columns and not rows["title"].dtype.is_nested():
        titles = rows["title"].cast(pl.String).replace("", None).fill_null(rows["item"]).to_list()
    vectors = later_vectors(experiment, made, table, catalogue.items)
    return Arrivals(ids, titles, vectors, _domains(path, device, ids))


def _domains(path: Path, device: Device, ids: list[str]) -> NDArray[np.int8] | None:
    names = device.sequences.domain_names
    if device.sequences.domains is None:
        return None
    found = [max((name for name in names if item.startswith(f"{name}/")), key=len, default=None) for item in ids]
    if None in found:
        item = ids[found.index(None)]
        raise DataError(
            f"{path}: item {item!r} is of no domain; call it {names[0]}/{item}, or of {', '.join(names[1:])}"
        )
    return np.array([names.index(name) for name in found if name is not None], dtype=np.int8)
