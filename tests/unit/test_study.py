"""read(): files, folders, archives and arrays; refusals that say what, where and what next, and never a name."""

import gc
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import nifti_corpus as corpus
import numpy as np
import pytest
from PIL import Image as Pillow

import medvlm
from medvlm import errors
from medvlm.imaging import files, limits
from medvlm.imaging.scan import Image, Volume

CT = "1.2.840.10008.5.1.4.1.1.2"
GREY = np.arange(70, dtype=np.uint8).reshape(10, 7)


def nifti(path: Path, shift=0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(corpus.header(corpus.SIZE, "i2", sform=corpus.PLAIN) + corpus.body(corpus.voxels() + np.int16(shift)))
    return path


def picture(path: Path, shift=0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(GREY + np.uint8(shift)).save(path, "PNG")
    return path


def dicom(path: Path, study="1.2.3", position=0.0) -> Path:
    """One 4 x 4 CT slice."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian

    path.parent.mkdir(parents=True, exist_ok=True)
    d = pydicom.Dataset()
    d.SOPClassUID, d.SOPInstanceUID, d.StudyInstanceUID, d.SeriesInstanceUID = CT, f"{study}.1.{int(position) + 1}", study, f"{study}.1"
    d.FrameOfReferenceUID, d.Modality, d.PatientID, d.PatientName = f"{study}.9", "CT", "p1", "Doe^Jane"
    d.Rows = d.Columns = 4
    d.BitsAllocated = d.BitsStored = 16
    d.HighBit, d.PixelRepresentation, d.SamplesPerPixel, d.PhotometricInterpretation = 15, 1, 1, "MONOCHROME2"
    d.PixelSpacing, d.ImageOrientationPatient, d.ImagePositionPatient = [1, 1], [1, 0, 0, 0, 1, 0], [0, 0, position]
    d.RescaleSlope, d.RescaleIntercept = 1, -1024
    d.PixelData = np.arange(16, dtype="<i2").tobytes()
    d.file_meta = pydicom.dataset.FileMetaDataset()
    d.file_meta.TransferSyntaxUID, d.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CT
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID
    d.save_as(path, enforce_file_format=True)
    return path


def refused(source, **kw) -> errors.MedVLMError:
    with pytest.raises(errors.MedVLMError) as e:
        medvlm.read(source, **kw)
    assert "\n" not in str(e.value) and e.value.hint
    return e.value


# files and folders


def test_ids_come_from_the_content_and_never_from_names(tmp_path):
    one = medvlm.read(nifti(tmp_path / "DOE_JANE.nii"))
    assert one.id == medvlm.read(nifti(tmp_path / "other" / "name.nii")).id != medvlm.read(nifti(tmp_path / "b.nii", shift=1)).id
    assert len(one.id) == len("study-") + 10 and int(one.id[6:], 16) >= 0
    assert "DOE" not in repr(one) and one.patient is None and [i.id for i in one.images] == ["image-1"]
    # a study of several files does not depend on their names or order
    nifti(tmp_path / "x" / "1.nii"), picture(tmp_path / "x" / "2.png")
    nifti(tmp_path / "y" / "9.nii"), picture(tmp_path / "y" / "3.png")
    assert medvlm.read(tmp_path / "x").id == medvlm.read(tmp_path / "y").id


def test_a_folder_of_any_depth_is_one_study_in_name_order(tmp_path):
    for n, name in enumerate(("a/b/c/2.png", "a/1", "z.png")):  # one without an ending
        picture(tmp_path / name, shift=n)
    study = medvlm.read(tmp_path)
    assert [i.id for i in study.images] == ["image-1", "image-2", "image-3"]
    assert [int(i.pixels[0, 0, 0]) for i in study.images] == [1, 0, 2]
    assert study.warnings == ()
    assert [i.id for i in medvlm.read(tmp_path, modality="fundus").images] == ["fundus-1", "fundus-2", "fundus-3"]


def test_studies_gives_each_loose_file_its_own_study(tmp_path):
    picture(tmp_path / "a.png"), nifti(tmp_path / "b.nii"), dicom(tmp_path / "d/1.dcm", "1.2.3"), dicom(tmp_path / "d/2.dcm", "1.2.4")
    (tmp_path / "c.nii").write_bytes(nifti(tmp_path / "b.nii").read_bytes()[:-1])
    (tmp_path / "notes.txt").write_text("x")
    found = list(medvlm.studies(tmp_path))
    assert [any("SKIPPED" in w for w in s.warnings) for s in found] == [True, False, False, False, False]
    assert [len(s.images) for s in found] == [1, 1, 1, 1, 0]
    assert [s.images[0].modality for s in found[:4]] == ["ct", "ct", "unknown", "unknown"]
    assert found[4].warnings[0].startswith("TRUNCATED: file 3 of 6 in name order") and len({s.id for s in found}) == 5


def test_several_dicom_studies_are_listed_and_one_can_be_chosen(tmp_path):
    dicom(tmp_path / "1.dcm", "1.2.3"), dicom(tmp_path / "2.dcm", "1.2.4")
    e = refused(tmp_path)
    ids = sorted(s.id for s in medvlm.studies(tmp_path))
    assert e.code == "MANY_STUDIES" and all(i in str(e) for i in ids) and len(ids) == 2
    assert medvlm.read(tmp_path, study=ids[0]).id == ids[0]
    assert refused(tmp_path, study="study-0").code == "NO_SUCH_STUDY"


def test_pictures_beside_dicom_are_left_out_unless_named(tmp_path):
    dicom(tmp_path / "1.dcm"), picture(tmp_path / "icon.png")
    study = medvlm.read(tmp_path)
    assert [i.modality for i in study.images] == ["ct"]
    assert [w.split(":")[0] for w in study.warnings if "LEFT" in w] == ["LEFT_OUT"]
    both = medvlm.read([tmp_path / "1.dcm", tmp_path / "icon.png"])
    assert [i.id for i in both.images] == ["ct-1", "image-1"] and not any("LEFT" in w for w in both.warnings)
    told = medvlm.read([tmp_path / "1.dcm", tmp_path / "icon.png"], modality="ct")
    assert [i.id for i in told.images] == ["ct-1", "ct-2"]
    mixed = medvlm.read([tmp_path, picture(tmp_path.parent / "named.png")])
    assert [i.id for i in mixed.images] == ["ct-1", "image-1"]


def test_litter_and_text_are_skipped_and_counted(tmp_path):
    picture(tmp_path / "a.png")
    for name in (".hidden.png", "Thumbs.db", "__MACOSX/a.png", ".git/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("Jane Doe")
    (tmp_path / "empty").write_bytes(b"")
    study = medvlm.read(tmp_path)
    assert study.warnings == ("SKIPPED: 2 files that are no images were skipped",)


def test_a_refused_file_does_not_lose_the_others(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "DOE.dcm").write_text("this is text")
    (tmp_path / "JANE.png").write_bytes(picture(tmp_path / "b.png").read_bytes()[:40])
    study = medvlm.read(tmp_path)
    assert len(study.images) == 2
    assert sorted(w.split(":")[0] for w in study.warnings) == ["TRUNCATED", "UNKNOWN_FORMAT"]
    assert not any("DOE" in w or "JANE" in w for w in study.warnings)
    assert any("file 1 of 4 in name order" in w for w in study.warnings)


def test_the_two_halves_of_a_pair_are_one_image(tmp_path):
    next(c for c in corpus.cases() if c.name == "pair").make(tmp_path)
    assert [i.id for i in medvlm.read(tmp_path).images] == ["image-1"]


def test_a_study_is_given_back_and_a_list_is_one_study(tmp_path):
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", 3)
    study = medvlm.read([str(a), b])
    assert len(study.images) == 2 and medvlm.read(study) is study


def test_images_of_a_folder_are_read_again_when_used(tmp_path):
    """A folder may hold more than memory does: nothing is kept before it is used."""
    picture(tmp_path / "a.png"), nifti(tmp_path / "b.nii")
    study = medvlm.read(tmp_path)
    assert all(not isinstance(i._array, np.ndarray) for i in study.images)
    assert np.array_equal(study.images[0].pixels[0], GREY)
    assert np.array_equal(study.images[1].voxels[0].T, corpus.voxels())


# what is told


def test_what_the_caller_knows_is_used_and_checked(tmp_path):
    path = picture(tmp_path / "a.png")
    assert medvlm.read(path, spacing=(0.2, 0.3)).image().spacing == (0.2, 0.3)
    for bad in ({"modality": "radiograph"}, {"policy": "lenient"}, {"spacing": (1, 0)}, {"spacing": 1.0}, {"affine": np.eye(4)}):
        assert refused(path, **bad).code == "BAD_ARGUMENT"
    assert refused(nifti(tmp_path / "n.nii"), spacing=(1, 1)).code == "BAD_ARGUMENT"
    assert refused(nifti(tmp_path / "n.nii"), affine=np.zeros((4, 4))).code == "BAD_AFFINE"
    assert refused(dicom(tmp_path / "1.dcm"), affine=np.eye(4)).code == "BAD_ARGUMENT"
    assert medvlm.read(tmp_path / "1.dcm", modality="mr").image().modality == "mr"
    for nothing in ([], 3, None, {"a": 1}, [np.zeros((4, 4))]):
        assert refused(nothing).code == "BAD_ARGUMENT"


def test_arrays(tmp_path):
    image = medvlm.read(GREY, modality="xray", spacing=(0.1, 0.2))
    assert isinstance(image.image(), Image) and image.image().id == "xray-1" and image.image().spacing == (0.1, 0.2)
    assert image.image().shape == (1, 10, 7) and image.image().unit == "uint8" and image.id == medvlm.read(GREY).id
    assert medvlm.read(np.zeros((3, 5, 4))).image().shape == (3, 5, 4)
    affine = np.diag([3.0, 2, 1, 1])
    volume = medvlm.read(np.zeros((3, 5, 4), np.int16), modality="ct", affine=affine).image()
    assert isinstance(volume, Volume) and volume.shape == (1, 3, 5, 4) and volume.spacing == (3, 2, 1) and volume.unit == "HU"
    assert medvlm.read(np.zeros((3, 2, 5, 4), np.uint8), affine=affine).image().shape == (3, 2, 5, 4)
    holes = np.zeros((4, 4), np.float32)
    holes[0, 0] = np.nan
    assert medvlm.read(holes).warnings == ("NOT_FINITE: 1 of 16 values are NaN or infinite (image image-1)",)


@pytest.mark.parametrize(
    ("shape", "affine", "hint"),
    [
        ((5, 6, 7), None, "affine="),
        ((10, 7, 3), None, "transpose"),
        ((2, 3, 4, 5), np.eye(4), "--help"),
        ((4, 5), np.eye(4), "--help"),
        ((7,), None, "affine="),
        ((0, 4), None, "--help"),
    ],
)
def test_arrays_of_doubtful_shape_are_refused(shape, affine, hint):
    e = refused(np.zeros(shape), affine=affine)
    assert e.code == "BAD_ARGUMENT" and hint in e.hint


def test_arrays_that_are_no_numbers_are_refused():
    for bad in (np.array([["a"]]), np.zeros((4, 4), complex), np.array([[object()]])):
        assert refused(bad).code == "BAD_ARGUMENT"


# bad use


def bad_uses(folder: Path) -> dict[str, tuple[Path, str]]:
    """What people get wrong, and the code each must get."""
    folder.mkdir(exist_ok=True)
    (folder / "empty").mkdir()
    (folder / "text").mkdir()
    (folder / "text" / "readme.txt").write_text("no image")
    (folder / "note.dcm").write_text("Patient: Jane Doe\n" * 30)
    (folder / "nothing.dcm").write_bytes(b"")
    with zipfile.ZipFile(folder / "whole.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.write(picture(folder / "p" / "a.png"), "a.png")
    (folder / "cut.zip").write_bytes((folder / "whole.zip").read_bytes()[:-30])
    with zipfile.ZipFile(folder / "slip.zip", "w") as z:
        z.write(folder / "p" / "a.png", "../../escaped.png")
    import zlib

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", bytes(1900)) + chunk(b"IEND", b""))
    return {
        "missing file": (folder / "no_such_file.dcm", "NOT_FOUND"),
        "empty folder": (folder / "empty", "EMPTY_FOLDER"),
        "folder of text": (folder / "text", "EMPTY_FOLDER"),
        "text named .dcm": (folder / "note.dcm", "UNKNOWN_FORMAT"),
        "empty file": (folder / "nothing.dcm", "TRUNCATED"),
        "cut zip": (folder / "cut.zip", "TRUNCATED"),
        "zip with ..": (folder / "slip.zip", "UNSAFE_PATH"),
        "2 kB PNG of 30000 x 30000": (folder / "bomb.png", "BOMB"),
    }


def test_bad_use_is_a_named_error_that_quotes_what_was_typed(tmp_path):
    for name, (path, code) in bad_uses(tmp_path / "in").items():
        before = sorted(p for p in tmp_path.rglob("*"))
        e = refused(path)
        assert e.code == code, name
        assert str(path) in str(e) and "Jane" not in str(e), name
        assert sorted(p for p in tmp_path.rglob("*")) == before, name


def test_what_cannot_be_opened_is_unreadable(tmp_path, monkeypatch):
    path = picture(tmp_path / "f" / "a.png")

    def closed(*args, **kw):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as m:
        m.setattr("builtins.open", closed)
        assert refused(path).code == "UNREADABLE"
        assert refused(path.parent).code == "UNREADABLE"
    with monkeypatch.context() as m:
        m.setattr("os.scandir", closed)
        e = refused(path.parent)
        assert e.code == "UNREADABLE" and str(path.parent) in str(e)
    import os

    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe").code == "UNREADABLE"
    assert refused("bad\0name").code == "NOT_FOUND"
    assert refused("x" * 5000).code in ("NOT_FOUND", "UNREADABLE")


# archives


def archive(path: Path, entries: dict[str, bytes], kind=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as z:
        for name, content in entries.items():
            z.writestr(name, content)
    return path


@pytest.fixture
def png(tmp_path):
    return picture(tmp_path / "source" / "a.png").read_bytes()


@pytest.fixture
def temp(tmp_path, monkeypatch):
    """The folder where scratch folders appear."""
    place = tmp_path / "temp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


def test_an_archive_is_read_and_its_files_live_as_long_as_the_pixels(tmp_path, png, temp):
    path = archive(tmp_path / "a.zip", {"DOE^JANE/deep/2.png": png, "DOE^JANE/1.nii": nifti(tmp_path / "n.nii").read_bytes(), "notes.txt": b"x"})
    study = medvlm.read(path)
    assert [i.id for i in study.images] == ["image-1", "image-2"]
    (scratch,) = temp.iterdir()
    assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
    assert not any("DOE" in str(p.relative_to(temp)) for p in scratch.rglob("*"))
    first, second = study.images
    del study
    gc.collect()
    assert np.array_equal(second.pixels[0], GREY)  # still there: an image that may be read holds the folder
    assert np.array_equal(first.voxels[0].T, corpus.voxels())
    del first, second
    gc.collect()
    assert list(temp.iterdir()) == []


def test_a_series_in_an_archive_is_a_volume(tmp_path):
    slices = {f"s/{n}": dicom(tmp_path / "d" / str(n), position=float(n)).read_bytes() for n in range(3)}
    image = medvlm.read(archive(tmp_path / "d.zip", slices)).image()
    assert isinstance(image, Volume) and image.shape == (1, 3, 4, 4) and float(image.voxels[0, 0, 0, 1]) == -1023


def test_pairs_stay_together_in_an_archive(tmp_path):
    case = next(c for c in corpus.cases() if c.name == "pair")
    case.make(tmp_path)
    content = {f"x/{n}": (tmp_path / n).read_bytes() for n in ("pair.hdr", "pair.img")}
    assert medvlm.read(archive(tmp_path / "p.zip", content)).image().shape == (1, 3, 4, 5)


UNSAFE = ["../x.png", "a/../../x.png", "/etc/x.png", "C:\\x.png", "..\\x.png", "\\\\host\\share\\x.png"]


@pytest.mark.parametrize("name", UNSAFE)
def test_names_that_point_outside_are_refused(tmp_path, png, temp, name):
    assert refused(archive(tmp_path / "a.zip", {"ok.png": png, name: png})).code == "UNSAFE_PATH"
    gc.collect()
    assert list(temp.iterdir()) == [] and not list(tmp_path.glob("**/x.png"))


def test_links_are_refused(tmp_path, png):
    info = zipfile.ZipInfo("link.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as z:
        z.writestr("ok.png", png)
        z.writestr(info, "/etc/passwd")
    assert refused(tmp_path / "l.zip").code == "UNSAFE_PATH"


def test_archive_bombs_are_refused_before_anything_is_written(tmp_path, png, temp, monkeypatch):
    monkeypatch.setattr(limits, "free_zip_bytes", 1 << 20)
    zeros = archive(tmp_path / "z.zip", {"x.nii": bytes(2 << 20)})  # 2 MiB in 2 kB
    assert refused(zeros).code == "BOMB"
    monkeypatch.setattr(limits, "max_files", 5)
    assert refused(archive(tmp_path / "n.zip", {f"{n}.png": png for n in range(6)})).code == "BOMB"
    monkeypatch.setattr(limits, "max_zip_bytes", 100)
    assert refused(archive(tmp_path / "s.zip", {"a.png": png, "b.png": png})).code == "TOO_LARGE"
    gc.collect()
    assert list(temp.iterdir()) == []


def forge(path: Path, where: bytes, at: int, value: int) -> None:
    """Overwrite a four-byte field of the first central or local header."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(where) + at, value)
    path.write_bytes(content)


def test_forged_sizes_do_not_pass(tmp_path, png, temp):
    small = archive(tmp_path / "small.zip", {"x.png": bytes(1 << 20)})
    forge(small, b"PK\1\2", 24, 100)  # says 100 bytes, holds a mebibyte
    assert refused(small).code in ("CHECKSUM", "TRUNCATED")
    large = archive(tmp_path / "large.zip", {"x.png": png})
    forge(large, b"PK\1\2", 20, 1 << 30)  # says that a gibibyte is packed in it
    assert refused(large).code == "BOMB"
    wrong = archive(tmp_path / "crc.zip", {"x.png": png})
    forge(wrong, b"PK\1\2", 16, 12345)
    assert refused(wrong).code == "CHECKSUM"
    gc.collect()
    assert list(temp.iterdir()) == []


def test_archives_inside_archives_are_not_opened(tmp_path, png):
    inner = archive(tmp_path / "inner.zip", {"b.png": png}).read_bytes()
    study = medvlm.read(archive(tmp_path / "outer.zip", {"a.png": png, "inner.zip": inner}))
    assert len(study.images) == 1 and study.warnings == ("SKIPPED: 1 files that are no images were skipped",)
    assert refused(archive(tmp_path / "only.zip", {"inner.zip": inner})).code == "EMPTY_FOLDER"


def test_locked_and_false_archives(tmp_path, png):
    locked = archive(tmp_path / "k.zip", {"x.png": png})
    content = bytearray(locked.read_bytes())
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(mark) + at] |= 1
    locked.write_bytes(content)
    e = refused(locked)
    assert e.code == "UNSUPPORTED" and "unlock" in e.hint
    (tmp_path / "text.zip").write_text("not a zip")
    assert refused(tmp_path / "text.zip").code == "TRUNCATED"
    assert refused(archive(tmp_path / "none.zip", {})).code == "EMPTY_FOLDER"


def test_two_entries_of_one_name_are_both_kept(tmp_path, png):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "t.zip", "w") as z:
        z.writestr("a.png", png)
        z.writestr("a.png", picture(tmp_path / "b.png", 9).read_bytes())
    assert [int(i.pixels[0, 0, 0]) for i in medvlm.read(tmp_path / "t.zip").images] == [0, 9]


# writing


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), files.writing(target) as part:
        part.write_bytes(b"half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    with files.writing(target) as part:
        part.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]


def test_a_study_that_lost_its_source_says_so(tmp_path):
    picture(tmp_path / "f" / "a.png"), picture(tmp_path / "f" / "b.png", 1)
    study = medvlm.read(tmp_path / "f")
    shutil.rmtree(tmp_path / "f")
    with pytest.raises(medvlm.MedVLMError) as e:
        _ = study.images[0].pixels
    assert e.value.code == "NOT_FOUND" and "image-1" in str(e.value)
