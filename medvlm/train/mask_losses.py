"""Mask losses for targets that fill little of the picture. Each takes (S, ...) maps and gives (S,), one loss a mask."""

from __future__ import annotations

from torch import Tensor


def tversky_loss(chance: Tensor, target: Tensor, alpha: float = 0.3, beta: float = 0.7) -> Tensor:
    """1 - TP / (TP + alpha FP + beta FN) of soft maps in [0, 1], smoothed by half a pixel.

    alpha weighs false positives, beta false negatives; with 0.5 and 0.5 it is soft Dice, smoothed by one pixel.
    Source: Salehi et al. 2017, arXiv:1706.05721, the index T(alpha, beta).
    """
    chance, target = chance.flatten(1), target.flatten(1)
    hit = (chance * target).sum(1)
    over, under = chance.sum(1) - hit, target.sum(1) - hit
    return 1 - (hit + 0.5) / (hit + alpha * over + beta * under + 0.5)


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float | None = 0.25) -> Tensor:
    """Mean over pixels of alpha_t (1 - p_t)**gamma cross-entropy, where p_t is the probability of the pixel's own class.

    target: in [0, 1]; of a pixel that is covered in part, p_t and alpha_t are mixed by its share. alpha: weight of the
    target, 1 - alpha that of the rest; None weighs neither. gamma 0 without alpha is cross-entropy.
    Source: Lin et al. 2017, arXiv:1708.02002, equation 5; 2 and 0.25 were their best. torchvision's function; MONAI's is
    the same on whole pixels, but of one covered in part it takes a sharpened probability.
    """
    from torchvision.ops import sigmoid_focal_loss

    return sigmoid_focal_loss(logits, target, -1 if alpha is None else alpha, gamma).flatten(1).mean(1)
