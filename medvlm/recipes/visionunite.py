"""VisionUnite: fundus pictures aligned with captions, then dialogues of three turns together with a classification of signs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..datasets import instruct
from ..imaging.scan import Volume
from ..sample import Sample, Turn
from ..vlm import MedVLMConfig
from . import towers
from .base import Recipe, Stage

SHAPES = ("disc", "square", "ring", "bar", "cross")
"""Findings of the made pictures (medvlm/datasets/shapes.py), which stand for signs at scale "tiny"."""
SIGNS = '["vascular", "macular", "fundus boundary color", "optic cup disc", "hemorrhages exudation", "other"]'
"""The paper's six levels of signs."""
EYES = """{"eva": {"args": {"library": "timm", "model": "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", "weights": "pretrained", "size": [448, 448]}, "dim": 768},
          "clip": {"args": {"library": "open_clip", "model": "ViT-L-14-quickgelu", "weights": "openai", "size": [224, 224]}, "dim": 1024}}"""
"""The paper's towers, EVA-02 of 448 pixels and CLIP of 224 (llama_adapter.py)."""
TUNED = '{"*": 1.0, "lm.*": 0.0, "lm.*norm*": 1.0, "lm.*embed_tokens*": 1.0, "lm.*lm_head*": 1.0}'
"""All but LLaMA's own layers, which get adapters of rank 16 (llama.py); the words are learnt because LLaMA has no marks of turns."""
SMALL = {"args": {"model": {"name": "resnet18", "layers": [1, 1, 1, 1], "channels": [32, 48, 96, 192], "output_stride": 16}, "size": [96, 96]}, "dim": 192}
CAPTIONS = ("caption", "report", "facts")
ASKED = ("asked", "finding", "modality", "abnormal")
TURNS = 3
"""Questions of a dialogue: 889,137 dialogues of 296,379 pictures, and three of a picture in the paper's code (main_pretrain.py)."""


def model(tokenizer, eyes: Mapping[str, Mapping] | None = None, tokens: int = 6, signs: Sequence[str] = SHAPES, lm: str | None = None, dim: int = 128,
          layers: int = 2, words: int = 1024) -> MedVLMConfig:  # fmt: skip
    """The configuration.

    Args:
        eyes: {name: {"args": of encoders/image.py, "dim": of its tokens}}, all of which see each picture; the first one's tokens
            tell the signs. One small net where not given.
        tokens: side of the grid that each one's tokens are averaged to. signs: findings to be classified.
        lm: a published language model, of width ``dim``; else one of this width and depth, with a vocabulary of ``words``.
    """
    eyes = eyes or {"picture": SMALL}
    look = {"lm_dim": dim, "grid": [tokens, tokens]}
    return towers.config(tokenizer, {
        "encoders": {n: {"file": "image", "args": e["args"]} for n, e in eyes.items()},
        "projectors": {n: {"file": "pool", "args": {"dim": e["dim"], **look}} for n, e in eyes.items()},
        "heads": {"classify": {"file": "classify", "args": {"dim": next(iter(eyes.values()))["dim"], "labels": list(signs)}}},
        "language": {"lm": towers.language(tokenizer, lm, dim, layers)},
    }, {"name": "visionunite", "routes": {"*": list(eyes)}, "reads": ["fundus"]})  # fmt: skip


def samples(group: list[Sample], name: str, split: str) -> Iterator[Sample]:
    """Of a picture what is written, or else captions made of what is known; and dialogues of what is asked, or else can be. No volumes."""
    if any(isinstance(i, Volume) for i in group[0].images.values()):
        return
    kinds: dict[str, list[Sample]] = {}
    for s in instruct.conversations(group, kinds=(*CAPTIONS, *ASKED)):
        kinds.setdefault(s.meta["kind"], []).append(s)
    written, asked = kinds.get("caption", []) + kinds.get("report", []), kinds.get("asked") or [s for k in ASKED for s in kinds.get(k, ())]
    if asked and (eye := (group[0].meta.get("labels") or {}).get("eye")):
        asked.append(replace(asked[0], id=f"{asked[0].meta['row']}#eye", group=None, turns=(Turn("user", "Is this the left or the right eye?"), Turn("assistant", eye))))
    yield from written or kinds.get("facts", ())
    yield from instruct.dialogues(asked, TURNS)


RECIPE = Recipe(
    name="visionunite",
    source="VisionUnite, Li et al. 2024, arXiv:2408.02865; its code HUANGLIZI/VisionUnite (llama_adapter.py, main_pretrain.py, train.sh)",
    departs="pictures are tokens before the words, averaged to a grid and of one tower after the other, where the code adds one vector, the sum of both towers' "
            "pooled features, in every layer; the language model is not shown the signs that were classified; no contrastive loss between pictures and "
            "keywords; no contrast enhancement. Scale paper: the figures are those of the code's train.sh (5e-4 x 32 / 256, 30 epochs, one of warm-up), which "
            "tunes; none were found for the alignment, which takes the same for one epoch. Scale tiny: random weights, shapes for signs",
    model=model,
    samples=samples,
    tokenizer=towers.vocabulary,
    stages=(
        Stage("align", "lm", {"*": 1.0}, {"fundus_shapes": 1.0, "fundus_chase": 0.02}, lr=2e-3, steps=300, batch=32, turns=1,
              kinds=dict.fromkeys(CAPTIONS, 1.0) | {"dialogue": 0.0}, augment=0.3, warmup=25),
        Stage("tune", "lm+classify", {"*": 1.0}, {"fundus_shapes": 1.0, "fundus_chase": 0.02}, lr=2e-3, steps=900, batch=32, turns=1,
              kinds=dict.fromkeys(CAPTIONS, 0.0) | {"dialogue": 1.0}, augment=0.3, warmup=25),
    ),
    tasks=("vqa", "dialogue", "zeroshot"),
    scales={"paper": (
        f"args.eyes={EYES}", f"args.signs={SIGNS}", "args.tokens=16", "args.lm=huggyllama/llama-7b", "args.dim=4096",
        *(f"stages.{stage}.{setting}" for stage in ("align", "tune") for setting in (
            'data={"mmfundus": 1}', "lr=6.25e-5", "batch=32", "warmup=9262", "weight_decay=0.02", f"train={TUNED}", 'lora={"lm.*_proj": 16}')),
        "stages.align.epochs=1", "stages.tune.epochs=30",
    )},
)  # fmt: skip
