"""Training in two processes (gloo, this machine): the steps of one process with the same global batch, and split parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import drawn
import pytest
import tiny
import torch
from safetensors.torch import load_file

from medvlm.errors import MedVLMError
from medvlm.train import checkpoint
from medvlm.train.loop import train
from medvlm.vlm import MedVLM

TESTS = Path(__file__).parents[1]
RUN = """
import sys, json, dataclasses
import torch
from accelerate.state import AcceleratorState
import drawn
from medvlm.recipes.base import override
from medvlm.train.loop import train

recipe, root, out, options, more = sys.argv[1:]
recipe = override(getattr(drawn, recipe), json.loads(options))
train(recipe, root, out, device="cpu", precision="no", **json.loads(more))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return drawn.write(tmp_path_factory.mktemp("data"), count=18)


def run(processes, recipe, root, out, settings=(), fails=False, code=RUN, **more):
    script = out.parent / f"{out.name}.py"
    script.write_text(code)
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*start, str(script), recipe, str(root), str(out), json.dumps(settings), json.dumps(more)], capture_output=True, text=True, timeout=240,
                          env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"})  # fmt: skip
    if fails:
        return done
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "checkpoints/last/model.safetensors") if (out / "checkpoints/last/model.safetensors").exists() else None


# batch statistics and dropout are each process's own, so both are off; what is left is arithmetic
PLAIN = ["stages.pair.steps=3", "stages.pair.batch=8"]
TUNE = ["stages.see.steps=3", "stages.see.batch=4", "stages.see.objective=lm", "stages.see.train={\"lm.*\": 1, \"projectors.*\": 1}", "stages.see.augment=0.5",
        "stages.speak.steps=1", "stages.speak.batch=4"]  # fmt: skip


@pytest.mark.parametrize(("recipe", "settings"), [("CONTRAST", PLAIN), ("CONTRAST", [*PLAIN, "stages.pair.chunk=2"]), ("RECIPE", TUNE), ("RECIPE", [*TUNE, "stages.see.chunk=1", "stages.see.pack=200"])],
                         ids=["clip", "clip in chunks", "tuning", "tuning in chunks, packed"])  # fmt: skip
def test_two_processes_take_the_steps_of_one(root, tmp_path, recipe, settings):
    alone, both = run(1, recipe, root, tmp_path / "one", settings), run(2, recipe, root, tmp_path / "two", settings)
    assert alone.keys() == both.keys()
    moved = 0
    torch.manual_seed(0)
    start = MedVLM(getattr(drawn, recipe).model(tiny.tokenizer())).state_dict()
    for name in alone:
        if name.endswith(("k_proj.bias", "key.bias")):  # softmax does not see it: its gradient is rounding, which Adam makes steps of
            continue
        torch.testing.assert_close(both[name], alone[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        moved += bool(alone[name].is_floating_point() and (alone[name] - start[name]).abs().max() > 1e-4)
    assert moved > 5
    one, two = ([json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert {k: v for k, v in a.items() if k in ("clip", "lm")} == pytest.approx({k: v for k, v in b.items() if k in ("clip", "lm")}, abs=2e-4)


SPLIT = """
import medvlm.train.distributed as distributed
from torch.distributed.tensor import DTensor

real = distributed.shard

def seen(module, inner):
    split = real(module, inner)
    assert all(isinstance(p.data, DTensor) for p in inner.parameters()), "a parameter is whole"
    print("parameters are DTensors", sum(1 for _ in inner.parameters()))
    return split

distributed.shard = seen
"""


def test_split_parameters_train_alike_and_one_process_reads_their_state(root, tmp_path):
    settings = [*TUNE, "stages.see.steps=3"]
    run(2, "RECIPE", root, tmp_path / "split", settings, code=RUN.replace("recipe, root", SPLIT + "\nrecipe, root", 1), shard=True)
    whole = run(2, "RECIPE", root, tmp_path / "whole", settings)
    last = checkpoint.newest(tmp_path / "split/checkpoints")
    assert (last / "shards").is_dir() and not (last / "model.safetensors").exists()
    torch.manual_seed(5)
    model = MedVLM(drawn.config(tiny.tokenizer()))
    checkpoint.restore(last, model)  # this process is alone
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = (load_file(tmp_path / n / "model/model.safetensors") for n in ("split", "whole"))
    assert ours.keys() == theirs.keys() and all((ours[k].float() - theirs[k].float()).abs().max() < 2e-3 for k in ours)


def test_split_parameters_resume(root, tmp_path):
    """Stopped after two steps and started again: the weights of a run that was not stopped."""
    stop = RUN.replace("recipe, root", """
import os, signal
import medvlm.train.batches as batches
real, done = batches.draw, [0]

def draw(*args):
    done[0] += 1
    if done[0] == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*args)

batches.draw = draw
recipe, root""", 1)  # fmt: skip
    stopped = run(2, "RECIPE", root, tmp_path / "run", TUNE, fails=True, code=stop, shard=True)
    assert stopped.returncode != 0 and not (tmp_path / "run/model").exists()
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "run/checkpoints"))["step"] == 2
    run(2, "RECIPE", root, tmp_path / "run", TUNE, shard=True, resume=True)
    run(2, "RECIPE", root, tmp_path / "whole", TUNE, shard=True)
    ours, theirs = (load_file(tmp_path / n / "model/model.safetensors") for n in ("run", "whole"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_fsdp_that_accelerate_would_ignore_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(MedVLMError) as e:
        train(drawn.RECIPE, root, tmp_path / "run", device="cpu", precision="no")
    assert e.value.code == "FSDP_IGNORED" and "--shard" in e.value.hint and not (tmp_path / "run").exists()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(MedVLMError) as e:
        train(drawn.RECIPE, root, tmp_path / "run", device="cpu", precision="no", shard=True)
    assert e.value.code == "NOT_DISTRIBUTED" and "torchrun" in e.value.hint
