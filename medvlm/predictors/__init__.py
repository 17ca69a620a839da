"""Models behind one set of verbs: ``medvlm.load(name)``. A scheme before the first colon names the file that loads it."""

from __future__ import annotations

import importlib
from pathlib import Path

from ..errors import ModelError

BUNDLED = Path(__file__).parent.parent / "models"
DEFAULT = "medvlm-tiny"
SCHEMES = {"hf": "transformers", "openclip": "openclip", "sam": "sam", "openai": "openai", "file": "file", "blind": "blind"}
"""{prefix of a model's name: file of this folder}."""


def load(name: str | Path = DEFAULT, device: str | None = None, allow_upload: bool = False):
    """A model that can be asked; every kind has the verbs of :class:`base.Model`, or says which it cannot do.

    Args:
        name: "medvlm-tiny" (bundled); a folder written by ``medvlm train`` / ``save_pretrained``; or "hf:FOLDER|ORG/NAME"
            (any AutoModelForImageTextToText), "openclip:...", "sam:[medsam:]FILE.pth|FOLDER", "openai:URL", "file:predictions.jsonl",
            "blind:yes|random|prior" or "blind:MODEL" (baselines that see no image).
        device: "cpu", "cuda", "cuda:1", "mps"; the best one there is when None.
        allow_upload: images and questions may leave this machine; without it "openai:" models are refused.

    Raises:
        ModelError: NO_SUCH_PART when there is no such model; BAD_CHECKPOINT when its files are incomplete;
            UPLOAD_NOT_ALLOWED.
    """
    scheme, colon, rest = str(name).partition(":")
    if colon and scheme in SCHEMES:
        module = importlib.import_module(f".{SCHEMES[scheme]}", __name__)
        if scheme == "blind":
            return module.load(rest, device, allow_upload)
        return module.load(rest, allow_upload) if scheme == "openai" else module.load(rest, device)
    from . import native

    return native.load(find(name), device)


def find(name: str | Path) -> Path:
    """The folder of a model of our own: bundled, saved by ``save_pretrained``, or inside a training run's.

    Raises:
        ModelError: NO_SUCH_PART.
    """
    folder = BUNDLED / str(name) if (BUNDLED / str(name) / "config.json").is_file() else Path(name)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"  # a training run
    if not (folder / "config.json").is_file():
        there = ", ".join(sorted(p.parent.name for p in BUNDLED.glob("*/config.json")))
        raise ModelError(f"there is no model {str(name)!r}; bundled: {there or 'none'}", "NO_SUCH_PART", 
                         f"give a bundled name, a model's folder, or one of {', '.join(f'{s}:' for s in SCHEMES)}")  # fmt: skip
    return folder
