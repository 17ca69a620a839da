"""Models behind one set of verbs: ``medvlm.load(name)``."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError

BUNDLED = Path(__file__).parent.parent / "models"
DEFAULT = "medvlm-tiny"


def load(name: str | Path = DEFAULT, device: str | None = None):
    """A model that can be asked.

    Args:
        name: "medvlm-tiny" (bundled) or a folder written by ``medvlm train`` / ``save_pretrained``.
        device: "cpu", "cuda", "cuda:1", "mps"; the best one there is when None.

    Raises:
        ModelError: NO_SUCH_PART when there is no such model; BAD_CHECKPOINT when its files are incomplete.
    """
    from . import native

    folder = BUNDLED / str(name) if (BUNDLED / str(name) / "config.json").is_file() else Path(name)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"  # a training run
    if not (folder / "config.json").is_file():
        there = ", ".join(sorted(p.parent.name for p in BUNDLED.glob("*/config.json")))
        raise ModelError(f"there is no model {str(name)!r}; bundled: {there or 'none'}", "NO_SUCH_PART", "give a bundled name or a model's folder")
    return native.load(folder, device)
