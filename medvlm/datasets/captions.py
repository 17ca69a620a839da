"""Captions made of facts: what a data set knows of an image, in one or two sentences, worded in several ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import facts, sentences
from .facts import Case

SHOWING = ("{picture} showing {things}.", "{picture} with {things}.", "{things} in {picture}.", "{picture}. It shows {things}.", "This is {picture} with {things}.")
BARE = ("{picture}.", "This is {picture}.", "The image is {picture}.", "One sees {picture}.")
LACKING = ("No {things}.", "There is no {things}.", "No sign of {things}.", "Without {things}.")
"""Wordings, the plainest first."""
SINGLE = {"platelets": "platelet", "nuclei": "nucleus"}
MOST_NAMED, MOST_DENIED, EXACT = 5, 3, 10
"""Structures that are named, the largest; findings that are said to be absent; objects that are counted one by one."""


@dataclass(frozen=True)
class Told:
    """picture: "an axial CT slice of the abdomen"; there: what it shows, "the liver", "about 40 nuclei"; lacking: names."""

    picture: str
    there: tuple[str, ...]
    lacking: tuple[str, ...]


def told(case: Case, picture: str | None, found: Mapping[str, float], well: bool) -> Told | None:
    """What a caption can say of a case; None where nothing is known.

    picture: "a chest X-ray", None for a kind of picture without a name. found: {finding: 1 | 0}. well: somebody calls it normal.
    """
    part = facts.part(case)
    if picture is None and part is None and not found:
        return None
    where = "" if part is None or part in (picture or "") else f" of the {part}"
    kind = " ".join(filter(None, (facts.view(case) or facts.plane(case), (picture or "an image").partition(" ")[2])))
    article = "an" if kind[0].lower() in "aeiou" or kind.startswith(("X-ray", "MR")) else "a"
    there = [f"{sentences.article(n)}{n}{_side(case, n)}" for n, v in found.items() if v and n not in case.counts]
    there += [counted(n, name) for name, n in sorted(case.counts.items()) if not facts.structure(name)]
    if case.image.modality in facts.SCANS and case.image.modality != "xray":  # what else an image of a part shows is always there
        sizes = {n: int(a.sum()) for n, a in {**case.boxes, **case.outlines}.items() if facts.structure(n) and a.any()}
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:MOST_NAMED]
        there += [f"the {n}" for n in sorted(largest, key=lambda n: (n.replace("left ", "").replace("right ", ""), n))]
    if well and not there:
        there = ["nothing abnormal"]
    return Told(f"{article} {kind}{where}", tuple(there), tuple(n for n, v in found.items() if not v))


def counted(number: int, name: str) -> str:
    """ "3 RBC", "1 platelet", "2 nodules", "about 40 nuclei": beyond ``EXACT`` nobody counts at a glance."""
    if number > EXACT:
        return f"about {(number + 5) // 10 * 10} {sentences.plural(name)}"
    return f"{number} {SINGLE.get(name, name) if number == 1 else sentences.plural(name)}"


def captions(about: Told, lot: np.random.Generator, count: int = 4) -> Iterator[str]:
    """The plainest caption, then others: another wording, another order, a part of what is absent."""
    yield _worded(about, SHOWING[0], BARE[0], LACKING[0], about.there, about.lacking[:MOST_DENIED])
    for _ in range(count - 1):
        there = [about.there[i] for i in lot.permutation(len(about.there))]
        lacking = [about.lacking[i] for i in lot.permutation(len(about.lacking))[: int(lot.integers(MOST_DENIED + 1))]]
        yield _worded(about, *(str(lot.choice(w)) for w in (SHOWING, BARE, LACKING)), there, lacking)


def _worded(about: Told, showing: str, bare: str, without: str, there: Sequence[str], lacking: Sequence[str]) -> str:
    said = [(showing if there else bare).format(picture=about.picture, things=_joined(there, "and"))]
    if lacking:
        said.append(without.format(things=_joined(lacking, "or")))
    return " ".join(f"{s[0].upper()}{s[1:]}" for s in said)


def _joined(names: Sequence[str], last: str) -> str:
    return f" {last} ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""


def _side(case: Case, name: str) -> str:
    side = facts.side(case, name)
    return f" {sentences.SIDES[side]}" if side else ""
