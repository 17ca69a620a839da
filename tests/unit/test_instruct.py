"""Conversations out of labels: facts, sides, sentences; and what must never be learnt from."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from itertools import islice, product

import numpy as np
import pytest
from PIL import Image as Pillow

from medvlm.datasets import instruct, manifest, sentences
from medvlm.datasets.facts import ANNOTATED, case_of, side_of, stated
from medvlm.datasets.instruct import conversations, describe
from medvlm.datasets.sentences import boxes_in, boxes_text, fact_of
from medvlm.imaging.scan import Image, Volume
from medvlm.recipes import medvlm_tiny as recipe
from medvlm.sample import Mask, Region, Sample, Turn

TARGETS = ("right lung", "left lung", "consolidation", "pneumothorax")


@pytest.mark.parametrize(
    ("question", "answer", "fact"),
    [
        ("Is there a pneumothorax?", "No", {"pneumothorax": 0}),
        ("Is there a pneumothorax?", " yes ", {"pneumothorax": 1}),
        ("Are there pleural effusions present?", "no", {"pleural effusion": 0}),
        ("Is the heart enlarged?", "yes", {"cardiomegaly": 1}),
        ("Is this patient intubated?", "no", {"endotracheal tube": 0}),
        ("Is there ground-glass opacity or consolidation?", "no", {"ground-glass opacity": 0, "consolidation": 0}),
        ("Is the pneumothorax on the left?", "no", {}),
        ("Is there a right pleural effusion?", "no", {}),
        ("Are there bilateral effusions?", "yes", {}),
        ("What is shown?", "pneumothorax", {}),
        ("Is there a pneumothorax?", "maybe", {}),
        ("Is there a fracture?", "yes", {}),
        ("Is this image normal?", "no", {}),  # abnormal, but nobody says how
        ("Is this image abnormal?", "yes", {}),
        ("Are there any abnormalities with the shape of the aortic arch?", "no", {}),  # of one part only
        ("Is/Are the lungs normal size?", "yes", {}),
        ("Is there anything abnormal about the heart size?", "no", {}),
        ("Is/Are there abnormalities in the patient's lower lung?", "no", {}),
    ],
)
def test_what_one_question_tells(question, answer, fact):
    assert fact_of(question, answer) == fact


@pytest.mark.parametrize(("question", "answer"), [("Is this image normal?", "yes"), ("Is this image abnormal?", "no"), ("Are there any abnormalities?", "no")])
def test_a_healthy_picture_has_none_of_the_findings(question, answer):
    told = fact_of(question, answer)
    assert set(told.values()) == {0.0} and {"consolidation", "pneumothorax", "pneumonia"} <= told.keys() and "cardiomegaly" not in told


def told(row, **more):
    """What a row states, through the samples that it gives."""
    image = Image("i", np.zeros((1, *SIZE), np.uint8), None, row.get("modality", "xray"), "uint8")
    base = Sample("r", "p", {"i": image}, labels=row.get("findings", {}), meta={"row": "r", "split": "train", "labels": row.get("labels", {})})
    group = [replace(base, id=f"q{n}", turns=(Turn("user", q), Turn("assistant", a))) for n, (q, a) in enumerate(row.get("qa", ()))]
    group += [replace(base, id=f"r/{name}", masks=(Mask("i", name, array),)) for name, array in row.get("masks", {}).items()]
    return stated(case_of(group or [base]), **more)


def test_what_a_row_states_and_what_it_leaves_open():
    assert told({"findings": {"pneumonia": 1, "covid-19": 0, "ards": float("nan")}}) == {"pneumonia": 1, "COVID-19 pneumonia": 0}
    drawn = told({"masks": {"consolidation": at(1, 1, 2, 2), "left_lung": LEFT}}, annotated=ANNOTATED)
    assert drawn == {"consolidation": 1, "left lung": 1} | dict.fromkeys(set(ANNOTATED) - {"consolidation"}, 0)
    assert told({"masks": {"left_lung": LEFT}}) == {"left lung": 1}  # nobody says that more was looked for
    assert told({}, annotated=ANNOTATED) == {}  # nothing was outlined at all
    assert told({"labels": {"intubation_present": "Y"}}) == {"endotracheal tube": 1} and told({"labels": {"intubation_present": "?"}}) == {}
    asked = [("Is there consolidation?", "no"), ("Is there a pneumothorax?", "yes")]
    assert told({"qa": asked, "findings": {"consolidation": 1}}) == {"consolidation": 1, "pneumothorax": 1}  # what was labelled stands
    assert told({"masks": {"consolidation": at(1, 1, 2, 2)}, "findings": {"consolidation": 0}}) == {"consolidation": 1}  # and an outline more
    assert told({"modality": "ct", "qa": asked}) == {}  # the questions are of chest X-rays


SIZE = (20, 40)
RIGHT, LEFT = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
RIGHT[4:16, 2:16] = True  # the patient's right lung is on the left of the picture
LEFT[4:16, 24:38] = True


def at(top, left, height, width):
    array = np.zeros(SIZE, bool)
    array[top : top + height, left : left + width] = True
    return array


@pytest.mark.parametrize(
    ("name", "word"),
    [("lung_upper_lobe_left", "left lung upper lobe"), ("right_lung", "right lung"), ("Pleural Effusion", "pleural effusion"), ("RBC", "RBC"),
     ("COVID-19", "COVID-19"), ("covid-19", "COVID-19 pneumonia"), ("vertebrae_L2", "vertebrae L2"), ("vessel_observer2", "vessels"), ("nucleus", "nuclei")],
)  # fmt: skip
def test_names_are_put_into_words(name, word):
    assert sentences.spoken(name) == word


def test_articles_and_plurals():
    several = ("vessels", "nuclei", "airways", "monitoring leads", "left lung opacities")
    assert all(map(sentences.many, several))
    assert not any(map(sentences.many, ("liver", "mass", "ARDS", "atelectasis", "pancreas", "thymus", "ascites", *recipe.FINDINGS)))
    assert [sentences.article(n) + n for n in ("nodule", "ulcer", "oedema", "lung mass")] == ["a nodule", "an ulcer", "oedema", "a lung mass"]
    assert [sentences.plural(n) for n in ("nodule", "mass", "pneumothorax", "nuclei", "RBC")] == ["nodules", "masses", "pneumothoraces", "nuclei", "RBC"]


@pytest.mark.parametrize(
    ("target", "side"),
    [
        (at(6, 4, 4, 4), "right"),
        (at(6, 28, 4, 4), "left"),
        (at(6, 4, 4, 4) | at(6, 28, 4, 4), "both"),
        (at(6, 4, 5, 10) | at(6, 28, 1, 5), "right"),  # 50 to 5: under 15 %
        (at(6, 4, 5, 10) | at(6, 28, 1, 9), "both"),  # 50 to 9
        (at(0, 0, 2, 40), None),
        (np.zeros(SIZE, bool), None),
    ],
)
def test_the_side_is_the_patients(target, side):
    assert side_of(target, RIGHT, LEFT) == side
    mirrored = {"right": "left", "left": "right"}.get(side, side)
    assert side_of(target[:, ::-1], RIGHT, LEFT) == mirrored


STATES = [("present", s) for s in (None, "right", "left", "both")] + [("possible", s) for s in (None, "right", "left", "both")] + [("absent", None)]


def test_a_sentence_says_its_meaning_and_no_other():
    label = "pleural effusion"
    for (state, side), (other, elsewhere) in product(STATES, STATES):
        for sentence in sentences.variants(label, state, side):
            assert sentences.says(sentence, label, other, elsewhere) == ((state, side) == (other, elsewhere)), (sentence, other, elsewhere)
            assert not sentences.says(sentence, "consolidation", state, side)


@pytest.mark.parametrize("label", (*recipe.FINDINGS, *recipe.TARGETS))
def test_every_label_can_be_said(label):
    for state, side in STATES:
        side = side if "lung" not in label else None
        assert all(sentences.says(s, label, state, side) for s in sentences.variants(label, state, side))


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        ("COVID-19 pneumonia.", "pneumonia"),  # another finding
        ("There is pneumonia, unchanged from the prior.", "pneumonia"),  # a comparison with nothing
        ("Pneumonia in the lower lobe.", "pneumonia"),
        ("There is pneumonia and a mass.", "pneumonia"),
        ("There is pneumonia of 3 cm.", "pneumonia"),
        ("", "pneumonia"),
    ],
)
def test_a_sentence_that_says_more_is_not_taken(sentence, label):
    assert not sentences.says(sentence, label, "present")


def test_wrong_states_are_not_put_into_words():
    for args in (("a", "perhaps"), ("a", "present", "middle")):
        with pytest.raises(ValueError, match="is not one of"):
            sentences.variants(*args)


def test_prompts_and_sentences_agree_on_the_side():
    for side, word in (("right", "right"), ("left", "left"), ("both", "both")):
        for prompt, sentence in describe("consolidation", "present", side):
            assert prompt == f"Describe: consolidation, present, {side}" and word in sentence
            assert ("left" in sentence) == (side == "left") and ("right" in sentence) == (side == "right")


def group(image, masks=(), boxes=(), qa=(), texts=(), row="r", labels=(), **meta):
    """The samples of one image: one a question, a mask and a text, as a manifest's row gives them."""
    regions = tuple(Region(image.id, name, box) for name, box in boxes)
    base = Sample(row, "p", {image.id: image}, regions=regions, labels=dict(labels), meta={"row": row, "split": "train", **meta})
    found = [replace(base, id=f"q{n}", turns=(Turn("user", q), Turn("assistant", a)), group=f"g{n}", meta={**base.meta, "qid": n}) for n, (q, a) in enumerate(qa)]
    found += [replace(base, id=f"{row}/{name}", masks=(Mask(image.id, name, array),)) for name, array in dict(masks).items()]
    found += [replace(base, turns=(Turn("assistant", text),), meta={**base.meta, **more}) for text, more in texts]
    return found or [base]


def picture(modality="xray", size=SIZE, **info):
    return Image("i", np.zeros((1, *size), np.uint8), None, modality, "uint8", info)


def plain(samples, *kinds, **more):
    """{question: answer} in the plainest words; the same question twice has the same answer."""
    found = {}
    for s in conversations(samples, **{"variety": 0, **({"kinds": kinds} if kinds else {}), **more}):
        assert s.meta["kind"] == "describe" or found.setdefault(s.question, s.answer) == s.answer
    return found


CHEST = {"right_lung": RIGHT, "left_lung": LEFT, "consolidation": at(6, 4, 4, 4)}


def test_conversations_of_an_annotated_chest_xray():
    samples = group(picture(), CHEST, qa=[("Where?", "Right Lung")], labels={"pneumonia": 1.0, "normal": 0.0, "ards": float("nan")})
    samples = [replace(s, meta={**s.meta, "labels": {"view": "AP Supine"}}) for s in samples]
    found = list(conversations(samples, (*TARGETS, "airways"), annotated=ANNOTATED, variety=0))
    drawn = {s.masks[0].label: s.masks[0].array for s in found if s.meta["kind"] == "segment"}
    assert np.array_equal(drawn["right lung"], RIGHT) and np.array_equal(drawn["left lung"], LEFT) and not drawn["pneumothorax"].any()
    assert drawn.keys() == set(TARGETS)  # nobody says anything about the airways
    assert all(s.question == f"Segment the {s.masks[0].label}." and s.answer == "<|seg|>" for s in found if s.meta["kind"] == "segment")
    said = {s.question: s.answer for s in found if s.meta["kind"] != "describe"}
    assert said["Where?"] == "Right Lung" and next(s.group for s in found if s.question == "Where?") == "g0"
    assert said["Is there consolidation in this chest X-ray?"] == said["Is there pneumonia in this chest X-ray?"] == "yes"
    assert said["Is there pneumothorax in this chest X-ray?"] == "no" and not [q for q in said if "ARDS" in q or "there normal" in q]
    assert said["What kind of image is this?"] == "a chest X-ray" and said["Is this a chest X-ray?"] == "yes" and said["Is this a PA or AP film?"] == "AP"
    assert said["Where is the consolidation?"] == "In the right lung."
    assert said["Is the consolidation in the upper right quarter of the image, by the patient's own sides?"] == "yes"
    assert said["Is the consolidation in the right lung?"] == "yes" and said["Is the consolidation in the left lung?"] == "no"
    assert said["Where is the pneumothorax?"] == "There is no pneumothorax." and "Where is the pneumonia?" not in said
    assert said["Give the bounding box of the consolidation."] == '{"bbox_2d": [100, 300, 200, 500], "label": "consolidation"}'
    assert said["Which part of the body is shown?"] == "the chest" and said["Does this image show the left lung?"] == "yes"
    assert said["Does this image show the urinary bladder?"] == said["Does this image show the knee joint?"] == "no"
    assert said["Does this image show any abnormality?"] == "yes"
    told = [s.answer for s in found if s.meta["kind"] == "describe" and "consolidation" in s.question]
    assert told and all("on the right" in t for t in told)
    assert {s.answer for s in found if "pneumothorax, absent" in s.question} == {"No pneumothorax.", "There is no pneumothorax.", "No pneumothorax is seen."}
    assert len({s.id for s in found}) == len(found) and {s.patient for s in found} == {"p"} and {s.meta["row"] for s in found} == {"r"}
    assert all(s.labels == found[0].labels for s in found)
    absent = dict.fromkeys(set(ANNOTATED) - {"consolidation"}, 0)
    assert found[0].labels == {"pneumonia": 1, "normal": 0, "consolidation": 1, "modality:xray": 1, "view:AP": 1} | absent


def test_a_model_learns_of_what_it_is_to_learn():
    found = list(conversations(group(picture(), CHEST, labels={"pneumonia": 1.0, "mass": 0.0}), ("left lung",), ("pneumonia",), ("ct", "xray"), variety=0))
    kinds = {k: {s.question for s in found if s.meta["kind"] == k} for k in instruct.KINDS}
    assert kinds["segment"] == {"Segment the left lung."} and kinds["finding"] == {"Is there pneumonia in this chest X-ray?"}
    assert kinds["modality"] == {"What kind of image is this?", "Is this a CT slice?", "Is this a chest X-ray?"}
    assert found[0].labels == {"pneumonia": 1, "mass": 0, "modality:xray": 1}  # what is labelled stays known
    assert {s.meta["kind"] for s in conversations(group(picture(), CHEST), kinds=("locate", "organ"))} == {"locate", "organ"}


def test_boxes_are_weak_outlines_in_index_order():
    found = conversations(group(picture(), boxes=[("left_lung", ((4, 24), (16, 38)))]), TARGETS, kinds=["segment"])
    (drawn,) = found
    assert drawn.regions[0].box == ((4, 24), (16, 38)) and drawn.regions[0].label == "left lung" and not drawn.masks


def test_a_foreign_picture_has_nothing_to_outline():
    found = list(conversations(group(picture("ct")), TARGETS, absent=TARGETS, modalities=["xray"], variety=0))
    assert {s.meta["kind"] for s in found} == {"segment", "modality"} and found[0].labels == {"modality:ct": 1}
    assert [s.masks[0].label for s in found[:4]] == list(TARGETS) and not any(s.masks[0].array.any() for s in found[:4])
    assert plain(group(picture("ct")), "modality", modalities=["xray"]) == {"What kind of image is this?": "a CT slice", "Is this a chest X-ray?": "no"}


AXIAL = np.array([[0, 0, 2.0, 5], [0, 2.0, 0, 6], [3.0, 0, 0, 7], [0, 0, 0, 1]])
"""Index (d, h, w) -> mm: W to the left, H to the back, D to the head."""
ABDOMEN = (6, 20, 20)


def block(*slices, size=ABDOMEN):
    array = np.zeros(size, bool)
    array[tuple(slice(*s) for s in slices)] = True
    return array


ORGANS = {"liver": block((1, 5), (2, 9), (1, 8)), "spinal_cord": block((0, 6), (15, 17), (9, 11)), "kidney_left": block((0, 3), (12, 16), (14, 18)),
          "gallbladder": np.zeros(ABDOMEN, bool), "liver_lesion": block((2, 3), (3, 6), (3, 6))}  # fmt: skip


def scan(affine=AXIAL, modality="ct", size=ABDOMEN):
    return Volume("v", np.zeros((1, *size), np.int16), affine, modality, "HU")


def test_organs_of_a_volume():
    found = plain(group(scan(), ORGANS))
    shows = {q.removeprefix("Does this image show the ").removesuffix("?"): a for q, a in found.items() if q.startswith("Does this image show the")}
    assert shows == {"liver": "yes", "spinal cord": "yes", "left kidney": "yes", "gallbladder": "no", "brain": "no", "knee joint": "no"}
    assert found["Which part of the body is shown?"] == "the abdomen" and found["Is this an image of the abdomen?"] == "yes"
    wrong = [q for q, a in found.items() if q.startswith("Is this an image of") and a == "no"]
    assert len(wrong) == 1 and not any(near in wrong[0] for near in ("chest", "pelvis", "breast"))
    assert found["What kind of image is this?"] == "a CT scan" and found["Is this a CT scan?"] == "yes"
    assert found["Is there liver lesion in this CT scan?"] == "yes" and "Is there liver in this CT scan?" not in found
    assert found["Where is the liver?"] == "On the patient's right side." and found["Is the liver lesion on the patient's left side?"] == "no"
    assert not [q for q in found if "Where is the left kidney" in q] and "Describe: liver lesion, present, right" in {
        s.question for s in conversations(group(scan(), ORGANS), kinds=["describe"])}  # fmt: skip
    assert not [q for q in found if "bounding box" in q or "slice" in q]  # of pictures only
    drawn = {s.masks[0].label: s.masks[0].array for s in conversations(group(scan(), ORGANS), kinds=["segment"])}
    assert drawn.keys() == {"liver", "spinal cord", "left kidney", "gallbladder", "liver lesion", "brain", "knee joint"}
    assert {n for n, a in drawn.items() if not a.any()} == {"gallbladder", "brain", "knee joint"} and drawn["brain"].shape == ABDOMEN
    targets = {s.masks[0].label for s in conversations(group(scan(), ORGANS), ("lung", "nuclei", "urinary bladder", "mandible", "liver"), kinds=["segment"])}
    assert targets == {"nuclei", "mandible", "liver"}  # lungs and bladder may reach into it


def test_a_long_volume_may_reach_anywhere():
    far = np.diag([3.0, 2, 2, 1])[[2, 1, 0, 3]] * np.array([20, 1, 1, 1])  # 6 slices of 60 mm
    assert not [q for q in plain(group(scan(far), ORGANS)) if "brain" in q or "knee" in q]


def test_a_fundus_photograph():
    first, second = at(2, 2, 4, 30), at(2, 3, 4, 30)
    samples = group(picture("fundus"), {"vessel": first, "vessel_observer2": second})
    drawn = {s.masks[0].label: s.masks[0].array for s in conversations(samples, ("vessels", "right lung", "consolidation", "nuclei", "optic disc"), kinds=["segment"])}
    assert np.array_equal(drawn.pop("vessels"), first)  # the second observer's is another opinion
    assert drawn.keys() == {"right lung", "consolidation", "nuclei"} and not any(a.any() for a in drawn.values())  # is there a disc? nobody says
    found = plain(samples)
    assert found["Which part of the body is shown?"] == "the eye" and found["Does this image show the vessels?"] == "yes"
    assert found["What kind of image is this?"] == "a fundus photograph" and found["Does this image show the knee joint?"] == "no"


CELLS = [("WBC", ((0, 0), (20, 32))), ("RBC", ((50, 64), (70, 96))), ("RBC", ((20, 0), (40, 32))), ("RBC", ((9, 5.5), (12, 5.5)))]
BLOOD = ("RBC", "WBC", "platelets")


def test_cells_in_boxes_are_counted_and_written_down():
    samples = group(picture("pathology", (100, 128)), boxes=CELLS)
    found = plain(samples, annotated=BLOOD)
    counts = {q: a for q, a in found.items() if q.startswith("How many")}
    assert counts == {"How many RBC are there?": "2", "How many WBC are there?": "1", "How many platelets are there?": "0"}  # a box without extent is none
    assert found["Give the bounding box of the WBC."] == '{"bbox_2d": [0, 0, 250, 200], "label": "WBC"}'
    assert found["Give the bounding boxes of the RBC."] == '[{"bbox_2d": [0, 200, 250, 400], "label": "RBC"}, {"bbox_2d": [500, 500, 750, 700], "label": "RBC"}]'
    assert found["Give the bounding box of the platelets."] == "There are no platelets." and found["Are there platelets in this microscopy image?"] == "no"
    assert found["Where is the WBC?"] == "In the upper left quarter of the picture." and found["Is the WBC in the lower right quarter of the picture?"] == "no"
    assert not [q for q in plain(samples) if "platelets" in q]
    written = {s.meta["kind"]: s for s in conversations(samples, kinds=["box"], variety=0) if "RBC" in s.question}["box"]
    assert boxes_in(written.answer, (100, 128)) == [(r.box, "RBC") for r in written.regions]
    assert boxes_text([r.box for r in written.regions], (100, 128), "RBC", written.meta["style"]) == written.answer  # it can be written anew
    (tokens,) = (s.answer for s in conversations(samples, kinds=["box"], style="paligemma") if "RBC" in s.answer)
    assert [box for box, _ in boxes_in(tokens, (1023, 1023), "paligemma")] == [((205, 0), (409, 256)), ((512, 512), (716, 767))]  # rows first, 1023 is the far edge
    drawn = {(s.masks or s.regions)[0].label: len(s.masks) for s in conversations(samples, annotated=BLOOD, kinds=["segment"])}
    assert drawn == {"WBC": 0, "platelets": 1}  # one box is a weak outline, of two there is none; what was looked for and not found is empty
    many = [("RBC", ((n, 0), (n + 1, 9))) for n in range(21)]
    found = plain(group(picture("pathology", (100, 128)), boxes=many))
    assert found["How many RBC are there?"] == "21" and not [q for q in found if "bounding" in q]


def test_a_box_beyond_the_edge_is_cut():
    found = plain(group(picture("pathology", (100, 100)), boxes=[("WBC", ((-5, 90), (10, 120)))]), "box")
    assert found == {"Give the bounding box of the WBC.": '{"bbox_2d": [900, 0, 1000, 100], "label": "WBC"}'}


def test_instances_of_a_manifest_are_counted(tmp_path):
    numbers = np.zeros(SIZE, np.uint16)
    for n, (top, left) in enumerate([(1, 1), (1, 4), (9, 20)], 1):
        numbers[top : top + 3, left : left + 3] = n * 100  # the first two touch
    Pillow.fromarray(numbers).save(tmp_path / "m.png")
    Pillow.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "i.png")
    row = {"id": "a", "image": "i.png", "modality": "pathology", "mask": {"type": "instance", "files": {"nucleus": "m.png"}}}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    (only,) = manifest.rows(tmp_path)
    assert plain(list(manifest.row_samples(only)), "count") == {"How many nuclei are there?": "3"}
    lesions = [Mask("i", "lesion", at(1, 1, 2, 2)), Mask("i", "lesion", at(9, 9, 2, 2))]
    apart = [Sample("s", None, {"i": picture("ct")}, masks=tuple(lesions), meta={"row": "s"})]
    assert plain(apart, "count", "box") == {"How many lesions are there?": "2"}  # and a box around both says little


def test_the_plane_of_a_slice():
    coronal = np.array([[0, 0, 1.0, 0], [2, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    found = plain(group(picture("mr", affine=coronal)), "plane")
    assert found.pop("In which plane is this slice?") == "coronal" and found.pop("Is this a coronal slice?") == "yes"
    ((question, answer),) = found.items()
    assert answer == "no" and question in ("Is this an axial slice?", "Is this a sagittal slice?")
    assert plain(group(picture("mr", affine=AXIAL)), "plane")["Is this an axial slice?"] == "yes"
    assert plain(group(picture("ct"), labels={}), "plane") == {} and plain(group(scan()), "plane") == {}


def test_texts():
    report = ("No pneumothorax. Left effusion.", {"sections": {"findings": "No pneumothorax. Left effusion."}})
    samples = group(picture(), texts=[report, ("A note.", {})])
    assert plain(samples, "report", "caption") == {"Write the report of this X-ray.": report[0], "Describe this image.": "A note."}
    assert plain(samples, "caption") == {"Describe this image.": "A note."}
    asked = replace(samples[1], turns=(Turn("user", "Report."), *samples[1].turns), verb="report")
    assert plain([asked], "asked") == {} and plain([asked], "report") == {"Report.": "A note."}
    beside = group(picture(), qa=[("What?", "A mass.")], caption="A mass in the liver.")
    assert plain(beside, "caption") == {"Describe this image.": "A mass in the liver."}
    read = plain(samples, "finding", label=lambda text: {"Pleural Effusion": 1, "pneumothorax": 0, "mass": None})
    assert read == {"Is there pleural effusion in this X-ray?": "yes", "Is there pneumothorax in this X-ray?": "no"}
    written = Sample("t", None, {}, (Turn("user", "What is it?"), Turn("assistant", "A mass.")), meta={"row": "t"})
    (text,) = conversations([written])
    assert text.meta["kind"] == "text" and text.answer == "A mass." and not text.labels and not text.images
    assert list(conversations([replace(written, turns=(Turn("assistant", "A report without an image."),))])) == [] == list(conversations([]))


def test_what_a_data_set_asks_keeps_its_turns_and_outlines():
    talk = (Turn("system", "Be brief."), Turn("user", "Is there a mass?"), Turn("assistant", "Yes."), Turn("user", "Where?"), Turn("assistant", "<|seg|>"))
    mask = Mask("i", "mass", at(2, 2, 3, 3))
    samples = group(picture("ct"), {"mass": mask.array})
    samples.append(replace(samples[0], id="talk", turns=talk, choices=("a", "b")))
    (asked,) = conversations(samples, kinds=["asked"])
    assert asked.turns == talk and asked.masks[0].label == "mass" and asked.choices == ("a", "b") and asked.meta["qid"] == "talk"
    said = (Turn("user", "What grows there?"), Turn("assistant", "A mass <|seg|> beside another part <|seg|>."))
    pointed = replace(samples[0], turns=said, masks=(Mask("i", "What grows there?", mask.array),) * 2)
    assert [(s.meta["kind"], len(s.masks)) for s in conversations([pointed], kinds=["asked", "segment", "finding", "count", "locate"])] == [("asked", 2)]


def test_several_images():
    images = {"t1": scan(modality="mr"), "flair": scan(modality="mr")}
    for name, image in images.items():
        image.id = name
    base = Sample("b", "p", images, labels={"tumour": 1.0}, meta={"row": "b"})
    samples = [replace(base, masks=(Mask("flair", "oedema", ORGANS["liver"]),)), replace(base, turns=(Turn("user", "Which grade?"), Turn("assistant", "IV")))]
    found = list(conversations(samples, variety=0))
    assert {s.meta["kind"] for s in found} == {"segment", "asked", "finding", "describe"} and all(s.images == images for s in found)
    assert [(s.masks[0].image, s.masks[0].label) for s in found if s.masks] == [("flair", "oedema")]


@pytest.mark.parametrize("modality", ["xray", "ct", "mr", "fundus", "pathology", "endoscopy"])
def test_only_what_is_labelled_is_asked(modality):
    lot = np.random.default_rng(0)
    names = ("polyp", "mass", "oedema", "fracture", "normal")
    for n in range(30):
        labels = {k: float(lot.choice([0, 1, np.nan])) for k in names}
        found = list(conversations(group(picture(modality), labels=labels, row=f"r{n}")))
        asked = {k: {s.answer for s in found if s.meta["kind"] == "finding" and k in s.question} for k in names}
        assert asked == {k: set() if np.isnan(v) or k == "normal" else {"yes" if v else "no"} for k, v in labels.items()}
        for s in found:
            if s.meta["kind"] == "describe":
                name = next(k for k in names if k in s.question)
                assert sentences.denies(s.answer) == (labels[name] == 0) and name in s.answer.lower()
        assert not [s for s in found if s.meta["kind"] in ("segment", "locate", "box", "count")]
        ill = {s.answer for s in found if s.meta["kind"] == "abnormal"}
        sick = any(labels[k] == 1 for k in names[:4])
        assert ill == ({"yes"} if labels["normal"] == 0 or sick and labels["normal"] != 1 else {"no"} if labels["normal"] == 1 and not sick else set())


def test_wordings_vary_by_id_and_the_plainest_is_the_commonest():
    groups = [group(picture(), labels={"nodule": float(n % 2)}, row=f"r{n}") for n in range(400)]
    asked = Counter(s.question for g in groups for s in conversations(g, kinds=["finding"]))
    assert set(asked) == {"Is there nodule in this X-ray?", "Does this X-ray show a nodule?", "Is a nodule seen here?", "Can you see a nodule?"}
    (plainest, count), *others = asked.most_common()
    assert plainest == "Is there nodule in this X-ray?" and 200 < count < 280 and all(30 < c < 80 for _, c in others)
    again = Counter(s.question for g in groups for s in conversations(g, kinds=["finding"]))
    assert asked == again
    for samples in (group(picture(view="PA"), CHEST), group(scan(), ORGANS), group(picture("pathology", (100, 128)), boxes=CELLS)):
        few, varied = (list(conversations(samples, variety=v)) for v in (0, 1))
        assert [(s.id, s.answer, s.meta["kind"]) for s in few] == [(s.id, s.answer, s.meta["kind"]) for s in varied]
        assert all(a.question != b.question for a, b in zip(few, varied) if a.meta["kind"] not in ("describe", "asked"))
    assert all(len(set(q)) == len(q) >= 3 for k, q in instruct.ASK.items() if k != "none")


def swapped(text):
    return re.sub(r"\b(left|right)\b", lambda m: {"left": "right", "right": "left"}[m[0]], text, flags=re.I)


def talk(samples):
    """The conversations in the plainest words without coordinates, as a bag."""
    kinds = [k for k in instruct.KINDS if k != "box"]
    return Counter((s.meta["kind"], s.question, s.answer) for s in conversations(samples, variety=0, kinds=kinds, annotated=ANNOTATED))


def other_side(name):
    return re.sub("left|right", lambda m: {"left": "right", "right": "left"}[m[0]], name)


@pytest.mark.parametrize("where", [(6, 4), (6, 28), (12, 30), (11, 6)])
def test_a_mirrored_xray_exchanges_the_sides(where):
    masks = CHEST | {"consolidation": at(*where, 4, 4), "pleural_effusion": at(5, 5, 6, 8) | at(5, 26, 6, 8)}
    film = picture(view="PA")
    here = talk(group(film, masks))
    assert any(re.search(r"right|left", a) for _, _, a in here)
    there = talk(group(film, {other_side(k): a[:, ::-1] for k, a in masks.items()}))  # the mirror image of the patient
    assert there == Counter({(k, swapped(q), swapped(a)): n for (k, q, a), n in here.items()}) != here
    finding = talk(group(film, masks | {"consolidation": masks["consolidation"][:, ::-1]}))  # the finding alone
    said = {(q, a) for k, q, a in here if "consolidation" in q and k in ("locate", "describe")}
    assert {(q, a) for k, q, a in finding if "consolidation" in q and k in ("locate", "describe")} == {(swapped(q), swapped(a)) for q, a in said}
    turned = talk(group(picture(), {k: a[:, ::-1] for k, a in masks.items()}))  # a film hung the wrong way round: the lungs tell the side
    assert turned == talk(group(picture(), masks))


def test_a_mirrored_volume_exchanges_the_sides_unless_its_affine_is_mirrored_too():
    here = talk(group(scan(), ORGANS))
    mirrored = {other_side(k): a[..., ::-1] for k, a in ORGANS.items()}
    assert talk(group(scan(), mirrored)) == Counter({(k, swapped(q), swapped(a)): n for (k, q, a), n in here.items()}) != here
    affine = AXIAL.copy()
    affine[:3, 3] += affine[:3, 2] * (ABDOMEN[2] - 1)
    affine[:3, 2] *= -1  # the same patient, stored the other way
    assert talk(group(scan(affine), {k: a[..., ::-1] for k, a in ORGANS.items()})) == here


def test_boxes_of_a_mirrored_picture_are_mirrored():
    (here,), (there,) = (
        list(conversations(group(picture("ct"), {"mass": a}), kinds=["box"])) for a in (at(6, 4, 4, 4), at(6, 4, 4, 4)[:, ::-1])
    )
    (((t, l), (b, r)), _), ((box, _)) = boxes_in(here.answer, SIZE)[0], boxes_in(there.answer, SIZE)[0]
    assert box == ((t, SIZE[1] - r), (b, SIZE[1] - l)) and there.regions[0].box == ((6, 32), (10, 36))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["fundus_chase", "path_bccd", "path_dsb_nuclei", "vol_totalseg", "vol_deeplesion", "vqa_rad", "xray_covid"])
def test_every_data_set_has_something_to_say(data, name):
    said, ids = defaultdict(set), []
    for row in islice(manifest.rows(data / name, "train" if name == "vol_deeplesion" else "val"), 12):
        group = list(manifest.row_samples(row))
        for s in conversations(group, annotated=BLOOD if name == "path_bccd" else ANNOTATED if name == "xray_covid" else ()):
            said[s.meta["kind"]].add(s.answer)
            ids.append(s.id)
            assert s.answer and s.question and s.answer.count("<|seg|>") == len(s.masks) + len(s.regions) * (s.meta["kind"] == "segment"), s.id
            assert all(m.array.shape == s.images[m.image].shape[1:] for m in s.masks)
    kinds = {"fundus_chase": {"segment", "organ"}, "path_bccd": {"count", "box", "finding", "locate"}, "path_dsb_nuclei": {"count", "segment"},
             "vol_totalseg": {"segment", "organ", "locate"}, "vol_deeplesion": {"segment", "finding"}, "vqa_rad": {"asked", "organ"},
             "xray_covid": {"segment", "asked", "finding", "describe", "view", "locate", "caption", "organ"}}  # fmt: skip
    assert said.keys() >= kinds[name] | {"modality"} and len(set(ids)) == len(ids)
    assert {"yes", "no"} <= said["modality"]


@cache
def nothing(shape):
    return hashlib.sha256(np.packbits(np.zeros(shape, bool)).tobytes()).hexdigest()


def digest(array):
    return hashlib.sha256(np.packbits(array).tobytes()).hexdigest() if array.any() else nothing(array.shape)


def lines(samples):
    for s in samples:
        masks = [(m.image, m.label, m.array.shape, digest(m.array)) for m in s.masks]
        regions = [(r.image, r.label, [[float(x) for x in c] for c in r.box]) for r in s.regions]
        labels = sorted((k, float(v)) for k, v in s.labels.items())
        yield json.dumps([s.id, s.patient, list(s.images), [[t.role, t.text] for t in s.turns], masks, regions, labels, s.group, s.meta["kind"],
                          s.meta["row"], s.meta["split"], s.meta.get("qid")])  # fmt: skip


def learnt(data, name, split):
    """What the bundled model learns from a data set."""
    for row in manifest.rows(data / name.partition("/")[0], split):
        yield from recipe.samples(list(manifest.row_samples(row)), name, split)


FROZEN = {
    ("xray_covid", "train"): (7611, "82b1533535b65bfb"),
    ("xray_covid", "val"): (1407, "e45e32d2df232068"),
    ("xray_covid/outlined", "train"): (3889, "0bad6e5852def391"),
    ("fundus_chase/windows", "val"): (98, "b4e917e732eae2d8"),
    ("path_dsb_nuclei/windows", "val"): (234, "f8f468ee9eb7831a"),
    ("vqa_rad", "train"): (4785, "2074335c3a5e854a"),
    ("vqa_rad", "val"): (1148, "ed8f0d2a8097e628"),
    ("fundus_chase", "train"): (736, "10fd8837e2f86af4"),
    ("fundus_chase", "val"): (46, "0e1f07723711cb19"),
    ("path_bccd", "train"): (2773, "8af80faca78ea4ae"),
    ("path_bccd", "val"): (1171, "e79bda26be158cff"),
    ("path_dsb_nuclei", "train"): (858, "d853afebb06e531b"),
    ("path_dsb_nuclei", "val"): (260, "dc9c095faf5d2453"),
    ("vol_deeplesion", "train"): (770, "de987d9d14efabd0"),
    ("vol_totalseg", "train"): (2030, "9504b912899a1da6"),
    ("vol_totalseg", "val"): (915, "bb42c2534a13a204"),
    ("report_iu", "train"): (33445, "3336554be2279e3e"),
    ("report_iu", "val"): (4615, "ae861c31e2bd316e"),
}  # fmt: skip
"""(conversations, first 16 digits of their SHA-256) that the bundled model was trained on."""


@pytest.mark.shared
@pytest.mark.parametrize(("name", "split"), FROZEN)
def test_the_bundled_model_learns_what_it_learnt_and_nothing_of_another_split(data, name, split):
    samples = list(learnt(data, name, split))
    found = list(lines(samples))
    assert (len(found), hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]) == FROZEN[name, split]
    rows = {s: list(manifest.rows(data / name.partition("/")[0], s)) for s in ("train", "val", "test")}
    others = [r for s, there in rows.items() if s != split for r in there]
    whole = {re.split("[@~]", s.meta["row"])[0] for s in samples}  # "@": a slice of a volume or a window of a picture, "~": its mirror image, "!": exported
    assert whole <= {r["id"] for r in rows[split]} - {r["id"] for r in others}
    assert {s.meta["split"] for s in samples} == {split} and not {s.patient for s in samples} & {r.get("patient") for r in others} - {None}


def test_the_text_of_a_report_is_never_learnt(data, tmp_path):
    """The recipe's conversations are the same whatever the reports say: only their structured labels are read."""
    rows = [json.loads(r) for r in (data / "report_iu/manifest.jsonl").read_text().splitlines()[:300]]
    said = []
    for name, change in (("as it is", {}), ("poisoned", {"text": "FINDINGS: XYZZY.", "sections": {"findings": "XYZZY"}})):
        (tmp_path / name / "report_iu").mkdir(parents=True)
        (tmp_path / name / "report_iu/manifest.jsonl").write_text("\n".join(json.dumps(r | change) for r in rows))
        said.append([(s.id, [t.text for t in s.turns]) for s in learnt(tmp_path / name, "report_iu", "train")])
    assert said[0] == said[1] and len(said[0]) > 500 and "XYZZY" not in str(said[1])
