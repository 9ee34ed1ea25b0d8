"""Which node hosts which user; the server knows users by opaque numbers only."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import StateError
from common.wire import METRICS, ROUND, whole_number


@dataclass(frozen=True)
class Roster:
    """Users, the nodes they live on, and the size of the catalogue that these agree on."""

    nodes: Sequence[int]
    """Node of user i at position i; a `range` where a process plays a large population."""
    items: int
    """Size of the catalogue."""

    @property
    def population(self) -> int:
        """Number of users."""
        return len(self.nodes)

    def node_of(self, user: int) -> int:
        """Node that hosts a user."""
        return self.nodes[user]

    def hosts(self, node: int, user: int) -> bool:
        """Whether a user lives on a node; nobody may speak for another."""
        return 0 <= user < self.population and self.nodes[user] == node

    @classmethod
    def discover(cls, grid: Grid, fingerprint: str, wait: float = 60.0) -> "Roster":
        """Ask the nodes who lives there.

        A Grid whose node ids are a `range` hosts user i on its i-th node by construction; one answer is enough then.

        Parameters
        ----------
        grid : Grid
            Where the nodes are.
        fingerprint : str
            Hash of the experiment, for the clients to compare with theirs.
        wait : float
            Seconds until no further node is waited for, counted from the last one that appeared.

        Raises
        ------
        StateError
            Where no node answers, users are missing or twice, or catalogues differ.
        """
        nodes = _settled(grid, wait)
        if not nodes:
            raise StateError(f"no node came within {wait:.0f} s")
        asked = nodes[:1] if isinstance(nodes, range) else nodes
        content = RecordDict({ROUND: ConfigRecord({"experiment": fingerprint})})
        replies = list(grid.send_and_receive([Message(content, node, "query") for node in asked], timeout=600))
        failed = [reply for reply in replies if reply.has_error()]
        if failed:
            raise StateError(
                f"{len(failed)} of {len(asked)} nodes could not say who lives there: {failed[0].error.reason}"
            )
        if len(replies) < len(asked):
            raise StateError(f"{len(asked) - len(replies)} of {len(asked)} nodes did not say who lives there")
        try:
            said = [(reply.content.metric_records[METRICS], reply.metadata.src_node_id) for reply in replies]
            answers = {whole_number(facts, "user"): node for facts, node in said}
            catalogues = sorted({whole_number(facts, "items") for facts, _ in said})
        except (KeyError, TypeError) as fault:
            raise StateError(f"a node answered nonsense when asked who lives there ({fault})") from fault
        if len(catalogues) != 1:
            raise StateError(f"the nodes do not agree on one catalogue; sizes found: {catalogues}")
        if isinstance(nodes, range):
            return cls(nodes, catalogues[0])
        if sorted(answers) != list(range(len(asked))):
            raise StateError(f"{len(replies)} nodes answered with users {min(answers)} … {max(answers)}, not one each")
        return cls([answers[user] for user in range(len(answers))], catalogues[0])


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
    """One message per user, made as they are taken; all share one content, which nobody may write into."""
    return (Message(content, roster.node_of(user), kind, group_id=str(round_)) for user in users.tolist())
