"""The sentences of a short structured report: how a finding is put into words, and whether a sentence says it.

The language model is trained to write them from a finding, its state and its side; every sentence that it writes is
checked against the same finding before anybody reads it.
"""

from __future__ import annotations

import re

STATES = ("present", "possible", "absent")
SIDES = {"right": "on the right", "left": "on the left", "both": "on both sides"}
_NEGATION = re.compile(r"\b(no|not|without|absent)\b", re.I)
_DOUBT = re.compile(r"\b(possible|possibly|may|cannot be excluded)\b", re.I)
_WORDS = frozenset(
    "no not there is are a an seen possible possibly may be cannot excluded on the right left both sides side bilateral".split()
)
_SIDE = {
    "right": re.compile(r"\bright\b", re.I),
    "left": re.compile(r"\bleft\b", re.I),
    "both": re.compile(r"\b(both|bilateral)\b", re.I),
}


def prompt(label: str, state: str, side: str | None = None) -> str:
    """What the language model is asked, e.g. "Describe: pleural effusion, present, left"."""
    return "Describe: " + ", ".join([label, state, *([side] if side else [])])


def variants(label: str, state: str, side: str | None = None) -> list[str]:
    """Sentences that say it, the plainest first. side: "right", "left", "both" of the patient, or None."""
    if state not in STATES or side not in (None, *SIDES):
        raise ValueError(f"state {state!r} or side {side!r} is not one of {STATES} and {tuple(SIDES)}")
    if state == "absent":
        return [f"No {label}.", f"There is no {label}.", f"No {label} is seen."]
    where = f" {SIDES[side]}" if side else ""
    capital = label[0].upper() + label[1:]
    if state == "possible":
        return [f"Possible {label}{where}.", f"There may be {label}{where}."]
    return [f"{capital}{where}.", f"There is {label}{where}.", f"{capital} is seen{where}."]


def says(sentence: str, label: str, state: str, side: str | None = None) -> bool:
    """True when the sentence names this label, with this state and this side, and nothing else at all."""
    if label.lower() not in sentence.lower():
        return False
    rest = re.sub(re.escape(label), " ", sentence, flags=re.I)
    if not set(re.findall(r"\w+", rest.lower())) <= _WORDS:  # another finding, a place, a comparison with nothing
        return False
    if bool(_NEGATION.search(rest)) != (state == "absent") or bool(_DOUBT.search(rest)) != (state == "possible"):
        return False
    return {name for name, word in _SIDE.items() if word.search(rest)} == ({side} if side else set())
