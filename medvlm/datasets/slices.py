"""Slices of volumes as pictures with a place in the patient, for models that see single pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ..imaging.scan import READ_AS, Image, Volume, turned
from ..sample import Mask, Sample

PLANES = {"axial": READ_AS["S"], "coronal": READ_AS["P"], "sagittal": READ_AS["L"]}
"""{plane: how the axes of a volume grow whose slices are shown as a radiologist reads them}."""


def sliced(group: Sequence[Sample], count: int = 6, plane: str = "axial") -> Iterator[list[Sample]]:
    """The samples of a row about ``count`` evenly spaced slices of its volume, one list a slice; other groups as they are.

    Masks are cut with it, and stay where they are empty; questions, regions and what is said of the whole volume are left out.
    Its row is ROW@SLICE, with the plane's name where it is not axial.
    """
    first = group[0]
    volume = next(iter(first.images.values()), None)
    if len(first.images) != 1 or not isinstance(volume, Volume):
        yield list(group)
        return
    row, here = str(first.meta.get("row") or first.id), volume.orientation
    upright = volume.reorient(PLANES[plane])
    masks = [replace(m, array=turned(m.array, here, PLANES[plane]), count=None) for s in group for m in s.masks if m.image == volume.id]
    for k in range(min(count, upright.shape[1])):
        at = int((k + 0.5) / min(count, upright.shape[1]) * upright.shape[1])
        affine = upright.affine.copy()
        affine[:, 3] = affine @ np.array([at, 0, 0, 1.0])
        info = {key: v for key, v in volume.info.items() if key != "sop"} | {"affine": affine}
        image = Image(f"{volume.modality}-1", upright.voxels[:, at], upright.spacing[1:], volume.modality, volume.unit, info)
        name = f"{row}@{'' if plane == 'axial' else plane}{at}"
        base = Sample(name, first.patient, {image.id: image}, meta={"row": name, "split": first.meta.get("split")} | _set(first))
        yield [base, *(replace(base, id=f"{name}/{m.label}", masks=(Mask(image.id, m.label, m.array[at]),)) for m in masks)]


def _set(sample: Sample) -> dict[str, str]:
    return {"dataset": sample.meta["dataset"]} if "dataset" in sample.meta else {}
