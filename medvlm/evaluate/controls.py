"""Does the model look? The same closed questions with a blank, noise, shuffled, other patient's and mirrored image.

A copy of a sample has the id ``ID@NAME``; its ``meta`` names the control and the original (``control``, ``of``). On the
mirrored image the reference is what is true there: it is asked only where that is known (:func:`mirrored_answer`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..datasets.mirror import swapped
from ..imaging.scan import Image, Volume
from ..sample import Prediction, Sample, Turn
from . import perturb
from .answers import normalise, yes_no
from .base import Task, check_pairs, cluster, mean_of
from .probe import chosen, gold
from .statistics import Score

RULE = "closed and choice questions; an error or an answer that cannot be read is wrong, and is no change of answer"
LOOKS = (
    "1 where the 95 % interval of the score drop on the blank or on another patient's image, over what was answered, lies above 0, else 0; "
    "a model that answers by chance, and too few questions, show nothing either"
)
PROVES = ("blank", "other")
"""The controls that :data:`LOOKS` rests on: both take away all that an image could tell, and nothing of the question."""
_UNTOLD = re.compile(r"\b(situs|dextrocardia|levocardia|malrotat\w*|markers?|mirror\w*|flipped|orientation)\b", re.I)


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """The closed and choice questions about images of a split, then their copies, one control after the other."""
    asked = closed(read(split))
    images = {id(x): (x, cluster(s)) for s in asked for x in s.images.values()}
    partners = perturb.others([x for x, _ in images.values()], [owner for _, owner in images.values()], "other")
    partner = dict(zip(images, partners))
    return [
        *asked,
        *copies(asked, "blank", lambda x, _: perturb.blank(x)),
        *copies(asked, "noise", perturb.noise),
        *copies(asked, "shuffled", perturb.shuffled),
        *copies(asked, "other", lambda x, _: partner[id(x)]),
        *_mirrors(asked),
    ]


def closed(samples: Iterable[Sample]) -> list[Sample]:
    """The samples that ask about an image and can be answered by yes, no or one of their choices."""
    return [s for s in samples if s.images and s.question and not s.masks and s.verb in (None, "ask") and reference(s) is not None]


def copies(samples: Sequence[Sample], name: str, change: Callable[[Image | Volume, str], Image | Volume | None]) -> Iterator[Sample]:
    """The samples about altered images; questions about one image share its altered copy.

    change: (image, seed) -> the altered image, None where there is none: then no copy is made.
    """
    made: dict[int, Image | Volume | None] = {}
    for s in samples:
        for key, image in s.images.items():
            if id(image) not in made:
                made[id(image)] = change(image, f"{name} {s.meta.get('row') or s.id} {key}")
        images = {key: made[id(image)] for key, image in s.images.items()}
        if None not in images.values():
            yield replace(s, id=f"{s.id}@{name}", images=images, group=f"{s.group}@{name}" if s.group else None,
                          meta={**s.meta, "control": name, "of": s.id})  # fmt: skip


def _mirrors(asked: Sequence[Sample]) -> Iterator[Sample]:
    known = {_place(s, s.question): s.answer or "" for s in asked}
    answers = {s.id: mirrored_answer(s, known) for s in asked if all(map(perturb.sided, s.images.values()))}
    for s in copies([s for s in asked if answers.get(s.id)], "mirror", lambda x, _: perturb.mirrored(x)):
        answer = answers[s.meta["of"]]
        last = max(i for i, t in enumerate(s.turns) if t.role == "assistant")
        turns = (*s.turns[:last], Turn("assistant", answer), *s.turns[last + 1 :])
        yield replace(s, turns=turns, meta={**s.meta, "flip": normalise(answer) != normalise(s.answer or "")})


def _place(sample: Sample, question: str) -> tuple:
    return *map(id, sample.images.values()), normalise(question)


def mirrored_answer(sample: Sample, known: Mapping[tuple, str]) -> str | None:
    """What is true of the mirrored image, None where nobody said.

    It is what was said of the true image with left and right swapped in question and answer: "Is it on the left?" becomes
    what "Is it on the right?" was answered, and is unknown where that was not asked. Questions of situs and of markers are unknown.
    known: {(images, normalised question): answer} of the true images.
    """
    if _UNTOLD.search(sample.question):
        return None
    answer = known.get(_place(sample, swapped(sample.question)))
    answer = None if answer is None else swapped(answer)
    return answer if answer is not None and reference(sample, answer) is not None else None


def reference(sample: Sample, answer: str | None = None) -> str | None:
    """The reference (or ``answer``) as one of the answers that can be given: "yes", "no" or a choice, normalised; else None."""
    return chosen(sample, (sample.answer if answer is None else answer) or "")


def heard(sample: Sample, prediction: Prediction) -> str | None:
    """What was answered, in the same form; None for an error and for what cannot be read."""
    return None if prediction.error is not None else chosen(sample, prediction.text)


def chance_of_yes(prediction: Prediction) -> float:
    """P(yes) of a yes/no question by the model's own account, NaN where it gives none."""
    if prediction.error is not None:
        return float("nan")
    for word, chance in (prediction.choices or {}).items():
        if normalise(word) == "yes":
            return float(chance)
    answer, chance = yes_no(prediction.text), prediction.probability
    return float("nan") if chance is None or answer is None else float(chance if answer == "yes" else 1 - chance)


def compared(samples: Sequence[Sample], predictions: Sequence[Prediction], slices: Callable[[Sample], Sequence[str]], better: str) -> list[Score]:
    """Copies against their originals: accuracy, score drop, answer change rate and change of P(yes) of every slice.

    slices: (copy or original) -> the names of the slices it belongs to. better: whether an accuracy should be "higher".
    The drop is right(original) - right(copy) of each question, so its interval is that of the paired difference. A copy
    whose original is not there counts in accuracy and is excluded from the rest.
    """
    check_pairs(samples, predictions)
    at = {s.id: i for i, s in enumerate(samples)}
    answers = [heard(s, p) for s, p in zip(samples, predictions)]
    right = np.array([float(a is not None and a == reference(s)) for s, a in zip(samples, answers)])
    yes = [chance_of_yes(p) if gold(s) else float("nan") for s, p in zip(samples, predictions)]
    parts: dict[str, list[int]] = {}
    for i, s in enumerate(samples):
        for part in slices(s):
            parts.setdefault(part, []).append(i)
    scores = []
    for part, members in parts.items():
        asked = [samples[i] for i in members]
        about = {"slice": part, "convention": RULE, "better": better}
        chance = float(np.mean([1 / (2 if gold(s) else len(s.choices)) for s in asked]))
        scores.append(mean_of("accuracy", asked, right[members], chance=chance, **about))
        if not any("of" in s.meta for s in asked):
            continue
        first = [at.get(s.meta.get("of")) for s in asked]
        of_both = lambda value, first=first, members=members: [float("nan") if k is None else float(value(k, i)) for k, i in zip(first, members)]  # noqa: E731
        drop = of_both(lambda k, i: right[k] - right[i])
        change = of_both(lambda k, i: None not in (answers[k], answers[i]) and answers[k] != answers[i])
        about["better"] = "lower" if better == "higher" else "neither"
        scores.append(mean_of("score drop", asked, drop, chance=0.0, **about | {"convention": f"accuracy on the original less accuracy here; {RULE}"}))
        answered = of_both(lambda k, i: right[k] - right[i] if None not in (answers[k], answers[i]) else float("nan"))
        scores.append(mean_of("score drop where answered", asked, answered, chance=0.0, **about | {"convention": "as score drop, over the questions that were answered both times; a model that refuses an image has not looked in answering"}))
        scores.append(mean_of("unanswered", asked, [float(answers[i] is None) for i in members], **about | {"better": "neither", "convention": "share of errors and of answers that cannot be read"}))
        scores.append(mean_of("answer change rate", asked, change, **about | {"convention": f"another answer than on the original; {RULE}"}))
        moved = of_both(lambda k, i: abs(yes[k] - yes[i]))
        if np.isfinite(moved).any():
            scores.append(mean_of("change of P(yes)", asked, moved, **about | {"convention": "mean absolute change; questions without two probabilities excluded"}))
    return scores


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str) -> list[Score]:
    """The scores of :func:`compared` for each control, how often a side follows the mirror, and whether the model looks."""
    found = compared(samples, predictions, lambda s: [f"control={s.meta.get('control', 'original')}"], "neither")
    flips = [s for s in samples if s.meta.get("flip")]
    if flips:
        at = {s.id: heard(s, p) for s, p in zip(samples, predictions)}
        follows = [float(at[s.id] == reference(s) and at.get(s.meta["of"]) not in (None, at[s.id])) if s.meta["of"] in at else float("nan") for s in flips]
        found.append(mean_of("side follows the mirror", flips, follows, slice="control=mirror",
                             convention=f"questions whose answer the mirror turns round: another answer than before, and the one that is now right; {RULE}"))  # fmt: skip
    return [*found, looks(found)]


def looks(scores: Sequence[Score]) -> Score:
    """The verdict by :data:`LOOKS`."""
    drops = {s.slice.partition("=")[2]: s for s in scores if s.name == "score drop where answered" and s.slice.partition("=")[2] in PROVES}
    told = {name: s for name, s in drops.items() if s.low is not None}
    n = max((s.n for s in drops.values()), default=0)
    if not told:
        return Score("looks at the image", float("nan"), n, convention=LOOKS, note=next((s.note for s in drops.values()), "nothing to score"))
    shown = [name for name, s in told.items() if s.low > 0]
    ranges = "; ".join(f"drop on {name} {s.value:.3f} ({s.low:.3f} to {s.high:.3f})" for name, s in told.items())
    return Score("looks at the image", float(bool(shown)), n, convention=LOOKS, note=f"{'shown' if shown else 'not shown'}: {ranges}")


TASK = Task(prepare, score, {"medvlm": RULE}, rank=6)
