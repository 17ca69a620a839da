"""From samples to batches: pictures prepared once, then drawn, moved and collated."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..datasets.instruct import known
from ..errors import ModelError
from ..language import Batch, Encoded, bins, caption, collate, encode
from ..preprocess import to_tensor
from ..sample import SEG, Mask, Sample, Turn
from ..vlm import MedVLM
from .augment import Augmentation, laid

CAPTIONS = ("caption", "report", "facts")
"""Kinds of conversation whose answer is a text about the whole image: what a contrastive objective pairs it with."""

LAID = 0.5
"""Share of a stage's augmentation for what is laid one of eight ways besides."""
LONGEST = 2048
"""Tokens of a conversation where the language model names no limit."""

STILL = frozenset(("box", "locate"))
"""Kinds that say where something is: the picture of such a conversation is not moved."""


@dataclass
class Turnset:
    """One conversation about a case's images: its tokens, and the case's masks that its answers ask for, in reading order.

    still: it says where something is, so that its picture is not moved.
    """

    encoded: Encoded
    kind: str
    targets: list[int] = field(default_factory=list)
    still: bool = False


@dataclass
class Case:
    """Images as their encoders see them, every target drawn on them, and the conversations about them.

    pictures: {image id: [(encoder, (C, *size) in 0..255)]}, empty for text. masks: (*size) coverage 0..255 in the input of
    the image's first encoder. on (image id), weak, present, names (index into the mask head's labels, -1 for others): one a
    mask. labels: of the first image, NaN unknown. captions: tokens of texts about it. objects: (n, 2, rank) corners of boxes
    in the input of the first image, kinds (n,) index into the box head's labels; None where nobody marked them all.
    mirrored: it shows the mirror image, with words and sides exchanged. unsided: of a picture without boxes nobody names a side,
    so that it may be laid any way (``meta["unsided"]``).
    """

    pictures: dict[str, list[tuple[str, Tensor]]]
    labels: list[float]
    source: str
    masks: list[Tensor] = field(default_factory=list)
    on: list[str] = field(default_factory=list)
    weak: list[bool] = field(default_factory=list)
    present: list[bool] = field(default_factory=list)
    names: list[int] = field(default_factory=list)
    turns: list[Turnset] = field(default_factory=list)
    captions: list[list[int]] = field(default_factory=list)
    objects: tuple[np.ndarray, np.ndarray] | None = None
    mirrored: bool = False
    unsided: bool = False

    @property
    def size(self) -> int:
        """Bytes it holds."""
        return sum(t.untyped_storage().nbytes() for t in (*(t for seen in self.pictures.values() for _, t in seen), *self.masks))

    def named(self) -> dict[int, int]:
        """{label of the mask head: mask} of the first image, the first mask of each."""
        first = next(iter(self.pictures), None)
        return {n: t for t, n in reversed(list(enumerate(self.names))) if n >= 0 and self.on[t] == first}


def prepare(model: MedVLM, tokenizer, samples: Sequence[Sample]) -> list[Case]:
    """Samples grouped by the images they are about; the text-only samples of a row make one case."""
    groups: dict[tuple, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.meta.get("row"), *sample.images].append(sample)
    return [_case(model, tokenizer, str(row), members) for (row, *_), members in groups.items()]


def _case(model: MedVLM, tokenizer, row: str, members: Sequence[Sample]) -> Case:
    pictures, frames, counts = {}, {}, {}
    for key, image in members[0].images.items():
        seen = {name: to_tensor(image, model.encoders[name].spec) for name in model.route(image.modality)}
        pictures[key] = [(name, (tensor * 255).round().to(torch.uint8)) for name, (tensor, _) in seen.items()]
        frames[key], counts[key] = next(iter(seen.values()))[1], model.tokens(image.modality) if model.lm is not None else 0
    first = next(iter(pictures.values()))[0][0] if pictures else None
    classify, mask, box = (model.head(kind, first) if first else None for kind in ("classify", "mask", "box"))
    names = classify.labels if classify is not None else model.config.about.get("labels", ())
    case = Case(pictures, known(members[0].labels, names), row, unsided=bool(members[0].meta.get("unsided")))
    for sample in members:
        turn = Turnset(None, kind := sample.meta.get("kind", "asked" if pictures else "text"), still=not STILL.isdisjoint((kind, *sample.meta.get("kinds", ()))))
        marks = sum(t.text.count(SEG) for t in sample.turns if t.role == "assistant")
        for area in (*sample.masks, *sample.regions) if marks else ():
            box_only = getattr(area, "box", None)
            array = _raster(box_only, sample.images[area.image].shape[1:]) if box_only is not None else area.array
            turn.targets.append(len(case.masks))
            case.present.append(bool(array.any()))
            drawn = (frames[area.image].mask_to_input(array) * 255).round().to(torch.uint8) if case.present[-1] else None
            case.masks.append(torch.zeros((), dtype=torch.uint8).expand(frames[area.image].input) if drawn is None else drawn)
            case.on.append(area.image)
            case.weak.append(box_only is not None)
            case.names.append(mask.labels.index(area.label) if mask is not None and area.label in mask.labels else -1)
        if turn.kind in CAPTIONS and sample.answer:
            case.captions.append(model.encoders["text"].ids(tokenizer, sample.answer) if "text" in model.encoders else caption(tokenizer, sample.answer))
        if model.lm is not None:
            turn.encoded = _encoded(tokenizer, sample, counts, getattr(model.lm.config, "max_position_embeddings", None) or LONGEST)
            if len(turn.targets) != marks:
                raise ModelError(f"sample {sample.id} asks for {marks} masks and has {len(turn.targets)}", "BAD_DATASET", "one mask or region for each <|seg|>")
            case.turns.append(turn)
    if box is not None and members[0].meta.get("boxed"):
        kept = [r for r in members[0].regions if r.label in box.labels and r.box is not None]
        corners = [frames[r.image].box_to_input(np.asarray(r.box, float)) for r in kept]
        case.objects = np.array(corners).reshape(-1, 2, 2), np.array([box.labels.index(r.label) for r in kept], int)
    for image in members[0].images.values():
        image.release()
    return case


def _encoded(tokenizer, sample: Sample, counts: Mapping[str, int], limit: int) -> Encoded:
    """:func:`encode`, once for all conversations of the same words about images of the same names and sizes."""
    try:
        return _same_words(tokenizer, sample.turns, tuple(counts.items()), tuple(area.image for area in (*sample.masks, *sample.regions)), limit)
    except ModelError:
        return encode(tokenizer, sample, counts, limit=limit)  # its error names the sample


@functools.lru_cache(maxsize=1 << 16)
def _same_words(tokenizer, turns: tuple[Turn, ...], counts: tuple[tuple[str, int], ...], on: tuple[str, ...], limit: int) -> Encoded:
    bare = Sample("", turns=turns, masks=tuple(Mask(image, "", np.zeros(0, bool)) for image in on))
    return encode(tokenizer, bare, dict(counts), limit=limit)


def _raster(box, size) -> np.ndarray:
    array = np.zeros(size, bool)
    array[tuple(slice(max(0, round(lower)), round(upper)) for lower, upper in zip(*box))] = True
    return array


def draw(cases: Sequence[Case], tokenizer, lots: Sequence[np.random.Generator], turns: int = 4, kinds: Mapping[str, float] | None = None,
         strength: float = 0.0, pack: int | None = None, outlines: bool = False, halved: bool = False) -> Batch:  # fmt: skip
    """A batch of these cases with up to ``turns`` conversations each, chosen with the weight of their kind.

    lots: one random generator a case: what is drawn of a case depends on it alone. strength: of the augmentation.
    pack: tokens of a row that conversations share, None for a row each. outlines: with all that is outlined of each first
    image and known to the mask head by name, whatever its conversations ask (``targets["outline"]``, see objectives.outline).
    halved: pictures, masks and boxes at half their (H, W).
    """
    pictures: dict[str, list[Tensor]] = defaultdict(list)
    labels, captions, objects, told = [], [], [], []
    drawn: list[Drawn] = []
    rows: list[tuple[Turnset, dict, Case, dict[int, Tensor], dict[int, bool]]] = []
    for case, lot in zip(cases, lots):
        chosen = [case.turns[i] for i in _choose(case.turns, turns, kinds or {}, lot)]
        wanted, named = {t for turn in chosen for t in turn.targets}, case.named() if outlines else {}
        wanted = sorted(wanted | {t for t in named.values() if case.present[t]})
        move = not any(turn.still for turn in chosen)
        slots: dict[str, list[tuple[str, int]]] = {}
        moved: dict[int, Tensor] = {}
        stays: dict[int, bool] = {}
        for order, (key, seen) in enumerate(case.pictures.items()):
            mine, seed = [t for t in wanted if case.on[t] == key], int(lot.integers(2**31))
            for k, (encoder, picture) in enumerate(seen):
                corners, marks = case.objects if case.objects is not None and order == k == 0 else (np.zeros((0, 2, picture.ndim - 1)), np.zeros(0, int))
                targets = np.stack([case.masks[t].numpy() for t in mine]) if mine and k == 0 else np.zeros((0, *picture.shape[1:]), np.uint8)
                array = picture.numpy().astype(np.float32) / 255
                if halved:
                    array, targets, corners = _halved(array), np.round(_halved(targets)).astype(np.uint8), corners / np.r_[np.ones(picture.ndim - 3), 2, 2]
                most = [int(t.max()) for t in targets]
                if strength:
                    array, targets, corners, kept = Augmentation(picture.ndim - 1, strength * (LAID if case.unsided else 1))(array, targets, corners, seed, move)
                    marks = marks[kept]
                    if case.unsided:
                        way = seed % 8
                        array, targets = laid(array, way), laid(targets, way)
                moved |= zip(mine, torch.from_numpy(np.ascontiguousarray(targets)))
                # half of what was most covered of it, since no pixel is covered wholly by what is thin
                stays |= {t: case.present[t] and bool((moved[t] > min(127, m // 2)).any()) for t, m in zip(mine, most)}
                if order == k == 0:
                    drawn += [Drawn(len(pictures[encoder]), label, case.weak[t], moved[t] if case.present[t] else None, stays.get(t, False)) for label, t in named.items()]
                if case.objects is not None and order == k == 0:
                    objects.append((len(pictures[encoder]), corners, marks))
                slots.setdefault(key, []).append((encoder, len(pictures[encoder])))
                pictures[encoder].append(torch.from_numpy(np.ascontiguousarray(array)))
        for order in range(len(case.pictures)):
            labels.append(case.labels if order == 0 else [float("nan")] * len(case.labels))
            told.append(case.objects is not None and order == 0)
        if case.captions and case.pictures:
            captions.append((next(iter(slots.values()))[0][1], case.captions[int(lot.integers(len(case.captions)))]))
        rows += [(turn, slots, case, moved, stays) for turn in chosen]
    if rows and pack:
        shared = bins([len(turn.encoded.ids) for turn, *_ in rows], pack)
        rows, together = [rows[i] for b in shared for i in b], [len(b) for b in shared]
    if not rows and not pictures:
        raise ModelError("none of the cases drawn has a conversation", "BAD_RECIPE", "check the data sets and the kinds of the stage")
    stacked = {k: torch.stack(v) for k, v in pictures.items()}
    if rows:
        batch = collate(tokenizer, [turn.encoded for turn, *_ in rows], [slots for _, slots, *_ in rows], stacked, shared=together if pack else None)
    else:
        batch = Batch(*(torch.zeros(0, 0, dtype=torch.long) for _ in range(3)), stacked)
    batch.targets = {"labels": torch.tensor(labels, dtype=torch.float32)} | _masks(rows)
    if drawn:
        batch.targets["outline"] = _outlines(drawn)
    if captions:
        batch.targets["text"] = _padded([t for _, t in captions], tokenizer) | {"image": torch.tensor([at for at, _ in captions])}
    if objects:
        batch.targets["boxes"] = {
            "corners": torch.tensor(np.concatenate([c for _, c, _ in objects]), dtype=torch.float32), "label": torch.tensor(np.concatenate([m for *_, m in objects])),
            "image": torch.tensor([at for at, c, _ in objects for _ in c], dtype=torch.long), "told": torch.tensor(told),
        }  # fmt: skip
    return batch


def _halved(array: np.ndarray) -> np.ndarray:
    """(..., H, W) -> (..., H / 2, W / 2), the mean of each 2 x 2.

    Raises:
        ModelError: BAD_RECIPE for an odd side.
    """
    high, wide = array.shape[-2:]
    if high % 2 or wide % 2:
        raise ModelError(f"a picture of {high} x {wide} cannot be halved", "BAD_RECIPE", "give the encoder an even size, or leave out halved")
    pairs = array.reshape(*array.shape[:-2], high // 2, 2, wide // 2, 2)
    return np.add.reduce(np.add.reduce(pairs, -1, np.float32), -2) / 4


class Drawn(NamedTuple):
    """What is known of a label of the mask head in a picture of a batch. coverage: None where it is absent; stays: whether it is in the picture still."""

    picture: int
    label: int
    weak: bool
    coverage: Tensor | None
    stays: bool


def _outlines(drawn: Sequence[Drawn]) -> dict[str, Tensor]:
    """What was moved out of a picture is neither there nor absent."""
    there, none = [d for d in drawn if d.stays], [(d.picture, d.label) for d in drawn if d.coverage is None]
    return {
        "mask": torch.stack([d.coverage for d in there]) if there else torch.zeros(0, dtype=torch.uint8), "weak": torch.tensor([d.weak for d in there], dtype=torch.bool),
        "image": torch.tensor([d.picture for d in there], dtype=torch.long), "label": torch.tensor([d.label for d in there], dtype=torch.long),
        "none": torch.tensor(none, dtype=torch.long).reshape(-1, 2),
    }  # fmt: skip


def _choose(turns: Sequence[Turnset], most: int, kinds: Mapping[str, float], lot: np.random.Generator) -> list[int]:
    """Which conversations are held: each kind as often as its weight says, however many there are of it."""
    often = Counter(t.kind for t in turns)
    weights = np.array([kinds.get(t.kind, 1.0) / often[t.kind] for t in turns])
    count = min(most, int((weights > 0).sum()))
    return lot.choice(len(turns), size=count, replace=False, p=weights / weights.sum()).tolist() if count else []


def _masks(rows) -> dict[str, Tensor]:
    wanted = [(case, moved, stays, t) for turn, _, case, moved, stays in rows for t in turn.targets]
    if not wanted:
        return {}
    masks = [moved[t].float() / 255 for _, moved, _, t in wanted]
    if len({m.shape for m in masks}) > 1:
        raise ModelError("masks of several encoders' inputs in one batch", "BAD_RECIPE", "mix only data sets that one encoder sees")
    return {
        "mask": torch.stack(masks), "weak": torch.tensor([case.weak[t] for case, *_, t in wanted]),
        "present": torch.tensor([float(stays[t]) for *_, stays, t in wanted]), "label": torch.tensor([case.names[t] for case, *_, t in wanted]),
    }  # fmt: skip


def _padded(texts: Sequence[list[int]], tokenizer) -> dict[str, Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([t + [tokenizer.pad_token_id] * (width - len(t)) for t in texts])
    return {"ids": ids, "attention": torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts])}
