"""DICOM pixel data to arrays: stored values, then the modality LUT, never a window.

Nothing is decoded before the codestream's own header agrees with the attributes, so a small file cannot ask for a lot
of memory. Values above BitsStored are cleared, colour comes out as RGB, MONOCHROME1 stays as stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from ..errors import FileError
from . import dicom_fast, limits
from .dicom_header import TAGS, File, Header, import_pydicom, parsed, quiet

JPEG = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81)}
JPEG2000 = {f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 92, 93, 201, 202, 203)}
JPEG_12_BIT, RLE = "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.5"
NATIVE = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"}
LOSSY = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 81)}
DECODERS = (
    (JPEG2000, (("pylibjpeg", "pylibjpeg-openjpeg"), ("gdcm", "python-gdcm"))),
    ({f"1.2.840.10008.1.2.4.{n}" for n in (80, 81)}, (("pyjpegls", "pyjpegls"), ("gdcm", "python-gdcm"))),
    ({f"1.2.840.10008.1.2.4.{n}" for n in (50, 51)}, (("pillow", "pillow"), ("gdcm", "python-gdcm"))),
    ({f"1.2.840.10008.1.2.4.{n}" for n in (57, 70)}, (("gdcm", "python-gdcm"),)),
    ({RLE}, (("pydicom", "pydicom"),)),
)
"""(pydicom's name, package) of the decoders of each family, best first. They agree to the bit; python-gdcm comes last
because damaged data can make it end the process, and pylibjpeg-rle is left out because there it panics."""


class Layout:
    """Size and type of the frames of one header: stored, and after the modality LUT.

    Attributes:
        rows, columns, samples (1 or 3), photometric.
        stored: dtype of the stored values; bits: BitsStored.
        slope, intercept: the rescale, 1 and 0 where there is none; rescaled: whether the file has one.
        table: (first, bits, values) of a modality LUT, or None.
        dtype: of the values that :func:`load` gives.

    Raises:
        FileError: NOT_AN_IMAGE, BAD_VALUE; from :meth:`check` also UNSUPPORTED, CORRUPT, BOMB, TOO_LARGE, TRUNCATED, NO_CODEC.
    """

    def __init__(self, head: Header, hounsfield: bool):
        file = head.file
        need = ("Rows", "Columns", "BitsAllocated", "PhotometricInterpretation")
        if missing := [name for name in need if not head.raw(name)]:
            raise FileError(f"the object has no {' and no '.join(missing)}", "NOT_AN_IMAGE")
        self.rows, self.columns = head.whole("Rows"), head.whole("Columns")
        self.samples = head.whole("SamplesPerPixel", 1)
        self.allocated = head.whole("BitsAllocated")
        self.bits = head.whole("BitsStored", self.allocated)
        signed = head.whole("PixelRepresentation", 0)
        self.photometric = head.text("PhotometricInterpretation")
        for name, value, fine in (
            ("Rows", self.rows, self.rows > 0),
            ("Columns", self.columns, self.columns > 0),
            ("SamplesPerPixel", self.samples, self.samples in (1, 3)),
            ("BitsAllocated", self.allocated, self.allocated in (8, 16, 32)),
            ("BitsStored", self.bits, 0 < self.bits <= self.allocated),
            ("PixelRepresentation", signed, signed in (0, 1)),
        ):
            if not fine:
                raise FileError(f"{name} is {value}", "BAD_VALUE")
        self.signed = bool(signed)
        self.stored = np.dtype(f"{'ui'[signed]}{self.allocated // 8}")
        slope, intercept = head.number("RescaleSlope"), head.number("RescaleIntercept")
        self.rescaled = slope is not None and intercept is not None
        if self.rescaled and slope == 0:
            raise FileError("RescaleSlope is 0", "BAD_VALUE")
        self.slope, self.intercept = (slope, intercept) if self.rescaled else (1.0, 0.0)
        dataset = file.dataset
        self.table = None
        if dataset is not None and "ModalityLUTSequence" in dataset:
            items = parsed("the modality table", lambda: list(dataset.ModalityLUTSequence))
            self.table = table(items[0]) if items else None
        self.palette = self.photometric == "PALETTE COLOR"
        self.channels = 3 if self.palette or self.samples == 3 else 1
        self.dtype = self._dtype(head, hounsfield)
        self.frame_bytes = self.rows * self.columns * self.samples * self.allocated // 8
        if self.photometric == "YBR_FULL_422" and file.syntax in NATIVE:
            self.frame_bytes = self.frame_bytes * 2 // 3

    def _dtype(self, head: Header, hounsfield: bool) -> np.dtype:
        if self.palette:
            bits = parsed("the colour palette", lambda: int(head.file.dataset.RedPaletteColorLookupTableDescriptor[2]))
            return np.dtype(np.uint8 if bits <= 8 else np.uint16)
        if self.table is not None:
            return self.table[2].dtype
        if hounsfield:
            return np.dtype(np.float32)
        if (self.slope, self.intercept) == (1, 0):
            return self.stored
        return whole_dtype([self])

    def span(self) -> tuple[float, float]:
        """Least and greatest value after the rescale."""
        low, high = (-(1 << self.bits - 1), (1 << self.bits - 1) - 1) if self.signed else (0, (1 << self.bits) - 1)
        ends = low * self.slope + self.intercept, high * self.slope + self.intercept
        return min(ends), max(ends)

    def check(self, file: File, frames: int) -> None:
        """Raises unless the file can hold this many frames, before memory is taken for them."""
        if file.offset is None:
            raise FileError("the object holds no pixels", "NOT_AN_IMAGE")
        held = file.size - file.offset
        limits.check_size((frames, self.channels, self.rows, self.columns), self.dtype, held, "the pixel data")
        native = file.length is not None
        if native != (file.syntax in NATIVE):
            if file.syntax.startswith("1.2.840.10008.1.2"):
                raise FileError("the transfer syntax and the form of the pixel data contradict each other", "CORRUPT")
            raise FileError("the transfer syntax is private", "UNSUPPORTED")
        if not native:
            plugin(file.syntax)
            return
        need = frames * self.frame_bytes
        if not file.deflated and file.offset + min(need, file.length) > file.size:
            raise FileError(f"the pixel data hold {held} of {need} bytes", "TRUNCATED")
        if file.length < need:
            code = "BAD_VALUE" if frames > 1 else "TRUNCATED"
            raise FileError(f"the pixel data have {file.length} bytes, but {frames} frames of {self.rows} x {self.columns} need {need}", code)
        if file.length - need >= self.frame_bytes:
            raise FileError(f"NumberOfFrames is {frames}, but the pixel data hold {file.length // self.frame_bytes} frames", "BAD_VALUE")


_LAYOUT = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept")


def layout(head: Header, hounsfield: bool, frames: int | None = None) -> Layout:
    """The layout of a header; when ``frames`` is given, its file is checked for that many."""
    if head.file.dataset is None:  # slices of one series share it
        found = _shared_layout(head.file.syntax, hounsfield, *(head.raw(name) for name in _LAYOUT))
    else:
        found = Layout(head, hounsfield)
    if frames is not None:
        found.check(head.file, frames)
    return found


@lru_cache(256)
def _shared_layout(syntax: str, hounsfield: bool, *values: bytes) -> Layout:
    return Layout(Header(File("", syntax, None, None, 0), {TAGS[n][0]: v for n, v in zip(_LAYOUT, values)}), hounsfield)


def whole_dtype(layouts: Sequence[Layout]) -> np.dtype:
    """The smallest of int16, int32 that holds all values exactly; float32 where a slope is no whole number."""
    if all(float(x).is_integer() for layout in layouts for x in (layout.slope, layout.intercept)):
        spans = [layout.span() for layout in layouts]
        low, high = min(s[0] for s in spans), max(s[1] for s in spans)
        for kind in (np.int16, np.int32):
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return np.dtype(kind)
    return np.dtype(np.float32)


def table(item) -> tuple[int, int, np.ndarray]:
    """(first stored value mapped, bits, values) of a modality or VOI look-up table item.

    Raises:
        FileError: BAD_VALUE when the descriptor and the data disagree.
    """
    count, first, bits = parsed("a look-up table", lambda: [int(n) for n in item.LUTDescriptor])
    data = parsed("a look-up table", lambda: item.LUTData)
    values = np.frombuffer(data, f"<u{1 + (len(data) >= 2 * count)}") if isinstance(data, bytes) else np.atleast_1d(np.array(data, np.int64))
    count = count or 1 << 16
    if len(values) * 2 == count:  # two 8-bit entries packed in each word
        values = values.astype("<u2").view(np.uint8)
    if len(values) < count or not 0 < bits <= 16:
        raise FileError(f"a look-up table promises {count} entries of {bits} bits and has {len(values)}", "BAD_VALUE")
    return first, bits, values[:count].astype(np.uint8 if bits <= 8 else np.uint16)


@quiet()
def load(heads: Sequence[tuple[Header, int]], layouts: Sequence[Layout], dtype: np.dtype) -> tuple[np.ndarray, float, float]:
    """(C, D, H, W) values after the modality LUT of D frames (header, frame number) of one size, their least and greatest.

    Frames are read straight into the output, by as many threads as there are processors.

    Raises:
        FileError: TRUNCATED, CORRUPT, NO_CODEC, UNREADABLE.
    """
    first = layouts[0]
    out = np.empty((first.channels, len(heads), first.rows, first.columns), dtype)
    wanted: dict[int, list[int]] = {}
    for i, (head, _) in enumerate(heads):
        wanted.setdefault(id(head.file), []).append(i)
    groups = list(wanted.values())
    ends = np.empty((len(heads), 2))
    share = max(1, min(len(groups), os.cpu_count() or 1, 8))

    def work(part: int) -> None:
        scratch = np.empty((first.rows, first.columns), first.stored)
        for group in groups[part::share]:
            frames = None if heads[group[0]][0].file.fast else stored(heads[group[0]][0], layouts[group[0]], [heads[i][1] for i in group])
            for i in group:
                head, layout = heads[i][0], layouts[i]
                if frames is None:
                    raw = scratch if layout.stored == first.stored else np.empty(scratch.shape, layout.stored)
                    _fast(head.file, raw, layout.bits)
                else:
                    raw = next(frames)
                ends[i] = _rescale(raw, layout, out[:, i])

    if share == 1:
        work(0)
    else:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(share) as pool:
            list(pool.map(work, range(share)))
    return out, ends[:, 0].min(), ends[:, 1].max()


def _fast(file: File, raw: np.ndarray, bits: int) -> None:
    try:
        dicom_fast.pixels(file.path, file.offset, raw, bits)
    except EOFError:
        raise FileError("the pixel data became shorter since the header was read", "TRUNCATED") from None
    except OSError:
        raise FileError("a file that was there when the study was read is gone", "UNREADABLE") from None


def _rescale(raw: np.ndarray, layout: Layout, out: np.ndarray) -> tuple[float, float]:
    """Stored (H, W[, 3]) into ``out`` (C, H, W) through the modality LUT; least and greatest value."""
    if raw.ndim == 3:
        out[...] = np.moveaxis(raw, -1, 0)
        return out.min(), out.max()
    if layout.table is not None:
        first, _, values = layout.table
        values.take(np.clip(raw.astype(np.int64) - first, 0, len(values) - 1), out=out[0])
        return out.min(), out.max()
    low, high = raw.min(), raw.max()
    slope, intercept = layout.slope, layout.intercept
    if (slope, intercept) == (1, 0):
        if out.dtype.kind in "iu" and not (np.iinfo(out.dtype).min <= low and high <= np.iinfo(out.dtype).max):
            raise FileError(f"decoded values {low}..{high} do not fit the {layout.bits} bits the header promises", "CORRUPT")
        out[0] = raw
    elif out.dtype.kind == "f":
        exact = raw.itemsize <= 2 and slope.is_integer() and intercept.is_integer() and max(map(abs, layout.span())) < 1 << 24
        kind = np.float32 if exact else np.float64  # whole numbers below 2^24 lose nothing in float32
        if slope == 1 and exact:
            np.add(raw, kind(intercept), out=out[0], dtype=kind, casting="unsafe")
        else:
            out[0] = raw.astype(kind) * kind(slope) + kind(intercept)
    else:
        values = raw.astype(np.int64) * int(slope) + int(intercept)
        if not (np.iinfo(out.dtype).min <= values.min() and values.max() <= np.iinfo(out.dtype).max):
            raise FileError(f"decoded values {low}..{high} do not fit the {layout.bits} bits the header promises", "CORRUPT")
        out[0] = values
    ends = float(low) * slope + intercept, float(high) * slope + intercept
    return min(ends), max(ends)


def stored(head: Header, layout: Layout, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """Stored values (H, W) or RGB (H, W, 3) of the frames with these numbers (from 0) of one file."""
    file = head.file
    decoder = import_pydicom().pixels.get_decoder(file.syntax if file.syntax != "1.2.840.10008.1.2.1.99" else "1.2.840.10008.1.2.1")
    encoded = None if file.length is not None else _encoded(head)
    count = head.whole("NumberOfFrames", 1)
    for number in numbers:
        at, frames = 0, 1
        if encoded is None and file.little:
            data = file.read(file.offset + number * layout.frame_bytes, layout.frame_bytes)
            data += b"\0" * (layout.frame_bytes % 2 and len(data) == layout.frame_bytes)
        elif encoded is None:  # bytes may be swapped in pairs, across the border of two frames
            at, frames, data = number, count, file.read(file.offset, file.length)
        else:
            _agree(encoded[number], file.syntax, layout)
            data = _encapsulated(encoded[number])
        if encoded is None and len(data) < frames * layout.frame_bytes:
            raise FileError(f"the pixel data end in frame {number + 1}", "TRUNCATED")
        if encoded is not None and file.syntax == JPEG_12_BIT and layout.bits > 8:
            yield _gdcm_frame(encoded[number], layout)
            continue
        try:
            frame, _ = decoder.as_array(
                data,
                index=at,
                number_of_frames=frames,
                rows=layout.rows,
                columns=layout.columns,
                samples_per_pixel=layout.samples,
                bits_allocated=layout.allocated,
                bits_stored=layout.bits,
                pixel_representation=int(layout.signed),
                photometric_interpretation=layout.photometric,
                planar_configuration=head.whole("PlanarConfiguration", 0),
                pixel_keyword="PixelData",
                pixel_vr=file.vr,
                decoding_plugin="" if encoded is None else plugin(file.syntax),
            )
        except Exception as error:  # plugins raise many kinds
            if encoded is not None and _ends_early(data, file.syntax):
                raise FileError(f"the compressed pixel data of frame {number + 1} are cut short", "TRUNCATED") from None
            raise FileError(f"frame {number + 1} cannot be decoded ({type(error).__name__})", "CORRUPT") from None
        if layout.palette:
            indices = frame
            frame = parsed("the colour palette", lambda: import_pydicom().pixels.apply_color_lut(indices, file.dataset)[..., :3])  # noqa: B023
        yield frame


def _gdcm_frame(codestream: bytes, layout: Layout) -> np.ndarray:
    """One frame of 12-bit JPEG Extended, which pydicom does not pass on to python-gdcm although it can decode it."""
    import gdcm

    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(codestream)
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((layout.columns, layout.rows, 1))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, layout.bits, layout.bits - 1, int(layout.signed)))
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.GetPIType(layout.photometric)))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(JPEG_12_BIT)))
    image.SetDataElement(element)
    data = (image.GetBuffer() or "").encode("utf-8", "surrogateescape")
    if layout.samples != 1 or len(data) != layout.rows * layout.columns * layout.stored.itemsize:
        raise FileError("the 12-bit JPEG pixel data cannot be decoded", "CORRUPT")
    return np.frombuffer(data, layout.stored).reshape(layout.rows, layout.columns)


def plugin(syntax: str) -> str:
    """pydicom's name of the decoder for an encapsulated transfer syntax.

    Raises:
        FileError: NO_CODEC, which names the package that is missing.
    """
    known = next((names for family, names in DECODERS if syntax in family), ())
    if not known:
        raise FileError("the transfer syntax of the pixel data has no decoder here", "NO_CODEC", "decompress the file (gdcmconv --raw)")
    there = import_pydicom().pixels.get_decoder(syntax).available_plugins
    for name, _ in known:
        if name in there:
            return name
    raise FileError(f"the pixel data need the codec package {known[0][1]}", "NO_CODEC")


def _encoded(head: Header) -> list[bytes]:
    """The codestream of each frame of an encapsulated file."""
    from pydicom.encaps import generate_frames

    file, count = head.file, head.whole("NumberOfFrames", 1)
    with open(file.path, "rb") as stream:
        stream.seek(file.offset)
        data = stream.read()
    extended = None
    if file.dataset is not None and "ExtendedOffsetTable" in file.dataset and "ExtendedOffsetTableLengths" in file.dataset:
        extended = parsed("the offset table", lambda: (file.dataset.ExtendedOffsetTable, file.dataset.ExtendedOffsetTableLengths))
    try:
        frames = list(generate_frames(data, number_of_frames=count, extended_offsets=extended))
    except Exception as error:
        code = "CORRUPT" if b"\xfe\xff\xdd\xe0" in data[-1024:] else "TRUNCATED"
        raise FileError(f"the fragments of the pixel data make no sense ({type(error).__name__})", code) from None
    if len(frames) != count:
        raise FileError(f"NumberOfFrames is {count}, but the pixel data hold {len(frames)} frames", "BAD_VALUE")
    if b"\xfe\xff\xdd\xe0" not in data[-65536:]:
        raise FileError("the compressed pixel data have no end mark", "TRUNCATED")
    return frames


def _encapsulated(frame: bytes) -> bytes:
    """One codestream as a fragment of its own, with an empty offset table."""
    frame += b"\0" * (len(frame) % 2)
    return b"\xfe\xff\x00\xe0\0\0\0\0\xfe\xff\x00\xe0" + len(frame).to_bytes(4, "little") + frame


def _ends_early(data: bytes, syntax: str) -> bool:
    return (syntax in JPEG or syntax in JPEG2000) and b"\xff\xd9" not in data[-16:]


def _agree(data: bytes, syntax: str, layout: Layout) -> None:
    """Raises CORRUPT unless the size in the codestream's own header is that of the attributes."""
    if syntax == RLE:
        _agree_rle(data, layout)
    if syntax in JPEG2000:
        size = _jpeg2000_size(data)
    elif syntax in JPEG:
        size = _jpeg_size(data, layout)
    else:
        return
    if size is None:
        raise FileError("a frame does not start like its transfer syntax says", "CORRUPT")
    if size != (layout.rows, layout.columns):
        raise FileError(f"the header says {layout.rows} x {layout.columns} but the compressed frame is {size[0]} x {size[1]}", "CORRUPT")


def _agree_rle(data: bytes, layout: Layout) -> None:
    """An RLE frame starts with its number of segments, one a byte of a pixel, and where each begins."""
    marks = np.frombuffer(data[:64], "<u4")
    want = layout.samples * layout.allocated // 8
    if len(marks) != 16 or marks[0] != want or marks[1] != 64 or (np.diff(marks[1 : want + 1].astype(int)) <= 0).any() or marks[want] >= len(data):
        raise FileError(f"a run-length coded frame does not start with {want} segments", "CORRUPT")


def _jpeg2000_size(data: bytes) -> tuple[int, int] | None:
    at = data.find(b"\xff\x4f\xff\x51", 0, 4096)  # SOC, SIZ; a JP2 header may stand before them
    if at < 0 or len(data) < at + 24:
        return None
    width, height, left, top = (int.from_bytes(data[at + 8 + 4 * i : at + 12 + 4 * i], "big") for i in range(4))
    return height - top, width - left


def _jpeg_size(data: bytes, layout: Layout) -> tuple[int, int] | None:
    """Rows and columns of a JPEG or JPEG-LS stream whose segments follow each other without a break up to its scan.

    python-gdcm ends the process where libjpeg only warns in this part, so whatever it would warn of is refused here.
    """
    at, size = 2, None
    while data[:2] == b"\xff\xd8" and at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0xDA:
            return size
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
            if len(body) < 6 or body[0] > layout.allocated or body[5] != layout.samples:
                return None
            size = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
        elif body[:5] == b"JFIF\0" and body[5:6] != b"\1" or body[:5] == b"Adobe" and body[11:12] not in (b"\0", b"\1", b"\2"):
            return None
        elif marker < 0xC0 or length < 2:
            return None
        at += 2 + length
    return None
