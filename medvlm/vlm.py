"""MedVLM: encoders feed a language model through projectors, heads draw and score.

``config.parts`` = {part: {name: {"file", "args"}}} builds everything; recipe, checkpoint and ``from_pretrained`` share it.
Importing this module makes transformers know ``model_type="medvlm"``: AutoConfig, AutoModelForImageTextToText, AutoProcessor.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from . import language
from .encoders.base import Features
from .errors import ModelError
from .heads.mask import Masks, Prompts
from .language import Batch
from .parts import find
from .preprocess import normalise
from .processor import MedVLMProcessor

FOLDERS = ("encoders", "projectors", "heads")


class MedVLMConfig(PretrainedConfig):
    """parts: what to build. about: what the model knows (routes, labels, targets, findings, calibration), for predictors."""

    model_type = "medvlm"

    def __init__(self, parts=None, about=None, image_token_id=None, seg_token_id=None, **kwargs):
        self.parts, self.about = parts or {}, about or {}
        self.image_token_id, self.seg_token_id = image_token_id, seg_token_id
        super().__init__(**kwargs)

    def to_json_string(self, use_diff: bool = True) -> str:
        """As transformers writes it, but parts and routes in their order: the first encoder is the one that plain heads read."""
        return json.dumps({**json.loads(super().to_json_string(use_diff)), "parts": self.parts, "about": self.about}, indent=2) + "\n"


@dataclass
class Output(ModelOutput):
    """loss: mean cross-entropy of the labels, None without them. logits (B, K, V) of the columns ``at`` (K,), all of them
    unless asked. hidden (B, T, lm_dim). features {encoder: Features}."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None
    features: dict[str, Features] | None = None
    at: Tensor | None = None


class MedVLM(PreTrainedModel, GenerationMixin):
    """A vision-language model for medical images.

    Encoders are chosen by image modality (``config.about["routes"]``: an encoder's name or a list of them, whose tokens
    then follow one another; "*" for all others). Loading builds parts only from this package's folders or installed entry
    points, never from a path named in the checkpoint. A part's ``weights`` argument is read when a model is made, and
    then forgotten: a saved model holds its own.
    """

    config_class = MedVLMConfig
    base_model_prefix = "medvlm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: MedVLMConfig):
        super().__init__(config)
        _spelt(config.parts)
        if torch.get_default_device().type == "meta" and (named := [n for n, args in _arguments(config.parts) if "weights" in args]):
            raise ModelError(f"the configuration of a saved model asks for other weights ({', '.join(named)})", "BAD_CHECKPOINT",
                             'remove "weights" from its config.json')  # fmt: skip
        # transformers builds on the meta device; parts hold buffers computed at construction, so build them for real
        with torch.device("cpu"):
            for folder in FOLDERS:
                parts = config.parts.get(folder, {})
                setattr(self, folder, nn.ModuleDict({name: build_part(folder, **part) for name, part in parts.items()}))
            lm = config.parts["language"]["lm"]["args"] if "language" in config.parts else None
            self.lm = None if lm is None else language.build(**lm)
        for name, projector in self.projectors.items():
            self._fits(name, projector)
        self.unread = frozenset(n for n, p in self.named_parameters() if not p.requires_grad)  # by a part's own word: never trained
        config.parts = copy.deepcopy(config.parts)
        for name, part in config.parts.get("encoders", {}).items():
            if (part.get("args") or {}).get("weights") and getattr(self.encoders[name], "arguments", None):
                part["args"] = self.encoders[name].arguments  # the weights told its shape and how its input is prepared
        for _, args in _arguments(config.parts):
            args.pop("weights", None)
        if lm is not None and "weights" in lm:
            config.parts["language"]["lm"]["args"] = language.arguments(self.lm)
        for module in self.modules():
            module._non_persistent_buffers_set.clear()  # else a reload leaves them as uninitialised memory
            # the parts' own initialisation stands; were the parameters marked too, missing weights would not be reported
            module._is_hf_initialized = True
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **options):
        """As transformers', and every weight in memory of its own: inside a file's memory some lie where the processor adds up in another order."""
        made = super().from_pretrained(*args, **options)
        for held in (*(model := made[0] if isinstance(made, tuple) else made).parameters(), *model.buffers()):
            if held.device.type == "cpu" and held.data_ptr() % 64:
                held.data = held.data.clone()
        return made

    def _fits(self, name: str, projector: nn.Module) -> None:
        """A wrong pairing is refused when the model is made, both sides named."""
        if name not in self.encoders:
            raise ModelError(f"projector {name!r} has no encoder of that name; there are: {', '.join(self.encoders)}", "BAD_RECIPE")
        takes, gives = getattr(projector, "dim", None), self.encoders[name].dim
        if takes not in (None, gives):
            raise ModelError(f"encoder {name!r} gives tokens of {gives} numbers but its projector takes {takes}", "BAD_RECIPE", "give the projector the encoder's dim")
        self.count(name)

    def route(self, modality: str) -> tuple[str, ...]:
        """Names of the encoders that see images of this modality; heads read the first one.

        Raises:
            ModelError: OUT_OF_SCOPE when none does.
        """
        routes = self.config.about.get("routes", {})
        names = routes.get(modality, routes.get("*"))
        if not names:
            raise ModelError(f"no encoder of this model sees {modality} images; it sees {', '.join(routes)}", "OUT_OF_SCOPE")
        return (names,) if isinstance(names, str) else tuple(names)

    def count(self, name: str) -> int:
        """Placeholder tokens that an image of this encoder takes: none without a projector, when only heads see it."""
        return self.projectors[name].count(self.encoders[name].grid()) if name in self.projectors else 0

    def tokens(self, modality: str) -> int:
        """Placeholder tokens that an image of this modality takes."""
        return sum(self.count(name) for name in self.route(modality))

    def head(self, kind: str, encoder: str) -> nn.Module | None:
        """The head of a kind that reads an encoder: ``kind_encoder``, or plain ``kind`` for the first encoder; None without."""
        name = f"{kind}_{encoder}"
        if name not in self.heads and encoder == next(iter(self.encoders)):
            name = kind
        return self.heads[name] if name in self.heads else None

    @property
    def guided(self) -> bool:
        """Whether the question changes what an image's tokens are, so that questions cannot share them."""
        return any(getattr(p, "guided", False) for p in self.projectors.values())

    @functools.cached_property
    def plain_head(self) -> bool:
        """Whether logits are the output layer on the last hidden states and nothing more (no scale, no cap): found by trying."""
        if self.lm is None:
            return False
        training = self.lm.training
        self.lm.eval()
        with torch.no_grad():
            embeds = self.lm.get_input_embeddings()(torch.arange(4, device=self.device)[None] % self.lm.config.vocab_size)
            out = self.lm(inputs_embeds=embeds, output_hidden_states=True)
            plain = torch.allclose(self.lm.get_output_embeddings()(out.hidden_states[-1]), out.logits, rtol=1e-3, atol=1e-4)
        self.lm.train(training)
        return bool(plain)

    def processor(self, tokenizer) -> MedVLMProcessor:
        """What makes this model's inputs out of text and images, to be saved beside it."""
        routes = self.config.about.get("routes", {})
        seen = {*self.projectors, *(n for m in routes for n in self.route(m))} if len(self.projectors) else ()
        specs = {name: vars(e.spec) | {"count": self.count(name)} for name, e in self.encoders.items() if name in seen}
        return MedVLMProcessor(tokenizer, specs, routes)

    def get_input_embeddings(self):
        return self.lm.get_input_embeddings()

    def get_output_embeddings(self):
        return self.lm.get_output_embeddings()

    def encode(self, images: Mapping[str, Tensor]) -> dict[str, Features]:
        """{encoder: (K, C, *size) in [0, 1]} -> its features."""
        return {
            name: self.encoders[name](normalise(x.to(self.device, torch.float32), self.encoders[name].spec).to(self.dtype))
            for name, x in images.items() if len(x)
        }  # fmt: skip

    def splice(self, ids: Tensor, features: Mapping[str, Features], order: Sequence[tuple[str, int]], words: Tensor | None = None) -> Tensor:
        """(B, T, lm_dim) embeddings with image tokens in the place of their placeholders.

        words: (B, T) true on what was asked, for projectors that the question guides.

        Raises:
            ModelError: PLACEHOLDERS when a row does not hold as many as its images give.
        """
        embeds = self.lm.get_input_embeddings()(ids)
        order, where = [at for at in order if at[0] in self.projectors], ids == (-1 if self.config.image_token_id is None else self.config.image_token_id)
        rows = self._rows(where, order)
        asked = words if words is not None else ~where
        tokens: dict[int, Tensor] = {}
        for name, f in features.items():
            runs = [i for i, (n, _) in enumerate(order) if n == name]
            if name not in self.projectors or not runs:
                continue
            projector, which = self.projectors[name], [order[i][1] for i in runs]
            if getattr(projector, "guided", False):
                lines = [rows[i] for i in runs]
                query = (embeds[lines] * asked[lines][..., None]).sum(1) / asked[lines].sum(1, keepdim=True).clamp(min=1)
                tokens |= zip(runs, projector(Features(f.tokens[which], f.grid, f.pooled[which]), query))
            else:
                tokens |= zip(runs, projector(f)[which])
        if not tokens:
            return embeds
        return embeds.masked_scatter(where[..., None], torch.cat([tokens[i] for i in range(len(order))]).to(embeds.dtype))

    def _rows(self, where: Tensor, order: Sequence[tuple[str, int]]) -> list[int]:
        """The row that each placeholder run stands in."""
        held, rows, row = where.sum(1).tolist(), [], 0
        left = list(held)
        for name, _ in order:
            need = self.count(name)
            while row < len(left) and left[row] == 0:
                row += 1
            if row == len(left) or left[row] < need:
                break
            left[row] -= need
            rows.append(row)
        if any(left) or len(rows) != len(order):
            given = sum(self.count(name) for name, _ in order)
            raise ModelError(f"the text holds {held if len(held) > 1 else held[0]} image placeholders but the images give {given} tokens", "PLACEHOLDERS",
                             "was the text cut?")  # fmt: skip
        return rows

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, pixel_values: Mapping[str, Tensor] | None = None,
        image_order: Sequence[tuple[str, int]] | None = None, labels: Tensor | None = None,
        features: Mapping[str, Features] | None = None, logits_to_keep: Tensor | None = None, position_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> Output:  # fmt: skip
        """Logits and hidden states, and the loss where labels are given; features alone of a model without a language model.

        Args:
            input_ids, attention_mask, labels: (B, T); -100 in labels where nothing is learnt.
            pixel_values: {encoder: (K, channels, *size) in [0, 1]}, as :class:`MedVLMProcessor` gives them.
            image_order: (encoder, k) of each placeholder run in reading order over the batch; one after the other when None.
            features: of the images, when they are known already.
            logits_to_keep: columns whose logits are wanted; all when None.
            position_ids: (B, T), given where conversations share a row: ``attention_mask`` then numbers them, 0 for padding.

        Raises:
            ModelError: PLACEHOLDERS; BAD_RECIPE for shared rows where the question guides the image's tokens.
        """
        if not return_dict:
            raise ModelError("MedVLM answers with named outputs only", "BAD_ARGUMENT", "leave return_dict=True")
        features = self.encode(pixel_values or {}) if features is None else features
        if self.lm is None:
            return Output(features=dict(features))
        seen = attention_mask
        if position_ids is not None:
            if self.guided:
                raise ModelError("a row that conversations share has no one question to guide the image's tokens", "BAD_RECIPE", "leave pack out of the stage")
            if not language.share_rows(self.lm):
                raise ModelError("conversations that share a row would leak into each other in this language model", "BAD_RECIPE", "leave pack out of the stages")
            seen = language.apart(attention_mask)
        elif attention_mask is not None and bool(attention_mask[:, 0].all()):
            seen = None  # padding stands behind what is read: attention back in time never meets it, and is faster without a mask
        out = self.lm(
            inputs_embeds=self._embeds(input_ids, attention_mask, features, image_order, labels), attention_mask=seen, position_ids=position_ids,
            output_hidden_states=True, logits_to_keep=0 if logits_to_keep is None else logits_to_keep,
        )  # fmt: skip
        at = torch.arange(input_ids.shape[1], device=input_ids.device) if logits_to_keep is None else logits_to_keep
        loss = None
        if labels is not None:
            wanted = F.pad(labels[:, 1:], (0, 1), value=-100)[:, at]
            loss = F.cross_entropy(out.logits[wanted >= 0].float(), wanted[wanted >= 0])
        return Output(loss, out.logits, out.hidden_states[-1], dict(features), at)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, pixel_values: Mapping[str, Tensor] | None = None,
        image_order: Sequence[tuple[str, int]] | None = None, features: Mapping[str, Features] | None = None, **options,
    ):  # fmt: skip
        """Token ids of the answers, without the prompts. ``options`` are those of transformers' generate; beams share images.

        Raises:
            ModelError: BAD_ARGUMENT when a batch is not padded on the left.
        """
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ModelError("the batch is padded on the right; answers are written after its last column", "BAD_ARGUMENT",
                             'pad on the left: padding_side="left"')  # fmt: skip
        features = self.encode(pixel_values or {}) if features is None else features
        embeds = self._embeds(input_ids, attention_mask, features, image_order, None)
        return self.lm.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)

    def _embeds(self, ids, attention, features, order, labels):
        words = None
        if self.guided:
            words = ids != self.config.image_token_id
            words &= attention.bool() if attention is not None else True
            words &= (labels < 0) if labels is not None else True
        order = [(name, k) for name, f in features.items() for k in range(len(f.tokens))] if order is None else order
        return self.splice(ids, features, order, words)

    def masks(self, batch: Batch, out: Output, targets: Sequence[str] = ()) -> Masks:
        """One mask for each <|seg|> of the batch, in reading order. targets: their names, where they are known."""
        names = {name for name, _ in batch.seg_image}
        if len(names) != 1:
            raise ModelError(f"masks are drawn on one encoder at a time, not {sorted(names)}", "BAD_ARGUMENT")
        (name,) = names
        index = torch.tensor([k for _, k in batch.seg_image], device=batch.ids.device)
        head = self.head("mask", name)
        known = torch.tensor([head.labels.index(t) if t in head.labels else -1 for t in targets], device=index.device) if targets else None
        return head(out.features[name], Prompts(index, tokens=self.seg_states(batch, out), named=known))

    def seg_states(self, batch: Batch, out: Output) -> Tensor:
        """(S, 2, lm_dim): for each <|seg|> the state that predicts it, and the mean embedding of the words that asked."""
        states = out.hidden[batch.seg[:, 0], batch.seg[:, 1] - 1]
        words = batch.seg_words[..., None]
        embeds = self.lm.get_input_embeddings()(batch.ids[batch.seg[:, 0]])
        asked = (embeds * words).sum(1) / words.sum(1).clamp(min=1)
        return torch.stack([states, asked.to(states.dtype)], 1)


def _arguments(parts: Mapping) -> list[tuple[str, dict]]:
    """(part's name, its arguments) of everything a configuration builds."""
    return [(f"{folder}.{name}", part["args"]) for folder, group in parts.items() for name, part in group.items() if part.get("args")]


def _spelt(parts: Mapping) -> None:
    """A misspelt folder would be a model without those parts.

    Raises:
        ModelError: BAD_RECIPE.
    """
    for folder, named in parts.items():
        if folder not in (*FOLDERS, "language"):
            raise ModelError(f"a model has no {folder!r}; its parts are: {', '.join((*FOLDERS, 'language'))}", "BAD_RECIPE")
        for name, part in named.items():
            if not isinstance(part, Mapping) or "file" not in part or part.keys() - {"file", "args"}:
                raise ModelError(f"{folder}.{name} is {{'file', 'args'}}, not {{{', '.join(map(repr, part))}}}", "BAD_RECIPE")


def build_part(folder: str, file: str, args: Mapping | None = None) -> nn.Module:
    """The part that ``medvlm/<folder>/<file>.py`` or an installed entry point ``medvlm.<folder>`` of that name builds.

    Raises:
        ModelError: NO_SUCH_PART, listing what there is; BAD_RECIPE when its arguments are wrong.
    """
    try:
        return find(folder, file).build(**{k: tuple(v) if isinstance(v, list) else v for k, v in (args or {}).items()})
    except TypeError as error:
        raise ModelError(f"{folder}/{file}: {error}", "BAD_RECIPE", "see the docstring of its build()") from error


AutoConfig.register("medvlm", MedVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(MedVLMConfig, MedVLM, exist_ok=True)
AutoProcessor.register(MedVLMConfig, MedVLMProcessor, exist_ok=True)
