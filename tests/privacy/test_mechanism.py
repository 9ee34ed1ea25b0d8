"""The clip and the noise: the bound holds whatever the numbers, and the noise is what the account assumes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from client.cohort import train
from common.privacy.mechanism import add_noise, clip_factors, noised_histogram, norms
from common.privacy.noise import Reproducible, Secure, noise_source
from tests.privacy import private
from tests.support import records, world

SLACK = 1e-6
RNGS = ["reproducible", "secure"]
WIDE = {"dim": 32}  # so that there are about 15,000 numbers to look at
ITEMS = 300


def clipped(parts, bound):
    """Each of C updates multiplied with its factor, flat, in double precision; and the factors."""
    factors = clip_factors(norms(*parts), bound)
    flat = torch.cat([part.double().flatten(1) for part in parts if part.numel()], dim=1)
    return torch.where(factors[:, None] == 0, 0.0, flat * factors.float().double()[:, None]), factors


# --- the clip, alone -------------------------------------------------------------------------------------------------


def test_norms_and_factors_by_hand():
    parts = torch.tensor([[3.0], [0.0], [0.3]]), torch.tensor([[[4.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.4]]])
    torch.testing.assert_close(norms(*parts), torch.tensor([5.0, 0.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(
        clip_factors(norms(*parts), 1.0), torch.tensor([0.2, 1.0, 1.0], dtype=torch.float64), rtol=2e-6, atol=0
    )


def test_one_flat_clip_over_all_parts():
    """Not part by part: each part is within the bound, and the whole is not."""
    parts = torch.full((1, 3), 0.5), torch.full((1, 2, 3), 0.3)
    assert all(float(norms(part)) < 1 for part in parts)
    whole, factors = clipped(parts, 1.0)
    assert float(factors[0]) < 1
    assert float(whole.norm()) == pytest.approx(1, abs=3e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", [0, 1])
def test_an_update_that_is_not_finite_is_worth_nothing_and_the_others_stay(value, part):
    parts = [torch.ones(3, 4), torch.ones(3, 2, 5)]
    parts[part][1].view(-1)[-1] = value
    _, factors = clipped(parts, 10.0)
    assert factors.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("parts", [[(2, 0)], [(2, 0, 4)], [(2, 0), (2, 0, 3)], [(0, 3)], [(2, 3), (2, 0, 4)]])
def test_empty_parts(parts):
    made = [torch.ones(shape) for shape in parts]
    found = norms(*made)
    assert found.shape == (parts[0][0],)
    filled = float(sum(part[0].numel() for part in made)) if parts[0][0] else 0.0
    assert found.tolist() == pytest.approx([filled**0.5] * parts[0][0])
    assert (clip_factors(found, 3.0) == 1).all()


@pytest.mark.parametrize("huge", [1e18, 1e20, 1e30, 3e38])
def test_huge_numbers_do_not_pass(huge):
    whole, factors = clipped([torch.tensor([[huge, 1.0], [0.1, 0.1]]), torch.zeros(2, 1, 1)], 1.0)
    assert float(whole[0].norm()) <= 1 + SLACK
    assert float(factors[1]) == 1


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 1e30, -1e30, 1.0, 1e-3])


@given(
    st.integers(1, 4).flatmap(
        lambda c: st.tuples(
            arrays(np.float32, st.tuples(st.just(c), st.integers(1, 6)), elements=numbers),
            arrays(np.float32, st.tuples(st.just(c), st.integers(0, 3), st.integers(1, 5)), elements=numbers),
        )
    ),
    st.sampled_from([1e-3, 0.5, 1.0, 250.0]),
)
def test_no_update_passes_the_bound(parts, bound):
    tensors = [torch.from_numpy(part) for part in parts]
    whole, factors = clipped(tensors, bound)
    assert float(whole.norm(dim=1).max()) <= bound * (1 + SLACK)
    exact = torch.cat([part.double().flatten(1) for part in tensors], dim=1)
    for numbers_, factor in zip(exact, factors.tolist(), strict=True):
        if not torch.isfinite(numbers_).all():
            assert factor == 0
        elif float(numbers_.norm()) <= bound * (1 - 2e-6):
            assert factor == 1
        elif float(numbers_.abs().max()) < 1e18:  # beyond, single precision has no squares, and nothing may be left
            assert float((numbers_ * factor).norm()) >= bound * (1 - 3e-6)


@pytest.mark.parametrize("shape", [(5, 40, 8), (5, 8, 40), (3, 1, 7), (3, 7, 1), (2, 300, 64)])
def test_norms_of_transposed_parts(shape):
    """As a gradient of ``x @ w.T`` lies in memory: same numbers, same norm."""
    drawn = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    turned = drawn.mT.contiguous().mT
    assert turned.is_contiguous() == (1 in shape[1:])
    exact = drawn.double().flatten(1).norm(dim=1)
    beside = torch.ones(shape[0], 3)
    for part in (drawn, turned, drawn.mT):
        torch.testing.assert_close(norms(part), exact, rtol=3e-7, atol=0)
        torch.testing.assert_close(norms(beside, part), (exact**2 + 3).sqrt(), rtol=3e-7, atol=0)


def test_many_small_numbers_beside_large_ones_count():
    """Single precision alone would lose them; a table is measured row by row."""
    part = torch.full((1, 4000, 64), 2e-4)
    part[0, 0] = 1.0
    assert float(norms(part)) == pytest.approx(float(part.double().norm()), rel=2e-7)


# --- the clip, on the device -----------------------------------------------------------------------------------------

HISTORIES = world.random_histories([1, 2, 4, 6, 9, 11, 14, 20], 20)
USERS = np.arange(len(HISTORIES))
DATA = world.sequences(HISTORIES, held_out=False)
LOCALS = {"one step": {"steps": 1}, "three steps": {"steps": 3, "prox": 0.3}, "epochs": {"epochs": 2}}
EACH = pytest.mark.parametrize(
    ("loss", "local"), [pytest.param(a, b, id=f"{a}-{b}") for a in world.LOSSES for b in LOCALS]
)


def setup(loss, local):
    experiment = private.experiment(
        loss=world.LOSSES[loss],
        model={"dropout": 0.2, "max_length": 11},
        federation={"local": {"lr": 0.3, **LOCALS[local]}},
    )
    return experiment, world.weights(experiment.model, 20)


def updates(experiment, weights, clip, users=USERS):
    """Each user's update, norm before the clip, and the chunks that they came in."""
    chunks = list(train(experiment, weights, DATA, users, 3, clip))
    found = {int(u): (chunk.one(i), float(chunk.norms[i])) for chunk in chunks for i, u in enumerate(chunk.users)}
    return found, chunks


@EACH
def test_a_device_clips_the_whole_update_to_the_bound(loss, local):
    experiment, weights = setup(loss, local)
    plain, _ = updates(experiment, weights, None)
    lengths = {user: private.norm(update) for user, (update, _) in plain.items()}
    moved = sorted(length for length in lengths.values() if length > 0)
    assert len(moved) >= len(USERS) - 2  # one has no target, one perhaps no negative that it may be told from
    for bound in (moved[0] / 2, moved[len(moved) // 2] * 1.001, 2 * moved[-1]):
        found, _ = updates(experiment, weights, bound)
        assert found.keys() == plain.keys()
        for user, (update, measured) in found.items():
            assert private.norm(update) <= bound * (1 + SLACK)
            assert measured == pytest.approx(lengths[user], rel=1e-6)
            scale = min(1.0, bound / lengths[user]) if lengths[user] else 1.0
            gap = np.abs(private.flat(update) - scale * private.flat(plain[user][0])).max()
            assert gap <= 1e-5 * max(bound, 1e-3)
            if scale == 1:  # what is short enough stays as it was
                assert gap <= 2e-6 * max(lengths[user], 1e-3)


@EACH
def test_a_clipped_user_is_the_same_alone_and_in_company(loss, local):
    experiment, weights = setup(loss, local)
    together, _ = updates(experiment, weights, 0.05)
    for user in USERS.tolist():
        alone, _ = updates(experiment, weights, 0.05, np.array([user]))
        assert world.gap(alone[user][0], together[user][0]) < SLACK


@EACH
@pytest.mark.parametrize("importance", ["everybody", "some"])
def test_the_sum_is_that_of_the_clipped_updates(loss, local, importance):
    experiment, weights = setup(loss, local)
    _, chunks = updates(experiment, weights, 0.05)
    for chunk in chunks:
        each = np.ones(len(chunk), dtype=np.float32)
        if importance == "some":
            each = np.arange(len(chunk)).astype(np.float32) / 2
        total = records.dense(*chunk.summed(each), 20)
        expected = records.added(chunk, each, 20) if each.any() else [0 * part for part in total]
        assert max(float((a - b).abs().max()) for a, b in zip(total, expected, strict=True)) < SLACK


def test_a_broken_user_is_not_sound_and_leaves_the_others_as_they_are(monkeypatch):
    experiment, weights = setup("sampled-softmax", "one step")
    whole, _ = updates(experiment, weights, 0.05)
    from client import step

    keep, bits, seen = step.keep_mask, step.uniform_bits, []
    monkeypatch.setattr(step, "uniform_bits", lambda *given: seen.append(given[3]) or bits(*given))

    def poisoned(drawn, share):
        mask = keep(drawn, share)
        mask[np.asarray(seen.pop()) == 4] = np.nan
        return mask

    monkeypatch.setattr(step, "keep_mask", poisoned)
    found, chunks = updates(experiment, weights, 0.05)
    sound = {int(user): bool(ok) for chunk in chunks for user, ok in zip(chunk.users, chunk.sound, strict=True)}
    assert [user for user, ok in sound.items() if not ok] == [4]
    for user in set(found) - {4}:
        assert world.gap(found[user][0], whole[user][0]) == 0


# --- noise: its scale ------------------------------------------------------------------------------------------------


def noise_of(experiment, population=10, replies=(), round_=1, curator=None):
    """What an empty round releases, flat."""
    curator = curator or private.curator(experiment, population, ITEMS)
    update, _ = curator.mean(round_, list(replies), private.zeros(experiment, ITEMS))
    return private.flat(update)


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize(("z", "bound", "cohort"), [(1.0, 1.0, 5), (0.3, 0.02, 2), (4.0, 7.0, 10)])
def test_noise_has_the_promised_scale(rng, z, bound, cohort):
    experiment = private.experiment(
        model=WIDE, privacy={"noise_multiplier": z, "clipping_norm": bound, "rng": rng}, federation={"cohort": cohort}
    )
    noise, std = noise_of(experiment), z * bound / cohort  # cohort is qN
    n, sigmas = len(noise), 4 if rng == "reproducible" else 6  # of what differs each time, no false alarm
    assert n > 10_000
    assert abs(noise.std() / std - 1) < sigmas / np.sqrt(2 * n)
    assert abs(noise.mean() / std) < sigmas / np.sqrt(n)
    assert private.fits(noise, std) > 1e-6
    assert private.fits(noise, std * 2 / 3) < 1e-9
    assert private.fits(noise, std * 3 / 2) < 1e-9


def test_noise_of_table_and_body_is_the_same_and_independent():
    experiment = private.experiment(model=WIDE)
    update, _ = private.curator(experiment, 10, ITEMS).mean(1, [], private.zeros(experiment, ITEMS))
    table, body = (part.double().numpy() for part in update)
    assert private.fits(table.ravel(), 0.2) > 1e-6
    assert private.fits(body, 0.2) > 1e-6
    for other in (body[: table.size], table.ravel()[1 : len(body) + 1]):
        assert abs(np.corrcoef(table.ravel()[: len(other)], other)[0, 1]) < 5 / np.sqrt(len(other))


def test_noise_for_a_hypothetical_population_is_smaller():
    experiment = private.experiment(model=WIDE, privacy={"population": 1000})
    noise = noise_of(experiment)
    assert private.fits(noise, 0.2 / 100) > 1e-6


def test_without_noise_an_empty_round_releases_nothing():
    assert not noise_of(private.experiment(privacy={"noise_multiplier": 0.0})).any()


def test_noise_is_added_to_the_sum_and_to_nothing_else():
    experiment = private.experiment()
    weights = private.zeros(experiment)
    total = type(weights)(*(part + 3 for part in weights))
    before = private.flat(total)
    source = Reproducible(1)
    drawn = source.normal(len(before), "update-noise", 4, 0)
    found = add_noise(total, 0.5, source, "update-noise", 4, 0)
    np.testing.assert_allclose(private.flat(found), before + 0.5 * drawn, atol=1e-6)
    np.testing.assert_array_equal(private.flat(total), before)
    assert [(part.shape, part.dtype) for part in found] == [(part.shape, part.dtype) for part in total]


# --- noise: never twice the same -------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """All noise that anybody draws, by its purpose."""
    found = []
    for kind in (Reproducible, Secure):

        def note(self, n, purpose, *keys, normal=kind.normal):
            numbers = normal(self, n, purpose, *keys)
            found.append((purpose, numbers.copy()))
            return numbers

        monkeypatch.setattr(kind, "normal", note)
    return found


@pytest.mark.parametrize("rng", RNGS)
def test_no_noise_is_drawn_twice(rng, drawn, tmp_path):
    """Over rounds, parameters, kinds of release, rounds that are run again, and a process that takes over."""
    experiment = private.experiment(
        privacy={"rng": rng, "adaptive": {}}, evaluation={"privacy": "noised"}, federation={"cohort": 5}
    )
    ranks = np.array([1.0, 2, 7, np.nan])
    curator = private.curator(experiment, folder=tmp_path)
    for round_ in (1, 2, 3, 2):  # the last one again, as after a crash of the checkpoint only
        noise_of(experiment, curator=curator, round_=round_)
        curator.figures(ranks, 4, round_, [10])
    resumed = private.curator(experiment, folder=tmp_path)
    for round_ in (3, 4):
        noise_of(experiment, curator=resumed, round_=round_)
        resumed.figures(ranks, 4, round_, [10])
    assert {purpose for purpose, _ in drawn} == {"update-noise", "count-noise", "metrics-noise"}
    values = np.concatenate([numbers for _, numbers in drawn])
    assert len(values) > 10_000
    assert len(np.unique(values)) == len(values)
    assert len(np.unique(np.abs(values))) == len(values)


def test_reproducible_noise_depends_on_seed_purpose_and_every_key():
    keys = [(0, "a", 1, 0), (1, "a", 1, 0), (0, "b", 1, 0), (0, "a", 2, 0), (0, "a", 1, 1), (0, "a", 1)]
    values = [Reproducible(seed).normal(50, purpose, *key) for seed, purpose, *key in keys]
    assert len(np.unique(values)) == 50 * len(keys)
    np.testing.assert_array_equal(values[0], Reproducible(0).normal(50, "a", 1, 0))


def test_secure_noise_follows_no_seed():
    experiment = private.experiment(privacy={"rng": "secure"})
    one, other = (noise_of(experiment, curator=private.curator(experiment, 10, ITEMS)) for _ in range(2))
    assert (one == other).mean() < 0.01  # two floats may be equal by chance
    assert abs(np.corrcoef(one, other)[0, 1]) < 6 / np.sqrt(len(one))
    plain = private.experiment()
    one, other = (noise_of(plain, curator=private.curator(plain, 10, ITEMS)) for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_secure_is_what_an_experiment_gets_unless_it_says_otherwise():
    sections = {"kind": "user-level", "noise_multiplier": 1.0}
    federation = {"sampling": "poisson", "weighting": "uniform"}
    experiment = world.experiment(privacy=sections, federation=federation)
    assert not noise_source(experiment.privacy.rng, 0).reproducible
    assert isinstance(private.curator(experiment)._noise._source, Secure)
    assert noise_source("reproducible", 0).reproducible


# --- noise: on everything --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rng", RNGS)
def test_all_rows_move_whoever_takes_part(rng):
    """Of a user who touches two rows, of one who touches none, and of nobody."""
    experiment = private.experiment(privacy={"rng": rng})
    dim = experiment.model.dim
    zero = np.zeros((0, dim), dtype=np.float32), private.numbers(experiment, 1, 1.0, [])[1]
    cohorts = {
        "nobody": [],
        "two rows": [private.message(3, *private.numbers(experiment, 1, 5.0, [2, 9]), [2, 9])],
        "no row": [private.message(3, *zero, [])],
        "refused beside a good one": [
            private.message(3, *private.numbers(experiment, 1, 5.0, [2, 9]), [2, 9]),
            world.answer(4, error="no"),
        ],
    }
    for name, messages in cohorts.items():
        moved = private.released(experiment, messages)
        assert all((part != 0).all() for part in moved), name
        assert private.fits(moved.table[10:].flatten().double().numpy(), 0.2) > 1e-6, name


def test_without_noise_the_support_would_tell():
    """So the test above can fail."""
    experiment = private.experiment(privacy={"noise_multiplier": 0.0})
    moved = private.released(experiment, [private.message(3, *private.numbers(experiment, 1, 5.0, [2, 9]), [2, 9])])
    assert np.flatnonzero(moved.table.abs().sum(1)).tolist() == [2, 9]


# --- the histogram of ranks ------------------------------------------------------------------------------------------


def test_a_histogram_by_hand():
    edges, counts = noised_histogram(np.array([1, 1, 2.5, 4, 5, np.nan, 20]), 3, 20, 0.0, Reproducible(0), 1, 0)
    assert edges.tolist() == [1, 2, 3, 6, 12, 20]
    assert counts.tolist() == [2, 0, 1, 2, 0, 1]


@given(
    st.lists(st.none() | st.integers(2, 40).map(lambda twice: twice / 2), min_size=1, max_size=8), st.integers(1, 30)
)
def test_one_user_moves_a_histogram_by_one(ranks, exact):
    full = np.array([np.nan if rank is None else rank for rank in ranks])
    whole = noised_histogram(full, exact, 20, 0.0, Reproducible(0))[1]
    assert whole.sum() == np.isfinite(full).sum()
    for user in range(len(full)):
        absent = noised_histogram(np.delete(full, user), exact, 20, 0.0, Reproducible(0))[1]
        assert np.linalg.norm(whole - absent) <= 1


def test_every_count_is_noised():
    released = [
        noised_histogram(np.full(3, np.nan), 10, 3000, 30.0, Reproducible(0), round_)[1] for round_ in range(60)
    ]
    assert private.fits(np.ravel(released), 30.0) > 1e-6
    assert private.fits(np.ravel(released), 20.0) < 1e-4


# --- where noise comes from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Secure(), Reproducible(3)], ids=["secure", "reproducible"])
def test_draws_are_standard_normal(source):
    n = 200_001
    values = source.normal(n, "test", 1)
    assert values.shape == (n,)
    assert values.dtype == np.float64
    assert abs(values.mean()) < 6 / np.sqrt(n)
    assert abs(values.std() - 1) < 6 / np.sqrt(2 * n)
    assert abs(stats.kurtosis(values)) < 6 * np.sqrt(24 / n)
    assert private.fits(values, 1.0) > 1e-6
    assert private.fits(values, 1.05) < 1e-9
    assert 3.5 < np.abs(values).max() < 7
    half = n // 2  # sines and cosines of the same radii, and neighbours
    for one, other in ((values[:half], values[half + 1 :]), (values[:-1], values[1:])):
        for power in (1, 2):
            assert abs(np.corrcoef(one**power, other**power)[0, 1]) < 6 / np.sqrt(half)
    assert len(np.unique(values)) == n


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_draws(n):
    assert Secure().normal(n, "test").shape == (n,)
    assert np.isfinite(Secure().normal(n, "test")).all()


def test_entropy_at_its_ends_gives_finite_noise(monkeypatch):
    """All bits 0 or all 1: the logarithm's argument is neither 0 nor more than 1."""
    for byte in (b"\x00", b"\xff"):
        monkeypatch.setattr("os.urandom", lambda n, byte=byte: byte * n)
        assert np.isfinite(Secure().normal(4, "test")).all()


def test_secret_choices_follow_no_key():
    first, second = (Secure().choices("test", 1).integers(2**62, size=4) for _ in range(2))
    assert not np.intersect1d(first, second).size
    assert np.array_equal(*(Reproducible(1).choices("test", 1).integers(2**62, size=4) for _ in range(2)))
