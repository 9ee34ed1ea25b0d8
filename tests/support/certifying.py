"""Short certificates."""

import importlib.util
from types import SimpleNamespace

from simulations import certify


def few(monkeypatch, rounds, cohort):
    """Few rounds of few users; and no Ray, whether or not it is there."""
    find = importlib.util.find_spec
    monkeypatch.setattr(certify, "ROUNDS", rounds)
    monkeypatch.setattr(certify, "COHORT", cohort)
    finding = SimpleNamespace(find_spec=lambda name: None if name == "ray" else find(name))
    monkeypatch.setattr(certify, "importlib", SimpleNamespace(util=finding))
