"""What an encoder gives. A file in this folder with ``build(**args) -> Encoder`` is an encoder."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..preprocess import InputSpec


class Features(NamedTuple):
    """tokens: (B, N, C), N == prod(grid), last axis fastest, no CLS and no registers. pooled: (B, C).
    levels: finer maps for the mask head, finest first, (B, C_i, *grid_i)."""

    tokens: Tensor
    grid: tuple[int, ...]
    pooled: Tensor
    levels: tuple[Tensor, ...] = ()


class Encoder(nn.Module):
    """(B, channels, *size) -> Features, for any size that is a multiple of ``stride``.

    spec: what it was trained to see. dim: C of the tokens. stride: input pixels a token, one number or one an axis.
    level_dims, level_strides: of ``Features.levels``, () when it gives none.
    """

    spec: InputSpec
    dim: int
    stride: int | tuple[int, ...]
    level_dims: tuple[int, ...] = ()
    level_strides: tuple[int | tuple[int, ...], ...] = ()

    def forward(self, x: Tensor) -> Features:
        raise NotImplementedError

    def grid(self, size: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Tokens along each axis of an input of this size, the spec's when None."""
        size = size or self.spec.size
        stride = (self.stride,) * len(size) if isinstance(self.stride, int) else self.stride
        return tuple(s // k for s, k in zip(size, stride))
