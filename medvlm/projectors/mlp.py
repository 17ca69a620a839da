"""Two linear layers from the encoder's tokens to the language model's, one token each.

Source: LLaVA-1.5, Liu et al. 2023, arXiv:2310.03744, section 3.2 (mlp2x_gelu).
"""

from __future__ import annotations

from math import prod

from torch import Tensor, nn

from ..encoders.base import Features


class MLP(nn.Module):
    """Features -> (B, N, lm_dim)."""

    def __init__(self, dim: int, lm_dim: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, lm_dim), nn.GELU(), nn.Linear(lm_dim, lm_dim))

    def count(self, grid: tuple[int, ...]) -> int:
        """Language-model tokens an image takes."""
        return prod(grid)

    def forward(self, features: Features) -> Tensor:
        return self.layers(features.tokens)


def build(dim: int, lm_dim: int) -> MLP:
    return MLP(dim, lm_dim)
