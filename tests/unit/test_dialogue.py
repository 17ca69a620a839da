"""Dialogues of several turns: joined, learnt in every turn, asked turn by turn; and the recipe that lives on them."""

import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import tiny
import torch
import transformers as hf

from medvlm.datasets import shapes
from medvlm.datasets.instruct import dealt, dialogues
from medvlm.errors import MedVLMError
from medvlm.evaluate.dialogue import TASK
from medvlm.language import encode
from medvlm.recipes.base import load, override
from medvlm.sample import SEG, Mask, Prediction, Region, Sample, Turn
from medvlm.train.data import draw, prepare
from medvlm.train.loop import train

PICTURE = tiny.picture()
BASE = Sample("p", "1", {PICTURE.id: PICTURE}, meta={"row": "r", "split": "train"})
LEFT = np.zeros(PICTURE.shape[1:], bool)
LEFT[10:40, 50:80] = True


def single(id, question, answer, kind="asked", **more):
    meta = {**BASE.meta, "kind": kind, **more.pop("meta", {})}
    return replace(BASE, id=id, turns=(Turn("user", question), Turn("assistant", answer)), meta=meta, **more)


ASKED = [single(f"q{n}", f"Question {n}?", ("yes", "no")[n % 2], group=f"pair{n // 2}", choices=("yes", "no")) for n in range(8)]
DRAWN = [
    single("box", "Mark the heart.", SEG, "segment", regions=(Region(PICTURE.id, "heart and mediastinum", ((5, 5), (40, 60))),)),
    single("mask", "Outline the left lung.", SEG, "segment", masks=(Mask(PICTURE.id, "left lung", LEFT),)),
    single("where", "Where is the left lung?", "On the left.", "locate"),
]


def test_every_conversation_is_in_one_dialogue_and_no_twin_in_the_same():
    lots = dealt(ASKED, 3)
    assert sorted(s.id for lot in lots for s in lot) == [s.id for s in ASKED]
    assert all(len(lot) <= 3 and len({s.group for s in lot}) == len(lot) for lot in lots) and len(lots) < len(ASKED)
    assert [[s.id for s in lot] for lot in dealt(ASKED[::-1], 3)] == [[s.id for s in lot] for lot in lots]  # by id, not by order
    twins = [replace(s, group="one") for s in ASKED]
    assert all(len(lot) == 1 for lot in dealt(twins, 3))


def test_a_dialogue_holds_the_turns_and_targets_of_its_parts():
    (joined,) = dialogues([*DRAWN, single("xy", "Give the bounding box.", "[1, 2]", "box", meta={"style": "qwen3"})], turns=4)
    assert [t.role for t in joined.turns] == ["user", "assistant"] * 3 and sorted(joined.meta["kinds"]) == ["locate", "segment", "segment"]
    asked = [t.text for t in joined.turns if t.role == "user"]
    assert asked.index("Outline the left lung.") < asked.index("Mark the heart.")  # a sample's outlines stand before its boxes
    assert [m.label for m in joined.masks] == ["left lung"] and [r.label for r in joined.regions] == ["heart and mediastinum"]
    assert joined.meta["kind"] == "dialogue" and joined.id == "r#d0" and joined.group is None


def test_every_answer_of_a_dialogue_is_learnt_and_nothing_else():
    tok = tiny.tokenizer()
    (joined,) = dialogues(ASKED[::2], turns=4)
    found = encode(tok, joined, {PICTURE.id: 4})
    learnt = tok.decode([i for i, label in zip(found.ids, found.labels) if label >= 0])
    assert learnt == "".join(f"{t.text}<|end|>" for t in joined.turns if t.role == "assistant") and learnt.count("<|end|>") == 4
    assert all(label in (-100, i) for i, label in zip(found.ids, found.labels)) and found.images == [PICTURE.id]


def test_outlines_asked_for_in_earlier_turns_are_drawn_and_places_hold_the_picture_still():
    tok = tiny.tokenizer()
    model = tiny.model(tok)
    joined = list(dialogues([*DRAWN[:2], single("z", "Is it normal?", "no")], turns=3))
    assert sum(SEG in t.text for t in joined[0].turns) == 2
    (case,) = prepare(model, tok, joined)
    (turn,) = case.turns
    assert turn.targets == [0, 1] and case.weak == [False, True] and not turn.still
    batch = draw([case], tok, [np.random.default_rng(0)])
    assert len(batch.seg) == 2 == len(batch.targets["mask"]) and batch.targets["label"].tolist() == [tiny.TARGETS.index("left lung"), tiny.TARGETS.index("heart and mediastinum")]
    for parts, still in ((DRAWN[1:], True), ([DRAWN[1], ASKED[0]], False)):
        (case,) = prepare(model, tok, list(dialogues(parts)))
        masks = [draw([case], tok, [np.random.default_rng(s)], strength=1.0).targets["mask"][0] * 255 for s in range(4)]
        assert case.turns[0].still is still and all(torch.equal(m.round().byte(), case.masks[0]) for m in masks) is still
    with pytest.raises(MedVLMError, match="asks for 2 masks and has 1"):
        prepare(model, tok, [replace(joined[0], regions=())])


def test_questions_are_asked_with_the_true_turns_before_them():
    samples = TASK.prepare(lambda split: [*ASKED, single("open", "What is it?", "a lung"), replace(ASKED[0], id="alone", meta={**BASE.meta, "row": "other"})], "val")
    assert sorted(s.id for s in samples) == sorted(f"{s.id}@turn" for s in ASKED)  # closed ones, of images with two or more
    answers = {f"Question {n}?": s.answer for n, s in enumerate(ASKED)}
    for s in samples:
        asked = [t.text for t in s.turns if t.role == "user"]
        assert len(s.turns) == 2 * s.meta["turn"] == 2 * len(asked) and [t.text for t in s.turns[1::2]] == [answers[q] for q in asked]
        assert len({int(q.split()[1][:-1]) // 2 for q in asked}) == len(asked)  # no twin before it


def test_first_and_later_turns_have_scores_of_their_own():
    samples = TASK.prepare(lambda split: ASKED, "val")
    said = [Prediction(s.id, s.answer if s.meta["turn"] == 1 else "yes") for s in samples]
    found = {s.name: s for s in TASK.score(samples, said, "medvlm")}
    later = [s.answer == "yes" for s in samples if s.meta["turn"] > 1]
    first = len(samples) - len(later)
    assert found["first turn accuracy"].value == 1 and found["later turns accuracy"].value == pytest.approx(np.mean(later))
    assert found["all turns accuracy"].value == pytest.approx((first + sum(later)) / len(samples)) and found["later turns accuracy"].n == len(later)
    assert all(s.chance == 0.5 for s in found.values())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """An EVA-02, a CLIP and a LLaMA of random weights, as their libraries save them."""
    folder = tmp_path_factory.mktemp("weights")
    eva = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    timm.models.save_for_hf(timm.create_model("eva02_base_patch14_448", img_size=56, **eva), str(folder / "eva"), model_args=eva, safe_serialization=True)
    vision = {"image_size": 28, "layers": 1, "width": 32, "patch_size": 14, "head_width": 16}
    clip = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}}
    (folder / "clip").mkdir()
    (folder / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": clip, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}))
    safetensors.torch.save_file(open_clip.CLIP(**clip).state_dict(), folder / "clip/open_clip_model.safetensors")
    words = tiny.tokenizer()
    words.chat_template = None
    words.save_pretrained(folder / "llama")
    config = hf.LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=512)
    hf.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    return folder


def test_the_papers_scale_takes_a_step_a_stage_from_published_weights(tmp_path, published):
    shapes.write(tmp_path / "data/mmfundus", count=14, size=(56, 56), modality="fundus", text="caption")
    recipe = load("visionunite").at("paper")
    eyes = json.loads(json.dumps(recipe.args["eyes"]))
    assert eyes["eva"]["args"].pop("model").startswith("eva02_base_patch14_448") and eyes["clip"]["args"].pop("model").startswith("ViT-L-14")
    eyes["eva"]["args"] |= {"weights": str(published / "eva"), "model": {"name": "eva02_base_patch14_448", "embed_dim": 32, "depth": 1, "num_heads": 2}, "size": [56, 56]}
    eyes["clip"]["args"] |= {"weights": str(published / "clip"), "size": [28, 28]}
    for eye in eyes.values():
        eye["dim"] = 32
    small = [f"args.eyes={json.dumps(eyes)}", f"args.lm={published / 'llama'}", "args.dim=32", "args.tokens=2", f"args.signs={json.dumps(shapes.SHAPES)}"]
    small += [f"stages.{s}.{setting}" for s in ("align", "tune") for setting in ("steps=1", "batch=2")]
    assert recipe.stages[1].share("lm.model.layers.0.mlp.up_proj.weight") == 0 < recipe.stages[1].share("lm.model.layers.0.input_layernorm.weight")
    train(override(recipe, small), tmp_path / "data", tmp_path / "run", precision="no", device="cpu")
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in rows if r.get("split") == "train"} == {"align", "tune"} and any("labels" in r and "lm" in r for r in rows)
    saved = safetensors.torch.load_file(tmp_path / "run/model/model.safetensors")
    assert {"encoders.eva", "encoders.clip", "projectors.eva", "projectors.clip", "heads.classify"} <= {".".join(k.split(".")[:2]) for k in saved}
    assert "lora" not in " ".join(saved)  # merged in


def test_any_group_gives_conversations_and_an_eye_its_side():
    recipe = load("visionunite")
    found = list(recipe.samples(ASKED, "any", "train"))
    assert {s.meta["kind"] for s in found} <= {"dialogue", "facts"} and any(len(s.turns) == 6 for s in found)
    eye = replace(BASE, images={"f": tiny.picture("f", modality="fundus")}, meta={**BASE.meta, "labels": {"eye": "left"}})
    assert Turn("assistant", "left") in [t for s in recipe.samples([eye], "chase", "train") for t in s.turns]
