"""Results written for other programs and for people: masks on the image's own grid, and a picture with outlines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import raster
from .files import writing
from .nifti import save_nifti
from .scan import READ_AS, Image, Volume, edges, turned
from .window import display

COLOURS = ("#4cc9f0", "#f9c74f", "#f94144", "#90be6d", "#c77dff", "#f8961e", "#43aa8b", "#ff8fab", "#577590", "#e0e1dd")
"""Outline colours, one a label, told apart by people with red-green blindness by order of lightness too."""
TEXT_COLUMNS = 46


def save_mask_nifti(image: Image | Volume, mask: np.ndarray, path: str | Path) -> Path:
    """A bool mask on the grid of its image -> uint8 NIfTI with the image's own affine.

    Raises:
        GeometryError: GRID_MISMATCH when the shapes differ.
    """
    array = mask.astype(np.uint8)[None]
    grid = image.with_voxels(array, unit="raw") if isinstance(image, Volume) else image.with_pixels(array, unit="raw")
    save_nifti(grid, path)
    return Path(path)


def save_mask_png(mask: np.ndarray, path: str | Path) -> Path:
    """A bool (H, W) mask -> 1-bit PNG of the same size."""
    raster.save_mask(mask, path)
    return Path(path)


def save_preview(image: Image | Volume, regions: Sequence, sentences: Sequence[tuple[str, Sequence[str]]], path: str | Path,
                 title: str = "", notice: str = "") -> Path:  # fmt: skip
    """The picture with outlines on the left; legend and the sentences they support on the right.

    Args:
        regions: sample.Region objects with masks on the image's grid; empty masks are named as absent.
        sentences: (text, labels of the regions it rests on), in order.
    """
    from PIL import Image as Picture
    from PIL import ImageDraw, ImageFont

    canvas, colours = outlined(image, regions)
    height, width = canvas.shape[:2]
    font, bold = ImageFont.load_default(15), ImageFont.load_default(18)
    lines: list[tuple[str, object, list[str], int]] = []
    if title:
        lines += [(title, bold, [], 0), ("", font, [], 0)]
    for region in regions:
        state = "absent" if region.mask is not None and not region.mask.any() else ""
        chance = "" if region.probability is None else f"{min(max(region.probability, 0.01), 0.99):.0%} present"
        note = ", ".join(t for t in (state, chance) if t)
        lines.append((region.label + (f"  ({note})" if note else ""), font, [] if state else [region.label], 0))
    if sentences:
        lines.append(("", font, [], 0))
    for text, labels in sentences:
        for i, part in enumerate(textwrap.wrap(text, TEXT_COLUMNS)):
            lines.append((part, font, [x for x in labels if x in colours] if i == 0 else [], 1))
    lines.append(("", font, [], 0))
    lines += [(part, font, [], 0) for part in textwrap.wrap(notice, TEXT_COLUMNS)]

    step, margin, panel = 22, 16, 430
    tall = max(height, margin * 2 + step * len(lines))
    page = Picture.new("RGB", (width + panel, tall), "#11151c")
    page.paste(Picture.fromarray(canvas), (0, (tall - height) // 2))
    pen = ImageDraw.Draw(page)
    for i, (text, face, dots, _) in enumerate(lines):
        x, y = width + margin, margin + i * step
        for k, label in enumerate(dots[:4]):
            pen.ellipse((x + 12 * k, y + 4, x + 12 * k + 9, y + 13), fill=colours[label])
        pen.text((x + 56 if any(d for *_, d, _ in lines) else x, y), text, fill="#e6e9ef", font=face)
    with writing(path) as temporary:
        page.save(temporary, format="PNG")
    return Path(path)


def outlined(image: Image | Volume, regions: Sequence, longest: int = 900, thickness: int = 2) -> tuple[np.ndarray, dict[str, str]]:
    """uint8 (h, w, 3) of the picture, or of the slice of a volume on which most is outlined, with the outlines drawn on it,
    and {label: colour}. Regions without a mask are not drawn. longest: pixels of its longer side.

    Volumes are turned as a radiologist reads them; where it is known, letters say which side of the patient lies left and right.
    """
    from PIL import Image as Picture
    from PIL import ImageDraw, ImageFont

    masks = [None if r.mask is None else np.asarray(r.mask, bool) for r in regions]
    if isinstance(image, Volume):
        here, upright = image.orientation, READ_AS[image.orientation[0]]
        image, masks = image.reorient(upright), [None if m is None else turned(m, here, upright) for m in masks]
    shown, masks = _slice(image, masks)
    grey = shown if shown.ndim == 3 else np.repeat(shown[..., None], 3, -1)
    height, width = _screen(grey.shape[:2], image, longest)
    canvas = np.asarray(Picture.fromarray(grey).resize((width, height), Picture.Resampling.BICUBIC)).copy()
    colours = {region.label: COLOURS[i % len(COLOURS)] for i, region in enumerate(regions)}
    for region, mask in zip(regions, masks):
        if mask is not None and mask.any():
            wide = np.asarray(Picture.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Picture.Resampling.BILINEAR)) > 127
            canvas[_outline(wide, thickness)] = _rgb(colours[region.label])
    affine = image.affine if isinstance(image, Volume) else image.info.get("affine")
    if affine is not None:
        page, font = Picture.fromarray(canvas), ImageFont.load_default(max(10, min(height, width) // 28))
        left, right, *_ = edges(affine)
        for place, letter, anchor in ((4, left, "lm"), (width - 4, right, "rm")):
            ImageDraw.Draw(page).text((place, height / 2), letter, fill="#ffffff", font=font, anchor=anchor, stroke_width=1, stroke_fill="#000000")
        canvas = np.asarray(page).copy()
    return canvas, colours


def _slice(image: Image | Volume, masks: list[np.ndarray | None]) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """The picture, or the slice of a volume on which most is outlined, and each mask on it."""
    if isinstance(image, Image):
        return display(image), masks
    count = sum((m.sum((1, 2)) for m in masks if m is not None), np.zeros(image.shape[1], int))
    at = int(count.argmax()) if count.any() else image.shape[1] // 2
    return display(image)[at], [None if m is None else m[at] for m in masks]


def _screen(size: tuple[int, int], image: Image | Volume, longest: int = 900) -> tuple[int, int]:
    """Pixels to draw on: true proportions where the spacing is known, at most ``longest``."""
    spacing = image.spacing[-2:] if image.spacing else (1.0, 1.0)
    tall, wide = size[0] * spacing[0], size[1] * spacing[1]
    factor = longest / max(tall, wide)
    return max(1, round(tall * factor)), max(1, round(wide * factor))


def _outline(mask: np.ndarray, thickness: int = 2) -> np.ndarray:
    from scipy.ndimage import binary_erosion

    return mask & ~binary_erosion(mask, iterations=thickness, border_value=0)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
