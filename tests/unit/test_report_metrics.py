"""Report scores by hand; what lowers which; errors put in on purpose; real reports against each other."""

import json
import math
import sys
import types

import pytest

from medvlm.errors import MedVLMError
from medvlm.evaluate import lexical
from medvlm.evaluate.clinical import clinical
from medvlm.evaluate.injection import KINDS, detection, inject, sensitivity
from medvlm.evaluate.labeller import label
from medvlm.evaluate.report import CONVENTIONS, TASK, cases, own_words, score, sides
from medvlm.sample import Mask, Prediction, Sample, Turn

FULL = "FINDINGS: {}\nIMPRESSION: {}"
REPORT = FULL.format(
    "The heart is mildly enlarged. There is a small left pleural effusion. No pneumothorax or consolidation. "
    "A 5 mm nodule is seen in the right upper lobe.",
    "Small left pleural effusion. Right lung nodule of 5 mm.",
)


def pairs(*texts):
    """Samples and predictions of (report, reference)."""
    samples = [Sample(str(i), turns=(Turn("assistant", truth),)) for i, (_, truth) in enumerate(texts)]
    errors = [text.code if isinstance(text, MedVLMError) else None for text, _ in texts]
    return samples, [Prediction(str(i), "Effusion." if e else text, error=e) for i, (e, (text, _)) in enumerate(zip(errors, texts))]


def scored(*texts, convention="medvlm"):
    return {s.name: s for s in score(*pairs(*texts), convention)}


def test_findings_by_hand():
    # report a: hit effusion, wrong edema, missed cardiomegaly; report b: hit No Finding
    got = scored(("Right effusion. Edema.", "Cardiomegaly. Right pleural effusion."), ("The lungs are clear.", "Lungs are clear. No effusion."))
    assert got["F1-14 micro"].value == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))  # hits: effusion, No Finding
    assert got["F1-14 macro"].value == pytest.approx((1 + 1 + 0 + 0) / 4)  # effusion, No Finding, edema, cardiomegaly; ten are in neither
    assert got["F1-5 micro"].value == pytest.approx(2 * 1 / (2 * 1 + 1 + 1)) and got["F1-5 macro"].value == pytest.approx((1 + 0 + 0) / 3)
    assert got["finding precision"].value == got["finding recall"].value == 0.5
    assert got["hallucinated findings"].value == got["omitted findings"].value == 0.5  # one in two reports
    assert got["laterality agreement"].value == 1 and got["F1-14 micro"].n == 2
    same = ("Right effusion. Edema.", "Cardiomegaly. Right pleural effusion."), ("The lungs are clear.", "Lungs are clear. No effusion.")
    theirs = scored(*same, convention="radeval")
    assert theirs["F1-14 macro"].value == pytest.approx((1 + 1) / 14) and theirs["F1-5 macro"].value == pytest.approx(1 / 5)


def test_doubt_by_name():
    texts = ("Pneumonia.", "Possible pneumonia.")
    assert scored(texts)["F1-14 micro"].value == 1
    got = scored(texts, convention="uncertain-negative")
    # pneumonia is wrong; No Finding is denied by both
    assert got["F1-14 micro"].value == 0 and got["hallucinated findings"].value == 1 and got["negation agreement"].value == 0
    assert scored(texts, convention="radeval")["F1-14 micro"].value == 1


def test_agreement_by_hand():
    # both speak of effusion (against each other) and pneumothorax (agree); the report alone of edema
    got = scored(("No effusion. No pneumothorax. Edema.", "Left effusion. No pneumothorax."))
    assert got["negation agreement"].value == pytest.approx(1 / 2)
    # both have all three; right against left, left as left, and no side where there is one
    got = scored(("Right effusion. Left consolidation. Atelectasis.", "Left effusion. Left consolidation. Right atelectasis."))
    assert got["laterality agreement"].value == pytest.approx(1 / 3)
    assert sides("Right effusion. Left effusion. Bilateral opacities. Edema.") == {"Pleural Effusion": "both", "Lung Opacity": "both"}


def test_form_by_hand():
    both = FULL.format("Clear lungs.", "Normal."), FULL.format("The lungs are clear.", "No disease.")
    got = scored(both, ("Clear lungs.", FULL.format("Clear.", "Normal chest.")), ("Clear lungs.", "Lungs are clear now."))
    assert got["length ratio"].value == pytest.approx((3 / 6 + 2 / 3 + 2 / 4) / 3) and got["length ratio"].better == "neither"
    assert got["section coverage"].value == pytest.approx((1 + 0) / 2) and got["section coverage"].excluded == 1


def test_wording_is_that_of_the_texts_without_headings():
    said, truth = "FINDINGS: Heart is large.\nIMPRESSION: Effusion.", "INDICATION: cough\nFINDINGS: The heart is large.\nIMPRESSION: Small effusion."
    a, b = "Heart is large. Effusion.", "The heart is large. Small effusion."
    assert own_words(truth).split() == b.split()
    got = scored((said, truth), (said, said))
    for order in (1, 4):
        assert got[f"BLEU-{order}"].value == pytest.approx(lexical.corpus_bleu([a, a], [b, a], order))
    assert got["ROUGE-L"].value == pytest.approx((lexical.rouge_l(a, b) + 1) / 2)
    assert got["METEOR"].value == pytest.approx((lexical.meteor(a, b) + lexical.meteor(a, a)) / 2)
    assert got["CIDEr-D"].value == pytest.approx(lexical.cider_d([a, a], [b, a]).mean()) and got["CIDEr-D"].unit == "of 10"


def test_conventions_by_hand():
    truth = FULL.format("Heart normal.", "Clear lungs")
    # reference: findings: heart normal . impression: clear lungs .   said: heart normal .   3 of 3 words; 8 against 3 long
    got = scored(("Heart normal.", truth), convention="medevalkit")
    assert got["BLEU-1"].value == pytest.approx(math.exp(1 - 8 / 3))
    # words as they stand: "Heart normal." of "Heart", "normal.", "Clear", "lungs"; lower case would not match
    assert scored(("Heart normal.", truth), convention="radeval")["BLEU-1"].value == pytest.approx(math.exp(1 - 4 / 2))
    assert scored(("heart NORMAL", truth), convention="radeval")["BLEU-1"].value == 0
    # the findings alone; a reference without them is excluded, a text without headings is all findings
    both = FULL.format("Edema.", "Effusion."), FULL.format("Edema.", "Atelectasis.")
    got = scored(both, ("Edema.", "IMPRESSION: Edema."), ("Edema.", "Edema."), convention="findings")
    assert got["F1-14 micro"].value == 1 and (got["F1-14 micro"].n, got["F1-14 micro"].excluded) == (2, 1)
    assert got["BLEU-1"].value == 1 and got["ROUGE-L"].excluded == got["BLEU-1"].excluded == 1
    with pytest.raises(MedVLMError, match="no convention 'x'"):
        scored(("a", "b"), convention="x")


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_nothing_leaves_the_denominator(convention):
    error = MedVLMError("broken", "BAD_ARGUMENT")
    good, empty = scored((REPORT, REPORT), convention=convention), scored((REPORT, REPORT), (" ...", REPORT), (error, REPORT), convention=convention)
    for name in ("ROUGE-L", "METEOR", "section coverage"):
        assert empty[name].value == pytest.approx(good[name].value / 3) and (empty[name].n, empty[name].excluded) == (3, 0)
    for name in ("F1-14 micro", "F1-5 micro"):  # all hits of one report, and as many misses in each of the two others
        assert good[name].value == 1 and empty[name].value == pytest.approx(2 / (2 + 2))
    for name in ("finding recall", "negation agreement", "laterality agreement"):
        assert good[name].value == 1 and empty[name].value == pytest.approx(1 / 3)
    assert empty["omitted findings"].value == pytest.approx(2 * 3 / 3) and empty["hallucinated findings"].value == 0
    nothing = scored(("", REPORT), (error, REPORT), convention=convention)
    zero = set(nothing) - {"omitted findings"}
    assert {name for name in zero if nothing[name].value == 0} == zero and all(s.n == 2 for s in nothing.values())


def test_words_about_nothing_are_wrong_too():
    got = scored(("I am sorry, I cannot help.", REPORT), ("I am sorry.", "Clear lungs."))
    assert got["F1-14 micro"].value == got["negation agreement"].value == got["laterality agreement"].value == 0


def test_an_empty_reference_is_excluded_and_counted():
    got = scored((REPORT, REPORT), (REPORT, "FINDINGS:"))
    assert {(s.n, s.excluded) for name, s in got.items()} == {(1, 1)}
    assert got["F1-14 micro"].value == got["BLEU-4"].value == 1
    none = scored((REPORT, " "))
    assert all(math.isnan(s.value) and s.n == 0 and s.excluded == 1 for s in none.values())


def test_predictions_must_be_those_of_the_samples():
    samples, said = pairs(("a", "b"), ("c", "d"))
    for wrong in (said[:1], said[::-1], [*said, said[0]]):
        with pytest.raises(MedVLMError, match="predictions"):
            score(samples, wrong)
    with pytest.raises(MedVLMError, match="two samples"):
        score([samples[0]] * 2, [said[0]] * 2)


def test_cases_say_what_was_made_up_left_out_and_swapped():
    swapped = ("Right effusion. Edema. No fracture.", "Left effusion. Cardiomegaly. No fracture.")
    samples, said = pairs(swapped, ("Clear lungs.", "Clear lungs."), ("x", ""))
    assert cases(samples, said) == [
        {"id": "0", "hallucinated": ["Edema"], "omitted": ["Cardiomegaly"], "side_swapped": ["Pleural Effusion"]},
        {"id": "1", "hallucinated": [], "omitted": [], "side_swapped": []},
    ]


def test_what_is_asked():
    report = Sample("a", turns=(Turn("assistant", "Clear lungs."),))
    question = Sample("b", turns=(Turn("user", "Effusion?"), Turn("assistant", "no")))
    mask = Sample("c", turns=(Turn("assistant", "x"),), masks=(Mask("i", "lung", None),))
    asked = TASK.prepare(lambda split: [report, question, Sample("d"), mask], "test")
    assert [(s.id, s.verb) for s in asked] == [("a", "report")] and TASK.prepare(lambda split: [], "test") == []
    assert TASK.rank == 3 and not TASK.blind


def test_every_score_has_an_interval_and_says_what_it_is():
    truths = ("Left effusion. No edema.", "Right effusion. Edema.")
    texts = [("Left effusion. Clear lungs." * (i % 3 + 1), truths[i % 2]) for i in range(8)]
    for name, s in scored(*texts).items():
        assert s.low is not None and s.low <= s.value <= s.high or name == "section coverage", name
        assert CONVENTIONS["medvlm"] in s.convention and s.items is not None or s.n == 0


def test_a_flipped_negation_lowers_the_findings_but_hardly_the_wording():
    wrong = REPORT.replace("No pneumothorax", "Pneumothorax")
    got = scored((wrong, REPORT))
    assert got["BLEU-4"].value > 0.9 and got["ROUGE-L"].value > 0.95
    assert got["F1-14 micro"].value == pytest.approx(2 * 3 / (2 * 3 + 2))  # pneumothorax and consolidation are made up, three are right
    assert got["negation agreement"].value == pytest.approx(3 / 5) and got["laterality agreement"].value == 1


@pytest.mark.parametrize("kind", KINDS)
def test_injected_errors(kind):
    seen = set()
    for seed in range(25):
        wrong, what = inject(REPORT, kind, seed)
        assert inject(REPORT, kind, seed) == (wrong, what) and wrong != REPORT
        before, after = label(REPORT), label(wrong)
        finding = what.split(":")[0]
        if kind == "negation":
            assert {before[finding], after[finding]} == {0, 1}
        elif kind == "side":
            assert before == after and {sides(REPORT)[finding], sides(wrong)[finding]} == {"left", "right"}
        elif kind == "added":
            assert before[finding] is None and after[finding] == 1 and len(wrong) > len(REPORT)
        elif kind == "removed":
            assert before[finding] == 1 and after[finding] != 1 and len(wrong) < len(REPORT)
        else:
            assert before == after and what in ("5 -> 10", "5 -> 15", "5 -> 2.5") and what.split()[-1] in wrong
        assert wrong.startswith("FINDINGS: ") and wrong.count("\nIMPRESSION: ") == 1
        seen.add(wrong)
    assert len(seen) > 1
    assert inject("", kind) is None and inject("Normal.", kind) is None or kind == "added"


@pytest.mark.parametrize(
    ("text", "flipped"),
    [
        ("There is a small effusion.", "There is no small effusion."),
        ("An effusion.", "No effusion."),
        ("There is no edema.", "There is edema."),
        ("Clear lungs without effusion.", "Clear lungs with effusion."),
        ("No evidence of pneumothorax.", "Pneumothorax."),
        ("The heart is moderately enlarged.", "The heart is not enlarged."),
        ("Heart size is within normal limits.", "Heart size is enlarged."),
        ("Normal heart size.", "Enlarged heart size."),
    ],
)
def test_a_flipped_negation_reads_well(text, flipped):
    assert inject(text, "negation")[0] == flipped


def test_unknown_errors_are_refused():
    with pytest.raises(ValueError, match="'typo'"):
        inject(REPORT, "typo")


def test_sensitivity_and_detection_by_hand():
    texts = [REPORT, "Left effusion.", "Clear lungs."]
    rows = {(s.name, s.slice): s for s in sensitivity(lambda said, truth: float(label(said) == label(truth)), texts)}
    assert rows["noticed", "kind=negation"].value == 1 and rows["drop", "kind=negation"].value == 1
    assert rows["noticed", "kind=side"].value == 0 and rows["noticed", "kind=number"].value == 0  # labels know no side
    assert (rows["noticed", "kind=side"].n, rows["noticed", "kind=side"].excluded) == (2, 1)  # "Clear lungs." has none
    checked = {(s.name, s.slice): s.value for s in detection(lambda said, truth: sides(said) != sides(truth), texts, ("side", "number"))}
    by_kind = {("sensitivity", "kind=side"): 1, ("sensitivity", "kind=number"): 0}
    assert checked == by_kind | {("specificity", "all"): 1, ("balanced accuracy", "all"): 0.75}
    always = detection(lambda said, truth: True, texts, ("side",))
    assert [s.value for s in always] == [1, 0, 0.5] and always[-1].chance == 0.5


def test_real_reports_in_order(data):
    """A report against itself, its negation-flipped self and the next patient's: in this order, on average over the set."""
    lines = (json.loads(line) for line in (data / "report_iu" / "manifest.jsonl").open(encoding="utf-8"))
    texts = [r["text"] for r in lines if r["split"] == "val"][:120]
    flipped = [(inject(t, "negation", i) or (t, ""))[0] for i, t in enumerate(texts)]
    itself, wrong, other = (scored(*zip(said, texts)) for said in (texts, flipped, texts[1:] + texts[:1]))
    assert sum(a != b for a, b in zip(texts, flipped)) > 100
    fall = ("BLEU-1", "BLEU-4", "ROUGE-L", "METEOR", "CIDEr-D", "F1-14 micro", "F1-5 micro", "finding precision", "finding recall")
    for name in fall:
        assert itself[name].value > wrong[name].value > other[name].value, name
    for name in (*fall[:3], *fall[5:], "F1-14 macro", "negation agreement", "laterality agreement", "length ratio"):
        assert itself[name].value == pytest.approx(1), name
    assert itself["hallucinated findings"].value == itself["omitted findings"].value == 0
    assert wrong["BLEU-4"].value > 0.9 and wrong["negation agreement"].value < 0.8 and wrong["F1-14 micro"].value < 0.75


class StandIn:
    """The part of RadEval that is used, with the values a test gives it."""

    TARGET_NAMES = ["Edema", "Pleural Effusion", "Cardiomegaly", "Consolidation", "Atelectasis", "Pneumonia", "Lung Opacity", "Lung Lesion",
                    "Fracture", "Pneumothorax", "Enlarged Cardiomediastinum", "Pleural Other", "Support Devices", "No Finding"]  # fmt: skip

    def __init__(self, metrics, per_sample, show_progress):
        assert per_sample and len(metrics) == 1
        self.f1chexbert_scorer = self
        if metrics == ["ratescore"]:
            raise OSError("no network")

    def __call__(self, refs, hyps):
        assert all(refs) and all(hyps)
        same = [float(r == h) for r, h in zip(refs, hyps)]
        return {"radgraph_simple": same, "radgraph_partial": same, "radgraph_complete": [0.5] * len(same), "green": same}

    def get_labels(self, reports, mode):
        assert mode == "classification"
        return [[-1 if f"possible {n.lower()}" in r.lower() else int(n.lower() in r.lower()) for n in self.TARGET_NAMES] for r in reports]


def test_metrics_through_radeval(monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", types.SimpleNamespace(RadEval=StandIn))
    samples, said = pairs(("Edema.", "Edema."), ("", "Edema."), ("Edema.", ""), ("Possible edema.", "Cardiomegaly."))
    got = {s.name: s for s in clinical(samples, said, ["radgraph", "f1chexbert"])}
    for name in ("radgraph simple", "radgraph complete"):  # 1 + 0 + 0, and 0.5 + 0 + 0.5 of 3
        assert (got[name].value, got[name].n, got[name].excluded) == (pytest.approx(1 / 3), 3, 1)
    # edema: one hit, one missed by the empty report, one made up where doubt is presence; cardiomegaly missed
    assert got["CheXbert F1-14 micro"].value == pytest.approx(2 / (2 + 1 + 2)) and got["CheXbert F1-14 micro"].excluded == 1
    assert got["CheXbert F1-5 macro"].value == pytest.approx((2 / (2 + 1 + 1) + 0) / 5)
    strict = {s.name: s for s in clinical(samples, said, ["f1chexbert"], "uncertain-negative")}
    assert strict["CheXbert F1-14 micro"].value == pytest.approx(2 / (2 + 2))
    assert clinical(samples, said, ["green"], run_code=True)[0].value == pytest.approx(1 / 3)
    with pytest.raises(MedVLMError, match="BAD_CHECKPOINT"):
        clinical(samples, said, ["ratescore"])
    with pytest.raises(MedVLMError, match="runs Python code"):
        clinical(samples, said, ["green"])
    with pytest.raises(MedVLMError, match="no metric 'bleurt'"):
        clinical(samples, said, ["bleurt"])


def test_without_radeval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", None)
    with pytest.raises(MedVLMError, match=r"MISSING_EXTRA.*pip install 'medvlm-toolkit\[clinical\]'"):
        clinical(*pairs(("a", "b")), ["radgraph"])
