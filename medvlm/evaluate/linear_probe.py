"""Linear probe and few-shot: what a logistic regression on frozen image vectors learns from the training split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..sample import Prediction, Sample
from .base import Task, check_pairs, cluster, mean_of, statistic_of
from .gaps import robustness_index
from .retrieve import unit_vectors
from .statistics import Score, auroc, surest_wrong
from .zeroshot import area, labelled, score_classes, score_findings, steps, support, truths

SHOTS, SEEDS = (1, 2, 4, 8, 16), (0, 1, 2, 3, 4)
"""Training images a class of the few-shot probe, and the seeds of their draws. Source of the shots: CLIP, Radford et al. 2021
(arXiv:2103.00020), figure 6."""
STRENGTH = 1.0
"""C of the logistic regression for few shots, and where there is no val to choose it on: scikit-learn's own."""
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Those tried on val; of equal ones the smallest wins."""
HOW = "logistic regression (L2) on image vectors of train, standardised by their mean and spread"


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """The images to embed: those to score, and those of train and val to fit on, marked with ``meta["fit"]``.

    Their ids are ID@image. [] where train does not hold two classes of anything; patients that are scored are never fitted on.
    """
    scored = read(split)
    found = labelled([*scored, *(s for other in ("train", "val") if other != split for s in support(read, other, scored))])
    train = [s for s in found if s.meta.get("fit") == "train"]
    if all("fit" in s.meta for s in found) or not _learnable(_truth(train, _names(train))):
        return []
    return [replace(s, id=f"{s.id}@image", verb="embed") for s in found]


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str = "") -> list[Score]:
    """The scores of zero-shot classification for the probe's probabilities, the few-shot curve, and the robustness index where
    ``meta["site"]`` is known. An image to score that was not embedded is wrong; one to fit on is passed over, which is said.
    """
    check_pairs(samples, predictions)
    found: list[Score] = []
    for single in (False, True):
        pairs = [(s, p) for s, p in zip(samples, predictions) if ("class" in s.meta) == single]
        parts = {kind: [x for x in pairs if x[0].meta.get("fit") == kind] for kind in (None, "train", "val")}
        if parts[None] and parts["train"]:
            found += [replace(s, convention=f"{HOW}; {s.convention}") for s in _probe(parts, single)]
        if parts[None] and single:
            found += _sites(*zip(*parts[None]))
    return found


def _probe(parts: dict[str | None, list[tuple[Sample, Prediction]]], single: bool) -> list[Score]:
    scored, names = [s for s, _ in parts[None]], _names([s for part in parts.values() for s, _ in part])
    vectors = unit_vectors([p.vectors.get("image") if p.error is None else None for part in parts.values() for _, p in part])
    x = dict(zip(parts, np.split(vectors, np.cumsum([len(part) for part in parts.values()])[:-1])))
    y = {kind: _truth([s for s, _ in part], names) for kind, part in parts.items()}
    there = np.isfinite(x["train"]).all(1) & bool(vectors.size)
    lost = f"{(~there).sum()} of {len(there)} training images were not embedded" if not there.all() else ""
    learned = _learnable(y["train"][there]) if there.any() else list(range(len(names)))
    if not learned:
        return [Score("accuracy" if single else "macro AUROC", math.nan, 0, len(scored), note="train holds one class of everything")]
    names, y = [names[j] for j in learned], {kind: t[:, learned] for kind, t in y.items()}
    x["train"], y["train"] = x["train"][there], y["train"][there]
    if len(x["train"]):
        centre, spread = x["train"].mean(0), x["train"].std(0)
        x = {kind: (part - centre) / np.where(spread > 0, spread, 1) for kind, part in x.items()}
    strengths = _strengths(x, y, single)
    chances = {kind: _chances(x["train"], y["train"], x[kind], strengths, single) for kind in (None, "val")}
    said = {kind: [_said(p, row, names) for (_, p), row in zip(parts[kind], chances[kind])] for kind in chances}
    if single:
        found = score_classes(scored, said[None])
    else:
        scored = [replace(s, choices=tuple(n for n in names if n in s.choices)) for s in scored]
        found = score_findings(scored, said[None], val=list(zip((s for s, _ in parts["val"]), said["val"])))
    about = f"C {'chosen on val' if parts['val'] else 'not chosen, no val'}: {', '.join(f'{c:g}' for c in dict.fromkeys(strengths))}"
    found = [replace(s, convention=f"{about}; {s.convention}", note="; ".join(filter(None, (s.note, lost)))) for s in found]
    return found + [_few(k, scored, x, y, single) for k in SHOTS]


def _few(k: int, samples: Sequence[Sample], x: dict, y: dict, single: bool) -> Score:
    """Probes fitted on k training images of each class (k with and k without, for a finding), mean over ``SEEDS``."""
    name = f"{k}-shot {'accuracy' if single else 'macro AUROC'}"
    rich = [j for j, t in enumerate(y["train"].T) if (t == 1).sum() >= k and (single or (t == 0).sum() >= k)]
    if not rich or (single and len(rich) < y["train"].shape[1]):
        least = int((y["train"] == 1).sum(0).min(initial=len(samples))) if len(y["train"]) else 0
        return Score(name, math.nan, 0, len(samples), note=f"train has no {k} images of every class (fewest: {least})")
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng([seed, k])
        draw = lambda at: rng.choice(np.flatnonzero(at), k, replace=False)  # noqa: B023, E731
        if single:
            at = np.concatenate([draw(t == 1) for t in y["train"].T])
            found.append(_chances(x["train"][at], y["train"][at], x[None], [STRENGTH], True))
        else:
            each = [np.concatenate([draw(y["train"][:, j] == v) for v in (1, 0)]) for j in rich]
            found.append(np.hstack([_chances(x["train"][at], y["train"][at][:, [j]], x[None], [STRENGTH], False) for at, j in zip(each, rich)]))
    how = f"C = {STRENGTH:g}, mean over seeds {SEEDS[0]} to {SEEDS[-1]}; the interval is over images, not over draws of the shots"
    chance = 1 / y["train"].shape[1] if single else 0.5
    if single:
        right = np.array([(p.argmax(1) == t.argmax(1)) & np.isfinite(p).all(1) & (t == 1).any(1) for p, t in ((p, y[None]) for p in found)], float)
        part, by_seed = mean_of(name, samples, right.mean(0), chance=chance, convention=how), right.mean(1)
    else:
        truth = y[None][:, rich]
        walks = [[steps(column, t) for column, t in zip(surest_wrong(p, truth).T, truth.T)] for p in found]
        by_seed = [_mean(area(*f(np.arange(len(samples)))) for f in walk) for walk in walks]
        part = statistic_of(name, samples, lambda i: _mean(area(*f(i)) for walk in walks for f in walk), chance=chance,
                            convention=f"{how}; mean over {len(rich)} of {truth.shape[1]} labels, those with both classes")  # fmt: skip
    return replace(part, note="; ".join(filter(None, (f"by seed {' '.join(f'{v:.3f}' for v in by_seed)}", part.note))))


def _sites(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """The robustness index of the images to score, where their site is known."""
    vectors = unit_vectors([p.vectors.get("image") if p.error is None else None for p in predictions])
    at = [i for i, s in enumerate(samples) if s.meta.get("site") not in (None, "") and vectors.size and np.isfinite(vectors[i]).all()]
    if len({str(samples[i].meta["site"]) for i in at}) < 2:
        return []
    there = [samples[i] for i in at]
    return [robustness_index(vectors[at], [s.meta["class"] for s in there], [s.meta["site"] for s in there], [cluster(s) for s in there],
                             [s.id for s in there], excluded=len(samples) - len(at))]  # fmt: skip


def _names(samples: Sequence[Sample]) -> list[str]:
    return sorted({n for s in samples for n in s.choices or ()})


def _truth(samples: Sequence[Sample], names: Sequence[str]) -> np.ndarray:
    """(N, names) 1, 0 or NaN; of images with a class, 1 for that one and 0 for the others."""
    if samples and "class" in samples[0].meta:
        return np.array([[float(n == s.meta["class"]) for n in names] for s in samples])
    return truths(samples, names)


def _learnable(truth: np.ndarray) -> list[int]:
    return [j for j, t in enumerate(truth.T) if {0, 1} <= set(t)]


def _chances(x: np.ndarray, y: np.ndarray, asked: np.ndarray, strengths: Sequence[float], single: bool) -> np.ndarray:
    """(asked, labels) probabilities by regressions fitted on x and y: one over classes, or one a label; NaN without a vector.

    strengths: C, one, or one a label.
    """
    from sklearn.linear_model import LogisticRegression

    found = np.full((len(asked), y.shape[1]), np.nan)
    there = np.isfinite(asked).all(1)
    if not len(x) or not there.any():
        return found
    if single:
        model = LogisticRegression(C=strengths[0], max_iter=2000).fit(x, y.argmax(1))
        found[there] = 0
        found[np.ix_(there, model.classes_)] = model.predict_proba(asked[there])
        return found
    for j, c in enumerate(strengths):
        known = np.isfinite(y[:, j])
        found[there, j] = LogisticRegression(C=c, max_iter=2000).fit(x[known], y[known, j]).predict_proba(asked[there])[:, 1]
    return found


def _strengths(x: dict, y: dict, single: bool) -> list[float]:
    """C for the classes, or for each label, by accuracy or AUROC on val."""
    labels = 1 if single else y["train"].shape[1]
    if not len(x["train"]) or not len(x["val"]):
        return [STRENGTH] * labels
    value = np.zeros((len(STRENGTHS), labels))
    there = np.isfinite(x["val"]).all(1)
    for row, c in zip(value, STRENGTHS):
        said = _chances(x["train"], y["train"], x["val"][there], [c] * labels, single)
        if single:
            row[:] = (said.argmax(1) == y["val"][there].argmax(1)).mean() if there.any() else math.nan
        else:
            row[:] = [auroc(p[known], t[known]) if (known := np.isfinite(t)).any() else math.nan for p, t in zip(said.T, y["val"][there].T)]
    return [STRENGTHS[int(v.argmax())] if np.isfinite(v).all() else STRENGTH for v in value.T]


def _said(p: Prediction, chances: np.ndarray, names: Sequence[str]) -> Prediction:
    if not np.isfinite(chances).all():
        return Prediction(p.id, error=p.error or "NO_VECTOR: the image was not embedded, or nothing to learn from was")
    best = int(chances.argmax())
    return Prediction(p.id, names[best], float(chances[best]), dict(zip(names, chances.tolist())))


def _mean(values) -> float:
    known = [v for v in values if math.isfinite(v)]
    return float(np.mean(known)) if known else math.nan


TASK = Task(prepare, score, {"standardised": f"{HOW}; C is chosen on val where there is one, else {STRENGTH:g}"}, rank=6)
