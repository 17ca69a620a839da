"""Can a model's confidence be believed: where it comes from, calibration and selective prediction.

``right`` is 1 or 0 an item, ``confidence`` the chance in [0, 1] that it is right by the model's own account. A failure is
wrong with confidence 0. An answer without a confidence (NaN) is excluded and counted where chances are compared with
shares (ECE, Brier, log loss); where items are only ranked it stays, as the first to be refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import ModelError
from ..sample import Prediction, Sample, Turn
from .answers import normalise, said
from .base import mean_of, statistic_of
from .statistics import Score, auroc, fit_platt

BINS = 15
"""Of the expected calibration error. Source: Guo et al. 2017, On calibration of modern neural networks (arXiv:1706.04599)."""
RISK, COVERAGE = 0.05, 0.8
"""Working points of selective prediction: how much can be answered at this share of errors, how well at this share answered."""


def confidences(predictions: Sequence[Prediction]) -> np.ndarray:
    """(N,) from the model's own chances: ``probability``, else that of its answer among ``choices``; 0 for a failure, NaN
    where it gives neither."""
    return np.array([_stated(p) for p in predictions], float)


def _stated(p: Prediction) -> float:
    if p.error is not None:
        return 0.0
    value = p.probability if p.probability is not None else (p.choices or {}).get(p.text)
    return min(1.0, max(0.0, float(value))) if value is not None and math.isfinite(value) else math.nan


def equivalent(a: str, b: str) -> bool:
    """Whether two answers are the same words in the same order, after :func:`medvlm.evaluate.answers.normalise`.

    Order counts, since "left effusion, no right" and "right effusion, no left" are made of the same words.
    """
    return normalise(a) == normalise(b)


def agreement(answer: str, sampled: Sequence[str], same: Callable[[str, str], bool] = equivalent) -> float:
    """Share of sampled answers that equal the main one; an empty one never does. NaN without any.

    Source: Wang et al. 2023, Self-consistency (arXiv:2203.11171).
    """
    return float(np.mean([bool(s.strip()) and same(answer, s) for s in sampled])) if sampled else math.nan


def meanings(sampled: Sequence[str], same: Callable[[str, str], bool] = equivalent) -> list[int]:
    """The cluster of each answer: that of the first answer it is equivalent to, else a new one."""
    first: list[str] = []
    found = []
    for text in sampled:
        at = next((k for k, other in enumerate(first) if text.strip() and same(text, other)), len(first))  # nothing said means nothing twice
        if at == len(first):
            first.append(text)
        found.append(at)
    return found


def semantic_entropy(sampled: Sequence[str], same: Callable[[str, str], bool] = equivalent) -> float:
    """Entropy in nats of how often each meaning was sampled, from 0 (always the same) to log N; NaN below two answers.

    same: equivalence of two answers; the paper's is entailment both ways by a language model.
    Source: Farquhar et al. 2024, Nature 630:625, the discrete version.
    """
    if len(sampled) < 2:
        return math.nan
    shares = np.bincount(meanings(sampled, same)) / len(sampled)
    return float(-(shares * np.log(shares)).sum()) + 0.0


def semantic_confidence(sampled: Sequence[str], same: Callable[[str, str], bool] = equivalent) -> float:
    """1 - semantic entropy / log N, in [0, 1]: a confidence to rank by; only a calibrator makes it a chance."""
    return 1 - semantic_entropy(sampled, same) / math.log(len(sampled)) if len(sampled) > 1 else math.nan


def how_sure(sample: Sample, prediction: Prediction) -> Sample:
    """The sample that asks the model how sure it is of its answer, about the same images; its id is ID@sure.

    Source: after Tian et al. 2023, Just ask for calibration (arXiv:2305.14975); the words are ours.
    """
    asked = (f"Question: {sample.question}\nAnswer given: {prediction.text}\nHow sure are you, from 0 to 100, that this answer is right? "
             "Reply with one whole number.")  # fmt: skip
    return replace(sample, id=f"{sample.id}@sure", turns=(Turn("user", asked),), choices=None, masks=(), regions=(), verb="ask")


def said_sure(text: str) -> float:
    """The confidence that a reply to :func:`how_sure` states, NaN where it states none or several.

    >>> said_sure("85"), said_sure("I am 90 % sure"), said_sure("70 out of 100"), said_sure("0.4")
    (0.85, 0.9, 0.7, 0.4)
    """
    numbers = re.findall(r"(?<![\w.])(-?\d+(?:\.\d+)?)(\s*%)?(?![\d.]*\d)", re.sub(r"(?:/|\bout of)\s*100\b|\bper ?cent\b", " %", said(text).lower()))
    chosen = {n for n, percent in numbers if percent} or {n for n, _ in numbers}
    if len(chosen) != 1:
        return math.nan
    (number,) = chosen
    value = float(number)
    if not ("." in number and value <= 1 and not any(percent for _, percent in numbers)):
        value /= 100
    return value if 0 <= value <= 1 else math.nan


def reliability(confidence: Sequence[float], right: Sequence[float], bins: int = BINS, adaptive: bool = False) -> list[dict[str, float]]:
    """The reliability diagram: for each bin that holds an item {low, high, confidence, accuracy, n}.

    Bins are (low, high], the first closed. adaptive: bounds at quantiles of the confidence, so that bins hold about the
    same number; equal confidences share a bin. NaN confidences are left out.
    """
    c, r = _known(confidence, right)
    if not len(c):
        return []
    at, edges = _bins(c, bins, adaptive)
    inside = {int(b): at == b for b in np.unique(at)}
    return [{"low": float(edges[b]), "high": float(edges[b + 1]), "confidence": float(c[k].mean()), "accuracy": float(r[k].mean()), "n": int(k.sum())}
            for b, k in inside.items()]  # fmt: skip


def ece(confidence: Sequence[float], right: Sequence[float], bins: int = BINS, adaptive: bool = False) -> float:
    """Expected calibration error: mean over items of how far their bin's accuracy is from its mean confidence.

    Source: Guo et al. 2017 (arXiv:1706.04599); adaptive: Nguyen & O'Connor 2015 (arXiv:1508.05154).
    """
    c, r = _known(confidence, right)
    if not len(c):
        return math.nan
    at, edges = _bins(c, bins, adaptive)
    return float(np.abs(np.bincount(at, c - r, len(edges) - 1)).sum() / len(c))


def classwise_ece(chances: np.ndarray, truth: np.ndarray, bins: int = BINS) -> float:
    """Mean over labels of the ECE of each label's own chance. chances, truth: (N, L); truth 1, 0 or NaN (not known).

    Source: Kull et al. 2019, Beyond temperature scaling (arXiv:1910.12656).
    """
    chances, truth = np.asarray(chances, float), np.asarray(truth, float)
    each = [ece(chances[known, k], truth[known, k], bins) for k in range(truth.shape[1]) if (known := np.isfinite(truth[:, k])).any()]
    return float(np.mean(each)) if each else math.nan


def brier(chances: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) squared error of each item: (p - y)^2 for (N,) chances; summed over classes, so from 0 to 2, for (N, K).

    Source: Brier 1950, Monthly Weather Review 78:1 (its own form is the sum over classes).
    """
    error = (np.asarray(chances, float) - np.asarray(truth, float)) ** 2
    return error if error.ndim == 1 else error.sum(1)


def log_loss(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N,) negative log likelihood in nats; chances are kept a float's epsilon off 0 and 1, as scikit-learn does."""
    eps = np.finfo(float).eps
    c, r = np.clip(np.asarray(confidence, float), eps, 1 - eps), np.asarray(right, float)
    return -(r * np.log(c) + (1 - r) * np.log1p(-c))


@dataclass(frozen=True)
class Calibrator:
    """A map from confidence to chance that was fitted on val and may be used on test.

    kind: "temperature" sigmoid(logit / T) · "platt" sigmoid(logit * scale + shift) · "isotonic" the best non-decreasing
    map, linear between its points. parameters: ((T,),), ((scale, shift),), ((x...), (y...)). n: items it was fitted on.
    Source: Guo et al. 2017 (temperature); Platt 1999; Zadrozny & Elkan 2002 (isotonic).
    """

    kind: str
    parameters: tuple[tuple[float, ...], ...]
    n: int = 0

    @classmethod
    def fit(cls, kind: str, confidence: Sequence[float], right: Sequence[float]) -> Calibrator:
        """NaN confidences are left out; with nothing left the map changes nothing.

        Raises:
            ModelError: BAD_ARGUMENT for an unknown kind.
        """
        from scipy.optimize import isotonic_regression, minimize_scalar

        c, r = _known(confidence, right)
        if kind == "platt":
            return cls(kind, (fit_platt(_logit(c), r),), len(c))
        if kind == "temperature":
            z = _logit(c)
            loss = lambda t: np.logaddexp(0, z * np.exp(-t)).sum() - (r * z).sum() * np.exp(-t)  # noqa: E731
            best = minimize_scalar(loss, bounds=(-4, 4), method="bounded").x if len(c) else 0.0
            return cls(kind, ((float(np.exp(best)),),), len(c))
        if kind == "isotonic":
            if not len(c):
                return cls(kind, ((0.0, 1.0), (0.0, 1.0)))
            x, at, counts = np.unique(c, return_inverse=True, return_counts=True)
            y = isotonic_regression(np.bincount(at, r) / counts, weights=counts).x
            return cls(kind, (tuple(map(float, x)), tuple(map(float, y))), len(c))
        raise ModelError(f"there is no calibration {kind!r}", "BAD_ARGUMENT", "use temperature, platt or isotonic")

    def apply(self, confidence: Sequence[float]) -> np.ndarray:
        """(N,) chances; NaN stays."""
        c = np.asarray(confidence, float)
        if self.kind == "isotonic":
            return np.where(np.isfinite(c), np.interp(c, *self.parameters), math.nan)
        (values,) = self.parameters
        scale, shift = (1 / values[0], 0.0) if self.kind == "temperature" else values
        return 1 / (1 + np.exp(-(_logit(c) * scale + shift)))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "parameters": [list(p) for p in self.parameters], "n": self.n}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Calibrator:
        return cls(said["kind"], tuple(tuple(map(float, p)) for p in said["parameters"]), int(said.get("n", 0)))


def _known(confidence, right) -> tuple[np.ndarray, np.ndarray]:
    c, r = np.asarray(confidence, float), np.asarray(right, float)
    known = np.isfinite(c) & np.isfinite(r)
    return c[known], r[known]


def _bins(c: np.ndarray, bins: int, adaptive: bool) -> tuple[np.ndarray, np.ndarray]:
    edges = np.quantile(c, np.linspace(0, 1, bins + 1)) if adaptive else np.linspace(0, 1, bins + 1)
    return np.searchsorted(edges[1:-1], c), edges


def _logit(c) -> np.ndarray:
    c = np.clip(np.asarray(c, float), 1e-6, 1 - 1e-6)
    return np.log(c / (1 - c))


def risk_coverage(confidence: Sequence[float], right: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(thresholds falling, coverage, risk): at each, the share of items answered and the share of errors among them.

    One point for each distinct confidence: items that tie are answered together or not at all. NaN comes last, as -inf.
    Source: El-Yaniv & Wiener 2010, JMLR 11:1605.
    """
    levels, counts, errors = _levels(confidence, right)
    answered = counts.cumsum()
    return levels, answered / max(1, len(right)), errors.cumsum() / np.maximum(1, answered)


def _levels(confidence, right):
    c = np.where(np.isfinite(confidence), confidence, -np.inf)
    levels, at, counts = np.unique(-c, return_inverse=True, return_counts=True)
    return -levels, counts, np.bincount(at, 1 - np.asarray(right, float), len(levels))


def aurc(confidence: Sequence[float], right: Sequence[float]) -> float:
    """Area under the risk-coverage curve: mean over items of the risk when each is the last one answered; lower is better.

    Source: Geifman et al. 2019, Bias-reduced uncertainty estimation (arXiv:1805.08206).
    """
    _, counts, errors = _levels(confidence, right)
    return float((counts * errors.cumsum() / counts.cumsum()).sum() / len(right)) if len(right) else math.nan


def augrc(confidence: Sequence[float], right: Sequence[float]) -> float:
    """Area under the generalised risk-coverage curve: the average risk of an error that goes undetected; lower is better.

    The generalised risk is the share of all items that are answered and wrong; its area by the trapezium rule over distinct
    confidences is sum over errors i of (items below i + half of those that tie with i, itself among them) / N^2, which is
    (1 - AUROC) * accuracy * (1 - accuracy) + (1 - accuracy)^2 / 2, between 0 and 0.5.
    Source: Traub et al. 2024 (arXiv:2407.01032); curve as in IML-DKFZ/fd-shifts.
    """
    _, counts, errors = _levels(confidence, right)
    return float((counts * (errors.cumsum() - errors / 2)).sum() / len(right) ** 2) if len(right) else math.nan


def coverage_at_risk(confidence: Sequence[float], right: Sequence[float], risk: float = RISK) -> float:
    """The largest share that can be answered with at most this share of errors among the answered; 0 where there is none."""
    _, covered, risks = risk_coverage(confidence, right)
    return float(covered[risks <= risk].max(initial=0.0))


def accuracy_at_coverage(confidence: Sequence[float], right: Sequence[float], coverage: float = COVERAGE) -> float:
    """Share right among the most confident items, at least this share of all (more where they tie)."""
    _, covered, risks = risk_coverage(confidence, right)
    return float(1 - risks[np.argmax(covered >= coverage - 1e-12)]) if len(risks) else math.nan


def scores(samples: Sequence[Sample], predictions: Sequence[Prediction], right: Sequence[float], confidence: Sequence[float] | None = None,
           calibrators: Sequence[Calibrator] = ()) -> list[Score]:  # fmt: skip
    """How far the confidence in these answers can be trusted, each with its interval.

    Args:
        right: 1 or 0 a sample. confidence: from another source than :func:`confidences`; failures are set to 0.
        calibrators: fitted on other samples than these; ECE and Brier after each.
    """
    r = np.asarray(right, float)
    c = confidences(predictions) if confidence is None else np.where([p.error is not None for p in predictions], 0.0, np.asarray(confidence, float))
    given = np.isfinite(c)
    about = "share of answers with a confidence; a failure has one, 0"
    found = [mean_of("confidence given", samples, given.astype(float), better="neither", convention=about)]
    if not given.any():
        return found
    known, ck, rk, missing = [s for s, g in zip(samples, given) if g], c[given], r[given], int((~given).sum())
    rate = float(rk.mean())
    for adaptive, name, how in ((False, "ECE", "of equal width"), (True, "adaptive ECE", "of equal count, bounds at quantiles")):
        about = {"excluded": missing, "better": "lower",
                 "convention": f"{BINS} bins {how}; answers without a confidence are excluded; drawing with repeats lifts it"}  # fmt: skip
        found.append(statistic_of(name, known, lambda i, a=adaptive: ece(ck[i], rk[i], adaptive=a), **about))
    guess = "chance: the accuracy itself as every confidence"
    found.append(mean_of("Brier", samples, brier(c, r), better="lower", chance=rate * (1 - rate),
                         convention=f"mean (confidence - right)^2; {guess}"))  # fmt: skip
    entropy = float(log_loss(np.array([rate]), np.array([rate]))[0])
    found.append(mean_of("log loss", samples, log_loss(c, r), better="lower", chance=entropy, unit="nats",
                         convention=f"mean negative log likelihood of being right or wrong; {guess}"))  # fmt: skip
    for calibrator in calibrators:
        fair, name = np.where([p.error is not None for p in predictions], 0.0, calibrator.apply(c)), calibrator.kind
        about = {"better": "lower", "convention": f"after {name}, fitted on {calibrator.n} other answers"}
        found.append(statistic_of(f"ECE after {name}", known, lambda i, fair=fair[given]: ece(fair[i], rk[i]), **about, excluded=missing))
        found.append(mean_of(f"Brier after {name}", samples, brier(fair, r), **about))
    error = 1 - float(r.mean())
    selective: list[tuple[str, Callable, float | None, str, str]] = [
        ("AUROC of confidence", auroc, 0.5, "higher", "chance that a right answer has more confidence than a wrong one, ties half"),
        ("AURC", aurc, error, "lower", "mean risk over coverages, ties answered together"),
        ("AUGRC", augrc, error / 2, "lower", "average risk of an undetected error, arXiv:2407.01032"),
        (f"coverage at {RISK:.0%} risk", coverage_at_risk, None, "higher", "largest share answered with at most so many errors in it"),
        (f"accuracy at {COVERAGE:.0%} coverage", accuracy_at_coverage, 1 - error, "higher", "share right of the most confident ones"),
    ]  # fmt: skip
    ranked = np.where(given, c, -np.inf)
    for name, statistic, chance, better, how in selective:
        how += "; an answer without a confidence is refused first"
        found.append(statistic_of(name, samples, lambda i, f=statistic: f(ranked[i], r[i]), chance=chance, better=better, convention=how))
    return found
