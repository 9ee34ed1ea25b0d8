"""Whole runs on a table with behaviours, ratings, domains: engines agree, figures are told by domain, parity holds."""

import importlib.util
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from client import cohort, evaluation, step
from client.device import Device
from client.evaluation import rank
from client.problem import shared_negatives
from common.data.prepare import prepare
from common.errors import DataError
from common.metrics import point
from server.rounds import serve
from simulations import certify, figures, report, rundir, runner
from simulations.engines import play
from simulations.inference import Trained
from tests.support import records, world

USERS, ROUNDS = 30, 3
COLUMNS = {"behaviour": "how", "domain": "shop", "rating": "stars"}
INPUTS = [
    {"kind": "behaviour", "names": ["buy", "cart", "view"]},
    {"kind": "rating"},
    {"kind": "hour"},
    {"kind": "weekday"},
    {"kind": "interval", "buckets": 20},
]
EACH_LOSS = pytest.mark.parametrize("loss", ["softmax", "sampled-softmax"])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A table in which people buy what they looked at, at some shop; the last one only looks."""
    rng, lines = np.random.default_rng(0), ["user,item,time,how,shop,stars"]
    for user in range(USERS):
        time = 10**9
        for _ in range(rng.integers(5, 25)):
            time += int(rng.choice([0, 5, 600, 86_400]))
            how = "view" if user == USERS - 1 else rng.choice(["view", "cart", "buy"], p=[0.5, 0.1, 0.4])
            shop, stars = rng.choice(["toy", "game"], p=[0.7, 0.3]), rng.integers(2, 11) / 2
            lines.append(f"u{user},{rng.integers(14)},{time},{how},{shop},{stars}")
    file = tmp_path_factory.mktemp("table") / "t.csv"
    file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.fixture
def told(path):
    """An experiment on the table; keywords are sections."""

    def experiment(**sections):
        data = {"kind": "table", "path": path, "columns": COLUMNS, "target": "buy", "ties": "target-first"}
        return world.experiment(
            **{
                "data": data | sections.pop("data", {}),
                "model": {"dropout": 0.2, "max_length": 11, "inputs": INPUTS} | sections.pop("model", {}),
                "loss": world.LOSSES[sections.pop("loss", "sampled-softmax")],
                "federation": {"rounds": ROUNDS, "cohort": 20, "optimizer": {"kind": "fedadam", "lr": 0.01}},
                "evaluation": {"every": ROUNDS, "sampled": 5},
                **sections,
            }
        )

    return experiment


def device_of(experiment):
    return Device.open(experiment, prepare(experiment.data))


def played(experiment):
    device = device_of(experiment)
    return play(device, partial(serve, experiment=experiment, folder=None, observe=lambda line: None))


# --- engines ---------------------------------------------------------------------------------------------------------


@EACH_LOSS
@pytest.mark.parametrize("local", [{"steps": 1}, {"steps": 2, "lr": 0.3, "window": "random", "predict": "all"}])
def test_engines_give_the_same_run(told, loss, local):
    federation = {"rounds": ROUNDS, "cohort": 20, "local": local}
    one, other = (
        played(told(loss=loss, federation=federation, runtime={"engine": e})) for e in ("vectorized", "sequential")
    )
    assert world.gap(one.weights, other.weights) < 1e-5
    for ranks, others in zip(one.test, other.test, strict=True):
        np.testing.assert_array_equal(ranks, others)
    assert np.isfinite(one.test[0]).sum() > 20
    assert np.isnan(one.test[0][-1]), "who never buys is not tested"


def test_training_moves_what_inputs_know(told):
    experiment = told(loss="softmax")
    first, last = played(told(loss="softmax", federation={"rounds": 1})), played(experiment)
    assert world.gap(first.weights, last.weights) > 1e-3


def test_behaviours_that_the_model_has_no_name_for_are_refused(told):
    with pytest.raises(DataError, match="name all of"):
        device_of(told(model={"inputs": [{"kind": "behaviour", "names": ["buy"]}]}))


@pytest.mark.parametrize("loss", world.LOSSES)
@pytest.mark.parametrize("items", ["features", "both"])
def test_items_that_are_built_have_domains(told, loss, items, path):
    """A cohort is its users; where all items score 0, the rivals of a target are those of its domain."""
    about = Path(path).with_name("about.csv")
    about.write_text(
        "item,kind\n" + "".join(f"{shop}/{i},{'abc'[i % 3]}\n" for shop in ("toy", "game") for i in range(14))
    )
    features = {"source": str(about), "columns": [{"kind": "categorical", "name": "kind"}]}
    device = device_of(told(loss=loss, data={"features": features}, model={"items": items}))
    sequences, users = device.sequences, np.arange(USERS)
    weights = world.weights(device.experiment.model, device.rows)
    for updates in cohort.train(device.experiment, weights, sequences, users, 2):
        total = records.dense(*updates.summed(updates.expected), device.rows)
        assert world.gap(total, records.added(updates, updates.expected, device.rows)) < 1e-5 * updates.expected.sum()
        (alone,) = cohort.train(device.experiment, weights, sequences, updates.users[:1], 2)
        assert world.gap(alone.one(0), updates.one(0)) < 2e-6
    if loss not in {"softmax", "sampled-softmax"}:
        return
    blind, domains = weights._replace(table=torch.zeros_like(weights.table)), sequences.domains
    drawn = shared_negatives(device.experiment.loss, device.experiment.seed, 2, len(domains))
    for updates in cohort.train(device.experiment, blind, sequences, users, 2):
        for user, found in zip(updates.users, updates.losses, strict=True):
            places = np.arange(sequences.offsets[user], sequences.train_end[user])
            bought = sequences.items[places[sequences.targets(places)]]
            goals = sequences.items[[place for place in places[-12:][1:] if sequences.targets(place)]]
            rivals = np.arange(len(domains)) if loss == "softmax" else np.setdiff1d(drawn, bought)
            many = [(domains[rivals] == domains[goal]).sum() + (loss != "softmax") for goal in goals]
            assert found == pytest.approx(np.log(many).mean() if many else 0, rel=1e-5)


# --- figures by domain -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(path, tmp_path_factory):
    """One finished run, and what it says."""
    data = {"kind": "table", "path": path, "columns": COLUMNS, "target": "buy"}
    experiment = world.experiment(
        data=data,
        model={"max_length": 11, "inputs": INPUTS},
        loss=world.LOSSES["softmax"],
        federation={"rounds": ROUNDS, "cohort": 20},
        evaluation={"every": ROUNDS, "sampled": 5},
    )
    folder = rundir.create(experiment, tmp_path_factory.mktemp("runs") / "run")
    return folder, runner.run(experiment, folder, Console(quiet=True))


def test_the_result_tells_each_domain(ran):
    folder, result = ran
    assert result == json.loads((folder / "result.json").read_text())
    trained = Trained(folder)
    sequences = trained.device.sequences
    everybody = np.arange(len(sequences))
    ranks = rank(trained.device.experiment, trained.weights, sequences, everybody, "test").full
    _, goals = sequences.stops(everybody, "test")
    for number, name in enumerate(sequences.domain_names):
        inside = np.isfinite(ranks) & (sequences.domains[goals] == number)
        assert inside.sum() > 2
        for metric, value in point(ranks[inside], [10]).items():
            assert result["test"][f"{metric}|{name}"]["value"] == pytest.approx(value)
        assert ranks[inside].max() <= (sequences.domains == number).sum()
    for metric, value in point(ranks, [10]).items():
        assert result["test"][metric]["value"] == pytest.approx(value)
    assert set(sequences.domain_names) == {"toy", "game"}
    assert {name.partition("|")[2] for name in result["test"]} == {"", "s5", "toy", "game"}


def test_the_report_has_a_part_for_each_domain(ran, capsys):
    _, result = ran
    report.render(Console(width=200), result)
    said = capsys.readouterr().out
    for name in ("toy", "game"):
        assert f"Users whose last item is one of {name}, ranked among these" in said
    assert said.count("NDCG@10|toy") == 1


def test_one_domain_has_no_part_of_its_own(told):
    device = device_of(told(data={"only": {"domains": ["toy"]}}))
    assert set(figures.domain_targets(device, "test")) == {"toy", "game"}
    assert not figures.domain_targets(device, "test")["game"].any()
    plain = device_of(told(data={"columns": {"behaviour": "how", "rating": "stars"}}))
    assert figures.domain_targets(plain, "test") == {}


# --- the certificate -------------------------------------------------------------------------------------------------


@pytest.fixture
def _few(monkeypatch):
    """Few rounds; and no Ray, whether or not it is there."""
    find = importlib.util.find_spec
    monkeypatch.setattr(certify, "ROUNDS", ROUNDS)
    monkeypatch.setattr(certify, "COHORT", 10)
    finding = SimpleNamespace(find_spec=lambda name: None if name == "ray" else find(name))
    monkeypatch.setattr(certify, "importlib", SimpleNamespace(util=finding))


@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize(
    ("loss", "predict"), [("softmax", "target"), ("sampled-softmax", "target"), ("sampled-softmax", "all")]
)
def test_it_is_certified(told, loss, predict):
    checks = certify.certify(told(loss=loss, federation={"local": {"predict": predict}}))
    assert [check.name for check in checks if not check.passed] == []
    assert sum(check.bound is not None for check in checks) == 9


def shifted(monkeypatch):
    """What clients know of an event is that of the next."""
    whole = step.moments

    def moments(facts, lengths):
        known = whole(facts, lengths)
        return known._replace(behaviours=known.behaviours.roll(1, -1))

    monkeypatch.setattr(step, "moments", moments)


def borderless(monkeypatch):
    """To clients, items of all domains are rivals."""
    whole = cohort.pose

    def pose(*given, **more):
        return tuple(problem._replace(domains=None) for problem in whole(*given, **more))

    monkeypatch.setattr(cohort, "pose", pose)


def greedy(monkeypatch):
    """Clients learn to predict all events."""
    whole = cohort.windows
    monkeypatch.setattr(cohort, "windows", lambda *given: whole(*given)._replace(wanted=None))


def tireless(monkeypatch):
    """Clients rank what a user has bought already, too."""
    monkeypatch.setattr(evaluation, "mask_seen", lambda scored, *given: scored)


@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("bug", [shifted, borderless, greedy, tireless], ids=lambda bug: bug.__name__)
def test_a_certificate_tells_of_a_bug(told, bug, monkeypatch):
    bug(monkeypatch)
    broken = [check.name for check in certify.certify(told(loss="softmax")) if not check.passed]
    assert broken
    assert any(name.startswith("test" if bug is tireless else "weights after one step") for name in broken)
    assert not any("vectorized" in name for name in broken), "all engines have it"


def test_parity_mode_predicts_what_the_experiment_does(told):
    for predict in ("target", "all"):
        experiment = told(federation={"local": {"steps": 2, "predict": predict}})
        assert certify.parity_mode(experiment).federation.local.predict == predict
