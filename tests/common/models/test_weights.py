"""Two tensors and the names inside them."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models.schema import ModelConfig
from common.models.shapes import ITEM_TABLE, parameter_shapes
from common.models.weights import Weights, body_shapes, body_size, initialise, named

SMALL = ModelConfig(dim=2, blocks=1, max_length=3)
CONFIGS = st.builds(
    lambda heads, width, **rest: ModelConfig(heads=heads, dim=heads * width, **rest),
    heads=st.integers(1, 3),
    width=st.integers(1, 3),
    blocks=st.integers(1, 3),
    ffn=st.integers(1, 3),
    max_length=st.integers(1, 5),
)


def test_sizes_by_hand():
    # position 3·2; norms 4 + 4; qkv 6·2; out, up and down 2·2 + 2 each; the last norm 4
    assert body_size(SMALL) == 6 + 8 + 12 + 3 * 6 + 4
    assert list(body_shapes(SMALL))[:4] == [
        "position",
        "blocks.0.norm1.weight",
        "blocks.0.norm1.bias",
        "blocks.0.qkv.weight",
    ]
    assert body_shapes(SMALL)["blocks.0.qkv.weight"] == (6, 2)


def test_views_by_hand():
    body = torch.arange(48.0)
    parts = named(SMALL, body)
    assert parts["position"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert parts["blocks.0.norm1.bias"].tolist() == [8, 9]
    assert parts["norm.bias"].tolist() == [46, 47]
    parts["norm.bias"][0] = -1  # a view, not a copy
    assert body[46] == -1


@given(CONFIGS, st.sampled_from([(), (1,), (3,)]))
def test_round_trip(config, company):
    body = torch.arange(prod(company) * body_size(config)).view(*company, -1)
    parts = named(config, body)
    assert {ITEM_TABLE: (9, config.dim)} | {n: tuple(p.shape[len(company) :]) for n, p in parts.items()} == (
        parameter_shapes(config, 9)
    )
    assert list(parts) == list(body_shapes(config))
    assert torch.equal(torch.cat([part.reshape(*company, -1) for part in parts.values()], dim=-1), body)


@settings(max_examples=20)
@given(CONFIGS, st.integers(0, 2**20))
def test_gradients_of_a_stacked_body_are_those_of_each(config, seed):
    generator = torch.Generator().manual_seed(seed)
    bodies = torch.randn(3, body_size(config), generator=generator, requires_grad=True)
    pull = {name: torch.randn(shape, generator=generator) for name, shape in body_shapes(config).items()}
    (stacked,) = torch.autograd.grad(sum((p.sin() * pull[n]).sum() for n, p in named(config, bodies).items()), bodies)
    for body, gradient in zip(bodies, stacked, strict=True):
        (alone,) = torch.autograd.grad(sum((p.sin() * pull[n]).sum() for n, p in named(config, body).items()), body)
        assert torch.allclose(alone, gradient)


def test_fresh_weights():
    config = ModelConfig(dim=32, max_length=20)
    weights = initialise(config, 500, seed=1)
    assert isinstance(weights, Weights)
    assert weights.table.shape == (500, 32)
    assert weights.body.shape == (body_size(config),)
    assert weights.table.dtype == weights.body.dtype == torch.float32
    assert float(weights.table.std()) == pytest.approx(0.02, rel=0.05)
    for name, part in named(config, weights.body).items():
        if name.endswith("bias"):
            assert not part.any()
        elif part.dim() == 1:
            assert torch.equal(part, torch.ones_like(part))
        else:
            assert float(part.std()) == pytest.approx(0.02, rel=0.15)


def test_the_seed_alone_decides():
    first, again, other = (initialise(SMALL, 5, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.table, other.table)
    assert not torch.equal(first.body, other.body)
