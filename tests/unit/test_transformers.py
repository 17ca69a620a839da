"""MedVLM as a transformers model: Auto classes, processor, generate, checkpointing, half precision, LoRA."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from medvlm.errors import MedVLMError
from medvlm.language import IMAGE
from medvlm.vlm import MedVLM


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("auto"), tiny.tokenizer()
    model = tiny.model(tokenizer)
    model.save_pretrained(folder)
    model.processor(tokenizer).save_pretrained(folder)
    return folder, model, tokenizer


@pytest.fixture
def inputs(saved):
    _, model, tokenizer = saved
    processor = model.processor(tokenizer)

    def make(*texts, seeds=(0,), **more):
        talk = [[{"role": "user", "content": [*({"type": "image"} for _ in range(t.count("#"))), {"type": "text", "text": t.replace("#", "")}]}] for t in texts]
        prompts = processor.apply_chat_template(talk, add_generation_prompt=True)
        return processor(images=[tiny.picture(f"p{s}", seed=s) for s in seeds], text=prompts, **more)

    return make


@torch.no_grad()
def test_auto_classes_find_it(saved, inputs):
    folder, model, _ = saved
    assert AutoConfig.from_pretrained(folder).model_type == "medvlm"
    again, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert type(again) is MedVLM and processor.specs["picture"]["count"] == model.count("picture")
    given = inputs("# no")
    theirs = processor(images=tiny.picture("p0"), text=processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " no"}]}], add_generation_prompt=True))
    assert torch.equal(given["input_ids"], theirs["input_ids"]) and torch.equal(given["pixel_values"]["picture"], theirs["pixel_values"]["picture"])
    assert torch.equal(model(**given).logits, again(**theirs).logits)


def test_plain_import_stays_light():
    code = "import sys, medvlm; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@torch.no_grad()
def test_the_processor_takes_what_people_hold(saved, inputs, tmp_path):
    from PIL import Image as Pillow

    _, model, tokenizer = saved
    processor, picture = model.processor(tokenizer), tiny.picture()
    grey = picture.pixels[0]
    Pillow.fromarray(grey).save(tmp_path / "a.png")
    ways = [grey, Pillow.fromarray(grey), str(tmp_path / "a.png"), [picture], [[picture]]]
    pixels = [processor(images=w, text=IMAGE, modality="xray")["pixel_values"]["picture"] for w in ways]
    assert all(torch.equal(p, pixels[0]) for p in pixels[1:])
    for images, text in ((None, IMAGE), (grey, "no"), ([grey, grey], IMAGE)):
        with pytest.raises(MedVLMError) as e:
            processor(images=images, text=text)
        assert e.value.code == "PLACEHOLDERS"


@torch.no_grad()
def test_a_batch_writes_what_each_prompt_writes_alone_also_with_beams(saved, inputs):
    _, model, tokenizer = saved
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    texts, seeds = ("# no", "## Is this a PA or AP film?", "# yes no yes"), (0, 1, 2, 3)
    for beams in (1, 3):
        together = model.generate(**inputs(*texts, seeds=seeds), num_beams=beams, **options)
        for row, text, own in zip(together, texts, ((0,), (1, 2), (3,))):
            alone = model.generate(**inputs(text, seeds=own), num_beams=beams, **options)[0]
            assert tokenizer.decode(row, skip_special_tokens=True) == tokenizer.decode(alone, skip_special_tokens=True)
    with pytest.raises(MedVLMError) as e:
        model.generate(**inputs(*texts, seeds=seeds, padding_side="right"), **options)
    assert e.value.code == "BAD_ARGUMENT"


def test_the_loss_is_that_of_the_answers_alone(saved, inputs):
    _, model, _ = saved
    given = inputs("# no")
    labels = given["input_ids"].clone()
    labels[:, :-3] = -100
    out = model(**given, labels=labels)
    by_hand = -out.logits[0, -4:-1].log_softmax(-1).gather(1, labels[0, -3:, None]).mean()
    assert float(out.loss) == pytest.approx(float(by_hand), abs=1e-6)
    kept = model(**given, labels=labels, logits_to_keep=torch.tensor([0, *range(labels.shape[1] - 4, labels.shape[1] - 1)]))
    assert float(kept.loss) == pytest.approx(float(by_hand), abs=1e-6) and kept.logits.shape[1] == 4


def test_gradient_checkpointing_changes_no_gradient(saved, inputs):
    folder, _, _ = saved
    grads = []
    for checkpointing in (False, True):
        model = MedVLM.from_pretrained(folder)
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.lm.modules())
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout | torch.nn.BatchNorm2d):
                module.eval()
        given = inputs("# no")
        model(**given, labels=given["input_ids"]).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any(n.startswith("encoders") for n in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("place", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps(saved, inputs, place):
    folder, model, _ = saved
    again = MedVLM.from_pretrained(folder, device_map=place).eval()
    given = inputs("# no")
    torch.testing.assert_close(again(**given).logits.cpu(), model(**given).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bfloat16(saved, inputs):
    folder, model, tokenizer = saved
    half = MedVLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    given = inputs("# no")
    out = half(**given)
    assert out.logits.dtype == torch.bfloat16
    full = model(**given).logits
    assert float((out.logits.float() - full).abs().max()) < 0.1 * float(full.abs().max())
    assert half.generate(**given, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.pad_token_id).shape[1] <= 3


@torch.no_grad()
def test_attention_kernels_agree(saved, inputs):
    folder, model, _ = saved
    given = inputs("## no", seeds=(0, 1))
    eager = MedVLM.from_pretrained(folder).eval()
    eager.lm.set_attn_implementation("eager")
    assert model.lm.config._attn_implementation == "sdpa"
    torch.testing.assert_close(eager(**given).logits, model(**given).logits, rtol=0, atol=1e-5)


def test_lora_trains_few_weights_and_merges(saved, inputs):
    from peft import LoraConfig, get_peft_model

    folder, model, _ = saved
    tuned = get_peft_model(MedVLM.from_pretrained(folder), LoraConfig(r=2, target_modules=r"lm\..*\.(q_proj|v_proj)", init_lora_weights=False))
    assert {n.split(".")[-2] for n, p in tuned.named_parameters() if p.requires_grad} == {"default"}
    given = inputs("# no")
    loss = tuned(**given, labels=given["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters() if p.requires_grad)
    tuned.eval()
    with torch.no_grad():
        before = tuned(**given).logits
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(**given).logits, before, rtol=0, atol=1e-4)
        assert float((before - model(**given).logits).abs().max()) > 1e-3


def test_a_language_model_from_a_folder_then_from_the_checkpoint_alone(tmp_path):
    """Weights named in a recipe are read when the model is made, and never again."""
    from transformers import AutoModelForCausalLM

    tokenizer = tiny.tokenizer()
    config = tiny.config(tokenizer)
    given = config.parts["language"]["lm"]["args"]
    made = AutoConfig.for_model(**{**given, "vocab_size": 300})
    base = AutoModelForCausalLM.from_config(made)
    base.save_pretrained(tmp_path / "base")
    config.parts["language"]["lm"]["args"] = {"weights": str(tmp_path / "base"), "vocab_size": len(tokenizer)}
    model = MedVLM(config)
    assert torch.equal(model.lm.get_input_embeddings().weight[:300], base.get_input_embeddings().weight) and model.lm.config.vocab_size == len(tokenizer)
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "weights" not in json.dumps(written["parts"])
    again = MedVLM.from_pretrained(tmp_path / "saved")
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys() and [n for n in saved if not torch.equal(saved[n], loaded[n])] == []
    written["parts"]["language"]["lm"]["args"]["weights"] = str(tmp_path / "base")
    (tmp_path / "saved" / "config.json").write_text(json.dumps(written))
    with pytest.raises(MedVLMError) as e:
        MedVLM.from_pretrained(tmp_path / "saved")
    assert e.value.code == "BAD_CHECKPOINT" and "language.lm" in e.value.message


