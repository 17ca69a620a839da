"""Models that are talked to: the verbs as conversations of text and pictures, for models that know nothing of ours.

Such a model draws nothing: reports and answers come without regions, and its probabilities are its own, not calibrated.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image as Picture

from ..errors import MedVLMError, ModelError
from ..imaging.scan import Image, Volume
from ..imaging.window import display, show
from ..sample import MARKED, Answer, Prediction, Report, Sample, Sentence, Turn
from .base import Model, check_question, pick, verb_of

SLICES = 16
"""Slices that stand for a volume: evenly spaced, axial."""
PICTURE_LIMIT = 100
"""Pictures (slices of volumes counted) in one conversation; more are refused before any work."""
LONGEST = 4096
"""Pixels of a picture's longer side; larger ones are scaled down, as every such model would do itself."""
ANSWER_TOKENS, REPORT_TOKENS = 256, 1024
"""Tokens of an answer and of a report at most."""
YES_NO = ("yes", "no")
REPORT = 'Write the report of this examination in two sections: "FINDINGS:" and "IMPRESSION:". Write plain sentences.'
PRESENT = "Does this examination show {}? Answer yes or no."

_HEADING = re.compile(r"^[\W_]*(findings|impression|conclusion)[\s*_]*(?::[*_]*|$)", re.I | re.M)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"(])")
_BULLET = re.compile(r"^(?:[-*•]+|\d+[.)])\s+")


@dataclass(frozen=True)
class Request:
    """One conversation that waits for an answer.

    messages: (role, parts) in order, a part being text or an image. choices: the answers to pick from, None when free.
    most: tokens of the answer at most.
    """

    messages: tuple[tuple[str, tuple[str | Image | Volume, ...]], ...]
    choices: tuple[str, ...] | None = None
    most: int = ANSWER_TOKENS

    @property
    def images(self) -> tuple[Image | Volume, ...]:
        """In reading order."""
        return tuple(part for _, parts in self.messages for part in parts if not isinstance(part, str))


class Chat(Model):
    """The verbs of a model that answers conversations (:meth:`replies`).

    A list of studies (priors, views) is one conversation with one image of each, in that order. A volume is shown as
    ``SLICES`` axial slices. There are no outlines: ``segment`` and ``ground`` are not among the verbs.
    """

    def replies(self, requests: Sequence[Request]) -> list[Answer | Exception]:
        """An answer to each request, or why there is none. All are about the same images, in the same order."""
        raise NotImplementedError

    def ask(self, study, question, image=None) -> Answer:
        """As :meth:`Model.ask`; a closed question is answered with one of its choices."""
        from .native import choices_of

        question = _plain(question)
        return self._reply([request([Turn("user", question)], _images(study, image), choices_of(question))])[0]

    def report(self, study, image=None) -> Report:
        """The model's own words, split into sentences by section ("findings" where it names none).

        No regions, nothing looked for one by one, and no view on whether the image is of a kind it has learned.
        """
        (answer,) = self._reply([request([Turn("user", REPORT)], _images(study, image), most=REPORT_TOKENS)])
        return Report(sentences_of(answer.text))

    def classify(self, study, labels, image=None) -> dict[str, float]:
        """{label: probability of yes to ``PRESENT``}; not calibrated, and each label for itself."""
        labels = [labels] if isinstance(labels, str) else list(labels)
        images = _images(study, image)
        asked = [request([Turn("user", PRESENT.format(_plain(label)))], images, YES_NO) for label in labels]
        answers = self._reply(asked) if asked else []
        return {label: (answer.choices or {}).get("yes", float("nan")) for label, answer in zip(labels, answers)}

    def predict(self, samples) -> list[Prediction]:
        """As :meth:`Model.predict`, each sample's whole conversation; one that asks nothing gets a report.

        Samples that show the same images (the same objects, in the same order) are answered together.
        """
        rows: dict[int, Prediction] = {}
        groups: dict[tuple[int, ...], list[tuple[int, Request]]] = {}
        for i, sample in enumerate(samples):
            if verb_of(sample) not in ("ask", "report"):
                rows[i] = self._one(sample)
                continue
            try:
                asked = self._request(sample)
                groups.setdefault(tuple(map(id, asked.images)), []).append((i, asked))
            except MedVLMError as error:
                rows[i] = _row(sample, error, 0.0)
        for group in groups.values():
            began = time.perf_counter()
            answers = self.replies([asked for _, asked in group])
            share = (time.perf_counter() - began) / len(group)
            rows |= {i: _row(samples[i], answer, share) for (i, _), answer in zip(group, answers)}
        return [rows[i] for i in range(len(samples))]

    def _request(self, sample: Sample) -> Request:
        from .native import choices_of

        turns = [t for k, t in enumerate(sample.turns) if t.role != "assistant" or k < len(sample.turns) - 1]
        if not any(t.role == "user" for t in turns):
            return request([*turns, Turn("user", REPORT)], sample.images, most=REPORT_TOKENS)
        question = check_question(MARKED.sub(" ", sample.question))
        return request(turns, sample.images, sample.choices or choices_of(question))

    def _reply(self, requests: Sequence[Request]) -> list[Answer]:
        answers = self.replies(requests)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers


def request(turns: Sequence[Turn], images: Mapping[str, Image | Volume], choices: Sequence[str] | None = None, most: int = ANSWER_TOKENS) -> Request:
    """Turns with image marks, and the images they name, as a conversation; images without a mark stand before the first turn.

    Raises:
        ModelError: PLACEHOLDERS when a mark names no image; TOO_MANY_IMAGES beyond ``PICTURE_LIMIT``.
    """
    marked = {name for t in turns for name in MARKED.findall(t.text)}
    if unknown := marked - images.keys():
        raise ModelError(f"the text names images {sorted(unknown)}; there are {sorted(images)}", "PLACEHOLDERS")
    messages: list[tuple[str, tuple[str | Image | Volume, ...]]] = []
    waiting = [image for name, image in images.items() if name not in marked]
    for turn in turns:
        parts: list[str | Image | Volume] = []
        if turn.role != "system":
            parts, waiting = waiting, []
        for k, piece in enumerate(MARKED.split(turn.text)):  # text, name, text, name, ..., text
            if k % 2 or piece:
                parts.append(images[piece] if k % 2 else piece)
        messages.append((turn.role, tuple(parts)))
    made = Request(tuple(messages), tuple(choices) if choices else None, most)
    if (count := sum(_planes(image) for image in made.images)) > PICTURE_LIMIT:
        raise ModelError(f"the conversation shows {count} pictures; at most {PICTURE_LIMIT} are sent", "TOO_MANY_IMAGES")
    return made


def pictures(image: Image | Volume) -> list[Picture.Image]:
    """What a viewer shows, as 8-bit RGB pictures with square pixels, the longer side at most ``LONGEST``.

    A picture gives one; a volume up to ``SLICES`` axial slices from its lower to its upper end, the middles of equal
    parts, as a radiologist reads them (patient's left on the right), in the volume's own window.
    """
    if isinstance(image, Volume):
        axial = image.reorient("SPL")
        depth, count = axial.shape[1], _planes(axial)
        at = [(2 * k + 1) * depth // (2 * count) for k in range(count)]
        shown, spacing = list(show(axial.voxels[:, at], image.info)), axial.spacing[1:]
    else:
        shown, spacing = [display(image)], image.spacing
    return [_square(Picture.fromarray(np.ascontiguousarray(plane)), spacing or (1.0, 1.0)).convert("RGB") for plane in shown]


def sentences_of(text: str) -> tuple[Sentence, ...]:
    """The sentences of a report in words. Text before or without a heading counts as findings, a conclusion as impression.

    >>> [(s.section, s.text) for s in sentences_of("**FINDINGS:** Clear lungs. No effusion.\\n\\n## Impression\\n- Normal.")]
    [('findings', 'Clear lungs.'), ('findings', 'No effusion.'), ('impression', 'Normal.')]
    """
    said = []
    for k, piece in enumerate(_HEADING.split(f"findings:\n{text}")[1:]):  # heading, body, heading, body, ...
        if k % 2 == 0:
            section = "findings" if piece.lower() == "findings" else "impression"
            continue
        for line in piece.splitlines():
            for sentence in _SENTENCE_END.split(_BULLET.sub("", line.strip())):
                if sentence := sentence.strip("*_ "):
                    said.append(Sentence(sentence, section=section))
    return tuple(said)


def _images(study, image: str | None) -> dict[str, Image | Volume]:
    several = isinstance(study, Sequence) and not isinstance(study, str)
    found = [pick(one, image) for one in (study if several else [study])]
    if not found:
        raise ModelError("the list of studies is empty", "BAD_ARGUMENT", "give a study, a path, or a list of them")
    return {str(k): one for k, one in enumerate(found)}  # two studies may use one id


def _plain(question: str) -> str:
    return check_question(MARKED.sub(" ", str(question)))  # a question places no image; a sample's turns do


def _planes(image: Image | Volume) -> int:
    """Pictures that stand for an image, known without reading it."""
    if isinstance(image, Image):
        return 1
    axial = next(k for k, letter in enumerate(image.orientation) if letter in "SI")
    return min(SLICES, image.shape[1 + axial])


def _square(picture: Picture.Image, spacing: tuple[float, float]) -> Picture.Image:
    tall, wide = picture.height * spacing[0] / min(spacing), picture.width * spacing[1] / min(spacing)
    factor = min(1.0, LONGEST / max(tall, wide))
    size = max(1, round(wide * factor)), max(1, round(tall * factor))
    return picture if size == picture.size else picture.resize(size, Picture.Resampling.BILINEAR, reducing_gap=2.0)


def _row(sample: Sample, answer: Answer | Exception, seconds: float) -> Prediction:
    if isinstance(answer, MedVLMError):
        return Prediction(sample.id, error=f"{answer.code}: {answer.message}", seconds=seconds)
    if isinstance(answer, Exception):  # its text may quote what is inside a patient's file
        return Prediction(sample.id, error=f"INTERNAL: {type(answer).__name__}", seconds=seconds)
    return Prediction(sample.id, answer.text, answer.probability, answer.choices, answer.regions, seconds=seconds)
