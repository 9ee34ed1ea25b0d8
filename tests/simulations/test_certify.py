"""The certificate: it holds for the code as it is, and each planted bug breaks the check that is meant to see it."""

import json
import sys

import numpy as np
import pytest
import torch
from flwr.app import Array, Error, Message

from client import evaluation, gradients, step, training
from common.config import Experiment
from common.errors import UsageError
from common.loading import parse
from common.models.weights import Weights
from common.wire import UPDATE
from server import curator as curators
from server import strategy as strategies
from server.sampling import cohort
from simulations import centralised, certify, cli, pooled
from simulations.certify import Check, altered, parity_mode
from simulations.grid import FIRST_NODE, InProcessGrid
from tests.support.certifying import few
from tests.support.leftovers import MARK, nobody_left
from tests.support.processes import hushrec

ROUNDS, COHORT = 5, 10
TEXT = """
name: tiny
data: {kind: synthetic, users: 40, items: 30, interests: 4, mean_length: 9, max_length: 30}
model: {dim: 8, blocks: 1, heads: 2, dropout: 0.2, max_length: 11}
loss: {kind: sampled-softmax, negatives: 7}
federation: {cohort: 20, optimizer: {kind: fedadam, lr: 0.003}}
"""
USERS, PARITY = 40, altered(parse(TEXT), federation={"cohort": COHORT})
SINGLES = [
    "each update, 1 local step(s): vectorized = sequential",
    "each update, 5 local step(s): vectorized = sequential",
]
MEANS = ["mean update, 1 local step(s): as summed = one by one", "mean update, 5 local step(s): as summed = one by one"]
SGD = "weights after one step of plain SGD: federated = centralised"
ADAM = f"weights after {ROUNDS} rounds: federated = centralised"
METRICS = [f"test {name}: federated = centralised" for name in ("hr@10", "ndcg@10", "mrr")]
ON_RAY = ["each update, 1 local step(s): vectorized = ray", "each update, 5 local step(s): vectorized = ray"]


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    few(monkeypatch, ROUNDS, COHORT)


@pytest.fixture
def called(tmp_path, monkeypatch, capsys):
    """Run `hushrec certify tiny.yaml` in this process; give its exit code, and what it says on stdout and stderr."""
    (tmp_path / "tiny.yaml").write_text(TEXT)

    def call(*argv: str):
        monkeypatch.setattr(sys, "argv", ["hushrec", "certify", str(tmp_path / "tiny.yaml"), *argv])
        return cli._exit_code(), *capsys.readouterr()

    return call


PRIVATE = ["federation={sampling: poisson, weighting: uniform, cohort: 20}"]
PRIVATE += ["privacy={kind: user-level, noise_multiplier: 1, clipping_norm: 0.5}"]


@pytest.mark.parametrize(
    "metrics", ["{privacy: public-holdout, holdout: 0.3}", "{noise: 20}", "{privacy: unaccounted}"]
)
def test_whatever_a_private_experiments_metrics_may_look_at(metrics):
    experiment = parse(TEXT, overrides=[*PRIVATE, f"evaluation={metrics}"])
    assert broken(certify.certify(experiment)) == []
    short = altered(experiment, federation={"rounds": 2}, evaluation={"every": 1})
    assert pooled.train(short)["steps"] == 2


def broken(checks):
    return [check.name for check in checks if not check.passed]


# --- as it is --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", centralised.LOSSES)
@pytest.mark.parametrize("optimizer", ["fedadam", "fedavgm"])
def test_it_holds(loss, optimizer):
    experiment = parse(TEXT, overrides=[f"loss={{kind: {loss}}}", f"federation.optimizer={{kind: {optimizer}}}"])
    said = []
    checks = certify.certify(experiment, said.append)
    names = [*SINGLES, *ON_RAY, *MEANS, SGD, ADAM, *METRICS, "cost of 5 local steps in test ndcg@10"]
    assert sorted(check.name for check in checks) == sorted(names)
    assert broken(checks) == []
    for check in checks:
        if check.bound is not None:
            assert 0 <= check.measured <= check.bound
    assert len(said) > 5


def test_without_ray_that_part_is_no_claim():
    checks = {check.name: check for check in certify.certify(parse(TEXT))}
    for name in ON_RAY:
        assert checks[name] == Check(name, None, None, "needs the ray extra")


def test_the_command_says_it_as_json(called):
    code, out, err = called("--json")
    said = json.loads(out)
    assert code == 0
    assert said.keys() == {"checks", "passed"}
    assert said["passed"] is True
    for check in said["checks"]:
        assert check.keys() == {"name", "measured", "bound", "note", "passed"}
        assert check["passed"] is True
    assert "local step(s), sequential" in err


def test_the_command_says_it_for_people(called):
    code, out, _ = called("loss={kind: softmax}")
    assert code == 0
    assert "BROKEN" not in out
    assert out.count("passed") == len([*SINGLES, *MEANS, SGD, ADAM, *METRICS])


def test_with_ray_and_in_a_process_of_its_own(tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "tiny.yaml").write_text(TEXT)
    with nobody_left(here=False) as folder:
        few = f"import simulations.certify as c\nc.ROUNDS, c.COHORT = {ROUNDS}, {COHORT}"
        alone = f"os.environ['{MARK}'] = '{folder}'"
        done = hushrec(tmp_path, "certify", "tiny.yaml", "--json", before=f"{few}\n{alone}")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["passed"] is True
    measured = {check["name"]: check["measured"] for check in said["checks"]}
    for name in ON_RAY:
        assert measured[name] < 1e-6


def test_threads_are_those_of_the_experiment(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    certify.certify(parse(TEXT, overrides=["runtime.threads=3"]))
    assert asked == [3]


def test_parity_mode_changes_the_federation_only():
    optimizer = "{kind: fedadam, lr: 0.01, beta1: 0.5, beta2: 0.6, eps: 0.1}"
    local = "{epochs: 3, lr: 0.1, prox: 0.5, window: random}"
    overrides = [f"federation.optimizer={optimizer}", f"federation.local={local}", "federation.weighting=uniform"]
    experiment = parse(TEXT, overrides=[*overrides, "evaluation.patience=1", "evaluation.users=3"])
    parity = parity_mode(experiment)
    assert parity.federation.local.model_dump() == {
        "steps": 1,
        "epochs": None,
        "lr": 1.0,
        "prox": 0.0,
        "window": "random",
        "predict": "target",
    }
    assert parity.federation.optimizer == experiment.federation.optimizer, "an Adam keeps its settings"
    assert (parity.federation.rounds, parity.federation.weighting) == (ROUNDS, "events")
    assert (parity.evaluation.every, parity.evaluation.patience, parity.evaluation.users) == (ROUNDS, None, None)
    for section in ("seed", "data", "model", "loss", "runtime"):
        assert getattr(parity, section) == getattr(experiment, section)
    for kind in ("fedavg", "fedavgm", "fedadagrad"):
        other = parse(TEXT, overrides=[f"federation.optimizer={{kind: {kind}}}"])
        assert parity_mode(other).federation.optimizer == Experiment(name="x", data=other.data).federation.optimizer


@pytest.mark.parametrize("kind", ["bce", "gbce"])
def test_a_loss_that_the_other_side_does_not_know_is_refused(kind, called):
    with pytest.raises(UsageError, match=f"loss.kind={kind}: certified are softmax and sampled-softmax"):
        certify.certify(parse(TEXT, overrides=[f"loss={{kind: {kind}}}"]))
    code, out, err = called(f"loss={{kind: {kind}}}")
    assert (code, out) == (2, "")
    assert err.startswith("error: loss.kind=")


# --- planted bugs ----------------------------------------------------------------------------------------------------


def unweighted(monkeypatch):
    """Every update counts the same."""
    for module in (curators, certify):
        monkeypatch.setattr(module, "weigh", lambda replies, config: np.ones(len(replies), dtype=np.float32))


def stale(monkeypatch):
    """Clients train on the weights of the round before."""
    send = strategies.FederatedRanking.configure_train

    def before(self, server_round, arrays, config, grid):
        last, self.last = self.__dict__.get("last", arrays), arrays
        return send(self, server_round, last, config, grid)

    monkeypatch.setattr(strategies.FederatedRanking, "configure_train", before)


def forgetful(monkeypatch):
    """One chunk's sum is left out."""
    whole = training.Updates.summed

    def summed(self, importance):
        rows, total = whole(self, importance)
        kept = 0 if self._own.windows.events.shape[2] == 8 + 1 else 1
        return rows, Weights(*(part * kept for part in total))

    monkeypatch.setattr(training.Updates, "summed", summed)


def halved(monkeypatch):
    """The server makes half a step."""
    monkeypatch.setattr(curators, "mean_of", lambda total, weight: Weights(*(part / weight / 2 for part in total)))


def half_sent(monkeypatch):
    """What a client sends alone is half of what enters the sum."""
    whole = training.Updates.one
    monkeypatch.setattr(training.Updates, "one", lambda self, i: Weights(*(part / 2 for part in whole(self, i))))


def half_learnt(monkeypatch):
    """Clients halve the gradient, alone and together."""
    whole = training.step_loss
    for module in (training, gradients):
        monkeypatch.setattr(module, "step_loss", lambda *arguments: whole(*arguments) / 2)


def mistimed(monkeypatch):
    """Dropout masks are those of another round."""
    draw = step.uniform_bits
    monkeypatch.setattr(step, "uniform_bits", lambda seed, name, round_, *rest: draw(seed, name, round_ + 1, *rest))


def different_alone(monkeypatch):
    """A client that is called alone has its own idea of training."""
    whole = InProcessGrid._one

    def other(self, message):
        reply = whole(self, message)
        if message.metadata.message_type == "train":
            update = reply.content.array_records[UPDATE]
            update["body"] = Array(update["body"].numpy() * np.float32(1.01))
        return reply

    monkeypatch.setattr(InProcessGrid, "_one", other)


def lossy(monkeypatch):
    """One user answers only where all are called at once."""
    whole, one = InProcessGrid._one, FIRST_NODE + int(cohort(PARITY.federation, USERS, PARITY.seed, 1)[0])

    def other(self, message):
        asked = message.metadata
        lost = asked.message_type == "train" and asked.dst_node_id == one
        return Message(Error(1, "lost"), reply_to=message) if lost else whole(self, message)

    monkeypatch.setattr(InProcessGrid, "_one", other)


def spoilt(monkeypatch):
    """The numbers of some users are NaN where they train together."""
    whole = training.Updates.one

    def one(self, i):
        table, body = whole(self, i)
        return Weights(table, torch.full_like(body, torch.nan) if i == 1 else body)

    monkeypatch.setattr(training.Updates, "one", one)


def unmasked(monkeypatch):
    """Clients rank what a user had already, too."""

    def ranks(scored, sequences, users, stops, targets, placed=None):
        return evaluation.target_ranks(scored, torch.from_numpy(targets))

    monkeypatch.setattr(evaluation, "held_out_ranks", ranks)


BUGS = {
    unweighted: [SGD, ADAM],
    stale: [ADAM],
    forgetful: [*MEANS, SGD, ADAM],
    halved: [SGD],
    half_sent: MEANS,
    half_learnt: [SGD],
    mistimed: [SGD, ADAM],
    different_alone: SINGLES,
    lossy: SINGLES,
    spoilt: SINGLES,
    unmasked: METRICS[1:],
}


@pytest.mark.parametrize("loss", centralised.LOSSES)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_ends_the_command_with_1_and_it_says_where(bug, loss, called, monkeypatch):
    bug(monkeypatch)
    code, out, _ = called("--json", f"loss={{kind: {loss}}}")
    said = json.loads(out)
    assert code == 1
    assert said["passed"] is False
    found = [check["name"] for check in said["checks"] if not check["passed"]]
    assert set(BUGS[bug]) <= set(found)
    if bug in {halved, stale, unmasked}:
        assert not {*SINGLES, *MEANS} & set(found), "updates are not to blame"


def test_what_could_not_be_measured_is_not_certified(called, monkeypatch):
    lossy(monkeypatch)
    code, out, _ = called()
    assert code == 1
    assert out.count("BROKEN") >= len(SINGLES)
    assert f"{COHORT} and {COHORT - 1} users answered" in out
