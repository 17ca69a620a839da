"""From a scan to the tensor an encoder was trained to see, and masks and boxes back onto the scan's own grid.

An encoder's :class:`InputSpec` is the only source of preprocessing. Pictures keep their aspect ratio: they are scaled
until they fit ``size`` and padded with zeros on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import GeometryError, ModelError
from .imaging import window
from .imaging.scan import Image, Volume


@dataclass(frozen=True)
class InputSpec:
    """What an encoder was trained to see.

    Args:
        size: (H, W) or (D, H, W) in pixels.
        channels: 1 grey or 3 colour; grey pictures are repeated, colour ones averaged to luma (ITU-R BT.601).
        spacing: mm along each axis to resample to, or None: scale to ``size``.
        unit: "display" (0..255 as a viewer shows it: file window, MONOCHROME1 inverted), "HU" or "raw".
        windows: (centre, width) pairs in ``unit``, one a channel; () takes the values as they are (display / 255).
        mean, std: per channel, after windowing to [0, 1].
    """

    size: tuple[int, ...]
    channels: int = 1
    spacing: tuple[float, ...] | None = None
    unit: str = "display"
    windows: tuple[tuple[float, float], ...] = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Frame:
    """Where a scan lies in the encoder's input: input pixel = index * scale + offset, along (H, W)."""

    size: tuple[int, int]
    inner: tuple[int, int]
    offset: tuple[int, int]
    input: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        return self.inner[0] / self.size[0], self.inner[1] / self.size[1]

    def to_input(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) image corners (h, w) -> input pixels. Pixel edges, not centres: 0 is the image's upper left corner."""
        return np.asarray(points, float) * self.scale + self.offset

    def to_image(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) input pixels -> image (h, w), the inverse of :meth:`to_input`."""
        return (np.asarray(points, float) - self.offset) / self.scale

    def map_to_image(self, logits: Tensor) -> Tensor:
        """(P, h, w) map over the whole input at any stride -> (P, H, W) on the image's own grid, bilinear."""
        wide = logits[:, None].float()
        if tuple(wide.shape[2:]) != self.input:
            wide = F.interpolate(wide, self.input, mode="bilinear", align_corners=False)
        (top, left), (h, w) = self.offset, self.inner
        return F.interpolate(wide[:, :, top : top + h, left : left + w], self.size, mode="bilinear", align_corners=False)[:, 0]

    def mask_to_input(self, mask: np.ndarray) -> Tensor:
        """bool (H, W) on the image's grid -> float (h, w) coverage in [0, 1] on the input's grid.

        Raises:
            GeometryError: GRID_MISMATCH when the mask is not the image's size.
        """
        if mask.shape != self.size:
            raise GeometryError(f"the mask is {mask.shape} but its image is {self.size}", "GRID_MISMATCH")
        return fit(torch.from_numpy(np.ascontiguousarray(mask)).float()[None], self)[0]


def frame(image: Image | Volume, spec: InputSpec) -> Frame:
    """How this image is laid into the encoder's input.

    Raises:
        ModelError: OUT_OF_SCOPE when a volume is given to a 2-D encoder.
    """
    if isinstance(image, Volume) or len(spec.size) != 2:
        raise ModelError(f"image {image.id} is {len(image.shape) - 1}-D but the encoder sees {len(spec.size)}-D input", "OUT_OF_SCOPE")
    height, width = image.shape[1:]
    factor = min(spec.size[0] / height, spec.size[1] / width)
    inner = max(1, round(height * factor)), max(1, round(width * factor))
    offset = (spec.size[0] - inner[0]) // 2, (spec.size[1] - inner[1]) // 2
    return Frame((height, width), inner, offset, tuple(spec.size))


def fit(tensor: Tensor, frame: Frame) -> Tensor:
    """(C, H, W) -> (C, *input): scaled with antialiasing and padded with zeros."""
    small = F.interpolate(tensor[None], frame.inner, mode="bilinear", align_corners=False, antialias=True)[0]
    (top, left), (h, w) = frame.offset, frame.inner
    return F.pad(small, (left, frame.input[1] - left - w, top, frame.input[0] - top - h))


def to_tensor(image: Image | Volume, spec: InputSpec) -> tuple[Tensor, Frame]:
    """The encoder's input (channels, *size), float32 before mean and std (see :func:`normalise`), and its frame.

    Raises:
        ModelError: OUT_OF_SCOPE when the image cannot become what the encoder was trained on.
    """
    place = frame(image, spec)
    if spec.unit == "display":
        shown = np.asarray(window.display(image), np.float32) / 255
        values = shown[None] if shown.ndim == 2 else shown.transpose(2, 0, 1)
    else:
        if image.unit != spec.unit:
            raise ModelError(f"image {image.id} is in {image.unit} but the encoder was trained on {spec.unit}", "OUT_OF_SCOPE")
        if not spec.windows:
            raise ModelError(f"the encoder's input in {spec.unit} has no window", "BAD_RECIPE", "give InputSpec.windows")
        values = np.concatenate([window.apply(image.pixels, centre, width) for centre, width in spec.windows])
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    if tensor.shape[0] == 3 and spec.channels == 1:
        tensor = (tensor * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    elif tensor.shape[0] == 1 and spec.channels == 3:
        tensor = tensor.expand(3, -1, -1)
    if tensor.shape[0] != spec.channels:
        raise ModelError(f"image {image.id} has {tensor.shape[0]} channels, the encoder takes {spec.channels}", "OUT_OF_SCOPE")
    return fit(tensor, place), place


def normalise(tensor: Tensor, spec: InputSpec) -> Tensor:
    """(..., C, H, W) in [0, 1] -> (x - mean) / std per channel."""
    mean, std = (torch.tensor(v, dtype=tensor.dtype, device=tensor.device) for v in (spec.mean, spec.std))
    return (tensor - mean[:, None, None]) / std[:, None, None]
