"""Data for training: shards read like manifests, bad rows named before a run or left out, leaks refused, mirror images, workers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import drawn
import numpy as np
import pytest
import tiny
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file

from medvlm.datasets import shards
from medvlm.errors import MedVLMError, ModelError
from medvlm.sample import Turn
from medvlm.train.batches import Batches, Cases, Room, Stream, loader, plan
from medvlm.train.corpus import Corpus
from medvlm.train.loop import train


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return drawn.write(tmp_path_factory.mktemp("data"))


def rows(root):
    return [json.loads(x) for x in (root / "drawn/manifest.jsonl").read_text().splitlines()]


@pytest.fixture
def spoiled(root, tmp_path):
    """A copy of the data whose manifest, or files, a test spoils: spoil(change) with change(rows, folder)."""
    shutil.copytree(root, tmp_path / "data")

    def spoil(change):
        found = rows(tmp_path / "data")
        change(found, tmp_path / "data/drawn")
        (tmp_path / "data/drawn/manifest.jsonl").write_text("\n".join(map(json.dumps, found)))
        return tmp_path / "data"

    return spoil


def run(data, out, recipe=drawn.RECIPE, **more):
    return train(recipe, data, out, device="cpu", precision="no", **more)


def _missing(found, folder):
    (folder / found[2]["image"]).unlink()


def _small_mask(found, folder):
    Pillow.fromarray(np.zeros((8, 8), bool)).save(folder / found[2]["mask"]["files"]["left_lung"])


def _blank(found, folder):
    found[2]["qa"][0]["question"] = "  "


def _twice(found, folder):
    found[2]["id"] = found[1]["id"]


def _nan(found, folder):
    import tifffile

    tifffile.imwrite(folder / "images/nan.tif", np.full((56, 64), np.nan, np.float32))
    found[2] |= {"image": "images/nan.tif", "mask": None}


BAD = [(_missing, "NOT_FOUND"), (_small_mask, "GRID_MISMATCH"), (_blank, "EMPTY_TEXT"), (_twice, "BAD_MANIFEST"), (_nan, "NOT_FINITE")]


@pytest.mark.parametrize(("change", "code"), BAD)
def test_what_is_bad_ends_a_run_before_it_starts_with_its_line_or_is_left_out_and_listed(spoiled, tmp_path, change, code):
    data = spoiled(change)
    with pytest.raises(MedVLMError) as e:
        run(data, tmp_path / "run")
    assert e.value.code == code and "line 3" in e.value.message, e.value.message
    assert not (tmp_path / "run/log.jsonl").exists()
    run(data, tmp_path / "skip", skip_bad=True)
    (left,) = [json.loads(x) for x in (tmp_path / "skip/skipped.jsonl").read_text().splitlines()]
    assert left["code"] == code and left["line"] == 3 and (tmp_path / "skip/model").exists()
    assert json.loads((tmp_path / "skip/recipe.json").read_text())["data"]["drawn"]["images"] == (8 if change is _blank else 7)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_patient_or_a_picture_in_two_splits_is_refused_unless_allowed(spoiled, tmp_path, sharded):
    def patient(found, folder):
        found[-1]["patient"] = found[0]["patient"]

    def picture(found, folder):
        shutil.copy(folder / found[0]["image"], folder / found[-1]["image"])

    for k, (change, what) in enumerate(((patient, "patients in two splits"), (picture, "pictures in two splits"))):
        data = spoiled(change)
        if sharded:
            shards.write(data / "drawn", tmp_path / f"shards{k}/drawn", quiet=True)
            data = tmp_path / f"shards{k}"
        with pytest.raises(MedVLMError) as e:
            run(data, tmp_path / f"run{k}")
        assert e.value.code == "LEAK" and what in e.value.message and "x0" in e.value.message and "--allow-leaks" in e.value.hint
        assert sharded or "drawn/x0 on line 1, drawn/x9 on line 10 (train, val)" in e.value.message
    run(data, tmp_path / "allowed", allow_leaks=True)


def test_test_and_other_sets_are_looked_at_for_leaks_too(spoiled, tmp_path):
    def tested(found, folder):
        found[-1] |= {"split": "test", "patient": found[0]["patient"]}

    data = spoiled(tested)
    with pytest.raises(MedVLMError) as e:
        run(data, tmp_path / "run")
    assert e.value.code == "LEAK" and "patients in two splits: 1" in e.value.message and "(train, test)" in e.value.message
    data = spoiled(lambda found, folder: found[-1].update(patient="p9"))
    shutil.copytree(data / "drawn", data / "other")
    lines = rows(data)
    (data / "other/manifest.jsonl").write_text("\n".join(json.dumps(r | {"split": "val" if r["split"] == "train" else "test"}) for r in lines))
    both = replace(drawn.RECIPE, stages=(replace(drawn.RECIPE.stages[0], data={"drawn": 1.0, "other": 1.0}),))
    with pytest.raises(MedVLMError) as e:
        run(data, tmp_path / "both", both)
    assert e.value.code == "LEAK" and "pictures in two splits" in e.value.message and "patients" not in e.value.message  # another set's patients are others


def test_what_a_worker_meets_keeps_its_name(root):
    class Broken:
        bad = None

        def __len__(self):
            return 1

        def reader(self, seed, part):
            def at(position):
                raise ModelError("it went wrong", "BAD_DATASET", "mend it")

            return at

    batches = Batches(replace(drawn.RECIPE.stages[0], steps=2), (0, 0), {"drawn": Broken()}, tiny.tokenizer(), 0)
    for workers in (0, 1):
        with pytest.raises(MedVLMError) as e:
            list(loader(batches, workers))
        assert (e.value.code, e.value.hint) == ("BAD_DATASET", "mend it")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_bad_in_shards_is_listed_once_whoever_meets_it(spoiled, tmp_path, workers):
    def endless(found, folder):
        found[2]["qa"][0]["question"] = "where " * 3000

    shards.write(spoiled(endless) / "drawn", tmp_path / "shards/drawn", entries=3, quiet=True)
    recipe = replace(drawn.RECIPE, stages=(replace(drawn.RECIPE.stages[0], steps=12, batch=3),))
    with pytest.raises(MedVLMError) as e:
        run(tmp_path / "shards", tmp_path / "run", recipe, workers=workers)
    assert e.value.code == "QUESTION_TOO_LONG"
    run(tmp_path / "shards", tmp_path / "skip", recipe, workers=workers, skip_bad=True)
    (left,) = [json.loads(x) for x in (tmp_path / "skip/skipped.jsonl").read_text().splitlines()]
    assert left["code"] == "QUESTION_TOO_LONG" and left["dataset"] == "drawn" and left["row"]


def test_shards_with_less_than_a_row_a_reader_are_refused():
    stream = Stream("few", lambda epoch, part, skip: iter(()), 3, lambda epoch, part: 0, lambda group: [])
    with pytest.raises(MedVLMError) as e:
        stream.reader((0,), (3, 4))(0)
    assert e.value.code == "BAD_DATASET" and "3 rows" in e.value.message and "4 readers" in e.value.message


def test_a_root_or_a_set_that_is_not_there(root, tmp_path):
    for data, recipe in ((tmp_path / "nowhere", drawn.RECIPE), (root, replace(drawn.RECIPE, stages=(replace(drawn.RECIPE.stages[0], data={"other": 1.0}),)))):
        with pytest.raises(MedVLMError) as e:
            run(data, tmp_path / "run", recipe)
        assert e.value.code == "NO_SUCH_DATA"


def test_shards_are_streamed_once_an_epoch_by_all_readers_and_from_anywhere(root, tmp_path):
    shards.write(root / "drawn", tmp_path / "data/drawn", entries=3, quiet=True)
    recipe = replace(drawn.RECIPE, stages=(replace(drawn.RECIPE.stages[0], steps=8, batch=2, augment=0.0),))
    corpus = Corpus(recipe, tmp_path / "data")
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer)
    sources = corpus.sources(model, tokenizer, 0)
    assert isinstance(sources["drawn"], Stream) and len(sources["drawn"]) == 8

    def seen(start=0, rank=0, world=1):
        return [[b.images["picture"].double().sum((1, 2, 3)).tolist() for b in step] for step in Batches(recipe.stages[0], (0, 0), sources, tokenizer, start, rank, world)]

    flat = lambda steps: sorted(round(x, 6) for step in steps for part in step for x in part)  # noqa: E731
    whole = seen()
    assert len(whole) == 8 and flat(whole[:4]) == flat(whole[4:]) and len(set(flat(whole[:4]))) == 8  # two epochs, each image once in both
    assert whole[:4] != whole[4:]
    for start in (1, 3, 5, 7):
        assert seen(start) == whole[start:]
    both = [seen(rank=r, world=2) for r in range(2)]
    assert flat(both[0] + both[1]) == flat(whole) and flat(both[0][:4] + both[1][:4]) == flat(whole[:4])


def test_a_run_on_shards_resumes_like_any_other(root, tmp_path):
    shards.write(root / "drawn", tmp_path / "data/drawn", entries=3, quiet=True)
    run(tmp_path / "data", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt), drawn.stopped_at(3):
        run(tmp_path / "data", tmp_path / "run")
    run(tmp_path / "data", tmp_path / "run", resume=True)
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (tmp_path / "whole/model/model.safetensors").read_bytes()


def test_worker_processes_make_the_same_batches(root, tmp_path):
    run(root, tmp_path / "here")
    run(root, tmp_path / "workers", workers=2)
    ours, theirs = (load_file(tmp_path / n / "model/model.safetensors") for n in ("here", "workers"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_the_mixture_is_drawn_by_weight_and_each_image_once_an_epoch(root):
    picks = [p for step, _ in zip(plan({"a": 3.0, "b": 1.0}, 8, (0, 0)), range(300)) for p in step]
    share = sum(name == "a" for name, _ in picks) / len(picks)
    assert abs(share - 0.75) < 0.03 and [k for name, k in picks if name == "b"] == list(range(sum(name == "b" for name, _ in picks)))
    cases = Cases("x", [[i] for i in range(5)], lambda group: [type("C", (), {"turns": group, "pictures": {1: 1}, "size": 1})()], Room(10**9))
    read = cases.reader((0, 0), (0, 1))
    order = [read(k)[0].turns[0] for k in range(20)]
    assert all(sorted(order[e : e + 5]) == list(range(5)) for e in range(0, 20, 5)) and order[:5] != order[5:10]


def test_prepared_images_make_room_for_one_another():
    made = []

    def make(group):
        made.append(group[0])
        return [type("C", (), {"turns": [1], "pictures": {}, "size": 10})()]

    room = Room(30)
    cases = Cases("x", [[i] for i in range(6)], make, room)
    assert made == list(range(6)) and room.held <= 30
    assert cases[5] and made == list(range(6)) and cases[0] and made[-1] == 0 and room.held <= 30


def test_sets_share_one_room():
    """What one set leaves free another may take, and each gives up its own oldest."""
    make = lambda group: [type("C", (), {"turns": [1], "pictures": {}, "size": 10})()]  # noqa: E731
    room = Room(50)
    few, many = (Cases(n, [[i] for i in range(k)], make, room) for n, k in (("few", 1), ("many", 9)))
    assert (len(few.kept), len(many.kept), room.held) == (1, 4, 50)


def test_mirror_images_are_drawn_with_their_words_exchanged(root, tmp_path):
    """With flip=1 every case drawn is a twin: the mask named "right lung" lies where the left one was drawn."""
    stage = replace(drawn.RECIPE.stages[0], steps=6, batch=4, flip=1.0, augment=0.0, turns=8, kinds={"segment": 1.0, "asked": 0.0, "finding": 0.0, "report": 0.0})
    recipe = replace(drawn.RECIPE, stages=(stage,))
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer)
    sources = Corpus(recipe, root).sources(model, tokenizer, 0)
    columns = torch.arange(64.0)
    checked = {1.0: 0, 0.0: 0}
    for flip in (1.0, 0.0):
        for parts in Batches(replace(stage, flip=flip), (0, 0), sources, tokenizer, 0):
            (batch,) = parts
            dark = 1 - batch.images["picture"][:, 0]
            for mask, label, present, (_, k) in zip(batch.targets["mask"], batch.targets["label"], batch.targets["present"], batch.seg_image):
                name = tiny.TARGETS[label]
                if present and name in ("right lung", "left lung"):
                    centre = float((mask.sum(0) * columns).sum() / mask.sum())
                    assert (centre < 32) == (name == "right lung")  # the patient's right is on the picture's left, mirrored or not
                    assert float((dark[k] * mask).sum() / mask.sum()) > float(dark[k].mean())  # and it lies on a lung
                    checked[flip] += 1
                if present and name == "consolidation":
                    centre = float((mask.sum(0) * columns).sum() / mask.sum())
                    assert (centre < 32) == (flip == 0.0)  # drawn in the right lung, so in a twin's left one
    assert min(checked.values()) > 15


def test_what_a_mirror_would_make_untrue_has_no_twin(root, tmp_path, capsys):
    def samples(group, name, split):
        for s in drawn.samples(group, name, split):
            yield replace(s, turns=(Turn("user", "Is there dextrocardia?"), Turn("assistant", "no")), masks=()) if s.meta["kind"] == "finding" else s

    recipe = replace(drawn.RECIPE, samples=samples, stages=(replace(drawn.RECIPE.stages[0], steps=1, flip=0.5),))
    corpus = Corpus(recipe, root)
    tokenizer = tiny.tokenizer()
    corpus.sources(tiny.model(tokenizer), tokenizer, 0)
    assert corpus.no_twin == 8


def test_a_look_at_val_takes_some_cases_of_each_set(root, monkeypatch):
    """Of a set with many, the same some at every look; the loop says how many."""
    from medvlm.train import loop, objectives

    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer)
    corpus = Corpus(drawn.RECIPE, root)
    sources, val = corpus.sources(model, tokenizer, 0), corpus.val(model, tokenizer)
    stage = drawn.RECIPE.stages[0]
    look = lambda: loop._Stage(stage, 0, 0, None, model, objectives.find(stage.objective), tokenizer, sources, val, None, None, None).val  # noqa: E731
    every = look()
    monkeypatch.setattr(loop, "VAL_CASES", 1)
    some = look()
    of = {name: [id(c) for c in val[name].all()] for name in stage.data}
    assert len(every) == sum(map(len, of.values())) > len(some) == sum(min(1, len(c)) for c in of.values())
    assert [id(c) for c in some] == [id(c) for c in look()] and {id(c) for c in some} <= {id(c) for c in every}


def test_of_val_shards_no_more_is_held_than_a_look_takes_in(tmp_path, monkeypatch):
    drawn.write(tmp_path / "plain", 12)
    lines = [r | {"split": "val" if i % 4 else "train"} for i, r in enumerate(rows(tmp_path / "plain"))]
    (tmp_path / "plain/drawn/manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shards.write(tmp_path / "plain/drawn", tmp_path / "data/drawn", quiet=True)
    monkeypatch.setattr("medvlm.train.corpus.VAL_IMAGES", 3)
    assert len(Corpus(drawn.RECIPE, tmp_path / "data").held["drawn"]["val"]) == 3
    assert len(Corpus(drawn.RECIPE, tmp_path / "plain").held["drawn"]["val"]) == 9


def test_processes_hold_as_many_cases_though_some_images_are_bad(root):
    """Of shards that are read as the steps go a bad one is made good by another of the step, the same whoever asks again."""
    tokenizer = tiny.tokenizer()
    corpus = Corpus(drawn.RECIPE, root)
    good = corpus.sources(tiny.model(tokenizer), tokenizer, 0)["drawn"]

    class Holed:
        bad: list = []

        def __len__(self):
            return 8

        def reader(self, seed, part):
            real = good.reader(seed, part)
            return lambda position: [] if position % 3 == 0 else real(position)

    stage = replace(drawn.RECIPE.stages[0], steps=4, batch=6)
    found = [[len(p.images["picture"]) for step in Batches(stage, (0, 0), {"drawn": Holed()}, tokenizer, 0, r, 2) for p in step] for r in range(2)]
    assert found == [[3, 3, 3, 3]] * 2
    whole, late = (list(Batches(stage, (0, 0), {"drawn": Holed()}, tokenizer, start)) for start in (0, 2))
    assert all(torch.equal(a[0].images["picture"], b[0].images["picture"]) for a, b in zip(whole[2:], late))
