"""Losses on catalogues that a hand can compute, then what must not matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.loss import BCELoss, GBCELoss, SampledSoftmaxLoss, SoftmaxLoss
from common.models.losses import Candidates, binary, build_loss, gbce_power, sampled_softmax, softmax, user_mean

INF = math.inf
ALL = {"softmax": softmax, "sampled-softmax": sampled_softmax, "gbce": binary(0.4), "bce": binary(1.0)}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def made(scores, targets):
    """Candidates of one user from the scores (L, I) of all items, negatives being the whole catalogue."""
    scores, targets = torch.tensor([scores]), torch.tensor([targets])
    return Candidates(scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1), scores), targets


def everywhere(targets):
    return torch.ones(targets.shape, dtype=torch.bool)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_mean_over_real_positions():
    values, mask = torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, 9.0]]), torch.tensor([[True, True, False], [False] * 3])
    assert user_mean(values, mask).tolist() == [2, 0]


def test_softmax_by_hand():
    candidates, targets = made([[math.log(1), math.log(2), math.log(5)], [0.0, 0.0, 0.0]], [2, 0])
    expected = (-math.log(5 / 8) - math.log(1 / 3)) / 2
    assert softmax(candidates, targets, everywhere(targets)).tolist() == pytest.approx([expected])


def test_sampled_softmax_by_hand():
    # Target at ln 3; negatives at ln 1 and ln 2, and one that is not allowed.
    candidates = Candidates(torch.tensor([[math.log(3)]]), torch.tensor([[[0.0, math.log(2), -INF]]]))
    targets = torch.tensor([[0]])
    assert sampled_softmax(candidates, targets, everywhere(targets)).tolist() == pytest.approx([-math.log(3 / 6)])


def test_nothing_to_lose_without_a_negative():
    candidates = Candidates(torch.tensor([[2.0]]), torch.tensor([[[-INF]]]))
    targets = torch.tensor([[0]])
    assert sampled_softmax(candidates, targets, everywhere(targets)).tolist() == [0]
    assert binary(0.5)(candidates, targets, everywhere(targets)).tolist() == pytest.approx(
        [-0.5 * math.log(sigmoid(2))]
    )


@pytest.mark.parametrize("power", [1.0, 0.25])
def test_binary_by_hand(power):
    candidates = Candidates(torch.tensor([[1.5]]), torch.tensor([[[0.5, -2.0, -INF]]]))
    targets = torch.tensor([[0]])
    expected = -power * math.log(sigmoid(1.5)) - math.log(1 - sigmoid(0.5)) - math.log(1 - sigmoid(-2))
    assert binary(power)(candidates, targets, everywhere(targets)).tolist() == pytest.approx([expected])


def test_the_power_of_gbce():
    # Equation 11 of gSASRec; α = 100 / (201 − 1) = 1/2.
    assert gbce_power(0, 100, 201) == 1
    assert gbce_power(1, 100, 201) == 0.5
    assert gbce_power(0.75, 100, 201) == pytest.approx(0.5 * (0.75 * (1 - 2) + 2))
    assert gbce_power(0.75, 256, 3417) == pytest.approx(0.3062, abs=1e-4)
    assert gbce_power(1, 500, 201) == gbce_power(0.3, 500, 201) == 1  # more negatives than items: nothing to undo
    assert gbce_power(0.75, 256, 1) == gbce_power(0.75, 1, 2) == 1  # nothing to sample from


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        (SoftmaxLoss(kind="softmax"), softmax),
        (SampledSoftmaxLoss(kind="sampled-softmax"), sampled_softmax),
        (BCELoss(kind="bce"), binary(1.0)),
        (GBCELoss(kind="gbce", negatives=100, calibration=0), binary(1.0)),  # BCE is gBCE with t = 0
        (GBCELoss(kind="gbce", negatives=100, calibration=1), binary(0.5)),
    ],
)
def test_a_configuration_names_its_loss(config, loss):
    candidates, targets = made([[0.3, -1.0, 2.0], [1.0, 0.1, -0.4]], [0, 2])
    built = build_loss(config, 201)
    assert torch.equal(built(candidates, targets, everywhere(targets)), loss(candidates, targets, everywhere(targets)))


# --- what must not matter --------------------------------------------------------------------------------------------

SCORES = st.floats(-20, 20, width=32)
FEW = settings(max_examples=30)


@st.composite
def cohorts(draw, users=3, positions=4, items=5):
    """Scores of all items, which of them are negatives (never the target), targets and which positions are real."""

    def numbers(*shape, of):
        return torch.tensor(draw(st.lists(of, min_size=math.prod(shape), max_size=math.prod(shape)))).view(shape)

    scores = numbers(users, positions, items, of=SCORES)
    targets = numbers(users, positions, of=st.integers(0, items - 1))
    allowed = numbers(users, positions, items, of=st.booleans())
    allowed.scatter_(-1, targets.unsqueeze(-1), False)
    return scores, allowed, targets, numbers(users, positions, of=st.booleans())


def candidates_of(kind, scores, allowed, targets):
    """As training gives them: `softmax` sees the whole catalogue, the others −inf where a negative is not allowed."""
    positive = scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return Candidates(positive, scores if kind == "softmax" else torch.where(allowed, scores, -INF))


def one(values, user):
    return Candidates(*(part[user : user + 1] for part in values))


@pytest.mark.parametrize("kind", ALL)
@FEW
@given(cohort=cohorts(), noise=SCORES)
def test_positions_that_are_masked_do_not_matter(kind, cohort, noise):
    scores, allowed, targets, mask = cohort
    candidates = candidates_of(kind, scores, allowed, targets)
    other = Candidates(
        torch.where(mask, candidates.positive, noise), torch.where(mask.unsqueeze(-1), candidates.negative, noise)
    )
    assert torch.equal(ALL[kind](candidates, targets, mask), ALL[kind](other, torch.where(mask, targets, 0), mask))


@pytest.mark.parametrize("kind", ALL)
@FEW
@given(cohort=cohorts(), user=st.integers(0, 2))
def test_a_users_loss_is_its_own(kind, cohort, user):
    scores, allowed, targets, mask = cohort
    candidates = candidates_of(kind, scores, allowed, targets)
    together = ALL[kind](candidates, targets, mask)
    alone = ALL[kind](one(candidates, user), targets[user : user + 1], mask[user : user + 1])
    assert together.shape == (3,)
    assert float(together[user]) == pytest.approx(float(alone), rel=1e-5, abs=1e-6)


def slow(kind, own, rivals):
    """Loss at one position from the target's score and those of the negatives that are allowed."""
    if kind == "sampled-softmax":
        return math.log(sum(math.exp(score) for score in [own, *rivals])) - own
    power = {"gbce": 0.4, "bce": 1.0}[kind]
    return power * math.log1p(math.exp(-own)) + sum(math.log1p(math.exp(score)) for score in rivals)


@pytest.mark.parametrize("kind", ["sampled-softmax", "gbce", "bce"])
@FEW
@given(cohort=cohorts())
def test_excluded_negatives_do_not_matter(kind, cohort):
    scores, allowed, targets, mask = cohort
    found = ALL[kind](candidates_of(kind, scores, allowed, targets), targets, mask)
    for user in range(3):
        each = [
            slow(
                kind,
                float(scores[user, place, targets[user, place]]),
                scores[user, place][allowed[user, place]].tolist(),
            )
            for place in mask[user].nonzero().flatten().tolist()
        ]
        assert float(found[user]) == pytest.approx(sum(each) / max(1, len(each)), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", ALL)
@FEW
@given(cohort=cohorts())
def test_gradients_reach_real_positions_and_allowed_negatives_only(kind, cohort):
    scores, allowed, targets, mask = cohort
    positive, negative = (part.clone().requires_grad_() for part in candidates_of(kind, scores, allowed, targets))
    loss = ALL[kind](Candidates(positive, negative), targets, mask).sum()
    gradients = torch.autograd.grad(loss, (positive, negative), allow_unused=True)
    for gradient in gradients:
        if gradient is not None:
            assert torch.isfinite(gradient).all()
            assert not gradient[~mask].any()
    if kind != "softmax":
        assert not gradients[1][~allowed].any()


@FEW
@given(cohort=cohorts())
def test_sampling_all_other_items_is_the_full_softmax(cohort):
    scores, _, targets, mask = cohort
    others = torch.ones_like(scores, dtype=torch.bool).scatter(-1, targets.unsqueeze(-1), False)
    sampled = sampled_softmax(candidates_of("sampled-softmax", scores, others, targets), targets, mask)
    full = softmax(candidates_of("softmax", scores, others, targets), targets, mask)
    assert torch.allclose(sampled, full, atol=1e-4)


@FEW
@given(cohort=cohorts())
def test_losses_are_not_negative(cohort):
    scores, allowed, targets, mask = cohort
    for kind, loss in ALL.items():
        assert (loss(candidates_of(kind, scores, allowed, targets), targets, mask) >= -1e-5).all()
