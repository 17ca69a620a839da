"""The training loop on a small made-up data set: it learns, stops, goes on and refuses."""

import json
import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import drawn
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from medvlm.datasets import manifest
from medvlm.datasets.base import open_data
from medvlm.encoders.base import Features
from medvlm.errors import MedVLMError
from medvlm.heads.classify import ClassifyHead
from medvlm.language import SEG, Batch
from medvlm.predictors import load as load_model
from medvlm.preprocess import to_tensor
from medvlm.recipes.base import load, override
from medvlm.sample import Mask, Sample, Turn
from medvlm.train import checkpoint, loop, objectives
from medvlm.train.data import draw, prepare
from medvlm.train.loop import train
from medvlm.train.optim import schedule
from medvlm.vlm import MedVLM, Output

RECIPE = drawn.RECIPE


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return drawn.write(tmp_path_factory.mktemp("data"))


def cases_of(model, tokenizer, root, split="train"):
    groups = open_data(root, "drawn").groups(split)
    return [c for g in groups for c in prepare(model, tokenizer, list(drawn.samples(g, "drawn", split)))]


def lots(*seed, count=8):
    return [np.random.default_rng([*seed, k]) for k in range(count)]


def run(root, out, recipe=RECIPE, **more):
    return train(recipe, root, out, device="cpu", precision="no", **more)


def weights(out):
    return load_file(out / "checkpoints/last/model.safetensors")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """One run without a stop."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(root, out)
    return out


def test_a_run_leaves_a_model_and_says_what_it_did(root, whole):
    record = json.loads((whole / "recipe.json").read_text())
    assert record["name"] == "drawn" and [s["name"] for s in record["stages"]] == ["see", "speak"] and record["seed"] == 0
    assert record["data"]["drawn"]["images"] == 8 and record["data"]["drawn"]["val"] == 2 and len(record["data"]["drawn"]["sha256"]) == 64
    assert record["versions"]["torch"] and record["tasks"] == [] and record["processes"] == 1
    assert (whole / "curves.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [(x["stage"], x["split"], x["step"]) for x in lines] == [("see", "train", 4), ("see", "val", 4), ("speak", "train", 2), ("speak", "val", 2)]
    assert all(math.isfinite(v) for x in lines for v in x.values() if isinstance(v, float))
    reader = load_model(whole, "cpu")  # a run's folder is a model
    (row,) = [r for r in manifest.rows(root / "drawn") if r["id"] == "x8"]
    found = reader.segment(manifest.open_images(row)[0], "left lung")
    assert found.mask.shape == (56, 64)


def test_only_what_a_stage_names_learns(whole, root, tmp_path):
    one = replace(RECIPE, stages=(replace(RECIPE.stages[1], train=("heads.mask.speak.*", "projectors.picture.layers.1.*"), objective="lm+mask"),))
    run(root, tmp_path / "one", one)
    torch.manual_seed(0)
    before = {k: v.clone() for k, v in MedVLM(drawn.config(tiny.tokenizer())).state_dict().items()}
    after = weights(tmp_path / "one")
    moved = {n for n, p in before.items() if not torch.equal(p, after[n])}  # and no running statistics
    assert moved and all(n.startswith(("heads.mask.speak.", "projectors.picture.layers.1.")) for n in moved)
    assert {n.split(".")[0] for n in moved} == {"heads", "projectors"}


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(root, whole, tmp_path, stop):
    """SIGTERM in the middle of the first stage, at its end, and in the second: bit for bit the same weights."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), drawn.stopped_at(stop):
        run(root, tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is before and not (tmp_path / "run/model").exists()
    run(root, tmp_path / "run", resume=True)
    ours, theirs = weights(tmp_path / "run"), weights(whole)
    assert ours.keys() == theirs.keys() and [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_a_run_is_never_overwritten(root, whole):
    before = (whole / "model/model.safetensors").read_bytes()
    with pytest.raises(MedVLMError) as e:
        run(root, whole)
    assert e.value.code == "OUTPUT_EXISTS" and "--resume" in e.value.hint and (whole / "model/model.safetensors").read_bytes() == before


def test_a_finished_run_resumes_with_its_weights(root, whole, tmp_path):
    again = shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(again / "model")
    run(root, again, resume=True)
    assert (again / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_data_that_is_not_there_is_an_error(root, tmp_path):
    with pytest.raises(MedVLMError) as e:
        run(root, tmp_path / "a", replace(RECIPE, stages=(replace(RECIPE.stages[0], train=("nothing.*",)),)))
    assert e.value.code == "BAD_RECIPE" and "nothing.*" in e.value.message
    with pytest.raises(MedVLMError) as e:
        run(tmp_path / "nowhere", tmp_path / "b")
    assert e.value.code == "NO_SUCH_DATA"
    with pytest.raises(MedVLMError) as e:
        objectives.find("lm+masks")
    assert e.value.code == "BAD_RECIPE" and "'masks'" in e.value.message


def test_the_loss_falls(root):
    """On two pictures, twenty-five steps: answers, outlines and findings are all learnt."""
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer).train()
    cases = cases_of(model, tokenizer, root)[:2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = []
    for _ in range(25):
        batch = draw(cases, tokenizer, lots(0), 6)
        out = model(**batch.inputs())
        losses = {k: v for o in objectives.find("lm+mask+classify").values() for k, v in o(model, batch, out).items()}
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append({k: float(v.detach()) for k, v in losses.items()})
    assert seen[-1]["lm"] < 0.6 * seen[0]["lm"] and seen[-1]["mask"] < 0.8 * seen[0]["mask"] and seen[-1]["labels"] < 0.5 * seen[0]["labels"]


def test_cases_hold_each_picture_once_with_what_is_known_of_it(root):
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer)
    cases = cases_of(model, tokenizer, root)
    assert len(cases) == 8 and [c.source for c in cases] == [f"x{i}" for i in range(8)]
    healthy, sick = cases[:2]
    names = [*tiny.FINDINGS, *tiny.KINDS]
    assert healthy.labels[names.index("consolidation")] == 0 and sick.labels[names.index("consolidation")] == 1
    assert math.isnan(sick.labels[names.index("cardiomegaly")]) and sick.labels[names.index("modality:xray")] == 1
    for turn in sick.turns:
        assert len(turn.targets) == (turn.kind == "segment")
    order = [tiny.TARGETS[n] for n in sick.names]
    assert order == ["right lung", "left lung", "consolidation"] and sick.present == [True] * 3 and healthy.present[-1] is False
    columns = sick.masks[0].float().sum(0)
    assert columns[:32].sum() > 10 * columns[32:].sum()  # the patient's right lung lies on the left of the picture


def test_a_case_of_several_images_draws_each_mask_on_its_own():
    """A prior and the present film in one conversation: both are seen, and the mask moves with the film it lies on."""
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer)
    old, new = tiny.picture("old"), tiny.picture("new", seed=4)
    outline = np.zeros(new.shape[1:], bool)
    outline[:, :30] = True
    asked = (Turn("user", "Segment the right lung."), Turn("assistant", SEG))
    sample = Sample("s", images={"old": old, "new": new}, turns=asked, masks=(Mask("new", "right lung", outline),), meta={"row": "s", "kind": "segment"})
    (case,) = prepare(model, tokenizer, [sample])
    batch = draw([case], tokenizer, lots(0), 2)
    assert batch.order == [("picture", 0), ("picture", 1)] and batch.seg_image == [("picture", 1)] and len(batch.images["picture"]) == 2
    for picture, key in zip(batch.images["picture"], (old, new)):
        torch.testing.assert_close(picture, to_tensor(key, model.encoders["picture"].spec)[0], rtol=0, atol=1 / 255)
    assert batch.targets["mask"].shape == (1, 64, 64) and batch.targets["mask"][0, 30, 5] == 1 and batch.targets["mask"][0, 30, 60] == 0
    moved = draw([case], tokenizer, lots(3), 2, {}, 1.0)
    assert not torch.equal(moved.targets["mask"], batch.targets["mask"]) and torch.isnan(moved.targets["labels"][1]).all()
    losses = {k: v for objective in objectives.find("lm+mask+classify").values() for k, v in objective(model, moved, model(**moved.inputs())).items()}
    assert {"lm", "mask", "dense"} <= losses.keys() and all(v.isfinite() for v in losses.values())


def test_a_batch_is_its_seed_and_no_flip_moves_left_to_right(root):
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer)
    cases = cases_of(model, tokenizer, root)[:4]
    one, two = (draw(cases, tokenizer, lots(3), 4, {"segment": 9.0}, 1.0) for _ in range(2))
    assert torch.equal(one.ids, two.ids) and torch.equal(one.images["picture"], two.images["picture"]) and torch.equal(one.targets["mask"], two.targets["mask"])
    assert not torch.equal(one.ids, draw(cases, tokenizer, lots(4), 4, {"segment": 9.0}, 1.0).ids)
    seen = set()
    for seed in range(12):
        batch = draw(cases, tokenizer, lots(seed), 4, {"segment": 9.0}, 1.0)
        for mask, label, present in zip(batch.targets["mask"], batch.targets["label"], batch.targets["present"]):
            if present and tiny.TARGETS[label] in ("right lung", "left lung"):
                centre = float((mask.sum(0) * torch.arange(64)).sum() / mask.sum())
                assert (centre < 32) == (tiny.TARGETS[label] == "right lung")
                seen.add(tiny.TARGETS[label])
    assert seen == {"right lung", "left lung"}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stages.see.epoch=3", "Stage has no 'epoch'"),
        ("stages.see.step=3", "did you mean 'steps'?"),
        ("stages.spek.steps=3", "did you mean 'speak'?"),
        ("stages.see.steps=many", "is NoneType or int, not 'many'"),
        ("stages.see.lr=fast", "is float, not"),
        ("stages.see.train=3", "is Mapping or tuple, not"),
        ("args.widht=3", "did you mean 'width'?"),
        ("steps=3", "stages.NAME.FIELD=VALUE"),
        ("stages.see.steps", "stages.NAME.FIELD=VALUE"),
    ],
)
def test_a_wrong_setting_names_the_nearest(setting, says):
    with pytest.raises(MedVLMError) as e:
        override(RECIPE, [setting])
    assert e.value.code == "BAD_RECIPE" and says in e.value.message


def test_a_misspelt_loss_ends_the_run_at_its_first_step(root, tmp_path):
    with pytest.raises(MedVLMError) as e:
        train(override(drawn.RECIPE, ["stages.see.weights.presnt=0"]), root, tmp_path / "run", device="cpu")
    assert e.value.code == "BAD_RECIPE" and "'presnt'" in e.value.message and "present" in e.value.message


def test_settings_change_their_field_alone():
    made = override(RECIPE, ["stages.see.lr=1", "stages.see.train=lm.*", 'stages.speak.train=["lm.*","heads.*"]', "args.width=64", "stages.speak.steps=9"])
    assert made.stages[0] == replace(RECIPE.stages[0], lr=1.0, train=("lm.*",)) and made.stages[1].train == ("lm.*", "heads.*")
    assert made.args == {"width": 64} and made.stages[1].steps == 9 and RECIPE.stages[0].lr == 2e-3
    every = override(RECIPE, ["stages.*.steps=0", 'stages.*.data={"mine": 1}'])
    assert every.stages == tuple(replace(s, steps=0, epochs=None, data={"mine": 1}) for s in RECIPE.stages)


def test_a_recipe_is_a_name_or_a_file(tmp_path):
    assert load("medvlm_tiny").name == "medvlm_tiny"
    (tmp_path / "mine.py").write_text("from medvlm.recipes.medvlm_tiny import RECIPE")
    (tmp_path / "none.py").write_text("RECIPE = 3")
    assert load(str(tmp_path / "mine.py")).name == "medvlm_tiny"
    for name, code in ((str(tmp_path / "none.py"), "BAD_RECIPE"), (str(tmp_path / "gone.py"), "BAD_RECIPE"), ("medvlm_tinny", "NO_SUCH_PART"), ("os.path", "NO_SUCH_PART")):
        with pytest.raises(MedVLMError) as e:
            load(name)
        assert e.value.code == code


class Small(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2,), float(value)))


def saved(folder, value):
    model = Small(value)
    checkpoint.save(folder, model, torch.optim.AdamW(model.parameters()), {"stage": 0, "step": value})


def test_a_crash_at_any_moment_leaves_a_whole_state(tmp_path, monkeypatch):
    """The save is cut at each of its renames and removals, twice in a row: the state found is whole and never older than the last good one."""
    saved(tmp_path, 1)
    real = {"rename": Path.rename, "rmtree": shutil.rmtree, "save_file": checkpoint.save_file}
    good = 1
    for value, cut in enumerate([("rename", 1), ("rename", 2), ("rename", 1), ("rmtree", 2), ("save_file", 1), ("rename", 2), ("rmtree", 1), ("rename", 1)], 2):
        left = [cut[1]]

        def dies(name, left=left, cut=cut):
            def inner(*a, **k):
                if name == cut[0]:
                    left[0] -= 1
                    if left[0] == 0:
                        raise KeyboardInterrupt
                return real[name](*a, **k)

            return inner

        monkeypatch.setattr(Path, "rename", dies("rename"))
        monkeypatch.setattr(checkpoint.shutil, "rmtree", dies("rmtree"))
        monkeypatch.setattr(checkpoint, "save_file", dies("save_file"))
        try:
            saved(tmp_path, value)
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        found = checkpoint.newest(tmp_path)
        state = checkpoint.read_state(found)["step"]
        assert state >= good, (value, cut)
        model = Small(0)
        checkpoint.restore(found, model)
        assert model.weight.tolist() == [float(state)] * 2 and (found / "optimizer.pt").is_file()
        good = state
    saved(tmp_path, 99)
    assert checkpoint.read_state(checkpoint.newest(tmp_path))["step"] == 99 and sorted(p.name for p in tmp_path.iterdir()) == ["last"]
    assert checkpoint.newest(tmp_path / "nothing") is None


def test_a_state_of_another_model_is_refused(tmp_path):
    saved(tmp_path, 1)
    for other in (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)):
        with pytest.raises(MedVLMError) as e:
            checkpoint.restore(checkpoint.newest(tmp_path), other)
        assert e.value.code == "BAD_CHECKPOINT"


def test_the_learning_rate_rises_and_falls():
    rates = [schedule(s, 100, 10) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[55] == pytest.approx(0.505, abs=0.001) and 0.01 < rates[99] < 0.02
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


NAN = float("nan")


def classified(labels, groups=(("a", "b"),)):
    """Losses and the gradient at each logit of the head for one picture with these labels (a, b, c, d)."""
    head = ClassifyHead(4, ("a", "b", "c", "d"), groups, dropout=0.0)
    features = Features(torch.randn(1, 3, 4), (1, 3), torch.randn(1, 4))
    model = type("M", (), {"heads": {"classify": head}, "encoders": {"picture": None}})()
    losses = objectives.classify(model, Batch(None, None, None, targets={"labels": torch.tensor([labels])}), Output(features={"picture": features}))
    if losses:
        sum(losses.values()).backward()
    return losses, [0.0] * 4 if head.bias.grad is None else head.bias.grad.tolist()


def test_what_is_not_known_teaches_nothing():
    losses, gradient = classified([NAN, NAN, NAN, 1.0])
    assert set(losses) == {"labels"} and gradient[:3] == [0, 0, 0] and gradient[3] < 0
    assert classified([NAN] * 4)[0] == {}
    assert classified([0.0, NAN, NAN, NAN])[0] == {}  # not a, so b or anything else


@pytest.mark.parametrize(("labels", "known"), [([1.0, NAN], 0), ([NAN, 1.0], 1), ([0.0, 1.0], 1)])
def test_of_an_exclusive_group_the_known_one_is_learnt(labels, known):
    """argmax over NaN would pick the unknown one."""
    losses, gradient = classified([*labels, NAN, 0.0])
    assert set(losses) == {"a", "labels"} and all(v.isfinite() for v in losses.values())
    assert gradient[known] < 0 < gradient[1 - known] and gradient[2] == 0 and gradient[3] > 0


def test_an_absent_target_teaches_presence_only(root):
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer)
    cases = cases_of(model, tokenizer, root)[:4]
    batch = draw(cases, tokenizer, lots(0), 3, {"segment": 1.0, "asked": 0.0, "finding": 0.0, "modality": 0.0, "describe": 0.0, "view": 0.0}, 0)
    assert set(objectives.mask(model, batch, model(**batch.inputs()))) == {"present", "mask", "dense", "prompted"}
    batch.targets["present"][:] = 0
    assert set(objectives.mask(model, batch, model(**batch.inputs()))) == {"present"}


def masked(logits, target, weak):
    logits = torch.tensor(logits, dtype=torch.float32).requires_grad_()
    loss = objectives.mask_loss(logits, torch.zeros(len(logits)), torch.tensor(target, dtype=torch.float32), torch.tensor(weak))
    loss.backward()
    return float(loss.detach()), logits.grad


def test_a_box_asks_for_nothing_outside_and_no_shape_inside():
    target = np.zeros((1, 6, 6))
    target[0, 1:5, 1:5] = 1
    plus = np.full((1, 6, 6), -20.0)
    plus[0, 1:5, 2] = plus[0, 3, 1:5] = 20  # reaches all four sides of the box, fills less than half of it
    assert masked(plus, target, [True])[0] < 0.01 < 0.3 < masked(plus, target, [False])[0]
    beyond = plus.copy()
    beyond[0, 3, 5] = 20
    assert masked(beyond, target, [True])[0] > 0.3
    short = np.full((1, 6, 6), -20.0)
    short[0, 1:3, 1:3] = 20
    assert masked(short, target, [True])[0] > 0.1


def test_prompts_lie_on_their_target():
    target = torch.zeros(3, 32, 32)
    target[0, 5:9, 20:30] = target[1, 12, 3] = 1  # the third is empty
    for seed in range(5):
        torch.manual_seed(seed)
        boxes, points = objectives.box_prompts(target), objectives.point_prompts(target)
        assert (boxes[0] - torch.tensor([[5.0, 20.0], [9.0, 30.0]])).abs().max() <= 0.5 and boxes[2].abs().max() <= 34
        assert 5 <= points[0, 0, 0] < 9 and 20 <= points[0, 0, 1] < 30 and points[1, 0].tolist() == [12, 3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kinds": {"segmnt": 2.0}}, "did you mean 'segment'?"),
        ({"watch": "dense_loss"}, "watches 'dense_loss'"),
    ],
)
def test_a_misspelt_word_of_a_stage_ends_the_run_before_it_learns(root, tmp_path, change, says):
    with pytest.raises(MedVLMError) as e:
        run(root, tmp_path / "run", replace(RECIPE, stages=(replace(RECIPE.stages[0], **change),)))
    assert e.value.code == "BAD_RECIPE" and says in e.value.message


def test_a_kind_that_the_data_lack_is_said(root, tmp_path, capsys):
    run(root, tmp_path / "run", replace(RECIPE, stages=(replace(RECIPE.stages[0], steps=1, kinds={"haiku": 2.0}),)))
    assert "no conversation is of kind 'haiku'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda parts: parts.update(projector=parts.pop("projectors")), "a model has no 'projector'"),
        (lambda parts: parts["encoders"]["picture"].update(arg={}), "encoders.picture is {'file', 'args'}"),
        (lambda parts: parts["heads"]["classify"].pop("file"), "heads.classify is {'file', 'args'}"),
    ],
)
def test_a_misspelt_part_is_no_model_without_it(change, says):
    config = drawn.config(tiny.tokenizer())
    change(config.parts)
    with pytest.raises(MedVLMError) as e:
        MedVLM(config)
    assert e.value.code == "BAD_RECIPE" and says in e.value.message


def test_a_recipe_file_that_cannot_run_is_its_own_fault(tmp_path):
    for text, says in (("import medvlm.recipies", "recipies"), ("RECIPE = Recipe()", "Recipe"), ("def (", "invalid syntax")):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(MedVLMError) as e:
            load(str(tmp_path / "mine.py"))
        assert e.value.code == "BAD_RECIPE" and says in e.value.message and "mine.py" in e.value.message


def test_a_stage_whose_val_does_not_fall_stops_with_its_best_weights(root, tmp_path, monkeypatch):
    """Val rises after the second look; patience of two: it stops after the fourth, with the weights of the second."""
    looks, kept = iter([3.0, 2.0, 2.5, 2.4, 1.0, 1.0]), {}

    def validate(self):
        kept[len(kept) + 1] = {k: v.clone() for k, v in self.model.state_dict().items()}
        return {"lm": next(looks)}

    monkeypatch.setattr(loop._Stage, "validate", validate)
    run(root, tmp_path / "run", replace(RECIPE, stages=(replace(RECIPE.stages[0], steps=12, every=2, patience=2, watch="lm"),)))
    assert len(kept) == 4 and max(x["step"] for x in map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())) == 8
    last = weights(tmp_path / "run")
    assert all(torch.equal(last[k], v) for k, v in kept[2].items()) and not all(torch.equal(last[k], v) for k, v in kept[4].items())


def test_a_step_without_a_finite_gradient_is_passed_over_and_counted(root, tmp_path, monkeypatch):
    real, calls = objectives.lm, iter(range(1000))

    def broken(model, batch, out):
        losses = real(model, batch, out)
        return {k: v * float("nan") if next(calls) == 1 else v for k, v in losses.items()}

    monkeypatch.setattr(objectives, "find", lambda names, options=None: {"lm": broken})
    stage = replace(RECIPE.stages[1], steps=4, train=("lm.*",))
    run(root, tmp_path / "run", replace(RECIPE, stages=(stage,)))
    (line,) = [x for x in map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines()) if x["split"] == "train"]
    assert line["skipped"] == 1 and all(v.isfinite().all() for v in weights(tmp_path / "run").values())
    monkeypatch.setattr(objectives, "find", lambda names, options=None: {"lm": lambda m, b, o: {"lm": real(m, b, o)["lm"] * float("nan")}})
    with pytest.raises(MedVLMError) as e:
        run(root, tmp_path / "never", replace(RECIPE, stages=(replace(stage, steps=loop.GIVE_UP + 5),)))
    assert e.value.code == "BAD_RECIPE" and "not finite 20 times" in e.value.message


SOFT = replace(drawn.CONTRAST, stages=(replace(drawn.CONTRAST.stages[0], objective="soft", options={"soft": {"alike": "words", "temperature": 0.5}}),))


@pytest.mark.parametrize("recipe", [RECIPE, drawn.CONTRAST, SOFT], ids=["lm+classify", "clip", "soft"])
def test_steps_in_chunks_are_the_steps_at_once(root, tmp_path, recipe):
    """Losses are means over what each part holds; the towers here have no statistics over the batch, or they are frozen."""
    change = {"objective": "lm+classify", "train": {"*": 1.0, "encoders.*": 0.0}} if recipe is RECIPE else {}
    stage = replace(recipe.stages[0], steps=3, batch=6, augment=0.0, **change)
    for name, chunk in (("whole", None), ("parts", 2)):
        run(root, tmp_path / name, replace(recipe, stages=(replace(stage, chunk=chunk),)))
    told = [[{k: v for k, v in json.loads(x).items() if k in ("lm", "modality", "labels", "clip", "soft")} for x in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "parts")]
    assert all(a == pytest.approx(b, abs=2e-4) and a for a, b in zip(*told))  # of the third step and of val: the gradients before were the same


def test_reports_are_alike_by_the_words_they_share():
    ids = torch.tensor([[5, 7, 7, 9], [5, 7, 11, 0], [13, 0, 0, 0]])
    batch = Batch(*(torch.zeros(0, 0),) * 3, {}, targets={"text": {"ids": ids, "attention": (ids > 0).long()}, "labels": torch.zeros(3, 1)})
    rows = objectives._pair_labels(batch, "words")
    # {5, 7, 9} and {5, 7, 11} share two of three: cosine 2 / 3; the third shares none
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1), torch.tensor([[1, 2 / 3, 0], [2 / 3, 1, 0], [0, 0, 1.0]]))
    with pytest.raises(MedVLMError, match="not by 'sound'"):
        objectives._pair_labels(batch, "sound")


def test_bf16_steps_learn_in_full_precision_weights(root, whole, tmp_path):
    train(RECIPE, root, tmp_path / "run", device="cpu", precision="bf16")
    (told, exact) = ([json.loads(x) for x in (run / "log.jsonl").read_text().splitlines()] for run in (tmp_path / "run", whole))
    assert all(v.dtype == torch.float32 for k, v in weights(tmp_path / "run").items() if k.startswith("lm."))
    assert told[0]["lm"] == pytest.approx(exact[0]["lm"], rel=0.02) and told[0]["lm"] != exact[0]["lm"]
    assert json.loads((tmp_path / "run/recipe.json").read_text())["precision"] == "bf16"
    assert Accelerator(cpu=True).mixed_precision == "no"  # nothing is left of it


def test_a_part_without_pictures_knows_no_labels():
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer)
    text = [Sample(f"t{i}", turns=(Turn("user", "What is CT?"), Turn("assistant", "A scan.")), meta={"row": str(i), "kind": "text"}) for i in range(2)]
    batch = draw(prepare(model, tokenizer, text), tokenizer, lots(0))
    assert objectives._known(model, batch) == {"modality": 0, "labels": 0} and objectives.classify(model, batch, Output(features={})) == {}


def test_the_guides_recipe_and_row_teach_what_they_say(tmp_path):
    """docs/train-your-own.md: its recipe loads, and its row is asked, its findings and its report learnt."""
    guide = (Path(__file__).parents[2] / "docs/train-your-own.md").read_text()
    blocks = re.findall(r"```(json|python)\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "my_ct.py").write_text(next(text for kind, text in blocks if kind == "python"))
    row = json.loads(next(text for kind, text in blocks if kind == "json")) | {"image": "image.nii.gz", "mask": None}
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 4), np.int16), np.eye(4)), tmp_path / "image.nii.gz")
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    (group,) = open_data(tmp_path.parent, tmp_path.name).groups("train")
    found = list(load(str(tmp_path / "my_ct.py")).samples(group, "mine", "train"))
    assert {s.meta["kind"] for s in found} == {"asked", "finding", "report"}
    assert next(s.answer for s in found if s.meta["kind"] == "report").startswith("FINDINGS: No pleural effusion.")
