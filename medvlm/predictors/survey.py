"""Reports of what is no chest X-ray: what kind of picture it is, which structures are outlined in it and how large, which objects, and what was looked for in vain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..datasets import facts, sentences
from ..imaging.scan import Image, Volume
from ..sample import Finding, Measurement, Region, Report, Segmentation, Sentence

SURE = 0.5
"""A part, plane or side is named from this probability on."""
COUNTED = 0.3
"""An object counts from this score on."""


def report(picture: Image | Volume, modality: str, chances: Mapping[str, float], drawn: Sequence[Segmentation], objects: Sequence[Region] = ()) -> Report:
    """The report of one picture.

    Args:
        modality: of the picture, or what it looks like. chances: the classifier's, {"part:chest": p, ...}.
        drawn: the outline of each structure that is looked for in this kind of picture, empty where it is not seen.
        objects: boxes, the surest first.
    """
    found: list[Finding] = []
    said: list[Sentence] = []
    likely = {group: _likeliest(chances, group) for group in ("part", "plane", "eye")}
    told = {g: likely[g] for g in _groups(picture, modality) if likely[g] and likely[g][1] >= SURE}
    found += [Finding({"eye": f"{n} eye", "plane": f"{n} plane"}.get(g, n), True, p) for g, (n, p) in told.items()]
    if told:
        name = facts.MODALITY_NAMES.get(modality, "an image")
        said.append(Sentence(_whole(name, {g: n for g, (n, _) in told.items()}), (), "findings", tuple(range(len(found)))))
    missing, unsure = [], []
    for s in drawn:
        found.append(Finding(s.label, s.present >= 0.5 or bool(s.mask.any()), s.present, (s.region,) if s.mask.any() else (), tuple(sizes(s))))
        if s.mask.any():
            size = "".join(f" ({amount(m)})" for m in found[-1].measurements[:1])
            said.append(Sentence(f"The {s.label} {'are' if sentences.many(s.label) else 'is'} seen{size}.", (s.region,), "findings", (len(found) - 1,)))
        else:
            (unsure if s.present >= 0.5 else missing).append(len(found) - 1)
    for kind in dict.fromkeys(r.label for r in objects if r.probability >= COUNTED):
        boxes = tuple(r for r in objects if r.label == kind and r.probability >= COUNTED)
        found.append(Finding(kind, True, boxes[0].probability, boxes, (Measurement("count", len(boxes), "1"),)))
        said.append(Sentence(f"{len(boxes)} {kind} {'are' if len(boxes) > 1 else 'is'} seen.", boxes, "findings", (len(found) - 1,)))
    if unsure:
        said.append(Sentence(f"The {sentences.listed([found[k].label for k in unsure], 'and')} may be there but could not be outlined.", (), "findings", tuple(unsure)))
    if missing:
        said.append(Sentence(f"No {sentences.listed([found[k].label for k in missing], 'or')} {'are' if sentences.many(found[missing[-1]].label) else 'is'} seen.", (), "findings", tuple(missing)))
    return Report(tuple(said), tuple(found))


def sizes(one: Segmentation) -> list[Measurement]:
    """The volume in mL, the area in mm2, or where the spacing is not known the share of the picture."""
    cells, spacing = int(one.mask.sum()), one.image.spacing
    if not cells:
        return []
    if spacing is None:
        return [Measurement("share of the picture", 100 * cells / one.mask.size, "%")]
    volume = isinstance(one.image, Volume)  # of a tilted stack the cells are no boxes
    size = cells * (abs(float(np.linalg.det(one.image.affine[:3, :3]))) if volume else float(np.prod(spacing)))
    return [Measurement("volume", size / 1000, "mL")] if volume else [Measurement("area", size, "mm2")]


def amount(size: Measurement) -> str:
    """"1234 mL", "5.62 % of the picture"."""
    return f"{f'{size.value:.0f}' if size.value >= 100 else f'{size.value:.3g}'} {size.unit}{' of the picture' if size.unit == '%' else ''}"


def _groups(picture: Image | Volume, modality: str) -> tuple[str, ...]:
    """What is told of such a picture as a whole; a volume has no plane of its own."""
    return {"fundus": ("eye",), "ct": ("part", "plane"), "mr": ("part", "plane")}.get(modality, ())[: 1 if isinstance(picture, Volume) else 2]


def _likeliest(chances: Mapping[str, float], group: str) -> tuple[str, float] | None:
    own = {n.partition(":")[2]: p for n, p in chances.items() if n.startswith(f"{group}:")}
    return max(own.items(), key=lambda pair: pair[1]) if own else None


def _whole(name: str, told: Mapping[str, str]) -> str:
    plane = f"{told['plane']} " if "plane" in told else ""
    kind = f"{plane}{name.partition(' ')[2]}"
    of = f" of the {told['part']}" if "part" in told else f" of the {told['eye']} eye" if "eye" in told else ""
    return f"{'An' if kind[0] in 'aeiouAEIOU' or kind.startswith('MR') else 'A'} {kind}{of}."
