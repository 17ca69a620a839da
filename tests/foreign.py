"""Checkpoints of families that users hold, with random weights of two layers and a processor, as save_pretrained writes them."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ("Is there a pleural effusion?", "yes", "no", "Yes", "No", "What is seen in the left lung?", "Describe the heart.", " in the image")
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
SEEING = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
EVEN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def template(image: str, user: str = "<|user|>", assistant: str = "<|assistant|>", end: str = "<|end|>", start: str = "") -> str:
    """A chat template of the common shape: role, parts in order, end mark."""
    return (
        f"{start}{{% for m in messages %}}{{{{ '{assistant}' if m.role == 'assistant' else '{user}' }}}}"
        f"{{% for c in m.content %}}{{% if c.type == 'image' %}}{image}{{% else %}}{{{{ c.text }}}}{{% endif %}}{{% endfor %}}{end}\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
    )


def tokenizer(*special: str, named: dict | None = None, **roles):
    """Byte-level BPE; named: {attribute: token} that a processor looks for on its tokenizer."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens = list(dict.fromkeys(["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", *special, *(named or {}).values()]))
    raw.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>", extra_special_tokens=named or {}, **roles)


def text(words, **more) -> dict:
    return TEXT | {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None} | more


def llava():
    words = tokenizer("<image>")
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**SEEING), text_config=hf.LlamaConfig(**text(words)), image_token_id=words.convert_tokens_to_ids("<image>"))
    eyes = hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return hf.LlavaForConditionalGeneration(config), hf.LlavaProcessor(
        eyes, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>\n", "USER: ", "ASSISTANT:"),
    )  # fmt: skip


def _qwen(config, model, processor, video, patch, words_more=None, **seeing):
    words = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ids = {f"{n}_token_id": words.convert_tokens_to_ids(t) for n, t in (
        ("image", "<|image_pad|>"), ("video", "<|video_pad|>"), ("vision_start", "<|vision_start|>"), ("vision_end", "<|vision_end|>"))}  # fmt: skip
    made = config(
        text_config=text(words, rope_parameters=ROPE, head_dim=16, **(words_more or {})), tie_word_embeddings=True, **ids,
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": patch, "out_hidden_size": 32, **seeing},
    )  # fmt: skip
    eyes = hf.Qwen2VLImageProcessor(patch_size=patch, size={"shortest_edge": 4 * patch**2, "longest_edge": 32 * patch**2})
    return model(made), processor(eyes, words, video, chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"))


def qwen2_5_vl():
    return _qwen(hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor(), 14,
                 window_size=56, fullatt_block_indexes=[1])  # fmt: skip


def qwen3_vl():
    return _qwen(hf.Qwen3VLConfig, hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor(), 16,
                 num_position_embeddings=16, deepstack_visual_indexes=[0])  # fmt: skip


def qwen3_5():
    """Linear attention in one layer of two: its cache is written in place."""
    linear = {f"linear_{k}": 2 for k in ("num_key_heads", "num_value_heads")} | {f"linear_{k}_head_dim": 8 for k in ("key", "value")}
    return _qwen(hf.Qwen3_5Config, hf.Qwen3_5ForConditionalGeneration, hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor(), 16,
                 {"layer_types": ["linear_attention", "full_attention"], **linear}, num_position_embeddings=16)  # fmt: skip


def gemma3(**more):
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer("<bos>", named=named, bos_token="<bos>")
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**SEEING | {"image_size": 56}, vision_use_head=False), mm_tokens_per_image=4,
        text_config=text(words, head_dim=16, query_pre_attn_scalar=16, sliding_window=12, layer_types=["sliding_attention", "full_attention"], **more),
        image_token_id=words.image_token_id, boi_token_id=words.boi_token_id, eoi_token_id=words.eoi_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    eyes = hf.Gemma3ImageProcessor(size={"height": 56, "width": 56}, image_seq_length=4, **EVEN)
    return hf.Gemma3ForConditionalGeneration(config), hf.Gemma3Processor(eyes, words, template("<start_of_image>", start="{{ bos_token }}"), image_seq_length=4)


def internvl():
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    words = tokenizer(named=named)
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**SEEING | {"patch_size": 7}), image_seq_length=4,
        text_config=hf.Qwen2Config(**text(words)), image_token_id=words.context_image_token_id,
    )  # fmt: skip
    eyes = hf.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=False, **EVEN)
    return hf.InternVLForConditionalGeneration(config), hf.InternVLProcessor(eyes, words, hf.InternVLVideoProcessor(), 4, template("<IMG_CONTEXT>\n"))


def idefics3():
    words = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)))
    config = hf.Idefics3Config(
        vision_config=SEEING | {"patch_size": 7},
        text_config=hf.LlamaConfig(**text(words)), image_token_id=words.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    eyes = hf.Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, **EVEN)
    return hf.Idefics3ForConditionalGeneration(config), hf.Idefics3Processor(eyes, words, image_seq_len=4, chat_template=template("<image>"))


def mllama():
    """Llama 3.2 Vision: its images are looked at across, and stand in the text as one token."""
    words = tokenizer("<|image|>", "<|python_tag|>", bos_token="<|user|>")
    config = hf.MllamaConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "image_size": 28,
                       "vision_output_dim": 64, "intermediate_layers_indices": [1]},
        text_config=text(words, cross_attention_layers=[1]) | {"bos_token_id": words.bos_token_id}, image_token_index=words.convert_tokens_to_ids("<|image|>"),
    )  # fmt: skip
    eyes = hf.MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=4, **EVEN)
    model = hf.MllamaForConditionalGeneration(config)
    torch.nn.init.ones_(next(p for n, p in model.named_parameters() if "cross_attn_attn_gate" in n))  # it begins shut
    return model, hf.MllamaProcessor(eyes, words, template("<|image|>"))


def paligemma():
    """Its prompt sees itself both ways, so that nothing of it can be shared."""
    words = tokenizer(named={"image_token": "<image>"}, bos_token="<|user|>")
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**SEEING, vision_use_head=False), projection_dim=32, image_token_id=words.image_token_id,
        text_config=hf.GemmaConfig(**text(words, head_dim=16)),
    )  # fmt: skip
    eyes = hf.SiglipImageProcessor(size={"height": 28, "width": 28})
    eyes.image_seq_length = 4
    model, processor = hf.PaliGemmaForConditionalGeneration(config), hf.PaliGemmaProcessor(eyes, words, template("<image>"))
    model.resize_token_embeddings(len(processor.tokenizer))
    return model, processor


FAMILIES = (llava, qwen2_5_vl, qwen3_vl, qwen3_5, gemma3, internvl, idefics3, mllama)


def save(make, folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model, processor = make()
    with torch.no_grad():  # at 0.02 (projectors: 0), all tokens have much the same chance, and no test could tell what is seen
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.06)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
