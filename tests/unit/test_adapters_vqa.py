"""Public sets of questions, captions and reports in the layout that their authors publish, on small imitations."""

import csv
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from test_adapters import paint

from medvlm import parts
from medvlm.datasets import gemex, iu_xray, kvasir_vqa_x1, manifest, path_vqa, pmc_vqa, roco
from medvlm.datasets.base import open_data
from medvlm.errors import ModelError
from medvlm.evaluate import report, retrieve, vqa
from medvlm.sample import Prediction


def lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def table(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def parquet(path, records):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)


def pixels(sample):
    return [i.pixels if hasattr(i, "pixels") else i.voxels for i in sample.images.values()]


# {name: its smallest folder}


def path_vqa_folder(folder):
    said = {
        "train": [("train_0001", "Is it benign?", "yes"), ("train_0002", "What is shown? ", "liver"), ("train_0001", "where is it?", "in the wall")],
        "val": [("val_0001", "Is it benign?", "No")], "test": [("test_0001", "Is it benign?", "no")],
    }  # fmt: skip
    for split, records in said.items():
        file = folder / "pvqa" / "qas" / split / f"{split}_qa.pkl"
        file.parent.mkdir(parents=True)
        file.write_bytes(pickle.dumps([dict(zip(("image", "question", "answer"), r)) for r in records]))
        for name, *_ in records:
            paint(folder / "pvqa" / "images" / split / f"{name}.jpg")
    return folder


def pmc_record(figure, right="B", version=2, **more):
    choices = {f"Choice {c}": f" {c}: {text} " for c, text in zip("ABCD", ("Diffuse", "Focal", "None of them", "A: odd"))}
    if version == 1:
        return {"Figure_path": figure, "Question": "What is the uptake?", "Answer": "Focal", **choices, "Answer_label": right, **more}
    asked = {"Figure_path": figure, "Caption": "PET, axial", "Question": " What is the uptake? "}
    return {"index": 7, **asked, **choices, "Answer": right, "split": "train", **more}


def pmc_folder(folder, version=2, records=None):
    places, suffix = {2: ("images_2/figures", "_2"), 1: ("images", "")}[version]
    asked = [("PMC11_F1.jpg", "B", {}), ("PMC12_F1.jpg", "A", {}), ("PMC11_F1.jpg", "D", {"Question": "And here?"})]
    table(folder / f"train{suffix}.csv", records or [pmc_record(figure, right, version, **more) for figure, right, more in asked])
    table(folder / f"test{suffix}.csv", [pmc_record("PMC13_F2.jpg", "C", version), pmc_record("PMC13_F2.jpg", "B", version, Question="And here?")])
    for name in ("PMC11_F1", "PMC12_F1", "PMC13_F2"):
        paint(folder / places / f"{name}.jpg")
    return folder


def kvasir_line(name, question="Is there a polyp?", answer="A polyp is seen."):
    turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": [f"/home/x/images/{name}.jpg"]}


def kvasir_folder(folder):
    lines(folder / "Kvasir-VQA-x1-train.jsonl", [kvasir_line("cl1"), kvasir_line("cl2"), kvasir_line("cl1", "How many?", "One.")])
    lines(folder / "Kvasir-VQA-x1-test.jsonl", [kvasir_line("cl1", "Which procedure?", "Colonoscopy.")])
    for name in ("cl1", "cl2"):
        Picture.fromarray(np.arange(3 * 48, dtype=np.uint8).reshape(6, 8, 3)).save(_made(folder / "images") / f"{name}.jpg")
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


GEMEX = "p10/p10046166/s50051329/abea5eb9-1.jpg"


def gemex_folder(folder):
    def record(q, answer, **more):
        return {"q_id": q, "image_path": more.pop("path", GEMEX), "question": "What is seen?", "answer": answer, "reason": "seen", "type": "finding",
                "visual_regions": ["left lung"], "visual_locations": [[1, 2, 3, 4]], "ori_report": "Clear.", **more}  # fmt: skip

    choices = {"choices": ["A: Effusion", "B: Nodule", "C: Fracture"]}
    lines(folder / "open_ended_question.jsonl", [record(1, "A nodule.")])
    lines(folder / "closed_ended_question.jsonl", [record(1, "Yes."), record(2, "No.", path="/p11/p11000001/s50000002/b.jpg")])
    lines(folder / "single_choice_question.jsonl", [record(1, "C", **choices)])
    lines(folder / "multi_choice_question.jsonl", [record(1, ["A", "C"], **choices)])
    for path in (GEMEX, "p11/p11000001/s50000002/b.jpg"):
        paint(folder / "files" / path)
    return folder


def roco_first(folder):
    for split, first in (("train", 1), ("validation", 5), ("test", 7)):
        inside = _made(folder / "data" / split / "radiology")
        captions = f"ROCO_{first:05}\t Axial CT.\nROCO_{first + 1:05}\t  Chest X-ray\twith a tab – and a dash.\n"
        (inside / "captions.txt").write_text(captions, encoding="utf-8")
        (inside / "cuis.txt").write_text(f"ROCO_{first:05}\t\tC0040405\tC0023884\nROCO_{first + 1:05}\t\n")
        for i in (first, first + 1):
            paint(inside / "images" / f"ROCO_{i:05}.jpg")
    return folder


def roco_second(folder):
    for split in ("train", "valid", "test"):
        ids = [f"ROCOv2_2023_{split}_{i:06}" for i in (1, 2)]
        table(folder / f"{split}_captions.csv", [{"ID": i, "Caption": f' "Quoted", {i}'} for i in ids])
        table(folder / f"{split}_concepts.csv", [{"ID": ids[0], "CUIs": "C1306645;C0817096;C1996865;C0002940"}, {"ID": ids[1], "CUIs": "C0028259"}])
        table(folder / f"{split}_concepts_manual.csv", [{"ID": ids[0], "CUIs": "C1306645;C0817096;C1996865"}, {"ID": ids[1], "CUIs": ""}])
        for i in ids:
            paint(folder / split / f"{i}.jpg")
    return folder


REPORT = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="CXR{n}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="INDICATION"/>
<AbstractText Label="FINDINGS">{findings}</AbstractText><AbstractText Label="IMPRESSION">Normal chest x-XXXX.</AbstractText>
</Abstract></Article></MedlineCitation><MeSH><major>Nodule/lung</major><major>Opacity</major><automatic>nodules</automatic></MeSH>
{images}</eCitation>"""


def iu_report(n, *images, findings="Clear &amp; calm."):
    shown = "".join(f'<parentImage id="{i}"><figureId>F1</figureId><caption>Xray Chest PA and Lateral</caption></parentImage>' for i in images)
    return REPORT.format(n=n, findings=findings, images=shown)


def iu_folder(folder):
    reports = _made(folder / "ecgen-radiology")
    for n, images in ((10, ["CXR10_IM-0002-1001"]), (2, ["CXR2_1_IM-0001-3001", "CXR2_1_IM-0001-4001"]), (3, [])):
        (reports / f"{n}.xml").write_text(iu_report(n, *images), encoding="utf-8")
        for i in images:
            paint(folder / "NLMCXR_png" / f"{i}.png")
    return folder


FOLDERS = {
    "path_vqa": path_vqa_folder, "pmc_vqa": pmc_folder, "kvasir_vqa_x1": kvasir_folder, "gemex": gemex_folder, "roco": roco_second, "iu_xray": iu_folder,
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_each_is_known_by_its_layout_alone_and_its_samples_are_told_apart(tmp_path, name):
    folder = FOLDERS[name](tmp_path / "somewhere")
    adapters = parts.every("datasets", "DATASET")
    assert [n for n, a in adapters.items() if a.here(folder)] == [name]
    data, adapter = open_data(folder), adapters[name]
    assert list(data.folders) == [name] and adapter.source and adapter.licence
    found = data.samples(*adapter.splits)
    assert len(found) == len({s.id for s in found}) > 0 and {s.meta["split"] for s in found} == set(adapter.splits)
    assert all(s.meta["dataset"] == name and s.meta["row"] and s.meta["modality"] in manifest.MODALITIES for s in found)
    assert all(list(adapter.samples(folder, split)) == [] for split in {"train", "val", "test"} - set(adapter.splits))
    for s in found:
        assert all(len(p) in (1, 3) and p.shape[1:] == i.shape[1:] == (6, 8) for p, i in zip(pixels(s), s.images.values()))


@pytest.mark.parametrize("name", FOLDERS)
def test_the_fingerprint_tells_other_questions(tmp_path, name):
    one, two = (open_data(FOLDERS[name](tmp_path / n)) for n in "ab")
    assert one.fingerprint == two.fingerprint
    ((folder, adapter),) = two.folders.values()
    files = [f for q in adapter.questions for f in folder.glob(q)]
    assert files
    files[0].write_bytes(files[0].read_bytes() + b" ")
    assert one.fingerprint != two.fingerprint


def same(a, b):
    for name in ("id", "patient", "turns", "masks", "regions", "labels", "choices", "group", "verb", "meta"):
        assert getattr(a, name) == getattr(b, name), name
    assert list(a.images) == list(b.images)
    for x, y in zip(a.images.values(), b.images.values()):
        assert np.array_equal(x.pixels, y.pixels)
        for name in ("id", "modality", "unit", "spacing", "origin"):
            assert getattr(x, name) == getattr(y, name), name
        assert {k: v for k, v in x.info.items() if k != "file"} == y.info


def test_a_sample_is_what_the_same_line_of_a_manifest_gives(tmp_path):
    folder = pmc_folder(tmp_path / "pmc")
    choices = ["Diffuse", "Focal", "None of them", "A: odd"]
    asked = {"type": "SINGLE", "choices": choices, "caption": "PET, axial"}
    row = {"id": "PMC11_F1", "image": "images_2/figures/PMC11_F1.jpg", "modality": "unknown", "split": "train", "version": 2, "article": "PMC11", "qa": [
        {"qid": "train-0", "question": "What is the uptake?", "answer": "Focal", **asked},
        {"qid": "train-2", "question": "And here?", "answer": "A: odd", **asked}]}  # fmt: skip
    lines(folder / "manifest.jsonl", [row])
    for mine, theirs in zip(list(pmc_vqa.DATASET.samples(folder, "train")), manifest.samples(folder)):
        same(mine, theirs)
    folder = kvasir_folder(tmp_path / "kvasir")  # a colour picture of a known modality
    row = {"id": "cl1", "image": "images/cl1.jpg", "modality": "endoscopy", "split": "test", "organ": "gastrointestinal tract",
           "qa": [{"qid": "test-0", "question": "Which procedure?", "answer": "Colonoscopy."}]}  # fmt: skip
    lines(folder / "manifest.jsonl", [row])
    (mine,), (theirs,) = kvasir_vqa_x1.DATASET.samples(folder, "test"), manifest.samples(folder)
    same(mine, theirs)


def test_pictures_are_opened_when_they_are_used_and_errors_keep_their_names(tmp_path):
    folder = kvasir_folder(tmp_path)
    whole = (folder / "images/cl1.jpg").read_bytes()
    (folder / "images/cl1.jpg").write_bytes(whole[:-40])
    (sample,) = kvasir_vqa_x1.DATASET.samples(folder, "test")
    with pytest.raises(ModelError, match=r"test.jsonl record 0: its image cannot be read \(TRUNCATED\)") as error:
        pixels(sample)
    assert error.value.code == "BAD_DATASET" and "cl1" not in str(error.value)
    (folder / "images/cl1.jpg").write_bytes(whole)
    assert pixels(sample)[0].shape == (3, 6, 8)
    for content, code in ((b"GIF89a and so on", "UNKNOWN_FORMAT"), (b"", "TRUNCATED")):  # what is no picture is refused at once
        (folder / "images/cl1.jpg").write_bytes(content)
        with pytest.raises(ModelError, match=rf"record 0: its picture cannot be read \({code}\)"):
            list(kvasir_vqa_x1.DATASET.samples(folder, "test"))


def test_path_vqa(tmp_path):
    folder = path_vqa_folder(tmp_path)
    train = list(path_vqa.DATASET.samples(folder, "train"))
    assert [(s.id, s.question, s.answer, s.meta["type"], s.meta["row"]) for s in train] == [
        ("train_0001-0", "Is it benign?", "yes", "CLOSED", "train_0001"), ("train_0001-1", "where is it?", "in the wall", "OPEN", "train_0001"),
        ("train_0002-0", "What is shown?", "liver", "OPEN", "train_0002")]  # fmt: skip
    assert train[0].images is train[1].images and train[0].choices == ("yes", "no") and train[2].choices is None
    assert next(iter(train[0].images.values())).modality == "pathology"
    assert [s.meta["type"] for s in open_data(folder).samples("val", "test")] == ["CLOSED", "CLOSED"]
    assert path_vqa.DATASET.here(folder / "pvqa") and len(list(path_vqa.DATASET.samples(folder / "pvqa", "train"))) == 3  # the folder itself


class Trap:
    def __reduce__(self):
        return Path.touch, (Path(self.file),)


def test_a_pickle_runs_nothing(tmp_path):
    folder, trap = path_vqa_folder(tmp_path), Trap()
    trap.file = str(tmp_path / "ran")
    file = folder / "pvqa/qas/test/test_qa.pkl"
    for content in (pickle.dumps([trap]), b"nothing of the kind", pickle.dumps(({"image": "a"},))):
        file.write_bytes(content)
        with pytest.raises(ModelError, match="test_qa.pkl (is no pickle of plain records|holds tuple)") as error:
            list(path_vqa.DATASET.samples(folder, "test"))
        assert error.value.code == "BAD_DATASET"
    assert not (tmp_path / "ran").exists()
    file.write_bytes(pickle.dumps([{"image": "../../secret", "question": "?", "answer": "yes"}]))
    with pytest.raises(ModelError, match="record 0: the picture of field 'image'"):
        list(path_vqa.DATASET.samples(folder, "test"))


def stored(tmp_path, *shades):
    """{"bytes", "path"} of pictures, as Hugging Face stores them."""
    found = []
    for shade in shades:
        Picture.fromarray(np.full((6, 8), shade, np.uint8)).save(tmp_path / "one.png")
        found.append({"bytes": (tmp_path / "one.png").read_bytes(), "path": None})
    return found


def test_path_vqa_from_parquet_files(tmp_path):
    black, grey = stored(tmp_path, 0, 128)
    folder = tmp_path / "datasets--flaviagiammarino--path-vqa" / "snapshots" / "0af1"
    first = [{"image": black, "question": "Is it?", "answer": "yes"}, {"image": grey, "question": "What?", "answer": "liver"}]
    parquet(folder / "data/train-00000-of-00002.parquet", [*first, {"image": black, "question": "Where? ", "answer": "here"}])
    parquet(folder / "data/train-00001-of-00002.parquet", [{"image": grey, "question": "How?", "answer": "so"}])
    parquet(folder / "data/validation-00000-of-00001.parquet", first[:1])
    data = open_data(folder)
    assert list(data.folders) == ["path_vqa"]
    train, val = data.samples("train"), data.samples("val")
    assert [(s.id, s.question, s.meta["row"]) for s in train] == [
        ("train-0-0", "Is it?", "train-0"), ("train-0-1", "Where?", "train-0"), ("train-1-0", "What?", "train-1"), ("train-1-1", "How?", "train-1")]  # fmt: skip
    assert [s.id for s in val] == ["val-0-0"] and data.samples("test") == []
    image = next(iter(train[2].images.values()))
    assert train[0].images is train[1].images and image.id == "pathology-1" and image.shape == (1, 6, 8) and image.dtype == np.uint8
    assert (image.pixels == 128).all() and (pixels(train[0])[0] == 0).all()
    image.release()
    assert (image.pixels == 128).all()
    whole = data.fingerprint
    parquet(folder / "data/validation-00000-of-00001.parquet", first[1:])
    assert data.fingerprint != whole
    elsewhere = folder.parent.rename(tmp_path / "anything") / "0af1"  # nothing says that it is PathVQA
    assert not any(a.here(elsewhere) for a in parts.every("datasets", "DATASET").values())


def test_broken_parquet_files_are_named(tmp_path, monkeypatch):
    (black,) = stored(tmp_path, 0)
    file = tmp_path / "path-vqa" / "data" / "test-00000-of-00001.parquet"
    whole = {"image": black, "question": "?", "answer": "yes"}
    for records, words in (
        ([whole, {**whole, "question": None}], r"test-00000-of-00001.parquet record 1: field 'question' is NoneType"),
        ([{"question": "?", "answer": "yes"}], "record 0: field 'image' is missing"),
        ([whole, whole, {**whole, "image": {"bytes": None, "path": "secret.jpg"}}], "record 2: field 'image' holds no picture"),
        ([{**whole, "image": {"bytes": b"GIF89a", "path": None}}], r"record 0: its picture cannot be read \(UNKNOWN_FORMAT\)"),
    ):
        parquet(file, records)
        with pytest.raises(ModelError, match=words) as error:
            list(path_vqa.DATASET.samples(tmp_path / "path-vqa", "test"))
        assert error.value.code == "BAD_DATASET" and "secret" not in str(error.value)
    parquet(file, [{**whole, "image": {"bytes": black["bytes"][:-20], "path": None}}])
    (sample,) = path_vqa.DATASET.samples(tmp_path / "path-vqa", "test")
    with pytest.raises(ModelError, match=r"record 0: its picture cannot be read \(TRUNCATED\)"):
        pixels(sample)
    file.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ModelError, match="cannot be read as Parquet"):
        list(path_vqa.DATASET.samples(tmp_path / "path-vqa", "test"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModelError, match="need pyarrow") as error:
        list(path_vqa.DATASET.samples(tmp_path / "path-vqa", "test"))
    assert error.value.code == "MISSING_EXTRA"


def test_pmc_vqa(tmp_path):
    first = pmc_folder(tmp_path / "first", 1)
    table(first / "test_clean.csv", [pmc_record("PMC13_F2.jpg", "C", 1)])
    clean, other = pmc_vqa.DATASET.samples(first, "test")
    assert clean.meta["category"] == ["test_clean"] and "category" not in other.meta and clean.meta["version"] == 1 and clean.meta["article"] == "PMC13"
    assert clean.choices == ("Diffuse", "Focal", "None of them", "A: odd") and (clean.answer, other.answer) == ("None of them", "Focal")
    assert [s.id for s in pmc_vqa.DATASET.samples(first, "train")] == ["train-0", "train-2", "train-1"]  # figure by figure
    pmc_folder(first, 2)  # both versions lie there: one of them is read
    assert {s.meta["version"] for s in open_data(first).samples("train", "test")} == {2}
    samples = vqa.prepare(open_data(first).scored, "test")
    scores = {s.name: s for s in vqa.score(samples, [Prediction(s.id, s.answer) for s in samples])}
    assert scores["single-choice accuracy"].value == 1 and scores["single-choice accuracy"].n == 2 and scores["single-choice accuracy"].chance == 0.25


@pytest.mark.parametrize(
    "change, words",
    [
        ({"Answer": "E"}, r"train_2.csv record 1: field 'Answer' names no choice"),
        ({"Answer": "A", "Choice A": " A: "}, r"record 1: field 'Answer' names no choice"),
        ({"Figure_path": "PMC99_secret.jpg"}, r"record 1: the picture of field 'Figure_path' is not in the folder"),
        ({"Figure_path": "../../secret.jpg"}, r"record 1: the picture of field 'Figure_path'"),
    ],
)
def test_broken_records_of_a_table_are_named_and_not_quoted(tmp_path, change, words):
    folder = pmc_folder(tmp_path, records=[pmc_record("PMC11_F1.jpg"), pmc_record("PMC12_F1.jpg", **change)])
    with pytest.raises(ModelError, match=words) as error:
        list(pmc_vqa.DATASET.samples(folder, "train"))
    assert error.value.code == "BAD_DATASET" and "secret" not in str(error.value)


def test_broken_tables_are_named(tmp_path):
    folder = pmc_folder(tmp_path)
    head = (folder / "train_2.csv").read_bytes().splitlines()[0]
    for content, words in (
        (b"Figure_path,Question\na.jpg,b\n", "train_2.csv record 0: field 'Choice A' is missing"),
        (head + b"\n7,PMC11_F1.jpg\n", "record 0: field 'Question' is NoneType"),
        (head + b"\n7,\xff", "is not CSV in UTF-8"), (head + b'\n7,"open', "is not CSV in UTF-8"),
    ):  # fmt: skip
        (folder / "train_2.csv").write_bytes(content)
        with pytest.raises(ModelError, match=words) as error:
            list(pmc_vqa.DATASET.samples(folder, "train"))
        assert error.value.code == "BAD_DATASET"


def test_kvasir_vqa_x1(tmp_path):
    folder = kvasir_folder(tmp_path / "Kvasir-VQA-x1")
    train, (test,) = list(kvasir_vqa_x1.DATASET.samples(folder, "train")), kvasir_vqa_x1.DATASET.samples(folder, "test")
    assert [(s.id, s.question, s.answer) for s in train] == [
        ("train-0", "Is there a polyp?", "A polyp is seen."), ("train-2", "How many?", "One."), ("train-1", "Is there a polyp?", "A polyp is seen.")]  # fmt: skip
    assert test.meta["row"] == train[0].meta["row"] == "cl1" and test.meta["organ"] == "gastrointestinal tract"
    told = {"complexity": 2, "question_class": ["polyp_type", "polyp_count"], "original": '[{"q": 1}]', "image": "https://x/cl2.jpg"}
    parquet(folder / "data/test-00000-of-00001.parquet", [{"img_id": "cl2", "question": "Is it?", "answer": "It is.", **told}])
    (test,) = kvasir_vqa_x1.DATASET.samples(folder, "test")  # the fuller of the two
    assert {"category": ["polyp_type", "polyp_count"], "complexity": 2, "original": '[{"q": 1}]', "row": "cl2"}.items() <= test.meta.items()
    for broken in ({"images": []}, {"messages": "hi"}, {"messages": [1, 2]}, {"images": [7]}):
        lines(folder / "Kvasir-VQA-x1-train.jsonl", [kvasir_line("cl1"), kvasir_line("cl1") | broken])
        with pytest.raises(ModelError, match="train.jsonl record 1: fields 'messages' and 'images'"):
            list(kvasir_vqa_x1.DATASET.samples(folder, "train"))
    (folder / "Kvasir-VQA-x1-train.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(ModelError, match="is not JSON lines in UTF-8"):
        list(kvasir_vqa_x1.DATASET.samples(folder, "train"))


def test_gemex(tmp_path):
    folder = gemex_folder(tmp_path)
    by = {s.id: s for s in gemex.DATASET.samples(folder, "train")}
    assert [(i, s.answer, s.meta["type"], s.choices) for i, s in by.items()] == [
        ("open_ended_1", "A nodule.", "OPEN", None), ("closed_ended_1", "Yes", "CLOSED", ("yes", "no")),
        ("single_choice_1", "Fracture", "SINGLE", ("Effusion", "Nodule", "Fracture")), ("multi_choice_1", "A, C", "MULTIPLE", None),
        ("closed_ended_2", "No", "CLOSED", ("yes", "no"))]  # fmt: skip
    several = by["multi_choice_1"]
    assert several.question == "What is seen?\nA: Effusion\nB: Nodule\nC: Fracture" and several.patient == "10046166" and several.meta["study"] == "50051329"
    about = {"category": ["finding"], "visual_regions": ["left lung"], "visual_locations": [[1, 2, 3, 4]], "reason": "seen", "row": "abea5eb9-1"}
    assert about.items() <= several.meta.items() and several.regions == () and by["closed_ended_2"].patient == "11000001"
    samples = vqa.prepare(open_data(folder).scored, "train")
    scores = {s.name: s for s in vqa.score(samples, [Prediction(s.id, s.answer) for s in samples])}
    assert {n: scores[n].n for n in ("closed accuracy", "single-choice accuracy", "multiple-choice accuracy")} == {
        "closed accuracy": 2, "single-choice accuracy": 1, "multiple-choice accuracy": 1}  # fmt: skip
    assert all(scores[n].value == 1 for n in ("closed accuracy", "single-choice accuracy", "multiple-choice accuracy", "open exact match"))


@pytest.mark.parametrize(
    "kind, change, words",
    [
        ("single_choice", {"answer": "D"}, "field 'answer' names no choice"), ("single_choice", {"answer": ["A", "B"]}, "field 'answer' names no choice"),
        ("multi_choice", {"answer": None}, "field 'answer' names no choice"),
        ("multi_choice", {"choices": ["secret", "B: b"]}, "field 'choices' is no list of lettered"),
        ("single_choice", {"choices": None}, "field 'choices'"), ("closed_ended", {"answer": None}, "field 'answer' is NoneType"),
        ("open_ended", {"answer": ""}, "field 'answer' is empty"),
        ("open_ended", {"image_path": "files/secret.jpg"}, "the picture of field 'image_path'"),
    ],
)  # fmt: skip
def test_broken_records_of_gemex_are_named(tmp_path, kind, change, words):
    folder = gemex_folder(tmp_path)
    file = folder / f"{kind}_question.jsonl"
    lines(file, [json.loads(file.read_text().splitlines()[0]) | change])
    with pytest.raises(ModelError, match=f"{kind}_question.jsonl record 0: {words}") as error:
        list(gemex.DATASET.samples(folder, "train"))
    assert error.value.code == "BAD_DATASET" and "secret" not in str(error.value)


def test_the_first_roco(tmp_path):
    folder = roco_first(tmp_path)
    data = open_data(folder)
    assert list(data.folders) == ["roco"] and [s.id for s in data.samples("train", "val", "test")] == [f"ROCO_{i:05}" for i in (1, 2, 5, 6, 7, 8)]
    one, two = data.samples("val")
    assert (one.answer, one.question, two.answer) == ("Axial CT.", "", "Chest X-ray\twith a tab – and a dash.")
    assert one.meta["concepts"] == ["C0040405", "C0023884"] and two.meta["concepts"] == [] and one.meta["modality"] == "unknown"
    assert len(retrieve.prepare(data.scored, "test")) == 2
    inside = folder / "data/validation/radiology"
    (inside / "images/ROCO_00005.jpg").unlink()
    with pytest.warns(UserWarning, match="LEFT_OUT: 1 of 2 captions of ROCO's split val"):
        assert [s.id for s in roco.DATASET.samples(folder, "val")] == ["ROCO_00006"]
    (inside / "images/ROCO_00006.jpg").unlink()
    with pytest.raises(ModelError, match="radiology/images of validation holds no figure of captions.txt"):
        list(roco.DATASET.samples(folder, "val"))
    twice = "record 1 has the same id as captions.txt record 0"
    for content, words in (("ROCO_1\ta\nROCO_1\tb\n", twice), ("ROCO_1\ta\nno tab\n", "captions.txt record 1 is not a figure")):
        (inside / "captions.txt").write_text(content)
        with pytest.raises(ModelError, match=words):
            list(roco.DATASET.samples(folder, "val"))
    (inside / "captions.txt").write_bytes(b"ROCO_1\t\xff")
    with pytest.raises(ModelError, match="captions.txt is not a text in UTF-8"):
        list(roco.DATASET.samples(folder, "val"))


def test_the_second_roco(tmp_path):
    folder = roco_second(tmp_path)
    one, two = roco.DATASET.samples(folder, "val")
    assert one.id == one.meta["row"] == "ROCOv2_2023_valid_000001" and one.answer == '"Quoted", ROCOv2_2023_valid_000001'
    assert {"modality": "xray", "organ": "chest", "concepts": ["C1306645", "C0817096", "C1996865", "C0002940"], "split": "val"}.items() <= one.meta.items()
    assert two.meta["modality"] == "unknown" and "organ" not in two.meta and two.meta["concepts"] == ["C0028259"]
    assert next(iter(one.images.values())).modality == "xray" and len(retrieve.prepare(open_data(folder).scored, "test")) == 2
    for s in ("valid_concepts.csv", "valid_concepts_manual.csv"):
        (folder / s).unlink()
    assert [s.meta["concepts"] for s in roco.DATASET.samples(folder, "val")] == [[], []]
    (folder / "valid/ROCOv2_2023_valid_000002.jpg").unlink()
    with pytest.raises(ModelError, match="valid_captions.csv record 1: the picture of field 'ID' is not in the folder"):
        list(roco.DATASET.samples(folder, "val"))


def test_iu_xray(tmp_path):
    folder = iu_folder(tmp_path)
    data = open_data(folder)
    both, single = data.samples("train")  # 2 before 10; 3 has no picture
    assert [both.id, single.id] == ["CXR2", "CXR10"] and both.patient == "CXR2" and list(both.images) == ["xray-1", "xray-2"]
    assert both.answer == "FINDINGS: Clear & calm.\nIMPRESSION: Normal chest x-XXXX." and both.question == ""
    assert both.meta["sections"] == {"comparison": "None.", "findings": "Clear & calm.", "impression": "Normal chest x-XXXX."}
    assert both.meta["labels"] == {"mesh_major": ["Nodule/lung", "Opacity"], "mesh_auto": ["nodules"]} and both.meta["exam"] == "Xray Chest PA and Lateral"
    assert [i.modality for i in both.images.values()] == ["xray", "xray"] and [s.verb for s in report.prepare(data.scored, "train")] == ["report", "report"]
    with pytest.raises(ModelError, match="there are no samples of split 'test'") as error:
        data.scored("test")
    assert error.value.code == "NO_SAMPLES" and "--split train" in str(error.value)
    (folder / "ecgen-radiology").rename(_made(folder / "NLMCXR_reports") / "ecgen-radiology")  # unpacked another way
    assert [s.id for s in open_data(folder).samples("train")] == ["CXR2", "CXR10"]


@pytest.mark.parametrize(
    "content, words",
    [
        ('<!DOCTYPE x [<!ENTITY a "b">]><x/>', "ecgen-radiology/2.xml declares entities"), ("<x>", "2.xml is not XML"),
        ("<x/>", "2.xml: field 'uId' is missing"), (iu_report(2, "../secret"), "2.xml: the picture of field"),
        (iu_report(2, "secret"), "2.xml: the picture of field 'parentImage' is not in the folder"),
    ],
)  # fmt: skip
def test_broken_reports_are_named(tmp_path, content, words):
    folder = iu_folder(tmp_path)
    (folder / "ecgen-radiology/2.xml").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=words) as error:
        list(iu_xray.DATASET.samples(folder, "train"))
    assert error.value.code == "BAD_DATASET" and "secret" not in str(error.value)
