"""The published ProbMed scorer, with what is wrong in it, so that published numbers can be compared.

What it does, and the corrected probe task does not:

- "Yes" or "No" anywhere in an answer counts, in this case only ("Normal", "Nodule" and "Not sure" are a no), and "yes" or
  "no" alone in any case; "no, absent" is wrong.
- Records of one image are those that follow one another. Modality and organ questions that are not two are dropped, but not
  in the last image of an image type; a condition or position pair opens with its ``gt`` record, and a ``hallu`` record
  whose number is not that of the last ``gt`` record is dropped, so that a missing record takes its pair away.
- An image without condition or position questions is left out of their accuracy, yet counts in the number of images by
  which accuracies are weighted: of image types within a category, then of categories.
- "Without adversarial pairs" is whether the first question of each pair is right, and leaves abnormality out. The final
  print of the script gives this number three times, under three names.

Where the script stops, this says so: a category that an image type has no answer of makes NaN, two ``hallu`` records after
one ``gt`` record, or a ``hallu`` record before any in the first image, an error.

Source: eric-ai-lab/ProbMed, eval/calculate_score.py at cb06421 (2024); Yan et al. 2025, arXiv 2405.20421.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from ..datasets.probmed import CATEGORIES
from ..errors import ModelError
from ..sample import Prediction, Sample
from .answers import probmed_match
from .base import cluster
from .statistics import Score, mean_score, statistic_score

_SAYS = "probmed-original: 'Yes' or 'No' as a part of the answer, images within an image type, weighted by the script's count of images"
_STOPS = "the published script stops here: an image type has nothing to count in this category"
_HIT, _FIRST, _SCORED, _COUNT, _GUESS, _GUESS_FIRST = range(6)


@dataclass(frozen=True)
class Image:
    """A run of records of one image. kind: its image type. at: index of its first record. marks: 1 or 0 for each answer of
    abnormality, modality and body_part; pairs of them for entity (or one mark alone) and grounding."""

    kind: str
    at: int
    marks: dict[str, list]


def images(records: Sequence[Mapping[str, Any]]) -> list[Image]:
    """What the script makes of records (id, image_type, qa_type, gt_ans, response) in their order, image type by image type.

    Raises:
        ModelError: BAD_ARGUMENT where the script stops with an error.
    """
    by_type: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for at, record in enumerate(records):
        by_type.setdefault(record["image_type"], []).append((at, record))
    found = []
    for kind, told in by_type.items():
        runs = [list(run) for _, run in groupby(told, lambda r: r[1]["id"])]
        for i, run in enumerate(runs):
            marks = _marks(run, first=i == 0)
            for c in ("modality", "body_part"):
                if len(marks[c]) != 2 and i < len(runs) - 1:  # the script does not look at its last image
                    marks[c] = []
            found.append(Image(kind, run[0][0], marks))
    return found


def _marks(run: Sequence[tuple[int, Mapping[str, Any]]], first: bool) -> dict[str, list]:
    marks: dict[str, list] = {c: [] for c in CATEGORIES}
    opened: dict[str, tuple[str, list[int]]] = {}
    for at, record in run:
        asked, mark = record["qa_type"], int(probmed_match(record["response"], record["gt_ans"]))
        other = "abnormality" if asked == "abnormality" else "entity" if "entity" in asked else "grounding"
        kind = next((c for c in ("modality", "body_part") if c in asked), other)
        number = asked.split("_")[-1]
        if kind in ("abnormality", "modality", "body_part"):
            marks[kind].append(mark)
        elif asked == "entity_hallu":
            marks[kind] = [mark]
        elif "gt" in asked:
            opened[kind] = (number, [mark])
        elif kind not in opened and first:
            raise ModelError(f"record {at} is an adversarial question before any other of its kind: the published script stops here", "BAD_ARGUMENT")
        elif kind in opened and opened[kind][0] == number:
            pair = opened[kind][1]
            if len(pair) == 2:
                raise ModelError(f"record {at} is the second adversarial question of one pair: the published script stops here", "BAD_ARGUMENT")
            pair.append(mark)
            marks[kind].append(pair)
    return marks


def table(found: Sequence[Image]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(image types, (N,) index of each image's type, (N, 5, 6) what each image adds to each category).

    The six: right, right without adversarial questions, images scored, images counted, and what a coin adds to the first two.
    """
    kinds = list(dict.fromkeys(i.kind for i in found))
    adds = np.zeros((len(found), len(CATEGORIES), 6))
    for n, image in enumerate(found):
        for c, (kind, marks) in enumerate(image.marks.items()):
            if kind == "abnormality":
                adds[n, c] = sum(marks), 0, len(marks), len(marks), len(marks) / 2, 0
                continue
            if not marks:
                adds[n, c, _COUNT] = kind in ("entity", "grounding")
                continue
            units = marks if isinstance(marks[0], list) else [marks]
            right = all(m == 1 for unit in units for m in unit)
            adds[n, c] = right, all(unit[0] == 1 for unit in units), 1, 1, 0.5 ** sum(map(len, units)), 0.5 ** len(units)
    return kinds, np.array([kinds.index(i.kind) for i in found], int), adds


def accuracy(types: np.ndarray, adds: np.ndarray, which: Sequence[int], part: int = _HIT):
    """(indices of images) -> accuracy over these categories: of each image type, weighted by its images as counted; NaN
    where the script would divide by nothing."""
    of_type = np.eye(int(types.max()) + 1)[types].T
    right, scored, count = adds[:, which, part], adds[:, which, _SCORED], adds[:, which, _COUNT]

    def statistic(drawn: np.ndarray) -> float:
        weight = of_type * np.bincount(drawn, minlength=len(types))
        there = weight.sum(1) > 0
        r, s, n = (weight[there] @ x for x in (right, scored, count))
        if (s == 0).any():
            return float("nan")
        return float((r / s * n).sum() / n.sum())

    return statistic


def published(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """The numbers of the published script as fractions: overall, of each category, and of each category and image type.

    A failed prediction is an empty answer. Chance is what a coin gets by the same arithmetic.

    Raises:
        ModelError: BAD_ARGUMENT when samples are not ProbMed's, or where the script stops with an error.
    """
    for s in samples:
        if not all(s.meta.get(f) for f in ("row", "qa_type", "image_type")):
            raise ModelError(f"the convention probmed-original scores samples of ProbMed; {s.id!r} has no image type or qa_type", "BAD_ARGUMENT",
                             "use the convention medvlm, or give ProbMed's folder")  # fmt: skip
    if not samples:
        return []
    records = [
        {"id": s.meta["row"], "image_type": str(s.meta["image_type"]), "qa_type": str(s.meta["qa_type"]), "gt_ans": (s.answer or "").strip().lower(),
         "response": "" if p.error is not None else p.text}
        for s, p in zip(samples, predictions)
    ]  # fmt: skip
    found = images(records)
    kinds, types, adds = table(found)
    where = [cluster(samples[i.at]) for i in found]
    names = [str(samples[i.at].meta["row"]) for i in found]

    def whole(name: str, which: Sequence[int], part: int) -> Score:
        guess = accuracy(types, adds, which, _GUESS + part)(np.arange(len(types)))
        made = statistic_score(name, accuracy(types, adds, which, part), where, names, convention=_SAYS, chance=guess if np.isfinite(guess) else None)
        return made if np.isfinite(made.value) else replace(made, note=_STOPS)

    paired = [c for c, kind in enumerate(CATEGORIES) if kind != "abnormality"]
    scores = [whole("ProbMed accuracy", range(len(CATEGORIES)), _HIT), whole("ProbMed accuracy without adversarial pairs", paired, _FIRST)]
    for c, category in enumerate(CATEGORIES.values()):
        scores.append(whole(f"{category} accuracy", [c], _HIT))
        if c in paired:
            scores.append(whole(f"{category} accuracy without adversarial pairs", [c], _FIRST))
    for t, kind in enumerate(kinds):
        here = np.flatnonzero(types == t)
        for c, (key, category) in enumerate(CATEGORIES.items()):
            for part, name in ((_HIT, f"{category} accuracy"), (_FIRST, f"{category} accuracy without adversarial pairs"))[: 1 + (c in paired)]:
                if key == "abnormality":
                    marks = [(n, m) for n in here for m in found[n].marks[key]]
                else:
                    marks = [(n, adds[n, c, part] if adds[n, c, _SCORED] else float("nan")) for n in here]
                groups, ids = [where[n] for n, _ in marks], [names[n] for n, _ in marks]
                made = mean_score(name, [m for _, m in marks], groups, ids, convention=_SAYS, slice=f"image_type={kind}")
                note = _STOPS if not made.n else f"counts as {int(adds[here, c, _COUNT].sum())}"
                scores.append(replace(made, note="; ".join(filter(None, [note, made.note]))))
    return scores
