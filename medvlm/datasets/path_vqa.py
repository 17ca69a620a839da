"""PathVQA: questions on pathology pictures from two textbooks and a teaching library; train, val and test.

``qas/train/train_qa.pkl``, a pickled list of {image, question, answer}, beside ``images/train/NAME.jpg``, val and test likewise,
in the folder or in ``pvqa/`` in it. Or the Parquet files of flaviagiammarino/path-vqa, which hold the same less a few duplicates
and no names of pictures; their folder is to be called path-vqa.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ModelError
from ..sample import Sample
from .base import Dataset
from .records import HINT, by_picture, called, checked, parquet_files, picture, read_parquet, samples_of

HUB = {"train": "train", "val": "validation", "test": "test"}
FIELDS = ("question", "answer")


def here(folder: Path) -> bool:
    return any(_pickled(folder, s).is_file() for s in HUB) or (called(folder, "path_vqa") and any(parquet_files(folder, s) for s in HUB.values()))


def samples(folder: Path, split: str) -> Iterator[Sample]:
    """The samples, picture by picture; ``meta["type"]`` is CLOSED where the answer is yes or no, else OPEN.

    Raises:
        ModelError: BAD_DATASET with the record and the field; MISSING_EXTRA for Parquet files without pyarrow.
    """
    if split not in HUB:
        return
    file = _pickled(folder, split)
    if file.is_file():
        records = _read_pickle(file)
    else:
        records = read_parquet(parquet_files(folder, HUB[split]), FIELDS, "image")
    for number, (name, found) in enumerate(by_picture(records, "image").items()):
        if file.is_file():
            row, source = name, picture(file.parents[2], found[0], "image", (f"images/{split}/{name}.jpg",))
        else:
            row, source = f"{split}-{number}", found[0]["image"]
        qa = [_question(r, f"{row}-{i}") for i, r in enumerate(found)]
        yield from samples_of({"id": row, "modality": "pathology", "split": split, "qa": qa}, source, found)


def _question(record: dict[str, Any], qid: str) -> dict[str, Any]:
    answer = str(record["answer"]).strip()
    kind = "CLOSED" if answer.lower() in ("yes", "no") else "OPEN"
    return {"qid": qid, "question": str(record["question"]).strip(), "answer": answer, "type": kind}


def _pickled(folder: Path, split: str) -> Path:
    file = folder / "qas" / split / f"{split}_qa.pkl"
    return file if file.is_file() else folder / "pvqa" / file.relative_to(folder)


class _Plain(pickle.Unpickler):
    """Lists, dictionaries, texts and numbers; a pickle that names anything to be called is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError("it names a class or a function")


def _read_pickle(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open("rb") as raw:
            found = _Plain(raw).load()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file.name} is no pickle of plain records", "BAD_DATASET", HINT) from error
    if not isinstance(found, list):
        raise ModelError(f"{file.name} holds {type(found).__name__}, expected a list of records", "BAD_DATASET", HINT)
    return checked(found, file.name, ("image", *FIELDS))


DATASET = Dataset(
    here, samples, ("train", "val", "test"), tasks=("vqa",), questions=("qas/*/*_qa.pkl", "pvqa/qas/*/*_qa.pkl", "*.parquet", "data/*.parquet"),
    licence="MIT for the questions (UCSD-AI4H/PathVQA); the pictures are their publishers'",
    source="folders, pickles and their fields: a dozen loaders of others that agree on the authors' download (pvqa/), whose own repository, "
           "UCSD-AI4H/PathVQA, only links to it; Parquet: card and viewer of flaviagiammarino/path-vqa on Hugging Face. "
           "He et al. 2020, arXiv 2003.10286",
)  # fmt: skip
