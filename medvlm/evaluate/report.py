"""Reports against the radiologist's: wording, the 14 CheXpert findings by rules, negation, side, and what was made up or left out.

Findings are read by :mod:`.labeller`: English chest X-ray reports only (docs/labeller.md says how well). A failed or empty
prediction is a report without words: 0 for its wording, none of the findings, no agreement with what its reference says; it is
never excluded. Excluded are samples whose reference has no text under the convention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import UsageError
from ..sample import Prediction, Sample
from . import lexical
from .base import Task, check_pairs, mean_of, statistic_of
from .labeller import FINDINGS, FIVE, PASSED_OVER, label, mentions, sections
from .statistics import Score

CONVENTIONS = {
    "medvlm": "findings and impression without headings; lower-case words; BLEU of the corpus; doubt is presence; "
    "macro over findings that either side has",
    "uncertain-negative": "as medvlm, but doubt is absence (as MAIRA-2 reads it)",
    "findings": "as medvlm, on the findings section alone; a text without headings is all findings",
    "radeval": "findings and impression without headings; words between white space as they stand; BLEU of the corpus; doubt is presence; "
    "macro over all, 0 for a finding that neither side has (RadEval 2.2)",
    "medevalkit": 'reference "Findings: ... Impression: ....", the report as it stands; BLEU: mean over reports, unsmoothed, on '
    'lower().replace(".", " ."); ' "the other scores as medvlm (MedEvalKit, cal_report_metrics.py, which leaves empty reports out)",
}
SPOKEN = tuple(f for f in FINDINGS if f != "No Finding")
"""The 13 that are there or not."""


@dataclass(frozen=True)
class _Pair:
    """One sample. said, truth: both texts under the convention; whole: the prediction as it stands."""

    sample: Sample
    said: str
    truth: str
    whole: str


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """The samples of a split that hold a report and ask nothing, to be reported on."""
    return [replace(s, verb="report") for s in read(split) if (s.answer or "").strip() and not s.question and not s.masks]


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str = "medvlm") -> list[Score]:
    """Wording, findings, agreement, length and coverage of the reports.

    Raises:
        ModelError: BAD_ARGUMENT when the predictions are not those of these samples, one each, in order.
        UsageError: BAD_ARGUMENT for an unknown convention.
    Source: F1-14 and F1-5: Smit et al. 2020, EMNLP (CheXbert); the conventions: reference of each in ``CONVENTIONS``.
    """
    pairs = _pairs(samples, predictions, convention)
    kept = [p for p in pairs if lexical.tokens(p.truth)]
    means = CONVENTIONS[convention]

    def mean(name: str, value: Callable[[_Pair], float], says: str, **about: Any) -> Score:
        values = [value(p) if lexical.tokens(p.truth) else float("nan") for p in pairs]
        return mean_of(name, samples, values, convention=f"{says}; {means}", **about)

    def pooled(name: str, rows: np.ndarray, statistic: Callable[[np.ndarray], float], says: str, **about: Any) -> Score:
        flat = rows.reshape(len(kept), int(np.prod(rows.shape[1:]))).astype(float)

        def drawn(i: np.ndarray) -> float:
            return statistic((np.bincount(i, minlength=len(kept)) @ flat).reshape(rows.shape[1:]))

        about = {"excluded": len(pairs) - len(kept)} | about
        return statistic_of(name, [p.sample for p in kept], drawn, convention=f"{says}; {means}", **about)

    return [*_wording(kept, convention, mean, pooled), *_clinical(kept, convention, mean, pooled), *_form(pairs, mean, means)]


def _wording(kept: list[_Pair], convention: str, mean: Callable, pooled: Callable) -> list[Score]:
    said, truth = [p.said for p in kept], [p.truth for p in kept]
    scores = []
    for order in (1, 4):
        if convention == "medevalkit":
            one = lambda p, n=order: lexical.sentence_bleu(p.said, [p.truth], n, split=_medevalkit_words)  # noqa: E731
            scores.append(mean(f"BLEU-{order}", one, "mean over reports"))
        else:
            counts = lexical.bleu_counts(said, truth, order, str.split if convention == "radeval" else lexical.tokens)
            scores.append(pooled(f"BLEU-{order}", counts, lambda c: lexical.bleu_of(c[None]), "of the corpus, unsmoothed"))
    cider = dict(zip((p.sample.id for p in kept), lexical.cider_d(said, truth)))
    return [
        *scores,
        mean("ROUGE-L", lambda p: _rouge(p.said, p.truth), "F1 of rouge-score on lower-case words, mean over reports"),
        mean("METEOR", lambda p: _meteor(p.said, p.truth), "exact and stem matches without synonyms, nltk's parameters, mean over reports"),
        mean("CIDEr-D", lambda p: cider[p.sample.id], "document frequencies of the references scored together, so two sets differ", unit="of 10"),
    ]


def _clinical(kept: list[_Pair], convention: str, mean: Callable, pooled: Callable) -> list[Score]:
    doubt = convention != "uncertain-negative"
    said, truth = ([_present(t, doubt) for t in texts] for texts in ([p.said for p in kept], [p.truth for p in kept]))
    says, is_so = (np.array([[f in found for f in FINDINGS] for found in x], bool).reshape(-1, 14) for x in (said, truth))
    counts = np.stack([says & is_so, says & ~is_so, ~says & is_so], 2)  # (reports, findings, hits wrongs misses)
    scores = []
    for many, chosen in ((14, FINDINGS), (5, FIVE)):
        part = counts[:, [FINDINGS.index(f) for f in chosen]]
        scores.append(pooled(f"F1-{many} micro", part, f1_micro, "findings by rules, pooled over findings and reports"))
        macro = f1_macro_of_all if convention == "radeval" else _macro
        scores.append(pooled(f"F1-{many} macro", part, macro, "findings by rules, mean of the F1 of each finding"))
    there = counts[:, [FINDINGS.index(f) for f in SPOKEN]].sum(1)
    scores += [
        pooled("finding precision", there, lambda c: _share(c[0], c[0] + c[1] or c[2]),
               "of the findings in the reports, the share in their reference, 0 where the reports have none; 13, No Finding apart"),
        pooled("finding recall", there, lambda c: _share(c[0], c[0] + c[2]),
               "of the findings in the references, the share in their report; 13, No Finding apart"),
        pooled("negation agreement", np.array([_polarities(p, doubt) for p in kept]).reshape(-1, 2), lambda c: _share(*c),
               "of the findings that both texts speak of, the share that both affirm or both deny; "
               "a report that speaks of nothing disagrees on all its reference speaks of"),
        pooled("laterality agreement", np.array([_same_sides(p, doubt) for p in kept]).reshape(-1, 2), lambda c: _share(*c),
               "of the findings that both texts have and whose reference names a side, the share where the report names the same; "
               "a report that speaks of nothing misses all"),
    ]  # fmt: skip
    made_up = {p.sample.id: len(a - b - {"No Finding"}) for p, a, b in zip(kept, said, truth)}
    left_out = {p.sample.id: len(b - a - {"No Finding"}) for p, a, b in zip(kept, said, truth)}
    about = {"unit": "findings", "better": "lower"}
    return [
        *scores,
        mean("hallucinated findings", lambda p: made_up[p.sample.id],
             "of 13, in the report and not in its reference, a report; an empty one has none", **about),
        mean("omitted findings", lambda p: left_out[p.sample.id], "of 13, in the reference and not in its report, a report", **about),
    ]  # fmt: skip


def _form(pairs: list[_Pair], mean: Callable, means: str) -> list[Score]:
    words = lambda p: len(lexical.tokens(p.said)) / len(lexical.tokens(p.truth))  # noqa: E731
    ratio = mean("length ratio", words, "words of a report per word of its reference", better="neither", unit="times")
    says = f"share of the reference's findings and impression that the report has under such headings; excluded: a reference without; {means}"
    return [ratio, mean_of("section coverage", [p.sample for p in pairs], [_coverage(p) for p in pairs], convention=says)]


def cases(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str = "medvlm") -> list[dict[str, Any]]:
    """{"id", "hallucinated": [finding], "omitted": [...], "side_swapped": [...]} of each sample that has a reference, in order.

    side_swapped: in both texts, but right in one and left in the other. Raises: as :func:`score`.
    """
    doubt, out = convention != "uncertain-negative", []
    for p in _pairs(samples, predictions, convention):
        if not lexical.tokens(p.truth):
            continue
        said, truth = _present(p.said, doubt), _present(p.truth, doubt)
        a, b = sides(p.said, doubt), sides(p.truth, doubt)
        out.append({
            "id": p.sample.id, "hallucinated": [f for f in SPOKEN if f in said - truth], "omitted": [f for f in SPOKEN if f in truth - said],
            "side_swapped": [f for f in SPOKEN if {a.get(f), b.get(f)} == {"left", "right"}],
        })  # fmt: skip
    return out


def sides(text: str, doubt: bool = True) -> dict[str, str]:
    """{finding: "right" | "left" | "both"} of the findings that a text has and gives a side; right here and left there is both."""
    named: dict[str, set[str]] = {}
    for m in mentions(text):
        if m.side and (m.polarity == 1 or doubt and m.polarity == -1):
            named.setdefault(m.finding, set()).add(m.side)
    return {f: s.pop() if len(s) == 1 else "both" for f, s in named.items()}


def own_words(text: str, only: str | None = None) -> str:
    """What a report says itself, without headings: not its history, comparison and technique. only: that section alone, or
    the whole text where it has no headings."""
    parts = {name: part for name, part in sections(text).items() if name not in PASSED_OVER}
    if only and set(parts) != {""}:
        parts = {name: part for name, part in parts.items() if name == only}
    return "\n".join(parts.values())


def texts(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str = "medvlm") -> list[tuple[str, str]]:
    """(report, reference) of each sample as a convention compares them; "" where there is none. Raises: as :func:`score`."""
    return [(p.said, p.truth) for p in _pairs(samples, predictions, convention)]


def _pairs(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str) -> list[_Pair]:
    check_pairs(samples, predictions)
    if convention not in CONVENTIONS:
        raise UsageError(f"task report has no convention {convention!r}; it has {', '.join(CONVENTIONS)}", "BAD_ARGUMENT")
    out = []
    for s, p in zip(samples, predictions):
        whole, answer = p.text if p.error is None else "", s.answer or ""
        whole = whole if lexical.tokens(whole) else ""
        if convention == "medevalkit":
            parts = {"findings": own_words(answer)} if set(sections(answer)) <= {""} else sections(answer)
            said, truth = whole, f"Findings: {parts.get('findings', '')} Impression: {parts.get('impression', '')}."
            truth = truth if lexical.tokens(own_words(answer)) else ""
        else:
            only = "findings" if convention == "findings" else None
            said, truth = own_words(whole, only), own_words(answer, only)
        out.append(_Pair(s, said, truth, whole))
    return out


@lru_cache(1 << 14)  # a run scores its slices too
def _rouge(said: str, truth: str) -> float:
    return lexical.rouge_l(said, truth)


@lru_cache(1 << 14)
def _meteor(said: str, truth: str) -> float:
    return lexical.meteor(said, truth)


def _medevalkit_words(text: str) -> list[str]:
    return text.lower().replace(".", " .").split()


def _present(text: str, doubt: bool) -> set[str]:
    return {f for f, v in label(text).items() if v == 1 or doubt and v == -1}


def _polarities(p: _Pair, doubt: bool) -> tuple[int, int]:
    """(findings on which both agree, findings that both speak of)."""
    said, truth = label(p.said), label(p.truth)
    mute = set(said.values()) == {None}
    spoken = [f for f in SPOKEN if truth[f] is not None and (said[f] is not None or mute)]
    there = (1, -1) if doubt else (1,)
    return sum(said[f] is not None and (said[f] in there) == (truth[f] in there) for f in spoken), len(spoken)


def _same_sides(p: _Pair, doubt: bool) -> tuple[int, int]:
    said, truth, found = sides(p.said, doubt), sides(p.truth, doubt), _present(p.said, doubt)
    mute = set(label(p.said).values()) == {None}
    asked = [f for f in truth if f in found or mute]
    return sum(said.get(f) == truth[f] for f in asked), len(asked)


def _coverage(p: _Pair) -> float:
    asked = {"findings", "impression"} & set(sections(p.sample.answer or ""))
    return len(asked & set(sections(p.whole))) / len(asked) if asked else float("nan")


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _each(c: np.ndarray) -> list[float]:
    return [_share(2 * hit, 2 * hit + wrong + missed) for hit, wrong, missed in c]


def f1_micro(c: np.ndarray) -> float:
    """F1 of (findings, 3) counts of hits, wrongs and misses, pooled; NaN where there are none."""
    return _each(c.sum(0)[None])[0]


def _macro(c: np.ndarray) -> float:
    known = [v for v in _each(c) if v == v]
    return sum(known) / len(known) if known else float("nan")


def f1_macro_of_all(c: np.ndarray) -> float:
    """Mean over the rows of such counts, 0 for a finding without any (scikit-learn's zero_division=0, as RadEval's)."""
    return float(np.mean(np.nan_to_num(_each(c))))


def _beside(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str) -> dict[str, str]:
    kinds = ("hallucinated", "omitted", "side_swapped")
    return {c["id"]: "; ".join(f"{k.replace('_', ' ')}: {', '.join(c[k])}" for k in kinds if c[k]) for c in cases(samples, predictions, convention)}


TASK = Task(prepare, score, CONVENTIONS, blind=False, rank=3, beside=_beside)
