"""Every kind of model with every loss: a cohort is its users one by one, and these are what a slow model says."""

import dataclasses
import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from client.batches import windows
from client.cohort import plan, train
from client.evaluation import final_scores, rank, scores
from client.gradients import as_tensor, own_gradients
from client.problem import pose, shared_negatives
from client.step import dropout_masks, read_vectors
from common.models.alike import Outer
from common.models.encoder import Moments, encode
from common.models.scoring import history, score_all, score_each
from common.models.weights import Weights, initialise, named
from common.seeding import keep_mask, uniform_bits, uniform_integers
from tests.support import records, reference, world
from tests.support.kinds import KINDS

ITEMS, LONGEST, ROUND = 24, 11, 5  # two widths of windows, 8 and 11; a third of the items is among the negatives
LENGTHS = [0, 1, 2, 3, 9, 10, 12, 14, 23]  # the longer ones repeat items; the first two have no target
HISTORIES = [[item % ITEMS for item in history] for history in world.random_histories(LENGTHS, 2 * ITEMS)]
GAPS = np.random.default_rng(1).choice([0, 0, 1, 7, 60, 3600, 86_400, 10**7], sum(LENGTHS))  # ties, seconds, months


def timed(sequences):
    return dataclasses.replace(sequences, times=10**9 + GAPS.cumsum())


DATA = timed(world.sequences(HISTORIES, held_out=False))
EVERYBODY = np.arange(len(HISTORIES))
TARGETS = EVERYBODY[2:]  # who has something to train on
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH = pytest.mark.parametrize(("kind", "loss"), [*product(KINDS, world.LOSSES)])


def case(kind, loss="softmax", steps=1, **model):
    """One head or two by turns, so that each kind has both."""
    heads = 1 + (list(KINDS).index(kind) + list(world.LOSSES).index(loss)) % 2
    return world.experiment(
        loss=world.LOSSES[loss],
        model={"dropout": 0.3, "blocks": 2, "max_length": LONGEST, "heads": heads, **KINDS[kind], **model},
        federation={"weighting": "uniform", "local": {"lr": 0.1, "steps": steps}},
    )


def trained(experiment, users=EVERYBODY, clip=None, data=DATA):
    return list(train(experiment, world.weights(experiment.model, ITEMS), data, np.asarray(users), ROUND, clip))


def singles(chunks):
    return {
        user: records.dense(None if updates.whole else updates.rows(i), updates.one(i), ITEMS)
        for updates in chunks
        for i, user in enumerate(updates.users.tolist())
    }


def norm(change):
    return float(torch.hypot(*map(torch.linalg.vector_norm, change)))


# --- a cohort is its users -------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("steps", [1, 3])
def test_a_cohort_is_its_users_one_by_one(kind, loss, steps):
    experiment = case(kind, loss, steps)
    together = singles(trained(experiment))
    lengths = {user: norm(change) for user, change in together.items()}
    clip = float(np.median([lengths[user] for user in TARGETS]))
    clipped = singles(trained(experiment, clip=clip))
    for user in EVERYBODY.tolist():
        alone = singles(trained(experiment, [user]))[user]
        assert world.gap(together[user], alone) < 1e-6
        assert (lengths[user] > 1e-3) == (user in TARGETS)
        scale = min(1.0, clip / max(lengths[user], 1e-9))
        assert world.gap(clipped[user], Weights(*(scale * part for part in alone))) < 1e-6
        assert norm(clipped[user]) <= clip * (1 + 1e-6)


@EACH
def test_the_shared_step_is_the_sum_of_its_users(kind, loss):
    for updates in trained(case(kind, loss, dim=16)):  # wide enough for gradients to be kept in factors, too
        total = records.dense(*updates.summed(updates.expected), ITEMS)
        assert "_stacked" not in updates.__dict__  # the pass with shared weights served
        assert world.gap(total, records.added(updates, updates.expected, ITEMS)) < 1e-6 * len(updates)
        assert min(float(part.abs().max()) for part in total) > 1e-3
        some = np.arange(len(updates), dtype=np.float32) % 3
        total = records.dense(*updates.summed(some), ITEMS)
        assert world.gap(total, records.added(updates, some, ITEMS)) < 1e-6 * len(updates)


@EACH_KIND
def test_short_histories_train_and_rank(kind):
    data = timed(world.sequences(HISTORIES))  # with two events held out, users 3 and 4 train on 1 and 7
    for loss in world.LOSSES:
        for updates in trained(case(kind, loss, 2), data=data):
            assert updates.sound.all()
            assert all(torch.isfinite(part).all() for i in range(len(updates)) for part in updates.one(i))
    experiment = case(kind)
    weights = world.weights(experiment.model, ITEMS)
    for split in ("validation", "test"):
        held = data.stops(EVERYBODY, split)[1] >= 0
        assert (np.isfinite(rank(experiment, weights, data, EVERYBODY, split).full) == held).all()
    assert held.sum() == 6
    found = list(scores(experiment, weights, data, EVERYBODY, data.offsets[1:]))
    assert sorted(user for where, _ in found for user in where) == EVERYBODY[1:].tolist()
    assert all(torch.isfinite(scored).all() for _, scored in found)


@EACH_KIND
def test_masks_of_a_longer_padding_begin_with_those_of_a_shorter(kind):
    long, short = (dropout_masks(case(kind), EVERYBODY, width, 1, ROUND) for width in (LONGEST, 8))
    assert torch.equal(long[:, :8], short)
    assert not torch.equal(long[0], long[1])


# --- a slow model: one user, position by position, dense, in double precision -----------------------------------------


def entmax(z):
    """(z / 2 − τ)₊², the support found by bisection."""
    z = z / 2
    low, high = z.detach().max() - 1, z.detach().max()
    for _ in range(40):
        middle = (low + high) / 2
        enough = (z.detach() - middle).clamp(min=0).square().sum() >= 1
        low, high = (middle, high) if enough else (low, middle)
    kept = z[z.detach() > low]
    threshold = kept.mean() - ((1 - (kept - kept.mean()).square().sum()) / len(kept)).sqrt()
    return (z - threshold).clamp(min=0).square()


def bucket(kind, times, back):
    """Of the interval from `back` to the last of some times."""
    gaps = [b - a for a, b in pairwise(times) if b > a]
    r = (times[-1] - times[back]) // min(gaps, default=1)
    steps = r if kind.scale == "linear" else math.floor(max(1, kind.buckets // 28) * math.log2(1 + r))
    return min(steps, kind.buckets - 1)


def mixed(model, p, head, query, keys, values, times):
    """What one head takes from the past, `query` being the last position's."""
    kind, n = model.attention, len(keys)
    if kind.kind == "time-aware":
        places = [bucket(kind, times, back) for back in range(n)]
        keys, values = keys + p["interval_key"][places], values + p["interval_value"][places]
    if kind.kind == "linear":
        weights = (F.elu(keys) + 1) @ (F.elu(query) + 1)
        return weights / weights.sum() @ values
    logits = keys @ query / (1 if kind.kind == "dot-product" else math.sqrt(len(query)))
    if kind.kind == "additive":
        logits = torch.tanh(query + keys) @ p["vector"][head]
    if model.position == "recency":
        logits = logits - model.recency * torch.arange(n - 1, -1, -1)
    if kind.kind == "local":
        logits, values = logits[-kind.window :], values[-kind.window :]
    if kind.kind == "top-k":
        kept = logits.argsort()[-kind.k :]
        logits, values = logits[kept], values[kept]
    return (entmax(logits) if kind.kind == "entmax-1.5" else logits.softmax(0)) @ values


def in_front(model, p, h):
    n, d = h.shape
    if model.encoder == "cnn-attention":
        padded = torch.cat([torch.zeros(model.kernel - 1, d, dtype=h.dtype), h])
        return F.gelu(torch.stack([p["weight"] @ padded[t : t + model.kernel].flatten() for t in range(n)]) + p["bias"])
    state, states = torch.zeros(d, dtype=h.dtype), []
    for t in range(n):
        given, again = p["weight"] @ h[t] + p["bias"], p["recurrent"] @ state + p["recurrent_bias"]
        reset, update = torch.sigmoid(given + again)[: 2 * d].chunk(2)
        state = (1 - update) * torch.tanh(given[2 * d :] + reset * again[2 * d :]) + update * state
        states.append(state)
    return torch.stack(states)


def cuts(model):
    width = model.dim // model.heads
    return [slice(head * width, (head + 1) * width) for head in range(model.heads)]


def slow_states(model, p, x, times, masks):
    n, d, attends = len(x), model.dim, 0 if model.encoder == "gru" else model.blocks
    masks = torch.ones(n, 2 * attends + 2, d) if masks is None else masks
    x = x * math.sqrt(d) + (p["position"][:n] if "position" in p else 0)
    x = x * masks[:, 0]

    def part(place):
        return {name.removeprefix(place): value for name, value in p.items() if name.startswith(place)}

    if model.encoder != "attention":
        q = part("front.")
        x = x + in_front(model, q, reference.norm(x, q["norm.weight"], q["norm.bias"])) * masks[:, -1]
    for b in range(attends):
        q = part(f"blocks.{b}.")
        queries, keys, values = (reference.norm(x, q["norm1.weight"], q["norm1.bias"]) @ q["qkv.weight"].T).split(d, 1)
        rows = [
            torch.cat(
                [
                    mixed(model, q, head, queries[t, cut], keys[: t + 1, cut], values[: t + 1, cut], times[: t + 1])
                    for head, cut in enumerate(cuts(model))
                ]
            )
            for t in range(n)
        ]
        x = x + (torch.stack(rows) @ q["out.weight"].T + q["out.bias"]) * masks[:, 2 * b + 1]
        h = F.gelu(reference.norm(x, q["norm2.weight"], q["norm2.bias"]) @ q["up.weight"].T + q["up.bias"])
        x = x + (h @ q["down.weight"].T + q["down.bias"]) * masks[:, 2 * b + 2]
    return reference.norm(x, p["norm.weight"], p["norm.bias"])


def slow_scores(model, table, body, items, times, masks=None):
    """Scores of all items after each event, ``(n, I)``."""
    p = reference.parameters(model, body)
    hidden = slow_states(model, p, table[items], times, masks)
    products = hidden @ table.T
    if model.head == "dot-product":
        return products
    keys, values = hidden @ p["target.key.weight"].T, hidden @ p["target.value.weight"].T
    rows = []
    for t in range(len(hidden)):
        total = 0
        for cut in cuts(model):
            asked = table[:, cut]
            loud = asked * math.sqrt(table.shape[1])
            weights = (loud @ keys[: t + 1, cut].T / math.sqrt(asked.shape[1])).softmax(1)
            total = total + (weights @ values[: t + 1, cut] * asked).sum(1)
        rows.append(products[t] + total)
    return torch.stack(rows)


def last(user, n):
    """The user's last n items and their times."""
    start, stop = DATA.offsets[user : user + 2]
    return HISTORIES[user][-n:], DATA.times[max(start, stop - n) : stop].tolist()


def slow_loss(experiment, table, body, user):
    model, loss = experiment.model, experiment.loss
    items, times = last(user, LONGEST + 1)
    n, sites = len(items) - 1, 1 + 2 * (0 if model.encoder == "gru" else model.blocks) + (model.encoder != "attention")
    bits = uniform_bits(experiment.seed, "dropout-0", ROUND, [user], n * sites * model.dim)
    masks = torch.from_numpy(keep_mask(bits, model.dropout)).view(n, sites, model.dim).double()
    logits = slow_scores(model, table, body, items[:-1], times[:-1], masks)
    private = uniform_integers(experiment.seed, "private-negatives", ROUND, [user], n, ITEMS)[0].tolist()
    shared = shared_negatives(loss, experiment.seed, ROUND, ITEMS).tolist()
    total = 0
    for t, target in enumerate(items[1:]):
        negatives = private[t : t + 1] if loss.kind == "bce" else shared
        total = total + reference.position_loss(loss, logits[t], target, negatives, set(HISTORIES[user]))
    return total / n


@EACH
@pytest.mark.parametrize("stacked", [False, True])
def test_a_users_own_gradient_is_that_of_the_slow_model(kind, loss, stacked):
    experiment = case(kind, loss, dim=16, blocks=1)  # wide enough for factors to be kept where windows are short
    table, body = world.weights(experiment.model, ITEMS)
    noise = 0.1 * torch.randn(len(HISTORIES), len(body), generator=torch.Generator().manual_seed(2))
    kept = 0
    for users in plan(experiment, DATA, TARGETS, ITEMS):
        shared, single = pose(experiment, DATA, windows(experiment, DATA, users, ROUND), ROUND, ITEMS)
        read = read_vectors(table if shared.rows is None else table[torch.from_numpy(shared.rows)], shared, 0)
        here = body + noise[torch.from_numpy(users)] if stacked else body
        tables, parts, losses = own_gradients(experiment, read, here, single, ROUND)
        kept += sum(isinstance(part, Outer) for part in parts)
        of_body = torch.cat([as_tensor(part).flatten(1) for part in parts], dim=1)
        for i, user in enumerate(users.tolist()):
            leaves = [part.double().requires_grad_() for part in (table, here[i] if stacked else body)]
            expected = slow_loss(experiment, *leaves, user)
            rows = None if single.rows is None else single.rows[i, : single.counts[i]]
            found = records.dense(rows, Weights(torch.cat(tables, 1)[i][: single.counts[i]], of_body[i]), ITEMS)
            assert losses[i].item() == pytest.approx(expected.item(), rel=1e-5)
            for ours, theirs in zip(found, torch.autograd.grad(expected, leaves), strict=True):
                assert float((ours - theirs).abs().max() / theirs.abs().max()) < 2e-5
    assert (kept > 0) == (not stacked)


@EACH_KIND
def test_ranking_scores_as_training_does(kind):
    """After the last event: the slow model, ranking, all items at once, and one after the other."""
    for heads in (1, 2):
        model = case(kind, heads=heads).model
        weights = world.weights(model, ITEMS)
        users = EVERYBODY[1:]
        rows = [last(user, LONGEST) for user in users]
        lengths = torch.tensor([len(items) for items, _ in rows])
        items, times = (
            torch.tensor([row[i] + [7] * (LONGEST - len(row[i])) for row in rows]) for i in (0, 1)
        )  # padded with what is neither an item's nor a time's usual filling
        ranked = final_scores(model, weights, items, lengths, Moments(times, lengths))
        parameters = named(model, weights.body)
        hidden = encode(model, parameters, weights.table[items], moments=Moments(times, lengths))
        past, here = history(model, parameters, hidden), (torch.arange(len(users)), lengths - 1)
        assert torch.allclose(score_all(past, weights.table)[here], ranked, atol=1e-5)
        for item in range(ITEMS):
            each = score_each(past, weights.table[item].expand_as(hidden))
            assert torch.allclose(each[here], ranked[:, item], atol=1e-5)
        slow = [slow_scores(model, *(part.double() for part in weights), *row)[-1] for row in rows]
        assert torch.allclose(torch.stack(slow).float(), ranked, atol=1e-5)
        experiment = case(kind, heads=heads)
        for where, scored in scores(experiment, weights, DATA, users, DATA.offsets[1:][users]):
            assert torch.allclose(scored, ranked[torch.from_numpy(where)], atol=1e-5)


@EACH_KIND
def test_no_parameter_is_dead(kind):
    experiment = case(kind, dropout=0.0)
    fresh = initialise(experiment.model, ITEMS, 0)
    reached = sum(
        change.body.abs()
        for updates in train(experiment, fresh, DATA, EVERYBODY, ROUND)
        for change in (updates.one(i) for i in range(len(updates)))
    )
    for name, moved in named(experiment.model, reached).items():
        if "interval" in name:  # nobody has an interval of each length
            assert moved.any(1).sum() > 2
        else:
            assert moved.all(), name


def test_one_negative_and_one_user_are_barred_as_many_are():
    """A negative of the user's own counts nowhere, alone as in company."""
    experiment = world.experiment(loss={"kind": "sampled-softmax", "negatives": 1})
    negative = int(shared_negatives(experiment.loss, experiment.seed, 1, ITEMS)[0])
    data = world.sequences([[negative, 1, 2, 3], [4, 5, negative, 6]], held_out=False)
    weights = world.weights(experiment.model, ITEMS)
    for user in (0, 1):
        (updates,) = train(experiment, weights, data, np.array([user]), 1)
        assert updates.losses.tolist() == [0.0]
