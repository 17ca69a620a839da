"""Masks from points, boxes, scribbles or [SEG] states, in 2-D and 3-D: segment-anything's prompt encoder and mask decoder.

In 2-D the two modules are segment-anything's own, so their weights are interchangeable with SAM's; in 3-D they are their
twins of ``heads/volume.py``. What is added around them:
a neck that makes one embedding out of an encoder's levels; a coarse map for each label known by name, read straight off
that embedding (deep supervision, Lee et al. 2015, arXiv:1409.5185: a decoder without pretrained weights hardly learns
without), from which a prompt that names it starts; a projection of [SEG] states to prompt tokens (LISA, Lai et al. 2023,
arXiv:2308.00692, section 3.2); a probability that the target is there; one image a prompt in a batch; and, where asked
for, a refiner that draws what is thinner than the decoder's cells, or a ladder from which the labels known by name are
drawn without the decoder. SAM's (x, y) order is known here and in its twins only.

A flipped image with flipped prompts does not give the flipped mask of the same weights: random Fourier positions and
transposed convolutions tell left from right. That of mirrored weights (frequencies negated, kernels flipped) it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from ..encoders.base import CONV, Features, twice
from ..errors import ModelError
from .volume import LayerNorm3d, VolumePromptEncoder, volume_decoder

NORM = {2: LayerNorm2d, 3: LayerNorm3d}
POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}
LINEAR = {2: "bilinear", 3: "trilinear"}
MARKED = 1e-3
"""A scribble's cells are told as a probability of 1 - MARKED, others of MARKED.
Source: computational-cell-analytics/micro-sam, prompt_based_segmentation.py (logits from a mask)."""


@dataclass
class Prompts:
    """P prompts over a batch of images, flat. Everything but ``image`` is optional.

    image: (P,) index into the batch. points: (P, Q, rank) pixel centres ((d,) h, w) of the encoder's input, labels (P, Q)
    with 1 on the target, 0 off it, -1 padding. boxes: (P, 2, rank) lower and upper corner. masks: (P, 1, *grid) logits
    at the decoder's own stride, as :meth:`MaskHead.scribble` makes them. tokens: (P, L, lm_dim) [SEG] states.
    named: (P,) index into the head's labels, -1 for targets it does not know by name; a known one starts from its own
    coarse map. draw: (P,) bool, False where only the presence is wanted.
    """

    image: Tensor
    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None
    tokens: Tensor | None = None
    named: Tensor | None = None
    draw: Tensor | None = None


class Masks(NamedTuple):
    """logits: (P, *grid) over the whole input at the head's stride, of the prompts that ``draw`` keeps only. quality: (P,)
    predicted IoU. present: (P,) logits."""

    logits: Tensor
    quality: Tensor
    present: Tensor


class Embedding(NamedTuple):
    """What the prompts of a batch of images share. map: (B, dim, *grid). fine: (B, width, *finer grid) of the refiner or the ladder."""

    map: Tensor
    fine: Tensor | None = None


class MaskHead(nn.Module):
    """(Features, Prompts) -> Masks. ``scale`` and ``shift`` calibrate presence: p = sigmoid(present * scale + shift).

    labels: names of the coarse maps of ``dense``, (dim) -> (labels) at the embedding's grid. A prompt that names one
    starts from it: the map is its mask prompt, and the decoder's logits are added to it. up: cells of the decoder's
    logits to one of the embedding's, along each axis. ladder: the maps are read off its fine map instead, (B, labels, *finer
    grid), and are what is drawn of a label known by name; of such a prompt the decoder tells the presence alone. shuffle: cells of
    those maps to one of the ladder's along each axis, each a channel of its own there (Shi et al. 2016, arXiv:1609.05158).
    """

    def __init__(
        self, neck: nn.Module, prompt_encoder: PromptEncoder, decoder: MaskDecoder, lm_dim: int, labels: tuple[str, ...],
        up: tuple[int, ...] = (4, 4), refiner: Refiner | None = None, ladder: Ladder | None = None, shuffle: int = 1,
    ):  # fmt: skip
        super().__init__()
        dim = decoder.transformer_dim
        self.labels, self.up, self.shuffle = tuple(labels), tuple(up), shuffle
        self.dense = CONV[len(up)](dim if ladder is None else ladder.width, len(labels) * shuffle**2, 1) if labels else None
        self.neck, self.prompt_encoder, self.decoder, self.refiner, self.ladder = neck, prompt_encoder, decoder, refiner, ladder
        self.speak = nn.Sequential(nn.LayerNorm(lm_dim), nn.Linear(lm_dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.presence = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def embed(self, features: Features) -> Embedding:
        """What is computed once of the images, however many prompts follow."""
        fine = self.refiner.neck(features) if self.refiner else self.ladder(features) if self.ladder else None
        return Embedding(self.neck(features), fine)

    def outlines(self, features: Features) -> Tensor:
        """:meth:`maps` of these features, without what only prompts need."""
        return self._read(self._fine(features))

    def outlined(self, features: Features, image: Tensor, label: Tensor) -> Tensor:
        """``outlines(features)[image, label]``, (n, *grid): the maps of these labels alone are computed, which of many labels is a fraction."""
        fine, cells = self._fine(features), self.shuffle**2
        weight, bias = self.dense.weight.flatten(1).unflatten(0, (-1, cells)), self.dense.bias.unflatten(0, (-1, cells))
        order = image.argsort()
        wanted = label[order].split(torch.bincount(image, minlength=len(fine)).tolist())
        rows = [F.linear(x, weight[k].flatten(0, 1), bias[k].flatten()).T for x, k in zip(fine.movedim(1, -1).flatten(1, -2), wanted)]
        maps = torch.cat(rows).unflatten(1, fine.shape[2:]).unflatten(0, (-1, cells))[order.argsort()]
        return self._spread(maps)[:, 0]

    def _fine(self, features: Features) -> Tensor:
        return self.neck(features) if self.ladder is None else self.ladder(features)

    def _read(self, map: Tensor) -> Tensor:
        return self._spread(self.dense(map))

    def _spread(self, maps: Tensor) -> Tensor:
        """``shuffle`` x ``shuffle`` finer cells of each, that lie one behind the other among the channels, beside each other."""
        return maps if self.shuffle == 1 else F.pixel_shuffle(maps, self.shuffle)

    def forward(self, features: Features, prompts: Prompts) -> Masks:
        return self.decode(self.embed(features), prompts)

    def decode(self, embedding: Embedding, prompts: Prompts) -> Masks:
        image, shown = prompts.image, slice(None) if prompts.draw is None else prompts.draw
        sparse, dense = self._prompt(prompts, tuple(embedding.map.shape[2:]))
        coarse = self._coarse(embedding, prompts)
        if coarse is not None:
            known = (prompts.named >= 0).reshape(-1, *[1] * (coarse.ndim - 1))
            hint = self._sized(coarse, tuple(n * u for n, u in zip(embedding.map.shape[2:], self.up)))
            dense = torch.where(known, self.prompt_encoder.mask_downscaling(hint), dense)
        masks, quality, states = decode(self.decoder, embedding.map[image], self._positions(embedding.map), sparse, dense, prompts.draw)
        logits = masks[:, 0]
        if self.ladder is not None:
            logits = self._sized(masks[:, :1], tuple(n * self.shuffle for n in embedding.fine.shape[2:]))[:, 0]
            logits = logits if coarse is None else torch.where(known[shown, 0], coarse[shown, 0], logits)
        elif coarse is not None:
            logits = logits + (coarse * known)[shown, 0]
        if self.refiner is not None:
            logits = self.refiner(embedding.fine[image[shown]], logits, states[shown, 1])
        return Masks(logits, quality[:, 0], self.presence(states[:, 0])[:, 0])

    def maps(self, embedding: Embedding) -> Tensor:
        """(B, labels, *grid) logits of the labels known by name, at the embedding's stride, or with a ladder at the finest level's by ``shuffle``."""
        return self._read(embedding.map if self.ladder is None else embedding.fine)

    def scribble(self, coverage: Tensor) -> Tensor:
        """Rough masks over the input (P, *size), > 0 where marked -> Prompts.masks: a cell that is touched is marked.

        ``Frame.mask_to_input`` makes the coverage from a bool array on the image's own grid.
        """
        grid = tuple(n // k * u for n, k, u in zip(coverage.shape[1:], self.neck.stride, self.up))
        pool = {2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[len(grid)]
        return torch.where(pool(coverage[:, None].float(), grid) > 0, 1 - MARKED, MARKED).logit()

    def _coarse(self, embedding: Embedding, prompts: Prompts) -> Tensor | None:
        """(P, 1, *grid) logits of the named targets' own maps, as large as what is drawn; they learn from their own loss alone."""
        if self.dense is None or prompts.named is None:
            return None
        maps = self.maps(embedding)[prompts.image, prompts.named.clamp(min=0)][:, None].detach()
        return maps if self.ladder is not None else self._sized(maps, tuple(n * u for n, u in zip(maps.shape[2:], self.up)))

    def _sized(self, maps: Tensor, grid: tuple[int, ...]) -> Tensor:
        return maps if maps.shape[2:] == grid else F.interpolate(maps, grid, mode=LINEAR[len(grid)], align_corners=False)

    def probability(self, present: Tensor) -> Tensor:
        """Calibrated chance that the target is there."""
        return (present * self.scale + self.shift).sigmoid()

    def _positions(self, embedding: Tensor) -> Tensor:
        return self.prompt_encoder.pe_layer(tuple(embedding.shape[2:]))[None]

    def _prompt(self, prompts: Prompts, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        points = None if prompts.points is None else (prompts.points.flip(-1).float(), prompts.labels)
        boxes = None if prompts.boxes is None else prompts.boxes.flip(-1).flatten(1).float()
        count, wide = prompts.image.shape[0], tuple(n * u for n, u in zip(grid, self.up))
        if prompts.masks is not None and tuple(prompts.masks.shape) != (count, 1, *wide):
            raise ModelError(f"mask prompts are {tuple(prompts.masks.shape)} but {count} prompts take {(count, 1, *wide)}", "GRID_MISMATCH", "see MaskHead.scribble")
        sparse, dense = self.prompt_encoder(points=points, boxes=boxes, masks=prompts.masks)
        if points is None and boxes is None:  # segment-anything answers one row of nothing
            sparse = sparse.new_zeros(count, 0, sparse.shape[-1])
        if prompts.tokens is not None:
            sparse = torch.cat([sparse, self.speak(prompts.tokens).to(sparse.dtype)], 1)
        if prompts.masks is None:  # segment-anything lays it out for the grid it was built with
            dense = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, *[1] * len(grid)).expand(count, -1, *grid)
        return sparse, dense


def decode(decoder: MaskDecoder, embedding: Tensor, positions: Tensor, sparse: Tensor, dense: Tensor, draw: Tensor | None = None):
    """segment-anything's decoder with one image embedding a prompt, which its own ``forward`` cannot take, on any grid.

    embedding, dense: (P, C, *grid). positions: (1, C, *grid). sparse: (P, N, C). draw: (P,) bool of the masks wanted.
    Returns mask logits (P or those to draw, M, *(grid * up)), predicted IoU (P, M) and the states (P, 1 + M + N, C) of
    the quality token, the M mask tokens and the prompts.
    Source: facebookresearch/segment-anything, modeling/mask_decoder.py (MaskDecoder.predict_masks).
    """
    count, grid = sparse.shape[0], embedding.shape[2:]
    learned = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])[None].expand(count, -1, -1)
    # the transformer asks for two axes, and flattens them
    states, source = decoder.transformer(
        (embedding + dense).flatten(3), positions.expand(count, *[-1] * (len(grid) + 1)).flatten(3), torch.cat([learned, sparse.to(learned.dtype)], 1)
    )
    shown = slice(None) if draw is None else draw
    wide = decoder.output_upscaling(source[shown].transpose(1, 2).unflatten(2, grid))
    kernels = torch.stack([mlp(states[shown, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
    masks = torch.einsum("pmc,pc...->pm...", kernels, wide)
    return masks, decoder.iou_prediction_head(states[:, 0]), states


class Pyramid(nn.Module):
    """Features.levels -> one map at ``stride``: coarser levels are scaled up and added, finer ones averaged down.

    Strides are one number or one an axis. Source: the top-down sum of FPN, Lin et al. 2017, arXiv:1612.03144, section 3.

    Raises:
        ModelError: BAD_RECIPE when a level's stride is neither a divisor nor a multiple of ``stride``.
    """

    def __init__(self, level_dims: tuple[int, ...], level_strides: tuple, dim: int, stride: int | tuple[int, ...], rank: int = 2):
        super().__init__()
        self.stride, self.level_strides = each(stride, rank), tuple(each(s, rank) for s in level_strides)
        for level in self.level_strides:
            if any(max(a, b) % min(a, b) for a, b in zip(level, self.stride)):
                raise ModelError(f"a level of stride {level} cannot be brought to stride {self.stride}", "BAD_RECIPE", "give a multiple or divisor of each level's stride")
        conv, norm = CONV[rank], NORM[rank]
        self.lateral = nn.ModuleList(conv(d, dim, 1) for d in level_dims)
        self.mix = nn.Sequential(norm(dim), nn.GELU(), conv(dim, dim, 3, padding=1), norm(dim), nn.GELU(), conv(dim, dim, 3, padding=1))

    def forward(self, features: Features) -> Tensor:
        total, rank = None, len(self.stride)
        for level, stride, lateral in zip(features.levels, self.level_strides, self.lateral):
            down = tuple(max(1, t // s) for t, s in zip(self.stride, stride))
            up = tuple(max(1, s // t) for t, s in zip(self.stride, stride))
            wide = lateral(level if max(down) == 1 else POOL[rank](level, down))
            if max(up) > 1:
                wide = F.interpolate(wide, scale_factor=up, mode=LINEAR[rank], align_corners=False)
            total = wide if total is None else total + wide
        return self.mix(total)


class Refiner(nn.Module):
    """The decoder's logits -> logits at the finest level's stride, for structures thinner than the decoder's cells.

    The mask token's state chooses among the channels of a fine map of the image, and two convolutions correct the logits.
    The last one starts at zero: a new refiner changes nothing. The decoder knows nothing of it, so SAM's weights stay as
    they are. Source: the idea of HQ-SAM, Ke et al. 2023, arXiv:2306.01567, section 3.2, which adds an output token.
    """

    def __init__(self, level_dims: tuple[int, ...], level_strides: tuple, dim: int, width: int, rank: int = 2):
        super().__init__()
        self.neck = Pyramid(level_dims, level_strides, width, level_strides[0], rank)
        self.choose = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, width))
        self.correct = nn.Sequential(CONV[rank](width + 1, width, 3, padding=1), nn.GELU(), CONV[rank](width, 1, 3, padding=1))
        nn.init.zeros_(self.correct[-1].weight)
        nn.init.zeros_(self.correct[-1].bias)

    def forward(self, fine: Tensor, logits: Tensor, state: Tensor) -> Tensor:
        """fine: (P, width, *grid) of each prompt's image. logits: (P, *coarser grid). state: (P, dim). -> (P, *grid)"""
        wide = F.interpolate(logits[:, None], fine.shape[2:], mode=LINEAR[logits.ndim - 1], align_corners=False)
        chosen = fine * self.choose(state).reshape(*fine.shape[:2], *[1] * (fine.ndim - 2))
        return (wide + self.correct(torch.cat([chosen, wide], 1)))[:, 0]


class Ladder(nn.Module):
    """Features.levels -> one map of ``width`` channels at the finest level's stride: from the coarsest level upwards, each rung
    joins what came from below with its level in two convolutions. Source: U-Net's expansive path, Ronneberger et al. 2015,
    arXiv:1505.04597, section 2; with batch norms, and rungs half as much wider at each step down.
    """

    def __init__(self, level_dims: tuple[int, ...], width: int, rank: int = 2):
        super().__init__()
        self.width, rungs = width, [width + width // 2 * k for k in range(len(level_dims))]
        self.foot = CONV[rank](level_dims[-1], rungs[-1], 1)
        self.rungs = nn.ModuleList(twice(dim + below, here, rank) for dim, here, below in zip(level_dims, rungs, rungs[1:]))

    def forward(self, features: Features) -> Tensor:
        map = self.foot(features.levels[-1])
        for level, rung in zip(features.levels[-2::-1], reversed(self.rungs)):
            wide = F.interpolate(map, level.shape[2:], mode=LINEAR[level.ndim - 2], align_corners=False)
            map = rung(torch.cat([level, wide], 1))
        return map


def each(stride: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    """A stride as one number an axis."""
    return (stride,) * rank if isinstance(stride, int) else tuple(stride)


def build(
    level_dims: tuple[int, ...], level_strides: tuple, lm_dim: int, size: tuple[int, ...],
    dim: int = 128, stride: int | tuple[int, ...] = 8, depth: int = 2, heads: int = 8, labels: tuple[str, ...] = (), refine: int = 0,
    ladder: int = 0, shuffle: int = 1,
) -> MaskHead:  # fmt: skip
    """A mask head for inputs of ``size``, (H, W) or (D, H, W), whose logits have ``stride / 4``, along D at least 1.

    level_dims, level_strides: the encoder's, finest first. lm_dim: width of the [SEG] states.
    dim, depth, heads: of the two-way transformer (SAM: 256, 2, 8). stride: of the image embedding (SAM: 16), one number
    or one an axis. labels: targets that are known by name, () for none. refine: channels of a refiner, which gives logits
    at the stride of the finest level instead; 0 for none. ladder: channels of the fine map that the labels are drawn from
    instead; 0 for none. shuffle: of a ladder's maps, cells to one of the finest level along each axis; more than 1 in 2-D only.

    Raises:
        ModelError: BAD_RECIPE for a ladder beside a refiner or without labels, and for strides that do not fit the input, the levels or each other.
    """
    size, rank = tuple(size), len(size)
    stride = each(stride, rank)
    if ladder and (refine or not labels):
        raise ModelError("a ladder draws the labels known by name, and a refiner what the decoder has drawn: a head has one of them", "BAD_RECIPE", "give labels, and ladder or refine")
    if shuffle != 1 and (rank != 2 or not ladder or shuffle < 1 or each(level_strides[0], rank)[0] % shuffle):
        raise ModelError(f"shuffle is {shuffle} with a ladder of {ladder} in {rank}-D", "BAD_RECIPE", "it is of a ladder's maps in 2-D, and divides the finest level's stride")
    if rank not in CONV or any(n % k for n, k in zip(size, stride)):
        raise ModelError(f"an input of {size} has no whole embedding of stride {stride}", "BAD_RECIPE", "give (H, W) or (D, H, W) and a stride that divides it")
    up = (4, 4) if rank == 2 else tuple(min(4, k) for k in stride)
    if 3 in up:
        raise ModelError(f"the stride of a volume's embedding is 1, 2 or at least 4 along an axis, not {stride}", "BAD_RECIPE")
    finest = each(level_strides[0], rank)
    if refine and any(f * u > k for f, u, k in zip(finest, up, stride)):
        raise ModelError(f"levels of stride {finest} and up cannot refine logits of stride {tuple(k / u for k, u in zip(stride, up))}", "BAD_RECIPE")
    grid = tuple(n // k for n, k in zip(size, stride))
    prompts = dict(embed_dim=dim, image_embedding_size=grid, input_image_size=size, mask_in_chans=16)
    masks = dict(
        transformer_dim=dim, num_multimask_outputs=3, iou_head_depth=3, iou_head_hidden_dim=256,
        transformer=TwoWayTransformer(depth=depth, embedding_dim=dim, mlp_dim=8 * dim, num_heads=heads),
    )  # fmt: skip
    return MaskHead(
        Pyramid(level_dims, level_strides, dim, stride, rank),
        PromptEncoder(**prompts) if rank == 2 else VolumePromptEncoder(**prompts, up=up),
        MaskDecoder(**masks) if rank == 2 else volume_decoder(**masks, up=up),
        lm_dim, labels, up, Refiner(level_dims, level_strides, dim, refine, rank) if refine else None, Ladder(level_dims, ladder, rank) if ladder else None, shuffle,
    )  # fmt: skip
