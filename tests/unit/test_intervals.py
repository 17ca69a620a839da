"""Intervals derived again with scipy, paired differences, exact tests and corrections worked by hand."""

import numpy as np
import pytest

from medvlm.evaluate.statistics import (
    Items,
    Score,
    holm,
    interval,
    mcnemar,
    mean_score,
    paired_difference,
    statistic_score,
)

RNG = np.random.default_rng(3)


def test_an_interval_of_a_mean_is_that_of_scipy():
    from scipy.stats import bootstrap

    values = RNG.random(80)
    ours = mean_score("x", values, range(80))
    theirs = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    spread = theirs.high - theirs.low  # 1,000 draws against 20,000: each end is known to a few per cent of the width
    assert abs(ours.low - theirs.low) < 0.08 * spread and abs(ours.high - theirs.high) < 0.08 * spread


def test_an_interval_of_clusters_is_that_of_scipy_on_their_sums():
    """The mean over all items when whole clusters are drawn is the ratio of two sums over clusters, drawn as pairs."""
    from scipy.stats import bootstrap

    clusters = np.repeat(np.arange(30), RNG.integers(1, 9, 30))
    effect = RNG.normal(0, 1, 30)
    values = (RNG.normal(0, 0.5, len(clusters)) + effect[clusters] > 0).astype(float)
    ours = mean_score("x", values, clusters.tolist())
    sums, counts = (np.bincount(clusters, w) for w in (values, None))
    ratio = lambda s, c, axis: s.sum(axis) / c.sum(axis)  # noqa: E731
    theirs = bootstrap((sums, counts), ratio, paired=True, n_resamples=20000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    spread = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.08 * spread and abs(ours.high - theirs.high) < 0.08 * spread
    naive = mean_score("x", values, range(len(values)))
    assert naive.high - naive.low < 0.75 * (ours.high - ours.low)  # as if questions about one image were independent


def test_both_ways_to_an_interval_agree():
    """Sums of clusters, draw by draw, are the mean over the items drawn."""
    values, clusters = RNG.random(40), RNG.integers(0, 9, 40).tolist()
    fast, plain = mean_score("x", values, clusters), statistic_score("x", lambda i: float(values[i].mean()), clusters)
    assert (fast.low, fast.high) == pytest.approx((plain.low, plain.high), abs=1e-12)
    assert (fast.low, fast.high) == pytest.approx(interval(lambda i: values[i].mean(), clusters), abs=1e-12)


def test_why_there_is_no_interval():
    assert mean_score("x", [1, 0, 1], "aab").note == "no interval: 2 clusters, 5 are needed"
    assert mean_score("x", [np.nan], "a").note == "nothing to score"
    assert statistic_score("x", lambda i: np.nan, range(9)).note
    assert mean_score("x", [1, 0, 1, 0, 1], "abcde").note == ""


def test_a_paired_difference_is_surer_than_two_intervals():
    hard = RNG.random(60)  # both models fail on what is hard
    a, b = (hard < 0.65).astype(float), (hard < 0.55).astype(float)
    left, right = (mean_score("x", v, range(60), [str(i) for i in range(60)]) for v in (a, b))
    value, low, high, p = paired_difference(left, right)
    assert value == pytest.approx(a.mean() - b.mean()) and low > 0 and p < 0.05
    assert left.low < right.high  # the two intervals overlap all the same
    assert paired_difference(right, left)[:3] == pytest.approx((-value, -high, -low))
    assert paired_difference(left, left) == (0.0, 0.0, 0.0, 1.0)


def test_pairs_are_found_by_name_not_by_order():
    ids = [str(i) for i in range(8)]
    a = mean_score("x", [1, 1, 1, 1, 0, 0, 0, 0], range(8), ids)
    turned = mean_score("x", [0, 0, 0, 0, 1, 1, 1, 1], range(7, -1, -1), ids[::-1])
    assert paired_difference(a, turned)[0] == 0.0
    fewer = mean_score("x", [1, 1], "ab", ["0", "4"])
    assert paired_difference(a, fewer) == pytest.approx((-0.5, None, None, np.nan), nan_ok=True)  # (1 - 1 + 0 - 1) / 2
    with pytest.raises(ValueError, match="share no item"):
        paired_difference(a, mean_score("x", [1], "z", ["z"]))
    with pytest.raises(ValueError, match="not kept"):
        paired_difference(a, Score("x", 1.0, 1))


def test_mcnemar_by_hand():
    """6 items only A has right, 1 only B: twice the chance of at most 1 head in 7 throws, 2 * (1 + 7) / 128."""
    a = [1] * 6 + [0] + [1] * 5 + [0] * 3
    b = [0] * 6 + [1] + [1] * 5 + [0] * 3
    assert mcnemar(a, b) == pytest.approx(2 * 8 / 128) == mcnemar(b, a)
    assert mcnemar([1, 0], [1, 0]) == 1.0


def test_holm_by_hand():
    """0.01 x 3, 0.02 x 2, 0.03 x 1 but never below an earlier one; NaN does not count."""
    assert holm([0.03, 0.01, float("nan"), 0.02]) == pytest.approx([0.04, 0.03, np.nan, 0.04], nan_ok=True)
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_items_never_reach_json():
    score = mean_score("x", [1, 0, 1, 0, 1], range(5))
    assert isinstance(score.items, Items) and "items" not in score.to_json() and score.to_json()["better"] == "higher"
