"""A deployment's folder: everything that a server and its nodes need, each in a folder of its own.

::

    experiment.yaml            the experiment, overrides included
    ca/                        ca.crt; ca.key (secret)
    server/                    start.sh, certificate, key (secret), keys/ of the nodes, state.db, runs/
    nodes/node-000/ …          start.sh, key (secret), ca.crt, data/ of its users, state/
    client/config.toml         for whoever submits runs: FLWR_HOME
    systemd/  compose.yaml  README.md
"""

import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path

import numpy as np

from common.config import Experiment
from common.data.catalogue import Catalogue
from common.data.extract import extract
from common.data.prepare import prepare
from common.data.sequences import Sequences
from common.errors import DataError, StateError, UsageError
from common.files import explained
from common.loading import dump
from simulations.deployment import scripts
from simulations.deployment.certificates import write_authority, write_node, write_server

NODE_PORT = 9500
"""Where the first node's own ClientApp calls it; the next node has the next port."""
_LAST_PORT = 65535


def init(
    experiment: Experiment,
    target: Path,
    nodes: int,
    host: str = "127.0.0.1",
    port: int = 9443,
    singles: int = 0,
    node_port: int = NODE_PORT,
) -> None:
    """Make a deployment's folder, wholly or not at all.

    Parameters
    ----------
    experiment : Experiment
        Its data is prepared and divided among the nodes.
    target : Path
        The new folder.
    nodes : int
        How many.
    host : str
        Name or IP address by which nodes call the server.
    port : int
        The server's only port.
    singles : int
        How many nodes have one user each, as devices do; the others share the rest.
    node_port : int
        Port of the first node, for itself only.

    Raises
    ------
    UsageError
        Where the target exists, or users, nodes, host and ports don't fit together.
    DataError
        Where the data is unusable.
    StateError
        Where the folder cannot be written.
    """
    target = target.absolute()
    if os.path.lexists(target):
        raise UsageError(f"{target}: exists already; remove it or choose another name")
    if re.search(r'["\\$`\x00-\x1f\x7f]', str(target)):
        raise UsageError(f"{str(target)!r}: quotes, backslashes, $ and control characters are refused; rename it")
    _check_addresses(host, port, node_port, nodes)
    prepared = prepare(experiment.data)
    shards = divide(Catalogue.open(prepared).users, nodes, singles)
    catalogue, superlink = Catalogue.open(prepared).version, scripts.address(host, port)
    with explained(target), _being_made(target) as draft:
        (draft / "experiment.yaml").write_text(dump(experiment))
        for name in ("ca", "client", "nodes", "server", "server/flower", "server/keys", "server/runs", "systemd"):
            (draft / name).mkdir(mode=0o700)
        write_authority(draft / "ca")
        _server(draft, host, port)
        names = [f"node-{i:0{max(3, len(str(nodes - 1)))}d}" for i in range(nodes)]
        for i, (name, users) in enumerate(zip(names, shards, strict=True)):
            _node(draft, name, extract_from=prepared, users=users)
            _script(draft / "nodes" / name, scripts.node_start(superlink, node_port + i, catalogue))
        (draft / "client" / "config.toml").write_text(scripts.client_config(superlink, target / "ca" / "ca.crt"))
        owner = os.getuid(), os.getgid()
        for name, text in scripts.units(target, Path(sys.executable).absolute().parent, owner).items():
            (draft / "systemd" / name).write_text(text)
        (draft / "compose.yaml").write_text(scripts.compose(names, f"hushrec:{metadata.version('hushrec')}", owner))
        (draft / "README.md").write_text(scripts.readme(target, superlink))


def divide(users: int, nodes: int, singles: int = 0) -> list[range]:
    """Divide users 0 … users - 1 among nodes, in order.

    Returns
    -------
    list of range
        One user for each of the first `singles` nodes; the others' shares differ by one at most.

    Raises
    ------
    UsageError
        Where that cannot be.
    """
    if not 1 <= nodes <= users:
        raise UsageError(f"--nodes {nodes}: must be 1 … {users}, since each node needs a user and there are {users}")
    if not 0 <= singles <= nodes or (singles == nodes < users):
        most = nodes if nodes == users else nodes - 1
        raise UsageError(f"--singles {singles}: must be 0 … {most}, so that {nodes} nodes can hold {users} users")
    rest, shares = nodes - singles, users - singles
    ends = [*range(singles), *(singles + shares * i // max(rest, 1) for i in range(rest)), users]
    return [range(start, end) for start, end in pairwise(ends)]


def check(data: Path, catalogue: str | None = None) -> Catalogue:
    """Check a node's data before it takes part.

    Parameters
    ----------
    data : Path
        The node's prepared folder.
    catalogue : str, optional
        Version of the catalogue that it must have.

    Returns
    -------
    Catalogue
        As the node has it.

    Raises
    ------
    DataError
        Where the folder is missing or damaged, has nobody or nothing in it, or items that its catalogue or the
        deployment does not know.
    """
    own, known = Sequences.open(data), Catalogue.open(data)
    version = known.version  # read in any case: it may be damaged
    anew = "make the deployment anew with `hushrec deploy init`"
    if catalogue is not None and version != catalogue:
        raise DataError(f"{data}: its catalogue is {version}, that of the deployment is {catalogue}; {anew}")
    if not len(own):
        raise DataError(f"{data}: holds no users, so this node has nobody to train for; {anew}")
    if not own.offsets[-1]:
        raise DataError(f"{data}: holds no events, so this node has nothing to train on; {anew}")
    if (np.diff(own.offsets) < 0).any():
        raise DataError(f"{data}: offsets.npy does not ascend, so events are nobody's; {anew}")
    low, high = int(own.items.min()), int(own.items.max())
    if low < 0 or high >= known.items:
        stranger = low if low < 0 else high
        raise DataError(f"{data}: has item {stranger}, its catalogue has 0 … {known.items - 1} only; {anew}")
    return known


def server_of(folder: Path) -> tuple[str, int]:
    """Host and port by which nodes and clients call a deployment's server.

    Raises
    ------
    UsageError
        Where the folder is no deployment.
    """
    path = folder / "client" / "config.toml"
    if not path.is_file():
        raise UsageError(f"{folder}: no deployment (it has no client/config.toml); make one with `hushrec deploy init`")
    try:
        host, _, port = tomllib.loads(path.read_text())["superlink"]["hushrec"]["address"].rpartition(":")
        return host.strip("[]"), int(port)
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise UsageError(f"{path}: must have an address such as 127.0.0.1:9443 in [superlink.hushrec]") from fault


def nodes_of(folder: Path) -> list[Path]:
    """Folders of the nodes that are still here, in order."""
    return sorted(path.parent for path in (folder / "nodes").glob("*/start.sh"))


def guard(folder: Path) -> None:
    """Refuse to open a deployment's port to a network unless it is encrypted and asks nodes for their keys.

    Raises
    ------
    UsageError
        Where the host is no loopback address and something of that is missing.
    """
    host, _ = server_of(folder)
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if local:
        return
    server = folder / "server"
    lost = [name for name in ("ca.crt", "server.pem", "server.key", "start.sh") if not (server / name).is_file()]
    if lost:
        raise UsageError(f"{server}: has no {', '.join(lost)}; a port open to a network needs certificates")
    script = (server / "start.sh").read_text()
    if scripts.SUPERNODE_AUTH not in script or "--insecure" in script:
        raise UsageError(
            f"{server / 'start.sh'}: needs {scripts.SUPERNODE_AUTH}, not --insecure: {host} is no loopback"
        )


def _check_addresses(host: str, port: int, node_port: int, nodes: int) -> None:
    try:
        usable = not ip_address(host).is_unspecified and "%" not in host
    except ValueError:
        usable = bool(re.fullmatch(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", host))
        usable = usable and not re.fullmatch(r"[0-9.]+", host)
    if not usable:
        raise UsageError(f"--host {host}: must be a name or an IP address at which nodes can call the server")
    if not 1 <= port <= _LAST_PORT:
        raise UsageError(f"--port {port}: must be 1 … {_LAST_PORT}")
    if not 1 <= node_port <= _LAST_PORT - max(nodes, 1) + 1:
        raise UsageError(
            f"--node-port {node_port}: must be 1 … {_LAST_PORT - max(nodes, 1) + 1}; each node has the next"
        )
    if node_port <= port < node_port + nodes:
        raise UsageError(
            f"--port {port}: is that of a node ({node_port} … {node_port + nodes - 1}); choose another one"
        )


def _server(draft: Path, host: str, port: int) -> None:
    folder = draft / "server"
    write_server(draft / "ca", folder, host)
    shutil.copy(draft / "ca" / "ca.crt", folder)
    _script(folder, scripts.server_start(host, port))


def _node(draft: Path, name: str, extract_from: Path, users: range) -> None:
    folder = draft / "nodes" / name
    for each in (folder, folder / "state", folder / "flower"):
        each.mkdir(mode=0o700)
    write_node(folder, name)
    shutil.copy(folder / "key.pub", draft / "server" / "keys" / f"{name}.pub")
    shutil.copy(draft / "ca" / "ca.crt", folder)
    for path in (data := extract(extract_from, users, folder / "data")).iterdir():
        path.chmod(0o600)
    data.chmod(0o700)


def _script(folder: Path, text: str) -> None:
    (folder / "start.sh").write_text(text)
    (folder / "start.sh").chmod(0o700)


@contextmanager
def _being_made(target: Path) -> Iterator[Path]:
    """Give a draft beside `target` that becomes it when the block ends well, and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield draft
        if os.path.lexists(target):
            raise StateError(f"{target}: somebody has made it meanwhile; remove it or choose another name")
        draft.rename(target)
    except BaseException:  # an interrupt, too, must leave nothing behind
        shutil.rmtree(draft, ignore_errors=True)
        raise
