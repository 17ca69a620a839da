"""A public data set in the layout its authors publish, and any folder of data by name or path."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .. import parts
from ..errors import MedVLMError, ModelError
from ..sample import Sample
from . import manifest

SPLITS = ("train", "val", "test")
ASKING = ("qa", "mask", "text", "boxes", "findings")
"""Fields of a manifest row that a task can ask about; a row without them whose image cannot be opened is passed over."""


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


@dataclass(frozen=True)
class Data:
    """One or several data sets that lie on disk. folders: {name: (folder, adapter; None for a manifest)}."""

    folders: dict[str, tuple[Path, Dataset | None]]

    def samples(self, *splits: str | None, words: bool = False) -> list[Sample]:
        """The samples of these splits; None: the rows of manifests that name no split.

        With several data sets ids are NAME/ID. ``meta["dataset"]`` names the set. words: only what is asked and answered;
        no image of a manifest is opened.
        """
        found: list[Sample] = []
        for name, (folder, adapter) in self.folders.items():
            mark = f"{name}/" if len(self.folders) > 1 else ""
            for s in self._read(folder, adapter, splits, words):
                found.append(replace(s, id=mark + s.id, group=mark + s.group if s.group else None, meta={**s.meta, "dataset": name}))
        return found

    def scored(self, split: str) -> list[Sample]:
        """The samples to score: those of ``split``, and all rows of a manifest that name no split.

        Raises:
            ModelError: NO_SAMPLES, with what there is, when there are none.
        """
        found = self.samples(split, None)
        if not found:
            there = [s for s in SPLITS if s != split and any(True for f, a in self.folders.values() for _ in self._read(f, a, (s,), True))]
            raise ModelError(f"there are no samples of split {split!r}", "NO_SAMPLES", f"there is --split {' or '.join(there)}" if there else "give another --data")
        return found

    @staticmethod
    def _read(folder: Path, adapter: Dataset | None, splits: tuple[str | None, ...], words: bool) -> Iterator[Sample]:
        if adapter is not None:
            for split in splits:
                yield from adapter.samples(folder, split) if split in adapter.splits else ()
            return
        for row in manifest.rows(folder):
            if row.get("split") not in splits:
                continue
            try:
                yield from manifest.row_samples({**row, "image": None, "mask": None, "boxes": None} if words else row)
            except MedVLMError:
                if any(row.get(k) for k in ASKING):
                    raise  # a question must not vanish with its image

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the manifests, or over the JSON files of a published layout: tells whether the questions are the same."""
        whole = hashlib.sha256()
        for name, (folder, adapter) in sorted(self.folders.items()):
            files = [folder if folder.is_file() else folder / "manifest.jsonl"] if adapter is None else sorted(folder.glob("*.json"))
            for file in files:
                with file.open("rb") as raw:
                    whole.update(f"{name} {hashlib.file_digest(raw, 'sha256').hexdigest()}\n".encode())
        return whole.hexdigest()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the adapters name, () for all that fit."""
        return tuple(dict.fromkeys(t for _, adapter in self.folders.values() if adapter for t in adapter.tasks))


def open_data(where: str | Path, name: str | None = None) -> Data:
    """A manifest file, a folder with a ``manifest.jsonl``, a public data set in its published layout, or a folder of such folders.

    name: only this data set: ``where`` itself, or the folder of that name in it.

    Raises:
        ModelError: NO_SUCH_DATA, with what there is.
    """
    where = Path(where)
    if not where.exists():
        raise ModelError(f"there is no data at {where.name!r}", "NO_SUCH_DATA", "give --data with a manifest.jsonl, a data set's folder, or a folder of them")
    adapters: dict[str, Dataset] = parts.every("datasets", "DATASET")
    if name is not None:
        for folder in (where / name, where):
            if name in adapters and folder.is_dir() and adapters[name].here(folder):
                return Data({name: (folder, adapters[name])})
            if (folder / "manifest.jsonl").is_file() and (folder != where or where.resolve().name == name):
                return Data({name: (folder, None)})
    elif where.is_file() or (where / "manifest.jsonl").is_file():
        whole = where.resolve()
        title = whole.name if whole.is_dir() else whole.parent.name if whole.name == "manifest.jsonl" else whole.stem
        return Data({title: (where, None)})
    else:
        for n, adapter in adapters.items():
            if adapter.here(where):
                return Data({n: (where, adapter)})
    inside: dict[str, tuple[Path, Dataset | None]] = {}
    for folder in sorted(p for p in where.iterdir() if p.is_dir()) if where.is_dir() else ():
        if (folder / "manifest.jsonl").is_file():
            inside[folder.name] = (folder, None)
        elif found := next((n for n, adapter in adapters.items() if adapter.here(folder)), None):
            inside[found] = (folder, adapters[found])
    if name is not None or not inside:
        there = ", ".join(inside) or "no data set that can be read"
        what = f"data set {name!r}" if name else "data set"
        known = f"; published layouts are known of {', '.join(adapters)}" if adapters else ""
        raise ModelError(f"there is no {what} at {where.name!r}: it holds {there}{known}", "NO_SUCH_DATA", "see docs/manifest.md for a layout of your own")
    return Data(inside)

