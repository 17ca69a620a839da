"""PubMedCLIP's larger scale from a published CLIP's files, and which captions are learnt from."""

import os

import foreign
import pytest
import torch
import transformers as hf

from medvlm.datasets import shapes
from medvlm.predictors import load as load_model
from medvlm.recipes import pubmedclip
from medvlm.recipes.base import load, override
from medvlm.sample import Sample, Turn
from medvlm.train.loop import train


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of two layers as save_pretrained writes it: both towers, tokenizer, image processor."""
    folder, words = tmp_path_factory.mktemp("clip"), foreign.tokenizer()
    ids = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": None}
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = hf.CLIPConfig(text_config={**size, **ids, "hidden_size": 32, "max_position_embeddings": 77},
                           vision_config={**size, "hidden_size": 48, "image_size": 64, "patch_size": 32}, projection_dim=16)  # fmt: skip
    torch.manual_seed(0)
    hf.CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    hf.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_the_papers_scale_starts_from_a_published_clip(clip, tmp_path):
    root = tmp_path / "data"
    shapes.write(root / "shapes", count=12, rank=2, size=(64, 64))
    recipe = override(load("pubmedclip").at("paper"), [
        f"args.clip={os.fspath(clip)}", "args.size=64", "args.dim=64", "args.layers=1",
        *(f'stages.{s}.{k}' for s in ("pair", "ask") for k in ('data={"shapes": 1.0}', "steps=1", "batch=4", "warmup=1")),
    ])  # fmt: skip
    pair, ask = recipe.stages
    assert (pair.lr, pair.weight_decay, pair.share("encoders.text.tower.x"), pair.share("heads.contrast.x")) == (1e-5, 5e-4, 1.0, 100.0)
    assert ask.share("encoders.picture.x") == 0.1 and ask.share("encoders.text.x") == ask.share("heads.contrast.x") == 0
    train(recipe, root, tmp_path / "run", device="cpu")
    model = load_model(tmp_path / "run", "cpu")
    published = hf.CLIPModel.from_pretrained(clip).state_dict()
    for ours, theirs in (("encoders.picture.tower.embeddings.patch_embedding.weight", "vision_model.embeddings.patch_embedding.weight"),
                         ("encoders.text.tower.embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight")):  # fmt: skip
        found = dict(model.vlm.named_parameters())[next(n for n, _ in model.vlm.named_parameters() if n.replace("vision_model.", "").replace("text_model.", "") == ours)]
        assert torch.allclose(found.float(), published[theirs], atol=1e-3) and found.shape == published[theirs].shape
    assert len(model.embed("a chest X-ray")) == 512


def test_a_clinical_note_is_never_a_caption_but_one_of_roco_is():
    from tiny import picture

    image = picture()
    note = Sample("r", "p", {image.id: image}, turns=(Turn("assistant", "A journey to Wuhan."),), labels={"pneumonia": 1.0}, meta={"row": "r", "split": "train"})
    made = {name: {s.answer for s in pubmedclip.samples([note], name, "train") if s.meta["kind"] in ("facts", "caption")} for name in ("xray_covid", "roco")}
    assert made["roco"] == {"A journey to Wuhan."} and "An X-ray showing pneumonia." in made["xray_covid"] and not made["xray_covid"] & made["roco"]
