"""What a projector is. A file in this folder with ``build(dim, lm_dim, **args) -> Projector`` is a projector."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn

from ..encoders.base import Features
from ..errors import ModelError


class Projector(nn.Module):
    """Features -> (B, count(grid), lm_dim).

    dim: of the encoder's tokens. rank: axes of the grids it takes, None for any. guided: ``forward`` takes (features,
    query) with the mean embedding (B, lm_dim) of the words that were asked.
    """

    guided = False

    def __init__(self, dim: int, rank: int | None = None):
        super().__init__()
        self.dim, self.rank = dim, rank

    def count(self, grid: tuple[int, ...]) -> int:
        """Language-model tokens an image with this grid takes.

        Raises:
            ModelError: BAD_RECIPE when the projector cannot take the grid.
        """
        self.check(grid)
        return prod(grid)

    def check(self, grid: tuple[int, ...]) -> None:
        if self.rank not in (None, len(grid)):
            raise ModelError(f"a {self.rank}-D {type(self).__name__} projector cannot take the encoder's {len(grid)}-D grid {tuple(grid)}", "BAD_RECIPE",
                             "choose a projector of the encoder's rank")  # fmt: skip

    def tokens(self, features: Features) -> Tensor:
        """The encoder's tokens (B, N, dim), once they are known to fit.

        Raises:
            ModelError: BAD_RECIPE, both sides named, when they do not.
        """
        self.check(features.grid)
        if features.tokens.shape[2] != self.dim:
            raise ModelError(
                f"the encoder gives tokens of {features.tokens.shape[2]} numbers but the {type(self).__name__} projector takes {self.dim}",
                "BAD_RECIPE", "give the projector the encoder's dim",
            )  # fmt: skip
        return features.tokens


def mlp(dim: int, lm_dim: int, norm: bool = True) -> nn.Sequential:
    """Two linear layers behind a LayerNorm, which holds its place in saved weights where there is none."""
    return nn.Sequential(nn.LayerNorm(dim) if norm else nn.Identity(), nn.Linear(dim, lm_dim), nn.GELU(), nn.Linear(lm_dim, lm_dim))
