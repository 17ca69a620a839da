"""One linear layer from the encoder's tokens to the language model's, one token each.

Source: LLaVA, Liu et al. 2023, arXiv:2304.08485, section 4.1.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..encoders.base import Features
from .base import Projector


class Linear(Projector):
    """Features -> (B, N, lm_dim)."""

    def __init__(self, dim: int, lm_dim: int):
        super().__init__(dim)
        self.layer = nn.Linear(dim, lm_dim)

    def forward(self, features: Features) -> Tensor:
        return self.layer(self.tokens(features))


def build(dim: int, lm_dim: int) -> Linear:
    return Linear(dim, lm_dim)
