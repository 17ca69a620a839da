"""Contrastive models of open_clip (CLIP, SigLIP, BiomedCLIP, QuiltNet, ...): zero-shot classes and embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError
from ..evaluate.zeroshot import PROMPTS, prompts_of
from ..imaging import window
from ..imaging.scan import Image, Study, Volume
from ..sample import Prediction, Sample
from .base import Model, by_prompts, digest, pick, place, words_of

TOKENIZER_ARGUMENTS = {"clean", "strip_sep_token", "language", "reduction_mask", "additional_special_tokens"}
"""What a folder may ask of its tokenizer; open_clip hands the rest to transformers, "trust_remote_code" among it."""
KEPT = 64
"""Sets of labels and prompts whose embeddings are kept."""


def load(rest: str, device: str | None = None) -> OpenClipModel:
    """A contrastive model.

    Args:
        rest: a folder that open_clip wrote (open_clip_config.json, weights and, where its text tower is a transformers
            model, the tokenizer and that tower's config.json), read without the network; "hf-hub:ORG/NAME", the same
            from the hub; or "NAME@WEIGHTS", one of open_clip's architectures with a file of weights, or with a tag of its
            own list, which is fetched.

    Raises:
        ModelError: NO_SUCH_PART when there is no such model; BAD_CHECKPOINT when files are missing, incomplete or would
            run code.
    """
    import open_clip

    name, _, source = rest.partition("@")
    folder, hub = Path(rest.removeprefix("local-dir:")), rest.startswith("hf-hub:")
    if hub:
        folder = _fetched(rest.removeprefix("hf-hub:"))
    if folder.is_dir():
        where, source, options = f"local-dir:{folder}", None, _safe(folder, hub)
        files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin"), *folder.glob("*.pth")]
    elif name in open_clip.list_models() and source:
        where, options, files = name, {}, [Path(source)]
    else:
        raise ModelError(f"there is no contrastive model {rest!r}", "NO_SUCH_PART",
                         "give openclip:FOLDER, openclip:hf-hub:ORG/NAME or openclip:NAME@WEIGHTS (see open_clip.list_pretrained())")  # fmt: skip
    try:
        clip, preprocess = open_clip.create_model_from_pretrained(where, source, weights_only=True, **options)
        tokenizer = open_clip.get_tokenizer(where)
    except Exception as error:  # unpickling, JSON, hub and torch fail in every way; torch's own text would tell how to run a pickle's code
        said = type(error).__name__ if "weights_only" in str(error) else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ModelError(f"the contrastive model cannot be read, and nothing in it was run ({said})", "BAD_CHECKPOINT",
                         "give open_clip's own files, best with safetensors") from error  # fmt: skip
    sha256 = digest(files[0]) if len(files) == 1 and files[0].is_file() else None
    return OpenClipModel(place(clip, device), preprocess, tokenizer, rest.rpartition("/")[2] if hub else folder.name if source is None else name, sha256)


class OpenClipModel(Model):
    """Zero-shot classes and embeddings of single pictures. Its own preprocessing decides what is seen: most of these models
    cut a picture to the square in its middle."""

    def __init__(self, clip, preprocess, tokenizer, name: str, sha256: str | None = None):
        self.clip, self.preprocess, self.tokenizer = clip, preprocess, tokenizer
        self.name, self.sha256 = name, sha256
        self.device, self.bias = clip.logit_scale.device, getattr(clip, "logit_bias", None)
        self._seen: tuple[Image, Tensor] | None = None
        self._classes: dict[tuple, Tensor] = {}

    def classify(self, study, labels, image=None, prompts: str | None = None) -> dict[str, float]:
        """{label: probability} as :func:`by_prompts` gives them.

        prompts: a name in ``PROMPTS``; None for what :func:`prompts_of` says of the picture's modality.

        Raises:
            ModelError: OUT_OF_SCOPE for a volume; QUESTION_TOO_LONG for a label that the text tower would cut; BAD_ARGUMENT for
                unknown prompts, and for one label alone that has nothing to compete with.
        """
        labels = [labels] if isinstance(labels, str) else list(labels)
        picture = self._picture(study, image)
        return by_prompts(labels, picture.modality, prompts, self.bias is not None, lambda templates: self._logits(picture, labels, templates))

    def _judged(self, study, labels, prompts):
        return self.classify(study, labels, prompts=prompts)

    @torch.no_grad()
    def embed(self, study_or_text, image=None) -> np.ndarray:
        """float32 (D,), unit length. A str is a text; files are given as ``pathlib.Path``, Study or Image.

        Raises:
            ModelError: BAD_ARGUMENT for an empty text and for a str that names a file; QUESTION_TOO_LONG; OUT_OF_SCOPE.
        """
        if (text := words_of(study_or_text)) is None:
            return self._look(self._picture(study_or_text, image))[0].cpu().numpy()
        return self.clip.encode_text(self._tokens([text]), normalize=True)[0].float().cpu().numpy()

    def _answer(self, sample: Sample) -> Prediction:
        """The choice of highest probability; of a sample with labels, the chance of each by itself."""
        study = Study(sample.id, sample.patient, tuple(sample.images.values()))
        if sample.choices:
            chances = dict(zip(sample.choices, self._logits(self._picture(study, None), list(sample.choices)).softmax(0).tolist()))
        elif sample.labels:
            chances = {label: self.classify(study, [label])[label] for label in sample.labels}
        else:
            raise self._cannot("ask")
        text = max(chances, key=chances.get)
        return Prediction(sample.id, text, chances[text], chances)

    @torch.no_grad()
    def _logits(self, picture: Image, labels: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """(len(labels),) scaled cosines of the picture to each label's mean prompt."""
        import open_clip

        templates = templates or PROMPTS[prompts_of(picture.modality, False)][0]
        key = tuple(labels), tuple(templates)
        if key not in self._classes:
            if len(self._classes) >= KEPT:
                del self._classes[next(iter(self._classes))]
            self._classes[key] = open_clip.build_zero_shot_classifier(self.clip, self._tokens, labels, templates, device=self.device)
        logits = self.clip.logit_scale.exp() * self._look(picture) @ self._classes[key]
        return (logits if self.bias is None else logits + self.bias)[0].float().cpu()

    @torch.no_grad()
    def _look(self, picture: Image) -> Tensor:
        """(1, D) of the last picture, kept."""
        from PIL import Image as Picture

        if self._seen is None or self._seen[0] is not picture:
            pixels = self.preprocess(Picture.fromarray(window.display(picture)).convert("RGB"))
            self._seen = picture, self.clip.encode_image(pixels[None].to(self.device), normalize=True).float()
        return self._seen[1]

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), context), none of them cut short."""
        context = self.tokenizer.context_length
        wide = self.tokenizer(texts, context_length=2 * context)  # what does not fit stands where padding would
        for text, row in zip(texts, wide):
            if (row[context:] != row[-1]).any():
                raise ModelError(f"the text {text[:60]!r}... is longer than the {context} tokens that {self.name} reads", "QUESTION_TOO_LONG", "shorten it")
        return self.tokenizer(texts).to(self.device)

    def _picture(self, study, image: str | None) -> Image:
        picture = pick(study, image)
        if isinstance(picture, Volume):
            raise ModelError(f"{self.name} sees single pictures; image {picture.id} is a {picture.modality} volume of {picture.shape[1]} slices",
                             "OUT_OF_SCOPE", "choose a slice and give it as an Image")  # fmt: skip
        return picture


def _fetched(name: str) -> Path:
    """The files of a hub model, in the hub's own cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "open_clip_pytorch_model.bin"]))
    except Exception as error:  # no network, no such name, no permission: the hub has a kind for each
        raise ModelError(f"the model {name!r} cannot be fetched from the hub ({type(error).__name__})", "NO_SUCH_PART", "check the name and the network") from error


def _safe(folder: Path, hub: bool) -> dict[str, Any]:
    """What to override in a folder's configuration, so that reading it runs no code and fetches nothing that was not asked for.

    A text tower of transformers is described by the folder's own config.json; where there is none, a hub model's is
    fetched by the name that open_clip_config.json gives.
    """
    config = _json(folder / "open_clip_config.json").get("model_cfg")
    if not isinstance(config, dict) or not isinstance(config.get("text_cfg"), dict) or not isinstance(config.get("vision_cfg"), dict):
        raise ModelError("the folder's open_clip_config.json describes no model", "BAD_CHECKPOINT", "give open_clip's own files")
    for file in folder.glob("*.json"):
        if "auto_map" in file.read_text("utf-8", "replace"):
            raise ModelError("the model asks to run code of its own (auto_map), which is never done", "BAD_CHECKPOINT", "use a model whose code is part of transformers")
    text, vision = dict(config["text_cfg"]), config["vision_cfg"]
    if unsafe := sorted((text.get("tokenizer_kwargs") or {}).keys() - TOKENIZER_ARGUMENTS):
        raise ModelError(f"the model's tokenizer may not be given {', '.join(unsafe)[:100]}", "BAD_CHECKPOINT", "remove tokenizer_kwargs from open_clip_config.json")
    if ":" in str(vision.get("timm_model_name")):
        raise ModelError("the image tower names a place to fetch it from instead of a timm model", "BAD_CHECKPOINT", "give a name of timm.list_models()")
    if not text.get("hf_model_name"):
        return {}
    if (folder / "config.json").is_file():
        return {"text_cfg": {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}}
    if not hub:
        raise ModelError("the folder lacks the config.json of its text tower, a transformers model", "BAD_CHECKPOINT",
                         f"put the config.json of {str(text['hf_model_name'])[:80]!r} into it")  # fmt: skip
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(text["hf_model_name"], trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"the text tower's configuration cannot be read ({type(error).__name__})", "BAD_CHECKPOINT", "check the network") from error
    return {}


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the folder has no readable {path.name}", "BAD_CHECKPOINT", "give open_clip's own files") from error
    return found if isinstance(found, dict) else {}
