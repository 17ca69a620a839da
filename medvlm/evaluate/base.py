"""What a task is, and the rules that every metric keeps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ModelError
from ..sample import Prediction, Sample
from .statistics import Score, mean_score, statistic_score

Metric = Callable[[Sequence[Sample], Sequence[Prediction], str], list[Score]]
"""(samples, predictions in the same order, name of the convention) -> scores of the whole set."""


@dataclass(frozen=True)
class Task:
    """One way of asking and of scoring. A file of this folder that defines ``TASK`` is a task; its name is the file's.

    prepare: (read, split) -> the samples to predict, [] where the data have none for this task; ``read(split)`` gives the
        samples of a split of the data. Ids are unique and say what was done to the sample (``ID@blank``).
    score: a :data:`Metric`. It scores every sample it is given: what a model failed on counts as wrong.
    conventions: {name: what it means in one sentence}; the first is the default.
    blind: answers without an image (constant, random, commonest of train) can be scored beside the model's.
    rank: with several tasks on one data set, the lower comes first.
    beside: (samples, predictions, convention) -> {sample id: what a reader should see beside a case}.
    """

    prepare: Callable[[Callable[[str], list[Sample]], str], list[Sample]]
    score: Metric
    conventions: Mapping[str, str]
    blind: bool = False
    rank: int = 5
    beside: Callable[[Sequence[Sample], Sequence[Prediction], str], dict[str, str]] | None = None


def cluster(sample: Sample) -> Hashable:
    """What is drawn together in a bootstrap: the patient, else the manifest row, else the images, else the sample."""
    of = f"{sample.meta.get('dataset', '')} "
    if sample.patient:
        return f"{of}patient {sample.patient}"
    return f"{of}row {sample.meta['row']}" if sample.meta.get("row") else f"{of}sample {sample.id}"


def check_pairs(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> None:
    """One prediction a sample, in order, ids unique.

    Raises:
        ModelError: BAD_ARGUMENT otherwise, so that no metric moves its denominator in silence.
    """
    asked = [s.id for s in samples]
    if asked != [p.id for p in predictions]:
        raise ModelError(f"{len(predictions)} predictions are not those of the {len(samples)} samples, one each, in order", "BAD_ARGUMENT")
    if len(set(asked)) < len(asked):
        twice = next(i for i in asked if asked.count(i) > 1)
        raise ModelError(f"two samples have the id {twice!r}", "BAD_ARGUMENT")


def mean_of(name: str, samples: Sequence[Sample], values: Sequence[float], **about: Any) -> Score:
    """The mean of one value a sample, with the interval of whole clusters. NaN: the metric has nothing to say of it, excluded.

    about: further fields of :class:`Score`.
    """
    return mean_score(name, values, [cluster(s) for s in samples], [s.id for s in samples], **about)


def statistic_of(name: str, samples: Sequence[Sample], statistic: Callable[[np.ndarray], float], **about: Any) -> Score:
    """A statistic of these samples with its interval. statistic: (indices into samples, with repeats) -> value."""
    return statistic_score(name, statistic, [cluster(s) for s in samples], [s.id for s in samples], **about)
