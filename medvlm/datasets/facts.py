"""What a data set says of each image, as yes/no questions with their true answers: modality, organ, finding, abnormality, position."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..imaging.scan import Image, Volume, orientation, turned
from ..sample import Region, Sample
from .instruct import ANNOTATED, side_of, word

__all__ = ["ANNOTATED", "Ask", "Case", "asks", "cases"]

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
FAR = {"head": "brain", "pelvis": "urinary bladder", "legs": "knee joint"}
"""What stands for a region that an image surely does not reach."""
SHORT = 150.0
"""A volume that is no longer than this (mm, head to foot) reaches no region but those next to the ones it shows."""
_STRUCTURE = re.compile(
    "|".join(REGIONS.values()) + r"|aort|arter|vein|vena|trunk|lumen|annulus|junction|vessel|vertebra|spin(e|al)|\bdis[ck]s?\b|bone|muscle|autochthon|iliopsoas|"
    r"femur|humerus|thyroid|nerve|optic|macula|fovea|retina|skin|body|organ", re.I)  # fmt: skip
_LESION = re.compile(
    r"tumou?r|lesion|nodul|mass\b|cancer|carcinoma|metasta|opacit|consolid|effusion|pneumothora|o?edema|ha?emorrh|cyst|stone|polyp|ulcer|fractur|"
    r"infarct|embol|stenos|aneurysm|thromb|exudate|drusen|atelecta", re.I)  # fmt: skip
_DEVICE = re.compile(r"\btubes?\b|tubing|\blines?\b|catheter|\bleads?\b|\bprobes?\b|\bwires?\b|device|pacemaker|marker", re.I)
_NORMAL = re.compile(r"^(normal|healthy|no[ _]findings?|no[ _]abnormalit\w+)$", re.I)
_COUNTED = re.compile(r"\b(tube|line|catheter|device|pacemaker|lead|probe|wire|lesion|nodule|mass|tumou?r|fracture|cyst|polyp|stone|ulcer|effusion|"
                      r"pneumothorax|aneurysm|infarct)$", re.I)  # fmt: skip
_MIDLINE = re.compile(r"spinal|spine|vertebra", re.I)
_SIDE = re.compile(r"\b(left|right)\b")
_FLAT = ("fundus", "pathology", "endoscopy", "dermoscopy", "ultrasound", "oct")
"""Pictures whose quarters are those of the picture as it is shown."""
MOST = 0.9
"""Share of a target that must lie in one quarter, or on one side, for that to be where it is."""


@dataclass(frozen=True, eq=False)
class Case:
    """One image and all that its samples say of it. outlines: {name in words: bool, the image's grid}; boxes: {name: drawn likewise}."""

    base: Sample
    name: str
    row: str
    image: Image | Volume
    outlines: dict[str, np.ndarray] = field(default_factory=dict)
    boxes: dict[str, np.ndarray] = field(default_factory=dict)
    labels: dict[str, float] = field(default_factory=dict)
    reports: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """One question and its true answer. pool: its twin is a question of the same pool with the other answer; None where it wants none."""

    kind: str
    question: str
    yes: bool
    pool: str | None


def cases(samples: Iterable[Sample]) -> list[Case]:
    """The samples about each image taken together; those about several images, or none, are left out."""
    groups: dict[int, list[Sample]] = {}
    for s in samples:
        if len(s.images) == 1:
            groups.setdefault(id(next(iter(s.images.values()))), []).append(s)
    return [_case(members) for members in groups.values()]


def _case(members: Sequence[Sample]) -> Case:
    first = members[0]
    image = next(iter(first.images.values()))
    row = str(first.meta.get("row") or first.id)
    several = first.meta.get("dataset") and first.id.startswith(f"{first.meta['dataset']}/")
    outlines: dict[str, np.ndarray] = {}
    for mask in (m for s in members for m in s.masks):
        name = spoken(mask.label)
        outlines[name] = outlines[name] | mask.array if name in outlines else mask.array
    boxes: dict[str, np.ndarray] = {}
    for region in first.regions:
        drawn = _drawn(region, image.shape[1:])
        if drawn is not None:
            boxes[spoken(region.label)] = boxes.get(spoken(region.label), False) | drawn
    reports = [s.answer for s in members if s.answer and not s.question and ("sections" in s.meta or s.verb == "report")]
    return Case(first, f"{first.meta['dataset']}/{row}" if several else row, row, image, outlines, boxes, dict(first.labels), tuple(dict.fromkeys(reports)))


def _drawn(region: Region, shape: tuple[int, ...]) -> np.ndarray | None:
    """A box as pixels, None for one that holds no pixel."""
    if not region.box or len(region.box[0]) != len(shape):
        return None
    array = np.zeros(shape, bool)
    array[tuple(slice(max(0, int(np.floor(a))), max(0, int(np.ceil(b)))) for a, b in zip(*region.box))] = True
    return array if array.any() else None


def spoken(name: str) -> str:
    """A data set's name as one says it: "lung_upper_lobe_left" -> "left lung upper lobe", observers left out."""
    name = re.sub(r"\s+observer\s?\d+$", "", word(name))
    side = _SIDE.search(name)
    return f"{side[0]} {' '.join(_SIDE.sub(' ', name).split())}" if side and not name.startswith(side[0]) else name


def _article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") if _COUNTED.search(name) else ""


def structure(name: str) -> bool:
    """Whether an outline or box is of an anatomical structure rather than of a finding or a device."""
    return bool(_STRUCTURE.search(name)) and not (_LESION.search(name) or _DEVICE.search(name))


def asks(all_cases: Sequence[Case], kinds: Sequence[str], annotated: frozenset[str], label: Callable[[str], Mapping[str, float | None]] | None,
         seed: int) -> Iterator[tuple[Case, list[Ask]]]:  # fmt: skip
    """Each case with its questions, each question once; see :func:`medvlm.datasets.pairs.questions`."""
    modalities = sorted({c.image.modality for c in all_cases} & MODALITY_NAMES.keys())
    parts = {c.row: _part(c) for c in all_cases}
    shown = sorted({p for p in parts.values() if p})
    drawn = {n for c in all_cases for n in (*c.outlines, *c.boxes)}
    outlined = {n for c in all_cases for n in c.outlines} & annotated
    boxed = {n for c in all_cases for n in c.boxes if not structure(n)}
    for case in all_cases:
        lot = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed} {case.name}".encode()).digest()[:8]))
        told = _told(case, outlined, boxed, label)
        findings = {n: v for n, v in told.items() if n in map(word, case.labels) or n not in drawn or not structure(n)}
        found: list[Ask] = []
        if "modality" in kinds and case.image.modality in MODALITY_NAMES:
            found += _one_of("modality", "Is this {}?", case.image.modality, modalities, MODALITY_NAMES, lot)
        if "organ" in kinds:
            if parts[case.row]:
                found += _one_of("organ", "Is this an image of the {}?", parts[case.row], shown, {p: p for p in PARTS}, lot)
            here = {n: v for n, v in told.items() if n not in findings} | dict.fromkeys(_far(case), False)
            found += [Ask("organ", f"Does this image show the {n}?", bool(v), "organ shown") for n, v in here.items()]
        if "finding" in kinds:
            found += [Ask("finding", f"Does this image show {_article(n)}{n}?", bool(v), "finding") for n, v in findings.items() if not _NORMAL.match(n)]
        if "abnormality" in kinds and (ill := _abnormal(case, findings)) is not None:
            found.append(Ask("abnormality", "Does this image show any abnormality?", ill, None))
        if "position" in kinds:
            found += _positions(case, told)
        yield case, list({a.question: a for a in found}.values())


def _one_of(kind: str, question: str, true: str, there: Sequence[str], names: Mapping[str, str], lot: np.random.Generator) -> list[Ask]:
    """The true one, and as wrong ones those the data show elsewhere, or one by lot where they show none."""
    wrong = [x for x in there if x != true] or [str(lot.choice([x for x in names if x != true]))]
    return [Ask(kind, question.format(names[x]), x == true, kind) for x in (true, *wrong)]


def _told(case: Case, outlined: set[str], boxed: set[str], label: Callable | None) -> dict[str, float]:
    """{name: 1 | 0} of findings, structures and devices that is said, and not contradicted."""
    said: dict[str, set[float]] = {}
    for name, value in case.labels.items():
        if np.isfinite(value):
            said.setdefault(word(name), set()).add(float(value))
    for name, array in case.outlines.items():
        said.setdefault(name, set()).add(float(array.any()))
    for name in outlined - case.outlines.keys() if case.outlines else ():
        said.setdefault(name, set()).add(0.0)
    boxes = {n for n in case.boxes if not structure(n)}
    for name in case.boxes:
        said.setdefault(name, set()).add(1.0)
    for name in boxed - boxes if boxes else ():  # a data set of boxes marks all that it has a name for
        said.setdefault(name, set()).add(0.0)
    if label is not None and case.image.modality == "xray":
        for name, value in ((n, v) for text in case.reports for n, v in label(text).items()):
            if value in (0, 1):
                said.setdefault(word(name.lower()), set()).add(float(value))
    return {name: values.pop() for name, values in said.items() if len(values) == 1}


def _part(case: Case) -> str | None:
    """The body part that the data, the header or all outlined structures name."""
    labels = case.base.meta.get("labels")
    said = [case.base.meta.get("organ"), *(labels.get(k) for k in ("organ", "location", "body_part") if isinstance(labels, Mapping)), case.image.info.get("body_part")]
    for text in (str(x).strip() for x in said if x):
        if found := next((part for part, pattern in PARTS.items() if re.search(pattern, text, re.I)), None):
            return found
    if case.image.modality == "fundus":
        return "eye"
    regions = _regions(case)
    return regions.pop() if len(regions) == 1 and regions < PARTS.keys() else None


def _regions(case: Case) -> set[str]:
    names = [n for n, a in (*case.outlines.items(), *case.boxes.items()) if structure(n) and a.any()]
    return {region for region, pattern in REGIONS.items() for n in names if re.search(pattern, n, re.I)}


def _far(case: Case) -> list[str]:
    """Structures of ``FAR`` that lie at least two regions from a structure this image shows, and a short volume is all there is."""
    if not isinstance(case.image, Volume):
        return []
    height = np.abs(case.image.affine[2, :3]) @ np.array(case.image.shape[1:])
    at, order = [list(REGIONS).index(r) for r in _regions(case)], list(REGIONS)
    if height > SHORT:
        return []
    return [name for region, name in FAR.items() if at and max(abs(order.index(region) - i) for i in at) >= 2 and name not in case.outlines]


def _abnormal(case: Case, findings: Mapping[str, float]) -> bool | None:
    """Known to be ill from a finding that is there, known to be well from being called normal; else, or when both, unknown."""
    ill = any(v == 1 and not _NORMAL.match(n) and not _DEVICE.search(n) and (n in map(word, case.labels) or _LESION.search(n)) for n, v in findings.items())
    normal = {v for n, v in findings.items() if _NORMAL.match(n)}
    if ill:
        return None if 1.0 in normal else True
    return None if len(normal) != 1 else normal == {0.0}


def _positions(case: Case, told: Mapping[str, float]) -> Iterator[Ask]:
    frame = _frame(case)
    lungs = {side: _union(case, side) for side in ("right", "left")}
    for name, array in {**case.boxes, **case.outlines}.items():
        if _SIDE.search(name) or not array.any() or told.get(name) != 1:  # a name that says its side needs no question
            continue
        apart = not structure(name) and all(lung is not None for lung in lungs.values())
        side = side_of(array, lungs["right"], lungs["left"]) if apart else None
        if side in lungs:
            yield from (Ask("position", f"Is the {name} in the {s} lung?", s == side, f"{name} lung") for s in lungs)
        side = _side_of_midline(case, array, name)
        if side in lungs:
            yield from (Ask("position", f"Is the {name} on the patient's {s} side?", s == side, f"{name} side") for s in lungs)
        if frame is not None:
            seen, rows, columns, where = frame
            plane = seen(array)
            high, wide = (n // 2 for n in plane.shape)
            total = plane.sum()
            held = {f"{r} {c}": plane[i, j].sum() for r, i in zip(rows, (slice(high), slice(-high, None)))
                    for c, j in zip(columns, (slice(wide), slice(-wide, None)))}  # fmt: skip
            best = max(held, key=lambda k: held[k])
            if held[best] >= MOST * total:
                yield from (Ask("position", f"Is the {name} in the {k} quarter of the {where}?", k == best, f"{name} quarter") for k in held if k == best or not held[k])


def _union(case: Case, side: str) -> np.ndarray | None:
    """The patient's lung of that side, from outlines, else from boxes."""
    for drawn in (case.outlines, case.boxes):
        found = [a for n, a in drawn.items() if re.search(r"\blung\b", n) and side in n and structure(n) and a.any()]
        if found:
            return np.logical_or.reduce(found)
    return None


def _side_of_midline(case: Case, array: np.ndarray, name: str) -> str | None:
    """The side of the spine on which a target of a volume lies; None without an outlined spine, or where it reaches across."""
    spine = [a for n, a in case.outlines.items() if _MIDLINE.search(n) and not _SIDE.search(n) and a.any()]
    if not isinstance(case.image, Volume) or not spine or _MIDLINE.search(name):
        return None
    here = case.image.orientation
    across = np.arange(turned(array, here, "SPL").shape[-1])
    counts = [turned(a, here, "SPL").sum((0, 1)) for a in (np.logical_or.reduce(spine), array)]
    middle = counts[0] @ across / counts[0].sum()
    right = counts[1][across < middle].sum() / counts[1].sum()
    return "right" if right >= MOST else "left" if right <= 1 - MOST else None


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
    if image.modality in _FLAT:
        return lambda a: a, ("upper", "lower"), ("left", "right"), "picture"
    labels = case.base.meta.get("labels")
    view = str(image.info.get("view") or (labels.get("view") if isinstance(labels, Mapping) else "") or "").upper()
    if image.modality == "xray" and view[:2] in ("PA", "AP"):
        return lambda a: a, ("upper", "lower"), ("right", "left"), own.format("image")
    return None
