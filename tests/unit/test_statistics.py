"""Scores, intervals and calibration against worked cases and scikit-learn."""

import json
import math

import numpy as np
import pytest

from medvlm.errors import MedVLMError
from medvlm.evaluate.segment import dice
from medvlm.evaluate.statistics import Score, auroc, auroc_score, fit_platt, interval, mean_score


def test_auroc_by_hand():
    assert auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert auroc([1, 1, 1, 1], [0, 1, 0, 1]) == 0.5  # all ties
    assert auroc([3, 2, 1], [0, 0, 1]) == 0.0
    assert math.isnan(auroc([1, 2], [1, 1])) and math.isnan(auroc([], []))


def test_auroc_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.integers(0, 8, 50).astype(float), rng.integers(0, 2, 50)
        assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_fewer_than_five_clusters_have_no_interval():
    values = np.arange(40.0)
    assert interval(lambda i: values[i].mean(), ["a", "b", "c", "d"] * 10) == (None, None)
    low, high = interval(lambda i: values[i].mean(), ["a", "b", "c", "d", "e"] * 8)
    assert low < values.mean() < high
    assert interval(lambda i: float("nan"), range(10)) == (None, None)
    score = mean_score("x", [1, 0, 1, 1], ["a", "b", "c", "d"])
    assert (score.value, score.n, score.low, score.high) == (0.75, 4, None, None)


def test_whole_clusters_are_drawn():
    """Twenty copies of five answers say as much as the five: the interval does not shrink."""
    answers, copies = np.array([0.0, 0, 1, 1, 1]), np.repeat([0.0, 0, 1, 1, 1], 20)
    few = interval(lambda i: answers[i].mean(), range(5))
    many = interval(lambda i: copies[i].mean(), np.repeat(range(5), 20).tolist())
    alone = interval(lambda i: copies[i].mean(), range(100))
    assert few == many and alone[1] - alone[0] < (many[1] - many[0]) / 3
    assert interval(lambda i: answers[i].mean(), range(5)) == few and interval(lambda i: copies[i].mean(), range(100), seed=1) != alone


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for n in range(150):
        x = rng.normal(0, 1, 40)
        low, high = interval(lambda i, x=x: x[i].mean(), range(40), draws=200, seed=n)
        hits += low <= 0 <= high
    assert 0.86 <= hits / 150 <= 0.99


def test_unknown_values_are_left_out_and_counted():
    score = mean_score("x", [1, float("nan"), 0, 1, 1, 1], range(6))
    assert (score.n, score.excluded, score.value) == (5, 1, 0.8)
    nothing = mean_score("x", [float("nan")] * 3, range(3))
    assert nothing.n == 0 and nothing.excluded == 3 and math.isnan(nothing.value)
    assert json.loads(json.dumps(nothing.to_json(), allow_nan=False))["value"] is None
    score = auroc_score("x", [0.1, 0.9, float("nan"), 0.5], [0, 1, 1, float("nan")], "abcd")
    assert (score.value, score.n, score.excluded, score.chance, score.low) == (0.5, 3, 1, 0.5, None)  # .9 above .1, no answer below it
    assert auroc_score("x", [float("nan"), 0.9, 0.8], [0, 1, 1], "abc").value == 0  # no answer on a negative is no low score


def test_calibration_moves_towards_the_truth():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, 4000)
    y = (rng.random(4000) < 1 / (1 + np.exp(-(0.5 * z - 1)))).astype(float)
    scale, shift = fit_platt(z, y)
    assert scale == pytest.approx(0.5, abs=0.06) and shift == pytest.approx(-1, abs=0.12)
    loss = [float((np.logaddexp(0, a) - a * y).mean()) for a in (z, z * scale + shift)]
    assert loss[1] < loss[0]
    rare = np.flatnonzero((y == 0) | (np.arange(len(y)) % 4 == 0))  # three of four ones left out: the fit on them, told the share of all, is that on all
    again = fit_platt(z[rare], y[rare], share=y.mean())
    assert again == pytest.approx((scale, shift), abs=0.25) and abs(fit_platt(z[rare], y[rare])[1] - shift) > 1
    assert fit_platt(np.zeros(0), np.zeros(0)) == (1.0, 0.0)
    scale, shift = fit_platt([5.0], [0.0])  # one pair: a small step the right way, no leap
    assert 0 < scale < 1 and -2 < shift < 0
    for always in (0.0, 1.0):  # one class only stays finite
        assert np.isfinite(fit_platt(z, np.full(4000, always))).all()


def test_dice_by_hand():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert dice(a, b) == 1.0  # rightly said to be absent
    a[0, :3] = True
    assert dice(a, b) == 0.0 and dice(b, a) == 0.0 and dice(a, a) == 1.0
    b[0, 1:3] = True
    assert dice(a, b) == pytest.approx(0.8)  # 2 * 2 / (3 + 2)
    assert dice(a.astype(np.uint8) * 255, b) == pytest.approx(0.8)
    with pytest.raises(MedVLMError) as e:
        dice(a, b[:3])
    assert e.value.code == "GRID_MISMATCH"


def test_a_score_is_plain_json():
    assert json.loads(json.dumps(Score("x", 0.5, 3, low=float("inf")).to_json(), allow_nan=False)) == {
        "name": "x", "value": 0.5, "n": 3, "excluded": 0, "low": None, "high": None, "chance": None, "unit": "", "convention": "", "slice": "all", "task": "", "note": "", "better": "higher",
    }  # fmt: skip
