"""Tokens averaged over blocks of the grid, in 2-D or 3-D, then two linear layers, or one.

Sources: the spatial pooling perceiver of M3D-LaMed, Bai et al. 2024, arXiv:2404.00578; with one layer, Gemma 3's
(arXiv:2503.19786, section 2; its 16 x 16 tokens an image), as transformers' Gemma3MultiModalProjector has it.
"""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from ..encoders.base import Features, as_map
from ..errors import ModelError
from .base import Projector, mlp


class Pool(Projector):
    """Features -> (B, prod(pooled grid), lm_dim), in reading order."""

    def __init__(self, dim: int, lm_dim: int, factor: tuple[int, ...] | None, grid: tuple[int, ...] | None, layers: int):
        super().__init__(dim, len(factor or grid))
        self.factor, self.grid = factor, grid
        self.layers = mlp(dim, lm_dim) if layers == 2 else nn.Sequential(nn.RMSNorm(dim, 1e-6), nn.Linear(dim, lm_dim, bias=False))

    def check(self, grid):
        super().check(grid)
        if self.factor and any(g % f for g, f in zip(grid, self.factor)):
            raise ModelError(f"a pool by {self.factor} does not divide the encoder's grid {tuple(grid)}", "BAD_RECIPE", "choose another factor, or give grid")
        if self.grid and any(g < t for g, t in zip(grid, self.grid)):
            raise ModelError(f"a pool to {self.grid} is finer than the encoder's grid {tuple(grid)}", "BAD_RECIPE", "choose a coarser grid")

    def target(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The grid after pooling."""
        self.check(grid)
        return self.grid or tuple(g // f for g, f in zip(grid, self.factor))

    def count(self, grid):
        return prod(self.target(grid))

    def forward(self, features: Features) -> Tensor:
        shrink = (F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[self.rank - 2]
        small = shrink(as_map(self.tokens(features), features.grid), self.target(features.grid))
        return self.layers(small.flatten(2).transpose(1, 2))


def build(dim: int, lm_dim: int, factor: tuple[int, ...] | None = None, grid: tuple[int, ...] | None = None, layers: int = 2) -> Pool:
    """factor: tokens averaged along each axis, (2, 2) where neither is given; or grid: what is left along each axis. Their
    length is the rank, 2 or 3. layers: 2 behind a LayerNorm, or 1 without bias behind an RMSNorm.

    Raises:
        ModelError: BAD_RECIPE when both are given, of another rank, or for another number of layers.
    """
    if layers not in (1, 2):
        raise ModelError(f"a pool has 1 or 2 linear layers, not {layers}", "BAD_RECIPE")
    if factor and grid:
        raise ModelError("a pool takes a factor or a target grid, not both", "BAD_RECIPE", "leave one out")
    factor = None if grid else tuple(factor or (2, 2))
    if len(factor or grid) not in (2, 3):
        raise ModelError(f"a pool has 2 or 3 axes, not {len(factor or grid)}", "BAD_RECIPE", "give one number an axis")
    return Pool(dim, lm_dim, factor, grid and tuple(grid), layers)
