"""PMC-VQA: questions with four choices on figures of open-access articles; train and test.

Version 2, figures cut into single pictures: ``train_2.csv`` and ``test_2.csv`` beside ``images_2/figures/`` (or ``figures/``).
Version 1, whole figures: ``train.csv`` and ``test.csv`` beside ``images/``. Where the pictures of both lie there, version 2
is read: the two were split apart from each other, so one's train may hold the other's test.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..sample import Sample
from .base import Dataset
from .records import by_picture, picture, read_records, refuse, samples_of

SPLITS = ("train", "test")
VERSIONS = {
    2: ("{}_2.csv", "Answer", ("images_2/figures", "figures", "images_2")),
    1: ("{}.csv", "Answer_label", ("images", "images/images")),
}  # fmt: skip
"""{version: (its files, the field that names the right choice, where its pictures may lie)}."""
LETTERS = "ABCD"


def here(folder: Path) -> bool:
    return _version(folder) is not None


def _version(folder: Path) -> int | None:
    for version, (files, _, places) in VERSIONS.items():
        if any((folder / files.format(s)).is_file() for s in SPLITS) and any((folder / p).is_dir() for p in places):
            return version
    return None


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """The samples, figure by figure. ``meta``: version, article (PMC...), caption (version 2); questions of version 1 that also
    stand in ``test_clean.csv``, the part checked by hand, have the category test_clean.

    Raises:
        ModelError: BAD_DATASET with the record and the field.
    """
    version = _version(folder)
    if split not in SPLITS or version is None or not (folder / VERSIONS[version][0].format(split)).is_file():
        return
    files, right, places = VERSIONS[version]
    fields = ("Figure_path", "Question", *(f"Choice {c}" for c in LETTERS), right)
    records = read_records(folder / files.format(split), fields)
    checked = folder / "test_clean.csv"
    clean = {_key(r) for r in read_records(checked, fields)} if version == 1 and split == "test" and checked.is_file() else set()
    for number, record in enumerate(records):
        record["qid"] = f"{split}-{number}"
    for name, found in by_picture(records, "Figure_path").items():
        file = picture(folder, found[0], "Figure_path", [f"{p}/{name}" for p in places])
        row = {"id": Path(name).stem, "modality": "unknown", "split": split, "version": version, "article": name.split("_")[0]}
        yield from samples_of({**row, "qa": [_question(r, right, _key(r) in clean) for r in found]}, file, found)


def _key(record: dict[str, Any]) -> tuple[str, str]:
    return record["Figure_path"], record["Question"].strip()


def _question(record: dict[str, Any], right: str, clean: bool) -> dict[str, Any]:
    choices = {c: re.sub(rf"^\s*{c}\s*:", "", record[f"Choice {c}"]).strip() for c in LETTERS}
    answer = choices.get(record[right].strip().upper())
    if not answer:
        refuse(f"{record['_at']}: field {right!r} names no choice")
    return {
        "qid": record["qid"], "question": record["Question"].strip(), "answer": answer, "type": "SINGLE",
        "choices": [c for c in choices.values() if c],
        **({"category": ["test_clean"]} if clean else {}), **({"caption": record["Caption"]} if record.get("Caption") else {}),
    }  # fmt: skip


DATASET = Dataset(
    here, samples, SPLITS, tasks=("vqa",), questions=("*.csv",),
    licence="CC BY-SA, as its card says; the articles' pictures CC0 or CC BY",
    source="files and fields of version 1: card and file listing of xmcmic/PMC-VQA on Hugging Face, src/MedVInT_TE/dataset/dataset.py of "
           "xiaoman-zhang/PMC-VQA; of version 2, and figures/ in images_2.zip: records quoted in a finetuning sample for "
           "Phi-4-multimodal-instruct, and lmms-eval's task (tasks/medevalkit). Zhang et al. 2023, arXiv 2305.10415",
)  # fmt: skip
