import numpy as np
import pytest

from common.data import synthetic
from common.data.prepare import prepare
from common.data.sequences import Sequences
from common.data.synthetic import Law, generate
from common.sources import SyntheticData


def config(**options):
    defaults = {"users": 300, "items": 40, "interests": 4, "mean_length": 8, "max_length": 20}
    return SyntheticData(kind="synthetic", **{**defaults, **options})


def drawn(section):
    """All users' sequences as lists, and their causes."""
    items, causes = [], []
    for chunk in generate(section):
        cuts = np.cumsum(chunk.lengths)[:-1]
        items += [part.tolist() for part in np.split(chunk.items, cuts)]
        causes += [part.tolist() for part in np.split(chunk.causes, cuts)]
    return items, causes


def next_items(section, first, law):
    """Second events of the sequences that begin with `first`, against the exact law."""
    seconds = np.concatenate([[history[1]] for history in drawn(section)[0] if history[0] == first])
    scores = law.scores(np.array([[first]]), np.array([1]))[0]
    return np.bincount(seconds, minlength=section.items), scores / scores.sum()


@pytest.mark.parametrize("options", [{}, {"noise": 0.5, "follow": 0.3}, {"zipf": 0, "successors": 1}])
def test_frequencies_agree_with_the_law(options):
    """Chi-square of the second event, where rejection of the first one's repeat matters, too."""
    section = config(users=40_000, items=10, interests=2, mean_length=3, max_length=3, **options)
    law = Law.of(section)
    first = int(np.argmax(law.popularity))
    counts, law_says = next_items(section, first, law)
    expected = counts.sum() * law_says
    assert counts[first] == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 30  # 8 degrees of freedom: exceeded once in 5,000 seeds


def test_longer_histories_agree_with_the_law():
    """Calibration: found frequencies and likelihood of the sixth event are those that the law expects."""
    section = config(users=20_000, items=15, interests=3, mean_length=6, max_length=6, recency=0.8)
    # Who has used up an interest may end early; that hangs on the history alone, so the others still follow the law.
    histories = np.array([history for history in drawn(section)[0] if len(history) == 6])
    scores = Law.of(section).scores(histories[:, :5], np.full(len(histories), 5))
    scores /= scores.sum(axis=1, keepdims=True)
    target = histories[:, 5]
    mean = np.bincount(target, minlength=15) / len(target)
    np.testing.assert_allclose(mean, scores.mean(axis=0), atol=0.01)
    # Expected against found log-likelihood: equal only if the law is the exact one.
    entropy = -(scores * np.log(np.maximum(scores, 1e-300))).sum(axis=1).mean()
    assert -np.log(scores[np.arange(len(target)), target]).mean() == pytest.approx(entropy, abs=0.02)


def test_a_deterministic_law_is_followed():
    section = config(noise=0, follow=1, recency=1e-7, successors=3)
    law, (histories, causes) = Law.of(section), drawn(section)
    for history, cause in zip(histories, causes, strict=True):
        assert cause == [-1, *range(len(history) - 1)]
        for before, after in zip(history, history[1:], strict=False):
            assert after in law.successors[before]
    best = law.scores(np.array([history[:2] for history in histories]), np.full(len(histories), 2)).argsort(axis=1)
    assert all(history[2] in top[-3:] for history, top in zip(histories, best, strict=True) if len(history) > 2)


def test_causes():
    section = config(noise=0.3, recency=0.9)
    law, (histories, causes) = Law.of(section), drawn(section)
    noise = np.concatenate([np.array(cause[1:]) < 0 for cause in causes]).mean()
    assert 0.3 <= noise < 0.6  # more than 0.3: a caused draw is thrown away more often than one from all items
    for history, cause in zip(histories, causes, strict=True):
        assert cause[0] == -1
        for place, (item, origin) in enumerate(zip(history, cause, strict=True)):
            assert -1 <= origin < place or origin == -1
            if origin >= 0:
                assert law.interest[item] == law.interest[history[origin]]


def test_nothing_is_repeated_and_lengths_hold():
    histories, _ = drawn(config(users=2000, items=10, interests=2, mean_length=6, max_length=50))
    assert all(len(set(history)) == len(history) for history in histories)
    assert {len(history) for history in histories} == set(range(3, 11))


def test_a_law_that_runs_dry_ends_sequences():
    """One item per interest and no noise: nothing can follow the first event."""
    histories, _ = drawn(config(users=5, items=10, interests=10, noise=0, max_length=9))
    assert [len(history) for history in histories] == [1] * 5


@pytest.mark.parametrize(
    ("mean", "largest"), [(3, 3), (3, 50), (8, 8), (8, 9), (5.5, 8), (20, 100), (20, 25), (99.5, 100)]
)
def test_mean_length_holds_in_spite_of_the_cut(mean, largest):
    section = config(items=1000, mean_length=mean, max_length=largest)
    lengths = synthetic._lengths(section, 200_000, np.random.default_rng(0))
    assert lengths.mean() == pytest.approx(mean, rel=0.01)
    assert 3 <= lengths.min() <= lengths.max() <= largest


def test_times_rise_within_one_year():
    for chunk in generate(config()):
        for times in np.split(chunk.times, np.cumsum(chunk.lengths)[:-1]):
            assert (np.diff(times) > 0).all()
            assert 0 <= times[0] <= times[-1] < 365 * 24 * 3600


def test_same_seed_same_data():
    section = config()
    assert drawn(section) == drawn(section.model_copy())
    assert drawn(section)[0] != drawn(section.model_copy(update={"seed": 1}))[0]


def test_full_chunks_do_not_depend_on_the_number_of_users(monkeypatch):
    monkeypatch.setattr(synthetic, "CHUNK", 100)
    fewer, more = (drawn(config(users=users))[0] for users in (200, 350))
    assert fewer == more[:200]


def test_on_disk(monkeypatch):
    monkeypatch.setattr(synthetic, "CHUNK", 64)
    section = config(split="global-time")
    histories, causes = drawn(section)
    sequences = Sequences.open(prepare(section))
    assert len(sequences) == 300
    cuts = sequences.offsets[1:-1]
    assert [part.tolist() for part in np.split(sequences.items, cuts)] == histories
    assert [part.tolist() for part in np.split(sequences.optional("causes"), cuts)] == causes
    assert sequences.user_ids()[:2] == ["0", "1"]
    assert (sequences.test >= 0).mean() > 0.5


def test_the_best_ranker_beats_popularity():
    section = config(users=500, items=200, interests=10)
    sequences, law = Sequences.open(prepare(section)), Law.of(section)
    users = np.arange(len(sequences))
    stops, targets = sequences.stops(users, "test")
    histories, lengths = sequences.windows(users, stops, section.max_length)

    def hits(scores):
        return (scores >= scores[users, targets][:, None]).sum(axis=1) <= 10

    popular = np.tile(law.popularity, (len(users), 1))
    assert hits(law.scores(histories, lengths)).mean() > 2 * hits(popular).mean()
