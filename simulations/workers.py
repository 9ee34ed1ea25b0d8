"""Chunks of a cohort in worker processes of this machine.

A chunk is a pure function of its users, the round and the weights, and chunks are summed in the order of the plan: the
number of workers changes nothing but the time. What crosses between processes is a chunk's weighted sum; a single
update is computed again where somebody asks for it.
"""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import multiprocessing

from client.cohort import plan, train_chunk
from client.evaluation import rank
from client.noised import Noised
from client.rows import Ints
from client.training import Updates
from client.tuning import judged
from common.config import Experiment
from common.data.sequences import Sequences, Split
from common.errors import StateError
from common.memory import keep_freed_memory
from common.metrics import Ranking
from common.models.personal import Kept
from common.models.weights import Weights, body_size

Floats = NDArray[np.float32]
RANK_USERS = 1024
"""Users ranked in one task."""


class Numbers(NamedTuple):
    """What a worker tells of a chunk: arrays only, as in `client.training.Updates`."""

    users: Ints
    sound: NDArray[np.bool_]
    counts: Ints
    expected: Floats
    facts: dict[str, NDArray[np.generic]]
    rows: Ints | None
    table: Floats
    body: Floats
    kept: Floats | None


class Worker:
    """One process's side: the data opened, ready to train and rank for any weights."""

    def __init__(self, experiment: str, folder: str):
        keep_freed_memory()
        torch.set_num_threads(1)
        self.experiment = Experiment.model_validate_json(experiment)
        self.sequences = Sequences.open(Path(folder))

    def solve(
        self,
        weights: Weights,
        users: Ints,
        round_: int,
        clip: float | None,
        own: Floats | None,
        importance: Floats | None,
    ) -> Numbers:
        """Train a chunk and sum its updates, by default as the server is expected to weigh them."""
        updates = self._trained(weights, users, round_, clip, own)
        rows, total = updates.summed(updates.expected if importance is None else importance)
        about = updates.users, updates.sound, updates.counts, updates.expected, updates.facts
        kept = None if own is None else updates.kept.numpy()
        return Numbers(*about, rows, total.table.numpy(), total.body.numpy(), kept)

    def single(
        self, weights: Weights, users: Ints, round_: int, clip: float | None, own: Floats | None, i: int
    ) -> tuple[NDArray[np.int32], Floats, Floats]:
        """One user's update: its rows, and the change of these and of the body."""
        updates = self._trained(weights, users, round_, clip, own)
        change = updates.one(i)
        return updates.rows(i), change.table.numpy(), change.body.numpy()

    def rank(self, weights: Weights, users: Ints, split: Split, own: Floats | None = None) -> Ranking:
        """Ranks of held-out items."""
        return rank(judged(self.experiment), weights, self.sequences, users, split, _kept(users, own))

    def _trained(
        self, weights: Weights, users: Ints, round_: int, clip: float | None, own: Floats | None
    ) -> Updates | Noised:
        return train_chunk(self.experiment, weights, self.sequences, users, round_, clip, _kept(users, own))


def _kept(users: Ints, own: Floats | None) -> Kept | None:
    return None if own is None else Kept(users, torch.from_numpy(own))


class Answer(Protocol):
    """A task's result to come."""

    def result(self) -> Any:
        """Wait for it."""


class Pool(Protocol):
    """Several workers."""

    def load(self, weights: Weights) -> None:
        """Make these the weights of all tasks from now on."""

    def submit(self, task: str, *arguments: Any) -> Answer:
        """Ask for a method of `Worker` with the loaded weights."""

    def close(self) -> None:
        """End the workers."""


class ProcessPool:
    """Workers on this machine, one thread each; the weights lie in memory that all share."""

    def __init__(self, experiment: Experiment, folder: Path, items: int, workers: int):
        self._weights = Weights(
            torch.zeros(items, experiment.model.dim).share_memory_(),
            torch.zeros(body_size(experiment.model)).share_memory_(),
        )
        self._executor = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_open,
            initargs=(experiment.model_dump_json(), str(folder), self._weights),
        )

    def load(self, weights: Weights) -> None:
        """As in `Pool`; nobody may be at work meanwhile."""
        for shared, part in zip(self._weights, weights, strict=True):
            shared.copy_(part)

    def submit(self, task: str, *arguments: Any) -> Future[Any]:
        """As in `Pool`."""
        return self._executor.submit(_work, task, *arguments)

    def close(self) -> None:
        """As in `Pool`."""
        if self._executor._broken:  # its executor only asks the others to end, with a signal that they do not hear
            for process in list((self._executor._processes or {}).values()):
                process.kill()
        self._executor.shutdown(cancel_futures=True)


def _open(experiment: str, folder: str, weights: Weights) -> None:
    # Ctrl-C reaches the whole group; the main process alone decides when a round is over.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    _here()["worker"], _here()["weights"] = Worker(experiment, folder), weights


def _end_with_parent() -> None:
    """A killed main process cannot say good-bye, and its queues alone would keep the workers waiting for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@cache
def _here() -> dict[str, Any]:
    """What this worker process holds."""
    return {}


def _work(task: str, *arguments: Any) -> Any:
    return getattr(_here()["worker"], task)(_here()["weights"], *arguments)


class RemoteUpdates:
    """Updates of a chunk that a worker trained; the `common.wire.Pending` of this module."""

    def __init__(
        self, team: "Team", weights: Weights, round_: int, clip: float | None, own: Floats | None, numbers: Numbers
    ):
        self._team, self._weights, self._numbers = team, weights, numbers
        self._asked = numbers.users, round_, clip, own
        self.users, self.sound, self.facts = numbers.users, numbers.sound, numbers.facts
        self.counts, self.whole = numbers.counts, numbers.rows is None

    def __len__(self) -> int:
        return len(self.users)

    @property
    def kept(self) -> torch.Tensor:
        """As in `client.training.Updates`."""
        if self._numbers.kept is None:
            raise ValueError("nothing stays on the device")
        return torch.from_numpy(self._numbers.kept)

    def rows(self, i: int) -> NDArray[np.int32]:
        """Catalogue indices of the rows that the i-th user sends."""
        rows: NDArray[np.int32] = self._single(i)[0]
        return rows

    def one(self, i: int) -> Weights:
        """Change of the i-th user's rows and of the body."""
        return Weights(*map(torch.from_numpy, self._single(i)[1:]))

    def summed(self, importance: Floats) -> tuple[Ints | None, Weights]:
        """As in `client.training.Updates`."""
        numbers = self._numbers
        if not np.array_equal(importance, numbers.expected):
            numbers = self._team.ask(self._weights, "solve", *self._asked, importance)
        return numbers.rows, Weights(torch.from_numpy(numbers.table), torch.from_numpy(numbers.body))

    def _single(self, i: int) -> Any:
        return self._team.ask(self._weights, "single", *self._asked, i)


def _result(ask: Callable[[], Any]) -> Any:
    """What workers say; one that is gone is no client's fault and must not pass for one."""
    try:
        return ask()
    except BrokenProcessPool as fault:
        raise StateError(
            "a worker process died, perhaps for lack of memory; lower runtime.workers or federation.cohort and --resume"
        ) from fault


class Team:
    """A pool as the client code sees it: trains and ranks like `client.training.train` and `client.evaluation.rank`."""

    def __init__(self, pool: Pool):
        self._pool = pool
        self._loaded: Weights | None = None

    def train(
        self,
        experiment: Experiment,
        weights: Weights,
        sequences: Sequences,
        users: Ints,
        round_: int,
        clip: float | None = None,
        own: Kept | None = None,
    ) -> Iterator[RemoteUpdates]:
        """As `client.training.train`, chunks side by side."""
        self._load(weights)
        chunks = plan(experiment, sequences, users, len(weights.table))
        mine = [None if own is None else own.of(chunk).values.numpy() for chunk in chunks]
        pairs = zip(chunks, mine, strict=True)
        tasks = [self._submit("solve", chunk, round_, clip, values, None) for chunk, values in pairs]
        for task, values in zip(tasks, mine, strict=True):
            yield RemoteUpdates(self, weights, round_, clip, values, _result(task.result))

    def rank(
        self,
        experiment: Experiment,
        weights: Weights,
        sequences: Sequences,
        users: Ints,
        split: Split,
        own: Kept | None = None,
    ) -> Ranking:
        """As `client.evaluation.rank`, slices of users side by side."""
        self._load(weights)
        parts = [users[start : start + RANK_USERS] for start in range(0, len(users), RANK_USERS)]
        mine = [() if own is None else (own.of(part).values.numpy(),) for part in parts]
        tasks = [self._submit("rank", part, split, *values) for part, values in zip(parts, mine, strict=True)]
        results = [_result(task.result) for task in tasks]
        return Ranking(*(np.concatenate(part) for part in zip(*results, strict=True)))

    def ask(self, weights: Weights, task: str, *arguments: Any) -> Any:
        """One task for the given weights, and wait for it."""
        self._load(weights)
        return _result(self._submit(task, *arguments).result)

    def _submit(self, task: str, *arguments: Any) -> Answer:
        answer: Answer = _result(lambda: self._pool.submit(task, *arguments))
        return answer

    def _load(self, weights: Weights) -> None:
        if self._loaded is not weights:
            self._pool.load(weights)
            self._loaded = weights
