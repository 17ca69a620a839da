"""Kvasir-VQA-x1: questions of three degrees of complexity on endoscopy pictures, answered in sentences; train and test.

``Kvasir-VQA-x1-train.jsonl`` and ``-test.jsonl`` beside ``images/ID.jpg``, as the authors' README makes them; or the Parquet
files of SimulaMet/Kvasir-VQA-x1 beside those pictures, which say complexity and classes too; their folder is to be called
kvasir-vqa-x1. The official split takes a tenth of the questions, not of the pictures: a picture of test may be in train.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..sample import Sample
from .base import Dataset
from .records import by_picture, called, parquet_files, picture, read_parquet, read_records, refuse, samples_of

SPLITS = ("train", "test")
LINES = "Kvasir-VQA-x1-{}.jsonl"


def here(folder: Path) -> bool:
    return (folder / "images").is_dir() and any((folder / LINES.format(s)).is_file() or _parquet(folder, s) for s in SPLITS)


def _parquet(folder: Path, split: str) -> list[Path]:
    return parquet_files(folder, split) if called(folder, "kvasir_vqa_x1") else []


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """The samples, picture by picture. From Parquet files ``meta`` says category (the classes), complexity (1 to 3) and original too.

    Raises:
        ModelError: BAD_DATASET with the record and the field; MISSING_EXTRA for Parquet files without pyarrow.
    """
    lines = folder / LINES.format(split)
    if split not in SPLITS:
        return
    if files := _parquet(folder, split):
        records = read_parquet(files, ("img_id", "question", "answer"))
    else:
        records = [_said(r) for r in read_records(lines, ())] if lines.is_file() else []
    for number, record in enumerate(records):
        record["qid"] = f"{split}-{number}"
    for name, found in by_picture(records, "img_id").items():
        file = picture(folder, found[0], "img_id", (f"images/{name}.jpg",))
        row = {"id": name, "modality": "endoscopy", "split": split, "organ": "gastrointestinal tract"}
        yield from samples_of({**row, "qa": [_question(r) for r in found]}, file, found)


def _said(record: dict[str, Any]) -> dict[str, Any]:
    """A line as the README writes it: {"messages": [question, answer], "images": [path on the machine where it was written]}."""
    try:
        (asked, answered), (path,) = record["messages"], record["images"]
        name = re.split(r"[\\/]", path)[-1].removesuffix(".jpg")
        return {"_at": record["_at"], "img_id": name, "question": asked["content"].replace("<image>", ""), "answer": answered["content"].strip()}
    except (KeyError, TypeError, ValueError, AttributeError):
        refuse(f"{record['_at']}: fields 'messages' and 'images' are not a question, an answer and one picture")


def _question(record: dict[str, Any]) -> dict[str, Any]:
    known = {"category": record.get("question_class"), "complexity": record.get("complexity"), "original": record.get("original")}
    return {
        "qid": record["qid"], "question": str(record["question"]).strip(), "answer": str(record["answer"]).strip(),
        **{k: v for k, v in known.items() if v is not None},
    }  # fmt: skip


DATASET = Dataset(
    here, samples, SPLITS, tasks=("vqa",), questions=("*.jsonl", "*.parquet", "data/*.parquet"),
    licence="CC BY-NC 4.0",
    source="JSON lines and images/: README of simula/Kvasir-VQA-x1 and Task_1_Sample_Notebook of simula/MediaEval-Medico-2025; fields of the Parquet "
           "files: that README, evaluation/common.py and loaders of others. Gautam et al. 2025, arXiv 2506.09958",
)  # fmt: skip
