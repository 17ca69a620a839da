"""Which cases a step sees: mixtures of data sets, in an order that depends on the seed alone, split over processes and workers."""

from __future__ import annotations

import multiprocessing
import os
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from ..errors import MedVLMError, ModelError
from ..language import Batch
from ..sample import Sample
from .data import Case, draw

EAGER = 5000
"""A data set of up to so many images is prepared before training starts, so that what is bad in it is found then."""


EPOCHS_EMPTY = 100
"""Epochs in a row without a row for a reader of shards, after which it gives up."""


@dataclass
class Room:
    """Bytes that the prepared images of several sets may take together, and those they take."""

    limit: int
    held: int = 0


class Cases:
    """The cases of one data set and split: each image's are prepared when first drawn, and kept while there is room.

    make: (samples of one image) -> its cases. bad: None to raise what is wrong with an image, or a list that takes it.
    """

    def __init__(self, name: str, groups: Sequence[list[Sample]], make: Callable[[list[Sample]], list[Case]], room: Room, bad: list | None = None):
        self.name, self.groups, self.make, self.bad = name, groups, make, bad
        self.room, self.kept = room, OrderedDict()
        if len(groups) <= EAGER:
            shown = tqdm(range(len(groups)), desc=f"preparing {name}", unit="image", leave=False, disable=None)
            self.index = [i for i in shown if self[i]]
        else:
            self.index = list(range(len(groups)))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> list[Case]:
        """The cases of an image, [] when it has nothing to learn from."""
        if i not in self.kept:
            try:
                made = [c for c in self.make(self.groups[i]) if c.turns or c.pictures]
            except MedVLMError as error:
                if self.bad is None:
                    raise
                self.bad.append({"dataset": self.name, "row": self.groups[i][0].meta.get("row"), "code": error.code, "message": error.message})
                made = []
            self.room.held += sum(c.size for c in made)
            self.kept[i] = made
            while self.room.held > self.room.limit and len(self.kept) > 1:
                _, old = self.kept.popitem(last=False)
                self.room.held -= sum(c.size for c in old)
        return self.kept[i] if i in self.kept else []

    def reader(self, seed: Sequence[int], part: tuple[int, int]) -> Callable[[int], list[Case]]:
        """position -> cases: every image once an epoch, each epoch in another order."""
        order: dict[int, np.ndarray] = {}

        def at(position: int) -> list[Case]:
            epoch, place = divmod(position, len(self.index))
            if epoch not in order:
                order.clear()
                order[epoch] = np.random.default_rng([*seed, epoch]).permutation(len(self.index))
            return self[self.index[order[epoch][place]]]

        return at

    def all(self) -> Iterator[Case]:
        for i in self.index:
            yield from self[i]


class Stream:
    """The cases of shards, read in order by each reader, never held.

    groups: (epoch, part, skip) -> iterator over the samples of one image after the other. count: images of the split.
    length: (epoch, part) -> how many of them that reader sees. bad: as of :class:`Cases`.
    """

    def __init__(self, name: str, groups: Callable[[int, tuple[int, int], int], Iterator[list[Sample]]], count: int,
                 length: Callable[[int, tuple[int, int]], int], make: Callable[[list[Sample]], list[Case]], bad: list | None = None):  # fmt: skip
        self.name, self.groups, self.count, self.length, self.make, self.bad = name, groups, count, length, make, bad

    def __len__(self) -> int:
        return self.count

    def reader(self, seed: Sequence[int], part: tuple[int, int]) -> Callable[[int], list[Case]]:
        """position in this reader's own part -> cases; positions grow by one, and the first may be anywhere."""
        epoch, first, left = 0, 0, None

        def at(position: int) -> list[Case]:
            nonlocal epoch, first, left
            empty = 0
            while position >= first + (here := self.length(epoch, part)):
                empty = 0 if here else empty + 1
                if empty == EPOCHS_EMPTY:
                    raise ModelError(f"data set {self.name}: {self.count} rows in shards are too few for {part[1]} readers", "BAD_DATASET", "use fewer --workers or processes, or smaller shards")
                first, epoch, left = first + here, epoch + 1, None
            if left is None:
                left = self.groups(epoch, part, position - first)
            group = next(left)
            try:
                return self.make(group)
            except MedVLMError as error:
                if self.bad is None:
                    raise
                self.bad.append({"dataset": self.name, "row": group[0].meta.get("row"), "code": error.code, "message": error.message})
                return []

        return at


def plan(weights: dict[str, float], batch: int, seed: Sequence[int]) -> Iterator[list[tuple[str, int]]]:
    """For each step from the first: (data set, how many were taken of it before) of each place in the batch."""
    names = list(weights)
    chance = np.array([weights[n] for n in names], float)
    lot, taken = np.random.default_rng(seed), dict.fromkeys(names, 0)
    while True:
        picks = []
        for k in lot.choice(len(names), size=batch, p=chance / chance.sum()):
            picks.append((names[k], taken[names[k]]))
            taken[names[k]] += 1
        yield picks


class Sent(NamedTuple):
    """What a worker process gives: the batches of a step, the rows it left out on the way, and the error that ended it."""

    parts: list[Batch] | None
    bad: list[dict]
    error: MedVLMError | None = None


class Batches(IterableDataset):
    """For each step, the batches of this process, one a chunk; worker w of W makes those of every W-th step.

    Args:
        seed: (run's seed, number of the stage). start: the first step wanted; what comes before is passed over unread.
        rank, world: this process takes every world-th place of a step's batch.
    """

    def __init__(self, stage, seed: tuple[int, int], sources: dict[str, Cases | Stream], tokenizer, start: int, rank: int = 0, world: int = 1):
        self.stage, self.seed, self.sources, self.tokenizer = stage, seed, sources, tokenizer
        self.start, self.rank, self.world = start, rank, world
        self.bad = next(iter(sources.values())).bad  # one list for all

    def __iter__(self) -> Iterator[list[Batch] | Sent]:
        """In a worker process an error is sent like other items: raised there, its code and hint would be lost."""
        if get_worker_info() is None:
            yield from self._made()
            return
        known = len(self.bad or ())
        try:
            for parts in self._made():
                yield Sent(parts, (self.bad or [])[known:])
                known = len(self.bad or ())
        except MedVLMError as error:
            yield Sent(None, (self.bad or [])[known:], error)

    def _made(self) -> Iterator[list[Batch]]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        worker = (self.start + info.id) % workers if info else 0  # the loader asks its first worker for the first step
        part = (self.rank * workers + worker, self.world * workers)
        weights = {name: self.stage.data[name] for name in self.sources}
        readers = {name: source.reader([*self.seed, k], part) for k, (name, source) in enumerate(self.sources.items())}
        passed: dict[str, int] = defaultdict(int)  # of a stream, by this reader
        for step, picks in enumerate(plan(weights, self.stage.batch, self.seed)):
            if step == self.stage.steps:
                return
            if step % workers != worker:
                continue
            mine = list(enumerate(picks))[self.rank :: self.world]
            if step < self.start:
                for _, (name, _) in mine:
                    passed[name] += 1
                continue
            drawn = []
            for place, (name, position) in mine:
                lot = np.random.default_rng([*self.seed, step, place])
                if isinstance(self.sources[name], Stream):
                    position, passed[name] = passed[name], passed[name] + 1
                twin = bool(lot.random() < self.stage.flip)
                found = readers[name](position)
                cases = [c for c in found if c.mirrored == twin] or found  # some have no twin
                drawn.append((cases[int(lot.integers(len(cases)))] if cases else None, lot))
            good = [case for case, _ in drawn if case is not None]  # all processes hold as many cases, or a contrastive loss could not pair them
            drawn = [(good[int(lot.integers(len(good)))] if case is None else case, lot) for case, lot in drawn] if good else []
            yield [self._batch(part, step < self.stage.halved * self.stage.steps) for part in _parts(drawn, self.stage.chunk)]

    def received(self, sent: Sent) -> list[Batch]:
        """What a worker made; what it left out is noted here, and its error raised."""
        if self.bad is not None:
            self.bad += sent.bad
        if sent.error is not None:
            raise sent.error
        return sent.parts

    def _batch(self, drawn: list[tuple[Case, np.random.Generator]], halved: bool) -> Batch:
        stage = self.stage
        return draw([c for c, _ in drawn], self.tokenizer, [lot for _, lot in drawn], stage.turns, stage.kinds, stage.augment, stage.pack,
                    "outline" in stage.objective.split("+"), halved)


def _parts(items: list, size: int | None) -> Iterable[list]:
    if not items:
        raise ModelError("nothing could be read for a step: every image drawn is bad", "BAD_DATASET", "look at what --skip-bad left out")
    return [items[i : i + size] for i in range(0, len(items), size)] if size else [items]


def loader(batches: Batches, workers: int) -> Iterator[list[Batch]]:
    """The batches in the order of their steps, made by worker processes, or in this one when workers is 0."""
    if not workers:
        return iter(batches)
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ModelError("worker processes need a system that can fork; this one cannot", "BAD_ARGUMENT", "leave out --workers")
    return map(batches.received, DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=_same, prefetch_factor=2, multiprocessing_context="fork"))


def _same(item):
    return item


def room(readers: int = 1) -> Room:
    """For prepared images: a quarter of what the machine has left, shared by the processes and workers that each hold their own."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 << 30
    return Room(max(1 << 28, free // 4 // max(1, readers)))


def seed_everything(*seed: int) -> None:
    """torch's generators (dropout, the objectives' own draws) from these numbers."""
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
