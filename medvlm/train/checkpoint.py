"""Training state on disk: written whole or not at all, so that a kill at any moment leaves the last good one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import ModelError
from . import distributed


def save(folder: Path, model, optimizer, state: dict, extra: dict | None = None, sharded: bool = False) -> None:
    """Write ``folder/last`` atomically: a new folder is filled, flushed and swapped in.

    extra: states of what else must go on as it was (a gradient scaler). sharded: each process writes what it holds of the
    parameters (torch.distributed.checkpoint); one process can read that too.
    """
    fresh, last, old = (folder / name for name in ("last.new", "last", "last.old"))
    chief = distributed.rank() == 0
    if chief:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    distributed.wait()
    try:
        if sharded:
            import torch.distributed.checkpoint as dcp
            from torch.distributed.checkpoint.state_dict import get_state_dict

            weights, moments = get_state_dict(model, optimizer)
            try:
                dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=fresh / "shards")
            except dcp.CheckpointException as error:  # which is no Exception
                raise RuntimeError("; ".join(str(e) for e, _ in error.failures.values())) from None
        elif chief:
            save_file({k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}, fresh / "model.safetensors")
            torch.save({"optimizer": optimizer.state_dict(), **(extra or {})}, fresh / "optimizer.pt")
        if chief:
            (fresh / "state.json").write_text(json.dumps(state))
            for path in fresh.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)  # a full disk: what was there before stays
        if isinstance(error, OSError):
            raise
        full = "os error 28" in str(error) or "No space left" in str(error) or shutil.disk_usage(folder).free < 1 << 26  # neither library says it as an OSError
        raise OSError(errno.ENOSPC if full else errno.EIO, f"the state could not be written: {error}") from error
    distributed.wait()
    if chief:
        if last.exists():  # else a crash between the two renames left the only good state in old
            shutil.rmtree(old, ignore_errors=True)
            last.rename(old)
        fresh.rename(last)
        shutil.rmtree(old, ignore_errors=True)
    distributed.wait()


def newest(folder: Path) -> Path | None:
    """The last complete state in a folder, None when there is none."""
    for name in ("last", "last.old"):
        if (folder / name / "state.json").is_file():
            return folder / name
    return None


def read_state(path: Path) -> dict:
    return json.loads((path / "state.json").read_text())


def restore(path: Path, model) -> None:
    """Load the weights: all of them, or BAD_CHECKPOINT. A model split over processes takes its part."""
    if (path / "shards").is_dir():
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

        held = {"model": get_model_state_dict(model)}
        try:
            dcp.load(held, checkpoint_id=path / "shards")
        except dcp.api.CheckpointException as error:
            raise ModelError("the checkpoint's weights are not this model's", "BAD_CHECKPOINT", "was the recipe changed?") from error
        set_model_state_dict(model, held["model"])
        return
    try:
        missing, unexpected = model.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    except RuntimeError as error:
        raise ModelError("the checkpoint's weights have other shapes than the model's", "BAD_CHECKPOINT", "was the recipe changed?") from error
    if missing or unexpected:
        raise ModelError(f"the checkpoint lacks {missing[:3]} and has unknown {unexpected[:3]}", "BAD_CHECKPOINT", "was the recipe changed?")


def restore_optimizer(path: Path, model, optimizer) -> dict:
    """Load the optimiser's state of a stage that was stopped in the middle; gives what else was saved beside it."""
    if (path / "shards").is_dir():
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        weights, moments = get_state_dict(model, optimizer)
        held = {"optimizer": moments}
        dcp.load(held, checkpoint_id=path / "shards")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=held["optimizer"])
        return {}
    found = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(found.pop("optimizer"))
    return found
