"""A device's own file: one user's events out of a prepared data set, numbered by the same public catalogue."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data import folder as disk
from common.data.sequences import Sequences
from common.errors import DataError
from common.files import write_json


def extract(prepared: Path, user: int, target: Path) -> Path:
    """Write a prepared folder that holds one user only.

    A node whose config names it as ``data-path`` is that user's device: training there gives the same update as in a
    simulation of everybody.

    Parameters
    ----------
    prepared : Path
        The whole population's folder.
    user : int
        Number of the user.
    target : Path
        The new folder; must not exist.

    Returns
    -------
    Path
        `target`.

    Raises
    ------
    DataError
        Where there is no such user or the folder cannot be written.
    """
    whole, manifest = Sequences.open(prepared), disk.read_manifest(prepared)
    if user not in whole:
        raise DataError(f"{prepared}: has no user {user}; users are {whole.first} to {whole.first + len(whole) - 1}")
    if target.exists():
        raise DataError(f"{target}: exists already; remove it or choose another name")
    row = user - whole.first
    start, end = int(whole.offsets[row]), int(whole.offsets[row + 1])
    with disk.being_made(target) as draft:
        arrays: dict[str, NDArray[Any]] = {
            "items": whole.items[start:end],
            "times": whole.times[start:end],
            "offsets": np.array([0, end - start]),
        }
        arrays["train_end"] = whole.train_end[row : row + 1] - start
        for name in ("validation", "test"):
            place = getattr(whole, name)[row : row + 1]
            arrays[name] = np.where(place >= 0, place - start, -1)
        for name, array in arrays.items():
            np.save(draft / f"{name}.npy", array.astype(disk.ARRAYS[name]))
        shutil.copy(prepared / disk.CATALOGUE, draft / disk.CATALOGUE)
        kept = manifest["kept"] | {"users": 1, "events": end - start}
        alone = {"extras": [], "first_user": user, "population": whole.population or len(whole)}
        write_json(draft / disk.MANIFEST, {**manifest, "kept": kept, **alone}, DataError)
    return target
