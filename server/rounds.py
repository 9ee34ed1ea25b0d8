"""The round loop: the one place for progress, validation, early stop and checkpoints.

Flower's own `Strategy.start` always begins at round 1 and can do none of these; its Strategy interface stays.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from common import timing
from common.config import Experiment, experiment_hash
from common.errors import BudgetSpent, Interrupted, StateError, TooFewNodes
from common.files import write_json
from common.metrics import Ranking
from common.models.weights import Weights, initialise
from common.timing import phase
from server import checkpoint
from server.checkpoint import State
from server.curator import curator as curator_of
from server.exchange import answered, exchange
from server.journal import Observer, journal
from server.ledger import RANKING, UPDATE
from server.roster import Roster
from server.strategy import FederatedRanking

SELECT = "ndcg@10"
"""Validation figure that chooses the round."""
CHECKPOINT_FILE, MODEL_FILE, CARD_FILE = "checkpoint.safetensors", "model.safetensors", "privacy.json"
LOOK = 2.0
"""Seconds between two looks for nodes that are missed."""
RANKING_SLICE = 8192
"""Users that are asked for a rank at once, so that memory does not grow with the population."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run gives."""

    weights: Weights
    """Weights of the round that validation chose."""
    rounds: int
    """Rounds done."""
    best_round: int
    """The chosen one."""
    test: Ranking
    """Test ranks by user, NaN where there is none; for those who may see it."""
    tested: int
    """Users who were asked for their test rank and answered."""
    figures: dict[str, float]
    """Test figures as the privacy mode lets them be told."""
    card: dict[str, Any]
    """What was promised and what it has cost."""
    bytes_down: int
    """Bytes that each client received in a round."""
    catalogue: str = ""
    """Version of the catalogue that the model is of."""


def never() -> bool:
    """Nobody asks the run to stop."""
    return False


def serve(
    grid: Grid,
    experiment: Experiment,
    folder: Path | None,
    observe: Observer,
    *,
    resume: bool = False,
    stopping: Callable[[], bool] = never,
) -> Outcome:
    """Train to the end, choose by validation, and read the test split once.

    Parameters
    ----------
    grid : Grid
        Carries messages to the clients.
    experiment : Experiment
        What to run.
    folder : Path, optional
        Where checkpoints, metrics and the model go; none are written without it.
    observe : Observer
        Told of each round.
    resume : bool
        Go on from the folder's checkpoint; with none there, from the start.
    stopping : callable
        Asked after each round whether to stop there.

    Raises
    ------
    Interrupted
        Where `stopping` said so; a checkpoint of the last round is in the folder.
    StateError
        Where the checkpoint is unusable or nothing can be written; where a run would go on whose devices have
        forgotten what stays with them.
    """
    terms = experiment.federation.replies
    roster = Roster.discover(grid, experiment_hash(experiment), terms.wait, terms.quorum, terms.deadline)
    state = _start(experiment, roster, folder, resume)
    if state.round and experiment.federation.on_device and roster.online is not None:
        raise StateError(
            "federation.on_device: to Flower a resumed run is another one, of which devices keep nothing; start anew"
        )
    curator = curator_of(experiment, roster.population, roster.items, folder)
    curator.clip = state.clip or curator.clip
    curator.replayed(state.round)
    strategy = FederatedRanking(experiment, roster, state.weights, curator)
    strategy.optimizer.load(state.optimizer)
    record = journal(folder, observe, state.round)
    last, every = experiment.federation.rounds, experiment.evaluation.every

    def keep() -> None:
        if folder:
            kept = replace(state, optimizer=strategy.optimizer.state())
            checkpoint.save(folder / CHECKPOINT_FILE, kept, experiment)

    spent = False
    while state.round < last and not _worn_out(experiment, state):
        spent = not curator.affords(UPDATE)
        if spent:
            keep()
            break
        try:
            line = counted_round(grid, strategy, state.round + 1, record)
        except TooFewNodes:
            keep()
            raise
        state.round += 1
        record(line)
        state.clip = curator.clip
        if (state.round % every == 0 or state.round == last) and curator.affords(RANKING):
            record(_validate(grid, strategy, state))
        stop = stopping()
        due = state.round % experiment.runtime.checkpoint_every == 0
        if stop or due or state.round == last or _worn_out(experiment, state):
            keep()
        if stop and state.round < last:
            raise Interrupted(f"stopped after round {state.round} of {last}")
    return _concluded(grid, strategy, state, folder, spent)


def _concluded(grid: Grid, strategy: FederatedRanking, state: State, folder: Path | None, spent: bool) -> Outcome:
    """Write the chosen model, and read the test split with it."""
    experiment, roster, curator = strategy.experiment, strategy.roster, strategy.curator
    chosen = state.weights if state.best is None else state.best
    if folder:
        checkpoint.save_model(folder / MODEL_FILE, chosen, experiment)
    best_round = state.round if state.best is None else state.best_round
    judge = FederatedRanking(experiment, roster, chosen, curator)
    numbers = sum(part.numel() for part in chosen)
    if spent or not curator.affords(RANKING):
        _tell_card(folder, curator.card(numbers))
        raise BudgetSpent(
            f"the privacy budget is spent after round {state.round} of {experiment.federation.rounds}; "
            f"the model of round {best_round} is kept" + (f" in {folder}" if folder else "")
        )
    gather(grid, judge)
    test, _ = _rank(grid, judge, best_round, "test")
    if judge.rejections and not np.isfinite(test.full).any():
        raise StateError(f"nobody could rank the test item: {', '.join(judge.rejections)}")
    figures = judge.quality(test, best_round)
    _tell_card(folder, curator.card(numbers))
    card, down = curator.card(numbers), strategy.bytes_down()
    return Outcome(chosen, state.round, best_round, test, judge.asked, figures, card, down, roster.catalogue)


def _tell_card(folder: Path | None, facts: dict[str, Any]) -> None:
    if folder:
        write_json(folder / CARD_FILE, facts)


def _start(experiment: Experiment, roster: Roster, folder: Path | None, resume: bool) -> State:
    if not (resume and folder and checkpoint.found(folder / CHECKPOINT_FILE)):
        return State(initialise(experiment.model, roster.rows, experiment.seed))
    state = checkpoint.load_newest(folder / CHECKPOINT_FILE, experiment)
    if len(state.weights.table) != roster.rows:
        raise StateError(f"{folder}: the checkpoint has {len(state.weights.table)} rows, the data {roster.rows}")
    return state


def _worn_out(experiment: Experiment, state: State) -> bool:
    patience = experiment.evaluation.patience
    return patience is not None and state.stale >= patience


def gather(grid: Grid, strategy: FederatedRanking) -> None:
    """See which nodes are there, and wait while they host too few users.

    Raises
    ------
    TooFewNodes
        Where they still do after `federation.replies.wait`.
    """
    terms, roster = strategy.experiment.federation.replies, strategy.roster
    end = time.monotonic() + terms.wait
    roster.refresh(grid, strategy.fingerprint, terms.deadline)
    while roster.share < terms.quorum:
        if time.monotonic() >= end:
            raise TooFewNodes(
                f"nodes of {roster.share:.0%} of the users are there, fewer than federation.replies.quorum "
                f"({terms.quorum:.0%}), after {terms.wait:.0f} s"
            )
        time.sleep(min(LOOK, terms.wait))
        roster.refresh(grid, strategy.fingerprint, terms.deadline)


def counted_round(
    grid: Grid, strategy: FederatedRanking, round_: int, record: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """A round of training that counts; those that do not are told, and repeated with the same users and draws.

    Raises
    ------
    TooFewNodes
        Where nodes are missing for longer than `federation.replies.wait`.
    """
    wait = strategy.experiment.federation.replies.wait
    end = None
    while True:
        gather(grid, strategy)
        line = train_round(grid, strategy, round_)
        if "void" not in line:
            return line
        record(line)
        end = end or time.monotonic() + wait
        if time.monotonic() >= end:
            raise TooFewNodes(f"in round {round_} too few nodes answered in time, again and again for {wait:.0f} s")
        time.sleep(min(LOOK, wait))


def train_round(grid: Grid, strategy: FederatedRanking, round_: int) -> dict[str, Any]:
    """One whole round of training; its line for `metrics.jsonl`, ``void`` where too few nodes answered."""
    began, _ = time.perf_counter(), timing.drain()
    terms = strategy.experiment.federation.replies
    with phase("asking"):
        messages = list(strategy.configure_train(round_, strategy.arrays(), ConfigRecord(), grid))
    with phase("answering"):
        replies = answered(exchange(grid, messages, terms.deadline))
    gone = len(messages) - len({reply.metadata.reply_to_message_id for reply in replies})
    void = gone > (1 - terms.quorum) * len(messages) + 1e-9 and not strategy.curator.noised
    metrics = {"void": 1} if void else strategy.aggregate_train(round_, replies)[1]
    facts: dict[str, Any] = {"round": round_, "kind": "void" if void else "train", **(metrics or {})} | (
        {"lost": gone} if gone and strategy.curator.tells_all else {}
    )
    if strategy.roster.refused and strategy.curator.tells_all:
        facts |= {"refused_nodes": dict(Counter(strategy.roster.refused.values()))}
    return facts | _told(strategy, {"seconds": time.perf_counter() - began, "phases": timing.drain()})


def _validate(grid: Grid, strategy: FederatedRanking, state: State) -> dict[str, Any]:
    """A validation; one that too few nodes answered chooses nothing, and does not count as one without progress."""
    began = time.perf_counter()
    ranks, lost = _rank(grid, strategy, state.round, "validation")
    figures = strategy.quality(ranks, state.round)
    # Where parameters stay on devices nobody uses the model without them; with noised metrics only it is told of.
    kept = bool(strategy.experiment.federation.on_device)
    chosen = f"{SELECT}|personal" if kept and f"{SELECT}|personal" in figures else SELECT
    if lost > 1 - strategy.experiment.federation.replies.quorum + 1e-9 and not strategy.curator.noised:
        pass
    elif figures[chosen] > state.best_value:
        state.best = Weights(*(part.clone() for part in state.weights))
        state.best_round, state.best_value, state.stale = state.round, figures[chosen], 0
    else:
        state.stale += 1
    users = int(np.isfinite(ranks.full).sum()) if strategy.curator.tells_all else strategy.asked
    facts = {"round": state.round, "kind": "validation", **figures, "users": users}
    if lost and strategy.curator.tells_all:
        facts["lost_share"] = lost
    return facts | _told(strategy, {"seconds": time.perf_counter() - began})


def _told(strategy: FederatedRanking, timed: dict[str, Any]) -> dict[str, Any]:
    """How long it took and why replies were left out, where that may be told: both hang on who took part."""
    if not strategy.curator.tells_all:
        return {}
    return timed | ({"reasons": strategy.rejections} if strategy.rejections else {})


def _rank(grid: Grid, strategy: FederatedRanking, round_: int, split: str) -> tuple[Ranking, float]:
    """Ranks by user, and the share of the nodes asked that did not answer in time."""
    messages = iter(strategy.configure_evaluate(round_, strategy.arrays(), ConfigRecord({"split": split}), grid))
    slices = iter(lambda: list(islice(messages, RANKING_SLICE)), [])
    deadline = strategy.experiment.federation.replies.deadline
    sent, came = 0, 0

    def replies() -> Iterator[Message]:
        nonlocal sent, came
        for part in slices:
            found = answered(exchange(grid, part, deadline))
            sent += len(part)
            came += len({reply.metadata.reply_to_message_id for reply in found})
            yield from found

    ranks = strategy.ranks(replies())
    return ranks, 1 - came / sent if sent else 1.0
