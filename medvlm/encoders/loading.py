"""Weights that other people published, read without running their code and without a silent gap."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from ..errors import ModelError

UNSAFE = ("auto_map", "attn_implementation", "quantization_config", "trust_remote_code")
"""Arguments of a transformers configuration that would fetch or run code."""


def where(weights: str) -> str:
    """ "folder", "file", or "hub" for what can only be a hub id, so that a mistyped path never asks the network.

    Raises:
        ModelError: BAD_CHECKPOINT for what is none of them.
    """
    if Path(weights).is_dir():
        return "folder"
    if Path(weights).is_file():
        return "file"
    if re.fullmatch(r"(hf-hub:)?[\w-][\w.-]*(/[\w-][\w.-]*)?", weights) and Path(weights).suffix not in (".pth", ".pt", ".bin", ".ckpt", ".safetensors"):
        return "hub"
    raise ModelError(f"there are no weights at {weights!r}", "BAD_CHECKPOINT", "give a file, a folder or a hub id")


@contextmanager
def reading(weights: str, hint: str = "give safetensors, or a file that torch loads with weights_only=True"):
    """Whatever a library says of unreadable weights, as one named error."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, UnpicklingError) as error:
        says = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(f"the weights {str(weights)!r} cannot be read: {says}", "BAD_CHECKPOINT", hint) from error


@contextmanager
def quiet():
    """transformers prints a table of names that :func:`compare` judges."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def compare(weights: str, missing: Iterable[str], extra: Iterable[str]) -> None:
    """Refuse weights that do not fit the net, and say which.

    Raises:
        ModelError: BAD_CHECKPOINT with the first missing and extra names.
    """
    missing, extra = sorted(missing), sorted(extra)
    if missing or extra:
        told = "; ".join(f"{len(names)} {kind}: {', '.join(names[:4])}" for kind, names in (("missing", missing), ("extra", extra)) if names)
        raise ModelError(f"the weights {str(weights)!r} are not this net's ({told})", "BAD_CHECKPOINT", "check the model's name and arguments")


def load_part(module: nn.Module, weights: str, prefix: str = "", others: tuple[str, ...] = ()) -> None:
    """Weights of a local file into a module that is the whole saved net, or the part of it under ``prefix``.

    others: patterns (fnmatch) of the names of the saved net's other parts, which are not read.
    """
    from timm.models import load_state_dict  # safetensors or weights_only, and takes checkpoints apart

    if where(weights) != "file":
        raise ModelError(f"{weights!r} is no file of weights", "BAD_CHECKPOINT", "give a local file")
    with reading(weights):
        state = load_state_dict(str(weights))
    if prefix and any(name.startswith(prefix) for name in state):
        state = {k.removeprefix(prefix) if k.startswith(prefix) else k: v for k, v in state.items()}
    state = {k: v for k, v in state.items() if k in module.state_dict() or not any(fnmatch(k, other) for other in others)}
    compare(weights, module.state_dict().keys() - state, state.keys() - module.state_dict())
    with reading(weights):
        module.load_state_dict(state)


def transformers_tower(args: Mapping | None, weights: str | None, part: str | None = None, drop: tuple[str, ...] = ()) -> nn.Module:
    """A tower of transformers, random from its configuration's own arguments, or from a folder or hub id.

    Args:
        args: flat, with "model_type"; not beside ``weights``, which bring their own.
        weights: a folder or hub id with safetensors; of a two-tower model only the tower ``part`` is read.
        part: name of the tower's configuration inside a two-tower one: "vision_config" or "text_config".
        drop: submodules that are left out, with their weights.

    Raises:
        ModelError: BAD_CHECKPOINT for arguments or files that would run code, and for missing or extra weights;
            BAD_RECIPE for a configuration that transformers does not know.
    """
    from transformers import AutoConfig

    if weights is None:
        args = dict(args or {})
        if unsafe := sorted(k for k in args if k.startswith("_") or k in UNSAFE):
            raise ModelError(f"the arguments of a tower may not hold {', '.join(unsafe)}", "BAD_CHECKPOINT")
        try:
            config = AutoConfig.for_model(args.pop("model_type", None), **args)
            tower = _class(config)._from_config(config)
        except (ValueError, KeyError) as error:
            raise ModelError(f"transformers cannot build this tower: {str(error).splitlines()[0][:200]}", "BAD_RECIPE",
                             'give "model_type" and the arguments of its configuration') from error  # fmt: skip
    else:
        if args:
            raise ModelError(f"a tower read from {str(weights)!r} takes no other arguments", "BAD_RECIPE", "give the model or its weights, not both")
        where(weights)
        with reading(weights), quiet():
            whole = AutoConfig.from_pretrained(weights, trust_remote_code=False)
            config = getattr(whole, part, whole) if part else whole
            tower, info = _class(config).from_pretrained(
                weights, config=config, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True,
            )  # fmt: skip
        compare(
            weights,
            [k for k in info["missing_keys"] if not k.startswith(drop)] if drop else info["missing_keys"],
            [k for k in info["unexpected_keys"] if not _of_another_part(k, tower, whole)],
        )
        compare(weights, [str(key[0]) for key in info["mismatched_keys"]], [])
    for name in drop:
        if hasattr(tower, name):
            setattr(tower, name, None)
    return tower


def _class(config):
    """transformers' own class of a configuration; AutoModel does not know the halves of some two-tower models."""
    import transformers

    known = transformers.MODEL_MAPPING
    found = known[type(config)] if type(config) in known else getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
    if found is None:
        raise ValueError(f"there is no model of a {type(config).__name__}")
    return found


def _of_another_part(name: str, tower: nn.Module, config) -> bool:
    """Whether a saved weight that the tower lacks belongs to something else in the file: the other tower, or a head."""
    if (config.architectures or [None])[0] == type(tower).__name__:
        return False
    inside = name.removeprefix(f"{tower.base_model_prefix}.")
    return inside == name and name.split(".")[0] not in dict(tower.named_children())


def configuration(tower: nn.Module) -> dict:
    """The arguments that make a tower of this shape, as plain JSON."""
    kept = {k: v for k, v in tower.config.to_diff_dict().items()
            if not k.startswith("_") and k not in ("architectures", "transformers_version", "dtype", "torch_dtype", *UNSAFE)}  # fmt: skip
    return {**kept, "model_type": tower.config.model_type}

