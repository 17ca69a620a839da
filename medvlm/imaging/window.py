"""From stored values to what a screen shows: windows, VOI tables and the one inversion of MONOCHROME1. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import UsageError
from .scan import Image, Volume

PRESETS: dict[str, tuple[float, float]] = {
    "soft tissue": (40, 400),
    "lung": (-600, 1500),
    "liver": (90, 150),
    "bone": (480, 2500),
    "brain": (40, 80),
    "mediastinum": (50, 350),
}
"""(centre, width) in HU. Source: OHIF viewer 3, default window level presets (there written width / centre); the
mediastinum: Radiopaedia, "Windowing (CT)"."""

MEDGEMMA: tuple[tuple[float, float], ...] = ((0, 2048), (40, 350), (40, 80))
"""(centre, width) in HU of the red, green and blue channel: -1024..1024, -135..215 and 0..80.
Source: MedGemma 1.5 model card, CT input; Google-Health/medgemma, notebooks/high_dimensional_ct_hugging_face.ipynb."""

TAILS = (0.5, 99.5)
"""Percentiles that become black and white where a picture brings no window."""

FUNCTIONS = ("linear", "linear exact", "sigmoid")


def apply(values: np.ndarray, centre: float, width: float, function: str = "linear") -> np.ndarray:
    """Values through one window -> float32 in [0, 1] of the same shape; NaN becomes 0.

    Source: DICOM PS3.3 C.11.2.1.2 (linear: width >= 1, and a width of 1 is a step) and C.11.2.1.3 (the other two).

    Raises:
        UsageError: BAD_ARGUMENT for a width or function that is not allowed.
    """
    function = function.lower().replace("_", " ")
    if function not in FUNCTIONS or not _valid(centre, width, function):
        raise UsageError(f"there is no {function!r} window of centre {centre} and width {width}", "BAD_ARGUMENT")
    x = np.asarray(values)
    x = x.astype(np.float64 if x.dtype.itemsize > 4 else np.float32)
    if function == "sigmoid":
        with np.errstate(over="ignore"):
            y = 1 / (1 + np.exp(-4 * (x - centre) / width))
    elif function == "linear exact":
        y = (x - centre) / width + 0.5
    elif width == 1:
        y = (x > centre - 0.5).astype(np.float32)
    else:
        y = (x - (centre - 0.5)) / (width - 1) + 0.5
    return np.nan_to_num(np.clip(y, 0, 1), nan=0.0).astype(np.float32, copy=False)


def named(windows: Iterable[str | tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """(centre, width) pairs of windows given by name or as pairs; "medgemma" stands for its three.

    Raises:
        UsageError: BAD_ARGUMENT for an unknown name or an impossible pair, with the names there are.
    """
    known = {name: (pair,) for name, pair in PRESETS.items()} | {"medgemma": MEDGEMMA}
    pairs = []
    for window in windows:
        if isinstance(window, str):
            if window not in known:
                raise UsageError(f"there is no window {window[:40]!r}; there are: {', '.join(known)}", "BAD_ARGUMENT")
            pairs += known[window]
        elif len(window) != 2 or not _valid(*window, "linear"):
            raise UsageError(f"a window is a name or (centre, width >= 1), not {window!r:.60}", "BAD_ARGUMENT")
        else:
            pairs.append((float(window[0]), float(window[1])))
    return tuple(pairs)


def display(image: Image | Volume) -> np.ndarray:
    """What a viewer shows: uint8 (H, W) or (H, W, 3), or (D, H, W[, 3]) for a volume.

    The file's own VOI table (``info["voi_lut"]``) comes first, then its first valid window (``info["windows"]``, with
    ``info["voi_function"]``), else the percentiles ``TAILS`` without padding; 8-bit values without either stay as they are. MONOCHROME1 (``info["inverted"]``) is inverted here, once, and
    nowhere else: pixels are never stored inverted. Windows that cannot be are skipped and warned about.
    """
    array = image.voxels if isinstance(image, Volume) else image.pixels
    return show(array, image.info)


def show(array: np.ndarray, info: Mapping[str, Any]) -> np.ndarray:
    """:func:`display` for an array (C, H, W) or (C, D, H, W) with the info of its image."""
    shown = look(array, info)(array)
    return shown[0] if shown.shape[0] == 1 else np.moveaxis(shown, 0, -1)


def look(array: np.ndarray, info: Mapping[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """How :func:`display` shows this array: a function from any part (C, ...) of it to uint8 (C, ...), so that a large
    scan need not be shown as a whole."""
    tables, window = info.get("voi_lut"), None if info.get("voi_lut") else _first_window(info)
    kind, colour = array.dtype, array.shape[0] == 3  # colour has no window in DICOM or elsewhere
    bytes_, full = kind == np.uint8, kind.kind == "u" and np.iinfo(kind).max
    measured = not (bytes_ or full) if colour else not (bytes_ or tables or window)
    ends = _tails(array, None if colour else info.get("padding")) if measured else None

    def shown(part: np.ndarray) -> np.ndarray:
        if colour:
            return part if bytes_ else _byte(part.astype(np.float32) / full if full else _between(part, ends))
        if tables:
            seen = _byte(_through_table(part, tables[0]))
        elif window:
            seen = _byte(apply(part, *window))
        else:
            seen = part if bytes_ else _byte(_between(part, ends))
        return 255 - seen if info.get("inverted") else seen

    return shown


def _first_window(info: Mapping[str, Any]) -> tuple[float, float, str] | None:
    function = str(info.get("voi_function") or "linear").lower().replace("_", " ")
    for centre, width, *_ in info.get("windows") or ():
        if function in FUNCTIONS and _valid(centre, width, function):
            return float(centre), float(width), function
        note = f"BAD_WINDOW: the {function} window {centre:g} / {width:g} cannot be and was skipped"
        if note not in info.get("warnings", ()):
            info["warnings"].append(note)
    return None


def _valid(centre, width, function: str) -> bool:
    return bool(np.isfinite(centre) and np.isfinite(width) and (width >= 1 if function == "linear" else width > 0))


def _through_table(array: np.ndarray, table: Mapping[str, Any]) -> np.ndarray:
    """Values below and above the table get its first and last entry. Source: DICOM PS3.3 C.11.2.1.1."""
    first, entries = int(table["first"]), np.asarray(table["values"])
    index = np.rint(np.nan_to_num(array, nan=first, posinf=first + len(entries), neginf=first)).astype(np.int64) - first
    return entries[np.clip(index, 0, len(entries) - 1)].astype(np.float32) / np.float32(2 ** int(table["bits"]) - 1)


def _tails(array: np.ndarray, padding: tuple[float, float] | None = None) -> tuple[float, float] | None:
    """The values that become black and white, None where all finite values are one."""
    seen = array.ravel()
    if seen.size > 1 << 22:  # a regular sample is as good as all voxels of a large volume
        seen = seen[:: seen.size >> 22]
    if seen.dtype.kind == "f":
        seen = seen[np.isfinite(seen)]
    if padding is not None and (inside := seen[(seen < padding[0]) | (seen > padding[1])]).size:
        seen = inside
    if not seen.size:
        return None
    low, high = np.percentile(seen, TAILS)
    if high <= low:
        low, high = float(seen.min()), float(seen.max())
    return (low, high) if high > low else None


def _between(array: np.ndarray, ends: tuple[float, float] | None) -> np.ndarray:
    if ends is None:
        return np.zeros(array.shape, np.float32)
    low, high = ends
    scaled = (array.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.nan_to_num(np.clip(scaled, 0, 1), nan=0.0)


def _byte(fraction: np.ndarray) -> np.ndarray:
    return np.rint(fraction * 255).astype(np.uint8)
