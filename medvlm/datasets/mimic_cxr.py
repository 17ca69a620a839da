"""MIMIC-CXR: chest radiographs (MIMIC-CXR-JPG or DICOM), their reports, and the findings that two labellers read from them.

``files/p10/p10000032/s50414267/DICOM_ID.jpg`` (or ``.dcm``) and, beside ``files/``, the tables of MIMIC-CXR-JPG, packed (.gz) or
not: ``mimic-cxr-2.0.0-split.csv``, and where they are there ``-metadata``, ``-chexpert`` and ``-negbio``. Reports lie at
``files/p10/p10000032/s50414267.txt``, there or in ``mimic-cxr-reports/``. A study is one sample with all its pictures. Groups of
patients (p10 to p19) that were not downloaded are passed over.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..evaluate.labeller import sections
from ..sample import Sample
from .base import Dataset
from .chexpert import findings, viewed
from .records import in_words, picture, read_csv, refuse, samples_of, unique

SPLITS = {"train": "train", "val": "validate", "test": "test"}
LABELLERS = ("chexpert", "negbio")
"""The first that speaks of a study gives its findings."""


def here(folder: Path) -> bool:
    return (folder / "files").is_dir() and _table(folder, "split").is_file()


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """One sample a study; its answer is the findings and the impression of its report, or all of it where it has no headings.

    ``meta``: organ, sections, views {image: AP, PA, LATERAL ...}, labels {labeller: as written, blanks left out}.

    Raises:
        ModelError: BAD_DATASET with the record and the field.
    """
    if split not in SPLITS:
        return
    groups = {p.name for p in (folder / "files").iterdir()}
    wanted = [r for r in read_csv(_table(folder, "split"), ("dicom_id", "study_id", "subject_id", "split"))
              if r["split"] == SPLITS[split] and f"p{r['subject_id'][:2]}" in groups]  # fmt: skip
    unique(wanted, "dicom_id")
    studies: dict[str, list[dict[str, Any]]] = {}
    for r in wanted:
        studies.setdefault(r["study_id"], []).append(r)
    shown = {r["dicom_id"]: r["ViewPosition"] for r in _rows(folder, "metadata", ("dicom_id", "ViewPosition"))}
    labelled = {name: _labels(folder, name, studies) for name in LABELLERS}
    for study, found in studies.items():
        subject = found[0]["subject_id"]
        place = f"files/p{subject[:2]}/p{subject}/s{study}"
        files = [picture(folder, r, "dicom_id", [f"{place}/{r['dicom_id']}{ending}" for ending in (".jpg", ".dcm")]) for r in found]
        views = {f"xray-{n}": view for n, r in enumerate(found, 1) if (view := shown.get(r["dicom_id"]))}
        said = {name: of[study] for name, of in labelled.items() if study in of}
        row = {"id": f"s{study}", "modality": "xray", "split": split, "patient": f"p{subject}", "organ": "chest", "views": views,
               **_report(folder, place, found[0]), "findings": next((known for known, _ in said.values()), {}),
               "labels": {name: written for name, (_, written) in said.items()}}  # fmt: skip
        yield from viewed(samples_of(row, files, found), views)


def _report(folder: Path, place: str, record: Mapping[str, str]) -> dict[str, Any]:
    """The text and sections of a row, {} where there are no reports."""
    apart = folder / "mimic-cxr-reports"
    file = next((f for f in (folder / f"{place}.txt", apart / f"{place}.txt") if f.is_file()), None)
    if file is None:
        if apart.is_dir():
            refuse(f"{record['_at']}: the report of field 'study_id' is not in the folder")
        return {}
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        refuse(f"{record['_at']}: its report cannot be read as UTF-8")
    parts = {name: " ".join(part.split()) for name, part in sections(text).items() if name}
    return {"text": in_words(parts) or " ".join(text.split()), "sections": parts}


def _table(folder: Path, name: str) -> Path:
    packed = folder / f"mimic-cxr-2.0.0-{name}.csv.gz"
    return packed if packed.is_file() else packed.with_suffix("")


def _rows(folder: Path, name: str, needed: tuple[str, ...]) -> Iterator[dict[str, str]]:
    table = _table(folder, name)
    yield from read_csv(table, needed) if table.is_file() else ()


def _labels(folder: Path, name: str, studies: Container[str]) -> dict[str, tuple[dict[str, int | None], dict[str, str]]]:
    """{study: its findings and what was written} of the studies that a labeller speaks of."""
    about = {"subject_id", "study_id", "_at"}
    return {r["study_id"]: findings(r, [c for c in r if c not in about]) for r in _rows(folder, name, ("study_id",)) if r["study_id"] in studies}


DATASET = Dataset(
    here, samples, ("train", "val", "test"), questions=("mimic-cxr-2.0.0-*.csv", "mimic-cxr-2.0.0-*.csv.gz"),
    licence="PhysioNet Credentialed Health Data License 1.5.0 (physionet.org/content/mimic-cxr-jpg)",
    source="files/, tables and splits: physionet.org/content/mimic-cxr-jpg 2.1.0 and mimic.mit.edu/docs/iv/modules/cxr; columns: mlmed/torchxrayvision "
           "tests/gen_mimic.py; mimic-cxr-reports/files/p10/...: loaders of others. Johnson et al. 2019, arXiv 1901.07042",
)  # fmt: skip
