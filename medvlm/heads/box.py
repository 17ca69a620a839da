"""Boxes: every object of the named kinds in a picture, and the one place that a [SEG] or text state means.

The first is FCOS (Tian et al. 2019, arXiv:1904.01355, with centre sampling and scores of 2020, arXiv:2006.09214) on one map,
with torchvision's own head. The second reads the encoder's tokens once with the state as query and answers with an MLP, as
DETR (Carion et al. 2020, arXiv:2005.12872) and MDETR (Kamath et al. 2021, arXiv:2104.12763) do after many such layers.
torchvision says (x, y); its code is the same for both axes, so here it is fed (h, w) and gives (h, w).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import batched_nms, clip_boxes_to_image

from ..encoders.base import Features
from ..errors import ModelError
from .mask import Pyramid


class Boxes(NamedTuple):
    """At each cell of a map: logits (B, labels, h, w); distances (B, 4, h, w) in input pixels from the cell's centre to the
    upper, left, lower and right edge; centreness (B, h, w) logits."""

    logits: Tensor
    distances: Tensor
    centreness: Tensor


class Places(NamedTuple):
    """corners: (P, 2, rank) lower and upper corner, index order, as fractions of the input. present: (P,) logits."""

    corners: Tensor
    present: Tensor


class Detection(NamedTuple):
    """label: index into the head's. box: ((h, w), (h, w)) in input pixels, half-open."""

    label: int
    score: float
    box: tuple[tuple[float, float], tuple[float, float]]


class BoxHead(nn.Module):
    """``forward`` and ``detect``: all objects of ``labels`` (2-D). ``from_states``: one place a state (any rank)."""

    def __init__(self, labels: tuple[str, ...], stride: int, neck: nn.Module | None, dense: FCOSHead | None, asked: nn.Module | None):
        super().__init__()
        self.labels, self.stride = tuple(labels), stride
        self.neck, self.dense, self.asked = neck, dense, asked

    def forward(self, features: Features) -> Boxes:
        if self.dense is None:
            raise ModelError("this box head was built without labels and finds nothing unasked", "BAD_RECIPE", "give the head labels=")
        embedding = self.neck(features)
        found = self.dense([embedding])
        logits, distances, centreness = (
            found[k].transpose(1, 2).unflatten(2, embedding.shape[2:]) for k in ("cls_logits", "bbox_regression", "bbox_ctrness")
        )
        return Boxes(logits, distances * self.stride, centreness[:, 0])

    def cells(self, grid: tuple[int, int], device=None) -> Tensor:
        """(h * w, 4) the squares of input pixels that the cells of a map stand for."""
        axes = [torch.arange(n, device=device) * float(self.stride) for n in grid]
        lower = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        return torch.cat([lower, lower + self.stride], 1)

    @torch.no_grad()
    def detect(self, boxes: Boxes, threshold: float = 0.2, overlap: float = 0.6, most: int = 100) -> list[list[Detection]]:
        """What is found in each picture, the surest first.

        Args:
            threshold: least score, the geometric mean of the label's probability and of centreness (as torchvision's FCOS).
            overlap: IoU from which the less sure of two boxes of one label is dropped.
            most: boxes kept a picture.
        """
        grid = tuple(boxes.logits.shape[2:])
        size = tuple(n * self.stride for n in grid)
        centre = self.cells(grid, boxes.logits.device)[:, :2] + self.stride / 2
        out = []
        for logits, distances, centreness in zip(*(x.float() for x in boxes)):
            scores = (logits.sigmoid() * centreness.sigmoid()).sqrt().flatten(1)
            reach = distances.flatten(1).T
            corners = clip_boxes_to_image(torch.cat([centre - reach[:, :2], centre + reach[:, 2:]], 1), (size[1], size[0]))
            whole = (corners[:, :2] < corners[:, 2:]).all(1)
            label, cell = ((scores > threshold) & whole).nonzero(as_tuple=True)
            corners = corners[cell]
            kept = batched_nms(corners, scores[label, cell], label, overlap)[:most]
            out.append([
                Detection(int(label[i]), float(scores[label[i], cell[i]]), (tuple(corners[i, :2].tolist()), tuple(corners[i, 2:].tolist())))
                for i in kept.tolist()
            ])  # fmt: skip
        return out

    def from_states(self, features: Features, states: Tensor, image: Tensor) -> Places:
        """The place that each state means.

        Args:
            states: (P, L, lm_dim), such as ``MedVLM.seg_states`` gives.
            image: (P,) index into the features' batch.
        """
        if self.asked is None:
            raise ModelError("this box head was built without lm_dim and cannot be asked", "BAD_RECIPE", "give the head lm_dim=")
        return self.asked(features, states, image)


class Asked(nn.Module):
    """(Features, states (P, L, lm_dim), image (P,)) -> Places, from one cross-attention of the states to the tokens."""

    FREQUENCIES = 6

    def __init__(self, dim: int, lm_dim: int, width: int, heads: int, rank: int):
        super().__init__()
        self.rank = rank
        self.tokens = nn.Linear(dim, width)
        self.position = nn.Linear(2 * rank * self.FREQUENCIES, width)
        self.speak = nn.Sequential(nn.LayerNorm(lm_dim), nn.Linear(lm_dim, width))
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.corners = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2 * rank))
        self.presence = nn.Linear(width, 1)

    def forward(self, features: Features, states: Tensor, image: Tensor) -> Places:
        if len(features.grid) != self.rank:
            raise ModelError(f"the box head reads grids of rank {self.rank}, the encoder's is {features.grid}", "BAD_RECIPE", "give the head rank=")
        tokens = self.tokens(features.tokens)
        tokens = tokens + self.position(waves(features.grid, self.FREQUENCIES).to(tokens))
        query, seen = self.speak(states), tokens[image]
        read, _ = self.attend(query, seen, seen, need_weights=False)
        state = self.norm(query + read).mean(1)
        # the upper corner as a share of what lies beyond the lower one: always a box, always inside, no clamp that stops gradients
        lower, share = self.corners(state).sigmoid().unflatten(1, (2, self.rank)).unbind(1)
        return Places(torch.stack([lower, lower + (1 - lower) * share], 1), self.presence(state)[:, 0])


def waves(grid: tuple[int, ...], count: int) -> Tensor:
    """(N, 2 * rank * count) sines and cosines of 1/2, 1, 2, ... periods along each axis at the cells' centres, last axis fastest.

    Source: NeRF, Mildenhall et al. 2020, arXiv:2003.08934, equation 4.
    """
    axes = [(torch.arange(n) + 0.5) / n for n in grid]
    at = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    phase = math.pi * (at[..., None] * 2.0 ** torch.arange(count)).flatten(1)
    return torch.cat([phase.sin(), phase.cos()], 1)


def build(
    dim: int, level_dims: tuple[int, ...] = (), level_strides: tuple[int, ...] = (), labels: tuple[str, ...] = (), lm_dim: int | None = None,
    width: int = 128, stride: int = 8, depth: int = 2, heads: int = 8, rank: int = 2,
) -> BoxHead:  # fmt: skip
    """A box head; one without labels finds nothing by itself, one without ``lm_dim`` cannot be asked.

    Args:
        dim, level_dims, level_strides: the encoder's.
        labels: kinds of object that are found without being asked for; 2-D pictures only.
        lm_dim: width of the [SEG] or text states.
        width: of both parts, a multiple of 32 (torchvision's head normalises 32 groups) and of ``heads``.
        stride: input pixels a cell of the map of objects. An object no cell's centre lies in is never learnt.
        depth: convolutions before the answers (FCOS: 4).
        rank: axes of the encoder's grid.

    Raises:
        ModelError: BAD_RECIPE for a width that does not divide, or objects asked of volumes.
    """
    if width % 32 or width % heads:
        raise ModelError(f"a box head's width is a multiple of 32 and of its {heads} attention heads, not {width}", "BAD_RECIPE")
    if labels and rank != 2:
        raise ModelError(f"objects are found in 2-D pictures, not on a grid of rank {rank}", "BAD_RECIPE", "leave labels out and ask with lm_dim=")
    neck = Pyramid(level_dims, level_strides, width, stride) if labels else None
    return BoxHead(
        labels, stride, neck, FCOSHead(width, 1, len(labels), depth) if labels else None,
        None if lm_dim is None else Asked(dim, lm_dim, width, heads, rank),
    )  # fmt: skip
