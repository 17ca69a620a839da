"""Questions that a model's heads answer by themselves: what kind of picture, which plane, view, part, eye; whether a finding or structure is there,
and where, how large, how many, by what was outlined or boxed.

A small language model compares a word with a picture badly; the heads were fitted and calibrated for exactly that. What is not
recognised here, with nothing left over, is left to the language model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..datasets.facts import LUNGS, MODALITY_NAMES, Case, shares, where
from ..datasets.sentences import many, spoken, word

WORDS: Mapping[str, Mapping[str, str]] = {
    "modality": {"xray": r"(plain )?(chest )?(x-?\s?rays?|radiograph|plain film|cxr)( of the \w+)?", "ct": r"(axial )?(ct|computed tomography)( scan| slice| image)?",
                 "mr": r"(an? )?(mri?|magnetic resonance)( scan| slice| image| imaging)?", "fundus": r"(colou?r )?(retinal|fundus) (photograph|photo|image|picture)",
                 "pathology": r"(microscopy|microscopic|histology|histopathology|pathology) (image|slide|picture)|micrograph|blood smear"},
    "plane": {p: rf"{p}( (slice|plane|view|section|image|scan))?" for p in ("axial", "coronal", "sagittal")},
    "part": {"head": r"head|brain|skull", "chest": r"chest|thorax", "abdomen": r"abdomen|belly", "eye": r"eye|retina"},
    "eye": {"right": r"right eye", "left": r"left eye"},
}  # fmt: skip
"""{group of the classifier: {name: how a question says it}}."""
_IS = re.compile(r"^(?:is|was) (?:this|it|the (?:image|picture|scan|slice))(?: (?:image|picture|scan|slice|film|study))?(?: taken)?(?: in)?(?: an?| the)? (?P<what>.+?)\?*$", re.I)
_OF = re.compile(r"^(?:is|does) this (?:an? )?(?:image|picture|scan|x-ray)?\s?(?:of|show) the (?P<what>[\w ]+?)(?: region)?\?*$", re.I)
_WHICH = {
    "modality": re.compile(r"^(what|which) (kind|type|imaging)? ?(of )?(an? )?(image|imaging|picture|scan|study|modality)\b|^what (imaging )?modality\b|^what is the modality\b|"
                           r"^(what|which) (kind|type) of (image|picture|scan|study|imaging)\b|type of picture am i looking at", re.I),
    "plane": re.compile(r"^(in )?(what|which) (imaging |anatomical )?plane\b|^what is the plane\b|plane does this slice show|axial, coronal or sagittal\?$", re.I),
    "part": re.compile(r"^(what|which) (part of the body|body part|region of the body)\b", re.I),
    "eye": re.compile(r"^which eye is this\?*$|^is this the (right or the left|left or the right) eye\?*$", re.I),
}  # fmt: skip
_NOTHING = re.compile(r"(?:\W+(?:is|was|are|were|does|did|do|being|am|i|you|we|looking|see|at|this|that|it|these|the|an?|above|given|image|imaging|images|picture|photo|photograph|scan|"
                      r"slice|study|film|radiology|radiologic|radiological|medical|modality|plane|kind|type|used|use|shown|show|seen|displayed|depicted|represented|represent|taken|made|"
                      r"acquired|obtained|produced|captured|scanned|oriented|demonstrated|imaged|belong|about|take|make|acquire|obtain|produce|capture|here|to|in|of|for|by|from|with|on|or|currently|please|"
                      r"ct|mri?|x-?\s?rays?|ultrasound|angiogram|mammogra\w+|pet|nuclear medicine|gastrointestinal(?= image)|radiograph|which|method|technique))*\W*", re.I)
"""What may follow the words that ask for one of a group, and asks for nothing more."""
_THERE = re.compile(r"^(?:is|are) there (?:an? |any |evidence of |signs? of )*(?P<what>[\w -]+?)(?: (?:in|on) (?:this|the) (?:(?:chest|ct|mr|fundus) )*(?:image|picture|film|scan|slice|x-?ray|photograph|study)| present| seen| visible| here)*\?*$|"
                    r"^does (?:this|the) (?:image|picture|slice|scan|x-ray|chest x-ray|film|photograph|ct slice|ct scan)? ?(?:show|have|contain) (?:an? |any |the |evidence of )*(?P<what2>[\w -]+?)\?*$|"
                    r"^(?:is|are) (?:an? |the )*(?P<what3>[\w -]+?) (?:in this (?:image|picture|slice|scan)|seen here|seen|present|visible|shown)\?*$|"
                    r"^can (?:you see |the )(?:an? )?(?P<what4>[\w -]+?)(?: be seen here)?\?*$", re.I)  # fmt: skip
_MEASURED = {
    "place": re.compile(r"^(?:(?:is|are|does|do) the (?P<what>[\w -]+?)(?: lie| found| located| seen)?|can the (?P<what2>[\w -]+?) be (?:found|seen)) (?P<place>(?:in|on) the .+?)\?*$", re.I),
    "where": re.compile(r"^where (?:is|are|does|do) the (?P<what>[\w -]+?)(?: lie| located| seen)?\?*$|^locate the (?P<what2>[\w -]+?)\.*$|^in which place (?:is|are) the (?P<what3>[\w -]+?)\?*$|"
                        r"^(?:in )?which lung (?:is|are) the (?P<what4>[\w -]+?)(?: in)?\?*$|^(?:on )?(?:which|what) side (?:is|are) the (?P<what5>[\w -]+?)(?: on)?\?*$", re.I),
    "size": re.compile(r"^how (?:large|big) (?:is|are) the (?P<what>[\w -]+?)\?*$|^what is the (?:size|area|volume) of the (?P<what2>[\w -]+?)\?*$", re.I),
    "count": re.compile(r"^how many (?P<what>[\w -]+?)(?: (?:are|can be) (?:there|seen|visible|shown))?(?: (?:in|on) (?:this|the) (?:image|picture|smear|slide))?\?*$|^count the (?P<what2>[\w -]+?)\.*$|"
                        r"^what is the number of (?P<what3>[\w -]+?)(?: in (?:this|the) [\w ]+)?\?*$", re.I),
}  # fmt: skip
"""What is told by outlines and boxes: {what is asked of the named: how}."""
_SIDED = re.compile(r"^(?:in|on) the (?:patient's )?(right|left)(?: (?:lung|side|side of the (?:patient|body|chest)))?$", re.I)
_QUARTER = re.compile(r"^in the (?:upper|lower|front|back) (?:right|left) quarter of the [\w ,']+$", re.I)
_HOW = re.compile(r"[\s,.]*\b(please )?answer (with |by )?(only )?[\"']?yes[\"']? or [\"']?no[\"']?( only)?[.!]*$", re.I)
"""How a question wants to be answered, which changes nothing of what it asks."""
SPOKEN = {"part": "the {}", "eye": "the {} eye"}


class Asked(NamedTuple):
    """group: of the classifier, "finding", "target", or what is asked of the named: "place", "where", "size", "count"; name: None for
    an open question, which asks for one of the group. place: that is asked after, "in the right lung"."""

    group: str
    name: str | None
    place: str | None = None


def asked(question: str, groups: Mapping[str, Sequence[str]], findings: Sequence[str], targets: Sequence[str], boxed: Sequence[str] = (),
          aliases: Mapping[str, str] | None = None) -> Asked | None:  # fmt: skip
    """What a question asks of the heads, None where it asks for anything else.

    Args:
        groups: {group: names} that the classifier tells apart. findings: that it was calibrated on. targets: that are outlined.
        boxed: objects that are boxed. aliases: {how else a target or object is called, lower case: its name}.

    >>> asked("Is this an axial slice?", {"plane": ("axial", "coronal")}, (), ())
    Asked(group='plane', name='axial', place=None)
    >>> asked("Is this a CT scan? Answer yes or no.", {"modality": ("xray", "ct")}, (), ())
    Asked(group='modality', name='ct', place=None)
    >>> asked("Which plane of the pelvis is fractured?", {"plane": ("axial", "coronal")}, (), ())
    >>> asked("Is the consolidation in the left lung?", {}, (), ("consolidation",))
    Asked(group='place', name='consolidation', place='in the left lung')
    >>> asked("Is there a pneumothorax on the left?", {}, ("pneumothorax",), ())
    """
    plain = _HOW.sub("", " ".join(question.strip().split()))
    for group, pattern in _WHICH.items():
        if group in groups and (found := pattern.search(plain)) and _NOTHING.fullmatch(plain, found.end()):
            return Asked(group, None)
    for form in (_IS, _OF):
        if found := form.match(plain):
            what = re.sub(r"^(an?|the) ", "", found["what"].lower())
            for group, names in groups.items():
                if hit := next((n for n in names if re.fullmatch(WORDS.get(group, {}).get(n, re.escape(n)), what, re.I)), None):
                    return Asked(group, hit)
    if found := _THERE.match(plain):
        what = next(w for w in found.groups() if w).lower()
        for kind, names in (("finding", findings), ("target", targets)):
            if hit := _named(what, names, {}):
                return Asked(kind, hit)
    for kind, pattern in _MEASURED.items():
        if found := pattern.match(plain):
            what = next(w for k, w in found.groupdict().items() if k != "place" and w).lower()
            place = " ".join(found["place"].lower().split()) if kind == "place" else None
            if place is not None and not (_SIDED.match(place) or _QUARTER.match(place)):
                continue
            names = {"size": targets, "count": boxed}.get(kind, (*targets, *boxed))
            if hit := _named(what, names, aliases or {}):
                return Asked(kind, hit, place)
    return None


def _named(what: str, names: Sequence[str], aliases: Mapping[str, str]) -> str | None:
    return next((n for n in names if what in (n.lower(), word(n).lower(), spoken(n).lower()) or aliases.get(what) == n), None)


def answer(wanted: Asked, chances: Mapping[str, float], present: Callable[[str], float]) -> tuple[str, float, dict[str, float] | None]:
    """(text, probability, choices) by the classifier's chances, {"modality:ct": p, "pneumonia": p}, or a target's presence."""
    if wanted.name is None:
        own = {n.partition(":")[2]: p for n, p in chances.items() if n.startswith(f"{wanted.group}:")}
        best = max(own, key=own.get)
        return (MODALITY_NAMES[best] if wanted.group == "modality" else SPOKEN.get(wanted.group, "{}").format(best)), own[best], None
    yes = present(wanted.name) if wanted.group == "target" else chances[wanted.name if wanted.group == "finding" else f"{wanted.group}:{wanted.name}"]
    return _yes_no(yes)


def chosen(wanted: Asked, chances: Mapping[str, float], choices: Sequence[str]) -> tuple[str, float, dict[str, float]] | None:
    """As :func:`answer` for one of a group, in the words of the answers allowed; None where fewer than two of them are names of the group.

    >>> chosen(Asked("eye", None), {"eye:right": 0.75, "eye:left": 0.25}, ("Left", "Right"))
    ('Right', 0.75, {'Left': 0.25, 'Right': 0.75})
    """
    own = {n.partition(":")[2]: p for n, p in chances.items() if n.startswith(f"{wanted.group}:")}
    said = {c: re.sub(r"^(an?|the) ", "", c.strip().lower()) for c in choices}
    meant = {c: next((n for n in own if s == n or re.fullmatch(WORDS.get(wanted.group, {}).get(n, re.escape(n)), s, re.I)), None) for c, s in said.items()}
    total = sum(own[n] for n in meant.values() if n)
    if sum(n is not None for n in meant.values()) < 2 or not total:
        return None
    share = {c: own[n] / total if n else 0.0 for c, n in meant.items()}
    best = max(share, key=share.get)
    return best, share[best], share


def measured(wanted: Asked, case: Case, present: float, size: str | None = None) -> tuple[str, float, dict[str, float] | None] | None:
    """(text, probability, choices) by what was outlined or boxed in the case; None where nothing tells the place that is asked after, or
    nothing was drawn of what is there.

    Args:
        case: with what the model has drawn, an absent target empty or left out. present: chance that the target is there.
        size: of the target, "12.5 mL".

    The chance that it lies in a place is that of its being there times the share of it that lies there.
    """
    drawn = case.outlines.get(wanted.name, case.boxes.get(wanted.name))
    there = drawn is not None and bool(drawn.any())
    if wanted.group == "place":
        if not there:
            share = 1 / len(LUNGS)
        elif (share := _share(wanted, case)) is None:
            return None
        return _yes_no(present * share)
    if wanted.group == "count":
        count = case.counts.get(wanted.name, 0)
        return str(count), present if count else 1 - present, None
    if not there and present >= 0.5:
        return None  # it is there, and could not be outlined
    if not there:
        return f"there {'are' if many(wanted.name) else 'is'} no {wanted.name}", 1 - present, None
    text = _where(wanted, case) if wanted.group == "where" else size
    return (text, present, None) if text else None


def _share(wanted: Asked, case: Case) -> float | None:
    """Of what was drawn, that which lies in the place."""
    ways = list(shares(case, wanted.name))
    for said, _, held in ways:
        for option, share in held.items():
            if wanted.place == said.format(option).lower():
                return share
    side = _SIDED.match(wanted.place)
    kinds = ("lung",) if wanted.place.endswith("lung") else ("lung", "side")
    return next((held[side[1].lower()] for _, kind, held in ways if kind in kinds), None) if side else None


def _where(wanted: Asked, case: Case) -> str | None:
    """The place that holds most of it: "in both lungs", "in the left lung", "mostly in the upper left quarter of the picture"."""
    if sure := where(case, wanted.name):
        return sure
    for said, _, held in (way for way in shares(case, wanted.name) if way[1] == "quarter"):
        best = max(held, key=held.__getitem__)
        return f"mostly {said.format(best)}" if held[best] > 0.5 else f"in more than one quarter of the{said.partition(' of the')[2]}"
    return None


def _yes_no(yes: float) -> tuple[str, float, dict[str, float]]:
    return "yes" if yes >= 0.5 else "no", max(yes, 1 - yes), {"yes": yes, "no": 1 - yes}
