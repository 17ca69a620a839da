"""What is minimised. An objective is a function (model, batch, output) -> {name: loss}; a stage may mix several with "+"."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads.mask import Prompts
from ..language import Batch
from ..vlm import MedVLM, Output


def lm(model: MedVLM, batch: Batch, out: Output) -> dict[str, Tensor]:
    """Cross-entropy on the answers' tokens only, averaged over them."""
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=-100)[:, out.at]
    told = labels >= 0
    return {"lm": F.cross_entropy(out.logits[told].float(), labels[told])}


def mask(model: MedVLM, batch: Batch, out: Output) -> dict[str, Tensor]:
    """Masks drawn from [SEG] states, and again from a point or a box inside the same target.

    batch.targets: "mask" (S, h, w) coverage of the input in [0, 1]; "weak" (S,) true where it is only a box;
    "present" (S,); "label" (S,) index into the head's labels, -1 for others. An absent target teaches presence only:
    its outline is never shown, and learning empty maps would drown the few that are drawn. Exact masks: cross-entropy + Dice (Milletari et al. 2016, arXiv:1606.04797). Boxes: nothing outside,
    and the same shadow on both axes (BoxInst, Tian et al. 2021, arXiv:2012.02310, equation 2).
    """
    if batch.seg is None or not len(batch.seg):
        return {}
    head = model.heads["mask"]
    ((name, features),) = out.features.items()
    embedding = head.embed(features)
    index = torch.tensor([k for _, k in batch.seg_image], device=batch.ids.device)
    target, weak, present, label = (batch.targets[k] for k in ("mask", "weak", "present", "label"))
    shown = present.bool()
    drawn = head.decode(embedding, Prompts(index, tokens=model.seg_states(batch, out), named=label, draw=shown))
    losses = {"present": F.binary_cross_entropy_with_logits(drawn.present.float(), present)}
    if not shown.any():
        return losses
    losses["mask"] = mask_loss(drawn.logits, drawn.quality[shown], target[shown], weak[shown])
    named = (label >= 0) & shown
    if head.dense is not None and named.any():
        losses["dense"] = mask_loss(head.dense(embedding)[index[named], label[named]], None, target[named], weak[named])
    clicked = (shown & ~weak).nonzero()[:, 0]
    if len(clicked):
        boxes, points = box_prompts(target[clicked]), point_prompts(target[clicked])
        ones = torch.ones(len(clicked), 1, dtype=torch.long, device=index.device)
        half = len(clicked) // 2
        parts = [
            (clicked[half:], Prompts(index[clicked[half:]], points=points[half:], labels=ones[half:])),
            (clicked[:half], Prompts(index[clicked[:half]], boxes=boxes[:half])),
        ]
        prompted = [(head.decode(embedding, p), i) for i, p in parts if len(i)]
        losses["prompted"] = torch.stack([mask_loss(d.logits, d.quality, target[i], weak[i]) for d, i in prompted]).mean() * 0.5
    return losses


def mask_loss(logits: Tensor, quality: Tensor | None, target: Tensor, weak: Tensor) -> Tensor:
    """Mean over the masks drawn of each one's loss, and of the error of its predicted IoU; see :func:`mask`.

    logits: (S, h, w). target: (S, H, W) at any multiple of it. weak: (S,).
    """
    logits = logits.float()
    target = F.adaptive_avg_pool2d(target[:, None].float(), logits.shape[1:])[:, 0]
    chance = logits.sigmoid()
    exact = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2)) + dice_loss(chance, target)
    outside = (F.binary_cross_entropy_with_logits(logits, torch.zeros_like(target), reduction="none") * (1 - target)).mean((1, 2))
    shadow = sum(dice_loss(chance.amax(axis)[:, None], target.amax(axis)[:, None]) for axis in (1, 2))
    if quality is not None:
        exact = exact + 0.1 * F.mse_loss(quality.float(), overlap(logits.detach() > 0, target > 0.5), reduction="none")
    return torch.where(weak, outside + 0.5 * shadow, exact).mean()


def dice_loss(chance: Tensor, target: Tensor) -> Tensor:
    """1 - soft Dice of (S, h, w) each, smoothed by one pixel."""
    both = (chance * target).sum((1, 2))
    return 1 - (2 * both + 1) / (chance.sum((1, 2)) + target.sum((1, 2)) + 1)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of bool (S, h, w); 1 where both are empty."""
    union = (a | b).sum((1, 2)).float()
    return torch.where(union > 0, (a & b).sum((1, 2)) / union.clamp(min=1), torch.ones_like(union))


def box_prompts(target: Tensor, jitter: float = 0.05) -> Tensor:
    """(S, 2, 2) box around each target of (S, h, w), each side moved by up to ``jitter`` of the box's size."""
    boxes = []
    for rows, columns in ((t > 0.5).nonzero(as_tuple=True) for t in target):
        if not len(rows):  # thinner than a pixel of the input: the whole picture
            rows, columns = torch.tensor([0, target.shape[1] - 1]), torch.tensor([0, target.shape[2] - 1])
        low = torch.stack([rows.min(), columns.min()]).float()
        high = torch.stack([rows.max() + 1, columns.max() + 1]).float()
        boxes.append(torch.stack([low, high]) + (torch.rand(2, 2) * 2 - 1) * jitter * (high - low).cpu())
    return torch.stack(boxes).to(target.device)


def point_prompts(target: Tensor) -> Tensor:
    """(S, 1, 2) one random pixel centre inside each target of (S, h, w)."""
    points = []
    for t in target:
        inside = (t > 0.5).nonzero()
        inside = inside if len(inside) else (t == t.max()).nonzero()
        points.append(inside[torch.randint(len(inside), (1,))].float())
    return torch.stack(points)


def classify(model: MedVLM, batch: Batch, out: Output) -> dict[str, Tensor]:
    """Cross-entropy on the labels that are known (batch.targets["labels"]: (K, labels), NaN unknown)."""
    if not out.features:
        return {}
    head = model.heads["classify"]
    ((name, features),) = out.features.items()
    logits, target = head(features).float(), batch.targets["labels"]
    grouped = torch.zeros(len(head.labels), dtype=torch.bool, device=logits.device)
    losses: dict[str, Tensor] = {}
    for group in head.groups:
        index = torch.tensor([head.labels.index(n) for n in group], device=logits.device)
        grouped[index] = True
        told = (target[:, index] == 1).any(1)
        if told.any():
            losses[group[0].split(":")[0]] = F.cross_entropy(logits[told][:, index], (target[told][:, index] == 1).float().argmax(1)) * 0.3
    sure = ~target.isnan() & ~grouped
    if sure.any():
        losses["labels"] = F.binary_cross_entropy_with_logits(logits[sure], target[sure])
    return losses


def find(names: str):
    """The objectives of "lm+mask+classify", in order."""
    from ..errors import ModelError

    known = {f.__name__: f for f in (lm, mask, classify)}
    if wrong := [n for n in names.split("+") if n not in known]:
        raise ModelError(f"there is no objective {wrong[0]!r}; there are: {', '.join(known)}", "BAD_RECIPE")
    return [known[n] for n in names.split("+")]
