"""Errors put into reports on purpose: which metric, or which checker, notices a flipped negation, side, finding or number?

Each error changes one thing, and is kept only where the rule labeller reads the change (:mod:`.labeller`): 1 becomes 0, right
becomes left, a finding comes or goes. A metric that scores a report with a flipped negation like the report itself cannot
tell two models apart that differ in it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence

from ..datasets.mirror import swapped
from ..datasets.sentences import variants
from .labeller import Mention, label, mentions, sentences
from .report import SPOKEN, sides
from .statistics import Score, mean_score

KINDS = ("negation", "side", "added", "removed", "number")
"""A finding denied or a denial dropped; right and left exchanged; a finding that is not there; one left out; a wrong size."""
_DENIAL = re.compile(
    r"\b(?:(there (?:is|are)) )?"
    r"(?:(?:with )?no(?: (?:definite|evidence of|evidence for))?|without(?: evidence of)?|negative for|free of|clear of)\s+",
    re.IGNORECASE)  # fmt: skip
_NOUN = re.compile(
    r"(?:\b(?:an?|the|small|tiny|mild|moderate|large|severe|minimal|trace|subtle|focal|patchy|hazy|streaky|dense|stable|chronic|acute|new|old|"
    r"healed|right|left|bilateral|bibasilar|basilar|basal|apical|biapical|lower|upper|middle|mid|lobe|lung|pleural|pulmonary|interstitial|"
    r"airspace|retrocardiac|subsegmental|linear|nodular|[\d.]+|mm|cm|[\w-]+-sided)[\s-]+)+$",
    re.IGNORECASE)  # fmt: skip
_ORGANS = ("Cardiomegaly", "Enlarged Cardiomediastinum")
_ADDED = ("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Lung Opacity")
_LARGE = re.compile(r"\b(?:(?:mild|slight|moderate|marked|severe|massive|gross)ly )?(enlarged|widened|prominent|large|dilated)\b", re.IGNORECASE)
_NORMAL = re.compile(r"(?:within )?normal(?: limits| in size(?: and \w+)?)?|unremarkable|not (?:\w+ )?(?:enlarged|widened)", re.IGNORECASE)
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)(?=\s?-?(?:mm|cm|x)\b)", re.IGNORECASE)


def inject(text: str, kind: str, seed: int = 0) -> tuple[str, str] | None:
    """(the text with one error of this kind, what it is), None where the text offers no place for it.

    The same seed makes the same error. what: the finding, with the side put there or the numbers, e.g. "Edema", "Nodule: left",
    "5 -> 10".

    Raises:
        ValueError: the kind is not one of ``KINDS``.
    """
    if kind not in KINDS:
        raise ValueError(f"an error of kind {kind!r} is not one of {', '.join(KINDS)}")
    tries = list({"negation": _flips, "side": _swaps, "added": _additions, "removed": _removals, "number": _numbers}[kind](text, random.Random(seed)))
    return random.Random(seed).choice(tries) if tries else None


def _flips(text: str, chance: random.Random) -> Iterator[tuple[str, str]]:
    before, found = label(text), mentions(text)
    for finding in SPOKEN:
        state = before[finding]
        if state not in (0, 1):
            continue
        new = text
        for m in sorted((m for m in found if m.finding == finding and m.polarity == state), key=lambda m: -m.span[0]):
            new = (_denied if state else _affirmed)(new, m)
        if label(new)[finding] == 1 - state:
            yield new, finding


def _denied(text: str, m: Mention) -> str:
    """"no" before the words that belong to a finding, in place of its article; "not" before what an organ is."""
    if m.finding in _ORGANS and (large := _LARGE.search(text, m.span[1])) and "." not in text[m.span[1] : large.start()]:
        return f"{text[: large.start()]}not {large[1]}{text[large.end() :]}"
    noun = _NOUN.search(text, max(0, m.span[0] - 80), m.span[0])
    start = noun.start() if noun else m.span[0]
    words = re.sub(r"^(?:an?|the)\s+", "", text[start:], flags=re.IGNORECASE)
    capital = text[start : start + 1].isupper()
    return f"{text[:start]}{'No' if capital else 'no'} {words[:1].lower() if capital else words[:1]}{words[1:]}"


def _affirmed(text: str, m: Mention) -> str:
    """Without the denial that holds for a finding."""
    if m.cue is None:
        return text
    if m.finding in _ORGANS and (normal := _NORMAL.match(text, max(0, m.cue[0] - 7)) or _NORMAL.match(text, m.cue[0])):
        return text[: normal.start()] + ("Enlarged" if normal[0][0].isupper() else "enlarged") + text[normal.end() :]
    cue = _DENIAL.search(text, max(0, m.cue[0] - 12), m.span[0])
    if not cue or not cue.start() <= m.cue[0] < cue.end():
        return text
    rest = text[cue.end() :]
    there = f"{cue[1]} " if cue[1] else "with " if cue[0].lower().startswith(("without", "with no")) else ""
    return text[: cue.start()] + there + (rest[:1].upper() + rest[1:] if cue[0][:1].isupper() and not there else rest)


def _swaps(text: str, chance: random.Random) -> Iterator[tuple[str, str]]:
    before, found, places = sides(text), mentions(text), sentences(text)
    for finding, side in before.items():
        new = text
        for i in {m.sentence for m in found if m.finding == finding and m.side}:
            start, end = places[i]
            new = new[:start] + swapped(new[start:end]) + new[end:]  # one letter less, one more: other places may move
            places = sentences(new)
        if {side, sides(new).get(finding)} == {"left", "right"}:
            yield new, f"{finding}: {sides(new)[finding]}"


def _additions(text: str, chance: random.Random) -> Iterator[tuple[str, str]]:
    before, places = label(text), sentences(text)
    for finding in _ADDED if places else ():
        sentence = variants(finding.lower(), "present", chance.choice(("right", "left", "both", None)))[1]
        start, end = chance.choice(places)
        at = start + len(text[start:end].rstrip())
        new = f"{text[:at]}{'' if text[at - 1] in '.!?;' else '.'} {sentence}{text[at:]}"
        if before[finding] is None and label(new)[finding] == 1:
            yield new, finding


def _removals(text: str, chance: random.Random) -> Iterator[tuple[str, str]]:
    before, places = label(text), sentences(text)
    for finding in SPOKEN:
        gone = {m.sentence for m in mentions(text) if m.finding == finding and m.polarity} if before[finding] in (1, -1) else ()
        if gone and len(gone) < len(places):
            new = text
            for i in sorted(gone, reverse=True):
                new = new[: places[i][0]] + new[places[i][1] :]
            if label(new)[finding] not in (1, -1):
                yield new, finding


def _numbers(text: str, chance: random.Random) -> Iterator[tuple[str, str]]:
    for m in _SIZE.finditer(text):
        value = float(m[1]) * chance.choice((2, 3, 0.5))
        new = f"{value:.1f}" if "." in m[1] or value % 1 else f"{value:.0f}"
        yield text[: m.start(1)] + new + text[m.end(1) :], f"{m[1]} -> {new}"


def sensitivity(metric: Callable[[str, str], float], texts: Sequence[str], kinds: Sequence[str] = KINDS, seed: int = 0) -> list[Score]:
    """Of each kind of error, the share that lowers a metric, and by how much of its best value it does.

    metric: (report, reference) -> value, higher is better; its best value is that of the reference itself. excluded: texts
    without a place for such an error, or where the metric says nothing.
    """
    scores = []
    for kind in kinds:
        noticed, drop = [], []
        for i, text in enumerate(texts):
            wrong, best = inject(text, kind, seed + i), metric(text, text)
            fall = (best - metric(wrong[0], text)) / best if wrong and best else float("nan")
            noticed.append(float(fall > 1e-9) if fall == fall else fall)
            drop.append(fall)
        about = {"slice": f"kind={kind}", "convention": f"one error of the kind {kind} in the reference itself, against the untouched reference"}
        scores += [mean_score("noticed", noticed, range(len(texts)), **about), mean_score("drop", drop, range(len(texts)), better="neither", **about)]
    return scores


def detection(checker: Callable[[str, str], bool], texts: Sequence[str], kinds: Sequence[str] = KINDS, seed: int = 0) -> list[Score]:
    """How well something tells faulty reports from sound ones: sensitivity to each kind, specificity, and their balanced mean.

    checker: (report, reference) -> whether the report has an error. Chance is 0.5 for the balanced accuracy; the sensitivity it averages is the
    mean over kinds that have a place in these texts.
    """
    about = {"convention": "reports with one error each against the untouched reference; specificity: on the untouched reports"}
    scores = []
    for kind in kinds:
        wrong = [inject(text, kind, seed + i) for i, text in enumerate(texts)]
        caught = [float(bool(checker(w[0], text))) if w else float("nan") for w, text in zip(wrong, texts)]
        scores.append(mean_score("sensitivity", caught, range(len(texts)), slice=f"kind={kind}", **about))
    spared = mean_score("specificity", [float(not checker(text, text)) for text in texts], range(len(texts)), **about)
    known = [s.value for s in scores if s.n]
    balanced = (sum(known) / len(known) + spared.value) / 2 if known else float("nan")
    note = "no interval: a mean of means over several sets of texts"
    return [*scores, spared, Score("balanced accuracy", balanced, len(texts), chance=0.5, note=note, **about)]
