"""The whole model: saving and loading, batches, gradients, and folders that lie."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from medvlm.errors import MedVLMError
from medvlm.language import SEG, collate, encode
from medvlm.predictors import load
from medvlm.preprocess import to_tensor
from medvlm.sample import Sample, Turn
from medvlm.train import objectives
from medvlm.vlm import MedVLM, MedVLMConfig, build_part


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def model(tok):
    return tiny.model(tok)


def batch(model, tok, conversations, left=False, answer=True, seed=0):
    """Each conversation about a picture of its own."""
    pictures = [tiny.picture(seed=seed + i) for i in range(len(conversations))]
    images = torch.stack([to_tensor(p, model.encoders["picture"].spec)[0] for p in pictures])
    rows = [encode(tok, Sample("s", turns=tuple(Turn(*t) for t in turns)), {"a": model.count("picture")}, answer) for turns in conversations]
    return collate(tok, rows, [{"a": [("picture", i)]} for i in range(len(rows))], {"picture": images}, left)


def asked(question, answer="yes"):
    return (("user", question), ("assistant", answer))


@torch.no_grad()
def test_what_is_saved_answers_the_same(model, tok, tmp_path):
    """Outputs and every buffer: transformers builds on the meta device and leaves unsaved buffers as they lay in memory."""
    model.save_pretrained(tmp_path)
    again = MedVLM.from_pretrained(tmp_path).eval()
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert [n for n in saved if saved[n].dtype != loaded[n].dtype or not torch.equal(saved[n], loaded[n])] == []
    given = batch(model, tok, [asked("no"), asked("Segment the left lung.", SEG)])
    ours, theirs = model(**given.inputs()), again(**given.inputs())
    assert torch.equal(ours.logits, theirs.logits)
    for a, b in zip(model.masks(given, ours), again.masks(given, theirs)):
        assert torch.equal(a, b)
    head = model.heads["classify"]
    assert torch.equal(head(ours.features["picture"]), again.heads["classify"](theirs.features["picture"]))
    buffers = dict(again.named_buffers())
    assert any("inv_freq" in n for n in buffers) and all(b.isfinite().all() for b in buffers.values())


@torch.no_grad()
def test_half_precision_files_keep_full_precision_buffers(model, tok, tmp_path):
    from medvlm.train.loop import save_model

    save_model(model, tok, tmp_path)
    assert next(model.parameters()).dtype == torch.float32  # the one in hand stays as it is
    saved = load_file(tmp_path / "model.safetensors")
    buffers = dict(model.named_buffers())
    assert all(saved[n].dtype == b.dtype and torch.equal(saved[n], b) for n, b in buffers.items() if n in saved)
    assert {saved[n].dtype for n, _ in model.named_parameters() if n in saved} == {torch.float16}


@torch.no_grad()
def test_alone_or_in_a_batch(model, tok):
    conversations = [asked("no"), asked("Is there consolidation in this chest X-ray?", "no"), asked("Segment the right lung.", SEG)]
    for left in (False, True):
        together = batch(model, tok, conversations, left)
        out = model(**together.inputs())
        for i, conversation in enumerate(conversations):
            one = batch(model, tok, [conversation], seed=i)
            alone = model(**one.inputs()).logits[0]
            row = out.logits[i][together.attention[i].bool()]
            torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)
            if conversation[1][1] == SEG:
                for a, b in zip(model.masks(together, out), model.masks(one, model(**one.inputs()))):
                    torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_written_alone_or_in_a_batch(model, tok):
    questions = [asked("no"), asked("Describe: consolidation, present, right"), asked("Is this a PA or AP film?")]
    together = model.generate(**batch(model, tok, questions, left=True, answer=False).inputs(), max_new_tokens=12, pad_token_id=tok.pad_token_id)
    for i, question in enumerate(questions):
        alone = model.generate(**batch(model, tok, [question], left=True, answer=False, seed=i).inputs(), max_new_tokens=12, pad_token_id=tok.pad_token_id)[0]
        assert tok.decode(together[i], skip_special_tokens=True) == tok.decode(alone, skip_special_tokens=True)


def test_text_and_images_must_agree(model, tok):
    for change in (lambda b: b.order.pop(), lambda b: b.order.append(("picture", 0)), lambda b: b.ids.__setitem__((0, 1), 9)):
        given = batch(model, tok, [asked("no"), asked("yes")])
        change(given)
        with pytest.raises(MedVLMError) as e:
            model(**given.inputs())
        assert e.value.code == "PLACEHOLDERS" and any(c.isdigit() for c in e.value.message)


def test_rows_may_share_an_image(model, tok):
    given = batch(model, tok, [asked("no"), asked("no", "no")])
    given.order = [("picture", 1), ("picture", 1)]
    with torch.no_grad():
        out = model(**given.inputs()).logits[:, : given.ids.shape[1] - 3]
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(out[1], model(**batch(model, tok, [asked("no", "no")], seed=1).inputs()).logits[0, : out.shape[1]], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_mask_is_prompted_by_the_state_that_predicts_it_and_the_words_that_ask(model, tok):
    given = batch(model, tok, [asked("yes", "no"), asked("no yes", SEG)])
    out = model(**given.inputs())
    ((row, column),) = given.seg.tolist()
    states = model.seg_states(given, out)
    words = tok("no yes", add_special_tokens=False)["input_ids"]
    assert row == 1 and states.shape == (1, 2, 32) and given.ids[row][given.seg_words[0]].tolist() == words
    torch.testing.assert_close(states[0, 0], out.hidden[row, column - 1])
    torch.testing.assert_close(states[0, 1], model.lm.get_input_embeddings()(torch.tensor(words)).mean(0))


def test_every_parameter_learns(tok):
    model = tiny.model(tok).train()
    for module in model.modules():  # timm starts each residual branch at zero, which hides what lies behind it for one step
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    given = batch(model, tok, [asked("yes"), asked("Segment the left lung.", SEG), asked("Segment the right lung.", SEG), asked("Segment the consolidation.", SEG)])
    target = torch.zeros(3, tiny.SIZE, tiny.SIZE)
    target[0, 10:40, 10:30] = target[1, 20:50, 30:60] = 1
    given.targets = {"mask": target, "weak": torch.tensor([False, False, False]), "present": torch.tensor([1.0, 1.0, 0.0]),
                     "label": torch.tensor([1, 0, 3]), "labels": torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]] * 4)}  # fmt: skip
    out = model(**given.inputs())
    losses = {k: v for objective in objectives.find("lm+mask+classify").values() for k, v in objective(model, given, out).items()}
    assert set(losses) == {"lm", "mask", "present", "dense", "prompted", "modality", "labels"}
    sum(losses.values()).backward()
    # the decoder draws one mask a prompt: what serves SAM's other three is kept for its weights alone; so are rough masks,
    # and points of the background or of padding
    unused = ("hypernetworks_mlps.1", "hypernetworks_mlps.2", "hypernetworks_mlps.3", "mask_downscaling", "point_embeddings.0")
    still = [n for n, p in model.named_parameters() if (p.grad is None or not p.grad.abs().sum() > 0) and not any(u in n for u in unused)]
    assert still == []


@pytest.mark.parametrize("name", ["nothing", "os", "../../evil", "medvlm.encoders.image", "/tmp/evil", "image.py", "", "base", "__init__"])
def test_parts_are_found_by_name_in_our_folders_alone(name):
    before = set(sys.modules)
    with pytest.raises(MedVLMError) as e:
        build_part("encoders", name)
    assert e.value.code == "NO_SUCH_PART" and "image" in e.value.message
    assert {m for m in set(sys.modules) - before if "evil" in m or m == name} == set()


def test_wrong_arguments_name_the_part():
    with pytest.raises(MedVLMError) as e:
        build_part("projectors", "mlp", {"dim": 4, "lm_dim": 4, "depth": 7})
    assert e.value.code == "BAD_RECIPE" and "mlp" in e.value.message and "depth" in e.value.message


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def changed(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder) -> MedVLMError:
    with pytest.raises(MedVLMError) as e:
        load(folder, "cpu")
    assert "\n" not in str(e.value)
    return e.value


@pytest.mark.parametrize("file", ["evil", "../evil", "os", "medvlm.vlm"])
def test_a_checkpoint_cannot_name_code(folder, file):
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    changed(folder, lambda c: c["parts"]["encoders"]["picture"].update(file=file))
    assert refused(folder).code == "NO_SUCH_PART"


def test_a_checkpoint_cannot_bring_code(folder, tiny_folder):
    """auto_map and trust_remote_code are not followed: the model loads and none of its Python files runs."""
    mark = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Model: pass\nclass Config: pass\nclass Tok: pass")
    changed(folder, lambda c: c.update(auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}, trust_remote_code=True, custom_generate="evil"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}}))
    assert load(folder, "cpu").ask(tiny.picture(), "no").text is not None
    assert not mark.exists() and "evil" not in sys.modules


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation"])
def test_the_language_model_of_a_checkpoint_runs_no_code(folder, key):
    changed(folder, lambda c: c["parts"]["language"]["lm"]["args"].update({key: "someone/kernel"}))
    assert refused(folder).code == "BAD_CHECKPOINT"


class Bomb:
    def __reduce__(self):
        return (print, ("it ran",))


def test_a_pickle_under_another_name_is_refused(folder, capsys):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert refused(folder).code == "BAD_CHECKPOINT"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert refused(folder).code == "BAD_CHECKPOINT"
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize("part", ["encoders", "projectors", "heads.mask", "heads.classify.scale", "lm"])
@pytest.mark.parametrize("change", ["missing", "extra", "shape", "truncated", "empty"])
def test_weights_must_be_exactly_those_of_the_model(folder, change, part):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.startswith(part) and weights[n].ndim >= 1)
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights["another.weight"] = torch.zeros(2)
    else:
        weights[name] = weights[name][:-1].clone()
    if change in ("truncated", "empty"):
        path.write_bytes(path.read_bytes()[: 20_000 if change == "truncated" else 0])
    else:
        save_file(weights, path, {"format": "pt"})
    error = refused(folder)
    assert error.code == "BAD_CHECKPOINT"
    if change in ("missing", "extra"):
        assert (name if change == "missing" else "another.weight") in error.message


@pytest.mark.parametrize("break_it", [
    lambda f: (f / "config.json").write_text("{"), lambda f: (f / "config.json").write_text("[]"),
    lambda f: (f / "tokenizer.json").write_text("{}"), lambda f: (f / "tokenizer.json").unlink(),
    lambda f: changed(f, lambda c: c.update(parts=[])), lambda f: changed(f, lambda c: c["parts"].update(encoders={"picture": "image"})),
    lambda f: changed(f, lambda c: c["parts"].pop("language")), lambda f: changed(f, lambda c: c["parts"]["language"]["lm"]["args"].update(vocab_size=99)),
    lambda f: changed(f, lambda c: c["parts"]["language"]["lm"]["args"].update(model_type="nothing-like-it")),
])  # fmt: skip
def test_a_broken_folder_is_a_named_error(folder, break_it):
    break_it(folder)
    assert refused(folder).code in ("BAD_CHECKPOINT", "BAD_RECIPE")


def test_loading_says_nothing(tiny_folder):
    code = f"from medvlm.predictors import load; load({str(tiny_folder)!r}, 'cpu')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_device_that_is_not_there_is_a_named_error(tiny_folder):
    for device in ("cuda:99", "abacus"):
        with pytest.raises(MedVLMError) as e:
            load(tiny_folder, device)
        assert e.value.code == "BAD_ARGUMENT" and device in e.value.message


def test_a_model_of_text_alone_needs_no_image_token():
    tokenizer = tiny.tokenizer()
    parts = {"language": tiny.config(tokenizer).parts["language"]}
    model = MedVLM(MedVLMConfig(parts)).eval()
    ids = torch.tensor([tokenizer("Is there consolidation?")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model.lm(ids).logits)
