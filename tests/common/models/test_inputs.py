"""What of an event is looked at beside its item: by hand, against the calendar, and what must not matter."""

import math
from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.models.encoder import encode
from common.models.inputs import Moments, embedded
from common.models.schema import InputConfig, ModelConfig
from common.models.shapes import ITEM_TABLE, parameter_shapes
from common.models.weights import body_size, initialise, named
from tests.support import world

INPUTS = {
    "behaviour": {"names": ("view", "cart", "buy")},
    "rating": {"low": 1.0, "high": 5.0},
    "hour": {},
    "weekday": {},
    "interval": {"buckets": 9},
}
VALUES = {"behaviour": 3, "rating": 2, "hour": 24, "weekday": 7, "interval": 9}
FACT = {"behaviour": "behaviours", "rating": "ratings", "hour": "times", "weekday": "times", "interval": "times"}
EACH = pytest.mark.parametrize("kind", INPUTS)
ENCODERS = pytest.mark.parametrize("encoder", ["attention", "gru-attention", "cnn-attention", "gru"])
DAY, NAN = 86_400, math.nan
LENGTHS = torch.tensor([7, 1, 4])
FACTS = {
    "times": torch.tensor(
        [
            [-DAY, -1, 0, 5, 5, 3600, 9 * DAY],
            [10**9] * 7,  # but for the first, padding
            [7, 4000, 10**6, 10**8, 0, 0, 0],
        ]
    ),
    "behaviours": torch.tensor([[0, 1, 2, 2, 0, 1, 0], [1] * 7, [2, 2, 1, 0, 0, 0, 0]]),
    "ratings": torch.tensor([[1, 5, 3, NAN, 2.5, 0, 9], [4] * 7, [NAN, 1.5, 5, 2, 0, 0, 0]]),
}
C, L = FACTS["times"].shape


def model(*kinds, **other):
    inputs = tuple({"kind": kind, **INPUTS[kind]} for kind in kinds)
    return ModelConfig(**{"dim": 8, "blocks": 2, "heads": 2, "max_length": 12, "dropout": 0.0, **other}, inputs=inputs)


def known(lengths=LENGTHS, **changed):
    return Moments(lengths=lengths, **(FACTS | changed))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tables(config, *company):
    shapes = {f"inputs.{each.kind}": (VALUES[each.kind], config.dim) for each in config.inputs}
    return {name: draw(*company, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def numbers(kind, times, **own):
    """Which vector each of one user's events has: the tables hold their places."""
    config = ModelConfig(dim=1, heads=1, inputs=({"kind": kind, **own},))
    table = torch.arange(float(own.get("buckets", VALUES[kind]))).unsqueeze(-1)
    moments = Moments(torch.tensor([times]), torch.tensor([len(times)]))
    return embedded(config, {f"inputs.{kind}": table}, moments)[0, :, 0].int().tolist()


def rated(*ratings, low=1.0, high=5.0):
    config = ModelConfig(dim=2, inputs=({"kind": "rating", "low": low, "high": high},))
    moments = Moments(torch.zeros(1, len(ratings)), torch.tensor([len(ratings)]), None, torch.tensor([ratings]))
    return embedded(config, {"inputs.rating": torch.tensor([[1.0, 0.0], [0.0, 10.0]])}, moments)[0].tolist()


def near(one, other, atol=2e-6):
    return torch.allclose(one, other, rtol=0, atol=atol)


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "hour", "weekday"),
    [
        (0, 0, 3),  # a Thursday
        (-1, 23, 2),
        (3599, 0, 3),
        (3600, 1, 3),
        (DAY, 0, 4),
        (-DAY, 0, 2),
        (-7 * DAY - 1, 23, 2),
        (1_709_251_199, 23, 3),  # the last second of 29 February 2024
        (1_709_251_200, 0, 4),
    ],
)
def test_hours_and_weekdays_by_hand(time, hour, weekday):
    assert numbers("hour", [time]) == [hour]
    assert numbers("weekday", [time]) == [weekday]


@given(st.lists(st.integers(-(6 * 10**10), 2 * 10**11), min_size=1, max_size=40))
def test_hours_and_weekdays_are_the_calendars(times):
    dates = [datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=time) for time in times]
    assert numbers("hour", times) == [date.hour for date in dates]
    assert numbers("weekday", times) == [date.weekday() for date in dates]


@pytest.mark.parametrize(
    ("times", "buckets"),
    [
        ([50], [0]),
        ([5, 5, 6, 8, 11, 17, 24, 38, 53], [0, 0, 1, 1, 2, 2, 3, 3, 4]),  # gaps 0 1 2 3 6 7 14 15
        ([9, 3, 4], [0, 0, 1]),  # back in time is no time
        ([0, 62, 62 + 63, 10**9], [0, 5, 6, 6]),  # of seven buckets the last has no end
    ],
)
def test_intervals_by_hand(times, buckets):
    assert numbers("interval", times, buckets=7) == buckets


def test_each_doubling_begins_at_its_second():
    """Where rounding would be seen: all at once, since long rows are computed otherwise than short ones."""
    gaps = [2**power + more for power in range(1, 40) for more in (-2, -1, 0)]
    times = [0]
    for gap in gaps:
        times += [times[-1] + gap, times[-1] + gap]
    wanted = [0, *(each for gap in gaps for each in ((gap + 1).bit_length() - 1, 0))]
    assert numbers("interval", times, buckets=64) == wanted


@given(st.lists(st.integers(-(10**10), 10**11), min_size=1, max_size=20), st.integers(1, 40))
def test_intervals_are_doublings(times, buckets):
    gaps = [max(0, b - a) for a, b in zip([times[0], *times], times, strict=False)]
    assert numbers("interval", times, buckets=buckets) == [min((1 + g).bit_length() - 1, buckets - 1) for g in gaps]


def test_ratings_by_hand():
    assert rated(1.0, 5.0, 3.0, 2.0) == [[1, 0], [0, 10], [0.5, 5], [0.75, 2.5]]
    assert rated(-7.0, 0.0, 5.5, 1e9, -math.inf, math.inf) == [[1, 0], [1, 0], [0, 10], [0, 10], [1, 0], [0, 10]]
    assert rated(NAN, 3.0) == [[0, 0], [0.5, 5]]
    assert rated(0.0, -0.5, low=-1.0, high=1.0) == [[0.5, 5], [0.75, 2.5]]


def test_behaviours_by_hand():
    table = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    config = ModelConfig(dim=2, inputs=({"kind": "behaviour", **INPUTS["behaviour"]},))
    assert embedded(config, {"inputs.behaviour": table}, known())[0].tolist() == table[[0, 1, 2, 2, 0, 1, 0]].tolist()


# --- company and sums ------------------------------------------------------------------------------------------------


def test_several_are_added_in_any_order():
    config = model(*INPUTS)
    parameters = tables(config)
    single = {kind: embedded(model(kind), parameters, known()) for kind in INPUTS}
    total = sum(single.values())
    assert near(embedded(config, parameters, known()), total)
    assert near(embedded(model(*reversed(INPUTS)), parameters, known()), total)


@EACH
def test_stacked_tables_are_shared_ones_of_each_user(kind):
    config = model(kind)
    (name, shared), *_ = tables(config).items()
    same = shared.expand(C, -1, -1)
    assert near(embedded(config, {name: same}, known()), embedded(config, {name: shared}, known()))
    ((_, apart),) = tables(config, C).items()
    found = embedded(config, {name: apart}, known())
    assert found.shape == (C, L, 8)
    for user in range(C):
        alone = Moments(**{each: part[user : user + 1] for each, part in known()._asdict().items()})
        assert near(found[user], embedded(config, {name: apart[user]}, alone)[0])


@pytest.mark.parametrize("place", [{}, {"position": "recency"}, {"encoder": "cnn-attention"}, {"encoder": "gru"}])
def test_they_are_added_to_items_and_positions(place):
    """Only √D tells an item's vector from another input's."""
    config, plain = (model(*kinds, **place) for kinds in (INPUTS, ()))
    body, x = world.weights(config, 3).body, draw(C, L, 8)
    parameters = named(config, body)
    moved = x + embedded(config, parameters, known()) / math.sqrt(8)
    expected = encode(plain, parameters, moved)
    assert near(encode(config, parameters, x, None, known()), expected)
    assert not near(encode(plain, parameters, x), expected, atol=1e-2)


@EACH
@ENCODERS
def test_what_comes_later_changes_nothing(kind, encoder):
    config, x = model(kind, encoder=encoder), draw(C, L, 8)
    parameters = named(config, world.weights(config, 3).body)
    before, touched = encode(config, parameters, x, None, known()), 0
    for t in range(L - 1):
        later = {name: part.clone() for name, part in FACTS.items()}
        later["times"][:, t + 1 :] += DAY + 12_345 + 10**6 * torch.arange(L - t - 1)  # another gap, hour and day
        later["behaviours"][:, t + 1 :] = (later["behaviours"][:, t + 1 :] + 1) % 3
        later["ratings"][:, t + 1 :] = torch.where(later["ratings"][:, t + 1 :].isnan(), 4.5, NAN)
        for lengths in (LENGTHS, LENGTHS.clamp(max=t + 1)):
            after = encode(config, parameters, x, None, known(lengths, **later))
            assert near(before[:, : t + 1], after[:, : t + 1])
        touched += not near(before[0, t + 1], after[0, t + 1], atol=1e-3)
    assert touched > 2


@EACH
def test_one_event_is_touched_by_one_change(kind):
    """An interval ends at an event and begins at the one before."""
    config = model(kind)
    parameters, changed = tables(config), FACTS[FACT[kind]].clone()
    changed[0, 2] = {"times": DAY - 10_000, "behaviours": 0, "ratings": 4.5}[FACT[kind]]
    gone = (embedded(config, parameters, known()) - embedded(config, parameters, known(**{FACT[kind]: changed}))) != 0
    places = [2, 3] if kind == "interval" else [2] if kind != "weekday" else []
    assert gone.any(-1).nonzero().tolist() == [[0, place] for place in places]


@EACH
def test_padding_is_no_matter(kind):
    config, x = model(kind), draw(C, L, 8)
    parameters = named(config, world.weights(config, 3).body)
    together = encode(config, parameters, x, None, known())
    padded = torch.arange(L) >= LENGTHS.unsqueeze(-1)
    noise = {"times": -(10**12), "behaviours": 2, "ratings": NAN}
    other = {name: part.masked_fill(padded, noise[name]) for name, part in FACTS.items()}
    elsewhere = encode(config, parameters, x.masked_fill(padded.unsqueeze(-1), 50.0), None, known(**other))
    assert elsewhere.isfinite().all()
    for user, n in enumerate(LENGTHS.tolist()):
        only = slice(user, user + 1)
        bare = {name: part[only, :n] for name, part in FACTS.items()}
        alone = encode(config, parameters, x[only, :n], None, Moments(lengths=LENGTHS[only], **bare))[0]
        assert near(together[user, :n], alone)
        assert near(elsewhere[user, :n], alone)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [*((kind,) for kind in INPUTS), tuple(INPUTS)], ids="+".join)
@pytest.mark.parametrize("encoder", ["attention", "gru"])
def test_gradients_are_finite_differences(kinds, encoder):
    """All numbers of the inputs' tables are moved at once, each in a stacked copy of the body."""
    config = model(*kinds, dim=4, blocks=1, max_length=L, encoder=encoder)
    body = world.weights(config, 1, seed=3).body.double()
    x, seen = draw(1, L, 4).double(), draw(L, 4, seed=1).double()
    one = {name: part[:1] for name, part in FACTS.items()}

    def score(body):  # (P,) or (N, P)
        n = 1 if body.dim() == 1 else len(body)
        here = Moments(lengths=LENGTHS[:1].expand(n), **{name: part.expand(n, -1) for name, part in one.items()})
        return (encode(config, named(config, body), x.expand(n, -1, -1), None, here) * seen).sum((1, 2))

    (gradient,) = torch.autograd.grad(score(body.requires_grad_()).sum(), body)
    marked = named(config, torch.arange(float(len(body))))
    places = torch.cat([part.flatten() for name, part in marked.items() if name.startswith("inputs.")]).long()
    with torch.no_grad():
        moves = 1e-5 * torch.eye(len(body)).double()[places]
        slopes = (score(body + moves) - score(body - moves)) / 2e-5
    assert gradient[places].abs().max() > 1e-2
    assert torch.allclose(slopes, gradient[places], rtol=1e-6, atol=1e-8)
    for name, part in named(config, gradient).items():
        if name in {"inputs.behaviour", "inputs.rating"}:
            assert part.any(1).all()
        elif name.startswith("inputs."):  # whatever hour never comes learns nothing
            assert 1 < part.any(1).sum() < len(part)


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [*((kind,) for kind in INPUTS), tuple(INPUTS), ("hour", "behaviour")])
@pytest.mark.parametrize("encoder", ["attention", "gru"])
def test_parameters_are_named_shaped_and_drawn_alike(kinds, encoder):
    config = model(*kinds, encoder=encoder)
    shapes = parameter_shapes(config, 5)
    own = {name: shape for name, shape in shapes.items() if name.startswith("inputs.")}
    assert own == {f"inputs.{kind}": (VALUES[kind], 8) for kind in kinds}
    assert list(own) == [f"inputs.{kind}" for kind in kinds]
    rest = {name: shape for name, shape in shapes.items() if name not in own}
    assert rest == parameter_shapes(model(encoder=encoder), 5)
    one, again, other = (initialise(config, 5, seed) for seed in (1, 1, 2))
    assert world.same(one, again)
    assert len(one.body) == body_size(config)
    drawn, others = named(config, one.body), named(config, other.body)
    assert list(drawn) == [name for name in shapes if name != ITEM_TABLE]
    for name in own:
        assert not torch.equal(drawn[name], others[name])
        assert drawn[name].unique().numel() == drawn[name].numel()
        assert drawn[name].abs().max() < 0.1
    if len(kinds) == len(INPUTS):
        assert torch.cat([drawn[name] for name in own]).std() == pytest.approx(0.02, rel=0.2)
    assert not config.plain


def test_a_lone_value_has_a_vector_that_is_drawn():
    config = ModelConfig(dim=8, inputs=({"kind": "behaviour", "names": ["buy"]}, {"kind": "interval", "buckets": 1}))
    parts = named(config, initialise(config, 3, 0).body)
    assert [tuple(parts[f"inputs.{kind}"].shape) for kind in ("behaviour", "interval")] == [(1, 8), (1, 8)]
    assert 0 < parts["inputs.behaviour"].abs().max() < 0.1


def test_each_kind_is_here():
    """Whoever adds an input has its claims tested."""
    kinds = {get_args(section.model_fields["kind"].annotation)[0] for section in get_args(get_args(InputConfig)[0])}
    assert kinds == set(INPUTS) == set(VALUES) == set(FACT)
    assert {kind for kind in INPUTS if model(kind).timed} == {"hour", "weekday", "interval"}


# --- what is refused -------------------------------------------------------------------------------------------------


@EACH
def test_one_kind_comes_once(kind):
    with pytest.raises(ValueError, match=f"input {kind} comes twice; name each kind once"):
        model("hour" if kind != "hour" else "weekday", kind, kind)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"kind": "minute"}, "inputs"),
        ({"kind": "behaviour"}, "names"),
        ({"kind": "behaviour", "names": []}, "names"),
        ({"kind": "interval", "buckets": 0}, "buckets"),
        ({"kind": "hour", "buckets": 3}, "buckets"),
        ({"kind": "rating", "low": 3, "high": 3}, "low"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(section, key):
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        ModelConfig(inputs=(section,))


@pytest.mark.parametrize("kind", ["behaviour", "rating"])
def test_what_is_not_known_is_refused(kind):
    config = model("hour", kind)
    with pytest.raises(ValueError, match=f"model.inputs {kind}: not known of these events"):
        embedded(config, tables(config), known(**{FACT[kind]: None}))


@EACH
def test_nothing_known_is_refused(kind):
    config = model(kind)
    with pytest.raises(ValueError, match="more of events than their items"):
        encode(config, named(config, world.weights(config, 3).body), draw(C, L, 8))
