"""The training loop: every stage of every recipe runs through it, on Accelerate."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import signal
import time
from collections import defaultdict
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from ..errors import ModelError
from ..vlm import MedVLM
from . import checkpoint, objectives
from .data import Case, draw, prepare

VAL_CASES = 48
"""About how many cases of each data set a validation looks at."""


def train(recipe, data: str | Path, out: str | Path, resume: bool = False, seed: int = 0, device: str | None = None,
          precision: str = "bf16", save_minutes: float = 5.0) -> Path:  # fmt: skip
    """Run a recipe's stages and write the model to ``out/model``.

    Args:
        recipe: a recipes.base.Recipe.
        data: folder of data sets, each with a manifest.jsonl. out: the run's folder; ``log.jsonl`` has a line each 20
            steps and one each validation, ``recipe.json`` what was run, ``checkpoints/last`` the state to resume from.
        resume: go on from the last state of ``out``. Every step draws its batch and its dropout from (seed, stage,
            step), so that a resumed run goes on as if it had not stopped.
        precision: "bf16", "fp16" or "no", of the forward pass.

    Raises:
        ModelError: BAD_RECIPE, OUTPUT_EXISTS when ``out`` holds a run and ``resume`` is false.
    """
    out, data = Path(out), Path(data)
    state_folder = out / "checkpoints"
    if (out / "recipe.json").exists() and not resume:
        raise ModelError(f"{out} already holds a run", "OUTPUT_EXISTS", "go on with --resume or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=device == "cpu" or not torch.cuda.is_available())
    torch.manual_seed(seed)

    sets = dict.fromkeys(name for stage in recipe.stages for name in stage.data)  # once each, however many stages use it
    samples = {name: list(recipe.samples(data, name, "train")) for name in sets}
    if not any(samples.values()):
        raise ModelError(f"{data} holds no training samples of {', '.join(samples)}", "BAD_RECIPE", "check --data")
    if resume and (out / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    else:
        tokenizer = recipe.tokenizer([t.text for group in samples.values() for s in group for t in s.turns])
        tokenizer.save_pretrained(out / "tokenizer")
    model = MedVLM(recipe.model(tokenizer, **recipe.args))
    cases = {name: prepare(model, tokenizer, group) for name, group in samples.items()}
    val = {name: prepare(model, tokenizer, list(recipe.samples(data, name, "val"))) for name in samples}
    _record(out, recipe, data, samples, seed, precision)
    model = accelerator.prepare(model)

    last = checkpoint.newest(state_folder) if resume else None
    state = checkpoint.read_state(last) if last else {"stage": 0, "step": 0}
    if last:
        checkpoint.restore(last, accelerator.unwrap_model(model))
    stopped = _StopOnSignal()
    with stopped, (out / "log.jsonl").open("a") as log:
        for number, stage in enumerate(recipe.stages):
            if number < state["stage"]:
                continue
            optimizer = accelerator.prepare(_optimizer(accelerator.unwrap_model(model), stage))
            start = 0
            if last and number == state["stage"] and state["step"]:
                checkpoint.restore_optimizer(last, optimizer)
                start = state["step"]
            run = _Stage(stage, number, seed, accelerator, model, optimizer, tokenizer, cases, val, log)
            saved = time.monotonic()
            for step in run.steps(start):
                if stopped.now or time.monotonic() - saved > 60 * save_minutes:
                    checkpoint.save(state_folder, accelerator.unwrap_model(model), optimizer, {"stage": number, "step": step + 1})
                    saved = time.monotonic()
                if stopped.now:
                    raise KeyboardInterrupt
            checkpoint.save(state_folder, accelerator.unwrap_model(model), optimizer, {"stage": number + 1, "step": 0})
            last = None
    trained = accelerator.unwrap_model(model).eval()
    if recipe.finish:
        report = recipe.finish(trained, tokenizer, [s for n in samples for s in recipe.samples(data, n, "val")])
        (out / "finish.json").write_text(json.dumps(report, indent=1))
    save_model(trained, tokenizer, out / "model")
    return out / "model"


def save_model(model: MedVLM, tokenizer, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """The model and its tokenizer as a folder that ``medvlm.load`` and ``MedVLM.from_pretrained`` read, whole or not at all."""
    import copy
    import shutil

    model = copy.deepcopy(model)
    for parameter in model.parameters():  # buffers (rotary frequencies, running variances) need their full precision
        parameter.data = parameter.data.to(dtype)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


class _Stage:
    """The steps of one stage; everything random comes from (seed, stage, step)."""

    def __init__(self, stage, number: int, seed, accelerator, model, optimizer, tokenizer, cases, val, log):
        self.stage, self.number, self.seed, self.log = stage, number, seed, log
        self.accelerator, self.model, self.optimizer, self.tokenizer = accelerator, model, optimizer, tokenizer
        self.objectives = objectives.find(stage.objective)
        self.cases = {name: cases[name] for name, weight in stage.data.items() if weight > 0 and cases[name]}
        self.val = [c for name in self.cases for c in val[name][:: max(1, len(val[name]) // VAL_CASES)]]

    def rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.number, step])

    def pick(self, rng: np.random.Generator) -> list[Case]:
        names = list(self.cases)
        weights = np.array([self.stage.data[n] for n in names])
        picked = rng.choice(len(names), size=self.stage.batch, p=weights / weights.sum())
        return [self.cases[names[i]][rng.integers(len(self.cases[names[i]]))] for i in picked]

    def learn(self) -> None:
        """Training mode, but for frozen batch norms, whose running statistics would move all the same."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.affine and not module.weight.requires_grad:
                module.eval()

    def losses(self, batch):
        out = self.model(**batch.inputs(), logits_to_keep=batch.told())
        return {name: value for objective in self.objectives for name, value in objective(self.accelerator.unwrap_model(self.model), batch, out).items()}

    def steps(self, start: int):
        stage = self.stage
        total = defaultdict(list)
        began, skipped = time.monotonic(), 0
        bar = tqdm(range(start, stage.steps), initial=start, total=stage.steps, desc=stage.name, disable=not self.accelerator.is_main_process)
        for step in bar:
            self.learn()
            rng = self.rng(step)
            batch = draw(self.pick(rng), self.tokenizer, rng, stage.turns, dict(stage.kinds), stage.augment).to(self.accelerator.device)
            for group in self.optimizer.param_groups:
                group["lr"] = stage.lr * schedule(step, stage.steps, stage.warmup)
            with self.accelerator.autocast():
                losses = self.losses(batch)
            self.accelerator.backward(sum(losses.values()))
            norm = self.accelerator.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
            if torch.isfinite(norm):
                self.optimizer.step()
            else:
                skipped += 1
                if skipped > 20:
                    raise ModelError(f"stage {stage.name}: the gradient was not finite 20 times", "BAD_RECIPE", "lower lr or use precision no")
            self.optimizer.zero_grad()
            for name, value in losses.items():
                total[name].append(float(value.detach()))
            if step % 20 == 19 or step + 1 == stage.steps:
                mean = {k: round(float(np.mean(v)), 4) for k, v in total.items()}
                rate = (step + 1 - start) * stage.batch / (time.monotonic() - began)
                bar.set_postfix(mean | {"images/s": round(rate, 1)})
                self.write(step, split="train", lr=self.optimizer.param_groups[0]["lr"], rate=round(rate, 2), skipped=skipped, **mean)
                total.clear()
            if step % 250 == 249 or step + 1 == stage.steps:
                self.write(step, split="val", **self.validate())
            yield step

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses over the val cases without augmentation, every conversation drawn once from the same seed."""
        self.model.eval()
        total = defaultdict(list)
        rng = np.random.default_rng(self.seed)
        for i in range(0, len(self.val), self.stage.batch):
            part = [c for c in self.val[i : i + self.stage.batch] if c.turns]
            batch = draw(part, self.tokenizer, rng, self.stage.turns * 2, dict(self.stage.kinds), 0).to(self.accelerator.device)
            with self.accelerator.autocast():
                for name, value in self.losses(batch).items():
                    total[name].append(float(value))
        return {k: round(float(np.nanmean(v)), 4) for k, v in total.items()}

    def write(self, step: int, **line) -> None:
        self.log.write(json.dumps({"stage": self.stage.name, "step": step + 1, **line}) + "\n")
        self.log.flush()


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _optimizer(model: MedVLM, stage) -> torch.optim.Optimizer:
    """AdamW over the parameters that the stage's patterns name; no weight decay on vectors."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in model.unread and any(fnmatch(name, pattern) for pattern in stage.train)
        if parameter.requires_grad:
            groups[parameter.ndim > 1].append(parameter)
    if not any(groups.values()):
        raise ModelError(f"stage {stage.name}: no parameter matches {', '.join(stage.train)}", "BAD_RECIPE")
    return torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": stage.weight_decay}, {"params": groups[False], "weight_decay": 0.0}],
        lr=stage.lr, betas=(0.9, 0.98),
    )  # fmt: skip


def _record(out: Path, recipe, data: Path, samples: dict, seed: int, precision: str) -> None:
    """What was run, with what: the resolved recipe, package versions and a fingerprint of each data set."""
    fingerprints = {}
    for name, group in samples.items():
        manifest = data / name.partition("/")[0] / "manifest.jsonl"
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
        fingerprints[name] = {"samples": len(group), "manifest_sha256": digest}
    versions = {}
    for package in ("torch", "torchvision", "transformers", "timm", "segment-anything", "accelerate", "numpy", "medvlm-toolkit"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    record = {
        "name": recipe.name, "source": recipe.source, "departs": recipe.departs, "args": dict(recipe.args),
        "stages": [dataclasses.asdict(s) for s in recipe.stages], "seed": seed, "precision": precision,
        "data": fingerprints, "versions": versions,
    }  # fmt: skip
    temporary = out / "recipe.json.new"
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, out / "recipe.json")


class _StopOnSignal:
    """SIGINT and SIGTERM ask for a stop after the step in hand, so that its state is saved."""

    now = False

    def __enter__(self):
        def stop(*_):
            self.now = True

        self.before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
