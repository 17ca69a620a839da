"""How findings and boxes are put into words, and what words say of them: names, sentences, questions, boxes.

The language model is trained to write the sentences of a short structured report from a finding, its state and its side;
every sentence that it writes is checked against the same finding before anybody reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ..errors import UsageError

WORDS = {
    "cardiomediastinum": "heart and mediastinum", "ground_glass_opacities": "ground-glass opacity",
    "monitoring_probes": "monitoring leads", "covid-19": "COVID-19 pneumonia", "ards": "ARDS", "vessel": "vessels",
    "nucleus": "nuclei",
}  # fmt: skip
_SIDE = re.compile(r"\b(left|right)\b")
_TITLE = re.compile(r"\b[A-Z][a-z]+\b")
_OBSERVER = re.compile(r"[_ ]+observer[_ ]?\d+$")
_COUNTED = re.compile(r"\b(tube|line|catheter|device|pacemaker|lead|probe|wire|lesion|nodule|mass|tumou?r|fracture|cyst|polyp|stone|ulcer|effusion|"
                      r"pneumothorax|aneurysm|infarct)$", re.I)  # fmt: skip
_MANY = re.compile(r"(nuclei|vertebrae|bronchi|(?<!ascite)(?<!carie)(?<![suiao])s)$")
_ASKED = {
    "pneumothorax": r"pneumothora",
    "pleural effusion": r"pleural effusion",
    "consolidation": r"consolidation",
    "ground-glass opacity": r"ground-glass",
    "cardiomegaly": r"cardiomegaly|heart (is )?(abnormally )?(enlarged|large)|heart size abnormal",
    "endotracheal tube": r"endotracheal tube|intubated",
    "nasogastric tube": r"nasogastric|\bng tube",
    "central venous line": r"central venous line",
}
_HEALTHY = re.compile(r"\b(is|are)\b.*\b(this|the) (image|chest x-ray|film|lungs?|x ray)( study)? normal|is this a normal", re.I)
_ABNORMAL = re.compile(r"(any|there) (intraparenchymal )?abnormalit|is (this|the) (image|film) abnormal|anything abnormal", re.I)
_ONLY_A_PART = re.compile(r"\b(size|shape|aort\w*|heart|upper|lower|base|bases|ap[ei]x|hil\w+|ribs?|bones?|mediastin\w+)\b", re.I)
_OF_LUNGS = ("consolidation", "ground-glass opacity", "pleural effusion", "pneumothorax", "pneumonia", "COVID-19 pneumonia")
"""What a chest X-ray that somebody calls normal has none of."""
STATES = ("present", "possible", "absent")
SIDES = {"right": "on the right", "left": "on the left", "both": "on both sides"}


def word(name: str) -> str:
    """A data set's name of a finding or structure in the words of a report: "Pleural_Effusion" -> "pleural effusion", "RBC" stays."""
    return WORDS.get(name, _TITLE.sub(lambda m: m[0].lower(), name.replace("_", " ")))


def spoken(name: str) -> str:
    """A data set's name as one says it: "lung_upper_lobe_left" -> "left lung upper lobe", observers left out."""
    name = word(_OBSERVER.sub("", name))
    side = _SIDE.search(name)
    return f"{side[0]} {' '.join(_SIDE.sub(' ', name).split())}" if side and not name.startswith(side[0]) else name


def article(name: str) -> str:
    """ "a " or "an " before what is counted, else ""."""
    return ("an " if name[0] in "aeiou" else "a ") if _COUNTED.search(name) else ""


def plural(name: str) -> str:
    """Of what is counted; other names stay ("nuclei", "RBC")."""
    if not _COUNTED.search(name):
        return name
    return f"{name[:-1]}ces" if name.endswith("thorax") else f"{name}es" if name.endswith("s") else f"{name}s"


def listed(items: Sequence[str], last: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    return f" {last} ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def many(name: str) -> bool:
    """Whether a name is of several things ("vessels"), by its ending."""
    return bool(_MANY.search(name))


def fact_of(question: str, answer: str) -> dict[str, float]:
    """{finding: 1 | 0} that one yes/no question about a whole chest X-ray tells; {} for questions of side, degree or anything else.

    >>> fact_of("Is there a pneumothorax?", "No")
    {'pneumothorax': 0.0}
    >>> fact_of("Is the pleural effusion on the left?", "no")
    {}
    """
    yes = {"yes": 1.0, "no": 0.0}.get(answer.strip().lower())
    if yes is None or re.search(r"\b(left|right|bilateral|confined|lobe)\b", question, re.I):
        return {}
    if _HEALTHY.search(question) or _ABNORMAL.search(question):
        if _ONLY_A_PART.search(question):  # "Are the lungs normal size?" says nothing of what is in them
            return {}
        return dict.fromkeys(_OF_LUNGS, 0.0) if yes == (1.0 if _HEALTHY.search(question) else 0.0) else {}
    return {name: yes for name, pattern in _ASKED.items() if re.search(pattern, question, re.I)}


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


def boxes_text(boxes: Sequence[Box], size: Sequence[int], label: str = "", style: str = "qwen3") -> str:
    """Boxes of one label as a language model writes them: one as :func:`box_text`, several as a JSON list or parted by " ; ".

    Arguments and errors: see :func:`box_text`. Sources: the list, as supervision reads Qwen3-VL (roboflow/supervision,
    pull request 2015); " ; ", as PaliGemma's own demo reads it (spaces/big-vision/paligemma, paligemma_parse.py).
    """
    found = [box_text(b, size, label, style) for b in boxes]
    if len(found) == 1:
        return found[0]
    return " ; ".join(found) if style == "paligemma" else f"[{', '.join(found)}]"


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
