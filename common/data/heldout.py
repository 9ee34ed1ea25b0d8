"""The split of a folder that is being made, and what is taken away after it (`data.target`, `data.only`)."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data import folder as disk
from common.data.names import unknown
from common.data.split import split
from common.errors import DataError
from common.sources import DataConfig


def hold_out(config: DataConfig, draft: Path, facts: dict[str, Any]) -> int:
    """Write which events are held out, and leave those away that shall not be seen.

    Parameters
    ----------
    config : DataConfig
        The data section.
    draft : Path
        The folder, with everything but the split and the manifest.
    facts : dict
        What the manifest shall say; ``target``, the number of `data.target`, is added.

    Returns
    -------
    int
        Number of events that are left.

    Raises
    ------
    DataError
        If the source has no such behaviour or domain.
    """
    offsets, times = (disk.load_array(draft, name) for name in ("offsets", "times"))
    places = None
    if config.target is not None:
        (facts["target"],) = _numbers((config.target,), facts, "behaviour", "data.target")
        if config.only.behaviours and config.target not in config.only.behaviours:
            raise DataError(f"data.only.behaviours leaves out data.target={config.target}: nothing would be held out")
        places = np.flatnonzero(disk.load_array(draft, "behaviours") == facts["target"])
    arrays: dict[str, NDArray[Any]] = split(config, offsets, times, places)._asdict()
    seen = np.ones(len(times), dtype=bool) if config.only.behaviours or config.only.domains else None
    if config.only.behaviours and seen is not None:
        wanted = _numbers(config.only.behaviours, facts, "behaviour", "data.only.behaviours")
        seen &= np.isin(disk.load_array(draft, "behaviours"), wanted)
    if config.only.domains and seen is not None:
        wanted = _numbers(config.only.domains, facts, "domain", "data.only.domains")
        seen &= np.isin(disk.load_array(draft, disk.DOMAINS)[disk.load_array(draft, "items")], wanted)
    if seen is not None:
        if not seen.any():
            raise DataError(f"data.only={config.only.model_dump(exclude_none=True)} leaves no events; name more")
        before = np.concatenate([[0], np.cumsum(seen, dtype=np.int64)])  # (E + 1,) events that stay before each place
        for name in ("validation", "test"):
            held = arrays[name] >= 0
            stays = held & seen[np.maximum(arrays[name], 0)]
            arrays[name] = np.where(stays, before[np.maximum(arrays[name], 0)], -1)
        arrays |= {"train_end": before[arrays["train_end"]], "offsets": before[offsets]}
        for name in ("items", "times", *facts["extras"]):
            arrays[name] = disk.load_array(draft, name)[seen]
    for name, array in arrays.items():
        np.save(draft / f"{name}.npy", array)
    return len(times) if seen is None else int(seen.sum())


def _numbers(names: tuple[str, ...], facts: dict[str, Any], sort: str, key: str) -> list[int]:
    known: list[str] = facts.get(f"{sort}s", [])
    if not known:
        raise DataError(f"{key}: this source tells no {sort} of events; name its column in data.columns.{sort}")
    for name in names:
        if name not in known:
            raise DataError(f"{key}: {unknown(sort, name, known)}")
    return [known.index(name) for name in names]
