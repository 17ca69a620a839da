"""UniBiomed: a language model and SAM's decoder learn as one, so that an answer outlines what it names.

"The picture shows the right lung <|seg|> and the left lung <|seg|>.": the state before each mark prompts the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import timm
import torch

from ..datasets import instruct
from ..imaging.scan import Image
from ..sample import Sample
from ..vlm import MedVLMConfig
from . import towers
from .base import Recipe, Stage

XRAY = ("right lung", "left lung", "heart and mediastinum", "airways", "ground-glass opacity", "consolidation")
TARGETS = {"xray": XRAY, "fundus": ("vessels",), "pathology": ("nuclei",)}
"""{modality: what is outlined in its pictures}."""
ELSEWHERE = {"xray": ("nuclei",), "fundus": (*XRAY, "nuclei"), "pathology": XRAY}
"""{modality: what no such picture shows}. Chests and tissue have vessels too."""
KINDS = {"segment": 2.0, "grounded": 2.0, "asked": 2.0, "finding": 1.0, "modality": 0.5}


def model(tokenizer, size: int = 128, backbone: str = "regnety_002", weights: str | None = None, mask: Mapping | None = None, named: bool = True,
          look: str | None = None, look_size: int = 448, look_weights: str | None = None, lm: str | None = None, dim: int = 128, layers: int = 3,
          words: int = 2048) -> MedVLMConfig:  # fmt: skip
    """The configuration.

    Args:
        size, backbone, weights: side of the input in pixels, a feature pyramid of timm and where its weights lie: what outlines are drawn on.
        mask: further arguments of heads/mask.py. named: whether it has a coarse map for each target; else only <|seg|> says what to draw.
        look, look_size, look_weights: a plain transformer of timm for the language model, which else sees the pyramid's last level.
        lm: a published language model, of width ``dim``; else one of this width and depth, with a vocabulary of ``words``.
    """
    with torch.device("meta"):
        info = timm.create_model(backbone, features_only=True).feature_info
        seen = timm.create_model(look).num_features if look else info.channels()[-1]
    projector = {"file": "shuffle" if look else "mlp", "args": {"dim": seen, "lm_dim": dim}}
    pyramid = {"file": "image", "args": {"model": backbone, "size": [size, size]} | ({"weights": weights} if weights else {})}
    encoders, targets = {"outlines" if look else "picture": pyramid}, [t for group in TARGETS.values() for t in group]
    if look:
        args = {"model": look, "size": [look_size, look_size]} | ({"weights": look_weights} if look_weights else {})
        encoders["picture"] = {"file": "image", "args": args}
    drawn = {"level_dims": info.channels(), "level_strides": info.reduction(), "lm_dim": dim, "size": [size, size], "labels": targets if named else []}
    return towers.config(tokenizer, {
        "encoders": encoders, "projectors": {"picture": projector}, "heads": {"mask": {"file": "mask", "args": drawn | (mask or {})}},
        "language": {"lm": towers.language(tokenizer, lm, dim, layers)},
    }, {"name": "unibiomed", "routes": {"*": list(encoders)}, "reads": list(TARGETS), "targets": targets, "grounded": True})  # fmt: skip


def samples(group: list[Sample], name: str, split: str) -> Iterator[Sample]:
    """What is asked and outlined of a picture, one by one and in a sentence, and what is absent; NAME/outlined: of those with outlines."""
    if "/" in name and (split != "train" or not any(s.masks for s in group)):
        return
    image = next(iter(group[0].images.values()), None)
    if isinstance(image, Image):
        absent = ELSEWHERE.get(image.modality, ())
        targets = (*TARGETS[image.modality], *absent) if image.modality in TARGETS else None
        annotated = instruct.ANNOTATED if image.modality == "xray" else ()
        yield from instruct.conversations(group, targets, None, tuple(TARGETS), kinds=KINDS, annotated=annotated, absent=absent)


RECIPE = Recipe(
    name="unibiomed",
    source="UniBiomed, Wu et al. 2025, arXiv:2504.21336; figures of its projects/unibiomed/configs/biomed.py (Luffy03/UniBiomed)",
    departs="tiny: one small encoder for words and outlines, random weights, a coarse map for each target, 8 labels of 3 modalities. Everywhere: SAM's "
            "first decoder, from random numbers, on SAM 2's encoder; prompts are the state that predicts <|seg|> and the words before it, not its own state; "
            "a target may be absent; points and boxes are learnt too; cross-entropy and Dice of all pixels 1 : 1, not 2 : 0.5 on chosen points. Paper: one "
            "picture, no tiles; Qwen2.5 and InternViT as they were before InternVL2.5 joined them, so its projector and its tuning are missing",
    model=model,
    samples=samples,
    tokenizer=towers.vocabulary,
    stages=(
        Stage("joint", "lm+mask", ("*",), {"xray_covid": 3.0, "xray_covid/outlined": 4.0, "fundus_chase": 1.0, "path_dsb_nuclei": 2.0}, lr=1e-3,
              steps=600, batch=8, turns=3, kinds=KINDS, warmup=20),
    ),
    tasks=("segment", "vqa"),
    scales={"paper": (  # InternVL2.5-1B's two parts; 8 GPUs of 4 cases, 4 times accumulated; both encoders frozen
        "args.size=1024", "args.backbone=sam2_hiera_large.fb_r1024", "args.weights=pretrained", "args.named=false", 'args.mask={"dim": 256, "stride": 16}',
        "args.look=vit_intern300m_patch14_448.ogvl_2pt5", "args.look_weights=pretrained", "args.lm=Qwen/Qwen2.5-0.5B-Instruct", "args.dim=896",
        'stages.joint.train={"projectors.*": 1, "heads.*": 1, "lm.*embed_tokens*": 1}', 'stages.joint.lora={"lm.*_proj": 128}',
        "stages.joint.epochs=10", "stages.joint.lr=4e-5", "stages.joint.batch=128", "stages.joint.chunk=4",
    )},
)  # fmt: skip
