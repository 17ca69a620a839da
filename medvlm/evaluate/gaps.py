"""Gaps between groups of patients, and whether an embedding knows the disease or the hospital."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ModelError
from ..sample import Sample
from .statistics import FEWEST_CLUSTERS, SEED, Score, statistic_score

GROUPS = ("sex", "site", "modality", "age_group", "ethnicity", "scanner")
"""Keys of ``Sample.meta`` that gaps are looked for between."""
NEIGHBOURS = (1, 3, 5, 7, 9, 11, 21, 31, 41, 51, 61, 71, 81, 91, 101)
"""Among which the robustness index finds its k."""


def gaps(score: Score, samples: Sequence[Sample], keys: Sequence[str] = GROUPS) -> list[Score]:
    """:func:`gap` for every key of ``Sample.meta`` that tells at least two of the score's items apart."""
    found = []
    for key in keys:
        groups = {s.id: str(s.meta[key]) for s in samples if s.meta.get(key) not in (None, "")}
        if score.items is not None and len({groups[i] for i in score.items.ids if i in groups}) > 1:
            found.append(gap(score, groups, key))
    return found


def gap(score: Score, groups: Mapping[str, Hashable], key: str = "group", shuffles: int = 200) -> Score:
    """The score of the group where it is highest less that of the group where it is lowest.

    groups: {id of an item: its group}. Items without one, and groups below ``FEWEST_CLUSTERS`` clusters, are excluded. The
    interval draws clusters and keeps the two groups that stand at the ends of the full set, so it can reach zero. chance:
    the mean gap when groups are dealt at random (whole clusters where no cluster is mixed), since the highest less the
    lowest of several groups is above zero even where groups do not matter. The note names the two, and how often (p) a deal
    has such a gap or more.

    Raises:
        ModelError: BAD_ARGUMENT for a score that was not kept with its items.
    """
    if (items := score.items) is None:
        raise ModelError(f"the score {score.name!r} was not kept with its items", "BAD_ARGUMENT")
    name, members = f"{score.name} gap by {key}", {}
    for k, i in enumerate(items.ids):
        if i in groups:
            members.setdefault(groups[i], []).append(k)
    members = {g: m for g, m in members.items() if len({items.clusters[k] for k in m}) >= FEWEST_CLUSTERS}
    at = np.array([k for m in members.values() for k in m], int)
    label = np.array([n for n, m in enumerate(members.values()) for _ in m], int)
    clusters = [items.clusters[k] for k in at]
    about = {"excluded": len(items.ids) - len(at), "unit": score.unit, "better": "lower", "task": score.task,
             "convention": f"highest less lowest group; {score.convention}"}  # fmt: skip

    def each(label: np.ndarray) -> np.ndarray:
        return np.array([items.statistic(at[label == n]) for n in range(len(members))], float)

    found = each(label)
    if np.isfinite(found).sum() < 2:
        return Score(name, math.nan, 0, **about | {"excluded": len(items.ids)}, note=f"fewer than two groups of {FEWEST_CLUSTERS} clusters have a value")
    ends = int(np.nanargmax(found)), int(np.nanargmin(found))
    dealt = np.array([np.nanmax(v) - np.nanmin(v) for v in map(each, _deals(label, clusters, shuffles)) if np.isfinite(v).any()])
    p = (1 + (dealt >= found[ends[0]] - found[ends[1]] - 1e-12).sum()) / (1 + len(dealt))

    def statistic(i: np.ndarray) -> float:
        high, low = (at[i[label[i] == n]] for n in ends)
        return items.statistic(high) - items.statistic(low) if len(high) and len(low) else math.nan

    said = ", ".join(f"{list(members)[n]} {found[n]:.3f} (n {(label == n).sum()})" for n in ends)
    return statistic_score(name, statistic, clusters, [items.ids[k] for k in at], **about, chance=float(dealt.mean()), note=f"{said}, p {p:.3f}")


def _deals(label: np.ndarray, clusters: Sequence[Hashable], shuffles: int) -> Iterator[np.ndarray]:
    """Labels dealt at random: to whole clusters, or to items where a cluster holds several labels."""
    number = {c: n for n, c in enumerate(dict.fromkeys(clusters))}
    unit = np.array([number[c] for c in clusters])
    whole = np.zeros(len(number), int)
    whole[unit] = label
    if (whole[unit] != label).any():
        unit, whole = np.arange(len(label)), label
    rng = np.random.default_rng(SEED)
    for _ in range(shuffles):
        yield rng.permutation(whole)[unit]


def robustness_index(vectors: np.ndarray, classes: Sequence[Hashable], sites: Sequence[Hashable], clusters: Sequence[Hashable],
                     ids: Sequence[str] | None = None, k: int | None = None, **about: Any) -> Score:  # fmt: skip
    """Whether an embedding is ordered by what is seen rather than by where it was made: SO / (SO + OS) over the k nearest
    neighbours of every item, SO of the same class and another site, OS of another class and the same site; 1 is best.

    Args:
        vectors: (N, D), compared by cosine. clusters: neighbours of the same cluster (patient, slide) are passed over.
        k: None for the one of ``NEIGHBOURS`` whose majority vote has the best balanced accuracy on the classes.

    chance is the index with neighbours at random. No value with one class, one site, or no such neighbour.
    Source: PathoROB, arXiv:2507.17845, and bifold-pathomics/PathoROB robustness_index (its interval also draws items with
    their neighbours kept).
    """
    x = np.asarray(vectors, np.float32)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    (y, site, unit), n = (np.unique([str(v) for v in of], return_inverse=True)[1] for of in (classes, sites, clusters)), len(x)
    most = min(max(NEIGHBOURS) if k is None else k, n - 1)
    name = "robustness index"
    if n < 2 or y.max() == 0 or site.max() == 0:
        return Score(name, math.nan, n, **about, better="higher", note="needs two classes and two sites")
    near, there, odds = np.zeros((n, most), int), np.zeros((n, most), bool), np.zeros((n, 2))
    for start in range(0, n, 512):
        rows = np.arange(start, min(start + 512, n))
        far = unit[rows][:, None] == unit[None]
        closeness = np.where(far, -np.inf, x[rows] @ x.T)
        near[rows] = np.argsort(-closeness, axis=1, kind="stable")[:, :most]
        there[rows] = np.isfinite(np.take_along_axis(closeness, near[rows], 1))
        kin, home = y[rows][:, None] == y[None], site[rows][:, None] == site[None]
        odds[rows] = np.stack([(kin & ~home & ~far).mean(1), (~kin & home & ~far).mean(1)], 1) / np.maximum((~far).mean(1), 1e-12)[:, None]
    if k is None:
        k = max((m for m in NEIGHBOURS if m <= most), key=lambda m: (_vote(y, near[:, :m], there[:, :m]), -m))
    kin, home, valid = y[near[:, :k]] == y[:, None], site[near[:, :k]] == site[:, None], there[:, :k]
    so, os = (kin & ~home & valid).sum(1), (~kin & home & valid).sum(1)
    how = f"{min(k, most)} nearest by cosine from other clusters; same class and other site / (that + other class and same site)"
    return statistic_score(name, lambda i: so[i].sum() / total if (total := so[i].sum() + os[i].sum()) else math.nan, list(clusters), ids, **about,
                           chance=float(odds[:, 0].sum() / odds.sum()) if odds.sum() else None, convention=how)  # fmt: skip


def _vote(y: np.ndarray, near: np.ndarray, there: np.ndarray) -> float:
    """Balanced accuracy of the neighbours' majority; of equal votes the first class wins."""
    votes = np.stack([((y[near] == c) & there).sum(1) for c in range(y.max() + 1)], 1).argmax(1)
    return float(np.mean([(votes[y == c] == c).mean() for c in np.unique(y)]))
