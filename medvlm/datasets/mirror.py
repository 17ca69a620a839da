"""The mirror image of a sample: left and right exchanged in pixels, outlines, names and words together, or refused.

The pixels are flipped where :mod:`medvlm.evaluate.perturb` flips them for its control, and the words with them, so that what
is said of the twin is as true as it was of the original.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import ModelError
from ..evaluate.perturb import MIRROR, letters, mirrored, sided
from ..imaging.scan import Image, Volume, turned_points
from ..sample import IMAGE_MARK, MARKED, Mask, Region, Sample, Turn

MARK = "@mirrored"
"""Ends the ids of a twin, of its images and of its group: nobody may take its pictures for those of the original."""
SOURCE = ("sop", "files", "frames", "frame_of_reference")
"""Of ``info``, what says where pixels come from: a twin has it no more, lest something be written on top of the original."""
TITLES = ("row", "split", "dataset", "source", "licence", "image", "qid", "linked_id", "image_case_url")
"""Of ``meta``, what names things and tells nothing of the picture."""
SHEAR = 0.01
"""Largest cosine between the axis that is flipped and another one."""

# Python's \b takes "_" for a letter, so ends of words are written out: names are "left_lung" and "lungLeft".
_SIDE = re.compile(
    r"(?<![A-Za-z])(?i:left|right)(?=(?i:ward|most|hand|side)|(?![a-z]))|(?<=[a-z])(?:Left|Right)(?![a-z])"
    r"|(?<![A-Za-z])(?i:dextro|levo)(?=-?(?i:scolio|conve|curv|rotat|posit|deviat))"
    r"|(?<![A-Za-z])[RrLl]t(?![A-Za-z])"
    r"|(?<![A-Za-z])[RrLl](?=(?i:ul|ml|ll|uq|lq)(?![A-Za-z])|(?:UE|LE|AO|PO|MLO)(?![A-Za-z]))"  # lobes, quadrants, limbs, views
    r"|\A[RL](?=\.?\Z)|(?<![A-Za-z0-9/'’])(?<![0-9] )(?<!/ )(?<!per )[RL](?=[ -](?!wave|spine)[a-z]|\)|\s?[<>=]\s?[RL](?![A-Za-z]))"  # not litres
    r"|(?:(?<=[RL][<>=])|(?<=[RL] [<>=] ))[RL](?![A-Za-z0-9])"
)
_OTHER = {"left": "right", "right": "left", "l": "r", "r": "l", "lt": "rt", "rt": "lt", "dextro": "levo", "levo": "dextro"}
_EYES = re.compile(r"(?<![A-Za-z])O\.?[DS](?![A-Za-z])")
_DOUBTFUL = re.compile(
    r"(?i:(?<!b)(?<!f)(?<!w)(?<!c)(?<!al)(?<!up)(?<!out)(?<!copy)(?:left|right))"
    r"|(?<![A-Za-z])[RL]T(?![ -]?PCR)(?![A-Za-z])|(?<![A-Za-z0-9/'’])(?<![0-9] )(?<!/ )(?<!per )[RL](?![A-Za-z0-9]|/O\b|[ -]?spine)"
)
"""Where a side may be meant; each must be one that ``_SIDE`` finds."""
_REFUSED = {
    r"\b(situs|dextrocardia|levocardia|dextrogastr\w*|heterotax\w*|isomeri\w*|malrotat\w*|kartagener\w*|transposition|[dl]-tga|sinistr\w+)\b":
        "it speaks of the handedness of a body, and a mirrored body has the other one",
    r"\b(markers?|mirror\w*|flipp\w+|(left|right)-?handed|orientation|(anti|counter)?-?clockwise|o.?clock)\b":
        "it speaks of markers or of how the picture is turned, which exchanged words do not set right",
    r"\b(sagittal|lateral (view|film|projection|radiograph|x-?ray|chest)|lld|rld)\b": "it speaks of a picture of one side of the patient",
    r"bbox|<loc\d|[\[(]\s*-?\d+(\.\d+)?\s*,\s*-?\d|\b[xy]\s*=\s*-?\d|\bcoordinates?\b": "it gives a place by numbers",
    r"\bright[ -](angle\w*|away|now|after|next|here|there|above|below|behind|before|under|through|across|answer|choice)\b"
    r"|\bright in the (mid|cent)"
    r"|\ball right\b|\bleft[ -](in place|in situ|over|behind|alone|untreated|unchanged|open|out|blank|undone|home|off)\b"
    r"|\bleft[ -](hospital|the|her|his|a|an|with(out)?)\b"
    r"|\b(has|have|had|she|he|patient|nothing|none) left\b": "left or right may be no side there",
}  # fmt: skip
_UNPAIRED = re.compile(
    r"\b(heart|cardiac|aort\w*|atri(a|al|um)|(?<!lateral )(?<!third )(?<!fourth )(?<!3rd )(?<!4th )ventric\w*|coronar\w*|vena|ivc|svc|azygos|"
    r"brachioceph\w*|innominate|middle lobe|rml|lml|lingul\w*|(minor|horizontal) fissure|"
    r"liver|hepat\w*|spleen|splen\w*|stomach|gastric|gallbladder|bile|biliary|pancrea\w*|portal|"
    r"duoden\w*|c(a?e)cum|c(a?e)cal|ileoc\w*|append\w*|colon\w*|sigmoid)\b", re.I)  # fmt: skip
_NORMAL = re.compile(r"\b(ab)?normal\w*|unremarkable|healthy|within normal|no (acute )?(\w+ )?(finding|disease|process)s?\b", re.I)
_AROUND = re.compile(r"\b(anterior|posterior|ventral|dorsal|front|back|cranial|caudal)\w*\b", re.I)
_HALVES = re.compile(r"^(head|brain|skull|neck|eye|orbit|retina|breast|shoulder|elbow|wrist|hand|hip|knee|leg|ankle|foot|jaw|arm|extremit)", re.I)
"""Body parts that come in pairs or whose halves look alike."""
_FLAT = ("fundus", "pathology", "endoscopy", "dermoscopy")
"""Pictures that are mirrored across their width whatever they show."""
_LYING = {"HFDR": "HFDL", "HFDL": "HFDR", "FFDR": "FFDL", "FFDL": "FFDR"}


def mirror(sample: Sample) -> Sample:
    """The left-right mirrored twin of a sample; the twin of a twin is the original, but for :data:`SOURCE`.

    A picture is flipped along the axis that runs across the patient (by its affine; its width where it has none). A volume is
    flipped along the axis nearest to left-right and keeps its affine: the grid stays, its handedness too, and what it holds is
    the body mirrored at the plane through the middle of that axis. Masks and boxes (half-open, index order) go with them;
    ``labels``, ``choices``, turns, names of masks and regions, ``meta`` and ``info`` (laterality, position, description) get the
    other side's words, the case of letters kept. Ids end with :data:`MARK`; ``patient`` stays, for splits go by it.

    What is refused, and why:

    - what the words would get wrong: the handedness of the body itself (situs), markers and how the picture is turned, places by
      numbers, "left" and "right" that are or may be no side (abbreviations too), words in another language;
    - an unpaired organ in a text that names a side (heart, aorta, liver, spleen, stomach, colon, lobes that one lung has ...): its
      side is part of its name ("left atrium") or of what everybody has, and "the liver is on the left" must not be learnt;
    - a claim of normality where the trunk may be shown: a mirrored chest or abdomen is one of situs inversus, which is not normal.
      Fundus, skin, slides, OCT, endoscopy and body parts in pairs or of equal halves (the header's or the data's word) are exempt;
    - sides, front or back in the text of a picture whose plane nobody says (no affine; an X-ray without PA, AP, CC or MLO): its width may
      run from front to back. Sagittal slices, lateral and oblique views: they have no left and right to exchange;
    - burned-in text (``info["burned_in"]``), a laterality that is no side, volumes sheared along left-right (flipped, they would be
      sheared the other way). Side markers of lead are in no header: where data have them, the twin shows them in mirror writing.

    Raises:
        ModelError: FLIP_REFUSED with the sample and the reason; what is said in it is not quoted.
    """
    why = next(_objections(sample), None)
    if why:
        raise ModelError(f"sample {sample.id} cannot be mirrored: {why}", "FLIP_REFUSED", "use it as it is")
    eyes = _eyes(sample)
    images = {i: _image(image, eyes) for i, image in sample.images.items()}
    return replace(
        sample, id=_renamed(sample.id), group=_renamed(sample.group) if sample.group else None,
        images={x.id: x for x in images.values()},
        turns=tuple(Turn(t.role, _text(t.text, eyes)) for t in sample.turns),
        labels={swapped(k, eyes): v for k, v in sample.labels.items()},
        masks=tuple(_mask(m, sample.images[m.image], eyes) for m in sample.masks),
        regions=tuple(_region(r, sample.images[r.image], eyes) for r in sample.regions),
        choices=None if sample.choices is None else tuple(swapped(c, eyes) for c in sample.choices),
        meta={k: v if k in TITLES else _within(v, eyes) for k, v in sample.meta.items()},
    )  # fmt: skip


def swapped(text: str, eyes: bool = False) -> str:
    """The text with its left and right exchanged, the case of letters kept: words, names ("lung_left"), RUL and LLQ, Rt, "L kidney",
    dextro- and levoscoliosis; with ``eyes`` OD and OS too. Twice is the text itself.

    >>> swapped("Left-sided effusion, RLL clear, lung_upper_lobe_left")
    'Right-sided effusion, LLL clear, lung_upper_lobe_right'
    """
    text = _SIDE.sub(_other, text)
    return _EYES.sub(lambda m: m[0][:-1] + ("S" if m[0][-1] == "D" else "D"), text) if eyes else text


def _other(m: re.Match) -> str:
    found = _OTHER[m[0].lower()]
    return found.upper() if m[0].isupper() else found.capitalize() if m[0][0].isupper() else found


def _objections(sample: Sample) -> Iterator[str]:
    if not sample.images:
        yield "it has no image"
    if {a.image for a in (*sample.masks, *sample.regions)} - sample.images.keys():
        yield "an outline or box lies on an image that it does not have"
    said = "\n".join([*(MARKED.sub(" ", t.text) for t in sample.turns), *(sample.choices or ())])
    names = [n.replace("_", " ") for n in (*sample.labels, *(a.label for a in (*sample.masks, *sample.regions)))]
    eyes = _eyes(sample)
    for text in (said, *names):
        yield from _words(text, eyes)
    if sample.meta.get("lang") not in (None, "en") or any(c.isalpha() and ord(c) > 0x24F and not 0x370 <= ord(c) < 0x400 for c in said):
        yield "its words are not English"
    claims = {(v == 1) != ("abnormal" in n.lower()) for n, v in zip(names, sample.labels.values()) if v in (0, 1) and _NORMAL.search(n)}
    normal = bool(_NORMAL.search(said)) or True in claims
    placed = any(_SIDE.search(t) or _AROUND.search(t) for t in (said, *names))
    for image in sample.images.values():
        yield from _picture(image, sample.meta)
        alike = any(_HALVES.search(str(x)) for x in (image.info.get("body_part"), sample.meta.get("organ")) if x)
        if normal and not alike and image.modality not in (*_FLAT, "oct"):
            yield "it speaks of what is normal, and a mirrored trunk is not"
        if placed and not _plane_known(image, sample.meta):
            yield f"it names a side, and nobody says in which plane image {image.id} lies"


def _words(text: str, eyes: bool) -> Iterator[str]:
    for pattern, why in _REFUSED.items():
        if re.search(pattern, text, re.I):
            yield why
    sides = {m.start() for m in _SIDE.finditer(text)}
    if any(m.start() not in sides for m in _DOUBTFUL.finditer(text)):
        yield "it has a word or abbreviation that may or may not be a side"
    if sides and _UNPAIRED.search(text):
        yield "it names a side and an organ that has no twin on the other one"
    sure = re.search(r"\beyes?\b|O\.?[SU]\b", text) and not re.search(r"\bdis[ck]s?\b|\bcups?\b|segment|\bOC\b", text, re.I)
    if eyes and _EYES.search(text) and not sure:
        yield "its OD may be the optic disc"


def _picture(image: Image | Volume, meta: Mapping[str, Any]) -> Iterator[str]:
    if image.info.get("burned_in"):
        yield f"text is burned into image {image.id}"
    if str(image.info.get("laterality") or "B").upper() not in ("L", "R", "B", "U"):
        yield f"the laterality of image {image.id} is no side"
    if not sided(image) or _view(image, meta).startswith(("L", "R")):
        yield f"image {image.id} shows one side of the patient"
    if isinstance(image, Volume):
        axis = next(i for i, letter in enumerate(image.orientation) if letter in MIRROR)
        columns = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
        if max(abs(columns[:, axis] @ columns[:, i]) for i in range(3) if i != axis) > SHEAR:
            yield f"volume {image.id} is sheared along left-right"


def _view(image: Image | Volume, meta: Mapping[str, Any]) -> str:
    labels = meta.get("labels")
    return str(image.info.get("view") or (labels.get("view") if isinstance(labels, Mapping) else "") or "").upper()


def _plane_known(image: Image | Volume, meta: Mapping[str, Any]) -> bool:
    placed = isinstance(image, Volume) or image.info.get("affine") is not None or image.modality in _FLAT
    return placed or image.modality == "xray" and _view(image, meta).startswith(("PA", "AP", "CC", "MLO"))


def _eyes(sample: Sample) -> bool:
    return bool(sample.images) and all(x.modality in ("fundus", "oct") for x in sample.images.values())


def _image(image: Image | Volume, eyes: bool) -> Image | Volume:
    twin = mirrored(image)
    twin.id = _renamed(image.id)
    info = {k: v for k, v in image.info.items() if k not in SOURCE}
    info["warnings"] = list(info["warnings"])
    if info.get("laterality"):
        info["laterality"] = MIRROR.get(str(info["laterality"]).upper(), info["laterality"])
    if info.get("patient_position") in _LYING:
        info["patient_position"] = _LYING[info["patient_position"]]
    twin.info = info | {k: swapped(info[k], eyes) for k in ("series", "body_part") if info.get(k)}
    return twin


def _mask(mask: Mask, image: Image | Volume, eyes: bool) -> Mask:
    return replace(mask, image=_renamed(mask.image), label=swapped(mask.label, eyes), array=_flip(mask.array, image))


def _region(region: Region, image: Image | Volume, eyes: bool) -> Region:
    box = None if region.box is None else _box(region.box, image)
    mask = None if region.mask is None else _flip(region.mask, image)
    return replace(region, image=_renamed(region.image), label=swapped(region.label, eyes), box=box, mask=mask)


def _flip(mask: np.ndarray, image: Image | Volume) -> np.ndarray:
    """As the image is flipped."""
    if isinstance(image, Volume):
        return mirrored(image.with_voxels(mask[None])).voxels[0]
    return mirrored(image.with_pixels(mask[None])).pixels[0]


def _box(box, image: Image | Volume) -> tuple[tuple[float, ...], tuple[float, ...]]:
    here, corners = letters(image), np.asarray(box, float)
    missing = 3 - corners.shape[1]  # a picture is one slice
    size = (1,) * missing + image.shape[1:]
    moved = turned_points(np.pad(corners, ((0, 0), (missing, 0))), size, here, "".join(MIRROR.get(x, x) for x in here))[:, missing:]
    return tuple(moved.min(0).tolist()), tuple(moved.max(0).tolist())


def _text(text: str, eyes: bool) -> str:
    """Words between the marks of images are exchanged, the images' ids renamed."""
    parts = MARKED.split(text)
    return "".join(IMAGE_MARK.format(_renamed(p)) if i % 2 else swapped(p, eyes) for i, p in enumerate(parts))


def _within(value: Any, eyes: bool) -> Any:
    if isinstance(value, str):
        return swapped(value, eyes)
    if isinstance(value, Mapping):
        return {_within(k, eyes): _within(v, eyes) for k, v in value.items()}
    return type(value)(_within(v, eyes) for v in value) if type(value) in (list, tuple) else value


def _renamed(id: str) -> str:
    return id[: -len(MARK)] if id.endswith(MARK) else id + MARK
