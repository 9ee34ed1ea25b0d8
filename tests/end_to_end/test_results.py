"""What a run is worth: it learns; neither memory nor threads change a bit of it, the engine no more than rounding.

And a seed makes it the same again.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.processes import hushrec
from tests.support.runs import figures, metrics, weights

MODEL = "model.safetensors"


def done(folder, name, *overrides):
    finished = hushrec(folder, "run", "tiny.yaml", *overrides, "--out", name, "--json")
    assert finished.code == 0, finished.err
    return json.loads(finished.out)


def test_it_learns(fresh):
    result = done(fresh, "run", "federation.rounds=60", "data.users=200", "federation.cohort=50", "evaluation.every=10")
    ndcg = {name: ranker["ndcg@10"] for name, ranker in result["baselines"].items()} | {
        "run": result["test"]["ndcg@10"]
    }
    assert ndcg["random"]["high"] < ndcg["popularity"]["value"]
    assert ndcg["popularity"]["high"] < ndcg["run"]["low"]
    assert ndcg["run"]["value"] < ndcg["ceiling"]["high"], "nobody beats the law"
    losses = [line["loss"] for line in metrics(fresh / "run") if line["kind"] == "train"]
    assert losses[-1] < losses[0]


RUNTIME = {
    "little memory": ["runtime.memory_mb=64"],
    "all threads": ["runtime.threads=null"],
    "rare checkpoints": ["runtime.checkpoint_every=1000"],
}


@pytest.mark.parametrize("overrides", RUNTIME.values(), ids=RUNTIME)
def test_runtime_changes_no_result(fresh, undisturbed, overrides):
    done(fresh, "run", *overrides)
    assert figures(fresh / "run") == figures(undisturbed / "run")
    assert metrics(fresh / "run") == metrics(undisturbed / "run")
    assert (fresh / "run" / MODEL).read_bytes() == (undisturbed / "run" / MODEL).read_bytes()


def assert_alike(run, other, atol):
    """Two runs of one experiment, equal up to rounding."""
    one, two = metrics(run), metrics(other)
    assert [line.pop("kind") for line in one] == [line.pop("kind") for line in two]
    for line, same in zip(one, two, strict=True):
        assert line == pytest.approx(same, rel=1e-4)
    one, two = (load_file(folder / MODEL) for folder in (run, other))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        np.testing.assert_allclose(tensor, two[name], rtol=0, atol=atol, err_msg=name)


def test_the_engine_changes_no_result(fresh, undisturbed):
    done(fresh, "run", "runtime.engine=sequential")
    assert_alike(fresh / "run", undisturbed / "run", atol=1e-5)
    assert figures(fresh / "run") == figures(undisturbed / "run")  # of ranks, which rounding leaves alone here


def test_a_resumed_run_may_change_its_runtime(finished, undisturbed):
    (finished / "run" / "result.json").unlink()
    again = hushrec(finished, "run", "--resume", "run", "runtime.engine=sequential", "runtime.checkpoint_every=1")
    assert again.code == 0, again.err
    assert figures(finished / "run") == figures(undisturbed / "run")
    assert weights(finished / "run") == weights(undisturbed / "run")


LOSSES = ["loss={kind: gbce, negatives: 16}", "loss={kind: sampled-softmax, negatives: 16}", "loss={kind: bce}"]


@pytest.mark.parametrize("loss", LOSSES)
def test_both_engines_give_the_same(fresh, loss):
    """Also where only some rows travel, over several steps of cut windows, with sampled metrics and users left out.

    Up to rounding: a cohort is one pass, a user alone another, and Adam enlarges the smallest gradients.
    """
    more = ["federation.local.epochs=2", "federation.sampling=poisson", "evaluation={users: 20, sampled: 9, every: 2}"]
    small = ["model.max_length=5", "federation.rounds=3"]
    for engine in ("vectorized", "sequential"):
        done(fresh, engine, loss, *more, *small, f"runtime.engine={engine}")
    assert_alike(fresh / "vectorized", fresh / "sequential", atol=1e-4)


@pytest.mark.parametrize("engine", ["vectorized", "sequential"])
def test_the_same_engine_and_seed_give_the_same_bits(fresh, engine):
    for name in ("one", "other"):
        done(fresh, name, f"runtime.engine={engine}", "federation.rounds=3", "loss={kind: gbce, negatives: 16}")
    assert metrics(fresh / "one") == metrics(fresh / "other")
    assert (fresh / "one" / MODEL).read_bytes() == (fresh / "other" / MODEL).read_bytes()


def test_another_seed_is_another_run_on_the_same_data(fresh, undisturbed):
    other = done(fresh, "run", "seed=1")
    assert weights(fresh / "run") != weights(undisturbed / "run")
    assert metrics(fresh / "run") != metrics(undisturbed / "run")
    same = json.loads((undisturbed / "printed").read_text())["baselines"]
    for baseline in ("popularity", "ceiling"):
        assert other["baselines"][baseline]["mrr"]["value"] == same[baseline]["mrr"]["value"]


def test_the_same_seed_gives_the_same_bits(fresh, undisturbed):
    done(fresh, "run")
    assert (fresh / "run" / "model.safetensors").read_bytes() == (
        undisturbed / "run" / "model.safetensors"
    ).read_bytes()
    assert metrics(fresh / "run") == metrics(undisturbed / "run")
