"""Ranks on catalogues that a hand can rank, then against a slow ranking, then sampled ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client import evaluation
from client.evaluation import final_scores, held_out_ranks, mask_seen, rank, scores, target_ranks
from common.models.encoder import encode
from common.models.weights import Weights, named
from tests.support import reference, world

NAN, INF = float("nan"), float("inf")
ITEMS = 20
HISTORIES = world.random_histories([1, 2, 3, 4, 6, 8, 9, 10, 15, 18], ITEMS)
DATA = world.sequences(HISTORIES)
EVERYBODY = np.arange(len(HISTORIES))
EXPERIMENT = world.experiment()
WEIGHTS = world.weights(EXPERIMENT.model, ITEMS)


def ranks_of(scored, targets):
    return target_ranks(torch.tensor(scored), torch.tensor(targets)).tolist()


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_ranks_by_hand():
    assert ranks_of([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0], [0.0, -1.0, 5.0]], [2, 0, 1]) == [2, 1, 3]


def test_ties_rank_at_their_expectation():
    assert ranks_of([[1.0, 1.0, 1.0, 1.0], [5.0, 1.0, 1.0, 0.0]], [0, 2]) == [2.5, 2.5]


def test_masked_items_are_no_rivals():
    assert ranks_of([[-INF, 1.0, 2.0, -INF]], [1]) == [2]


@pytest.mark.parametrize("own", [NAN, INF, -INF])
def test_a_target_without_a_finite_score_ranks_last(own):
    assert ranks_of([[0.0, own, -1.0, 2.0]], [1]) == [4]


def test_rivals_without_a_number_count_as_better():
    assert ranks_of([[NAN, 1.0, 0.0, INF, NAN]], [1]) == [4]


def test_the_held_out_item_is_never_masked():
    # Histories a b | a: the test item came before. And a b | c.
    data = world.sequences([[0, 1, 0], [0, 1, 2]])
    stops, targets = data.stops(np.array([0, 1]), "test")
    scored = torch.tensor([[0.5, 9.0, 1.0, 0.0], [9.0, 8.0, 0.1, 0.7]])
    masked = mask_seen(scored.clone(), data, np.array([0, 1]), stops)
    assert torch.equal(masked, torch.tensor([[-INF, -INF, 1.0, 0.0], [-INF, -INF, 0.1, 0.7]]))
    assert held_out_ranks(scored, data, np.array([0, 1]), stops, targets).tolist() == [2, 2]
    assert scored[0, 0] == 0.5


def test_masking_looks_at_earlier_events_only():
    data = world.sequences([[0, 1, 2, 3]])
    user = np.array([0])
    stops, targets = data.stops(user, "validation")
    scored = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    assert targets.tolist() == [2]
    assert held_out_ranks(scored, data, user, stops, targets).tolist() == [2]  # the test item 3 is a rival
    assert scored.tolist() == [[-INF, -INF, 1, 2]]


# --- the model's ranks -----------------------------------------------------------------------------------------------


def slow_rank(experiment, history, held_out, weights):
    """Rank of the held-out item after this history: one user, no padding, float64."""
    table, body = (part.double() for part in weights)
    recent = history[-experiment.model.max_length :]
    scored = table @ reference.encode(experiment.model, body, table[recent])[-1]
    rivals = [scored[item] for item in range(len(table)) if item not in history and item != held_out]
    return 1 + sum(float(score > scored[held_out]) for score in rivals)


@pytest.mark.parametrize(("split", "left"), [("validation", 2), ("test", 1)])
def test_ranks_are_those_of_a_slow_ranking(split, left):
    found = rank(EXPERIMENT, WEIGHTS, DATA, EVERYBODY, split)
    for user, history in enumerate(HISTORIES):
        if len(history) < 3:
            assert np.isnan(found.full[user])
        else:
            assert found.full[user] == slow_rank(EXPERIMENT, history[:-left], history[-left], WEIGHTS)
    assert len(set(found.full[2:])) > 3
    assert np.isnan(found.sampled).all()  # not asked for


def test_the_state_after_the_last_event():
    items, lengths = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1])
    hidden = encode(EXPERIMENT.model, named(EXPERIMENT.model, WEIGHTS.body), WEIGHTS.table[items])
    expected = torch.stack([hidden[0, 2], hidden[1, 0]]) @ WEIGHTS.table.T
    assert torch.equal(final_scores(EXPERIMENT.model, WEIGHTS, items, lengths), expected)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(EVERYBODY.tolist()), min_size=1, max_size=10, unique=True))
def test_company_changes_no_rank(users):
    together = rank(EXPERIMENT, WEIGHTS, DATA, EVERYBODY, "test").full
    np.testing.assert_array_equal(rank(EXPERIMENT, WEIGHTS, DATA, np.array(users), "test").full, together[users])


def test_scores_do_not_depend_on_the_batch(monkeypatch):
    def scored(experiment):
        found = torch.full((len(DATA), ITEMS), NAN)
        for where, values in scores(experiment, WEIGHTS, DATA, EVERYBODY, DATA.offsets[1:]):
            assert found[where].isnan().all()  # each user once
            found[where] = values
        return found

    together = scored(EXPERIMENT)
    assert torch.isfinite(together).all()
    one_a_batch = EXPERIMENT.runtime.model_copy(update={"memory_mb": 0})
    monkeypatch.setattr(evaluation, "bucket_widths", lambda longest: np.array([longest]))  # and other padding
    apart = scored(EXPERIMENT.model_copy(update={"runtime": one_a_batch}))
    assert torch.allclose(apart, together, atol=1e-5)


def test_who_has_no_history_has_no_scores():
    data = world.sequences([[1, 2], [3]])
    found = list(scores(EXPERIMENT, WEIGHTS, data, np.array([0, 1]), np.array([0, 3])))
    assert [where.tolist() for where, _ in found] == [[1]]


def test_nobody_to_rank():
    found = rank(EXPERIMENT, WEIGHTS, DATA, np.array([0, 1]), "test")
    assert np.isnan(found.full).all()


@pytest.mark.parametrize("broken", ["table", "body", "one row"])
def test_a_broken_model_gains_nothing(broken):
    table, body = (part.clone() for part in WEIGHTS)
    if broken == "one row":
        table[7] = NAN  # a rival of most users, seen by the others
    else:
        {"table": table, "body": body}[broken].fill_(NAN)
    sound = rank(EXPERIMENT, WEIGHTS, DATA, EVERYBODY[2:], "test").full
    found = rank(EXPERIMENT, Weights(table, body), DATA, EVERYBODY[2:], "test").full
    assert (found >= sound).all()
    if broken != "one row":
        assert found.tolist() == [ITEMS] * len(found)


# --- sampled ranks ---------------------------------------------------------------------------------------------------


def few(n, **sections):
    return world.experiment(evaluation={"sampled": n}, **sections)


def negatives(experiment, split, users=EVERYBODY[2:], data=DATA, items=ITEMS):
    """Each user's sampled negatives, taken from the draw itself."""
    stops, targets = data.stops(users, split)
    goal = torch.from_numpy(targets)
    scored = mask_seen(torch.zeros(len(users), items), data, users, stops)
    scored.scatter_(1, goal.unsqueeze(1), 0.0)
    drawn = evaluation._sample(experiment, users, split, scored, goal)
    assert torch.equal(drawn[:, 0], goal)
    return [row[1:] for row in drawn.tolist()]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_negatives_are_new_to_the_user(split):
    left = {"validation": 2, "test": 1}[split]
    for history, drawn in zip(HISTORIES[2:], negatives(few(2), split), strict=True):
        assert len(set(drawn)) == len(drawn) == 2
        assert not set(drawn) & set(history[: len(history) - left + 1])  # neither seen nor the target


def test_validation_and_test_draw_apart():
    data = world.sequences([[0, 1, 2]] * 3 + [[3, 4, 5]])
    users = np.arange(4)
    test, validation = (negatives(few(20), split, users, data, 1000) for split in ("test", "validation"))
    for one, other in [*zip(test, validation, strict=True), (test[0], test[1])]:
        assert len(set(one) & set(other)) < 6  # 0.4 expected
    assert test == negatives(few(20), "test", users, data, 1000)
    assert test[1:2] == negatives(few(20), "test", users[1:2], data, 1000)
    assert test != negatives(few(20, seed=1), "test", users, data, 1000)


def test_negatives_are_uniform():
    data = world.sequences([[0, 1, 2]] * 2000)
    drawn = negatives(few(3), "test", np.arange(2000), data, 10)
    counts = np.bincount(np.ravel(drawn), minlength=10)
    assert counts[:3].tolist() == [0, 0, 0]
    assert (abs(counts[3:] - 6000 / 7) < 120).all()  # standard deviation 22


@pytest.mark.parametrize("n", [15, 19, 20, 500])
def test_more_negatives_than_items_are_all_items(n):
    """As many as the user has not seen, and more: the sampled rank is the full one."""
    chosen = np.array([8, 9])  # of histories with 15 and 18 events
    found = rank(few(n), WEIGHTS, DATA, chosen, "test")
    np.testing.assert_array_equal(found.sampled, found.full)


def test_sampled_ranks_count_the_sampled_rivals():
    experiment, users = few(4), EVERYBODY[2:]
    found = rank(experiment, WEIGHTS, DATA, EVERYBODY, "test")
    stops, targets = DATA.stops(users, "test")
    scored = torch.empty(len(users), ITEMS)
    for where, values in scores(experiment, WEIGHTS, DATA, users, stops):
        scored[where] = values
    for row, (target, drawn) in enumerate(zip(targets, negatives(experiment, "test"), strict=True)):
        seen = set(HISTORIES[users[row]][:-1])
        rivals = [item for item in drawn if item not in seen]
        assert found.sampled[users[row]] == 1 + sum(float(scored[row, item] > scored[row, target]) for item in rivals)
    assert (found.sampled[2:] <= found.full[2:]).all()
    assert np.isnan(found.sampled[:2]).all()
    np.testing.assert_array_equal(found.full, rank(EXPERIMENT, WEIGHTS, DATA, EVERYBODY, "test").full)
