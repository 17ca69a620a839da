"""``read``: whatever the hospital gives, one examination with geometry or a named error.

One folder may hold DICOM, NIfTI and pictures at once. DICOM files are one study per Study Instance UID. The others carry
no such number: ``read`` takes all of a folder for one study with several images, ``studies`` takes each for a study of
its own. Where DICOM lies in a folder that was walked, files of other kinds are left out and counted, since nothing says
whose they are; files that are named one by one are all read.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ChoiceError, FileError, MedVLMError, UsageError
from .files import ENDINGS, Scratch, unzip, walk
from .scan import Image, Lazy, Study, Volume

MODALITIES = (
    "xray", "ct", "mr", "pet", "nm", "ct_or_mr", "fundus", "pathology", "ultrasound", "endoscopy", "dermoscopy", "oct", "other", "unknown",
)  # fmt: skip
POLICIES = ("strict", "fill", "resample")
HASHED = 16 << 20
"""Bytes at the start of a file that go into its study id, with its length."""


def read(source: Any, policy: str = "strict", *, modality: str | None = None, spacing=None, affine=None, study: str | None = None) -> Study:
    """One study.

    Args:
        source: a file, a folder of any depth, a zip, a DICOMDIR, a list of these, an array, or a Study (given back).
            Arrays: (H, W) or (C, H, W) with C 1 or 3 is an image; with ``affine``, (D, H, W) or (C, D, H, W) a volume.
        policy: what to do about gaps and uneven spacing in DICOM: "strict" refuses, "fill" inserts empty slices,
            "resample" interpolates.
        modality: overrides what the files say: one of ``MODALITIES``. NIfTI and arrays become HU only by "ct".
        spacing: (H, W) mm per pixel, for pictures that do not say.
        affine: (4, 4) index (d, h, w, 1) -> mm LPS+, for volumes that do not say.
        study: the id of the one to read where there are several.

    Raises:
        FileError, GeometryError: nothing could be read; the message is that of the first file that was refused.
        ChoiceError: MANY_STUDIES, NO_SUCH_STUDY.
        UsageError: BAD_ARGUMENT.
    """
    if isinstance(source, Study):
        return source
    _check_arguments(policy, modality, spacing)
    if isinstance(source, np.ndarray):
        return _from_array(source, modality, spacing, affine)
    batch = _Batch(source, modality, affine)
    found = batch.dicom(policy) if batch.dicoms else []
    if found:
        batch.leave_out()
    if batch.loose:
        loose = batch.together([i.id for s in found for i in s.images])
        if loose and len(found) == 1:  # named one by one beside one DICOM study: all of one examination
            found = [Study(found[0].id, found[0].patient, (*found[0].images, *loose.images), found[0].report, found[0]._warnings)]
        elif loose:
            found.append(loose)
    batch.raise_if_empty(found)
    if study is not None:
        chosen = [s for s in found if s.id == study]
        if not chosen:
            raise ChoiceError(f"{batch.what} holds no study {study!r}; it holds: {_list(found)}", "NO_SUCH_STUDY")
        found = chosen
    if len(found) > 1:
        raise ChoiceError(f"{batch.what} holds {len(found)} studies: {_list(found)}", "MANY_STUDIES")
    return _finish(found[0], batch, modality, spacing, affine)


def studies(folder: Any, policy: str = "strict", *, modality: str | None = None, spacing=None, affine=None) -> Iterator[Study]:
    """Every study below a folder: those of DICOM by their UID, then each other file as a study of its own.

    A file that is refused becomes a study without images whose warnings say why: it is never a missing row.

    Raises:
        FileError: the folder itself cannot be read, or holds nothing.
    """
    _check_arguments(policy, modality, spacing)
    batch = _Batch(folder, modality, affine, keep=False)
    found = batch.dicom(policy) if batch.dicoms else []
    refused, batch.refused = batch.refused, []
    for s in found:
        yield _finish(s, batch, modality, spacing, affine)
        batch.notes = []  # what was skipped in the folder is said once
    for path, what, reader, _ in batch.loose:
        try:
            yield _finish(Study(_file_id([path]), images=reader(path, what, batch.ids())), batch, modality, spacing, affine)
            batch.notes = []
        except (MedVLMError, OSError) as e:
            yield _nothing(_file_id([path], what), e, what)
    for what, error in refused:
        yield _nothing(_text_id(what), error, what)
    if not (found or batch.loose or refused):
        batch.raise_if_empty([])


class _Batch:
    """The files behind a source, sorted into DICOM, other images and the rest."""

    def __init__(self, source: Any, modality: str | None, affine, keep: bool = True):
        self.modality, self.affine = modality, affine
        self.scratch: list[Scratch] = []
        self.notes: list[str] = []
        self.refused: list[tuple[str, MedVLMError]] = []
        self.dicoms: list[Path] = []
        self.loose: list[tuple[Path, str, Callable, bool]] = []  # file, name in messages, reader, named by the caller
        self.skipped = 0
        sources = source if isinstance(source, (list, tuple)) else [source]
        if not sources:
            raise UsageError("there is nothing to read: the list is empty", "BAD_ARGUMENT")
        for s in sources:
            if not isinstance(s, (str, os.PathLike)):
                raise UsageError(f"read takes paths, a NumPy array or a Study, not {type(s).__name__}", "BAD_ARGUMENT")
        self.what = str(sources[0]) if len(sources) == 1 else f"the list of {len(sources)} paths"
        files = [f for s in sources for f in self._files(s)]
        self.keep = keep and len(files) == 1
        for path, what, typed in files:
            try:
                self._sort(path, what, typed)
            except OSError as e:
                self.refused.append((what, _os_error(e, what)))
        if self.skipped:
            self.notes.append(f"SKIPPED: {self.skipped} files that are no images were skipped")

    def _files(self, source) -> list[tuple[Path, str, bool]]:
        typed, path = str(source), Path(source)
        if "\0" in typed:
            raise FileError("the path holds a zero byte", "NOT_FOUND")
        try:
            if path.is_dir():
                return self._walk(path, typed)
            if not path.exists():
                raise FileError(f"there is no file or folder {typed}", "NOT_FOUND")
            if not path.is_file():
                raise FileError(f"{typed} is neither a file nor a folder", "UNREADABLE")
            with open(path, "rb") as f:
                head = f.read(4)
            if head[:2] == b"PK" and head in (b"PK\3\4", b"PK\5\6") or (path.suffix.lower() == ".zip"):
                scratch = unzip(path, typed)
                self.scratch.append(scratch)
                return self._walk(scratch.path, typed)
        except OSError as e:
            raise _os_error(e, typed) from e
        return [(path, typed, True)]

    def _walk(self, folder: Path, typed: str) -> list[tuple[Path, str, bool]]:
        # a DICOMDIR only names files, and here they all are
        files = [p for p in walk(folder, typed) if p.name.upper() != "DICOMDIR"]
        return [(p, f"file {n} of {len(files)} in name order", False) for n, p in enumerate(files, 1)]

    def _sort(self, path: Path, what: str, typed: bool) -> None:
        from . import nifti, raster

        with open(path, "rb") as f:
            head = f.read(4096)
        name = path.name.lower()
        if head[128:132] == b"DICM":
            self.dicoms.append(path)
        elif not head and (typed or name.endswith(ENDINGS)):
            self.refused.append((what, FileError(f"{what} is empty", "TRUNCATED")))
        elif raster.kind(head):
            self.loose.append((path, what, self._raster, typed))
        elif nifti.kind(path, head):
            if typed or not nifti.has_header_beside(path):  # in a folder the header speaks for both halves
                self.loose.append((path, what, self._nifti, typed))
        elif _is_dicom(path):
            self.dicoms.append(path)
        elif typed or name.endswith(ENDINGS):  # it says that it is an image
            self.refused.append((what, FileError(f"{what} is in no known format", "UNKNOWN_FORMAT")))
        else:
            self.skipped += 1

    def _raster(self, path, what, ids):
        from .raster import read_raster

        return ids(read_raster(path, what, "x", modality=self.modality, keep=self.keep))

    def _nifti(self, path, what, ids):
        from .nifti import read_nifti

        return ids(read_nifti(path, what, "x", affine=self.affine, modality=self.modality, keep=self.keep))

    def ids(self, taken: Sequence[str] = ()) -> Callable:
        """Gives images their ids: modality and number, counted over one study; -t and -p of a file's parts stay."""
        count: Counter[str] = Counter()

        def number(images):
            word = "image" if images[0].modality == "unknown" else images[0].modality
            count[word] += 1
            while f"{word}-{count[word]}" in taken:
                count[word] += 1
            for i in images:
                i.id = f"{word}-{count[word]}{i.id[1:]}"
            return images

        return number

    def dicom(self, policy: str) -> list[Study]:
        from .dicom import read_dicom

        try:
            return list(read_dicom(self.dicoms, policy))
        except MedVLMError as e:
            self.refused.append((self.what, type(e)(f"{self.what}: {e.message}", e.code, e.hint)))
        except OSError as e:
            self.refused.append((self.what, _os_error(e, f"a DICOM file of {self.what}")))
        return []

    def leave_out(self) -> None:
        """Beside DICOM, keep only the other files that the caller named: nothing says whose the rest are."""
        there, self.loose = self.loose, [f for f in self.loose if f[3]]
        if n := len(there) - len(self.loose):
            self.notes.append(f"LEFT_OUT: {n} NIfTI or picture files beside the DICOM were left out; read them by name")

    def together(self, taken: Sequence[str] = ()) -> Study | None:
        """All other images as one study; ``taken`` are ids they must not get."""
        ids, images, files = self.ids(taken), [], []
        for path, what, reader, _ in self.loose:
            try:
                images += reader(path, what, ids)
                files.append(path)
            except MedVLMError as e:
                self.refused.append((what, e))
            except OSError as e:
                self.refused.append((what, _os_error(e, what)))
        return Study(_file_id(files), images=images) if images else None

    def raise_if_empty(self, found: Sequence[Study]) -> None:
        if found:
            return
        if not self.refused:
            kind = f" ({self.skipped} files are no images)" if self.skipped else ""
            raise FileError(f"{self.what} holds no images{kind}", "EMPTY_FOLDER")
        error = self.refused[0][1]
        if len(self.refused) > 1:
            error = type(error)(f"{error.message}; {len(self.refused) - 1} more were refused", error.code, error.hint)
        raise error


def _finish(study: Study, batch: _Batch, modality, spacing, affine) -> Study:
    """Tell the images what the caller knows, and tie the files of an archive to the life of the pixels."""
    warnings = [*study._warnings, *batch.notes, *(f"{e.code}: {e.message}" for _, e in batch.refused)]
    for image in study.images:
        if modality is not None:
            image.modality = modality
        if spacing is not None:
            _set_spacing(image, spacing)
        if affine is not None and (isinstance(image, Image) or image.info.get("format") is None):
            raise UsageError(f"affine= is for volumes that do not say where they lie, and image {image.id} is not one", "BAD_ARGUMENT")
        if isinstance(image._array, Lazy):
            image._array.load = _guard(image._array.load, f"the file behind image {image.id}", batch.scratch)
    return Study(study.id, study.patient, study.images, study.report, warnings)


def _guard(load: Callable, what: str, held: list[Scratch]) -> Callable:
    """``load`` with named errors; it holds on to the folders that an archive was unpacked to."""

    def guarded(held=held):
        try:
            return load()
        except OSError as e:
            raise _os_error(e, what) from e

    return guarded


def _set_spacing(image, spacing) -> None:
    if isinstance(image, Volume):
        raise UsageError(f"spacing= is for pictures; image {image.id} is a volume", "BAD_ARGUMENT", "pass affine= instead")
    told = (float(spacing[0]), float(spacing[1]))
    if image.spacing is not None and not np.allclose(image.spacing, told, rtol=1e-3):
        image.info["warnings"].append(f"SPACING: {told} mm was told, the file says {image.spacing} mm; what was told is used")
    image.spacing = told


def _nothing(id: str, error: Exception, what: str) -> Study:
    e = error if isinstance(error, MedVLMError) else _os_error(error, what)
    return Study(id, warnings=[f"{e.code}: {e.message}"])


def _check_arguments(policy, modality, spacing) -> None:
    if policy not in POLICIES:
        raise UsageError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}", "BAD_ARGUMENT")
    if modality is not None and modality not in MODALITIES:
        raise UsageError(f"modality must be one of {', '.join(MODALITIES)}, not {modality!r}", "BAD_ARGUMENT")
    if spacing is not None and (np.shape(spacing) != (2,) or not np.all(np.isfinite(spacing)) or min(spacing) <= 0):
        raise UsageError(f"spacing must be two lengths in mm (H, W), not {spacing!r}", "BAD_ARGUMENT")


def _from_array(array: np.ndarray, modality, spacing, affine) -> Study:
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8 or 0 in array.shape:
        raise UsageError(f"an image is a filled array of numbers, not {array.dtype} {array.shape}", "BAD_ARGUMENT")
    array = array.astype(np.uint8 if array.dtype == bool else array.dtype.newbyteorder("="), copy=False)
    modality = modality or "unknown"
    unit = "uint8" if array.dtype == np.uint8 else "HU" if modality == "ct" else "raw"
    notes = []
    if array.dtype.kind == "f" and (bad := int(array.size - np.count_nonzero(np.isfinite(array)))):
        notes.append(f"NOT_FINITE: {bad} of {array.size} values are NaN or infinite")
    id = f"{'image' if modality == 'unknown' else modality}-1"
    shape = " x ".join(map(str, array.shape))
    if affine is None:
        if array.ndim == 2:
            array = array[None]
        if array.ndim != 3 or array.shape[0] not in (1, 3):
            hint = "pass affine= for a volume (D, H, W) or (C, D, H, W)"
            if array.ndim == 3 and array.shape[2] in (3, 4):
                hint = "colour comes first: array.transpose(2, 0, 1); " + hint
            raise UsageError(f"an array of {shape} without affine= is not an image (H, W), (1, H, W) or (3, H, W)", "BAD_ARGUMENT", hint)
        images = [Image(id, array, spacing, modality, unit, {"warnings": notes})]
    else:
        if spacing is not None:
            raise UsageError("pass spacing= for an image or affine= for a volume, not both", "BAD_ARGUMENT")
        if array.ndim == 3:
            array = array[None]
        if array.ndim != 4 or array.shape[0] not in (1, 3):
            raise UsageError(f"an array of {shape} with affine= is not a volume (D, H, W), (1, D, H, W) or (3, D, H, W)", "BAD_ARGUMENT")
        images = [Volume(id, array, affine, modality, unit, {"warnings": notes})]
    digest = hashlib.blake2b(repr((array.shape, array.dtype.str)).encode(), digest_size=5)
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8)[:HASHED].data)
    return Study(f"study-{digest.hexdigest()}", images=images)


def _file_id(paths: Sequence[Path], fallback: str = "") -> str:
    """'study-' and ten hex digits made from the content of the files, in any order; never from their names."""
    parts = []
    for path in paths:
        one = hashlib.blake2b(digest_size=16)
        try:
            with open(path, "rb") as f:
                one.update(f.read(HASHED))
                one.update(str(os.fstat(f.fileno()).st_size).encode())
        except OSError:
            return _text_id(fallback)
        parts.append(one.digest())
    return f"study-{hashlib.blake2b(b''.join(sorted(parts)), digest_size=5).hexdigest()}"


def _text_id(text: str) -> str:
    return f"study-{hashlib.blake2b(text.encode(), digest_size=5).hexdigest()}"


def _is_dicom(path: Path) -> bool:
    from .dicom import is_dicom

    return is_dicom(path)


def _list(found: Sequence[Study]) -> str:
    shown = ", ".join(f"{s.id} ({len(s.images)} images)" for s in found[:20])
    return shown + (f" and {len(found) - 20} more" if len(found) > 20 else "")


def _os_error(e: OSError, what: str) -> FileError:
    code = "NOT_FOUND" if isinstance(e, FileNotFoundError) else "UNREADABLE"
    return FileError(f"{what} cannot be opened ({e.strerror or type(e).__name__})", code)
