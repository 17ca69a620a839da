"""The main job with a model whose answers are known: what is written, where, and what is never written."""

import json
from dataclasses import replace

import numpy as np
import pydicom
import pytest
import test_study as studies
from PIL import Image as Pillow

import medvlm
from medvlm import reading
from medvlm.cli import main
from medvlm.datasets import sentences
from medvlm.datasets.instruct import side_of
from medvlm.errors import ModelError
from medvlm.imaging.scan import Image, Study, Volume
from medvlm.predictors.base import Model, pick
from medvlm.sample import NOTICE, Finding, Measurement, Region, Report, Sentence, box_of

KEYS = ["study", "model", "images", "findings", "looked_for_absent", "sentences", "warnings", "out_of_scope", "notice"]
"""What other programs read (there may be more)."""


def promised(record, keys=KEYS):
    """The keys that were promised, in the record's order."""
    return [k for k in record if k in keys]


def part(record, *keys):
    return {k: record[k] for k in keys}


class Known(Model):
    """Sees two lungs and a consolidation in the patient's right one; reads 2-D X-rays and nothing else."""

    name, version, sha256, reads = "known", "7", "ab" * 32, ("xray",)

    def __init__(self, ill=("xray-1", "image-1"), fails=()):
        self.ill, self.fails, self.calls = ill, fails, 0

    def report(self, study, image=None):
        picture = pick(study, image, self.reads)
        self.calls += 1
        if picture.id in self.fails:
            raise self.fails[picture.id]
        if isinstance(picture, Volume):
            return Report(out_of_scope="known reads pictures, not volumes")
        h, w = picture.shape[1:]
        right, left, spot = (np.zeros((h, w), bool) for _ in range(3))
        right[h // 5 : -h // 5, w // 10 : w * 4 // 10] = True  # the patient's right is on the left of the picture
        left[h // 5 : -h // 5, w * 6 // 10 : w * 9 // 10] = True
        spot[h // 3 : h // 3 + 4, w // 5 : w // 5 + 6] = True
        lungs = [Region(picture.id, n, box_of(m), m, 0.99) for n, m in (("right lung", right), ("left lung", left))]
        ill = picture.id in self.ill
        own = Region(picture.id, "consolidation", box_of(spot), spot, 0.912345)
        found = (
            Finding("consolidation", ill, 0.912345 if ill else 0.1, (own,) if ill else tuple(lungs), (Measurement("area", 24.0, "mm2"),) if ill else ()),
            Finding("pneumothorax", False, float("nan") if not ill else 0.02, tuple(lungs)),
        )
        side = side_of(spot, right, left) if ill else None
        text = sentences.variants("consolidation", "present" if ill else "absent", side)[0]
        return Report((Sentence(text, found[0].regions, "findings", (0,)), Sentence("No pneumothorax.", tuple(lungs), "impression", (1,))), found)


def xray(id="xray-1", size=(60, 81), seed=0, spacing=(0.5, 0.25)):
    return Image(id, np.random.default_rng(seed).integers(0, 255, (1, *size), dtype=np.uint8), spacing, "xray", "uint8", {"warnings": ["W: one"]})


def study(*images, id="study-1"):
    return Study(id, None, images or (xray(),))


def strict(path):
    def refuse(word):
        raise AssertionError(f"{word} in {path}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_report_has_its_promised_shape(tmp_path):
    record = reading.analyze(study(), Known(), tmp_path / "out")
    said = strict(tmp_path / "out/report.json")
    assert said == record and promised(said) == KEYS
    assert said["study"] == "study-1" and said["model"] == {"name": "known", "version": "7", "sha256": "ab" * 32}
    (image,) = said["images"]
    assert part(image, "id", "modality", "size", "spacing", "warnings") == {"id": "xray-1", "modality": "xray", "size": [60, 81], "spacing": [0.5, 0.25], "warnings": ["W: one"]}
    finding = said["findings"][0]
    assert promised(finding, keys := ["label", "present", "probability", "regions", "measurements"]) == keys
    assert (finding["label"], finding["present"], finding["probability"]) == ("consolidation", True, 0.9123)
    assert finding["measurements"] == [{"name": "area", "value": 24.0, "unit": "mm2"}]
    (region,) = finding["regions"]
    assert list(region) == ["image", "label", "probability", "lower", "upper", "mask"]
    assert region["image"] == "xray-1" and region["lower"] == [20, 16] and region["upper"] == [24, 22]  # (h, w), half-open
    mask = np.asarray(Pillow.open(tmp_path / "out" / region["mask"]))
    assert mask.shape == (60, 81) and mask.dtype == bool and box_of(mask) == ((20, 16), (24, 22)) and mask.sum() == 24
    assert said["looked_for_absent"] == ["pneumothorax"] and said["out_of_scope"] is None and said["notice"] == NOTICE
    assert said["warnings"] == ["W: one (image xray-1)"]
    told = [part(x, "section", "text", "findings") for x in said["sentences"]]
    assert told == [{"section": "findings", "text": "Consolidation on the right.", "findings": [0]}, {"section": "impression", "text": "No pneumothorax.", "findings": [1]}]
    assert [s["label"] for s in said["structures"]] == ["right lung", "left lung"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["masks", "preview.png", "report.json", "report.md"]
    assert sorted(p.name for p in (tmp_path / "out/masks").iterdir()) == ["xray-1_consolidation.png", "xray-1_left-lung.png", "xray-1_right-lung.png"]
    page = (tmp_path / "out/report.md").read_text()
    assert NOTICE in page and "Consolidation on the right." in page and "91%" in page and "area 24 mm2" in page


def test_the_side_in_words_is_the_side_in_the_picture(tmp_path):
    """A lesion in the patient's right lung lies on the left of the picture, in the mask, in the box and in the preview."""
    blank = Image("xray-1", np.full((1, 300, 300), 90, np.uint8), (1, 1), "xray", "uint8")
    said = reading.analyze(study(blank), Known(), tmp_path / "out")
    (region,) = said["findings"][0]["regions"]
    columns = np.flatnonzero(np.asarray(Pillow.open(tmp_path / "out" / region["mask"])).any(0))
    assert "on the right" in said["sentences"][0]["text"] and columns.max() < 150 and region["upper"][1] <= 150
    preview = np.asarray(Pillow.open(tmp_path / "out/preview.png").convert("RGB")).astype(int)
    red = (np.abs(preview[:, :900] - (0xF9, 0x41, 0x44)).sum(-1) < 12).nonzero()  # the third outline's colour
    assert len(red[1]) and red[1].max() < 450


def test_two_images_are_read_apart(tmp_path):
    two = study(xray("xray-1"), xray("xray-2", (40, 50), 1, None))
    said = reading.analyze(two, Known(ill=("xray-2",)), tmp_path / "out")
    assert [(f["label"], f["present"]) for f in said["findings"]] == [("consolidation", False), ("pneumothorax", False), ("consolidation", True), ("pneumothorax", False)]
    assert said["looked_for_absent"] == ["pneumothorax"]  # consolidation is there, on the second
    assert [s["findings"] for s in said["sentences"]] == [[0], [1], [2], [3]]
    assert {r["image"] for f in said["findings"][2:] for r in f["regions"]} == {"xray-2"}
    assert (tmp_path / "out/preview.png").is_file() and (tmp_path / "out/preview-xray-2.png").is_file()
    assert strict(tmp_path / "out/report.json")["findings"][1]["probability"] is None  # NaN is null
    for f in said["findings"]:
        for r in f["regions"]:
            with Pillow.open(tmp_path / "out" / r["mask"]) as mask:
                assert mask.size == ((81, 60) if r["image"] == "xray-1" else (50, 40))
    one = reading.analyze(two, Known(ill=("xray-2",)), tmp_path / "one", image="xray-2")
    assert [i["id"] for i in one["images"]] == ["xray-2"] and len(one["findings"]) == 2


def volume(id="ct-1"):
    return Volume(id, np.zeros((1, 3, 4, 4)), np.eye(4), "ct", "HU")


def test_out_of_scope_gives_a_reason_and_nothing_else(tmp_path):
    reading.analyze(study(), Known(), tmp_path / "out")
    said = reading.analyze(study(volume()), Known(), tmp_path / "out")
    assert said["out_of_scope"] == "known reads pictures, not volumes" and said["findings"] == said["sentences"] == said["structures"] == said["looked_for_absent"] == []
    left = sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert left == ["report.json", "report.md"]  # nothing of the earlier run is left beside it
    mixed = reading.analyze(study(xray(), volume()), Known(), tmp_path / "mixed")
    assert mixed["out_of_scope"] is None and any(w.startswith("NOT_READ: known reads pictures, not volumes") for w in mixed["warnings"]) and mixed["findings"]


@pytest.mark.parametrize("error", [RuntimeError("no"), ValueError("Doe^Jane"), KeyboardInterrupt()])
def test_a_model_that_fails_leaves_nothing_half_written(tmp_path, error):
    two = study(xray("xray-1"), xray("xray-2"))
    with pytest.raises(type(error)):
        reading.analyze(two, Known(fails={"xray-2": error}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    reading.analyze(two, Known(), tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("the reader's own")
    before = {p: p.read_bytes() for p in sorted((tmp_path / "out").rglob("*")) if p.is_file()}
    with pytest.raises(type(error)):
        reading.analyze(two, Known(fails={"xray-2": error}), tmp_path / "out")
    assert {p: p.read_bytes() for p in sorted((tmp_path / "out").rglob("*")) if p.is_file()} == before
    reading.analyze(two, Known(ill=()), tmp_path / "out")
    assert (tmp_path / "out/notes.txt").read_text() == "the reader's own"


def test_an_image_that_cannot_be_read_does_not_lose_the_others(tmp_path):
    broken = ModelError("its pixels are cut short", "BAD_CHECKPOINT")
    said = reading.analyze(study(xray("xray-1"), xray("xray-2")), Known(fails={"xray-1": broken}, ill=("xray-2",)), tmp_path / "out")
    assert said["findings"][0]["present"] and any("BAD_CHECKPOINT: its pixels are cut short" in w for w in said["warnings"])
    with pytest.raises(ModelError):
        reading.analyze(study(xray("xray-1")), Known(fails={"xray-1": broken}), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file"):
        with pytest.raises(medvlm.MedVLMError) as e:
            reading.analyze(study(), Known(), out)
        assert e.value.code == "CANNOT_WRITE"
    assert (tmp_path / "file").read_text() == "" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def worklist(tmp_path):
    folder = tmp_path / "in"
    for n in range(3):
        studies.picture(folder / f"{n}.png", n)
    (folder / "bad.png").write_bytes((folder / "0.png").read_bytes()[:60])
    return folder


def test_many_studies_go_on_where_they_stopped(worklist, tmp_path):
    model = Known()
    first = list(reading.analyze_many([worklist], model, tmp_path / "out", modality="xray"))
    assert model.calls == 3 and len(first) == 4 and [("error" in r) for _, r in first] == [False] * 3 + [True]
    assert len({r["study"] for _, r in first}) == 4 and "TRUNCATED" in first[3][1]["error"]
    good = [r["study"] for _, r in first[:3]]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(good)
    again = list(reading.analyze_many([worklist], model, tmp_path / "out", modality="xray"))
    assert model.calls == 3 and [r for _, r in again] == [r for _, r in first]
    (tmp_path / "out" / good[0] / "report.json").unlink()  # stopped before it was whole
    (tmp_path / "out" / good[1] / "report.json").write_text("{")  # and one that somebody cut
    list(reading.analyze_many([worklist], model, tmp_path / "out", modality="xray"))
    assert model.calls == 5
    other = Known()
    other.version = "8"
    list(reading.analyze_many([worklist], other, tmp_path / "out", modality="xray"))
    assert other.calls == 3


def test_two_sources_of_one_study_are_both_read_and_neither_is_lost(tmp_path):
    for name, position in (("a", 0.0), ("b", 50.0)):
        file = studies.dicom(tmp_path / name / "0.dcm", position=position)
        ds = pydicom.dcmread(file)
        ds.Modality, ds.SeriesInstanceUID = "DX", f"1.2.3.{name == 'b':d}"
        ds.Rows = ds.Columns = 40
        ds.PixelData = np.full((40, 40), 100, np.uint16).tobytes()
        ds.save_as(file)
    model, sources = Known(ill=()), [tmp_path / "a", tmp_path / "b"]
    first = [r for _, r in reading.analyze_many(sources, model, tmp_path / "out")]
    assert model.calls == 2 and first[0]["study"] == first[1]["study"] and first[0]["held"] != first[1]["held"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [first[0]["study"], first[0]["study"] + "-2"]
    assert [r for _, r in reading.analyze_many(sources, model, tmp_path / "out")] == first and model.calls == 2
    list(reading.analyze_many(sources[1:], model, tmp_path / "out"))  # another series has come in the first one's place
    assert model.calls == 3


@pytest.mark.parametrize("error", [ModelError("not this one", "OUT_OF_SCOPE"), ValueError("Doe^Jane")])
def test_one_study_that_fails_does_not_stop_the_others(worklist, tmp_path, error):
    class Second(Known):
        def report(self, study, image=None):
            if self.calls == 1:
                self.calls += 1
                raise error
            return super().report(study, image)

    found = [r for _, r in reading.analyze_many([worklist, tmp_path / "nowhere"], Second(), tmp_path / "out", modality="xray")]
    assert [("error" in r) for r in found] == [False, True, False, True, True]
    assert "Doe" not in str(found) and found[1]["error"].split(":")[0] in ("OUT_OF_SCOPE", "INTERNAL") and "NOT_FOUND" in found[4]["error"]


def test_no_patient_in_what_is_written(tmp_path):
    """A name, a number and a birth date in the header are in no name of a file, no record, and no file but DICOM, which is about this patient."""
    source = studies.dicom(tmp_path / "Doe^Jane" / "a.dcm")
    header = pydicom.dcmread(source)
    header.PatientName, header.PatientID, header.PatientBirthDate, header.AccessionNumber = "Doe^Jane", "4711-0815", "19700203", "ACC-99"
    header.InstitutionName, header.StudyDescription, header.SeriesDescription, header.StudyID = "St Elsewhere", "Doe knee", "Doe left", "4711-0815"
    header.SOPClassUID, header.Rows, header.Columns, header.PixelData = "1.2.840.10008.5.1.4.1.1.1", 60, 80, np.arange(4800, dtype="<i2").tobytes()
    del header.ImagePositionPatient, header.ImageOrientationPatient
    header.Modality = "CR"
    header.save_as(source)
    read = medvlm.read(source.parent, modality="xray")
    for image in read.images:
        assert "Doe" not in image.id
    model = Known(ill=[i.id for i in read.images])
    record = reading.analyze(read, model, tmp_path / "out")
    assert record["findings"] and record["out_of_scope"] is None
    list(reading.analyze_many([source.parent], model, tmp_path / "many", modality="xray"))
    written = [p for f in ("out", "many") for p in (tmp_path / f).rglob("*")]
    assert len(written) > 8
    for path in written:
        inside = path.read_bytes() if path.is_file() and path.suffix != ".dcm" else b""
        for secret in (b"Doe", b"4711-0815", b"19700203", b"ACC-99", b"Elsewhere"):
            assert secret not in inside and secret.decode() not in str(path.relative_to(tmp_path)), path


def test_of_dicom_a_segmentation_and_a_structured_report_are_written(tmp_path):
    import dicom_corpus

    source = dicom_corpus.ds(pixels=np.zeros((60, 80), np.int16), Modality="CR", SOPClassUID="1.2.840.10008.5.1.4.1.1.1", ImagePositionPatient=None, ImageOrientationPatient=None, RescaleType=None)
    (tmp_path / "in").mkdir()
    dicom_corpus.write(tmp_path / "in", [source])
    record = reading.analyze(medvlm.read(tmp_path / "in"), Known(), tmp_path / "out")
    assert record["images"][0]["seg"] == "seg.dcm" and record["sr"] == "sr.dcm" and not any("NO_S" in w for w in record["warnings"])
    stored = pydicom.dcmread(tmp_path / "out/seg.dcm")
    assert [s.SegmentLabel for s in stored.SegmentSequence] == ["consolidation", "right lung", "left lung"]
    for number, frame in enumerate(stored.pixel_array):
        mask = np.asarray(Pillow.open(tmp_path / "out/masks" / f"xray-1_{stored.SegmentSequence[number].SegmentLabel.replace(' ', '-')}.png"))
        assert np.array_equal(frame, mask)
    told = pydicom.dcmread(tmp_path / "out/sr.dcm")
    assert stored.SOPInstanceUID in str(told) and b"Consolidation on the right." in (tmp_path / "out/sr.dcm").read_bytes() and told.PatientID == "4711"
    del source.StudyInstanceUID
    dicom_corpus.write(tmp_path / "in", [source])
    record = reading.analyze(medvlm.read(tmp_path / "in"), Known(), tmp_path / "out")
    assert record["images"][0]["seg"] is None is record["sr"] and "StudyInstanceUID" in record["warnings"][-1] and record["findings"]
    assert not list((tmp_path / "out").glob("*.dcm"))


def test_the_command_reads_one_and_many(worklist, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("medvlm.predictors.load", lambda *_: Known())
    single = worklist / "0.png"
    assert main(["analyze", str(single), "--modality", "xray", "--out", str(tmp_path / "a"), "--json"]) == 0
    assert promised(json.loads(capsys.readouterr().out)) == KEYS
    assert main(["analyze", str(single), "--modality", "xray", "--out", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "Consolidation on" in shown and NOTICE in shown and str(tmp_path / "b") in shown
    assert main(["analyze", str(worklist / "1.png"), str(single), "--modality", "xray", "--out", str(tmp_path / "c"), "--json"]) == 0
    assert len([json.loads(x) for x in capsys.readouterr().out.splitlines()]) == 2
    assert main(["analyze", str(single), str(worklist / "bad.png"), "--modality", "xray", "--out", str(tmp_path / "d"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "1 of the studies" in err
    for choice in (["--image", "xray-1"], ["--study", "x"]):
        assert main(["analyze", str(single), str(worklist / "1.png"), *choice, "--out", str(tmp_path / "e")]) == 2
    assert main(["analyze", str(single), "--modality", "xray", "--image", "none", "--out", str(tmp_path / "f")]) == 2
    assert "NO_SUCH_IMAGE" in capsys.readouterr().err


def test_labels_in_any_script_have_files_of_their_own(tmp_path):
    class Russian(Known):
        def report(self, study, image=None):
            found = super().report(study, image)
            names = {"right lung": "Правое лёгкое", "left lung": "Левое лёгкое"}
            told = tuple(replace(f, regions=tuple(replace(r, label=names.get(r.label, r.label)) for r in f.regions)) for f in found.looked_for)
            return replace(found, looked_for=told)

    record = reading.analyze(Study("s", None, (Image("xray-1", np.zeros((1, 60, 80), np.uint8), None, "xray", "uint8", {"warnings": []}),)), Russian(), tmp_path / "out")
    files = {r["label"]: r["mask"] for f in record["findings"] for r in f["regions"]}
    assert len(set(files.values())) == len(files) >= 2 and all((tmp_path / "out" / f).is_file() for f in files.values())
