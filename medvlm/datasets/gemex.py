"""GEMeX-VQA: open, yes/no, single- and multiple-choice questions on chest radiographs of MIMIC-CXR, each with its reason.

``open_ended_question.jsonl``, ``closed_ended_...``, ``single_choice_...`` and ``multi_choice_question.jsonl``; the pictures are
those of MIMIC-CXR-JPG, whose ``files/`` is to lie beside them (a link will do). What is published is a sample of some 80
questions without a split, so all of it is "train". The boxes (``visual_locations``) are kept in ``meta`` as they stand and make
no regions: neither the order of their numbers nor the size of picture they count in could be verified.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..sample import Sample
from .base import Dataset
from .records import by_picture, picture, read_records, refuse, samples_of

KINDS = {"open_ended": "OPEN", "closed_ended": "CLOSED", "single_choice": "SINGLE", "multi_choice": "MULTIPLE"}
FILE = "{}_question.jsonl"
KEPT = ("reason", "visual_regions", "visual_locations", "ori_report")


def here(folder: Path) -> bool:
    return any((folder / FILE.format(k)).is_file() for k in ("single_choice", "multi_choice", "closed_ended")) and (folder / "files").is_dir()


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """The samples, picture by picture. ``meta``: type (OPEN, CLOSED, SINGLE, MULTIPLE), category (disease, finding, location ...),
    study, reason, visual_regions, visual_locations, ori_report. A multiple choice lists its choices in the question.

    Raises:
        ModelError: BAD_DATASET with the record and the field.
    """
    if split != "train":
        return
    records = []
    for kind in KINDS:
        if (folder / FILE.format(kind)).is_file():
            records += [{**r, "_kind": kind} for r in read_records(folder / FILE.format(kind), ("q_id", "image_path", "question"))]
    for name, found in by_picture(records, "image_path").items():
        file = picture(folder, found[0], "image_path", (f"files/{name.lstrip('/')}",))
        whose = re.search(r"p(?P<patient>\d+)/s(?P<study>\d+)/", name)
        row = {"id": file.stem, "modality": "xray", "split": split, "organ": "chest", **(whose.groupdict() if whose else {})}
        yield from samples_of({**row, "qa": [_question(r) for r in found]}, file, found)


def _question(record: dict[str, Any]) -> dict[str, Any]:
    kind, question, answer = record["_kind"], str(record["question"]).strip(), record.get("answer")
    choices, letters = {}, [str(a).strip().rstrip(".:") for a in (answer if isinstance(answer, list) else str(answer).split(","))]
    if kind.endswith("choice"):
        given = record.get("choices")
        lettered = [re.match(r"\s*([A-Z])\s*:\s*(.+)", str(c), re.S) for c in given] if isinstance(given, list) else []
        choices = {m[1]: m[2].strip() for m in lettered if m}
        if len(choices) < 2 or len(choices) != len(lettered):
            refuse(f"{record['_at']}: field 'choices' is no list of lettered choices")
        if not letters or not set(letters) <= choices.keys() or (kind == "single_choice" and len(letters) > 1):
            refuse(f"{record['_at']}: field 'answer' names no choice")
    elif not isinstance(answer, str) or not answer.strip():
        refuse(f"{record['_at']}: field 'answer' is {type(answer).__name__ if answer != '' else 'empty'}, expected a text")
    if kind == "multi_choice":
        question, answer = "\n".join([question, *(f"{c}: {text}" for c, text in choices.items())]), ", ".join(letters)
    elif kind == "single_choice":
        answer = choices[letters[0]]
    elif kind == "closed_ended":
        answer = answer.strip().rstrip(".")
    return {
        "qid": f"{kind}_{record['q_id']}", "question": question, "answer": answer.strip(), "type": KINDS[kind],
        **({"choices": list(choices.values())} if kind == "single_choice" else {}),
        **({"category": [str(record["type"])]} if record.get("type") else {}), **{k: record[k] for k in KEPT if k in record},
    }  # fmt: skip


DATASET = Dataset(
    here, samples, ("train",), tasks=("vqa",), questions=("*_question.jsonl",),
    licence="none stated for the questions; pictures under the PhysioNet Credentialed Health Data License",
    source="files: listing of BoKelvin/GEMeX-VQA on Hugging Face; fields, kinds of answer and paths: f10409/RadHarmony, "
           "radharmony/harmonizer/gemex_vqa.py and its guide, run on those files. Liu et al. 2025, arXiv 2411.16778",
)  # fmt: skip
