"""Zero-shot classification, retrieval, linear probe and few-shot against worked cases and scikit-learn."""

import json
import math

import numpy as np
import pytest
import tiny

from medvlm.errors import MedVLMError, ModelError
from medvlm.evaluate import linear_probe, retrieve, zeroshot
from medvlm.evaluate.statistics import auroc
from medvlm.predictors.base import Model
from medvlm.sample import Prediction, Sample, Turn

NAN = float("nan")
PICTURE = tiny.picture(size=(8, 8))


def reader(**splits):
    return lambda split: splits.get(split, [])


def picture():
    return tiny.picture(size=(8, 8))


def row(id, labels=None, text=None, patient=None, **meta):
    turns = (Turn("assistant", text),) if text else ()
    return Sample(str(id), patient, {"xray-1": picture()}, turns, labels=labels or {}, meta=meta)


def by_name(scores, part="all"):
    assert len({(s.name, s.slice) for s in scores}) == len(scores)
    json.dumps([s.to_json() for s in scores], allow_nan=False)
    return {s.name: s for s in scores if s.slice == part}


def findings(truth, names=("a", "b"), **meta):
    """Samples of a data set with several findings, as ``prepare`` makes them."""
    return [Sample(str(i), labels=dict(zip(names, t)), choices=tuple(names), meta=meta, verb="classify") for i, t in enumerate(truth)]


def chances(given, names=("a", "b")):
    return [Prediction(str(i), choices=None if p is None else dict(zip(names, p)), error="X: y" if p is None else None) for i, p in enumerate(given)]


def classes(truth, names):
    return [Sample(str(i), choices=tuple(names), meta={"class": t}, verb="classify") for i, t in enumerate(truth)]


def test_each_image_is_classified_once():
    shared = picture()
    asked = [Sample(f"q{i}", images={"xray-1": shared}, turns=(Turn("user", "?"), Turn("assistant", "yes")), labels={"b": 1, "a": NAN}, meta={"row": "r"}) for i in range(3)]
    outlined = Sample("r/lung", images={"xray-1": shared}, labels={"b": 1, "a": NAN})
    data = [*asked, outlined, row("s", {"a": 1, "b": 0}), row("t", {"a": NAN}), row("u"), Sample("v", labels={"a": 1})]
    found = zeroshot.prepare(reader(test=data), "test")
    assert [s.id for s in found] == ["q0", "s"]  # nothing is known of t and u, and v has no image
    assert all(s.verb == "classify" and s.choices == ("a", "b") and not s.turns and s.meta["prompts"] == "chexzero" for s in found)
    assert zeroshot.prepare(reader(test=[row("u")]), "test") == [] == zeroshot.prepare(reader(), "test")


def test_one_finding_an_image_is_a_class():
    data = [row(i, {"x": float(i % 3 == 0), "y": float(i % 3 == 1), "z": float(i % 3 == 2)}) for i in range(6)]
    found = zeroshot.prepare(reader(test=data, val=[row("v", {"x": 1, "y": 0, "z": 0})]), "test")
    assert [s.meta["class"] for s in found] == list("xyzxyz") and found[0].choices == ("x", "y", "z") and "prompts" not in found[0].meta
    several = zeroshot.prepare(reader(test=[*data, row("w", {"x": 1, "y": 1, "z": 0})]), "test")
    assert len(several) == 7 and not any("class" in s.meta for s in several)
    said = zeroshot.prepare(reader(test=[row(1, **{"class": "mass"}), row(2, **{"class": "cyst"}), row(3)]), "test")
    assert [(s.meta["class"], s.choices) for s in said] == [("mass", ("cyst", "mass")), ("cyst", ("cyst", "mass"))]
    alone = zeroshot.prepare(reader(test=[row(1, {"x": 1}), row(2, {"x": 0})]), "test")
    assert [s.choices for s in alone] == [("x",), ("x",)]


def test_val_comes_for_thresholds_without_scored_patients():
    test = [row("1", {"a": 1, "b": 1}, patient="p"), row("2", {"a": 0, "b": 1})]
    val = [row("3", {"a": 1, "b": 0}, patient="p"), row("4", {"a": 0, "b": 0}, patient="q")]
    found = zeroshot.prepare(reader(test=test, val=val), "test")
    assert [(s.id, s.meta.get("fit")) for s in found] == [("1", None), ("2", None), ("4", "val")]
    assert [s.id for s in zeroshot.prepare(reader(val=val), "val")] == ["3", "4"]


def test_data_sets_keep_their_own_classes():
    data = [row(f"{d}/{c}", **{"class": c, "dataset": d, "row": "1" if d == "m" else c}) for d, c in (("m", "cyst"), ("n", "cat"), ("n", "dog"))]
    assert [s.choices for s in zeroshot.prepare(reader(test=data), "test")] == [("cyst",), ("cat", "dog"), ("cat", "dog")]


def test_findings_by_hand():
    truth = [(1, 0), (0, 1), (1, NAN), (0, 0)]
    given = [(0.9, 0.2), (0.6, 0.7), (0.6, 0.5), (0.1, 0.8)]
    scores = zeroshot.score(findings(truth), chances(given))
    whole, a, b = by_name(scores), by_name(scores, "label=a"), by_name(scores, "label=b")
    # a: .9+ .6- .6+ .1-: pairs (.9>.6) (.9>.1) (.6=.6) (.6>.1) = 3.5 / 4 · b: .7+ against .2-, .8- = 1 / 2
    assert a["AUROC"].value == 3.5 / 4 and b["AUROC"].value == 1 / 2 and whole["macro AUROC"].value == pytest.approx((3.5 / 4 + 1 / 2) / 2)
    # a: at .9 recall 1/2 precision 1, at .6 recall 1 precision 2/3 -> 1/2 + 1/3 · b: at .8 nothing, at .7 recall 1 precision 1/2
    assert a["AUPRC"].value == pytest.approx(1 / 2 + 1 / 3) and b["AUPRC"].value == 0.5 and a["AUPRC"].chance == 0.5 and b["AUPRC"].chance == pytest.approx(1 / 3)
    # from .5 on: a 2 hits 1 false -> 4 / 5 · b 1 hit 1 false -> 2 / 3
    assert a["F1"].value == pytest.approx(4 / 5) and b["F1"].value == pytest.approx(2 / 3) and whole["macro F1"].value == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert (b["AUROC"].n, b["AUROC"].excluded, a["AUROC"].n) == (3, 1, 4)
    # Brier: image by image over its known labels: (.01 + .04) / 2, (.36 + .09) / 2, .16, (.01 + .64) / 2
    assert whole["Brier over labels"].value == pytest.approx((0.025 + 0.225 + 0.16 + 0.325) / 4)
    assert "macro F1 at val threshold" not in whole and all(s.convention for s in scores)


def test_findings_are_scikit_learns():
    from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (120, 3)).astype(float)
    given = np.round(np.clip(truth * 0.2 + rng.random((120, 3)) * 0.8, 0, 1), 1)  # with ties
    names = ("a", "b", "c")
    scores = zeroshot.score(findings(truth, names), chances(given, names))
    whole = by_name(scores)
    assert whole["macro AUROC"].value == pytest.approx(roc_auc_score(truth, given)) and whole["macro AUPRC"].value == pytest.approx(average_precision_score(truth, given))
    assert whole["macro F1"].value == pytest.approx(f1_score(truth, given >= 0.5, average="macro"))
    for j, name in enumerate(names):
        one = by_name(scores, f"label={name}")
        assert one["AUROC"].value == pytest.approx(auroc(given[:, j], truth[:, j]))
        assert one["AUPRC"].value == pytest.approx(average_precision_score(truth[:, j], given[:, j])) == pytest.approx(zeroshot.average_precision(given[:, j], truth[:, j]))
        assert one["F1"].value == pytest.approx(f1_score(truth[:, j], given[:, j] >= 0.5)) and one["AUROC"].low < one["AUROC"].value < one["AUROC"].high
    draw = rng.integers(0, 120, 120)  # what the bootstrap computes for a draw is the score of that draw
    assert whole["macro AUROC"].items.statistic(draw) == pytest.approx(roc_auc_score(truth[draw], given[draw]))
    order = rng.permutation(120)
    again = by_name(zeroshot.score([findings(truth, names)[i] for i in order], [chances(given, names)[i] for i in order]))
    assert {k: s.value for k, s in again.items()} == pytest.approx({k: s.value for k, s in whole.items()})


def test_a_failure_is_the_surest_wrong_answer():
    truth = [(1,), (0,), (1,), (0,)]
    good = [(0.9,), (0.1,), (0.8,), (0.2,)]
    value = lambda given: {k: s.value for k, s in by_name(zeroshot.score(findings(truth, "a"), chances(given, "a"))).items()}  # noqa: E731
    whole = value(good)
    assert whole["macro AUROC"] == whole["macro AUPRC"] == whole["macro F1"] == 1
    for lost in range(4):
        less = value([None if i == lost else p for i, p in enumerate(good)])
        assert less["macro AUROC"] == 0.5 and less["macro F1"] < 1 and less["macro AUPRC"] < 1 and less["Brier over labels"] > 0.25
    nothing = value([None] * 4)
    assert nothing["macro AUROC"] == 0 == nothing["macro AUPRC"] == nothing["macro F1"] and nothing["Brier over labels"] == 1 == nothing["class-wise ECE"]
    part = [Prediction(str(i), choices={"other": 1.0, "a": NAN}) for i in range(4)]  # an answer to something else
    assert by_name(zeroshot.score(findings(truth, "a"), part))["macro AUROC"].value == 0


def test_a_label_the_model_has_not_learned_loses_only_itself():
    class Knows(Model):
        def classify(self, study, labels, image=None):
            if unknown := [n for n in labels if n != "a"]:
                raise ModelError(f"has not learned {unknown[0]}", "UNKNOWN_TARGET")
            return {"a": 0.8}

    asked = findings([(1, 0), (0, 1)])
    said = Knows().predict(asked)
    assert [dict(p.choices) for p in said] == [{"a": 0.8}] * 2 and not any(p.error for p in said)
    scores = zeroshot.score(asked, said)
    assert by_name(scores, "label=a")["AUROC"].value == 0.5 and by_name(scores, "label=b")["AUROC"].value == 0
    assert Knows().predict(findings([(1,)], "b"))[0].error.startswith("UNKNOWN_TARGET")


def test_labels_of_one_class_have_no_auroc():
    truth = [(1, 0), (0, 0), (1, 0), (0, 0), (0, 0)]
    scores = zeroshot.score(findings(truth), chances([(0.9, 0.9), (0.2, 0.8), (0.8, 0.1), (0.1, 0.7), (0.3, 0.2)]))
    whole, b = by_name(scores), by_name(scores, "label=b")
    assert whole["macro AUROC"].value == 1 and "1 of 2 labels with both classes" in whole["macro AUROC"].convention
    assert math.isnan(b["AUROC"].value) and math.isnan(b["F1"].value) and b["AUROC"].note and b["AUROC"].n == 5
    none = by_name(zeroshot.score(findings([(1, NAN)] * 6), chances([(0.9, 0.9)] * 6)))
    assert math.isnan(none["macro AUROC"].value) and none["macro AUROC"].note == "no label has both classes" and none["macro F1"].value == 1


def test_thresholds_come_from_val_and_never_from_test():
    told, said = np.array([[1.0], [1], [0], [0], [1]]), np.array([[0.3], [0.2], [0.1], [0.25], [NAN]])
    # from .3: 1 hit of 2 -> 2/3 · .25: 1 hit 1 false -> 1/2 · .2: 2 hits 1 false -> 4/5 · .1: 2 of 2, 2 false -> 2/3
    assert zeroshot.best_cuts(told, said).tolist() == [0.2] and zeroshot.best_cuts(told * 0, said).tolist() == [0.5]
    samples = findings([(1,), (0,), (1,)], "a")
    val = [Sample(f"v{i}", labels={"a": float(t[0])}, choices=("a",), meta={"fit": "val"}) for i, t in enumerate(told)]
    given = [*chances([(0.24,), (0.1,), (0.22,)], "a"), *(Prediction(f"v{i}", choices={"a": p[0]}) for i, p in enumerate(said))]
    whole = by_name(zeroshot.score([*samples, *val], given))
    assert whole["macro F1"].value == 0 and whole["macro F1 at val threshold"].value == 1 and whole["macro F1"].n == 3


def test_classes_by_hand():
    names = ("x", "y", "z")
    table = np.array([[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]], float)  # truth in rows; last column no answer; 6 items
    truth = [names[i] for i in range(3) for j in range(4) for _ in range(int(table[i, j]))]
    said = [(*names, None)[j] for i in range(3) for j in range(4) for _ in range(int(table[i, j]))]
    predictions = [Prediction(str(i), error="X: y") if c is None else Prediction(str(i), c, 1.0, {n: float(n == c) for n in names}) for i, c in enumerate(said)]
    whole = by_name(zeroshot.score(classes(truth, names), predictions))
    assert whole["accuracy"].value == pytest.approx(4 / 6) and whole["accuracy"].chance == pytest.approx(1 / 3)
    assert whole["balanced accuracy"].value == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert whole["macro F1"].value == pytest.approx((4 / 5 + 2 / 4 + 1) / 3)  # x: 2·2 / (3 + 2), y: 2 / (2 + 2), z: 2 / 2
    # truth 3 2 1, said 2 2 1 and 1 none: c s - sum = 4·6 - (6 + 4 + 1) = 13; s^2 - truth = 36 - 14, s^2 - said = 36 - 10
    assert whole["MCC"].value == pytest.approx(13 / math.sqrt(22 * 26))
    assert whole["kappa"].value == pytest.approx((4 / 6 - 11 / 36) / (1 - 11 / 36))
    assert whole["Brier over classes"].value == pytest.approx((0 + 0 + 2 + 0 + 2 + 0) / 6)  # one wrong, one failed
    assert whole["accuracy"].n == 6 and whole["confidence given"].value == 1 and whole["AUROC of confidence"].value == pytest.approx((4 + 4 / 2) / 8)


def test_classes_are_scikit_learns():
    from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, f1_score, matthews_corrcoef, roc_auc_score

    rng, names = np.random.default_rng(0), ("a", "b", "c", "d")
    truth = rng.integers(0, 4, 150)
    p = rng.dirichlet(np.ones(4), 150) + 0.4 * np.eye(4)[truth]
    p /= p.sum(1, keepdims=True)
    said = p.argmax(1)
    failed = rng.random(150) < 0.1
    for lost in (np.zeros(150, bool), failed):
        answers = np.where(lost, 4, said)
        whole = by_name(zeroshot.score(classes([names[t] for t in truth], names), chances([None if bad else row for row, bad in zip(p, lost)], names)))
        assert whole["accuracy"].value == pytest.approx((answers == truth).mean()) and whole["MCC"].value == pytest.approx(matthews_corrcoef(truth, answers))
        assert whole["kappa"].value == pytest.approx(cohen_kappa_score(truth, answers))
        assert whole["macro F1"].value == pytest.approx(f1_score(truth, answers, average="macro", labels=range(4)))
        if not lost.any():
            assert whole["balanced accuracy"].value == pytest.approx(balanced_accuracy_score(truth, said))
            assert whole["macro AUROC"].value == pytest.approx(roc_auc_score(truth, p, multi_class="ovr"))


def test_a_class_may_be_answered_in_words():
    samples = classes(["cyst", "mass", "mass", "cyst", "mass"], ("cyst", "mass"))
    said = [Prediction("0", "Cyst."), Prediction("1", "the mass"), Prediction("2", "cyst"), Prediction("3", "a mass or a cyst"), Prediction("4", "")]
    whole = by_name(zeroshot.score(samples, said))
    assert whole["accuracy"].value == 2 / 5 and whole["accuracy"].n == 5 and whole["Brier over classes"].value == pytest.approx((0 + 0 + 2 + 2 + 2) / 5)
    tied = Prediction("0", choices={"mass": 0.5, "cyst": 0.5})
    assert zeroshot.chosen(samples[0], tied) == "cyst"  # the first by name, whatever order the model answered in


def test_one_class_in_all_and_one_answer_to_all():
    samples, names = classes(["x"] * 6, ("x", "y")), ("x", "y")
    whole = by_name(zeroshot.score(samples, chances([(0.9, 0.1)] * 6, names)))
    assert whole["accuracy"].value == 1 == whole["balanced accuracy"].value and math.isnan(whole["MCC"].value) and math.isnan(whole["kappa"].value)
    assert math.isnan(whole["macro AUROC"].value) and whole["macro AUROC"].note
    constant = by_name(zeroshot.score(classes("xyxyxy", names), chances([(0.9, 0.1)] * 6, names)))
    assert constant["MCC"].value == 0 == constant["kappa"].value and constant["macro AUROC"].value == 0.5 and constant["balanced accuracy"].value == 0.5
    failed = by_name(zeroshot.score(classes("xyxyxy", names), chances([None] * 6, names)))
    assert failed["accuracy"].value == 0 == failed["macro AUROC"].value == failed["macro F1"].value and failed["accuracy"].n == 6
    with pytest.raises(MedVLMError) as e:
        zeroshot.score(samples, chances([(0.9, 0.1)] * 5, names))
    assert e.value.code == "BAD_ARGUMENT"


def test_prompt_sets_are_whole():
    assert len(zeroshot.PROMPTS["conch"][0]) == 22
    for present, absent in zeroshot.PROMPTS.values():
        assert present and all(p.count("{}") == 1 for p in (*present, *absent)) and len(set(present + absent)) == len(present + absent)
    names = {zeroshot.prompts_of(m, alone) for m in ("ct", "xray", "pathology") for alone in (True, False)}
    assert names <= zeroshot.PROMPTS.keys() and all(bool(zeroshot.PROMPTS[zeroshot.prompts_of("ct", alone)][1]) == alone for alone in (True, False))


def pair(id, text, image, words, error=None, **meta):
    vectors = {k: np.array(v, float) for k, v in (("image", image), ("text", words)) if v is not None}
    return row(id, text=text, **meta), Prediction(str(id), vectors=vectors, error=error)


def test_retrieval_takes_reports_and_captions():
    asked = Sample("q", images={"xray-1": PICTURE}, turns=(Turn("user", "?"), Turn("assistant", "yes")))
    data = [row(1, text="Clear lungs."), row(2), row(3, text="  "), asked, Sample("w", turns=(Turn("assistant", "words only"),))]
    found = retrieve.prepare(reader(test=data), "test")
    assert [(s.id, s.verb, s.answer) for s in found] == [("1", "embed", "Clear lungs.")] and retrieve.prepare(reader(), "test") == []


def test_retrieval_by_hand():
    # similarities image x text: 0: 1 0 .6 · 1: .8 .6 1 (its text has .6) · 2: 0 1 .8 (its text has .8)
    pairs = [pair(0, "A", (1, 0), (1, 0)), pair(1, "B", (0.8, 0.6), (0, 1)), pair(2, "C", (0, 1), (0.6, 0.8))]
    samples, said = (list(x) for x in zip(*pairs))
    whole = by_name(retrieve.score(samples, said))
    # image to text: places 1, 3, 2 · text to image, columns: A 1 .8 0 -> 1; B 0 .6 1 -> 2; C .6 .96 .8 -> 2 (image 1 is ahead)
    near = np.array([[1, 0, 0.6], [0.8, 0.6, 0.96], [0, 1, 0.8]])
    assert retrieve.ranks(near, np.eye(3, dtype=bool)).tolist() == [1, 3, 2] and retrieve.ranks(near.T, np.eye(3, dtype=bool)).tolist() == [1, 2, 2]
    assert whole["image to text recall@1"].value == pytest.approx(1 / 3) == whole["text to image recall@1"].value
    assert whole["image to text recall@1"].chance == pytest.approx(1 / 3) and whole["image to text median rank"].value == 2 == whole["image to text median rank"].chance
    five = whole["image to text recall@5"]
    assert five.value == 1 == five.chance and "only 3 candidates" in five.note and "only" not in whole["image to text recall@1"].note
    assert whole["image to text median rank"].unit == "rank" and whole["image to text median rank"].better == "lower"


def test_ties_are_lost_and_equal_texts_are_one():
    flat = [pair(i, f"text {i}", (1, 0), (1, 0)) for i in range(20)]  # a model that embeds everything alike
    whole = by_name(retrieve.score(*(list(x) for x in zip(*flat))))
    assert whole["image to text recall@10"].value == 0 and whole["image to text median rank"].value == 20 and whole["text to image recall@10"].chance == pytest.approx(0.5)
    # three normal reports and one that is not: two texts; a normal text has three images to find among four
    pairs = [pair(0, "Normal chest.", (1, 0), (1, 0)), pair(1, "normal  CHEST.", (0.9, 0.1), (1, 0)), pair(2, "Normal chest.", (0, 1), (1, 0)),
             pair(3, "Mass.", (0.1, 0.9), (0, 1))]  # fmt: skip
    whole = by_name(retrieve.score(*(list(x) for x in zip(*pairs))))
    assert whole["image to text recall@1"].value == 3 / 4 and whole["image to text recall@1"].chance == 1 / 2  # image 2 lies with the mass
    assert whole["text to image recall@1"].value == 3 / 4 and whole["text to image recall@1"].chance == pytest.approx((3 * 3 / 4 + 1 / 4) / 4)
    # the mass's best image is 2, which is not its own
    assert retrieve.chance_of(np.array([3]), 10, 2) == pytest.approx(1 - (7 / 10) * (6 / 9)) and retrieve.chance_of(np.array([1]), 4, 9) == 1
    one = [pair(i, f"text {i}", (1, 0), (1, i), row="same") for i in range(3)]  # three texts of one image: any of them is right
    assert by_name(retrieve.score(*(list(x) for x in zip(*one))))["image to text recall@1"].value == 1


def test_what_was_not_embedded_is_wrong():
    rng = np.random.default_rng(0)
    v = rng.normal(0, 1, (12, 30))
    pairs = [pair(i, f"text {i}", v[i], v[i]) for i in range(12)]
    perfect = by_name(retrieve.score(*(list(x) for x in zip(*pairs))))
    assert perfect["image to text recall@1"].value == 1 == perfect["text to image recall@1"].value and perfect["image to text median rank"].value == 1
    pairs[0] = pair(0, "text 0", v[0], v[0], error="X: y")
    pairs[1] = pair(1, "text 1", v[1], None)
    pairs[2] = pair(2, "text 2", np.full(30, NAN), v[2])
    whole = by_name(retrieve.score(*(list(x) for x in zip(*pairs))))
    for name in ("image to text", "text to image"):
        for k in (1, 5, 10):
            assert whole[f"{name} recall@{k}"].value == 9 / 12 and (whole[f"{name} recall@{k}"].n, whole[f"{name} recall@{k}"].excluded) == (12, 0)
    nothing = by_name(retrieve.score([s for s, _ in pairs], [Prediction(s.id, error="X: y") for s, _ in pairs]))
    assert all(s.value == (12 if s.unit else 0) for s in nothing.values())
    order = rng.permutation(12)
    again = by_name(retrieve.score(*(list(x) for x in zip(*(pairs[i] for i in order)))))
    assert {k: s.value for k, s in again.items()} == {k: s.value for k, s in whole.items()}


def test_vectors_of_two_spaces_are_refused():
    for other in (pair(1, "b", (1, 0, 0), (1, 0, 0)), pair(1, "b", (1, 0), (1, 0, 0))):
        with pytest.raises(MedVLMError) as e:
            retrieve.score(*(list(x) for x in zip(pair(0, "a", (1, 0), (1, 0)), other)))
        assert e.value.code == "BAD_ARGUMENT" and "2" in e.value.message and "3" in e.value.message


def blobs(n, seed, single=True, spread=0.6, sites=1):
    """(samples, vectors) of two classes that a line parts."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.normal(0, spread, (n, 6)) + np.where(y, 1, -1)[:, None] * np.array([1, 0.5, 0, 0, 0, 0])
    labels = [{"mass": float(t)} if not single else {} for t in y]
    return [row(f"{seed}-{i}", labels[i], site=f"s{i // 2 % sites}", **({"class": "mass" if y[i] else "cyst"} if single else {})) for i in range(n)], x, y


def probe(train, test, val=None, single=True, lose=()):
    splits = {"train": train, "test": test} | ({"val": val} if val else {})
    samples = linear_probe.prepare(reader(**{k: s for k, (s, *_) in splits.items()}), "test")
    vectors = {f"{s.id}@image": v for given, x, *_ in splits.values() for s, v in zip(given, x)}
    said = [Prediction(s.id, error="X: y") if s.id in lose else Prediction(s.id, vectors={"image": vectors[s.id] / np.linalg.norm(vectors[s.id])}) for s in samples]
    return samples, said


def test_the_probe_embeds_what_it_fits_and_what_it_scores():
    train, test, val = blobs(8, 0), blobs(4, 1), blobs(4, 2)
    samples, _ = probe(train, test, val)
    assert len(samples) == 16 and [s.meta.get("fit") for s in samples] == [None] * 4 + ["train"] * 8 + ["val"] * 4
    assert all(s.verb == "embed" and s.id.endswith("@image") and not s.turns and s.choices == ("cyst", "mass") for s in samples)
    one = [s for s in train[0] if s.meta["class"] == "mass"]
    assert linear_probe.prepare(reader(train=one, test=[s for s in test[0] if s.meta["class"] == "mass"]), "test") == []
    assert linear_probe.prepare(reader(test=test[0]), "test") == [] == linear_probe.prepare(reader(train=train[0]), "test")


@pytest.mark.parametrize("single", [True, False])
def test_the_probe_is_scikit_learns(single):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, test = blobs(40, 0, single, 1.2), blobs(60, 1, single, 1.2)
    scores = linear_probe.score(*probe(train, test, single=single))
    whole = by_name(scores)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    scale = StandardScaler().fit(unit(train[1]))
    theirs = LogisticRegression(C=1.0, max_iter=2000).fit(scale.transform(unit(train[1])), train[2]).predict_proba(scale.transform(unit(test[1])))[:, 1]
    assert whole["macro AUROC"].value == pytest.approx(auroc(theirs, test[2]), abs=1e-6) and 0.6 < whole["macro AUROC"].value < 1
    if single:
        assert whole["accuracy"].value == pytest.approx(((theirs > 0.5) == test[2]).mean()) and whole["accuracy"].n == 60
    assert "not chosen, no val: 1;" in whole["macro AUROC"].convention
    few = [whole[f"{k}-shot {'accuracy' if single else 'macro AUROC'}"] for k in (1, 2, 4, 8, 16)]
    assert few[0].value < few[-1].value and all(s.low < s.value < s.high and "by seed" in s.note and s.chance == 0.5 for s in few)
    seeds = [float(v) for v in few[0].note.removeprefix("by seed ").split()[:5]]
    assert np.mean(seeds) == pytest.approx(few[0].value, abs=1e-3) and len(set(seeds)) > 1
    assert [s.value for s in linear_probe.score(*probe(train, test, single=single)) if "shot" in s.name] == [s.value for s in few]


def test_the_strength_is_chosen_on_val():
    train, test, val = blobs(40, 0, False, 2), blobs(30, 1, False, 2), blobs(40, 2, False, 2)
    whole = by_name(linear_probe.score(*probe(train, test, val, single=False)))
    assert "C chosen on val: " in whole["macro AUROC"].convention and "macro F1 at val threshold" in whole and whole["macro AUROC"].n == 30
    rng = np.random.default_rng(0)  # val whose labels are noise cannot make test better or worse than some C of the list
    other = (val[0], rng.normal(0, 1, val[1].shape), val[2])
    assert linear_probe.score(*probe(train, test, other, single=False))[0].n == 30


def test_images_that_were_not_embedded():
    train, test = blobs(40, 0, spread=0.2), blobs(20, 1, spread=0.2)
    sound = by_name(linear_probe.score(*probe(train, test)))
    assert sound["accuracy"].value == 1 == sound["16-shot accuracy"].value
    lost = {f"{s.id}@image" for s in (*train[0][:9], *test[0][:5])}
    whole = by_name(linear_probe.score(*probe(train, test, lose=lost)))
    assert whole["accuracy"].value == 15 / 20 == whole["4-shot accuracy"].value and whole["accuracy"].n == 20
    assert "9 of 40 training images were not embedded" in whole["accuracy"].note
    assert math.isnan(whole["16-shot accuracy"].value) and "fewest: 15" in whole["16-shot accuracy"].note
    all_of_them = {f"{s.id}@image" for s in (*train[0], *test[0])}
    nothing = by_name(linear_probe.score(*probe(train, test, lose=all_of_them)))
    assert nothing["accuracy"].value == 0 == nothing["macro AUROC"].value and nothing["accuracy"].n == 20


def test_the_probe_says_how_robust_its_space_is():
    train, test = blobs(40, 0, spread=0.2, sites=3), blobs(60, 1, spread=0.2, sites=3)
    found = by_name(linear_probe.score(*probe(train, test)))["robustness index"]
    assert found.value == 1 and found.n == 60 and 0.3 < found.chance < 0.9
    assert "robustness index" not in by_name(linear_probe.score(*probe(blobs(40, 0), blobs(20, 1))))
