"""M3D-RefSeg, of M3D-Data: questions about lesions in CT whose answers point at a region; train and test.

``M3D_RefSeg_train.csv`` and ``M3D_RefSeg_test.csv`` beside ``M3D_RefSeg/`` (unpacked) with ``s0139/ct.nii.gz`` and ``mask.nii.gz``; a record
is a question, its answer with [SEG], and the number of the region in the mask. Whether a volume of test is in train too is
not said. The other parts of M3D-Data come as slices or arrays without spacing or orientation, and are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..sample import SEG, Sample
from .base import Dataset
from .records import picture, read_csv, refuse, samples_of
from .unopened import outline

FILES = {"train": "M3D_RefSeg_train.csv", "test": "M3D_RefSeg_test.csv"}
KINDS = {"0": "description", "1": "reasoning"}
"""{Question_Type: what it asks by}."""
_SEG = re.compile(r"\[SEG\]|<SEG>")


def here(folder: Path) -> bool:
    return all((folder / f).is_file() for f in FILES.values())


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """One sample a question, case by case; each mark in its answer means the one region. ``meta``: organ, type, category, region.

    Raises:
        ModelError: BAD_DATASET with the record and the field.
    """
    if split not in FILES:
        return
    cases: dict[str, list[dict[str, str]]] = {}
    for r in read_csv(folder / FILES[split], ("Image", "Mask", "Mask_ID", "Question_Type", "Question", "Answer")):
        for field, fits in (("Mask_ID", r["Mask_ID"].isdecimal() and int(r["Mask_ID"]) > 0), ("Question_Type", r["Question_Type"] in KINDS)):
            if not fits:
                refuse(f"{r['_at']}: field {field!r} is none that M3D-RefSeg has")
        cases.setdefault(r["Image"], []).append(r)
    for image, found in cases.items():
        scan, *masks = (picture(folder, r, f, (r[f], f"M3D_RefSeg/{r[f]}")) for r, f in [(found[0], "Image"), *((r, "Mask") for r in found)])
        row = {"id": Path(image).parent.name, "modality": "ct", "split": split, "qa": [_question(split, r) for r in found]}
        for sample, r, mask in zip(samples_of(row, [scan], found), found, masks):
            (volume,) = sample.images.values()
            region = outline(volume, mask, int(r["Mask_ID"]), sample.question, r["_at"])
            yield replace(sample, masks=(region,) * max(1, sample.answer.count(SEG)))


def _question(split: str, record: dict[str, str]) -> dict:
    return {
        "qid": f"{split} {record['_at'].rpartition(' ')[2]}", "question": record["Question"].strip(), "answer": _SEG.sub(SEG, record["Answer"]).strip(),
        "type": "OPEN", "category": [KINDS[record["Question_Type"]]], "region": int(record["Mask_ID"]),
    }  # fmt: skip


DATASET = Dataset(
    here, samples, ("train", "test"), questions=("*.csv", "*/mask.nii.gz", "*/*/mask.nii.gz"),
    licence="Apache 2.0 (huggingface.co/datasets/GoodBaiBai88/M3D-RefSeg); volumes of TotalSegmentator, CC BY 4.0",
    source="files, columns and rows: listing and M3D_RefSeg_test.csv of huggingface.co/datasets/GoodBaiBai88/M3D-RefSeg; what they mean: BAAI-DCAI/M3D "
           "LaMed/src/dataset/multi_dataset.py (RefSegDataset), Data/process/m3d_refseg_data_prepare.py and _generation.py. Bai et al. 2024, arXiv 2404.00578",
)  # fmt: skip
