"""What it costs where devices protect their users from the server: settled by each device, reported by the run."""

from functools import lru_cache
from importlib.metadata import version
from math import sqrt
from typing import Any, NamedTuple

from common.config import Experiment
from common.errors import UsageError
from common.privacy.accounting import Event, account, calibrate, default_delta
from common.privacy.schema import ExampleLevel, Local, on_device


class DeviceTerms(NamedTuple):
    """The settled numbers of what devices do, the same for all."""

    noise_multiplier: float
    """z: standard deviation of the noise over C."""
    step: Event
    """One noised step, as whoever sees its result must see it."""
    steps: int
    """Such steps in one participation."""
    most: int | None
    """Participations after which a device refuses."""

    @property
    def told(self) -> dict[str, float | int]:
        """What one participation costs, for a device's account."""
        return {"noise_multiplier": self.step.noise_multiplier, "sampling_rate": self.step.rate, "steps": self.steps}

    def cost(self, participations: int, delta: float) -> float:
        """ε at δ of so many participations of one user."""
        return account([(self.step, participations * self.steps)], delta)


@lru_cache(maxsize=16)
def settle(experiment: Experiment) -> DeviceTerms:
    """Settle z from the experiment alone, as each device does for itself.

    Raises
    ------
    UsageError
        Where devices do nothing in this mode, or `target_epsilon` cannot be reached.
    """
    privacy = _privacy(experiment)

    def terms(z: float) -> DeviceTerms:
        if isinstance(privacy, Local):  # replaced as a whole, an update moves by twice the bound
            return DeviceTerms(z, Event(z / 2), 1, privacy.participations)
        steps = experiment.federation.local.steps or 1
        return DeviceTerms(z, Event(z, privacy.sampling_rate), steps, privacy.participations)

    if privacy.noise_multiplier is not None:
        return terms(privacy.noise_multiplier)
    most, delta = privacy.participations or 0, privacy.delta or 0.0  # the schema asks for both
    return terms(calibrate(privacy.target_epsilon or 0.0, lambda z: terms(z).cost(most, delta)))


def planned_participations(experiment: Experiment, users: int) -> int:
    """The most that any device will take part in, as the plan has it."""
    federation, privacy = experiment.federation, _privacy(experiment)
    most = federation.rounds
    if federation.sampling == "passes":
        most = -(-federation.rounds // -(-users // min(federation.cohort, users)))
    return min(most, privacy.participations or most)


def device_card(
    experiment: Experiment, users: int, parameters: int, rounds: int, participations: int
) -> dict[str, Any]:
    """The card of what devices do.

    Parameters
    ----------
    experiment : Experiment
        The run.
    users : int
        Users who may train.
    parameters : int
        Numbers in an update.
    rounds : int
        Rounds, made or planned.
    participations : int
        The most that any one user takes or took part in; ε is this user's, never a sum over users.

    Returns
    -------
    dict
        As in `common.privacy.card.card`; `sampling_rate` is that of a user's segments.
    """
    privacy, terms = _privacy(experiment), settle(experiment)
    delta = privacy.delta or default_delta(users)
    noise = noise_over_clip(experiment, terms, users, parameters)
    if isinstance(privacy, Local):
        unit, relation, sampler = "user: all events of one person", "replace one", "none that would amplify"
    else:
        unit = f"segment: {privacy.segment} events of one person in a row; each event lies in one"
        relation, sampler = "add or remove one, the others keeping their places", "Poisson, on the device"
    return {
        "unit": unit,
        "relation": relation,
        "adversary": "the server, which sees every noised update",
        "sampler": sampler,
        "accountant": f"PLD, dp-accounting {version('dp-accounting')}",
        "noise_multiplier": terms.noise_multiplier,
        "clipping_norm": privacy.clipping_norm,
        "sampling_rate": terms.step.rate,
        "users": users,
        "rounds": rounds,
        "participations": participations,
        "delta": delta,
        "epsilon": terms.cost(participations, delta),
        "epsilon_metrics": None if experiment.evaluation.privacy == "unaccounted" else 0.0,
        "metrics": experiment.evaluation.privacy,
        "rng": privacy.rng,
        "snr": 1 / noise if noise else None,
        "noise_over_clip": noise,
        "clipped_share": None,
        "hypothetical": None,
    }


def noise_over_clip(experiment: Experiment, terms: DeviceTerms, users: int, parameters: int) -> float:
    """Expected norm of the noise on the mean update over the most that an update can measure before noise.

    With C for one segment and `examples` of them in a step on average, that is S C in S steps.
    """
    privacy, cohort = _privacy(experiment), experiment.federation.mean_cohort(users)
    whole = terms.noise_multiplier * sqrt(parameters / cohort)
    return whole / (privacy.examples * sqrt(terms.steps)) if isinstance(privacy, ExampleLevel) else whole


def _privacy(experiment: Experiment) -> Local | ExampleLevel:
    privacy = on_device(experiment.privacy)
    if privacy is None:
        raise UsageError(f"privacy.kind {experiment.privacy.kind}: devices add no noise in it")
    return privacy
