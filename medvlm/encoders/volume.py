"""Volumes through a 3-D network of MONAI: ViT, the SwinUNETR encoder, SegResNet or ResNet.

Only what encodes is kept of a segmentation network; its saved weights load with the rest left out. Strides may differ by
axis: a ViT's patch, a Swin's patch and a ResNet's first stride are numbers or one number an axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..imaging import window
from ..preprocess import InputSpec
from . import loading
from .base import Encoder, Features, as_map, freeze_unread, quarters, resize_positions


class VolumeEncoder(Encoder):
    """Maps of a network, finest first, as Features; a child says how to ``read`` them."""

    def __init__(self, net: nn.Module, spec: InputSpec, dims: tuple[int, ...], strides: tuple[tuple[int, ...], ...]):
        super().__init__()
        self.net, self.spec, self.dim = net, spec, dims[-1]
        self.level_dims = tuple(dims)
        self.level_strides = tuple(s[0] if len(set(s)) == 1 else tuple(s) for s in strides)
        self.stride = self.level_strides[-1]

    def read(self, x: Tensor) -> list[Tensor]:
        """(B, C_i, d_i, h_i, w_i) of each level, the last one on the grid of the tokens."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Features:
        grid = self.grid(x.shape[2:])
        levels = self.read(x)
        tokens = levels[-1].flatten(2).transpose(1, 2)
        return Features(tokens, grid, tokens.mean(1), tuple(levels))


class ViT(VolumeEncoder):
    """Blocks at quarters of the depth as levels, all at the patch's stride; the last one after the final norm.

    With ``classification`` a class token goes before the patches, as weights that were trained with one need (M3D-CLIP:
    BAAI-DCAI/M3D, LaMed/src/model/multimodal_encoder/vit.py); it is no token of the features.
    """

    def __init__(self, args, spec):
        from monai.networks import nets

        patch = _each(args.pop("patch", 16))
        net = nets.ViT(spec.channels, spec.size, patch, **args)
        net.classification_head = None
        for block in net.blocks:  # an encoder has nothing to attend across to; older releases saved no such names
            block.norm_cross_attn = block.cross_attn = nn.Identity()
        self.blocks = quarters(len(net.blocks))
        super().__init__(net, spec, (net.norm.normalized_shape[0],) * len(self.blocks), (patch,) * len(self.blocks))

    def embed(self, x):
        """(B, N, C) patches with their positions."""
        embed, grid = self.net.patch_embedding, self.grid(x.shape[2:])
        x = embed.patch_embeddings(x)
        x = x.flatten(2).transpose(1, 2) if embed.proj_type == "conv" else x
        return embed.dropout(x + resize_positions(embed.position_embeddings, self.grid(), grid))

    def led(self, x):
        """The class token before the patches, where the net has one."""
        return torch.cat([self.net.cls_token.expand(len(x), -1, -1), x], 1) if self.net.classification else x

    def read(self, x):
        grid, x = self.grid(x.shape[2:]), self.led(self.embed(x))
        levels = []
        for number, block in enumerate(self.net.blocks, 1):
            x = block(x)
            if number in self.blocks:
                levels.append(x)
        first = int(self.net.classification)
        return [as_map(v[:, first:], grid) for v in (*levels[:-1], self.net.norm(x))]

    def visible(self, x, keep):
        x = self.led(torch.take_along_dim(self.embed(x), keep[..., None], 1))
        for block in self.net.blocks:
            x = block(x)
        return self.net.norm(x)


class Swin(VolumeEncoder):
    """Five maps, each halving the one before, layer-normalised as SwinUNETR reads them."""

    def __init__(self, args, spec):
        from monai.networks.nets.swin_unetr import SwinTransformer

        patch, reach = _each(args.pop("patch", 2)), _each(args.pop("window", 7))
        shape = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24), **args}
        net = SwinTransformer(spec.channels, window_size=reach, patch_size=patch, norm_layer=nn.LayerNorm, **shape)
        super().__init__(net, spec, tuple(shape["embed_dim"] * 2**i for i in range(5)), tuple(tuple(p * 2**i for p in patch) for i in range(5)))

    def read(self, x):
        return self.net(x, normalize=True)


class SegResNet(VolumeEncoder):
    """The way down of SegResNet, from stride 1; each level halves the one before."""

    def __init__(self, args, spec):
        from monai.networks import nets

        net = nets.SegResNet(in_channels=spec.channels, **args)
        del net.up_layers, net.up_samples, net.conv_final
        depth = len(net.down_layers)
        super().__init__(net, spec, tuple(net.init_filters * 2**i for i in range(depth)), tuple((2**i,) * 3 for i in range(depth)))

    def read(self, x):
        return self.net.encode(x)[1]


class ResNet(VolumeEncoder):
    """The four stages of a ResNet."""

    def __init__(self, args, spec):
        from monai.networks import nets

        shape = {"block": "basic", "layers": (2, 2, 2, 2), "block_inplanes": (64, 128, 256, 512), **args}
        net = nets.ResNet(n_input_channels=spec.channels, feed_forward=False, **shape)
        first = _each(shape.get("conv1_t_stride", 1))
        once = 1 if shape.get("no_max_pool") else 2
        stages = (net.layer1, net.layer2, net.layer3, net.layer4)
        dims = tuple([m for m in stage.modules() if isinstance(m, nn.Conv3d)][-1].out_channels for stage in stages)
        super().__init__(net, spec, dims, tuple(tuple(f * once * 2**i for f in first) for i in range(4)))

    def read(self, x):
        net = self.net
        x = net.act(net.bn1(net.conv1(x)))
        x = x if net.no_max_pool else net.maxpool(x)
        levels = []
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
            levels.append(x)
        return levels


def _each(number: int | tuple[int, ...]) -> tuple[int, ...]:
    return (number,) * 3 if isinstance(number, int) else tuple(number)


NETS = {"vit": ViT, "swin_unetr": Swin, "segresnet": SegResNet, "resnet": ResNet}
SAVED = {
    "vit": ("", ("cls_token", "classification_head*", "blocks.*cross_attn.*")),
    "swin_unetr": ("swinViT.", ("encoder*", "decoder*", "out*")),
    "segresnet": ("", ("up_layers*", "up_samples*", "conv_final*")),
    "resnet": ("", ("fc*",)),
}
"""Where the encoder stands in a network's saved weights, and patterns of names that are not read where it has none of them."""


def build(
    net: str = "vit", size: tuple[int, int, int] = (32, 256, 256), windows: tuple = ("soft tissue",), unit: str = "HU",
    spacing: tuple[float, float, float] | None = None, channels: int | None = None, mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None, model: Mapping | None = None, weights: str | None = None,
) -> VolumeEncoder:  # fmt: skip
    """A 3-D network of MONAI as an encoder of volumes.

    Args:
        net: "vit", "swin_unetr", "segresnet" or "resnet".
        size: (D, H, W) of the input, a multiple of the stride.
        windows: names ("lung", "bone", ..., or "medgemma" for its three) or (centre, width) pairs, one channel each; ()
            takes the values as they are.
        unit: of the values, "HU" for CT; "display" and "raw" as in :class:`InputSpec`.
        spacing: mm along (D, H, W) to resample to; None scales to ``size``.
        channels: where there are no windows; 1 by default.
        mean, std: per channel after windowing; 0 and 1 by default.
        model: arguments of MONAI's class. "patch" (vit, swin_unetr) and "window" (swin_unetr) are numbers or one an axis.
        weights: a local file of the same network, whole or its encoder; random without.

    Raises:
        ModelError: NO_SUCH_PART for a net that is not there, BAD_CHECKPOINT for weights that do not fit it, MISSING_EXTRA
            without MONAI. UsageError: BAD_ARGUMENT for a window that is not there.
    """
    if net not in NETS:
        raise ModelError(f"there is no 3-D net {net!r:.40}; there are: {', '.join(NETS)}", "NO_SUCH_PART", "")
    pairs = window.named(windows)
    if pairs and channels not in (None, len(pairs)):
        raise ModelError(f"{len(pairs)} windows make {len(pairs)} channels, not {channels}", "BAD_RECIPE", "leave channels out")
    channels = len(pairs) or channels or 1
    spec = InputSpec(tuple(size), channels, spacing and tuple(spacing), unit, pairs, tuple(mean or (0.0,) * channels), tuple(std or (1.0,) * channels))
    try:
        encoder = NETS[net](dict(model or {}), spec)
    except ImportError as error:
        raise ModelError("3-D encoders need MONAI, and its transformers einops", "MISSING_EXTRA", "pip install monai einops") from error
    except ValueError as error:
        raise ModelError(f"MONAI cannot build this {net}: {str(error)[:200]}", "BAD_RECIPE", "see the arguments of its class") from error
    encoder.grid()
    freeze_unread(encoder)
    if weights is not None:
        loading.load_part(encoder.net, weights, *SAVED[net])
        encoder.arguments = {"net": net, "size": spec.size, "windows": pairs, "unit": unit, "spacing": spec.spacing, "channels": channels,
                             "mean": spec.mean, "std": spec.std, "model": dict(model or {})}  # fmt: skip
    return encoder
