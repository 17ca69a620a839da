"""Conversations out of labels, masks, boxes, captions and questions: what a data set knows, as turns a model can learn.

Names are put into the toolkit's own words (``sentences.spoken``). Sides are the patient's. What a set says is absent becomes a
negative: a "no", an empty mask, a sentence that begins with "No". What nobody says is not asked.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..imaging.scan import Image, Volume
from ..sample import SEG, Mask, Region, Sample, Turn, box_of
from . import captions, facts, sentences
from .facts import ANNOTATED, MODALITY_NAMES, Case, side_of
from .sentences import word

__all__ = ["ANNOTATED", "KINDS", "MODALITY_WORDS", "conversations", "dealt", "describe", "dialogues", "known", "restructured", "side_of", "word"]

KINDS = ("segment", "asked", "finding", "describe", "modality", "view", "locate", "box", "count", "organ", "plane", "abnormal",
         "report", "caption", "text")  # fmt: skip
"""``meta["kind"]``; "box" is "locate" as coordinates, "text" a question without an image. "facts", captions made of what a set
knows, and "grounded", one sentence that names and outlines all there is an outline of, come only where they are asked for: they
say again what all others say."""
MODALITY_WORDS = {**MODALITY_NAMES, "xray": "a chest X-ray", "ct": "a CT slice", "mr": "an MR slice"}
ASK = {
    "segment": ("Segment the {name}.", "Outline the {name}.", "Mark the {name} in this {picture}.", "Please draw the outline of the {name}."),
    "finding": ("{Is} there {name} in this {picture}?", "Does this {picture} show {a}{name}?", "{Is} {a}{name} seen here?", "Can you see {a}{name}?"),
    "modality": ("What kind of image is this?", "Which imaging modality is this?", "What type of picture am I looking at?"),
    "is": ("Is this {picture}?", "Is the picture {picture}?", "Am I looking at {picture}?"),
    "view": ("Is this a PA or AP film?", "Which projection is this film, PA or AP?", "Was this film taken PA or AP?"),
    "where": ("Where {be} the {name}?", "Where {do} the {name} lie?", "Locate the {name}.", "In which place {be} the {name}?"),
    "there": ("{Is} the {name} {place}?", "{Do} the {name} lie {place}?", "Can the {name} be found {place}?"),
    "box": ("Give the bounding box of the {name}.", "Locate the {name} with a bounding box.", "Put a box around the {name}."),
    "boxes": ("Give the bounding boxes of the {name}.", "Locate the {name} with bounding boxes.", "Put boxes around the {name}."),
    "count": ("How many {name} are there?", "Count the {name}.", "What is the number of {name} in this {picture}?"),
    "part": ("Which part of the body is shown?", "What part of the body is this?", "Which body part does this {picture} show?"),
    "of": ("Is this an image of the {name}?", "Does this image show the {name} region?", "Was the {name} imaged here?"),
    "organ": ("Does this image show the {name}?", "{Is} the {name} in this image?", "Can the {name} be seen here?"),
    "plane": ("In which plane is this slice?", "Which plane does this slice show?", "Is this slice axial, coronal or sagittal?"),
    "is plane": ("Is this {a}{name} slice?", "Is the slice {name}?", "Does this show {a}{name} plane?"),
    "abnormal": ("Does this image show any abnormality?", "Is there anything abnormal in this {picture}?", "Is any disease visible here?"),
    "report": ("Write the report of this {picture}.", "What are the findings?", "Report this {picture}."),
    "grounded": ("What does this {picture} show? Outline it.", "Describe this {picture} and outline what you name.", "Name and outline what is seen here."),
    "caption": ("Describe this image.", "What does this {picture} show?", "Write a caption for this image."),
    "none": ("There {be} no {name}.",),
}
"""Questions, the plainest first, and the answer where there is nothing."""
MOST_BOXES = 20
"""More than these are counted, but not written down one by one."""


@dataclass(frozen=True, eq=False)
class _Told:
    """A group of samples, what it tells of its image, and what a model is to learn of it."""

    group: Sequence[Sample]
    case: Case | None
    kinds: frozenset[str]
    targets: Sequence[str] | None
    findings: Sequence[str] | None
    modalities: Sequence[str] | None
    annotated: Sequence[str]
    absent: Sequence[str]
    style: str
    label: Callable[[str], Mapping[str, float | None]] | None

    @cached_property
    def all(self) -> dict[str, float]:
        return facts.stated(self.case, self.annotated, self.label)

    @cached_property
    def stated(self) -> dict[str, float]:
        """{finding: 1 | 0}: those that are to be learnt, and all that are labelled."""
        labelled = set(map(word, self.case.labels))
        return {n: v for n, v in self.all.items() if n in labelled or (n in self.findings if self.findings is not None else not facts.structure(n))}

    @cached_property
    def found(self) -> dict[str, float]:
        return {n: v for n, v in self.stated.items() if not facts.NORMAL.match(n) and (self.findings is None or n in self.findings)}

    @cached_property
    def lot(self) -> np.random.Generator:
        return _lot(self.case.name)

    @property
    def drawn(self) -> list[str]:
        """Names of what is outlined or boxed, and is there."""
        return [n for n, a in {**self.case.outlines, **self.case.boxes}.items() if a.any()]

    @property
    def missed(self) -> list[str]:
        """What this data set would have outlined or boxed, and did not: of a label alone nobody ever says where it is."""
        return [n for n, v in self.found.items() if v == 0 and n in self.annotated]

    @property
    def picture(self) -> str | None:
        """What the image is, e.g. "a chest X-ray", "an X-ray of the knee", "a CT scan"; None for another kind of picture."""
        modality = self.case.image.modality
        if modality == "xray":
            part = facts.part(self.case)
            return MODALITY_WORDS["xray"] if part == "chest" else MODALITY_NAMES["xray"] + (f" of the {part}" if part else "")
        return (MODALITY_NAMES if isinstance(self.case.image, Volume) else MODALITY_WORDS).get(modality)

    def lacks(self, name: str) -> bool:
        """Whether it is known not to be in the image."""
        return name in self.absent or (self.all[name] == 0 if name in self.all else facts.elsewhere(self.case, name))


@dataclass(frozen=True, eq=False)
class _Talk:
    """One conversation. ask: the wordings of its question; more: fields of its Sample."""

    kind: str
    ask: Sequence[str]
    answer: str
    more: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


def conversations(group: Iterable[Sample], targets: Sequence[str] | None = None, findings: Sequence[str] | None = None,
                  modalities: Sequence[str] | None = None, *, kinds: Iterable[str] = KINDS, annotated: Sequence[str] = (), absent: Sequence[str] = (),
                  variety: float = 0.4, style: str = "qwen3",
                  label: Callable[[str], Mapping[str, float | None]] | None = None) -> Iterator[Sample]:  # fmt: skip
    """Every short conversation that a group of samples supports about its image.

    Args:
        group: all samples of one image, as ``manifest.row_samples`` or a data set gives them; of several images only what is
            outlined, labelled, asked and written is used; of none, what is asked.
        targets: structures a model learns to outline, those known to be absent with an empty mask; None: what is outlined here.
        findings: those a model learns to name; None: all that the data tell.
        modalities: those asked after by yes or no; None: the image's own and another.
        kinds: of ``KINDS``, and "facts" and "grounded". annotated: names (in words) that this data set outlines or boxes wherever they are: where they
            are not, though others are, they are absent. absent: names that are surely in none of these images.
        variety: share of the questions that are not asked in the plainest way, drawn by the conversation's id.
        style: how a box is written, see :func:`medvlm.datasets.sentences.box_text`. label: reads a report, see ``facts.stated``.

    Each Sample has one question and one answer, but for those that the data set asks, which keep their turns. An answer with
    ``<|seg|>`` has one Mask (exact) or Region (a box) for each, in reading order; one of coordinates has its Regions, in their order, and ``meta["style"]``, so
    that who moves the picture can write it anew (``sentences.boxes_text``). ``labels`` hold the findings, and
    "modality:xray" and "view:PA" where they are known. Whether a text may be learnt is the recipe's to decide.
    """
    group, kinds = list(group), frozenset(kinds)
    if not group:
        return
    first = group[0]
    images = list(first.images.values())
    told = _Told(group, facts.case_of(group) if images else None, kinds, targets, findings, modalities, annotated, absent, style, label)
    row, name, labels = str(first.meta.get("row") or first.id), str(first.meta.get("row") or first.id), {}
    if told.case is not None:
        view = facts.view(told.case)
        name, labels = told.case.name, told.stated | {f"modality:{told.case.image.modality}": 1.0} | ({f"view:{view}": 1.0} if view else {})
    base = Sample(name, first.patient, first.images, labels=labels, meta={"row": row, "split": first.meta.get("split")})
    makers = [_asked] if not images else [_segment, _asked, _finding, _texts] if len(images) > 1 else _EVERY
    talks = (talk for maker in makers for talk in maker(told) if talk.kind in kinds)
    for number, talk in enumerate(talks):
        ident = f"{name}#{number}"
        question = _pick(talk.ask, _lot(ident), variety)
        more = {"turns": (Turn("user", question), Turn("assistant", talk.answer)), **talk.more}
        yield replace(base, id=ident, meta={**base.meta, "kind": talk.kind, **talk.meta}, **more)


def dialogues(singles: Iterable[Sample], turns: int = 3) -> Iterator[Sample]:
    """Conversations about the same images joined into dialogues of up to ``turns`` questions, as :func:`dealt` puts them together.

    Outlines and boxes stand in the order of the ``<|seg|>`` that ask for them. ``meta["kind"]`` is "dialogue", ``meta["kinds"]``
    those of its parts. Left out: coordinates (``meta["style"]``), which are written anew when the picture moves, and what the
    user does not begin.
    """
    held = [s for s in singles if s.turns and s.turns[0].role == "user" and "style" not in s.meta]
    for number, parts in enumerate(dealt(held, turns)):
        parts = sorted(parts, key=lambda s: bool(s.regions))  # a sample lists its outlines before its boxes
        joined = {field: tuple(x for s in parts for x in getattr(s, field)) for field in ("turns", "masks", "regions")}
        meta = {k: v for k, v in parts[0].meta.items() if k != "qid"} | {"kind": "dialogue", "kinds": [s.meta.get("kind") for s in parts]}
        yield replace(parts[0], id=f"{parts[0].meta.get('row', parts[0].id)}#d{number}", group=None, choices=None, meta=meta, **joined)


def dealt(singles: Sequence[Sample], turns: int) -> list[list[Sample]]:
    """The conversations about the same images, each once, in lots of up to ``turns``, in an order that hangs on their ids alone.

    What is scored together (``group``: a probe and its twin) is never in one lot, where one would tell the other's answer.
    """
    lots: list[list[Sample]] = []
    for s in sorted(singles, key=lambda s: hashlib.sha256(s.id.encode()).digest()):
        free = (lot for lot in lots if len(lot) < turns and (s.group is None or s.group not in {o.group for o in lot}))
        if (lot := next(free, None)) is None:
            lots.append([s])
        else:
            lot.append(s)
    return lots


def _segment(told: _Told) -> Iterator[_Talk]:
    if "segment" not in told.kinds:
        return
    case, names, empty = told.case, told.targets, np.zeros(told.case.image.shape[1:], bool)
    if names is None and told.drawn:
        names = dict.fromkeys((*case.outlines, *case.boxes, *(n for n in (*told.annotated, *facts.FAR.values()) if told.lacks(n))))
    for name in names or ():
        if name in case.outlines:
            more = {"masks": (Mask(case.image.id, name, case.outlines[name]),)}
        elif len(case.corners.get(name, ())) == 1:
            more = {"regions": (Region(case.image.id, name, case.corners[name][0]),)}
        elif name not in case.boxes and told.lacks(name):
            more = {"masks": (Mask(case.image.id, name, empty),)}
        else:
            continue
        yield _Talk("segment", _ask(told, "segment", name), SEG, more)


def _asked(told: _Told) -> Iterator[_Talk]:
    for s in told.group:
        if s.question and s.answer:
            kind = "text" if told.case is None else "report" if s.verb == "report" else "asked"
            areas = {} if SEG not in s.answer else {"masks": s.masks} if s.masks else {"regions": s.regions}
            yield _Talk(kind, (s.question,), s.answer, {"turns": s.turns, "group": s.group, "choices": s.choices, **areas}, {"qid": str(s.meta.get("qid", s.id))})


def _finding(told: _Told) -> Iterator[_Talk]:
    for name, value in told.found.items():
        yield _Talk("finding", _ask(told, "finding", name), _yes(value))
        side = facts.side(told.case, name) if value and "describe" in told.kinds else None
        yield from (_Talk("describe", (question,), answer) for question, answer in describe(name, "present" if value else "absent", side))


def _modality(told: _Told) -> Iterator[_Talk]:
    own = told.case.image.modality
    if told.picture is None:
        return
    yield _Talk("modality", _ask(told, "modality"), told.picture)
    for modality in told.modalities or (own, str(told.lot.choice([m for m in MODALITY_WORDS if m != own]))):
        asked = told.picture if modality == own else MODALITY_WORDS[modality]
        yield _Talk("modality", [q.format(picture=asked) for q in ASK["is"]], _yes(modality == own))


def _view(told: _Told) -> Iterator[_Talk]:
    if view := facts.view(told.case):
        yield _Talk("view", ASK["view"], view)


def _locate(told: _Told) -> Iterator[_Talk]:
    if "locate" not in told.kinds:
        return
    for name in told.drawn:
        if best := facts.where(told.case, name):
            yield _Talk("locate", _ask(told, "where", name), f"{best[0].upper()}{best[1:]}.")
        for place in facts.places(told.case, name):
            for option in place.options:
                yield _Talk("locate", _ask(told, "there", name, place=place.said.format(option)), _yes(option == place.true))
    for name in told.missed:
        yield _Talk("locate", _ask(told, "where", name), *_ask(told, "none", name))


def _box(told: _Told) -> Iterator[_Talk]:
    image = told.case.image
    if "box" not in told.kinds or not isinstance(image, Image):
        return
    height, width = image.shape[1:]
    for name in told.drawn:
        boxes = told.case.corners.get(name) or _one_part(told.case.outlines[name])
        kept = [((max(0, t), max(0, l)), (min(height, b), min(width, r))) for (t, l), (b, r) in boxes]  # annotators drag beyond the edge
        if 0 < len(kept) <= MOST_BOXES:
            text = sentences.boxes_text(sorted(kept), (height, width), name, told.style)
            yield _Talk("box", _ask(told, "box", name) if len(kept) == 1 else _ask(told, "boxes", sentences.plural(name)), text,
                        {"regions": tuple(Region(image.id, name, b) for b in sorted(kept))}, {"style": told.style})  # fmt: skip
    for name in told.missed:
        yield _Talk("box", _ask(told, "box", name), *_ask(told, "none", name))


def _count(told: _Told) -> Iterator[_Talk]:
    counts = {n: c for n, c in told.case.counts.items() if not facts.structure(n)}
    counts |= {n: 0 for n in told.annotated if counts and told.all.get(n) == 0}
    for name, count in counts.items():
        yield _Talk("count", _ask(told, "count", sentences.plural(name)), str(count))


def _organ(told: _Told) -> Iterator[_Talk]:
    if part := facts.part(told.case):
        yield _Talk("organ", _ask(told, "part"), f"the {part}")
        for name in (part, str(told.lot.choice(facts.others(part)))):
            yield _Talk("organ", _ask(told, "of", name), _yes(name == part))
    shown = {n: v for n, v in told.all.items() if n not in told.stated and facts.structure(n)}
    shown |= {n: 0.0 for n in facts.FAR.values() if n not in told.all and facts.elsewhere(told.case, n)}
    for name, value in shown.items():
        yield _Talk("organ", _ask(told, "organ", name), _yes(value))


def _plane(told: _Told) -> Iterator[_Talk]:
    if plane := facts.plane(told.case):
        yield _Talk("plane", ASK["plane"], plane)
        wrong = str(told.lot.choice([p for p in ("axial", "coronal", "sagittal") if p != plane]))
        for name in (plane, wrong):
            yield _Talk("plane", [q.format(a="an " if name == "axial" else "a ", name=name) for q in ASK["is plane"]], _yes(name == plane))


def _abnormal(told: _Told) -> Iterator[_Talk]:
    if (ill := facts.abnormal(told.case, told.stated)) is not None:
        yield _Talk("abnormal", _ask(told, "abnormal"), _yes(ill))


def _texts(told: _Told) -> Iterator[_Talk]:
    texts = {s.answer: "report" if "sections" in s.meta or s.verb == "report" else "caption" for s in told.group if s.answer and not s.question}
    texts |= {str(s.meta["caption"]): "caption" for s in told.group if s.meta.get("caption")}
    yield from (_Talk(kind, _ask(told, kind), text) for text, kind in texts.items())


def _facts(told: _Told) -> Iterator[_Talk]:
    if "facts" in told.kinds and (about := captions.told(told.case, told.picture, told.found, facts.abnormal(told.case, told.stated) is False)):
        yield from (_Talk("facts", _ask(told, "caption"), text) for text in captions.captions(about, _lot(f"{told.case.name} facts")))


def _grounded(told: _Told) -> Iterator[_Talk]:
    case = told.case
    shown = [n for n in (told.targets if told.targets is not None else case.outlines) if case.outlines.get(n, np.zeros(0)).any()]
    if "grounded" in told.kinds and shown:
        *others, last = (f"the {n} {SEG}" for n in shown)
        text = f"{', '.join(others)} and {last}" if others else last
        picture = (told.picture or "an image").partition(" ")[2]
        yield _Talk("grounded", _ask(told, "grounded"), f"The {picture} shows {text}.", {"masks": tuple(Mask(case.image.id, n, case.outlines[n]) for n in shown)})


_EVERY = (_segment, _grounded, _asked, _finding, _modality, _view, _locate, _box, _count, _organ, _plane, _abnormal, _texts, _facts)


def _ask(told: _Told, kind: str, name: str = "", place: str = "") -> list[str]:
    picture = (told.picture or "an image").partition(" ")[2]
    be, do = ("are", "do") if sentences.many(name) else ("is", "does")
    words = {"name": name, "a": sentences.article(name) if name else "", "be": be, "Is": be.capitalize(), "do": do, "Do": do.capitalize()}
    return [q.format(**words, picture=picture, place=place) for q in ASK[kind]]


def _yes(value: float) -> str:
    return "yes" if value else "no"


def _one_part(mask: np.ndarray) -> list:
    """The box around an outline in one piece; of one in several, a box says little."""
    from scipy.ndimage import label

    return [box_of(mask)] if label(mask, np.ones((3, 3)))[1] == 1 else []


def _pick(options: Sequence[str], lot: np.random.Generator, variety: float) -> str:
    return options[0] if len(options) == 1 or lot.random() >= variety else options[int(lot.integers(1, len(options)))]


def _lot(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))


def describe(label: str, state: str, side: str | None = None) -> Iterator[tuple[str, str]]:
    """(prompt, sentence) pairs, the plainest sentence three times as often as each other one."""
    said = sentences.variants(label, state, side)
    for sentence in (said[0], said[0], *said):
        yield sentences.prompt(label, state, side), sentence


def restructured(group: Iterable[Sample]) -> Iterator[Sample]:
    """Text-only conversations from the structured labels of a report (Rad-ReStruct), never from the report's text.

    Source: Rad-ReStruct, Pellegrini et al. 2023, arXiv:2307.05766 (question tree: existence, body part, attributes).
    """
    group = list(group)
    row = str(group[0].meta["row"])
    names = [re.search(r"^(.+)_(?:diseases|signs|objects)_(.+)$", p) for p in (group[0].meta.get("labels") or {}).get("radrestruct_positive") or ()]
    positive = sorted({_plain(m.group(2)) for m in names if m})
    sided = {_plain(m.group(2)) for m in names if m and m.group(1) in ("lung", "pleura")}
    base = Sample(row, group[0].patient, meta={"row": row, "split": group[0].meta.get("split")})
    listed = "Findings: " + ("; ".join(positive) if positive else "none") + "."
    pairs = [(f"{listed} {s.question}", s.answer) for s in group if s.answer in ("yes", "no") and "Is there" in s.question]
    for i, name in enumerate(positive):
        state, side = ("present", "possible")[i % 5 == 4], (None, "right", None, "left", "both")[(i + len(row)) % 5]
        side = side if name in sided else None
        pairs += list(describe(name, state, side)) + [(f"{listed} Is there {name}?", "yes")]
        pairs += list(describe(name, "absent"))[:2]
    for i, (question, answer) in enumerate(pairs):
        yield replace(base, id=f"{row}#{i}", turns=(Turn("user", question), Turn("assistant", answer)), meta={**base.meta, "kind": "text"})


def _plain(name: str) -> str:
    """MeSH's inverted headings in reading order: "catheters, indwelling" -> "indwelling catheters"."""
    head, _, tail = name.partition(", ")
    return f"{tail} {head}" if tail else head


def known(labels: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """The labels in the order of ``names``; NaN where nothing is known."""
    return [float(labels.get(n, math.nan)) for n in names]
