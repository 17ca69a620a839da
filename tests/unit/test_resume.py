"""A run that dies at any moment goes on as if it had not; what fills the disk or the memory has a name."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import drawn
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from medvlm.errors import MedVLMError
from medvlm.recipes.base import override
from medvlm.train import checkpoint, record
from medvlm.train.loop import train

TESTS = Path(__file__).parents[1]
SETTINGS = ["stages.see.steps=14", "stages.speak.steps=8", "stages.see.every=5", "stages.speak.every=5", "stages.see.patience=9"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return drawn.write(tmp_path_factory.mktemp("data"))


def command(root, out, *more):
    words = [sys.executable, "-m", "medvlm", "train", str(TESTS / "drawn.py"), "--data", str(root), "--out", str(out), "--device", "cpu", "--precision", "no"]
    return [*words, "--save-minutes", "0", *(w for s in SETTINGS for w in ("--set", s)), *more]


def environment():
    return {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}


def test_killed_three_times_at_random_moments_the_weights_are_the_same_bit_for_bit(root, tmp_path):
    here = lambda out, **more: train(override(drawn.RECIPE, SETTINGS), root, out, device="cpu", precision="no", **more)  # noqa: E731
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes below
    here(tmp_path / "whole")
    seed = random.SystemRandom().randrange(10**6)
    lot, out, kills = random.Random(seed), tmp_path / "killed", 0
    for moment in sorted(lot.sample(range(2, 20), 3)):  # steps of the whole run after which the kill comes, and a while
        more = ["--resume"] if (out / "recipe.json").exists() else []
        process = subprocess.Popen(command(root, out, *more), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < 120 and _reached(out) < moment:
            time.sleep(0.005)
        time.sleep(lot.random() * 0.1)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    here(out, resume=True)
    torch.set_num_threads(threads)
    assert kills == 3, f"seed {seed}"
    one, other = (load_file(tmp_path / n / "checkpoints/last/model.safetensors") for n in ("whole", "killed"))
    assert one.keys() == other.keys() and [n for n in one if not torch.equal(one[n], other[n])] == [], f"seed {seed}"
    assert (tmp_path / "whole/model/model.safetensors").read_bytes() == (out / "model/model.safetensors").read_bytes()
    losses = lambda run: {(x["stage"], x["step"]): x["lm"] for x in record.lines(run) if x["split"] == "val"}  # noqa: E731
    assert losses(tmp_path / "whole") == losses(out)


def _reached(out: Path) -> int:
    """Steps of the whole run that the state on disk has seen."""
    try:
        state = checkpoint.read_state(checkpoint.newest(out / "checkpoints"))
    except (TypeError, OSError, json.JSONDecodeError):  # there is none, or it is being swapped
        return 0
    return state["stage"] * 14 + state["step"]


def test_a_full_disk_has_a_name_and_the_last_state_stays(root, tmp_path, monkeypatch):
    recipe, real, calls = replace(drawn.RECIPE, finish=None), checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        real(tensors, path)
        if len(calls) == 3:
            with open(path, "r+b") as file:
                file.truncate(100)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(MedVLMError) as e:
        train(recipe, root, tmp_path / "run", device="cpu", precision="no", save_minutes=0)
    assert e.value.code == "DISK_FULL" and "--resume" in e.value.hint
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["last"]
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "run/checkpoints")) | {"step": 2} == checkpoint.read_state(checkpoint.newest(tmp_path / "run/checkpoints"))
    monkeypatch.undo()
    train(recipe, root, tmp_path / "run", device="cpu", precision="no", resume=True)
    train(recipe, root, tmp_path / "whole", device="cpu", precision="no")
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (tmp_path / "whole/model/model.safetensors").read_bytes()


def test_a_run_goes_on_with_its_own_seed_and_data_only(root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    recipe = replace(drawn.RECIPE, stages=(replace(drawn.RECIPE.stages[1], steps=1),))
    train(recipe, tmp_path / "data", tmp_path / "run", device="cpu", precision="no", seed=3)
    with pytest.raises(MedVLMError) as e:
        train(recipe, tmp_path / "data", tmp_path / "run", device="cpu", precision="no", resume=True)
    assert e.value.code == "BAD_ARGUMENT" and "--seed 3" in e.value.hint
    manifest = tmp_path / "data/drawn/manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("Film 1.", "Film one."))
    with pytest.raises(MedVLMError) as e:
        train(recipe, tmp_path / "data", tmp_path / "run", device="cpu", precision="no", seed=3, resume=True)
    assert e.value.code == "DATA_DIFFER"


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left on device (os error 28)"), RuntimeError("PytorchStreamWriter failed writing file")])
def test_what_the_libraries_say_of_a_full_disk_is_understood(tmp_path, monkeypatch, error):
    model = torch.nn.Linear(2, 2)
    checkpoint.save(tmp_path, model, torch.optim.AdamW(model.parameters()), {"step": 1})

    def full(*_):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError) as e:
        checkpoint.save(tmp_path, model, torch.optim.AdamW(model.parameters()), {"step": 2})
    assert e.value.errno == errno.ENOSPC and [p.name for p in tmp_path.iterdir()] == ["last"] and checkpoint.read_state(tmp_path / "last") == {"step": 1}


def test_a_stage_takes_back_no_other_stages_weights(root, tmp_path):
    """The second stage's val is empty, so that it never saves a best one."""
    settings = [*SETTINGS, "stages.speak.patience=9", 'stages.speak.data={"blind": 1}']
    shutil.copytree(root, tmp_path / "data")
    shutil.copytree(root / "drawn", tmp_path / "data/blind")
    manifest = tmp_path / "data/blind/manifest.jsonl"
    lines = [line for line in map(json.loads, manifest.read_text().splitlines()) if line["split"] == "train"]
    manifest.write_text("\n".join(map(json.dumps, lines)))
    recipe = replace(override(drawn.RECIPE, settings), finish=None)
    train(recipe, tmp_path / "data", tmp_path / "run", device="cpu", precision="no", allow_leaks=True)
    last, best = (load_file(tmp_path / f"run/checkpoints/{name}/model.safetensors") for name in ("last", "best/last"))
    assert checkpoint.read_state(tmp_path / "run/checkpoints/best/last")["stage"] == 0
    assert any(not torch.equal(last[k], best[k]) for k in last if k.startswith("lm."))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_log_that_cannot_grow_ends_the_run_by_name(root, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").symlink_to("/dev/full")
    with pytest.raises(MedVLMError) as e:
        train(drawn.RECIPE, root, tmp_path / "run", device="cpu", precision="no")
    assert e.value.code == "DISK_FULL"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_says_what_to_lower(root, tmp_path, monkeypatch, error):
    import medvlm.train.objectives as objectives

    def hungry(model, batch, out):
        raise error

    hungry.__name__ = "lm"
    monkeypatch.setattr(objectives, "lm", hungry)
    with pytest.raises(MedVLMError) as e:
        train(drawn.RECIPE, root, tmp_path / "run", device="cpu", precision="no")
    assert e.value.code == "OUT_OF_MEMORY" and "chunk" in e.value.hint
    with pytest.raises(RuntimeError, match="something else"):
        error = RuntimeError("something else")
        train(drawn.RECIPE, root, tmp_path / "other", device="cpu", precision="no")


def test_a_run_goes_on_with_its_own_recipe_only(root, tmp_path):
    given = {"device": "cpu", "precision": "no"}
    train(override(drawn.RECIPE, SETTINGS), root, tmp_path / "run", **given)
    record_before = (tmp_path / "run/recipe.json").read_text()
    for more, says in ((["stages.see.lr=7"], "stages.see.lr=0.002, not 7"), (["args.width=64"], "args.width=null, not 64"), (['stages.speak.kinds={"asked": 2}'], "stages.speak.kinds")):
        with pytest.raises(MedVLMError) as e:
            train(override(drawn.RECIPE, SETTINGS + more), root, tmp_path / "run", resume=True, **given)
        assert e.value.code == "BAD_ARGUMENT" and says in e.value.message and (tmp_path / "run/recipe.json").read_text() == record_before
    with pytest.raises(MedVLMError) as e:
        train(replace(drawn.RECIPE, stages=drawn.RECIPE.stages[:1]), root, tmp_path / "run", resume=True, **given)
    assert "see, speak" in e.value.message
    train(override(drawn.RECIPE, SETTINGS + ["stages.see.chunk=1", "stages.see.every=3"]), root, tmp_path / "run", resume=True, **given)


def test_shards_go_on_with_as_many_readers(root, tmp_path):
    from medvlm.datasets import shards

    shards.write(root / "drawn", tmp_path / "data/drawn", entries=2, quiet=True)
    given = {"device": "cpu", "precision": "no"}
    train(drawn.RECIPE, tmp_path / "data", tmp_path / "run", workers=2, **given)
    with pytest.raises(MedVLMError) as e:
        train(drawn.RECIPE, tmp_path / "data", tmp_path / "run", resume=True, **given)
    assert e.value.code == "BAD_ARGUMENT" and "2 readers" in e.value.message and "not 1" in e.value.message
    train(drawn.RECIPE, tmp_path / "data", tmp_path / "run", resume=True, workers=2, **given)


def test_a_full_disk_under_split_parameters_has_a_name_too(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict

    def full(*args, **more):
        raise dcp.CheckpointException("CheckpointException ranks", {0: (OSError(errno.ENOSPC, "No space left on device"), None)})

    monkeypatch.setattr(dcp, "save", full)
    monkeypatch.setattr(state_dict, "get_state_dict", lambda *_: ({}, {}))
    with pytest.raises(OSError) as e:
        checkpoint.save(tmp_path, None, None, {}, sharded=True)
    assert e.value.errno == errno.ENOSPC and not (tmp_path / "last.new").exists()


def test_a_log_whose_last_line_was_torn_goes_on_below_it(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"stage": "a", "step": 1, "split": "train"}\n{"stage": "a", "st')
    log = record.Log(tmp_path)
    log.write("a", 3, "train", loss=1.0)
    log.close()
    assert [x["step"] for x in record.lines(tmp_path)] == [1, 3]
