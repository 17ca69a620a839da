"""Parts that several recipes build: language models, text towers and vision towers, small from random numbers or from published weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..language import IMAGE, SEG, load_tokenizer, train_tokenizer
from ..vlm import MedVLMConfig

HEAD = 32
"""Numbers a head of attention has in the small towers."""


def vocabulary(texts: Iterable[str], args: Mapping[str, Any]):
    """The tokenizer of ``args["lm"]``, or one trained on the texts at hand where the recipe names no published model."""
    return load_tokenizer(args["lm"]) if args.get("lm") else train_tokenizer(texts, args.get("words", 2048))


def language(tokenizer, lm: str | None, dim: int = 192, layers: int = 4) -> dict[str, Any]:
    """A causal language model: the published one named ``lm`` (folder or hub name), or a Llama of this width and depth."""
    if lm:
        return {"file": "language", "args": {"weights": lm, "vocab_size": len(tokenizer)}}
    return {"file": "language", "args": {
        "model_type": "llama", "hidden_size": dim, "intermediate_size": dim * 3, "num_hidden_layers": layers, "num_attention_heads": dim // HEAD,
        "num_key_value_heads": dim // HEAD, "max_position_embeddings": 1024, "vocab_size": len(tokenizer), "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    }}  # fmt: skip


def text(tokenizer, weights: str | None, dim: int = 192, layers: int = 4, length: int = 77) -> dict[str, Any]:
    """A text tower of CLIP's kind: published weights, or one of this width and depth for up to ``length`` tokens."""
    if weights:
        return {"file": "text", "args": {"weights": weights}}
    return {"file": "text", "args": {
        "model_type": "clip_text_model", "hidden_size": dim, "intermediate_size": dim * 3, "num_hidden_layers": layers, "num_attention_heads": dim // HEAD,
        "max_position_embeddings": length, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }}  # fmt: skip


def vision(size: int, weights: str | None, dim: int = 192, layers: int = 4, patch: int = 16) -> dict[str, Any]:
    """A plain vision transformer on pictures of ``size`` pixels: published weights (transformers), or one of this width and depth."""
    args: dict[str, Any] = {"library": "transformers", "size": [size, size]}
    if weights:
        return {"file": "image", "args": args | {"weights": weights}}
    return {"file": "image", "args": args | {"model": {
        "model_type": "vit", "hidden_size": dim, "intermediate_size": dim * 3, "num_hidden_layers": layers, "num_attention_heads": dim // HEAD,
        "image_size": size, "patch_size": patch,
    }}}  # fmt: skip


def config(tokenizer, parts: Mapping[str, Any], about: Mapping[str, Any]) -> MedVLMConfig:
    """The configuration of a model of these parts; about: "name", "routes", "reads" and what else :class:`MedVLMConfig` keeps."""
    token = tokenizer.convert_tokens_to_ids
    return MedVLMConfig(dict(parts), {"version": "0", **about}, image_token_id=token(IMAGE), seg_token_id=token(SEG))
