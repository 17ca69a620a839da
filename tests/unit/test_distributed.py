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
from medvlm.recipes.base import override
from medvlm.train import checkpoint
from medvlm.train.loop import train
from medvlm.vlm import MedVLM

TESTS = Path(__file__).parents[1]
# batch statistics and dropout are each process's own, so both are off; what is left is arithmetic
PAIR = ("stages.pair.steps=3", "stages.pair.batch=8")
TUNE = ("stages.see.steps=3", "stages.see.batch=4", "stages.see.objective=lm", "stages.see.train={\"lm.*\": 1, \"projectors.*\": 1}", "stages.see.augment=0.5",
        "stages.speak.steps=1", "stages.speak.batch=4")  # fmt: skip
RUNS = {
    "clip": ("CONTRAST", PAIR, {}), "clip in chunks": ("CONTRAST", (*PAIR, "stages.pair.chunk=2"), {}),
    "tuning": ("RECIPE", TUNE, {}), "tuning in chunks, packed": ("RECIPE", (*TUNE, "stages.see.chunk=1", "stages.see.pack=200"), {}),
    "split": ("RECIPE", TUNE, {"shard": True}), "split, stopped": ("RECIPE", TUNE, {"shard": True}), "split, resumed": ("RECIPE", TUNE, {"shard": True, "resume": True}),
}  # fmt: skip
"""{name: (recipe of drawn.py, settings, arguments of train)}: one launch of two processes makes them all, as starting one takes long."""
ALL = """
import json, os, shutil, signal, sys
from pathlib import Path
import drawn
import medvlm.train.batches as batches
import medvlm.train.distributed as distributed
import torch
from medvlm.recipes.base import override
from medvlm.train.loop import train
from torch.distributed.tensor import DTensor

root, out, runs = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
shard, draw = distributed.shard, batches.draw

def seen(module, inner):
    split = shard(module, inner)
    assert all(isinstance(p.data, DTensor) for p in inner.parameters()), "a parameter is whole"
    return split

def stops(*args):
    stops.left -= 1
    if stops.left == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return draw(*args)

distributed.shard = seen
for name, (recipe, settings, more) in runs.items():
    stops.left, batches.draw = 2, stops if name == "split, stopped" else draw
    place = out / name
    if name == "split, resumed":
        place = out / "split, stopped"
    try:
        train(override(getattr(drawn, recipe), settings), root, place, device="cpu", precision="no", **more)
    except KeyboardInterrupt:
        assert name == "split, stopped" and not (place / "model").exists()
        if distributed.rank() == 0:
            shutil.copytree(place / "checkpoints", out / "as stopped")
        distributed.wait()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return drawn.write(tmp_path_factory.mktemp("data"), count=18)


@pytest.fixture(scope="module")
def both(root, tmp_path_factory) -> Path:
    """The runs of two processes, by name."""
    out = tmp_path_factory.mktemp("both")
    (out / "all.py").write_text(ALL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(out / "all.py"), str(root), str(out), json.dumps(RUNS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def weights(run):
    return load_file(run / "checkpoints/last/model.safetensors")


@pytest.mark.parametrize("name", ["clip", "clip in chunks", "tuning", "tuning in chunks, packed"])
def test_two_processes_take_the_steps_of_one(root, both, tmp_path, name):
    recipe, settings, _ = RUNS[name]
    train(override(getattr(drawn, recipe), settings), root, tmp_path / "one", device="cpu", precision="no")
    mine, theirs = weights(tmp_path / "one"), weights(both / name)
    assert mine.keys() == theirs.keys()
    moved = 0
    torch.manual_seed(0)
    start = MedVLM(getattr(drawn, recipe).model(tiny.tokenizer())).state_dict()
    for part in mine:
        if part.endswith(("k_proj.bias", "key.bias")):  # softmax does not see it: its gradient is rounding, which Adam makes steps of
            continue
        torch.testing.assert_close(theirs[part], mine[part], rtol=0, atol=1e-5, msg=lambda m, n=part: f"{n}: {m}")
        moved += bool(mine[part].is_floating_point() and (mine[part] - start[part]).abs().max() > 1e-4)
    assert moved > 5
    one, two = ([json.loads(x) for x in (run / "log.jsonl").read_text().splitlines()] for run in (tmp_path / "one", both / name))
    for a, b in zip(one, two, strict=True):
        assert {k: v for k, v in a.items() if k in ("clip", "lm")} == pytest.approx({k: v for k, v in b.items() if k in ("clip", "lm")}, abs=2e-4)


def test_split_parameters_train_alike_and_one_process_reads_their_state(both):
    """That every parameter was a DTensor is asserted where it ran."""
    whole, last = weights(both / "tuning"), checkpoint.newest(both / "split/checkpoints")
    assert (last / "shards").is_dir() and not (last / "model.safetensors").exists()
    torch.manual_seed(5)
    model = MedVLM(drawn.config(tiny.tokenizer()))
    checkpoint.restore(last, model)  # this process is alone
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = (load_file(both / n / "model/model.safetensors") for n in ("split", "tuning"))
    assert ours.keys() == theirs.keys() and all((ours[k].float() - theirs[k].float()).abs().max() < 2e-3 for k in ours)


def test_split_parameters_resume(both):
    """Stopped after two steps and started again: the weights of a run that was not stopped."""
    assert checkpoint.read_state(both / "as stopped/last")["step"] == 2
    ours, theirs = (load_file(both / n / "model/model.safetensors") for n in ("split, stopped", "split"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_fsdp_that_accelerate_would_ignore_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(MedVLMError) as e:
        train(drawn.RECIPE, root, tmp_path / "run", device="cpu", precision="no")
    assert e.value.code == "FSDP_IGNORED" and "--shard" in e.value.hint and not (tmp_path / "run").exists()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(MedVLMError) as e:
        train(drawn.RECIPE, root, tmp_path / "run", device="cpu", precision="no", shard=True)
    assert e.value.code == "NOT_DISTRIBUTED" and "torchrun" in e.value.hint


def test_unlike_parts_of_split_processes_are_refused(monkeypatch):
    from types import SimpleNamespace

    from medvlm.train import distributed, loop

    stage = SimpleNamespace(stage=SimpleNamespace(name="tune"))
    part = SimpleNamespace(ids=torch.zeros(2, 3), images={"picture": None})
    monkeypatch.setattr(distributed, "gathered", lambda mine: [*mine, *mine])
    loop._Stage.refuse_unlike(stage, [part])
    for other in ([], [(False, ["picture"])], [(True, [])], [(True, ["picture"]), (True, ["picture"])]):
        monkeypatch.setattr(distributed, "gathered", lambda mine, other=other: [*mine, other])
        with pytest.raises(MedVLMError) as e:
            loop._Stage.refuse_unlike(stage, [part])
        assert e.value.code == "BAD_RECIPE" and "--shard" in e.value.hint
