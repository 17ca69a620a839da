"""Outlines and label maps: every metric worked by hand, every empty rule, what failed, and presence."""

import math

import numpy as np
import pytest

from medvlm.errors import MedVLMError
from medvlm.evaluate.segment import CASES, CONVENTIONS, RULES, TASK, UNITS, dice, dice_table, measure, prepare, score
from medvlm.imaging.scan import Image, Volume
from medvlm.sample import Mask, Prediction, Sample

NAN = float("nan")
DIAGONAL = 5 * math.hypot(4, 3)  # of 5 x 5 pixels of 4 x 3 mm


def square(*columns, rows=(1, 2)):
    mask = np.zeros((5, 5), bool)
    for c in columns:
        mask[list(rows), c] = True
    return mask


def one(id, truth, label="lung", spacing=(4.0, 3.0), **more):
    return Sample(id, images={"a": Image("a", np.zeros((1, *truth.shape), np.float32), spacing)}, masks=(Mask("a", label, truth),), verb="segment", **more)


def said(id, drawn, label="lung", **more):
    return Prediction(id, masks=(Mask("a", label, drawn),), **more)


def named(scores, slice="all"):
    return {s.name: s for s in scores if s.slice == slice}


def test_every_metric_by_hand():
    """Two columns of two pixels of 4 x 3 mm against three: 4 pixels of 6 agree, all of them borders."""
    values = measure(square(1, 2), square(1, 2, 3), (4, 3))
    assert values["Dice"] == pytest.approx(2 * 4 / 10) and values["IoU"] == pytest.approx(4 / 6)
    # only the third column is away, by 3 mm: 2 of 4 + 6 border pixels
    assert values["NSD"] == pytest.approx(8 / 10) and values["ASSD"] == pytest.approx(2 * 3 / 10)
    assert measure(square(1, 2), square(1, 2, 3), (4, 3), tolerance=3)["NSD"] == 1
    # from the reference: 0 0 0 0 3 3, at rank 0.95 * 5 = 4.75: 3
    assert values["HD95"] == pytest.approx(3)
    assert values["area error"] == 2 * 12 and values["relative volume error"] == pytest.approx(2 / 6)
    assert set(values) <= set(UNITS)


def test_volumes_are_in_millilitres():
    truth = np.zeros((4, 6, 6), bool)
    truth[1:3, 1:5, 1:5] = True
    drawn = truth.copy()
    drawn[2] = False
    values = measure(drawn, truth, (10, 2, 5))
    assert values["volume error"] == pytest.approx(16 * 100 / 1000) and values["relative volume error"] == 0.5
    assert values["HD95"] == 10 and "area error" not in values


def test_unknown_spacing_is_never_called_millimetres():
    values = measure(square(1, 2), square(1, 2, 3))
    assert values["HD95 px"] == 1 and values["ASSD px"] == pytest.approx(0.2) and values["NSD px"] == 1 and values["area error px"] == 2
    assert not {"HD95", "ASSD", "NSD", "area error"} & set(values)
    samples = [one("mm", square(1, 2, 3)), one("px", square(1, 2, 3), spacing=None)]
    scores = named(score(samples, [said(s.id, square(1, 2)) for s in samples]))
    for name, unit, value in (("HD95", "mm", 3), ("HD95 px", "px", 1)):
        assert (scores[name].value, scores[name].unit, scores[name].n, scores[name].excluded, scores[name].better) == (value, unit, 1, 1, "lower")
    assert scores["Dice"].n == 2 and scores["Dice"].better == "higher" and "tolerance 1 px" in scores["NSD px"].convention


# (Dice, IoU, NSD, HD95 and ASSD) with both masks empty, only the reference, only the prediction
EMPTY = {
    "medvlm": ((1, 1, 1, 0), (0, 0, 0, DIAGONAL), (0, 0, 0, DIAGONAL)),
    "surfel": ((1, 1, 1, 0), (0, 0, 0, DIAGONAL), (0, 0, 0, DIAGONAL)),
    "metrics-reloaded": ((1, NAN, 1, 0), (0, 0, 0, DIAGONAL), (0, 0, 0, DIAGONAL)),
    "brats": ((1, 1, 1, 0), (0, 0, 0, 373.1287), (0, 0, 0, 373.1287)),
    "nnunet": ((NAN, NAN, NAN, NAN), (0, 0, NAN, NAN), (0, 0, NAN, NAN)),
    "monai": ((NAN, NAN, NAN, NAN), (NAN, NAN, 0, NAN), (0, 0, 0, NAN)),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_empty_masks_by_the_named_rule(convention):
    none, some = square(), square(1, 2)
    for (drawn, truth), expected in zip(((none, none), (some, none), (none, some)), EMPTY[convention]):
        values = measure(drawn, truth, (4, 3), convention=convention)
        assert [values[n] for n in ("Dice", "IoU", "NSD", "HD95", "ASSD")] == pytest.approx([*expected, expected[3]], nan_ok=True)
    full = measure(some, some, (4, 3), convention=convention)
    assert [full[n] for n in ("Dice", "IoU", "NSD", "HD95", "ASSD")] == [1, 1, 1, 0, 0]


def test_the_rule_of_monai_is_what_monai_does():
    import warnings

    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice

    for drawn, truth in ((square(), square()), (square(1), square()), (square(), square(1)), (square(1, 2), square(2, 3))):
        a, b = torch.from_numpy(drawn)[None, None].float(), torch.from_numpy(truth)[None, None].float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = [compute_dice(a, b), compute_iou(a, b), compute_surface_dice(a, b, [1.0], include_background=True),
                      compute_hausdorff_distance(a, b, include_background=True, percentile=95)]  # fmt: skip
        ours = measure(drawn, truth, (1, 1), convention="monai")
        assert [ours[n] for n in ("Dice", "IoU", "NSD", "HD95")] == pytest.approx([t.item() for t in theirs], nan_ok=True, abs=1e-6)


def test_failures_are_misses_and_every_kind_is_counted():
    some, none = square(1, 2), square()
    rows = [  # (truth, prediction): error and missing mask on a present and an absent target, another grid, and the four that were answered
        (some, Prediction("0", error="OUT_OF_SCOPE: x")), (none, Prediction("1", error="INTERNAL: x")),
        (some, Prediction("2")), (none, said("3", none, "liver")),
        (some, said("4", np.ones((4, 5), bool))), (none, Prediction("5", error="GRID_MISMATCH: x")),
        (some, said("6", some)), (none, said("7", none)), (none, said("8", some)), (some, said("9", none)),
    ]  # fmt: skip
    samples = [one(str(i), truth) for i, (truth, _) in enumerate(rows)]
    for convention in CONVENTIONS:
        scores = named(score(samples, [p for _, p in rows], convention))
        assert [scores[k].value for k in CASES] == [1, 1, 1, 1, 4, 2] and {scores[k].n for k in CASES} == {10}
        assert scores["Dice"].excluded == {"nnunet": 1, "monai": 2}.get(convention, 0)
        kept = {"medvlm": 2, "nnunet": 1, "monai": 1}.get(convention, 2)
        assert scores["Dice"].value == pytest.approx(kept / scores["Dice"].n)  # right only where it was rightly drawn or left empty
    scores = named(score(samples, [p for _, p in rows]))
    assert scores["HD95"].value == pytest.approx(8 * DIAGONAL / 10) and scores["HD95"].excluded == 0
    # absent and failed: wrong by the whole image; present and missed: by the target
    assert scores["area error"].value == pytest.approx(12 * (4 + 25 + 4 + 25 + 4 + 25 + 0 + 0 + 4 + 4) / 10)
    assert named(score(samples, [p for _, p in rows], "brats"))["ASSD"].value == pytest.approx(8 * 373.1287 / 10)
    assert named(score(samples, [p for _, p in rows], "monai"))["HD95"].n == 7  # its own misses leave; failures do not


def test_presence_is_scored_beside_overlap():
    some, none = square(1, 2), square()
    truths = [some, some, some, none, none, none]
    drawn = [some, square(4), none, none, some, None]
    chances = [0.9, 0.6, 0.2, 0.1, 0.7, 0.0]
    samples = [one(str(i), t) for i, t in enumerate(truths)]
    answers = [Prediction(str(i), probability=c, error="INTERNAL: x") if d is None else said(str(i), d, probability=c) for i, (d, c) in enumerate(zip(drawn, chances))]
    scores = named(score(samples, answers))
    assert (scores["detection rate"].value, scores["detection rate"].n) == (pytest.approx(2 / 3), 3)
    assert (scores["false-mask rate"].value, scores["false-mask rate"].n, scores["false-mask rate"].better) == (pytest.approx(2 / 3), 3, "lower")
    # 0.9 beats 0.1 and 0.7, 0.6 and 0.2 beat 0.1; the failed absent target ranks above all, whatever it said: 4 of 9 pairs
    assert scores["presence AUROC"].value == pytest.approx(4 / 9) and scores["presence AUROC"].chance == 0.5
    silent = named(score(samples, [said(str(i), some) for i in range(6)]))
    assert "presence AUROC" not in silent and silent["false-mask rate"].value == 1
    assert "false-mask rate" not in named(score(samples[:3], answers[:3]))


def test_classes_weigh_the_same_whatever_their_number_of_cases():
    samples = [one(f"l{i}", square(1, 2)) for i in range(9)] + [one("s", square(3), "spleen")]
    answers = [said(f"l{i}", square(1, 2)) for i in range(9)] + [said("s", square(), "spleen")]
    scores = score(samples, answers, tolerances={"spleen": 3})
    assert named(scores)["Dice"].value == 0.5 and "mean over labels" in named(scores)["Dice"].convention
    lung, spleen = named(scores, "label=lung"), named(scores, "label=spleen")
    assert (lung["Dice"].value, lung["Dice"].n, spleen["Dice"].value, spleen["Dice"].n) == (1, 9, 0, 1)
    assert "tolerance 1 mm" in lung["NSD"].convention and "tolerance 3 mm" in spleen["NSD"].convention and "spleen 3 mm" in named(scores)["NSD"].convention
    assert lung["Dice"].low == lung["Dice"].high == 1 and spleen["Dice"].low is None and "no interval" in spleen["Dice"].note
    assert named(scores)["Dice"].low is not None and named(scores)["Dice"].items.ids == tuple(s.id for s in samples)


def test_tolerances_are_by_label():
    samples = [one("a", square(1, 2)), one("b", square(1, 2), "liver")]
    answers = [said("a", square(1, 2, 3)), said("b", square(1, 2, 3), "liver")]
    scores = score(samples, answers, tolerances={"liver": 3})
    assert named(scores, "label=lung")["NSD"].value == pytest.approx(0.8) and named(scores, "label=liver")["NSD"].value == 1


def test_several_masks_of_a_sample_are_matched_by_image_and_label():
    first, second = square(1), square(3)
    sample = Sample("x", images={"a": Image("a", np.zeros((1, 5, 5), np.float32), (1, 1))},
                    masks=(Mask("a", "left lung", first), Mask("a", "right lung", second), Mask("a", "nodule", first), Mask("a", "nodule", second)))  # fmt: skip
    answer = Prediction("x", masks=(Mask("a", "nodule", first), Mask("a", "right lung", second), Mask("a", "left lung", first), Mask("a", "nodule", second)))
    scores = score([sample], [answer])
    assert {s.slice: s.value for s in scores if s.name == "Dice"} == {k: 1 for k in ("all", "label=left lung", "label=right lung", "label=nodule")}
    assert len(set(named(scores)["Dice"].items.ids)) == 4
    assert named(score([sample], [Prediction("x", masks=answer.masks[:2])]))["failed"].value == 2
    other = Prediction("x", masks=tuple(Mask("b", m.label, m.array) for m in answer.masks))
    assert named(score([sample], [other]))["Dice"].value == 0  # on another image


def test_a_sample_a_mask_is_asked_for():
    masks = (Mask("a", "left lung", square(1)), Mask("a", "right lung", square(3)))
    given = [Sample("x", masks=masks), Sample("y", masks=masks[:1]), Sample("z")]
    asked = prepare(lambda split: given if split == "test" else [], "test")
    assert [(s.id, s.masks[0].label, s.verb) for s in asked] == [("x/0 left lung", "left lung", "segment"), ("x/1 right lung", "right lung", "segment"), ("y", "left lung", "segment")]
    assert prepare(lambda split: [], "test") == [] and TASK.rank == 2 and not TASK.blind and next(iter(TASK.conventions)) == "medvlm"
    assert set(RULES) == set(CONVENTIONS)


def test_volumes_are_scored_on_their_own_spacing():
    truth = np.zeros((3, 4, 4), bool)
    truth[1, 1:3, 1:3] = True
    volume = Volume("v", np.zeros((1, 3, 4, 4), np.float32), np.diag([5.0, 2.0, 2.0, 1.0]))
    scores = named(score([Sample("x", images={"v": volume}, masks=(Mask("v", "liver", truth),))], [Prediction("x", masks=(Mask("v", "liver", np.roll(truth, 1, 0)),))]))
    assert scores["HD95"].value == 5 and scores["Dice"].value == 0 and scores["volume error"].value == 0 and scores["volume error"].unit == "ml"


def test_a_convention_that_is_not_there_is_named():
    with pytest.raises(MedVLMError) as e:
        score([], [], "lesion-wise")
    assert e.value.code == "BAD_ARGUMENT" and "brats" in e.value.message
    with pytest.raises(MedVLMError) as e:
        score([one("a", square(1))], [])
    assert e.value.code == "BAD_ARGUMENT"


@pytest.mark.parametrize("kind", ["uint8", "int16", "int64"])
@pytest.mark.parametrize("count", [2, 7, 200, 300])
def test_the_table_is_the_loop(count, kind):
    if count > 255 and kind == "uint8":
        return
    rng = np.random.default_rng(count)
    reference = rng.integers(0, count, (11, 40, 37)).astype(kind)
    predicted = np.where(rng.random(reference.shape) < 0.4, reference, rng.integers(0, count, reference.shape)).astype(kind)
    predicted[predicted == 1] = 0
    reference[reference == 1] = 0  # a label that neither has
    table = dice_table(predicted.transpose(2, 0, 1), reference.transpose(2, 0, 1), count)  # in any memory order
    assert table == pytest.approx([dice(predicted == k, reference == k) for k in range(count)], abs=1e-15)
    assert table[1] == 1


def test_pieces_of_a_large_map_add_up(monkeypatch):
    monkeypatch.setattr("medvlm.evaluate.segment.PIECE", 7)
    maps = np.random.default_rng(0).integers(0, 3, (2, 10, 10))
    assert dice_table(*maps, 3) == pytest.approx([dice(maps[0] == k, maps[1] == k) for k in range(3)])


def test_label_maps_that_are_none_are_refused():
    good = np.zeros((2, 2), np.uint8)
    for wrong, code in ((np.full((2, 2), 3), "BAD_ARGUMENT"), (np.full((2, 2), -1), "BAD_ARGUMENT"), (good.astype(float), "BAD_ARGUMENT"), (good[:1], "GRID_MISMATCH")):
        for pair in ((wrong, good), (good, wrong)):
            with pytest.raises(MedVLMError) as e:
                dice_table(*pair, 3)
            assert e.value.code == code
    assert dice_table(np.zeros((0, 2), int), np.zeros((0, 2), int), 2).tolist() == [1, 1]
