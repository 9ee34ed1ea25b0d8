"""Parameters that stay on the device: what leaves holds nothing of them, and each user's follow its own gradient."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from client import gradients, training
from client.batches import windows
from client.cohort import train
from client.handlers import handle_train
from client.own import own_of
from client.problem import pose
from client.step import read_vectors, step_loss
from common.models.personal import Kept, kept_columns
from common.models.weights import Weights, initialise, named
from common.wire import UPDATE
from server.rounds import serve
from simulations.grid import InProcessGrid
from tests.support import reference, world

ITEMS, LONGEST = 40, 11
HISTORIES = world.random_histories([1, 2, 9, 13, 30], ITEMS)
DATA = world.sequences(HISTORIES, held_out=False)
USERS = np.arange(len(HISTORIES))
PERSONAL = ["bias", "scale", "adapter"]
PATTERNS = (["user.*"], ["norm.*"], ["blocks.0.*"])
LOCALS = {"one step": {"steps": 1}, "three steps": {"steps": 3}}
LR, OWN_LR = 0.3, 0.2
EACH = pytest.mark.parametrize(
    ("loss", "local", "patterns"),
    [
        pytest.param(loss, local, patterns, id=f"{loss}-{local}-{patterns[0]}")
        for loss in world.LOSSES
        for local in LOCALS
        for patterns in PATTERNS
    ],
)


def case(loss="softmax", local="one step", patterns=("user.*",), lr=OWN_LR, personal=PERSONAL, **sections):
    local = {"lr": LR, **LOCALS[local]}
    return world.experiment(
        loss=world.LOSSES[loss],
        model={"blocks": 2, "max_length": LONGEST, "personal": personal},
        federation={"local": local, "on_device": list(patterns), "on_device_lr": lr, **sections.pop("federation", {})},
        # Fine-tuned, so that what is personal is somebody's, whatever stays.
        evaluation={"fine_tune": {}, **sections.pop("evaluation", {})},
        **sections,
    )


def columns(experiment):
    return kept_columns(experiment.model, experiment.federation.on_device)


def others(experiment, body):
    """The numbers that are shared."""
    mask = torch.ones(body.shape[-1], dtype=torch.bool)
    mask[columns(experiment)] = False
    return body[..., mask]


def different(experiment, users=USERS):
    """Numbers of their own, for each user others."""
    weights = world.weights(experiment.model, ITEMS)
    drawn = torch.randn(len(USERS), len(columns(experiment)), generator=torch.Generator().manual_seed(1))
    return Kept(users, weights.body[columns(experiment)] + 0.2 * drawn[torch.from_numpy(users)])


def trained(experiment, own, users=USERS, weights=None, data=DATA, clip=None, round_=3):
    """Each user's dense update, what it keeps, and the norm of its update."""
    weights = world.weights(experiment.model, ITEMS) if weights is None else weights
    found = {}
    for updates in train(experiment, weights, data, users, round_, clip, own):
        for i, user in enumerate(updates.users.tolist()):
            change = updates.one(i)
            table = change.table
            if not updates.whole:
                table = torch.zeros_like(weights.table)
                table[torch.from_numpy(updates.rows(i)).long()] = change.table
            kept = None if own is None else updates.kept[i]
            found[user] = Weights(table, change.body), kept, float(updates.norms[i])
    return found


# --- what leaves, and what stays -------------------------------------------------------------------------------------


@EACH
def test_nothing_of_what_stays_leaves(loss, local, patterns):
    experiment = case(loss, local, patterns)
    weights, own = world.weights(experiment.model, ITEMS), different(experiment)
    for updates in train(experiment, weights, DATA, USERS, 3, None, own):
        for i, events in enumerate(updates.events.tolist()):
            assert not updates.one(i).body[columns(experiment)].any()
            assert others(experiment, updates.one(i).body).any() == (events > 0)
        assert not updates.summed(updates.expected)[1].body[columns(experiment)].any()


@EACH
def test_a_cohort_is_its_users_one_by_one(loss, local, patterns):
    experiment = case(loss, local, patterns)
    together = trained(experiment, different(experiment))
    assert sorted(together) == USERS.tolist()
    for user in USERS.tolist():
        update, kept, norm = trained(experiment, different(experiment, USERS[user : user + 1]), USERS[[user]])[user]
        assert world.gap(update, together[user][0]) < 1e-6
        assert (kept - together[user][1]).abs().max() < 1e-6
        assert norm == pytest.approx(together[user][2], abs=1e-6)


def by_hand(experiment, weights, own, user):
    """Plain SGD on one user's body, each number at its own rate; the update's other numbers, and what is kept."""
    chunk = windows(experiment, DATA, np.array([user]), 3)
    problem, _ = pose(experiment, DATA, chunk, 3, ITEMS)
    rows = torch.arange(ITEMS) if problem.rows is None else torch.from_numpy(problem.rows)
    mine, rates = columns(experiment), torch.full_like(weights.body, LR)
    table, body = weights.table[rows].clone(), weights.body.clone()
    body[mine], rates[mine] = own, OWN_LR
    for step in range(chunk.lengths.shape[1]):
        leaves = table.requires_grad_(), body.requires_grad_()
        parameters = named(experiment.model, body)
        loss = step_loss(experiment, read_vectors(table, problem, step), parameters, problem, step, 3)
        of_table, of_body = torch.autograd.grad(loss.sum(), leaves)
        table, body = (table - LR * of_table).detach(), (body - rates * of_body).detach()
    change = torch.zeros(ITEMS, table.shape[1]).index_add_(0, rows, table - weights.table[rows])
    return Weights(change, others(experiment, body - weights.body)), body[mine]


@EACH
def test_each_user_follows_its_own_gradient(loss, local, patterns):
    experiment = case(loss, local, patterns)
    weights, own = world.weights(experiment.model, ITEMS), different(experiment)
    for user, (update, kept, _) in trained(experiment, own).items():
        expected, mine = by_hand(experiment, weights, own.values[user], user)
        assert world.gap(Weights(update.table, others(experiment, update.body)), expected) < 2e-6
        assert (kept - mine).abs().max() < 2e-6
        assert torch.equal(kept, own.values[user]) == (len(HISTORIES[user]) < 2)


@pytest.mark.parametrize("loss", world.LOSSES)
@pytest.mark.parametrize("local", LOCALS)
@pytest.mark.parametrize("patterns", [["norm.*"], ["blocks.0.*", "position"]])
def test_so_the_slow_reference_says(loss, local, patterns):
    """It knows no parameters that stay; its one learning rate is that of both."""
    experiment = case(loss, local, patterns, lr=LR, personal=[])
    weights, own = world.weights(experiment.model, ITEMS), different(experiment)
    for user, (update, kept, _) in trained(experiment, own).items():
        body = weights.body.clone()
        body[columns(experiment)] = own.values[user]
        expected, _ = reference.train(experiment, Weights(weights.table, body), HISTORIES[user], user, 3)
        moved = own.values[user] + expected.body[columns(experiment)]
        assert (kept - moved).abs().max() < 4e-6
        assert (others(experiment, update.body) - others(experiment, expected.body)).abs().max() < 4e-6
        assert (update.table - expected.table).abs().max() < 4e-6


@EACH
def test_where_nobody_has_begun_the_first_update_is_the_usual_one(loss, local, patterns):
    experiment, all_sent = (case(loss, local, each, lr=LR) for each in (patterns, ()))
    weights = world.weights(experiment.model, ITEMS)
    fresh = weights.body[columns(experiment)].expand(len(USERS), -1)
    with_, without = trained(experiment, Kept(USERS, fresh)), trained(all_sent, None)
    for user in USERS.tolist():
        one, other = (Weights(u.table, others(experiment, u.body)) for u in (with_[user][0], without[user][0]))
        assert world.gap(one, other) < 1e-6
        moved = without[user][0].body[columns(experiment)]
        assert (with_[user][1] - fresh[0] - moved).abs().max() < 1e-6


@pytest.mark.parametrize("local", LOCALS)
def test_twins_with_different_numbers_train_differently(local):
    experiment = case("softmax", local)
    data, own = world.sequences([HISTORIES[4]] * 5, held_out=False), different(experiment)
    one, other = (trained(experiment, own, data=data)[user] for user in (1, 2))
    assert world.gap(one[0], other[0]) > 1e-3
    same = Kept(USERS, own.values[:1].expand(len(USERS), -1))
    one, other = (trained(experiment, same, data=data)[user] for user in (1, 2))
    assert world.gap(one[0], other[0]) < 1e-6


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("local", LOCALS)
def test_the_clip_measures_what_leaves(local, patterns):
    experiment = case("sampled-softmax", local, patterns)
    own = different(experiment)
    plain = trained(experiment, own)
    for user, (update, _, norm) in plain.items():
        assert norm == pytest.approx(float(torch.cat([part.flatten() for part in update]).norm()), rel=1e-5), user
    bound = sorted(norm for *_, norm in plain.values())[2]
    for user, (update, kept, norm) in trained(experiment, own, clip=bound).items():
        factor = min(1.0, bound / norm) if norm else 1.0
        whole, mine, _ = plain[user]
        assert world.gap(update, Weights(*(factor * part for part in whole))) < 1e-6
        assert torch.equal(kept, mine)  # nothing clips what stays


def test_without_numbers_of_its_own_nothing_is_trained():
    """Or what should stay would be sent."""
    experiment = case()
    with pytest.raises(ValueError, match="would be sent"):
        list(train(experiment, world.weights(experiment.model, ITEMS), DATA, USERS, 3))
    for updates in train(case(patterns=()), world.weights(experiment.model, ITEMS), DATA, USERS, 3):
        with pytest.raises(ValueError, match="nothing stays"):
            _ = updates.kept


# --- messages --------------------------------------------------------------------------------------------------------


def placed(experiment):
    """A device that plays all users, who have what everybody begins with."""
    return replace(world.device(experiment, DATA, ITEMS), own=own_of(experiment, 0, len(USERS), ITEMS))


def answered(device, weights, round_=1):
    users = [4, 2, 3]
    messages = world.ask("train", device.experiment, weights, users, round_)
    return dict(zip(users, handle_train(messages, users, device), strict=True))


@pytest.mark.parametrize("local", LOCALS)
def test_a_device_goes_on_from_what_it_has(local):
    experiment = case("sampled-softmax", local)
    device, weights = placed(experiment), world.weights(experiment.model, ITEMS)
    own = device.own.before(USERS, 1)
    for round_ in (1, 2):
        replies = answered(device, weights, round_)
        expected = trained(experiment, own.of(USERS[2:]), USERS[2:], weights, round_=round_)
        own = Kept(USERS, torch.stack([*own.values[:2], *(expected[user][1] for user in (2, 3, 4))]))
        assert (device.own.before(USERS, round_ + 1).values - own.values).abs().max() < 1e-6
        for user, reply in replies.items():
            body = torch.from_numpy(reply.content.array_records[UPDATE]["body"].numpy())
            assert not body[columns(experiment)].any()
            assert (body - expected[user][0].body).abs().max() < 1e-6
    assert len(own.values.unique(dim=0)) == 4  # the first two have not trained


@pytest.mark.parametrize("local", LOCALS)
def test_training_that_comes_to_nothing_leaves_what_there_was(monkeypatch, local):
    experiment = case("sampled-softmax", local)
    device, weights, loss = placed(experiment), world.weights(experiment.model, ITEMS), training.step_loss
    answered(device, weights)
    before = device.own.before(USERS, 2).values

    def broken(experiment, vectors, parameters, problem, step, round_):
        factor = np.where(problem.windows.users == 3, np.nan, 1).astype(np.float32)
        return loss(experiment, vectors, parameters, problem, step, round_) * torch.from_numpy(factor)

    for module in (training, gradients):
        monkeypatch.setattr(module, "step_loss", broken)
    assert [reply.has_error() for reply in answered(device, weights, 2).values()] == [False, False, True]
    moved = (device.own.before(USERS, 3).values != before).any(1)
    assert moved.tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("local", LOCALS)
def test_what_stays_may_come_to_nothing_too(local):
    """An update may be sound though the user's own numbers are not: at a rate of their own that is too large."""
    experiment = case("sampled-softmax", local, ["norm.*"], lr=1e38)
    device, weights = placed(experiment), world.weights(experiment.model, ITEMS, scale=3)
    answered(device, weights)
    assert device.own.before(USERS, 2).values.abs().max() < 1e7


# --- privacy and configuration ---------------------------------------------------------------------------------------


def test_the_noise_of_the_server_does_not_reach_what_stays():
    privacy = {"kind": "user-level", "noise_multiplier": 50.0, "clipping_norm": 0.3, "rng": "reproducible"}
    experiment = case(
        "sampled-softmax",
        federation={"rounds": 1, "cohort": 3, "sampling": "poisson", "weighting": "uniform"},
        privacy=privacy,
        evaluation={"privacy": "unaccounted"},
    )
    device, start = placed(experiment), initialise(experiment.model, ITEMS, experiment.seed)
    outcome = serve(InProcessGrid(device, "vectorized"), experiment, None, lambda line: None)
    asked = device.own._last >= 0
    assert 0 < asked.sum() < len(USERS)
    moved = outcome.weights.body - start.body
    assert not moved[columns(experiment)].any()  # nothing of anybody's is there, so no noise either
    assert others(experiment, moved).abs().min() > 0
    fresh = start.body[columns(experiment)].expand(len(USERS), -1)
    left = device.own.before(USERS, 2).values
    assert torch.equal(left[~asked], fresh[~asked])
    again = partial(train, experiment, start, DATA, USERS[asked], 1)
    for updates in again(clip=0.3, own=Kept(USERS[asked], fresh[asked])):
        assert (left[torch.from_numpy(updates.users)] - updates.kept).abs().max() < 1e-6
