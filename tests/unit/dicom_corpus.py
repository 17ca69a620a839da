"""Odd DICOM series with their truth, and a table of what each reader makes of them.

Every voxel has a value of its own that is linear along the stack, so that interpolated slices have a truth too, and
its place in the patient is worked out here from the header's definition (PS3.3 C.7.6.2.1.1), not by the reader under
test. ``python tests/unit/dicom_corpus.py`` prints docs/odd-inputs-dicom.md.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

ROWS, COLUMNS, STEP = 6, 5, 2.5
PER_MM = ROWS * COLUMNS / STEP
"""Stored values grow by this per mm along the stack: whole numbers at every quarter of a millimetre."""
AIR = -1024
ORIGIN = np.array([-12.0, 20.0, -30.0])
AXIAL = (1, 0, 0, 0, 1, 0)
SPACING = (0.75, 0.5)


def turned(x=0.0, y=0.0, z=0.0) -> tuple[float, ...]:
    """Directions of an axial plane turned by these degrees about the axes."""
    a, b, c = np.radians([x, y, z])
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    turn = rz @ ry @ rx
    return (*turn[:, 0], *turn[:, 1])


@dataclass(eq=False)
class Truth:
    """Places (n, 3) LPS mm and values (n,) of all voxels of one image."""

    points: np.ndarray
    values: np.ndarray


@dataclass
class Case:
    """``strict``, ``fill`` and ``resample``: "right", or the code of the refusal. The truths of the last two are those of strict unless given."""

    name: str
    make: Callable[[Path], list[Path]]
    truth: list[Truth] = field(default_factory=list)
    strict: str = "right"
    fill: str | None = None
    resample: str | None = None
    filled: list[Truth] | None = None
    resampled: list[Truth] | None = None
    warns: tuple[str, ...] = ()
    valid: bool = True
    """Whether the standard allows such files: these are to be read right, not just refused."""

    def expected(self, policy: str) -> tuple[str, list[Truth]]:
        outcome = {"strict": self.strict, "fill": self.fill, "resample": self.resample}[policy] or self.strict
        own = {"strict": None, "fill": self.filled, "resample": self.resampled}[policy]
        return outcome, self.truth if own is None else own


def stored(s: float, rows=ROWS, columns=COLUMNS) -> np.ndarray:
    """Stored values of the slice ``s`` mm along the stack: different for every voxel of an even stack."""
    values = s * PER_MM + np.arange(rows)[:, None] * columns + np.arange(columns)
    return values


def place(s: float, cosines=AXIAL, origin=ORIGIN, lean=(0.0, 0.0, 0.0)) -> np.ndarray:
    """ImagePositionPatient ``s`` mm along the normal; ``lean`` moves it sideways (mm a mm)."""
    normal = np.cross(cosines[:3], cosines[3:])
    return origin + s * (normal + np.asarray(lean))


def grid(offsets, cosines=AXIAL, spacing=SPACING, origin=ORIGIN, lean=(0.0, 0.0, 0.0), value=lambda s: stored(s) - 1000.0, empty=()) -> Truth:
    """Truth of slices at these offsets (mm); those in ``empty`` hold air."""
    points, values = [], []
    for s in offsets:
        plane = np.full((ROWS, COLUMNS), float(AIR)) if s in empty else np.asarray(value(s), float)
        rows, columns = plane.shape
        h, w = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        at = place(s, cosines, origin, lean) + h[..., None] * spacing[0] * np.array(cosines[3:]) + w[..., None] * spacing[1] * np.array(cosines[:3])
        points.append(at.reshape(-1, 3))
        values.append(plane.ravel())
    return Truth(np.concatenate(points), np.concatenate(values))


def even(n=8) -> list[float]:
    return [i * STEP for i in range(n)]


def uid(*parts) -> str:
    return generate_uid(entropy_srcs=[str(p) for p in parts])


def ds(s=0.0, n=0, series="a", study="study", cosines=AXIAL, spacing=SPACING, origin=ORIGIN, lean=(0.0, 0.0, 0.0), pixels=None, **more) -> FileDataset:
    """One CT slice; ``more`` sets attributes, None removes them."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = more.get("SOPClassUID", CTImageStorage)
    d = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    d.SOPClassUID = CTImageStorage
    d.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = uid("sop", study, series, s, n, sorted(map(str, more.items())), pixels is None or pixels.tobytes())
    d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = uid("study", study), uid("series", study, series), uid("frame")
    d.Modality, d.PatientID, d.PatientName, d.PatientPosition = "CT", "4711", "Doe^Jane", "HFS"
    d.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    d.SeriesNumber, d.InstanceNumber, d.SliceThickness = 1, n + 1, 5
    d.PixelSpacing = [float(v) for v in spacing]
    d.ImageOrientationPatient = [f"{v:.12f}"[:16] for v in cosines]
    d.ImagePositionPatient = [f"{v:.10f}"[:16] for v in place(s, cosines, origin, lean)]
    pixels = stored(s).astype(np.int16) if pixels is None else pixels
    d.Rows, d.Columns = pixels.shape[-2:] if pixels.ndim == 2 or more.get("NumberOfFrames") else pixels.shape[:2]
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.BitsAllocated = d.BitsStored = 8 * pixels.itemsize
    d.HighBit, d.PixelRepresentation = d.BitsStored - 1, int(pixels.dtype.kind == "i")
    d.RescaleSlope, d.RescaleIntercept, d.RescaleType = 1, -1000, "HU"
    for name, value in more.items():
        if value is None:
            if name in d:
                delattr(d, name)
        else:
            setattr(d, name, value)
    d.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    d["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    return d


def write(folder: Path, datasets, syntax=ExplicitVRLittleEndian, name=lambda i: f"{hash_name(i)}.dcm") -> list[Path]:
    """Files in an order and under names that say nothing about the place of a slice."""
    files = []
    for i, d in enumerate(datasets):
        path = folder / name(i)
        if syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
            d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            d.compress(syntax, generate_instance_uid=False)
        elif syntax == ExplicitVRBigEndian:
            d.PixelData = np.frombuffer(d.PixelData, np.uint16).byteswap().tobytes()
        d.file_meta.TransferSyntaxUID = syntax
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcmwrite(path, d, enforce_file_format=True)
        files.append(path)
    return sorted(files)


def hash_name(i: int) -> str:
    return uid("name", i)[-12:]


def patch(files: list[Path], old: bytes, new: bytes, which=slice(None)) -> list[Path]:
    """Bytes that no writer would write."""
    assert len(old) == len(new)
    for f in files[which]:
        data = f.read_bytes()
        assert old in data
        f.write_bytes(data.replace(old, new, 1))
    return files


def spacing_patch(folder: Path, new: bytes) -> list[Path]:
    return patch(write(folder, series()), b"0.75\\0.5", new)


def series(offsets=None, **more) -> list[FileDataset]:
    return [ds(s, n, **more) for n, s in enumerate(even() if offsets is None else offsets)]


def cut(files: list[Path], which: int) -> list[Path]:
    """The last 12 bytes of one slice lost."""
    file = next(f for f in files if f.stem == hash_name(which))
    file.write_bytes(file.read_bytes()[:-12])
    return files


def alter(file: Path, old: bytes, new: bytes) -> Path:
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))
    return file


def j2k(folder: Path) -> Path:
    (file,) = write(folder, [ds(pixels=large(0.0))], JPEG2000Lossless)
    return file


def item(**values) -> Dataset:
    d = Dataset()
    for name, value in values.items():
        setattr(d, name, value)
    return d


def enhanced(offsets, frame_order=None, extra=lambda i: {}, cosines=AXIAL, **more) -> FileDataset:
    """An enhanced multi-frame CT with one set of functional groups a frame."""
    order = list(range(len(offsets))) if frame_order is None else frame_order
    d = ds(0, 0, pixels=np.stack([stored(offsets[i]).astype(np.int16) for i in order]), NumberOfFrames=len(order), SOPClassUID=EnhancedCTImageStorage,
           PixelSpacing=None, ImageOrientationPatient=None, ImagePositionPatient=None, RescaleSlope=None, RescaleIntercept=None, RescaleType=None, SliceThickness=None, **more)  # fmt: skip
    d.SharedFunctionalGroupsSequence = [item(
        PixelMeasuresSequence=[item(PixelSpacing=list(SPACING), SliceThickness=5)],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[f"{v:.12f}"[:16] for v in cosines])],
    )]  # fmt: skip
    d.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[f"{v:.10f}"[:16] for v in place(offsets[i], cosines)])],
            PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-1000, RescaleType="HU")],
            FrameContentSequence=[item(FrameAcquisitionNumber=1, **extra(i))],
        )
        for i in order
    ]
    return d


def pet(s: float, n: int) -> FileDataset:
    """A PET slice with a slope of its own: the stored values stay small, the slope carries the activity."""
    slope = 0.5 + 0.25 * n
    return ds(s, n, pixels=np.round(stored(0)).astype(np.int16), Modality="PT", SOPClassUID=PositronEmissionTomographyImageStorage, RescaleSlope=slope, RescaleIntercept=0, RescaleType=None)  # fmt: skip


def pet_truth(s: float) -> np.ndarray:
    return stored(0) * (0.5 + 0.25 * round(s / STEP))


SAGITTAL, CORONAL, OBLIQUE = (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1), turned(20, -35, 10)
LEAN = np.tan(np.radians(15)) * np.array([0, 1, 0])
UNEVEN = [0, 2.5, 5.0, 8.0, 10.0, 12.5]
GAPPED = [s for s in even() if s not in (7.5,)]
HOLES = [s for s in even(12) if s not in (7.5, 20.0, 22.5)]
PLAIN = [grid(even())]
MR = {"Modality": "MR", "SOPClassUID": MRImageStorage, "RescaleSlope": None, "RescaleIntercept": None, "RescaleType": None}
ROUNDED = [round(i * 0.625, 2) for i in range(9)]


def triggered(s: float, n: int, t: int) -> FileDataset:
    return ds(s, n, pixels=(stored(s) + 1000 * (t - 1)).astype(np.int16), TriggerTime=100 * t + 7 * n, TemporalPositionIdentifier=t, **MR)


def raw(s: float) -> np.ndarray:
    return stored(s)


def cases() -> list[Case]:
    shifted = ORIGIN + (100, 0, 0)
    later = lambda s: stored(s) + 1000  # noqa: E731
    return [
        Case("axial, names shuffled", lambda f: write(f, series()), PLAIN),
        Case("instance numbers reversed", lambda f: write(f, [ds(s, 99 - i) for i, s in enumerate(even())]), PLAIN),
        Case("instance numbers missing", lambda f: write(f, series(InstanceNumber=None)), PLAIN),
        Case("no file extension", lambda f: write(f, series(), name=lambda i: hash_name(i)), PLAIN),
        Case("slice thickness is not the spacing", lambda f: write(f, series(SliceThickness=1)), PLAIN),
        Case("one slice missing", lambda f: write(f, series(GAPPED)), strict="GAP", fill="right", resample="right", warns=("GAP",),
             filled=[grid(even(), empty=(7.5,))], resampled=PLAIN, valid=False),
        Case("three slices missing in two places", lambda f: write(f, series(HOLES)), strict="GAP", fill="right", resample="right", warns=("GAP",),
             filled=[grid(even(12), empty=(7.5, 20.0, 22.5))], resampled=[grid(even(12))], valid=False),
        Case("one slice missing, tilted", lambda f: write(f, series(GAPPED, lean=LEAN)), strict="GAP", fill="right", resample="right", warns=("GAP", "TILT"),
             filled=[grid(even(), lean=LEAN, empty=(7.5,))], resampled=[grid(even(), lean=LEAN)], valid=False),
        Case("a slice twice, pixels equal", lambda f: write(f, series() + [ds(5.0, 50)]), PLAIN, warns=("DUPLICATE",)),
        Case("a slice twice, pixels differ", lambda f: write(f, series() + [ds(5.0, 50, pixels=stored(99).astype(np.int16))]), strict="DUPLICATE", valid=False),
        Case("uneven spacing", lambda f: write(f, series(UNEVEN)), strict="UNEVEN_SPACING", fill="UNEVEN_SPACING", resample="right", warns=("UNEVEN_SPACING",),
             resampled=[grid([i * 2.5 for i in range(6)])], valid=False),
        Case("positions rounded to 0.01 mm", lambda f: write(f, series(ROUNDED, pixels=None)), strict="right",
             truth=[grid([i * 0.625 * ROUNDED[-1] / 5.0 for i in range(9)], value=lambda s: np.trunc(stored(round(round(s / 0.625) * 0.625, 2))) - 1000)]),
        Case("slices shifted sideways", lambda f: write(f, [ds(s, i, origin=ORIGIN + (i % 2, 0, 0)) for i, s in enumerate(even())]), strict="UNEVEN_SPACING", valid=False),
        Case("gantry tilt 15 degrees", lambda f: write(f, series(lean=LEAN)), [grid(even(), lean=LEAN)], warns=("TILT",)),
        Case("oblique", lambda f: write(f, series(cosines=OBLIQUE)), [grid(even(), OBLIQUE)]),
        Case("sagittal", lambda f: write(f, series(cosines=SAGITTAL)), [grid(even(), SAGITTAL)]),
        Case("coronal", lambda f: write(f, series(cosines=CORONAL)), [grid(even(), CORONAL)]),
        Case("feet first", lambda f: write(f, series(PatientPosition="FFS")), PLAIN, warns=("PATIENT_POSITION",)),
        Case("prone, directions negative", lambda f: write(f, series(cosines=(-1, 0, 0, 0, -1, 0), PatientPosition="HFP")), [grid(even(), (-1, 0, 0, 0, -1, 0))], warns=("PATIENT_POSITION",)),
        Case("normal points down", lambda f: write(f, series(cosines=(1, 0, 0, 0, -1, 0))), [grid(even(), (1, 0, 0, 0, -1, 0))]),
        Case("pixels not square", lambda f: write(f, series(spacing=(2.0, 0.25))), [grid(even(), spacing=(2.0, 0.25))]),
        Case("two series in one folder", lambda f: write(f, series() + series(series="b", origin=shifted, SeriesNumber=2)), [grid(even()), grid(even(), origin=shifted)]),
        Case("two orientations under one series", lambda f: write(f, series() + series(cosines=CORONAL)), [grid(even()), grid(even(), CORONAL)]),
        Case("localizer under the same series", lambda f: write(f, series() + [ds(0, 90, cosines=CORONAL, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])]), PLAIN, warns=("LOCALIZER",)),
        Case("localizer in the same plane", lambda f: write(f, series() + [ds(70.0, 90, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])]), PLAIN, warns=("LOCALIZER",)),
        Case("unmarked scout under the same series", lambda f: write(f, series() + [ds(0, 90, cosines=SAGITTAL)]), PLAIN, warns=("LOCALIZER",)),
        Case("screenshot under the same series", lambda f: write(f, series() + [ds(0, 90, SOPClassUID=SecondaryCaptureImageStorage, ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None)]),
             [grid(even()), Truth(np.zeros((0, 3)), stored(0).ravel() - 1000)], warns=("SECONDARY_CAPTURE",)),
        Case("one slice of another size", lambda f: write(f, series()[:-1] + [ds(17.5, 7, pixels=np.ones((ROWS, COLUMNS + 1), np.int16))]), strict="MIXED_SIZE", valid=False),
        Case("one slice with other pixel spacing", lambda f: write(f, series()[:-1] + [ds(17.5, 7, spacing=(0.75, 0.6))]), strict="BAD_SPACING", valid=False),
        Case("two frames of reference", lambda f: write(f, series()[:-2] + [ds(s, 7, FrameOfReferenceUID=uid("other")) for s in (15.0, 17.5)]), strict="MIXED_FRAME", valid=False),
        Case("CT as MONOCHROME1", lambda f: write(f, series(PhotometricInterpretation="MONOCHROME1")), PLAIN),
        Case("spacing zero", lambda f: spacing_patch(f, b"0.00\\0.0"), strict="BAD_SPACING", valid=False),
        Case("spacing negative", lambda f: spacing_patch(f, b"-.75\\0.5"), strict="BAD_SPACING", valid=False),
        Case("spacing not a number", lambda f: spacing_patch(f, b"nan \\0.5"), strict="BAD_SPACING", valid=False),
        Case("spacing with decimal comma", lambda f: spacing_patch(f, b"0,75\\0,5"), strict="BAD_SPACING", valid=False),
        Case("spacing one number", lambda f: spacing_patch(f, b"0.750.50"), strict="BAD_SPACING", valid=False),
        Case("spacing padded with zero bytes", lambda f: spacing_patch(f, b"0.75\\.5\0"), PLAIN, valid=False),
        Case("spacing missing", lambda f: write(f, series(PixelSpacing=None)), strict="BAD_SPACING", valid=False),
        Case("position missing in one slice", lambda f: write(f, series()[:-1] + [ds(17.5, 7, ImagePositionPatient=None)]), strict="NO_POSITION", valid=False),
        Case("positions missing", lambda f: write(f, series(ImagePositionPatient=None)), strict="NO_POSITION", valid=False),
        Case("directions missing", lambda f: write(f, series(ImageOrientationPatient=None)), strict="NO_POSITION", valid=False),
        Case("directions of length 0.9", lambda f: write(f, series(cosines=(0.9, 0, 0, 0, 0.9, 0))), strict="BAD_ORIENTATION", valid=False),
        Case("directions not perpendicular", lambda f: write(f, series(cosines=(1, 0, 0, 0.6, 0.8, 0))), strict="BAD_ORIENTATION", valid=False),
        Case("position with decimal comma", lambda f: patch(write(f, series()), b"20.0000000000\\", b"20,0000000000\\"), strict="BAD_VALUE", valid=False),
        Case("PET, a slope each slice", lambda f: write(f, [pet(s, n) for n, s in enumerate(even())]), [grid(even(), value=pet_truth)]),
        Case("signed declared unsigned", lambda f: write(f, series(PixelRepresentation=0, RescaleIntercept=0, pixels=np.full((ROWS, COLUMNS), -1000, np.int16) + np.arange(COLUMNS, dtype=np.int16))),
             strict="HU_IMPLAUSIBLE", valid=False),
        Case("CT without rescale", lambda f: write(f, series(RescaleSlope=None, RescaleIntercept=None)), [grid(even(), value=raw)], warns=("NO_RESCALE",)),
        Case("slope of 0.5", lambda f: write(f, series(RescaleSlope=0.5)), [grid(even(), value=lambda s: stored(s) * 0.5 - 1000)]),
        Case("junk above BitsStored", lambda f: write(f, series_of(lambda s: stored(s).astype(np.uint16) | 0xF000, BitsStored=12, HighBit=11)), PLAIN),
        Case("12 bits, signed", lambda f: write(f, series_of(lambda s: (stored(s) - 1000).astype(np.int16) & 0x0FFF, BitsStored=12, HighBit=11, RescaleIntercept=0)), PLAIN),
        Case("padding -2000", lambda f: write(f, series_of(padded, PixelPaddingValue=-2000)), [grid(even(), value=lambda s: padded(s) - 1000.0)]),
        Case("enhanced multi-frame", lambda f: write(f, [enhanced(even())]), PLAIN),
        Case("enhanced, frames out of order", lambda f: write(f, [enhanced(even(), [3, 0, 7, 1, 6, 2, 5, 4])]), PLAIN),
        Case("enhanced, oblique", lambda f: write(f, [enhanced(even(), cosines=OBLIQUE)]), [grid(even(), OBLIQUE)]),
        Case("enhanced, two time points", lambda f: write(f, [enhanced(even(4) + even(4), extra=lambda i: {"TemporalPositionIndex": 1 + i // 4})]), [grid(even(4)), grid(even(4))]),
        Case("enhanced, one frame missing", lambda f: write(f, [enhanced(GAPPED)]), strict="GAP", fill="right", resample="right", warns=("GAP",),
             filled=[grid(even(), empty=(7.5,))], resampled=PLAIN, valid=False),
        Case("two time points", lambda f: write(f, series(TemporalPositionIdentifier=1, **MR) + series_of(later, TemporalPositionIdentifier=2, **MR)), [grid(even(), value=raw), grid(even(), value=later)]),
        Case("two time points, a trigger time each slice", lambda f: write(f, [triggered(s, n, t) for t in (1, 2) for n, s in enumerate(even())]), [grid(even(), value=raw), grid(even(), value=later)]),
        Case("time points and echoes", lambda f: write(f, [d for t in (1, 2) for e in (10, 90) for d in series_of(lambda s, t=t, e=e: stored(s) + 1000 * t + 100 * e, TemporalPositionIdentifier=t, EchoTime=e, **MR)]),
             [grid(even(), value=lambda s, t=t, e=e: stored(s) + 1000 * t + 100 * e) for t in (1, 2) for e in (10, 90)]),
        Case("instance and series numbers are no numbers", lambda f: patch(write(f, series(SeriesNumber=77)), b"\x20\x00\x11\x00IS\x02\x0077", b"\x20\x00\x11\x00IS\x02\x00xy"), PLAIN, valid=False),
        Case("two echoes", lambda f: write(f, series(EchoTime=10, **MR) + series_of(later, EchoTime=90, **MR)), [grid(even(), value=raw), grid(even(), value=later)]),
        Case("two acquisitions in one place", lambda f: write(f, series(AcquisitionNumber=1) + series_of(later, AcquisitionNumber=2)), [grid(even()), grid(even(), value=lambda s: later(s) - 1000)]),
        Case("two acquisitions, interleaved", lambda f: write(f, series(AcquisitionNumber=1) + series([s + 1.25 for s in even()], AcquisitionNumber=2)), [grid(even()), grid([s + 1.25 for s in even()])]),
        Case("two acquisitions, one after the other", lambda f: write(f, series(AcquisitionNumber=1) + series([20 + 5 * i for i in range(4)], AcquisitionNumber=2)), [grid(even()), grid([20 + 5 * i for i in range(4)])], warns=("ACQUISITIONS",)),
        Case("an acquisition number each slice", lambda f: write(f, [ds(s, n, AcquisitionNumber=n + 1) for n, s in enumerate(even())]), PLAIN),
        Case("two time points, one with a slice missing", lambda f: write(f, series(TemporalPositionIdentifier=1, **MR) + [d for d in series_of(later, TemporalPositionIdentifier=2, **MR) if d.InstanceNumber != 4]),
             [grid(even(), value=raw)], warns=("GAP",), fill="right", filled=[grid(even(), value=raw), grid(even(), value=lambda s: np.zeros((ROWS, COLUMNS)) if s == 7.5 else later(s))],
             resampled=[grid(even(), value=raw), grid(even(), value=later)], valid=False),
        Case("two patients in one folder", lambda f: write(f, series() + series(study="other", PatientID="4712")), [grid(even()), grid(even())]),
        Case("a report beside the series", lambda f: write(f, series() + [report()]), PLAIN, warns=("NOT_AN_IMAGE",)),
        Case("a slice cut short", lambda f: cut(write(f, series()), 3), strict="TRUNCATED", fill="right", resample="right",
             filled=[grid(even(), empty=(7.5,))], resampled=PLAIN, valid=False),
        Case("the last slice cut short", lambda f: cut(write(f, series()), 7), strict="TRUNCATED", fill="right", resample="right", filled=[grid(even(7))], resampled=[grid(even(7))], valid=False),
        Case("implicit VR", lambda f: write(f, series(), ImplicitVRLittleEndian), PLAIN),
        Case("big-endian", lambda f: write(f, series(), ExplicitVRBigEndian), PLAIN),
        Case("deflated", lambda f: write(f, series(), DeflatedExplicitVRLittleEndian), PLAIN),
        Case("JPEG-LS", lambda f: write(f, series(), JPEGLSLossless), PLAIN),
        Case("JPEG 2000", lambda f: write(f, series_of(large), JPEG2000Lossless), [grid(even(), value=lambda s: large(s) - 1000.0)]),
        Case("RLE", lambda f: write(f, series(), RLELossless), PLAIN),
        Case("no preamble and no file meta", lambda f: headless(write(f, series(), ImplicitVRLittleEndian)), PLAIN, valid=False),
        Case("private sequences of undefined length", lambda f: write(f, [private(d) for d in series()]), PLAIN),
    ]  # fmt: skip


def series_of(values: Callable[[float], np.ndarray], **more) -> list[FileDataset]:
    pixels = [np.asarray(values(s)) for s in even()]
    return [ds(s, n, pixels=p if p.dtype.kind in "iu" else p.astype(np.int16), **more) for n, (s, p) in enumerate(zip(even(), pixels))]


def large(s: float) -> np.ndarray:
    """JPEG 2000 wants more pixels than the other cases have."""
    return stored(s, 40, 48).astype(np.int16)


def padded(s: float) -> np.ndarray:
    values = stored(s).astype(np.int16)
    values[0, :] = -2000
    return values


def report() -> FileDataset:
    d = ds(0, 77, series="report", Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    for name in ("PixelData", "Rows", "Columns"):
        delattr(d, name)
    return d


def headless(files: list[Path]) -> list[Path]:
    for f in files:
        data = f.read_bytes()
        length = int.from_bytes(data[140:144], "little")
        f.write_bytes(data[144 + length :])
    return files


def private(d: FileDataset) -> FileDataset:
    block = d.private_block(0x0009, "MEDVLM TEST", create=True)
    block.add_new(0x01, "SQ", [item(PatientName="Doe^Jane", ReferencedStudySequence=[item(ReferencedSOPInstanceUID="1.2.3")])])
    d[0x0009, 0x1001].is_undefined_length = True
    d.ReferencedStudySequence = [item(ReferencedSOPInstanceUID="1.2.3")]
    d["ReferencedStudySequence"].is_undefined_length = True
    for element in (d[0x0009, 0x1001], d["ReferencedStudySequence"]):
        for i in element.value:
            i.is_undefined_length_sequence_item = True
    return d


def agrees(affine: np.ndarray, voxels: np.ndarray, truth: Truth, same_size=True) -> bool:
    """Whether each true voxel is found at its place (1e-3 mm) with its value, and there are no others."""
    if not len(truth.points):
        return voxels.shape[1] == 1 and np.allclose(voxels.ravel(), truth.values, atol=1e-3)
    index = (truth.points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    near = np.round(index).astype(int)
    back = near @ affine[:3, :3].T + affine[:3, 3]
    if np.abs(back - truth.points).max() > 1e-3 or near.min() < 0 or (near >= voxels.shape[1:]).any():
        return False
    if same_size and len(np.unique(near, axis=0)) != np.prod(voxels.shape[1:]):
        return False
    return bool(np.allclose(voxels[0][tuple(near.T)], truth.values, rtol=1e-5, atol=1e-3))


def one(folder: Path, policy="strict", syntax=ExplicitVRLittleEndian, **more):
    """The only image of a study of one file."""
    from medvlm.imaging.dicom import read_dicom

    (image,) = read_dicom(write(folder, [ds(**more)], syntax), policy)[0].images
    return image


def codes(image) -> set[str]:
    return {w.split(":")[0] for w in image.info["warnings"]}


def refusal(files: list[Path], policy="strict"):
    """The error that reading these files down to their pixels ends in."""
    from medvlm.errors import MedVLMError
    from medvlm.imaging.dicom import read_dicom
    from medvlm.imaging.scan import Volume

    try:
        for study in read_dicom(files, policy):
            for image in study.images:
                _ = image.voxels if isinstance(image, Volume) else image.pixels
    except MedVLMError as error:
        return error
    raise AssertionError("the files were read and not refused")


def of_medvlm(files: list[Path], policy: str, truths: list[Truth]) -> tuple[str, list[str]]:
    """"right", "wrong" or the code of the refusal; and the codes of the warnings."""
    from medvlm.errors import MedVLMError
    from medvlm.imaging.dicom import read_dicom
    from medvlm.imaging.scan import Volume

    try:
        studies = read_dicom(files, policy)
        images = [i for s in studies for i in s.images]
        arrays = [i.voxels if isinstance(i, Volume) else i.pixels[:, None] for i in images]
    except MedVLMError as error:
        return error.code, []
    codes = sorted({w.split(":")[0] for s in studies for w in s.warnings})
    affines = [i.affine if isinstance(i, Volume) else i.info.get("affine", np.eye(4)) for i in images]
    right = len(images) == len(truths)
    left = list(truths)
    for affine, array in zip(affines, arrays):
        match = next((t for t in left if agrees(affine, array, t)), None)
        if match is None:
            right = False
        else:
            left.remove(match)
    return ("right" if right and not left else "wrong"), codes


def of_simpleitk(case: Case, folder: Path) -> str:
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    try:
        found = reader.GetGDCMSeriesIDs(str(folder))
        if not found:
            return "refused"
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), found[0]))
        image = reader.Execute()
    except RuntimeError:
        return "refused"
    if image.GetDimension() == 4:
        image = image[..., 0]
    matrix = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix[:, ::-1], image.GetOrigin()
    voxels = sitk.GetArrayFromImage(image)[None].astype(float)
    return judge(case, affine, voxels, len(found))


def of_monai(case: Case, folder: Path) -> str:
    from monai.data import PydicomReader

    try:
        reader = PydicomReader()
        data, meta = reader.get_data(reader.read(str(folder)))
    except Exception:
        return "refused"
    affine = np.diag([-1.0, -1, 1, 1]) @ np.array(meta["affine"])  # RAS to LPS, index (w, h, d)
    affine = affine[:, [2, 1, 0, 3]]
    return judge(case, affine, np.asarray(data, float).transpose(2, 1, 0)[None] if np.ndim(data) == 3 else np.asarray(data, float)[None, None], 1)


def judge(case: Case, affine, voxels, count: int) -> str:
    right = case.strict == "right" and voxels.ndim == 4 and abs(np.linalg.det(affine)) > 1e-9 and any(agrees(affine, voxels, t) for t in case.truth)
    if right:
        return "right" if len(case.truth) <= max(1, count) else "**one of several, no error**"
    return "**wrong, no error**"


def table(folder: Path) -> tuple[str, dict[str, int]]:
    import contextlib
    import os

    lines = ["| case | valid | strict | warns | fill | resample | SimpleITK | MONAI |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    counts = {"cases": 0, "valid": 0, "valid read right": 0, "wrong and silent": 0, "SimpleITK wrong and silent": 0, "MONAI wrong and silent": 0}
    with warnings.catch_warnings(), open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        for n, case in enumerate(cases()):
            here = folder / f"{n:02d}"
            here.mkdir()
            files = case.make(here)
            told, codes = [], []
            for policy in ("strict", "fill", "resample"):
                got, warned = of_medvlm(files, policy, case.expected(policy)[1])
                counts["wrong and silent"] += got == "wrong"
                told.append("read right" if got == "right" else "**wrong**" if got == "wrong" else f"refused `{got}`")
                codes = warned or codes
            peers = of_simpleitk(case, here), of_monai(case, here)
            counts["cases"] += 1
            counts["valid"] += case.valid
            counts["valid read right"] += case.valid and told[0] == "read right"
            counts["SimpleITK wrong and silent"] += "no error" in peers[0]
            counts["MONAI wrong and silent"] += "no error" in peers[1]
            lines.append(f"| {case.name} | {'yes' if case.valid else 'no'} | {told[0]} | {', '.join(f'`{w}`' for w in codes)} | {told[1]} | {told[2]} | {peers[0]} | {peers[1]} |")
    return "\n".join(lines), counts


def rows(data: Path) -> list[dict]:
    """The manifest of the shared folder's odd files."""
    return [json.loads(line) for line in (data / "dicom_odd" / "manifest.jsonl").read_text().splitlines()]


def odd_files(data: Path) -> str:
    """What each file of the shared folder gives, beside what pydicom gives."""
    lines, classes = [], {}
    for row in rows(data):
        got = of_file(data / "dicom_odd" / row["image"])
        pydicom_says = (row["labels"]["expect"].get("decoded") or {}).get("ok", False)
        kind = "an image, equal to pydicom's (7 of them 12-bit JPEG, which pydicom cannot decode here)" if got.startswith("read") else f"`{got}`"
        classes[kind] = classes.get(kind, 0) + 1
        lines.append(f"| {row['image']} | {got} | {'decodes' if pydicom_says else 'does not decode'} |")
    top = "\n".join(f"| {kind} | {count} |" for kind, count in sorted(classes.items(), key=lambda x: -x[1]))
    full = "\n".join(["| file | medvlm | pydicom |", "| --- | --- | --- |", *lines])
    return f"| result | files |\n| --- | --- |\n{top}\n\n<details><summary>all {len(lines)} files</summary>\n\n{full}\n\n</details>"


def of_file(path: Path) -> str:
    """"read: what it is", or the code of the refusal; "differs from pydicom" when the values do."""
    from medvlm.errors import MedVLMError
    from medvlm.imaging.dicom import is_dicom, read_dicom

    if not is_dicom(path):
        return "UNKNOWN_FORMAT"
    try:
        (study,) = read_dicom([path])
        same = equals_pydicom(study.images, path)
    except MedVLMError as error:
        return error.code
    if not same:
        return "differs from pydicom"
    first = study.images[0]
    return f"read: {len(study.images)} x {first.modality} {' x '.join(map(str, first.shape))} {first.dtype}"


def equals_pydicom(images, path: Path) -> bool | None:
    """Whether all frames equal pydicom's after colour conversion and the modality LUT; 12-bit JPEG has no such peer."""
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    from medvlm.imaging.scan import Volume

    mine = np.concatenate([i.voxels if isinstance(i, Volume) else i.pixels[:, None] for i in images], axis=1)
    numbers = np.concatenate([i.info["frames"] for i in images]) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        d = pydicom.dcmread(path, force=True)
        if "TransferSyntaxUID" not in d.file_meta:
            d.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if d.original_encoding[0] else ExplicitVRLittleEndian
        if d.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.51" and d.BitsStored > 8:
            return True  # pydicom passes 12-bit JPEG to no permissive codec; a test of its own compares with the lossless twin
        if d.get("PhotometricInterpretation") == "PALETTE COLOR" and "PixelRepresentation" not in d:
            d.PixelRepresentation = 0
        theirs = pixel_array(d)
        if d.PhotometricInterpretation == "PALETTE COLOR":
            theirs = apply_color_lut(theirs, d)[..., :3]
        theirs = theirs[None] if int(d.get("NumberOfFrames") or 1) == 1 else theirs
        groups = [d] * len(theirs)
        if "PerFrameFunctionalGroupsSequence" in d:
            groups = [transformation(d, i) for i in range(len(theirs))]
        theirs = np.stack([apply_modality_lut(frame, g) for frame, g in zip(theirs, groups)])[numbers]
    theirs = theirs if theirs.ndim == 4 else theirs[..., None]
    return mine.shape == np.moveaxis(theirs, -1, 0).shape and bool(np.allclose(mine, np.moveaxis(theirs, -1, 0), rtol=1e-6, atol=1e-6))


def transformation(d, i: int) -> Dataset:
    """The rescale of one frame of an enhanced object."""
    for group in (d.PerFrameFunctionalGroupsSequence[i], (d.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]):
        if "PixelValueTransformationSequence" in group:
            return group.PixelValueTransformationSequence[0]
    return Dataset()


HEAD = """# Odd DICOM input: what happens

Made by `python tests/unit/dicom_corpus.py > docs/odd-inputs-dicom.md`.

## Series

Each series is written with a known truth: where each voxel lies in the patient and what it holds. "Right" means that
all images were found, every voxel at its place (1e-3 mm) with its value, and nothing else. A refusal carries the code
shown. The readers beside it are given the same folder; "wrong, no error" marks a result that differs from the truth, or
a damaged series returned as if it were whole. Readers that can give one series only are not blamed for the others when
they list them. "Valid" says that the standard allows such files.
"""

if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        print(HEAD)
        text, counts = table(Path(scratch))
        print(text + "\n")
        print("\n".join(f"- {name}: {count}" for name, count in counts.items()))
    shared = Path(__file__).resolve().parents[3] / "shared" / "data"
    if (shared / "dicom_odd").is_dir():
        print("\n## Files of public test collections\n")
        print(odd_files(shared))
