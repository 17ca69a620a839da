"""Images and volumes with their place in the patient: the only file that flips or permutes axes.

World = DICOM patient space, LPS+ (x to the patient's Left, y to Posterior, z Superior), millimetres.
Arrays are (C, H, W) and (C, D, H, W). An index counts voxels in array order (d, h, w) and names voxel centres.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ChoiceError, GeometryError

GROWTH = (("L", "R"), ("P", "A"), ("S", "I"))
"""Letter of each world axis when an array axis grows with it, and when it grows against it."""

SAME_GRID_MM = 1e-3
"""Two grids are one when no corner lies further apart than this (mm)."""


class Lazy:
    """An array that is read when it is first used; ``shape`` and ``dtype`` are known from the header."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, load: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.load = tuple(shape), np.dtype(dtype), load


class _Scan:
    origin: Path | str | None = None
    """The file or folder that it came from, or the SHA-256 of what that held: tells equal images without decoding them."""

    def __init__(self, id: str, array: np.ndarray | Lazy, modality: str, unit: str, info: Mapping[str, Any] | None):
        self.id, self.modality, self.unit = id, modality, unit
        self.info: dict[str, Any] = dict(info or {})
        self.info.setdefault("warnings", [])
        self._array, self._source = array, array

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) or (C, D, H, W), without reading pixels."""
        return tuple(self._array.shape)

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    def _read(self) -> np.ndarray:
        if isinstance(self._array, Lazy):
            array = self._array.load()
            if array.shape != self._array.shape:
                raise GeometryError(
                    f"image {self.id}: the header says {self._array.shape} but the pixels are {array.shape}", "MIXED_SIZE"
                )
            self._array = array
        return self._array

    def release(self) -> None:
        """Let go of pixels that came from a file; they are read again when next used."""
        self._array = self._source

    def __repr__(self) -> str:
        spacing = "unknown" if self.spacing is None else " x ".join(f"{s:.4g}" for s in self.spacing) + " mm"
        size = " x ".join(str(n) for n in self.shape[1:])
        return f"<{type(self).__name__} {self.id}: {self.modality}, {size}, {spacing}, {self.unit}>"


class Image(_Scan):
    """A 2-D picture.

    Args:
        id: unique in its study, free of patient text.
        pixels: (C, H, W), C = 1 or 3; stored values after the modality LUT, never windowed.
        spacing: mm per pixel along (H, W), or None where it is not known (never 1.0).
        modality: xray, ct, mr, pet, fundus, pathology, ultrasound, endoscopy, dermoscopy, oct, other, unknown.
        unit: "HU", "raw" (scanner units) or "uint8" (display values 0..255, as in PNG and JPEG).
        info: what else the header says: windows, inverted (MONOCHROME1), laterality, view, body_part, burned_in,
            frame_of_reference, sop (source UIDs), affine (4, 4) where the slice has a place in the patient, warnings.
    """

    def __init__(self, id, pixels, spacing=None, modality="unknown", unit="raw", info=None):
        super().__init__(id, pixels, modality, unit, info)
        self.spacing: tuple[float, float] | None = None if spacing is None else (float(spacing[0]), float(spacing[1]))

    @property
    def pixels(self) -> np.ndarray:
        return self._read()

    def with_pixels(self, pixels: np.ndarray, **changes: Any) -> Image:
        """The same picture's place with other pixels of the same (H, W)."""
        if tuple(pixels.shape[1:]) != self.shape[1:]:
            raise GeometryError(f"image {self.id} is {self.shape} but the new pixels are {pixels.shape}", "GRID_MISMATCH")
        return Image(
            changes.get("id", self.id), pixels, self.spacing, self.modality, changes.get("unit", self.unit), self.info
        )


class Volume(_Scan):
    """A 3-D scan.

    Args:
        id, modality, unit, info: as for :class:`Image`; ``info["sop"]`` lists one source UID a slice.
        voxels: (C, D, H, W) after the modality LUT.
        affine: (4, 4), index (d, h, w, 1) -> mm LPS+. May be sheared (gantry tilt) and left-handed.

    Raises:
        GeometryError: BAD_AFFINE when the affine is not finite or not invertible.
    """

    def __init__(self, id, voxels, affine, modality="unknown", unit="raw", info=None):
        super().__init__(id, voxels, modality, unit, info)
        self.affine = check_affine(affine)

    @property
    def voxels(self) -> np.ndarray:
        return self._read()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm between neighbouring voxel centres along (D, H, W)."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def orientation(self) -> str:
        """Direction in which D, H and W grow, as letters: "SPL" = axial slices as a radiologist reads them."""
        return orientation(self.affine)

    def world(self, index) -> np.ndarray:
        """(..., 3) index (d, h, w) -> (..., 3) mm LPS+."""
        return np.asarray(index, float) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def index(self, world) -> np.ndarray:
        """(..., 3) mm LPS+ -> (..., 3) fractional index (d, h, w)."""
        return (np.asarray(world, float) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def with_voxels(self, voxels: np.ndarray, **changes: Any) -> Volume:
        """The same grid with other voxels (C may differ)."""
        if tuple(voxels.shape[1:]) != self.shape[1:]:
            raise GeometryError(f"volume {self.id} is {self.shape} but the new voxels are {voxels.shape}", "GRID_MISMATCH")
        return Volume(
            changes.get("id", self.id), voxels, self.affine, self.modality, changes.get("unit", self.unit), self.info
        )

    def same_grid(self, other: Volume, tolerance: float = SAME_GRID_MM) -> bool:
        """True when both grids have the same size and no corner differs by more than ``tolerance`` mm."""
        if self.shape[1:] != other.shape[1:]:
            return False
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape[1:]], indexing="ij")).reshape(3, -1).T
        return bool(np.abs(self.world(corners) - other.world(corners)).max() <= tolerance)

    def reorient(self, to: str = "SPL") -> Volume:
        """The same voxels with axes permuted and flipped so that D, H, W grow towards the letters of ``to``.

        No interpolation: an oblique or sheared volume gets the nearest order of axes and keeps its slant.
        """
        here = self.orientation
        order, signs = turn(here, to)
        if order == (0, 1, 2) and signs == (1, 1, 1):
            return self
        change = np.zeros((4, 4))
        change[3, 3] = 1
        for new, (old, sign) in enumerate(zip(order, signs)):
            change[old, new] = sign
            change[old, 3] = 0 if sign > 0 else self.shape[1 + old] - 1
        info = dict(self.info)
        if "sop" in info:  # one UID a slice holds only while D is still the slice axis
            info["sop"] = list(info["sop"])[:: signs[0]] if order[0] == 0 else []
        return Volume(self.id, turned(self.voxels, here, to), self.affine @ change, self.modality, self.unit, info)

    def resample(self, spacing: tuple[float, float, float], order: int = 1) -> Volume:
        """Onto a straight grid with this spacing (mm along D, H, W) that covers the same box.

        order: 0 nearest (masks), 1 linear, 3 cubic. A sheared volume is straightened: D is made perpendicular.
        """
        if len(spacing) != 3 or not np.all(np.isfinite(spacing)) or min(spacing) <= 0:
            raise GeometryError(f"cannot resample volume {self.id} to a spacing of {spacing} mm", "BAD_SPACING")
        straight = _orthogonal(self.affine[:3, :3])
        corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in self.shape[1:]], indexing="ij")).reshape(3, -1).T
        reach = self.world(corners) @ straight
        low, high = reach.min(0), reach.max(0)
        size = tuple(max(1, int(round((h - l) / s))) for l, h, s in zip(low, high, spacing))
        affine = np.eye(4)
        affine[:3, :3] = straight * np.asarray(spacing)
        centre = (low + high) / 2
        first = centre - (np.array(size) - 1) / 2 * np.asarray(spacing)
        affine[:3, 3] = straight @ first
        return self._sample(size, affine, order)

    def onto(self, other: Volume, order: int = 1, outside: float | None = None) -> Volume:
        """Onto the grid of ``other`` through world coordinates.

        outside: value where ``other`` reaches beyond this volume's voxels; the minimum of this volume when None (0 for masks).
        """
        if self.same_grid(other):
            return self.with_voxels(self.voxels)
        return self._sample(other.shape[1:], other.affine, order, outside)

    def _sample(self, size, affine, order, outside=None) -> Volume:
        from scipy.ndimage import affine_transform

        matrix = np.linalg.inv(self.affine) @ affine
        if outside is None:
            outside = 0 if order == 0 or self.voxels.dtype == bool else float(self.voxels.min())
        source = self.voxels.astype(np.uint8) if self.voxels.dtype == bool else self.voxels
        kind = source.dtype if order == 0 else np.result_type(source.dtype, np.float32)
        # a voxel reaches half a step to each side of its centre: up to there its value holds, beyond is outside
        voxels = np.stack(
            [affine_transform(c, matrix, output_shape=size, output=kind, order=order, mode="nearest") for c in source]
        )
        for d, rows in enumerate(_beyond(matrix, size, self.shape[1:])):
            voxels[:, d, rows] = outside
        if self.voxels.dtype == bool:
            voxels = voxels >= 0.5
        info = {k: v for k, v in self.info.items() if k != "sop"}
        return Volume(self.id, voxels, affine, self.modality, self.unit, info)


class Study:
    """The images of one examination.

    Args:
        id: made from the study's UID or content by a hash, never from a name.
        patient: hash of the patient's identifier, or None; split by it, never by study.
        images: pixels are read when first used.
        report: text that came with the study, or None.
        warnings: "CODE: text"; ``.warnings`` adds those of the images, which may grow when pixels are read.
    """

    def __init__(self, id, patient=None, images=(), report=None, warnings=()):
        self.id, self.patient, self.images, self.report = id, patient, tuple(images), report
        self._warnings = list(warnings)

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self._warnings, *(f"{w} (image {i.id})" for i in self.images for w in i.info["warnings"]))

    def image(self, id: str | None = None) -> Image | Volume:
        """The image with this id, or the only one.

        Raises:
            ChoiceError: MANY_IMAGES or NO_SUCH_IMAGE; the message lists what there is.
        """
        there = ", ".join(f"{i.id} ({i.modality}, {' x '.join(map(str, i.shape[1:]))})" for i in self.images)
        if id is None:
            if len(self.images) == 1:
                return self.images[0]
            raise ChoiceError(f"the study holds {len(self.images)} images: {there}", "MANY_IMAGES")
        for image in self.images:
            if image.id == id:
                return image
        raise ChoiceError(f"the study has no image {id!r}; it holds: {there}", "NO_SUCH_IMAGE")

    def __repr__(self) -> str:
        return f"<Study {self.id}: {', '.join(map(repr, self.images))}; {len(self.warnings)} warnings>"


def _beyond(matrix: np.ndarray, size: tuple[int, ...], source: tuple[int, ...]):
    """For each d of a grid of ``size``: (H, W), True where ``matrix`` leads more than half a voxel out of ``source``."""
    h, w = np.ogrid[: size[1], : size[2]]
    for d in range(size[0]):
        out = np.zeros(size[1:], bool)
        for (a, b, c, t), n in zip(matrix[:3], source):
            index = b * h + c * w + (a * d + t)
            out |= (index < -0.5 - 1e-6) | (index > n - 0.5 + 1e-6)
        yield out


def check_affine(affine) -> np.ndarray:
    """A finite, invertible (4, 4) float64 affine, or BAD_AFFINE."""
    affine = np.array(affine, float)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.allclose(affine[3], (0, 0, 0, 1)):
        raise GeometryError(f"the affine must be a finite 4x4 matrix whose last row is 0 0 0 1, not {affine.tolist()}", "BAD_AFFINE")
    columns = np.linalg.norm(affine[:3, :3], axis=0)
    if columns.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / columns)) < 1e-3:
        raise GeometryError(f"the affine {affine.tolist()} is singular: two axes coincide or a spacing is zero", "BAD_AFFINE")
    return affine


READ_AS = {"S": "SPL", "I": "SPL", "P": "PIL", "A": "PIL", "L": "LIP", "R": "LIP"}
"""How a radiologist reads the slices of a volume, by the letter of their axis: axial and coronal with the patient's right on the left
and his front or head up, sagittal with his front on the left."""
OPPOSITE = dict(zip("LRPASI", "RLAPIS"))


def edges(affine: np.ndarray) -> tuple[str, str, str, str]:
    """(left, right, top, bottom): which way of the patient the edges of a slice of this affine lie."""
    _, down, right = orientation(np.asarray(affine, float))
    return OPPOSITE[right], right, OPPOSITE[down], down


def orientation(affine: np.ndarray) -> str:
    """The letters of :attr:`Volume.orientation` for an index -> LPS+ affine."""
    from scipy.optimize import linear_sum_assignment

    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    world, array = linear_sum_assignment(-np.abs(cosines))
    letters = [""] * 3
    for w, a in zip(world, array):
        letters[a] = GROWTH[w][0 if cosines[w, a] > 0 else 1]
    return "".join(letters)


def turn(here: str, to: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each axis of the orientation ``to``: which axis of ``here`` it is, and -1 where it grows the other way, else 1."""
    axes = _axes(here)
    order = tuple([a for a, _ in axes].index(axis) for axis, _ in _axes(to))
    return order, tuple(1 if axes[o][1] == sign else -1 for o, (_, sign) in zip(order, _axes(to)))


def turned(array: np.ndarray, here: str, to: str) -> np.ndarray:
    """(..., D, H, W) whose axes grow as ``here`` says -> a view of it whose axes grow as ``to`` says."""
    order, signs = turn(here, to)
    lead = array.ndim - 3
    return array.transpose(*range(lead), *(lead + o for o in order))[(..., *(slice(None, None, s) for s in signs))]


def turned_points(points: np.ndarray, size: tuple[int, ...], here: str, to: str) -> np.ndarray:
    """(..., 3) positions between voxel edges (0 to ``size`` along the axes of ``here``) -> the same along the axes of ``to``."""
    order, signs = (list(x) for x in turn(here, to))
    there = np.asarray(points, float)[..., order]
    return np.where(np.array(signs) > 0, there, np.asarray(size, float)[order] - there)


def ras_lps(affine: np.ndarray) -> np.ndarray:
    """NIfTI's RAS+ world to DICOM's LPS+ world, or back: x and y change sign."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def ijk_affine(affine: np.ndarray) -> np.ndarray:
    """Affine of a (d, h, w) index to that of the reversed (w, h, d) = (i, j, k) index, or back."""
    return affine[:, [2, 1, 0, 3]]


def _axes(letters: str) -> list[tuple[int, int]]:
    """(world axis, sign) of each letter."""
    found = [(w, 0 if x == pair[0] else 1) for x in letters.upper() for w, pair in enumerate(GROWTH) if x in pair]
    if len(letters) != 3 or sorted(w for w, _ in found) != [0, 1, 2]:
        raise GeometryError(f"{letters!r} is not an orientation: give one of L/R, one of P/A and one of S/I", "BAD_ORIENTATION")
    return found


def _orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Unit directions that keep W exactly, H in the (H, W) plane and D on the same side, without the shear."""
    w = matrix[:, 2] / np.linalg.norm(matrix[:, 2])
    h = matrix[:, 1] - w * (w @ matrix[:, 1])
    h /= np.linalg.norm(h)
    d = np.cross(h, w)
    return np.stack([d * np.sign(d @ matrix[:, 0]), h, w], axis=1)
