"""DICOM segmentation objects, read onto the grid of the image they belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import FileError, GeometryError
from .limits import check_size
from .scan import Image, Volume

NEAR = 0.05
"""A voxel of a segmentation lies on a voxel of its image when it is no further from its centre than this (voxels)."""


def read_seg(path: str | Path, image: Image | Volume) -> list[tuple[str, np.ndarray]]:
    """(label, bool (D, H, W) on the grid of ``image``) of every segment, in segment order; segments may overlap.

    Voxels are placed through world coordinates, so slices may be stored in any order and empty ones left out. A second
    segment of the same label is numbered ("Tumor 2"). Fractional segments count from 0.5 on.

    Raises:
        FileError: CORRUPT when the file is no segmentation; UNSUPPORTED without 3-D geometry on both sides.
        GeometryError: MIXED_FRAME, GRID_MISMATCH when its voxels do not lie on voxels of the image.
    """
    import highdicom

    if not isinstance(image, Volume):
        raise FileError(f"a DICOM segmentation of the single picture {image.id} is not read", "UNSUPPORTED", "store its masks as PNG")
    path = Path(path)
    try:
        stored = highdicom.seg.segread(path)
        shape = (int(stored.NumberOfFrames), int(stored.Rows), int(stored.Columns))
        numbers = [int(n) for n in stored.segment_numbers]
    except Exception as error:  # pydicom and highdicom raise many kinds, and their texts may quote the file
        raise FileError(f"this is not a readable DICOM segmentation ({type(error).__name__})", "CORRUPT") from error
    check_size(shape, np.uint8, path.stat().st_size, "the segmentation")
    check_size((len(numbers), *image.shape[1:]), bool, path.stat().st_size, "the segmentation")
    frame, other = image.info.get("frame_of_reference"), stored.get("FrameOfReferenceUID")
    if frame and other and str(frame) != str(other):
        raise GeometryError(f"it lies in another frame of reference than image {image.id}", "MIXED_FRAME")
    found, seen = [], {}
    for number in numbers:
        try:
            part = stored.get_volume(segment_numbers=[number], combine_segments=False, allow_missing_positions=True)
        except Exception as error:
            raise FileError(f"segment {number} has no regular grid ({type(error).__name__})", "UNSUPPORTED") from error
        label = str(stored.get_segment_description(number).segment_label)
        seen[label] = seen.get(label, 0) + 1
        array = np.asarray(part.array).reshape(part.spatial_shape) >= 0.5
        found.append((label if seen[label] == 1 else f"{label} {seen[label]}", _onto(array, part.affine, image, "the segmentation")))
    return found


def _onto(array: np.ndarray, affine: np.ndarray, image: Volume, name: str) -> np.ndarray:
    """Voxels put where they lie in the image; nothing is interpolated."""
    matrix = np.linalg.inv(image.affine) @ affine
    steps, start = np.rint(matrix[:3, :3]).astype(int), np.rint(matrix[:3, 3]).astype(int)
    far = np.array(np.meshgrid(*[(0, n - 1) for n in array.shape], indexing="ij")).reshape(3, -1)
    off = np.abs(matrix[:3, :3] @ far + matrix[:3, 3:] - (steps @ far + start[:, None])).max()
    low, high = (steps @ far + start[:, None]).min(1), (steps @ far + start[:, None]).max(1)
    straight = (np.abs(steps).sum(0) == 1).all() and (np.abs(steps).sum(1) == 1).all()
    if off > NEAR or not straight or (low < 0).any() or (high >= image.shape[1:]).any():
        raise GeometryError(
            f"{name} is {array.shape} and spans voxels {low.tolist()} to {high.tolist()} of image {image.id}, which is "
            f"{image.shape[1:]}, up to {off:.2g} voxels off their centres", "GRID_MISMATCH",
        )  # fmt: skip
    placed = np.zeros(image.shape[1:], bool)
    index = np.argwhere(array) @ steps.T + start
    placed[tuple(index.T)] = True
    return placed
