"""Errors that a person can act on, each with the process's exit code."""


class HushrecError(Exception):
    """Base of all errors that end a command with one clear line instead of a traceback.

    The message names the place (file, line, key) and the mend.
    """

    exit_code = 1


class UsageError(HushrecError):
    """The command line or the configuration is wrong; exit code 2."""

    exit_code = 2


class ConfigError(UsageError):
    """One or more faults in an experiment's YAML or overrides; one line per fault."""

    def __init__(self, faults: list[str]):
        super().__init__("\n".join(faults))
        self.faults = faults


class DataError(HushrecError):
    """A data file is missing, empty, malformed or disagrees with the configuration; exit code 2."""

    exit_code = 2


class StateError(HushrecError):
    """A checkpoint, model file or run directory is missing, truncated or belongs to another experiment; exit code 1."""


class Interrupted(HushrecError):  # noqa: N818 - it is a stop, not a fault
    """The run was stopped by the user and can be resumed; exit code 130."""

    exit_code = 130


class BudgetSpent(HushrecError):  # noqa: N818 - it is a stop, not a fault
    """The next release would exceed the privacy budget; the last paid model is kept; exit code 3."""

    exit_code = 3


class TooFewNodes(HushrecError):  # noqa: N818 - it is a stop, not a fault
    """Too few nodes were there for too long; the run can be resumed; exit code 4."""

    exit_code = 4
