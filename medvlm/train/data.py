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
from ..language import Batch, Encoded, collate, encode
from ..preprocess import to_tensor
from ..sample import SEG, Sample
from ..vlm import MedVLM


@dataclass
class Turnset:
    """One conversation about a picture: its tokens, and which mask of the picture its answer asks for."""

    encoded: Encoded
    kind: str
    target: int | None = None


@dataclass
class Case:
    """A picture as the encoder sees it, every target drawn on it, and the conversations about it.

    picture: (C, h, w) in [0, 1] or None for text. masks: (M, h, w) coverage 0..255. weak, present,
    names (index into the mask head's labels, -1 for others): one a mask.
    """

    encoder: str | None
    picture: Tensor | None
    masks: Tensor
    weak: list[bool]
    present: list[bool]
    names: list[int]
    labels: list[float]
    turns: list[Turnset]
    source: str


def prepare(model: MedVLM, tokenizer, samples: Sequence[Sample]) -> list[Case]:
    """Samples grouped by picture; the text-only samples of a row make one case."""
    groups: dict[tuple, list[Sample]] = defaultdict(list)
    for sample in samples:
        key = (sample.meta.get("row"), *sample.images)
        groups[key].append(sample)
    names = model.heads["classify"].labels if "classify" in model.heads else ()
    outlined = model.heads["mask"].labels if "mask" in model.heads else ()
    cases = []
    for (row, *_), members in groups.items():
        image = next(iter(members[0].images.values()), None)
        if image is None:
            turns = [Turnset(encode(tokenizer, s, {}), s.meta.get("kind", "text")) for s in members]
            cases.append(Case(None, None, torch.zeros(0), [], [], [], [], turns, str(row)))
            continue
        (encoder, *_) = model.route(image.modality)
        spec = model.encoders[encoder].spec
        picture, frame = to_tensor(image, spec)
        masks, weak, present, drawn, turns = [], [], [], [], []
        for sample in members:
            target = None
            for area in (*sample.masks, *sample.regions):
                if SEG not in (sample.answer or ""):
                    break
                box = getattr(area, "box", None)
                array = _raster(box, image.shape[1:]) if box is not None else area.array
                target = len(masks)
                masks.append((frame.mask_to_input(array) * 255).round().to(torch.uint8))
                weak.append(box is not None)
                present.append(bool(array.any()))
                drawn.append(outlined.index(area.label) if area.label in outlined else -1)
            turns.append(Turnset(encode(tokenizer, sample, {image.id: model.count(encoder)}), sample.meta.get("kind", "asked"), target))
        stack = torch.stack(masks) if masks else torch.zeros(0, *spec.size, dtype=torch.uint8)
        labels = known(members[0].labels, names)
        cases.append(Case(encoder, (picture * 255).round().to(torch.uint8), stack, weak, present, drawn, labels, turns, str(row)))
    return cases


def _raster(box, size) -> np.ndarray:
    array = np.zeros(size, bool)
    (top, left), (bottom, right) = box
    array[max(0, round(top)) : round(bottom), max(0, round(left)) : round(right)] = True
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
        slot = None
        if case.picture is not None:
            picture, targets = case.picture.float() / 255, case.masks
            wanted = [case.turns[i].target for i in chosen if case.turns[i].target is not None]
            if geometry is not None:
                picture, moved = geometry(tv_tensors.Image(picture), tv_tensors.Mask(targets[wanted]))
                gamma = float(np.exp(rng.normal(0, 0.25 * strength)))
                picture = grey(torch.Tensor(picture)).clamp(0, 1) ** gamma
            else:
                moved = targets[wanted]
            moved = iter(moved)
            slot = (case.encoder, len(pictures[case.encoder]))
            pictures[case.encoder].append(torch.Tensor(picture))
            labels.append(case.labels)
        for i in chosen:
            turn = case.turns[i]
            rows.append(turn.encoded)
            places.append(dict.fromkeys(turn.encoded.images, [slot]))
            if turn.target is not None:
                masks.append(torch.Tensor(next(moved).float()) / 255)
                weak.append(case.weak[turn.target])
                present.append(float(case.present[turn.target]))
                drawn.append(case.names[turn.target])
    batch = collate(tokenizer, rows, places, {k: torch.stack(v) for k, v in pictures.items()})
    batch.targets = {"labels": torch.tensor(labels, dtype=torch.float32)}
    if masks:
        batch.targets |= {"mask": torch.stack(masks), "weak": torch.tensor(weak), "present": torch.tensor(present), "label": torch.tensor(drawn)}
    return batch
