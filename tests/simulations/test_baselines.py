"""What a figure is worth: popularity by hand, chance at its expectation, and the ceiling above everything."""

import numpy as np
import pytest
import torch

from common.data.law import Law
from common.data.prepare import prepare
from common.data.sequences import Sequences
from common.metrics import point
from simulations import baselines
from simulations.baselines import at_random, baseline_ranks, by_law, by_popularity
from tests.support import world

SYNTHETIC = {"kind": "synthetic", "users": 600, "items": 60, "interests": 6, "mean_length": 10, "max_length": 25}


@pytest.fixture(scope="module")
def synthetic():
    experiment = world.experiment(data=SYNTHETIC)
    sequences = Sequences.open(prepare(experiment.data))
    return experiment, sequences, baseline_ranks(experiment, sequences, 60)


def pairs(**sections):
    """An experiment on a file, so that no law is known; the file is never read here."""
    return world.experiment(data={"kind": "pairs", "path": "x.txt"}, **sections)


# --- popularity ------------------------------------------------------------------------------------------------------


def test_popularity_by_hand():
    # Training events: 0 0 1 | 0 1 2 | 3, so the counts are 3 2 1 1 0; test items 2, 4 and 1.
    sequences = world.sequences([[0, 0, 1, 4, 2], [0, 1, 2, 3, 4], [3, 0, 1]])
    scored = by_popularity(sequences, 5)(np.array([0, 2]), np.array([4, 12]))
    assert scored.tolist() == [[3, 2, 1, 1, 0]] * 2
    found = baseline_ranks(pairs(), sequences, 5)["popularity"]
    # User 0: 2 ties with 3, and 0 1 4 are seen. User 1: all others are seen. User 2: 0 and 3 are seen, 1 leads.
    assert found.tolist() == [1.5, 1, 1]


def test_held_out_events_make_nothing_popular():
    sequences = world.sequences([[0, 1, 2]] * 5)
    assert by_popularity(sequences, 3)(np.array([0]), np.array([0])).tolist() == [[5, 0, 0]]


def test_scores_are_not_shared_between_rows():
    """Ranking masks in place; one user's mask must not reach another."""
    scored = by_popularity(world.sequences([[0, 1, 2]] * 2), 3)(np.array([0, 1]), np.array([2, 5]))
    scored[0, 0] = -1
    assert scored[1, 0] == 2


def test_users_without_a_held_out_item_have_no_rank():
    found = baseline_ranks(pairs(), world.sequences([[0, 1], [0, 1, 2], [2]]), 3)
    for ranks in found.values():
        assert np.isnan(ranks).tolist() == [True, False, True]


# --- chance ----------------------------------------------------------------------------------------------------------


def test_random_is_chance():
    histories = world.random_histories([5] * 3000, 50)
    ranks = baseline_ranks(pairs(), world.sequences(histories), 50)["random"]
    assert sorted(set(ranks)) == list(range(1, 47))  # 46 items are unseen
    assert ranks.mean() == pytest.approx(23.5, abs=4 * 13.3 / 3000**0.5)
    assert point(ranks, [10])["hr@10"] == pytest.approx(10 / 46, abs=4 * (0.17 / 3000) ** 0.5)


def test_random_is_the_seeds():
    scores = [at_random(seed, 9)(np.arange(3), np.arange(3)) for seed in (1, 1, 2)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("size", [1, 7])
def test_batches_change_no_rank(synthetic, monkeypatch, size):
    experiment, sequences, expected = synthetic
    monkeypatch.setattr(baselines, "SCORES", 60 * size)
    for name, ranks in baseline_ranks(experiment, sequences, 60).items():
        np.testing.assert_array_equal(ranks, expected[name])


# --- the ceiling -----------------------------------------------------------------------------------------------------


def test_only_the_named_users_are_ranked(synthetic):
    experiment, sequences, expected = synthetic
    some = np.array([3, 17, 599])
    for name, ranks in baseline_ranks(experiment, sequences, 60, some).items():
        assert np.isnan(np.delete(ranks, some)).all()
        if name != "random":  # which draws in the order of asking
            np.testing.assert_array_equal(ranks[some], expected[name][some])


def test_the_order_of_the_baselines(synthetic):
    figures = {name: point(ranks, [10]) for name, ranks in synthetic[2].items()}
    for figure in ("hr@10", "ndcg@10", "mrr"):
        assert figures["ceiling"][figure] > 1.3 * figures["popularity"][figure] > 1.3 * figures["random"][figure]


def test_the_ceiling_is_above_rankers_that_know_less(synthetic):
    """Cut the law: no recency, wrong successors, popularity inside the last interest."""
    experiment, sequences, found = synthetic
    law = Law.of(experiment.data)
    lesser = {
        "other successors": Law.of(experiment.data.model_copy(update={"seed": 1})),
        "no following": Law.of(experiment.data.model_copy(update={"follow": 0.0})),
        "no interest": Law.of(experiment.data.model_copy(update={"noise": 1.0})),
        "only the last event": Law.of(experiment.data.model_copy(update={"recency": 1e-6})),
    }
    best = point(found["ceiling"], [10])["ndcg@10"]
    for other in lesser.values():
        ranks = baselines._ranks(by_law(other, sequences), sequences, 60, np.arange(600))
        assert point(ranks, [10])["ndcg@10"] < best
    np.testing.assert_array_equal(
        baselines._ranks(by_law(law, sequences), sequences, 60, np.arange(600)), found["ceiling"]
    )


def test_a_ceiling_only_where_the_law_is_known(synthetic):
    _, sequences, found = synthetic
    assert list(found) == ["popularity", "random", "ceiling"]
    assert list(baseline_ranks(pairs(), sequences, 60)) == ["popularity", "random"]
    for filtered in ({"min_user_events": 2}, {"min_item_events": 5}):
        experiment = world.experiment(data={**SYNTHETIC, **filtered})
        assert "ceiling" not in baseline_ranks(experiment, sequences, 60)
    assert "ceiling" in baseline_ranks(world.experiment(data={**SYNTHETIC, "min_user_events": 1}), sequences, 60)
