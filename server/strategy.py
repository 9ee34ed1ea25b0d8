"""The one Strategy: sample users, send, check, aggregate, step; and federated full ranking.

It reads like the algorithm: `configure_train` is what the server says, `aggregate_train` what it makes of the answers
(McMahan et al., AISTATS 2017; Reddi et al., ICLR 2021).
"""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from math import isnan, nan

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, MetricRecordValues, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from common.config import Experiment, experiment_hash
from common.errors import StateError
from common.metrics import Ranking, point
from common.models.personal import kept_columns
from common.models.weights import Weights
from common.timing import phase
from common.wire import METRICS, MODEL, RANKS, ROUND, number, pack, payload_bytes, record, whole_number
from server.curator import Curator
from server.curator import curator as curator_of
from server.exchange import Rejected, bounded, one_line
from server.optimizers import ServerOptimizer
from server.roster import Roster, messages
from server.shard import Terms, admit, ranks_of, refusals

PATIENCE = 3
"""Rounds of refusals alone, from the first on, after which the experiment and not a client must be at fault."""


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
    curator : Curator, optional
        Decides what may be released and at what price; by default the experiment's, without a ledger on disk.
    """

    def __init__(self, experiment: Experiment, roster: Roster, weights: Weights, curator: Curator | None = None):
        self.experiment = experiment
        self.curator = curator or curator_of(experiment, roster.population, roster.items)
        self.roster = roster
        self.weights = weights
        self.optimizer = ServerOptimizer(experiment.federation.optimizer, weights)
        self.fingerprint = experiment_hash(experiment)
        self.rejections: dict[str, int] = {}
        """Reasons for the replies left out of the last round or ranking, and how many each."""
        self.asked = 0
        """Users who were asked for a rank and answered, be it with an error."""
        self.absent = 0
        """Users of the last cohort whose node was not there."""
        self._cohort: frozenset[int] | None = None
        self._judging: tuple[str, NDArray[np.bool_]] | None = None  # the round that is ranked for, and who was asked
        self._judged: Counter[int] = Counter()  # users asked for a rank on each node that hosts several
        self.heard = self.refused = 0  # replies that passed; rounds and rankings until then in which none did

    def arrays(self) -> ArrayRecord:
        """The global weights as they travel: a copy, since steps are made in place while replies may still wait."""
        return pack(Weights(*(part.clone() for part in self.weights)))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each user sampled in this round."""
        told = config if self.curator.clip is None else ConfigRecord({**config, "clip": self.curator.clip})
        chosen = self.curator.cohort(server_round)
        self.curator.foresee(server_round, sum(part.numel() for part in self.weights))
        users = self.roster.present(chosen)
        self.absent, self._cohort = len(chosen) - len(users), frozenset(users.tolist())
        return messages(self.roster, users, self._content(server_round, arrays, told), "train", server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Step along the mean of the updates that pass the check; with none, the model stays as it is."""
        with phase("checking"):
            curator, federation = self.curator, self.experiment.federation
            terms = Terms(self.weights, self.roster, federation, curator.silent, curator.clip)
            good, rejected = admit(replies, terms, self._cohort, server_round)
        self._note(rejected, len(good))
        with phase("summing"):
            update, told = self.curator.mean(server_round, good, self.weights)
        if update is not None:
            with phase("stepping"):
                # Noise, and whatever somebody sends there, shall not move what everybody keeps.
                update.body[kept_columns(self.experiment.model, federation.on_device)] = 0
                self.optimizer.step(update)
        metrics: dict[str, MetricRecordValues] = {**told}
        if self.curator.tells_all:
            metrics["rejected"] = sum(rejected.values())
            if self.absent:
                metrics["absent"] = self.absent
        return self.arrays(), MetricRecord(metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each user that ranks, made as they are taken."""
        users = self.roster.present(self.curator.judges(str(config["split"]), server_round))
        self._judging = str(server_round), np.zeros(self.roster.population, dtype=bool)
        self._judging[1][users] = True
        if self.roster.answers:
            self._judged = Counter(self.roster.nodes[user] for user in users.tolist())
        return messages(self.roster, users, self._content(server_round, arrays, config), "evaluate", server_round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Global ranking quality, as the curator lets it be told."""
        ranks = self.ranks(replies)
        return MetricRecord({**self.quality(ranks, server_round)}) if np.isfinite(ranks.full).any() else None

    def ranks(self, replies: Iterable[Message]) -> Ranking:
        """Ranks by user, ``(N,)`` each; NaN where a user did not or could not rank.

        A reply with an error, an unknown user or an impossible rank counts as none; errors are counted in `rejections`.
        """
        found = Ranking(*(np.full(self.roster.population, np.nan) for _ in RANKS))
        rejected: Counter[str] = Counter()
        self.asked = 0
        for reply in replies:
            node = reply.metadata.src_node_id
            shared = self.roster.shared(node)
            self.asked += self._judged[node] if shared else 1
            if reply.has_error():
                rejected[one_line(reply.error.reason)] += 1
                continue
            if self.roster.online is not None:
                try:
                    bounded(reply.content, self._judged[node] if shared else 1)
                except Rejected as verdict:
                    rejected[str(verdict)] += 1
                    continue
            if shared:
                with suppress(KeyError, TypeError):
                    rejected += refusals(reply, self._judged[node])
            if self._judging and reply.metadata.group_id != self._judging[0]:
                continue
            with suppress(KeyError, TypeError):  # what is no number is no rank
                for user, ranks in ranks_of(reply) if shared else [_ranks_of(reply)]:
                    if not (self.roster.hosts(node, user) and 1 <= ranks[0] <= self.roster.items):
                        continue
                    # Of those who were asked, and of each its first.
                    if (self._judging is None or self._judging[1][user]) and isnan(found.full[user]):
                        for kind, rank in zip(found, ranks, strict=True):
                            kind[user] = rank if 1 <= rank <= self.roster.items else np.nan
        self._note(rejected, self.asked - rejected.total())
        return found

    def quality(self, ranks: Ranking, round_: int) -> dict[str, float]:
        """Metrics of ranks; of others than the full ones under names of their own, such as ``hr@10|s99``."""
        cutoffs = sorted({10, *self.experiment.evaluation.cutoffs})
        figures = self.curator.figures(ranks.full, self.asked, round_, cutoffs)
        if self.experiment.evaluation.sampled and self.curator.tells_all:
            suffix = f"|s{self.experiment.evaluation.sampled}"
            figures |= {name + suffix: value for name, value in point(ranks.sampled, cutoffs).items()}
        if self.curator.tells_all and np.isfinite(ranks.personal).any():
            figures |= {f"{name}|personal": value for name, value in point(ranks.personal, cutoffs).items()}
        return figures

    def bytes_down(self) -> int:
        """Bytes that each client receives in a round."""
        return payload_bytes(self.arrays())

    def summary(self) -> None:
        """Nothing to say here; the round loop reports to its observer."""

    def _note(self, rejected: Counter[str], good: int) -> None:
        """Keep the reasons where they may be told; who was refused hangs on people's data."""
        self.heard += good
        self.refused += 0 if self.heard else bool(rejected)
        if self.refused == PATIENCE:
            raise StateError(f"for {PATIENCE} rounds every reply was refused: {', '.join(rejected)}")
        self.rejections = dict(rejected) if self.curator.tells_all else {}

    def _content(self, round_: int, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        told = ConfigRecord({"round": round_, "experiment": self.fingerprint, **config})
        return RecordDict({MODEL: arrays, ROUND: told})


def _ranks_of(reply: Message) -> tuple[int, tuple[float, ...]]:
    """User and ranks of a device's reply, NaN where there is none."""
    said = record(reply.content, METRICS, MetricRecord)
    others = (said.get(name) for name in RANKS[1:])
    rest = (rank if isinstance(rank, int | float) else nan for rank in others)
    return whole_number(said, "user"), (number(said, RANKS[0]), *rest)
