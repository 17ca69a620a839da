"""The question decides which slices of a volume weigh: their tokens are summed by a text-guided inter-slice score.

Source: TG-IS of Med-2E3, Shi et al. 2024, arXiv:2411.12783, section III: s = softmax over slices of MLP(question) . slice,
and the slices' tokens are summed with these weights. Departs: there a slice is the mean of its 2-D tokens and of the part
of a 3-D encoder's tokens around it, here of its own alone (a 3-D encoder is a second one on the same route); here the
product is divided by the root of the dimension, for a score that starts soft.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoders.base import Features
from ..errors import ModelError
from .base import Projector, mlp


class InterSlice(Projector):
    """(Features with grid (d, h, w), query (B, lm_dim)) -> (B, h * w / pool**2, lm_dim).

    query: the mean embedding of the words that were asked.
    """

    guided = True

    def __init__(self, dim: int, lm_dim: int, pool: int):
        super().__init__(dim, 3)
        self.pool = pool
        self.layers = mlp(dim, lm_dim)
        self.ask = mlp(lm_dim, lm_dim)

    def check(self, grid):
        super().check(grid)
        if grid[1] % self.pool or grid[2] % self.pool:
            raise ModelError(f"a pool by {self.pool} does not divide the slices of the encoder's grid {tuple(grid)}", "BAD_RECIPE",
                             "choose another pool or input size")  # fmt: skip

    def count(self, grid):
        self.check(grid)
        return grid[1] * grid[2] // self.pool**2

    def forward(self, features: Features, query: Tensor) -> Tensor:
        return torch.einsum("bd,bdnc->bnc", *self._weigh(features, query))

    def scores(self, features: Features, query: Tensor) -> Tensor:
        """(B, d) how much each slice weighs; rows sum to 1."""
        return self._weigh(features, query)[0]

    def _weigh(self, features: Features, query: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.tokens(features).unflatten(1, features.grid)
        if self.pool > 1:
            flat = F.avg_pool2d(maps.flatten(0, 1).permute(0, 3, 1, 2), self.pool)
            maps = flat.permute(0, 2, 3, 1).unflatten(0, maps.shape[:2])
        slices = self.layers(maps.flatten(2, 3))  # B, d, n, lm_dim
        asked = self.ask(query.to(slices.dtype))
        scores = torch.einsum("bdc,bc->bd", slices.mean(2), asked) * slices.shape[3] ** -0.5
        return scores.softmax(1), slices


def build(dim: int, lm_dim: int, pool: int = 1) -> InterSlice:
    """pool: tokens averaged along each side of a slice."""
    return InterSlice(dim, lm_dim, pool)
