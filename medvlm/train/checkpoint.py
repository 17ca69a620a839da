"""Training state on disk: written whole or not at all, so that a kill at any moment leaves the last good one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..errors import ModelError


def save(folder: Path, model, optimizer, state: dict) -> None:
    """Write ``folder/last`` atomically: a new folder is filled, flushed and swapped in."""
    fresh, last, old = (folder / name for name in ("last.new", "last", "last.old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tensors = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(tensors, fresh / "model.safetensors")
    torch.save(optimizer.state_dict(), fresh / "optimizer.pt")
    (fresh / "state.json").write_text(json.dumps(state))
    for path in fresh.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if last.exists():  # else a crash between the two renames left the only good state in old
        shutil.rmtree(old, ignore_errors=True)
        last.rename(old)
    fresh.rename(last)
    shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The last complete state in a folder, None when there is none."""
    for name in ("last", "last.old"):
        if (folder / name / "state.json").is_file():
            return folder / name
    return None


def read_state(path: Path) -> dict:
    return json.loads((path / "state.json").read_text())


def restore(path: Path, model) -> None:
    """Load the weights: all of them, or BAD_CHECKPOINT."""
    try:
        missing, unexpected = model.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    except RuntimeError as error:
        raise ModelError("the checkpoint's weights have other shapes than the model's", "BAD_CHECKPOINT", "was the recipe changed?") from error
    if missing or unexpected:
        raise ModelError(f"the checkpoint lacks {missing[:3]} and has unknown {unexpected[:3]}", "BAD_CHECKPOINT", "was the recipe changed?")


def restore_optimizer(path: Path, optimizer) -> None:
    """Load the optimiser's state of a stage that was stopped in the middle."""
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True))
