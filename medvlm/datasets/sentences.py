"""The sentences of a short structured report: how a finding is put into words, and whether a sentence says it.

The language model is trained to write them from a finding, its state and its side; every sentence that it writes is
checked against the same finding before anybody reads it.
"""

from __future__ import annotations

import re

STATES = ("present", "possible", "absent")
SIDES = {"right": "on the right", "left": "on the left", "both": "on both sides"}


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
    """True when the sentence is one of those that say it; a rewording may hide a second negation or another side."""
    return sentence in variants(label, state, side)


def denies(sentence: str) -> bool:
    """True for a sentence of :func:`variants` that says "absent"."""
    return bool(re.match(r"(No|There is no) ", sentence))
