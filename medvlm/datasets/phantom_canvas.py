"""A canvas of points in a patient, on which smooth organs are painted one over the other: eggs, tubes and whatever has a distance.

Points are millimetres (z to the head, y to the back, x to the patient's left), so arrays lie in "SPL". Organs bear the names and
numbers of TotalSegmentator's label map, where it has them.

Source of names: wasserth/TotalSegmentator, totalsegmentator/map_to_binary.py ("total"; of the head "head_glands_cavities").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

NAMES = {
    1: "spleen", 2: "kidney_right", 3: "kidney_left", 4: "gallbladder", 5: "liver", 6: "stomach", 7: "pancreas", 8: "adrenal_gland_right",
    9: "adrenal_gland_left", 10: "lung_upper_lobe_left", 11: "lung_lower_lobe_left", 12: "lung_upper_lobe_right", 13: "lung_middle_lobe_right",
    14: "lung_lower_lobe_right", 15: "esophagus", 16: "trachea", 18: "small_bowel", 20: "colon", 21: "urinary_bladder", 25: "sacrum",
    **{n: f"vertebrae_{v}" for n, v in zip(range(27, 51), [f"L{i}" for i in range(5, 0, -1)] + [f"T{i}" for i in range(12, 0, -1)]
                                           + [f"C{i}" for i in range(7, 0, -1)])},
    51: "heart", 52: "aorta", 62: "superior_vena_cava", 63: "inferior_vena_cava", 69: "humerus_left", 70: "humerus_right", 71: "scapula_left",
    72: "scapula_right", 73: "clavicula_left", 74: "clavicula_right", 75: "femur_left", 76: "femur_right", 77: "hip_left", 78: "hip_right",
    79: "spinal_cord", 86: "autochthon_left", 87: "autochthon_right", 88: "iliopsoas_left", 89: "iliopsoas_right", 90: "brain", 91: "skull",
    **{91 + i: f"rib_left_{i}" for i in range(1, 13)}, **{103 + i: f"rib_right_{i}" for i in range(1, 13)}, 116: "sternum",
    117: "costal_cartilages", 141: "eye_left", 142: "eye_right", 143: "mandible", 144: "sinus_maxillary", 145: "sinus_frontal",
    146: "lateral_ventricle_left", 147: "lateral_ventricle_right", 201: "consolidation", 202: "ground-glass opacity", 203: "pleural effusion",
    204: "pneumothorax", 205: "nodule", 206: "mass", 207: "liver lesion", 208: "kidney stone", 209: "kidney cyst", 210: "hemorrhage",
}  # fmt: skip
"""{number in a label map: name}. The tissues below have a number and no name; grey and white matter are the brain."""
ID = {name: number for number, name in NAMES.items()}
FAT, MUSCLE, SOFT, BONE, VESSEL, FLUID, GREY, WHITE = range(120, 128)
LUNGS = {"right": (12, 13, 14), "left": (10, 11)}
SIGN = {"right": -1, "left": 1}


class Canvas:
    """What is painted. points: (3, D, H, W), mm z, y, x; step: mm between neighbours along D, H, W; hu; tissue: number at each point.

    Distances are counted in steps, so that edges blend over one voxel whatever its shape.
    """

    def __init__(self, points: np.ndarray, step: Sequence[float]):
        self.points, self.step = points, np.asarray(step, np.float32)
        self.hu, self.tissue = np.full(points.shape[1:], -1000, np.float32), np.zeros(points.shape[1:], np.uint8)
        self._range = [(a.min(o), a.max(o)) for a, o in zip(points, ((1, 2), (0, 2), (0, 1)))]

    def near(self, low: Sequence[float], high: Sequence[float]) -> tuple[slice, ...] | None:
        """The block that holds all points between two corners, None where there are none."""
        found = []
        for (least, most), a, b, step in zip(self._range, low, high, self.step):
            where = np.flatnonzero((most > a - step) & (least < b + step))
            if not len(where):
                return None
            found.append(slice(where[0], where[-1] + 1))
        return tuple(found)

    def paint(self, block: tuple[slice | np.ndarray, ...] | None, far: np.ndarray, hu: float | np.ndarray, number: int | np.ndarray | None = None,
              only: np.ndarray | None = None, share: float = 1.0) -> None:  # fmt: skip
        """Blend ``hu`` in where ``far`` (steps from the edge, negative inside) says so; ``share`` of what was there goes."""
        if block is None:
            return
        inside = np.clip(np.float32(0.5) - far, 0, 1)
        if only is not None:
            inside *= only
        values = self.hu[block]
        self.hu[block] = values + (inside if share == 1 else inside * np.float32(share)) * (hu - values)
        if number is not None:
            held = inside >= 0.5
            self.tissue[block] = np.where(held, np.uint8(number) if isinstance(number, int) else number, self.tissue[block])

    def among(self, block: tuple[slice | np.ndarray, ...], numbers: Iterable[int]) -> np.ndarray:
        """Which points of a block are of these tissues."""
        known = np.zeros(256, bool)
        known[list(numbers)] = True
        return known[self.tissue[block]]

    def blob(self, centre: Sequence[float], radii: Sequence[float], hu: float, number: int | None = None, *, turn: np.ndarray | None = None,
             power: int = 2, within: Iterable[int] | None = None, rough: float = 0, lot: np.random.Generator | None = None,
             share: float = 1.0, also: Callable | None = None) -> None:  # fmt: skip
        """An ellipsoid, or with ``power`` 4 a rounded box. rough: mm by which its edge wanders. also: (points) -> steps, to be inside of too."""
        reach = np.sqrt(((np.eye(3) if turn is None else turn) ** 2) @ np.square(radii)) * (1 if power == 2 else 1.3) + rough
        block = self.near(np.subtract(centre, reach), np.add(centre, reach))
        if block is None:
            return
        points = self.points[(slice(None), *block)]
        far = egg(points, self.step, centre, radii, turn, power)
        if rough:
            far = far + rough / float(self.step.mean()) * clouds(far.shape, lot, 0.35 * min(radii) / self.step)
        if also is not None:
            far = np.maximum(far, also(points))
        self.paint(block, far, hu, number, None if within is None else self.among(block, within), share)

    def tube(self, places: Sequence[Sequence[float]], radius: float | Sequence[float], hu: float, number: int | None = None,
             within: Iterable[int] | None = None) -> None:  # fmt: skip
        """A chain of rounded rods."""
        radius = np.broadcast_to(radius, len(places))
        for a, b, ra, rb in zip(np.array(places[:-1], np.float32), np.array(places[1:], np.float32), radius[:-1], radius[1:]):
            thick = max(ra, rb)
            block = self.near(np.minimum(a, b) - thick, np.maximum(a, b) + thick)
            if block is None:
                continue
            away = self.points[(slice(None), *block)] - a[:, None, None, None]
            along = np.clip(np.tensordot(b - a, away, 1) / max(float((b - a) @ (b - a)), 1e-6), 0, 1)
            away = away - (b - a)[:, None, None, None] * along
            square = away * away
            long = np.sqrt(square.sum(0)) + 1e-3
            far = (long - (ra + (rb - ra) * along)) * long / (np.sqrt(np.tensordot(self.step**2, square, 1)) + 1e-3)
            self.paint(block, far, hu, number, None if within is None else self.among(block, within))


def egg(points: np.ndarray, step: np.ndarray, centre: Sequence[float], radii: Sequence[float], turn: np.ndarray | None = None, power: int = 2) -> np.ndarray:
    """Steps from points to the edge of |p / r| = 1, negative inside: first order, by the slope at each point.

    Source: Taubin, Distance approximations for rasterizing implicit curves, ACM Transactions on Graphics 13 (1994).
    """
    away, radii = points - np.asarray(centre, np.float32)[:, None, None, None], np.asarray(radii, np.float32)
    if turn is not None:
        away, step = np.tensordot(turn.T.astype(np.float32), away, 1), np.sqrt((turn.T**2) @ step**2).astype(np.float32)
    unit = np.abs(away / radii[:, None, None, None])
    steep = unit if power == 2 else unit * unit * unit
    size = np.sqrt((unit * steep).sum(0))
    size = np.maximum(size if power == 2 else np.sqrt(size), np.float32(0.05))  # the slope vanishes in the middle
    slope = np.sqrt(np.tensordot((step / radii) ** 2, steep * steep, 1))
    flat = size if power == 2 else size * size * size
    return (size - 1) * flat / np.maximum(slope, flat * np.float32(0.5 * (step / radii).min()))


def clouds(shape: Sequence[int], lot: np.random.Generator, grain: Sequence[float] | float) -> np.ndarray:
    """Smooth noise around 0, of deviation 1 at its knots, which are ``grain`` steps apart along each axis; linear between them."""
    grain = np.maximum(np.broadcast_to(grain, len(shape)), 1)
    few = [math.ceil(n / g) + 1 for n, g in zip(shape, grain)]
    values = lot.standard_normal(few, np.float32)
    for axis, (n, m) in enumerate(zip(shape, few)):
        at = np.arange(n, dtype=np.float32)[:, None] * np.float32((m - 1) / n) - np.arange(m, dtype=np.float32)
        values = np.moveaxis(np.tensordot(np.maximum(1 - np.abs(at), 0), values, (1, axis)), 0, axis)
    return np.ascontiguousarray(values)


def turned_by(z: float = 0, y: float = 0, x: float = 0) -> np.ndarray:
    """Rotation of (z, y, x) vectors by degrees about each axis."""
    found = np.eye(3)
    for axis, angle in enumerate((z, y, x)):
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        i, j = (k for k in range(3) if k != axis)
        one = np.eye(3)
        one[i, i], one[i, j], one[j, i], one[j, j] = c, -s, s, c
        found = found @ one
    return found


def points_of(axes: Sequence[np.ndarray], lot: np.random.Generator, turn: np.ndarray, bend: float) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """((3, D, H, W) places z, y, x in the body of the places of a picture, bent smoothly by some mm and turned; the way back, of (3, N) places)."""
    waves = [(lot.uniform(75, 170), lot.uniform(0, 6.3)) for _ in range(6)]
    t = turn.astype(np.float32)

    def bends(z: np.ndarray, y: np.ndarray, x: np.ndarray) -> Iterator[np.ndarray]:
        for i, (b, c) in enumerate(((y, x), (z, x), (z, y))):
            yield np.float32(bend) * np.sin(b / waves[i][0] + waves[i][1]) * np.sin(c / waves[i + 3][0] + waves[i + 3][1])

    z, y, x = (a + b for a, b in zip(axes, bends(*axes)))
    points = np.stack([(t[i, 0] * z + t[i, 1] * y + t[i, 2] * x).astype(np.float32, copy=False) for i in range(3)])

    def back(places: np.ndarray) -> np.ndarray:
        bent = t.T @ places
        straight = bent - np.stack(list(bends(*bent)))
        return bent - np.stack(list(bends(*straight)))  # twice is near enough: it bends by far less than a wave

    return points, back
