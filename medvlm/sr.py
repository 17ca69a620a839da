"""A reading as a DICOM structured report: every finding with its chance, every outline with the segment it is, the sentences as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import FileError
from .imaging.scan import Image, Volume
from .imaging.seg import NOT_FOR_DIAGNOSIS, coded, headers, own, saved
from .sample import NOTICE, Report

SERIES = 9002
"""Series number of what is written."""
NAMES = {"area": "Area", "volume": "Volume"}
"""Measurements as SNOMED CT concepts, by their names in pydicom's code dictionary; others get a code of our own."""


@dataclass(frozen=True, eq=False)
class Read:
    """One image, what was reported of it, and its outlines: {label: bool mask}, as the segments of ``seg`` (:func:`~medvlm.imaging.seg.save_seg`), None without any."""

    image: Image | Volume
    report: Report
    masks: Mapping[str, np.ndarray]
    seg: Any | None = None


def save_sr(readings: Sequence[Read], path: str | Path, model: tuple[str, str]) -> Path:
    """A measurement report (DICOM PS3.16, TID 1500) about images of one study: partial and unverified, until a person signs.

    Each outline of an image is a group that refers to its segment (TID 1410, 1411); each finding a group with present or
    absent (CID 240) and the chance as a percentage (111012, Certainty of Finding); sentences follow as texts.

    Args:
        model: (name, version) of what read them.

    Raises:
        UsageError: NOT_DICOM when an image was read from other files.
        FileError: NOT_FOUND, UNSUPPORTED, CANNOT_WRITE.
    """
    heads = [headers(r.image) for r in readings]
    if len({str(h.StudyInstanceUID) for head in heads for h in head}) > 1:
        raise FileError("the images belong to several studies; a report is about one", "UNSUPPORTED")
    saved(lambda: _made(readings, heads, model), path, f"the header of image {readings[0].image.id} cannot carry a report")
    return Path(path)


def _made(readings: Sequence[Read], heads: list[list[Any]], model: tuple[str, str]) -> Any:
    import highdicom
    from highdicom import sr
    from pydicom.sr.codedict import codes

    drawn_by = sr.AlgorithmIdentification(model[0], model[1] or "unknown")
    groups = [group for read, head in zip(readings, heads) for group in (*_outlines(read, head, drawn_by), *_findings(read, head, drawn_by))]
    if not groups:  # the template wants one
        groups = [sr.MeasurementsAndQualitativeEvaluations(sr.TrackingIdentifier(highdicom.UID(), r.image.id), algorithm_id=drawn_by, source_images=_sources(r.image, h)) for r, h in zip(readings, heads)]
    observer = sr.ObserverContext(codes.DCM.Device, sr.DeviceObserverIdentifyingAttributes(highdicom.UID(), name=model[0], manufacturer_name="medvlm"))
    content = sr.MeasurementReport(sr.ObservationContext(observer_device_context=observer), codes.SCT.ImagingProcedure, groups)
    said = [(codes.DCM.Impression if s.section == "impression" else codes.DCM.Finding, s.text) for r in readings for s in r.report.sentences]
    for name, text in (*said, (codes.DCM.Comment, NOTICE)):
        content[0].ContentSequence.append(sr.TextContentItem(name, text, "CONTAINS"))
    evidence = [h for head in heads for h in head] + [r.seg for r in readings if r.seg is not None]
    return sr.Comprehensive3DSR(
        evidence, content, highdicom.UID(), SERIES, highdicom.UID(), 1, "medvlm", is_complete=False, is_final=False, is_verified=False,
        series_description=f"{NOT_FOR_DIAGNOSIS}: reading", manufacturer_model_name=model[0], software_versions=model[1] or "unknown", device_serial_number="none",
    )  # fmt: skip


def _outlines(read: Read, heads: list[Any], drawn_by: Any) -> Iterator[Any]:
    """A group for each segment on which something is outlined."""
    import highdicom
    from highdicom import sr

    chances = {r.label: r.probability for f in read.report.looked_for for r in f.regions}
    frame = 0
    for number, (label, mask) in enumerate(read.masks.items(), start=1):
        if read.seg is None or not mask.any():
            continue
        frame += 1  # of a single picture: a segment without an outline has none
        concept, side = coded(label)
        about = {
            "tracking_identifier": sr.TrackingIdentifier(highdicom.UID(), f"{read.image.id} {label}"), "finding_type": concept, "algorithm_id": drawn_by,
            "finding_sites": [sr.FindingSite(concept, laterality=side)] if side is not None else None, "measurements": _certainty(chances.get(label)),
        }  # fmt: skip
        uids = read.seg.SOPClassUID, read.seg.SOPInstanceUID
        if isinstance(read.image, Volume):
            segment = sr.ReferencedSegment(*uids, number, source_series=sr.SourceSeriesForSegmentation(heads[0].SeriesInstanceUID))
            yield sr.VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=segment, **about)
        else:
            source = sr.SourceImageForSegmentation(heads[0].SOPClassUID, heads[0].SOPInstanceUID)
            yield sr.PlanarROIMeasurementsAndQualitativeEvaluations(referenced_segment=sr.ReferencedSegmentationFrame(*uids, frame, number, source), **about)


def _findings(read: Read, heads: list[Any], drawn_by: Any) -> Iterator[Any]:
    """A group for each finding that was looked for."""
    import highdicom
    from highdicom import sr
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    for finding in read.report.looked_for:
        concept, side = coded(finding.label)
        measured = [
            sr.Measurement(getattr(codes.SCT, NAMES[m.name]) if m.name in NAMES else own(m.name), float(m.value), Code(m.unit, "UCUM", m.unit))
            for m in finding.measurements if math.isfinite(m.value)
        ]  # fmt: skip
        yield sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(highdicom.UID(), f"{read.image.id} {finding.label}"), finding_type=concept, algorithm_id=drawn_by,
            finding_sites=[sr.FindingSite(concept, laterality=side)] if side is not None else None,
            qualitative_evaluations=[sr.QualitativeEvaluation(codes.DCM.PresenceOfProperty, codes.SCT.Present if finding.present else codes.SCT.Absent)],
            measurements=_certainty(finding.probability) + measured,
            source_images=_sources(read.image, heads),
        )  # fmt: skip


def _sources(image: Image | Volume, heads: list[Any]) -> list[Any]:
    from highdicom import sr

    frames = [f for f in image.info["frames"] if f] if int(heads[0].get("NumberOfFrames") or 1) > 1 else None
    return [sr.SourceImageForMeasurementGroup(h.SOPClassUID, h.SOPInstanceUID, frames) for h in heads]


def _certainty(chance: float | None) -> list[Any]:
    """The chance that something is there, in percent; [] where it is unknown."""
    from highdicom import sr
    from pydicom.sr.codedict import codes

    known = chance is not None and math.isfinite(chance)
    return [sr.Measurement(codes.DCM.CertaintyOfFinding, round(100 * float(chance), 2), codes.UCUM.Percent)] if known else []
