"""What is minimised. An objective is a function (model, batch, output) -> {name: mean loss}; a stage may mix several with "+".

Arguments after those three are a stage's ``options``. An objective may carry functions that the loop heeds:

- ``before(model, batch) -> batch``: changes a batch before the model sees it.
- ``count(model, batch) -> {loss: int}``: over how many each of its losses is a mean, the same losses for every batch, so that
  parts of a step weigh what they hold; what it does not count weighs by part.
- ``vectors(model, batch, out)`` and ``between(model, image, text, labels, ...) -> losses``: of one whose examples meet in the
  loss: the loop collects the vectors of a step's parts first, and ``labels(batch)`` where the objective has it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import parts
from ..encoders.base import Features
from ..errors import ModelError
from ..heads.mask import Prompts
from ..language import Batch
from ..vlm import MedVLM, Output
from .contrastive import clip_loss, siglip_loss, soft_loss
from .mask_losses import focal_loss, tversky_loss
from .savers import answer_loss

WORDS = 4096
"""Columns into which the tokens of reports are counted to say how alike two are; of a larger vocabulary some share one."""
CLICKED = 8
"""Masks of a batch that are drawn again from a point or a box."""


def _answers(model: MedVLM, batch: Batch) -> dict[str, int]:
    return {"lm": int((batch.labels[:, 1:] >= 0).sum())}


@parts.carries(count=_answers)
def lm(model: MedVLM, batch: Batch, out: Output, chunk: int = 256) -> dict[str, Tensor]:
    """Cross-entropy on the answers' tokens only, averaged over them; logits of ``chunk`` tokens are held at a time."""
    if not len(batch.ids):
        return {}
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=-100)
    if model.plain_head:
        return {"lm": answer_loss(model.get_output_embeddings(), out.hidden.flatten(0, 1), labels.flatten(), chunk)}
    labels = labels[:, out.at]
    told = labels >= 0
    return {"lm": F.cross_entropy(out.logits[told].float(), labels[told])}


def _prompted(model: MedVLM, batch: Batch) -> dict[str, int]:
    if batch.seg is None or not len(batch.seg):
        return dict.fromkeys(("present", "mask", "dense", "prompted"), 0)
    head, shown, known = model.heads["mask"], batch.targets["present"].bool(), batch.targets["label"] >= 0
    drawn = shown if head.ladder is None else shown & ~known
    return {"present": len(shown), "mask": int(drawn.sum()), "dense": int((shown & known).sum()), "prompted": int((shown & ~batch.targets["weak"]).sum())}


@parts.carries(count=_prompted)
def mask(model: MedVLM, batch: Batch, out: Output, tversky: tuple[float, float] | None = None, focal: float | None = None) -> dict[str, Tensor]:
    """Masks drawn from [SEG] states, and again from a point or a box inside the same target.

    batch.targets: "mask" (S, *size) coverage of the input in [0, 1]; "weak" (S,) true where it is only a box;
    "present" (S,); "label" (S,) index into the head's labels, -1 for others. An absent target teaches presence only:
    its outline is never shown, and learning empty maps would drown the few that are drawn. Exact masks: cross-entropy + Dice
    (Milletari et al. 2016, arXiv:1606.04797), or focal loss of this gamma, or Tversky loss of this alpha and beta, in their
    place. Boxes: nothing outside, and the same shadow on every axis (BoxInst, Tian et al. 2021, arXiv:2012.02310, equation 2).
    Labels that the head draws from its ladder learn their outlines by :func:`outline`; here only their presence.
    """
    if tversky is not None and (not isinstance(tversky, tuple | list) or len(tversky) != 2):
        raise ModelError(f"tversky is (alpha, beta), not {tversky!r}", "BAD_RECIPE")
    loss = functools.partial(mask_loss, tversky=tversky, focal=focal)
    if batch.seg is None or not len(batch.seg):
        return {}
    head = model.heads["mask"]
    features = _seen(model, batch, out)
    embedding = head.embed(features)
    index = torch.tensor([k for _, k in batch.seg_image], device=batch.ids.device)
    target, weak, present, label = (batch.targets[k] for k in ("mask", "weak", "present", "label"))
    shown = present.bool()
    decoded = shown if head.ladder is None else shown & (label < 0)
    drawn = head.decode(embedding, Prompts(index, tokens=model.seg_states(batch, out), named=label, draw=decoded))
    losses = {"present": F.binary_cross_entropy_with_logits(drawn.present.float(), present)}
    if decoded.any():
        losses["mask"] = loss(drawn.logits, drawn.quality[decoded], target[decoded], weak[decoded])
    named = (label >= 0) & shown
    if head.dense is not None and head.ladder is None and named.any():
        losses["dense"] = loss(head.maps(embedding)[index[named], label[named]], None, target[named], weak[named])
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
        losses["prompted"] = torch.stack([loss(d.logits, d.quality, target[i], weak[i]) for d, i in prompted]).mean() * 0.5
    return losses


def mask_loss(logits: Tensor, quality: Tensor | None, target: Tensor, weak: Tensor, tversky: tuple[float, float] | None = None,
              focal: float | None = None) -> Tensor:  # fmt: skip
    """Mean over the masks drawn of each one's loss; see :func:`mask_losses`."""
    return mask_losses(logits, quality, target, weak, tversky, focal).mean()


def mask_losses(logits: Tensor, quality: Tensor | None, target: Tensor, weak: Tensor, tversky: tuple[float, float] | None = None,
                focal: float | None = None) -> Tensor:  # fmt: skip
    """(S,) each mask's loss, with the error of its predicted IoU; see :func:`mask`.

    logits: (S, *grid). target: (S, *size) at any multiple of it. weak: (S,).
    """
    logits = logits.float()
    pool = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[logits.ndim - 1]
    target = pool(target[:, None].float(), logits.shape[1:])[:, 0]
    chance, axes = logits.sigmoid(), set(range(1, logits.ndim))
    pixels = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1) if focal is None else focal_loss(logits, target, focal)
    exact = pixels + (dice_loss(chance, target) if tversky is None else tversky_loss(chance, target, *tversky))
    outside = (F.binary_cross_entropy_with_logits(logits, torch.zeros_like(target), reduction="none") * (1 - target)).flatten(1).mean(1)
    shadow = sum(dice_loss(chance.amax([*axes - {axis}]), target.amax([*axes - {axis}])) for axis in axes)
    if quality is not None:
        exact = exact + 0.1 * F.mse_loss(quality.float(), overlap(logits.detach() > 0, target > 0.5), reduction="none")
    return torch.where(weak, outside + 0.5 * shadow, exact)


def _outlined(model: MedVLM, batch: Batch) -> dict[str, int]:
    told = batch.targets.get("outline")
    return {"outline": 0, "empty": 0} if told is None else {"outline": len(told["image"].unique()), "empty": len(told["none"])}


@parts.carries(count=_outlined)
def outline(model: MedVLM, batch: Batch, out: Output, absent: float = 0.5, tversky: tuple[float, float] | None = None, focal: float | None = None) -> dict[str, Tensor]:
    """All that is outlined of a picture at once, on the maps of the labels that the mask head knows by name; no words are needed.

    batch.targets["outline"]: "mask" (n, *size) coverage in 0..255, "weak" (n,), "image" (n,) and "label" (n,) of what is there;
    "none" (m, 2) image and label of what is known not to be. Losses of masks as :func:`mask` has them, those of one picture
    weighing together as much as those of another; ``absent`` times the cross-entropy of a map that is to stay empty.
    """
    told = batch.targets.get("outline")
    if told is None:
        return {}
    there, losses = len(told["image"]), {}
    image, label = torch.cat([told["image"], told["none"][:, 0]]), torch.cat([told["label"], told["none"][:, 1]])
    maps = model.heads["mask"].outlined(_seen(model, batch, out), image, label)
    if there:
        share = 1 / torch.bincount(told["image"])[told["image"]]
        each = mask_losses(maps[:there], None, told["mask"].float() / 255, told["weak"], tversky, focal)
        losses["outline"] = (each * share).sum() / share.sum()
    if len(told["none"]):
        losses["empty"] = absent * F.softplus(maps[there:].float()).mean()
    return losses


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


def _groups(head, target: Tensor) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """({group: (index of its labels, (K,) pictures of which it is known)}, (K, labels) the other labels that are known)."""
    found, sure = {}, ~target.isnan()
    for group in head.groups:
        index = torch.tensor([head.labels.index(n) for n in group], device=target.device)
        found[group[0].split(":")[0]] = index, (target[:, index] == 1).any(1)
        sure[:, index] = False
    return found, sure


def _known(model: MedVLM, batch: Batch) -> dict[str, int]:
    head = model.heads["classify"]
    if not len(batch.targets["labels"]):  # text alone
        return {g[0].split(":")[0]: 0 for g in head.groups} | {"labels": 0}
    groups, sure = _groups(head, batch.targets["labels"])
    return {name: int(told.sum()) for name, (_, told) in groups.items()} | {"labels": int(sure.sum())}


@parts.carries(count=_known)
def classify(model: MedVLM, batch: Batch, out: Output) -> dict[str, Tensor]:
    """Cross-entropy on the labels that are known (batch.targets["labels"]: (K, labels), NaN unknown)."""
    if not out.features:
        return {}
    head = model.heads["classify"]
    features = _seen(model, batch, out)
    logits, target = head(features).float(), batch.targets["labels"]
    groups, sure = _groups(head, target)
    losses: dict[str, Tensor] = {}
    for name, (index, told) in groups.items():
        if told.any():
            losses[name] = F.cross_entropy(logits[told][:, index], (target[told][:, index] == 1).float().argmax(1)) * 0.3
    if sure.any():
        losses["labels"] = F.binary_cross_entropy_with_logits(logits[sure], target[sure])
    return losses


def vectors(model: MedVLM, batch: Batch, out: Output) -> tuple[Tensor, Tensor]:
    """(n, D) unit vectors of the pictures that have a caption, and of their captions.

    batch.targets["text"]: {"ids" (n, T), "attention" (n, T), "image" (n,) index into the pictures}; captions go through the
    encoder named "text".
    """
    if not out.features or "text" not in batch.targets:
        raise ModelError("a contrastive objective met a batch without captions", "BAD_RECIPE", "its data sets need conversations of kind caption, report or facts")
    head, caption = model.heads["contrast"], batch.targets["text"]
    pooled = head.image(_seen(model, batch, out))[caption["image"]]
    return pooled.float(), head.text(model.encoders["text"](caption["ids"], caption["attention"])).float()


def _pair_labels(batch: Batch, alike: str = "findings") -> Tensor:
    """What says how alike the pairs of a batch are, a row each: their findings, or which words their captions hold."""
    if "text" not in batch.targets:
        raise ModelError("a contrastive objective met a batch without captions", "BAD_RECIPE", "its data sets need conversations of kind caption, report or facts")
    if alike == "words":
        told = batch.targets["text"]
        held = torch.zeros(len(told["ids"]), WORDS, device=told["ids"].device)
        return held.scatter_add_(1, told["ids"] % WORDS, told["attention"].float()).clamp_(max=1)
    if alike != "findings":
        raise ModelError(f"pairs are alike by findings or by words, not by {alike!r}", "BAD_RECIPE")
    return batch.targets["labels"][batch.targets["text"]["image"]]


def _clip(model: MedVLM, image: Tensor, text: Tensor, labels: None, tile: int | None = None) -> dict[str, Tensor]:
    return {"clip": clip_loss(image, text, model.heads["contrast"].scale(), tile)}


def _siglip(model: MedVLM, image: Tensor, text: Tensor, labels: None, tile: int | None = None) -> dict[str, Tensor]:
    head = model.heads["contrast"]
    return {"siglip": siglip_loss(image, text, head.scale(), head.logit_bias, tile)}


def _soft(model: MedVLM, image: Tensor, text: Tensor, labels: Tensor, tile: int | None = None, temperature: float | None = None) -> dict[str, Tensor]:
    return {"soft": soft_loss(image, text, model.heads["contrast"].scale(), labels, tile, temperature)}


@parts.carries(vectors=vectors, between=_clip)
def clip(model: MedVLM, batch: Batch, out: Output, tile: int | None = None) -> dict[str, Tensor]:
    """Each picture picks its caption out of the batch, of all processes, and each caption its picture (:func:`clip_loss`)."""
    return _clip(model, *vectors(model, batch, out), None, tile)


@parts.carries(vectors=vectors, between=_siglip)
def siglip(model: MedVLM, batch: Batch, out: Output, tile: int | None = None) -> dict[str, Tensor]:
    """Each pair of a picture and a caption is told apart on its own (:func:`siglip_loss`); the head is of kind "siglip"."""
    return _siglip(model, *vectors(model, batch, out), None, tile)


@parts.carries(vectors=vectors, labels=_pair_labels, between=_soft)
def soft(model: MedVLM, batch: Batch, out: Output, tile: int | None = None, temperature: float | None = None, alike: str = "findings") -> dict[str, Tensor]:
    """As :func:`clip`, with targets spread over like cases (:func:`soft_loss`): by their labels, batch.targets["labels"], or, with
    ``alike="words"``, by the tokens that their reports share."""
    return _soft(model, *vectors(model, batch, out), _pair_labels(batch, alike), tile, temperature)


def _places(model: MedVLM, batch: Batch) -> dict[str, int]:
    """FCOS takes its means over the cells that are to find an object; the objects stand for them."""
    marked = batch.targets.get("boxes")
    objects = 0 if marked is None else max(len(marked["label"]), int(marked["told"].any()))
    asked = batch.seg is not None and len(batch.seg)
    present = batch.targets["present"] if asked else torch.zeros(0)
    return {**dict.fromkeys(("boxes", "box_edges", "box_centres"), objects), "place_present": len(present), "place": int(present.bool().sum())}


@parts.carries(count=_places)
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
    features = _seen(model, batch, out)
    if head.dense is not None and "boxes" in batch.targets and batch.targets["boxes"]["told"].any():
        losses |= _objects(head, features, batch.targets["boxes"])
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


def _objects(head, features: Features, target: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's FCOS losses on the pictures whose objects are all marked; the head looks at no others."""
    told = target["told"].nonzero()[:, 0].tolist()
    boxes = head(features._replace(levels=tuple(level[told] for level in features.levels)))
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
    flat = {k: v.float().flatten(2).transpose(1, 2) for k, v in flat.items()}
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


def find(names: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """{name: objective} of "lm+mask+classify", in order: those of this file, and those of heads that bring an ``objective``.

    options: {name: {argument: value}}.

    Raises:
        ModelError: BAD_RECIPE for a name or an argument that there is not, with those there are; for two contrastive ones.
    """
    known = {f.__name__: f for f in (lm, mask, outline, classify, clip, siglip, soft, box)}
    brought, found = parts.names("heads", "objective"), {}
    for name in names.split("+"):
        objective = known.get(name) or (name in brought and getattr(parts.find("heads", name, "objective"), "objective", None))
        if not objective:
            raise ModelError(f"there is no objective {name!r}; there are: {', '.join((*known, *brought))}", "BAD_RECIPE")
        found[name] = _with(objective, name, (options or {}).get(name, {}))
    if unused := (options or {}).keys() - found.keys():
        raise ModelError(f"options for {', '.join(sorted(unused))}, but the objective is {names}", "BAD_RECIPE")
    if len(apart := [n for n, f in found.items() if hasattr(f, "vectors")]) > 1:
        raise ModelError(f"a stage has one contrastive objective, not {' and '.join(apart)}", "BAD_RECIPE")
    if apart and (hiding := [n for n, f in found.items() if hasattr(f, "before")]):
        raise ModelError(f"{hiding[0]} hides from {apart[0]} what it is to see", "BAD_RECIPE", "give each a stage of its own")
    return found


def _with(objective, name: str, options: Mapping[str, Any]):
    if not options:
        return objective
    takes = list(inspect.signature(objective).parameters)[3:]
    if unknown := [k for k in options if k not in takes]:
        raise ModelError(f"objective {name} takes no {unknown[0]!r}; it takes: {', '.join(takes) or 'no options'}", "BAD_RECIPE")
    made = functools.partial(objective, **options)
    for attribute, value in vars(objective).items():
        mine = {k: v for k, v in options.items() if k in inspect.signature(value).parameters} if attribute in ("between", "labels") else {}
        setattr(made, attribute, functools.partial(value, **mine) if mine else value)
    return made


def _seen(model: MedVLM, batch: Batch, out: Output) -> Features:
    """The features of the batch's pictures; where several encoders see each of them, those of the first, which heads read."""
    first = next(iter(model.encoders))
    if len(out.features) > 1 and first in out.features and len(out.features[first].tokens) == len(batch.targets["labels"]):
        return out.features[first]
    if len(out.features) > 1:
        raise ModelError(f"an objective takes pictures of one encoder a batch, not of {', '.join(out.features)}", "BAD_RECIPE",
                         "mix only data sets that one encoder sees")  # fmt: skip
    (features,) = out.features.values()
    return features
