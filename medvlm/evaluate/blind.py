"""Answers given without looking at the image: what every score must be seen beside."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from ..sample import Prediction, Sample
from .answers import normalise
from .vqa import prior_answers

SOURCES = {
    "yes": "always yes, or the first choice",
    "random": "one of the choices by lot; a random training answer where the question is open",
    "prior": "the commonest training answer to the same question, else to any",
}
"""{name of a blind baseline: what it says}."""


def yes(samples: Sequence[Sample], train: Sequence[Sample] = ()) -> list[Prediction]:
    """ "yes", or the first of other choices."""
    return [_sure(s, next((c for c in s.choices if normalise(c) == "yes"), s.choices[0]) if s.choices else "yes") for s in samples]


def random(samples: Sequence[Sample], train: Sequence[Sample] = (), seed: int = 0) -> list[Prediction]:
    """A choice by lot, the same for the same id and seed in any order. Open: the answer of a training sample by lot."""
    answers = [s.answer for s in train if s.answer and not s.choices]
    found = []
    for sample in samples:
        lot = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed} {sample.id}".encode()).digest()[:8]))
        if sample.choices:
            chances = dict.fromkeys(sample.choices, 1 / len(sample.choices))
            found.append(Prediction(sample.id, sample.choices[int(lot.integers(len(sample.choices)))], 1 / len(sample.choices), chances))
        else:
            found.append(Prediction(sample.id, answers[int(lot.integers(len(answers)))] if answers else ""))
    return found


def prior(samples: Sequence[Sample], train: Sequence[Sample] = ()) -> list[Prediction]:
    """What was commonest in train; an error in every row where there is no training answer to count."""
    told = [s for s in train if s.answer]
    if not told:
        return [Prediction(s.id, error="NO_TRAIN: there is no training split to count answers in") for s in samples]
    return [Prediction(s.id, answer) for s, answer in zip(samples, prior_answers(told, samples))]


BASELINES: dict[str, Callable[..., list[Prediction]]] = {"yes": yes, "random": random, "prior": prior}


def _sure(sample: Sample, text: str) -> Prediction:
    chances = {c: float(c == text) for c in sample.choices} if sample.choices else None
    return Prediction(sample.id, text, 1.0, chances)
