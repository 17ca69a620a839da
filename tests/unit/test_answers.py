"""What answers say: readers of yes, no and choices, and normal forms."""

import time

import pytest

from medvlm.evaluate.answers import (
    normalise,
    pick_choice,
    pick_choices,
    probmed_match,
    said,
    slake_normalise,
    vqa_normalise,
    yes_no,
)

ANSWERS = [  # (answer, what a careful person reads in it)
    # plain
    ("Yes", "yes"), ("no", "no"), ("NO.", "no"), ("yes!", "yes"), ("  Yes \n", "yes"), ("Nope", "no"), ("(no)", "no"),
    # more is said after the word
    ("Yes. No effusion.", "yes"), ("Yes, no effusion is seen.", "yes"), ("yes, it does", "yes"), ("Yes there is", "yes"), ("no, there is not", "no"),
    ("no, absent", "no"), ("no it is not", "no"), ("No - the lungs are clear", "no"), ("No (95%)", "no"),
    ("yes\n\nThere is no nodule on the left.", "yes"),
    ("Yes, there is probably a small effusion", "yes"), ("No, there is no effusion.", "no"),
    # a "no" that belongs to a noun, or to another word, is no answer
    ("There is no effusion", None), ("No effusion", None), ("No evidence of pneumothorax.", None), ("Nodule", None), ("Nodule is present", None),
    ("Normal", None), ("Normal chest.", None), ("None", None), ("Noted", None), ("eyes", None), ("Non-contrast CT", None), ("no-contrast CT", None),
    ("No. 2 rib", None), ("", None), (" . ", None),
    # hedges, both, refusals
    ("Not sure", None), ("Maybe yes", None), ("Yes, probably", None), ("Yes?", None), ("It is unclear. Yes or No", None), ("Yes/No", None),
    ("Yes, no", None),
    ("Please answer yes or no", None), ("If yes, see below", None), ("The answer is probably yes", None), ("The answer is not yes", None),
    ("No, I am not sure.", None), ("Yes, but I don’t know why", None), ("I cannot say yes", None), ("As an AI, no.", None), ("I don't know", None),
    ("I'm sorry, but I cannot answer that.", None), ("No, I cannot see the image.", None), ("No. No image was provided.", None),
    ("Yes. The answer is no.", None),
    # where the answer stands elsewhere
    ("The answer is yes.", "yes"), ("Answer: Yes, the heart is enlarged", "yes"), ("The answer to the question is no.", "no"), ("A: yes", "yes"),
    ("Final answer: **No**", "no"), ("Is there an effusion? No, there is none.", "no"), ("Q: Is it? A: No", "no"),
    ("The heart is large.\nYes", "yes"),
    ("The heart is large.\nYes there", None), ("I would say yes.", "yes"),
    # wrappings
    ("**Yes**", "yes"), ('"No"', "no"), ("`yes`", "yes"), ("<b>yes</b></s>", "yes"), ("\\boxed{Yes}", "yes"), ("<answer>no</answer>", "no"),
    ("<think>No, wait, is it yes?</think>\nNo.", "no"), ("<think>yes, yes, it", None), ("Yes.</think>No", "no"),
    # Chinese
    ("是", "yes"), ("否。", "no"), ("是的，图中包含肝脏。", "yes"), ("不是", "no"), ("没有", "no"), ("答案：否", "no"), ("是否", None), ("是/否", None), ("可能是", None),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "means"), ANSWERS)
def test_yes_and_no_are_read_strictly(answer, means):
    assert yes_no(answer) == means


CHOICES = ("left lung", "right lung", "heart", "none of these")


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("Answer: B", 1), ("B) right lung", 1), ("**D.**", 3), ("Option C is correct", 2),
        ("\\boxed{D}", 3),
        ("The correct option is (C).", 2), ("C. A mass is seen there", 2), ("<think>A or B</think>C", 2),
        ("Heart", 2), ("the heart.", 2), ("The answer is right lung.", 1), ("Left lung, because it is dark", 0), ("None of these", 3),
        ("A, B", None), ("A or B", None), ("A. and B.", None), ("left lung, right lung", None), ("left lung; heart", None),
        ("left or right lung", None), ("B) heart", None), ("A. heart", None), ("E", None), ("", None),
        ("A lung", None), ("I think it is the heart", None), ("both", None),
    ],
)  # fmt: skip
def test_one_choice_is_read_strictly(answer, index):
    assert pick_choice(answer, CHOICES) == index


def test_choices_of_other_kinds():
    assert pick_choice("X-ray", ["CT", "MR", "X-ray"]) == 2 and pick_choice("C-spine", ["CT", "MR", "C-spine", "rib"]) == 2
    assert pick_choice("Yes, it is", ["yes", "no", "maybe"]) == 0 and pick_choice("Maybe", ["yes", "no", "maybe"]) == 2
    assert pick_choice("B", ["A: heart", "B: lung"]) == 1 and pick_choice("lung", ["A: heart", "B: lung"]) == 1
    assert pick_choice("B: lung", ["A: heart", "B: lung"]) == 1 and pick_choice("A: lung", ["A: heart", "B: lung"]) is None
    assert pick_choice("lung", ["lung", "Lung."]) is None  # which of the two?


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("A, C", {0, 2}), ("A and C", {0, 2}), ("AC", {0, 2}), ("a;c", {0, 2}), ("(A), (C)", {0, 2}), ("Answer: A, B and D.", {0, 1, 3}), ("B", {1}),
        ("Options A and B", {0, 1}), ("A. left lung\nC. heart", {0, 2}), ("A) left lung, C) heart", {0, 2}), ("A. and C.", {0, 2}),
        ("left lung; heart", {0, 2}), ("left lung and heart", {0, 2}), ("none of these", {3}),
        ("A, F", None), ("A. heart", None), ("A. left lung and C", None), ("lung", None), ("none", None), ("", None),
    ],
)  # fmt: skip
def test_several_choices_are_read_strictly(answer, chosen):
    assert pick_choices(answer, CHOICES) == (None if chosen is None else frozenset(chosen))


def test_probmed_takes_a_capital_word_anywhere():
    """The published rule differs from a reader on these: right for "no" where nobody said so, wrong where somebody did."""
    for text in ("Nodule is present", "Normal chest", "Not sure", "None", "Yes. No effusion.", "It is unclear. Yes or No"):
        assert probmed_match(text, "no") and yes_no(text) != "no"
    for text in ("no, absent", "no, there is not", "NO, it is clear"):
        assert not probmed_match(text, "no") and yes_no(text) == "no"
    assert not probmed_match("yes, it does", "yes") and yes_no("yes, it does") == "yes"
    assert probmed_match("It is unclear. Yes or No", "yes")  # right for both
    assert probmed_match(" no. ", "no") and probmed_match("YES", "yes") and not probmed_match("", "yes") and not probmed_match("", "no")


def test_normal_forms():
    assert normalise("Yes,  the LEFT lung.") == "yes left lung" and normalise("X-ray") == "x ray"
    assert normalise("A") == "a" and normalise("the") == "the" and normalise("?!") == "" and normalise("肺，左侧。") == "肺 左侧"
    assert vqa_normalise("The X-ray") == "x ray"  # a mark between letters becomes a space
    assert vqa_normalise("mass - large") == "mass large" and vqa_normalise("ct-scan - large") == "ctscan large"  # beside a space: gone everywhere
    assert vqa_normalise("1,000/2") == "10002"  # a comma between digits: every mark goes
    assert vqa_normalise("1.5 cm.") == "1.5 cm" and vqa_normalise("None") == "0" and vqa_normalise("ten\nribs") == "10 ribs"
    assert vqa_normalise("It isnt, couldntve") == "it isn't couldntve" and vqa_normalise("couldn'tve") == "couldn't've"
    assert slake_normalise("X-ray (chest)") == slake_normalise("xray") == "xray" and slake_normalise("CT（胸部）。") == "ct"
    assert slake_normalise("是的") == slake_normalise("Yes!") == "yes" and slake_normalise("不包含") == "no" and slake_normalise("(a [b") == "a b"
    assert said("<think>x</think> **Left** lung</s>") == "Left lung" and said("\\boxed{\\text{B}}") == "B"


def test_long_answers_take_linear_time():
    began = time.process_time()
    for text in ("<think>" * 20000, "(" * 100000, "\n" * 100000 + "x", "no " * 30000, "answer " * 20000, "A, " * 30000 + "9", "cannot " * 20000):
        for read in (yes_no, normalise, vqa_normalise, slake_normalise, lambda t: pick_choice(t, CHOICES), lambda t: pick_choices(t, CHOICES)):
            read(text)
    assert time.process_time() - began < 20  # a quadratic step would take many minutes


@pytest.mark.parametrize(("text", "answer"), [("No。", "no"), ("No、没有积液", "no"), ("Yes。", "yes"), ("\\boxed{\\text{Yes}}", "yes"), ("\\boxed{\\mathbf{no}}", "no")])
def test_a_no_is_read_as_readily_as_a_yes(text, answer):
    assert yes_no(text) == answer


@pytest.mark.parametrize(("choices", "text", "chosen"), [(("CT", "MRI", "US"), "CT", {0}), (("CAD", "CHF", "PE", "AS"), "CAD", {0}), (("one", "two", "three"), "AC", {0, 2}), (("A", "B", "AB"), "AB", {0, 1})])
def test_a_choice_in_capitals_is_no_list_of_letters(choices, text, chosen):
    assert pick_choices(text, choices) == frozenset(chosen)
