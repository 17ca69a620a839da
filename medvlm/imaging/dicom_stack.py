"""Frames to volumes: which frames of a series belong together, in what order, and whether they fill space evenly.

World = LPS mm. Slices are ordered along the normal (row direction x column direction), never by name or number.
A stack that is not even is refused; policy "fill" and "resample" mend it and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import FileError, GeometryError, MedVLMError
from .dicom_header import Header

EVEN = 0.01
"""Slices count as evenly spaced when no distance departs further than this share from the usual one."""
SAME_MM = 1e-3
"""Slices count as lying in one place when they are no further apart (mm)."""
SAME_COSINE = 1e-4
"""Directions are one when no component differs further: 0.05 mm at the edge of a 500 mm field."""
UNIT = 1e-3
"""Directions this far from two perpendicular vectors of length 1 are rounded; further, they are wrong."""
POLICIES = ("strict", "fill", "resample")
PHASES = (
    "EchoTime", "EchoNumbers", "EffectiveEchoTime", "TemporalPositionIdentifier", "TemporalPositionIndex", "AcquisitionNumber",
    "FrameAcquisitionNumber", "StackID", "DiffusionBValue", "DiffusionGradientOrientation", "ImageType", "FrameType", "TriggerTime",
    "NominalCardiacTriggerDelayTime", "FrameReferenceTime", "InversionTime", "FlipAngle", "DimensionIndexValues",
)  # fmt: skip
"""What may tell apart frames that lie in the same place, in the order it is tried."""


class Slice:
    """One frame: its header, its number in the file (from 0), position (3,) and directions (6,) or None.

    ``doubt`` says why the place of a picture that needs none was not believed; a slice of a volume is refused instead.
    """

    __slots__ = ("cosines", "doubt", "head", "number", "position")

    def __init__(self, head: Header, number: int, strict: bool):
        self.head, self.number, self.doubt, self.position, self.cosines = head, number, None, None, None
        try:
            position, cosines = _vector(head, "ImagePositionPatient", 3), _vector(head, "ImageOrientationPatient", 6)
            if position and cosines:
                self.position, self.cosines = position, _unit(cosines)
        except MedVLMError as error:
            if strict:
                raise
            self.doubt = error.message

    @property
    def order(self):
        """Sorts slices of unknown place the same way whatever their file names are."""
        return self.head.count("InstanceNumber") or 0, self.head.text("SOPInstanceUID"), self.number


class Stack:
    """Slices in space.

    Attributes:
        slices: sorted along the normal.
        affine: (4, 4), index (d, h, w, 1) -> LPS mm of the grid that is delivered.
        planes: for each plane of that grid (slice before, slice after, weight of the one after), or None where it is filled.
        warnings: "CODE: text".
        tilt: angle between the stacking direction and the normal (degrees).
    """

    def __init__(self, slices, affine, planes, warnings, tilt):
        self.slices, self.affine, self.planes, self.warnings, self.tilt = slices, affine, planes, warnings, tilt

    @property
    def plain(self) -> bool:
        return self.planes == [(i, i, 0.0) for i in range(len(self.slices))]


def _vector(head: Header, name: str, size: int) -> tuple[float, ...] | None:
    values = head.numbers(name)
    if values and len(values) != size:
        raise FileError(f"{name} has {len(values)} values, not {size}", "BAD_VALUE")
    return values or None


def _unit(cosines: tuple[float, ...]) -> tuple[float, ...]:
    """Directions of exactly unit length, or BAD_ORIENTATION when they are not two perpendicular unit vectors."""
    a, b, c, d, e, f = cosines
    row, column, skew = a * a + b * b + c * c, d * d + e * e + f * f, a * d + b * e + c * f
    if max(abs(row**0.5 - 1), abs(column**0.5 - 1), abs(skew)) > UNIT:
        raise GeometryError(f"ImageOrientationPatient is {list(cosines)}, not two perpendicular directions of length 1", "BAD_ORIENTATION")
    row, column = row**0.5, column**0.5
    return a / row, b / row, c / row, d / column, e / column, f / column


def normal(cosines) -> np.ndarray:
    """(3,) row direction x column direction."""
    return np.cross(cosines[:3], cosines[3:])


def spacing(head: Header) -> tuple[float, float] | None:
    """(H, W) mm of PixelSpacing, None when absent.

    Raises:
        GeometryError: BAD_SPACING when it is no pair of plausible positive numbers.
    """
    values = head.numbers("PixelSpacing", "BAD_SPACING")
    return check_spacing(values, "PixelSpacing") if values else None


def check_spacing(values, name: str) -> tuple[float, float]:
    if len(values) != 2 or not all(1e-5 <= v <= 100 for v in values):
        raise GeometryError(f"{name} is {' x '.join(f'{v:g}' for v in values)} mm", "BAD_SPACING")
    return values[0], values[1]


def plane_affine(slice: Slice, mm: tuple[float, float]) -> np.ndarray:
    """(4, 4) of one slice; D steps by the slice thickness (1 mm where it is unknown) along the normal."""
    thickness = (slice.head.numbers("SliceThickness") or (0.0,))[0]
    affine = np.eye(4)
    affine[:3, 0] = normal(slice.cosines) * (thickness if thickness > 0 else 1.0)
    affine[:3, 1] = np.multiply(slice.cosines[3:], mm[0])
    affine[:3, 2] = np.multiply(slice.cosines[:3], mm[1])
    affine[:3, 3] = slice.position
    return affine


def split(slices: Sequence[Slice]) -> tuple[list[tuple[list[Slice], dict]], list[str]]:
    """Frames of one series as stacks, each with what tells it apart ({attribute: value}), and warnings.

    Localizers and stray slices of another orientation are set aside; orientations, echoes, time points, phases and
    acquisitions become stacks of their own.

    Raises:
        GeometryError: NO_POSITION when some slices have no place.
    """
    slices = sorted(slices, key=lambda s: s.order)
    lost = [i for i, s in enumerate(slices, 1) if s.position is None]
    if lost:
        which = "none" if len(lost) == len(slices) else f"all but slice {_list(lost)} (in the order of their numbers)"
        raise GeometryError(f"of {len(slices)} slices {which} have a position and orientation", "NO_POSITION")
    warnings = []
    scouts = [s for s in slices if "LOCALIZER" in s.head.texts("ImageType")]
    if scouts and len(scouts) < len(slices):
        warnings.append(f"LOCALIZER: {len(scouts)} localizer(s) in a series of {len(slices)} slices were set aside")
        slices = [s for s in slices if s not in scouts]
    elif scouts:
        return [([s], {}) for s in slices], warnings
    clusters: list[list[Slice]] = []
    seen: dict[tuple, list[Slice]] = {}
    for s in slices:
        cluster = seen.get(s.cosines)
        if cluster is None:
            cluster = next((c for c in clusters if np.abs(np.subtract(c[0].cosines, s.cosines)).max() < SAME_COSINE), None)
            if cluster is None:
                clusters.append(cluster := [])
            seen[s.cosines] = cluster
        cluster.append(s)
    most = max(map(len, clusters))
    stray = [c for c in clusters if len(c) <= 2 and 3 * len(c) <= most]
    if stray:
        count = sum(map(len, stray))
        warnings.append(f"LOCALIZER: {count} slice(s) of another orientation in a series of {len(slices)} were set aside")
    clusters = sorted((c for c in clusters if c not in stray), key=lambda c: c[0].order)
    return [part for cluster in clusters for part in _phases(cluster, {})], warnings


def _phases(slices: list[Slice], told: dict) -> list[tuple[list[Slice], dict]]:
    """Slices that share places, split by the first attribute that tells them apart."""
    along = np.array([s.position for s in slices]) @ normal(slices[0].cosines)
    by_place = np.argsort(along, kind="stable")
    place = np.empty(len(slices), int)
    place[by_place] = np.concatenate([[0], np.cumsum(np.diff(along[by_place]) > SAME_MM)])
    places = place.max() + 1
    twice = places < len(slices)
    if not twice and not (slices[0].head.text("Modality") == "CT" and _interleaved(slices, along)):
        return [(slices, told)]
    for name in PHASES if twice else ("AcquisitionNumber",):
        parts: dict[bytes, list[int]] = {}
        for i, s in enumerate(slices):
            parts.setdefault(s.head.raw(name).strip(b"\0 "), []).append(i)
        fewer = sum(len(set(place[part])) for part in parts.values()) > places or not twice
        whole = all(len(part) >= 3 or 2 * len(part) > places for part in parts.values())
        if len(parts) == 1 or not fewer or not whole:
            continue
        labels = {key: _label(slices[part[0]].head, name) for key, part in parts.items()}
        keys = sorted(parts, key=lambda key: (labels[key], slices[parts[key][0]].order))
        return [found for key in keys for found in _phases([slices[i] for i in parts[key]], {**told, name: _shown(labels[key])})]
    return [(slices, told)]


def _label(head: Header, name: str) -> tuple:
    return head.texts(name) if name in ("ImageType", "FrameType", "StackID") else head.numbers(name)


def _shown(label: tuple):
    return label[0] if len(label) == 1 else list(label)


def _interleaved(slices: list[Slice], along: np.ndarray) -> bool:
    """Whether acquisitions overlap in space without sharing a place: merged they would look like one finer scan."""
    runs: dict[bytes, list[float]] = {}
    for s, at in zip(slices, along):
        runs.setdefault(s.head.raw("AcquisitionNumber").strip(b"\0 "), []).append(at)
    if len(runs) < 2 or min(map(len, runs.values())) < 3:
        return False
    ends = sorted((min(r), max(r)) for r in runs.values())
    return any(later[0] < earlier[1] for earlier, later in zip(ends, ends[1:]))


def arrange(slices: list[Slice], policy: str, same: Callable[[Slice, Slice], bool], fill: str = "empty") -> Stack:
    """Slices of one orientation as a stack on an even grid, D growing along the normal.

    same: whether two slices in one place hold the same pixels.

    Raises:
        GeometryError: MIXED_SIZE, MIXED_FRAME, BAD_SPACING, DUPLICATE, GAP, UNEVEN_SPACING.
    """
    direction = normal(slices[0].cosines)
    slices = sorted(slices, key=lambda s: (float(np.dot(s.position, direction)), s.order))
    points = np.array([s.position for s in slices])
    along = points @ direction
    warnings: list[str] = []

    def odd(values: list, what: str, code: str, show=str) -> None:
        usual = max(set(values), key=lambda v: (values.count(v), str(v)))
        if strays := [i for i, v in enumerate(values) if v != usual]:
            raise GeometryError(f"of {len(slices)} slices {_places(strays, along)} {what(show(values[strays[0]]), show(usual))}", code)

    odd([(s.head.raw("Rows"), s.head.raw("Columns")) for s in slices], lambda a, b: f"have {a} pixels, the others {b}", "MIXED_SIZE",
        lambda v: " x ".join(str(int.from_bytes(n, "little" if slices[0].head.file.little else "big")) for n in v))  # fmt: skip
    odd([s.head.text("FrameOfReferenceUID") for s in slices], lambda a, b: "lie in another frame of reference than the others", "MIXED_FRAME")
    mm = [spacing(s.head) for s in slices]
    if None in mm:
        raise GeometryError(f"of {len(slices)} slices {_places([i for i, v in enumerate(mm) if v is None], along)} have no PixelSpacing", "BAD_SPACING")
    odd([tuple(round(v, 6) for v in pair) for pair in mm], lambda a, b: f"have pixels of {a} mm, the others {b} mm", "BAD_SPACING",
        lambda v: " x ".join(f"{n:g}" for n in v))  # fmt: skip

    keep, dropped = [0], []
    for i in range(1, len(slices)):
        last = keep[-1]
        if along[i] - along[last] > SAME_MM:
            keep.append(i)
        elif np.abs(points[i] - points[last]).max() <= SAME_MM and same(slices[last], slices[i]):
            dropped.append(i)
        else:
            raise GeometryError(f"two different slices lie in one place: {_places([last, i], along)} of {len(slices)}", "DUPLICATE")
    if dropped:
        warnings.append(f"DUPLICATE: {len(dropped)} slice(s) that repeat another pixel for pixel were left out: {_places(dropped, along)}")
    slices, points, along = [slices[i] for i in keep], points[keep], along[keep]
    count, total = len(slices), along[-1] - along[0]
    planes: list = [(i, i, 0.0) for i in range(count)]
    affine = plane_affine(slices[0], mm[0])
    if count == 1:
        return Stack(slices, affine, planes, warnings, 0.0)

    line = points[0] + np.outer((along - along[0]) / total, points[-1] - points[0])
    steps = np.diff(along)
    usual = float(np.sort(steps)[(count - 2) // 2])
    aside = float(np.linalg.norm(points - line, axis=1).max())
    if aside > max(EVEN * usual, SAME_MM):
        raise GeometryError(f"{count} slices are shifted sideways against each other by up to {aside:.2f} mm", "UNEVEN_SPACING",
                            "no volume can be built without moving pixels; read the slices one by one")  # fmt: skip
    tilt = float(np.degrees(np.arccos(np.clip(total / np.linalg.norm(points[-1] - points[0]), -1, 1))))
    if tilt > 0.1:
        warnings.append(f"TILT: the stack leans by {tilt:.1f} degrees; the affine keeps the shear")
    last = count - 1
    drift = np.abs(along - along[0] - np.arange(count) * (total / last)).max()
    if np.abs(steps * last / total - 1).max() > EVEN or drift > 2 * EVEN * usual:
        said, code, at = _uneven(along, steps, usual)
        if policy == "strict" or (policy == "fill" and code != "GAP"):
            raise GeometryError(said, code)
        if policy == "fill":
            last = int(at[-1])
            planes = [None] * (last + 1)
            for i, k in enumerate(at):
                planes[k] = (i, i, 0.0)
            warnings.append(f"{code}: {said}; {last + 1 - count} {fill} slice(s) were filled in")
        else:
            last = max(1, int(round(total / usual)))
            planes = _between(along, last)
            warnings.append(f"{code}: {said}; interpolated onto {last + 1} slices {total / last:.3f} mm apart")
    affine[:3, 0] = (points[-1] - points[0]) / last
    return Stack(slices, affine, planes, warnings, tilt)


def _uneven(along, steps, usual) -> tuple[str, str, np.ndarray]:
    """What to say about uneven slices, GAP or UNEVEN_SPACING, and the place of each slice on the grid of ``usual`` steps."""
    whole = np.round(steps / usual)
    at = np.concatenate([[0], np.cumsum(whole)]).astype(int)
    unit = (along[-1] - along[0]) / at[-1] if at[-1] else usual
    wide = [i for i in np.flatnonzero(whole > 1)]
    if wide and np.abs(along - along[0] - at * unit).max() <= 2 * EVEN * usual:
        where = "; ".join(f"{int(whole[i]) - 1} between slice {i + 1} ({along[i]:.2f} mm) and slice {i + 2} ({along[i + 1]:.2f} mm)" for i in wide[:5])
        more = f" and {len(wide) - 5} more places" if len(wide) > 5 else ""
        return f"of slices {unit:.3f} mm apart some are missing: {where}{more}", "GAP", at
    far = [i for i in np.flatnonzero(np.abs(steps / usual - 1) > EVEN)] or [int(np.argmax(np.abs(steps - usual)))]
    where = "; ".join(f"{steps[i]:.3f} mm between slice {i + 1} ({along[i]:.2f} mm) and slice {i + 2}" for i in far[:5])
    more = f" and {len(far) - 5} more places" if len(far) > 5 else ""
    return f"{len(along)} slices are usually {usual:.3f} mm apart, but {where}{more}", "UNEVEN_SPACING", at


def _between(along, last) -> list[tuple[int, int, float]]:
    """For each of ``last`` + 1 even planes the slices on its two sides and the weight of the second."""
    want = np.linspace(along[0], along[-1], last + 1)
    after = np.clip(np.searchsorted(along, want), 1, len(along) - 1)
    weight = np.clip((want - along[after - 1]) / (along[after] - along[after - 1]), 0, 1)
    near = [(int(b) - 1, int(b), float(w)) for b, w in zip(after, weight)]
    return [(a, a, 0.0) if w < 1e-6 else (b, b, 0.0) if w > 1 - 1e-6 else (a, b, w) for a, b, w in near]


def _places(which: list[int], along) -> str:
    shown = ", ".join(f"{i + 1} ({along[i]:.2f} mm)" for i in which[:8])
    return f"slice {shown}" + (f" and {len(which) - 8} more" if len(which) > 8 else "")


def _list(which: list[int]) -> str:
    return ", ".join(map(str, which[:12])) + (f" and {len(which) - 12} more" if len(which) > 12 else "")
