"""Heads by lot, sick or well, for :mod:`.phantom` to take pictures of: the origin is the middle of the brain.

Sources. HU: Prokop, Spiral and Multislice CT of the Body (2003), as tabled by radclass.mudr.org (white matter 20 to 30, grey 37 to
45, haematoma 40 to 90, bone from 700). Brain 1.3 to 1.45 kg: ICRP Publication 89. A globe is about 24 mm across; a midline shift of
more than 5 mm is called one: neuroradiological textbooks.
"""

from __future__ import annotations

import numpy as np

from .phantom_canvas import BONE, FAT, FLUID, GREY, ID, MUSCLE, SIGN, SOFT, WHITE, Canvas, clouds, egg, turned_by


class Head:
    """A head by lot, painted by :meth:`paint`. shift: mm by which the middle of the brain lies towards the patient's left, 0 for none."""

    def __init__(self, lot: np.random.Generator, shift: float = 0, contrast: float = 0):
        u = lot.uniform
        self.lot, self.shift, self.contrast, self.size = lot, shift, contrast, u(0.94, 1.05)
        self.outer = np.array((97 * u(0.95, 1.04), 95 * u(0.95, 1.05), 75 * u(0.95, 1.05))) * self.size
        self.scalp, self.bone, self.wide = u(4, 9), u(5.5, 8.5), u(0.7, 1.7)
        self.grey, self.white, self.fluid = u(37, 43), u(25, 31), u(2, 12)

    def paint(self, canvas: Canvas) -> None:
        u, s = self.lot.uniform, self.size
        skull, inner = self.outer - self.scalp, self.outer - self.scalp - self.bone
        middle = (4 * s, 0, 0)
        canvas.blob(middle, self.outer, u(-80, -20), FAT)
        canvas.blob((-72 * s, -42 * s, 0), (82 * s, 56 * s, 62 * s), 25, MUSCLE)
        canvas.blob((-72 * s, -96 * s, 0), (22, 16, 13), 30, SOFT)  # the nose
        canvas.blob((-170 * s, 14, 0), (120 * s, 58 * s, 58 * s), 45, MUSCLE)
        for sign in SIGN.values():
            canvas.blob((-30 * s, 8, sign * (self.outer[2] + 3)), (28, 16, 7), 10, SOFT)
            canvas.blob((-70 * s, -62 * s, sign * 40 * s), (26, 22, 20), -95, FAT)
            canvas.blob((-92 * s, -2, sign * 56 * s), (34, 22, 10), 50, MUSCLE)
        block = canvas.near(np.subtract(middle, self.outer), np.add(middle, self.outer))
        if block is not None:
            self._inside(canvas, block, middle, skull, inner)
        for sign, name in ((1, "left"), (-1, "right")):
            canvas.blob((-36 * s, -70 * s, sign * 33 * s), (19, 26, 19), 700, ID["skull"])
            canvas.blob((-36 * s, -74 * s, sign * 33 * s), (17, 27, 17), -70, FAT)
            canvas.tube([(-36 * s, -66 * s, sign * 33 * s), (-36 * s, -38 * s, sign * 20 * s)], 3, 30, None)
            canvas.blob((-36 * s, -82 * s, sign * 33 * s), (12, 12, 12), 40, ID[f"eye_{name}"])
            canvas.blob((-36 * s, -82 * s, sign * 33 * s), (10, 10, 10), 8)
            canvas.blob((-36 * s, -90 * s, sign * 33 * s), (4.5, 2.5, 4.5), 90)
            canvas.blob((-66 * s, -60 * s, sign * 28 * s), (18, 21, 16), 600, ID["skull"])
            canvas.blob((-66 * s, -60 * s, sign * 28 * s), (16, 18.5, 13.5), -980, ID["sinus_maxillary"])
            cheek = [(a * s, b * s, sign * c * s) for a, b, c in ((-42, -64, 50), (-56, -72, 46), (-52, -30, 66), (-44, -4, 64))]
            canvas.tube(cheek, 4, 800, ID["skull"])
            canvas.blob((-52 * s, 26 * s, sign * 52 * s), (20, 16, 12), 550, ID["skull"])
            canvas.blob((-52 * s, 27 * s, sign * 53 * s), (15, 12, 8), -250, rough=3, lot=self.lot)
        canvas.blob((-58 * s, -66 * s, 0), (24, 30, 14), 350, ID["skull"], power=4)
        for sign in (1, -1):
            canvas.blob((-58 * s, -68 * s, sign * 7), (22, 30, 5), -980, None, power=4)
        canvas.blob((-52 * s, -70 * s, 0), (24, 28, 1), 300)
        if (full := u(0, 1)) > 0.1:
            canvas.blob((-14 * s, self._forward(-14 * s) + 7, 0), (13 * full, 5, 16 * full), -970, ID["sinus_frontal"])
        canvas.tube([(-82 * s, -24 * s, 0), (-110 * s, -10 * s, 0), (-190 * s, -14 * s, 0)], (9, 8, 8), -990)
        jaw = [(-52, -2, 50), (-92, -6, 46), (-116, -36, 38), (-122, -78, 17), (-122, -88, 0)]
        for sign in (1, -1):
            canvas.tube([(a * s, b * s, sign * c * s) for a, b, c in jaw], (6, 7, 8, 8, 8), u(500, 800), ID["mandible"])
            arc = [(-101 * s, b * s, sign * c * s) for b, c in ((-88, 0), (-82, 12), (-64, 21), (-46, 24))]
            canvas.tube(arc, 5.5, u(1200, 1900), BONE)
        canvas.blob((-110 * s, -52 * s, 0), (14, 30, 19), 55, MUSCLE)
        for i, number in enumerate((50, 49, 48, 47)):
            canvas.blob((-84 * s - 17 * i, 12 * s + 1.5 * i, 0), (6.5, 12, 20 if i < 2 else 13), 350, number, power=4)
            canvas.tube([(-84 * s - 17 * i, 22 * s, -16), (-84 * s - 17 * i, 46 * s, 0), (-84 * s - 17 * i, 22 * s, 16)], 4, 450, number)
        canvas.tube([(-70 * s, 22 * s, 0), (-200 * s, 30 * s, 0)], 9, self.fluid, FLUID)
        canvas.tube([(-70 * s, 22 * s, 0), (-200 * s, 30 * s, 0)], 5, 35, 79)

    def _forward(self, z: float) -> float:
        """y of the outer skull in the middle of the forehead."""
        radii = self.outer - self.scalp
        return float(-radii[1] * np.sqrt(max(0.0, 1 - ((z - 4 * self.size) / radii[0]) ** 2)))

    def _inside(self, canvas: Canvas, block: tuple[slice, ...], middle, skull: np.ndarray, inner: np.ndarray) -> None:
        u, s, lot, sz = self.lot.uniform, self.size, self.lot, canvas.step[0]
        points, mean = canvas.points[(slice(None), *block)], float(canvas.step.mean())
        z, y, x = points
        ramp = -20 - 18 / (1 + np.exp(-(y + 36 * s) / 8)) - 30 / (1 + np.exp(-(y - 4 * s) / 8))  # the base of the skull, in three steps
        ramp = ramp + 3 * clouds(z.shape, lot, 24 / canvas.step)
        vault = egg(points, canvas.step, middle, skull)
        cavity = np.maximum(egg(points, canvas.step, middle, inner), (ramp * s - z) / sz)
        shell = np.maximum(vault, ((ramp - 6) * s - z) / sz)
        hard = u(900, 1400)
        depth = egg(points, canvas.step, middle, (skull + inner) / 2)
        canvas.paint(block, shell, np.where(np.abs(depth) * mean < 1.1, 0.5 * hard, hard).astype(np.float32), ID["skull"])
        canvas.paint(block, cavity, self.fluid, FLUID)
        self.cavity, self.block = cavity * mean, block
        bent = x - np.float32(self.shift) * np.exp(-(((y - 2) / 52) ** 2) - ((z - 12) / 44) ** 2)
        folds, fine = clouds(z.shape, lot, 9 / canvas.step), clouds(z.shape, lot, 5 / canvas.step)
        deep = self.cavity + 3.0 + 3.5 * np.clip(1 - 2.6 * np.abs(folds), 0, 1) * u(0.3, 1.6)
        cleft = np.where((z > 18) | (np.abs(y) > 46), 1.6 * self.wide - np.abs(bent), np.float32(-99))
        brain = np.maximum(deep, cleft)
        canvas.paint(block, brain / mean, self.grey, GREY)
        core = np.maximum(brain + 6 + 2 * fine + 2.5 * folds, 9 - np.abs(bent) - 0.2 * np.abs(z - 5))
        canvas.paint(block, np.maximum(core, -26 * s - z) / mean, self.white, WHITE)
        canvas.paint(block, (np.maximum(np.abs(bent) - 0.6, np.where((z > 26) | (y < -40) | (y > 40), -1, 3)) + np.maximum(self.cavity + 1, 0)) / mean, 52, None,
                     canvas.among(block, (FLUID, GREY)) & (z > -20))  # fmt: skip
        moved = Canvas(np.stack([z, y, bent]), canvas.step)
        moved.hu, moved.tissue = canvas.hu[block], canvas.tissue[block]
        brainy = (GREY, WHITE, FLUID)
        moved.blob((-46 * s, 46 * s, 0), (25 * s, 30 * s, 50 * s), self.grey - 4, GREY, within=brainy)
        moved.blob((-46 * s, 44 * s, 0), (14 * s, 18 * s, 34 * s), self.white, WHITE, within=brainy, rough=4, lot=lot)
        moved.tube([(-6, 6 * s, 0), (-40 * s, 6 * s, 0), (-95 * s, 20 * s, 0)], (14, 13, 9), self.white + 4, WHITE, within=brainy)
        wide = self.wide
        for sign, name in ((1, "left"), (-1, "right")):
            moved.blob((4 * s, 8 * s, sign * 12 * s), (11, 16, 9), self.grey, GREY, within=brainy)
            moved.blob((5 * s, -14 * s, sign * 25 * s), (13, 20, 7), self.grey + 2, GREY, within=brainy, turn=turned_by(z=sign * 18))
            moved.blob((16 * s, -26 * s, sign * 12 * s), (9, 9, 5), self.grey + 2, GREY, within=brainy)
            moved.tube([(-2 * s, 4, sign * 42 * s), (-2 * s, -18 * s, sign * 44 * s)], 2.2 * wide, self.fluid, FLUID, within=brainy)
            horns = [(a * s, b * s, sign * c * s) for a, b, c in ((8, -38, 9), (18, -22, 8), (24, 4, 12), (18, 26, 20), (8, 40, 26), (4, 60, 22))]
            thick = np.array((4, 5, 5, 6, 7, 2.5)) * wide**0.7
            moved.tube(horns, thick, self.fluid, ID[f"lateral_ventricle_{name}"], within=brainy)
            if lot.random() < 0.5:
                moved.blob((10 * s, 38 * s, sign * 23 * s), (3, 3, 2.5), u(80, 220))
        moved.blob((2 * s, 2, 0), (10, 14, 2.2 * wide), self.fluid, FLUID, within=brainy)
        moved.blob((-42 * s, 25 * s, 0), (8, 5 * wide, 7), self.fluid, FLUID, within=brainy)
        moved.blob((-24 * s, -8 * s, 0), (7, 9, 11), self.fluid, FLUID, within=brainy)
        if self.contrast:
            canvas.paint(block, (np.hypot(x, y - (inner[1] - 4)) - 4) / mean, 35 + self.contrast, None, z > -10)
