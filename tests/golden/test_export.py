"""Exported models give what the model gives, where this package does not exist."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image as Picture
from tokenizers.processors import TemplateProcessing

from medvlm import cli, export
from medvlm.errors import MedVLMError
from medvlm.heads.mask import Prompts
from medvlm.imaging.scan import Image
from medvlm.language import END, IMAGE, SEG, encode
from medvlm.preprocess import normalise, to_tensor
from medvlm.sample import Sample, Turn
from medvlm.vlm import MedVLM, MedVLMConfig

SIZE = 32
TOWERS = {
    "clip": {"model_type": "clip_vision_model", "hidden_act": "gelu"},
    "siglip": {"model_type": "siglip_vision_model"},
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def ending():
    """A tokenizer that ends each text, as contrastive models need it."""
    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, made.eos_token_id)])
    return made


def shaken(model):
    """Weights far enough from zero that every one of them shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def chat(tokenizer, tower="clip", lm="llama", norm=False, layer=-2, heads=None, projector="mlp", tied=True) -> MedVLM:
    """A small LLaVA of ours: a transformers tower, two linear layers, a language model."""
    torch.manual_seed(0)
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8} | TOWERS[tower]
    base = tiny.config(tokenizer)
    language = base.parts["language"]["lm"]["args"] | {"model_type": lm, "tie_word_embeddings": tied}
    made = MedVLM(MedVLMConfig(
        parts={
            "encoders": {"picture": {"file": "image", "args": {"library": "transformers", "model": vision, "size": [SIZE, SIZE], "feature_layer": layer,
                                                                "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}}},
            "projectors": {"picture": {"file": projector, "args": {"dim": 24, "lm_dim": 32, **({"norm": norm} if projector == "mlp" else {})}}},
            "heads": heads or {}, "language": {"lm": {"file": "language", "args": language}},
        },
        about={"name": "small", "routes": {"*": "picture"}}, image_token_id=base.image_token_id, seg_token_id=base.seg_token_id,
    ))  # fmt: skip
    return shaken(made)


def colour(size=(SIZE, SIZE), seed=0) -> Image:
    return Image("photo", np.random.default_rng(seed).integers(0, 256, (3, *size), dtype=np.uint8), None, "pathology", "uint8", {})


def answer(model, tokenizer, image, question: str) -> list[int]:
    """Our own greedy tokens."""
    pixels, _ = to_tensor(image, model.encoders["picture"].spec)
    ids = encode(tokenizer, Sample("q", turns=(Turn("user", question),)), {"1": model.count("picture")}, answer=False).ids
    never = tokenizer.convert_tokens_to_ids([IMAGE, SEG, "<|system|>", "<|user|>", "<|assistant|>"])
    return model.generate(torch.tensor([ids]), torch.ones(1, len(ids)).long(), {"picture": pixels[None]}, max_new_tokens=12, do_sample=False,
                          suppress_tokens=never, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)[0].tolist()  # fmt: skip


STOCK = """
    import json, sys
    assert not any("medvlm" in name for name in sys.modules)
    try:
        import medvlm
        raise SystemExit("medvlm can be imported")
    except ImportError:
        pass
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    torch.set_num_threads(1)
    folder, picture, question = sys.argv[1:]
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    inputs = processor(images=Image.open(picture), text=processor.apply_chat_template(asked, add_generation_prompt=True), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    print(json.dumps({"kind": type(model).__name__, "processor": type(processor).__name__, "ids": ids.tolist()}))
"""


def stock(folder: Path, image: Image, question: str) -> dict:
    """What a Python that cannot import this package makes of the folder."""
    Picture.fromarray(image.pixels.transpose(1, 2, 0)).save(folder.parent / "picture.png")
    hidden = "import sys\nclass Hide:\n    def find_spec(self, name, *_):\n        if name.split('.')[0] == 'medvlm': raise ImportError(name)\nsys.meta_path.insert(0, Hide())\n"
    done = subprocess.run([sys.executable, "-c", hidden + textwrap.dedent(STOCK), str(folder), str(folder.parent / "picture.png"), question],
                          capture_output=True, text=True, cwd=folder.parent)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_llava_loads_without_this_package_and_says_the_same(tokenizer, tmp_path):
    model, image, question = chat(tokenizer, tied=False), colour(seed=2), "Is there consolidation in this chest X-ray?"
    gaps = export.to_llava(model, tokenizer, tmp_path / "llava")
    print(f"largest difference of the logits: {gaps}")
    found = stock(tmp_path / "llava", image, question)
    assert found["kind"] == "LlavaForConditionalGeneration" and found["processor"] == "LlavaProcessor"
    expected = answer(model, tokenizer, image, question)
    assert found["ids"] == expected and len(set(expected)) > 2
    assert expected != answer(model, tokenizer, colour(seed=1), question)  # the picture matters
    assert not list((tmp_path / "llava").glob("*.py"))


@pytest.mark.parametrize("given", [{"tower": "siglip"}, {"tower": "clip", "layer": -1}, {"lm": "qwen2"}, {"tied": False}])
def test_other_towers_and_language_models_become_llava(tokenizer, tmp_path, given):
    gaps = export.to_llava(chat(tokenizer, **given), tokenizer, tmp_path)
    print(f"largest difference of the logits with {given}: {gaps}")
    assert max(gaps.values()) < 1e-5


def refused(work) -> MedVLMError:
    with pytest.raises(MedVLMError) as caught:
        work()
    return caught.value


def test_what_llava_cannot_express_is_named(tokenizer, tmp_path):
    def said(model, **options) -> str:
        error = refused(lambda: export.to_llava(model, tokenizer, tmp_path / "out", **options))
        assert error.code == "NOT_EXPORTABLE" and not (tmp_path / "out").exists()
        return error.message

    assert "LayerNorm" in said(chat(tokenizer, norm=True))
    classes = {"classify": {"file": "classify", "args": {"dim": 24, "labels": ["pneumonia"], "groups": []}}}
    headed = chat(tokenizer, heads=classes)
    assert "heads classify" in said(headed)
    assert "final norm of a siglip" in said(chat(tokenizer, tower="siglip", layer=-1))
    assert "Linear" in said(chat(tokenizer, projector="linear"))
    assert "TimmEncoder" in said(tiny.model(tokenizer), drop_heads=True)
    assert max(export.to_llava(headed, tokenizer, tmp_path / "out", drop_heads=True).values()) < 1e-5


def contrastive(kind="clip", act="gelu", quick=False, eos=1) -> MedVLM:
    torch.manual_seed(0)
    tower = {"embed_dim": 20, "quick_gelu": quick, "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}}
    text = {"model_type": "clip_text_model", "vocab_size": 320, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 12, "hidden_act": act, "eos_token_id": eos, "bos_token_id": 3, "pad_token_id": 0}  # fmt: skip
    return shaken(MedVLM(MedVLMConfig(parts={
        "encoders": {"picture": {"file": "image", "args": {"library": "open_clip", "model": tower, "size": [SIZE, SIZE]}}, "text": {"file": "text", "args": text}},
        "heads": {"contrast": {"file": "contrast", "args": {"dim": 32, "text_dim": 24, "embed_dim": 20, "kind": kind}}},
    }, about={"name": "pair", "routes": {"*": "picture"}})))  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("given", [{}, {"kind": "siglip"}, {"act": "quick_gelu", "quick": True}, {"eos": 2}])
def test_an_open_clip_folder_gives_the_same_embeddings(ending, tmp_path, given):
    import open_clip

    model = contrastive(**given)
    gaps = export.to_open_clip(model, ending, tmp_path)
    print(f"largest difference of the embeddings with {given}: {gaps}")
    assert max(gaps.values()) < 1e-6
    clip, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    clip.eval()
    head, encoder = model.heads["contrast"], model.encoders["picture"]
    assert float(clip.logit_scale) == float(head.logit_scale) and (clip.logit_bias is None) == (head.logit_bias is None)
    for size in ((SIZE, SIZE), (20, 45)):  # scaled and padded alike
        image = colour(size)
        pixels = normalise(to_tensor(image, encoder.spec)[0], encoder.spec)[None]
        theirs = preprocess(Picture.fromarray(image.pixels.transpose(1, 2, 0)))[None]
        assert float((pixels - theirs).abs().max()) < 0.02  # scaled pictures are rounded to whole grey levels there
        gap = float((head.image(encoder(pixels)) - clip.encode_image(theirs, normalize=True)).abs().max())
        print(f"largest difference from the picture on, {size}: {gap:.2g}")
        assert gap < (1e-6 if size == (SIZE, SIZE) else 5e-3)


@torch.no_grad()
def test_an_open_clip_export_is_read_by_the_predictor(ending, tmp_path):
    from medvlm.predictors import load

    pair = contrastive()
    export.to_open_clip(pair, ending, tmp_path)
    model = load(f"openclip:{tmp_path}", "cpu")
    ids = torch.tensor([ending("left lung")["input_ids"]])
    expected = pair.heads["contrast"].text(pair.encoders["text"](ids))[0].numpy()
    assert model.embed(colour()).shape == (20,) and np.abs(model.embed("left lung") - expected).max() < 1e-6  # padding is not read


def test_what_an_open_clip_folder_cannot_express_is_named(tokenizer, tmp_path):
    def said(model) -> str:
        error = refused(lambda: export.to_open_clip(model, tokenizer, tmp_path / "out"))
        assert error.code == "NOT_EXPORTABLE" and not (tmp_path / "out").exists()
        return error.message

    assert "TimmEncoder" in said(tiny.model(tokenizer)) and "language model" in said(tiny.model(tokenizer))
    assert "quick_gelu" in said(contrastive(act="quick_gelu"))
    assert "end texts" in said(contrastive())


def outlines(seed=0, fine=None) -> MedVLM:
    """An encoder with a mask head and a refiner, or what else reads its fine levels, and no language model; with ``shuffle`` the encoder is a U-Net's."""
    encoder = {"file": "unet", "args": {"size": [64, 32], "dims": [24, 32, 64, 128, 256]}} if "shuffle" in (fine or {}) else {"file": "image", "args": {"model": "test_byobnet", "size": [64, 32]}}
    torch.manual_seed(seed)
    return shaken(MedVLM(MedVLMConfig(parts={
        "encoders": {"picture": encoder},
        "heads": {"mask": {"file": "mask", "args": {"level_dims": [24, 32, 64, 128, 256], "level_strides": [2, 4, 8, 16, 32], "lm_dim": 8, "size": [64, 32],
                                                    "dim": 16, "heads": 2, "depth": 1, **(fine or {"refine": 4})}}},
    }, about={"name": "outlines", "routes": {"*": "picture"}})))  # fmt: skip


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("form", "fine"), [("torch", None), ("onnx", None), ("torch", {"ladder": 4, "labels": ["lung"]}), ("onnx", {"ladder": 4, "labels": ["lung"], "shuffle": 2})])
def test_encoders_and_mask_heads_run_without_this_package(tmp_path, form, fine):
    model = outlines(fine=fine)
    gaps = export.FORMS[form](model, tmp_path)
    print(f"largest differences in {form}: {gaps}")
    ending = {"torch": ".pt2", "onnx": ".onnx"}[form]
    assert set(gaps) == {f"picture{part}{ending}" for part in ("", "_embedding", "_points", "_boxes")} and max(gaps.values()) < 1e-4
    spec = json.loads((tmp_path / "inputs.json").read_text())["picture"]
    assert spec["size"] == [64, 32] and spec["unit"] == "display"
    pixels, points, labels = torch.rand(1, 1, 64, 32), torch.tensor([[[10.0, 20.0], [50.0, 5.0], [3.0, 3.0]]]), torch.tensor([[1, 0, 1]])
    features = model.encode({"picture": pixels})["picture"]
    expected = model.heads["mask"](features, Prompts(torch.tensor([0]), points=points, labels=labels))
    if form == "onnx":
        import onnxruntime

        def run(name, *given):
            session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx")
            return [torch.from_numpy(x) for x in session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), given)})]
    else:

        def run(name, *given):
            return torch.export.load(tmp_path / f"{name}.pt2").module()(*given)

    logits, quality, present = run("picture_points", *run("picture_embedding", pixels), points, labels)
    for ours, theirs in ((expected.logits, logits), (expected.quality, quality), (model.heads["mask"].probability(expected.present), present)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert np.ptp(logits.numpy()) > 0.1


@pytest.mark.slow
@torch.no_grad()
def test_a_text_tower_takes_texts_up_to_its_own_longest(tmp_path):
    tower = {"model_type": "clip_text_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40,
             "max_position_embeddings": 13, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}  # fmt: skip
    model = shaken(MedVLM(MedVLMConfig(parts={"encoders": {"text": {"file": "text", "args": tower}}}, about={"name": "words", "routes": {}})))
    export.to_torch(model, tmp_path)
    run = torch.export.load(tmp_path / "text.pt2").module()
    for length in (3, 13):
        ids = torch.randint(2, 40, (3, length))
        ids[:, -1] = 1
        expected = model.encoders["text"](ids, torch.ones_like(ids))
        for ours, theirs in zip((expected.tokens, expected.pooled), run(ids, torch.ones_like(ids))):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_graph_with_other_numbers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "load", lambda path: type("Broken", (), {"module": lambda self: lambda *given: [torch.zeros(()) for _ in range(9)]})())
    error = refused(lambda: export.to_torch(outlines(), tmp_path))
    assert error.code == "NOT_EXPORTABLE" and "differ by" in error.message
    assert not any(tmp_path.iterdir()) and not any(tmp_path.parent.glob(".*.part"))


def test_the_command(tokenizer, tmp_path, capsys):
    chat(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert cli.main(["export", str(tmp_path / "model"), "--to", "llava", "--out", str(tmp_path / "out"), "--json"]) == 0
    (gap,) = json.loads(capsys.readouterr().out.splitlines()[-1])["largest_differences"].values()
    assert gap < 1e-5 and (tmp_path / "out" / "model.safetensors").is_file()
    assert cli.main(["export", str(tmp_path / "model"), "--to", "llava", "--out", str(tmp_path / "out")]) == 2
    assert "OUTPUT_EXISTS" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "model"), "--to", "open_clip", "--out", str(tmp_path / "other")]) == 2
    assert "NOT_EXPORTABLE" in capsys.readouterr().err
