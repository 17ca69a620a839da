"""Text for the language model: tokens, chat template, image placeholders at full length, label mask, batches.

An image stands in the text as ``<|image:ID|>`` and becomes one ``<|image|>`` token for each token its projector gives,
so text index = hidden-state index. ``<|seg|>`` in an answer asks for a mask. The mask head's prompt is the state that
*predicts* it (position t-1), as in LISA (arXiv:2308.00692) and M3D (arXiv:2404.00578), and beside it the mean embedding
of the words that asked, those of the turn up to the mark, or since the mark before it ("the right lung <|seg|> and the
left lung <|seg|>"): a small language model has no reason to carry which target was named into a state whose next token is
always <|seg|>.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
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


def load_tokenizer(weights: str):
    """The tokenizer of published weights, a folder or hub name, with the toolkit's image and mask tokens added.

    Its own chat template stays; one without gets the toolkit's, whose role tokens are then added too, behind the mark that
    its texts begin with, where they do (Gemma, Llama).

    Raises:
        ModelError: BAD_CHECKPOINT.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(weights, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {weights!r} cannot be read: {(str(error).splitlines() or [''])[0][:200]}", "BAD_CHECKPOINT") from error
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {weights!r} does not say where its tokens stand in a text", "BAD_CHECKPOINT", "save it with a tokenizer.json")
    own = [] if tokenizer.chat_template else [END, *ROLES]
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = tokenizer.chat_template or ("{{ bos_token }}" if begins else "") + TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, SEG, *own]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or PAD
    tokenizer.padding_side = "right"
    return tokenizer


def build(model_type: str = "llama", weights: str | None = None, **args):
    """A causal language model of transformers, from its configuration's own arguments with random weights, or from ``weights``.

    weights: a folder or hub name that AutoModelForCausalLM reads (safetensors only), of one that sees pictures only its
    language model; ``vocab_size`` then resizes its embeddings, other arguments are refused.

    Raises:
        ModelError: BAD_CHECKPOINT for weights that are missing, and for arguments that would fetch or run code (``auto_map``,
            attention kernels, ...).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if unsafe := [k for k in args if k.startswith("_") or k in ("auto_map", "attn_implementation", "quantization_config", "trust_remote_code")]:
        raise ModelError(f"the language model's arguments may not hold {', '.join(sorted(unsafe))}", "BAD_CHECKPOINT")
    if weights is None:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **args))
    if other := sorted(args.keys() - {"vocab_size"}):
        raise ModelError(f"a language model read from {weights!r} takes no {', '.join(other)}", "BAD_RECIPE", "give weights and vocab_size only")
    try:
        lm, told = AutoModelForCausalLM.from_pretrained(weights, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the language model {weights!r} cannot be read: {(str(error).splitlines() or [''])[0][:200]}", "BAD_CHECKPOINT") from error
    if missing := sorted(told["missing_keys"]):
        raise ModelError(f"the weights {weights!r} are no language model's ({len(missing)} missing: {', '.join(missing[:4])})", "BAD_CHECKPOINT")
    if (config := lm.config.get_text_config(decoder=True)) is not lm.config:
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(config)
        setattr(bare, bare.base_model_prefix, lm.get_decoder())
        bare.set_output_embeddings(lm.get_output_embeddings())
        lm = bare
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
    seg: (S, 2) row and column of each <|seg|>. seg_words: (S, T) true on the words that asked for it: of its turn, or since the last one.
    seg_image: (encoder, k) each of them is drawn on.
    spans: (row, first column, past the last) of each conversation, in the order given to :func:`collate`.
    positions: (B, T) of each token in its own conversation, where conversations share rows; ``attention`` then holds the
    number of the conversation in its row, from 1, and 0 where there is none.
    targets: what objectives need beyond tokens."""

    ids: Tensor
    attention: Tensor
    labels: Tensor
    images: dict[str, Tensor] = field(default_factory=dict)
    order: list[tuple[str, int]] = field(default_factory=list)
    seg: Tensor | None = None
    seg_words: Tensor | None = None
    seg_image: list[tuple[str, int]] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    positions: Tensor | None = None
    targets: dict = field(default_factory=dict)

    def to(self, device) -> Batch:
        def move(x):
            return x.to(device) if isinstance(x, Tensor) else {k: move(v) for k, v in x.items()} if isinstance(x, dict) else x

        return Batch(**{k: move(v) for k, v in vars(self).items()})

    def inputs(self) -> dict:
        """What MedVLM's forward and generate take, but for labels and features."""
        given = {"input_ids": self.ids, "attention_mask": self.attention, "pixel_values": self.images, "image_order": self.order}
        return given | ({"position_ids": self.positions} if self.positions is not None else {})

    def told(self) -> Tensor:
        """Columns that predict a label in some row; nobody reads the logits of others while training."""
        return (self.labels[:, 1:] >= 0).any(0).nonzero()[:, 0]


def plain(text: str) -> str:
    """Text of a user or a data set that no tokenizer of ours reads as a special token: "<|image|>" -> "< |image|>"."""
    return text.replace("<|", "< |")


def caption(tokenizer, text: str, limit: int | None = None) -> list[int]:
    """A text for a text encoder: with the tokenizer's own marks around it, and its end token where it has one.

    limit: tokens that the encoder takes; beyond it the end of the text is cut, as CLIP does (arXiv:2103.00020, section 2.4).
    """
    ids = tokenizer(plain(text))["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id] and ids[-1:] != [tokenizer.sep_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return ids if limit is None or len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


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
    whole = _rendered(tokenizer, messages, not answer)
    told = []  # where the answers stand in the text
    for k in range(len(messages)):
        if messages[k]["role"] == "assistant":
            opened, closed = _rendered(tokenizer, messages[:k], True), _rendered(tokenizer, messages[: k + 1], False)
            if not (whole.startswith(closed) and closed.startswith(opened)):
                raise ModelError("the chat template rewrites earlier turns, so answers cannot be told from questions", "BAD_CHECKPOINT")
            told.append((len(opened), len(closed)))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels = found["input_ids"], [-100] * len(found["input_ids"])
    for at, (begin, end) in enumerate(found["offset_mapping"]):
        for opened, closed in told:
            if begin < opened < end or begin < closed < end:
                raise ModelError("a token of this tokenizer is part question and part answer", "BAD_CHECKPOINT", "choose a model whose chat template marks its turns")
            if opened <= begin < closed:
                labels[at] = ids[at]
    if len(ids) > limit:
        raise ModelError(f"the conversation takes {len(ids)} tokens; this model reads {limit}", "QUESTION_TOO_LONG")
    return Encoded(ids, labels, images, [area.image for area in (*sample.masks, *sample.regions)])


def bins(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Indices of conversations that share a row of ``width`` tokens: longest first, each into the row it fills best.

    Source: best-fit decreasing, Johnson 1973, "Near-optimal bin packing algorithms".

    Raises:
        ModelError: QUESTION_TOO_LONG when one is longer than a row.
    """
    if max(lengths, default=0) > width:
        raise ModelError(f"a conversation of {max(lengths)} tokens does not fit into a row of {width}", "QUESTION_TOO_LONG", "raise the stage's pack")
    rows: dict[int, list[int]] = {}
    left: list[tuple[int, int]] = []  # (tokens that are free, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(left, (lengths[i], -1))
        free, row = left.pop(at) if at < len(left) else (width, len(rows))
        rows.setdefault(row, []).append(i)
        bisect.insort(left, (free - lengths[i], row))
    return [sorted(row) for row in rows.values()]


def collate(tokenizer, rows: Sequence[Encoded], places: Sequence[Mapping[str, Sequence[tuple[str, int]]]], images: dict[str, Tensor],
            left: bool = False, shared: Sequence[int] | None = None) -> Batch:  # fmt: skip
    """Encoded conversations as one padded batch.

    places: for each of them {image id: [(encoder, index into images[encoder]), ...]}, one for each encoder that sees it.
    left: pad on the left, to generate. shared: how many of them, one after the other, stand in each row; one when None.
    """
    held = iter(zip(rows, places))
    lines = [[next(held) for _ in range(n)] for n in (shared or [1] * len(rows))]
    width = max(sum(len(r.ids) for r, _ in line) for line in lines)
    seg_id = tokenizer.convert_tokens_to_ids(SEG)
    user, special = tokenizer.convert_tokens_to_ids(ROLES[1]), {*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(list(ROLES))}
    ids, labels, attention, positions, order, seg, words, seg_image, spans = [], [], [], [], [], [], [], [], []
    for i, line in enumerate(lines):
        gap = width - sum(len(r.ids) for r, _ in line)
        pad = lambda values, fill: [fill] * gap + values if left else values + [fill] * gap  # noqa: B023, E731
        start, numbers = gap if left else 0, []
        for number, (row, place) in enumerate(line, 1):
            order += [at for name in row.images for at in place[name]]
            on = iter(row.on)
            for column, token in enumerate(row.ids):
                if token != seg_id:
                    continue
                if not row.images:
                    raise ModelError("an answer asks for a mask but the conversation has no image", "PLACEHOLDERS")
                before = row.ids[:column]
                asked = len(before) - before[::-1].index(user) if user in before else 0
                seg.append((i, start + column))
                since = len(before) - before[::-1].index(seg_id) if seg_id in before else 0
                said = [[start + at for at in range(first, column) if row.ids[at] not in special] for first in (max(since, asked), asked)]
                words.append(torch.zeros(width, dtype=torch.bool))
                words[-1][said[0] or said[1]] = True
                seg_image.append(place[next(on, row.images[0])][0])
            numbers += [number] * len(row.ids)
            spans.append((i, start, start + len(row.ids)))
            start += len(row.ids)
        ids.append(pad([t for r, _ in line for t in r.ids], tokenizer.pad_token_id))
        labels.append(pad([-100 if at == 0 else t for r, _ in line for at, t in enumerate(r.labels)], -100))  # nothing before predicts a first token
        attention.append(pad(numbers, 0))
        positions.append(pad([at for r, _ in line for at in range(len(r.ids))], 0))
    return Batch(
        torch.tensor(ids), torch.tensor(attention), torch.tensor(labels), images, order, torch.tensor(seg, dtype=torch.long).reshape(-1, 2),
        torch.stack(words) if words else torch.zeros(0, width, dtype=torch.bool), seg_image, spans, torch.tensor(positions) if shared else None,
    )  # fmt: skip


APART = "medvlm_apart"
"""The name by which transformers knows :func:`_attend`."""


def apart(numbers: Tensor) -> Tensor:
    """(1, 1, n, 3): row, first column and end of each of the conversations that share rows, by their numbers (B, T), 0 for padding.

    It stands where an attention mask does; of four axes, because transformers hands such a mask to every layer as it is.
    """
    edges = F.pad(numbers, (1, 1))
    turns = edges[:, 1:] != edges[:, :-1]
    first = (turns[:, :-1] & (numbers > 0)).nonzero()
    return torch.cat([first, (turns[:, 1:] & (numbers > 0)).nonzero()[:, 1:] + 1], 1)[None, None]


def _attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, sliding_window: int | None = None, **options):
    """transformers' "sdpa", but conversation by conversation where the mask is one of :func:`apart`: a long row costs no more than its parts."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, sliding_window=sliding_window, **options)
    lengths: list[list[int]] = [[] for _ in query]
    for row, first, end in attention_mask[0, 0].tolist():
        lengths[row].append(end - first)
    options["is_causal"], lines = True, []
    for sizes, *line in zip(lengths, query, key, value):
        left = query.shape[2] - sum(sizes)
        parts = []
        for q, k, v in zip(*(x.split([*sizes, left], 1) for x in line)):
            if len(parts) == len(sizes):
                parts.append(torch.zeros_like(q.transpose(0, 1)[None]))
                continue
            near = None
            if sliding_window is not None and q.shape[1] > sliding_window:
                near = torch.ones(2 * q.shape[1:2], dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)[None, None]
            parts.append(sdpa_attention_forward(module, q[None], k[None], v[None], near, **options)[0])
        lines.append(torch.cat(parts, 1))
    return torch.cat(lines), None


def share_rows(lm) -> bool:
    """Make a language model's attention heed :func:`apart`; False, and the model as it was, where it would not keep conversations apart.

    It is tried: of two conversations in a row, changing one must leave the other as it was. It does not for layers with a state
    that runs along the row (Mamba, linear attention), nor for models whose attention is not transformers' "sdpa".
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if (before := lm.config._attn_implementation) == APART:
        return True
    if before != "sdpa":
        return False
    AttentionInterface.register(APART, _attend)
    AttentionMaskInterface.register(APART, sdpa_mask)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [4, 3, 1, 4, 5, 6, 7]], device=lm.device) % lm.config.vocab_size
    numbers = torch.tensor([[1, 1, 1, 2, 2, 2, 2]] * 2, device=lm.device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2, device=lm.device)
    training, kept = lm.training, False
    lm.eval()
    try:
        lm.set_attn_implementation(APART)
        with torch.no_grad():
            out = lm(inputs_embeds=lm.get_input_embeddings()(ids), attention_mask=apart(numbers), position_ids=positions, output_hidden_states=True)
        one, other = out.hidden_states[-1][:, 3:]
        kept = bool(torch.allclose(one, other, atol=1e-5))
    except (RuntimeError, ValueError, IndexError, TypeError):  # of shapes: it wants one number a token
        pass
    lm.train(training)
    if not kept:
        lm.set_attn_implementation(before)
    return kept


def _content(turn: Turn, expand) -> str:
    keep = re.compile(f"({MARKED.pattern.replace('(', '(?:')}{'|' + re.escape(SEG) if turn.role == 'assistant' else ''})")
    return "".join(MARKED.sub(expand, part) if keep.fullmatch(part) else plain(part) for part in keep.split(turn.text))


def ends(tokenizer) -> int:
    """The token that ends an answer in the tokenizer's chat template: the first special one behind it.

    Raises:
        ModelError: BAD_CHECKPOINT for a template without one.
    """
    asked = [{"role": "user", "content": "a"}]
    whole = _tokens(tokenizer, [*asked, {"role": "assistant", "content": "a"}], False)
    behind = whole[len(_tokens(tokenizer, asked, True)) :]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if (end := next((token for token in behind if token in special), None)) is None:
        raise ModelError("the chat template does not mark where an answer ends", "BAD_CHECKPOINT", "choose a model that was tuned on conversations, or its base")
    return end


def _tokens(tokenizer, messages: list[dict], prompt: bool) -> list[int]:
    return tokenizer(_rendered(tokenizer, messages, prompt), add_special_tokens=False)["input_ids"]


def _rendered(tokenizer, messages: list[dict], prompt: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
