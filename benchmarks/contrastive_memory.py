"""How much time and memory a contrastive loss of 16,384 pairs of 256 values takes, forward and backward, beside open_clip's.

open_clip's ClipLoss and SigLipLoss make the whole matrix of logits (ClipLoss twice, once a direction); medvlm's make
``--tile`` rows of it at a time. Random unit vectors, a text being its picture with noise; scale 1/0.07, and 10 with bias
-10. Rules: pairs.py. Loss and norms of the gradients must agree to 1e-5 (relative) before time or memory counts.

    python benchmarks/contrastive_memory.py [--pairs 3] [--pictures 16384] [--tile 512] [--json FILE]
"""

import argparse
import gc
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import torch.nn.functional as F
from pairs import alone, heading, high_water, pairs, ratio_text, record

from medvlm.train.contrastive import clip_loss, siglip_loss

DIM, CLOSE = 256, 1e-5
TIME_FLOOR, MEMORY_FLOOR = 1.0, 15.0
BIAS, SCALES = -10.0, {"clip": 1 / 0.07, "siglip": 10.0}


def vectors(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(count, DIM, generator=rng), dim=1)
    return image.requires_grad_(), F.normalize(image.detach() + 0.1 * torch.randn(count, DIM, generator=rng), dim=1).requires_grad_()


def medvlm(kind: str, tile: int, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return clip_loss(image, text, scale, tile) if kind == "clip" else siglip_loss(image, text, scale, BIAS, tile)


def open_clip(kind: str, tile: int, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from open_clip.loss import ClipLoss, SigLipLoss

    return ClipLoss()(image, text, scale) if kind == "clip" else SigLipLoss()(image, text, scale, BIAS)


WAYS = {"medvlm": medvlm, "open_clip": open_clip}


def step(way: str, kind: str, tile: int, image: torch.Tensor, text: torch.Tensor) -> list[float]:
    """[loss, norm of the gradient of images, of texts, of the scale]"""
    scale = torch.tensor(SCALES[kind], requires_grad=True)
    image.grad = text.grad = None
    loss = WAYS[way](kind, tile, image, text, scale)
    loss.backward()
    return [loss.item(), image.grad.norm().item(), text.grad.norm().item(), scale.grad.item()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=16384)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.memory_of:
        step(*args.memory_of, 8, *vectors(16))  # imports and caches are not what is measured
        given = vectors(args.pictures)
        gc.collect()
        before = high_water()
        step(*args.memory_of, args.tile, *given)
        print(high_water() - before)
        return
    given, found = vectors(args.pictures), {}
    for kind in SCALES:
        ours, theirs = (partial(step, way, kind, args.tile, *given) for way in WAYS)
        gap = max(abs(a - b) / abs(b) for a, b in zip(ours(), theirs()))
        control = pairs(ours, ours, args.pairs)
        row = {"control": control, "gap": gap, **pairs(ours, theirs, args.pairs)}
        row["memory"] = {way: alone(__file__, "--memory-of", way, kind, "--pictures", str(args.pictures), "--tile", str(args.tile)) for way in WAYS}
        found[kind] = row
        print(heading(f"{kind}: {args.pictures} pairs of {DIM} values, {args.tile} rows a tile", control))
        print("| way | seconds | times ours (10-90 %) | floor | peak MB | times ours | floor | loss and gradients |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        print(f"| medvlm | {row['ours']:.2f} | 1 | | {row['memory']['medvlm'] / 1e6:.0f} | 1 | | |")
        print(f"| open_clip | {row['seconds']:.2f} | {ratio_text(row)} | {TIME_FLOOR} | {row['memory']['open_clip'] / 1e6:.0f} "
              f"| {row['memory']['open_clip'] / row['memory']['medvlm']:.1f} | {MEMORY_FLOOR} | {'agree' if gap < CLOSE else 'DIFFER'}, {gap:.1e} |")  # fmt: skip
    record({"pictures": args.pictures, "dim": DIM, "tile": args.tile, "kinds": found}, args.json)


if __name__ == "__main__":
    main()
