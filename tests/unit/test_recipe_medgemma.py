"""The medgemma recipe: its paper scale builds from published folders, and a step of each stage moves what the stage is about."""

import json
from dataclasses import replace

import drawn
import foreign
import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file

from medvlm.imaging.scan import Volume
from medvlm.predictors import load
from medvlm.recipes.base import override
from medvlm.recipes.medgemma import RECIPE, WINDOWS, samples
from medvlm.sample import Mask, Sample
from medvlm.train.loop import train
from medvlm.vlm import MedVLM

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_a_volume_is_told_of_slice_by_slice():
    voxels = np.zeros((1, 24, 24, 12), np.float32)
    volume = Volume("ct-1", voxels, np.eye(4), "ct", "HU", {})
    liver = np.zeros(voxels.shape[1:], bool)
    liver[4:12, 4:12, :6] = True
    meta = {"row": "v1", "split": "train"}
    group = [Sample("v1", None, {"ct-1": volume}, meta=meta), Sample("v1/liver", None, {"ct-1": volume}, masks=(Mask("ct-1", "liver", liver),), meta=meta)]
    told = list(samples(group, "any", "train"))
    assert len({s.meta["row"] for s in told}) == 6 and all(i.shape[1:] == (24, 24) for s in told for i in s.images.values())
    facts = {s.meta["row"]: s.answer for s in told if s.meta["kind"] == "facts"}
    assert all("CT slice" in a for a in facts.values()) and 0 < sum("liver" in a for a in facts.values()) < 6
    assert not any("consolidation" in (s.answer or "") for s in told)  # nobody looked for it here


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A SigLIP and a Gemma 3 of random weights as their authors publish them: two tokenizers, 4 x 4 patches, 2 x 2 tokens."""
    folder = tmp_path_factory.mktemp("published")
    words = foreign.tokenizer()
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": len(words), "max_position_embeddings": 16, "pad_token_id": words.pad_token_id}
    hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config={**TOWER, "image_size": 32, "patch_size": 16})).save_pretrained(folder / "siglip")
    hf.SiglipImageProcessor(size={"height": 32, "width": 32}, **foreign.EVEN).save_pretrained(folder / "siglip")
    words.save_pretrained(folder / "siglip")
    foreign.save(foreign.gemma3, folder / "gemma")
    for name in ("chat_template.jinja", "processor_config.json", "preprocessor_config.json"):
        (folder / "gemma" / name).unlink(missing_ok=True)  # the pretrained Gemma has no chat template
    kept = json.loads((folder / "gemma/tokenizer_config.json").read_text())
    (folder / "gemma/tokenizer_config.json").write_text(json.dumps({k: v for k, v in kept.items() if k != "chat_template"}))
    return folder


def test_the_paper_scale_takes_a_step_in_every_stage(published, tmp_path):
    root = drawn.write(tmp_path / "data", 6)
    small = [f"args.encoder={published / 'siglip'}", f"args.text={published / 'siglip'}", f"args.lm={published / 'gemma'}", "args.size=64", "args.grid=2",
             *(f"args.{name}=32" for name in ("dim", "text_dim", "lm_dim", "embed")),
             *(f"stages.{s.name}.{k}" for s in RECIPE.stages for k in ('data={"drawn": 1}', "steps=1", "batch=4", "chunk=2", "warmup=1"))]  # fmt: skip
    recipe = override(RECIPE.at("paper"), small)
    assert [s.lora for s in recipe.stages] == [{}, {}, {"lm.model.layers.*": 16}] and RECIPE.at("paper").args["size"] == 896
    states = []
    for stages in (0, 2, 3):
        some = replace(recipe, stages=tuple(replace(s, steps=int(k < stages)) for k, s in enumerate(recipe.stages)))
        if stages:
            train(some, root, tmp_path / str(stages), device="cpu", precision="no")
            states.append(load_file(tmp_path / str(stages) / "checkpoints/last/model.safetensors"))
        else:
            torch.manual_seed(0)
            states.append(MedVLM(recipe.model(recipe.tokenizer((), recipe.args), **recipe.args)).state_dict())
    moved = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in zip(states, states[1:])]
    assert {n.split(".")[0] for n in moved[0]} == {"encoders", "heads", "projectors", "lm"} and not any("words" in n for n in moved[0])
    tuned = {n for n in moved[1] if not n.startswith("projectors.")}
    assert tuned and tuned < moved[1] and all(n.startswith("lm.") and n.endswith("_proj.weight") for n in tuned)

    reader = load(tmp_path / "3", "cpu")  # nothing of the published folders is needed any more
    spec = reader.vlm.encoders["picture"].spec
    assert spec.windows == WINDOWS and spec.size == (64, 64) and spec.mean == (0.5,) * 3 and reader.vlm.tokens("xray") == 4
    assert reader.vlm.encoders["text"].tokenizer.get_vocab() == foreign.tokenizer().get_vocab() != reader.tokenizer.get_vocab()
    picture = tiny.picture()
    assert reader.ask(picture, "Is there consolidation?").text in ("yes", "no") and isinstance(reader.ask(picture, "What is seen?").text, str)
    assert abs(np.linalg.norm(reader.embed(picture)) - 1) < 1e-4 and abs(np.linalg.norm(reader.embed("a chest film")) - 1) < 1e-4


def test_the_paper_s_projector_gives_256_tokens():
    """Gemma 3 reads 16 x 16 tokens of 64 x 64 patches."""
    from medvlm.recipes import towers

    args = {**RECIPE.at("paper").args, "encoder": None, "text": None, "lm": None, "dim": 32, "text_dim": 32, "lm_dim": 32}
    words = tiny.tokenizer()
    config = RECIPE.model(words, **args)
    config.parts["encoders"]["picture"] = towers.vision(896, None, 32, 1, 14)
    assert MedVLM(config).tokens("ct") == 256
