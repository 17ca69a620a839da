"""A 2-D encoder over the slices of a volume: tokens keep their slice, so nothing is mixed across them here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import ModelError
from ..imaging import window
from . import image
from .base import Encoder, Features


class SliceEncoder(Encoder):
    """(B, C, D, H, W) -> Features with grid (D, h, w); pooled is the mean over slices.

    ``chunk`` slices go through the encoder at a time; while training, their activations are computed again in the backward
    pass instead of being kept (Chen et al. 2016, arXiv:1604.06174), so that memory does not grow with the depth.
    """

    def __init__(self, encoder: Encoder, spec, chunk: int, levels: bool):
        super().__init__()
        self.encoder, self.spec, self.chunk = encoder, spec, chunk
        self.dim, self.stride = encoder.dim, (1, encoder.stride, encoder.stride)
        if levels:
            self.level_dims, self.level_strides = encoder.level_dims, tuple((1, s, s) for s in encoder.level_strides)

    def forward(self, x: Tensor) -> Features:
        grid, batch = self.grid(x.shape[2:]), len(x)
        slices = x.transpose(1, 2).flatten(0, 1)
        train = torch.is_grad_enabled() and self.training
        parts = [checkpoint(self._read, part, use_reentrant=False) if train else self._read(part) for part in slices.split(self.chunk)]
        tokens, pooled, *levels = (torch.cat(column).unflatten(0, (batch, grid[0])) for column in zip(*parts))
        return Features(tokens.flatten(1, 2), grid, pooled.mean(1), tuple(level.transpose(1, 2) for level in levels))

    def _read(self, slices: Tensor) -> tuple[Tensor, ...]:
        found = self.encoder(slices)
        return found.tokens, found.pooled, *(found.levels if self.level_dims else ())


def build(
    encoder: Mapping, size: tuple[int, int, int], windows: tuple = (), unit: str | None = None, spacing: tuple[float, float, float] | None = None,
    chunk: int = 8, levels: bool = False, weights: str | None = None,
) -> SliceEncoder:  # fmt: skip
    """Any encoder of pictures over the slices of a volume.

    Args:
        encoder: arguments of ``encoders/image.py`` but size and weights.
        size: (D, H, W); slices run along D, which is axial in the orientation that preprocessing brings volumes to.
        windows: names or (centre, width) pairs, one a channel of the 2-D encoder ("medgemma" for three).
        unit: "HU" where there are windows and "display" where there are none, unless given.
        spacing: mm along (D, H, W) to resample to; None scales to ``size``.
        chunk: slices at a time; it bounds memory and leaves the results alone.
        levels: give the 2-D encoder's maps to the mask head too, which takes far more memory than the tokens.
        weights: of the 2-D encoder.

    Raises:
        ModelError: as ``encoders/image.py``, and BAD_RECIPE where the windows are not one a channel.
    """
    if mine := sorted(encoder.keys() & {"size", "weights"}):
        raise ModelError(f"{', '.join(mine)} of a slice encoder stand beside its 2-D encoder, not inside it", "BAD_RECIPE", "move them out")
    if chunk < 1:
        raise ModelError(f"a chunk of {chunk} slices holds none", "BAD_RECIPE", "give chunk of 1 or more")
    flat = image.build(**encoder, size=tuple(size[1:]), weights=weights)
    pairs = window.named(windows)
    if pairs and len(pairs) != flat.spec.channels:
        raise ModelError(f"{len(pairs)} windows for a 2-D encoder of {flat.spec.channels} channels", "BAD_RECIPE", "give one window a channel")
    spec = replace(flat.spec, size=tuple(size), windows=pairs, unit=unit or ("HU" if pairs else "display"), spacing=spacing and tuple(spacing))
    made = SliceEncoder(flat, spec, chunk, levels)
    made.grid()
    if weights is not None:
        inner = {k: v for k, v in flat.arguments.items() if k != "size"}
        made.arguments = {"encoder": inner, "size": spec.size, "windows": pairs, "unit": spec.unit, "spacing": spec.spacing, "chunk": chunk, "levels": levels}
    return made
