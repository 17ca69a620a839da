"""IU X-ray (Open-i): chest radiographs of 3,996 examinations of Indiana University with their reports, one a patient.

``ecgen-radiology/N.xml`` (NLMCXR_reports.tgz) beside the pictures (NLMCXR_png.tgz) in ``NLMCXR_png/`` or ``images/``. There is no
official split: all of it is "train", and whoever scores on it says ``--split train`` or makes a manifest with a split.
Examinations without a picture are left out. "XXXX" in a report is the authors' de-identification.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..sample import Sample
from .base import Dataset
from .records import HINT, in_words, picture, refuse, samples_of

REPORTS = ("ecgen-radiology", "NLMCXR_reports/ecgen-radiology", "reports/ecgen-radiology")
MESH = {"mesh_major": ".//MeSH/major", "mesh_auto": ".//MeSH/automatic"}
PICTURES = ("NLMCXR_png", "images", "images/NLMCXR_png")


def here(folder: Path) -> bool:
    return any((folder / r).is_dir() for r in REPORTS) and any((folder / p).is_dir() for p in PICTURES)


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """One sample an examination: all its pictures, and findings and impression as its report. ``meta``: sections, labels
    ({"mesh_major": by hand, "mesh_auto": by machine}), exam ("Xray Chest PA and Lateral"; which picture is which is not said).

    Raises:
        ModelError: BAD_DATASET with the file and what is wrong with it.
    """
    if split != "train":
        return
    reports = next((folder / r for r in REPORTS if (folder / r).is_dir()), folder)
    for file in sorted(reports.glob("*.xml"), key=lambda f: (len(f.stem), f.stem)):
        record, names = _report(file)
        if names:
            pictures = [picture(folder, record, "parentImage", [f"{p}/{n}.png" for p in PICTURES]) for n in names]
            row = {"id": record["uid"], "patient": record["uid"], "modality": "xray", "organ": "chest", "split": split}
            yield from samples_of({**row, **record["said"]}, pictures, [record])


def _report(file: Path) -> tuple[dict[str, Any], list[str]]:
    """(what an examination's file says, the names of its pictures)."""
    at = f"{file.parent.name}/{file.name}"
    try:
        raw = file.read_bytes()
        if re.search(rb"<!(DOCTYPE|ENTITY)", raw):  # entities can be made to grow without end
            refuse(f"{at} declares entities, which reports do not need")
        root = ElementTree.fromstring(raw)
    except OSError as error:
        raise ModelError(f"{at} cannot be read", "BAD_DATASET", HINT) from error
    except ElementTree.ParseError as error:
        raise ModelError(f"{at} is not XML", "BAD_DATASET", HINT) from error
    uid = root.find("uId")
    if uid is None or not uid.get("id"):
        refuse(f"{at}: field 'uId' is missing")
    sections: dict[str, str] = {}
    for part in root.iter("AbstractText"):
        name, text = (part.get("Label") or "").strip().lower(), "".join(part.itertext()).strip()
        if name and text:
            sections[name] = f"{sections[name]} {text}" if name in sections else text
    text = in_words(sections)
    labels = {key: [m.text.strip() for m in root.iterfind(path) if m.text] for key, path in MESH.items()}
    images = list(root.iter("parentImage"))
    exam = next((c.strip() for i in images if (c := i.findtext("caption"))), None)
    said = {"text": text, "sections": sections, "labels": labels, **({"exam": exam} if exam else {})}
    return {"_at": at, "uid": uid.get("id"), "said": said}, [i.get("id") or "" for i in images]


DATASET = Dataset(
    here, samples, ("train",), tasks=("report",), questions=tuple(f"{r}/*.xml" for r in REPORTS),
    licence="CC BY-NC-ND 4.0, stated in each report",
    source="Open-i's own files as f10409/RadHarmony, radharmony/harmonizer/openi_cxr.py and several other loaders read them; reports of "
           "chaotiquetaurus/Open-i_chestxray_multimodal, data/labeling/NLMCXR_reports. Demner-Fushman et al. 2016, JAMIA 23(2):304",
)  # fmt: skip
