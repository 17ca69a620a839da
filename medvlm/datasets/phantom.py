"""Made anatomy with words, for training, tests and whoever has no data: ``python -m medvlm.datasets.phantom OUT --count 300 --kind mixed``.

Bodies by lot (:mod:`.phantom_trunk`, :mod:`.phantom_head`), healthy or not (:mod:`.phantom_findings`), as CT (int16, HU), MR (T1 or T2 by tissue) or frontal
chest X-ray (PNG, 8 bit), and photographs of healthy eyes (:mod:`.phantom_eye`), in the manifest's layout (docs/manifest.md): outlines, boxes, findings, a
short report, questions. It says nothing of any patient (``"synthetic": true`` in every row).

What there is to learn
- Findings of each kind of picture (``FINDINGS``): each is in as many images as any other. A side is the patient's, a zone a third of
  the lung's height. What is not drawn is absent, and is so called.
- Outlines bear the names of real sets: on X-rays those of ``xray_covid`` (lungs with what lies behind the heart and above the
  domes, opacities included; heart and mediastinum; airways), in volumes those of TotalSegmentator, findings in place of the organ.
- Pictures differ as real ones do: habitus, size, breath, posture, rotation, field of view, contrast medium, dose, film processing,
  collimation, burned-in letters, stored directions. Hearts lie on the left, livers on the right: no situs inversus. Images of one
  patient share size and habitus, and a split.

What the words tell without the image
Questions come in pairs of one yes and one no (another finding, the other side, another zone, an organ of another part of the body).
Findings, sides and zones are drawn evenly, so their texts are as often true as not. Organs are not: a chest has no bladder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..imaging.files import writing
from ..imaging.nifti import save_nifti
from ..imaging.scan import Volume
from ..sample import box_of
from . import sentences
from .phantom_canvas import (
    FAT,
    FLUID,
    GREY,
    ID,
    LUNGS,
    MUSCLE,
    NAMES,
    SIGN,
    SOFT,
    VESSEL,
    WHITE,
    Canvas,
    clouds,
    points_of,
    turned_by,
)
from .phantom_eye import photographed
from .phantom_film import developed, lettered, mediastinum, project, rays, resized, threads
from .phantom_findings import BELLY, CHEST, HEAD, ZONES, add
from .phantom_head import Head
from .phantom_trunk import Trunk
from .shapes import STORED, patients, pick, told

FINDINGS = {"chest-xray": CHEST, "chest-ct": CHEST, "abdomen-ct": BELLY, "head-ct": HEAD,
            "abdomen-mr": tuple(f for f in BELLY if f != "kidney stone"), "head-mr": HEAD, "eye-fundus": ()}  # fmt: skip
"""{kind: what is looked for}; of an eye its side and its vessels alone."""
SIZE = {2: (256, 256), 3: (64, 128, 128)}
LEAST = {2: (64, 64), 3: (16, 48, 48)}
MOST = {"chest": 4, "abdomen": 3, "head": 3, "eye": 0}
"""Findings in one image: any number up to this, each as often."""
OUTLINED = {"consolidation": "consolidation", "ground-glass opacity": "ground_glass_opacities", "pleural effusion": "pleural_effusion",
            "pneumothorax": "pneumothorax", "nodule": "nodule", "mass": "mass"}  # fmt: skip
"""{finding: name of its outline on X-rays}."""
SHAPELESS = ("cardiomegaly", "midline shift")
ORGANS = ("brain", "mandible", "heart", "trachea", "liver", "spleen", "stomach", "pancreas", "urinary_bladder", "sternum", "kidney_left", "kidney_right")
"""What is asked for, where it is shown and where it is not."""
T1 = {FAT: 0.95, MUSCLE: 0.36, SOFT: 0.4, VESSEL: 0.2, FLUID: 0.1, GREY: 0.46, WHITE: 0.64, "spleen": 0.36, "liver": 0.52, "stomach": 0.3, "colon": 0.35,
      "small_bowel": 0.35, "pancreas": 0.55, "kidney": 0.42, "gallbladder": 0.2, "urinary_bladder": 0.13, "lung": 0.05, "heart": 0.35, "aorta": 0.15,
      "vena_cava": 0.2, "vertebrae": 0.5, "sacrum": 0.5, "hip": 0.6, "femur": 0.65, "spinal_cord": 0.45, "autochthon": 0.36, "iliopsoas": 0.36, "skull": 0.18,
      "sternum": 0.4, "rib": 0.25, "eye": 0.15, "mandible": 0.35, "ventricle": 0.09, "costal": 0.3, "esophagus": 0.36, "adrenal": 0.4, "liver lesion": 0.36,
      "kidney cyst": 0.12, "hemorrhage": 0.78, "mass": 0.36}  # fmt: skip
T2 = {FAT: 0.75, MUSCLE: 0.18, SOFT: 0.35, VESSEL: 0.1, FLUID: 1.0, GREY: 0.55, WHITE: 0.4, "spleen": 0.55, "liver": 0.3, "stomach": 0.5, "colon": 0.4,
      "small_bowel": 0.5, "pancreas": 0.4, "kidney": 0.62, "gallbladder": 0.95, "urinary_bladder": 1.0, "lung": 0.05, "heart": 0.25, "aorta": 0.06,
      "vena_cava": 0.12, "vertebrae": 0.35, "sacrum": 0.4, "hip": 0.4, "femur": 0.45, "spinal_cord": 0.4, "autochthon": 0.18, "iliopsoas": 0.18, "skull": 0.12,
      "sternum": 0.3, "rib": 0.15, "eye": 0.95, "mandible": 0.25, "ventricle": 1.0, "costal": 0.2, "esophagus": 0.3, "adrenal": 0.35, "liver lesion": 0.6,
      "kidney cyst": 1.0, "hemorrhage": 0.25, "mass": 0.78}  # fmt: skip
"""{tissue: how bright it is}, by the textbook: fat bright, water dark in T1 and bright in T2, flowing blood and bone dark."""


@dataclass(frozen=True)
class _Set:
    """What all images of a set have in common. size: {rank: of its images}."""

    kind: str
    seed: int
    size: Mapping[int, tuple[int, ...]]

    @property
    def name(self) -> str:
        return f"phantom-{self.kind}-s{self.seed}"

    def lot(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *self.kind.encode(), *what])


def write(folder: str | Path, count: int = 300, kind: str = "mixed", seed: int = 0, size: Sequence[int] | None = None) -> Path:
    """Write ``count`` images of a kind with all that is known of them; gives the folder. The same arguments, the same bytes.

    Args:
        folder: new or empty; it gets manifest.jsonl, images/ and masks/.
        kind: of ``FINDINGS``, or "mixed", which deals them in turn.
        size: (H, W) of X-rays or (D, H, W) of volumes, as ``kind`` has them, D from foot to head; ``SIZE`` where not given.

    Raises:
        UsageError: BAD_ARGUMENT, OUTPUT_EXISTS. FileError: CANNOT_WRITE.
    """
    folder, made = Path(folder), _checked(count, kind, seed, size)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there and not empty", "OUTPUT_EXISTS", "give a new folder")
    for inside in ("images", "masks"):
        (folder / inside).mkdir(parents=True, exist_ok=True)
    kinds = [kind if kind != "mixed" else list(FINDINGS)[n % len(FINDINGS)] for n in range(count)]
    about = zip(kinds, _dealt(made, kinds), *patients(made, count))
    lines = [json.dumps(_row(folder, made, number, *one)) for number, one in enumerate(about)]
    with writing(folder / "manifest.jsonl") as part:  # last, so that a folder with one is whole
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def _checked(count: int, kind: str, seed: int, size: Sequence[int] | None) -> _Set:
    def refuse(what: str) -> None:
        raise UsageError(what, "BAD_ARGUMENT", "see the docstring of medvlm.datasets.phantom.write")

    if kind not in (*FINDINGS, "mixed"):
        refuse(f"kind {kind!r} is not one of {', '.join((*FINDINGS, 'mixed'))}")
    if count < 10 or seed < 0:
        refuse(f"count {count} and seed {seed} must be at least 10 and 0")
    sizes = dict(SIZE)
    if size is not None:
        rank = 2 if kind.endswith(("xray", "fundus")) else 3
        if kind == "mixed" or len(size) != rank or any(n < least for n, least in zip(size, LEAST[rank])):
            refuse(f"size {tuple(size)} of {kind} must have {rank} numbers, at least {LEAST[rank]}, and of mixed there is none to give")
        sizes[rank] = tuple(int(n) for n in size)
    return _Set(kind, seed, sizes)


def _dealt(made: _Set, kinds: Sequence[str]) -> list[list[str]]:
    """The findings of each image. Each kind deals from a deck of its own, and again when it is used up, so that all come equally often."""
    lot, decks, dealt = made.lot(0), {k: [] for k in FINDINGS}, []
    for kind in kinds:
        found: list[str] = []
        for _ in range(int(lot.integers(MOST[kind.split("-")[0]] + 1))):
            if len(found) == len(FINDINGS[kind]):
                break
            deck = decks[kind]
            if not set(deck) - set(found):
                deck += [FINDINGS[kind][i] for i in lot.permutation(len(FINDINGS[kind]))]
            one = next(f for f in deck if f not in found)
            deck.remove(one)
            found.append(one)
        dealt.append(sorted(found, key=FINDINGS[kind].index))
    return dealt


def _row(folder: Path, made: _Set, number: int, kind: str, findings: Sequence[str], patient: int, split: str) -> dict[str, Any]:
    """Draw, write and describe one image."""
    lot, id = made.lot(2, number), f"{made.name}-{number:05d}"
    part, modality = kind.split("-")
    about = {"id": id, "modality": modality, "split": split, "patient": f"{made.name}-p{patient:04d}", "synthetic": True}
    if modality == "fundus":
        return {**about, **_eye(folder, id, made.size[2], lot)}
    draw = _xray if modality == "xray" else _scan
    person = body(kind, findings, made.lot(3, patient), lot)
    more, said, shown = draw(folder, id, kind, person, findings, made.size[2 if modality == "xray" else 3], lot)
    seen = {s["finding"] for s in said}
    found = {f: 1 if f in seen else None if f in findings else 0 for f in FINDINGS[kind]}  # drawn, yet behind something: nobody can say
    return {
        **about, **more, **_report(kind, found, said, lot), "findings": found, "objects": said,
        "labels": {"body_part": part, **more["labels"]}, "qa": _questions(id, found, said, shown, lot),
    }  # fmt: skip


def body(kind: str, findings: Sequence[str], person: np.random.Generator, lot: np.random.Generator) -> Trunk | Head:
    """A body that the findings can be added to; person: what the images of a patient share, lot: what differs."""
    if kind.startswith("head"):
        shift = lot.uniform(7, 14) * lot.choice((-1, 1)) if "midline shift" in findings else 0.0
        made = Head(person, float(shift), lot.choice((0, 0, 60)))
        made.lot = lot
        return made
    xray, large = kind == "chest-xray", "cardiomegaly" in findings
    ap = bool(lot.random() < 0.4)
    ratio = lot.uniform(0.56, 0.67) if large else lot.uniform(0.40, 0.49)
    made = Trunk(person, xray and not (ap and lot.random() < 0.6), ratio, 0 if xray else lot.choice((0, 0, 90, 180)), xray or lot.random() < 0.15, not ap, xray)
    made.lot = lot
    return made


def _scan(folder: Path, id: str, kind: str, made: Trunk | Head, findings: Sequence[str], size: Sequence[int], lot: np.random.Generator):
    """A volume: ({fields of the row}, [words of each finding that can be seen], {organ: whether it is shown})."""
    part, modality = kind.split("-")
    canvas = _seen(made, part, size, lot)
    made.paint(canvas)
    said = [add(made, canvas, f) for f in findings]
    values, sequence = (_ct(canvas, (2, 6) if part == "head" else (5, 24), lot), {}) if modality == "ct" else _mr(canvas, lot)
    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], [0, 1, 2, 3]] = *(round(float(s), 3) for s in canvas.step), 1  # d to the head, h to the back, w to the left
    affine[:3, 3] = -affine[:3, :3] @ (np.array(size) - 1) / 2
    image, mask, stored = f"images/{id}.nii.gz", f"masks/{id}.nii.gz", pick(lot, STORED)
    save_nifti(Volume(id, np.rint(values)[None].astype(np.int16), affine).reorient(stored), folder / image)
    named = np.array([n if n in NAMES else 90 if n in (GREY, WHITE) else 0 for n in range(256)], np.uint8)[canvas.tissue]
    labels = Volume(id, named[None], affine).reorient(stored)
    save_nifti(labels, folder / mask)
    held = np.bincount(named.ravel(), minlength=256)
    there = {n: NAMES[n] for n in NAMES if held[n]}
    for one in said:
        where = np.argwhere(labels.voxels[0] == ID.get(one["finding"], -1))
        if len(where):
            one |= {"lower": where.min(0).tolist(), "upper": (where.max(0) + 1).tolist()}
    more = {"image": image, "labels": sequence,
            "mask": {"type": "volume_labelmap", "files": {"total": mask}, "labels": {str(n): name for n, name in there.items()}}}  # fmt: skip
    said = [s for s in said if "lower" in s or s["finding"] in SHAPELESS]
    enough = 2000 / float(np.prod(canvas.step))  # a sliver is neither there nor not
    return more, said, {n: bool(held[ID[n]]) for n in ORGANS if not 0 < held[ID[n]] <= enough}


def _seen(made: Trunk | Head, part: str, size: Sequence[int], lot: np.random.Generator) -> Canvas:
    """The field of view of a scan."""
    u = lot.uniform
    if isinstance(made, Head):
        low, high = (u(-135, -80), u(95, 112)) if lot.random() < 0.5 else (u(-60, -45), u(95, 112))
        wide = u(215, 255)
    else:
        low = u(-90, -60) if part == "chest" else u(-385, -345) if lot.random() < 0.4 else u(-215, -185)
        high = made.high + u(5, 35) if part == "chest" else u(20, 60)
        wide = 2 * (made.wide + 0.8 * made.fat + 18) * u(1.05, 1.25)
    step = np.array(((high - low) / size[0], wide / size[1], wide / size[2]))
    step[1:] = step[1:].max()
    offset = (high + low) / 2, 0.0 if isinstance(made, Head) else 8.0, 0.0
    axes = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) * np.float32(s) + np.float32(o) for n, s, o in zip(size, step, offset)]
    turn = turned_by(*(lot.normal(0, s) for s in ((4, 4, 6) if isinstance(made, Head) else (2.5, 1.5, 1))))
    return Canvas(points_of((axes[0][:, None, None], axes[1][:, None], axes[2]), lot, turn, u(1, 4))[0], step)


def _ct(canvas: Canvas, noisy: tuple[float, float], lot: np.random.Generator) -> np.ndarray:
    """HU with the couch below, blur and correlated noise of a deviation between two."""
    from scipy.ndimage import gaussian_filter

    values, step = canvas.hu, canvas.step
    if lot.random() < 0.7:
        ground = np.flatnonzero((values > -500).any((0, 2)))
        h, w = np.arange(values.shape[1])[:, None], np.arange(values.shape[2]) - values.shape[2] / 2
        bow = (ground[-1] if len(ground) else 0) + 4 / step[1] - (w * step[2]) ** 2 / 1400 / step[1]
        values += np.clip(1 - np.abs(h - bow) * step[1] / 3, 0, 1) * 1050 * (values < -900)
    grain = lot.uniform(0.4, 0.8)
    noise = gaussian_filter(lot.standard_normal(values.shape, np.float32), (0, grain, grain))
    values = gaussian_filter(values, (0, *(lot.uniform(0.2, 0.55),) * 2)) + lot.uniform(*noisy) / float(noise.std()) * noise
    return np.clip(values, -1024, 3071)


def _mr(canvas: Canvas, lot: np.random.Generator) -> tuple[np.ndarray, dict[str, str]]:
    """Brightness by tissue with the coil's shading and Rician noise; which sequence it passes for."""
    from scipy.ndimage import gaussian_filter

    name, table = pick(lot, (("T1", T1), ("T2", T2)))
    level = np.full(256, 0.02, np.float32)
    for number in range(256):
        words = NAMES.get(number, "")
        keys = [k for k in table if k == number or (isinstance(k, str) and words and k in words)]
        if keys:
            level[number] = table[max(keys, key=lambda k: len(str(k)))] * lot.uniform(0.88, 1.12)
    values = level[canvas.tissue]
    values *= np.where(canvas.hu < -700, np.float32(0.1), np.float32(1))
    values = gaussian_filter(values, (0.2, 0.6, 0.6)) * (1 + 0.05 * clouds(values.shape, lot, 4)) * np.exp(lot.uniform(0.05, 0.2) * clouds(values.shape, lot, 60))
    noise = lot.uniform(0.01, 0.04) * lot.standard_normal((2, *values.shape), np.float32)
    return lot.uniform(400, 1200) * np.hypot(values + noise[0], noise[1]), {"sequence": name}


def _xray(folder: Path, id: str, kind: str, made: Trunk, findings: Sequence[str], size: Sequence[int], lot: np.random.Generator):
    """A frontal picture; gives what :func:`_scan` gives."""
    from PIL import Image as Pillow
    from scipy.ndimage import gaussian_filter

    ap = not made.apart
    canvas, onto = rays(made, size, ap, lot)
    made.paint(canvas)
    fields = {side: np.isin(canvas.tissue, ids) for side, ids in LUNGS.items()}
    z, y, x = canvas.points
    middle = np.abs(y + 0.22 * made.deep) < 0.3 * made.deep
    hidden = ((z < made.dome(y, x) - 1) & (made.wall < 0) & middle).any(1)  # behind and below the domes
    heart = mediastinum(canvas, made)
    said = [add(made, canvas, f) for f in findings]
    deep = float(canvas.step[1])
    film = resized(project(canvas.hu, deep), size) + threads(made, canvas, onto, size)
    thick = {**{f"{side}_lung": (field.sum(1) * deep, 30) for side, field in fields.items()},
             "airways": ((canvas.tissue == ID["trachea"]).sum(1) * deep, 3),
             **{OUTLINED[s["finding"]]: ((canvas.tissue == ID[s["finding"]]).sum(1) * deep, 4) for s in said if s["finding"] in OUTLINED}}  # fmt: skip
    shown = resized(gaussian_filter(~hidden * 1.0, 1), size, 1) > 0.5
    masks = {name: (resized(gaussian_filter(mm * 1.0, 0.8), size, 1) > least) & (shown if name != "airways" else True) for name, (mm, least) in thick.items()}
    masks = {name: m if name in ("right_lung", "left_lung", "airways") else m & (masks["right_lung"] | masks["left_lung"]) for name, m in masks.items()}
    masks["cardiomediastinum"] = resized(heart, size, 1) > 0.5
    pixel = float(canvas.step[2]) * canvas.tissue.shape[2] / size[1]
    grey, inside = developed(film, masks, pixel, ap, lot)
    Pillow.fromarray(lettered(grey, ap, lot)).save(folder / f"images/{id}.png")
    masks = {name: m & inside for name, m in masks.items()}
    masks = {name: m for name, m in masks.items() if m.sum() > 1e-3 * m.size or "lung" in name and m.any()}
    for name, mask in masks.items():
        Pillow.fromarray(mask).save(folder / f"masks/{id}__{name}.png")
    said = [s for s in said if s["finding"] in SHAPELESS or OUTLINED[s["finding"]] in masks]
    boxed = [n for n in masks if n.endswith("lung")] + [OUTLINED[s["finding"]] for s in said if s["finding"] in OUTLINED]
    boxes = [(n, box_of(masks[n])) for n in boxed]
    return {"image": f"images/{id}.png", "labels": {"view": "AP" if ap else "PA"},
            "mask": {"type": "binary", "files": {n: f"masks/{id}__{n}.png" for n in masks}},
            "boxes": [{"label": n, "xyxy": [int(v) for v in (*low[::-1], *high[::-1])]} for n, (low, high) in boxes],
            }, said, {"heart": True, "trachea": True, "brain": False, "urinary_bladder": False}  # fmt: skip


def _eye(folder: Path, id: str, size: Sequence[int], lot: np.random.Generator) -> dict[str, Any]:
    """The fields of a photograph's row."""
    from PIL import Image as Pillow

    picture, vessels, eye = photographed(size, lot)
    image, mask = f"images/{id}.png", f"masks/{id}__vessel.png"
    Pillow.fromarray(picture).save(folder / image)
    Pillow.fromarray(vessels).save(folder / mask)
    asked = [("eye", f"Is this the {side} eye?", "yes" if side == eye else "no") for side in SIGN]
    return {"image": image, "labels": {"body_part": "eye", "eye": eye}, "mask": {"type": "binary", "files": {"vessel": mask}}, "qa": _numbered(id, asked, lot)}


def _phrase(one: Mapping[str, str], lot: np.random.Generator) -> str:
    """A finding that is there, in a sentence."""
    name, side, zone = one["finding"], one.get("side") or None, one.get("zone")
    if name == "midline shift":
        return f"Midline shift to the {side}."
    if zone:
        return f"{name[0].upper()}{name[1:]} in the {side} {zone} zone."
    return str(pick(lot, sentences.variants(name, "present", side)))


def _report(kind: str, found: Mapping[str, int | None], said: Sequence[Mapping[str, str]], lot: np.random.Generator) -> dict[str, Any]:
    """What is there, then all that was looked for and is not."""
    there, lacking = [_phrase(s, lot) for s in said], [f for f, v in found.items() if v == 0]
    style = pick(lot, (0, 1, 2))
    none = [pick(lot, sentences.variants(f, "absent")) if style == 1 else f"No {f}." for f in lacking]
    none = [f"No {sentences.listed(lacking, 'or')}."] if style == 0 and lacking else none
    findings = " ".join(there + none)
    impression = " ".join(there) or "None of the findings that were looked for."
    return {"text": f"FINDINGS: {findings} IMPRESSION: {impression}", "sections": {"findings": findings, "impression": impression}}


def _questions(id: str, found: Mapping[str, int | None], said: Sequence[Mapping[str, str]], shown: Mapping[str, bool],
               lot: np.random.Generator) -> list[dict[str, Any]]:  # fmt: skip
    """Pairs of one to be answered yes and one no, in an order by lot."""
    asked: list[tuple[str, str, str]] = []

    def ask(about: str, form: str, yes: str, no: str) -> None:
        asked.extend((about, form.format(word), answer) for word, answer in ((yes, "yes"), (no, "no")))

    present, absent = ([f for f, v in found.items() if v == value] for value in (1, 0))
    if present and absent:
        ask("finding", "Is there {}?", *(f"{sentences.article(f)}{f}" for f in (pick(lot, present), pick(lot, absent))))
    sided = [s for s in said if s.get("side") in SIGN]
    if sided:
        one = pick(lot, sided)
        way = "towards" if one["finding"] == "midline shift" else "on"
        ask("side", f"Is the {one['finding']} {way} the patient's {{}} side?", one["side"], next(s for s in SIGN if s != one["side"]))
    if zoned := [s for s in said if s.get("zone")]:
        one = pick(lot, zoned)
        ask("zone", f"Is the {one['finding']} in the {{}} zone?", one["zone"], pick(lot, [z for z in ZONES if z != one["zone"]]))
    there, away = ([n for n, v in shown.items() if v == value] for value in (True, False))
    if there and away:
        ask("organ", "Does this image show the {}?", *(sentences.spoken(pick(lot, names)) for names in (there, away)))
    return _numbered(id, asked, lot)


def _numbered(id: str, asked: Sequence[tuple[str, str, str]], lot: np.random.Generator) -> list[dict[str, Any]]:
    """Rows of (about, question, answer), those about the same a pair."""
    return [{"qid": f"{id}-q{n}", "question": asked[i][1], "answer": asked[i][2], "type": "CLOSED", "category": [asked[i][0]],
             "choices": ["yes", "no"], "pair": f"{id}-{asked[i][0]}"} for n, i in enumerate(lot.permutation(len(asked)))]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :func:`write`, see :func:`told`."""
    parser = argparse.ArgumentParser("python -m medvlm.datasets.phantom", description="Write a made data set of anatomy and words (manifest.jsonl).")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--count", type=int, default=300, help="images (default: 300)")
    parser.add_argument("--kind", default="mixed", choices=(*FINDINGS, "mixed"), help="what is imaged, and how (default: mixed, all in turn)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other patients (default: 0)")
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="height and width, or slices, height and width (default: 256 256, 64 128 128)")
    args = parser.parse_args(argv)
    return told(args.out, args.count, lambda: write(args.out, args.count, args.kind, args.seed, args.size))


if __name__ == "__main__":
    sys.exit(main())
