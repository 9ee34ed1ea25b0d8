"""DP-SGD with Opacus, as a device does it, is what the vectorised engine does; and neither trains when it is wrong."""

import numpy as np
import pytest
from opacus.accountants import create_accountant
from pydantic import ValidationError

from client import device as devices
from client import opacus_training
from client.gradcheck import stacked_is_right
from client.opacus_training import opacus_is_right
from common.errors import StateError
from common.privacy.devices import settle
from simulations.grid import InProcessGrid
from tests.privacy import alone, private
from tests.support import world

ITEMS, Z = alone.ITEMS, 1.5
HISTORIES = world.random_histories([0, 1, 3, 12, 17], ITEMS - 5)  # user 3: as many segments as positions of one
EACH_LOSS = pytest.mark.parametrize("loss", world.LOSSES)
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:Secure RNG")


@pytest.fixture(autouse=True)
def _tested_anew():
    for remembered in (stacked_is_right, opacus_is_right):
        remembered.cache_clear()
    yield
    for remembered in (stacked_is_right, opacus_is_right):
        remembered.cache_clear()


def setup(loss="softmax", steps=1, z=Z, rate=1.0, model=None, **privacy):
    return alone.experiment(
        loss=loss,
        privacy={"noise_multiplier": z, "sampling_rate": rate, **privacy},
        federation={"local": {"steps": steps, "lr": 0.3}},
        model={"dropout": 0.2, **(model or {})},
    )


def by_opacus(experiment, histories=HISTORIES, users=None, *, round_=1, weights=None, items=ITEMS, clip=None):
    weights = world.weights(experiment.model, items) if weights is None else weights
    users = np.arange(len(histories)) if users is None else np.array(users)
    data = world.sequences(histories, held_out=False)
    return alone.each(opacus_training.train(experiment, weights, data, users, round_, clip))


def agree(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    return all(np.abs(one[user] - other[user]).max() < tolerance for user in one)


# --- the same numbers ------------------------------------------------------------------------------------------------


@EACH_LOSS
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("z", "bound"), [(0.0, 100.0), (0.0, 0.3), (Z, 0.3)])
def test_opacus_gives_what_the_vectorised_engine_gives(loss, steps, z, bound):
    """Of users without events, with one segment, and with as many segments as a segment has positions."""
    experiment = setup(loss, steps, z, clipping_norm=bound)
    found = by_opacus(experiment)
    assert agree(found, alone.updates(experiment, HISTORIES))
    assert all(found[user].any() for user in (2, 3, 4))
    assert found[0].any() == (z > 0)


@EACH_LOSS
@pytest.mark.parametrize("round_", [1, 2])
def test_coins_fall_the_same_way(loss, round_):
    experiment = setup(loss, steps=3, rate=0.3)
    assert agree(by_opacus(experiment, round_=round_), alone.updates(experiment, HISTORIES, round_=round_))


@pytest.mark.parametrize(
    "model", [{"blocks": 2, "heads": 4, "ffn": 2}, {"dropout": 0.0, "heads": 1}, {"max_length": 3}]
)
@pytest.mark.parametrize("loss", ["softmax", "gbce"])
def test_models_of_other_shapes(model, loss):
    experiment = setup(loss, steps=2, model=model)
    assert agree(by_opacus(experiment), alone.updates(experiment, HISTORIES))


def test_the_noise_of_opacus_is_ours_on_every_coordinate():
    experiment = setup(steps=4, model={"dim": 32})
    update = by_opacus(experiment, [[]], items=100)[0]
    std = 2 * 0.3 * Z * 0.1 / 2
    assert private.fits(update, std) > 1e-6
    assert private.fits(update, std * 2 / 3) < 1e-6
    assert private.fits(update, std * 3 / 2) < 1e-6


def test_secure_noise_is_never_the_same():
    experiment = setup(rng="secure")
    one, other = (by_opacus(experiment, users=[0, 3]) for _ in range(2))
    for user in (0, 3):
        assert not np.array_equal(one[user], other[user])
    assert abs(np.corrcoef(one[0], other[0])[0, 1]) < 6 / np.sqrt(len(one[0]))


def test_a_bound_of_the_server_holds_for_what_is_noised():
    experiment = setup()
    found = by_opacus(experiment, clip=0.05)
    assert all(np.linalg.norm(update) == pytest.approx(0.05, rel=1e-5) for update in found.values())


@EACH_LOSS
@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_through_the_client_app_is_the_vectorised_one(loss, steps, monkeypatch):
    experiment = setup(loss, steps, rate=0.6)
    weights = world.weights(experiment.model, ITEMS)
    trained = []
    one = opacus_training.one
    monkeypatch.setattr(opacus_training, "one", lambda *given: trained.append(given[3]) or one(*given))
    answers = {}
    for engine in ("vectorized", "sequential"):
        device = world.device(experiment, world.sequences(HISTORIES, held_out=False), ITEMS)
        monkeypatch.setattr(devices, "_open", lambda experiment, path, device=device: device)
        grid, asked = InProcessGrid(device, engine), world.ask("train", experiment, weights, range(5))
        answers[engine] = grid.send_and_receive(asked)
    assert trained == [0, 1, 2, 3, 4]  # by the one engine only
    for a, b in zip(*answers.values(), strict=True):
        assert alone.said(a) == alone.said(b)
        assert np.abs(alone.sent(a) - alone.sent(b)).max() < 1e-5


# --- the account -----------------------------------------------------------------------------------------------------


def test_steps_that_opacus_does_not_account_for_are_refused(monkeypatch):
    monkeypatch.setattr(opacus_training.OwnNoise, "attach_step_hook", lambda *given: None)
    with pytest.raises(StateError, match="accounted for 0 of 3"):
        by_opacus(setup(steps=3))


def accounted(kind, z, q, steps, delta):
    accountant = create_accountant(kind)
    accountant.history = [(z, q, steps)]
    return accountant.get_epsilon(delta=delta)


@pytest.mark.filterwarnings("ignore:Optimal order", "ignore:GDP accounting")
@pytest.mark.parametrize(("z", "q", "steps", "rounds"), [(1.0, 0.5, 1, 10), (2.0, 0.25, 5, 20), (1.5, 0.1, 3, 30)])
def test_opacus_accounts_for_all_rounds_as_we_do(z, q, steps, rounds):
    """And its approximation lies below, so it is not to be had."""
    terms = settle(setup(steps=steps, z=z, rate=q))
    ours = terms.cost(rounds, 1e-5)
    assert ours == pytest.approx(accounted("prv", z, q, steps * rounds, 1e-5), rel=0.01, abs=0.011)
    assert accounted("gdp", z, q, steps * rounds, 1e-5) < ours
    with pytest.raises(ValidationError, match="accountant"):
        setup(accountant="gdp")


# --- broken numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_broken_numbers_are_worth_nothing(value):
    experiment, histories = setup("bce", z=Z), [[5, 6, 7, 8]]
    weights = world.weights(experiment.model, ITEMS)
    weights.table[7] = value
    found, fast = (
        by_opacus(experiment, histories, weights=weights),
        alone.updates(experiment, histories, weights=weights),
    )
    assert np.isfinite(fast[0]).all()
    assert agree(found, fast)
