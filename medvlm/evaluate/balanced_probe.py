"""Probes made from labels, outlines, boxes and reports so that the words of a question tell nothing of its answer.

Ready probes can often be answered from the question alone, because an adversarial finding is nearly always absent: on the
chest X-rays of xray_covid the commonest training answer gets 82 % of pairs. Here every question has as many yes as no.
What cannot be balanced is left out; ``probe`` scores it, apart, on data without ready probes.
"""

from __future__ import annotations

from collections.abc import Callable

from ..datasets.pairs import build
from ..sample import Sample
from . import probe
from .base import Task


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """The balanced ones of the probes that a split gives."""
    return [s for s in build(read(split)) if s.meta["balanced"]]


TASK = Task(prepare, probe.score, probe.CONVENTIONS, blind=True, rank=6)
