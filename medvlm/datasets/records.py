"""Public data sets that come as records (JSON, JSON lines, CSV, Parquet) beside their pictures, or around them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import MedVLMError, ModelError
from ..imaging.scan import Image, Lazy
from ..sample import Sample
from .manifest import row_samples
from .unopened import unopened

HINT = "compare the folder with the layout that the data set's authors publish"
HEAD = 32
"""Bytes at the start of a picture that tell its format."""


def refuse(what: str) -> NoReturn:
    """Raises: ModelError: BAD_DATASET."""
    raise ModelError(what, "BAD_DATASET", HINT)


def read_records(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The records of a .json list, or of the lines of a .jsonl or .csv file; ``_at`` says which one ("test.json record 3"), counted from 0.

    needed: fields that every record has, as a text or a number.

    Raises:
        ModelError: BAD_DATASET with the record and the field; what stands in it is not quoted.
    """
    form = {".jsonl": "JSON lines", ".csv": "CSV"}.get(path.suffix, "JSON")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if form == "CSV":
                found = list(csv.DictReader(file, strict=True))
            else:
                found = [json.loads(line) for line in file if line.strip()] if form == "JSON lines" else json.load(file)
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read", "BAD_DATASET", HINT) from error
    except (ValueError, csv.Error) as error:  # another format, or no UTF-8
        raise ModelError(f"{path.name} is not {form} in UTF-8", "BAD_DATASET", HINT) from error
    if not isinstance(found, list):
        refuse(f"{path.name} holds {type(found).__name__}, expected a list of records")
    return checked(found, path.name, needed)


def read_csv(path: Path, needed: Sequence[str]) -> Iterator[dict[str, str]]:
    """The records of a table with a line of headings, .csv or .csv.gz, one after the other; ``_at`` as in :func:`read_records`.

    needed: headings that it has. Every cell is a text as it stands, "" where it is empty.

    Raises:
        ModelError: BAD_DATASET with the record; what stands in it is not quoted.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig", newline="") if path.suffix == ".gz" else path.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.reader(lines, strict=True)
            names = next(table, [])
            if missing := [n for n in needed if n not in names]:
                refuse(f"{path.name} has no column {missing[0]!r}")
            for index, cells in enumerate(c for c in table if c):  # an empty line is no record
                if len(cells) != len(names):
                    refuse(f"{path.name} record {index} has {len(cells)} cells under {len(names)} headings")
                yield dict(zip(names, cells), _at=f"{path.name} record {index}")
    except (OSError, EOFError, zlib.error) as error:
        raise ModelError(f"{path.name} cannot be read", "BAD_DATASET", HINT) from error
    except (ValueError, csv.Error) as error:  # no UTF-8, or no CSV
        raise ModelError(f"{path.name} is not CSV in UTF-8", "BAD_DATASET", HINT) from error


def checked(found: list, name: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The records of a file of this name with their ``_at``; raises as :func:`read_records`."""
    for index, record in enumerate(found):
        at = f"{name} record {index}"
        if not isinstance(record, dict):
            refuse(f"{at} is {type(record).__name__}, expected an object")
        for field in needed:
            if not isinstance(record.get(field), str | int | float):
                refuse(f"{at}: field {field!r} is " + (f"{type(record[field]).__name__}, expected a text" if field in record else "missing"))
        record["_at"] = at
    return found


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The Parquet files of a split in ``folder`` or its ``data/``, named as the Hugging Face Hub names them (docs: File names and splits)."""
    return sorted(f for place in (folder, folder / "data") for name in (f"{split}.parquet", f"{split}-*.parquet") for f in place.glob(name))


def called(folder: Path, name: str) -> bool:
    """Whether a folder, or the repository that it is a cached snapshot of, has this name: two sets of Parquet files look the same else."""
    parts = folder.resolve().parts
    own = (folder.name, *parts[-1:], *(parts[-3:-2] if parts[-2:-1] == ("snapshots",) else ()))
    return any(_plain(o).endswith(_plain(name)) for o in own)


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


@dataclass(frozen=True)
class Inside:
    """A picture in a row of a Parquet file; as a text it is the SHA-256 of its bytes, the same for the same picture."""

    path: Path
    column: str
    group: int
    row: int
    head: bytes
    digest: str

    def __str__(self) -> str:
        return self.digest

    def read(self) -> bytes:
        from pyarrow import parquet

        return parquet.ParquetFile(self.path).read_row_group(self.group, [self.column])[self.column][self.row].as_py()["bytes"]


def read_parquet(files: Sequence[Path], needed: Sequence[str], column: str | None = None) -> list[dict[str, Any]]:
    """As :func:`read_records`, from Parquet files. column: that of the pictures, which become an :class:`Inside` each.

    Raises:
        ModelError: BAD_DATASET with the record and the field; MISSING_EXTRA without pyarrow.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ModelError("Parquet files need pyarrow, which is not installed", "MISSING_EXTRA", "pip install pyarrow") from error
    records: list[dict[str, Any]] = []
    for path in files:
        found: list[dict[str, Any]] = []
        try:
            whole = parquet.ParquetFile(path)
            for group in range(whole.num_row_groups):
                table = whole.read_row_group(group)
                pictures = table[column] if column in table.column_names else ()
                rows = table.drop_columns([column] if column in table.column_names else []).to_pylist()
                for row, picture in enumerate(pictures):
                    held = picture.as_py()
                    data = held.get("bytes") if isinstance(held, dict) else None
                    if not data:
                        refuse(f"{path.name} record {len(found) + row}: field {column!r} holds no picture")
                    rows[row][column] = Inside(path, column, group, row, data[:HEAD], hashlib.sha256(data).hexdigest())
                found += rows
        except (OSError, ArrowException) as error:
            raise ModelError(f"{path.name} cannot be read as Parquet", "BAD_DATASET", HINT) from error
        if column and found and column not in found[0]:
            refuse(f"{path.name} record 0: field {column!r} is missing")
        records += checked(found, path.name, needed)
    return records


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


def samples_of(row: dict[str, Any], files: Path | Inside | Sequence[Path], records: Sequence[dict[str, Any]]) -> Iterator[Sample]:
    """The samples of a picture, or of the pictures of one study, made as from a manifest's row; each is opened when it is first used.

    row: as in docs/manifest.md, with a ``qa`` entry for each of ``records`` or a ``text``; boxes are those of the first picture.

    Raises:
        ModelError: BAD_DATASET when a file is no picture; later, when one that is used is damaged.
    """
    sources = files if isinstance(files, Sequence) else (files,)
    images = [_image(source, number, row["modality"], records[0]["_at"]) for number, source in enumerate(sources, 1)]
    shown = {i.id: i for i in images}
    for s in row_samples({**row, "image": None, "_line": 0}):
        yield replace(s, images=shown, regions=tuple(replace(r, image=images[0].id) for r in s.regions))


def _image(source: Path | Inside, number: int, modality: str, at: str) -> Image:
    """The image under the id that :func:`medvlm.read` would give it; of its file only the first bytes are looked at."""
    from ..imaging.raster import kind

    known = None if modality in ("ct_or_mr", "unknown") else modality
    name = f"{known or 'image'}-{number}"
    if isinstance(source, Path) and source.name.endswith((".nii", ".nii.gz", ".dcm")):  # what it is stands in its name
        return unopened(source, name, known, at)
    try:
        head = source.head if isinstance(source, Inside) else _head(source)
    except OSError as error:
        raise ModelError(f"{at}: its picture cannot be read (UNREADABLE)", "BAD_DATASET", HINT) from error
    if kind(head) is None:
        refuse(f"{at}: its picture cannot be read ({'UNKNOWN_FORMAT' if head else 'TRUNCATED'})")
    if isinstance(source, Path):
        return unopened(source, name, known, at)

    def pixels() -> np.ndarray:
        found = _decoded(source, known, at)
        image.info.update(found.info)
        image.unit, later.shape, later.dtype = found.unit, found.shape, found.dtype
        return found.pixels

    later = _Later(pixels)
    image = Image(name, later, None, known or "unknown", "uint8", {})
    image.origin = source.digest
    return image


def _head(file: Path) -> bytes:
    with file.open("rb") as raw:
        return raw.read(HEAD)


class _Later(Lazy):
    """Pixels whose shape is not known before they are read: a grey picture may be stored as colour."""

    def __init__(self, load: Callable[[], np.ndarray]):
        self.load = load

    def __getattr__(self, name: str) -> Any:
        if name not in ("shape", "dtype"):
            raise AttributeError(name)
        self.load()
        return self.__dict__[name]


def _decoded(source: Inside, modality: str | None, at: str) -> Image:
    from ..imaging.study import read

    try:
        with tempfile.TemporaryDirectory(prefix="medvlm-") as scratch:
            file = Path(scratch, "picture")
            file.write_bytes(source.read())
            return read(file, modality=modality).image()
    except MedVLMError as error:
        raise ModelError(f"{at}: its picture cannot be read ({error.code})", "BAD_DATASET", HINT) from None  # the cause names the file


def in_words(parts: Mapping[str, str]) -> str:
    """Findings and impression of a report under their headings, "" where it has neither."""
    return "\n".join(f"{name.upper()}: {parts[name]}" for name in ("findings", "impression") if parts.get(name))


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
