"""VQA-RAD: questions that clinicians asked of radiographs, CT and MR of head, chest and abdomen; train and test.

The official split is by question: the images of test are also in train, with other questions (all 159 that were checked),
so scores on it say nothing of new images; those of a manifest that is split by case do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..sample import Sample
from .base import Dataset
from .records import by_picture, picture, read_records, samples_of, unique

FILES = ("VQA_RAD Dataset Public.json", "VQA_RAD_Dataset_Public.json")
FOLDERS = ("VQA_RAD Image Folder", "VQA_RAD_Image_Folder", "VQA_RAD Image Folder/VQA_RAD Image Folder")
ORGANS = {"HEAD": ("head", "ct_or_mr"), "CHEST": ("chest", "xray"), "ABD": ("abdomen", "ct")}
"""{image_organ: (organ, modality)}: chest images are radiographs, abdominal ones axial CT, heads CT or MR.
Source: Lau et al. 2018, Scientific Data 5:180251."""


def here(folder: Path) -> bool:
    return any((folder / f).is_file() for f in FILES) and any((folder / f).is_dir() for f in FOLDERS)


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """The samples, image by image. ``meta``: organ, type, category (a list), phrase_type, linked_id, relation.

    Raises:
        ModelError: BAD_DATASET with the record and the field.
    """
    file = next((folder / f for f in FILES if (folder / f).is_file()), folder / FILES[0])
    records = read_records(file, ("qid", "phrase_type", "image_name", "image_organ", "question", "answer", "answer_type", "question_type"))
    unique(records, "qid")
    wanted = [r for r in records if str(r["phrase_type"]).startswith("test_") == (split == "test")] if split in ("train", "test") else []
    for name, found in by_picture(wanted, "image_name").items():
        place = picture(folder, found[0], "image_name", [f"{f}/{name}" for f in FOLDERS])
        organ, modality = ORGANS.get(str(found[0]["image_organ"]).strip(), (None, "unknown"))
        case = str(found[0].get("image_case_url") or "").partition("?id=")[2]
        known = {k: v for k, v in (("patient", case), ("organ", organ)) if v}
        row = {"id": Path(name).stem, "modality": modality, "split": split, **known}
        yield from samples_of({**row, "qa": [_question(r) for r in found]}, place, found)


def _question(record: dict[str, Any]) -> dict[str, Any]:
    linked = {"linked_id": record.get("qid_linked_id"), "relation": record.get("question_relation")}
    return {
        "qid": str(record["qid"]), "question": str(record["question"]).strip(), "answer": str(record["answer"]).strip(),
        "type": str(record["answer_type"]).strip().upper(), "category": [c.strip() for c in str(record["question_type"]).split(",") if c.strip()],
        "phrase_type": str(record["phrase_type"]).removeprefix("test_"),
        **{k: v for k, v in linked.items() if v and v != "NULL"},
    }  # fmt: skip


DATASET = Dataset(
    here, samples, ("train", "test"), tasks=("vqa",),
    licence="CC0 1.0 (osf.io/89kps); images from MedPix",
    source="files and fields as in the OSF publication 89kps, read through radharmony's VQA-RAD guide (trailing blanks in answer_type, whole numbers "
           "as answers) and loaders that list the columns of `VQA_RAD Dataset Public.json`. Lau et al. 2018, Scientific Data 5:180251",
)  # fmt: skip
