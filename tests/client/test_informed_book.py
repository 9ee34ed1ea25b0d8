"""Inputs, a target behaviour, domains: losses, gradients and ranks are those of the reference; mistakes are seen."""

import dataclasses

import numpy as np
import pytest
import torch

from client import batches, cohort, evaluation, facts, step
from client.evaluation import rank
from client.problem import shared_negatives
from common.data.sequences import Sequences
from common.models.weights import named
from common.seeding import keep_mask, uniform_bits, uniform_integers
from simulations import centralised
from simulations.reference import SASRec
from tests.support import world
from tests.support.informed import (
    BEHAVIOURS,
    BUY,
    DOMAINS,
    EVERYBODY,
    HISTORIES,
    ITEMS,
    LENGTHS,
    LONGEST,
    NAMES,
    OTHER_NAMES,
    RATINGS,
    ROUND,
    TIMES,
    USERS_OF,
    VIEW,
    case,
    data,
    said,
    singles,
    targets,
    trained,
)
from tests.support.reference import position_loss

EACH_LOSS = pytest.mark.parametrize("loss", world.LOSSES)
KNOWN_LOSS = pytest.mark.parametrize("loss", centralised.LOSSES)
INPUTS = pytest.mark.parametrize("inputs", [False, True], ids=["items", "inputs"])
PREDICT = pytest.mark.parametrize("predict", ["target", "all"])
SPLIT = pytest.mark.parametrize("domains", [False, True], ids=["one", "domains"])


# --- the book --------------------------------------------------------------------------------------------------------


def book(experiment, scale=0.3):
    weights = world.weights(experiment.model, ITEMS, scale=scale)
    model = SASRec(experiment.model, ITEMS)
    model.load_named({"item": weights.table, **named(experiment.model, weights.body)})
    return model


def centralised_loss(experiment, model, sequences, user, step):
    return centralised.loss(experiment, model, sequences, np.array([user]), step)


def of_each_position(experiment, model, sequences, user, step):
    """The same loss, position by position and score by score; of all kinds."""
    places = np.arange(USERS_OF[user].start, USERS_OF[user].stop)[-LONGEST - 1 :]
    items, n, dim = torch.tensor(sequences.items[places]).long(), len(places) - 1, experiment.model.dim
    bits = uniform_bits(experiment.seed, "dropout-0", step, [user], max(n, 1) * model.sites * dim)
    masks = torch.from_numpy(keep_mask(bits, experiment.model.dropout)).view(1, -1, model.sites, dim)[:, :n]
    rows = [OTHER_NAMES.index(NAMES[number]) for number in BEHAVIOURS[places[:-1]]]
    known = {"times": TIMES[places[:-1]], "behaviours": np.array(rows), "ratings": RATINGS[places[:-1]]}
    known = {name: torch.tensor(values)[None] for name, values in known.items()}
    wanted = [at for at in range(n) if places[at + 1] in targets(user, experiment.federation.local.predict)]
    if not wanted:
        return torch.zeros(())
    scores = model(items[None, :-1], masks, known)[0] @ model.item.weight.T
    bought = {item for item, how in zip(HISTORIES[user], BEHAVIOURS[USERS_OF[user]], strict=True) if how == BUY}
    high = ITEMS if sequences.domains is None else 2**62  # then it is a number among those of the item's domain
    private = uniform_integers(experiment.seed, "private-negatives", step, [user], n, high)[0].tolist()
    shared, total = shared_negatives(experiment.loss, experiment.seed, step, ITEMS).tolist(), 0
    for at in wanted:
        goal, logits = int(items[at + 1]), scores[at]
        abroad = set() if sequences.domains is None else set(np.flatnonzero(DOMAINS[goal] != DOMAINS).tolist())
        logits = logits.index_fill(0, torch.tensor([*abroad], dtype=torch.int64), -torch.inf)
        kin = [item for item in range(ITEMS) if item not in abroad]
        negatives = [kin[private[at] % len(kin)]] if experiment.loss.kind == "bce" else shared
        total = total + position_loss(experiment.loss, logits, goal, negatives, bought | abroad)
    return total / len(wanted)


def of_book(experiment, sequences, user, expected):
    """Loss and negative gradient by name, of the reference."""
    model = book(experiment)
    loss = expected(experiment, model, sequences, user, ROUND)
    if loss.requires_grad:
        loss.backward()
    with torch.no_grad():
        for part in model.parameters():
            part.copy_(torch.zeros_like(part) if part.grad is None else -part.grad)
    return loss.item(), model.named()


def disagreement(experiment, sequences, users=EVERYBODY, expected=centralised_loss):
    """Largest difference of a loss or a gradient, as a share of the largest gradient."""
    chunks = trained(experiment, sequences, users)
    losses, worst = said(chunks, "losses"), 0.0
    for user, change in singles(chunks).items():
        if LENGTHS[user] < 1:
            continue
        loss, wanted = of_book(experiment, sequences, user, expected)
        found = {"item": change.table, **named(experiment.model, change.body)}
        assert found.keys() == wanted.keys()
        most = max(float(part.abs().max()) for part in wanted.values())
        gap = max(float((found[name] - part).abs().max()) for name, part in wanted.items())
        worst = max(worst, gap / max(most, 1e-3), abs(loss - losses[user]))
    return worst


@KNOWN_LOSS
@INPUTS
@PREDICT
@SPLIT
def test_losses_and_gradients_are_those_of_the_book(loss, inputs, predict, domains):
    window = "random" if domains == inputs else "last"
    assert disagreement(case(loss, inputs, predict, window=window), data(domains=domains)) < 2e-5


@EACH_LOSS
@INPUTS
@SPLIT
def test_losses_and_gradients_are_those_of_each_position(loss, inputs, domains):
    assert disagreement(case(loss, inputs), data(domains=domains), expected=of_each_position) < 2e-5


@INPUTS
@SPLIT
@pytest.mark.parametrize("target", [-1, VIEW, BUY])
def test_ranks_are_those_of_the_book(inputs, domains, target):
    experiment, sequences = case("softmax", inputs), data(target, domains, held_out=True)
    wanted = centralised.test_ranks(experiment, book(experiment), sequences)
    found = rank(experiment, world.weights(experiment.model, ITEMS), sequences, EVERYBODY, "test")
    np.testing.assert_array_equal(found.full, wanted)
    assert len(np.unique(wanted[np.isfinite(wanted)])) > 2
    if domains:
        _, goals = sequences.stops(EVERYBODY, "test")
        held = np.isfinite(wanted)
        assert (wanted[held] <= np.bincount(DOMAINS)[DOMAINS[goals[held]]]).all()


# --- planted mistakes ------------------------------------------------------------------------------------------------


def shifted(monkeypatch):
    """What is known of an event is that of the next."""
    whole = step.moments

    def moments(facts, lengths):
        known = whole(facts, lengths)
        return known._replace(behaviours=known.behaviours.roll(1, -1), ratings=known.ratings.roll(1, -1))

    monkeypatch.setattr(step, "moments", moments)


def late(monkeypatch):
    """Times are those of what comes next."""
    whole = batches.facts_at
    monkeypatch.setattr(
        batches, "facts_at", lambda *given: (said := whole(*given)) | {"times": np.roll(said["times"], -1, -1)}
    )


def unmapped(monkeypatch):
    """Behaviours by the data's numbers."""
    monkeypatch.setattr(facts, "_rows", lambda config, sequences: np.arange(3))


def borderless(monkeypatch):
    """Items of all domains are rivals."""
    whole = cohort.pose

    def pose(*given, **more):
        return tuple(problem._replace(domains=None) for problem in whole(*given, **more))

    monkeypatch.setattr(cohort, "pose", pose)


def greedy(monkeypatch):
    """All events are learnt to be predicted."""
    whole = cohort.windows
    monkeypatch.setattr(cohort, "windows", lambda *given: whole(*given)._replace(wanted=None))


def early(monkeypatch):
    """What is wanted is said of the event before."""
    whole = cohort.windows

    def windows(*given):
        chunk = whole(*given)
        return chunk._replace(wanted=np.roll(chunk.wanted, -1, -1))

    monkeypatch.setattr(cohort, "windows", windows)


@KNOWN_LOSS
@pytest.mark.parametrize("bug", [shifted, late, unmapped, borderless, greedy, early], ids=lambda bug: bug.__name__)
def test_a_mistake_is_seen(loss, bug, monkeypatch):
    experiment, sequences, some = case(loss, dropout=0.0), data(), [3, 6]
    assert disagreement(experiment, sequences, some) < 2e-5
    bug(monkeypatch)
    assert disagreement(experiment, sequences, some) > 1e-2


def shifted_in_ranking(monkeypatch):
    """What is known of an event is that of the next."""
    whole = evaluation.moments

    def moments(facts, lengths):
        known = whole(facts, lengths)
        return known._replace(behaviours=known.behaviours.roll(1, -1), ratings=known.ratings.roll(1, -1))

    monkeypatch.setattr(evaluation, "moments", moments)


def all_had(monkeypatch):
    """What was only looked at is left out, too."""
    monkeypatch.setattr(Sequences, "had", Sequences.events)


def worldwide(monkeypatch):
    """Items of all domains are rivals."""
    whole = evaluation.held_out_ranks

    def ranks(scored, sequences, *given):
        alone = dataclasses.replace(sequences)
        alone.__dict__.update(sequences.__dict__, domains=None)
        return whole(scored, alone, *given)

    monkeypatch.setattr(evaluation, "held_out_ranks", ranks)


@pytest.mark.parametrize("bug", [shifted_in_ranking, all_had, worldwide], ids=lambda bug: bug.__name__)
def test_a_mistake_in_ranking_is_seen(bug, monkeypatch):
    experiment, sequences = case("softmax"), data(held_out=True)
    weights = world.weights(experiment.model, ITEMS, scale=1.0)
    wanted = centralised.test_ranks(experiment, book(experiment, scale=1.0), sequences)
    np.testing.assert_array_equal(rank(experiment, weights, sequences, EVERYBODY, "test").full, wanted)
    bug(monkeypatch)
    found = rank(experiment, weights, sequences, EVERYBODY, "test").full
    assert not np.array_equal(found, wanted, equal_nan=True)
