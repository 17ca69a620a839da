"""Windows of pictures at their own resolution, as pictures of their own: for what is too thin or too small to be seen in the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from ..imaging.scan import Image
from ..sample import Mask, Sample


def windowed(group: Sequence[Sample], side: int, overlap: float = 0.5) -> Iterator[list[Sample]]:
    """The samples of a row about windows of ``side`` pixels that together cover its picture, one list a window.

    Masks are cut with the picture, and stay where they are empty; questions, regions and what is said of the whole are left out.
    Its row is ROW@TOP,LEFT. A picture smaller than ``side`` along an axis gives windows as long as it is.

    overlap: share of a window that the next one shows too.
    """
    first = group[0]
    (picture,) = first.images.values()
    row, (high, wide) = str(first.meta.get("row") or first.id), picture.shape[1:]
    masks = [m for s in group for m in s.masks if m.image == picture.id]
    for top, left in product(_starts(high, side, overlap), _starts(wide, side, overlap)):
        name = f"{row}@{top},{left}"
        cut = lambda array: np.ascontiguousarray(array[..., top : top + side, left : left + side])  # noqa: B023, E731
        image = Image(picture.id, cut(picture.pixels), picture.spacing, picture.modality, picture.unit, dict(picture.info))
        base = Sample(name, first.patient, {image.id: image}, meta={"row": name, "split": first.meta.get("split")})
        yield [base, *(replace(base, id=f"{name}/{m.label}", masks=(Mask(image.id, m.label, cut(m.array)),)) for m in masks)]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    if length <= side:
        return [0]
    count = 1 + int(np.ceil((length - side) / (side * (1 - overlap))))
    return np.linspace(0, length - side, count).round().astype(int).tolist()
