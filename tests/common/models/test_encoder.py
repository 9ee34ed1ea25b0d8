"""The encoder: against torch's own layers, against a slow reference, and what must not matter."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.models.attention import Setting, multi_head
from common.models.encoder import dropout_sites, encode
from common.models.linear import layer_norm, linear
from common.models.losses import Candidates, softmax
from common.models.mixing import scaled_dot_product
from common.models.schema import ModelConfig, ScaledDotProduct
from common.models.weights import body_size, named
from tests.support import reference, world

CONFIG = ModelConfig(dim=8, blocks=2, heads=2, ffn=2, max_length=6)
CONFIGS = [
    CONFIG,
    ModelConfig(dim=6, blocks=1, heads=1, max_length=6),
    ModelConfig(dim=6, blocks=1, heads=6, max_length=6),
]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def body_of(config, seed=0):
    return world.weights(config, 1, seed).body


# --- layers ----------------------------------------------------------------------------------------------------------


def test_linear_by_hand():
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # (C, L, in)
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]), torch.tensor([0.0, 10.0, 100.0])
    assert linear(x, weight, bias).tolist() == [[[1, 12, 99]], [[3, 14, 99]]]
    each = torch.stack([weight, 2 * weight]), torch.stack([bias, bias * 0])
    assert linear(x, *each).tolist() == [[[1, 12, 99]], [[6, 8, -2]]]
    assert linear(x, weight).tolist() == [[[1, 2, -1]], [[3, 4, -1]]]
    assert linear(x, each[0]).tolist() == [[[1, 2, -1]], [[6, 8, -2]]]


def test_layer_norm_by_hand():
    x = torch.tensor([[[1.0, 3.0]], [[-5.0, 5.0]]])
    weight, bias = torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0])
    expected = torch.tensor([[[-2.0, 2.0]], [[-2.0, 2.0]]])
    assert torch.allclose(layer_norm(x, weight, bias), expected, atol=1e-4)
    each = torch.stack([weight, 0 * weight]), torch.stack([bias, bias])
    assert torch.allclose(layer_norm(x, *each), torch.tensor([[[-2.0, 2.0]], [[0.0, 1.0]]]), atol=1e-4)


@pytest.mark.parametrize(("layer", "out"), [(linear, 7), (layer_norm, 5)])
def test_shared_weights_are_stacked_weights(layer, out):
    x = draw(3, 4, 5)
    weight, bias = (draw(7, 5), draw(7)) if layer is linear else (draw(5), draw(5, seed=1))
    shared, stacked = layer(x, weight, bias), layer(x, weight.expand(3, *weight.shape), bias.expand(3, -1))
    assert shared.shape == (3, 4, out)
    assert torch.allclose(shared, stacked, atol=1e-6)


@pytest.mark.parametrize("layer", [linear, layer_norm])
def test_a_users_layer_is_its_own(layer):
    x = draw(3, 4, 5)
    weight, bias = (draw(3, 7, 5), draw(3, 7)) if layer is linear else (draw(3, 5), draw(3, 5, seed=1))
    together = layer(x, weight, bias)
    for user in range(3):
        assert torch.allclose(together[user], layer(x[user : user + 1], weight[user], bias[user])[0], atol=1e-6)


def test_attention_by_hand():
    # Width 1: the second position weighs the two values by e^(q·k1) : e^(q·k2) = 3 : 1.
    query, key = torch.tensor([[[5.0], [1.0]]]), torch.tensor([[[math.log(3)], [0.0]]])
    value = torch.tensor([[[4.0], [8.0]]])
    assert torch.allclose(scaled_dot_product(query, key, value), torch.tensor([[[4.0], [5.0]]]))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_torchs_own(heads):
    x, d = draw(3, 5, 8), 8
    theirs = nn.MultiheadAttention(d, heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(draw(24, 8, seed=1))
        theirs.in_proj_bias.copy_(draw(24, seed=2))
        future = torch.ones(5, 5, dtype=torch.bool).triu(1)
        expected, _ = theirs(x, x, x, attn_mask=future, need_weights=False)
        mixed = multi_head(
            linear(x, theirs.in_proj_weight, theirs.in_proj_bias), heads, Setting(ScaledDotProduct(), {})
        )
        assert torch.allclose(linear(mixed, theirs.out_proj.weight, theirs.out_proj.bias), expected, atol=1e-5)


# --- the whole encoder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_encoder_is_the_slow_reference(config, masked):
    body, x = body_of(config), draw(3, 6, config.dim)
    masks = (draw(3, 6, dropout_sites(config), config.dim, seed=4) > 0).float() * 2 if masked else None
    fast = encode(config, named(config, body), x, masks)
    for user in range(3):
        slow = reference.encode(
            config, body.double(), x[user].double(), None if masks is None else masks[user].double()
        )
        assert torch.allclose(fast[user], slow.float(), atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_shared_and_stacked_weights_give_equal_states_and_gradients(config):
    x, pull = draw(4, 5, config.dim), draw(4, 5, config.dim, seed=1)
    shared = body_of(config).requires_grad_()
    stacked = shared.detach().expand(4, -1).clone().requires_grad_()
    one, many = encode(config, named(config, shared), x), encode(config, named(config, stacked), x)
    assert torch.allclose(one, many, atol=1e-5)
    (whole,) = torch.autograd.grad((one * pull).sum(), shared)
    (each,) = torch.autograd.grad((many * pull).sum(), stacked)
    assert torch.allclose(whole, each.sum(0), atol=1e-4)
    assert (each[0] - each[1]).abs().max() > 1e-3


def test_a_shorter_window_uses_the_first_positions():
    x = draw(2, 6, 8)
    parameters = named(CONFIG, body_of(CONFIG))
    assert torch.allclose(encode(CONFIG, parameters, x)[:, :4], encode(CONFIG, parameters, x[:, :4]), atol=1e-5)


@settings(max_examples=25)
@given(st.sampled_from(CONFIGS), st.integers(0, 5), st.integers(0, 1000), st.floats(-100, 100))
def test_a_later_event_changes_nothing_earlier(config, place, seed, value):
    parameters, x = named(config, body_of(config)), draw(2, 6, config.dim, seed=seed)
    before = encode(config, parameters, x)
    x[:, place:] = value
    after = encode(config, parameters, x)
    assert torch.allclose(before[:, :place], after[:, :place], atol=1e-5)


def test_an_event_changes_what_comes_from_it_on():
    parameters, x = named(CONFIG, body_of(CONFIG)), draw(1, 6, 8)
    before = encode(CONFIG, parameters, x)
    x[:, 2] += draw(8, seed=1)
    assert ((encode(CONFIG, parameters, x) - before).abs().amax((0, 2)) > 1e-4).tolist() == [False] * 2 + [True] * 4


def test_what_stands_in_the_padding_changes_no_gradient():
    table = draw(9, 8).requires_grad_()
    body = body_of(CONFIG).requires_grad_()
    real = torch.arange(6) < 3

    def gradients(padding):
        items = torch.where(real, torch.tensor([[1, 2, 3, 0, 0, 0]]), torch.tensor(padding))
        hidden = encode(CONFIG, named(CONFIG, body), F.embedding(items, table))
        return torch.autograd.grad(torch.where(real, hidden.sum(-1), 0).square().sum(), (table, body))

    for a, b in zip(gradients([[0] * 6]), gradients([[8, 7, 6, 5, 4, 8]]), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert a.abs().max() > 1e-2


def test_a_row_of_nothing_but_padding_is_finite():
    body = body_of(CONFIG).requires_grad_()
    x = torch.zeros(2, 6, 8)
    x[0] = draw(6, 8)
    hidden = encode(CONFIG, named(CONFIG, body), x)
    assert torch.isfinite(hidden).all()
    (gradient,) = torch.autograd.grad(hidden.sum(), body)
    assert torch.isfinite(gradient).all()


def test_masks_drop_at_each_site():
    parameters, x = named(CONFIG, body_of(CONFIG)), draw(1, 6, 8)
    whole = encode(CONFIG, parameters, x)
    assert dropout_sites(CONFIG) == 5
    assert torch.allclose(encode(CONFIG, parameters, x, torch.ones(1, 6, 5, 8)), whole)
    for site in range(5):
        masks = torch.ones(1, 6, 5, 8)
        masks[:, :, site] = 0
        assert (encode(CONFIG, parameters, x, masks) - whole).abs().max() > 1e-2


def test_gradients_are_finite_differences():
    config = ModelConfig(dim=4, blocks=2, heads=2, ffn=2, max_length=3)
    items, targets = torch.tensor([[0, 3, 1]]), torch.tensor([[3, 1, 2]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    table, body = draw(5, 4, dtype=torch.float64), body_of(config).double()

    def loss(table, body):
        hidden = encode(config, named(config, body), F.embedding(items, table))
        return softmax(Candidates(hidden.sum(-1), hidden @ table.T), targets, mask).sum()

    table.requires_grad_(), body.requires_grad_()
    gradients = torch.autograd.grad(loss(table, body), (table, body))
    with torch.no_grad():
        for i, (part, gradient) in enumerate(zip((table, body), gradients, strict=True)):
            for place in range(part.numel()):
                step = torch.zeros(part.numel(), dtype=torch.float64)
                step[place] = 1e-5
                step = step.view_as(part)
                up, down = ([table, body] for _ in range(2))
                up[i], down[i] = part + step, part - step
                slope = (loss(*up) - loss(*down)) / 2e-5
                assert float(slope) == pytest.approx(float(gradient.flatten()[place]), abs=1e-8)


def test_widths():
    assert encode(CONFIG, named(CONFIG, body_of(CONFIG)), draw(2, 1, 8)).shape == (2, 1, 8)
    assert body_size(CONFIG) == len(body_of(CONFIG))
