"""A 2-D encoder over the tiles of a large picture, with the whole picture made small beside them.

Low-to-high resolution as in S2 (Shi et al. 2024, arXiv:2403.13043): the same encoder sees the picture at its
own scale and, cut into tiles of that size, at a larger one; the maps of the tiles are put back together. S2 pools the
large map and concatenates channels; here the small one is scaled up and added with a learned weight, so that tokens keep
their dimension and number their place, as in InternVL 1.5's tiles and thumbnail (Chen et al. 2024, arXiv:2404.16821).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from . import image
from .base import Encoder, Features


class TileEncoder(Encoder):
    """Tokens of all tiles in one reading order over the picture; pooled is the overview's."""

    def __init__(self, encoder: Encoder, spec):
        super().__init__()
        self.encoder, self.spec, self.tile = encoder, spec, encoder.spec.size
        self.dim, self.stride = encoder.dim, encoder.stride
        self.level_dims, self.level_strides = encoder.level_dims, encoder.level_strides
        self.overview = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Features:
        grid, size = self.grid(x.shape[2:]), tuple(x.shape[2:])
        counts = tuple(-(-s // t) for s, t in zip(size, self.tile))
        whole = F.pad(x, (0, counts[1] * self.tile[1] - size[1], 0, counts[0] * self.tile[0] - size[0]))
        tiles = whole.unflatten(3, (counts[1], -1)).unflatten(2, (counts[0], -1)).permute(2, 4, 0, 1, 3, 5)  # rows, columns, B, C, h, w
        near = self.encoder(tiles.flatten(0, 2))
        far = self.encoder(F.interpolate(x, self.tile, mode="bilinear", align_corners=False, antialias=True))
        tokens = self._stitch(near.tokens.transpose(1, 2).unflatten(2, near.grid), counts, grid)
        wide = F.interpolate(far.tokens.transpose(1, 2).unflatten(2, far.grid), grid, mode="bilinear", align_corners=False)
        levels = [self._stitch(m, counts, tuple(s // k for s in size)) for m, k in zip(near.levels, self.level_strides)]
        return Features((tokens + self.overview * wide).flatten(2).transpose(1, 2), grid, far.pooled, tuple(levels))

    @staticmethod
    def _stitch(maps: Tensor, counts: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """(rows * columns * B, C, h, w) -> (B, C, *size), what was padded cut away."""
        rows = maps.unflatten(0, (*counts, len(maps) // prod(counts))).permute(2, 3, 0, 4, 1, 5)  # B, C, rows, h, columns, w
        return rows.flatten(4, 5).flatten(2, 3)[:, :, : size[0], : size[1]]


def build(encoder: Mapping, size: tuple[int, int], tile: tuple[int, int] | None = None, weights: str | None = None) -> TileEncoder:
    """Any encoder of pictures on a picture larger than its own.

    Args:
        encoder: arguments of ``encoders/image.py`` but size and weights.
        size: (H, W) of the whole picture, a multiple of ``tile``.
        tile: (h, w) that the encoder sees, its own size by default.
        weights: of the 2-D encoder.

    Raises:
        ModelError: as ``encoders/image.py``, and BAD_RECIPE where tiles do not fill the size.
    """
    if mine := sorted(encoder.keys() & {"size", "weights"}):
        raise ModelError(f"{', '.join(mine)} of a tile encoder stand beside its 2-D encoder, not inside it", "BAD_RECIPE", "give tile and weights")
    small = image.build(**encoder, size=tile and tuple(tile), weights=weights)
    if any(s % t for s, t in zip(size, small.spec.size)):
        raise ModelError(f"tiles of {small.spec.size} do not fill {tuple(size)}", "BAD_RECIPE", "give a size that is a multiple of the tile")
    made = TileEncoder(small, replace(small.spec, size=tuple(size)))
    if weights is not None:
        inner = {k: v for k, v in small.arguments.items() if k != "size"}
        made.arguments = {"encoder": inner, "size": made.spec.size, "tile": small.spec.size}
    return made
