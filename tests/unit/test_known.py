"""What a question asks of the heads, and that all else is left to the language model."""

import numpy as np
import pytest

from medvlm.datasets.facts import case_of
from medvlm.imaging.scan import Image
from medvlm.predictors.known import Asked, answer, asked, chosen, measured
from medvlm.predictors.native import choices_of
from medvlm.sample import Mask, Region, Sample

GROUPS = {"modality": ("xray", "ct", "mr", "fundus", "pathology"), "view": ("PA", "AP"), "plane": ("axial", "coronal", "sagittal"),
          "part": ("head", "chest", "abdomen", "eye"), "eye": ("right", "left")}  # fmt: skip
FINDINGS, TARGETS, BOXED = ("pneumothorax", "COVID-19 pneumonia", "pleural effusion"), ("liver", "right kidney", "vessels"), ("RBC", "WBC")


@pytest.mark.parametrize(("question", "wanted"), [
    ("Is this a CT scan?", ("modality", "ct")), ("Is this a CT scan? Answer yes or no.", ("modality", "ct")), ("Is this an X-ray?", ("modality", "xray")), ("Is the picture a chest X-ray?", ("modality", "xray")),
    ("Is this a fundus photograph?", ("modality", "fundus")), ("Is this an MRI?", ("modality", "mr")), ("What kind of image is this?", ("modality", None)),
    ("Which imaging modality is this?", ("modality", None)), ("What type of imaging is this?", ("modality", None)), ("What modality was used?", ("modality", None)),
    ("What imaging modality was used to take this image?", ("modality", None)), ("What type of scan is this?", ("modality", None)), ("In what plane is this CT scan taken?", ("plane", None)),
    ("What part of the body does this X-ray show?", ("part", None)),
    ("Is this an axial slice?", ("plane", "axial")), ("Is the slice coronal?", ("plane", "coronal")), ("In which plane is this slice?", ("plane", None)),
    ("Which plane does this slice show?", ("plane", None)), ("Is this an image of the chest?", ("part", "chest")), ("Does this image show the abdomen region?", ("part", "abdomen")),
    ("Which part of the body is shown?", ("part", None)), ("Is this the left eye?", ("eye", "left")), ("Which eye is this?", ("eye", None)),
    ("Is there a pneumothorax?", ("finding", "pneumothorax")), ("Is there evidence of a pleural effusion?", ("finding", "pleural effusion")),
    ("Does this chest X-ray show pleural effusion?", ("finding", "pleural effusion")), ("Is there COVID-19 pneumonia in this chest X-ray?", ("finding", "COVID-19 pneumonia")),
    ("Does this image show the liver?", ("target", "liver")), ("Is the right kidney in this image?", ("target", "right kidney")), ("Can the liver be seen here?", ("target", "liver")),
])  # fmt: skip
def test_what_the_heads_know_is_asked_of_them(question, wanted):
    assert asked(question, GROUPS, FINDINGS, TARGETS) == (*wanted, None)


@pytest.mark.parametrize(("question", "wanted"), [
    ("Is the liver on the right?", ("place", "liver", "on the right")), ("Is the liver on the patient's left side? Answer yes or no.", ("place", "liver", "on the patient's left side")),
    ("Are the vessels in the upper left quarter of the picture?", ("place", "vessels", "in the upper left quarter of the picture")),
    ("Can the WBC be found in the lower right quarter of the picture?", ("place", "WBC", "in the lower right quarter of the picture")),
    ("Where is the liver?", ("where", "liver", None)), ("Locate the white cell.", ("where", "WBC", None)), ("Which side is the liver on?", ("where", "liver", None)),
    ("How large is the right kidney?", ("size", "right kidney", None)), ("What is the volume of the liver?", ("size", "liver", None)),
    ("How many WBC are there?", ("count", "WBC", None)), ("Count the RBC.", ("count", "RBC", None)), ("How many white cells are there in this image?", ("count", "WBC", None)),
])  # fmt: skip
def test_where_how_large_and_how_many_is_asked_of_what_was_drawn(question, wanted):
    assert asked(question, GROUPS, FINDINGS, TARGETS, BOXED, {"white cells": "WBC", "white cell": "WBC"}) == wanted


@pytest.mark.parametrize("question", [
    "Is there a pneumothorax on the left?", "Is the pleural effusion large?", "Is this a normal chest X-ray?", "Is there a fracture?", "Is this a PA or AP film?",
    "Is the liver enlarged?", "Is the liver in the left upper lobe?", "How many livers are there?", "How many ribs are fractured?", "How large is the tumour in the liver?",
    "Where is the fracture?", "Is the liver on the right larger?", "Is this patient female?", "What is the abnormality?", "Is there a mass in the liver?", "Is this image normal?",
    "What imaging findings suggest pneumonia?", "Which scan shows the tumor?", "What study should be done next?", "Which body part is fractured?", "Which plane of the pelvis is fractured?",
    "What kind of lesion is this?", "Is this a CT scan with contrast?", "Which organ is abnormal?", "Is there no pneumothorax?", "",
])  # fmt: skip
def test_what_goes_further_is_not(question):
    assert asked(question, GROUPS, FINDINGS, TARGETS, BOXED) is None


def test_only_what_the_model_has_is_asked_of_it():
    assert asked("Is this an axial slice?", {"modality": ("ct",)}, (), ()) is None and asked("Is there a pneumothorax?", GROUPS, (), ()) is None


def test_of_the_answers_allowed_the_likeliest_is_given_in_their_words():
    chances = {"modality:ct": 0.5, "modality:mr": 0.3, "modality:xray": 0.2, "part:head": 1.0}
    wanted = asked("What modality is this?", GROUPS, (), ())
    text, sure, shares = chosen(wanted, chances, ("MRI", "CT scan", "Ultrasound"))
    assert text == "CT scan" and sure == pytest.approx(0.625) and shares == {"MRI": pytest.approx(0.375), "CT scan": pytest.approx(0.625), "Ultrasound": 0.0}
    assert chosen(wanted, chances, ("CT", "Ultrasound")) is None and chosen(wanted, chances, ("T1", "T2")) is None


@pytest.mark.parametrize(("question", "choices"), [
    ("Can you describe the findings?", None), ("Could you please list the abnormalities?", None), ("Would you explain what is shown?", None), ("Will you show me the liver?", None),
    ("Can you see a fracture?", ("yes", "no")), ("Would you describe the mass as cystic?", ("yes", "no")), ("Would you expect an effusion?", ("yes", "no")),
])  # fmt: skip
def test_a_request_is_no_yes_no_question(question, choices):
    assert choices_of(question) == choices


def test_answers_are_the_heads_own_chances():
    chances = {"modality:ct": 0.7, "modality:mr": 0.3, "pneumothorax": 0.2, "part:head": 0.1, "part:chest": 0.9}
    never = lambda target: pytest.fail(f"{target} was looked for")  # noqa: E731
    assert answer(asked("Is this an MRI?", GROUPS, (), ()), chances, never) == ("no", 0.7, {"yes": 0.3, "no": 0.7})
    assert answer(asked("What kind of image is this?", GROUPS, (), ()), chances, never) == ("a CT scan", 0.7, None)
    assert answer(asked("Which part of the body is shown?", GROUPS, (), ()), chances, never) == ("the chest", 0.9, None)
    assert answer(asked("Is there a pneumothorax?", GROUPS, FINDINGS, ()), chances, never)[0] == "no"
    assert answer(asked("Is the liver seen?", GROUPS, (), TARGETS), chances, {"liver": 0.6}.get) == ("yes", 0.6, {"yes": 0.6, "no": 0.4})


def film(**outlines):
    """Lungs of 10 x 5 pixels each, the patient's right one on the left, and what else is drawn."""
    image = Image("x", np.zeros((1, 20, 20), np.uint8), None, "xray", "uint8", {"view": "PA"})
    drawn = {"right lung": (slice(5, 15), slice(2, 7)), "left lung": (slice(5, 15), slice(12, 17))} | outlines
    masks = []
    for name, place in drawn.items():
        array = np.zeros((20, 20), bool)
        array[place] = place is not None
        masks.append(Mask("x", name, array))
    return case_of([Sample("s", images={"x": image}, masks=tuple(masks))])


def test_a_place_is_as_likely_as_what_is_drawn_there():
    both = film(consolidation=(slice(5, 10), slice(6, 15)))  # 5 pixels in the right lung, 15 in the left one
    place = lambda words, case=both, present=0.8: measured(Asked("place", "consolidation", words), case, present)  # noqa: E731
    assert place("in the left lung") == ("yes", pytest.approx(0.6), {"yes": pytest.approx(0.6), "no": pytest.approx(0.4)})
    assert place("on the right")[2]["yes"] == pytest.approx(0.2) and place("in the right lung")[0] == "no"
    assert place("in the lower left quarter of the image, by the patient's own sides")[2]["yes"] == 0
    assert place("in the upper left quarter of the image, by the patient's own sides")[2]["yes"] == pytest.approx(0.8 * 25 / 45)
    assert place("in the upper left quarter of the picture") is None  # an X-ray's sides are the patient's
    assert place("in the left lung", film(), 0.3)[2]["yes"] == pytest.approx(0.15)  # nothing drawn: no side is likelier


def test_where_it_lies_and_how_large_it_is():
    where = lambda case: measured(Asked("where", "consolidation"), case, 0.8)[0]  # noqa: E731
    assert where(film(consolidation=(slice(5, 10), slice(6, 15)))) == "in both lungs"
    assert where(film(consolidation=(slice(5, 10), slice(12, 15)))) == "in the left lung"
    assert measured(Asked("where", "consolidation"), film(consolidation=None), 0.2) == ("there is no consolidation", 0.8, None)
    heart = measured(Asked("where", "heart"), film(heart=(slice(4, 9), slice(6, 14))), 0.9)[0]  # evenly in two quarters
    assert heart == "in more than one quarter of the image, by the patient's own sides"
    assert measured(Asked("size", "consolidation"), film(consolidation=(slice(0, 5), slice(0, 5))), 0.8, "12.5 mm2") == ("12.5 mm2", 0.8, None)
    assert measured(Asked("size", "consolidation"), film(), 0.2, None) == ("there is no consolidation", 0.8, None)


def test_objects_are_counted():
    image = Image("x", np.zeros((3, 20, 20), np.uint8), None, "pathology", "uint8", {})
    cells = tuple(Region("x", "WBC", ((at, at), (at + 3, at + 3))) for at in (0, 5))
    case = case_of([Sample("s", images={"x": image}, regions=cells)])
    assert measured(Asked("count", "WBC"), case, 0.9) == ("2", 0.9, None) and measured(Asked("count", "RBC"), case, 0.1) == ("0", 0.9, None)
    assert measured(Asked("place", "WBC", "in the upper left quarter of the picture"), case, 0.9)[0] == "yes"


def test_what_is_there_and_was_not_drawn_is_not_denied():
    picture = Image("x", np.zeros((1, 8, 8), np.uint8), None, "xray", "uint8", {})
    case = case_of([Sample("s", images={"x": picture}, masks=(Mask("x", "liver", np.zeros((8, 8), bool)),))])
    assert measured(Asked("where", "liver"), case, 0.9) is None and measured(Asked("size", "liver"), case, 0.9) is None
    assert measured(Asked("where", "liver"), case, 0.1) == ("there is no liver", 0.9, None)


def test_a_device_lies_in_no_lung_and_a_side_is_no_lung():
    picture = Image("x", np.zeros((1, 40, 40), np.uint8), None, "xray", "uint8", {"view": "PA"})
    right, left, tube = (np.zeros((40, 40), bool) for _ in range(3))
    right[5:35, 2:15], left[5:35, 25:38], tube[0:30, 14:16] = True, True, True
    case = case_of([Sample("s", images={"x": picture}, masks=(Mask("x", name, array),)) for name, array in (("right lung", right), ("left lung", left), ("endotracheal tube", tube))])
    assert measured(Asked("place", "endotracheal tube", "in the right lung"), case, 0.95) is None
    assert "lung" not in measured(Asked("where", "endotracheal tube"), case, 0.95)[0]
    assert measured(Asked("place", "right lung", "in the left lung"), case, 0.95) is None
