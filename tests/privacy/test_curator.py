"""The trusted curator: who takes part, what is told, whose ranks are looked at, and a clip that follows the updates."""

import math
from functools import partial

import numpy as np
import pytest
from flwr.app import ConfigRecord

from client.handlers import handle_train
from common.errors import StateError
from common.metrics import point
from common.wire import METRICS
from server.curator import Curator, PrivateCurator, curator
from server.ledger import RANKING, UPDATE
from server.rounds import serve
from server.sampling import some_users
from server.shard import Terms, admit
from simulations.engines import play
from tests.privacy import private
from tests.support import world

ROUNDS = 3000
RNGS = ["reproducible", "secure"]


def cohorts(experiment, population, rounds=ROUNDS):
    made = private.curator(experiment, population)
    return [made.cohort(round_) for round_ in range(1, rounds + 1)]


# --- who takes part --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize(("population", "cohort"), [(40, 8), (7, 1), (30, 24)])
def test_cohorts_are_independent_coin_flips(rng, population, cohort):
    drawn = cohorts(private.experiment(privacy={"rng": rng}, federation={"cohort": cohort}), population)
    p = cohort / population
    sizes = np.array([len(users) for users in drawn])
    variance = population * p * (1 - p)
    assert abs(sizes.mean() - population * p) < 5 * math.sqrt(variance / ROUNDS)
    fourth = variance * (1 + 3 * (population - 2) * p * (1 - p))  # central moment of a binomial law
    assert abs(sizes.var() - variance) < 5 * math.sqrt((fourth - variance**2) / ROUNDS)
    taken = np.zeros((ROUNDS, population))
    for round_, users in enumerate(drawn):
        assert (np.diff(users) > 0).all()
        taken[round_, users] = 1
    assert (abs(taken.mean(0) - p) < 5.5 * math.sqrt(p * (1 - p) / ROUNDS)).all()
    together = np.corrcoef(taken.T)[np.triu_indices(population, 1)]
    assert abs(together).max() < 5.5 / math.sqrt(ROUNDS)
    assert abs(together.mean()) < 5 / math.sqrt(ROUNDS * len(together))


def test_rounds_without_anybody_come_and_are_composed():
    experiment = private.experiment(federation={"cohort": 1}, privacy={"noise_multiplier": 4.0})
    made = private.curator(experiment, 10)
    empty = [round_ for round_ in range(1, 41) if not len(made.cohort(round_))]
    assert 5 < len(empty) < 25  # about 14
    for round_ in empty:
        update, told = made.mean(round_, [], private.zeros(experiment))
        assert all((part != 0).all() for part in update)
        assert told == {"clients": 1, "clipping_norm": 1.0}
    assert made.card(9)["rounds"] == made.ledger.count(UPDATE) == len(empty)
    assert made.card(9)["epsilon"] == made.terms.cost(len(empty), 0)


def test_secret_cohorts_follow_no_seed():
    secure, plain = (private.experiment(privacy={"rng": rng}, federation={"cohort": 20}) for rng in RNGS[::-1])

    def same(experiment):
        one, other = (cohorts(experiment, 40, 50) for _ in range(2))
        return sum(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    assert same(plain) == 50
    assert same(secure) == 0  # 40 coins come out the same once in a trillion


def test_a_round_that_is_run_again_draws_another_cohort():
    """What the first try has released must not be subtracted from the second, user by user."""
    experiment = private.experiment(federation={"cohort": 20})
    made = private.curator(experiment, 40)
    first, again = made.cohort(1), made.cohort(1)
    np.testing.assert_array_equal(first, again)
    made.ledger.pay(UPDATE, 1)
    assert not np.array_equal(first, made.cohort(1))


@pytest.mark.parametrize("rng", RNGS)
def test_a_cap_cuts_at_random(rng):
    drawn = cohorts(private.experiment(privacy={"rng": rng, "cap": 9}, federation={"cohort": 8}), 40)
    sizes = np.array([len(users) for users in drawn])
    assert sizes.max() == 9
    assert 0.3 < (sizes == 9).mean() < 0.65  # P(B(40, .2) ≥ 9) = .407
    often = np.bincount(np.concatenate(drawn), minlength=40)
    first, last = often[:10].mean(), often[-10:].mean()  # whoever is cut, it is not those at one end
    assert abs(last - first) < 6 * math.sqrt(often.mean() / 5)


def test_a_population_smaller_than_the_cohort_takes_part_as_a_whole():
    assert [users.tolist() for users in cohorts(private.experiment(federation={"cohort": 8}), 5, 3)] == [
        [*range(5)]
    ] * 3


# --- public users ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rng", RNGS)
def test_public_users_never_train_and_only_they_are_asked_to_judge(rng):
    experiment = private.experiment(
        privacy={"rng": rng},
        federation={"cohort": 12},
        evaluation={"privacy": "public-holdout", "holdout": 0.3},
    )
    made = private.strategy(experiment, 20)

    def judges(split, round_):
        config = ConfigRecord({"split": split})
        sent = made.configure_evaluate(round_, made.arrays(), config, None)
        return [message.metadata.dst_node_id - world.NODE for message in sent]

    public = judges("test", 1)
    assert len(public) == 6
    assert all(judges(split, round_) == public for split in ("validation", "test") for round_ in (1, 2, 9))
    trained = set().union(*(private.cohort_of(made, round_) for round_ in range(1, 61)))
    assert trained == set(range(20)) - set(public)
    terms = made.curator.terms
    assert (terms.users, terms.rate) == (14, 12 / 14)
    assert made.curator.card(9)["users"] == 14
    assert terms.metrics is None


def test_a_run_with_public_users_pays_for_updates_only(tmp_path):
    experiment = private.experiment(
        federation={"cohort": 6, "rounds": 2}, evaluation={"privacy": "public-holdout", "holdout": 0.3, "every": 1}
    )
    device = world.device(experiment, world.sequences(world.random_histories([6] * 12, 20)), 20)
    lines = []
    outcome = play(device, partial(serve, experiment=experiment, folder=tmp_path, observe=lines.append))
    made = private.curator(experiment, 12, folder=tmp_path)
    assert (made.ledger.count(UPDATE), made.ledger.count(RANKING)) == (2, 0)
    assert np.flatnonzero(np.isfinite(outcome.test[0])).tolist() == made.judges("test", 1).tolist()
    assert outcome.figures == point(outcome.test[0], [5, 10, 20])
    assert outcome.card["epsilon"] == made.terms.cost(2, 0)


# --- what is told ----------------------------------------------------------------------------------------------------


def answers(experiment, n=6, **metrics):
    return [private.message(user, *private.numbers(experiment, user, 2.0), **metrics) for user in range(n)]


SAID = {
    "noised": {"clients", "clipping_norm"},
    "public-holdout": {"clients", "clipping_norm"},
    "unaccounted": {"clients", "clipping_norm", "loss", "clipped_share", "rejected"},
}


@pytest.mark.parametrize("adaptive", [None, {}])
@pytest.mark.parametrize("evaluation", SAID)
def test_only_what_is_paid_for_is_told_of_a_round(evaluation, adaptive):
    experiment = private.experiment(privacy={"adaptive": adaptive}, evaluation={"privacy": evaluation})
    made = private.strategy(experiment)
    _, said = made.aggregate_train(1, [*answers(experiment, below=0), world.answer(7, error="no battery")])
    assert set(said) == SAID[evaluation] | ({"below"} if adaptive == {} else set())
    if evaluation == "unaccounted":
        assert (said["clients"], said["loss"], said["clipped_share"], said["rejected"]) == (6, 0.5, 1.0, 1)
        assert made.rejections == {"refused: no battery": 1}
    else:
        assert said["clients"] == 5  # the mean cohort, whoever came
        assert made.rejections == {}


@pytest.mark.parametrize("evaluation", ["noised", "public-holdout"])
def test_what_is_told_does_not_depend_on_who_came(evaluation):
    """Losses, counts and refusals may be anything: the line is the same but for the noise, which falls on weights."""
    experiment = private.experiment(evaluation={"privacy": evaluation})
    lines = []
    for messages in (answers(experiment), answers(experiment, 1, loss=9.0, events=77, below=0), []):
        lines.append(dict(private.strategy(experiment).aggregate_train(1, messages)[1]))
    assert lines[0] == lines[1] == lines[2] == {"clients": 5, "clipping_norm": 1.0}


@pytest.mark.parametrize("evaluation", ["noised", "unaccounted"])
def test_a_whole_run_writes_nothing_more(evaluation, tmp_path):
    experiment = private.experiment(
        federation={"cohort": 6, "rounds": 2},
        privacy={"noise_multiplier": 4.0},
        evaluation={"privacy": evaluation, "every": 1, "sampled": 3},
    )
    device = world.device(experiment, world.sequences(world.random_histories([1] + [6] * 11, 20)), 20)
    lines = []
    play(device, partial(serve, experiment=experiment, folder=tmp_path, observe=lines.append))
    figures = {f"{name}@{k}" for name in ("hr", "ndcg") for k in (5, 10, 20)} | {"mrr"}
    timed = evaluation == "unaccounted"  # how long it takes hangs on the cohort
    common = {"round", "kind"} | ({"seconds"} if timed else set())
    extra = {name + "|s3" for name in figures} if evaluation == "unaccounted" else set()
    train = common | ({"phases"} if timed else set()) | SAID[evaluation]
    wanted = {"train": train, "validation": common | figures | extra | {"users"}}
    assert [set(line) for line in lines] == [wanted[line["kind"]] for line in lines]
    assert [line["kind"] for line in lines] == ["train", "validation"] * 2
    asked, answered = 12, 11  # one has nothing held out, which is nobody's business
    assert {line["users"] for line in lines[1::2]} == {answered if evaluation == "unaccounted" else asked}


@pytest.mark.parametrize("evaluation", ["noised", "public-holdout", "unaccounted"])
def test_where_every_reply_is_refused_the_run_ends(evaluation):
    """Not at once: a round of refusals may happen by chance, and a run that ends then would tell of it."""
    experiment = private.experiment(evaluation={"privacy": evaluation})
    made = private.strategy(experiment)
    refusals = [world.answer(user, error="no battery") for user in range(3)]
    for round_ in (1, 2):
        made.aggregate_train(round_, refusals)
    with pytest.raises(StateError, match="for 3 rounds every reply was refused: refused: no battery"):
        made.aggregate_train(3, refusals)
    assert made.curator.ledger.count("update") == 2


def test_later_refusals_do_not_end_the_run():
    experiment = private.experiment()
    made = private.strategy(experiment)
    made.aggregate_train(1, [private.message(0, *private.numbers(experiment, 0, 1.0))])
    for round_ in range(2, 9):
        made.aggregate_train(round_, [world.answer(0, error="no battery")])
    assert made.curator.ledger.count("update") == 8


def test_where_all_may_be_told_a_round_of_refusals_goes_on():
    made = private.strategy(private.experiment())
    _, said = made.aggregate_train(1, [world.answer(user, error="no battery") for user in range(3)])
    assert said["rejected"] == 3
    assert "loss" not in said
    assert all((part != 0).all() for part in made.weights)


# --- figures ---------------------------------------------------------------------------------------------------------

RANKS = np.array([1.0, 1, 2.5, 8, 9, 20, np.nan, 3])


def test_paid_figures_are_those_of_the_ranks_but_for_the_noise():
    experiment = private.experiment(evaluation={"privacy": "noised", "noise": 1e-9})
    made = private.curator(experiment, 8)
    found, exact = made.figures(RANKS, 8, 1, [5, 10]), point(RANKS, [5, 10])
    for name in ("hr@5", "hr@10"):
        assert found[name] == pytest.approx(exact[name] * 7 / 8, abs=1e-6)  # of those who were asked, not who answered
    assert found["ndcg@10"] <= exact["ndcg@10"] * 7 / 8 + 1e-6  # half a rank counts as the next whole one
    assert found["mrr"] == pytest.approx((1 + 1 + 1 / 3 + 1 / 8 + 1 / 9 + 1 / 20 + 1 / 3) / 8, abs=1e-6)
    assert made.ledger.count(RANKING) == 1
    assert made.ledger.lines[0]["std"] == 1e-9


@pytest.mark.parametrize("rng", RNGS)
def test_the_noise_on_figures_has_the_promised_scale(rng):
    experiment = private.experiment(privacy={"rng": rng}, evaluation={"privacy": "noised", "noise": 7.0})
    made = private.curator(experiment, 8)
    hits = np.array([made.figures(RANKS, 8, round_, [10])["hr@10"] for round_ in range(1, 1601)])
    noise = hits * 8 - 6
    assert private.fits(noise, 7.0 * math.sqrt(10)) > 1e-6
    assert private.fits(noise, 7.0 * math.sqrt(10) / 1.5) < 1e-6
    assert made.ledger.count(RANKING) == 1600


def test_the_noise_on_figures_shrinks_with_a_hypothetical_population():
    experiment = private.experiment(privacy={"population": 80}, evaluation={"privacy": "noised", "noise": 70.0})
    made = private.curator(experiment, 8)
    hits = np.array([made.figures(RANKS, 8, round_, [10])["hr@10"] for round_ in range(1, 401)])
    assert private.fits(hits * 8 - 6, 7.0 * math.sqrt(10)) > 1e-6


def test_unaccounted_figures_are_plain_and_cost_nothing():
    made = private.curator(private.experiment(), 8)
    assert made.figures(RANKS, 8, 1, [5]) == point(RANKS, [5])
    assert made.ledger.lines == []
    assert made.card(9)["metrics"] == "unaccounted"
    assert made.card(9)["epsilon_metrics"] is None


def test_ranks_that_nobody_has_still_give_figures():
    made = private.curator(private.experiment(evaluation={"privacy": "noised"}), 8)
    assert all(math.isfinite(value) for value in made.figures(np.full(8, np.nan), 0, 1, [5]).values())


# --- a clip that follows the updates ---------------------------------------------------------------------------------


def adapted(start, norms, rounds=60, cohort=40, **adaptive):
    """The clipping norms of some rounds in which the updates have such norms."""
    experiment = private.experiment(
        privacy={"clipping_norm": start, "noise_multiplier": 0.01, "adaptive": adaptive}, federation={"cohort": cohort}
    )
    made, weights = private.curator(experiment, 2 * cohort), private.zeros(experiment)
    updates = [private.numbers(experiment, i, norm, [i % private.ITEMS]) for i, norm in enumerate(norms)]
    found = []
    for round_ in range(1, rounds + 1):
        replies = [
            private.reply(i, *update, [i % private.ITEMS], below=int(norm <= made.clip))
            for i, (norm, update) in enumerate(zip(norms, updates, strict=True))
        ]
        _, told = made.mean(round_, replies, weights)
        assert told["clipping_norm"] == (found[-1] if found else start)  # of the round itself, not of the next
        found.append(made.clip)
    return found


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_the_clip_finds_the_norm_of_the_updates(start):
    found = adapted(start, [1.0] * 40)
    assert 0.8 < found[-1] < 1.25
    assert all(0.75 < norm < 1.35 for norm in found[-15:])


@pytest.mark.parametrize("quantile", [0.25, 0.75])
def test_the_clip_finds_a_quantile(quantile):
    norms = np.linspace(0.5, 1.5, 41)[:40]
    found = np.mean(adapted(1.0, norms.tolist(), rounds=80, quantile=quantile)[-40:])
    assert abs(found - (0.5 + quantile)) < 0.1


def test_the_clip_moves_by_the_rule():
    """Once, by hand: 10 of 20 are below where 5 of 20 should be; the noise is next to nothing."""
    experiment = private.experiment(
        privacy={"adaptive": {"quantile": 0.25, "lr": 0.4, "noise": 1e-9}}, federation={"cohort": 20}
    )
    made = private.curator(experiment, 40)
    update = private.numbers(experiment, 0, 0.1)
    replies = [private.reply(user, *update, below=user % 2) for user in range(20)]
    _, told = made.mean(1, replies, private.zeros(experiment))
    assert told["below"] == pytest.approx(0.5, abs=1e-6)
    assert made.clip == pytest.approx(math.exp(-0.4 * (0.5 - 0.25)), rel=1e-6)


def test_one_user_moves_the_count_by_a_half():
    experiment = private.experiment(privacy={"adaptive": {"noise": 2.0}}, federation={"cohort": 20})
    update = private.numbers(experiment, 0, 0.1)

    def share(belows):
        made = private.curator(experiment, 40)
        replies = [private.reply(user, *update, below=below) for user, below in enumerate(belows)]
        return made.mean(1, replies, private.zeros(experiment))[1]["below"]

    whole = [1, 0, 0, 1, 1]
    for more in (0, 1):
        assert abs(share([*whole, more]) - share(whole)) * 20 == pytest.approx(0.5)


def test_the_count_is_noised():
    experiment = private.experiment(privacy={"adaptive": {"noise": 3.0, "lr": 1e-9}}, federation={"cohort": 20})
    made, weights = private.curator(experiment, 40), private.zeros(experiment)
    shares = [made.mean(round_, [], weights)[1]["below"] for round_ in range(1, 401)]
    noise = (np.array(shares) - 0.5) * 20
    assert private.fits(noise, 3.0) > 1e-6
    assert private.fits(noise, 2.0) < 1e-4


def test_the_next_round_is_told_the_new_norm_and_a_fixed_one_stays():
    for adaptive in (None, {}):
        experiment = private.experiment(privacy={"adaptive": adaptive}, federation={"cohort": 10})
        made = private.strategy(experiment, 10)
        sent = list(made.configure_train(1, made.arrays(), ConfigRecord(), None))
        assert sent[0].content["round"]["clip"] == 1.0
        made.aggregate_train(1, answers(experiment, below=1))
        sent = list(made.configure_train(2, made.arrays(), ConfigRecord(), None))
        assert sent[0].content["round"]["clip"] == made.curator.clip
        assert (made.curator.clip == 1.0) == (adaptive is None)


def test_a_device_says_whether_it_was_below():
    experiment = private.experiment(federation={"local": {"lr": 0.3}})
    device = world.device(experiment, world.sequences(world.random_histories([1, 5, 9, 20], 20), held_out=False), 20)
    weights = world.weights(experiment.model, 20)

    def said(clip):
        messages = private.asked(experiment, weights, range(4), clip)
        return [reply.content[METRICS].get("below") for reply in handle_train(messages, range(4), device)]

    assert said(1e-6) == [1, 0, 0, 0]
    assert said(1e6) == [1, 1, 1, 1]
    assert said(None) == [None] * 4  # nobody asked


@pytest.mark.parametrize("below", [2, -1, 2**40, 0.5, 1.0, float("nan"), [1]])
def test_a_stranger_is_below_or_not(below):
    experiment = private.experiment()
    made = private.strategy(experiment)
    good, rejected = admit(answers(experiment, 1, below=below), Terms(made.weights, made.roster, experiment.federation))
    assert good == []
    assert rejected.total() == 1


# --- which curator ---------------------------------------------------------------------------------------------------


def test_without_a_mode_everything_is_as_it_is():
    plain = world.experiment(evaluation={"users": 4})
    made = curator(plain, 12, 20)
    assert type(made) is Curator
    assert made.clip is None
    assert made.tells_all
    assert made.affords(UPDATE)
    np.testing.assert_array_equal(made.judges("validation", 3), some_users(4, 12, 0, "validation-users", 3))
    assert made.card(9)["epsilon"] is None
    assert type(curator(private.experiment(), 12, 20)) is PrivateCurator
    with pytest.raises(TypeError):
        PrivateCurator(plain, 12, 20)
