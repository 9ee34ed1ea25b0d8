"""What releases cost: known answers, the same answers by other ways, and the directions in which they go."""

import math
from functools import lru_cache

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants import create_accountant
from scipy.optimize import brentq
from scipy.special import log_ndtr

from common.errors import UsageError
from common.privacy import accounting
from common.privacy.accounting import TOLERANCE, Event, account, calibrate, default_delta, epsilon
from common.privacy.plan import rankings, settle, trainees
from tests.privacy import private
from tests.support import world

DELTA = 1e-5


@lru_cache
def ours(z, q=1.0, t=1, delta=DELTA, users=None, cap=None):
    return account([(Event(z, q, users, cap), t)], delta)


def by_hand(z, q, t, delta):
    """Privacy loss distribution put together without an event or an accountant of the library."""
    return pld.from_gaussian_mechanism(z, sampling_prob=q).self_compose(t).get_epsilon_for_delta(delta)


def by_opacus(kind, z, q, t, delta):
    accountant = create_accountant(kind)
    accountant.history = [(z, q, t)]
    return accountant.get_epsilon(delta=delta)


def analytic(z, delta):
    """ε of one Gaussian release (Balle & Wang, ICML 2018, theorem 8)."""

    def excess(eps):
        a, b = 1 / (2 * z) - eps * z, -1 / (2 * z) - eps * z
        return math.exp(log_ndtr(a)) - math.exp(eps + log_ndtr(b)) - delta

    return brentq(excess, 0, 1000)


# --- known answers ---------------------------------------------------------------------------------------------------

GOLDENS = {
    "z=3, T=512, q=.1": ((3, 0.1, 512, 1e-6), 3.77),
    "z=1, T=200, q=.05": ((1, 0.05, 200, 1e-4), 4.00),
    "200 evaluations": ((20, 1.0, 200, 1e-5), 2.94),
    "10 evaluations": ((30, 1.0, 10, 1e-5), 0.36),
    "two users, z=2": ((1, 1.0, 1, 1e-5), 4.377),
    "zCDP rho=1.86": ((math.sqrt(512 / (2 * 1.86)), 1.0, 512, 1e-10), 13.69),
}


@pytest.mark.parametrize("golden", GOLDENS)
def test_goldens(golden):
    arguments, expected = GOLDENS[golden]
    digits = len(str(expected).split(".")[1])
    assert ours(*arguments) == pytest.approx(expected, abs=0.5 * 10**-digits)


@pytest.mark.parametrize(("z", "t", "delta"), [(0.5, 1, 1e-5), (2, 1, 1e-5), (8, 16, 1e-7), (30, 100, 1e-3)])
def test_releases_of_everybody_are_one_gaussian(z, t, delta):
    assert ours(z, 1.0, t, delta) == pytest.approx(analytic(z / math.sqrt(t), delta), rel=2e-3)


GRID = [(3, 0.1, 512, 1e-6), (1, 0.05, 200, 1e-4), (2, 0.01, 100, 1e-5), (4, 0.5, 100, 1e-5), (8, 0.1, 1000, 1e-7)]


@pytest.mark.parametrize("point", GRID)
def test_ours_is_the_privacy_loss_distribution(point):
    assert ours(*point) == pytest.approx(by_hand(*point), rel=0.01)


@pytest.mark.filterwarnings("ignore:Optimal order")
@pytest.mark.parametrize("point", GRID)
def test_opacus_agrees(point):
    """The numerical accountant to within 1 % and the .01 that it promises; moments are an upper bound, never below."""
    assert by_opacus("prv", *point) == pytest.approx(ours(*point), rel=0.01, abs=0.011)
    assert ours(*point) < by_opacus("rdp", *point) < 1.5 * ours(*point)


@pytest.mark.filterwarnings("ignore:GDP accounting")
def test_the_approximation_that_is_refused_lies_below():
    point = 1, 0.05, 200, 1e-4
    assert by_opacus("gdp", *point) < ours(*point)


# --- directions ------------------------------------------------------------------------------------------------------

TERMS = {"z": (2.0, 4.0, 8.0), "q": (0.01, 0.1, 1.0), "t": (1, 30, 300), "delta": (1e-7, 1e-5, 1e-3)}
MIDDLE = {"z": 4.0, "q": 0.1, "t": 30, "delta": 1e-5}


@pytest.mark.parametrize(("name", "rises"), [("z", False), ("q", True), ("t", True), ("delta", False)])
@pytest.mark.parametrize("others", [{}, {"z": 8.0, "q": 0.5}])
def test_epsilon_rises_and_falls_with_each_term(name, rises, others):
    found = [ours(**{**MIDDLE, **others, name: value}) for value in TERMS[name]]
    assert found == sorted(found, reverse=not rises)
    assert len(set(found)) == 3
    assert min(found) > 0


def test_more_releases_cost_more_and_order_does_not_matter():
    update, ranking = Event(4.0, 0.1), Event(30.0)
    together = epsilon([update, ranking, update], DELTA)
    assert together == epsilon([ranking, update, update], DELTA)
    assert together == account([(update, 1), (ranking, 1), (update, 1)], DELTA)
    assert max(account([(update, 2)], DELTA), account([(ranking, 1)], DELTA)) < together
    assert together <= account([(update, 2)], DELTA) + account([(ranking, 1)], DELTA)


def test_nothing_costs_nothing_and_no_noise_everything():
    assert epsilon([], DELTA) == 0
    assert account([(Event(1.0), 0)], DELTA) == 0
    assert epsilon([Event(0.0, 0.1)], DELTA) == math.inf
    assert epsilon([Event(4.0), Event(0.0, 0.001)], DELTA) == math.inf
    assert account([(Event(4.0), 1), (Event(0.0), 0)], DELTA) < math.inf


def test_a_rate_of_one_is_no_sampling():
    assert ours(4.0, 1.0) == ours(4.0, 2.0)
    assert ours(4.0, 0.999) == pytest.approx(ours(4.0), rel=0.01)


# --- a hard cap ------------------------------------------------------------------------------------------------------

USERS, COHORT = 400, 25


def capped(cap):
    return ours(8.0, COHORT / USERS, 20, users=USERS, cap=cap)


def test_a_cap_costs_more_and_little_where_it_is_generous():
    free = ours(8.0, COHORT / USERS, 20)
    generous = COHORT + 6 * int(math.sqrt(COHORT))
    assert capped(26) > capped(30) > 1.5 * free
    assert free <= capped(generous) < 1.001 * free
    assert capped(USERS) == capped(USERS + 1) == free  # it never cuts


# --- calibration -----------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 100), st.floats(0.01, 1000), st.floats(0.3, 3), st.floats(0, 0.98))
def test_a_calibrated_cost_is_just_below_its_target(target, scale, power, share):
    """Of costs of any shape that fall with the noise, down to what does not depend on it."""
    calls = []

    def cost(z):
        calls.append(z)
        return share * target + scale / z**power

    try:
        z = calibrate(target, cost)
    except UsageError:
        assert cost(1e4) > target  # no noise that is looked for reaches it
    else:
        assert (1 - TOLERANCE) * target <= cost(z) <= target
    assert len(calls) < 80


@pytest.mark.parametrize("rest", [1.001, 5.0, math.inf])
def test_a_target_below_what_the_rest_costs_is_refused(rest):
    with pytest.raises(UsageError, match="no noise reaches it"):
        calibrate(1.0, lambda z: rest)


TARGET = 0.3
PLANS = {
    "metrics": {"evaluation": {"privacy": "noised", "noise": 60.0, "every": 20}},
    "adaptive": {"privacy": {"adaptive": {}}},
    "a million": {"privacy": {"population": 1_000_000, "delta": 1e-7}},
}


def planned(**sections):
    privacy = {"target_epsilon": TARGET, "delta": DELTA, **sections.pop("privacy", {})}
    return private.experiment(privacy=privacy, federation={"rounds": 20, "cohort": 40}, **sections)


@pytest.mark.parametrize("plan", PLANS)
def test_a_planned_run_costs_its_target(plan):
    experiment = planned(**PLANS[plan])
    terms = settle(experiment, 1000)
    assert 0.99 * TARGET <= terms.cost(20, rankings(experiment)) <= TARGET
    assert terms.cost(21, rankings(experiment)) > terms.cost(20, rankings(experiment))
    if terms.population == terms.users:
        assert terms.actual_cost(20, rankings(experiment)) == terms.cost(20, rankings(experiment))


# --- terms -----------------------------------------------------------------------------------------------------------


def test_terms_by_hand():
    terms = settle(private.experiment(federation={"cohort": 40}), 1000)
    assert terms[:3] == (1000, 0.04, 1.0)
    assert terms.update == terms.actual == Event(1.0, 0.04)
    assert terms.metrics is None
    assert terms.count_noise is None
    assert (terms.scale, terms.population) == (1.0, 1000)
    assert terms.delta == default_delta(1000) == pytest.approx(1000**-1.1)
    assert settle(private.experiment(federation={"cohort": 40}), 25).rate == 1
    assert settle(private.experiment(privacy={"delta": 1e-9}), 1000).delta == 1e-9


def test_paid_metrics_are_looked_at_by_everybody():
    terms = settle(private.experiment(evaluation={"privacy": "noised", "noise": 44.0}), 1000)
    assert terms.metrics == Event(44.0)
    assert terms.cost(0, 3) == account([(Event(44.0), 3)], terms.delta)


def test_without_a_mode_there_are_no_terms():
    with pytest.raises(UsageError):
        settle(world.experiment(), 10)


@pytest.mark.parametrize("evaluation", ["noised", "unaccounted", "public-holdout"])
def test_who_may_train(evaluation):
    experiment = private.experiment(evaluation={"privacy": evaluation})
    assert trainees(experiment, 100) == (90 if evaluation == "public-holdout" else 100)
    assert trainees(experiment, 1) == (0 if evaluation == "public-holdout" else 1)


def test_a_hypothetical_population_is_told_apart_and_the_real_one_pays_more():
    terms = settle(private.experiment(privacy={"noise_multiplier": 40.0, "population": 10_000}), 1000)
    assert terms.scale == 0.1
    assert terms.update == Event(40.0, 0.005)
    assert terms.actual == Event(4.0, 0.005)
    assert terms.delta == default_delta(10_000)
    assert terms.cost(10, 0) < terms.actual_cost(10, 0)
    assert terms.actual_cost(10, 0) == account([(Event(4.0, 0.005), 10)], terms.delta)


def test_the_real_users_pay_for_metrics_that_are_noised_for_a_hypothetical_population():
    """The curator scales the noise on the histogram, too; what is left of it is what the real users have."""
    experiment = private.experiment(
        privacy={"noise_multiplier": 40.0, "population": 10_000}, evaluation={"privacy": "noised", "noise": 50.0}
    )
    terms = settle(experiment, 1000)
    assert terms.cost(0, 3) == account([(Event(50.0), 3)], terms.delta)
    assert terms.actual_cost(0, 3) == account([(Event(5.0), 3)], terms.delta)


def test_a_card_names_both_costs():
    experiment = private.experiment(privacy={"noise_multiplier": 40.0, "population": 1000})
    curator = private.curator(experiment, 100)
    for round_ in (1, 2):
        curator.mean(round_, [], private.zeros(experiment))
    card = curator.card(100)
    assert card["hypothetical"]["population"] == 1000
    assert card["hypothetical"]["epsilon"] < card["epsilon"]
    assert (card["users"], card["rounds"], card["noise_multiplier"]) == (100, 2, 40.0)
    assert card["epsilon"] == account([(Event(4.0, 0.05), 2)], default_delta(1000))
    assert card["noise_over_clip"] == pytest.approx(4.0 * math.sqrt(100) / 5)
    assert private.curator(private.experiment(), 100).card(100)["hypothetical"] is None


def test_a_hypothetical_population_has_a_cap_of_its_size():
    """A cap that hardly cuts a real round must hardly cut one of forty times as many: it costs what none costs.

    Cutting a thousand to 55 in every round would be accounted as a rate that nobody draws at, far too low.
    """
    sections = {"noise_multiplier": 8.0, "population": 40 * USERS, "delta": DELTA}
    capped, free = (
        settle(private.experiment(privacy={**sections, **cap}, federation={"cohort": COHORT}), USERS)
        for cap in ({"cap": 55}, {})
    )
    assert capped.cost(20, 0) == pytest.approx(free.cost(20, 0), rel=1e-3)
    assert capped.actual == Event(8.0 / 40, COHORT / USERS, USERS, 55)


# --- adaptive clipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("z", "count"), [(4.0, 2.0), (5.0, 20.0), (8.0, 3.0)])
def test_a_sum_and_a_count_together_cost_what_they_cost_one_by_one(z, count):
    """One user moves the count by a half at the most, since it is counted from a half."""
    adaptive = private.experiment(privacy={"noise_multiplier": z, "adaptive": {"noise": count}})
    terms = settle(adaptive, 5)  # everybody takes part, so that the two are releases of their own
    assert terms.update.noise_multiplier == pytest.approx((z**-2 + (2 * count) ** -2) ** -0.5)
    apart = account([(Event(z), 7), (Event(2 * count), 7)], terms.delta)
    assert terms.cost(7, 0) == pytest.approx(apart, rel=2e-3)
    assert terms.noise_multiplier == z
    assert terms.cost(7, 0) > account([(Event(z), 7)], terms.delta)


def test_the_noise_on_the_count_is_a_twentieth_of_the_cohort_by_default():
    assert settle(private.experiment(privacy={"adaptive": {}}, federation={"cohort": 40}), 100).count_noise == 2
    assert settle(private.experiment(privacy={"adaptive": {}, "noise_multiplier": 0.0}), 100).update == Event(0.0, 0.05)


# --- what would take too long ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 100, 10**6])
def test_unsampled_releases_are_together_one_gaussian(times):
    assert account([(Event(3.0), times)], DELTA) == pytest.approx(epsilon([Event(3.0 / times**0.5)], DELTA), rel=1e-6)


def test_unsampled_releases_beside_sampled_ones_are_put_together_too():
    together = account([(Event(8.0), 4), (Event(1.0, 0.1), 10)], DELTA)
    assert together == pytest.approx(account([(Event(4.0), 1), (Event(1.0, 0.1), 10)], DELTA), rel=1e-3)


def test_hopeless_numbers_are_bounded_from_above_at_once():
    """As for the real users of a hypothetical million: sampling helps, but nobody needs to know how much."""
    hopeless = account([(Event(0.01, 0.25), 100)], DELTA)
    assert accounting.HOPELESS < hopeless == account([(Event(0.01), 100)], DELTA) < math.inf
    assert account([(Event(1.0, 0.25), 100)], DELTA) < account([(Event(1.0), 100)], DELTA) < accounting.HOPELESS
