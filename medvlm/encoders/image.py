"""Any image tower of timm, open_clip or transformers, as an encoder of 2-D pictures.

What is read of a tower, and what is left out:

- timm: a feature pyramid as it comes; of a plain transformer the last block after the final norm.
- open_clip: the last block after the final norm (a CoCa tower has none before its pooler), or the last stage of a ResNet.
  Towers that open_clip takes from timm are timm's.
- transformers: ``last_hidden_state``, that is the last block after the final norm, or without it where the library adds
  none (CLIP).

Pooling heads and projections are left out: ``pooled`` is the class token, or the mean where there is none or where timm
does not give it. Earlier blocks (``feature_layer=-2``, as LLaVA reads them) come without the final norm.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..preprocess import InputSpec
from . import loading
from .base import Encoder, Features, as_map, freeze_unread, quarters, resize_positions


class ImageEncoder(Encoder):
    """Maps of a tower, finest first, as Features; a child says how to ``read`` them."""

    def __init__(self, spec: InputSpec, dims: tuple[int, ...], strides: tuple[int, ...]):
        super().__init__()
        self.spec, self.dim, self.stride = spec, dims[-1], strides[-1]
        self.level_dims, self.level_strides = tuple(dims), tuple(strides)

    def read(self, x: Tensor, grid: tuple[int, int]) -> tuple[list[Tensor], Tensor | None]:
        """(B, C_i, h_i, w_i) of each level, the last one on the grid of the tokens; and (B, C) where the tower pools."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Features:
        grid = self.grid(x.shape[2:])
        levels, pooled = self.read(x, grid)
        tokens = levels[-1].flatten(2).transpose(1, 2)
        return Features(tokens, grid, tokens.mean(1) if pooled is None else pooled, tuple(levels))


class TimmEncoder(ImageEncoder):
    def __init__(self, backbone: nn.Module, spec: InputSpec, fixed: bool):
        super().__init__(spec, backbone.feature_info.channels(), backbone.feature_info.reduction())
        self.backbone, self.fixed = backbone, fixed
        self.channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"

    def read(self, x, grid):
        if self.fixed and tuple(x.shape[2:]) != self.spec.size:
            raise ModelError(f"this timm model is bound to {self.spec.size} pixels and cannot see {tuple(x.shape[2:])}", "BAD_ARGUMENT",
                             "build it with this size")  # fmt: skip
        levels = self.backbone(x)
        return [m.permute(0, 3, 1, 2).contiguous() for m in levels] if self.channels_last else list(levels), None

    def visible(self, x, keep):
        from timm.models.vision_transformer import VisionTransformer

        net = getattr(self.backbone, "model", None)
        if not isinstance(net, VisionTransformer):
            return super().visible(x, keep)
        states = net._pos_embed(net.patch_embed(x))
        prefix = states[:, : net.num_prefix_tokens]
        states = net.norm_pre(torch.cat([prefix, torch.take_along_dim(states[:, prefix.shape[1] :], keep[..., None], 1)], 1))
        for block in net.blocks:
            states = block(states)
        return net.norm(states)


class OpenClipTransformer(ImageEncoder):
    """open_clip's own VisionTransformer."""

    def __init__(self, tower: nn.Module, spec: InputSpec, feature_layer: int):
        depth = len(tower.transformer.resblocks) + 1 + feature_layer
        self.blocks = [q - 1 for q in quarters(depth)]
        super().__init__(spec, (tower.transformer.width,) * len(self.blocks), (tower.patch_size[0],) * len(self.blocks))
        tower.prune_intermediate_layers(self.blocks)  # also drops the projection
        if feature_layer != -1 or tower.attn_pool is not None:
            tower.ln_post = nn.Identity()
        tower.attn_pool = None
        self.tower = tower

    def read(self, x, grid):
        tower, first = self.tower, self.tower.positional_embedding[None, :1]
        patches = tower.conv1(x).flatten(2).transpose(1, 2) + resize_positions(tower.positional_embedding[None, 1:], tower.grid_size, grid)
        prefix = (tower.class_embedding + first).expand(len(x), -1, -1).to(patches.dtype)
        states = tower.ln_pre(tower.patch_dropout(torch.cat([prefix, patches], 1)))
        _, states = tower.transformer.forward_intermediates(states, indices=self.blocks)
        last = tower.ln_post(states[-1])
        pooled = last[:, 0] if tower.pool_type == "tok" else tower.ln_post(states[-1][:, 1:].mean(1)) if tower.final_ln_after_pool else None
        return [as_map(s[:, 1:], grid) for s in (*states[:-1], last)], pooled


class OpenClipResNet(ImageEncoder):
    """open_clip's ModifiedResNet without its attention pooling."""

    def __init__(self, tower: nn.Module, spec: InputSpec):
        stages = (tower.layer1, tower.layer2, tower.layer3, tower.layer4)
        super().__init__(spec, tuple(stage[-1].bn3.num_features for stage in stages), (4, 8, 16, 32))
        tower.attnpool = None
        self.tower = tower

    def read(self, x, grid):
        return self.tower.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)["image_intermediates"], None


class TransformersEncoder(ImageEncoder):
    """A plain vision transformer of transformers: class and register tokens stand before the patches and are left out."""

    def __init__(self, tower: nn.Module, spec: InputSpec, patch: int, feature_layer: int):
        self.blocks = quarters(tower.config.num_hidden_layers + 1 + feature_layer)
        super().__init__(spec, (tower.config.hidden_size,) * len(self.blocks), (patch,) * len(self.blocks))
        self.tower, self.feature_layer = tower, feature_layer
        takes = inspect.signature(tower.forward).parameters
        if others := [k for k, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and k != "pixel_values"]:
            raise ModelError(f"the {tower.config.model_type} tower needs {', '.join(others)} beside the pixels", "BAD_RECIPE",
                             "choose a tower that sees whole pictures")  # fmt: skip
        self.resizes = "interpolate_pos_encoding" in takes

    def read(self, x, grid):
        out = self.tower(x, output_hidden_states=True, **({"interpolate_pos_encoding": True} if self.resizes else {}))
        last = out.last_hidden_state if self.feature_layer == -1 else out.hidden_states[self.feature_layer]
        prefix = last.shape[1] - prod(grid) if last.ndim == 3 else -1
        if prefix < 0:
            raise ModelError(f"the {self.tower.config.model_type} tower gives {tuple(last.shape)} for a grid of {grid}", "BAD_RECIPE",
                             'pyramids are read through library="timm"')  # fmt: skip
        states = (*(out.hidden_states[b] for b in self.blocks[:-1]), last)
        return [as_map(s[:, prefix:], grid) for s in states], last[:, 0] if prefix else None


def build(
    library: str = "timm", model: str | Mapping | None = None, size: tuple[int, int] | None = None, channels: int | None = None,
    mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None, feature_layer: int = -1, weights: str | None = None,
    windows: tuple[tuple[float, float], ...] = (), standardise: bool = False,
) -> ImageEncoder:  # fmt: skip
    """An image tower as an encoder.

    Args:
        library: "timm", "open_clip" or "transformers".
        model: timm: a name of ``timm.list_models()``, by default regnety_004, or {"name", **arguments of its class} for one
            of another shape. open_clip: a name of ``open_clip.list_models()``, or {"embed_dim", "vision_cfg": {...}} as in
            its model files. transformers: the arguments of a vision configuration, {"model_type": "siglip_vision_model",
            "hidden_size": ...}.
        size: (H, W) of the input, a multiple of the stride. By default what the weights were trained with, or the
            model's own.
        channels: of the input; timm takes any number (1 by default, 3 with weights), other towers have their own.
        mean, std: per channel, of display values in [0, 1]. By default those the weights were trained with; without
            weights 0.5 and 0.25.
        feature_layer: which block of a plain transformer gives the tokens: -1 the last, -2 the one before it, ...
        weights: random without. A local file (timm, open_clip), a folder as the library saves it, a hub id
            ("org/name"; needs the network), an open_clip tag, or "pretrained" for the library's own (timm, open_clip).
            Weights on the grid of another size are interpolated.
        windows: (centre, width) in HU, one a channel, through which CT in HU is seen; other images, and CT without them, as
            a viewer shows them.
        standardise: what a viewer would show is made alike from picture to picture (:func:`medvlm.preprocess.standardised`).

    Raises:
        ModelError: NO_SUCH_PART for a library or model that is not there, BAD_CHECKPOINT for weights that cannot be read,
            would run code, or have missing or extra names, BAD_RECIPE for arguments that do not fit the tower.
    """
    makers = {"timm": _timm, "open_clip": _open_clip, "transformers": _transformers}
    if library not in makers:
        raise ModelError(f"there is no library {library!r:.40}; there are: {', '.join(makers)}", "NO_SUCH_PART", "")
    given = {"size": None if size is None else tuple(size), "channels": channels, "mean": mean, "std": std, "windows": windows, "standardise": standardise}
    encoder, made = makers[library](model, given, feature_layer, weights)
    encoder.grid()  # refuses a size that is no multiple of the stride
    spec = encoder.spec
    if len(spec.mean) != spec.channels or len(spec.std) != spec.channels:
        raise ModelError(f"mean and std have {len(spec.mean)} and {len(spec.std)} values for {spec.channels} channels", "BAD_RECIPE", "give one a channel")
    if spec.windows and len(spec.windows) != spec.channels:
        raise ModelError(f"{len(spec.windows)} windows for {spec.channels} channels", "BAD_RECIPE", "give one a channel")
    if weights is not None:
        encoder.arguments = {"library": library, "model": made, "size": spec.size, "channels": spec.channels, "mean": spec.mean, "std": spec.std,
                             "feature_layer": feature_layer, "windows": spec.windows, "standardise": spec.standardise}  # fmt: skip
    return encoder


def _spec(given: Mapping, channels: int, size: tuple[int, int], published: tuple | None) -> InputSpec:
    """What was asked for before what was published; (mean, std) of colour serve a grey input by their average."""
    mean, std = published or ((0.5,) * channels, (0.25,) * channels)
    if len(mean) == 3 and channels == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    return InputSpec(given["size"] or tuple(size), channels, mean=tuple(given["mean"] or mean), std=tuple(given["std"] or std),
                     windows=tuple(map(tuple, given["windows"])), standardise=given["standardise"])  # fmt: skip


def _timm(model: str | Mapping | None, given: Mapping, feature_layer: int, weights: str | None, state: Mapping | None = None, published: tuple | None = None):
    """state: weights of the tower that are known to fit, with the (mean, std) they were trained with."""
    import timm
    from timm.models._features import FeatureGetterNet

    config, source = {}, None if weights in (None, "pretrained") else loading.where(weights)
    if source == "folder":
        with loading.reading(weights):
            config, architecture, _ = timm.models._hub.load_model_config_from_path(weights)
            state, model = timm.models._hub.load_state_dict_from_path(weights), model or architecture
    elif source == "file":
        with loading.reading(weights):
            state = timm.models.load_state_dict(weights)
    elif source == "hub":
        with loading.reading(weights):
            config, architecture, _ = timm.models.load_model_config_from_hf(weights)
            state, model = timm.models.load_state_dict_from_hf(weights), model or architecture
    shape = {k: v for k, v in model.items() if k != "name"} if isinstance(model, Mapping) else {}
    name = model.get("name") if isinstance(model, Mapping) else model or "regnety_004"
    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]):
        raise ModelError(f"timm has no model {name!r:.60}", "NO_SUCH_PART", "see timm.list_models()")
    channels = given["channels"] or (1 if weights is None and state is None else 3)
    with torch.device("meta"):
        probe = timm.create_model(name, in_chans=channels)
        takes = inspect.signature(type(probe)).parameters
        if wrong := sorted(shape.keys() - takes.keys() | shape.keys() & {"in_chans", "img_size", "num_classes"}):
            raise ModelError(f"{name} takes no {', '.join(wrong)}", "BAD_RECIPE", f"see timm's {type(probe).__name__}; size and channels are given beside it")
        probe = timm.create_model(name, in_chans=channels, **shape) if shape else probe
    config = {**probe.pretrained_cfg, **{k: v for k, v in config.items() if v is not None}}
    if weights is not None:
        published = config["mean"], config["std"]
    if state is not None:
        _check_timm(probe, dict(state), weights or name)
    spec = _spec(given, channels, config["input_size"][1:], published)

    args = shape | {k: v for k, v in (("img_size", spec.size), ("dynamic_img_size", True), ("strict_img_size", False)) if k in takes}
    if weights is not None or state is not None:
        args |= {"pretrained": True} | ({} if state is None else {"pretrained_cfg_overlay": {"state_dict": dict(state)}})
    info = getattr(probe.feature_info, "info", probe.feature_info)
    plain = len({level["reduction"] for level in info}) == 1
    with loading.reading(weights or name):
        net = timm.create_model(name, in_chans=channels, **args, **({"num_classes": 0} if plain else {"features_only": True}))
    net.pretrained_cfg.pop("state_dict", None)  # timm would keep a second copy of the weights
    fixed = timm.models.get_model_input_config(net)["fixed_input_size"]
    if plain:
        blocks = [q - 1 for q in quarters(len(info) + 1 + feature_layer)]
        net = FeatureGetterNet(net, out_indices=blocks, norm=feature_layer == -1)
    elif feature_layer != -1:
        raise ModelError(f"{name} is a pyramid: it has no feature_layer {feature_layer}", "BAD_RECIPE", "leave feature_layer at -1")
    return TimmEncoder(net, spec, fixed), model or name


def _check_timm(probe: nn.Module, state: dict, weights: str) -> None:
    """timm loads what fits and logs the rest; here the rest is an error, but for the classifier."""
    change = getattr(sys.modules[type(probe).__module__], "checkpoint_filter_fn", None)
    with loading.reading(weights):
        seen = (change(state, probe) if change else state).keys()
    heads = probe.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    known = probe.state_dict().keys()
    loading.compare(weights, *({k for k in names if not k.startswith(heads)} if heads else names for names in (known - seen, seen - known)))


def _open_clip(model: str | Mapping | None, given: Mapping, feature_layer: int, weights: str | None):
    """Of open_clip's folders and hub repositories only the image tower is built and read."""
    import open_clip

    if isinstance(model, str) and model not in open_clip.list_models():
        raise ModelError(f"open_clip has no model {model!r:.60}", "NO_SUCH_PART", "see open_clip.list_models()")
    state = published = None
    config = open_clip.get_model_config(model) if isinstance(model, str) else model
    if weights is not None and isinstance(model, str):
        if weights == "pretrained":
            weights = open_clip.list_pretrained_tags_by_model(model)[0]
        elif weights not in open_clip.list_pretrained_tags_by_model(model) and loading.where(weights) != "file":
            raise ModelError(f"open_clip's {model} has no weights {weights!r}", "BAD_CHECKPOINT", "give a tag of open_clip.list_pretrained(), or a file")
        with loading.reading(weights):
            whole = open_clip.create_model(model, pretrained=weights, require_pretrained=True)
        state, published = whole.visual.state_dict(), (whole.visual.image_mean, whole.visual.image_std)
    elif weights is not None:
        config, state, published = _open_clip_folder(weights)
    if not config or "vision_cfg" not in config:
        raise ModelError("an open_clip tower needs a model with a vision_cfg", "BAD_RECIPE", 'give a name, {"embed_dim": ..., "vision_cfg": {...}}, or weights')
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    made = model if weights is None else {"embed_dim": config["embed_dim"], "quick_gelu": config.get("quick_gelu", False), "vision_cfg": dict(vision)}
    own = vision.get("image_size", 224)
    size = given["size"] or ((own, own) if isinstance(own, int) else tuple(own))
    if name := vision.get("timm_model_name"):
        trunk = None if state is None else {k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")}
        return _timm(name, {**given, "channels": given["channels"] or 3, "size": size}, feature_layer, None, trunk, published)[0], made
    if given["channels"] not in (None, 3):
        raise ModelError(f"an open_clip tower sees 3 channels, not {given['channels']}", "BAD_RECIPE", "leave channels at 3; grey is repeated")
    text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}  # thrown away
    tower = open_clip.CLIP(config.get("embed_dim", 512), vision, text, quick_gelu=config.get("quick_gelu", False)).visual
    if state is not None:
        loading.compare(weights, tower.state_dict().keys() - state, state.keys() - tower.state_dict())
        with loading.reading(weights):
            tower.load_state_dict(state)
    spec = _spec(given, 3, size, published)
    if isinstance(tower, open_clip.transformer.VisionTransformer):
        return OpenClipTransformer(tower, spec, feature_layer), made
    if feature_layer != -1:
        raise ModelError(f"this open_clip tower is a ResNet: it has no feature_layer {feature_layer}", "BAD_RECIPE", "leave feature_layer at -1")
    return OpenClipResNet(tower, spec), made


def _open_clip_folder(weights: str) -> tuple[dict, dict, tuple]:
    """(model_cfg, weights of the image tower, (mean, std)) of a folder or hub id as open_clip saves them."""
    import json

    import open_clip
    from timm.models import load_state_dict

    names = ("open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    folder = Path(weights)
    if loading.where(weights) == "hub":
        from huggingface_hub import snapshot_download

        with loading.reading(weights):
            folder = Path(snapshot_download(weights.removeprefix("hf-hub:"), allow_patterns=names))
    with loading.reading(weights, f"give a folder with {names[0]} and {names[1]}"):
        config = json.loads((folder / names[0]).read_text(encoding="utf-8"))
        found = next((folder / n for n in names[1:] if (folder / n).is_file()), folder / names[1])
        whole = load_state_dict(str(found))
        seen = config.get("preprocess_cfg", {})
        mean, std = seen.get("mean", open_clip.OPENAI_DATASET_MEAN), seen.get("std", open_clip.OPENAI_DATASET_STD)
        return config["model_cfg"], {k.removeprefix("visual."): v for k, v in whole.items() if k.startswith("visual.")}, (tuple(mean), tuple(std))


def _transformers(model: Mapping | None, given: Mapping, feature_layer: int, weights: str | None):
    if isinstance(model, str):
        raise ModelError(f"a transformers tower is made of its configuration's arguments, not of {model!r:.60}", "BAD_RECIPE",
                         "give a dict with model_type, or the name as weights")  # fmt: skip
    args = dict(model or {})
    size = given["size"]
    if weights is None and size and size[0] == size[1]:
        args.setdefault("image_size", size[0])
    tower = loading.transformers_tower(args, weights, "vision_config")
    config, published = tower.config, None
    patch, channels, own = getattr(config, "patch_size", None), getattr(config, "num_channels", 3), getattr(config, "image_size", None)
    patch = patch[0] if isinstance(patch, (list, tuple)) and len(set(patch)) == 1 else patch
    if not isinstance(patch, int) or not hasattr(config, "hidden_size"):
        raise ModelError(f"a {config.model_type} tower is no plain transformer of square patches", "BAD_RECIPE", 'pyramids are read through library="timm"')
    if given["channels"] not in (None, channels):
        raise ModelError(f"the {config.model_type} tower sees {channels} channels, not {given['channels']}", "BAD_RECIPE", "leave channels to the tower")
    if weights is not None and None in (given["size"], given["mean"], given["std"]):
        from transformers import AutoImageProcessor

        with loading.reading(weights, "give size, mean and std, or a folder with a preprocessor_config.json"):
            processor = AutoImageProcessor.from_pretrained(weights, trust_remote_code=False)
        published = processor.image_mean, processor.image_std
        seen = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        own = (seen["height"], seen["width"]) if seen.get("height") else seen.get("shortest_edge", own)
    size = size or (tuple(own) if isinstance(own, (list, tuple)) else (own, own))
    encoder = TransformersEncoder(tower, _spec(given, channels, size, published), patch, feature_layer)
    encoder.grid()
    freeze_unread(encoder)
    return encoder, loading.configuration(tower)
