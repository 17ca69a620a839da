"""MedGemma: a SigLIP encoder tuned on medical pictures and captions, then a language model that reads its pooled tokens."""

from __future__ import annotations

from collections.abc import Iterator

from ..datasets import instruct, slices
from ..sample import Sample
from ..vlm import MedVLMConfig
from . import towers
from .base import Recipe, Stage

WINDOWS = ((-100.0, 2250.0), (40.0, 350.0), (40.0, 80.0))
"""(level, width) in HU of the three colours of a CT slice: bone and lung, soft tissue, brain (the report, section 2.1.2)."""
KINDS = ("facts", "asked", "finding", "modality", "view", "plane", "organ", "abnormal", "count", "locate")
CAPTIONED = {k: float(k == "facts") for k in KINDS}
ASKED = {"facts": 0.5, "asked": 4.0, "finding": 2.0, "organ": 0.5, "locate": 0.5, "count": 0.3}
PICTURES = {"xray_covid": 4.0, "vqa_rad": 4.0, "fundus_chase": 0.5, "path_bccd": 1.5, "path_dsb_nuclei": 0.7, "vol_deeplesion": 0.4, "vol_totalseg": 0.7}


def model(tokenizer, size: int = 128, dim: int = 192, text_dim: int = 192, lm_dim: int = 192, grid: int = 4, embed: int = 128,
          encoder: str | None = None, text: str | None = None, lm: str | None = None) -> MedVLMConfig:  # fmt: skip
    """size: side of the input in pixels; grid: side of the square of tokens that the language model reads; embed: of the space
    that pictures and captions share; encoder, text, lm: published weights, whose widths are then ``dim``, ``text_dim``, ``lm_dim``.
    """
    seen = towers.vision(size, encoder, dim)
    seen["args"] |= {"windows": [list(w) for w in WINDOWS]}
    return towers.config(
        tokenizer,
        {
            "encoders": {"picture": seen, "text": towers.text(tokenizer, text, text_dim, 2)},
            "projectors": {"picture": {"file": "pool", "args": {"dim": dim, "lm_dim": lm_dim, "grid": [grid, grid], "layers": 1}}},
            "heads": {"contrast": {"file": "contrast", "args": {"dim": dim, "text_dim": text_dim, "embed_dim": embed, "kind": "siglip"}}},
            "language": {"lm": towers.language(tokenizer, lm, lm_dim)},
        },
        {"name": "medgemma", "routes": {"*": "picture"}, "reads": ["xray", "ct", "mr", "fundus", "pathology", "ct_or_mr"]},
    )


def samples(group: list[Sample], name: str, split: str) -> Iterator[Sample]:
    """Captions made of what is known of a picture, and questions about it; of a volume, about its slices."""
    for one in slices.sliced(group):
        for image in list(one[0].images.values())[:1]:
            yield from instruct.conversations(one, kinds=KINDS, annotated=instruct.ANNOTATED if image.modality == "xray" else ())


RECIPE = Recipe(
    name="medgemma",
    source="MedGemma Technical Report, Google 2025, arXiv:2507.05201; projector of Gemma 3, arXiv:2503.19786",
    departs="captions made of what data sets know, and no general pictures or texts mixed in (98 % of the encoder's data there, 90 % of the decoder's); "
            "SigLIP's pooling head and projections are left out, so that the shared space is learnt anew on mean tokens; the projector starts from "
            "random numbers, and image tokens do not attend to those behind them; supervised tuning in the place of distillation and "
            "reinforcement learning, at paper scale by LoRA on the language model as in the authors' notebook (scale 1 there, 2 here; vision tower, "
            "embeddings and output layer stay); tiny: everything starts from random numbers and all of the language model learns",
    model=model,
    samples=samples,
    tokenizer=towers.vocabulary,
    stages=(
        Stage("encoder", "siglip", ("encoders.*", "heads.contrast.*"), PICTURES, lr=1e-3, steps=150, batch=64, turns=0, warmup=20),
        Stage("align", "lm", ("projectors.*", "lm.*"), PICTURES, lr=1e-3, steps=40, batch=16, turns=2, warmup=10, kinds=CAPTIONED),
        Stage("tune", "lm", ("projectors.*", "lm.*"), PICTURES, lr=1e-3, steps=160, batch=16, turns=4, warmup=10, kinds=ASKED),
    ),
    tasks=("vqa", "probe", "zeroshot", "retrieve_facts"),
    scales={
        # resolution, tokens an image, five epochs of the decoder: the report; other figures: the authors' notebooks that tune MedSigLIP and
        # MedGemma (Google-Health/medsiglip and Google-Health/medgemma, notebooks/fine_tune_with_hugging_face.ipynb); align's lr and batch: ours
        "paper": (
            "args.encoder=google/siglip-so400m-patch14-384", "args.text=google/siglip-so400m-patch14-384", "args.lm=google/gemma-3-4b-pt",
            "args.size=896", "args.grid=16", "args.dim=1152", "args.text_dim=1152", "args.lm_dim=2560", "args.embed=1152",
            "stages.encoder.lr=1e-4", "stages.encoder.epochs=2", "stages.encoder.batch=64", "stages.encoder.chunk=8", "stages.encoder.warmup=5",
            "stages.encoder.weight_decay=0.01",
            "stages.align.lr=1e-5", "stages.align.epochs=5", "stages.align.batch=128", "stages.align.chunk=4",
            "stages.tune.lr=2e-4", "stages.tune.epochs=1", "stages.tune.batch=16", "stages.tune.chunk=4",
            'stages.tune.train=["projectors.*"]', 'stages.tune.lora={"lm.model.layers.*": 16}',
        ),
    },
)  # fmt: skip
