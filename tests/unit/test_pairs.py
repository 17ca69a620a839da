"""Probes made from labels, outlines, boxes and reports: they say what the data say, and balanced they need the image."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from medvlm.datasets import manifest, pairs
from medvlm.evaluate import blind, probe
from medvlm.evaluate.labeller import label
from medvlm.evaluate.vqa import prior_answers
from medvlm.imaging.scan import Image, Volume
from medvlm.sample import Mask, Prediction, Region, Sample, Turn

AXIAL = np.array([[0, 0, 2.0, 5], [0, 2.0, 0, 6], [3.0, 0, 0, 7], [0, 0, 0, 1]])
"""Index (d, h, w) -> mm: W to the left, H to the back, D to the head."""


def picture(modality="xray", size=(40, 40), **info):
    return Image("i", np.zeros((1, *size), np.uint8), None, modality, info=info)


def labelled(n, modality="xray", patient=None, **labels):
    return Sample(f"r{n}", patient, {"i": picture(modality)}, labels=labels, meta={"row": f"r{n}"})


def outlined(image, masks, **meta):
    return [Sample(f"r/{name}", images={image.id: image}, masks=(Mask(image.id, name, a),), meta={"row": "r", **meta}) for name, a in masks.items()]


def box(shape, *slices):
    a = np.zeros(shape, bool)
    a[tuple(slice(*s) for s in slices)] = True
    return a


def said(samples, *kinds):
    """{question: answer}, each question once an image."""
    found = pairs.questions(samples, kinds or pairs.KINDS)
    assert len({s.id for s in found}) == len(found)
    return {s.question.removesuffix(" Answer yes or no."): s.answer for s in found}


def prior(known, asked):
    """(share of questions, share of pairs) that the commonest answer to the same question gets; known: its training samples."""
    told = dict(zip((s.id for s in asked), prior_answers(known, asked)))
    groups = defaultdict(list)
    for s in asked:
        groups[s.group or s.id].append(told[s.id] == s.answer.lower())
    twins = [all(g) for g in groups.values() if len(g) == 2]
    return np.mean([told[s.id] == s.answer.lower() for s in asked]), np.mean(twins) if twins else float("nan")


def left_out(known, asked):
    """:func:`prior` where each image is answered from the others."""
    told = {}
    for row in {s.meta["row"] for s in asked}:
        mine = [s for s in asked if s.meta["row"] == row]
        told |= {s.id: a == s.answer.lower() for s, a in zip(mine, prior_answers([s for s in known if s.meta["row"] != row], mine))}
    groups = defaultdict(list)
    for s in asked:
        groups[s.group or s.id].append(told[s.id])
    twins = [all(g) for g in groups.values() if len(g) == 2]
    return np.mean(list(told.values())), np.mean(twins) if twins else float("nan")


def check_twins(found):
    groups = defaultdict(list)
    for s in found:
        if s.group:
            groups[s.group].append(s)
        else:
            assert s.meta["probe_category"] == "abnormality"
    for twins in groups.values():
        assert sorted(s.answer for s in twins) == ["no", "yes"]
        assert len({s.meta["row"] for s in twins}) == len({id(x) for s in twins for x in s.images.values()}) == len({s.meta["pool"] for s in twins}) == 1
        assert [s.meta["adversarial"] for s in twins] == [s.answer == "no" for s in twins]
    assert len({s.id for s in found}) == len(found)
    assert all(s.choices == ("yes", "no") and s.verb is None and not s.masks and s.meta["probe_category"] in pairs.KINDS for s in found)
    return groups


def test_no_probe_contradicts_its_labels_and_what_is_not_labelled_is_not_asked():
    lot, names = np.random.default_rng(0), ("oedema", "mass", "fracture", "normal")
    samples = [labelled(n, ("ct", "mr")[n % 2], **{k: float(lot.choice([0, 1, np.nan])) for k in names}) for n in range(60)]
    truth = {s.meta["row"]: s for s in samples}
    found = pairs.pairs(samples)
    check_twins(found)
    asked = Counter()
    for s in found:
        labels = truth[s.meta["row"]].labels
        name = next((k for k in names if f"show a {k}?" in s.question or f"show {k}?" in s.question), None)
        if s.meta["probe_category"] == "finding":
            assert name != "normal" and labels[name] == (s.answer == "yes")
            asked[name, s.answer] += 1
        elif s.meta["probe_category"] == "modality":
            assert (s.answer == "yes") == (("CT" in s.question) == (truth[s.meta["row"]].images["i"].modality == "ct"))
        else:
            assert s.meta["probe_category"] == "abnormality"
            ill = any(labels[k] == 1 for k in names[:3])
            assert labels["normal"] != 1 if s.answer == "yes" else labels["normal"] == 1 and not ill
    assert len(asked) == 6 and found[0].question.endswith("Answer yes or no.")
    assert [s.id for s in found] == [s.id for s in pairs.pairs(samples)] and [s.id for s in found] != [s.id for s in pairs.pairs(samples, seed=1)]


def test_abnormal_is_only_what_was_called_so():
    ask = "Does this image show any abnormality?"
    for labels, answer in (({"normal": 1}, "no"), ({"normal": 0}, "yes"), ({"mass": 1}, "yes"), ({"mass": 0}, None), ({"normal": 1, "mass": 1}, None),
                           ({"pacemaker": 1}, None), ({"normal": float("nan")}, None)):  # fmt: skip
        assert said([labelled(1, **labels)], "abnormality").get(ask) == answer, labels


def test_a_finding_that_is_said_twice_and_differently_is_not_asked():
    image = picture(view="PA")
    one = Sample("a", images={"i": image}, labels={"consolidation": 0.0}, meta={"row": "a"})
    mask = Sample("a/consolidation", images={"i": image}, labels=one.labels, masks=(Mask("i", "consolidation", box((40, 40), (0, 5), (0, 5))),), meta={"row": "a"})
    assert said([one, mask], "finding") == {} and said([mask], "finding") == {}


def lungs(flip=False):
    """A chest X-ray: the patient's right lung on image left, a consolidation low in the right lung."""
    shape = (40, 40)
    masks = {"right_lung": box(shape, (5, 35), (4, 18)), "left_lung": box(shape, (5, 35), (22, 36)), "consolidation": box(shape, (24, 34), (5, 15))}
    if flip:
        masks["consolidation"] = masks["consolidation"][:, ::-1]
    return masks


def test_sides_are_the_patients_and_follow_a_flipped_mask():
    for view in ("PA", "AP Supine"):
        right = said(outlined(picture(), lungs(), labels={"view": view}), "position")
        assert right["Is the consolidation in the right lung?"] == "yes" and right["Is the consolidation in the left lung?"] == "no"
        quarter = "Is the consolidation in the {} quarter of the image, by the patient's own sides?"
        assert {k: right[quarter.format(k)] for k in ("lower right", "lower left", "upper right", "upper left")} == {
            "lower right": "yes", "lower left": "no", "upper right": "no", "upper left": "no"}  # fmt: skip
        left = said(outlined(picture(), lungs(flip=True), labels={"view": view}), "position")
        assert left["Is the consolidation in the left lung?"] == "yes" and left[quarter.format("lower left")] == "yes"
        assert left["Is the consolidation in the right lung?"] == "no" and left[quarter.format("lower right")] == "no"
    both = lungs()
    both["consolidation"] = both["consolidation"] | both["consolidation"][:, ::-1]
    assert not [q for q in said(outlined(picture(), both, labels={"view": "PA"}), "position") if "consolidation" in q]


def test_sides_that_nobody_knows_are_not_asked():
    assert not [q for q in said(outlined(picture(), lungs()), "position") if "quarter" in q]  # no view: which side is which is not said
    alone = {"consolidation": lungs()["consolidation"]}
    assert said(outlined(picture(), alone, labels={"view": "L"}), "position") == {}
    assert said(outlined(picture("mr"), alone), "position") == {}  # a slice without a place in the patient
    assert said(outlined(picture("unknown"), alone), "position") == {}
    flat = said(outlined(picture("pathology"), alone), "position")
    assert flat["Is the consolidation in the lower left quarter of the picture?"] == "yes"
    coronal = np.array([[0, 0, 1.0, 0], [2, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    slice_ = said(outlined(picture("mr", affine=coronal), alone), "position")
    assert slice_["Is the consolidation in the lower right quarter of the slice, by the patient's own sides?"] == "yes"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_sides_in_a_volume_by_its_affine(order, sign):
    straight = {"liver": box((6, 20, 20), (1, 5), (2, 9), (1, 8)), "spinal_cord": box((6, 20, 20), (0, 6), (15, 17), (9, 11)), "kidney_left": box((6, 20, 20), (0, 3), (12, 16), (14, 18)),
                "gallbladder": np.zeros((6, 20, 20), bool)}  # fmt: skip
    affine = AXIAL[:, [*order, 3]]
    masks = {k: a.transpose(order) for k, a in straight.items()}
    if sign < 0:  # the same voxels, stored the other way along W
        at = order.index(2)
        masks = {k: np.flip(a, at) for k, a in masks.items()}
        affine = affine.copy()
        affine[:3, 3] += affine[:3, at] * 19
        affine[:3, at] *= -1
    volume = Volume("i", np.zeros((1, *masks["liver"].shape), np.int16), affine, "ct", "HU")
    found = said(outlined(volume, masks))
    assert found["Is the liver on the patient's right side?"] == "yes" and found["Is the liver on the patient's left side?"] == "no"
    assert found["Is the liver in the front right quarter of the scan, by the patient's own sides?"] == "yes"
    assert not [q for q in found if "Is the left kidney" in q]  # its name says its side
    shows = {q.removeprefix("Does this image show the ").removesuffix("?"): a for q, a in found.items() if "show the" in q}
    assert shows == {"liver": "yes", "spinal cord": "yes", "left kidney": "yes", "gallbladder": "no", "brain": "no", "knee joint": "no"}
    assert found["Is this a CT scan?"] == "yes" and found["Is this an image of the abdomen?"] == "yes"


def test_what_annotators_outline_wherever_it_is_is_absent_elsewhere():
    first, second, third = picture(), picture(), picture()
    samples = [
        Sample("a/x", images={"i": first}, masks=(Mask("i", "pneumothorax", box((40, 40), (0, 5), (0, 5))),), meta={"row": "a"}),
        Sample("b/x", images={"i": second}, masks=(Mask("i", "tubings", box((40, 40), (0, 5), (0, 5))),), meta={"row": "b"}),
        Sample("c", images={"i": third}, meta={"row": "c"}),
    ]
    found = {s.id: s.answer for s in pairs.questions(samples, ["finding"])}
    # tubings were not outlined wherever they are, and nothing at all was on c; nor is a name absent that nobody ever outlined
    assert found == {"a/does-this-image-show-a-pneumothorax": "yes", "b/does-this-image-show-a-pneumothorax": "no", "b/does-this-image-show-tubings": "yes"}
    assert len(pairs.questions(samples, ["finding"], annotated=["tubings"])) == 3
    assert {s.id for s in pairs.questions(samples, ["finding"], annotated=())} == {"a/does-this-image-show-a-pneumothorax", "b/does-this-image-show-tubings"}


def test_reports_through_a_labeller():
    text = "FINDINGS: There is a large right pleural effusion. No pneumothorax. Possible pneumonia.\nIMPRESSION: Pleural effusion."
    s = Sample("r", images={"i": picture()}, turns=(Turn("assistant", text),), meta={"row": "r", "sections": {"findings": text}})
    found = {q.question: q.answer for q in pairs.questions([s], ["finding"], label=label)}
    assert found["Does this image show a pleural effusion? Answer yes or no."] == "yes" and found["Does this image show a pneumothorax? Answer yes or no."] == "no"
    assert not [q for q in found if "pneumonia" in q]  # doubted
    twins = pairs.pairs([s], ["finding"], label=lambda t: {"effusion": 1, "mass": 0, "other": None})
    assert sorted((t.question[:29], t.answer) for t in twins) == [("Does this image show a mass? ", "no"), ("Does this image show an effus", "yes")]
    assert pairs.questions([s], ["finding"]) == []
    note = Sample("r", images={"i": picture()}, turns=(Turn("assistant", text),), meta={"row": "r"})  # a clinical note is no report of this image
    assert pairs.questions([note], ["finding"], label=label) == []
    assert {q.answer for q in pairs.build([s]) if q.meta["probe_category"] == "finding"} == {"yes", "no"}


def test_boxes():
    s = [Sample(f"r{n}", images={"i": picture("pathology")}, regions=tuple(Region("i", k, ((2, 2), (9, 9))) for k in names), meta={"row": f"r{n}"})
         for n, names in enumerate((("WBC", "RBC"), ("RBC",), ()))]  # fmt: skip
    found = {(q.meta["row"], q.question[21:25]): q.answer for q in pairs.questions(s, ["finding"])}
    assert found == {("r0", "WBC?"): "yes", ("r0", "RBC?"): "yes", ("r1", "WBC?"): "no", ("r1", "RBC?"): "yes"}


def unbalanced():
    """100 images: A and B nearly always, C, D and E seldom: as in life, what is asked after and not there is a rare finding."""
    lot = np.random.default_rng(3)
    share = {"aa": 0.85, "bb": 0.8, "cc": 0.15, "dd": 0.2, "ee": 0.1}
    return [labelled(n, **{k: float(lot.random() < p) for k, p in share.items()}) for n in range(100)]


def test_balanced_probes_cannot_be_answered_from_the_question():
    asked = pairs.questions(unbalanced(), ["finding"])
    before = pairs.pairs(unbalanced(), ["finding"])
    assert prior(before, before)[1] > 0.7 and left_out(before, before)[1] > 0.7
    balanced, rest = pairs.balance(asked)
    check_twins(balanced)
    check_twins(rest)
    assert len(balanced) >= 40 and all(s.meta["balanced"] for s in balanced) and not any(s.meta["balanced"] for s in rest)
    assert not {s.id for s in balanced} & {s.id for s in rest}
    for text in {s.question for s in balanced}:
        answers = Counter(s.answer for s in balanced if s.question == text)
        assert answers["yes"] == answers["no"]
    for known in (asked, before, rest):  # whoever knows how common each finding is
        questions, twins = prior(known, balanced)
        assert questions == 0.5 and 0 <= twins <= 0.25
    assert left_out(asked, balanced)[1] <= 0.25
    assert prior(rest, rest)[1] > 0.9  # what is left needs no image, and is reported apart
    again, _ = pairs.balance(asked)
    assert [s.id for s in again] == [s.id for s in balanced]


def test_ready_probes_are_joined_anew_and_none_is_lost():
    ready = []
    for n, (yes, no) in enumerate([("a", "b"), ("a", "b"), ("b", "a"), ("a", "c")]):
        for text, answer in ((yes, "yes"), (no, "no")):
            ready.append(Sample(f"{n}{text}", images={"i": picture()}, turns=(Turn("user", text), Turn("assistant", answer)), group=f"g{n}", meta={"row": f"r{n}"}))
    balanced, rest = pairs.balance(ready)
    # a against b: two images say "a, not b", one says "b, not a"; but a is commoner, and nothing else makes up for knowing that
    assert balanced == [] and {s.id for s in rest} == {s.id for s in ready} and {s.group for s in rest} == {"g0", "g1", "g2", "g3"}
    even, over = pairs.balance([*ready[2:4], *ready[4:6]])
    assert sorted(s.answer for s in even) == ["no", "no", "yes", "yes"] and over == [] and Counter(s.group for s in even).most_common()[0][1] == 2


def test_single_questions_are_balanced_too():
    samples = [labelled(n, normal=float(n < 3)) for n in range(10)]
    balanced, rest = pairs.balance(pairs.questions(samples, ["abnormality"]))
    assert Counter(s.answer for s in balanced) == {"yes": 3, "no": 3} and len(rest) == 4 and all(s.group is None for s in balanced)


def test_kinds_of_picture_are_asked_after_among_all_sets_and_findings_within_each():
    films = [replace(labelled(n, edema=float(n % 2)), id=f"films/r{n}", meta={"row": f"r{n}", "dataset": "films"}) for n in range(4)]
    scans = [replace(labelled(n, "ct", edema=float(n % 2 == 0), stones=float(n % 2)), id=f"scans/r{n}", meta={"row": f"r{n}", "dataset": "scans"}) for n in range(4)]
    alone = [s for s in pairs.build(films) if s.meta["balanced"]]
    assert not [s for s in alone if s.meta["probe_category"] == "modality"]  # one kind of picture: whoever always says its name is right
    balanced = [s for s in pairs.build([*films, *scans]) if s.meta["balanced"]]
    check_twins([replace(s, meta={**s.meta, "row": f"{s.meta['dataset']}/{s.meta['row']}"}) for s in balanced])
    kinds = [s for s in balanced if s.meta["probe_category"] == "modality"]
    assert Counter((s.meta["dataset"], s.answer) for s in kinds) == {(d, a): 4 for d in ("films", "scans") for a in ("yes", "no")}
    assert {s.meta["dataset"] for s in balanced if s.meta["probe_category"] == "finding"} == {"scans"}  # films know one finding, which has no twin there


def test_blind_baselines_land_on_chance_on_built_probes():
    balanced = [s for s in pairs.build(unbalanced()) if s.meta["balanced"]]
    asked = probe.TASK.prepare({"test": balanced}.get, "test")
    assert len(asked) == len(balanced)
    twins = [s for s in asked if s.group]
    for says, questions, pair in ((blind.yes(twins), 0.5, 0.0), ([Prediction(s.id, s.answer) for s in twins], 1.0, 1.0)):
        found = {s.name: s for s in probe.TASK.score(twins, says, "medvlm") if s.slice == "all"}
        assert (found["question accuracy"].value, found["pair accuracy"].value) == (questions, pair)
    scores = {s.name: s for s in probe.TASK.score(twins, blind.prior(twins, pairs.build(unbalanced())), "medvlm") if s.slice == "all"}
    assert scores["question accuracy"].value == 0.5 and scores["pair accuracy"].value <= 0.25


def test_confusing_pairs():
    def asked(n, answer, text="Is it?", patient=None):
        return Sample(f"{n}{text}", patient, {"i": picture()}, (Turn("user", text), Turn("assistant", answer)), meta={"row": n})

    at = lambda degrees: np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]) * 3  # noqa: E731
    vectors = {"a": at(0), "b": at(5), "c": at(2), "d": at(90), "e": at(91), "f": at(90.5)}
    samples = [asked("a", "yes"), asked("b", "no"), asked("c", "no"), asked("d", "yes", patient="p"), asked("e", "no"), asked("f", "no", patient="p"),
               asked("d", "yes", "Other?"), asked("e", "yes", "Other?"), asked("g", "no")]  # fmt: skip
    found = pairs.confusing(samples, vectors)
    # a is nearest to c (2 degrees), so b finds no other; d is nearest to f, but they are one patient; "Other?" has no opposite answers
    assert [s.id for s in found] == ["dIs it?@confusing", "eIs it?@confusing", "aIs it?@confusing", "cIs it?@confusing"]
    assert [s.group for s in found] == ["dIs it?|eIs it?@confusing"] * 2 + ["aIs it?|cIs it?@confusing"] * 2
    assert found[2].meta["similarity"] == pytest.approx(np.cos(np.radians(2)), abs=1e-4) and found[0].meta["kind"] == "confusing"
    assert pairs.confusing(samples, vectors, least=0.99999) == []
    scores = {s.name: s for s in probe.TASK.score(found, [Prediction(s.id, "yes") for s in found], "medvlm")}
    assert (scores["set accuracy"].value, scores["confusion"].value) == (0, 1)


@pytest.mark.shared
def test_chest_xrays(data):
    every, figures, built = [], [], {}
    for split in ("train", "val", "test"):
        samples = list(manifest.samples(data / "xray_covid", split))
        every += samples
        ready = [s for s in samples if s.group and probe.gold(s)]
        built[split] = pairs.build(samples)
        check_twins(built[split])
        balanced = [s for s in built[split] if s.meta["balanced"]]
        asked = pairs.questions(samples)
        figures.append((split, len(ready), *left_out(ready, ready), len(balanced), *prior(asked, balanced), *left_out(asked, balanced)))
        assert prior(asked, balanced)[0] == 0.5
        by_row = {s.meta["row"]: s.labels for s in samples}
        for s in built[split]:
            for name, value in by_row[s.meta["row"]].items():
                if s.question.startswith(f"Does this image show {name}?"):
                    assert value == (s.answer == "yes")
    ready = [s for s in every if s.group and probe.gold(s)]
    asked = pairs.questions(every)
    balanced, _ = pairs.balance(asked)
    figures.append(("all", len(ready), *left_out(ready, ready), len(balanced), *prior(asked, balanced), *left_out(asked, balanced)))
    for split, n, q, p, m, bq, bp, lq, lp in figures:  # pytest -rP shows them
        print(f"{split}: {n} ready probes, left-out prior {q:.2f} of questions {p:.2f} of pairs; {m} balanced, prior {bq:.2f} {bp:.2f}, left-out {lq:.2f} {lp:.2f}")
    rest = prior(built["train"], [s for s in built["test"] if not s.meta["balanced"]])
    print("rest of test, answers of train: {:.2f} of questions {:.2f} of pairs".format(*rest))
    assert rest[1] > 0.8 and figures[-1][3] > 0.75  # of the ready pairs, without the image
    assert figures[-1][4] >= 100 and figures[-1][5] == 0.5 and figures[-1][8] <= 0.3
    twins = [s for s in balanced if s.group]
    told = blind.prior(twins, asked)
    pair = next(s for s in probe.TASK.score(twins, told, "medvlm") if (s.name, s.slice) == ("pair accuracy", "all"))
    assert pair.low <= 0.25 and pair.value <= 0.3, "a reader of questions does better than chance"


@pytest.mark.shared
def test_organs_cells_and_fundus(data):
    mr = list(manifest.samples(data / "vol_totalseg", "test"))
    found = said(mr)
    assert found["Is the liver on the patient's right side?"] == "yes" and found["Is the spleen on the patient's left side?"] == "yes"
    assert found["Is this an MR scan?"] == "yes" and found["Does this image show the brain?"] == "no" and found["Does this image show the liver?"] == "yes"
    check_twins(pairs.build(mr))
    cells = pairs.build(list(manifest.samples(data / "path_bccd", "test")))
    check_twins(cells)
    assert {s.meta["probe_category"] for s in cells if s.meta["balanced"]} == {"finding", "position"}
    eyes = pairs.build(list(manifest.samples(data / "fundus_chase", "test")))
    check_twins(eyes)
    assert {s.meta["probe_category"] for s in eyes} == {"modality", "organ"} and not any(s.meta["balanced"] for s in eyes)
