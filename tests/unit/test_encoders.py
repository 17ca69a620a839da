"""Encoders against the libraries they come from: the same tokens, the same weights, nothing run that a file holds."""

import json
import os
import shutil

import numpy as np
import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file, save_file

from medvlm.encoders import image, slices, text, tiles, unet, volume
from medvlm.encoders.base import as_map, quarters, resize_positions
from medvlm.errors import MedVLMError, ModelError, UsageError
from medvlm.imaging import window
from medvlm.imaging.scan import Image
from medvlm.preprocess import to_tensor
from medvlm.vlm import MedVLM, MedVLMConfig, build_part

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SHAPE, "image_size": 32, "patch_size": 8}
TEXT = {**SHAPE, "vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49}
CLIP = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
SEEN = {"size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Small models of random weights, saved as their libraries save them."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    models = {
        "clip": hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION)),
        "siglip": hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VISION)),
        "dinov2": hf.Dinov2Model(hf.Dinov2Config(**VISION)),
        "bert": hf.BertForMaskedLM(hf.BertConfig(**{**TEXT, "pad_token_id": 0})),
    }
    for name, model in models.items():
        model.eval().save_pretrained(folder / name)
    hf.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(folder / "clip")
    hf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "siglip")
    return folder, models


def gap(a, b, name: str) -> float:
    found = (a - b).abs().max().item()
    print(f"{name}: largest difference {found:.1e}")
    return found


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_a_transformers_tower_gives_the_library_s_own_states(saved, name, layer):
    """CLIP and DINOv2 put one class token before the patches, SigLIP none; of a two-tower model the image half is read."""
    folder, models = saved
    encoder = image.build("transformers", weights=str(folder / name), feature_layer=layer, **(SEEN if name == "dinov2" else {})).eval()
    tower = models[name] if name == "dinov2" else models[name].vision_model
    x = torch.rand(2, 3, 32, 32)
    out = tower(x, output_hidden_states=True)
    states = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    found = encoder(x)
    assert found.grid == (4, 4) and gap(found.tokens, states if name == "siglip" else states[:, 1:], f"{name} {layer}") <= 1e-6
    assert torch.equal(found.levels[-1].flatten(2).transpose(1, 2), found.tokens)
    assert gap(found.pooled, states.mean(1) if name == "siglip" else states[:, 0], "pooled") <= 1e-6


def test_the_input_is_prepared_as_the_weights_were_trained(saved):
    """CLIP's own mean and crop, not the resized edge before it; arguments win over both."""
    folder, _ = saved
    spec = image.build("transformers", weights=str(folder / "clip")).spec
    assert spec.size == (32, 32) and spec.channels == 3
    assert spec.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073)) and spec.std == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    mine = image.build("transformers", weights=str(folder / "siglip"), size=(48, 32), mean=(0.1, 0.2, 0.3)).spec
    assert mine.size == (48, 32) and mine.mean == (0.1, 0.2, 0.3) and mine.std == (0.5, 0.5, 0.5)
    with pytest.raises(ModelError, match="size, mean and std") as refused:
        image.build("transformers", weights=str(folder / "dinov2"))
    assert refused.value.code == "BAD_CHECKPOINT"


@torch.no_grad()
def test_a_text_tower_gives_the_library_s_own_states(saved):
    folder, models = saved
    ids = torch.randint(1, 48, (2, 6))
    ids[0, 3], ids[1, 5] = 49, 49
    attention = torch.ones_like(ids)
    attention[0, 4:] = 0
    found, out = text.build(weights=str(folder / "clip")).eval()(ids, attention), models["clip"].text_model(ids, attention_mask=attention)
    assert found.tokens.shape == (2, 6, 32) and found.grid == (6,)
    assert gap(found.pooled, out.pooler_output, "clip text") <= 1e-6
    found = text.build(weights=str(folder / "bert")).eval()(ids, attention)
    assert gap(found.pooled, models["bert"].bert(ids, attention_mask=attention).last_hidden_state[:, 0], "bert") <= 1e-6


@torch.no_grad()
def test_what_siglip_says_of_a_text_is_the_same_whatever_stands_beside_it(saved):
    """It pools the last place, and was trained with texts padded to the full length and no mask."""
    folder, models = saved
    tower, whole = text.build(weights=str(folder / "siglip")).eval(), models["siglip"].text_model
    pad = whole.config.pad_token_id
    short, long = torch.randint(2, 48, (1, 4)), torch.randint(2, 48, (1, 9))
    both = torch.cat([torch.nn.functional.pad(short, (0, 5), value=7), long])
    attention = torch.tensor([[1] * 4 + [0] * 5, [1] * 9])
    full = torch.full((2, whole.config.max_position_embeddings), pad)
    full[0, :4], full[1, :9] = short, long
    found, alone, out = tower(both, attention), tower(short), whole(full)
    assert gap(found.pooled, out.pooler_output, "siglip text") <= 1e-6 and gap(alone.pooled, out.pooler_output[:1], "alone") <= 1e-6
    assert found.grid == (64,) and found.tokens.shape == (2, 64, 32)


def test_a_text_tower_brings_its_own_words(saved, tmp_path):
    """A published tower beside a language model of other words: its tokenizer is saved with its weights and reads captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "chest": 3, "film": 4}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    shutil.copytree(saved[0] / "siglip", tmp_path / "siglip")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>", unk_token="<unk>").save_pretrained(tmp_path / "siglip")
    other = tiny.tokenizer()
    made = text.build(weights=str(tmp_path / "siglip"))
    assert made.ids(other, "a chest film") == [2, 3, 4, 1] and made.ids(other, "a " * 99) == [2] * 63 + [1]
    again = build_part("encoders", "text", json.loads(json.dumps(made.arguments)))
    again.load_state_dict(made.state_dict())
    assert again.ids(other, "a chest film") == [2, 3, 4, 1]
    plain = text.build(weights=str(saved[0] / "siglip"))  # a folder without one: the model's own words
    assert plain.ids(other, "yes") == [*other("yes")["input_ids"], other.eos_token_id] and "words" not in plain.arguments
    (tmp_path / "siglip/tokenizer.json").write_text("{")
    with pytest.raises(MedVLMError) as e:
        text.build(weights=str(tmp_path / "siglip"))
    assert e.value.code == "BAD_CHECKPOINT"


def test_ct_is_seen_through_windows_and_other_pictures_as_they_are_shown():
    windows = ((-100.0, 2250.0), (40.0, 350.0), (40.0, 80.0))
    made = image.build("transformers", {"model_type": "vit", **VISION}, size=(32, 32), windows=windows)
    hu = np.full((1, 32, 32), 60, np.float32)
    seen, _ = to_tensor(Image("ct", hu, None, "ct", "HU"), made.spec)
    for channel, (centre, width) in zip(seen, windows):
        assert channel.mean().item() == pytest.approx(window.apply(hu, centre, width).mean(), abs=1e-6)
    assert len({round(c.mean().item(), 3) for c in seen}) == 3
    shown, _ = to_tensor(tiny.picture(size=(32, 32)), made.spec)
    assert shown.shape == (3, 32, 32) and torch.equal(shown[0], shown[2])
    with pytest.raises(MedVLMError) as e:
        image.build("transformers", {"model_type": "vit", **VISION}, windows=windows[:2])
    assert e.value.code == "BAD_RECIPE" and "2 windows for 3 channels" in e.value.message


def test_a_text_tower_is_made_again_without_its_weights(saved):
    folder, _ = saved
    made = text.build(weights=str(folder / "siglip")).eval()
    again = build_part("encoders", "text", json.loads(json.dumps(made.arguments))).eval()
    again.load_state_dict(made.state_dict())
    ids = torch.randint(1, 48, (1, 5))
    assert torch.equal(again(ids).pooled, made(ids).pooled)
    assert all(p.requires_grad for p in text.build("bert", **TEXT).parameters())


def spoilt(folder, name, change):
    shutil.copytree(folder / name, folder / "spoilt", dirs_exist_ok=True)
    state = load_file(folder / name / "model.safetensors")
    change(state)
    save_file(state, folder / "spoilt" / "model.safetensors", metadata={"format": "pt"})
    return str(folder / "spoilt")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("dinov2", lambda s: s.pop("layernorm.weight"), "1 missing: layernorm.weight"),
        ("dinov2", lambda s: s.update({"other.weight": torch.zeros(2)}), "1 extra: other.weight"),
        ("clip", lambda s: s.pop("vision_model.embeddings.class_embedding"), "1 missing: embeddings.class_embedding"),
        ("clip", lambda s: s.update({"vision_model.encoder.layers.9.x": torch.zeros(2)}), "1 extra: encoder.layers.9.x"),
        ("dinov2", lambda s: s.update({"layernorm.weight": torch.zeros(5)}), "cannot be read"),
    ],
)
def test_missing_extra_and_misshapen_weights_are_named(saved, name, change, says):
    with pytest.raises(ModelError, match=says) as refused:
        image.build("transformers", weights=spoilt(saved[0], name, change), **SEEN)
    assert refused.value.code == "BAD_CHECKPOINT"


@torch.no_grad()
def test_timm_weights_load_from_files_and_folders_and_fit_other_sizes_and_channels(tmp_path):
    net = timm.create_model("test_vit3", num_classes=10).eval()
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    save_file(net.state_dict(), tmp_path / "vit.safetensors")
    timm.models._hub.save_for_hf(net, tmp_path / "folder", safe_serialization=True)
    x = torch.rand(1, 3, *net.pretrained_cfg["input_size"][1:])
    states = net.forward_features(x)[:, net.num_prefix_tokens :]
    for source, model in (("vit.pth", "test_vit3"), ("vit.safetensors", "test_vit3"), ("folder", None)):
        encoder = image.build("timm", model, weights=str(tmp_path / source)).eval()
        assert gap(encoder(x).tokens, states, source) <= 1e-6
        assert encoder.spec.mean == tuple(net.pretrained_cfg["mean"]) and encoder.spec.size == (160, 160)
    grey = image.build("timm", "test_vit3", weights=str(tmp_path / "vit.pth"), channels=1, size=(64, 96)).eval()
    assert grey.spec.mean == (0.5,) and grey(torch.rand(1, 1, 64, 96)).grid == (4, 6)
    assert torch.allclose(grey.backbone.model.patch_embed.proj.weight, net.patch_embed.proj.weight.sum(1, keepdim=True), atol=1e-6)


@torch.no_grad()
def test_a_timm_pyramid_is_the_library_s_own_and_its_weights_are_checked(tmp_path):
    net = timm.create_model("test_resnet", num_classes=10).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    encoder = image.build("timm", "test_resnet", weights=str(tmp_path / "net.pth"), size=(64, 64)).eval()
    x = torch.rand(1, 3, 64, 64)
    assert gap(encoder(x).levels[-1], net.forward_features(x), "resnet") <= 1e-6
    for change, says in ((lambda s: s.pop("bn1.weight"), "missing: bn1.weight"), (lambda s: s.update({"x.y": torch.zeros(1)}), "extra: x.y")):
        state = dict(net.state_dict())
        change(state)
        torch.save(state, tmp_path / "spoilt.pth")
        with pytest.raises(ModelError, match=says):
            image.build("timm", "test_resnet", weights=str(tmp_path / "spoilt.pth"))


@torch.no_grad()
def test_a_channels_last_pyramid_is_turned_to_channels_first():
    encoder = image.build("timm", {"name": "swin_tiny_patch4_window7_224", "depths": (1, 1, 1, 1), "embed_dim": 24}, (64, 96)).eval()
    x = torch.rand(1, 1, 64, 96)
    raw = encoder.backbone(x)
    found = encoder(x)
    assert raw[0].shape == (1, 16, 24, 24) and found.levels[0].shape == (1, 24, 16, 24)
    assert torch.equal(found.levels[-1][0, :, 1, 2], raw[-1][0, 1, 2]) and torch.equal(found.tokens[0, 1 * 3 + 2], raw[-1][0, 1, 2])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "average", "resnet", "timm"])
def test_an_open_clip_folder_gives_open_clip_s_own_states(kind, tmp_path):
    """And its mean and std; saved without the weights' place it is made again and reads its own."""
    import open_clip

    vision = {
        "vit": CLIP, "average": {**CLIP, "pool_type": "avg", "final_ln_after_pool": True},
        "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
        "timm": {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "linear"},
    }[kind]  # fmt: skip
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}}
    clip = (open_clip.CustomTextCLIP if kind == "timm" else open_clip.CLIP)(**config).eval()
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}))
    encoder = image.build("open_clip", weights=str(tmp_path)).eval()
    assert encoder.spec.mean == (0.1, 0.2, 0.3) and encoder.spec.std == (0.4, 0.5, 0.6)
    x, tower = torch.rand(2, 3, *encoder.spec.size), clip.visual
    found = encoder(x)
    if kind in ("vit", "average"):
        tower.output_tokens, tower.proj = True, None
        pooled, tokens = tower(x)
        assert gap(found.pooled, pooled, "pooled") <= 1e-6
        states = tokens if kind == "vit" else tower.ln_post(tokens)
    elif kind == "resnet":
        states = tower.forward_intermediates(x, indices=[4], intermediates_only=True)["image_intermediates"][0].flatten(2).transpose(1, 2)
    else:
        states = tower.trunk.forward_features(x)[:, tower.trunk.num_prefix_tokens :]
    assert gap(found.tokens, states, kind) <= 1e-6
    again = build_part("encoders", "image", json.loads(json.dumps(encoder.arguments))).eval()
    again.load_state_dict(encoder.state_dict())
    assert again.spec == encoder.spec and torch.equal(again(x).tokens, found.tokens)


class Planted:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_file_with_code_in_it_is_refused_and_nothing_runs(tmp_path, saved):
    torch.save({"a": Planted(tmp_path / "ran")}, tmp_path / "planted.pth")
    folder = tmp_path / "pickle"
    shutil.copytree(saved[0] / "dinov2", folder)
    (folder / "model.safetensors").unlink()
    shutil.copy(tmp_path / "planted.pth", folder / "pytorch_model.bin")
    for build in (
        lambda: image.build("timm", "test_vit3", weights=str(tmp_path / "planted.pth")),
        lambda: volume.build("segresnet", (8, 16, 16), weights=str(tmp_path / "planted.pth")),
        lambda: image.build("transformers", weights=str(folder), **SEEN),
    ):
        with pytest.raises(ModelError) as refused:
            build()
        assert refused.value.code == "BAD_CHECKPOINT"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ({"library": "torchvision"}, "NO_SUCH_PART"),
        ({"model": "hf_hub:org/name"}, "NO_SUCH_PART"),
        ({"model": {"name": "test_vit", "checkpoint_path": "x.pth"}}, "BAD_RECIPE"),
        ({"model": {"name": "test_vit", "pretrained": True}}, "BAD_RECIPE"),
        ({"library": "open_clip", "model": "no such"}, "NO_SUCH_PART"),
        ({"library": "open_clip", "model": {"vision_cfg": {"timm_model_name": "hf_hub:org/name"}}}, "NO_SUCH_PART"),
        ({"library": "transformers", "model": "google/siglip"}, "BAD_RECIPE"),
        ({"library": "transformers", "model": {"model_type": "dinov2", "auto_map": {"AutoModel": "x.y"}}}, "BAD_CHECKPOINT"),
        ({"library": "transformers", "model": {"model_type": "no such"}}, "BAD_RECIPE"),
        ({"library": "transformers", "model": {"model_type": "swin"}}, "BAD_RECIPE"),
        ({"library": "transformers", "model": {"model_type": "siglip2_vision_model", **VISION}}, "BAD_RECIPE"),
        ({"library": "transformers", "model": {"model_type": "dinov2", **VISION}, "channels": 1}, "BAD_RECIPE"),
        ({"model": "test_vit", "size": (50, 50)}, "BAD_ARGUMENT"),
        ({"model": "test_byobnet", "size": (64, 64), "feature_layer": -2}, "BAD_RECIPE"),
        ({"model": "test_byobnet", "size": (64, 64), "mean": (0.1, 0.2)}, "BAD_RECIPE"),
        ({"model": "test_vit", "weights": "nowhere/at/all.pth"}, "BAD_CHECKPOINT"),
        ({"model": "test_vit", "weights": "model.pth"}, "BAD_CHECKPOINT"),
    ],
)
def test_an_image_tower_that_cannot_be_is_refused_by_name(args, code):
    with pytest.raises(ModelError) as refused:
        image.build(**args)
    assert refused.value.code == code


@torch.no_grad()
def test_a_u_net_s_way_down_is_monai_s():
    from monai.networks.nets.basic_unet import Down, TwoConv

    encoder, dims, given = unet.build((32, 48), 2, (4, 6, 8)), (4, 6, 8), ("relu", ("batch", {}), False)
    theirs = [TwoConv(2, 8, 4, *given), Down(2, 4, 6, *given), Down(2, 6, 8, *given)]
    for mine, other in zip(encoder.down, theirs):
        for (_, a), b in zip(mine.state_dict().items(), other.state_dict().values(), strict=True):
            b.copy_(a.normal_() if a.is_floating_point() else a)
        mine.load_state_dict({k: v.abs() if k.endswith("var") else v for k, v in mine.state_dict().items()})
        for (_, a), b in zip(mine.state_dict().items(), other.state_dict().values(), strict=True):
            b.copy_(a)
    x = torch.randn(2, 2, 32, 48)
    found, state = encoder.eval()(x), torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 2).flatten(1, 2)
    for level, other, dim, stride in zip(found.levels, theirs, dims, encoder.level_strides, strict=True):
        state = other.eval()(state)
        assert gap(level, state, f"stride {stride}") < 1e-5 and level.shape == (2, dim, 32 // stride, 48 // stride)
    assert found.tokens.shape == (2, 24, 8) and torch.equal(as_map(found.tokens, found.grid), found.levels[-1]) and torch.equal(found.pooled, found.tokens.mean(1))


@pytest.mark.parametrize(("args", "code"), [({"size": (60, 64)}, "BAD_ARGUMENT"), ({"dims": ()}, "BAD_RECIPE"), ({"mean": (0.5,), "channels": 3}, "BAD_RECIPE"),
                                            ({"windows": ((40.0, 400.0),), "channels": 3}, "BAD_RECIPE")])  # fmt: skip
def test_a_u_net_that_cannot_be_is_refused(args, code):
    with pytest.raises(MedVLMError) as e:
        unet.build(**args)
    assert e.value.code == code


def test_what_the_tokens_do_not_read_is_not_trained():
    """SigLIP's pooling head, and the block past the one that LLaVA reads."""
    last = image.build("transformers", {"model_type": "siglip_vision_model", **VISION})
    assert {n.split(".")[1] for n, p in last.named_parameters() if not p.requires_grad} == {"head"}
    before = image.build("transformers", {"model_type": "clip_vision_model", **VISION}, feature_layer=-2)
    frozen = {n for n, p in before.named_parameters() if not p.requires_grad}
    assert {n.rpartition("layers.1.")[0] for n in frozen if "layers" in n} == {"tower.encoder."} and "tower.post_layernorm.weight" in frozen


def test_levels_are_read_at_quarters_of_the_depth():
    assert quarters(12) == (3, 6, 9, 12) and quarters(2) == (1, 2) and quarters(1) == (1,) and quarters(24) == (6, 12, 18, 24)


def test_positions_on_another_grid():
    """A constant stays, a slope along an axis stays a slope along it, the same grid changes nothing."""
    for grid, new in (((4, 6), (8, 3)), ((2, 4, 4), (3, 8, 2))):
        slope = torch.arange(grid[0]).float().reshape(-1, *[1] * (len(grid) - 1)).expand(grid)
        positions = torch.stack([torch.ones(grid), slope], -1).flatten(0, -2)[None]
        assert resize_positions(positions, grid, grid) is positions
        ones, along = as_map(resize_positions(positions, grid, new), new)[0]
        assert torch.allclose(ones, torch.ones(new), atol=1e-5)
        assert (along.diff(dim=0) > 0).all() and torch.allclose(along, along.flatten(1)[:, :1].reshape(-1, *[1] * (len(new) - 1)).expand(new), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("net", ["vit", "swin_unetr", "segresnet", "resnet"])
def test_a_3d_network_reads_monai_s_whole_weights(net, tmp_path):
    from monai.networks import nets

    size, args, whole = {
        "vit": ((8, 16, 16), {"patch": (4, 8, 8), "hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 2},
                lambda: nets.ViT(1, (8, 16, 16), (4, 8, 8), 24, 32, 2, 2)),
        "swin_unetr": ((32, 32, 32), {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window": 3},
                       lambda: nets.SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=3)),
        "segresnet": ((8, 16, 16), {"blocks_down": (1, 1, 1)}, lambda: nets.SegResNet(blocks_down=(1, 1, 1), blocks_up=(1, 1))),
        "resnet": ((32, 32, 32), {"layers": (1, 1, 1, 1), "block_inplanes": (8, 16, 32, 64)},
                   lambda: nets.ResNet("basic", [1, 1, 1, 1], [8, 16, 32, 64], n_input_channels=1, num_classes=2)),
    }[net]  # fmt: skip
    saved = whole().eval()
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "net.pth")
    encoder = volume.build(net, size, model=args, weights=str(tmp_path / "net.pth")).eval()
    x = torch.rand(1, 1, *size)
    found = encoder(x)
    if net == "vit":
        assert gap(found.tokens, saved(x)[0], net) <= 1e-6
    elif net == "swin_unetr":
        assert max(gap(a, b, net) for a, b in zip(found.levels, saved.swinViT(x, True))) <= 1e-6
    elif net == "segresnet":
        assert max(gap(a, b, net) for a, b in zip(found.levels, saved.encode(x)[1])) <= 1e-6
    else:
        assert gap(saved.fc(found.pooled), saved(x), net) <= 1e-5
    state = dict(saved.state_dict())
    name = next(iter(encoder.net.state_dict()))
    state.pop(next(k for k in state if k.endswith(name)))
    torch.save(state, tmp_path / "spoilt.pth")
    with pytest.raises(ModelError, match="1 missing") as refused:
        volume.build(net, size, model=args, weights=str(tmp_path / "spoilt.pth"))
    assert refused.value.code == "BAD_CHECKPOINT"


@torch.no_grad()
def test_a_3d_vit_keeps_the_class_token_that_its_weights_were_trained_with(tmp_path):
    from monai.networks import nets

    saved = nets.ViT(1, (8, 16, 16), (4, 8, 8), 24, 32, 2, 2, proj_type="perceptron", classification=True).eval()
    saved.cls_token.normal_()
    state = {k: v for k, v in saved.state_dict().items() if "cross_attn" not in k and "classification_head" not in k}  # as M3D-CLIP's file
    torch.save(state, tmp_path / "vit.bin")
    args = {"patch": (4, 8, 8), "hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "proj_type": "perceptron"}
    encoder = volume.build("vit", (8, 16, 16), model=args | {"classification": True}, weights=str(tmp_path / "vit.bin")).eval()
    x = torch.rand(1, 1, 8, 16, 16)
    whole = saved.norm(saved(x)[1][-1])
    assert gap(encoder(x).tokens, whole[:, 1:], "vit with a class token") <= 1e-6
    assert gap(encoder.visible(x, torch.arange(8)[None]), whole, "its states") <= 1e-6
    bare = volume.build("vit", (8, 16, 16), model=args, weights=str(tmp_path / "vit.bin")).eval()
    assert gap(bare(x).tokens, whole[:, 1:], "without it") > 1e-3


def test_ct_windows_become_channels_by_name():
    encoder = volume.build("segresnet", (8, 16, 16), windows=("lung", (40, 400), "medgemma"), model={"blocks_down": (1, 1, 1)})
    assert encoder.spec.windows == ((-600, 1500), (40, 400), *window.MEDGEMMA) and encoder.spec.channels == 5 and encoder.spec.unit == "HU"
    assert encoder.net.convInit.conv.in_channels == 5
    edges = [(c - w / 2, c + w / 2) for c, w in window.MEDGEMMA]
    assert edges == [(-1024, 1024), (-135, 215), (0, 80)]
    for wrong in ("lungs", (40,), (40, 0)):
        with pytest.raises(UsageError) as refused:
            window.named([wrong])
        assert refused.value.code == "BAD_ARGUMENT"
    assert window.named(["brain"]) == ((40, 80),) and window.named([[40, 80]]) == ((40, 80),)


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ({"net": "unet"}, "NO_SUCH_PART"),
        ({"net": "swin_unetr", "size": (32, 40, 32)}, "BAD_ARGUMENT"),
        ({"net": "vit", "size": (32, 32, 32), "model": {"hidden_size": 10, "num_heads": 3}}, "BAD_RECIPE"),
        ({"net": "segresnet", "channels": 2}, "BAD_RECIPE"),
        ({"net": "segresnet", "size": (8, 16, 16), "weights": "org/name"}, "BAD_CHECKPOINT"),
    ],
)
def test_a_3d_network_that_cannot_be_is_refused_by_name(args, code):
    with pytest.raises(ModelError) as refused:
        volume.build(**args)
    assert refused.value.code == code


def test_slices_are_seen_one_by_one_whatever_the_chunk():
    """Equal to the 2-D encoder slice by slice, with the same gradient, and no mixing across slices."""
    build = {"encoder": {"model": "test_vit"}, "size": (5, 32, 48), "windows": ("lung",)}
    whole, parts = slices.build(**build, chunk=5, levels=True), slices.build(**build, chunk=2, levels=True)
    parts.load_state_dict(whole.state_dict())
    assert whole.spec.unit == "HU" and whole.spec.size == (5, 32, 48) and whole.stride == (1, 16, 16)
    x = torch.rand(2, 1, 5, 32, 48)
    grads = []
    for encoder in (whole.train(), parts.train()):
        found = encoder(x)
        found.tokens.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    assert gap(*grads, "gradient in chunks") <= 1e-3 * grads[0].abs().max()
    with torch.no_grad():
        a, b = whole.eval()(x), parts.eval()(x)
        assert gap(a.tokens, b.tokens, "tokens in chunks") <= 1e-5
        flat = torch.stack([whole.encoder(x[:, :, d]).tokens for d in range(5)], 1).flatten(1, 2)
        assert gap(a.tokens, flat, "one by one") <= 1e-5 and a.grid == (5, 2, 3)
        assert torch.allclose(a.levels[-1].flatten(2).transpose(1, 2), a.tokens, atol=1e-6)
        x[:, :, 3] += 1
        moved = (whole(x).tokens - a.tokens).abs().amax((0, 2)).unflatten(0, (5, 6)).amax(1) > 1e-4
        assert moved.tolist() == [False, False, False, True, False]


def test_slices_refuse_what_belongs_elsewhere():
    for args, says in (
        ({"encoder": {"model": "test_vit", "weights": "x/y"}}, "weights"),
        ({"encoder": {"model": "test_vit", "size": (32, 32)}}, "size"),
        ({"encoder": {"model": "test_vit"}, "windows": ("medgemma",)}, "3 windows for a 2-D encoder of 1 channels"),
        ({"encoder": {"model": "test_vit"}, "chunk": 0}, "chunk"),
    ):
        with pytest.raises(ModelError, match=says) as refused:
            slices.build(**{"size": (3, 32, 32), **args})
        assert refused.value.code == "BAD_RECIPE"
    with pytest.raises(ModelError, match="do not fill"):
        tiles.build({"model": "test_byobnet"}, (96, 128), (64, 64))


@torch.no_grad()
def test_tiles_stand_where_they_were_cut():
    """Without the overview each tile's tokens are the encoder's own, in its place; with it, the small whole is added."""
    encoder = tiles.build({"model": "test_byobnet"}, (128, 192), (64, 64)).eval()
    x = torch.rand(2, 1, 128, 192)
    encoder.overview.zero_()
    found = encoder(x)
    assert found.grid == (4, 6) and encoder.spec.size == (128, 192)
    for row in range(2):
        for column in range(3):
            own = encoder.encoder(x[:, :, 64 * row : 64 * row + 64, 64 * column : 64 * column + 64])
            there = as_map(found.tokens, (4, 6))[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.allclose(there, as_map(own.tokens, (2, 2)), atol=1e-4 * own.tokens.abs().max())
            assert torch.allclose(found.levels[0][:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32], own.levels[0], atol=1e-4 * own.levels[0].abs().max())
    encoder.overview.fill_(1)
    small = torch.nn.functional.interpolate(x, (64, 64), mode="bilinear", antialias=True)
    wide = torch.nn.functional.interpolate(as_map(encoder.encoder(small).tokens, (2, 2)), (4, 6), mode="bilinear")
    both = encoder(x)
    assert torch.allclose(both.tokens, found.tokens + wide.flatten(2).transpose(1, 2), atol=1e-4)
    assert torch.equal(both.pooled, encoder.encoder(small).pooled)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "slices", "tiles", "volume"])
def test_a_saved_model_forgets_whose_weights_it_was_made_of(kind, saved, tmp_path):
    """And prepares its input as before, with the weights' folder gone."""
    from monai.networks import nets

    source = tmp_path / "source"
    shutil.copytree(saved[0] / "clip", source)
    net = tmp_path / "net.pth"
    torch.save(nets.SegResNet(blocks_down=(1, 1, 1), blocks_up=(1, 1)).state_dict(), net)
    args = {
        "image": {"library": "transformers", "weights": str(source)},
        "slices": {"encoder": {"library": "transformers"}, "size": (2, 32, 32), "windows": ["medgemma"], "weights": str(source)},
        "tiles": {"encoder": {"library": "transformers"}, "size": (64, 64), "weights": str(source)},
        "volume": {"net": "segresnet", "size": (8, 16, 16), "model": {"blocks_down": (1, 1, 1)}, "weights": str(net)},
    }[kind]
    made = MedVLM(MedVLMConfig(parts={"encoders": {"a": {"file": kind, "args": args}}})).eval()
    made.save_pretrained(tmp_path / "model")
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    shutil.rmtree(source)
    net.unlink()
    again = MedVLM.from_pretrained(tmp_path / "model").eval()
    spec = made.encoders["a"].spec
    x = torch.rand(1, spec.channels, *spec.size)
    assert again.encoders["a"].spec == spec and torch.equal(again.encoders["a"](x).tokens, made.encoders["a"](x).tokens)
