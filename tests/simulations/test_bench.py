"""The bench measures the same work on every engine, in turn, each in a process of its own. No test looks at a time."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from client.device import Device
from common.config import experiment_hash
from common.data.prepare import prepare
from common.errors import UsageError
from common.models.weights import Weights, initialise, named
from server.roster import Roster
from server.rounds import train_round
from server.sampling import cohort
from server.strategy import FederatedRanking
from simulations import bench, centralised, cli
from simulations.bench import ENGINES, Sample, naive_round, workloads
from simulations.grid import InProcessGrid
from tests.support import world

RESULT = {
    "workload",
    "engine",
    "local_steps",
    "clients_per_second",
    "round_seconds",
    "overhead_share",
    "peak_rss_mb",
    "bytes_up_per_client",
}
DATA = {"kind": "synthetic", "users": 40, "items": 30, "interests": 4, "mean_length": 9, "max_length": 30}
PLAIN = ("naive", "centralised")
HERE = tuple(engine for engine in ENGINES if engine != "ray")


def tiny(loss="sampled-softmax", dropout=0.2, **federation):
    return world.experiment(
        data=DATA,
        loss=world.LOSSES[loss],
        model={"dropout": dropout, "max_length": 11},
        federation={"cohort": 20, **federation},
    )


@pytest.fixture
def _tiny(monkeypatch):
    monkeypatch.setattr(bench, "workloads", lambda: {"tiny": tiny()})


@pytest.fixture
def _no_process(monkeypatch):
    """Samples are taken in this process, from the JSON that another one would be told."""
    monkeypatch.setattr(bench, "ROUNDS", 2)
    monkeypatch.setattr(bench, "_apart", lambda experiment, *rest: bench._sample(experiment.model_dump_json(), *rest))


@pytest.fixture
def called(monkeypatch, capsys):
    """Run `hushrec bench` in this process; give its exit code, and what it says on stdout and stderr."""

    def call(*argv: str):
        monkeypatch.setattr(sys, "argv", ["hushrec", "bench", *argv])
        return cli._exit_code(), *capsys.readouterr()

    return call


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_tiny", "_no_process")
def test_every_engine_gives_the_same_keys():
    said = []
    found = bench.bench("tiny", HERE, 1, report=said.append)
    assert found.keys() == {"results", "ratios"}
    assert [result["engine"] for result in found["results"]] == list(HERE)
    for result in found["results"]:
        assert result.keys() == RESULT
        assert (result["workload"], result["local_steps"]) == ("tiny", 1)
        assert result["clients_per_second"] == pytest.approx(20 / result["round_seconds"])
        assert result["peak_rss_mb"] > 0
        plain = result["engine"] in PLAIN
        untold = plain or result["engine"] == "user-level"  # nothing travels there, or nobody may know how much
        assert (result["bytes_up_per_client"] is None) == untold
        assert (result["overhead_share"] is None) == plain
    first, second = (result["bytes_up_per_client"] for result in found["results"][:2])
    assert first == second > 0
    assert found["ratios"].keys() == {f"vectorized/{other}" for other in HERE[1:]}
    assert said == [f"tiny, {engine}, 1 of 1" for engine in HERE]


def test_processes_are_told_the_experiment_and_the_command_prints_one_object(tmp_path):
    """The workload has no name there; and the process of a sample may have workers of its own."""
    code = f"""
import sys
from common.config import Experiment
from simulations import bench, cli
bench.workloads = lambda: {{"tiny": Experiment.model_validate_json({tiny().model_dump_json()!r})}}
sys.argv = "hushrec bench --workload tiny --engines vectorized,naive --repeats 1 --workers 1 --json".split()
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(result["engine"], result.keys()) for result in found["results"]] == [
        ("vectorized", RESULT),
        ("naive", RESULT),
    ]
    assert found["ratios"].keys() == {"vectorized/naive"}
    assert done.stderr.splitlines() == ["tiny, vectorized, 1 of 1", "tiny, naive, 1 of 1"]


@pytest.mark.usefixtures("_tiny")
def test_engines_take_turns_and_ratios_are_taken_inside_each(monkeypatch):
    seconds = {"vectorized": [1.0, 4.0, 2.0], "naive": [3.0, 8.0, 10.0]}
    order = []

    def sample(experiment, engine, workers):
        order.append(engine)
        turn = order.count(engine) - 1
        assert workers == 7
        return Sample(seconds[engine][turn], None if engine == "naive" else turn / 10, 100.0 + turn, None)

    monkeypatch.setattr(bench, "_apart", sample)
    found = bench.bench("tiny", ["vectorized", "naive"], 3, 7, lambda text: None)
    assert order == ["vectorized", "naive"] * 3
    fast, slow = found["results"]
    assert (fast["round_seconds"], fast["clients_per_second"]) == (2.0, 10.0)
    assert (slow["round_seconds"], slow["clients_per_second"]) == (8.0, 2.5)
    assert (fast["overhead_share"], slow["overhead_share"], fast["peak_rss_mb"]) == (0.1, None, 101.0)
    assert found["ratios"] == {"vectorized/naive": 3.0}, "the median of 3, 2 and 5, not the ratio of medians, 4"


@pytest.mark.parametrize(("at_most", "cohort", "nodes"), [(25, 20, 25), (100, 20, 40)])
def test_ray_gets_no_more_nodes_than_it_must(monkeypatch, at_most, cohort, nodes):
    seen = []
    monkeypatch.setattr(bench, "RAY_USERS", at_most)
    monkeypatch.setattr(bench, "_federated", seen.append)
    bench._sample(tiny(cohort=cohort).model_dump_json(), "ray", 2)
    (device,) = seen
    assert len(device.sequences) == nodes
    assert (device.experiment.runtime.engine, device.experiment.runtime.workers) == ("ray", 0)


@pytest.mark.parametrize(("engine", "workers"), [("vectorized", 2), ("user-level", 2), ("sequential", 0)])
def test_only_the_vectorized_engine_has_workers(monkeypatch, engine, workers):
    seen = []
    monkeypatch.setattr(bench, "_federated", seen.append)
    bench._sample(tiny().model_dump_json(), engine, 2)
    runtime = seen[0].experiment.runtime
    assert (runtime.engine, runtime.workers) == ("sequential" if engine == "sequential" else "vectorized", workers)
    assert (seen[0].experiment.privacy.kind == "user-level") == (engine == "user-level")


def test_workloads_are_named_after_what_they_are():
    known = workloads()
    assert {"ml-1m-1step", "beauty-softmax-5step", "population-1000000"} <= known.keys()
    for name, experiment in known.items():
        assert ("softmax" in name) == (experiment.loss.kind == "softmax")
        assert ("5step" in name) == (experiment.federation.local.steps == 5)
        assert experiment.loss.kind in centralised.LOSSES, "which the plain engines know"
        assert experiment.federation.optimizer.kind == "fedadam"
        assert experiment.federation.cohort <= experiment.data.users
        if name.startswith("population-"):
            assert experiment.data.users == int(name.split("-")[1])


# --- a fair comparison -----------------------------------------------------------------------------------------------


def of_strategy(device, start, number):
    """Weights after one round of the server and the vectorized engine, from `start`."""
    grid = InProcessGrid(device, "vectorized")
    roster = Roster.discover(grid, experiment_hash(device.experiment))
    strategy = FederatedRanking(device.experiment, roster, Weights(*(part.clone() for part in start)))
    train_round(grid, strategy, number)
    return strategy


def of_model(experiment, model):
    theirs = model.named()
    names = named(experiment.model, initialise(experiment.model, 30, 0).body)
    return Weights(theirs["item"], torch.cat([theirs[name].flatten() for name in names]))


def begun(federation, loss, dropout):
    experiment = tiny(loss, dropout, optimizer={"kind": "fedavg"}, **federation)
    device = Device.open(experiment, prepare(experiment.data))
    users = cohort(experiment.federation, len(device.sequences), experiment.seed, 2)
    start = initialise(experiment.model, device.catalogue.items, experiment.seed)
    return SimpleNamespace(
        device=device, experiment=experiment, users=users, start=start, model=bench.initial_model(device)
    )


@pytest.mark.parametrize("loss", centralised.LOSSES)
@pytest.mark.parametrize("weighting", ["events", "uniform"])
@pytest.mark.parametrize(("local", "dropout"), [({"steps": 1, "lr": 1.0}, 0.2), ({"steps": 5, "lr": 0.2}, 0.0)])
def test_a_naive_round_is_a_round(weighting, loss, local, dropout):
    """With several steps only without dropout: the naive loop draws one mask a round."""
    here = begun({"weighting": weighting, "local": local}, loss, dropout)
    assert world.same(of_model(here.experiment, here.model), here.start)
    naive_round(here.device, here.model, torch.optim.SGD(here.model.parameters(), 1.0), here.users, 2)
    wanted = of_strategy(here.device, here.start, 2).weights
    assert world.gap(of_model(here.experiment, here.model), wanted) < 1e-6
    assert world.gap(wanted, here.start) > 1e-2


@pytest.mark.parametrize("loss", centralised.LOSSES)
def test_a_centralised_step_is_a_round_of_one_step(loss):
    here = begun({"weighting": "events", "local": {"steps": 1, "lr": 1.0}}, loss, 0.2)
    centralised.loss(here.experiment, here.model, here.device.sequences, here.users, 2).backward()
    torch.optim.SGD(here.model.parameters(), 1.0).step()
    wanted = of_strategy(here.device, here.start, 2).weights
    assert world.gap(of_model(here.experiment, here.model), wanted) < 1e-6


@pytest.mark.parametrize("engine", PLAIN)
def test_the_plain_engines_train_the_cohorts_of_the_others(engine, monkeypatch):
    """A round of several local steps is as many centralised steps."""
    experiment = tiny(local={"steps": 3, "lr": 0.2})
    device = Device.open(experiment, prepare(experiment.data))
    seen = []
    monkeypatch.setattr(bench, "naive_round", lambda d, model, adam, users, number: seen.append((number, users)))
    monkeypatch.setattr(centralised, "train", lambda e, model, sequences, batches: seen.extend(batches))
    assert len([*bench._plain(device, engine)]) == bench.ROUNDS
    steps = 3 if engine == "centralised" else 1
    assert [number for number, _ in seen] == [r for r in range(1, 2 + bench.ROUNDS) for _ in range(steps)]
    for number, users in seen:
        np.testing.assert_array_equal(users, cohort(experiment.federation, 40, experiment.seed, number))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workload", "ml-2m"], "ml-2m: unknown; known are ml-1m-1step, "),
        (["--engines", "vectorized,warp"], "warp: unknown; known are vectorized, sequential, naive, ray, centralised"),
        (["--engines", ","], "no engine: unknown; known are vectorized, "),
    ],
)
def test_unknown_names_are_bad_use(called, options, said):
    code, out, err = called(*options)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {said}")
    assert len(err.splitlines()) == 1
    words = dict(zip(options[::2], options[1::2], strict=True))
    engines = [name for name in words.get("--engines", "naive").split(",") if name]
    with pytest.raises(UsageError, match=re.escape(said)):
        bench.bench(words.get("--workload", "ml-1m-1step"), engines, 1)


@pytest.mark.parametrize(
    ("options", "workers"), [([], os.cpu_count()), (["--workers", "0"], 0), (["--workers", "3"], 3)]
)
def test_workers_are_as_many_as_cores_unless_one_says_otherwise(called, monkeypatch, options, workers):
    asked = []

    def measure(workload, engines, repeats, workers, report):
        asked.append((workload, engines, repeats, workers))
        return {"results": [], "ratios": {}}

    monkeypatch.setattr(bench, "bench", measure)
    code, out, _ = called(*options, "--json")
    assert code == 0
    assert json.loads(out) == {"results": [], "ratios": {}}
    assert asked == [("ml-1m-1step", ["vectorized", "naive", "centralised"], 3, workers)]


def test_help_says_how_many_workers(called):
    code, out, _ = called("--help")
    assert code == 0
    words = " ".join(re.sub("[│╭╰─╮╯]", " ", out).split())
    assert "Worker processes of the vectorized engine; by default one a core, 0 trains in its main process." in words


@pytest.mark.usefixtures("_tiny", "_no_process")
def test_people_get_a_table(called):
    code, out, _ = called(
        "--workload", "tiny", "--engines", "vectorized,centralised", "--repeats", "1", "--workers", "0"
    )
    assert code == 0
    assert "tiny: medians" in out
    assert "vectorized/centralised:" in out
