"""Scans and masks whose files are opened when they are first looked at: a listing of 50,000 volumes opens none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MedVLMError, ModelError
from ..imaging.scan import Image, Lazy, Volume
from ..sample import Sample
from .manifest import Outline, mask_array

HINT = "compare it with the data set as its authors publish it"


class _Unopened:
    """Knows its id, its modality and what was told of it; its place, its size and its pixels open the file."""

    later: tuple[str, ...]

    def __init__(self, file: Path, id: str, modality: str | None, at: str):
        self.id, self.modality, self.origin, self._told, self._at = id, modality or "unknown", file, modality, at
        self.info: dict[str, Any] = {"warnings": []}

    def __getattr__(self, name: str) -> Any:  # only what is not there yet is asked for here
        if name not in self.later:
            raise AttributeError(name)
        opened = self._opened()
        self.info |= {k: v for k, v in opened.info.items() if k not in self.info or k == "warnings"}
        self.__dict__.update((k, getattr(opened, k)) for k in self.later)
        self.modality, self._array = opened.modality, Lazy(opened.shape, opened.dtype, self._pixels)
        self._source = self._array
        return self.__dict__[name]

    def release(self) -> None:
        if "_source" in self.__dict__:
            super().release()

    def _opened(self) -> Image | Volume:
        with _named(self._at, "image"):
            found = _held(self.origin, self._told, self.origin.stat().st_mtime_ns)
        if not isinstance(self, Volume if isinstance(found, Volume) else Image):
            raise ModelError(f"{self._at}: its image has {len(found.shape) - 1} dimensions, which is not what the data set holds", "BAD_DATASET", HINT)
        return found

    def _pixels(self) -> np.ndarray:
        opened = self._opened()
        with _named(self._at, "image"):
            return opened.voxels if isinstance(opened, Volume) else opened.pixels


class _Picture(_Unopened, Image):
    later = ("_array", "_source", "unit", "spacing")


class _Scan(_Unopened, Volume):
    later = ("_array", "_source", "unit", "affine")


def unopened(file: Path, id: str, modality: str | None, at: str) -> Image | Volume:
    """The one image of a file as :func:`medvlm.read` gives it, a Volume where its name ends as NIfTI's; nothing is opened yet.

    Its pixels are read when first used, and again after ``release``. ``info`` holds what the file says once it is open; what is
    put there before stays. modality: None to leave it to the file. at: how errors call the record.

    Raises:
        ModelError: BAD_DATASET, once it is looked at, when the file cannot be read or holds several images.
    """
    return (_Scan if file.name.endswith((".nii", ".nii.gz")) else _Picture)(file, id, modality, at)


def outline(image: Image | Volume, file: Path, value: int, label: str, at: str) -> Outline:
    """Where a label map, on the grid of ``image`` though perhaps along other axes, has this value.

    Raises:
        ModelError: BAD_DATASET, once it is looked at, when the file is no label map on that grid.
    """
    return Outline(image.id, label, partial(_drawn, file, image, value, at))


def outlined(whole: Sample, file: Path, labels: Mapping[int, str], at: str) -> Iterator[Sample]:
    """One sample a label of a label map on the first image, as of a manifest's mask of type volume_labelmap."""
    first = next(iter(whole.images.values()))
    for value, label in labels.items():
        yield replace(whole, id=f"{whole.id}/{label}", masks=(outline(first, file, value, label, at),))


def _drawn(file: Path, image: Image | Volume, value: int, at: str) -> np.ndarray:
    with _named(at, "mask"):
        return _labels(file, image, file.stat().st_mtime_ns) == value


@contextmanager
def _named(at: str, what: str) -> Iterator[None]:
    """Whatever is wrong with a file, said of the record and without the file's name, which may tell the patient."""
    try:
        yield
    except (MedVLMError, OSError) as error:
        raise ModelError(f"{at}: its {what} cannot be read ({getattr(error, 'code', 'UNREADABLE')})", "BAD_DATASET", HINT) from None


@lru_cache(1)  # what was opened last is decoded once for its header and its pixels; more would hold whole volumes
def _held(file: Path, modality: str | None, changed: int) -> Image | Volume:
    from ..imaging.study import read

    return read(file, modality=modality).image()


@lru_cache(1)  # the organs of a case are drawn one after the other
def _labels(file: Path, image: Image | Volume, changed: int) -> np.ndarray:
    return mask_array(file, image)
