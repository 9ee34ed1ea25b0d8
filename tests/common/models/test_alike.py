"""Layers at weights that all users share: each user's own gradient, its norm and the weighted sums of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models.alike import Outer, Tap
from common.models.linear import layer_norm, linear
from common.privacy.mechanism import norms


def one_by_one(layer, x, weight, bias, cotangent):
    """Gradients of input, weight and bias, user by user with weights of its own."""
    found = []
    for i in range(len(x)):
        leaves = [part.clone().requires_grad_() for part in (x[i : i + 1], weight, bias)]
        found.append(torch.autograd.grad(layer(*leaves), leaves, cotangent[i : i + 1]))
    of_x, of_weight, of_bias = zip(*found, strict=True)
    return torch.cat(of_x), torch.stack(of_weight), torch.stack(of_bias)


@pytest.mark.parametrize("length", [1, 3, 40])  # short windows stay in factors, long ones do not
@pytest.mark.parametrize("users", [1, 5])
def test_a_tap_catches_each_users_gradient(users, length):
    torch.manual_seed(length)
    x, weight, bias = torch.randn(users, length, 6), torch.randn(12, 6), torch.randn(12)
    cotangent = torch.randn(users, length, 12)
    tap, leaves = Tap(weight), [x.clone().requires_grad_(), bias.expand(users, -1).detach().requires_grad_()]
    y = linear(leaves[0], tap, leaves[1])
    of_x, of_bias = torch.autograd.grad(y, leaves, cotangent)
    caught = tap.gradient
    assert isinstance(caught, Outer) == (length * 18 <= 72)
    whole = caught.whole() if isinstance(caught, Outer) else caught
    torch.testing.assert_close(y, linear(x, weight, bias))
    for got, want in zip((of_x, whole, of_bias), one_by_one(linear, x, weight, bias, cotangent), strict=True):
        torch.testing.assert_close(got, want)


def test_layer_norm_with_an_expanded_weight_is_that_with_copies():
    torch.manual_seed(0)
    x, weight, bias, cotangent = torch.randn(4, 5, 8), torch.randn(8), torch.randn(8), torch.randn(4, 5, 8)
    leaves = [x.clone().requires_grad_(), *(p.expand(4, -1).detach().requires_grad_() for p in (weight, bias))]
    y = layer_norm(*leaves)
    torch.testing.assert_close(y, layer_norm(x, weight, bias))
    wanted = one_by_one(layer_norm, x, weight, bias, cotangent)
    for got, want in zip(torch.autograd.grad(y, leaves, cotangent), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_a_layer_that_is_used_twice_is_refused_and_one_that_never_was_has_no_gradient():
    tap, x = Tap(torch.eye(2)), torch.ones(1, 1, 2, requires_grad=True)
    with pytest.raises(ValueError, match="no backward pass"):
        _ = tap.gradient
    with pytest.raises(ValueError, match="twice"):
        (tap.linear(x, None) + tap.linear(x, None)).sum().backward()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e3]))
def test_sums_and_norms_of_factors_are_those_of_the_product(users, length, seed, size):
    rng = torch.Generator().manual_seed(seed)
    left, right = (size * torch.randn(users, length, n, generator=rng) for n in (7, 4))
    outer, scale = Outer(left, right), torch.randn(users, generator=rng)
    whole = torch.einsum("clo,cli->coi", left.double(), right.double())
    true = whole.flatten(1).square().sum(1)
    assert (outer.squares() >= true).all()  # a clip bounds nothing where a norm comes out too small
    torch.testing.assert_close(outer.squares(), true, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(norms(outer), true.sqrt(), rtol=1e-4, atol=1e-12)
    some = torch.arange(users)[::2]
    torch.testing.assert_close(outer[some].whole().double(), whole[some], rtol=1e-4, atol=1e-5 * size**2)
    summed = torch.einsum("c,coi->oi", scale.double(), whole)
    torch.testing.assert_close((outer * 3.0).weighted(scale).double(), 3 * summed, rtol=1e-4, atol=1e-4 * size**2)


def test_a_norm_is_never_too_small_where_positions_cancel():
    torch.manual_seed(1)
    left, right = torch.randn(50, 1, 32), torch.randn(50, 1, 16)
    left = torch.cat([left, -left * (1 + 1e-4 * torch.rand(50, 1, 1))], dim=1)
    outer = Outer(left, right.expand(-1, 2, -1).contiguous())
    true = torch.einsum("clo,cli->coi", left.double(), right.double().expand(-1, 2, -1)).flatten(1).square().sum(1)
    assert (outer.squares() >= true).all()
