"""Distances between the surfaces of two masks: NSD, Hausdorff percentiles and the average distance.

Two kinds of surface, which give different numbers on the same masks:

``voxel``: the voxels of a mask that touch its outside across a face; all count alike.
``surfel``: the corners between voxels where a mask begins or ends, each weighted by the area (2-D: length) of the surface
    that passes there.

What lies beyond the image is outside. Axes are taken as orthogonal.
Source: monai.metrics (voxel); Nikolov et al. 2021, J Med Internet Res 23:e26151, package surface-distance (surfel).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import permutations, product

import numpy as np

from ..errors import GeometryError, UsageError
from ..sample import box_of

KINDS = ("voxel", "surfel")
STEPS = 128
"""So many of the shortest steps on the grid are tried from a point before a search structure is asked."""
TREE_COST = 64
"""A point costs a k-d tree at worst about what so many voxels of the box cost a distance transform (measured)."""


@dataclass(frozen=True, eq=False)
class Surfaces:
    """Distances from each element of one surface to the nearest of the other, in the unit of the spacing.

    predicted: (P,) from the prediction's elements; reference: (R,) from the reference's. predicted_size, reference_size: how
    much of its surface an element is. Infinite where the other mask is empty; no elements where a mask is empty itself.
    """

    kind: str
    predicted: np.ndarray
    reference: np.ndarray
    predicted_size: np.ndarray
    reference_size: np.ndarray

    def nsd(self, tolerance: float) -> float:
        """Normalised surface Dice: the share of both surfaces that lies within ``tolerance`` of the other; NaN for two empty masks.

        Distances of voxels are compared in single precision, as MONAI does: rounding does not decide a tie.
        """
        size = float(self.predicted_size.sum() + self.reference_size.sum())
        number = np.float32 if self.kind == "voxel" else np.float64
        near = [float(s[d.astype(number) <= number(tolerance)].sum()) for d, s in self._sides()]
        return sum(near) / size if size else float("nan")

    def hausdorff(self, percent: float = 95) -> float:
        """The larger of the two directed percentiles; NaN where a mask is empty.

        voxel: interpolated between neighbours in rank. surfel: the distance at which ``percent`` of the area is reached.
        """
        if not len(self.predicted) or not len(self.reference):
            return float("nan")
        if self.kind == "voxel":
            return max(float(np.percentile(d, percent)) for d, _ in self._sides())
        return max(_reached(d, s, percent / 100) for d, s in self._sides())

    def average(self) -> float:
        """ASSD: the mean distance over both surfaces together; NaN where a mask is empty."""
        if not len(self.predicted) or not len(self.reference):
            return float("nan")
        return sum(float((d * s).sum()) for d, s in self._sides()) / sum(float(s.sum()) for _, s in self._sides())

    def _sides(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        return (self.predicted, self.predicted_size), (self.reference, self.reference_size)


def surfaces(predicted: np.ndarray, reference: np.ndarray, spacing: Sequence[float] | None = None, kind: str = "voxel") -> Surfaces:
    """The surfaces of two masks of one grid.

    Args:
        predicted, reference: (H, W) or (D, H, W); what is not zero is inside.
        spacing: mm along each axis, or None for distances in pixels.
        kind: one of ``KINDS``.

    Raises:
        GeometryError: GRID_MISMATCH. UsageError: BAD_ARGUMENT for another rank, kind or spacing.
    """
    a, b = np.asarray(predicted, bool), np.asarray(reference, bool)
    if a.shape != b.shape:
        raise GeometryError(f"the predicted mask is {a.shape} but the reference is {b.shape}", "GRID_MISMATCH")
    step = np.ones(a.ndim) if spacing is None else np.asarray(spacing, float)
    if a.ndim not in (2, 3) or step.shape != (a.ndim,) or not ((step > 0) & np.isfinite(step)).all() or kind not in KINDS:
        raise UsageError(f"no {kind!r} surfaces of masks {a.shape} with spacing {spacing}: give (H, W) or (D, H, W), a spacing > 0 an axis "
                         f"and one of {', '.join(KINDS)}", "BAD_ARGUMENT")  # fmt: skip
    boxes = [box for box in (box_of(a), box_of(b)) if box]
    if not boxes:
        return Surfaces(kind, *(np.zeros(0) for _ in range(4)))
    crop = tuple(slice(min(low), max(high)) for low, high in zip(zip(*(box[0] for box in boxes)), zip(*(box[1] for box in boxes))))
    offsets, _ = _steps(tuple(step))
    around = [(n + 1, n + 1) for n in np.abs(offsets).max(0)]  # no step from a surface leaves the array
    masks = [np.pad(np.ascontiguousarray(m[crop]), around) for m in (a, b)]
    if kind == "voxel":
        edges = [_faces(m) for m in masks]
        places = [np.flatnonzero(e) for e in edges]
        sizes = [np.ones(len(p)) for p in places]
    else:
        codes = [_corners(m) for m in masks]
        edges = [(c != 0) & (c != 2**2**a.ndim - 1) for c in codes]
        places = [np.flatnonzero(e) for e in edges]
        table = _areas(step) if a.ndim == 3 else _lengths(step)
        sizes = [table[c.ravel()[p]] for c, p in zip(codes, places)]
    return Surfaces(kind, _nearest(places[0], places[1], edges[1], step), _nearest(places[1], places[0], edges[0], step), *sizes)


def _reached(distances: np.ndarray, sizes: np.ndarray, share: float) -> float:
    order = np.argsort(distances, kind="stable")
    reached = np.cumsum(sizes[order]) / sizes.sum()
    return float(distances[order][min(np.searchsorted(reached, share), len(order) - 1)])


def _along(axis: int, part: slice, rank: int) -> tuple[slice, ...]:
    return tuple(part if i == axis % rank else slice(None) for i in range(rank))


def _faces(mask: np.ndarray) -> np.ndarray:
    """The voxels with a face to the outside; the array's own edge is outside already."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        low, high = _along(axis, slice(None, -1), mask.ndim), _along(axis, slice(1, None), mask.ndim)
        inner[high] &= mask[low]
        inner[low] &= mask[high]
    return mask & ~inner


def _corners(mask: np.ndarray) -> np.ndarray:
    """uint8, one less along each axis: which of the 4 or 8 voxels around a corner are inside, the first in the highest bit."""
    code = mask.view(np.uint8)
    for k in range(mask.ndim):
        axis = -1 - k
        code = (code[_along(axis, slice(None, -1), mask.ndim)] << 2**k) | code[_along(axis, slice(1, None), mask.ndim)]
    return code


@lru_cache(maxsize=64)
def _steps(step: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """((STEPS, rank) the shortest steps on the grid, shortest first, (STEPS,) their lengths)."""
    radius = (STEPS * np.prod(step)) ** (1 / len(step))
    while True:
        sides = [np.arange(-int(radius / s), int(radius / s) + 1) for s in step]  # all steps up to the radius are among these
        offsets = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, len(step))
        lengths = _length(offsets, step)
        if (lengths <= radius).sum() >= STEPS:
            order = np.argsort(lengths, kind="stable")[:STEPS]
            return offsets[order], lengths[order]
        radius *= 2


def _length(offsets: np.ndarray, step: Sequence[float]) -> np.ndarray:
    """mm of (N, rank) whole steps; by one sum, so that no way of finding the nearest leaves its own rounding."""
    return np.sqrt(sum((offsets[:, i] * s) ** 2 for i, s in enumerate(step)))


def _nearest(places: np.ndarray, others: np.ndarray, other: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Distance of each of the ``places`` (flat indices into ``other``'s array) to the nearest true element of ``other``.

    Surfaces that are compared mostly lie close together, so the shortest steps are tried first; what is further away is
    looked up in a k-d tree, or a distance transform where that is cheaper.
    """
    found = np.full(len(places), np.inf)
    if not len(others):
        return found
    offsets, lengths = _steps(tuple(step))
    flat, left, at = other.ravel(), np.arange(len(places)), places
    shifts = offsets @ [math.prod(other.shape[i + 1 :]) for i in range(other.ndim)]
    for shift, length in zip(shifts[: 1 + len(places) // 40].tolist(), lengths.tolist()):
        hit = flat[at + shift]
        if hit.any():
            found[left[hit]] = length
            left, at = left[~hit], at[~hit]
    if not len(left):
        return found
    points = np.stack(np.unravel_index(at, other.shape), 1)
    if TREE_COST * len(points) > other.size:
        from scipy.ndimage import distance_transform_edt

        nearest = distance_transform_edt(~other, sampling=step, return_distances=False, return_indices=True)[(slice(None), *points.T)].T
    else:
        from scipy.spatial import cKDTree

        there = np.stack(np.unravel_index(others, other.shape), 1)
        nearest = there[cKDTree(there * step, leafsize=32, balanced_tree=False).query(points * step)[1]]
    found[left] = _length(points - nearest, step)
    return found


SHAPES = {
    1: {(1, 1, 1): 0.125},
    3: {(1, 1, 0): 0.5},
    6: {(1, 1, 1): 0.25},
    7: {(1, 0, 0): 0.5, (1, 1, 1): 0.375},
    15: {(1, 0, 0): 1.0},
    22: {(1, 1, 1): 0.375},
    23: {(1, 1, 1): 0.75},
    24: {(1, 1, 1): 0.25},
    25: {(0, 1, 1): 0.5, (1, 1, 1): 0.125},
    27: {(0, 1, 1): 0.25, (1, 0, 1): 0.25, (1, 1, 1): 0.5},
    30: {(1, 0, 0): 0.5, (1, 1, 1): 0.5},
    60: {(1, 1, 0): 1.0},
    105: {(1, 1, 1): 0.5},
}
"""{one code of each way in which a surface can pass between 8 voxels: {normal: how much of it}}; the other codes are these
turned, mirrored or inside out. Source: the triangles of marching cubes as surface-distance (``lookup_tables``) counts them.
"""


@cache
def _shapes() -> tuple[tuple[tuple[int, ...], ...], np.ndarray]:
    """(normals, (256, normals) how much of each normal a code has)."""
    normals = tuple(n for n in product((0, 1), repeat=3) if any(n))
    table = np.zeros((256, len(normals)))
    weight = 1 << np.arange(8)[::-1]
    for code, parts in SHAPES.items():
        cell = (code // weight % 2).reshape(2, 2, 2)
        for turn, mirrored in product(permutations(range(3)), product((0, 1), repeat=3)):
            turned = np.flip(cell.transpose(turn), [i for i in range(3) if mirrored[i]])
            row = np.zeros(len(normals))
            for normal, much in parts.items():
                row[normals.index(tuple(normal[i] for i in turn))] = much
            there = int((turned.ravel() * weight).sum())
            table[there] = table[255 - there] = row
    return normals, table


def _areas(step: np.ndarray) -> np.ndarray:
    """(256,) mm² of surface by code."""
    normals, much = _shapes()
    faces = np.array([step[1] * step[2], step[0] * step[2], step[0] * step[1]])
    return much @ np.linalg.norm(np.array(normals) * faces, axis=1)


def _lengths(step: np.ndarray) -> np.ndarray:
    """(16,) mm of contour by code: a corner cut off, a straight side, or two corners."""
    h, w = step
    cut = np.hypot(h, w) / 2
    return np.array([0, cut, cut, w, cut, h, 2 * cut, cut, cut, 2 * cut, h, cut, w, cut, cut, 0])
