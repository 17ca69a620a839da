"""How fast logits become a label map on the scan's own grid, beside what is usually done and torch in one piece.

25 classes, 80 x 128 x 128 cells -> 160 x 256 x 256 voxels. ``zoom``: scipy.ndimage.zoom (order 1) class by class, then
argmax, as pipelines that resample probabilities do; ``torch``: F.interpolate of all classes at once, then argmax.
Rules: pairs.py. Labels must be equal before any time counts.

The gate is against ``torch``: equal at 99.9999 % of the voxels. ``zoom`` is given ``grid_mode=True, mode="nearest"``, with
which it means the same places; its default does not, and costs the same.

    python benchmarks/native_labels.py [--pairs 11] [--json FILE]
"""

import argparse
import gc
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
import torch.nn.functional as F
from pairs import alone, heading, high_water, pairs, ratio_text, record

from medvlm.preprocess import Frame

CLASSES, GRID, SIZE = 25, (80, 128, 128), (160, 256, 256)
FLOORS = {"zoom": 6.0, "torch": 1.8}
MEMORY_FLOOR = 30.0
EQUAL = 0.999999


def logits(classes: int = CLASSES, grid=GRID) -> torch.Tensor:
    """Smooth fields, as a network's are: noise on a grid eight times coarser, scaled up, with a little noise of its own."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(1, classes, *(max(2, n // 8) for n in grid), generator=generator) * 8
    return (F.interpolate(coarse, grid, mode="trilinear")[0] + torch.randn(classes, *grid, generator=generator)).contiguous()


def medvlm(maps: torch.Tensor, size=SIZE) -> np.ndarray:
    grid = tuple(maps.shape[1:])
    return Frame(size, grid, (0, 0, 0), grid, "SPL").labels(maps)


def zoom(maps: torch.Tensor, size=SIZE) -> np.ndarray:
    from scipy import ndimage

    factors = [s / g for s, g in zip(size, maps.shape[1:])]
    wide = np.empty((len(maps), *size), np.float32)
    for out, each in zip(wide, maps.numpy()):
        ndimage.zoom(each, factors, output=out, order=1, mode="nearest", grid_mode=True)
    return wide.argmax(0).astype(np.uint8)


def whole(maps: torch.Tensor, size=SIZE) -> np.ndarray:
    return F.interpolate(maps[None], size, mode="trilinear", align_corners=False)[0].argmax(0).to(torch.uint8).numpy()


WAYS = {"medvlm": medvlm, "zoom": zoom, "torch": whole}


def measure_memory(name: str) -> int:
    WAYS[name](logits(3, (8, 8, 8)), (9, 9, 9))  # imports and caches are not what is measured
    maps = torch.zeros(CLASSES, *GRID)  # making smooth logits would raise the mark before it is read
    maps[3] = 1
    gc.collect()
    before = high_water()
    labels = WAYS[name](maps)
    assert labels.min() == labels.max() == 3
    return high_water() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.memory_of:
        print(measure_memory(args.memory_of))
        return
    maps = logits()
    truth = whole(maps)
    found = {name: {"equal": float((way(maps) == truth).mean())} for name, way in WAYS.items()}
    del truth
    ours = partial(medvlm, maps)
    control = pairs(ours, ours, args.pairs)
    for name in FLOORS:
        found[name] |= pairs(ours, partial(WAYS[name], maps), args.pairs)
    for name in found:
        found[name]["memory"] = alone(__file__, "--memory-of", name)
    found["medvlm"]["seconds"] = control["ours"]
    least = found["medvlm"]["memory"]
    print(heading(f"{CLASSES} x {GRID} -> {SIZE}", control))
    print("| way | seconds | times ours (10-90 %) | floor | peak MB | times ours | equal to torch |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in found.items():
        ratio = ratio_text(row)
        gate = "yes" if row["equal"] >= EQUAL else "NO"
        print(f"| {name} | {row['seconds']:.2f} | {ratio} | {FLOORS.get(name, '')} | {row['memory'] / 1e6:.0f} | {row['memory'] / least:.0f} | {row['equal']:.7%} {gate} |")
    print(f"memory floor against zoom: {MEMORY_FLOOR:.0f} times")
    record({"classes": CLASSES, "grid": GRID, "size": SIZE, "control": control, "ways": found}, args.json)


if __name__ == "__main__":
    main()
