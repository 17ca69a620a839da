"""The mirrored twin of a sample: pixels, outlines, boxes and words change sides together, or the flip is refused."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlm.datasets.mirror import MARK, SOURCE, mirror, swapped
from medvlm.errors import ModelError
from medvlm.imaging.scan import Image, Volume
from medvlm.sample import Mask, Region, Sample, Turn, box_of

AXIAL = np.array([[0, 0, 1.0, -20], [0, 2, 0, -10], [5, 0, 0, 30], [0, 0, 0, 1]])  # index (d, h, w): W grows to the patient's left
CORONAL = np.array([[0, 0, 1.0, 0], [2, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
FRONTAL = {"view": "PA"}


def xray(info=FRONTAL, array=None, modality="xray"):
    return Image("i", np.arange(24, dtype=np.uint8).reshape(1, 4, 6) if array is None else array, modality=modality, info=info)


def about(image=None, question="Where is the effusion?", answer="On the left.", **more):
    image = xray() if image is None else image
    return Sample(more.pop("id", "s"), "p", {image.id: image}, (Turn("user", question), Turn("assistant", answer)), **more)


def refusal(sample):
    with pytest.raises(ModelError) as e:
        mirror(sample)
    assert e.value.code == "FLIP_REFUSED" and e.value.hint and sample.id in e.value.message
    return e.value.message


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Left-sided effusion, LEFT lung, the right's; leftmost, rightward", "Right-sided effusion, RIGHT lung, the left's; rightmost, leftward"),
        ("left_lung lung_upper_lobe_right LeftLung lungRight", "right_lung lung_upper_lobe_left RightLung lungLeft"),
        ("RUL and LLL, pain in the RLQ. ruq; RUE, LAO", "LUL and RLL, pain in the LLQ. luq; LUE, RAO"),
        ("Rt. hilum, lt kidney; R heart border, (L) hip, R>L", "Lt. hilum, rt kidney; L heart border, (R) hip, L>R"),
        ("dextroscoliosis, Levo-curvature, dextroconvex", "levoscoliosis, Dextro-curvature, levoconvex"),
        ("R", "L"),
        ("bright cleft upright, levofloxacin and dextrose, 5 L of oxygen, 3 g/L with U / L and, L5, L-spine, RT-PCR, R/O", None),
        ("OD and OS", None),
    ],
)
def test_the_other_side_of_words(text, other):
    assert swapped(text) == (text if other is None else other)
    assert swapped(swapped(text)) == text


WORDS = ["left", "Right", "LEFT", "right-sided", "L", "R", "RLL", "LUQ", "Rt", "lt", "levoscoliosis", "OD", "O.S.", "lung", "kidney", "of", "and", "(R)", "bright", "5 L",
         "lung_left", "lungRight", "leftover", ">", "/", ".", ",", "\n", "-"]  # fmt: skip


@given(st.lists(st.sampled_from(WORDS), max_size=12), st.sampled_from([" ", "", "_"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_twice_is_the_text_itself(words, glue, eyes):
    text = glue.join(words)
    assert swapped(swapped(text, eyes), eyes) == text


def test_od_and_os_are_sides_of_eyes_only():
    assert swapped("Fundus of the eye, OD (O.S. not shown)", eyes=True) == "Fundus of the eye, OS (O.D. not shown)"
    eye = about(xray({}, modality="fundus"), "Which eye is it?", "OD", choices=("OD", "OS"))
    assert mirror(eye).answer == "OS" and mirror(eye).choices == ("OS", "OD")
    assert "optic disc" in refusal(about(xray({}, modality="fundus"), "Segment the OD.", "done"))
    assert "optic disc" in refusal(about(xray({}, modality="fundus"), "Is it healthy?", "yes", masks=(Mask("i", "OD", np.ones((4, 6), bool)),)))
    assert mirror(about(question="Is there OD?", answer="no")).question == "Is there OD?"  # no eye: not a side


def scene(kind):
    """A mark on the patient's left, outlined, boxed and spoken of, in pictures and volumes of several orientations."""
    info = {"laterality": "L", "sop": ["1.2"], "series": "LEFT HIP", "patient_position": "HFDR"}
    if kind == "picture":  # the patient's left is the picture's right
        image, place = xray(FRONTAL | info, np.zeros((1, 8, 10), np.uint8)), (slice(2, 5), slice(7, 9))
    elif kind == "slice":
        image, place = Image("i", np.zeros((1, 8, 10), np.int16), modality="ct", info={"affine": AXIAL, **info}), (slice(2, 5), slice(7, 9))
    elif kind == "lying slice":  # the height runs across the patient, towards the right
        image, place = Image("i", np.zeros((1, 8, 10), np.int16), modality="mr", info={"affine": AXIAL[:, [0, 2, 1, 3]] * [1, -1, 1, 1], **info}), (slice(1, 3), slice(4, 9))
    else:
        image, place = Volume("i", np.zeros((1, 5, 8, 10), np.int16), AXIAL, "ct", "HU", info), (slice(1, 3), slice(2, 5), slice(7, 9))
        if kind == "turned volume":
            image, place = Volume("i", np.zeros((1, 10, 8, 5), np.int16), AXIAL[:, [2, 1, 0, 3]] * [-1, 1, 1, 1], "ct", "HU", info), (slice(1, 3), slice(2, 5), slice(3, 5))
    mark = np.zeros(image.shape[1:], bool)
    mark[place] = True
    (image.voxels if isinstance(image, Volume) else image.pixels)[0][mark] = 100
    return about(
        image, "<|image:i|>\nIs the left nodule seen?", "Yes, in the LEFT lung (LUL).", choices=("Left", "Right"), group="g", verb="ask",
        masks=(Mask("i", "nodule_left", mark, 1),), regions=(Region("i", "left nodule", box_of(mark), mark, 0.5), Region("i", "lung")),
        labels={"left nodule": 1.0, "right nodule": 0.0, "scar": float("nan")},
        meta={"row": "left-17", "sections": {"findings": "Left nodule."}, "labels": {"side": ["left"]}, "n": 3},
    )  # fmt: skip


KINDS = ("picture", "slice", "lying slice", "volume", "turned volume")


def pixels(image):
    return image.voxels if isinstance(image, Volume) else image.pixels


def from_the_right(image, mask):
    """Mean distance of a mask from the patient's right end, 0 to 1."""
    if isinstance(image, Volume):
        ends = image.world([(0, 0, 0), np.array(image.shape[1:]) - 1])[:, 0]
        return (image.world(np.argwhere(mask))[:, 0].mean() - ends.min()) / np.ptp(ends)
    affine = np.asarray(image.info.get("affine", AXIAL), float)
    x = np.concatenate([np.zeros((mask.sum(), 1)), np.argwhere(mask)], 1) @ affine[0, :3] + affine[0, 3]
    ends = np.array([[0, 0, 0], [0, *(np.array(mask.shape) - 1)]]) @ affine[0, :3] + affine[0, 3]
    return (x.mean() - ends.min()) / np.ptp(ends)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mark_on_the_left_is_on_the_right_with_the_words(kind):
    sample = scene(kind)
    twin = mirror(sample)
    (image,), (new,) = sample.images.values(), twin.images.values()
    shown, drawn = pixels(new)[0] == 100, twin.masks[0].array
    assert from_the_right(image, sample.masks[0].array) > 0.6 and from_the_right(new, shown) < 0.4  # the grid's world is the same, the mark is not
    assert np.array_equal(shown, drawn) and np.array_equal(shown, twin.regions[0].mask) and twin.regions[0].box == box_of(shown)
    assert twin.answer == "Yes, in the RIGHT lung (RUL)." and twin.question == f"<|image:i{MARK}|>\nIs the right nodule seen?"
    assert twin.choices == ("Right", "Left") and twin.masks[0].label == "nodule_right" and twin.masks[0].count == 1 and twin.regions[0].label == "right nodule"
    assert {k: twin.labels[k] for k in ("left nodule", "right nodule")} == {"left nodule": 0.0, "right nodule": 1.0} and np.isnan(twin.labels["scar"])
    assert twin.meta == {"row": "left-17", "sections": {"findings": "Right nodule."}, "labels": {"side": ["right"]}, "n": 3}
    assert (twin.id, twin.group, twin.patient, new.id) == ("s" + MARK, "g" + MARK, "p", "i" + MARK) and list(twin.images) == [new.id]
    assert {m.image for m in (*twin.masks, *twin.regions)} == {new.id}
    assert (new.info["laterality"], new.info["series"], new.info["patient_position"]) == ("R", "RIGHT HIP", "HFDL") and not set(SOURCE) & new.info.keys()
    assert (new.shape, new.dtype, new.modality, new.unit, new.spacing) == (image.shape, image.dtype, image.modality, image.unit, image.spacing)
    assert image.info["laterality"] == "L" and (pixels(image)[0] == 100).sum() == sample.masks[0].array.sum()  # the original is as it was


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_of_the_twin_is_the_original(kind):
    sample = scene(kind)
    again = mirror(mirror(sample))
    for f in fields(Sample):
        if f.name not in ("images", "masks", "regions", "labels"):
            assert getattr(again, f.name) == getattr(sample, f.name), f.name
    np.testing.assert_equal(dict(again.labels), dict(sample.labels))
    (image,), (new,) = sample.images.values(), again.images.values()
    assert list(again.images) == ["i"] and np.array_equal(pixels(image), pixels(new)) and pixels(new).dtype == image.dtype
    np.testing.assert_equal({k: v for k, v in image.info.items() if k not in SOURCE}, new.info)
    if isinstance(image, Volume):
        assert np.array_equal(image.affine, new.affine)
    for old, m in zip(sample.masks, again.masks):
        assert (m.image, m.label, m.count) == (old.image, old.label, old.count) and np.array_equal(m.array, old.array)
    for old, r in zip(sample.regions, again.regions):
        assert (r.image, r.label, r.probability, r.box) == (old.image, old.label, old.probability, old.box) and np.array_equal(r.mask, old.mask)


def test_boxes_between_pixels():
    twin = mirror(about(regions=(Region("i", "scar", ((0.5, 1.25), (2.0, 4.0))),)))
    assert twin.regions[0].box == ((0.5, 2.0), (2.0, 4.75))  # six pixels wide


@pytest.mark.parametrize(
    ("question", "answer", "why"),
    [
        ("Is there situs inversus?", "no", "handedness"),
        ("Dextrocardia?", "no", "handedness"),
        ("Where is the liver?", "On the right", "no twin"),
        ("Is the left atrium enlarged?", "no", "no twin"),
        ("Opacity in the right middle lobe?", "yes", "no twin"),
        ("Opacity?", "RML", "no twin"),
        ("Heart apex to the left?", "yes", "no twin"),
        ("Is this X-ray normal?", "yes", "normal"),
        ("Any abnormality?", "no", "normal"),
        ("Where is the R marker?", "top", "markers"),
        ("Where is it?", '{"bbox_2d": [1, 2, 3, 4]}', "numbers"),
        ("Where is it?", "<loc0001><loc0002><loc0003><loc0004>", "numbers"),
        ("Where?", "at 3 o'clock", "markers"),
        ("Is this a lateral view?", "no", "one side"),
        ("Is the tube left in place?", "yes", "no side"),
        ("Right angle of the tube?", "yes", "no side"),
        ("Leftover contrast?", "yes", "may or may not"),
        ("Prior RT?", "yes", "may or may not"),
        ("Side?", "it is R.", "may or may not"),
        ("左肺?", "是", "not English"),
    ],
)
def test_what_would_lie_is_refused(question, answer, why):
    said = refusal(about(question=question, answer=answer))
    assert why in said and question not in said


@pytest.mark.parametrize(
    ("modality", "info", "question", "answer"),
    [
        ("xray", FRONTAL, "Is there cardiomegaly and a left effusion?", "yes"),  # no organ's side
        ("xray", FRONTAL, "Segment the heart.", "<|seg|>"),  # no side
        ("mr", {"body_part": "HEAD", "affine": AXIAL}, "Is the left lateral ventricle normal?", "yes"),
        ("fundus", {}, "Is the left fundus normal?", "yes"),
        ("pathology", {}, "Is the tissue on the left normal?", "yes"),
        ("xray", {"body_part": "BREAST", "view": "MLO", "laterality": "R"}, "Is the right breast normal?", "yes"),
        ("ct", {}, "Is there a cyst?", "yes"),  # plane unknown, nothing said of sides
    ],
)
def test_what_stays_true_is_mirrored(modality, info, question, answer):
    twin = mirror(about(xray(info, modality=modality), question, answer))
    assert twin.question == swapped(question) and twin.answer == answer
    assert np.array_equal(next(iter(twin.images.values())).pixels, xray().pixels[..., ::-1])


def test_pictures_that_cannot_be_mirrored():
    plain = dict(question="Is there a cyst?", answer="yes")
    sheared = AXIAL.copy()
    sheared[0, 0] = 1.0
    tilted = AXIAL.copy()
    tilted[1, 0] = 1.0  # gantry tilt leans towards the back: the mirror plane bears it
    for image, why in [
        (xray({"burned_in": True}), "burned"),
        (xray({"laterality": "?"}), "laterality"),
        (xray({"view": "LL"}), "one side"),
        (xray({"view": "RL"}), "one side"),
        (xray({"affine": AXIAL[:, [2, 1, 0, 3]]}, modality="mr"), "one side"),
        (Volume("i", np.zeros((1, 2, 3, 4)), sheared, "ct"), "sheared"),
    ]:
        assert why in refusal(about(image, **plain))
    assert mirror(about(Volume("i", np.zeros((1, 2, 3, 4)), tilted, "ct"), **plain)).images
    assert mirror(about(xray({"affine": CORONAL}), **plain)).images
    for image in (xray({}), xray({}, modality="ct"), xray({}, modality="ultrasound")):
        assert "plane" in refusal(about(image)) and "plane" in refusal(about(image, **plain, masks=(Mask("i", "left_cyst", np.ones((4, 6), bool)),)))
    assert "one side" in refusal(about(xray({}), **plain, meta={"labels": {"view": "L"}}))
    assert mirror(about(xray({}), meta={"labels": {"view": "AP Supine"}})).answer == "On the right."
    assert "no image" in refusal(Sample("s", turns=(Turn("user", "Left?"),)))
    assert "does not have" in refusal(about(**plain, masks=(Mask("other", "cyst", np.ones((4, 6), bool)),)))
    assert "English" in refusal(about(**plain, meta={"lang": "es"}))


def test_labels_that_would_lie():
    plain = dict(question="Is there a cyst?", answer="yes")
    for labels in ({"normal": 1.0}, {"No Finding": 1.0}, {"abnormality": 0.0}):
        assert "normal" in refusal(about(**plain, labels=labels))
    for labels in ({"normal": 0.0}, {"abnormality": 1.0}, {"normal": float("nan")}):
        assert mirror(about(**plain, labels=labels)).labels.keys() == labels.keys()
    for name in ("heart_atrium_left", "lung_middle_lobe_right"):
        assert "no twin" in refusal(about(**plain, masks=(Mask("i", name, np.ones((4, 6), bool)),)))
        assert "no twin" in refusal(about(**plain, labels={name: 0.0}))
    assert mirror(about(**plain, labels={"kidney_left": 0.0})).labels == {"kidney_right": 0.0}


def test_pixels_are_read_late_and_not_kept():
    from medvlm.imaging.scan import Lazy

    read = []
    sample = about(Image("i", Lazy((1, 4, 6), np.uint8, lambda: read.append(1) or xray().pixels), modality="xray", info=FRONTAL))
    (image,) = mirror(sample).images.values()
    assert not read
    assert np.array_equal(image.pixels, xray().pixels[..., ::-1]) and read == [1]


def test_real_questions(data):
    """Of the questions about real X-rays, every twin exchanges every side it names, and twice gives the text back."""
    from medvlm.datasets import manifest

    made = refused = 0
    for row in manifest.rows(data / "xray_covid"):
        for sample in manifest.row_samples({**row, "mask": None}):
            try:
                twin = mirror(sample)
            except ModelError as error:
                assert error.code == "FLIP_REFUSED"
                refused += 1
                continue
            made += 1
            a, b = (" ".join(t.text for t in s.turns).lower() for s in (sample, twin))
            a, b = a.replace("bright", ""), b.replace("bright", "")
            assert (a.count("left"), a.count("right")) == (b.count("right"), b.count("left"))
            assert {r.label for r in sample.regions} == {swapped(r.label) for r in twin.regions} == {r.label for r in twin.regions}
            for r, t in zip(sample.regions, twin.regions):
                width = next(iter(sample.images.values())).shape[-1]
                assert np.allclose((t.box[0][1], t.box[1][1]), (width - r.box[1][1], width - r.box[0][1])) and t.label != r.label
    assert made > 100 and refused > 20
