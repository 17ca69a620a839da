"""``openclip:`` models against open_clip itself, on random weights, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image as Picture
from safetensors.torch import save_file
from transformers import BertConfig, PreTrainedTokenizerFast

from medvlm.errors import MedVLMError
from medvlm.evaluate.zeroshot import PROMPTS
from medvlm.imaging.scan import Study, Volume
from medvlm.predictors import load, openclip
from medvlm.sample import Sample, Turn

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
SIGLIP = {**CLIP, "init_logit_bias": -1.0, "init_logit_scale": 1.0}
LABELS = ["pneumonia", "normal", "pleural effusion"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def shaken(model, seed: int = 0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def saved(folder: Path, config=CLIP, **preprocess) -> Path:
    folder.mkdir(exist_ok=True)
    model = shaken((open_clip.CustomTextCLIP if "hf_model_name" in config["text_cfg"] else open_clip.CLIP)(**config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    about = {"model_cfg": config, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def model(folder):
    return load(f"openclip:{folder}", "cpu")


def theirs(folder: Path, image, texts):
    """open_clip's own image and text features, and its logits of the image to the texts."""
    clip, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    pixels = preprocess(Picture.fromarray(image.pixels[0]).convert("RGB"))[None]
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    with torch.no_grad():
        clip.eval()
        return clip.encode_image(pixels, normalize=True)[0], clip.encode_text(tokens, normalize=True), clip.get_logits(pixels, tokens)[0][0]


def gap(a, b, what: str) -> float:
    found = float(np.abs(np.asarray(a) - np.asarray(b)).max())
    print(f"largest difference to open_clip, {what}: {found:.2g}")
    return found


@pytest.mark.parametrize("preprocess", [{}, {"resize_mode": "longest", "interpolation": "bilinear"}, {"resize_mode": "squash"}])
def test_embeddings_are_open_clips(tmp_path, preprocess):
    where, image = saved(tmp_path / "clip", **preprocess), tiny.picture(size=(70, 90))
    model = load(f"openclip:{where}", "cpu")
    seen, said, _ = theirs(where, image, ["a chest X-ray"])
    ours, words = model.embed(image), model.embed("a chest X-ray")
    assert ours.shape == words.shape == (16,) and ours.dtype == words.dtype == np.float32
    assert abs(np.linalg.norm(ours) - 1) < 1e-6 and abs(np.linalg.norm(words) - 1) < 1e-6
    assert gap(ours, seen, "image") < 1e-6 and gap(words, said[0], "text") < 1e-6
    assert np.abs(ours - model.embed(tiny.picture(id="other", size=(70, 90), seed=1))).max() > 1e-3


def test_classes_compete_by_the_published_prompts(model, folder):
    image = tiny.picture()
    _, _, logits = theirs(folder, image, [f"this is a photo of {label}" for label in LABELS])
    ours = model.classify(image, LABELS)
    assert list(ours) == LABELS and abs(sum(ours.values()) - 1) < 1e-6
    assert gap(list(ours.values()), logits.softmax(0), "probabilities") < 1e-6 and np.ptp(list(ours.values())) > 1e-3


def test_one_label_alone_competes_with_its_absence(model, folder):
    image = tiny.picture()
    _, _, logits = theirs(folder, image, ["pneumonia", "no pneumonia"])
    (chance,) = model.classify(image, "pneumonia").values()
    assert gap(chance, logits.softmax(0)[0], "present or absent") < 1e-6 and 0 < chance < 1


def test_prompts_of_a_slide_are_averaged(model, folder):
    image = tiny.picture(modality="pathology")
    chances = model.classify(image, LABELS)
    clip, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    clip.eval()
    seen, said, _ = theirs(folder, image, [f"a histopathology slide showing {x}" for x in LABELS] + [f"histopathology image of {x}" for x in LABELS])
    mean = torch.nn.functional.normalize((said[:3] + said[3:]) / 2, dim=-1)
    expected = (clip.logit_scale.exp() * mean @ seen).softmax(0).detach()
    assert gap(list(chances.values()), expected, "two prompts a class") < 1e-6
    assert chances != model.classify(tiny.picture(), LABELS)


def test_a_published_prompt_set_is_used_by_name(model, folder, tmp_path):
    """An ensemble of contrast pairs: each side's mean embedding, present against absent, label by label."""
    image, (present, absent) = tiny.picture(), PROMPTS["biovil"]
    clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    expected = []
    for label in LABELS:
        seen, said, _ = theirs(folder, image, [p.format(label) for p in (*present, *absent)])
        sides = [torch.nn.functional.normalize(part.mean(0), dim=0) for part in (said[: len(present)], said[len(present) :])]
        expected.append((clip.logit_scale.exp() * torch.stack(sides) @ seen).softmax(0)[0].item())
    ours = model.classify(image, LABELS, prompts="biovil")
    assert gap(list(ours.values()), expected, "contrast pairs") < 1e-6 and abs(sum(ours.values()) - 1) > 1e-3
    asked = Sample("a", images={image.id: image}, choices=tuple(LABELS), verb="classify", meta={"prompts": "biovil"})
    (told,) = model.predict([asked])
    assert told.choices == ours and told.text == max(ours, key=ours.get) and told.probability == max(ours.values())
    assert model.predict([Sample("b", images={image.id: image}, choices=tuple(LABELS), verb="classify")])[0].choices == model.classify(image, LABELS)
    siglip = load(f"openclip:{saved(tmp_path / 'siglip', SIGLIP)}", "cpu")
    assert sum(siglip.classify(image, LABELS, prompts="conch").values()) != pytest.approx(1)
    assert model.predict([Sample("c", images={image.id: image}, choices=("a", "b"), verb="classify", meta={"prompts": "none"})])[0].error.startswith("BAD_ARGUMENT")
    assert refused(lambda: model.classify(image, "pneumonia", prompts="conch")).code == "BAD_ARGUMENT"


def test_siglip_judges_each_label_alone(tmp_path):
    where, image = saved(tmp_path / "siglip", SIGLIP), tiny.picture()
    model = load(f"openclip:{where}", "cpu")
    _, _, logits = theirs(where, image, [f"this is a photo of {label}" for label in LABELS])
    ours = model.classify(image, LABELS)
    assert gap(list(ours.values()), logits.sigmoid(), "SigLIP") < 1e-6
    assert model.classify(image, LABELS[:1])[LABELS[0]] == pytest.approx(ours[LABELS[0]], abs=1e-6)


def test_a_text_tower_of_transformers_is_read_from_the_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"this is a photo of no pneumonia normal pleural effusion".split()]
    words = {w: i for i, w in enumerate(dict.fromkeys(words))}
    base = tmp_path / "clip"
    base.mkdir()
    BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=40).save_pretrained(base)
    text = {"hf_model_name": str(base), "hf_tokenizer_name": "org/none", "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler",
            "hf_model_pretrained": False, "context_length": 12}  # fmt: skip
    saved(base, {**CLIP, "text_cfg": text})
    about = json.loads((base / "open_clip_config.json").read_text())
    about["model_cfg"]["text_cfg"]["hf_model_name"] = "org/none"  # as published: a hub's name
    (base / "open_clip_config.json").write_text(json.dumps(about))
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]").save_pretrained(base)
    model = load(f"openclip:{base}", "cpu")
    chances = model.classify(tiny.picture(), LABELS)
    assert abs(sum(chances.values()) - 1) < 1e-6 and np.ptp(list(chances.values())) > 1e-4
    error = refused(lambda: model.embed("pneumonia " * 13))
    assert error.code == "QUESTION_TOO_LONG" and "12 tokens" in error.message
    model.embed("pneumonia " * 12)
    (base / "config.json").unlink()
    error = refused(lambda: load(f"openclip:{base}", "cpu"))
    assert error.code == "BAD_CHECKPOINT" and "org/none" in error.hint


def test_samples_are_predicted_by_their_choices_or_labels(model):
    image = tiny.picture()
    study = {image.id: image}
    rows = model.predict([
        Sample("a", images=study, choices=("normal", "pneumonia")), Sample("b", images=study, labels={"pneumonia": 1, "normal": 0}),
        Sample("c", images=study, turns=(Turn("user", "Is there an effusion?"),)), Sample("d", images={"v": volume()}, choices=("x", "y")),
    ])  # fmt: skip
    assert rows[0].choices == pytest.approx(model.classify(image, ["normal", "pneumonia"])) and rows[0].text == max(rows[0].choices, key=rows[0].choices.get)
    assert rows[1].choices == {label: model.classify(image, [label])[label] for label in ("pneumonia", "normal")}
    assert rows[2].error.startswith("UNSUPPORTED_VERB") and rows[3].error.startswith("OUT_OF_SCOPE")


def volume() -> Volume:
    return Volume("ct-1", np.zeros((1, 4, 8, 8), np.float32), np.eye(4), "ct", "HU", {})


def refused(work) -> MedVLMError:
    with pytest.raises(MedVLMError) as caught:
        work()
    return caught.value


def test_what_it_cannot_do_is_said(model, tmp_path):
    image = tiny.picture()
    assert refused(lambda: model.segment(image, "lung")).code == refused(lambda: model.ask(image, "Why?")).code == "UNSUPPORTED_VERB"
    error = refused(lambda: model.classify(Study("s", None, (volume(),)), LABELS))
    assert error.code == "OUT_OF_SCOPE" and "4 slices" in error.message and "slice" in error.hint
    assert refused(lambda: model.classify(image, [])).code == refused(lambda: model.embed("  ")).code == "BAD_ARGUMENT"
    (tmp_path / "scan.png").write_bytes(b"")
    assert refused(lambda: model.embed(str(tmp_path / "scan.png"))).code == "BAD_ARGUMENT"
    assert refused(lambda: model.embed("effusion " * 40)).code == "QUESTION_TOO_LONG"
    assert refused(lambda: model.classify(image, ["normal", "effusion " * 21])).code == "QUESTION_TOO_LONG"
    for name in ("nothing/there", "ViT-B-32", "ViT-B-32@no-such-tag", "hf-hub:org/none", ""):
        assert refused(lambda: load(f"openclip:{name}", "cpu")).code in ("NO_SUCH_PART", "BAD_CHECKPOINT")  # noqa: B023


def test_texts_that_just_fit_are_read_whole(model):
    """24 tokens with the start and end marks: 22 words of one token each."""
    full = model.embed("dog " * 22)
    assert np.abs(full - model.embed("dog " * 21)).max() > 1e-4


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "model.pth"])
def test_a_pickle_with_code_in_it_is_refused_and_nothing_runs(folder, tmp_path, name):
    trace, state = tmp_path / "ran", open_clip.CLIP(**CLIP).state_dict()
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    torch.save(state, tmp_path / name)
    load(f"openclip:{tmp_path}", "cpu")  # a pickle of tensors is read
    torch.save({**state, "more": Planted(trace)}, tmp_path / name)
    error = refused(lambda: load(f"openclip:{tmp_path}", "cpu"))
    assert error.code == "BAD_CHECKPOINT" and not trace.exists() and "weights_only" not in str(error)
    torch.load(tmp_path / name, weights_only=False)
    assert trace.exists()  # the trap works


def test_configurations_that_would_run_or_fetch_are_refused(folder, tmp_path):
    def said(change=None, **files) -> str:
        about = json.loads((folder / "open_clip_config.json").read_text())
        if change:
            change(about["model_cfg"])
        (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
        for name, text in files.items():
            (tmp_path / f"{name}.json").write_text(text)
        error = refused(lambda: load(f"openclip:{tmp_path}", "cpu"))
        assert error.code == "BAD_CHECKPOINT"
        return error.message

    (tmp_path / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    assert "trust_remote_code" in said(lambda c: c["text_cfg"].update(hf_tokenizer_name="x", tokenizer_kwargs={"trust_remote_code": True}))
    assert "fetch" in said(lambda c: c["vision_cfg"].update(timm_model_name="hf-hub:org/none"))
    assert "config.json" in said(lambda c: c["text_cfg"].update(hf_model_name="org/none"))
    assert "auto_map" in said(tokenizer_config='{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}')
    (tmp_path / "tokenizer_config.json").unlink()
    assert "describes no model" in said(lambda c: c.pop("text_cfg"))
    (tmp_path / "open_clip_config.json").write_text("{")
    assert refused(lambda: load(f"openclip:{tmp_path}", "cpu")).code == "BAD_CHECKPOINT"


def test_incomplete_weights_are_refused(folder, tmp_path):
    def said(state) -> str:
        save_file(state, tmp_path / "open_clip_model.safetensors")
        return refused(lambda: load(f"openclip:{tmp_path}", "cpu")).message

    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    assert refused(lambda: load(f"openclip:{tmp_path}", "cpu")).code == "BAD_CHECKPOINT"  # no weights at all
    state = open_clip.CLIP(**CLIP).state_dict()
    assert "visual.proj" in said({k: v for k, v in state.items() if k != "visual.proj"})
    assert "visual.more" in said({**state, "visual.more": torch.zeros(2)})
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"12345678{}")
    assert refused(lambda: load(f"openclip:{tmp_path}", "cpu")).code == "BAD_CHECKPOINT"


def test_an_architecture_with_a_file_of_weights(folder, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", CLIP)
    image, weights = tiny.picture(), folder / "open_clip_model.safetensors"
    model = load(f"openclip:tiny-clip@{weights}", "cpu")
    assert model.name == "tiny-clip" and model.sha256 == openclip.digest(weights) == load(f"openclip:{folder}", "cpu").sha256
    clip, preprocess = open_clip.create_model_from_pretrained("tiny-clip", str(weights))
    clip.eval()
    with torch.no_grad():
        expected = clip.encode_image(preprocess(Picture.fromarray(image.pixels[0]).convert("RGB"))[None], normalize=True)[0]
    assert gap(model.embed(image), expected, "by name") < 1e-6
