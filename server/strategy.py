"""The one Strategy: sample users, send, check, aggregate, step; and federated full ranking.

It reads like the algorithm: `configure_train` is what the server says, `aggregate_train` what it makes of the answers
(McMahan et al., AISTATS 2017; Reddi et al., ICLR 2021).
"""

from collections.abc import Iterable
from contextlib import suppress

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, MetricRecordValues, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from common.config import Experiment, experiment_hash
from common.metrics import point
from common.models.weights import Weights
from common.timing import phase
from common.wire import METRICS, MODEL, ROUND, number, pack, payload_bytes, record, whole_number
from server.aggregation import admit, one_line, weigh, weighted_sum
from server.optimizers import ServerOptimizer, mean_of
from server.roster import Roster, messages
from server.sampling import cohort, some_users


class FederatedRanking(Strategy):
    """Federated training of a recommender, one user per client.

    Parameters
    ----------
    experiment : Experiment
        Sampling, weighting, optimiser, cutoffs, seed.
    roster : Roster
        Which node hosts which user.
    weights : Weights
        The global weights; stepped in place.
    """

    def __init__(self, experiment: Experiment, roster: Roster, weights: Weights):
        self.experiment = experiment
        self.roster = roster
        self.weights = weights
        self.optimizer = ServerOptimizer(experiment.federation.optimizer, weights)
        self.fingerprint = experiment_hash(experiment)
        self.rejections: dict[str, int] = {}
        """Reasons for the replies left out of the last round or ranking, and how many each."""

    def arrays(self) -> ArrayRecord:
        """The global weights as they travel: a copy, since steps are made in place while replies may still wait."""
        return pack(Weights(*(part.clone() for part in self.weights)))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each user sampled in this round."""
        users = cohort(self.experiment.federation, self.roster.population, self.experiment.seed, server_round)
        return messages(self.roster, users, self._content(server_round, arrays, config), "train", server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Step along the mean of the updates that pass the check; with none, the model stays as it is."""
        with phase("checking"):
            good, rejected = admit(replies, self.weights, self.roster)
        self.rejections = dict(rejected)
        importance = weigh(good, self.experiment.federation)
        metrics: dict[str, MetricRecordValues] = {"clients": len(good), "rejected": sum(rejected.values())}
        if importance.sum() > 0:
            with phase("summing"):
                total = weighted_sum(good, importance, self.weights)
            with phase("stepping"):
                self.optimizer.step(mean_of(total, float(importance.sum())))
            metrics["loss"] = float(np.average([reply.loss for reply in good], weights=importance))
            metrics["bytes_up_per_client"] = float(np.mean([reply.bytes for reply in good]))
        return self.arrays(), MetricRecord(metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each user that ranks, made as they are taken."""
        evaluation, population, seed = self.experiment.evaluation, self.roster.population, self.experiment.seed
        if config["split"] == "test":
            users = some_users(evaluation.test_users, population, seed, "test-users", 0)
        else:
            users = some_users(evaluation.users, population, seed, "validation-users", server_round)
        return messages(self.roster, users, self._content(server_round, arrays, config), "evaluate", server_round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Global ranking quality."""
        ranks = self.ranks(replies)
        return MetricRecord({**self.quality(ranks)}) if np.isfinite(ranks[0]).any() else None

    def ranks(self, replies: Iterable[Message]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Full and sampled rank by user, ``(N,)`` each; NaN where a user did not or could not rank.

        A reply with an error, an unknown user or an impossible rank counts as none; errors are counted in `rejections`.
        """
        full, sampled = (np.full(self.roster.population, np.nan) for _ in range(2))
        self.rejections = {}
        for reply in replies:
            if reply.has_error():
                reason = one_line(reply.error.reason)
                self.rejections[reason] = self.rejections.get(reason, 0) + 1
                continue
            with suppress(KeyError, TypeError):  # what is no number is no rank
                said = record(reply.content, METRICS, MetricRecord)
                user, rank = whole_number(said, "user"), number(said, "rank")
                if self.roster.hosts(reply.metadata.src_node_id, user) and 1 <= rank <= self.roster.items:
                    full[user] = rank
                    few = number(said, "rank_sampled")
                    sampled[user] = few if 1 <= few <= self.roster.items else np.nan
        return full, sampled

    def quality(self, ranks: tuple[NDArray[np.float64], NDArray[np.float64]]) -> dict[str, float]:
        """Metrics of ranks; those of sampled ranks under their own names, such as ``hr@10|s99``."""
        cutoffs = sorted({10, *self.experiment.evaluation.cutoffs})
        figures = point(ranks[0], cutoffs)
        if self.experiment.evaluation.sampled:
            suffix = f"|s{self.experiment.evaluation.sampled}"
            figures |= {name + suffix: value for name, value in point(ranks[1], cutoffs).items()}
        return figures

    def bytes_down(self) -> int:
        """Bytes that each client receives in a round."""
        return payload_bytes(self.arrays())

    def summary(self) -> None:
        """Nothing to say here; the round loop reports to its observer."""

    def _content(self, round_: int, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        told = ConfigRecord({"round": round_, "experiment": self.fingerprint, **config})
        return RecordDict({MODEL: arrays, ROUND: told})
