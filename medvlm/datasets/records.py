"""Public data sets that come as one JSON list of records beside a folder of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import MedVLMError, ModelError
from ..sample import Sample
from .manifest import row_samples

HINT = "compare the folder with the layout that the data set's authors publish"


def refuse(what: str) -> NoReturn:
    """Raises: ModelError: BAD_DATASET."""
    raise ModelError(what, "BAD_DATASET", HINT)


def read_records(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The records of a JSON list; ``_at`` says which one ("test.json record 3"), counted from 0.

    needed: fields that every record has, as a text or a number.

    Raises:
        ModelError: BAD_DATASET with the record and the field; what stands in it is not quoted.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read", "BAD_DATASET", HINT) from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise ModelError(f"{path.name} is not JSON in UTF-8", "BAD_DATASET", HINT) from error
    if not isinstance(found, list):
        refuse(f"{path.name} holds {type(found).__name__}, expected a list of records")
    for index, record in enumerate(found):
        at = f"{path.name} record {index}"
        if not isinstance(record, dict):
            refuse(f"{at} is {type(record).__name__}, expected an object")
        for name in needed:
            if not isinstance(record.get(name), str | int | float):
                refuse(f"{at}: field {name!r} is " + (f"{type(record[name]).__name__}, expected a text" if name in record else "missing"))
        record["_at"] = at
    return found


def picture(folder: Path, record: dict[str, Any], field: str, places: Sequence[str]) -> Path:
    """The picture that a field of a record names: the first that is there of ``places``, paths relative to ``folder``.

    Raises:
        ModelError: BAD_DATASET when it is not there, or the name leads out of the folder.
    """
    for place in places:
        if Path(place).is_absolute() or ".." in Path(place).parts or "\0" in place:
            continue
        if (folder / place).is_file():
            return folder / place
    refuse(f"{record['_at']}: the picture of field {field!r} is not in the folder")


def samples_of(row: dict[str, Any], file: Path, records: Sequence[dict[str, Any]]) -> Iterator[Sample]:
    """One sample a record of a picture, made as from a manifest's row; the picture is opened once, its pixels read when first used.

    row: as in docs/manifest.md, with a ``qa`` entry for each of ``records``.

    Raises:
        ModelError: BAD_DATASET when the file is no picture that can be read.
    """
    file = file.resolve()  # a folder of pictures may be a link to another disk
    try:
        yield from row_samples({**row, "image": file.name, "_folder": file.parent, "_line": 0})
    except MedVLMError as error:
        raise ModelError(f"{records[0]['_at']}: its picture cannot be read ({error.code})", "BAD_DATASET", HINT) from None  # the cause names the file


def by_picture(records: Sequence[dict[str, Any]], field: str) -> dict[str, list[dict[str, Any]]]:
    """{what the field says: its records in their order}, in the order of their first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(str(record[field]), []).append(record)
    return found


def unique(records: Sequence[dict[str, Any]], *fields: str) -> None:
    """Raises: ModelError: BAD_DATASET when two records say the same in all of these fields."""
    seen: dict[tuple, str] = {}
    for record in records:
        key = tuple(str(record.get(f)) for f in fields)
        if key in seen:
            refuse(f"{record['_at']} has the same {' and '.join(fields)} as {seen[key]}")
        seen[key] = record["_at"]
