"""What goes into a model and what comes out, as plain data without torch.

Points and boxes are index order ((d,) h, w); boxes are half-open [lower, upper).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError
from .imaging.scan import Image, Volume

NOTICE = "Research use only. Not a medical device; not for diagnosis."
SEG = "<|seg|>"
"""In an answer: a mask is meant here."""
IMAGE_MARK = "<|image:{}|>"
"""Where an image stands in the text of a turn; an image without a mark stands before the first turn."""
MARKED = re.compile(re.escape(IMAGE_MARK).replace(r"\{\}", "(.+?)"))
"""Finds those marks; its group is the image's id."""


@dataclass(frozen=True)
class Turn:
    """One message. role: "user", "assistant" or "system"."""

    role: str
    text: str


@dataclass(frozen=True, eq=False)
class Mask:
    """A target outlined on one image.

    array: bool, the image's (H, W) or (D, H, W). An all-false array says that the target is absent.
    count: how many things of that name it outlines together, None where nobody counted.
    """

    image: str
    label: str
    array: np.ndarray
    count: int | None = None


@dataclass(frozen=True, eq=False)
class Region:
    """A place on one image. box: (lower, upper) index corners, half-open. probability: that the label is there."""

    image: str
    label: str
    box: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    mask: np.ndarray | None = None
    probability: float | None = None

    def to_json(self, mask_path: str | None = None) -> dict[str, Any]:
        lower, upper = self.box if self.box else ([], [])
        return {
            "image": self.image, "label": self.label, "probability": rounded(self.probability),
            "lower": [rounded(x, 2) for x in lower], "upper": [rounded(x, 2) for x in upper], "mask": mask_path,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sample:
    """One example to train on or to answer.

    images: {id: Image | Volume}. turns: the conversation; the last assistant turn is the target.
    labels: {finding: 1 present | 0 absent | NaN not labelled}. choices: the answers to pick from, or None when free.
    group: samples that are scored together (a probe and its adversarial twin). meta: everything else the source says.
    verb: what a model is asked to do with it: "ask", "report", "segment", "ground", "classify" (its ``choices``) or "embed"
    (its images, and its answer as text); None for what it holds: segment where there are masks, else ask.
    """

    id: str
    patient: str | None = None
    images: Mapping[str, Image | Volume] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()
    masks: tuple[Mask, ...] = ()
    regions: tuple[Region, ...] = ()
    labels: Mapping[str, float] = field(default_factory=dict)
    choices: tuple[str, ...] | None = None
    group: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    verb: str | None = None

    @property
    def question(self) -> str:
        """The text of the last user turn, "" when there is none."""
        return next((t.text for t in reversed(self.turns) if t.role == "user"), "")

    @property
    def answer(self) -> str | None:
        """The text of the last assistant turn, None when there is none."""
        return next((t.text for t in reversed(self.turns) if t.role == "assistant"), None)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model said of one sample. A failure is a row with ``error`` ("CODE: text"), never a missing row.

    vectors: {"image": (D,), "text": (D,)} of unit length, where the sample was to be embedded.
    """

    id: str
    text: str = ""
    probability: float | None = None
    choices: Mapping[str, float] | None = None
    regions: tuple[Region, ...] = ()
    masks: tuple[Mask, ...] = ()
    seconds: float = 0.0
    error: str | None = None
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Answer:
    """text; probability that the text is right by the model's own account, NaN where it gives none; choices {answer: p}
    for closed questions."""

    text: str
    probability: float
    choices: Mapping[str, float] | None = None
    regions: tuple[Region, ...] = ()

    def to_json(self, question: str) -> dict[str, Any]:
        return {
            "question": question, "text": self.text, "probability": rounded(self.probability),
            "choices": None if self.choices is None else {k: rounded(v) for k, v in self.choices.items()},
            "regions": [r.to_json() for r in self.regions],
        }  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    name: str
    value: float
    unit: str


@dataclass(frozen=True, eq=False)
class Finding:
    """One thing that was looked for. probability: calibrated chance that it is present."""

    label: str
    present: bool
    probability: float
    regions: tuple[Region, ...] = ()
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True, eq=False)
class Sentence:
    """One sentence of a report and the places it rests on. findings: index into the report's ``looked_for``."""

    text: str
    regions: tuple[Region, ...] = ()
    section: str = "findings"
    findings: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Report:
    """findings, impression: the text of each section; sentences: the same, one by one, each with its regions."""

    sentences: tuple[Sentence, ...] = ()
    looked_for: tuple[Finding, ...] = ()
    out_of_scope: str | None = None
    notice: str = NOTICE

    def section(self, name: str) -> str:
        return " ".join(s.text for s in self.sentences if s.section == name)

    @property
    def findings(self) -> str:
        return self.section("findings")

    @property
    def impression(self) -> str:
        return self.section("impression")

    def __str__(self) -> str:
        if self.out_of_scope:
            return f"No reading: {self.out_of_scope}\n{self.notice}"
        return f"FINDINGS: {self.findings}\nIMPRESSION: {self.impression}\n{self.notice}"


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The outline of one target on the image's own grid.

    image: the Image or Volume it lies on. mask: bool (H, W) or (D, H, W), all false when the target is absent.
    present: calibrated probability that the named target is there at all; for points and boxes, which say that
    something is there, 1.0, or 0.0 where nothing was drawn.
    """

    image: Image | Volume
    label: str
    mask: np.ndarray
    present: float

    @property
    def region(self) -> Region:
        return Region(self.image.id, self.label, box_of(self.mask), self.mask, self.present)

    def save(self, path: str | Path) -> Path:
        """Write .nii/.nii.gz (on the image's own grid), .dcm (DICOM SEG, of an image that was DICOM) or .png (2-D: the mask;
        ``overlay*.png``: the picture with the outline)."""
        from .imaging import export

        path = Path(path)
        if path.name.endswith((".nii", ".nii.gz")):
            return export.save_mask_nifti(self.image, self.mask, path)
        if path.suffix == ".dcm":
            from .imaging.seg import save_seg

            save_seg(self.image, {self.label: self.mask}, path)
            return path
        if path.suffix == ".png" and path.name.startswith("overlay"):
            return export.save_preview(self.image, [self.region], [], path)
        if path.suffix == ".png":
            return export.save_mask_png(self.mask, path)
        raise UsageError(f"cannot save a segmentation as {path.suffix or 'a file without extension'}", "BAD_ARGUMENT",
                         "use .nii.gz, .nii, .dcm (DICOM SEG), .png (the mask) or overlay.png (the picture with its outline)")  # fmt: skip


def box_of(mask: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Half-open index box around the true voxels, None when there are none."""
    rows = np.flatnonzero(mask.any(axis=tuple(range(1, mask.ndim))))
    if not len(rows):
        return None
    first, last = int(rows[0]), int(rows[-1]) + 1
    if mask.ndim == 1:
        return (first,), (last,)
    lower, upper = box_of(mask[first:last].any(axis=0))
    return (first, *lower), (last, *upper)


def rounded(value: float | None, digits: int = 4) -> float | None:
    """For JSON: finite floats rounded, NaN and infinity as null."""
    return None if value is None or not math.isfinite(value) else round(float(value), digits)
