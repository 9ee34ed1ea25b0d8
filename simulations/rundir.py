"""A run directory: everything that a run was and gave, readable without hushrec and without any tracking server.

| file | holds |
|---|---|
| `config.yaml` | the whole experiment, overrides included |
| `manifest.json` | versions, machine, git commit, data fingerprint, seeds |
| `metrics.jsonl` | one line per round and per validation |
| `checkpoint.safetensors` | what `--resume` goes on from |
| `model.safetensors` | the model that validation chose |
| `result.json` | what `--json` prints |
| `devices/` | what simulated devices keep, and which data that was: no result, and not to be published |
| `deployment.json` | of a run on nodes elsewhere: where it lives; its checkpoint stays there |
"""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from client.room import ROOM, room
from common.config import Experiment, experiment_hash
from common.data.catalogue import Catalogue
from common.data.folder import MANIFEST as DATA_MANIFEST
from common.data.prepare import prepare
from common.errors import StateError, UsageError
from common.files import explained, read_json, write_bytes, write_json
from common.loading import dump, load
from common.sources import SyntheticData

CONFIG, MANIFEST, RESULT, DEPLOYED = "config.yaml", "manifest.json", "result.json", "deployment.json"
DATA = "data.json"
"""In `client.room.ROOM`, under a privacy mode: what the run's data were."""
_PACKAGES = ("hushrec", "flwr", "torch", "numpy", "opacus", "pydantic", "polars", "safetensors", "dp-accounting")


def create(experiment: Experiment, out: Path | None, data_here: bool = True) -> Path:
    """Make a new run directory with the experiment in it.

    Parameters
    ----------
    experiment : Experiment
        What will run.
    out : Path, optional
        Where; by default ``runs/NAME-TIME``.
    data_here : bool
        Whether the data is on this machine, and not on nodes elsewhere.

    Raises
    ------
    UsageError
        Where the folder cannot be made, or holds something already.
    DataError
        Where the data is unusable; no folder is made then.
    StateError
        Where the folder cannot be written to.
    """
    folder = out or Path("runs") / f"{experiment.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
    with explained(folder, UsageError):
        if os.path.lexists(folder) and any(folder.iterdir()):
            raise UsageError(f"{folder}: holds files already; go on with --resume {folder}, or name another --out")
    if data_here:
        prepare(experiment.data)  # before the folder is made, so that unusable data leaves none behind
    with explained(folder, UsageError):
        folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / CONFIG, dump(experiment).encode())
    return folder


def reopen(folder: Path, overrides: list[str] | None = None) -> Experiment:
    """The experiment of an existing run directory.

    Parameters
    ----------
    folder : Path
        The run directory.
    overrides : list of str, optional
        Of ``runtime.*`` only: anything else would make it another experiment.

    Raises
    ------
    StateError
        Where the folder is no run directory.
    ConfigError
        Where its configuration was damaged.
    UsageError
        Where an override could change results.
    """
    with explained(folder):
        if not (folder / CONFIG).is_file():
            raise StateError(f"{folder}: no run directory (it has no {CONFIG}); name one that `hushrec run` made")
    experiment = load(folder / CONFIG, overrides or [])
    if overrides and experiment_hash(experiment) != experiment_hash(load(folder / CONFIG)):
        raise UsageError(f"{folder}: only runtime.* can be overridden here; for anything else start a new run")
    return experiment


def write_manifest(folder: Path, experiment: Experiment, data: Path) -> None:
    """Record what a result may depend on: code, versions, machine, data, seeds."""
    facts = read_json(data / DATA_MANIFEST)
    known = {"digest": facts["digest"], "source": facts["source"], "kept": facts["kept"]}
    if not experiment.told_as_is:  # by a hash who knows all but one user's events could tell what these are
        write_json(room(folder) / DATA, known)
        known = {"kept": {name: facts["kept"][name] for name in ("users", "items")}}
    seeds = {"experiment": experiment.seed}
    if isinstance(experiment.data, SyntheticData):
        seeds["data"] = experiment.data.seed
    write_json(
        folder / MANIFEST,
        {
            "experiment": experiment_hash(experiment),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv[1:],
            "git_commit": _commit(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in _PACKAGES},
            "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
            "data": known,
            "seeds": seeds,
        },
    )


def check_manifest(folder: Path, experiment: Experiment, data: Path) -> None:
    """Hold a run against what it began with.

    Raises
    ------
    StateError
        Where the manifest is missing or damaged, or where the experiment or the data have changed since.
    """
    if (folder / DEPLOYED).exists():
        trained_on, here = read_json(folder / DEPLOYED).get("catalogue"), Catalogue.open(data).version
        if trained_on != here:
            raise StateError(f"{folder}: its nodes have catalogue {trained_on}, the data here {here}; get theirs")
        return
    facts = read_json(folder / MANIFEST)
    try:
        known = facts["data"] if experiment.told_as_is else read_json(folder / ROOM / DATA)
        trained, trained_on = facts["experiment"], known["digest"]
    except (TypeError, KeyError) as fault:
        raise StateError(f"{folder / MANIFEST}: not the manifest of a run; restore it or start a new run") from fault
    if trained != experiment_hash(experiment):
        raise StateError(f"{folder / CONFIG}: has changed since the run began; restore it or start a new run")
    if trained_on != (now := read_json(data / DATA_MANIFEST)["digest"]):
        raise StateError(f"{folder}: its data has changed since (was {trained_on}, is {now}); start a new run")


def result(folder: Path) -> dict[str, Any] | None:
    """What a finished run printed with ``--json``; `None` while it is not finished.

    Raises
    ------
    StateError
        Where the file is damaged.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    facts = read_json(path)
    if not isinstance(facts, dict) or "test" not in facts:
        raise StateError(f"{path}: not the result of a run; remove it and go on with `hushrec run --resume {folder}`")
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree, with a plus sign where it was changed since; `None` outside a checkout."""
    home = Path(__file__).resolve().parents[1]
    if not (home / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:  # without locks, so that a run never stands in the way of a commit
        status = subprocess.run(command, cwd=home, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    facts = status.stdout.splitlines()
    commit = next((line.removeprefix("# branch.oid ") for line in facts if line.startswith("# branch.oid ")), None)
    return commit and commit + "+" * any(not line.startswith("#") for line in facts)
