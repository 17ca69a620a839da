"""Random moves and grey values of what an encoder is about to see: pictures by albumentations, volumes by MONAI, one spec for both.

Nothing is flipped: left and right stand in words too (:mod:`medvlm.datasets.mirror` exchanges both). Only what nobody names a side
of is :func:`laid` another way. What comes in at an edge is black, never a reflection, which would show an organ twice and on the wrong side.
"""

from __future__ import annotations

import math
import os
from functools import cache
from typing import NamedTuple

import numpy as np

from ..errors import UsageError

ROTATION, SHEAR, SCALE, SHIFT = 12.0, 4.0, 0.2, 0.08
"""Most of each at strength 1: degrees, degrees, share of the size, share of the picture along each axis."""
BRIGHTNESS, CONTRAST, GAMMA = 0.25, 0.35, 0.25
"""Most by which each factor departs from 1; the standard deviation of the logarithm of the exponent."""
BLUR, NOISE = (0.2, 0.1, 1.5), (0.3, 0.04)
"""Chance and least and most sigma in pixels of a picture of ``REFERENCE``; chance and sigma as a share of black to white."""
REFERENCE = 256
"""Pixels of the shorter side of (H, W) that the blur is meant for; it grows with the picture."""
STRONGEST = 2.0
"""Beyond it a picture would be turned so far that "left" and "upper" in a text were no longer true of it."""
VISIBLE = 0.25
"""Share of a moved box that must lie inside the picture; one with less, or without extent to begin with, is dropped."""


class Moved(NamedTuple):
    """picture (C, *size) float32 in [0, 1]; masks (M, *size) uint8, as many as before, empty where a target has left;
    boxes (k, 2, rank) inside the picture; kept (n,) bool, which of the boxes given they are: ``labels[kept]``."""

    picture: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    kept: np.ndarray


class Augmentation:
    """One spec for 2-D and 3-D: rotation and shear in the plane of (H, W), scale and shift along every axis, then grey values.

    A volume is not tilted: its slices are mostly further apart than its pixels, so a turn of the grid through them would be no
    turn of the patient.

    Boxes are those around the moved ellipse (ellipsoid) inside the box, cut off at the picture's edges: right for round
    targets, while the box around moved corners is too large for all. Where a target has a mask, the box around the moved mask
    (:func:`medvlm.sample.box_of`) is exact. Source: Kalra et al. 2021, "Towards Rotation Invariance in Object Detection",
    arXiv:2109.13488.

    Args:
        rank: 2 (H, W) or 3 (D, H, W).
        strength: of all of it, 0 (nothing is changed) to ``STRONGEST``.

    Raises:
        UsageError: BAD_ARGUMENT for another rank or strength.
    """

    def __init__(self, rank: int, strength: float = 1.0):
        if rank not in (2, 3) or not 0 <= strength <= STRONGEST:
            hint = f"rank is 2 or 3, strength 0 to {STRONGEST:g}"
            raise UsageError(f"there is no augmentation of rank {rank} and strength {strength}", "BAD_ARGUMENT", hint)
        self.rank, self.strength = rank, float(strength)

    def __call__(self, picture: np.ndarray, masks: np.ndarray, boxes: np.ndarray, seed: int, move: bool = True) -> Moved:
        """Picture, masks (nearest neighbour) and boxes moved together, then the picture's grey values changed.

        The same seed is the same move and change relative to the picture's size, whatever its size; only noise is drawn pixel by
        pixel. Nothing but ``seed`` decides, and no global random state is read or changed. The arrays given are not written to.

        Args:
            picture: (C, *size) float32 in [0, 1]: after windowing, before an encoder's mean and standard deviation.
            masks: (M, *size) uint8, coverage 0 to 255.
            boxes: (n, 2, rank) lower and upper corner ((d,) h, w), half-open, in pixels.
            move: False changes grey values only, for a text that gives a place in the picture by numbers or by quarter.

        Raises:
            UsageError: NOT_WINDOWED for a picture of another type or range; BAD_ARGUMENT for other shapes.
        """
        size = self._check(picture, masks, boxes)
        if not self.strength:
            return Moved(picture, masks, boxes, np.ones(len(boxes), bool))
        lot = np.random.default_rng(seed)
        linear, shift = self._move(lot)
        kept = np.ones(len(boxes), bool)
        if move:
            warp = _warp_picture if self.rank == 2 else _warp_volume
            picture, masks = warp(picture, masks, linear, shift * size)
            boxes, kept = _boxes(np.asarray(boxes, float), linear, shift * size, np.array(size, float))
        return Moved(self._grey(picture, lot), masks, boxes, kept)

    def _check(self, picture, masks, boxes) -> tuple[int, ...]:
        hint = "augment after windowing and before normalising: float32 in [0, 1]"
        if picture.dtype != np.float32:
            raise UsageError(f"the picture is {picture.dtype}, augmentation takes float32 in [0, 1]", "NOT_WINDOWED", hint)
        if picture.ndim != self.rank + 1 or not picture.size:
            text = f"the picture is {picture.shape}, expected channels and {self.rank} axes"
            raise UsageError(text, "BAD_ARGUMENT", "give (C, H, W) or (C, D, H, W)")
        low, high = float(picture.min()), float(picture.max())
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise UsageError(f"the picture's values run from {low:g} to {high:g}, expected [0, 1]", "NOT_WINDOWED", hint)
        size = picture.shape[1:]
        if masks.dtype != np.uint8 or masks.shape[1:] != size:
            text = f"the masks are {masks.dtype} {masks.shape}, the picture is {picture.shape}"
            raise UsageError(text, "BAD_ARGUMENT", "give masks as uint8 (M, *size)")
        if boxes.shape[1:] != (2, self.rank):
            raise UsageError(f"the boxes are {boxes.shape}, expected (n, 2, {self.rank})", "BAD_ARGUMENT", "give lower and upper corners")
        return size

    def _move(self, lot: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(rank, rank) about the picture's centre, and (rank,) shift as a share of its size."""
        angle, shear, scale, *shift = lot.uniform(-self.strength, self.strength, 3 + self.rank)
        angle, shear = math.radians(ROTATION * angle), math.tan(math.radians(SHEAR * shear))
        cos, sin = math.cos(angle), math.sin(angle)
        linear = np.eye(self.rank)
        linear[-2:, -2:] = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, 0], [shear, 1]])
        return linear * (1 + SCALE * scale), SHIFT * np.array(shift)

    def _grey(self, picture: np.ndarray, lot: np.random.Generator) -> np.ndarray:
        brightness, contrast = 1 + np.array([BRIGHTNESS, CONTRAST]) * lot.uniform(-self.strength, self.strength, 2)
        gamma = math.exp(lot.normal(0, GAMMA * self.strength))
        blurred, noisy = lot.random(2) < (BLUR[0], NOISE[0])
        sigma = self.strength * lot.uniform(*BLUR[1:]) * min(picture.shape[-2:]) / REFERENCE
        mean = float(picture.mean()) * brightness
        picture = picture * np.float32(brightness * contrast) + np.float32(mean * (1 - contrast))
        if blurred:
            picture = (_blur_picture if self.rank == 2 else _blur_volume)(picture, sigma)
        if noisy:
            picture += np.float32(NOISE[1] * self.strength) * lot.standard_normal(picture.shape, np.float32)
        np.clip(picture, 0, 1, out=picture)
        return np.power(picture, np.float32(gamma), out=picture)


def laid(array: np.ndarray, way: int) -> np.ndarray:
    """(..., H, W) in one of the eight ways to lay a square: turned by ``way`` % 4 quarters, from the fourth on mirrored too; what is not square
    is never turned by an odd number of quarters."""
    square = array.shape[-2] == array.shape[-1]
    array = np.rot90(array, way % 4 if square else way % 2 * 2, (-2, -1))
    return np.ascontiguousarray(array[..., ::-1] if way >= 4 else array)


def _boxes(boxes: np.ndarray, linear: np.ndarray, shift: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners lie between pixels: the picture's centre is size / 2. The half axes r of an ellipsoid become sqrt(sum (A r)^2)."""
    centre = (boxes.mean(1) - size / 2) @ linear.T + size / 2 + shift
    reach = np.sqrt(((boxes[:, 1] - boxes[:, 0])[:, None] / 2 * linear) ** 2 @ np.ones(len(size)))
    cut = np.clip(np.stack([centre - reach, centre + reach], 1), 0, size)
    inside, whole = (cut[:, 1] - cut[:, 0]).prod(1), (2 * reach).prod(1)
    kept = (boxes[:, 1] > boxes[:, 0]).all(1) & (inside > 0) & (inside >= VISIBLE * whole)
    return cut[kept], kept


@cache
def _albumentations():
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or it asks the network for its newest version while it is imported
    import albumentations
    from albumentations.augmentations.blur.functional import create_gaussian_kernel_1d

    return albumentations.Affine(p=1), albumentations.GaussianBlur(p=1), create_gaussian_kernel_1d


def _warp_picture(picture, masks, linear, shift):
    """shift: in pixels. OpenCV counts (x, y), and from the first pixel's centre."""
    affine, size = _albumentations()[0], picture.shape[1:]
    middle = (np.array(size) - 1) / 2
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear[::-1, ::-1], (middle + shift - linear @ middle)[::-1]
    moved = affine.apply(np.ascontiguousarray(picture.transpose(1, 2, 0)), matrix=matrix, output_shape=size)
    out = np.empty_like(masks)
    for mask, place in zip(masks, out):
        place[...] = affine.apply_to_mask(np.ascontiguousarray(mask), matrix=matrix, output_shape=size)
    return np.ascontiguousarray(moved.transpose(2, 0, 1)), out


def _warp_volume(picture, masks, linear, shift):
    """MONAI's matrix leads from the new grid to the old one, both counted from their centres."""
    import torch
    from monai.transforms import Affine

    matrix = np.eye(4)
    matrix[:3, :3] = np.linalg.inv(linear)
    matrix[:3, 3] = -matrix[:3, :3] @ shift
    affine = Affine(affine=matrix, padding_mode="zeros", image_only=True)

    def move(array: np.ndarray, mode: str) -> np.ndarray:
        return affine(torch.from_numpy(np.ascontiguousarray(array, np.float32)), mode=mode).numpy() if len(array) else array

    return move(picture, "bilinear"), move(masks, "nearest").astype(np.uint8)


def _blur_picture(picture, sigma):
    _, blur, kernel = _albumentations()
    return np.ascontiguousarray(blur.apply(np.ascontiguousarray(picture.transpose(1, 2, 0)), kernel=kernel(sigma)).transpose(2, 0, 1))


def _blur_volume(picture, sigma):
    """Within the slices only, as 2-D pictures are blurred."""
    import torch
    from monai.transforms import GaussianSmooth

    return GaussianSmooth((1e-3, sigma, sigma))(torch.from_numpy(picture)).numpy()
