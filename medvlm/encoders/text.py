"""Any text tower of transformers, for contrastive models: it sees token ids, not pictures."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..language import caption
from . import loading
from .base import Encoder, Features


class TextEncoder(Encoder):
    """(ids, attention) (B, T) -> Features with grid (T,).

    ``pooled`` is what the tower itself pools (CLIP: the state at the end of the text), and the first token's state of a
    tower with BERT's dense pooler, which is left out since many published weights lack it. ``spec`` is None. limit: tokens it takes at most, None if any.

    SigLIP's tower pools its last place and was trained on texts padded to its full length, without a mask (arXiv:2303.15343;
    transformers' SiglipTextModel): it is given them so, whatever stands beside a text in its batch, and T is then ``limit``.

    words: bytes of the tower's own tokenizer, kept with its weights; 0 where texts come in the words of the whole model.
    """

    spec, stride = None, 1

    def __init__(self, tower: nn.Module, words: int = 0):
        super().__init__()
        self.tower, self.dim = tower, tower.config.hidden_size
        self.limit = getattr(tower.config, "max_position_embeddings", None)
        self.full = tower.config.model_type == "siglip_text_model"
        self.words: Tensor | None
        self.register_buffer("words", torch.zeros(words, dtype=torch.uint8) if words else None)

    def forward(self, ids: Tensor, attention: Tensor | None = None) -> Features:
        attention = torch.ones_like(ids) if attention is None else attention
        if self.full:
            pad = self.tower.config.pad_token_id or 0
            out = self.tower(input_ids=F.pad(ids.masked_fill(attention == 0, pad), (0, self.limit - ids.shape[1]), value=pad))
        else:
            out = self.tower(input_ids=ids, attention_mask=attention)
        states, pooled = out.last_hidden_state, getattr(out, "pooler_output", None)
        return Features(states, (states.shape[1],), states[:, 0] if pooled is None else pooled)

    def ids(self, tokenizer, text: str) -> list[int]:
        """A text as this tower reads it, cut to its ``limit``: by its own tokenizer, or by the whole model's where it has none."""
        return caption(self.tokenizer or tokenizer, text, self.limit)

    @functools.cached_property
    def tokenizer(self):
        """Its own, None where it has none."""
        if self.words is None:
            return None
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        held = json.loads(bytes(self.words.cpu().numpy()))
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(held["tokenizer"]), eos_token=held["eos"], sep_token=held["sep"])


def build(model_type: str | None = None, weights: str | None = None, words: int = 0, **args) -> TextEncoder:
    """A text tower, from its configuration's own arguments with random weights, or from ``weights``.

    Args:
        model_type: "bert", "clip_text_model", "siglip_text_model", ...
        weights: a folder or hub id with safetensors, of the tower or of a two-tower model; without other arguments. Its
            tokenizer.json comes with it; only a folder may lack one.
        words: bytes of the tokenizer that a saved model holds.
        args: of the tower's configuration: hidden_size, num_hidden_layers, vocab_size, ...

    Raises:
        ModelError: BAD_CHECKPOINT for weights that cannot be read or do not fit, and for arguments that would run code;
            BAD_RECIPE for a tower that transformers does not know.
    """
    named = {"model_type": model_type or "bert", **args} if weights is None or model_type or args else None
    own = b"" if weights is None else _words(weights)
    encoder = TextEncoder(loading.transformers_tower(named, weights, "text_config", drop=("pooler",)), len(own) or words)
    if own:
        encoder.words.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
    if weights is not None:
        encoder.arguments = loading.configuration(encoder.tower) | ({"words": len(own)} if own else {})
    return encoder


def _words(weights: str) -> bytes:
    """The tokenizer of published weights, as :attr:`TextEncoder.words` holds it."""
    from transformers import PreTrainedTokenizerFast

    if loading.where(weights) == "folder" and not (Path(weights) / "tokenizer.json").is_file():
        return b""
    with loading.reading(weights, "its tokenizer.json could not be read"):
        own = PreTrainedTokenizerFast.from_pretrained(weights)
    return json.dumps({"tokenizer": own.backend_tokenizer.to_str(), "eos": own.eos_token, "sep": own.sep_token}).encode()
