"""What devices will cost: settled by each for itself, bounded by the plan, and told as that of the busiest one."""

from math import sqrt

import numpy as np
import pytest
from opacus.accountants import create_accountant
from pydantic import ValidationError

from common.errors import UsageError
from common.privacy.accounting import default_delta
from common.privacy.card import advice, card, planned
from common.privacy.devices import device_card, settle
from server.curator import DeviceCurator, PrivateCurator, curator
from tests.privacy import alone, private
from tests.privacy.test_accounting import analytic
from tests.support import world

DELTA = 1e-5
KINDS = pytest.mark.parametrize("kind", ["local", "example-level"])
ON_DEVICE = {"kind": "example-level", "noise_multiplier": 20.0, "delta": DELTA}


def setup(kind="local", z=20.0, *, privacy=None, **sections):
    price = {} if "target_epsilon" in (privacy or {}) else {"noise_multiplier": z}
    return alone.experiment(kind, privacy={"delta": DELTA, **price, **(privacy or {})}, **sections)


# --- what a device settles for itself --------------------------------------------------------------------------------


def test_terms_by_hand():
    terms = settle(setup("local", 3.0, privacy={"participations": 7}, federation={"local": {"steps": 5}}))
    assert (terms.noise_multiplier, terms.step, terms.steps, terms.most) == (3.0, (1.5, 1.0, None, None), 1, 7)
    assert terms.told == {"noise_multiplier": 1.5, "sampling_rate": 1.0, "steps": 1}
    terms = settle(setup("example-level", 3.0, privacy={"sampling_rate": 0.25}, federation={"local": {"steps": 5}}))
    assert (terms.noise_multiplier, terms.step, terms.steps, terms.most) == (3.0, (3.0, 0.25, None, None), 5, None)
    assert terms.told == {"noise_multiplier": 3.0, "sampling_rate": 0.25, "steps": 5}


@KINDS
def test_nothing_costs_nothing_and_no_noise_everything(kind):
    assert settle(setup(kind)).cost(0, DELTA) == 0
    assert settle(setup(kind, 0.0)).cost(1, DELTA) == float("inf")


@KINDS
@pytest.mark.filterwarnings("ignore:Optimal order")
@pytest.mark.parametrize("target", [0.3, 3.0])
@pytest.mark.parametrize("most", [1, 8])
def test_a_target_is_met_by_all_participations_together(kind, target, most):
    privacy = {"target_epsilon": target, "participations": most}
    rate = {"sampling_rate": 0.5} if kind == "example-level" else {}
    experiment = setup(kind, privacy={**privacy, **rate}, federation={"local": {"steps": 2}})
    terms = settle(experiment)
    assert 0.99 * target <= terms.cost(most, DELTA) <= target
    assert terms.cost(most + 1, DELTA) > terms.cost(most, DELTA)
    z = terms.noise_multiplier
    if kind == "local":
        expected = analytic(z / (2 * sqrt(most)), DELTA)
    else:
        accountant = create_accountant("prv")
        accountant.history = [(z, 0.5, 2 * most)]
        expected = accountant.get_epsilon(delta=DELTA)
    assert terms.cost(most, DELTA) == pytest.approx(expected, rel=0.01, abs=0.011)


@KINDS
def test_what_the_server_says_of_the_federation_changes_no_noise(kind):
    """A device believes its own configuration only."""
    privacy = {"target_epsilon": 1.0, "participations": 2}
    plain = settle(setup(kind, privacy=privacy))
    for federation in ({"rounds": 10**6}, {"cohort": 1}, {"sampling": "passes"}, {"sampling": "poisson"}):
        assert settle(setup(kind, privacy=privacy, federation=federation)) == plain


def test_a_target_out_of_reach_is_refused():
    with pytest.raises(UsageError, match="no noise reaches it"):
        settle(setup(privacy={"target_epsilon": 1e-5, "participations": 1, "delta": 1e-12}))


def test_modes_in_which_devices_do_nothing_have_no_terms():
    for experiment in (world.experiment(), private.experiment()):
        with pytest.raises(UsageError, match="devices add no noise"):
            settle(experiment)


# --- refusals --------------------------------------------------------------------------------------------------------

PRICE = {"noise_multiplier": None, "target_epsilon": 4.0, "participations": 5, "delta": DELTA}


@KINDS
@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        ({"noise_multiplier": None}, "noise_multiplier or target_epsilon"),
        ({**PRICE, "noise_multiplier": 1.0}, "noise_multiplier or target_epsilon"),
        ({**PRICE, "participations": None}, "needs participations and delta"),
        ({**PRICE, "delta": None}, "needs participations and delta"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"clipping_norm": 0.0}, "clipping_norm"),
        ({"participations": 0}, "participations"),
        ({"delta": 1.0}, "delta"),
        ({"rng": "fast"}, "rng"),
        ({"accountant": "gdp"}, "accountant"),
    ],
)
def test_what_devices_could_not_vouch_for_is_refused(kind, privacy, said):
    with pytest.raises(ValidationError, match=said):
        alone.experiment(kind, privacy=privacy)
    with pytest.raises(ValidationError, match=said):
        private.experiment(privacy={"on_device": {**ON_DEVICE, **privacy}})


@KINDS
@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"federation": {"weighting": "events"}}, "weighting=uniform"),
        ({"evaluation": {"privacy": "noised"}}, "public-holdout, or unaccounted"),
    ],
)
def test_what_would_pass_the_bound_or_the_noise_is_refused(kind, sections, said):
    with pytest.raises(ValidationError, match=said):
        setup(kind, **sections)
    with pytest.raises(ValidationError, match=said):
        private.experiment(privacy={"on_device": {**ON_DEVICE, "segment": 4}}, **sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"federation": {"local": {"epochs": 1}}}, "epochs and prox"),
        ({"federation": {"local": {"steps": 1, "prox": 0.1}}}, "epochs and prox"),
        ({"privacy": {"segment": 8}}, "max_length"),
        ({"privacy": {"segment": 1}}, "segment"),
        ({"privacy": {"sampling_rate": 0.0}}, "sampling_rate"),
        ({"privacy": {"examples": 0}}, "examples"),
    ],
)
def test_what_examples_cannot_be_is_refused(sections, said):
    setup("example-level", privacy={"segment": 7})  # as long as the model sees, and one target more
    setup("local", federation={"local": {"epochs": 1, "prox": 0.1}})
    with pytest.raises(ValidationError, match=said):
        setup("example-level", **sections)
    on_device = {**ON_DEVICE, "segment": 4, **sections.pop("privacy", {})}
    with pytest.raises(ValidationError, match=said):
        private.experiment(privacy={"on_device": on_device}, **sections)


def test_only_examples_are_protected_on_top_of_users():
    with pytest.raises(ValidationError, match="on_device"):
        private.experiment(privacy={"on_device": {"kind": "local", "noise_multiplier": 1.0}})


# --- the card --------------------------------------------------------------------------------------------------------

KEYS = {"unit", "relation", "adversary", "sampler", "accountant", "noise_multiplier", "clipping_norm", "sampling_rate"}
KEYS |= {"users", "rounds", "delta", "epsilon", "epsilon_metrics", "rng", "snr", "clipped_share", "hypothetical"}


@KINDS
def test_the_card_says_all(kind):
    experiment = setup(kind, federation={"sampling": "passes", "cohort": 4, "rounds": 40})
    facts = planned(experiment, 12, 600)
    assert KEYS | {"participations", "metrics", "noise_over_clip"} == set(facts)
    assert facts == device_card(experiment, 12, 600, 40, 14)
    assert facts["epsilon"] == settle(experiment).cost(14, DELTA)
    assert (facts["users"], facts["rounds"], facts["participations"], facts["delta"]) == (12, 40, 14, DELTA)
    assert facts["snr"] == pytest.approx(1 / facts["noise_over_clip"])
    assert facts["adversary"].startswith("the server")
    assert facts["accountant"].startswith("PLD, dp-accounting 0")
    assert facts["epsilon_metrics"] is None
    assert facts["hypothetical"] is None
    units = {
        "local": ("user", "replace one"),
        "example-level": ("segment: 4 events", "add or remove one, the others keeping their places"),
    }
    assert facts["unit"].startswith(units[kind][0])
    assert facts["relation"] == units[kind][1]
    assert any("not accounted" in line for line in advice(facts))
    assert any("reproducible" in line for line in advice(facts))


@KINDS
def test_public_users_are_no_users_of_the_card(kind):
    experiment = setup(kind, evaluation={"privacy": "public-holdout", "holdout": 0.25}, privacy={"delta": None})
    facts = planned(experiment, 12, 600)
    assert (facts["users"], facts["delta"], facts["epsilon_metrics"]) == (9, default_delta(9), 0.0)


@KINDS
def test_the_noise_of_the_card_is_that_of_the_mean_update(kind):
    """Over the most that an update can measure: C, or with examples what S steps of all of them can make."""
    steps = 4 if kind == "example-level" else 1
    experiment = setup(kind, federation={"cohort": 3, "local": {"steps": steps, "lr": 1.0}})
    noise = alone.updates(experiment, [[0]] * 3)
    mean = np.mean(list(noise.values()), axis=0)
    most = 0.1 if kind == "local" else steps * 0.1
    told = device_card(experiment, 12, len(mean), 1, 1)["noise_over_clip"]
    assert np.linalg.norm(mean) / most == pytest.approx(told, rel=5 / sqrt(2 * len(mean)))


def reply(experiment, user, participations):
    table, body = private.numbers(experiment, user, 1.0)
    return private.reply(user, table, body)._replace(participations=participations)


@KINDS
def test_epsilon_is_that_of_the_busiest_user_and_no_sum(kind, tmp_path):
    experiment = setup(kind)
    made = curator(experiment, 12, private.ITEMS, tmp_path)
    assert isinstance(made, DeviceCurator)
    assert made.card(600)["epsilon"] == 0
    for round_, told in enumerate([[1, 4, 2], [], [3, 1]], 1):
        replies = [reply(experiment, user, often) for user, often in enumerate(told)]
        made.mean(round_, replies, private.zeros(experiment))
    again = curator(experiment, 12, private.ITEMS, tmp_path)
    for facts in (made.card(600), again.card(600)):
        assert (facts["rounds"], facts["participations"]) == (3, 4)
        assert facts["epsilon"] == settle(experiment).cost(4, DELTA)


def test_on_top_of_users_there_are_two_cards():
    on_device = {**ON_DEVICE, "segment": 4, "sampling_rate": 0.5}
    experiment = private.experiment(privacy={"on_device": on_device})
    facts = card(experiment, 12, 600, 7, 0, participations=5)
    inner = facts["on_device"]
    assert facts["adversary"].endswith("the server is trusted")
    assert inner == device_card(experiment, 12, 600, 7, 5)
    assert inner["epsilon"] == settle(experiment).cost(5, DELTA) != facts["epsilon"]
    made = PrivateCurator(experiment, 12, private.ITEMS)
    made.mean(1, [reply(experiment, user, often) for user, often in ((0, 2), (1, 6))], private.zeros(experiment))
    assert made.card(600)["on_device"]["participations"] == 6
