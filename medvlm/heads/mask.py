"""Masks from points, boxes, rough masks or [SEG] states: segment-anything's prompt encoder and mask decoder.

The two modules are segment-anything's own, so their weights are interchangeable with SAM's. What is added around them:
a neck that makes one embedding out of an encoder's levels; a coarse map for each label known by name, read straight off
that embedding (deep supervision, Lee et al. 2015, arXiv:1409.5185: a decoder without pretrained weights hardly learns
without), from which a prompt that names it starts; a projection of [SEG] states to prompt tokens (LISA, Lai et al. 2023,
arXiv:2308.00692, section 3.2); a probability that the target is there; and one image a prompt in a batch.
The only file that knows SAM's (x, y) order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from ..encoders.base import Features


@dataclass
class Prompts:
    """P prompts over a batch of images, flat. Everything but ``image`` is optional.

    image: (P,) index into the batch. points: (P, Q, 2) pixel centres (h, w) of the encoder's input, labels (P, Q) with
    1 on the target, 0 off it, -1 padding. boxes: (P, 2, 2) lower and upper corner (h, w). masks: (P, 1, h, w) logits at
    ``4 x`` the embedding's grid. tokens: (P, L, lm_dim) [SEG] states. named: (P,) index into the head's labels, -1 for
    targets it does not know by name; a known one starts from its own coarse map. draw: (P,) bool, False where only the
    presence is wanted.
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
    """logits: (P, h, w) over the whole input at the head's stride, of the prompts that ``draw`` keeps only. quality: (P,)
    predicted IoU. present: (P,) logits."""

    logits: Tensor
    quality: Tensor
    present: Tensor


class MaskHead(nn.Module):
    """(Features, Prompts) -> Masks. ``scale`` and ``shift`` calibrate presence: p = sigmoid(present * scale + shift).

    labels: names of the coarse maps of ``dense``, (dim) -> (labels) at the embedding's grid. A prompt that names one
    starts from it: the map is its mask prompt, and the decoder's logits are added to it.
    """

    def __init__(self, neck: nn.Module, prompt_encoder: PromptEncoder, decoder: MaskDecoder, lm_dim: int, labels: tuple[str, ...]):
        super().__init__()
        dim = decoder.transformer_dim
        self.labels = tuple(labels)
        self.dense = nn.Conv2d(dim, len(labels), 1) if labels else None
        self.neck, self.prompt_encoder, self.decoder = neck, prompt_encoder, decoder
        self.speak = nn.Sequential(nn.LayerNorm(lm_dim), nn.Linear(lm_dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.presence = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 1))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def embed(self, features: Features) -> Tensor:
        """(B, dim, h, w): the image embedding, computed once however many prompts follow."""
        return self.neck(features)

    def forward(self, features: Features, prompts: Prompts) -> Masks:
        return self.decode(self.embed(features), prompts)

    def decode(self, embedding: Tensor, prompts: Prompts) -> Masks:
        sparse, dense = self._prompt(prompts, tuple(embedding.shape[2:]))
        coarse = self._coarse(embedding, prompts)
        if coarse is not None:
            known = (prompts.named >= 0)[:, None, None, None]
            dense = torch.where(known, self.prompt_encoder.mask_downscaling(coarse), dense)
        masks, quality, token = decode(self.decoder, embedding[prompts.image], self._positions(embedding), sparse, dense, prompts.draw)
        logits = masks[:, 0]
        if coarse is not None:
            start = coarse[:, 0] * known[:, 0]
            logits = logits + (start if prompts.draw is None else start[prompts.draw])
        return Masks(logits, quality[:, 0], self.presence(token)[:, 0])

    def _coarse(self, embedding: Tensor, prompts: Prompts) -> Tensor | None:
        """(P, 1, 4h, 4w) logits of the named targets' own maps; they learn from their own loss alone."""
        if self.dense is None or prompts.named is None:
            return None
        maps = self.dense(embedding)[prompts.image, prompts.named.clamp(min=0)][:, None].detach()
        return F.interpolate(maps, scale_factor=4, mode="bilinear", align_corners=False)

    def probability(self, present: Tensor) -> Tensor:
        """Calibrated chance that the target is there."""
        return (present * self.scale + self.shift).sigmoid()

    def _positions(self, embedding: Tensor) -> Tensor:
        return self.prompt_encoder.pe_layer(tuple(embedding.shape[2:]))[None]

    def _prompt(self, prompts: Prompts, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        points = None if prompts.points is None else (prompts.points.flip(-1).float(), prompts.labels)
        boxes = None if prompts.boxes is None else prompts.boxes.flip(-1).flatten(1).float()
        count = len(prompts.image)
        sparse, dense = self.prompt_encoder(points=points, boxes=boxes, masks=prompts.masks)
        if points is None and boxes is None:  # segment-anything answers one row of nothing
            sparse = sparse.new_zeros(count, 0, sparse.shape[-1])
        if prompts.tokens is not None:
            sparse = torch.cat([sparse, self.speak(prompts.tokens).to(sparse.dtype)], 1)
        if prompts.masks is None:  # segment-anything lays it out for the grid it was built with
            dense = self.prompt_encoder.no_mask_embed.weight[:, :, None, None].expand(count, -1, *grid)
        return sparse, dense


def decode(decoder: MaskDecoder, embedding: Tensor, positions: Tensor, sparse: Tensor, dense: Tensor, draw: Tensor | None = None):
    """segment-anything's decoder with one image embedding a prompt, which its own ``forward`` cannot take.

    embedding, dense: (P, C, h, w). positions: (1, C, h, w). sparse: (P, N, C). draw: (P,) bool of the masks wanted.
    Returns mask logits (P or those to draw, M, 4h, 4w), predicted IoU (P, M) and the quality token's state (P, C).
    Source: facebookresearch/segment-anything, modeling/mask_decoder.py (MaskDecoder.predict_masks).
    """
    count = len(sparse)
    learned = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])[None].expand(count, -1, -1)
    states, source = decoder.transformer(
        embedding + dense, positions.expand(count, -1, -1, -1), torch.cat([learned, sparse.to(learned.dtype)], 1)
    )
    shown = slice(None) if draw is None else draw
    wide = decoder.output_upscaling(source[shown].transpose(1, 2).unflatten(2, embedding.shape[2:]))
    kernels = torch.stack([mlp(states[shown, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
    masks = torch.einsum("pmc,pchw->pmhw", kernels, wide)
    return masks, decoder.iou_prediction_head(states[:, 0]), states[:, 0]


class Pyramid(nn.Module):
    """Features.levels -> one map at ``stride``: coarser levels are scaled up and added, finer ones averaged down.

    Source: the top-down sum of FPN, Lin et al. 2017, arXiv:1612.03144, section 3.
    """

    def __init__(self, level_dims: tuple[int, ...], level_strides: tuple[int, ...], dim: int, stride: int):
        super().__init__()
        self.stride, self.level_strides = stride, tuple(level_strides)
        self.lateral = nn.ModuleList(nn.Conv2d(d, dim, 1) for d in level_dims)
        self.mix = nn.Sequential(
            LayerNorm2d(dim), nn.GELU(), nn.Conv2d(dim, dim, 3, padding=1), LayerNorm2d(dim), nn.GELU(), nn.Conv2d(dim, dim, 3, padding=1)
        )

    def forward(self, features: Features) -> Tensor:
        total = None
        for level, stride, lateral in zip(features.levels, self.level_strides, self.lateral):
            if stride < self.stride:
                level = F.avg_pool2d(level, self.stride // stride)
            wide = lateral(level)
            if stride > self.stride:
                wide = F.interpolate(wide, scale_factor=stride // self.stride, mode="bilinear", align_corners=False)
            total = wide if total is None else total + wide
        return self.mix(total)


def build(
    level_dims: tuple[int, ...], level_strides: tuple[int, ...], lm_dim: int, size: tuple[int, int],
    dim: int = 128, stride: int = 8, depth: int = 2, heads: int = 8, labels: tuple[str, ...] = (),
) -> MaskHead:  # fmt: skip
    """A 2-D mask head whose logits have ``stride / 4``.

    level_dims, level_strides: the encoder's. lm_dim: width of the [SEG] states. size: the encoder's input (H, W).
    dim, depth, heads: of the two-way transformer (SAM: 256, 2, 8). stride: of the image embedding (SAM: 16).
    labels: targets that are known by name, () for none.
    """
    grid = (size[0] // stride, size[1] // stride)
    return MaskHead(
        Pyramid(level_dims, level_strides, dim, stride),
        PromptEncoder(embed_dim=dim, image_embedding_size=grid, input_image_size=tuple(size), mask_in_chans=16),
        MaskDecoder(
            transformer_dim=dim, num_multimask_outputs=3, iou_head_depth=3, iou_head_hidden_dim=256,
            transformer=TwoWayTransformer(depth=depth, embedding_dim=dim, mlp_dim=8 * dim, num_heads=heads),
        ),
        lm_dim, labels,
    )  # fmt: skip
