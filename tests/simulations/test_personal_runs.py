"""Runs in which something stays on the devices: the same by every engine, killed or not; and worth it."""

from dataclasses import replace
from functools import cache, partial
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from client import tuning
from client.batches import windows
from client.device import Device
from client.evaluation import final_scores, rank
from client.own import OWN_FILE, RECORD, own_of
from client.problem import pose
from client.step import read_vectors, step_loss
from client.tuning import personal
from common.config import Experiment, LocalConfig
from common.data.prepare import prepare
from common.errors import Interrupted
from common.metrics import point
from common.models.personal import Kept, kept_columns
from common.models.weights import named
from common.privacy.card import STAYS, advice, planned
from server.rounds import serve
from server.strategy import FederatedRanking
from simulations import rundir
from simulations.engines import play
from simulations.grid import InProcessGrid
from simulations.inference import Trained
from simulations.report import render
from simulations.runner import run
from simulations.workers import Worker
from tests.support import world
from tests.support.network import SHARDS, Clock, Network
from tests.support.runs import metrics

ENGINES = {"vectorized": {}, "sequential": {"engine": "sequential"}, "workers": {"workers": 2}}
HERE = pytest.mark.parametrize("engine", ["vectorized", "sequential"])
TUNING = {"parameters": ["user.*", "norm.*"], "steps": 3, "lr": 1.0}
USERS = np.arange(12)
PERSONAL = ("bias", "scale")


class KilledError(Exception):
    """As a killed process, without the process."""


def experiment(
    engine="vectorized", rounds=6, tuned=False, on_device=("user.*", "norm.bias"), personal=PERSONAL, **sections
):
    evaluation = {
        "every": 3,
        "sampled": 5,
        **({"fine_tune": TUNING} if tuned else {}),
        **sections.pop("evaluation", {}),
    }
    federation = {"rounds": rounds, "cohort": 6, "local": {"steps": 2, "lr": 0.3}, "on_device": list(on_device)}
    federation |= {"on_device_lr": 1.0, "optimizer": {"kind": "fedadam", "lr": 0.05}}
    return world.experiment(
        loss=world.LOSSES["sampled-softmax"],
        model={"personal": list(personal)},
        federation=federation | sections.pop("federation", {}),
        evaluation=evaluation,
        runtime={"checkpoint_every": 3, **ENGINES[engine], **sections.pop("runtime", {})},
        **sections,
    )


def opened(given: Experiment, folder=None):
    return Device.open(given, prepare(given.data), folder)


def played(given, folder=None, observe=lambda line: None, **options):
    """The outcome, and what every user had before each round."""
    device = opened(given, folder)
    outcome = play(device, partial(serve, experiment=given, folder=folder, observe=observe, **options))
    rounds = range(1, given.federation.rounds + 2)
    return outcome, [device.own.before(USERS, r).values for r in rounds] if device.own else []


@cache
def whole(given: Experiment):
    """The same, of a run that nobody disturbs."""
    return played(given)


def assert_same(one, other, bound=0.0):
    (first, left), (second, right) = one, other
    assert world.gap(first.weights, second.weights) <= bound
    assert (first.rounds, first.best_round) == (second.rounds, second.best_round)
    for ranks, others in zip(first.test, second.test, strict=True):
        np.testing.assert_array_equal(ranks, others)
    for a, b in zip(left, right, strict=True):
        assert (a - b).abs().max() <= bound


# --- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "tuned"), [("sequential", False), ("sequential", True), ("workers", True)])
def test_engines_give_the_same_run(engine, tuned):
    plain = whole(experiment(tuned=tuned))
    test, own = plain[0].test, plain[1]
    assert np.isfinite(test.personal).sum() == np.isfinite(test.full).sum() > 6
    assert (test.personal != test.full).sum() > 2
    assert len(own[-1].unique(dim=0)) > 6
    assert_same(whole(experiment(engine, tuned=tuned)), plain, 1e-5)


def test_of_one_step_too():
    one = {"federation": {"local": {"steps": 1, "lr": 0.3}}}
    assert_same(played(experiment("sequential", **one)), played(experiment(**one)), 1e-5)


def test_the_test_is_ranked_with_what_the_chosen_round_has_left():
    given = experiment()
    outcome, own = whole(given)
    sequences, best = opened(given).sequences, outcome.best_round
    left, before = (
        rank(given, outcome.weights, sequences, USERS, "test", Kept(USERS, own[r])) for r in (best, best - 1)
    )
    np.testing.assert_array_equal(outcome.test.personal, left.personal)
    assert (before.personal != left.personal).any()


@pytest.fixture(scope="module", params=["vectorized", "sequential"])
def finished(request, tmp_path_factory):
    """A run directory, and what was run."""
    given = experiment(request.param)
    folder = rundir.create(given, tmp_path_factory.mktemp("runs") / request.param)
    return SimpleNamespace(given=given, folder=folder, result=run(given, folder, Console(quiet=True)))


def test_results_tell_of_it(finished):
    outcome, own = whole(finished.given)
    for name, value in point(outcome.test.personal, [5, 10, 20]).items():
        assert finished.result["test"][f"{name}|personal"]["value"] == pytest.approx(value, abs=1e-12)
    lines = [line for line in metrics(finished.folder) if line["kind"] == "validation"]
    assert [line["round"] for line in lines if "ndcg@10|personal" in line] == [3, 6]
    again = opened(finished.given, finished.folder).own
    for round_, values in enumerate(own, start=1):
        assert torch.equal(again.before(USERS, round_).values, values)
    console = Console(record=True, width=120, file=StringIO())
    render(console, finished.result)
    assert "With what stays on each device" in console.export_text()


# --- killed and resumed ----------------------------------------------------------------------------------------------


def at(round_, line):
    if line["round"] == round_ and line["kind"] == "train":
        raise KilledError


@HERE
@pytest.mark.parametrize("garbage", [b"", b"half an entry"])
def test_a_run_that_was_killed_is_one_that_was_not(tmp_path, engine, garbage):
    """Rounds 4 and 5 have been kept, and the checkpoint is of round 3."""
    given = experiment(engine, tuned=True)
    with pytest.raises(KilledError):
        played(given, tmp_path, partial(at, 5))
    own = opened(given, tmp_path).own
    assert (own.before(USERS, 6).values - own.before(USERS, 4).values).abs().max() > 1e-3
    file = tmp_path / OWN_FILE
    file.write_bytes(file.read_bytes() + garbage)
    assert_same(played(given, tmp_path, resume=True), whole(given))


@HERE
def test_a_run_that_was_killed_at_once_begins_anew(tmp_path, engine):
    given = experiment(engine)
    with pytest.raises(KilledError):
        played(given, tmp_path, partial(at, 2))
    assert (tmp_path / OWN_FILE).stat().st_size > 0
    assert_same(played(given, tmp_path, resume=True), whole(given))


@HERE
def test_a_run_that_was_stopped_again_and_again_is_one_that_was_not(tmp_path, engine):
    given, asked = experiment(engine), iter([False, True] * 9)
    for _ in range(2):
        with pytest.raises(Interrupted):
            played(given, tmp_path, resume=True, stopping=lambda: next(asked))
    assert_same(played(given, tmp_path, resume=True), whole(given))


# --- nodes of several users ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", ["sum", "users"])
def test_a_node_keeps_what_its_users_have(tmp_path, monkeypatch, shards):
    Clock.put(monkeypatch)
    given = experiment(tuned=True, federation={"shards": shards})
    network = Network(given, tmp_path)
    outcome = serve(network, given, None, lambda line: None)
    alone, own = whole(experiment(tuned=True))
    assert_same((outcome, []), (alone, []), 1e-5)
    for users, context in zip(SHARDS, network.contexts, strict=True):
        record = context.state.array_records[RECORD]
        of, rounds, values = (record[name].numpy() for name in ("user", "round", "values"))
        assert set(of) <= set(users)
        for user in set(of.tolist()):
            newest = values[of == user][rounds[of == user].argmax()]
            assert np.abs(newest - own[-1][user].numpy()).max() < 1e-5


@pytest.mark.parametrize("kind", ["sequential", "nodes"])
def test_an_early_round_that_was_chosen_is_looked_up_on_devices_too(tmp_path, monkeypatch, kind):
    """Contexts hold the last rounds only, and validation may have chosen one before these."""
    Clock.put(monkeypatch)
    quality = FederatedRanking.quality
    monkeypatch.setattr(
        FederatedRanking, "quality", lambda self, ranks, r: quality(self, ranks, r) | {"ndcg@10": 1 / (1 + r)}
    )
    few = {"runtime": {"checkpoint_every": 1, "checkpoints": 1}, "federation": {"cohort": 12}}
    plain, _ = played(experiment(**few))
    assert plain.best_round == 3
    if kind == "nodes":
        other = serve(Network(experiment(**few), tmp_path), experiment(**few), None, lambda line: None)
    else:
        other, _ = played(experiment("sequential", **few))
    assert_same((other, []), (plain, []), 1e-4)


# --- under user-level privacy ----------------------------------------------------------------------------------------

PRIVATE = {
    "privacy": {"kind": "user-level", "rng": "reproducible", "noise_multiplier": 1.0},
    "federation": {"sampling": "poisson", "weighting": "uniform"},
}


@pytest.mark.parametrize("metrics", ["noised", "public-holdout", "unaccounted"])
def test_what_nobody_may_be_told_no_device_works_out(metrics, monkeypatch):
    given = experiment(tuned=True, evaluation={"privacy": metrics}, **PRIVATE)
    device, tuned = opened(given), []
    train = tuning.train
    monkeypatch.setattr(tuning, "train", lambda *args, **options: tuned.append(1) or train(*args, **options))
    worker = Worker(given.model_dump_json(), str(device.sequences.folder))
    found = [worker.rank(world.weights(given.model, 20), USERS, "test")]
    lines = []
    found.append(play(device, partial(serve, experiment=given, folder=None, observe=lines.append)).test)
    for ranks in found:
        assert np.isfinite(ranks.full).any()
        assert np.isfinite(ranks.personal).any() == np.isfinite(ranks.sampled).any() == (metrics == "unaccounted")
    assert bool(tuned) == (metrics == "unaccounted")
    assert any("ndcg@10|personal" in line for line in lines) == (metrics == "unaccounted")
    assert (device.own.before(USERS, 7).values != device.own.before(USERS, 1).values).any()


def test_the_card_says_what_is_in_no_account():
    for kept, said in (("user.*",), 1), ((), 0):
        facts = planned(experiment(on_device=kept, tuned=True, **PRIVATE), 12, 600)
        assert [STAYS in advice(facts), facts["stays"] == STAYS] == [said, said]


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def test_fine_tuning_changes_no_global_figure():
    (with_, own), (without, _) = (whole(experiment(tuned=tuned, on_device=[], personal=[])) for tuned in (True, False))
    assert own == []
    assert world.same(with_.weights, without.weights)
    assert with_.best_round == without.best_round
    np.testing.assert_array_equal(with_.test.full, without.test.full)
    np.testing.assert_array_equal(with_.test.sampled, without.test.sampled)
    assert np.isnan(without.test.personal).all()
    assert (with_.test.personal != with_.test.full).sum() > 2
    told = {name: value for name, value in with_.figures.items() if "personal" not in name}
    assert told == without.figures
    assert with_.figures.keys() - told.keys() >= {"ndcg@10|personal", "mrr|personal"}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kept", [(), ("user.*",)])
def test_what_is_named_moves_by_plain_steps_and_nothing_else(steps, kept):
    tuning = {"parameters": ["norm.*"], "steps": steps, "lr": 0.2}
    sections = {"evaluation": {"fine_tune": tuning}, "federation": {"local": {"steps": 4, "lr": 9.0}}}
    given = experiment(on_device=kept, personal=PERSONAL if kept else (), **sections)
    device, weights = opened(given), world.weights(given.model, 20)
    given = device.experiment
    before = [part.clone() for part in weights]
    mine = kept_columns(given.model, kept)
    own = Kept(USERS, torch.randn(12, len(mine), generator=torch.Generator().manual_seed(1))) if kept else None
    users = USERS[::-1][:7].copy()
    person = personal(given, weights, device.sequences, users, own)
    assert all(torch.equal(part, was) for part, was in zip(weights, before, strict=True))
    found = person.bodies(given, weights.body, users)
    moving = kept_columns(given.model, (*kept, "norm.*"))
    still = torch.ones(len(weights.body), dtype=torch.bool)
    still[moving] = False
    assert torch.equal(found[:, still], weights.body[still].expand(len(users), -1))
    start = weights.body.expand(len(users), -1).clone()
    if own is not None:
        start[:, mine] = own.of(users).values
    trains = device.sequences.stops(users, "train")[0] - device.sequences.starts(users) > 1
    assert (found != start)[:, moving].any(1).tolist() == trains.tolist()
    assert trains.sum() > 4
    for user, body in zip(users, _by_hand(given, device, weights, users, start, moving), strict=True):
        assert (person.bodies(given, weights.body, np.array([user]))[0] - body).abs().max() < 2e-6


def _by_hand(given, device, weights, users, start, moving):
    """Plain SGD of some numbers of each body, the table as it is."""
    tuning = given.evaluation.fine_tune
    federation = given.federation.model_copy(update={"local": LocalConfig(steps=tuning.steps)})
    copy = given.model_copy(update={"federation": federation})
    for user, body in zip(users, start, strict=True):
        chunk = windows(copy, device.sequences, np.array([user]), 0)
        problem, _ = pose(copy, device.sequences, chunk, 0, len(weights.table))
        table = weights.table[torch.from_numpy(problem.rows)]
        here = body.clone()
        for step in range(tuning.steps):
            here.requires_grad_()
            parameters = named(given.model, here)
            loss = step_loss(copy, read_vectors(table, problem, step), parameters, problem, step, 0)
            (gradient,) = torch.autograd.grad(loss.sum(), here)
            here = here.detach().clone()
            here[moving] -= tuning.lr * gradient[moving]
        yield here


# --- afterwards ------------------------------------------------------------------------------------------------------


def test_recommendations_are_with_each_users_own(finished):
    given, folder, result = finished.given, finished.folder, finished.result
    trained, differs = Trained(folder), 0
    ids, sequences = trained.device.sequences.user_ids(), trained.device.sequences
    own = opened(given, folder).own.before(USERS, result["best_round"] + 1).values
    columns = kept_columns(given.model, given.federation.on_device)
    for user in USERS.tolist():
        items = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]].astype(np.int64)
        window = torch.from_numpy(items[-given.model.max_length :])[None]
        body = trained.weights.body.clone()
        body[columns] = own[user]
        lists = []
        for each in (body, trained.weights.body):
            with_ = trained.weights._replace(body=each)
            scored = final_scores(given.model, with_, window, torch.tensor([window.shape[1]]))[0]
            scored[torch.from_numpy(items)] = -torch.inf
            lists.append([str(item) for item in scored.topk(3).indices.tolist()])
        names = trained.device.catalogue.item_ids()
        found = [item["item"] for item in trained.top(trained.known(ids[user]), 3)]
        assert found == [names[int(item)] for item in lists[0]]
        differs += lists[0] != lists[1]
    assert differs > 2


# --- worth it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "better"), [(1.0, True), (1e-9, False)])
def test_where_users_differ_by_a_bias_alone_it_is_learnt(lr, better):
    """After item 0 comes everybody's favourite; the model sees one event; only a person's own bias can tell whose."""
    histories = [[0, 1 + user] * 5 for user in range(12)]
    given = world.experiment(
        model={"personal": ["bias"], "max_length": 1},
        federation={
            "rounds": 20,
            "optimizer": {"kind": "fedadam", "lr": 0.05},
            "cohort": 12,
            "local": {"epochs": 2, "lr": 0.3},
            "on_device": ["user.*"],
            "on_device_lr": lr,
        },
        evaluation={"every": 20},
    )
    device = replace(world.device(given, world.sequences(histories), 13), own=own_of(given, 0, 12, 13))
    test = serve(InProcessGrid(device, "vectorized"), given, None, lambda line: None).test
    assert test.full.mean() == 6.5  # the middle of the favourites
    assert test.personal.mean() == (1 if better else 6.5)
