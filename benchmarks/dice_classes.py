"""How fast the Dice of 105 classes of two label maps of 200 x 320 x 320 voxels is, beside MONAI and a loop over the classes.

``one-hot``: monai.metrics.compute_dice of one-hot maps, which are made inside the time, as a user who has label maps must;
``labels``: monai.metrics.DiceHelper on the label maps themselves (``num_classes``); ``loop``: 2 |A and B| / (|A| + |B|) class by
class in NumPy. Rules: pairs.py. The Dice of every class must agree to 1e-7 before any time counts.

    python benchmarks/dice_classes.py [--ways loop labels one-hot] [--pairs 11] [--json FILE]      about 12 minutes
"""

import argparse
import gc
import os
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from pairs import alone, heading, high_water, pairs, ratio_text, record
from scipy.ndimage import zoom

from medvlm.evaluate.segment import dice_table

CLASSES, SIZE = 105, (200, 320, 320)
FLOORS = {"loop": 25.0, "labels": 100.0, "one-hot": 100.0}
MEMORY_FLOOR = 5.0
EQUAL = 1e-7


def label_maps(size=SIZE, classes: int = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, reference) uint8: blocks of labels, half of them background, and the same with a tenth of the blocks redrawn."""
    rng = np.random.default_rng(5)
    coarse = [n // 10 for n in size]
    reference = rng.integers(0, classes, coarse) * (rng.random(coarse) < 0.5)
    predicted = np.where(rng.random(coarse) < 0.1, rng.integers(0, classes, coarse), reference)
    wide = [zoom(m.astype(np.uint8), 10, order=0) for m in (predicted, reference)]
    return np.roll(wide[0], 1, 2), wide[1]


def medvlm(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return dice_table(predicted, reference, CLASSES)


def one_hot(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    from monai.metrics import compute_dice
    from monai.networks.utils import one_hot as spread

    a, b = (spread(torch.from_numpy(m)[None, None], CLASSES, dtype=torch.uint8) for m in (predicted, reference))
    return compute_dice(a.bool(), b, ignore_empty=False)[0].numpy()


def labels(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    from monai.metrics import DiceHelper

    a, b = (torch.from_numpy(m)[None, None] for m in (predicted, reference))
    return DiceHelper(include_background=True, num_classes=CLASSES, reduction="none", get_not_nans=False, ignore_empty=False)(a, b)[0].numpy()


def loop(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    found = np.ones(CLASSES)
    for k in range(CLASSES):
        a, b = predicted == k, reference == k
        if total := np.count_nonzero(a) + np.count_nonzero(b):
            found[k] = 2 * np.count_nonzero(a & b) / total
    return found


WAYS = {"medvlm": medvlm, "loop": loop, "labels": labels, "one-hot": one_hot}


def measure_memory(name: str) -> int:
    WAYS[name](*label_maps((20, 20, 20)))  # imports and caches are not what is measured
    maps = np.zeros((2, *SIZE), np.uint8)  # drawing uneven maps would raise the mark before it is read
    maps[:, :, 100:200] = 3
    gc.collect()
    before = high_water()
    WAYS[name](*maps)
    return high_water() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--ways", nargs="+", choices=list(FLOORS), default=list(FLOORS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    if args.memory_of:
        print(measure_memory(args.memory_of))
        return
    maps = label_maps()
    ours = partial(medvlm, *maps)
    mine = ours()
    control = pairs(ours, ours, args.pairs)
    print(heading(f"{CLASSES} classes, {SIZE}", control))
    print("| way | seconds | times ours (10-90 %) | floor | peak MB | largest difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    found = {}
    for name, way in ((n, WAYS[n]) for n in ("medvlm", *args.ways)):
        row = {"memory": alone(__file__, "--memory-of", name), "difference": float(np.abs(way(*maps) - mine).max())}
        if name == "medvlm":
            row["seconds"] = control["ours"]
        else:
            row |= pairs(ours, partial(way, *maps), args.pairs if name == "loop" else min(5, args.pairs))
        found[name] = row
        gate = "" if row["difference"] <= EQUAL else " NO"
        print(f"| {name} | {row['seconds']:.3f} | {ratio_text(row)} | {FLOORS.get(name, '')} | {row['memory'] / 1e6:.0f} | {row['difference']:.1e}{gate} |", flush=True)
    print(f"memory: {found['medvlm']['memory'] / maps[0].nbytes:.1f} times one label map, at most {MEMORY_FLOOR:.0f}")
    record({"classes": CLASSES, "size": SIZE, "control": control, "ways": found}, args.json)


if __name__ == "__main__":
    main()
