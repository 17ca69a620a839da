"""Med-2E3: a volume seen by a 3-D and a 2-D encoder; the question decides which slices the language model gets.

The volume's own tokens, pooled, and one slice's worth of 2-D tokens, summed over slices by text-guided scores, stand before the question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..datasets import instruct
from ..imaging.scan import Volume
from ..sample import Sample
from ..vlm import MedVLMConfig
from . import towers
from .base import Recipe, Stage

KINDS = ("asked", "finding", "report", "caption")
MODALITIES = ("ct", "mr")
VOLUME = {"size": (24, 64, 64), "windows": (), "unit": "display", "net": "resnet", "model": {
    "layers": (1, 1, 1, 1), "block_inplanes": (16, 32, 64, 128), "conv1_t_size": (3, 7, 7), "conv1_t_stride": (1, 4, 4), "no_max_pool": True}}  # fmt: skip
SLICES = {"size": (12, 64, 64), "unit": "display", "chunk": 96, "encoder": {"model": {
    "name": "resnet18", "layers": (1, 1, 1, 1), "channels": (16, 32, 64, 128), "stem_type": "deep", "stem_width": 8}}}  # fmt: skip
"""Arguments of encoders/volume.py and encoders/slices.py: nets small enough to learn from nothing, for slices of 64 pixels."""


def model(tokenizer, volume: Mapping = VOLUME, slices: Mapping = SLICES, seen: tuple[int, int] = (128, 128), pool: tuple[int, int, int] = (1, 1, 1),
          guided: bool = True, lm: str | None = None, dim: int = 128, layers: int = 3) -> MedVLMConfig:  # fmt: skip
    """The configuration.

    Args:
        volume, slices: arguments of encoders/volume.py and encoders/slices.py. seen: width of their tokens.
        pool: 3-D tokens averaged along each axis. guided: whether the question weighs the slices; all weigh the same when not.
        lm: a published language model, of width ``dim``; else one of this width and depth.
    """
    return towers.config(tokenizer, {
        "encoders": {"volume": {"file": "volume", "args": dict(volume)}, "slices": {"file": "slices", "args": dict(slices)}},
        "projectors": {
            "volume": {"file": "pool", "args": {"dim": seen[0], "lm_dim": dim, "factor": tuple(pool)}},
            "slices": {"file": "interslice", "args": {"dim": seen[1], "lm_dim": dim, "guided": guided}},
        },
        "language": {"lm": towers.language(tokenizer, lm, dim, layers)},
    }, {"name": "med-2e3", "routes": {m: ["volume", "slices"] for m in MODALITIES}, "reads": list(MODALITIES)})  # fmt: skip


def samples(group: list[Sample], name: str, split: str) -> Iterator[Sample]:
    """What is asked of a volume and written about it; pictures are left out."""
    if group and group[0].images and all(isinstance(i, Volume) and i.modality in MODALITIES for i in group[0].images.values()):
        yield from instruct.conversations(group, kinds=KINDS)


RECIPE = Recipe(
    name="med_2e3",
    source="Med-2E3, Shi et al. 2024, arXiv:2411.12783; the paper's scale: scripts/train/pretrain.sh and finetune.sh of MSIIP/Med-2E3",
    departs="tokens join as there, those of the volume and then one slice's worth of 2-D ones; but a slice is scored by its own 2-D tokens alone, without the "
    "3-D slab around it, against the mean embedding of the question's words, without the 3-D encoder's text tower (more: projectors/interslice.py); "
    "projectors begin with a LayerNorm, 3-D tokens are read after the final norm; volumes keep their proportions and are neither cropped nor flipped; "
    "at scale tiny nothing is published: both stages train every part, and the two encoders see 24 and 12 slices",
    model=model,
    samples=samples,
    tokenizer=towers.vocabulary,
    stages=(
        Stage("align", "lm", {"*": 1.0}, {"volumes": 1.0}, lr=1e-3, steps=450, batch=8, turns=2, kinds={"asked": 0.0, "finding": 0.0}, augment=0.0,
              warmup=20),
        Stage("tune", "lm", {"*": 1.0}, {"volumes": 1.0}, lr=1e-3, steps=350, batch=8, turns=5,
              kinds={"asked": 4.0, "finding": 2.0, "report": 4.0, "caption": 1.0}, augment=0.0, warmup=20),
    ),
    tasks=("vqa", "probe", "report"),
    scales={"paper": (
        'args.volume={"net": "vit", "size": [32, 256, 256], "windows": [], "unit": "display", "weights": "M3D-CLIP/pretrained_ViT.bin", '
        '"model": {"patch": [4, 16, 16], "proj_type": "perceptron", "classification": true}}',
        'args.slices={"encoder": {"library": "transformers"}, "size": [32, 256, 256], "chunk": 32, "weights": "google/siglip-large-patch16-256"}',
        "args.seen=[768, 1024]", "args.pool=[2, 2, 2]", "args.lm=microsoft/Phi-3-mini-128k-instruct", "args.dim=3072",
        'stages.align.train={"projectors.*": 1}', "stages.align.epochs=3", "stages.align.batch=64", "stages.align.lr=1e-4", "stages.align.chunk=8",
        'stages.tune.train={"*": 1, "encoders.volume.*": 0}', "stages.tune.epochs=4", "stages.tune.batch=128", "stages.tune.lr=5e-5", "stages.tune.turns=1",
        "stages.tune.chunk=8", "stages.align.weight_decay=0", "stages.tune.weight_decay=0", "stages.align.augment=1", "stages.tune.augment=1",
        "stages.align.turns=1", 'stages.tune.kinds={}',
    )},
)  # fmt: skip
