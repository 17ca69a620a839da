"""What is looked at before anything learns from data: bad rows by line, pixels, leaks between splits, splits by patient."""

import json
import time
from collections import Counter

import nibabel
import numpy as np
import pytest
from PIL import Image as Picture

from medvlm.datasets import checks, manifest
from medvlm.datasets.base import open_data
from medvlm.errors import ModelError, UsageError
from medvlm.imaging.scan import Image, Lazy
from medvlm.sample import Sample, Turn


def png(path, value, size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray(np.full(size, value, np.uint8)).save(path)


def row(id, **more):
    return {"id": id, "image": "a.png", "modality": "xray", "split": "train"} | more


def write(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "manifest.jsonl").write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows) + b"\n")
    return folder


def asked(qid="q", question="Is it?", answer="no"):
    return {"qid": qid, "question": question, "answer": answer}


@pytest.fixture
def folder(tmp_path):
    png(tmp_path / "set/a.png", 7)
    png(tmp_path / "set/small.png", 1, (5, 8))
    holes = np.ones((4, 5, 6), np.float32)
    holes[1, 2, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(holes, np.eye(4)), tmp_path / "set/holes.nii.gz")
    whole = (tmp_path / "set/a.png").read_bytes()
    (tmp_path / "set/cut.png").write_bytes(whole[: len(whole) - 20])
    return tmp_path / "set"


BAD = {
    "missing image": (row("x", image="no.png"), "NOT_FOUND", "of that name"),
    "cut image": (row("x", image="cut.png"), "TRUNCATED", "ends before"),
    "mask of another size": (row("x", mask={"type": "binary", "files": {"lung": "small.png"}}), "GRID_MISMATCH", "(5, 8)"),
    "missing mask": (row("x", mask={"type": "binary", "files": {"lung": "no.png"}}), "BAD_MANIFEST", "'lung'"),
    "empty text": (row("x", text=" \n"), "EMPTY_TEXT", "the text"),
    "no text": (row("x", text=""), "EMPTY_TEXT", "the text"),
    "empty answer": (row("x", qa=[asked("q1"), asked("q2", answer="  ")]), "EMPTY_TEXT", "answer of qa[1]"),
    "only a mark": (row("x", qa=[asked("q1", question="<|image:xray-1|> ")]), "EMPTY_TEXT", "question of qa[0]"),
    "duplicate id": (row("r0"), "BAD_MANIFEST", "'r0'"),
    "not JSON": (b'{"id": ', "BAD_MANIFEST", "not JSON"),
    "not UTF-8": (b'{"id": "\xff"}', "BAD_MANIFEST", "UTF-8"),
    "NaN pixels": (row("x", image="holes.nii.gz", modality="mr"), "NOT_FINITE", "1 of 120"),
}


@pytest.mark.parametrize("bad, code, said", BAD.values(), ids=BAD)
def test_what_is_bad_is_refused_with_its_line_or_left_out(folder, bad, code, said):
    data = open_data(write(folder, row("r0"), row("v", split="val"), bad, row("r1", text="fine")))
    with pytest.raises(ModelError) as e:
        list(data.groups("train", pixels=True))
    assert e.value.code == code and "line 3" in e.value.message and said in e.value.message and e.value.hint and ".png" not in e.value.message
    left: list[dict] = []
    groups = [[s.id for s in g] for g in data.groups("train", left, pixels=True)]
    assert groups[0] == ["r0"] and groups[-1] == ["r1"]
    assert groups[1:-1] in ([], [["q1"]], [["x"]])  # a blank text leaves what else the row holds
    (entry,) = left
    assert (entry["dataset"], entry["line"], entry["code"]) == ("set", 3, code) and said in entry["message"]
    assert entry["row"] == (None if isinstance(bad, bytes) else bad["id"])
    assert [s.id for g in data.groups("val", left) for s in g] == ["v"] and left == [entry]  # met again in val, listed once
    json.dumps(left)


def test_groups_are_rows_and_rows_without_a_split_are_asked_for(folder):
    qa = [asked("1"), asked("2")]
    lung = {"type": "binary", "files": {"lung": "a.png"}}
    data = open_data(write(folder, row("r0", qa=qa, text="words", mask=lung), {"id": "r1", "image": "a.png", "modality": "xray"}, row("r2", image=None, text="x"), row("r3", split="test")))
    groups = list(data.groups("train"))
    assert [[s.id for s in g] for g in groups] == [["1", "2", "r0/lung", "r0"], ["r2"]]
    assert {s.meta["row"] for s in groups[0]} == {"r0"} and {s.meta["dataset"] for g in groups for s in g} == {"set"}
    assert len({id(i) for s in groups[0] for i in s.images.values()}) == 1
    assert [s.id for g in data.groups(None) for s in g] == ["r1"] and not list(data.groups("val"))


def test_groups_of_several_sets_keep_their_ids(folder, tmp_path):
    png(tmp_path / "other/a.png", 1)
    write(folder, row("r0"))
    write(tmp_path / "other", row("r0", image="no.png"), row("r1"))
    left: list[dict] = []
    assert [(s.meta["dataset"], s.id) for g in open_data(tmp_path).groups("train", left) for s in g] == [("other", "r1"), ("set", "r0")]
    assert [(b["dataset"], b["line"]) for b in left] == [("other", 1)]


def test_groups_of_a_published_layout(tmp_path):
    names = ("synpic1.jpg", "synpic2.jpg")
    for name in names:
        png(tmp_path / "VQA_RAD Image Folder" / name, 9)
    record = {"phrase_type": "freeform", "image_organ": "CHEST", "answer_type": "CLOSED", "question_type": "PRES"}
    records = [record | {"qid": i, "image_name": names[i % 2], "question": "Is it?", "answer": " " if i == 2 else "yes"} for i in range(5)]
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps(records))
    data = open_data(tmp_path)
    with pytest.raises(ModelError) as e:
        list(data.groups("train"))
    assert e.value.code == "EMPTY_TEXT" and "'2'" in e.value.message
    left: list[dict] = []
    assert [[s.id for s in g] for g in data.groups("train", left, pixels=True)] == [["0", "4"], ["1", "3"]]
    assert [(b["dataset"], b["line"], b["row"], b["code"]) for b in left] == [("vqa_rad", None, "synpic1", "EMPTY_TEXT")]
    assert not list(data.groups("val"))


def test_touching_reads_each_image_once_and_names_what_is_wrong():
    reads = []

    def load():
        reads.append(1)
        return np.array([[[0, np.inf]]], np.float32)

    image = Image("ct-1", Lazy((1, 1, 2), np.float32, load))
    with pytest.raises(ModelError) as e:
        checks.touch([Sample("a", images={"ct-1": image}), Sample("b", images={"ct-1": image})], "manifest line 7")
    assert e.value.code == "NOT_FINITE" and "manifest line 7, image ct-1: 1 of 2" in e.value.message and len(reads) == 1
    checks.touch([Sample("a", images={"x": Image("x", np.full((1, 2, 2), 255, np.uint8))}), Sample("b")])


def sample(id, row=None, patient=None, value=None, dataset=None, origin=None):
    meta = {k: v for k, v in (("row", row), ("dataset", dataset)) if v}
    image = None if value is None else Image("xray-1", np.full((1, 4, 4), value, np.uint8))
    if image is not None:
        image.origin = origin
    return Sample(id, patient, {} if image is None else {"xray-1": image}, (Turn("assistant", "x"),), meta=meta)


def test_leaks_by_patient_image_and_id():
    train = [sample("a", "r1", "JANE DOE", 1), sample("b", "r1", "JANE DOE", 1), sample("c", "r2", "p2", 2), sample("d", "r3", None, 3)]
    clean = {"train": train, "val": iter([sample("e", "r4", "p4", 4), sample("f", "r5", None, 5)]), "test": []}
    assert checks.leaks(clean) == [] and checks.refuse_leaks({"train": train, "val": []}) is None
    val = [sample("e", "r4", "JANE DOE", 4), sample("f", "r5", "p5", 3), sample("c", "r6", "p6", 6)]
    found = checks.leaks({"train": train, "val": val})
    assert found == [
        checks.Leak("patient", ("train", "val"), ("r1", "r4")), checks.Leak("image", ("train", "val"), ("r3", "r5")),
        checks.Leak("id", ("train", "val"), ("r2", "r6")),
    ]  # fmt: skip
    assert checks.leaks({"train": [*train, sample("d", "r9")]}) == [checks.Leak("id", ("train",), ("r3", "r9"))]
    assert not checks.leaks({"train": [sample("x", "r1", value=1), sample("y", "r2", value=1)]})  # one picture twice in one split is none
    with pytest.raises(ModelError) as e:
        checks.refuse_leaks({"train": train, "val": val})
    said = e.value.message
    assert e.value.code == "LEAK" and "patients in two splits: 1, rows r1, r4 (train, val)" in said and "r3, r5" in said and "r2, r6" in said
    assert "JANE" not in str(e.value) and "--allow-leaks" in e.value.hint


def test_patients_and_ids_belong_to_their_set_and_pictures_do_not():
    one = [sample("1", "r1", "p", 1, "rad"), sample("2", "r2", "q", 2, "rad")]
    two = [sample("1", "r1", "p", 3, "slake"), sample("3", "r3", "s", 2, "slake")]
    assert checks.leaks({"train": one, "val": two}) == [checks.Leak("image", ("train", "val"), ("rad/r2", "slake/r3"))]


def test_a_thousand_files_are_hashed_in_two_seconds_and_none_is_decoded(tmp_path):
    for i in range(1000):
        (tmp_path / f"{i}.png").write_bytes(np.random.default_rng(i).bytes(20_000) if i != 999 else (tmp_path / "0.png").read_bytes())

    def never():
        raise AssertionError("decoded")

    def made(i):
        image = Image("xray-1", Lazy((1, 200, 100), np.uint8, never))
        image.origin = tmp_path / f"{i}.png"
        return Sample(f"s{i}", images={"xray-1": image}, meta={"row": f"r{i}"})

    before = time.process_time()
    found = checks.leaks({"train": [made(i) for i in range(900)], "val": [made(i) for i in range(900, 1000)]})
    assert [f.rows for f in found] == [("r0", "r999")]
    assert time.process_time() - before < 2


def test_digests_tell_halves_folders_and_names(tmp_path):
    png(tmp_path / "a.png", 1)
    png(tmp_path / "b/c/d.png", 1)
    png(tmp_path / "b/e.png", 2)
    (tmp_path / "x.hdr").write_bytes(b"same")
    (tmp_path / "x.IMG").write_bytes(b"one")
    (tmp_path / "y.z.hdr").write_bytes(b"same")
    (tmp_path / "y.z.img.gz").write_bytes(b"two")
    assert [p.name for p in checks.files_of(tmp_path / "x.hdr")] == [p.name for p in checks.files_of(tmp_path / "x.IMG")] == ["x.IMG", "x.hdr"]
    assert [p.name for p in checks.files_of(tmp_path / "y.z.hdr")] == ["y.z.hdr", "y.z.img.gz"] and checks.files_of(tmp_path / "no.png") == []
    assert [p.name for p in checks.files_of(tmp_path / "b")] == ["d.png", "e.png"]

    def of(path):
        image = Image("i", np.zeros((1, 1, 1)))
        image.origin = path
        return checks.digest(image)

    digests = [of(tmp_path / n) for n in ("a.png", "b", "x.hdr", "y.z.hdr")]
    assert len(set(digests)) == 4 and of(tmp_path / "b/c/d.png") == digests[0] and of("ab" * 32) == "ab" * 32
    held = [Image("i", a) for a in (np.zeros((1, 2, 3), np.uint8), np.zeros((1, 3, 2), np.uint8), np.zeros((1, 2, 3), np.int8))]
    assert len({checks.digest(i) for i in held}) == 3


def test_manifest_images_say_where_they_came_from(folder):
    (sample,) = manifest.samples(write(folder, row("r0")))
    assert next(iter(sample.images.values())).origin == folder / "a.png"


def test_pictures_of_published_layouts_are_told_apart_unopened(tmp_path):
    from medvlm.datasets.unopened import unopened

    (tmp_path / "a.png").write_bytes(b"no picture at all")
    (tmp_path / "b.nii.gz").write_bytes(b"no picture at all")
    first, second = unopened(tmp_path / "a.png", "x", "xray", "record 1"), unopened(tmp_path / "b.nii.gz", "y", "mr", "record 2")
    assert checks.digest(first) == checks.digest(second)
    with pytest.raises(ModelError):
        checks.touch([Sample("s", images={"x": first})])


def test_splits_by_patient_hold_a_patient_together_and_never_move():
    rows = [(f"r{i}", f"p{i // 3}" if i % 7 else None) for i in range(6000)]
    splits = {r: checks.split_by_patient(p, r, seed=3) for r, p in rows}
    of = {}
    for r, p in rows:
        if p:
            of.setdefault(p, set()).add(splits[r])
    assert all(len(s) == 1 for s in of.values()) and {splits[r] for r, p in rows if p is None} == {"train", "val", "test"}
    counts = Counter(splits.values())
    assert abs(counts["train"] / 6000 - 0.8) < 0.03 and abs(counts["val"] / 6000 - 0.1) < 0.02
    assert [checks.split_by_patient("p1", "a"), checks.split_by_patient("p2", "b"), checks.split_by_patient(None, "p1")] == [
        checks.split_by_patient("p1", "c"), checks.split_by_patient("p2", "d"), checks.split_by_patient("", "p1")]  # fmt: skip
    assert len({tuple(checks.split_by_patient(f"p{i}", "", seed=s) for i in range(50)) for s in range(5)}) == 5
    assert {checks.split_by_patient(f"p{i}", "", {"val": 1.0}) for i in range(20)} == {"val"}
    assert {checks.split_by_patient(f"p{i}", "", {"train": 0.5, "test": 0.5}) for i in range(20)} == {"train", "test"}


@pytest.mark.parametrize("shares", [{"train": 0.8}, {"train": 1.2, "val": -0.2}, {"train": float("nan")}, {"dev": 1.0}, {}])
def test_shares_that_are_no_parts_of_one(shares):
    with pytest.raises(UsageError) as e:
        checks.split_by_patient("p", "r", shares)
    assert e.value.code == "BAD_ARGUMENT"


@pytest.mark.parametrize("name", ["vqa_rad", "xray_covid", "qa_slake"])
def test_the_shared_sets_have_no_patient_in_two_splits(data, name):
    splits = {s: [x for r in manifest.rows(data / name, s) for x in manifest.row_samples(r | {"image": None, "mask": None, "boxes": None})] for s in ("train", "val", "test")}
    assert [leak for leak in checks.leaks(splits) if leak.kind == "patient"] == [] and all(splits.values())
    patients = {s.patient for s in splits["train"] if s.patient}
    if patients:  # and one that is moved is found
        moved = next(s for s in splits["train"] if s.patient)
        found = checks.leaks({**splits, "val": [*splits["val"], Sample("moved", moved.patient, meta={"row": "moved"})]})
        assert ("patient", "moved") in [(leak.kind, leak.rows[-1]) for leak in found]
