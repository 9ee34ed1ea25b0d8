"""The schema of what clients minimise; see `common.config`."""

from typing import Annotated, Literal

from pydantic import Field

from common.section import Positive, Section


class SoftmaxLoss(Section):
    """Cross-entropy over the whole catalogue."""

    kind: Literal["softmax"]
    """Selects this loss."""


class SampledSoftmaxLoss(Section):
    """Cross-entropy over the target and negatives that the whole round shares."""

    kind: Literal["sampled-softmax"]
    """Selects this loss."""
    negatives: Positive = 256
    """Negatives a round, drawn uniformly from a public seed."""


class GBCELoss(Section):
    """Generalised binary cross-entropy (gSASRec, Petrov & Macdonald, RecSys 2023), negatives shared by the round."""

    kind: Literal["gbce"]
    """Selects this loss."""
    negatives: Positive = 256
    """Negatives a round, drawn uniformly from a public seed."""
    calibration: Annotated[float, Field(ge=0, le=1)] = 0.75
    """The paper's t: 0 is plain binary cross-entropy, 1 undoes the bias of sampling wholly."""


class BCELoss(Section):
    """Binary cross-entropy with one private negative per position (the original SASRec); known to be weak."""

    kind: Literal["bce"]
    """Selects this loss."""


LossConfig = Annotated[SoftmaxLoss | SampledSoftmaxLoss | GBCELoss | BCELoss, Field(discriminator="kind")]
