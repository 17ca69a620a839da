"""Volumes read slice by slice by a model of single pictures; what heads answer; reports of other kinds of picture."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from medvlm.datasets.slices import sliced
from medvlm.errors import MedVLMError
from medvlm.heads.mask import Prompts
from medvlm.imaging.scan import Study, Volume, turned
from medvlm.predictors import survey
from medvlm.predictors.native import NativeModel, _outlining
from medvlm.preprocess import inputs, tiles, to_tensor
from medvlm.sample import Region, Sample, Segmentation
from medvlm.vlm import MedVLM

ABOUT = {"slices": 3, "reads": ["xray", "ct"], "outlined": {"xray": list(tiny.TARGETS), "ct": ["right lung", "left lung"]}}


@pytest.fixture(scope="module")
def model():
    tokenizer = tiny.tokenizer()
    config = tiny.config(tokenizer, **ABOUT)
    config.parts["heads"]["mask"]["args"]["ladder"] = 4
    torch.manual_seed(0)
    made = MedVLM(config).eval()
    with torch.no_grad():
        made.heads["mask"].dense.weight.mul_(30)  # else random weights draw all or nothing
        maps = made.heads["mask"].outlines(made.encode({"picture": torch.rand(4, 1, 64, 64)})["picture"])
        made.heads["mask"].dense.bias -= maps.mean((0, 2, 3))
        made.heads["mask"].presence[-1].bias += 20
    return NativeModel(made, tokenizer)


def scan(stored="SPL", seed=0):
    voxels = np.random.default_rng(seed).integers(-800, 400, (1, 11, 40, 48)).astype(np.int16)
    affine = np.array([[0, 0, 1.0, 0], [0, 1.0, 0, 0], [4.0, 0, 0, 0], [0, 0, 0, 1]])
    return Volume("ct-1", voxels, affine, "ct", "HU", {"windows": [(40, 400, "")], "warnings": []}).reorient(stored)


def slices(volume, count):
    return [next(iter(one[0].images.values())) for one in sliced([Sample("v", images={volume.id: volume})], count)]


def test_a_volume_is_outlined_as_its_slices_are(model):
    volume = scan()
    found = model.segment(Study("s", None, (volume,)), "right lung")
    alone = np.stack([model.segment(Study("s", None, (one,)), "right lung").mask for one in slices(volume, 11)])
    assert found.mask.shape == (11, 40, 48) and 0.05 < found.mask.mean() < 0.95
    assert (found.mask == alone).mean() > 0.999  # another batch size, another rounding


@pytest.mark.parametrize("stored", ["LAS", "IRP", "PIR"])
def test_however_it_is_stored_the_outline_lies_at_the_same_place(model, stored):
    kept = model.segment(Study("s", None, (scan(),)), "left lung").mask
    other = model.segment(Study("s", None, (scan(stored),)), "left lung").mask
    assert np.array_equal(turned(other, stored, "SPL"), kept)


def test_what_no_picture_of_its_kind_shows_is_absent_however_sure_the_decoder_is(model):
    elsewhere = next(t for t in tiny.TARGETS if t not in ABOUT["outlined"]["ct"])
    found = model.segment(Study("s", None, (scan(),)), elsewhere)
    assert found.present == 0 and not found.mask.any()
    assert model.segment(Study("s", None, (scan(),)), "left lung").present > 0.5


def test_islands_are_no_part_of_what_is_of_one_piece(model, monkeypatch):
    mask = np.zeros((20, 30), bool)
    mask[2:12, 2:12], mask[2:8, 20:26], mask[15:18, 3:6] = True, True, True  # 100, 36 and 9 pixels
    settled = lambda mask: model._settled(Segmentation(tiny.picture(), "left lung", mask, 0.9)).mask  # noqa: E731
    assert np.array_equal(settled(mask), mask)  # unless the model says so
    monkeypatch.setitem(model.vlm.config.about, "whole", ["left lung"])
    assert settled(mask).sum() == 136 and not settled(mask)[15:18].any() and not settled(mask & False).any()


def test_parts_outside_what_it_lies_within_are_no_part_of_it(model):
    lung, body = np.zeros((2, 20, 30), bool)
    lung[2:12, 2:12], lung[2:12, 20:30], body[:, :9] = True, True, True  # 100 pixels of which 70 are in the body, and 100 beside it
    both, inside = Segmentation(tiny.picture(), "left lung", lung, 0.9), Segmentation(tiny.picture(), "body", body, 1.0)
    found = model._settled(both, inside)
    assert found.present == pytest.approx(0.45) and not found.mask.any()
    lung[7:12, 20:30] = False
    found = model._settled(both, inside)
    assert found.present == pytest.approx(0.6) and np.array_equal(found.mask[:, :15], lung[:, :15]) and not found.mask[:, 15:].any()
    assert np.array_equal(model._settled(both, replace(inside, mask=~body & False)).mask, lung)  # nothing was drawn that it could lie within


def test_lungs_are_asked_to_lie_within_the_body(model, monkeypatch):
    monkeypatch.setitem(model.vlm.config.about, "within", {"ct": {"right lung": "left lung"}})
    seen = []
    monkeypatch.setattr(NativeModel, "_settled", lambda self, one, around=None: (seen.append((one.label, around and around.label)), one)[1])
    model.segment(Study("s", None, (scan(),)), "lungs")
    model.segment(tiny.picture(), "right lung")  # an X-ray shows no body apart
    assert seen == [("right lung", "left lung"), ("left lung", None), ("right lung", None)]


def test_what_is_in_no_slice_is_absent(model):
    with torch.no_grad():
        model.vlm.heads["mask"].shift.fill_(-100)
        found = model.segment(Study("s", None, (scan(),)), "lungs")
        model.vlm.heads["mask"].shift.fill_(0)
    assert found.present < 0.5 and not found.mask.any()


def test_questions_about_a_volume_are_asked_of_its_slices(model):
    volume = scan()
    answer = model.ask(Study("s", None, (volume,)), "Is there a fracture?")
    each = [model.ask(Study("s", None, (one,)), "Is there a fracture?").choices["yes"] for one in slices(volume, 3)]
    assert answer.choices["yes"] == pytest.approx(np.mean(each), abs=1e-5) and answer.probability == max(answer.choices.values())


def test_the_heads_answer_what_they_know(model):
    volume, one = scan(), tiny.picture()
    chances = model._chances(one)
    kind = model.ask(Study("s", None, (one,)), "Is this a CT scan?")
    assert kind.choices["yes"] == pytest.approx(chances["modality:ct"]) and kind.text == ("yes" if chances["modality:ct"] >= 0.5 else "no")
    assert model.ask(Study("s", None, (one,)), "Is there cardiomegaly?").choices["yes"] == pytest.approx(chances["cardiomegaly"])
    present = max(model.presence(x, ["right lung"])[0] for x in slices(volume, 6))
    assert model.ask(Study("s", None, (volume,)), "Is the right lung seen?").choices["yes"] == pytest.approx(present, abs=1e-5)
    mean = np.mean([model._chances(x)["modality:ct"] for x in slices(volume, 3)])
    assert model.classify(Study("s", None, (volume,)), ["modality:ct"])["modality:ct"] == pytest.approx(mean, abs=1e-5)


@pytest.fixture
def closely(model):
    """X-rays looked at twice as closely."""
    before = model.vlm.config.about
    model.vlm.config.about = {**before, "zoom": {"xray": 2.0}}
    yield model
    model.vlm.config.about = before


def test_what_is_in_a_window_is_in_the_picture(closely):
    picture = tiny.picture(size=(64, 80))
    spec = closely.vlm.encoders["picture"].spec
    head, (state,) = closely.vlm.heads["mask"], closely._prompts_of({picture.id: picture}, _outlining(["left lung"]), ["left lung"])[0].tokens
    at = Prompts(torch.zeros(1, dtype=torch.long), tokens=state[None], named=torch.tensor([head.labels.index("left lung")]))
    seen = [to_tensor(picture, spec)[0], *inputs(picture, spec, tiles(picture, spec, 2.0).frames)]
    with torch.no_grad():
        each = [float(head(closely.vlm.encode({"picture": x[None]})["picture"], at).present) for x in seen]
        assert len(each) >= 5 and max(each) > each[0] and head.shift == 0
        head.shift.fill_(-(each[0] + max(each)) / 2)  # the whole says no, a window yes
        found = closely.segment(Study("s", None, (picture,)), "left lung")
        head.shift.fill_(0)
    assert found.present == pytest.approx(1 / (1 + np.exp((each[0] - max(each)) / 2)), abs=1e-4) and found.present > 0.5


@pytest.mark.parametrize("zoom", [2.0, 1.0])
def test_where_there_are_no_sides_a_mirrored_picture_gives_the_mirrored_outline(closely, zoom):
    picture = tiny.picture(size=(64, 64))
    closely.vlm.config.about["zoom"] = {"xray": zoom}
    mirrored = picture.with_pixels(np.ascontiguousarray(picture.pixels[..., ::-1]))
    outline = lambda one: closely.segment(Study("s", None, (one,)), "left lung").mask  # noqa: E731
    assert (outline(picture)[:, ::-1] != outline(mirrored)).mean() > 0.05
    closely.vlm.config.about["unsided"] = ["xray"]
    again, other = (picture.with_pixels(picture.pixels), mirrored.with_pixels(mirrored.pixels))
    assert (outline(again)[:, ::-1] != outline(other)).mean() < 0.002


def test_sizes_and_places_are_told_by_outlines(model):
    picture = tiny.picture(size=(64, 64))
    found = model.segment(picture, "right lung")
    size = model.ask(Study("s", None, (picture,)), "How large is the right lung?")
    assert size.text == f"{found.mask.sum() * 0.25:.0f} mm2" and size.probability == pytest.approx(found.present) and size.regions[0].label == "right lung"
    drawn = model.segment(picture, "consolidation").mask
    lungs = [model.segment(picture, f"{side} lung").mask for side in ("right", "left")]
    held = [(drawn & lung).sum() for lung in lungs]
    told = model.ask(Study("s", None, (picture,)), "Is the consolidation in the left lung?")
    assert min(held) > 0 and told.choices["yes"] == pytest.approx(model.presence(picture, ["consolidation"])[0] * held[1] / sum(held), abs=1e-5)


def test_a_mirrored_film_has_no_sides_of_its_own(model, monkeypatch):
    monkeypatch.setattr(NativeModel, "_chances", lambda *_: {"view:PA": 0.3, "view:AP": 0.7})
    one, other = np.zeros((2, 10, 20), bool)
    one[2:8, 2:8], other[2:8, 12:18] = True, True
    view = lambda **lungs: model._view(tiny.picture(), {f"{side} lung": mask for side, mask in lungs.items()})  # noqa: E731
    assert view(right=one, left=other) == "AP" and view(right=other, left=one) is None and view(right=one) is None and view(right=one, left=other & False) is None


def test_points_are_set_on_pictures(model):
    with pytest.raises(MedVLMError) as error:
        model.segment(Study("s", None, (scan(),)), points=((3, 10, 10),))
    assert error.value.code == "UNSUPPORTED_VERB"


def test_a_report_rests_on_what_was_outlined_and_measured():
    volume = scan()
    mask = np.zeros(volume.shape[1:], bool)
    mask[2:7, 5:15, 10:30] = True
    drawn = [Segmentation(volume, "liver", mask, 0.97), Segmentation(volume, "left kidney", ~mask & False, 0.1), Segmentation(volume, "spleen", ~mask & False, 0.2)]
    report = survey.report(volume, "ct", {"part:abdomen": 0.9, "part:head": 0.1, "plane:axial": 1.0}, drawn)
    assert [s.text for s in report.sentences] == ["A CT scan of the abdomen.", "The liver is seen (4 mL).", "No left kidney or spleen is seen."]
    assert [[report.looked_for[k].label for k in s.findings] for s in report.sentences] == [["abdomen"], ["liver"], ["left kidney", "spleen"]]
    liver = report.looked_for[1]
    assert (liver.present, liver.probability, liver.measurements[0].value, liver.measurements[0].unit) == (True, 0.97, pytest.approx(5 * 10 * 20 * 4 / 1000), "mL")


def test_cells_are_counted_and_a_photograph_tells_the_side():
    smear = tiny.picture("slide-1", modality="pathology")
    cells = [Region("slide-1", label, ((0, 0), (5, 5)), None, p) for label, p in (("RBC", 0.9), ("RBC", 0.6), ("RBC", 0.2), ("WBC", 0.1))]
    report = survey.report(smear, "pathology", {}, [], cells)
    assert [s.text for s in report.sentences] == ["2 RBC are seen."] and report.looked_for[0].measurements[0].value == 2 and len(report.sentences[0].regions) == 2
    eye = survey.report(tiny.picture("eye-1", modality="fundus"), "fundus", {"eye:left": 0.8, "eye:right": 0.2}, [])
    assert [s.text for s in eye.sentences] == ["A fundus photograph of the left eye."] and eye.looked_for[0].label == "left eye"
