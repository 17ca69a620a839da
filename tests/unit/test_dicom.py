"""DICOM reading: geometry and values against known truths, refusals by code, nothing leaked, nothing taken on trust."""

import json
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from hashlib import blake2b
from pathlib import Path

import dicom_corpus as corpus
import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
)

from medvlm.errors import HINTS, MedVLMError
from medvlm.imaging import dicom_fast, dicom_header
from medvlm.imaging.dicom import is_dicom, read_dicom
from medvlm.imaging.dicom_info import MODALITIES
from medvlm.imaging.scan import Image, Volume

CASES = corpus.cases()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the writer and of pydicom, which the tests call themselves


def one(folder: Path, policy="strict", syntax=ExplicitVRLittleEndian, **more):
    """The only image of a study of one file."""
    (image,) = read_dicom(corpus.write(folder, [corpus.ds(**more)], syntax), policy)[0].images
    return image


def codes(image) -> set[str]:
    return {w.split(":")[0] for w in image.info["warnings"]}


def refusal(files, policy="strict", decode=True) -> MedVLMError:
    with pytest.raises(MedVLMError) as caught:
        for study in read_dicom(files, policy):
            for image in study.images:
                _ = decode and (image.voxels if isinstance(image, Volume) else image.pixels)
    return caught.value


def alter(file: Path, old: bytes, new: bytes) -> Path:
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))
    return file


# ---- geometry


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


# ---- values


def test_pixels_are_read_when_first_used(tmp_path):
    files = corpus.write(tmp_path, corpus.series())
    (image,) = read_dicom(files)[0].images
    assert image.shape == (1, 8, 6, 5) and image.dtype == np.float32
    files[0].unlink()
    with pytest.raises(MedVLMError, match="UNREADABLE"):
        _ = image.voxels


def test_a_file_that_shrank_since_is_truncated(tmp_path):
    files = corpus.write(tmp_path, corpus.series())
    (image,) = read_dicom(files)[0].images
    files[0].write_bytes(files[0].read_bytes()[:-8])
    with pytest.raises(MedVLMError, match="TRUNCATED"):
        _ = image.voxels


@pytest.mark.parametrize(
    ("kind", "slope", "intercept", "dtype"),
    [
        (np.uint8, 1, 0, np.uint8),
        (np.int16, 1, 0, np.int16),
        (np.uint8, 2, -10, np.int16),
        (np.uint16, 1, -1024, np.int32),
        (np.uint16, 3, 0, np.int32),
        (np.int16, 0.5, 0, np.float32),
        (np.uint16, 9.570207, -19595, np.float32),
    ],
)
def test_values_keep_the_smallest_exact_type(kind, slope, intercept, dtype, tmp_path):
    pixels = (np.arange(30) * 8).reshape(6, 5).astype(kind)
    image = one(tmp_path, Modality="MR", pixels=pixels, RescaleSlope=slope, RescaleIntercept=intercept)
    assert image.dtype == dtype and image.pixels.dtype == dtype and image.unit == "raw"
    assert np.allclose(image.pixels[0], pixels * float(slope) + intercept, rtol=1e-6)


def test_a_modality_table_maps_stored_values(tmp_path):
    table = corpus.item(LUTDescriptor=[4, 10, 16], LUTData=[100, 300, 500, 65535], ModalityLUTType="US")
    pixels = np.full((6, 5), 11, np.uint8)
    pixels[0] = [0, 10, 12, 13, 200]  # below the first entry, ..., beyond the last
    d = corpus.ds(pixels=pixels, Modality="CR", RescaleSlope=None, RescaleIntercept=None, ModalityLUTSequence=[table])
    d.ModalityLUTSequence[0]["LUTData"].VR = "US"
    for e in ("LUTDescriptor",):
        d.ModalityLUTSequence[0][e].VR = "US"
    (image,) = read_dicom(corpus.write(tmp_path, [d]))[0].images
    assert image.pixels.dtype == np.uint16 and image.pixels[0, 0].tolist() == [100, 100, 500, 65535, 65535]
    assert (image.pixels[0, 1:] == 300).all()


def test_windows_are_carried_and_not_applied(tmp_path):
    image = one(tmp_path, WindowCenter=[40, -600, 7], WindowWidth=[400, 1500, -1], WindowCenterWidthExplanation=["SOFT", "LUNG", "NONE"], VOILUTFunction="SIGMOID")
    assert image.info["voi_function"] == "SIGMOID"
    assert image.info["windows"] == [(40, 400, "SOFT"), (-600, 1500, "LUNG")] and "BAD_WINDOW" in codes(image)
    assert image.pixels[0, 0, 1] == -999


def test_a_voi_table_is_carried_and_not_applied(tmp_path):
    table = corpus.item(LUTDescriptor=[2, 0, 8], LUTData=[0, 255], LUTExplanation="NORMAL")
    d = corpus.ds(VOILUTSequence=[table])
    for e in ("LUTDescriptor", "LUTData"):
        d.VOILUTSequence[0][e].VR = "US"
    (image,) = read_dicom(corpus.write(tmp_path, [d]))[0].images
    (found,) = image.info["voi_lut"]
    assert (found["first"], found["bits"], found["values"].tolist()) == (0, 8, [0, 255]) and image.pixels[0, 0, 1] == -999


def test_monochrome1_is_marked_and_kept_as_stored(tmp_path):
    pixels = np.arange(30, dtype=np.uint16).reshape(6, 5)
    image = one(tmp_path, Modality="CR", PhotometricInterpretation="MONOCHROME1", pixels=pixels, RescaleIntercept=0, RescaleType=None)
    assert image.info["inverted"] is True and np.array_equal(image.pixels[0], pixels)
    (tmp_path / "ct").mkdir()
    ct = one(tmp_path / "ct", PhotometricInterpretation="MONOCHROME1")
    assert ct.info["inverted"] is True and ct.pixels[0, 0, 1] == -999


def test_padding_is_carried_in_the_unit_of_the_values(tmp_path):
    assert one(tmp_path, PixelPaddingValue=-2000).info["padding"] == (-3000, -3000)
    (tmp_path / "range").mkdir()
    assert one(tmp_path / "range", PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1900).info["padding"] == (-3000, -2900)


def test_planar_colour_and_palette_become_rgb(tmp_path):
    rgb = np.arange(3 * 30, dtype=np.uint8).reshape(3, 6, 5)
    plain = {"Modality": "OT", "SOPClassUID": SecondaryCaptureImageStorage, "RescaleSlope": None, "RescaleIntercept": None}
    d = corpus.ds(pixels=np.moveaxis(rgb, 0, -1).copy(), SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB", **plain)
    d.Rows, d.Columns = 6, 5
    d.PixelData = rgb.tobytes()
    d.PlanarConfiguration = 1
    (image,) = read_dicom(corpus.write(tmp_path, [d]))[0].images
    assert image.unit == "uint8" and np.array_equal(image.pixels, rgb)

    (tmp_path / "palette").mkdir()
    index = (np.arange(30) % 3).astype(np.uint8).reshape(6, 5)
    d = corpus.ds(pixels=index, PhotometricInterpretation="PALETTE COLOR", **plain)
    for n, colour in enumerate(("Red", "Green", "Blue")):
        d.add_new({"Red": 0x00281101, "Green": 0x00281102, "Blue": 0x00281103}[colour], "US", [4, 0, 8])
        d.add_new({"Red": 0x00281201, "Green": 0x00281202, "Blue": 0x00281203}[colour], "OW", bytes([10 * n, 20 + n, 30 + n, 0]))
    (image,) = read_dicom(corpus.write(tmp_path / "palette", [d]))[0].images
    assert image.unit == "uint8" and image.pixels[:, 0, :3].tolist() == [[0, 20, 30], [10, 21, 31], [20, 22, 32]]


def test_what_the_header_says_is_carried(tmp_path):
    image = one(tmp_path, Modality="DX", ImageLaterality="L", ViewPosition="PA", BodyPartExamined="CHEST", BurnedInAnnotation="YES", LossyImageCompression="01",
                SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1", PixelSpacing=None, ImagerPixelSpacing=[0.2, 0.1], ImagePositionPatient=None, RescaleType="US")  # fmt: skip
    info = image.info
    assert (image.modality, info["laterality"], info["view"], info["body_part"], info["burned_in"], info["lossy"]) == ("xray", "L", "PA", "CHEST", True, True)
    assert image.spacing == (0.2, 0.1) and codes(image) == {"BURNED_IN", "LOSSY", "DETECTOR_PLANE"}
    assert one(tmp_path / "..", Modality="DX", BurnedInAnnotation="NO").info["burned_in"] is False


def test_ultrasound_spacing_only_with_one_region(tmp_path):
    def regions(count):
        d = corpus.ds(Modality="US", SOPClassUID=UltrasoundImageStorage, PixelSpacing=None, ImagePositionPatient=None, RescaleSlope=None, RescaleIntercept=None)
        region = dict(PhysicalUnitsXDirection=3, PhysicalUnitsYDirection=3, PhysicalDeltaX=0.02, PhysicalDeltaY=-0.03)
        d.SequenceOfUltrasoundRegions = [corpus.item(**region) for _ in range(count)]
        folder = tmp_path / str(count)
        folder.mkdir()
        return read_dicom(corpus.write(folder, [d]))[0].images[0]

    assert np.allclose(regions(1).spacing, (0.3, 0.2))  # centimetres a pixel to millimetres, rows first
    assert regions(2).spacing is None and "REGIONS" in codes(regions(3))


def test_doubtful_values_are_said(tmp_path):
    assert codes(one_read(tmp_path / "a", pixels=np.full((6, 5), 7, np.int16))) == {"EMPTY_IMAGE"}
    assert codes(one_read(tmp_path / "b", RescaleIntercept=0)) == {"NOT_HU"}
    assert codes(one_read(tmp_path / "c")) == set()


def one_read(folder, **more):
    folder.mkdir()
    image = one(folder, **more)
    _ = image.pixels
    return image


def test_identity_is_hashed(tmp_path):
    files = corpus.write(tmp_path, corpus.series())
    (study,) = read_dicom(files)
    uid = pydicom.dcmread(files[0]).StudyInstanceUID
    assert study.id == "study-" + blake2b(uid.encode(), digest_size=5).hexdigest()
    assert study.patient == "p-" + blake2b(b"4711", digest_size=5).hexdigest()
    (tmp_path / "none").mkdir()
    (nobody,) = read_dicom(corpus.write(tmp_path / "none", corpus.series(PatientID="")))
    assert nobody.patient is None


def test_modalities_are_in_the_vocabulary():
    words = "xray ct mr pet nm fundus pathology ultrasound endoscopy dermoscopy oct other unknown".split()
    assert set(MODALITIES.values()) <= set(words)
    assert [MODALITIES[c] for c in "CR DX MG CT MR PT NM OP SM US ES OPT".split()] == "xray xray xray ct mr pet nm fundus pathology ultrasound endoscopy oct".split()


# ---- refusals


@pytest.mark.parametrize(
    ("name", "more", "code"),
    [
        ("frames that are not there", {"NumberOfFrames": 2, "pixels": np.zeros((1, 6, 5), np.int16)}, "BAD_VALUE"),
        ("frames that are not counted", {"NumberOfFrames": 1, "pixels": np.zeros((3, 6, 5), np.int16)}, "BAD_VALUE"),
        ("no frames", {"NumberOfFrames": -1, "pixels": np.zeros((1, 6, 5), np.int16)}, "BAD_VALUE"),
        ("more bits stored than allocated", {"BitsStored": 17}, "BAD_VALUE"),
        ("two samples", {"SamplesPerPixel": 2}, "BAD_VALUE"),
        ("no rows", {"Rows": 0}, "BAD_VALUE"),
        ("slope of zero", {"RescaleSlope": 0}, "BAD_VALUE"),
        ("a segmentation", {"Modality": "SEG", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}, "NOT_AN_IMAGE"),
        ("a dose", {"Modality": "RTDOSE", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2"}, "NOT_AN_IMAGE"),
        ("a parametric map", {"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.30"}, "NOT_AN_IMAGE"),
        ("no bits", {"BitsAllocated": None}, "NOT_AN_IMAGE"),
        ("position of two numbers", {"ImagePositionPatient": [1, 2]}, "BAD_VALUE"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_broken_headers_have_a_code(name, more, code, tmp_path):
    assert refusal(corpus.write(tmp_path, [corpus.ds(**more)])).code == code


def test_letters_in_a_count_are_refused_and_not_repeated(tmp_path):
    (file,) = corpus.write(tmp_path, [corpus.ds(NumberOfFrames=1, pixels=np.zeros((1, 6, 5), np.int16))])
    alter(file, b"\x28\x00\x08\x00IS\x02\x001 ", b"\x28\x00\x08\x00IS\x02\x00QZ")
    error = refusal([file])
    assert error.code == "BAD_VALUE" and "QZ" not in str(error)


def test_files_without_pixels_and_cut_headers_are_told_apart(tmp_path):
    (file,) = corpus.write(tmp_path, [corpus.ds()])
    data = file.read_bytes()
    at = data.index(b"\xe0\x7f\x10\x00")
    file.write_bytes(data[:at])
    assert refusal([file]).code == "NOT_AN_IMAGE"
    file.write_bytes(data[: at - 3])
    assert refusal([file]).code == "TRUNCATED"


def j2k(folder: Path):
    d = corpus.ds(pixels=corpus.large(0.0))
    (file,) = corpus.write(folder, [d], JPEG2000Lossless)
    return file


def test_cut_compressed_pixels_are_refused(tmp_path):
    file = j2k(tmp_path)
    file.write_bytes(file.read_bytes()[:-40])
    assert refusal([file]).code == "TRUNCATED"


@pytest.mark.parametrize("policy", ["strict"])
def test_a_codestream_that_contradicts_its_header_is_refused_before_memory(policy, tmp_path):
    file = j2k(tmp_path)
    size = b"\xff\x4f\xff\x51"
    data = bytearray(file.read_bytes())
    at = data.index(size) + 8
    assert int.from_bytes(data[at : at + 4], "big") == 48
    data[at : at + 8] = (12000).to_bytes(4, "big") * 2
    file.write_bytes(bytes(data))
    assert limited(lambda: refusal([file])).code == "CORRUPT"


def limited(work, seconds=2.0, megabytes=150):
    tracemalloc.start()
    started = time.perf_counter()
    try:
        result = work()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes << 20 and time.perf_counter() - started < seconds
    return result


def test_run_length_bomb_is_refused_before_memory(tmp_path):
    (file,) = corpus.write(tmp_path, [corpus.ds()], RLELossless)
    data = file.read_bytes()
    for tag in (b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x11\x00US\x02\x00"):
        at = data.index(tag) + len(tag)
        data = data[:at] + (30000).to_bytes(2, "little") + data[at + 2 :]
    file.write_bytes(data)
    assert limited(lambda: refusal([file])).code == "BOMB"


def test_frame_count_bomb_is_refused_before_memory(tmp_path):
    (file,) = corpus.write(tmp_path, [corpus.ds(NumberOfFrames=1, pixels=np.zeros((1, 6, 5), np.int16))], RLELossless)
    alter(file, b"\x28\x00\x08\x00IS\x02\x001 ", b"\x28\x00\x08\x00IS\x08\x00" + b"90000000")
    assert limited(lambda: refusal([file])).code == "BOMB"


def test_deflated_bomb_is_unpacked_no_further_than_needed(tmp_path):
    (file,) = corpus.write(tmp_path, [corpus.ds()], DeflatedExplicitVRLittleEndian)
    data = file.read_bytes()
    _, start = dicom_fast.meta(data)
    inside = zlib.decompress(data[start:], -15)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(inside) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(1000)) + packer.flush()
    file.write_bytes(data[:start] + packed)
    (image,) = limited(lambda: read_dicom([file]))[0].images
    assert limited(lambda: image.pixels)[0, 0, 1] == -999


def test_deep_sequences_are_refused(tmp_path):
    (file,) = corpus.write(tmp_path, [corpus.ds()])
    data = file.read_bytes()
    at = data.index(b"\x08\x00\x60\x00CS")
    opened = b"\x08\x00\x15\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    file.write_bytes(data[:at] + opened * 20000)
    assert limited(lambda: refusal([file]), seconds=10).code in ("CORRUPT", "TRUNCATED", "NOT_AN_IMAGE")


def test_an_absurd_length_takes_no_memory(tmp_path):
    (file,) = corpus.write(tmp_path, [corpus.ds()])
    data = file.read_bytes()
    at = data.index(b"\x08\x00\x60\x00CS")
    file.write_bytes(data[:at] + b"\x08\x00\x60\x00UN\x00\x00\xf0\xff\xff\xff" + data[at + 10 :])
    assert refusal([file]).code in ("CORRUPT", "TRUNCATED", "NOT_AN_IMAGE")


def test_damaged_bytes_end_in_a_code(tmp_path):
    rng = np.random.default_rng(5)
    seeds = []
    for n, syntax in enumerate((ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, DeflatedExplicitVRLittleEndian)):
        (tmp_path / str(n)).mkdir()
        seeds += corpus.write(tmp_path / str(n), [corpus.ds(pixels=corpus.large(0.0))], syntax)
    seeds += corpus.write(tmp_path, [corpus.enhanced(corpus.even(3))])
    bad, target = [], tmp_path / "damaged"
    for n in range(400):
        data = bytearray(seeds[n % len(seeds)].read_bytes())
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(130, min(len(data), 2200)))] = int(rng.integers(256))
        if n % 7 == 0:
            del data[int(rng.integers(132, len(data))) :]
        target.write_bytes(bytes(data))
        try:
            for study in read_dicom([target]):
                for image in study.images:
                    _ = image.voxels if isinstance(image, Volume) else image.pixels
        except MedVLMError as error:
            assert error.code in HINTS
        except Exception as error:  # anything else is what this test is looking for
            bad.append((n, repr(error)))
    assert not bad, bad


def test_a_missing_codec_is_named(tmp_path, monkeypatch):
    file = j2k(tmp_path)

    class Absent:
        available_plugins = ()

    monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda uid: Absent)
    error = refusal([file])
    assert error.code == "NO_CODEC" and "pylibjpeg-openjpeg" in str(error)


@pytest.mark.parametrize("text", [b"", b"hello", b"x" * 4000, b"<html>" * 100, b"{}\n", bytes(300), "\u00e4".encode() * 200])
def test_text_is_not_dicom(text, tmp_path):
    file = tmp_path / "note.dcm"
    file.write_bytes(text)
    assert not is_dicom(file)


def test_nothing_to_read_is_an_error():
    with pytest.raises(MedVLMError, match="NOT_AN_IMAGE"):
        read_dicom([])


# ---- DICOMDIR


def directory(folder: Path, *ids) -> Path:
    records = [corpus.item(DirectoryRecordType="IMAGE", ReferencedFileID=i) for i in ids]
    d = corpus.ds(DirectoryRecordSequence=records, SOPClassUID="1.2.840.10008.1.3.10")
    for name in ("PixelData", "Modality", "Rows", "Columns"):
        delattr(d, name)
    return corpus.write(folder, [d], name=lambda i: "DICOMDIR")[0]


def test_a_dicomdir_stands_for_its_files(tmp_path):
    files = corpus.write(tmp_path, corpus.series(), name=lambda i: f"IM{i}")
    index = directory(tmp_path, *(f.name for f in files))
    for given in ([index], [index, *files], [index, *(tmp_path / "." / ".." / tmp_path.name / f.name for f in files)]):
        (study,) = read_dicom(given)
        assert study.images[0].shape == (1, 8, 6, 5) and not study.warnings


@pytest.mark.parametrize("escape", [["..", "IM1"], ["..\\IM1"], ["/etc/hostname"], ["a", "..", "..", "IM1"], ["C:\\IM1"]])
def test_a_dicomdir_cannot_leave_its_folder(escape, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    corpus.write(tmp_path, [corpus.ds()], name=lambda i: "IM1")
    assert refusal([directory(inside, escape)]).code == "UNSAFE_PATH"


# ---- nothing leaks


PLANTED = "ZZQLEAK"


def planted(d):
    """The series with a name in every attribute that can hold text."""
    for keyword in ("PatientName", "PatientID", "PatientComments", "InstitutionName", "ReferringPhysicianName", "StudyDescription", "SeriesDescription", "ProtocolName",
                    "StudyID", "AccessionNumber", "OperatorsName", "ImageComments", "BodyPartExamined", "ViewPosition", "RescaleType", "Laterality", "PatientPosition",
                    "WindowCenterWidthExplanation", "StationName", "Manufacturer", "DerivationDescription", "AdditionalPatientHistory"):  # fmt: skip
        setattr(d, keyword, PLANTED)
    return d


def test_no_name_reaches_an_id_a_warning_an_error_or_a_repr(tmp_path, caplog, capfd):
    said = []
    for n, case in enumerate(CASES):
        folder = tmp_path / f"{n}"
        folder.mkdir()
        with_names = folder / PLANTED
        with_names.mkdir()
        for file in case.make(folder):
            try:
                data = pydicom.dcmread(file)
                data.remove_private_tags()
                planted(data).save_as(with_names / f"{PLANTED}{file.name}")
            except Exception:  # what the writer cannot repeat stays as it is
                (with_names / f"{PLANTED}{file.name}").write_bytes(file.read_bytes())
        for policy in ("strict", "fill"):
            try:
                for study in read_dicom(sorted(with_names.iterdir()), policy):
                    said += [study.id, str(study.patient), repr(study), *(i.id for i in study.images)]
                    for image in study.images:
                        _ = image.voxels if isinstance(image, Volume) else image.pixels
                    said += study.warnings
            except MedVLMError as error:
                said += [str(error), repr(error), repr(error.__cause__)]
    assert len(said) > 3 * len(CASES)
    assert not [s for s in said if PLANTED in s or "Doe" in s]
    assert PLANTED not in caplog.text and PLANTED not in "".join(capfd.readouterr())


def test_reading_is_silent(tmp_path, capfd):
    file = j2k(tmp_path)
    alter(file, b"1.2.840.10008.5.1.4.1.1.2", b"1.2.840.10008.5.1.4.1.1.x")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert read_dicom([file])[0].images[0].pixels.any()
        assert "".join(capfd.readouterr()) == "" and not heard
        _ = pydicom.dcmread(file).file_meta.MediaStorageSOPClassUID
        assert heard, "pydicom itself would have spoken"


def test_a_folder_named_dl_does_not_break_reading(tmp_path):
    (tmp_path / "dl").mkdir()
    file = j2k(tmp_path)
    code = f"from medvlm.imaging.dicom import read_dicom; print(read_dicom([{str(file)!r}])[0].images[0].pixels.shape)"
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": root, "PATH": ""})
    assert done.stdout.strip() == "(1, 40, 48)", done.stderr[-300:]


# ---- the fast path and pydicom agree


def same_both_ways(file: Path) -> bool | None:
    """None when the fast path leaves the file to pydicom."""
    fast = dicom_header.read_header(file)
    if not fast.file.fast:
        return None
    slow = dicom_header._slow(file)
    assert {k: v.rstrip(b"\0 ") for k, v in fast.values.items() if v.rstrip(b"\0 ")} == {k: v.rstrip(b"\0 ") for k, v in slow.values.items() if v.rstrip(b"\0 ")}
    assert (fast.file.syntax, fast.file.offset, fast.file.length) == (slow.file.syntax, slow.file.offset, slow.file.length)
    raw = np.empty((fast.whole("Rows"), fast.whole("Columns")), f"{'ui'[fast.whole('PixelRepresentation')]}{fast.whole('BitsAllocated') // 8}")
    dicom_fast.pixels(file, fast.file.offset, raw, fast.whole("BitsStored"))
    return np.array_equal(raw, pydicom.dcmread(file).pixel_array)


def test_fast_path_equals_pydicom_on_the_corpus(tmp_path):
    served = 0
    for n, case in enumerate(CASES):
        folder = tmp_path / str(n)
        folder.mkdir()
        for file in case.make(folder):
            if (same := same_both_ways(file)) is not None:
                assert same, case.name
                served += 1
    assert served > 300


def test_fast_path_steps_over_sequences_of_undefined_length(tmp_path):
    (file,) = corpus.write(tmp_path, [corpus.private(corpus.ds())])
    assert same_both_ways(file) is True


def test_fast_path_reads_headers_longer_than_its_first_look(tmp_path):
    (file,) = corpus.write(tmp_path, [corpus.ds(ImageComments="x" * 10000, PatientComments="y" * 10000, AdditionalPatientHistory="z" * 10000)])
    assert same_both_ways(file) is True


def test_fast_path_is_short():
    assert len(Path(dicom_fast.__file__).read_text().splitlines()) <= 150


# ---- public files


def rows(data: Path) -> list[dict]:
    return [json.loads(line) for line in (data / "dicom_odd" / "manifest.jsonl").read_text().splitlines()]


@pytest.mark.shared
def test_public_odd_files_equal_pydicom_or_have_a_code(data):
    wrong, images = [], 0
    for row in rows(data):
        started = time.perf_counter()
        expect = row["labels"]["expect"]
        got = corpus.of_file(data / "dicom_odd" / row["image"])
        images += got.startswith("read")
        decodes = (expect.get("decoded") or {}).get("ok", False)
        no_image = expect.get("Modality") in ("SEG", "RTDOSE", "RTPLAN", "SR", "ANN", "ECG") or "parametric_map" in row["image"]
        if got.startswith("differs") or time.perf_counter() - started > 10:
            wrong.append((row["image"], got))
        elif no_image and got != "NOT_AN_IMAGE" or decodes and not no_image and not got.startswith("read"):
            wrong.append((row["image"], got))
        elif "truncated" in row["labels"]["tags"] and got not in ("TRUNCATED", "NOT_AN_IMAGE"):
            wrong.append((row["image"], got))
    assert not wrong and images >= 175


@pytest.mark.shared
def test_fast_path_equals_pydicom_on_public_files(data):
    served, wrong = 0, []
    for row in rows(data):
        file = data / "dicom_odd" / row["image"]
        try:
            same = same_both_ways(file)
        except MedVLMError:
            continue
        served += same is not None
        if same is False:
            wrong.append(row["image"])
    for file in (data / "dicom_series").glob("*/*"):
        if file.suffix != ".gz" and is_dicom(file) and (same := same_both_ways(file)) is not None:
            served += 1
            assert same, file.name
    assert not wrong and served >= 50


@pytest.mark.shared
@pytest.mark.parametrize(("name", "twin"), [("MR3_JPLY", "MR3_J2KR"), ("MR4_JPLY", "MR4_J2KR"), ("XA1_JPLY", "XA1_J2KR")])
def test_12_bit_jpeg_is_close_to_its_lossless_twin(name, twin, data):
    lossy, exact = (read_dicom([data / "dicom_odd" / "wg04" / f"{n}.dcm"])[0].images[0] for n in (name, twin))
    assert "LOSSY" in codes(lossy) and "LOSSY" not in codes(exact)
    span = float(exact.pixels.max()) - float(exact.pixels.min())
    assert np.abs(lossy.pixels.astype(float) - exact.pixels).mean() < 0.01 * span
    assert np.corrcoef(lossy.pixels.ravel(), exact.pixels.ravel())[0, 1] > 0.995


@pytest.mark.shared
@pytest.mark.parametrize("name", ["ts_ct_dicom", "torchio_head_small", "dcmqi_ct_3slice"])
def test_public_series_equal_pydicom_in_world_coordinates(name, data):
    files = [f for f in (data / "dicom_series" / name).iterdir()]
    (study,) = read_dicom(files[::-1])
    (image,) = study.images
    assert image.shape[1] == len(files)
    for file in files:
        d = pydicom.dcmread(file)
        truth = d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept)
        for h, w in ((0, 0), (3, 11), (d.Rows - 1, d.Columns - 2)):
            iop, position = np.array(d.ImageOrientationPatient, float), np.array(d.ImagePositionPatient, float)
            at = position + h * d.PixelSpacing[0] * iop[3:] + w * d.PixelSpacing[1] * iop[:3]
            index = image.index(at)
            assert np.abs(image.world(np.round(index)) - at).max() < 1e-3
            k = np.round(index).astype(int)
            assert tuple(k[1:]) == (h, w)
        assert np.array_equal(image.voxels[0, k[0]], truth)
