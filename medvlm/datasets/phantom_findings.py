"""What may be wrong with the bodies of :mod:`.phantom`, painted into them with the words for it.

Sources. HU: Prokop, Spiral and Multislice CT of the Body (2003) (haematoma 40 to 90, fluid about 0). A nodule measures up to 30 mm, a
mass more: Hansell et al., Fleischner Society: Glossary of Terms for Thoracic Imaging, Radiology 246 (2008).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .phantom_canvas import FAT, FLUID, GREY, ID, LUNGS, SIGN, WHITE, Canvas
from .phantom_head import Head
from .phantom_trunk import Trunk

CHEST = ("consolidation", "ground-glass opacity", "pleural effusion", "pneumothorax", "cardiomegaly", "nodule", "mass")
BELLY = ("liver lesion", "kidney stone", "kidney cyst")
ZONES = ("upper", "middle", "lower")
HEAD = ("hemorrhage", "midline shift", "mass")


def add(made: Trunk | Head, canvas: Canvas, finding: str) -> dict[str, str]:
    """Paint what is wrong with a body that is painted; gives its words: finding, and side and zone where it has them."""
    if isinstance(made, Head):
        return _in_head(made, canvas, finding)
    lot, u = made.lot, made.lot.uniform
    side = str(lot.choice(list(SIGN)))
    said = {"finding": finding, "side": side}
    if finding == "cardiomegaly":  # drawn with the heart
        return {"finding": finding}
    if finding in BELLY:
        return said | _lesion(made, canvas, finding, side)
    zone, number, within = str(lot.choice(ZONES)), ID[finding], LUNGS[side]
    if finding == "pleural effusion":
        z, y, _ = canvas.points[(slice(None), *made.block)]
        if made.upright:
            far = (z - u(-28, 35) - u(20, 45) * np.exp(np.minimum(made.wall[made.block], 0) / 16)) / canvas.step[0]
        else:
            far = (u(0.25, 0.7) * made.deep - y) / canvas.step[1]
        canvas.paint(made.block, far, u(-5, 22), number, canvas.among(made.block, within))
        return said
    if finding == "pneumothorax":
        z, y, _ = canvas.points[(slice(None), *made.block)]
        if made.upright:
            gap = u(18, 42) * np.clip((z / made.high - u(-0.1, 0.3)) / 0.15, 0, 1) * (0.5 + 0.5 * z / made.high) - 4
        else:
            gap = u(18, 45) * np.clip(0.4 - y / made.deep, 0, 1.4)
        away, step = made.wall[made.block] + gap, made.across[made.block]
        there = canvas.among(made.block, within)
        canvas.paint(made.block, (np.abs(away + 1.5) - 1.5) / step, -350, None, there)  # the edge of the lung
        canvas.paint(made.block, -away / step, -998, number, there)
        return said
    if finding in ("nodule", "mass"):
        radius = u(5, 14) if finding == "nodule" else u(18, 34)
        place = _place(made, canvas, within, zone, radius)
        canvas.blob(place, radius * np.array((u(0.85, 1.1), u(0.85, 1.1), 1)), u(10, 60), number, within=within, rough=0.06 * radius, lot=lot)
        return said | {"zone": zone}
    if finding == "consolidation":
        place, reach = _place(made, canvas, within, zone, 12), u(26, 46)
        radii = reach * np.array((u(0.7, 1), u(0.8, 1.1), u(0.8, 1.1)))
        canvas.blob(place, radii, u(-80, 40), number, within=within, rough=0.25 * reach, lot=lot, share=u(0.85, 1))
        return said | {"zone": zone}
    both = lot.random() < 0.4  # ground glass
    for one in SIGN if both else (side,):
        for _ in range(int(lot.integers(2, 5))):
            place, reach = _place(made, canvas, LUNGS[one], None if both else zone, 8), u(20, 42)
            canvas.blob(place, reach * np.array((u(0.7, 1.1), 1, u(0.7, 1.1))), u(-520, -330), number, within=LUNGS[one], rough=0.3 * reach, lot=lot, share=0.85)
    return {"finding": finding, "side": "both"} if both else said | {"zone": zone}


def _place(made: Trunk, canvas: Canvas, within: Sequence[int], zone: str | None, inside: float) -> np.ndarray:
    """A point of the lung, ``inside`` mm from the chest wall, in a third of its height where one is asked for."""
    third = {"lower": (-0.08, 0.30), "middle": (0.38, 0.62), "upper": (0.70, 0.93), None: (0.0, 0.9)}[zone]
    few = tuple(slice(s.start, s.stop, 3) for s in made.block)
    z, tissue, wall = canvas.points[0][few], canvas.tissue[few], made.wall[few]
    right = np.isin(tissue, within) & (z > third[0] * made.high) & (z < third[1] * made.high)
    found = np.argwhere(right & (wall < -inside))
    found = found if len(found) else np.argwhere(right) if right.any() else np.argwhere(np.isin(tissue, within))
    return canvas.points[(slice(None), *few)][(slice(None), *made.lot.choice(found))]


def _lesion(made: Trunk, canvas: Canvas, finding: str, side: str) -> dict[str, str]:
    lot, u = made.lot, made.lot.uniform
    if finding == "liver lesion":
        found = np.argwhere(canvas.tissue[::2, ::2, ::2] == ID["liver"]) * 2
        radius, place = u(7, 27), canvas.points[(slice(None), *lot.choice(found))]
        canvas.blob(place, (radius, radius, radius), made.liver - u(22, 45), ID[finding], within=(ID["liver"],), rough=0.08 * radius, lot=lot)
        return {"side": ""}
    kidney = ID[f"kidney_{side}"]
    if finding == "kidney stone":
        place, radius = made.kidneys[side] + (u(-22, 22), -2, -SIGN[side] * u(4, 9)), u(3.5, 8)
        canvas.blob(place, (radius, radius, radius), u(500, 1200), ID[finding])
    else:
        place, radius = made.kidneys[side] + (u(-38, 38), u(-6, 10), SIGN[side] * u(14, 26)), u(9, 26)
        canvas.blob(place, (radius, radius, radius), u(-2, 14), ID[finding], within=(kidney, FAT))
    return {}


def _in_head(made: Head, canvas: Canvas, finding: str) -> dict[str, str]:
    """A midline shift was painted with the brain."""
    lot, u = made.lot, made.lot.uniform
    if finding == "midline shift":
        return {"finding": finding, "side": "left" if made.shift > 0 else "right"}
    side = ("right" if made.shift > 0 else "left") if made.shift else str(lot.choice(list(SIGN)))  # what takes room pushes the middle away
    brain, said = (GREY, WHITE), {"finding": finding, "side": side}
    x = canvas.points[2][made.block]
    if finding == "hemorrhage" and lot.random() < 0.4:  # between skull and brain
        z, y, _ = canvas.points[(slice(None), *made.block)]
        thick, tall, long = u(9, 20), u(32, 60), u(35, 70)
        far = -(made.cavity + thick * (1 - ((z - u(5, 35)) / tall) ** 2 - ((y - u(-25, 25)) / long) ** 2))
        far = np.maximum(far, 6 - SIGN[side] * x)
        canvas.paint(made.block, far / float(canvas.step.mean()), u(55, 85), ID[finding], canvas.among(made.block, (*brain, FLUID)))
        return said
    radius = u(9, 22)
    few = tuple(slice(s.start, s.stop, 2) for s in made.block)
    there = np.isin(canvas.tissue[few], brain) & (SIGN[side] * canvas.points[2][few] > 0.6 * radius + 6) & (canvas.points[0][few] > -15)
    found = np.argwhere(there & (made.cavity[::2, ::2, ::2] < -0.9 * radius))
    place = canvas.points[(slice(None), *few)][(slice(None), *lot.choice(found if len(found) else np.argwhere(there)))]
    shape = radius * np.array((u(0.8, 1.1), u(0.8, 1.2), 1))
    own = lambda p: (2 - SIGN[side] * p[2]) / canvas.step[2]  # noqa: E731
    canvas.blob(place, shape + u(3, 14), 17, None, within=brain, rough=3, lot=lot, also=own)  # swelling
    bright = u(58, 85) if finding == "hemorrhage" else u(40, 58) + 0.5 * made.contrast
    canvas.blob(place, shape, bright, ID[finding], within=(*brain, FLUID), rough=0.1 * radius, lot=lot, also=own)
    if finding == "mass" and lot.random() < 0.5:
        canvas.blob(place, 0.55 * shape, 12, None, within=(ID["mass"],), rough=1, lot=lot)  # dead inside
    return said
