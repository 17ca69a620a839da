"""The way down of a U-Net, from random numbers: learns outlines of what is thin or small from few pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..preprocess import InputSpec
from .base import Encoder, Features, twice


class UNet(Encoder):
    """(B, channels, H, W) -> a level at each stride 2, 4, 8, ...: :func:`twice`, then the largest of each 2 x 2.

    The first level is at stride 2 with all pixels of a cell as its channels, at a quarter of what full resolution costs
    (Shi et al. 2016, arXiv:1609.05158, the inverse of their shuffle).
    """

    def __init__(self, spec: InputSpec, dims: Sequence[int]):
        super().__init__()
        self.spec, self.dim, self.stride = spec, dims[-1], 2 ** len(dims)
        self.level_dims, self.level_strides = tuple(dims), tuple(2**k for k in range(1, len(dims) + 1))
        self.down = nn.ModuleList(twice(a, b) for a, b in zip((4 * spec.channels, *dims), dims))

    def forward(self, x: Tensor) -> Features:
        grid, levels = self.grid(x.shape[2:]), []
        for number, rung in enumerate(self.down):
            x = rung(F.max_pool2d(x, 2) if number else F.pixel_unshuffle(x, 2))
            levels.append(x)
        tokens = x.flatten(2).transpose(1, 2)
        return Features(tokens, grid, tokens.mean(1), tuple(levels))


def build(
    size: tuple[int, int] = (256, 256), channels: int = 1, dims: tuple[int, ...] = (32, 32, 64, 128, 256), mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None, windows: tuple[tuple[float, float], ...] = (), standardise: bool = False,
) -> UNet:  # fmt: skip
    """A U-Net's way down as an encoder.

    Args:
        size: (H, W) of the input, a multiple of 2 ** levels. channels: of the input. dims: channels of each level, finest first.
        mean, std: per channel, of display values in [0, 1]; 0.5 and 0.25 by default.
        windows, standardise: as :func:`medvlm.encoders.image.build` takes them.

    Raises:
        ModelError: BAD_RECIPE for arguments that do not fit each other, BAD_ARGUMENT for a size that the stride does not divide.
    """
    mean, std = tuple(mean or (0.5,) * channels), tuple(std or (0.25,) * channels)
    if not dims or len(mean) != channels or len(std) != channels or windows and len(windows) != channels:
        raise ModelError(f"{len(dims)} levels, {len(mean)} means, {len(std)} deviations and {len(windows)} windows for {channels} channels", "BAD_RECIPE",
                         "give a level or more, and one of the others a channel")  # fmt: skip
    encoder = UNet(InputSpec(tuple(size), channels, mean=mean, std=std, windows=tuple(map(tuple, windows)), standardise=standardise), tuple(dims))
    encoder.grid()
    return encoder
