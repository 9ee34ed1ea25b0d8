import numpy as np
import pytest

from common.data.law import Law, generator, reach
from common.sources import SyntheticData


def config(**options):
    return SyntheticData(kind="synthetic", **{"items": 12, "interests": 3, "successors": 2, **options})


def naive_score(law, history):
    """The definition, one item at a time."""
    options, size = law.config, len(law.popularity)
    if not history:
        return law.popularity
    scores = options.noise * law.popularity
    back = range(1, min(len(history), law.reach) + 1)
    weights = np.array([options.recency ** (step - 1) for step in back])
    for step, weight in zip(back, weights / weights.sum(), strict=True):
        cause = history[-step]
        following, liked = np.zeros(size), np.zeros(size)
        for item, share in zip(law.successors[cause], law.weights[cause], strict=True):
            following[item] += share
        mates = law.interest == law.interest[cause]
        liked[mates] = law.popularity[mates] / law.popularity[mates].sum()
        caused = options.follow * following + (1 - options.follow) * liked
        scores = scores + (1 - options.noise) * weight * caused
    scores[history] = 0
    return scores


@pytest.mark.parametrize(
    "options",
    [{}, {"noise": 0.0}, {"noise": 1.0}, {"follow": 1.0}, {"recency": 1.0}, {"recency": 1e-7}, {"interests": 12}],
)
def test_scores_are_the_definition(options):
    law = Law.of(config(**options))
    rng = np.random.default_rng(0)
    histories = [rng.permutation(12)[:length].tolist() for length in (0, 1, 2, 5, 9)]
    padded = np.zeros((5, 10), dtype=np.int64)
    for row, history in enumerate(histories):
        padded[row, : len(history)] = history
    scores = law.scores(padded, np.array([len(history) for history in histories]))
    assert scores.shape == (5, 12)
    for row, history in enumerate(histories):
        np.testing.assert_allclose(scores[row], naive_score(law, history), atol=1e-12)


def test_an_unseen_draw_has_mass_one():
    law = Law.of(config())
    assert law.scores(np.zeros((1, 0), dtype=np.int64), np.array([0])).sum() == pytest.approx(1)
    for item in range(12):  # what is missing to 1 is the mass of the item itself
        missing = 1 - law.scores(np.array([[item]]), np.array([1])).sum()
        share = 0.1 * law.popularity[item] + 0.9 * 0.2 * law.inside[item]
        assert missing == pytest.approx(share)


@pytest.mark.parametrize(
    ("items", "interests", "wanted"), [(12, 3, 2), (12, 3, 9), (13, 5, 3), (12, 12, 4), (50, 1, 49)]
)
def test_successors(items, interests, wanted):
    law = Law.of(config(items=items, interests=interests, successors=wanted))
    sizes = np.bincount(law.interest, minlength=interests)
    assert sizes.max() - sizes.min() <= 1
    assert law.popularity.sum() == pytest.approx(1)
    np.testing.assert_allclose(np.bincount(law.interest, law.inside), 1)
    np.testing.assert_allclose(law.weights.sum(axis=1), 1)
    for item in range(items):
        others = sizes[law.interest[item]] - 1
        real = law.successors[item][law.weights[item] > 0]
        if others == 0:
            assert real.tolist() == [item]  # seen already, hence never accepted
            continue
        assert len(set(real)) == len(real) == min(wanted, others)
        assert item not in real
        assert (law.interest[real] == law.interest[item]).all()
        ratios = law.weights[item][1 : len(real)] / law.weights[item][: len(real) - 1]
        np.testing.assert_allclose(ratios, 0.5)


def test_successors_are_uniform():
    """Every companion is equally often in every place, over many seeds."""
    seen = np.zeros((2, 5))
    for seed in range(3000):
        law = Law.of(config(items=10, interests=2, seed=seed))
        mates = np.flatnonzero(law.interest == law.interest[0])
        for place in range(2):
            seen[place, np.searchsorted(mates, law.successors[0, place])] += 1
    # Item 0 is the first of its five mates, so that each of the other four has a quarter.
    np.testing.assert_allclose(seen[:, 1:] / 3000, 0.25, atol=0.03)


def test_zipf():
    law = Law.of(config(items=100, zipf=1.5))
    np.testing.assert_allclose(np.sort(law.popularity)[::-1][[0, 9]] * 10**1.5 / law.popularity.max(), [10**1.5, 1])
    assert not (np.diff(law.popularity) < 0).all()  # the ids carry no information
    np.testing.assert_allclose(Law.of(config(zipf=0)).popularity, 1 / 12)


def test_the_seed_alone_decides():
    first, same, other = (Law.of(config(seed=seed, users=users)) for seed, users in ((1, 5), (1, 9), (2, 5)))
    assert np.array_equal(first.successors, same.successors)
    assert np.array_equal(first.popularity, same.popularity)
    assert not np.array_equal(first.popularity, other.popularity)


def test_generators_of_different_purposes_differ():
    draws = {generator(3, *key).integers(2**62) for key in [(), (0,), (1,), (0, 0), (0, 1)]}
    assert len(draws) == 5
    assert generator(2**70, 1).integers(9) == generator(2**70, 1).integers(9)


@pytest.mark.parametrize(("recency", "expected"), [(1, 100), (0.99, 100), (0.6, 28), (1e-6, 1), (1e-9, 1)])
def test_reach(recency, expected):
    assert reach(recency, 100) == expected
    assert recency**expected <= 1e-6 or expected == 100
