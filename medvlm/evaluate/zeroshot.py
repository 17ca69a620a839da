"""Zero-shot classification: which findings an image shows, or which class it is of, told from their names alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..sample import Prediction, Sample
from . import trust
from .answers import normalise
from .base import Task, check_pairs, mean_of, statistic_of
from .statistics import Score, surest_wrong

PROMPTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "biomedclip": (("this is a photo of {}",), ()),
    "clip-benchmark": (("a histopathology slide showing {}", "histopathology image of {}"), ()),
    "quilt": (
        ("a histopathology slide showing {}", "histopathology image of {}", "pathology tissue showing {}", "presence of {} tissue on image"), (),
    ),
    "conch": (
        ("{}.", "a photomicrograph showing {}.", "a photomicrograph of {}.", "an image of {}.", "an image showing {}.", "an example of {}.",
         "{} is shown.", "this is {}.", "there is {}.", "a histopathological image showing {}.", "a histopathological image of {}.",
         "a histopathological photograph of {}.", "a histopathological photograph showing {}.", "shows {}.", "presence of {}.", "{} is present.",
         "an H&E stained image of {}.", "an H&E stained image showing {}.", "an H&E image showing {}.", "an H&E image of {}.",
         "{}, H&E stain.", "{}, H&E."), (),
    ),
    "chexzero": (("{}",), ("no {}",)),
    "ct-clip": (("{}.",), ("not {}.",)),
    "cardiac-clip": (("There is {}.",), ("There is no {}.",)),
    "biovil": (
        ("Findings consistent with {}", "Findings suggesting {}", "This opacity can represent {}", "Findings are most compatible with {}"),
        ("There is no {}", "No evidence of {}", "No evidence of acute {}", "No signs of {}"),
    ),
}  # fmt: skip
"""{name of a published prompt set: (prompts of a class, prompts of its absence)}; the prompts of a side are averaged after
embedding. Without prompts of absence classes compete (softmax over them); with them each label competes with its absence.

Source: BiomedCLIP's model card (arXiv:2303.00915) · LAION-AI/CLIP_benchmark, templates of PatchCamelyon · Quilt-1M
(arXiv:2306.11207) · CONCH (Lu et al. 2024, Nature Medicine 30:863, its prompts folder) · CheXzero (Tiu et al. 2022,
doi:10.1038/s41551-022-00936-9, zero_shot.py) · CT-CLIP (arXiv:2403.17834, scripts/zero_shot.py) · Cardiac-CLIP
(arXiv:2507.22024, inference.py) · BioViL (arXiv:2204.09817,
its RSNA pneumonia test, written for pneumonia).
"""
THRESHOLD = 0.5
"""A label is said to be present from this probability on."""
WRONG = ("a failure, or a label without a probability, counts as the surest wrong answer: a positive ranks below and a negative above "
         "everything else")  # fmt: skip


def prompts_of(modality: str, alone: bool) -> str:
    """The name of the prompts used where a sample names none. alone: each label against its absence, not classes in competition."""
    if alone:
        return "ct-clip" if modality == "ct" else "chexzero"
    return "clip-benchmark" if modality == "pathology" else "biomedclip"


def images_once(samples: Sequence[Sample]) -> list[Sample]:
    """The first sample about each row (or the same image objects), without its questions, masks and regions."""
    seen: set = set()
    found = []
    for s in samples:
        keys = {(s.meta.get("dataset"), str(s.meta.get("row", s.id))), tuple(id(i) for i in s.images.values())}
        if s.images and seen.isdisjoint(keys):
            found.append(replace(s, turns=(), masks=(), regions=(), group=None))
        seen |= keys
    return found


def labelled(samples: Sequence[Sample]) -> list[Sample]:
    """Images whose class or findings are known, once each, with ``choices``: the names, sorted, of their data set.

    ``meta["class"]`` is the one class of an image; a data set says it there, or by findings that are all known with exactly
    one present in every image and two names or more. Else ``labels`` are judged each by itself.
    """
    found: dict[int, Sample] = {}
    once = images_once(samples)
    sets: dict[str, list[int]] = {}
    for i, s in enumerate(once):
        sets.setdefault(str(s.meta.get("dataset")), []).append(i)
    for members in sets.values():
        classes = {i: str(once[i].meta["class"]) for i in members if once[i].meta.get("class") not in (None, "")}
        if not classes:
            members = [i for i in members if np.isfinite(list(once[i].labels.values())).any()]
            names = {n for i in members for n in once[i].labels}
            values = [[once[i].labels.get(n, math.nan) for n in names] for i in members]
            if members and len(names) > 1 and np.isfinite(values).all() and (np.sum(values, 1) == 1).all():
                classes = {i: max(once[i].labels, key=once[i].labels.get) for i in members}
        if classes:
            names = tuple(sorted(set(classes.values())))
            found |= {i: replace(once[i], choices=names, labels={}, meta={**once[i].meta, "class": c}) for i, c in classes.items()}
        else:
            names = tuple(sorted(names))
            found |= {i: replace(once[i], choices=names) for i in members}
    return [found[i] for i in sorted(found)]


def support(read: Callable[[str], list[Sample]], split: str, scored: Sequence[Sample]) -> list[Sample]:
    """The samples of another split to fit on, marked with ``meta["fit"]``; those whose id or patient is scored are left out."""
    ids, patients = {s.id for s in scored}, {(s.meta.get("dataset"), s.patient) for s in scored if s.patient}
    return [replace(s, meta={**s.meta, "fit": split}) for s in read(split) if s.id not in ids and (s.meta.get("dataset"), s.patient) not in patients]


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """One sample to classify an image. Those of val come too, marked with ``meta["fit"]``, where thresholds can be set on them.

    ``meta["prompts"]`` of the data, a name in ``PROMPTS``, is kept; findings get the contrast pairs of their modality.
    """
    scored = read(split)
    found = []
    for s in labelled([*scored, *(support(read, "val", scored) if split != "val" else ())]):
        if "class" not in s.meta:
            found.append(replace(s, verb="classify", meta={**s.meta, "prompts": s.meta.get("prompts") or prompts_of(_modality(s), True)}))
        elif not s.meta.get("fit"):
            found.append(replace(s, verb="classify"))
    return found if any(not s.meta.get("fit") for s in found) else []


def _modality(sample: Sample) -> str:
    return next(iter(sample.images.values())).modality


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str = "") -> list[Score]:
    """Scores of findings (each label by itself) and of classes (one an image), where the samples hold such."""
    check_pairs(samples, predictions)
    pairs = list(zip(samples, predictions))
    findings = [(s, p) for s, p in pairs if "class" not in s.meta]
    found: list[Score] = []
    if scored := [x for x in findings if not x[0].meta.get("fit")]:
        found += score_findings(*zip(*scored), val=[x for x in findings if x[0].meta.get("fit") == "val"])
    if scored := [x for x in pairs if "class" in x[0].meta and not x[0].meta.get("fit")]:
        found += score_classes(*zip(*scored))
    return found


def score_findings(samples: Sequence[Sample], predictions: Sequence[Prediction], val: Sequence[tuple[Sample, Prediction]] = ()) -> list[Score]:
    """AUROC, AUPRC and F1 over labels and of each, Brier and class-wise ECE.

    val: samples and predictions to choose each label's threshold on; never those that are scored.
    """
    names = sorted({n for s in samples for n in s.choices or ()})
    truth, given = truths(samples, names), chances_of(samples, predictions, names)
    found = ranked(samples, truth, given, names)
    cuts = {"F1": (np.full(len(names), THRESHOLD), f"present from a probability of {THRESHOLD} on")}
    if val:
        best = best_cuts(truths([s for s, _ in val], names), chances_of(*zip(*val), names))
        cuts["F1 at val threshold"] = best, "present from its best threshold on val on"
    sure = surest_wrong(given, truth)
    for name, (cut, how) in cuts.items():
        each = [_f1(sure[:, j] >= cut[j], truth[:, j]) for j in range(len(names))]
        found += _over_labels(name, samples, truth, names, each, (1,), how)
    sure, known = np.clip(sure, 0, 1), np.isfinite(truth)
    error = np.where(known, (sure - np.where(known, truth, 0)) ** 2, 0).sum(1) / np.maximum(1, known.sum(1))
    found.append(mean_of("Brier over labels", samples, np.where(known.any(1), error, math.nan), better="lower",
                         convention=f"mean over an image's known labels of (probability - truth)^2; {WRONG}"))  # fmt: skip
    found.append(statistic_of("class-wise ECE", samples, lambda i: trust.classwise_ece(sure[i], truth[i]), better="lower",
                              convention=f"mean over labels of the ECE of their own probability, {trust.BINS} equal bins; {WRONG}"))  # fmt: skip
    return found


def score_classes(samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """Accuracy, balanced accuracy, macro F1, MCC, kappa, one-against-rest AUROC and AUPRC, Brier, and how far the confidence holds."""
    names = sorted({n for s in samples for n in s.choices or ()})
    count, number = len(names), {n: k for k, n in enumerate(names)}
    truth = np.array([number[str(s.meta["class"])] for s in samples])
    said = np.array([number.get(chosen(s, p) or "", count) for s, p in zip(samples, predictions)])
    right = (said == truth).astype(float)

    def table(i: np.ndarray) -> np.ndarray:
        """(classes, classes + 1) counts of (truth, said); the last column is no answer."""
        return np.bincount(truth[i] * (count + 1) + said[i], minlength=count * (count + 1)).reshape(count, count + 1).astype(float)

    guess, no = float(np.mean([1 / len(s.choices or "?") for s in samples])), "a failure is no class, so it is wrong"
    first = "the class of highest probability, of equal ones the first by name"
    found = [mean_of("accuracy", samples, right, chance=guess, convention=f"{first}; {no}")]
    for name, statistic, chance, how in (
        ("balanced accuracy", balanced_accuracy, guess, "mean recall of the classes that occur"),
        ("macro F1", macro_f1, None, "mean F1 of the classes that occur"),
        ("MCC", mcc, 0.0, "Gorodkin's for several classes; 0 for an answer that never changes, no value where only one class occurs"),
        ("kappa", kappa, 0.0, "Cohen's, unweighted; no value where only one class occurs"),
    ):
        found.append(statistic_of(name, samples, lambda i, f=statistic: f(table(i)), chance=chance, convention=f"{how}; {no}"))
    onehot = np.array([[float(k == t) if n in (s.choices or ()) else math.nan for k, n in enumerate(names)] for s, t in zip(samples, truth)])
    given = chances_of(samples, predictions, names)
    for row, k, p in zip(given, said, predictions):
        if k < count and not p.choices:
            row[:] = np.arange(count) == k
    found += ranked(samples, onehot, given, names)
    whole = np.where(np.isnan(given) & np.isfinite(onehot), 0.0, given)  # a class that was offered and got no probability has none
    error = np.where(said == count, 2.0, np.nansum((whole - onehot) ** 2, 1))
    how = "sum over classes of (probability - truth)^2, from 0 to 2; a failure is 2"
    found.append(mean_of("Brier over classes", samples, error, better="lower", convention=how))
    return found + trust.scores(samples, predictions, right)


def chosen(sample: Sample, prediction: Prediction) -> str | None:
    """The class that was answered: the choice of highest probability, else the choice that the text is; None for a failure."""
    choices = sample.choices or ()
    if prediction.error is not None:
        return None
    if prediction.choices:
        known = {c: v for c in choices if math.isfinite(v := prediction.choices.get(c, math.nan))}
        return max(known, key=known.__getitem__, default=None)
    return next((c for c in choices if normalise(prediction.text) and normalise(prediction.text) == normalise(c)), None)


def truths(samples: Sequence[Sample], names: Sequence[str]) -> np.ndarray:
    """(N, labels) 1, 0 or NaN, not known."""
    return np.array([[s.labels.get(n, math.nan) for n in names] for s in samples], float).reshape(len(samples), len(names))


def chances_of(samples: Sequence[Sample], predictions: Sequence[Prediction], names: Sequence[str]) -> np.ndarray:
    """(N, labels) probabilities, NaN for a failure and for what was not answered."""
    given = [{} if p.error is not None else p.choices or {} for p in predictions]
    found = np.array([[c.get(n, math.nan) for n in names] for c in given], float).reshape(len(samples), len(names))
    return np.where(np.isfinite(found), found, math.nan)


def ranked(samples: Sequence[Sample], truth: np.ndarray, given: np.ndarray, names: Sequence[str]) -> list[Score]:
    """AUROC and AUPRC: the mean over labels, and each by itself. truth, given: (N, labels)."""
    sure = surest_wrong(given, truth)
    walks = [(steps(column, known), bool(np.isneginf(column).any())) for column, known in zip(sure.T, truth.T)]
    areas = [lambda i, f=f: area(*f(i)) for f, _ in walks]
    precisions = [lambda i, f=f, lost=lost: precision(*f(i), lost) for f, lost in walks]
    found = _over_labels("AUROC", samples, truth, names, areas, (1, 0), "chance that a positive ranks above a negative, ties half")
    return found + _over_labels("AUPRC", samples, truth, names, precisions, (1, 0), "average precision, not interpolated; what failed is never found")


def _over_labels(name: str, samples: Sequence[Sample], truth: np.ndarray, names: Sequence[str], each: Sequence[Callable[[np.ndarray], float]],
                 needs: tuple[int, ...], how: str) -> list[Score]:  # fmt: skip
    """The mean over the labels that have every class of ``needs``, and the score of each label on the images where it is known."""
    usable = [j for j in range(len(names)) if all((truth[:, j] == v).any() for v in needs)]
    known = np.isfinite(truth)
    share = (truth == 1).sum(0) / np.maximum(1, known.sum(0))
    guess = {"AUROC": lambda j: 0.5, "AUPRC": lambda j: float(np.mean(share[j]))}.get(name, lambda j: None)
    what = "both classes" if len(needs) == 2 else "a positive"
    rows = np.flatnonzero(known[:, usable].any(1))
    about = f"mean over the {len(usable)} of {len(names)} labels with {what}, in a draw over those that still have; {how}; {WRONG}"

    def mean(i: np.ndarray) -> float:
        values = [v for j in usable if math.isfinite(v := each[j](rows[i]))]
        return float(np.mean(values)) if values else math.nan

    if not usable:
        return [Score(f"macro {name}", math.nan, 0, len(samples), convention=about, note=f"no label has {what}")]
    there = [samples[i] for i in rows]
    found = [statistic_of(f"macro {name}", there, mean, excluded=len(samples) - len(rows), chance=guess(usable), convention=about)]
    about = f"{how}; no value without {what}; {WRONG}"
    for j, label in enumerate(names):
        at = np.flatnonzero(known[:, j])
        found.append(statistic_of(name, [samples[i] for i in at], lambda i, f=each[j], at=at: f(at[i]), excluded=len(samples) - len(at),
                                  chance=guess(j), slice=f"label={label}", convention=about))  # fmt: skip
    return found


def steps(sure: np.ndarray, truth: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(indices) -> positives and negatives at each distinct probability, the highest first; sorted once for all draws."""
    levels, at = np.unique(-sure, return_inverse=True)
    positive, negative = (truth == 1).astype(float), (truth == 0).astype(float)
    return lambda i: (np.bincount(at[i], positive[i], len(levels)), np.bincount(at[i], negative[i], len(levels)))


def area(positive: np.ndarray, negative: np.ndarray) -> float:
    """AUROC from what :func:`steps` gives; NaN with one class. Equal to ``statistics.auroc``, without sorting for each draw."""
    pairs = positive.sum() * negative.sum()
    return float((positive * (negative.sum() - negative.cumsum() + negative / 2)).sum() / pairs) if pairs else math.nan


def precision(positive: np.ndarray, negative: np.ndarray, lost: bool = False) -> float:
    """Average precision from what :func:`steps` gives; NaN without both classes. lost: the last step are positives without an
    answer, which are never found."""
    if not positive.sum() or not negative.sum():
        return math.nan
    so_far = positive.cumsum()
    gained = positive * so_far / np.maximum(1, so_far + negative.cumsum())
    return float(gained[: len(gained) - lost].sum() / positive.sum())


def average_precision(sure: Sequence[float], truth: Sequence[float]) -> float:
    """Precision at each distinct probability, weighted by the recall gained there; NaN without both classes.

    Source: as scikit-learn's average_precision_score (Zhu 2004; not interpolated).
    """
    return precision(*steps(np.asarray(sure, float), np.asarray(truth, float))(np.arange(len(sure))))


def _f1(said: np.ndarray, truth: np.ndarray) -> Callable[[np.ndarray], float]:
    """(indices) -> 2 TP / (2 TP + FP + FN), NaN without a positive."""
    hit, false, positive = said & (truth == 1), said & (truth == 0), truth == 1
    return lambda i: float(2 * hit[i].sum() / (hit[i].sum() + false[i].sum() + n)) if (n := positive[i].sum()) else math.nan


def best_cuts(truth: np.ndarray, given: np.ndarray) -> np.ndarray:
    """(labels,) the probability from which on a label's F1 is best, the lowest of equal ones; ``THRESHOLD`` without a positive.

    truth, given: (N, labels) of samples that are not scored; what was not answered is passed over.
    """
    cuts = np.full(truth.shape[1], THRESHOLD)
    for j in range(truth.shape[1]):
        known = np.isfinite(truth[:, j]) & np.isfinite(given[:, j])
        if (truth[known, j] == 1).any():
            levels, (positive, negative) = np.unique(given[known, j])[::-1], steps(given[known, j], truth[known, j])(np.arange(known.sum()))
            value = 2 * positive.cumsum() / (positive.cumsum() + negative.cumsum() + positive.sum())
            cuts[j] = levels[np.flatnonzero(value >= value.max() - 1e-12)[-1]]
    return cuts


def balanced_accuracy(table: np.ndarray) -> float:
    """Mean recall of the classes that occur. table: (classes, classes + 1) counts of (truth, said), the last column no answer."""
    rows = table.sum(1)
    return float((np.diag(table)[rows > 0] / rows[rows > 0]).mean())


def macro_f1(table: np.ndarray) -> float:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN); table as in :func:`balanced_accuracy`."""
    rows, columns = table.sum(1), table.sum(0)[:-1]
    return float((2 * np.diag(table)[rows > 0] / (rows + columns)[rows > 0]).mean())


def mcc(table: np.ndarray) -> float:
    """Matthews correlation for several classes; no answer is a class that never occurs.

    Source: Gorodkin 2004, Computational Biology and Chemistry 28:367.
    """
    total, rows, columns = table.sum(), table.sum(1), table.sum(0)
    of_truth, of_said = total**2 - (rows**2).sum(), total**2 - (columns**2).sum()
    if not of_truth:
        return math.nan
    return float((np.trace(table) * total - rows @ columns[:-1]) / math.sqrt(of_truth * of_said)) if of_said else 0.0


def kappa(table: np.ndarray) -> float:
    """Cohen's kappa, unweighted; no answer is a class that never occurs. Source: Cohen 1960, Educ. Psychol. Meas. 20:37."""
    total, rows = table.sum(), table.sum(1)
    expected = rows @ table.sum(0)[:-1] / total**2
    return float((np.trace(table) / total - expected) / (1 - expected)) if (rows > 0).sum() > 1 else math.nan


TASK = Task(prepare, score, {"names": "from the names alone: probabilities of labels by themselves, or of classes in competition"}, rank=5)
