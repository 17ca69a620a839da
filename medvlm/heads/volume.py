"""The three-dimensional twins of segment-anything's prompt encoder and mask decoder, for ``heads/mask.py``.

Everything that does not know the number of axes is segment-anything's own: tokens, embeddings, transformer, hypernetworks.
What does is rebuilt with one axis more: the random Fourier positions take (x, y, z), and the convolutions between masks
and embedding work in (d, h, w) and may leave an axis alone. With one slice and equal weights they are the 2-D modules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from torch import Tensor, nn


class LayerNorm3d(LayerNorm2d):
    """segment-anything's normalisation over channels, for (B, C, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class VolumePositions(PositionEmbeddingRandom):
    """Random Fourier features of (x, y, z) in [0, 1]; rows of the matrix are x, y, z.

    Source: Tancik et al. 2020, arXiv:2006.10739, as segment-anything uses them in two dimensions.
    """

    def __init__(self, num_pos_feats: int):
        super().__init__(num_pos_feats)
        self.positional_encoding_gaussian_matrix = torch.randn(3, num_pos_feats)

    def forward(self, size: tuple[int, int, int]) -> Tensor:
        """(C, D, H, W) of the cell centres of a grid."""
        matrix = self.positional_encoding_gaussian_matrix
        steps = [(torch.arange(n, device=matrix.device, dtype=torch.float32) + 0.5) / n for n in size]
        return self._pe_encoding(torch.stack(torch.meshgrid(*steps, indexing="ij")[::-1], -1)).movedim(-1, 0)

    def forward_with_coords(self, coords_input: Tensor, image_size: tuple[int, int, int]) -> Tensor:
        """(P, Q, C) of points (P, Q, 3) = (x, y, z) in an input of ``image_size`` (D, H, W)."""
        return self._pe_encoding(coords_input.float() / coords_input.new_tensor(image_size[::-1], dtype=torch.float32))


class VolumePromptEncoder(PromptEncoder):
    """Points (P, Q, 3), boxes (P, 6) in (x, y, z) and masks (P, 1, D, H, W) -> sparse and dense embeddings.

    up: cells of a mask prompt to one of the embedding's along (d, h, w), 1, 2 or 4 each.
    """

    def __init__(self, embed_dim: int, image_embedding_size: tuple[int, ...], input_image_size: tuple[int, ...], mask_in_chans: int, up: tuple[int, ...]):
        super().__init__(embed_dim, image_embedding_size[1:], input_image_size[1:], mask_in_chans)
        self.input_image_size, self.image_embedding_size = input_image_size, image_embedding_size
        self.pe_layer = VolumePositions(embed_dim // 2)
        first, second = halves(up)
        self.mask_downscaling = nn.Sequential(
            nn.Conv3d(1, mask_in_chans // 4, second, second), LayerNorm3d(mask_in_chans // 4), nn.GELU(),
            nn.Conv3d(mask_in_chans // 4, mask_in_chans, first, first), LayerNorm3d(mask_in_chans), nn.GELU(),
            nn.Conv3d(mask_in_chans, embed_dim, 1),
        )  # fmt: skip

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        if pad:
            points, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
        return super()._embed_points(points, labels, pad=False)

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        corners = self.pe_layer.forward_with_coords(boxes.reshape(-1, 2, 3) + 0.5, self.input_image_size)
        return corners + torch.cat([self.point_embeddings[2].weight, self.point_embeddings[3].weight])


def volume_decoder(transformer_dim: int, up: tuple[int, ...], **given) -> MaskDecoder:
    """segment-anything's decoder, which scales its output up along (d, h, w) by ``up``, 1, 2 or 4 each."""
    decoder = MaskDecoder(transformer_dim=transformer_dim, **given)
    first, second = halves(up)
    decoder.output_upscaling = nn.Sequential(
        nn.ConvTranspose3d(transformer_dim, transformer_dim // 4, first, first), LayerNorm3d(transformer_dim // 4), nn.GELU(),
        nn.ConvTranspose3d(transformer_dim // 4, transformer_dim // 8, second, second), nn.GELU(),
    )  # fmt: skip
    return decoder


def halves(up: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Factors 1, 2 or 4 as two steps of 1 or 2."""
    return tuple(min(u, 2) for u in up), tuple(max(1, u // 2) for u in up)
