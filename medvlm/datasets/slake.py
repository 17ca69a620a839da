"""SLAKE: questions in English and Chinese on CT, MR and chest radiographs, with boxes of organs and diseases; train, val and test.

``train.json``, ``validate.json`` and ``test.json`` beside ``imgs/xmlabN/`` with ``source.jpg``, ``detection.json`` and
``mask.png``. The boxes become regions; masks are not read, as the numbers in them are named in a file of another layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..sample import Sample
from .base import Dataset
from .records import by_picture, picture, read_records, refuse, samples_of, unique

FILES = {"train": "train.json", "val": "validate.json", "test": "test.json"}
MODALITIES = {"ct": "ct", "mri": "mr", "x-ray": "xray"}


def here(folder: Path) -> bool:
    return (folder / "test.json").is_file() and (folder / "imgs").is_dir()


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """The samples, image by image. ``meta``: lang ("en" or "zh"), organ, type, category, base_type, triple.

    Raises:
        ModelError: BAD_DATASET with the record and the field.
    """
    if split not in FILES or not (folder / FILES[split]).is_file():
        return
    fields = ("qid", "img_name", "question", "answer", "q_lang", "modality", "location", "answer_type", "content_type")
    records = read_records(folder / FILES[split], fields)
    unique(records, "qid")
    for name, found in by_picture(records, "img_name").items():
        place = picture(folder, found[0], "img_name", (f"imgs/{name}",))
        modality = MODALITIES.get(str(found[0]["modality"]).strip().lower(), "unknown")
        organ = str(found[0]["location"]).strip().replace("_", " ").lower()
        boxes = _boxes(place.with_name("detection.json"), found[0])
        row = {"id": Path(name).parent.name, "modality": modality, "split": split, "organ": organ, "boxes": boxes}
        yield from samples_of({**row, "qa": [_question(r) for r in found]}, place, found)


def _question(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "qid": str(record["qid"]), "question": str(record["question"]).strip(), "answer": str(record["answer"]).strip(),
        "type": str(record["answer_type"]).strip().upper(), "category": [str(record["content_type"]).strip()], "lang": str(record["q_lang"]).strip(),
        **{k: record[k] for k in ("base_type", "triple") if k in record},
    }  # fmt: skip


def _boxes(file: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The boxes of a picture: a list of {name: [left, top, width, height]}, as pixels."""
    if not file.is_file():
        return []
    try:
        found = [pair for entry in json.loads(file.read_text(encoding="utf-8")) for pair in entry.items()]
    except (OSError, ValueError, TypeError, AttributeError):
        refuse(f"{record['_at']}: the detection.json of its picture is no list of named boxes")
    boxes = []
    for label, box in found:
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) and math.isfinite(x) for x in box) or min(box[2:]) < 0:
            refuse(f"{record['_at']}: a box in the detection.json of its picture is not [left, top, width, height]")
        left, top, width, height = box
        boxes.append({"label": label, "xyxy": [left, top, left + width, top + height]})
    return boxes


DATASET = Dataset(
    here, samples, ("train", "val", "test"), tasks=("vqa",),
    licence="CC BY 4.0, as its authors publish it (med-vqa.com/slake)",
    source="keys and splits: records of BoKelvin/SLAKE as quoted in several loaders and in xiaoman-zhang/PMC-VQA Slake1.0; folders and "
           "detection.json: Voxel51's dataset card of SLAKE and a benchmark builder that reads it. Liu et al. 2021, arXiv 2102.09542",
)  # fmt: skip
