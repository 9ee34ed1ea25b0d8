"""Which node hosts which users; the server knows users by opaque numbers only."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import StateError, TooFewNodes
from common.wire import METRICS, ROUND, record, whole_number
from server.exchange import Rejected, answered, bounded, exchange, one_line

ABSENT = 0
"""Node of a user whose node never came; Flower gives no node that number."""
NOBODY = 30.0
"""Seconds that others are waited for where all nodes that are there refuse."""
PATIENCE, AGAIN = 60.0, 30.0
"""Seconds until a node is taken for quiet; and until it is asked again, each time twice as many."""
MOST_USERS, MOST_ROWS = 10_000_000, 2**31
"""Largest population and table that a node may claim."""


class Answer(NamedTuple):
    """What a node says of itself."""

    node: int
    users: range
    population: int
    items: int
    catalogue: str
    rows: int

    @property
    def world(self) -> tuple[str, int, int, int]:
        """What all nodes of a run must agree on."""
        return self.catalogue, self.items, self.rows, self.population


@dataclass
class Roster:
    """Users, the nodes they live on, and the size of the catalogue that these agree on."""

    nodes: Sequence[int]
    """Node of user i at position i, `ABSENT` where there is none; a `range` where a process plays a large population.
    """
    items: int
    """Size of the catalogue."""
    catalogue: str = ""
    """Its version."""
    answers: dict[int, Answer] = field(default_factory=dict)
    """By node; none where one answer was enough."""
    refused: dict[int, str] = field(default_factory=dict)
    """Nodes that stay out, and why."""
    online: frozenset[int] | None = None
    """Nodes that are there at the moment; none where all always are."""
    quiet: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Nodes that did not say anything: when they are asked again, and how long after that once more."""
    rows: int = 0
    """Rows of the model's table: as many as items, unless these are built from their features."""

    @property
    def population(self) -> int:
        """Number of users."""
        return len(self.nodes)

    def hosts(self, node: int, user: int) -> bool:
        """Whether a user lives on a node; nobody may speak for another."""
        return 0 <= user < self.population and self.nodes[user] == node != ABSENT

    def shared(self, node: int) -> bool:
        """Whether a node hosts several users."""
        return node in self.answers and len(self.answers[node].users) > 1

    def present(self, users: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of some users whose node is there."""
        if self.online is None:
            return users
        return users[np.isin(self._places[users], np.array(list(self.online), dtype=np.uint64))]

    @property
    def _places(self) -> NDArray[np.uint64]:
        return np.array(self.nodes, dtype=np.uint64)  # Flower draws node ids from all of 64 bits

    @property
    def share(self) -> float:
        """Share of the users whose node is there."""
        if self.online is None:
            return 1.0
        return len(self.present(np.arange(self.population))) / max(self.population, 1)

    @classmethod
    def discover(
        cls, grid: Grid, fingerprint: str, wait: float = 60.0, quorum: float = 1.0, timeout: float = 600.0
    ) -> "Roster":
        """Ask the nodes who lives there.

        A Grid whose node ids are a `range` hosts user i on its i-th node by construction; one answer is enough then.

        Parameters
        ----------
        grid : Grid
            Where the nodes are.
        fingerprint : str
            Hash of the experiment, for the clients to compare with theirs.
        wait : float
            Seconds that missing users are waited for.
        quorum : float
            Share of the users that must be there at last.
        timeout : float
            Seconds until a node's answer is not waited for.

        Raises
        ------
        StateError
            Where no node comes, or none gives an answer that makes sense.
        TooFewNodes
            Where too few users are there.
        """
        began, nodes = time.monotonic(), _settled(grid, wait)
        if not nodes:
            raise StateError(f"no node came within {wait:.0f} s")
        if isinstance(nodes, range):
            answers, refused = ask(grid, nodes[:1], fingerprint, timeout)
            if not answers:
                reason = next(iter(refused.values()), "it did not say anything")
                raise StateError(f"no node could say who lives there: {reason}")
            return cls(nodes, answers[0].items, answers[0].catalogue, rows=answers[0].rows)
        roster = cls([], 0, online=frozenset())
        roster.meet(grid, nodes, fingerprint, timeout)
        while roster.share < 1 and time.monotonic() - began < (wait if roster.answers else min(wait, NOBODY)):
            time.sleep(0.5)
            roster.refresh(grid, fingerprint, timeout)
        reasons = Counter([*roster.refused.values(), *["did not say who lives there"] * len(roster.quiet)])
        if not roster.answers:
            raise StateError(f"no node could say who lives there: {', '.join(list(reasons)[:3])}")
        if roster.share < quorum:
            why = "".join(f"; left out: {reason} ({n})" for reason, n in reasons.most_common(3))
            raise TooFewNodes(
                f"nodes of {roster.share:.0%} of the users came within {wait:.0f} s, not {quorum:.0%}{why}"
            )
        return roster

    def refresh(self, grid: Grid, fingerprint: str, timeout: float) -> None:
        """See who is there now, and ask those who never were before."""
        if self.online is None:
            return
        nodes, now = list(grid.get_node_ids()), time.monotonic()
        strangers = [node for node in nodes if node not in self.answers and node not in self.refused]
        if new := [node for node in strangers if self.quiet.get(node, (now, 0.0))[0] <= now]:
            self.meet(grid, new, fingerprint, timeout)
        self.online = frozenset(nodes)

    def meet(self, grid: Grid, nodes: Sequence[int], fingerprint: str, timeout: float) -> None:
        """Ask new nodes who lives there, and take in those that agree with the others."""
        answers, refused = ask(grid, nodes, fingerprint, min(timeout, PATIENCE))
        self.online = (self.online or frozenset()) | frozenset(nodes)
        self.refused |= refused
        for node in set(nodes) - refused.keys() - {answer.node for answer in answers}:
            pause = 2 * self.quiet[node][1] if node in self.quiet else AGAIN
            self.quiet[node] = time.monotonic() + pause, pause
        for answer in answers:
            self.quiet.pop(answer.node, None)
        if not answers:
            return
        if not self.answers:  # what most nodes say of all that are there at the start
            world = Counter(answer.world for answer in answers).most_common(1)[0][0]
            self.catalogue, self.items, self.rows, population = world
            self.nodes = [ABSENT] * population
        else:
            world = next(iter(self.answers.values())).world
        places, taken = self._places, Counter(u for a in answers if a.world == world for u in a.users)
        for answer in answers:
            if answer.world != world:
                refused[answer.node] = "another catalogue or population than most"
            elif any(taken[user] > 1 for user in answer.users) or (places[np.array(answer.users)] != ABSENT).any():
                refused[answer.node] = "hosts users that another node hosts, too"
            else:
                self.answers[answer.node] = answer
        for node in self.answers.keys() & {answer.node for answer in answers}:
            places[np.array(self.answers[node].users)] = node
        self.nodes = places.tolist()
        self.refused |= refused


def ask(grid: Grid, nodes: Sequence[int], fingerprint: str, timeout: float) -> tuple[list[Answer], dict[int, str]]:
    """Answers of nodes in their order, and why others refuse; of the rest nothing was heard."""
    content = RecordDict({ROUND: ConfigRecord({"experiment": fingerprint})})
    said: dict[int, Answer | str] = {}
    for reply in answered(exchange(grid, [Message(content, node, "query") for node in nodes], timeout)):
        node = reply.metadata.src_node_id
        if reply.has_error():
            said[node] = one_line(reply.error.reason)
            continue
        try:
            bounded(reply.content, 1)
            said[node] = _read(node, reply.content)
        except Rejected as verdict:
            said[node] = str(verdict)
        except (KeyError, TypeError, ValueError) as fault:
            said[node] = f"nonsense when asked who lives there ({fault})"
    verdicts = {node: said[node] for node in nodes if node in said}
    refused = {node: verdict for node, verdict in verdicts.items() if isinstance(verdict, str)}
    return [verdict for verdict in verdicts.values() if isinstance(verdict, Answer)], refused


def _read(node: int, content: RecordDict) -> Answer:
    facts, told = record(content, METRICS, MetricRecord), record(content, ROUND, ConfigRecord)
    first, users, population = (whole_number(facts, name) for name in ("first", "users", "population"))
    if not (first >= 0 and users > 0 and first + users <= population <= MOST_USERS):
        raise ValueError(f"users {first} … {first + users - 1} of {population}")
    items, rows = whole_number(facts, "items"), whole_number(facts, "rows")
    if items < 1 or not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"{items} items of {rows} rows")
    return Answer(node, range(first, first + users), population, items, str(told["catalogue"])[:64], rows)


def _settled(grid: Grid, wait: float) -> Sequence[int]:
    """Node ids, once no new node has come for a while: under Flower's simulation they register one by one."""
    nodes = grid.get_node_ids()
    if isinstance(nodes, range):
        return nodes
    known: list[int] = list(nodes)
    quiet_since = start = time.monotonic()
    while time.monotonic() - quiet_since < 3 or (not known and time.monotonic() - start < wait):
        time.sleep(0.5)
        now = list(grid.get_node_ids())
        if len(now) != len(known):
            known, quiet_since = now, time.monotonic()
    return known


def messages(
    roster: Roster, users: NDArray[np.int64], content: RecordDict, kind: str, round_: int
) -> Iterator[Message]:
    """Messages for some users, made as they are taken: one each, but one for all who live on a shared node.

    Those for single users share their content, which nobody may write into.
    """
    group = str(round_)
    if not any(roster.shared(node) for node in roster.answers):
        yield from (Message(content, roster.nodes[user], kind, group_id=group) for user in users.tolist())
        return
    together: dict[int, list[int]] = {}
    for user in users.tolist():
        together.setdefault(roster.nodes[user], []).append(user)
    told = record(content, ROUND, ConfigRecord)
    for node, here in together.items():
        if roster.shared(node):
            own = RecordDict({**content, ROUND: ConfigRecord({**told, "users": here})})
            yield Message(own, node, kind, group_id=group)
        else:
            yield Message(content, node, kind, group_id=group)
