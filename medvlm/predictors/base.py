"""The verbs that every model answers, on a study, a path or a list of them. A model overrides those it can do."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os.path import isfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MedVLMError, ModelError
from ..evaluate.zeroshot import PROMPTS, prompts_of
from ..imaging.scan import Image, Study, Volume
from ..sample import Answer, Mask, Prediction, Region, Report, Sample, Segmentation

QUESTION_LIMIT = 2000
"""Characters of a question; longer ones are refused before any work."""


VERBS = ("ask", "report", "segment", "ground", "classify", "embed")


def verb_of(sample: Sample) -> str:
    """What a sample asks for: its ``verb``, else "segment" where it holds masks, "report" where nobody asks, "ask"."""
    asked = not sample.turns or any(t.role == "user" for t in sample.turns)
    return sample.verb or ("segment" if sample.masks else "ask" if asked else "report")


class Model:
    """name, version, sha256: what made the answers, for reports. reads: modalities it was trained on, () for any.

    temperature: 0 for the likeliest answer; above, answers are drawn from the model's own distribution to that power, so
    that asking again shows how much it wavers.
    """

    name = "model"
    version = "0"
    sha256: str | None = None
    reads: tuple[str, ...] = ()
    temperature = 0.0

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
        """One Prediction a sample, in order, by what :func:`verb_of` says it asks for. A failure is a row with an error."""
        return [self._one(s) for s in samples]

    def _one(self, sample: Sample) -> Prediction:
        began = time.perf_counter()
        try:
            result = self._do(verb_of(sample), sample)
        except MedVLMError as error:
            result = Prediction(sample.id, error=f"{error.code}: {error.message}")
        except Exception as error:  # one bad item must not lose the others; a foreign text may quote the patient's file
            result = Prediction(sample.id, error=f"INTERNAL: {type(error).__name__}")
        return Prediction(**{**vars(result), "seconds": time.perf_counter() - began})

    def _pick(self, chances: Mapping[str, float]) -> str:
        """One of these answers, by ``temperature``."""
        if not self.temperature:
            return max(chances, key=lambda k: chances[k])
        weights = np.array(list(chances.values()), float) ** (1 / self.temperature)
        return list(chances)[np.random.default_rng().choice(len(weights), p=weights / weights.sum())]

    def _do(self, verb: str, sample: Sample) -> Prediction:
        if verb == "ask":
            return self._answer(sample)
        study = Study(sample.id, sample.patient, tuple(sample.images.values()))
        if verb == "segment":
            found = [self.segment(study, mask.label, image=mask.image) for mask in sample.masks]
            masks = tuple(Mask(s.image.id, asked.label, s.mask) for s, asked in zip(found, sample.masks))  # the label as it was asked for
            return Prediction(sample.id, "", min(s.present for s in found), masks=masks)
        if verb == "report":
            said = self.report(study)
            if said.out_of_scope:
                raise ModelError(said.out_of_scope, "OUT_OF_SCOPE")
            text = f"FINDINGS: {said.findings}\nIMPRESSION: {said.impression}".replace("FINDINGS: \n", "")
            return Prediction(sample.id, text.removesuffix("\nIMPRESSION: "), regions=tuple(r for s in said.sentences for r in s.regions))
        if verb == "ground":
            regions = tuple(self.ground(study, sample.question))
            return Prediction(sample.id, "", max((r.probability or 0.0 for r in regions), default=0.0), regions=regions)
        if verb == "classify":
            chances = self._judged(study, list(sample.choices or ()), sample.meta.get("prompts"))
            best = max(chances, key=lambda k: chances[k], default="")
            return Prediction(sample.id, best, chances.get(best), chances)
        if verb == "embed":
            seen = {"image": self.embed(study)} if sample.images else {}
            return Prediction(sample.id, vectors=seen | ({"text": self.embed(sample.answer)} if sample.answer else {}))
        raise ModelError(f"sample {sample.id} asks to {verb!r}; a model can {', '.join(VERBS)}", "BAD_ARGUMENT")

    def _judged(self, study: Study, labels: list[str], prompts: str | None) -> dict[str, float]:
        """:meth:`classify`, without the labels that the model has not learned: they are scored as wrong, the others are not lost.

        prompts: those a sample names, for models that tell labels from their names (:func:`by_prompts`).
        """
        try:
            return self.classify(study, labels)
        except ModelError as error:
            if error.code != "UNKNOWN_TARGET":
                raise
            chances: dict[str, float] = {}
            for label in labels:
                with suppress(ModelError):
                    chances |= self.classify(study, [label])
            if not chances:
                raise
            return chances

    def _answer(self, sample: Sample) -> Prediction:
        answer = self.ask(Study(sample.id, sample.patient, tuple(sample.images.values())), sample.question)
        return Prediction(sample.id, answer.text, answer.probability, answer.choices, answer.regions)

    def _cannot(self, verb: str) -> ModelError:
        able = [v for v in VERBS if getattr(type(self), v) is not getattr(Model, v)]
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


def by_prompts(labels: Sequence[str], modality: str, prompts: str | None, sigmoid: bool, logits: Callable) -> dict[str, float]:
    """{label: probability} of a contrastive model, which knows labels by their names alone; not calibrated.

    Labels compete (softmax, they add up to 1); a model trained with ``sigmoid`` judges each alone. With prompts of absence, as
    for one label given alone to a softmax model, each label competes with its absence.

    Args:
        prompts: a name in ``PROMPTS``; None for what :func:`prompts_of` says of the modality.
        logits: (templates) -> (len(labels),) scaled similarity of the picture to each label in these words, a torch tensor.

    Raises:
        ModelError: BAD_ARGUMENT for no label, unknown prompts, and one label alone that has nothing to compete with.
    """
    if not labels:
        raise ModelError("no label was given", "BAD_ARGUMENT", 'give one or more, e.g. "pneumonia"')
    if prompts is not None and prompts not in PROMPTS:
        raise ModelError(f"there are no prompts {str(prompts)[:60]!r}", "BAD_ARGUMENT", f"use {', '.join(PROMPTS)}")
    alone = not sigmoid and len(labels) == 1
    present, absent = PROMPTS[prompts or prompts_of(modality, alone)]
    if alone and not absent:
        raise ModelError(f"the prompts {prompts!r} let labels compete, and there is one label only", "BAD_ARGUMENT",
                         f"give more labels, or use {', '.join(n for n, (_, no) in PROMPTS.items() if no)}")  # fmt: skip
    found = logits(present)
    if absent:
        found = (found - logits(absent)).sigmoid()
    else:
        found = found.sigmoid() if sigmoid else found.softmax(0)
    return dict(zip(labels, found.tolist()))


def check_question(question: str) -> str:
    """The question without outer space, or BAD_ARGUMENT / QUESTION_TOO_LONG."""
    question = str(question).strip()
    if not question:
        raise ModelError("the question is empty", "BAD_ARGUMENT", "ask something, e.g. \"Is there a pleural effusion?\"")
    if len(question) > QUESTION_LIMIT:
        raise ModelError(f"the question has {len(question)} characters; at most {QUESTION_LIMIT} are read", "QUESTION_TOO_LONG")
    return question


def words_of(given) -> str | None:
    """The text to embed when a str was given; None for a study, an image or a ``pathlib.Path``.

    Raises:
        ModelError: BAD_ARGUMENT for an empty text and for a str that names a file.
    """
    if not isinstance(given, str):
        return None
    if not given.strip() or isfile(given):
        what = "names a file" if given.strip() else "is empty"
        raise ModelError(f"the text to embed {what}", "BAD_ARGUMENT", "give words, or medvlm.read(FILE) to embed an image")
    return given


def clicks(points, image: Image | Volume) -> np.ndarray:
    """Points given by hand as float (Q, rank + 1): index ((d,) h, w), then 1 on the target or 0 off it (1 where not said).

    Raises:
        ModelError: BAD_ARGUMENT for what is no such array, or lies outside the image.
    """
    rank = len(image.shape) - 1
    given = _inside(points, image, (rank, rank + 1), "points", last=1)
    marks = given[:, rank:] if given.shape[1] > rank else np.ones((len(given), 1))
    if not np.isin(marks, (0, 1)).all():
        raise ModelError(f"the last column of points is 1 (on the target) or 0 (off it), not {marks[:, 0].tolist()}", "BAD_ARGUMENT")
    return np.hstack([given[:, :rank], marks])


def corners(box, image: Image | Volume) -> np.ndarray:
    """A box given by hand as float (2, rank): lower and upper corner, half-open.

    Raises:
        ModelError: BAD_ARGUMENT for what is no box, or reaches outside the image.
    """
    rank = len(image.shape) - 1
    given = _numbers(box, "a box")
    if given.size != 2 * rank or (np.diff(given.reshape(2, rank), axis=0) <= 0).any():
        axes = "h, w" if rank == 2 else "d, h, w"
        raise ModelError(f"a box is (({axes}), ({axes})) with lower < upper, not {given.tolist()}", "BAD_ARGUMENT")
    return _inside(given.reshape(2, rank), image, (rank,), "box corners")


def place(module, device: str | None):
    """A torch module ready to answer, on the device named, or on the best there is.

    Raises:
        ModelError: BAD_ARGUMENT when the device cannot be used.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return module.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device {device!r} cannot be used here", "BAD_ARGUMENT", "use cpu, cuda, cuda:1 or mps") from error


def pretrained(kind, source: str | Path, **options):
    """``kind.from_pretrained(source)`` of a transformers class, quietly, from safetensors, without running code of the checkpoint.

    A local folder is read without the network, into float32. options: further arguments of ``from_pretrained``.

    Raises:
        ModelError: BAD_CHECKPOINT when it cannot be read, or when weights are missing, unknown or of the wrong shape.
    """
    import torch

    with reading("configuration"):
        if (config := Path(source) / "config.json").is_file():
            refuse_foreign_code(json.loads(config.read_text(encoding="utf-8")))
    with reading("model"):
        model, info = kind.from_pretrained(source, output_loading_info=True, use_safetensors=True, trust_remote_code=False,
                                           local_files_only=Path(source).is_dir(), **{"dtype": torch.float32} | options)  # fmt: skip
    wrong = {k: sorted(map(str, v))[:3] for k, v in info.items() if v}
    if wrong:
        raise ModelError(f"the weights do not fit the configuration: {wrong}", "BAD_CHECKPOINT")
    return model


def refuse_foreign_code(config) -> None:
    """An attention or expert implementation outside transformers ("org/kernel") would be fetched and run.

    Raises:
        ModelError: BAD_CHECKPOINT, naming the entry of the configuration.
    """
    for key, value in config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ():
        if isinstance(value, dict | list):
            refuse_foreign_code(value)
        elif "implementation" in str(key) and re.search(r"[/:@]", str(value)):
            raise ModelError(f"the model's configuration asks for code from elsewhere ({key})", "BAD_CHECKPOINT", "remove that entry from config.json")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """transformers kept quiet while it reads a checkpoint's files, and what is wrong with them as BAD_CHECKPOINT."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except MedVLMError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors have kinds of their own, and a file can be anything
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"the {what} cannot be read: {said}", "BAD_CHECKPOINT") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def digest(file: Path) -> str:
    """SHA-256 of a file of weights."""
    with file.open("rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest()


def _numbers(values, what: str) -> np.ndarray:
    try:
        return np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{what} must be numbers, not {str(values)[:60]}", "BAD_ARGUMENT") from error


def _inside(points, image: Image | Volume, columns: tuple[int, ...], what: str, last: int = 0) -> np.ndarray:
    """``last``: how far the largest index stays below the size: 1 for pixels, 0 for the corners of half-open boxes."""
    array = _numbers(points, what)
    array = array[None] if array.ndim == 1 else array
    size = np.array(image.shape[1:])
    if array.ndim != 2 or not len(array) or array.shape[1] not in columns or not np.isfinite(array).all():
        raise ModelError(f"{what} must be rows of {' or '.join(map(str, columns))} finite numbers, not an array of shape {array.shape}", "BAD_ARGUMENT")
    where = array[:, : len(size)]
    if (where < 0).any() or (where > size - last).any():
        raise ModelError(f"{what} {where[:5].tolist()} lie outside the image of {tuple(image.shape[1:])}", "BAD_ARGUMENT")
    return array


def json_ready(value: Any) -> Any:
    """Plain JSON types out of NumPy's."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
