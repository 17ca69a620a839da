"""ProbMed: yes/no questions on X-ray, CT and MR, most with an adversarial twin; test split only.

``test.json`` holds one flat list, the records of an image one after another; the pictures lie in ``probmed/``. A pair is
the ``gt`` question and the ``hallu`` question of one image and kind, and for conditions and positions of one number;
``abnormality`` and a bare ``entity_hallu`` (asked of normal images) stand alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from ..sample import Sample
from .base import Dataset
from .records import picture, read_records, refuse, samples_of, unique

CATEGORIES = {"modality": "modality", "body_part": "organ", "abnormality": "abnormality", "entity": "condition", "grounding": "position"}
"""{kind in ``qa_type``: the name the paper gives it}."""
_TYPE = re.compile(r"(abnormality)|(modality|body_part|entity|grounding)_(gt|hallu)(?:_(\w+))?")


def here(folder: Path) -> bool:
    return (folder / "test.json").is_file() and (folder / "probmed").is_dir()


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """The samples in the file's order; none of a split other than test.

    Raises:
        ModelError: BAD_DATASET with the record and the field.
    """
    if split != "test":
        return
    records = read_records(folder / "test.json", ("id", "image", "image_type", "qa_type", "question", "answer"))
    number = "gpt_idx" if any("gpt_idx" in r for r in records) else "i"
    unique(records, "id", "qa_type", number)
    for (image, kind), of_image in groupby(records, lambda r: (str(r["id"]), str(r["image_type"]))):
        found = list(of_image)
        name = str(found[0]["image"])
        file = picture(folder, found[0], "image", (name, f"probmed/{name}", f"probmed/{Path(name).name}"))
        modality, organ = shown(kind)
        row = {"id": image, "modality": modality, "split": split, "image_type": kind, **({"organ": organ} if organ else {})}
        yield from samples_of({**row, "qa": [_question(r, number) for r in found]}, file, found)


def shown(image_type: str) -> tuple[str, str | None]:
    """(modality, organ) that an image type names.

    >>> shown("X-ray - Chest"), shown("ct-scan_abdomen")
    (('xray', 'chest'), ('ct', 'abdomen'))
    """
    words = re.findall(r"[a-z]+", image_type.lower().replace("x-ray", "xray").replace("x ray", "xray"))
    modality = next((m for w, m in (("xray", "xray"), ("ct", "ct"), ("mri", "mr"), ("mr", "mr")) if w in words), "unknown")
    return modality, next((w for w in words if w in ("abdomen", "brain", "chest", "spine")), None)


def _question(record: dict[str, Any], number: str) -> dict[str, Any]:
    found = _TYPE.fullmatch(str(record["qa_type"]))
    if not found:
        refuse(f"{record['_at']}: field 'qa_type' is none that ProbMed has")
    answer = str(record["answer"]).strip().lower()
    if answer not in ("yes", "no"):
        refuse(f"{record['_at']}: field 'answer' is neither yes nor no")
    alone, kind, side, k = found.groups()
    kind = alone or kind
    single = alone or (kind in ("entity", "grounding") and k is None)
    return {
        "qid": "_".join(str(record[f]) for f in ("id", "qa_type", number) if f in record),
        "question": str(record["question"]).replace("<image>", "").strip(), "answer": answer, "type": "CLOSED", "category": [CATEGORIES[kind]],
        "pair": None if single else f"{record['id']}_{kind}" + (f"_{k}" if k is not None else ""),
        "probe_category": CATEGORIES[kind], "adversarial": side == "hallu",
        **{f: record[f] for f in ("qa_type", "src_dataset") if f in record},
    }  # fmt: skip


DATASET = Dataset(
    here, samples, ("test",), tasks=("probe",),
    licence="gated by its authors on Hugging Face (rippleripple/ProbMed), no licence stated; images of MedICaT and ChestX-ray14",
    source="keys and qa_type: eric-ai-lab/ProbMed eval/calculate_score.py and eval/inference/LLaVA-Med/model_vqa_med.py; the names of the "
           "fields, `i` or `gpt_idx`, and probmed/: adapters of others that were run on the gated test.json. Yan et al. 2025, arXiv 2405.20421",
)  # fmt: skip
