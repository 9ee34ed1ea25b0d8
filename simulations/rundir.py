"""A run directory: everything that a run was and gave, readable without hushrec and without any tracking server.

| file | holds |
|---|---|
| `config.yaml` | the whole experiment, overrides included |
| `manifest.json` | versions, machine, git commit, data fingerprint, seeds |
| `metrics.jsonl` | one line per round and per validation |
| `checkpoint.safetensors` | what `--resume` goes on from |
| `model.safetensors` | the model that validation chose |
| `result.json` | what `--json` prints |
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from fcntl import LOCK_EX, LOCK_NB, flock
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.config import Experiment, SyntheticData, experiment_hash
from common.data.folder import MANIFEST as DATA_MANIFEST
from common.errors import StateError, UsageError
from common.files import explained, read_json, write_bytes, write_json
from common.loading import dump, load

CONFIG, MANIFEST, RESULT = "config.yaml", "manifest.json", "result.json"
_PACKAGES = ("hushrec", "flwr", "torch", "numpy", "opacus", "pydantic", "polars", "safetensors", "dp-accounting")


def create(experiment: Experiment, out: Path | None) -> Path:
    """Make a new run directory with the experiment in it.

    Parameters
    ----------
    experiment : Experiment
        What will run.
    out : Path, optional
        Where; by default ``runs/NAME-TIME``.

    Raises
    ------
    UsageError
        Where the folder holds something already.
    StateError
        Where it cannot be made or written.
    """
    folder = out or Path("runs") / f"{experiment.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"{folder}: holds files already; go on with --resume {folder}, or name another --out")
    write_bytes(folder / CONFIG, dump(experiment).encode())
    return folder


def reopen(folder: Path, overrides: list[str] | None = None) -> Experiment:
    """The experiment of an existing run directory.

    Raises
    ------
    StateError
        Where the folder is no run directory.
    ConfigError
        Where its configuration was damaged.
    """
    if not (folder / CONFIG).is_file():
        raise StateError(f"{folder}: no run directory (it has no {CONFIG}); name one that `hushrec run` made")
    return load(folder / CONFIG, overrides or [])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run directory for this process, so that two never write into one.

    Raises
    ------
    StateError
        Where another process holds it. The lock dies with its process, however that ends.
    """
    with explained(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            flock(descriptor, LOCK_EX | LOCK_NB)
        except OSError as fault:
            raise StateError(f"{folder}: another hushrec process is running here; wait for it or stop it") from fault
        yield
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, experiment: Experiment, data: Path) -> None:
    """Record what a result may depend on: code, versions, machine, data, seeds."""
    facts = read_json(data / DATA_MANIFEST)
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
            "data": {"digest": facts["digest"], "source": facts["source"], "kept": facts["kept"]},
            "seeds": seeds,
        },
    )


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises
    ------
    StateError
        Where it is missing or damaged.
    """
    facts: dict[str, Any] = read_json(folder / MANIFEST)
    return facts


def result(folder: Path) -> dict[str, Any] | None:
    """What a finished run printed with ``--json``; `None` while it is not finished."""
    path = folder / RESULT
    return read_json(path) if path.exists() else None


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
    try:
        described = subprocess.run(
            ["git", "-C", str(home), "describe", "--always", "--abbrev=40", "--dirty=+"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
