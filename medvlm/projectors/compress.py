"""Global and local tokens of a long volume: the volume averaged over its slices, and of each slice what stands out.

Global token aggregation and local token selection of CT-Agent, Mao et al. 2025, arXiv:2505.16229: each token through its
own small network, then the mean over slices, h * w tokens for the volume; of every slice the ``keep`` tokens that others
attend to most, and the rest merged into ``merge`` by similarity (VisionZip, Yang et al. 2024, arXiv:2412.04467),
54 + 10 of 256 there; both through one linear layer. The method was read in a summary of the paper, not in the paper.
Departs: one MLP where CT-Agent has a mixture of experts; attention is that of the tokens to one another, as encoders
without a class token need it, not that of the encoder's class token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encoders.base import Features
from ..errors import ModelError
from .base import Projector

SLICES = 16
"""Slices whose token-to-token attention is held at a time."""


class Compress(Projector):
    """Features with grid (d, h, w) -> (B, h * w + d * (keep + merge), lm_dim): global tokens, then each slice's.

    A slice's kept tokens stand in reading order, its merged ones behind them.
    """

    def __init__(self, dim: int, lm_dim: int, keep: int, merge: int):
        super().__init__(dim, 3)
        self.keep, self.merge = keep, merge
        self.expert = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, lm_dim))

    def check(self, grid):
        super().check(grid)
        if self.keep + self.merge > grid[1] * grid[2]:
            raise ModelError(f"{self.keep} + {self.merge} tokens cannot be kept of the {grid[1] * grid[2]} in a slice of the encoder's grid {tuple(grid)}",
                             "BAD_RECIPE", "keep fewer")  # fmt: skip

    def count(self, grid):
        self.check(grid)
        return grid[1] * grid[2] + grid[0] * (self.keep + self.merge)

    def forward(self, features: Features) -> Tensor:
        slices = self.tokens(features).unflatten(1, (features.grid[0], -1))  # B, d, n, C
        whole = (slices + self.expert(slices)).mean(1)
        local = torch.cat([self.select(part) for part in slices.flatten(0, 1).split(SLICES)])
        return self.out(torch.cat([whole, local.unflatten(0, slices.shape[:2]).flatten(1, 2)], 1))

    def select(self, slices: Tensor) -> Tensor:
        """(S, n, C) -> (S, keep + merge, C)."""
        with torch.no_grad():
            received = (slices @ slices.transpose(1, 2) * slices.shape[2] ** -0.5).softmax(2).mean(1)
            order = received.argsort(dim=1, descending=True, stable=True)
            kept, rest = order[:, : self.keep].sort(1).values, order[:, self.keep :].sort(1).values
        dominant = slices.gather(1, kept[..., None].expand(-1, -1, slices.shape[2]))
        if not self.merge:
            return dominant
        rest = slices.gather(1, rest[..., None].expand(-1, -1, slices.shape[2]))
        with torch.no_grad():
            seeds = torch.linspace(0, rest.shape[1] - 1, self.merge, device=rest.device).round().long()
            unit = F.normalize(rest, dim=2)
            nearest = (unit @ unit[:, seeds].transpose(1, 2)).argmax(2)
            nearest[:, seeds] = torch.arange(self.merge, device=rest.device)  # no seed is empty
            share = F.one_hot(nearest, self.merge).to(rest.dtype)
            share = share / share.sum(1, keepdim=True)
        return torch.cat([dominant, share.transpose(1, 2) @ rest], 1)


def build(dim: int, lm_dim: int, keep: int = 54, merge: int = 10) -> Compress:
    """keep, merge: tokens that each slice keeps as they are, and those that all its others become."""
    return Compress(dim, lm_dim, keep, merge)
