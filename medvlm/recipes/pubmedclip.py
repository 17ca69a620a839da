"""PubMedCLIP: pictures and captions are brought together, then the picture tower is what questions are answered from.

At scale tiny the captions are made of what the data sets know of their images (``datasets/captions.py``), since ROCO is not at hand.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..datasets import instruct
from ..datasets.slices import sliced
from ..language import load_tokenizer, train_tokenizer
from ..sample import Sample
from ..vlm import MedVLMConfig
from . import towers
from .base import Recipe, Stage

KINDS = ("asked", "finding", "modality", "view", "organ", "plane", "abnormal", "count")
"""Of questions."""


def model(tokenizer, size: int = 128, backbone: str = "regnety_004", clip: str | None = None, dim: int = 192, layers: int = 4, embed: int = 128) -> MedVLMConfig:
    """size: side of the input in pixels; clip: a published CLIP of transformers, both of its towers; else ``backbone`` (timm) and a
    text tower learn from random numbers. dim, layers: of the language model; embed: of the space that pictures and captions share.
    """
    seen = towers.vision(size, clip) if clip else {"file": "image", "args": {"model": backbone, "size": [size, size]}}
    wide, read = widths(clip) if clip else (440, dim)
    return towers.config(
        tokenizer,
        {
            "encoders": {"picture": seen, "text": towers.text(tokenizer, clip, dim, 2)},
            "heads": {"contrast": {"file": "contrast", "args": {"dim": wide, "text_dim": read, "embed_dim": embed}}},
            "projectors": {"picture": {"file": "mlp", "args": {"dim": wide, "lm_dim": dim}}},
            "language": {"lm": towers.language(tokenizer, None, dim, layers)},
        },
        {"name": "pubmedclip", "routes": {"*": "picture"}, "reads": ["xray", "ct", "mr", "ct_or_mr", "fundus", "pathology"]},
    )


def widths(clip: str) -> tuple[int, int]:
    """Of the picture tower and of the text tower."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(clip, trust_remote_code=False)
    return config.vision_config.hidden_size, config.text_config.hidden_size


def samples(group: list[Sample], name: str, split: str) -> Iterator[Sample]:
    """Questions about a picture or the slices of a volume, and its caption: a written one of ROCO, else one made of facts.

    What is written of the chest X-rays of xray_covid is a clinical note, not about the one image, and never read.
    """
    captions = ("caption",) if name == "roco" else ("facts",)
    for one in sliced(group):
        yield from instruct.conversations(one, kinds=(*KINDS, *captions))


def tokenizer(texts, args):
    """CLIP's own, or one trained on the texts at hand."""
    return load_tokenizer(args["clip"]) if args.get("clip") else train_tokenizer(texts, 2048)


PICTURES = {"vqa_rad": 3.0, "xray_covid": 3.0, "path_bccd": 2.0, "path_dsb_nuclei": 1.0, "fundus_chase": 0.3, "vol_totalseg": 0.3, "vol_deeplesion": 0.3}
RECIPE = Recipe(
    name="pubmedclip",
    source="PubMedCLIP, Eslami et al. 2021, arXiv:2112.13906; github.com/sarahESL/PubMedCLIP",
    departs="answers are written by a language model that starts from random numbers, where the paper puts the encoder into MEVF and QCR, which choose "
            "among known answers; no denoising autoencoder beside it; both directions of the loss weigh 0.5, where the paper's code weighs 0.7 and 0.3; "
            "AdamW with a cosine for Adam and Adamax; no flips; the contrastive projections start from random numbers, at a higher rate; "
            "tiny: a convolutional encoder from random numbers, captions made of labels",
    model=model,
    samples=samples,
    tokenizer=tokenizer,
    stages=(
        Stage("pair", "clip", ("encoders.*", "heads.*"), PICTURES, lr=1e-3, steps=110, batch=64, turns=0, warmup=20),
        Stage("ask", "lm", {"encoders.picture.*": 0.1, "projectors.*": 1.0, "lm.*": 1.0}, {**PICTURES, "vqa_rad": 12.0}, lr=1e-3, steps=150, batch=16,
              turns=3, kinds={"asked": 4.0, "facts": 0.0}, warmup=20),
    ),
    tasks=("retrieve_facts", "zeroshot", "vqa"),
    scales={"paper": (
        'args.clip="openai/clip-vit-base-patch32"', "args.size=224", "args.embed=512", "args.dim=512",
        'stages.pair.data={"roco": 1.0}', "stages.pair.epochs=50", "stages.pair.lr=1e-5", 'stages.pair.train={"encoders.*": 1.0, "heads.*": 100.0}',
        "stages.pair.weight_decay=5e-4", 'stages.ask.data={"vqa_rad": 1.0}', "stages.ask.epochs=200",
    )},
)  # fmt: skip
"""Paper: ViT-B/32, 50 epochs of batches of 64 at 1e-5, weight decay 5e-4 (the repository's PubMedCLIP/configs/medclip_roco_all.yaml);
then 200 epochs of batches of 16 at 1e-3 (QCR_PubMedCLIP/configs/qcr_pubmedclipViT_ae_rad_16batchsize_...yaml)."""
