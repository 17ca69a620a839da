"""Made data of shapes and words: what is written is well formed, the words say what was drawn, and they tell nothing by themselves."""

import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from medvlm import parts
from medvlm.datasets import manifest, pairs, shapes
from medvlm.datasets.base import open_data
from medvlm.datasets.checks import refuse_leaks
from medvlm.errors import UsageError
from medvlm.evaluate import blind, probe, vqa
from medvlm.evaluate.run import plan
from medvlm.evaluate.statistics import auroc
from medvlm.imaging.scan import Volume
from medvlm.sample import Prediction, box_of

COUNT = {2: 168, 3: 42}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return {2: shapes.write(folder / "flat", COUNT[2], 2, size=(60, 72)), 3: shapes.write(folder / "deep", COUNT[3], 3, size=(16, 48, 56))}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    return {rank: shapes.write(folder / str(rank), 28, rank, size=size) for rank, size in ((2, (48, 48)), (3, (12, 48, 48)))}


@pytest.fixture(scope="module", params=(2, 3), ids=("pictures", "volumes"))
def made(request, folders):
    """(rank, folder, [(row, image, {shape: mask})])."""
    folder, found = folders[request.param], []
    for row in manifest.rows(folder):
        (image,) = manifest.open_images(row)
        found.append((row, image, {m.label: m.array for m in manifest.read_masks(row, image)}))
    return request.param, folder, found


def test_rows_are_samples(made):
    rank, folder, found = made
    assert len(found) == COUNT[rank] and all(row["synthetic"] is True for row, _, _ in found)
    samples = list(manifest.samples(folder))
    assert len({s.id for s in samples}) == len(samples) == sum(len(row["qa"]) + len(shapes.SHAPES) + 1 for row, _, _ in found)
    for row, image, masks in found:
        assert isinstance(image, Volume) == (rank == 3) and image.modality == row["modality"] == {2: "xray", 3: "ct"}[rank]
        assert not image.info["warnings"] and tuple(masks) == shapes.SHAPES and ("boxes" in row) == (rank == 2)
        pixels = image.voxels if rank == 3 else image.pixels
        assert pixels.std() > 0 and (image.unit, pixels.min() >= -300, pixels.max() <= 300) == ({2: "uint8", 3: "HU"}[rank], True, True)
    grids = {image.shape[1:] for _, image, _ in found}
    assert grids == {(60, 72)} if rank == 2 else len(grids) > 1  # volumes are stored along other axes


def test_masks_findings_and_boxes_agree(made):
    rank, _, found = made
    for row, _, masks in found:
        assert row["findings"] == {s: int(m.any()) for s, m in masks.items()} and 1 <= len(row["objects"]) <= 4
        left = {s: m.copy() for s, m in masks.items()}
        for o in row["objects"]:
            place = tuple(slice(a, b) for a, b in zip(o["lower"], o["upper"]))
            assert box_of(left[o["shape"]][place]) == ((0,) * rank, tuple(b - a for a, b in zip(o["lower"], o["upper"])))
            left[o["shape"]][place] = False
        assert not any(m.any() for m in left.values())  # nothing outside the boxes
        if rank == 2:
            assert [(b["label"], b["xyxy"]) for b in row["boxes"]] == [(o["shape"], o["lower"][::-1] + o["upper"][::-1]) for o in row["objects"]]


def words_of(image, mask):
    """Side and zone of every place of a mask, from geometry alone: {(side, zone)}."""
    at = np.argwhere(mask)
    if isinstance(image, Volume):
        corners = image.world(np.array([(0, 0, 0), np.array(image.shape[1:]) - 1]))
        low, high = corners.min(0), corners.max(0)
        step = np.abs(image.affine[:3, :3]).sum(1)
        share = (image.world(at) - low + step / 2) / (high - low + step)
        height, side = 1 - share[:, 2], np.where(share[:, 0] > 0.5, "left", "right")  # LPS: x grows to the left, z to the head
    else:
        height, side = (at[:, 0] + 0.5) / mask.shape[0], np.where((at[:, 1] + 0.5) / mask.shape[1] > 0.5, "left", "right")
    return {(s, shapes.ZONES[int(z)]) for s, z in zip(side.tolist(), np.floor(height * 3).tolist())}


def test_the_words_say_where_the_mask_lies(made):
    rank, _, found = made
    seen = Counter()
    for row, image, masks in found:
        for o in row["objects"]:
            mask = np.zeros_like(masks[o["shape"]])
            place = tuple(slice(a, b) for a, b in zip(o["lower"], o["upper"]))
            mask[place] = masks[o["shape"]][place]
            assert words_of(image, mask) == {(o["side"], o["zone"])}
            seen[o["side"], o["zone"]] += 1
    assert len(seen) == 6 and min(seen.values()) > 0.5 * max(seen.values())


def test_sizes_and_brightness_are_as_said(folders):
    known = defaultdict(list)
    for row in manifest.rows(folders[2]):
        (image,) = manifest.open_images(row)
        masks = {m.label: m.array for m in manifest.read_masks(row, image)}
        grey, anything = image.pixels[0] / 255, np.logical_or.reduce(list(masks.values()))
        for o in row["objects"]:
            place = tuple(slice(a, b) for a, b in zip(o["lower"], o["upper"]))
            mask = np.zeros_like(anything)
            mask[place] = masks[o["shape"]][place]
            middle = (np.array(o["lower"]) + o["upper"] - 1) / 2
            known[o["size"]].append(np.linalg.norm(np.argwhere(mask) - middle, axis=1).max())
            around = binary_dilation(mask, iterations=4) & ~binary_dilation(anything, iterations=1)
            known[o["brightness"]].append((grey[mask].mean(), grey[mask].mean() - grey[around].mean()))
    assert np.quantile(known["small"], 0.99) < np.quantile(known["large"], 0.01)
    grey, out = np.array(known["dim"] + known["bright"]).T
    bright = np.arange(len(out)) >= len(known["dim"])
    assert auroc(out, bright) > 0.9 and auroc(grey, bright) < auroc(out, bright)  # what counts is how far it stands out
    assert np.quantile(grey[~bright], 0.9) > np.quantile(grey[bright], 0.15)


def test_no_threshold_finds_the_objects(made):
    rank, _, found = made
    best = []
    for _, image, masks in found[:40]:
        grey, truth = (image.voxels if rank == 3 else image.pixels)[0], np.logical_or.reduce(list(masks.values()))
        best.append(max(2 * (truth & (grey > t)).sum() / (truth.sum() + (grey > t).sum()) for t in np.quantile(grey, np.linspace(0.5, 0.99, 25))))
    assert np.mean(best) < 0.6


def true_of(row, question):
    """The answer to a question by what was drawn."""
    objects = row["objects"]
    names = [o["shape"] for o in objects]
    values = r"(?P<size>small|large)|(?P<brightness>dim|bright)"
    patterns = (rf"Is there a (?:(?:{values}) )?(?P<shape>\w+)(?: on the patient's (?P<side>\w+) side| in the (?P<zone>\w+) (?:zone|third))?\?",
                r"Is the (\w+) (?:small or large|dim or bright)\?", r"Where is the (\w+)\?", r"How many objects are there\?",
                r"Which shapes are there\?")  # fmt: skip
    exists, which, where, count, kinds = (re.fullmatch(p, question) for p in patterns)
    if exists:
        wanted = {k: v for k, v in exists.groupdict().items() if v}
        return "yes" if any(wanted.items() <= o.items() for o in objects) else "no"
    if which or where:
        (one,) = (o for o in objects if o["shape"] == (which or where)[1])
        if which:
            return one["size" if "small" in question else "brightness"]
        return f"{one['zone']} {one['side']} zone" if "boxes" in row else f"{one['zone']} third on the {one['side']}"
    if count:
        return str(len(names))
    assert kinds
    return re.sub(r", (\w+)$", r" and \1", ", ".join(s for s in shapes.SHAPES if s in names))


def test_every_answer_is_true_and_pairs_are_twins(made):
    rank, folder, found = made
    for row, _, _ in found:
        twins = defaultdict(list)
        for qa in row["qa"]:
            assert true_of(row, qa["question"]) == qa["answer"], (row["id"], qa)
            assert (qa["type"] == "CLOSED") == ("choices" in qa) and qa["answer"] in qa.get("choices", [qa["answer"]])
            if qa["answer"] in ("yes", "no"):
                twins[qa["pair"]].append(qa)
        assert len(twins) == 4
        for twin in twins.values():
            one, other = (re.findall(r"\w+", qa["question"]) for qa in twin)
            assert sorted(qa["answer"] for qa in twin) == ["no", "yes"] and twin[0]["category"] == twin[1]["category"]
            assert len(one) == len(other) and sum(a != b for a, b in zip(one, other)) == 1  # one word apart
    scores = probe.score(*oracle(probe.prepare(open_data(folder).scored, "test")), "medvlm")
    assert {s.name: (s.value, s.excluded) for s in scores if s.slice == "all"}["pair accuracy"] == (1.0, 0)


def oracle(samples):
    return samples, [Prediction(s.id, s.answer) for s in samples]


def test_texts_say_what_is_there_and_what_is_not(made):
    rank, _, found = made
    place = r"(\w+) (\w+) zone" if rank == 2 else r"(\w+) third on the (\w+)"
    for row, _, _ in found:
        truth = Counter(tuple(o[k] for k in ("size", "brightness", "shape", "zone", "side")) for o in row["objects"])
        absent = {s for s, v in row["findings"].items() if not v}
        findings = row["sections"]["findings"]
        assert row["text"] == f"FINDINGS: {findings} IMPRESSION: {row['caption']}" and row["sections"]["impression"] == row["caption"]
        for text in (row["caption"], findings):
            assert Counter(re.findall(rf"(small|large) (dim|bright) (\w+) in the {place}", text)) == truth
        assert re.search(r"; no (\w+)\.$", row["caption"])[1] in absent
        denied = " ".join(s for s in re.split(r"(?<=\.) ", findings) if re.match(r"No |There is no ", s))
        assert set(re.findall(r"\w+", denied)) & set(shapes.SHAPES) == absent
    assert len({row["text"] for row, _, _ in found}) > 0.95 * len(found)


def test_patients_have_several_images_and_one_split(made):
    rank, folder, found = made
    split = defaultdict(set)
    for row, _, _ in found:
        split[row["patient"]].add(row["split"])
    assert all(len(s) == 1 for s in split.values()) and 1.5 < len(found) / len(split) < 4
    refuse_leaks({name: manifest.samples(folder, name) for name in ("train", "val", "test")})  # nor one picture in two
    share = Counter(row["split"] for row, _, _ in found)
    assert all(0 <= share[name] - round(0.15 * len(found)) < 4 for name in ("val", "test"))  # whole patients, of at most four


def test_bars_come_with_rings(folders):
    rows = [row["findings"] for row in manifest.rows(folders[2])]  # six whole decks
    count = {s: sum(f[s] for f in rows) for s in shapes.SHAPES}
    assert set(count.values()) == {60}
    both = {(a, b): sum(f[a] * f[b] for f in rows) for a in shapes.SHAPES for b in shapes.SHAPES if a < b}
    assert both.pop(("bar", "ring")) == 30 and max(both.values()) == 18


def test_the_question_alone_does_not_tell(folders):
    for rank in (2, 3):
        data = open_data(folders[rank])
        train, test = data.samples("train", words=True), data.samples("val", "test", words=True)
        texts = defaultdict(Counter)
        for s in train + test:
            if probe.gold(s):
                texts[s.question][s.answer] += 1
        assert 0.47 < np.mean([c["yes"] / c.total() for c in texts.values()]) < 0.53
        assert all(0.3 < c["yes"] / c.total() < 0.7 for c in texts.values() if c.total() > 50)
        probes = probe.prepare(lambda _: test, "test")  # noqa: B023
        scores = {s.name: s for s in probe.score(probes, blind.prior(probes, train), "medvlm") if s.slice == "all"}
        assert abs(scores["question accuracy"].value - 0.5) < 0.08 and abs(scores["pair accuracy"].value - 0.25) < 0.12
        asked = vqa.prepare(lambda _: test, "test")  # noqa: B023
        scores = {s.name: s for s in vqa.score(asked, blind.prior(asked, train)) if s.slice == "all"}
        assert abs(scores["closed accuracy"].value - 0.5) < 0.08 and scores["open exact match"].value < 0.4


def test_objects_are_in_few_slices_and_series_differ(folders):
    thick, spacing, stored = [], set(), set()
    for row in manifest.rows(folders[3]):
        (image,) = manifest.open_images(row)
        axis = next(i for i, letter in enumerate(image.orientation) if letter in "SI")
        thick += [(o["upper"][axis] - o["lower"][axis]) / image.shape[1 + axis] for o in row["objects"]]
        spacing.add(round(image.spacing[axis], 2))
        stored.add(image.orientation)
        assert sorted(image.shape[1:]) == [16, 48, 56] and image.shape[1 + axis] == 16
    assert max(thick) <= 0.2 and spacing == {1.25, 2.0, 3.0, 5.0} and stored == set(shapes.STORED)


def test_the_toolkit_reads_the_same_sides(folders):
    """Position probes that are made from the outlines and the geometry, by another road than the words."""
    asked = 0
    for rank in (2, 3):
        objects = {row["id"]: row["objects"] for row in manifest.rows(folders[rank], "test")}
        for s in pairs.questions(list(manifest.samples(folders[rank], "test")), kinds=("position",)):
            found = re.match(r"Is the (\w+) in the \w+ (right|left) quarter of the (?:image|scan), by the patient's own sides", s.question)
            sides = {o["side"] for o in objects[s.meta["row"]] if o["shape"] == found[1]}
            asked += s.answer == "yes"
            assert sides == {found[2]} if s.answer == "yes" else True
    assert asked > 30


def test_same_seed_same_bytes(tmp_path):
    for rank, size in ((2, (48, 48)), (3, (12, 48, 48))):
        once, again, other = ({p.relative_to(f): p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file()} for f in (
            shapes.write(tmp_path / f"{rank}{name}", 10, rank, seed, size) for name, seed in (("a", 3), ("b", 3), ("c", 4))))  # fmt: skip
        assert once == again and len(once) == 21 and not set(once.values()) & set(other.values())


def test_flat_pictures_have_the_pictures_sides(tmp_path):
    folder = shapes.write(tmp_path / "eyes", 10, size=(48, 48), modality="fundus", text="caption")
    said = []
    for row in manifest.rows(folder):
        (image,) = manifest.open_images(row)
        for o in row["objects"]:
            assert o["side"] == ("left" if o["upper"][1] <= 24 else "right")
        said += [qa["question"] for qa in row["qa"]]
        assert row["text"] == row["caption"] and "sections" not in row and row["labels"] == {} and image.modality == "fundus"
    assert any(q.endswith("of the picture?") for q in said) and not any("patient" in q for q in said)


TASKS = ("vqa", "probe", "balanced_probe", "controls", "consistency", "robustness", "segment", "ground", "report", "retrieve", "zeroshot",
         "linear_probe")  # fmt: skip


def test_every_task_finds_something(few):
    known = parts.every("evaluate", "TASK")
    assert set(known) >= set(TASKS)
    for folder in few.values():
        held = {split: {r["id"] for r in manifest.rows(folder, split)} for split in ("train", "val", "test")}
        data = open_data(folder)
        found = {task: known[task].prepare(data.samples, "test") for task in TASKS}
        for task, samples in found.items():
            assert samples and all(s.images and s.meta["row"] in held[s.meta.get("fit", "test")] for s in samples), task
        asked = sum(len(r["qa"]) for r in manifest.rows(folder, "test"))
        each = {"probe": 8, "segment": 5, "ground": 5, "report": 1, "retrieve": 1}
        assert {t: len(found[t]) for t in ("vqa", *each)} == {"vqa": asked} | {t: n * len(held["test"]) for t, n in each.items()}
        assert {bool(s.masks[0].array.any()) for s in found["segment"]} == {True, False}
        for task, fit in (("zeroshot", {None, "val"}), ("linear_probe", {None, "train", "val"})):
            assert {s.choices for s in found[task]} == {tuple(sorted(shapes.SHAPES))} and {s.meta.get("fit") for s in found[task]} == fit


def test_a_run_on_the_set_plans_the_tasks_that_models_are_scored_by(few):
    assert {job.name for job in plan("2", few[2])[1]} == {"probe", "vqa", "segment", "report", "ground", "retrieve", "zeroshot"}


@pytest.mark.parametrize("wrong", [{"count": 9}, {"seed": -1}, {"rank": 4}, {"size": (40, 64)}, {"size": (12, 64, 64)}, {"modality": "heart"},
                                   {"rank": 3, "modality": "fundus"}, {"text": "poem"}])  # fmt: skip
def test_what_cannot_be_made_is_refused(tmp_path, wrong):
    with pytest.raises(UsageError) as error:
        shapes.write(tmp_path / "new", **wrong)
    assert error.value.code == "BAD_ARGUMENT" and str(next(v for k, v in wrong.items() if k != "rank" or len(wrong) == 1)) in str(error.value)
    assert not (tmp_path / "new").exists()


def test_the_command(tmp_path, capsys):
    assert shapes.main([str(tmp_path / "set"), "--count", "10", "--rank", "3", "--size", "12", "48", "48", "--modality", "mr", "--seed", "2"]) == 0
    assert "10 images" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "set/manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and {row["modality"] for row in rows} == {"mr"} and rows[0]["id"] == "shapes3d-s2-00000"
    assert shapes.main([str(tmp_path / "set"), "--count", "10"]) == 2 and "OUTPUT_EXISTS" in capsys.readouterr().err
