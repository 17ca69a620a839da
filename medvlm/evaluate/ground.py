"""Where a named thing is: box IoU, mAP, pointing and masks of a phrase, and the sentences of grounded reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..sample import Prediction, Region, Sample, Sentence, Turn, box_of
from .base import Task, check_pairs, mean_of, statistic_of
from .segment import dice
from .statistics import Score

OVERLAP = 0.5
"""IoU from which a box counts as found, in accuracy and mAP. Source: Everingham et al. 2010, IJCV 88:303 (PASCAL VOC)."""
ENTAILED = 0.5
"""A sentence's boxes are borne out when more than this share of their area lies in the boxes of its evidence.
Source: microsoft/RadFact ``metric/radfact.py`` (``box_precision_threshold``); Bannur et al. 2024, arXiv:2406.04449 (MAIRA-2).
"""
CONVENTIONS = {
    "medvlm": "boxes half-open in pixels; the most probable region counts, none given is probability 1; an error or no region is a miss",
}


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """One sample an image and label that has boxes or a mask; the label is the phrase that is asked for.

    What several samples of one image say of one label (its boxes with each question, its mask) becomes one sample.
    """
    samples, found = list(read(split)), {}
    alias: dict[Hashable, Hashable] = {}
    for s in samples:
        for image, label in dict.fromkeys([(r.image, r.label) for r in s.regions] + [(m.image, m.label) for m in s.masks]):
            if image not in s.images or not label:
                continue
            names = [("image", id(s.images[image]), label)] + ([("row", s.meta["row"], image, label)] if s.meta.get("row") else [])
            key = next((alias[n] for n in names if n in alias), names[0])
            alias |= dict.fromkeys(names, key)
            mine = replace(s, regions=tuple(r for r in s.regions if (r.image, r.label) == (image, label)),
                           masks=tuple(m for m in s.masks if (m.image, m.label) == (image, label)))  # fmt: skip
            if key in found:
                was = found[key]
                found[key] = replace(was, regions=was.regions or mine.regions, masks=was.masks or mine.masks)
                continue
            where = f"{s.meta.get('row') or s.id}@{label}"
            found[key] = replace(mine, id=where, images={image: s.images[image]}, turns=(Turn("user", label),), choices=None, group=None, verb="ground")
    targets, seen = [], {}
    for t in found.values():  # one label on two images of a sample
        seen[t.id] = seen.get(t.id, 0) + 1
        targets.append(replace(t, id=f"{t.id}#{seen[t.id]}") if seen[t.id] > 1 else t)
    return targets


@dataclass(frozen=True)
class Truth:
    """boxes: (N, 2, rank), those that have a size; flat: how many had none; mask: None where none is known."""

    image: str
    boxes: np.ndarray
    flat: int
    mask: np.ndarray | None

    @property
    def absent(self) -> bool:
        return not len(self.boxes) and not self.flat


def truth_of(sample: Sample) -> Truth:
    """The reference of a sample of :func:`prepare`: its boxes, else the box around each mask; its masks joined."""
    drawn = [np.asarray(m, bool) for m in (*(m.array for m in sample.masks), *(r.mask for r in sample.regions)) if m is not None]
    given = [r.box for r in sample.regions if r.box is not None] or [box_of(m) for m in drawn]
    boxes = [np.asarray(b, float) for b in given if b is not None]
    good = [b for b in boxes if np.isfinite(b).all() and (b[1] > b[0]).all()]
    rank = len(next(iter(sample.images.values())).shape) - 1 if sample.images else 2
    image = next((x.image for x in (*sample.regions, *sample.masks)), "")
    return Truth(image, np.array(good).reshape(len(good), 2, rank), len(boxes) - len(good), np.logical_or.reduce(drawn) if drawn else None)


def answered(prediction: Prediction, image: str, rank: int) -> list[tuple[float, np.ndarray | None, Region]]:
    """(probability, box (2, rank) or None where it lies on another image, has none or one of another rank, region), most probable first."""
    found = []
    for r in prediction.regions if prediction.error is None else ():
        box = r.box if r.box is not None else box_of(np.asarray(r.mask, bool)) if r.mask is not None else None
        sure = 1.0 if r.probability is None else float(r.probability)
        found.append((sure if math.isfinite(sure) else 0.0, None if box is None or r.image != image or len(box[0]) != rank else np.asarray(box, float), r))
    return sorted(found, key=lambda x: -x[0])


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) intersection over union of boxes (N, 2, rank) and (M, 2, rank); 0 where a box has no size."""
    inner = np.prod(np.clip(np.minimum(a[:, None, 1], b[None, :, 1]) - np.maximum(a[:, None, 0], b[None, :, 0]), 0, None), -1)
    sizes = [np.prod(np.clip(x[:, 1] - x[:, 0], 0, None), -1) for x in (a, b)]
    union = sizes[0][:, None] + sizes[1][None] - inner
    return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)


def covered(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Exact size of the union of boxes a (N, 2, rank), of the union of b, and of what both cover."""
    edges = [np.unique(np.concatenate([a[..., i].ravel(), b[..., i].ravel()])) for i in range(a.shape[-1])]
    cells = [np.zeros([max(0, len(e) - 1) for e in edges], bool) for _ in (a, b)]
    for filled, boxes in zip(cells, (a, b)):
        for low, high in boxes:
            filled[tuple(slice(*np.searchsorted(e, (l, h))) for e, l, h in zip(edges, low, high))] = True
    size = np.ones(())
    for e in edges:
        size = np.multiply.outer(size, np.diff(e))
    return float(size[cells[0]].sum()), float(size[cells[1]].sum()), float(size[cells[0] & cells[1]].sum())


def matches(boxes: Sequence[np.ndarray | None], reference: np.ndarray) -> list[bool]:
    """Which boxes, most probable first, find a reference box that is still free: each takes the one it overlaps most, from ``OVERLAP``.

    Source: Lin et al. 2014 (COCO), ``pycocotools.cocoeval``: the best among those not yet taken.
    """
    free, found = np.ones(len(reference), bool), []
    for box in boxes:
        iou = box_iou(box[None], reference)[0] * free if box is not None and len(reference) else np.zeros(0)
        best = int(iou.argmax()) if len(iou) else 0
        hit = bool(len(iou) and iou[best] >= OVERLAP)
        if hit:
            free[best] = False
        found.append(hit)
    return found


def average_precision(probability: np.ndarray, hit: np.ndarray, total: float, weight: np.ndarray | None = None) -> float:
    """Area under the precision-recall curve with all-point interpolation; NaN where there is nothing to find.

    Regions of equal probability count together, so that their order decides nothing. weight: how often each was drawn.
    Source: Everingham et al. 2015, IJCV 111:98, section 4.2 (VOC 2010 on): the area under precision made non-increasing.
    """
    if total <= 0:
        return float("nan")
    w = np.ones(len(hit)) if weight is None else weight
    order = np.argsort(-probability, kind="stable")
    p, right, all_ = probability[order], np.cumsum((w * hit)[order]), np.cumsum(w[order])
    last = np.flatnonzero(np.append(p[1:] != p[:-1], True)) if len(p) else np.zeros(0, int)
    last = last[all_[last] > 0]
    precision = np.maximum.accumulate((right[last] / all_[last])[::-1])[::-1]
    return float((np.diff(right[last], prepend=0) / total * precision).sum())


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str = "medvlm") -> list[Score]:
    """Best-box IoU, accuracy, pointing, mAP and mask Dice of what is there, and how often a region is given for what is not."""
    check_pairs(samples, predictions)
    truths = [truth_of(s) for s in samples]
    given = [answered(p, t.image, t.boxes.shape[-1]) for p, t in zip(predictions, truths)]
    about = f"{convention}: {CONVENTIONS[convention]}"
    top = [g[0][1] if g else None for g in given]
    iou = [float("nan") if not len(t.boxes) else 0.0 if b is None else float(box_iou(b[None], t.boxes).max()) for b, t in zip(top, truths)]
    flat = sum(t.flat for t in truths)
    rule = f"{about}; reference boxes without size left out ({flat})"
    scores = [
        mean_of("box IoU", samples, iou, convention=f"{rule}; the most probable box against the reference box it overlaps most"),
        mean_of(f"accuracy at IoU {OVERLAP:g}", samples, [v if math.isnan(v) else float(v >= OVERLAP) for v in iou],
                convention=f"{rule}; share of phrases whose most probable box has that IoU or more"),
        _mean_ap(samples, truths, given, rule),
    ]  # fmt: skip
    pointed = [_pointed(b, t) for b, t in zip(top, truths)]
    chances = [_chance(s, t) for s, t, v in zip(samples, truths, pointed) if not math.isnan(v)]
    scores.append(mean_of("pointing accuracy", samples, pointed, chance=float(np.mean(chances)) if chances and None not in chances else None,
                          convention=f"{rule}; the centre of the most probable box lies in the reference (its mask, where it has one); chance: any pixel"))  # fmt: skip
    if any(t.mask is not None and t.mask.any() for t in truths):
        scores.append(mean_of("mask Dice", samples, [_dice(g, t) for g, t in zip(given, truths)],
                              convention=f"{about}; all regions joined, one without a mask filled as its box"))  # fmt: skip
    if any(t.absent for t in truths):
        false = [float("nan") if not t.absent else float(p.error is not None or any(x[0] >= 0.5 for x in g)) for p, g, t in zip(predictions, given, truths)]
        scores.append(mean_of("false-region rate", samples, false, better="lower",
                              convention="share of absent phrases given a region of probability 0.5 or more; an error counts as one"))  # fmt: skip
    if flat:
        scores.append(Score("reference boxes without size", float(flat), sum(len(t.boxes) + t.flat for t in truths), unit="boxes", better="neither",
                            convention="left out of every score here"))  # fmt: skip
    return scores


def _mean_ap(samples: Sequence[Sample], truths: Sequence[Truth], given: Sequence[list], rule: str) -> Score:
    names = [s.question for s in samples]
    labels = sorted({n for n, t in zip(names, truths) if len(t.boxes)})
    known = [len(t.boxes) > 0 or not t.flat for t in truths]  # whether a box is right is not known where the reference has no size
    code = np.array([labels.index(n) if n in labels and k else -1 for n, k in zip(names, known)])
    count = np.array([len(t.boxes) for t in truths], float)
    rows = [(i, x[0], hit) for i, (g, t) in enumerate(zip(given, truths)) for x, hit in zip(g, matches([x[1] for x in g], t.boxes))]
    owner, sure, hits = np.array([r[0] for r in rows], int), np.array([r[1] for r in rows], float), np.array([r[2] for r in rows], float)

    def mean_ap(i: np.ndarray) -> float:
        drawn = np.bincount(i, minlength=len(samples)).astype(float)
        of = [code[owner] == k for k in range(len(labels))]
        each = [average_precision(sure[o], hits[o], float((drawn * count)[code == k].sum()), drawn[owner[o]]) for k, o in enumerate(of)]
        return float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")

    return statistic_of(f"mAP at IoU {OVERLAP:g}", samples, mean_ap, excluded=int((code < 0).sum()),
                        convention=f"{rule}; area under precision over recall of each label, all points, best free box first; mean over labels")  # fmt: skip


def _pointed(box: np.ndarray | None, truth: Truth) -> float:
    if truth.mask is None and not len(truth.boxes) or truth.mask is not None and not truth.mask.any():
        return float("nan")
    if box is None or not np.isfinite(box).all():
        return 0.0
    centre = box.mean(0)
    if truth.mask is None:
        return float(any((low <= centre).all() and (centre < high).all() for low, high in truth.boxes))
    at = np.floor(centre).astype(int)
    return float((at >= 0).all() and (at < truth.mask.shape).all() and truth.mask[tuple(at)])


def _chance(sample: Sample, truth: Truth) -> float | None:
    """The share of the image that the reference covers."""
    if truth.mask is not None:
        return float(truth.mask.mean())
    size = math.prod(next(iter(sample.images.values())).shape[1:]) if sample.images else 0
    return min(1.0, covered(truth.boxes, truth.boxes)[0] / size) if size else None


def _dice(given: Sequence[tuple[float, np.ndarray | None, Region]], truth: Truth) -> float:
    if truth.mask is None or not truth.mask.any():
        return float("nan")
    joined = np.zeros(truth.mask.shape, bool)
    for _, box, region in given:
        if region.image == truth.image and region.mask is not None and np.shape(region.mask) == joined.shape:
            joined |= np.asarray(region.mask, bool)
        elif region.mask is None and box is not None and np.isfinite(box).all():
            joined[tuple(slice(max(0, math.ceil(l - 0.5)), max(0, math.ceil(h - 0.5))) for l, h in box.T)] = True  # pixels whose centre lies inside
    return dice(joined, truth.mask)


def grounded_report(reference: Sequence[Sentence], predicted: Sequence[Sentence],
                    entails: Callable[[str, Sequence[str]], Sequence[int] | None]) -> dict[str, tuple[int, int]]:  # fmt: skip
    """How far the sentences of a report, and the boxes they rest on, are borne out by another's: {name: (how many, of how many)}.

    ========= ============================================== ===========================================
    score     how many                                       of how many
    ========= ============================================== ===========================================
    logical   sentences that the other report entails        all sentences
    grounding entailed sentences whose boxes are borne out   entailed sentences with boxes
    spatial   the same                                       all sentences with boxes, entailed or not
    ========= ============================================== ===========================================

    ``... precision`` is over the predicted sentences, ``... recall`` over those of the reference. Boxes are borne out when more
    than ``ENTAILED`` of their joint area lies in the boxes of the evidence on the same image; a mask counts as the box around it.
    A share with nothing to divide by is undefined: RadFact leaves such a report out of the mean over reports.

    Args:
        entails: (sentence, the other report's sentences) -> the indices of those it follows from, [] when it follows from
            the report as a whole, None when it does not follow.
    Source: Bannur et al. 2024, arXiv:2406.04449 (MAIRA-2); microsoft/RadFact, which paints boxes on 224 x 224 pixels (areas
        here are exact).
    """
    found: dict[str, tuple[int, int]] = {}
    for side, said, others in (("precision", predicted, reference), ("recall", reference, predicted)):
        texts = [s.text for s in others]
        evidence = [entails(s.text, texts) for s in said]
        entailed, boxed = [e is not None for e in evidence], [bool(_boxes(s.regions)) for s in said]
        borne = [b and e is not None and _borne_out(s.regions, [r for i in e for r in others[i].regions]) for s, e, b in zip(said, evidence, boxed)]
        found[f"logical {side}"] = (sum(entailed), len(said))
        found[f"grounding {side}"] = (sum(borne), sum(e and b for e, b in zip(entailed, boxed)))
        found[f"spatial {side}"] = (sum(borne), sum(boxed))
    return found


def _boxes(regions: Sequence[Region]) -> dict[str, list[np.ndarray]]:
    """{image: boxes that have a size}."""
    found: dict[str, list[np.ndarray]] = {}
    for r in regions:
        box = r.box if r.box is not None else box_of(np.asarray(r.mask, bool)) if r.mask is not None else None
        if box is not None and np.isfinite(b := np.asarray(box, float)).all() and (b[1] > b[0]).all():
            found.setdefault(r.image, []).append(b)
    return found


def _borne_out(regions: Sequence[Region], evidence: Sequence[Region]) -> bool:
    mine, theirs = _boxes(regions), _boxes(evidence)
    sizes = [covered(np.array(b), np.array(theirs.get(image, [])).reshape(-1, *b[0].shape)) for image, b in mine.items()]
    return sum(s[2] for s in sizes) > ENTAILED * sum(s[0] for s in sizes)


TASK = Task(prepare, score, CONVENTIONS, rank=4)
