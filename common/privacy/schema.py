"""The ``privacy`` section of an experiment: which promise, made to whom, at what price. Free of torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.sources import Positive, Rate, Section

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
    cap: Positive | None = None
    """Most users that a round may have, for memory; the cost of cutting is accounted for."""
    population: Positive | None = None
    """What if there were so many users? Noise is what these would need; both ε are reported. For simulations."""

    @model_validator(mode="after")
    def _one_price(self) -> "UserLevel":
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("give noise_multiplier or target_epsilon, one of the two")
        return self


PrivacyConfig = Annotated[NoPrivacy | UserLevel, Field(discriminator="kind")]
