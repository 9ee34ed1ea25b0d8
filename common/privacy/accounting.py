"""What releases cost: privacy loss distributions by dp-accounting, never a formula of our own.

`Event` is one kind of release. A run's account is a list of them; ε is theirs together.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from common.errors import UsageError

LARGEST_NOISE = 1e4
"""Noise multipliers beyond this are not searched for."""
HOPELESS = 5e3
"""ε beyond which sampling is no longer looked at: what is reported is then an upper bound, whose exact value would take
gigabytes and tell nobody more."""
TOLERANCE = 0.01
"""A calibrated ε lies in [1 − this, 1] of its target."""


class Event(NamedTuple):
    """One release through the Gaussian mechanism, sensitivity 1."""

    noise_multiplier: float
    """Standard deviation of the noise over the sensitivity; 0 is no protection."""
    rate: float = 1.0
    """Probability that a user takes part, independently of all others (Poisson sampling); 1 is everybody."""
    users: int | None = None
    """Users there are, where a round is cut at `cap`."""
    cap: int | None = None
    """Most users of a round; more are cut away at random, which is accounted as truncated sampling."""


def epsilon(events: Iterable[Event], delta: float) -> float:
    """ε at δ of all events together, for adding or removing one user.

    Parameters
    ----------
    events : iterable of Event
        All releases, in any order.
    delta : float
        In (0, 1).

    Returns
    -------
    float
        By privacy loss distributions (Koskela et al., AISTATS 2020; Doroshenko et al., PoPETs 2022), an upper bound
        within dp-accounting's discretisation; infinite where an event has no noise.
    """
    counts = Counter(events)
    return _epsilon(tuple(sorted(counts.items(), key=repr)), delta)


def account(events: Iterable[tuple[Event, int]], delta: float) -> float:
    """`epsilon` of events with how often each happens."""
    counts: Counter[Event] = Counter()
    for event, times in events:
        counts[event] += times
    return _epsilon(tuple(sorted(counts.items(), key=repr)), delta)


@lru_cache(maxsize=256)
def _epsilon(counts: tuple[tuple[Event, int], ...], delta: float) -> float:
    if any(event.noise_multiplier <= 0 and times for event, times in counts):
        return float("inf")
    # Gaussians that nothing amplifies are together one Gaussian, exactly; composed one by one, thousands of them fill
    # the memory.
    released = [(event, times) for event, times in counts if times]
    if not released:
        return 0.0
    bound = _gaussian(sum(times / event.noise_multiplier**2 for event, times in released) ** -0.5, delta)
    if bound > HOPELESS:
        return bound
    precision = sum(times / event.noise_multiplier**2 for event, times in released if _plain(event))
    amplified = [(event, times) for event, times in released if not _plain(event)]
    if not amplified:
        return bound
    from dp_accounting import pld

    accountant = pld.PLDAccountant()
    for event, times in [*amplified, *([(Event(precision**-0.5), 1)] if precision else [])]:
        accountant.compose(_told(event), times)
    return float(accountant.get_epsilon(delta))


def _plain(event: Event) -> bool:
    return event.rate >= 1 and (event.cap is None or event.users is None or event.cap >= event.users)


def _gaussian(noise_multiplier: float, delta: float) -> float:
    """ε of one Gaussian release, from dp-accounting's exact δ(ε), rounded up."""
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

    loss, low, high = GaussianPrivacyLoss(noise_multiplier), 0.0, 1.0
    if loss.get_delta_for_epsilon(0.0) <= delta:
        return 0.0
    while loss.get_delta_for_epsilon(high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if loss.get_delta_for_epsilon(middle) > delta else (low, middle)
    return high


def _told(event: Event) -> Any:
    """The event in dp-accounting's words, paired with its sampler by type."""
    import dp_accounting as dp

    gaussian = dp.GaussianDpEvent(event.noise_multiplier)
    if event.cap is not None and event.users is not None and event.cap < event.users:
        return dp.TruncatedSubsampledGaussianDpEvent(event.users, event.rate, event.cap, event.noise_multiplier)
    return gaussian if event.rate >= 1 else dp.PoissonSampledDpEvent(event.rate, gaussian)


def calibrate(target: float, cost: Callable[[float], float]) -> float:
    """Smallest noise multiplier whose run costs no more than the target, and at least 99 % of it.

    Parameters
    ----------
    target : float
        ε.
    cost : callable
        ε of the whole run for a noise multiplier; falls as it grows.

    Raises
    ------
    UsageError
        Where no noise multiplier is enough, since what does not depend on it costs more already.
    """
    low, high = 0.0, 1.0
    while cost(high) > target:
        low, high = high, min(2 * high, LARGEST_NOISE)
        if low == LARGEST_NOISE:
            raise UsageError(
                f"privacy.target_epsilon={target:g}: no noise reaches it; evaluate less often or with more "
                "evaluation.noise, or allow a larger ε"
            )
    found = cost(high)
    while not (1 - TOLERANCE) * target <= found <= target:
        middle = (low + high) / 2
        spent = cost(middle)
        low, high, found = (middle, high, found) if spent > target else (low, middle, spent)
        if high - low < 1e-9 * high:
            break
    return high


def default_delta(users: int) -> float:
    """δ = N^-1.1: less than one in N."""
    return float(max(2, users) ** -1.1)
