"""Our own models: MedVLM behind the verbs, with calibrated probabilities and an honest "not my kind of image"."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..datasets import sentences
from ..datasets.facts import MODALITY_NAMES, case_of
from ..datasets.instruct import ASK, MODALITY_WORDS, side_of
from ..datasets.slices import sliced
from ..encoders.base import Features
from ..errors import ModelError
from ..heads.mask import Prompts
from ..imaging.scan import Image, Study, Volume, turned
from ..language import IMAGE, ROLES, SEG, Batch, Encoded, collate, encode, ends
from ..preprocess import UPRIGHT, Frame, Tiles, blend, inputs, tiles, to_tensor
from ..sample import (
    MARKED,
    Answer,
    Finding,
    Mask,
    Measurement,
    Prediction,
    Region,
    Report,
    Sample,
    Segmentation,
    Sentence,
    Turn,
    box_of,
)
from ..vlm import MedVLM
from . import known, survey
from .base import Model, by_prompts, check_question, clicks, corners, digest, pick, place, pretrained, verb_of, words_of
from .chat import sentences_of
from .prefix import Tree

PRESENT = 0.5
ISLAND = 0.25
"""Of the largest piece; smaller ones are no part of what is of one piece."""
POSSIBLE = (0.35, 0.65)
"""A finding whose probability lies between these is reported as possible."""
RECOGNISED = 0.5
"""A picture without a header is read when the model takes it for one of its modalities with at least this chance."""
FOREIGN = 0.05
"""A picture whose header names the right modality is still refused below this chance."""
REMEMBERED = 4
"""Images whose features are kept, and sets of labels whose prompts are."""
AT_ONCE = 8
"""Slices and windows that are encoded together."""
LARGEST = 8.0
"""A picture is looked at through windows at up to so many times the resolution at which the whole fits."""
FOUND = 0.1
"""Least score of an object that is boxed."""
REPORT_TOKENS = 256
"""Of a report in the model's own words, at most."""
ALIASES = {"heart": "heart and mediastinum", "mediastinum": "heart and mediastinum", "trachea": "airways",
           "ggo": "ground-glass opacity", "ground glass opacity": "ground-glass opacity", "effusion": "pleural effusion",
           "retinal vessels": "vessels", "blood vessels": "vessels", "vessel": "vessels", "nucleus": "nuclei", "cell nuclei": "nuclei",
           "bones": "bone", "skeleton": "bone", "liver parenchyma": "liver", "bladder": "urinary bladder", "ivc": "inferior vena cava",
           "red blood cells": "RBC", "red blood cell": "RBC", "erythrocytes": "RBC", "white blood cells": "WBC", "white blood cell": "WBC",
           "leukocytes": "WBC", "platelet": "platelets", "thrombocytes": "platelets", "covid": "COVID-19 pneumonia", "covid-19": "COVID-19 pneumonia", "et tube": "endotracheal tube"}  # fmt: skip
JOINED = {"lungs": ("right lung", "left lung"), "both lungs": ("right lung", "left lung"), "kidneys": ("right kidney", "left kidney")}
WHERE = {"cardiomegaly": ("heart and mediastinum",), "endotracheal tube": ("airways",), "nasogastric tube": ("heart and mediastinum",)}
"""Structures a finding without an outline of its own was looked for in; the lungs for all others."""
KINDS = {"pneumonia": ("COVID-19 pneumonia", "bacterial pneumonia")}
DIAGNOSES = ("COVID-19 pneumonia", "bacterial pneumonia", "pneumonia", "ARDS")
_CLOSED = re.compile(r"^\s*(is/are|is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|any)\b", re.I)
_REQUEST = re.compile(r"^\s*(can|could|will|would) you (please |kindly |briefly |also )*(describe(?!.* as )|explain|tell|list|name|give|summari[sz]e|write|interpret|provide|report|comment|elaborate|"
                      r"say|walk|show|outline|segment|draw|point|help|discuss)\b", re.I)
"""Requests in the form of a question: "yes" would be no answer."""
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

    if not (folder / "model.safetensors").is_file():
        raise ModelError("the model folder has no model.safetensors", "BAD_CHECKPOINT")
    model = pretrained(MedVLM, folder)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers has kinds of its own, and a file can be anything
        raise ModelError(f"the tokenizer cannot be read: {(str(error).splitlines() or [''])[0][:200]}", "BAD_CHECKPOINT") from error
    if model.lm is not None and len(tokenizer) != model.lm.config.vocab_size:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the language model {model.lm.config.vocab_size}", "BAD_CHECKPOINT")
    return NativeModel(place(model, device), tokenizer, digest(folder / "model.safetensors"))


class NativeModel(Model):
    """A MedVLM that can be asked. Features and key-values of the last images are kept, so that further questions cost little."""

    def __init__(self, vlm: MedVLM, tokenizer, sha256: str | None = None):
        about = vlm.config.about
        self.vlm, self.tokenizer, self.sha256 = vlm, tokenizer, sha256
        self.name, self.version = about.get("name", "medvlm"), about.get("version", "0")
        self.reads = tuple(about.get("reads", ()))
        self.targets, self.findings = tuple(about.get("targets", ())), tuple(about.get("findings", ()))
        self._limit = 0 if vlm.lm is None else vlm.lm.config.max_position_embeddings - 64  # the rest is for the answer
        self._seen: dict[int, tuple] = {}
        self._names: dict[tuple, torch.Tensor] = {}
        self._cut: dict[tuple[int, int], tuple[Volume, tuple[Image, ...]]] = {}
        self._trunk: tuple | None = None
        self._last: tuple[Image | Volume, dict[str, Segmentation]] | None = None

    def ask(self, study, question: str, image: str | None = None) -> Answer:
        question = check_question(question)
        images = self._images(study, image)
        ((text, chance, chances),) = self._answered(images, [_turns(question)], [choices_of(question)])
        if SEG in text:
            return Answer(_unmarked(text), chance, chances, self._named(images, _turns(question), text))
        regions = () if text == "no" else self._mentioned(images, question)
        return Answer(text, chance, chances, regions)

    def predict(self, samples: Sequence[Sample]) -> list[Prediction]:
        """As :meth:`Model.predict`; samples about the same images share one encoding and one prefilled prefix."""
        found: dict[int, Prediction] = {}
        groups: dict[tuple, list[int]] = {}
        for i, sample in enumerate(samples):
            if verb_of(sample) != "ask" or not sample.images:
                found[i] = self._one(sample)
            else:
                groups.setdefault(tuple((key, id(x)) for key, x in sample.images.items()), []).append(i)
        for group in groups.values():
            try:
                found |= zip(group, self._together([samples[i] for i in group]))
            except Exception:  # of one of them, which gets its error as a row; the others keep their answers
                found |= {i: self._one(samples[i]) for i in group}
        return [found[i] for i in range(len(samples))]

    def _answer(self, sample: Sample) -> Prediction:
        return self._together([sample])[0]

    def _together(self, samples: Sequence[Sample]) -> list[Prediction]:
        """Predictions for samples about the same images."""
        began = time.perf_counter()
        images = samples[0].images
        self._may_read(list(images.values()))
        asked = []
        for sample in samples:
            check_question(sample.question)
            asked.append(sample.turns[:-1] if sample.turns[-1].role == "assistant" else sample.turns)
        choices = [s.choices or choices_of(MARKED.sub(" ", s.question)) for s in samples]
        answers = self._answered(images, asked, choices)
        regions = [
            self._named(images, turns, text) if SEG in text
            else self._mentioned(images, s.question) if s.regions and text != "no" else ()
            for s, turns, (text, *_) in zip(samples, asked, answers)
        ]
        share = (time.perf_counter() - began) / len(samples)
        return [Prediction(s.id, _unmarked(text), chance, chances, places, seconds=share) for s, (text, chance, chances), places in zip(samples, answers, regions)]

    def _answered(self, images, asked: Sequence[Sequence[Turn]], choices: Sequence[Sequence[str] | None]):
        """:meth:`_answers`, but for what the heads know better, and of volumes by their slices: chances are the mean over all, words those of the middle."""
        found: dict[int, tuple] = {}
        only = next(iter(images.values())) if len(images) == 1 else None
        for i, turns in enumerate(asked):
            if only is not None and len(turns) == 1 and (wanted := self._wanted(only, MARKED.sub(" ", turns[0].text))) is not None:
                if (answer := self._known(only, wanted, choices[i])) is not None:
                    found[i] = answer
        rest = [i for i in range(len(asked)) if i not in found]
        deep = [key for key, x in images.items() if self._sliced(x)]
        if rest:
            shown = zip(*(self._slices(images[key], self.vlm.config.about["slices"]) for key in deep)) if deep else [()]
            each = [self._answers({**images, **dict(zip(deep, one))}, [asked[i] for i in rest], [choices[i] for i in rest]) for one in shown]
            for k, i in enumerate(rest):
                text, chance, chances = each[len(each) // 2][k]
                if chances is not None:
                    chances = {c: float(np.mean([a[k][2][c] for a in each])) for c in chances}
                    text = self._pick(chances)
                    chance = chances[text]
                found[i] = text, chance, chances
        return [found[i] for i in range(len(asked))]

    def _wanted(self, picture: Image | Volume, question: str) -> known.Asked | None:
        """What a question asks of the heads of this model, None where it has none for that."""
        about, head = self.vlm.config.about, self.vlm.head("classify", self.vlm.route(picture.modality)[0])
        if head is None or "outlined" not in about:
            return None
        groups = {g[0].partition(":")[0]: [n.partition(":")[2] for n in g] for g in head.groups}
        kind = self._kind(picture)
        findings = [n for n in head.labels if ":" not in n] if kind == "xray" else []
        box = self.vlm.head("box", self.vlm.route(picture.modality)[0])
        boxed = box.labels if box is not None and box.dense is not None and kind in about.get("boxed", ()) else ()
        return known.asked(question, groups, findings, about["outlined"].get(kind, ()), boxed, ALIASES)

    def _known(self, picture: Image | Volume, wanted: known.Asked, choices: Sequence[str] | None) -> tuple[str, float, dict[str, float] | None] | None:
        """(text, probability, choices) by the heads, in the words of the choices where there are some; None where they do not tell."""
        if choices and {c.lower() for c in choices} != {"yes", "no"}:
            return known.chosen(wanted, self._chances(picture), choices) if wanted.name is None else None
        found = self._told(picture, wanted)
        if found is None or found[2] is None:
            return None if choices and found is not None else found
        chances = {next((c for c in choices or () if c.lower() == said), said): p for said, p in found[2].items()}
        text = self._pick(chances)
        return text, chances[text], chances

    def _told(self, picture: Image | Volume, wanted: known.Asked) -> tuple[str, float, dict[str, float] | None] | None:
        if wanted.group not in ("place", "where", "size", "count"):
            return known.answer(wanted, self._chances(picture), lambda target: self.presence(picture, [target])[0])
        base = Sample("drawn", images={picture.id: picture})
        if wanted.name not in self.targets:
            regions = [r for r in self._boxed(picture) if r.label == wanted.name]
            case = case_of([replace(base, regions=tuple(r for r in regions if r.probability >= survey.COUNTED))])
            return known.measured(wanted, case, regions[0].probability if regions else FOUND)
        beside = ("right lung", "left lung", "spinal cord") if wanted.group in ("place", "where") else ()
        learnt = self.vlm.config.about["outlined"][self._kind(picture)]
        own, *others = self._outline(picture, tuple(dict.fromkeys((wanted.name, *(t for t in beside if t in learnt)))))
        base = replace(base, meta={"labels": {"view": self._view(picture, {s.label: s.mask for s in others})}})
        case = case_of([replace(base, masks=(Mask(picture.id, s.label, s.mask),)) for s in (own, *others)])
        return known.measured(wanted, case, own.present, next(map(survey.amount, survey.sizes(own)), None))

    def _view(self, picture: Image | Volume, lungs: Mapping[str, np.ndarray]) -> str | None:
        """The projection that an X-ray looks like, by which its sides are the patient's; None where the lungs do not lie as they do on a film that nobody mirrored."""
        sides = [lungs[f"{side} lung"].any(0) for side in ("right", "left") if f"{side} lung" in lungs]
        if len(sides) < 2 or not all(s.any() for s in sides) or np.flatnonzero(sides[0]).mean() >= np.flatnonzero(sides[1]).mean():
            return None
        views = {n.partition(":")[2]: p for n, p in self._chances(picture).items() if n.startswith("view:")}
        return max(views, key=views.get) if views else None

    def _kind(self, picture: Image | Volume) -> str:
        """The picture's modality, or where nobody says it the one that it looks like."""
        kinds = self._kinds(picture)
        return max(kinds, key=kinds.get)

    def _kinds(self, picture: Image | Volume) -> dict[str, float]:
        """{modality: chance}: the picture's own, or where nobody says it those that it looks like."""
        if picture.modality in ("unknown", "ct_or_mr") and "outlined" in self.vlm.config.about:
            looks = {n.partition(":")[2]: p for n, p in self._chances(picture).items() if n.startswith("modality:")}
            looks = {k: p for k, p in looks.items() if picture.modality == "unknown" or k in ("ct", "mr")}
            if total := sum(looks.values()):
                return {k: p / total for k, p in looks.items()}
        return {picture.modality: 1.0}

    def _sliced(self, picture: Image | Volume) -> bool:
        """Whether this is a volume that the model sees slice by slice."""
        return isinstance(picture, Volume) and "slices" in self.vlm.config.about and len(self.vlm.encoders[self.vlm.route(picture.modality)[0]].spec.size) == 2

    def _slices(self, volume: Volume, count: int) -> tuple[Image, ...]:
        """Evenly spaced axial slices of a volume; those of the last ones are kept."""
        key = id(volume), count
        if key not in self._cut:
            while len(self._cut) >= REMEMBERED:
                self._cut.pop(next(iter(self._cut)))
            made = sliced([Sample("volume", images={volume.id: volume})], count)
            self._cut[key] = volume, tuple(next(iter(one[0].images.values())) for one in made)
        return self._cut[key][1]

    def choose(self, picture: Image | Volume, question: str, choices: Sequence[str]) -> dict[str, float]:
        """{choice: probability}, from the chance the language model gives each whole answer; yes/no is calibrated."""
        return self._answers({picture.id: picture}, [_turns(question)], [choices])[0][2]

    @torch.no_grad()
    def _answers(self, images: Mapping[str, Image | Volume], asked: Sequence[Sequence[Turn]], choices: Sequence[Sequence[str] | None]):
        """(text, probability, {choice: probability} | None) of each conversation; closed ones are scored, not written.

        A model that is taught to outline what it names (``about["grounded"]``) may write <|seg|> into its text.
        """
        if self.vlm.lm is None:
            raise ModelError(f"{self.name} cannot ask: it has no language model", "UNSUPPORTED_VERB")
        closed = [(i, c) for i, kinds in enumerate(choices) for c in kinds or ()]
        scores = iter(self._likelihood(images, [(*asked[i], Turn("assistant", c)) for i, c in closed]).tolist() if closed else ())
        free = [i for i, kinds in enumerate(choices) if not kinds]
        marks = {"most": 96, "marks": True} if self.vlm.config.about.get("grounded") else {}
        written = iter(zip(*self._write(images, [asked[i] for i in free], **marks)) if free else ())
        answers = []
        for kinds in choices:
            if not kinds:
                answers.append((*next(written), None))
                continue
            score = torch.tensor([next(scores) for _ in kinds])
            chances = dict(zip(kinds, score.softmax(0).tolist()))
            if sorted(k.lower() for k in kinds) == ["no", "yes"]:
                scale, shift = self.vlm.config.about.get("calibration", {}).get("yes_no", (1.0, 0.0))
                no, yes = sorted(range(2), key=lambda k: kinds[k].lower())
                chance = float(torch.sigmoid((score[yes] - score[no]) * scale + shift))
                chances = {kinds[k]: chance if k == yes else 1 - chance for k in range(2)}
            text = self._pick(chances)
            answers.append((text, chances[text], chances))
        return answers

    def segment(self, study, target=None, *, points=None, boxes=None, image=None) -> Segmentation:
        picture = self._readable(study, image)
        if (points is not None or boxes is not None) and self._sliced(picture):
            raise ModelError(f"{self.name} sees volumes slice by slice and takes points and boxes on single pictures only", "UNSUPPORTED_VERB", "name a target, or give one slice")
        if points is not None or boxes is not None:
            return self._prompted(picture, self._target(target) if target else "target", points, boxes)
        if target is None:
            raise ModelError("nothing to segment was named", "BAD_ARGUMENT", "give a target, points or boxes")
        joined = JOINED.get(_words(target), ())
        wanted = joined if joined and set(joined) <= set(self.targets) else (self._target(target),)
        parts = self._outline(picture, wanted)
        if len(parts) == 1:
            return parts[0]
        mask = np.logical_or.reduce([p.mask for p in parts])
        return Segmentation(picture, _words(target), mask, max(p.present for p in parts))

    def ground(self, study, phrase, image=None) -> list[Region]:
        if (label := self._object(phrase)) is not None:
            return [r for r in self._boxed(self._readable(study, image)) if r.label == label]
        found = self.segment(study, phrase, image=image)
        return [Region(found.image.id, found.label, box_of(part), part, found.present) for part in _parts(found.mask)]

    def _object(self, phrase: str) -> str | None:
        """The label of the box head that a phrase names."""
        head = self.vlm.head("box", next(iter(self.vlm.encoders)))
        plain = ALIASES.get(_words(phrase), _words(phrase)).lower()
        return next((n for n in head.labels if n.lower() == plain), None) if head is not None and head.dense is not None else None

    @torch.no_grad()
    def _boxed(self, picture: Image | Volume) -> list[Region]:
        """Every object in a picture that the box head knows, the surest first; none in a volume, or in a kind of picture that ``about["boxed"]`` leaves out."""
        kinds = self.vlm.config.about.get("boxed")
        if isinstance(picture, Volume) or kinds is not None and self._kind(picture) not in kinds:
            return []
        name, features, _, frame = self._look(picture)
        head, (high, wide) = self.vlm.head("box", name), picture.shape[1:]
        found = []
        for one in head.detect(head(features[name]), FOUND)[0]:
            lower, upper = frame.box_to_image(np.asarray(one.box)).clip(0, (high, wide)).tolist()
            if upper[0] > lower[0] and upper[1] > lower[1]:
                found.append(Region(picture.id, head.labels[one.label], (tuple(lower), tuple(upper)), None, one.score))
        return found

    @torch.no_grad()
    def classify(self, study, labels, image=None, prompts: str | None = None) -> dict[str, float]:
        """As :meth:`Model.classify`; a model without a classifier but with a contrastive head knows labels by their names (:func:`by_prompts`)."""
        labels = [labels] if isinstance(labels, str) else labels
        picture = self._readable(study, image)
        if self._by_name(picture):
            sigmoid = self._contrast(picture).logit_bias is not None
            return by_prompts(labels, picture.modality, prompts, sigmoid, lambda templates: self._near(picture, labels, templates))
        if self.vlm.head("classify", self.vlm.route(picture.modality)[0]) is None:
            raise ModelError(f"{self.name} has no head that classifies", "UNSUPPORTED_VERB", "use another model for this verb")
        chances = self._chances(picture)
        known = {name.lower(): name for name in chances}
        wanted = {label: known.get(ALIASES.get(_words(label), _words(label)).lower()) for label in labels}
        if unknown := [label for label, name in wanted.items() if name is None]:
            there = ", ".join(n for n in chances if ":" not in n)
            raise ModelError(f"{self.name} has not learned {unknown[0][:60]!r}; it knows: {there}", "UNKNOWN_TARGET")
        return {label: chances[name] for label, name in wanted.items()}

    @torch.no_grad()
    def embed(self, study_or_text, image=None) -> np.ndarray:
        """As :meth:`Model.embed`, by the model's contrastive head; UNSUPPORTED_VERB where it has none."""
        first = next(iter(self.vlm.encoders))
        if self.vlm.head("contrast", first) is None:
            raise ModelError(f"{self.name} cannot embed: it has no contrastive head", "UNSUPPORTED_VERB")
        if (text := words_of(study_or_text)) is not None:
            return self._said(text, self.vlm.head("contrast", first)).float().cpu().numpy()
        picture = self._readable(study_or_text, image)
        head = self._contrast(picture)
        if head is None:
            raise ModelError(f"{self.name} embeds what its encoder {first!r} sees, not {picture.modality} images", "OUT_OF_SCOPE")
        return F.normalize(self._placed(picture, head), dim=0).float().cpu().numpy()

    def _placed(self, picture: Image | Volume, head) -> torch.Tensor:
        """(D,) of a picture in the space it shares with texts; of a volume the mean of its slices'."""
        if self._sliced(picture):
            return torch.stack([self._placed(one, head) for one in self._slices(picture, self.vlm.config.about["slices"])]).mean(0)
        name, features, *_ = self._look(picture)
        return head.image(features[name])[0]

    def _contrast(self, picture: Image | Volume):
        return self.vlm.head("contrast", self.vlm.route(picture.modality)[0])

    def _by_name(self, picture: Image | Volume) -> bool:
        """Whether labels of this image are told from their names alone."""
        return self.vlm.head("classify", self.vlm.route(picture.modality)[0]) is None and self._contrast(picture) is not None

    def _judged(self, study, labels, prompts):
        named = self._by_name(self._readable(study, None))
        return self.classify(study, labels, prompts=prompts) if named else super()._judged(study, labels, prompts)

    def _said(self, text: str, head) -> torch.Tensor:
        """(embed_dim,) unit vector of a text."""
        tower = self.vlm.encoders["text"]
        ids = torch.tensor([tower.ids(self.tokenizer, text)], device=self.vlm.device)
        return head.text(tower(ids))[0]

    def _near(self, picture: Image | Volume, labels: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
        """(len(labels),) scaled cosines of an image to each label's mean prompt."""
        head, (name, features, *_) = self._contrast(picture), self._look(picture)
        key = id(head), tuple(labels), tuple(templates)
        if key not in self._names:
            means = torch.stack([torch.stack([self._said(t.format(label), head) for t in templates]).mean(0) for label in labels])
            while len(self._names) >= REMEMBERED:
                self._names.pop(next(iter(self._names)))
            self._names[key] = F.normalize(means, dim=-1)
        return head.logits(head.image(features[name]), self._names[key])[0].float().cpu()

    def scope(self, image: Image | Volume) -> str | None:
        try:
            first = self.vlm.route(image.modality)[0]
        except ModelError as error:
            return error.message
        rank = len(self.vlm.encoders[first].spec.size)
        if rank != len(image.shape) - 1 and not self._sliced(image):
            given = "volumes" if isinstance(image, Volume) else "single pictures"
            return f"{self.name} reads {'single pictures' if rank == 2 else 'volumes'} ({', '.join(self.reads)}), not {image.modality} {given}"
        if image.modality not in (*self.reads, "unknown"):
            return f"{self.name} has not learned to read {image.modality} images (it reads {', '.join(self.reads)})"
        if image.modality in ("xray", "unknown") and "xray" in self.reads and (reason := self._other_xray(image)):
            return reason
        if self.vlm.head("classify", first) is None:
            return None
        chances = {k.removeprefix("modality:"): v for k, v in self._chances(image).items() if k.startswith("modality:")}
        mine = sum(chances.get(m, 0.0) for m in self.reads)
        if chances and mine < (RECOGNISED if image.modality == "unknown" else FOREIGN):
            likeliest = max(chances, key=chances.get)
            return f"the picture looks like {MODALITY_WORDS.get(likeliest, likeliest)} ({chances[likeliest]:.0%}), which {self.name} has not learned to read"
        return None

    def _other_xray(self, image: Image | Volume) -> str | None:
        """Why an X-ray is not a frontal one of the chest, by its header."""
        if image.info.get("code") not in (None, "CR", "DX", "RG"):
            return f"{self.name} has learned plain chest X-rays only; the header names another kind of X-ray"
        part = str(image.info.get("body_part") or "").upper()
        if part and not re.search(r"CHEST|THORAX|LUNG|RIB|HEART", part):
            return f"{self.name} has learned chest X-rays only; the header names another body part"
        if re.search(r"\b(LL|RL|LATERAL)\b", str(image.info.get("view") or "").upper()):
            return f"{self.name} has learned frontal views only; the header names a lateral one"
        return None

    def report(self, study, image=None) -> Report:
        """As :meth:`Model.report`; a model that was taught no findings one by one writes it in its own words."""
        picture = pick(study, image, self.reads)
        if reason := self.scope(picture):
            return Report(out_of_scope=reason)
        if not self.findings and self.vlm.lm is not None:
            names = MODALITY_NAMES if isinstance(picture, Volume) else MODALITY_WORDS
            question = ASK["report"][0].format(picture=names.get(picture.modality, "an image").partition(" ")[2])
            ((text,), _) = self._write({picture.id: picture}, [_turns(question)], REPORT_TOKENS)
            return Report(sentences_of(text))
        chances = self._chances(picture)
        outlined, kind = self.vlm.config.about.get("outlined", {}), self._kind(picture)
        if outlined and kind != "xray":
            drawn = self._outline(picture, outlined.get(kind, ())) if outlined.get(kind) else []
            return survey.report(picture, kind, chances, drawn, self._boxed(picture) if kind in self.vlm.config.about.get("boxed", ()) else ())
        outlines = {s.label: s for s in self._outline(picture, outlined.get("xray", self.targets))}
        looked_for = [self._finding(label, chances[label], outlines, picture) for label in self.findings]
        prompts, meanings = [], []
        for finding in looked_for:
            state = "possible" if POSSIBLE[0] <= finding.probability < POSSIBLE[1] else "present" if finding.present else "absent"
            side = self._side(finding.label, outlines) if state != "absent" else None
            prompts.append(sentences.prompt(finding.label, state, side))
            meanings.append((finding.label, state, side))
        texts, _ = self._write({picture.id: picture}, [_turns(p) for p in prompts])
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

    def _readable(self, study: Study | str | Path, image: str | None) -> Image | Volume:
        picture = pick(study, image, self.reads)
        self._may_read([picture])
        return picture

    def _may_read(self, pictures: Sequence[Image | Volume]) -> None:
        if self.vlm.lm is not None and len(pictures) > self._limit:  # each takes a token at least
            raise ModelError(f"{len(pictures)} images at once; this model reads {self._limit} tokens, and an image takes several", "QUESTION_TOO_LONG")
        for picture in pictures:
            if reason := self.scope(picture):
                raise ModelError(reason, "OUT_OF_SCOPE")

    def _images(self, study, image: str | None) -> dict[str, Image | Volume]:
        """What a question is about: one image, or one of each study of a list (views, or a prior and the present one)."""
        several = isinstance(study, Sequence) and not isinstance(study, str)
        if several and not study:
            raise ModelError("no image was given", "BAD_ARGUMENT", "give a study, or a list of some")
        pictures = [pick(one, image, self.reads) for one in (study if several else [study])]
        self._may_read(pictures)
        clash = len({p.id for p in pictures}) < len(pictures)
        return {f"{k}-{p.id}" if clash else p.id: p for k, p in enumerate(pictures, start=1)}

    def _target(self, name: str) -> str:
        plain = ALIASES.get(_words(name), _words(name))
        for mine in self.targets:
            if mine.lower() == plain.lower():
                return mine
        raise ModelError(f"{self.name} has not learned to outline {name[:60]!r}; it knows: {', '.join([*self.targets, *JOINED])}", "UNKNOWN_TARGET")

    def _mentioned(self, images: Mapping[str, Image | Volume], question: str) -> tuple[Region, ...]:
        """Outlines of the targets that a question names, where they are there, on each image by its key."""
        words = question.lower()
        names = [t for t in self.targets if re.search(rf"\b{re.escape(t.lower())}\b", words)]
        names += [t for alias, t in ALIASES.items() if t in self.targets and re.search(rf"\b{re.escape(alias)}\b", words)]
        if not names and re.search(r"\blungs?\b", words):
            names = [t for t in ("right lung", "left lung") if t in self.targets]
        names = tuple(dict.fromkeys(names))
        return tuple(replace(s.region, image=key) for key, picture in images.items() if names for s in self._outline(picture, names) if s.mask.any())

    @torch.no_grad()
    def _look(self, picture: Image | Volume):
        """First encoder's name, features by encoder, mask embedding and frame of an image; those of the last ones are kept."""
        if id(picture) not in self._seen:
            names = self.vlm.route(picture.modality)
            tensors, frames = zip(*(to_tensor(picture, self.vlm.encoders[n].spec) for n in names))
            features = self.vlm.encode({n: t[None].to(self.vlm.device) for n, t in zip(names, tensors)})
            head = self.vlm.head("mask", names[0])
            embedding = head.embed(features[names[0]]) if head is not None else None
            while len(self._seen) >= REMEMBERED:
                self._seen.pop(next(iter(self._seen)))
            self._seen[id(picture)] = (picture, names[0], features, embedding, frames[0])
        return self._seen[id(picture)][1:]

    def _features(self, images: Mapping[str, Image | Volume]) -> tuple[dict[str, Features], dict[str, list[tuple[str, int]]]]:
        """Features of several images as one batch an encoder, and where each image's lie."""
        parts: dict[str, list[Features]] = {}
        places: dict[str, list[tuple[str, int]]] = {}
        for key, picture in images.items():
            seen = self._look(picture)[1]
            places[key] = [(name, len(parts.setdefault(name, []))) for name in seen]
            for name, f in seen.items():
                parts[name].append(f)
        return {name: _joined(group) for name, group in parts.items()}, places

    def _encoded(self, images: Mapping[str, Image | Volume], turns: Sequence[Turn], answer: bool) -> Encoded:
        """A conversation as tokens; only its last answer is labelled."""
        counts = {key: self.vlm.tokens(x.modality) for key, x in images.items()}
        row = encode(self.tokenizer, Sample("question", images=images, turns=tuple(turns)), counts, answer, self._limit)
        start = len(row.ids)
        while start and row.labels[start - 1] >= 0:
            start -= 1
        return Encoded(row.ids, [-100] * start + row.labels[start:], row.images)

    def _batch(self, images: Mapping[str, Image | Volume], conversations: Sequence[Sequence[Turn]]) -> tuple[Batch, dict[str, Features]]:
        """Conversations about the same images as a batch, and the images' features. Padded left where an answer is wanted."""
        features, places = self._features(images)
        answered = conversations[0][-1].role == "assistant"
        rows = [self._encoded(images, turns, answered) for turns in conversations]
        return collate(self.tokenizer, rows, [places] * len(rows), {}, left=not answered).to(self.vlm.device), features

    def _shared(self, images: Mapping[str, Image | Volume], rows: Sequence[Encoded]) -> tuple[Tree, int] | None:
        """The prefilled trunk of these conversations and its length: up to their last image, where they all begin so.

        None where a trunk cannot be shared: the question guides the image's tokens, or the cache is no plain one.
        """
        token = self.vlm.config.image_token_id
        ids = rows[0].ids
        length = len(ids) - ids[::-1].index(token) if token in ids else 0
        trunk = ids[:length]
        if not length or self.vlm.guided or any(r.ids[:length] != trunk or token in r.ids[length:] for r in rows):
            return None
        key = (tuple(trunk), tuple(map(id, images.values())), tuple(images))
        if self._trunk is None or self._trunk[0] != key:
            features, places = self._features(images)
            order = [at for name in rows[0].images for at in places[name]]
            embeds = self.vlm.splice(torch.tensor([trunk], device=self.vlm.device), features, order)
            self._trunk = key, Tree(self.vlm.lm, embeds), tuple(images.values())  # held, so that no other image takes their ids
        return (self._trunk[1], length) if self._trunk[1].exact else None

    @torch.no_grad()
    def _likelihood(self, images: Mapping[str, Image | Volume], conversations: Sequence[Sequence[Turn]]) -> torch.Tensor:
        """(len(conversations),) log probability of each last answer with its end mark."""
        rows = [self._encoded(images, turns, True) for turns in conversations]
        if shared := self._shared(images, rows):
            tree, length = shared
            starts = [next(k for k, label in enumerate(r.labels) if label >= 0) for r in rows]
            return tree.score([r.ids[length:k] for r, k in zip(rows, starts)], [r.ids[k:] for r, k in zip(rows, starts)]).cpu()
        batch, features = self._batch(images, conversations)
        out = self.vlm(**batch.inputs(), features=features, labels=batch.labels)  # an answer does not guide what is seen of the image
        chance = out.logits[:, :-1].float().log_softmax(-1)
        target = batch.labels[:, 1:]
        return (chance.gather(-1, target.clamp(min=0)[..., None])[..., 0] * (target >= 0)).sum(1).cpu()

    @torch.no_grad()
    def _write(self, images: Mapping[str, Image | Volume], conversations: Sequence[Sequence[Turn]], most: int = 48,
               marks: bool = False) -> tuple[list[str], list[float]]:  # fmt: skip
        """Answers by ``temperature``, with <|seg|> where ``marks`` lets them be, and the probability the model gives to each as a whole."""
        known, end = self.tokenizer.added_tokens_encoder, ends(self.tokenizer)
        never = [known[token] for token in (IMAGE, *ROLES, *([] if marks else [SEG])) if token in known]
        rows = [self._encoded(images, turns, False) for turns in conversations]
        if shared := self._shared(images, rows):
            tree, length = shared
            ids = tree.write([r.ids[length:] for r in rows], most, end, never, self.temperature)
        else:
            batch, features = self._batch(images, conversations)
            drawn = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
            ids = self.vlm.generate(**batch.inputs(), features=features, max_new_tokens=most, suppress_tokens=never, **drawn,
                                    pad_token_id=self.tokenizer.pad_token_id, eos_token_id=end)  # fmt: skip
        texts = [self._decoded(row) for row in ids]
        said = [(*turns, Turn("assistant", text)) for turns, text in zip(conversations, texts)]
        return texts, self._likelihood(images, said).exp().tolist()

    def _decoded(self, ids) -> str:
        """The text of an answer, of special tokens with <|seg|> only."""
        mark, parts = self.tokenizer.convert_tokens_to_ids(SEG), [[]]
        for token in ids.tolist() if isinstance(ids, torch.Tensor) else ids:
            parts = [*parts, []] if token == mark else [*parts[:-1], [*parts[-1], token]]
        return SEG.join(self.tokenizer.decode(part, skip_special_tokens=True) for part in parts).strip()

    @torch.no_grad()
    def _chances(self, picture: Image | Volume) -> dict[str, float]:
        if self._sliced(picture):
            each = [self._chances(one) for one in self._slices(picture, self.vlm.config.about["slices"])]
            return {label: float(np.mean([c[label] for c in each])) for label in each[0]}
        name, features, *_ = self._look(picture)
        head = self.vlm.head("classify", name)
        chances = dict(zip(head.labels, head.probabilities(head(features[name]))[0].tolist()))
        for whole, kinds in KINDS.items():
            if whole in chances:  # a kind of pneumonia is a pneumonia
                chances[whole] = max([chances[whole], *(chances[k] for k in kinds if k in chances)])
        return chances

    def _outline(self, picture: Image | Volume, targets: Sequence[str]) -> list[Segmentation]:
        """:meth:`_outlined` of these targets; what was outlined on the last picture is kept."""
        if self._last is None or self._last[0] is not picture:
            self._last = picture, {}
        kept = self._last[1]
        if missing := [t for t in dict.fromkeys(targets) if t not in kept]:
            kept |= zip(missing, self._outlined(picture, missing))
        return [replace(kept[t], mask=kept[t].mask.copy()) for t in targets]

    @torch.no_grad()
    def _outlined(self, picture: Image | Volume, targets: Sequence[str]) -> list[Segmentation]:
        """Each target from its own [SEG] state; an empty mask where it is more likely absent."""
        if self.vlm.lm is None:
            raise ModelError(f"{self.name} outlines no named target: it has no language model", "UNSUPPORTED_VERB", "give points or boxes")
        around = {t: outer for t, outer in self.vlm.config.about.get("within", {}).get(self._kind(picture), {}).items() if t in targets}
        wanted = tuple(dict.fromkeys((*targets, *around.values())))
        drawn = dict(zip(wanted, self._stacked(picture, wanted) if self._sliced(picture) else self._drawn({picture.id: picture}, _outlining(wanted), wanted)))
        return [self._settled(drawn[t], drawn.get(around.get(t))) for t in targets]

    def presence(self, picture: Image | Volume, targets: Sequence[str]) -> list[float]:
        """Calibrated chance that each target is in the picture, or in any of a volume's slices; nothing is drawn."""
        if self._sliced(picture):
            return np.max([self.presence(one, targets) for one in self._slices(picture, 2 * self.vlm.config.about["slices"])], 0).tolist()
        return self._prompts_of({picture.id: picture}, _outlining(targets), targets)[1]

    @torch.no_grad()
    def _stacked(self, volume: Volume, targets: Sequence[str]) -> list[Segmentation]:
        """Targets known by name on every slice of a volume; empty where the target is more likely in none."""
        chances, slices = self.presence(volume, targets), self._slices(volume, volume.reorient(UPRIGHT).shape[1])
        name = self.vlm.route(volume.modality)[0]
        head, spec = self.vlm.head("mask", name), self.vlm.encoders[name].spec
        index = [head.labels.index(t) for t in targets]
        masks = np.zeros((len(targets), len(slices), *slices[0].shape[1:]), bool)
        for start in range(0, len(slices), AT_ONCE):
            tensors, frames = zip(*(to_tensor(one, spec) for one in slices[start : start + AT_ONCE]))
            maps = head.outlines(self.vlm.encode({name: torch.stack(tensors).to(self.vlm.device)})[name])[:, index]
            for k, (frame, each) in enumerate(zip(frames, maps)):
                masks[:, start + k] = frame.masks(each)
        own = [np.ascontiguousarray(turned(m, UPRIGHT, volume.orientation)) for m in masks]
        return [Segmentation(volume, t, m if c >= PRESENT else np.zeros_like(m), c) for t, m, c in zip(targets, own, chances)]

    def _settled(self, drawn: Segmentation, around: Segmentation | None = None) -> Segmentation:
        """An outline as it is given: of what lies within another (``about["within"]``: lungs in the body, not in the air beside it) without the parts that
        lie outside it, and there the less surely the more of it lies outside; of what is of one piece (``about["whole"]``) without islands."""
        whole, apart = drawn.label in self.vlm.config.about.get("whole", ()), around is not None and around.mask.any()
        if not (whole or apart) or not drawn.mask.any():
            return drawn
        kept, chance = _parts(drawn.mask), drawn.present
        if apart:
            every, kept = kept, [p for p in kept if 2 * (p & around.mask).sum() >= p.sum()]
            chance *= float(sum(p.sum() for p in kept) / sum(p.sum() for p in every))
            kept = kept if chance >= PRESENT else []
        if whole:
            kept = [p for p in kept if p.sum() >= ISLAND * kept[0].sum()]
        return replace(drawn, mask=np.logical_or.reduce([np.zeros_like(drawn.mask), *kept]), present=chance)

    def _named(self, images: Mapping[str, Image | Volume], turns: Sequence[Turn], text: str) -> tuple[Region, ...]:
        """What the marks of an answer outline on the first image, each called as the words before it call it; what is absent is left out."""
        said = [" ".join(words.split()) for words in text.split(SEG)[:-1]]
        known = [max((t for t in self.targets if t.lower() in w.lower()), key=lambda t: w.lower().rfind(t.lower()), default=w) for w in said]
        drawn = map(self._settled, self._drawn(images, [(*turns, Turn("assistant", text))], known))
        return tuple(replace(s.region, image=next(iter(images))) for s in drawn if s.mask.any())

    @torch.no_grad()
    def _drawn(self, images: Mapping[str, Image | Volume], conversations: Sequence[Sequence[Turn]], targets: Sequence[str]) -> list[Segmentation]:
        """What each <|seg|> of these conversations outlines on the first image, in reading order; targets: its names, one each."""
        picture = next(iter(images.values()))
        prompts, chances = self._prompts_of(images, conversations, targets)
        there = [k for k, c in enumerate(chances) if c >= PRESENT]
        logits, frame = self._draw(picture, prompts, there) if there else ((), None)
        masks = dict(zip(there, (frame.masks(each[None])[0] for each in logits)))
        return [Segmentation(picture, t, masks[k] if k in masks else np.zeros(picture.shape[1:], bool), chances[k]) for k, t in enumerate(targets)]

    @torch.no_grad()
    def _prompts_of(self, images, conversations: Sequence[Sequence[Turn]], targets: Sequence[str]) -> tuple[Prompts, list[float]]:
        """What each <|seg|> of these conversations says to the mask head, and the calibrated chance that it is there."""
        name, _, embedding, _ = self._look(next(iter(images.values())))
        batch, features = self._batch(images, conversations)
        states = self.vlm.seg_states(batch, self.vlm(**batch.inputs(), features=features))
        head = self.vlm.head("mask", name)
        named = torch.tensor([head.labels.index(t) if t in head.labels else -1 for t in targets], device=self.vlm.device)
        prompts = _prompts(len(targets), self.vlm.device, tokens=states, named=named)
        none = torch.zeros(len(targets), dtype=torch.bool, device=self.vlm.device)
        picture = next(iter(images.values()))
        scale, shift = self.vlm.config.about.get("calibration", {}).get("present", {}).get(self._kind(picture), (1.0, 0.0))
        logits = self._present_closely(picture, prompts, head.decode(embedding, replace(prompts, draw=none)).present)
        present = head.probability(logits * scale + shift).tolist()
        return prompts, [p * may for p, may in zip(present, self._may_show(picture, targets))]

    def _closely(self, picture: Image | Volume) -> Tiles | None:
        """Windows over a picture of a kind that is looked at closely: at ``about["zoom"]`` times the resolution at which the whole
        fits the encoder, or at ``about["scale"]`` pixels of the input for one of the picture. None for what is seen whole."""
        name, _, _, frame = self._look(picture)
        about, kind = self.vlm.config.about, self._kind(picture)
        zoom = about.get("zoom", {}).get(kind, 1.0)
        if closer := about.get("scale", {}).get(kind):
            zoom = min(LARGEST, max(1.0, closer / max(frame.scale)))
        return None if zoom == 1.0 else tiles(picture, self.vlm.encoders[name].spec, zoom)

    def _present_closely(self, picture: Image | Volume, prompts: Prompts, whole: torch.Tensor) -> torch.Tensor:
        """(P,) logits of the presence in the picture, ``whole``, or in any of the windows in which the kind is outlined: in the whole, a few small nuclei are lost."""
        name = self._look(picture)[0]
        head, spec = self.vlm.head("mask", name), self.vlm.encoders[name].spec
        learnt = self.vlm.config.about.get("outlined", {}).get(self._kind(picture), ())
        wanted = [k for k, at in enumerate(prompts.named.tolist()) if at >= 0 and head.labels[at] in learnt]
        if head.ladder is None or not wanted or (tiled := self._closely(picture)) is None:
            return whole
        found = [whole[wanted]]
        for group in _grouped(inputs(picture, spec, tiled.frames), AT_ONCE):
            embedding = head.embed(self.vlm.encode({name: torch.stack(group).to(self.vlm.device)})[name])
            each = torch.arange(len(group), device=self.vlm.device).repeat_interleave(len(wanted))
            chosen = torch.tensor(wanted, device=self.vlm.device).repeat(len(group))
            asked = Prompts(each, tokens=prompts.tokens[chosen], named=prompts.named[chosen], draw=torch.zeros_like(each, dtype=torch.bool))
            found += head.decode(embedding, asked).present.reshape(len(group), len(wanted))
        whole = whole.clone()
        whole[wanted] = torch.stack(found).amax(0)
        return whole

    def _may_show(self, picture: Image | Volume, targets: Sequence[str]) -> list[float]:
        """The chance that the picture is of a kind in which each target was learnt (``about["outlined"]``).

        1 for what is not learnt by name, and of a model that does not say what it learnt where.
        """
        outlined = self.vlm.config.about.get("outlined", {})
        named = {t for group in outlined.values() for t in group}
        if not named.intersection(targets):
            return [1.0] * len(targets)
        kinds = self._kinds(picture)
        return [sum(p for k, p in kinds.items() if t in outlined.get(k, ())) if t in named else 1.0 for t in targets]

    def _draw(self, picture: Image | Volume, prompts: Prompts, wanted: Sequence[int]) -> tuple[torch.Tensor, Frame]:
        """(len(wanted), *grid) logits of words, and where their maps lie: from windows where the model looks closer at this kind of
        picture, for targets too thin to see in the whole. What the words mean comes from the whole image. Where a kind has no sides
        (``about["unsided"]``) what is known by name is the mean of the four ways to mirror it."""
        name, _, embedding, frame = self._look(picture)
        head, about = self.vlm.head("mask", name), self.vlm.config.about
        chosen = torch.tensor(wanted, device=self.vlm.device)
        prompts = Prompts(prompts.image[chosen], tokens=prompts.tokens[chosen], named=prompts.named[chosen])
        by_name = head.ladder is not None and bool((prompts.named >= 0).all())
        ways = ((), (-1,), (-2,), (-2, -1)) if by_name and self._kind(picture) in about.get("unsided", ()) else ((),)

        def draw(windows: torch.Tensor) -> torch.Tensor:
            if not by_name:
                return self._decoded_maps(head, self.vlm.encode({name: windows})[name], prompts)
            return torch.stack([head.outlines(self.vlm.encode({name: windows.flip(way)})[name])[:, prompts.named].flip(way) for way in ways]).mean(0)

        spec = self.vlm.encoders[name].spec
        if (tiled := self._closely(picture)) is None:
            if len(ways) > 1:
                return draw(to_tensor(picture, spec)[0][None].to(self.vlm.device))[0], frame
            return (head.maps(embedding)[0, prompts.named] if by_name else _even(head.decode(embedding, prompts).logits)), frame
        return blend(tiled, (one for group in _grouped(inputs(picture, spec, tiled.frames), AT_ONCE if by_name else 1) for one in draw(torch.stack(group).to(self.vlm.device)))), tiled.whole

    @staticmethod
    def _decoded_maps(head, features: Features, prompts: Prompts) -> torch.Tensor:
        return _even(head.decode(head.embed(features), prompts).logits)[None]

    @torch.no_grad()
    def _prompted(self, picture: Image, label: str, points, boxes) -> Segmentation:
        name, _, embedding, frame = self._look(picture)
        if embedding is None:
            raise ModelError(f"{self.name} has no head that outlines", "UNSUPPORTED_VERB", "use another model for this verb")
        device = self.vlm.device
        prompt: dict = {}
        if points is not None:
            given = clicks(points, picture)
            centres = frame.to_input(given[:, :-1] + 0.5) - 0.5
            prompt |= {"points": torch.tensor(centres, device=device).float()[None], "labels": torch.tensor(given[:, -1], device=device).long()[None]}
        if boxes is not None:
            prompt["boxes"] = torch.tensor(frame.box_to_input(corners(boxes, picture)), device=device).float()[None]
        head = self.vlm.head("mask", name)
        drawn = head.decode(embedding, _prompts(1, device, **prompt))
        mask = frame.masks(_even(drawn.logits))[0]
        return Segmentation(picture, label, mask, float(mask.any()))


def _outlining(targets: Sequence[str]) -> list[tuple[Turn, ...]]:
    """A conversation for each target, which asks for its outline."""
    return [(*_turns(f"Segment the {t}."), Turn("assistant", SEG)) for t in targets]


def _grouped(items, size: int):
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _turns(question: str) -> tuple[Turn, ...]:
    return (Turn("user", question.replace("<|", "< |")),)  # a question places no image


def _unmarked(text: str) -> str:
    return re.sub(r"\s*" + re.escape(SEG), "", text).strip()


def _joined(group: Sequence[Features]) -> Features:
    if len(group) == 1:
        return group[0]
    levels = tuple(torch.cat(level) for level in zip(*(f.levels for f in group)))
    return Features(torch.cat([f.tokens for f in group]), group[0].grid, torch.cat([f.pooled for f in group]), levels)


def _even(logits: torch.Tensor) -> torch.Tensor:
    """(P, *grid) averaged over 3 cells an axis: the decoder's transposed convolutions leave a checkerboard along the edges."""
    pool = {3: torch.nn.functional.avg_pool2d, 4: torch.nn.functional.avg_pool3d}[logits.ndim]
    return pool(logits[:, None], 3, 1, 1, count_include_pad=False)[:, 0]


def _prompts(count: int, device, **given) -> Prompts:
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
    >>> choices_of("Can you describe the findings?")
    """
    if not _CLOSED.match(question) or _REQUEST.match(question):
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
    """Connected parts, largest first; but for the largest, specks below ``least`` of the whole are left out."""
    from scipy.ndimage import label

    numbered, count = label(mask)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    return [numbered == k + 1 for rank, k in enumerate(np.argsort(-sizes)) if rank == 0 or sizes[k] >= least * mask.sum()]


def _words(name: str) -> str:
    """A name as it is typed or as a data set writes it ("right_lung"), in this toolkit's words, lower case."""
    return sentences.spoken(" ".join(name.lower().split())).lower()
