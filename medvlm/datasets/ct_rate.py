"""CT-RATE: chest CT with reports and 18 abnormalities that a classifier read from them; train and val.

``dataset/`` holds ``train_fixed/train_1/train_1_a/train_1_a_1.nii.gz`` and ``valid_fixed/...`` (patient, scan, reconstruction),
``radiology_text_reports/``, ``multi_abnormality_labels/`` and ``metadata/``. The older ``train/`` and ``valid/`` are not read: their
headers say neither where a volume lies nor how its values become HU. A volume is one sample; patients that were not
downloaded are passed over, and so are the volumes that the authors list as not of the chest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..sample import Sample
from .base import Dataset
from .chexpert import findings
from .mimic_cxr import in_words
from .records import picture, read_csv, refuse, samples_of

FOLDERS = {"train": "train_fixed", "val": "valid_fixed"}
TABLES = {
    "train": ("train_reports.csv", "train_predicted_labels.csv", "train_metadata.csv", "no_chest_train.txt"),
    "val": ("validation_reports.csv", "valid_predicted_labels.csv", "validation_metadata.csv", "no_chest_valid.txt"),
}
SECTIONS = {"ClinicalInformation_EN": "clinical information", "Technique_EN": "technique", "Findings_EN": "findings", "Impressions_EN": "impression"}
ABOUT = {"PatientSex": "sex", "PatientAge": "age", "Manufacturer": "scanner"}


def here(folder: Path) -> bool:
    base = _base(folder)
    return (base / "radiology_text_reports").is_dir() and any((base / f).is_dir() for f in FOLDERS.values())


def _base(folder: Path) -> Path:
    return folder / "dataset" if (folder / "dataset").is_dir() else folder


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """One sample a volume, in the order of the reports. ``meta``: organ, scan, sections, sex, age, scanner where they are known.

    Raises:
        ModelError: BAD_DATASET with the record and the field; also for a volume without labels.
    """
    base = _base(folder)
    if split not in FOLDERS or not (base / FOLDERS[split]).is_dir():
        return
    reports, labels, metadata, elsewhere = TABLES[split]
    patients = {p.name for p in (base / FOLDERS[split]).iterdir()}
    labelled = {r["VolumeName"]: r for r in read_csv(base / "multi_abnormality_labels" / labels, ("VolumeName",)) if _patient(r) in patients}
    about = base / "metadata" / metadata
    told = {r["VolumeName"]: r for r in read_csv(about, ("VolumeName",)) if _patient(r) in patients} if about.is_file() else {}
    left = base / "metadata" / elsewhere
    no_chest = {line.strip().rpartition("/")[2] for line in left.read_text(encoding="utf-8").splitlines()} if left.is_file() else set()
    seen: set[str] = set()
    for r in read_csv(base / "radiology_text_reports" / reports, ("VolumeName", "Findings_EN", "Impressions_EN")):
        volume = r["VolumeName"]
        if _patient(r) not in patients or volume in no_chest:
            continue
        if volume in seen:
            refuse(f"{r['_at']}: field 'VolumeName' is that of a record before it")
        if volume not in labelled:
            refuse(f"{r['_at']}: field 'VolumeName' is not in {labels}")
        seen.add(volume)
        name = volume.removesuffix(".nii.gz")
        scan = name.rpartition("_")[0]
        file = picture(base, r, "VolumeName", (f"{FOLDERS[split]}/{_patient(r)}/{scan}/{name}.nii.gz",))
        parts = {section: said for column, section in SECTIONS.items() if (said := " ".join(r.get(column, "").split())) not in ("", "Not given.")}
        of = labelled[volume]
        row = {"id": name, "modality": "ct", "split": split, "patient": _patient(r), "organ": "chest", "scan": scan, "text": in_words(parts), "sections": parts,
               "findings": findings(of, [c for c in of if c not in ("VolumeName", "_at")])[0],
               **{key: said for column, key in ABOUT.items() if (said := told.get(volume, {}).get(column, ""))}}  # fmt: skip
        yield from samples_of(row, [file], [r])


def _patient(record: dict[str, str]) -> str:
    """"train_1" of train_1_a_1.nii.gz: split_patient_scan_reconstruction."""
    return "_".join(record["VolumeName"].split("_")[:2])


DATASET = Dataset(
    here, samples, ("train", "val"),
    questions=tuple(f"{base}{table}/*.csv" for base in ("", "dataset/") for table in ("radiology_text_reports", "multi_abnormality_labels")),
    licence="CC BY-NC-SA 4.0 (huggingface.co/datasets/ibrahimhamamci/CT-RATE)",
    source="names, reports, labels: ibrahimethemhamamci/CT-CLIP README.md and scripts/data_inference_nii.py; _fixed: discussions 58 and 59 of the data set and "
           "its download scripts; metadata columns and no_chest lists: scripts of others that read them. Hamamci et al. 2024, arXiv 2403.17834",
)  # fmt: skip
