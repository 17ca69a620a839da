"""Contrastive losses of pairs of unit vectors, over the pairs of all processes, without holding the matrix of their logits.

The pictures of this process meet all texts ``tile`` pictures at a time. Logits are computed again in the backward
pass, and the log-sum-exp of a text over all pictures is put together from those of the tiles and of the processes: memory is
O(tile x texts), loss and gradients are those of the whole matrix. Source of the tiles: Inf-CL, Cheng et al. 2024,
arXiv:2410.17243.

In a distributed run each process passes its own pairs, as many as every other does, and gets its own share of the loss: its
pictures over all texts and its texts over all pictures (open_clip's ``local_loss`` with ``gather_with_grad``). The means over
the processes of losses and of gradients, which DDP takes, are those of one process with all pairs.

All take image, text: (n, D) unit vectors, row i of one belonging to row i of the other, computed with in single precision or
better also under autocast; scale: what cosines are multiplied by, as ``ContrastHead.scale()`` gives; tile: pictures at a time,
None for all at once. All give a scalar and raise ModelError BAD_ARGUMENT for shapes that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..errors import ModelError

DEEP = 60.0
"""Logits so far below the greatest are still held by single precision as exponentials (e^-87 is its least), and what is 16 below them."""
_ALONE = ContextVar("alone", default=False)


def clip_loss(image: Tensor, text: Tensor, scale: Tensor | float, tile: int | None = None) -> Tensor:
    """Cross-entropy of each picture's own text among all texts and of each text's own picture among all pictures, averaged.

    Source: CLIP, Radford et al. 2021, arXiv:2103.00020, figure 3.
    """
    with torch.autocast(image.device.type, enabled=False):
        return _softmax_loss(*_pairs(image, text, tile), scale, tile)


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float, tile: int | None = None) -> Tensor:
    """Each picture and text told apart on its own: -log sigmoid(+-(scale cos + bias)), + for a pair, summed and divided by n.

    Source: SigLIP, Zhai et al. 2023, arXiv:2303.15343, algorithm 1.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = _pairs(image, text, tile)
        texts, image, bias = gathered(text), scale * image, torch.as_tensor(bias).to(image)
        return (_Softplus.apply(image, texts, bias, tile or len(image)) - ((image * text).sum(1) + bias)).mean()  # softplus(-z) = softplus(z) - z


def soft_loss(image: Tensor, text: Tensor, scale: Tensor | float, labels: Tensor, tile: int | None = None, temperature: float | None = None) -> Tensor:
    """As :func:`clip_loss`, but a picture's target is spread over the texts of like cases, and a text's over their pictures.

    labels: (n, L), one row a case: findings (1 present, 0 absent, NaN unknown) or any vectors, as of its report. The cosine
    s_ij of two rows says how alike two cases are; the target of case i is t_ij = max(s_ij, 0) / sum_j max(s_ij, 0), or
    softmax_j(s_ij / temperature) when a temperature is given; the loss is -sum_j t_ij log p_ij, averaged over both directions.

    - Unknown findings make no likeness: they count as 0 in the cosine.
    - A case whose findings are all known to be absent is like every other such case: its row is that of a finding "none".
    - A case is wholly like itself (s_ii = 1), also where nothing present is known; such a case is like no other.

    Without a temperature, cases that share nothing have targets of exactly 0, so that labels which are all different and
    one-hot give ``clip_loss``. ``temperature=1`` is the target of Cardiac-CLIP (Hu et al. 2025, arXiv:2507.22024; its
    code, ``objectives.compute_itc``: softmax of the cosines of label vectors) and of MedCLIP's semantic matching loss
    (Wang et al. 2022, arXiv:2210.10163). What departs: in Cardiac-CLIP an empty row is 0/0, and a text's target is the
    transposed matrix, whose rows do not add up to 1; here, as in MedCLIP, it is normalised over the pictures. MedCLIP codes
    an absent finding as -1, so that sharing absences makes a likeness; here it does only where nothing at all is present.
    """
    image, text = _pairs(image, text, tile)
    if labels.ndim != 2 or len(labels) != len(image):
        raise ModelError(f"{len(image)} pairs but labels of shape {tuple(labels.shape)}", "BAD_ARGUMENT", "give each pair a row of labels")
    if temperature is not None and temperature <= 0:
        raise ModelError(f"temperature {temperature} is not above 0", "BAD_ARGUMENT", "give a positive one, or None")
    with torch.autocast(image.device.type, enabled=False):
        rows = _directions(labels.detach().to(image))
        columns, place = gathered(rows), torch.arange(len(rows), device=rows.device) + _rank() * len(rows)

        def likeness(rows: Tensor, place: Tensor) -> Tensor:
            alike = rows @ columns.T
            alike[torch.arange(len(place), device=place.device), place] = 1
            return alike.clamp_(min=0) if temperature is None else alike.sub_(1).div_(temperature).exp_()

        mine = torch.cat([likeness(*some).sum(1) for some in zip(*(x.split(tile or len(x)) for x in (rows, place)))])
        total = gathered(mine)

        def share(rows: Tensor, place: Tensor, mine: Tensor) -> Tensor:
            """What each text weighs for these pictures and these pictures for each text, averaged: cosines are symmetric."""
            return likeness(rows, place).mul_((1 / mine[:, None] + 1 / total) / 2)

        return _softmax_loss(image, text, scale, tile, share, (rows, place, mine))


def _softmax_loss(image: Tensor, text: Tensor, scale: Tensor | float, tile: int | None, share: Callable | None = None, about: tuple[Tensor, ...] = ()) -> Tensor:
    """share(*tile of about) -> (t, N), what each pair of a picture and a text weighs; None: 1 for a picture's own, 0 for others."""
    texts, image = gathered(text), scale * image
    over_texts, over_pictures = _LogSums.apply(image, texts, tile or len(image))
    over_pictures = gathered(over_pictures[None]).logsumexp(0)
    own = over_pictures[_rank() * len(text) :][: len(text)]
    if share is None:
        right = (image * text).sum(1)
    else:
        right = torch.cat(_tiles(lambda pictures, *some: (pictures * (share(*some) @ texts)).sum(1), tile, image, *about))
    return ((over_texts + own) / 2 - right).mean()


def _logits(pictures: Tensor, texts: Tensor, tile: int) -> Iterator[tuple[slice, Tensor]]:
    """(which pictures, their logits) for ``tile`` pictures at a time, all in the same memory."""
    held = pictures.new_empty(min(tile, len(pictures)), len(texts))
    for start in range(0, len(pictures), tile):
        part = slice(start, min(start + tile, len(pictures)))
        yield part, torch.mm(pictures[part], texts.T, out=held[: part.stop - part.start])


class _LogSums(torch.autograd.Function):
    """Pictures (n, D), texts (N, D), tile -> log-sum-exp of the logits of each picture (n,) and of each text (N,).

    One exponential serves both directions wherever no row or column lies so far below the greatest logit that it would
    vanish. The logits are computed again for the gradient.
    """

    @staticmethod
    def forward(ctx, pictures: Tensor, texts: Tensor, tile: int) -> tuple[Tensor, Tensor]:
        rows, columns = pictures.new_empty(len(pictures)), []
        for part, logits in _logits(pictures, texts, tile):
            highest, tallest = logits.amax(1), logits.amax(0)
            most = highest.max()
            if most - torch.minimum(highest.min(), tallest.min()) < DEEP:
                grown = logits.sub_(most).exp_()
                rows[part] = grown.sum(1).log_().add_(most)
                columns.append(grown.sum(0).log_().add_(most))
            else:
                rows[part] = logits.logsumexp(1)
                columns.append(logits.logsumexp(0))
        columns = torch.stack(columns).logsumexp(0)
        ctx.save_for_backward(pictures, texts, rows, columns)
        ctx.tile = tile
        return rows, columns

    @staticmethod
    @once_differentiable
    def backward(ctx, by_row: Tensor, by_column: Tensor) -> tuple[Tensor, Tensor, None]:
        pictures, texts, rows, columns = ctx.saved_tensors
        of_pictures, of_texts = torch.empty_like(pictures), torch.zeros_like(texts)
        most = torch.maximum(rows.max(), columns.max())
        near = bool(most - torch.minimum(rows.min(), columns.min()) < DEEP)
        with torch.autocast(pictures.device.type, enabled=False):
            for part, logits in _logits(pictures, texts, ctx.tile):
                if near:
                    weights = logits.sub_(most).exp_().mul_(torch.add((by_row[part] * (most - rows[part]).exp())[:, None], by_column * (most - columns).exp()))
                else:
                    weights = (logits - rows[part, None]).exp_().mul_(by_row[part, None]).add_(logits.sub_(columns).exp_().mul_(by_column))
                torch.mm(weights, texts, out=of_pictures[part])
                of_texts.addmm_(weights.T, pictures[part])
        return of_pictures, of_texts, None


class _Softplus(torch.autograd.Function):
    """Pictures (n, D), texts (N, D), a bias, tile -> (n,) sums of softplus(logit + bias) over the texts; the logits are computed again for the gradient."""

    @staticmethod
    def forward(ctx, pictures: Tensor, texts: Tensor, bias: Tensor, tile: int) -> Tensor:
        ctx.save_for_backward(pictures, texts, bias)
        ctx.tile, rows = tile, pictures.new_empty(len(pictures))
        for part, logits in _logits(pictures, texts, tile):
            rows[part] = F.softplus(logits.add_(bias)).sum(1)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, by_row: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        pictures, texts, bias = ctx.saved_tensors
        of_pictures, of_texts, of_bias = torch.empty_like(pictures), torch.zeros_like(texts), torch.zeros_like(bias)
        with torch.autocast(pictures.device.type, enabled=False):
            for part, logits in _logits(pictures, texts, ctx.tile):
                weights = logits.add_(bias).sigmoid_().mul_(by_row[part, None])
                torch.mm(weights, texts, out=of_pictures[part])
                of_texts.addmm_(weights.T, pictures[part])
                of_bias += weights.sum()
        return of_pictures, of_texts, of_bias, None


def _directions(labels: Tensor) -> Tensor:
    """(n, L + 1) unit vectors, 0 where nothing present is known; the last column is "none", all known to be absent."""
    known = labels.nan_to_num(0.0)
    none = (labels == 0).all(1, keepdim=True)
    return F.normalize(torch.cat([known, none.to(known)], 1), dim=1)


def _pairs(image: Tensor, text: Tensor, tile: int | None) -> tuple[Tensor, Tensor]:
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise ModelError(f"images {tuple(image.shape)} and texts {tuple(text.shape)} are not rows of pairs", "BAD_ARGUMENT", "give one text an image")
    if tile is not None and tile < 1:
        raise ModelError(f"a tile of {tile} rows", "BAD_ARGUMENT", "give a positive number, or None for one tile")
    exact = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    return image.to(exact), text.to(exact)


def _tiles(part: Callable, tile: int | None, *rows: Tensor) -> list:
    """What ``part`` gives for ``tile`` rows at a time, computed again in the backward pass."""
    if tile is None:
        return [part(*rows)]
    again = dict(use_reentrant=False, preserve_rng_state=False)
    return [checkpoint(part, *some, **again) for some in zip(*(r.split(tile) for r in rows))]


@contextmanager
def alone() -> Iterator[None]:
    """Within it, a process's pairs are all there are: nothing is gathered."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def _many() -> bool:
    return not _ALONE.get() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rank() -> int:
    return dist.get_rank() if _many() else 0


def gathered(rows: Tensor) -> Tensor:
    """(processes x n, ...): the rows (n, ...) of every process, in order of rank, with gradient; the rows themselves outside distributed runs.

    Raises:
        ModelError: BAD_RECIPE where a process holds more rows than another.
    """
    if not _many():
        return rows
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=rows.device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(rows)], device=rows.device))
    if len(set(counts.tolist())) > 1:
        raise ModelError(f"the processes hold {', '.join(map(str, counts.tolist()))} pairs of a batch", "BAD_RECIPE", "every picture of the stage's data needs a caption")
    return _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    """torch.distributed.nn's all_gather is deprecated, and its successor is private."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        every = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(every, rows.contiguous())
        return every

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
