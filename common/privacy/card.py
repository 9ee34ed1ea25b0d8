"""The privacy card: who is protected from whom, by what, and what it has cost."""

from importlib.metadata import version
from math import sqrt
from typing import Any

from common.config import Experiment
from common.privacy.devices import device_card, planned_participations
from common.privacy.plan import Terms, rankings, settle, trainees
from common.privacy.schema import UserLevel, on_device

STAYS = "What devices keep to themselves is not part of the release; do not publish devices/."
"""Of a simulation, whose run directory has their numbers without noise, and who took part when."""
NOISY = 2.0
"""Noise/C on the mean update beyond which little can be learnt."""


def card(
    experiment: Experiment, users: int, parameters: int, updates: int, rankings: int, participations: int = 0
) -> dict[str, Any]:
    """The card of a run, or of a plan.

    Parameters
    ----------
    experiment : Experiment
        The run.
    users : int
        Users who may train.
    parameters : int
        Numbers in an update.
    updates, rankings : int
        Releases of either kind, made or planned.
    participations : int
        The most that any one user takes part in, where devices add noise.

    Returns
    -------
    dict
        As in `privacy.json`. `epsilon` is of everything that is released, for the users there really are;
        `epsilon_metrics` of the metrics alone (null: unaccounted); `noise_over_clip` the expected norm of the noise on
        the mean update over C, and `snr` its inverse, an upper bound. `clipped_share` is filled in by a run that may
        tell it. What devices do beside a trusted server stands under `on_device`, a card of its own; `stays` says what
        is in no account, since it never leaves them.
    """
    unaccounted = experiment.evaluation.privacy == "unaccounted"
    devices = (
        device_card(experiment, users, parameters, updates, participations) if on_device(experiment.privacy) else None
    )
    if not isinstance(experiment.privacy, UserLevel):
        return devices or {
            "unit": "none",
            "relation": None,
            "adversary": "nobody; events stay on the devices, but updates tell of them",
            "epsilon": None,
        }
    privacy, terms = experiment.privacy, settle(experiment, users)
    noise = noise_over_clip(terms, parameters)
    hypothetical = {"population": terms.population, "epsilon": terms.cost(updates, rankings)}
    return {
        "unit": "user: all events of one person",
        "relation": "add or remove one",
        "adversary": "who sees every published model and figure; the server is trusted",
        "sampler": f"Poisson, cut at {privacy.cap}" if privacy.cap else "Poisson",
        "accountant": f"PLD, dp-accounting {version('dp-accounting')}",
        "noise_multiplier": terms.noise_multiplier,
        "clipping_norm": privacy.clipping_norm,
        "sampling_rate": terms.rate,
        "users": users,
        "rounds": updates,
        "delta": terms.delta,
        "epsilon": terms.actual_cost(updates, rankings),
        "epsilon_metrics": None if unaccounted else terms.actual_cost(0, rankings),
        "metrics": experiment.evaluation.privacy,
        "rng": privacy.rng,
        "snr": 1 / noise if noise else None,
        "noise_over_clip": noise,
        "clipped_share": None,
        "hypothetical": hypothetical if privacy.population else None,
        "on_device": devices,
        "stays": STAYS if experiment.federation.on_device or getattr(privacy, "on_device", None) else None,
    }


def planned(experiment: Experiment, users: int, parameters: int) -> dict[str, Any]:
    """The card that a run of so many users will end with, before anything is trained."""
    training = trainees(experiment, users)
    participations = planned_participations(experiment, training) if on_device(experiment.privacy) else 0
    rounds = experiment.federation.rounds
    return card(experiment, training, parameters, rounds, rankings(experiment), participations)


def noise_over_clip(terms: Terms, parameters: int) -> float:
    """Expected norm of the noise on the mean update over C: z √d / (q N)."""
    return terms.scale * terms.noise_multiplier * sqrt(parameters) / (terms.rate * terms.users)


def advice(facts: dict[str, Any]) -> list[str]:
    """What a person should know before they train or publish, one line each."""
    lines: list[str] = []
    if facts["epsilon"] is None:
        return lines
    if facts["noise_over_clip"] > NOISY:
        lines.append(
            f"The noise on the mean update is {facts['noise_over_clip']:.1f} times the clipping norm; above {NOISY:g} "
            "little is learnt. What lowers it: a larger cohort, fewer rounds, a smaller model.dim, more users."
        )
    if facts["metrics"] == "unaccounted":
        lines.append("Metrics are not accounted for: right for a simulation, not for people's data.")
    if facts.get("stays"):
        lines.append(facts["stays"])
    if facts["rng"] == "reproducible":
        lines.append(
            "Noise is reproducible: who knows the seed can take it away; set privacy.rng=secure for people's data."
        )
    if facts["hypothetical"]:
        lines.append(
            f"Hypothetical: noise for {facts['hypothetical']['population']:,} users, whose ε would be "
            f"{facts['hypothetical']['epsilon']:.2f}; the {facts['users']:,} here have ε = {_text(facts['epsilon'])}."
        )
    return lines


def _text(epsilon: float) -> str:
    return f"{epsilon:.2f}"
