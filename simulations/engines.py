"""What carries a run's messages: this process, its worker processes, or Flower's simulation engine on Ray.

The round loop and the client code are the same for all; an engine only brings a Grid to the one and calls the other.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from flwr.app import Context, Message, UserConfig
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp

from client import app as client_app
from client.device import Device
from common.errors import StateError, UsageError
from simulations.grid import InProcessGrid, places
from simulations.workers import Pool, ProcessPool, Team

T = TypeVar("T")


def play(device: Device, serve: Callable[[Grid], T]) -> T:
    """Give the server side a Grid of the experiment's engine, and return what it returns.

    Parameters
    ----------
    device : Device
        The data of all users, and the experiment with its `runtime` section.
    serve : callable
        The server side, such as `server.rounds.serve` with its other arguments filled in.

    Raises
    ------
    UsageError
        Where the engine needs an extra that is not installed.
    StateError
        Where Ray, or Flower's simulation engine on it, does not come up.
    """
    if device.experiment.runtime.engine == "ray":
        return _on_flowers_simulation(device, serve)
    with _workers(device) as helped:
        return serve(InProcessGrid(helped, device.experiment.runtime.engine))


@contextmanager
def _workers(device: Device) -> Iterator[Device]:
    """The same device with its training and ranking done by workers, where the experiment asks for them."""
    runtime = device.experiment.runtime
    if not runtime.workers:
        yield device
        return
    pool: Pool
    if runtime.ray_address:
        _need_ray()
        from simulations.cluster import RayPool

        pool = RayPool(device.experiment, device.catalogue.folder, runtime.workers, runtime.ray_address)
    else:
        pool = ProcessPool(device.experiment, device.catalogue.folder, device.rows, runtime.workers)
    try:
        team = Team(pool)
        yield replace(device, trainer=team.train, ranker=team.rank)
    finally:
        pool.close()


def _on_flowers_simulation(device: Device, serve: Callable[[Grid], T]) -> T:
    """Run under Flower's own engine, one node per user, the client's functions unchanged."""
    _need_ray()
    from flwr.simulation.run_simulation import run_simulation

    results: list[T] = []
    faults: list[BaseException] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            results.append(serve(grid))
        except BaseException as fault:  # Flower would only log it
            faults.append(fault)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    told: dict[str, Any] = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"log_to_driver": False},  # or what actors print would come between the lines of our own stdout
    }
    try:
        run_simulation(server, _told(device), len(device.sequences), backend_config=told)
    except RuntimeError as fault:  # Flower has logged why
        faults.append(StateError(f"Flower's simulation engine: {fault}"))
    if faults:
        raise faults[0]
    if not results:
        raise StateError("Flower's simulation engine ended without a result; its log says why")
    return results[0]


def _told(device: Device) -> ClientApp:
    """The ClientApp with the experiment put into its run config, as `flwr run` would do it."""
    run_config: UserConfig = {"experiment": device.experiment.model_dump_json(), "overrides": ""}
    told = places(device)

    def tell(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        # A context of our own, since Flower checks that its own was left as it is; the state is the node's.
        node_config: UserConfig = {**context.node_config, **told}
        return call_next(message, Context(context.run_id, context.node_id, node_config, context.state, run_config))

    app = ClientApp()
    app.query(mods=[tell])(client_app.query)
    app.train(mods=[tell])(client_app.train)
    app.evaluate(mods=[tell])(client_app.evaluate)
    return app


def _need_ray() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # as we tell Flower: nothing goes to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the default of coming versions; else it warns
    try:
        import ray  # noqa: F401
    except ImportError as fault:
        raise UsageError("this needs Ray: pip install 'hushrec[ray]', or runtime.engine=vectorized") from fault
