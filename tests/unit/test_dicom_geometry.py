"""DICOM: every voxel of every odd series lies where its header says, or the series is refused by code."""

import dicom_corpus as corpus
import numpy as np
import pydicom
import pytest
from dicom_corpus import codes, one, refusal

from medvlm.errors import MedVLMError
from medvlm.imaging.dicom import read_dicom
from medvlm.imaging.scan import Image

CASES = corpus.cases()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the writer and of pydicom, which the tests call themselves


@pytest.mark.parametrize("policy", ["strict", "fill", "resample"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_voxel_is_at_its_place_or_the_series_is_refused(case, policy, tmp_path):
    want, truths = case.expected(policy)
    got, warned = corpus.of_medvlm(case.make(tmp_path), policy, truths)
    assert got == want
    assert set(case.warns) <= set(warned) or got != "right" or policy != "strict"
    if got == "right" and case.strict != "right":
        assert case.strict in warned, "a mended series must say what was wrong"


def test_the_corpus_would_notice_a_wrong_reader(tmp_path):
    truth = corpus.grid(corpus.even())
    (image,) = read_dicom(corpus.write(tmp_path, corpus.series()))[0].images
    assert corpus.agrees(image.affine, image.voxels, truth)
    assert not corpus.agrees(image.affine, image.voxels[:, ::-1], truth)
    moved = image.affine.copy()
    moved[2, 3] += 0.002
    assert not corpus.agrees(moved, image.voxels, truth)
    assert not corpus.agrees(image.affine, np.concatenate([image.voxels, image.voxels[:, :1]], axis=1), truth)


def test_axial_head_first_reads_spl_and_the_affine_is_the_headers(tmp_path):
    (image,) = read_dicom(corpus.write(tmp_path, corpus.series()))[0].images
    assert image.orientation == "SPL" and image.unit == "HU" and image.voxels.dtype == np.float32
    # columns: 2.5 mm up along the stack, 0.75 mm back a row, 0.5 mm left a column
    assert np.allclose(image.affine, [[0, 0, 0.5, -12], [0, 0.75, 0, 20], [2.5, 0, 0, -30], [0, 0, 0, 1]])
    assert image.voxels[0, 0, 0, 0] == -1000 and image.voxels[0, 1, 0, 0] == -970 and image.voxels[0, 0, 1, 2] == -993


def test_the_order_of_the_files_changes_nothing(tmp_path):
    files = corpus.write(tmp_path, corpus.series() + corpus.series(series="b", SeriesNumber=2, origin=corpus.ORIGIN + 5))
    first, second = read_dicom(files)[0], read_dicom(files[::-1])[0]
    assert first.id == second.id and [i.id for i in first.images] == ["ct-1", "ct-2"]
    for a, b in zip(first.images, second.images):
        assert a.info["sop"] == b.info["sop"] and a.same_grid(b) and np.array_equal(a.voxels, b.voxels)


def test_each_slice_names_its_source(tmp_path):
    (image,) = read_dicom(corpus.write(tmp_path, corpus.series()))[0].images
    for d, (uid, file, frame) in enumerate(zip(image.info["sop"], image.info["files"], image.info["frames"], strict=True)):
        source = pydicom.dcmread(file)
        assert source.SOPInstanceUID == uid and frame == 1
        assert np.array_equal(source.pixel_array - 1000.0, image.voxels[0, d])


def test_a_filled_slice_has_no_source_and_is_listed(tmp_path):
    (image,) = read_dicom(corpus.write(tmp_path, corpus.series(corpus.GAPPED)), "fill")[0].images
    assert image.info["filled"] == [3] and image.info["sop"][3] is None and None not in image.info["sop"][:3]
    assert (image.voxels[0, 3] == -1024).all()


def test_a_tilted_stack_keeps_its_shear(tmp_path):
    (image,) = read_dicom(corpus.write(tmp_path, corpus.series(lean=corpus.LEAN)))[0].images
    assert np.allclose(image.affine[:3, 0], [0, 2.5 * np.tan(np.radians(15)), 2.5]) and abs(image.info["tilt"] - 15) < 1e-6


def test_a_refusal_lists_slices_by_ordinal_and_place(tmp_path):
    error = refusal(corpus.write(tmp_path, corpus.series(corpus.GAPPED)))
    assert error.code == "GAP"
    assert "between slice 3 (-25.00 mm) and slice 4 (-20.00 mm)" in error.message


def test_one_refused_series_does_not_lose_the_others(tmp_path):
    files = corpus.write(tmp_path, corpus.series() + corpus.series(corpus.GAPPED, series="b", SeriesNumber=7))
    (study,) = read_dicom(files)
    assert [i.id for i in study.images] == ["ct-1"]
    assert [w.split(":")[0] for w in study.warnings] == ["GAP"] and "ct series 7" in study.warnings[0]


def test_a_single_slice_is_an_image_with_its_place(tmp_path):
    image = one(tmp_path, s=5.0)
    assert isinstance(image, Image) and image.spacing == (0.75, 0.5)
    assert np.allclose(image.info["affine"], [[0, 0, 0.5, -12], [0, 0.75, 0, 20], [5, 0, 0, -25], [0, 0, 0, 1]])
    assert image.pixels.shape == (1, 6, 5) and image.pixels[0, 1, 2] == 5 * 12 + 7 - 1000


def test_a_single_slice_without_position_says_so(tmp_path):
    image = one(tmp_path, ImagePositionPatient=None)
    assert "affine" not in image.info and codes(image) == {"GEOMETRY_UNKNOWN"}


def test_a_radiograph_needs_no_place(tmp_path):
    image = one(tmp_path, Modality="CR", cosines=(0, 0, 0, 0, 0, 0))
    assert codes(image) == {"GEOMETRY_UNKNOWN"} and "affine" not in image.info and image.pixels[0, 0, 1] == -999
    assert refusal(corpus.write(tmp_path, [corpus.ds(cosines=(0, 0, 0, 0, 0, 0))])).code == "BAD_ORIENTATION"


def test_unknown_spacing_is_none(tmp_path):
    assert one(tmp_path, Modality="CR", PixelSpacing=None).spacing is None


def test_frames_without_geometry_are_images(tmp_path):
    frames = np.arange(3 * 30, dtype=np.uint8).reshape(3, 6, 5)
    d = corpus.ds(pixels=frames, NumberOfFrames=3, Modality="US", SOPClassUID="1.2.840.10008.5.1.4.1.1.3.1", ImagePositionPatient=None, ImageOrientationPatient=None, RescaleSlope=None, RescaleIntercept=None)  # fmt: skip
    (study,) = read_dicom(corpus.write(tmp_path, [d]))
    assert [i.id for i in study.images] == ["ultrasound-1", "ultrasound-2", "ultrasound-3"]
    for n, image in enumerate(study.images):
        assert np.array_equal(image.pixels[0], frames[n]) and image.info["frames"] == [n + 1]


def test_an_unknown_policy_is_refused():
    with pytest.raises(MedVLMError, match="BAD_ARGUMENT"):
        read_dicom([], "guess")
