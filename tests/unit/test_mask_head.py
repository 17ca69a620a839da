"""The mask head in two and three dimensions: one slice is a picture, prompts move masks, mirrors, thin structures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medvlm.encoders.base import Features
from medvlm.errors import MedVLMError
from medvlm.heads import mask as heads
from medvlm.heads.mask import Embedding, Prompts, build
from medvlm.imaging.scan import Image
from medvlm.preprocess import InputSpec, frame
from medvlm.train.objectives import dice_loss, mask_loss, point_prompts

DIM = 16


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def made(size, stride, seed=0, **given):
    torch.manual_seed(seed)
    stride = heads.each(stride, len(size))
    return build((6, 8), (tuple(max(1, k // 4) for k in stride), stride), 12, size, dim=DIM, stride=stride, heads=2, **given).eval()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels(head, size, count=1, seed=0) -> Features:
    grids = [tuple(n // k for n, k in zip(size, stride)) for stride in head.neck.level_strides]
    return Features(torch.zeros(count, 1, 1), (1,), torch.zeros(count, 1), tuple(random(count, c, *g, seed=seed + i) for i, (c, g) in enumerate(zip((6, 8), grids))))


def as_volume(flat, deep) -> None:
    """The weights of a 2-D head in a 3-D one; its kernels reach one slice, the middle one where they are wider."""
    theirs, ours = flat.state_dict(), deep.state_dict()
    for name, weight in ours.items():
        if name.endswith("gaussian_matrix"):  # x and y; the middle of the one slice is the origin of z
            weight[:2] = theirs[name]
        elif weight.ndim == 5:
            weight.zero_()
            weight[:, :, weight.shape[2] // 2] = theirs[name]
        else:
            weight.copy_(theirs[name])
    deep.load_state_dict(ours)


@torch.no_grad()
@pytest.mark.parametrize("given", ["points", "boxes", "tokens", "masks", "named", "points and masks"])
def test_one_slice_is_a_picture(given):
    flat = made((32, 48), 8, labels=("a", "b"), refine=4)
    deep = made((1, 32, 48), (1, 8, 8), seed=1, labels=("a", "b"), refine=4)
    torch.nn.init.normal_(flat.refiner.correct[-1].weight)  # a new refiner does nothing
    as_volume(flat, deep)
    features = levels(flat, (32, 48), 2)
    image, points, rough = torch.tensor([1, 0, 1]), torch.rand(3, 2, 2) * 32, random(3, 1, 16, 24)
    marks = torch.tensor([[1, 0], [1, 1], [1, -1]])
    two, three = {}, {}
    if "points" in given:
        two |= {"points": points, "labels": marks}
        three |= {"points": F.pad(points, (1, 0)), "labels": marks}
    if "boxes" in given:  # a box one slice thick has its upper corner beyond the origin of z: without z frequencies
        deep.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix[2] = 0
        corners = torch.tensor([[[2.0, 3], [20, 30]], [[0, 0], [32, 48]], [[5, 9], [8, 12]]])
        two["boxes"], three["boxes"] = corners, torch.cat([torch.tensor([[0.0], [1.0]]).expand(3, 2, 1), corners], -1)
    if "tokens" in given:
        two["tokens"] = three["tokens"] = random(3, 2, 12)
    if "masks" in given:
        two["masks"], three["masks"] = rough, rough[:, :, None]
    if "named" in given:
        two["named"] = three["named"] = torch.tensor([0, -1, 1])
    a = flat(features, Prompts(image, **two))
    b = deep(features._replace(levels=tuple(x[:, :, None] for x in features.levels)), Prompts(image, **three))
    gap = max(float((x - y.reshape(x.shape)).abs().max()) for x, y in zip(a, b))
    print(f"largest difference of one slice to a picture, {given}: {gap:.2g}")
    assert gap < 1e-5 and np.ptp(a.logits.numpy()) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "stride", "up", "grid"),
    [((8, 32, 32), 8, (4, 4, 4), (4, 16, 16)), ((8, 32, 48), (2, 8, 16), (2, 4, 4), (8, 16, 12)), ((6, 16, 16), (1, 4, 8), (1, 4, 4), (6, 16, 8)), ((32, 64), (8, 16), (4, 4), (16, 16))],
)
def test_strides_may_differ_by_axis(size, stride, up, grid):
    head = made(size, stride, labels=("a",))
    assert head.up == up
    features = levels(head, size, 2)
    drawn = head(features, Prompts(torch.tensor([0, 1, 1]), tokens=random(3, 1, 12), named=torch.tensor([0, -1, 0])))
    assert drawn.logits.shape == (3, *grid) and drawn.present.shape == drawn.quality.shape == (3,)
    twice = tuple(2 * n for n in size)  # and an input of another size
    assert head(levels(head, twice), Prompts(torch.tensor([0]), tokens=random(1, 1, 12))).logits.shape == (1, *(2 * n for n in grid))


@torch.no_grad()
def test_a_level_may_be_coarser_along_one_axis_and_finer_along_the_others():
    neck = heads.Pyramid((1,), ((4, 2, 2),), 1, (2, 4, 2), 3)
    neck.mix = torch.nn.Identity()
    torch.nn.init.ones_(neck.lateral[0].weight)
    torch.nn.init.zeros_(neck.lateral[0].bias)
    level = random(1, 1, 2, 4, 3)
    total = neck(Features(None, (1,), None, (level,)))
    first, last = level[0, 0].unflatten(1, (2, 2)).mean(2)
    assert total.shape == (1, 1, 4, 2, 3)
    torch.testing.assert_close(total[0, 0], torch.stack([first, 0.75 * first + 0.25 * last, 0.25 * first + 0.75 * last, last]))


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (8, 16, 16)])
def test_prompts_move_masks_and_do_not_touch_each_other(size):
    rank, stride = len(size), (4,) * len(size)
    head = made(size, stride)
    embedding = head.embed(levels(head, size, 2))
    low, high = torch.zeros(rank), torch.tensor(size).float()
    points = torch.stack([low, high - 1, high / 2])[:, None]
    boxes = torch.stack([torch.stack([low, high / 2]), torch.stack([high / 2, high]), torch.stack([low, high])])
    rough = head.scribble((torch.arange(size[-1]) < size[-1] // 2).expand(3, *size).float() * torch.tensor([1.0, 0, 1]).reshape(3, *[1] * rank))
    for given in ({"points": points, "labels": torch.tensor([[1], [1], [0]])}, {"boxes": boxes}, {"tokens": random(3, 2, 12)}, {"masks": rough, "tokens": random(3, 1, 12)}):
        image = torch.tensor([0, 0, 1])
        together = head.decode(embedding, Prompts(image, **given))
        assert (together.logits[0] - together.logits[1]).abs().max() > 1e-3
        for p in range(3):
            alone = head.decode(embedding, Prompts(image[p : p + 1], **{k: v[p : p + 1] for k, v in given.items()}))
            for x, y in zip(alone, together):
                torch.testing.assert_close(x[0], y[p], rtol=0, atol=1e-5)
    on, off = (head.decode(embedding, Prompts(torch.tensor([0]), points=points[:1], labels=torch.tensor([[k]]))).logits for k in (1, 0))
    assert (on - off).abs().max() > 1e-3


def kernels(head):
    """Weights of convolutions that look along the axes, by name; positions are told apart by their name."""
    return {n: w for n, w in head.state_dict().items() if w.ndim == len(head.up) + 2}


def mirrored(head, axis: int, rank: int) -> None:
    weights = head.state_dict()
    for weight in kernels(head).values():
        weight.copy_(weight.flip(2 + axis))
    weights["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"][rank - 1 - axis] *= -1


@torch.no_grad()
@pytest.mark.parametrize(("size", "axis"), [((32, 48), 0), ((32, 48), 1), ((8, 32, 16), 0), ((8, 32, 16), 1), ((8, 32, 16), 2)])
def test_a_mirrored_head_draws_the_mirrored_mask(size, axis):
    """Only with mirrored weights: see the head's docstring. A box has no mirror, its corners are told apart."""
    rank, stride = len(size), (4, 8, 8)[-len(size) :]
    head = made(size, stride, labels=("a",), refine=4)
    torch.nn.init.normal_(head.refiner.correct[-1].weight)
    features = levels(head, size)
    points = torch.rand(2, 3, rank, generator=torch.Generator().manual_seed(5)) * torch.tensor(size)
    flipped = points.clone()
    flipped[..., axis] = size[axis] - 1 - points[..., axis]
    rest = {"image": torch.tensor([0, 0]), "labels": torch.tensor([[1, 0, -1], [1, 1, 0]]), "tokens": random(2, 1, 12), "named": torch.tensor([0, -1])}
    rough = random(2, 1, *(n // k * u for n, k, u in zip(size, stride, head.up)))
    there = head(features, Prompts(points=points, masks=rough, **rest))
    mirrored_input = features._replace(levels=tuple(x.flip(2 + axis) for x in features.levels))
    given = Prompts(points=flipped, masks=rough.flip(2 + axis), **rest)
    assert (head(mirrored_input, given).logits.flip(1 + axis) - there.logits).abs().max() > 1e-3
    mirrored(head, axis, rank)
    back = head(mirrored_input, given)
    torch.testing.assert_close(back.logits.flip(1 + axis), there.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(back.present, there.present, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_three_axes_are_treated_alike():
    """Depth and width changed places, in the input, the prompts and the weights: so they do in the mask."""
    size, stride = (8, 32, 16), (2, 8, 4)
    head, turned = made(size, stride, refine=4), made(size[::-1], stride[::-1], seed=1, refine=4)
    torch.nn.init.normal_(head.refiner.correct[-1].weight)
    weights = {n: w.transpose(2, 4) if w.ndim == 5 else w for n, w in head.state_dict().items()}
    name = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    turned.load_state_dict(weights | {name: weights[name][[2, 1, 0]]})
    features = levels(head, size)
    given = {"image": torch.tensor([0, 0]), "labels": torch.tensor([[1, 0], [1, -1]]), "tokens": random(2, 1, 12)}
    points, boxes = torch.rand(2, 2, 3) * 8, torch.tensor([[[1.0, 2, 3], [7, 20, 11]], [[0, 8, 4], [4, 32, 16]]])
    there = head(features, Prompts(points=points, boxes=boxes, **given)).logits
    back = turned(features._replace(levels=tuple(x.transpose(2, 4) for x in features.levels)), Prompts(points=points.flip(-1), boxes=boxes.flip(-1), **given)).logits
    torch.testing.assert_close(back.transpose(1, 3), there, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (8, 16, 16)])
def test_every_parameter_learns(size):
    rank, stride = len(size), (4, 8, 8)[-len(size) :]
    head = made(size, stride, labels=("a", "b"), refine=4).train()
    torch.nn.init.normal_(head.refiner.correct[-1].weight)  # else nothing before it learns in the first step
    features = levels(head, size, 2)
    embedding, image = head.embed(features), torch.tensor([0, 1])
    wide = tuple(n // k * u for n, k, u in zip(size, stride, head.up))
    total = head.maps(embedding).square().mean()
    for given in (
        {"points": torch.rand(2, 2, rank) * 8, "labels": torch.tensor([[1, 0], [1, -1]])}, {"boxes": torch.rand(2, 2, rank) * 8},
        {"tokens": random(2, 1, 12), "named": torch.tensor([0, 1])}, {"masks": random(2, 1, *wide)},
    ):  # fmt: skip
        drawn = head.decode(embedding, Prompts(image, **given))
        total = total + drawn.logits.square().mean() + drawn.quality.square().mean() + drawn.present.square().mean()
        sparse, dense = head._prompt(Prompts(image, **given), tuple(embedding.map.shape[2:]))
        several, quality, _ = heads.decode(head.decoder, embedding.map, head._positions(embedding.map), sparse, dense)
        total = total + several.square().mean() + quality.square().mean()  # the masks for when a prompt is ambiguous
    total.backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (8, 32, 32)])
def test_a_scribble_marks_the_cells_it_touches(size):
    head = made(size, 8)
    coverage = torch.zeros(2, *size)
    coverage[(0, *(n // 2 for n in size))] = 0.01  # thinner than a pixel of the input
    rough = head.scribble(coverage)
    assert rough.shape == (2, 1, *(n // 2 for n in size))
    marked = (rough > 0).nonzero().tolist()
    assert marked == [[0, 0, *(n // 4 for n in size)]]
    assert float(rough.max()) == pytest.approx(np.log(999), rel=1e-3) and float(rough.min()) == pytest.approx(-np.log(999), rel=1e-3)


@torch.no_grad()
def test_a_scribble_on_a_large_picture_reaches_the_head():
    drawn = np.zeros((900, 700), bool)
    drawn[np.arange(200, 600), np.arange(200, 600)] = True  # a line one pixel wide
    head = made((64, 64), 8)
    place = frame(Image("a", np.zeros((1, 900, 700), np.uint8)), InputSpec((64, 64)))
    rough = head.scribble(place.mask_to_input(drawn)[None])
    near = place.masks(rough[0], 0.0)[0]
    assert near[drawn].mean() > 0.95 and near.mean() < 0.1
    embedding = head.embed(levels(head, (64, 64)))
    other = head.scribble(place.mask_to_input(drawn[::-1])[None])
    a, b = (head.decode(embedding, Prompts(torch.tensor([0]), masks=m)).logits for m in (rough, other))
    assert (a - b).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (8, 32, 32)])
def test_a_new_refiner_changes_nothing_but_the_stride(size):
    rank = len(size)
    stride = (8, 16, 16)[-rank:]
    torch.manual_seed(0)
    finest = (2,) * rank
    dims, strides = (4, 8), (finest, stride)
    head = build(dims, strides, 12, size, dim=DIM, stride=stride, heads=2, refine=4).eval()
    plain = build(dims, strides, 12, size, dim=DIM, stride=stride, heads=2).eval()
    missed = plain.load_state_dict({k: v for k, v in head.state_dict().items() if not k.startswith("refiner.")})
    assert not missed.missing_keys and not missed.unexpected_keys
    features = Features(None, (1,), None, tuple(random(2, c, *(n // k for n, k in zip(size, s))) for c, s in zip(dims, strides)))
    keep = torch.tensor([True, False, True])
    given = Prompts(torch.tensor([1, 0, 0]), tokens=random(3, 1, 12), draw=keep)
    fine, coarse = head(features, given), plain(features, given)
    grid = tuple(n // 2 for n in size)
    assert fine.logits.shape == (2, *grid)
    expected = F.interpolate(coarse.logits[:, None], grid, mode=heads.LINEAR[rank], align_corners=False)[:, 0]
    assert torch.equal(fine.logits, expected) and torch.equal(fine.present, coarse.present)
    torch.nn.init.normal_(head.refiner.correct[-1].weight)
    both = head(features, Prompts(given.image, tokens=given.tokens))
    torch.testing.assert_close(head(features, given).logits, both.logits[keep], rtol=0, atol=1e-5)


def dice(a, b) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_a_refiner_separates_lines_that_the_decoder_cannot():
    """Lines one pixel wide, two to five apart. Whatever logits a decoder of stride 4 gave, even the target's own coverage,
    thresholded anywhere, they run together."""
    torch.manual_seed(0)
    rng, size, count = np.random.default_rng(0), (32, 32), 4
    head = build((1, 2), (1, 16), 12, size, dim=16, stride=16, heads=2, refine=8)
    given = Prompts(torch.arange(count), tokens=random(1, 1, 12).expand(count, 1, 12))

    def batch():
        lines = torch.zeros(count, 1, *size)
        for each in lines:
            each[0, :, np.cumsum(rng.integers(3, 7, 5))] = 1
        noisy = lines + 0.3 * torch.from_numpy(rng.normal(size=lines.shape).astype(np.float32))
        return Features(None, (1,), None, (noisy, F.avg_pool2d(noisy, 16).repeat(1, 2, 1, 1))), lines[:, 0]

    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(40):
        features, lines = batch()
        loss = F.binary_cross_entropy_with_logits(head(features, given).logits, lines)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, lines = batch()
    with torch.no_grad():
        logits = head(features, given).logits
    cover = F.interpolate(F.avg_pool2d(lines[:, None], 4), size, mode="bilinear", align_corners=False)[:, 0]
    found, best = dice(logits > 0, lines > 0.5), max(dice(cover > t, lines > 0.5) for t in np.linspace(0, 0.9, 40))
    print(f"Dice with the refiner {found:.3f}, of the best stride-4 map {best:.3f}")
    assert logits.shape == lines.shape and found > 0.95 and best < 0.6


def test_a_volume_head_learns_to_outline_a_ball():
    """By the objective's own loss, from a point in it and by its name."""
    torch.manual_seed(0)
    rng, size, count = np.random.default_rng(0), (8, 16, 16), 4
    head = build((2, 3), ((1, 2, 2), (2, 4, 4)), 12, size, dim=16, stride=(2, 4, 4), heads=2, labels=("ball",))
    axes = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in size), indexing="ij"))
    ones, weak, scores = torch.ones(count, 1, dtype=torch.long), torch.zeros(count, dtype=torch.bool), []
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(40):
        centres = torch.tensor([[rng.uniform(2, 6), rng.uniform(4, 12), rng.uniform(4, 12)] for _ in range(count)]).float()
        target = ((axes - centres.reshape(count, 3, 1, 1, 1)).square().sum(1) < 8).float()
        pooled = F.avg_pool3d(torch.stack([target, torch.rand(count, *size)], 1), (1, 2, 2))
        embedding = head.embed(Features(None, (1,), None, (pooled, F.avg_pool3d(pooled[:, [0, 1, 0]], 2))))
        named = head.decode(embedding, Prompts(torch.arange(count), named=torch.zeros(count, dtype=torch.long), points=point_prompts(target), labels=ones))
        loss = mask_loss(named.logits, named.quality, target, weak) + mask_loss(head.maps(embedding)[:, 0], None, target, weak)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scores.append(dice(named.logits > 0, F.adaptive_avg_pool3d(target, named.logits.shape[1:]) > 0.5))
    print(f"Dice of the first steps {np.mean(scores[:5]):.3f}, of the last {np.mean(scores[-5:]):.3f}")
    assert np.mean(scores[:5]) < 0.2 and np.mean(scores[-5:]) > 0.5


@torch.no_grad()
@pytest.mark.parametrize("weak", [True, False])
def test_the_loss_of_one_slice_is_that_of_a_picture(weak):
    """But for the shadow on the third axis, which is one cell."""
    logits, target = random(3, 8, 8), (random(3, 16, 16, seed=1) > 0).float()
    flat = mask_loss(logits, None, target, torch.tensor([weak] * 3))
    deep = mask_loss(logits[:, None], None, target[:, None], torch.tensor([weak] * 3))
    if weak:
        chance, cells = logits.sigmoid().amax((1, 2))[:, None], F.avg_pool2d(target, 2).amax((1, 2))[:, None]
        flat = flat + 0.5 * dice_loss(chance, cells).mean()
    torch.testing.assert_close(deep, flat)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"size": (60, 64)}, "(60, 64)"),
        ({"size": (4, 64, 64), "level_strides": ((4, 4, 4), (16, 16, 16))}, "(4, 64, 64)"),
        ({"size": (6, 64, 64), "stride": (3, 8, 8), "level_strides": ((3, 8, 8), (6, 16, 16))}, "1, 2 or at least 4"),
        ({"size": (64,)}, "(64,)"),
        ({"level_strides": (3, 16)}, "3"),
        ({"level_strides": (4, 16), "refine": 8}, "refine"),
    ],
)
def test_strides_that_do_not_fit_are_refused(given, says):
    with pytest.raises(MedVLMError) as e:
        build(**{"level_dims": (6, 8), "level_strides": (4, 16), "lm_dim": 12, "size": (64, 64), "dim": DIM, "heads": 2} | given)
    assert e.value.code == "BAD_RECIPE" and says in e.value.message


def test_a_mask_prompt_of_another_grid_is_refused():
    head = made((64, 64), 8)
    with pytest.raises(MedVLMError) as e:
        head.decode(Embedding(random(1, DIM, 8, 8)), Prompts(torch.tensor([0]), masks=torch.zeros(1, 1, 64, 64)))
    assert e.value.code == "GRID_MISMATCH" and "(1, 1, 64, 64)" in e.value.message and "(1, 1, 32, 32)" in e.value.message
