"""What a DICOM file says before its pixels: raw values of the attributes the reader needs, however it is encoded.

Both ways in (the fast path and pydicom) end in the same undecoded bytes, so numbers and texts are interpreted in one
place, strictly: a decimal comma, a NaN or a letter in a number is an error, never a guess.
"""

from __future__ import annotations

import logging
import math
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from ..errors import FileError, GeometryError, MedVLMError
from . import dicom_fast

# How raw bytes become values: text, n = decimal or integer string, or a struct code; x = US or SS by PixelRepresentation.
_TABLE = {
    "text": """00080008 ImageType, 00080016 SOPClassUID, 00080018 SOPInstanceUID, 00080060 Modality,
        00080005 SpecificCharacterSet, 0008103E SeriesDescription, 00100020 PatientID, 00180015 BodyPartExamined,
        00185100 PatientPosition, 00185101 ViewPosition, 0020000D StudyInstanceUID, 0020000E SeriesInstanceUID,
        00200052 FrameOfReferenceUID, 00200060 Laterality, 00200062 ImageLaterality, 00209072 FrameLaterality,
        00209056 StackID, 00280004 PhotometricInterpretation, 00280301 BurnedInAnnotation, 00281054 RescaleType,
        00281055 WindowCenterWidthExplanation, 00281056 VOILUTFunction, 00282110 LossyImageCompression,
        00209161 ConcatenationUID, 00089007 FrameType""",
    "n": """00180050 SliceThickness, 00180081 EchoTime, 00180082 InversionTime, 00180086 EchoNumbers, 00181060 TriggerTime,
        00181164 ImagerPixelSpacing, 00181314 FlipAngle, 00200011 SeriesNumber,
        00200012 AcquisitionNumber, 00200013 InstanceNumber, 00200032 ImagePositionPatient, 00200037 ImageOrientationPatient,
        00200100 TemporalPositionIdentifier, 00280008 NumberOfFrames, 00280030 PixelSpacing, 00281050 WindowCenter,
        00281051 WindowWidth, 00281052 RescaleIntercept, 00281053 RescaleSlope, 00541300 FrameReferenceTime""",
    "H": """00280002 SamplesPerPixel, 00280006 PlanarConfiguration, 00280010 Rows, 00280011 Columns, 00280100 BitsAllocated,
        00280101 BitsStored, 00280102 HighBit, 00280103 PixelRepresentation, 00209156 FrameAcquisitionNumber""",
    "x": "00280120 PixelPaddingValue, 00280121 PixelPaddingRangeLimit",
    "I": "00209128 TemporalPositionIndex, 00209157 DimensionIndexValues",
    "d": """00189082 EffectiveEchoTime, 00189087 DiffusionBValue, 00189089 DiffusionGradientOrientation,
        00209153 NominalCardiacTriggerDelayTime""",
}  # fmt: skip
TAGS = {n: (int(t, 16), kind) for kind, row in _TABLE.items() for t, n in (e.split() for e in row.split(","))}
WANTED = frozenset(tag for tag, _ in TAGS.values())
SEQUENCES = frozenset((0x00041220, 0x00186011, 0x00283000, 0x00283010, 0x52009229, 0x52009230, 0x7FE00008, 0x7FE00009))
"""Directory records, ultrasound regions, modality and VOI tables, functional groups, float pixels: pydicom's work."""

DEFLATED = b"1.2.840.10008.1.2.1.99"
HEADER_BYTES = 8 << 20
"""A deflated header is unpacked up to here, no further."""

_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class File:
    """One file on disk, shared by the headers of its frames.

    ``offset`` and ``length`` place the pixel data (length None = encapsulated); ``size`` is where the data end.
    ``dataset`` is the pydicom header where one was needed, else None.
    """

    __slots__ = ("dataset", "deflated", "fast", "length", "little", "offset", "path", "size", "syntax", "vr")

    def __init__(self, path, syntax, offset, length, size, little=True, deflated=False, vr="OW", dataset=None, fast=False):
        self.path, self.syntax, self.offset, self.length, self.size = path, syntax, offset, length, size
        self.little, self.deflated, self.vr, self.dataset, self.fast = little, deflated, vr, dataset, fast

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the data set (unpacked when it is deflated, no further than needed)."""
        with open(self.path, "rb") as file:
            if self.deflated:
                return inflated(file.read(), offset + length)[offset:]
            file.seek(offset)
            return file.read(length)


class Header:
    """The attributes of one frame: those of its file, overlaid with its functional groups."""

    __slots__ = ("file", "values")

    def __init__(self, file: File, values: dict[int, bytes]):
        self.file, self.values = file, values

    def raw(self, name: str) -> bytes:
        return self.values.get(TAGS[name][0], b"")

    def texts(self, name: str) -> tuple[str, ...]:
        """Values of a text attribute, () when absent or empty."""
        return _texts(self.raw(name))

    def text(self, name: str) -> str:
        """First value, "" when absent."""
        return (_texts(self.raw(name)) or ("",))[0]

    def numbers(self, name: str, code: str = "BAD_VALUE") -> tuple[float, ...]:
        """Values of a numeric attribute, () when absent or empty.

        Raises:
            GeometryError or FileError with ``code``: a value is not a finite number.
        """
        value, kind = self.raw(name), TAGS[name][1]
        if not value:
            return ()
        numbers = _decimals(value) if kind == "n" else _binary(value, self._code(kind), self.file.little)
        if numbers is None or not all(map(math.isfinite, numbers)):
            shown = value.rstrip(b"\0 ").decode("latin-1")
            said = f"is {shown!r}" if re.fullmatch(r"[0-9.,eE+\-\\ ]{1,48}|nan|inf", shown, re.I) else "is text"
            error = GeometryError if code == "BAD_SPACING" else FileError
            raise error(f"{name} {said}, not a number", code)
        return numbers

    def number(self, name: str, default: float | None = None) -> float | None:
        return (self.numbers(name) or (default,))[0]

    def whole(self, name: str, default: int | None = None) -> int | None:
        value = self.number(name)
        if value is not None and value != int(value):
            raise FileError(f"{name} is {value}, not a whole number", "BAD_VALUE")
        return default if value is None else int(value)

    def count(self, name: str) -> int | None:
        """A number that only labels: None when it makes no sense."""
        shown = self.text(name)
        return int(shown) if shown.isascii() and shown.removeprefix("-").isdigit() else None

    def _code(self, kind: str) -> str:
        return ("h" if self.whole("PixelRepresentation", 0) else "H") if kind == "x" else kind


@lru_cache(4096)
def _texts(value: bytes) -> tuple[str, ...]:
    text = value.rstrip(b"\0 ").decode("latin-1")
    return tuple(part.strip("\0 ") for part in text.split("\\")) if text else ()


@lru_cache(4096)
def _decimals(value: bytes) -> tuple[float, ...] | None:
    parts = value.rstrip(b"\0 ").split(b"\\")
    if parts == [b""]:
        return ()
    parts = [part.strip(b"\0 ") for part in parts]
    return tuple(map(float, parts)) if all(map(_NUMBER.fullmatch, parts)) else None


@lru_cache(4096)
def _binary(value: bytes, code: str, little: bool) -> tuple[float, ...] | None:
    count, rest = divmod(len(value), struct.calcsize("<" + code))
    return None if rest else struct.unpack(f"{'<' if little else '>'}{count}{code}", value)


def read_header(path) -> Header:
    """The header of one file; pixels stay on disk.

    Raises:
        FileError: CORRUPT, TRUNCATED, UNREADABLE.
    """
    try:
        found = dicom_fast.header(path, WANTED, SEQUENCES)
    except OSError:
        raise FileError("a file cannot be opened", "UNREADABLE") from None
    if found is not None:
        syntax, values, offset, length, size = found
        head = Header(File(path, syntax.decode(), offset, length, size, fast=True), values)
        if _plain(head):
            return head
    return by_pydicom(path)


def _plain(head: Header) -> bool:
    """Whether the fast path can serve the pixels too: one frame, one sample, whole bytes, all of it there."""
    unsigned = {name: _binary(head.raw(name), "H", True) for name in ("SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")}  # fmt: skip
    if any(value is None or len(value) != 1 for value in unsigned.values()):
        return False
    samples, rows, columns, allocated, stored, high, signed = (value[0] for value in unsigned.values())
    need, file = rows * columns * allocated // 8, head.file
    return (
        samples == 1
        and head.text("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
        and allocated in (8, 16)
        and 0 < stored <= allocated
        and high == stored - 1
        and signed in (0, 1)
        and head.raw("NumberOfFrames").strip(b"\0 ") in (b"", b"1")
        and need <= file.length <= need + 1
        and file.offset + need <= file.size
        and head.raw("SeriesDescription").isascii()
    )


def by_pydicom(path) -> Header:
    """A header read by pydicom, whose data set ``file.dataset`` is.

    Raises:
        FileError: CORRUPT, TRUNCATED. OSError when it cannot be opened.
    """
    pydicom = import_pydicom()
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        stream: Any = file
        first = file.read(dicom_fast.FIRST_READ)
        start = dicom_fast.meta(first)
        deflated = start is not None and start[0] == DEFLATED
        if deflated:  # pydicom would unpack all of it, however large
            file.seek(0)
            stream = BytesIO(inflated(file.read(), HEADER_BYTES))
        stream.seek(0)
        dataset = parsed("the header", lambda: pydicom.dcmread(stream, stop_before_pixels=True, force=True))
        implicit, little = dataset.original_encoding
        values = parsed("the header", lambda: _values(dataset))
        syntax = parsed("the file meta", lambda: str(dataset.file_meta.get("TransferSyntaxUID", "")))
        offset = stream.tell()
        mark = stream.read(12)
    syntax = syntax or {(True, True): "1.2.840.10008.1.2", (False, True): "1.2.840.10008.1.2.1"}.get((implicit, little), "1.2.840.10008.1.2.2")  # fmt: skip
    kept = File(path, syntax, None, None, size, little, deflated, "OW", dataset)
    order = "<" if little else ">"
    if len(mark) >= 8 and struct.unpack(order + "HH", mark[:4]) in ((0x7FE0, 8), (0x7FE0, 9), (0x7FE0, 0x10)):
        if implicit:
            length, kept.offset = struct.unpack(order + "I", mark[4:8])[0], offset + 8
        elif mark[4:6] in dicom_fast.LONG and len(mark) == 12:
            length, kept.offset, kept.vr = struct.unpack(order + "I", mark[8:12])[0], offset + 12, mark[4:6].decode()
        else:
            raise FileError("the start of its pixel data makes no sense", "CORRUPT")
        kept.length = None if length == dicom_fast.UNDEFINED else length
    return Header(kept, values)


def _values(dataset) -> dict[int, bytes]:
    """Undecoded values of the wanted attributes of a pydicom data set."""
    found = {}
    for tag in WANTED:
        if tag not in dataset:
            continue
        element = dataset.get_item(tag)
        value = element.value
        if not isinstance(value, bytes | None):  # pydicom has converted it already
            parts = value if isinstance(value, list | tuple) or hasattr(value, "append") else [value]
            if element.VR in ("US", "SS", "UL", "FD"):
                order = "<" if dataset.original_encoding[1] in (True, None) else ">"
                value = b"".join(struct.pack(order + {"US": "H", "SS": "h", "UL": "I", "FD": "d"}[element.VR], v) for v in parts)
            else:
                value = "\\".join(map(str, parts)).encode("latin-1", "replace")
        if value:
            found[tag] = value
    return found


def frames(head: Header) -> list[Header]:
    """One header a frame, in file order; functional groups overlay the file's own attributes.

    Raises:
        FileError: BAD_VALUE when the number of frames is no count or contradicts the functional groups.
    """
    count = head.whole("NumberOfFrames", 1)
    if count < 1:
        raise FileError(f"NumberOfFrames is {count}", "BAD_VALUE")
    dataset = head.file.dataset
    if dataset is None or "PerFrameFunctionalGroupsSequence" not in dataset and "SharedFunctionalGroupsSequence" not in dataset:
        return [head] * count
    shared, each = (
        parsed(name, lambda: [_groups(item) for item in dataset.get(name) or ()])  # noqa: B023
        for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
    )
    if each and len(each) != count:
        raise FileError(f"NumberOfFrames is {count} but {len(each)} frames are described", "BAD_VALUE")
    common = {**head.values, **(shared[0] if shared else {})}
    return [Header(head.file, {**common, **(each[i] if each else {})}) for i in range(count)]


def parsed(what: str, work: Callable[[], Any]) -> Any:
    """What ``work`` makes of a pydicom data set.

    Raises:
        FileError: CORRUPT instead of the many kinds the parser raises, whose texts may quote the patient.
    """
    try:
        return work()
    except MedVLMError:
        raise
    except RecursionError:
        raise FileError(f"{what}: sequences are nested too deeply to be genuine", "CORRUPT") from None
    except Exception as error:
        raise FileError(f"{what} cannot be parsed ({type(error).__name__})", "CORRUPT") from None


def _groups(item) -> dict[int, bytes]:
    """The attributes of all functional groups of one item, flat."""
    found: dict[int, bytes] = {}
    for tag in item:
        if getattr(tag, "VR", "") == "SQ" and len(tag.value) and not tag.tag.is_private:
            found.update(_values(tag.value[0]))
    return found


def inflated(data: bytes, most: int) -> bytes:
    """A deflated file as an explicit little-endian one, unpacked up to ``most`` bytes.

    Raises:
        FileError: CORRUPT when the stream is damaged.
    """
    start = dicom_fast.meta(data[: dicom_fast.FIRST_READ])[1]
    plain = data[:start].replace(DEFLATED, dicom_fast.EXPLICIT.ljust(len(DEFLATED), b"\0"), 1)
    try:
        return plain + zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], max(1, most - start))
    except zlib.error:
        raise FileError("its deflated data are damaged", "CORRUPT") from None


_quiet = {"lock": threading.Lock(), "depth": 0, "undo": None}


@contextmanager
def quiet():
    """Silences the warnings and the log of pydicom, which quote values of the file; the last to leave restores them."""
    with _quiet["lock"]:
        _quiet["depth"] += 1
        if _quiet["depth"] == 1:
            logger, undo = logging.getLogger("pydicom"), ExitStack()
            undo.callback(logger.setLevel, logger.level)
            undo.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            logger.setLevel(logging.CRITICAL + 1)
            _quiet["undo"] = undo
    try:
        yield
    finally:
        with _quiet["lock"]:
            _quiet["depth"] -= 1
            if _quiet["depth"] == 0:
                _quiet["undo"].close()


def import_pydicom():
    """pydicom, imported so that a folder named ``dl`` in the working directory cannot break python-gdcm and with it pydicom."""
    import sys

    if "pydicom" not in sys.modules:
        sys.modules.setdefault("dl", None)
        try:
            import pydicom.pixels
        finally:
            if sys.modules.get("dl", 0) is None:
                del sys.modules["dl"]
    import pydicom

    return pydicom
