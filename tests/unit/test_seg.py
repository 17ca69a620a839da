"""DICOM segmentation objects and structured reports as they are written: every voxel where it was drawn, every word as it was said."""

import warnings

import dicom_corpus as corpus
import highdicom
import numpy as np
import pydicom
import pytest
from highdicom.sr.utils import find_content_items
from pydicom.sr.codedict import codes
from pydicom.uid import ComputedRadiographyImageStorage

from medvlm import sr
from medvlm.errors import MedVLMError
from medvlm.imaging.dicom import read_dicom
from medvlm.imaging.scan import Image, Volume
from medvlm.imaging.seg import read_seg, save_seg
from medvlm.sample import Finding, Measurement, Region, Report, Segmentation, Sentence, box_of


def read(files, policy="strict"):
    (study,) = read_dicom(files, policy)
    (image,) = study.images
    return image


def masks(image, seed=0):
    """Two masks that overlap and one that is empty."""
    lot = np.random.default_rng(seed)
    a, b = lot.random(image.shape[1:]) < 0.3, lot.random(image.shape[1:]) < 0.3
    return {"right lung": a, "tumour (mine)": b, "liver": np.zeros_like(a)}


def by_header(path, image, segment):
    """A segment on the grid of its image, each pixel placed by the definition of its frame's position (PS3.3 C.7.6.2.1.1)."""
    stored = pydicom.dcmread(path)
    shared = stored.SharedFunctionalGroupsSequence[0]
    down, across = shared.PixelMeasuresSequence[0].PixelSpacing
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    found = np.zeros(image.shape[1:], bool)
    for frame, pixels in zip(stored.PerFrameFunctionalGroupsSequence, stored.pixel_array):
        if frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber == segment:
            h, w = np.nonzero(pixels)
            place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float) + np.outer(w * across, cosines[:3]) + np.outer(h * down, cosines[3:])
            index = image.index(place)
            assert np.abs(index - index.round()).max() < 1e-4
            found[tuple(index.round().astype(int).T)] = True
    return found


SERIES = {
    "axial": lambda: corpus.series(),
    "oblique": lambda: corpus.series(cosines=corpus.OBLIQUE),
    "sagittal": lambda: corpus.series(cosines=corpus.SAGITTAL),
    "tilted gantry": lambda: corpus.series(lean=corpus.LEAN),
    "no frame of reference": lambda: corpus.series(FrameOfReferenceUID=None),
    "enhanced": lambda: [corpus.enhanced(corpus.even(), [3, 0, 7, 1, 2, 6, 5, 4])],
}


@pytest.mark.parametrize("kind", SERIES)
def test_masks_come_back_where_they_were_drawn(kind, tmp_path):
    image = read(corpus.write(tmp_path, SERIES[kind]()))
    drawn = masks(image)
    save_seg(image, drawn, tmp_path / "out.seg", ("known", "7"))
    if kind != "tilted gantry":  # which is no regular grid to highdicom's reader
        found = read_seg(tmp_path / "out.seg", image)
        assert [label for label, _ in found] == list(drawn) and all(np.array_equal(mask, drawn[label]) for label, mask in found)
    for number, (label, mask) in enumerate(drawn.items(), start=1):
        assert np.array_equal(by_header(tmp_path / "out.seg", image, number), mask), label
    stored = pydicom.dcmread(tmp_path / "out.seg")
    source = pydicom.dcmread(image.info["files"][0])
    assert stored.Modality == "SEG" and stored.SegmentationType == "BINARY" and stored.SegmentsOverlap == "YES"
    assert (stored.PatientID, stored.PatientName, stored.StudyInstanceUID) == (source.PatientID, source.PatientName, source.StudyInstanceUID)
    assert stored.SeriesInstanceUID != source.SeriesInstanceUID and "not for diagnosis" in stored.SeriesDescription
    lung, other, _ = stored.SegmentSequence
    assert lung.SegmentedPropertyTypeCodeSequence[0].CodeValue == codes.SCT.Lung.value == "39607008"
    assert lung.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == codes.SCT.Right.value == "24028007"
    assert other.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99MEDVLM"
    assert lung.SegmentAlgorithmType == "AUTOMATIC" and lung.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "known"


def test_a_volume_that_was_turned_or_filled_is_written_where_it_lies(tmp_path):
    image = read(corpus.write(tmp_path, corpus.series(corpus.GAPPED)), "fill")
    turned = image.reorient("RAI")
    drawn = masks(turned)
    save_seg(turned, drawn, tmp_path / "out.seg")
    for label, mask in read_seg(tmp_path / "out.seg", turned):
        assert np.array_equal(mask, drawn[label])
    straight = {k: v.voxels[0] > 0 for k, v in ((k, turned.with_voxels(m[None].astype(np.uint8)).reorient(image.orientation)) for k, m in drawn.items())}
    for label, mask in read_seg(tmp_path / "out.seg", image):
        assert np.array_equal(mask, straight[label])


def radiograph(**more):
    return corpus.ds(pixels=corpus.stored(0.0).astype(np.int16), Modality="CR", SOPClassUID=ComputedRadiographyImageStorage, ImagePositionPatient=None,
                     ImageOrientationPatient=None, RescaleType=None, **more)  # fmt: skip


def test_a_picture_has_a_frame_for_each_outline(tmp_path):
    image = read(corpus.write(tmp_path, [radiograph()]))
    drawn = masks(image)
    stored = Segmentation(image, "right lung", drawn["right lung"], 0.9).save(tmp_path / "one.dcm")
    assert np.array_equal(pydicom.dcmread(stored).pixel_array.squeeze(), drawn["right lung"])
    save_seg(image, drawn, tmp_path / "out.seg")
    stored = pydicom.dcmread(tmp_path / "out.seg")
    assert np.array_equal(stored.pixel_array, np.stack([drawn["right lung"], drawn["tumour (mine)"]]))
    numbers = [f.SegmentIdentificationSequence[0].ReferencedSegmentNumber for f in stored.PerFrameFunctionalGroupsSequence]
    sources = {s.ReferencedSOPInstanceUID for f in stored.PerFrameFunctionalGroupsSequence for s in f.DerivationImageSequence[0].SourceImageSequence}
    assert numbers == [1, 2] and sources == {image.info["sop"][0]} and len(stored.SegmentSequence) == 3
    assert stored.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == list(image.spacing)


def test_names_in_any_script_are_kept_and_told_to_nobody(tmp_path, capfd):
    name = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    slices = corpus.series(SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientSex="N/A", StudyTime="11:20:00", StudyDate="/0")
    for d in slices:
        d.PatientName = name
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        image = read(corpus.write(tmp_path, slices))
        save_seg(image, masks(image), tmp_path / "out.seg")
    stored = pydicom.dcmread(tmp_path / "out.seg")
    assert str(stored.PatientName) == name and stored.SpecificCharacterSet == "ISO_IR 192"
    assert (stored.PatientSex, stored.StudyTime, stored.StudyDate) == ("", "112000", "")
    assert not any("Yamada" in str(w.message) for w in said) and "Yamada" not in "".join(capfd.readouterr())


def test_what_cannot_be_referred_to_is_refused(tmp_path):
    plain = Volume("ct-1", np.zeros((1, 2, 3, 4)), np.eye(4), "ct", "HU")
    blank = corpus.series(series="b")
    for d in blank:
        d.StudyInstanceUID = ""
    (tmp_path / "b").mkdir()
    anonymous = read(corpus.write(tmp_path / "b", blank))
    (tmp_path / "a").mkdir()
    gone = read(corpus.write(tmp_path / "a", corpus.series()))
    drawn = masks(gone)
    with pytest.raises(MedVLMError) as e:
        save_seg(gone, {"liver": drawn["liver"][1:]}, tmp_path / "out.seg")
    assert e.value.code == "GRID_MISMATCH" and "(7, 6, 5)" in e.value.message and "(8, 6, 5)" in e.value.message
    for file in gone.info["files"]:
        (tmp_path / "a" / file).unlink()
    for image, code in ((plain, "NOT_DICOM"), (anonymous, "UNSUPPORTED"), (gone, "NOT_FOUND")):
        with pytest.raises(MedVLMError) as e:
            save_seg(image, masks(image), tmp_path / "out.seg")
        assert e.value.code == code
    assert not (tmp_path / "out.seg").exists()


def report(image, drawn):
    regions = {label: Region(image.id, label, box_of(mask), mask, 0.87654) for label, mask in drawn.items()}
    found = (
        Finding("pleural effusion", True, 0.912, (regions["right lung"],), (Measurement("area", 12.5, "mm2"), Measurement("cardiothoracic ratio", 0.5, "1"))),
        Finding("tumour (mine)", False, float("nan"), (regions["tumour (mine)"], regions["liver"])),
    )
    return Report((Sentence("There is a pleural effusion.", (), "findings", (0,)), Sentence("No tumour.", (), "impression", (1,))), found)


@pytest.mark.parametrize("flat", [False, True])
def test_a_report_says_what_was_found_and_where_it_is_outlined(flat, tmp_path):
    image = read(corpus.write(tmp_path, [radiograph()] if flat else corpus.series()))
    drawn = masks(image)
    seg = save_seg(image, drawn, tmp_path / "out.seg", ("known", "7"))
    sr.save_sr([sr.Read(image, report(image, drawn), drawn, seg)], tmp_path / "out.sr", ("known", "7"))
    document = highdicom.sr.srread(tmp_path / "out.sr")
    assert (document.Modality, document.CompletionFlag, document.VerificationFlag) == ("SR", "PARTIAL", "UNVERIFIED")
    assert document.PatientID == "4711" and document.StudyInstanceUID == pydicom.dcmread(image.info["files"][0]).StudyInstanceUID
    content = document.content
    outlined = content.get_planar_roi_measurement_groups() if flat else content.get_volumetric_roi_measurement_groups()
    assert len(outlined) == 2  # the empty one is not
    for number, group in enumerate(outlined, start=1):
        segment = group.referenced_segmentation_frame if flat else group.referenced_segment
        item = segment[0].ReferencedSOPSequence[0]
        assert item.ReferencedSOPInstanceUID == seg.SOPInstanceUID and item.ReferencedSegmentNumber == number
        assert not flat or item.ReferencedFrameNumber == number
        (certainty,) = group.get_measurements(codes.DCM.CertaintyOfFinding)
        assert certainty.value == 87.65 and certainty.unit == codes.UCUM.Percent
    assert outlined[0].finding_type == codes.SCT.Lung and outlined[0].finding_sites[0].laterality == codes.SCT.Right
    effusion, tumour = content.get_image_measurement_groups()
    assert effusion.finding_type == codes.SCT.PleuralEffusion and effusion.get_qualitative_evaluations()[0].value == codes.SCT.Present
    assert tumour.finding_type.scheme_designator == "99MEDVLM" and tumour.get_qualitative_evaluations()[0].value == codes.SCT.Absent
    measured = {m.name.meaning: (m.value, m.unit.value) for m in effusion.get_measurements()}
    assert measured == {"Certainty of Finding": (91.2, "%"), "Area": (12.5, "mm2"), "cardiothoracic ratio": (0.5, "1")}
    assert tumour.get_measurements() == []  # a chance that is not known is not said
    assert {s.referenced_sop_instance_uid for s in effusion.source_images} == {u for u in image.info["sop"]}
    texts = {(t.name.meaning, t.value) for t in find_content_items(document, value_type="TEXT", relationship_type="CONTAINS", recursive=False)}
    assert {("Finding", "There is a pleural effusion."), ("Impression", "No tumour.")} <= texts and any("esearch" in said for _, said in texts)


def test_a_report_without_outlines(tmp_path):
    image = read(corpus.write(tmp_path, [radiograph()]))
    none = Report((Sentence("Nothing was looked for.", (), "findings", ()),), ())
    document = highdicom.sr.srread(sr.save_sr([sr.Read(image, none, {})], tmp_path / "out.sr", ("known", "")))
    (group,) = document.content.get_image_measurement_groups()
    assert group.finding_type is None and group.get_measurements() == [] and group.source_images[0].referenced_sop_instance_uid == image.info["sop"][0]
    with pytest.raises(MedVLMError) as e:
        sr.save_sr([sr.Read(Image("x", np.zeros((1, 4, 4), np.uint8)), none, {})], tmp_path / "other.sr", ("known", ""))
    assert e.value.code == "NOT_DICOM"
