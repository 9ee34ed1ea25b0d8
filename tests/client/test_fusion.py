"""Items whose own vector and those of their features are fused: sums, side by side, and by a gate."""

import numpy as np
import pytest
import torch

from client.cohort import train
from client.evaluation import rank
from common.config import Experiment
from common.data import itemrows
from common.data.catalogue import Catalogue
from common.data.prepare import prepare
from common.data.sequences import Sequences
from common.models.items import mixture_of
from tests.support import world

ITEMS, LENGTHS = 12, [3, 4, 5, 7, 9]
USERS = np.arange(len(LENGTHS))
EACH = pytest.mark.parametrize("fusion", ["sum", "concatenation", "gate"])
EACH_ITEMS = pytest.mark.parametrize("items", ["features", "both"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    lines = [f"u{u},i{i},{t}" for u, n in enumerate(LENGTHS) for t, i in enumerate(rng.choice(ITEMS, n, replace=False))]
    (folder / "events.csv").write_text("user,item,time\n" + "\n".join(lines) + "\n")
    known = sorted({line.split(",")[1] for line in lines})
    (folder / "about.csv").write_text("item,kind,price\n" + "".join(f"{i},{i[-1]},{int(i[1:]) ** 2}\n" for i in known))
    np.save(folder / "pictures.npy", rng.standard_normal((len(known), 3)))
    (folder / "pictures.items").write_text("\n".join(known) + "\n")
    return folder


def setup(files, fusion, items="both", loss="softmax", **local):
    columns = [
        {"kind": "categorical", "name": "kind"},
        {"kind": "numeric", "name": "price"},
        {"kind": "vectors", "name": "picture", "path": str(files / "pictures.npy")},
    ]
    about = {"source": str(files / "about.csv"), "columns": columns}
    size = {"dim": 8, "blocks": 1, "heads": 2, "max_length": 6, "dropout": 0.1}
    return Experiment.model_validate(
        {
            "name": "fused",
            "data": {"kind": "table", "path": str(files / "events.csv"), "features": about},
            "model": {**size, "items": items, "fusion": fusion},
            "loss": world.LOSSES[loss],
            "federation": {"local": {"steps": 1, "lr": 0.05, **local}, "weighting": "uniform"},
        }
    )


def opened(experiment):
    folder = prepare(experiment.data)
    rows = itemrows.table_rows(experiment, Catalogue.open(folder))
    return Sequences.open(folder), world.weights(experiment.model, rows)


def by_hand(experiment, table):
    """Vectors of all items, ``(R, D) → (I, D)``, one item and one feature at a time."""
    known = itemrows.load(prepare(experiment.data))
    own, dim = experiment.model.items == "both", table.shape[1]
    count, ends = len(known.offsets) - 1, np.cumsum((0, *known.groups))
    gates, vectors = table[len(table) - len(known.groups) - own :], []
    for item in range(count):
        parts = [table[item]] if own else []
        for begin, end in zip(ends, ends[1:], strict=False):
            here = range(known.offsets[item], known.offsets[item + 1])
            chosen = [i for i in here if begin <= known.rows[i] < end]
            rows = [known.weights[i] * table[count * own + known.rows[i]] for i in chosen]
            parts.append(torch.stack(rows).sum(0) if rows else torch.zeros(dim, dtype=table.dtype))
        if experiment.model.fusion == "gate":
            weights = torch.stack([part @ gate for part, gate in zip(parts, gates, strict=True)]).softmax(0)
            parts = [len(parts) * weight * part for weight, part in zip(weights, parts, strict=True)]
        if experiment.model.fusion == "concatenation":
            blocks = [[column for column in range(dim) if column * len(parts) // dim == m] for m in range(len(parts))]
            vectors.append(torch.cat([part[block] for part, block in zip(parts, blocks, strict=True)]))
        else:
            vectors.append(torch.stack(parts).sum(0))
    return torch.stack(vectors)


@EACH
@EACH_ITEMS
def test_vectors_and_gradients_are_those_by_hand(files, fusion, items):
    experiment = setup(files, fusion, items)
    sequences, (table, _) = opened(experiment)
    mixture = mixture_of(experiment, sequences.folder)
    assert len(table) == mixture.rows
    table = table.clone().requires_grad_()
    made, expected = mixture.vectors(table), by_hand(experiment, table)
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)
    stacked = torch.stack([table.detach(), 2 * table.detach()])
    torch.testing.assert_close(mixture.vectors(stacked)[0], made.detach(), atol=1e-6, rtol=0)
    twice = by_hand(experiment, 2 * table.detach())
    torch.testing.assert_close(mixture.vectors(stacked)[1], twice, atol=1e-6, rtol=0)
    pulls = torch.randn(3, *made.shape, generator=torch.Generator().manual_seed(1))
    back = mixture.gradient(pulls, table.detach())
    for user in range(3):
        theirs, ours = (
            torch.autograd.grad((each * pulls[user]).sum(), table, retain_graph=True)[0] for each in (expected, made)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        torch.testing.assert_close(back[user], theirs, atol=1e-5, rtol=0)


@EACH
@EACH_ITEMS
@pytest.mark.parametrize("loss", list(world.LOSSES))
def test_a_cohort_is_its_users_and_a_clip_that_clips_nothing_changes_nothing(files, fusion, items, loss):
    for steps in (1, 3):
        experiment = setup(files, fusion, items, loss, steps=steps)
        sequences, weights = opened(experiment)

        def singles(users, clip=None, experiment=experiment, sequences=sequences, weights=weights):
            chunks = train(experiment, weights, sequences, users, 2, clip)
            return {int(user): part.one(i) for part in chunks for i, user in enumerate(part.users)}

        together, clipped = singles(USERS), singles(USERS, 1e9)
        for user in USERS:
            assert world.gap(together[user], singles(USERS[user : user + 1])[user]) < 1e-6
            assert world.gap(together[user], clipped[user]) < 1e-6
        moving = [user for user, length in enumerate(LENGTHS) if length > 3]  # the others train on one event
        assert all(float(together[user].table.abs().max()) > 1e-4 for user in moving)
        if fusion == "gate":
            assert all(float(together[user].table[-3:].abs().max()) > 0 for user in moving)
    assert np.isfinite(rank(experiment, weights, sequences, USERS, "test").full).all()


def test_equal_gates_are_a_sum(files):
    experiment = setup(files, "gate")
    sequences, (table, _) = opened(experiment)
    mixture, plain = mixture_of(experiment, sequences.folder), mixture_of(setup(files, "sum"), sequences.folder)
    table = table.clone()
    table[plain.rows :] = 0
    torch.testing.assert_close(mixture.vectors(table), plain.vectors(table[: plain.rows]), atol=1e-6, rtol=0)


def test_there_must_be_something_to_fuse():
    with pytest.raises(ValueError, match="fusion is for items that are built"):
        world.experiment(model={"fusion": "gate"})


@pytest.mark.parametrize(("items", "parts"), [("features", 3), ("both", 4)])
def test_side_by_side_there_is_a_column_for_each(files, items, parts):
    given = setup(files, "concatenation", items).model_dump()
    for dim in (parts, parts - 1):
        narrow = {**given, "model": {**given["model"], "heads": 1, "dim": dim}}
        if dim == parts:
            experiment = Experiment.model_validate(narrow)
            assert mixture_of(experiment, prepare(experiment.data)).columns(dim).any(1).all()
        else:
            with pytest.raises(ValueError, match=rf"{parts} vectors side by side in model.dim={dim}.*dim={parts} or"):
                Experiment.model_validate(narrow)
