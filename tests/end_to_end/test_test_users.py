"""`evaluation.test_users`: the test is of so many users, drawn once. How many are asked at a time changes nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client.device import Device
from common.data.prepare import prepare
from common.loading import parse
from common.metrics import summarise
from common.wire import METRICS
from server import rounds
from simulations.baselines import baseline_ranks
from simulations.engines import play
from simulations.grid import InProcessGrid
from tests.support.processes import TINY, hushrec
from tests.support.runs import figures

Ranks = NDArray[np.float64]
# A run directory says how many were tested, not who; so the run is made to tell.
TELLING = """
import numpy as np, simulations.runner as runner
whole = runner.play
def telling(*args):
    outcome = whole(*args)
    np.save("ranks.npy", outcome.test[0])
    return outcome
runner.play = telling
"""


def done(folder: Path, *overrides: str) -> tuple[dict[str, Any], Ranks]:
    """Result of a run of its own in a folder, and everybody's test rank in it, NaN for who was not tested."""
    name = "-".join(["run", *overrides])
    finished = hushrec(folder, "run", "tiny.yaml", *overrides, "--out", name, "--json", before=TELLING)
    assert finished.code == 0, finished.err
    return json.loads(finished.out), np.load(folder / "ranks.npy")


def users(ranks: Ranks) -> list[int]:
    """Who has a rank."""
    return [int(user) for user in np.flatnonzero(np.isfinite(ranks))]


@pytest.mark.parametrize("k", [1, 7, 59])
def test_the_figures_are_those_of_exactly_so_many_users(fresh: Path, k: int) -> None:
    result, ranks = done(fresh, f"evaluation.test_users={k}")
    chosen = users(ranks)
    assert result["users_tested"] == len(chosen) == k
    evaluated = hushrec(fresh, "evaluate", "--run", result["run_dir"], "--ranks", "ranks.csv")
    assert evaluated.code == 0, evaluated.err
    everybody = dict(line.split(",") for line in (fresh / "ranks.csv").read_text().splitlines()[1:])
    assert [float(everybody[str(user)]) for user in chosen] == ranks[chosen].tolist()
    experiment = parse(TINY)
    device = Device.open(experiment, prepare(experiment.data))
    found = baseline_ranks(experiment, device.sequences, device.catalogue.items)
    told = {"run": result["test"], **result["baselines"]}
    for name, of_all in {"run": ranks, "popularity": found["popularity"], "ceiling": found["ceiling"]}.items():
        expected = summarise(of_all[chosen], [5, 10, 20], resamples=100)
        assert {metric: figure._asdict() for metric, figure in expected.items()} == told[name], name


def test_who_is_tested_hangs_on_the_seed_only(fresh: Path) -> None:
    k = "evaluation.test_users=7"
    result, ranks = done(fresh, k)
    _, same = done(fresh, k, "runtime.memory_mb=64")
    np.testing.assert_array_equal(same, ranks)
    untrained, others = done(fresh, k, "federation.rounds=0", "evaluation.users=5")
    assert untrained["best_round"] != result["best_round"]
    assert users(others) == users(ranks), "drawn once, whatever round is chosen"
    _, elsewhere = done(fresh, k, "seed=1")
    assert len(users(elsewhere)) == 7
    assert users(elsewhere) != users(ranks)


@pytest.mark.parametrize("k", [60, 61, 10**9])
def test_more_users_than_there_are_is_everybody(fresh: Path, undisturbed: Path, k: int) -> None:
    result, ranks = done(fresh, f"evaluation.test_users={k}")
    assert len(users(ranks)) == 60
    assert figures(fresh / result["run_dir"]) == figures(undisturbed / "run")


def played(overrides: list[str], size: int | None) -> tuple[dict[str, Any], list[int]]:
    """All that a run finds with so many users asked at a time, by default as usual; and how many were, each time."""
    experiment = parse(TINY, overrides=overrides)
    device = Device.open(experiment, prepare(experiment.data))
    asked: list[int] = []
    answers: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    send = InProcessGrid.send_and_receive

    def watched(grid: InProcessGrid, messages: Any, *, timeout: float | None = None) -> list[Any]:
        replies = send(grid, sent := list(messages), timeout=timeout)
        if sent[0].metadata.message_type == "evaluate":
            asked.append(len(sent))
            answers.extend(dict(reply.content.metric_records[METRICS]) for reply in replies)
        return replies

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InProcessGrid, "send_and_receive", watched)
        patch.setattr(rounds, "RANKING_SLICE", size or rounds.RANKING_SLICE)
        outcome = play(device, lambda grid: rounds.serve(grid, experiment, None, lines.append))
    untimed = [line | {"seconds": None, "phases": None} for line in lines]
    return {"answers": answers, "lines": untimed, "test": outcome.test, "figures": outcome.figures}, asked


@pytest.mark.parametrize("engine", ["vectorized", "sequential"])
def test_how_many_are_asked_at_a_time_changes_nothing(engine: str) -> None:
    """Of 60 users 20 validate and 30 are tested, which are no multiples of 7."""
    overrides = ["evaluation={every: 3, users: 20, test_users: 30, sampled: 9}", f"runtime.engine={engine}"]
    whole, asked = played(overrides, None)
    assert asked == [20, 20, 30]
    assert [len(users(ranks)) for ranks in whole["test"]] == [30, 30, 0]  # nothing stays on devices here
    for size, sizes in {1: [1] * 70, 7: [7, 7, 6] * 2 + [7, 7, 7, 7, 2], 10**9: asked}.items():
        np.testing.assert_equal(played(overrides, size), (whole, sizes))
