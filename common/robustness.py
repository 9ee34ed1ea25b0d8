"""How the server puts the updates of a round together: the mean, or a rule that some wrong updates cannot move far.

Neither torch nor flwr is imported here; see `common.config`.
"""

from math import ceil
from typing import Annotated, Literal

from pydantic import Field

from common.section import Natural, Section

Malicious = Natural | Annotated[float, Field(gt=0, lt=0.5)]
"""Updates of a round that may be arbitrary: how many, or which share of the cohort."""


class MeanAggregation(Section):
    """The weighted mean (McMahan et al., AISTATS 2017); one wrong update can move it anywhere."""

    kind: Literal["mean"] = "mean"
    """Selects this rule."""

    def tolerates(self, users: int) -> int:
        """How many of so many updates may be arbitrary without carrying the result away."""
        return 0


class MedianAggregation(Section):
    """The median of each coordinate, every user counting the same (Yin et al., ICML 2018)."""

    kind: Literal["median"]
    """Selects this rule."""

    def tolerates(self, users: int) -> int:
        """As in `MeanAggregation`."""
        return max(0, (users - 1) // 2)


class TrimmedMeanAggregation(Section):
    """The mean of each coordinate without its smallest and largest values (Yin et al., ICML 2018)."""

    kind: Literal["trimmed-mean"]
    """Selects this rule."""
    trim: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Share of the users that is cut off at either end of a coordinate, rounded down as in Flower."""

    def tolerates(self, users: int) -> int:
        """As in `MeanAggregation`."""
        return int(self.trim * users)


class _Closest(Section):
    """What the rules share that choose updates by their distances to each other."""

    malicious: Malicious = 0.1
    """f, updates of a round that may be arbitrary: how many, or which share of the cohort, rounded up. A cohort of
    fewer than 2f + 3 is too small for the promise."""

    def attackers(self, users: int) -> int:
        """The f of so many users."""
        # A billionth is kept back, or .07 of 100 users would be 8.
        return self.malicious if isinstance(self.malicious, int) else ceil(self.malicious * users - 1e-9)

    def tolerates(self, users: int) -> int:
        """As in `MeanAggregation`."""
        attackers = self.attackers(users)
        return attackers if users >= 2 * attackers + 3 else 0


class KrumAggregation(_Closest):
    """The one update that is closest to its nearest others (Krum; Blanchard et al., NeurIPS 2017)."""

    kind: Literal["krum"]
    """Selects this rule."""

    def kept(self, users: int) -> int:
        """How many of so many updates are chosen."""
        return 1


class MultiKrumAggregation(_Closest):
    """The mean of the updates that are closest to their nearest others, every one counting the same."""

    kind: Literal["multi-krum"]
    """Selects this rule."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the updates that is chosen, rounded up; n − f − 2 at the most, which the promise needs, and at least
    one."""

    def kept(self, users: int) -> int:
        """As in `KrumAggregation`."""
        return max(1, min(ceil(self.keep * users - 1e-9), users - self.attackers(users) - 2))


AggregationConfig = Annotated[
    MeanAggregation | MedianAggregation | TrimmedMeanAggregation | KrumAggregation | MultiKrumAggregation,
    Field(discriminator="kind"),
]
