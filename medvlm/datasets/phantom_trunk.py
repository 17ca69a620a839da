"""Chests and abdomens by lot, sick or well, for :mod:`.phantom` to take pictures of: z = 0 is the top of the right diaphragm.

Sources. HU of tissues: Prokop, Spiral and Multislice CT of the Body (2003), as tabled by radclass.mudr.org, and the means under the
outlines of TotalSegmentator's example scan (liver 45, kidney 12, vertebrae 180 to 320, ribs 150 to 390). Organ masses: ICRP
Publication 89 (liver 1.4 to 1.8 kg, spleen 130 to 150 g, a kidney 140 to 155 g; lungs, right to left, 642 : 558 g). Textbook limits
of the chest radiograph: trachea 15 to 25 mm, right dome 1 to 2 cm above the left, heart up to half of the inner width of the
chest, mediastinum below 8 cm at the arch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .phantom_canvas import FAT, LUNGS, MUSCLE, SIGN, SOFT, VESSEL, Canvas, clouds, turned_by

_HEIGHT = {27: -219, 28: -185, 29: -150, 30: -115, 31: -81, 32: -50, 33: -22, 34: 5, 35: 31, 36: 56, 37: 80, 38: 103, 39: 125, 40: 147,
           41: 168, 42: 189, 43: 209, 44: 228, 45: 245, 46: 261, 47: 277}  # fmt: skip
"""{vertebra: z of its middle in a chest of 215 mm from dome to apex}."""
_RIB_END = (2.6, 2.45, 2.4, 2.4, 2.35, 2.3, 2.25, 2.1, 1.95, 1.8, 1.35, 0.95)
"""Angle around the chest, from the spine, where the bone of ribs 1 to 12 ends and cartilage begins."""


class Trunk:
    """A chest and abdomen by lot, painted by :meth:`paint`. upright: deep breath, air on top, fluid below; else lying on the back.

    ratio: width of the heart over the inner width of the chest. contrast: HU that contrast medium adds to blood. arms: beside the body.
    apart: shoulders drawn forward, blades off the lungs, as for a PA film. film: leave out ribs, collar bones and vessels of the lungs, which
    :meth:`ribs`, :meth:`collar` and :meth:`vessels` give as lines.
    """

    def __init__(self, lot: np.random.Generator, upright: bool, ratio: float, contrast: float = 0, arms: bool = False, apart: bool = True,
                 film: bool = False):  # fmt: skip
        self.lot, self.upright, self.ratio, self.contrast, self.arms, self.apart, self.film = lot, upright, ratio, contrast, arms, apart, film
        grown, u = lot.uniform(0.88, 1.08), lot.uniform
        self.female, self.fat = bool(lot.random() < 0.5), float(np.clip(lot.gamma(2.2, 9), 4, 55))
        self.wide, self.deep = 134 * grown * u(0.94, 1.07), 92 * grown * u(0.9, 1.1) * (1 if upright else 0.95)
        self.high = grown * (u(190, 240) if upright else u(150, 195))
        self.left_dome = -u(6, 18)
        self.bend, self.lung = (u(0, 7), u(0, 6)), u(-890, -810) if upright else u(-830, -730)
        self.blood, self.muscle, self.liver = u(35, 48) + contrast, u(38, 58), u(45, 65) + 0.5 * min(contrast, 120)
        self._tables()

    def _tables(self) -> None:
        """Widths, depths and the spine by height, one entry each half millimetre from -420."""
        z = np.arange(-420, 420, 0.5, np.float32)
        up, down = np.clip((z / self.high - 0.12) / 0.88, 0, 1), np.clip(-(z + 60) / 160, 0, 1)
        wide = self.wide * np.clip(1 - up**2.2, 0.002, 1) ** 0.55 * (1 - 0.07 * down)
        deep = self.deep * np.sqrt(np.clip(1 - 0.97 * up**3, 0.002, 1)) * (1 - 0.05 * down)
        self.inner = {"wide": wide, "deep": deep, "middle": 0.45 * (self.deep - deep)}
        neck, hips = 1 / (1 + np.exp(-(z - self.high - 18) / 15)), np.exp(-(((z + 330) / 90) ** 2))
        paunch = 0.35 * self.fat * np.exp(-(((z + 170) / 110) ** 2))
        around = {"wide": (self.wide + 20 + 0.8 * self.fat + 12 * hips) * (1 - neck) + 58 * neck,
                  "deep": (self.deep + 24 + 0.75 * self.fat + paunch) * (1 - neck) + 58 * neck, "middle": 10 - 0.8 * paunch + 15 * neck}  # fmt: skip
        self.outer = {k: v.astype(np.float32) for k, v in around.items()}
        self.spine = {"y": np.float32(0.64 * self.deep) + 12 * np.cos((z - 100) / 115), "x": self.bend[0] * np.sin(z / 130 + self.bend[1])}
        middles = np.array([h * (self.high / 215 if h > 0 else 1) for h in _HEIGHT.values()])
        edges = (middles[1:] + middles[:-1]) / 2
        which = np.searchsorted(edges, z)
        half = np.diff(np.concatenate([[2 * middles[0] - edges[0]], edges, [2 * middles[-1] - edges[-1]]])) / 2
        self.level = {"number": np.array(list(_HEIGHT), np.uint8)[which], "off": (z - middles[which]).astype(np.float32), "half": half[which].astype(np.float32)}
        self.tables = {"front": self.inner["middle"] - deep}

    @staticmethod
    def _at(z: np.ndarray) -> np.ndarray:
        return np.clip((z + 420) * 2, 0, 1679).astype(np.int32)

    def back(self, z: float) -> float:
        """y of the middle of the spine."""
        return float(self.spine["y"][self._at(np.float32(z))])

    def front(self, z: float) -> float:
        """y of the inside of the front wall."""
        return float(self.tables["front"][self._at(np.float32(z))])

    def paint(self, canvas: Canvas) -> None:
        z, y, x = canvas.points
        at, (sz, sy, sx) = self._at(z), canvas.step

        def shell(of: dict, power: int) -> tuple[np.ndarray, np.ndarray]:
            """(mm from an upright cylinder that changes with height, negative inside; mm that one step across it is)."""
            wide, deep = of["wide"][at], of["deep"][at]
            a, b = x / wide, (y - of["middle"][at]) / deep
            size = np.sqrt(a * a + b * b) if power == 2 else np.cbrt(np.abs(a * a * a) + np.abs(b * b * b))
            a, b = (a / wide, b / deep) if power == 2 else (a * a / wide, b * b / deep)
            slope = np.sqrt(a * a + b * b) + np.float32(1e-6)
            return (size - 1) * (size if power == 2 else size * size) / slope, np.sqrt((a * sx) ** 2 + (b * sy) ** 2) / slope

        skin, skin_step = shell(self.outer, 3)
        wall, step = self.wall, self.across = shell(self.inner, 2)
        all = (slice(None),) * 3
        canvas.paint(all, skin / skin_step, self.lot.uniform(-110, -85), FAT)
        self._outside(canvas)
        canvas.paint(all, np.maximum(wall - 19, skin + 4) / step, self.muscle, MUSCLE)
        canvas.blob((self.high + 60, 25, 0), (90, 46, 48), self.muscle, MUSCLE, also=lambda p: (self.high - 5 - p[0]) / sz)
        block = canvas.near((-450, -300, -300), (20, 300, 300))
        if block is not None:
            canvas.paint(block, wall[block] / step[block], -95, FAT)
        block = self.block = canvas.near((-125, -self.deep, -self.wide), (self.high, self.deep, self.wide))
        if block is not None:
            self._lungs(canvas, block)
        self._belly(canvas)
        self._middle(canvas)
        self._bones(canvas)
        for a, b, thick, side in () if self.film else self.vessels():
            canvas.tube([a, b], (thick, 0.8 * thick), self.blood - 10, None, LUNGS[side])

    def _lungs(self, canvas: Canvas, block: tuple[slice, ...]) -> None:
        """And what lies between them."""
        z, y, x = canvas.points[(slice(None), *block)]
        wall, step, (sz, _, sx) = self.wall[block], self.across[block], canvas.step
        h, d, f = self.high, self.deep, np.float32
        dome = self.dome(y, x)
        canvas.paint(block, np.maximum(wall / step, (dome - z) / sz), 15, SOFT)
        behind, above = 1 / (1 + np.exp((f(0.45 * d) - y) / f(9))), 1 / (1 + np.exp((f(0.52 * h) - z) / f(10)))
        amid = 1 / (1 + np.exp((f(-0.40 * d) - y) / f(8)))
        vessels = above * (9 - behind * 8) * np.clip((f(1.1 * h) - z) / f(0.4 * h), 0, 1)
        hilum = 7 * np.exp(-(((z - f(0.5 * h)) / 26) ** 2))
        half = 7 + behind * 7 + amid * (6 + vessels + hilum) + 3 * clouds(z.shape, self.lot, 34 / canvas.step)  # of the middle's width
        oblique, level = z - (f(0.36 * h) + f(0.5 * h / d) * y), z > 0.47 * h
        lower, upper, middle = np.uint8((14, 11)), np.uint8((12, 10)), np.uint8(13)
        lobes = {"right": np.where(oblique < 0, lower[0], np.where(level, upper[0], middle)), "left": np.where(oblique < 0, lower[1], upper[1])}
        below = np.maximum((wall + f(1.5)) / step, (dome - z) / sz)
        for side, sign in SIGN.items():
            canvas.paint(block, np.maximum(below, (half + (5 if sign > 0 else 0) - sign * x) / sx), self.lung, lobes[side])

    def dome(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """z of the diaphragm."""
        f = np.float32
        left = x > 0
        out = (np.abs(x) - f(0.48 * self.wide)) / f(0.6 * self.wide)
        back = (y + f(0.22 * self.deep)) / f(self.deep)
        return np.where(left, f(self.left_dome), f(0)) - np.where(out > 0, f(68), f(22)) * out * out - np.where(back > 0, f(62), f(20)) * back * back

    def _outside(self, canvas: Canvas) -> None:
        w, h = self.wide, self.high
        for sign in SIGN.values():
            canvas.blob((h - 42, 15, sign * (w + 22)), (48, 46, 48 + 0.5 * self.fat), self.muscle, MUSCLE)
            if self.arms:
                canvas.tube([(h - 40, 15, sign * (w + 40)), (h - 270, 25, sign * (w + 62 + self.fat))], (46 + 0.3 * self.fat, 38), self.muscle, MUSCLE)
            if self.female:
                size, front = 36 + 0.6 * self.fat, self.front(0.1 * h) - 6
                canvas.blob((0.06 * h, front - 0.35 * self.fat, sign * 0.55 * w), (1.25 * size, 0.55 * size, 1.15 * size), -70, FAT)

    def _belly(self, canvas: Canvas) -> None:
        lot, u, w, d, soft = self.lot, self.lot.uniform, self.wide, self.deep, 0.5 * min(self.contrast, 120)

        def inside(points: np.ndarray) -> np.ndarray:  # below the diaphragm and within the ribs
            z, y, x = points
            at = self._at(z)
            a, b = x / self.inner["wide"][at], (y - self.inner["middle"][at]) / self.inner["deep"][at]
            return np.maximum(((np.hypot(a, b) - 1) * np.float32(0.8 * w) + 2.5) / canvas.step[2], (z - self.dome(y, x) + 4) / canvas.step[0])

        def liver(points: np.ndarray) -> np.ndarray:  # its lower face climbs to the left
            z, y, x = points
            return np.maximum(inside(points), ((-tip + 0.52 * (x + w) - 0.25 * (y - 20)) - z) / canvas.step[0] * 0.8)

        tip = u(135, 165)
        canvas.blob((-55, -0.05 * d, -0.34 * w), (120, 0.98 * d, 0.92 * w), self.liver, 5, also=liver)
        canvas.blob((self.left_dome - 52, 0.42 * d, 0.70 * w), (u(46, 56), u(36, 44), u(24, 30)), u(42, 55) + soft, 1, turn=turned_by(y=-18), also=inside)
        ground, place = u(-5, 35), (-58 + self.left_dome, -0.22 * d, 0.36 * w)
        canvas.blob(place, (48, 42, 38), 38 + soft / 2, 6, within=(FAT,), also=inside)
        canvas.tube([(place[0] - 25, place[1] - 5, place[2]), (-122, -0.45 * d, 12), (-115, -0.35 * d, -22)], (27, 20, 14), 38 + soft / 2, 6, within=(FAT, 6))
        canvas.blob(place, (44, 38, 34), ground, within=(6,))
        gas = (place[0] + 26, place[1], place[2]) if self.upright else (place[0], place[1] - 24, place[2])
        canvas.blob(gas, (u(8, 20), u(16, 24), u(16, 28)) if self.upright else (u(20, 32), u(8, 16), u(16, 26)), -990, within=(6,))
        colon = {"right": [(-262, 0.05 * d, -0.66 * w), (-200, 0.15 * d, -0.72 * w), (-148, 0.05 * d, -0.66 * w)],
                 "across": [(-148, -0.2 * d, -0.62 * w), (-185, -0.72 * d, -0.2 * w), (-175, -0.72 * d, 0.2 * w), (-95, -0.1 * d, 0.72 * w)],
                 "left": [(-95, 0.1 * d, 0.74 * w), (-180, 0.25 * d, 0.74 * w), (-262, 0.1 * d, 0.66 * w), (-300, 0.2 * d, 0.25 * w),
                          (-330, 0.42 * d, 0)]}  # fmt: skip
        for places in colon.values():
            places = np.array(places) + lot.normal(0, 5, (len(places), 3))
            canvas.tube(places, u(17, 24), 35, 20, within=(FAT, 20))
            canvas.tube(places, 14, lot.choice([-60, 10, -400]), within=(20,))
            for _ in range(3):
                k = lot.integers(len(places) - 1)
                spot = places[k] + lot.random() * (places[k + 1] - places[k]) + (0, 0 if self.upright else -5, 0)
                canvas.blob(spot, (u(12, 24), u(9, 13), u(10, 18)), -960, within=(20,))
        for _ in range(int(lot.integers(20, 34))):
            low, high, right, left = (-290, -130, -0.55, 0.55) if lot.random() < 0.7 else (-160, -85, 0.1, 0.6)
            spot = np.array((u(low, high), u(-0.7, 0.2) * d, u(right, left) * w))
            other = spot + lot.normal(0, (10, 12, 32))
            canvas.tube([spot, (spot + other) / 2 + lot.normal(0, 10, 3), other], u(9, 14), u(15, 35) + soft / 3, 18, within=(FAT, 18))
            if lot.random() < 0.3:
                canvas.blob(spot, (9, 7, 10), -950, within=(18,))
        self.kidneys = {}
        for number, side in ((2, "right"), (3, "left")):
            sign, height = SIGN[side], (-125 if side == "right" else -112) + u(-8, 8)
            place = np.array((height, self.back(height) + 4, sign * u(58, 68)))
            self.kidneys[side] = place
            tilt = turned_by(z=sign * -25, y=sign * -12)
            canvas.blob(place, (u(50, 59), u(24, 28), u(24, 29)), u(26, 38) + (1.1 * soft if self.contrast else 0), number, turn=tilt)
            canvas.blob(place + (0, -6, -sign * 12), (24, 10, 13), u(-70, 10), within=(number,))
            canvas.tube([place + (58, -12, -sign * 22), place + (44, -4, -sign * 8)], 4, 15, 9 if side == "left" else 8, within=(FAT, SOFT))
            canvas.tube([(-85, self.back(-85) + 2, sign * 24), (-190, self.back(-190) - 4, sign * 44), (-330, -5, sign * 78)], (9, 20, 18), self.muscle,
                        88 if side == "left" else 89, within=(FAT,))  # fmt: skip
            canvas.blob((-335, 0.75 * d, sign * 72), (62, 42, 52), self.muscle, MUSCLE, within=(FAT,))
        place = self.back(-100) - 48
        canvas.tube([(-118, place, -28), (-100, place - 8, 10), (-82, place + 18, 72)], (13, 9, 8), u(35, 48) + soft, 7)
        canvas.blob((-112, -0.42 * d, -0.40 * w), (u(22, 34), u(12, 18), u(12, 17)), u(0, 18), 4, turn=turned_by(x=30))
        size = u(24, 48)
        canvas.blob((-335, -8, u(-5, 5)), (0.85 * size, size, 1.1 * size), u(0, 12), 21)

    def _middle(self, canvas: Canvas) -> None:
        """Heart, great vessels, airways and gullet."""
        u, h = self.lot.uniform, self.high
        turn = turned_by(z=u(25, 40)) @ turned_by(y=u(38, 52) if self.upright else u(22, 36))
        radii = np.array((44.0, 42.0, 62.0))
        half = self.ratio * self.wide * 0.985
        radii *= (half / 62) ** np.array((0.6, 0.8, 1.0))
        radii *= half / math.sqrt(((turn[2] * radii) ** 2).sum())
        centre = np.array((0.26 * radii.mean() + 10, self.front(0.15 * h) + 0.72 * radii.mean() + 4, 0.34 * half))  # a third to the right of the midline
        centre[0] = max(centre[0], 0.62 * math.sqrt(((turn[0] * radii) ** 2).sum()) - 8)
        self.heart = (centre, radii, turn)
        back, arch = self.back(0.5 * h), 0.66 * h
        canvas.tube([(0.9 * h, -2, -24), (0.68 * h, -6, -25), (0.40 * h, -8, -27)], (8, 9, 10), self.blood, 62)
        canvas.blob((0.30 * h + 4, centre[1] + 12, centre[2] - 0.62 * half), (0.85 * radii[0], 0.75 * radii[1], 0.40 * half), self.blood, 51)
        canvas.blob(centre, radii, self.blood - 0.3 * self.contrast, 51, turn=turn)
        if self.contrast:  # chambers stand out of the muscle
            canvas.blob(centre + (0, 4, 8), 0.62 * radii, self.blood, turn=turn, within=(51,))
            canvas.blob(centre + (8, -14, -22), 0.45 * radii, self.blood - 20, turn=turn, within=(51,))
        canvas.tube([(0.38 * h, -20, 14), (0.52 * h, -6, 24), (0.53 * h, 12, 52)], (14, 13, 9), self.blood, VESSEL)
        canvas.tube([(0.50 * h, -4, 20), (0.49 * h, 4, -48)], (12, 9), self.blood, VESSEL)
        wide = u(12, 16)
        canvas.tube([(0.34 * h, -14, -4), (0.52 * h, -24, -18), (arch, -8, -6), (arch, 14, 16), (0.58 * h, back - 26, 25), (0.2 * h, back - 26, 20),
                     (-60, self.back(-60) - 28, 10), (-200, self.back(-200) - 32, 6)], (wide, wide, wide, 0.95 * wide, 0.9 * wide, 0.85 * wide, 10, 8.5),
                    self.blood, 52)  # fmt: skip
        for y, x in ((-14, -14), (0, 6), (12, 20)):
            canvas.tube([(arch, y, x), (h + 40, y, 2.1 * x + math.copysign(8, x))], 5, self.blood, VESSEL)
        canvas.tube([(25, -2, -26), (-200, self.back(-200) - 30, -20)], (12, 10), self.blood - 0.3 * self.contrast, 63)
        canvas.tube([(-120, self.back(-120) - 46, -8), (-75, -5, -40)], (7, 6), self.blood, None)
        fork = np.array((0.60 * h, back - 40, 4.0))
        canvas.tube([(h + 70, 10, 2), (0.6 * h, back - 25, 5), (0.2 * h, back - 30, 6), (-35, back - 32, 22)], 7, 35, 15)
        pipe = u(6.8, 9.5)
        for sign, fall, reach in ((-1, 36, 40), (1, 34, 52)):
            ends = [fork, fork + (-0.55 * fall, 3, 0.5 * sign * reach), fork + (-fall, 8, sign * reach)]
            canvas.tube(ends, (0.85 * pipe, 0.8 * pipe, 0.55 * pipe), 0, None)
            canvas.tube(ends, (0.72 * pipe, 0.66 * pipe, 0.42 * pipe), -990, 16)
        pipes = [(h + 90, -4, 0), (0.85 * h, back - 52, 1), fork]
        canvas.tube(pipes, pipe + 1.6, 30, None)
        canvas.tube(pipes, pipe, -995, 16)

    def _bones(self, canvas: Canvas) -> None:
        u, w, d, h = self.lot.uniform, self.wide, self.deep, self.high
        spongy, hard = u(110, 220), u(600, 1000)
        block = canvas.near((-150, -d - 20, -w - 15), (h + 5, d + 20, w + 15))
        if block is not None and not self.film:
            there = np.nonzero(np.abs(self.wall[block] - 5) < 16)
            self._ribs(canvas, tuple(i + s.start for i, s in zip(there, block)), spongy, hard)
        self._spine(canvas, spongy, hard)
        canvas.blob((0.80 * h, self.front(0.80 * h) - 6, 0), (23, 7, 26), spongy + 80, 116, turn=turned_by(x=-18), power=4)
        canvas.blob((0.42 * h, self.front(0.42 * h) - 7, 0), (52, 6, 16), spongy + 80, 116, turn=turned_by(x=-10), power=4)
        for number, line in () if self.film else zip((74, 73), self.collar()):
            canvas.tube(line, (7.5, 6, 5.5, 5.5), hard, number)
        for side, sign in SIGN.items():
            left = side == "left"
            out = w * (1.0 if self.apart else 0.84) + u(-4, 6)
            turn = turned_by(z=sign * (52 if self.apart else 32), y=-sign * u(4, 14))
            canvas.blob((0.55 * h, 0.70 * d + 10, sign * out), (0.34 * h, 4.5, 36), hard * 0.8, 71 if left else 72, turn=turn, power=4)
            canvas.tube([(0.78 * h, 0.85 * d, sign * (out - 28)), (0.88 * h, 30, sign * (w + 12))], (5, 9), hard, 71 if left else 72)
            canvas.blob((h - 32, 16, sign * (w + 30)), (23, 23, 22), spongy + 120, 69 if left else 70)
            elbow = (h - 280, 25, sign * (w + 62 + self.fat)) if self.arms else (h + 230, 10, sign * (w + 40))
            canvas.tube([(h - 36, 16, sign * (w + 36)), elbow], 11, hard, 69 if left else 70)
            canvas.tube([(h - 60, 17, sign * (w + 39)), elbow], 5, 60)
            hip = 77 if left else 78
            turn = turned_by(z=sign * 38, y=sign * 24)
            canvas.blob((-235, 18, sign * 92), (62, 54, 7), spongy + 200, hip, turn=turn)
            canvas.tube([(-265, 35, sign * 68), (-318, 8, sign * 92), (-352, -32, sign * 42), (-358, -42, sign * 6)], (12, 24, 10, 11), spongy + 200, hip)
            canvas.tube([(-322, 10, sign * 88), (-372, 28, sign * 64), (-360, -30, sign * 40)], (17, 13, 8), spongy + 220, hip)
            thigh = 75 if left else 76
            canvas.blob((-325, 6, sign * 96), (26, 26, 25), 60, None)
            canvas.blob((-325, 6, sign * 96), (23, 23, 23), spongy + 160, thigh)
            canvas.tube([(-328, 6, sign * 100), (-352, 12, sign * 138), (-430, 12, sign * 132)], (15, 17, 14), hard, thigh)
        canvas.tube([(-245, self.back(-245) + 8, 0), (-285, self.back(-285) + 30, 0), (-325, self.back(-300) + 34, 0)], (36, 28, 11), spongy + 60, 25)

    def _ribs(self, canvas: Canvas, at: tuple[np.ndarray, ...], spongy: float, hard: float) -> None:
        """At points near the wall of the chest: ribs fall from their vertebra to the side and on to the front, where gristle climbs to the sternum."""
        u = self.lot.uniform
        z, y, x = canvas.points[(slice(None), *at)]
        wall, across = self.wall[at], self.across[at]
        around = np.arctan2(np.abs(x), y - self.inner["middle"][self._at(z)])
        level = self._at(z + self._fall(around, z))
        number, off = self.level["number"][level], self.level["off"][level]
        rib = np.clip(44 - number.astype(np.int16), 1, 12)  # 43 is T1
        end = np.array((0, *_RIB_END), np.float32)[rib]
        front = around > 1.7
        thick, tall = np.where(front, np.float32(0.7), np.float32(1)) * np.float32(u(4.5, 5.5)), u(5.5, 7) / 0.85
        a, b = (wall - 5) / thick, off / tall
        size = np.sqrt(a * a + b * b) + 1e-3
        far = (size - 1) * size / np.sqrt((a * across / thick) ** 2 + (b * canvas.step[0] / tall) ** 2 + 1e-6)
        real = (number >= 32) & (number <= 43) & (around > 0.22)
        names = np.where(x > 0, 91 + rib, 103 + rib).astype(np.uint8)
        canvas.paint(at, far, np.where(size > 0.6, hard, spongy).astype(np.float32), names, real & (around < end))
        canvas.paint(at, far, u(70, 130), 117, real & (around >= end) & (rib < 11) & (np.abs(x) > 14))

    def _spine(self, canvas: Canvas, spongy: float, hard: float) -> None:
        block = canvas.near((-240, 0.3 * self.deep, -45), (self.high + 90, 1.3 * self.deep + 60, 45))
        if block is None:
            return
        z, y, x = canvas.points[(slice(None), *block)]
        at, step = self._at(z), float(canvas.step[2])
        number, off, half = (self.level[k][at] for k in ("number", "off", "half"))
        low = np.clip((43 - number.astype(np.float32)) / 16, 0, 1)
        across, deep = x - self.spine["x"][at], y - self.spine["y"][at]
        rx, ry = 14 + 9 * low, 11 + 6 * low
        canal = ry + 9
        ok = (z > -236) & (number <= 47)
        for sign, name in ((1, 86), (-1, 87)):
            far = np.hypot((across - sign * 27) / 26, (deep - canal - 17) / 20) - 1
            canvas.paint(block, far * 18 / step, self.muscle, name, canvas.among(block, (FAT, MUSCLE, SOFT)))
        body = (np.hypot(across / rx, deep / ry) - 1) * ry
        arch = np.maximum(np.abs(np.hypot(across, deep - canal) - 11) - 3, np.abs(off) - 0.45 * half)
        spike = np.maximum(np.maximum(np.abs(across) - 3.5, np.abs(deep - canal - 28) - 18), np.abs(off + 0.4 * (deep - canal - 18)) - 7)
        wing = np.maximum(np.maximum(np.abs(deep - canal + 1) - 5, np.abs(across) - (22 + 10 * (number < 44))), np.maximum(np.abs(off) - 6, 10 - np.abs(across)))
        disc = np.abs(off) > half - 3.5
        canvas.paint(block, body / step, np.where(disc, 85, np.where(body > -2.5, hard, spongy)), np.where(disc, SOFT, number).astype(np.uint8), ok)
        canvas.paint(block, np.minimum(np.minimum(arch, spike), wing) / step, 0.5 * hard, number, ok)
        canvas.paint(block, (np.hypot(across, deep - canal) - 7) / step, 25, 79, ok)

    def vessels(self) -> Iterator[tuple[np.ndarray, np.ndarray, float, str]]:
        """Branching arteries and veins of the lungs: from, to, radius, side. They bear the lung's number, as its outline does."""
        lot, h = self.lot, self.high
        for side, sign in SIGN.items():
            ends = [(np.array((0.49 * h, 6.0, sign * 44)), lot.normal(0, 1, 3) * (1.0, 0.8, 0.5) + (-0.1, 0, 0.9 * sign), 4.2) for _ in range(7)]
            for _ in range(4):
                grown = []
                for place, way, thick in ends:
                    way = way / np.linalg.norm(way)
                    tip = place + way * lot.uniform(18, 34) * (h / 215)
                    yield place, tip, thick, side
                    grown += [(tip, way + lot.normal(0, 0.55, 3), thick * lot.uniform(0.55, 0.78)) for _ in range(2 if thick > 1.2 else 1)]
                ends = grown

    def ribs(self) -> Iterator[np.ndarray]:
        """Middle lines (N, 3) of the bony ribs, one point a millimetre or so, from the spine to the front."""
        for number in range(32, 44):
            level = float(_HEIGHT[number] * (self.high / 215 if _HEIGHT[number] > 0 else 1))
            around = np.arange(0.2, _RIB_END[43 - number], 0.009, np.float32)
            z = np.full_like(around, level)
            for _ in range(4):
                z = level - self._fall(around, z)
            at = self._at(z)
            wide, deep, middle = (self.inner[k][at] for k in ("wide", "deep", "middle"))
            for sign in SIGN.values():
                yield np.stack([z, middle + (deep + 5) * np.cos(around), sign * (wide + 5) * np.sin(around)], 1)

    def collar(self) -> Iterator[np.ndarray]:
        """Lines of the collar bones, patient's right first."""
        h, w, raised = self.high, self.wide, 0 if self.arms or self.upright else 18
        for sign in SIGN.values():
            bend = self.lot.normal(0, 3, 3)
            yield np.array([(0.83 * h, self.front(0.83 * h) - 6, sign * 16), np.array((0.88 * h, -24, sign * 0.42 * w)) + bend,
                            (0.95 * h + raised, 8, sign * 0.8 * w), (0.96 * h + raised, 18, sign * (w + 14))])  # fmt: skip

    def _fall(self, around: np.ndarray, z: np.ndarray) -> np.ndarray:
        """How far a rib lies below its vertebra, by the angle from the spine."""
        steep = (0.40 + 0.60 * np.clip((self.high - z) / (0.6 * self.high), 0, 1)) * (0.46 * self.high)
        return steep * (1 - np.cos(np.minimum(around, 2.3))) / 1.67 - np.clip(around - 2.3, 0, 1) * 55
