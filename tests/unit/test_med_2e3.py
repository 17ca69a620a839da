"""Med-2E3: the paper's scale builds from published files and trains what it says; the question alone guides what is seen."""

import json

import foreign
import pytest
import torch
import transformers as hf

from medvlm.datasets import shapes
from medvlm.datasets.base import open_data
from medvlm.language import collate, encode
from medvlm.predictors.native import NativeModel
from medvlm.recipes.base import load, override
from medvlm.sample import Sample, Turn
from medvlm.train.loop import train
from medvlm.vlm import MedVLM

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    shapes.write(root / "volumes", 12, rank=3, size=(12, 48, 48))
    return root


@pytest.fixture(scope="module")
def reader(data):
    recipe = load("med_2e3")
    groups = list(open_data(data, "volumes").groups("train"))
    tokenizer = recipe.tokenizer((t.text for g in groups for s in recipe.samples(g, "volumes", "train") for t in s.turns), recipe.args)
    torch.manual_seed(0)
    return NativeModel(MedVLM(recipe.model(tokenizer, dim=32, layers=2)).eval(), tokenizer), groups[0][0].images


def published(folder):
    """A 3-D ViT as M3D-CLIP's file holds it, and SigLIP and Phi-3 as transformers saves them, with random weights."""
    from monai.networks import nets

    net = nets.ViT(1, (8, 32, 32), (4, 16, 16), 24, 32, 2, 2, proj_type="perceptron", classification=True)
    torch.save({k: v for k, v in net.state_dict().items() if "cross_attn" not in k and "classification_head" not in k}, folder / "vit.bin")
    seeing = hf.SiglipVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
    reading = hf.SiglipTextConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    hf.SiglipModel(hf.SiglipConfig(text_config=reading.to_dict(), vision_config=seeing.to_dict())).save_pretrained(folder / "siglip")
    hf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "siglip")
    words = foreign.tokenizer("<s>", bos_token="<s>")
    words.chat_template = (  # of Phi-3's shape: contents are texts
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    hf.Phi3ForCausalLM(hf.Phi3Config(**foreign.text(words, bos_token_id=words.bos_token_id))).save_pretrained(folder / "phi")
    words.save_pretrained(folder / "phi")


def test_the_paper_s_scale_trains_projectors_and_then_all_but_the_3d_encoder(data, tmp_path):
    published(tmp_path)
    paper = load("med_2e3").at("paper")
    volume = paper.args["volume"] | {"size": [8, 32, 32], "weights": str(tmp_path / "vit.bin")}
    volume["model"] = volume["model"] | {"hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 2}
    slices = paper.args["slices"] | {"size": [8, 32, 32], "chunk": 3, "weights": str(tmp_path / "siglip")}
    small = [f"stages.{s}.{what}" for s in ("align", "tune") for what in ("steps=1", "batch=2", "chunk=1", "lr=0.01", "warmup=0")]
    parts = [f"args.volume={json.dumps(volume)}", f"args.slices={json.dumps(slices)}", f"args.lm={tmp_path / 'phi'}"]
    recipe = override(paper, [*parts, "args.seen=[24, 32]", "args.dim=32", *small])

    def learned(out, stages):
        train(override(recipe, [f"stages.{s}.steps=0" for s in stages]), data, out, device="cpu", precision="no")
        model = MedVLM.from_pretrained(out / "model")
        return {k: v.clone() for k, v in model.state_dict().items()}

    before, aligned, tuned = (learned(tmp_path / n, s) for n, s in (("0", ("align", "tune")), ("1", ("tune",)), ("2", ())))
    moved = [{".".join(k.split(".")[:2]) for k in a if not torch.equal(a[k], b[k])} for a, b in ((before, aligned), (aligned, tuned))]
    assert moved[0] == {"projectors.volume", "projectors.slices"}
    assert moved[1] == {"projectors.volume", "projectors.slices", "encoders.slices", "lm.model", "lm.lm_head"}
    name = "patch_embedding.patch_embeddings.1.weight"
    assert torch.allclose(before[f"encoders.volume.net.{name}"].float(), torch.load(tmp_path / "vit.bin")[name], atol=1e-3)


@torch.no_grad()
def test_an_answer_is_scored_with_the_slices_that_its_question_chose(reader):
    model, images = reader
    asked = "Is there a ring in the lower third?"
    counts = {key: model.vlm.tokens(x.modality) for key, x in images.items()}
    features, places = model._features(images)
    learnt = []
    for answer in ("yes", "no"):
        row = encode(model.tokenizer, Sample("q", images=images, turns=(Turn("user", asked), Turn("assistant", answer))), counts)
        batch = collate(model.tokenizer, [row], [places], {})
        out = model.vlm(**batch.inputs(), features=features, labels=batch.labels)  # as in training
        learnt.append(-out.loss * (batch.labels >= 0).sum())
    scored = model._likelihood(images, [(Turn("user", asked), Turn("assistant", a)) for a in ("yes", "no")])
    assert torch.allclose(scored, torch.stack(learnt), atol=1e-4)


@torch.no_grad()
def test_questions_in_one_batch_weigh_slices_each_for_itself(reader):
    model, images = reader
    counts = {key: model.vlm.tokens(x.modality) for key, x in images.items()}
    features, places = model._features(images)
    rows = [encode(model.tokenizer, Sample("q", images=images, turns=(Turn("user", q),)), counts, answer=False)
            for q in ("Is there a ring?", "Where is the large disc?", "How many objects are there?")]  # fmt: skip
    together = collate(model.tokenizer, rows, [places] * 3, {})
    spliced = model.vlm._embeds(together.ids, together.attention, features, together.order, None)
    seen = together.ids == model.vlm.config.image_token_id
    for k, row in enumerate(rows):
        alone = collate(model.tokenizer, [row], [places], {})
        one = model.vlm._embeds(alone.ids, alone.attention, features, alone.order, None)
        assert torch.allclose(one[0][alone.ids[0] == model.vlm.config.image_token_id], spliced[k][seen[k]], atol=1e-6)
    first, second = spliced[0][seen[0]], spliced[1][seen[1]]
    count = model.vlm.count("volume")
    assert torch.equal(first[:count], second[:count])  # the 3-D tokens come first and are anybody's
    assert (first[count:] - second[count:]).abs().max() > 1e-5


def test_a_model_without_findings_writes_its_report_in_its_own_words(reader, monkeypatch):
    model, images = reader
    asked = []

    def write(seen, conversations, most=48):
        asked.append((conversations[0][0].text, most))
        return ["FINDINGS: A ring. No disc. IMPRESSION: A ring."], [1.0]

    monkeypatch.setattr(model, "_write", write)
    report = model.report(next(iter(images.values())))
    assert asked == [("Write the report of this CT scan.", 256)]
    assert [s.text for s in report.sentences][:2] == ["A ring.", "No disc."] and not report.looked_for and report.out_of_scope is None
