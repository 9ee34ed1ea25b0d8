"""The Flower ServerApp: never opens a data set; what it knows of users and items, the clients tell it."""

import logging
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.run_config import experiment_of
from server.journal import Observer
from server.rounds import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names; into the folder $HUSHREC_OUT where that is set."""
    out = os.environ.get("HUSHREC_OUT")
    outcome = serve(grid, experiment_of(context), Path(out) if out else None, log_line)
    logging.getLogger("flwr").info("done after %d rounds; best round %d", outcome.rounds, outcome.best_round)


log_line: Observer = lambda line: logging.getLogger("flwr").info("%s", line)  # noqa: E731
"""Observer that writes each record to Flower's log."""
