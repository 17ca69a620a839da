"""The mask head against segment-anything's own modules and against transformers' port of them, with the same weights."""

import numpy as np
import pytest
import torch

from medvlm.encoders.base import Features
from medvlm.heads import mask as heads

SIZE, STRIDE, DIM = (64, 96), 8, 32


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def head(size=SIZE, seed=0):
    torch.manual_seed(seed)
    return heads.build((8, 16), (4, 16), lm_dim=24, size=size, dim=DIM, stride=STRIDE, heads=4).eval()


def embedding(count: int, size=SIZE):
    return torch.randn(count, DIM, size[0] // STRIDE, size[1] // STRIDE, generator=torch.Generator().manual_seed(count))


def single(made, one, sparse, dense):
    """segment-anything's own decoder: one image, all its masks."""
    return made.decoder.predict_masks(image_embeddings=one, image_pe=made.prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense)


@torch.no_grad()
def test_one_image_and_several_prompts():
    made = head()
    image, points = embedding(1), torch.tensor([[[10.0, 20.0], [50.0, 90.0]], [[1.0, 2.0], [3.0, 4.0]], [[30.0, 95.0], [0.0, 0.0]]])
    sparse, dense = made.prompt_encoder(points=(points, torch.tensor([[1, 0], [1, 1], [1, -1]])), boxes=None, masks=None)
    masks, quality, _ = heads.decode(made.decoder, image.expand(3, -1, -1, -1), made.prompt_encoder.get_dense_pe(), sparse, dense)
    theirs, iou = single(made, image, sparse, dense)
    torch.testing.assert_close(masks, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(quality, iou, rtol=0, atol=1e-5)
    single_mask, single_iou = made.decoder(image_embeddings=image, image_pe=made.prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=sparse,
                                           dense_prompt_embeddings=dense, multimask_output=False)  # fmt: skip
    torch.testing.assert_close(masks[:, :1], single_mask, rtol=0, atol=1e-5)
    torch.testing.assert_close(quality[:, :1], single_iou, rtol=0, atol=1e-5)


@torch.no_grad()
def test_several_images_are_a_loop_over_single_ones():
    made, images = head(), embedding(3)
    index = torch.tensor([2, 0, 2, 1])
    sparse, dense = made.prompt_encoder(points=None, boxes=torch.tensor([[1.0, 2, 30, 40], [5, 6, 70, 60], [0, 0, 96, 64], [9, 9, 10, 10]]), masks=None)
    masks, quality, _ = heads.decode(made.decoder, images[index], made.prompt_encoder.get_dense_pe(), sparse, dense)
    for p, k in enumerate(index):
        theirs, iou = single(made, images[k : k + 1], sparse[p : p + 1], dense[p : p + 1])
        torch.testing.assert_close(masks[p : p + 1], theirs, rtol=0, atol=1e-5)
        torch.testing.assert_close(quality[p : p + 1], iou, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("given", ["points", "boxes", "both", "masks"])
def test_the_head_is_sam_with_its_axes_swapped(given):
    """Points and boxes are (h, w) here and (x, y) there; a 64 x 96 picture tells them apart."""
    made, image = head(), embedding(1)
    points, labels = torch.tensor([[[10.0, 80.0], [60.0, 5.0]]]), torch.tensor([[1, 0]])
    boxes = torch.tensor([[[8.0, 40.0], [30.0, 90.0]]])
    rough = torch.randn(1, 1, SIZE[0] // STRIDE * 4, SIZE[1] // STRIDE * 4, generator=torch.Generator().manual_seed(1)) if given == "masks" else None
    ours = made.decode(heads.Embedding(image), heads.Prompts(
        torch.tensor([0]), points=points if given in ("points", "both") else None, labels=labels if given in ("points", "both") else None,
        boxes=boxes if given in ("boxes", "both") else None, masks=rough,
    ))  # fmt: skip
    sparse, dense = made.prompt_encoder(
        points=(torch.tensor([[[80.0, 10.0], [5.0, 60.0]]]), labels) if given in ("points", "both") else None,
        boxes=torch.tensor([[40.0, 8.0, 90.0, 30.0]]) if given in ("boxes", "both") else None, masks=rough,
    )  # fmt: skip
    theirs, iou = single(made, image, sparse, dense)
    assert ours.logits.shape == (1, SIZE[0] // STRIDE * 4, SIZE[1] // STRIDE * 4)
    torch.testing.assert_close(ours.logits, theirs[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.quality, iou[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_words_are_more_prompt_tokens():
    made, image = head(), embedding(2)
    states = torch.randn(3, 2, 24, generator=torch.Generator().manual_seed(3))
    ours = made.decode(heads.Embedding(image), heads.Prompts(torch.tensor([1, 0, 1]), tokens=states))
    dense = made.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, *image.shape[2:])
    for p, k in enumerate((1, 0, 1)):
        theirs, _ = single(made, image[k : k + 1], made.speak(states[p : p + 1]), dense)
        torch.testing.assert_close(ours.logits[p], theirs[0, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_need_not_be_drawn_changes_nothing_else():
    made, image = head(), embedding(2)
    given = dict(image=torch.tensor([1, 0, 1]), tokens=torch.randn(3, 2, 24, generator=torch.Generator().manual_seed(3)))
    keep = torch.tensor([True, False, True])
    every, some = made.decode(heads.Embedding(image), heads.Prompts(**given)), made.decode(heads.Embedding(image), heads.Prompts(**given, draw=keep))
    torch.testing.assert_close(some.logits, every.logits[keep], rtol=0, atol=1e-5)
    assert torch.equal(some.present, every.present) and torch.equal(some.quality, every.quality)


@torch.no_grad()
def test_an_input_of_another_size_still_gives_masks_over_all_of_it():
    made = head()
    for size in ((32, 32), (128, 64)):
        features = Features(torch.zeros(1), (1, 1), torch.zeros(1), (torch.randn(1, 8, size[0] // 4, size[1] // 4), torch.randn(1, 16, size[0] // 16, size[1] // 16)))
        assert made(features, heads.Prompts(torch.tensor([0, 0]), tokens=torch.zeros(2, 1, 24))).logits.shape == (2, size[0] // 2, size[1] // 2)


def renamed(name: str) -> str:
    """segment-anything's name of a weight in transformers."""
    for old, new in (
        ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "prompt_encoder.shared_embedding.positional_embedding"),
        ("point_embeddings.", "point_embed."), ("mask_downscaling.0", "mask_embed.conv1"), ("mask_downscaling.1", "mask_embed.layer_norm1"),
        ("mask_downscaling.3", "mask_embed.conv2"), ("mask_downscaling.4", "mask_embed.layer_norm2"), ("mask_downscaling.6", "mask_embed.conv3"),
        ("decoder.output_upscaling.0", "decoder.upscale_conv1"), ("decoder.output_upscaling.1", "decoder.upscale_layer_norm"),
        ("decoder.output_upscaling.3", "decoder.upscale_conv2"), ("norm_final_attn", "layer_norm_final_attn"),
        ("norm1.", "layer_norm1."), ("norm2.", "layer_norm2."), ("norm3.", "layer_norm3."), ("norm4.", "layer_norm4."),
    ):  # fmt: skip
        if f"layer_{old}" not in name:
            name = name.replace(old, new)
    if "mlps" in name or "iou_prediction_head" in name:
        name = name.replace("layers.0.", "proj_in.").replace("layers.1.", "layers.0.").replace("layers.2.", "proj_out.")
    return ("mask_" + name) if name.startswith("decoder.") else name


@torch.no_grad()
@pytest.mark.parametrize("given", ["points", "boxes"])
def test_transformers_sam_with_the_same_weights(given):
    from transformers import SamMaskDecoderConfig, SamPromptEncoderConfig
    from transformers.models.sam.modeling_sam import SamConfig, SamMaskDecoder, SamPromptEncoder

    size = (64, 64)
    made, image = head(size), embedding(1, size)
    config = SamConfig(
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=DIM, image_size=64, patch_size=STRIDE, mask_input_channels=16).to_dict(),
        mask_decoder_config=SamMaskDecoderConfig(hidden_size=DIM, mlp_dim=8 * DIM, num_attention_heads=4, num_hidden_layers=2).to_dict(),
        vision_config={"num_pos_feats": DIM // 2, "output_channels": DIM},
    )  # fmt: skip
    config._attn_implementation = config.mask_decoder_config._attn_implementation = "eager"
    theirs = torch.nn.ModuleDict({"prompt_encoder": SamPromptEncoder(config), "mask_decoder": SamMaskDecoder(config.mask_decoder_config)}).eval()
    weights = {renamed(k): v for k, v in made.state_dict().items() if k.startswith(("prompt_encoder.", "decoder."))}
    theirs.load_state_dict(weights)
    if given == "points":
        points, labels = torch.tensor([[[10.0, 50.0], [60.0, 5.0]]]), torch.tensor([[1, 0]])
        ours = made.decode(heads.Embedding(image), heads.Prompts(torch.tensor([0]), points=points, labels=labels))
        sparse, dense = theirs["prompt_encoder"](points.flip(-1)[None], labels[None], None, None)
    else:
        boxes = torch.tensor([[[8.0, 20.0], [30.0, 60.0]]])
        ours = made.decode(heads.Embedding(image), heads.Prompts(torch.tensor([0]), boxes=boxes))
        sparse, dense = theirs["prompt_encoder"](None, None, boxes.flip(-1).flatten(1)[None], None)
    steps = (torch.arange(8) + 0.5) / 8
    place = theirs["prompt_encoder"].shared_embedding(torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)).permute(2, 0, 1)[None]
    masks, iou, *_ = theirs["mask_decoder"](image, place, sparse, dense, multimask_output=False)
    gap = float((ours.logits - masks[0, :, 0]).abs().max())
    print(f"largest difference to transformers {given}: {gap:.2g}")
    assert gap < 1e-5 and float((ours.quality - iou[0, :, 0]).abs().max()) < 1e-5
    assert np.ptp(ours.logits.numpy()) > 1e-2  # weights that give a flat map would agree with anything
