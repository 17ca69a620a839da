"""A model's inputs out of text and images, in transformers' manner: ``processor(text=..., images=...)``.

It is saved beside the model, and says what each encoder was trained to see and how many tokens its images take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .errors import ModelError
from .imaging.scan import Image, Study, Volume
from .language import IMAGE
from .preprocess import InputSpec, to_tensor


class MedVLMProcessor(ProcessorMixin):
    """specs: {encoder: InputSpec's fields and "count", the tokens of an image}. routes: {modality: encoder or list of them}."""

    def __init__(self, tokenizer=None, specs: Mapping[str, Mapping[str, Any]] | None = None, routes: Mapping[str, Any] | None = None, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))
        self.specs, self.routes = dict(specs or {}), dict(routes or {})
        self.image_token = IMAGE

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_order"]

    def __call__(self, images=None, text=None, modality: str | None = None, padding=True, padding_side: str = "left", return_tensors: str = "pt", **more):
        """Tokens and pixels of one or several prompts.

        Args:
            text: one prompt or a list of them, each with one ``<|image|>`` for each of its images.
            images: in the order in which the marks stand, over all prompts: Image, Volume, Study or path (what
                ``medvlm.read`` takes), PIL image or array (H, W[, 3]). Lists, one a prompt, are flattened.
            modality: of images that do not say theirs.
            more: further arguments of the tokenizer.

        Returns:
            BatchFeature with input_ids, attention_mask (B, T), pixel_values {encoder: (K, channels, *size)} and
            image_order [(encoder, k)].

        Raises:
            ModelError: PLACEHOLDERS when marks and images differ in number.
        """
        text = [text] if isinstance(text, str) else list(text or [])
        pictures = [_image(x, modality) for x in _flat(images)]
        marks = sum(t.count(IMAGE) for t in text)
        if marks != len(pictures):
            raise ModelError(f"the text holds {marks} {IMAGE} but {len(pictures)} images were given", "PLACEHOLDERS")
        pixels: dict[str, list[torch.Tensor]] = {}
        order, widths = [], []
        for picture in pictures:
            runs = self._route(picture.modality)
            for name in runs:
                fields = {k: tuple(map(tuple, v)) if k == "windows" else tuple(v) if isinstance(v, list) else v for k, v in self.specs[name].items() if k != "count"}
                order.append((name, len(pixels.setdefault(name, []))))
                pixels[name].append(to_tensor(picture, InputSpec(**fields))[0])
            widths.append(sum(self.specs[name]["count"] for name in runs))
        width = iter(widths)
        text = ["".join(part if k == 0 else IMAGE * next(width) + part for k, part in enumerate(t.split(IMAGE))) for t in text]
        found = self.tokenizer(text, padding=padding, padding_side=padding_side, return_tensors=return_tensors, add_special_tokens=False, **more)
        data = {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}
        if pictures:
            data |= {"pixel_values": {name: torch.stack(group) for name, group in pixels.items()}, "image_order": order}
        return BatchFeature(data)

    def _route(self, modality: str) -> Sequence[str]:
        names = self.routes.get(modality, self.routes.get("*"))
        if not names:
            raise ModelError(f"no encoder sees {modality} images; there are encoders for {', '.join(self.routes)}", "OUT_OF_SCOPE")
        return [names] if isinstance(names, str) else names


def _flat(images) -> list:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [x for group in images for x in _flat(group)]
    return [images]


def _image(source, modality: str | None) -> Image | Volume:
    from .imaging.study import read

    if isinstance(source, Image | Volume):
        return source
    if not isinstance(source, Study):
        if hasattr(source, "convert"):  # PIL
            source = np.asarray(source if source.mode in ("L", "RGB", "I;16", "I", "F") else source.convert("RGB"))
        if isinstance(source, np.ndarray) and source.ndim == 3 and source.shape[-1] in (1, 3) and source.shape[0] not in (1, 3):
            source = source.transpose(2, 0, 1)
        source = read(source, modality=modality)
    return source.image(None)
