"""Adapters of a stage: they alone learn, are folded in without a trace, survive a stop, and are asked for by names that are there."""

from dataclasses import replace
from pathlib import Path

import drawn
import pytest
import tiny
import torch
from safetensors.torch import load_file

from medvlm.errors import MedVLMError
from medvlm.train import optim
from medvlm.train.loop import train
from medvlm.vlm import MedVLM

RANKS = {"lm.*_proj": 2, "lm.*.q_proj": 3}
STAGE = replace(drawn.RECIPE.stages[1], name="adapt", train=("projectors.*",), lora=RANKS, steps=6, lr=1e-2)
RECIPE = replace(drawn.RECIPE, stages=(replace(drawn.RECIPE.stages[1], steps=2), STAGE))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return drawn.write(tmp_path_factory.mktemp("data"))


def run(root, out, *stages, **more):
    train(replace(RECIPE, stages=stages or RECIPE.stages), root, out, device="cpu", precision="no", **more)
    return load_file(out / "checkpoints/last/model.safetensors")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run without a stop: a plain stage, then one with adapters."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run(root, out)


def test_the_merged_model_says_what_the_adapted_one_said():
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.tensor([tokenizer("Is there consolidation in this chest X-ray?")["input_ids"]])
    plain = model.lm(ids).logits
    optim.optimizer(model, STAGE)
    optim.adapt(model, STAGE)
    assert torch.equal(model.lm(ids).logits, plain)  # they begin as nothing
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
        adapted = model.lm(ids).logits
        optim.merge(model)
        assert (adapted - plain).abs().max() > 0.05
        assert (model.lm(ids).logits - adapted).abs().max() <= 1e-5
    assert model.state_dict().keys() == before.keys()
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.startswith("lm.") and n.endswith("_proj.weight")}


def test_only_the_adapters_and_what_train_names_learn(root, tmp_path):
    after = run(root, tmp_path / "one", STAGE)
    torch.manual_seed(0)
    before = MedVLM(drawn.config(tiny.tokenizer())).state_dict()
    assert after.keys() == before.keys()  # a plain model again
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    adapted = {n for n in before if n.startswith("lm.") and n.endswith("_proj.weight")}
    assert moved == adapted | {n for n in before if n.startswith("projectors.")}
    for name in adapted:  # by a matrix of their rank, the last pattern's that fits
        found = torch.linalg.svdvals((after[name] - before[name]).double())
        rank = 3 if "q_proj" in name else 2
        assert found[rank - 1] > 1e-5 and found[rank:].max() < 1e-6, name


def test_what_learns_are_few_numbers():
    model = tiny.model(tiny.tokenizer())
    optim.optimizer(model, STAGE)
    optim.adapt(model, STAGE)
    groups = optim.optimizer(model, STAGE).param_groups
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in learning if "lora_" not in n} == {"projectors"}
    layer = model.lm.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (3, 32) and layer.scaling["default"] == 2 and not layer.base_layer.weight.requires_grad
    assert sum(len(g["params"]) for g in groups) == len(learning)


@pytest.mark.parametrize("stop", [2, 5])
def test_a_run_that_stops_before_or_within_such_a_stage_goes_on_bit_for_bit(root, whole, tmp_path, stop):
    """At the end of the first stage the adapters do not exist yet: they begin as they would have; at the third step of six."""
    with pytest.raises(KeyboardInterrupt), drawn.stopped_at(stop):
        run(root, tmp_path / "run")
    kept = load_file(tmp_path / "run/checkpoints/last/model.safetensors")
    assert any("lora_B" in n for n in kept) == (stop > 2)
    ours, theirs = run(root, tmp_path / "run", resume=True), whole[1]
    assert ours.keys() == theirs.keys() and [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (whole[0] / "model/model.safetensors").read_bytes()


def test_a_stage_with_adapters_follows_another(root, whole, tmp_path):
    twice = run(root, tmp_path / "twice", *RECIPE.stages, replace(STAGE, name="again", lora={"lm.*.q_proj": 1}, steps=1))
    assert twice.keys() == whole[1].keys()
    moved = {n for n in twice if n.startswith("lm.") and not torch.equal(twice[n], whole[1][n])}
    assert moved == {n for n in twice if n.startswith("lm.") and "q_proj" in n}


@pytest.mark.parametrize(("change", "says"), [({"lora": {"lm.*.q_porj": 4}}, "no linear layer is called lm.*.q_porj"),
                                              ({"lora": {"lm.*.input_layernorm": 4}}, "input_layernorm"),
                                              ({"train": ("projector.*",)}, "no parameter is called projector.*")])  # fmt: skip
def test_a_pattern_that_fits_nothing_ends_the_run_before_its_first_step(root, tmp_path, change, says):
    with pytest.raises(MedVLMError) as e:
        run(root, tmp_path / "run", RECIPE.stages[0], replace(STAGE, **change))
    assert e.value.code == "BAD_RECIPE" and says in e.value.message and "adapt" in e.value.message
    assert not (tmp_path / "run/log.jsonl").exists()
