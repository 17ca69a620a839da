"""DICOM: no name from a file reaches an id, a warning, an error or the terminal."""

import warnings

import dicom_corpus as corpus
import pydicom
import pytest
from dicom_corpus import alter, j2k

from medvlm.errors import MedVLMError
from medvlm.imaging.dicom import read_dicom
from medvlm.imaging.scan import Volume

CASES = corpus.cases()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the writer and of pydicom, which the tests call themselves
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
