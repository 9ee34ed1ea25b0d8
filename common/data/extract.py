"""A node's own file: the events of one user, or of a shard of users, numbered by the same public catalogue."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import digest
from common.data import folder as disk
from common.data import itemrows
from common.data.sequences import Sequences
from common.errors import DataError
from common.files import write_json


def extract(prepared: Path, users: range, target: Path) -> Path:
    """Write a prepared folder that holds some users only.

    A node whose config names it as ``data-path`` is these users' device: training there gives the same updates as in a
    simulation of everybody.

    Parameters
    ----------
    prepared : Path
        The whole population's folder.
    users : range
        Their numbers, ascending by one.
    target : Path
        The new folder; must not exist.

    Returns
    -------
    Path
        `target`.

    Raises
    ------
    DataError
        Where there are no such users or the folder cannot be written.
    """
    whole, manifest = Sequences.open(prepared), disk.read_manifest(prepared)
    if not users or users.step != 1 or users[0] not in whole or users[-1] not in whole:
        last = whole.first + len(whole) - 1
        raise DataError(f"{prepared}: has no users {users.start} … {users.stop - 1}; its are {whole.first} … {last}")
    if target.exists():
        raise DataError(f"{target}: exists already; remove it or choose another name")
    rows = slice(users[0] - whole.first, users[-1] - whole.first + 1)
    offsets = whole.offsets[rows.start : rows.stop + 1]
    start, end = int(offsets[0]), int(offsets[-1])
    with disk.being_made(target) as draft:
        arrays: dict[str, NDArray[Any]] = {
            "items": whole.items[start:end],
            "times": whole.times[start:end],
            "offsets": offsets - start,
        }
        arrays["train_end"] = whole.train_end[rows] - start
        for name in ("validation", "test"):
            place = getattr(whole, name)[rows]
            arrays[name] = np.where(place >= 0, place - start, -1)
        for name, array in arrays.items():
            np.save(draft / f"{name}.npy", array.astype(disk.ARRAYS[name]))
        told = [name for name in manifest["extras"] if name != "causes"]  # nobody knows why
        for name in told:
            np.save(draft / f"{name}.npy", disk.load_array(prepared, name)[start:end])
        public = [disk.CATALOGUE, *(itemrows.FILES if "features" in manifest else ())]
        public += [f"{disk.DOMAINS}.npy"] * (prepared / f"{disk.DOMAINS}.npy").exists()
        for name in public:
            shutil.copy(prepared / name, draft / name)
        kept = manifest["kept"] | {"users": len(users), "events": end - start}
        some = {"extras": told, "first_user": users[0], "population": whole.population or len(whole)}
        write_json(draft / disk.MANIFEST, {**manifest, **_of_nobody(manifest), "kept": kept, **some}, DataError)
    return target


def _of_nobody(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of everybody's events, left away: counts, and hashes by which a guess could be confirmed."""
    source = {"kind": manifest["source"]["kind"], "path": None, "files": {}}
    options = {**manifest["options"], "path": None} if "path" in manifest["options"] else manifest["options"]
    public = {"digest": digest({"format": disk.FORMAT, "options": options}), "source": source, "options": options}
    return {**public, "read": {}, "bad_rows": {"count": 0, "first_lines": []}}
