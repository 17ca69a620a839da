"""Two linear layers from the encoder's tokens to the language model's, one token each.

Source: LLaVA-1.5, Liu et al. 2023, arXiv:2310.03744, section 3.2 (mlp2x_gelu), which has no LayerNorm in front.
"""

from __future__ import annotations

from torch import Tensor

from ..encoders.base import Features
from .base import Projector, mlp


class MLP(Projector):
    """Features -> (B, N, lm_dim)."""

    def __init__(self, dim: int, lm_dim: int, norm: bool):
        super().__init__(dim)
        self.layers = mlp(dim, lm_dim, norm)

    def forward(self, features: Features) -> Tensor:
        return self.layers(self.tokens(features))


def build(dim: int, lm_dim: int, norm: bool = True) -> MLP:
    """norm: a LayerNorm in front; False is LLaVA's own projector."""
    return MLP(dim, lm_dim, norm)
