"""Exact memory savers: a big batch through the model chunk by chunk, and a language-model head on the answers' tokens alone.

Both give the numbers of the plain step, computed in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..errors import ModelError

Embedded = tuple[tuple[Tensor, ...], dict[str, Tensor]]


def cached(forward: Callable[[Any], Embedded], chunks: Sequence, loss: Callable[..., dict[str, Tensor]],
           backward: Callable[[Tensor], None] = Tensor.backward, apart: Callable[[], AbstractContextManager] = nullcontext) -> dict[str, Tensor]:  # fmt: skip
    """One training step's gradients on a batch whose examples meet in the loss, with the activations of one chunk at a time.

    Source: GradCache, Gao et al. 2021, arXiv:2101.06983, section 3.2: embed all chunks without a graph, take the loss's
    gradient by the embeddings, then embed each chunk again with a graph and go back from that gradient. The random state
    of every chunk (CPU and current CUDA device) is kept, so that dropout draws the same in both passes.

    Gradients are those of ``sum(losses).backward()`` on all chunks' embeddings at once, for all that treats examples on
    their own; batch normalisation sees a chunk, and its running statistics move twice.

    Args:
        forward: chunk -> (embeddings (b, ...) each, {name: loss of this chunk alone, already weighted}); called twice a chunk.
        loss: the embeddings of all chunks, (B, ...) each -> {name: loss}. Parameters that it reads itself (a scale, a
            bias) get their gradient too.
        backward: what to call instead of ``Tensor.backward``, such as ``accelerator.backward``.
        apart: entered around every chunk but the last, such as ``partial(accelerator.no_sync, model)``: processes add
            their gradients up once. Autocast belongs inside ``forward`` and ``loss``, not around this call.

    Returns:
        {name: loss}, detached; chunks' own losses added up.
    """
    seeds, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            seeds.append(_random_state())
            parts.append(forward(chunk)[0])
    sizes = [len(embeddings[0]) for embeddings in parts]
    whole = [torch.cat(same).requires_grad_() for same in zip(*parts)]
    del parts
    losses = loss(*whole)
    together = sum(losses.values())
    # kept for a second pass: the loss's own parameters take part in the last chunk's backward, the one that DDP watches
    gradients = torch.autograd.grad(together, whole, retain_graph=True, allow_unused=True, materialize_grads=True)
    losses = {name: value.detach() for name, value in losses.items()}
    pieces = zip(chunks, seeds, zip(*(g.split(sizes) for g in gradients)))
    for number, (chunk, seed, wanted) in enumerate(pieces, 1):
        last = number == len(sizes)
        with nullcontext() if last else apart():
            with _random_state_of(seed):
                embeddings, others = forward(chunk)
            total = sum((e.float() * g.float()).sum() for e, g in zip(embeddings, wanted)) + sum(others.values())
            backward(total + together if last else total)
        for name, value in others.items():
            losses[name] = losses.get(name, 0) + value.detach()
    return losses


def answer_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, chunk: int = 128, cap: float | None = None,
                mean: bool = True) -> Tensor:  # fmt: skip
    """Cross-entropy of the tokens that have a label; their logits exist ``chunk`` rows at a time, those of the others never.

    Equal to ``F.cross_entropy(head(hidden).float(), labels, ignore_index=-100)``, with memory O(chunk x vocabulary). A plain
    linear layer's gradients are made together with the loss (as in Liger Kernel, Hsu et al. 2024, arXiv:2410.10989, section
    3.2); any other head is computed again in the backward pass.

    Args:
        head: (n, D) -> logits (n, V), such as the language model's output layer.
        hidden: (N, D) states, each predicting labels (N,); a label below 0 means none.
        cap: logits become cap tanh(logits / cap) (Gemma 2, arXiv:2408.00118, section 2: ``final_logit_softcapping``).
        mean: over the labelled rows; otherwise their sum, for a caller that divides by the tokens of a whole step. Without
            a labelled row the loss is 0 and so are the gradients.
    """
    told = labels >= 0
    hidden, labels = hidden[told], labels[told]
    if torch.is_grad_enabled() and _is_plain(head):
        total = _LinearAnswers.apply(hidden, head.weight, head.bias, labels, chunk, cap)
    else:
        part = partial(_entropy, head, cap)
        total = sum(checkpoint(part, *some, use_reentrant=False) for some in zip(hidden.split(chunk), labels.split(chunk)))
    return total / max(1, len(labels)) if mean else total


def _is_plain(head: Callable[[Tensor], Tensor]) -> bool:
    """A linear layer whose weight may be read past its forward: no hooks, not sharded."""
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter and not head._forward_hooks and not head._forward_pre_hooks


def _entropy(head: Callable[[Tensor], Tensor], cap: float | None, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), labels, reduction="sum")


class _LinearAnswers(torch.autograd.Function):
    """Summed cross-entropy and its gradients in one pass, chunk after chunk in the same memory."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int, cap: float | None) -> Tensor:
        device = hidden.device.type
        work = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        exact = torch.promote_types(work, torch.float32)
        wanted = [x if need else None for x, need in zip((hidden, weight, bias), ctx.needs_input_grad)]
        gradients = [None if x is None else torch.zeros_like(x, dtype=exact) for x in wanted]
        to_hidden, to_weight, to_bias = gradients
        with torch.autocast(device, enabled=False):
            table, offset = weight.to(work), None if bias is None else bias.to(work)
            total = torch.zeros((), dtype=exact, device=hidden.device)
            room = hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=exact)
            for start in range(0, len(hidden), chunk):
                states, right = hidden[start : start + chunk].to(work), labels[start : start + chunk, None]
                logits = room[: len(states)]
                if work == exact:
                    torch.mm(states, table.T, out=logits)
                    if offset is not None:
                        logits += offset
                else:
                    logits.copy_(F.linear(states, table, offset))
                slope = None
                if cap is not None:
                    logits.div_(cap).tanh_()
                    slope = 1 - logits.square()
                    logits.mul_(cap)
                of_right, most = logits.gather(1, right), logits.amax(1, keepdim=True)
                share = logits.sub_(most).exp_().sum(1, keepdim=True)
                total += (share.log() + most - of_right).sum()
                logits.div_(share)
                logits.scatter_add_(1, right, logits.new_full((len(states), 1), -1.0))
                if slope is not None:
                    logits *= slope
                if to_bias is not None:
                    to_bias += logits.sum(0)
                back = logits.to(work)
                if to_hidden is not None:
                    to_hidden[start : start + chunk] = back @ table
                if to_weight is not None:
                    to_weight.addmm_(back.T, states) if work == exact else to_weight.add_(back.T @ states)
        ctx.gradients = [g if g is None else g.to(x.dtype) for g, x in zip(gradients, wanted)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, by: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise ModelError("the answers' loss was already used backwards", "BAD_ARGUMENT", "call backward once on it")
        return *(g if g is None else g.mul_(by.to(g.dtype)) for g in gradients), None, None, None


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


@contextmanager
def _random_state_of(seed: tuple[Tensor, Tensor | None]):
    """Random numbers as they were then; afterwards as they are now."""
    cpu, cuda = seed
    with torch.random.fork_rng([] if cuda is None else [torch.cuda.current_device()]):
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        yield
