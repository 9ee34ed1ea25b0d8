"""A person's own parameters in the model: without effect at first, the same shared, stacked and event by event."""

import numpy as np
import pytest
import torch

from client.evaluation import final_scores, rank
from client.online import Session
from common.models.encoder import encode
from common.models.personal import Kept, bodies, kept_columns
from common.models.weights import Weights, body_shapes, initialise, named
from tests.support import world

ITEMS = 40
HISTORY = world.random_histories([30], ITEMS)[0]
PERSONAL = ["bias", "scale", "adapter"]
EACH = pytest.mark.parametrize("personal", [["bias"], ["scale"], ["adapter"], PERSONAL])


def case(personal=PERSONAL, **model):
    return world.experiment(model={"personal": personal, **model}, federation={"on_device": ["user.*"]})


@pytest.mark.parametrize("head", ["dot-product", "target"])
@EACH
def test_what_is_personal_begins_without_effect(personal, head):
    plain, more = world.experiment(model={"head": head}).model, case(personal, head=head).model
    one, other = initialise(plain, ITEMS, 7), initialise(more, ITEMS, 7)
    assert torch.equal(one.table, other.table)
    assert torch.equal(one.body, other.body[: len(one.body)])
    items, lengths = torch.tensor([[3, 1, 4, 1], [5, 9, 0, 0]]), torch.tensor([4, 2])
    assert torch.equal(final_scores(plain, one, items, lengths), final_scores(more, other, items, lengths))
    moved = world.weights(more, ITEMS, 7)
    unmoved = Weights(moved.table, torch.cat([moved.body[: len(one.body)], other.body[len(one.body) :]]))
    gap = final_scores(more, moved, items, lengths) - final_scores(more, unmoved, items, lengths)
    assert gap.abs().max() > 1e-3


def test_names_and_order_of_what_is_personal():
    names = list(body_shapes(case(personal=["scale", "adapter", "bias"]).model))
    assert names[-4:] == ["user.scale", "user.adapter_down", "user.adapter_up", "user.bias"]


@EACH
def test_shared_is_stacked(personal):
    config = case(personal=personal).model
    torch.manual_seed(0)
    x, body = torch.randn(3, 6, config.dim), world.weights(config, ITEMS).body
    shared = encode(config, named(config, body), x)
    assert (encode(config, named(config, body.expand(3, -1)), x) - shared).abs().max() < 1e-6
    values = body[kept_columns(config, ("user.*",))] + torch.randn(3, len(kept_columns(config, ("user.*",))))
    stacked = bodies(config, ("user.*",), body, values)
    together = encode(config, named(config, stacked), x)
    assert (together - shared).abs().max() > 1e-2
    for i in range(3):
        assert (
            encode(config, named(config, stacked[i]), x[i : i + 1]) - together[i]
        ).abs().max() < 1e-5 * together.abs().max()


def test_personal_by_hand():
    config = case(personal=PERSONAL).model
    parameters = dict(named(config, initialise(config, ITEMS, 0).body))
    x = torch.randn(1, 4, config.dim)
    plain = encode(config, parameters, x)
    parameters |= {"user.scale": torch.tensor([3.0]), "user.bias": torch.arange(8.0)}
    down, up = torch.randn(8, 8), torch.randn(8, 8)
    parameters |= {"user.adapter_down": down, "user.adapter_up": up}
    narrow = torch.nn.functional.gelu(plain @ down.T)
    expected = 3 * (plain + narrow @ up.T) + torch.arange(8.0)
    assert (encode(config, parameters, x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("head", ["dot-product", "target"])
@pytest.mark.parametrize("encoder", ["attention", "gru"])
def test_a_session_is_a_full_pass(encoder, head):
    config = case(encoder=encoder, head=head).model
    weights, items = world.weights(config, ITEMS), HISTORY[:10]
    session = Session(config, weights)
    for n, item in enumerate(items, start=1):
        window = torch.tensor([items[:n][-config.max_length :]])
        expected = final_scores(config, weights, window, torch.tensor([window.shape[1]]))[0]
        assert (session.append(item) - expected).abs().max() < 1e-5


def test_ranks_are_with_each_users_own_numbers():
    experiment = case(personal=["bias"])
    data = world.sequences([[0, 1, 2, 7]] * 3)
    weights = initialise(experiment.model, ITEMS, 0)
    push = torch.stack([torch.zeros(8), 1e3 * weights.table[7], -1e3 * weights.table[7]])
    found = rank(experiment, weights, data, np.arange(3), "test", Kept(np.arange(3), push))
    assert found.personal[0] == found.full[0] == found.full[1] == found.full[2]
    assert found.personal[1] < found.personal[2]
    expected = final_scores(experiment.model, weights, torch.tensor([[0, 1, 2]]), torch.tensor([3]))[0]
    for user in (1, 2):
        scored = expected + weights.table @ push[user]
        scored[:3] = -torch.inf
        assert found.personal[user] == 1 + int((scored > scored[7]).sum())
    assert np.isnan(rank(experiment, weights, data, np.arange(3), "test").personal).all()
