"""Workers on a Ray cluster. Nodes need hushrec installed; the prepared data travels to those that don't have it."""

import copy
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from common.config import Experiment
from common.data.catalogue import Catalogue
from common.errors import DataError, StateError
from common.models.weights import Weights
from simulations.workers import Worker

REACHED, STARTED = 10.0, 300.0
"""Seconds to wait for the cluster's address to answer, and for all workers to have started."""


class _Answer:
    """A task's result, with the one method of a Future that is used."""

    def __init__(self, reference: Any):
        self._reference = reference

    def result(self) -> Any:
        """Wait for it."""
        try:
            return copy.deepcopy(ray.get(self._reference))  # Ray's memory is read-only, of which torch warns
        except RayActorError as fault:
            raise StateError(f"a worker on the Ray cluster is gone ({_line(fault)})") from fault


class _Member:
    """A worker as a Ray actor."""

    def __init__(self, experiment: str, folder: str, digest: str, files: dict[str, bytes]):
        with _at_hand(Path(folder), digest, files) as here:
            self._worker = Worker(experiment, str(here))

    def node(self) -> str:
        """Id of the node that it runs on."""
        node: str = ray.get_runtime_context().get_node_id()
        return node

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
        Where the cluster can't be reached, has too little room, or a worker can't start on its node.
    """

    def __init__(self, experiment: Experiment, folder: Path, workers: int, address: str):
        try:
            _probe(address)
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as fault:
            raise StateError(f"runtime.ray_address={address}: no Ray cluster answers there ({_line(fault)})") from fault
        member = ray.remote(num_cpus=1)(_Member).options(scheduling_strategy="SPREAD")
        files = ray.put({file.name: file.read_bytes() for file in folder.iterdir()})
        digest = Catalogue.open(folder).digest
        arguments = experiment.model_dump_json(), str(folder), digest, files
        self._members: list[Any] = [member.remote(*arguments) for _ in range(workers)]
        self._turn: Iterator[Any] = cycle(self._members)
        self._weights: Any = None
        try:
            self.nodes: list[str] = ray.get([each.node.remote() for each in self._members], timeout=STARTED)
            """Id of each worker's node."""
        except RayError as fault:
            self.close()
            why = "too few of its cores are free" if isinstance(fault, GetTimeoutError) else _line(fault)
            raise StateError(f"runtime.workers={workers}: they don't start on the Ray cluster ({why})") from fault

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


def _probe(address: str) -> None:
    """See whether anybody listens at ``host:port``; Ray itself would try for more than five minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), REACHED).close()


@contextmanager
def _at_hand(folder: Path, digest: str, files: dict[str, bytes]) -> Iterator[Path]:
    """The prepared folder on this node: its own where it is the same, else a copy.

    The copy goes again at once: who has mapped its files keeps them, and nobody's events stay on a node's disk.
    """
    try:
        same = Catalogue.open(folder).digest == digest
    except DataError:
        same = False
    if same:
        yield folder
        return
    with TemporaryDirectory(prefix="hushrec-") as unpacked:
        for name, content in files.items():
            (Path(unpacked) / name).write_bytes(content)
        yield Path(unpacked)


def _line(fault: Exception) -> str:
    """One line of what went wrong: the last, since Ray puts a worker's traceback above its fault."""
    lines = str(fault).strip().splitlines()
    return lines[-1].strip() if lines else type(fault).__name__
