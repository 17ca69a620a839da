"""What an encoder gives. A file in this folder with ``build(**args) -> Encoder`` is an encoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..preprocess import InputSpec

CONV, NORM = {2: nn.Conv2d, 3: nn.Conv3d}, {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


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
    level_dims, level_strides: of ``Features.levels``, () when it gives none. arguments: what ``build`` takes to make it
    again, set where it was built from ``weights``, since a saved model holds its own weights and forgets whose they were.
    """

    spec: InputSpec
    dim: int
    stride: int | tuple[int, ...]
    level_dims: tuple[int, ...] = ()
    level_strides: tuple[int | tuple[int, ...], ...] = ()
    arguments: dict | None = None

    def forward(self, x: Tensor) -> Features:
        raise NotImplementedError

    def visible(self, x: Tensor, keep: Tensor) -> Tensor:
        """(B, P + n, dim): the last states of a plain transformer that is shown only the patches ``keep`` (B, n), numbers in
        reading order, of each input; its P class and register tokens come first. Equal to ``tokens`` when it is shown all.

        Raises:
            ModelError: BAD_RECIPE for an encoder that cannot leave tokens out.
        """
        raise ModelError(f"{type(self).__name__} cannot leave tokens out, as masked autoencoding does", "BAD_RECIPE",
                         'a plain ViT of timm (encoders/image.py) can, and net="vit" (encoders/volume.py); for others hide with mode="simmim"')  # fmt: skip

    def grid(self, size: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Tokens along each axis of an input of this size, the spec's when None.

        Raises:
            ModelError: BAD_ARGUMENT when the stride does not divide the size.
        """
        size = tuple(size or self.spec.size)
        stride = (self.stride,) * len(size) if isinstance(self.stride, int) else self.stride
        if len(size) != len(stride) or any(s < k or s % k for s, k in zip(size, stride)):
            raise ModelError(f"an input of {size} pixels has no grid in an encoder of stride {self.stride}", "BAD_ARGUMENT",
                             "each side is a multiple of the stride")  # fmt: skip
        return tuple(s // k for s, k in zip(size, stride))


def quarters(depth: int) -> tuple[int, ...]:
    """Blocks of a plain transformer, counted from 1, whose states serve as levels: at a quarter, half, three quarters, the end.

    Source: DPT, Ranftl et al. 2021, arXiv:2103.13413, section 3 (blocks 3, 6, 9, 12 of a ViT-B).
    """
    return tuple(sorted({-(-depth * k // 4) for k in (1, 2, 3, 4)}))


def twice(width: int, out: int, rank: int = 2) -> nn.Sequential:
    """(B, width, *grid) -> (B, out, *grid): two convolutions, each with a batch norm and a ReLU.

    Source: U-Net, Ronneberger et al. 2015, arXiv:1505.04597, section 2; there without norms.
    """
    step = lambda a, b: (CONV[rank](a, b, 3, padding=1, bias=False), NORM[rank](b), nn.ReLU())  # noqa: E731
    return nn.Sequential(*step(width, out), *step(out, out))


def as_map(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(B, N, C) in reading order -> (B, C, *grid)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def resize_positions(positions: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Learned position embeddings (1, N, C) of one grid on another one, 2-D bicubic or 3-D trilinear.

    Source: ViT, Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.2 (interpolation by place for other resolutions).
    """
    if old == new:
        return positions
    mode = "bicubic" if len(new) == 2 else "trilinear"
    return F.interpolate(as_map(positions, old).float(), new, mode=mode, align_corners=False).flatten(2).transpose(1, 2).to(positions.dtype)


def freeze_unread(encoder: Encoder) -> None:
    """Parameters that no token depends on (pooling heads, blocks past the layer that is read) are not trained.

    A gradient that never comes stalls distributed training. Found by a pass without data.
    """
    named = {k: p for k, p in encoder.named_parameters() if p.requires_grad}
    ghosts = {k: torch.empty_like(v, device="meta") for k, v in (*encoder.named_parameters(), *encoder.named_buffers())}
    for k in named:
        ghosts[k].requires_grad_(True)
    x = torch.empty(2, encoder.spec.channels, *encoder.spec.size, device="meta")
    with torch.enable_grad():
        found = torch.func.functional_call(encoder, ghosts, (x,))
        grads = torch.autograd.grad(found.tokens.sum() + found.pooled.sum(), [ghosts[k] for k in named], allow_unused=True)
    for p, grad in zip(named.values(), grads):
        if grad is None:
            p.requires_grad_(False)
