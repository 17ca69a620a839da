"""Neighbouring tokens laid side by side in one (space to depth), in 2-D or 3-D, then two linear layers.

Source: the pixel shuffle of InternVL 1.5, Chen et al. 2024, arXiv:2404.16821, section 3.1; the rearrangement is the inverse
of Shi et al. 2016, arXiv:1609.05158, section 2.2.
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from ..encoders.base import Features
from ..errors import ModelError
from .base import Projector, mlp


class Shuffle(Projector):
    """Features -> (B, N / prod(factor), lm_dim), blocks in reading order and reading order inside a block."""

    def __init__(self, dim: int, lm_dim: int, factor: tuple[int, ...]):
        super().__init__(dim, len(factor))
        self.factor = factor
        self.layers = mlp(dim * prod(factor), lm_dim)

    def check(self, grid):
        super().check(grid)
        if any(g % f for g, f in zip(grid, self.factor)):
            raise ModelError(f"a pixel shuffle by {self.factor} does not divide the encoder's grid {tuple(grid)}", "BAD_RECIPE",
                             "choose another factor or input size")  # fmt: skip

    def count(self, grid):
        return super().count(grid) // prod(self.factor)

    def forward(self, features: Features) -> Tensor:
        tokens, rank = self.tokens(features), len(self.factor)
        pairs = [n for g, f in zip(features.grid, self.factor) for n in (g // f, f)]
        blocks = tokens.unflatten(1, pairs)  # B, g0/f0, f0, g1/f1, f1, ..., C
        order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
        return self.layers(blocks.permute(order).flatten(rank + 1).flatten(1, rank))


def build(dim: int, lm_dim: int, factor: tuple[int, ...] = (2, 2)) -> Shuffle:
    """factor: tokens joined along each axis of the grid, so its length is the rank: (2, 2) for pictures, (1, 2, 2) for volumes."""
    return Shuffle(dim, lm_dim, tuple(factor))
