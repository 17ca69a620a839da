"""Scores with their uncertainty: cluster bootstrap, paired comparison, rank statistics and the calibration of probabilities."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

FEWEST_CLUSTERS = 5
"""Below this many clusters a bootstrap interval says nothing, so none is given."""
DRAWS = 1000
"""Bootstrap draws behind every interval."""
SEED = 0
"""Of those draws; kept in every run's scores.json."""


@dataclass(frozen=True, eq=False)
class Items:
    """What a score was computed from, so that its interval and its difference to another model's can be drawn.

    ids, clusters: one an item. values: (N,) where the score is their mean, else None. statistic: (indices, with repeats)
    -> value.
    """

    ids: tuple[str, ...]
    clusters: tuple[Hashable, ...]
    statistic: Callable[[np.ndarray], float]
    values: np.ndarray | None = None


@dataclass(frozen=True)
class Score:
    """One line of scores.json. value is a fraction unless ``unit`` says mm, s, ...; low and high: 95 % interval.

    excluded: items that the metric has nothing to say of (no reference), never wrong or missing answers. chance: what
    guessing gets. note: why a number is missing. better: "higher", "lower", or "neither" where it only describes.
    """

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
    task: str = ""
    note: str = ""
    better: str = "higher"
    items: Items | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: NaN, where there was nothing to score, is null."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "items"}
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}


def drawn_clusters(clusters: Sequence[Hashable], draws: int = DRAWS, seed: int = SEED) -> tuple[list[np.ndarray], np.ndarray]:
    """(the items of each cluster, (draws, clusters) indices of the clusters drawn with replacement).

    The same clusters in the same order give the same draws, so two models can be drawn together.
    """
    members: dict[Hashable, list[int]] = {}
    for i, k in enumerate(clusters):
        members.setdefault(k, []).append(i)
    parts = [np.array(m) for m in members.values()]
    return parts, np.random.default_rng(seed).integers(max(1, len(parts)), size=(draws, len(parts)))


def interval(statistic: Callable[[np.ndarray], float], clusters: Sequence[Hashable], draws: int = DRAWS, seed: int = SEED,
             level: float = 0.95) -> tuple[float | None, float | None]:  # fmt: skip
    """Percentile interval of a statistic when whole clusters (images, patients) are drawn with replacement.

    Args:
        statistic: (indices into the items, with repeats) -> value; NaN draws are left out.
        clusters: one key an item.

    Returns:
        (low, high), or (None, None) with fewer than ``FEWEST_CLUSTERS`` clusters or no draw that has a value.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile interval).
    """
    parts, picked = drawn_clusters(clusters, draws, seed)
    if len(parts) < FEWEST_CLUSTERS:
        return None, None
    return _percentiles([statistic(np.concatenate([parts[j] for j in row])) for row in picked], level)


def _percentiles(values, level: float = 0.95) -> tuple[float | None, float | None]:
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return None, None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _why_none(clusters: Sequence[Hashable], low: float | None) -> str:
    count = len(set(clusters))
    if low is not None or not count:
        return ""
    return f"no interval: {count} cluster{'s' * (count > 1)}, {FEWEST_CLUSTERS} are needed" if count < FEWEST_CLUSTERS else "no interval: no draw has a value"


def mean_score(name: str, values: Sequence[float], clusters: Sequence[Hashable], ids: Sequence[str] | None = None, **about: Any) -> Score:
    """The mean of per-item values with its interval; NaN values are excluded and counted.

    ids: one an item, so that two models can be compared on the same items. about: further fields of :class:`Score`.
    """
    array = np.asarray(values, float)
    kept = np.isfinite(array)
    groups = tuple(c for c, k in zip(clusters, kept) if k)
    names = tuple(str(i) for i, k in zip(ids if ids is not None else range(len(array)), kept) if k)
    array, excluded = array[kept], int((~kept).sum())
    if not len(array):
        return Score(name, float("nan"), 0, excluded, **{"note": "nothing to score"} | about)
    parts, picked = drawn_clusters(groups)
    low = high = None
    if len(parts) >= FEWEST_CLUSTERS:  # sums of clusters instead of a mean over all items, draw by draw
        sums, counts = np.array([array[p].sum() for p in parts]), np.array([len(p) for p in parts])
        low, high = _percentiles(sums[picked].sum(1) / counts[picked].sum(1))
    items = Items(names, groups, lambda i: float(array[i].mean()), array)
    return Score(name, float(array.mean()), len(array), excluded, low, high, **{"note": _why_none(groups, low), "items": items} | about)


def statistic_score(name: str, statistic: Callable[[np.ndarray], float], clusters: Sequence[Hashable], ids: Sequence[str] | None = None, **about: Any) -> Score:
    """Any statistic of items, with its interval. statistic: (indices, with repeats) -> value, NaN where it has none."""
    groups, names = tuple(clusters), tuple(map(str, ids if ids is not None else range(len(clusters))))
    if not groups:
        return Score(name, float("nan"), 0, **{"note": "nothing to score"} | about)
    value = statistic(np.arange(len(groups)))
    low, high = interval(statistic, groups) if np.isfinite(value) else (None, None)
    note = _why_none(groups, low) if np.isfinite(value) else "no value: see the convention"
    return Score(name, float(value), len(groups), low=low, high=high, **{"note": note, "items": Items(names, groups, statistic)} | about)


def paired_difference(a: Score, b: Score, draws: int = DRAWS, seed: int = SEED) -> tuple[float, float | None, float | None, float]:
    """(a - b, low, high, p) over the items that both scores have, drawn together by whole clusters.

    p: two-sided, twice the smaller share of draws on either side of zero, each count plus one, at most 1; NaN below
    ``FEWEST_CLUSTERS`` clusters.

    Raises:
        ValueError: the scores were not kept with their items, or share none.
    Source: Efron & Tibshirani 1993, chapter 16; plus-one counts: Davison & Hinkley 1997, section 4.2.
    """
    if a.items is None or b.items is None:
        raise ValueError(f"the score {a.name!r} was not kept with its items")
    there = {i: k for k, i in enumerate(b.items.ids)}
    pairs = [(k, there[i]) for k, i in enumerate(a.items.ids) if i in there]
    if not pairs:
        raise ValueError(f"the two scores {a.name!r} share no item")
    left, right = (np.array(column) for column in zip(*pairs))
    difference = lambda i: a.items.statistic(left[i]) - b.items.statistic(right[i])  # noqa: E731
    clusters = [a.items.clusters[k] for k in left]
    value = difference(np.arange(len(pairs)))
    parts, picked = drawn_clusters(clusters, draws, seed)
    if len(parts) < FEWEST_CLUSTERS:
        return value, None, None, float("nan")
    values = np.array([difference(np.concatenate([parts[j] for j in row])) for row in picked])
    values = values[np.isfinite(values)]
    low, high = _percentiles(values)
    tail = (1 + min((values <= 0).sum(), (values >= 0).sum())) / (1 + len(values))
    return value, low, high, float(min(1.0, 2 * tail))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p that two models are right equally often on the same items; 1 where they never differ.

    It takes items as independent, which questions of one image are not: the cluster bootstrap is the interval to trust.
    Source: McNemar 1947, Psychometrika 12:153 (the exact binomial form).
    """
    from scipy.stats import binomtest

    a, b = np.asarray(a, bool), np.asarray(b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are; NaN stays and does not count.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65.
    """
    values = np.asarray(p, float)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    out, largest = values.copy(), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, float(values[i]) * (len(order) - rank)))
        out[i] = largest
    return out.tolist()


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties counting half; NaN with one class only.

    Source: Hanley & McNeil 1982, Radiology 143:29 (equals the Mann-Whitney statistic).
    """
    labels = np.asarray(labels).astype(bool)
    if labels.all() or not labels.any():
        return float("nan")
    at = np.unique(np.asarray(scores, float), return_inverse=True)[1]
    positive, negative = np.bincount(at[labels], minlength=at.max() + 1), np.bincount(at[~labels], minlength=at.max() + 1)
    return float((positive * (negative.cumsum() - negative / 2)).sum() / (positive.sum() * negative.sum()))


def surest_wrong(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The scores, where there is none (NaN) -inf for a positive and inf for any other: a failure on a negative must not pass for
    a low score.
    """
    return np.where(np.isnan(scores), np.where(labels == 1, -np.inf, np.inf), scores)


def auroc_score(name: str, scores: Sequence[float], labels: Sequence[float], clusters: Sequence[Hashable], ids: Sequence[str] | None = None,
                **about: Any) -> Score:  # fmt: skip
    """AUROC over the items whose label is known (0 or 1) with its interval; chance is 0.5. No answer (NaN) is
    :func:`surest_wrong`, so that a failure cannot help.
    """
    known = [i for i, v in enumerate(labels) if np.isfinite(v)]
    s, y = np.array([scores[i] for i in known], float), np.array([labels[i] for i in known])
    s = surest_wrong(s, y)
    names = [str(i) if ids is None else ids[i] for i in known]
    about = {"chance": 0.5, "excluded": len(labels) - len(known)} | about
    return statistic_score(name, lambda i: auroc(s[i], y[i]), [clusters[i] for i in known], names, **about)


def fit_platt(logits: np.ndarray, labels: np.ndarray, strength: float = 1.0, share: float | None = None) -> tuple[float, float]:
    """(scale, shift) so that sigmoid(logit * scale + shift) is calibrated; pulled towards (1, 0) when data are few.

    share: of ones in what is to come, where ``labels`` are known to hold more or fewer: the shift moves by the difference of
    the log odds. Source: King and Zeng 2001, "Logistic Regression in Rare Events Data", section 4.1 (prior correction).

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
    held = (y.sum() + 0.5) / (len(y) + 1)
    moved = 0.0 if share is None else np.log(share / (1 - share)) - np.log(held / (1 - held))
    return float(np.exp(found.x[0])), float(found.x[1] + moved)
