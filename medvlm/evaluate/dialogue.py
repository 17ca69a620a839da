"""Closed questions asked one after the other: are the second and later turns of a dialogue answered as well as the first?

The closed questions about an image are dealt into dialogues (``instruct.dealt``: a question and its twin never meet). Each is
asked with the turns before it, which hold the true answers, so that a wrong one does not count again in those that follow. What
the earlier answers give away is told by the same model without the image (``--no-image``), which reads them too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..datasets.instruct import dealt
from ..sample import Prediction, Sample
from . import vqa
from .base import Task, check_pairs
from .conventions import kind
from .statistics import Score

TURNS = 3
"""Questions of a dialogue at most, as MMFundus has them (VisionUnite, arXiv:2408.02865: 889,137 dialogues of 296,379 images)."""


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """Every closed question of images with two or more, with the turns before it; ``meta["turn"]`` counts from 1."""
    about: dict[tuple, list[Sample]] = {}
    for s in vqa.prepare(read, split):
        if kind(s) in ("yes/no", "single"):
            about.setdefault((s.meta.get("dataset"), s.meta.get("row"), *s.images), []).append(s)
    found = []
    for asked in about.values():
        for parts in dealt(asked, TURNS) if len(asked) > 1 else ():
            for k, s in enumerate(parts):
                turns = tuple(t for before in parts[:k] for t in before.turns) + s.turns
                found.append(replace(s, id=f"{s.id}@turn", turns=turns, meta={**s.meta, "turn": k + 1}))
    return found


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str) -> list[Score]:
    """The accuracy of all turns, of first turns and of later ones."""
    check_pairs(samples, predictions)
    scores = []
    for name, wanted in (("all turns", lambda turn: True), ("first turn", lambda turn: turn == 1), ("later turns", lambda turn: turn > 1)):
        where = [i for i, s in enumerate(samples) if wanted(s.meta["turn"])]
        told = vqa.score([samples[i] for i in where], [predictions[i] for i in where], convention) if where else ()
        scores += [replace(s, name=f"{name} accuracy") for s in told if s.name == "overall accuracy"]
    return scores


TASK = Task(prepare, score, {"medvlm": vqa.TASK.conventions["medvlm"]}, blind=True, rank=8)
