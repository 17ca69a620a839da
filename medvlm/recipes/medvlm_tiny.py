"""The bundled model: a small reader of chest X-rays, sized to train on two cores.

An encoder, a language model of four layers and SAM's decoder learn together from scratch: outlines, findings, answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import timm

from ..datasets import instruct
from ..datasets.slices import sliced
from ..imaging.scan import Image, Volume
from ..language import IMAGE, SEG, train_tokenizer
from ..sample import Sample, Turn
from ..vlm import MedVLMConfig
from .base import Recipe, Stage

TARGETS = ("right lung", "left lung", "heart and mediastinum", "airways", "ground-glass opacity", "consolidation",
           "pleural effusion", "pneumothorax", "endotracheal tube", "nasogastric tube", "central venous line")  # fmt: skip
FINDINGS = ("COVID-19 pneumonia", "bacterial pneumonia", "pneumonia", "ARDS", "ground-glass opacity", "consolidation",
            "pleural effusion", "pneumothorax", "cardiomegaly", "endotracheal tube", "nasogastric tube",
            "central venous line")  # fmt: skip
REPORTED = ("ground-glass opacity", "consolidation", "cardiomegaly", "endotracheal tube", "nasogastric tube",
            "COVID-19 pneumonia", "bacterial pneumonia", "pneumonia", "ARDS")  # fmt: skip
"""Findings with at least five images with and five without them in train: only these are put into a report."""
MODALITIES = ("xray", "ct", "mr", "fundus", "pathology")
VIEWS = ("PA", "AP")
SLICES_A_VOLUME = 6
KINDS = ("segment", "asked", "finding", "describe", "modality", "view")
"""Of conversations about chest X-rays."""


def model(tokenizer, size: int = 256, backbone: str = "regnety_004", dim: int = 192, layers: int = 4) -> MedVLMConfig:
    """The configuration; size: side of the input in pixels, dim and layers: of the language model."""
    info = timm.create_model(backbone, features_only=True, in_chans=1).feature_info
    dims, strides, square = info.channels(), info.reduction(), (size, size)
    kinds = [f"modality:{m}" for m in MODALITIES]
    views = [f"view:{v}" for v in VIEWS]
    token = tokenizer.convert_tokens_to_ids
    return MedVLMConfig(
        parts={
            "encoders": {"picture": {"file": "image", "args": {"model": backbone, "size": square}}},
            "projectors": {"picture": {"file": "mlp", "args": {"dim": dims[-1], "lm_dim": dim}}},
            "heads": {
                "mask": {"file": "mask", "args": {"level_dims": dims, "level_strides": strides, "lm_dim": dim, "size": square, "labels": list(TARGETS)}},
                "classify": {"file": "classify", "args": {"dim": dims[-1], "labels": [*FINDINGS, *kinds, *views], "groups": [kinds, views]}},
            },
            "language": {"lm": {"file": "language", "args": {
                "model_type": "llama", "hidden_size": dim, "intermediate_size": dim * 3, "num_hidden_layers": layers,
                "num_attention_heads": dim // 32, "num_key_value_heads": dim // 32, "max_position_embeddings": 1024,
                "vocab_size": len(tokenizer), "tie_word_embeddings": True, 
                "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
            }}},
        },
        about={
            "name": "medvlm-tiny", "version": "0.1.0", "routes": {"*": "picture"}, "reads": ["xray"],
            "targets": list(TARGETS), "findings": list(REPORTED),
        },
        image_token_id=token(IMAGE), seg_token_id=token(SEG),
    )  # fmt: skip


def samples(group: list[Sample], name: str, split: str) -> Iterator[Sample]:
    """Conversations about one image; the text of the IU reports is never read, only their structured labels.

    "NAME/outlined" is what of NAME has exact outlines, to be drawn more often than the rest while training.
    """
    name, _, outlined = name.partition("/")
    if outlined and (split != "train" or not any(s.masks for s in group)):
        return
    if name == "report_iu":
        yield from instruct.restructured(group)
        return
    image = next(iter(group[0].images.values()))
    if image.modality == "xray":
        for s in instruct.conversations(group, TARGETS, FINDINGS, ("xray",), kinds=KINDS, annotated=instruct.ANNOTATED, variety=0):
            yield replace(s, turns=(s.turns[0], Turn("assistant", s.answer.strip().lower()))) if s.meta["kind"] == "asked" else s
    elif image.modality in MODALITIES:  # of other pictures only the kind is learnt, and that no target is there
        for bare, *_ in sliced([_bare(group[0], image)], SLICES_A_VOLUME):
            yield from instruct.conversations([bare], TARGETS, (), ("xray",), kinds=("segment", "modality"), absent=TARGETS, variety=0)


def _bare(sample: Sample, image: Image | Volume) -> Sample:
    """A picture about which nothing is said, or a volume, of whose slices the model learns that it has not learnt to read them."""
    return Sample(str(sample.meta["row"]), sample.patient, {image.id: image}, meta={"row": sample.meta["row"], "split": sample.meta.get("split")})


def tokenizer(texts, args):
    """A vocabulary of the conversations at hand."""
    return train_tokenizer(texts, vocab_size=2048)


def calibrate(model, tokenizer, val: list[Sample]) -> dict:
    """Fit the three probabilities on val: findings, presence of an outline, yes/no answers. One scale and shift each.

    Gives, for each, the number of pairs and the mean log loss before and after.
    """
    import torch

    from ..evaluate.statistics import fit_platt
    from ..predictors.native import NativeModel, choices_of

    reader = NativeModel(model, tokenizer)
    head, mask = model.heads["classify"], model.heads["mask"]
    pairs: dict[str, list[tuple[float, float]]] = {"findings": [], "present": [], "yes_no": []}
    rows: dict[str, list[Sample]] = {}
    for sample in val:
        if sample.images:
            rows.setdefault(str(sample.meta["row"]), []).append(sample)
    for group in rows.values():
        (picture,) = group[0].images.values()
        if picture.modality not in reader.reads:  # never asked about, so no part of what is calibrated
            continue
        name, features, *_ = reader._look(picture)
        with torch.no_grad():
            logits = head(features[name])[0].tolist()
        pairs["findings"] += [(logits[head.labels.index(k)], v) for k, v in group[0].labels.items() if k in FINDINGS]
        drawn = [s for s in group if s.meta["kind"] == "segment"]
        for sample, found in zip(drawn, reader._outline(picture, [(s.masks or s.regions)[0].label for s in drawn]) if drawn else ()):
            truth = float(bool(sample.regions and not sample.masks) or sample.masks[0].array.any())
            pairs["present"].append((math.log(max(found.present, 1e-6) / max(1 - found.present, 1e-6)), truth))
        for sample in group:
            if sample.meta["kind"] == "asked" and sample.answer in ("yes", "no") and choices_of(sample.question) == ("yes", "no"):
                yes = reader.choose(picture, sample.question, ("yes", "no"))["yes"]
                pairs["yes_no"].append((math.log(max(yes, 1e-6) / max(1 - yes, 1e-6)), float(sample.answer == "yes")))
    report = {}
    for kind, found in pairs.items():
        z, y = (np.array(column) for column in zip(*found)) if found else (np.zeros(0), np.zeros(0))
        scale, shift = fit_platt(z, y)
        loss = [float((np.logaddexp(0, a) - a * y).mean()) if len(y) else None for a in (z, z * scale + shift)]
        report[kind] = {"pairs": len(y), "scale": scale, "shift": shift, "log_loss": loss}
    grouped = {n for g in head.groups for n in g}
    for i, label in enumerate(head.labels):
        if label not in grouped:
            head.scale[i], head.shift[i] = report["findings"]["scale"], report["findings"]["shift"]
    mask.scale.fill_(report["present"]["scale"])
    mask.shift.fill_(report["present"]["shift"])
    model.config.about = {**model.config.about, "calibration": {"yes_no": [report["yes_no"]["scale"], report["yes_no"]["shift"]]}}
    return report


EVERYTHING = ("encoders.*", "projectors.*", "heads.*", "lm.*")
PICTURES = {"xray_covid": 5.0, "xray_covid/outlined": 6.0, "vqa_rad": 4.0, "fundus_chase": 0.5, "path_bccd": 0.5, "path_dsb_nuclei": 0.5,
            "vol_deeplesion": 0.3, "vol_totalseg": 0.4}  # fmt: skip
RECIPE = Recipe(
    name="medvlm_tiny",
    source="this project; mask tokens after LISA (arXiv:2308.00692), decoder of Segment Anything (arXiv:2304.02643)",
    departs="no pretrained weights: every part starts from random numbers",
    model=model,
    samples=samples,
    tokenizer=tokenizer,
    stages=(
        Stage("see", "lm+mask+classify", EVERYTHING, PICTURES, lr=8e-4, steps=500, batch=12, turns=3,
              kinds={"segment": 4.0, "asked": 1.0, "finding": 1.0, "describe": 0.3, "modality": 0.5, "view": 0.5}, augment=1.0, warmup=50),
        Stage("speak", "lm+mask+classify", EVERYTHING, {**PICTURES, "report_iu": 6.0}, lr=5e-4, steps=200, batch=12, turns=4,
              kinds={"segment": 5.0, "asked": 2.0, "finding": 1.5, "describe": 1.0, "modality": 0.5, "view": 0.5, "text": 1.0},
              augment=0.7, warmup=25),
    ),
    tasks=("segment", "vqa", "probe"),
    finish=calibrate,
)  # fmt: skip
