"""NIfTI, Analyze, MGH, MINC and PAR/REC in, NIfTI out: the only door between RAS+ (i, j, k) and LPS+ (d, h, w).

A file's (i, j, k) becomes (1, k, j, i), which is the order its bytes already have: nothing is flipped or moved, and
:func:`save_nifti` gives the file's own shape and affine back.
"""

from __future__ import annotations

import gzip
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FileError, GeometryError, MedVLMError, UsageError
from . import limits
from .files import writing
from .scan import Image, Lazy, Volume, check_affine, ijk_affine, ras_lps

CONFLICT = 1e-3
"""qform and sform disagree when an element of their affines differs by more than this."""

UNIT_MM = {1: 1000.0, 3: 0.001}
"""Millimetres per unit of NIfTI's xyzt_units. Source: nifti1.h, NIFTI_UNITS_METER = 1, _MM = 2, _MICRON = 3."""

LARGEST_SCALE = 1e18
"""Any 64-bit integer times this is still a float32."""

CHUNK = 4 << 20
"""Bytes that are decompressed or looked through at once."""
FOOTER = 16 << 20
"""Bytes that may follow the voxels inside a compressed stream (MGZ tags) before it is called a bomb."""

RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


def kind(path: Path, head: bytes) -> str | None:
    """'nifti', 'mgh', 'minc', 'par', 'tracks' or None, from the first bytes of a file and, for MGH, its ending."""
    name = path.name.lower()
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(31).decompress(head, 600)
        except zlib.error:
            return "nifti" if name.endswith((".nii.gz", ".mgz")) else None
    if name.endswith((".mgh", ".mgz", ".mgh.gz")):
        return "mgh"
    if head[:13] == b"mrtrix tracks" or head[:5] == b"TRACK":
        return "tracks"
    if head[:4] in (b"CDF\1", b"CDF\2") or head[:8] == b"\x89HDF\r\n\x1a\n":
        return "minc"
    if b"DATA DESCRIPTION FILE" in head[:200]:
        return "par"
    if name.endswith(".rec") and _partner(path, ".par"):
        return "par"
    if len(head) >= 4 and {struct.unpack("<i", head[:4])[0], struct.unpack(">i", head[:4])[0]} & {348, 540}:
        return "nifti"
    if name.endswith((".img", ".img.gz")) and _partner(path, ".hdr"):
        return "nifti"
    return "nifti" if name.endswith((".nii", ".nii.gz")) else None


def has_header_beside(path: Path) -> bool:
    """True for the data half of a pair (.img, .rec), which is read through its header."""
    name = path.name.lower()
    return bool(
        (name.endswith((".img", ".img.gz")) and _partner(path, ".hdr")) or (name.endswith(".rec") and _partner(path, ".par"))
    )


def read_nifti(path: Path, what: str, id: str, *, affine=None, modality: str | None = None, keep: bool = True) -> list[Volume]:
    """The volumes of one file: one, or one for each time point with ``-t1``, ``-t2`` ... after the id.

    Integers stay as stored when the file has no scaling; everything else becomes float32, in float64 arithmetic. Compressed streams are read
    to their end, so that a file that is cut short or fails its checksum is refused here and not when voxels are used.

    Args:
        what: how error messages call the file.
        affine: (4, 4) index (d, h, w, 1) -> mm LPS+, instead of the file's own.
        modality: "ct" makes the unit HU.
        keep: hold decompressed voxels in memory instead of decompressing again when they are used.

    Raises:
        FileError: TRUNCATED, CHECKSUM, CORRUPT, BOMB, TOO_LARGE, BAD_VALUE, UNSUPPORTED, NO_DATA_FILE, NOT_AN_IMAGE.
        GeometryError: ORIENTATION_UNKNOWN, BAD_AFFINE.
    """
    with open(path, "rb") as f:
        form = kind(path, f.read(4096))
    if form == "tracks":
        raise FileError(f"{what} holds streamlines", "NOT_AN_IMAGE", "give the image the streamlines were drawn on")
    if form is None:
        raise FileError(f"{what} is not NIfTI, Analyze, MGH, MINC or PAR/REC", "UNKNOWN_FORMAT")
    try:
        raw = {"nifti": _open_nifti, "mgh": _open_mgh, "minc": _open_minc, "par": _open_par}[form](path, what, affine is None)
    except (MedVLMError, OSError):
        raise
    except Exception as e:  # nibabel raises whatever its parsers meet in a damaged header
        raise FileError(f"the header of {what} cannot be read ({type(e).__name__})", "CORRUPT") from e
    if affine is not None:
        raw.affine = check_affine(affine)
    return raw.volumes(id, modality, keep)


class _Raw:
    """Voxels on disk: where they are, how they are scaled, and where they lie in the patient."""

    def __init__(self, what: str, shape, dtype, affine, info: dict[str, Any], notes: list[str]):
        self.what, self.affine, self.info, self.notes = what, affine, info, notes
        shape = [int(n) for n in shape]
        if not shape or min(shape) < 1:
            raise FileError(f"{what} claims a size of {shape}", "BAD_VALUE")
        while len(shape) > 3 and shape[-1] == 1:
            shape.pop()
        if len(shape) > 4:
            raise FileError(
                f"{what} has {len(shape)} dimensions ({' x '.join(map(str, shape))}): vectors and tensors are not images",
                "UNSUPPORTED",
                "save each component as its own 3-D file",
            )
        self.times = shape[3] if len(shape) == 4 else 1
        self.size = tuple((shape[:3] + [1, 1])[:3][::-1])  # (k, j, i)
        self.dtype = np.dtype(dtype)
        if self.dtype.kind == "c" or self.dtype.itemsize > 8 and not self.dtype.names:
            raise FileError(
                f"{what} holds {self.dtype.name} voxels, which no other type keeps exactly",
                "UNSUPPORTED",
                "save magnitude and phase, or float32, as their own files",
            )
        if self.dtype.names and self.dtype.names[:3] != ("R", "G", "B"):
            raise FileError(f"{what} holds voxels of type {self.dtype}", "UNSUPPORTED")
        self.slope, self.inter = 1.0, 0.0
        self.load: Callable[[int], np.ndarray] | None = None  # time point -> (k, j, i) as stored
        self.held: np.ndarray | None = None

    @property
    def scaled(self) -> bool:
        return (self.slope, self.inter) != (1.0, 0.0)

    @property
    def result(self) -> np.dtype:
        if self.dtype.names:
            return np.dtype("u1")
        if self.scaled or self.dtype.kind == "f":
            return np.dtype("f4")
        return self.dtype.newbyteorder("=")

    def values(self, stored: np.ndarray) -> np.ndarray:
        """Stored numbers -> (C, k, j, i) in :attr:`result`."""
        if self.dtype.names:
            return np.stack([stored[c] for c in "RGB"])
        with np.errstate(over="ignore"):  # what float32 cannot hold was counted when the file was read
            if not self.scaled:
                return stored.astype(self.result, copy=False)[None]
            out = np.empty(stored.shape, np.float32)
            for o, s in zip(out, stored):  # float64 inside, as nibabel does, and float32 outside, slab by slab
                o[...] = s.astype(np.float64) * self.slope + self.inter
            return out[None]

    def volumes(self, id: str, modality: str | None, keep: bool) -> list[Volume]:
        channels = 3 if self.dtype.names else 1
        unit = "uint8" if self.dtype.names else "HU" if modality == "ct" else "raw"
        found = self.scan(keep, want_range=unit == "HU")
        if not keep:
            self.held = None
        notes = list(self.notes)
        if self.times > 1:
            notes.append(f"TIME_SERIES: {self.times} time points became {self.times} images")
        if found["bad"]:
            notes.append(f"NOT_FINITE: {found['bad']} of {self.times * prod(self.size)} voxels are NaN, infinite or beyond float32")
        if unit == "HU" and not (-20000 < found["low"] <= -200 and found["high"] < 65536):
            notes.append(
                f"HU_IMPLAUSIBLE: values run from {found['low']:g} to {found['high']:g}; CT in HU has air near -1000"
            )
        volumes = []
        for t in range(self.times):
            info = dict(self.info, warnings=list(notes) if t == 0 else [])
            if self.times > 1:
                info["time"] = t
            lazy = Lazy((channels, *self.size), self.result, lambda t=t: self.values(self.load(t)))
            volumes.append(
                Volume(f"{id}-t{t + 1}" if self.times > 1 else id, lazy, self.affine, modality or "unknown", unit, info)
            )
        return volumes

    def scan(self, keep: bool, want_range: bool) -> dict[str, float]:
        """Non-finite voxels and, where wanted, the lowest and highest finite value."""
        found = {"bad": 0, "low": np.inf, "high": -np.inf}
        blocks = self.blocks(keep, wanted=want_range or self.dtype.kind == "f")
        for block in blocks:
            if self.dtype.kind == "f":
                finite = np.isfinite(block)
                if self.dtype.itemsize > 4 or self.scaled:
                    with np.errstate(over="ignore"):
                        finite &= np.abs(block * np.float64(self.slope) + self.inter) <= np.finfo(np.float32).max
                if not finite.all():
                    found["bad"] += int(block.size - np.count_nonzero(finite))
                    block = block[finite]
            if want_range and block.size:
                ends = np.array([block.min(), block.max()], float) * self.slope + self.inter
                found["low"], found["high"] = min(found["low"], ends.min()), max(found["high"], ends.max())
        return found

    def blocks(self, keep: bool, wanted: bool) -> Iterator[np.ndarray]:
        if wanted:
            for t in range(self.times):
                yield self.load(t).ravel()


class _Plain(_Raw):
    """Voxels that lie in one run of bytes, compressed or not."""

    def at(self, path: Path, offset: int):
        self.path, self.offset = path, offset
        self.count = self.times * prod(self.size)
        self.bytes = self.count * self.dtype.itemsize
        with open(path, "rb") as f:
            self.packed = f.read(2) == b"\x1f\x8b"
        size = path.stat().st_size
        stored = size if self.packed else max(size - offset, 0)
        wide = max(self.dtype.itemsize, self.result.itemsize) if not self.dtype.names else self.dtype.itemsize
        limits.check_size((self.times, *self.size), np.dtype(f"V{wide}"), stored, self.what)
        if not self.packed and stored < self.bytes:
            raise FileError(f"{self.what} has {stored} of the {self.bytes} bytes of voxels its header asks for", "TRUNCATED")
        if not self.packed and stored > self.bytes:
            self.notes.append(f"TRAILING_DATA: {stored - self.bytes} bytes after the voxels were ignored")
        self.load = self._load
        return self

    def _load(self, t: int) -> np.ndarray:
        each = prod(self.size)
        if not self.packed:
            start = self.offset + t * each * self.dtype.itemsize
            flat = np.fromfile(self.path, self.dtype, each, offset=start)
            if flat.size != each:
                raise FileError(f"{self.what} became shorter while it was open", "TRUNCATED")
            return flat.reshape(self.size)
        if self.held is None:
            for _ in self._stream(True):
                pass
        return self.held[t * each : (t + 1) * each].reshape(self.size)

    def blocks(self, keep: bool, wanted: bool) -> Iterator[np.ndarray]:
        if self.packed:  # always to the end: that is where the checksum is
            yield from self._stream(keep)
        elif wanted:
            step = CHUNK // self.dtype.itemsize
            for start in range(0, self.count, step):
                yield np.fromfile(
                    self.path, self.dtype, min(step, self.count - start), offset=self.offset + start * self.dtype.itemsize
                )

    def _stream(self, keep: bool) -> Iterator[np.ndarray]:
        """Decompress to the end in blocks that hold whole voxels; ``keep`` holds them in ``held``."""
        step = CHUNK // self.dtype.itemsize * self.dtype.itemsize
        held = np.empty(self.bytes if keep else step, np.uint8)
        try:
            with gzip.open(self.path, "rb") as f:
                _skip(f, self.offset)
                done = 0
                while done < self.bytes:
                    want = min(step, self.bytes - done)
                    block = held[done : done + want] if keep else held[:want]
                    got = _fill(f, memoryview(block))
                    if got < want:
                        raise FileError(f"{self.what} has {done + got} of the {self.bytes} bytes of voxels its header asks for", "TRUNCATED")
                    done += want
                    yield block.view(self.dtype)
                after = 0
                while got := len(f.read(1 << 16)):
                    after += got
                    if after > FOOTER:
                        raise FileError(f"{self.what} goes on for more than {FOOTER >> 20} MiB after its voxels", "BOMB")
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise _gzip_error(e, self.what) from e
        if keep:
            self.held = held.view(self.dtype)


def _skip(f, count: int) -> None:
    while count > 0:
        got = len(f.read(min(count, 1 << 16)))
        if not got:
            return
        count -= got


def _fill(f, view: memoryview) -> int:
    done = 0
    while done < len(view):
        got = f.readinto(view[done:])
        if not got:
            break
        done += got
    return done


def _gzip_error(e: Exception, what: str) -> FileError:
    if isinstance(e, EOFError):
        return FileError(f"{what} ends before its compressed stream does", "TRUNCATED")
    if isinstance(e, gzip.BadGzipFile):
        return FileError(f"{what} fails the checksum of its compressed stream, or has other bytes after it", "CHECKSUM")
    return FileError(f"{what} cannot be decompressed", "CORRUPT")


def _head(path: Path, count: int, what: str) -> bytes:
    with open(path, "rb") as f:
        if f.read(2) != b"\x1f\x8b":
            f.seek(0)
            return f.read(count)
    try:
        with gzip.open(path, "rb") as f:
            return f.read(count)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise _gzip_error(e, what) from e


def _partner(path: Path, ending: str) -> Path | None:
    """The other half of a pair: same stem, ``ending`` in either case, compressed or not."""
    name = path.name
    gz = name.lower().endswith(".gz")
    stem = os.path.splitext(name[:-3] if gz else name)[0]
    for e in (ending, ending.upper(), ending + ".gz"):
        if (beside := path.with_name(stem + e)).is_file():
            return beside
    return None


def _open_nifti(path: Path, what: str, need_orientation: bool) -> _Raw:
    import nibabel as nib

    header_path = path
    if path.name.lower().endswith((".img", ".img.gz")):
        header_path = _partner(path, ".hdr") or path
    head = _head(header_path, 544, what)
    if len(head) < 348:
        raise FileError(f"{what} has {len(head)} bytes of a header of 348", "TRUNCATED")
    if (magic := head[344:348]) in (b"n+1\0", b"ni1\0"):
        version, single = 1, magic == b"n+1\0"
        make = nib.Nifti1Header if single else nib.nifti1.Nifti1PairHeader
    elif (magic := head[4:12]) in (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"):
        version, single = 2, magic[:3] == b"n+2"
        make = nib.Nifti2Header if single else nib.nifti2.Nifti2PairHeader
    elif 348 in (struct.unpack("<i", head[:4])[0], struct.unpack(">i", head[:4])[0]):
        version, single, make = 0, False, nib.Spm2AnalyzeImage.header_class
    else:
        raise FileError(f"{what} does not begin with a NIfTI or Analyze header", "UNKNOWN_FORMAT")
    length = 540 if version == 2 else 348
    if len(head) < length:
        raise FileError(f"{what} has {len(head)} bytes of a header of {length}", "TRUNCATED")
    header = make(head[:length], check=False)
    notes: list[str] = []
    ndim = int(header["dim"][0])
    if not 1 <= ndim <= 7 or min(header["dim"][1 : ndim + 1]) < 1:
        raise FileError(f"{what} claims {ndim} dimensions of {[int(n) for n in header['dim'][1:8]]}", "BAD_VALUE")
    shape = tuple(int(n) for n in header["dim"][1 : ndim + 1])
    try:
        dtype = header.get_data_dtype()
    except Exception as e:
        raise FileError(f"{what} has the unknown voxel type {int(header['datatype'])}", "BAD_VALUE") from e
    if not dtype.itemsize or int(header["datatype"]) == 1:
        raise FileError(f"{what} has voxel type {int(header['datatype'])}, which has no whole bytes", "UNSUPPORTED")
    if dtype.itemsize * 8 != int(header["bitpix"]):
        notes.append(f"BAD_BITPIX: the header says {int(header['bitpix'])} bits a voxel, its type has {dtype.itemsize * 8}; the type was used")
    if dtype.itemsize > 1 and dtype.kind in "iuf":
        dtype = dtype.newbyteorder(header.endianness)

    data_path = header_path if single else _partner(header_path, ".img")
    if data_path is None:
        raise FileError(f"{what} is only a header; its .img file does not lie beside it", "NO_DATA_FILE")
    offset = float(header["vox_offset"])
    least = (544 if version == 2 else 352) if single else 0
    if single and offset == 0:
        notes.append(f"BAD_OFFSET: the header does not say where the voxels begin; {least} was used")
        offset = least
    if not np.isfinite(offset) or offset < least or offset != int(offset):
        raise FileError(f"{what} says its voxels begin at byte {offset:g}", "BAD_VALUE")

    if version == 0:
        if need_orientation:
            raise GeometryError(f"{what} is Analyze, which does not say how the patient lies", "ORIENTATION_UNKNOWN")
        affine, info = None, {"format": "analyze"}
    else:
        affine, info = _nifti_affine(header, what, notes, need_orientation)
        info = {"format": "nifti", "nifti": dict(info, version=version, dtype=dtype.str if not dtype.names else "rgb", ndim=ndim)}
    raw = _Plain(what, shape, dtype, affine, info, notes).at(data_path, int(offset))
    if dtype.names and len(dtype.names) == 4:
        raw.notes.append("ALPHA: the fourth channel was left out")
    _nifti_scaling(header, raw, version)
    return raw


def _nifti_scaling(header, raw: _Raw, version: int) -> None:
    """A slope of 0, NaN or infinity means unscaled, as nibabel reads it; what it hides is said."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"]) if version else 0.0
    if raw.dtype.names:
        return
    if not np.isfinite(slope) or slope == 0:
        if np.isinf(slope) or (np.isfinite(inter) and inter != 0):
            raw.notes.append(f"BAD_SCALING: slope {slope:g} and intercept {inter:g} were ignored; values are as stored")
        return
    if not np.isfinite(inter):
        raise FileError(f"{raw.what} has scale slope {slope:g} but intercept {inter:g}", "BAD_VALUE")
    if max(abs(slope), abs(inter)) > LARGEST_SCALE:
        raise FileError(f"{raw.what} has scale slope {slope:g} and intercept {inter:g}, too large for float32", "BAD_VALUE")
    raw.slope, raw.inter = slope, inter


def _nifti_affine(header, what: str, notes: list[str], needed: bool) -> tuple[np.ndarray | None, dict[str, Any]]:
    """(d, h, w) -> LPS+ mm, and what the file said about it; affine is None when it says nothing and none is needed."""
    scode, qcode = int(header["sform_code"]), int(header["qform_code"])
    scale = UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    info = {"sform_code": scode, "qform_code": qcode, "mm_per_unit": scale}
    steps = header["pixdim"][1:4]
    if (steps < 0).any():
        notes.append(f"NEGATIVE_PIXDIM: pixdim {[float(s) for s in steps]} was read without its signs; only the matrices mirror")
        header["pixdim"][1:4] = np.abs(steps)
    sform = _sound(np.vstack([header["srow_x"], header["srow_y"], header["srow_z"], [0, 0, 0, 1]])) if scode > 0 else None
    qform = None
    if qcode > 0:
        try:
            qform = _sound(header.get_qform(coded=False))
        except Exception as e:  # nibabel: a quaternion longer than 1, a step of 0
            if sform is None:
                raise GeometryError(f"the qform of {what} is not a rotation with a spacing", "BAD_AFFINE") from e
    if sform is not None:
        affine = sform
        if qcode > 0 and qform is None:
            notes.append("BAD_QFORM: the qform is not a rotation with a spacing; the sform was used")
        elif qform is not None and (gap := np.abs(sform - qform).max()) > CONFLICT:
            notes.append(f"QFORM_SFORM: qform and sform differ by up to {gap:.4g}; the sform was used")
    elif qform is not None:
        affine = qform
        if scode > 0:
            notes.append(f"BAD_SFORM: the sform (code {scode}) is singular; the qform was used")
    elif not needed:
        return None, info
    elif scode > 0 or qcode > 0:
        raise GeometryError(f"{what} has sform code {scode} and qform code {qcode}, but neither matrix can be inverted", "BAD_AFFINE")
    else:
        raise GeometryError(f"{what} has sform code 0 and qform code 0", "ORIENTATION_UNKNOWN")
    if scale != 1:
        notes.append(f"UNITS: lengths in {'metres' if scale > 1 else 'micrometres'} became millimetres")
        affine = affine.copy()
        affine[:3] *= scale
    return ijk_affine(ras_lps(affine)), info


def _sound(affine: np.ndarray) -> np.ndarray | None:
    try:
        return check_affine(affine)
    except GeometryError:
        return None


def _open_mgh(path: Path, what: str, need_orientation: bool) -> _Raw:
    from nibabel.freesurfer.mghformat import MGHHeader

    head = _head(path, 284, what)
    if len(head) < 90:
        raise FileError(f"{what} has {len(head)} bytes of an MGH header", "TRUNCATED")
    header = MGHHeader(head[:90], check=False)
    if int(header["version"]) != 1:
        raise FileError(f"{what} does not begin with an MGH header", "UNKNOWN_FORMAT")
    # read from the bytes: nibabel fills in a default geometry and sets the flag (goodRASFlag) itself
    if struct.unpack(">h", head[28:30])[0] <= 0 and need_orientation:
        raise GeometryError(f"{what} says that its own geometry is not valid", "ORIENTATION_UNKNOWN")
    shape = tuple(int(n) for n in header["dims"])
    try:
        dtype = header.get_data_dtype().newbyteorder(">")
    except Exception as e:
        raise FileError(f"{what} has the unknown voxel type {int(header['type'])}", "BAD_VALUE") from e
    affine = ijk_affine(ras_lps(header.get_affine())) if need_orientation else None
    raw = _Plain(what, shape, dtype, affine, {"format": "mgh"}, [])
    return raw.at(path, 284)


def _open_minc(path: Path, what: str, need_orientation: bool) -> _Raw:
    import nibabel as nib

    image = _nibabel_load(nib, path, what)
    return _from_proxy(image, path, path.stat().st_size, what, "minc", need_orientation)


def _open_par(path: Path, what: str, need_orientation: bool) -> _Raw:
    import nibabel as nib

    header = path if path.suffix.lower() == ".par" else _partner(path, ".par")
    data = _partner(path, ".rec")
    if header is None or data is None:
        raise FileError(f"{what} is only half of a PAR/REC pair", "NO_DATA_FILE")
    image = _nibabel_load(nib, header, what)
    needed = prod(image.header.get_rec_shape()) * image.header.get_data_dtype().itemsize
    if data.stat().st_size < needed:
        raise FileError(f"{what} has {data.stat().st_size} of the {needed} bytes of voxels its header asks for", "TRUNCATED")
    return _from_proxy(image, header, data.stat().st_size, what, "par", need_orientation)


def _nibabel_load(nib, path: Path, what: str):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nib.load(path, mmap=False)
    except FileNotFoundError as e:
        raise FileError(f"{what} is only a header; its data file does not lie beside it", "NO_DATA_FILE") from e
    except nib.filebasedimages.ImageFileError as e:
        raise FileError(f"{what} is not an image that is known", "UNKNOWN_FORMAT") from e
    except nib.parrec.PARRECError as e:
        raise FileError(f"{what} does not list all the slices it should hold", "TRUNCATED") from e


def _from_proxy(image, path: Path, size: int, what: str, form: str, need_orientation: bool) -> _Raw:
    """Formats whose voxels nibabel itself puts in order and scales; read through it, whole, when first used."""
    shape = tuple(int(n) for n in image.shape)
    limits.check_size(shape, np.float64, size, what)
    affine = ijk_affine(ras_lps(check_affine(image.affine))) if need_orientation else None
    raw = _Raw(what, shape, np.dtype("f4"), affine, {"format": form}, [])

    def load(t: int) -> np.ndarray:
        if raw.held is None:
            try:
                raw.held = np.asarray(image.dataobj, dtype=np.float32).reshape(*raw.size[::-1], raw.times)
            except Exception as e:  # whatever nibabel's readers meet in a damaged file
                raise FileError(f"the voxels of {what} cannot be read ({type(e).__name__})", "TRUNCATED") from e
        return raw.held[..., t].T

    raw.load = load
    return raw


def save_nifti(image: Volume | Image, path: str | os.PathLike) -> Path:
    """Write NIfTI-1 (NIfTI-2 where the source was, or where a side is longer than 32767); .nii or .nii.gz.

    The file's (i, j, k) is (w, h, d), so a volume that was read from NIfTI gets its own shape and affine back, in the
    unit of length it came with. The affine stands in the sform; in the qform too unless it is sheared. The file appears
    whole or not at all.

    Args:
        image: a Volume, or an Image whose ``info["affine"]`` says where it lies. C = 1, or C = 3 of uint8 (RGB).

    Raises:
        GeometryError: ORIENTATION_UNKNOWN for an image that has no place in the patient.
        FileError: CANNOT_WRITE, UNSUPPORTED.
        UsageError: BAD_ARGUMENT when the name ends in something else.
    """
    import nibabel as nib

    path = Path(path)
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise UsageError(f"{path} does not end in .nii or .nii.gz", "BAD_ARGUMENT")
    if isinstance(image, Image):
        if image.info.get("affine") is None:
            raise GeometryError(f"image {image.id} has no place in the patient, which NIfTI needs", "ORIENTATION_UNKNOWN")
        array, affine = image.pixels[:, None], check_affine(image.info["affine"])
    else:
        array, affine = image.voxels, image.affine
    told = image.info.get("nifti", {})
    if array.shape[0] == 3 and array.dtype == np.uint8:
        data = np.empty(array.shape[1:], RGB)
        for c, channel in zip("RGB", array):
            data[c] = channel
    elif array.shape[0] == 1 and array.dtype.kind in "biuf":
        data = array[0]
        data = data.astype({"b": np.uint8}.get(data.dtype.kind, np.float32)) if data.dtype in (bool, np.float16) else data
    else:
        raise FileError(f"NIfTI cannot hold {array.shape[0]} channels of {array.dtype}", "UNSUPPORTED")

    scale = told.get("mm_per_unit", 1.0)
    world = ras_lps(ijk_affine(affine))
    world[:3] /= scale
    data = data.T
    if told.get("ndim") == 2 and data.shape[2] == 1:
        data = data[..., 0]
    make = nib.Nifti2Image if told.get("version") == 2 or max(data.shape) > 32767 else nib.Nifti1Image
    out = make(data, world, dtype=data.dtype)
    code = told.get("sform_code") or told.get("qform_code") or 1
    out.set_sform(world, code)
    if _sheared(world):
        out.header["qform_code"] = 0
    else:
        out.set_qform(world, told.get("qform_code") or code)
    out.header.set_xyzt_units({1000.0: "meter", 0.001: "micron"}.get(scale, "mm"))
    content = out.to_bytes()
    with writing(path) as part, open(part, "xb") as f:
        if path.name.lower().endswith(".gz"):
            with gzip.GzipFile("", "wb", compresslevel=1, fileobj=f, mtime=0) as z:  # same volume, same bytes
                z.write(content)
        else:
            f.write(content)
    return path


def _sheared(affine: np.ndarray) -> bool:
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(unit.T @ unit - np.eye(3)).max() > 1e-5)
