"""Two numberings of what a chunk touches: both must name the same items of the catalogue, here against dictionaries."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.batches import windows
from client.problem import pose, shared_negatives
from common.loss import BCELoss, GBCELoss, SampledSoftmaxLoss, SoftmaxLoss
from common.seeding import uniform_integers
from tests.support import world

ITEMS, LONGEST = 12, 6  # small, so that items repeat and fall among the negatives
HISTORIES = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=10), min_size=1, max_size=5)
LOCALS = st.sampled_from([{"steps": 1}, {"steps": 2, "window": "random"}, {"epochs": 2}])
SAMPLED = {name: loss for name, loss in world.LOSSES.items() if name != "softmax"}


def posed(histories, loss, local=None, held_out=False, round_=3):
    """Both problems of users that are all in one chunk, and their windows; somebody else lives there, too."""
    experiment = world.experiment(
        loss=world.LOSSES[loss], model={"max_length": LONGEST}, federation={"local": local or {"steps": 1}}
    )
    data = world.sequences([*histories, [1, 2, 3]], held_out=held_out)
    chunk = windows(experiment, data, np.arange(len(histories)), round_)
    return experiment, chunk, *pose(experiment, data, chunk, round_, ITEMS)


def drawn(experiment, chunk, user, round_=3):
    """The negatives that a user scores at each step and position, ``(S, W, N)`` as nested lists."""
    _, steps, width = chunk.events.shape
    if experiment.loss.kind == "bce":
        own = uniform_integers(experiment.seed, "private-negatives", round_, [user], steps * (width - 1), ITEMS)
        return own.reshape(steps, width - 1, 1).tolist()
    shared = shared_negatives(experiment.loss, experiment.seed, round_, ITEMS).tolist()
    return [[shared] * (width - 1)] * steps


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_by_hand(monkeypatch):
    monkeypatch.setattr("client.problem.shared_negatives", lambda *_: np.array([2, 9]))
    _, _, shared, stacked = posed([[5, 9, 3, 5], [7, 3]], "gbce")
    assert shared.rows.tolist() == [2, 9, 3, 5, 7]
    assert shared.events[:, 0, :4].tolist() == [[3, 1, 2, 3], [4, 2, 0, 0]]
    assert stacked.rows.tolist() == [[2, 9, 3, 5], [2, 9, 3, 7]]
    assert stacked.events[:, 0, :4].tolist() == [[3, 1, 2, 3], [3, 2, 0, 0]]
    for problem in (shared, stacked):
        assert (problem.counts.tolist(), problem.negatives, problem.private) == ([4, 4], 2, None)
        assert problem.barred.tolist() == [[[0, -np.inf]], [[0, 0]]]  # 9 is the first user's own
        assert problem.catalogue == ITEMS


def test_the_full_softmax_needs_no_numbers():
    _, chunk, shared, stacked = posed([[5, 9, 3], [7, 3]], "softmax")
    assert shared is stacked
    assert shared.rows is None
    assert shared.counts.tolist() == [ITEMS] * 2
    np.testing.assert_array_equal(shared.events, chunk.events)
    assert (shared.negatives, shared.private) == (0, None)


@pytest.mark.parametrize("loss", world.LOSSES)
@pytest.mark.parametrize("histories", [[[]], [[], []], [[4]], [[], [4]]])
def test_with_nothing_to_train_on_every_number_is_still_a_row(loss, histories):
    _, _, shared, stacked = posed(histories, loss)
    sizes = (ITEMS, ITEMS) if loss == "softmax" else (len(shared.rows), stacked.rows.shape[1])
    for problem, size in zip((shared, stacked), sizes, strict=True):
        assert 0 <= int(problem.events.min()) <= int(problem.events.max()) < size
        if problem.private is not None:
            assert 0 <= int(problem.private.min()) <= int(problem.private.max()) < size


# --- against dictionaries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", SAMPLED)
@settings(max_examples=40)
@given(HISTORIES, LOCALS)
def test_both_numberings_name_the_same_items(loss, histories, local):
    experiment, chunk, shared, stacked = posed(histories, loss, local)
    touched = []
    for user in range(len(histories)):
        first = shared_negatives(experiment.loss, experiment.seed, 3, ITEMS).tolist()
        numbers, negatives = {item: place for place, item in enumerate(first)}, drawn(experiment, chunk, user)
        own = set()
        for step, length in enumerate(chunk.lengths[user]):
            own.update(chunk.events[user, step, :length].tolist())
            if loss == "bce":
                own.update(item for row in negatives[step][: max(0, length - 1)] for item in row)
        for item in sorted(own):
            numbers.setdefault(item, len(numbers))
        touched.append(own - set(first))
        assert stacked.counts[user] == shared.counts[user] == len(numbers)
        assert stacked.rows[user, : len(numbers)].tolist() == list(numbers)
        for step, length in enumerate(chunk.lengths[user]):
            for place in range(length):
                item, here = chunk.events[user, step, place], (user, step, place)
                assert stacked.events[here] == numbers[item]
                assert shared.rows[shared.events[here]] == item
                if loss == "bce" and place < length - 1:
                    (item,) = negatives[step][place]
                    assert stacked.private[here] == numbers[item]
                    assert shared.rows[shared.private[here]] == item
    if first or any(touched):
        assert shared.rows.tolist() == first + sorted(set().union(*touched))
    assert shared.negatives == stacked.negatives == len(first)


@pytest.mark.parametrize("loss", SAMPLED)
@settings(max_examples=40)
@given(HISTORIES, LOCALS, st.booleans())
def test_own_training_items_are_barred_and_held_out_ones_are_not(loss, histories, local, held_out):
    experiment, chunk, shared, stacked = posed(histories, loss, local, held_out)
    assert torch.equal(shared.barred, stacked.barred)
    size = (len(histories), *chunk.events.shape[1:2], chunk.events.shape[2] - 1, 1 if loss == "bce" else -1)
    barred = shared.barred if loss == "bce" else shared.barred.unsqueeze(1)
    barred = barred.expand(size)
    assert barred.dtype == torch.float32
    for user, history in enumerate(histories):
        training = history[:-2] if held_out and len(history) > 2 else history
        for step, row in enumerate(drawn(experiment, chunk, user)):
            for place, items in enumerate(row):
                expected = [-np.inf if item in training else 0.0 for item in items]
                assert barred[user, step, place].tolist() == expected


# --- the negatives that a round shares -------------------------------------------------------------------------------


def test_shared_negatives():
    loss = SampledSoftmaxLoss(kind="sampled-softmax", negatives=10)
    drawn = shared_negatives(loss, 0, 1, 100)
    assert drawn.dtype == np.int64
    assert len(set(drawn.tolist())) == 10
    assert drawn.tolist() == sorted(drawn.tolist())
    assert drawn.tolist() == shared_negatives(GBCELoss(kind="gbce", negatives=10), 0, 1, 100).tolist()
    for other in (shared_negatives(loss, 1, 1, 100), shared_negatives(loss, 0, 2, 100)):
        assert drawn.tolist() != other.tolist()
    for small in (4, 10):
        assert shared_negatives(loss, 0, 1, small).tolist() == list(range(small))
    for none in (SoftmaxLoss(kind="softmax"), BCELoss(kind="bce")):
        assert len(shared_negatives(none, 0, 1, 100)) == 0
    counts = sum(np.bincount(shared_negatives(loss, 0, round_, 20), minlength=20) for round_ in range(400))
    assert (abs(counts - 200) < 50).all()  # standard deviation 10
