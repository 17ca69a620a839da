"""From a scan to the tensor an encoder was trained to see, and masks and boxes back onto the scan's own grid.

An encoder's :class:`InputSpec` is the only source of preprocessing. With ``spacing`` a scan is scaled to it and the middle
is cut out or padded with zeros on both sides. Without, a picture is scaled until it fits ``size`` and padded; H and W share
one factor in mm (in pixels where spacing is unknown), so nothing is squashed, and the slices of a volume fill D. Volumes are
turned to "SPL" first, along their own axes: an oblique one keeps its slant; a slice that says how it lies is turned as a radiologist
reads it. Scans are read block by block and maps come back
plane by plane, so little more memory is taken than the input and the result need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil, isfinite, prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import GeometryError, ModelError, UsageError
from .imaging import window
from .imaging.scan import READ_AS, Image, Volume, orientation, turn, turned, turned_points

UPRIGHT = "SPL"
"""Orientation in which encoders see volumes: axial slices from feet to head, as a radiologist reads them."""
BLOCK = {2: 1024, 3: 128}
"""Pixels along each side of what is read of a scan at once, by its rank."""
STRIP = 1 << 22
"""Most pixels of the scan's own grid that one map is written to at once."""
MOST_TILES = 1 << 16
BLACK = 0.05
"""What is no brighter in any channel is the surround of a picture: padding, a collimator's shadow, what lies outside a camera's view."""
FLAT = 0.02
"""Least deviation that is made larger: of what varies less, it would be noise."""


@dataclass(frozen=True)
class InputSpec:
    """What an encoder was trained to see.

    Args:
        size: (H, W) or (D, H, W) in pixels.
        channels: 1 grey or 3 colour; grey pictures are repeated, colour ones averaged to luma (ITU-R BT.601).
        spacing: mm along each axis to resample to, or None: scale to ``size``.
        unit: "display" (0..255 as a viewer shows it: file window, MONOCHROME1 inverted), "HU" or "raw".
        windows: (centre, width) pairs in ``unit``, one a channel; () takes the values as they are (display / 255). With unit
            "display" they are in HU, for the images that are, and others look as a viewer shows them.
        mean, std: per channel, after windowing to [0, 1].
        standardise: display values are made alike from picture to picture, see :func:`standardised`; what is seen through
            ``windows`` keeps its values.
    """

    size: tuple[int, ...]
    channels: int = 1
    spacing: tuple[float, ...] | None = None
    unit: str = "display"
    windows: tuple[tuple[float, float], ...] = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    standardise: bool = False


@dataclass(frozen=True)
class Frame:
    """Where a scan lies in the encoder's input: input pixel = index * scale + offset, along ((D,) H, W).

    size: of the scan's own grid. inner: what it is scaled to, and offset: where that begins, in the input's axes; negative
    where the scan reaches beyond the input. input: (D, H, W) or (H, W). orientation: how the axes of a volume's own grid
    grow (the input's grow as ``UPRIGHT``), or those of a slice, the first of them through it (the input's grow as ``READ_AS``); None
    for a picture that does not say.
    """

    size: tuple[int, ...]
    inner: tuple[int, ...]
    offset: tuple[int, ...]
    input: tuple[int, ...]
    orientation: str | None = None

    @property
    def _towards(self) -> str:
        return UPRIGHT if len(self.size) == 3 else READ_AS[self.orientation[0]]

    @property
    def upright(self) -> tuple[int, ...]:
        """The scan's own size in the order of the input's axes."""
        return self.size if self.orientation is None else _ordered(self.size, self.orientation, self._towards)

    def _turned(self, points: np.ndarray, size: tuple[int, ...], here: str, to: str) -> np.ndarray:
        """:func:`turned_points` of a volume, or of a slice, which is one pixel thick."""
        flat = len(size) == 2
        points = np.concatenate([np.zeros_like(points[..., :1]), points], -1) if flat else points
        return turned_points(points, (1, *size) if flat else size, here, to)[..., flat:]

    @property
    def scale(self) -> tuple[float, ...]:
        return tuple(i / n for i, n in zip(self.inner, self.upright))

    @property
    def axes(self) -> tuple[_Axis, ...]:
        return tuple(map(_Axis, self.upright, self.inner, self.offset, self.input))

    def to_input(self, points: np.ndarray) -> np.ndarray:
        """(..., rank) places on the scan ((d,) h, w) -> input pixels. Edges, not centres: 0 is the scan's first corner."""
        points = np.asarray(points, float)
        if self.orientation is not None:
            points = self._turned(points, self.size, self.orientation, self._towards)
        return points * self.scale + self.offset

    def to_image(self, points: np.ndarray) -> np.ndarray:
        """(..., rank) input pixels -> places on the scan, the inverse of :meth:`to_input`."""
        points = (np.asarray(points, float) - self.offset) / self.scale
        return points if self.orientation is None else self._turned(points, self.upright, self._towards, self.orientation)

    def box_to_input(self, boxes: np.ndarray) -> np.ndarray:
        """(..., 2, rank) lower and upper corners; an axis that is turned swaps them, so they are put in order again."""
        return np.sort(self.to_input(boxes), axis=-2)

    def box_to_image(self, boxes: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`box_to_input`."""
        return np.sort(self.to_image(boxes), axis=-2)

    def mask_to_input(self, mask: np.ndarray) -> Tensor:
        """bool mask on the scan's own grid -> float coverage in [0, 1] on the input's grid.

        Raises:
            GeometryError: GRID_MISMATCH when the mask is not the image's size.
        """
        if mask.shape != self.size:
            raise GeometryError(f"the mask is {mask.shape} but its image is {self.size}", "GRID_MISMATCH")
        return fit(mask[None], self, lambda part: np.ascontiguousarray(part, np.float32))[0]

    def map_to_image(self, maps: Tensor, outside: float = -torch.inf) -> Tensor:
        """(P, *grid) maps over the whole input at any stride -> (P, *size) float32 on the scan's own grid, on the CPU.

        Linear between the cells of the map; ``outside`` is where the scan reaches beyond the input (a logit: not there).
        """
        out = np.full((len(maps), *self.size), outside, np.float32)
        whole = self.turn_up(out)
        for place, value in self._planes(maps):
            for p in range(len(maps)):
                whole[(p, *place)] = value(p).cpu().numpy()
        return torch.from_numpy(out)

    def masks(self, maps: Tensor, threshold: float = 0.0) -> np.ndarray:
        """:meth:`map_to_image` > ``threshold``: bool (P, *size), without the float maps on the scan's own grid."""
        out = np.zeros((len(maps), *self.size), bool)
        whole = self.turn_up(out)
        for place, value in self._planes(maps):
            for p in range(len(maps)):
                whole[(p, *place)] = (value(p) > threshold).cpu().numpy()
        return out

    def labels(self, maps: Tensor) -> np.ndarray:
        """(C, *grid) logits of C exclusive classes -> the likeliest of them on the scan's own grid, 0 beyond the input.

        uint8 (uint16 above 256 classes) of shape ``size``: the first maximum of what :meth:`map_to_image` would give,
        without ever holding C maps on the scan's own grid.
        """
        out = np.zeros(self.size, np.uint8 if len(maps) <= 256 else np.uint16)
        whole = self.turn_up(out[None])[0]
        for place, value in self._planes(maps):
            best = value(0)
            label = torch.zeros_like(best, dtype=torch.uint8 if len(maps) <= 256 else torch.int32)
            for c in range(1, len(maps)):
                here = value(c)
                label.masked_fill_(here > best, c)
                torch.maximum(best, here, out=best)
            whole[place] = label.cpu().numpy()
        return out

    def turn_up(self, array: np.ndarray) -> np.ndarray:
        """(P, *size) on the scan's own grid -> a view of it along the input's axes."""
        if self.orientation is None:
            return array
        return turned(array, self.orientation, UPRIGHT) if len(self.size) == 3 else turned(array[:, None], self.orientation, self._towards)[:, 0]

    @torch.no_grad()
    def _planes(self, maps: Tensor) -> Iterator[tuple[tuple, _Plane]]:
        """Places that together fill what the input covers of the upright own grid, and the maps' values there.

        Of the maps (C, d, h, w) only two slices are ever as wide as the grid; one map at a time gets its height.
        """
        flat = len(self.size) == 2
        axes = (_Axis(1, 1, 0, 1), *self.axes) if flat else self.axes
        maps = maps[:, None] if flat else maps
        (deep, between), (high, down), (wide, across) = (a.back(n, maps.device) for a, n in zip(axes, maps.shape[1:]))
        step = max(1, STRIP // len(across.low))
        for start in range(0, len(down.low), step):
            rows = _Mix(*(x[start : start + step] for x in down))
            top, bottom = int(rows.low[0]), int(rows.high[-1]) + 1
            rows = rows._replace(low=rows.low - top, high=rows.high - top)
            place = slice(high.start + start, high.start + start + len(rows.low)), wide
            spare = [torch.empty(len(maps), bottom - top, len(across.low), device=maps.device) for _ in range(2)]
            near: dict[int, Tensor] = {}
            for k, (a, b) in enumerate(zip(between.low.tolist(), between.high.tolist())):
                spare += [near.pop(z) for z in list(near) if z not in (a, b)]
                for z in {a, b} - near.keys():
                    near[z] = spare.pop()
                    for each, out in zip(maps[:, z, top:bottom], near[z]):
                        across(each.float(), 1, out)
                yield place if flat else (deep.start + k, *place), _Plane(near[a], near[b], between.share[k], rows)


class _Mix(NamedTuple):
    """Linear interpolation along one axis: for each new cell its two old neighbours and the share of the upper one."""

    low: Tensor
    high: Tensor
    share: Tensor

    def __call__(self, map: Tensor, axis: int, out: Tensor | None = None) -> Tensor:
        share = self.share if axis else self.share[:, None]
        return torch.lerp(map.index_select(axis, self.low), map.index_select(axis, self.high), share, out=out)


class _Plane(NamedTuple):
    """Maps on a plane between two slices of theirs (C, h, W)."""

    lower: Tensor
    upper: Tensor
    share: Tensor
    rows: _Mix

    def __call__(self, p: int) -> Tensor:
        """(H, W) of map ``p``."""
        return self.rows(self.lower[p] if self.lower is self.upper else torch.lerp(self.lower[p], self.upper[p], self.share), 0)


class _Axis(NamedTuple):
    """One axis of a frame: ``own`` pixels are scaled to ``inner``, which begins at ``offset`` of an input of ``length``."""

    own: int
    inner: int
    offset: int
    length: int

    def blocks(self, size: int) -> list[tuple[slice, slice, Tensor]]:
        """What fills the input, in blocks of own pixels: (own pixels, input pixels they reach, weights (input, own)).

        A triangle as wide as the coarser of the two grids' pixels, cut at the scan's ends and summing to 1 there:
        what torch's ``interpolate(antialias=True)`` does along an axis.
        """
        step = self.own / self.inner
        centre = (np.arange(max(self.offset, 0), min(self.offset + self.inner, self.length)) - self.offset + 0.5) * step
        width = max(step, 1.0)
        taps = np.floor(centre - width)[:, None] + np.arange(ceil(2 * width) + 2)
        total = (_triangle(taps, centre, width) * ((taps >= 0) & (taps < self.own))).sum(1)
        first, last = max(0, int(centre[0] - width)), min(self.own, ceil(centre[-1] + width))
        found = []
        for start in range(first, last, size):
            stop = min(start + size, last)
            a, b = np.searchsorted(centre, (start - width, stop + width))
            weights = _triangle(np.arange(start, stop)[None], centre[a:b], width) / total[a:b, None]
            at = max(self.offset, 0) + a
            found.append((slice(start, stop), slice(at, at + b - a), torch.from_numpy(weights.astype(np.float32))))
        return found

    def back(self, cells: int, device) -> tuple[slice, _Mix]:
        """Own pixels that the input covers, and how a map of ``cells`` over the input gives their values.

        Places are held within the scan's part of the input, so that its padding is never looked at.
        """
        centre = (np.arange(self.own) + 0.5) * self.inner / self.own + self.offset
        seen = np.flatnonzero((centre > 0) & (centre < self.length))
        first, last = max(self.offset, 0), min(self.offset + self.inner, self.length)
        at = np.clip(centre[seen], first + 0.5, last - 0.5) * cells / self.length - 0.5
        at = np.clip(at, 0, cells - 1)
        low = np.floor(at).astype(np.int64)
        mix = low, np.minimum(low + 1, cells - 1), (at - low).astype(np.float32)
        return slice(seen[0], seen[-1] + 1), _Mix(*(torch.from_numpy(x).to(device) for x in mix))


def _triangle(pixels: np.ndarray, centre: np.ndarray, width: float) -> np.ndarray:
    return np.clip(1 - np.abs(pixels + 0.5 - centre[:, None]) / width, 0, None)


def frame(image: Image | Volume, spec: InputSpec) -> Frame:
    """How this image is laid into the encoder's input.

    Raises:
        ModelError: OUT_OF_SCOPE when a volume is given to a 2-D encoder or a picture to a 3-D one, and when the encoder
            needs a spacing that the image does not have.
    """
    rank = len(image.shape) - 1
    if rank != len(spec.size):
        raise ModelError(f"image {image.id} is {rank}-D but the encoder sees {len(spec.size)}-D input", "OUT_OF_SCOPE")
    own, spacing = image.shape[1:], image.spacing
    affine = image.affine if isinstance(image, Volume) else image.info.get("affine")
    here = None if affine is None else orientation(np.asarray(affine, float))
    if here is not None:
        to = UPRIGHT if rank == 3 else READ_AS[here[0]]
        own, spacing = (x and _ordered(x, here, to) for x in (own, spacing))
    if spec.spacing is None:
        high, wide = own[-2:]
        longer = spacing[-1] / spacing[-2] if spacing else 1.0  # of a pixel's two sides
        factor = min(spec.size[-2] / high, spec.size[-1] / (wide * longer))
        inner = (*spec.size[:-2], max(1, round(high * factor)), max(1, round(wide * longer * factor)))
    elif spacing is None:
        raise ModelError(f"image {image.id} has no spacing but the encoder sees {spec.spacing} mm", "OUT_OF_SCOPE", "pass spacing= if you know it")
    else:
        inner = tuple(max(1, round(n * s / t)) for n, s, t in zip(own, spacing, spec.spacing))
    offset = tuple((n - i) // 2 for n, i in zip(spec.size, inner))
    return Frame(tuple(image.shape[1:]), inner, offset, tuple(spec.size), here)


def _ordered(values: tuple, here: str, to: str) -> tuple:
    """Values along the axes of a volume or of a slice, which lacks the first, in the order of the axes of ``to``."""
    missing = 3 - len(values)
    return tuple(values[o - missing] for o in turn(here, to)[0][missing:])


def fit(array: np.ndarray, place: Frame, values: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """The input (C, *place.input): scaled with antialiasing, zero where the scan does not reach.

    array: (C', *place.size). values: any part of it, along the input's axes -> float32 (C, ...); called a block at a time.
    """
    whole, out = place.turn_up(array), None
    for chosen in product(*(axis.blocks(BLOCK[len(place.input)]) for axis in place.axes)):
        source, target, weights = zip(*chosen)
        part = torch.from_numpy(values(whole[(slice(None), *source)]))
        for axis, weight in enumerate(weights, 1):
            part = torch.tensordot(part, weight, ([axis], [1])).movedim(-1, axis)
        out = torch.zeros(len(part), *place.input) if out is None else out
        out[(slice(None), *target)] += part
    return out


def to_tensor(image: Image | Volume, spec: InputSpec) -> tuple[Tensor, Frame]:
    """The encoder's input (channels, *size), float32 before mean and std (see :func:`normalise`), and its frame.

    Raises:
        ModelError: OUT_OF_SCOPE when the image cannot become what the encoder was trained on; NOT_FINITE when voxels
            that it would see are NaN or infinite.
    """
    place = frame(image, spec)
    return next(inputs(image, spec, [place])), place


def inputs(image: Image | Volume, spec: InputSpec, places: Iterable[Frame]) -> Iterator[Tensor]:
    """:func:`to_tensor` for each of these frames of one image, such as those of :func:`tiles`."""
    windows = spec.windows if spec.unit != "display" or image.unit == "HU" else ()
    channels = image.shape[0] * max(1, len(windows))
    if spec.unit != "display" and image.unit != spec.unit:
        raise ModelError(f"image {image.id} is in {image.unit} but the encoder was trained on {spec.unit}", "OUT_OF_SCOPE")
    if spec.unit != "display" and not spec.windows:
        raise ModelError(f"the encoder's input in {spec.unit} has no window", "BAD_RECIPE", "give InputSpec.windows")
    if channels != spec.channels and {channels, spec.channels} != {1, 3}:
        raise ModelError(f"image {image.id} has {channels} channels, the encoder takes {spec.channels}", "OUT_OF_SCOPE")
    array = image.voxels if isinstance(image, Volume) else image.pixels
    shown = window.look(array, image.info) if spec.unit == "display" and not windows else None

    def values(part: np.ndarray) -> np.ndarray:
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            raise ModelError(f"image {image.id} holds NaN or infinite values where the encoder looks", "NOT_FINITE")
        part = shown(part) if shown else part
        if windows:
            return np.concatenate([window.apply(part, centre, width) for centre, width in windows])
        return np.ascontiguousarray(part, np.float32) / 255

    for place in places:
        tensor = fit(array, place, values)
        if spec.channels < channels:
            tensor = torch.tensordot(torch.tensor([0.299, 0.587, 0.114]), tensor, ([0], [0]))[None]
        if spec.standardise and not windows:
            tensor = standardised(tensor)
        yield tensor.repeat(spec.channels // len(tensor), *[1] * (tensor.ndim - 1))


class Tiles(NamedTuple):
    """frames: windows of the encoder's size that together cover ``whole``, the image scaled as one large input."""

    whole: Frame
    frames: tuple[Frame, ...]


def tiles(image: Image | Volume, spec: InputSpec, zoom: float = 1.0, overlap: float = 0.25, multiple: int = 32) -> Tiles:
    """Windows over an image at ``zoom`` times the resolution of :func:`frame`, for what is too thin to see there.

    With ``spec.spacing``, a zoom of 1 covers all of the scan at that spacing, where :func:`frame` sees its middle only.

    Args:
        overlap: least share of a window that the next one sees too.
        multiple: windows begin at multiples of this many input pixels: the stride of the maps that :func:`blend` joins.

    Raises:
        UsageError: BAD_ARGUMENT, also for more than ``MOST_TILES`` windows.
    """
    if not (isfinite(zoom) and zoom > 0 and 0 <= overlap < 1 and multiple >= 1):
        raise UsageError(f"tiles need zoom > 0, 0 <= overlap < 1 and multiple >= 1, not {zoom}, {overlap} and {multiple}", "BAD_ARGUMENT")
    once = frame(image, spec)
    inner = tuple(max(1, round(i * zoom)) for i in once.inner)
    counts, lengths = [], []
    for part, length in zip(inner, spec.size):
        steps = ceil(max(0, part - length) / multiple)  # from the first window's place to the last one's
        lengths.append(length + steps * multiple)
        counts.append(1 + ceil(steps / max(1, int(length * (1 - overlap)) // multiple)))
    if prod(counts) > MOST_TILES:
        raise UsageError(f"image {image.id} at {zoom:g} times its fit takes {prod(counts)} windows, the limit is {MOST_TILES}", "BAD_ARGUMENT", "lower the zoom")
    offset = tuple((n - i) // 2 for n, i in zip(lengths, inner))
    whole = Frame(once.size, inner, offset, tuple(lengths), once.orientation)
    starts = [[round(s) * multiple for s in np.linspace(0, (n - length) // multiple, c)] for n, length, c in zip(lengths, spec.size, counts)]
    frames = tuple(
        Frame(once.size, inner, tuple(o - s for o, s in zip(offset, start)), tuple(spec.size), once.orientation) for start in product(*starts)
    )
    return Tiles(whole, frames)


def blend(tiled: Tiles, maps: Iterable[Tensor]) -> Tensor:
    """One map (P, *grid) over each window, in order -> one map over ``tiled.whole``, whose frame takes it onto the image.

    Where windows overlap, each counts by its distance from its edges (a Hann window).
    """
    total = weight = None
    for place, each in zip(tiled.frames, maps, strict=True):
        grid = each.shape[1:]
        if total is None:
            scale = [n // g for n, g in zip(place.input, grid)]
            total = each.new_zeros(len(each), *(n // s for n, s in zip(tiled.whole.input, scale)))
            weight = each.new_zeros(total.shape[1:])
            share = each.new_ones(grid)
            for axis, n in enumerate(grid):
                share = share * torch.hann_window(n + 2, periodic=False, device=each.device)[1:-1].reshape(-1, *[1] * (len(grid) - 1 - axis))
        begin = [w - o for w, o in zip(tiled.whole.offset, place.offset)]
        if any(b % s for b, s in zip(begin, scale)):
            raise UsageError(f"a window begins at {begin} but the maps have stride {scale}", "BAD_ARGUMENT", "give tiles() that stride as multiple=")
        at = tuple(slice(b // s, b // s + g) for b, s, g in zip(begin, scale, grid))
        total[(slice(None), *at)] += each * share
        weight[at] += share
    return total / weight


def standardised(tensor: Tensor) -> Tensor:
    """(C, *size) in [0, 1] -> each channel shifted and scaled so that what is not black has mean 0.5 and deviation 0.25, cut to [0, 1].

    Vessels that differ from the retina by a few grey values, or a film in another window, come out alike. Black stays 0.
    """
    shown = tensor.amax(0) > BLACK
    if not shown.any():
        return torch.zeros_like(tensor)
    values = tensor[:, shown]
    mean, deviation = (v.reshape(-1, *[1] * shown.ndim) for v in (values.mean(1), values.std(1, correction=0).clamp(min=FLAT)))
    return (0.5 + 0.25 * (tensor - mean) / deviation).clamp(0, 1) * shown


def normalise(tensor: Tensor, spec: InputSpec) -> Tensor:
    """(..., C, *size) in [0, 1] -> (x - mean) / std per channel."""
    mean, std = (torch.tensor(v, dtype=tensor.dtype, device=tensor.device).reshape(-1, *[1] * len(spec.size)) for v in (spec.mean, spec.std))
    return (tensor - mean) / std
