"""The server's side of a privacy mode: who takes part, what may be released, and what it costs.

`Curator` is the null object: everything is as it is. `PrivateCurator` is the trusted curator of user-level differential
privacy (McMahan et al., ICLR 2018): Poisson sampling, a flat clip, weight 1, an unweighted sum, noise on every
coordinate, in empty rounds too, and division by the fixed qN, never by the realised cohort.
"""

from functools import cached_property
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.config import Experiment
from common.errors import StateError
from common.metrics import from_histogram, point
from common.models.weights import Weights
from common.privacy.card import card
from common.privacy.mechanism import add_noise, clip_factors, noised_histogram, norms
from common.privacy.noise import Ahead, noise_source
from common.privacy.plan import public_users, settle
from common.privacy.schema import UserLevel, on_device
from server.aggregation import Explicit, Reply, norms_of, weigh, weighted_sum
from server.ledger import RANKING, UPDATE, Ledger
from server.optimizers import mean_of
from server.robust import adaptive_bound, norm_bounded_factors, robust_mean
from server.sampling import cohort, some_users, without_replacement

Users = NDArray[np.int64]
Ranks = NDArray[np.float64]


class Curator:
    """No formal privacy on this side: plain weighted means and plain metrics.

    Parameters
    ----------
    experiment : Experiment
        Sampling, weighting, metrics.
    population, items : int
        Users there are, and the size of the catalogue.
    folder : Path, optional
        Where the ledger is, in a private mode.
    """

    clip: float | None = None
    """Bound that clients are told to clip their updates to."""

    def __init__(self, experiment: Experiment, population: int, items: int, folder: Path | None = None):
        self.experiment, self.population, self.items = experiment, population, items

    @property
    def silent(self) -> bool:
        """Whether devices trust nobody, and tell neither losses nor counts of events."""
        return on_device(self.experiment.privacy) is not None

    @cached_property
    def _public(self) -> Users:
        return public_users(self.experiment, self.population)

    @cached_property
    def _trainees(self) -> Users | range:
        everybody = range(self.population)
        return np.setdiff1d(np.arange(self.population), self._public) if len(self._public) else everybody

    def cohort(self, round_: int) -> Users:
        """Users of a round, sorted."""
        places = cohort(self.experiment.federation, len(self._trainees), self.experiment.seed, round_)
        return places if isinstance(self._trainees, range) else self._trainees[places]

    def judges(self, split: str, round_: int) -> Users:
        """Users whose held-out items a ranking looks at, sorted; the public ones where there are such."""
        evaluation, seed = self.experiment.evaluation, self.experiment.seed
        if len(self._public):
            return self._public
        if split == "test":
            return some_users(evaluation.test_users, self.population, seed, "test-users", 0)
        return some_users(evaluation.users, self.population, seed, "validation-users", round_)

    def foresee(self, round_: int, numbers: int) -> None:
        """Make ready, while devices train, what a round of a model of so many numbers will need."""

    def affords(self, what: str) -> bool:
        """Whether one more release of a kind is within the budget."""
        return True

    def mean(self, round_: int, replies: list[Reply], weights: Weights) -> tuple[Weights | None, dict[str, Any]]:
        """The mean update that the server steps along, none where nobody said anything; and what may be told."""
        importance = weigh(replies, self.experiment.federation)
        told: dict[str, Any] = {"clients": len(replies)}
        if not importance.sum() > 0:
            return None, told
        if not self.silent:
            told["loss"] = float(np.average([reply.loss for reply in replies], weights=importance))
        told["bytes_up_per_client"] = float(np.mean([reply.bytes for reply in replies]))
        federation = self.experiment.federation
        if federation.aggregation.kind != "mean":
            return robust_mean(federation.aggregation, replies, weights), told
        factors = np.ones_like(importance)
        if federation.norm_bound is not None:
            norms = norms_of(replies)
            bound = adaptive_bound(norms) if federation.norm_bound == "median" else float(federation.norm_bound)
            factors = norm_bounded_factors(norms, bound)
            told |= {"norm_bound": bound, "bounded_share": float((factors < 1).mean())}
        return mean_of(weighted_sum(replies, importance * factors, weights), float(importance.sum())), told

    def figures(self, ranks: Ranks, asked: int, round_: int, cutoffs: list[int]) -> dict[str, float]:
        """Ranking quality as it may be told."""
        return point(ranks, cutoffs)

    @property
    def tells_all(self) -> bool:
        """Whether losses, counts and ranks may be told as they are."""
        return True

    @property
    def noised(self) -> bool:
        """Whether a round is released whoever answers: noise and denominator do not hang on it."""
        return False

    def replayed(self, rounds: int) -> None:
        """Check that what has been released before a resume is in the account.

        Raises
        ------
        StateError
            Where a round that was done is missing.
        """

    def card(self, parameters: int) -> dict[str, Any]:
        """The privacy card of what has been released."""
        return card(self.experiment, self.population, parameters, 0, 0)


class DeviceCurator(Curator):
    """The server of devices that trust it with nothing: it takes means of what is noised already.

    Its ledger says how often the busiest device has taken part; each device keeps an account of its own and stops when
    that is spent.
    """

    def __init__(self, experiment: Experiment, population: int, items: int, folder: Path | None = None):
        super().__init__(experiment, population, items)
        self.ledger = Ledger(folder)

    def mean(self, round_: int, replies: list[Reply], weights: Weights) -> tuple[Weights | None, dict[str, Any]]:
        """As in `Curator`."""
        self.ledger.pay(UPDATE, round_, participations=max((reply.participations for reply in replies), default=0))
        return super().mean(round_, replies, weights)

    def card(self, parameters: int) -> dict[str, Any]:
        """As in `Curator`."""
        return card(self.experiment, len(self._trainees), parameters, self.ledger.count(UPDATE), 0, self.ledger.busiest)


class PrivateCurator(Curator):
    """The trusted curator of user-level differential privacy.

    Parameters
    ----------
    experiment : Experiment
        With `privacy.kind` user-level.
    population, items : int
        Users there are, and the size of the catalogue.
    folder : Path, optional
        Where the ledger is.
    """

    def __init__(self, experiment: Experiment, population: int, items: int, folder: Path | None = None):
        super().__init__(experiment, population, items)
        if not isinstance(experiment.privacy, UserLevel):
            raise TypeError("privacy.kind is not user-level")
        self.privacy = experiment.privacy
        self.ledger = Ledger(folder)
        self.terms = settle(experiment, len(self._trainees))
        self.clip = self.privacy.clipping_norm
        self._noise = Ahead(noise_source(self.privacy.rng, experiment.seed))
        self._affordable: dict[int, int] = {}
        self._clipped: list[float] = []
        kinds = {UPDATE: self._update_terms(), RANKING: self._ranking_terms()}
        for line in self.ledger.lines:
            if any(line.get(name) != value for name, value in kinds[line["what"]].items()):
                raise StateError("the ledger holds releases of other terms; a run directory belongs to one experiment")

    def cohort(self, round_: int) -> Users:
        """As in `Curator`; drawn in secret where `privacy.rng` is secure, since amplification rests on that."""
        n, attempt = len(self._trainees), self.ledger.attempts(UPDATE, round_)
        rng = self._noise.choices("private-cohort", round_, attempt)
        size = int(rng.binomial(n, self.terms.rate))
        places = without_replacement(rng, n, min(size, self.privacy.cap or size))
        return places if isinstance(self._trainees, range) else self._trainees[places]

    def foresee(self, round_: int, numbers: int) -> None:
        """As in `Curator`: the noise is drawn. It is added to nothing before it is paid for."""
        self._noise.foresee(numbers, "update-noise", round_, self.ledger.attempts(UPDATE, round_))

    def affords(self, what: str) -> bool:
        """As in `Curator`."""
        budget = self.privacy.budget
        limit = budget.epsilon if budget else self.privacy.target_epsilon
        if limit is None or (what == RANKING and self.terms.metrics is None):
            return True
        updates = self.ledger.count(UPDATE) + (what == UPDATE)
        rankings = self.ledger.count(RANKING) + (what == RANKING)
        if self._affordable.get(rankings, -1) >= updates:
            return True
        terms = self.terms._replace(delta=(budget and budget.delta) or self.terms.delta)
        cost = terms.cost if self.privacy.population else terms.actual_cost
        for ahead in (self.experiment.federation.rounds - updates, 32, 4, 0):  # one look for many rounds, if possible
            if ahead >= 0 and cost(updates + ahead, rankings) <= limit:
                self._affordable[rankings] = updates + ahead
                return True
        return False

    def mean(self, round_: int, replies: list[Reply], weights: Weights) -> tuple[Weights | None, dict[str, Any]]:
        """As in `Curator`: paid for, then noised on every coordinate; never none, in empty rounds neither."""
        bound, mean_cohort = float(self.clip or 0), self.terms.rate * self.terms.users
        total = weighted_sum(replies, self._factors(replies, bound), weights)
        std = self.terms.noise_multiplier * self.terms.scale * bound
        busiest = {"participations": max((r.participations for r in replies), default=0)} if self.silent else {}
        attempt = self.ledger.pay(UPDATE, round_, **self._update_terms(), clipping_norm=bound, **busiest)
        noised = add_noise(total, std, self._noise, "update-noise", round_, attempt)
        told: dict[str, Any] = {"clients": round(mean_cohort), "clipping_norm": bound}
        below = sum(reply.below for reply in replies)
        if self.privacy.adaptive and self.terms.count_noise:
            told["below"] = self._adapt(below, len(replies), mean_cohort, round_, attempt)
            self._clipped.append(1 - told["below"])
        if self.tells_all and replies:
            told["clients"] = len(replies)
            if not self.silent:
                told["loss"] = float(np.mean([reply.loss for reply in replies]))
            told["clipped_share"] = 1 - below / len(replies)
            if not self.privacy.adaptive:
                self._clipped.append(told["clipped_share"])
        return mean_of(noised, mean_cohort), told

    def _update_terms(self) -> dict[str, Any]:
        """What the price of a round hangs on."""
        terms = self.terms
        return {
            "sampler": "poisson",
            "rate": terms.rate,
            "cap": terms.cap,
            "noise_multiplier": terms.noise_multiplier,
            "count_noise": terms.count_noise,
        }

    def _ranking_terms(self) -> dict[str, Any]:
        """What the price of a ranking hangs on."""
        return {"std": self.experiment.evaluation.noise}

    def _factors(self, replies: list[Reply], bound: float) -> NDArray[np.float32]:
        """1 for updates that this process clipped itself; what came from elsewhere is clipped here."""
        factors = np.ones(len(replies), dtype=np.float32)
        for i, reply in enumerate(replies):
            if isinstance(reply.update, Explicit):
                numbers = reply.update.table, reply.update.body
                parts = (torch.from_numpy(part.reshape(1, -1)).double() for part in numbers)
                factors[i] = clip_factors(norms(*parts), bound)[0]
        return factors

    def _adapt(self, below: int, replies: int, mean_cohort: float, round_: int, attempt: int) -> float:
        """Move the norm along the noised share of updates below it (Andrew et al., NeurIPS 2021, algorithm 1)."""
        adaptive = self.privacy.adaptive
        if adaptive is None or self.clip is None:
            raise TypeError("clipping is not adaptive")
        noise = float(self._noise.normal(1, "count-noise", round_, attempt)[0]) * (self.terms.count_noise or 0)
        # Counted from a half, so that one user moves the sum by no more than a half.
        share = 0.5 + (below - replies / 2 + noise * self.terms.scale) / mean_cohort
        self.clip *= exp(-adaptive.lr * (share - adaptive.quantile))
        return share

    def figures(self, ranks: Ranks, asked: int, round_: int, cutoffs: list[int]) -> dict[str, float]:
        """As in `Curator`; from one noised histogram, paid for, where metrics are."""
        if self.terms.metrics is None:
            return super().figures(ranks, asked, round_, cutoffs)
        attempt = self.ledger.pay(RANKING, round_, **self._ranking_terms())
        std = self.experiment.evaluation.noise * self.terms.scale
        edges, counts = noised_histogram(ranks, max(cutoffs), self.items, std, self._noise, round_, attempt)
        return from_histogram(edges, counts, asked, cutoffs)

    @property
    def noised(self) -> bool:
        """As in `Curator`: to leave a round out would tell who was asked."""
        return True

    def replayed(self, rounds: int) -> None:
        """As in `Curator`."""
        paid = {line["round"] for line in self.ledger.lines if line["what"] == UPDATE}
        if missing := set(range(1, rounds + 1)) - paid:
            raise StateError(
                f"the ledger does not hold round {min(missing)}, which the checkpoint knows; restore ledger.jsonl"
            )

    @property
    def tells_all(self) -> bool:
        """As in `Curator`: in simulations that account for nothing but the model."""
        return self.experiment.evaluation.privacy == "unaccounted"

    def card(self, parameters: int) -> dict[str, Any]:
        """As in `Curator`."""
        counts = self.ledger.count(UPDATE), self.ledger.count(RANKING)
        facts = card(self.experiment, len(self._trainees), parameters, *counts, self.ledger.busiest)
        return facts | {"clipped_share": float(np.mean(self._clipped)) if self._clipped else None}


def curator(experiment: Experiment, population: int, items: int, folder: Path | None = None) -> Curator:
    """The curator that an experiment's privacy mode asks for."""
    kind = PrivateCurator if isinstance(experiment.privacy, UserLevel) else DeviceCurator
    return (Curator if experiment.privacy.kind == "none" else kind)(experiment, population, items, folder)
