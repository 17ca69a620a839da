"""The bundled model: a small reader of X-rays, CT, MR, fundus photographs and microscopy, sized to train on two cores.

One encoder sees single pictures, volumes slice by slice. Outlines come from a ladder on its levels, of what is thin or small on
windows at the picture's own resolution; findings, kind, plane, part and side from a classifier; words from a language model of
four layers; pictures and captions share a space. Everything starts from random numbers.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..datasets import facts, instruct, mirror
from ..datasets.sentences import spoken, word
from ..datasets.slices import sliced
from ..datasets.windows import windowed
from ..errors import ModelError
from ..imaging import window
from ..imaging.scan import Image, Volume
from ..sample import Mask, Sample, Turn
from ..vlm import MedVLMConfig
from . import towers
from .base import Recipe, Stage

XRAY = ("right lung", "left lung", "heart and mediastinum", "airways", "ground-glass opacity", "consolidation", "pleural effusion",
        "pneumothorax", "endotracheal tube", "nasogastric tube", "central venous line")  # fmt: skip
CT = ("body", "bone", "right lung", "left lung", "liver", "spleen", "right kidney", "left kidney", "gallbladder", "stomach", "pancreas", "duodenum",
      "small bowel", "colon", "aorta", "inferior vena cava", "spinal cord")  # fmt: skip
OUTLINED = {"xray": XRAY, "ct": CT, "mr": (), "fundus": ("vessels",), "pathology": ("nuclei",)}
"""{modality: what is outlined in its pictures}; vessels are those of the retina."""
TARGETS = tuple(dict.fromkeys(t for group in OUTLINED.values() for t in group))
UNDRAWN = ("endotracheal tube", "nasogastric tube", "central venous line")
"""Outlined in films of train, but with a Dice of 0 in the one of val: of these only probabilities are told."""
ELSEWHERE = {"xray": (*CT[4:], "vessels", "nuclei"), "ct": ("vessels", "nuclei"), "mr": ("vessels", "nuclei"),
             "fundus": tuple(t for t in TARGETS if t != "vessels"), "pathology": tuple(t for t in TARGETS if t not in ("nuclei", "vessels"))}  # fmt: skip
"""{modality: what no such picture shows}."""
WHOLE = ("right lung", "left lung", "heart and mediastinum", "body", "liver", "spleen", "right kidney", "left kidney", "gallbladder", "stomach", "pancreas", "aorta")
"""What is of one piece: islands that are much smaller than the largest are no part of it."""
WITHIN = {"ct": {"right lung": "body", "left lung": "body"}}
"""{modality: {what: what it lies within}}: the air beside a body is as dark as a lung."""
CELLS = ("RBC", "WBC", "platelets")
FINDINGS = ("COVID-19 pneumonia", "bacterial pneumonia", "pneumonia", "ARDS", "ground-glass opacity", "consolidation",
            "pleural effusion", "pneumothorax", "cardiomegaly", "endotracheal tube", "nasogastric tube",
            "central venous line")  # fmt: skip
REPORTED = ("ground-glass opacity", "consolidation", "cardiomegaly", "endotracheal tube", "nasogastric tube",
            "COVID-19 pneumonia", "bacterial pneumonia", "pneumonia", "ARDS")  # fmt: skip
"""Findings with at least five images with and five without them in train: only these are put into a report."""
GROUPS = {"modality": ("xray", "ct", "mr", "fundus", "pathology"), "view": ("PA", "AP"), "plane": ("axial", "coronal", "sagittal"),
          "part": ("head", "chest", "abdomen", "eye"), "eye": ("right", "left")}  # fmt: skip
"""What is known of a whole picture: one of each, where it has any."""
ZOOM, SCALE = {"fundus": 3.9}, {"pathology": 1.5}
"""How closely a picture is looked at where it is outlined: times the resolution at which it fits whole, since every fundus camera
shows the eye as large, and pixels of the input for one of the picture."""
WINDOW = {"fundus": 256, "pathology": 170}
"""Pixels of the training pictures in a window of 256, which are these."""
SHOWN = ("soft tissue", "brain", "lung", (400.0, 1800.0))
"""Windows through which slices of CT are exported as pictures; the last is for bone."""
COMPLETE = 10
"""A label map with so many names leaves out nothing of ``CT`` that it shows, if it is made, or so many are of ``CT``: some maps are of one aorta's parts."""
PATIENTS = 5
"""Of fewer in val no scale is fitted: it would be theirs, not the model's."""
YES = 0.5
"""Share of yes among answers to come: 0.61 of val's questions in VQA-RAD, which few patients were asked, 0.46 of train's, 0.50 of both."""
ABSENT = 4
"""Targets of other kinds of picture that are asked of one."""
KINDS = ("segment", "asked", "finding", "describe", "modality", "view", "plane", "organ", "abnormal", "count", "facts")
BONES = re.compile(r"^(vertebra|rib|sternum|hip|sacrum|femur|humerus|scapula|clavicula|skull|mandible)")


def model(tokenizer, size: int = 256, dims: tuple[int, ...] = (32, 48, 96, 160, 320), dim: int = 192, layers: int = 4, embed: int = 128, ladder: int = 32, shuffle: int = 2) -> MedVLMConfig:
    """The configuration; size: side of the input in pixels, dims: channels of the encoder's levels, dim and layers: of the language model, embed: of
    the space that pictures and captions share, ladder: channels of the map that outlines are read off, shuffle: pixels to
    one of its cells along each axis."""
    dims, strides, square = list(dims), [2**k for k in range(1, len(dims) + 1)], (size, size)
    groups = [[f"{group}:{name}" for name in names] for group, names in GROUPS.items()]
    pyramid = {"level_dims": dims, "level_strides": strides}
    return towers.config(
        tokenizer,
        {
            "encoders": {"picture": {"file": "unet", "args": {"size": square, "channels": 3, "dims": dims, "windows": [[-600.0, 1500.0], [40.0, 400.0], [400.0, 1800.0]], "standardise": True}},
                         "text": towers.text(tokenizer, None, dim, 2)},
            "projectors": {"picture": {"file": "mlp", "args": {"dim": dims[-1], "lm_dim": dim}}},
            "heads": {
                "mask": {"file": "mask", "args": {**pyramid, "lm_dim": dim, "size": square, "labels": list(TARGETS), "ladder": ladder, "shuffle": shuffle}},
                "classify": {"file": "classify", "args": {"dim": dims[-1], "labels": [*FINDINGS, *(n for g in groups for n in g)], "groups": groups}},
                "box": {"file": "box", "args": {**pyramid, "dim": dims[-1], "labels": list(CELLS), "width": 64}},
                "contrast": {"file": "contrast", "args": {"dim": dims[-1], "text_dim": dim, "embed_dim": embed}},
            },
            "language": {"lm": towers.language(tokenizer, None, dim, layers)},
        },
        {
            "name": "medvlm-tiny", "version": "0.4.0", "routes": {"*": "picture"}, "reads": [*GROUPS["modality"], "ct_or_mr"],
            "targets": [t for t in TARGETS if t not in UNDRAWN], "findings": list(REPORTED),
            "outlined": {m: [t for t in group if t not in UNDRAWN] for m, group in OUTLINED.items()}, "whole": list(WHOLE), "within": WITHIN,
            "zoom": ZOOM, "scale": SCALE, "unsided": ["fundus", "pathology"], "boxed": ["pathology"], "slices": 4,
        },
    )  # fmt: skip


def samples(group: list[Sample], name: str, split: str) -> Iterator[Sample]:
    """Conversations about one image; the text of the IU reports is never read, only their structured labels.

    Of a set NAME, "NAME/outlined" is what has exact outlines, and "NAME/windows" are windows of its pictures: to be drawn more
    often than the rest, or only for their outlines.
    """
    name, _, part = name.partition("/")
    if part == "outlined" and (split != "train" or not any(s.masks for s in group)):
        return
    if name == "report_iu":
        yield from instruct.restructured(group)
        return
    first = group[0]
    image = next(iter(first.images.values()))
    if part == "windows":
        for one in windowed(group, WINDOW[image.modality]):
            for s in instruct.conversations(one, OUTLINED[image.modality], (), kinds=("segment",), absent=OUTLINED[image.modality], variety=0):
                yield replace(s, meta={**s.meta, "unsided": True})
    elif isinstance(image, Volume):
        whole, complete = _joined(group)
        for plane, count in (("axial", 5 if first.meta.get("synthetic") else 15), ("coronal", 2), ("sagittal", 2)):
            for number, one in enumerate(sliced(whole, count, plane)):
                yield from _conversations(one, complete)
                if split == "train" and image.unit == "HU" and number % 2 == 0:
                    yield from _conversations(_exported(one, window.named(SHOWN)[number // 2 % len(SHOWN)]), complete)
    else:
        talks = list(_conversations(group))
        yield from talks
        if split == "train" and (part == "outlined" or name == "fundus_chase"):  # few pictures, of which sides are learnt
            yield from _mirrored(talks)


def _exported(group: list[Sample], view: tuple[float, float]) -> list[Sample]:
    """Slices of CT as they come out of a viewer: bytes through one window (centre, width), of which nobody knows the HU any more."""
    first = group[0]
    (image,) = first.images.values()
    pixels = np.round(np.clip(window.apply(image.pixels, *view), 0, 1) * 255).astype(np.uint8)
    made = Image(image.id, pixels, image.spacing, image.modality, "uint8", {k: v for k, v in image.info.items() if k == "affine"})
    return [replace(s, id=f"{s.id}!", images={made.id: made}, meta={**s.meta, "row": f"{s.meta['row']}!"}) for s in group]


def _mirrored(talks: list[Sample]) -> Iterator[Sample]:
    """The twins of what stays true in a mirror, as another picture."""
    for s in talks:
        try:
            twin = mirror.mirror(s)
        except ModelError as error:
            if error.code != "FLIP_REFUSED":
                raise
            continue
        yield replace(twin, id=f"{s.id}~", meta={**twin.meta, "row": f"{s.meta['row']}~"})


def _conversations(group: list[Sample], complete: bool = False) -> Iterator[Sample]:
    """All that is known of one picture. complete: whatever of ``CT`` is not outlined is not there."""
    image = next(iter(group[0].images.values()))
    modality, xray = image.modality, image.modality == "xray"
    case = facts.case_of(group)
    lot = np.random.default_rng(int.from_bytes(hashlib.sha256(case.name.encode()).digest()[:8]))
    far = ELSEWHERE.get(modality, ())
    some = [far[i] for i in lot.permutation(len(far))[:ABSENT]]
    lacking = (*some, *(CT if complete and modality == "ct" else ()))
    targets = tuple(dict.fromkeys((*OUTLINED.get(modality, ()), *some)))
    said = instruct.conversations(group, targets, FINDINGS if xray else (), kinds=KINDS, annotated=instruct.ANNOTATED if xray else (), absent=lacking, variety=0.3)
    labels = _whole(case)
    cells = tuple(replace(r, label=word(r.label)) for r in group[0].regions if word(r.label) in CELLS)
    talks = sorted([*said, *_side(case)], key=lambda s: s.meta["kind"] == "segment")  # boxes stand with a question that asks for no outline
    for number, s in enumerate(talks):
        s = replace(s, labels={k: v for k, v in s.labels.items() if ":" not in k} | labels)
        if s.meta["kind"] == "asked":
            s = replace(s, turns=(s.turns[0], Turn("assistant", s.answer.strip().lower())))
        if number == 0 and s.meta["kind"] != "segment" and modality == "pathology":  # tissue holds none of a smear's cells
            s = replace(s, regions=cells, meta={**s.meta, "boxed": True})
        yield s


def _whole(case: facts.Case) -> dict[str, float]:
    """{"modality:ct": 1, ...}: what is known of the picture as a whole."""
    known = {"modality": case.image.modality, "view": facts.view(case), "plane": facts.plane(case) or _plane_told(case), "part": facts.part(case),
             "eye": _eye(case)}  # fmt: skip
    return {f"{group}:{name}": 1.0 for group, name in known.items() if name in GROUPS[group]}


def _plane_told(case: facts.Case) -> str | None:
    """The plane that an answer names."""
    for s in case.questions:
        if re.search(r"\bplane\b", s.question, re.I) and (found := [p for p in GROUPS["plane"] if re.search(rf"\b{p}\b", s.answer, re.I)]) and len(found) == 1:
            return found[0]
    return None


def _eye(case: facts.Case) -> str | None:
    said = (case.base.meta.get("labels") or {}).get("eye") if case.image.modality == "fundus" else None
    return said if said in GROUPS["eye"] else None


def _side(case: facts.Case) -> Iterator[Sample]:
    """Of a fundus photograph, whose eye it is."""
    if (eye := _eye(case)) is not None:
        base = Sample(case.name, case.base.patient, case.base.images, meta={"row": case.row, "split": case.base.meta.get("split"), "kind": "view"})
        asked = [("Is this the right or the left eye?", eye), ("Which eye is this?", f"the {eye} eye"),
                 *((f"Is this the {side} eye?", "yes" if side == eye else "no") for side in GROUPS["eye"])]  # fmt: skip
        for number, (question, answer) in enumerate(asked):
            yield replace(base, id=f"{case.name}#eye{number}", turns=(Turn("user", question), Turn("assistant", answer)))


def _joined(group: list[Sample]) -> tuple[list[Sample], bool]:
    """A volume with its outlines by the names of ``TARGETS``: lobes make a lung, vertebrae and ribs bone, and what is denser than air the body; and whether
    its label map is complete."""
    first, masks = group[0], [m for s in group for m in s.masks]
    volume = next(iter(first.images.values()))
    joined: dict[str, np.ndarray] = {}
    for m in masks:
        side = re.search(r"left|right", m.label)
        name = "bone" if BONES.match(m.label) else f"{side[0]} lung" if side and m.label.startswith("lung_") else spoken(m.label)
        joined[name] = joined[name] | m.array if name in joined else m.array
    complete = len(masks) >= COMPLETE and (bool(first.meta.get("synthetic")) or len(joined.keys() & set(CT)) >= COMPLETE)
    if volume.unit == "HU":
        joined["body"] = _body(volume.voxels[0])
    base = replace(first, masks=(), turns=(), regions=())
    return [base, *(replace(base, id=f"{first.id}/{n}", masks=(Mask(volume.id, n, a),)) for n, a in joined.items())], complete


def _body(hu: np.ndarray) -> np.ndarray:
    """The largest piece denser than -300 HU once the couch is cut off, with its hollows."""
    from scipy.ndimage import binary_fill_holes, binary_opening, label

    numbered, _ = label(binary_opening(hu > -300, iterations=1))
    body = numbered == np.bincount(numbered.ravel())[1:].argmax() + 1 if numbered.any() else numbered > 0
    for axis in range(3):
        body = np.moveaxis(np.stack([binary_fill_holes(x) for x in np.moveaxis(body, axis, 0)]), 0, axis)
    return body


def calibrate(model, tokenizer, val: list[Sample]) -> dict:
    """Fit the probabilities on the real pictures of val: findings, yes/no answers, and the presence of an outline in each kind of picture. One
    scale and shift each: of vessels, which every photograph shows, and of organs, which few slices show, one alone would be wrong of both.

    Gives, for each, the number of pairs and the mean log loss before and after.
    """
    import torch

    from ..evaluate.statistics import fit_platt
    from ..predictors.native import NativeModel, choices_of

    reader = NativeModel(model, tokenizer)
    head = model.heads["classify"]
    pairs: dict[str, list[tuple[float, float]]] = {"findings": [], "yes_no": [], **{f"present:{modality}": [] for modality in OUTLINED}}
    patients: dict[str, set[str]] = {kind: set() for kind in pairs}
    rows: dict[str, list[Sample]] = {}
    for sample in val:
        if sample.images and "," not in str(sample.meta["row"]) and not str(sample.meta["row"]).startswith("phantom"):
            rows.setdefault(str(sample.meta["row"]), []).append(sample)
    for group in rows.values():
        (picture,) = group[0].images.values()
        name, features, *_ = reader._look(picture)
        with torch.no_grad():
            logits = head(features[name])[0].tolist()
        pairs["findings"] += [(logits[head.labels.index(k)], v) for k, v in group[0].labels.items() if k in FINDINGS]
        drawn = [s for s in group if s.meta["kind"] == "segment" and (s.masks or s.regions)[0].label in model.config.about["outlined"].get(picture.modality, ())]  # others need no scale
        for sample, found in zip(drawn, reader.presence(picture, [(s.masks or s.regions)[0].label for s in drawn]) if drawn else ()):
            truth = float(bool(sample.regions and not sample.masks) or sample.masks[0].array.any())
            patients[f"present:{picture.modality}"].add(group[0].patient or str(group[0].meta["row"]))
            pairs[f"present:{picture.modality}"].append((math.log(max(found, 1e-6) / max(1 - found, 1e-6)), truth))
        for sample in group:
            if sample.meta["kind"] == "asked" and sample.answer in ("yes", "no") and choices_of(sample.question) == ("yes", "no"):
                yes = reader.choose(picture, sample.question, ("yes", "no"))["yes"]
                pairs["yes_no"].append((math.log(max(yes, 1e-6) / max(1 - yes, 1e-6)), float(sample.answer == "yes")))
    report = {}
    for kind, found in pairs.items():
        z, y = (np.array(column) for column in zip(*found)) if found else (np.zeros(0), np.zeros(0))
        few = kind.startswith("present") and len(patients[kind]) < PATIENTS
        scale, shift = (1.0, 0.0) if few else fit_platt(z, y, share=YES if kind == "yes_no" else None)
        loss = [float((np.logaddexp(0, a) - a * y).mean()) if len(y) else None for a in (z, z * scale + shift)]
        report[kind] = {"pairs": len(y), "scale": scale, "shift": shift, "log_loss": loss}
    grouped = {n for g in head.groups for n in g}
    for i, label in enumerate(head.labels):
        if label not in grouped:
            head.scale[i], head.shift[i] = report["findings"]["scale"], report["findings"]["shift"]
    fitted = {kind: [found["scale"], found["shift"]] for kind, found in report.items()}
    model.config.about = {**model.config.about, "calibration": {"yes_no": fitted["yes_no"], "present": {m: fitted[f"present:{m}"] for m in OUTLINED}}}
    return report


SEEING = {"encoders.picture.*": 1.0, "heads.mask.ladder.*": 1.0, "heads.mask.dense.*": 1.0, "heads.classify.*": 1.0, "heads.box.*": 1.0}
SPEAKING = {"projectors.*": 1.0, "lm.*": 1.0, "heads.mask.*": 1.0, "heads.mask.ladder.*": 0.0, "heads.mask.dense.*": 0.0}
"""What is seen stays as it was learnt: a few hundred conversations would only blur it."""
MADE = {"phantom_chest_ct": 0.5, "phantom_abdomen_ct": 0.9, "phantom_head_ct": 0.3, "phantom_abdomen_mr": 0.3, "phantom_head_mr": 0.3, "phantom_fundus": 0.7}
OUTLINES = {"xray_covid": 1.5, "xray_covid/outlined": 3.0, "phantom_films": 1.5, "fundus_chase": 0.8, "fundus_chase/windows": 4.0, "path_bccd": 1.5,
            "path_dsb_nuclei": 0.3, "path_dsb_nuclei/windows": 4.0, "vol_totalseg": 1.5, "vol_deeplesion": 0.3, "vqa_rad": 1.5, **MADE}  # fmt: skip
CLOSER = {**OUTLINES, "xray_covid/outlined": 4.0, "fundus_chase/windows": 6.0, "path_dsb_nuclei/windows": 6.0}
"""What real photographs, slides and films outline is learnt last."""
ANSWERS = {"xray_covid": 3.0, "xray_covid/outlined": 2.0, "phantom_films": 1.5, "fundus_chase": 0.7, "fundus_chase/windows": 1.0, "path_bccd": 0.8,
           "path_dsb_nuclei": 0.5, "path_dsb_nuclei/windows": 1.0, "vol_totalseg": 0.8, "vol_deeplesion": 0.3, "vqa_rad": 6.0, **MADE, "report_iu": 3.0}  # fmt: skip
RECIPE = Recipe(
    name="medvlm_tiny",
    source="this project; mask tokens after LISA (arXiv:2308.00692), decoder of Segment Anything (arXiv:2304.02643), ladder after U-Net (arXiv:1505.04597)",
    departs="no pretrained weights: every part starts from random numbers",
    model=model,
    samples=samples,
    tokenizer=towers.vocabulary,
    stages=(
        Stage("glance", "outline+classify+box", SEEING, {k: v for k, v in OUTLINES.items() if "/windows" not in k}, lr=2e-3, steps=3000, batch=16, turns=0, halved=1.0,
              augment=1.0, warmup=100, every=1500),
        Stage("see", "outline+classify+box", SEEING, OUTLINES, lr=2e-3, steps=2200, batch=16, turns=0, augment=1.0, warmup=100, every=1100),
        Stage("look", "outline+classify+box", SEEING, CLOSER, lr=1e-3, steps=1700, batch=16, turns=0, augment=1.0, warmup=50, every=850),
        Stage("speak", "lm+mask", SPEAKING, ANSWERS, lr=1e-3, steps=600, batch=12, turns=4, augment=0.8, warmup=50, every=300,
              kinds={"segment": 4.0, "asked": 3.0, "finding": 1.5, "describe": 0.7, "modality": 0.7, "view": 0.7, "plane": 0.5, "organ": 0.7, "abnormal": 0.5,
                     "count": 0.3, "facts": 0.3, "text": 1.0}),
        Stage("match", "clip", {"encoders.text.*": 1.0, "heads.contrast.*": 1.0}, {k: v for k, v in OUTLINES.items() if "/" not in k}, lr=1e-3, steps=120,
              batch=64, turns=0, augment=0.5, warmup=20, every=60),
    ),
    tasks=("segment", "vqa", "probe", "ground", "retrieve_facts"),
    finish=calibrate,
)  # fmt: skip
