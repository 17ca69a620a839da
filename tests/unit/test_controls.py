"""Altered images, and whether the controls tell a model that looks from one that does not."""

import numpy as np
import pytest

from medvlm.errors import MedVLMError
from medvlm.evaluate import controls, perturb, robustness
from medvlm.evaluate.statistics import paired_difference
from medvlm.imaging.scan import Image, Lazy, Volume
from medvlm.sample import Prediction, Sample, Turn

AXIAL = np.array([[0, 0, 2.0, 5], [0, 2.0, 0, 6], [3.0, 0, 0, 7], [0, 0, 0, 1]])
"""Index (d, h, w) -> mm: W to the left, H to the back, D to the head."""


def pictures():
    lot = np.random.default_rng(0)
    yield Image("rgb", lot.integers(0, 256, (3, 45, 37), dtype=np.uint8), modality="endoscopy", unit="uint8")
    yield Image("deep", lot.integers(0, 4000, (1, 40, 33)).astype(np.uint16), (0.2, 0.3), "xray")
    yield Image("float", lot.normal(0, 1e-3, (1, 33, 40)).astype(np.float32), None, "mr")
    smooth = np.add.outer(np.add.outer(np.arange(5), np.arange(34)), np.arange(36)) * 20 - 1000
    yield Volume("ct", (smooth + lot.integers(-50, 50, smooth.shape))[None].astype(np.int16), AXIAL, "ct", "HU", {"windows": [(40, 400)]})


CHANGES = {
    "blank": lambda x, s: perturb.blank(x), "noise": perturb.noise, "shuffled": perturb.shuffled, "mirrored": lambda x, s: perturb.mirrored(x),
    **{f"{n}-{k}": lambda x, s, n=n, k=k: perturb.artefact(x, n, k, s) for n in perturb.ARTEFACTS for k in (1, 5)},
}  # fmt: skip


def array(image):
    return image.voxels if isinstance(image, Volume) else image.pixels


@pytest.mark.parametrize("name", CHANGES)
def test_only_the_pixels_change_and_by_the_seed_alone(name):
    for image in pictures():
        before = array(image).copy()
        new, again = CHANGES[name](image, "a"), CHANGES[name](image, "a")
        assert (new.id, new.shape, new.dtype, new.modality, new.unit, new.spacing) == (image.id, image.shape, image.dtype, image.modality, image.unit, image.spacing)
        assert array(new).shape == image.shape and array(new).dtype == image.dtype and np.isfinite(array(new)).all()
        assert {**new.info} == {**image.info}
        if isinstance(image, Volume):
            assert np.array_equal(new.affine, image.affine)
        assert np.array_equal(array(new), array(again)) and not np.array_equal(array(new), before)
        assert np.array_equal(array(image), before), "the original was written to"
        if name in ("noise", "shuffled", "grain-5"):
            assert not np.array_equal(array(new), array(CHANGES[name](image, "b")))


def test_nothing_is_read_before_it_is_used():
    read = []
    image = Image("x", Lazy((1, 8, 8), np.uint8, lambda: read.append(1) or np.arange(64, dtype=np.uint8).reshape(1, 8, 8)))
    made = [change(image, "a") for change in CHANGES.values()]
    assert not read and all(m.shape == (1, 8, 8) and m.dtype == np.uint8 for m in made)
    assert made[0].pixels[0, 0, 0] == 32 and len(read) == 1  # the median of 0..63 is 31.5


def test_values_by_hand():
    a = np.array([[[0, 100], [40, 250]]], np.uint8)
    image = Image("x", a)
    assert (perturb.blank(image).pixels == 70).all()  # the median of 0, 40, 100, 250
    assert perturb.mirrored(image).pixels.tolist() == [[[100, 0], [250, 40]]]
    assert perturb.artefact(image, "brightness", 2).pixels.tolist() == [[[51, 151], [91, 255]]]  # + 0.2 * 255, cut at the end of the dtype
    # the mean is 97.5: 0 -> 97.5 - 0.4 * 97.5 = 58.5, 100 -> 98.5, 40 -> 74.5, 250 -> 158.5; halves go to the even number
    assert np.abs(perturb.artefact(image, "contrast", 1).pixels - np.array([58.5, 98.5, 74.5, 158.5]).reshape(1, 2, 2)).max() <= 0.5
    hu = np.linspace(-1000, 1000, 2001).astype(np.int16).reshape(1, 3, 667)
    low, high = np.percentile(hu, (0.5, 99.5))
    brighter = perturb.artefact(Image("x", hu, modality="ct", unit="HU"), "brightness", 1).pixels
    assert np.abs(brighter - (hu + 0.1 * (high - low))).max() <= 0.5 and brighter.max() > 1000  # relative to its own range, and no value is cut
    drawn = perturb.noise(Image("x", np.full((1, 200, 200), 300, np.int16) + np.arange(-100, 100, dtype=np.int16)), "s").pixels
    assert drawn.mean() == pytest.approx(299.5, abs=1.5) and drawn.std() == pytest.approx(57.73, abs=1.5)


def test_stronger_artefacts_change_more():
    smooth = (np.add.outer(np.sin(np.arange(96) / 9), np.cos(np.arange(80) / 5)) * 60 + 128).astype(np.uint8)[None]
    image = Image("x", smooth, modality="mr")
    for name in perturb.ARTEFACTS:
        moved = [np.abs(perturb.artefact(image, name, k, "s").pixels.astype(float) - smooth).mean() for k in range(1, 6)]
        assert moved == sorted(moved) and moved[0] > 0, (name, moved)
    for name, k in (("fog", 1), ("blur", 0), ("blur", 6)):
        with pytest.raises(MedVLMError) as e:
            perturb.artefact(image, name, k)
        assert e.value.code == "BAD_ARGUMENT"


def test_shuffling_moves_every_patch_and_loses_none():
    image = Image("x", np.arange(64 * 33, dtype=np.uint16).reshape(1, 64, 33))
    new = perturb.shuffled(image, "s").pixels
    assert np.array_equal(np.sort(new, None), np.sort(image.pixels, None))
    patches = image.pixels[0, :64, :33].reshape(16, 4, 11, 3).transpose(0, 2, 1, 3).reshape(-1, 12)
    moved = new[0, :64, :33].reshape(16, 4, 11, 3).transpose(0, 2, 1, 3).reshape(-1, 12)
    assert not (patches == moved).all(1).any() and {*map(tuple, patches)} == {*map(tuple, moved)}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mirror_swaps_the_patients_sides_whatever_the_axes(order, sign):
    affine = AXIAL[:, [*order, 3]] * np.array([1, 1, sign, 1])
    volume = Volume("v", np.random.default_rng(1).integers(0, 99, (1, 4, 5, 6)).astype(np.int16), affine)
    new = perturb.mirrored(volume)
    assert np.array_equal(perturb.mirrored(new).voxels, volume.voxels) and np.array_equal(new.affine, affine)
    straight = [x.reorient("SPL").voxels for x in (volume, new)]
    assert np.array_equal(straight[1], straight[0][..., ::-1])


def test_what_has_no_sides_is_not_mirrored():
    sagittal = np.array([[2.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    coronal = np.array([[0, 0, 1.0, 0], [2, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    a = np.arange(4, dtype=np.uint8).reshape(1, 2, 2)
    assert not perturb.sided(Image("x", a, info={"affine": sagittal})) and not perturb.sided(Image("x", a, info={"view": "LATERAL"}))
    assert perturb.mirrored(Image("x", a, info={"affine": coronal, "view": "PA"})).pixels.tolist() == [[[1, 0], [3, 2]]]
    with pytest.raises(MedVLMError) as e:
        perturb.mirrored(Image("x", a, info={"affine": sagittal}))
    assert e.value.code == "ORIENTATION_UNKNOWN"


def test_a_derangement_never_gives_the_same_patient():
    lot = np.random.default_rng(0)
    for n in range(2, 40):
        owners = lot.integers(0, max(2, n // 2), n).tolist()
        found = perturb.derangement(owners, str(n))
        if len(set(owners)) == 1:
            assert found == [None] * n
            continue
        assert all(owners[j] != owners[i] for i, j in enumerate(found)) and found == perturb.derangement(owners, str(n))
        if max(map(owners.count, owners)) <= n / 2:
            assert sorted(found) == list(range(n))
    assert perturb.derangement("aaab", "x")[:3] == [3, 3, 3] and perturb.derangement("aaa", "x") == [None] * 3


def test_other_images_are_of_the_same_modality_and_keep_their_own_size():
    images = [Image("i", np.full((1, 4, 4 + n), n, np.uint8), modality="ct" if n % 2 else "mr") for n in range(8)] + [Image("i", np.zeros((1, 4, 4)), modality="oct")]
    found = perturb.others(images, [f"p{n // 2 % 3}" for n in range(9)], "s")
    for n, new in enumerate(found[:8]):
        given = int(new.pixels[0, 0, 0])
        assert new.id == "i" and new.modality == images[n].modality and new.shape == images[given].shape
        assert given // 2 % 3 != n // 2 % 3
    assert found[8] is None


def question(n, answer, text="Is there an effusion?", bright=None, **more):
    pixels = np.full((1, 32, 32), 90, np.uint8) + np.random.default_rng(n).integers(0, 20, (1, 32, 32), dtype=np.uint8)
    if bright == "left":
        pixels[:, :, :16] += 100
    elif bright == "right":
        pixels[:, :, 16:] += 100
    elif answer == "yes":
        pixels[:, :16, :16] += 100
    return Sample(f"q{n}", f"p{n}", {"i": Image("i", pixels, modality="xray")}, (Turn("user", text), Turn("assistant", answer)), choices=("yes", "no"), meta={"row": f"r{n}"}, **more)


def looking(sample):
    """Reads the mean of the upper left quarter, or of the half that the question names."""
    a = sample.images["i"].pixels[0]
    part = a[:, :16] if "left" in sample.question else a[:, 16:] if "right" in sample.question else a[:16, :16]
    bright = float(part.mean()) - float(a.mean())
    return Prediction(sample.id, "yes" if bright > 20 else "no", choices={"yes": 1 / (1 + np.exp(20 - bright)), "no": 1 / (1 + np.exp(bright - 20))})


def reading(sample):
    """Answers from the words of the question."""
    yes = len(sample.question) % 2 == 0
    return Prediction(sample.id, "Yes." if yes else "No.", 0.8)


def scored(task, samples, model):
    asked = task.prepare({"test": samples}.get, "test")
    found = task.score(asked, [model(s) for s in asked], "medvlm")
    return asked, {(s.name, s.slice.partition("=")[2] or s.slice): s for s in found}


def test_a_model_that_refuses_every_blank_has_not_looked_in_answering():
    samples = [question(n, "yes" if n % 2 else "no") for n in range(20)]

    def gated(sample):  # right on the original by its number, refuses what looks odd, never changes an answer
        if sample.meta.get("control") in ("blank", "noise", "shuffled"):
            return Prediction(sample.id, error="OUT_OF_SCOPE: not an X-ray")
        return Prediction(sample.id, "yes" if int(sample.id[1:].partition("@")[0]) % 2 else "no", 0.9)

    _, found = scored(controls.TASK, samples, gated)
    assert found["score drop", "blank"].value == 1.0 and found["unanswered", "blank"].value == 1.0
    assert found["score drop where answered", "blank"].n == 0 and found["looks at the image", "all"].value == 0.0


def test_the_controls_tell_a_model_that_looks_from_one_that_does_not():
    samples = [question(n, "yes" if n % 2 else "no", "Is there an effusion?" if n % 3 else "Is there any effusion?") for n in range(40)]
    asked, seen = scored(controls.TASK, samples, looking)
    _, blind = scored(controls.TASK, samples, reading)
    assert len({s.id for s in asked}) == len(asked) == 40 * 6
    assert seen["accuracy", "original"].value == 1 and seen["looks at the image", "all"].value == 1 and blind["looks at the image", "all"].value == 0
    for name in ("blank", "noise", "shuffled", "other", "mirror"):
        drop, change = blind["score drop", name], blind["answer change rate", name]
        assert (drop.value, drop.low, drop.high, change.value, change.high) == (0, 0, 0, 0, 0), name
        assert blind["change of P(yes)", name].value == 0
    for name in ("blank", "noise", "other"):
        drop = seen["score drop", name]
        assert drop.low > 0 and drop.n == 40 and seen["answer change rate", name].low > 0 and seen["change of P(yes)", name].value > 0.2, name
    assert seen["score drop", "blank"].value == 0.5  # it says no to every blank
    # the interval is that of the paired difference of the two accuracies, here on the same draws
    original, other = seen["accuracy", "original"], seen["accuracy", "other"]
    renamed = type(other.items)(original.items.ids, other.items.clusters, other.items.statistic, other.items.values)
    value, low, high, _ = paired_difference(original, type(other)("accuracy", other.value, other.n, items=renamed))
    drop = seen["score drop", "other"]
    assert (drop.value, drop.low, drop.high) == pytest.approx((value, low, high), abs=1e-12)


def test_a_side_follows_the_mirror():
    """Both sides are asked of each image, so it is known what is true of the mirrored one."""
    samples = []
    for n in range(10):
        side = "left" if n % 2 else "right"
        for k, asked in enumerate(("left", "right")):
            s = question(n, "yes" if asked == side else "no", f"Is the effusion in the {asked} lung?", bright=side)
            images = samples[-1].images if k else s.images
            samples.append(Sample(f"q{n}{asked}", s.patient, images, s.turns, choices=s.choices, meta=s.meta))
    samples.append(question(99, "yes", "Is it in the right lower lobe?"))  # nobody said what is in the left one
    asked, seen = scored(controls.TASK, samples, looking)
    mirrors = [s for s in asked if s.meta.get("control") == "mirror"]
    assert {s.meta["of"] for s in mirrors} == {s.id for s in samples[:-1]} and all(s.meta["flip"] for s in mirrors)
    assert all(s.answer != t.answer and s.question == t.question for s, t in zip(mirrors, samples))
    assert seen["accuracy", "mirror"].value == 1 and seen["side follows the mirror", "mirror"].value == 1
    _, blind = scored(controls.TASK, samples, lambda s: Prediction(s.id, "yes"))
    assert blind["side follows the mirror", "mirror"].value == 0 and blind["answer change rate", "mirror"].value == 0


@pytest.mark.parametrize(
    ("text", "answer", "choices", "true"),
    [
        ("Is there an effusion?", "yes", None, "yes"),
        ("Where is the mass?", "Left lung", ("Left lung", "Right lung"), "Right lung"),
        ("Where is the mass?", "Left lung", ("Left lung", "Heart"), None),
        ("Where is the mass?", "LLL", ("LLL", "RLL"), "RLL"),
        ("Is it on the left?", "yes", None, None),
        ("Is there situs inversus?", "no", None, None),
    ],
)
def test_what_is_true_of_the_mirrored_image(text, answer, choices, true):
    image = Image("i", np.zeros((1, 4, 4), np.uint8))
    s = Sample("q", images={"i": image}, turns=(Turn("user", text), Turn("assistant", answer)), choices=choices)
    assert controls.mirrored_answer(s, {controls._place(s, text): answer}) == true


def test_errors_are_wrong_and_no_change():
    """Six images, all to be answered yes; a, b: right then wrong; c: right then an error; d: an error, then right; e, f: right twice."""
    originals = [Sample(x, images={"i": Image("i", np.zeros((1, 2, 2)))}, turns=(Turn("user", "Is it?"), Turn("assistant", "yes"))) for x in "abcdef"]
    copies = list(controls.copies(originals, "blank", lambda x, _: perturb.blank(x)))
    before = [Prediction("a", "yes"), Prediction("b", "yes"), Prediction("c", "yes"), Prediction("d", error="X: y"), Prediction("e", "Yes."), Prediction("f", "yes")]
    after = [Prediction("a@blank", "no"), Prediction("b@blank", "maybe"), Prediction("c@blank", "yes", error="X: y"), Prediction("d@blank", "yes"),
             Prediction("e@blank", "yes"), Prediction("f@blank", "yes")]  # fmt: skip
    found = {(s.name, s.slice): s for s in controls.score([*originals, *copies], [*before, *after], "medvlm")}
    assert found["accuracy", "control=original"].value == 5 / 6 and found["accuracy", "control=blank"].value == 3 / 6
    assert found["score drop", "control=blank"].value == pytest.approx((1 + 1 + 1 - 1 + 0 + 0) / 6)
    assert found["answer change rate", "control=blank"].value == 1 / 6  # only a: b cannot be read, c and d failed once
    assert ("change of P(yes)", "control=blank") not in found
    with pytest.raises(MedVLMError):
        controls.score([*originals, *copies], [*after, *before], "medvlm")
    alone = {(s.name, s.slice): s for s in controls.score([*originals[:3], *copies], [*before[:3], *after], "medvlm")}
    assert (alone["accuracy", "control=blank"].n, alone["score drop", "control=blank"].n, alone["score drop", "control=blank"].excluded) == (6, 3, 3)
    assert np.isnan(alone["looks at the image", "all"].value) and "cluster" in alone["looks at the image", "all"].note


def test_choices_are_picked_and_chance_is_theirs():
    choices = ("liver", "spleen", "heart", "lung")
    s = Sample("a", images={"i": Image("i", np.zeros((1, 2, 2)))}, turns=(Turn("user", "What is it?"), Turn("assistant", "B")), choices=choices)
    (score, *_) = controls.score([s], [Prediction("a", "B) spleen")], "medvlm")
    assert (score.value, score.chance) == (1, 0.25) and controls.heard(s, Prediction("a", "the heart")) == "heart"
    assert controls.closed([s, Sample("open", images=s.images, turns=(Turn("user", "What?"), Turn("assistant", "a mass"))), Sample("words", turns=s.turns, choices=choices)]) == [s]


def test_the_chance_of_yes():
    assert controls.chance_of_yes(Prediction("a", "no", 0.9, {"Yes": 0.25, "No": 0.75})) == 0.25
    assert controls.chance_of_yes(Prediction("a", "no", 0.75)) == 0.25 and controls.chance_of_yes(Prediction("a", "Yes, it is", 0.75)) == 0.75
    for p in (Prediction("a", "yes"), Prediction("a", "hm", 0.5), Prediction("a", "yes", 0.9, error="X: y")):
        assert np.isnan(controls.chance_of_yes(p))


def test_artefacts_at_three_strengths():
    samples = [question(n, "yes" if n % 2 else "no") for n in range(6)]
    asked, found = scored(robustness.TASK, samples, looking)
    names = {s.meta["control"] for s in asked if "control" in s.meta}
    assert len(asked) == 6 * (1 + 3 * 9) and "blur-3" in names and not any(n.startswith("bias") for n in names)
    assert found["accuracy", "none"].value == 1 and found["score drop", "jpeg-1"].value == 0 and found["score drop", "contrast-5"].value == 0.5
    assert found["accuracy", "all"].n == 6 * 27 and found["accuracy", "1"].n == 6 * 9
    shared = [s.images["i"] for s in asked if s.meta.get("control") == "blur-3"]
    assert len({id(x) for x in shared}) == 6
    mr = [Sample("m", images={"i": Image("i", np.zeros((1, 9, 9)), modality="mr")}, turns=samples[0].turns, choices=("yes", "no"))]
    assert "bias-5" in {s.meta.get("control") for s in robustness.prepare({"test": mr}.get, "test")}
