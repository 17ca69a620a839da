"""DICOM: a DICOMDIR stands for the files it lists, and never for any outside its folder."""

from pathlib import Path

import dicom_corpus as corpus
import pytest
from dicom_corpus import refusal

from medvlm.imaging.dicom import read_dicom

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the writer and of pydicom, which the tests call themselves


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
