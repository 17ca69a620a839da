"""A public data set in the layout its authors publish, and any folder of data by name or path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..sample import Sample


@dataclass(frozen=True)
class Dataset:
    """A file of this folder that defines ``DATASET`` reads one public data set; its name is the file's.

    here: (folder) -> whether the folder holds it in its published layout; looks at names only.
    samples: (folder, split) -> its samples; "train", "val" or "test". Images open lazily; ids are unique over splits.
        ``meta`` says "row" (the image), "split", "modality", "organ", "type" (CLOSED or OPEN) and "category" where known.
    splits: those it has. tasks: what it is scored by, () for every task that finds something in it.
    licence: of the data. source: where the layout was read, so that it can be checked again.
    """

    here: Callable[[Path], bool]
    samples: Callable[[Path, str], Iterator[Sample]]
    splits: tuple[str, ...]
    licence: str
    source: str
    tasks: tuple[str, ...] = ()
