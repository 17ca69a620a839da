"""torchvision's FCOS for blood cells, trained from random weights for so long: the peer of medvlm-tiny's box head.

    python benchmarks/detector_peer.py --data DIR --minutes 30 --out runs/fcos

A ResNet-18 with a feature pyramid sees the smears at 384 x 288. Its boxes lie in OUT/predictions-val.jsonl and
OUT/predictions-test.jsonl, and ``medvlm evaluate ground --data DIR/path_bccd --model file:OUT/predictions-test.jsonl --out RUN``
scores them as it scores a model: each image is asked only for the cells that it holds. "all images" asks each image for
every kind of cell, so that boxes of cells that are not there count against it, as in PASCAL VOC.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.models import resnet18
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.transforms import v2

from medvlm.datasets.predictions import save_predictions
from medvlm.evaluate import ground, run
from medvlm.sample import Prediction, Region, Sample, Turn
from medvlm.train.loop import fast_bf16

LABELS = ("RBC", "WBC", "Platelets")
FOLDER, SIZE, WIDTH, BATCH, RATE, WARM = "path_bccd", (288, 384), 128, 8, 5e-4, 0.03
POINTS = (0.25, 0.5, 0.75)
"""Shares of the time after which val is measured; the clock stands still meanwhile, and nothing is chosen by it."""


def asked(data: Path, split: str) -> tuple[list[Sample], list[Sample]]:
    """What ``medvlm evaluate ground`` asks of the split, and what it leaves out: the labels that an image does not hold."""
    there = run.plan("ground", data / FOLDER, split)[1][0].samples
    rows: dict[str, dict[str, Sample]] = {}
    for s in there:
        rows.setdefault(s.meta["row"], {})[s.question] = s
    if unknown := {s.question for s in there} - set(LABELS):
        raise SystemExit(f"there are other labels than {', '.join(LABELS)}: {', '.join(sorted(unknown))}")
    absent = []
    for row, held in rows.items():
        one = next(iter(held.values()))
        absent += [replace(one, id=f"{row}@{label}", regions=(), turns=(Turn("user", label),)) for label in LABELS if label not in held]
    return there, absent


def pixels(sample: Sample) -> torch.Tensor:
    (image,) = sample.images.values()
    return torch.from_numpy(np.ascontiguousarray(image.pixels))


def examples(data: Path) -> list[tuple]:
    """(image uint8, boxes (n, 4) left, top, right, bottom, labels) of train; boxes without size are left out."""
    rows: dict[str, list[Sample]] = {}
    for s in asked(data, "train")[0]:
        rows.setdefault(s.meta["row"], []).append(s)
    found = []
    for samples in rows.values():
        picture = pixels(samples[0])
        named = [(box, LABELS.index(s.question)) for s in samples for box in ground.truth_of(s).boxes]
        boxes = torch.tensor(np.array([b[:, ::-1].ravel() for b, _ in named]), dtype=torch.float32).reshape(-1, 4)
        found.append((tv_tensors.Image(picture), tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(picture.shape[1:])),
                      torch.tensor([n for _, n in named], dtype=torch.int64)))  # fmt: skip
    return found


def network() -> FCOS:
    """Levels of stride 8 to 64, as wide as a CPU can train in the time."""
    levels, cells = {"layer2": "0", "layer3": "1", "layer4": "2"}, AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
    model = FCOS(BackboneWithFPN(resnet18(weights=None), levels, [128, 256, 512], WIDTH), len(LABELS), min_size=SIZE[0], max_size=SIZE[1],
                 image_mean=[0.5] * 3, image_std=[0.25] * 3, anchor_generator=cells, head=FCOSHead(WIDTH, 1, len(LABELS)), score_thresh=0.05,
                 nms_thresh=0.5, detections_per_img=200)  # fmt: skip
    model.head.register_forward_hook(lambda module, args, out: {k: v.float() for k, v in out.items()})  # losses and boxes in float32
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def predicted(model: FCOS, samples: list[Sample]) -> list[Prediction]:
    """One prediction a sample: the boxes of its label, each with its probability."""
    model.eval()
    seen: dict[str, dict[str, torch.Tensor]] = {}
    predictions = []
    for s in samples:
        row, (image,) = s.meta["row"], s.images
        if row not in seen:
            with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16("cpu")):
                seen[row] = model([pixels(s).float() / 255])[0]
        said = seen[row]
        mine = said["labels"] == LABELS.index(s.question)
        regions = [Region(image, s.question, ((top, left), (bottom, right)), probability=p)
                   for (left, top, right, bottom), p in zip(said["boxes"][mine].tolist(), said["scores"][mine].tolist())]  # fmt: skip
        predictions.append(Prediction(s.id, regions=tuple(regions)))
    return predictions


def average_precision(samples: list[Sample], predictions: list[Prediction], label: str) -> float:
    """Of one label, as ``ground.score`` has it in its mean, without the interval that takes a while."""
    sure, hits, total = [], [], 0
    for s, said in zip(samples, predictions):
        truth = ground.truth_of(s)
        if s.question == label and (len(truth.boxes) or not truth.flat):
            given = ground.answered(said, truth.image)
            sure += [g[0] for g in given]
            hits += ground.matches([g[1] for g in given], truth.boxes)
            total += len(truth.boxes)
    return ground.average_precision(np.array(sure), np.array(hits, float), total)


def train(data: Path, minutes: float, say) -> tuple[FCOS, dict]:
    learned, val = examples(data), sum(asked(data, "val"), [])
    rng, model = np.random.default_rng(0), network()
    # a crop is scaled up again, so cells come in many sizes; smears have no side, so flips are fair
    change = v2.Compose([v2.RandomPhotometricDistort(p=0.5), v2.RandomApply([v2.RandomIoUCrop(min_scale=0.5, min_aspect_ratio=0.75, max_aspect_ratio=1.33)], 0.7),
                         v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.SanitizeBoundingBoxes(min_size=2, labels_getter=lambda x: x[2]),
                         v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)])  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-3)
    spent, step, points, curve = 0.0, 0, list(POINTS), []
    while spent < minutes * 60:
        began, done = time.monotonic(), spent / (minutes * 60)
        pictures, boxes, labels = zip(*(change(*learned[i]) for i in rng.integers(len(learned), size=BATCH)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (done + 1e-3) / WARM) * max(0.001, 1 - done) ** 0.9
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16("cpu")):
            losses = model([p.as_subclass(torch.Tensor) for p in pictures], [{"boxes": b.as_subclass(torch.Tensor), "labels": n} for b, n in zip(boxes, labels)])
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        step, spent = step + 1, spent + time.monotonic() - began
        if step % 50 == 0:
            say(f"step {step} {spent:.0f} s loss {loss.item():.4f} ({', '.join(f'{k} {v.item():.3f}' for k, v in losses.items())})")
        if points and spent >= points[0] * minutes * 60:
            points = [p for p in points if spent < p * minutes * 60]
            said = predicted(model, val)
            curve.append({"step": step, "seconds": round(spent)} | {label: average_precision(val, said, label) for label in LABELS})
            say(f"step {step} {spent:.0f} s val AP@0.5 {', '.join(f'{label} {curve[-1][label]:.4f}' for label in LABELS)}")
    return model, {"minutes": minutes, "steps": step, "batch": BATCH, "steps_per_second": step / spent, "threads": torch.get_num_threads(),
                   "train_images": len(learned), "parameters": sum(p.numel() for p in model.parameters()), "curve": curve}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="print scores.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    model, result = train(args.data, args.minutes, say)
    torch.save(model.state_dict(), args.out / "fcos.pt")
    result["scores"] = {}
    for split in ("val", "test"):
        there, absent = asked(args.data, split)
        samples = there + absent
        predictions = predicted(model, samples)
        save_predictions(args.out / f"predictions-{split}.jsonl", predictions)
        scores = {}
        for kind, count in (("cells that are there", len(there)), ("all images", len(samples))):
            whole = next(s for s in ground.score(samples[:count], predictions[:count]) if s.name.startswith("mAP"))
            span = "" if whole.low is None else f" ({whole.low:.4f} to {whole.high:.4f})"
            each = {label: average_precision(samples[:count], predictions[:count], label) for label in LABELS}
            scores[kind] = whole.to_json() | {"labels": each}
            told = ", ".join(f"{label} {v:.4f}" for label, v in each.items())
            print(f"{split} mAP@0.5, {kind}: {whole.value:.4f}{span}, n = {whole.n}; {told}", file=sys.stderr if args.json else sys.stdout)
        result["scores"][split] = scores
    text = json.dumps(result, indent=1)
    (args.out / "scores.json").write_text(text)
    if args.json:
        print(text)


if __name__ == "__main__":
    main()
