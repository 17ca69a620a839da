"""``predictions.jsonl``: what a model said, one Prediction a line, masks in files beside it (schema: docs/predictions.md)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import FileError, MedVLMError, ModelError
from ..imaging.files import writing
from ..imaging.scan import Image, Volume
from ..sample import Mask, Prediction, Region, Sample
from .manifest import mask_array

_KINDS = {str: "a string", dict: "an object", list: "a list", float: "a number"}


def save_predictions(path: str | Path, predictions: Iterable[Prediction]) -> Path:
    """Write predictions, whole or not at all; their masks go into ``NAME-masks/`` as .npz, named by their content.

    Probabilities keep all their digits; NaN becomes null.

    Raises:
        ModelError: BAD_PREDICTIONS when two have one id.
        FileError: CANNOT_WRITE.
    """
    path = Path(path)
    seen: set[str] = set()
    with writing(path) as part, open(part, "w", encoding="utf-8") as lines:
        for p in predictions:
            if p.id in seen:
                raise ModelError(f"two predictions have the id {p.id!r}", "BAD_PREDICTIONS")
            seen.add(p.id)
            lines.write(_line(path, p))
    return path


def append_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Add predictions at the end of a file, safe on disk when this returns; their ids must be new to it.

    Raises:
        FileError: CANNOT_WRITE, as when the disk is full; what was there before is still whole (:func:`mend`).
    """
    path = Path(path)
    try:
        with path.open("a", encoding="utf-8") as lines:
            for p in predictions:
                lines.write(_sound(path, p))
            lines.flush()
            os.fsync(lines.fileno())
    except OSError as e:
        raise FileError(f"cannot write {path.name}: {e.strerror or type(e).__name__}", "CANNOT_WRITE") from e


def _sound(path: Path, p: Prediction) -> str:
    """A line that :func:`rows` reads again: what a model gave and no file can hold is an error of that sample, not the end of the run."""
    try:
        line = _line(path, p)
        line.encode()
        _check(line, path.name, 0)
        return line
    except (ModelError, ValueError, TypeError) as error:  # a UnicodeEncodeError is a ValueError
        said = error.message.partition(": ")[2] if isinstance(error, ModelError) else type(error).__name__
        return _line(path, Prediction(p.id, error=f"BAD_PREDICTIONS: {said}"))


def mend(path: str | Path) -> None:
    """Cut off a last line that was never finished, as a kill in the middle of a write leaves it."""
    path = Path(path)
    if not path.is_file():
        return
    with path.open("rb+") as raw:
        whole = raw.read()
        if whole and not whole.endswith(b"\n"):
            raw.truncate(whole.rfind(b"\n") + 1)


def _line(path: Path, p: Prediction) -> str:
    row = {
        "id": p.id, "text": p.text, "probability": _chance(p.probability),
        "choices": None if p.choices is None else {k: _chance(v) for k, v in p.choices.items()},
        "regions": [{"image": r.image, "label": r.label, "probability": None if r.probability is None else _chance(r.probability) or 0.0, "lower": _corner(r, 0), "upper": _corner(r, 1),
                     "mask": None if r.mask is None else _save_mask(path, r.mask)} for r in p.regions],
        "masks": [{"image": m.image, "label": m.label, "mask": _save_mask(path, m.array)} for m in p.masks],
        "seconds": _number(p.seconds), "error": p.error,
    }  # fmt: skip
    if p.vectors:
        row["vectors"] = {k: [_number(x) for x in np.asarray(v, np.float32).tolist()] for k, v in p.vectors.items()}
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def rows(path: str | Path) -> dict[str, dict[str, Any]]:
    """{id: row} of a predictions file, or of the ``predictions.jsonl`` in a folder; checked, masks unread.

    Raises:
        ModelError: BAD_PREDICTIONS with the line number, the field, what was found and what was expected.
    """
    path = Path(path)
    path = path / "predictions.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ModelError(f"{path} does not exist", "BAD_PREDICTIONS")
    found: dict[str, dict[str, Any]] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = _check(line, path.name, number)
                    if row["id"] in found:
                        raise ModelError(f"{path.name} line {number}: id {row['id']!r} was used on line {found[row['id']]['_line']}", "BAD_PREDICTIONS")
                    found[row["id"]] = row | {"_folder": path.parent, "_line": number}
    except UnicodeDecodeError as error:
        raise ModelError(f"{path.name} is not UTF-8 text", "BAD_PREDICTIONS") from error
    return found


def read_predictions(path: str | Path, samples: Sequence[Sample]) -> list[Prediction]:
    """The prediction of each sample, in the order of the samples. One that is missing, or whose mask cannot be read on
    the sample's image, is a Prediction with an error. Rows of other samples are left out.
    """
    found = rows(path)
    return [prediction(found.get(sample.id), sample) for sample in samples]


def prediction(row: Mapping[str, Any] | None, sample: Sample) -> Prediction:
    """What a row of :func:`rows` says of a sample."""
    if row is None:
        return Prediction(sample.id, error="MISSING: there is no saved prediction of this id")
    try:
        masks = tuple(Mask(m["image"], m["label"], _read_mask(row, m, sample)) for m in row.get("masks") or ())
        regions = tuple(
            Region(r["image"], r["label"], (tuple(r["lower"]), tuple(r["upper"])) if r.get("lower") else None,
                   _read_mask(row, r, sample) if r.get("mask") else None, r.get("probability"))
            for r in row.get("regions") or ()
        )  # fmt: skip
    except MedVLMError as error:
        return Prediction(sample.id, error=f"{error.code}: {error.message}")
    vectors = {k: np.array([math.nan if x is None else x for x in v], np.float32) for k, v in (row.get("vectors") or {}).items()}
    choices = None if row.get("choices") is None else {k: math.nan if p is None else p for k, p in row["choices"].items()}
    return Prediction(sample.id, row.get("text") or "", row.get("probability"), choices, regions, masks, row.get("seconds") or 0.0,
                      row.get("error"), vectors)  # fmt: skip


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _chance(value: float | None) -> float | None:
    """A probability; what rounding has pushed out of [0, 1] is put back."""
    number = _number(value)
    return number if number is None or not -1e-6 < number < 1 + 1e-6 else min(max(number, 0.0), 1.0)


def _corner(region: Region, which: int) -> list[float]:
    return [float(x) for x in region.box[which]] if region.box else []


def _save_mask(path: Path, mask: np.ndarray) -> str:
    """Write a mask once; its path relative to the predictions file."""
    mask = np.ascontiguousarray(mask, dtype=bool)
    name = hashlib.sha256(repr(mask.shape).encode() + np.packbits(mask).tobytes()).hexdigest()[:16]
    folder = path.parent / f"{path.stem}-masks"
    file = folder / f"{name}.npz"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        with writing(file) as part, open(part, "wb") as raw:
            np.savez_compressed(raw, mask=mask)
    return f"{folder.name}/{file.name}"


def _read_mask(row: Mapping[str, Any], entry: Mapping[str, Any], sample: Sample) -> np.ndarray:
    where = f"predictions line {row['_line']}, mask of {entry['label'][:40]!r}"
    image = sample.images.get(entry["image"])
    if image is None:
        raise ModelError(f"{where}: sample {sample.id} has no image {entry['image'][:40]!r}", "BAD_PREDICTIONS")
    file = row["_folder"] / entry["mask"]
    if "\0" in entry["mask"] or not file.resolve().is_relative_to(row["_folder"].resolve()):
        raise ModelError(f"{where}: the file lies outside the folder of the predictions", "BAD_PREDICTIONS")
    if not file.is_file():
        raise ModelError(f"{where}: the file does not exist", "BAD_PREDICTIONS")
    try:
        return _unpacked(file, image) if file.suffix == ".npz" else mask_array(file, image) > 0
    except MedVLMError as error:
        raise ModelError(f"{where}: {error.message}", error.code, error.hint) from error
    except (OSError, KeyError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ModelError(f"{where}: the file is no readable mask ({type(error).__name__})", "BAD_PREDICTIONS") from error


def _unpacked(file: Path, image: Image | Volume) -> np.ndarray:
    """The array "mask" of an .npz; no more is read than the image's grid holds, whatever the file claims."""
    with zipfile.ZipFile(file) as archive, archive.open("mask.npy") as raw:
        np.lib.format.read_magic(raw)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(raw)
        if shape != tuple(image.shape[1:]) or dtype.kind != "b":
            raise ModelError(f"it is {dtype} {shape}, but image {image.id} asks for bool {tuple(image.shape[1:])}", "GRID_MISMATCH")
        values = np.frombuffer(raw.read(math.prod(shape)), np.uint8)
    return values.reshape(shape, order="F" if fortran else "C") != 0


def _check(line: str, file: str, number: int) -> dict[str, Any]:
    def refuse(what: str) -> NoReturn:
        raise ModelError(f"{file} line {number}: {what}", "BAD_PREDICTIONS")

    def chance(value: Any) -> bool:
        return value is None or isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1

    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        refuse(f"not JSON ({getattr(error, 'msg', 'too deep')} at column {getattr(error, 'colno', 1)})")
    if not isinstance(row, dict):
        refuse(f"expected an object, got {type(row).__name__}")
    if not isinstance(row.get("id"), str) or not row["id"]:
        refuse(f"field 'id' must be a non-empty string, got {str(row.get('id'))[:80]!r}")
    for name, kind in (("text", str), ("choices", dict), ("regions", list), ("masks", list), ("error", str)):
        if not isinstance(row.get(name), kind | None):
            refuse(f"field {name!r} must be {_KINDS[kind]} or null, got {str(row[name])[:80]}")
    if not chance(row.get("probability")):
        refuse(f"field 'probability' must be a number from 0 to 1 or null, got {str(row['probability'])[:80]}")
    seconds = row.get("seconds")
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf):
        refuse(f"field 'seconds' must be a number or null, got {str(seconds)[:80]}")
    for name, value in (row.get("choices") or {}).items():
        if not chance(value):
            refuse(f"choice {name[:40]!r} must be a number from 0 to 1 or null, got {str(value)[:80]}")
    for name, vector in _object(row, "vectors", refuse).items():
        if not isinstance(vector, list) or not vector or not all(x is None or _finite(x) for x in vector):
            refuse(f"vector {name[:40]!r} must be a list of numbers, got {str(vector)[:80]}")
    for what in ("regions", "masks"):
        for i, entry in enumerate(row.get(what) or ()):
            if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("image", "label")):
                refuse(f"{what}[{i}] needs an image and a label, got {str(entry)[:80]}")
            if not isinstance(entry.get("mask"), str if what == "masks" else str | None):
                refuse(f"{what}[{i}] needs the path of its mask, got {str(entry.get('mask'))[:80]}")
            corners = [entry.get("lower") or [], entry.get("upper") or []]
            if not all(isinstance(c, list) and len(c) in (0, 2, 3) and all(_finite(x) for x in c) for c in corners) or len(corners[0]) != len(corners[1]):
                refuse(f"{what}[{i}] needs lower and upper as lists of 2 or 3 numbers, got {str(corners)[:80]}")
            if not chance(entry.get("probability")):
                refuse(f"{what}[{i}]: probability must be a number from 0 to 1 or null, got {str(entry['probability'])[:80]}")
    return row


def _object(row: Mapping[str, Any], name: str, refuse) -> dict[str, Any]:
    value = row.get(name)
    if not isinstance(value, dict | None):
        refuse(f"field {name!r} must be an object or null, got {str(value)[:80]}")
    return value or {}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
