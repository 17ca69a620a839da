"""DICOM segmentation objects: read onto the grid of the image they belong to, and written on it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FileError, GeometryError, MedVLMError, UsageError
from .dicom_header import by_pydicom, parsed, quiet
from .files import writing
from .limits import check_size
from .scan import Image, Volume

NEAR = 0.05
"""A voxel of a segmentation lies on a voxel of its image when it is no further from its centre than this (voxels)."""

SERIES = 9001
"""Series number of what is written: out of the way of a scanner's own."""
NOT_FOR_DIAGNOSIS = "AI, not for diagnosis"
CODES = {
    "lung": "Lung", "heart": "Heart", "heart and mediastinum": "Mediastinum", "airways": "AirwayStructure", "body": "EntireBody", "bone": "Bone", "liver": "Liver",
    "spleen": "Spleen", "kidney": "Kidney", "gallbladder": "Gallbladder", "stomach": "Stomach", "pancreas": "Pancreas", "duodenum": "Duodenum",
    "small bowel": "SmallIntestine", "colon": "Colon", "aorta": "Aorta", "inferior vena cava": "InferiorVenaCava", "spinal cord": "SpinalCord",
    "vessels": "BloodVessel", "nuclei": "Nucleus", "endotracheal tube": "EndotrachealTube", "central venous line": "CentralVenousCatheter",
    "pleural effusion": "PleuralEffusion", "pneumothorax": "Pneumothorax", "cardiomegaly": "Cardiomegaly",
}  # fmt: skip
"""Our words as SNOMED CT concepts, by their names in pydicom's code dictionary (DICOM PS3.16); other words get a code of our own."""
THINGS, CHANGES = ("endotracheal tube", "central venous line", "nasogastric tube"), ("pleural effusion", "pneumothorax", "ground-glass opacity", "consolidation")
SQUARE = 1e-4
"""Cosine of the angle between rows and columns up to which it is a right one."""
UTF8 = "ISO_IR 192"
OWN = "99MEDVLM"
"""Coding scheme of words that the dictionary lacks."""


def coded(label: str) -> tuple[Any, Any | None]:
    """(type, side or None) of a label as coded concepts: "right lung" is the lung and right."""
    from pydicom.sr.codedict import codes

    side, _, bare = label.partition(" ") if label.startswith(("right ", "left ")) else ("", "", label)
    concept = getattr(codes.SCT, CODES[bare]) if bare in CODES else own(bare)
    return concept, {"right": codes.SCT.Right, "left": codes.SCT.Left}.get(side)


def own(word: str) -> Any:
    """A word that the dictionary lacks as a concept of :data:`OWN`."""
    from pydicom.sr.coding import Code

    code = re.sub(r"\W+", "-", word).strip("-").upper() or "TARGET"
    if len(code) > 16:  # a code has no more; two words must not share one
        code = f"{code[:11]}-{hashlib.sha256(word.encode()).hexdigest()[:4].upper()}"
    return Code(code, OWN, _line(word))


def _line(word: str) -> str:
    """A word as one value of at most 64 characters: a backslash would begin another."""
    return word.replace("\\", "/")[:64]


def headers(image: Image | Volume) -> list[Any]:
    """The headers of the DICOM files that an image was read from, each once, without pixels, in UTF-8; with the attributes that every file must have.

    Raises:
        UsageError: NOT_DICOM when it was read from other files.
        FileError: NOT_FOUND when they are not there any more, or others are there now; UNSUPPORTED when they lack the UIDs to be
            referred to, or share them; what is wrong with a file.
    """
    files = list(dict.fromkeys(f for f in image.info.get("files") or () if f))
    if not files or "frames" not in image.info:
        raise UsageError(f"image {image.id} was not read from DICOM files", "NOT_DICOM", "save its masks as .nii.gz or .png")
    found = []
    with quiet():
        for file in files:
            try:
                head = by_pydicom(file).file.dataset
            except OSError:
                raise FileError(f"a DICOM file of image {image.id} is not there any more", "NOT_FOUND") from None
            if missing := [n for n in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID") if not _text(head, n)]:
                raise FileError(f"a DICOM file of image {image.id} has no {missing[0]}, so that nothing can refer to it", "UNSUPPORTED", "give it back its UIDs")
            parsed("the header", head.decode)
            for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
                value = _plain(name, _text(head, name))
                head.pop(name, None)  # it may be stored as what it is not
                setattr(head, name, value)
            head.SpecificCharacterSet = UTF8
            found.append(head)
    uids = [str(head.SOPInstanceUID) for head in found]
    if len(set(uids)) < len(uids):
        raise FileError(f"two DICOM files of image {image.id} have the same SOPInstanceUID, so that nothing can refer to one of them", "UNSUPPORTED", "give each its own")
    if not set(filter(None, image.info.get("sop") or ())) <= set(uids):
        raise FileError(f"the DICOM files of image {image.id} are others than when it was read", "NOT_FOUND", "read it again")
    return found


def _text(head: Any, name: str) -> str:
    """An attribute as text, "" where it is missing or makes no sense as what it says it is."""
    from pydicom.multival import MultiValue

    try:
        value = head.get(name)
    except Exception:  # pydicom raises many kinds, whose texts quote the value
        delattr(head, name)
        return ""
    return "" if value is None else "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value)


def _plain(name: str, value: str) -> str:
    """As DICOM 3 writes it: ACR-NEMA's dots and colons of dates and times are dropped, what is no date, time or sex is left out."""
    from pydicom.valuerep import DA, TM

    try:
        if name.endswith("Date"):
            return value.replace(".", "") if DA(value.replace(".", "")) else ""
        if name.endswith("Time"):
            return value.replace(":", "") if TM(value.replace(":", "")) else ""
    except ValueError:
        return ""
    return value if name != "PatientSex" or value in ("M", "F", "O") else ""


def save_seg(image: Image | Volume, masks: Mapping[str, np.ndarray], path: str | Path, model: tuple[str, str] = ("medvlm", "")) -> Any:
    """Bool masks on an image's own grid -> one DICOM segmentation object (binary, a segment a label, in this order); gives the object.

    What is outlined nowhere stays a segment without frames. A volume may have been turned or resampled since it was read: its
    voxels are written where they lie in the patient.

    Args:
        model: (name, version) of what drew them.

    Raises:
        UsageError: NOT_DICOM for other images. FileError: NOT_FOUND, UNSUPPORTED, CANNOT_WRITE.
        GeometryError: GRID_MISMATCH when a mask has another shape than its image.
    """
    for label, mask in masks.items():
        if mask.shape != image.shape[1:]:
            raise GeometryError(f"the mask of {label} is {mask.shape}, its image {image.id} is {tuple(image.shape[1:])}", "GRID_MISMATCH")
    heads, affine = headers(image), image.affine if isinstance(image, Volume) else image.info.get("affine")
    if affine is None and int(heads[0].get("NumberOfFrames") or 1) > 1:
        raise FileError(f"image {image.id} is one frame of several without a place in the patient, which a segmentation cannot refer to", "UNSUPPORTED", "save its masks as .png")
    if affine is not None and abs(affine[:3, 1] @ affine[:3, 2]) > SQUARE * np.linalg.norm(affine[:3, 1]) * np.linalg.norm(affine[:3, 2]):
        raise GeometryError(f"the rows and columns of image {image.id} are not at right angles, which a segmentation cannot say", "UNSUPPORTED", "save its masks as .nii.gz")
    return saved(lambda: _made(image, affine, masks, heads, model), path, f"the header of image {image.id} cannot carry a segmentation")


def saved(make: Callable[[], Any], path: str | Path, refusal: str) -> Any:
    """What highdicom makes, written to a file whole or not at all; gives the object.

    Raises:
        FileError: UNSUPPORTED, with ``refusal``, for what highdicom does not take: it raises many kinds, whose texts may quote the
            header. CANNOT_WRITE.
    """
    try:
        with quiet():
            made = make()
            with writing(path) as part:
                made.save_as(part)
    except MedVLMError:
        raise
    except Exception as error:
        raise FileError(f"{refusal} ({type(error).__name__})", "UNSUPPORTED") from None
    return made


def _made(image: Image | Volume, affine: np.ndarray | None, masks: Mapping[str, np.ndarray], heads: list[Any], model: tuple[str, str]) -> Any:
    import highdicom
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes

    array = np.stack([np.asarray(m, bool) for m in masks.values()], -1).astype(np.uint8)
    array = array if isinstance(image, Volume) else array[None]
    array = array if array.any() else array[:1]  # of what is empty all frames would be written
    place, groups = {}, heads[0].get("SharedFunctionalGroupsSequence")
    if affine is None:
        heads[0].pop("FrameOfReferenceUID", None)  # of a picture without a place it promises one
    else:
        down, across = np.linalg.norm(affine[:3, 1:3], axis=0)
        directions = affine[:3, 2] / across, affine[:3, 1] / down
        apart = float(abs(affine[:3, 0] @ np.cross(*directions)))  # of a tilted gantry less than the distance of voxel centres
        place = {
            "plane_positions": [highdicom.PlanePositionSequence("PATIENT", affine[:3, 3] + d * affine[:3, 0]) for d in range(len(array))],
            "plane_orientation": highdicom.PlaneOrientationSequence("PATIENT", np.concatenate(directions)),
            "pixel_measures": highdicom.PixelMeasuresSequence((float(down), float(across)), apart, apart if len(array) > 1 else None),
        }
        frame = heads[0].get("FrameOfReferenceUID") or highdicom.UID()
        for head in heads:
            head.FrameOfReferenceUID = frame
            head.SliceThickness = apart  # highdicom takes a header's word before ours
        for name in ("PlaneOrientationSequence", "PixelMeasuresSequence") if groups else ():
            if name not in groups[0]:  # it stands with each frame: those of this image have the same
                setattr(groups[0], name, heads[0].PerFrameFunctionalGroupsSequence[next(f for f in image.info["frames"] if f) - 1].get(name))
    drawn_by = highdicom.AlgorithmIdentificationSequence(model[0], codes.cid7162.ArtificialIntelligence, model[1] or "unknown")
    segments = []
    for number, label in enumerate(masks, start=1):
        concept, side = coded(label)
        bare = label.removeprefix("right ").removeprefix("left ")
        kind = codes.SCT.PhysicalObject if bare in THINGS else codes.SCT.MorphologicallyAbnormalStructure if bare in CHANGES else codes.SCT.AnatomicalStructure
        segment = SegmentDescription(number, _line(label), kind, concept, "AUTOMATIC", drawn_by)
        if side is not None:
            segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [highdicom.sr.CodedConcept.from_code(side)]
        segments.append(segment)
    made = Segmentation(
        heads, array, "BINARY", segments, highdicom.UID(), SERIES, highdicom.UID(), 1, "medvlm", model[0], model[1] or "unknown", "none",
        content_label="MASKS", content_description="outlines drawn by a model", series_description=f"{NOT_FOR_DIAGNOSIS}: outlines", **place,
    )  # fmt: skip
    shared = made.SharedFunctionalGroupsSequence[0] if made.get("SharedFunctionalGroupsSequence") else {}
    if place:
        shared.PixelMeasuresSequence = place["pixel_measures"]
    elif "PixelMeasuresSequence" in shared:
        del shared.PixelMeasuresSequence  # without a slice thickness, which a radiograph has not, highdicom's own reader stumbles over it
    frames = set(image.info["frames"])
    for group in made.PerFrameFunctionalGroupsSequence if groups else ():
        for derived in group.get("DerivationImageSequence", ()):  # highdicom names every frame that lies there, of all phases
            derived.SourceImageSequence = [s for s in derived.SourceImageSequence if s.ReferencedFrameNumber in frames]
    return made


def read_seg(path: str | Path, image: Image | Volume) -> list[tuple[str, np.ndarray]]:
    """(label, bool (D, H, W) on the grid of ``image``) of every segment, in segment order; segments may overlap.

    Voxels are placed through world coordinates, so slices may be stored in any order and empty ones left out. A second
    segment of the same label is numbered ("Tumor 2"). Fractional segments count from 0.5 on.

    Raises:
        FileError: CORRUPT when the file is no segmentation; UNSUPPORTED without 3-D geometry on both sides.
        GeometryError: MIXED_FRAME, GRID_MISMATCH when its voxels do not lie on voxels of the image.
    """
    import highdicom

    if not isinstance(image, Volume):
        raise FileError(f"a DICOM segmentation of the single picture {image.id} is not read", "UNSUPPORTED", "store its masks as PNG")
    path = Path(path)
    try:
        stored = highdicom.seg.segread(path)
        shape = (int(stored.NumberOfFrames), int(stored.Rows), int(stored.Columns))
        numbers = [int(n) for n in stored.segment_numbers]
    except Exception as error:  # pydicom and highdicom raise many kinds, and their texts may quote the file
        raise FileError(f"this is not a readable DICOM segmentation ({type(error).__name__})", "CORRUPT") from error
    check_size(shape, np.uint8, path.stat().st_size, "the segmentation")
    check_size((len(numbers), *image.shape[1:]), bool, path.stat().st_size, "the segmentation")
    frame, other = image.info.get("frame_of_reference"), stored.get("FrameOfReferenceUID")
    if frame and other and str(frame) != str(other):
        raise GeometryError(f"it lies in another frame of reference than image {image.id}", "MIXED_FRAME")
    found, seen = [], {}
    for number in numbers:
        try:
            part = stored.get_volume(segment_numbers=[number], combine_segments=False, allow_missing_positions=True)
        except Exception as error:
            raise FileError(f"segment {number} has no regular grid ({type(error).__name__})", "UNSUPPORTED") from error
        label = str(stored.get_segment_description(number).segment_label)
        seen[label] = seen.get(label, 0) + 1
        array = np.asarray(part.array).reshape(part.spatial_shape) >= 0.5
        found.append((label if seen[label] == 1 else f"{label} {seen[label]}", _onto(array, part.affine, image, "the segmentation")))
    return found


def _onto(array: np.ndarray, affine: np.ndarray, image: Volume, name: str) -> np.ndarray:
    """Voxels put where they lie in the image; nothing is interpolated."""
    matrix = np.linalg.inv(image.affine) @ affine
    for axis in (k for k, n in enumerate(array.shape) if n == 1):  # how far it is to a next one, nobody knows
        along = np.abs(matrix[:3, axis]).argmax()
        matrix[:3, axis] = np.eye(3)[along] * np.sign(matrix[along, axis])
    steps, start = np.rint(matrix[:3, :3]).astype(int), np.rint(matrix[:3, 3]).astype(int)
    far = np.array(np.meshgrid(*[(0, n - 1) for n in array.shape], indexing="ij")).reshape(3, -1)
    off = np.abs(matrix[:3, :3] @ far + matrix[:3, 3:] - (steps @ far + start[:, None])).max()
    low, high = (steps @ far + start[:, None]).min(1), (steps @ far + start[:, None]).max(1)
    straight = (np.abs(steps).sum(0) == 1).all() and (np.abs(steps).sum(1) == 1).all()
    if off > NEAR or not straight or (low < 0).any() or (high >= image.shape[1:]).any():
        raise GeometryError(
            f"{name} is {array.shape} and spans voxels {low.tolist()} to {high.tolist()} of image {image.id}, which is "
            f"{image.shape[1:]}, up to {off:.2g} voxels off their centres", "GRID_MISMATCH",
        )  # fmt: skip
    placed = np.zeros(image.shape[1:], bool)
    index = np.argwhere(array) @ steps.T + start
    placed[tuple(index.T)] = True
    return placed
