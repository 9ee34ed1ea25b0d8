"""What an experiment will cost in traffic, estimated before anything is downloaded or trained.

Training sends every weight down and, up, the body's weights and those item rows that the client's loss can move.
All weights and updates travel as float32, item ids as int32.
"""

from math import ceil, prod

from rich.filesize import decimal
from rich.table import Table

from common.config import Experiment
from common.loss import BCELoss, SoftmaxLoss
from common.models.shapes import ITEM_TABLE, parameter_shapes
from common.privacy.schema import on_device

_FLOAT = 4  # bytes of a float32
_ID = 4  # bytes of an int32
_HELD_OUT = 2  # events of a sequence that validation and test keep from training
_MEANINGS = {
    "users": "people in the data; each is one client",
    "items": "size of the catalogue that is ranked",
    "parameters": "numbers that the model learns",
    "cohort": "users that train in a round, on average",
    "bytes_down_per_client": "one user receives this in each round that it trains in: the whole model",
    "bytes_up_per_client": "one user sends this back: the body's update and the item rows that it touched",
    "rounds_per_pass": "rounds until as many users have trained as there are",
    "passes": "how often each user trains in the whole run, on average",
    "bytes_training": "all rounds, all clients, both directions",
    "bytes_evaluation": "models sent to users so that they rank their held-out items; at the most",
    "bytes_total": "training and evaluation together; at the most",
}


def forecast(
    experiment: Experiment, users: int, items: int, mean_length: float, table_rows: int | None = None
) -> dict[str, int | float]:
    """Estimate the traffic of an experiment.

    Parameters
    ----------
    experiment : Experiment
        What would run.
    users : int
        Number of users, at least 1.
    items : int
        Size of the catalogue, at least 1.
    mean_length : float
        Mean number of events of a user, held-out ones included.
    table_rows : int, optional
        Rows of the model's table, where there are not as many as items.

    Returns
    -------
    dict
        `users`, `items`, `parameters`: counts; `cohort`: expected users a round; `bytes_down_per_client` and
        `bytes_up_per_client`: of one user in one round; `rounds_per_pass`: rounds until as many users took part as
        there are; `passes`: such passes in the whole run; `bytes_training`: both directions, all rounds;
        `bytes_evaluation`: the models sent down for all validations and the test (the answers are a few bytes);
        `bytes_total`: their sum. A run that `patience` stops early costs less.

    Raises
    ------
    ValueError
        There are no users or no items.
    """
    if users < 1 or items < 1:
        raise ValueError(f"a forecast needs users and items, not {users} and {items}")
    federation, evaluation = experiment.federation, experiment.evaluation
    sizes = {name: prod(shape) for name, shape in parameter_shapes(experiment.model, table_rows or items).items()}
    cohort = federation.mean_cohort(users)
    down = sum(sizes.values()) * _FLOAT
    rows = expected_rows(experiment, table_rows or items, mean_length)
    ids = 0 if _whole(experiment) else _ID  # all rows, in order, need no ids
    up = (sum(sizes.values()) - sizes[ITEM_TABLE]) * _FLOAT + round(rows * (experiment.model.dim * _FLOAT + ids))
    validations = -(-federation.rounds // evaluation.every)  # the last round is validated, too
    models_sent = validations * min(evaluation.users or users, users) + users
    training = federation.rounds * cohort * (down + up)
    return {
        "users": users,
        "items": items,
        "parameters": sum(sizes.values()),
        "cohort": cohort,
        "bytes_down_per_client": down,
        "bytes_up_per_client": up,
        "rounds_per_pass": users / cohort,
        "passes": federation.rounds * cohort / users,
        "bytes_training": training,
        "bytes_evaluation": models_sent * down,
        "bytes_total": training + models_sent * down,
    }


def expected_rows(experiment: Experiment, items: int, mean_length: float) -> float:
    """Estimate how many item rows a mean client's update touches in one round.

    Parameters
    ----------
    experiment : Experiment
        What would run.
    items : int
        Size of the catalogue.
    mean_length : float
        Mean number of events of a user, held-out ones included.

    Returns
    -------
    float
        An upper estimate: repeated items count as distinct, and no negative coincides with another or with a positive.
    """
    loss, local, longest = experiment.loss, experiment.federation.local, experiment.model.max_length
    if _whole(experiment):
        return items
    events = max(mean_length - _HELD_OUT, 0.0)
    passes = local.epochs or local.steps or 1
    # An epoch covers the whole sequence; a step sees one window, which has one more event than it has positions.
    drawn = passes if local.window == "random" else 1
    windows = ceil(events / longest) if local.epochs else drawn
    distinct = min(events, (longest + 1) * windows)
    if isinstance(loss, BCELoss):
        positions = max(events - 1, 0.0)
        negatives = passes * (positions if local.epochs else min(positions, longest))
    else:
        negatives = getattr(loss, "negatives", 0)
    return min(items, distinct + negatives)


def _whole(experiment: Experiment) -> bool:
    """Whether every row of the table travels: all are trained, or all are noised."""
    built = experiment.model.items != "own"
    return built or isinstance(experiment.loss, SoftmaxLoss) or on_device(experiment.privacy) is not None


def render(forecast: dict[str, int | float]) -> Table:
    """Lay a forecast out for a person.

    Parameters
    ----------
    forecast : dict
        As `forecast` returns it.

    Returns
    -------
    rich.table.Table
        One line per number: its name, its value in human units, and its meaning in plain words.
    """
    table = Table(title="Forecast", caption="An estimate for float32 weights; real sequences differ from the mean.")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("in plain words")
    for key, meaning in _MEANINGS.items():
        table.add_row(key.replace("_", " "), _human(key, forecast[key]), meaning)
    return table


def _human(key: str, value: float) -> str:
    if key.startswith("bytes"):
        return decimal(round(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
