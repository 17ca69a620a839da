"""Hidden blocks of a picture or volume told from the rest of it: masked image modelling, which needs no words and no labels.

Blocks of the encoder's input are hidden at random, a head says which pixels stood there, and the error counts on hidden
blocks only. How they are hidden is the ``mode``:

- "simmim" (Xie et al. 2022, arXiv:2111.09886), any encoder: one learned value a channel stands in their place, and one linear
  layer reads the pixels off the tokens; L1. Departs: there what is learned takes the place of embedded patches, which not
  every encoder has. Of a patch embedding without overlap it is the same thing: the constant patch embeds to one vector.
- "mae" (He et al. 2022, arXiv:2111.06377), plain transformers: hidden tokens never enter the encoder, and a small transformer
  reads what comes out of it, with a learned token and a position in the place of each hidden one; mean squared error.

In 3-D "mae" is the first stage of Cardiac-CLIP (Hu et al. 2025, arXiv:2507.22024). Its train.py and objectives.py
(Sliver-g/Cardiac-CLIP) hide 0.75 of patches of 8 voxels in (128, 144, 144), standardise the patches, and decode with width
384, 6 heads and mim_decoder_num_layers = 4, to which its prediction_heads.py adds one.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from ..encoders.base import Encoder, Features
from ..errors import ModelError
from ..language import Batch
from ..parts import carries
from ..preprocess import InputSpec, normalise
from .mask import each

SHARES = {"simmim": 0.6, "mae": 0.75}
"""Of the blocks that are hidden. Sources: microsoft/SimMIM, data/data_simmim.py; facebookresearch/mae, models_mae.py."""


class RestoreHead(nn.Module):
    """What both modes have in common; a child says what is shown and what is told.

    dim, channels: of the encoder's tokens and input. stride: input pixels a token along each axis. block: tokens a block
    along each axis. share: of the blocks that are hidden. power: 1 for L1, 2 for squares. standardise: each patch on its own.
    """

    def __init__(self, dim: int, channels: int, stride: tuple[int, ...], block: tuple[int, ...], share: float, power: int, standardise: bool):
        super().__init__()
        self.dim, self.channels, self.stride, self.block = dim, channels, stride, block
        self.share, self.power, self.standardise = share, power, standardise

    def draw(self, count: int, grid: tuple[int, ...]) -> Tensor:
        """(count, N) bool, true on hidden tokens in reading order; as many in each. From torch's global generator, on the CPU.

        Raises:
            ModelError: BAD_RECIPE when blocks do not fill the grid, or all or none of them would be hidden.
        """
        blocks = tuple(g // b for g, b in zip(grid, self.block))
        shown = int(prod(blocks) * (1 - self.share) + 1e-6)  # rounded as MAE does, but for 10 * (1 - 0.9) < 1
        if any(g % b for g, b in zip(grid, self.block)) or not 0 < shown < prod(blocks):
            raise ModelError(f"{self.share:g} of the blocks of {self.block} tokens cannot be hidden on a grid of {tuple(grid)}", "BAD_RECIPE",
                             "give a block that divides the grid into several, or another share")  # fmt: skip
        hidden = (torch.rand(count, prod(blocks)).argsort(1).argsort(1) >= shown).unflatten(1, blocks)
        for axis, size in enumerate(self.block, 1):
            hidden = hidden.repeat_interleave(size, axis)
        return hidden.flatten(1)

    def show(self, x: Tensor, hidden: Tensor, spec: InputSpec) -> Tensor | None:
        """What the encoder is to see of x (B, C, *size) in [0, 1] in an ordinary pass; None when it sees nothing in one."""
        raise NotImplementedError

    def tell(self, encoder: Encoder, x: Tensor, hidden: Tensor, features: Features | None) -> Tensor:
        """(M, pixels * C) of the hidden tokens, in the order of ``hidden``. x: normalised. features: of what :meth:`show` gave."""
        raise NotImplementedError

    def loss(self, told: Tensor, x: Tensor, hidden: Tensor) -> Tensor:
        """Mean error of what was told of the hidden places of x (B, C, *size), normalised."""
        target = patches(x.float(), self.stride)[hidden]
        if self.standardise:  # facebookresearch/mae, models_mae.py, norm_pix_loss
            target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
        return (told.float() - target).abs().pow(self.power).mean()


class Simmim(RestoreHead):
    """``value`` is in units of the normalised input, where 0, its first value, is the mean."""

    def __init__(self, dim: int, channels: int, stride: tuple[int, ...], *args):
        super().__init__(dim, channels, stride, *args)
        self.value = nn.Parameter(torch.zeros(channels))
        self.pixels = nn.Linear(dim, prod(stride) * channels)

    def show(self, x, hidden, spec):
        if hasattr(self.value, "full_tensor"):  # a piece of it: pixels are hidden ahead of the pass that puts pieces together
            raise ModelError("the value that SimMIM learns cannot be split over processes", "BAD_RECIPE", 'leave out --shard, or hide with mode="mae"')
        where = hidden.unflatten(1, tuple(s // k for s, k in zip(x.shape[2:], self.stride)))
        for axis, size in enumerate(self.stride, 1):
            where = where.repeat_interleave(size, axis)
        mean, std = (torch.tensor(v).to(x) for v in (spec.mean, spec.std))
        return torch.where(where[:, None], (self.value.to(x) * std + mean).reshape(-1, *[1] * len(self.stride)), x)

    def tell(self, encoder, x, hidden, features):
        return self.pixels(features.tokens[hidden])


class Mae(RestoreHead):
    """Parameters are named as facebookresearch/mae names its decoder's; positions are not kept but made for each grid."""

    def __init__(self, dim: int, channels: int, stride: tuple[int, ...], *args, width: int, depth: int, heads: int):
        from timm.models.vision_transformer import Block

        super().__init__(dim, channels, stride, *args)
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.decoder_blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, prod(stride) * channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def show(self, x, hidden, spec):
        return None

    def tell(self, encoder, x, hidden, features):
        keep = (~hidden).nonzero()[:, 1].unflatten(0, (len(x), -1))
        seen = self.decoder_embed(encoder.visible(x.to(self.mask_token.dtype), keep))
        prefix = seen.shape[1] - keep.shape[1]
        places = self.mask_token.to(seen.dtype).expand(*hidden.shape, -1).masked_scatter(~hidden[..., None], seen[:, prefix:])
        places = places + positions(encoder.grid(x.shape[2:]), seen.shape[2]).to(seen)
        states = torch.cat([seen[:, :prefix], places], 1)
        for block in self.decoder_blocks:
            states = block(states)
        return self.decoder_pred(self.decoder_norm(states[:, prefix:][hidden]))


def patches(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """(B, C, *size) -> (B, N, pixels * C), the pixels under each token, both in reading order, channels fastest.

    Source: patchify of facebookresearch/mae, models_mae.py.
    """
    rank = len(stride)
    for axis, size in enumerate(stride):
        x = x.unflatten(2 + 2 * axis, (-1, size))
    x = x.permute(0, *range(2, 2 + 2 * rank, 2), *range(3, 3 + 2 * rank, 2), 1)
    return x.flatten(1 + rank).flatten(1, rank)


def positions(grid: tuple[int, ...], width: int) -> Tensor:
    """(N, width) sines, then cosines, of each axis's index, the last axis first; rates from 1 down to 1/10000.

    Source: facebookresearch/mae, util/pos_embed.py, two axes (W, then H); three likewise.
    """
    half = width // len(grid) // 2
    rate = 10000 ** -(torch.arange(half, dtype=torch.float64) / half)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    return torch.cat([wave(axis.flatten()[:, None] * rate) for axis in reversed(axes) for wave in (torch.sin, torch.cos)], 1).float()


def hide(model, batch: Batch) -> Batch:
    """The batch with blocks of its pictures hidden, and batch.targets["restore"] = {encoder: {"pixels" (K, C, *size) as they
    were, "hidden" (K, N) bool}}.

    What is hidden is drawn from torch's global generator, which the loop seeds for each step (and each look at val). In mode
    "mae" the objective encodes what is visible by itself, so pictures leave the batch, unless text of it has places for them.

    Raises:
        ModelError: BAD_RECIPE when an encoder of the batch has no head, or one made for another encoder.
    """
    images, kept = dict(batch.images), {}
    for name, x in batch.images.items():
        if not len(x):
            continue
        head, encoder = _head(model, name), model.encoders[name]
        hidden = head.draw(len(x), encoder.grid(x.shape[2:])).to(x.device)
        kept[name] = {"pixels": x, "hidden": hidden}
        shown = head.show(x, hidden, encoder.spec)
        if shown is not None:
            images[name] = shown
        elif model.lm is None or not batch.order:
            del images[name]
    return replace(batch, images=images, targets=batch.targets | {"restore": kept})


def _head(model, name: str) -> RestoreHead:
    head, encoder = model.head("restore", name), model.encoders[name]
    if head is None:
        raise ModelError(f"no head restores the pictures of encoder {name!r}", "BAD_RECIPE", f'add a head "restore_{name}" of file "restore"')
    made, there = (head.dim, head.channels, head.stride), (encoder.dim, encoder.spec.channels, each(encoder.stride, len(encoder.spec.size)))
    if made != there:
        raise ModelError(f"the restore head was built with (dim, channels, stride) {made} but encoder {name!r} has {there}", "BAD_RECIPE",
                         "give the head its encoder's")  # fmt: skip
    return head


def count(model, batch: Batch) -> dict[str, int]:
    """Pictures of a batch, over which the loss is a mean."""
    return {"restore": sum(len(x) for x in batch.images.values())}


@carries(before=hide, count=count)
def restore(model, batch: Batch, out) -> dict[str, Tensor]:
    """Error of the pixels that :func:`hide` hid, averaged over the pictures of the batch.

    In mode "mae" a stage without text has no other objective that reads pictures: it would find none.
    """
    losses, counts = [], []
    for name, kept in batch.targets["restore"].items():
        head, encoder, hidden = model.head("restore", name), model.encoders[name], kept["hidden"]
        x = normalise(kept["pixels"].float(), encoder.spec)
        losses.append(head.loss(head.tell(encoder, x, hidden, out.features.get(name)), x, hidden) * len(x))
        counts.append(len(x))
    return {"restore": sum(losses) / sum(counts)} if losses else {}


objective = restore


def build(
    dim: int, stride: int | tuple[int, ...], mode: str, rank: int = 2, channels: int = 1, block: int | tuple[int, ...] = 1,
    share: float | None = None, standardise: bool = False, width: int = 384, depth: int = 4, heads: int = 6,
) -> RestoreHead:  # fmt: skip
    """A head that restores what is hidden of an encoder's input.

    Args:
        dim, stride, channels: the encoder's; rank: axes of its grid.
        mode: "simmim" for any encoder; "mae" for plain transformers: timm's ViTs in encoders/image.py, net="vit" in
            encoders/volume.py.
        block: tokens a hidden block, one number or one an axis. SimMIM hides blocks of 32 pixels, MAE single patches.
        share: of the blocks that are hidden; by default 0.6 ("simmim") or 0.75 ("mae").
        standardise: the target of each patch by its own mean and deviation (MAE, section 4.1, table 1d).
        width, depth, heads: of the decoder of "mae"; see above for where the defaults come from.

    Raises:
        ModelError: BAD_RECIPE for another mode, a share outside (0, 1), a width that does not divide, or patches of one
            value standardised.
    """
    if mode not in SHARES:
        raise ModelError(f"a restore head hides as {' or '.join(SHARES)}, not {mode!r}", "BAD_RECIPE")
    share = SHARES[mode] if share is None else share
    if not 0 < share < 1:
        raise ModelError(f"a share of {share} leaves nothing to hide or nothing to see", "BAD_RECIPE", "give one between 0 and 1")
    common = dim, channels, each(stride, rank), each(block, rank), share
    if standardise and prod(common[2]) * channels == 1:
        raise ModelError("a patch of one value has no deviation to be standardised by", "BAD_RECIPE", "leave standardise off")
    if mode == "simmim":
        return Simmim(*common, 1, standardise)
    if width % (2 * rank) or width % heads:
        raise ModelError(f"a decoder's width is a multiple of {2 * rank}, for its positions, and of its {heads} heads, not {width}", "BAD_RECIPE")
    return Mae(*common, 2, standardise, width=width, depth=depth, heads=heads)
