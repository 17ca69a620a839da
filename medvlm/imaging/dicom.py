"""DICOM files to studies: the hospital's images with their geometry, pixels read when first used.

Values are those after the modality LUT; windows, VOI tables and MONOCHROME1 are carried in ``info`` and applied only
for display and model input. Pixel padding stays in the values, CT padding outside the scanner too: ``info["padding"]``
gives its range in the unit of the values, and every window clips it away.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ..errors import FileError, GeometryError, MedVLMError, UsageError
from . import dicom_fast, limits
from .dicom_header import Header, frames, parsed, quiet, read_header
from .dicom_info import SECONDARY, STACKED, described, hounsfield, judge, modality, plane_spacing
from .dicom_pixels import Layout, layout, load
from .dicom_stack import POLICIES, Slice, Stack, arrange, plane_affine, split
from .scan import Image, Lazy, Study, Volume

NO_IMAGE = frozenset(
    "SEG RTSTRUCT RTPLAN RTDOSE RTRECORD RTINTENT SR PR KO DOC REG FID ANN ECG EPS HD AU RESP EEG EMG EOG POS PLAN RWV SMR STAIN SEGLABEL M3D TEXTUREMAP".split()
)
_NO_IMAGE_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.66.", "1.2.840.10008.5.1.4.1.1.88.", "1.2.840.10008.5.1.4.1.1.9.", "1.2.840.10008.5.1.4.1.1.11.",
    "1.2.840.10008.5.1.4.1.1.30", "1.2.840.10008.5.1.4.1.1.67", "1.2.840.10008.5.1.4.1.1.104.", "1.2.840.10008.5.1.4.1.1.91.",
    "1.2.840.10008.5.1.4.1.1.481.2", "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.481.5", "1.2.840.10008.5.1.4.1.1.481.8",
)  # fmt: skip
"""Segmentations and surfaces, reports, waveforms, presentation states, parametric maps, documents, annotations, RT dose, structures and plans."""

_DIRECTORY = "1.2.840.10008.1.3.10"
AIR_HU = -1024
"""What policy "fill" puts into CT slices that are not there."""


def is_dicom(path) -> bool:
    """Whether the file is DICOM: a Part-10 preamble, or a data set without one whose first attributes make sense."""
    try:
        with open(path, "rb") as file:
            head = file.read(132)
            if head[128:] == b"DICM":
                return True
            return _headless(head, Path(path).stat().st_size)
    except OSError:
        return False


def _headless(head: bytes, size: int) -> bool:
    """Whether the bytes start like a data set: group 2 or 8, known representations or plausible lengths, tags that rise."""
    for order in "<>":
        at, last, seen, explicit = 0, -1, 0, head[4:6] in dicom_fast.SHORT or head[4:6] in dicom_fast.LONG
        while at + 12 <= len(head) and seen < 3:
            group, element = struct.unpack_from(order + "HH", head, at)
            vr, tag = head[at + 4 : at + 6], group << 16 | element
            if tag <= last or (last < 0 and group not in (2, 8)) or group > 0x28:
                break
            if not explicit:
                length, at = struct.unpack_from(order + "I", head, at + 4)[0], at + 8
            elif vr in dicom_fast.SHORT:
                length, at = struct.unpack_from(order + "H", head, at + 6)[0], at + 8
            elif vr in dicom_fast.LONG:
                length, at = struct.unpack_from(order + "I", head, at + 8)[0], at + 12
            else:
                break
            if length == dicom_fast.UNDEFINED or at + length > size:
                break
            at, last, seen = at + length, tag, seen + 1
        else:
            if seen >= 2:
                return True
    return False


@quiet()
def read_dicom(files: Iterable[Path], policy: str = "strict") -> list[Study]:
    """The studies that these files hold, in a stable order; a DICOMDIR stands for the files it names.

    Args:
        files: of any series and studies, in any order.
        policy: "strict" refuses series that do not fill space evenly; "fill" inserts empty slices where some are
            missing; "resample" interpolates onto even spacing. Both say so in the image's warnings.

    Each image's ``info`` holds: windows [(centre, width, explanation)], voi_function, voi_lut [{first, bits, values,
    explanation}], code (Modality), inverted, padding (low, high), laterality, view, body_part, burned_in (True, False, None), frame_of_reference,
    sop and files (one a slice; None for a filled slice), frames (number in its file, from 1), series, series_number,
    patient_position, lossy, phase {attribute: value}, affine (4, 4) of a single slice, filled [slice], tilt, warnings.
    A CT with a rescale has float32 voxels in HU; other values keep the smallest exact type.

    A series that is refused becomes a study warning "CODE: text".

    Raises:
        FileError, GeometryError: the first refusal, when no image is left. UNSAFE_PATH: a DICOMDIR leaves its folder.
        UsageError: BAD_ARGUMENT for an unknown policy.
    """
    if policy not in POLICIES:
        raise UsageError(f"policy is {policy!r}; it can be {', '.join(POLICIES)}", "BAD_ARGUMENT")
    files = list(files)
    found: dict[str, dict[str, list[list[Slice]]]] = {}
    refused: list[tuple[str, MedVLMError]] = []
    damaged: dict[tuple[str, str], MedVLMError] = {}
    queue = list(enumerate(files, 1))
    for ordinal, path in queue:
        study = series = ""
        try:
            head = read_header(path)
            if _is_directory(head):
                named, known = _referenced(head, Path(path)), {Path(p).resolve() for _, p in queue}
                queue += [(ordinal, p) for p in named if p.resolve() not in known]
                if not named and len(files) == 1:
                    raise FileError("none of the files that the DICOMDIR names is there", "NOT_FOUND")
                continue
            study, series = head.text("StudyInstanceUID"), head.text("SeriesInstanceUID")
            _check_image(head)
            slices = _slices(head)
            found.setdefault(study, {}).setdefault(series, []).append(slices)
        except MedVLMError as error:
            if error.code == "UNSAFE_PATH":
                raise
            if error.code != "NOT_AN_IMAGE" and series:
                damaged.setdefault((study, series), error)
            where = f"file {ordinal} of {len(files)}: " if len(files) > 1 else ""
            refused.append((study, type(error)(where + error.message, error.code, error.hint)))
    studies = []
    for uid, series in sorted(found.items()):
        lost = [s for s in sorted(series) if (uid, s) in damaged and policy == "strict" and not _stands_alone(series[s])]
        images, warnings, errors = _images({s: files for s, files in series.items() if s not in lost}, policy)
        for s in lost:  # a series without one of its slices is not the series
            count, error = len(series[s]), damaged[uid, s]
            errors.append(_named(type(error)(f"its {count} other slice(s) were refused with the damaged one", error.code, error.hint), series[s][0]))
        errors = [e for u, e in refused if u in (uid, "")] + errors
        if images:
            first = images[0][1][0].head
            identity = uid or "|".join(sorted(series)) or first.text("SOPInstanceUID") or _content(first)
            patient = first.text("PatientID")
            warnings += [f"{e.code}: {e.message}" for e in errors]
            study = Study(f"study-{_hash(identity)}", f"p-{_hash(patient)}" if patient else None, [i for i, _ in images], None, warnings)
            studies.append(study)
        else:
            refused += [(uid, e) for e in errors if (uid, e) not in refused]
    if not studies:
        raise refused[0][1] if refused else FileError("there is no DICOM file to read", "NOT_AN_IMAGE")
    return studies


def _hash(text: str) -> str:
    return blake2b(text.encode(), digest_size=5).hexdigest()


def _content(head: Header) -> str:
    with open(head.file.path, "rb") as file:
        return blake2b(file.read(1 << 20)).hexdigest()


def _is_directory(head: Header) -> bool:
    dataset = head.file.dataset
    if dataset is None:
        return False
    meta = getattr(dataset, "file_meta", None)
    kind = meta.get_item(0x00020002).value if meta is not None and 0x00020002 in meta else b""
    return "DirectoryRecordSequence" in dataset or str(kind if isinstance(kind, str) else kind.decode("latin-1")).strip("\0 ") == _DIRECTORY


def _referenced(head: Header, path: Path) -> list[Path]:
    """The files that a DICOMDIR names and that are there."""
    folder, there = path.resolve().parent, []

    def names(record) -> list[str]:
        value = record.get("ReferencedFileID") or []
        return [value] if isinstance(value, str) else [str(v) for v in value]

    for parts in parsed("the DICOMDIR", lambda: [names(r) for r in head.file.dataset.get("DirectoryRecordSequence") or ()]):
        target = folder.joinpath(*(p.replace("\\", "/").replace("\0", "/..") for p in parts))
        if ".." in target.parts or any(p.startswith(("/", "\\")) or ":" in p for p in parts) or not target.resolve().is_relative_to(folder):
            raise FileError("the DICOMDIR names a file outside its own folder", "UNSAFE_PATH")
        if parts and target.is_file():
            there.append(path.parent / target.relative_to(folder))
    return there


def _check_image(head: Header) -> None:
    kind, code = head.text("SOPClassUID"), head.text("Modality")
    if kind.startswith(_NO_IMAGE_CLASSES) or code in NO_IMAGE:
        raise FileError(f"the object is no image but {code if code in NO_IMAGE else 'of another kind'}", "NOT_AN_IMAGE")
    if head.file.offset is None:
        if _cut(head):
            raise FileError("the file ends before its pixel data", "TRUNCATED")
        raise FileError("the object holds no pixels", "NOT_AN_IMAGE")


def _cut(head: Header) -> bool:
    """Whether the last attribute reaches beyond the end of the file, or the first bytes of another one follow it."""
    dataset, file = head.file.dataset, head.file
    last = parsed("the header", lambda: dataset.get_item(max(dataset.keys())) if len(dataset) else None)
    if file.deflated or not hasattr(last, "value_tell") or not hasattr(last, "length"):
        return False
    return last.length != dicom_fast.UNDEFINED and last.value_tell + last.length != file.size


def _slices(head: Header) -> list[Slice]:
    """The frames of one file, once it is sure that the file can hold them."""
    count = head.whole("NumberOfFrames", 1)
    layout(head, False, max(1, count))
    strict = count > 1 or head.text("Modality") in STACKED and not head.text("SOPClassUID").startswith(SECONDARY)
    return [Slice(h, i, strict) for i, h in enumerate(frames(head))]


def _images(series: dict[str, list[list[Slice]]], policy: str):
    """[(image, its slices)], warnings and errors of one study; ids are numbered in the order of series number, then UID."""
    images, warnings, errors = [], [], []
    counts: dict[str, int] = {}

    def number(uid):
        label = min((files[0].head.count("SeriesNumber") for files in series[uid] if files[0].head.count("SeriesNumber") is not None), default=None)
        return label is None, label or 0, uid

    for uid in sorted(series, key=number):
        for group in _objects(series[uid]):
            parts: list = []
            try:
                if _stacks(group):
                    parts, said = split(group)
                    warnings += said
                else:
                    parts = [([s], {}) for s in group]
            except MedVLMError as error:
                errors.append(_named(error, group))
            for slices, phase in parts:
                try:
                    made = [_volume(a, policy, p) for a, p in _refine(slices, phase, policy)] if len(slices) > 1 else [_image(slices[0], phase)]
                except MedVLMError as error:
                    errors.append(_named(error, slices))
                    continue
                for image, used in made:
                    counts[image.modality] = counts.get(image.modality, 0) + 1
                    image.id = f"{image.modality}-{counts[image.modality]}"
                    images.append((image, used))
    return images, warnings, errors


def _named(error: MedVLMError, slices: list[Slice]) -> MedVLMError:
    head = slices[0].head
    number = head.count("SeriesNumber")
    which = f"{modality(head)} series" + ("" if number is None else f" {number}")
    return type(error)(f"{which}: {error.message}", error.code, error.hint)


def _objects(files: list[list[Slice]]) -> list[list[Slice]]:
    """Single-frame files of a series together; captures and multi-frame files alone or with those of their concatenation."""
    groups: dict[str, list[Slice]] = {}
    for slices in files:
        head = slices[0].head
        key = head.text("ConcatenationUID")
        if not key and (len(slices) > 1 or head.text("SOPClassUID").startswith(SECONDARY)):
            key = head.text("SOPInstanceUID") + str(head.file.path)
        groups.setdefault(key, []).extend(slices)
    return [sorted(groups[key], key=lambda s: s.order) for key in sorted(groups)]


def _stands_alone(files: list[list[Slice]]) -> bool:
    """Whether each file of a series is a picture or a volume of its own."""
    return len(files) > 0 and (len(files[0]) > 1 or files[0][0].head.text("Modality") not in STACKED)


def _stacks(slices: list[Slice]) -> bool:
    """Whether these frames are meant as slices of one volume, and not as pictures of their own."""
    head = slices[0].head
    if len(slices) == 1 or head.text("SOPClassUID").startswith(SECONDARY):
        return False
    if all(s.head.file is head.file for s in slices):
        return all(s.position is not None for s in slices)
    return head.text("Modality") in STACKED


def _refine(slices: list[Slice], phase: dict, policy: str) -> list[tuple[Stack, dict]]:
    """The stack; or, when it is uneven as a whole but each of its acquisitions is even, one stack an acquisition."""
    fill = f"{AIR_HU} HU" if hounsfield(slices[0].head) else "0"
    try:
        return [(arrange(slices, "strict", _same, fill), phase)]
    except GeometryError as error:
        runs: dict[int | None, list[Slice]] = {}
        for s in slices:
            runs.setdefault(s.head.count("AcquisitionNumber"), []).append(s)
        if error.code in ("GAP", "UNEVEN_SPACING") and len(runs) > 1 and None not in runs and min(map(len, runs.values())) >= 3:
            try:
                stacks = [(arrange(runs[n], "strict", _same, fill), {**phase, "AcquisitionNumber": n}) for n in sorted(runs)]
            except GeometryError:
                pass  # the acquisitions are no better than the whole: the first error says what is wrong
            else:
                for stack, _ in stacks:
                    stack.warnings.append(f"ACQUISITIONS: as a whole {error.message}; each of the {len(runs)} acquisitions was read by itself")
                return stacks
        if policy == "strict":
            raise
    return [(arrange(slices, policy, _same, fill), phase)]


def _same(a: Slice, b: Slice) -> bool:
    values = []
    for s in (a, b):
        own = layout(s.head, hounsfield(s.head))
        values.append(load([(s.head, s.number)], [own], own.dtype)[0])
    return np.array_equal(*values)


def _volume(stack: Stack, policy: str, phase: dict) -> tuple[Image | Volume, list[Slice]]:
    slices = stack.slices
    if len(slices) == 1:
        image, used = _image(slices[0], phase)
        image.info["warnings"][:0] = stack.warnings
        return image, used
    layouts = _layouts(slices)
    dtype, unit, info = described(slices, layouts, phase)
    info["warnings"][:0] = stack.warnings
    info["tilt"] = stack.tilt
    near = [None if p is None else p[0] if p[0] == p[1] else None for p in stack.planes]
    for name in ("sop", "files", "frames"):
        info[name] = [None if i is None else info[name][i] for i in near]
    info["filled"] = [i for i, p in enumerate(stack.planes) if p is None]
    if any(p is not None and p[0] != p[1] for p in stack.planes):
        dtype = np.dtype(np.float32)
    shape = (layouts[0].channels, len(stack.planes), layouts[0].rows, layouts[0].columns)
    limits.check_size(shape, dtype, sum(s.head.file.size for s in {id(s.head.file): s for s in slices}.values()), f"a series of {len(slices)} slices")
    heads = [(s.head, s.number) for s in slices]
    empty = AIR_HU if unit == "HU" else 0

    def read() -> np.ndarray:
        values, low, high = load(heads, layouts, dtype)
        judge(slices[0].head, unit, layouts[0], low, high, info["warnings"])
        if stack.plain:
            return values
        out = np.full(shape, empty, dtype)
        for plane, parts in enumerate(stack.planes):
            if parts is not None:
                a, b, weight = parts
                out[:, plane] = values[:, a] if a == b else values[:, a] * np.float32(1 - weight) + values[:, b] * np.float32(weight)
        return out

    return Volume("", Lazy(shape, dtype, read), stack.affine, modality(slices[0].head), unit, info), slices


def _image(slice: Slice, phase: dict) -> tuple[Image, list[Slice]]:
    head = slice.head
    layouts = _layouts([slice])
    dtype, unit, info = described([slice], layouts, phase)
    mm, said = plane_spacing(head)
    info["warnings"] += said
    if slice.position is not None:
        info |= {"affine": plane_affine(slice, mm)} if mm else {}
    elif slice.doubt:
        info["warnings"].append(f"GEOMETRY_UNKNOWN: {slice.doubt}")
    elif head.text("Modality") in STACKED and not head.text("SOPClassUID").startswith(SECONDARY):
        info["warnings"].append("GEOMETRY_UNKNOWN: the slice has no position in the patient")
    own = layouts[0]

    def read() -> np.ndarray:
        values, low, high = load([(head, slice.number)], layouts, dtype)
        judge(head, unit, own, low, high, info["warnings"])
        return values[:, 0]

    shape = (own.channels, own.rows, own.columns)
    return Image("", Lazy(shape, dtype, read), mm, modality(head), unit, info), [slice]


def _layouts(slices: list[Slice]) -> list[Layout]:
    return [layout(s.head, hounsfield(s.head)) for s in slices]
