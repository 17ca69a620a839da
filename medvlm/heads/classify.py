"""Multi-label findings with unknown labels, and the kind of image, from the pooled features.

Each label attends over the tokens with a query of its own, so that small findings are not averaged away.
Source of the pooling: attention-based MIL, Ilse et al. 2018, arXiv:1802.04712, equation 8 (softmax over instances).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..encoders.base import Features


class ClassifyHead(nn.Module):
    """Features -> logits (B, labels). ``scale`` and ``shift`` hold the calibration fitted on val: p = sigmoid(z * scale + shift)."""

    def __init__(self, dim: int, labels: tuple[str, ...], groups: tuple[tuple[str, ...], ...], dropout: float):
        super().__init__()
        self.labels, self.groups = tuple(labels), tuple(tuple(g) for g in groups)
        for group in self.groups:
            missing = [name for name in group if name not in self.labels]
            if missing:
                raise ValueError(f"group {group} names labels that are not in the head: {missing}")
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)
        self.attend = nn.Linear(dim, len(self.labels))
        self.weight = nn.Parameter(torch.randn(len(self.labels), dim) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(len(self.labels)))
        self.register_buffer("scale", torch.ones(len(self.labels)))
        self.register_buffer("shift", torch.zeros(len(self.labels)))

    def forward(self, features: Features) -> Tensor:
        tokens = self.dropout(self.norm(features.tokens))
        share = self.attend(tokens).softmax(1)
        pooled = torch.einsum("bnk,bnc->bkc", share, tokens)
        return (pooled * self.weight).sum(-1) + self.bias

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, labels) calibrated: softmax inside each exclusive group, sigmoid elsewhere."""
        logits = logits * self.scale + self.shift
        out = logits.sigmoid()
        for group in self.groups:
            index = [self.labels.index(name) for name in group]
            out[:, index] = logits[:, index].softmax(-1)
        return out


def build(
    dim: int, labels: tuple[str, ...], groups: tuple[tuple[str, ...], ...] = (), dropout: float = 0.1
) -> ClassifyHead:
    """labels: names. groups: sets of labels of which exactly one holds (modality, view)."""
    return ClassifyHead(dim, tuple(labels), tuple(groups), dropout)
