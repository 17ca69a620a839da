"""Yes/no probes in pairs, in the manner of ProbMed, from any data set with labels, outlines, boxes or reports.

A pair is two questions about one image, one to be answered yes and its adversarial twin to be answered no: another modality or
organ, a finding that is not there, the wrong side. Only what the data say is asked: what is not labelled, or said twice
and differently, is no probe. Since an adversarial finding is nearly always absent, much can be answered without the
image; :func:`balance` keeps what cannot.
Source: Yan et al. 2025, arXiv:2405.20421 (the five questions and their twins); the wording is ours.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from ..evaluate.answers import normalise
from ..evaluate.base import cluster
from ..evaluate.probe import category, gold
from ..imaging.scan import Volume
from ..sample import Sample, Turn
from .facts import (
    ANNOTATED,
    FAR,
    MODALITY_NAMES,
    NORMAL,
    PARTS,
    Case,
    abnormal,
    apart,
    cases,
    part,
    places,
    regions,
    statements,
    structure,
)
from .sentences import article, word

KINDS = ("modality", "organ", "finding", "abnormality", "position")
"""What is asked after; also ``meta["probe_category"]``."""
WHOLE = ("modality", "organ")
"""Pools of questions about the picture as a whole: in these data sets differ, so that twins are found among all of them."""
_KEPT = ("split", "modality", "organ", "dataset", "labels")


@dataclass(frozen=True)
class Ask:
    """One question and its true answer. pool: its twin is a question of the same pool with the other answer; None where it wants none."""

    kind: str
    question: str
    yes: bool
    pool: str | None


def build(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """The probes that data without ready pairs give: the balanced ones, then the rest (``meta["balanced"]``).

    Kinds of picture and parts of the body are asked after among all data sets (``meta["dataset"]``); all else within each, whose
    own vocabulary it is drawn from: a finding that only one set knows would tell the sets apart, not the pictures.
    Reports of chest X-rays are read by :func:`medvlm.evaluate.labeller.label`.
    """
    from ..evaluate.labeller import label

    sets: dict[object, list[Sample]] = defaultdict(list)
    for sample in samples:
        sets[sample.meta.get("dataset")].append(sample)
    among = _shown(cases(samples))
    asked = [q for group in sets.values() for q in questions(group, KINDS, seed, label=label, among=among)]
    return [s for group in balance(asked, seed) for s in group]


def pairs(samples: Sequence[Sample], kinds: Iterable[str] = KINDS, seed: int = 0, annotated: Iterable[str] = ANNOTATED,
          label: Callable[[str], Mapping[str, float | None]] | None = None) -> list[Sample]:  # fmt: skip
    """Pairs as the data give them, not balanced. Arguments: see :func:`questions`.

    The two of a pair share ``group``; the no is ``meta["adversarial"]``. Questions of abnormality have no twin and no group.
    """
    return _twins(questions(samples, kinds, seed, annotated, label), seed)[0]


def questions(samples: Sequence[Sample], kinds: Iterable[str] = KINDS, seed: int = 0, annotated: Iterable[str] = ANNOTATED,
              label: Callable[[str], Mapping[str, float | None]] | None = None, among: tuple[list[str], list[str]] | None = None) -> list[Sample]:  # fmt: skip
    """Every yes/no question that the data answer about an image, one sample each, not yet in pairs.

    Args:
        samples: of one data set; those about the same image are taken together. Samples of several images are passed over.
        annotated: names (in the words of :func:`medvlm.datasets.sentences.word`) that were outlined wherever they were: one
            that is outlined on some image is absent from every outlined image where it is not.
        label: reads a report: {finding: 1 present | 0 denied | anything else not known}; without it reports are not used.
        among: (modalities, parts of the body) that are asked after; by default those of ``samples``.

    ``meta``: row, probe_category, adversarial, pool (what may be its twin), and what the samples say of their image.
    """
    found: list[Sample] = []
    there = cases(samples)
    for case, said in _asks(there, among or _shown(there), tuple(kinds), frozenset(annotated), label, seed):
        found += [_probe(case, ask) for ask in said]
    return found


def _shown(all_cases: Sequence[Case]) -> tuple[list[str], list[str]]:
    """(modalities, parts of the body) of these images."""
    return sorted({c.image.modality for c in all_cases} & MODALITY_NAMES.keys()), sorted({p for p in map(part, all_cases) if p})


def _asks(all_cases: Sequence[Case], among: tuple[list[str], list[str]], kinds: Sequence[str], annotated: frozenset[str], label: Callable[[str], Mapping[str, float | None]] | None,
         seed: int) -> Iterator[tuple[Case, list[Ask]]]:  # fmt: skip
    """Each case with its questions, each question once; see :func:`questions`."""
    modalities, shown = among
    parts = {c.row: part(c) for c in all_cases}
    drawn = {n for c in all_cases for n in (*c.outlines, *c.boxes)}
    outlined = sorted({n for c in all_cases for n in c.outlines} & annotated)
    boxed = sorted({n for c in all_cases for n in c.boxes if not structure(n)})
    for case in all_cases:
        lot = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed} {case.name}".encode()).digest()[:8]))
        told = _told(case, outlined, boxed, label)
        findings = {n: v for n, v in told.items() if n in map(word, case.labels) or n not in drawn or not structure(n)}
        found: list[Ask] = []
        if "modality" in kinds and case.image.modality in MODALITY_NAMES:
            found += _one_of("modality", "Is this {}?", case.image.modality, modalities, MODALITY_NAMES, lot)
        if "organ" in kinds:
            if parts[case.row]:
                found += _one_of("organ", "Is this an image of the {}?", parts[case.row], shown, {p: p for p in PARTS}, lot)
            here = {n: v for n, v in told.items() if n not in findings} | dict.fromkeys(_far(case), False)
            found += [Ask("organ", f"Does this image show the {n}?", bool(v), "organ shown") for n, v in here.items()]
        if "finding" in kinds:
            found += [Ask("finding", f"Does this image show {article(n)}{n}?", bool(v), "finding") for n, v in findings.items() if not NORMAL.match(n)]
        if "abnormality" in kinds and (ill := abnormal(case, findings)) is not None:
            found.append(Ask("abnormality", "Does this image show any abnormality?", ill, None))
        if "position" in kinds:
            found += _positions(case, told)
        yield case, list({a.question: a for a in found}.values())


def _one_of(kind: str, question: str, true: str, there: Sequence[str], names: Mapping[str, str], lot: np.random.Generator) -> list[Ask]:
    """The true one, and as wrong ones those the data show elsewhere, or one by lot where they show none."""
    wrong = [x for x in there if x != true] or [str(lot.choice([x for x in names if x != true]))]
    return [Ask(kind, question.format(names[x]), x == true, kind) for x in (true, *wrong)]


def _told(case: Case, outlined: Iterable[str], boxed: Iterable[str], label: Callable | None) -> dict[str, float]:
    """{name: 1 | 0} of what is said, and not contradicted."""
    found: dict[str, set[float]] = {}
    for _, name, value in statements(case, outlined, boxed, label):
        found.setdefault(name, set()).add(value)
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def _far(case: Case) -> list[str]:
    """Structures of ``FAR`` that lie at least two regions from a structure this image shows, and a short volume is all there is."""
    if not isinstance(case.image, Volume):
        return []
    return [name for region, name in FAR.items() if apart(case, {region}, regions(case)) and name not in case.outlines]


def _positions(case: Case, told: Mapping[str, float]) -> Iterator[Ask]:
    for name in {**case.boxes, **case.outlines}:
        for place in places(case, name) if told.get(name) == 1 else ():
            yield from (Ask("position", f"Is the {name} {place.said.format(o)}?", o == place.true, f"{name} {place.kind}") for o in place.options)


def _probe(case: Case, ask: Ask) -> Sample:
    meta = {k: case.base.meta[k] for k in _KEPT if k in case.base.meta}
    meta |= {"row": case.row, "probe_category": ask.kind, "category": [ask.kind], "type": "CLOSED", "adversarial": not ask.yes and ask.pool is not None,
             "pool": ask.pool, "derived": "from the annotations"}  # fmt: skip
    turns = (Turn("user", f"{ask.question} Answer yes or no."), Turn("assistant", "yes" if ask.yes else "no"))
    name = re.sub(r"\W+", "-", ask.question.lower()).strip("-")
    return Sample(f"{case.name}/{name}", case.base.patient, case.base.images, turns, choices=("yes", "no"), meta=meta)


def _twins(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """(pairs of a yes and a no of one image and pool, by lot, and singles that want no twin; what found no twin)."""
    pools: dict[tuple, tuple[list[Sample], list[Sample]]] = defaultdict(lambda: ([], []))
    made, left = [], []
    for s in samples:
        if _pool(s) is None:
            made.append(s)
        else:
            pools[_place(s), _pool(s)][gold(s) == "no"].append(s)
    for (place, pool), (yes, no) in pools.items():
        lot = _lot(seed, place, pool)
        yes, no = ([group[i] for i in lot.permutation(len(group))] for group in (yes, no))
        for twins in zip(yes, no):
            made += _joined(*twins)
        left += yes[len(no) :] + no[len(yes) :]
    return made, left


def balance(samples: Sequence[Sample], seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """(balanced, rest): probes that cannot be answered without the image, and those that can; ``meta["balanced"]`` says which.

    Takes any yes/no probes, joined in pairs already or not; pairs are joined anew. Of every question text as many are to be
    answered yes as no, so that whoever knows only the text gets half of the questions. Pairs come in twos: where the pair of one
    image says "A, not B", that of another says "B, not A". Who knows which of the two is commoner still gets one of such
    two, so these are at most as many as those of two common or two rare findings, of which he gets none: a
    quarter of all pairs at most, which is chance. What cannot be matched goes to the rest.
    A prior that leaves the asked image out does worse than chance on them: the others say the opposite.
    Twos are of one data set (``meta["dataset"]``), but for the pools of ``WHOLE``.
    """
    asked = [s for s in samples if gold(s)]
    sides: dict[tuple, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    table: dict[tuple, dict[str, dict[tuple, Sample]]] = defaultdict(lambda: defaultdict(dict))  # (data set, pool), text, image
    for s in asked:
        within = _within(s)
        sides[within][_text(s)] += 1 if gold(s) == "yes" else -1
        table[within][_text(s)].setdefault(_place(s), s)
    kept: list[Sample] = []
    used: set[str] = set()
    for there in (there for within in [w for w in table if w[1] is None] for there in table.pop(within).values()):  # without a twin
        yes, no = ([s for s in there.values() if gold(s) == answer] for answer in ("yes", "no"))
        for one, other in zip(*(_shuffled(g, _lot(seed, _text(g[0]))) if g else [] for g in (yes, no))):
            kept += [one, other]
    used |= {s.id for s in kept}
    joints = [
        (sides[within][f] * sides[within][g] < 0, min(len(a), len(b)), repr(within[1]), f, g, within, a, b)
        for within, texts in table.items() for f, g in combinations(sorted(texts), 2)
        for a, b in [_opposed(texts[f], texts[g])] if a and b
    ]  # fmt: skip
    spare = 0  # twos of which the prior gets none, less twos of which it gets one pair
    for cross, _, pool, f, g, within, a, b in sorted(joints, key=lambda j: (*j[:5], repr(j[5]))):  # those first, and the scarcest first
        lot = _lot(seed, pool, f, g)
        free = [_shuffled([p for p in group if not {p[0].id, p[1].id} & used], lot) for group in (a, b)]
        count = min(map(len, free)) if not cross else min(*map(len, free), spare)
        spare += -count if cross else count * (sides[within][f] * sides[within][g] > 0)
        for pair in (*free[0][:count], *free[1][:count]):
            kept += _joined(*pair)
            used |= {s.id for s in pair}
    return [_marked(s, True) for s in kept], [_marked(s, False) for s in _left_over(samples, used, seed)]


def _opposed(first: Mapping[tuple, Sample], second: Mapping[tuple, Sample]) -> tuple[list[tuple[Sample, Sample]], list[tuple[Sample, Sample]]]:
    """(yes, no) pairs of the images where the first question is a yes and the second a no, and of those the other way round."""
    both = [(first[k], second[k]) for k in first if k in second and gold(first[k]) != gold(second[k])]
    return [(f, g) for f, g in both if gold(f) == "yes"], [(g, f) for f, g in both if gold(g) == "yes"]


def _left_over(samples: Sequence[Sample], used: set[str], seed: int) -> list[Sample]:
    """Whole pairs stay; the others are joined anew. A made question without a twin is dropped, an asked one keeps no group."""
    broken = {s.group for s in samples if s.group and s.id in used}
    left = [s for s in samples if s.id not in used]
    whole = [s for s in left if s.group and s.group not in broken]
    joined, single = _twins([s for s in left if gold(s) and not (s.group and s.group not in broken)], seed)
    return [*whole, *joined, *(replace(s, group=None) for s in single if "pool" not in s.meta)]


def confusing(samples: Sequence[Sample], vectors: Mapping[str, np.ndarray], least: float = 0.9) -> list[Sample]:
    """Pairs of images that a model hardly tells apart although the same question has opposite answers.

    Args:
        samples: yes/no probes of one data set. vectors: {row: (D,)}, one of each image (``meta["row"]``, else the sample's id).
        least: cosine from which two images are close.

    The closest come first; each sample is in one pair, each two images in one, both of different patients. Two samples a
    pair: ids ID@confusing, one ``group``, ``meta["kind"]`` "confusing", ``meta["similarity"]`` the cosine.
    Source: Sepehri et al. 2024, arXiv:2409.15477, section 3 (close to a medical CLIP; there also far apart for DINOv2).
    """
    texts: dict[str, tuple[list[Sample], list[Sample]]] = defaultdict(lambda: ([], []))
    for s in samples:
        if gold(s) and _row(s) in vectors:
            texts[_text(s)][gold(s) == "no"].append(s)
    close: list[tuple[float, Sample, Sample]] = []
    for yes, no in texts.values():
        if yes and no:
            a, b = (np.stack([np.asarray(vectors[_row(s)], float) for s in group]) for group in (yes, no))
            cosine = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
            close += [(float(cosine[i, j]), yes[i], no[j]) for i, j in zip(*np.nonzero(cosine >= least)) if cluster(yes[i]) != cluster(no[j])]
    made: list[Sample] = []
    taken: set[object] = set()
    for cosine, one, other in sorted(close, key=lambda c: (-c[0], c[1].id, c[2].id)):
        both = frozenset((_place(one), _place(other)))
        if taken & {one.id, other.id, both}:
            continue
        taken |= {one.id, other.id, both}
        for s in (one, other):
            meta = {**s.meta, "kind": "confusing", "similarity": round(cosine, 4)}
            made.append(replace(s, id=f"{s.id}@confusing", group=f"{one.id}|{other.id}@confusing", meta=meta))
    return made


def _joined(yes: Sample, no: Sample) -> list[Sample]:
    group = f"{yes.id}|{no.id}"
    return [replace(s, group=group) for s in (yes, no)]


def _marked(sample: Sample, balanced: bool) -> Sample:
    return replace(sample, meta={**sample.meta, "balanced": balanced})


def _shuffled(items: Sequence, lot: np.random.Generator) -> list:
    return [items[i] for i in lot.permutation(len(items))]


def _pool(sample: Sample) -> str | None:
    """What a question's twin is taken from; None where it wants none."""
    return sample.meta["pool"] if "pool" in sample.meta else category(sample) if sample.group else None


def _within(sample: Sample) -> tuple[str, str | None]:
    """Among which questions a twin is looked for: (data set, pool)."""
    pool = _pool(sample)
    return "" if pool in WHOLE else str(sample.meta.get("dataset") or ""), pool


def _row(sample: Sample) -> str:
    return str(sample.meta.get("row") or sample.id)


def _place(sample: Sample) -> tuple[str, str]:
    return str(sample.meta.get("dataset") or ""), _row(sample)


def _text(sample: Sample) -> str:
    return normalise(sample.question)


def _lot(seed: int, *what: object) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr((seed, *what)).encode()).digest()[:8]))
