"""Cohort training: against a slow reference, one by one, in any order and chunking, and with one user broken."""

import numpy as np
import pytest
import torch

from client import batches, problem, step
from common.config import FederationConfig, LocalConfig
from common.models.weights import Weights, named
from common.seeding import uniform_integers
from tests.support import records, reference, world

ITEMS = 60
LONGEST = 11  # so that there are two widths of windows, 8 and 11
LENGTHS = [1, 2, 3, 9, 10, 12, 13, 23, 30]  # around these, their multiples, and nothing to train on
HISTORIES = world.random_histories(LENGTHS, ITEMS)
DATA = world.sequences(HISTORIES, held_out=False)
EVERYBODY = np.arange(len(LENGTHS))
LOCALS = {
    "one step": {"steps": 1},
    "three steps": {"steps": 3},
    "two epochs": {"epochs": 2},
    "random windows": {"steps": 3, "window": "random"},
    "proximal": {"steps": 3, "prox": 0.7},
    "dropout": {"epochs": 2},
}


def case(loss, local, **model):
    dropout = 0.3 if local == "dropout" else 0.0
    return world.experiment(
        loss=world.LOSSES[loss],
        model={"dropout": dropout, "blocks": 2, "max_length": LONGEST, **model},
        federation={"local": {"lr": 0.3, **LOCALS[local]}},
    )


CASES = pytest.mark.parametrize(
    "experiment", [pytest.param(case(loss, local), id=f"{loss}-{local}") for loss in world.LOSSES for local in LOCALS]
)
EACH_LOSS = pytest.mark.parametrize("loss", world.LOSSES)


def updates(experiment, users=EVERYBODY, weights=None, data=DATA, round_=3):
    weights = world.weights(experiment.model, ITEMS) if weights is None else weights
    return {update.user: update for update in records.trained(experiment, weights, data, np.asarray(users), round_)}


def dense(update):
    """The update of the whole table."""
    if update.rows is None:
        return update.weights
    table = torch.zeros(ITEMS, update.weights.table.shape[1])
    table[torch.from_numpy(update.rows).long()] = update.weights.table
    return Weights(table, update.weights.body)


def agree(left, right, atol):
    """Updates of the same users, equal but for rounding."""
    assert left.keys() == right.keys()
    for user, one in left.items():
        other = right[user]
        assert (one.rows is None) == (other.rows is None)
        assert one.rows is None or one.rows.tolist() == other.rows.tolist()
        assert world.gap(one.weights, other.weights) <= atol
        assert (one.events, one.sound) == (other.events, other.sound)
        assert one.loss == pytest.approx(other.loss, abs=1e-5)


# --- the algorithm ---------------------------------------------------------------------------------------------------


@CASES
def test_an_update_is_that_of_the_slow_reference(experiment):
    weights = world.weights(experiment.model, ITEMS)
    found = updates(experiment, weights=weights)
    assert sorted(found) == EVERYBODY.tolist()
    for user, update in found.items():
        expected, loss = reference.train(experiment, weights, HISTORIES[user], user, 3)
        assert world.gap(dense(update), Weights(*(part.float() for part in expected))) < 4e-6
        assert update.loss == pytest.approx(loss, abs=1e-5)
        assert update.sound
        if len(HISTORIES[user]) > 1:
            assert world.gap(dense(update), Weights(*(0 * part for part in weights))) > 1e-3


@CASES
def test_a_cohort_is_its_users_one_by_one(experiment):
    alone = {user: updates(experiment, [user])[user] for user in EVERYBODY.tolist()}
    agree(updates(experiment), alone, 1e-6)


@CASES
def test_neither_order_nor_chunks_matter(experiment, monkeypatch):
    together = updates(experiment)
    agree(updates(experiment, EVERYBODY[::-1]), together, 1e-6)
    for size in (1, 2):  # users a chunk
        monkeypatch.setattr(batches, "CHUNK_USERS", size)
        agree(updates(experiment), together, 1e-6)
    monkeypatch.undo()
    monkeypatch.setattr(batches, "CHUNK_BYTES", 0)
    agree(updates(experiment), together, 1e-6)


@CASES
def test_nothing_is_left_to_chance(experiment):
    agree(updates(experiment), updates(experiment), 0)


@EACH_LOSS
def test_the_update_is_local_minus_global_and_the_global_weights_stay(loss):
    """One step of SGD: the update is −lr · gradient, hence proportional to the learning rate."""
    weights = world.weights(case(loss, "one step").model, ITEMS)
    before = Weights(*(part.clone() for part in weights))
    experiment = case(loss, "one step")
    half, whole = (LocalConfig(lr=lr) for lr in (0.5, 1.0))
    small, large = (
        updates(experiment.model_copy(update={"federation": FederationConfig(local=local)}), weights=weights)
        for local in (half, whole)
    )
    assert world.same(weights, before)
    for user in small:
        assert world.gap(Weights(*(2 * part for part in small[user].weights)), large[user].weights) < 1e-6


def test_proximal_gradient_by_hand():
    lr, prox = 0.25, 2.0
    plain, pulled, first = (
        updates(world.experiment(federation={"local": {"lr": lr, **local}}), [4])[4].weights
        for local in ({"steps": 2}, {"steps": 2, "prox": prox}, {"steps": 1})
    )
    # The first step feels no pull, so both second steps have the same gradient; they differ by the pull alone.
    for without, with_, way in zip(plain, pulled, first, strict=True):
        assert torch.allclose(with_, without - lr * prox * way, atol=1e-6)
        assert (with_ - without).abs().max() > 1e-3


def test_padded_steps_feel_no_pull():
    """A user with fewer pieces than its company stands still in the remaining steps, also with FedProx."""
    experiment = world.experiment(federation={"local": {"epochs": 1, "prox": 1.0, "lr": 0.3}})
    company, alone = updates(experiment, [3, 8]), updates(experiment, [3])
    agree({3: company[3]}, alone, 1e-6)


def test_dropout_draws_anew_each_step_round_and_user():
    experiment = case("softmax", "dropout")
    twins = world.sequences([HISTORIES[4]] * 2, held_out=False)
    one, other = (updates(experiment, [user], data=twins)[user] for user in (0, 1))
    assert world.gap(one.weights, other.weights) > 1e-3
    assert world.gap(one.weights, updates(experiment, [0], data=twins, round_=4)[0].weights) > 1e-3


@pytest.mark.parametrize(
    "local", [{"steps": 2}, {"epochs": 2}, {"steps": 2, "window": "random"}, {"steps": 1, "prox": 1.0}]
)
@EACH_LOSS
def test_without_a_target_nothing_moves(loss, local):
    data = world.sequences([[3], [], [1, 2]], held_out=False)
    experiment = world.experiment(loss=world.LOSSES[loss], model={"dropout": 0.2}, federation={"local": local})
    found = updates(experiment, [0, 1, 2], data=data)
    for user in (0, 1):
        assert (found[user].events, found[user].loss, found[user].sound) == (0, 0, True)
        assert not any(part.any() for part in found[user].weights)
    assert found[2].events == 1
    assert found[2].weights.body.any()
    for lonely in ([0], [1], [0, 1]):
        agree(updates(experiment, lonely, data=data), {user: found[user] for user in lonely}, 0)


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ({"steps": 1}, [0, 1, 2, 8, 9, 11, 11, 11, 11]),
        ({"steps": 3, "window": "random"}, [0, 1, 2, 8, 9, 11, 11, 11, 11]),
        ({"epochs": 2}, [0, 1, 2, 8, 9, 11, 12, 22, 29]),
    ],
)
def test_events_are_the_targets_of_one_pass(local, expected):
    found = updates(world.experiment(model={"max_length": LONGEST}, federation={"local": local}))
    assert [found[user].events for user in EVERYBODY] == expected


# --- sparse rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sampled-softmax", "gbce", "bce"])
@pytest.mark.parametrize("local", ["three steps", "two epochs"])
def test_rows_are_those_that_a_dense_update_would_move(loss, local):
    experiment = case(loss, local)
    weights = world.weights(experiment.model, ITEMS)
    for user, update in updates(experiment, weights=weights).items():
        moved = set(
            reference.train(experiment, weights, HISTORIES[user], user, 3)[0].table.any(1).nonzero().flatten().tolist()
        )
        rows = update.rows.tolist()
        assert update.rows.dtype == np.int32
        assert len(set(rows)) == len(rows) == len(update.weights.table)
        assert moved <= set(rows)
        still = update.weights.table[[row not in moved for row in rows]]
        assert not still.any()


def test_the_full_softmax_moves_the_whole_table():
    assert all(update.rows is None for update in updates(case("softmax", "one step")).values())


def test_rows_by_hand(monkeypatch):
    monkeypatch.setattr(problem, "shared_negatives", lambda *_: np.array([2, 9]))
    data = world.sequences([[5, 9, 3]], held_out=False)
    found = updates(world.experiment(loss=world.LOSSES["gbce"]), [0], data=data)
    assert found[0].rows.tolist() == [2, 9, 3, 5]
    # 9 is the user's own, so it is a target here but never a negative; 2 is pushed away.
    assert found[0].weights.table.any(1).tolist() == [True] * 4


def test_cost_does_not_grow_with_the_catalogue():
    experiment = case("sampled-softmax", "one step")
    large = Weights(torch.zeros(100_000, 8), world.weights(experiment.model, 1).body)
    assert all(len(update.weights.table) <= 7 + LONGEST + 1 for update in updates(experiment, weights=large).values())


# --- trouble stays with who has it -----------------------------------------------------------------------------------


def healthy(found, expected, broken):
    assert not found[broken].sound
    agree({u: v for u, v in found.items() if u != broken}, {u: v for u, v in expected.items() if u != broken}, 1e-6)


@CASES
def test_a_user_whose_numbers_break_keeps_them_to_itself(experiment, monkeypatch):
    """NaN planted into one user's dropout masks, in the middle of its company."""
    experiment = experiment.model_copy(update={"model": experiment.model.model_copy(update={"dropout": 0.3})})
    expected = updates(experiment)
    bits, keep, seen = step.uniform_bits, step.keep_mask, []

    def remember(seed, purpose, round_, users, n):
        seen.append(users)
        return bits(seed, purpose, round_, users, n)

    def poisoned(drawn, share):
        mask = keep(drawn, share)
        mask[seen.pop() == 4] = np.nan
        return mask

    monkeypatch.setattr(step, "uniform_bits", remember)
    monkeypatch.setattr(step, "keep_mask", poisoned)
    healthy(updates(experiment), expected, broken=4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("loss", ["sampled-softmax", "gbce", "bce"])
def test_a_broken_row_hurts_only_who_touches_it(loss, value):
    experiment = case(loss, "three steps")
    weights = world.weights(experiment.model, ITEMS)
    expected = updates(experiment, weights=weights)
    touched = {user: set(update.rows.tolist()) for user, update in expected.items()}
    # Not item 0, which also fills the unused places of a cohort's tables.
    only = {item: [user for user in touched if item in touched[user]] for item in range(1, ITEMS)}
    item, (victim,) = next((item, users) for item, users in only.items() if len(users) == 1)
    weights.table[item] = value
    healthy(updates(experiment, weights=weights), expected, broken=victim)


def test_a_table_that_overflows_is_not_finite():
    """Items at zero give the body no gradient and the loss no trouble; only the table's step is too long."""
    experiment = world.experiment(federation={"local": {"lr": 1e38}})
    table, body = world.weights(experiment.model, ITEMS)
    named(experiment.model, body)["norm.weight"].fill_(1e3)
    update = updates(experiment, [4], Weights(torch.zeros_like(table), body))[4]
    assert update.loss == pytest.approx(np.log(ITEMS))
    assert not update.weights.body.any()
    assert not update.sound


# --- draws -----------------------------------------------------------------------------------------------------------


def test_private_negatives_are_keyed_by_user_and_round():
    """The reference draws them itself; here that the key holds what it must."""
    experiment = case("bce", "one step")
    drawn = {
        (round_, user): set(updates(experiment, [user], round_=round_)[user].rows.tolist()) - set(HISTORIES[user])
        for round_ in (1, 2)
        for user in (3, 4)
    }
    for (round_, user), rows in drawn.items():
        wanted = uniform_integers(experiment.seed, "private-negatives", round_, [user], LONGEST, ITEMS)[0]
        n = min(len(HISTORIES[user]), LONGEST + 1) - 1
        assert rows == set(wanted[:n].tolist()) - set(HISTORIES[user])
    assert len({frozenset(rows) for rows in drawn.values()}) == 4
