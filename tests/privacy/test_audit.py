"""The white-box audit of Andrew et al. (ICLR 2024, arXiv 2302.03098), on the real aggregation; and bugs put into it.

Canaries are users whose updates are Gaussian directions, far too long, so that each is clipped to exactly C. Who knows
all other users subtracts their sum from a release; what is left is C · taken + N(0, (zC)²) along a canary's direction.
Half of the canaries take part in a round, the others are the control group.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import brentq
from scipy.special import log_ndtr

from common.models.weights import Weights
from common.privacy.accounting import Event, epsilon
from common.seeding import generator
from server import curator as curators
from server.curator import PrivateCurator
from tests.privacy import private

DIM, ITEMS, BOUND, DELTA = 32, 600, 0.7, 1e-5
LIGHT, HEAVY = 1, 50
"""Events of either kind of user."""
ROUNDS = 4
TOLERANCE = 0.2


class Audit(NamedTuple):
    """What an adversary finds out, beside what it may."""

    epsilon: float
    """Of the accountant."""
    estimate: float
    """From all canaries together."""
    worst: float
    """From those of one kind, the worse one."""
    lower: float
    """95 % lower bound, over both kinds."""
    slopes: list[float]
    """What a canary contributes over C, in large rounds and in a small one; in standard errors from 1."""
    noise: list[float]
    """Standard deviation of the noise in each round over what it should be; in standard errors from 1."""
    repeats: float
    """Largest correlation of two rounds' noise, in standard errors from 0."""
    support: list[float]
    """Share of all coordinates that move in a round of one user who touches few items, and in one of nobody."""

    def faults(self):
        """Names of the checks that fail."""
        found = {
            "epsilon": self.lower > self.epsilon,
            "estimate": self.worst > (1 + TOLERANCE) * self.epsilon,
            "scale": any(abs(slope) > 5 for slope in self.slopes),
            "noise": any(abs(scale) > 5 for scale in self.noise),
            "repeats": abs(self.repeats) > 6,
            "support": min(self.support) < 1,
        }
        return {name for name, failed in found.items() if failed}


@lru_cache(maxsize=1)
def canaries(k, seed, size):
    """Updates ``(k, size)``, each from its own seed, of norms around √size; and these norms."""
    raw = np.empty((k, size), dtype=np.float32)
    for i, row in enumerate(raw):
        generator(seed, "canary", i).standard_normal(dtype=np.float32, out=row)
    return raw, np.sqrt(np.einsum("kd,kd->k", raw, raw, dtype=np.float64))


def gaussian_epsilon(ratio):
    """ε of a Gaussian release that moves by `ratio` standard deviations (Balle & Wang, ICML 2018, theorem 8)."""
    if not ratio > 0.01:
        return 0.0
    if ratio > 1000:
        return ratio**2 / 2

    def excess(eps):
        return math.exp(log_ndtr(ratio / 2 - eps / ratio)) - math.exp(eps + log_ndtr(-ratio / 2 - eps / ratio)) - DELTA

    return brentq(excess, 0, ratio**2 / 2 + 10 * ratio) if excess(0) > 0 else 0.0


def found_by(treated, control, level=None):
    """ε from the two groups' numbers: as they are or, with a level, no more than it is with that confidence."""
    gap, spread = treated.mean() - control.mean(), control.std(ddof=1)
    if level is not None:
        gap -= stats.norm.isf(level) * math.sqrt(treated.var(ddof=1) / len(treated) + spread**2 / len(control))
        spread *= math.sqrt((len(control) - 1) / stats.chi2.ppf(level, len(control) - 1))
    return gaussian_epsilon(gap / spread)


def audit(z, k=1000, seed=0, way="curator"):
    """Audit whatever stands behind the real curator or strategy just now.

    Parameters
    ----------
    z : float
        Noise multiplier that is promised.
    k : int
        Canaries.
    seed : int
        Of canaries, of who takes part, and of the experiment.
    way : str
        By ``curator``, update by update, or by ``strategy``, with replies as they come over a network.
    """
    experiment = private.experiment(
        seed=seed,
        model={"dim": DIM},
        privacy={"noise_multiplier": z, "clipping_norm": BOUND},
        federation={"cohort": k // 2},
    )
    made = private.strategy(experiment, k, ITEMS)
    shape = made.weights.table.shape
    size = sum(part.numel() for part in made.weights)
    raw, norms = canaries(k, seed, size)
    rng = np.random.default_rng(seed)
    heavy = rng.permutation(k) % 2 == 0
    sparse = np.zeros((2, DIM), dtype=np.float32) + 9, np.zeros(size - shape.numel(), dtype=np.float32), [3, 77]

    def release(round_, updates):
        """The released sum: what is divided by qN times it, flat."""
        if way == "strategy":
            before = Weights(*(part.clone() for part in made.weights))
            messages = [
                private.message(user, *update, round_=round_, events=HEAVY if heavy[user] else LIGHT)
                for user, *update in updates
            ]
            made.aggregate_train(round_, messages)
            change = Weights(*(part - old for part, old in zip(made.weights, before, strict=True)))
        else:
            replies = [
                private.reply(user, *update)._replace(events=HEAVY if heavy[user] else LIGHT)
                for user, *update in updates
            ]
            change, _ = made.curator.mean(round_, replies, made.weights)
        return private.flat(change) * (k // 2)

    def left_over(round_, members):
        """The release without what the members should have given."""
        updates = [
            (user, raw[user, : shape.numel()].reshape(shape), raw[user, shape.numel() :]) for user in members.tolist()
        ]
        given = np.zeros(k, dtype=np.float32)
        given[members] = BOUND / norms[members]
        return release(round_, updates) - given @ raw

    residuals, found, slopes = [], [], []
    for round_, share in enumerate([2] * ROUNDS + [8], 1):
        members = np.sort(rng.choice(k, k // share, replace=False))
        taken = np.isin(np.arange(k), members)
        residuals.append(left_over(round_, members))
        along = raw @ residuals[-1].astype(np.float32) / norms + BOUND * taken
        gap, error = along[taken].mean() / BOUND - 1, max(z, 1e-3) / math.sqrt(taken.sum())
        slopes.append(gap / error)
        if share == 2:
            found.append((along, taken))
    stat, taken = (np.concatenate(parts) for parts in zip(*found, strict=True))
    kinds = [np.tile(heavy == kind, ROUNDS) & taken for kind in (False, True)]
    stds = np.array([residual.std() for residual in residuals]) / (max(z, 1e-9) * BOUND)
    correlations = np.corrcoef(residuals)[np.triu_indices(len(residuals), 1)]
    moved = [(release(ROUNDS + 2, [(0, *sparse)]) != 0).mean(), (release(ROUNDS + 3, []) != 0).mean()]
    if way == "strategy":
        moved = [float(share > 0.9999) for share in moved]  # what is less than a weight's last digit does not move it
    return Audit(
        epsilon([Event(z)], DELTA),
        found_by(stat[taken], stat[~taken]),
        max(found_by(stat[kind], stat[~taken]) for kind in kinds),
        max(found_by(stat[kind], stat[~taken], 0.05 / 4) for kind in kinds),  # two kinds, a mean and a spread each
        slopes,
        ((stds - 1) * math.sqrt(2 * size)).tolist() if z else [0.0],
        float(correlations[np.abs(correlations).argmax()] * math.sqrt(size)) if z else 0.0,
        moved if z else [1.0],
    )


# --- as it is --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("seed", "way"), [(0, "curator"), (1, "strategy")])
def test_the_audit_finds_what_the_accountant_says(z, seed, way):
    found = audit(z, seed=seed, way=way)
    assert found.faults() == set(), found
    assert found.estimate == pytest.approx(found.epsilon, rel=TOLERANCE)
    assert 0.5 * found.epsilon < found.lower <= found.epsilon  # not by saying nothing


@pytest.mark.parametrize("way", ["curator", "strategy"])
def test_without_noise_the_audit_sees_everything(way):
    found = audit(0.0, way=way)
    assert found.epsilon == math.inf
    assert found.estimate > 100
    assert found.lower > 100
    assert not {"scale", "noise"} & found.faults()


def test_the_estimate_by_hand():
    """ε of one Gaussian release from numbers that are drawn, not released."""
    rng = np.random.default_rng(0)
    for z in (0.5, 1.0, 2.0):
        treated, control = rng.normal(1, z, 20_000), rng.normal(0, z, 20_000)
        exact = epsilon([Event(z)], DELTA)
        assert gaussian_epsilon(1 / z) == pytest.approx(exact, rel=2e-3)
        assert found_by(treated, control) == pytest.approx(exact, rel=0.05)
        assert found_by(treated, control, 0.0125) < exact
    assert found_by(control, control) == 0
    assert gaussian_epsilon(1e5) > 1e9


@pytest.mark.parametrize("z", [0.5, 2.0])
def test_the_lower_bound_keeps_its_confidence(z):
    """Of 400 audits of numbers that are drawn, no more than one in twenty may say too much."""
    rng, exact = np.random.default_rng(1), gaussian_epsilon(1 / z)
    groups = [[rng.normal(1, z, 500), rng.normal(1, z, 500), rng.normal(0, z, 1000)] for _ in range(400)]
    bounds = [max(found_by(kind, control, 0.05 / 4) for kind in kinds) for *kinds, control in groups]
    assert np.mean(np.array(bounds) > exact) < 0.05
    assert np.median(bounds) > 0.7 * exact


# --- with bugs -------------------------------------------------------------------------------------------------------


def halved(monkeypatch):
    add = curators.add_noise
    monkeypatch.setattr(curators, "add_noise", lambda total, std, *rest: add(total, std / 2, *rest))


def unclipped(monkeypatch):
    monkeypatch.setattr(curators, "clip_factors", lambda norms, bound: torch.ones_like(norms))


def clipped_late(monkeypatch):
    """A bound of the squared norm: a slip of the pen rather than of the mind."""
    clip = curators.clip_factors
    monkeypatch.setattr(curators, "clip_factors", lambda norms, bound: clip(norms, bound).sqrt())


def clipped_by_part(monkeypatch):
    """Table and body each to the bound, as Flower's per-layer clipping would."""
    add = curators.weighted_sum

    def each(replies, factors, weights):
        parts = []
        for reply in replies:
            scaled = []
            for part in reply.update[:2]:
                factor = curators.clip_factors(curators.norms(torch.from_numpy(part.reshape(1, -1))), BOUND)
                scaled.append(part * np.float32(factor))
            parts.append(reply._replace(update=reply.update._replace(table=scaled[0], body=scaled[1])))
        return add(parts, np.ones_like(factors), weights)

    monkeypatch.setattr(curators, "weighted_sum", each)


def repeated(monkeypatch):
    """One key for all rounds."""
    add = curators.add_noise
    monkeypatch.setattr(
        curators, "add_noise", lambda total, std, source, purpose, *keys: add(total, std, source, purpose)
    )


def repeated_body(monkeypatch):
    """One key for all rounds, of a fifth of the numbers only."""
    add = curators.add_noise

    def noised(total, std, source, purpose, *keys):
        fresh, same = (add(total, std, source, purpose, *key) for key in (keys, ()))
        return Weights(fresh.table, same.body)

    monkeypatch.setattr(curators, "add_noise", noised)


def touched_rows(monkeypatch):
    add = curators.add_noise

    def noised(total, *rest):
        found, touched = add(total, *rest), total.table.abs().sum(1, keepdim=True) > 0
        return Weights(torch.where(touched, found.table, total.table), found.body)

    monkeypatch.setattr(curators, "add_noise", noised)


def by_events(monkeypatch):
    factors = PrivateCurator._factors

    def weighed(self, replies, bound):
        return factors(self, replies, bound) * np.array([reply.events for reply in replies], dtype=np.float32)

    monkeypatch.setattr(PrivateCurator, "_factors", weighed)


def by_share_of_events(monkeypatch):
    """As Flower weighs: the average user counts one, so that the mean looks right."""
    factors = PrivateCurator._factors

    def weighed(self, replies, bound):
        events = np.array([reply.events for reply in replies], dtype=np.float32)
        return factors(self, replies, bound) * events / max(1, events.sum()) * len(replies)

    monkeypatch.setattr(PrivateCurator, "_factors", weighed)


def realised(monkeypatch):
    add, divide, came = curators.weighted_sum, curators.mean_of, []
    monkeypatch.setattr(
        curators, "weighted_sum", lambda replies, *rest: came.append(len(replies)) or add(replies, *rest)
    )
    monkeypatch.setattr(curators, "mean_of", lambda total, weight: divide(total, max(1.0, came[-1])))


def silent_when_empty(monkeypatch):
    mean = PrivateCurator.mean

    def skipping(self, round_, replies, weights):
        if replies:
            return mean(self, round_, replies, weights)
        return Weights(*(torch.zeros_like(part) for part in weights)), {}

    monkeypatch.setattr(PrivateCurator, "mean", skipping)


BUGS = {
    unclipped: {"estimate", "epsilon", "scale"},
    clipped_late: {"estimate", "epsilon", "scale"},
    clipped_by_part: {"estimate", "epsilon", "scale"},
    halved: {"estimate", "epsilon", "noise"},
    repeated: {"repeats"},
    repeated_body: {"repeats"},
    touched_rows: {"support"},
    by_events: {"estimate", "epsilon", "scale"},
    by_share_of_events: {"estimate", "epsilon"},
    realised: {"scale", "noise"},
    silent_when_empty: {"support"},
}


@pytest.mark.parametrize(("bug", "signs"), BUGS.items(), ids=[bug.__name__ for bug in BUGS])
def test_a_bug_is_caught(bug, signs, monkeypatch):
    assert audit(1.0, k=400).faults() == set()
    bug(monkeypatch)
    found = audit(1.0, k=400)
    assert signs <= found.faults(), found


@pytest.mark.parametrize("bug", [unclipped, halved, by_events])
def test_a_bug_is_caught_in_the_strategy_too(bug, monkeypatch):
    bug(monkeypatch)
    found = audit(2.0, k=400, way="strategy")
    assert found.lower > found.epsilon
    assert found.worst > 1.5 * found.epsilon


def test_noise_that_repeats_can_be_taken_away(monkeypatch):
    """Two rounds that differ by one user: their difference is that user's update, to the last digit."""
    experiment = private.experiment(model={"dim": DIM})
    update = private.numbers(experiment, 1, 0.5, items=ITEMS)

    def difference():
        made, weights = private.curator(experiment, 10, ITEMS), private.zeros(experiment, ITEMS)
        with_user, without = (
            made.mean(round_, r, weights)[0] for round_, r in ((1, [private.reply(3, *update)]), (2, []))
        )
        return (private.flat(with_user) - private.flat(without)) * 5 - np.concatenate([part.ravel() for part in update])

    assert np.linalg.norm(difference()) > 100
    repeated(monkeypatch)
    assert np.linalg.norm(difference()) < 1e-3
