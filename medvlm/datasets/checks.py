"""What is looked at before anything learns from data: blank texts, pixels, and patients or pictures that lie in two splits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import MedVLMError, ModelError, UsageError
from ..imaging.files import stem_and_ending, walk
from ..imaging.scan import Image, Volume
from ..sample import MARKED, Sample

HALVES = (".hdr", ".img", ".par", ".rec")
"""Endings of images that are a header and a data file of one stem (Analyze, NIfTI pairs, PAR/REC)."""
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


class Leak(NamedTuple):
    """kind: "patient", "image" or "id". splits: where it was found. rows: the ids of the rows that share it, SET/ID where the set is known."""

    kind: str
    splits: tuple[str, ...]
    rows: tuple[str, ...]


def leave_out(bad: list[dict] | None, error: MedVLMError, line: int | None, row: str | None) -> None:
    """Add {line (of the manifest), row (its id, None where it cannot be read), code, message} to ``bad``, or raise where that is None."""
    if bad is None:
        raise error
    bad.append({"line": line, "row": row, "code": error.code, "message": error.message})


def blank(text: str) -> bool:
    """True where nothing is said beside the marks of images."""
    return not MARKED.sub("", text).strip()


def touch(group: Sequence[Sample], where: str = "") -> None:
    """Read every image of a group whole, so that what cannot be learned from is found before a run and not in the middle of it.

    where: said in the error, as "manifest line 7".

    Raises:
        ModelError: NOT_FINITE for NaN and infinite values, or the code of what is wrong with the file.
    """
    for image in {id(i): i for s in group for i in s.images.values()}.values():
        name = f"{where}, image {image.id}" if where else f"image {image.id}"
        try:
            array = pixels_of(image)
        except MedVLMError as error:
            raise ModelError(f"{name}: {error.message}", error.code, error.hint) from error
        if array.dtype.kind == "f" and (count := int(array.size - np.count_nonzero(np.isfinite(array)))):
            raise ModelError(f"{name}: {count} of {array.size} values are NaN or infinite", "NOT_FINITE")


def pixels_of(image: Image | Volume) -> np.ndarray:
    """(C, H, W) or (C, D, H, W)."""
    return image.voxels if isinstance(image, Volume) else image.pixels


def files_of(path: Path) -> list[Path]:
    """The files behind an image that a path names: itself, with its other half where it is one of two; all of a folder. [] if there is none."""
    if path.is_dir():
        return [p for p in walk(path, path.name) if p.name.upper() != "DICOMDIR"]
    stem, ending = stem_and_ending(path.name)
    if ending.removesuffix(".gz") not in HALVES:
        return [path] if path.is_file() else []
    names = [stem + form + gz for half in HALVES for form in (half, half.upper()) for gz in ("", ".gz")]
    return sorted({p.resolve(): p for name in names if (p := path.with_name(name)).is_file()}.values())


def digest(image: Image | Volume) -> str:
    """SHA-256 as hex: of the file that the image came from, over the sorted ones of several files, or of its values where there is no file.

    Nothing is decoded where there are files. All images of one row share one.
    """
    if isinstance(image.origin, str):
        return image.origin
    if image.origin is not None and (files := files_of(image.origin)):
        return digest_of(files)
    array = pixels_of(image)
    whole = hashlib.sha256(f"{array.shape} {array.dtype.str}".encode())
    whole.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return whole.hexdigest()


def digest_of(files: Sequence[Path]) -> str:
    """As :func:`digest`, of files."""
    found = []
    for file in files:
        with file.open("rb") as raw:
            found.append(hashlib.file_digest(raw, "sha256").hexdigest())
    return found[0] if len(found) == 1 else hashlib.sha256("".join(sorted(found)).encode()).hexdigest()


def leaks(splits: Mapping[str, Iterable[Sample]]) -> list[Leak]:
    """Patients and pictures that lie in more than one split, and ids that were given twice.

    Patients and ids are told apart by data set (``meta["dataset"]``); pictures are not: two sets may hold the same. Each
    iterable is gone through once, and no sample is kept.
    """
    places: dict[tuple[str, str, str], dict[tuple[str, str], None]] = {}  # {(kind, set, key): {(split, row): None}}: a set in the order of finding
    twice: list[Leak] = []
    for split, samples in splits.items():
        hashed: set[str] = set()
        for s in samples:
            of = str(s.meta.get("dataset", ""))
            row = "/".join(filter(None, (of, str(s.meta.get("row", s.id)))))
            keys = [("patient", of, s.patient)] if s.patient else []
            if "row" not in s.meta or row not in hashed:  # the samples of a row share its images
                keys += [("image", "", digest(image)) for image in s.images.values()]
                hashed.add(row)
            for key in keys:
                places.setdefault(key, {})[split, row] = None
            before = places.setdefault(("id", of, s.id), {})
            if before:
                twice.append(_leak("id", [*before, (split, row)]))
            before[split, row] = None
    shared = [_leak(kind, found) for (kind, _, _), found in places.items() if kind != "id" and len({split for split, _ in found}) > 1]
    return sorted(shared, key=lambda leak: leak.kind, reverse=True) + twice


def _leak(kind: str, places: Iterable[tuple[str, str]]) -> Leak:
    splits, rows = zip(*places)
    return Leak(kind, tuple(dict.fromkeys(splits)), tuple(dict.fromkeys(rows)))


def refuse_leaks(splits: Mapping[str, Iterable[Sample]], named: Callable[[str], str] = str) -> None:
    """named: a row ("set/id") as the error is to call it.

    Raises:
        ModelError: LEAK with the counts and the first rows of each kind, where :func:`leaks` finds any.
    """
    found = leaks(splits)
    if not found:
        return
    said = []
    for kind, what in (("patient", "patients in two splits"), ("image", "pictures in two splits"), ("id", "sample ids given twice")):
        of_kind = [leak for leak in found if leak.kind == kind]
        if of_kind:
            first = "; ".join(f"{', '.join(map(named, leak.rows[:4]))} ({', '.join(leak.splits)})" for leak in of_kind[:3])
            said.append(f"{what}: {len(of_kind)}, rows {first}" + ("; ..." if len(of_kind) > 3 else ""))
    raise ModelError(". ".join(said), "LEAK", "scores on data that was learned from say nothing: split by patient, or go on all the same with --allow-leaks")


def split_by_patient(patient: str | None, row: str, shares: Mapping[str, float] = SHARES, seed: int = 0) -> str:
    """The split of a row: the same for all rows of a patient; a row without one is a patient of its own.

    Drawn from a hash of the patient and the seed, so more rows change nothing for those there were, and shares are met
    on average over patients.

    Raises:
        UsageError: BAD_ARGUMENT when the shares are no parts of 1 of train, val and test.
    """
    if set(shares) - set(SHARES) or not all(math.isfinite(x) and x >= 0 for x in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise UsageError(f"shares of {', '.join(SHARES)} must be parts of 1, not {dict(shares)}", "BAD_ARGUMENT", "e.g. 0.8,0.1,0.1")
    key = f"{seed} patient {patient}" if patient else f"{seed} row {row}"
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return next(split for split, share in reversed(shares.items()) if share > 0)  # the sum fell short of 1 by rounding
