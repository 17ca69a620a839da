"""Any AutoModelForImageTextToText, from a folder or the hub, with its own processor and chat template.

Questions about the same images run on one prefilled prefix: the images are encoded once, and each question goes on from
a fork of the key-value cache. That this model may be cut there (plain causal attention, positions that go on) is not
believed but measured, once: the first shared question is also run whole, and where the logits differ by more than
rounding, this model answers question by question (``not_shared`` says why).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import re
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BatchFeature, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..errors import ModelError
from ..sample import Answer
from .base import digest, place, pretrained, reading, refuse_foreign_code
from .chat import Chat, Request, pictures

SAME = {4: 1e-4, 2: 3e-2}
"""{bytes of a weight: largest gap between two ways to compute logits, over the largest logit, that counts as rounding}."""
GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
"""Cache layers that never write into a tensor they hold: they join a new one, so that a fork may share the old."""

log = logging.getLogger(__name__)


def load(source: str, device: str | None = None) -> TransformersModel:
    """A model in a folder, read without the network, or "ORG/NAME" on the hub. No code that comes with it is ever run.

    Weights keep the precision they were saved in, except float16 on a CPU, which becomes float32.

    Raises:
        ModelError: NO_SUCH_PART when it is neither a folder nor a name; BAD_CHECKPOINT when it asks for code of its own or for
            foreign kernels, has no safetensors, weights are missing, unknown or of the wrong shape, or it cannot be talked to.
    """
    folder = Path(source).expanduser()
    if not source or not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise ModelError(f"{source!r} is neither a folder nor a name on the hub", "NO_SUCH_PART", "give hf:FOLDER or hf:ORG/NAME")
    where = folder if folder.is_dir() else source
    local = {"local_files_only": folder.is_dir(), "trust_remote_code": False}
    with reading("configuration"):
        raw, _ = PreTrainedConfig.get_config_dict(where, **local)
    if (kind := raw.get("model_type")) not in CONFIG_MAPPING:
        what = "asks to run code of its own, which is never done" if "auto_map" in raw else f"has no config.json that transformers knows (type {str(kind)[:40]})"
        raise ModelError(f"the model {what}", "BAD_CHECKPOINT", "use a model whose code is part of transformers")
    refuse_foreign_code(raw)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError("the model's folder has no weights as safetensors; pickles are not read", "BAD_CHECKPOINT",
                         "save it again with save_pretrained, on a machine where you trust the file")  # fmt: skip
    with reading("configuration"):
        config = AutoConfig.from_pretrained(where, **local)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(f"a model of type {config.model_type} does not answer images and text with text", "BAD_CHECKPOINT", "give a vision-language model")
    with reading("processor"):
        processor = AutoProcessor.from_pretrained(where, **local)
    if getattr(processor, "image_processor", None) is None or not getattr(processor, "chat_template", None) or config.is_encoder_decoder:
        raise ModelError("the model has no image processor, no chat template, or is an encoder and decoder: it cannot be talked to", "BAD_CHECKPOINT",
                         "use an instruction-tuned model, saved together with its processor")  # fmt: skip
    model = place(pretrained(AutoModelForImageTextToText, where, config=config, dtype="auto"), device)
    if model.device.type == "cpu" and model.dtype == torch.float16:
        model = model.float()
    return TransformersModel(model, processor, folder.resolve().name if folder.is_dir() else source, getattr(config, "_commit_hash", None) or "local",
                             folder if folder.is_dir() else None)  # fmt: skip


class TransformersModel(Chat):
    """not_shared: why questions about one image are answered one by one, or None while they share a prefix."""

    def __init__(self, model, processor, name: str = "model", version: str = "0", folder: Path | None = None):
        self.model, self.processor, self.name, self.version, self.folder = model, processor, name, version, folder
        self.tokenizer = processor.tokenizer
        self.not_shared: str | None = None
        self._proven = False
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        stops = model.generation_config.eos_token_id
        stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        self.ends = tuple(dict.fromkeys([*stops, *([self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else [])]))
        text = model.config.get_text_config()
        self.limit = getattr(text, "max_position_embeddings", None) or 1 << 30

    @cached_property
    def sha256(self) -> str | None:
        """Of the weights; of all files' digests in name order where there are several. None for a model of the hub."""
        files = sorted(self.folder.glob("*.safetensors")) if self.folder else []
        if len(files) < 2:
            return digest(files[0]) if files else None
        return hashlib.sha256("".join(map(digest, files)).encode()).hexdigest()

    @torch.no_grad()
    def replies(self, requests):
        prompts = self._prompts(requests)
        start = self._start([p for p in prompts if not isinstance(p, Exception)]) if requests[0].images else 0
        answers: list[Answer | Exception] = []
        trunk = None
        for asked, prompt in zip(requests, prompts):
            try:
                if isinstance(prompt, Exception):
                    raise prompt
                if start and trunk is None:
                    trunk = self._prefill(prompt, start)[1]
                logits, cache = self._prefill(prompt) if trunk is None else self._follow(prompt, start, trunk)
                answers.append((self._choose if asked.choices else self._write)(asked, prompt, logits, cache))
            except Exception as error:  # one of them must not lose the others
                answers.append(error)
        return answers

    def _prompts(self, requests: Sequence[Request]) -> list[BatchFeature | Exception]:
        """What the model's own processor makes of each conversation; the pictures are prepared once."""
        try:
            shown = {id(image): pictures(image) for image in requests[0].images}
        except Exception as error:  # a damaged image shows only when it is read
            return [error] * len(requests)
        prompts: list[BatchFeature | Exception] = []
        with _once(self.processor):
            for asked in requests:
                try:
                    prompts.append(self._prompt(asked, shown))
                except Exception as error:
                    prompts.append(error)
        return prompts

    def _prompt(self, asked: Request, shown) -> BatchFeature:
        try:
            inputs = self.processor.apply_chat_template(self._messages(asked, shown), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        except Exception as error:  # templates and processors raise what they like, and may quote the conversation
            sizes = ", ".join(f"{p.height} x {p.width}" for pages in shown.values() for p in pages[:1]) or "none"
            raise ModelError(f"the processor of {self.name} refuses the conversation ({type(error).__name__}; pictures of {sizes})", "OUT_OF_SCOPE",
                             "its pictures may be too small or too long, or its chat template may not know these turns") from error  # fmt: skip
        inputs.pop("labels", None)  # some processors prepare to train
        length = inputs["input_ids"].shape[1]
        if length >= self.limit:
            raise ModelError(f"the conversation takes {length} tokens; this model reads {self.limit}", "QUESTION_TOO_LONG")
        return inputs

    def _messages(self, asked: Request, shown) -> list[dict]:
        messages = []
        for role, parts in asked.messages:
            content: list[dict] = []
            for part in parts:
                if isinstance(part, str):
                    content.append({"type": "text", "text": self._plain(part)})
                else:
                    content += [{"type": "image", "image": page} for page in shown[id(part)]] if shown else [{"type": "image"}]
            messages.append({"role": role, "content": content})
        return messages

    def _plain(self, text: str) -> str:
        """Text in which the tokenizer finds no special token: "<image>" -> "< image>"."""
        for token in self._special:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    @cached_property
    def _special(self) -> tuple[str, ...]:
        there = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special} | {getattr(self.processor, "image_token", None) or ""}
        return tuple(sorted((t for t in there if len(t) > 1), key=len, reverse=True))

    def _start(self, prompts: Sequence[BatchFeature]) -> int:
        """Tokens that all prompts begin with, where those hold all images and this model can go on from them, else 0."""
        if len(prompts) < 2 or self.not_shared is not None:
            return 0
        rows = [p["input_ids"][0].tolist() for p in prompts]
        token = getattr(self.model.config, "image_token_id", None) or getattr(self.processor, "image_token_id", None)
        length = next((k for k, column in enumerate(zip(*rows)) if len(set(column)) > 1), min(map(len, rows)))
        length = min(length, min(map(len, rows)) - 1)  # a question keeps a token of its own, whose logits say what comes next
        if any(token not in row or token in row[length:] for row in rows):
            log.info("%s: the questions do not follow the images, so each runs by itself", self.name)
            return 0
        if not self._proven:
            self._prove(prompts[0], length)
        return 0 if self.not_shared else length

    def _prove(self, prompt: BatchFeature, start: int) -> None:
        """Whether the logits after a prompt are the same when its beginning is in the cache; said once, and kept."""
        try:
            exact = self._prefill(prompt)[0]
            gap = float((self._follow(prompt, start, self._prefill(prompt, start)[1])[0] - exact).abs().max())
            if gap <= SAME.get(self.model.dtype.itemsize, SAME[4]) * max(float(exact.abs().max()), 1.0):
                self._proven = True
                return
            why = f"its logits differ by {gap:.2g}"
        except Exception as error:  # of foreign code; the whole prompt will say what is wrong, if anything is
            why = f"it fails with {type(error).__name__}"
        self.not_shared = f"{why} when questions go on from a shared prefix, so each question runs by itself"
        log.warning("%s: %s", self.name, self.not_shared)

    def _run(self, inputs, cache: Cache | None = None, **options) -> tuple[Tensor, Cache]:
        """(B, T, V) logits after these inputs, moved to the model here and not earlier, and the cache."""
        placed = BatchFeature(dict(inputs)).to(self.model.device, dtype=self.model.dtype)
        out = self.model(**placed, past_key_values=cache, use_cache=True, **options)
        if out.logits.isnan().any():
            raise ModelError(f"{self.name} answers with NaN in {self.model.dtype}", "BAD_CHECKPOINT", "its weights may be damaged, or overflow in this precision")
        return out.logits.float(), out.past_key_values

    def _prefill(self, prompt: BatchFeature, length: int | None = None) -> tuple[Tensor, Cache]:
        """(V,) logits after the prompt, or after its first tokens with all its images, and the cache."""
        size = prompt["input_ids"].shape
        cut = {k: v[:, :length] if isinstance(v, Tensor) and v.shape[:2] == size else v for k, v in prompt.items()}
        logits, cache = self._run(cut, **self._last)
        return logits[0, -1], cache

    def _follow(self, prompt: BatchFeature, start: int, trunk: Cache) -> tuple[Tensor, Cache]:
        """(V,) logits after the prompt whose first tokens are in the trunk, and a cache of its own."""
        rest = {"input_ids": prompt["input_ids"][:, start:], **_tied(prompt, slice(start, None))}
        logits, cache = self._run(rest, _fork(trunk), **self._last)
        return logits[0, -1], cache

    def _choose(self, asked: Request, prompt: BatchFeature, logits: Tensor, cache: Cache) -> Answer:
        """The likeliest choice: the chance of each whole answer with its end mark, as it stands or with a capital."""
        spelled = [(choice, form) for choice in asked.choices for form in dict.fromkeys((choice, choice[:1].upper() + choice[1:]))]
        scores = self._likelihood([self._answer_tokens(asked, form) for _, form in spelled], prompt, logits, cache)
        whole = torch.stack([torch.logsumexp(torch.stack([s for s, (of, _) in zip(scores, spelled) if of == choice]), 0) for choice in asked.choices])
        chances = dict(zip(asked.choices, whole.softmax(0).tolist()))
        text = self._pick(chances)
        return Answer(text, chances[text], chances)

    def _answer_tokens(self, asked: Request, answer: str) -> list[int]:
        """The tokens of an answer as the chat template writes it after the prompt, and the token that ends it."""
        messages = self._messages(asked, {})
        answer = self._plain(answer)
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        opened = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        closed = self.processor.apply_chat_template([*messages, said], tokenize=False)
        rest = closed[len(opened) :] if closed.startswith(opened) else ""  # else it rewrites earlier turns
        lead, _, tail = rest.partition(answer) if answer in rest else ("", "", "")
        tail_ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        end = next((t for t in tail_ids if t in self.ends), self.ends[0] if self.ends else None)
        return [*self.tokenizer(lead + answer, add_special_tokens=False)["input_ids"], *([] if end is None else [end])]

    def _likelihood(self, answers: Sequence[list[int]], prompt: BatchFeature, logits: Tensor, cache: Cache) -> list[Tensor]:
        """Log probability of each token sequence that may come next; padding on the right is seen by nothing."""
        together = all(type(layer) in GROWING for layer in getattr(cache, "layers", [None]))
        found: list[Tensor] = []
        for rows in [answers] if together else [[a] for a in answers]:
            width = max(map(len, rows)) - 1
            after = logits.expand(len(rows), 1, -1)
            if width:
                forked = _fork(cache)
                if len(rows) > 1:
                    forked.batch_repeat_interleave(len(rows))
                ids = torch.tensor([row[:-1] + [0] * (width - len(row) + 1) for row in rows])
                tied = {k: v.expand(*ids.shape, *v.shape[2:]) for k, v in _tied(prompt, slice(-1, None)).items()}
                after = torch.cat([after, self._run({"input_ids": ids, **tied}, forked)[0]], 1)
            for row, each in zip(rows, after):
                chance = each[: len(row)].log_softmax(-1)
                found.append(chance.gather(1, torch.tensor(row, device=chance.device)[:, None]).sum())
        return found

    def _write(self, asked: Request, prompt: BatchFeature, logits: Tensor, cache: Cache) -> Answer:
        """The answer by ``temperature`` and its probability as a whole, its end mark included."""
        ids: list[int] = []
        total = 0.0
        for _ in range(min(asked.most, self.limit - prompt["input_ids"].shape[1])):
            chance = logits.log_softmax(-1)
            token = int((chance / self.temperature).softmax(-1).multinomial(1)) if self.temperature else int(chance.argmax())
            total += float(chance[token])
            if token in self.ends:
                break
            ids.append(token)
            rows, cache = self._run({"input_ids": torch.tensor([[token]]), **_tied(prompt, slice(-1, None))}, cache)
            logits = rows[0, -1]
        else:
            log.warning("%s: the answer was cut at %d tokens", self.name, len(ids))
        return Answer(self.tokenizer.decode(ids, skip_special_tokens=True).strip(), float(torch.tensor(total).exp()))


def _tied(prompt: BatchFeature, places: slice) -> dict[str, Tensor]:
    """What a model wants to know of tokens beyond their ids and kind, for these places: which images each may look at
    (Llama 3.2 Vision). Tokens after the prompt look at what its last token does."""
    size = prompt["input_ids"].shape
    return {k: v[:, places] for k, v in prompt.items() if isinstance(v, Tensor) and v.ndim > 2 and v.shape[:2] == size}


def _fork(cache: Cache) -> Cache:
    """A cache to go on from while the first stays as it is; tensors are copied only where a layer would write into them."""
    if not isinstance(getattr(cache, "layers", None), list):
        return copy.deepcopy(cache)
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) if type(layer) in GROWING else copy.deepcopy(layer) for layer in cache.layers]
    return fork


@contextmanager
def _once(processor):
    """While it lasts, the processor's image part answers from its first call: only for conversations about the same pictures."""
    real = processor.image_processor
    processor.image_processor = _Remembering(real)
    try:
        yield
    finally:
        processor.image_processor = real


class _Remembering:
    def __init__(self, real):
        self.real, self.first = real, None

    def __call__(self, *args, **options):
        if self.first is None:
            self.first = self.real(*args, **options)
        return copy.copy(self.first)  # processors take entries out of it

    def __getattr__(self, name):
        return getattr(self.real, name)
