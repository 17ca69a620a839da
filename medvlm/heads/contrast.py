"""Images and texts as unit vectors of one space, with the learned temperature of CLIP or of SigLIP.

Sources: CLIP, Radford et al. 2021, arXiv:2103.00020, section 2.4 and figure 3 (linear projections, scale from 1/0.07, never
above 100); SigLIP, Zhai et al. 2023, arXiv:2303.15343, section 3.2 (scale from 10, bias from -10).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encoders.base import Features
from ..errors import ModelError

STARTS = {"clip": (1 / 0.07, None), "siglip": (10.0, -10.0)}
"""Scale and bias before training."""


class ContrastHead(nn.Module):
    """(Features of images, Features of texts) -> logits (images, texts); parameters are named as open_clip names them."""

    def __init__(self, dim: int, text_dim: int, embed_dim: int, kind: str):
        super().__init__()
        if kind not in STARTS:
            raise ModelError(f"a contrastive head is of kind {' or '.join(STARTS)}, not {kind!r}", "BAD_RECIPE")
        scale, bias = STARTS[kind]
        self.kind = kind
        self.image_projection = nn.Linear(dim, embed_dim, bias=False)
        self.text_projection = nn.Linear(text_dim, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def image(self, features: Features) -> Tensor:
        """(B, embed_dim), unit length."""
        return F.normalize(self.image_projection(features.pooled), dim=-1)

    def text(self, features: Features) -> Tensor:
        """(B, embed_dim), unit length."""
        return F.normalize(self.text_projection(features.pooled), dim=-1)

    def scale(self) -> Tensor:
        """What cosines are multiplied by. CLIP's is held at 100 by moving the parameter, so that it can come back down."""
        if self.kind == "clip" and self.training:
            with torch.no_grad():
                self.logit_scale.clamp_(max=math.log(100))
        return self.logit_scale.exp()

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """(I, T) from unit vectors (I, embed_dim) and (T, embed_dim): softmax over either axis for CLIP, sigmoid for SigLIP."""
        logits = self.scale() * image @ text.T
        return logits if self.logit_bias is None else logits + self.logit_bias

    def forward(self, images: Features, texts: Features) -> Tensor:
        return self.logits(self.image(images), self.text(texts))


def build(dim: int, text_dim: int, embed_dim: int = 512, kind: str = "clip") -> ContrastHead:
    """dim, text_dim: of the pooled features of the image encoder and of the text encoder. kind: "clip" or "siglip".

    Raises:
        ModelError: BAD_RECIPE for another kind.
    """
    return ContrastHead(dim, text_dim, embed_dim, kind)
