"""MedVLM: encoders feed a language model through projectors, heads draw and score.

``config.parts`` = {part: {name: {"file", "args"}}} builds everything; recipe, checkpoint and ``from_pretrained`` share it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from . import language
from .encoders.base import Features
from .errors import ModelError
from .heads.mask import Masks, Prompts
from .language import Batch
from .preprocess import normalise

FOLDERS = ("encoders", "projectors", "heads")


class MedVLMConfig(PretrainedConfig):
    """parts: what to build. about: what the model knows (labels, targets, findings, calibration), for predictors."""

    model_type = "medvlm"

    def __init__(self, parts=None, about=None, image_token_id=None, seg_token_id=None, **kwargs):
        self.parts, self.about = parts or {}, about or {}
        self.image_token_id, self.seg_token_id = image_token_id, seg_token_id
        super().__init__(**kwargs)


@dataclass
class Output:
    """logits (B, K, V) of the columns ``at`` (K,), all of them unless asked; hidden (B, T, lm_dim); features {encoder: Features}."""

    logits: Tensor
    hidden: Tensor
    features: dict[str, Features]
    at: Tensor


class MedVLM(PreTrainedModel, GenerationMixin):
    """A vision-language model for medical images.

    Encoders are chosen by image modality (``config.about["routes"]``, "*" for all). Loading builds parts only from this
    package's folders or installed entry points, never from a path named in the checkpoint.
    """

    config_class = MedVLMConfig
    base_model_prefix = "medvlm"
    _supports_sdpa = True

    def __init__(self, config: MedVLMConfig):
        super().__init__(config)
        # transformers builds on the meta device; parts hold buffers computed at construction, so build them for real
        with torch.device("cpu"):
            for folder in FOLDERS:
                parts = config.parts.get(folder, {})
                setattr(self, folder, nn.ModuleDict({name: build_part(folder, **part) for name, part in parts.items()}))
            self.lm = language.build(**config.parts["language"]["lm"]["args"]) if "language" in config.parts else None
        for module in self.modules():
            module._non_persistent_buffers_set.clear()  # else a reload leaves them as uninitialised memory
            # the parts' own initialisation stands; were the parameters marked too, missing weights would not be reported
            module._is_hf_initialized = True
        self.post_init()

    def route(self, modality: str) -> str:
        """Name of the encoder that sees images of this modality."""
        routes = self.config.about.get("routes", {})
        name = routes.get(modality, routes.get("*"))
        if name is None:
            raise ModelError(f"no encoder of this model sees {modality} images; it sees {', '.join(routes)}", "OUT_OF_SCOPE")
        return name

    def count(self, name: str) -> int:
        """Placeholder tokens that an image of this encoder takes."""
        return self.projectors[name].count(self.encoders[name].grid())

    def encode(self, images: Mapping[str, Tensor]) -> dict[str, Features]:
        """{encoder: (K, C, *size) in [0, 1]} -> its features."""
        return {name: self.encoders[name](normalise(x, self.encoders[name].spec)) for name, x in images.items() if len(x)}

    def splice(self, ids: Tensor, features: Mapping[str, Features], order: Sequence[tuple[str, int]]) -> Tensor:
        """(B, T, lm_dim) embeddings with image tokens in the place of their placeholders.

        Raises:
            ModelError: PLACEHOLDERS when their number is not the number of tokens the images give.
        """
        embeds = self.lm.get_input_embeddings()(ids)
        where = ids == self.config.image_token_id
        projected = {name: self.projectors[name](f) for name, f in features.items()}
        tokens = torch.cat([projected[name][k] for name, k in order]) if order else embeds.new_zeros(0, embeds.shape[-1])
        if int(where.sum()) != len(tokens):
            raise ModelError(f"the text holds {int(where.sum())} image placeholders but the images give {len(tokens)} tokens", "PLACEHOLDERS")
        return embeds.masked_scatter(where[..., None], tokens.to(embeds.dtype))

    def forward(self, batch: Batch, features: Mapping[str, Features] | None = None, labelled: bool = False) -> Output:
        """Logits and hidden states of a batch; ``features`` of its images when they are known already.

        labelled: logits only at columns that predict a label in some row; elsewhere nobody reads them while training.
        """
        features = self.encode(batch.images) if features is None else features
        at = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        if labelled:
            at = at[:-1][(batch.labels[:, 1:] >= 0).any(0)]
        out = self.lm(
            inputs_embeds=self.splice(batch.ids, features, batch.order), attention_mask=batch.attention, output_hidden_states=True,
            logits_to_keep=at if labelled else 0,
        )  # fmt: skip
        return Output(out.logits, out.hidden_states[-1], dict(features), at)

    @torch.no_grad()
    def generate(self, batch: Batch, features: Mapping[str, Features] | None = None, max_new_tokens: int = 64, **options):
        """Token ids of the answers (without the prompts), (B, <= max_new_tokens); batches are padded on the left."""
        features = self.encode(batch.images) if features is None else features
        return self.lm.generate(
            inputs_embeds=self.splice(batch.ids, features, batch.order), attention_mask=batch.attention,
            max_new_tokens=max_new_tokens, do_sample=False, **options,
        )  # fmt: skip

    def masks(self, batch: Batch, out: Output, targets: Sequence[str] = ()) -> Masks:
        """One mask for each <|seg|> of the batch, in reading order. targets: their names, where they are known."""
        names = {name for name, _ in batch.seg_image}
        if len(names) != 1:
            raise ModelError(f"masks are drawn on one encoder at a time, not {sorted(names)}", "BAD_ARGUMENT")
        index = torch.tensor([k for _, k in batch.seg_image], device=batch.ids.device)
        head = self.heads["mask"]
        known = torch.tensor([head.labels.index(t) if t in head.labels else -1 for t in targets], device=index.device) if targets else None
        return head(out.features[names.pop()], Prompts(index, tokens=self.seg_states(batch, out), named=known))

    def seg_states(self, batch: Batch, out: Output) -> Tensor:
        """(S, 2, lm_dim): for each <|seg|> the state that predicts it, and the mean embedding of the words that asked."""
        states = out.hidden[batch.seg[:, 0], batch.seg[:, 1] - 1]
        words = batch.seg_words[..., None]
        embeds = self.lm.get_input_embeddings()(batch.ids[batch.seg[:, 0]])
        asked = (embeds * words).sum(1) / words.sum(1).clamp(min=1)
        return torch.stack([states, asked.to(states.dtype)], 1)


def build_part(folder: str, file: str, args: Mapping | None = None) -> nn.Module:
    """The part that ``medvlm/<folder>/<file>.py`` or an installed entry point ``medvlm.<folder>`` of that name builds.

    Raises:
        ModelError: NO_SUCH_PART, listing what there is; BAD_RECIPE when its arguments are wrong.
    """
    try:
        return find(folder, file).build(**{k: tuple(v) if isinstance(v, list) else v for k, v in (args or {}).items()})
    except TypeError as error:
        raise ModelError(f"{folder}/{file}: {error}", "BAD_RECIPE", "see the docstring of its build()") from error


def names(folder: str, attribute: str = "build") -> dict[str, str]:
    """{name: first line of its docstring} of the parts in a folder of this package; the folder is the registry."""
    import ast

    found = {}
    for path in sorted((Path(__file__).parent / folder).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)} | {
            t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
        }
        if attribute in defined:
            found[path.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    found |= {e.name: f"from {e.dist.name}" for e in entry_points(group=f"medvlm.{folder}")}
    return found


def find(folder: str, name: str, attribute: str = "build"):
    """The module of a part, by name; never by a dotted path."""
    known = names(folder, attribute)
    if not re.fullmatch(r"[A-Za-z]\w*", name) or name not in known:
        raise ModelError(f"there is no {folder[:-1]} {name!r}; there are: {', '.join(known) or 'none'}", "NO_SUCH_PART")
    for entry in entry_points(group=f"medvlm.{folder}"):
        if entry.name == name:
            return entry.load()
    return importlib.import_module(f".{folder}.{name}", __package__)
