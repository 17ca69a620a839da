"""Yes/no probes in pairs: a question counts for little unless its adversarial twin is answered right too.

A pair is the two samples of one ``group``, one to be answered yes and one no; a sample without a group is a single. Samples
whose ``meta["kind"]`` is "confusing" are pairs of images instead: one question, two images, opposite answers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..sample import Prediction, Sample
from .answers import normalise, pick_choice, yes_no
from .base import Task, check_pairs, cluster, mean_of
from .probmed import published
from .statistics import Score, mean_score

CONVENTIONS = {
    "medvlm": "an answer is right when it says yes or no, one of them, and it is the reference; an error or any other answer is wrong; "
              "a pair or image is right when all its questions are",
    "probmed-original": "the published ProbMed scorer with its defects: see medvlm/evaluate/probmed.py",
}  # fmt: skip
_EXACT = f"medvlm: {CONVENTIONS['medvlm']}"
_PAIRS = f"{_EXACT}; a single question is a unit of its own"
_UNSOUND = "{} groups are not one question to answer yes and one no (a twin is missing, or there twice): they say nothing of pairs"


@dataclass(frozen=True)
class _Asked:
    """One probe and what was said. right: 1.0 or 0.0; NaN where the reference is neither yes nor no."""

    sample: Sample
    gold: str | None
    said: str | None
    right: float
    category: str
    image: str
    adversarial: bool


def prepare(read: Callable[[str], list[Sample]], split: str) -> list[Sample]:
    """The samples of a split that are probes: yes/no questions in a group or marked as probes, and confusing pairs.

    Where there are none, probes are made from what the data say of their images (:func:`medvlm.datasets.pairs.build`).
    """
    found = [s for s in read(split) if confusing(s) or (gold(s) and (s.group or s.meta.get("probe") or s.meta.get("probe_category")))]
    if found:
        return found
    from ..datasets.pairs import build  # it stands on this file, and on the labeller

    return build(read(split))


def score(samples: Sequence[Sample], predictions: Sequence[Prediction], convention: str) -> list[Score]:
    """Questions, pairs and images, of all probes and by ``category``, ``image_type`` and ``balanced``; then confusing pairs.

    Question accuracy is also given on what is to be answered yes, on what is to be answered no, and without adversarial
    questions; with it the share of answers that say yes and of those that say neither. Image accuracy: every pair of an
    image and category right. Pairs that lack their twin count in questions, and in no pair: they are ``excluded`` there.
    Source: Yan et al. 2025, arXiv 2405.20421 (pairs; accuracy of an image and category).
    """
    check_pairs(samples, predictions)
    if convention == "probmed-original":
        return published(samples, predictions)
    asked = [_asked(s, p) for s, p in zip(samples, predictions) if not confusing(s)]
    scores = _scores(asked, "all") if asked else []
    parts: dict[str, list[_Asked]] = {}
    for a in asked:
        balanced = {True: "yes", False: "no"}.get(a.sample.meta.get("balanced"))
        for key, value in (("category", a.category), ("image_type", a.sample.meta.get("image_type")), ("balanced", balanced)):
            if value:
                parts.setdefault(f"{key}={value}", []).append(a)
    for part in sorted(parts):
        scores += _scores(parts[part], part)
    return scores + _confusion([(s, p) for s, p in zip(samples, predictions) if confusing(s)])


def confusing(sample: Sample) -> bool:
    """Whether a sample is half of a pair of images that are easily confused."""
    return sample.meta.get("kind") == "confusing"


def gold(sample: Sample) -> str | None:
    """The reference of a yes/no question, None for another."""
    answer = (sample.answer or "").strip().rstrip(".").lower()
    return answer if answer in ("yes", "no") else None


def chosen(sample: Sample, text: str) -> str | None:
    """What an answer to a closed question says: "yes" or "no", or the choice it names, normalised; None when it says neither or several."""
    if gold(sample):
        return yes_no(text)
    at = pick_choice(text, sample.choices or ())
    return None if at is None else normalise(sample.choices[at])


def category(sample: Sample) -> str:
    """What a probe asks after: ``probe_category``, else the first ``category`` without ``_adversarial``; "" where not said."""
    found = sample.meta.get("probe_category") or sample.meta.get("category") or ""
    found = found[0] if isinstance(found, list | tuple) and found else found
    return str(found or "").removesuffix("_adversarial")


def adversarial(sample: Sample) -> bool:
    """Whether a probe asks after what is not there: as its ``adversarial`` or category says, else the no of a pair."""
    told = sample.meta.get("adversarial")
    named = sample.meta.get("category") or ""
    named = named if isinstance(named, list | tuple) else [named]
    if isinstance(told, bool):
        return told
    return any(str(c).endswith("_adversarial") for c in named) or (sample.group is not None and gold(sample) == "no")


def _asked(sample: Sample, prediction: Prediction) -> _Asked:
    reference, answer = gold(sample), yes_no(prediction.text) if prediction.error is None else None
    right = float(answer == reference) if reference else float("nan")
    return _Asked(sample, reference, answer, right, category(sample), _image(sample), adversarial(sample))


def _image(sample: Sample) -> str:
    row = str(sample.meta.get("row") or " ".join(sample.images) or sample.id)
    return f"{sample.meta['dataset']}/{row}" if sample.meta.get("dataset") else row


def _scores(asked: Sequence[_Asked], part: str) -> list[Score]:
    def share(name: str, of: Sequence[_Asked], value: Callable[[_Asked], float], **about) -> list[Score]:
        return [mean_of(name, [a.sample for a in of], [value(a) for a in of], convention=_EXACT, slice=part, **about)] if of else []

    def units(name: str, found: dict[str, list[_Asked] | None], first: dict[str, _Asked]) -> Score:
        values = [float("nan") if m is None else min(a.right for a in m) for m in found.values()]
        chance = [0.5 ** len(m) for m in found.values() if m is not None]
        made = mean_score(name, values, [cluster(first[k].sample) for k in found], list(found), convention=_PAIRS, slice=part,
                          **({"chance": float(np.mean(chance))} if chance else {}))  # fmt: skip
        return replace(made, note="; ".join(filter(None, [_UNSOUND.format(unsound) if unsound else "", made.note])))

    right = lambda a: a.right  # noqa: E731
    scores = share("question accuracy", asked, right, chance=0.5)
    scores += share("accuracy on yes", [a for a in asked if a.gold == "yes"], right, chance=0.5)
    scores += share("accuracy on no", [a for a in asked if a.gold == "no"], right, chance=0.5)
    scores += share("accuracy without adversarial questions", [a for a in asked if not a.adversarial], right, chance=0.5)
    groups: dict[str, list[_Asked]] = {}
    for a in asked:
        groups.setdefault(a.sample.group or a.sample.id, []).append(a)
    sound = {k: members if _sound(members) else None for k, members in groups.items()}
    unsound = sum(m is None for m in sound.values())
    scores.append(units("pair accuracy", sound, {k: m[0] for k, m in groups.items()}))
    images: dict[str, list[_Asked] | None] = {}
    first: dict[str, _Asked] = {}
    for k, members in groups.items():
        name = f"{members[0].image}/{members[0].category}"
        first.setdefault(name, members[0])
        images[name] = (images.get(name) or []) + sound[k] if sound[k] else images.get(name)
    scores.append(units("image accuracy", images, first))
    scores += share("yes rate", asked, lambda a: float(a.said == "yes"), better="neither")
    return scores + share("invalid rate", asked, lambda a: float(a.said is None), better="lower")


def _sound(members: Sequence[_Asked]) -> bool:
    answers = sorted(a.gold or "" for a in members)
    return answers == ["no", "yes"] or (len(members) == 1 and members[0].sample.group is None and answers != [""])


def _confusion(pairs: Sequence[tuple[Sample, Prediction]]) -> list[Score]:
    """Set accuracy: both images right. Confusion: the same answer for both, among pairs with two answers that can be told.

    Source: Sepehri et al. 2024, arXiv 2409.15477, and utils/answering.py of its repository.
    """
    groups: dict[str, list[tuple[Sample, Prediction]]] = {}
    for s, p in pairs:
        groups.setdefault(s.group or s.id, []).append((s, p))
    if not groups:
        return []
    right: list[float] = []
    same: list[float] = []
    where: list[Hashable] = []
    for members in groups.values():
        where.append(cluster(members[0][0]))
        wanted = [chosen(s, s.answer or "") for s, _ in members]
        answers = [chosen(s, p.text) if p.error is None else None for s, p in members]
        sound = len(members) == 2 and None not in wanted and wanted[0] != wanted[1]
        right.append(float(answers == wanted) if sound else float("nan"))
        same.append(float(answers[0] == answers[1]) if sound and None not in answers else float("nan"))
    sizes = {len(s.choices or ("yes", "no")) for s, _ in pairs}
    guess = 1 / sizes.pop() if len(sizes) == 1 else None
    told = "one question of two images with opposite answers"
    return [
        mean_score("set accuracy", right, where, list(groups), chance=None if guess is None else guess**2,
                   convention=f"medvlm: {told}, both right; pairs of other than two images and two answers are excluded"),
        mean_score("confusion", same, where, list(groups), chance=guess, better="lower",
                   convention=f"MediConfusion: {told}, the same answer to both, among pairs with two valid answers"),
    ]  # fmt: skip


TASK = Task(prepare, score, CONVENTIONS, blind=True, rank=0)
