"""Synthetic data know what caused an event, and a trained model's explanations find it; so do the law's own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from common.data.law import Law
from common.loading import parse
from common.sources import SyntheticData
from simulations import rundir
from simulations.causes import known_causes
from simulations.inference import Trained
from simulations.runner import run
from simulations.trust import render, trust

pytest.importorskip("captum")

SMALL = """
name: small
data: {kind: synthetic, users: 1000, items: 120, interests: 6, mean_length: 14, max_length: 30}
model: {dim: 32, blocks: 1, heads: 2, dropout: 0.1, max_length: 30}
federation: {rounds: 60, cohort: 128, local: {steps: 1, lr: 1.0}, optimizer: {kind: fedadam, lr: 0.01}}
evaluation: {every: 60}
"""


def trained_with(folder, text):
    experiment = parse(text)
    where = rundir.create(experiment, folder / "run")
    run(experiment, where, Console(quiet=True))
    return Trained(where)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_with(tmp_path_factory.mktemp("causes"), SMALL)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The same data; the model sees the last eight events."""
    text = SMALL.replace("dropout: 0.1, max_length: 30", "max_length: 8").replace("rounds: 60", "rounds: 1")
    return trained_with(tmp_path_factory.mktemp("short"), text.replace("every: 60", "every: 1"))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 1.0), st.floats(0.0, 1.0))
def test_what_events_may_cause_is_what_the_law_expects(seed, recency, follow):
    """Over all events and noise it is the probability of the next item: the law once more, from the other side."""
    config = SyntheticData(kind="synthetic", users=1, items=24, interests=4, seed=seed, recency=recency, follow=follow)
    law, rng = Law.of(config), np.random.default_rng(seed)
    history = np.stack([rng.permutation(24)[:7] for _ in range(5)])
    lengths = np.array([1, 3, 7, 5, 7])
    scores = law.scores(history, lengths)
    for item in range(24):
        caused = law.blame(history, lengths, np.full(5, item))
        assert not caused[np.arange(7) >= lengths[:, None]].any()
        new = scores[:, item] > 0
        expected = config.noise * law.popularity[item] + (1 - config.noise) * caused.sum(1)
        np.testing.assert_allclose(scores[new, item], expected[new], rtol=1e-12)


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("window", ["trained", "short"])
def test_who_knows_finds_all_and_who_lies_finds_none(request, window, split):
    trained = request.getfixturevalue(window)
    data, model = trained.device.sequences, trained.device.experiment.model
    users = np.arange(len(data))
    stops, goals = data.stops(users, split)
    users = users[(goals >= 0) & (stops > data.starts(users))]
    everything, place = np.load(data.folder / "causes.npy"), getattr(data, split)
    seen = []

    def oracle(past, items):
        """One user after another, from the arrays: the item that did it, wherever it stands in what the model sees."""
        told, rows = torch.zeros(past.items.shape), iter(range(len(items)))
        for user in users:
            cause, start, stop = everything[place[user]], data.starts(user[None])[0], place[user]
            first = max(start, stop - model.max_length)
            if cause >= 0 and start + cause >= first and stop - first > 3:
                row = next(rows)
                assert items[row] == data.items[place[user]]
                history = past.items[row, : past.lengths[row]].tolist()
                told[row, history.index(data.items[start + cause])] = 1
                seen.append(stop - start)
        return {"right": told, "wrong": -told}

    found = known_causes(trained, split, users, oracle)
    assert found["users"] == len(seen) > 300
    assert (max(seen) > model.max_length) == (window == "short")
    shares = found["found"]
    assert (shares["right"], shares["wrong"]) == (1, 0), "of four events or more the wrong order names it last"
    assert 0.15 < shares["chance"] < 0.6
    assert shares["law"] > 0.9


def test_explanations_find_causes(trained):
    found = trust(trained, "test", 400)
    shares = found["causes"]["found"]
    assert shares.keys() == {"combined", "gradients", "attention", "recent", "chance", "law"}
    assert shares["law"] > shares["combined"] > 0.7, shares
    assert min(shares["gradients"], shares["attention"]) > shares["chance"] + 0.1, shares
    assert "combined" in found["beats_random"]
    console = Console(record=True, width=100)
    render(console, found)
    text = console.export_text()
    assert f"{shares['combined']:.3f}" in text
    assert "law of the data" in text


def test_other_data_do_not_know(trained, monkeypatch):
    data = trained.device.sequences
    monkeypatch.setattr(type(data), "optional", lambda self, name: None)
    assert known_causes(trained, "test", np.arange(5), lambda past, items: {}) is None
