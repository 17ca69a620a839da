"""Do artefacts change the answer? The same closed questions with noise, blur, JPEG and other artefacts at strengths 1, 3 and 5.

A copy has the id ``ID@ARTEFACT-STRENGTH``, for each of ``perturb.ARTEFACTS``; the bias field is for MR only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..sample import Prediction, Sample
from . import perturb
from .base import Task
from .controls import RULE, closed, compared, copies
from .statistics import Score

STRENGTHS = (1, 3, 5)


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """The closed and choice questions about images of a split, then their copies, one artefact and strength after the other."""
    asked, found = closed(read(split)), []
    for name in perturb.ARTEFACTS:
        fitting = [s for s in asked if name != "bias" or all(x.modality == "mr" for x in s.images.values())]
        for k in STRENGTHS:
            found += copies(fitting, f"{name}-{k}", lambda x, seed, name=name, k=k: perturb.artefact(x, name, k, seed))
    return [*asked, *found]


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str) -> list[Score]:
    """Accuracy, score drop and answer change rate under all artefacts, by strength, and by artefact and strength."""
    return compared(samples, predictions, _slices, "higher")


def _slices(sample: Sample) -> list[str]:
    made = sample.meta.get("control")
    return ["all", f"strength={made.rpartition('-')[2]}", f"artefact={made}"] if made else ["artefact=none"]


TASK = Task(prepare, score, {"medvlm": RULE}, rank=7)
