"""Every kind of encoder, attention and head: causality, padding, company, gradients, torch's own layers, the schema."""

import math
from itertools import product
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.models import sparse
from common.models.attention import MECHANISMS
from common.models.encoder import Moments, dropout_sites, encode
from common.models.fronts import convolved, recurrent
from common.models.schema import AttentionConfig, ModelConfig
from common.models.scoring import history, score_all, score_each, score_last
from common.models.shapes import ITEM_TABLE, parameter_shapes
from common.models.weights import body_size, initialise, named
from tests.support import world
from tests.support.kinds import ATTENTION, ENCODERS

HEADS = "dot-product", "target"
CONFIGS = [
    pytest.param({**kind, "heads": heads}, id=f"{name}-{heads}")
    for (name, kind), heads in product(ENCODERS.items(), (1, 2))
]
EACH = pytest.mark.parametrize("kind", CONFIGS)
EACH_HEAD = pytest.mark.parametrize("head", HEADS)
C, L = 4, 9
LENGTHS = torch.tensor([9, 1, 4, 6])
TIMES = 10**9 + torch.tensor(
    [
        [0, 0, 5, 5, 60, 4000, 4001, 90_000, 90_000],
        [7] * 9,  # but for the first, padding
        [3, 10**7, 10**7 + 1, 2 * 10**7, 0, 0, 0, 0, 0],
        [0, 60, 120, 120, 180, 10**6, 5, 4, 3],
    ]
)


@pytest.fixture(autouse=True)
def _blocks_shorter_than_histories(monkeypatch):
    """Local attention folds longer ones into blocks, and masks the others."""
    monkeypatch.setattr(sparse, "BLOCK", 4)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def model(kind, **other):
    return ModelConfig(**{"dim": 8, "blocks": 2, "max_length": 12, "dropout": 0.0, **kind, **other})


def states(config, x, masks=None, times=TIMES, lengths=LENGTHS, body=None):
    body = world.weights(config, 1).body if body is None else body
    return encode(config, named(config, body.to(x.dtype)), x, masks, Moments(times, lengths))


def near(one, other):
    return torch.allclose(one, other, rtol=0, atol=2e-6)


# --- what must not matter --------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("masked", [False, True])
def test_what_comes_later_changes_nothing(kind, masked):
    config, x = model(kind), draw(C, L, 8)
    masks = 2 * (draw(C, L, dropout_sites(config), 8, seed=1) > 0).float() if masked else None
    before = states(config, x, masks)
    for t in range(L - 1):
        other, times, lengths = x.clone(), TIMES.clone(), LENGTHS.clamp(max=t + 1)
        other[:, t + 1 :] = 10 * draw(C, L - t - 1, 8, seed=t)
        times[:, t + 1 :] = times[:, t : t + 1] + torch.arange(L - t - 1) // 2  # a smaller unit, and ties
        for n in (lengths, LENGTHS):
            after = states(config, other, masks, times, n)
            real = torch.arange(L) < lengths.unsqueeze(-1)
            assert near(before[real], after[real])
        assert not near(before[0, t + 1 :], after[0, t + 1 :])


@EACH
def test_times_matter_to_time_aware_attention_alone(kind):
    config, x = model(kind), draw(C, L, 8)
    changed = TIMES.clone()
    changed[0, 3] += 50
    before, after = states(config, x), states(config, x, times=changed)
    assert near(before[0], after[0]) == (config.attention.kind != "time-aware")
    assert near(before[0, :3], after[0, :3])
    assert near(before[1:], after[1:])


@EACH
def test_neither_padding_nor_company_matters(kind):
    config, x = model(kind), draw(C, L, 8)
    masks = 2 * (draw(C, 12, dropout_sites(config), 8, seed=1) > 0).float()
    together = states(config, x, masks[:, :L])
    longer = states(
        config,
        torch.cat([x, 100 * draw(C, 3, 8, seed=2)], dim=1),
        masks,
        torch.cat([TIMES, torch.zeros(C, 3, dtype=torch.int64)], dim=1),
    )
    bodies = torch.stack([world.weights(config, 1, seed).body for seed in range(C)])
    stacked = states(config, x, masks[:, :L], body=bodies)
    for user, n in enumerate(LENGTHS.tolist()):
        only = slice(user, user + 1)
        bare = states(config, x[only, :n], masks[only, :n], TIMES[only, :n], LENGTHS[only])[0]
        assert near(together[user, :n], bare)
        assert near(longer[user, :n], bare)
        alone = states(config, x[only, :n], masks[only, :n], TIMES[only, :n], LENGTHS[only], bodies[user])[0]
        assert near(stacked[user, :n], alone)
        assert near(alone, bare) == (user == 0)


@EACH
def test_masks_drop_at_each_site(kind):
    config, x = model(kind), draw(C, L, 8)
    whole = states(config, x)
    assert near(states(config, x, torch.ones(C, L, dropout_sites(config), 8)), whole)
    for site in range(dropout_sites(config)):
        masks = torch.ones(C, L, dropout_sites(config), 8)
        masks[:, :, site] = 0
        assert (states(config, x, masks) - whole).abs().max() > 1e-2


# --- gradients and scores --------------------------------------------------------------------------------------------


@EACH
@EACH_HEAD
def test_gradients_are_finite_differences(kind, head):
    """All parameters are moved at once, each in a stacked copy of its own."""
    config = model(kind, head=head, dim=4, blocks=1, max_length=6)
    table, body = (part.double() for part in world.weights(config, 5, seed=3))
    items, targets, times = torch.tensor([[0, 3, 1, 4, 0]]), torch.tensor([[3, 1, 4, 0, 2]]), TIMES[3:, :5]

    def losses(table, body):  # (N, I, D) and (N, P) or (P,)
        n = len(table)
        parameters, events = named(config, body), table[:, items[0]]
        hidden = encode(config, parameters, events, None, Moments(times.expand(n, -1), torch.full((n,), 5)))
        past, came = history(config, parameters, hidden), table[:, targets[0]]
        scored = score_all(past, table)
        entropy = F.cross_entropy(scored.mT, targets.expand(n, -1), reduction="none").sum(-1)
        return entropy + F.softplus(-score_each(past, came)).sum(-1)

    leaves = [table.requires_grad_(), body.requires_grad_()]
    gradients = torch.autograd.grad(losses(table[None], body)[0], leaves)
    with torch.no_grad():
        flat = torch.cat([table.flatten(), body])
        moves = 1e-6 * torch.eye(len(flat)).double()
        moved = flat + torch.cat([moves, -moves])
        up, down = losses(moved[:, : table.numel()].view(-1, 5, 4), moved[:, table.numel() :]).chunk(2)
        slopes = (up - down) / 2e-6
    expected = torch.cat([part.flatten() for part in gradients])
    assert expected.abs().max() > 0.1
    assert torch.allclose(slopes, expected, rtol=1e-6, atol=1e-8)


@EACH
@EACH_HEAD
def test_an_items_score_is_the_same_in_all_ways(kind, head):
    config, x = model(kind, head=head), draw(C, L, 8)
    table, body = world.weights(config, 11)
    past = history(config, named(config, body), states(config, x, body=body))
    scored = score_all(past, table)
    assert scored.shape == (C, L, 11)
    assert near(score_all(past, table.expand(C, -1, -1)), scored)
    assert near(score_last(past, LENGTHS, table), scored[torch.arange(C), LENGTHS - 1])
    asked = torch.randint(11, (C, L), generator=torch.Generator().manual_seed(1))
    each = score_each(past, table[asked])
    assert near(each, scored.gather(-1, asked.unsqueeze(-1)).squeeze(-1))


def test_scores_are_the_same_in_all_ways_where_logits_are_bounded():
    """Item vectors so long that target attention's logits pass their bound."""
    config = model({"head": "target", "heads": 2})
    table, body = world.weights(config, 11)
    table = 100 * table
    past = history(config, named(config, body), states(config, draw(C, L, 8), body=body))
    scored = score_all(past, table)
    for item in range(11):
        each = score_each(past, table[item].expand(C, L, -1))
        assert torch.allclose(each, scored[..., item], rtol=1e-4, atol=1e-2)


# --- parameters ------------------------------------------------------------------------------------------------------


@EACH
@EACH_HEAD
def test_parameters_are_named_shaped_and_drawn_alike(kind, head):
    config = model(kind, head=head)
    shapes = parameter_shapes(config, 7)
    one, again, other = (initialise(config, 7, seed) for seed in (1, 1, 2))
    assert shapes.pop(ITEM_TABLE) == one.table.shape == (7, 8)
    parts = named(config, one.body)
    assert {name: tuple(part.shape) for name, part in parts.items()} == shapes
    assert list(parts) == list(shapes)
    assert len(one.body) == body_size(config) == sum(map(math.prod, shapes.values()))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    for name, part in parts.items():
        drawn = part.dim() > 1
        assert drawn == (not torch.equal(part, named(config, other.body)[name]))
        assert part.isfinite().all()
        assert drawn or part.unique().tolist() == [0.0 if name.endswith("bias") else 1.0]
    assert any("front" in name for name in shapes) == (config.encoder != "attention")
    assert any("target" in name for name in shapes) == (head == "target")


def test_each_mechanism_is_here():
    """Whoever adds a mechanism has its claims tested."""
    kinds = {get_args(section.model_fields["kind"].annotation)[0] for section in get_args(get_args(AttentionConfig)[0])}
    assert kinds == set(MECHANISMS) == set(ATTENTION)
    fields = ModelConfig.model_fields
    encoders = {kind.get("encoder", "attention") for kind in ENCODERS.values()}
    assert encoders == set(get_args(fields["encoder"].annotation))
    assert set(HEADS) == set(get_args(fields["head"].annotation))


# --- against torch's own layers --------------------------------------------------------------------------------------


def layers(make, users):
    """Torch's own, one for each user, with weights that are nowhere special."""
    torch.manual_seed(0)
    return [make() for _ in range(users)]


@pytest.mark.parametrize("users", [1, C])
def test_the_recurrent_layer_is_torchs(users):
    theirs = layers(lambda: nn.GRU(8, 8, batch_first=True), users)
    names = "weight_ih_l0", "bias_ih_l0", "weight_hh_l0", "bias_hh_l0"
    x = draw(C, L, 8)
    with torch.no_grad():
        each = [torch.stack([getattr(gru, name) for gru in theirs]) for name in names]
        found = recurrent(x, *(part[0] for part in each) if users == 1 else each)
        for user in range(C):
            assert near(found[user], theirs[user % users](x[user : user + 1])[0][0])


@pytest.mark.parametrize("users", [1, C])
@pytest.mark.parametrize("kernel", [1, 2, 3, L + 2])
def test_the_convolution_is_torchs(users, kernel):
    theirs = layers(lambda: nn.Conv1d(8, 8, kernel), users)
    x = draw(C, L, 8)
    with torch.no_grad():
        weight = torch.stack([conv.weight.permute(0, 2, 1).flatten(1) for conv in theirs])
        bias = torch.stack([conv.bias for conv in theirs])
        found = convolved(x, *((weight[0], bias[0]) if users == 1 else (weight, bias)), kernel)
        for user in range(C):
            padded = F.pad(x[user].T, (kernel - 1, 0))
            assert near(found[user], F.gelu(theirs[user % users](padded)).T)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS)
def test_recency_needs_scores_to_bias(kind):
    config = {**ENCODERS[kind], "position": "recency"}
    if kind in {"local", "linear", "gru"}:
        with pytest.raises(ValueError, match=f"position recency .* {kind}.* position learned"):
            model(config)
    else:
        assert "position" not in parameter_shapes(model(config), 3)


def test_recency_is_no_matter_for_attention_that_a_gru_does_not_have():
    with pytest.raises(ValueError, match=r"position recency .* gru"):
        model({"encoder": "gru", "position": "recency", "attention": {"kind": "additive"}})
    assert not model({"encoder": "gru"}).timed


@pytest.mark.parametrize("kind", [*ENCODERS, "target"])
@pytest.mark.parametrize("curator", [False, True])
def test_examples_are_protected_in_the_plain_model_only(kind, curator):
    device = {"kind": "example-level", "noise_multiplier": 1.0, "segment": 4}
    server = {"kind": "user-level", "noise_multiplier": 1.0, "on_device": device}
    sections = {
        "model": ENCODERS.get(kind, {"head": "target"}),
        "federation": {"weighting": "uniform", "sampling": "poisson"},
        "privacy": server if curator else device,
        "evaluation": {"privacy": "unaccounted"},
    }
    if kind == "scaled-dot-product":
        assert world.experiment(**sections).model.plain
    else:
        with pytest.raises(ValueError, match=r"privacy\.kind example-level takes the plain model"):
            world.experiment(**sections)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"encoder": "gru", "attention": {"kind": "top-k"}}, "attention"),
        ({"encoder": "gru", "head": "target", "attention": {"kind": "linear"}}, "attention"),
        ({"encoder": "gru", "start": "mean"}, "start"),
        ({"kernel": 5}, "kernel"),
        ({"encoder": "gru-attention", "kernel": 5}, "kernel"),
        ({"recency": 0.3}, "recency"),
        ({"own_dropout": 0.3}, "own_dropout"),
        ({"items": "features", "own_dropout": 0.3}, "own_dropout"),
        ({"fusion": "gate"}, "fusion"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(section, key):
    with pytest.raises(ValueError, match=rf"Value error, {key} is for .*; take that, or leave {key} away"):
        model(section)
    model({**section, key: ModelConfig.model_fields[key].default})


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"attention": {"kind": "flash"}}, "attention"),
        ({"attention": {"kind": "top-k", "k": 0}}, "k"),
        ({"attention": {"kind": "local", "window": 0}}, "window"),
        ({"attention": {"kind": "time-aware", "buckets": 0}}, "buckets"),
        ({"attention": {"kind": "time-aware", "scale": "root"}}, "scale"),
        ({"attention": {"kind": "linear", "window": 3}}, "window"),
        ({"encoder": "lstm"}, "encoder"),
        ({"encoder": "cnn-attention", "kernel": 0}, "kernel"),
        ({"head": "cosine"}, "head"),
        ({"heads": 3}, "heads"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(section, key):
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        model(section)
