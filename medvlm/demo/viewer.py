"""A study as the page shows it: one slice with its overlays, the findings, sentences and answers, all as escaped HTML.

Volumes are turned so that a radiologist reads them: axial with the patient's right on the left of the screen, coronal the
same, sagittal with anterior on the left. Edge letters are drawn only where the file says how the patient lies. A picture
that does not say gets none, not even a frontal chest film: a mirrored file exists, and a wrong R is worse than no R.
"""

from __future__ import annotations

import base64
import html
import io
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..imaging import window
from ..imaging.export import COLOURS
from ..imaging.scan import OPPOSITE, READ_AS, Image, Study, Volume, edges
from ..sample import Answer, Report

FILE_WINDOW = "of the file"
UNKNOWN = "kind not stated"
LONGEST = 1000
"""Pixels of the longer side of an overlay; the picture itself is sent as it is stored up to ``LARGEST``."""
LARGEST = 2000
FRONTAL = {"PA", "AP"}


def text(value: Any) -> str:
    """Any text made harmless inside the page, without the places where uploads lie.

    Braces, dollars and back quotes too: the page's template language gives them a meaning.

    >>> text("<b> {{x}} ${y}")
    '&lt;b&gt; &#123;&#123;x&#125;&#125; &#36;&#123;y&#125;'
    """
    upload = re.escape(tempfile.gettempdir()) + r"[/\\]medvlm-[\w/\\.-]*"
    plain = "".join(c if c.isprintable() else " " for c in re.sub(upload, "the upload", str(value)))
    return html.escape(plain).translate({ord(c): f"&#{ord(c)};" for c in "{}$`"})


def kind(image: Image | Volume) -> str:
    return UNKNOWN if image.modality == "unknown" else image.modality


class Scene:
    """An image turned for the screen.

    slices: how many; 1 for a picture. letters: (left, right, top, bottom) of the screen, or None where unknown.
    """

    def __init__(self, image: Image | Volume):
        self.image = image
        self.volume = image.reorient(READ_AS[image.orientation[0]]) if isinstance(image, Volume) else None
        self.slices = self.volume.shape[1] if self.volume else 1
        affine = self.volume.affine if self.volume else image.info.get("affine")
        self.letters = None if affine is None else edges(affine)
        self.presets = (FILE_WINDOW, *window.PRESETS) if image.unit == "HU" else (FILE_WINDOW,)
        self._shown: np.ndarray | None = None

    @property
    def size(self) -> tuple[float, float]:
        """Height and width in mm, or in pixels where the spacing is not known."""
        shape, spacing = (self.volume or self.image).shape[-2:], (self.volume or self.image).spacing
        high, wide = spacing[-2:] if spacing else (1.0, 1.0)
        return shape[0] * high, shape[1] * wide

    def grey(self, at: int, preset: str = FILE_WINDOW, invert: bool = False) -> np.ndarray:
        """uint8 (H, W) or (H, W, 3) of one slice."""
        info = self.image.info
        if preset in self.presets and preset != FILE_WINDOW:
            shown = window.show(self._stored(at), {**info, "voi_lut": None, "voi_function": "linear", "windows": [window.PRESETS[preset]]})
        elif self.volume is None or info.get("windows") or info.get("voi_lut") or self.volume.dtype == np.uint8:
            shown = window.show(self._stored(at), info)
        else:  # without a window of the file, one for all slices: they must not flicker
            if self._shown is None:
                self._shown = window.display(self.volume)
            shown = self._shown[at]
        return 255 - shown if invert and shown.ndim == 2 else shown

    def _stored(self, at: int) -> np.ndarray:
        return self.image.pixels if self.volume is None else self.volume.voxels[:, at]

    def masks(self, regions: Sequence) -> np.ndarray:
        """bool (slices, H, W) of all regions together, on the screen's slices; a box counts as what it encloses."""
        shape = self.image.shape[1:]
        whole = np.zeros(shape, bool)
        for region in regions:
            if region.mask is not None:
                whole |= np.asarray(region.mask, bool)
            elif region.box:
                whole[tuple(slice(max(0, round(a)), max(0, round(b))) for a, b in zip(*region.box))] = True
        if self.volume is None:
            return whole[None]
        return self.image.with_voxels(whole[None]).reorient(self.volume.orientation).voxels[0]

    def place(self, at: int) -> str:
        """Where a slice lies: 'slice 3 of 40, I 12.5 mm' is 12.5 mm to the feet of the origin."""
        if self.volume is None:
            return ""
        x, y, z = self.volume.world((at, *((n - 1) / 2 for n in self.volume.shape[2:])))
        letter, value = {"S": ("S", z), "P": ("P", y), "L": ("L", x)}[self.volume.orientation[0]]
        return f"slice {at + 1} of {self.slices}, {letter if value >= 0 else OPPOSITE[letter]} {abs(value):.1f} mm"

    def window_of(self, preset: str) -> str:
        """The window in words: 'C 40 W 400', '' where the picture has none."""
        chosen = window.PRESETS.get(preset) if preset in self.presets else None
        chosen = chosen or next(iter(self.image.info.get("windows") or ()), None)
        return "" if chosen is None or not self.image.shape[0] == 1 else f"C {chosen[0]:g} W {chosen[1]:g}"


def stage(scene: Scene | None, at: int, preset: str, invert: bool, drawn: Sequence[tuple[str, np.ndarray]], opacity: float, fill: bool) -> str:
    """The picture with its overlays. drawn: (colour, (slices, H, W) mask) in the order they are painted."""
    if scene is None:
        return '<div class="mv-empty">No study is open. Open your own files: DICOM, zip, NIfTI, PNG, JPEG or TIFF.</div>'
    at = min(max(int(at), 0), scene.slices - 1)
    high, wide = scene.size
    grey = scene.grey(at, preset, invert)
    layers = f'<img class="mv-base" alt="image {text(scene.image.id)}" src="{_png(_limited(grey))}">'
    if any(mask[at].any() for _, mask in drawn):
        layers += f'<img class="mv-over" alt="overlays" src="{_png(paint([(c, m[at]) for c, m in drawn], (high, wide), opacity, fill))}">'
    for side, letter in zip(("left", "right", "top", "bottom"), scene.letters or ()):
        layers += f'<span class="mv-edge mv-{side}">{letter}</span>'
    corner = [scene.image.id, kind(scene.image), scene.place(at), scene.window_of(preset), "inverted" if invert else ""]
    layers += f'<span class="mv-corner">{"<br>".join(text(t) for t in corner if t)}</span>'
    ratio = wide / high
    return (f'<div class="mv-stage" tabindex="0" data-at="{at}" data-count="{scene.slices}"><div class="mv-picture" '
            f'style="aspect-ratio:{ratio:.5f};width:min(100%,calc(60vh * {ratio:.5f}))">{layers}</div></div>')  # fmt: skip


def paint(masks: Sequence[tuple[str, np.ndarray]], size: tuple[float, float], opacity: float, fill: bool) -> np.ndarray:
    """uint8 (H, W, 4) overlay in true proportions; outlines, and with ``fill`` their inside at less than half the opacity."""
    from PIL import Image as Picture
    from scipy.ndimage import binary_erosion

    factor = LONGEST / max(size)
    high, wide = (max(1, round(s * factor)) for s in size)
    ink, cover = np.zeros((high, wide, 3), np.float32), np.zeros((high, wide, 1), np.float32)
    edges = []
    for colour, mask in masks:
        smooth = Picture.fromarray(mask.astype(np.uint8) * 255).resize((wide, high), Picture.Resampling.BILINEAR)
        inside = np.asarray(smooth) > 127
        rgb = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8)
        edges.append((rgb, inside & ~binary_erosion(inside, iterations=3, border_value=0)))
        if fill:  # where two overlap both are seen through each other
            here = 0.45 * opacity * inside[..., None]
            ink, cover = rgb * here + ink * (1 - here), here + cover * (1 - here)
    over = np.concatenate([ink / np.maximum(cover, 1e-6), 255 * cover], axis=-1).round().astype(np.uint8)
    for rgb, edge in edges:
        over[edge] = (*rgb, round(255 * opacity))
    return over


def _limited(shown: np.ndarray) -> np.ndarray:
    from PIL import Image as Picture

    step = max(shown.shape[:2]) / LARGEST
    if step <= 1:
        return shown
    return np.asarray(Picture.fromarray(shown).resize((max(1, round(shown.shape[1] / step)), max(1, round(shown.shape[0] / step))), Picture.Resampling.BOX))


def _png(array: np.ndarray) -> str:
    """A data URI: pixels of a patient get neither a file nor an address."""
    from PIL import Image as Picture

    packed = io.BytesIO()
    Picture.fromarray(array).save(packed, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()


def state_of(finding) -> str:
    """'present', 'possible' or 'absent', by the limits that the sentences of a report use."""
    from ..predictors.native import POSSIBLE

    if POSSIBLE[0] <= finding.probability < POSSIBLE[1]:
        return "possible"
    return "present" if finding.present else "absent"


def colours(labels: Sequence[str]) -> dict[str, str]:
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}


def findings_table(report: Report, colour: dict[str, str], chosen: str) -> str:
    """One row a finding, the likeliest first; a click on a row (data-pick) shows where."""
    rows = []
    order = {"present": 0, "possible": 1, "absent": 2}
    listed = sorted(enumerate(report.looked_for), key=lambda p: (order[state_of(p[1])], -p[1].probability))
    for k, f in listed:
        state, chance = state_of(f), f"{f.probability:.0%}"
        measured = "".join(f'<div class="mv-note">{text(m.name)} {m.value:.3g}{"" if m.unit == "1" else " " + text(m.unit)}</div>' for m in f.measurements)
        rows.append(
            f'<tr class="mv-pick mv-{state}{" mv-chosen" if chosen == f"f{k}" else ""}" tabindex="0" data-pick="f{k}">'
            f"<td>{text(f.label)}{measured}</td>"
            f'<td class="mv-chance"><span class="mv-bar"><i style="width:{chance}"></i></span>{chance}</td>'
            f'<td><span class="mv-chip mv-{state}">{state}</span></td><td>{_places(f.regions, colour)}</td></tr>'
        )
    if not rows:
        return '<div class="mv-note">The model looked for nothing in this image.</div>'
    return f'<table class="mv-table"><thead><tr><th>Finding</th><th>Probability</th><th></th><th>Looked at</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'


def sentence_list(report: Report, colour: dict[str, str], chosen: str) -> str:
    """The draft report; each sentence is a button that shows what it rests on."""
    parts = []
    for section in dict.fromkeys(s.section for s in report.sentences):
        parts.append(f"<h4>{text(section.capitalize())}</h4>")
        for k, s in enumerate(report.sentences):
            if s.section == section:
                places = _places(s.regions, colour) if s.regions else '<span class="mv-note">no place given</span>'
                mark = " mv-chosen" if chosen == f"s{k}" else ""
                parts.append(f'<div class="mv-pick mv-sentence{mark}" tabindex="0" role="button" data-pick="s{k}"><span>{text(s.text)}</span><span>{places}</span></div>')
    return "".join(parts) or '<div class="mv-note">The model wrote no report.</div>'


def answer_list(asked: Sequence[tuple[str, Answer | str]], colour: dict[str, str], chosen: str) -> str:
    """Questions and answers, the latest first; an error stands in its answer's place."""
    parts = []
    for k, (question, answer) in reversed(list(enumerate(asked))):
        if isinstance(answer, str):
            said, pick = f'<div class="mv-error">{text(answer)}</div>', ""
        else:
            others = "" if not answer.choices else ", ".join(f"{text(c)} {p:.0%}" for c, p in answer.choices.items())
            said = (f'<div><b>{text(answer.text)}</b> <span class="mv-chip">{answer.probability:.0%}</span> '
                    f'{_places(answer.regions, colour)}</div><div class="mv-note">{others}</div>')  # fmt: skip
            pick = f' mv-pick" tabindex="0" role="button" data-pick="a{k}' if answer.regions else ""
        parts.append(f'<div class="mv-answer{" mv-chosen" if chosen == f"a{k}" else ""}{pick}"><div class="mv-question">{text(question)}</div>{said}</div>')
    return "".join(parts)


def about_study(study: Study, image: Image | Volume) -> str:
    """What is in the study, in numbers from the header; no free text of it."""
    rows = []
    for i in study.images:
        spacing = "unknown" if i.spacing is None else " × ".join(f"{s:.4g}" for s in i.spacing) + " mm"
        lies = i.orientation if isinstance(i, Volume) else ""
        mark = ' class="mv-chosen"' if i is image else ""
        cells = (i.id, kind(i), " × ".join(map(str, i.shape[1:])), spacing, lies, i.unit)
        rows.append(f"<tr{mark}>" + "".join(f"<td>{text(c)}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("Image", "Kind", "Size", "Spacing", "Axes", "Values"))
    return f'<div class="mv-note">{text(study.id)}</div><table class="mv-table"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def notes(study: Study, scene: Scene) -> str:
    """Warnings of the study, and what is said about left and right where the file does not say."""
    lines = [text(w) for w in study.warnings]
    view = str(scene.image.info.get("view") or "").upper()
    if scene.letters is None and view in FRONTAL:
        lines.append(f"Sides: the file names a frontal view ({view}); by convention the patient's right is on the left of the screen. Trust the marker in the picture.")
    elif scene.letters is None and scene.image.modality in ("xray", "unknown"):
        lines.append("Sides: the file does not say which side is which; trust the marker in the picture.")
    return "".join(f'<div class="mv-warning">{line}</div>' for line in lines)


def alarm(line: str, kind: str = "error") -> str:
    """One line that cannot be overlooked; '' clears it."""
    return f'<div class="mv-{kind}" role="alert">{text(line)}</div>' if line else ""


def _places(regions: Sequence, colour: dict[str, str]) -> str:
    labels = dict.fromkeys(r.label for r in regions)
    return " ".join(f'<span class="mv-place"><i style="background:{colour.get(x, "#888")}"></i>{text(x)}</span>' for x in labels)
