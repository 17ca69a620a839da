"""Which parameters learn, how fast, and through which adapters."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatch

import torch
from torch import nn

from ..errors import ModelError

ADAPTER = "lora_"


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def check(model: nn.Module, stages: Iterable) -> None:
    """Whether what each stage names is there, before the first of them begins.

    Raises:
        ModelError: BAD_RECIPE when a pattern of ``train`` fits no parameter, or one of ``lora`` no linear layer.
    """
    names = {"parameter": [n for n, _ in model.named_parameters()], "linear layer": [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]}
    for stage in stages:
        for kind, patterns in (("parameter", stage.train), ("linear layer", stage.lora)):
            for pattern in patterns:
                if not any(fnmatch(n, pattern) for n in names[kind]):
                    raise ModelError(f"stage {stage.name}: no {kind} is called {pattern}", "BAD_RECIPE", f"there is, for one, {(*names[kind], 'none')[0]}")


def adapt(model: nn.Module, stage) -> None:
    """Put LoRA (Hu et al. 2021, arXiv:2106.09685; scale 2) beside the linear layers that the stage names, by peft."""
    if not stage.lora:
        return
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    wanted = {n: next(rank for pattern, rank in reversed(stage.lora.items()) if fnmatch(n, pattern)) for n in linear if any(fnmatch(n, p) for p in stage.lora)}
    ranks = {f"^{re.escape(n)}$": rank for n, rank in wanted.items()}
    learns = {n: p.requires_grad for n, p in model.named_parameters()}
    LoraModel(model, LoraConfig(r=8, target_modules=list(wanted), rank_pattern=ranks, alpha_pattern={k: 2 * r for k, r in ranks.items()}), "default")
    for n, p in model.named_parameters():  # peft freezes all else; what learns is the stage's to say
        p.requires_grad = ADAPTER in n or learns.get(n.replace(".base_layer", ""), False)


def merge(model: nn.Module) -> None:
    """Fold the adapters into the layers that they stand beside."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def optimizer(model: nn.Module, stage) -> torch.optim.Optimizer:
    """AdamW over what the stage lets learn, each at its own share of the learning rate; no weight decay on vectors.

    Sets ``requires_grad`` of every parameter.

    Raises:
        ModelError: BAD_RECIPE when nothing learns.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        share = 1.0 if ADAPTER in name else 0.0 if ".base_layer." in name or name in model.unread else stage.share(name)
        parameter.requires_grad = share > 0
        if share > 0:
            groups[share, parameter.ndim > 1].append(parameter)
    if not groups:
        raise ModelError(f"stage {stage.name}: every parameter is frozen", "BAD_RECIPE", "give a pattern of train a share above 0")
    return torch.optim.AdamW(
        [{"params": p, "share": share, "lr": stage.lr * share, "weight_decay": stage.weight_decay if wide else 0.0} for (share, wide), p in groups.items()],
        lr=stage.lr, betas=(0.9, 0.98),
    )  # fmt: skip
