"""What is minimised. An objective is a function (model, batch, output) -> {name: loss}; a stage may mix several with "+"."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import parts
from ..encoders.base import Features
from ..errors import ModelError
from ..heads.mask import Prompts
from ..language import Batch
from ..vlm import MedVLM, Output

CLICKED = 8
"""Masks of a batch that are drawn again from a point or a box."""


def lm(model: MedVLM, batch: Batch, out: Output) -> dict[str, Tensor]:
    """Cross-entropy on the answers' tokens only, averaged over them."""
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=-100)[:, out.at]
    told = labels >= 0
    return {"lm": F.cross_entropy(out.logits[told].float(), labels[told])}


def mask(model: MedVLM, batch: Batch, out: Output) -> dict[str, Tensor]:
    """Masks drawn from [SEG] states, and again from a point or a box inside the same target.

    batch.targets: "mask" (S, *size) coverage of the input in [0, 1]; "weak" (S,) true where it is only a box;
    "present" (S,); "label" (S,) index into the head's labels, -1 for others. An absent target teaches presence only:
    its outline is never shown, and learning empty maps would drown the few that are drawn. Exact masks: cross-entropy + Dice (Milletari et al. 2016, arXiv:1606.04797). Boxes: nothing outside,
    and the same shadow on every axis (BoxInst, Tian et al. 2021, arXiv:2012.02310, equation 2).
    """
    if batch.seg is None or not len(batch.seg):
        return {}
    head = model.heads["mask"]
    features = _seen(out)
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
        losses["dense"] = mask_loss(head.maps(embedding)[index[named], label[named]], None, target[named], weak[named])
    clicked = (shown & ~weak).nonzero()[:, 0]
    clicked = clicked[torch.randperm(len(clicked))[:CLICKED].to(clicked.device)]
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

    logits: (S, *grid). target: (S, *size) at any multiple of it. weak: (S,).
    """
    logits = logits.float()
    pool = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[logits.ndim - 1]
    target = pool(target[:, None].float(), logits.shape[1:])[:, 0]
    chance, axes = logits.sigmoid(), set(range(1, logits.ndim))
    exact = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1) + dice_loss(chance, target)
    outside = (F.binary_cross_entropy_with_logits(logits, torch.zeros_like(target), reduction="none") * (1 - target)).flatten(1).mean(1)
    shadow = sum(dice_loss(chance.amax([*axes - {axis}]), target.amax([*axes - {axis}])) for axis in axes)
    if quality is not None:
        exact = exact + 0.1 * F.mse_loss(quality.float(), overlap(logits.detach() > 0, target > 0.5), reduction="none")
    return torch.where(weak, outside + 0.5 * shadow, exact).mean()


def dice_loss(chance: Tensor, target: Tensor) -> Tensor:
    """1 - soft Dice of (S, ...) each, smoothed by one pixel."""
    chance, target = chance.flatten(1), target.flatten(1)
    return 1 - (2 * (chance * target).sum(1) + 1) / (chance.sum(1) + target.sum(1) + 1)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of bool (S, ...); 1 where both are empty."""
    union = (a | b).flatten(1).sum(1).float()
    return torch.where(union > 0, (a & b).flatten(1).sum(1) / union.clamp(min=1), torch.ones_like(union))


def box_around(target: Tensor) -> Tensor:
    """(S, 2, rank) half-open box around each target of (S, *size); the whole input where it is thinner than a pixel."""
    boxes = []
    for t in target:
        inside = (t > 0.5).nonzero()
        whole = torch.tensor([[0] * t.ndim, t.shape], device=t.device)
        boxes.append(torch.stack([inside.amin(0), inside.amax(0) + 1]) if len(inside) else whole)
    return torch.stack(boxes).float()


def box_prompts(target: Tensor, jitter: float = 0.05) -> Tensor:
    """(S, 2, rank) box around each target of (S, *size), each side moved by up to ``jitter`` of the box's size."""
    boxes = box_around(target)
    return boxes + (torch.rand(boxes.shape) * 2 - 1).to(boxes) * jitter * (boxes[:, 1:] - boxes[:, :1])


def point_prompts(target: Tensor) -> Tensor:
    """(S, 1, rank) one random pixel centre inside each target of (S, *size)."""
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
    features = _seen(out)
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


def clip(model: MedVLM, batch: Batch, out: Output) -> dict[str, Tensor]:
    """Each picture picks its caption out of the batch and each caption its picture (CLIP, arXiv:2103.00020, figure 3).

    batch.targets["text"]: {"ids" (K, T), "attention" (K, T)}, the caption of each picture. They go through the encoder
    named "text". In a distributed run the other processes' pairs are negatives too.
    """
    pairs = _pairs(model, batch, out)
    if pairs is None:
        return {}
    from open_clip.loss import ClipLoss

    head, image, text = pairs
    return {"clip": ClipLoss(local_loss=True, gather_with_grad=True, **_world())(image, text, head.scale())}


def siglip(model: MedVLM, batch: Batch, out: Output) -> dict[str, Tensor]:
    """Each pair of a picture and a caption is told apart on its own (SigLIP, arXiv:2303.15343, algorithm 1); targets as :func:`clip`."""
    pairs = _pairs(model, batch, out)
    if pairs is None:
        return {}
    from open_clip.loss import SigLipLoss

    head, image, text = pairs
    return {"siglip": SigLipLoss(**_world())(image, text, head.scale(), head.logit_bias)}


def _pairs(model: MedVLM, batch: Batch, out: Output):
    if not out.features:
        return None
    head, caption = model.heads["contrast"], batch.targets["text"]
    features = _seen(out)
    if len(features.pooled) != len(caption["ids"]):
        raise ModelError(f"the batch has {len(features.pooled)} pictures but {len(caption['ids'])} captions", "BAD_RECIPE", "give each picture one caption")
    text = model.encoders["text"](caption["ids"], caption["attention"])
    return head, head.image(features).float(), head.text(text).float()


def _world() -> dict[str, int]:
    on = dist.is_available() and dist.is_initialized()
    return {"rank": dist.get_rank() if on else 0, "world_size": dist.get_world_size() if on else 1}


def box(model: MedVLM, batch: Batch, out: Output) -> dict[str, Tensor]:
    """Objects of the head's labels, and the place that each <|seg|> means; each where the head has that part and the batch its targets.

    batch.targets["boxes"]: {"corners" (n, 2, 2) input pixels (h, w), half-open; "label" (n,) index into the head's labels;
    "image" (n,) index into the pictures; "told" (K,) true where all objects of a picture are marked}: others teach
    nothing. Losses as FCOS (:mod:`medvlm.heads.box`): focal, GIoU, centreness.
    batch.targets["mask"] (S, *size) and "present" (S,), as for :func:`mask`: the place is the box around what the mask
    covers, and one that is absent teaches presence only. L1 of the corners and GIoU, weighted 5 : 2 (DETR,
    arXiv:2005.12872, appendix A.4, whose L1 is of centre and size).
    """
    head, losses = model.heads["box"], {}
    if not out.features:
        return {}
    features = _seen(out)
    if head.dense is not None and "boxes" in batch.targets and batch.targets["boxes"]["told"].any():
        losses |= _objects(head, head(features), batch.targets["boxes"])
    if head.asked is not None and batch.seg is not None and len(batch.seg):
        index = torch.tensor([k for _, k in batch.seg_image], device=batch.ids.device)
        target, present = batch.targets["mask"], batch.targets["present"]
        places = head.from_states(features, model.seg_states(batch, out), index)
        losses["place_present"] = F.binary_cross_entropy_with_logits(places.present.float(), present)
        shown = present.bool()
        if shown.any():
            size = torch.tensor(target.shape[1:], device=target.device)
            found, true = places.corners[shown].float(), box_around(target[shown]) / size
            losses["place"] = (5 * (found - true).abs().sum((1, 2)) + 2 * giou_loss(found, true)).mean()
    return losses


def _objects(head, boxes, target: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's FCOS losses on the pictures whose objects are all marked."""
    told = target["told"].nonzero()[:, 0].tolist()
    cells = head.cells(boxes.logits.shape[2:], boxes.logits.device)
    targets, owners = [], []
    for k in told:
        mine = target["image"] == k
        corners = target["corners"][mine].float()
        targets.append({"boxes": corners.flatten(1), "labels": target["label"][mine]})
        owners.append(assign(corners, cells))
    flat = {
        "cls_logits": boxes.logits, "bbox_regression": boxes.distances / head.stride, "bbox_ctrness": boxes.centreness[:, None],
    }  # fmt: skip
    flat = {k: v[told].float().flatten(2).transpose(1, 2) for k, v in flat.items()}
    losses = head.dense.compute_loss(targets, flat, [cells] * len(told), owners)
    return {"boxes": losses["classification"], "box_edges": losses["bbox_regression"], "box_centres": losses["bbox_ctrness"]}


def assign(corners: Tensor, cells: Tensor, radius: float = 1.5) -> Tensor:
    """(N,) index of the box that each cell is to find, -1 for none.

    A box is found by the cells whose centre lies inside it and within ``radius`` cells of its own centre on both axes; where
    boxes overlap, by the smallest. Source: FCOS, arXiv:1904.01355 section 3.1 and arXiv:2006.09214 (centre sampling).

    corners: (n, 2, 2) input pixels. cells: (N, 4) as ``BoxHead.cells`` gives.
    """
    if not len(corners):
        return torch.full((len(cells),), -1, device=cells.device)
    centre, side = (cells[:, None, :2] + cells[:, None, 2:]) / 2, cells[:, None, 2] - cells[:, None, 0]
    inside = torch.minimum(centre - corners[:, 0], corners[:, 1] - centre).amin(2) > 0
    near = (centre - corners.mean(1)).abs().amax(2) < radius * side
    area = (corners[:, 1] - corners[:, 0]).prod(1).expand(len(cells), -1).masked_fill(~(inside & near), torch.inf)
    least, owner = area.min(1)
    return owner.masked_fill(least.isinf(), -1)


def giou_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - generalised IoU of boxes (P, 2, rank) each. Source: Rezatofighi et al. 2019, arXiv:1902.09630, algorithm 1."""
    volume = lambda lower, upper: (upper - lower).clamp(min=0).prod(-1)  # noqa: E731
    both = volume(torch.maximum(a[:, 0], b[:, 0]), torch.minimum(a[:, 1], b[:, 1]))
    hull = volume(torch.minimum(a[:, 0], b[:, 0]), torch.maximum(a[:, 1], b[:, 1]))
    union = volume(*a.unbind(1)) + volume(*b.unbind(1)) - both
    return 1 - both / union.clamp(min=1e-9) + (hull - union) / hull.clamp(min=1e-9)


def find(names: str):
    """The objectives of "lm+mask+classify", in order: those of this file, and those of heads that bring an ``objective``."""
    known = {f.__name__: f for f in (lm, mask, classify, clip, siglip, box)}
    brought, found = parts.names("heads", "objective"), []
    for name in names.split("+"):
        objective = known.get(name) or (name in brought and getattr(parts.find("heads", name, "objective"), "objective", None))
        if not objective:
            raise ModelError(f"there is no objective {name!r}; there are: {', '.join((*known, *brought))}", "BAD_RECIPE")
        found.append(objective)
    return found


def _seen(out: Output) -> Features:
    """The features of the batch's pictures."""
    if len(out.features) > 1:
        raise ModelError(f"an objective takes pictures of one encoder a batch, not of {', '.join(out.features)}", "BAD_RECIPE",
                         "mix only data sets that one encoder sees")  # fmt: skip
    (features,) = out.features.values()
    return features
