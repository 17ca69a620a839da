"""A model small enough for a test: 64 px, a two-layer language model, random weights, a tokenizer made here."""

import numpy as np
import torch

from medvlm.imaging.scan import Image
from medvlm.language import IMAGE, SEG, train_tokenizer
from medvlm.vlm import MedVLM, MedVLMConfig

TARGETS = ("right lung", "left lung", "heart and mediastinum", "consolidation")
FINDINGS = ("consolidation", "cardiomegaly", "pneumonia")
KINDS = ("modality:xray", "modality:ct")
SIZE = 64

TEXTS = (
    "Is there consolidation in this chest X-ray?", "Segment the right lung.", "Segment the left lung.", "yes", "no",
    "Describe: consolidation, present, right", "Consolidation on the right.", "No cardiomegaly.", "Is this a PA or AP film?",
)  # fmt: skip


def tokenizer():
    return train_tokenizer([*TEXTS * 3, *("yes", "no") * 50], vocab_size=320)


def config(tokenizer, **about) -> MedVLMConfig:
    dims, strides, lm = [24, 32, 64, 128, 256], [2, 4, 8, 16, 32], 32
    return MedVLMConfig(
        parts={
            "encoders": {"picture": {"file": "image", "args": {"model": "test_byobnet", "size": [SIZE, SIZE]}}},
            "projectors": {"picture": {"file": "mlp", "args": {"dim": dims[-1], "lm_dim": lm}}},
            "heads": {
                "mask": {"file": "mask", "args": {"level_dims": dims, "level_strides": strides, "lm_dim": lm, "size": [SIZE, SIZE], "dim": 32, "heads": 4, "labels": list(TARGETS)}},
                "classify": {"file": "classify", "args": {"dim": dims[-1], "labels": [*FINDINGS, *KINDS], "groups": [list(KINDS)]}},
            },
            "language": {"lm": {"file": "language", "args": {
                "model_type": "llama", "hidden_size": lm, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": len(tokenizer), "tie_word_embeddings": True,
                "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
            }}},
        },
        about={"name": "tiny-test", "version": "0", "routes": {"*": "picture"}, "reads": ["xray"], "targets": list(TARGETS), "findings": list(FINDINGS)} | about,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE), seg_token_id=tokenizer.convert_tokens_to_ids(SEG),
    )  # fmt: skip


def model(tokenizer, seed: int = 0) -> MedVLM:
    torch.manual_seed(seed)
    made = MedVLM(config(tokenizer)).eval()
    with torch.no_grad():  # the kind-of-image head must not refuse what a test shows it
        made.heads["classify"].bias[list(FINDINGS).index("pneumonia") + 1] += 8
    return made


def picture(id: str = "xray-1", size: tuple[int, int] = (70, 90), modality: str = "xray", seed: int = 0, **info) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (1, *size), dtype=np.uint8)
    return Image(id, pixels, (0.5, 0.5), modality, "uint8", info)
