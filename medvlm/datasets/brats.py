"""BraTS adult glioma (GLI) of 2023 and 2024: four MR sequences of a head on one grid, and the parts of the tumour.

Folders of cases, ``BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n.nii.gz`` with -t1c, -t2w, -t2f and -seg, either here or in folders
of which those for validation have "validation" in their name and no -seg. The last number is the visit: 0xx before an
operation (2023), 1xx after one (2024), where a resection cavity is outlined too. A part is one sample with all four images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..sample import Sample
from .base import Dataset
from .records import refuse, samples_of
from .unopened import outlined

SEQUENCES = ("t1n", "t1c", "t2w", "t2f")
"""T1, T1 after contrast, T2, FLAIR."""
BEFORE = {1: "necrotic tumor core", 2: "peritumoral edema", 3: "enhancing tumor"}
AFTER = {1: "non-enhancing tumor core", 2: "surrounding non-enhancing FLAIR hyperintensity", 3: "enhancing tumor", 4: "resection cavity"}
_CASE = re.compile(r"(BraTS-GLI-\d{5})-(\d)\d\d")


def here(folder: Path) -> bool:
    try:
        return next(_cases(folder), None) is not None
    except OSError:  # what cannot be listed is nobody's data set
        return False


def _cases(folder: Path) -> Iterator[Path]:
    """The folders of cases, in the order of their names."""
    with os.scandir(folder) as entries:
        inside = sorted(e.name for e in entries if e.is_dir())
    for name in inside:
        if _CASE.fullmatch(name):
            yield folder / name
        else:
            yield from sorted(p for p in (folder / name).iterdir() if _CASE.fullmatch(p.name))


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """One sample a part of the tumour, present or not, drawn on the first image; those of val are the bare images.

    ``meta``: modality, organ, sequences {image: t1n, t1c, t2w or t2f}, visit.

    Raises:
        ModelError: BAD_DATASET with the number of the case, in the order of their names, and the file that is missing.
    """
    seen: dict[str, str] = {}
    for number, case in enumerate(_cases(folder)):
        where = case.parent.resolve().name
        if split != ("val" if "validation" in where.lower() else "train"):
            continue
        patient, after = _CASE.fullmatch(case.name).groups()
        at = f"{where} case {number}"
        if case.name in seen:
            refuse(f"{at} has the name of {seen[case.name]}")
        seen[case.name] = at
        files = {s: case / f"{case.name}-{s}.nii.gz" for s in (*SEQUENCES, "seg")}
        for sequence in SEQUENCES if split == "val" else files:
            if not files[sequence].is_file():
                refuse(f"{at}: there is no -{sequence}.nii.gz")
        sequences = {f"mr-{n}": s for n, s in enumerate(SEQUENCES, 1)}
        row = {"id": case.name, "modality": "mr", "split": split, "patient": patient, "organ": "brain", "visit": case.name[-3:], "sequences": sequences}
        (whole,) = samples_of(row, [files[s] for s in SEQUENCES], [{"_at": at}])
        if split == "val":
            yield whole
        else:
            yield from outlined(whole, files["seg"], AFTER if after != "0" else BEFORE, at)


DATASET = Dataset(
    here, samples, ("train", "val"), tasks=("segment",), questions=("*/*-seg.nii.gz", "*/*/*-seg.nii.gz"),
    licence="of 2023 and 2024 by the terms of Synapse (syn51156910, syn53708249)",
    source="folders and files: listing of huggingface.co/datasets/obi77/brats23-first-10-examples (ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData), "
           "BrainLesion/tutorials BraTS/data, flwrlabs/fed-brats (2024); values of 2023 and 2024: the challenges' data pages as quoted in many loaders. "
           "Baid et al. 2021, arXiv 2107.02314; de Verdier et al. 2024, arXiv 2405.18368",
)  # fmt: skip
