"""Outlines without words: the ladder's maps, their objective, what a batch holds for it, windows and slices as pictures."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from medvlm.datasets import facts
from medvlm.datasets.slices import sliced
from medvlm.datasets.windows import windowed
from medvlm.encoders.base import Features
from medvlm.errors import MedVLMError
from medvlm.heads.mask import Prompts, build
from medvlm.imaging.scan import Image, Volume
from medvlm.language import Batch
from medvlm.recipes.base import Stage
from medvlm.sample import SEG, Mask, Sample, Turn
from medvlm.train import objectives
from medvlm.train.augment import laid
from medvlm.train.batches import Batches, Cases, Room
from medvlm.train.data import draw, prepare
from medvlm.train.loop import _Losses, _refuse_halved, _Stage
from medvlm.vlm import MedVLM, Output

DIMS, STRIDES = (4, 6, 8), (2, 4, 8)


def head(**given):
    torch.manual_seed(0)
    return build(DIMS, STRIDES, 12, (32, 48), dim=16, heads=2, labels=("a", "b"), **{"ladder": 4, **given}).eval()


def levels(count=2):
    torch.manual_seed(1)
    return Features(torch.zeros(count, 1, 1), (1,), torch.zeros(count, 1), tuple(torch.randn(count, d, 32 // s, 48 // s) for d, s in zip(DIMS, STRIDES)))


def laddered(tokenizer):
    config = tiny.config(tokenizer)
    config.parts["heads"]["mask"]["args"]["ladder"] = 4
    torch.manual_seed(0)
    return MedVLM(config).eval()


@torch.no_grad()
def test_a_label_known_by_name_is_drawn_from_the_ladder_alone():
    one, features = head(), levels()
    maps = one.outlines(features)
    assert maps.shape == (2, 2, 16, 24)
    prompts = Prompts(torch.tensor([1, 0, 1]), tokens=torch.randn(3, 2, 12), named=torch.tensor([0, -1, 1]))
    before = one(features, prompts)
    assert torch.equal(before.logits[0], maps[1, 0]) and torch.equal(before.logits[2], maps[1, 1])
    one.decoder.output_hypernetworks_mlps[0].layers[-1].bias.add_(1)
    after = one(features, prompts)
    assert torch.equal(after.logits[[0, 2]], before.logits[[0, 2]]) and not torch.allclose(after.logits[1], before.logits[1])
    assert torch.equal(after.present, before.present)
    few = one(features, replace(prompts, draw=torch.tensor([False, True, True])))
    torch.testing.assert_close(few.logits, after.logits[1:])


def test_the_ladder_sees_every_level():
    one, features = head(), levels(1)
    for level in features.levels:
        level.requires_grad_(True)
    one.outlines(features)[0, 0, 8, 12].backward()
    assert all(level.grad.abs().sum() > 0 for level in features.levels)


@torch.no_grad()
def test_a_cell_of_the_ladder_tells_its_own_pixels():
    """Channel 4 n + 2 i + j of a cell is row i and column j of label n in it."""
    one, features = head(shuffle=2), levels()
    maps, cells = one.outlines(features), one.dense(one.ladder(features))
    assert cells.shape == (2, 8, 16, 24) and maps.shape == (2, 2, 32, 48)
    for n, i, j in ((0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)):
        assert torch.equal(maps[:, n, i::2, j::2], cells[:, 4 * n + 2 * i + j])
    drawn = one(features, Prompts(torch.tensor([1, 0]), tokens=torch.randn(2, 2, 12), named=torch.tensor([0, -1])))
    assert drawn.logits.shape == (2, 32, 48) and torch.equal(drawn.logits[0], maps[1, 0]) and torch.equal(one.maps(one.embed(features)), maps)


@torch.no_grad()
@pytest.mark.parametrize("given", [{}, {"shuffle": 2}, {"ladder": 0}])
def test_some_maps_alone_are_those_of_all(given):
    one, features = head(**given), levels(3)
    image, label = torch.tensor([2, 0, 2, 0]), torch.tensor([1, 0, 0, 0])
    torch.testing.assert_close(one.outlined(features, image, label), one.outlines(features)[image, label])
    assert not len(one.outlined(features, image[:0], label[:0]))


@pytest.mark.parametrize("given", [{"refine": 4}, {"labels": ()}, {"ladder": 0, "shuffle": 2}, {"shuffle": 4}, {"shuffle": 0}, {"level_strides": (4, 8, 16), "shuffle": 3}])
def test_a_head_has_a_ladder_or_a_refiner_and_names_for_it(given):
    with pytest.raises(MedVLMError) as error:
        build(**{"level_dims": DIMS, "level_strides": STRIDES, "lm_dim": 12, "size": (32, 48), "dim": 16, "heads": 2, "labels": ("a",), "ladder": 4, **given})
    assert error.value.code == "BAD_RECIPE"


def test_pictures_weigh_the_same_however_much_is_outlined_and_absent_maps_are_pushed_down():
    model = laddered(tiny.tokenizer())
    torch.manual_seed(2)
    out = Output(features=model.encode({"picture": torch.rand(2, 1, 64, 64)}))
    masks = (torch.rand(3, 64, 64) > 0.6).to(torch.uint8) * 255
    told = {"mask": masks, "weak": torch.tensor([False, True, False]), "image": torch.tensor([0, 0, 1]), "label": torch.tensor([0, 2, 1]), "none": torch.tensor([[1, 3], [0, 1]])}
    batch = Batch(*(torch.zeros(0, 0, dtype=torch.long) for _ in range(3)), {}, targets={"outline": told, "labels": torch.zeros(2, 1)})
    losses = objectives.outline(model, batch, out, absent=0.25)
    maps = model.heads["mask"].outlines(out.features["picture"])
    alone = [objectives.mask_loss(maps[i, n][None], None, m[None] / 255.0, w[None]) for i, n, m, w in zip(told["image"], told["label"], masks, told["weak"])]
    assert losses["outline"].item() == pytest.approx(((alone[0] + alone[1]) / 4 + alone[2] / 2).item(), abs=1e-6)
    assert losses["empty"].item() == pytest.approx(0.25 * F.softplus(torch.stack([maps[1, 3], maps[0, 1]])).mean().item(), abs=1e-6)
    sum(losses.values()).backward()
    assert model.heads["mask"].ladder.foot.weight.grad.abs().sum() > 0


def test_a_batch_holds_every_outline_whatever_is_asked():
    tokenizer = tiny.tokenizer()
    model, picture = laddered(tokenizer), tiny.picture(size=(64, 64))
    lung, none = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    lung[10:40, 5:30] = True
    ask = (Turn("user", "Segment it."), Turn("assistant", SEG))
    samples = [Sample(f"s{k}", images={picture.id: picture}, turns=ask, masks=(Mask(picture.id, name, array),), meta={"row": "r", "kind": "segment"})
               for k, (name, array) in enumerate((("right lung", lung), ("left lung", none), ("something else", lung)))]  # fmt: skip
    (case,) = prepare(model, tokenizer, samples)
    assert case.size == case.pictures[picture.id][0][1].nbytes + 2 * 64 * 64 + 1  # what is absent takes next to no room
    told = draw([case], tokenizer, [np.random.default_rng(0)], turns=0, outlines=True).targets["outline"]
    assert told["label"].tolist() == [0] and told["none"].tolist() == [[0, 1]] and told["image"].tolist() == [0]
    assert np.array_equal(told["mask"][0].numpy() > 127, lung)
    assert "outline" not in draw([case], tokenizer, [np.random.default_rng(0)], turns=1).targets
    moved = draw([case], tokenizer, [np.random.default_rng(3)], turns=0, strength=1.0, outlines=True)
    where = np.argwhere(moved.targets["outline"]["mask"][0].numpy() > 127)
    assert not np.array_equal(where.mean(0), np.argwhere(lung).mean(0)) and abs(where.mean(0) - np.argwhere(lung).mean(0)).max() < 15


def test_a_halved_picture_is_the_mean_of_its_pixels_with_its_outlines_and_boxes():
    tokenizer = tiny.tokenizer()
    model = laddered(tokenizer)
    picture, lung = tiny.picture(size=(64, 64)), np.zeros((64, 64), bool)
    lung[10:40, 5:30] = True
    sample = Sample("s", images={picture.id: picture}, turns=(Turn("user", "Segment it."), Turn("assistant", SEG)), masks=(Mask(picture.id, "right lung", lung),), meta={"row": "r", "kind": "segment"})  # fmt: skip
    (case,) = prepare(model, tokenizer, [sample])
    case.objects = np.array([[[8.0, 4.0], [20.0, 30.0]]]), np.array([0])
    whole, half = (draw([case], tokenizer, [np.random.default_rng(0)], turns=0, outlines=True, halved=h) for h in (False, True))
    (name,) = half.images
    assert half.images[name].shape[2:] == (32, 32) and half.targets["outline"]["mask"].dtype == torch.uint8
    torch.testing.assert_close(half.images[name], F.avg_pool2d(whole.images[name], 2))
    torch.testing.assert_close(half.targets["outline"]["mask"].float(), F.avg_pool2d(whole.targets["outline"]["mask"].float(), 2).round())
    assert half.targets["boxes"]["corners"].tolist() == [[[4.0, 2.0], [10.0, 15.0]]]
    case.masks[0] = torch.zeros(64, 64, dtype=torch.uint8)
    case.masks[0][:, 20] = 200  # a line one pixel wide, half covered once it is halved
    assert draw([case], tokenizer, [np.random.default_rng(0)], turns=0, outlines=True, halved=True).targets["outline"]["label"].tolist() == [0]
    case.pictures[picture.id] = [(name, case.pictures[picture.id][0][1][:, :63])]
    with pytest.raises(MedVLMError, match="63 x 64") as error:
        draw([case], tokenizer, [np.random.default_rng(0)], turns=0, halved=True)
    assert error.value.code == "BAD_RECIPE"


def test_the_first_share_of_the_steps_is_halved():
    tokenizer = tiny.tokenizer()
    model, picture = laddered(tokenizer), tiny.picture(size=(64, 64))
    group = [Sample("s", images={picture.id: picture}, turns=(Turn("user", "?"), Turn("assistant", "yes")), meta={"row": "r"})]
    stage = Stage("see", "classify", ("*",), {"set": 1.0}, lr=1e-3, steps=4, batch=1, turns=0, augment=0.0, halved=0.5)
    source = Cases("set", [group], lambda g: prepare(model, tokenizer, g), Room(1 << 20))
    sides = [next(iter(parts[0].images.values())).shape[-1] for parts in Batches(stage, (0, 0), {"set": source}, tokenizer, 0)]
    assert sides == [32, 32, 64, 64]
    _refuse_halved(model, [stage])
    with pytest.raises(MedVLMError, match="image tokens"):
        _refuse_halved(model, [replace(stage, turns=1)])
    with pytest.raises(MedVLMError, match="halved is 2"):
        replace(stage, halved=2)
    model.encoders["picture"].spec = replace(model.encoders["picture"].spec, size=(64, 96))
    with pytest.raises(MedVLMError, match="encoder picture cannot see halved pictures") as error:
        _refuse_halved(model, [stage])
    assert error.value.code == "BAD_RECIPE"


def photograph(size=(100, 130)):
    pixels = np.random.default_rng(0).integers(0, 255, (3, *size), dtype=np.uint8)
    image = Image("fundus-1", pixels, None, "fundus", "uint8", {})
    mask = pixels[0] > 128
    base = Sample("eye", "p1", {image.id: image}, meta={"row": "eye", "split": "train"})
    return [replace(base, masks=(Mask(image.id, "vessel", mask),)), replace(base, turns=(Turn("user", "Whose eye?"), Turn("assistant", "right")))]


def test_windows_cover_the_picture_with_its_masks():
    group = photograph()
    whole, seen = group[0].images["fundus-1"].pixels, np.zeros((100, 130), int)
    for one in windowed(group, 40, 0.5):
        base, outlined = one
        (image,) = base.images.values()
        top, left = map(int, base.meta["row"].partition("@")[2].split(","))
        assert np.array_equal(image.pixels, whole[:, top : top + 40, left : left + 40]) and np.array_equal(outlined.masks[0].array, image.pixels[0] > 128)
        seen[top : top + 40, left : left + 40] += 1
        assert base.turns == () and base.patient == "p1"
    assert seen.min() >= 1 and seen[50, 65] >= 4


@pytest.mark.parametrize(("size", "ways"), [((4, 4), 8), ((3, 4), 4)])
def test_a_square_can_be_laid_in_eight_ways_and_a_strip_in_four(size, ways):
    array = np.arange(2 * size[0] * size[1]).reshape(2, *size)
    found = [laid(array, way) for way in range(8)]
    assert all(f.shape == array.shape for f in found) and len({f.tobytes() for f in found}) == ways
    assert np.array_equal(found[0], array) and np.array_equal(found[4], array[..., ::-1])
    assert all(np.array_equal(f[1], laid(array[1], way)) for way, f in enumerate(found))


@pytest.mark.parametrize("unsided", [True, False])
def test_what_nobody_names_a_side_of_is_laid_any_way_with_its_outlines(unsided):
    """In the lower left quarter of the picture alone there is something bright, and it is what is outlined."""
    tokenizer = tiny.tokenizer()
    model, lung = laddered(tokenizer), np.zeros((64, 64), bool)
    lung[38:58, 6:26] = True
    picture = Image("xray-1", np.where(lung, 200, 20).astype(np.uint8)[None], None, "xray", "uint8", {})
    meta = {"row": "r", "kind": "segment"} | ({"unsided": True} if unsided else {})
    (case,) = prepare(model, tokenizer, [Sample("s", images={picture.id: picture}, turns=(Turn("user", "Segment it."), Turn("assistant", SEG)),
                                                masks=(Mask(picture.id, "right lung", lung),), meta=meta)])  # fmt: skip
    corners = set()
    for seed in range(40):
        batch = draw([case], tokenizer, [np.random.default_rng(seed)], turns=0, strength=0.1, outlines=True)
        (shown,) = next(iter(batch.images.values()))
        mask = batch.targets["outline"]["mask"][0] > 127
        assert shown[:, mask].mean() > 2 * shown[:, ~mask].mean()
        corners.add(tuple((mask.nonzero().float().mean(0) > 32).tolist()))
    assert len(corners) == (4 if unsided else 1)
    still = draw([case], tokenizer, [np.random.default_rng(1)], turns=0, outlines=True)
    assert np.array_equal(still.targets["outline"]["mask"][0].numpy() > 127, lung)


def test_a_small_picture_is_one_window():
    (one,) = windowed(photograph((30, 20)), 40)
    assert next(iter(one[0].images.values())).shape == (3, 30, 20)


@pytest.mark.parametrize(("plane", "seen"), [("axial", (7, 8)), ("coronal", (6, 8)), ("sagittal", (6, 7))])
@pytest.mark.parametrize("stored", ["SPL", "LAS", "IRP"])
def test_slices_are_shown_as_a_radiologist_reads_them(plane, seen, stored):
    """Head or front up and the patient's right on the left, however the volume is stored; the plane is told from the slice's place."""
    voxels = np.arange(6 * 7 * 8, dtype=np.int16).reshape(1, 6, 7, 8)
    affine = np.array([[0, 0, 1, 0], [0, 2, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
    volume = Volume("ct-1", voxels, affine, "ct", "HU").reorient(stored)
    (one,) = sliced([Sample("v", images={"ct-1": volume}, meta={"row": "v"})], 1, plane)
    (image,) = one[0].images.values()
    expected = {"axial": voxels[0, 3], "coronal": voxels[0, ::-1, 3], "sagittal": voxels[0, ::-1, :, 4]}[plane]
    assert image.shape[1:] == seen and np.array_equal(image.pixels[0], expected)
    assert facts.plane(facts.case_of(one)) == plane


def test_the_same_words_are_encoded_once_and_as_ever():
    """Conversations that differ in their pictures alone share their tokens; another image name, mask or text does not."""
    from medvlm.language import encode
    from medvlm.train import data

    tokenizer = tiny.tokenizer()
    ask = lambda text, answer="yes": (Turn("user", text), Turn("assistant", answer))  # noqa: E731
    mask = lambda name: (Mask(name, "x", np.ones((2, 2), bool)),)  # noqa: E731
    samples = [Sample("a", turns=ask("Is it?")), Sample("b", turns=ask("Is it?")), Sample("c", turns=ask("Is it?", "no")), Sample("d", turns=ask("Is it?"), masks=mask("i"))]
    data._same_words.cache_clear()
    found = [data._encoded(tokenizer, s, {"i": 2}, 2048) for s in samples] + [data._encoded(tokenizer, samples[0], {"i": 3}, 2048)]
    assert found[0] is found[1] and data._same_words.cache_info().misses == 4
    assert found == [encode(tokenizer, s, {"i": n}) for s, n in (*((s, 2) for s in samples), (samples[0], 3))]
    with pytest.raises(MedVLMError, match="sample e "):
        data._encoded(tokenizer, Sample("e", turns=ask("<|image:missing|> Is it?")), {"i": 2}, 2048)


def test_parts_of_a_step_weigh_what_they_hold(tmp_path):
    """Gradients of three cases at once are those of the cases one by one, though they hold one, three and no outlines."""
    tokenizer = tiny.tokenizer()
    model = laddered(tokenizer)
    found = objectives.find("outline+classify+mask+lm")
    ask, cases = (Turn("user", "Segment it."), Turn("assistant", SEG)), []
    for n, targets in enumerate((("right lung",), ("right lung", "left lung", "consolidation"), ())):
        picture, masks = tiny.picture(size=(64, 64), seed=n), []
        for k, name in enumerate(targets):
            array = np.zeros((64, 64), bool)
            array[8 * k + 4 : 40, 10 * n + 5 : 50] = True
            masks.append((name, array))
        base = Sample(f"s{n}", images={picture.id: picture}, labels={"consolidation": float(n % 2)}, meta={"row": f"r{n}", "kind": "segment"})
        samples = [replace(base, id=f"s{n}/{name}", turns=ask, masks=(Mask(picture.id, name, array),)) for name, array in masks]
        cases += prepare(model, tokenizer, samples or [replace(base, turns=(Turn("user", "Is it a film?"), Turn("assistant", "yes")), meta={"row": f"r{n}", "kind": "asked"})])
    whole = lambda some: draw(some, tokenizer, [np.random.default_rng(int(c.source[1:])) for c in some], turns=4, outlines=True)  # noqa: E731

    def gradients(parts):
        model.zero_grad()
        stage = _Stage.__new__(_Stage)
        stage.model, stage.found, stage.sharded, stage.between = model, found, False, None
        stage.accelerator, stage.module = Accelerator(cpu=True), _Losses(model, found).eval()
        stage.stage = Stage("x", "lm", ("*",), {"x": 1.0}, lr=1.0, steps=1, weights={"prompted": 0.0})
        logged = stage.backward(parts)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, logged

    (one, told), (apart, said) = gradients([whole(cases)]), gradients([whole([c]) for c in cases])
    assert {k: v for k, v in told.items() if k != "prompted"} == pytest.approx({k: v for k, v in said.items() if k != "prompted"}, abs=1e-5) and {"outline", "present", "lm"} <= told.keys()
    assert one.keys() == apart.keys() and max(float((one[k] - apart[k]).abs().max()) for k in one) < 1e-4 * max(float(g.abs().max()) for g in one.values())


def test_what_is_thinner_than_a_pixel_of_the_input_is_still_there():
    tokenizer = tiny.tokenizer()
    model, line = laddered(tokenizer), np.zeros((512, 512), bool)
    line[:, 250:253] = True  # 3 of the 8 pixels that become one
    picture = Image("xray-1", np.full((1, 512, 512), 90, np.uint8), None, "xray", "uint8", {})
    (case,) = prepare(model, tokenizer, [Sample("s", images={picture.id: picture}, turns=(Turn("user", "Segment it."), Turn("assistant", SEG)),
                                                masks=(Mask(picture.id, "right lung", line),), meta={"row": "r", "kind": "segment"})])  # fmt: skip
    batch = draw([case], tokenizer, [np.random.default_rng(0)], turns=1, outlines=True)
    assert int(case.masks[0].max()) < 128 and batch.targets["outline"]["label"].tolist() == [0] and batch.targets["present"].tolist() == [1.0]
