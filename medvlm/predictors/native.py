"""Our own models: MedVLM behind the verbs, with calibrated probabilities and an honest "not my kind of image"."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ..datasets import sentences
from ..datasets.instruct import MODALITY_WORDS, side_of, word
from ..errors import MedVLMError, ModelError
from ..imaging.scan import Image, Study, Volume
from ..language import END, IMAGE, ROLES, SEG, Batch, collate, encode
from ..preprocess import to_tensor
from ..sample import Answer, Finding, Measurement, Region, Report, Sample, Segmentation, Sentence, Turn, box_of
from ..vlm import MedVLM
from .base import Model, check_question, pick

PRESENT = 0.5
POSSIBLE = (0.35, 0.65)
"""A finding whose probability lies between these is reported as possible."""
RECOGNISED = 0.5
"""A picture without a header is read when the model takes it for one of its modalities with at least this chance."""
FOREIGN = 0.05
"""A picture whose header names the right modality is still refused below this chance."""
ALIASES = {"heart": "heart and mediastinum", "mediastinum": "heart and mediastinum", "trachea": "airways",
           "ggo": "ground-glass opacity", "ground glass opacity": "ground-glass opacity", "effusion": "pleural effusion",
           "covid": "COVID-19 pneumonia", "covid-19": "COVID-19 pneumonia", "et tube": "endotracheal tube"}  # fmt: skip
JOINED = {"lungs": ("right lung", "left lung"), "both lungs": ("right lung", "left lung")}
WHERE = {"cardiomegaly": ("heart and mediastinum",), "endotracheal tube": ("airways",), "nasogastric tube": ("heart and mediastinum",)}
"""Structures a finding without an outline of its own was looked for in; the lungs for all others."""
KINDS = {"pneumonia": ("COVID-19 pneumonia", "bacterial pneumonia")}
DIAGNOSES = ("COVID-19 pneumonia", "bacterial pneumonia", "pneumonia", "ARDS")
_CLOSED = re.compile(r"^\s*(is/are|is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|any)\b", re.I)
_EITHER = re.compile(r"(?<![\w,])([\w'-]+) ([\w-]+) or ((?:(?:an?|the|on|in|at|to|of) )*)([\w-]+)(?: ([\w-]+))?", re.I)
EXCLUSIVE = tuple(frozenset(pair.split()) for pair in (
    "pa ap", "left right", "normal abnormal", "male female", "upper lower", "anterior posterior", "unilateral bilateral",
    "acute chronic", "ct mri", "ct mr", "t1 t2", "axial coronal", "axial sagittal", "frontal lateral"))  # fmt: skip
"""Pairs of which exactly one holds: only these force a choice; "pneumonia or effusion" may be both or neither."""
_LEADING = re.compile(r"an?|the|this|on|in|at|to|of|is|are|was|were|\w+'s?", re.I)
_WHETHER = re.compile(r"\b(any|evidence|there)\b.*\bor\b|\bor (not?)\b|\bor\b.*\b(present|visible|evident|seen|shown)\b", re.I)
"""Questions in which "or" joins what is looked for, so that the answer is yes or no."""


def load(folder: Path, device: str | None = None) -> NativeModel:
    """The model in a folder that ``save_pretrained`` wrote; nothing in it is run as code.

    Raises:
        ModelError: BAD_CHECKPOINT when weights are missing, unknown or of the wrong shape.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    if not (folder / "model.safetensors").is_file():
        raise ModelError("the model folder has no model.safetensors", "BAD_CHECKPOINT")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = MedVLM.from_pretrained(folder, output_loading_info=True, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except MedVLMError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors have kinds of their own, and a file can be anything
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"the model folder cannot be read: {said}", "BAD_CHECKPOINT") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    wrong = {k: sorted(map(str, v))[:3] for k, v in info.items() if v}
    if wrong:
        raise ModelError(f"the weights do not fit the configuration: {wrong}", "BAD_CHECKPOINT")
    if model.lm is None:
        raise ModelError("the model has no language model", "BAD_CHECKPOINT")
    if len(tokenizer) != model.lm.config.vocab_size:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the language model {model.lm.config.vocab_size}", "BAD_CHECKPOINT")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with (folder / "model.safetensors").open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    try:
        model = model.to(device or best)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device {device or best!r} cannot be used here", "BAD_ARGUMENT", "use cpu, cuda, cuda:1 or mps") from error
    return NativeModel(model.eval(), tokenizer, digest)


class NativeModel(Model):
    """A MedVLM that can be asked. One image's features are kept, so that further questions on it cost little."""

    def __init__(self, vlm: MedVLM, tokenizer, sha256: str | None = None):
        about = vlm.config.about
        self.vlm, self.tokenizer, self.sha256 = vlm, tokenizer, sha256
        self.name, self.version = about.get("name", "medvlm"), about.get("version", "0")
        self.reads = tuple(about.get("reads", ()))
        self.targets, self.findings = tuple(about.get("targets", ())), tuple(about.get("findings", ()))
        self._seen: tuple | None = None

    def ask(self, study, question: str, image: str | None = None) -> Answer:
        question = check_question(question)
        picture = self._readable(study, image)
        choices = choices_of(question)
        if choices:
            chances = self.choose(picture, question, choices)
            text = max(chances, key=chances.get)
            return Answer(text, chances[text], chances, self._mentioned(picture, question) if text != "no" else ())
        (text,), (chance,) = self._write(picture, [question])
        return Answer(text, chance, None, self._mentioned(picture, question))

    @torch.no_grad()
    def choose(self, picture: Image, question: str, choices: Sequence[str]) -> dict[str, float]:
        """{choice: probability}, from the chance the language model gives each whole answer; yes/no is calibrated."""
        scores = self._likelihood(picture, [(question, c) for c in choices])
        if tuple(choices) == ("yes", "no"):
            scale, shift = self.vlm.config.about.get("calibration", {}).get("yes_no", (1.0, 0.0))
            yes = float(torch.sigmoid((scores[0] - scores[1]) * scale + shift))
            return {"yes": yes, "no": 1 - yes}
        return dict(zip(choices, scores.softmax(0).tolist()))

    def segment(self, study, target=None, *, points=None, boxes=None, image=None) -> Segmentation:
        picture = self._readable(study, image)
        if points is not None or boxes is not None:
            return self._prompted(picture, self._target(target) if target else "target", points, boxes)
        if target is None:
            raise ModelError("nothing to segment was named", "BAD_ARGUMENT", "give a target, points or boxes")
        wanted = JOINED.get(_words(target)) or (self._target(target),)
        parts = self._outline(picture, wanted)
        if len(parts) == 1:
            return parts[0]
        mask = np.logical_or.reduce([p.mask for p in parts])
        return Segmentation(picture, _words(target), mask, max(p.present for p in parts))

    def ground(self, study, phrase, image=None) -> list[Region]:
        found = self.segment(study, phrase, image=image)
        return [Region(found.image.id, found.label, box_of(part), part, found.present) for part in _parts(found.mask)]

    @torch.no_grad()
    def classify(self, study, labels, image=None) -> dict[str, float]:
        labels = [labels] if isinstance(labels, str) else labels
        picture = self._readable(study, image)
        chances = self._chances(picture)
        known = {name.lower(): name for name in chances}
        wanted = {label: known.get(ALIASES.get(_words(label), _words(label)).lower()) for label in labels}
        if unknown := [label for label, name in wanted.items() if name is None]:
            there = ", ".join(n for n in chances if ":" not in n)
            raise ModelError(f"{self.name} has not learned {unknown[0][:60]!r}; it knows: {there}", "UNKNOWN_TARGET")
        return {label: chances[name] for label, name in wanted.items()}

    def scope(self, image: Image | Volume) -> str | None:
        if isinstance(image, Volume):
            return f"{self.name} reads single pictures ({', '.join(self.reads)}), not {image.modality} volumes"
        if image.modality not in (*self.reads, "unknown"):
            return f"{self.name} has not learned to read {image.modality} images (it reads {', '.join(self.reads)})"
        if image.info.get("code") not in (None, "CR", "DX", "RG"):
            return f"{self.name} has learned plain chest X-rays only; the header names another kind of X-ray"
        part = str(image.info.get("body_part") or "").upper()
        if part and not re.search(r"CHEST|THORAX|LUNG|RIB|HEART", part):
            return f"{self.name} has learned chest X-rays only; the header names another body part"
        if re.search(r"\b(LL|RL|LATERAL)\b", str(image.info.get("view") or "").upper()):
            return f"{self.name} has learned frontal views only; the header names a lateral one"
        if "classify" not in self.vlm.heads:
            return None
        chances = {k.removeprefix("modality:"): v for k, v in self._chances(image).items() if k.startswith("modality:")}
        mine = sum(chances.get(m, 0.0) for m in self.reads)
        if chances and mine < (RECOGNISED if image.modality == "unknown" else FOREIGN):
            likeliest = max(chances, key=chances.get)
            return f"the picture looks like {MODALITY_WORDS.get(likeliest, likeliest)} ({chances[likeliest]:.0%}), which {self.name} has not learned to read"
        return None

    def report(self, study, image=None) -> Report:
        picture = pick(study, image, self.reads)
        if reason := self.scope(picture):
            return Report(out_of_scope=reason)
        outlines = {s.label: s for s in self._outline(picture, self.targets)}
        chances = self._chances(picture)
        looked_for = [self._finding(label, chances[label], outlines, picture) for label in self.findings]
        prompts, meanings = [], []
        for finding in looked_for:
            state = "possible" if POSSIBLE[0] <= finding.probability < POSSIBLE[1] else "present" if finding.present else "absent"
            side = self._side(finding.label, outlines) if state != "absent" else None
            prompts.append(sentences.prompt(finding.label, state, side))
            meanings.append((finding.label, state, side))
        texts, _ = self._write(picture, prompts)
        said = []
        for k, (text, meaning) in enumerate(zip(texts, meanings)):
            if not sentences.says(text, *meaning):  # the model's words must say what its numbers say
                text = sentences.variants(*meaning)[0]
            section = "impression" if looked_for[k].label in DIAGNOSES else "findings"
            said.append(Sentence(text, looked_for[k].regions, section, (k,)))
        order = {"present": 0, "possible": 1, "absent": 2}
        said = [s for _, s in sorted(enumerate(said), key=lambda p: (p[1].section == "impression", order[meanings[p[0]][1]], p[0]))]
        return Report(tuple(said), tuple(looked_for))

    def _finding(self, label: str, chance: float, outlines: Mapping[str, Segmentation], picture: Image) -> Finding:
        own = outlines.get(label)
        regions = (own.region,) if own is not None and own.mask.any() and chance >= POSSIBLE[0] else ()
        if not regions:
            places = WHERE.get(label, ("right lung", "left lung"))
            regions = tuple(outlines[p].region for p in places if p in outlines and outlines[p].mask.any())
        measured = []
        if label == "cardiomegaly" and (ratio := cardiothoracic_ratio(outlines)) is not None:
            measured.append(Measurement("cardiothoracic ratio", ratio, "1"))
        if own is not None and own.mask.any() and regions and regions[0].label == label and picture.spacing:
            area = float(own.mask.sum()) * picture.spacing[0] * picture.spacing[1]
            measured.append(Measurement("area", area, "mm2"))
        return Finding(label, chance >= PRESENT, chance, regions, tuple(measured))

    def _side(self, label: str, outlines: Mapping[str, Segmentation]) -> str | None:
        own = outlines.get(label)
        if own is None or not own.mask.any() or not {"right lung", "left lung"} <= outlines.keys() or "tube" in label or "line" in label:
            return None
        right, left = outlines["right lung"].mask, outlines["left lung"].mask
        if not right.any() or not left.any() or 2 * (own.mask & (right | left)).sum() < own.mask.sum():
            return None  # a side is told only where both lungs are outlined and hold most of the finding
        return side_of(own.mask, right, left)

    def _readable(self, study: Study | str | Path, image: str | None) -> Image:
        picture = pick(study, image, self.reads)
        if reason := self.scope(picture):
            raise ModelError(reason, "OUT_OF_SCOPE")
        return picture

    def _target(self, name: str) -> str:
        plain = ALIASES.get(_words(name), _words(name))
        for known in self.targets:
            if known.lower() == plain.lower():
                return known
        raise ModelError(f"{self.name} has not learned to outline {name[:60]!r}; it knows: {', '.join([*self.targets, *JOINED])}", "UNKNOWN_TARGET")

    def _mentioned(self, picture: Image, question: str) -> tuple[Region, ...]:
        """Outlines of the targets that a question names, where they are there."""
        words = question.lower()
        names = [t for t in self.targets if re.search(rf"\b{re.escape(t.lower())}\b", words)]
        names += [t for alias, t in ALIASES.items() if t in self.targets and re.search(rf"\b{re.escape(alias)}\b", words)]
        if not names and re.search(r"\blungs?\b", words):
            names = ["right lung", "left lung"]
        found = self._outline(picture, tuple(dict.fromkeys(names))) if names else []
        return tuple(s.region for s in found if s.mask.any())

    @torch.no_grad()
    def _look(self, picture: Image):
        """Features, mask embedding and frame of a picture; those of the last one are kept."""
        if self._seen is None or self._seen[0] is not picture:
            name = self.vlm.route(picture.modality)
            tensor, frame = to_tensor(picture, self.vlm.encoders[name].spec)
            features = self.vlm.encode({name: tensor[None].to(self.vlm.device)})
            embedding = self.vlm.heads["mask"].embed(features[name]) if "mask" in self.vlm.heads else None
            self._seen = (picture, name, features, embedding, frame)
        return self._seen[1:]

    def _batch(self, picture: Image, turns: Sequence[tuple[str, str | None]]) -> Batch:
        """Questions (and answers) about one picture as a batch; rows share the picture. Padded left to generate."""
        name, *_ = self._look(picture)
        count = {picture.id: self.vlm.count(name)}
        limit = self.vlm.lm.config.max_position_embeddings - 64
        asking = turns[0][1] is None
        rows = []
        for question, answer in turns:
            said = [Turn("user", question.replace("<|", "< |")),  # a question places no image
                    *([] if answer is None else [Turn("assistant", answer)])]
            rows.append(encode(self.tokenizer, Sample("question", images={picture.id: picture}, turns=tuple(said)), count, not asking, limit))
        return collate(self.tokenizer, rows, [{picture.id: (name, 0)}] * len(rows), {}, left=asking).to(self.vlm.device)

    @torch.no_grad()
    def _likelihood(self, picture: Image, turns: Sequence[tuple[str, str]]) -> torch.Tensor:
        """(len(turns),) log probability of each answer with its end mark."""
        batch = self._batch(picture, turns)
        out = self.vlm(batch, self._look(picture)[1])
        chance = out.logits[:, :-1].float().log_softmax(-1)
        target = batch.labels[:, 1:]
        return (chance.gather(-1, target.clamp(min=0)[..., None])[..., 0] * (target >= 0)).sum(1)

    @torch.no_grad()
    def _write(self, picture: Image, questions: Sequence[str], most: int = 48) -> tuple[list[str], list[float]]:
        """Greedy answers, and the probability the model gives to each as a whole."""
        batch = self._batch(picture, [(q, None) for q in questions])
        never = self.tokenizer.convert_tokens_to_ids([IMAGE, SEG, *ROLES])
        ids = self.vlm.generate(batch, self._look(picture)[1], max_new_tokens=most, suppress_tokens=never,
                                pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.convert_tokens_to_ids(END))  # fmt: skip
        texts = [t.strip() for t in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        chances = self._likelihood(picture, list(zip(questions, texts))).exp().tolist()
        return texts, chances

    @torch.no_grad()
    def _chances(self, picture: Image) -> dict[str, float]:
        name, features, *_ = self._look(picture)
        head = self.vlm.heads["classify"]
        chances = dict(zip(head.labels, head.probabilities(head(features[name]))[0].tolist()))
        for whole, kinds in KINDS.items():
            if whole in chances:  # a kind of pneumonia is a pneumonia
                chances[whole] = max([chances[whole], *(chances[k] for k in kinds if k in chances)])
        return chances

    @torch.no_grad()
    def _outline(self, picture: Image, targets: Sequence[str]) -> list[Segmentation]:
        """Each target from its own [SEG] state; an empty mask where it is more likely absent."""
        name, features, embedding, frame = self._look(picture)
        batch = self._batch(picture, [(f"Segment the {t}.", SEG) for t in targets])
        out = self.vlm(batch, features)
        head = self.vlm.heads["mask"]
        known = torch.tensor([head.labels.index(t) if t in head.labels else -1 for t in targets], device=self.vlm.device)
        drawn = head.decode(embedding, _prompts(len(targets), self.vlm.device, tokens=self.vlm.seg_states(batch, out), named=known))
        chances = head.probability(drawn.present).tolist()
        masks = [(frame.map_to_image(_even(each[None]))[0] > 0).cpu().numpy() for each in drawn.logits]  # one native grid at a time
        return [Segmentation(picture, t, m if c >= PRESENT else np.zeros_like(m), c) for t, m, c in zip(targets, masks, chances)]

    @torch.no_grad()
    def _prompted(self, picture: Image, label: str, points, boxes) -> Segmentation:
        _, _, embedding, frame = self._look(picture)
        device = self.vlm.device
        prompt: dict = {}
        if points is not None:
            given = _inside(points, picture, (2, 3), "points", last=1)
            centres = frame.to_input(given[:, :2] + 0.5) - 0.5
            marks = given[:, 2] if given.shape[1] == 3 else np.ones(len(given))
            if not np.isin(marks, (0, 1)).all():
                raise ModelError(f"the last column of points is 1 (on the target) or 0 (off it), not {marks.tolist()}", "BAD_ARGUMENT")
            prompt |= {"points": torch.tensor(centres, device=device).float()[None], "labels": torch.tensor(marks, device=device).long()[None]}
        if boxes is not None:
            corners = _numbers(boxes, "a box")
            if corners.size != 4 or (np.diff(corners.reshape(2, 2), axis=0) <= 0).any():
                raise ModelError(f"a box is ((h, w), (h, w)) with lower < upper, not {corners.tolist()}", "BAD_ARGUMENT")
            corners = _inside(corners.reshape(2, 2), picture, (2,), "box corners")
            prompt["boxes"] = torch.tensor(frame.to_input(corners), device=device).float()[None]
        head = self.vlm.heads["mask"]
        drawn = head.decode(embedding, _prompts(1, device, **prompt))
        mask = (frame.map_to_image(_even(drawn.logits))[0] > 0).cpu().numpy()
        return Segmentation(picture, label, mask, float(mask.any()))


def _even(logits: torch.Tensor) -> torch.Tensor:
    """(P, h, w) averaged over 3 x 3: the decoder's transposed convolutions leave a checkerboard along the edges."""
    return torch.nn.functional.avg_pool2d(logits[:, None], 3, 1, 1, count_include_pad=False)[:, 0]


def _prompts(count: int, device, **given):
    from ..heads.mask import Prompts

    return Prompts(torch.zeros(count, dtype=torch.long, device=device), **given)


def choices_of(question: str) -> tuple[str, ...] | None:
    """The answers a closed question allows: ("yes", "no"), the two named by "A or B", or None for an open question.

    Longer alternatives ("T1, T2 or FLAIR", "a physical injury or a medical process") are left to be answered freely.

    >>> choices_of("Is this a PA or AP film?")
    ('PA', 'AP')
    >>> choices_of("Is it on the left side or the right side?")
    ('left', 'right')
    >>> choices_of("Is there a pneumothorax?")
    ('yes', 'no')
    """
    if not _CLOSED.match(question):
        return None
    if not re.search(r"\bor\b", question, re.I) or _WHETHER.search(question):
        return "yes", "no"
    either = _EITHER.search(question)
    if not either:
        return None
    before, first, article, second, after = either.groups()
    if after and first.lower() == after.lower():  # "left side or right side"
        first = before
    elif after and article and not _LEADING.fullmatch(before):
        return None
    return (first, second) if frozenset((first.lower(), second.lower())) in EXCLUSIVE else None


def cardiothoracic_ratio(outlines: Mapping[str, Segmentation]) -> float | None:
    """Widest heart over widest thorax on a frontal view, from the outlines; None where one of them is missing.

    Source: Danzer 1919, Am J Med Sci 157:513 (transverse cardiac over inner thoracic diameter; 0.5 is the usual limit
    on PA films). The heart's outline here includes the mediastinum, of which the heart is the widest part.
    """
    parts = [outlines.get(n) for n in ("heart and mediastinum", "right lung", "left lung")]
    if any(p is None or not p.mask.any() for p in parts):
        return None
    heart, right, left = (p.mask for p in parts)
    columns = np.flatnonzero((right | left).any(0))
    widths = [np.ptp(np.flatnonzero(row)) + 1 for row in heart if row.any()]
    return float(max(widths) / (columns[-1] - columns[0] + 1))


def _parts(mask: np.ndarray, least: float = 0.02) -> list[np.ndarray]:
    """Connected parts, largest first; specks below ``least`` of the whole are left out."""
    from scipy.ndimage import label

    numbered, count = label(mask)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    return [numbered == k + 1 for k in np.argsort(-sizes) if sizes[k] >= least * mask.sum()]


def _numbers(values, what: str) -> np.ndarray:
    try:
        return np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{what} must be numbers (h, w), not {str(values)[:60]}", "BAD_ARGUMENT") from error


def _inside(points, picture: Image, columns: tuple[int, ...], what: str, last: int = 0) -> np.ndarray:
    """``last``: how far the largest index stays below the size: 1 for pixels, 0 for the corners of half-open boxes."""
    array = _numbers(points, what)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or not len(array) or array.shape[1] not in columns or not np.isfinite(array).all():
        raise ModelError(f"{what} must be finite (h, w) index pairs, not an array of shape {array.shape}", "BAD_ARGUMENT")
    size = np.array(picture.shape[1:])
    if (array[:, :2] < 0).any() or (array[:, :2] > size - last).any():
        raise ModelError(f"{what} {array[:5, :2].tolist()} lie outside the image of {tuple(picture.shape[1:])} (h, w)", "BAD_ARGUMENT")
    return array


def _words(name: str) -> str:
    """A name as it is typed or as a data set writes it ("right_lung"), in this toolkit's words, lower case."""
    return word(" ".join(name.lower().split())).lower()
