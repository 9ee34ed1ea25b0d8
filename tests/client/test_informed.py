"""Inputs, a target behaviour and domains, with every loss: what counts, who rivals, and a cohort is its users."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch

from client import cohort
from client.batches import windows
from client.cohort import train
from client.evaluation import held_out_ranks, mask_seen, rank
from client.facts import assumed, require_facts
from client.problem import shared_negatives
from common.errors import DataError
from simulations import centralised
from tests.support import records, world
from tests.support.informed import (
    ALL_INPUTS,
    BEHAVIOURS,
    BUY,
    DOMAINS,
    EVENTS,
    EVERYBODY,
    HISTORIES,
    ITEMS,
    LENGTHS,
    NAMES,
    NEVER,
    OTHER_NAMES,
    RATINGS,
    ROUND,
    TIMES,
    case,
    data,
    norm,
    said,
    singles,
    targets,
    trained,
)

EACH_LOSS = pytest.mark.parametrize("loss", world.LOSSES)
KNOWN_LOSS = pytest.mark.parametrize("loss", centralised.LOSSES)
INPUTS = pytest.mark.parametrize("inputs", [False, True], ids=["items", "inputs"])
PREDICT = pytest.mark.parametrize("predict", ["target", "all"])
SPLIT = pytest.mark.parametrize("domains", [False, True], ids=["one", "domains"])


def test_there_is_something_of_everything():
    wanted = {user: (len(targets(user)), len(targets(user, "all"))) for user in EVERYBODY.tolist()}
    assert wanted[NEVER] == (0, 7)
    assert sum(some > 0 for some, _ in wanted.values()) > 4
    assert sum(0 < some < every for some, every in wanted.values()) > 3
    assert np.bincount(DOMAINS).min() > 1
    assert np.isnan(RATINGS).any()


# --- by hand ---------------------------------------------------------------------------------------------------------


def small(histories, behaviours, target=BUY, domains=None):
    """Few events, their behaviours by their first letters."""
    whole = dataclasses.replace(world.sequences(histories, held_out=False), target=target, behaviour_names=NAMES)
    letters = {name[0]: number for number, name in enumerate(NAMES)}
    numbers = np.array([letters[letter] for letter in behaviours], dtype=np.int8)
    whole.__dict__.update(behaviours=numbers, ratings=None, domains=None if domains is None else np.int8(domains))
    return whole


def blind(experiment, items):
    """Weights with which each item scores 0."""
    weights = world.weights(experiment.model, items)
    return weights._replace(table=torch.zeros_like(weights.table))


@pytest.mark.parametrize(("predict", "rivals"), [("target", [2]), ("all", [4, 2, 2])])
def test_without_any_idea_the_loss_counts_what_may_come(predict, rivals):
    """Items 0 to 3 are of one domain, 4 and 5 of another; with one domain all six may come."""
    experiment = case("softmax", inputs=False, predict=predict)
    for domains, many in (([0, 0, 0, 0, 1, 1], rivals), (None, [6] * len(rivals))):
        sequences = small([[0, 3, 4, 5]], "bvbv" if predict == "all" else "vvbv", domains=domains)
        (updates,) = train(experiment, blind(experiment, 6), sequences, np.array([0]), ROUND)
        assert updates.losses[0] == pytest.approx(np.log(many).mean(), rel=1e-6)
        assert updates.events.tolist() == [len(rivals)]


def test_negatives_are_neither_bought_nor_abroad():
    """All 12 items are drawn: 5 other toys that were not bought rival a toy, whether clicked or not."""
    experiment = case("sampled-softmax", inputs=False).model_copy(
        update={"loss": world.experiment(loss={"kind": "sampled-softmax", "negatives": 12}).loss}
    )
    sequences = small([[0, 7, 1, 2]], "vvbb", domains=[0] * 7 + [1] * 5)
    (updates,) = train(experiment, blind(experiment, 12), sequences, np.array([0]), ROUND)
    assert updates.losses[0] == pytest.approx(np.log(1 + 5), rel=1e-6)
    everything = small([[0, 7, 1, 2]], "vvbb", -1, [0] * 7 + [1] * 5)
    (updates,) = train(experiment, blind(experiment, 12), everything, np.array([0]), ROUND)
    assert updates.losses[0] == pytest.approx(np.log(1 + 4), rel=1e-6), "of 7, too, four of its own domain are left"


def test_what_was_bought_is_not_recommended_again():
    sequences = small([[0, 1, 2], [3, 1, 1]], "vbc" + "bvb")
    users, stops = np.arange(2), np.array([3, 5])
    scored = mask_seen(torch.zeros(2, 5), sequences, users, stops)
    assert scored.isneginf().nonzero().tolist() == [[0, 1], [1, 3]]
    assert mask_seen(torch.zeros(2, 5), sequences, users, np.array([3, 6])).isneginf().sum() == 3
    everything = small([[0, 1, 2], [3, 1, 1]], "vbc" + "bvb", target=-1)
    assert mask_seen(torch.zeros(2, 5), everything, users, stops).isneginf().sum() == 5


def test_ranks_by_hand():
    """1 was bought, 2 clicked; the held-out 4 is worth less than 0, 1, 2 and 5, of which 0 is of another domain."""
    scores = torch.tensor([[9.0, 8, 7, 1, 5, 6, 5]])
    two = [0, 1, 1, 1, 1, 1, 1]
    for target, domains, expected in ((BUY, None, 4.5), (BUY, two, 3.5), (-1, None, 3.5), (-1, two, 2.5)):
        sequences = small([[1, 2, 4]], "bvb", target, domains)
        found = held_out_ranks(scores.clone(), sequences, np.array([0]), np.array([2]), np.array([4]))
        assert found.tolist() == [expected]
    sequences = small([[4, 2, 4]], "bvb")  # bought before, and held out none the less
    assert held_out_ranks(scores.clone(), sequences, np.array([0]), np.array([2]), np.array([4])).tolist() == [5.5]


@EACH_LOSS
@pytest.mark.parametrize("steps", [1, 3])
def test_other_domains_are_no_matter(loss, steps):
    """Of each user in turn: all items that it never had, but for a few, are of another domain."""
    experiment, touched = case(loss, steps=steps), 0
    weights = world.weights(experiment.model, ITEMS)
    for user in (5, 8, 9):
        abroad = np.setdiff1d(np.arange(ITEMS), HISTORIES[user])[2:]
        for domains in (True, False):
            training, asking = data(domains=domains), data(domains=domains, held_out=True)
            if domains:
                for sequences in (training, asking):
                    sequences.__dict__["domains"] = np.isin(np.arange(ITEMS), abroad).astype(np.int8)
            other = weights._replace(table=weights.table.clone())
            other.table[abroad] = 10 * world.weights(experiment.model, ITEMS, seed=9).table[abroad]
            chunks = [[*train(experiment, each, training, np.array([user]), ROUND)] for each in (weights, other)]
            changes = [singles(each)[user] for each in chunks]
            ranks = [rank(experiment, each, asking, np.array([user]), "test").full[0] for each in (weights, other)]
            same = chunks[0][0].losses[0] == chunks[1][0].losses[0] and world.same(*changes) and ranks[0] == ranks[1]
            assert same or not domains
            touched += not same
            assert not (domains and changes[0].table[abroad].any())
    assert touched > (loss != "bce")


@pytest.mark.parametrize(("kind", "told"), [("behaviour", "behaviours"), ("rating", "ratings")])
def test_what_the_data_does_not_tell_is_refused(kind, told):
    experiment = world.experiment(model={"inputs": [each for each in ALL_INPUTS if each["kind"] == kind]})
    require_facts(experiment.model, data(), timed=False)
    with pytest.raises(DataError, match=f"knows no {told} of events, which model.inputs looks at"):
        require_facts(experiment.model, data(known=False), timed=True)


@pytest.mark.parametrize("kind", ["hour", "weekday", "interval", "time-aware"])
def test_without_times_none_are_looked_at(kind):
    model = {"attention": {"kind": kind}} if kind == "time-aware" else {"inputs": [{"kind": kind}]}
    experiment = world.experiment(model=model)
    require_facts(experiment.model, data(known=False), timed=True)
    with pytest.raises(DataError, match=f"knows no times of events, which .*{kind}"):
        require_facts(experiment.model, data(), timed=False)


def test_behaviours_without_a_name_in_the_model_are_refused():
    experiment = world.experiment(model={"inputs": [{"kind": "behaviour", "names": ["buy", "view"]}]})
    with pytest.raises(DataError, match="the data has 'cart', too; name all of view, cart, buy"):
        require_facts(experiment.model, data(), timed=True)


def test_of_a_told_history_the_target_is_assumed():
    said = assumed(case("softmax").model, data(), 3)
    assert said["times"].tolist() == [[0, 1, 2]]
    assert said["behaviours"].tolist() == [[OTHER_NAMES.index("buy")] * 3]
    assert np.isnan(said["ratings"]).all()
    assert said["ratings"].shape == (1, 3)
    assert assumed(case("softmax", inputs=False).model, data(), 3) is None


# --- known faults ----------------------------------------------------------------------------------------------------


def test_an_item_is_no_rival_of_itself():
    """With `predict: all` a clicked item may come; drawn as a negative, too, it counts nowhere."""
    experiment = world.experiment(
        loss={"kind": "sampled-softmax", "negatives": 1}, federation={"local": {"predict": "all"}}
    )
    (negative,) = shared_negatives(experiment.loss, experiment.seed, 1, ITEMS).tolist()
    sequences = small([[(negative + 1) % ITEMS, negative]], "vv")
    weights = world.weights(experiment.model, ITEMS)
    (updates,) = train(experiment, weights, sequences, np.array([0]), 1)
    assert updates.losses.tolist() == [0.0]


def test_who_has_learnt_something_counts():
    """One purchase, in some windows at random and not in others."""
    experiment = case("softmax", inputs=False, steps=3, window="random", weighting="events")
    sequences = small([[*range(20)]], "vvb" + "v" * 17)
    found = set()
    for round_ in range(1, 12):
        (updates,) = train(experiment, world.weights(experiment.model, ITEMS), sequences, np.array([0]), round_)
        moved = bool(updates.one(0).body.any())
        found.add(moved)
        assert moved == (updates.events[0] > 0)
    assert found == {False, True}


def test_a_mean_loss_is_one_of_steps_that_learn():
    """Only one of two pieces holds a purchase."""
    experiment = world.experiment(model={"max_length": 3}, federation={"local": {"epochs": 1, "lr": 1e-6}})
    sequences = small([[0, 1, 2, 3, 4, 5, 6]], "vvbvvvv")
    (updates,) = train(experiment, blind(experiment, 8), sequences, np.array([0]), 1)
    assert updates.losses[0] == pytest.approx(np.log(8), rel=1e-5)


def test_prox_pulls_in_steps_that_learn_only():
    """Weights do not move where nothing is learnt."""
    local = {"epochs": 1, "lr": 0.5, "prox": 1.0}
    experiment = world.experiment(model={"max_length": 3}, federation={"local": local})
    weights = world.weights(experiment.model, 8)
    first, both = (
        singles(train(experiment, weights, small([history], how), np.array([0]), 1))[0]
        for history, how in (([3, 4, 5, 6], "vvvb"), ([0, 1, 2, 3, 4, 5, 6], "vvvvvvb"))
    )
    assert world.gap(first, both) < 1e-6


# --- a cohort is its users -------------------------------------------------------------------------------------------


@EACH_LOSS
@INPUTS
@PREDICT
@SPLIT
@pytest.mark.parametrize(("steps", "window"), [(1, "last"), (3, "random")])
def test_a_cohort_is_its_users_one_by_one(loss, inputs, predict, domains, steps, window):
    experiment, sequences = case(loss, inputs, predict, steps, window), data(domains=domains)
    chunks = trained(experiment, sequences)
    together, losses = singles(chunks), said(chunks, "losses")
    for user in range(steps > 1, len(LENGTHS), 2):
        apart = trained(experiment, sequences, [user])
        assert world.gap(together[user], singles(apart)[user]) < 2e-6
        assert losses[user] == pytest.approx(apart[0].losses[0], abs=1e-5)
        if steps == 1:
            assert (norm(together[user]) > 1e-3) == bool(targets(user, predict)) == (losses[user] > 0)
    assert norm(together[NEVER]) == 0 or predict == "all"


@EACH_LOSS
@INPUTS
@PREDICT
@SPLIT
@pytest.mark.parametrize("weighting", ["uniform", "events"])
def test_the_shared_step_is_the_sum_of_its_users(loss, inputs, predict, domains, weighting):
    experiment = case(loss, inputs, predict, weighting=weighting, dim=16)
    for updates in trained(experiment, data(domains=domains)):
        total = records.dense(*updates.summed(updates.expected), ITEMS)
        assert len(updates) == 1 or "_stacked" not in updates.__dict__  # the pass with shared weights served
        if updates.expected.any():
            assert world.gap(total, records.added(updates, updates.expected, ITEMS)) < 2e-6 * updates.expected.sum()
        else:
            assert norm(total) == 0


@EACH_LOSS
@pytest.mark.parametrize("steps", [1, 3])
def test_a_bound_holds_for_each_user(loss, steps):
    experiment, sequences = case(loss, steps=steps), data()
    free = singles(trained(experiment, sequences))
    bound = float(np.median([norm(change) for change in free.values() if norm(change)]))
    weights = world.weights(experiment.model, ITEMS)
    for user, change in singles(train(experiment, weights, sequences, EVERYBODY, ROUND, bound)).items():
        scale = min(1.0, bound / max(norm(free[user]), 1e-9))
        assert max(float((scale * a - b).abs().max()) for a, b in zip(free[user], change, strict=True)) < 2e-6


@PREDICT
def test_events_count_what_is_predicted_only(predict):
    wanted = {user: len(targets(user, predict)) for user in EVERYBODY.tolist()}
    for (loss, weighting), steps in product([("softmax", "events"), ("bce", "uniform")], (1, 3)):
        chunks = trained(case(loss, True, predict, steps, weighting=weighting), data())
        assert said(chunks, "events") == wanted
        assert said(chunks, "expected") == (wanted if weighting == "events" else dict.fromkeys(wanted, 1))


def test_without_a_target_all_events_are_predicted():
    """Then `predict` says nothing, and behaviours are facts like any other."""
    one, other = (trained(case("softmax", predict=predict), data(target=-1)) for predict in ("target", "all"))
    assert all(world.same(*pair) for pair in zip(singles(one).values(), singles(other).values(), strict=True))
    assert said(one, "events") == {user: len(targets(user, "all")) for user in EVERYBODY.tolist()}


# --- what is known lies at its place ---------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [{"steps": 4, "window": "random"}, {"steps": 1}, {"epochs": 2}])
def test_windows_know_their_own_events(local):
    """Items number the events, so that each fact can be asked for again."""
    numbered = world.sequences(np.split(np.arange(EVENTS), np.cumsum(LENGTHS)[:-1]), held_out=False)
    numbered = dataclasses.replace(numbered, times=1000 * TIMES, per_second=1000, target=BUY, behaviour_names=NAMES)
    numbered.__dict__.update(behaviours=BEHAVIOURS, ratings=RATINGS)
    experiment = case("softmax")
    experiment = experiment.model_copy(update={"federation": world.experiment(federation={"local": local}).federation})
    ends = set()
    for users in cohort.plan(experiment, numbered, EVERYBODY, EVENTS):
        chunk = windows(experiment, numbered, users, ROUND)
        real = np.arange(chunk.events.shape[2]) < chunk.lengths[..., None]
        places = chunk.events[real]
        assert np.array_equal(chunk.facts["times"][real], TIMES[places])
        assert np.array_equal(chunk.facts["ratings"][real], RATINGS[places], equal_nan=True)
        rows = [OTHER_NAMES.index(NAMES[number]) for number in BEHAVIOURS[places]]
        assert chunk.facts["behaviours"][real].tolist() == rows
        assert np.array_equal(chunk.wanted[real], BEHAVIOURS[places] == BUY)
        assert np.array_equal(chunk.targets, real[..., 1:] & (BEHAVIOURS[chunk.events[..., 1:]] == BUY))
        assert np.array_equal(chunk.trained, chunk.targets.sum(-1))
        ends |= set(zip(*np.where(real)[:1], chunk.events.max(-1).ravel().repeat(chunk.lengths.ravel()), strict=True))
    assert len(ends) > len(LENGTHS) - 2
