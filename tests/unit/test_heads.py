"""The contrastive and the box head: papers' formulas, the libraries they come from, and what they learn."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

from medvlm import parts, vlm
from medvlm.encoders.base import Features
from medvlm.errors import MedVLMError
from medvlm.heads.box import Boxes
from medvlm.language import Batch, collate, encode
from medvlm.sample import SEG, Sample, Turn
from medvlm.train import objectives
from medvlm.vlm import Output, build_part


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def features(pooled=None, tokens=None, grid=(1,), levels=()):
    pooled = torch.zeros(len(tokens), 1) if pooled is None else pooled
    return Features(pooled[:, None] if tokens is None else tokens, grid, pooled, levels)


class Words(nn.Module):
    """A text encoder: the mean of its words' embeddings."""

    def __init__(self, dim=6):
        super().__init__()
        self.embed = nn.Embedding(11, dim)

    def forward(self, ids, attention):
        tokens = self.embed(ids)
        return features((tokens * attention[..., None]).sum(1) / attention.sum(1, keepdim=True), tokens, ids.shape[1:])


class Model:
    """As much of MedVLM as an objective sees."""

    def __init__(self, states=None, **heads):
        self.heads, self.encoders, self.states = heads, {"text": Words()}, states

    def seg_states(self, batch, out):
        return self.states


def batch(targets, seg=0):
    return Batch(torch.zeros(1, 1), None, None, seg=torch.zeros(seg, 2), seg_image=[("picture", k) for k in range(seg)], targets=targets)


def output(seen):
    return Output(logits=None, hidden=None, features={"picture": seen}, at=None)


def captions(count=5):
    return {"ids": torch.randint(0, 11, (count, 4)), "attention": (torch.arange(4) < torch.randint(1, 5, (count, 1))).long(), "image": torch.arange(count)}


def told(model, given):
    """The captions' features."""
    return model.encoders["text"](given.targets["text"]["ids"], given.targets["text"]["attention"])


def contrast(kind, count=5):
    model = Model(contrast=build_part("heads", "contrast", {"dim": 8, "text_dim": 6, "embed_dim": 7, "kind": kind}))
    return model, batch({"text": captions(count)}), output(features(torch.randn(count, 8)))


def by_hand(kind, model, given, out):
    """CLIP's figure 3 and SigLIP's algorithm 1 in numpy."""
    head, text = model.heads["contrast"], told(model, given)
    one, two = (x.pooled.detach().numpy() @ p.weight.detach().numpy().T for x, p in ((out.features["picture"], head.image_projection), (text, head.text_projection)))
    one, two = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one, two))
    n = len(one)
    if kind == "clip":
        logits = one @ two.T / 0.07
        log_softmax = lambda x: x - np.log(np.exp(x).sum(1, keepdims=True))  # noqa: E731
        return -(np.trace(log_softmax(logits)) + np.trace(log_softmax(logits.T))) / (2 * n)
    logits = one @ two.T * 10 - 10
    return np.log1p(np.exp(-(2 * np.eye(n) - 1) * logits)).sum() / n


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_contrastive_loss_is_the_papers_and_teaches_every_parameter(kind):
    model, given, out = contrast(kind)
    loss = objectives.find(kind)[kind](model, given, out)
    gap = abs(float(loss[kind].detach()) - by_hand(kind, model, given, out))
    print(f"{kind}: gap to the paper's formula {gap:.1e}")
    assert set(loss) == {kind} and gap < 1e-5
    loss[kind].backward()
    parameters = dict(model.heads["contrast"].named_parameters()) | dict(model.encoders["text"].named_parameters())
    assert "logit_scale" in parameters and all(p.grad.abs().sum() > 0 for p in parameters.values())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_logits_are_open_clips(kind):
    import open_clip

    scale, bias = {"clip": (math.log(1 / 0.07), None), "siglip": (math.log(10), -10)}[kind]
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    theirs = open_clip.CLIP(16, vision, text, init_logit_scale=scale, init_logit_bias=bias).eval()
    ours = build_part("heads", "contrast", {"dim": 64, "text_dim": 32, "embed_dim": 16, "kind": kind})
    ours.image_projection.weight.data = theirs.visual.proj.data.T
    ours.text_projection.weight.data = theirs.text_projection.data.T
    pictures, ids = torch.randn(3, 3, 32, 32), torch.randint(1, 64, (4, 8))
    with torch.no_grad():
        want, _ = theirs.get_logits(pictures, ids)
        theirs.visual.proj, theirs.text_projection = None, None  # what they project
        got = ours(features(theirs.encode_image(pictures)), features(theirs.encode_text(ids)))
    print(f"{kind}: gap to open_clip {float((got - want).abs().max()):.1e}")
    assert torch.allclose(got, want, atol=1e-5) and got.shape == (3, 4)


def test_the_scale_of_clip_stops_at_100_and_can_come_back():
    head = build_part("heads", "contrast", {"dim": 4, "text_dim": 4, "kind": "clip"}).train()
    head.logit_scale.data.fill_(7.0)
    scale = head.scale()
    assert float(scale.detach()) == pytest.approx(100, rel=1e-5)
    scale.backward()
    assert head.logit_scale.grad > 0 and float(head.logit_scale.detach()) <= math.log(100) + 1e-6
    free = build_part("heads", "contrast", {"dim": 4, "text_dim": 4, "kind": "siglip"}).train()
    free.logit_scale.data.fill_(7.0)
    assert float(free.scale().detach()) == pytest.approx(math.exp(7), rel=1e-5)


def test_pairs_are_learnt():
    model, given, out = contrast("clip", 8)
    optimizer = torch.optim.Adam([*model.heads["contrast"].parameters(), *model.encoders["text"].parameters()], lr=3e-2)
    for _ in range(40):
        loss = objectives.clip(model, given, out)["clip"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head = model.heads["contrast"]
    with torch.no_grad():
        found = head(out.features["picture"], told(model, given))
    assert found.argmax(1).tolist() == found.argmax(0).tolist() == list(range(8)) and float(loss.detach()) < 0.2


@pytest.mark.parametrize(
    ("part", "args", "says"),
    [
        ("contrast", {"dim": 4, "text_dim": 4, "kind": "clipp"}, "not 'clipp'"),
        ("contrast", {"dim": 4}, "text_dim"),
        ("box", {"dim": 4, "width": 48, "labels": ["cell"]}, "multiple of 32"),
        ("box", {"dim": 4, "rank": 3, "labels": ["cell"]}, "rank 3"),
    ],
)
def test_a_wrong_head_is_refused(part, args, says):
    with pytest.raises(MedVLMError) as e:
        build_part("heads", part, args)
    assert e.value.code == "BAD_RECIPE" and says in e.value.message


def test_only_pictures_with_a_caption_are_pairs_and_a_batch_without_any_is_refused():
    model, given, out = contrast("clip")
    whole = out.features["picture"].pooled
    given.targets["text"] = captions(2) | {"image": torch.tensor([3, 1])}
    two = objectives.clip(model, given, out)["clip"]
    given.targets["text"]["image"] = torch.arange(2)
    assert torch.equal(two, objectives.clip(model, given, output(features(whole[[3, 1]])))["clip"])
    for nothing in (batch({}), given):
        with pytest.raises(MedVLMError) as e:
            objectives.clip(model, nothing, out if nothing is not given else Output(logits=None, hidden=None, features={}, at=None))
        assert e.value.code == "BAD_RECIPE" and "captions" in e.value.message


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 2, 2)


def finder(labels=("cell", "platelet"), stride=4, **more):
    """A box head on levels of stride 2 and 8, and features for pictures of 32 x 24."""
    args = {"dim": 12, "level_dims": [5, 6], "level_strides": [2, 8], "labels": list(labels), "width": 32, "stride": stride, "depth": 1} | more
    seen = features(tokens=torch.randn(2, 12, 12), grid=(4, 3), levels=(torch.randn(2, 5, 16, 12), torch.randn(2, 6, 4, 3)))
    return build_part("heads", "box", args), seen


def test_cells_find_the_box_they_lie_in():
    """A map of 4 x 3 cells of 4 pixels, centres at 2, 6, 10, 14; worked by hand."""
    cells = finder()[0].cells((4, 3))
    assert cells[0].tolist() == [0, 0, 4, 4] and cells[1].tolist() == [0, 4, 4, 8] and cells[3].tolist() == [4, 0, 8, 4]
    grid = lambda *corners: objectives.assign(boxes(*corners), cells).reshape(4, 3).tolist()  # noqa: E731
    none = [-1, -1, -1]
    # rows 1..9 hold the centres 2 and 6, columns 5..11 hold 6 and 10
    assert grid([1, 5, 9, 11]) == [[-1, 0, 0], [-1, 0, 0], none, none]
    # a centre on the edge is not inside
    assert grid([2, 5, 9, 11]) == [none, [-1, 0, 0], none, none]
    # of a tall box only the cells within 6 pixels of its centre (8, 6): rows 6 and 10, not 2 and 14
    assert grid([0, 0, 16, 12]) == [none, [0, 0, 0], [0, 0, 0], none]
    # where two overlap the smaller one is found, whichever comes first
    assert grid([0, 0, 16, 12], [4, 4, 8, 8]) == [none, [0, 1, 0], [0, 0, 0], none]
    assert grid([4, 4, 8, 8], [0, 0, 16, 12]) == [none, [1, 0, 1], [1, 1, 1], none]
    assert grid() == [none] * 4 and grid([3, 3, 5, 5]) == [none] * 4


def perfect(head, truth, labels, grid):
    """The maps that FCOS is taught: distances of each cell to the box it is to find."""
    cells = head.cells(grid)
    owner = objectives.assign(truth, cells)
    logits, distances, centres = torch.full((len(cells), len(head.labels)), -20.0), torch.zeros(len(cells), 4), torch.full((len(cells),), -20.0)
    for i, k in enumerate(owner.tolist()):
        if k >= 0:
            at = (cells[i, :2] + cells[i, 2:]) / 2
            logits[i, labels[k]], d = 5.0, torch.cat([at - truth[k, 0], truth[k, 1] - at])
            distances[i] = d
            near = (d[:2].minimum(d[2:]) / d[:2].maximum(d[2:])).prod().sqrt()
            centres[i] = torch.logit(near, 1e-4)
    lay = lambda x: x.T.reshape(1, -1, *grid)  # noqa: E731
    return Boxes(lay(logits), lay(distances), lay(centres[:, None])[:, 0])


def test_what_was_taught_is_found():
    head, _ = finder()
    truth, labels = boxes([1, 5, 9, 13], [14, 2, 27, 9], [14, 12, 20, 24]), [0, 1, 1]
    (found,) = head.detect(perfect(head, truth, labels, (8, 6)))
    by_place = {(d.label, tuple(round(v, 3) for corner in d.box for v in corner)): d.score for d in found}
    assert set(by_place) == {(label, tuple(box.flatten().tolist())) for label, box in zip(labels, truth)}
    assert [d.score for d in found] == sorted(by_place.values(), reverse=True) and isinstance(found[0].box[0][0], float)
    assert head.detect(perfect(head, boxes(), [], (8, 6))) == [[]]


def test_of_one_label_the_surer_box_is_kept_and_none_leaves_the_picture():
    """Cells 0 and 1 of a 2 x 2 map of 4 pixels say (-1, 0) to (7, 8) and (0, 0) to (7, 8): IoU 7 / 8."""
    head, _ = finder()
    distances = torch.zeros(4, 4)
    distances[0], distances[1] = torch.tensor([3.0, 2, 5, 6]), torch.tensor([2.0, 6, 5, 2])
    lay = lambda x: x.T.reshape(1, -1, 2, 2)  # noqa: E731
    logits = torch.full((4, 2), -20.0)
    logits[0, 1], logits[1, 1] = 1.0, 2.0
    say = lambda: head.detect(Boxes(lay(logits), lay(distances), torch.full((1, 2, 2), 20.0)))[0]  # noqa: E731
    one = ((0.0, 0.0), (7.0, 8.0))
    assert [(d.label, d.box, round(d.score, 4)) for d in say()] == [(1, one, round(math.sqrt(1 / (1 + math.exp(-2))), 4))]
    logits[0] = torch.tensor([1.0, -20])
    distances[3], logits[3] = torch.tensor([0.0, 3, 0, 3]), 9.0  # no height: no box
    assert [(d.label, d.box) for d in say()] == [(1, one), (0, one)] and len(head.detect(Boxes(lay(logits), lay(distances), torch.full((1, 2, 2), 20.0)), most=1)[0]) == 1


def test_objects_are_found_and_taught_as_torchvision_does():
    """torchvision's whole FCOS on the same maps: its losses and its detections, with its axes the other way round."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    head, seen = finder(depth=2)
    nn.init.normal_(head.dense.regression_head.bbox_reg.weight, std=0.3)
    nn.init.normal_(head.dense.classification_head.cls_logits.weight, std=0.3)
    backbone = nn.Identity()
    backbone.out_channels = 32
    theirs = FCOS(backbone, 2, anchor_generator=AnchorGenerator(((4,),), ((1.0,),)), head=head.dense, score_thresh=0.05)
    corners, label, image = boxes([1, 5, 9, 13], [14, 2, 27, 9], [3, 3, 30, 20], [2, 6, 18, 16]), torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 1])
    found = head(seen)
    ours = objectives.box(Model(box=head), batch({"boxes": {"corners": corners, "label": label, "image": image, "told": torch.ones(2, dtype=bool)}}), output(seen))
    raw = head.dense([head.neck(seen)])
    cells = [head.cells((8, 6))] * 2
    want = theirs.compute_loss([{"boxes": corners[image == k].flatten(1), "labels": label[image == k]} for k in (0, 1)], raw, cells, [48])
    gap = max(abs(float(a.detach() - b.detach())) for a, b in zip(ours.values(), (want["classification"], want["bbox_regression"], want["bbox_ctrness"])))
    print(f"gap of the losses to torchvision {gap:.1e}")
    assert gap < 1e-5 and all(v > 0.01 for v in ours.values())
    with torch.no_grad():
        boxed = theirs.postprocess_detections({k: [v] for k, v in raw.items()}, [[c] for c in cells], [(24, 32)] * 2)
    for mine, their in zip(head.detect(found, 0.05), boxed):
        their = {k: v[(their["boxes"][:, :2] < their["boxes"][:, 2:]).all(1)] for k, v in their.items()}  # torchvision keeps empty ones
        assert len(mine) == len(their["boxes"]) > 3 and [d.label for d in mine] == their["labels"].tolist()
        assert torch.allclose(torch.tensor([d.box for d in mine]).flatten(1), their["boxes"], atol=1e-4)
        assert torch.allclose(torch.tensor([d.score for d in mine]), their["scores"], atol=1e-5)


def test_pictures_whose_objects_are_not_marked_teach_nothing():
    head, seen = finder()
    of = lambda told, n: objectives.box(  # noqa: E731
        Model(box=head), batch({"boxes": {"corners": boxes([1, 5, 9, 13])[:n], "label": torch.zeros(n, dtype=int), "image": torch.zeros(n, dtype=int), "told": torch.tensor(told)}}), output(seen)
    )
    assert of([False, False], 1) == {} and objectives.box(Model(box=head), batch({}), output(seen)) == {}
    one, both, none = of([True, False], 1), of([True, True], 1), of([False, True], 0)
    assert both["boxes"] > one["boxes"] > none["boxes"] > 0 and one["box_edges"] == both["box_edges"] > 0 == none["box_edges"]
    seen.levels[0][1] += 1  # what stands in a picture that is not told changes nothing
    assert float(of([True, False], 1)["boxes"].detach()) == pytest.approx(float(one["boxes"].detach()), rel=1e-5)


def asked(rank, lm_dim=10):
    grid = (4, 3) if rank == 2 else (2, 4, 3)
    seen = features(tokens=torch.randn(2, math.prod(grid), 12), grid=grid)
    return build_part("heads", "box", {"dim": 12, "lm_dim": lm_dim, "width": 32, "heads": 4, "rank": rank}), seen


@pytest.mark.parametrize("rank", [2, 3])
def test_a_state_means_one_place_inside_the_input(rank):
    head, seen = asked(rank)
    states, image = torch.randn(3, 2, 10), torch.tensor([0, 0, 1])
    places = head.from_states(seen, states, image)
    assert places.corners.shape == (3, 2, rank) and places.present.shape == (3,)
    extreme = head.from_states(seen, states * 1e3, image).corners
    for corners in (places.corners, extreme):
        assert (corners[:, 0] < corners[:, 1]).all() and corners.min() >= 0 and corners.max() <= 1
    alone = head.from_states(seen, states[2:], image[2:])
    assert torch.allclose(alone.corners, places.corners[2:], atol=1e-6) and not torch.allclose(places.corners[0], places.corners[1])
    with pytest.raises(MedVLMError, match=f"rank {rank}"):
        head.from_states(seen._replace(grid=(12,)), states, image)


@pytest.mark.parametrize("rank", [2, 3])
def test_the_place_moves_with_what_the_tokens_show(rank):
    """A mark in one cell of the grid, everywhere in turn: after a short training its box is around that cell."""
    grid = (4, 3) if rank == 2 else (2, 4, 3)
    head = asked(rank)[0]
    cells = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).flatten(0, -2)
    true = torch.stack([cells, cells + 1], 1) / torch.tensor(grid)
    marks = torch.eye(len(cells))[..., None] * torch.randn(12) * 2
    states, image = torch.ones(len(cells), 1, 10), torch.arange(len(cells))
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(150):
        found = head.from_states(features(tokens=marks, grid=grid), states, image).corners
        loss = (5 * (found - true).abs().sum((1, 2)) + 2 * objectives.giou_loss(found, true)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    overlap = 1 - objectives.giou_loss(found.detach(), true)
    print(f"rank {rank}: generalised IoU {float(overlap.mean()):.2f} at the end")
    assert overlap.mean() > 0.7


def test_a_head_does_what_it_was_built_for():
    head, seen = finder()
    with pytest.raises(MedVLMError, match="lm_dim"):
        head.from_states(seen, torch.randn(1, 1, 10), torch.zeros(1, dtype=int))
    with pytest.raises(MedVLMError, match="labels"):
        asked(2)[0](seen)


def test_generalised_iou_is_torchvisions_and_has_a_third_axis():
    from torchvision.ops import generalized_box_iou_loss

    lower = torch.rand(20, 2, 2)
    a, b = (torch.stack([low, low + size], 1) for low, size in zip(lower.unbind(1), torch.rand(2, 20, 2)))
    gap = (objectives.giou_loss(a, b) - generalized_box_iou_loss(a.flatten(1), b.flatten(1))).abs().max()
    assert gap < 1e-5
    cube, beside = torch.tensor([[[0.0, 0, 0], [2, 2, 2]]]), torch.tensor([[[1.0, 0, 0], [3, 2, 4]]])
    # 4 of 8 + 16 - 4 = 20 in a hull of 3 * 2 * 4 = 24
    assert objectives.giou_loss(cube, beside).item() == pytest.approx(1 - 4 / 20 + 4 / 24)


def test_a_place_is_taught_by_the_outline_and_absence_by_presence_alone():
    head, seen = finder(lm_dim=10, heads=4)
    target = torch.zeros(3, 32, 24)
    target[0, 8:16, 6:12] = target[1, 4, 20] = 1
    given = batch({"mask": target, "present": torch.tensor([1.0, 1.0, 0.0])}, seg=2)
    given.seg, given.seg_image = torch.zeros(3, 2), [("picture", 0), ("picture", 1), ("picture", 1)]
    model = Model(torch.randn(3, 2, 10), box=head)
    losses = objectives.box(model, given, output(seen))
    assert set(losses) == {"place", "place_present"}
    places = head.from_states(seen, model.states, torch.tensor([0, 1, 1]))
    true = torch.tensor([[[8 / 32, 6 / 24], [16 / 32, 12 / 24]], [[4 / 32, 20 / 24], [5 / 32, 21 / 24]]])
    want = (5 * (places.corners[:2] - true).abs().sum((1, 2)) + 2 * objectives.giou_loss(places.corners[:2], true)).mean()
    assert float(losses["place"].detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert float(losses["place_present"].detach()) == pytest.approx(float(F.binary_cross_entropy_with_logits(places.present, given.targets["present"]).detach()), rel=1e-5)
    given.targets["present"] = torch.zeros(3)
    assert set(objectives.box(model, given, output(seen))) == {"place_present"}


def test_both_objectives_together_teach_every_parameter():
    head, seen = finder(lm_dim=10, heads=4)
    told = {"corners": boxes([1, 5, 9, 13], [14, 2, 27, 9]), "label": torch.tensor([0, 1]), "image": torch.tensor([0, 1]), "told": torch.ones(2, dtype=bool)}
    target = torch.zeros(2, 32, 24)
    target[0, 8:16, 6:12] = 1
    losses = objectives.box(Model(torch.randn(2, 2, 10), box=head), batch({"boxes": told, "mask": target, "present": torch.tensor([1.0, 0.0])}, seg=2), output(seen))
    assert set(losses) == {"boxes", "box_edges", "box_centres", "place", "place_present"}
    sum(losses.values()).backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def discs(rng, count=4, size=48):
    """Pictures of bright and dark discs on grey, and their boxes."""
    h, w = np.ogrid[:size, :size]
    pictures, corners, labels, image = [], [], [], []
    for k in range(count):
        picture = rng.normal(0, 0.05, (size, size))
        for place in rng.permutation(4)[: rng.integers(1, 4)]:
            radius, label = rng.uniform(4, 9), int(rng.integers(2))
            at = np.array([12, 12]) + 24 * np.array(divmod(int(place), 2)) + rng.uniform(-2, 2, 2)
            picture += ((h + 0.5 - at[0]) ** 2 + (w + 0.5 - at[1]) ** 2 < radius**2) * (1.0 if label else -1.0)
            corners.append([*(at - radius), *(at + radius)])
            labels.append(label)
            image.append(k)
        pictures.append(picture)
    told = {"corners": boxes(*corners), "label": torch.tensor(labels), "image": torch.tensor(image), "told": torch.ones(count, dtype=bool)}
    return torch.tensor(np.stack(pictures), dtype=torch.float32)[:, None], told


def average_precision(found, told, overlap=0.5):
    """Area under precision over recall of all detections in order of score, both labels together."""
    from torchvision.ops import box_iou

    free = torch.ones(len(told["label"]), dtype=bool)
    ranked = sorted(((d.score, k, d) for k, ds in enumerate(found) for d in ds), key=lambda x: -x[0])
    hits = []
    for _, k, d in ranked:
        mine = free & (told["image"] == k) & (told["label"] == d.label)
        iou = box_iou(torch.tensor([[*d.box[0], *d.box[1]]]), told["corners"].flatten(1))[0] * mine
        hits.append(bool(iou.max() > overlap))
        free[iou.argmax()] &= not hits[-1]
    right = np.cumsum(hits)
    return sum(right[i] / (i + 1) for i, hit in enumerate(hits) if hit) / len(free)


def test_discs_are_learnt():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    eye = nn.Sequential(nn.Conv2d(1, 16, 5, 4, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1))
    head = build_part("heads", "box", {"dim": 32, "level_dims": [32], "level_strides": [4], "labels": ["dark", "bright"], "width": 32, "stride": 4, "depth": 1})
    see = lambda x: features(tokens=torch.zeros(len(x), 1, 32), levels=(eye(x),))  # noqa: E731
    optimizer = torch.optim.Adam([*eye.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(120):
        pictures, told = discs(rng)
        losses = objectives.box(Model(box=head), batch({"boxes": told}), output(see(pictures)))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    pictures, told = discs(rng, 16)
    before = average_precision([[] for _ in pictures], told)
    reached = average_precision(head.detect(head(see(pictures)), 0.05), told)
    print(f"average precision at IoU 0.5: {reached:.3f}")
    assert before == 0 and reached > 0.9


HOUSE = Path(vlm.__file__).parent
DROPPED = """
import tiny, torch
from medvlm import cli
from medvlm.language import Batch
from medvlm.train import objectives
from medvlm.vlm import MedVLM, Output

tokenizer = tiny.tokenizer()
config = tiny.config(tokenizer)
config.parts["heads"] = {"area": {"file": "area", "args": {"lm_dim": 32}}}
model = MedVLM(config)
mask = torch.zeros(2, 64, 64)
mask[0, :32] = 1
words = torch.ones(2, 6, dtype=torch.bool)
batch = Batch(torch.ones(2, 6, dtype=torch.long), None, None, seg=torch.tensor([[0, 5], [1, 5]]), seg_words=words, targets={"mask": mask})
out = Output(logits=None, hidden=torch.randn(2, 6, 32), features={}, at=None)
(learn,) = objectives.find("area").values()
optimizer = torch.optim.Adam(model.heads.parameters(), lr=0.1)
for _ in range(30):
    optimizer.zero_grad()
    loss = learn(model, batch, out)["area"]
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.heads.parameters())
    optimizer.step()
said = model.heads["area"](model.seg_states(batch, out)).sigmoid()
assert abs(said[0] - 0.5) < 0.1 and said[1] < 0.1, said
model.save_pretrained("saved")
again = MedVLM.from_pretrained("saved")
assert torch.equal(again.heads["area"](again.seg_states(batch, out)).sigmoid(), said)
assert cli.main(["list", "heads"]) == 0
"""


@pytest.mark.slow
def test_the_head_of_the_guide_is_one_file(tmp_path):
    """docs/add-a-head.md: its file dropped into the folder is listed, trained, saved and loaded; no other is edited."""
    shutil.copytree(HOUSE, tmp_path / "medvlm", ignore=shutil.ignore_patterns("__pycache__", "models", "demo"))
    (code,) = re.findall(r"```python\n(.*?)```", (HOUSE.parent / "docs/add-a-head.md").read_text(), re.DOTALL)
    (tmp_path / "medvlm/heads/area.py").write_text(code)
    shutil.copy(Path(tiny.__file__), tmp_path)
    done = subprocess.run([sys.executable, "-c", DROPPED], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "area" in [line.split()[0] for line in done.stdout.splitlines() if line] and "area" not in parts.names("heads")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_heads_answer_the_same_after_saving(kind, tmp_path):
    config = tiny.config(tiny.tokenizer())
    dims, strides = config.parts["heads"]["mask"]["args"]["level_dims"], config.parts["heads"]["mask"]["args"]["level_strides"]
    config.parts["heads"] = {
        "contrast": {"file": "contrast", "args": {"dim": dims[-1], "text_dim": 6, "embed_dim": 8, "kind": kind}},
        "box": {"file": "box", "args": {"dim": dims[-1], "level_dims": dims, "level_strides": strides, "labels": ["cell"], "lm_dim": 32, "width": 32, "heads": 4}},
    }
    model = vlm.MedVLM(config).eval()
    for parameter in model.heads.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(tmp_path)
    again = vlm.MedVLM.from_pretrained(tmp_path).eval()
    (seen,) = model.encode({"picture": torch.rand(2, 1, 64, 64)}).values()
    states, image, text = torch.randn(3, 2, 32), torch.tensor([0, 1, 1]), features(torch.randn(4, 6))

    def answers(m):
        with torch.no_grad():
            return [m.heads["contrast"](seen, text), *m.heads["box"](seen), *m.heads["box"].from_states(seen, states, image)]

    assert all(torch.equal(a, b) for a, b in zip(answers(model), answers(again), strict=True)) and len(answers(model)) == 6


def test_a_whole_model_learns_captions_and_places_at_once():
    """Through MedVLM: its text encoder, its [SEG] states and its pictures."""
    tokenizer = tiny.tokenizer()
    config = tiny.config(tokenizer)
    dims = config.parts["heads"]["mask"]["args"]["level_dims"]
    text = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": len(tokenizer)}
    config.parts["encoders"]["text"] = {"file": "text", "args": text}
    config.parts["heads"] = {
        "contrast": {"file": "contrast", "args": {"dim": dims[-1], "text_dim": 16, "embed_dim": 8}},
        "box": {"file": "box", "args": {"dim": dims[-1], "lm_dim": 32, "width": 32, "heads": 4}},
    }
    model = vlm.MedVLM(config).train()
    sample = Sample("a", turns=(Turn("user", "Segment the right lung."), Turn("assistant", SEG)), images={"xray-1": tiny.picture()})
    rows = [encode(tokenizer, sample, {"xray-1": model.count("picture")})] * 2
    given = collate(tokenizer, rows, [{"xray-1": [("picture", k)]} for k in (0, 1)], {"picture": torch.rand(2, 1, 64, 64)})
    said = tokenizer(["Consolidation on the right.", "No cardiomegaly."], padding=True, return_tensors="pt")
    target = torch.zeros(2, 64, 64)
    target[0, 8:30, 9:20] = 1
    given.targets = {"text": {"ids": said["input_ids"], "attention": said["attention_mask"], "image": torch.arange(len(said["input_ids"]))}, "mask": target, "present": torch.tensor([1.0, 0.0])}
    out = model(**given.inputs())
    losses = {k: v for o in objectives.find("lm+clip+box").values() for k, v in o(model, given, out).items()}
    assert set(losses) == {"lm", "clip", "place", "place_present"}
    sum(losses.values()).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [n for n in still if not n.startswith("encoders.picture.backbone.stages")] == []  # timm's blocks start as the identity


def test_an_objective_takes_one_encoder():
    model, given, out = contrast("clip")
    out.features["other"] = out.features["picture"]
    with pytest.raises(MedVLMError, match="picture, other"):
        objectives.clip(model, given, out)


def test_the_heads_are_listed():
    listed = parts.names("heads")
    assert {"mask", "classify", "contrast", "box"} <= set(listed)
