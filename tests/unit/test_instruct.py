"""Conversations out of labels: facts, sides, sentences; and what must never be learnt from."""

import json
from itertools import product

import numpy as np
import pytest

from medvlm.datasets import instruct, manifest, sentences
from medvlm.datasets.instruct import conversations, describe, fact_of, facts, side_of
from medvlm.imaging.scan import Image
from medvlm.recipes import medvlm_tiny as recipe
from medvlm.sample import Mask


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


def row(**more):
    return {"id": "r", "modality": "xray", "patient": "p", "split": "train"} | more


def test_what_a_row_states_and_what_it_leaves_open():
    assert facts(row(findings={"pneumonia": 1, "covid-19": 0, "ards": None})) == {"pneumonia": 1, "COVID-19 pneumonia": 0}
    drawn = facts(row(mask={"type": "binary", "files": {"consolidation": "a", "left_lung": "b"}}))
    assert drawn["consolidation"] == 1 and drawn["pneumothorax"] == 0 and set(drawn) == set(instruct.ANNOTATED)
    assert facts(row(labels={"intubation_present": "Y"})) == {"endotracheal tube": 1} and facts(row(labels={"intubation_present": "?"})) == {}
    asked = [{"qid": 1, "question": "Is there consolidation?", "answer": "no"}, {"qid": 2, "question": "Is there a pneumothorax?", "answer": "yes"}]
    assert facts(row(qa=asked, findings={"consolidation": 1})) == {"consolidation": 1, "pneumothorax": 1}  # what was labelled stands
    assert facts(row(modality="ct", findings={"pneumonia": 1})) == {}


SIZE = (20, 40)
RIGHT, LEFT = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
RIGHT[4:16, 2:16] = True  # the patient's right lung is on the left of the picture
LEFT[4:16, 24:38] = True


def at(top, left, height, width):
    array = np.zeros(SIZE, bool)
    array[top : top + height, left : left + width] = True
    return array


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


def spoken(row, masks=()):
    image = Image("xray-1", np.zeros((1, *SIZE), np.uint8), None, row["modality"], "uint8")
    return list(conversations(row, image, [Mask("xray-1", name, array) for name, array in masks], ("right lung", "left lung", "consolidation", "pneumothorax")))


def test_conversations_of_an_annotated_picture():
    files = {"right_lung": "a", "left_lung": "b", "consolidation": "c"}
    qa = [{"qid": 9, "question": "Where?", "answer": "Right Lung", "pair": "p"}]
    found = spoken(row(mask={"type": "binary", "files": files}, qa=qa, labels={"view": "AP Supine"}), [("right_lung", RIGHT), ("left_lung", LEFT), ("consolidation", at(6, 4, 4, 4))])
    drawn = {s.masks[0].label: s.masks[0].array for s in found if s.meta["kind"] == "segment"}
    assert np.array_equal(drawn["right lung"], RIGHT) and np.array_equal(drawn["left lung"], LEFT) and not drawn["pneumothorax"].any()
    assert all(s.question == f"Segment the {s.masks[0].label}." and s.answer == "<|seg|>" for s in found if s.meta["kind"] == "segment")
    said = {s.question: s.answer for s in found}
    assert said["Where?"] == "right lung" and said["Is there consolidation in this chest X-ray?"] == "yes" and said["Is there pneumothorax in this chest X-ray?"] == "no"
    assert said["Is this a PA or AP film?"] == "AP" and said["Is this a chest X-ray?"] == "yes"
    told = [s.answer for s in found if s.meta["kind"] == "describe" and "consolidation" in s.question]
    assert told and all("on the right" in t for t in told)
    assert len({s.id for s in found}) == len(found) and {s.patient for s in found} == {"p"} and {s.meta["row"] for s in found} == {"r"}


def test_boxes_are_weak_outlines_in_index_order():
    found = spoken(row(boxes=[{"label": "left_lung", "xyxy": [24, 4, 38, 16]}]))
    (drawn,) = [s for s in found if s.meta["kind"] == "segment"]
    assert drawn.regions[0].box == ((4, 24), (16, 38)) and drawn.regions[0].label == "left lung" and not drawn.masks


def test_a_foreign_picture_has_nothing_to_outline():
    found = spoken(row(modality="ct", qa=[{"qid": 1, "question": "Is there a mass?", "answer": "yes"}], findings={"pneumonia": 1}))
    assert all(not s.masks[0].array.any() for s in found if s.meta["kind"] == "segment")
    said = {s.question: s.answer for s in found}
    assert said["Is this a chest X-ray?"] == "no" and "Is there a mass?" not in said and said["What kind of image is this?"] == "a CT slice"


def test_the_text_of_a_report_is_never_learnt(data, tmp_path):
    """The recipe's conversations are the same whatever the reports say: only their structured labels are read."""
    rows = [json.loads(r) for r in (data / "report_iu/manifest.jsonl").read_text().splitlines()[:300]]
    learnt = []
    for name, change in (("as it is", {}), ("poisoned", {"text": "FINDINGS: XYZZY.", "sections": {"findings": "XYZZY"}})):
        (tmp_path / name / "report_iu").mkdir(parents=True)
        (tmp_path / name / "report_iu/manifest.jsonl").write_text("\n".join(json.dumps(r | change) for r in rows))
        learnt.append([(s.id, [t.text for t in s.turns]) for s in recipe.samples(tmp_path / name, "report_iu", "train")])
    assert learnt[0] == learnt[1] and len(learnt[0]) > 500 and "XYZZY" not in str(learnt[1])


@pytest.mark.parametrize("name", ["xray_covid", "vqa_rad", "report_iu", "vol_totalseg"])
def test_no_row_of_test_or_val_is_learnt_from(data, name):
    kept = {r["id"] for r in manifest.rows(data / name, "train")}
    others = {r["id"] for s in ("val", "test") for r in manifest.rows(data / name, s)}
    patients = {r.get("patient") for s in ("val", "test") for r in manifest.rows(data / name, s)} - {None}
    seen = set()
    for s in recipe.samples(data, name, "train"):
        source = s.meta["row"].partition("@")[0]  # a slice of a volume
        assert source in kept and s.meta["split"] == "train" and source not in others and s.patient not in patients
        seen.add(s.id)
        if len(seen) > 1500:
            break
    assert seen
