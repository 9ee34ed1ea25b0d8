"""Updates that are mapped before the clip: the map is public, the bound holds behind it, and nothing else changes."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from client.cohort import train
from common.models.weights import Weights
from common.privacy.precondition import preconditioned, whitening
from common.privacy.schema import Precondition, UserLevel
from simulations.grid import InProcessGrid
from tests.privacy import private
from tests.support import records, world

ITEMS, BOUND = private.ITEMS, 0.05
HISTORIES = world.random_histories([1, 3, 6, 9, 14, 60], ITEMS - 5)
USERS = np.arange(len(HISTORIES))
EACH = [(loss, steps) for loss in world.LOSSES for steps in (1, 3)]


def setup(loss="softmax", steps=1, **privacy):
    return private.experiment(
        loss=world.LOSSES[loss],
        model={"max_length": 11},
        privacy={"noise_multiplier": 0.0, "clipping_norm": BOUND, **privacy},
        federation={"local": {"lr": 0.3, "steps": steps}},
    )


def energies(table):
    return torch.linalg.eigvalsh(table.double().T @ table.double())


def loud(seed=0):
    """A table with one direction in which all rows agree."""
    table = torch.from_numpy(np.random.default_rng(seed).standard_normal((300, 6)).astype(np.float32))
    return table + 4 * torch.ones(6)


# --- the map ---------------------------------------------------------------------------------------------------------


def test_a_loud_direction_is_turned_down():
    before, after = energies(loud()), energies(loud() @ whitening(loud(), 1.0))
    assert before[-1] / before.sum() > 0.9 > 0.8 > after[-1] / after.sum()
    assert after[0] / after.sum() > before[0] / before.sum()


def test_the_more_weight_the_closer_to_no_map():
    assert torch.allclose(whitening(loud(), 1e9), torch.eye(6), atol=1e-6)
    shares = [float(energies(loud() @ whitening(loud(), weight)).amax()) for weight in (0.1, 1.0, 10.0)]
    assert shares == sorted(shares)


def test_directions_of_equal_energy_keep_their_lengths():
    assert torch.allclose(whitening(torch.eye(6).repeat(5, 1), 1.0), torch.eye(6), atol=1e-6)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    found = whitening(loud() @ turned, 1.0)
    assert torch.allclose(found, turned.T @ whitening(loud(), 1.0) @ turned, atol=1e-4)
    assert torch.equal(found, whitening(loud() @ turned, 1.0))


@pytest.mark.parametrize("table", [torch.zeros(9, 4), torch.ones(9, 4), torch.randn(2, 4)])
def test_a_table_of_few_directions_gives_a_map_all_the_same(table):
    assert torch.isfinite(whitening(table, 1.0)).all()


def test_the_body_is_scaled_and_the_table_may_be_left():
    table, parts = torch.randn(2, 3, 6), [torch.randn(2, 5), torch.randn(2, 4, 3)]
    (same,), scaled = preconditioned(Precondition(whiten=None, body=0.5), loud(), [table], parts)
    assert torch.equal(same, table)
    assert all(torch.equal(a, b * 0.5) for a, b in zip(scaled, parts, strict=True))
    (mapped,), whole = preconditioned(Precondition(), loud(), [table], parts)
    assert torch.allclose(mapped, table @ whitening(loud(), 1.0))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


# --- before the clip -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "steps"), EACH)
def test_what_leaves_is_the_clipped_map_of_the_update(loss, steps):
    settings = {"whiten": 0.5, "body": 0.3}
    plain, mapped = setup(loss, steps), setup(loss, steps, precondition=settings)
    weights, sequences = world.weights(plain.model, ITEMS), world.sequences(HISTORIES, held_out=False)
    whole = {record.user: record for record in records.trained(plain, weights, sequences, USERS, 1)}
    turn = whitening(weights.table, 0.5).double()
    for updates in train(mapped, weights, sequences, USERS, 1, BOUND):
        for i, user in enumerate(updates.users.tolist()):
            update = whole[user].weights
            wanted = Weights(update.table.double() @ turn, update.body.double() * 0.3)
            length = private.norm(wanted)
            factor = min(1.0, BOUND / length) if length else 1.0
            assert (
                world.gap(
                    Weights(*(part.double() for part in updates.one(i))), Weights(*(part * factor for part in wanted))
                )
                < 1e-6
            )
            assert updates.norms[i] == pytest.approx(length, rel=1e-4)
            assert updates.facts["below"][i] == (length <= BOUND)


@pytest.mark.parametrize(("loss", "steps"), EACH)
def test_one_user_moves_the_mean_by_no_more_than_the_bound(loss, steps):
    experiment = setup(loss, steps, precondition={"whiten": 0.2, "body": 5.0})
    device = world.device(experiment, world.sequences(HISTORIES, held_out=False), ITEMS)
    weights = world.weights(experiment.model, ITEMS)
    grid = InProcessGrid(device, "vectorized")
    whole = grid.send_and_receive(private.asked(experiment, weights, USERS.tolist(), BOUND))
    everybody = private.flat(private.released(experiment, whole, len(USERS)))
    for left_out in USERS.tolist():
        others = [reply for user, reply in enumerate(whole) if user != left_out]
        moved = np.linalg.norm(everybody - private.flat(private.released(experiment, others, len(USERS))))
        assert moved <= BOUND / 5 * (1 + 1e-5)


def test_without_a_clip_nothing_is_mapped():
    """Nobody is told a bound where there is no privacy, and the map belongs to the bound."""
    mapped, plain = setup(precondition={"body": 0.1}), setup()
    weights, sequences = world.weights(plain.model, ITEMS), world.sequences(HISTORIES, held_out=False)
    for one, two in zip(
        *(records.trained(each, weights, sequences, USERS, 1) for each in (mapped, plain)), strict=True
    ):
        assert world.same(one.weights, two.weights)


def test_it_is_refused_where_devices_have_noised_already():
    with pytest.raises(ValidationError, match="precondition maps updates that no noise is in yet"):
        UserLevel(
            kind="user-level",
            noise_multiplier=1.0,
            precondition=Precondition(),
            on_device={"kind": "example-level", "noise_multiplier": 1.0},
        )
