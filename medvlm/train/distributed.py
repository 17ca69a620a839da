"""Several processes: what they share, and a model whose parameters are split over them (FSDP2)."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ModelError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def total(*counts: float) -> list[float]:
    """Each number summed over the processes."""
    if world() == 1:
        return list(counts)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    summed = torch.tensor(counts, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def mean(values: dict[str, float]) -> dict[str, float]:
    """Each value averaged over the processes, 0 where one lacks it."""
    if world() == 1:
        return values
    every: list[dict[str, float]] = [{}] * world()
    dist.all_gather_object(every, values)
    return {k: sum(v.get(k, 0.0) for v in every) / len(every) for k in dict.fromkeys(k for v in every for k in v)}


def gathered(rows: list) -> list:
    """The rows of all processes, one process after the other."""
    if world() == 1:
        return rows
    every: list[list] = [[]] * world()
    dist.all_gather_object(every, rows)
    return [row for held in every for row in held]


def wait() -> None:
    if world() > 1:
        dist.barrier()


def refuse_ignored_fsdp(device: str) -> None:
    """Accelerate drops its FSDP plugin on a CPU without a word.

    Raises:
        ModelError: FSDP_IGNORED.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") and device == "cpu":
        raise ModelError("Accelerate's configuration asks for FSDP but ignores it on a CPU", "FSDP_IGNORED",
                         "use --shard, which splits the parameters on CPUs and GPUs alike, or a configuration without FSDP")  # fmt: skip


def shard(module: nn.Module, inner: nn.Module) -> nn.Module:
    """Split a module's parameters over the processes (``fully_shard``): each block of ``inner`` on its own, all else together.

    inner: the MedVLM within. Blocks are the members of its module lists, such as a language model's layers.

    Raises:
        ModelError: NOT_DISTRIBUTED in a single process.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not dist.is_initialized():
        raise ModelError("a single process has nobody to share parameters with", "NOT_DISTRIBUTED", "start with `torchrun --nproc-per-node N -m medvlm train ... --shard`")
    for part in [inner.lm, *inner.encoders.values()]:
        for blocks in [m for m in part.modules() if isinstance(m, nn.ModuleList)] if part is not None else ():
            for block in blocks:
                if any(True for _ in block.parameters()) and not isinstance(block, FSDPModule):
                    fully_shard(block)
    return fully_shard(module)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a split model, put together on the CPU of the first process; {} in the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
