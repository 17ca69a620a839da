"""How fast NSD and HD95 of two masks of 200 x 320 x 320 voxels are, beside MONAI and DeepMind's surface-distance.

``organ``: an uneven ellipsoid of about 1.3 million voxels against one drawn a little differently; ``lesion``: one of 600 voxels
against itself moved by a voxel. Voxels of 2.5 x 0.8 x 0.8 mm. Each side computes NSD at 1 mm and HD95: MONAI with its two
functions, surface-distance and medvlm with the distances once. Rules: pairs.py. Both numbers must agree to 1e-6 (single
precision: relative) before any time counts.

    pip install surface-distance
    python benchmarks/surfaces.py [--pairs 11] [--json FILE]
"""

import argparse
import os
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from pairs import heading, pairs, ratio_text, record
from scipy.ndimage import zoom

from medvlm.evaluate.surfaces import surfaces

SIZE, SPACING, TOLERANCE = (200, 320, 320), (2.5, 0.8, 0.8), 1.0
FLOORS = {("organ", "monai"): 10.0, ("lesion", "monai"): 40.0, ("organ", "surface-distance"): 1.5, ("lesion", "surface-distance"): 1.0}


def ellipsoid(centre, radii, *bumps: float) -> np.ndarray:
    """A filled ellipsoid whose surface smooth fields move in and out, each by so much of the radius squared."""
    grid = np.ogrid[tuple(slice(n) for n in SIZE)]
    field = sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, radii))
    for seed, much in enumerate(bumps):
        field = field + much * zoom(np.random.default_rng(seed).normal(size=[n // 20 for n in SIZE]), 20, order=1)
    return field < 1


def masks(what: str) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, reference)."""
    if what == "organ":
        return ellipsoid((100, 160, 150), (55, 80, 70), 0.1, 0.08), ellipsoid((100, 160, 150), (55, 80, 70), 0.1)
    return ellipsoid((60, 200, 101), (4, 6, 6)), ellipsoid((60, 200, 100), (4, 6, 6))


def medvlm(kind: str, predicted: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    found = surfaces(predicted, reference, SPACING, kind)
    return found.nsd(TOLERANCE), found.hausdorff(95)


def monai(predicted: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    a, b = torch.from_numpy(predicted)[None, None], torch.from_numpy(reference)[None, None]
    return (compute_surface_dice(a, b, [TOLERANCE], include_background=True, spacing=list(SPACING)).item(),
            compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=list(SPACING)).item())  # fmt: skip


def deepmind(predicted: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    from surface_distance import metrics

    found = metrics.compute_surface_distances(reference, predicted, SPACING)
    return metrics.compute_surface_dice_at_tolerance(found, TOLERANCE), metrics.compute_robust_hausdorff(found, 95)


PEERS = {"monai": ("voxel", monai), "surface-distance": ("surfel", deepmind)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")  # both peers call scipy and themselves by old names
    found = {}
    for what in ("organ", "lesion"):
        pair = masks(what)
        ours = partial(medvlm, "voxel", *pair)
        control = pairs(ours, ours, args.pairs)
        print(heading(f"{what}: {pair[0].sum()} and {pair[1].sum()} voxels", control))
        print("| peer | surfaces | peer, ms | medvlm, ms | times (10-90 %) | floor | NSD | HD95, mm | equal |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for peer, (kind, way) in PEERS.items():
            mine, theirs = medvlm(kind, *pair), way(*pair)
            equal = bool(np.allclose(mine, theirs, rtol=1e-6, atol=1e-6))
            row = {"control": control, "nsd": mine[0], "hd95": mine[1], "equal": equal, **pairs(partial(medvlm, kind, *pair), partial(way, *pair), args.pairs)}
            found[f"{what} {peer}"] = row
            print(f"| {peer} | {kind} | {row['seconds'] * 1e3:.0f} | {row['ours'] * 1e3:.1f} | {ratio_text(row)} | {FLOORS[what, peer]} "
                  f"| {mine[0]:.4f} | {mine[1]:.3f} | {'yes' if equal else 'NO'} |")  # fmt: skip
    record({"size": SIZE, "spacing": SPACING, "ways": found}, args.json)


if __name__ == "__main__":
    main()
