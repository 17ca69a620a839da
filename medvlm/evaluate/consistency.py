"""Whether a model says the same when choices change places or words change, and the opposite when a question is negated."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..sample import Prediction, Sample, Turn
from .answers import normalise, pick_choice
from .base import Task, check_pairs, cluster
from .probe import chosen, gold
from .statistics import Score, mean_score

CONVENTIONS = {
    "medvlm": "a group is consistent when all its answers are valid and agree (negation: when one says yes and one no), and consistently right "
              "when all are right too; an error or an answer that cannot be told is inconsistent",
}  # fmt: skip
SAME = {"strict agreement"}
"""VQA-RAD's word for a rephrasing that means the same; its others ("inversion", "Subsumes", ...) may have another answer.
Source: Lau et al. 2018, Scientific Data 5:180251."""
_NEGATIVE = re.compile(r"\b(?:no|not|none|nor|neither|nothing|without|absent|absence|free of|only)\b|n't\b", re.I)
_WHAT = r"(?:an? |any )?(?!(?:an?|any|the|more|less|most|anything|something|one|two|three|four|at least|normal)\b)(.+)"
_THERE = re.compile(rf"(Is|Are|Was|Were) there {_WHAT}", re.I | re.S)
_SHOWS = re.compile(rf"(Do|Does|Did) (.+?) (show|contain|have|demonstrate|reveal|indicate|suggest) {_WHAT}", re.I | re.S)
_NUMBERED = re.compile(r"\s*[(\[]?[A-Z][.):\]]+\s*\S|\s*\w\s*$")


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """Questions with their variants: rephrasings that the data hold, choices reordered, yes/no questions negated."""
    asked = {s.id: s for s in read(split) if s.question and s.answer and s.verb in (None, "ask")}
    kept: dict[str, Sample] = {}
    for members in rephrased(list(asked.values())).values():
        kept |= {s.id: s for s in members}
    for s in asked.values():
        for made in (reordered(s), negated(s)):
            if made is not None:
                kept |= {s.id: s, made.id: made}
    return list(kept.values())


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str) -> list[Score]:
    """Share of groups answered consistently, and of those answered consistently and right, for each kind of variant."""
    check_pairs(samples, predictions)
    by_id = {s.id: (s, p) for s, p in zip(samples, predictions)}
    scores = _scores("paraphrase", [[by_id[s.id] for s in members] for members in rephrased(samples).values()], same=True)
    for kind in ("order", "negation"):
        groups = [[by_id[s.meta[f"{kind}_of"]], by_id[s.id]] for s in samples if s.meta.get(f"{kind}_of") in by_id]
        scores += _scores(kind, groups, same=kind == "order")
    return scores


def rephrased(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """{name: samples of one image that ask the same in other words and have the same reference}, two at least.

    They name their original (``meta["paraphrase_of"]``) or what joins them (``linked_id`` with the relation "strict agreement").
    """
    groups: dict[str, list[Sample]] = {}
    for s in samples:
        linked = s.meta.get("linked_id") if s.meta.get("relation") in SAME else None
        if not any(s.meta.get(f"{kind}_of") for kind in ("order", "negation")):
            groups.setdefault(str(s.meta.get("paraphrase_of") or linked or s.id), []).append(s)
    one = lambda members: len({normalise(s.answer or "") for s in members}) == 1 and len({normalise(s.question) for s in members}) > 1  # noqa: E731
    return {k: members for k, members in groups.items() if len(members) > 1 and one(members)}


def reordered(sample: Sample) -> Sample | None:
    """The sample with its choices the other way round, in ``choices`` and where its question names each of them once.

    None for yes/no and open questions, for choices that are letters or begin with one, and where the question names only some
    of them, one twice or one within another.
    """
    choices = sample.choices or ()
    right = pick_choice(sample.answer or "", choices) if len(choices) > 1 and not gold(sample) else None
    if right is None or any(_NUMBERED.match(c) for c in choices):
        return None
    question = sample.question
    spots = sorted(m.span() for c in choices for m in re.finditer(rf"(?<!\w){re.escape(c)}(?!\w)", question))
    apart = len({question[a:b] for a, b in spots}) == len(spots) and all(a[1] <= b[0] for a, b in zip(spots, spots[1:]))
    if spots and (len(spots) != len(choices) or not apart):
        return None
    for (start, end), text in zip(reversed(spots), [question[a:b] for a, b in spots]):
        question = question[:start] + text + question[end:]
    return _variant(sample, "order", question, choices[right], tuple(reversed(choices)))


def negated(sample: Sample) -> Sample | None:
    """"Is there X?" as "Is there no X?" with the other answer; None where the rules do not apply.

    The rules know "Is there ...", "Are there ..." and "Does ... show (contain, have, ...)" of yes/no questions without "or" and
    without a negative word.

    >>> from medvlm.sample import Sample, Turn
    >>> negated(Sample("1", turns=(Turn("user", "Is there a pleural effusion?"), Turn("assistant", "yes")))).turns[0].text
    'Is there no pleural effusion?'
    """
    question, answer = sample.question, gold(sample)
    bare = re.sub(r"\byes\s*(?:/|or)\s*no\b", "", question, flags=re.I)
    if answer is None or _NEGATIVE.search(bare) or re.search(r"\bor\b", bare, re.I):
        return None
    if found := _THERE.match(question):
        asked = f"{found[1]} there no {found[2]}"
    elif found := _SHOWS.match(question):
        asked = f"{found[1]} {found[2]} {found[3]} no {found[4]}"
    else:
        return None
    return _variant(sample, "negation", asked, "no" if answer == "yes" else "yes", sample.choices)


def _variant(sample: Sample, kind: str, question: str, answer: str, choices: tuple[str, ...] | None) -> Sample:
    last = max(i for i, t in enumerate(sample.turns) if t.role == "user")
    turns = tuple(Turn("user", question) if i == last else t for i, t in enumerate(sample.turns) if i <= last) + (Turn("assistant", answer),)
    meta = {k: v for k, v in sample.meta.items() if k not in ("linked_id", "paraphrase_of")} | {f"{kind}_of": sample.id}
    return replace(sample, id=f"{sample.id}@{kind}", turns=turns, choices=choices, group=None, meta=meta)


def _scores(kind: str, groups: Sequence[Sequence[tuple[Sample, Prediction]]], same: bool) -> list[Score]:
    if not groups:
        return []
    agree, right, guess, guess_right = [], [], [], []
    for members in groups:
        answers = [_answer(s, p.text) if p.error is None else None for s, p in members]
        agree.append(float(None not in answers and len(set(answers)) == (1 if same else len(members))))
        right.append(float(agree[-1] and answers == [_answer(s, s.answer or "") for s, _ in members]))
        sizes = {2 if gold(s) else len(s.choices or ()) for s, _ in members}
        if len(sizes) == 1 and (size := sizes.pop()):
            guess.append(size ** (1.0 - len(members)))
            guess_right.append(float(size) ** -len(members))
    names, where = ["|".join(s.id for s, _ in members) for members in groups], [cluster(members[0][0]) for members in groups]
    told = f"medvlm: {CONVENTIONS['medvlm']}"
    chances = [sum(g) / len(g) if len(g) == len(groups) else None for g in (guess, guess_right)]
    return [
        mean_score(f"{kind} {what}", values, where, names, convention=told, chance=chance)
        for what, values, chance in (("consistency", agree, chances[0]), ("consistently right", right, chances[1]))
    ]


def _answer(sample: Sample, text: str) -> str | None:
    return chosen(sample, text) if gold(sample) or sample.choices else normalise(text) or None


TASK = Task(prepare, score, CONVENTIONS, blind=True, rank=7)
