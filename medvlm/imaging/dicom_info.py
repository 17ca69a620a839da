"""What the header says about a picture besides its place: modality, unit, windows, side, and what to be warned of."""

from __future__ import annotations

import numpy as np

from ..errors import FileError, GeometryError
from .dicom_header import Header, import_pydicom, parsed
from .dicom_pixels import LOSSY, Layout, table, whole_dtype
from .dicom_stack import Slice, check_spacing, spacing

MODALITIES = {
    **dict.fromkeys(("CR", "DX", "MG", "XA", "RF", "RG", "IO", "PX", "RTIMAGE", "BMD", "XC_DX"), "xray"),
    **dict.fromkeys(("US", "IVUS", "BDUS"), "ultrasound"),
    **dict.fromkeys(("OP", "SRF", "FA", "FS"), "fundus"),
    **dict.fromkeys(("SM", "GM"), "pathology"),
    **dict.fromkeys(("OPT", "OCT", "IVOCT", "OPTENF"), "oct"),
    "CT": "ct", "MR": "mr", "MA": "mr", "PT": "pet", "NM": "nm", "ES": "endoscopy", "DMS": "dermoscopy",
    **dict.fromkeys(("OT", "XC", "SC", "VL", "OPM", "LS", "DG", "TG", "CFM"), "other"),
}  # fmt: skip
"""DICOM modality codes in the vocabulary of :class:`~medvlm.imaging.scan.Image`; a code not listed is "other", none is "unknown"."""

STACKED = frozenset(("CT", "MR", "PT"))
"""Modalities whose single frames are slices of a volume."""
SECONDARY = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary capture: pictures of pictures, without the quantities of the original."""
_POSITIONS = frozenset(("HFS", "HFP", "HFDR", "HFDL", "FFS", "FFP", "FFDR", "FFDL"))


def modality(head: Header) -> str:
    code = head.text("Modality")
    return MODALITIES.get(code, "other") if code else "unknown"


def hounsfield(head: Header) -> bool:
    """Whether values after the rescale are Hounsfield units."""
    return (
        head.text("Modality") == "CT"
        and not head.text("SOPClassUID").startswith(SECONDARY)
        and bool(head.raw("RescaleSlope").strip(b"\0 ") and head.raw("RescaleIntercept").strip(b"\0 "))
        and head.text("RescaleType") in ("HU", "US", "")
        and head.text("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
    )


def plane_spacing(head: Header) -> tuple[tuple[float, float] | None, list[str]]:
    """(H, W) mm of one picture, None when unknown, and what must be said about it."""
    mm, detector = spacing(head), head.numbers("ImagerPixelSpacing", "BAD_SPACING")
    if detector:
        detector = check_spacing(detector, "ImagerPixelSpacing")
        if mm is None or (mm == detector and modality(head) == "xray"):
            return detector, ["DETECTOR_PLANE: the spacing holds at the detector, not in the patient"]
    if mm is None and head.file.dataset is not None and "SequenceOfUltrasoundRegions" in head.file.dataset:
        names = ("PhysicalUnitsXDirection", "PhysicalUnitsYDirection", "PhysicalDeltaY", "PhysicalDeltaX")
        regions = parsed("the ultrasound regions", lambda: [[r.get(n) for n in names] for r in head.file.dataset.SequenceOfUltrasoundRegions])
        if len(regions) != 1:
            return None, [f"REGIONS: the picture has {len(regions)} regions, each with a spacing of its own"]
        (across, down, high, wide) = regions[0]
        if across == down == 3 and None not in (high, wide):  # both in centimetres; the sign only tells the direction
            return check_spacing((10 * abs(high), 10 * abs(wide)), "the spacing of the ultrasound region"), []
    return mm, []


def described(slices: list[Slice], layouts: list[Layout], phase: dict) -> tuple[np.dtype, str, dict]:
    """(dtype, unit, info) of slices that share their description."""
    head, own = slices[0].head, layouts[0]
    unit = "HU" if hounsfield(head) else "uint8" if own.channels == 3 and own.dtype == np.uint8 else "raw"
    dtype = own.dtype
    if len({(l.dtype, l.slope, l.intercept) for l in layouts}) > 1:
        dtype = np.dtype(np.float32) if unit == "HU" else whole_dtype(layouts)
        if any(l.slope != own.slope for l in layouts):
            dtype = np.dtype(np.float32)
    warnings = []
    code, position = head.text("Modality"), head.text("PatientPosition")
    burned, lossy = head.text("BurnedInAnnotation"), head.text("LossyImageCompression") == "01" or head.file.syntax in LOSSY
    if code == "CT" and unit != "HU" and not head.text("SOPClassUID").startswith(SECONDARY):
        warnings.append("NO_RESCALE: the CT does not say how its values become Hounsfield units")
    if code in STACKED and position not in ("", "HFS"):
        warnings.append(f"PATIENT_POSITION: the patient lay {position if position in _POSITIONS else 'in an unusual way'}, not head first and supine")
    if burned == "YES":
        warnings.append("BURNED_IN: the pixels may show the patient's name")
    if lossy:
        warnings.append("LOSSY: the pixels were compressed with loss")
    if head.text("SOPClassUID").startswith(SECONDARY):
        warnings.append("SECONDARY_CAPTURE: the picture was captured from a screen or another device")
    info = {
        "windows": _windows(head, warnings),
        "voi_function": head.text("VOILUTFunction") or None,
        "code": code if code in MODALITIES else None,
        "inverted": own.photometric == "MONOCHROME1",
        "laterality": head.text("ImageLaterality") or head.text("FrameLaterality") or head.text("Laterality") or None,
        "view": head.text("ViewPosition") or None,
        "body_part": head.text("BodyPartExamined") or None,
        "burned_in": {"YES": True, "NO": False}.get(burned),
        "frame_of_reference": head.text("FrameOfReferenceUID") or None,
        "patient_position": position or None,
        "lossy": lossy,
        "series": _free_text(head, "SeriesDescription"),
        "series_number": head.count("SeriesNumber"),
        "sop": [s.head.text("SOPInstanceUID") or None for s in slices],
        "files": [str(s.head.file.path) for s in slices],
        "frames": [s.number + 1 for s in slices],
        "phase": phase,
        "warnings": warnings,
    }
    padding = head.numbers("PixelPaddingValue")
    if padding and own.channels == 1:
        ends = [v * own.slope + own.intercept for v in (*padding[:1], *(head.numbers("PixelPaddingRangeLimit") or padding)[:1])]
        info["padding"] = min(ends), max(ends)
    dataset = head.file.dataset
    if dataset is not None and "VOILUTSequence" in dataset:
        tables = parsed("the VOI table", lambda: [(*table(item), str(item.get("LUTExplanation", ""))) for item in dataset.VOILUTSequence])
        info["voi_lut"] = [dict(zip(("first", "bits", "values", "explanation"), t)) for t in tables]
    return dtype, unit, info


def _windows(head: Header, warnings: list[str]) -> list[tuple[float, float, str]]:
    """(centre, width, explanation) of the file's own windows; those of no width are left out with a warning."""
    try:
        centres, widths = head.numbers("WindowCenter"), head.numbers("WindowWidth")
    except FileError:
        warnings.append("BAD_WINDOW: the window of the file is no number and is ignored")
        return []
    names = [*head.texts("WindowCenterWidthExplanation"), *[""] * len(centres)]
    found = [(c, w, n) for c, w, n in zip(centres, widths, names) if w >= 1 or (w > 0 and head.text("VOILUTFunction") != "")]
    if len(found) < max(len(centres), len(widths)):
        warnings.append("BAD_WINDOW: the file has a window without width and it is ignored")
    return found


def _free_text(head: Header, name: str) -> str:
    """A text attribute in the file's own character set; it may hold names, so it stays in ``info``."""
    raw = head.raw(name).strip(b"\0 ")
    if not raw or raw.isascii():
        return raw.decode()
    import_pydicom()
    from pydicom.charset import convert_encodings, decode_bytes

    try:
        return decode_bytes(raw, convert_encodings(head.texts("SpecificCharacterSet") or ""), set())
    except (LookupError, UnicodeError, ValueError):
        return raw.decode("latin-1")


def judge(head: Header, unit: str, own: Layout, low: float, high: float, warnings: list[str]) -> None:
    """Checks that need the values: refuses impossible Hounsfield units, warns of empty and doubtful pictures."""
    if unit == "HU" and high > 20000 and not own.signed:
        raise GeometryError(f"the CT holds {high:g} HU and declares its values unsigned", "HU_IMPLAUSIBLE")
    said = []
    if low == high:
        said.append(f"EMPTY_IMAGE: all values are {low:g}")
    elif unit == "HU" and low > -200:
        said.append(f"NOT_HU: the least value is {low:g}, so these are hardly Hounsfield units")
    warnings += [s for s in said if s not in warnings]
