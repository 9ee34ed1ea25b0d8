"""Submit a run to a SuperLink, watch it, and bring its results home; Flower's own commands do the talking."""

import base64
import importlib
import json
import secrets
import shlex
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from common.config import Experiment
from common.errors import BudgetSpent, HushrecError, Interrupted, StateError, TooFewNodes, UsageError
from common.files import explained, locked, read_json, write_bytes, write_json
from server.app import TOLD
from server.journal import METRICS_FILE
from server.rounds import CARD_FILE, MODEL_FILE
from simulations import rundir
from simulations.deployment import flower
from simulations.deployment.scripts import client_config
from simulations.progress import Observer, watching

MOST_BYTES = 2**31
"""Largest file that is taken from a log."""
_FAULTS: dict[int, type[HushrecError]] = {fault.exit_code: fault for fault in (UsageError, BudgetSpent, TooFewNodes)}


def run(
    experiment: Experiment, folder: Path, console: Console, superlink: str, authority: Path | None, resume: bool = False
) -> dict[str, Any]:
    """Run an experiment on the nodes of a SuperLink, into a run directory here.

    Parameters
    ----------
    experiment : Experiment
        What to run; it travels with the run.
    folder : Path
        Its run directory here. The server keeps its own, with checkpoint and ledger.
    console : Console
        Where progress goes.
    superlink : str
        HOST:PORT.
    authority : Path, optional
        Certificate of the authority that vouches for the server; none only for a server on this machine.
    resume : bool
        Go on from the server's checkpoint.

    Returns
    -------
    dict
        The result as in `result.json`.

    Raises
    ------
    UsageError
        Where the address would be called without encryption.
    StateError, BudgetSpent, TooFewNodes, Interrupted
        As the run ends on the server.
    """
    check_address(superlink, authority)
    with locked(folder):
        place = folder / rundir.DEPLOYED
        name = read_json(place)["run"] if resume and place.exists() else f"{experiment.name}-{secrets.token_hex(4)}"
        began = time.perf_counter()
        with _home(superlink, authority) as home:
            if resume and place.exists():  # where its submitter was killed it goes on, and two must not write there
                flower.call(home, "stop", str(read_json(place)["flower_run_id"]), "hushrec")
            number = _submit(home, experiment, name, resume and place.exists())
            write_json(place, {"superlink": superlink, "run": name, "flower_run_id": number})
            with watching(console, experiment.federation.rounds) as observe:
                end = _follow(home, number, folder, observe, resume)
            if end is None:
                raise StateError(
                    f"the run ended without a result (Flower says {_status(home, number)}); see the server's log, then "
                    f"go on with: {resumption(folder, superlink, authority)}"
                )
        if end["kind"] == "fault":
            raise _FAULTS.get(end["exit_code"], StateError)(f"the server: {end['error']}")
        write_json(place, {**read_json(place), "catalogue": end["catalogue"]})
        write_json(folder / rundir.RESULT, _result(folder, end, time.perf_counter() - began))
    return rundir.result(folder) or {}


def check_address(superlink: str, authority: Path | None) -> None:
    """Refuse to talk to another machine without encryption.

    Raises
    ------
    UsageError
        Where it would be, or the certificate is not there.
    """
    host, _, port = superlink.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--superlink {superlink}: must be HOST:PORT")
    if authority is None and host.strip("[]") not in {"127.0.0.1", "::1", "localhost"}:
        raise UsageError(f"--superlink {superlink}: name --ca, the certificate of the authority that vouches for it")
    if authority is not None and not authority.is_file():
        raise UsageError(f"--ca {authority}: no such file")


def reach(superlink: str, authority: Path | None) -> None:
    """See that somebody answers there, and that the authority vouches for it.

    Raises
    ------
    UsageError
        As `check_address`, or where the authority's certificate is none.
    StateError
        Where nobody answers, or somebody else.
    """
    check_address(superlink, authority)
    host, _, port = superlink.rpartition(":")
    try:
        context = ssl.create_default_context(cafile=authority) if authority else None
    except OSError as fault:
        raise UsageError(f"--ca {authority}: not a certificate in PEM ({fault.strerror or fault})") from fault
    host = host.strip("[]")
    try:
        with socket.create_connection((host, int(port)), timeout=10) as plain:
            if context:
                context.wrap_socket(plain, server_hostname=host).close()
    except ssl.SSLCertVerificationError as fault:
        raise StateError(
            f"{superlink}: its certificate is not trusted by --ca {authority} ({fault.verify_message})"
        ) from fault
    except OSError as fault:
        raise StateError(
            f"{superlink}: the SuperLink does not answer ({fault.strerror or fault}); is it up?"
        ) from fault


def resumption(folder: Path, superlink: str, authority: Path | None) -> str:
    """The command that goes on with a run."""
    trusted = f" --ca {shlex.quote(str(authority))}" if authority else ""
    return f"hushrec run --resume {shlex.quote(str(folder))} --superlink {superlink}{trusted}"


@contextmanager
def _home(superlink: str, authority: Path | None) -> Iterator[Path]:
    """A folder with Flower's settings and the app to submit, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="hushrec-") as made:
        home = Path(made)
        if authority is None:
            config = (
                f'[superlink]\ndefault = "hushrec"\n\n[superlink.hushrec]\naddress = "{superlink}"\ninsecure = true\n'
            )
        else:
            config = client_config(superlink, authority.absolute())
        write_bytes(home / "config.toml", config.encode())
        _write_app(home / "app")
        yield home


def _write_app(target: Path) -> None:
    """The packages that server and nodes run, as they are installed here, with what Flower wants to know of them."""
    target.mkdir()
    for name in ("server", "client", "common"):
        source = Path(str(importlib.import_module(name).__file__)).parent
        shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    keys = '\nexperiment = ""\noverrides = ""\nrun = ""\nresume = false\nfetch = true\n'
    text = (
        '[project]\nname = "hushrec"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = []\n'
        '[tool.flwr.app]\npublisher = "hushrec"\n'
        'fab-include = ["server/**/*.py", "client/**/*.py", "common/**/*.py"]\n'
        '[tool.flwr.app.components]\nserverapp = "server.app:app"\nclientapp = "client.app:app"\n'
        f"[tool.flwr.app.config]{keys}"
    )
    (target / "pyproject.toml").write_text(text)


def _submit(home: Path, experiment: Experiment, name: str, resume: bool) -> int:
    told = {"experiment": experiment.model_dump_json(), "run": name}
    lines = [f"{key} = {json.dumps(value)}" for key, value in told.items()] + [f"resume = {str(resume).lower()}"]
    settings = home / "run.toml"
    settings.write_text("\n".join(lines) + "\n")
    answer = flower.call(home, "run", str(home / "app"), "hushrec", "--run-config", str(settings))
    if not answer.get("success") or "run-id" not in answer:
        raise StateError(f"the SuperLink did not take the run: {answer.get('error-message', answer)}")
    return int(answer["run-id"])


def _follow(home: Path, number: int, folder: Path, observe: Observer, resume: bool) -> dict[str, Any] | None:
    """Pass on what the run tells, and take its files in; its last word, none where it ended without one."""
    end, held = None, dict[str, bytearray]()
    with (
        explained(folder),
        (folder / METRICS_FILE).open("a" if resume else "w") as metrics,
        _log(home, number) as lines,
    ):
        for line in lines:
            if line["kind"] in {"fault", "test"}:
                end = line
            elif line["kind"] == "file":
                _take(held, line)
            else:
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
                observe(line)
    for name, content in held.items():
        write_bytes(folder / name, bytes(content))
    return end


def _take(held: dict[str, bytearray], line: dict[str, Any]) -> None:
    """One part of a file, of a kind that is expected, in its place."""
    name, start, size = line["name"], line["start"], line["size"]
    if name not in {MODEL_FILE, CARD_FILE, METRICS_FILE} or not 0 < size <= MOST_BYTES:
        raise StateError(f"the server sent a file that nobody wants: {name!r}")
    content = held.setdefault(name, bytearray())
    if start != len(content):
        raise StateError(f"the server's {name} came with a hole at byte {len(content)}; fetch it again with --resume")
    content += base64.b64decode(line["data"], validate=True)


@contextmanager
def _log(home: Path, number: int) -> Iterator[Iterator[dict[str, Any]]]:
    """What the run tells, line by line, until it ends; it is stopped where this process is."""
    command = [str(flower.executable()), "log", str(number), "hushrec", "--stream"]
    with subprocess.Popen(
        command,
        env=flower.environment(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as stream:
        try:
            yield _told(stream)
        except KeyboardInterrupt as stop:
            flower.call(home, "stop", str(number), "hushrec")
            raise Interrupted("stopped; the server has its last checkpoint") from stop
        finally:
            stream.kill()


def _told(stream: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    for text in stream.stdout or ():
        _, found, line = text.partition(TOLD)
        if found:
            try:
                facts = json.loads(line)
            except ValueError as fault:
                raise StateError("the server's log holds a broken line") from fault
            if isinstance(facts, dict) and isinstance(facts.get("kind"), str):
                yield facts


def _status(home: Path, number: int) -> str:
    answer = flower.call(home, "ls", "hushrec", "--run-id", str(number))
    runs = answer.get("runs") or [{"status": answer.get("error-message", "nothing")}]
    return str(runs[0]["status"])


def _result(folder: Path, end: dict[str, Any], seconds: float) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    spent = sum(line.get("seconds", 0.0) for line in trained)
    up = [line["bytes_up_per_client"] for line in trained if "bytes_up_per_client" in line]
    return {
        "run_dir": str(folder),
        "status": "done",
        **{name: end[name] for name in ("rounds", "best_round", "users", "items", "users_tested", "privacy")},
        "test": {name: {"value": value, "low": None, "high": None} for name, value in end["figures"].items()},
        "baselines": {},
        "seconds": seconds,
        "clients_per_second": sum(line["clients"] for line in trained) / spent if spent else 0.0,
        "peak_rss_mb": 0.0,
        "bytes_up_per_client": sum(up) / len(up) if up else 0.0,
        "bytes_down_per_client": end["bytes_down"],
        "phases": {},
    }
