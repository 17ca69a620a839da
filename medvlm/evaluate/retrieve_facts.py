"""Retrieval of captions that are made of what a data set knows of its images: modality, view, part, findings, sides, counts.

For images without a text of their own, and for those whose text is not about the image. Volumes are shown as axial slices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..datasets import instruct
from ..datasets.slices import sliced
from ..sample import Sample, Turn
from . import retrieve
from .base import Task


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """Each image with the plainest caption that its facts make; equal facts make equal captions, which are one candidate."""
    rows: dict[tuple, list[Sample]] = {}
    for s in read(split):
        if len(s.images) == 1:
            rows.setdefault((s.meta.get("dataset"), str(s.meta.get("row", s.id))), []).append(s)
    found, several = [], len({name for name, _ in rows}) > 1
    for (name, ident), row in rows.items():
        for group in sliced(row):
            made = next(instruct.conversations(group, kinds=("facts",)), None)
            if made is not None:
                about = {**made.meta, **({"dataset": name} if name else {}), "modality": next(iter(made.images.values())).modality}
                whose = made.patient or ident  # slices of one volume are drawn together
                found.append(replace(made, id=f"{name}/{made.id}" if several else made.id, verb="embed", patient=whose, turns=(Turn("assistant", made.answer),), meta=about))
    return found


TASK = Task(prepare, retrieve.score, {"pessimistic": retrieve.ABOUT}, rank=6)
