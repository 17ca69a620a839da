"""Any timm backbone that gives a feature pyramid, as an encoder of 2-D pictures."""

from __future__ import annotations

import timm
from torch import Tensor

from ..errors import ModelError
from ..preprocess import InputSpec
from .base import Encoder, Features


class ImageEncoder(Encoder):
    def __init__(self, backbone, spec: InputSpec):
        super().__init__()
        self.backbone, self.spec = backbone, spec
        info = backbone.feature_info
        self.dim, self.stride = info.channels()[-1], info.reduction()[-1]
        self.level_dims, self.level_strides = tuple(info.channels()), tuple(info.reduction())

    def forward(self, x: Tensor) -> Features:
        levels = tuple(self.backbone(x))
        last = levels[-1]
        return Features(last.flatten(2).transpose(1, 2), tuple(last.shape[2:]), last.mean((2, 3)), levels)


def build(
    model: str = "regnety_004", size: tuple[int, int] = (256, 256), channels: int = 1, pretrained: bool = False,
    mean: tuple[float, ...] = (0.5,), std: tuple[float, ...] = (0.25,),
) -> ImageEncoder:  # fmt: skip
    """A timm model as an encoder.

    Args:
        model: any name of ``timm.list_models()`` whose features can be read level by level; never a hub address.
        size: (H, W) of the input, a multiple of the coarsest stride.
        pretrained: fetch timm's weights (needs the network); the default starts from random weights.
        mean, std: per channel, of display values in [0, 1].

    Raises:
        ModelError: NO_SUCH_PART for a name that timm does not have.
    """
    if model.split(".")[0] not in timm.list_models():
        raise ModelError(f"timm has no model {model[:60]!r}", "NO_SUCH_PART", "see timm.list_models()")
    backbone = timm.create_model(model, features_only=True, in_chans=channels, pretrained=pretrained)
    return ImageEncoder(backbone, InputSpec(tuple(size), channels, mean=tuple(mean), std=tuple(std)))
