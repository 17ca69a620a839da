"""Models in forms that load without this package: stock llava, open_clip folders, ONNX, torch.export.

What a form cannot say is refused, with both sides named; what is written is run once and compared with the model.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.export import Dim

from .encoders.base import Encoder
from .encoders.image import OpenClipTransformer, TransformersEncoder
from .encoders.text import TextEncoder
from .errors import ModelError
from .heads.mask import Embedding, MaskHead, Prompts
from .language import IMAGE, ROLES, SEG, encode
from .predictors.base import pretrained, reading
from .preprocess import InputSpec, normalise
from .projectors.mlp import MLP
from .sample import Sample, Turn
from .vlm import MedVLM

ROUNDING = 1e-4
"""Largest gap, over the largest value, that counts as the same numbers."""


def export(folder: Path, to: str, out: Path, drop_heads: bool = False) -> dict[str, float]:
    """Write a saved model in another form. to: one of ``FORMS``. Returns {what was written: gap to the model}.

    Raises:
        ModelError: BAD_ARGUMENT for another form; OUTPUT_EXISTS when ``out`` holds something; NOT_EXPORTABLE when the form
            cannot say what the model is.
    """
    from transformers import AutoTokenizer

    if to not in FORMS:
        raise ModelError(f"a model is not exported to {to!r}", "BAD_ARGUMENT", f"give one of {', '.join(FORMS)}")
    model = pretrained(MedVLM, folder).eval()
    if to in ("onnx", "torch"):
        return FORMS[to](model, out)
    with reading("tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return to_llava(model, tokenizer, out, drop_heads) if to == "llava" else to_open_clip(model, tokenizer, out)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``folder`` when all is done, and vanishes when something fails."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{str(folder)!r} is there and not an empty folder", "OUTPUT_EXISTS")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if folder.exists():
        folder.rmdir()
    part.rename(folder)


def refuse(form: str, why: str, hint: str = "export its encoders to onnx or torch instead") -> NoReturn:
    raise ModelError(f"{form} cannot express {why}", "NOT_EXPORTABLE", hint)


@torch.no_grad()
def to_llava(model: MedVLM, tokenizer, folder: Path, drop_heads: bool = False) -> dict[str, float]:
    """A one-encoder model of pictures as transformers' ``LlavaForConditionalGeneration`` with its processor.

    The same tokens follow from the same pixels. Of pictures that are not square the stock processor sees the padding in
    the mean colour, where ours is black; and it rounds what it scales to whole grey levels.

    Args:
        drop_heads: leave masks and classes behind, which llava has no place for.

    Raises:
        ModelError: NOT_EXPORTABLE for what llava has no place for.
    """
    from transformers import (
        GenerationConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaImageProcessor,
        LlavaProcessor,
    )

    if model.heads and not drop_heads:
        refuse("llava", f"the heads {', '.join(model.heads)}", "leave them out with drop_heads (--drop-heads)")
    if model.lm is None or len(model.encoders) != 1 or model.encoders.keys() != model.projectors.keys():
        refuse("llava", f"{len(model.encoders)} encoders and {len(model.projectors)} projectors; it has one of each and a language model")
    (encoder,), (projector,) = model.encoders.values(), model.projectors.values()
    if not isinstance(encoder, TransformersEncoder):
        refuse("llava", f"a {type(encoder).__name__}; its vision tower is one of transformers'", 'train with an image encoder of library="transformers"')
    layers = [m for m in projector.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
    if type(projector) is not MLP or [type(m) for m in layers] != [nn.Linear, nn.Linear]:
        what = "the LayerNorm of the mlp projector" if type(projector) is MLP else f"a {type(projector).__name__} projector"
        refuse("llava", f"{what}; its projector is two linear layers", "train with the mlp projector and norm=False")
    spec, vision = encoder.spec, encoder.tower.config
    if spec.unit != "display" or spec.windows or spec.size != (vision.image_size,) * 2 or spec.channels != 3:
        refuse("llava", f"input of {spec.size} pixels, {spec.channels} channels in {spec.unit}; its processor gives {vision.image_size} x {vision.image_size} pixels in colour")
    probe = encoder.tower(torch.zeros(1, 3, *spec.size), output_hidden_states=True)
    prefix = probe.hidden_states[-1].shape[1] - projector.count(encoder.grid())
    if prefix > 1:
        refuse("llava", f"a tower with {prefix} tokens before its patches; it drops one")
    if encoder.feature_layer == -1 and not torch.equal(probe.hidden_states[-1], probe.last_hidden_state):
        refuse("llava", f"the final norm of a {vision.model_type}; it reads the layers before that", "train with feature_layer=-2")
    config = LlavaConfig(
        vision_config=vision, text_config=model.lm.config, image_token_index=model.config.image_token_id, projector_hidden_act="gelu",
        vision_feature_select_strategy="default" if prefix else "full", vision_feature_layer=encoder.feature_layer,
        image_seq_length=projector.count(encoder.grid()), tie_word_embeddings=model.lm.config.tie_word_embeddings,
    )  # fmt: skip
    made = LlavaForConditionalGeneration(config)
    weights = {f"model.vision_tower.{k}": v for k, v in encoder.tower.state_dict().items()}
    weights |= {f"model.multi_modal_projector.linear_{n}.{k}": v for n, layer in enumerate(layers, start=1) for k, v in layer.state_dict().items()}
    weights |= {k if k.startswith("lm_head") else f"model.language_model.{k.removeprefix('model.')}": v for k, v in model.lm.state_dict().items()}
    computed = {k for k, _ in made.named_buffers()} - made.state_dict().keys()  # MedVLM saves these too
    try:
        made.load_state_dict({k: v for k, v in weights.items() if k not in computed})
    except RuntimeError as error:
        raise ModelError(f"llava cannot express a {model.lm.config.model_type} language model: {str(error).splitlines()[-1].strip()[:200]}", "NOT_EXPORTABLE",
                         "train with one whose weights are model.* and lm_head, such as llama or qwen2") from error  # fmt: skip
    never = tokenizer.convert_tokens_to_ids([IMAGE, SEG, *ROLES])
    made.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, suppress_tokens=never)
    images = LlavaImageProcessor(
        do_pad=True, size={"height": spec.size[0], "width": spec.size[1]}, do_center_crop=False, crop_size={"height": spec.size[0], "width": spec.size[1]},
        resample=2, image_mean=list(spec.mean), image_std=list(spec.std),
    )  # fmt: skip
    processor = LlavaProcessor(
        images, tokenizer, vision.patch_size, config.vision_feature_select_strategy, tokenizer.chat_template, IMAGE, num_additional_image_tokens=prefix
    )
    with _whole(folder) as part:
        made.to(model.dtype).save_pretrained(part)
        processor.save_pretrained(part)
        return {"llava": _same_answers(model, tokenizer, part)}


def _same_answers(model: MedVLM, tokenizer, folder: Path) -> float:
    """Gap of the logits of one question about random pixels, asked of the model and of the llava folder."""
    import numpy as np
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    made = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True, dtype=model.dtype).eval()
    processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    (name,) = model.encoders
    size = model.encoders[name].spec.size
    shown = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it normal?"}]}]
    inputs = processor(images=shown, text=processor.apply_chat_template(asked, add_generation_prompt=True), return_tensors="pt")
    ids = encode(tokenizer, Sample("export", turns=(Turn("user", "Is it normal?"),)), {"1": model.count(name)}, answer=False).ids
    if inputs["input_ids"][0].tolist() != ids:
        refuse("llava's processor", "the tokens of this model's chat template", "give the tokenizer a chat_template that it follows, without tokens added by itself")
    pixels = torch.from_numpy(shown).permute(2, 0, 1)[None].float() / 255
    ours = model(torch.tensor([ids]), pixel_values={name: pixels}).logits
    return _gap("llava", ours, made(**inputs).logits)


@torch.no_grad()
def to_open_clip(model: MedVLM, tokenizer, folder: Path) -> dict[str, float]:
    """A contrastive model of open_clip's own vision transformer and a CLIP text tower as a folder for ``local-dir:``.

    Raises:
        ModelError: NOT_EXPORTABLE for other towers, and for what open_clip does otherwise.
    """
    import open_clip
    from safetensors.torch import save_file

    kinds = {name: type(e).__name__ for name, e in model.encoders.items()}
    if sorted(kinds.values()) != ["OpenClipTransformer", "TextEncoder"] or set(model.heads) != {"contrast"} or model.lm is not None:
        parts = [*kinds.values(), *(f"{h} head" for h in model.heads), *([] if model.lm is None else ["language model"])]
        refuse("an open_clip folder", f"{', '.join(parts)}; it has an image tower, a text tower and a contrast head")
    image = next(e for e in model.encoders.values() if isinstance(e, OpenClipTransformer))
    text = next(e for e in model.encoders.values() if isinstance(e, TextEncoder))
    name = next(n for n, e in model.encoders.items() if e is image)
    head, args = model.heads["contrast"], model.config.parts["encoders"][name]["args"]
    tower = open_clip.get_model_config(args["model"]) if isinstance(args["model"], str) else args["model"]
    vision, quick = {**tower["vision_cfg"], "image_size": list(image.spec.size)}, bool(tower.get("quick_gelu"))
    language = text.tower.config
    if language.model_type != "clip_text_model" or (language.hidden_act == "quick_gelu") != quick or language.hidden_act not in ("gelu", "quick_gelu"):
        refuse("an open_clip folder", f"a {language.model_type} text tower with {language.hidden_act} beside an image tower with {'quick_gelu' if quick else 'gelu'}",
               "train with a clip_text_model of the same activation")  # fmt: skip
    if vision.get("attentional_pool") or args.get("feature_layer", -1) != -1:
        refuse("an open_clip folder", "a tower without its attention pooling or last block")
    embed_dim = head.image_projection.out_features
    config = {
        "embed_dim": embed_dim, "quick_gelu": quick, "custom_text": True, "vision_cfg": vision,
        "text_cfg": {
            "context_length": language.max_position_embeddings, "vocab_size": language.vocab_size, "width": language.hidden_size,
            "heads": language.num_attention_heads, "layers": language.num_hidden_layers, "mlp_ratio": language.intermediate_size / language.hidden_size,
            "norm_kwargs": {"eps": language.layer_norm_eps}, "hf_tokenizer_name": "local",
            # transformers finds the end of a text by the highest id where its own id is 2, as CLIP's first configurations say
            **({"pool_type": "argmax"} if language.eos_token_id == 2 else {"pool_type": "eos", "eos_id": language.eos_token_id}),
        },
    }  # fmt: skip
    if head.logit_bias is not None:
        config["init_logit_bias"] = 0.0
    weights = {f"visual.{k}": v for k, v in image.tower.state_dict().items()} | {"visual.proj": head.image_projection.weight.T}
    weights |= {f"text.{k}": v for k, v in _clip_text(text.tower.state_dict(), language.num_hidden_layers).items()} | {"text.text_projection": head.text_projection.weight.T}
    weights |= {k: v for k, v in (("logit_scale", head.logit_scale), ("logit_bias", head.logit_bias)) if v is not None}
    weights.pop("text.attn_mask", None)
    seen = {"mean": list(image.spec.mean), "std": list(image.spec.std), "interpolation": "bilinear", "resize_mode": "longest", "fill_color": 0}
    with _whole(folder) as part:
        (part / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": seen}, indent=1))
        save_file({k: v.contiguous().clone() for k, v in weights.items()}, part / "open_clip_model.safetensors")
        tokenizer.save_pretrained(part)
        if language.eos_token_id not in (2, *open_clip.get_tokenizer(f"local-dir:{part}")(["chest X-ray"])[0].tolist()):
            refuse("an open_clip folder", "a tokenizer that does not end texts as the text tower expects", "let the tokenizer's post-processor append the end token")
        made = open_clip.create_model_from_pretrained(f"local-dir:{part}", return_transform=False).eval()
        pixels = normalise(torch.rand(2, 3, *image.spec.size), image.spec)
        ids = torch.randint(3, language.vocab_size - 1, (2, language.max_position_embeddings))
        ids[:, -1] = language.vocab_size - 1 if language.eos_token_id == 2 else language.eos_token_id
        return {"open_clip": max(_gap("open_clip", head.image(image(pixels)), made.encode_image(pixels, normalize=True)),
                                 _gap("open_clip", head.text(text(ids)), made.encode_text(ids, normalize=True)))}  # fmt: skip


def _clip_text(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of transformers' CLIPTextModel by open_clip's names; the three projections of attention are one there."""
    state = {k.removeprefix("text_model."): v for k, v in state.items()}
    found = {"token_embedding.weight": state["embeddings.token_embedding.weight"], "positional_embedding": state["embeddings.position_embedding.weight"]}
    pairs = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    for end in ("weight", "bias"):
        found[f"ln_final.{end}"] = state[f"final_layer_norm.{end}"]
        for i in range(layers):
            old, new = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            found |= {f"{new}{b}.{end}": state[f"{old}{a}.{end}"] for a, b in pairs.items()}
            found[f"{new}attn.in_proj_{end}"] = torch.cat([state[f"{old}self_attn.{p}_proj.{end}"] for p in "qkv"])
    return found


@dataclass
class Graph:
    """One thing to run. example, inputs: tensors and their names. free: {input: {axis: name}} of sizes that may change; most: {name: greatest size}."""

    name: str
    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    free: dict[str, dict[int, str]]
    most: dict[str, int] = field(default_factory=dict)


def graphs(model: MedVLM) -> Iterator[Graph]:
    """Every encoder and mask head, each by itself; pixels are display values in [0, 1], normalised inside.

    A mask head is three graphs, so that the image is seen once however many prompts follow: the image's embedding, and
    outlines from points and from boxes, both on the input's grid in (h, w).
    """
    for name, encoder in model.encoders.items():
        if encoder.spec is None:
            free = {0: "texts", 1: "length"}
            yield Graph(name, Run(partial(_read, encoder), encoder), (torch.ones(2, 8).long(), torch.ones(2, 8).long()), ("ids", "attention"),
                        ("tokens", "pooled"), {"ids": free, "attention": free}, {"length": encoder.limit} if encoder.limit else {})  # fmt: skip
            continue
        pixels = torch.rand(2, encoder.spec.channels, *encoder.spec.size)
        levels = tuple(f"level_{i}" for i in range(len(encoder.level_dims)))
        yield Graph(name, Run(partial(_see, encoder), encoder), (pixels,), ("pixels",), ("tokens", "pooled", *levels), {"pixels": {0: "images"}})
        head = model.head("mask", name)
        if not isinstance(head, MaskHead):
            continue
        embed = Run(partial(_embed, encoder, head), encoder, head)
        seen, drawn = embed(pixels[:1]), ("logits", "quality", "present")
        parts = ("embedding", "fine")[: len(seen)]
        yield Graph(f"{name}_embedding", embed, (pixels,), ("pixels",), parts, {"pixels": {0: "images"}})
        points = torch.rand(3, 2, len(encoder.spec.size)) * torch.tensor(encoder.spec.size)
        free = {0: "prompts", 1: "clicks"}
        yield Graph(f"{name}_points", Run(partial(_draw, head, ("points", "labels")), head), (*seen, points, torch.tensor([[1, 0], [1, 1], [1, -1]])),
                    (*parts, "points", "labels"), drawn, {"points": free, "labels": free})  # fmt: skip
        yield Graph(f"{name}_boxes", Run(partial(_draw, head, ("boxes",)), head), (*seen, points.sort(1).values), (*parts, "boxes"), drawn, {"boxes": {0: "prompts"}})


def _see(encoder: Encoder, pixels: Tensor) -> tuple[Tensor, ...]:
    found = encoder(normalise(pixels, encoder.spec))
    return (found.tokens, found.pooled, *found.levels)


def _read(encoder: Encoder, ids: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    return encoder(ids, attention)[::2]


def _embed(encoder: Encoder, head: MaskHead, pixels: Tensor) -> tuple[Tensor, ...]:
    return tuple(part for part in head.embed(encoder(normalise(pixels, encoder.spec))) if part is not None)


def _draw(head: MaskHead, kinds: tuple[str, ...], *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``given``: the image's embedding, then the prompts of these kinds."""
    seen, prompts = given[: -len(kinds)], dict(zip(kinds, given[-len(kinds) :]))
    found = head.decode(Embedding(*seen), Prompts(torch.zeros_like(given[-1].flatten(1)[:, 0], dtype=torch.long), **prompts))
    return found.logits, found.quality, head.probability(found.present)


@torch.no_grad()
def to_onnx(model: MedVLM, folder: Path) -> dict[str, float]:
    """Encoders and mask heads (see :func:`graphs`) as NAME.onnx, and what their inputs are in inputs.json.

    Raises:
        ModelError: MISSING_EXTRA without the libraries; NOT_EXPORTABLE when the written graph gives other numbers.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(f"ONNX export needs {error.name}", "MISSING_EXTRA", "install the extra: medvlm-toolkit[export]") from error

    def write(graph: Graph, path: Path) -> Callable:
        torch.onnx.export(
            graph.module, graph.example, path, dynamo=True, input_names=graph.inputs, output_names=graph.outputs, verbose=False,
            dynamic_shapes=_shapes(graph), external_data=sum(p.nbytes for p in graph.module.parameters()) > 1 << 30,  # ONNX holds 2 GiB in one file
        )  # fmt: skip
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda *given: [torch.from_numpy(o) for o in session.run(None, {k: v.numpy() for k, v in zip(graph.inputs, given)})]

    return _written(model, folder, ".onnx", write)


@torch.no_grad()
def to_torch(model: MedVLM, folder: Path) -> dict[str, float]:
    """Encoders and mask heads (see :func:`graphs`) as NAME.pt2 of torch.export, and what their inputs are in inputs.json.

    Raises:
        ModelError: NOT_EXPORTABLE when the written graph gives other numbers.
    """

    def write(graph: Graph, path: Path) -> Callable:
        torch.export.save(torch.export.export(graph.module, graph.example, dynamic_shapes=_shapes(graph)), path)
        return torch.export.load(path).module()

    return _written(model, folder, ".pt2", write)


def _written(model: MedVLM, folder: Path, ending: str, write: Callable[[Graph, Path], Callable]) -> dict[str, float]:
    model = copy.deepcopy(model).float().cpu().eval()
    specs = {name: asdict(e.spec) if isinstance(e.spec, InputSpec) else None for name, e in model.encoders.items()}
    gaps = {}
    with _whole(folder) as part:
        (part / "inputs.json").write_text(json.dumps(specs, indent=1))
        for graph in graphs(model):
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of axes that share a name, on purpose
                run = write(graph, part / f"{graph.name}{ending}")
            more = tuple(torch.cat([x, x[:1]]) if 0 in graph.free.get(name, {}) else x for name, x in zip(graph.inputs, graph.example))
            gaps[graph.name + ending] = max(_gap(graph.name, a, b) for given in (graph.example, more) for a, b in zip(graph.module(*given), run(*given)))
    return gaps


def _shapes(graph: Graph) -> tuple[tuple[dict[int, Dim], ...]]:
    dims = {name: Dim(name, max=graph.most.get(name)) for axes in graph.free.values() for name in axes.values()}
    return (tuple({axis: dims[name] for axis, name in graph.free.get(given, {}).items()} for given in graph.inputs),)


def _gap(form: str, ours: Tensor, theirs: Tensor) -> float:
    gap = float((ours.float() - theirs.float()).abs().max())
    if not gap <= ROUNDING * max(1.0, float(ours.abs().max())):
        refuse(form, f"this model: its numbers differ by {gap:.2g} from the model's")
    return gap


class Run(nn.Module):
    """A function of tensors as a module that holds the parts it uses."""

    def __init__(self, work: Callable, *parts: nn.Module):
        super().__init__()
        self.work, self.parts = work, nn.ModuleList(parts)
        self.eval()

    def forward(self, *given):
        return self.work(*given)


FORMS = {"llava": to_llava, "open_clip": to_open_clip, "onnx": to_onnx, "torch": to_torch}
