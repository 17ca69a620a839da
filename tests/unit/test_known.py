"""What a question asks of the heads, and that all else is left to the language model."""

import pytest

from medvlm.predictors.known import answer, asked

GROUPS = {"modality": ("xray", "ct", "mr", "fundus", "pathology"), "view": ("PA", "AP"), "plane": ("axial", "coronal", "sagittal"),
          "part": ("head", "chest", "abdomen", "eye"), "eye": ("right", "left")}  # fmt: skip
FINDINGS, TARGETS = ("pneumothorax", "COVID-19 pneumonia", "pleural effusion"), ("liver", "right kidney", "vessels")


@pytest.mark.parametrize(("question", "wanted"), [
    ("Is this a CT scan?", ("modality", "ct")), ("Is this a CT scan? Answer yes or no.", ("modality", "ct")), ("Is this an X-ray?", ("modality", "xray")), ("Is the picture a chest X-ray?", ("modality", "xray")),
    ("Is this a fundus photograph?", ("modality", "fundus")), ("Is this an MRI?", ("modality", "mr")), ("What kind of image is this?", ("modality", None)),
    ("Which imaging modality is this?", ("modality", None)), ("What type of imaging is this?", ("modality", None)), ("What modality was used?", ("modality", None)),
    ("Is this an axial slice?", ("plane", "axial")), ("Is the slice coronal?", ("plane", "coronal")), ("In which plane is this slice?", ("plane", None)),
    ("Which plane does this slice show?", ("plane", None)), ("Is this an image of the chest?", ("part", "chest")), ("Does this image show the abdomen region?", ("part", "abdomen")),
    ("Which part of the body is shown?", ("part", None)), ("Is this the left eye?", ("eye", "left")), ("Which eye is this?", ("eye", None)),
    ("Is there a pneumothorax?", ("finding", "pneumothorax")), ("Is there evidence of a pleural effusion?", ("finding", "pleural effusion")),
    ("Does this chest X-ray show pleural effusion?", ("finding", "pleural effusion")), ("Is there COVID-19 pneumonia in this chest X-ray?", ("finding", "COVID-19 pneumonia")),
    ("Does this image show the liver?", ("target", "liver")), ("Is the right kidney in this image?", ("target", "right kidney")), ("Can the liver be seen here?", ("target", "liver")),
])  # fmt: skip
def test_what_the_heads_know_is_asked_of_them(question, wanted):
    assert asked(question, GROUPS, FINDINGS, TARGETS) == wanted


@pytest.mark.parametrize("question", [
    "Is there a pneumothorax on the left?", "Is the pleural effusion large?", "Is this a normal chest X-ray?", "Is there a fracture?", "Is this a PA or AP film?",
    "How large is the liver?", "Is the liver enlarged?", "Is this patient female?", "What is the abnormality?", "Is there a mass in the liver?", "Is this image normal?",
    "What kind of lesion is this?", "Is this a CT scan with contrast?", "Which organ is abnormal?", "Is there no pneumothorax?", "",
])  # fmt: skip
def test_what_goes_further_is_not(question):
    assert asked(question, GROUPS, FINDINGS, TARGETS) is None


def test_only_what_the_model_has_is_asked_of_it():
    assert asked("Is this an axial slice?", {"modality": ("ct",)}, (), ()) is None and asked("Is there a pneumothorax?", GROUPS, (), ()) is None


def test_answers_are_the_heads_own_chances():
    chances = {"modality:ct": 0.7, "modality:mr": 0.3, "pneumothorax": 0.2, "part:head": 0.1, "part:chest": 0.9}
    never = lambda target: pytest.fail(f"{target} was looked for")  # noqa: E731
    assert answer(asked("Is this an MRI?", GROUPS, (), ()), chances, never) == ("no", 0.7, {"yes": 0.3, "no": 0.7})
    assert answer(asked("What kind of image is this?", GROUPS, (), ()), chances, never) == ("a CT scan", 0.7, None)
    assert answer(asked("Which part of the body is shown?", GROUPS, (), ()), chances, never) == ("the chest", 0.9, None)
    assert answer(asked("Is there a pneumothorax?", GROUPS, FINDINGS, ()), chances, never)[0] == "no"
    assert answer(asked("Is the liver seen?", GROUPS, (), TARGETS), chances, {"liver": 0.6}.get) == ("yes", 0.6, {"yes": 0.6, "no": 0.4})
