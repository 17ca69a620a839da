"""AMOS22: abdominal CT and MR with 15 organs outlined; train and val, and test without outlines.

``dataset.json`` beside ``imagesTr``, ``labelsTr``, ``imagesVa``, ``labelsVa`` and ``imagesTs``, each with ``amos_0001.nii.gz``; one label map
a volume. An organ is one sample; a volume without outlines is one too. Nothing tells which volumes are of one patient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..sample import Sample
from .base import Dataset
from .records import refuse, samples_of
from .unopened import outlined

FOLDERS = {"train": ("imagesTr", "labelsTr"), "val": ("imagesVa", "labelsVa"), "test": ("imagesTs", "labelsTs")}
ORGANS = {
    1: "spleen", 2: "right kidney", 3: "left kidney", 4: "gallbladder", 5: "esophagus", 6: "liver", 7: "stomach", 8: "aorta",
    9: "inferior vena cava", 10: "pancreas", 11: "right adrenal gland", 12: "left adrenal gland", 13: "duodenum",
    14: "urinary bladder", 15: "prostate or uterus",
}  # fmt: skip
"""{value: organ}. dataset.json writes 4, 8, 9, 14 and 15 as gall bladder, arota, postcava, bladder and prostate/uterus."""
_NAME = re.compile(r"amos_(\d{4})\.nii\.gz")


def here(folder: Path) -> bool:
    images = folder / FOLDERS["train"][0]
    return (folder / "dataset.json").is_file() and images.is_dir() and any(_NAME.fullmatch(p.name) for p in images.iterdir())


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """One sample an outlined organ, present or not. ``meta``: modality, organ.

    Raises:
        ModelError: BAD_DATASET with the number of the file, in the order of their names.
    """
    if split not in FOLDERS or not (folder / FOLDERS[split][0]).is_dir():
        return
    images, labels = (folder / f for f in FOLDERS[split])
    files = sorted(p for p in images.iterdir() if p.name.endswith(".nii.gz") and not p.name.startswith("."))
    for number, file in enumerate(files):
        at = f"{images.name} file {number}"
        found = _NAME.fullmatch(file.name)
        if not found:
            refuse(f"{at}: its name is not amos_NUMBER.nii.gz")
        id = int(found[1])
        row = {"id": f"amos_{found[1]}", "modality": "ct" if id < 500 else "mr" if id > 500 else "ct_or_mr", "split": split, "organ": "abdomen"}
        (whole,) = samples_of(row, [file], [{"_at": at}])
        drawn = labels / file.name
        if split == "test" and not labels.is_dir():
            yield whole
        elif not drawn.is_file():
            refuse(f"{at}: {labels.name} holds no label map of that name")
        else:
            yield from outlined(whole, drawn, ORGANS, at)


DATASET = Dataset(
    here, samples, ("train", "val", "test"), tasks=("segment",), questions=("labels*/*.nii.gz",),
    licence="CC BY 4.0 (zenodo.org/record/7262581)",
    source="folders, and CT below number 500, MR above: readme.md of amos22.zip as republished in huggingface.co/datasets/onkarsus13/AllMedicalCombine; values: "
           "MIC-DKFZ/nnUNet nnunetv2/dataset_conversion/Dataset218_Amos2022_task1.py and copies of dataset.json. Ji et al. 2022, arXiv 2206.08023",
)  # fmt: skip
