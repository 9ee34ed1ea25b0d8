"""Losses on catalogues that a hand can compute, then what must not matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import BCELoss, GBCELoss, SampledSoftmaxLoss, SoftmaxLoss
from common.models.losses import Candidates, binary, build_loss, gbce_power, sampled_softmax, softmax, user_mean

YES = torch.ones(1, 1, 1, dtype=torch.bool)
ALL = {"softmax": softmax, "sampled-softmax": sampled_softmax, "gbce": binary(0.4), "bce": binary(1.0)}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def made(scores, targets, allowed=None):
    """Candidates of one user from the scores (L, I) of all items, negatives being the whole catalogue."""
    scores, targets = torch.tensor([scores]), torch.tensor([targets])
    positive = scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return Candidates(positive, scores, YES if allowed is None else torch.tensor([allowed])), targets


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
    # Target at ln 3; of the negatives at ln 1, ln 2 and ln 9 the last is not allowed.
    negative = torch.tensor([[[0.0, math.log(2), math.log(9)]]])
    candidates = Candidates(torch.tensor([[math.log(3)]]), negative, torch.tensor([[[True, True, False]]]))
    targets = torch.tensor([[0]])
    assert sampled_softmax(candidates, targets, everywhere(targets)).tolist() == pytest.approx([-math.log(3 / 6)])


def test_nothing_to_lose_without_a_negative():
    candidates = Candidates(torch.tensor([[2.0]]), torch.tensor([[[1.0]]]), ~YES)
    targets = torch.tensor([[0]])
    assert sampled_softmax(candidates, targets, everywhere(targets)).tolist() == [0]
    assert binary(0.5)(candidates, targets, everywhere(targets)).tolist() == pytest.approx(
        [-0.5 * math.log(sigmoid(2))]
    )


@pytest.mark.parametrize("power", [1.0, 0.25])
def test_binary_by_hand(power):
    candidates = Candidates(
        torch.tensor([[1.5]]), torch.tensor([[[0.5, -2.0, 7.0]]]), torch.tensor([[[True, True, False]]])
    )
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
    """Scores, targets, which negatives are allowed (never the target) and which positions are real."""

    def numbers(*shape, of):
        return torch.tensor(draw(st.lists(of, min_size=math.prod(shape), max_size=math.prod(shape)))).view(shape)

    scores = numbers(users, positions, items, of=SCORES)
    targets = numbers(users, positions, of=st.integers(0, items - 1))
    allowed = numbers(users, positions, items, of=st.booleans())
    allowed.scatter_(-1, targets.unsqueeze(-1), False)
    mask = numbers(users, positions, of=st.booleans())
    return Candidates(scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1), scores, allowed), targets, mask


def one(values, user):
    return Candidates(*(part[user : user + 1] for part in values))


@pytest.mark.parametrize("kind", ALL)
@FEW
@given(cohort=cohorts(), noise=SCORES)
def test_positions_that_are_masked_do_not_matter(kind, cohort, noise):
    candidates, targets, mask = cohort
    other = Candidates(
        torch.where(mask, candidates.positive, noise),
        torch.where(mask.unsqueeze(-1), candidates.negative, noise),
        candidates.allowed | ~mask.unsqueeze(-1),
    )
    assert torch.equal(ALL[kind](candidates, targets, mask), ALL[kind](other, torch.where(mask, targets, 0), mask))


@pytest.mark.parametrize("kind", ALL)
@FEW
@given(cohort=cohorts(), user=st.integers(0, 2))
def test_a_users_loss_is_its_own(kind, cohort, user):
    candidates, targets, mask = cohort
    together = ALL[kind](candidates, targets, mask)
    alone = ALL[kind](one(candidates, user), targets[user : user + 1], mask[user : user + 1])
    assert together.shape == (3,)
    assert float(together[user]) == pytest.approx(float(alone), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["sampled-softmax", "gbce", "bce"])
@FEW
@given(cohort=cohorts(), noise=SCORES)
def test_excluded_negatives_do_not_matter(kind, cohort, noise):
    candidates, targets, mask = cohort
    other = candidates._replace(negative=torch.where(candidates.allowed, candidates.negative, noise))
    assert torch.equal(ALL[kind](candidates, targets, mask), ALL[kind](other, targets, mask))


@pytest.mark.parametrize("kind", ALL)
@FEW
@given(cohort=cohorts())
def test_gradients_reach_real_positions_and_allowed_negatives_only(kind, cohort):
    candidates, targets, mask = cohort
    positive, negative = candidates.positive.clone().requires_grad_(), candidates.negative.clone().requires_grad_()
    loss = ALL[kind](Candidates(positive, negative, candidates.allowed), targets, mask).sum()
    gradients = torch.autograd.grad(loss, (positive, negative), allow_unused=True)
    for gradient in gradients:
        if gradient is not None:
            assert torch.isfinite(gradient).all()
            assert not gradient[~mask].any()
    if kind != "softmax":
        assert not gradients[1][~candidates.allowed].any()


@FEW
@given(cohort=cohorts())
def test_sampling_all_other_items_is_the_full_softmax(cohort):
    candidates, targets, mask = cohort
    others = torch.ones_like(candidates.allowed).scatter(-1, targets.unsqueeze(-1), False)
    sampled = sampled_softmax(candidates._replace(allowed=others), targets, mask)
    assert torch.allclose(sampled, softmax(candidates, targets, mask), atol=1e-4)


@FEW
@given(cohort=cohorts())
def test_losses_are_not_negative(cohort):
    for loss in ALL.values():
        assert (loss(*cohort) >= -1e-5).all()
