"""Masked image modelling against transformers, by hand, and what it must not see."""

import dataclasses
import math

import pytest
import tiny
import torch
from torch import nn

from medvlm import parts
from medvlm.errors import ModelError
from medvlm.heads import restore
from medvlm.language import Batch, collate, encode
from medvlm.preprocess import normalise
from medvlm.sample import Sample, Turn
from medvlm.vlm import MedVLM, MedVLMConfig, build_part

VIT = {"file": "image", "args": {"model": {"name": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}, "size": [16, 16]}}
DEEP = {"file": "volume", "args": {"net": "vit", "size": [8, 16, 16], "windows": [], "mean": [0.4], "std": [0.2],
                                   "model": {"hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "patch": [2, 4, 4]}}}  # fmt: skip
FLAT = {"file": "image", "args": {"model": "test_byobnet", "size": [64, 64]}}
SEGRESNET = {"file": "volume", "args": {"net": "segresnet", "size": [8, 16, 16], "windows": [], "model": {"blocks_down": [1, 1, 1]}}}
SLICES = {"file": "slices", "args": {"encoder": {"model": "test_byobnet"}, "size": [2, 64, 64]}}
HEADS = {
    "vit": {"dim": 32, "stride": 4}, "deep": {"dim": 24, "stride": [2, 4, 4], "rank": 3}, "flat": {"dim": 256, "stride": 32},
    "segresnet": {"dim": 32, "stride": 4, "rank": 3}, "slices": {"dim": 256, "stride": [1, 32, 32], "rank": 3},
}  # fmt: skip
ENCODERS = {"vit": VIT, "deep": DEEP, "flat": FLAT, "segresnet": SEGRESNET, "slices": SLICES}
WAYS = [("mae", "vit"), ("mae", "deep"), ("simmim", "vit"), ("simmim", "deep"), ("simmim", "flat"), ("simmim", "segresnet"), ("simmim", "slices")]
SMALL = {"width": 24, "depth": 2, "heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def head(name, mode, **args):
    return {"file": "restore", "args": {"mode": mode, **HEADS[name], **SMALL, **args}}


def make(name, mode, **args) -> MedVLM:
    """One encoder and its head, without a language model."""
    return MedVLM(MedVLMConfig(parts={"encoders": {name: ENCODERS[name]}, "heads": {"restore": head(name, mode, **args)}}))


def pictures(model, name, count=2):
    spec = model.encoders[name].spec
    return torch.rand(count, spec.channels, *spec.size)


def run(model, x, seed=3):
    """(loss, the batch that the encoder saw) as the training loop asks for them."""
    objective = parts.find("heads", "restore", "objective").objective
    torch.manual_seed(seed)
    batch = objective.before(model, Batch(None, None, None, images=x))
    return objective(model, batch, model(**batch.inputs())), batch


def told(model, batch):
    """What the head says of the hidden places."""
    ((name, kept),) = batch.targets["restore"].items()
    x = normalise(kept["pixels"], model.encoders[name].spec)
    features = model(**batch.inputs()).features.get(name)
    return model.heads["restore"].tell(model.encoders[name], x, kept["hidden"], features)


def copy_block(ours: nn.Module, theirs: nn.Module):
    attention = theirs.attention
    for kind in ("weight", "bias"):
        fused = torch.cat([getattr(getattr(attention, f"{k}_proj"), kind) for k in "qkv"])
        getattr(ours.attn.qkv, kind).data.copy_(fused)
    pairs = (ours.attn.proj, attention.o_proj), (ours.norm1, theirs.layernorm_before), (ours.norm2, theirs.layernorm_after), (ours.mlp.fc1, theirs.mlp.fc1), (ours.mlp.fc2, theirs.mlp.fc2)
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())


@pytest.mark.parametrize("standardise", [False, True])
def test_mae_is_transformers_own(standardise):
    """Same weights, same noise: the same tokens hidden, the same loss, the same gradient at both ends."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    reference = ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=16, patch_size=4, layer_norm_eps=1e-6,
        decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=96, norm_pix_loss=standardise,
    ))  # fmt: skip
    for p in reference.parameters():
        p.data.normal_(std=0.2)
    fixed = reference.decoder.decoder_pos_embed
    fixed._is_hf_initialized = False
    reference.decoder.initialize_weights(16)
    assert fixed[0, 0].abs().max() == 0 < fixed.std()
    picture = {"file": "image", "args": VIT["args"] | {"channels": 3}}
    model = MedVLM(MedVLMConfig(parts={"encoders": {"vit": picture}, "heads": {"restore": head("vit", "mae", channels=3, standardise=standardise)}}))
    ours, theirs, mine, other = model.encoders["vit"].backbone.model, reference.vit, model.heads["restore"], reference.decoder
    with torch.no_grad():
        ours.cls_token.copy_(theirs.embeddings.cls_token)
        ours.pos_embed.copy_(theirs.embeddings.position_embeddings)
        mine.mask_token.copy_(other.mask_token)
    for a, b in (
        (ours.patch_embed.proj, theirs.embeddings.patch_embeddings.projection), (ours.norm, theirs.layernorm),
        (mine.decoder_embed, other.decoder_embed), (mine.decoder_norm, other.decoder_norm), (mine.decoder_pred, other.decoder_pred),
    ):  # fmt: skip
        a.load_state_dict(b.state_dict())
    for a, b in (*zip(ours.blocks, theirs.layers), *zip(mine.decoder_blocks, other.decoder_layers)):
        copy_block(a, b)

    x = pictures(model, "vit", 3)
    torch.manual_seed(3)
    expected = reference(normalise(x, model.encoders["vit"].spec), noise=torch.rand(3, 16))
    losses, batch = run(model, {"vit": x}, seed=3)
    assert torch.equal(batch.targets["restore"]["vit"]["hidden"], expected.mask.bool())
    gap = abs(losses["restore"].item() / expected.loss.item() - 1)
    losses["restore"].backward()
    expected.loss.backward()
    gaps = [
        ((a.grad - b.grad).norm() / b.grad.norm()).item()
        for a, b in ((ours.patch_embed.proj.weight, theirs.embeddings.patch_embeddings.projection.weight), (mine.decoder_pred.weight, other.decoder_pred.weight), (mine.mask_token, other.mask_token))
    ]
    print(f"MAE: relative difference of the loss {gap:.1e}, of gradients {max(gaps):.1e}")
    assert gap < 1e-5 and max(gaps) < 1e-4


def test_simmim_is_transformers_own():
    """A patch of the learned value embeds to one vector: put in the place of transformers' mask token it gives the same loss."""
    from transformers import ViTConfig, ViTForMaskedImageModeling

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
    encoder = {"file": "image", "args": {"library": "transformers", "model": {"model_type": "vit", **shape}}}
    model = MedVLM(MedVLMConfig(parts={"encoders": {"vit": encoder}, "heads": {"restore": head("vit", "simmim", channels=3)}}))
    reference, mine = ViTForMaskedImageModeling(ViTConfig(**shape, encoder_stride=4)), model.heads["restore"]
    left = model.encoders["vit"].tower.load_state_dict(reference.vit.state_dict(), strict=False)
    assert left.unexpected_keys == ["embeddings.mask_token"] and all("pooler" in k for k in left.missing_keys)
    embed = reference.vit.embeddings
    with torch.no_grad():
        mine.value.normal_()
        embed.mask_token.copy_(embed.patch_embeddings(mine.value.reshape(1, 3, 1, 1).expand(1, 3, 16, 16))[:, :1])
        conv = reference.decoder[0]  # channels slowest before transformers' pixel shuffle, fastest in our patches
        mine.pixels.weight.copy_(conv.weight.reshape(3, 4, 4, 32).permute(1, 2, 0, 3).flatten(0, 2))
        mine.pixels.bias.copy_(conv.bias.reshape(3, 4, 4).permute(1, 2, 0).flatten())

    x = pictures(model, "vit", 3)
    losses, batch = run(model, {"vit": x})
    hidden = batch.targets["restore"]["vit"]["hidden"]
    expected = reference(normalise(x, model.encoders["vit"].spec), bool_masked_pos=hidden).loss
    gap = abs(losses["restore"].item() / expected.item() - 1)
    print(f"SimMIM: relative difference {gap:.1e}")
    assert hidden.sum(1).tolist() == [10] * 3 and gap < 1e-5  # 0.6 of 16


def test_patches_and_positions_by_hand():
    flat = restore.patches(torch.arange(16.0).reshape(1, 2, 2, 4), (2, 2))  # channel 0 is 0..7, channel 1 is 8..15
    assert flat.tolist() == [[[0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]]]
    deep = restore.patches(torch.arange(16.0).reshape(1, 1, 2, 2, 4), (2, 1, 2))
    assert deep.tolist() == [[[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]]
    found = restore.positions((2, 3), 4)
    assert torch.allclose(found, torch.tensor([[math.sin(w), math.cos(w), math.sin(h), math.cos(h)] for h in range(2) for w in range(3)]))
    assert restore.positions((2, 3, 4), 12)[:, :2].unique(dim=0).shape[0] == 4 and restore.positions((2, 3, 4), 12).unique(dim=0).shape[0] == 24


def test_as_many_blocks_are_hidden_in_each_and_they_are_whole():
    made = build_part("heads", "restore", {"dim": 8, "stride": (1, 4, 4), "rank": 3, "mode": "simmim", "block": (1, 2, 2), "share": 0.5})
    hidden = made.draw(50, (3, 4, 6)).unflatten(1, (3, 4, 6))
    blocks = hidden.unflatten(3, (3, 2)).unflatten(2, (2, 2)).float().mean((3, 5))  # 50, 3, 2, 3
    assert set(blocks.unique().tolist()) == {0, 1} and (blocks.flatten(1).sum(1) == 9).all()
    assert len(blocks.flatten(1).unique(dim=0)) > 45 and (0.3 < blocks.mean(0)).all() and (blocks.mean(0) < 0.7).all()
    torch.manual_seed(7)
    again = made.draw(4, (3, 4, 6))
    torch.manual_seed(7)
    assert torch.equal(again, made.draw(4, (3, 4, 6)))


@pytest.mark.parametrize("power", [1, 2])
def test_the_loss_is_of_hidden_pixels_only(power):
    """Worked by hand: two of four places hidden, told 3 and 1 too much; nothing of the others enters."""
    made = build_part("heads", "restore", {"dim": 8, "stride": 2, "mode": "simmim" if power == 1 else "mae", **SMALL})
    x, hidden = torch.rand(1, 1, 4, 4), torch.tensor([[True, False, False, True]])
    said = restore.patches(x, (2, 2))[hidden] + torch.tensor([[3.0], [1.0]])
    assert made.loss(said, x, hidden).item() == pytest.approx(2 if power == 1 else 5, rel=1e-5)
    seen, unseen = x.clone(), x.clone()
    seen[..., :2, 2:] += 1
    unseen[..., :2, :2] += 1
    assert torch.equal(made.loss(said, seen, hidden), made.loss(said, x, hidden)) and made.loss(said, unseen, hidden) != made.loss(said, x, hidden)
    made.standardise = True
    target = torch.stack([(p - p.mean()) / p.std() for p in restore.patches(x, (2, 2))[hidden]])
    assert made.loss(target, x, hidden) < 1e-3 < 0.1 < made.loss(target + 1, x, hidden)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "deep", "registers", "before the last"])
def test_all_patches_visible_is_the_whole_picture(name):
    args = {"registers": VIT["args"] | {"model": VIT["args"]["model"] | {"reg_tokens": 3}}, "before the last": VIT["args"] | {"feature_layer": -2}}
    made = build_part("encoders", "volume" if name == "deep" else "image", args.get(name) or ENCODERS[name]["args"]).eval()
    for size in (made.spec.size, tuple(2 * s for s in made.spec.size)):
        x = torch.rand(2, made.spec.channels, *size)
        whole = made(x)
        count = whole.tokens.shape[1]
        seen = made.visible(x, torch.arange(count).expand(2, -1))
        assert torch.allclose(seen[:, -count:], whole.tokens, atol=1e-5) and seen.shape[1] - count == {"deep": 0, "registers": 4}.get(name, 1)
        some = torch.stack([torch.randperm(count)[: count // 4] for _ in range(2)])
        assert made.visible(x, some).shape[1] == seen.shape[1] - count + count // 4


@torch.no_grad()
@pytest.mark.parametrize(("mode", "name"), WAYS)
def test_what_is_hidden_says_nothing(mode, name):
    """Other pixels in hidden places change neither what the head tells nor, in the batch, what the encoder sees; others do."""
    model = make(name, mode).eval()
    x = pictures(model, name)
    _, batch = run(model, {name: x})
    hidden = batch.targets["restore"][name]["hidden"]
    where = hidden.unflatten(1, model.encoders[name].grid())
    for axis, size in enumerate(model.heads["restore"].stride, 1):
        where = where.repeat_interleave(size, axis)
    answers = []
    for changed in (where, ~where):
        other = torch.where(changed[:, None], torch.rand_like(x), x)
        _, second = run(model, {name: other})
        assert torch.equal(second.targets["restore"][name]["hidden"], hidden)
        answers.append((told(model, second) - told(model, batch)).abs().max().item())
        if mode == "simmim":
            assert torch.equal(second.images[name], batch.images[name]) == (changed is where)
            assert torch.equal(batch.images[name][~where[:, None].expand_as(x)], x[~where[:, None].expand_as(x)])
    assert answers[0] == 0 < 1e-4 < answers[1]
    assert (name in batch.images) == (mode == "simmim")  # in "mae" the encoder runs once, on what is visible


@pytest.mark.parametrize(("mode", "name"), WAYS)
def test_a_fixed_picture_is_learnt(mode, name):
    model = make(name, mode, standardise=mode == "mae", share=0.5).train()
    spec = model.encoders[name].spec
    axes = torch.meshgrid(*(torch.linspace(0, 3, n) for n in spec.size), indexing="ij")
    x = (0.5 + 0.4 * torch.sin(sum(axes) * 2)).expand(2, spec.channels, *spec.size)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if n not in model.unread], lr=3e-3)
    losses = []
    for _ in range(10):
        loss = run(model, {name: x})[0]["restore"]
        loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n not in model.unread), "a parameter learns nothing"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{mode} {name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.9 * losses[0]
    assert mode == "mae" or model.heads["restore"].value.abs().min() > 0


@torch.no_grad()
@pytest.mark.parametrize(("mode", "name"), [("mae", "deep"), ("simmim", "vit")])
def test_a_saved_model_restores_the_same(mode, name, tmp_path):
    model = make(name, mode, block=[1, 2, 2] if name == "deep" else 2).eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.02)
    x = pictures(model, name)
    loss, batch = run(model, {name: x})
    model.save_pretrained(tmp_path)
    again = MedVLM.from_pretrained(tmp_path).eval()
    other, second = run(again, {name: x})
    assert torch.equal(other["restore"], loss["restore"]) and torch.equal(told(again, second), told(model, batch))
    assert torch.equal(again(pixel_values={name: x}).features[name].tokens, model(pixel_values={name: x}).features[name].tokens)
    assert not any(k.startswith("heads.restore.decoder_pos") for k in model.state_dict())


@torch.no_grad()
def test_each_encoder_of_a_batch_has_its_head_and_a_batch_without_pictures_teaches_nothing():
    """Pictures and volumes in one batch: the mean over all of them of what each gives alone with the same draw."""
    heads = {"restore": head("vit", "simmim"), "restore_deep": head("deep", "mae")}
    model = MedVLM(MedVLMConfig(parts={"encoders": {"vit": VIT, "deep": DEEP}, "heads": heads})).eval()
    x = {"vit": pictures(model, "vit"), "deep": pictures(model, "deep", 3)}
    both, batch = run(model, x)
    assert set(batch.targets["restore"]) == set(x) and set(batch.images) == {"vit"}
    one = run(model, {"vit": x["vit"]})[0]["restore"]
    kept = batch.targets["restore"]["deep"]
    target = normalise(kept["pixels"], model.encoders["deep"].spec)
    made = model.heads["restore_deep"]
    other = made.loss(made.tell(model.encoders["deep"], target, kept["hidden"], None), target, kept["hidden"])
    assert torch.allclose(both["restore"], (2 * one + 3 * other) / 5) and restore.count(None, Batch(None, None, None, images=x)) == {"restore": 5}
    assert run(model, {})[0] == {} == run(model, {"vit": x["vit"][:0]})[0]


@pytest.mark.parametrize("mode", ["simmim", "mae"])
def test_beside_a_language_model(mode):
    """SimMIM hides from it too; masked autoencoding leaves it the whole picture, for which the text has places."""
    tokenizer = tiny.tokenizer()
    config = tiny.config(tokenizer)
    config.parts["encoders"] = {"picture": VIT}
    config.parts["projectors"]["picture"]["args"]["dim"] = 32
    config.parts["heads"] = {"restore": head("vit", mode)}
    model = MedVLM(config)
    sample = Sample("s", images={"xray-1": tiny.picture()}, turns=(Turn("user", "Is there consolidation?"), Turn("assistant", "no")))
    x = pictures(model, "picture", 1)
    given = collate(tokenizer, [encode(tokenizer, sample, {"xray-1": model.count("picture")})], [{"xray-1": [("picture", 0)]}], {"picture": x})
    assert ("picture" in restore.hide(model, dataclasses.replace(given, order=[])).images) == (mode == "simmim")  # nothing reads it
    batch = restore.hide(model, given)
    assert torch.equal(batch.images["picture"], x) == (mode == "mae") and torch.equal(given.images["picture"], x)
    out = model(**batch.inputs(), labels=batch.labels)
    loss = restore.objective(model, batch, out)["restore"]
    (loss + out.loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.heads.parameters())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mode": "beit"}, "simmim or mae, not 'beit'"),
        ({"share": 1.0}, "share of 1.0"),
        ({"mode": "mae", "width": 26, "heads": 2}, "multiple of 4"),
        ({"mode": "mae", "width": 24, "heads": 5}, "5 heads"),
        ({"stride": 1, "standardise": True}, "no deviation"),
    ],
)
def test_a_head_that_cannot_be_is_refused(change, says):
    with pytest.raises(ModelError, match=says) as refused:
        build_part("heads", "restore", {"dim": 32, "stride": 4, "mode": "simmim"} | change)
    assert refused.value.code == "BAD_RECIPE"


@pytest.mark.parametrize(
    ("name", "mode", "change", "says"),
    [
        ("vit", "simmim", {"block": 3}, r"blocks of \(3, 3\) tokens .* grid of \(4, 4\)"),
        ("vit", "simmim", {"block": 4}, r"blocks of \(4, 4\)"),  # one block: all or nothing
        ("vit", "simmim", {"stride": 8}, r"\(32, 1, \(8, 8\)\) but encoder 'vit' has \(32, 1, \(4, 4\)\)"),
        ("deep", "mae", {"channels": 2}, "but encoder 'deep' has"),
        ("flat", "mae", {"share": 0.5}, "TimmEncoder cannot leave tokens out"),
        ("segresnet", "mae", {}, "SegResNet cannot leave"),
        ("slices", "mae", {}, "SliceEncoder cannot leave"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(name, mode, change, says):
    model = make(name, mode, **change)
    with pytest.raises(ModelError, match=says) as refused:
        run(model, {name: pictures(model, name)})
    assert refused.value.code == "BAD_RECIPE"
    assert mode == "simmim" or "channels" in change or 'mode="simmim"' in refused.value.hint


def test_an_encoder_without_a_head_is_refused():
    model = MedVLM(MedVLMConfig(parts={"encoders": {"vit": VIT, "deep": DEEP}, "heads": {"restore": head("vit", "mae")}}))
    with pytest.raises(ModelError, match="no head restores the pictures of encoder 'deep'"):
        run(model, {"deep": pictures(model, "deep")})


def test_the_objective_says_what_goes_before_it():
    objective = parts.find("heads", "restore", "objective").objective
    assert objective.before is restore.hide and objective.count is restore.count and objective.__name__ == "restore"
    assert "restore" in parts.names("heads", "objective")


def test_a_learned_value_that_is_split_over_processes_is_refused():
    """Pixels are hidden ahead of the forward pass, when each process holds a piece of it."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for mode in ("simmim", "mae"):
            model = make("vit", mode)
            fully_shard(model.heads["restore"], mesh=init_device_mesh("cpu", (1,)))
            given = Batch(None, None, None, images={"vit": pictures(model, "vit")})
            if mode == "mae":  # has none
                assert restore.hide(model, given).targets["restore"]
                continue
            with pytest.raises(ModelError, match="cannot be split over processes") as refused:
                restore.hide(model, given)
            assert refused.value.code == "BAD_RECIPE"
    finally:
        dist.destroy_process_group()
