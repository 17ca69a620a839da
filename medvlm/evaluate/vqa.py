"""Answers to questions against their reference."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from ..errors import ModelError
from ..sample import Prediction, Sample
from .statistics import Score, mean_score

CONVENTION = "exact match after lower case, without punctuation and articles; an error or empty answer is wrong"


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles (unless nothing else is left), single spaces.

    >>> normalise("Yes, the LEFT lung.")
    'yes left lung'
    >>> normalise("A")
    'a'
    """
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join([w for w in words if w not in ("a", "an", "the")] or words)


def closed_accuracy(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> Score:
    """Share of samples answered exactly; clustered by image row. Nothing leaves the denominator.

    Raises:
        ModelError: BAD_ARGUMENT when the predictions are not those of these samples, one each, in order.
    """
    if [s.id for s in samples] != [p.id for p in predictions]:
        raise ModelError(f"{len(predictions)} predictions are not those of the {len(samples)} samples, one each, in order", "BAD_ARGUMENT")
    right = [float(p.error is None and bool(normalise(p.text)) and normalise(p.text) == normalise(s.answer or "")) for s, p in zip(samples, predictions)]
    return mean_score("closed accuracy", right, [s.meta.get("row", s.id) for s in samples], convention=CONVENTION)


def prior_answers(train: Sequence[Sample], samples: Sequence[Sample]) -> list[str]:
    """For each sample the commonest training answer to the same question, else to all questions: what a blind reader says."""
    by_question: dict[str, Counter] = defaultdict(Counter)
    overall: Counter = Counter()
    for s in train:
        answer = normalise(s.answer or "")
        by_question[normalise(s.question)][answer] += 1
        overall[answer] += 1
    return [(by_question.get(normalise(s.question)) or overall).most_common(1)[0][0] for s in samples]
