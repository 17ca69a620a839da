"""A made photograph of the back of an eye: disc, macula and vessels, from which its side can be told.

Lengths are in disc diameters from the middle of the optic disc, x towards the temple, y up. The fovea lies 2.5 of them from it and a
little lower, and the temporal vessels run round it in two arcs. Source: Jonas et al. 2015, PLoS ONE 10:e0138701: the fovea is 2.65
(deviation 0.30) disc diameters away. How vessels run, their widths and all colours were chosen by eye, beside photographs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .phantom_canvas import clouds

FOVEA = (2.5, -0.3)
TRUNKS = (((0.02, 0.1), (0.3, 1.2), (1.5, 2.2), (3.3, 2.4), (5.2, 1.8)), ((-0.05, 0.1), (-0.5, 1.0), (-1.4, 1.9), (-2.6, 2.6), (-4.0, 3.2)),
          ((0.0, 0.1), (-0.05, 1.3), (0.3, 2.5), (0.8, 3.8)), ((-0.2, 0.05), (-1.2, 0.45), (-2.4, 0.8), (-4.0, 1.0)))  # fmt: skip
"""Where the vessels of the upper half run, those of the lower half in its mirror: the temporal arc, two nasal ones, one straight up."""
VEIN, ARTERY = 0.095, 0.065
"""Widths at the disc's edge."""
FINE = 2
"""Pixels of the drawing to one of the photograph, along each axis."""


def photographed(size: Sequence[int], lot: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str]:
    """(H, W, 3) uint8, the vessels (H, W) bool, and whose eye it is, "right" or "left"."""
    import cv2

    u, eye = lot.uniform, str(lot.choice(("right", "left")))
    wide = u(4.4, 9.0)
    middle = np.array([u(-0.4, 0.5) if wide < 5.5 else u(-0.3, 2.9), u(-0.4, 0.3)])
    high, width = (int(n) * FINE for n in size)
    scale, toward = min(high, width) * u(0.9, 1.02) / wide, -1 if eye == "right" else 1  # of a right eye the temple is on the left of the picture
    turn = np.radians(lot.normal(0, 4))
    turning = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])

    def seen(points: np.ndarray) -> np.ndarray:
        return (np.atleast_2d(points) - middle) @ turning.T * scale * (toward, -1) + (width / 2, high / 2)

    h, w = np.mgrid[:high, :width].astype(np.float32)
    away = lambda at, radii=(1, 1): np.sqrt(((((np.stack([w, h], -1) - seen(np.array(at))[0]) / scale) / radii) ** 2).sum(-1))  # noqa: E731
    blood = {}
    for kind, caliber in (("vein", VEIN), ("artery", ARTERY)):
        canvas = np.zeros((high, width), np.uint8)
        for line, thick in _vessels(caliber * u(0.85, 1.2), lot):
            corners = np.rint(seen(line) * 8).astype(np.int32)
            for a, b, t in zip(corners, corners[1:], thick):
                cv2.line(canvas, a.tolist(), b.tolist(), 255, max(1, round(float(t) * scale)), cv2.LINE_AA, 3)
        blood[kind] = canvas / np.float32(255)
    grain = clouds((high // 8, width // 8), lot, 6) + 0.6 * clouds((high // 8, width // 8), lot, 2)
    ground = 1 + u(0.03, 0.12) * cv2.resize(grain.astype(np.float32), (width, high), interpolation=cv2.INTER_CUBIC)
    colour = np.array([1.0, u(0.3, 0.62), u(0.08, 0.38)]) * u(0.5, 0.95)
    picture = ground[..., None] * colour
    macula = u(0.2, 0.6) * np.exp(-((away(FOVEA) / u(0.5, 1.1)) ** 2)) + u(0, 0.35) * np.exp(-((away(FOVEA) / 0.25) ** 2))
    picture *= 1 - macula[..., None] * (0.7, 1, 0.9)
    radii = 0.5 * u(0.85, 1.05), 0.5 * u(0.95, 1.15)
    disc = 1 / (1 + np.exp((away((0, 0), radii) - 1) / u(0.03, 0.1)))
    cup = 1 / (1 + np.exp((away((0.06, 0), radii) - u(0.3, 0.7)) / 0.12))
    pale = np.clip(colour * (1.25, u(1.8, 2.3), u(1.8, 3)) + 0.05, 0, 1)
    picture += (disc * u(0.7, 1) * (0.85 + 0.15 * cup))[..., None] * (pale - picture) + cup[..., None] * disc[..., None] * u(0, 0.2)
    picture += (u(0, 0.25) * np.exp(-((away((0.3, 0)) / 1.2) ** 2)))[..., None] * colour
    for kind, dark in (("vein", u(0.35, 0.6)), ("artery", u(0.2, 0.45))):
        picture *= 1 - dark * blood[kind][..., None] * (0.6, 1, 0.7)
    field = np.hypot(w - width / 2, h - high / 2) / (scale * wide / 2)
    picture *= (1 - u(0, 0.5) * np.clip(field, 0, 1) ** 2 * (1 + u(-0.6, 0.6) * (w / width - 0.5)))[..., None]
    inside = field < 1
    picture = cv2.GaussianBlur(picture, (0, 0), u(0.5, 1.6) * FINE * min(size) / 400) * inside[..., None]
    small = cv2.resize(picture, (int(size[1]), int(size[0])), interpolation=cv2.INTER_AREA)
    small += (lot.normal(0, u(0.004, 0.02), small.shape)) * (small.max(-1, keepdims=True) > 0.02)
    covered = cv2.resize(np.maximum(*blood.values()) * inside, (int(size[1]), int(size[0])), interpolation=cv2.INTER_AREA)
    return np.rint(np.clip(small, 0, 1) * 255).astype(np.uint8), covered > 0.4, eye


def _vessels(caliber: float, lot: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """((n, 2) points, (n,) widths) of each vessel of a kind, branches too."""
    from scipy.interpolate import CubicSpline

    for number, trunk in enumerate(TRUNKS):
        for half in (1, -1):
            ends = np.array(trunk) * (1, half) + lot.normal(0, 1, (len(trunk), 2)) * (0.06 + 0.07 * np.arange(len(trunk)))[:, None]
            line = CubicSpline(np.arange(len(ends)), ends)(np.linspace(0, len(ends) - 1, 120))
            across = np.gradient(line, axis=0)[:, ::-1] * (-1, 1)
            wave = np.sin(np.linspace(0, lot.uniform(15, 40), 120) + lot.uniform(0, 6)) * np.linspace(0, 1, 120) * lot.uniform(0, 0.8)
            line = line + across * wave[:, None]
            width = caliber * (1, 0.6, 0.75, 0.5)[number] * lot.uniform(0.75, 1.15)
            yield from _branched(line, np.linspace(width, 0.4 * width, 120), lot, 2)


def _branched(line: np.ndarray, thick: np.ndarray, lot: np.random.Generator, deeper: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    near = np.hypot(*(line - FOVEA).T) < 0.35  # no vessel crosses the fovea
    end = int(near.argmax()) if near.any() else len(line)
    yield line[:end], thick[:end]
    if not deeper:
        return
    for at in np.sort(lot.integers(len(line) // 6, len(line) - 5, int(lot.integers(2, 5) if deeper == 2 else lot.integers(1, 4)))):
        if at >= end:
            break
        step = np.diff(line[at : at + 2], axis=0)[0]
        heading = np.arctan2(step[1], step[0]) + lot.choice((-1, 1)) * np.radians(lot.uniform(25, 65))
        count, stride = int(lot.integers(20, 60)), 0.04 if deeper == 2 else 0.025
        turns = heading + np.cumsum(lot.normal(0, 0.09, count) + lot.normal(0, 0.012))
        twig = line[at] + np.cumsum(stride * np.stack([np.cos(turns), np.sin(turns)], 1), 0)
        yield from _branched(np.concatenate([line[at][None], twig]), np.linspace(thick[at] * lot.uniform(0.45, 0.75), 0.012, count + 1), lot, deeper - 1)
