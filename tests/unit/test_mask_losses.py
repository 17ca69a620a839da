"""Tversky and focal loss: worked by hand, and against MONAI."""

import math

import pytest
import torch
import torch.nn.functional as F

from medvlm.train.mask_losses import focal_loss, tversky_loss


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def maps(size, soft):
    logits, target = torch.randn(3, *size) * 3, torch.rand(3, *size)
    return logits, target if soft else (target > 0.8).float()


def test_tversky_worked_by_hand():
    """3 pixels hit, 1 too many, 2 missed; of the empty map of an empty target nothing is lost."""
    target = torch.tensor([[1.0, 1, 1, 1, 1, 0, 0, 0]])
    chance = torch.tensor([[1.0, 1, 1, 0, 0, 1, 0, 0]])
    assert tversky_loss(chance, target, 0.3, 0.7).tolist() == pytest.approx([1 - 3.5 / (3.5 + 0.3 * 1 + 0.7 * 2)])
    assert tversky_loss(chance, target, 1.0, 0.0).tolist() == pytest.approx([1 - 3.5 / 4.5])  # false positives alone
    assert tversky_loss(chance, target, 0.0, 1.0).tolist() == pytest.approx([1 - 3.5 / 5.5])  # false negatives alone
    assert tversky_loss(torch.zeros(2, 4), torch.zeros(2, 4)).tolist() == [0, 0]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("size", [(9, 7), (4, 5, 6)])
def test_tversky_is_monai_s(size, soft):
    from monai.losses import TverskyLoss

    logits, target = maps(size, soft)
    for alpha, beta in ((0.3, 0.7), (0.5, 0.5), (0.9, 0.1)):
        theirs = TverskyLoss(sigmoid=True, alpha=alpha, beta=beta, reduction="none", smooth_nr=0.5, smooth_dr=0.5)(logits[:, None], target[:, None])
        assert torch.allclose(tversky_loss(logits.sigmoid(), target, alpha, beta), theirs.flatten(), atol=1e-5)


def test_tversky_of_equal_weights_is_dice():
    chance, target = torch.rand(4, 6, 5), (torch.rand(4, 6, 5) > 0.5).float()
    dice = (2 * (chance * target).sum((1, 2)) + 1) / (chance.sum((1, 2)) + target.sum((1, 2)) + 1)
    assert torch.allclose(tversky_loss(chance, target, 0.5, 0.5), 1 - dice, atol=1e-6)


def test_more_weight_on_what_is_missed_raises_what_is_found():
    """The same uncertain map: with beta up, the gradient on missed pixels outweighs that on the ones too many."""
    target = torch.tensor([[1.0, 1, 0, 0]])
    gradients = []
    for alpha, beta in ((0.7, 0.3), (0.3, 0.7)):
        chance = torch.full((1, 4), 0.4, requires_grad=True)
        tversky_loss(chance, target, alpha, beta).sum().backward()
        gradients.append((-chance.grad[0, 0] / chance.grad[0, 2]).item())
    assert gradients[1] > 1 > 0 and gradients[1] > 2 * gradients[0]


def test_focal_worked_by_hand():
    """Chance 0.8 of the target, and 0.8 where there is none: 0.25 * 0.2**2 * -ln 0.8, and 0.75 * 0.8**2 * -ln 0.2."""
    logits = torch.full((2, 3), math.log(4))
    target = torch.stack([torch.ones(3), torch.zeros(3)])
    assert focal_loss(logits, target).tolist() == pytest.approx([0.25 * 0.04 * -math.log(0.8), 0.75 * 0.64 * -math.log(0.2)])
    assert focal_loss(logits, target, 1.0, None).tolist() == pytest.approx([0.2 * -math.log(0.8), 0.8 * -math.log(0.2)])


@pytest.mark.parametrize("size", [(9, 7), (4, 5, 6)])
def test_focal_is_monai_s_on_whole_pixels(size):
    from monai.losses import FocalLoss

    logits, target = maps(size, soft=False)
    for gamma, alpha in ((2.0, 0.25), (0.5, None), (5.0, 0.9)):
        theirs = FocalLoss(gamma=gamma, alpha=alpha, reduction="none")(logits[:, None], target[:, None])
        assert torch.allclose(focal_loss(logits, target, gamma, alpha), theirs.flatten(1).mean(1), atol=1e-6)


def test_focal_without_focus_is_cross_entropy_even_where_pixels_are_covered_in_part():
    logits, target = maps((9, 7), soft=True)
    plain = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1)
    assert torch.allclose(focal_loss(logits, target, 0.0, None), plain, atol=1e-6)


def test_a_sure_mistake_stays_finite():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([[0.0, 1.0]]))
    loss.sum().backward()
    assert loss.item() == pytest.approx((0.75 * 200 + 0.25 * 200) / 2) and logits.grad.isfinite().all()
