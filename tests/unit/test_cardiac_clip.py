"""Cardiac-CLIP on made volumes: both scales train, and what comes out embeds and names findings without a language model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from foreign import tokenizer as words

import medvlm
from medvlm.datasets import shapes
from medvlm.datasets.base import open_data
from medvlm.errors import MedVLMError
from medvlm.evaluate.zeroshot import PROMPTS
from medvlm.recipes.base import load, override
from medvlm.recipes.cardiac_clip import ATTRIBUTES
from medvlm.sample import Sample
from medvlm.train.loop import train
from medvlm.vlm import MedVLM, MedVLMConfig

SMALL = ("args.size=[4,16,16]", "args.patch=[2,8,8]", "args.dim=24", "args.layers=1", "args.heads=2", "args.decoder=[12,1,2]", "args.embed=8",
         *(f"stages.{name}.{field}" for name in ("restore", "pair") for field in ("steps=1", "batch=4", "warmup=1")))  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    shapes.write(root / "volumes", 12, 3, size=(12, 48, 48))
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run") / "run"
    train(override(load("cardiac_clip"), SMALL), data, out, device="cpu", precision="no")
    return out


def volume(data, split="val"):
    return next(iter(next(iter(open_data(data, "volumes").groups(split)))[0].images.values()))


def test_findings_become_the_papers_sentences(data):
    group = next(iter(open_data(data, "volumes").groups("train")))
    template, *written = load("cardiac_clip").samples(group, "volumes", "train")
    present, absent = (side[0] for side in PROMPTS["cardiac-clip"])
    assert template.answer == " ".join((present if group[0].labels[n] else absent).format(n) for n in shapes.SHAPES)
    assert {s.meta["kind"] for s in written} == {"report", "caption"} and all(s.labels == template.labels for s in written)
    drawn = next(json.loads(line) for line in (data / "volumes/manifest.jsonl").read_text().splitlines() if group[0].meta["row"] in line)["objects"]
    named = {word for o in drawn for word in o.values() if isinstance(word, str)}
    assert {k for k, v in template.labels.items() if v} == named & {*shapes.SHAPES, *ATTRIBUTES}


def test_the_model_embeds_and_names_findings_by_their_names(data, run):
    model, image = medvlm.load(run), volume(data)
    assert list(model.vlm.encoders) == ["volume", "text"] and model.vlm.lm is None
    seen, told = model.embed(image), model.embed("There is disc.")
    assert seen.shape == told.shape == (8,) and np.linalg.norm(seen) == pytest.approx(1, abs=1e-3)
    names, scale = ["disc", "ring"], model.vlm.heads["contrast"].scale().item()
    chances = model.classify(image, names, prompts="cardiac-clip")
    for name in names:
        margin = scale * seen @ (model.embed(f"There is {name}.") - model.embed(f"There is no {name}."))
        assert chances[name] == pytest.approx(1 / (1 + np.exp(-margin)), abs=1e-3)
    given = model.predict([Sample("s", images={image.id: image}, choices=("disc", "ring"), verb="classify", meta={"prompts": "cardiac-clip"})])[0]
    assert given.choices == pytest.approx(chances)
    competing = model.classify(image, names)
    logits = scale * np.array([seen @ model.embed(PROMPTS["biomedclip"][0][0].format(n)) for n in names])
    assert [competing[n] for n in names] == pytest.approx((np.exp(logits) / np.exp(logits).sum()).tolist(), abs=1e-3)
    with pytest.raises(MedVLMError, match="no label"):
        model.classify(image, [])


def test_a_saved_configuration_keeps_the_order_of_its_parts(tmp_path):
    config = MedVLMConfig({"encoders": {"volume": {"file": "v"}, "text": {"file": "t"}, "extra": {"file": "e"}}}, {"routes": {"mr": "b", "ct": "a"}})
    config.save_pretrained(tmp_path)
    again = MedVLMConfig.from_pretrained(tmp_path)
    assert list(again.parts["encoders"]) == ["volume", "text", "extra"] and list(again.about["routes"]) == ["mr", "ct"]
    assert again.to_dict() == config.to_dict()


def test_masked_pretraining_reaches_the_encoder_and_contrast_both_towers(data, run, tmp_path):
    recipe = override(load("cardiac_clip"), SMALL)
    start = train(override(recipe, ("stages.restore.steps=0", "stages.pair.steps=0")), data, tmp_path / "start", device="cpu", precision="no")
    first = train(override(recipe, ("stages.pair.steps=0",)), data, tmp_path / "first", device="cpu", precision="no")
    before, between, after = (MedVLM.from_pretrained(f).state_dict() for f in (start, first, run / "model"))

    def changed(a, b):
        return {".".join(k.split(".")[:2]) for k in a if not torch.equal(a[k], b[k])}

    assert changed(before, between) == {"encoders.volume", "heads.restore"}
    assert changed(between, after) == {"encoders.volume", "encoders.text", "heads.contrast"}


def test_the_papers_scale_reads_a_published_text_tower_and_trains(data, tmp_path):
    tokens = words("[CLS]", "[SEP]", cls_token="[CLS]", sep_token="[SEP]")
    config = hf.BertConfig(vocab_size=len(tokens), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, pad_token_id=tokens.pad_token_id)
    hf.BertModel(config).save_pretrained(tmp_path / "bert")
    tokens.save_pretrained(tmp_path / "bert")
    recipe = load("cardiac_clip").at("paper")
    assert recipe.args["size"] == [128, 144, 144] and recipe.args["patch"] == 8
    assert [s.share("heads.restore.mask_token") for s in recipe.stages] == [5.0, 0.0]
    args = ["args.size=[16,24,16]", "args.dim=24", "args.layers=2", "args.heads=2", "args.decoder=[12,2,2]", "args.text_dim=24", "args.embed=8",
            f"args.lm={json.dumps(str(tmp_path / 'bert'))}", f"args.findings={json.dumps(shapes.SHAPES)}"]  # fmt: skip
    recipe = override(recipe, args)
    recipe = replace(recipe, stages=tuple(replace(s, epochs=None, steps=1, batch=4, warmup=1) for s in recipe.stages))
    model = medvlm.load(train(recipe, data, tmp_path / "run", device="cpu", precision="no"))
    assert model.vlm.encoders["text"].tower.config.model_type == "bert" and model.embed(volume(data)).shape == (8,)
