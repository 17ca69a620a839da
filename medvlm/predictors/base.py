"""The verbs that every model answers, on a study, a path or a list of them. A model overrides those it can do."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MedVLMError, ModelError
from ..imaging.scan import Image, Study, Volume
from ..sample import Answer, Prediction, Region, Report, Sample, Segmentation

QUESTION_LIMIT = 2000
"""Characters of a question; longer ones are refused before any work."""


class Model:
    """name, version, sha256: what made the answers, for reports. reads: modalities it was trained on, () for any."""

    name = "model"
    version = "0"
    sha256: str | None = None
    reads: tuple[str, ...] = ()

    def ask(self, study, question: str, image: str | None = None) -> Answer:
        """One answer to one question. ``image``: id, where the study holds several."""
        raise self._cannot("ask")

    def report(self, study, image: str | None = None) -> Report:
        """Findings and impression, each sentence with the regions it rests on."""
        raise self._cannot("report")

    def segment(self, study, target: str | None = None, *, points=None, boxes=None, image: str | None = None) -> Segmentation:
        """The outline of a named target, or of what lies at points or in a box, on the image's own grid.

        points: (Q, 2) index (h, w), or (Q, 3) with a last column 1 = on the target, 0 = off it. boxes: ((h, w), (h, w))
        lower and upper corner, half-open.
        """
        raise self._cannot("segment")

    def ground(self, study, phrase: str, image: str | None = None) -> list[Region]:
        """Where the phrase is: one region a connected part; [] when it is absent."""
        raise self._cannot("ground")

    def classify(self, study, labels: Sequence[str], image: str | None = None) -> dict[str, float]:
        """{label: calibrated probability}."""
        raise self._cannot("classify")

    def embed(self, study_or_text, image: str | None = None) -> np.ndarray:
        """float32 (D,), unit length, of an image or a text."""
        raise self._cannot("embed")

    def scope(self, image: Image | Volume) -> str | None:
        """Why this model should not read the image, or None when it may."""
        return None

    def predict(self, samples: Sequence[Sample]) -> list[Prediction]:
        """One Prediction a sample, in order: a mask where the sample holds masks, an answer where it asks."""
        return [self._one(s) for s in samples]

    def _one(self, sample: Sample) -> Prediction:
        began = time.perf_counter()
        try:
            study = Study(sample.id, sample.patient, tuple(sample.images.values()))
            if sample.masks:
                found = [self.segment(study, mask.label, image=mask.image) for mask in sample.masks]
                from ..sample import Mask

                result = Prediction(sample.id, "", min(s.present for s in found),
                                    masks=tuple(Mask(s.image.id, s.label, s.mask) for s in found))  # fmt: skip
            else:
                answer = self.ask(study, sample.question)
                result = Prediction(sample.id, answer.text, answer.probability, answer.choices, answer.regions)
        except MedVLMError as error:
            result = Prediction(sample.id, error=f"{error.code}: {error.message}")
        except Exception as error:  # one bad item must not lose the others; a foreign text may quote the patient's file
            result = Prediction(sample.id, error=f"INTERNAL: {type(error).__name__}")
        return Prediction(**{**vars(result), "seconds": time.perf_counter() - began})

    def _cannot(self, verb: str) -> ModelError:
        able = [v for v in ("ask", "report", "segment", "ground", "classify", "embed") if getattr(type(self), v) is not getattr(Model, v)]
        return ModelError(f"{self.name} cannot {verb}; it can {', '.join(able) or 'do nothing yet'}", "UNSUPPORTED_VERB")


def pick(study: Study | str | Path | Sequence, image: str | None = None, reads: Sequence[str] = ()) -> Image | Volume:
    """The one image that a verb is about: by id, the only one, or the only one of the modalities the model reads.

    Raises:
        ChoiceError: MANY_IMAGES, listing them.
    """
    from ..imaging.study import read

    if isinstance(study, Image | Volume):
        return study
    if isinstance(study, Sequence) and not isinstance(study, str):
        if len(study) != 1:
            raise ModelError(f"this model reads one study at a time, not {len(study)}", "UNSUPPORTED_VERB")
        study = study[0]
    study = study if isinstance(study, Study) else read(study)
    if image is None:
        fitting = [i for i in study.images if i.modality in reads]
        if len(fitting) == 1:
            return fitting[0]
    return study.image(image)


def check_question(question: str) -> str:
    """The question without outer space, or BAD_ARGUMENT / QUESTION_TOO_LONG."""
    question = str(question).strip()
    if not question:
        raise ModelError("the question is empty", "BAD_ARGUMENT", "ask something, e.g. \"Is there a pleural effusion?\"")
    if len(question) > QUESTION_LIMIT:
        raise ModelError(f"the question has {len(question)} characters; at most {QUESTION_LIMIT} are read", "QUESTION_TOO_LONG")
    return question


def json_ready(value: Any) -> Any:
    """Plain JSON types out of NumPy's."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
