"""Scores of every convention, worked by hand."""

import math
import random
import warnings
from dataclasses import replace

import pytest

from medvlm.errors import MedVLMError
from medvlm.evaluate.conventions import RULES, kind
from medvlm.evaluate.vqa import JUDGE, JUDGE_VERSION, TASK, judged, prepare, prior_answers, score
from medvlm.sample import Mask, Prediction, Sample, Turn


def sample(id, answer, question="Is it?", type=None, choices=None, row=None):
    meta = {"row": row or id} | ({"type": type} if type else {})
    turns = (Turn("user", question), Turn("assistant", answer)) if answer is not None else (Turn("user", question),)
    return Sample(id, turns=turns, meta=meta, choices=choices)


SAMPLES = [
    sample("1", "yes", type="CLOSED"),
    sample("2", "no", type="CLOSED"),
    sample("3", "PA", type="CLOSED"),  # closed to the data, but neither yes nor no
    sample("4", "left lung", type="OPEN"),
    sample("5", "pleural effusion", type="OPEN"),
    sample("6", "two", type="OPEN"),
    sample("7", "MR", type="CLOSED", choices=("CT", "MR", "X-ray")),
    sample("8", "A, C", type="MULTIPLE", choices=("edema", "nodule", "effusion")),
    sample("9", "Yes", type="CLOSED"),
    sample("10", "", type="OPEN"),  # no reference: excluded
]
SAID = [
    Prediction("1", "Yes, there is a nodule."),
    Prediction("2", "Normal."),
    Prediction("3", "PA"),
    Prediction("4", "the left left lung field"),
    Prediction("5", "Effusion on the left."),
    Prediction("6", "2"),
    Prediction("7", "B. MR"),
    Prediction("8", "A and C"),
    Prediction("9", "yes", error="TIMEOUT: x"),  # a text beside an error does not count
    Prediction("10", "a nodule"),
]

WORKED = {
    # closed: 1 yes | 2 not read | 9 error. open: 3, 4, 5, 6. Tokens of 4: left left lung field / left lung: P 2/4, R 1, F1 2/3;
    # of 5: effusion on left / pleural effusion: P 1/3, R 1/2, F1 2/5; of 6: 0. F1 (1 + 2/3 + 2/5 + 0) / 4. overall: 1, 3, 7, 8 of 9
    "medvlm": {
        "closed accuracy": 1 / 3, "single-choice accuracy": 1, "multiple-choice accuracy": 1, "open exact match": 1 / 4,
        "open token F1": (1 + 2 / 3 + 2 / 5) / 4, "open token recall": (1 + 1 + 1 / 2) / 4, "overall accuracy": 4 / 9, "yes rate": 1 / 3,
        "unparsed": 2 / 5,
    },
    # closed: 1, 2, 3, 9 of which 1 and 3; open: 4, 5, 6
    "medvlm/answer_type": {
        "closed accuracy": 2 / 4, "single-choice accuracy": 1, "multiple-choice accuracy": 1, "open exact match": 0,
        "open token F1": (2 / 3 + 2 / 5) / 3, "open token recall": (1 + 1 / 2) / 3, "overall accuracy": 4 / 9, "yes rate": 1 / 3, "unparsed": 2 / 5,
    },
    # only "PA" is the reference word for word; "b mr" is not "mr"
    "exact": {"closed accuracy": 0, "single-choice accuracy": 0, "multiple-choice accuracy": 0, "open exact match": 1 / 4, "overall accuracy": 1 / 9},
    # and "two" is "2"
    "vqa": {"closed accuracy": 0, "single-choice accuracy": 0, "multiple-choice accuracy": 0, "open exact match": 2 / 4, "overall accuracy": 2 / 9},
    # closed: 1 right, 2 right ("normal" holds "no"), 3, 7, 8 hold neither yes nor no, 9 error. open 4: said left x2, lung, field: found 3, missed 0:
    # R 1, P 3/4, F1 6/7, distinct 2/4; 5: found 1, missed 1 of 3 said: R 1/2, P 1/3, F1 2/5, distinct 1/3; 6: 2 = 2
    "llava-med": {
        "closed accuracy": 2 / 6, "open token recall": (1 + 1 / 2 + 1) / 3, "open token precision": (3 / 4 + 1 / 3 + 1) / 3,
        "open token F1": (6 / 7 + 2 / 5 + 1) / 3, "open printed exact match": (2 / 4 + 1 / 3 + 1) / 3,
    },
    "llava-med/yes_no": {"closed accuracy": 2 / 3},
    # closed: 1 holds yes, and "no" in "nodule": wrong | 2 holds "no" only: right | 9. open, sets of words split at spaces: 3: 1;
    # 4: the left lung field / left lung: P 2/4, R 1; 5: effusion on the left. / pleural effusion: P 1/4, R 1/2; 6: 0; 7: b. mr / mr: P 1/2, R 1;
    # 8: a and c / "a," c: P 1/3, R 1/2. BLEU-1 with full stops apart: 1, 2/5, 1/5, 0, 1/3, 1/3; BLEU-2: only 4, sqrt(2/5 * 1/4); none has 3 in a row.
    # ROUGE-L: 1, 4/7 (P 2/5, R 1), 1/3, 0, 2/3, 2/5
    "medevalkit": {
        "closed accuracy": 1 / 3, "open exact match": 1 / 6, "open token F1": (1 + 2 / 3 + 1 / 3 + 0 + 2 / 3 + 2 / 5) / 6,
        "open token precision": (1 + 2 / 4 + 1 / 4 + 0 + 1 / 2 + 1 / 3) / 6, "open token recall": (1 + 1 + 1 / 2 + 0 + 1 + 1 / 2) / 6,
        "open BLEU-1": (1 + 2 / 5 + 1 / 5 + 0 + 1 / 3 + 1 / 3) / 6, "open BLEU-2": math.sqrt(1 / 10) / 6, "open BLEU-3": 0, "open BLEU-4": 0,
        "open ROUGE-L": (1 + 4 / 7 + 1 / 3 + 0 + 2 / 3 + 2 / 5) / 6, "overall accuracy": 2 / 9,
    },
    # closed: first of yes and no: 1. open F1 as medvlm, 7: b mr / mr 2/3, 8: and c / c 2/3; over all: 1: yes there is nodule / yes 2/5, 2 and 9: 0
    "medgemma": {
        "closed accuracy": 1 / 3, "open token F1": (1 + 2 / 3 + 2 / 5 + 0 + 2 / 3 + 2 / 3) / 6, "open token recall": (1 + 1 + 1 / 2 + 0 + 1 + 1) / 6,
        "overall token F1": (2 / 5 + 0 + 1 + 2 / 3 + 2 / 5 + 0 + 2 / 3 + 2 / 3 + 0) / 9,
    },
    # sets: recall of 3..8: 1, 1, 1/2, 1, 1, 1; F1: 1: 2/5, 3: 1, 4: left lung field / left lung 4/5, 5: 2/5, 6: 1, 7 and 8: 2/3
    "multimedeval": {
        "closed accuracy": 1 / 3, "open accuracy": 5 / 6, "open token recall": 5.5 / 6, "overall token recall": (1 + 0 + 5.5 + 0) / 9,
        "overall token F1": (2 / 5 + 0 + 1 + 4 / 5 + 2 / 5 + 1 + 2 / 3 + 2 / 3 + 0) / 9,
    },
    "vila-m3": {"closed accuracy": 1 / 6, "open exact match": 0, "overall accuracy": 1 / 9},
    "lmms-eval": {"closed accuracy": 1 / 6, "open exact match": 0, "overall accuracy": 1 / 9},
    "m3d": {"single-choice accuracy": 1},
}  # fmt: skip


def by_name(scores):
    assert len({s.name for s in scores}) == len(scores)
    return {s.name: s for s in scores}


@pytest.mark.parametrize("convention", WORKED)
def test_a_convention_worked_by_hand(convention):
    got, want = by_name(score(SAMPLES, SAID, convention)), WORKED[convention]
    assert {n: got[n].value for n in want} == pytest.approx(want)
    if "/" not in convention:
        assert got.keys() == want.keys() | {"yes rate", "unparsed"}
    name, _, split = convention.partition("/")
    for s in got.values():
        assert s.name in ("yes rate", "unparsed") or s.convention.startswith(f"{name}/{split or RULES[name].split}: {TASK.conventions[name]}")


def test_denominators_and_chance():
    got = by_name(score(SAMPLES, SAID))
    assert {n: (s.n, s.excluded) for n, s in got.items()} == {
        "closed accuracy": (3, 0), "single-choice accuracy": (1, 0), "multiple-choice accuracy": (1, 0), "open exact match": (4, 1),
        "open token F1": (4, 1),
        "open token recall": (4, 1), "overall accuracy": (9, 1), "yes rate": (3, 0), "unparsed": (5, 0),
    }  # fmt: skip
    chances = {n: s.chance for n, s in got.items() if s.chance is not None}
    # three choices make seven sets that are not empty
    assert chances == pytest.approx({"closed accuracy": 1 / 2, "single-choice accuracy": 1 / 3, "multiple-choice accuracy": 1 / 7})
    assert by_name(score(SAMPLES, SAID, "medvlm/answer_type"))["closed accuracy"].chance is None  # nobody says what "PA" could have been
    closed = [s for s in SAMPLES if s.id in "129"] + [replace(SAMPLES[6], id="x")]
    assert by_name(score(closed, [Prediction(s.id, "") for s in closed]))["overall accuracy"].chance == pytest.approx((3 / 2 + 1 / 3) / 4)


def test_every_convention_is_worked_here_and_says_what_it_is():
    assert {c.partition("/")[0] for c in WORKED} == set(TASK.conventions) == set(RULES) and next(iter(TASK.conventions)) == "medvlm"
    assert TASK.blind and TASK.rank == 1 and all(len(says) > 20 for says in TASK.conventions.values())


@pytest.mark.parametrize("convention", [*RULES, *(f"{n}/answer_type" for n in RULES), *(f"{n}/yes_no" for n in RULES)])
def test_order_does_not_matter_and_failures_move_no_denominator(convention):
    want = {s.name: (pytest.approx(s.value, nan_ok=True), s.n, s.excluded, s.chance) for s in score(SAMPLES, SAID, convention)}
    for seed in range(3):
        order = random.Random(seed).sample(range(len(SAMPLES)), len(SAMPLES))
        again = score([SAMPLES[i] for i in order], [SAID[i] for i in order], convention)
        assert {s.name: (s.value, s.n, s.excluded, s.chance) for s in again} == want
    for broken in (lambda p: replace(p, error="X: y"), lambda p: replace(p, text=" ")):
        for i in range(len(SAMPLES)):
            worse = score(SAMPLES, [broken(p) if j == i else p for j, p in enumerate(SAID)], convention)
            assert [(s.name, s.n, s.excluded) for s in worse] == [(n, v[1], v[2]) for n, v in want.items()]
            assert all(s.value <= want[s.name][0].expected + 1e-12 for s in worse if s.better == "higher" and s.n)
    failed = score(SAMPLES, [Prediction(s.id, error="X: y") for s in SAMPLES], convention)
    assert all(s.value == (1 if s.name == "unparsed" else 0) for s in failed)


def test_constant_answers_land_where_they_must():
    samples = [sample(str(i), "yes" if i % 4 == 0 else "no") for i in range(40)]  # a quarter is yes
    for convention in set(RULES) - {"m3d"}:
        got = by_name(score(samples, [Prediction(s.id, "yes") for s in samples], convention))
        assert got["closed accuracy"].value == 0.25 and got["closed accuracy"].chance == 0.5
        assert got["yes rate"].value == 1 and got["unparsed"].value == 0
        assert got["closed accuracy"].low < 0.25 < got["closed accuracy"].high


def test_rules_that_their_authors_are_known_for():
    def right(convention, reference, text, choices=None):
        only = [sample("x", reference, type="CLOSED", choices=choices)]
        return score(only, [Prediction("x", text)], convention)[0].value

    assert right("multimedeval", "no", "it is not") == 1 and right("multimedeval", "yes", "it is not") == 0  # 1 of {no, not} is enough
    assert right("llava-med", "yes", "yes and no") == right("llava-med", "no", "yes and no") == 1 and right("llava-med", "PA", "PA") == 0
    assert right("medevalkit", "yes", "yes and no") == right("medevalkit", "no", "yes and no") == 0 and right("medevalkit", "no", "not seen") == 1
    assert right("medevalkit/answer_type", "PA", "pa.") == 1 and right("medevalkit", "PA", "Answer: PA") == 0  # a space stays after the label
    assert right("medevalkit", "no", "I thought yes. \\boxed{No}") == 1 and right("medevalkit", "no", "<answer>no</answer> not yes") == 1
    assert right("medgemma", "no", "The answer is no, not yes") == 1 and right("medgemma", "no", "nothing") == 0
    assert right("lmms-eval", "是的", "yes") == 1 and right("lmms-eval", "CT", "ct (chest)") == 1 and right("lmms-eval", "yes", "Yes, it is") == 0
    assert right("vila-m3", "Yes", "yes") == 1 and right("vila-m3", "yes", "yes.") == 0
    assert right("m3d", "MR", "Vitamin B. is", ("CT", "MR")) == 1
    assert right("m3d", "MR", "MR", ("CT", "MR")) == right("m3d", "B", "b.", ("CT", "MR")) == 0
    assert right("medvlm", "是", "Yes, it is.") == 1 and right("medvlm", "不包含", "没有") == 1 and right("medvlm", "yes", "It is unclear. Yes or No") == 0


def test_bleu_of_medevalkit_is_that_of_nltk():
    from nltk.translate.bleu_score import sentence_bleu

    pairs = [
        ("A large mass in the left upper lobe.", "mass in the left upper lobe"), ("left", "left lung base here"),
        ("right lung is clear .", "the right lung is clear."),
    ]  # fmt: skip
    for text, reference in pairs:
        got = by_name(score([sample("x", reference)], [Prediction("x", text)], "medevalkit"))
        for n in (1, 2, 3, 4):
            words, other = (t.lower().strip().replace(".", " .").split() for t in (text, reference))
            with warnings.catch_warnings(action="ignore"):  # that no n-gram of some order matches
                want = sentence_bleu([other], words, [1 / n] * n)
            assert got[f"open BLEU-{n}"].value == pytest.approx(want, abs=1e-9)


def test_kinds_of_question():
    assert kind(sample("a", "Yes")) == kind(sample("a", "no", choices=("yes", "no"))) == kind(sample("a", "是")) == "yes/no"
    assert kind(sample("a", "CT", choices=("CT", "MR"))) == kind(sample("a", "B", choices=("CT", "MR"))) == "single"
    assert kind(sample("a", "B", type="SINGLE")) == "single"
    assert kind(sample("a", "CT; MR", choices=("CT", "MR"))) == kind(sample("a", "B", type="multiple", choices=("CT", "MR"))) == "multiple"
    assert kind(sample("a", "maybe", choices=("yes", "no", "maybe"))) == "single"
    assert kind(sample("a", "PA", type="CLOSED")) == kind(sample("a", "no effusion")) == kind(sample("a", None)) == "open"
    letters = [sample("a", "A, D", type="MULTIPLE"), sample("b", "C", type="SINGLE")]  # the question itself lists them
    got = by_name(score(letters, [Prediction("a", "D and A"), Prediction("b", "(C)")]))
    assert got["overall accuracy"].value == 1 and got["multiple-choice accuracy"].chance is None


def test_what_is_asked():
    samples = [
        *SAMPLES, sample("none", None), sample("empty", " "), replace(sample("mute", "yes"), turns=(Turn("assistant", "a report"),)),
        replace(sample("drawn", "here"), masks=(Mask("i", "lung", None),)),
        replace(sample("said", "here"), masks=(Mask("i", "lung", None),), verb="ask"),
        replace(sample("classified", "x"), verb="classify"), replace(sample("probe", "yes"), group="pair"),
    ]  # fmt: skip
    assert [s.id for s in prepare(lambda split: samples if split == "test" else [], "test")] == [*map(str, range(1, 11)), "empty", "said", "probe"]
    assert prepare(lambda split: [], "test") == [] and score([], []) == []


def test_bad_input_is_named():
    for wrong in (SAID[:-1], [SAID[1], SAID[0], *SAID[2:]], [*SAID, SAID[0]], []):
        with pytest.raises(MedVLMError) as e:
            score(SAMPLES, wrong)
        assert e.value.code == "BAD_ARGUMENT"
    for samples, said_ in (
        ([SAMPLES[0]] * 2, [SAID[0]] * 2), (SAMPLES[:1], [Prediction("1", None)]), (SAMPLES[:1], [Prediction("1", ["yes"])]),
        ([sample("1", 3)], [Prediction("1", "3")]),
    ):  # fmt: skip
        with pytest.raises(MedVLMError) as e:
            score(samples, said_)
        assert e.value.code == "BAD_ARGUMENT"
    for name in ("MedVLM", "medvlm/closed", "vqa-v2", ""):
        with pytest.raises(MedVLMError, match="medevalkit"):
            score(SAMPLES, SAID, name)
    nothing = score([sample("1", ""), sample("2", None), sample("3", "?!")], [Prediction(i, "yes") for i in "123"])
    assert all(s.n == 0 and s.excluded == 3 and math.isnan(s.value) for s in nothing) and nothing


def test_errors_and_empty_answers_are_wrong_and_counted():
    samples = [sample(str(i), a) for i, a in enumerate(["yes", "no", "yes", "no", "no", "yes", "yes"])]
    texts = [Prediction("0", "Yes."), Prediction("1", "no", error="OUT_OF_SCOPE: x"), Prediction("2", ""), Prediction("3", "nothing"),
             Prediction("4", "No"), Prediction("5", ""), Prediction("6", " . ")]  # fmt: skip
    got = by_name(score(samples, texts, "exact"))["closed accuracy"]
    assert (got.value, got.n, got.excluded) == (2 / 7, 7, 0)
    assert score(samples[:1], [Prediction("0", "yes it is")], "exact")[0].value == 0  # "yes" is in it, but it is not the answer


def test_questions_of_one_image_are_one_cluster():
    samples = [sample(str(i), "yes", row=str(i % 4)) for i in range(40)]
    texts = [Prediction(str(i), "yes" if i % 3 else "no") for i in range(40)]
    assert all(s.low is None and "4 clusters" in s.note for s in score(samples, texts))  # four images


def test_a_judge_is_asked_about_open_answers_only():
    asked = []

    def say(prompts):
        asked.extend(prompts)
        return ["It says the same.\n1", "0", "The answer is right: 1", None][: len(prompts)]

    got = by_name(judged(SAMPLES, [*SAID[:5], replace(SAID[5], text=""), *SAID[6:]], say, by="a test"))
    assert len(asked) == 3 and "<reference>PA</reference>\n<answer>PA</answer>" in asked[0]  # 3, 4, 5; 6 is empty and 10 has no reference
    assert (got["judged open accuracy"].value, got["judged open accuracy"].n, got["judged open accuracy"].excluded) == (1 / 4, 4, 1)
    assert got["judge unparsed"].value == 1 / 3 and got["judge unparsed"].better == "lower"
    assert got["judged overall accuracy"].value == pytest.approx((1 + 1 + 2) / 9)  # closed 1, open 3, choices 7 and 8
    for s in got.values():
        assert JUDGE_VERSION in s.convention and "a test" in s.convention and repr(JUDGE) in s.convention
    by_type = by_name(judged(SAMPLES, SAID, lambda prompts: ["1"] * len(prompts), "medvlm/answer_type"))
    assert (by_type["judged open accuracy"].value, by_type["judged open accuracy"].n) == (1, 3)
    assert judged(SAMPLES[:2], SAID[:2], lambda prompts: 1 / 0)[0].name == "judged overall accuracy"  # nothing to ask
    with pytest.raises(MedVLMError) as e:
        judged(SAMPLES, SAID, lambda prompts: ["1"])
    assert e.value.code == "BAD_ARGUMENT"


def test_a_verdict_stands_alone_on_the_last_line():
    open_one = [sample("x", "left lung")]
    right, wrong = ("1", " 1 \n\n", "0\n1"), ("1\n0", "1.", "10", "**1**", "yes", "", "1\nbecause")
    for reply, value in [*((r, 1) for r in right), *((r, 0) for r in wrong)]:
        got = by_name(judged(open_one, [Prediction("x", "lung")], lambda prompts, reply=reply: [reply]))
        assert got["judged open accuracy"].value == value, reply
        assert got["judge unparsed"].value == float(reply.strip()[-1:] not in ("0", "1") or reply == "10"), reply


def test_a_blind_reader_says_what_was_commonest():
    said = [("Yes", "Q1?"), ("no", "q1"), ("no", "Q1"), ("yes", "q2"), ("yes", "q3"), (None, "q1")]
    train = [sample(str(i), answer, question) for i, (answer, question) in enumerate(said)]
    assert prior_answers(train, [sample("x", "?", "Q1"), sample("y", "?", "q2?"), sample("z", "?", "new")]) == ["no", "yes", "yes"]
    assert prior_answers([sample("a", "X-ray", "q"), sample("b", "x ray", "q"), sample("c", "X-ray", "q")], [sample("x", "?", "q")]) == ["X-ray"]
    assert prior_answers([], [sample("x", "?")]) == [""]


@pytest.mark.shared
def test_vqa_rad_has_the_closed_questions_that_two_conventions_count(data):
    """173 of the test questions are yes or no; the data call 16 more closed."""
    from medvlm.datasets import manifest

    samples = [s for row in manifest.rows(data / "vqa_rad", "test") for s in manifest.row_samples(row)]
    samples = prepare(lambda split: samples, "test")
    echo = [Prediction(s.id, s.answer) for s in samples]
    by_answer, by_type = by_name(score(samples, echo)), by_name(score(samples, echo, "medvlm/answer_type"))
    assert (by_answer["closed accuracy"].n, by_answer["open exact match"].n) == (173, 145)
    assert (by_type["closed accuracy"].n, by_type["open exact match"].n) == (189, 129)
    assert by_answer["overall accuracy"].value == by_type["overall accuracy"].value == 1 and by_answer["unparsed"].value == 0
