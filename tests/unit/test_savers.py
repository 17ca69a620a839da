"""Savers compute what the plain step computes: tiled contrastive losses, cached gradients, the head on answers alone."""

import importlib.util
import math
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from medvlm.errors import ModelError
from medvlm.train.contrastive import clip_loss, siglip_loss, soft_loss
from medvlm.train.savers import answer_loss, cached

NAN = float("nan")


def open_clip_losses():
    """The module alone: importing the package loads every model library."""
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(importlib.util.find_spec("open_clip").origin).parent / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pairs(n, dim=8, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    image = torch.randn(n, dim, generator=rng, dtype=dtype)
    text = image + 0.8 * torch.randn(n, dim, generator=rng, dtype=dtype)
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def findings(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).choice([0.0, 1.0, NAN], (n, 4), p=(0.6, 0.3, 0.1)))


def graded(loss, *inputs):
    """Loss and its gradients by all inputs."""
    leaves = [torch.as_tensor(x).detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(x.grad for x in leaves)]


def agree(got, want, close):
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 1e-4 and torch.allclose(a, b, rtol=close, atol=close * float(b.abs().max())), float((a - b).abs().max())


class Largest(TorchDispatchMode):
    """The most numbers that one tensor made inside holds."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("tile", [None, 1, 7, 23, 100])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_tiled_losses_are_open_clips(tile, scale):
    theirs, (image, text) = open_clip_losses(), pairs(23)
    scale, bias = torch.tensor(scale, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    agree(graded(lambda i, t, s: clip_loss(i, t, s, tile), image, text, scale), graded(theirs.ClipLoss(), image, text, scale), 1e-12)
    agree(graded(lambda i, t, s, b: siglip_loss(i, t, s, b, tile), image, text, scale, bias), graded(theirs.SigLipLoss(), image, text, scale, bias), 1e-9)
    single = [x.float() for x in (image, text, scale, bias)]
    agree(graded(lambda i, t, s: clip_loss(i, t, s, tile), *single[:3]), graded(theirs.ClipLoss(), *single[:3]), 2e-6 * max(1, float(scale) / 20))
    agree(graded(lambda i, t, s, b: siglip_loss(i, t, s, b, tile), *single), graded(theirs.SigLipLoss(), *single), 2e-6 * max(1, float(scale) / 20))


def test_lower_precision_is_only_that_of_the_vectors():
    image, text = pairs(16, dtype=torch.float32)
    image, text = image.bfloat16(), text.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = clip_loss(image, text, 50.0, 4), siglip_loss(image, text, 50.0, -10.0, 4), soft_loss(image, text, 50.0, findings(16), 4)
    want = clip_loss(image.float(), text.float(), 50.0), siglip_loss(image.float(), text.float(), 50.0, -10.0), soft_loss(image.float(), text.float(), 50.0, findings(16))
    assert all(a.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-5) for a, b in zip(got, want))


@pytest.mark.parametrize("name", ["clip", "siglip", "soft"])
def test_a_tiled_loss_never_holds_the_matrix(name):
    n, tile = 96, 8
    image, text = (x.requires_grad_() for x in pairs(n, 4, dtype=torch.float32))
    loss = {"clip": lambda t: clip_loss(image, text, 20.0, t), "siglip": lambda t: siglip_loss(image, text, 20.0, -5.0, t),
            "soft": lambda t: soft_loss(image, text, 20.0, findings(n), t)}[name]  # fmt: skip
    with Largest() as whole:
        loss(None).backward()
    with Largest() as tiled:
        loss(tile).backward()
    assert whole.numel == n * n and tiled.numel <= max(tile * n, n * n // tile)


def targets(labels, temperature):
    """(n, n) written out case by case."""
    n, rows = len(labels), []
    for i in range(n):
        row = []
        for j in range(n):
            a, b = ([0.0 if math.isnan(x) else x for x in labels[k]] + [float(all(x == 0 for x in labels[k]))] for k in (i, j))
            long = math.hypot(*a) * math.hypot(*b)
            row.append(1.0 if i == j else sum(x * y for x, y in zip(a, b)) / long if long else 0.0)
        weights = [max(s, 0.0) if temperature is None else math.exp(s / temperature) for s in row]
        rows.append([w / sum(weights) for w in weights])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [None, 1.0, 0.2])
@pytest.mark.parametrize("tile", [None, 3, 5])
def test_soft_targets(temperature, tile):
    (image, text), labels = pairs(14), findings(14)
    target = targets(labels.tolist(), temperature)

    def written_out(image, text, scale):
        logits = scale * image @ text.T
        return -((target * logits.log_softmax(1)).sum(1).mean() + (target * logits.T.log_softmax(1)).sum(1).mean()) / 2

    agree(graded(lambda i, t, s: soft_loss(i, t, s, labels, tile, temperature), image, text, torch.tensor(9.0).double()),
          graded(written_out, image, text, torch.tensor(9.0).double()), 1e-10)  # fmt: skip


def test_soft_targets_by_hand():
    labels = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, NAN, 0], [0, 0, 0], [0, 0, 0], [NAN, NAN, NAN], [0, NAN, 0]])
    h = 0.5**0.5
    want = [[1, h, 1], [h, 1, h], [1, h, 1]]  # what is unknown makes no likeness and takes none away
    got = targets(labels.tolist(), None)
    for i, row in enumerate(want):
        assert got[i, :3].tolist() == pytest.approx([x / sum(row) for x in row])
    assert got[3].tolist() == got[4].tolist() == [0, 0, 0, 0.5, 0.5, 0, 0]  # nothing found, twice
    assert got[5, 5] == 1 and got[6, 6] == 1  # nothing known, and nothing known to be present: like themselves alone
    image, text = pairs(7)
    found = graded(lambda i, t: soft_loss(i, t, 0.0, labels), image, text)
    assert float(found[0]) == pytest.approx(math.log(7))
    logits = (3.0 * image @ text.T).double()
    want = -((got * logits.log_softmax(1)).sum() + (got * logits.T.log_softmax(1)).sum()) / 14
    assert float(soft_loss(image, text, 3.0, labels)) == pytest.approx(float(want), rel=1e-9)


def test_labels_that_are_all_different_give_clip():
    image, text = pairs(9)
    want = graded(lambda i, t: clip_loss(i, t, 20.0), image, text)
    for labels in (torch.eye(9), torch.full((9, 3), NAN), 5 * torch.eye(9)[torch.randperm(9)]):
        agree(graded(lambda i, t, labels=labels: soft_loss(i, t, 20.0, labels, 2), image, text), want, 1e-12)
        agree(graded(lambda i, t, labels=labels: soft_loss(i, t, 20.0, labels, 2, 1e-3), image, text), want, 1e-12)
    shared = soft_loss(image, text, 20.0, torch.ones(9, 1))
    assert not torch.allclose(shared, want[0], rtol=0.1)


def test_cardiac_clips_target_of_pictures():
    """softmax over the cosines of label vectors, as its published code has it for rows that are not empty."""
    labels = torch.tensor([[1.0, 0, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1]])
    cosine = F.cosine_similarity(labels[:, None], labels[None], dim=2)
    assert torch.allclose(targets(labels.tolist(), 1.0).float(), cosine.softmax(1), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda i, t: clip_loss(i, t[:3], 1.0), r"\(4, 8\).*\(3, 8\)"),
        (lambda i, t: siglip_loss(i[:0], t[:0], 1.0, 0.0), "not rows of pairs"),
        (lambda i, t: clip_loss(i, t, 1.0, 0), "tile of 0"),
        (lambda i, t: soft_loss(i, t, 1.0, torch.ones(3, 2)), r"4 pairs.*\(3, 2\)"),
        (lambda i, t: soft_loss(i, t, 1.0, torch.ones(4, 2), temperature=0.0), "temperature 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(ModelError, match=says) as e:
        call(*pairs(4))
    assert e.value.code == "BAD_ARGUMENT"


class Towers(nn.Module):
    def __init__(self, dropout=0.4):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 16), nn.Dropout(dropout), nn.GELU(), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Linear(5, 8), nn.Dropout(dropout))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image, text):
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1)


def towers(dropout=0.4, n=22):
    torch.manual_seed(3)
    return Towers(dropout), torch.randn(n, 6), torch.randn(n, 5)


def step(model, image, text, size, hold, precision=None, extra=True):
    """Losses and gradients; ``hold`` keeps every chunk's graph, which is the plain way."""
    chunks = list(zip(image.split(size), text.split(size)))

    def forward(chunk):
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            a, b = model(*chunk)
        return (a, b), {"norm": 0.1 * a.float().pow(4).sum(), "text": 0.2 * b.float().pow(4).sum()} if extra else {}

    def loss(a, b):
        return {"clip": clip_loss(a, b, model.scale.exp(), 5), "norm": 0.3 * siglip_loss(a, b, model.scale, -1.0)}

    model.zero_grad()
    torch.manual_seed(11)
    if not hold:
        found = cached(forward, chunks, loss)
    else:
        made = [forward(c) for c in chunks]
        found = loss(*(torch.cat(same) for same in zip(*(e for e, _ in made))))
        for _, others in made:
            for name, value in others.items():
                found[name] = found.get(name, 0) + value
        sum(found.values()).backward()
    return {k: float(v.detach()) for k, v in found.items()}, {k: p.grad.clone() for k, p in model.named_parameters()}, torch.rand(1)


@pytest.mark.parametrize(("precision", "close"), [(None, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("extra", [True, False])
def test_cached_gradients_are_those_of_the_plain_step(precision, close, extra):
    model, image, text = towers()
    want, got = (step(model, image, text, 4, hold, precision, extra) for hold in (True, False))
    assert got[0].keys() == want[0].keys() and got[0] == pytest.approx(want[0], rel=1e-6)
    agree(got[1].values(), want[1].values(), close)
    assert torch.equal(got[2], want[2])  # random numbers go on as after one pass


def test_chunks_do_not_matter_without_dropout():
    model, image, text = towers(0.0)
    want = step(model, image, text, 22, True)
    for size in (1, 5, 22):
        got = step(model, image, text, size, False)
        assert got[0] == pytest.approx(want[0], rel=1e-5)
        agree(got[1].values(), want[1].values(), 1e-5)


def test_cached_gradients_are_added_and_go_through_the_callers_backward():
    model, image, text = towers(0.0)
    _, want, _ = step(model, image, text, 22, True, extra=False)
    model.zero_grad()
    order, chunks = [], [(image[:9], text[:9]), (image[9:], text[9:])]

    class Apart:
        def __enter__(self):
            order.append("in")

        def __exit__(self, *_):
            order.append("out")

    def backward(value):
        order.append("backward")
        (2 * value).backward()

    def loss(a, b, unread):
        return {"clip": clip_loss(a, b, model.scale.exp()), "siglip": 0.3 * siglip_loss(a, b, model.scale, -1.0)}

    def forward(chunk):
        a, b = model(*chunk)
        return (a, b, a * 2), {}

    for _ in range(2):
        found = cached(forward, chunks, loss, backward, Apart)
    assert order == ["in", "backward", "out", "backward"] * 2 and not any(v.requires_grad for v in found.values())
    agree([p.grad for p in model.parameters()], [4 * g for g in want.values()], 1e-5)


def answers(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(6, 31, bias), 3 * torch.randn(40, 6), torch.randint(0, 31, (40,))
    labels[torch.rand(40) < 0.5] = -100
    return head.to(dtype), hidden.to(dtype), labels


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("chunk", [1, 6, 100])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_head_on_answers_alone(cap, mean, chunk, linear, bias):
    head, hidden, labels = answers(bias=bias)
    before, seen = hidden.clone(), []

    def plain(hidden):
        logits = head(hidden)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return 3 * F.cross_entropy(logits, labels, reduction="mean" if mean else "sum")

    def counted(rows):
        seen.append(len(rows))
        return head(rows)

    want = [*graded(plain, hidden), *(p.grad.clone() for p in head.parameters())]
    head.zero_grad()
    got = graded(lambda h: 3 * answer_loss(head if linear else counted, h, labels, chunk, cap, mean), hidden)
    agree([*got, *(p.grad for p in head.parameters())], want, 1e-12)
    assert not got[1][labels < 0].any() and torch.equal(hidden, before)
    assert linear or (sum(seen) == 2 * int((labels >= 0).sum()) and max(seen) <= chunk)


def test_frozen_parts_of_the_head_get_no_gradient_and_a_hook_is_heard():
    head, hidden, labels = answers()
    head.weight.requires_grad_(False)
    answer_loss(head, hidden, labels).backward()
    assert head.weight.grad is None and head.bias.grad.any()
    with torch.no_grad():
        want = F.cross_entropy(head(hidden), labels)
        assert torch.allclose(answer_loss(head, hidden, labels), want)
        head.register_forward_hook(lambda module, given, made: 2 * made)
        assert torch.allclose(answer_loss(head, hidden, labels), F.cross_entropy(head(hidden), labels)) and not torch.allclose(F.cross_entropy(head(hidden), labels), want)


@pytest.mark.parametrize("linear", [True, False])
def test_the_head_under_autocast(linear):
    head, hidden, labels = answers(torch.float32)
    way = head if linear else lambda rows: head(rows)
    found = []
    for loss in (lambda h: F.cross_entropy(head(h).float(), labels), lambda h: answer_loss(way, h, labels, 7)):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            leaf = hidden.clone().requires_grad_()
            value = loss(leaf)
        value.backward()
        assert head.weight.grad.dtype == leaf.grad.dtype == torch.float32
        found.append([value.detach(), leaf.grad, head.weight.grad, head.bias.grad])
    agree(found[1], found[0], 2e-2)
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)  # the same bfloat16 logits


@pytest.mark.parametrize("linear", [True, False])
def test_the_head_never_holds_all_logits(linear):
    head, hidden, labels = nn.Linear(4, 500), torch.randn(64, 4), torch.randint(0, 500, (64,))
    with Largest() as seen:
        answer_loss(head if linear else lambda rows: head(rows), hidden.requires_grad_(), labels, 8).backward()
    assert seen.numel == 8 * 500


def test_a_batch_without_answers_teaches_nothing():
    head, hidden = nn.Linear(4, 9), torch.randn(5, 4, requires_grad=True)
    for mean in (True, False):
        value = answer_loss(head, hidden, torch.full((5,), -100), mean=mean)
        value.backward()
        assert float(value.detach()) == 0 and not hidden.grad.any() and not head.weight.grad.any()


def process(rank, port, folder):
    """One of two processes with half of the pairs: its losses and gradients, open_clip's, and a cached step under DDP."""
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    theirs, (image, text), mine = open_clip_losses(), pairs(12), slice(6 * rank, 6 * rank + 6)
    scale, bias = torch.tensor(12.0, dtype=torch.float64), torch.tensor(-6.0, dtype=torch.float64)
    world = {"rank": rank, "world_size": 2}
    out = {f"clip {tile}": graded(lambda i, t, s, tile=tile: clip_loss(i, t, s, tile), image[mine], text[mine], scale) for tile in (None, 4)}
    out |= {f"siglip {tile}": graded(lambda i, t, s, b, tile=tile: siglip_loss(i, t, s, b, tile), image[mine], text[mine], scale, bias) for tile in (None, 4)}
    labels = findings(12)[mine]
    out |= {f"soft {tile}": graded(lambda i, t, s, tile=tile: soft_loss(i, t, s, labels, tile), image[mine], text[mine], scale) for tile in (None, 4)}
    out["clip theirs"] = graded(theirs.ClipLoss(local_loss=True, gather_with_grad=True, **world), image[mine], text[mine], scale)
    out["siglip theirs"] = graded(theirs.SigLipLoss(**world), image[mine], text[mine], scale, bias)

    model, image, text = towers(0.0, 24)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    chunks = list(zip(image.chunk(2)[rank].split(5), text.chunk(2)[rank].split(5)))
    for _ in range(2):
        optimizer.zero_grad()
        cached(lambda chunk: (wrapped(*chunk), {}), chunks, lambda a, b: {"clip": clip_loss(a, b, model.scale.exp(), 5)}, apart=wrapped.no_sync)
        optimizer.step()
    out["cached"] = [p.detach() for p in model.parameters()]
    torch.save(out, folder / str(rank))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_both_their_pairs(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1))
    image, text = pairs(12)
    scale, bias = torch.tensor(12.0, dtype=torch.float64), torch.tensor(-6.0, dtype=torch.float64)
    whole = {"clip": graded(clip_loss, image, text, scale), "siglip": graded(siglip_loss, image, text, scale, bias),
             "soft": graded(lambda i, t, s: soft_loss(i, t, s, findings(12)), image, text, scale)}  # fmt: skip
    for name in ("clip", "siglip", "soft"):
        for tile in ("None", "4"):
            (loss_a, *a), (loss_b, *b) = first[f"{name} {tile}"], second[f"{name} {tile}"]
            got = [(loss_a + loss_b) / 2, *(torch.cat([x, y]) / 2 for x, y in zip(a[:2], b[:2])), *((x + y) / 2 for x, y in zip(a[2:], b[2:]))]
            agree(got, whole[name], 1e-6)
            for both in (first, second) if name != "soft" else ():  # loss of each, and gradient of its vectors
                agree(both[f"{name} {tile}"][:3], both[f"{name} theirs"][:3], 1e-6)
    model, image, text = towers(0.0, 24)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        clip_loss(*model(image, text), model.scale.exp()).backward()
        optimizer.step()
    for both in (first, second):
        agree(both["cached"], [p.detach() for p in model.parameters()], 1e-5)
