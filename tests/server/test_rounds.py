"""The round loop: what it reports, which round it chooses, when it stops, and that a resume is no stop."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Error, Message

from common.errors import Interrupted, StateError
from common.models.weights import initialise
from common.wire import ROUND
from server import rounds
from server.checkpoint import load_model
from server.journal import read
from server.rounds import CHECKPOINT_FILE, MODEL_FILE, serve
from server.strategy import FederatedRanking
from simulations.grid import InProcessGrid
from tests.support import world

ITEMS = 15
HISTORIES = world.random_histories([2, 3, 4, 5, 6, 7, 8, 9, 10, 12], ITEMS)
OPTIMIZERS = ["fedavg", "fedavgm", "fedadam", "fedadagrad"]


class Watched(InProcessGrid):
    """A Grid that notes what it carries: (kind, round, split) of each batch of messages."""

    carried: list

    def send_and_receive(self, messages, *, timeout=None):
        sent = list(messages)
        told = sent[0].content.config_records[ROUND] if sent else {}
        kind = sent[0].metadata.message_type if sent else "nobody"
        self.__dict__.setdefault("carried", []).append((kind, told.get("round"), told.get("split")))
        return super().send_and_receive(sent, timeout=timeout)


class Refusing(InProcessGrid):
    """A Grid whose clients refuse to train."""

    def send_and_receive(self, messages, *, timeout=None):
        return [
            Message(Error(1, "no"), reply_to=message) if message.metadata.message_type == "train" else reply
            for message, reply in [(m, super(Refusing, self).send_and_receive([m])[0]) for m in messages]
        ]


def setup(federation=None, evaluation=None, **sections):
    return world.experiment(
        federation={"rounds": 8, "cohort": 4, "optimizer": {"kind": "fedadam", "lr": 0.05}, **(federation or {})},
        evaluation={"every": 2, **(evaluation or {})},
        model={"dropout": 0.2},
        **sections,
    )


def run(experiment, folder=None, observe=lambda line: None, grid=Watched, histories=HISTORIES, **options):
    grid = grid(world.device(experiment, world.sequences(histories), ITEMS), "vectorized")
    return serve(grid, experiment, folder, observe, **options), grid


def after(n):
    """A stop once n rounds are done."""
    count = itertools.count(1)
    return lambda: next(count) >= n


def timeless(lines):
    return [{name: value for name, value in line.items() if name not in {"seconds", "phases"}} for line in lines]


def equal(left, right):
    """Two outcomes, to the bit."""
    assert world.same(left.weights, right.weights)
    assert (left.rounds, left.best_round, left.bytes_down) == (right.rounds, right.best_round, right.bytes_down)
    for a, b in zip(left.test, right.test, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def scripted(monkeypatch):
    """Let validations find these values of NDCG@10, one after another."""

    def script(*values):
        found = iter(values)
        monkeypatch.setattr(FederatedRanking, "quality", lambda self, ranks, round_: {rounds.SELECT: next(found, 0.0)})

    return script


# --- what it reports -------------------------------------------------------------------------------------------------


def test_lines_of_a_run():
    lines = []
    outcome, grid = run(setup(federation={"rounds": 5}), observe=lines.append)
    assert [(line["kind"], line["round"]) for line in lines] == [
        ("train", 1),
        ("train", 2),
        ("validation", 2),
        ("train", 3),
        ("train", 4),
        ("validation", 4),
        ("train", 5),
        ("validation", 5),
    ]
    for line in lines:
        assert line["seconds"] >= 0
        if line["kind"] == "train":
            assert (line["clients"], line["rejected"]) == (4, 0)
            assert line["loss"] > 0
            assert line["bytes_up_per_client"] == outcome.bytes_down
            assert "reasons" not in line
        else:
            assert 0 <= line["ndcg@10"] <= line["hr@10"] <= 1
    assert outcome.bytes_down == 4 * sum(part.numel() for part in outcome.weights)
    assert grid.carried == [
        ("query", None, None),
        ("train", 1, None),
        ("train", 2, None),
        ("evaluate", 2, "validation"),
        ("train", 3, None),
        ("train", 4, None),
        ("evaluate", 4, "validation"),
        ("train", 5, None),
        ("evaluate", 5, "validation"),
        ("evaluate", outcome.best_round, "test"),
    ]


def test_the_outcome():
    outcome, _ = run(setup())
    assert outcome.rounds == 8
    full, sampled, personal = outcome.test
    assert np.isnan(full).tolist() == [len(history) < 3 for history in HISTORIES]
    assert np.isnan(sampled).all()
    assert np.isnan(personal).all()
    assert all(torch.isfinite(part).all() for part in outcome.weights)


def test_training_learns():
    """Everybody's next item is the next number: the held-out ranks must fall far below the middle."""
    histories = [[(start + step) % ITEMS for step in range(8)] for start in range(ITEMS)]
    experiment = setup(
        federation={"rounds": 60, "cohort": 15, "optimizer": {"kind": "fedadam", "lr": 0.02}}, evaluation={"every": 30}
    )
    outcome, _ = run(experiment, histories=histories)
    assert outcome.test[0].mean() < 1.5


# --- which round it chooses ------------------------------------------------------------------------------------------


def test_validation_chooses_the_round(scripted):
    scripted(0.1, 0.4, 0.4, 0.2)
    outcome, grid = run(setup())
    assert (outcome.rounds, outcome.best_round) == (8, 4)  # the first of equals
    assert grid.carried[-1] == ("evaluate", 4, "test")
    scripted(0.1, 0.4)
    shorter, _ = run(setup(federation={"rounds": 4}))
    equal(outcome, replace(shorter, rounds=8))


@pytest.mark.parametrize(
    ("values", "rounds_done", "best"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.9, 0.9, 0.9, 0.9], 4, 2),  # equal is no better
        ([0.1, 0.2, 0.1, 0.3, 0.2, 0.1, 0.5, 0.5], 6, 4),
        ([0.1, 0.0, 0.2, 0.0, 0.3, 0.0, 0.4, 0.0], 8, 7),
        ([float("nan")] * 8, 2, 2),
        ([float("nan"), 0.1, float("nan"), 0.0, 0.0, 0.0, 0.0, 0.0], 4, 2),
    ],
)
def test_patience(scripted, values, rounds_done, best):
    scripted(*values)
    outcome, _ = run(setup(evaluation={"every": 1, "patience": 2}))
    assert (outcome.rounds, outcome.best_round) == (rounds_done, best)


def test_without_any_figure_the_last_round_is_taken(scripted):
    scripted(*[float("nan")] * 4)
    outcome, _ = run(setup())
    assert (outcome.rounds, outcome.best_round) == (8, 8)
    assert not world.same(outcome.weights, initialise(setup().model, ITEMS, 0))


def test_a_part_of_the_users_may_validate():
    outcome, _ = run(setup(evaluation={"users": 3}))
    assert np.isfinite(outcome.test[0]).sum() == 9  # test always ranks all
    assert outcome.rounds == 8


# --- few or no rounds, few or no clients -----------------------------------------------------------------------------


def test_no_rounds():
    outcome, grid = run(setup(federation={"rounds": 0}))
    assert world.same(outcome.weights, initialise(setup().model, ITEMS, 0))
    assert (outcome.rounds, outcome.best_round) == (0, 0)
    assert grid.carried == [("query", None, None), ("evaluate", 0, "test")]


def test_rounds_without_anybody():
    lines, experiment = [], setup(federation={"sampling": "poisson", "cohort": 1, "rounds": 12})
    outcome, grid = run(experiment, observe=lines.append, histories=HISTORIES[5:8])
    train = [line for line in lines if line["kind"] == "train"]
    empty = [line for line in train if line["clients"] == 0]
    assert 0 < len(empty) < 12
    assert all("loss" not in line for line in empty)
    assert outcome.rounds == 12
    assert ("nobody", None, None) in grid.carried


def test_a_population_smaller_than_the_cohort():
    lines = []
    run(setup(federation={"cohort": 500}), observe=lines.append, histories=HISTORIES[5:7])
    assert {line["clients"] for line in lines if line["kind"] == "train"} == {2}


def test_users_that_are_never_ranked():
    """Nobody has a held-out item: figures are NaN, and the run still ends with the last round's model."""
    outcome, _ = run(setup(), histories=[[1, 2], [3, 4], [5, 6]])
    assert np.isnan(outcome.test[0]).all()
    assert outcome.best_round == 8


def test_clients_that_all_refuse():
    lines = []
    outcome, _ = run(setup(), observe=lines.append, grid=Refusing)
    assert world.same(outcome.weights, initialise(setup().model, ITEMS, 0))
    assert all(line["reasons"] == {"refused: no": 4} for line in lines if line["kind"] == "train")


# --- stop and resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resume_is_no_stop(tmp_path, kind):
    experiment = setup(federation={"optimizer": {"kind": kind, "lr": 0.05}})
    whole, half = tmp_path / "whole", tmp_path / "half"
    whole.mkdir(), half.mkdir()
    expected, _ = run(experiment, whole)
    with pytest.raises(Interrupted, match="stopped after round 3 of 8"):
        run(experiment, half, stopping=after(3))
    assert not (half / MODEL_FILE).exists()
    lines = []
    resumed, _ = run(experiment, half, lines.append, resume=True)
    equal(resumed, expected)
    assert [line["round"] for line in lines if line["kind"] == "train"] == [4, 5, 6, 7, 8]
    assert timeless(read(half)) == timeless(read(whole))
    assert (half / MODEL_FILE).read_bytes() == (whole / MODEL_FILE).read_bytes()
    assert (half / CHECKPOINT_FILE).read_bytes() == (whole / CHECKPOINT_FILE).read_bytes()


def test_a_resume_after_a_kill(tmp_path):
    """Killed in round 6; the checkpoint is of round 4, and what the journal says of later rounds is dropped."""
    experiment = setup(runtime={"checkpoint_every": 4})
    whole, half = tmp_path / "whole", tmp_path / "half"
    whole.mkdir(), half.mkdir()
    expected, _ = run(experiment, whole)

    def die(line):
        if line["round"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(experiment, half, die)
    assert read(half)[-1]["round"] == 6
    resumed, _ = run(experiment, half, resume=True)
    equal(resumed, expected)
    assert timeless(read(half)) == timeless(read(whole))


def test_patience_goes_on_after_a_resume(tmp_path, scripted):
    experiment = setup(evaluation={"every": 1, "patience": 3})
    scripted(0.5, 0.4, 0.3, 0.2)
    with pytest.raises(Interrupted):
        run(experiment, tmp_path, stopping=after(2))
    outcome, _ = run(experiment, tmp_path, resume=True)
    assert (outcome.rounds, outcome.best_round) == (4, 1)


def test_a_finished_run_is_not_run_again(tmp_path):
    expected, _ = run(setup(), tmp_path)
    lines = []
    outcome, grid = run(setup(), tmp_path, lines.append, resume=True)
    equal(outcome, expected)
    assert lines == []
    assert [kind for kind, *_ in grid.carried] == ["query", "evaluate"]


def test_a_stop_in_the_last_round_is_an_end(tmp_path):
    outcome, _ = run(setup(), tmp_path, stopping=after(8))
    assert outcome.rounds == 8


def test_resume_without_a_checkpoint_starts(tmp_path):
    outcome, _ = run(setup(), tmp_path, resume=True)
    equal(outcome, run(setup())[0])


def test_without_resume_a_run_starts_anew(tmp_path):
    with pytest.raises(Interrupted):
        run(setup(), tmp_path, stopping=after(3))
    lines = []
    outcome, _ = run(setup(), tmp_path, lines.append)
    equal(outcome, run(setup())[0])
    assert [line["round"] for line in lines if line["kind"] == "train"] == list(range(1, 9))
    assert timeless(read(tmp_path)) == timeless(lines)


def test_a_checkpoint_of_another_experiment_or_catalogue(tmp_path):
    with pytest.raises(Interrupted):
        run(setup(), tmp_path, stopping=after(3))
    with pytest.raises(StateError, match="another experiment"):
        run(setup(seed=5), tmp_path, resume=True)
    grid = InProcessGrid(world.device(setup(), world.sequences(HISTORIES), ITEMS + 1), "vectorized")
    with pytest.raises(StateError, match="has 15 rows, the data 16"):
        serve(grid, setup(), tmp_path, print, resume=True)


def test_files_of_a_run(tmp_path):
    outcome, _ = run(setup(), tmp_path)
    names = [CHECKPOINT_FILE, "metrics.jsonl", MODEL_FILE, "privacy.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert world.same(load_model(tmp_path / MODEL_FILE, setup(), ITEMS), outcome.weights)


def test_no_folder_is_said_before_training(tmp_path):
    lines = []
    with pytest.raises(StateError, match="no such file or folder"):
        run(setup(), tmp_path / "none", lines.append)
    assert lines == []


def test_a_folder_or_none_gives_the_same_model(tmp_path):
    equal(run(setup(), tmp_path)[0], run(setup())[0])
