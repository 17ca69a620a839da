"""Confidence, calibration, selective prediction, gaps and robustness against worked cases, definitions and scikit-learn."""

import json
import math

import numpy as np
import pytest

from medvlm.errors import MedVLMError
from medvlm.evaluate import gaps, trust
from medvlm.evaluate.statistics import auroc, mean_score, paired_difference
from medvlm.sample import Prediction, Sample, Turn

NAN = float("nan")


def asked(n, **meta):
    return [Sample(str(i), turns=(Turn("user", "Is it?"), Turn("assistant", "yes")), meta=meta) for i in range(n)]


def answers(confidence, errors=()):
    return [Prediction(str(i), "yes", None if math.isnan(c) else c, error="X: y" if i in errors else None) for i, c in enumerate(confidence)]


def mixed(n=300, seed=0):
    rng = np.random.default_rng(seed)
    c = np.round(rng.random(n), 2)  # with ties
    return c, (rng.random(n) < 0.3 + 0.6 * c).astype(float)


def by_name(scores):
    assert len({(s.name, s.slice) for s in scores}) == len(scores)
    return {s.name: s for s in scores if s.slice == "all"}


def test_confidence_is_what_the_model_says_of_its_own_answer():
    said = [Prediction("a", "yes", 0.8), Prediction("b", "no", None, {"yes": 0.3, "no": 0.7}), Prediction("c", "no"), Prediction("d", "no", NAN),
            Prediction("e", "", 0.9, error="X: y"), Prediction("f", "maybe", None, {"yes": 1.0})]  # fmt: skip
    assert np.array_equal(trust.confidences(said), [0.8, 0.7, NAN, NAN, 0.0, NAN], equal_nan=True)


def test_agreement_and_semantic_entropy_by_hand():
    sampled = ["Yes.", "yes", "no", "YES", ""]
    assert trust.agreement("yes", sampled) == 3 / 5 and trust.agreement("", sampled) == 0 and math.isnan(trust.agreement("yes", []))
    assert trust.meanings(["a b", "c", "A, B.", "d", "C!"]) == [0, 1, 0, 2, 1]
    # clusters of 2, 1, 1: -(1/2 ln 1/2 + 2 * 1/4 ln 1/4) = 1/2 ln 2 + 1/2 ln 4 = 1.5 ln 2; of at most ln 4 = 2 ln 2
    four = ["left lung", "Left lung.", "right lung", "none"]
    assert trust.semantic_entropy(four) == pytest.approx(1.5 * math.log(2))
    assert trust.semantic_confidence(four) == pytest.approx(1 - 1.5 / 2)
    assert trust.semantic_entropy(["x"] * 5) == 0 and trust.semantic_confidence(["x"] * 5) == 1
    assert trust.semantic_entropy(list("abcd")) == pytest.approx(math.log(4)) and trust.semantic_confidence(list("abcd")) == pytest.approx(0)
    assert math.isnan(trust.semantic_entropy(["x"])) and math.isnan(trust.semantic_confidence([]))
    assert trust.semantic_entropy(["effusion", "pleural effusion"], same=lambda a, b: "effusion" in a and "effusion" in b) == 0
    assert not trust.equivalent("left effusion, no right", "right effusion, no left")  # the same words say another thing


def test_a_model_is_asked_how_sure_it_is():
    sample = Sample("7", turns=(Turn("user", "Is there a fracture?"), Turn("assistant", "no")), choices=("yes", "no"), group="g")
    again = trust.how_sure(sample, Prediction("7", "yes"))
    assert again.id == "7@sure" and again.verb == "ask" and again.choices is None and again.answer is None
    assert "Is there a fracture?" in again.question and "Answer given: yes" in again.question


@pytest.mark.parametrize(("text", "value"), [
    ("85", 0.85), ("85%", 0.85), ("I am 90 % sure.", 0.9), ("70 out of 100", 0.7), ("70/100", 0.7), ("100", 1.0), ("0", 0.0), ("0.4", 0.4), ("1", 0.01),
    ("1.0", 1.0), ("0.4 %", 0.004), ("62.5", 0.625), ("Question 3: 85 %", 0.85), ("80 percent", 0.8), ("between 80 and 90", NAN), ("very", NAN), ("", NAN), ("120", NAN),
    ("-5", NAN), ("85 or 85", 0.85), ("T2", NAN),
])  # fmt: skip
def test_what_it_says_is_read(text, value):
    assert trust.said_sure(text) == pytest.approx(value, nan_ok=True)


def test_calibration_error_by_hand():
    c, r = [0.05, 0.05, 0.62, 0.64, 0.9, 1.0], [0, 1, 1, 0, 1, 1]
    # bins of 1/15: (0, .067] 2 items: conf .05, acc .5 · (.6, .667] 2: conf .63, acc .5 · (.867, .933] 1: .9, 1 · (.933, 1] 1: 1, 1
    # ECE = (2 * .45 + 2 * .13 + .1 + 0) / 6 = 1.26 / 6
    assert trust.ece(c, r) == pytest.approx(1.26 / 6)
    table = trust.reliability(c, r)
    assert [(b["n"], round(b["confidence"], 3), b["accuracy"]) for b in table] == [(2, 0.05, 0.5), (2, 0.63, 0.5), (1, 0.9, 1.0), (1, 1.0, 1.0)]
    assert table[0]["low"] == 0 and table[-1]["high"] == 1
    # two bins of equal count, bound at the median .63: {.05 .05 .62} conf .24 acc 2/3, {.64 .9 1} conf 2.54/3 acc 2/3
    assert trust.ece(c, r, bins=2, adaptive=True) == pytest.approx((3 * (2 / 3 - 0.24) + 3 * (2.54 / 3 - 2 / 3)) / 6)
    assert trust.ece([0.7] * 4, [1, 1, 1, 0], adaptive=True) == pytest.approx(0.05)  # equal confidences share a bin
    assert math.isnan(trust.ece([], [])) and math.isnan(trust.ece([NAN], [1])) and trust.reliability([], []) == []
    assert trust.ece([0.3, NAN], [0, 1]) == pytest.approx(0.3)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_reliability_table_is_scikit_learns_calibration_curve(adaptive):
    from sklearn.calibration import calibration_curve

    c, r = mixed()
    accuracy, confidence = calibration_curve(r, c, n_bins=15, strategy="quantile" if adaptive else "uniform")
    table = trust.reliability(c, r, adaptive=adaptive)
    assert np.allclose([b["accuracy"] for b in table], accuracy) and np.allclose([b["confidence"] for b in table], confidence)
    assert trust.ece(c, r, adaptive=adaptive) == pytest.approx(sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in table) / len(c))


def test_honest_confidence_has_no_calibration_error():
    rng = np.random.default_rng(0)
    c = rng.random(20000)
    r = (rng.random(20000) < c).astype(float)
    assert trust.ece(c, r) < 0.02 and trust.ece(c, r, adaptive=True) < 0.02
    assert trust.ece(c**2, r) > 0.1 and trust.ece(np.ones(20000), r) == pytest.approx(1 - r.mean())


def test_class_wise_error_by_hand():
    chances, truth = np.array([[0.9, 0.2], [0.9, 0.2], [0.9, 0.8]]), np.array([[1, 0], [1, NAN], [0, 1]])
    # label 1: one bin, conf .9, share 2/3; label 2: {.2: 0} and {.8: 1}, two known, each .2 off
    assert trust.classwise_ece(chances, truth) == pytest.approx(((0.9 - 2 / 3) + 0.2) / 2)
    assert math.isnan(trust.classwise_ece(np.zeros((2, 1)), np.full((2, 1), NAN)))


def test_brier_and_log_loss():
    from sklearn.metrics import brier_score_loss, log_loss

    assert trust.brier([0.8, 0.3], [1, 0]).tolist() == pytest.approx([0.04, 0.09])
    assert trust.brier([[0.7, 0.2, 0.1]], [[0, 1, 0]]).tolist() == pytest.approx([0.49 + 0.64 + 0.01])
    assert trust.log_loss([0.8, 0.25], [1, 0]).tolist() == pytest.approx([-math.log(0.8), -math.log(0.75)])
    assert np.isfinite(trust.log_loss([0.0, 1.0], [1, 0])).all()
    c, r = mixed()
    assert trust.brier(c, r).mean() == pytest.approx(brier_score_loss(r, c)) and trust.log_loss(c, r).mean() == pytest.approx(log_loss(r, c))
    p = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    y = np.random.default_rng(1).integers(0, 3, 50)
    assert trust.brier(p, np.eye(3)[y]).mean() == pytest.approx(brier_score_loss(y, p, labels=[0, 1, 2], scale_by_half=False))


def test_calibrators_undo_what_was_done():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1.5, 20000)
    r = (rng.random(20000) < 1 / (1 + np.exp(-z))).astype(float)
    loud = 1 / (1 + np.exp(-3 * z))  # three times too sure
    found = trust.Calibrator.fit("temperature", loud[:10000], r[:10000])
    assert found.parameters[0][0] == pytest.approx(3, abs=0.15) and found.n == 10000
    (scale, shift), = trust.Calibrator.fit("platt", 1 / (1 + np.exp(-(3 * z - 3)))[:10000], r[:10000]).parameters  # z = (a + 3) / 3
    assert scale == pytest.approx(1 / 3, abs=0.02) and shift == pytest.approx(1, abs=0.08)
    for kind in ("temperature", "platt", "isotonic"):
        fair = trust.Calibrator.fit(kind, loud[:10000], r[:10000])
        assert trust.ece(fair.apply(loud[10000:]), r[10000:]) < 0.02 < 0.1 < trust.ece(loud[10000:], r[10000:])
        again = trust.Calibrator.from_json(json.loads(json.dumps(fair.to_json())))
        assert again == fair and np.array_equal(again.apply([0.1, NAN, 0.9]), fair.apply([0.1, NAN, 0.9]), equal_nan=True)
        assert math.isnan(fair.apply([NAN])[0])
        order = fair.apply(np.linspace(0, 1, 50))
        assert (np.diff(order) >= 0).all() and (order >= 0).all() and (order <= 1).all()


def test_isotonic_is_scikit_learns():
    from sklearn.isotonic import IsotonicRegression

    # x .1 .2 .3 .4, y 0 1 0 1: the middle two are pooled at 1/2; between .3 and .4 the map is a line
    found = trust.Calibrator.fit("isotonic", [0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1])
    assert found.apply([0, 0.1, 0.2, 0.25, 0.35, 0.9]).tolist() == pytest.approx([0, 0, 0.5, 0.5, 0.75, 1])
    c, r = mixed()
    theirs = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(c, r)
    grid = np.linspace(0, 1, 301)
    assert np.allclose(trust.Calibrator.fit("isotonic", c, r).apply(grid), theirs.predict(grid), atol=1e-12)


def test_calibrators_with_nothing_or_one_class():
    for kind in ("temperature", "platt", "isotonic"):
        same = trust.Calibrator.fit(kind, [NAN], [1])
        assert same.n == 0 and np.allclose(same.apply([0.0, 0.2, 1.0]), [0, 0.2, 1], atol=1e-5)
        for always in (0.0, 1.0):
            assert np.isfinite(trust.Calibrator.fit(kind, [0.2, 0.8, 0.5], [always] * 3).apply([0, 0.5, 1])).all()
    with pytest.raises(MedVLMError) as e:
        trust.Calibrator.fit("beta", [0.5], [1])
    assert e.value.code == "BAD_ARGUMENT"


def test_selective_prediction_by_hand():
    c, r = [0.9, 0.8, 0.8, 0.4], [1, 0, 1, 0]
    levels, coverage, risk = trust.risk_coverage(c, r)
    assert levels.tolist() == [0.9, 0.8, 0.4] and coverage.tolist() == [0.25, 0.75, 1.0] and risk.tolist() == pytest.approx([0, 1 / 3, 1 / 2])
    # AURC: one item at risk 0, two at 1/3, one at 1/2 -> (2/3 + 1/2) / 4
    assert trust.aurc(c, r) == pytest.approx((2 / 3 + 1 / 2) / 4)
    # AUGRC: points (0, 0) (.25, 0) (.75, .25) (1, .5) -> .5 * .125 + .25 * .375
    assert trust.augrc(c, r) == pytest.approx(0.5 * 0.125 + 0.25 * 0.375)
    assert trust.coverage_at_risk(c, r) == 0.25 and trust.coverage_at_risk(c, r, 0.4) == 0.75 and trust.coverage_at_risk(c, r, 0.5) == 1
    assert trust.accuracy_at_coverage(c, r) == 0.5  # 80 % need all four
    assert trust.accuracy_at_coverage(c, r, 0.5) == pytest.approx(2 / 3)  # the two at .8 tie, so three are answered
    assert trust.coverage_at_risk([0.9, 0.1], [0, 1]) == 0
    assert trust.accuracy_at_coverage([NAN, 0.9], [1, 0], 0.5) == 0  # without a confidence: refused first
    assert all(math.isnan(f([], [])) for f in (trust.aurc, trust.augrc, trust.accuracy_at_coverage))


def test_augrc_is_its_definition():
    """Traub et al.: the chance that an item drawn at random is wrong and above a threshold drawn at random; and, in closed form,
    (1 - AUROC) acc (1 - acc) + (1 - acc)^2 / 2."""
    for seed in range(5):
        c, r = mixed(80, seed)
        pairs = np.mean([[(1 - r[i]) * ((c[i] > c[j]) + 0.5 * (c[i] == c[j])) for j in range(80)] for i in range(80)])
        acc = r.mean()
        assert trust.augrc(c, r) == pytest.approx(pairs) == pytest.approx((1 - auroc(c, r)) * acc * (1 - acc) + (1 - acc) ** 2 / 2)
        risks = [np.mean(1 - r[c >= x]) for x in c]
        assert trust.aurc(c, r) == pytest.approx(np.mean(risks))
        assert trust.augrc(r, r) == pytest.approx((1 - acc) ** 2 / 2) and trust.augrc(1 - r, r) == pytest.approx((1 - acc**2) / 2)


def test_scores_of_a_whole_set():
    c, r = mixed(120)
    c[:5] = NAN
    errors = (7, 8)
    r[list(errors)] = 0
    val = trust.Calibrator.fit("isotonic", *mixed(500, 3))
    found = by_name(trust.scores(asked(120), answers(c, errors), r, calibrators=[val]))
    c[list(errors)] = 0  # a failure is wrong with confidence 0
    fair = np.where(np.isin(np.arange(120), errors), 0.0, val.apply(c))  # before and after any calibration
    known = np.isfinite(c)
    assert found["confidence given"].value == pytest.approx(115 / 120) and found["confidence given"].n == 120
    for name, value in (("ECE", trust.ece(c, r)), ("Brier", trust.brier(c[known], r[known]).mean()), ("log loss", trust.log_loss(c[known], r[known]).mean()),
                        ("adaptive ECE", trust.ece(c, r, adaptive=True)), ("ECE after isotonic", trust.ece(fair, r)),
                        ("Brier after isotonic", trust.brier(fair[known], r[known]).mean())):  # fmt: skip
        assert found[name].value == pytest.approx(value) and (found[name].n, found[name].excluded) == (115, 5), name
    last = np.where(known, c, -1)
    for name, value in (("AUROC of confidence", auroc(last, r)), ("AURC", trust.aurc(last, r)), ("AUGRC", trust.augrc(last, r)),
                        ("coverage at 5% risk", trust.coverage_at_risk(last, r)), ("accuracy at 80% coverage", trust.accuracy_at_coverage(last, r))):  # fmt: skip
        assert found[name].value == pytest.approx(value) and (found[name].n, found[name].excluded) == (120, 0), name
    assert all(s.convention and s.low is not None and s.low <= s.high for s in found.values())
    assert found["AUGRC"].better == "lower" == found["ECE"].better and found["AUROC of confidence"].chance == 0.5
    assert paired_difference(found["AUGRC"], found["AUGRC"])[0] == 0


def test_order_changes_nothing_and_a_constant_confidence_says_nothing():
    c, r = mixed(60)
    order = np.random.default_rng(1).permutation(60)
    samples = asked(60)
    a = by_name(trust.scores(samples, answers(c), r))
    b = by_name(trust.scores([samples[i] for i in order], [answers(c)[i] for i in order], r[order]))
    assert {k: s.value for k, s in a.items()} == pytest.approx({k: s.value for k, s in b.items()})
    flat = by_name(trust.scores(samples, answers([0.6] * 60), r))
    for name in ("AUROC of confidence", "AURC", "AUGRC", "accuracy at 80% coverage"):
        assert flat[name].value == pytest.approx(flat[name].chance), name
    fair = by_name(trust.scores(samples, answers([r.mean()] * 60), r))
    assert fair["Brier"].value == pytest.approx(fair["Brier"].chance) and fair["log loss"].value == pytest.approx(fair["log loss"].chance)
    given = by_name(trust.scores(samples, answers([NAN] * 60, (3,)), r, confidence=c))  # from another source
    assert given["ECE"].value == pytest.approx(trust.ece(np.where(np.arange(60) == 3, 0, c), r))


def test_all_wrong_all_failed_and_no_confidence():
    samples = asked(10)
    (only,) = trust.scores(samples, answers([NAN] * 10), [1] * 10)
    assert only.name == "confidence given" and only.value == 0
    failed = by_name(trust.scores(samples, answers([NAN] * 10, range(10)), [0] * 10))
    assert failed["confidence given"].value == 1 and failed["ECE"].value == 0 and failed["AUGRC"].value == 0.5 and failed["AURC"].value == 1
    assert math.isnan(failed["AUROC of confidence"].value) and failed["AUROC of confidence"].note  # one class: no value
    assert failed["coverage at 5% risk"].value == 0 == failed["accuracy at 80% coverage"].value
    json.dumps([s.to_json() for s in failed.values()], allow_nan=False)


def test_a_gap_by_hand():
    # F: 8 of 10 right, M: 5 of 10, X: one patient, too few to say
    values = [1] * 8 + [0] * 2 + [1] * 5 + [0] * 5 + [0] * 9
    clusters = [*range(20), *["x"] * 9]
    score = mean_score("accuracy", values, clusters, convention="exact")
    groups = {str(i): "F" if i < 10 else "M" if i < 20 else "X" for i in range(29)}
    found = gaps.gap(score, groups, "sex")
    assert found.name == "accuracy gap by sex" and found.value == pytest.approx(0.3) and (found.n, found.excluded) == (20, 9)
    assert found.low < 0.3 < found.high and found.low < 0.1 and "F 0.800 (n 10), M 0.500 (n 10)" in found.note and found.better == "lower"
    assert 0 < found.chance < 0.3
    small = gaps.gap(score, {str(i): "F" if i < 10 else "M" for i in range(12)})
    assert math.isnan(small.value) and small.n == 0 and small.excluded == 29 and "5 clusters" in small.note
    samples = [Sample(str(i), meta={"sex": groups[str(i)], "site": "one"}) for i in range(29)]
    assert [s.name for s in gaps.gaps(score, samples)] == ["accuracy gap by sex"]  # one site has no gap


def test_a_gap_that_is_none_is_near_its_chance():
    rng = np.random.default_rng(0)
    none, some = [], []
    for _ in range(10):
        groups = {str(i): str(i % 4) for i in range(200)}
        score = mean_score("x", rng.random(200) < 0.7, [i // 2 for i in range(200)])  # clusters that hold two groups: items are dealt
        none.append(gaps.gap(score, groups, shuffles=60))
        score = mean_score("x", rng.random(200) < np.where(np.arange(200) % 4 == 0, 0.3, 0.8), range(200))
        some.append(gaps.gap(score, groups, shuffles=60))
    assert np.mean([g.value for g in none]) == pytest.approx(np.mean([g.chance for g in none]), abs=0.04)
    assert np.mean([g.value - g.chance for g in some]) > 0.3 and all(g.low > 0 for g in some)


def test_the_robustness_index_by_hand():
    # on a circle: classes A and B at sites 1 and 2; angles in degrees
    angle = np.radians([0, 10, 100, 112, 3, 14])
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1)
    classes, sites = list("AABBBA"), [1, 2, 1, 2, 1, 1]
    # nearest of 0: 4 (OS) · of 1: 5 (SO) · of 2: 3 (SO) · of 3: 2 (SO) · of 4: 0 (OS) · of 5: 1 (SO)  -> 4 / 6
    found = gaps.robustness_index(vectors, classes, sites, range(6), k=1)
    assert found.value == pytest.approx(4 / 6) and found.n == 6 and 0 < found.chance < 1 and found.low is not None
    # patients {0, 4} and {1, 5}: neighbours of one's own are passed over. 0: 1 (SO) · 4: 1 (other class, other site) · 1: 4 (neither) · 5: 4 (OS)
    own = gaps.robustness_index(vectors, classes, sites, ["p", "q", "r", "s", "p", "q"], k=1)
    assert own.value == pytest.approx(3 / 4) and own.low is None  # 0, 2 and 3 against 5; four clusters
    assert math.isnan(gaps.robustness_index(vectors, ["A"] * 6, sites, range(6)).value)


def test_the_robustness_index_knows_disease_from_hospital():
    rng = np.random.default_rng(0)
    y, site = rng.integers(0, 2, 200), rng.integers(0, 3, 200)
    noise = rng.normal(0, 0.3, (200, 5))
    by_class, by_site = noise + 3 * np.eye(5)[y], noise + 3 * np.eye(5)[2 + site]
    good, bad, blind = (gaps.robustness_index(x, y, site, range(200)) for x in (by_class, by_site, rng.normal(0, 1, (200, 5))))
    assert good.value > 0.95 and bad.value < 0.05 and abs(blind.value - blind.chance) < 0.08
    order = rng.permutation(200)
    assert gaps.robustness_index(by_class[order], y[order], site[order], range(200)).value == pytest.approx(good.value)


def test_nothing_said_again_and_again_is_no_agreement():
    assert trust.semantic_confidence(["", "", ""]) == pytest.approx(0.0) and trust.semantic_confidence(["yes", "yes", "yes"]) == pytest.approx(1.0)
    assert trust.said_sure("<think>between 0 and 100</think>85") == 0.85
