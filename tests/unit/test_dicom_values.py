"""DICOM: what pixels hold and in which type, and what the header says of them."""

import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import dicom_corpus as corpus
import numpy as np
import pydicom
import pytest
from dicom_corpus import codes, j2k, one
from pydicom.uid import SecondaryCaptureImageStorage, UltrasoundImageStorage

from medvlm.errors import MedVLMError
from medvlm.imaging.dicom import read_dicom
from medvlm.imaging.dicom_info import MODALITIES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the writer and of pydicom, which the tests call themselves


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


def test_a_folder_named_dl_does_not_break_reading(tmp_path):
    (tmp_path / "dl").mkdir()
    file = j2k(tmp_path)
    code = f"from medvlm.imaging.dicom import read_dicom; print(read_dicom([{str(file)!r}])[0].images[0].pixels.shape)"
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": root, "PATH": ""})
    assert done.stdout.strip() == "(1, 40, 48)", done.stderr[-300:]
