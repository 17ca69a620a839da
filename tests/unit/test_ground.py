"""Boxes, points and masks of a phrase, and the sentences of grounded reports, worked by hand."""

import math

import numpy as np
import pytest

from medvlm.errors import MedVLMError
from medvlm.evaluate.ground import (
    TASK,
    average_precision,
    box_iou,
    covered,
    grounded_report,
    matches,
    prepare,
    score,
    truth_of,
)
from medvlm.imaging.scan import Image, Volume
from medvlm.sample import Mask, Prediction, Region, Sample, Sentence, Turn

BOX = ((2, 2), (6, 6))


def picture(id="a", size=(10, 10)):
    return Image(id, np.zeros((1, *size), np.float32))


def phrase(id, *boxes, label="nodule", mask=None):
    return Sample(id, images={"a": picture()}, turns=(Turn("user", label),), regions=tuple(Region("a", label, b) for b in boxes),
                  masks=() if mask is None else (Mask("a", label, mask),), verb="ground")  # fmt: skip


def said(id, *given, label="nodule"):
    return Prediction(id, regions=tuple(Region("a", label, box, probability=p) for p, box in given))


def drawn(*boxes):
    mask = np.zeros((10, 10), bool)
    for (top, left), (bottom, right) in boxes:
        mask[top:bottom, left:right] = True
    return mask


def named(samples, predictions):
    return {s.name: s for s in score(samples, predictions)}


def test_iou_by_hand():
    a = np.array([[[0, 0], [4, 4]]], float)
    # 2 x 2 of 16 + 16 - 4; the same; beside it (half-open); without size
    others = np.array([[[2, 2], [6, 6]], [[0, 0], [4, 4]], [[4, 0], [8, 4]], [[1, 1], [1, 3]]], float)
    assert box_iou(a, others)[0].tolist() == pytest.approx([4 / 28, 1, 0, 0])
    cube = np.array([[[0, 0, 0], [2, 2, 2]]], float)
    assert box_iou(cube, cube + 1).item() == pytest.approx(1 / 15)  # 1 of 8 + 8 - 1


def test_areas_of_joined_boxes_are_exact():
    a = np.array([[[0, 0], [2, 2]], [[1, 1], [3, 3]]], float)  # 4 + 4 - 1
    b = np.array([[[0.5, 0.5], [1.5, 2.5]]])  # 2, of which 1 x 1.5 and 0.5 x 1 more lie in a, 0.5 x 0.5 of it twice
    assert covered(a, b) == pytest.approx((7, 2, 1.5 + 0.75 - 0.5))
    rng = np.random.default_rng(0)
    for _ in range(10):
        low = rng.integers(0, 8, (2, 4, 2))
        boxes = np.stack([low, low + rng.integers(1, 4, low.shape)], 2).astype(float)
        masks = [np.zeros((12, 12), bool) for _ in boxes]
        for mask, some in zip(masks, boxes.astype(int)):
            for (t, l), (d, r) in some:
                mask[t:d, l:r] = True
        assert covered(*boxes) == (masks[0].sum(), masks[1].sum(), (masks[0] & masks[1]).sum())
    assert covered(a, np.zeros((0, 2, 2))) == (7, 0, 0)


def test_the_most_probable_box_against_the_reference_it_overlaps_most():
    samples = [phrase("two", BOX, ((0, 0), (1, 1))), phrase("half", BOX), phrase("none", BOX), phrase("error", BOX)]
    answers = [said("two", (0.2, ((0, 0), (1, 1))), (0.9, ((2, 2), (6, 5)))), said("half", (0.5, ((2, 2), (4, 6)))), said("none"),
               Prediction("error", regions=said("error", (1.0, BOX)).regions, error="INTERNAL: x")]  # fmt: skip
    scores = named(samples, answers)
    assert scores["box IoU"].value == pytest.approx((12 / 16 + 0.5 + 0 + 0) / 4)
    assert scores["accuracy at IoU 0.5"].value == 0.5 and scores["accuracy at IoU 0.5"].n == 4  # 0.5 counts
    assert scores["pointing accuracy"].value == 0.5  # centres (4, 3.5) and (3, 4)
    # boxes cover 16 + 1 and 16 of 100 pixels
    assert scores["pointing accuracy"].chance == pytest.approx((17 + 16 + 16 + 16) / 400)


def test_pointing_is_into_the_mask_where_there_is_one():
    ring = drawn(((0, 0), (10, 10)))
    ring[4:6, 4:6] = False
    middle, side = (1.0, ((4, 4), (6, 6))), (1.0, ((0, 0), (2, 2)))
    scores = named([phrase("a", mask=ring), phrase("b", mask=ring)], [said("a", middle), said("b", side)])
    assert scores["pointing accuracy"].value == 0.5 and scores["pointing accuracy"].chance == pytest.approx(0.96)
    outside = named([phrase("a", BOX), phrase("b", mask=ring)], [said("a", (1.0, ((6, 4), (6, 4)))), said("b", (1.0, ((20, 20), (30, 30))))])
    assert outside["pointing accuracy"].value == 0  # (6, 4) is the first pixel below


def test_average_precision_by_hand():
    # hit, miss, hit of 3: precision 1 at recall 1/3, 2/3 at 2/3, never all
    assert average_precision(np.array([0.9, 0.8, 0.7]), np.array([1, 0, 1]), 3) == pytest.approx(1 / 3 + 2 / 3 / 3)
    # precision is made non-increasing: miss, hit, hit of 2 gives 2/3 up to recall 1
    assert average_precision(np.array([0.9, 0.8, 0.7]), np.array([0, 1, 1]), 2) == pytest.approx(2 / 3)
    for order in ([1, 0, 1], [0, 1, 1], [1, 1, 0]):  # equal probabilities: one point, 2 of 3 right, 2 of 2 found
        assert average_precision(np.full(3, 0.5), np.array(order), 2) == pytest.approx(2 / 3)
    assert average_precision(np.zeros(0), np.zeros(0), 2) == 0 and math.isnan(average_precision(np.zeros(0), np.zeros(0), 0))
    # twice the weight is the item twice
    p, hit = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 0, 1])
    twice = average_precision(np.repeat(p, [1, 2, 0, 3]), np.repeat(hit, [1, 2, 0, 3]), 5)
    assert average_precision(p, hit, 5, np.array([1, 2, 0, 3])) == pytest.approx(twice)


def test_average_precision_is_that_of_scikit_learn_where_precision_only_falls():
    from sklearn.metrics import precision_recall_curve

    rng = np.random.default_rng(1)
    for _ in range(20):
        p, hit = rng.integers(0, 12, 30) / 12, rng.integers(0, 2, 30)
        precision, recall, _ = precision_recall_curve(hit, p)
        envelope = np.maximum.accumulate(precision[:-1])  # from the largest recall down
        assert average_precision(p, hit, hit.sum()) == pytest.approx(-(np.diff(recall) * envelope).sum())


def test_a_reference_box_is_found_once():
    near = np.array([[2, 2], [6, 6]], float)
    reference = np.array([[[2, 2], [6, 6]], [[2, 3], [6, 7]]], float)
    # the first takes the box it overlaps most, the second the other one (IoU 12 / 20), the third finds none left
    assert matches([near, near, near], reference) == [True, True, False]
    assert matches([None, near + 5, near], reference) == [False, False, True] and matches([near], np.zeros((0, 2, 2))) == [False]


def test_mean_ap_over_labels_by_hand():
    samples = [phrase("0", BOX), phrase("1", ((0, 0), (4, 4)), ((5, 5), (9, 9))), phrase("2", ((0, 0), (4, 4)), label="mass"), phrase("3", label="mass", mask=drawn())]
    answers = [said("0", (0.9, BOX), (0.8, BOX)), said("1", (0.7, ((5, 5), (9, 9))), (0.2, ((5, 5), (6, 6)))), said("2", (0.6, ((0, 0), (4, 4)))),
               said("3", (0.95, BOX))]  # fmt: skip
    scores = named(samples, answers)
    # nodule: hit .9, miss .8, hit .7, miss .2 of 3 boxes: 1/3 + (2/3)(1/3); mass: a box where none is .95, hit .6: 1/2
    assert scores["mAP at IoU 0.5"].value == pytest.approx(((1 + 2 / 3) / 3 + 1 / 2) / 2)
    assert scores["mAP at IoU 0.5"].excluded == 0 and scores["box IoU"].excluded == 1 and scores["box IoU"].n == 3
    assert (scores["false-region rate"].value, scores["false-region rate"].n) == (1, 1)
    lot = np.array([0, 0, 2, 3, 3, 1])  # the statistic of a draw is that of the drawn samples
    again = [phrase(f"{k}", *(r.box for r in samples[i].regions), label=samples[i].question, mask=samples[i].masks[0].array if samples[i].masks else None) for k, i in enumerate(lot)]
    given = [Prediction(str(k), regions=answers[i].regions) for k, i in enumerate(lot)]
    assert scores["mAP at IoU 0.5"].items.statistic(lot) == pytest.approx(named(again, given)["mAP at IoU 0.5"].value)


def test_no_probability_is_certainty_and_another_image_is_a_miss():
    regions = (Region("a", "nodule", ((0, 0), (1, 1)), probability=0.4), Region("a", "nodule", BOX))
    assert named([phrase("0", BOX)], [Prediction("0", regions=regions)])["box IoU"].value == 1
    elsewhere = named([phrase("0", BOX)], [Prediction("0", regions=(Region("b", "nodule", BOX),))])
    assert all(elsewhere[n].value == 0 for n in ("box IoU", "pointing accuracy", "mAP at IoU 0.5", "accuracy at IoU 0.5"))


def test_an_absent_phrase_wants_no_region():
    samples = [phrase(str(i), mask=drawn()) for i in range(4)]
    answers = [said("0"), said("1", (0.4, BOX)), said("2", (0.5, BOX)), Prediction("3", error="INTERNAL: x")]
    scores = named(samples, answers)
    assert scores["false-region rate"].value == 0.5 and scores["false-region rate"].better == "lower"
    assert scores["box IoU"].n == 0 and scores["box IoU"].excluded == 4 and math.isnan(scores["mAP at IoU 0.5"].value) and "mask Dice" not in scores


def test_boxes_without_size_are_left_out_and_counted():
    flat = ((3, 3), (3, 9))
    scores = named([phrase("0", flat), phrase("1", flat, BOX)], [said("0", (1.0, flat)), said("1", (1.0, BOX))])
    assert (scores["box IoU"].value, scores["box IoU"].n, scores["box IoU"].excluded) == (1, 1, 1)
    assert (scores["reference boxes without size"].value, scores["reference boxes without size"].n) == (2, 3)
    assert scores["mAP at IoU 0.5"].value == 1 and "false-region rate" not in scores
    assert named([phrase("0", BOX)], [said("0", (1.0, flat))])["box IoU"].value == 0  # a predicted one is wrong


def test_masks_of_regions_are_joined():
    truth = drawn(((0, 0), (2, 2)), ((5, 5), (7, 7)))
    parts = (Region("a", "nodule", mask=drawn(((0, 0), (2, 2)))), Region("a", "nodule", ((4.6, 5.4), (6.6, 6.6))))  # rows 5 and 6, columns 5 and 6
    scores = named([phrase("0", mask=truth)], [Prediction("0", regions=parts)])
    assert scores["mask Dice"].value == pytest.approx(2 * 8 / (8 + 8))
    assert named([phrase("0", mask=truth)], [Prediction("0", regions=parts[:1])])["mask Dice"].value == pytest.approx(2 * 4 / (4 + 8))
    assert named([phrase("0", mask=truth)], [Prediction("0", regions=(Region("a", "nodule", mask=np.ones((3, 3), bool)),))])["mask Dice"].value == 0


def test_volumes_have_boxes_of_three_axes():
    volume = Volume("v", np.zeros((1, 4, 8, 8), np.float32), np.eye(4))
    truth = np.zeros((4, 8, 8), bool)
    truth[1:3, 2:4, 2:6] = True
    sample = Sample("0", images={"v": volume}, turns=(Turn("user", "liver"),), masks=(Mask("v", "liver", truth),), verb="ground")
    assert truth_of(sample).boxes.tolist() == [[[1, 2, 2], [3, 4, 6]]]
    scores = named([sample], [Prediction("0", regions=(Region("v", "liver", ((1, 2, 2), (2, 4, 6)), probability=1.0),))])
    assert scores["box IoU"].value == 0.5 and scores["mask Dice"].value == pytest.approx(2 / 3) and scores["pointing accuracy"].value == 1


def test_one_sample_an_image_and_label():
    a, b = picture("a"), picture("b")
    regions = (Region("a", "nodule", BOX), Region("a", "nodule", ((0, 0), (1, 1))), Region("a", "mass", BOX))
    rows = [Sample("q1", images={"a": a, "b": b}, turns=(Turn("user", "?"), Turn("assistant", "yes")), regions=regions, choices=("yes", "no"), group="g", meta={"row": "r"}),
            Sample("q2", images={"a": a, "b": b}, regions=regions, meta={"row": "r"}),
            Sample("r/nodule", images={"a": a, "b": b}, masks=(Mask("a", "nodule", drawn(BOX)), Mask("b", "nodule", drawn(BOX)))),
            Sample("text")]  # fmt: skip
    asked = prepare(lambda split: rows if split == "test" else [], "test")
    assert [(s.id, s.question, list(s.images), len(s.regions), len(s.masks), s.verb, s.answer, s.group) for s in asked] == [
        ("r@nodule", "nodule", ["a"], 2, 1, "ground", None, None),
        ("r@mass", "mass", ["a"], 1, 0, "ground", None, None),
        ("r/nodule@nodule", "nodule", ["b"], 0, 1, "ground", None, None),
    ]
    again = [Sample(f"q{i}", images={"a": picture()}, regions=regions[:1], meta={"row": "r"}) for i in range(2)]  # the image read anew
    assert [s.id for s in prepare(lambda split: again, "test")] == ["r@nodule"]
    twice = [Sample("x", images={"a": a, "b": b}, regions=(Region("a", "mass", BOX), Region("b", "mass", BOX)))]
    assert [s.id for s in prepare(lambda split: twice, "test")] == ["x@mass", "x@mass#2"]
    assert prepare(lambda split: [], "test") == [] and TASK.rank == 4 and not TASK.blind
    with pytest.raises(MedVLMError):
        score(asked, [])


def test_grounded_reports_by_hand():
    """Entailment by equal text; logical, grounding and spatial shares have their own denominators."""
    entails = lambda text, others: [i for i, o in enumerate(others) if o == text] or None  # noqa: E731
    at = lambda *boxes, image="a": tuple(Region(image, "", b) for b in boxes)  # noqa: E731
    reference = [Sentence("nodule", at(BOX)), Sentence("mass", at(((0, 0), (2, 2)))), Sentence("clear"), Sentence("tube", at(BOX))]
    predicted = [Sentence("nodule", at(((2, 2), (6, 5)))),  # 12 of its 12 in the reference; 12 of the reference's 16 in it
                 Sentence("mass", at(((1, 0), (5, 2)))),  # 2 of 8; 2 of 4: half is not more than half
                 Sentence("clear"), Sentence("effusion", at(BOX)), Sentence("line")]  # fmt: skip
    assert grounded_report(reference, predicted, entails) == {
        "logical precision": (3, 5), "grounding precision": (1, 2), "spatial precision": (1, 3),
        "logical recall": (3, 4), "grounding recall": (1, 2), "spatial recall": (1, 3),
    }  # fmt: skip
    assert grounded_report(reference, [], entails)["spatial precision"] == (0, 0) and grounded_report(reference, [], entails)["logical recall"] == (0, 4)
    # the same box on another image bears nothing out, overlapping boxes count once, evidence may be the report as a whole
    moved = grounded_report([Sentence("nodule", at(BOX))], [Sentence("nodule", at(BOX, image="b"))], entails)
    assert moved["logical precision"] == (1, 1) and moved["spatial precision"] == (0, 1)
    joined = grounded_report([Sentence("x", at(((0, 0), (2, 2))))], [Sentence("x", at(((0, 0), (2, 2)), ((0, 0), (2, 2)), ((5, 5), (6, 8))))], entails)
    assert joined["spatial precision"] == (1, 1)  # 4 of 7
    whole = grounded_report([Sentence("x", at(BOX))], [Sentence("y", at(BOX))], lambda text, others: [])
    assert whole["logical precision"] == (1, 1) and whole["grounding precision"] == (0, 1)
    mask = grounded_report([Sentence("x", (Region("a", "", mask=drawn(BOX)),))], [Sentence("x", at(BOX))], entails)
    assert mask["spatial precision"] == mask["spatial recall"] == (1, 1)
