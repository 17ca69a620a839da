"""A fixed number of learned queries that attend to all tokens of an image: the perceiver resampler.

Source: Flamingo, Alayrac et al. 2022, arXiv:2204.14198, section 3.1 and appendix A.1.1 (keys and values are the tokens
beside the queries themselves). Unlike there, no time embeddings: the encoder's tokens know their place. A Q-Former (BLIP-2,
arXiv:2301.12597) differs by self-attention among the queries in a sublayer of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..encoders.base import Features
from ..errors import ModelError
from .base import Projector


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm_tokens, self.norm_queries = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attend = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.feed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        asked = self.norm_queries(queries)
        seen = torch.cat([self.norm_tokens(tokens), asked], 1)
        queries = queries + self.attend(asked, seen, seen, need_weights=False)[0]
        return queries + self.feed(queries)


class Resampler(Projector):
    """Features of any grid -> (B, queries, lm_dim)."""

    def __init__(self, dim: int, lm_dim: int, queries: int, layers: int, heads: int):
        super().__init__(dim)
        self.queries = nn.Parameter(torch.randn(queries, dim) * dim**-0.5)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(layers))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, lm_dim))

    def count(self, grid):
        return len(self.queries)

    def forward(self, features: Features) -> Tensor:
        tokens = self.tokens(features)
        queries = self.queries.expand(len(tokens), -1, -1)
        for layer in self.layers:
            queries = layer(tokens, queries)
        return self.out(queries)


def build(dim: int, lm_dim: int, queries: int = 64, layers: int = 2, heads: int = 8) -> Resampler:
    """queries: tokens an image takes, whatever its grid. layers, heads: of the attention (Flamingo: 6 and 16 of 64)."""
    if dim % heads:
        raise ModelError(f"{heads} heads do not divide the encoder's dim {dim}", "BAD_RECIPE", "choose another number of heads")
    return Resampler(dim, lm_dim, queries, layers, heads)
