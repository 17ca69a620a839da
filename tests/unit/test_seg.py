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
from medvlm.imaging.seg import coded, read_seg, save_seg
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
    assert highdicom.seg.segread(tmp_path / "out.seg").number_of_segments == 3


def test_names_in_any_script_are_kept_and_told_to_nobody(tmp_path, capfd):
    name = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    slices = corpus.series(SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientSex="N/A", StudyTime="11:20:00", StudyDate="/0")
    for d in slices:
        d.PatientName = name
    slices[0].add_new(0x00184000, "LT", "a comment")
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
    (tmp_path / "c").mkdir()
    twice = corpus.series(series="c")
    twice[3].SOPInstanceUID = twice[2].SOPInstanceUID
    twice = read(corpus.write(tmp_path / "c", twice))
    (tmp_path / "a").mkdir()
    gone = read(corpus.write(tmp_path / "a", corpus.series()))
    drawn = masks(gone)
    with pytest.raises(MedVLMError) as e:
        save_seg(gone, {"liver": drawn["liver"][1:]}, tmp_path / "out.seg")
    assert e.value.code == "GRID_MISMATCH" and "(7, 6, 5)" in e.value.message and "(8, 6, 5)" in e.value.message
    for file in gone.info["files"]:
        (tmp_path / "a" / file).unlink()
    for image, code in ((plain, "NOT_DICOM"), (anonymous, "UNSUPPORTED"), (twice, "UNSUPPORTED"), (gone, "NOT_FOUND")):
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


def test_a_name_where_a_number_should_be_is_in_no_text(tmp_path, caplog):
    files = corpus.write(tmp_path, corpus.series(PatientBirthDate="19701332"))
    corpus.patch(files, b"PN\x08\x00Doe^Jane", b"DS\x08\x00Doe^Jane")
    image = read(files)
    caplog.clear()  # of what writing them said
    with warnings.catch_warnings(record=True) as said, caplog.at_level("DEBUG"):
        warnings.simplefilter("always")
        save_seg(image, masks(image), tmp_path / "out.seg")
    assert not any("Doe" in str(w.message) for w in said) and "Doe" not in caplog.text and "19701332" not in caplog.text
    stored = pydicom.dcmread(tmp_path / "out.seg")
    assert (str(stored.PatientName), stored["PatientName"].VR, stored.PatientBirthDate) == ("Doe^Jane", "PN", "")


@pytest.mark.parametrize("wrong", [{"SpacingBetweenSlices": 1.25}, {"SliceThickness": None}, {"SliceThickness": ""}, {"SpacingBetweenSlices": 0}])
def test_the_distance_of_slices_is_measured(wrong, tmp_path):
    image = read(corpus.write(tmp_path, corpus.series(**wrong)))
    sparse = np.zeros(image.shape[1:], bool)
    sparse[2:6:2] = True
    save_seg(image, {"liver": sparse}, tmp_path / "out.seg")
    whole = highdicom.seg.segread(tmp_path / "out.seg").get_volume(allow_missing_positions=True, combine_segments=False)
    assert whole.spacing[0] == pytest.approx(corpus.STEP) and np.array_equal(read_seg(tmp_path / "out.seg", image)[0][1], sparse)


def test_rows_that_are_not_at_right_angles_to_columns_are_refused(tmp_path):
    tilted = read(corpus.write(tmp_path, corpus.series(lean=corpus.LEAN)))
    cut = tilted.reorient("LSP")
    with pytest.raises(MedVLMError) as e:
        save_seg(cut, masks(cut), tmp_path / "out.seg")
    assert e.value.code == "UNSUPPORTED" and "right angles" in e.value.message


def test_nothing_outlined_is_one_frame_and_not_all(tmp_path):
    image = read(corpus.write(tmp_path, corpus.series()))
    save_seg(image, {"liver": np.zeros(image.shape[1:], bool), "spleen": np.zeros(image.shape[1:], bool)}, tmp_path / "out.seg")
    assert pydicom.dcmread(tmp_path / "out.seg").NumberOfFrames <= 2 and not any(m.any() for _, m in read_seg(tmp_path / "out.seg", image))


def test_each_phase_of_a_file_refers_to_its_own_frames(tmp_path):
    file = corpus.enhanced([0.0, 2.5, 5.0, 0.0, 2.5, 5.0], extra=lambda i: {"TemporalPositionIndex": 1 + i // 3})
    (study,) = read_dicom(corpus.write(tmp_path, [file]), "strict")
    assert len(study.images) == 2
    for image in study.images:
        drawn = masks(image)
        seg = save_seg(image, drawn, tmp_path / "out.seg")
        named = {s.ReferencedFrameNumber for f in seg.PerFrameFunctionalGroupsSequence for d in f.DerivationImageSequence for s in d.SourceImageSequence}
        assert named == set(image.info["frames"]) and len(named) == 3
        sr.save_sr([sr.Read(image, report(image, drawn), drawn, seg)], tmp_path / "out.sr", ("known", "7"))
        finding = highdicom.sr.srread(tmp_path / "out.sr").content.get_image_measurement_groups()[0]
        assert set(finding.source_images[0].referenced_frame_numbers) == named


def test_frames_that_each_say_how_they_lie(tmp_path):
    file = corpus.enhanced(corpus.even(), cosines=corpus.OBLIQUE)
    shared = file.SharedFunctionalGroupsSequence[0]
    for frame in file.PerFrameFunctionalGroupsSequence:
        frame.PixelMeasuresSequence, frame.PlaneOrientationSequence = shared.PixelMeasuresSequence, shared.PlaneOrientationSequence
    del shared.PixelMeasuresSequence, shared.PlaneOrientationSequence
    image = read(corpus.write(tmp_path, [file]))
    drawn = masks(image)
    save_seg(image, drawn, tmp_path / "out.seg")
    assert all(np.array_equal(mask, drawn[label]) for label, mask in read_seg(tmp_path / "out.seg", image))


def test_words_of_our_own_stay_apart_and_sides_are_kept(tmp_path):
    image = read(corpus.write(tmp_path, corpus.series()))
    assert coded("pulmonary edema (cardiogenic)") != coded("pulmonary edema (other)")
    found = (Finding("left kidney", False, np.float32(0.02)), Finding("right kidney", True, 0.98, (), (Measurement("volume", np.float32(150), "mL"),)))
    document = highdicom.sr.srread(sr.save_sr([sr.Read(image, Report((), found), {})], tmp_path / "out.sr", ("known", "")))
    groups = document.content.get_image_measurement_groups()
    assert [(g.finding_type, g.finding_sites[0].laterality, g.get_qualitative_evaluations()[0].value) for g in groups] == [
        (codes.SCT.Kidney, codes.SCT.Left, codes.SCT.Absent), (codes.SCT.Kidney, codes.SCT.Right, codes.SCT.Present)]  # fmt: skip
    assert {m.name.meaning: m.value for m in groups[1].get_measurements()} == {"Certainty of Finding": 98.0, "Volume": 150.0}


def test_a_report_is_about_one_study(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, other = read(corpus.write(tmp_path / "a", corpus.series())), read(corpus.write(tmp_path / "b", corpus.series(study="other")))
    with pytest.raises(MedVLMError) as e:
        sr.save_sr([sr.Read(i, report(i, masks(i)), {}) for i in (one, other)], tmp_path / "out.sr", ("known", ""))
    assert e.value.code == "UNSUPPORTED" and "several studies" in e.value.message
    corpus.write(tmp_path / "a", corpus.series(study="other"))
    with pytest.raises(MedVLMError) as e:
        save_seg(one, masks(one), tmp_path / "out.seg")
    assert e.value.code == "NOT_FOUND" and "others than" in e.value.message
