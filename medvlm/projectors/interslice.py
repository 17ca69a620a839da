"""The question decides which slices of a volume weigh: their tokens are summed by a text-guided inter-slice score.

Source: TG-IS of Med-2E3, Shi et al. 2024, arXiv:2411.12783, section III: s = softmax over slices of MLP(question) . slice,
and the slices' 2-D tokens are summed with these weights. What departs, also from the code it was published with
(MSIIP/Med-2E3, modeling_medmllm.py with exp_id 4, and the connector spatial_pooling_score15 of its finetune.sh):

- A slice is there the mean over its 2-D tokens and those of the 3-D encoder's slab around it, here over its own alone. The
  3-D encoder's tokens, which stand before the sum there, are here a second encoder on the same route.
- The question is there the pooled state of the 3-D encoder's own text tower, here the mean embedding of its words in the
  language model, which the published file keeps as a variant.
- MLP is there one linear layer, here two behind a LayerNorm; so is the projection of the slices, there without the norm.
- The product is there divided by 5 and a tenth of the scores dropped while training; here it is divided by the root of the
  dimension, for a score that starts soft at any width, and none are dropped.
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

    query: the mean embedding of the words that were asked; none where every slice weighs the same.
    """

    def __init__(self, dim: int, lm_dim: int, pool: int, guided: bool):
        super().__init__(dim, 3)
        self.pool, self.guided = pool, guided
        self.layers = mlp(dim, lm_dim)
        self.ask = mlp(lm_dim, lm_dim) if guided else None

    def check(self, grid):
        super().check(grid)
        if grid[1] % self.pool or grid[2] % self.pool:
            raise ModelError(f"a pool by {self.pool} does not divide the slices of the encoder's grid {tuple(grid)}", "BAD_RECIPE",
                             "choose another pool or input size")  # fmt: skip

    def count(self, grid):
        self.check(grid)
        return grid[1] * grid[2] // self.pool**2

    def forward(self, features: Features, query: Tensor | None = None) -> Tensor:
        return torch.einsum("bd,bdnc->bnc", *self._weigh(features, query))

    def scores(self, features: Features, query: Tensor | None = None) -> Tensor:
        """(B, d) how much each slice weighs; rows sum to 1."""
        return self._weigh(features, query)[0]

    def _weigh(self, features: Features, query: Tensor | None) -> tuple[Tensor, Tensor]:
        maps = self.tokens(features).unflatten(1, features.grid)
        if self.pool > 1:
            flat = F.avg_pool2d(maps.flatten(0, 1).permute(0, 3, 1, 2), self.pool)
            maps = flat.permute(0, 2, 3, 1).unflatten(0, maps.shape[:2])
        slices = self.layers(maps.flatten(2, 3))  # B, d, n, lm_dim
        if self.ask is None:
            return torch.full_like(slices[:, :, 0, 0], 1 / slices.shape[1]), slices
        asked = self.ask(query.to(slices.dtype))
        scores = torch.einsum("bdc,bc->bd", slices.mean(2), asked) * slices.shape[3] ** -0.5
        return scores.softmax(1), slices


def build(dim: int, lm_dim: int, pool: int = 1, guided: bool = True) -> InterSlice:
    """A volume as one slice.

    Args:
        pool: tokens averaged along each side of a slice.
        guided: False gives every slice the same weight, whatever is asked: what the scores do is seen by leaving them out.
    """
    return InterSlice(dim, lm_dim, pool, guided)
