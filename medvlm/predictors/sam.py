"""SAM, MedSAM, SAM 2 and SAM-HQ: outlines from points and boxes, of segment-anything's files or transformers' folders.

The image is encoded once however many prompts follow. Points and boxes are (h, w) at the verbs and (x, y) for the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError
from ..imaging import window
from ..imaging.scan import Image, Volume
from ..sample import Segmentation
from .base import Model, clicks, corners, digest, pick, place, pretrained, reading

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of the RGB channels, 0..255. Source: facebookresearch/segment-anything, build_sam.py (its checkpoints do not hold them)."""
HEADS = 8
"""Of the mask decoder's attention, which no weight's shape tells. Source: the same file."""


def load(rest: str, device: str | None = None) -> PromptedModel:
    """A model that outlines what it is shown.

    Args:
        rest: "FILE.pth" or ".safetensors" in segment-anything's layout (SAM ViT-B, L, H: which one is told by the
            weights' shapes); "medsam:FILE.pth", the same layout with MedSAM's preprocessing; or a folder that transformers
            wrote (SAM, SAM 2, SAM-HQ, EdgeTAM).

    Raises:
        ModelError: NO_SUCH_PART when nothing is there; BAD_CHECKPOINT when it is something else, or incomplete.
    """
    medsam = rest.startswith("medsam:")
    path = Path(rest.removeprefix("medsam:"))
    if path.is_dir() and not medsam:
        from transformers import AutoImageProcessor, AutoModelForMaskGeneration

        model = pretrained(AutoModelForMaskGeneration, path)
        with reading("image processor"):
            processor = AutoImageProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        return PromptedModel(Folder(place(model, device), processor), model.config.model_type)
    if not path.is_file():
        raise ModelError(f"there is no file {str(path)!r}", "NO_SUCH_PART", "give sam:FILE.pth, sam:medsam:FILE.pth or sam:FOLDER")
    sam = place(build(weights(path)), device)
    return PromptedModel(MedSam(sam) if medsam else Original(sam), "medsam" if medsam else "sam", digest(path))


class PromptedModel(Model):
    """Points and boxes to outlines. ``present`` of what it gives is 1.0, or 0.0 where nothing was drawn."""

    def __init__(self, engine: Original | MedSam | Folder, name: str, sha256: str | None = None):
        self.engine, self.name, self.sha256 = engine, name, sha256
        self._seen: tuple | None = None

    def segment(self, study, target=None, *, points=None, boxes=None, image=None) -> Segmentation:
        """What lies at points, in a box, or both; ``target`` is only the name it is given.

        A single point may mean a part or the whole: of the three masks drawn the one of highest predicted IoU is kept.
        Everything else asks for one mask. Source: SAM, Kirillov et al. 2023, arXiv:2304.02643, section 3; MedSAM, which
        was trained with boxes, always asks for one.

        Raises:
            ModelError: UNSUPPORTED_VERB for a name without a prompt; OUT_OF_SCOPE for a volume; BAD_ARGUMENT.
        """
        if points is None and boxes is None:
            raise ModelError(f"{self.name} outlines what lies at points or in a box; it does not know {str(target)[:60]!r} by name",
                             "UNSUPPORTED_VERB", "give points= or boxes=")  # fmt: skip
        picture = self._picture(study, image)
        given = None if points is None else clicks(points, picture)
        return self._outline(picture, target or "target", given, None if boxes is None else corners(boxes, picture))

    def segment_boxes(self, study, boxes, target: str = "target", image: str | None = None) -> list[Segmentation]:
        """One outline for each box (P, 2, 2): lower and upper corner (h, w), half-open. The image is encoded once.

        Prompts go through the decoder one by one, which on CPU is faster than a batch of them.
        """
        picture = self._picture(study, image)
        given = [corners(box, picture) for box in boxes]
        return [self._outline(picture, target, None, box) for box in given]

    @torch.no_grad()
    def _outline(self, picture: Image, label: str, points: np.ndarray | None, box: np.ndarray | None) -> Segmentation:
        if self._seen is None or self._seen[0] is not picture:
            self._seen = (picture, *self.engine.embed(shown(picture)))
        _, embedding, inner = self._seen
        size = picture.shape[1:]
        scale = np.array(inner) / size
        device = self.engine.device
        xy = None if points is None else torch.tensor((points[:, :2] * scale)[:, ::-1].copy(), device=device).float()
        marks = None if points is None else torch.tensor(points[:, 2], device=device).int()
        xyxy = None if box is None else torch.tensor((box * scale)[:, ::-1].reshape(4).copy(), device=device).float()
        single = not (box is None and len(points) == 1)
        logits, quality = self.engine.draw(embedding, xy, marks, xyxy, size, inner, single)
        mask = (logits[int(quality.argmax())] > 0).cpu().numpy()
        return Segmentation(picture, label, mask, float(mask.any()))

    def _picture(self, study, image: str | None) -> Image:
        picture = pick(study, image)
        size = picture.shape[1:]
        if isinstance(picture, Volume):
            raise ModelError(f"{self.name} outlines single pictures; image {picture.id} is a {picture.modality} volume of {picture.shape[1]} slices",
                             "OUT_OF_SCOPE", "choose a slice and give it as an Image")  # fmt: skip
        if 2 * min(size) * self.engine.side < max(size):
            raise ModelError(f"image {picture.id} is {size[0]} x {size[1]}; fitted into {self.engine.side} x {self.engine.side} it is thinner than a pixel",
                             "OUT_OF_SCOPE", "cut it into pieces first")  # fmt: skip
        return picture


def shown(picture: Image) -> np.ndarray:
    """uint8 (H, W, 3) as a viewer shows it."""
    grey = window.display(picture)
    return grey if grey.ndim == 3 else np.repeat(grey[..., None], 3, -1)


class Original:
    """segment-anything's own modules, preprocessed as its SamPredictor does: the longest side fits, zeros follow it."""

    def __init__(self, sam):
        from segment_anything.utils.transforms import ResizeLongestSide

        self.sam, self.device, self.side = sam, sam.device, sam.image_encoder.img_size
        self.fit = ResizeLongestSide(self.side)

    def embed(self, rgb: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
        """The image's embedding, and the size (h, w) that the image has in the model's input."""
        small = torch.as_tensor(self.fit.apply_image(rgb), device=self.device).permute(2, 0, 1)[None]
        return self.sam.image_encoder(self.sam.preprocess(small)), tuple(small.shape[2:])

    def draw(self, embedding: Tensor, points, marks, box, size, inner, single: bool) -> tuple[Tensor, Tensor]:
        """Logits (M, H, W) on the image's grid and predicted IoU (M,). points (Q, 2), box (4,): (x, y) in the input."""
        low, quality = self._decode(embedding, points, marks, box, single)
        return self.sam.postprocess_masks(low, inner, size)[0], quality[0]

    def _decode(self, embedding, points, marks, box, single):
        sparse, dense = self.sam.prompt_encoder(
            points=None if points is None else (points[None], marks[None]), boxes=None if box is None else box[None], masks=None
        )
        return self.sam.mask_decoder(
            image_embeddings=embedding, image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=not single,
        )  # fmt: skip


class MedSam(Original):
    """MedSAM: stretched to the square input by splines, scaled to 0..1 between darkest and brightest, one mask; the mask
    is enlarged as a probability.

    Source: bowang-lab/MedSAM, MedSAM_Inference.py (Ma et al. 2024, arXiv:2304.12306); scikit-image's ``resize`` of order 3.
    """

    def embed(self, rgb):
        flat = rgb[..., :1] if (rgb[..., :1] == rgb).all() else rgb
        wide = spline(flat, (self.side, self.side)).astype(np.uint8).astype(np.float32).transpose(2, 0, 1)
        low, high = wide.min(), wide.max()
        pixels = torch.as_tensor((wide - low) / max(high - low, 1e-8), device=self.device).expand(3, -1, -1)
        return self.sam.image_encoder(pixels[None]), (self.side, self.side)

    def draw(self, embedding, points, marks, box, size, inner, single):
        low, quality = self._decode(embedding, points, marks, box, True)
        return F.interpolate(low.sigmoid(), size, mode="bilinear", align_corners=False)[0] - 0.5, quality[0]


class Folder:
    """transformers' SAM models with the image processor saved beside them, which decides the preprocessing."""

    def __init__(self, model, processor):
        self.model, self.processor, self.device = model, processor, model.device
        side = model.config.prompt_encoder_config.image_size
        self.side = side if isinstance(side, int) else side[0]

    def embed(self, rgb):
        given = self.processor(images=rgb, input_data_format="channels_last", return_tensors="pt")
        found = self.model.get_image_embeddings(given["pixel_values"].to(self.device))
        names = ("image_embeddings", "intermediate_embeddings")  # SAM-HQ draws on early features too
        seen = dict(zip(names, found)) if isinstance(found, tuple) else {"image_embeddings": found}
        fitted = {"reshaped_input_sizes": given["reshaped_input_sizes"]} if "reshaped_input_sizes" in given else {}  # SAM 2 stretches
        inner = given["reshaped_input_sizes"][0].tolist() if fitted else given["pixel_values"].shape[2:]
        return (seen, fitted), tuple(inner)

    def draw(self, embedding, points, marks, box, size, inner, single):
        seen, fitted = embedding
        out = self.model(
            **seen, multimask_output=not single, input_points=None if points is None else points[None, None],
            input_labels=None if marks is None else marks[None, None], input_boxes=None if box is None else box[None, None],
        )  # fmt: skip
        (logits,) = self.processor.post_process_masks([out.pred_masks[0]], [size], binarize=False, **fitted)
        return logits[0], out.iou_scores[0, 0]


def spline(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float64 (H, W, C) at another size by cubic splines, smoothed before it shrinks. Equal to scikit-image's
    ``transform.resize(array, size, order=3, preserve_range=True, anti_aliasing=True)``."""
    from scipy import ndimage

    values = array.astype(float)
    factors = np.array(array.shape[:2]) / size
    blur = np.maximum(0, (factors - 1) / 2)
    wide = [ndimage.zoom(ndimage.gaussian_filter(plane, blur, mode="mirror"), 1 / factors, order=3, mode="mirror", grid_mode=True)
            for plane in np.moveaxis(values, -1, 0)]  # fmt: skip
    return np.clip(np.stack(wide, -1), values.min(), values.max())


def weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, bare or under "model", as trainings save them; no code in it is run.

    Raises:
        ModelError: BAD_CHECKPOINT when it is damaged or holds anything but tensors and plain data.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in every way; torch's own text would tell how to run the code
        raise ModelError(f"the checkpoint is damaged, or holds more than tensors ({type(error).__name__}); nothing in it was run",
                         "BAD_CHECKPOINT", "save its state_dict alone, best as .safetensors") from error  # fmt: skip
    found = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ModelError("the checkpoint is no state_dict of tensors", "BAD_CHECKPOINT", "save the model's state_dict")
    return dict(found)


def build(state: Mapping[str, Tensor]):
    """segment-anything's Sam of the size that its weights tell, with them.

    Source: facebookresearch/segment-anything, build_sam.py.

    Raises:
        ModelError: BAD_CHECKPOINT when weights are missing, unknown or of the wrong shape.
    """
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    try:
        vision, prompt, decoder, transformer = measure({k: tuple(v.shape) for k, v in state.items()})
        sam = Sam(
            ImageEncoderViT(qkv_bias=True, use_rel_pos=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), **vision),
            PromptEncoder(**prompt),
            MaskDecoder(transformer=TwoWayTransformer(num_heads=HEADS, **transformer), **decoder),
            list(MEAN), list(STD),
        )  # fmt: skip
        sam.load_state_dict(state)
    except (KeyError, IndexError, ValueError, ZeroDivisionError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ModelError(f"the weights are not those of a SAM in segment-anything's layout: {said}", "BAD_CHECKPOINT",
                         "give a SAM or MedSAM checkpoint; SAM 2 and SAM-HQ are read from transformers' folders") from error  # fmt: skip
    return sam


def measure(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict, dict, dict, dict]:
    """Arguments of ImageEncoderViT, PromptEncoder, MaskDecoder and TwoWayTransformer, from the shapes of the weights."""

    def count(prefix: str) -> int:
        """Layers ``prefix``0, 1, 2, ... that are there."""
        found = {int(k[len(prefix) :].split(".")[0]) for k in shapes if k.startswith(prefix)}
        if found != set(range(len(found))) or not found:
            raise ValueError(f"{prefix} has layers {sorted(found)[:5]}")
        return len(found)

    dim, _, patch, _ = shapes["image_encoder.patch_embed.proj.weight"]
    grid = shapes["image_encoder.pos_embed"][1]
    depth = count("image_encoder.blocks.")
    spans = [(shapes[f"image_encoder.blocks.{i}.attn.rel_pos_h"][0] + 1) // 2 for i in range(depth)]
    out = shapes["image_encoder.neck.0.weight"][0]
    vision = {
        "img_size": grid * patch, "patch_size": patch, "embed_dim": dim, "depth": depth, "out_chans": out,
        "num_heads": dim // shapes["image_encoder.blocks.0.attn.rel_pos_h"][1],
        "mlp_ratio": shapes["image_encoder.blocks.0.mlp.lin1.weight"][0] / dim,
        "window_size": min(spans) if min(spans) < grid else 0, "global_attn_indexes": tuple(i for i, s in enumerate(spans) if s == grid),
    }  # fmt: skip
    prompt = {
        "embed_dim": out, "image_embedding_size": (grid, grid), "input_image_size": (grid * patch, grid * patch),
        "mask_in_chans": shapes["prompt_encoder.mask_downscaling.3.weight"][0],
    }  # fmt: skip
    decoder = {
        "transformer_dim": out, "num_multimask_outputs": shapes["mask_decoder.mask_tokens.weight"][0] - 1,
        "iou_head_depth": count("mask_decoder.iou_prediction_head.layers."),
        "iou_head_hidden_dim": shapes["mask_decoder.iou_prediction_head.layers.0.weight"][0],
    }  # fmt: skip
    transformer = {
        "depth": count("mask_decoder.transformer.layers."), "embedding_dim": out,
        "mlp_dim": shapes["mask_decoder.transformer.layers.0.mlp.lin1.weight"][0],
    }  # fmt: skip
    return vision, prompt, decoder, transformer
