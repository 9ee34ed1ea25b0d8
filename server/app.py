"""The Flower ServerApp: never opens a data set; what it knows of users and items, the clients tell it."""

import logging
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.metrics import point
from common.run_config import experiment_of
from server.rounds import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names; into the folder $HUSHREC_OUT where that is set."""
    say = logging.getLogger("flwr").info
    experiment, out = experiment_of(context), os.environ.get("HUSHREC_OUT")
    outcome = serve(grid, experiment, Path(out) if out else None, lambda record: say("%s", record))
    figures = point(outcome.test[0], sorted({10, *experiment.evaluation.cutoffs}))
    say("%s", {"round": outcome.best_round, "kind": "test", **figures})
