"""Hand-made cases first, then properties, then the intervals against theory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.metrics import (
    count,
    coverage,
    expected_ranks,
    hit_rate,
    long_tail_share,
    mean_and_sd,
    ndcg,
    point,
    reciprocal_rank,
    summarise,
    worst_tenth,
)

NAN = float("nan")
ranks = st.lists(st.integers(2, 400).map(lambda twice: twice / 2), min_size=1, max_size=50)
cutoff = st.integers(1, 50)


# --- by hand -----------------------------------------------------------------------------------------------------


def test_ranks_count_from_one_and_ties_go_half():
    # Best alone; third; tied with one other for the first; a constant scorer over 5 items.
    np.testing.assert_array_equal(expected_ranks([0, 2, 0, 0], [0, 0, 1, 4]), [1, 3, 1.5, 3])


def test_expected_rank_is_the_mean_over_all_orders_of_the_ties():
    better, equal = 3, 4
    assert expected_ranks([better], [equal])[0] == np.mean([1 + better + place for place in range(equal + 1)])


def test_hit_rate():
    np.testing.assert_array_equal(hit_rate([1, 10, 10.5, 11, NAN], 10), [1, 1, 0, 0, NAN])


def test_ndcg():
    np.testing.assert_allclose(ndcg([1, 2, 3, 4, 2.5, NAN], 3), [1, 1 / np.log2(3), 0.5, 0, 1 / np.log2(3.5), NAN])


def test_reciprocal_rank():
    np.testing.assert_array_equal(reciprocal_rank([1, 4, NAN]), [1, 0.25, NAN])


def test_point_by_hand():
    figures = point([1, 3, 7, NAN], (1, 5))
    assert list(figures) == ["hr@1", "ndcg@1", "hr@5", "ndcg@5", "mrr"]
    assert figures == pytest.approx(
        {"hr@1": 1 / 3, "ndcg@1": 1 / 3, "hr@5": 2 / 3, "ndcg@5": 0.5, "mrr": (1 + 1 / 3 + 1 / 7) / 3}
    )


def test_count():
    assert count([1, NAN, 3, NAN]) == (2, 2)
    assert count([]) == (0, 0)


def test_mean_and_sd():
    assert mean_and_sd([1, 2, 3]) == (2, 1)
    assert mean_and_sd([4]) == pytest.approx((4, NAN), nan_ok=True)
    assert mean_and_sd([]) == pytest.approx((NAN, NAN), nan_ok=True)


def test_coverage():
    assert coverage([[0, 1], [1, 4]], items=10) == 0.3
    assert coverage([[0, -1], [0, -1]], items=10) == 0.1  # padding is no item
    assert np.isnan(coverage([], items=0))


def test_long_tail_share():
    popularity = [100, 50, 4, 3, 2, 1, 1, 1, 1, 1]  # head: items 0 and 1
    assert long_tail_share([[0, 1], [0, 2]], popularity) == pytest.approx(0.25)
    assert long_tail_share([[9, 8], [7, -1]], popularity) == pytest.approx(1)
    # Ten items alike: a fifth of each is head.
    assert long_tail_share([[3, 4]], [7] * 10) == pytest.approx(0.8)
    assert np.isnan(long_tail_share([], popularity))


def test_worst_tenth():
    lengths = np.arange(20)[::-1]
    assert worst_tenth(np.arange(20.0), lengths) == pytest.approx(18.5)  # users 18 and 19 have the shortest histories
    assert worst_tenth([NAN, *[0.0] * 9, 1.0], [1, *[5] * 9, 3]) == pytest.approx(1)
    # Ten users, nine of them with the shortest length: the tenth is shared among the nine.
    assert worst_tenth([0.9, *[0.0] * 8, 5], [2] * 9 + [7]) == pytest.approx(0.1)
    assert np.isnan(worst_tenth([], []))
    assert np.isnan(worst_tenth([NAN], [3]))


@pytest.mark.parametrize("empty", [[], [NAN, NAN]])
def test_nobody_to_evaluate_gives_nan(empty):
    assert all(np.isnan(value) for value in point(empty, (10,)).values())
    assert all(np.isnan(estimate).all() for estimate in summarise(empty, (10,)).values())


@pytest.mark.parametrize("of", [lambda r: hit_rate(r, 5), lambda r: ndcg(r, 5), reciprocal_rank, count])
def test_a_rank_below_one_is_refused(of):
    with pytest.raises(ValueError, match=r"count from 1; found 0\.0"):
        of([3, NAN, 0])


def test_a_cutoff_below_one_is_refused():
    with pytest.raises(ValueError, match="cutoffs"):
        point([1], (10, 0))


# --- properties --------------------------------------------------------------------------------------------------


@given(ranks, cutoff)
def test_bounds(ranks, k):
    hits, gains = hit_rate(ranks, k), ndcg(ranks, k)
    assert ((gains >= 0) & (gains <= hits) & (hits <= 1)).all()
    assert ((reciprocal_rank(ranks) > 0) & (reciprocal_rank(ranks) <= 1)).all()


@given(ranks, cutoff, cutoff)
def test_more_places_never_hurt(ranks, k, more):
    assert (hit_rate(ranks, k + more) >= hit_rate(ranks, k)).all()
    assert (ndcg(ranks, k + more) >= ndcg(ranks, k)).all()


@given(ranks, cutoff, st.integers(1, 20))
def test_a_worse_rank_never_helps(ranks, k, worse):
    ranks = np.array(ranks)
    assert (hit_rate(ranks + worse, k) <= hit_rate(ranks, k)).all()
    assert (ndcg(ranks + worse, k) <= ndcg(ranks, k)).all()
    assert (reciprocal_rank(ranks + worse) < reciprocal_rank(ranks)).all()


@given(ranks, st.randoms(use_true_random=False))
def test_figures_do_not_hang_on_the_order_of_users_and_intervals_hold_them(ranks, random):
    figures = summarise(ranks, (1, 10), resamples=100)
    assert {name: estimate.value for name, estimate in figures.items()} == point(ranks, (1, 10))
    assert all(low <= value <= high for value, low, high in figures.values())
    mixed = [*ranks, NAN]
    random.shuffle(mixed)
    assert summarise(mixed, (1, 10), resamples=100) == figures


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5)), min_size=1, max_size=60))
def test_the_worst_tenth_is_a_mean_of_some_users_in_any_order(users):
    values, lengths = np.array(users).T
    worst = worst_tenth(values, lengths)
    assert values.min() - 1e-9 <= worst <= values.max() + 1e-9
    assert worst_tenth(values[::-1], lengths[::-1]) == pytest.approx(worst)


@given(st.lists(st.integers(0, 9), min_size=10, max_size=200), st.floats(0, 1))
def test_recommending_every_item_once_gives_the_tail_its_own_share(popularity, head):
    lists = np.arange(len(popularity))[:, None]
    assert long_tail_share(lists, popularity, head) == pytest.approx(1 - head, abs=1e-9)
    assert coverage(lists, len(popularity)) == 1


# --- intervals ---------------------------------------------------------------------------------------------------


def test_intervals_agree_with_the_normal_approximation_and_with_scipy():
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 60, 2000)
    figures = summarise(ranks, (10,), resamples=2000)
    for name, values in {
        "hr@10": hit_rate(ranks, 10),
        "ndcg@10": ndcg(ranks, 10),
        "mrr": reciprocal_rank(ranks),
    }.items():
        width = 1.96 * values.std() / np.sqrt(len(values))
        theirs = stats.bootstrap(
            (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(1), batch=200
        ).confidence_interval
        value, low, high = figures[name]
        assert (low, high) == pytest.approx((value - width, value + width), abs=0.1 * width)
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.1 * width)


def test_95_of_100_intervals_hold_the_truth():
    rng = np.random.default_rng(1)
    trials, truth = 400, 0.3
    held = 0
    for trial in range(trials):
        ranks = np.where(rng.random(200) < truth, 1, 99)
        _, low, high = summarise(ranks, (10,), resamples=400, seed=trial)["hr@10"]
        held += low <= truth <= high
    assert 0.91 <= held / trials <= 0.98


def test_the_seed_sets_the_resamples_and_nothing_else():
    ranks = np.arange(1, 300)
    once, again, other = (summarise(ranks, (10,), seed=seed)["mrr"] for seed in (1, 1, 2))
    assert once == again
    assert once.value == other.value
    assert once.low != other.low


def test_one_user_tells_nothing_about_the_spread():
    assert summarise([3], (5,))["hr@5"] == (1, 1, 1)
