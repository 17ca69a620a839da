"""Cardiac-CLIP: a 3-D transformer restores what is hidden of CT volumes, then learns reports; findings say how alike two cases are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..datasets import instruct, sentences
from ..imaging.scan import Volume
from ..sample import Sample, Turn
from ..vlm import MedVLMConfig
from . import towers
from .base import Recipe, Stage

MADE = ("consolidation", "ground-glass opacity", "pleural effusion", "pneumothorax", "cardiomegaly", "nodule", "mass")
"""Findings of the made chests (medvlm/datasets/phantom.py)."""
ATTRIBUTES = ("right", "left", "both", "upper", "middle", "lower")
"""Words of place that tell two cases with the same findings apart."""
CARDIAC = ('["calcified plaque", "stenosis", "aortic wall calcification", "atherosclerosis", "cardiomegaly", "pericardial effusion", '
           '"pulmonary hypertension"]')  # fmt: skip
"""Findings that the paper's code asks for (Sliver-g/Cardiac-CLIP, inference.py)."""


def model(tokenizer, size: Sequence[int] = (16, 64, 64), patch: int | Sequence[int] = 8, dim: int = 128, layers: int = 3, heads: int = 4,
          decoder: Sequence[int] = (96, 1, 3), text_dim: int = 128, embed: int = 96, lm: str | None = None, findings: Sequence[str] = (*MADE, *ATTRIBUTES),
          window: Sequence[float] = (-300, 1400)) -> MedVLMConfig:  # fmt: skip
    """size: (D, H, W) of the input; patch: voxels a token; dim, layers, heads: of the image tower; decoder: width, depth and heads
    of what restores; embed: of the space that volumes and texts share; lm: a published text tower, whose width is then
    ``text_dim``; findings: the vector that says how alike two cases are; window: (centre, width) in HU.
    """
    width, depth, attention = decoder
    volume = {"net": "vit", "size": list(size), "windows": [list(window)], "mean": [0.5], "std": [0.25],
              "model": {"patch": patch, "hidden_size": dim, "mlp_dim": 4 * dim, "num_layers": layers, "num_heads": heads}}  # fmt: skip
    restore = {"dim": dim, "stride": patch, "rank": 3, "mode": "mae", "standardise": True, "width": width, "depth": depth, "heads": attention}
    return towers.config(
        tokenizer,
        {
            "encoders": {"volume": {"file": "volume", "args": volume}, "text": towers.text(tokenizer, lm, text_dim, 2, 160)},
            "heads": {
                "restore": {"file": "restore", "args": restore},
                "contrast": {"file": "contrast", "args": {"dim": dim, "text_dim": text_dim, "embed_dim": embed}},
            },
        },
        {"name": "cardiac-clip", "routes": {"*": "volume"}, "reads": ["ct"], "labels": list(findings)},
    )


def samples(group: list[Sample], name: str, split: str) -> Iterator[Sample]:
    """A volume's findings as one templated text, and its report or caption as it is written; by itself where nothing is said of it.

    ``labels``, the vector of the case: its findings, and which of ``ATTRIBUTES`` its texts name.
    """
    if not any(isinstance(i, Volume) for i in group[0].images.values()):
        return
    said = list(instruct.conversations(group, kinds=("finding", "report", "caption")))
    first = said[0] if said else replace(group[0], turns=(), masks=(), regions=())
    written = [s for s in said if s.meta["kind"] in ("report", "caption")]
    words = set(re.findall(r"\w+", " ".join(s.answer.lower() for s in written)))
    known = {n: v for n, v in first.labels.items() if v in (0, 1) and ":" not in n}
    text = " ".join(sentences.variants(n, "present" if v else "absent")[1] for n, v in known.items())
    turns = (Turn("user", instruct.ASK["caption"][0]), Turn("assistant", text)) if text else ()
    labels = {**known, **({a: float(a in words) for a in ATTRIBUTES} if words else {})}
    yield replace(first, id=f"{first.id}#template", turns=turns, labels=labels, meta={**first.meta, "kind": "caption"})
    yield from (replace(s, labels=labels) for s in written)


RECIPE = Recipe(
    name="cardiac_clip",
    source="Cardiac-CLIP, Hu et al. 2025, arXiv:2507.22024; Sliver-g/Cardiac-CLIP, train.py",
    departs="volumes are seen through one window, not each from its least to its greatest value; tokens are averaged, where the authors read a class token "
            "(of a text, the token of the largest number); a text's targets are normalised too, and a text is learned as it is written beside its template; "
            "cosine decay, theirs is linear; their code gives one set of figures, used here for both stages. Scale tiny: no pretrained text tower; targets of temperature 0.1, since 1 "
            "leaves them all but even in a batch of 32",
    model=model,
    samples=samples,
    tokenizer=towers.vocabulary,
    stages=(
        Stage("restore", "restore", ("encoders.volume.*", "heads.restore.*"), {"volumes": 1.0}, lr=1.5e-3, steps=250, batch=32, augment=0.0, warmup=20, every=125),
        Stage("pair", "soft", ("encoders.*", "heads.contrast.*"), {"volumes": 1.0}, lr=1e-3, steps=400, batch=32, augment=0.0, warmup=20, every=100,
              options={"soft": {"temperature": 0.1}}),
    ),
    tasks=("zeroshot", "retrieve", "linear_probe"),
    scales={"paper": (
        "stages.pair.options.soft.temperature=1.0", "args.size=[128,144,144]", "args.patch=8", "args.dim=768", "args.layers=12", "args.heads=12", "args.decoder=[384,5,6]",
        "args.lm=microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext", "args.text_dim=768", "args.embed=768",
        "args.window=[0,2048]", f"args.findings={CARDIAC}",
        'stages.restore.train={"encoders.volume.*": 1.0, "heads.restore.*": 5.0}', 'stages.pair.train={"encoders.*": 1.0, "heads.contrast.*": 5.0}',
        *(f"stages.{stage}.{setting}" for stage in ("restore", "pair") for setting in (
            "epochs=10", "batch=16", "lr=1e-5", "warmup=1298", "weight_decay=0.01", "every=2597")),
    )},
)  # fmt: skip
