"""DICOM: the fast path and pydicom agree on header, place and pixels."""

from pathlib import Path

import dicom_corpus as corpus
import numpy as np
import pydicom
import pytest
from dicom_corpus import rows

from medvlm.errors import MedVLMError
from medvlm.imaging import dicom_fast, dicom_header
from medvlm.imaging.dicom import is_dicom

CASES = corpus.cases()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the writer and of pydicom, which the tests call themselves


def same_both_ways(file: Path) -> bool | None:
    """None when the fast path leaves the file to pydicom."""
    fast = dicom_header.read_header(file)
    if not fast.file.fast:
        return None
    slow = dicom_header.by_pydicom(file)
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
