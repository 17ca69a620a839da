"""DICOM: the odd files and series of public test collections."""

import time

import dicom_corpus as corpus
import numpy as np
import pydicom
import pytest
from dicom_corpus import codes, rows

from medvlm.imaging.dicom import read_dicom

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the writer and of pydicom, which the tests call themselves


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
