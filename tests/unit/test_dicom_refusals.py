"""DICOM: damaged, hostile and contradictory files end in a code, before memory is taken."""

import time
import tracemalloc
import zlib

import dicom_corpus as corpus
import numpy as np
import pydicom
import pytest
from dicom_corpus import alter, j2k, refusal
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from medvlm.errors import HINTS, MedVLMError
from medvlm.imaging import dicom_fast
from medvlm.imaging.dicom import is_dicom, read_dicom
from medvlm.imaging.scan import Volume

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the writer and of pydicom, which the tests call themselves


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
