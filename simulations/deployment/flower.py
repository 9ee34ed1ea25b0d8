"""Flower's command line, called as a person would, with its settings in a folder of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.files import explained

_OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "NO_COLOR": "1",
}


def executable() -> Path:
    """The command `flwr` beside this Python."""
    return Path(sys.executable).absolute().with_name("flwr")


def environment(home: Path) -> dict[str, str]:
    """Environment of a command whose settings lie in `home`: it tells nobody anything and installs nothing."""
    return {**os.environ, **_OFFLINE, "FLWR_HOME": str(home)}


def call(home: Path, *arguments: str) -> dict[str, Any]:
    """What a command answers in JSON; where that is none, its last line as ``error-message``.

    Raises
    ------
    StateError
        Where there is no such command.
    """
    with explained(executable()):
        done = subprocess.run(
            [executable(), *arguments, "--format", "json"],
            env=environment(home),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        answer = {"error-message": done.stderr or done.stdout}
    if "error-message" in answer:  # Flower puts its notes before it
        said = [line.strip() for line in str(answer["error-message"]).splitlines() if line.strip()]
        answer["error-message"] = said[-1][-300:] if said else "nothing"
    return answer
