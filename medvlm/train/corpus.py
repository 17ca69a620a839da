"""The data sets of a recipe: opened, checked for leaks, and turned into the cases that its stages draw."""

from __future__ import annotations

import difflib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..datasets import checks, instruct, manifest, mirror
from ..datasets.base import Data, open_data
from ..errors import MedVLMError, ModelError
from ..sample import Sample
from . import distributed
from .batches import EAGER, Cases, Room, Stream, room
from .data import Case, prepare

VAL_IMAGES = 48
"""About how many images of each data set a validation looks at."""
WORDS_OF = 2000
"""Images of a streamed set whose text a tokenizer is made of."""
SPLITS = {"train": ("train", None), "val": ("val",)}
"""Rows that name no split are learnt from."""


class Corpus:
    """Every data set that the recipe's stages name, once each.

    Raises:
        ModelError: NO_SUCH_DATA, NO_SAMPLES, LEAK, and what is wrong with a row, by its line, unless ``skip_bad``.
    """

    def __init__(self, recipe, data: Path, skip_bad: bool = False, allow_leaks: bool = False):
        self.recipe = recipe
        self.names = list(dict.fromkeys(name for stage in recipe.stages for name in stage.data))
        self.sets = {name: open_data(data, name.partition("/")[0]) for name in self.names}
        self.bad: list[dict] | None = [] if skip_bad else None
        self.no_twin = 0
        self.kinds: set[str] = set()
        read: dict[str, dict[str, list[list[Sample]]]] = {}
        for name, found in self.sets.items():
            of = name.partition("/")[0]
            if of not in read:
                read[of] = {s: [] if found.streamed and s == "train" else list(self._kept(found, s)) for s in SPLITS}
        if not allow_leaks:
            opened = {name.partition("/")[0]: found for name, found in self.sets.items()}
            splits = {s: itertools.chain.from_iterable([self._seen(found, s, read[of][s]) for of, found in opened.items()]) for s in SPLITS}
            checks.refuse_leaks(splits | {"test": itertools.chain.from_iterable(map(self._tested, opened.values()))}, self._on_line)
        self.held = {name: read[name.partition("/")[0]] for name in self.names}
        if not any(self.held[n]["train"] or self.sets[n].streamed for n in self.names):
            raise ModelError(f"{data} holds no training samples of {', '.join(self.names)}", "NO_SAMPLES", "check --data and the splits of its rows")

    def _groups(self, found: Data, split: str, bad: list[dict] | None = None) -> Iterator[list[Sample]]:
        """What a set holds of a split; the pixels of a manifest of up to ``EAGER`` rows are looked at too."""
        bad = self.bad if bad is None else bad
        few = all(adapter is None and not found.streamed and _rows(folder) <= EAGER for folder, adapter in found.folders.values())
        return itertools.chain.from_iterable(found.groups(s, bad, pixels=few) for s in SPLITS[split])

    def _kept(self, found: Data, split: str) -> Iterator[list[Sample]]:
        """What is held of a split: of shards, whose samples come decoded, no more than a validation looks at."""
        groups = self._groups(found, split)
        return itertools.islice(groups, 0, None, max(1, found.count(split) // VAL_IMAGES)) if found.streamed else groups

    def _on_line(self, row: str) -> str:
        """A row ("set/id") with the line of its manifest, where it stands in one."""
        of, _, ident = row.partition("/")
        found = next((found for name, found in self.sets.items() if name.partition("/")[0] == of), None)
        folders = [] if found is None or found.streamed else [folder for folder, adapter in found.folders.values() if adapter is None]
        line = next((r["_line"] for folder in folders for r in manifest.rows(folder, bad=[]) if r["id"] == ident), None)
        return row if line is None else f"{row} on line {line}"

    @staticmethod
    def _seen(found: Data, split: str, groups: list[list[Sample]]) -> Iterator[Sample]:
        if found.streamed:
            return itertools.chain.from_iterable(found.traces(s) for s in SPLITS[split])
        return itertools.chain.from_iterable(groups)

    @staticmethod
    def _tested(found: Data) -> Iterator[Sample]:
        """What nothing is learnt from. That a public set's test files are not there, or are bad, is no reason not to learn."""
        try:
            yield from found.traces("test") if found.streamed else itertools.chain.from_iterable(found.groups("test", []))
        except MedVLMError:
            return

    def texts(self) -> Iterator[str]:
        """The text of every conversation to learn from; of a streamed set, of its first images."""
        for name in self.names:
            groups = self.held[name]["train"] or itertools.islice(self._groups(self.sets[name], "train", []), WORDS_OF)
            for group in groups:
                yield from (t.text for s in self.recipe.samples(group, name, "train") for t in s.turns)
                for image in group[0].images.values():
                    image.release()

    def sources(self, model, tokenizer, seed: int, readers: int = 1) -> dict[str, Cases | Stream]:
        """What each set's training batches are drawn from; readers: processes times workers."""
        shared = room(readers)
        found = {name: self._source(name, model, tokenizer, seed, shared) for name in self.names}
        self.all_read = all(isinstance(s, Cases) and len(s.groups) <= EAGER for s in found.values())
        return found

    def val(self, model, tokenizer) -> dict[str, Cases]:
        found, shared = {n: self.held[n]["val"] for n in self.names}, room()
        return {n: Cases(n, groups[:: max(1, len(groups) // VAL_IMAGES)], self._make(n, "val", model, tokenizer), shared, self.bad) for n, groups in found.items()}

    def val_samples(self) -> list[Sample]:
        return [s for n in self.names for g in self.held[n]["val"] for s in self.recipe.samples(g, n, "val")]

    def refuse_misspelt(self) -> None:
        """Kinds that a stage weighs and no conversation has; of sets that are read as the steps go that is not known.

        Raises:
            ModelError: BAD_RECIPE when there is one of nearly that name.
        """
        known = {*self.kinds, *instruct.KINDS, "facts", "grounded", "dialogue", "text"}
        for stage in self.recipe.stages:
            for kind in stage.kinds.keys() - known if self.all_read else ():
                if near := difflib.get_close_matches(kind, known, 1, 0.75):
                    raise ModelError(f"stage {stage.name}: kinds hold {kind!r}, which no conversation is; did you mean {near[0]!r}?", "BAD_RECIPE")
                if distributed.rank() == 0:
                    tqdm.write(f"stage {stage.name}: no conversation is of kind {kind!r}; there are {', '.join(sorted(self.kinds))}", file=sys.stderr)

    def left_out(self, out: Path) -> None:
        """List what was bad in any process, and count it where there is more than at the last call; all processes call this together.

        Shards and large sets are read as the steps go, so what is bad in them is known only then.
        """
        file = out / "skipped.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []  # of before a stop
        found = list(dict.fromkeys([*lines, *map(json.dumps, distributed.gathered(self.bad or []))]))
        if distributed.rank() == 0 and len(found) > len(lines):
            file.write_text("".join(f"{line}\n" for line in found))
            tqdm.write(f"left out as bad: {len(found)}, listed in {file}", file=sys.stderr)

    def _source(self, name: str, model, tokenizer, seed: int, shared: Room) -> Cases | Stream:
        data, make = self.sets[name], self._make(name, "train", model, tokenizer)
        if not data.streamed:
            return Cases(name, self.held[name]["train"], make, shared, self.bad)
        split = "train" if data.count("train") else None
        read = lambda epoch, part, skip: data.stream(split, seed, epoch, part, skip)  # noqa: E731
        return Stream(name, read, data.count(split), lambda epoch, part: data.length(split, seed, epoch, part), make, self.bad)

    def _make(self, name: str, split: str, model, tokenizer):
        twins = split == "train" and any(stage.flip > 0 for stage in self.recipe.stages if name in stage.data)

        def cases(group: list[Sample]) -> list[Case]:
            samples = list(self.recipe.samples(group, name, split))
            self.kinds |= {str(s.meta["kind"]) for s in samples if "kind" in s.meta}
            made = prepare(model, tokenizer, samples)
            for case in prepare(model, tokenizer, list(self._mirrored(samples))) if twins else ():
                case.mirrored = True
                made.append(case)
            for image in {id(i): i for s in group for i in s.images.values()}.values():
                image.release()  # of which slices and windows were cut
            return made

        return cases

    def _mirrored(self, samples: list[Sample]) -> Iterator[Sample]:
        """The twins of those that stay true in a mirror; how many do not is counted."""
        for sample in samples:
            try:
                yield mirror.mirror(sample)
            except ModelError as error:
                if error.code != "FLIP_REFUSED":
                    raise
                self.no_twin += 1


def _rows(folder: Path) -> int:
    file = folder if folder.is_file() else folder / "manifest.jsonl"
    with file.open("rb") as lines:
        return sum(1 for _ in lines)
