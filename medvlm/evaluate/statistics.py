"""Scores with their uncertainty: cluster bootstrap, rank statistics and the calibration of probabilities."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FEWEST_CLUSTERS = 5
"""Below this many clusters a bootstrap interval says nothing, so none is given."""


@dataclass(frozen=True)
class Score:
    """One line of scores.json. value is a fraction unless ``unit`` says mm, s, ...; low and high: 95 % interval."""

    name: str
    value: float
    n: int
    excluded: int = 0
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    unit: str = ""
    convention: str = ""
    slice: str = "all"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: NaN, where there was nothing to score, is null."""
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in asdict(self).items()}


def interval(statistic: Callable[[np.ndarray], float], clusters: Sequence[Hashable], draws: int = 1000, seed: int = 0,
             level: float = 0.95) -> tuple[float | None, float | None]:  # fmt: skip
    """Percentile interval of a statistic when whole clusters (images, patients) are drawn with replacement.

    Args:
        statistic: (indices into the items, with repeats) -> value; NaN draws are left out.
        clusters: one key an item.

    Returns:
        (low, high), or (None, None) with fewer than ``FEWEST_CLUSTERS`` clusters or no draw that has a value.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile interval).
    """
    keys = list(dict.fromkeys(clusters))
    if len(keys) < FEWEST_CLUSTERS:
        return None, None
    members = {k: [] for k in keys}
    for i, k in enumerate(clusters):
        members[k].append(i)
    parts = [np.array(members[k]) for k in keys]
    rng = np.random.default_rng(seed)
    values = [statistic(np.concatenate([parts[j] for j in rng.integers(len(parts), size=len(parts))])) for _ in range(draws)]
    values = [v for v in values if np.isfinite(v)]
    if not values:
        return None, None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_score(name: str, values: Sequence[float], clusters: Sequence[Hashable], **about: Any) -> Score:
    """The mean of per-item values with its interval; NaN values are excluded and counted."""
    array = np.asarray(values, float)
    kept = np.isfinite(array)
    groups = [c for c, k in zip(clusters, kept) if k]
    array = array[kept]
    if not len(array):
        return Score(name, float("nan"), 0, int((~kept).sum()), **about)
    low, high = interval(lambda i: float(array[i].mean()), groups)
    return Score(name, float(array.mean()), len(array), int((~kept).sum()), low, high, **about)


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties counting half; NaN with one class only.

    Source: Hanley & McNeil 1982, Radiology 143:29 (equals the Mann-Whitney statistic).
    """
    from scipy.stats import rankdata

    labels = np.asarray(labels).astype(bool)
    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * negative))


def auroc_score(name: str, scores: Sequence[float], labels: Sequence[float], clusters: Sequence[Hashable], **about: Any) -> Score:
    """AUROC over the items whose label is known (0 or 1), with its interval; chance is 0.5."""
    keep = [i for i, v in enumerate(labels) if np.isfinite(v) and np.isfinite(scores[i])]
    s, y = np.array([scores[i] for i in keep]), np.array([labels[i] for i in keep])
    low, high = interval(lambda i: auroc(s[i], y[i]), [clusters[i] for i in keep])
    return Score(name, auroc(s, y), len(keep), len(labels) - len(keep), low, high, 0.5, **about)


def fit_platt(logits: np.ndarray, labels: np.ndarray, strength: float = 1.0) -> tuple[float, float]:
    """(scale, shift) so that sigmoid(logit * scale + shift) is calibrated; pulled towards (1, 0) when data are few.

    Maximum a posteriori with Gaussian priors of unit width / sqrt(strength) on log(scale) and shift.
    Source: Platt 1999, Probabilistic outputs for support vector machines (the link; the priors are ours).
    """
    from scipy.optimize import minimize

    z, y = np.asarray(logits, float), np.asarray(labels, float)
    if not len(z):
        return 1.0, 0.0

    def loss(p):
        a = z * np.exp(p[0]) + p[1]
        return np.logaddexp(0, a).sum() - (a * y).sum() + strength * (p[0] ** 2 + p[1] ** 2) / 2

    found = minimize(loss, np.zeros(2), method="L-BFGS-B")
    return float(np.exp(found.x[0])), float(found.x[1])
