"""The folder of a run that stands for its simulated devices: what they keep is no result of the run."""

from pathlib import Path

from common.errors import StateError
from common.files import explained

ROOM = "devices"
"""Its name, in a run directory."""
_WARNING = """\
What the devices of a simulation keep to themselves: numbers of single users, by round, without any noise; who took
part when. No result of the run and no part of what a privacy mode releases: do not publish this folder.
"""


def room(run: Path) -> Path:
    """Give the folder in a run directory, made now unless it is there, for nobody else to look into.

    Raises
    ------
    StateError
        Where it cannot be made.
    """
    folder = run / ROOM
    with explained(folder, StateError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if not (folder / "README.txt").exists():
            folder.chmod(0o700)  # of whoever made it
            (folder / "README.txt").write_text(_WARNING)
    return folder
