"""The schema of a whole experiment: one YAML file is one frozen, validated `Experiment`.

Neither torch nor flwr nor polars is imported here, so that ``--help``, ``show`` and ``validate`` answer at once.
Everything under ``runtime`` may change speed and place but never a result; it is outside `experiment_hash`.
"""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.agreement import check
from common.loss import LossConfig, SoftmaxLoss
from common.models.schema import ModelConfig
from common.privacy.schema import NoPrivacy, PrivacyConfig
from common.robustness import AggregationConfig, MeanAggregation
from common.section import Natural, Positive, Rate, Section, Share
from common.sources import DataConfig

# --- federation --------------------------------------------------------------------------------------------------


class LocalConfig(Section):
    """Training on the device: plain SGD from the global weights, stateless between rounds."""

    steps: Positive | None = None
    """SGD steps a round (default 1), each on one window of the user's sequence. Excludes `epochs`."""
    epochs: Positive | None = None
    """Passes a round over the user's sequence, cut into windows; longer histories take more steps."""
    lr: Rate = 1.0
    """Learning rate of the local steps."""
    prox: Annotated[float, Field(ge=0)] = 0.0
    """FedProx: weight µ of the pull µ/2·‖w − w_global‖² (Li et al., MLSys 2020)."""
    window: Literal["last", "random"] = "last"
    """With `steps`, which part of a sequence longer than the model's: the most recent, or one at random each step."""

    predict: Literal["target", "all"] = "target"
    """With `data.target`, which events are learnt to be predicted: those of that behaviour only, or all."""

    @model_validator(mode="after")
    def _one_measure(self) -> "LocalConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class FedAvg(Section):
    """Federated averaging (McMahan et al., AISTATS 2017): the server adds the mean update."""

    kind: Literal["fedavg"]
    """Selects this optimiser."""
    lr: Rate = 1.0
    """Server learning rate."""


class FedAvgM(Section):
    """FedAvg with server momentum (Hsu et al., arXiv 1909.06335)."""

    kind: Literal["fedavgm"]
    """Selects this optimiser."""
    lr: Rate = 1.0
    """Server learning rate."""
    momentum: Share = 0.9
    """Momentum."""


class FedAdam(Section):
    """Adam on the server (Reddi et al., ICLR 2021), with bias correction as in torch.optim.Adam."""

    kind: Literal["fedadam"]
    """Selects this optimiser."""
    lr: Rate = 1e-3
    """Server learning rate."""
    beta1: Share = 0.9
    """Decay of the first moment."""
    beta2: Share = 0.98
    """Decay of the second moment."""
    eps: Rate = 1e-8
    """Added to the root of the second moment."""
    body: Rate = 1.0
    """Learning rate of all but the item table, as a multiple of `lr`."""


class FedAdagrad(Section):
    """Adagrad on the server (Reddi et al., ICLR 2021)."""

    kind: Literal["fedadagrad"]
    """Selects this optimiser."""
    lr: Rate = 1e-2
    """Server learning rate."""
    eps: Rate = 1e-8
    """Added to the root of the accumulated squares."""


OptimizerConfig = Annotated[FedAvg | FedAvgM | FedAdam | FedAdagrad, Field(discriminator="kind")]


class RepliesConfig(Section):
    """Which replies a round waits for, whose clients live elsewhere. In one process nobody is late."""

    deadline: Rate = 600.0
    """Seconds until replies that are not there are left out."""
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the users who must have a node that is there, at the start and between rounds, and of the nodes asked
    that must answer; with fewer a round does not count, unless its noise is released in any case."""
    wait: Rate = 300.0
    """Seconds that too few users, or rounds that do not count, are waited for; then the run stops, resumable."""
    oversample: Annotated[float, Field(ge=0, le=1)] = 0.0
    """So many more users are asked, as a share of the cohort, since some may not answer."""


class FederationConfig(Section):
    """Who trains, how, and how the server puts the updates together."""

    rounds: Natural = 200
    """Rounds at the most."""
    cohort: Positive = 128
    """Users a round: exactly (`fixed`) or on average (`poisson`); a smaller population takes part as a whole."""
    sampling: Literal["fixed", "poisson", "passes"] = "fixed"
    """`fixed`: a set of that size, drawn without replacement. `poisson`: each user independently. `passes`: the users
    in turn, in a new random order each time that all have taken part, so that nobody does so more often than others."""
    weighting: Literal["events", "uniform"] = "events"
    """An update counts by the user's number of trained events, or every user counts the same."""
    local: LocalConfig = LocalConfig()
    """Training on the device."""
    aggregation: AggregationConfig = MeanAggregation()
    """How a round's updates become one."""
    on_device: tuple[str, ...] = ()
    """Parameters that never leave the device, by patterns of their names such as `user.*` or `blocks.1.*`: each user
    trains its own, and keeps them."""
    on_device_lr: Rate = 0.1
    """Learning rate of these parameters in local steps."""
    norm_bound: Rate | Literal["median"] | None = None
    """Updates whose L2 norm is larger are scaled down to it: a number, or the median of the round's norms (Sun et al.,
    arXiv 1911.07963). For `mean`, where some clients may be hostile."""
    shards: Literal["sum", "users"] = "sum"
    """What a node that hosts several users replies: the weighted sum of their updates, or each of them."""
    replies: RepliesConfig = RepliesConfig()
    """Which replies a round waits for."""
    optimizer: OptimizerConfig = FedAdam(kind="fedadam")
    """The server's step."""

    def mean_cohort(self, users: int) -> float:
        """Users of a round on average, of so many that may train."""
        size = min(self.cohort, users)
        return users / -(-users // size) if self.sampling == "passes" else size


class FineTuning(Section):
    """Local training before a user is recommended to: of a copy, which is thrown away."""

    parameters: Annotated[tuple[str, ...], Field(min_length=1)] = ("user.*", "norm.*")
    """Which parameters, by patterns of their names; the item table never."""
    steps: Positive = 5
    """SGD steps on the user's training events."""
    lr: Rate = 0.1
    """Learning rate."""


class EvaluationConfig(Section):
    """Federated ranking of each user's held-out item against the whole catalogue."""

    every: Positive = 10
    """Rounds between validations."""
    patience: Positive | None = None
    """Stop after so many validations in a row without a better NDCG@10; `null` runs all rounds."""
    users: Positive | None = None
    """Validate on so many users, drawn anew each time; `null` means all."""
    test_users: Positive | None = None
    """Test on so many users, drawn once; `null` means all, as papers do. For very large populations."""
    cutoffs: tuple[Positive, ...] = Field(default=(5, 10, 20), min_length=1)
    """K of HR@K and NDCG@K."""
    sampled: Positive | None = None
    """Also rank against so many sampled negatives, printed apart as `hr@10|s99`; for old comparisons only."""
    fine_tune: FineTuning | None = None
    """Also rank with weights that each device has fine-tuned for its user; figures are printed apart, `|personal`."""
    new_place: Annotated[int, Field(ge=2)] | None = None
    """With `data.cold`: in tests and recommendations the best item that training never saw stands at this place at the
    latest; all of them are lifted by so much. With `null` they stand where their scores put them."""
    privacy: Literal["noised", "public-holdout", "unaccounted"] = "noised"
    """Under a privacy mode, what metrics may look at. `noised`: one noised histogram of ranks per ranking, paid for.
    `public-holdout`: users who never train. `unaccounted`: as they are; for simulations only, and marked so."""
    noise: Rate = 30.0
    """Standard deviation of the noise on each count of the histogram, in users."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the users that are public, for `public-holdout`."""
    resamples: Annotated[int, Field(ge=100)] = 1000
    """Bootstrap resamples over users behind each 95 % interval."""


class RuntimeConfig(Section):
    """Speed and place. Only `engine` and `threads` can touch a result, and only the last bits of its sums."""

    engine: Literal["vectorized", "sequential", "ray"] = "vectorized"
    """`vectorized`: the cohort of a round at once. `sequential`: user by user through the Flower ClientApp. `ray`:
    Flower's simulation engine, one node per user (needs the `ray` extra)."""
    workers: Natural = 0
    """Worker processes that share a `vectorized` cohort, one core each; 0 trains in the main process."""
    ray_address: str | None = None
    """Put the workers on this Ray cluster, such as `auto` (needs the `ray` extra); `null` means this machine."""
    threads: Positive | None = None
    """Threads of torch in the main process; `null` means all cores."""
    memory_mb: Annotated[int, Field(ge=64)] = 1024
    """Bound on the scores held at once while ranking."""
    checkpoint_every: Positive = 10
    """Rounds between checkpoints."""
    checkpoints: Positive = 2
    """Checkpoints kept; an older one serves where the newest is damaged."""

    @model_validator(mode="after")
    def _heard(self) -> "RuntimeConfig":
        if self.workers and self.engine != "vectorized":
            raise ValueError(f"workers serve the vectorized engine only, not {self.engine}")
        if self.ray_address and not self.workers:
            raise ValueError("ray_address needs workers: say how many")
        return self


class Experiment(Section):
    """One experiment, from data to evaluation."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    """Short name; run directories carry it."""
    seed: Natural = 0
    """Seed of every draw of the run (not of synthetic data, which has its own)."""
    data: DataConfig
    """Where the behaviour sequences come from."""
    model: ModelConfig = ModelConfig()
    """The shared recommender."""
    loss: LossConfig = SoftmaxLoss(kind="softmax")
    """What the clients minimise."""
    federation: FederationConfig = FederationConfig()
    """Rounds, cohort, local training, server step."""
    privacy: PrivacyConfig = NoPrivacy()
    """What is promised to whom, and at what price."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How quality is measured."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Engine, threads, memory."""

    @property
    def told_as_is(self) -> bool:
        """Whether ranks and raw events may be looked at beside what a privacy mode releases."""
        return self.privacy.kind == "none" or self.evaluation.privacy == "unaccounted"

    @model_validator(mode="after")
    def _sections_agree(self) -> "Experiment":
        check(self)
        return self


def digest(value: object, length: int = 16) -> str:
    """First `length` hexadecimal digits of the sha256 of a JSON-able value, with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def experiment_hash(experiment: Experiment) -> str:
    """Fingerprint of everything that can change a result: all sections but `runtime`."""
    return digest(experiment.model_dump(mode="json", exclude={"runtime"}))
