"""What the sections of an experiment must say of one another, or the experiment is refused.

A key that nothing would read is refused, too, where it is not at its default: whoever set it expects something of it.
"""

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from common.models.shapes import ITEM_TABLE, parameter_shapes
from common.privacy.schema import ExampleLevel, NoPrivacy, UserLevel, on_device

if TYPE_CHECKING:
    from common.config import Experiment


def check(experiment: "Experiment") -> None:
    """Raise ValueError, in one line with the mend, where sections contradict one another."""
    _items_are_known(experiment)
    _evaluation_is_heard(experiment)
    _patterns_name_something(experiment)
    _robustness_makes_sense(experiment)
    _promises_hold(experiment)


def _items_are_known(experiment: "Experiment") -> None:
    model, features = experiment.model, experiment.data.features.columns
    if model.items == "own":
        return
    if not features:
        raise ValueError(f"model.items {model.items} needs data.features.columns: what is known of items")
    parts = len(features) + (model.items == "both")
    if model.fusion == "concatenation" and model.dim < parts:
        raise ValueError(
            f"model.fusion concatenation puts {parts} vectors side by side in model.dim={model.dim} columns; "
            f"take model.dim={parts} or more"
        )


def _evaluation_is_heard(experiment: "Experiment") -> None:
    evaluation, kind = experiment.evaluation, experiment.privacy.kind
    default = type(evaluation)()
    if evaluation.new_place is not None and not experiment.data.cold and experiment.model.items == "own":
        raise ValueError(
            "evaluation.new_place is for items that training never saw: data.cold says how many, or model.items is "
            "other than own, so that some can come later"
        )
    public = kind != "none" and evaluation.privacy == "public-holdout"
    if kind == "none" and evaluation.privacy == "public-holdout":
        raise ValueError(
            "evaluation.privacy public-holdout is for a privacy mode; name a privacy.kind, or leave it away"
        )
    if evaluation.holdout != default.holdout and not public:
        raise ValueError("evaluation.holdout is for evaluation.privacy=public-holdout under a privacy.kind")
    if evaluation.noise != default.noise and not (kind == "user-level" and evaluation.privacy == "noised"):
        raise ValueError("evaluation.noise is for privacy.kind=user-level and evaluation.privacy=noised")
    for key in ("users", "test_users"):
        if public and getattr(evaluation, key) is not None:
            raise ValueError(f"evaluation.{key} is not for evaluation.privacy=public-holdout; evaluation.holdout is")


def _patterns_name_something(experiment: "Experiment") -> None:
    tuning, kept = experiment.evaluation.fine_tune, experiment.federation.on_device
    if tuning is None and not kept and not experiment.model.personal:
        return  # before names are made, of as many blocks as somebody asks for
    names = [name for name in parameter_shapes(experiment.model, 1) if name != ITEM_TABLE]
    sections = {"federation.on_device": kept}
    sections |= {} if tuning is None else {"evaluation.fine_tune.parameters": tuning.parameters}
    for key, patterns in sections.items():
        for pattern in patterns:
            if fnmatchcase(ITEM_TABLE, pattern):
                raise ValueError(f"{key}: {pattern!r} takes in the item table, which all share")
        idle = [each for each in patterns if not any(fnmatchcase(name, each) for name in names)]
        if idle and (key == "federation.on_device" or len(idle) == len(patterns)):  # what stays is a promise
            known = ", ".join(names)
            raise ValueError(f"{key}: {', '.join(idle)} names no parameter; there are {known}")
    matched = [pattern for patterns in sections.values() for pattern in patterns]
    for name in names:
        if name.startswith("user.") and not any(fnmatchcase(name, pattern) for pattern in matched):
            raise ValueError(
                f"model.personal: all would share {name}; put user.* into federation.on_device "
                "or evaluation.fine_tune.parameters"
            )
    device = on_device(experiment.privacy)
    if kept and device is not None:
        raise ValueError(f"privacy.kind {device.kind} knows no federation.on_device; leave one of them away")


def _robustness_makes_sense(experiment: "Experiment") -> None:
    """What an aggregation rule cannot work with is refused."""
    federation, kind = experiment.federation, experiment.federation.aggregation.kind
    if kind == "mean" and federation.norm_bound is None:
        return
    said = "federation.norm_bound " if kind == "mean" else f"federation.aggregation {kind} "
    if not isinstance(experiment.privacy, NoPrivacy):
        raise ValueError(
            said + f"and privacy.kind {experiment.privacy.kind}: no such sum is in any account; a clip bounds"
        )
    if kind == "mean":
        return
    if federation.norm_bound is not None:
        raise ValueError(said + "bounds what an update may do in its own way; leave federation.norm_bound away")
    if experiment.loss.kind != "softmax":
        raise ValueError(said + "needs loss.kind=softmax: the median of rows that most users do not send is zero")
    if federation.shards != "users":
        raise ValueError(said + "needs federation.shards=users: it looks at single updates")


def _promises_hold(experiment: "Experiment") -> None:
    """What would make the account of a privacy mode a false one is refused."""
    privacy, federation = experiment.privacy, experiment.federation
    if isinstance(privacy, NoPrivacy):
        return
    said, device = f"privacy.kind {privacy.kind} ", on_device(privacy)
    if federation.replies.oversample:
        raise ValueError(said + "takes no federation.replies.oversample: who takes part how often is in the account")
    if federation.weighting != "uniform":
        raise ValueError(said + "needs federation.weighting=uniform: weighed by events, one user passes the bound")
    if isinstance(device, ExampleLevel):
        _segments_are_bounded(experiment, device)
    if device is not None and experiment.evaluation.privacy == "noised":
        raise ValueError(
            f"privacy.kind {device.kind} needs evaluation.privacy=public-holdout, or unaccounted in a simulation: "
            "noise that the server adds does not protect ranks from the server"
        )
    if not isinstance(privacy, UserLevel):
        return
    if federation.sampling != "poisson":
        raise ValueError(said + "needs federation.sampling=poisson: a cohort of fixed size has no such account")
    if privacy.cap is not None and privacy.cap < federation.cohort:
        raise ValueError(said + "has a cap below federation.cohort, which is the mean size of a round")


def _segments_are_bounded(experiment: "Experiment", device: ExampleLevel) -> None:
    local, data = experiment.federation.local, experiment.data
    if local.epochs or local.prox:
        raise ValueError("privacy.kind example-level takes federation.local.steps; epochs and prox are not for it")
    if not experiment.model.plain:
        raise ValueError("privacy.kind example-level takes the plain model: Opacus has no hooks for other layers")
    if data.target or data.many_domains:
        raise ValueError("privacy.kind example-level knows neither data.target nor several domains")
    if device.segment > experiment.model.max_length + 1:
        raise ValueError("privacy.kind example-level has segments longer than what the model sees, max_length + 1")
