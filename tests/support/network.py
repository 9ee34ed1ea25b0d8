"""Nodes that are reached as over a network: odd ids, everything as bytes, and all that can happen to a reply."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as Proto
from flwr.server.utils.validator import validate_message
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from client import accounts, device
from client.accounts import STATE_PATH
from client.app import app
from client.device import CATALOGUE, DATA_PATH
from common.config import Experiment
from common.data.catalogue import Catalogue
from common.data.extract import extract
from common.data.prepare import prepare
from server import exchange, roster, rounds
from tests.support import world

SUPERLINK = 1
SHARDS = (range(1), range(1, 4), range(4, 12))
FOREVER = 10**9


@dataclass
class Clock:
    """Time that passes only where somebody sleeps; the time of day jumps as it likes."""

    current: ClassVar["Clock | None"] = None
    """The one that was put last."""
    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.slept.append(seconds)
        self.now += seconds

    @classmethod
    def put(cls, patch: pytest.MonkeyPatch) -> "Clock":
        """A clock that the server's modules look at, which have no other."""
        clock = Clock.current = cls()
        fake = SimpleNamespace(sleep=clock.sleep, **dict.fromkeys(("monotonic", "perf_counter"), lambda: clock.now))
        for module in (roster, exchange, rounds):
            patch.setattr(module, "time", fake)
        return clock


@dataclass
class Late:
    """An answer that comes so many seconds after the question."""

    seconds: float


@dataclass
class Dies:
    """The node is gone, with the answer, and is there again after so many looks for nodes."""

    looks: int = FOREVER
    answered: bool = False
    """Whether Flower says so; else nothing comes."""


Trouble = None | int | str | Late | Dies | Callable[[Message], Message]
"""What becomes of an answer: nothing happens to it; Flower's error code; ``silent``, ``raises``, ``twice``; or another.
"""


def as_bytes(message: Message) -> bytes:
    """A message as it travels."""
    sent: bytes = message_to_proto(message).SerializeToString()
    return sent


def from_bytes(sent: bytes) -> Message:
    """A message as it arrives."""
    return message_from_proto(Proto.FromString(sent))


class Network(Grid):
    """Nodes that host a shard each, and a link that keeps questions and answers as bytes only.

    Parameters
    ----------
    experiment : Experiment
        What all nodes are told.
    folder : Path
        Where their files are; those of a network before are used again.
    shards : sequence of range
        Users of each node.
    clock : Clock, optional
        Says when late answers are there; by default the one that was put last.
    """

    def __init__(
        self, experiment: Experiment, folder: Path, shards: Iterable[range] = SHARDS, clock: Clock | None = None
    ):
        world.identify()
        self._run = Run.create_empty(run_id=1)
        self.clock = clock or Clock.current or Clock()
        self.shards = list(shards)
        prepared = prepare(experiment.data)
        self.catalogue = Catalogue.open(prepared).version
        drawn = np.random.default_rng(7).integers(2**62, 2**64 - 1, len(self.shards), dtype=np.uint64)
        self.ids: list[int] = drawn.tolist()
        self.configs: list[dict[str, Any]] = []
        for users in self.shards:
            place, state = folder / f"users-{users.start}-{users.stop}", folder / f"state-{users.start}"
            if not place.exists():
                extract(prepared, users, place)
            state.mkdir(exist_ok=True)
            self.configs.append({DATA_PATH: str(place), CATALOGUE: self.catalogue, STATE_PATH: str(state)})
        self.told = {"experiment": experiment.model_dump_json(), "overrides": ""}
        self.contexts: list[Context] = []
        self.restart()
        self.away: dict[int, int] = {}
        """Looks that a node is still away, by its place."""
        self.trouble: Callable[[int, Message], Trouble] = lambda place, message: None
        self.sent: list[Message] = []
        self._asked: dict[str, bytes] = {}
        self._answers: dict[str, list[tuple[float, bytes]]] = {}

    def restart(self) -> None:
        """All nodes' processes begin anew; what is on their disks stays."""
        device._open.cache_clear()
        accounts._open.cache_clear()
        self.contexts = [
            Context(1, node, config, RecordDict(), self.told)
            for node, config in zip(self.ids, self.configs, strict=True)
        ]

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, *args: Any, **options: Any) -> Message:
        return Message(*args, **options)

    def get_node_ids(self) -> list[int]:
        here = [node for place, node in enumerate(self.ids) if not self.away.get(place)]
        self.away = {place: looks - 1 for place, looks in self.away.items() if looks > 1}
        return here

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in list(messages):
            name = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = name
            assert not validate_message(message, is_reply_message=False)
            self.sent.append(message)
            self._asked[name] = as_bytes(message)
            self._answers[name] = self._deliver(from_bytes(self._asked[name]))
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for name in list(message_ids):
            waiting = self._answers.get(name, [])
            found += [from_bytes(sent) for due, sent in waiting if due <= self.clock.now]
            self._answers[name] = [answer for answer in waiting if answer[0] > self.clock.now]
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise AssertionError("Flower's own looks at the time of day")

    def _deliver(self, message: Message) -> list[tuple[float, bytes]]:
        place, now = self.ids.index(message.metadata.dst_node_id), self.clock.now
        if self.away.get(place):
            return [(now, as_bytes(flower_error(message, 5)))]
        trouble = self.trouble(place, message)
        if trouble == "silent":
            return []
        if isinstance(trouble, Dies):
            self.away[place] = trouble.looks
            return [(now, as_bytes(flower_error(message, 5)))] if trouble.answered else []
        if isinstance(trouble, int):
            return [(now, as_bytes(flower_error(message, trouble)))]
        reply = _raised(message, OSError("bad disk")) if trouble == "raises" else self._answer(place, message)
        if callable(trouble):
            reply = trouble(reply)
        due = now + (trouble.seconds if isinstance(trouble, Late) else 0.0)
        return [(due, as_bytes(reply))] * (2 if trouble == "twice" else 1)

    def _answer(self, place: int, message: Message) -> Message:
        try:
            return app(message, self.contexts[place])
        except Exception as fault:
            return _raised(message, fault)


def _raised(message: Message, fault: Exception) -> Message:
    """As a SuperNode puts it."""
    return Message(Error(2, f"{type(fault)}:<'{fault}'>"), reply_to=message)


def flower_error(message: Message, code: int) -> Message:
    """An answer that Flower makes itself: from the SuperLink, not the node, unless it is that of a crashed client."""
    reply = Message(Error(code, f"made by Flower ({code})"), reply_to=message)
    if code != 8:
        reply.metadata.__dict__["_src_node_id"] = SUPERLINK
    if code == 3:
        reply.metadata.__dict__.update(_group_id="", _message_type="system")
    return reply
