"""Any text tower of transformers, for contrastive models: it sees token ids, not pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import loading
from .base import Encoder, Features


class TextEncoder(Encoder):
    """(ids, attention) (B, T) -> Features with grid (T,).

    ``pooled`` is what the tower itself pools (CLIP: the state at the end of the text), and the first token's state of a
    tower with BERT's dense pooler, which is left out since many published weights lack it. ``spec`` is None. limit: tokens it takes at most, None if any.
    """

    spec, stride = None, 1

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower, self.dim = tower, tower.config.hidden_size
        self.limit = getattr(tower.config, "max_position_embeddings", None)

    def forward(self, ids: Tensor, attention: Tensor | None = None) -> Features:
        out = self.tower(input_ids=ids, attention_mask=torch.ones_like(ids) if attention is None else attention)
        states, pooled = out.last_hidden_state, getattr(out, "pooler_output", None)
        return Features(states, (ids.shape[1],), states[:, 0] if pooled is None else pooled)


def build(model_type: str | None = None, weights: str | None = None, **args) -> TextEncoder:
    """A text tower, from its configuration's own arguments with random weights, or from ``weights``.

    Args:
        model_type: "bert", "clip_text_model", "siglip_text_model", ...
        weights: a folder or hub id with safetensors, of the tower or of a two-tower model; without other arguments.
        args: of the tower's configuration: hidden_size, num_hidden_layers, vocab_size, ...

    Raises:
        ModelError: BAD_CHECKPOINT for weights that cannot be read or do not fit, and for arguments that would run code;
            BAD_RECIPE for a tower that transformers does not know.
    """
    named = {"model_type": model_type or "bert", **args} if weights is None or model_type or args else None
    encoder = TextEncoder(loading.transformers_tower(named, weights, "text_config", drop=("pooler",)))
    if weights is not None:
        encoder.arguments = loading.configuration(encoder.tower)
    return encoder
