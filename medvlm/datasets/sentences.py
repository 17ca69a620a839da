"""How a finding is put into words, and whether a sentence says it; how a box is put into words, and which ones a text says.

The language model is trained to write the sentences of a short structured report from a finding, its state and its side;
every sentence that it writes is checked against the same finding before anybody reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ..errors import UsageError

STATES = ("present", "possible", "absent")
SIDES = {"right": "on the right", "left": "on the left", "both": "on both sides"}


def prompt(label: str, state: str, side: str | None = None) -> str:
    """What the language model is asked, e.g. "Describe: pleural effusion, present, left"."""
    return "Describe: " + ", ".join([label, state, *([side] if side else [])])


def variants(label: str, state: str, side: str | None = None) -> list[str]:
    """Sentences that say it, the plainest first. side: "right", "left", "both" of the patient, or None."""
    if state not in STATES or side not in (None, *SIDES):
        raise ValueError(f"state {state!r} or side {side!r} is not one of {STATES} and {tuple(SIDES)}")
    if state == "absent":
        return [f"No {label}.", f"There is no {label}.", f"No {label} is seen."]
    where = f" {SIDES[side]}" if side else ""
    capital = label[0].upper() + label[1:]
    if state == "possible":
        return [f"Possible {label}{where}.", f"There may be {label}{where}."]
    return [f"{capital}{where}.", f"There is {label}{where}.", f"{capital} is seen{where}."]


def says(sentence: str, label: str, state: str, side: str | None = None) -> bool:
    """True when the sentence is one of those that say it; a rewording may hide a second negation or another side."""
    return sentence in variants(label, state, side)


def denies(sentence: str) -> bool:
    """True for a sentence of :func:`variants` that says "absent"."""
    return bool(re.match(r"(No|There is no) ", sentence))


BOX_STYLES = {"qwen3": 1000, "qwen2.5": None, "paligemma": 1023}
"""Language models' ways to write a box -> what the far edge of the picture is called; None: its size in pixels.

Sources: qwen3, thousandths: QwenLM/Qwen3-VL, cookbooks/2d_grounding.ipynb. qwen2.5, pixels of the picture as its processor
has resized it: QwenLM/Qwen3-VL, issue 940. paligemma, 1024 location tokens, (y, x): google-research/big_vision,
pp/proj/paligemma/segmentation.py (bins) and evaluators/proj/paligemma/transfers/segmentation.py (back).
"""
_OBJECT = re.compile(r"\{[^{}]*\}")
_CORNERS = re.compile(r"""["']bbox_2d["']\s*:\s*\[\s*(-?\d+(?:\.\d+)?)""" + r"\s*,\s*(-?\d+(?:\.\d+)?)" * 3 + r"\s*,?\s*\]")
_LABEL = re.compile(r"""["']label["']\s*:\s*("(?:[^"\\]|\\.)*"|'[^']*')""")
_LOCATIONS = re.compile(r"(?<!<loc\d{4}>)" + r"<loc(\d{4})>" * 4 + r"(?!<loc)((?:<seg\d{3}>)*)([^<;]*)")

Box = tuple[tuple[float, float], tuple[float, float]]


def box_text(box: Box, size: Sequence[int], label: str = "", style: str = "qwen3") -> str:
    """A box as a language model writes it, e.g. {"bbox_2d": [x1, y1, x2, y2], "label": "nodule"}.

    Args:
        box: lower and upper corner (h, w) in pixels, half-open, inside the picture.
        size: (H, W) of the picture the box lies in; for qwen2.5 the picture as its processor has resized it.
        style: one of ``BOX_STYLES``. A side thinner than one step of it is written one step long.

    Raises:
        UsageError: BAD_ARGUMENT for a box that is empty or not inside the picture, or for another style.
    """
    steps = _steps(style, size)
    corners = [(float(a), float(b)) for a, b in zip(*box)]
    if len(corners) != 2 or not all(0 <= a < b <= n for (a, b), n in zip(corners, size)):
        raise UsageError(f"the box {box} is not a box inside a picture of {tuple(size)}", "BAD_ARGUMENT", "give ((h, w), (h, w)) in pixels, half-open")
    (top, bottom), (left, right) = (_written(a / n, b / n, step) for (a, b), n, step in zip(corners, size, steps))
    if style == "paligemma":
        return "".join(f"<loc{v:04d}>" for v in (top, left, bottom, right)) + (f" {label}" if label else "")
    return json.dumps({"bbox_2d": [left, top, right, bottom], **({"label": label} if label else {})}, ensure_ascii=False)


def boxes_in(text: str, size: Sequence[int], style: str = "qwen3") -> list[tuple[Box, str]]:
    """The boxes that a language model's text says, each with its label ("" without one), in pixels of a picture of ``size``.

    Half-written, empty and reversed boxes, and those that leave the picture, are left out; none is mended.
    """
    steps, found = _steps(style, size), []
    if style == "paligemma":
        for match in _LOCATIONS.finditer(text):
            found.append((*(int(v) for v in match.groups()[:4]), match.group(6).strip()))
    else:
        for match in _OBJECT.finditer(text):
            if corners := _CORNERS.search(match.group()):
                left, top, right, bottom = map(float, corners.groups())
                label = _LABEL.search(match.group())
                found.append((top, left, bottom, right, _unquoted(label.group(1)) if label else ""))
    inside = [f for f in found if 0 <= f[0] < f[2] <= steps[0] and 0 <= f[1] < f[3] <= steps[1]]
    (height, width), (rows, columns) = size, steps
    return [(((t * height / rows, l * width / columns), (b * height / rows, r * width / columns)), label) for t, l, b, r, label in inside]


def _steps(style: str, size: Sequence[int]) -> tuple[int, int]:
    if style not in BOX_STYLES:
        raise UsageError(f"there is no box style {style!r}; there are: {', '.join(BOX_STYLES)}", "BAD_ARGUMENT")
    if len(size) != 2 or min(size) < 1:
        raise UsageError(f"boxes are written of pictures (H, W), not of {tuple(size)}", "BAD_ARGUMENT")
    far = BOX_STYLES[style]
    return tuple(size) if far is None else (far, far)


def _written(lower: float, upper: float, step: int) -> tuple[int, int]:
    a, b = round(lower * step), round(upper * step)
    if a == b:  # thinner than one step
        a = min(int((lower + upper) / 2 * step), step - 1)
        b = a + 1
    return a, b


def _unquoted(label: str) -> str:
    try:
        return json.loads(label)
    except json.JSONDecodeError:  # single quotes
        return label[1:-1]
