"""The parity certificate: every engine computes the same, and that is what centralised training computes.

(a) vectorized = sequential = Flower's Ray engine, update by update. (b) In parity mode (one local step of lr 1, weights
by events, Adam on the server) the federated run equals a plain centralised loop that shares no training code with it,
in weights and in test metrics; and in one step of plain SGD, since Adam would hide a wrong scale of all updates.
(c) What more local steps cost, in NDCG, for information.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import isnan
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from client.accounts import Accounts
from client.device import Device
from common.config import Experiment, experiment_hash
from common.data import itemrows
from common.data.holdout import cold_of
from common.data.prepare import prepare
from common.data.sequences import Ints
from common.errors import UsageError
from common.metrics import point
from common.models.shapes import ITEM_TABLE
from common.models.weights import Weights, initialise, named
from common.privacy.schema import on_device
from common.wire import METRICS, UPDATE, record, whole_number
from server.aggregation import weigh, weighted_sum
from server.roster import Roster
from server.rounds import Outcome, serve
from server.sampling import cohort
from server.shard import Terms, admit
from server.strategy import FederatedRanking
from simulations import centralised
from simulations.engines import play
from simulations.reference_items import Items

ROUNDS, WARM_UP, LOCAL_STEPS, COHORT = 50, 5, 5, 32
"""Rounds of (b) and (c); rounds before (a), local steps and users in it."""
UPDATE_BOUND, NOISED_BOUND, WEIGHT_BOUND, METRIC_BOUND = 1e-6, 1e-5, 1e-4, 5e-4
"""Largest difference of an update's number, of one that devices noised (by Opacus, on their own), of a weight after
`ROUNDS` rounds of Adam, of a test metric."""
SGD = {"kind": "fedavg", "lr": 1.0}
"""Settings of a server that adds the mean update."""

Report = Callable[[str], None]


class Check(NamedTuple):
    """One line of the certificate."""

    name: str
    measured: float | None
    """None where it could not be measured; then `note` says why, and nothing is certified."""
    bound: float | None
    """None where it is for information."""
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the bound holds."""
        return self.bound is None or (self.measured is not None and self.measured <= self.bound)


def certify(experiment: Experiment, report: Report = lambda text: None) -> list[Check]:
    """Make the certificate of an experiment's data, model and loss.

    Parameters
    ----------
    experiment : Experiment
        Its federation is put into parity mode; rounds and patience are the certificate's own.
    report : callable
        Told what is under way.

    Raises
    ------
    UsageError
        As `require_known`.
    """
    require_known(experiment)
    if experiment.runtime.threads:
        torch.set_num_threads(experiment.runtime.threads)
    data = prepare(experiment.data)
    device = Device.open(parity_mode(experiment), data)
    private = experiment.privacy.kind != "none"
    checks = [*_engines(Device.open(private_mode(experiment), data) if private else device, report)]
    report(f"{ROUNDS} federated rounds")
    outcome = _federated(device)
    return [*checks, *_centralised(device, outcome, report), *_drift(device, outcome, report)]


def require_known(experiment: Experiment) -> None:
    """Refuse what the centralised loop does not know.

    Raises
    ------
    UsageError
        Where that is the loss, or what is left away or kept to oneself.
    """
    if experiment.loss.kind not in centralised.LOSSES:
        raise UsageError(f"loss.kind={experiment.loss.kind}: certified are {' and '.join(centralised.LOSSES)}")
    if experiment.model.own_dropout:
        raise UsageError("model.own_dropout: the centralised loop leaves no rows away; certify without it")
    if experiment.model.personal:
        raise UsageError("model.personal: the centralised loop knows one model for all; certify without it")


def parity_mode(experiment: Experiment) -> Experiment:
    """The same experiment for `ROUNDS` rounds of one local step of lr 1, weights by events, Adam on the server."""
    adam = experiment.federation.optimizer.model_dump(exclude={"kind", "momentum", "body"}) | {"kind": "fedadam"}
    if experiment.federation.optimizer.kind != "fedadam":
        adam = {"kind": "fedadam"}
    local = {"steps": 1, "lr": 1.0} | experiment.federation.local.model_dump(include={"window", "predict"})
    federation = {"rounds": ROUNDS, "weighting": "events", "local": local, "optimizer": adam, "on_device": []}
    off = ("patience", "users", "test_users", "fine_tune", "new_place")
    evaluation = {"every": ROUNDS, **dict.fromkeys(off), **_metrics(experiment, "noised")}
    return altered(experiment, federation=federation, evaluation=evaluation, privacy={"kind": "none"})


def private_mode(experiment: Experiment) -> Experiment:
    """The same experiment for (a) under its privacy mode, with noise that all engines can draw again."""
    privacy = experiment.privacy.model_dump(mode="json") | {"rng": "reproducible"}
    if privacy.get("on_device"):
        privacy["on_device"] |= {"rng": "reproducible"}
    return altered(experiment, privacy=privacy, evaluation=_metrics(experiment, "unaccounted"))


def _metrics(experiment: Experiment, kind: str) -> dict[str, Any]:
    """What metrics may look at, and nothing of what another kind would read."""
    default = type(experiment.evaluation)()
    return {"privacy": kind, "noise": default.noise, "holdout": default.holdout}


def altered(experiment: Experiment, **sections: dict[str, Any]) -> Experiment:
    """An experiment with some keys of its sections replaced, validated again; `privacy` is replaced as a whole."""
    values = experiment.model_dump(mode="json")
    merged = {name: section if name == "privacy" else values[name] | section for name, section in sections.items()}
    return Experiment.model_validate(values | merged)


def _engines(device: Device, report: Report) -> Iterator[Check]:
    """(a), for one local step and for several, from weights that have trained a little."""
    report("a few rounds to begin with")
    young = _with(device, federation={"rounds": WARM_UP}, evaluation={"every": WARM_UP})
    start = _federated(young).weights
    bound = UPDATE_BOUND if on_device(device.experiment.privacy) is None else NOISED_BOUND
    engines = ["sequential"] + (["ray"] if importlib.util.find_spec("ray") else [])
    for steps, lr in ((1, 1.0), (LOCAL_STEPS, 0.2)):
        here = _with(device, federation={"cohort": COHORT, "local": several(device, steps, lr)})
        updates = {}
        for engine in ("vectorized", *engines):
            report(f"updates, {steps} local step(s), {engine}")
            playing = _with(here, runtime={"engine": engine, "workers": 0})
            updates[engine] = play(playing, partial(_updates, experiment=playing.experiment, weights=start))
        singles, _, summed = updates["vectorized"]
        for engine in engines:
            name, others = f"each update, {steps} local step(s): vectorized = {engine}", updates[engine][0]
            if singles and singles.keys() == others.keys():
                gaps = [_gap(singles[user], other) for user, other in others.items()]
                yield Check(name, float(np.max(gaps)), bound)  # of Python's own maximum NaN may come out unseen
            else:
                yield Check(name, None, bound, f"{len(singles)} and {len(others)} users answered")
        if "ray" not in engines:
            yield Check(f"each update, {steps} local step(s): vectorized = ray", None, None, "needs the ray extra")
        _, mean, _ = updates["sequential"]
        yield Check(f"mean update, {steps} local step(s): as summed = one by one", _gap(summed, mean), bound)


def _updates(grid: Grid, experiment: Experiment, weights: Weights) -> tuple[dict[int, Weights], Weights, Weights]:
    """Every update of round 1, put into a whole table; their weighted mean; and that mean as the server makes it."""
    roster = Roster.discover(grid, experiment_hash(experiment))
    strategy = FederatedRanking(experiment, roster, Weights(*(part.clone() for part in weights)))
    sent = strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid)
    replies = [reply for reply in grid.send_and_receive(sent) if not reply.has_error()]
    good, _ = admit(replies, Terms(weights, roster, experiment.federation, strategy.curator.silent))
    importance = weigh(good, experiment.federation)
    importance /= importance.sum()
    share = dict(zip((reply.user for reply in good), importance.tolist(), strict=True))
    singles = {}
    mean = Weights(*(torch.zeros_like(part) for part in weights))
    for reply in replies:
        user = whole_number(record(reply.content, METRICS, MetricRecord), "user")
        if user not in share:
            continue
        update = record(reply.content, UPDATE, ArrayRecord)
        arrays = {name: torch.from_numpy(array.numpy()) for name, array in update.items()}
        table = torch.zeros_like(weights.table)
        table[arrays["rows"].long() if "rows" in arrays else slice(None)] = arrays["table"]
        singles[user] = Weights(table, arrays["body"])
        for part, change in zip(mean, singles[user], strict=True):
            part.add_(change, alpha=share[user])
    return singles, mean, weighted_sum(good, importance, weights)


def _centralised(device: Device, outcome: Outcome, report: Report) -> Iterator[Check]:
    """(b)."""
    experiment, sequences = device.experiment, device.sequences

    def batch(number: int) -> tuple[int, Ints]:
        return number, cohort(experiment.federation, len(sequences), experiment.seed, number)

    report("one step of plain SGD")
    once = _with(device, federation={"rounds": 1, "optimizer": SGD, "sampling": "fixed"}, evaluation={"every": 1})
    model = initial_model(device)
    users = cohort(once.experiment.federation, len(sequences), experiment.seed, 1)
    centralised.train_step(experiment, model, torch.optim.SGD(model.parameters(), lr=1.0), sequences, users, 1)
    name = "weights after one step of plain SGD: federated = centralised"
    yield _same_weights(name, UPDATE_BOUND, _federated(once).weights, model, experiment)

    report(f"{ROUNDS} centralised steps")
    model = initial_model(device)
    centralised.train(experiment, model, sequences, map(batch, range(1, ROUNDS + 1)))
    name = f"weights after {ROUNDS} rounds: federated = centralised"
    yield _same_weights(name, WEIGHT_BOUND, outcome.weights, model, experiment)
    here, there = point(outcome.test[0], [10]), point(centralised.test_ranks(device.experiment, model, sequences), [10])
    for name, value in there.items():
        note = f"{here[name]:.5f} and {value:.5f}"
        yield Check(f"test {name}: federated = centralised", abs(here[name] - value), METRIC_BOUND, note)


def _drift(device: Device, outcome: Outcome, report: Report) -> Iterator[Check]:
    """(c)."""
    report(f"{ROUNDS} rounds of {LOCAL_STEPS} local steps")
    longer = _federated(_with(device, federation={"local": several(device, LOCAL_STEPS, 0.2)}))
    one, more = (point(each.test[0], [10])["ndcg@10"] for each in (outcome, longer))
    note = f"{one:.4f} with one of lr 1, {more:.4f} with {LOCAL_STEPS} of lr 0.2, same rounds"
    yield Check(f"cost of {LOCAL_STEPS} local steps in test ndcg@10", one - more, None, note)


def several(device: Device, steps: int, lr: float) -> dict[str, Any]:
    """Local training of so many steps that learns what the experiment's does."""
    return {"steps": steps, "lr": lr, "predict": device.experiment.federation.local.predict}


def _with(device: Device, **sections: dict[str, Any]) -> Device:
    return replace(device, experiment=altered(device.experiment, **sections), accounts=Accounts())


def _federated(device: Device) -> Outcome:
    """The device's experiment, run to its end."""
    return play(device, partial(serve, experiment=device.experiment, folder=None, observe=lambda line: None))


def initial_model(device: Device) -> centralised.SASRec:
    """The centralised loop's model of an experiment, with the initial weights of a federated run."""
    experiment, items = device.experiment, device.catalogue.items
    known = None if experiment.model.items == "own" else itemrows.load(device.catalogue.folder)
    model = centralised.SASRec(experiment.model, Items(experiment.model, items, known, cold_of(experiment.data, items)))
    model.load_named(_by_name(initialise(experiment.model, device.rows, experiment.seed), experiment))
    return model


def _same_weights(
    name: str, bound: float, weights: Weights, model: centralised.SASRec, experiment: Experiment
) -> Check:
    federated, values = _by_name(weights, experiment), model.named()
    gaps = {each: float((federated[each] - value).abs().max()) for each, value in values.items()}
    worst = max(gaps, key=lambda each: (isnan(gaps[each]), gaps[each]))
    return Check(name, gaps[worst], bound, f"most in {worst}")


def _by_name(weights: Weights, experiment: Experiment) -> dict[str, Tensor]:
    return {ITEM_TABLE: weights.table} | named(experiment.model, weights.body)


def _gap(one: Weights, other: Weights) -> float:
    """Largest difference of any number; NaN where there is one."""
    return float(np.max([float((a - b).abs().max()) for a, b in zip(one, other, strict=True)]))
