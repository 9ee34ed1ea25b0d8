"""Workers on a Ray cluster. Nodes need hushrec installed; the prepared data travels to those that don't have it."""

import logging
import tempfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import ray

from common.config import Experiment
from common.data.catalogue import Catalogue
from common.errors import DataError, StateError
from common.models.weights import Weights
from simulations.workers import Worker


class _Answer:
    """A task's result, with the one method of a Future that is used."""

    def __init__(self, reference: Any):
        self._reference = reference

    def result(self) -> Any:
        """Wait for it."""
        return ray.get(self._reference)


class _Member:
    """A worker as a Ray actor."""

    def __init__(self, experiment: str, folder: str, digest: str, files: dict[str, bytes]):
        self._worker = Worker(experiment, str(_at_hand(Path(folder), digest, files)))

    def work(self, weights: tuple[Any, Any], task: str, arguments: tuple[Any, ...]) -> Any:
        """One task with the given weights."""
        import torch

        # Ray's memory is read-only and torch wants to be able to write, though nobody does.
        table, body = (torch.from_numpy(part.copy()) for part in weights)
        return getattr(self._worker, task)(Weights(table, body), *arguments)


class RayPool:
    """Workers on the nodes of a cluster; a `simulations.workers.Pool`.

    Parameters
    ----------
    experiment : Experiment
        Told to every worker.
    folder : Path
        The prepared data.
    workers : int
        Actors, one core each, wherever the cluster has room.
    address : str
        Of the cluster, such as ``auto`` or ``ray://host:10001``.

    Raises
    ------
    StateError
        Where the cluster can't be reached.
    """

    def __init__(self, experiment: Experiment, folder: Path, workers: int, address: str):
        try:
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as fault:
            raise StateError(f"runtime.ray_address={address}: no Ray cluster answers there ({fault})") from fault
        member = ray.remote(num_cpus=1)(_Member).options(scheduling_strategy="SPREAD")
        files = ray.put({file.name: file.read_bytes() for file in folder.iterdir()})
        digest = Catalogue.open(folder).digest
        arguments = experiment.model_dump_json(), str(folder), digest, files
        self._members: list[Any] = [member.remote(*arguments) for _ in range(workers)]
        self._turn: Iterator[Any] = cycle(self._members)
        self._weights: Any = None

    def load(self, weights: Weights) -> None:
        """As in `Pool`."""
        self._weights = ray.put((weights.table.detach().numpy(), weights.body.detach().numpy()))

    def submit(self, task: str, *arguments: Any) -> _Answer:
        """As in `Pool`; members take turns."""
        return _Answer(next(self._turn).work.remote(self._weights, task, arguments))

    def close(self) -> None:
        """As in `Pool`; the cluster itself stays."""
        for member in self._members:
            ray.kill(member)


def _at_hand(folder: Path, digest: str, files: dict[str, bytes]) -> Path:
    """The prepared folder on this node: its own where it is the same, else a copy unpacked here."""
    try:
        if Catalogue.open(folder).digest == digest:
            return folder
    except DataError:
        pass
    copy = Path(tempfile.mkdtemp(prefix="hushrec-"))
    for name, content in files.items():
        (copy / name).write_bytes(content)
    return copy
