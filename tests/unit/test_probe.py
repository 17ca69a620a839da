"""Probes against worked cases, the published ProbMed arithmetic written out again, and models whose score is known beforehand."""

import math

import numpy as np
import pytest

import medvlm
from medvlm.errors import ModelError
from medvlm.evaluate import blind, consistency, probe, probmed
from medvlm.evaluate.consistency import negated, reordered, rephrased
from medvlm.sample import Prediction, Sample, Turn


def ask(id, answer, group=None, image="a", question="Is it there?", choices=("yes", "no"), **meta):
    return Sample(id, turns=(Turn("user", question), Turn("assistant", answer)), group=group, choices=choices, meta={"row": image, **meta})


def say(samples, texts):
    return [Prediction(s.id, t) if t is not None else Prediction(s.id, error="OOM: no memory") for s, t in zip(samples, texts)]


def by_name(scores, part="all"):
    return {s.name: s for s in scores if s.slice == part}


def six():
    """Image a: an organ pair, two condition pairs, one single; image b: an organ pair."""
    organ, condition = {"probe_category": "organ"}, {"category": ["condition"]}
    return [
        ask("1", "yes", "g1", "a", image_type="x", **organ), ask("2", "no", "g1", "a", image_type="x", adversarial=True, **organ),
        ask("3", "yes", "g2", "a", image_type="x", **condition), ask("4", "no", "g2", "a", image_type="x", category=["condition_adversarial"]),
        ask("5", "yes", "g3", "a", image_type="x", **condition), ask("6", "no", "g3", "a", image_type="x", category=["condition_adversarial"]),
        ask("7", "no", None, "a", image_type="x", probe_category="abnormality"),
        ask("8", "yes", "g4", "b", image_type="y", **organ), ask("9", "no", "g4", "b", image_type="y", adversarial=True, **organ),
    ]  # fmt: skip


def test_questions_pairs_and_images_by_hand():
    samples = six()
    # right:                     1      1          1     1        0 (error)  1     0 (unread)    1       0
    scores = probe.score(samples, say(samples, ["Yes", "no.", "yes", "No", None, "no", "Normal", "yes", "Yes"]), "medvlm")
    s = by_name(scores)
    assert s["question accuracy"].value == pytest.approx(6 / 9) and s["question accuracy"].n == 9
    assert s["accuracy on yes"].value == 3 / 4  # 1, 3, 8 of 1, 3, 5, 8
    assert s["accuracy on no"].value == 3 / 5  # 2, 4, 6 of 2, 4, 6, 7, 9
    assert s["accuracy without adversarial questions"].value == 3 / 5  # 1, 3, 8 of 1, 3, 5, 8 and the single 7
    assert s["pair accuracy"].value == 2 / 5 and s["pair accuracy"].n == 5  # g1, g2 of g1, g2, g3, g4, 7
    assert s["pair accuracy"].chance == (4 * 0.25 + 0.5) / 5
    assert s["image accuracy"].value == 1 / 4  # a/organ of a/organ, a/condition, a/abnormality, b/organ
    assert s["image accuracy"].chance == (0.25 + 0.0625 + 0.5 + 0.25) / 4
    assert s["yes rate"].value == pytest.approx(4 / 9) and s["yes rate"].better == "neither"
    assert s["invalid rate"].value == pytest.approx(2 / 9) and s["invalid rate"].better == "lower"
    organ, condition = by_name(scores, "category=organ"), by_name(scores, "category=condition")
    assert organ["question accuracy"].value == 3 / 4 and organ["pair accuracy"].value == 1 / 2 and organ["pair accuracy"].chance == 0.25
    assert condition["pair accuracy"].value == 1 / 2 and condition["image accuracy"].value == 0 and condition["image accuracy"].n == 1
    assert condition["accuracy without adversarial questions"].n == 2
    assert by_name(scores, "category=abnormality")["pair accuracy"].chance == 0.5
    assert by_name(scores, "image_type=y")["pair accuracy"].value == 0 and by_name(scores, "image_type=x")["pair accuracy"].value == 2 / 4
    assert {x.slice.split("=")[0] for x in scores} == {"all", "category", "image_type"}
    assert all(x.convention.startswith("medvlm") and x.excluded == 0 for x in scores)
    assert scores[0].name == "question accuracy" and "2 clusters" in s["pair accuracy"].note


def test_missing_twins_and_two_yes_say_nothing_of_pairs_but_their_questions_count():
    samples = [*six()[:2], ask("lone", "yes", "g8"), ask("y1", "yes", "g9"), ask("y2", "yes", "g9")]
    samples += [ask("t", "yes", "g7"), ask("u", "no", "g7"), ask("v", "no", "g7")]
    s = by_name(probe.score(samples, say(samples, ["yes", "no"] + ["yes"] * 6), "medvlm"))
    assert s["question accuracy"].n == 8 and s["question accuracy"].value == 6 / 8
    assert (s["pair accuracy"].n, s["pair accuracy"].excluded, s["pair accuracy"].value) == (1, 3, 1.0)
    assert s["pair accuracy"].note.startswith("3 groups are not one question to answer yes and one no")


def test_images_of_two_data_sets_may_share_a_name():
    samples = [ask(f"{d}{a}", a, d, "image1", dataset=d, probe_category="organ") for d in ("one", "two") for a in ("yes", "no")]
    assert by_name(probe.score(samples, say(samples, ["yes", "no", "no", "no"]), "medvlm"))["image accuracy"].value == 0.5


def test_balanced_and_other_probes_are_scored_apart():
    samples = [ask(f"{g}{a}", a, g, g, balanced=g != "g2") for g in ("g1", "g2", "g3") for a in ("yes", "no")]
    scores = probe.score(samples, say(samples, ["yes", "yes", "yes", "no", "yes", "no"]), "medvlm")
    assert by_name(scores)["pair accuracy"].value == pytest.approx(2 / 3)
    assert by_name(scores, "balanced=yes")["pair accuracy"].value == 0.5 and by_name(scores, "balanced=no")["pair accuracy"].value == 1


def test_an_answer_that_fails_never_leaves_the_denominator():
    samples = six()
    whole = {(s.name, s.slice): s.n for s in probe.score(samples, say(samples, ["yes"] * 9), "medvlm")}
    for texts in ([None] * 9, [""] * 9, ["I cannot tell"] * 9, [None, "no"] * 4 + ["?"]):
        assert {(s.name, s.slice): s.n for s in probe.score(samples, say(samples, texts), "medvlm")} == whole
    assert by_name(probe.score(samples, say(samples, [None] * 9), "medvlm"))["question accuracy"].value == 0


def test_duplicate_missing_and_swapped_predictions_are_refused():
    samples = six()
    said = say(samples, ["yes"] * 9)
    for wrong in (said[:-1], [*said, said[0]], said[::-1]):
        with pytest.raises(ModelError, match="BAD_ARGUMENT"):
            probe.score(samples, wrong, "medvlm")
    with pytest.raises(ModelError, match="two samples have the id"):
        probe.score([*samples, samples[0]], [*said, said[0]], "medvlm")


def test_constant_yes_and_random_land_where_they_must():
    rng = np.random.default_rng(0)
    samples = []
    for i in range(2000):
        samples.append(ask(f"{i}y", "yes", f"g{i}", f"image{i // 4}", category=["organ"]))
        samples.append(ask(f"{i}n", "no", f"g{i}", f"image{i // 4}", category=["organ_adversarial"]))
    samples = [s for s in samples if not (s.id.endswith("0n") and rng.random() < 0.5)]  # some twins are missing
    s = by_name(probe.score(samples, blind.yes(samples), "medvlm"))
    assert s["question accuracy"].value == pytest.approx(2000 / len(samples)) and s["pair accuracy"].value == 0 and s["yes rate"].value == 1
    s = by_name(probe.score(samples, blind.random(samples), "medvlm"))
    for name, expected in (("question accuracy", 0.5), ("pair accuracy", 0.25), ("yes rate", 0.5)):
        assert s[name].low < expected < s[name].high and abs(s[name].value - expected) < 0.03
    short = 4000 - len(samples)  # images of three whole pairs; the others have four
    assert s["image accuracy"].chance == pytest.approx((short * 0.5**6 + (500 - short) * 0.5**8) / 500)


def test_prepare_takes_pairs_marked_singles_and_confusing_pairs_only():
    others = [ask("open", "the lung", "g1", choices=None), ask("alone", "yes"), ask("marked", "No", probe=True), ask("half", "left", "c", kind="confusing")]
    samples = six() + others
    assert [s.id for s in probe.prepare(lambda split: samples, "test")] == [*"123456789", "marked", "half"]
    assert probe.prepare(lambda split: [], "test") == []


def test_without_probes_they_are_made_from_the_data():
    def shown(name, modality):
        image = medvlm.read(np.full((4, 4), 7, np.uint8), modality=modality).image()
        return Sample(name, images={image.id: image}, meta={"row": name, "modality": modality})

    samples = [shown(f"{m}{i}", m) for m in ("xray", "ct") for i in range(4)]
    made = probe.prepare(lambda split: samples, "test")
    modality = [s for s in made if probe.category(s) == "modality"]
    assert len(modality) == 16 and all(s.meta["balanced"] for s in modality)  # one of the two kinds against the other, on each image
    scores = probe.score(made, [Prediction(s.id, s.answer) for s in made], "medvlm")  # unique ids, whole pairs
    assert by_name(scores, "balanced=yes")["pair accuracy"].value == 1 and by_name(scores)["pair accuracy"].excluded == 0


def test_confusing_pairs_by_hand():
    def pair(name, one, two):
        return [ask(f"{name}{i}", a, name, f"{name}{i}", "What is shown?", ("lung", "heart"), kind="confusing") for i, a in enumerate((one, two))]

    samples = [*pair("p", "lung", "heart"), *pair("q", "heart", "lung"), *pair("r", "lung", "heart")]
    samples += [*pair("s", "lung", "lung"), *pair("t", "lung", "heart")]
    # p right; q the same answer twice; r has one error; s is no pair of opposites; t both wrong, yet told apart
    scores = probe.score(samples, say(samples, ["lung", "B", "lung", "Lung.", "lung", None, "lung", "lung", "heart", "lung"]), "medvlm")
    s = by_name(scores)
    assert [x.name for x in scores] == ["set accuracy", "confusion"]
    assert (s["set accuracy"].value, s["set accuracy"].n, s["set accuracy"].excluded, s["set accuracy"].chance) == (1 / 4, 4, 1, 0.25)
    assert (s["confusion"].value, s["confusion"].n, s["confusion"].chance, s["confusion"].better) == (pytest.approx(1 / 3), 3, 0.5, "lower")


# The arithmetic of eric-ai-lab/ProbMed eval/calculate_score.py, written out from a reading of it as one pass over the records
# of an image type, and its sums as plain loops; the package keeps images apart and sums arrays.


def says(response, answer):
    response = response.strip()
    if answer == "yes":
        return int("Yes" in response or response.lower() in ("yes", "yes."))
    return int("No" in response or response.lower() in ("no", "no."))


class Stops(Exception):
    pass


def of_type(records):
    out = {"modality": [], "body_part": [], "abnormality": [], "entity": [], "grounding": []}
    now = {"modality": [], "body_part": [], "entity": [], "grounding": []}
    number, pair, image = {"entity": None, "grounding": None}, {}, records[0]["id"]
    for r in records:
        if r["id"] != image:
            image = r["id"]
            for k in ("modality", "body_part"):
                out[k].append(now[k] if len(now[k]) == 2 else [])
            for k in ("entity", "grounding"):
                out[k].append(now[k])
                number[k] = -1
            now = {k: [] for k in now}
        kind, mark = r["qa_type"], says(r["response"], r["gt_ans"])
        if "modality" in kind:
            now["modality"].append(mark)
        elif "body_part" in kind:
            now["body_part"].append(mark)
        elif kind == "abnormality":
            out["abnormality"].append(mark)
        elif kind == "entity_hallu":
            now["entity"] = [mark]
        else:
            k = "entity" if "entity" in kind else "grounding"
            if "gt" in kind:
                number[k], pair[k] = kind.split("_")[-1], [mark]
            elif number[k] is None:
                raise Stops  # the name is not bound yet
            elif number[k] == kind.split("_")[-1]:
                pair[k].append(mark)
                if len(pair[k]) != 2:
                    raise Stops  # the assertion
                now[k].append(pair[k])
    for k, marks in now.items():
        out[k].append(marks)
    return out


def cells(marks):
    """{category: (accuracy, accuracy of first questions or None, num)}; ZeroDivisionError as in the script."""
    found = {"abnormality": (sum(marks["abnormality"]) / len(marks["abnormality"]), None, len(marks["abnormality"]))}
    for k in ("modality", "body_part"):
        full = [m for m in marks[k] if m]
        found[k] = (sum(all(m) for m in full) / len(full), sum(m[0] for m in full) / len(full), len(full))
    for k in ("entity", "grounding"):
        full = [m if isinstance(m[0], list) else [m] for m in marks[k] if m]  # a single before pairs makes one odd unit that is never right
        right = sum(all(mark == 1 for x in m for mark in x) for m in full)
        found[k] = (right / len(full), sum(all(x[0] == 1 for x in m) for m in full) / len(full), len(marks[k]))
    return found


def overall(records):
    """{(category, image type or None)} and "overall": (accuracy, without adversarial pairs)."""
    by_type = {}
    for r in records:
        by_type.setdefault(r["image_type"], []).append(r)
    found, total = {}, {}
    for kind, told in by_type.items():
        for c, (acc, first, num) in cells(of_type(told)).items():
            found[c, kind] = (acc, first)
            t = total.setdefault(c, [0, 0, 0])
            t[0], t[1], t[2] = t[0] + acc * num, t[1] + (first or 0) * num, t[2] + num
    for c, (acc, first, num) in total.items():
        found[c, None] = (acc / num, None if c == "abnormality" else first / num)
    paired = [c for c in total if c != "abnormality"]
    found["overall"] = (sum(found[c, None][0] * total[c][2] for c in total) / sum(t[2] for t in total.values()),
                        sum(found[c, None][1] * total[c][2] for c in paired) / sum(total[c][2] for c in paired))  # fmt: skip
    return found


def record(id, kind, response, image_type="chest"):
    answer = "yes" if "gt" in kind else "no"
    return {"id": id, "image_type": image_type, "qa_type": kind, "gt_ans": answer, "response": response}


CRAFTED = [
    record("1", "modality_gt", "Yes"), record("1", "modality_hallu", "No"),
    record("1", "body_part_gt", "yes, it does"), record("1", "body_part_hallu", "Normal chest"),  # wrong; right by "No" in "Normal"
    record("1", "abnormality", "Nodule is present"),  # right as a no
    record("1", "entity_gt_0", "Yes."), record("1", "entity_hallu_0", "Yes. No effusion."),  # right twice
    record("1", "entity_gt_1", "Yes"),  # its twin is missing: the pair goes
    record("1", "grounding_gt_0", "Yes"), record("1", "grounding_hallu_0", "no, absent"),
    record("2", "modality_gt", "yes"),  # one of two: the image goes
    record("2", "body_part_gt", "YES."), record("2", "body_part_hallu", "no."),
    record("2", "abnormality", "no"), record("2", "entity_hallu", "Not sure"),  # a normal image: one question; no position, yet counted
    record("3", "entity_hallu_4", "No"),  # its gt is missing: dropped, as this is not the first image
    record("3", "entity_gt_5", "Yes"), record("3", "entity_gt_5", "nothing"), record("3", "entity_hallu_5", "No"),  # twice: the later counts
    record("3", "body_part_gt", "Yes"), record("3", "body_part_hallu", "No"), record("3", "body_part_gt", "Yes"),  # three, in the last image: kept
    record("3", "modality_gt", "Yes"),  # one, in the last image: kept
    record("1", "modality_gt", "Yes", "brain"), record("1", "modality_hallu", "?", "brain"), record("1", "body_part_gt", "Yes", "brain"),
    record("1", "body_part_hallu", "No", "brain"), record("1", "abnormality", "Yes", "brain"), record("1", "entity_hallu", "No", "brain"),
    record("1", "grounding_gt_7", "Yes", "brain"), record("1", "grounding_hallu_7", "No", "brain"),
]  # fmt: skip


def published(records):
    samples = [ask(str(i), r["gt_ans"], image=r["id"], image_type=r["image_type"], qa_type=r["qa_type"]) for i, r in enumerate(records)]
    scores = probe.score(samples, [Prediction(s.id, r["response"]) for s, r in zip(samples, records)], "probmed-original")
    return {(s.name, s.slice): s for s in scores}


NAMES = {"modality": "modality", "body_part": "organ", "abnormality": "abnormality", "entity": "condition", "grounding": "position"}


def same_numbers(records):
    ours, theirs = published(records), overall(records)
    compared = 0
    for key, values in theirs.items():
        name, part = ("ProbMed", "all") if key == "overall" else (NAMES[key[0]], "all" if key[1] is None else f"image_type={key[1]}")
        for value, suffix in zip(values, ("", " without adversarial pairs")):
            if value is not None:
                assert ours[f"{name} accuracy{suffix}", part].value == pytest.approx(value, abs=1e-12), key
                compared += 1
    assert compared == len(ours)


def test_the_published_scorer_number_by_number():
    same_numbers(CRAFTED)
    s = published(CRAFTED)
    # chest, organ: 1 wrong, 2 right, 3 right of three answers; brain right: (2/3 * 3 + 1) / 4
    assert s["organ accuracy", "all"].value == pytest.approx(3 / 4)
    # condition, chest: 1 right, 2 right ("Not" holds "No"), 3 wrong; brain right
    assert s["condition accuracy", "image_type=chest"].value == pytest.approx(2 / 3)
    # position: one image of chest has it, yet it weighs three: (0 * 3 + 1 * 1) / 4
    assert s["position accuracy", "all"].value == pytest.approx(1 / 4) and "counts as 3" in s["position accuracy", "image_type=chest"].note
    assert s["ProbMed accuracy", "all"].chance == pytest.approx(overall_of_a_coin(), abs=1e-12)


def overall_of_a_coin():
    # abnormality 1/2 (3 questions); modality chest (1/4 + 1/2) / 2 of 2, brain 1/4; organ chest (1/4 + 1/4 + 1/8) / 3 of 3, brain 1/4;
    # condition chest (1/4 + 1/2 + 1/4) / 3 of 3, brain 1/2; position 1/4 of 4
    return (0.5 * 3 + 0.375 * 2 + 0.25 + 0.625 / 3 * 3 + 0.25 + 1 / 3 * 3 + 0.5 + 0.25 * 4) / (3 + 3 + 4 + 4 + 4)


def test_the_published_scorer_on_random_records_with_faults():
    rng = np.random.default_rng(1)
    texts = ["Yes", "No", "yes", "no", "Normal", "Nodule", "Yes. No effusion.", "no, absent", "Not sure", ""]
    agreed = stopped = 0
    for _ in range(200):
        records = []
        for image in range(6):
            kinds = ["modality_gt", "modality_hallu", "body_part_gt", "body_part_hallu", "abnormality"]
            kinds += [f"{k}_{side}_{n}" for k in ("entity", "grounding") for n in range(rng.integers(1, 3)) for side in ("gt", "hallu")]
            kinds += ["entity_hallu"] * int(rng.random() < 0.2)
            if rng.random() < 0.2:
                rng.shuffle(kinds)
            for kind in kinds:
                for _ in range(int(rng.choice([0, 1, 2], p=[0.06, 0.91, 0.03]))):  # missing, there, twice
                    records.append(record(str(image), kind, str(rng.choice(texts)), ["chest", "brain"][image % 2]))
        try:
            theirs = overall(records)
        except Stops:
            stopped += 1
            with pytest.raises(ModelError, match="the published script stops here"):
                probmed.images(records)
            continue
        except ZeroDivisionError:
            theirs = {"overall": (math.nan, math.nan)}
        _, types, adds = probmed.table(probmed.images(records))
        kinds, everything = list(probmed.CATEGORIES), np.arange(len(types))
        paired = [i for i, k in enumerate(kinds) if k != "abnormality"]
        assert probmed.accuracy(types, adds, range(5))(everything) == pytest.approx(theirs["overall"][0], abs=1e-12, nan_ok=True)
        if not math.isnan(theirs["overall"][0]):
            agreed += 1
            assert probmed.accuracy(types, adds, paired, 1)(everything) == pytest.approx(theirs["overall"][1], abs=1e-12)
            for i, k in enumerate(kinds):
                assert probmed.accuracy(types, adds, [i])(everything) == pytest.approx(theirs[k, None][0], abs=1e-12)
    assert agreed > 30 and stopped > 30


def test_where_the_script_would_divide_by_nothing_there_is_no_number():
    s = published([r for r in CRAFTED if r["image_type"] == "brain" and "grounding" not in r["qa_type"]])
    for name in ("position accuracy", "ProbMed accuracy"):
        assert math.isnan(s[name, "all"].value) and "published script stops" in s[name, "all"].note
    assert s["organ accuracy", "all"].value == 1


def test_the_corrected_default_differs_where_the_script_is_wrong():
    records = [record("1", "body_part_gt", "yes, it does"), record("1", "body_part_hallu", "Normal chest")]
    samples = [ask(str(i), r["gt_ans"], "g", "1", image_type="chest", qa_type=r["qa_type"], probe_category="organ") for i, r in enumerate(records)]
    said = [Prediction(s.id, r["response"]) for s, r in zip(samples, records)]
    assert [s.value for s in probe.score(samples, said, "medvlm")[:3]] == [0.5, 1.0, 0.0]
    assert [probmed.probmed_match(r["response"], r["gt_ans"]) for r in records] == [False, True]


def test_the_published_convention_needs_probmed():
    samples = six()
    with pytest.raises(ModelError, match="scores samples of ProbMed"):
        probe.score(samples, say(samples, ["yes"] * 9), "probmed-original")


def test_questions_are_negated_by_rule_or_not_at_all():
    made = lambda q, a="yes": negated(ask("1", a, question=q))  # noqa: E731
    for question, expected in {
        "Is there a pleural effusion?": "Is there no pleural effusion?",
        "Are there any fractures in this chest X-ray?": "Are there no fractures in this chest X-ray?",
        "Is there evidence of a pneumothorax?": "Is there no evidence of a pneumothorax?",
        "Does the picture contain liver?": "Does the picture contain no liver?",
        "Does this x-ray show any mass? (please answer yes/no)": "Does this x-ray show no mass? (please answer yes/no)",
    }.items():
        assert made(question).question == expected
    for question in (
        "Is there no effusion?", "Is there fluid or air?", "Is the heart enlarged?", "Is there any more than one mass?", "Where is the mass?",
        "Is there the same mass?", "Is there a lung without air?", "Isn't there air?",
    ):  # fmt: skip
        assert made(question) is None, question
    assert made("Is there air?").answer == "no" and made("Is there air?", "No").answer == "yes" and made("Is there air?", "left") is None
    assert made("Is there air?").id == "1@negation" and made("Is there air?").group is None


def test_choices_change_places_in_the_question_too():
    s = ask("1", "PA", question="Is this a PA or AP film?", choices=("PA", "AP"))
    assert (reordered(s).question, reordered(s).choices, reordered(s).answer) == ("Is this a AP or PA film?", ("AP", "PA"), "PA")
    s = ask("1", "lung", question="Which organ?\nA. heart\nB. lung\nC. left kidney", choices=("heart", "lung", "left kidney"))
    assert reordered(s).question == "Which organ?\nA. left kidney\nB. lung\nC. heart" and reordered(s).choices == ("left kidney", "lung", "heart")
    s = ask("1", "C", question="Which organ?\nA. heart\nB. lung\nC. left kidney", choices=("heart", "lung", "left kidney"))
    assert reordered(s).answer == "left kidney"  # it is A now
    for question, choices, answer in (
        ("Which side?", ("yes", "no"), "yes"), ("Which?", ("A", "B"), "A"), ("A heart?", ("heart", "lung"), "heart"), ("Which?", None, "heart"),
        ("lung or left lung?", ("lung", "left lung"), "lung"), ("Which?", ("A. heart", "B. lung"), "A"), ("Which?", ("heart", "lung"), "liver"),
    ):  # fmt: skip
        assert reordered(ask("1", answer, question=question, choices=choices)) is None, question


def test_consistency_by_hand():
    same = {"linked_id": "L", "relation": "strict agreement"}
    samples = [
        ask("a", "no", question="Is there cardiomegaly?", **same), ask("b", "No", question="Is the heart enlarged?", **same),
        ask("c", "lung", question="Which organ, the lung or the heart?", choices=("lung", "heart")),
        ask("d", "left", question="Which side?", choices=None, paraphrase_of="e"), ask("e", "left", question="On which side?", choices=None),
        ask("f", "yes", question="Is the mass large?", linked_id="M", relation="inversion"),
        ask("g", "no", question="Is the mass small?", linked_id="M", relation="inversion"),
    ]  # fmt: skip
    asked = consistency.prepare(lambda split: samples, "test")
    assert sorted(s.id for s in asked) == ["a", "a@negation", "b", "c", "c@order", "d", "e"]
    assert {k: [s.id for s in m] for k, m in rephrased(asked).items()} == {"L": ["a", "b"], "e": ["d", "e"]}
    said = {"a": "yes", "b": "Yes", "a@negation": "no", "c": "heart", "c@order": "heart", "d": "left", "e": "right"}
    s = by_name(consistency.score(asked, [Prediction(x.id, said[x.id]) for x in asked], "medvlm"))
    assert (s["paraphrase consistency"].value, s["paraphrase consistently right"].value) == (1 / 2, 0)  # a = b, both wrong; d != e
    assert (s["order consistency"].value, s["order consistently right"].value) == (1, 0)
    assert (s["negation consistency"].value, s["negation consistently right"].value) == (1, 0)
    assert s["order consistency"].chance == 0.5 and s["negation consistently right"].chance == 0.25 and s["paraphrase consistency"].chance is None
    said |= {"a": "no", "b": "no", "a@negation": "no", "c": "lung", "c@order": "B", "d": ""}  # B of c@order is the lung
    s = by_name(consistency.score(asked, [Prediction(x.id, said[x.id]) for x in asked], "medvlm"))
    assert (s["paraphrase consistency"].value, s["paraphrase consistently right"].value) == (1 / 2, 1 / 2)  # an empty answer agrees with nothing
    assert (s["order consistency"].value, s["order consistently right"].value) == (1, 1)
    assert (s["negation consistency"].value, s["negation consistently right"].value) == (0, 0)


def test_the_question_prior_is_strong_on_unbalanced_probes(data):
    from medvlm.datasets.base import open_data

    held = open_data(data / "xray_covid")
    samples = probe.prepare(held.scored, "test")
    yes = by_name(probe.score(samples, blind.yes(samples), "medvlm"))
    assert yes["question accuracy"].value == sum(s.answer == "yes" for s in samples) / len(samples) and yes["pair accuracy"].value == 0
    prior = by_name(probe.score(samples, blind.prior(samples, held.samples("train", words=True)), "medvlm"))
    assert prior["pair accuracy"].n == 22 and prior["pair accuracy"].value == pytest.approx(18 / 22)
