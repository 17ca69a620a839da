"""Images altered on purpose, on the same grid: what a model is shown to see whether it looks, and how well it bears artefacts.

Every function gives an image of the same id, shape, dtype, unit, modality and geometry; pixels are altered when they are first
used. Whatever is drawn by lot follows from ``seed`` alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Hashable, Sequence
from math import ceil

import numpy as np

from ..errors import GeometryError, UsageError
from ..imaging.scan import Image, Lazy, Volume, orientation, turned
from ..imaging.window import TAILS

PATCHES = 16
"""``shuffled`` cuts each side of the picture into so many parts, or into fewer where it has not so many pixels."""
REFERENCE = 224
"""Pixels of the shorter side that the blurs of ``ARTEFACTS`` are meant for; they grow with the picture."""
MIRROR = {"L": "R", "R": "L"}


def blank(image: Image | Volume) -> Image | Volume:
    """Every pixel at the median of its channel: the level of the picture, and nothing in it."""
    return _altered(image, lambda a: np.broadcast_to(_cast(_channel(a, np.median), a.dtype), a.shape).copy())


def noise(image: Image | Volume, seed: str) -> Image | Volume:
    """Gaussian noise of the mean and standard deviation of each channel."""
    return _altered(image, lambda a: _cast(_channel(a, np.mean) + _channel(a, np.std) * _lot(seed).standard_normal(a.shape, np.float32), a.dtype))


def shuffled(image: Image | Volume, seed: str) -> Image | Volume:
    """Patches of a sixteenth of each side, none left in its place; what is over at the far edges stays."""

    def change(a: np.ndarray) -> np.ndarray:
        sizes = [ceil(n / PATCHES) for n in a.shape[1:]]
        counts = [n // s for n, s in zip(a.shape[1:], sizes)]
        inner = (slice(None), *(slice(0, n * s) for n, s in zip(counts, sizes)))
        cut = a[inner].reshape(a.shape[0], *(x for pair in zip(counts, sizes) for x in pair))
        rank = len(sizes)
        axes = (*range(1, 2 * rank + 1, 2), 0, *range(2, 2 * rank + 1, 2))  # counts first, then the channel and the patch
        patches = cut.transpose(axes).reshape(-1, a.shape[0], *sizes)
        order = _lot(seed).permutation(len(patches))
        moved = np.empty_like(patches)
        moved[np.roll(order, 1)] = patches[order]  # one cycle through all of them
        out = a.copy()
        out[inner] = moved.reshape(*counts, a.shape[0], *sizes).transpose(np.argsort(axes)).reshape(out[inner].shape)
        return out

    return _altered(image, change)


def mirrored(image: Image | Volume) -> Image | Volume:
    """The patient's left and right swapped in the pixels and nowhere else, so that "left" becomes wrong on purpose.

    Raises:
        GeometryError: ORIENTATION_UNKNOWN where the picture has no left and right (:func:`sided`).
    """
    if not sided(image):
        raise GeometryError(f"image {image.id} shows one side of the patient, so it has no left and right to swap", "ORIENTATION_UNKNOWN", "")
    here = letters(image)
    to = "".join(MIRROR.get(x, x) for x in here)
    if isinstance(image, Volume):
        return _altered(image, lambda a: np.ascontiguousarray(turned(a, here, to)))
    return _altered(image, lambda a: np.ascontiguousarray(turned(a[:, None], here, to)[:, 0]))


def sided(image: Image | Volume) -> bool:
    """False for a sagittal slice and a lateral view, which have no left and right."""
    if isinstance(image, Volume):
        return True
    return letters(image)[0] not in MIRROR and not str(image.info.get("view") or "").upper().startswith("L")


def letters(image: Image | Volume) -> str:
    """Orientation of (d, h, w); a picture without a place in the patient is taken as it is shown, its width across the patient."""
    if isinstance(image, Volume):
        return image.orientation
    affine = image.info.get("affine")
    return "SPL" if affine is None else orientation(np.asarray(affine, float))


def others(images: Sequence[Image | Volume], owners: Sequence[Hashable], seed: str) -> list[Image | Volume | None]:
    """For each image another one of the same modality and rank and of another patient, under the id of the first.

    It keeps its own size and geometry. Each image is given away once, as far as no patient holds more than half of them.
    owners: the patient of each image. None where there is no other patient.
    """
    found: list[Image | Volume | None] = [None] * len(images)
    kinds: dict[Hashable, list[int]] = {}
    for i, image in enumerate(images):
        kinds.setdefault((type(image), image.modality), []).append(i)
    for members in kinds.values():
        for i, j in zip(members, derangement([owners[i] for i in members], f"{seed} {images[members[0]].modality}")):
            found[i] = None if j is None else _renamed(images[members[j]], images[i].id)
    return found


def derangement(owners: Sequence[Hashable], seed: str) -> list[int | None]:
    """For each item the index of an item of another owner; a permutation where no owner holds more than half, None with one owner."""
    lot, groups = _lot(seed), {}
    for i in lot.permutation(len(owners)).tolist():
        groups.setdefault(owners[i], []).append(i)
    if len(groups) < 2:
        return [None] * len(owners)
    order = [i for group in groups.values() for i in group]
    step = max(map(len, groups.values()))  # in runs of one owner, so far on stands another, unless one holds more than half
    found: list[int | None] = [None] * len(owners)
    for at, i in enumerate(order):
        j = order[(at + step) % len(order)]
        if owners[j] == owners[i]:
            strangers = [k for k in order if owners[k] != owners[i]]
            j = strangers[int(lot.integers(len(strangers)))]
        found[i] = j
    return found


def artefact(image: Image | Volume, name: str, strength: int, seed: str = "") -> Image | Volume:
    """One of ``ARTEFACTS`` at strength 1 to 5, slice by slice in a volume.

    Values are changed relative to the picture's own range (0..255 of uint8, else its robust range ``TAILS``), so that
    Hounsfield units stay Hounsfield units; only the limits of the dtype cut them.

    Raises:
        UsageError: BAD_ARGUMENT for an unknown name or strength.
    """
    if name not in ARTEFACTS or strength not in range(1, 6):
        raise UsageError(f"there is no artefact {name!r} of strength {strength}; there are {', '.join(ARTEFACTS)}, each from 1 to 5", "BAD_ARGUMENT")
    alter, amounts = ARTEFACTS[name]

    def change(a: np.ndarray) -> np.ndarray:
        low, high = _ends(a)
        scaled = (np.nan_to_num(a.astype(np.float32), nan=low, posinf=high, neginf=low) - low) / (high - low)
        return _cast(alter(scaled, amounts[strength - 1], _lot(f"{seed} {name}")).astype(np.float64) * (high - low) + low, a.dtype)

    return _altered(image, change)


def _altered(image: Image | Volume, change: Callable[[np.ndarray], np.ndarray]) -> Image | Volume:
    def load() -> np.ndarray:
        array = change(_array(image))
        image.release()  # many copies of one image are made, one after the other
        return array

    new = Lazy(image.shape, image.dtype, load)
    return image.with_voxels(new) if isinstance(image, Volume) else image.with_pixels(new)


def _renamed(image: Image | Volume, id: str) -> Image | Volume:
    new = _altered(image, np.copy)
    new.id = id
    return new


def _array(image: Image | Volume) -> np.ndarray:
    return image.voxels if isinstance(image, Volume) else image.pixels


def _lot(seed: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]))


def _channel(a: np.ndarray, statistic: Callable) -> np.ndarray:
    """A statistic of the finite values of each channel, shaped to be added to the array."""
    values = [statistic(c[np.isfinite(c)]) if np.isfinite(c).any() else 0.0 for c in a]
    return np.array(values, np.float64).reshape(-1, *[1] * (a.ndim - 1))


def _ends(a: np.ndarray) -> tuple[float, float]:
    if a.dtype == np.uint8:
        return 0.0, 255.0
    seen = a.ravel()[:: max(1, a.size >> 22)]  # a regular sample of a large volume
    seen = seen[np.isfinite(seen)]
    low, high = map(float, np.percentile(seen, TAILS)) if seen.size else (0.0, 1.0)
    return (low, high) if high > low else (low, low + max(1.0, abs(low)))


def _cast(values: np.ndarray, kind: np.dtype) -> np.ndarray:
    if kind.kind == "f":
        return values.astype(kind)
    return np.clip(np.rint(values), np.iinfo(kind).min, np.iinfo(kind).max).astype(kind)


# Each takes (C, [D,] H, W) float32 in which 0..1 is the picture's range, an amount and a generator.


def _scale(a) -> float:
    return max(0.5, min(a.shape[-2:]) / REFERENCE)  # narrower than half a pixel is no blur


def _grain(a, sigma, lot):
    return a + sigma * lot.standard_normal(a.shape, np.float32)


def _blur(a, sigma, lot):
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(a, sigma * _scale(a), axes=(-2, -1), mode="nearest")


def _motion(a, sigma, lot):
    from scipy.ndimage import gaussian_filter1d

    return gaussian_filter1d(a, sigma * _scale(a), axis=-1 - int(lot.integers(2)), mode="nearest")


def _jpeg(a, quality, lot):
    """The error that JPEG makes in the picture's range, added: what lies outside the range keeps its distance."""
    from PIL import Image as Pillow

    def packed(part: np.ndarray) -> np.ndarray:
        shown, file = np.clip(part, 0, 1), io.BytesIO()
        bytes_ = np.rint(shown * 255).astype(np.uint8)
        Pillow.fromarray(bytes_[0] if len(bytes_) == 1 else np.moveaxis(bytes_, 0, -1)).save(file, "JPEG", quality=quality)
        back = np.asarray(Pillow.open(file), np.float32) / 255
        return part + (back[None] if back.ndim == 2 else np.moveaxis(back, -1, 0)) - shown

    return packed(a) if a.ndim == 3 else np.stack([packed(a[:, d]) for d in range(a.shape[1])], 1)


def _contrast(a, share, lot):
    mean = a.mean(axis=tuple(range(1, a.ndim)), keepdims=True)
    return (a - mean) * share + mean


def _brightness(a, amount, lot):
    return a + amount


def _rotation(a, degrees, lot):
    from scipy.ndimage import rotate

    return rotate(a, degrees * (-1) ** int(lot.integers(2)), axes=(-2, -1), reshape=False, order=1, mode="nearest")


def _crop(a, share, lot):
    """The middle, ``share`` of each side, at the size of the whole."""
    from scipy.ndimage import affine_transform

    lead = a.ndim - 2
    return affine_transform(a, [1.0] * lead + [share] * 2, [0.0] * lead + [(1 - share) * (n - 1) / 2 for n in a.shape[-2:]], order=1, mode="nearest")


def _downsample(a, share, lot):
    from PIL import Image as Pillow

    high, wide = a.shape[-2:]
    small = max(1, round(wide * share)), max(1, round(high * share))
    planes = [Pillow.fromarray(p).resize(small, Pillow.Resampling.BOX).resize((wide, high), Pillow.Resampling.BOX) for p in a.reshape(-1, high, wide)]
    return np.stack([np.asarray(p) for p in planes]).reshape(a.shape)


def _bias(a, largest, lot):
    """A smooth factor: exp of a polynomial of order 3 over the grid, its coefficients within +-largest."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in a.shape[1:]], indexing="ij", sparse=True)
    field = np.zeros(a.shape[1:], np.float32)
    for powers in np.ndindex(*[4] * len(axes)):
        if 0 < sum(powers) <= 3:
            term = np.float32(lot.uniform(-largest, largest))
            for x, power in zip(axes, powers):
                term = term * x**power
            field += term
    return a * np.exp(field)


ARTEFACTS: dict[str, tuple[Callable, tuple[float, ...]]] = {
    "grain": (_grain, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": (_blur, (1, 2, 3, 4, 6)),
    "motion": (_motion, (3, 5, 8, 12, 15)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "downsample": (_downsample, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "rotation": (_rotation, (2, 4, 6, 8, 10)),
    "crop": (_crop, (0.95, 0.9, 0.85, 0.8, 0.75)),
    "bias": (_bias, (0.1, 0.2, 0.3, 0.4, 0.5)),
}
"""{name: (how, amounts of strength 1 to 5)}: grain is Gaussian noise, motion a blur along one axis, bias the uneven field of MR.

Source: the amounts of the first seven, ImageNet-C (Hendrycks & Dietterich 2019, arXiv:1903.12261, ``make_imagenet_c.py``:
gaussian noise, gaussian blur, the sigmas of motion blur, JPEG quality, contrast, brightness, pixelate), with two
departures: blurs grow with the picture, and brightness is added to all channels. The form of the bias field and its
largest coefficient: TorchIO ``RandomBiasField`` (Perez-Garcia et al. 2021, arXiv:2003.04696; order 3, 0.5). Rotation and
crop: our own mild steps, as artefacts of taking the picture in Kvasir-VQA-x1 (Gautam et al. 2025, arXiv:2506.09958).
"""
