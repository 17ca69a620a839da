"""Captions out of facts, slices of volumes, and the retrieval of the one by the other."""

from dataclasses import replace

import numpy as np
import pytest

from medvlm.datasets import captions, manifest
from medvlm.datasets.captions import Told, counted
from medvlm.datasets.instruct import conversations
from medvlm.datasets.slices import sliced
from medvlm.evaluate import retrieve_facts
from medvlm.imaging.scan import Image, Volume
from medvlm.sample import Mask, Prediction, Region, Sample, Turn

SIZE = (40, 60)


def sample(image, findings=(), masks=(), regions=(), row="r", **meta):
    return Sample(row, None, {image.id: image}, labels=dict(findings), masks=tuple(Mask(image.id, n, a) for n, a in masks), regions=tuple(regions),
                  meta={"row": row, "split": "train", **meta})  # fmt: skip


def picture(modality="xray", **info):
    return Image("i", np.zeros((1, *SIZE), np.uint8), None, modality, "uint8", info)


def told(*group):
    return [s.answer for s in conversations(group, kinds=("facts",))]


def half(side):
    array = np.zeros(SIZE, bool)
    array[5:35, slice(5, 25) if side == "right" else slice(35, 55)] = True
    return array


@pytest.mark.parametrize(
    ("given", "plainest"),
    [
        (sample(picture(view="PA"), {"pneumonia": 1, "pleural_effusion": 0, "cardiomegaly": np.nan}, labels={"organ": "CHEST"}), "A PA chest X-ray showing pneumonia. No pleural effusion."),
        (sample(picture(body_part="KNEE")), "An X-ray of the knee."),
        (sample(picture("mr", body_part="HEAD"), {"lesion": 1}), "An MR slice of the head showing a lesion."),
        (sample(picture("fundus")), "A fundus photograph of the eye."),
        (sample(picture("ultrasound"), {"nodule": 0, "cyst": 0, "oedema": 0, "mass": 0}), "An ultrasound image. No nodule, cyst or oedema."),
        (sample(picture("endoscopy"), {"normal": 1}), "An endoscopy image showing nothing abnormal."),
        (sample(picture("unknown", body_part="ABDOMEN")), "An image of the abdomen."),
        (sample(picture("pathology"), regions=[Region("i", "RBC", ((2, k), (8, k + 5))) for k in range(3)] + [Region("i", "Platelets", ((20, 2), (24, 6)))]),
         "A microscopy image showing 3 RBC and 1 platelet."),
    ],
)  # fmt: skip
def test_the_plainest_caption(given, plainest):
    assert told(given)[0] == plainest


def test_a_finding_has_its_side_and_a_picture_of_nothing_known_no_caption():
    spot = np.zeros(SIZE, bool)
    spot[10:14, 10:14] = True
    masks = [("right_lung", half("right")), ("left_lung", half("left")), ("consolidation", spot)]
    for outlines in (masks, masks[::-1]):
        assert told(sample(picture(view="AP"), masks=outlines))[0] == "An AP chest X-ray showing consolidation on the right."
    mirrored = [("left_lung", half("right")), ("right_lung", half("left")), ("consolidation", spot)]
    assert told(sample(picture(view="AP"), masks=mirrored))[0] == "An AP chest X-ray showing consolidation on the left."
    assert told(sample(picture("unknown"))) == []


def test_counts_beyond_a_glance_are_rounded():
    said = [counted(n, "nuclei") for n in (1, 2, 10, 11, 14, 15, 96)]
    assert said == ["1 nucleus", "2 nuclei", "10 nuclei", "about 10 nuclei", "about 10 nuclei", "about 20 nuclei", "about 100 nuclei"]
    assert counted(1, "nodule") == "1 nodule" and counted(2, "nodule") == "2 nodules"


def test_wordings_say_the_same_things_and_nothing_else():
    about = Told("a chest X-ray", ("pneumonia", "an endotracheal tube"), ("pleural effusion", "pneumothorax", "ARDS", "oedema"))
    many = list(captions.captions(about, np.random.default_rng(0), 200))
    assert many == list(captions.captions(about, np.random.default_rng(0), 200)) and len(set(many)) > 60
    for text in many:
        there, _, lacking = text.replace(". It shows", " It shows").partition(". ")
        assert all(t.lower() in there.lower() for t in about.there) and "a chest x-ray" in there.lower()
        assert not any(n.lower() in there.lower() for n in about.lacking) and not any(t.lower() in lacking.lower() for t in about.there)
        assert (sum(n in lacking for n in about.lacking) > 0) == bool(lacking) and text.endswith(".") and text[0].isupper() and ".." not in text
    assert {sum(n in t for n in about.lacking) for t in many} == {0, 1, 2, 3}
    other = told(sample(picture(), {"pneumonia": 1.0, "mass": 0.0}, row="a")), told(sample(picture(), {"pneumonia": 1.0, "mass": 0.0}, row="b"))
    assert other[0][0] == other[1][0] and other[0] != other[1]  # the plainest is the same for equal facts, the others are drawn by row


def test_what_others_wrote_is_no_caption_of_facts():
    note = replace(sample(picture(), {"pneumonia": 1.0}), turns=(Turn("assistant", "He came home from a journey."),))
    assert not any("journey" in t for t in told(note))
    assert [s.answer for s in conversations([note], kinds=("caption",))] == ["He came home from a journey."]


def test_slices_show_what_is_cut():
    """Voxels stored upside down and mirrored: slices come as a radiologist reads them, masks with them."""
    voxels = np.arange(12 * 4 * 5, dtype=np.float32).reshape(1, 12, 4, 5)
    liver = np.zeros((12, 4, 5), bool)
    liver[:6, 1:3, 0] = True
    volume = Volume("v", voxels, [[0, 0, -2.0, 0], [0, 2.0, 0, 0], [-5.0, 0, 0, 0], [0, 0, 0, 1]], "ct", "HU", {"sop": list("abcdefghijkl"), "body_part": "ABDOMEN"})
    assert volume.orientation == "IPR"
    slices = list(sliced([sample(volume, masks=[("liver", liver)], row="ct", dataset="d")], 3))
    assert [g[0].meta["row"] for g in slices] == ["ct@2", "ct@6", "ct@10"] and {s.patient for g in slices for s in g} == {None}
    assert {s.patient for s in retrieve_facts.prepare(lambda split: [sample(volume, masks=[("liver", liver)], row="ct")], "val")} == {"ct"}
    for group, at in zip(slices, (2, 6, 10)):
        (image,) = group[0].images.values()
        assert np.array_equal(image.pixels[0], voxels[0, 11 - at, :, ::-1]) and image.spacing == (2, 2) and "sop" not in image.info
        assert np.allclose(image.info["affine"] @ [0, 1, 2, 1], volume.affine @ [11 - at, 1, 4 - 2, 1])
        assert np.array_equal(group[1].masks[0].array, liver[11 - at, :, ::-1]) and group[1].images is group[0].images
    assert [told(*g)[0] for g in slices] == ["An axial CT slice of the abdomen."] + ["An axial CT slice of the abdomen showing the liver."] * 2
    flat = [sample(picture())]
    assert list(sliced(flat)) == [flat]


def test_equal_captions_are_one_candidate():
    group = [sample(picture("mr"), {"lesion": float(k % 2)}, row=f"r{k}") for k in range(4)]
    prepared = retrieve_facts.prepare(lambda split: group, "val")
    assert [s.answer for s in prepared] == ["An MR slice. No lesion.", "An MR slice showing a lesion."] * 2
    space = {t: np.eye(2)[i] for i, t in enumerate(dict.fromkeys(s.answer for s in prepared))}
    scores = {s.name: s for s in retrieve_facts.TASK.score(prepared, [Prediction(s.id, vectors={"image": space[s.answer], "text": space[s.answer]}) for s in prepared])}
    assert scores["image to text recall@1"].value == scores["text to image recall@1"].value == 1 and scores["image to text recall@1"].chance == 0.5


@pytest.mark.shared
@pytest.mark.parametrize("name", ["xray_covid", "vqa_rad", "path_bccd", "path_dsb_nuclei", "fundus_chase", "vol_totalseg"])
def test_every_image_set_gets_captions_and_no_note_is_one(data, name):
    rows = list(manifest.rows(data / name, "val"))
    samples = [s for row in rows for s in manifest.row_samples(row)]
    made = retrieve_facts.prepare(lambda split: samples, "val")
    notes = {row["text"] for row in rows if row.get("text")}
    assert len(made) == len(rows) * (6 if name.startswith("vol") else 1) and not notes & {s.answer for s in made}
    assert len({s.id for s in made}) == len(made) and all(s.verb == "embed" and not s.question for s in made)


def test_sets_that_name_their_rows_alike_are_told_apart():
    both = [sample(picture("mr"), row="mr-1", dataset=name) for name in ("a", "b")]
    (one, other), (alone,) = (retrieve_facts.prepare(lambda split, held=held: held, "val") for held in (both, both[:1]))
    assert (one.id, other.id) == (f"a/{alone.id}", f"b/{alone.id}")
