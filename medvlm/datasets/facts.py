"""What a data set says of each image: what is there and what is not, where it lies and how many, which part of the body is shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..imaging.scan import Image, Volume, orientation, turned
from ..sample import Region, Sample
from .sentences import fact_of, spoken, word

ANNOTATED = ("consolidation", "ground-glass opacity", "pleural effusion", "pneumothorax", "endotracheal tube",
             "nasogastric tube", "central venous line")  # fmt: skip
"""What the annotators of the chest X-ray masks outlined wherever it was: no outline there means absent."""
MODALITY_NAMES = {
    "xray": "an X-ray", "ct": "a CT scan", "mr": "an MR scan", "pet": "a PET scan", "nm": "a nuclear medicine scan",
    "ultrasound": "an ultrasound image", "fundus": "a fundus photograph", "pathology": "a microscopy image",
    "endoscopy": "an endoscopy image", "dermoscopy": "a dermoscopy image", "oct": "an OCT scan",
}  # fmt: skip
PARTS = {
    "head": r"^(head|brain|skull)", "neck": r"^neck", "chest": r"^(chest|thorax|lung)", "abdomen": r"^abd", "pelvis": r"^pelvi",
    "eye": r"^(eye|retina|fundus)", "knee": r"^knee", "breast": r"^breast",
}  # fmt: skip
"""{body part: how data sets and DICOM's Body Part Examined write it}."""
REGIONS = {
    "head": r"brain|skull|cerebr|cerebell|eye|orbit|mandible",
    "chest": r"\b(lungs?|heart|atri|ventric|pulmon|trachea|airways?|bronch|o?esophag|ribs?|sternum|clavic|scapula|carina|diaphragm|mediastinum|"
             r"costal|brachiocephalic|subclavian|vertebrae t\d)",
    "abdomen": r"\b(liver|spleen|kidneys?|pancreas|stomach|gallbladder|duoden|colon|bowel|adrenal|portal vein|celiac|superior mesenteric|vertebrae l\d)",
    "pelvis": r"\b(urinary bladder|bladder|prostate|uterus|ovar|hips?|sacrum|gluteus)",
    "legs": r"\b(knee|tibia|fibula|patella|meniscus)",
}  # fmt: skip
"""{region, from the head down: its structures}."""
_EYE = re.compile(r"\b(eyes?|optic (dis[ck]|cup)|macula|fovea|retina)", re.I)
_CELL = re.compile(r"^((cell )?nucle(us|i)|[RW]BCs?|((red|white) )?blood cells?|platelets?|leu[ck]ocytes?|erythrocytes?|lymphocytes?)$", re.I)
_THORACIC = re.compile(r"consolidat|ground[- ]glass|pleura|pneumo(nia|thora)|cardiomegal|atelecta", re.I)
"""Findings of one place; what is seen through a microscope only."""
FAR = {"head": "brain", "pelvis": "urinary bladder", "legs": "knee joint"}
"""What stands for a region that an image surely does not reach."""
_HEIGHT = {"eye": 0, "head": 0, "neck": 1, "chest": 2, "breast": 2, "abdomen": 3, "pelvis": 4, "knee": 6}
"""Parts of the body, from the head down; what is asked after as wrong is at least two further."""
SHORT = 150.0
"""A volume that is no longer than this (mm, head to foot) reaches no region but those next to the ones it shows."""
_STRUCTURE = re.compile(
    "|".join(REGIONS.values()) + r"|aort|arter|vein|vena|trunk|lumen|annulus|junction|vessel|vertebra|spin(e|al)|\bdis[ck]s?\b|bone|muscle|autochthon|iliopsoas|"
    r"femur|humerus|thyroid|nerve|optic|macula|fovea|retina|skin|body|organ", re.I)  # fmt: skip
_LESION = re.compile(
    r"tumou?r|lesion|nodul|mass\b|cancer|carcinoma|metasta|opacit|consolid|effusion|pneumothora|o?edema|ha?emorrh|cyst|stone|polyp|ulcer|fractur|"
    r"infarct|embol|stenos|aneurysm|thromb|exudate|drusen|atelecta", re.I)  # fmt: skip
_DEVICE = re.compile(r"\btubes?\b|tubing|\blines?\b|catheter|\bleads?\b|\bprobes?\b|\bwires?\b|device|pacemaker|marker", re.I)
NORMAL = re.compile(r"^(normal|healthy|no[ _]findings?|no[ _]abnormalit\w+)$", re.I)
_MIDLINE = re.compile(r"spinal|spine|vertebra", re.I)
_SIDE = re.compile(r"\b(left|right)\b")
LUNGS = ("right", "left")
SCANS = ("xray", "ct", "mr", "pet", "nm")
"""They show whole parts of the body."""
FLAT = ("fundus", "pathology", "endoscopy", "dermoscopy", "ultrasound", "oct")
"""Pictures whose quarters are those of the picture as it is shown."""
MOST = 0.9
"""Share of a target that must lie in one quarter, or on one side, for that to be where it is."""
BOTH = 0.15
"""Share of what lies in the lungs that each must hold for a finding to be in both."""
TRUST = ("record", "outline", "box", "label", "report", "question")
"""Who is believed where two say differently."""


@dataclass(frozen=True, eq=False)
class Case:
    """One image and all that its samples say of it.

    outlines: {name in words: bool, the image's grid}; boxes: {name: drawn likewise}; corners: {name: the boxes themselves};
    counts: {name: how many}, where each was marked; reports: texts; questions: the samples that ask.
    """

    base: Sample
    name: str
    row: str
    image: Image | Volume
    outlines: dict[str, np.ndarray] = field(default_factory=dict)
    boxes: dict[str, np.ndarray] = field(default_factory=dict)
    labels: dict[str, float] = field(default_factory=dict)
    reports: tuple[str, ...] = ()
    corners: dict[str, list[tuple]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    questions: tuple[Sample, ...] = ()


def cases(samples: Iterable[Sample]) -> list[Case]:
    """The samples about each image taken together; those about several images, or none, are left out."""
    groups: dict[int, list[Sample]] = {}
    for s in samples:
        if len(s.images) == 1:
            groups.setdefault(id(next(iter(s.images.values()))), []).append(s)
    return [case_of(members) for members in groups.values()]


def case_of(members: Sequence[Sample]) -> Case:
    """What samples about the same images say together of the one that is outlined, or of the first; there is at least one of each."""
    first = members[0]
    marked = [area.image for s in members for area in (*s.masks, *s.regions)]
    image = next((first.images[i] for i in marked if i in first.images), next(iter(first.images.values())))
    row = str(first.meta.get("row") or first.id)
    several = first.meta.get("dataset") and first.id.startswith(f"{first.meta['dataset']}/")
    outlines: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for s in members:
        tally: dict[str, int] = {}
        for mask in s.masks:
            name = spoken(mask.label)
            if mask.label == s.question:  # the answer to a question, not a thing's name
                continue
            if mask.image != image.id or name in outlines and "observer" in mask.label:  # a second opinion is no second target
                continue
            outlines[name] = outlines[name] | mask.array if name in outlines else mask.array
            tally[name] = tally.get(name, 0) + (mask.count or 1)
            if mask.count is not None or tally[name] > 1:
                counts[name] = tally[name]
    boxes: dict[str, np.ndarray] = {}
    corners: dict[str, list[tuple]] = {}
    for region in first.regions:
        drawn = _drawn(region, image.shape[1:]) if region.image == image.id else None
        if drawn is not None:
            name = spoken(region.label)
            boxes[name] = boxes.get(name, False) | drawn
            corners.setdefault(name, []).append(region.box)
    counts |= {name: len(found) for name, found in corners.items()}
    reports = [s.answer for s in members if s.answer and not s.question and ("sections" in s.meta or s.verb == "report")]
    return Case(first, f"{first.meta['dataset']}/{row}" if several else row, row, image, outlines, boxes, dict(first.labels), tuple(dict.fromkeys(reports)),
                corners, counts, tuple(s for s in members if s.question and s.answer))  # fmt: skip


def _drawn(region: Region, shape: tuple[int, ...]) -> np.ndarray | None:
    """A box as pixels, None for one that holds no pixel."""
    if not region.box or len(region.box[0]) != len(shape) or any(b <= a for a, b in zip(*region.box)):
        return None
    array = np.zeros(shape, bool)
    array[tuple(slice(max(0, int(np.floor(a))), max(0, int(np.ceil(b)))) for a, b in zip(*region.box))] = True
    return array if array.any() else None


def structure(name: str) -> bool:
    """Whether an outline or box is of an anatomical structure rather than of a finding or a device."""
    return bool(_STRUCTURE.search(name)) and not (_LESION.search(name) or _DEVICE.search(name))


def statements(case: Case, outlined: Iterable[str], boxed: Iterable[str], label: Callable | None) -> Iterator[tuple[str, str, float]]:
    """(source, name, 1 | 0): all that is said of findings, structures and devices.

    outlined, boxed: names that the data set outlines, or boxes, wherever they are; so an image with outlines lacks the others.
    """
    yield from (("label", word(name), float(value)) for name, value in case.labels.items() if np.isfinite(value))
    yield from (("outline", name, float(array.any())) for name, array in case.outlines.items())
    yield from (("outline", name, 0.0) for name in (outlined if case.outlines else ()) if name not in case.outlines)
    boxes = {n for n in case.boxes if not structure(n)}
    yield from (("box", name, 1.0) for name in case.boxes)
    yield from (("box", name, 0.0) for name in (boxed if boxes else ()) if name not in boxes)
    if label is not None and case.image.modality == "xray":
        told = ((n, v) for text in case.reports for n, v in label(text).items())
        yield from (("report", word(name.lower()), float(value)) for name, value in told if value in (0, 1))


def stated(case: Case, annotated: Sequence[str] = (), label: Callable[[str], Mapping[str, float | None]] | None = None) -> dict[str, float]:
    """{name: 1 | 0} of findings, structures and devices; where two sources differ, by the first of ``TRUST`` that speaks.

    annotated: names (in words) that were outlined or boxed wherever they were. label: reads a report. The answers to yes/no
    questions about chest X-rays count too, and what their record says of a tube.
    """
    found: dict[str, dict[str, float]] = {}
    for source, name, value in statements(case, annotated, [n for n in annotated if not structure(n)], label):
        found.setdefault(name, {}).setdefault(source, value)
    if case.image.modality == "xray":
        if (tube := _labels(case).get("intubation_present")) in ("Y", "N"):
            found.setdefault("endotracheal tube", {})["record"] = float(tube == "Y")
        for s in case.questions:
            for name, value in fact_of(s.question, s.answer).items():
                found.setdefault(name, {}).setdefault("question", value)
    order = dict.fromkeys((*map(word, case.labels), *(n for n in annotated if "outline" in found.get(n, ())), *found))
    return {name: next(found[name][s] for s in TRUST if s in found[name]) for name in order if name in found}


def _labels(case: Case) -> Mapping[str, object]:
    """What the data set says in its own fields."""
    labels = case.base.meta.get("labels")
    return labels if isinstance(labels, Mapping) else {}


def part(case: Case) -> str | None:
    """The body part that the data, the header or all outlined structures name."""
    said = [case.base.meta.get("organ"), *(_labels(case).get(k) for k in ("organ", "location", "body_part")), case.image.info.get("body_part")]
    for text in (str(x).strip() for x in said if x):
        if found := next((part for part, pattern in PARTS.items() if re.search(pattern, text, re.I)), None):
            return found
    if case.image.modality == "fundus":
        return "eye"
    shown = regions(case)
    return shown.pop() if len(shown) == 1 and shown < PARTS.keys() else None


def regions(case: Case) -> set[str]:
    """Regions of the structures that are outlined or boxed."""
    names = [n for n, a in (*case.outlines.items(), *case.boxes.items()) if structure(n) and a.any()]
    return {region for region, pattern in REGIONS.items() for n in names if re.search(pattern, n, re.I)}


def apart(case: Case, there: set[str], shown: set[str]) -> bool:
    """Whether all of the regions ``there`` are at least two from one that is shown in a short volume, or from all shown in a picture."""
    image, order, nearest = case.image, list(REGIONS), max if isinstance(case.image, Volume) else min
    if isinstance(image, Volume) and np.abs(image.affine[2, :3]) @ np.array(image.shape[1:]) > SHORT:
        return False
    at = [order.index(r) for r in shown if r in order]
    return bool(at and there) and all(nearest(abs(order.index(t) - i) for i in at) >= 2 for t in there)


def elsewhere(case: Case, name: str) -> bool:
    """Whether this image surely cannot show the named: what lies in a far part of the body, or is seen in other kinds of picture."""
    there = {region for region, pattern in REGIONS.items() if re.search(pattern, name, re.I)} | ({"chest"} if _THORACIC.search(name) else set())
    if case.image.modality == "pathology":  # tissue of an organ is not the organ, but who asks may mean it
        return bool(_DEVICE.search(name) or _SIDE.search(name) or _EYE.search(name))
    if _CELL.search(name):
        return case.image.modality in (*SCANS, "fundus")
    if case.image.modality == "fundus":
        return not _EYE.search(name) and bool(there or _DEVICE.search(name))
    known = part(case)
    return case.image.modality in SCANS and apart(case, there, regions(case) | {{"eye": "head", "breast": "chest", "knee": "legs"}.get(known, known)})


def others(body_part: str) -> list[str]:
    """Parts of the body that an image of this one does not reach."""
    return [p for p, height in _HEIGHT.items() if abs(height - _HEIGHT[body_part]) >= 2]


def abnormal(case: Case, findings: Mapping[str, float]) -> bool | None:
    """Known to be ill from a finding that is there, known to be well from being called normal; else, or when both, unknown."""
    ill = any(v == 1 and not NORMAL.match(n) and not _DEVICE.search(n) and (n in map(word, case.labels) or _LESION.search(n)) for n, v in findings.items())
    normal = {v for n, v in findings.items() if NORMAL.match(n)}
    if ill:
        return None if 1.0 in normal else True
    return None if len(normal) != 1 else normal == {0.0}


@dataclass(frozen=True)
class Place:
    """Where a target lies. said: "in the {} lung"; true: the word that fits; options: it and those that surely do not."""

    said: str
    true: str
    options: tuple[str, ...]
    kind: str


def shares(case: Case, name: str) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(said, kind, {word: share}) for each way to say where an outlined or boxed target lies: "in the {} lung", "lung", {"right": 0.2, "left": 0.8}.

    Shares are those of the target that lie where the word says; nothing is said of a target whose name says its side.
    """
    array = case.outlines.get(name, case.boxes.get(name))
    if array is None or _SIDE.search(name) or not array.any():
        return
    if (held := _in_lungs(case, array, name)) is not None:
        yield "in the {} lung", "lung", held
    if (held := _beside_midline(case, array, name)) is not None:
        yield "on the patient's {} side", "side", held
    if (frame := _frame(case)) is not None:
        seen, rows, columns, where = frame
        plane = seen(array)
        high, wide = (n // 2 for n in plane.shape)
        yield f"in the {{}} quarter of the {where}", "quarter", {
            f"{r} {c}": float(plane[i, j].sum() / plane.sum()) for r, i in zip(rows, (slice(high), slice(-high, None))) for c, j in zip(columns, (slice(wide), slice(-wide, None)))
        }  # fmt: skip


def places(case: Case, name: str) -> Iterator[Place]:
    """Where an outlined or boxed target surely lies: nearly all of it."""
    for said, kind, held in shares(case, name):
        best = max(held, key=held.__getitem__)
        if 1 - held[best] < BOTH if kind == "lung" else held[best] >= MOST:
            yield Place(said, best, tuple(k for k in held if k == best or kind != "quarter" or not held[k]), kind)


def where(case: Case, name: str) -> str | None:
    """The first of :func:`places` in words, or "in both lungs"; None where it lies in none surely."""
    first = next(places(case, name), None)
    return "in both lungs" if side(case, name) == "both" else first and first.said.format(first.true)


def side(case: Case, name: str) -> str | None:
    """The patient's side on which an outlined or boxed finding or structure lies: "right", "left", "both" lungs; None where unknown."""
    array = case.outlines.get(name, case.boxes.get(name))
    if array is None or _SIDE.search(name) or _DEVICE.search(name) or not array.any():
        return None
    held = _in_lungs(case, array, name)
    if held is not None:
        return "both" if min(held.values()) >= BOTH else max(held, key=held.__getitem__)
    held = _beside_midline(case, array, name)
    return next((s for s in LUNGS if held[s] >= MOST), None) if held else None


def side_of(mask: np.ndarray, right: np.ndarray, left: np.ndarray, share: float = BOTH) -> str | None:
    """Side of the patient a target lies on: "both" when each lung holds at least ``share`` of what lies in the lungs.

    mask, right, left: bool arrays on one grid; right and left are the patient's lungs. None outside the lungs.
    """
    in_right, in_left = int((mask & right).sum()), int((mask & left).sum())
    total = in_right + in_left
    if total == 0:
        return None
    if min(in_right, in_left) >= share * total:
        return "both"
    return "right" if in_right > in_left else "left"


def _in_lungs(case: Case, array: np.ndarray, name: str) -> dict[str, float] | None:
    """{side: share of what lies in the lungs}; None of a structure or a device, without both lungs, or outside them."""
    right, left = (_union(case, s) for s in LUNGS)
    if structure(name) or _DEVICE.search(name) or right is None or left is None:
        return None
    counts = [int((array & lung).sum()) for lung in (right, left)]
    return {s: n / sum(counts) for s, n in zip(LUNGS, counts)} if sum(counts) else None


def _union(case: Case, side: str) -> np.ndarray | None:
    """The patient's lung of that side, from outlines, else from boxes."""
    for drawn in (case.outlines, case.boxes):
        found = [a for n, a in drawn.items() if re.search(r"\blung\b", n) and side in n and structure(n) and a.any()]
        if found:
            return np.logical_or.reduce(found)
    return None


def _beside_midline(case: Case, array: np.ndarray, name: str) -> dict[str, float] | None:
    """{side: share} of a volume's target to either side of the spine; None without an outlined spine."""
    spine = [a for n, a in case.outlines.items() if _MIDLINE.search(n) and not _SIDE.search(n) and a.any()]
    if not isinstance(case.image, Volume) or not spine or _MIDLINE.search(name):
        return None
    here = case.image.orientation
    across = np.arange(turned(array, here, "SPL").shape[-1])
    counts = [turned(a, here, "SPL").sum((0, 1)) for a in (np.logical_or.reduce(spine), array)]
    middle = counts[0] @ across / counts[0].sum()
    right = float(counts[1][across < middle].sum() / counts[1].sum())
    return {"right": right, "left": 1 - right}


def _frame(case: Case) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[str, str], tuple[str, str], str] | None:
    """(array -> counts in a plane, names of its upper and lower half, of its left and right half, what it is a quarter of).

    Sides are the patient's wherever there is a patient's side: by the affine, and in frontal X-rays, whose image left is the
    patient's right, by a view that says so. None where orientation is unknown.
    """
    image, own = case.image, "{}, by the patient's own sides"
    if isinstance(image, Volume):
        return lambda a: turned(a, image.orientation, "SPL").sum(0), ("front", "back"), ("right", "left"), own.format("scan")
    affine = image.info.get("affine")
    if affine is not None:
        here = orientation(np.asarray(affine, float))
        if here[0] in "SI":
            return lambda a: turned(a[None], here, "SPL").sum(0), ("front", "back"), ("right", "left"), own.format("slice")
        return None if here[0] in "LR" else (lambda a: turned(a[None], here, "PIL").sum(0), ("upper", "lower"), ("right", "left"), own.format("slice"))
    if image.modality in FLAT:
        return lambda a: a, ("upper", "lower"), ("left", "right"), "picture"
    if view(case):
        return lambda a: a, ("upper", "lower"), ("right", "left"), own.format("image")
    return None


def view(case: Case) -> str | None:
    """"PA" or "AP" of a frontal X-ray whose header or data set says so."""
    said = str(case.image.info.get("view") or _labels(case).get("view") or "").upper()[:2]
    return said if case.image.modality == "xray" and said in ("PA", "AP") else None


def plane(case: Case) -> str | None:
    """"axial", "coronal" or "sagittal" of a slice that has a place in the patient, or whose data set says so."""
    affine, said = case.image.info.get("affine"), str(_labels(case).get("plane") or "").strip().lower()
    if isinstance(case.image, Image) and affine is not None:
        return {"S": "axial", "I": "axial", "P": "coronal", "A": "coronal", "L": "sagittal", "R": "sagittal"}[orientation(np.asarray(affine, float))[0]]
    return said if said in ("axial", "coronal", "sagittal") else None
