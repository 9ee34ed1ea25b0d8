"""A Flower Grid that plays every node in this process: no Ray, no daemon, no network.

The ServerApp and the client code run unchanged. `vectorized` hands all messages of a round to the client code at once;
`sequential` sends them one by one through the Flower ClientApp. Messages share their content, so nobody may write into
what arrives.

Flower keeps some of what a Grid needs to itself; the private names that we touch are all in this module.
"""

from collections.abc import Callable, Iterable, Sequence

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict, UserConfig
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.accounts import STATE_PATH
from client.app import app as client_app
from client.device import PARTITION, Device
from client.handlers import HANDLERS
from client.own import recalled, remember
from common.errors import StateError
from common.wire import ROUND, record

FIRST_NODE = 2
"""Node of user 0; Flower's SuperLink is node 1."""
BROKEN = 2
"""Error code of a reply made for a client that raised."""

Engine = Callable[[Sequence[Message]], list[Message]]


class InProcessGrid(Grid):
    """All nodes of a federation in one process.

    Parameters
    ----------
    device : Device
        The data of all users.
    engine : str
        ``vectorized`` or ``sequential``.
    """

    def __init__(self, device: Device, engine: str):
        self._device = device
        self._engine = self._vectorized if engine == "vectorized" else self._sequential
        self._contexts: dict[int, Context] = {}
        self._sent = 0
        self._waiting: dict[str, Message] = {}
        self.set_run(Run.create_empty(run_id=1))

    def set_run(self, run: Run) -> None:
        """Say which run this is; `Message` reads the identity from the process."""
        self._run = run
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run.run_id, 1, 1

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message from the server to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> range:
        """Nodes in the order of their users."""
        return range(FIRST_NODE, FIRST_NODE + len(self._device.sequences))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Run the clients and return one reply per message, in order.

        Nobody can be late here, so `timeout` is not looked at. A client that raises costs only its own reply.
        """
        sent = list(messages)
        for message in sent:
            self._identify(message)
        replies = self._engine(sent)
        for reply in replies:
            self._identify(reply)
        return replies

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run the clients now; their replies wait for `pull_messages`."""
        sent = list(messages)
        replies = self.send_and_receive(sent)
        names = [message.metadata.message_id for message in sent]
        self._waiting.update(zip(names, replies, strict=True))
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to pushed messages, each handed out once."""
        return [self._waiting.pop(name) for name in message_ids if name in self._waiting]

    def _identify(self, message: Message) -> None:
        self._sent += 1
        message.metadata.__dict__["_message_id"] = f"m{self._sent}"

    def _vectorized(self, messages: Sequence[Message]) -> list[Message]:
        replies: dict[int, Message] = {}
        for kind in dict.fromkeys(message.metadata.message_type for message in messages):
            where = [i for i, message in enumerate(messages) if message.metadata.message_type == kind]
            replies.update(zip(where, self._handled(kind, [messages[i] for i in where]), strict=True))
        return [replies[i] for i in range(len(messages))]

    def _handled(self, kind: str, messages: Sequence[Message]) -> list[Message]:
        """Replies to all at once or, where that breaks off, one by one: the fault is then one client's."""
        users = [message.metadata.dst_node_id - FIRST_NODE for message in messages]
        try:
            return HANDLERS[kind](messages, users, self._device)
        except StateError:  # of the machine, such as a dead worker; no client's
            raise
        except Exception as fault:
            if len(messages) == 1:
                return [_broken(messages[0], fault)]
            return [reply for message in messages for reply in self._handled(kind, [message])]

    def _sequential(self, messages: Sequence[Message]) -> list[Message]:
        return [self._one(message) for message in messages]

    def _one(self, message: Message) -> Message:
        context = self._context(message.metadata.dst_node_id)
        own, user = self._device.own, message.metadata.dst_node_id - FIRST_NODE
        try:
            if own is not None:  # what Flower would keep, here in the run's folder
                if message.metadata.message_type == "train":
                    own.begin(int(str(record(message.content, ROUND, ConfigRecord)["round"])))
                remember(own, context, range(user, user + 1))
            reply = client_app(message, context)
            if own is not None and message.metadata.message_type == "train":
                own.take_over(recalled(own, context, range(user, user + 1)))
            return reply
        except StateError:  # of the machine, such as a full disk; no client's
            raise
        except Exception as fault:
            return _broken(message, fault)

    def _context(self, node: int) -> Context:
        if node not in self._contexts:
            config: UserConfig = {PARTITION: node - FIRST_NODE, **places(self._device)}
            run_config: UserConfig = {"experiment": self._device.experiment.model_dump_json(), "overrides": ""}
            self._contexts[node] = Context(self._run.run_id, node, config, RecordDict(), run_config)
        return self._contexts[node]


def places(device: Device) -> dict[str, str]:
    """Where a node finds what it needs, for its node config: its events and, if it keeps one, its account."""
    account = {} if device.accounts.path is None else {STATE_PATH: str(device.accounts.path.parent)}
    return {"data-path": str(device.catalogue.folder), **account}


def _broken(message: Message, fault: Exception) -> Message:
    """An error reply, as Flower makes it: the round goes on without this client."""
    return Message(Error(BROKEN, f"{type(fault).__name__}: {fault}"), reply_to=message)
