"""Engines change no result; a fault of the server's side comes out of them as it is, and nobody is left behind.

Each number of worker processes and Flower's engine on Ray are started once.
"""

import importlib
import multiprocessing
import sys
from functools import partial

import numpy as np
import pytest

from client import batches
from client.device import Device
from common.data.prepare import prepare
from common.errors import HushrecError, StateError, UsageError
from common.models.weights import initialise
from server.rounds import serve
from simulations import engines, workers
from simulations.engines import play
from tests.support import world
from tests.support.leftovers import nobody_left
from tests.support.processes import _CONTEXT as READY

DATA = {"kind": "synthetic", "users": 40, "items": 30, "interests": 4, "mean_length": 9, "max_length": 30}
HERE = {
    "vectorized": {},
    "sequential": {"engine": "sequential"},
    **{f"{count} worker(s)": {"workers": count} for count in (1, 2, 3)},
}
RAY = {"engine": "ray"}


class OddError(Exception):
    """Nobody else raises it."""


def placed(**runtime):
    experiment = world.experiment(
        data=DATA,
        loss=world.LOSSES["sampled-softmax"],
        model={"dropout": 0.2, "max_length": 11},
        federation={"rounds": 3, "cohort": 30, "optimizer": {"kind": "fedadam", "lr": 0.002}},
        evaluation={"every": 3, "sampled": 5},
        runtime=runtime,
    )
    return Device.open(experiment, prepare(experiment.data))


def played(**runtime):
    device = placed(**runtime)
    return play(device, partial(serve, experiment=device.experiment, folder=None, observe=lambda line: None))


def unserved(grid):
    raise AssertionError("the server's side was called")


@pytest.fixture
def _quick(monkeypatch):
    """Worker processes that are forked from one which has imported torch already; `test_workers` starts real ones."""
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: READY)


@pytest.fixture(scope="module")
def outcomes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.multiprocessing, "get_context", lambda kind: READY)
        patch.setattr(batches, "CHUNK_USERS", 8)
        return {name: played(**runtime) for name, runtime in HERE.items()}


# --- the same run ----------------------------------------------------------------------------------------------------


def assert_same(one, other):
    assert world.gap(one.weights, other.weights) < 1e-5
    assert (one.rounds, one.best_round, one.bytes_down) == (other.rounds, other.best_round, other.bytes_down)
    for ranks, others in zip(one.test, other.test, strict=True):
        np.testing.assert_array_equal(ranks, others)


def test_there_is_something_to_compare(outcomes):
    one = outcomes["vectorized"]
    assert one.rounds == 3
    assert world.gap(one.weights, initialise(placed().experiment.model, 30, 0)) > 3e-3
    assert all(len(np.unique(ranks)) > 3 for ranks in (one.test.full, one.test.sampled))


@pytest.mark.parametrize("name", list(HERE)[1:])
def test_engines_give_the_same_run(outcomes, name):
    assert_same(outcomes[name], outcomes["vectorized"])


def test_any_number_of_workers_gives_the_same_bits(outcomes):
    first, *others = (outcome for name, outcome in outcomes.items() if "worker" in name)
    assert len(others) == 2
    for other in others:
        assert world.same(first.weights, other.weights)


def test_flowers_engine_gives_the_same_run_and_leaves_nobody(outcomes, capfd):
    ray = pytest.importorskip("ray")
    with nobody_left():
        outcome = played(**RAY)
        assert not ray.is_initialized()
    assert_same(outcome, outcomes["vectorized"])
    assert capfd.readouterr().out == "", "stdout belongs to the command"


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("runtime", [*HERE.values(), RAY], ids=[*HERE, "ray"])
def test_a_fault_of_the_server_comes_out_unchanged(runtime):
    if runtime is RAY:
        pytest.importorskip("ray")
    fault = OddError("as it is")

    def raising(grid):
        raise fault

    with nobody_left(), pytest.raises(OddError) as caught:
        play(placed(**runtime), raising)
    assert caught.value is fault


@pytest.mark.usefixtures("_quick")
def test_workers_end_when_the_server_fails():
    device, before, processes = placed(workers=2), multiprocessing.active_children(), []

    def raising(grid):
        serve(grid, device.experiment, None, lambda line: None)
        processes.extend(process for process in multiprocessing.active_children() if process not in before)
        raise OddError

    with pytest.raises(OddError):
        play(device, raising)
    assert len(processes) == 2
    assert not any(process.is_alive() for process in processes)


@pytest.mark.parametrize("runtime", [RAY, {"workers": 1, "ray_address": "auto"}])
def test_without_ray_one_is_told_what_to_install(runtime, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "simulations.cluster", raising=False)
    with pytest.raises(UsageError, match=r"pip install 'hushrec\[ray\]'"):
        play(placed(**runtime), unserved)


@pytest.fixture
def _flower(monkeypatch, request):
    """Something else in the place of Flower's engine."""
    pytest.importorskip("ray")
    module = importlib.import_module("flwr.simulation.run_simulation")
    monkeypatch.setattr(module, "run_simulation", request.param)


def _breaking(*arguments, **options):
    raise RuntimeError("An error was encountered. Ending simulation.")


def _idle(*arguments, **options):
    """Never calls the server."""


@pytest.mark.parametrize("_flower", [_breaking, _idle], indirect=True)
@pytest.mark.usefixtures("_flower")
def test_an_engine_that_does_not_come_up_is_one_line():
    with pytest.raises(StateError, match="Flower's simulation engine") as caught:
        play(placed(**RAY), unserved)
    assert "\n" not in str(caught.value)


def test_where_both_fail_the_servers_fault_is_told(monkeypatch):
    pytest.importorskip("ray")

    def both(server, *arguments, **options):
        server._main(None, None)
        raise RuntimeError("and then the engine")

    monkeypatch.setattr(importlib.import_module("flwr.simulation.run_simulation"), "run_simulation", both)
    with pytest.raises(HushrecError, match="the server first"):
        play(placed(**RAY), partial(_fails, StateError("the server first")))


def _fails(fault, grid):
    raise fault


def test_ray_and_flower_tell_nobody_of_us(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    engines._need_ray()
    assert engines.os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
