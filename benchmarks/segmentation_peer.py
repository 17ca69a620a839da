"""A MONAI U-Net for one set of outlines, trained for so long on the images of train: the peer of medvlm-tiny's mask head.

    python benchmarks/segmentation_peer.py --set lungs|vessels|nuclei --data DIR --minutes 30 --out runs/unet-lungs

Lungs are seen whole at 256 x 256, vessels and nuclei at their own resolution: patches of 256 x 256 to learn from, overlapping
windows to draw. Its masks lie in OUT/predictions-val.jsonl and OUT/predictions-test.jsonl (and as pictures in OUT/masks), are scored
as ``medvlm evaluate segment`` scores a model, and can be scored by that command itself:

    medvlm evaluate segment --data DIR/fundus_chase --model file:OUT/predictions-test.jsonl --out RUN

Of lungs read the lines of the two lungs there: what else is outlined on the X-rays the peer never learned, and fails.
Vessels are learned from the first observer; the same masks are scored against the second too, and the second against the first.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet, UNet
from PIL import Image as Pillow

from medvlm.datasets.predictions import save_predictions
from medvlm.evaluate import run
from medvlm.evaluate.segment import dice, score
from medvlm.preprocess import Frame, InputSpec, to_tensor
from medvlm.sample import Mask, Prediction, Sample
from medvlm.train.augment import Augmentation
from medvlm.train.loop import fast_bf16

SIDE, BATCH, RATE = 256, 8, 1e-3
POINTS = (0.25, 0.5, 0.75)
"""Shares of the time after which val is measured; the clock stands still meanwhile, and nothing is chosen by it."""


@dataclass(frozen=True)
class Peer:
    """folder: of the data. learned: labels, one output each. scored: {label: output}. whole: seen whole, scaled to SIDE."""

    folder: str
    channels: int
    learned: tuple[str, ...]
    scored: dict[str, int]
    whole: bool


SETS = {
    "lungs": Peer("xray_covid", 1, ("right_lung", "left_lung"), {"right_lung": 0, "left_lung": 1}, True),
    "vessels": Peer("fundus_chase", 3, ("vessel",), {"vessel": 0, "vessel_observer2": 0}, False),
    "nuclei": Peer("path_dsb_nuclei", 3, ("nucleus",), {"nucleus": 0}, False),
}


@dataclass(frozen=True)
class Case:
    """samples: those of one image, one a scored label, named as ``medvlm evaluate`` names them. targets: (outputs, h, w) coverage."""

    samples: list[Sample]
    picture: torch.Tensor
    frame: Frame
    targets: torch.Tensor


def cases(data: Path, peer: Peer, split: str) -> list[Case]:
    """The images of a split that have an outline of the set."""
    rows: dict[str, list[Sample]] = {}
    for s in run.plan("segment", data / peer.folder, split)[1][0].samples:
        if s.masks[0].label in peer.scored:
            rows.setdefault(s.meta["row"], []).append(s)
    found = []
    for samples in rows.values():
        (image,) = samples[0].images.values()
        picture, frame = to_tensor(image, InputSpec((SIDE, SIDE) if peer.whole else tuple(image.shape[1:]), peer.channels))
        native = {s.masks[0].label: s.masks[0].array for s in samples}
        empty = np.zeros(image.shape[1:], bool)
        targets = torch.stack([frame.mask_to_input(native.get(label, empty)) for label in peer.learned])
        found.append(Case(samples, picture.clamp(0, 1), frame, targets))
    return found


def network(peer: Peer) -> torch.nn.Module:
    """Thin vessels and the borders of nuclei need features of every pixel, which UNet's first stride gives up; lungs do not."""
    if peer.whole:
        model = UNet(2, peer.channels, len(peer.learned), channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2), num_res_units=2, dropout=0.1)
    else:  # batch normalisation: on a CPU in bfloat16 twice as many steps as with that of each picture
        model = BasicUNet(2, peer.channels, len(peer.learned), features=(32, 32, 64, 128, 256, 32), norm="batch")
    return model.to(memory_format=torch.channels_last)


def drawer(peer: Peer, rng: np.random.Generator):
    """(case) -> a picture and its targets, moved and changed at random."""
    if peer.whole:
        augment, no_boxes = Augmentation(2), np.zeros((0, 2, 2))

        def moved(case: Case):
            masks = (case.targets.numpy() * 255).round().astype(np.uint8)
            picture, masks, *_ = augment(case.picture.numpy(), masks, no_boxes, int(rng.integers(2**31)))
            return torch.from_numpy(np.ascontiguousarray(picture)), torch.from_numpy(np.ascontiguousarray(masks)).float() / 255

        return moved
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or it asks the network for its newest version
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)
    edge = cv2.BORDER_REFLECT_101
    change = A.Compose([
        A.Affine(scale=(0.7, 1.4), rotate=(-180, 180), border_mode=edge, p=0.7), A.PadIfNeeded(SIDE, SIDE, border_mode=edge), A.RandomCrop(SIDE, SIDE), A.D4(),
        A.ColorJitter((0.7, 1.3), (0.7, 1.3), (0.7, 1.3), (-0.05, 0.05), p=0.8), A.RandomGamma((75, 135), p=0.3), A.GaussianBlur((3, 5), p=0.1),
    ], seed=int(rng.integers(2**31)))  # fmt: skip

    def cut(case: Case):
        found = change(image=case.picture.permute(1, 2, 0).numpy(), mask=case.targets.permute(1, 2, 0).numpy())
        return tuple(torch.from_numpy(np.ascontiguousarray(found[k])).movedim(-1, 0).clamp(0, 1) for k in ("image", "mask"))

    return cut


@torch.no_grad()
def drawn(model: torch.nn.Module, case: Case) -> np.ndarray:
    """bool (outputs, H, W) on the image's own grid."""
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16("cpu")):
        logits = sliding_window_inference((case.picture[None] - 0.5) / 0.25, (SIDE, SIDE), 4, lambda x: model(x).float(), overlap=0.5, mode="gaussian")
    return case.frame.masks(logits[0])


def train(peer: Peer, data: Path, minutes: float, say) -> tuple[torch.nn.Module, dict]:
    learned, val = cases(data, peer, "train"), cases(data, peer, "val")
    rng = np.random.default_rng(0)
    model, draw = network(peer), drawer(peer, rng)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=1e-4)
    loss_of = DiceCELoss(sigmoid=True, batch=True)
    spent, step, points, curve = 0.0, 0, list(POINTS), []
    while spent < minutes * 60:
        began = time.monotonic()
        pictures, targets = map(torch.stack, zip(*(draw(learned[i]) for i in rng.integers(len(learned), size=BATCH))))
        for group in optimizer.param_groups:
            group["lr"] = RATE * max(0.001, 1 - spent / (minutes * 60)) ** 0.9
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16("cpu")):
            logits = model(((pictures - 0.5) / 0.25).contiguous(memory_format=torch.channels_last))
        # one output at a time: of several, DiceCELoss takes the softmax, which knows no background here
        loss = torch.stack([loss_of(a[:, None], b[:, None]) for a, b in zip(logits.float().unbind(1), targets.unbind(1))]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 12.0)
        optimizer.step()
        step, spent = step + 1, spent + time.monotonic() - began
        if step % 50 == 0:
            say(f"step {step} {spent:.0f} s loss {loss.item():.4f}")
        if points and spent >= points[0] * minutes * 60 or spent >= minutes * 60:
            points = [p for p in points if spent < p * minutes * 60]
            model.eval()
            values = []
            for case in val:
                masks = drawn(model, case)
                values += [dice(masks[peer.scored[m.label]], m.array) for s in case.samples for m in s.masks if m.label in peer.learned]
            curve.append({"step": step, "seconds": round(spent), "val Dice": float(np.mean(values))})
            say(f"step {step} {spent:.0f} s val Dice {np.mean(values):.4f}")
    return model, {"minutes": minutes, "steps": step, "batch": BATCH, "steps_per_second": step / spent, "threads": torch.get_num_threads(),
                   "train_images": len(learned), "parameters": sum(p.numel() for p in model.parameters()), "curve": curve}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="print scores.json")
    args = parser.parse_args()
    peer = SETS[args.set]
    torch.manual_seed(0)
    (args.out / "masks").mkdir(parents=True, exist_ok=True)
    model, result = train(peer, args.data, args.minutes, lambda text: print(text, file=sys.stderr, flush=True))
    torch.save(model.state_dict(), args.out / "unet.pt")
    model.eval()
    result = {"set": args.set} | result | {"scores": {}}
    for split in ("val", "test"):
        samples, predictions, rows = [], [], []
        for case in cases(args.data, peer, split):
            began = time.monotonic()
            masks = drawn(model, case)
            seconds = (time.monotonic() - began) / len(case.samples)
            rows.append({"id": case.samples[0].meta["row"]})
            for s in case.samples:
                label, mine = s.masks[0].label, masks[peer.scored[s.masks[0].label]]
                samples.append(s)
                predictions.append(Prediction(s.id, masks=(Mask(s.masks[0].image, label, mine),), seconds=seconds))
                rows[-1][label] = dice(mine, s.masks[0].array)
                Pillow.fromarray(mine).save(args.out / "masks" / f"{s.id.replace('/', '__')}.png")
        save_predictions(args.out / f"predictions-{split}.jsonl", predictions)
        told = {"MONAI U-Net": (samples, predictions)}
        if args.set == "vessels":
            second = {s.meta["row"]: s.masks[0].array for s in samples if s.masks[0].label == "vessel_observer2"}
            first = [s for s in samples if s.masks[0].label == "vessel"]
            told["observer 2"] = first, [Prediction(s.id, masks=(replace(s.masks[0], array=second[s.meta["row"]]),)) for s in first]
        result[split] = rows
        result["scores"][split] = {who: [x.to_json() for x in score(*pairs) if x.name in ("Dice", "IoU", "NSD", "NSD px", "HD95", "HD95 px")] for who, pairs in told.items()}
        for who, scores in result["scores"][split].items():
            for x in scores:
                if x["name"][:4] in ("Dice", "NSD", "NSD "):
                    span = "" if x["low"] is None else f" ({x['low']:.4f} to {x['high']:.4f})"
                    print(f"{split} {who} {x['name']} {x['slice']}: {x['value']:.4f}{span}, n = {x['n']}", file=sys.stderr if args.json else sys.stdout)
    text = json.dumps(result, indent=1)
    (args.out / "scores.json").write_text(text)
    if args.json:
        print(text)


if __name__ == "__main__":
    main()
