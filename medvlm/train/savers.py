"""Exact memory savers: a big batch through the model chunk by chunk, and a language-model head on the answers' tokens alone.

Both compute the same numbers as the plain step, in pieces, and compute them again where the gradient needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
    """Cross-entropy of the tokens that have a label, whose logits are made ``chunk`` rows at a time and again in the backward pass.

    Equal to ``F.cross_entropy(head(hidden).float(), labels, ignore_index=-100)`` with memory O(chunk x vocabulary); rows without a label cost
    nothing. As Liger's and CCE's fused losses (arXiv:2410.10989, arXiv:2411.09009) in what it saves, not in how.

    Args:
        head: (n, D) -> logits (n, V), such as the language model's output layer.
        hidden: (N, D) states, each predicting labels (N,); a label below 0 means none.
        cap: logits become cap tanh(logits / cap) (Gemma 2, arXiv:2408.00118, section 2: ``final_logit_softcapping``).
        mean: over the labelled rows; otherwise their sum, for a caller that divides by the tokens of a whole step. Without
            a labelled row the loss is 0 and so are the gradients.
    """
    told = labels >= 0
    hidden, labels = hidden[told], labels[told]

    def part(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), labels, reduction="sum")

    total = sum(checkpoint(part, *some, use_reentrant=False) for some in zip(hidden.split(chunk), labels.split(chunk)))
    return total / max(1, len(labels)) if mean else total


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
