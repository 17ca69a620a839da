"""One model for pictures and volumes: a 2-D and a 3-D encoder on one route, both beside X-rays in one conversation."""

import nibabel
import numpy as np
import pytest
import tiny
import torch

from medvlm.errors import MedVLMError
from medvlm.imaging.scan import Image, Volume
from medvlm.predictors import load
from medvlm.preprocess import Frame, to_tensor
from medvlm.sample import Sample, Turn
from medvlm.vlm import MedVLM

SIZE = [16, 32, 32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """X-rays to one encoder; CT to a 3-D one and to a 2-D one over its slices, whose tokens the question weighs."""
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    config = tiny.config(tokenizer, reads=["xray", "ct"], routes={"xray": "picture", "ct": ["volume", "slices"]}, targets=["spleen"])
    config.parts["encoders"] |= {
        "volume": {"file": "volume", "args": {"net": "resnet", "size": SIZE, "windows": ["lung", "bone"], "model": {"layers": [1, 1, 1, 1], "block_inplanes": [4, 8, 8, 16]}}},
        "slices": {"file": "slices", "args": {"encoder": {"library": "timm", "model": "test_byobnet", "channels": 1}, "size": SIZE, "windows": ["soft tissue"], "chunk": 3}},
    }  # fmt: skip
    probe = MedVLM(config.__class__(parts={"encoders": config.parts["encoders"]})).encoders
    volume, slices = probe["volume"], probe["slices"]
    config.parts["projectors"] |= {
        "volume": {"file": "linear", "args": {"dim": volume.dim, "lm_dim": 32}},
        "slices": {"file": "interslice", "args": {"dim": slices.dim, "lm_dim": 32}},
    }
    config.parts["heads"]["mask_volume"] = {"file": "mask", "args": {
        "level_dims": list(volume.level_dims), "level_strides": [list(s) if isinstance(s, tuple) else s for s in volume.level_strides], "lm_dim": 32, "size": SIZE,
        "dim": 32, "heads": 4, "stride": [2, 4, 4], "labels": ["spleen"]}}  # fmt: skip
    model = MedVLM(config).eval()
    with torch.no_grad():
        model.heads["classify"].bias[3] += 8  # the kind-of-image head must not refuse what the test shows it
        model.heads["mask_volume"].presence[-1].bias += 20
    out = tmp_path_factory.mktemp("modalities")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def reader(folder):
    model = load(folder, "cpu")
    for name, head in model.vlm.heads.items():
        if name == "classify":
            head.attend = torch.nn.Linear(head.attend.in_features, head.attend.out_features)
    return model


def ct(id="ct-1", seed=0, size=(11, 20, 24), axes=((0, 0, 2.5), (0, 0.8, 0), (0.8, 0, 0))):
    affine = np.eye(4)
    affine[:3, :3] = np.array(axes).T
    voxels = np.random.default_rng(seed).normal(0, 300, (1, *size)).astype(np.float32)
    return Volume(id, voxels, affine, "ct", "HU", {})


QUESTION = Turn("user", "Is there consolidation?")


def yes(reader, *images, turns=(QUESTION,)):
    (found,) = reader.predict([Sample("s", images={i.id: i for i in images}, turns=turns)])
    assert found.error is None
    return found.choices["yes"]


def test_a_scan_gives_the_tokens_of_both_its_encoders(reader):
    assert reader.vlm.route("ct") == ("volume", "slices") and reader.vlm.tokens("ct") == reader.vlm.count("volume") + reader.vlm.count("slices")
    one, other = yes(reader, ct()), yes(reader, ct(seed=1))
    assert one != other and yes(reader, ct()) == pytest.approx(one, abs=1e-6)
    picture = tiny.picture()
    both, swapped = yes(reader, ct(), picture), yes(reader, picture, ct())
    assert len({one, yes(reader, picture), both, swapped}) == 4
    assert reader.ask([ct(), picture], QUESTION.text).choices["yes"] == pytest.approx(both, abs=1e-6)


@torch.no_grad()
def test_two_modalities_in_one_turn_are_what_hand_made_embeddings_give(reader):
    """The reference: embeddings laid one after the other by hand, without placeholders."""
    from medvlm.encoders.base import Features
    from medvlm.preprocess import normalise

    vlm, scan, picture = reader.vlm, ct(), tiny.picture()
    row = reader._encoded({scan.id: scan, picture.id: picture}, (QUESTION, Turn("assistant", "yes")), True)
    ids = torch.tensor([row.ids])
    words = vlm.lm.get_input_embeddings()(ids)
    runs = []
    for image, names in ((scan, ("volume", "slices")), (picture, ("picture",))):
        for name in names:
            tensor, _ = to_tensor(image, vlm.encoders[name].spec)
            features: Features = vlm.encoders[name](normalise(tensor[None], vlm.encoders[name].spec))
            asked = words[0][(ids[0] != vlm.config.image_token_id)]
            question = asked[: len(asked) - 2].mean(0, keepdim=True)  # all but the answer and its end
            runs.append(vlm.projectors[name](features, question) if name == "slices" else vlm.projectors[name](features))
    image_at = (ids[0] == vlm.config.image_token_id).nonzero()[:, 0]
    embeds = torch.cat([words[:, : image_at[0]], *runs, words[:, image_at[-1] + 1 :]], 1)
    reference = vlm.lm(inputs_embeds=embeds).logits
    batch, features = reader._batch({scan.id: scan, picture.id: picture}, [(QUESTION, Turn("assistant", "yes"))])
    ours = vlm(**batch.inputs(), labels=batch.labels, features=features).logits
    gap = float((ours - reference).abs().max())
    print(f"largest difference to hand-made embeddings of two modalities: {gap:.1e}")
    assert gap <= 1e-5


def test_masks_lie_on_the_scans_own_grid_whatever_its_orientation(reader, tmp_path, monkeypatch):
    # random weights draw everything or nothing: cut at the median, so that there is a shape to follow
    monkeypatch.setattr(Frame, "masks", lambda self, maps, cut=Frame.masks: cut(self, maps - maps.median()))
    scan = ct()
    found = reader.segment(scan, "spleen")
    assert found.mask.shape == (11, 20, 24) and found.mask.any() and not found.mask.all() and found.present > 0.99
    box = reader.segment(scan, boxes=((2, 3, 4), (8, 12, 20)))
    point = reader.segment(scan, points=[(5, 9, 9, 1), (0, 0, 0, 0)])
    assert box.mask.shape == point.mask.shape == (11, 20, 24) and (box.mask != point.mask).any()
    turned = Volume("ct-1", scan.voxels[:, ::-1, :, ::-1].copy(), scan.affine @ np.array([[-1, 0, 0, 10], [0, 1, 0, 0], [0, 0, -1, 23], [0, 0, 0, 1.0]]), "ct", "HU", {})
    again = reader.segment(turned, "spleen")
    assert np.array_equal(again.mask[::-1, :, ::-1], found.mask)
    moved = reader.segment(turned, boxes=((3, 3, 4), (9, 12, 20)))
    assert np.array_equal(moved.mask[::-1, :, ::-1], box.mask)
    written = nibabel.load(found.save(tmp_path / "spleen.nii.gz"))
    assert np.array_equal(np.asarray(written.dataobj).transpose(2, 1, 0).astype(bool), found.mask)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_refused(reader, value):
    scan = ct()
    scan.voxels[0, 3, 4, 5] = value
    with pytest.raises(MedVLMError) as e:
        reader.ask(scan, QUESTION.text)
    assert e.value.code == "NOT_FINITE" and "ct-1" in e.value.message


def test_what_no_encoder_sees_is_refused_by_name(reader):
    slice_ = Image("ct-1", np.zeros((1, 20, 20), np.float32), (1.0, 1.0), "ct", "HU", {})
    stack = Volume("xray-1", np.zeros((1, 4, 20, 20), np.uint8), np.eye(4), "xray", "uint8", {})
    for image, said in ((slice_, "reads volumes"), (stack, "reads single pictures"), (tiny.picture(modality="mr"), "no encoder of this model sees mr")):
        with pytest.raises(MedVLMError) as e:
            reader.ask(image, QUESTION.text)
        assert e.value.code == "OUT_OF_SCOPE" and said in e.value.message


def test_hundreds_of_images_are_refused_before_any_work(reader, monkeypatch):
    monkeypatch.setattr(type(reader), "_look", lambda *_: pytest.fail("it looked"))
    pictures = [tiny.picture(f"p{k}") for k in range(500)]
    with pytest.raises(MedVLMError) as e:
        reader.ask(pictures, QUESTION.text)
    assert e.value.code == "QUESTION_TOO_LONG" and "500" in e.value.message


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (20000, 20000)])
def test_pictures_of_any_size(reader, size):
    picture = Image("p", np.broadcast_to(np.uint8(90), (1, *size)), None, "xray", "uint8", {})
    assert reader.ask(picture, QUESTION.text).text in ("yes", "no")
    if size != (20000, 20000):
        assert reader.segment(picture, points=[(0, 0)]).mask.shape == size


def test_a_model_of_two_towers_embeds_and_classifies_nothing_else(tmp_path):
    """Without a language model: images and texts in one space, equal to the head's own; a question is refused by name."""
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    config = tiny.config(tokenizer)
    parts = {k: dict(v) for k, v in config.parts.items() if k in ("encoders", "heads")}
    parts["encoders"]["text"] = {"file": "text", "args": {"model_type": "bert", "vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1,
                                 "num_attention_heads": 2, "intermediate_size": 32}}  # fmt: skip
    parts["heads"] = {"contrast": {"file": "contrast", "args": {"dim": 256, "text_dim": 16, "embed_dim": 8}}}
    model = MedVLM(config.__class__(parts=parts, about=config.about)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reader, picture = load(tmp_path, "cpu"), tiny.picture()
    image, text = reader.embed(picture), reader.embed("consolidation on the right")
    assert image.dtype == text.dtype == np.float32 and image.shape == text.shape == (8,)
    assert np.linalg.norm(image) == pytest.approx(1, abs=1e-5) and np.linalg.norm(text) == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        tensor = to_tensor(picture, model.encoders["picture"].spec)[0]
        own = model.heads["contrast"].image(model(pixel_values={"picture": tensor[None]}).features["picture"])[0]
    assert np.abs(own.numpy() - image).max() < 1e-6
    for refused in (lambda: reader.ask(picture, "Is it?"), lambda: reader.segment(picture, "left lung"), lambda: load_tiny(tmp_path / "other").embed("words")):
        with pytest.raises(MedVLMError) as e:
            refused()
        assert e.value.code == "UNSUPPORTED_VERB"


def load_tiny(folder):
    tokenizer = tiny.tokenizer()
    tiny.model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(folder, "cpu")
