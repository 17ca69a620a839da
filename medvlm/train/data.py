"""From samples to batches: pictures prepared once, then drawn, augmented and collated.

Flips are never used: they would swap left and right. Geometry moves picture, masks and boxes together; grey values are
changed after they lie in [0, 1].
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..datasets.instruct import known
from ..errors import ModelError
from ..language import Batch, Encoded, collate, encode
from ..preprocess import to_tensor
from ..sample import SEG, Sample
from ..vlm import MedVLM


@dataclass
class Turnset:
    """One conversation about a case's images: its tokens, and which mask its answer asks for."""

    encoded: Encoded
    kind: str
    target: int | None = None


@dataclass
class Case:
    """Images as their encoders see them, every target drawn on them, and the conversations about them.

    pictures: {image id: [(encoder, (C, *size) in 0..255)]}, empty for text. masks: (*size) coverage 0..255 in the input of
    the image's first encoder. on (image id), weak, present, names (index into the mask head's labels, -1 for others): one a
    mask. labels: of the first image.
    """

    pictures: dict[str, list[tuple[str, Tensor]]]
    masks: list[Tensor]
    on: list[str]
    weak: list[bool]
    present: list[bool]
    names: list[int]
    labels: list[float]
    turns: list[Turnset]
    source: str


def prepare(model: MedVLM, tokenizer, samples: Sequence[Sample]) -> list[Case]:
    """Samples grouped by the images they are about; the text-only samples of a row make one case."""
    groups: dict[tuple, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.meta.get("row"), *sample.images].append(sample)
    cases = []
    for (row, *_), members in groups.items():
        pictures, frames, counts = {}, {}, {}
        for key, image in members[0].images.items():
            seen = {name: to_tensor(image, model.encoders[name].spec) for name in model.route(image.modality)}
            pictures[key] = [(name, (tensor * 255).round().to(torch.uint8)) for name, (tensor, _) in seen.items()]
            frames[key], counts[key] = next(iter(seen.values()))[1], model.tokens(image.modality)
        first = next(iter(pictures.values()))[0][0] if pictures else None
        classify, mask = (model.head(kind, first) if first else None for kind in ("classify", "mask"))
        case = Case(pictures, [], [], [], [], [], known(members[0].labels, classify.labels) if classify is not None else [], [], str(row))
        for sample in members:
            target = None
            for area in (*sample.masks, *sample.regions):
                if SEG not in (sample.answer or ""):
                    break
                box = getattr(area, "box", None)
                array = _raster(box, sample.images[area.image].shape[1:]) if box is not None else area.array
                target = len(case.masks)
                case.masks.append((frames[area.image].mask_to_input(array) * 255).round().to(torch.uint8))
                case.on.append(area.image)
                case.weak.append(box is not None)
                case.present.append(bool(array.any()))
                case.names.append(mask.labels.index(area.label) if mask is not None and area.label in mask.labels else -1)
            case.turns.append(Turnset(encode(tokenizer, sample, counts), sample.meta.get("kind", "asked" if pictures else "text"), target))
        cases.append(case)
    return cases


def _raster(box, size) -> np.ndarray:
    array = np.zeros(size, bool)
    array[tuple(slice(max(0, round(lower)), round(upper)) for lower, upper in zip(*box))] = True
    return array


def augmentation(strength: float = 1.0):
    """Joint geometry for picture and masks, then grey values; 0 turns it off. No flips."""
    if not strength:
        return None, None
    geometry = v2.RandomAffine(degrees=12 * strength, translate=(0.08 * strength, 0.08 * strength),
                               scale=(1 - 0.2 * strength, 1 + 0.2 * strength), shear=4 * strength,
                               interpolation=v2.InterpolationMode.BILINEAR)  # fmt: skip
    grey = v2.Compose(
        [
            v2.ColorJitter(brightness=0.25 * strength, contrast=0.35 * strength),
            v2.RandomApply([v2.GaussianBlur(5, sigma=(0.1, 1.5))], p=0.2),
            v2.RandomApply([v2.GaussianNoise(sigma=0.04 * strength)], p=0.3),
        ]
    )
    return geometry, grey


def draw(cases: Sequence[Case], tokenizer, rng: np.random.Generator, turns: int, kinds: dict[str, float], strength: float) -> Batch:
    """A batch of these cases with up to ``turns`` conversations each, chosen by ``rng`` with the weight of their kind.

    Same ``rng`` state, same batch: torch's generator is seeded from it for the augmentation.
    """
    torch.manual_seed(int(rng.integers(2**31)))
    geometry, grey = augmentation(strength)
    pictures: dict[str, list[Tensor]] = defaultdict(list)
    labels, rows, places, masks, weak, present, drawn = [], [], [], [], [], [], []
    for case in cases:
        weights = np.array([kinds.get(t.kind, 1.0) for t in case.turns])
        often = Counter(t.kind for t in case.turns)
        weights = weights / np.array([often[t.kind] for t in case.turns])
        count = min(turns, int((weights > 0).sum()))
        chosen = rng.choice(len(case.turns), size=count, replace=False, p=weights / weights.sum()) if count else []
        wanted = [case.turns[i].target for i in chosen if case.turns[i].target is not None]
        slots: dict[str, list[tuple[str, int]]] = {}
        moved: dict[int, Tensor] = {}
        for key, seen in case.pictures.items():
            mine = [t for t in wanted if case.on[t] == key]
            gamma = float(np.exp(rng.normal(0, 0.25 * strength))) if strength else 1.0
            state = torch.get_rng_state()
            for k, (encoder, picture) in enumerate(seen):
                picture = picture.float() / 255
                targets = torch.stack([case.masks[t] for t in mine]) if mine and k == 0 else picture.new_zeros(0, *picture.shape[1:])
                if geometry is not None:
                    torch.set_rng_state(state)  # the same move in the input of every encoder that sees the image
                    picture, targets = geometry(tv_tensors.Image(picture), tv_tensors.Mask(targets))
                    picture = grey(torch.Tensor(picture)).clamp(0, 1) ** gamma
                moved |= zip(mine, targets)
                slots.setdefault(key, []).append((encoder, len(pictures[encoder])))
                pictures[encoder].append(torch.Tensor(picture))
        if case.pictures:
            nothing = [float("nan")] * len(case.labels)
            labels += [case.labels, *[nothing] * (len(case.pictures) - 1)]
        for i in chosen:
            turn = case.turns[i]
            rows.append(turn.encoded)
            places.append(slots)
            if turn.target is not None:
                masks.append(torch.Tensor(moved[turn.target].float()) / 255)
                weak.append(case.weak[turn.target])
                present.append(float(case.present[turn.target]))
                drawn.append(case.names[turn.target])
    if not rows:
        raise ModelError("none of the cases drawn has a conversation", "BAD_RECIPE", "check the data sets and the kinds of the stage")
    batch = collate(tokenizer, rows, places, {k: torch.stack(v) for k, v in pictures.items()})
    batch.targets = {"labels": torch.tensor(labels, dtype=torch.float32)}
    if masks:
        if len({m.shape for m in masks}) > 1:
            raise ModelError("masks of several encoders' inputs in one batch", "BAD_RECIPE", "mix only data sets that one encoder sees")
        batch.targets |= {"mask": torch.stack(masks), "weak": torch.tensor(weak), "present": torch.tensor(present), "label": torch.tensor(drawn)}
    return batch
