"""Text for the language model: tokens, chat template, image placeholders at full length, label mask, batches.

An image stands in the text as ``<|image:ID|>`` and becomes one ``<|image|>`` token for each token its projector gives,
so text index = hidden-state index. ``<|seg|>`` in an answer asks for a mask. The mask head's prompt is the state that
*predicts* it (position t-1), as in LISA (arXiv:2308.00692) and M3D (arXiv:2404.00578), and beside it the mean embedding
of the words of the turn that asked: a small language model has no reason to carry which target was named into a state
whose next token is always <|seg|>.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import ModelError
from .sample import IMAGE_MARK, MARKED, SEG, Sample, Turn

IMAGE, END, PAD = "<|image|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Contents are text, or transformers' lists of {"type": "image"} and {"type": "text", "text"}."""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048):
    """A byte-level BPE tokenizer of this text with the toolkit's special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END, IMAGE, SEG, *ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, chat_template=TEMPLATE, padding_side="right",
        extra_special_tokens={"image_token": IMAGE, "seg_token": SEG}, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build(model_type: str = "llama", weights: str | None = None, **args):
    """A causal language model of transformers, from its configuration's own arguments with random weights, or from ``weights``.

    weights: a folder or hub name that AutoModelForCausalLM reads (safetensors only); ``vocab_size`` then resizes its
    embeddings, other arguments are refused.

    Raises:
        ModelError: BAD_CHECKPOINT for arguments that would fetch or run code (``auto_map``, attention kernels, ...).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if unsafe := [k for k in args if k.startswith("_") or k in ("auto_map", "attn_implementation", "quantization_config", "trust_remote_code")]:
        raise ModelError(f"the language model's arguments may not hold {', '.join(sorted(unsafe))}", "BAD_CHECKPOINT")
    if weights is None:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **args))
    if other := sorted(args.keys() - {"vocab_size"}):
        raise ModelError(f"a language model read from {weights!r} takes no {', '.join(other)}", "BAD_RECIPE", "give weights and vocab_size only")
    try:
        lm = AutoModelForCausalLM.from_pretrained(weights, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ModelError(f"the language model {weights!r} cannot be read: {(str(error).splitlines() or [''])[0][:200]}", "BAD_CHECKPOINT") from error
    if args.get("vocab_size", lm.config.vocab_size) != lm.config.vocab_size:
        lm.resize_token_embeddings(args["vocab_size"])
    return lm


def arguments(lm) -> dict:
    """The arguments of :func:`build` that make a language model of this one's shape."""
    kept = {k: v for k, v in lm.config.to_diff_dict().items() if not k.startswith("_") and k not in ("architectures", "transformers_version", "dtype", "torch_dtype", "auto_map")}
    return {**kept, "model_type": lm.config.model_type, "vocab_size": lm.config.vocab_size}


@dataclass
class Encoded:
    """One conversation as tokens. images: ids in reading order, one a placeholder run. on: id of the image that each
    <|seg|> is drawn on; the first one beyond its end."""

    ids: list[int]
    labels: list[int]
    images: list[str]
    on: list[str] = field(default_factory=list)


@dataclass
class Batch:
    """ids, attention, labels: (B, T), labels -100 where nothing is learnt. images: {encoder: (K, C, *size)}.
    order: (encoder, k) of each placeholder run, in reading order over the batch; rows may share an image.
    seg: (S, 2) row and column of each <|seg|>. seg_words: (S, T) true on the words of the turn that asked for it.
    seg_image: (encoder, k) each of them is drawn on.
    targets: what objectives need beyond tokens."""

    ids: Tensor
    attention: Tensor
    labels: Tensor
    images: dict[str, Tensor] = field(default_factory=dict)
    order: list[tuple[str, int]] = field(default_factory=list)
    seg: Tensor | None = None
    seg_words: Tensor | None = None
    seg_image: list[tuple[str, int]] = field(default_factory=list)
    targets: dict = field(default_factory=dict)

    def to(self, device) -> Batch:
        def move(x):
            return x.to(device) if isinstance(x, Tensor) else {k: move(v) for k, v in x.items()} if isinstance(x, dict) else x

        return Batch(**{k: move(v) for k, v in vars(self).items()})

    def inputs(self) -> dict:
        """What MedVLM's forward and generate take, but for labels and features."""
        return {"input_ids": self.ids, "attention_mask": self.attention, "pixel_values": self.images, "image_order": self.order}

    def told(self) -> Tensor:
        """Columns that predict a label in some row; nobody reads the logits of others while training."""
        return (self.labels[:, 1:] >= 0).any(0).nonzero()[:, 0]


def plain(text: str) -> str:
    """Text of a user or a data set that no tokenizer of ours reads as a special token: "<|image|>" -> "< |image|>"."""
    return text.replace("<|", "< |")


def encode(tokenizer, sample: Sample, counts: Mapping[str, int], answer: bool = True, limit: int = 2048) -> Encoded:
    """A sample's conversation as tokens. Special tokens in its texts are made harmless (:func:`plain`), except image
    marks and, in an answer, ``<|seg|>``.

    Args:
        counts: {image id: tokens its projector gives}.
        answer: True to train (only assistant turns are labelled); False to ask (the last assistant turn is left out
            and the prompt for the next one is appended).

    Raises:
        ModelError: PLACEHOLDERS when a mark names an image that is not there; QUESTION_TOO_LONG beyond ``limit`` tokens.
    """
    turns = list(sample.turns)
    if not answer and turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns or turns[0].role == "assistant":
        turns.insert(0, Turn("user", ""))
    marked = {name for t in turns for name in MARKED.findall(t.text)}
    if unknown := marked - counts.keys():
        raise ModelError(f"the text of sample {sample.id} names images {sorted(unknown)}; it has {sorted(counts)}", "PLACEHOLDERS")
    first = next(i for i, t in enumerate(turns) if t.role != "system")
    unmarked = "".join(IMAGE_MARK.format(name) for name in counts if name not in marked)
    turns[first] = Turn(turns[first].role, unmarked + turns[first].text)

    images: list[str] = []

    def expand(match: re.Match) -> str:
        images.append(match.group(1))
        return IMAGE * counts[match.group(1)]

    messages = [{"role": t.role, "content": _content(t, expand)} for t in turns]
    ids: list[int] = []
    labels: list[int] = []
    for k in range(len(messages)):
        asks = messages[k]["role"] == "assistant"
        if asks:
            opened = _tokens(tokenizer, messages[:k], True)
            labels += [-100] * (len(opened) - len(ids))
            ids = opened
        closed = _tokens(tokenizer, messages[: k + 1], False)
        if closed[: len(ids)] != ids:
            raise ModelError("the chat template rewrites earlier turns, so answers cannot be told from questions", "BAD_CHECKPOINT")
        labels += closed[len(ids) :] if asks else [-100] * (len(closed) - len(ids))
        ids = closed
    if not answer:
        opened = _tokens(tokenizer, messages, True)
        labels += [-100] * (len(opened) - len(ids))
        ids = opened
    if len(ids) > limit:
        raise ModelError(f"the conversation takes {len(ids)} tokens; this model reads {limit}", "QUESTION_TOO_LONG")
    return Encoded(ids, labels, images, [area.image for area in (*sample.masks, *sample.regions)])


def collate(tokenizer, rows: Sequence[Encoded], places: Sequence[Mapping[str, Sequence[tuple[str, int]]]], images: dict[str, Tensor],
            left: bool = False) -> Batch:  # fmt: skip
    """Encoded rows as one padded batch.

    places: for each row {image id: [(encoder, index into images[encoder]), ...]}, one for each encoder that sees it.
    left: pad on the left, to generate.
    """
    width = max(len(r.ids) for r in rows)
    seg_id = tokenizer.convert_tokens_to_ids(SEG)
    user, special = tokenizer.convert_tokens_to_ids(ROLES[1]), {*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(list(ROLES))}
    ids, labels, attention, order, seg, words, seg_image = [], [], [], [], [], [], []
    for i, (row, place) in enumerate(zip(rows, places)):
        gap = width - len(row.ids)
        pad = lambda values, fill: [fill] * gap + values if left else values + [fill] * gap  # noqa: B023, E731
        ids.append(pad(row.ids, tokenizer.pad_token_id))
        labels.append(pad(row.labels, -100))
        attention.append(pad([1] * len(row.ids), 0))
        order += [at for name in row.images for at in place[name]]
        on = iter(row.on)
        for column, token in enumerate(ids[-1]):
            if token == seg_id:
                seg.append((i, column))
                before = ids[-1][:column]
                asked = len(before) - before[::-1].index(user) if user in before else 0
                words.append([asked <= at < column and t not in special for at, t in enumerate(ids[-1])])
                if not row.images:
                    raise ModelError("an answer asks for a mask but the conversation has no image", "PLACEHOLDERS")
                seg_image.append(place[next(on, row.images[0])][0])
    return Batch(
        torch.tensor(ids), torch.tensor(attention), torch.tensor(labels), images, order,
        torch.tensor(seg, dtype=torch.long).reshape(-1, 2), torch.tensor(words, dtype=torch.bool).reshape(-1, width), seg_image,
    )  # fmt: skip


def _content(turn: Turn, expand) -> str:
    keep = re.compile(f"({MARKED.pattern.replace('(', '(?:')}{'|' + re.escape(SEG) if turn.role == 'assistant' else ''})")
    return "".join(MARKED.sub(expand, part) if keep.fullmatch(part) else plain(part) for part in keep.split(turn.text))


def _tokens(tokenizer, messages: list[dict], prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) if messages else ""
    if not messages and prompt:
        text = ROLES[2]
    return tokenizer(text, add_special_tokens=False)["input_ids"]
