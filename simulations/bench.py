"""Speed, measured where it can be compared: engines in turn, several times over, each in a process of its own.

Machines are noisy, so seconds mean little; ratios inside one interleaved run do. A round is whole: sampling, messages,
local training, aggregation, the server's step. Data are made up in the shape of well-known sets, so it runs anywhere.
"""

import copy
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from flwr.serverapp import Grid
from torch.optim import Optimizer

from client.device import Device
from common.config import Experiment, experiment_hash
from common.data.prepare import prepare
from common.data.sequences import Ints
from common.errors import UsageError
from common.memory import keep_freed_memory
from common.models.weights import initialise
from common.privacy.schema import ExampleLevel, Local, UserLevel
from server.roster import Roster
from server.rounds import train_round
from server.sampling import cohort
from server.strategy import FederatedRanking
from simulations import centralised
from simulations.centralised import SASRec
from simulations.certify import initial_model
from simulations.engines import play

_MODES: dict[str, UserLevel | Local | ExampleLevel] = {
    "user-level": UserLevel(kind="user-level", noise_multiplier=1.0, rng="reproducible"),
    "local": Local(kind="local", noise_multiplier=1.0, rng="reproducible"),
    "example-level": ExampleLevel(kind="example-level", noise_multiplier=1.0, rng="reproducible"),
    "opacus": ExampleLevel(kind="example-level", noise_multiplier=1.0, rng="reproducible"),
}
ENGINES = ("vectorized", "sequential", "naive", "ray", "centralised", *_MODES)
"""The modes of privacy are `vectorized`, but for `opacus`: example-level through the ClientApp, user by user."""
ROUNDS, FEW_ROUNDS, PATIENCE = 24, 4, 5.0
"""Timed rounds of a sample, after one to warm up; so few where they take more than so many seconds together."""
RAY_USERS = 10_000
"""Nodes that Ray gets at the most: its cost grows with all of them, so larger populations are shown too favourably."""

T = TypeVar("T")

_SHAPES: dict[str, dict[str, Any]] = {
    "ml-1m": {"users": 6040, "items": 3416, "interests": 40, "mean_length": 165.0, "max_length": 1000},
    "beauty": {"users": 22363, "items": 12101, "interests": 100, "mean_length": 8.9, "max_length": 100},
}
_LOSSES: dict[str, dict[str, Any]] = {
    "": {"kind": "sampled-softmax", "negatives": 256},
    "-softmax": {"kind": "softmax"},
}


class Sample(NamedTuple):
    """One engine on one workload, once."""

    round_seconds: float
    overhead_share: float | None
    peak_rss_mb: float
    bytes_up_per_client: float | None


def workloads() -> dict[str, Experiment]:
    """Everything that can be measured, by name: ``SHAPE[-softmax]-Nstep`` and ``population-N``."""
    named_loads = {}
    for shape, data in _SHAPES.items():
        for suffix, loss in _LOSSES.items():
            for steps in (1, 5):
                named_loads[f"{shape}{suffix}-{steps}step"] = _experiment(data, loss, steps, 100)
    for users in (10_000, 100_000, 1_000_000):
        data = {"users": users, "items": 50_000, "interests": 500, "mean_length": 20.0, "max_length": 100}
        named_loads[f"population-{users}"] = _experiment(data, _LOSSES[""], 1, 1000)
    return named_loads


def bench(
    workload: str, engines: Sequence[str], repeats: int, workers: int = 0, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure some engines on a workload.

    Parameters
    ----------
    workload : str
        One of `workloads`.
    engines : sequence of str
        Some of `ENGINES`.
    repeats : int
        Samples of each; engines take turns.
    workers : int
        Worker processes of `vectorized`; 0 trains in its main process.
    report : callable
        Told what is under way.

    Returns
    -------
    dict
        ``results``: one per engine, medians over the repeats; ``ratios`` of clients per second, medians over the
        repeats of the ratio inside each.

    Raises
    ------
    UsageError
        Where a name is unknown, or none is given.
    """
    known = workloads()
    for name, options in ((workload, tuple(known)), *((engine, ENGINES) for engine in engines or ["no engine"])):
        if name not in options:
            raise UsageError(f"{name}: unknown; known are {', '.join(options)}")
    experiment = known[workload]
    prepare(experiment.data)
    samples: dict[str, list[Sample]] = {engine: [] for engine in engines}
    for turn in range(repeats):
        for engine in engines:
            report(f"{workload}, {engine}, {turn + 1} of {repeats}")
            samples[engine].append(_apart(experiment, engine, workers))
    return {"results": [_result(workload, experiment, e, s) for e, s in samples.items()], "ratios": _ratios(samples)}


def _experiment(data: dict[str, Any], loss: dict[str, Any], steps: int, users: int) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "bench",
            "data": {"kind": "synthetic", **data},
            "model": {"dim": 64, "blocks": 2, "heads": 1, "max_length": 50, "dropout": 0.2},
            "loss": loss,
            "federation": {"cohort": users, "local": {"steps": steps, "lr": 1.0 / steps}},
        }
    )


def _apart(experiment: Experiment, engine: str, workers: int) -> Sample:
    """A sample in a new process, so that memory is its own and nothing is warm but the disk."""
    # Not a multiprocessing.Pool: its processes may have no workers of their own.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_sample, experiment.model_dump_json(), engine, workers).result()


def _sample(text: str, engine: str, workers: int) -> Sample:
    """A sample of an experiment, given as JSON."""
    keep_freed_memory()
    experiment = Experiment.model_validate_json(text)
    if engine == "ray":
        users = min(RAY_USERS, experiment.data.users)  # type: ignore[union-attr]
        experiment = experiment.model_copy(update={"data": experiment.data.model_copy(update={"users": users})})
    if engine in _MODES:
        federation = experiment.federation.model_copy(update={"sampling": "poisson", "weighting": "uniform"})
        told = experiment.evaluation.model_copy(update={"privacy": "unaccounted"})  # or nobody hears how long it took
        changed = {"federation": federation, "privacy": _MODES[engine], "evaluation": told}
        experiment = experiment.model_copy(update=changed)
    kind = {"sequential": "sequential", "opacus": "sequential", "ray": "ray"}.get(engine, "vectorized")
    shared = engine in {"vectorized", *_MODES} and kind == "vectorized"
    place = {"engine": kind, "workers": workers if shared else 0}
    runtime = experiment.runtime.model_copy(update=place)
    device = Device.open(experiment.model_copy(update={"runtime": runtime}), prepare(experiment.data))
    if engine in {"naive", "centralised"}:
        return Sample(statistics.median(_plain(device, engine)), None, _peak_mb(), None)
    return _federated(device)


def _federated(device: Device) -> Sample:
    def rounds(grid: Grid) -> list[dict[str, Any]]:
        roster = Roster.discover(grid, experiment_hash(device.experiment))
        start = initialise(device.experiment.model, roster.rows, device.experiment.seed)
        strategy = FederatedRanking(device.experiment, roster, start)
        return list(_timed(lambda number: train_round(grid, strategy, number)))

    lines = play(device, rounds)
    seconds = statistics.median(line["seconds"] for line in lines)
    training = statistics.median(line["phases"].get("training", 0.0) for line in lines)
    overhead = 1 - training / seconds if training else None  # under Ray it is timed elsewhere
    return Sample(seconds, overhead, _peak_mb(), _bytes_up(lines))


def _bytes_up(lines: list[dict[str, Any]]) -> float | None:
    """Mean over rounds; none where a privacy mode does not tell it."""
    told = [line["bytes_up_per_client"] for line in lines if "bytes_up_per_client" in line]
    return statistics.mean(told) if told else None


def _timed(play_round: Callable[[int], T]) -> Iterator[T]:
    """What rounds say, without the first, which warms up: `ROUNDS` of them, fewer where they are slow."""
    play_round(1)
    began = time.perf_counter()
    for number in range(2, 2 + ROUNDS):
        yield play_round(number)
        if number > FEW_ROUNDS and time.perf_counter() - began > PATIENCE:
            return


def _plain(device: Device, engine: str) -> Iterator[float]:
    """Seconds of a `naive_round`, or of as many centralised mini-batch steps as a round has local steps."""
    experiment, sequences = device.experiment, device.sequences
    model, steps = initial_model(device), experiment.federation.local.steps or 1
    optimizer = centralised.adam(experiment, model)

    def play_round(number: int) -> float:
        users = cohort(experiment.federation, len(sequences), experiment.seed, number)
        began = time.perf_counter()
        if engine == "naive":
            naive_round(device, model, optimizer, users, number)
        else:
            centralised.train(experiment, model, sequences, [(number, users)] * steps)
        return time.perf_counter() - began

    return _timed(play_round)


def naive_round(device: Device, model: SASRec, optimizer: Optimizer, users: Ints, number: int) -> None:
    """FedAvg as most research code has it: per client a copy of the model, dense gradients, plain torch; in place."""
    experiment, sequences = device.experiment, device.sequences
    local, longest = experiment.federation.local, experiment.model.max_length
    share = np.clip(sequences.stops(users, "train")[0] - sequences.offsets[users] - 1, 0, longest)  # events
    if experiment.federation.weighting == "uniform":
        share = np.ones_like(users)
    total = [torch.zeros_like(part) for part in model.parameters()]
    for user, weight in zip(users, (share / share.sum()).tolist(), strict=True):
        mine = copy.deepcopy(model)
        sgd = torch.optim.SGD(mine.parameters(), lr=local.lr)
        for _ in range(local.steps or 1):
            centralised.train_step(experiment, mine, sgd, sequences, users[users == user], number)
        with torch.no_grad():
            for part, here, there in zip(total, mine.parameters(), model.parameters(), strict=True):
                part.add_(here - there, alpha=weight)
    for part, change in zip(model.parameters(), total, strict=True):
        part.grad = -change
    optimizer.step()


def _peak_mb() -> float:
    """Peak memory of this process and of the largest of its children."""
    scale = 2**20 if os.uname().sysname == "Darwin" else 2**10
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / scale


def _result(workload: str, experiment: Experiment, engine: str, samples: list[Sample]) -> dict[str, Any]:
    def median(name: str) -> float | None:
        values = [getattr(sample, name) for sample in samples]
        return None if None in values else statistics.median(values)

    seconds = statistics.median(sample.round_seconds for sample in samples)
    return {
        "workload": workload,
        "engine": engine,
        "local_steps": experiment.federation.local.steps or 1,
        "clients_per_second": experiment.federation.cohort / seconds,
        "round_seconds": seconds,
        **{name: median(name) for name in ("overhead_share", "peak_rss_mb", "bytes_up_per_client")},
    }


def _ratios(samples: dict[str, list[Sample]]) -> dict[str, float]:
    """How many times as many clients a second the first engine trains as each other, inside each repeat."""
    first, *others = samples
    return {
        f"{first}/{other}": statistics.median(
            b.round_seconds / a.round_seconds for a, b in zip(samples[first], samples[other], strict=True)
        )
        for other in others
    }
