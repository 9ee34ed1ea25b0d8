"""What a run releases and what that costs: shared by the forecast, which knows the plan, and by the run itself."""

from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.config import Experiment
from common.errors import UsageError
from common.privacy.accounting import Event, account, calibrate, default_delta
from common.privacy.schema import UserLevel
from common.seeding import generator


class Terms(NamedTuple):
    """The settled numbers of a privacy mode, for one population."""

    users: int
    """N: users who may train."""
    rate: float
    """q: probability that a user takes part in a round."""
    noise_multiplier: float
    """z: noise on the summed updates over the clipping norm, as the accounted population needs it."""
    count_noise: float | None
    """Standard deviation of the noise on the count that adaptive clipping looks at; none where the norm is fixed."""
    delta: float
    """δ."""
    update: Event
    """One round's release: the noised sum and, where clipping adapts, the noised count."""
    metrics: Event | None
    """One ranking's release; none where metrics are not paid for."""
    population: int
    """Users that the account is for: N, or a hypothetical number."""
    cap: int | None
    """Most users of a real round."""

    @property
    def scale(self) -> float:
        """Noise as added over noise as accounted for; below 1 only with a hypothetical population."""
        return self.users / self.population

    @property
    def actual(self) -> Event:
        """One round's release as the users there really are must see it."""
        real = self.update._replace(noise_multiplier=self.update.noise_multiplier * self.scale)
        return real if self.cap is None else real._replace(users=self.users, cap=self.cap)

    def cost(self, updates: int, rankings: int) -> float:
        """ε of so many rounds and rankings, for the population that the account is for."""
        return account(self._events(self.update, self.metrics, updates, rankings), self.delta)

    def actual_cost(self, updates: int, rankings: int) -> float:
        """The same for the users there really are: all noise, that on metrics too, is as much less for them."""
        metrics = self.metrics and self.metrics._replace(noise_multiplier=self.metrics.noise_multiplier * self.scale)
        return account(self._events(self.actual, metrics, updates, rankings), self.delta)

    def _events(self, update: Event, metrics: Event | None, updates: int, rankings: int) -> list[tuple[Event, int]]:
        return [(update, updates)] + ([(metrics, rankings)] if metrics else [])


def settle(experiment: Experiment, users: int) -> Terms:
    """Settle z and δ.

    Parameters
    ----------
    experiment : Experiment
        With `privacy.kind` user-level.
    users : int
        Users who may train.

    Raises
    ------
    UsageError
        Where there is no privacy to settle, or `target_epsilon` cannot be reached.
    """
    privacy, federation, evaluation = experiment.privacy, experiment.federation, experiment.evaluation
    if not isinstance(privacy, UserLevel):
        raise UsageError(f"privacy.kind {privacy.kind} has no terms")
    population = privacy.population or users
    delta = privacy.delta or default_delta(population)
    rate = min(1.0, federation.cohort / users)
    paid = Event(evaluation.noise) if evaluation.privacy == "noised" else None
    counts = (privacy.adaptive.noise or federation.cohort / 20) if privacy.adaptive else None

    # A hypothetical round is as much larger as its population, and so is what it is cut at.
    cap = None if privacy.cap is None else ceil(privacy.cap * population / users)

    def terms(z: float) -> Terms:
        seen = z if counts is None else _together(z, 2 * counts)
        update = Event(seen, rate, population if cap else None, cap)
        return Terms(users, rate, z, counts, delta, update, paid, population, privacy.cap)

    if privacy.noise_multiplier is not None:
        return terms(privacy.noise_multiplier)
    planned = federation.rounds, rankings(experiment)
    return terms(calibrate(privacy.target_epsilon or 0.0, lambda z: terms(z).cost(*planned)))


def public_users(experiment: Experiment, users: int) -> NDArray[np.int64]:
    """Users who never train and whose ranks are public, sorted, by the experiment's seed; none in most modes."""
    evaluation = experiment.evaluation
    if experiment.privacy.kind == "none" or evaluation.privacy != "public-holdout":
        return np.zeros(0, dtype=np.int64)
    count = max(1, round(evaluation.holdout * users))
    rng = generator(experiment.seed, "public-users")
    return np.sort(rng.choice(users, count, replace=False, shuffle=False)).astype(np.int64)


def trainees(experiment: Experiment, users: int) -> int:
    """How many may train: all but the public ones, where there are such."""
    return users - len(public_users(experiment, users))


def rankings(experiment: Experiment) -> int:
    """Validations and the test of a whole run."""
    return -(-experiment.federation.rounds // experiment.evaluation.every) + 1


def _together(*multipliers: float) -> float:
    """Noise multiplier of several Gaussian releases on one sample, as of one (Andrew et al., 2021, theorem 1)."""
    return 0.0 if min(multipliers) <= 0 else sum(z**-2 for z in multipliers) ** -0.5
