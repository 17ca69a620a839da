"""Outlines of named targets: Dice, IoU, NSD, HD95, ASSD and volume on the image's own grid, and whether absent ones stay empty."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import GeometryError, UsageError
from ..sample import Mask, Prediction, Sample
from .base import Task, check_pairs, cluster
from .statistics import Score, auroc, mean_score, statistic_score, surest_wrong
from .surfaces import surfaces

TOLERANCE = 1.0
"""Of NSD where no other is given, mm (px where the spacing is unknown). Source: MetricsReloaded, ``pairwise_measures.py``."""
UNITS = {"Dice": "", "IoU": "", "NSD": "", "NSD px": "", "HD95": "mm", "HD95 px": "px", "ASSD": "mm", "ASSD px": "px", "volume error": "ml",
         "area error": "mm²", "volume error px": "px", "area error px": "px", "relative volume error": ""}  # fmt: skip
"""{metric: its unit}; fractions have none. Where the spacing is unknown the names end in px, so that pixels never pass for mm."""
CASES = ("both drawn", "both empty", "reference empty", "prediction empty", "failed", "other grid")
"""What a case can be; each is counted. failed: an error, or no mask of this target. other grid: a mask that does not fit the image."""


@dataclass(frozen=True)
class Rule:
    """What a convention says where there is nothing to measure.

    both, false, missed: (Dice, IoU, NSD, distances) where both masks, only the reference or only the prediction is empty;
    NaN excludes the case, infinity is the diagonal of the image.
    """

    both: tuple[float, float, float, float]
    false: tuple[float, float, float, float]
    missed: tuple[float, float, float, float]
    surface: str = "voxel"


NAN, WORST = math.nan, math.inf
RULES = {
    "medvlm": Rule((1, 1, 1, 0), (0, 0, 0, WORST), (0, 0, 0, WORST)),
    "surfel": Rule((1, 1, 1, 0), (0, 0, 0, WORST), (0, 0, 0, WORST), "surfel"),
    "metrics-reloaded": Rule((1, NAN, 1, 0), (0, 0, 0, WORST), (0, 0, 0, WORST)),
    "brats": Rule((1, 1, 1, 0), (0, 0, 0, 373.1287), (0, 0, 0, 373.1287)),
    "nnunet": Rule((NAN, NAN, NAN, NAN), (0, 0, NAN, NAN), (0, 0, NAN, NAN)),
    "monai": Rule((NAN, NAN, NAN, NAN), (NAN, NAN, 0, NAN), (0, 0, 0, NAN)),
}
CONVENTIONS = {
    "medvlm": "voxel surfaces; both masks empty: Dice, IoU and NSD 1, distances 0; one empty: 0, distances the image's diagonal",
    "surfel": "as medvlm, but surface elements weighted by their area, as DeepMind's surface-distance",
    "metrics-reloaded": "voxel surfaces; as medvlm, but IoU of two empty masks excluded",
    "brats": "voxel surfaces; as medvlm, but distances 373.1287 where one mask is empty (the diagonal of its own 240 x 240 x 155 mm)",
    "nnunet": "voxel surfaces; both masks empty: excluded; one empty: Dice and IoU 0, NSD and distances excluded, so misses leave them",
    "monai": "voxel surfaces; reference empty: Dice, IoU and distances excluded (ignore_empty), NSD 0 unless both are; missed: 0, distances excluded",
}
"""{name: what it means}. Sources: MetricsReloaded and nnU-Net v2 ``compute_metrics``; the BraTS leaderboards; monai.metrics 1.6."""
PIECE = 1 << 16
"""Voxels of a label map that are counted at a time."""
FAILED = "an error, a missing mask or one of another grid is a miss (0; distances of a miss, or the diagonal), also where the target is absent"
OVER_LABELS = "mean over labels of the mean over cases"


def dice(predicted: np.ndarray, reference: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|); 1 when both are empty, 0 when only one is.

    Source: Dice 1945, Ecology 26:297. The empty case is decided here, not left as NaN.

    Raises:
        GeometryError: GRID_MISMATCH when the shapes differ.
    """
    a, b = np.asarray(predicted, bool), np.asarray(reference, bool)
    _same_grid(a, b)
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 1.0 if total == 0 else 2 * np.count_nonzero(a & b) / total


def dice_table(predicted: np.ndarray, reference: np.ndarray, count: int) -> np.ndarray:
    """(count,) Dice of each label of two label maps, the background (0) too; 1 where neither map has the label.

    One pass over both maps, in pieces that stay in the processor's cache.

    Raises:
        GeometryError: GRID_MISMATCH. UsageError: BAD_ARGUMENT for maps that hold anything but whole numbers from 0 to count - 1.
    """
    a, b = np.asarray(predicted), np.asarray(reference)
    _same_grid(a, b)
    for m in (a, b):
        if not np.issubdtype(m.dtype, np.integer) or (m.size and not 0 <= m.min() <= m.max() < count):
            held = f"{m.dtype} from {m.min()} to {m.max()}" if m.size else str(m.dtype)
            raise UsageError(f"label maps hold whole numbers from 0 to {count - 1}, not {held}", "BAD_ARGUMENT")
    a, b = a.ravel(), b.ravel()
    kind = np.uint16 if count <= 256 else np.intp
    table = np.zeros(count * count, np.int64)
    for start in range(0, a.size, PIECE):
        pair = b[start : start + PIECE].astype(kind)
        pair *= count
        pair += a[start : start + PIECE].astype(kind, copy=False)
        table += np.bincount(pair, minlength=count * count)
    table = table.reshape(count, count)
    total = table.sum(0) + table.sum(1)
    return np.where(total == 0, 1.0, 2 * table.diagonal() / np.maximum(total, 1))


def measure(predicted: np.ndarray | None, reference: np.ndarray, spacing: Sequence[float] | None = None, tolerance: float = TOLERANCE,
            convention: str = "medvlm") -> dict[str, float]:  # fmt: skip
    """{metric: value} of one mask, named as in ``UNITS``; NaN where the convention excludes the case.

    Args:
        predicted, reference: (H, W) or (D, H, W); what is not zero is inside. predicted None: the model failed.
        spacing: mm along each axis; None: unknown, distances and sizes are in pixels.
        tolerance: of NSD, in the same unit.
        convention: one of ``CONVENTIONS``.

    Raises:
        GeometryError: GRID_MISMATCH when the shapes differ.
    """
    rule, b = RULES[convention], np.asarray(reference, bool)
    a = np.zeros_like(b) if predicted is None else np.asarray(predicted, bool)
    _same_grid(a, b)
    step = np.ones(b.ndim) if spacing is None else np.asarray(spacing, float)
    inside, truth = np.count_nonzero(a), np.count_nonzero(b)
    if inside and truth:
        both, s = np.count_nonzero(a & b), surfaces(a, b, spacing, rule.surface)
        values = (2 * both / (inside + truth), both / (inside + truth - both), s.nsd(tolerance), s.hausdorff(95), s.average())
    else:
        if predicted is None:
            said, inside = (0, 0, 0, WORST if math.isnan(rule.missed[3]) else rule.missed[3]), 0 if truth else b.size
        else:
            said = rule.missed if truth else rule.false if inside else rule.both
        far = float(np.linalg.norm(np.multiply(b.shape, step))) if said[3] == WORST else said[3]
        values = (*said[:3], far, far)
    px, what = " px" if spacing is None else "", "volume error" if b.ndim == 3 else "area error"
    size = float(step.prod()) / (1000 if b.ndim == 3 and spacing is not None else 1)
    names = ("Dice", "IoU", f"NSD{px}", f"HD95{px}", f"ASSD{px}", what + px, "relative volume error")
    off = abs(inside - truth)
    return {n: float(v) for n, v in zip(names, (*values, off * size, off / truth if truth else NAN))}


def _same_grid(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise GeometryError(f"the predicted mask is {a.shape} but the reference is {b.shape}", "GRID_MISMATCH")


@dataclass(frozen=True)
class Case:
    """One target of one sample. chance: the model's probability that it is present, None where it gave none for it alone."""

    id: str
    cluster: Hashable
    label: str
    kind: str
    present: bool
    drawn: bool
    chance: float | None
    values: dict[str, float]


def cases(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str, tolerances: Mapping[str, float]) -> list[Case]:
    """Every mask of the samples beside the predicted one of its image and label (several of one label in their order)."""
    found: list[Case] = []
    for sample, prediction in zip(samples, predictions):
        given: dict[tuple[str, str], list[Mask]] = defaultdict(list)
        for mask in prediction.masks if prediction.error is None else ():
            given[mask.image, mask.label].append(mask)
        for n, mask in enumerate(sample.masks):
            truth = np.asarray(mask.array, bool)
            drawn = given[mask.image, mask.label].pop(0).array if given[mask.image, mask.label] else None
            other = (prediction.error or "").startswith("GRID_MISMATCH") or (drawn is not None and np.shape(drawn) != truth.shape)
            drawn = None if other or drawn is None else np.asarray(drawn, bool)
            present, some = bool(truth.any()), drawn is not None and bool(drawn.any())
            if drawn is None:
                kind = "other grid" if other else "failed"
            else:
                kind = {(True, True): "both drawn", (False, False): "both empty", (False, True): "reference empty", (True, False): "prediction empty"}[present, some]
            image = sample.images.get(mask.image)
            values = measure(drawn, truth, image.spacing if image is not None else None, tolerances.get(mask.label, TOLERANCE), convention)
            alone = len(sample.masks) == 1
            found.append(Case(sample.id if alone else f"{sample.id}/{n} {mask.label}", cluster(sample), mask.label, kind, present, some,
                              prediction.probability if alone and drawn is not None else None, values))  # fmt: skip
    return found


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str = "medvlm",
          tolerances: Mapping[str, float] | None = None) -> list[Score]:  # fmt: skip
    """Every metric over all labels and by label (``slice="label=left lung"``), the count of each kind of case, and presence.

    tolerances: {label: of NSD, mm}, else ``TOLERANCE``.
    """
    check_pairs(samples, predictions)
    if convention not in RULES:
        raise UsageError(f"no convention {convention!r}; there are {', '.join(RULES)}", "BAD_ARGUMENT")
    tolerances = tolerances or {}
    found = cases(samples, predictions, convention, tolerances)
    about = f"{convention}: {CONVENTIONS[convention]}; {FAILED}"
    scores: list[Score] = []
    for name, unit in UNITS.items():
        if any(name in c.values for c in found):
            values = [c.values.get(name, NAN) for c in found]
            extra = {"NSD": "; tolerance {} mm", "NSD px": "; tolerance {} px"}.get(name, "")
            tell = lambda label, extra=extra: about + extra.format(f"{tolerances.get(label, TOLERANCE):g}" if label else _told(tolerances))  # noqa: E731
            scores += by_label(name, found, values, tell, unit=unit, better="lower" if "error" in name or unit else "higher")
    kinds = Counter(c.kind for c in found)
    scores += [Score(k, float(kinds[k]), len(found), unit="cases", better="neither", convention="how many of the n cases are of this kind") for k in CASES]
    return scores + presence(found)


def _told(tolerances: Mapping[str, float]) -> str:
    return ", ".join([f"{TOLERANCE:g}", *(f"{label} {t:g}" for label, t in sorted(tolerances.items()))])


def by_label(name: str, found: Sequence[Case], values: Sequence[float], tell: Callable[[str | None], str], **about: Any) -> list[Score]:
    """The mean over labels of the mean over cases, then that of each label; NaN is excluded and counted.

    tell: (label, or None for all of them) -> the convention.
    """
    array = np.asarray(values, float)
    known = np.flatnonzero(np.isfinite(array))
    labels = list(dict.fromkeys(c.label for c in found))
    code = np.array([labels.index(found[i].label) for i in known], int)
    kept = array[known]

    def mean_of_means(i: np.ndarray) -> float:
        sums, counts = np.bincount(code[i], kept[i], len(labels)), np.bincount(code[i], minlength=len(labels))
        return float((sums[counts > 0] / counts[counts > 0]).mean())

    def one(label: str) -> Score:
        chosen = [i for i, c in enumerate(found) if c.label == label]
        return mean_score(name, array[chosen], [found[i].cluster for i in chosen], [found[i].id for i in chosen], slice=f"label={label}",
                          convention=tell(label), **about)  # fmt: skip

    parts = [one(label) for label in labels]
    if len(labels) == 1:
        return [replace(parts[0], slice="all", convention=tell(None)), *parts]
    whole = statistic_score(name, mean_of_means, [found[i].cluster for i in known], [found[i].id for i in known],
                            excluded=len(found) - len(known), convention=f"{tell(None)}; {OVER_LABELS}", **about)  # fmt: skip
    return [whole, *parts]


def presence(found: Sequence[Case]) -> list[Score]:
    """Is a target drawn where it is present, and left empty where it is absent? Detection rate, false-mask rate, AUROC."""
    miss = [c.kind in ("failed", "other grid") for c in found]
    scores: list[Score] = []
    if any(c.present for c in found):
        detected = [float(c.drawn) if c.present else NAN for c in found]
        scores += by_label("detection rate", found, detected, lambda _: "share of present targets with a voxel drawn anywhere; a failure is a miss")
    if not all(c.present for c in found):
        wrong = [NAN if c.present else float(c.drawn or m) for c, m in zip(found, miss)]
        scores += by_label("false-mask rate", found, wrong, lambda _: "share of absent targets with a voxel drawn; a failure counts as one", better="lower")
    usable = {label for label in {c.label for c in found} if {c.present for c in found if c.label == label} == {True, False}}
    rated = [c for c in found if c.label in usable]
    if not any(c.chance is not None for c in rated):
        return scores
    truth, labels = np.array([c.present for c in rated]), np.array([c.label for c in rated])
    chance = surest_wrong(np.array([NAN if c.chance is None else c.chance for c in rated], float), truth)

    def mean_auroc(i: np.ndarray) -> float:
        each = [auroc(chance[i][labels[i] == label], truth[i][labels[i] == label]) for label in sorted(usable)]
        return float(np.nanmean(each)) if np.isfinite(each).any() else NAN

    rule = "probability of presence, present against absent targets; none given ranks on the wrong side"
    about = {"chance": 0.5, "excluded": len(found) - len(rated)}
    scores.append(statistic_score("presence AUROC", mean_auroc, [c.cluster for c in rated], [c.id for c in rated], convention=f"{rule}; mean over labels", **about))
    for label in sorted(usable):
        i = np.flatnonzero(labels == label)
        scores.append(statistic_score("presence AUROC", lambda k, i=i: auroc(chance[i[k]], truth[i[k]]), [rated[k].cluster for k in i],
                                      [rated[k].id for k in i], slice=f"label={label}", convention=rule, chance=0.5))  # fmt: skip
    return scores


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """One sample a mask, so that a probability, an error and a score are those of one target."""
    found: list[Sample] = []
    for sample in read(split):
        for n, mask in enumerate(sample.masks):
            name = sample.id if len(sample.masks) == 1 else f"{sample.id}/{n} {mask.label}"
            found.append(replace(sample, id=name, masks=(mask,), verb="segment"))
    return found


TASK = Task(prepare, score, CONVENTIONS, rank=2)
