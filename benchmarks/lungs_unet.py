"""A MONAI U-Net for the lungs, trained on the same images as medvlm-tiny: the peer of its mask head.

    python benchmarks/lungs_unet.py --data DIR --minutes 20 --out runs/unet
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

from medvlm.datasets import manifest
from medvlm.evaluate.segment import dice
from medvlm.preprocess import InputSpec, to_tensor
from medvlm.train.augment import Augmentation

SPEC = InputSpec((256, 256))
LUNGS = ("right_lung", "left_lung")


def cases(data: Path, split: str):
    """(image tensor, lung targets, present, frame, native masks, id) of the rows that have lung masks."""
    for row in manifest.rows(data / "xray_covid", split):
        if not row.get("mask"):
            continue
        (image,) = manifest.open_images(row)
        native = {m.label: m.array for m in manifest.read_masks(row, image)}
        tensor, frame = to_tensor(image, SPEC)
        empty = np.zeros(image.shape[1:], bool)
        target = torch.stack([frame.mask_to_input(native.get(n, empty)) for n in LUNGS])
        yield tensor, target, frame, native, row["id"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    train = list(cases(args.data, "train"))
    model = UNet(2, 1, 2, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2), num_res_units=2, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4)
    loss_of = DiceCELoss(sigmoid=True)
    augment, no_boxes = Augmentation(2), np.zeros((0, 2, 2))
    began, step = time.monotonic(), 0
    model.train()
    while (spent := time.monotonic() - began) < args.minutes * 60:
        pictures, targets = [], []
        for i in rng.integers(len(train), size=8):
            picture, target, *_ = train[i]
            moved = augment(picture.clamp(0, 1).numpy(), (target.numpy() * 255).round().astype(np.uint8), no_boxes, int(rng.integers(2**31)))
            pictures.append(torch.from_numpy(np.ascontiguousarray(moved.picture)))
            targets.append(torch.from_numpy(np.ascontiguousarray(moved.masks)).float() / 255)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * max(0.01, 1 - spent / (args.minutes * 60)) ** 0.9
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model((torch.stack(pictures) - 0.5) / 0.25), torch.stack(targets))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"step {step} {spent:.0f} s loss {float(loss):.4f}", flush=True)
    model.eval()
    result = {"steps": step, "train_images": len(train), "minutes": args.minutes, "parameters": sum(p.numel() for p in model.parameters())}
    for split in ("val", "test"):
        rows = []
        for picture, _, frame, native, name in cases(args.data, split):
            with torch.no_grad():
                logits = model((picture[None] - 0.5) / 0.25)[0]
            masks = (frame.map_to_image(logits) > 0).numpy()
            rows.append({"id": name} | {n: dice(m, native[n]) for n, m in zip(LUNGS, masks) if n in native})
        result[split] = rows
        values = [r[n] for r in rows for n in LUNGS if n in r]
        print(split, f"mean Dice {np.mean(values):.4f} over {len(values)} lungs of {len(rows)} images")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scores.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
