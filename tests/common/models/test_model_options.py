"""Models without positions or a feed-forward layer, and where they start."""

import pytest
import torch

from common.models.attention import Setting, multi_head, recency_bias
from common.models.encoder import encode
from common.models.linear import layer_norm
from common.models.schema import ModelConfig, ScaledDotProduct
from common.models.shapes import parameter_shapes
from common.models.weights import initialise, named

D, L = 8, 6


def config(**options):
    return ModelConfig(dim=D, blocks=2, heads=2, dropout=0.0, max_length=L, **options)


def hidden(model, items=5, x=None):
    weights = initialise(model, items, 0)
    body = named(model, weights.body + 0.1 * torch.randn(len(weights.body), generator=torch.Generator().manual_seed(1)))
    return encode(model, body, torch.randn(3, L, D, generator=torch.Generator().manual_seed(2)) if x is None else x)


def test_what_is_left_away_has_no_parameters():
    names = parameter_shapes(config(ffn=0, position="recency"), 5)
    assert list(names)[:2] == ["item", "blocks.0.norm1.weight"]
    assert not [name for name in names if any(part in name for part in ("position", "norm2", "up", "down"))]
    assert set(names) < set(parameter_shapes(config(), 5))


@pytest.mark.parametrize("options", [{"ffn": 0}, {"position": "recency"}, {"ffn": 0, "position": "recency"}])
def test_the_future_does_not_matter(options):
    model, x = config(**options), torch.randn(3, L, D)
    changed = x.clone()
    changed[:, 4:] += torch.randn(3, L - 4, D)
    one, two = hidden(model, x=x), hidden(model, x=changed)
    assert torch.equal(one[:, :4], two[:, :4])
    assert not torch.allclose(one[:, 4:], two[:, 4:])


def test_attention_falls_with_every_event_between():
    slope, value = 0.5, torch.randn(1, 4, D)
    qkv = torch.cat([torch.zeros(1, 4, 2 * D), value], dim=-1)  # nothing but recency decides
    found = multi_head(qkv, 2, Setting(ScaledDotProduct(), {}, recency_bias(4, slope)))[0, 3]
    weights = torch.softmax(torch.tensor([-3.0, -2.0, -1.0, 0.0]) * slope, 0)
    assert torch.allclose(found, weights @ value[0], atol=1e-6)


def test_without_positions_only_distances_count():
    """The last hidden state of a history is the same wherever in the window it begins, once nothing lies before it."""
    model = config(position="recency")
    x = torch.randn(1, 3, D)
    assert torch.allclose(hidden(model, x=x)[0, 2], hidden(model, x=torch.cat([x, torch.zeros(1, 2, D)], 1))[0, 2])
    assert not torch.allclose(hidden(model, x=x)[0, 2], hidden(model, x=x.flip(1))[0, 2])


def test_a_start_at_the_mean_passes_the_mean_of_the_past_on():
    model = ModelConfig(
        dim=D, blocks=1, ffn=0, position="recency", recency=1e-6, start="mean", dropout=0.0, max_length=L
    )
    x = torch.randn(2, L, D)
    found = encode(model, named(model, initialise(model, 5, 0).body), x)
    one, zero = torch.ones(D), torch.zeros(D)
    past = layer_norm(x * D**0.5, one, zero).cumsum(1) / torch.arange(1, L + 1).view(-1, 1)
    wanted = layer_norm(x * D**0.5 + past, one, zero)
    near = (found - wanted).norm() / wanted.norm()
    usual = config(ffn=0, position="recency", recency=1e-6)
    far = (encode(usual, named(usual, initialise(usual, 5, 0).body), x) - wanted).norm() / wanted.norm()
    assert near < 0.05 < far
