"""Frontal chest films of a painted body, for :mod:`.phantom`: rays, line integrals, scatter, noise, the processing of a digital film.

Source: Beer and Lambert's law with the attenuation of water and cortical bone at 60 keV (0.206 and 0.60 per cm;
NIST Standard Reference Database 126, table 4), scatter as a blurred share of the primary rays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .phantom_canvas import ID, VESSEL, Canvas, points_of, turned_by
from .phantom_trunk import Trunk
from .shapes import pick

WATER = 0.206
"""Attenuation per cm."""


def attenuation(hu: np.ndarray) -> np.ndarray:
    """Per cm at 60 keV: linear in HU up to soft tissue, steeper in bone, so that cortical bone of 1500 HU has 0.60."""
    return np.float32(WATER / 1000) * np.maximum(hu + 1000 + np.float32(0.27) * np.maximum(hu - 100, 0), 0)


def project(hu: np.ndarray, step: float, axis: int = 1) -> np.ndarray:
    """The line integral of attenuation along an axis whose points are ``step`` mm apart."""
    return attenuation(hu).sum(axis) * np.float32(step / 10)


def rays(made: Trunk, size: Sequence[int], ap: bool, lot: np.random.Generator) -> tuple[Canvas, Callable]:
    """Points along the rays from the focus to the detector, rows from head to foot, columns from the patient's right to the left; and where
    (3, N) places lie on that grid."""
    u = lot.uniform
    rows, columns = (max(48, round(0.5625 * n)) if n <= 320 else 180 for n in size)
    wide = 2 * (made.wide + 18 + 0.3 * made.fat) * u(0.95, 1.32)
    pixel, thick = wide / columns, 2 * (made.deep + 30 + 0.9 * made.fat)
    y = (np.arange(40, dtype=np.float32) - 19.5) * np.float32(thick / 40) + 5
    far = u(1000, 1300) if ap else u(1500, 1900)
    nearer = 1 - (thick / 2 + 30 + (5 - y if ap else y - 5)) / far  # how much closer to the axis a ray is than at the detector
    v = ((rows - 1) / 2 - np.arange(rows, dtype=np.float32)) * np.float32(pixel)
    h = (np.arange(columns, dtype=np.float32) - (columns - 1) / 2) * np.float32(pixel)
    height = made.high * u(0.33, 0.5)
    axes = v[:, None, None] * nearer[:, None] + height, y[:, None], h * nearer[:, None]
    axes = [np.broadcast_to(a, (rows, 40, columns)).astype(np.float32) for a in axes]
    turn = turned_by(lot.normal(0, 3), lot.normal(0, 2), lot.normal(0, 4 if ap else 2))
    points, back = points_of(axes, lot, turn, u(1, 5))

    def onto(places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        z, y, x = back(places)
        closer = 1 - (thick / 2 + 30 + (5 - y if ap else y - 5)) / far
        return (rows - 1) / 2 - (z - height) / closer / pixel, (y - 5) / (thick / 40) + 19.5, x / closer / pixel + (columns - 1) / 2

    return Canvas(points, (pixel, thick / 40, pixel)), onto


def threads(made: Trunk, canvas: Canvas, onto: Callable, size: Sequence[int]) -> np.ndarray:
    """(H, W) line integral of what is too thin for the canvas: hollow ribs and collar bones, vessels where the lung holds air.

    Each is cut into small pieces, whose attenuation falls on the pixel that its ray meets.
    """
    scale, lot = [n / m for n, m in zip(size, canvas.tissue.shape[::2])], made.lot
    area = float(canvas.step[2] / scale[1] * canvas.step[0] / scale[0])
    tall, thick, hard = lot.uniform(5.5, 7), lot.uniform(3.6, 4.8), lot.uniform(0.35, 0.6)
    hollow = ((0.45, 0.07, 4), (0.78, 0.07, 8), (1.0, hard, 18))
    bones = [_rod(line, tall, thick * np.linspace(1, 0.75, len(line)), hollow) for line in made.ribs()]
    for line in made.collar():
        bones.append(_rod(np.stack([np.interp(np.linspace(0, 3, 160), range(4), a) for a in line.T], 1), 6.0, 6.0, hollow))
    at = np.linspace(0, 1, 20)[:, None]
    vessels = [_rod(a + (b - a) * at, r - 0.2 * r * at[:, 0], r - 0.2 * r * at[:, 0], ((1.0, 0.17, 4 if r < 1.5 else 9),)) for a, b, r, _ in made.vessels()]
    picture = np.zeros(size[0] * size[1])
    for pieces in (bones, vessels):
        places, amount = (np.concatenate(p) for p in zip(*pieces))
        row, deep, column = onto(places.T.astype(np.float32))
        if pieces is vessels:
            voxel = tuple(np.clip(np.rint(a), 0, n - 1).astype(np.intp) for a, n in zip((row, deep, column), canvas.tissue.shape))
            amount = amount * (canvas.hu[voxel] < -650)
        row, column = (row + 0.5) * scale[0] - 0.5, (column + 0.5) * scale[1] - 0.5
        inside = (row >= 0) & (row < size[0] - 1) & (column >= 0) & (column < size[1] - 1)
        row, column, amount = row[inside], column[inside], amount[inside] / area
        low = row.astype(np.intp) * size[1] + column.astype(np.intp)
        down, across = row % 1, column % 1
        for step, share in ((0, (1 - down) * (1 - across)), (1, (1 - down) * across), (size[1], down * (1 - across)), (size[1] + 1, down * across)):
            picture += np.bincount(low + step, share * amount, len(picture))
    return picture.reshape(size).astype(np.float32)


def _rod(line: np.ndarray, up: float | np.ndarray, out: float | np.ndarray, rings: Sequence[tuple[float, float, int]]) -> tuple[np.ndarray, np.ndarray]:
    """((M, 3) places of the pieces of a bent rod, attenuation times mm3 / 10 of each).

    line: (N, 3). up, out: its radii in mm, towards the head and away from the axis of the body. rings: (share of the radii that
    the ring reaches, attenuation per cm, how many pieces it is cut into).
    """
    way = np.gradient(line, axis=0)
    long = np.linalg.norm(way, axis=1)
    way = way / long[:, None]
    side = np.stack([np.zeros(len(line)), way[:, 2], -way[:, 1]], 1) + 1e-6  # across the way, level
    side /= np.linalg.norm(side, axis=1)[:, None]
    head = np.cross(side, way)
    up, out = (np.broadcast_to(r, len(line)) for r in (up, out))
    places, amounts, inner = [], [], 0.0
    for share, mu, n in rings:
        turn, at = np.arange(n)[:, None, None] * (2 * math.pi / n) + 0.3, (inner + share) / 2
        places.append((line + at * (up[:, None] * np.cos(turn) * head + out[:, None] * np.sin(turn) * side)).reshape(-1, 3))
        amounts.append(np.tile(mu * math.pi * (share**2 - inner**2) * up * out * long / (10 * n), n))
        inner = share
    return np.concatenate(places), np.concatenate(amounts)


def mediastinum(canvas: Canvas, made: Trunk) -> np.ndarray:
    """(H, W): heart and great vessels up to the arch, and what lies between them; above 0.5 inside, smooth as one draws it."""
    from scipy.ndimage import gaussian_filter

    z, x = canvas.points[0], canvas.points[2]
    heart = (canvas.tissue == ID["heart"]).any(1)
    vessels = np.isin(canvas.tissue, (ID["aorta"], ID["superior_vena_cava"], VESSEL)) & (z < 0.66 * made.high + 16) & (np.abs(x - 4) < 36)
    seen = heart | vessels.any(1)
    rows = np.flatnonzero(heart.any(1))
    seen[rows[-1] + 1 if len(rows) else 0 :] = False
    filled = np.logical_or.accumulate(seen, 1) & np.logical_or.accumulate(seen[:, ::-1], 1)[:, ::-1]
    return gaussian_filter(filled.astype(np.float32), 8 / canvas.step[[0, 2]])


def resized(values: np.ndarray, size: Sequence[int], order: int = 3) -> np.ndarray:
    from scipy.ndimage import zoom

    factors = [n / m for n, m in zip(size, values.shape)]
    return zoom(values.astype(np.float32), factors, order=order, grid_mode=True, mode="nearest")[: size[0], : size[1]]


def developed(line: np.ndarray, masks: Mapping[str, np.ndarray], pixel: float, ap: bool, lot: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(greys from 0 to 255, where the collimator was open) of line integrals: scatter, noise, blur, the processing of a digital film.

    Levels are drawn so that lungs and heart get the greys that they have on real films (xray_covid: lungs 84 to 157, heart 131 to 217).
    """
    from scipy.ndimage import gaussian_filter, rotate

    u = lot.uniform
    primary = np.exp(-line)
    lungs = masks["right_lung"] | masks["left_lung"]
    level = float(np.median(primary[lungs])) if lungs.any() else 0.1
    seen = primary + u(0.5, 1.4) * (1.6 if ap else 1) * gaussian_filter(np.minimum(primary, 1.5 * level), 30 / pixel, truncate=2)
    grain = gaussian_filter(lot.standard_normal(line.shape, np.float32), u(0.3, 0.7))
    dust = gaussian_filter(lot.standard_normal(line.shape, np.float32), u(1.0, 1.8) / pixel * 1.4)  # the finest vessels
    film = -np.log(seen) + u(0.005, 0.022) / float(grain.std()) * grain * np.sqrt(level / seen) ** 0.7
    film += u(0.01, 0.03) / float(dust.std()) * dust * gaussian_filter(lungs.astype(np.float32), 4 / pixel)
    film = gaussian_filter(film, u(0.1, 0.5) + (0.2 if ap else 0))
    film = np.minimum(film, 12)
    film += u(0.2, 1.1) * (film - gaussian_filter(film, 9 / pixel)) - u(0.1, 0.5) * gaussian_filter(film, 45 / pixel, truncate=2)
    dark = float(np.median(film[lungs])) if lungs.any() else float(np.median(film))
    dense = film[masks["cardiomediastinum"] & ~masks["airways"]]
    span = max(float(np.median(dense)) - dark if len(dense) else 1.0, 0.3)
    gain = u(36, 66) / span
    film = np.where(film > dark + span, dark + span + u(0.2, 0.45) * (film - dark - span), film)
    x = (np.clip(lot.normal(126, 22), 80, 170) + gain * (film - dark) - 127.5) / 127.5
    grey = 127.5 + 127.5 * np.tanh(1.15 * x) / math.tanh(1.15)
    inside = np.ones(grey.shape, bool)
    if lot.random() < 0.45:
        top, bottom, left, right = (lot.random(4) < 0.6) * u(0, 0.07, 4)
        inside[:] = False
        height, width = grey.shape
        inside[round(top * height) : round((1 - bottom) * height), round(left * width) : round((1 - right) * width)] = True
        inside = rotate(inside, lot.normal(0, 1.2), reshape=False, order=0)
        grey = np.where(inside, grey, pick(lot, (0, 0, 0, 12, 30)))
    return np.clip(grey, 0, 255), inside


def lettered(grey: np.ndarray, ap: bool, lot: np.random.Generator) -> np.ndarray:
    """Side markers and words as technicians burn them in, and the wires of monitors on the bed's films."""
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    picture = Pillow.fromarray(np.rint(grey).astype(np.uint8))
    draw, (height, width), u = ImageDraw.Draw(picture), grey.shape, lot.uniform
    if ap and lot.random() < 0.5:
        for _ in range(int(lot.integers(1, 4))):
            t = np.linspace(0, 1, 24)
            (a, b), (c, d), (e, f) = u(0, 1, (3, 2))
            places = [((1 - s) ** 2 * a + 2 * s * (1 - s) * c + s * s * e, (1 - s) ** 2 * b + 2 * s * (1 - s) * d + s * s * f) for s in t]
            places = [(float(p * width), float(q * height)) for p, q in places]
            tone = int(np.clip(grey.mean() + u(30, 80), 0, 255))
            draw.line(places, tone, max(1, round(width / 300)))
            if lot.random() < 0.7:
                (p, q), r = places[0], width / u(50, 80)
                draw.ellipse((p - r, q - r, p + r, q + r), None, tone, max(1, round(width / 200)))
    words = []
    if lot.random() < 0.75:
        side = pick(lot, ("R", "L"))
        words.append((side, u(0.01, 0.12) if side == "R" else u(0.86, 0.95), u(0.02, 0.25), u(0.05, 0.09)))
    if lot.random() < (0.55 if ap else 0.25):
        said = pick(lot, ("AP", "PORTABLE", "AP ERECT", "SUPINE", "MOBILE", "SEMI ERECT") if ap else ("PA", "ERECT", "PA ERECT", "STANDING"))
        words.append((said, u(0.02, 0.15) if lot.random() < 0.5 else u(0.62, 0.75), u(0.01, 0.08), u(0.03, 0.05)))
    for word, x, y, tall in words:
        draw.text((x * width, y * height), word, int(u(190, 256)), ImageFont.load_default(max(8.0, tall * height)))
    return np.asarray(picture)
