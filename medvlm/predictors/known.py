"""Questions that a model's heads answer by themselves: what kind of picture, which plane, view, part, eye; whether a finding or structure is there.

A small language model compares a word with a picture badly; the heads were fitted and calibrated for exactly that. What is not
recognised here, with nothing left over, is left to the language model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..datasets.facts import MODALITY_NAMES
from ..datasets.sentences import spoken, word

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
_THERE = re.compile(r"^(?:is|are) there (?:an? |any |evidence of |signs? of )*(?P<what>[\w -]+?)(?: (?:in|on) (?:this|the) (?:(?:chest|ct|mr|fundus) )*(?:image|picture|film|scan|slice|x-?ray|photograph|study)| present| seen| visible| here)*\?*$|"
                    r"^does (?:this|the) (?:image|picture|slice|scan|x-ray|chest x-ray|film|photograph|ct slice|ct scan)? ?(?:show|have|contain) (?:an? |any |the |evidence of )*(?P<what2>[\w -]+?)\?*$|"
                    r"^(?:is|are) (?:an? |the )*(?P<what3>[\w -]+?) (?:in this (?:image|picture|slice|scan)|seen here|seen|present|visible|shown)\?*$|"
                    r"^can (?:you see |the )(?:an? )?(?P<what4>[\w -]+?)(?: be seen here)?\?*$", re.I)  # fmt: skip
_HOW = re.compile(r"[\s,.]*\b(please )?answer (with |by )?(only )?[\"']?yes[\"']? or [\"']?no[\"']?( only)?[.!]*$", re.I)
"""How a question wants to be answered, which changes nothing of what it asks."""
SPOKEN = {"part": "the {}", "eye": "the {} eye"}


class Asked(NamedTuple):
    """group: of the classifier, "finding" or "target"; name: in it, None for an open question, which asks for one of the group."""

    group: str
    name: str | None


def asked(question: str, groups: Mapping[str, Sequence[str]], findings: Sequence[str], targets: Sequence[str]) -> Asked | None:
    """What a question asks of the heads, None where it asks for anything else.

    Args:
        groups: {group: names} that the classifier tells apart. findings: that it was calibrated on. targets: that are outlined.

    >>> asked("Is this an axial slice?", {"plane": ("axial", "coronal")}, (), ())
    Asked(group='plane', name='axial')
    >>> asked("Is this a CT scan? Answer yes or no.", {"modality": ("xray", "ct")}, (), ())
    Asked(group='modality', name='ct')
    >>> asked("Is there a pneumothorax on the left?", {}, ("pneumothorax",), ())
    """
    plain = _HOW.sub("", " ".join(question.strip().split()))
    for group, pattern in _WHICH.items():
        if group in groups and pattern.search(plain):
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
            if hit := next((n for n in names if what in (n.lower(), word(n).lower(), spoken(n).lower())), None):
                return Asked(kind, hit)
    return None


def answer(wanted: Asked, chances: Mapping[str, float], present: Callable[[str], float]) -> tuple[str, float, dict[str, float] | None]:
    """(text, probability, choices) by the classifier's chances, {"modality:ct": p, "pneumonia": p}, or a target's presence."""
    if wanted.name is None:
        own = {n.partition(":")[2]: p for n, p in chances.items() if n.startswith(f"{wanted.group}:")}
        best = max(own, key=own.get)
        return (MODALITY_NAMES[best] if wanted.group == "modality" else SPOKEN.get(wanted.group, "{}").format(best)), own[best], None
    yes = present(wanted.name) if wanted.group == "target" else chances[wanted.name if wanted.group == "finding" else f"{wanted.group}:{wanted.name}"]
    text = "yes" if yes >= 0.5 else "no"
    return text, max(yes, 1 - yes), {"yes": yes, "no": 1 - yes}
