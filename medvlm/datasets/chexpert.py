"""CheXpert: chest radiographs with 14 findings that a labeller read from reports (train) or radiologists gave (val).

``train.csv`` and ``valid.csv`` beside ``train/`` and ``valid/``; a record is a picture, its Path begins with the name that the
folder was published under. A study is one sample with all its pictures: its labels are those of its report. A finding is
1, 0 or unknown; uncertain (-1) and not mentioned (blank) are both unknown, and ``meta["labels"]`` keeps what was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..evaluate.labeller import FINDINGS
from ..sample import Sample
from .base import Dataset
from .records import picture, read_csv, refuse, samples_of, unique

FILES = {"train": "train.csv", "val": "valid.csv"}
VALUES = {"1.0": 1, "1": 1, "0.0": 0, "0": 0, "-1.0": None, "-1": None, "": None}


def here(folder: Path) -> bool:
    return all((folder / f).is_file() for f in FILES.values()) and any((folder / d).is_dir() and _patients(folder / d) for d in ("train", "valid"))


def _patients(folder: Path) -> bool:
    return any(p.name.startswith("patient") for p in folder.iterdir())


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """One sample a study. ``meta``: organ, views {image: AP, PA, LATERAL ...}, sex, age, labels (as written, blanks left out).

    Raises:
        ModelError: BAD_DATASET with the record and the field; also where the pictures of one study have different labels.
    """
    if split not in FILES or not (folder / FILES[split]).is_file():
        return
    studies: dict[str, list[dict[str, Any]]] = {}
    records = list(read_csv(folder / FILES[split], ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS)))
    unique(records, "Path")
    for r in records:
        parts = Path(r["Path"]).parts
        if len(parts) != 5:
            refuse(f"{r['_at']}: field 'Path' is not SET/SPLIT/PATIENT/STUDY/PICTURE")
        studies.setdefault("/".join(parts[2:4]), []).append(r)
    for study, found in studies.items():
        known, written = findings(found[0])
        for r in found[1:]:
            if findings(r)[1] != written:
                refuse(f"{r['_at']} and {found[0]['_at']} are of one study and have different labels")
        files = [picture(folder, r, "Path", ("/".join(Path(r["Path"]).parts[1:]),)) for r in found]
        shown = ("LATERAL" if r["Frontal/Lateral"] == "Lateral" else r["AP/PA"] for r in found)
        views = {f"xray-{n}": view for n, view in enumerate(shown, 1) if view}
        row = {"id": study, "modality": "xray", "split": split, "patient": study.partition("/")[0], "organ": "chest", "sex": found[0]["Sex"],
               "age": found[0]["Age"], "views": views, "findings": known, "labels": written}  # fmt: skip
        yield from viewed(samples_of(row, files, found), views)


def findings(record: Mapping[str, str], names: Iterable[str] = FINDINGS) -> tuple[dict[str, int | None], dict[str, str]]:
    """({finding: 1, 0 or None}, what was written where the field is not blank).

    Raises:
        ModelError: BAD_DATASET with the record and the field.
    """
    written = {n: record[n].strip() for n in names}
    for name, value in written.items():
        if value not in VALUES:
            refuse(f"{record['_at']}: field {name!r} is none of 1, 0, -1 and blank")
    return {n: VALUES[v] for n, v in written.items()}, {n: v for n, v in written.items() if v}


def viewed(found: Iterable[Sample], views: Mapping[str, str]) -> Iterator[Sample]:
    """The samples, the views of their images said where a DICOM file says it."""
    for sample in found:
        for id, view in views.items():
            sample.images[id].info["view"] = view
        yield sample


DATASET = Dataset(
    here, samples, ("train", "val"), questions=("*.csv",),
    licence="Stanford University Dataset Research Use Agreement (stanfordmlgroup.github.io/competitions/chexpert)",
    source="columns, values and paths: rows of train.csv as huggingface.co/datasets/danjacobellis/chexpert republishes them, and mlmed/torchxrayvision "
           "tests/gen_chexpert.py; -1 uncertain, blank not mentioned: Irvin et al. 2019, arXiv 1901.07031",
)  # fmt: skip
