"""The ``privacy`` section of an experiment: which promise, made to whom, at what price. Free of torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.section import Positive, Rate, Section

Delta = Annotated[float, Field(gt=0, lt=1)]


class NoPrivacy(Section):
    """No formal privacy: events stay on the device, updates do not hide them."""

    kind: Literal["none"] = "none"
    """Selects this mode."""


class Budget(Section):
    """The most that a run may spend; it stops before the release that would exceed it (exit code 3)."""

    epsilon: Rate
    """ε of everything that the run releases, metrics included."""
    delta: Delta | None = None
    """δ; by default the mode's."""


class AdaptiveClipping(Section):
    """The clipping norm follows a quantile of the updates' norms (Andrew et al., NeurIPS 2021)."""

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of updates that should be below the norm."""
    lr: Rate = 0.2
    """Geometric step of the norm."""
    noise: Rate | None = None
    """Standard deviation of the noise on the count of updates below the norm; by default a twentieth of the cohort."""


class _OnDevice(Section):
    """What the modes share in which the device protects its user from the server itself.

    A device believes its own configuration only. So whatever decides how much noise it adds must stand there: with
    `target_epsilon`, δ and the number of participations too, since the server could lie about the number of users.
    """

    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    """z: standard deviation of the noise over the clipping norm. Excludes `target_epsilon`."""
    target_epsilon: Rate | None = None
    """Choose z so that all `participations` of a user together cost this ε; needs `participations` and `delta`."""
    clipping_norm: Rate = 1.0
    """C: the most that what is protected may add to an update, in L2."""
    delta: Delta | None = None
    """δ; by default users^-1.1."""
    participations: Positive | None = None
    """Most rounds that a device takes part in; it counts for itself and refuses afterwards. `null` means all."""
    rng: Literal["secure", "reproducible"] = "secure"
    """`secure`: noise from the operating system's entropy. `reproducible`: keyed by the public seed, for research."""

    @model_validator(mode="after")
    def _own_judgement(self) -> Self:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("give noise_multiplier or target_epsilon, one of the two")
        if self.target_epsilon is not None and (self.participations is None or self.delta is None):
            raise ValueError("target_epsilon needs participations and delta: a device does not take the server's word")
        return self


class Local(_OnDevice):
    """A whole user is protected from the server, which sees each noised update: local differential privacy.

    The device clips its update and adds noise itself. Changing all of a user's events moves it by up to 2C; all of a
    user's participations are composed, and nothing is amplified by sampling, since the server knows whom it asked.
    """

    kind: Literal["local"]
    """Selects this mode."""


class ExampleLevel(_OnDevice):
    """One segment of a user's history is protected from the server: DP-SGD on the device (Abadi et al., CCS 2016).

    Examples are disjoint segments, so that each event lies in exactly one: of overlapping windows a printed ε would
    hold per window and not per event.
    """

    kind: Literal["example-level"]
    """Selects this mode."""
    segment: Annotated[int, Field(ge=2)] = 10
    """Events of a segment, counted from the start of the history; it is trained on without what came before it."""
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Probability that a segment is in a local step, on its own and in secret."""
    examples: Positive = 4
    """What a step's sum of clipped gradients is divided by, the same for all users, since their number of segments is
    private."""


class Precondition(Section):
    """A linear map that each device applies to its update before the clip, read off the public weights.

    What is released is the clipped sum of mapped updates, with the same noise on every coordinate, and the server steps
    along that. One loud direction that all users share, popularity, then does not use up the clipping norm.
    """

    whiten: Rate | None = 1.0
    """Turns the item table's directions towards equal energy; the larger, the less; `null` leaves them."""
    body: Rate = 1.0
    """What all but the item table is multiplied with."""


class UserLevel(Section):
    """A whole user is protected from whoever sees every global model; the server is trusted.

    DP-FedAvg (McMahan et al., ICLR 2018): Poisson sampling, one flat clip, unweighted sum, noise on every coordinate,
    a fixed denominator.
    """

    kind: Literal["user-level"]
    """Selects this mode."""
    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    """z: standard deviation of the noise over the clipping norm. Excludes `target_epsilon`."""
    target_epsilon: Rate | None = None
    """Choose z so that the whole run, planned metrics included, costs this ε."""
    clipping_norm: Rate = 1.0
    """C: the most that one user's whole update may measure, in L2; where `adaptive` starts from."""
    delta: Delta | None = None
    """δ; by default users^-1.1."""
    rng: Literal["secure", "reproducible"] = "secure"
    """`secure`: cohorts and noise from the operating system's entropy, never twice the same. `reproducible`: keyed by
    the public seed, for research; who knows the seed can take the noise away again."""
    budget: Budget | None = None
    """The most that may be spent; `null` means what the plan costs."""
    adaptive: AdaptiveClipping | None = None
    """Let the clipping norm follow the updates; `null` keeps it."""
    precondition: Precondition | None = None
    """Map updates before they are clipped; `null` leaves them as they are."""
    cap: Positive | None = None
    """Most users that a round may have, for memory; the cost of cutting is accounted for."""
    on_device: ExampleLevel | None = None
    """What the devices add against the server itself, on top."""
    population: Positive | None = None
    """What if there were so many users? Noise is what these would need; both ε are reported. For simulations."""

    @model_validator(mode="after")
    def _one_price(self) -> "UserLevel":
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("give noise_multiplier or target_epsilon, one of the two")
        if self.precondition is not None and self.on_device is not None:
            raise ValueError("precondition maps updates that no noise is in yet; with on_device there are none")
        return self


def on_device(privacy: Section) -> Local | ExampleLevel | None:
    """What the devices themselves do in a privacy mode."""
    if isinstance(privacy, UserLevel):
        return privacy.on_device
    return privacy if isinstance(privacy, Local | ExampleLevel) else None


PrivacyConfig = Annotated[NoPrivacy | UserLevel | Local | ExampleLevel, Field(discriminator="kind")]
