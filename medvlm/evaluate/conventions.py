"""How published scorers decide whether an answer is right: one rule a convention, over one set of measures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..errors import UsageError
from ..sample import Sample
from .answers import YES_NO, boxed, normalise, pick_choice, pick_choices, slake_normalise, vqa_normalise, yes_no
from .answers import said as stripped
from .lexical import rouge_l, sentence_bleu

Measure = Callable[[str, Sample], float]
"""(what was said, the sample with its reference) -> 0..1; NaN where it has nothing to say."""

SPLITS = {
    "yes_no": "closed: the reference is yes or no",
    "answer_type": "closed: the data's answer type is CLOSED, where they give none, the reference is yes or no or there are choices",
}


def kind(sample: Sample) -> str:
    """ "yes/no", "single" or "multiple" (choices to pick from) or "open", by the choices, the reference and ``meta["type"]``."""
    stated, choices, reference = _type(sample), sample.choices, sample.answer or ""
    if stated.startswith("MULTI"):
        return "multiple"
    if choices and not all(normalise(c) in YES_NO for c in choices):
        several = pick_choice(reference, choices) is None and len(pick_choices(reference, choices) or ()) > 1
        return "multiple" if several else "single"
    if stated.startswith("SINGLE"):
        return "single"
    return "yes/no" if choices or normalise(reference) in YES_NO else "open"


def _type(sample: Sample) -> str:
    return str(sample.meta.get("type") or "").upper()


def options(sample: Sample) -> Sequence[str]:
    """The choices, or the letters where the question itself lists them."""
    return sample.choices or "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _same(form: Callable[[str], str], said: str, sample: Sample) -> float:
    return float(form(said) == form(sample.answer))


def _strict(said: str, sample: Sample) -> float:
    reference = YES_NO.get(normalise(sample.answer))
    return float(yes_no(said) == reference) if reference else _same(normalise, said, sample)


def _picked(pick: Callable, said: str, sample: Sample) -> float:
    reference = pick(sample.answer, options(sample))
    return _same(normalise, said, sample) if reference is None else float(pick(said, options(sample)) == reference)


def _overlap(said: Sequence[str], reference: Sequence[str]) -> tuple[float, float, float]:
    """(precision, recall, F1) of tokens, each counted as often as both have it."""
    return _f1((Counter(said) & Counter(reference)).total(), len(said), len(reference))


def _f1(common: int, said: int, reference: int) -> tuple[float, float, float]:
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / said, common / reference
    return precision, recall, 2 * precision * recall / (precision + recall)


def _tokens(which: int, said: str, sample: Sample) -> float:
    return _overlap(normalise(said).split(), normalise(sample.answer).split())[which]


def _bare(text: str) -> str:
    """Without reasoning and wrapping, which are no part of an answer."""
    return normalise(stripped(text))


def _bare_tokens(which: int, said: str, sample: Sample) -> float:
    return _tokens(which, _bare(said), sample)


def _llava_open(which: str, said: str, sample: Sample) -> float:
    """Source: microsoft/LLaVA-Med v1.0.0, llava/eval/eval_metrics/evaluate_metrics.py: a shared word counts as often as it was said."""
    words, reference = Counter(vqa_normalise(said).split()), Counter(vqa_normalise(sample.answer).split())
    found = sum(n for w, n in words.items() if w in reference)
    missed = sum(n for w, n in reference.items() if w not in words)
    precision, recall, f1 = _f1(found, words.total(), found + missed)
    if which == "exact":
        return len(words.keys() & reference.keys()) / words.total() if words else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}[which]


def _llava_closed(said: str, sample: Sample) -> float:
    words = vqa_normalise(said)
    return float(("yes" in words or "no" in words) and vqa_normalise(sample.answer) in words)


_KIT_LABELS = ("**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:", "答案:", "final answer", "final answer is")


def _kit(said: str) -> str:
    """What MedEvalKit takes as the answer: in a box or <answer>, lower case, then what follows each label, its space kept.

    Source: alibaba-damo-academy/MedEvalKit, utils/utils.py, parse_response; utils/VQA_RAD/VQA_RAD.py.
    """
    inside = [part.split("</answer>")[0] for part in said.split("<answer>")[1:] if "</answer>" in part]
    text = (boxed(said) or " ".join(inside) or said).lower().strip()
    for label in _KIT_LABELS:
        text = text.split(label)[-1]
    return text


def _kit_words(text: str) -> list[str]:
    return text.lower().replace(".", " .").split()


def _kit_closed(said: str, sample: Sample) -> float:
    text, reference = _kit(said).replace("\n", "").replace(".", ""), sample.answer.lower().strip()
    if reference not in ("yes", "no"):
        return float(text == reference)
    return float((("yes" in text) != ("no" in text)) and reference in text)


def _kit_tokens(which: int, said: str, sample: Sample) -> float:
    words, reference = set(_kit(said).split()), set(sample.answer.lower().split())
    return _f1(len(words & reference), len(words), len(reference))[which]


def _kit_exact(said: str, sample: Sample) -> float:
    return float(_kit(said) == sample.answer.lower().strip())


def _kit_bleu(order: int, said: str, sample: Sample) -> float:
    return sentence_bleu(_kit(said), [sample.answer], order, split=_kit_words)


def _kit_rouge(said: str, sample: Sample) -> float:
    return rouge_l(_kit(said), sample.answer, split=lambda text: text.lower().replace(".", " ").split())


def _first_word(said: str, sample: Sample) -> float:
    reference = YES_NO.get(normalise(sample.answer))
    word = next((w for w in normalise(said).split() if w in ("yes", "no")), None)
    return float(word == reference) if reference else _same(normalise, said, sample)


def _multimedeval(which: int, said: str, sample: Sample) -> float:
    words, reference = set(vqa_normalise(said).split()), set(vqa_normalise(sample.answer).split())
    return _f1(len(words & reference), len(words), len(reference))[which]


def _multimedeval_closed(said: str, sample: Sample) -> float:
    words, reference = set(vqa_normalise(said).split()), set(vqa_normalise(sample.answer).split())
    reference |= {"not"} if reference == {"no"} else set()
    return float(len(words & reference) >= 0.4 * len(reference) > 0)


def _multimedeval_open(said: str, sample: Sample) -> float:
    return float(_multimedeval(1, said, sample) >= 0.75)


def _m3d(said: str, sample: Sample) -> float:
    right = pick_choice(sample.answer, options(sample))
    return float("nan") if right is None else float(f"{chr(65 + right)}." in said)


@dataclass(frozen=True)
class Rule:
    """How one convention scores. says: in one sentence. split: its own key of ``SPLITS``.

    closed, single, multiple, open: {name: measure} of such questions, the first being the accuracy; whoever has no rule for
    choices counts them as closed or open. every: {name: measure} of all questions. overall: the accuracies of all kinds together
    are a score too.
    """

    says: str
    split: str
    closed: Mapping[str, Measure] = field(default_factory=dict)
    single: Mapping[str, Measure] = field(default_factory=dict)
    multiple: Mapping[str, Measure] = field(default_factory=dict)
    open: Mapping[str, Measure] = field(default_factory=dict)
    every: Mapping[str, Measure] = field(default_factory=dict)
    overall: bool = True


_TOKEN_F1 = {"open token F1": partial(_tokens, 2), "open token recall": partial(_tokens, 1)}

RULES = {
    "medvlm": Rule(
        "yes/no by a strict parser (hedges, refusals and both at once are wrong), choices by letter or text, open by exact match, token F1 and"
        " token recall after lower case, without reasoning, wrapping, punctuation and articles; overall = accuracies and open exact match",
        "yes_no", closed={"closed accuracy": _strict}, single={"single-choice accuracy": partial(_picked, pick_choice)},
        multiple={"multiple-choice accuracy": partial(_picked, pick_choices)},
        open={"open exact match": partial(_same, _bare), "open token F1": partial(_bare_tokens, 2), "open token recall": partial(_bare_tokens, 1)},
    ),
    "exact": Rule(
        "exact match after lower case, without punctuation and articles",
        "yes_no", closed={"closed accuracy": partial(_same, normalise)}, single={"single-choice accuracy": partial(_same, normalise)},
        multiple={"multiple-choice accuracy": partial(_same, normalise)}, open={"open exact match": partial(_same, normalise)},
    ),
    "vqa": Rule(
        "exact match after the normalisation of the VQA challenge, against one reference",
        "yes_no", closed={"closed accuracy": partial(_same, vqa_normalise)}, single={"single-choice accuracy": partial(_same, vqa_normalise)},
        multiple={"multiple-choice accuracy": partial(_same, vqa_normalise)}, open={"open exact match": partial(_same, vqa_normalise)},
    ),
    "llava-med": Rule(
        "LLaVA-Med v1.0: after VQA normalisation, closed is right if the answer holds a yes or a no and the reference as substrings; open recall"
        " (the paper's open accuracy), precision and F1 of tokens count a shared word as often as it was said; \"printed exact match\" is what its"
        " script calls exact match: distinct reference words found / words said",
        "answer_type", closed={"closed accuracy": _llava_closed}, overall=False,
        open={"open token recall": partial(_llava_open, "recall"), "open token precision": partial(_llava_open, "precision"),
              "open token F1": partial(_llava_open, "f1"), "open printed exact match": partial(_llava_open, "exact")},
    ),
    "medevalkit": Rule(
        "MedEvalKit without its judge: closed is right if exactly one of yes and no is a substring and it is the reference's (other closed:"
        " equality); open: equality in lower case, precision, recall and F1 of sets of words (published with F1, precision and recall in each"
        " other's place; here right), unsmoothed sentence BLEU, ROUGE-L",
        "yes_no", closed={"closed accuracy": _kit_closed},
        open={"open exact match": _kit_exact, "open token F1": partial(_kit_tokens, 2), "open token precision": partial(_kit_tokens, 0),
              "open token recall": partial(_kit_tokens, 1), "open BLEU-1": partial(_kit_bleu, 1), "open BLEU-2": partial(_kit_bleu, 2),
              "open BLEU-3": partial(_kit_bleu, 3), "open BLEU-4": partial(_kit_bleu, 4), "open ROUGE-L": _kit_rouge},
    ),
    "medgemma": Rule(
        "MedGemma: token F1 over all questions after lower case, without punctuation and articles; closed by the first word that is yes or no;"
        " open token F1 and recall",
        "yes_no", closed={"closed accuracy": _first_word}, open=_TOKEN_F1, every={"overall token F1": partial(_tokens, 2)}, overall=False,
    ),
    "multimedeval": Rule(
        "MultiMedEval: sets of words after VQA normalisation; closed is right if recall is at least 0.4 (for a no, \"not\" counts too), open if it"
        " is at least 0.75; token F1 and recall over all questions",
        "yes_no", closed={"closed accuracy": _multimedeval_closed}, overall=False,
        open={"open accuracy": _multimedeval_open, "open token recall": partial(_multimedeval, 1)},
        every={"overall token F1": partial(_multimedeval, 2), "overall token recall": partial(_multimedeval, 1)},
    ),
    "vila-m3": Rule(
        "VILA-M3: equality in lower case",
        "answer_type", closed={"closed accuracy": partial(_same, str.lower)}, open={"open exact match": partial(_same, str.lower)},
    ),
    "lmms-eval": Rule(
        "lmms-eval's SLAKE: equality in lower case without punctuation and what stands in parentheses, words for yes and no"
        " in English and Chinese as one",
        "answer_type", closed={"closed accuracy": partial(_same, slake_normalise)}, open={"open exact match": partial(_same, slake_normalise)},
    ),
    "m3d": Rule(
        "M3D: a single choice is right if its capital letter with a full stop (\"A.\") appears anywhere; nothing else is scored",
        "answer_type", single={"single-choice accuracy": _m3d}, overall=False,
    ),
}  # fmt: skip
"""{convention: its rule}. Source: the repositories of the same names: microsoft/LLaVA-Med v1.0.0 (llava/eval/run_eval.py since its pull
request 35; before it, closed answers that named the wrong word left the denominator), alibaba-damo-academy/MedEvalKit
(utils/utils.py; its ROUGE counts a repeated word once), f10409/RadHarmony for MedGemma (evaluator/metrics/vqa.py; MedGemma report,
arXiv 2507.05201, table 9), corentin-ryr/MultiMedEval (task_families.py), Project-MONAI/VLM-Radiology-Agent-Framework,
EvolvingLMMs-Lab/lmms-eval (tasks/slake/utils.py), BAAI-DCAI/M3D (Bench/eval/eval_vqa.py)."""


def known(sample: Sample) -> bool:
    """Whether there is a reference to compare with: one letter or digit at least."""
    return bool(normalise(sample.answer or ""))


def rule_of(convention: str) -> tuple[Rule, str, str]:
    """(rule, split, what every score says of both)."""
    name, _, split = convention.partition("/")
    if name not in RULES or split not in ("", *SPLITS):
        there = f"{', '.join(RULES)}, alone or with {' or '.join('/' + s for s in SPLITS)}"
        raise UsageError(f"there is no convention {convention!r} for vqa: it is one of {there}", "BAD_ARGUMENT")
    rule = RULES[name]
    split = split or rule.split
    return rule, split, f"{name}/{split}: {rule.says}. {SPLITS[split]}"


def group_of(sample: Sample, rule: Rule, split: str) -> str:
    """Which measures of a rule a sample falls under."""
    its = kind(sample)
    if its in ("single", "multiple") and (rule.single or rule.multiple):
        return its
    closed = normalise(sample.answer or "") in YES_NO
    if split == "answer_type":
        closed = _type(sample) == "CLOSED" or _type(sample) != "OPEN" and (closed or its != "open")
    return "closed" if closed else "open"


def chance_of(samples: Sequence[Sample]) -> float | None:
    """The mean over samples of what a choice by lot gets; None where one of them has nothing to choose from."""
    found = []
    for s in samples:
        its, count = kind(s), len(s.choices or ())
        found.append(0.5 if its == "yes/no" else None if its == "open" or not count else 1 / count if its == "single" else 1 / (2**count - 1))
    return None if not found or None in found else sum(found) / len(found)


def value_of(measure: Measure, said: str, sample: Sample) -> float:
    if not known(sample):
        return float("nan")
    value = measure(said, sample)
    return value if said.strip() or math.isnan(value) else 0.0
