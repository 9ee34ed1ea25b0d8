"""The experiment that travels in Flower's run config, which holds flat scalars only."""

import shlex

from flwr.app import Context

from common.config import Experiment
from common.loading import load, parse


def experiment_of(context: Context) -> Experiment:
    """Experiment of a Flower context: `experiment` is a path or, where it begins with a brace, JSON; with `overrides`.

    Raises
    ------
    ConfigError
        Where the experiment cannot be read.
    """
    text = str(context.run_config["experiment"])
    overrides = shlex.split(str(context.run_config.get("overrides", "")))
    return parse(text, "run config", overrides) if text.lstrip().startswith("{") else load(text, overrides)
