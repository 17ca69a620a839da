"""A public data set in the layout its authors publish, and any folder of data by name or path."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path

import numpy as np

from .. import parts
from ..errors import MedVLMError, ModelError
from ..imaging.scan import Image
from ..sample import Sample
from . import manifest, shards
from .checks import blank, leave_out, touch

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
    questions: patterns of the files that hold the questions and answers, relative to the folder.
    """

    here: Callable[[Path], bool]
    samples: Callable[[Path, str], Iterator[Sample]]
    splits: tuple[str, ...]
    licence: str
    source: str
    tasks: tuple[str, ...] = ()
    questions: tuple[str, ...] = ("*.json",)


@dataclass(frozen=True)
class Data:
    """One or several data sets that lie on disk. folders: {name: (folder, adapter; None for a manifest or shards)}."""

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

    def groups(self, split: str | None, bad: list[dict] | None = None, pixels: bool = False) -> Iterator[list[Sample]]:
        """The samples of a split to learn from, those of one row (or one image) at a time, in order; None: of rows that name none.

        ``meta["dataset"]`` names the set; ids are the set's own. pixels: also read every image whole, see
        :func:`.checks.touch`; those of shards always are.
        bad: None to raise the first thing that is wrong, with the manifest's line: an image that is missing, a mask of
            another size, a blank text, an id given twice, a line that is no row. A list takes up {dataset, line, row, code,
            message} of each instead, and it is left out. What an adapter itself refuses is raised all the same.
        """
        for name, (folder, adapter) in self.folders.items():
            mine: list[dict] | None = None if bad is None else []
            for group in chain(self._groups(folder, adapter, split, mine, pixels), ([],)):
                while mine:
                    entry = {"dataset": name, **mine.pop(0)}
                    if entry not in bad:  # a line that is no row is met in every split
                        bad.append(entry)
                for image in group[0].images.values() if group and pixels else ():
                    image.release()
                if group:
                    yield [replace(s, meta={**s.meta, "dataset": name}) for s in group]

    @staticmethod
    def _groups(folder: Path, adapter: Dataset | None, split: str | None, bad: list[dict] | None, pixels: bool) -> Iterator[list[Sample]]:
        if adapter is not None:
            read = adapter.samples(folder, split) if split in adapter.splits else ()
            for row, group in groupby(read, lambda s: s.meta.get("row", s.id)):
                yield list(_learnable(row, list(group), bad, pixels))
        elif _sharded(folder):
            yield from shards.groups(folder, split, None, bad=bad)
        else:
            for row in manifest.rows(folder, bad=bad):
                if row.get("split") == split:
                    yield manifest.row_group(row, bad, pixels)

    @property
    def streamed(self) -> bool:
        """Whether this is one set of shards, to be read by :meth:`stream`."""
        return len(self.folders) == 1 and all(_sharded(folder) for folder, _ in self.folders.values())

    def stream(self, split: str | None, seed: int | None, epoch: int, part: tuple[int, int] = (0, 1), skip: int = 0) -> Iterator[list[Sample]]:
        """The groups of a set of shards in the order of an epoch, see :func:`.shards.groups`."""
        ((name, (folder, _)),) = self.folders.items()
        for group in shards.groups(folder, split, seed, epoch, part, skip):
            yield [replace(s, meta={**s.meta, "dataset": name}) for s in group]

    def length(self, split: str | None, seed: int | None, epoch: int, part: tuple[int, int] = (0, 1)) -> int:
        """How many groups :meth:`stream` gives without ``skip``."""
        ((folder, _),) = self.folders.values()
        return shards.length(folder, split, seed, epoch, part)

    def traces(self, split: str | None) -> Iterator[Sample]:
        """One sample a row of a set of shards: patient, id and the digest of its image, nothing of it opened; for leaks."""
        ((name, (folder, _)),) = self.folders.items()
        for row in shards.rows(folder, (split,)):
            seen = Image("image", np.zeros((1, 1, 1), np.uint8))
            seen.origin = row.get("_digest")
            yield Sample(row["id"], row.get("patient"), {"image": seen} if seen.origin else {}, meta={"row": row["id"], "dataset": name})

    def count(self, split: str | None) -> int:
        """Rows of a split of a set of shards."""
        return self.length(split, None, 0)

    def scored(self, split: str) -> list[Sample]:
        """The samples to score: those of ``split``, and all rows of a manifest in which no row names a split; in others such rows are learnt from.

        Raises:
            ModelError: NO_SAMPLES, with what there is, when there are none.
        """
        named = {n for n, (folder, adapter) in self.folders.items() if adapter is None and any(True for _ in self._read(folder, adapter, SPLITS, True))}
        found = [s for s in self.samples(split, None) if s.meta["dataset"] not in named or s.meta.get("split") is not None]
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
        if _sharded(folder) and not words:
            for split in splits:
                yield from (s for group in shards.groups(folder, split, None) for s in group)
            return
        for row in shards.rows(folder, splits) if _sharded(folder) else manifest.rows(folder):
            if row.get("split") not in splits:
                continue
            try:
                yield from manifest.row_samples({**row, "image": None, "mask": None, "boxes": None} if words else row)
            except MedVLMError:
                if any(row.get(k) for k in ASKING):
                    raise  # a question must not vanish with its image

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the manifests, or over the files of a published layout that hold the questions: tells whether they are the same."""
        whole = hashlib.sha256()
        for name, (folder, adapter) in sorted(self.folders.items()):
            if adapter is None:
                files = [folder if folder.is_file() else folder / (shards.INDEX if _sharded(folder) else "manifest.jsonl")]
            else:
                files = sorted(f for q in adapter.questions for f in folder.glob(q))
            for file in files:
                with file.open("rb") as raw:
                    whole.update(f"{name} {hashlib.file_digest(raw, 'sha256').hexdigest()}\n".encode())
        return whole.hexdigest()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the adapters name, () for all that fit."""
        return tuple(dict.fromkeys(t for _, adapter in self.folders.values() if adapter for t in adapter.tasks))


def open_data(where: str | Path, name: str | None = None) -> Data:
    """A manifest file, a folder with a ``manifest.jsonl`` or a ``shards.json``, a public data set in its published layout, or a folder of such folders.

    name: only this data set: ``where`` itself, or the folder of that name in it.

    Raises:
        ModelError: NO_SUCH_DATA, with what there is.
    """
    where = Path(where)
    where = where.parent if where.name == shards.INDEX and where.is_file() else where
    if not where.exists():
        raise ModelError(f"there is no data at {where.name!r}", "NO_SUCH_DATA", "give --data with a manifest.jsonl, a data set's folder, or a folder of them")
    adapters: dict[str, Dataset] = parts.every("datasets", "DATASET")
    if name is not None:
        for folder in (where / name, where):
            if name in adapters and folder.is_dir() and adapters[name].here(folder):
                return Data({name: (folder, adapters[name])})
            if _here(folder) and (folder != where or where.resolve().name == name):
                return Data({name: (folder, None)})
    elif where.is_file() or _here(where):
        whole = where.resolve()
        title = whole.name if whole.is_dir() else whole.parent.name if whole.name == "manifest.jsonl" else whole.stem
        return Data({title: (where, None)})
    else:
        for n, adapter in adapters.items():
            if adapter.here(where):
                return Data({n: (where, adapter)})
    inside: dict[str, tuple[Path, Dataset | None]] = {}
    for folder in sorted(p for p in where.iterdir() if p.is_dir()) if where.is_dir() else ():
        if _here(folder):
            inside[folder.name] = (folder, None)
        elif found := next((n for n, adapter in adapters.items() if adapter.here(folder)), None):
            inside[found] = (folder, adapters[found])
    if name is not None or not inside:
        there = ", ".join(inside) or "no data set that can be read"
        what = f"data set {name!r}" if name else "data set"
        known = f"; published layouts are known of {', '.join(adapters)}" if adapters else ""
        raise ModelError(f"there is no {what} at {where.name!r}: it holds {there}{known}", "NO_SUCH_DATA", "see docs/manifest.md for a layout of your own")
    return Data(inside)


def _here(folder: Path) -> bool:
    return (folder / "manifest.jsonl").is_file() or _sharded(folder)


def _sharded(folder: Path) -> bool:
    return (folder / shards.INDEX).is_file() and not (folder / "manifest.jsonl").is_file()


def _learnable(row: str, group: list[Sample], bad: list[dict] | None, pixels: bool) -> Iterator[Sample]:
    """The samples of an adapter's row without those whose texts are blank; none where a picture cannot be read, if ``pixels``."""
    if pixels:
        try:
            touch(group, f"row {row}")
        except MedVLMError as error:
            return leave_out(bad, error, None, row)
    for s in group:
        if empty := next((t.role for t in s.turns if blank(t.text)), None):
            leave_out(bad, ModelError(f"sample {s.id!r}: the text of the {empty}'s turn is blank", "EMPTY_TEXT", "fill it in, or leave it out"), None, row)
        else:
            yield s
