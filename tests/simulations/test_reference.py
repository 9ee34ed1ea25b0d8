"""Every encoder, attention and head a second time: alike in what they compute, and in what training makes of them."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.loading import parse
from common.models import attention, encoder, fronts, mixing, scoring, sparse
from common.models.encoder import Moments, dropout_sites, encode
from common.models.mixing import interval_buckets
from common.models.schema import ModelConfig, TimeAware
from common.models.scoring import history, score_all, score_each, score_last
from common.models.shapes import parameter_shapes
from common.models.weights import named
from simulations import certify, reference
from simulations.reference import SASRec
from tests.support import world
from tests.support.certifying import few

ITEMS, LONGEST, ROUNDS = 15, 9, 5
LENGTHS = torch.tensor([9, 1, 5, 9])
MODELS = {
    "plain": {},
    "dot-product": {"attention": {"kind": "dot-product"}},
    "additive": {"attention": {"kind": "additive"}},
    "time-aware": {"attention": {"kind": "time-aware", "buckets": 60}},
    "time-aware-linear": {"attention": {"kind": "time-aware", "buckets": 5, "scale": "linear"}},
    "local": {"attention": {"kind": "local", "window": 3}},
    "top-k": {"attention": {"kind": "top-k", "k": 3}},
    "entmax": {"attention": {"kind": "entmax-1.5"}},
    "linear": {"attention": {"kind": "linear"}},
    "gru-attention": {"encoder": "gru-attention"},
    "cnn-attention": {"encoder": "cnn-attention", "kernel": 4},
    "gru": {"encoder": "gru"},
    "target": {"head": "target"},
    "gru-target": {"encoder": "gru", "head": "target"},
    "everything": {"encoder": "cnn-attention", "attention": {"kind": "time-aware"}, "head": "target"},
    **{
        f"{kind}-recency": {"position": "recency", "attention": {"kind": kind}}
        for kind in ("dot-product", "additive", "time-aware", "top-k", "entmax-1.5")
    },
    "mean-without-ffn": {"start": "mean", "ffn": 0, "encoder": "gru-attention"},
}
EACH = pytest.mark.parametrize("model", MODELS)
LOSSES = pytest.mark.parametrize("loss", ["softmax", "sampled-softmax"])


def config_of(model):
    tiny = {"dim": 8, "blocks": 2, "heads": 2, "max_length": LONGEST, "dropout": 0.3}
    return ModelConfig.model_validate(tiny | MODELS[model])


def pair(model, scale=0.3):
    """Configuration, weights, parameters by name, and the reference with the same."""
    config = config_of(model)
    weights = world.weights(config, ITEMS, scale=scale)
    parameters = named(config, weights.body)
    other = SASRec(config, ITEMS)
    other.load_named({"item": weights.table, **parameters})
    return config, weights, parameters, other


def histories(seed=0):
    rng = np.random.default_rng(seed)
    items = torch.from_numpy(rng.integers(ITEMS, size=(len(LENGTHS), LONGEST)))
    gaps = rng.choice([0, 1, 7, 60, 86400, 10**7], size=items.shape)
    times = torch.from_numpy(10**9 + gaps.cumsum(1))
    real = torch.arange(LONGEST) < LENGTHS.unsqueeze(-1)
    return items.where(real, 0), times.where(real, 3), real


# --- one forward pass ------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("dropped", [False, True])
def test_hidden_states_are_those_of_the_federated_model(model, dropped):
    config, weights, parameters, other = pair(model)
    items, times, real = histories()
    masks = torch.rand(len(items), LONGEST, dropout_sites(config), config.dim) if dropped else None
    assert other.sites == dropout_sites(config)
    wanted = encode(config, parameters, weights.table[items], masks, Moments(times, LENGTHS))
    found = other(items, masks, {"times": times})
    assert (found - wanted)[real].abs().max() < 1e-5
    assert wanted[real].std() > 0.1


@EACH
def test_scores_are_those_of_the_federated_model(model):
    config, weights, parameters, other = pair(model)
    items, times, real = histories()
    hidden = encode(config, parameters, weights.table[items], None, Moments(times, LENGTHS))
    past = history(config, parameters, hidden)
    following, some = weights.table[items.roll(-1, 1)], weights.table[2:9]
    assert (other.score_all(hidden, real, some) - score_all(past, some)[real]).abs().max() < 1e-5
    assert (other.score_each(hidden, real, following) - score_each(past, following)[real]).abs().max() < 1e-5
    wanted = score_last(past, LENGTHS, weights.table)
    for user, length in enumerate(LENGTHS):
        assert (other.score_last(hidden[user, :length], weights.table) - wanted[user]).abs().max() < 1e-5


@EACH
def test_names_and_shapes_are_those_of_the_schema(model):
    config, weights, parameters, other = pair(model)
    found = other.named()
    assert {name: tuple(value.shape) for name, value in found.items()} == parameter_shapes(config, ITEMS)
    assert all(torch.equal(found[name], value) for name, value in parameters.items())
    assert torch.equal(found["item"], weights.table)


@pytest.mark.parametrize("model", ["gru", "cnn-attention", "additive", "time-aware", "target"])
def test_a_missing_weight_is_no_silent_default(model):
    config, weights, parameters, _ = pair(model)
    own = parameters.keys() - named(config_of("plain"), world.weights(config_of("plain"), ITEMS).body).keys()
    assert own
    for name in own:
        rest = {"item": weights.table} | {each: value for each, value in parameters.items() if each != name}
        with pytest.raises(RuntimeError, match="Missing key"):
            SASRec(config, ITEMS).load_named(rest)


# --- its own parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize("buckets", [1, 5, 28, 64, 200])
def test_buckets_are_exact_where_intervals_are_next_to_powers_of_two(scale, buckets):
    """Where a logarithm that is rounded could fall on either side."""
    ends = [0, 1] + [2**n + less for n in range(2, 34) for less in (-2, -1, 0)]
    times = torch.tensor([ends])
    kind = TimeAware(kind="time-aware", buckets=buckets, scale=scale)
    wanted = interval_buckets(times, torch.tensor([len(ends)]), buckets, scale)
    assert torch.equal(reference.intervals(times, kind), wanted)


def test_buckets_by_hand():
    kind = TimeAware(kind="time-aware", buckets=9, scale="linear")
    found = reference.intervals(torch.tensor([[5, 5, 11, 14, 40]]), kind)
    assert found.tolist() == [[[0] * 5, [0] * 5, [1, 1, 0, 0, 0], [3, 3, 1, 0, 0], [8, 8, 8, 8, 0]]]


def test_entmax_by_hand_and_its_gradient():
    """Of two scores a < 2 apart the weights are (√(2 − a²) ± a)² / 4, with a halved difference."""
    scores = torch.tensor([[0.7, 0.0, -torch.inf], [3.0, 0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    weights = reference.entmax(scores)
    half = 0.35
    root = (2 - half**2) ** 0.5
    assert weights[0].tolist() == pytest.approx([(root + half) ** 2 / 4, (root - half) ** 2 / 4, 0])
    assert weights.sum(-1).tolist() == pytest.approx([1, 1])
    shifted = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.entmax, shifted)


def test_it_knows_nothing_of_the_federated_model():
    """What it may share is the schema."""
    tree = ast.parse(Path(reference.__file__).read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in names if name.split(".")[0] in {"client", "common", "server", "simulations"}}
    assert ours == {"common.models.schema", "simulations.reference_items"}  # which has a test of its own


# --- the certificate -------------------------------------------------------------------------------------------------

TEXT = """
name: tiny
data: {kind: synthetic, users: 40, items: 30, interests: 4, mean_length: 9, max_length: 30}
model: {dim: 8, blocks: 1, heads: 2, dropout: 0.2, max_length: 11}
loss: {kind: sampled-softmax, negatives: 7}
federation: {cohort: 20, optimizer: {kind: fedadam, lr: 0.003}}
"""
SGD = "weights after one step of plain SGD: federated = centralised"
ADAM = f"weights after {ROUNDS} rounds: federated = centralised"


def certified(monkeypatch, model, loss="sampled-softmax"):
    """The certificate's checks of a tiny experiment in few rounds, without Ray, by name."""
    few(monkeypatch, ROUNDS, 10)
    overrides = [f"model.{name}={json.dumps(value)}" for name, value in MODELS[model].items()]
    checks = certify.certify(parse(TEXT, overrides=[*overrides, f"loss={{kind: {loss}}}"]))
    return {check.name: check for check in checks}


@LOSSES
@EACH
def test_the_certificate_holds(model, loss, monkeypatch):
    """Between engines a recurrence adds to what several steps of a tiny model make of rounding."""
    checks = certified(monkeypatch, model, loss)
    assert [name for name, check in checks.items() if name.endswith("centralised") and not check.passed] == []
    assert max(check.measured for name, check in checks.items() if "update" in name and check.bound) < 1e-5


# --- planted bugs ----------------------------------------------------------------------------------------------------


def replaced(kind, other):
    return lambda monkeypatch: monkeypatch.setitem(attention.MECHANISMS, kind, other)


def patched(module, name, other):
    return lambda monkeypatch: monkeypatch.setattr(module, name, other(getattr(module, name)))


BUGS = {
    "dot-product": replaced("dot-product", lambda q, k, v, s: mixing.scaled_dot_product(q, k, v, s.bias)),
    "additive": replaced("additive", lambda q, k, v, s: mixing.additive(q, k, v, -s.own["vector"], s.bias)),
    "additive-recency": replaced("additive", lambda q, k, v, s: mixing.additive(q, k, v, s.own["vector"])),
    "time-aware": patched(encoder, "interval_buckets", lambda whole: lambda t, n, b, _: whole(t, n, b, "linear")),
    "local": replaced("local", lambda q, k, v, s: sparse.local(q, k, v, s.config.window + 1)),
    "top-k": replaced("top-k", lambda q, k, v, s: sparse.top_k(q, k, v, s.config.k + 1, s.bias)),
    "entmax": replaced("entmax-1.5", lambda q, k, v, s: mixing.scaled_dot_product(q, k, v, s.bias)),
    "linear": replaced("linear", lambda q, k, v, s: mixing.linear_attention(k, q, v)),
    "gru": patched(fronts, "recurrent", lambda whole: lambda x, *weights: whole(x.roll(1, 1), *weights)),
    "gru-attention": patched(fronts, "recurrent", lambda whole: lambda x, w, b, a, c: whole(x, w, b, -a, c)),
    "cnn-attention": patched(fronts, "convolved", lambda whole: lambda x, w, b, k: whole(x.roll(-1, 1), w, b, k)),
    "target": patched(scoring, "target_scores", lambda whole: lambda k, v, q, c: whole(v, v, q, c)),
}


@pytest.mark.parametrize("model", BUGS)
def test_a_bug_in_a_mechanism_is_seen(model, monkeypatch):
    """All engines have it, so no comparison of theirs would tell."""
    BUGS[model](monkeypatch)
    checks = certified(monkeypatch, model)
    assert not (checks[SGD].passed and checks[ADAM].passed)
    for name, check in checks.items():
        assert check.passed or not name.startswith(("each update", "mean update"))
