"""Odd NIfTI files with their truth, and a table of what each reader makes of them.

Headers are filled field by field, so the truth does not pass through the reader under test. ``python
tests/unit/nifti_corpus.py`` prints docs/odd-inputs-nifti.md.
"""

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SIZE = (5, 4, 3)
"""(i, j, k) of most cases: three different numbers, so that no swap of axes can hide."""

CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "c8": 32, "f8": 64, "RGB": 128, "i1": 256, "u2": 512, "i8": 1024, "u8": 1280, "f16": 1536, "RGBA": 2304}
"""NIfTI datatype codes. Source: nifti1.h."""

PLAIN = np.array([[2.0, 0, 0, -11], [0, 3, 0, 7], [0, 0, 4, 5], [0, 0, 0, 1]])
"""RAS+ affine of most cases: spacing 2, 3, 4 mm."""


@dataclass
class Case:
    name: str
    make: Callable[[Path], Path]
    expect: str = "right"  # or the code of the refusal
    warns: tuple[str, ...] = ()
    points: np.ndarray | None = None  # (n, 3) LPS+ mm of every voxel
    values: np.ndarray | None = None  # (n,) or (n, 3), or (n, t) for time series
    args: dict = field(default_factory=dict)
    heavy: bool = False  # not shown to readers that would take the memory


def voxels(shape=SIZE, kind="i2") -> np.ndarray:
    """Different values everywhere, some negative where the type allows it."""
    n = np.arange(int(np.prod(shape))).reshape(shape)
    if kind == "u1":
        return (n * 3 % 251).astype("u1")
    return (n * 37 - 900).astype(kind)


def points(shape, ras: np.ndarray) -> np.ndarray:
    """World LPS+ mm of every (i, j, k), i slowest."""
    index = np.indices(shape[:3]).reshape(3, -1).T
    world = index @ ras[:3, :3].T + ras[:3, 3]
    return world * (-1, -1, 1)


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """(b, c, d) of a proper rotation. Source: nifti1.h, method 2."""
    a = np.sqrt(max(0.0, 1 + np.trace(rotation))) / 2
    assert a > 0.1, "choose a rotation by less than half a turn"
    return np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]) / (4 * a)


def turn(x=0.0, y=0.0, z=0.0) -> np.ndarray:
    """Rotation by degrees about x, then y, then z."""
    out = np.eye(3)
    for axis, degrees in enumerate((x, y, z)):
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        one = np.eye(3)
        p, q = [(1, 2), (2, 0), (0, 1)][axis]
        one[p, p], one[q, q], one[p, q], one[q, p] = c, c, -s, s
        out = one @ out
    return out


def affine(rotation=((1, 0, 0), (0, 1, 0), (0, 0, 1)), spacing=(2, 3, 4), origin=(-11, 7, 5)) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3] = np.asarray(rotation) * np.asarray(spacing)
    out[:3, 3] = origin
    return out


def header(shape, kind, *, sform=None, scode=1, q=None, qcode=0, pixdim=(2, 3, 4), qfac=1, units=2, slope=1.0, inter=0.0,
           order="<", magic=b"n+1\0", offset=352.0, datatype=None, dim=None) -> bytes:  # fmt: skip
    """A NIfTI-1 header, 352 bytes with the extension flag. ``q``: (b, c, d, x, y, z)."""
    item = {"RGB": 3, "RGBA": 4}.get(kind) or np.dtype(kind).itemsize
    dims = list(dim) if dim else [len(shape), *shape] + [1] * (7 - len(shape))
    steps = [qfac, *pixdim, 1, 1, 1, 1]
    out = bytearray(352)
    put = lambda at, fmt, *v: struct.pack_into(order + fmt, out, at, *v)  # noqa: E731
    put(0, "i", 348)
    put(40, "8h", *dims)
    put(70, "hh", CODES[kind] if datatype is None else datatype, item * 8)
    put(76, "8f", *steps)
    put(108, "fff", offset, slope, inter)
    put(123, "B", units)
    put(252, "hh", qcode, scode if sform is not None else 0)
    put(256, "6f", *(q if q is not None else (0,) * 6))
    put(280, "12f", *(np.asarray(sform)[:3].ravel() if sform is not None else (0,) * 12))
    out[344:348] = magic
    return bytes(out)


def body(array: np.ndarray, order="<") -> bytes:
    return array.astype(array.dtype.newbyteorder(order)).tobytes(order="F")


def write(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return make


def both(files: dict[str, bytes], give: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder / give

    return make


def cases() -> list[Case]:
    a = voxels()
    data = body(a)
    flat, where = a.ravel(), points(SIZE, PLAIN)
    plain = header(SIZE, "i2", sform=PLAIN)
    packed = gzip.compress(plain + data, mtime=0)
    out: list[Case] = []

    def right(name, content, values=flat, at=where, *, warns=(), args=None, ending=".nii", heavy=False):
        out.append(Case(name, write(name.replace(" ", "_") + ending, content), "right", warns, at, values, args or {}, heavy))

    def refused(name, content, code, *, ending=".nii", heavy=False):
        out.append(Case(name, write(name.replace(" ", "_") + ending, content), code, heavy=heavy))

    right("plain", plain + data)
    right("plain gzip", packed, ending=".nii.gz")

    # where it lies
    none = header(SIZE, "i2")
    refused("no codes", none + data, "ORIENTATION_UNKNOWN")
    lps = np.diag([-1.0, -1, 1, 1]) @ PLAIN
    right("no codes, told", none + data, args={"affine": lps[:, [2, 1, 0, 3]]})
    q = (*quaternion(np.eye(3)), -11, 7, 5)
    right("sform zeros, qform valid", header(SIZE, "i2", sform=np.zeros((4, 4)), q=q, qcode=1) + data, warns=("BAD_SFORM",))
    refused("sform zeros, no qform", header(SIZE, "i2", sform=np.zeros((4, 4))) + data, "BAD_AFFINE")
    refused("sform NaN, no qform", header(SIZE, "i2", sform=np.full((4, 4), np.nan)) + data, "BAD_AFFINE")
    right("qform and sform differ", header(SIZE, "i2", sform=PLAIN, q=(*q[:3], -11, 9, 5), qcode=1) + data, warns=("QFORM_SFORM",))
    right("quaternion too long, sform valid", header(SIZE, "i2", sform=PLAIN, q=(0.9, 0.9, 0.9, -11, 7, 5), qcode=1) + data, warns=("BAD_QFORM",))
    refused("quaternion too long, no sform", header(SIZE, "i2", q=(0.9, 0.9, 0.9, -11, 7, 5), qcode=1) + data, "BAD_AFFINE")
    refused("pixdim zero, qform only", header(SIZE, "i2", q=q, qcode=1, pixdim=(2, 0, 4)) + data, "BAD_AFFINE")
    for unit, name, scale in ((1, "metres", 1000.0), (3, "microns", 0.001)):
        small = PLAIN.copy()
        small[:3] /= scale
        at = points(SIZE, small) * scale
        right(name, header(SIZE, "i2", sform=small, units=unit, pixdim=np.array((2, 3, 4)) / scale) + data, at=at, warns=("UNITS",))
    negative = header(SIZE, "i2", q=q, qcode=1, pixdim=(-2, 3, 4)) + data
    right("negative pixdim, qform only", negative, warns=("NEGATIVE_PIXDIM",))
    tilt = turn(20, -15, 35)
    right("oblique sform", header(SIZE, "i2", sform=affine(tilt)) + data, at=points(SIZE, affine(tilt)))
    right("oblique qform", header(SIZE, "i2", q=(*quaternion(tilt), -11, 7, 5), qcode=1) + data, at=points(SIZE, affine(tilt)))
    mirrored = affine(tilt @ np.diag([1, 1, -1]))
    right("qform with qfac -1", header(SIZE, "i2", q=(*quaternion(tilt), -11, 7, 5), qcode=1, qfac=-1) + data, at=points(SIZE, mirrored))
    left = affine(np.diag([-1, 1, 1]))
    right("left-handed", header(SIZE, "i2", sform=left) + data, at=points(SIZE, left))
    swapped = affine(np.eye(3)[:, [2, 0, 1]])
    right("axes permuted", header(SIZE, "i2", sform=swapped) + data, at=points(SIZE, swapped))
    shear = affine(tilt)
    shear[:3, 2] += 0.3 * shear[:3, 1]
    right("sheared", header(SIZE, "i2", sform=shear) + data, at=points(SIZE, shear))

    # how it is stored
    right("big-endian", header(SIZE, "i2", sform=PLAIN, order=">") + body(a, ">"))
    for kind in ("u1", "u2", "i4", "f4", "f8", "i8"):
        b = voxels(kind=kind) if kind != "u2" else np.abs(voxels()).astype("u2")
        if kind == "i8":
            b = b + 2**60 + 1  # float64 would lose the last bits
        right(f"type {kind}", header(SIZE, kind, sform=PLAIN) + body(b), b.ravel())
    u8 = np.abs(voxels()).astype("u8") + np.uint64(2**63 + 1)
    right("type u8", header(SIZE, "u8", sform=PLAIN) + body(u8), u8.ravel())
    refused("complex", header(SIZE, "c8", sform=PLAIN) + body(a.astype("c8")), "UNSUPPORTED")
    refused("float128", header(SIZE, "f16", sform=PLAIN) + bytes(16 * a.size), "UNSUPPORTED")
    refused("one bit a voxel", header(SIZE, "u1", sform=PLAIN, datatype=1) + bytes(a.size), "UNSUPPORTED")
    refused("unknown type", header(SIZE, "u1", sform=PLAIN, datatype=777) + bytes(a.size), "BAD_VALUE")
    colour = np.stack([voxels(kind="u1"), voxels(kind="u1")[::-1], voxels(kind="u1")[:, ::-1]], -1)
    interleaved = np.ascontiguousarray(colour.transpose(2, 1, 0, 3)).tobytes()
    right("RGB", header(SIZE, "RGB", sform=PLAIN) + interleaved, colour.reshape(-1, 3))
    alpha = np.concatenate([colour, np.full((*SIZE, 1), 255, "u1")], -1)
    right("RGBA", header(SIZE, "RGBA", sform=PLAIN) + np.ascontiguousarray(alpha.transpose(2, 1, 0, 3)).tobytes(), colour.reshape(-1, 3), warns=("ALPHA",))
    film = voxels((*SIZE, 2))
    right("4-D", header(film.shape, "i2", sform=PLAIN) + body(film), film.reshape(-1, 2), warns=("TIME_SERIES",))
    right("4-D gzip", gzip.compress(header(film.shape, "i2", sform=PLAIN) + body(film)), film.reshape(-1, 2), warns=("TIME_SERIES",), ending=".nii.gz")
    refused("5-D vectors", header((*SIZE, 1, 3), "i2", sform=PLAIN) + data * 3, "UNSUPPORTED")
    right("5-D of one", header((*SIZE, 1, 1), "i2", sform=PLAIN) + data)
    right("2-D", header(SIZE[:2], "i2", sform=PLAIN) + body(a[..., 0]), a[..., 0].ravel(), points((5, 4, 1), PLAIN))
    right("extension before the voxels", header(SIZE, "i2", sform=PLAIN, offset=384)[:348] + b"\1\0\0\0" + struct.pack("<ii", 32, 6) + bytes(24) + data)
    right("pair", None)
    out[-1].make = both({"pair.hdr": header(SIZE, "i2", sform=PLAIN, magic=b"ni1\0", offset=0)[:348], "pair.img": data}, "pair.hdr")
    right("pair, named by its .img", None)
    out[-1].make = both({"pair2.hdr": header(SIZE, "i2", sform=PLAIN, magic=b"ni1\0", offset=0)[:348], "pair2.img": data}, "pair2.img")

    # what the numbers mean
    holes = a.astype("f4")
    holes[0, 0, 0], holes[4, 3, 2], holes[1, 1, 1] = np.nan, np.inf, -np.inf
    right("NaN and infinity", header(SIZE, "f4", sform=PLAIN) + body(holes), holes.ravel(), warns=("NOT_FINITE",))
    right("slope and intercept", header(SIZE, "i2", sform=PLAIN, slope=0.5, inter=-1024) + data, (flat * 0.5 - 1024).astype("f4"))
    right("slope 0", header(SIZE, "i2", sform=PLAIN, slope=0) + data)
    right("slope 0, intercept 7", header(SIZE, "i2", sform=PLAIN, slope=0, inter=7) + data, warns=("BAD_SCALING",))
    right("slope NaN", header(SIZE, "i2", sform=PLAIN, slope=np.nan, inter=np.nan) + data)
    right("slope infinite", header(SIZE, "i2", sform=PLAIN, slope=np.inf) + data, warns=("BAD_SCALING",))
    wide = holes.astype("f8")
    wide[2, 2, 2] = 1e300
    with np.errstate(over="ignore"):
        right("float64 beyond float32", header(SIZE, "f8", sform=PLAIN) + body(wide), wide.astype("f4").ravel(), warns=("NOT_FINITE",))
    refused("slope beyond all measure", header(SIZE, "i2", sform=PLAIN, slope=1e30) + data, "BAD_VALUE")
    refused("intercept NaN", header(SIZE, "i2", sform=PLAIN, slope=2, inter=np.nan) + data, "BAD_VALUE")

    # damage
    refused("truncated", plain + data[:60], "TRUNCATED")
    refused("truncated gzip", packed[:-40], "TRUNCATED", ending=".nii.gz")
    refused("gzip without its last 8 bytes", packed[:-8], "TRUNCATED", ending=".nii.gz")
    refused("truncated, then gzipped", gzip.compress(plain + data[:60]), "TRUNCATED", ending=".nii.gz")
    refused("wrong CRC", packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:], "CHECKSUM", ending=".nii.gz")
    refused("wrong ISIZE", packed[:-4] + struct.pack("<I", 9), "CHECKSUM", ending=".nii.gz")
    refused("trailing garbage", packed + b"not gzip", "CHECKSUM", ending=".nii.gz")
    right("two gzip members", gzip.compress(plain + data[:50]) + gzip.compress(data[50:]), ending=".nii.gz")
    right("bytes after the voxels", plain + data + b"tail", warns=("TRAILING_DATA",))
    refused("header cut short", plain[:100], "TRUNCATED")
    refused("empty", b"", "TRUNCATED")
    refused("text", b"this is no image, whatever it is called\n" * 20, "UNKNOWN_FORMAT")
    refused("voxels begin inside the header", header(SIZE, "i2", sform=PLAIN, offset=100) + data, "BAD_VALUE")
    refused("voxels begin after the end", header(SIZE, "i2", sform=PLAIN, offset=400) + data, "TRUNCATED")
    refused("negative dims", header(SIZE, "i2", sform=PLAIN, dim=[3, 5, -4, 3, 1, 1, 1, 1]) + data, "BAD_VALUE")
    refused("99 dims", header(SIZE, "i2", sform=PLAIN, dim=[99, 5, 4, 3, 1, 1, 1, 1]) + data, "BAD_VALUE")
    refused("header only", header(SIZE, "i2", sform=PLAIN, magic=b"ni1\0", offset=0), "NO_DATA_FILE", ending=".hdr")
    refused("Analyze", None, "ORIENTATION_UNKNOWN")
    analyze = bytearray(header(SIZE, "i2", offset=0)[:348])
    analyze[344:348] = bytes(4)
    out[-1].make = both({"old.hdr": bytes(analyze), "old.img": data}, "old.hdr")

    # bombs
    huge = header(SIZE, "f8", sform=PLAIN, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])
    refused("dims bomb", huge + data, "BOMB", heavy=True)
    refused("dims bomb gzip", gzip.compress(huge + data), "BOMB", ending=".nii.gz", heavy=True)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    stream = squeeze.compress(plain + data) + b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(64)) + squeeze.flush()
    refused("endless gzip", stream, "BOMB", ending=".nii.gz", heavy=True)
    return out


def right_in_world(found_points: np.ndarray, found_values: np.ndarray, case: Case, tolerance=1e-3) -> bool:
    """Every voxel of the truth is there, at its place in the patient, with its value."""
    from scipy.spatial import cKDTree

    if len(found_points) != len(case.points):
        return False
    distance, which = cKDTree(case.points).query(found_points)
    if distance.max() > tolerance or len(set(which)) != len(which):
        return False
    truth = case.values[which]
    return bool(np.array_equal(truth, found_values, equal_nan=truth.dtype.kind == "f"))


def of_medvlm(case: Case, path: Path) -> tuple[str, tuple[str, ...]]:
    """('right' | 'wrong' | code, warning codes)."""
    import medvlm

    try:
        study = medvlm.read(path, **case.args)
    except medvlm.MedVLMError as e:
        return e.code, ()
    volumes = study.images
    index = np.indices(volumes[0].shape[1:]).reshape(3, -1).T
    columns = [v.voxels.reshape(v.shape[0], -1) for v in volumes]
    values = np.concatenate(columns).T
    values = values[:, 0] if values.shape[1] == 1 else values
    ok = all(np.array_equal(v.affine, volumes[0].affine) for v in volumes)
    ok = ok and right_in_world(volumes[0].world(index), values, case)
    return "right" if ok else "wrong", tuple(w.split(":")[0] for w in study.warnings)


def of_nibabel(case: Case, path: Path) -> str:
    import nibabel as nib

    try:
        image = nib.load(path)
        data = np.asanyarray(image.dataobj)
        at = points(data.shape + (1,) * (3 - data.ndim), image.affine)
    except Exception as e:
        return f"refused ({type(e).__name__})"
    if data.dtype.names:
        data = np.stack([data[c] for c in "RGB"], -1)
    n = int(np.prod(data.shape[:3]))
    values = data.reshape(n, -1)
    return _verdict(case, at, values[:, 0] if values.shape[1] == 1 else values)


def of_simpleitk(case: Case, path: Path) -> str:
    import SimpleITK as sitk

    try:
        image = sitk.ReadImage(str(path))
        data = sitk.GetArrayFromImage(image)
    except Exception:
        return "refused"
    dimension, channels = image.GetDimension(), image.GetNumberOfComponentsPerPixel()
    d = min(3, dimension)
    turn, step = np.eye(3), np.ones(3)
    turn[:d, :d] = np.array(image.GetDirection()).reshape(dimension, dimension)[:d, :d]
    step[:d] = image.GetSpacing()[:d]
    lps = affine(turn, step, [*image.GetOrigin()[:d], 0.0][:3])
    size = (*image.GetSize()[:d], 1)[:3]
    at = points(size, np.diag([-1.0, -1, 1, 1]) @ lps)
    order = tuple(range(dimension))[::-1] + ((dimension,) if channels > 1 else ())
    values = data.transpose(order).reshape(int(np.prod(size)), -1)
    return _verdict(case, at, values[:, 0] if values.shape[1] == 1 else values[:, :3] if channels > 1 else values)


def _verdict(case: Case, at: np.ndarray, values: np.ndarray) -> str:
    if case.expect != "right":
        return "read, no error"
    if case.values.dtype.kind == "f":
        values = values.astype(case.values.dtype)
    return "right" if values.shape == case.values.shape and right_in_world(at, values, case) else "**wrong, no error**"


def table(folder: Path) -> str:
    import contextlib
    import os
    import warnings

    lines = [
        "| case | medvlm | warns | nibabel | SimpleITK |",
        "| --- | --- | --- | --- | --- |",
    ]
    with warnings.catch_warnings(), open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        for n, case in enumerate(cases()):
            here = folder / f"{n:02d}"
            here.mkdir()
            path = case.make(here)
            got, warned = of_medvlm(case, path)
            skip = "not run" if case.heavy else "has no such option" if case.args else None
            peers = [skip, skip] if skip else [of_nibabel(case, path), of_simpleitk(case, path)]
            told = "read right" if got == "right" else f"refused `{got}`" if got != "wrong" else "**wrong, no error**"
            lines.append(f"| {case.name} | {told} | {', '.join(f'`{w}`' for w in warned)} | {peers[0]} | {peers[1]} |")
    return "\n".join(lines)


HEAD = """# Odd NIfTI files: what happens

Made by `python tests/unit/nifti_corpus.py > docs/odd-inputs-nifti.md`. Every file is written field by field and has a
known truth: where each voxel lies in the patient and what it holds. "Right" means that every voxel was found at its
place (1e-3 mm) with its value. A refusal carries the code shown; the command line prints it in one line and exits with 2.
"Read, no error" marks a file with no known truth (damaged, undecidable) that was returned without an error; for complex
and 5-D files that is a feature of those readers. nibabel leaves units of length to its caller, which counts as wrong here.
"""

if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        print(HEAD)
        print(table(Path(scratch)))
