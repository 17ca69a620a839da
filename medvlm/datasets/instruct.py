"""Conversations out of labels, masks, boxes and questions: what a data set knows, as turns a model can learn.

Names are put into the toolkit's own words (``word``). Sides are the patient's. What a set says is absent becomes a
negative: a "no", an empty mask, a sentence that begins with "No".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..sample import SEG, Mask, Region, Sample, Turn
from . import sentences

WORDS = {
    "cardiomediastinum": "heart and mediastinum", "ground_glass_opacities": "ground-glass opacity",
    "monitoring_probes": "monitoring leads", "covid-19": "COVID-19 pneumonia", "ards": "ARDS", "vessel": "vessels",
    "nucleus": "nuclei",
}  # fmt: skip
MODALITY_WORDS = {"xray": "a chest X-ray", "ct": "a CT slice", "mr": "an MR slice", "fundus": "a fundus photograph",
                  "pathology": "a microscopy image"}  # fmt: skip
ANNOTATED = ("consolidation", "ground-glass opacity", "pleural effusion", "pneumothorax", "endotracheal tube",
             "nasogastric tube", "central venous line")  # fmt: skip
"""What the annotators of the chest X-ray masks outlined wherever it was: no outline there means absent."""
SIDED = ("consolidation", "ground-glass opacity", "pleural effusion", "pneumothorax")
"""Findings whose side is told."""

_ASKED = {
    "pneumothorax": r"pneumothora",
    "pleural effusion": r"pleural effusion",
    "consolidation": r"consolidation",
    "ground-glass opacity": r"ground-glass",
    "cardiomegaly": r"cardiomegaly|heart (is )?(abnormally )?(enlarged|large)|heart size abnormal",
    "endotracheal tube": r"endotracheal tube|intubated",
    "nasogastric tube": r"nasogastric|\bng tube",
    "central venous line": r"central venous line",
}
_HEALTHY = re.compile(r"\b(is|are)\b.*\b(this|the) (image|chest x-ray|film|lungs?|x ray)( study)? normal|is this a normal", re.I)
_ABNORMAL = re.compile(r"(any|there) (intraparenchymal )?abnormalit|is (this|the) (image|film) abnormal|anything abnormal", re.I)
_ONLY_A_PART = re.compile(r"\b(size|shape|aort\w*|heart|upper|lower|base|bases|ap[ei]x|hil\w+|ribs?|bones?|mediastin\w+)\b", re.I)


def word(name: str) -> str:
    """A data set's name of a finding or structure in the words of a report."""
    return WORDS.get(name, name.replace("_", " "))


def facts(row: Mapping[str, Any]) -> dict[str, float]:
    """{finding: 1 present | 0 absent} that a manifest row states: its findings, its masks, its yes/no questions."""
    if row["modality"] != "xray":
        return {}
    known = {word(k): float(v) for k, v in (row.get("findings") or {}).items() if v is not None}
    outlined = {word(name) for name in (row.get("mask") or {}).get("files", ())}
    if row.get("mask"):
        known |= {name: float(name in outlined) for name in ANNOTATED}
    tube = (row.get("labels") or {}).get("intubation_present")
    if tube in ("Y", "N"):
        known["endotracheal tube"] = float(tube == "Y")
    for qa in row.get("qa") or ():
        fact = fact_of(qa["question"], str(qa["answer"]))
        for name, value in fact.items():
            known.setdefault(name, value)
    return known


def fact_of(question: str, answer: str) -> dict[str, float]:
    """What one yes/no question about the whole image tells; {} for questions of side, degree or anything else.

    >>> fact_of("Is there a pneumothorax?", "No")
    {'pneumothorax': 0.0}
    >>> fact_of("Is the pleural effusion on the left?", "no")
    {}
    """
    yes = {"yes": 1.0, "no": 0.0}.get(answer.strip().lower())
    if yes is None or re.search(r"\b(left|right|bilateral|confined|lobe)\b", question, re.I):
        return {}
    if _HEALTHY.search(question) or _ABNORMAL.search(question):
        if _ONLY_A_PART.search(question):  # "Are the lungs normal size?" says nothing of what is in them
            return {}
        if yes == (1.0 if _HEALTHY.search(question) else 0.0):
            return dict.fromkeys((*ANNOTATED[:4], "pneumonia", "COVID-19 pneumonia"), 0.0)
        return {}
    return {name: yes for name, pattern in _ASKED.items() if re.search(pattern, question, re.I)}


def side_of(mask: np.ndarray, right: np.ndarray, left: np.ndarray, share: float = 0.15) -> str | None:
    """Side of the patient a target lies on: "both" when each lung holds at least ``share`` of what lies in the lungs.

    mask, right, left: bool arrays on one grid; right and left are the patient's lungs. None outside the lungs.
    """
    in_right, in_left = int((mask & right).sum()), int((mask & left).sum())
    total = in_right + in_left
    if total == 0:
        return None
    if min(in_right, in_left) >= share * total:
        return "both"
    return "right" if in_right > in_left else "left"


def conversations(row: Mapping[str, Any], image, masks: Sequence[Mask], targets: Sequence[str]) -> Iterator[Sample]:
    """Every short conversation that a manifest row supports about its one image.

    Args:
        image: the row's image. masks: its outlines, labelled in the data set's names.
        targets: structures a model learns to outline; those known to be absent get an empty mask.

    Each Sample has one question and one answer; an answer with ``<|seg|>`` has one Mask (exact) or Region (a box).
    """
    stated = facts(row)
    view = ((row.get("labels") or {}).get("view") or "")[:2]
    kinds = {f"modality:{row['modality']}": 1.0} | ({f"view:{view}": 1.0} if view in ("PA", "AP") else {})
    base = Sample(row["id"], row.get("patient"), {image.id: image}, labels=stated | kinds, meta={"row": row["id"], "split": row.get("split")})
    counter = iter(range(10**6))

    def turn(question: str, answer: str, kind: str, **more) -> Sample:
        meta = {**base.meta, "kind": kind, **more.pop("meta", {})}
        return replace(base, id=f"{row['id']}#{next(counter)}", turns=(Turn("user", question), Turn("assistant", answer)), meta=meta, **more)

    arrays = {word(m.label): m.array for m in masks}
    empty = np.zeros(image.shape[1:], bool)
    boxes = {word(b["label"]): b["xyxy"] for b in row.get("boxes") or ()}
    foreign = row["modality"] not in ("xray",)
    for target in targets:
        question = f"Segment the {target}."
        if target in arrays:
            yield turn(question, SEG, "segment", masks=(Mask(image.id, target, arrays[target]),))
        elif row["modality"] == "xray" and target in boxes:
            left, top, right, bottom = boxes[target]
            yield turn(question, SEG, "segment", regions=(Region(image.id, target, ((top, left), (bottom, right))),))
        elif foreign or stated.get(target) == 0.0:
            yield turn(question, SEG, "segment", masks=(Mask(image.id, target, empty),))
    for qa in () if foreign else row.get("qa") or ():
        yield turn(qa["question"], str(qa["answer"]).strip().lower(), "asked", group=qa.get("pair"), meta={"qid": str(qa["qid"])})
    for name, value in stated.items():
        if name == "normal":
            continue
        yield turn(f"Is there {name} in this chest X-ray?", "yes" if value else "no", "finding")
        side = None
        if value and name in SIDED and name in arrays and {"right lung", "left lung"} <= arrays.keys():
            side = side_of(arrays[name], arrays["right lung"], arrays["left lung"])
        yield from (turn(*d, "describe") for d in describe(name, "present" if value else "absent", side))
    kind = MODALITY_WORDS.get(row["modality"])
    if kind:
        yield turn("What kind of image is this?", kind, "modality")
        yield turn("Is this a chest X-ray?", "no" if foreign else "yes", "modality")
    if view in ("PA", "AP"):
        yield turn("Is this a PA or AP film?", view, "view")


def describe(label: str, state: str, side: str | None = None) -> Iterator[tuple[str, str]]:
    """(prompt, sentence) pairs, the plainest sentence three times as often as each other one."""
    said = sentences.variants(label, state, side)
    for sentence in (said[0], said[0], *said):
        yield sentences.prompt(label, state, side), sentence


def restructured(row: Mapping[str, Any]) -> Iterator[Sample]:
    """Text-only conversations from the structured labels of a report (Rad-ReStruct), never from the report's text.

    Source: Rad-ReStruct, Pellegrini et al. 2023, arXiv:2307.05766 (question tree: existence, body part, attributes).
    """
    names = [re.search(r"^(.+)_(?:diseases|signs|objects)_(.+)$", p) for p in (row.get("labels") or {}).get("radrestruct_positive") or ()]
    positive = sorted({_plain(m.group(2)) for m in names if m})
    sided = {_plain(m.group(2)) for m in names if m and m.group(1) in ("lung", "pleura")}
    base = Sample(row["id"], row.get("patient"), meta={"row": row["id"], "split": row.get("split")})
    listed = "Findings: " + ("; ".join(positive) if positive else "none") + "."
    asked = [(q["question"], str(q["answer"])) for q in row.get("qa") or () if str(q["answer"]) in ("yes", "no") and "Is there" in q["question"]]
    pairs = [(f"{listed} {q}", a) for q, a in asked]
    for i, name in enumerate(positive):
        state, side = ("present", "possible")[i % 5 == 4], (None, "right", None, "left", "both")[(i + len(row["id"])) % 5]
        side = side if name in sided else None
        pairs += list(describe(name, state, side)) + [(f"{listed} Is there {name}?", "yes")]
        pairs += list(describe(name, "absent"))[:2]
    for i, (question, answer) in enumerate(pairs):
        yield replace(base, id=f"{row['id']}#{i}", turns=(Turn("user", question), Turn("assistant", answer)),
                      meta={**base.meta, "kind": "text"})  # fmt: skip


def _plain(name: str) -> str:
    """MeSH's inverted headings in reading order: "catheters, indwelling" -> "indwelling catheters"."""
    head, _, tail = name.partition(", ")
    return f"{tail} {head}" if tail else head


def known(labels: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """The labels in the order of ``names``; NaN where nothing is known."""
    return [float(labels.get(n, math.nan)) for n in names]
