"""Answers that outline several of the things that they name: made, learnt, drawn and written; and the recipe that teaches them."""

from dataclasses import replace

import drawn
import numpy as np
import pytest
import timm
import tiny
import torch
import transformers as hf

from medvlm.datasets import instruct
from medvlm.datasets.base import open_data
from medvlm.datasets.mirror import mirror
from medvlm.errors import MedVLMError
from medvlm.heads.mask import Prompts
from medvlm.imaging.scan import Image
from medvlm.language import SEG, collate, encode
from medvlm.predictors import load as load_model
from medvlm.predictors.native import NativeModel, _turns
from medvlm.recipes.base import override
from medvlm.recipes.unibiomed import RECIPE
from medvlm.sample import Mask, Sample, Turn
from medvlm.train import objectives
from medvlm.train.data import draw, prepare
from medvlm.train.loop import train
from medvlm.vlm import MedVLM

ANSWER = f"The chest X-ray shows the right lung {SEG}, the left lung {SEG} and the consolidation {SEG}."
NAMES = ("right lung", "left lung", "consolidation")


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def model(tok):
    return tiny.model(tok)


def grounded(root, split="train"):
    """{row: its conversation that outlines what it names}."""
    found = {}
    for group in open_data(root, "drawn").groups(split):
        for s in instruct.conversations(group, NAMES, kinds=("grounded",), variety=0):
            found[s.meta["row"]] = s
    return found


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return grounded(drawn.write(tmp_path_factory.mktemp("data")))


def words(tok, ids):
    return tok.decode(ids).strip()


def test_a_sentence_names_and_outlines_what_is_there(said):
    ill, healthy = said["x1"], said["x0"]
    assert ill.question == "What does this chest X-ray show? Outline it." and ill.answer == ANSWER and ill.meta["kind"] == "grounded"
    assert [m.label for m in ill.masks] == list(NAMES) and all(m.array.any() for m in ill.masks)
    assert healthy.answer == f"The chest X-ray shows the right lung {SEG} and the left lung {SEG}." and [m.label for m in healthy.masks] == list(NAMES[:2])


def test_its_mirror_image_outlines_the_other_side(said):
    (image,) = said["x1"].images.values()
    twin = mirror(replace(said["x1"], images={image.id: Image(image.id, image.pixels, None, "xray", image.unit, {"view": "PA"})}))
    assert twin.answer.index("left lung") < twin.answer.index("right lung") and [m.label for m in twin.masks] == ["left lung", "right lung", "consolidation"]
    np.testing.assert_array_equal(twin.masks[0].array, said["x1"].masks[0].array[:, ::-1])


def test_each_mark_is_prompted_by_its_own_words(tok):
    turns = (Turn("user", "Segment the lungs."), Turn("assistant", ANSWER), Turn("user", "no"), Turn("assistant", f"{SEG}{SEG}"))
    batch = collate(tok, [encode(tok, Sample("a", images={"a": None}, turns=turns), {"a": 2})], [{"a": [("picture", 0)]}], {})
    first, second, third, fourth, fifth = (words(tok, batch.ids[0][w].tolist()) for w in batch.seg_words)
    assert first == "Segment the lungs.The chest X-ray shows the right lung" and second == ", the left lung" and third == "and the consolidation"
    assert fourth == fifth == "no"  # nothing was said between its marks; what follows the last mark of a turn belongs to none of the next


def test_targets_follow_the_marks_through_a_batch(model, tok, said):
    """Drawn out of order, and with a picture whose masks are other: each mark keeps its own outline."""
    cases = prepare(model, tok, [said["x1"], said["x0"]])
    assert [t.targets for c in cases for t in c.turns] == [[0, 1, 2], [0, 1]]
    batch = draw(cases, tok, [np.random.default_rng(k) for k in range(2)])
    assert batch.seg[:, 0].tolist() == [0, 0, 0, 1, 1] and batch.seg_image == [("picture", 0)] * 3 + [("picture", 1)] * 2
    assert batch.targets["label"].tolist() == [0, 1, 3, 0, 1] and batch.targets["present"].tolist() == [1.0] * 5
    for got, (case, k) in zip(batch.targets["mask"], [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        torch.testing.assert_close(got, cases[case].masks[k].float() / 255)


def test_a_sentence_teaches_as_its_marks_do_one_by_one(model, tok, said):
    """The mask loss of a sentence is that of its states and its outlines, taken one after the other."""
    batch = draw(prepare(model, tok, [said["x1"]]), tok, [np.random.default_rng(0)])
    with torch.no_grad():
        out = model(**batch.inputs())
        torch.manual_seed(0)
        losses = objectives.mask(model, batch, out)
        head, states = model.heads["mask"], model.seg_states(batch, out)
        embedding = head.embed(out.features["picture"])
        apart = []
        for k in range(3):
            one = head.decode(embedding, Prompts(torch.zeros(1, dtype=torch.long), tokens=states[k : k + 1], named=batch.targets["label"][k : k + 1]))
            apart.append(objectives.mask_loss(one.logits, one.quality, batch.targets["mask"][k : k + 1], torch.zeros(1, dtype=torch.bool)))
    torch.testing.assert_close(losses["mask"], torch.stack(apart).mean(), rtol=1e-4, atol=1e-5)
    assert (states[0] - states[1]).abs().max() > 0.01 and (states[1] - states[2]).abs().max() > 0.01


@pytest.mark.parametrize("turns, masks, count", [
    ((("user", "no"), ("assistant", f"yes {SEG} no {SEG}")), 1, "2 masks and has 1"),
    ((("user", "no"), ("assistant", f"yes {SEG}")), 0, "1 masks and has 0"),
    ((("user", "no"), ("assistant", SEG), ("user", "no"), ("assistant", SEG)), 1, "2 masks and has 1"),
])  # fmt: skip
def test_marks_and_outlines_must_agree(model, tok, turns, masks, count):
    picture = tiny.picture()
    areas = tuple(Mask(picture.id, "left lung", np.ones((70, 90), bool)) for _ in range(masks))
    sample = Sample("a", images={picture.id: picture}, turns=tuple(Turn(*t) for t in turns), masks=areas, meta={"row": "a"})
    with pytest.raises(MedVLMError, match=count) as e:
        prepare(model, tok, [sample])
    assert e.value.code == "BAD_DATASET"


def test_marks_of_several_turns_have_their_outlines(model, tok):
    picture = tiny.picture()
    areas = tuple(Mask(picture.id, n, np.ones((70, 90), bool)) for n in NAMES)
    turns = (Turn("user", "no"), Turn("assistant", SEG), Turn("user", "yes"), Turn("assistant", f"yes {SEG} no {SEG}"))
    (case,) = prepare(model, tok, [Sample("a", images={picture.id: picture}, turns=turns, masks=areas, meta={"row": "a"})])
    assert case.turns[0].targets == [0, 1, 2]
    assert draw([case], tok, [np.random.default_rng(0)]).targets["label"].tolist() == [0, 1, 3]


def test_what_an_answer_names_is_drawn_by_the_state_before_its_mark(tok):
    """Written with marks: the text comes without them, each region is that of its own mark, and one that is absent is left out."""
    model = tiny.model(tok)
    model.config.about["grounded"] = True
    reader, picture = NativeModel(model, tok), tiny.picture()
    reader._write = lambda images, asked, most, marks: ([ANSWER] * len(asked), [0.5] * len(asked)) if marks else None
    answer = reader.ask(picture, "What does it show?")
    assert answer.text == "The chest X-ray shows the right lung, the left lung and the consolidation."
    drawn_ = reader._drawn({picture.id: picture}, [(*_turns("What does it show?"), Turn("assistant", ANSWER))], NAMES)
    assert [r.label for r in answer.regions] == [s.label for s in drawn_ if s.mask.any()] and len({s.present for s in drawn_}) == 3
    for region, found in zip(answer.regions, (s for s in drawn_ if s.mask.any())):
        np.testing.assert_array_equal(region.mask, found.mask)
    (prediction,) = reader.predict([Sample("q", images={picture.id: picture}, turns=(Turn("user", "What does it show?"),))])
    assert prediction.error is None and prediction.text == answer.text and len(prediction.regions) == len(answer.regions)


@pytest.mark.parametrize("taught", [True, False])
def test_only_a_model_that_was_taught_to_writes_marks(tok, taught):
    """A language model that would write nothing but <|seg|>."""
    model = tiny.model(tok)
    with torch.no_grad():
        head = torch.nn.Linear(32, len(tok))
        head.weight.zero_()
        head.bias.zero_()
        head.bias[tok.convert_tokens_to_ids(SEG)] = 9.0
        head.bias[tok.convert_tokens_to_ids("<|end|>")] = 5.0
    model.lm.set_output_embeddings(head)
    model.config.about["grounded"] = taught
    reader, picture = NativeModel(model, tok), tiny.picture()
    (text,), _ = reader._write({picture.id: picture}, [_turns("What does it show?")], 4, marks=taught)
    assert text == (SEG * 4 if taught else "")


@pytest.fixture(scope="module")
def published(tmp_path_factory, tok):
    """A pyramid, a plain transformer and a language model of random weights, as timm and transformers save them."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    for name in ("test_byobnet", "test_vit3"):
        torch.save(timm.create_model(name, in_chans=3).state_dict(), folder / f"{name}.pth")
    hf.Qwen2ForCausalLM(hf.Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                                       vocab_size=len(tok), max_position_embeddings=256, tie_word_embeddings=True)).save_pretrained(folder / "lm")  # fmt: skip
    tok.save_pretrained(folder / "lm")
    return folder


def test_the_paper_scale_takes_a_step_with_an_encoder_for_words_and_one_for_outlines(published, tmp_path):
    paper = RECIPE.at("paper")
    (stage,) = paper.stages
    assert (stage.objective, stage.lr, stage.batch, stage.epochs, stage.lora) == ("lm+mask", 4e-5, 128, 10, {"lm.*_proj": 128})
    small = [f"args.weights={published / 'test_byobnet.pth'}", f"args.look_weights={published / 'test_vit3.pth'}", f"args.lm={published / 'lm'}", "args.backbone=test_byobnet",
             "args.look=test_vit3", "args.size=64", "args.look_size=64", "args.dim=32", 'args.mask={"dim": 32, "stride": 16, "heads": 4}',
             *(f"stages.joint.{k}" for k in ('data={"drawn": 1}', "steps=1", "batch=4", "chunk=2", "warmup=0", "lr=0.01"))]  # fmt: skip
    recipe = override(paper, small)
    train(recipe, drawn.write(tmp_path / "data", 6), tmp_path / "run", device="cpu", precision="no")
    reader = load_model(tmp_path / "run", "cpu")
    torch.manual_seed(0)
    began, ended = MedVLM(recipe.model(reader.tokenizer, **recipe.args)).state_dict(), reader.vlm.state_dict()
    moved = {k.split(".")[0] + (".adapted" if k.endswith("_proj.weight") and k.startswith("lm") else "") for k in began
             if began[k].is_floating_point() and "running" not in k and (began[k] - ended[k].to(began[k].dtype)).abs().max() > 2e-3}  # fmt: skip
    assert {"projectors", "heads", "lm.adapted"} <= moved and "encoders" not in moved
    assert list(reader.vlm.encoders) == ["outlines", "picture"] and reader.vlm.tokens("xray") == reader.vlm.count("picture") == 4 and reader.vlm.count("outlines") == 0
    picture = tiny.picture()
    assert reader.segment(picture, "left lung").mask.shape == (70, 90) and reader.ask(picture, "Is there consolidation?").text in ("yes", "no")
    seen = []
    reader.vlm.encoders["outlines"].register_forward_hook(lambda *_: seen.append("outlines"))
    reader.vlm.projectors["picture"].register_forward_hook(lambda *_: seen.append("words"))
    reader.segment(tiny.picture(seed=1), "left lung")
    assert seen == ["outlines", "words"]


def test_published_parts_have_the_shapes_that_the_paper_scale_counts_on():
    args = RECIPE.at("paper").args
    with torch.device("meta"):
        pyramid = timm.create_model(args["backbone"], features_only=True).feature_info
        look = timm.create_model(args["look"])
    assert pyramid.reduction() == [4, 8, 16, 32] and pyramid.channels() == [144, 288, 576, 1152]
    assert look.num_features == 1024 and look.patch_embed.patch_size == (14, 14)


def test_the_recipe_says_what_is_not_there():
    picture = Image("path-1", np.zeros((1, 40, 40), np.uint8), None, "pathology", "uint8", {})
    cells = np.zeros((40, 40), bool)
    cells[3:9, 3:9] = True
    base = Sample("p", None, {"path-1": picture}, meta={"row": "p", "split": "train"})
    told = list(RECIPE.samples([base, replace(base, masks=(Mask("path-1", "nucleus", cells),))], "path_dsb_nuclei", "train"))
    drawn_ = {s.masks[0].label: bool(s.masks[0].array.any()) for s in told if s.meta["kind"] == "segment"}
    assert drawn_.pop("nuclei") and len(drawn_) == 6 and not any(drawn_.values())
    assert [s.answer for s in told if s.meta["kind"] == "grounded"] == [f"The microscopy image shows the nuclei {SEG}."]
    assert not list(RECIPE.samples([base], "path_dsb_nuclei/outlined", "train")) and list(RECIPE.samples([base], "path_dsb_nuclei", "train"))
