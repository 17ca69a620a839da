"""ROCO: radiology figures of open-access articles with their captions and UMLS concepts; train, val and test.

Version 2 (ROCOv2, on Zenodo): ``train_captions.csv``, ``train_concepts.csv`` and ``train_concepts_manual.csv`` beside
``train/ROCOv2_2023_train_000001.jpg``; valid and test likewise. Version 1: ``data/train/radiology/captions.txt`` and ``cuis.txt``
beside the ``images/`` that the authors' ``scripts/fetch.py`` gets from PubMed Central; validation and test likewise. Figures that
are no radiology (``non-radiology``) are not read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..sample import Sample
from .base import Dataset
from .records import HINT, picture, read_records, refuse, samples_of, unique

NAMES = {"train": ("train", "train"), "val": ("validation", "valid"), "test": ("test", "test")}
"""{split: what version 1 and version 2 call it}."""
MODALITIES = {
    "C0040405": "ct", "C0024485": "mr", "C0041618": "ultrasound", "C1306645": "xray", "C0002978": "xray", "C0032743": "pet", "C1699633": "pet",
    "C0920367": "oct",
}  # fmt: skip
"""{UMLS concept that version 2 gives a figure by hand: the modality}; angiograms (C0002978) are X-rays, PET/CT (C1699633) is PET.
Source: Rückert et al. 2024, arXiv 2405.10004; cui_mapping.csv."""
ORGANS = {
    "C0817096": "chest", "C0037303": "head", "C0037949": "spine", "C1140618": "upper extremity", "C0023216": "lower extremity", "C0030797": "pelvis",
    "C0000726": "abdomen", "C0006141": "breast",
}  # fmt: skip
"""The same for the region, which only X-rays have."""


def here(folder: Path) -> bool:
    return any(_captions(folder, s).is_file() for s in NAMES)


def _captions(folder: Path, split: str) -> Path:
    """The file of captions of the version that lies in the folder."""
    first, second = NAMES[split]
    file = folder / f"{second}_captions.csv"
    return file if file.is_file() else folder / "data" / first / "radiology" / "captions.txt"


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """One sample a figure, its caption the text. ``meta``: concepts (CUIs); version 2 tells modality, and organ of X-rays.

    PubMed Central no longer has every figure of version 1. Those that were not fetched are left out, with a warning that counts them.

    Raises:
        ModelError: BAD_DATASET with the record and the field, or when no figure at all was fetched.
    """
    if split not in NAMES or not (file := _captions(folder, split)).is_file():
        return
    yield from _second(file, split) if file.suffix == ".csv" else _first(file, split)


def _second(file: Path, split: str) -> Iterator[Sample]:
    name = NAMES[split][1]
    records = read_records(file, ("ID", "Caption"))
    unique(records, "ID")
    concepts, manual = (_concepts(file.with_name(f"{name}_concepts{which}.csv")) for which in ("", "_manual"))
    for record in records:
        place = picture(file.parent, record, "ID", [f"{p}/{record['ID']}.jpg" for p in (name, f"{name}_images", f"{name}_images/{name}")])
        given = manual.get(record["ID"], [])
        modality, organ = (next((table[c] for c in given if c in table), None) for table in (MODALITIES, ORGANS))
        row = {"id": record["ID"], "modality": modality or "unknown", "split": split, "text": record["Caption"].strip()}
        about = {"concepts": concepts.get(record["ID"], given), **({"organ": organ} if organ else {})}
        yield from samples_of({**row, **about}, place, [record])


def _concepts(file: Path) -> dict[str, list[str]]:
    """{figure: its concepts}; {} where the file was not fetched."""
    return {r["ID"]: r["CUIs"].split(";") for r in read_records(file, ("ID", "CUIs")) if r["CUIs"]} if file.is_file() else {}


def _first(file: Path, split: str) -> Iterator[Sample]:
    records = _lines(file)
    unique(records, "id")
    there = [r for r in records if (file.parent / "images" / f"{r['id']}.jpg").is_file()]
    if not there:
        refuse(f"{file.parent.name}/images of {file.parents[1].name} holds no figure of {file.name}")
    if left := len(records) - len(there):
        warnings.warn(f"LEFT_OUT: {left} of {len(records)} captions of ROCO's split {split}: their figures were not fetched", stacklevel=3)
    cuis = file.with_name("cuis.txt")
    concepts = {r["id"]: r["text"].split() for r in _lines(cuis)} if cuis.is_file() else {}
    for record in there:
        place = picture(file.parent, record, "id", [f"images/{record['id']}.jpg"])
        row = {"id": record["id"], "modality": "unknown", "split": split, "text": record["text"], "concepts": concepts.get(record["id"], [])}
        yield from samples_of(row, place, [record])


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of version 1: a figure, a tab, what is said of it."""
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:
            found = [line.strip("\r\n").partition("\t") for line in lines if line.strip()]
    except OSError as error:
        raise ModelError(f"{file.name} cannot be read", "BAD_DATASET", HINT) from error
    except UnicodeError as error:
        raise ModelError(f"{file.name} is not a text in UTF-8", "BAD_DATASET", HINT) from error
    for number, (name, tab, _) in enumerate(found):
        if not name or not tab:
            refuse(f"{file.name} record {number} is not a figure, a tab and a text")
    return [{"_at": f"{file.name} record {n}", "id": name, "text": text.strip()} for n, (name, _, text) in enumerate(found)]


DATASET = Dataset(
    here, samples, ("train", "val", "test"), tasks=("retrieve",), questions=("*.csv", "data/*/radiology/*.txt"),
    licence="version 1: none stated, each figure under its article's licence (licences.txt); version 2: CC BY-NC-SA 4.0 as its copies say, "
            "figures CC BY or CC BY-NC",
    source="version 1: README, scripts/fetch.py, captions.txt and cuis.txt of razorx89/roco-dataset; version 2: the release unpacked in "
           "sctg-development/ROCOv2-radiology, source_dataset (captions, concepts, pictures). Pelka et al. 2018, LABELS; Rückert et al. 2024, "
           "arXiv 2405.10004",
)  # fmt: skip
