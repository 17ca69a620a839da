"""Retrieval: the text of an image among all texts, and the image of a text among all images, by what a model embeds them as."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np

from ..errors import ModelError
from ..sample import Prediction, Sample
from .base import Task, check_pairs, mean_of, statistic_of
from .statistics import Score

DEPTHS = (1, 5, 10)
"""k of recall@k. Source: Karpathy & Fei-Fei 2015 (arXiv:1412.2306), as CLIP-type models report it."""
ABOUT = ("by cosine; texts equal but for case and spaces are one candidate, and so are rows about the same image; of equal similarities the wrong "
         "one comes first; without a vector a query finds nothing and a candidate comes last")  # fmt: skip


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """The samples that hold an image and a text nobody asked for (a report, a caption), to embed both."""
    return [replace(s, verb="embed", masks=(), regions=()) for s in read(split) if s.images and not s.question and (s.answer or "").strip()]


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str = "") -> list[Score]:
    """recall@1, 5 and 10 and the median rank, both ways. A query is a sample; what counts is the best-placed of its targets.

    Raises:
        ModelError: BAD_ARGUMENT where image and text vectors are not of one space.
    """
    check_pairs(samples, predictions)
    of = {"image": _numbered([_image_key(s) for s in samples]), "text": _numbered([" ".join((s.answer or "").lower().split()) for s in samples])}
    vectors = {kind: unit_vectors([p.vectors.get(kind) if p.error is None else None for p in predictions]) for kind in of}
    sizes = {kind: v.shape[1] for kind, v in vectors.items() if v.size}
    if len(set(sizes.values())) > 1:
        raise ModelError(f"image vectors have {sizes['image']} values but text vectors {sizes['text']}: they share no space", "BAD_ARGUMENT",
                         "use a contrastive model")  # fmt: skip
    found: list[Score] = []
    for query, answer in (("image", "text"), ("text", "image")):
        pool = int(of[answer].max(initial=-1)) + 1
        candidates = np.full((pool, max(sizes.values(), default=1)), np.nan)
        for number, vector in zip(of[answer][::-1], vectors[answer][::-1]):  # the first row about a candidate speaks for it
            if np.isfinite(vector).all() and vector.size:
                candidates[number] = vector
        target = np.zeros((int(of[query].max(initial=-1)) + 1, pool), bool)
        target[of[query], of[answer]] = True
        near = vectors[query] @ candidates.T if vectors[query].size else np.full((len(samples), pool), np.nan)
        found += _scores(f"{query} to {answer}", samples, ranks(near, target[of[query]]), target[of[query]].sum(1), pool)
    return found


def ranks(near: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(queries,) place of each query's best target, from 1; ties with others are lost, inf where none can be found.

    near: (queries, candidates) similarity, NaN where a vector is missing: such a candidate comes last. target: bool, alike.
    """
    close = np.where(np.isnan(near), -np.inf, near)
    best = np.where(target, close, -np.inf).max(1, initial=-np.inf)
    return np.where(np.isfinite(best), (~target & (close >= best[:, None])).sum(1) + 1.0, np.inf)


def chance_of(targets: np.ndarray, pool: int, k: int) -> float:
    """Mean over queries of the chance that k of ``pool`` candidates drawn by lot hold one of its targets: k / pool for one."""
    draws = np.arange(min(k, pool))
    return float(1 - np.prod(np.clip(pool - targets[:, None] - draws, 0, None) / (pool - draws), axis=1).mean())


def _scores(name: str, samples: Sequence[Sample], places: np.ndarray, targets: np.ndarray, pool: int) -> list[Score]:
    found = []
    for k in DEPTHS:
        few = f"only {pool} candidates for recall@{k}: whatever is embedded is found" if pool <= k else ""
        part = mean_of(f"{name} recall@{k}", samples, places <= k, chance=chance_of(targets, pool, k), convention=f"{pool} candidates; {ABOUT}")
        found.append(replace(part, note="; ".join(filter(None, (few, part.note)))))
    last = np.where(np.isfinite(places), places, pool)
    guess = (pool + 1) / 2 if (targets == 1).all() else None
    found.append(statistic_of(f"{name} median rank", samples, lambda i: float(np.median(last[i])), chance=guess, unit="rank", better="lower",
                              convention=f"from 1 to {pool}; what is not found has the last place; {ABOUT}"))  # fmt: skip
    return found


def _image_key(sample: Sample) -> Hashable:
    return (sample.meta.get("dataset"), str(sample.meta["row"])) if "row" in sample.meta else tuple(map(id, sample.images.values()))


def _numbered(keys: Sequence[Hashable]) -> np.ndarray:
    number = {k: n for n, k in enumerate(dict.fromkeys(keys))}
    return np.array([number[k] for k in keys], int)


def unit_vectors(given: Sequence[np.ndarray | None]) -> np.ndarray:
    """(N, D) of unit length, NaN where there is none; (N, 0) where there is none at all."""
    arrays = [None if v is None else np.asarray(v, float).ravel() for v in given]
    sizes = {len(a) for a in arrays if a is not None}
    if len(sizes) > 1:
        raise ModelError(f"vectors of one kind have {sorted(sizes)} values", "BAD_ARGUMENT", "give vectors of one model")
    size = next(iter(sizes), 0)
    found = np.array([np.full(size, np.nan) if a is None else a for a in arrays]).reshape(len(arrays), size)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    return np.where(np.isfinite(length) & (length > 0), found / np.where(length > 0, length, 1), np.nan)


TASK = Task(prepare, score, {"pessimistic": ABOUT}, rank=5)
