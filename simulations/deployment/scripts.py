"""Texts of a deployment's folder: start scripts, Flower's configuration, units for systemd, a file for compose."""

import json
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

SUPERNODE_AUTH = "--enable-supernode-auth"
"""What makes the SuperLink ask nodes for their keys."""
_RESTART = 70
"""Seconds until a killed node may come back: for 60 s the SuperLink takes it for alive and refuses it."""

_HEAD = """\
#!/bin/sh
# {what}
set -eu
umask 077
here=$(cd "$(dirname "$0")" && pwd -P)
case $here in
*[\\"\\\\]*) echo "error: $here: quotes and backslashes are not allowed in this path; move the folder" >&2; exit 2 ;;
esac
for command in {commands}; do
  command -v "$command" >/dev/null || {{ echo "error: no $command on the PATH; install hushrec" >&2; exit 2; }}
done
: "${{OMP_NUM_THREADS:=1}}"
export OMP_NUM_THREADS FLWR_HOME="$here/flower" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
"""


def address(host: str, port: int) -> str:
    """Write host and port as one; an IPv6 address gets brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def node_start(superlink: str, port: int, catalogue: str) -> str:
    """Script that checks a node's data and becomes its SuperNode.

    Parameters
    ----------
    superlink : str
        Address of the SuperLink.
    port : int
        Where the node's own ClientApp calls it, on this machine only.
    catalogue : str
        Version of the catalogue that the node's data must be numbered by.
    """
    head = _HEAD.format(what="Start this node; its folder may be moved.", commands="hushrec flower-supernode")
    return head + textwrap.dedent(f"""\
        hushrec deploy check "$here/data" --catalogue {shlex.quote(catalogue)} || exit $?
        exec flower-supernode --superlink {shlex.quote(superlink)} \\
          --root-certificates "$here/ca.crt" --auth-supernode-private-key "$here/key" \\
          --host 127.0.0.1 --port {port} \\
          --node-config "data-path=\\"$here/data\\" state-path=\\"$here/state\\" catalogue=\\"{catalogue}\\""
        """)


def server_start(host: str, port: int) -> str:
    """Script that becomes the SuperLink; it listens at `host`, or at $HUSHREC_BIND where that is set."""
    head = _HEAD.format(what="Start the server.", commands="flower-superlink flower-superexec")
    return head + textwrap.dedent(f"""\
        export HUSHREC_OUT="$here/runs"
        exec flower-superlink --host "${{HUSHREC_BIND:-{host}}}" --port {port} \\
          --ssl-ca-certfile "$here/ca.crt" --ssl-certfile "$here/server.pem" --ssl-keyfile "$here/server.key" \\
          {SUPERNODE_AUTH} --database "$here/state.db" --disable-runtime-dependency-installation
        """)


def client_config(superlink: str, certificates: Path) -> str:
    """Flower's `config.toml` for whoever submits runs and registers nodes; JSON's strings are TOML's, too."""
    lines = ["[superlink]", 'default = "hushrec"', "", "[superlink.hushrec]"]
    lines += [f"address = {json.dumps(superlink)}", f"root-certificates = {json.dumps(str(certificates))}"]
    return "\n".join(lines) + "\n"


def unit(what: str, folder: str, writable: Sequence[str], commands: Path, owner: tuple[int, int]) -> str:
    """Write a systemd service that runs ``folder/start.sh`` and can write to few places only.

    Parameters
    ----------
    what : str
        Its description.
    folder : str
        Absolute; may hold systemd's specifiers.
    writable : sequence of str
        Paths in the folder that the service writes to; "" is the folder itself.
    commands : Path
        Folder of the commands of Flower and hushrec.
    owner : (int, int)
        Numbers of the user and the group that own the folder.
    """
    writes = " ".join(f'"{f"{folder}/{path}".rstrip("/")}"' for path in writable)
    return textwrap.dedent(f"""\
        [Unit]
        Description={what}
        After=network-online.target
        Wants=network-online.target

        [Service]
        User={owner[0]}
        Group={owner[1]}
        Environment="PATH={_percent(str(commands))}:/usr/local/bin:/usr/bin:/bin"
        ExecStart="{folder}/start.sh"
        Restart=always
        RestartSec={_RESTART}
        RestartPreventExitStatus=2
        TimeoutStopSec=20
        UMask=0077
        NoNewPrivileges=yes
        CapabilityBoundingSet=
        ProtectSystem=strict
        ReadWritePaths={writes}
        PrivateTmp=yes
        PrivateDevices=yes
        ProtectControlGroups=yes
        ProtectKernelModules=yes
        ProtectKernelTunables=yes
        RestrictSUIDSGID=yes
        LockPersonality=yes

        [Install]
        WantedBy=multi-user.target
        """)


def units(folder: Path, commands: Path, owner: tuple[int, int]) -> dict[str, str]:
    """Units by file name: the SuperLink's, and the template of all nodes; arguments as in `unit`."""
    home = _percent(str(folder))
    node = unit("hushrec node %i", f"{home}/nodes/%i", ["state", "flower"], commands, owner)
    server = unit("hushrec SuperLink", f"{home}/server", [""], commands, owner)
    return {"hushrec-superlink.service": server, "hushrec-node@.service": node}


def compose(nodes: Sequence[str], image: str, owner: tuple[int, int]) -> str:
    """Write a compose file: the SuperLink and all nodes in containers on one machine, each with its own folder only.

    Parameters
    ----------
    nodes : sequence of str
        Their names.
    image : str
        Name of an image with hushrec in it, unless $HUSHREC_IMAGE says otherwise.
    owner : (int, int)
        Numbers of the user and the group that own the folder.
    """

    def service(folder: str, mounts: list[str]) -> dict[str, Any]:
        return {
            "image": f"${{HUSHREC_IMAGE:-{image}}}",
            "command": [f"/deployment/{folder}/start.sh"],
            "user": f"{owner[0]}:{owner[1]}",
            "network_mode": "host",
            "restart": "unless-stopped",
            "init": True,
            "read_only": True,
            "tmpfs": ["/tmp"],  # noqa: S108 - inside the container
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges:true"],
            "volumes": [f"./{folder}{mount.partition(':')[0]}:/deployment/{folder}{mount}" for mount in mounts],
        }

    kept = [f"/{name}:ro" for name in ("ca.crt", "server.pem", "server.key", "start.sh")]
    services = {"superlink": service("server", ["", *kept])}
    for name in nodes:
        services[name] = service(f"nodes/{name}", [":ro", "/state", "/flower"]) | {"depends_on": ["superlink"]}
    return yaml.safe_dump({"name": "hushrec", "services": services}, sort_keys=False)


def readme(folder: Path, superlink: str) -> str:
    """Say what is secret, what starts first, how a node's key gets known."""
    return textwrap.dedent(f"""\
        # A deployment of hushrec
        Made by `hushrec deploy init`. The server listens at `{superlink}`.

        ## Secret
        - `ca/ca.key`: whoever has it can pose as the server. Only `init` needs it; keep it offline or delete it.
        - `server/server.key`, `server/state.db`: they stay on the server.
        - `nodes/*/key`, `data/`, `state/`: they stay on that node. Once a node's folder is on its machine, delete it
          here.
        - **The port itself.** Whoever reaches it and has `ca.crt` can submit a run, that is, run code on all nodes:
          Flower's control interface knows no login. To devices open `/v1/fleet/` only, by a firewall or a proxy.

        ## On one machine
        ```
        hushrec deploy up DIR      # server, keys, nodes
        hushrec deploy status DIR
        hushrec deploy down DIR
        ```

        ## On several machines
        1. Server: `server/start.sh`, or `systemd/hushrec-superlink.service`. Where it must listen at another address
           than the one that nodes call, set `HUSHREC_BIND`.
        2. Make the nodes' keys known, each once, before the node starts:
           ```
           export FLWR_HOME={shlex.quote(str(folder / "client"))} FLWR_TELEMETRY_ENABLED=0
           flwr supernode register server/keys/node-000.pub hushrec --name node-000
           ```
           A lost device: `flwr supernode list hushrec`, then `flwr supernode unregister ID hushrec`.
        3. Copy each folder `nodes/node-…` to its machine (`cp -a`, `rsync -a`: the modes matter). There run its
           `start.sh`, or `systemd/hushrec-node@.service` with the paths mended, by
           `systemctl enable --now hushrec-node@node-000`.
        4. Submit a run with the same `FLWR_HOME`, from the folder of the project: `flwr run . hushrec --stream`.

        A killed node may come back after {_RESTART} seconds; before that the server takes it for alive and refuses it.

        `compose.yaml` runs everything in containers on one machine, for trying it out: build an image with hushrec and
        name it by `HUSHREC_IMAGE`.
        """)


def _percent(text: str) -> str:
    """Text as it is, for systemd, to which a percent sign is special."""
    return text.replace("%", "%%")
