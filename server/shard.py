"""The reply of a node that hosts several users, taken apart into theirs."""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from numpy.typing import NDArray

from common.config import FederationConfig
from common.errors import StateError
from common.models.weights import Weights
from common.wire import LARGEST, METRICS, RANKS, ROUND, UPDATE, number, of_user, record, whole_numbers
from server.aggregation import (
    Explicit,
    Facts,
    Reply,
    check,
    check_numbers,
    checked,
    explicit,
    facts_of,
    norm,
    summed_numbers,
)
from server.exchange import Rejected, bounded, one_line
from server.robust import is_sparse
from server.roster import Roster

ROUNDING = 1 + 1e-4
"""How far above its bound single precision may put the norm of a sum of clipped updates."""


class Sum:
    """The weighted sum of the updates of a node's users, which is all that it has told of them.

    Parameters
    ----------
    update : Explicit
        The sum's numbers, checked.
    importance : ndarray
        What each of the users weighs in it, ``(C,)`` float32.
    """

    def __init__(self, update: Explicit, importance: NDArray[np.float32]):
        self._update, self._importance = update, importance
        self.counts = np.zeros(len(importance), dtype=np.int64)
        """Rows that each user sends; not known, and so 0."""
        self.whole = update.rows is None
        """Whether the sum is of whole tables."""

    @property
    def norms(self) -> NDArray[np.float64]:
        """For each user that of the mean, since single ones are not known, ``(C,)``."""
        return np.full(len(self), norm(self._update) / max(float(self._importance.sum()), 1e-12))

    def __len__(self) -> int:
        """Number of users."""
        return len(self._importance)

    def rows(self, i: int) -> NDArray[np.int32]:
        """Not known."""
        raise StateError("a node's sum says nothing of single users; set federation.shards=users")

    def one(self, i: int) -> Weights:
        """Not known."""
        raise StateError("a node's sum says nothing of single users; set federation.shards=users")

    def summed(self, importance: NDArray[np.float32]) -> tuple[NDArray[np.int64] | None, Weights]:
        """The sum, where the importance is that of all its users, or a multiple of it.

        Raises
        ------
        StateError
            Where it is another one.
        """
        scale = np.float32(importance.sum() / max(self._importance.sum(), 1e-12))
        if not np.allclose(importance, scale * self._importance, rtol=1e-5):
            raise StateError("a node's sum has other weights than the server wants; set federation.shards=users")
        return summed_numbers(self._update, float(scale))


class Terms(NamedTuple):
    """What the replies of a round are held against."""

    weights: Weights
    roster: Roster
    federation: FederationConfig
    silent: bool = False
    bound: float | None = None
    """Clipping norm that the users were told."""


def take_apart(message: Message, terms: Terms) -> tuple[list[Reply], Counter[str]]:
    """Replies of the users of a node, and how many were left out for each reason.

    Parameters
    ----------
    message : Message
        A train reply to a message that named users.
    terms : Terms
        What it must agree with.

    Raises
    ------
    Rejected
        Where the whole of it is worth nothing, which costs all users of the node their part in this round.
    """
    if message.has_error():
        raise Rejected(f"refused: {one_line(message.error.reason)}")
    node = message.metadata.src_node_id
    try:
        facts, rejected = _said(message, terms)
        named = terms.federation.shards == "users"
        names = [of_user(UPDATE, each.user) for each in facts] if named else [UPDATE] * bool(facts)
        arrays = [record(message.content, name, ArrayRecord) for name in names]
        updates = [explicit(each) for each in arrays]
        sizes = [update.size for update in updates]
    except Exception as fault:  # as in `server.aggregation.check`
        raise Rejected(f"malformed: {type(fault).__name__}") from fault
    if named:
        good = []
        for each, update, size in zip(facts, updates, sizes, strict=True):
            try:
                good.append(checked(each, update, size, node, terms.weights, terms.roster, terms.silent))
            except Rejected as verdict:
                rejected[str(verdict)] += 1
        return good, rejected
    if not facts:
        return [], rejected
    weighed = [each.events if terms.federation.weighting == "events" else 1 for each in facts]
    if not all(0 <= weight < 2**31 for weight in weighed):
        raise Rejected("impossible event count or loss")
    check_numbers(updates[0], terms.weights, LARGEST * max(1, sum(weighed)))
    if terms.bound is not None and norm(updates[0]) > len(facts) * terms.bound * ROUNDING:
        raise Rejected("a node's sum passes what its users may add")
    source, size = Sum(updates[0], np.array(weighed, dtype=np.float32)), sizes[0] // len(facts)
    replies = [
        checked(each, (source, i), size, node, terms.weights, terms.roster, terms.silent)
        for i, each in enumerate(facts)
    ]
    return replies, rejected


def admit(
    replies: Iterable[Message], terms: Terms, asked: Collection[int] | None = None, round_: int | None = None
) -> tuple[list[Reply], Counter[str]]:
    """Checked replies of a round in the order of their users, and how many were left out for each reason.

    Parameters
    ----------
    replies : iterable of Message
        Of single users, and of nodes that host several.
    terms : Terms
        What they must agree with.
    asked : collection of int, optional
        The users of this round; others are not heard.
    round_ : int, optional
        Its number, which each reply must carry.
    """
    good: dict[int, Reply] = {}
    rejected: Counter[str] = Counter()
    for message in replies:
        try:
            if round_ is not None and not message.has_error() and message.metadata.group_id != str(round_):
                raise Rejected("of another round")
            shared, node = terms.roster.shared(message.metadata.src_node_id), message.metadata.src_node_id
            if terms.roster.online is not None and not message.has_error():
                users = len(terms.roster.answers[node].users) if shared else 1
                updates = users if terms.federation.shards == "users" else 1
                numbers = terms.weights.table.numel() + terms.weights.body.numel() + len(terms.weights.table)
                bounded(message.content, users, updates * numbers)
            if shared:
                found, left_out = take_apart(message, terms)
            else:
                found, left_out = [check(message, terms.weights, terms.roster, terms.silent)], Counter()
            if terms.federation.aggregation.kind != "mean" and any(map(is_sparse, found)):
                raise Rejected("only some rows of the item table")
            if any(reply.user in good for reply in found):
                raise Rejected("second reply of one user")
            if asked is not None and any(reply.user not in asked for reply in found):
                raise Rejected("was not asked in this round")
            good |= {reply.user: reply for reply in found}
            rejected += left_out
        except Rejected as verdict:
            rejected[str(verdict)] += 1
    return [good[user] for user in sorted(good)], rejected


def ranks_of(message: Message) -> list[tuple[int, tuple[float, ...]]]:
    """User and ranks by `common.wire.RANKS`, NaN where there is none, of all that a node's reply ranks.

    Raises
    ------
    KeyError, TypeError
        Where the reply holds something else.
    """
    metrics = record(message.content, METRICS, MetricRecord)
    if "rank" not in metrics:  # nobody here has an item held out
        return []
    users = whole_numbers(metrics, "user")
    none = [float("nan")] * len(users)
    columns = [list(metrics[name]) if name in metrics else none for name in RANKS]  # type: ignore[arg-type]
    if any(len(column) != len(users) or any(type(rank) is not float for rank in column) for column in columns):
        raise TypeError("ranks are not one number a user")
    return [(user, tuple(ranks)) for user, *ranks in zip(users, *columns, strict=True)]


def refusals(message: Message, most: int) -> Counter[str]:
    """Why users of a node were left out by it, and how many, at the most all of them.

    Raises
    ------
    KeyError, TypeError
        Where the reply holds something else.
    """
    told = record(message.content, ROUND, ConfigRecord)
    reasons, times = told["reasons"], told["times"]
    if not isinstance(reasons, list) or not isinstance(times, list) or len(reasons) != len(times):
        raise TypeError("reasons and their numbers are no two lists")
    counts = [each for each in times if type(each) is int and each > 0]
    if len(counts) < len(times) or sum(counts) > most:
        raise TypeError("more refusals than users")
    found: Counter[str] = Counter()
    for reason, count in zip(reasons, counts, strict=True):
        found[f"refused: {one_line(str(reason))}"] += count
    return found


def _said(message: Message, terms: Terms) -> tuple[list[Facts], Counter[str]]:
    metrics = record(message.content, METRICS, MetricRecord)
    node = terms.roster.answers[message.metadata.src_node_id]
    if not metrics:
        return [], refusals(message, len(node.users))
    users = whole_numbers(metrics, "user")
    columns = {name: list(values) for name, values in metrics.items()}  # type: ignore[arg-type]
    if any(len(column) != len(users) for column in columns.values()):
        raise TypeError("lists of different lengths")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for row in rows:
        for name in row:
            number(row, name)
    return [facts_of(row, terms.silent) for row in rows], refusals(message, len(node.users) - len(users))
