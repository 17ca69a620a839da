"""A made data set of shapes and words, where no real one fits: ``python -m medvlm.datasets.shapes OUT --count 300 --rank 3``.

A textured body holds one to four objects; masks, boxes, findings, captions, reports and questions follow from how it was
drawn, so everything that can be asked is known. It is no medical data and says nothing of any patient (``"synthetic": true``
in every row), but it is read as such: docs/manifest.md, with pictures as PNG and volumes as NIfTI.

What there is to learn
- Five shapes, ``SHAPES``; each is in 10 of 28 images (``DECK``). Bars come with rings: half of the images with a bar have
  a ring, and the other way round; 5 of the 18 without a bar have one. Any other two are in 2 or 3 of 28, by chance 3.6.
- An object is large or small, bright or dim, lies wholly in one third of the image (``ZONES``) and on one side. In a
  volume the thirds are those from head to foot and an object is only a few slices thick, so that a question for a shape and
  a third can be answered from few slices; series differ in slice thickness, and in the order and direction in which their
  voxels are stored.
- Sides are the patient's: pictures show the patient's right on their left, as frontal X-rays do, and volumes lie in LPS. In
  fundus, pathology and other pictures of no such side (``facts.FLAT``) they are those of the picture.
- Not easy: bodies, noise and streaks differ, and blurred spots are no discs. Dim objects on bright ground are as bright as
  bright ones on dark ground; how bright one is called depends on how far it stands out.
- Images of one patient share the body and a split: about 70 : 15 : 15 of the images.

What the words tell without the image
Questions come in pairs of one to be answered yes and one no, about another shape or another place, side, size or brightness;
each text is as often true as not, except by lot. So the commonest training answer gets half of the questions, and about 3
in 10 pairs rather than the quarter of chance: of two sides or sizes one is always a little commoner.

Tasks of ``medvlm evaluate``: vqa (all questions), probe (the pairs), balanced_probe (made from labels and outlines), controls,
consistency and robustness (copies of the closed questions), segment (five outlines an image, those of absent shapes empty),
ground (the boxes, in volumes those of the outlines), report and retrieve (the row's text), zeroshot and linear_probe (findings).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MedVLMError, UsageError
from ..imaging.files import writing
from ..imaging.nifti import save_nifti
from ..imaging.scan import Volume
from .facts import FLAT
from .manifest import MODALITIES
from .sentences import listed

SHAPES = ("disc", "square", "ring", "bar", "cross")
SIDES = ("right", "left")
ZONES = ("upper", "middle", "lower")
SIZES = ("small", "large")
BRIGHTNESS = ("dim", "bright")
DECK = {
    "bar ring": 2, "bar ring disc": 1, "bar ring square": 1, "bar ring cross": 1,
    "bar": 2, "bar disc": 1, "bar square": 1, "bar cross": 1, "ring": 2, "ring disc": 1, "ring square": 1, "ring cross": 1,
    "disc": 2, "square": 2, "cross": 2, "disc square": 2, "disc cross": 2, "square cross": 2, "disc square cross": 1,
}  # fmt: skip
"""{the shapes of an image: how many images of 28 hold just these}. Decks are shuffled and dealt one after the other."""
SIZE = {2: (128, 128), 3: (32, 64, 64)}
LEAST = {2: (48, 48), 3: (12, 48, 48)}
"""Smallest sizes: below, a small ring closes and a third has no room."""
RADIUS = {"small": (0.36, 0.50), "large": (0.62, 0.80)}
"""Of the circle around a shape, as a share of half the height of a third."""
CONTRAST = {"dim": (0.13, 0.19), "bright": (0.26, 0.40)}
"""How far an object stands out, where 0 is black and 1 white."""
STORED = ("SPL", "SPR", "IPL", "SAL", "PSR")
"""Directions in which stored volumes grow (:attr:`medvlm.imaging.scan.Volume.orientation`)."""
HELD = {"val": 0.15, "test": 0.15}
TEXTS = ("report", "caption")
ASKED = {
    "finding": "Is there a {shape}?", "side": "Is there a {shape} on {where}?", "zone": "Is there a {shape} in the {value} {part}?",
    "size": "Is there a {value} {shape}?", "brightness": "Is there a {value} {shape}?",
}  # fmt: skip
VALUES = {"finding": ("",), "side": SIDES, "zone": ZONES, "size": SIZES, "brightness": BRIGHTNESS}


@dataclass(frozen=True)
class _Object:
    """words: shape, size, brightness, zone, side. centre (h, w), radius: pixels of the upright image; slices: half-open."""

    words: dict[str, str]
    centre: tuple[float, float]
    radius: float
    slices: tuple[int, int]
    contrast: float
    angle: float

    def __getitem__(self, name: str) -> str:
        return self.words.get(name, "")


@dataclass(frozen=True)
class _Kind:
    """What all images of a set have in common. size: (D, H, W), D = 1 in pictures."""

    rank: int
    seed: int
    size: tuple[int, int, int]
    modality: str
    text: str

    @property
    def name(self) -> str:
        return f"shapes{self.rank}d-s{self.seed}"

    def lot(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.rank, *what])


def write(folder: str | Path, count: int = 300, rank: int = 2, seed: int = 0, size: Sequence[int] | None = None,
          modality: str | None = None, text: str = "report") -> Path:  # fmt: skip
    """Write ``count`` images of ``rank`` 2 or 3 with all that is known of them; gives the folder. The same arguments, the same bytes.

    Args:
        folder: new or empty; it gets manifest.jsonl, images/ and masks/.
        size: (H, W) or (D, H, W) of the upright image, where D counts slices from foot to head; ``SIZE`` where not given.
        modality: one of the manifest's; "xray" and "ct" where not given. Pictures are uint8; volumes int16, HU from -300 to 300
            where it is "ct", else 0 to 1000.
        text: what the row's text is, "report" (FINDINGS and IMPRESSION) or "caption"; the caption is in ``meta["caption"]`` too.

    A row also holds ``objects``: the words of each object and its box ``lower``, ``upper``, index order of the stored grid,
    half-open.

    Raises:
        UsageError: BAD_ARGUMENT, OUTPUT_EXISTS. FileError: CANNOT_WRITE.
    """
    folder = Path(folder)
    kind = _checked(count, rank, seed, size, modality, text)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there and not empty", "OUTPUT_EXISTS", "give a new folder")
    for inside in ("images", "masks"):
        (folder / inside).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_row(folder, kind, number, *about)) for number, about in enumerate(zip(_dealt(kind, count), *patients(kind, count)))]
    with writing(folder / "manifest.jsonl") as part:  # last, so that a folder with one is whole
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def _checked(count: int, rank: int, seed: int, size: Sequence[int] | None, modality: str | None, text: str) -> _Kind:
    def refuse(what: str) -> None:
        raise UsageError(what, "BAD_ARGUMENT", "see the docstring of medvlm.datasets.shapes.write")

    if rank not in SIZE:
        refuse(f"rank {rank} is not 2 or 3")
    size, modality = tuple(SIZE[rank] if size is None else size), modality or {2: "xray", 3: "ct"}[rank]
    if count < 10 or seed < 0:
        refuse(f"count {count} and seed {seed} must be at least 10 and 0")
    if len(size) != rank or any(n < least for n, least in zip(size, LEAST[rank])):
        refuse(f"size {size} must have {rank} numbers, at least {LEAST[rank]}")
    if modality not in MODALITIES or (rank == 3 and modality in FLAT):
        refuse(f"modality {modality!r} is not one of {', '.join(sorted(MODALITIES - (set(FLAT) if rank == 3 else set())))}")
    if text not in TEXTS:
        refuse(f"text {text!r} is not one of {', '.join(TEXTS)}")
    return _Kind(rank, seed, (*(1,) * (3 - rank), *size), modality, text)


def _dealt(kind: _Kind, count: int) -> list[tuple[str, ...]]:
    """The shapes of each image."""
    deck, lot = [tuple(names.split()) for names, n in DECK.items() for _ in range(n)], kind.lot(0)
    return [deck[i] for _ in range(0, count, len(deck)) for i in lot.permutation(len(deck))][:count]


def patients(kind: _Kind, count: int) -> tuple[list[int], list[str]]:
    """The patient of each image, 1 to 4 images each, and the split."""
    lot, sizes = kind.lot(1), []
    while sum(sizes) < count:
        sizes.append(min(int(lot.integers(1, 5)), count - sum(sizes)))
    split, left = ["train"] * len(sizes), list(lot.permutation(len(sizes)))
    for name, share in HELD.items():
        wanted = round(share * count)
        while wanted > 0:
            wanted -= sizes[left[-1]]
            split[left.pop()] = name
    return [p for p, n in enumerate(sizes) for _ in range(n)], [s for s, n in zip(split, sizes) for _ in range(n)]


def _row(folder: Path, kind: _Kind, number: int, shapes: Sequence[str], patient: int, split: str) -> dict[str, Any]:
    """Draw, write and describe one image."""
    from scipy.ndimage import find_objects

    lot, id = kind.lot(2, number), f"{kind.name}-{number:05d}"
    objects = _objects(kind, shapes, lot)
    values, which = _draw(kind, objects, kind.lot(3, patient), kind.lot(4, number))
    image, mask, which = _save(folder, id, kind, objects, values, which, lot)
    boxes = [[[int(s.start) for s in found], [int(s.stop) for s in found]] for found in find_objects(which)]
    caption, findings = _caption(kind, objects, lot), _findings(kind, objects, lot)
    flat = {} if kind.rank == 3 else {"boxes": [{"label": o["shape"], "xyxy": [*b[0][::-1], *b[1][::-1]]} for o, b in zip(objects, boxes)]}
    texts = {"text": caption} if kind.text == "caption" else {
        "text": f"FINDINGS: {findings} IMPRESSION: {caption}", "sections": {"findings": findings, "impression": caption}}  # fmt: skip
    return {
        "id": id, "image": image, "modality": kind.modality, "split": split, "patient": f"{kind.name}-p{patient:04d}", "synthetic": True,
        **texts, "caption": caption, "findings": {s: int(s in shapes) for s in SHAPES},
        "labels": {"view": "PA"} if kind.modality == "xray" and kind.rank == 2 else {},
        "mask": {"type": "labelmap" if kind.rank == 2 else "volume_labelmap", "files": {"shapes": mask},
                 "labels": {str(n): s for n, s in enumerate(SHAPES, 1)}},
        **flat, "objects": [{**o.words, "lower": low, "upper": up} for o, (low, up) in zip(objects, boxes)],
        "qa": _questions(kind, id, objects, lot),
    }  # fmt: skip


def pick(lot: np.random.Generator, items: Sequence):
    return items[int(lot.integers(len(items)))]


def _objects(kind: _Kind, shapes: Sequence[str], lot: np.random.Generator) -> list[_Object]:
    """What is in an image, head first and right before left, each object in a third and side of its own."""
    depth, height, width = kind.size
    shapes = [*shapes, pick(lot, shapes)] if lot.random() < 0.25 else shapes  # twice the same
    unit, found = min(height / 3, 0.4 * width) / 2, []
    for shape, cell in zip(shapes, lot.permutation(len(ZONES) * 2)):
        zone, column = divmod(int(cell), 2)
        size, brightness = pick(lot, SIZES), pick(lot, BRIGHTNESS)
        radius = unit * lot.uniform(*RADIUS[size])
        off = lot.uniform(radius + 1, 0.44 * width - radius)
        if kind.rank == 2:
            top, bottom, slices = max(0.04 * height, zone * height / 3), min(0.96 * height, (zone + 1) * height / 3), (0, 1)
        else:
            foot = len(ZONES) - 1 - zone  # slices grow towards the head
            first, last, thick = -(-depth * foot // 3), depth * (foot + 1) // 3, round(depth * lot.uniform(0.08, 0.19))
            start = int(lot.integers(first, last - min(max(2, thick), last - first) + 1))
            top, bottom, slices = 0.1 * height, 0.9 * height, (start, start + min(max(2, thick), last - first))
        words = {"shape": shape, "size": size, "brightness": brightness, "zone": ZONES[zone],
                 "side": SIDES[1 - column if kind.modality in FLAT else column]}  # fmt: skip
        centre = (lot.uniform(top + radius, bottom - radius), width / 2 + (off if column else -off))
        found.append(_Object(words, centre, radius, slices, lot.uniform(*CONTRAST[brightness]), lot.uniform(0, math.pi)))
    return sorted(found, key=lambda o: (ZONES.index(o["zone"]), SIDES.index(o["side"])))


def _distance(shape: str, h: np.ndarray, w: np.ndarray) -> np.ndarray:
    """From each place to the edge of a shape of radius 1, negative inside."""
    a, b = np.abs(h), np.abs(w)
    if shape in ("disc", "ring"):
        return np.hypot(a, b) - 1 if shape == "disc" else np.abs(np.hypot(a, b) - 0.75) - 0.25
    if shape == "square":
        return np.maximum(a, b) - 0.7
    bar = np.maximum(a - 0.96, b - 0.26)
    return bar if shape == "bar" else np.minimum(bar, np.maximum(b - 0.96, a - 0.26))


def _body(kind: _Kind, body: np.random.Generator, lot: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """((D, H, W) values of a body without objects, (H, W) 1 inside and 0 outside). body: what the patient's images share."""
    from scipy.ndimage import gaussian_filter

    deep = kind.rank == 3
    z, y, x = ((np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1 for n in kind.size)
    z, y, x = z[:, None, None], y[:, None], x[None]
    inside = np.clip(8 * (1 - (np.abs(x) / body.uniform(0.92, 0.98)) ** 4 - (np.abs(y) / body.uniform(0.92, 0.98)) ** 4), 0, 1)
    wide, high = (np.abs(x) - body.uniform(0.40, 0.48)) / body.uniform(0.24, 0.32), (y - body.uniform(-0.2, 0.1)) / body.uniform(0.5, 0.75)
    fields = body.uniform(0.10, 0.18) / (1 + np.exp(8 * (wide**2 + high**2 - 1)))  # one dark on each side, in volumes towards the head
    fields = fields / (1 + np.exp(-6 * (z + body.uniform(0, 0.5)))) if deep else fields
    middle = body.uniform(0.18, 0.30) * np.exp(-((x / 0.07) ** 2) / 2)
    grain = body.uniform(0.03, 0.06) * kind.size[2]
    cloud = gaussian_filter(lot.standard_normal(kind.size, np.float32), (0.3 * grain * deep, grain, grain), mode="wrap", truncate=3)
    return body.uniform(0.40, 0.48) + middle - fields + body.uniform(0.04, 0.06) / float(cloud.std()) * cloud, inside


def _draw(kind: _Kind, objects: Sequence[_Object], body: np.random.Generator, lot: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """((D, H, W) values, 0 black and 1 white; number of the object at each place, 0 for none), upright."""
    from scipy.ndimage import gaussian_filter

    depth, height, width = kind.size
    values, inside = _body(kind, body, lot)
    rows, columns = (np.arange(n, dtype=np.float32) + 0.5 for n in (height, width))

    def around(place: tuple[float, float], angle: float) -> tuple[np.ndarray, np.ndarray]:
        """(h, w) from a place, turned."""
        h, w = rows[:, None] - place[0], columns - place[1]
        return h * math.cos(angle) + w * math.sin(angle), w * math.cos(angle) - h * math.sin(angle)

    def anywhere() -> tuple[tuple[float, float], np.ndarray, np.ndarray, np.ndarray]:
        """A place, what lies around it, and how much of something shows on each slice."""
        place = lot.uniform(0.15, 0.85) * height, lot.uniform(0.15, 0.85) * width
        off = (np.arange(depth, dtype=np.float32) - lot.uniform(0, depth)) / (0.06 * depth)
        return place, *around(place, lot.uniform(0, math.pi)), (np.exp(-(off**2) / 2) if kind.rank == 3 else off * 0 + 1)[:, None, None]

    few = 2 if kind.rank == 2 else 4
    for _ in range(int(lot.integers(few, 2 * few + 1))):  # spots without an edge
        place, h, w, shown = anywhere()
        reach, contrast, flat = lot.uniform(0.035, 0.09) * min(height, width), lot.uniform(0.10, 0.30), lot.uniform(0.6, 1)
        if all(math.dist(place, o.centre) > o.radius + 2 * reach for o in objects):  # under a dim object it would make it a bright one
            values = values + contrast * shown * np.exp(-((h / reach) ** 2 + (w / (reach * flat)) ** 2) / 2)
    for _ in range(int(lot.integers(0, few + 1))):  # streaks, longer and thinner than bars
        _, h, w, shown = anywhere()
        values = values + lot.uniform(0.08, 0.25) * shown * np.clip(1 - np.abs(w), 0, 1) * (np.abs(h) < lot.uniform(0.25, 0.5) * height)
    which = np.zeros(kind.size, np.uint8)
    for number, o in enumerate(objects, 1):
        far = _distance(o["shape"], *(p / o.radius for p in around(o.centre, o.angle))) * o.radius
        values[slice(*o.slices)] += o.contrast * np.clip(0.5 - far, 0, 1)
        which[slice(*o.slices), far <= 0] = number
    values = gaussian_filter(values * inside, (0, 0.6, 0.6)) + body.uniform(0.025, 0.05) * lot.standard_normal(kind.size, np.float32)
    return np.clip(values, 0, 1), which


def _save(folder: Path, id: str, kind: _Kind, objects: Sequence[_Object], values: np.ndarray, which: np.ndarray,
          lot: np.random.Generator) -> tuple[str, str, np.ndarray]:  # fmt: skip
    """(path of the image, of its labels, the objects on the stored grid). A volume's spacing and orientation are by lot."""
    from PIL import Image as Pillow

    ending = "png" if kind.rank == 2 else "nii.gz"
    image, mask = f"images/{id}.{ending}", f"masks/{id}.{ending}"
    label = np.array([0, *(SHAPES.index(o["shape"]) + 1 for o in objects)], np.uint8)
    if kind.rank == 2:
        Pillow.fromarray(np.rint(255 * values[0]).astype(np.uint8)).save(folder / image)
        Pillow.fromarray(label[which[0]]).save(folder / mask)
        return image, mask, which[0]
    plane, thick, stored = round(lot.uniform(0.7, 1.4), 2), pick(lot, (1.25, 2.0, 3.0, 5.0)), pick(lot, STORED)
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], [0, 1, 2, 3]] = thick, plane, plane, 1  # d to the head, h to the back, w to the left
    affine[:3, 3] = -affine[:3, :3] @ (np.array(kind.size) - 1) / 2
    black, white = (-300, 300) if kind.modality == "ct" else (0, 1000)
    save_nifti(Volume(id, np.rint(black + (white - black) * values)[None].astype(np.int16), affine).reorient(stored), folder / image)
    numbers = Volume(id, which[None], affine).reorient(stored)
    save_nifti(numbers.with_voxels(label[numbers.voxels]), folder / mask)
    return image, mask, numbers.voxels[0]


def _place(kind: _Kind, o: _Object) -> str:
    return f"{o['zone']} {o['side']} zone" if kind.rank == 2 else f"{o['zone']} third on the {o['side']}"


def _described(kind: _Kind, o: _Object) -> str:
    return f"{o['size']} {o['brightness']} {o['shape']} in the {_place(kind, o)}"


def _absent(objects: Sequence[_Object]) -> list[str]:
    return [s for s in SHAPES if all(o["shape"] != s for o in objects)]


def _caption(kind: _Kind, objects: Sequence[_Object], lot: np.random.Generator) -> str:
    """ "A large bright disc in the upper left zone; no ring." """
    said = listed([f"a {_described(kind, o)}" for o in objects])
    return f"{said.capitalize()}; no {pick(lot, _absent(objects))}."


def _findings(kind: _Kind, objects: Sequence[_Object], lot: np.random.Generator) -> str:
    said = [pick(lot, ("There is a {}.", "A {} is seen.", "A {}.")).format(_described(kind, o)) for o in objects]
    missing = pick(lot, (lambda a: [f"No {listed(a, 'or')}."], lambda a: [f"No {s}." for s in a], lambda a: [f"There is no {listed(a, 'or')}."]))
    return " ".join(said + missing(_absent(objects)))


def _questions(kind: _Kind, id: str, objects: Sequence[_Object], lot: np.random.Generator) -> list[dict[str, Any]]:
    """Pairs of shape, side, zone and size or brightness, one choice and open questions, in an order by lot."""
    found, part = [], "zone" if kind.rank == 2 else "third"

    def ask(question: str, answer: str, about: str, **more: Any) -> None:
        found.append({"question": question, "answer": answer, "type": "CLOSED" if "choices" in more else "OPEN", "category": [about], **more})

    for about in ("finding", "side", "zone", pick(lot, ("size", "brightness"))):
        for (shape, value), answer in zip(_twins(objects, about, lot), ("yes", "no")):
            where = f"the {value} of the picture" if kind.modality in FLAT else f"the patient's {value} side"
            ask(ASKED[about].format(shape=shape, value=value, where=where, part=part), answer, about, choices=["yes", "no"], pair=f"{id}-{about}")
    names = [o["shape"] for o in objects]
    single = [o for o in objects if names.count(o["shape"]) == 1]
    if single:
        one, about = pick(lot, single), pick(lot, ("size", "brightness"))
        ask(f"Where is the {one['shape']}?", _place(kind, one), "place")
        ask(f"Is the {one['shape']} {listed(VALUES[about], 'or')}?", one[about], about, choices=list(VALUES[about]))
    ask("How many objects are there?", str(len(objects)), "count")
    ask("Which shapes are there?", listed([s for s in SHAPES if s in names]), "shapes")
    return [{"qid": f"{id}-q{n}", **found[i]} for n, i in enumerate(lot.permutation(len(found)))]


def _twins(objects: Sequence[_Object], about: str, lot: np.random.Generator) -> tuple[tuple[str, str], tuple[str, str]]:
    """(shape, value) that is there, and one that is not: of another value or, as often where there is one, another shape."""
    one = pick(lot, objects)
    there = {(o["shape"], o[about]) for o in objects}
    shape, value = one["shape"], one[about]
    twins = [[(shape, v) for v in VALUES[about]], [(s, value) for s in SHAPES]]
    false = [[t for t in group if t not in there] for group in twins]
    return (shape, value), pick(lot, pick(lot, [group for group in false if group]))


def told(out: Path, count: int, make: Callable[[], Any]) -> int:
    """Run ``make`` for a command line and say what came of it: 0 done, 1 the work failed, 2 bad usage."""
    try:
        make()
    except MedVLMError as error:
        print(error, file=sys.stderr)
        return 1 if error.code == "CANNOT_WRITE" else 2
    print(f"{count} images in {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :func:`write`, see :func:`told`."""
    parser = argparse.ArgumentParser("python -m medvlm.datasets.shapes", description="Write a made data set of shapes and words (manifest.jsonl).")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--count", type=int, default=300, help="images (default: 300)")
    parser.add_argument("--rank", type=int, default=2, choices=(2, 3), help="pictures or volumes (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images (default: 0)")
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="height and width, or slices, height and width (default: 128 128, 32 64 64)")
    parser.add_argument("--modality", help="what the images pass for (default: xray, ct)")
    parser.add_argument("--text", default="report", choices=TEXTS, help="what the row's text is (default: report)")
    args = parser.parse_args(argv)
    return told(args.out, args.count, lambda: write(args.out, args.count, args.rank, args.seed, args.size, args.modality, args.text))


if __name__ == "__main__":
    sys.exit(main())
