"""``sam:`` models against segment-anything's SamPredictor, transformers' models and our own mask head, with the same weights."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from test_sam import renamed

from medvlm.encoders.base import Features
from medvlm.errors import MedVLMError
from medvlm.heads import mask as heads
from medvlm.imaging.scan import Volume
from medvlm.predictors import load, sam
from medvlm.sample import Mask, Sample

SIDE, DIM, GRID = 64, 32, 4
PROMPTS = {
    "a point": {"points": (20, 60)},
    "points on and off": {"points": [(20, 60, 1), (5, 5, 0), (44, 30, 1)]},
    "a box": {"boxes": ((6, 11), (33, 62))},
    "a box and points": {"boxes": ((6, 11), (33, 62)), "points": [(20, 60, 1), (30, 20, 0)]},
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def shaken(model):
    """Every weight random: some start at zero, and others so small that a wrong one would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def reference() -> Sam:
    """A SAM of two layers."""
    torch.manual_seed(0)
    made = Sam(
        ImageEncoderViT(img_size=SIDE, patch_size=16, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, out_chans=DIM, use_rel_pos=True,
                        window_size=3, global_attn_indexes=(1,), norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)),
        PromptEncoder(embed_dim=DIM, image_embedding_size=(GRID, GRID), input_image_size=(SIDE, SIDE), mask_in_chans=16),
        MaskDecoder(transformer_dim=DIM, transformer=TwoWayTransformer(depth=2, embedding_dim=DIM, mlp_dim=8 * DIM, num_heads=sam.HEADS)),
        list(sam.MEAN), list(sam.STD),
    )  # fmt: skip
    return shaken(made)


@pytest.fixture(scope="module")
def original() -> Sam:
    return reference()


@pytest.fixture(scope="module")
def file(original, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sam") / "sam.pth"
    torch.save(original.state_dict(), path)
    return path


def picture(size=(50, 70), id="photo-1"):
    made = tiny.picture(id, size, "ultrasound")
    h, w = np.indices(size)
    made.pixels[0] = (h * 3 + w * 2 + 40 * np.sin(h / 5) * np.cos(w / 7)).clip(0, 255)  # smooth: an image, not noise
    return made


def drawn(model, image, **prompt):
    """The segmentation, and the logits it was cut from."""
    kept, draw = [], model.engine.draw
    model.engine.draw = lambda *given: kept.append(draw(*given)) or kept[-1]
    try:
        found = model.segment(image, **prompt)
    finally:
        model.engine.draw = draw
    logits, quality = kept[0]
    return found, logits[int(quality.argmax())].numpy()


def foreign(prompt):
    """Our prompt as SamPredictor takes it: (x, y)."""
    points = np.atleast_2d(prompt["points"]) if "points" in prompt else None
    return {
        "point_coords": None if points is None else points[:, 1::-1],
        "point_labels": None if points is None else points[:, 2] if points.shape[1] == 3 else np.ones(len(points)),
        "box": None if "boxes" not in prompt else np.ravel([corner[::-1] for corner in prompt["boxes"]]),
    }


@pytest.mark.parametrize("given", PROMPTS)
@pytest.mark.parametrize("size", [(50, 70), (90, 64), (64, 64)])
def test_a_file_draws_what_segment_anything_draws(original, file, given, size):
    model, image = load(f"sam:{file}", "cpu"), picture(size)
    theirs = SamPredictor(original)
    theirs.set_image(np.repeat(image.pixels[0][..., None], 3, -1))
    masks, quality, _ = theirs.predict(**foreign(PROMPTS[given]), multimask_output=given == "a point", return_logits=True)
    ours, logits = drawn(model, image, **PROMPTS[given])
    expected = masks[quality.argmax()]
    gap = float(np.abs(logits - expected).max())
    print(f"largest difference to SamPredictor, {given}, {size}: {gap:.2g} of {np.ptp(expected):.2g}")
    assert gap < 1e-5 * max(1, np.abs(expected).max()) and np.ptp(expected) > 0.1
    assert ours.mask.shape == size and ours.mask.dtype == bool and ours.present == float(ours.mask.any())
    np.testing.assert_array_equal(ours.mask, expected > 0)


@torch.no_grad()
@pytest.mark.parametrize("given", ["points on and off", "a box"])
def test_our_mask_head_with_the_files_weights_draws_the_same(original, file, given):
    """SamPredictor's path, sam: and heads/mask.py are one model in three houses; a 48 x 64 picture needs no scaling."""
    model, image = load(f"sam:{file}", "cpu"), picture((48, 64))
    made = heads.build((DIM,), (16,), lm_dim=8, size=(SIDE, SIDE), dim=DIM, stride=16, depth=2, heads=sam.HEADS).eval()
    made.prompt_encoder.load_state_dict(original.prompt_encoder.state_dict())
    made.decoder.load_state_dict(original.mask_decoder.state_dict())
    embedding, inner = model.engine.embed(sam.shown(image))
    made.neck = torch.nn.Identity()
    made.neck.forward = lambda features: embedding
    prompt = {k: torch.tensor(v, dtype=torch.float)[None] for k, v in PROMPTS[given].items()}
    if "points" in prompt:
        prompt = {"points": prompt["points"][..., :2], "labels": prompt["points"][..., 2].long()}
    head = made(Features(torch.zeros(1, GRID * GRID, DIM), (GRID, GRID), torch.zeros(1, DIM)), heads.Prompts(torch.tensor([0]), **prompt))
    on_grid = original.postprocess_masks(head.logits[:, None], inner, (48, 64))[0, 0]
    _, logits = drawn(model, image, **PROMPTS[given])
    gap = float((on_grid - torch.from_numpy(logits)).abs().max())
    print(f"largest difference of the mask head to the predictor, {given}: {gap:.2g}")
    assert gap < 1e-5 * max(1, np.abs(logits).max()) and np.ptp(logits) > 0.1


def folder_of(model, processor, path: Path) -> Path:
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def sam_folder(original: Sam, path: Path) -> Path:
    """The same weights in transformers' SamModel."""
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    config = SamConfig(
        vision_config={"hidden_size": 24, "output_channels": DIM, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": SIDE, "patch_size": 16,
                       "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": DIM // 2},
        prompt_encoder_config={"hidden_size": DIM, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 16},
        mask_decoder_config={"hidden_size": DIM, "mlp_dim": 8 * DIM, "num_attention_heads": sam.HEADS, "num_hidden_layers": 2},
    )  # fmt: skip
    model = SamModel(config)

    def name(old: str) -> str:
        if not old.startswith("image_encoder."):
            return renamed(old.replace("mask_decoder.", "decoder."))
        for ours, theirs in (("image_encoder.", "vision_encoder."), ("blocks.", "layers."), ("patch_embed.proj", "patch_embed.projection"),
                             (".norm1", ".layer_norm1"), (".norm2", ".layer_norm2"), ("neck.0", "neck.conv1"), ("neck.1", "neck.layer_norm1"),
                             ("neck.2", "neck.conv2"), ("neck.3", "neck.layer_norm2")):  # fmt: skip
            old = old.replace(ours, theirs)
        return old

    weights = {name(k): v for k, v in original.state_dict().items()}
    weights["shared_image_embedding.positional_embedding"] = weights["prompt_encoder.shared_embedding.positional_embedding"]
    model.load_state_dict(weights)
    images = SamImageProcessor(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE}, mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16})
    return folder_of(model, SamProcessor(images), path)


def sam2_folder(path: Path) -> Path:
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor

    torch.manual_seed(0)
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 2, 4, 8],
                "image_size": [SIDE, SIDE], "blocks_per_stage": [1, 1, 2, 1], "window_size_per_stage": [8, 4, 4, 4], "global_attention_blocks": [3],
                "window_positional_embedding_background_size": [4, 4]}  # fmt: skip
    config = Sam2Config(
        vision_config={"backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": DIM,
                       "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
        prompt_encoder_config={"hidden_size": DIM, "image_size": SIDE, "patch_size": 16},
        mask_decoder_config={"hidden_size": DIM, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    )  # fmt: skip
    return folder_of(shaken(Sam2Model(config)), Sam2Processor(Sam2ImageProcessor(size={"height": SIDE, "width": SIDE})), path)


def sam_hq_folder(path: Path) -> Path:
    from transformers import SamHQConfig, SamHQModel, SamHQProcessor, SamImageProcessor

    torch.manual_seed(0)
    model = SamHQModel(SamHQConfig(
        vision_config={"hidden_size": 24, "output_channels": DIM, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": SIDE, "patch_size": 16,
                       "window_size": 3, "global_attn_indexes": [0, 1], "mlp_dim": 48, "num_pos_feats": DIM // 2},
        prompt_encoder_config={"hidden_size": DIM, "image_size": SIDE, "patch_size": 16},
        mask_decoder_config={"hidden_size": DIM, "mlp_dim": 64, "num_attention_heads": 4, "vit_dim": 24},
    ))  # fmt: skip
    images = SamImageProcessor(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE}, mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16})
    return folder_of(shaken(model), SamHQProcessor(images), path)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sam", "sam2", "sam_hq"])
def test_a_folder_draws_what_transformers_draws(original, tmp_path, kind):
    from transformers import AutoModelForMaskGeneration, AutoProcessor

    folder = {"sam": partial(sam_folder, original), "sam2": sam2_folder, "sam_hq": sam_hq_folder}[kind](tmp_path)
    model, image = load(f"sam:{folder}", "cpu"), picture()
    theirs, processor = AutoModelForMaskGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert model.name == kind
    for given, prompt in PROMPTS.items():
        asked = foreign(prompt)
        inputs = processor(
            images=np.repeat(image.pixels[0][..., None], 3, -1), return_tensors="pt",
            input_points=None if asked["point_coords"] is None else [[asked["point_coords"].tolist()]],
            input_labels=None if asked["point_labels"] is None else [[asked["point_labels"].astype(int).tolist()]],
            input_boxes=None if asked["box"] is None else [[asked["box"].tolist()]],
        )  # fmt: skip
        sizes = [inputs.pop("original_sizes"), *([inputs.pop("reshaped_input_sizes")] if "reshaped_input_sizes" in inputs else [])]
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        out = theirs(**inputs, multimask_output=given == "a point")
        expected = processor.post_process_masks([out.pred_masks[0]], *sizes, binarize=False)[0][0, int(out.iou_scores[0, 0].argmax())].numpy()
        ours, logits = drawn(model, image, **prompt)
        gap = float(np.abs(logits - expected).max())
        print(f"largest difference to transformers' {type(theirs).__name__}, {given}: {gap:.2g} of {np.ptp(expected):.2g}")
        assert gap < 1e-5 * max(1, np.abs(expected).max()) and np.ptp(expected) > 1e-3
        np.testing.assert_array_equal(ours.mask, expected > 0)


def test_file_and_folder_of_the_same_weights_agree(original, file, tmp_path):
    first, second = load(f"sam:{file}", "cpu"), load(f"sam:{sam_folder(original, tmp_path)}", "cpu")
    for given, prompt in PROMPTS.items():
        image = picture((48, 64))  # fits without scaling, which the two do with different filters
        (_, a), (_, b) = drawn(first, image, **prompt), drawn(second, image, **prompt)
        gap = float(np.abs(a - b).max())
        print(f"largest difference between file and folder, {given}: {gap:.2g}")
        assert gap < 1e-4 * max(1, np.abs(a).max())


@torch.no_grad()
@pytest.mark.parametrize("size", [(50, 70), (130, 90)])
def test_medsam_is_preprocessed_as_its_authors_do(original, file, size):
    transform = pytest.importorskip("skimage.transform")
    image, box = picture(size), ((6, 11), (33, 62))
    wide = transform.resize(sam.shown(image), (SIDE, SIDE), order=3, preserve_range=True, anti_aliasing=True).astype(np.uint8)
    pixels = (wide - wide.min()) / np.clip(wide.max() - wide.min(), 1e-8, None)
    embedding = original.image_encoder(torch.tensor(pixels).float().permute(2, 0, 1)[None])
    xyxy = np.array([[11, 6, 62, 33]]) / np.array([size[1], size[0], size[1], size[0]]) * SIDE
    sparse, dense = original.prompt_encoder(points=None, boxes=torch.tensor(xyxy).float()[:, None], masks=None)
    low, _ = original.mask_decoder(image_embeddings=embedding, image_pe=original.prompt_encoder.get_dense_pe(),
                                   sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=False)  # fmt: skip
    expected = torch.nn.functional.interpolate(low.sigmoid(), size, mode="bilinear", align_corners=False)[0, 0].numpy()
    model = load(f"sam:medsam:{file}", "cpu")
    ours, chance = drawn(model, image, boxes=box)
    gap = float(np.abs(chance + 0.5 - expected).max())
    print(f"largest difference to MedSAM's own steps, {size}: {gap:.2g}")
    assert model.name == "medsam" and gap < 2e-3  # a grey level may be truncated to its neighbour
    assert (ours.mask == (expected > 0.5)).mean() > 0.999
    assert np.abs(drawn(load(f"sam:{file}", "cpu"), image, boxes=box)[1] - np.log(expected / (1 - expected))).max() > 1e-2  # SAM's steps differ


def test_splines_equal_scikit_image():
    transform = pytest.importorskip("skimage.transform")
    array = np.random.default_rng(0).integers(0, 255, (40, 31, 3), dtype=np.uint8)
    for size in ((64, 64), (20, 25), (64, 16)):
        np.testing.assert_allclose(sam.spline(array, size), transform.resize(array, size, order=3, preserve_range=True, anti_aliasing=True), atol=1e-6)


def test_the_image_is_encoded_once(file):
    model, image, other = load(f"sam:{file}", "cpu"), picture(), picture(id="photo-2")
    seen = []
    model.engine.sam.image_encoder.register_forward_hook(lambda *_: seen.append(1))
    boxes = np.array([[(k, k), (k + 20, k + 30)] for k in range(16)])
    many = model.segment_boxes(image, boxes, "cell")
    assert len(seen) == 1 and [s.label for s in many] == ["cell"] * 16
    for box, one in zip(boxes, many):
        np.testing.assert_array_equal(model.segment(image, boxes=box).mask, one.mask)
    assert len(seen) == 1
    model.segment(other, points=(3, 3))
    assert len(seen) == 2 and model.segment_boxes(image, []) == []


@pytest.mark.parametrize(("kind", "dim", "depth", "heads_", "everywhere"), [
    ("vit_b", 768, 12, 12, (2, 5, 8, 11)), ("vit_l", 1024, 24, 16, (5, 11, 17, 23)), ("vit_h", 1280, 32, 16, (7, 15, 23, 31)),
])  # fmt: skip
def test_the_released_sizes_are_told_from_their_weights(kind, dim, depth, heads_, everywhere):
    with torch.device("meta"):
        made = sam_model_registry[kind]()
    vision, prompt, decoder, transformer = sam.measure({k: tuple(v.shape) for k, v in made.state_dict().items()})
    assert vision == {"img_size": 1024, "patch_size": 16, "embed_dim": dim, "depth": depth, "out_chans": 256, "num_heads": heads_, "mlp_ratio": 4,
                      "window_size": 14, "global_attn_indexes": everywhere}  # fmt: skip
    assert prompt == {"embed_dim": 256, "image_embedding_size": (64, 64), "input_image_size": (1024, 1024), "mask_in_chans": 16}
    assert decoder == {"transformer_dim": 256, "num_multimask_outputs": 3, "iou_head_depth": 3, "iou_head_hidden_dim": 256}
    assert transformer == {"depth": 2, "embedding_dim": 256, "mlp_dim": 2048}


def refused(work) -> MedVLMError:
    with pytest.raises(MedVLMError) as caught:
        work()
    return caught.value


def test_what_it_cannot_do_is_said(file):
    model, image = load(f"sam:{file}", "cpu"), picture()
    error = refused(lambda: model.segment(image, "left lung"))
    assert error.code == "UNSUPPORTED_VERB" and "left lung" in error.message and "points" in error.hint
    assert refused(lambda: model.ask(image, "Is it there?")).code == "UNSUPPORTED_VERB"
    volume = Volume("ct-1", np.zeros((1, 4, 8, 8), np.float32), np.eye(4), "ct", "HU", {})
    error = refused(lambda: model.segment(volume, points=(1, 1)))
    assert error.code == "OUT_OF_SCOPE" and "4 slices" in error.message and "slice" in error.hint
    assert refused(lambda: model.segment(picture((1, 700)), points=(0, 5))).code == "OUT_OF_SCOPE"
    assert model.segment(picture((1, 1)), points=(0, 0)).mask.shape == (1, 1)
    for wrong in ({"points": (50, 3)}, {"points": (3, 70)}, {"boxes": ((0, 0), (51, 3))}, {"boxes": ((3, 3), (3, 9))}, {"points": (1, 2, 5)}):
        assert refused(partial(model.segment, image, **wrong)).code == "BAD_ARGUMENT"
    assert refused(lambda: model.segment_boxes(image, [((0, 0), (9, 9)), ((0, 0), (99, 9))])).code == "BAD_ARGUMENT"
    row, = model.predict([Sample("a", images={image.id: image}, masks=(Mask(image.id, "cyst", np.zeros((50, 70), bool)),))])
    assert row.error.startswith("UNSUPPORTED_VERB")


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_with_code_in_it_is_refused_and_nothing_runs(original, tmp_path):
    trace = tmp_path / "ran"
    torch.save({**original.state_dict(), "extra": Planted(trace)}, tmp_path / "sam.pth")
    error = refused(lambda: load(f"sam:{tmp_path / 'sam.pth'}", "cpu"))
    assert error.code == "BAD_CHECKPOINT" and not trace.exists() and "weights_only" not in str(error)
    torch.load(tmp_path / "sam.pth", weights_only=False)
    assert trace.exists()  # the trap works


def test_incomplete_or_foreign_checkpoints_are_refused(original, file, tmp_path):
    def said(state) -> str:
        torch.save(state, tmp_path / "sam.pth")
        error = refused(lambda: load(f"sam:{tmp_path / 'sam.pth'}", "cpu"))
        assert error.code == "BAD_CHECKPOINT"
        return error.message

    state = original.state_dict()
    assert "neck.3.bias" in said({k: v for k, v in state.items() if not k.endswith("neck.3.bias")})
    assert "more.weight" in said({**state, "image_encoder.more.weight": torch.zeros(2)})
    assert "layers" in said({**state, "image_encoder.blocks.999999999.norm1.weight": torch.zeros(24)})
    assert "patch_embed" in said({"image_encoder.trunk.patch_embed.proj.weight": torch.zeros(2)})
    assert "state_dict" in said({**state, "epoch": 3}) and "state_dict" in said([1, 2])
    (tmp_path / "sam.pth").write_bytes(file.read_bytes()[:5000])
    assert refused(lambda: load(f"sam:{tmp_path / 'sam.pth'}", "cpu")).code == "BAD_CHECKPOINT"
    (tmp_path / "empty").mkdir()
    assert refused(lambda: load(f"sam:{tmp_path / 'empty'}", "cpu")).code == "BAD_CHECKPOINT"
    assert refused(lambda: load("sam:nothing.pth", "cpu")).code == "NO_SUCH_PART"
    assert refused(lambda: load(f"sam:{file}", "quantum")).code == "BAD_ARGUMENT"


def test_safetensors_and_trainings_checkpoints_load_too(original, file, tmp_path):
    from safetensors.torch import save_file

    save_file(original.state_dict(), tmp_path / "sam.safetensors")
    torch.save({"model": original.state_dict(), "optimizer": {"state": {}}, "epoch": 3}, tmp_path / "run.pth")
    image = picture()
    expected = load(f"sam:{file}", "cpu").segment(image, points=(20, 60)).mask
    for name in ("sam.safetensors", "run.pth"):
        np.testing.assert_array_equal(load(f"sam:{tmp_path / name}", "cpu").segment(image, points=(20, 60)).mask, expected)
