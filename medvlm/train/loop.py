"""The training loop: every stage of every recipe runs through it, on Accelerate."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from ..errors import ModelError
from ..language import Batch, share_rows
from ..vlm import MedVLM, Output
from . import checkpoint, contrastive, distributed, objectives, optim, record, savers
from .batches import Batches, loader, seed_everything
from .corpus import Corpus
from .data import draw

VAL_CASES = 96
"""Most cases of a data set that a look at val takes in."""
FREE = {"chunk", "every"}
"""Fields of a stage that may change while a run goes on: how much is held at a time, how often it is looked at."""
NOTHING = "nothing"
"""The loss of a part that holds nothing to learn from."""
GIVE_UP = 20
"""Steps in a row without a finite gradient after which a run ends."""


def train(recipe, data: str | Path, out: str | Path, resume: bool = False, seed: int = 0, device: str | None = None,
          precision: str = "auto", save_minutes: float = 5.0, workers: int = 0, shard: bool = False, skip_bad: bool = False,
          allow_leaks: bool = False) -> Path:  # fmt: skip
    """Run a recipe's stages and write the model to ``out/model``.

    Args:
        recipe: a recipes.base.Recipe.
        data: folder of data sets: manifests, shards or published layouts. out: the run's folder: ``recipe.json`` (what was
            run), ``log.jsonl`` (a line each 20 steps and each validation), ``curves.png``, ``checkpoints/last`` (the state to
            resume from), ``skipped.jsonl`` (what skip_bad left out), and at the end ``model``.
        resume: go on from the last state of ``out``. Every step draws its batch and its dropout from (seed, stage,
            step), so that a resumed run goes on as if it had not stopped.
        device: "cpu" to stay off the GPUs, "cuda" to refuse a machine without one; by default the GPU, where there is one.
        precision: "bf16", "fp16" or "no", of the forward pass; "auto" is bf16 where the hardware computes in it (:func:`fast_bf16`).
        workers: processes that make batches; 0 makes them between the steps.
        shard: split the parameters over the processes (FSDP2) where each would hold all of them (DDP).
        skip_bad: leave out images and rows that are bad, count and list them; else the first one ends the run.
        allow_leaks: train although a patient or a picture is in two splits.

    Raises:
        ModelError: BAD_ARGUMENT for a device that is not there and a resumed run of another seed; DATA_DIFFER for one of other data; BAD_RECIPE; OUTPUT_EXISTS when ``out`` holds a run and ``resume`` is false; LEAK; OUT_OF_MEMORY;
            DISK_FULL, with the last good state kept; and what is wrong with the data, by manifest line.
    """
    try:
        return _train(recipe, Path(data), Path(out), resume, seed, device, precision, save_minutes, workers, shard, skip_bad, allow_leaks)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ModelError(f"the disk of {out} is full", "DISK_FULL", "make room, then go on with --resume: the last state is kept") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ModelError("a training step does not fit into memory", "OUT_OF_MEMORY",
                         "set a smaller chunk (same result, less at a time), e.g. --set stages.NAME.chunk=4, then --resume") from error  # fmt: skip
    finally:
        AcceleratorState._reset_state()  # else what comes after in this process would compute in this run's precision


def _train(recipe, data, out, resume, seed, device, precision, save_minutes, workers, shard, skip_bad, allow_leaks) -> Path:
    if (out / "recipe.json").exists() and not resume:
        raise ModelError(f"{out} already holds a run", "OUTPUT_EXISTS", "go on with --resume or choose another --out")
    if device not in (None, "cpu", "cuda") or device == "cuda" and not torch.cuda.is_available():
        hint = "use cpu, or cuda; CUDA_VISIBLE_DEVICES chooses among several"
        raise ModelError(f"the device {device!r} cannot be trained on here", "BAD_ARGUMENT", hint)
    found = [objectives.find(stage.objective, stage.options) for stage in recipe.stages]  # a misspelt one ends the run now
    if shard and any(stage.lora for stage in recipe.stages):
        raise ModelError("adapters (lora) cannot be put into a model whose parameters are split", "BAD_RECIPE", "leave out --shard: with LoRA most parameters are frozen")
    distributed.refuse_ignored_fsdp("cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda")
    precision = ("bf16" if fast_bf16(device) else "no") if precision == "auto" else precision
    if precision == "fp16" and (shard or device == "cpu" or not torch.cuda.is_available()):
        raise ModelError("fp16 needs a GPU and whole parameters (no --shard)", "BAD_ARGUMENT", "use --precision bf16, or no")
    AcceleratorState._reset_state()  # else a second run of this process must have the first one's precision
    accelerator = Accelerator(
        mixed_precision=precision, cpu=device == "cpu" or not torch.cuda.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )  # fmt: skip
    if uneven := next((s for s in recipe.stages if s.batch % distributed.world()), None):
        raise ModelError(f"stage {uneven.name}: a batch of {uneven.batch} cannot be shared out evenly over {distributed.world()} processes", "BAD_RECIPE", "give a multiple")
    chief = accelerator.is_main_process
    out.mkdir(parents=True, exist_ok=True)
    distributed.wait()

    corpus = Corpus(recipe, data, skip_bad, allow_leaks)
    if resume and (out / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    else:
        tokenizer = recipe.tokenizer(corpus.texts(), recipe.args)
        if chief:
            tokenizer.save_pretrained(out / "tokenizer")
    torch.manual_seed(seed)
    model = MedVLM(recipe.model(tokenizer, **recipe.args))
    if not shard:
        channels_last(model)
    optim.check(model, recipe.stages)
    _refuse_halved(model, recipe.stages)
    if any(stage.pack for stage in recipe.stages) and not share_rows(model.lm):
        raise ModelError("conversations that share a row would leak into each other in this language model", "BAD_RECIPE", "leave pack out of the stages")

    sources, val = corpus.sources(model, tokenizer, seed, distributed.world() * max(1, workers)), corpus.val(model, tokenizer)
    corpus.refuse_misspelt()
    recipe = _counted(recipe, sources)
    if resume:
        readers = distributed.world() * max(1, workers) if any(found.streamed for found in corpus.sets.values()) else None
        _same_run(out, recipe, seed, {n: corpus.sets[n].fingerprint for n in corpus.names}, readers)
    if chief:
        facts = {n: {"images": len(sources[n]), "val": len(val[n]), "sha256": corpus.sets[n].fingerprint} for n in corpus.names}
        record.write(out, recipe, facts, {"seed": seed, "precision": precision, "processes": distributed.world(), "workers": workers, "sharded": shard})
        if corpus.no_twin:
            tqdm.write(f"conversations without a mirror image, since it would not be true: {corpus.no_twin}", file=sys.stderr)
    corpus.left_out(out)

    last = checkpoint.newest(out / "checkpoints") if resume else None
    state = checkpoint.read_state(last) if last else {"stage": 0, "step": 0}
    if len({(s["stage"], s["step"]) for s in distributed.gathered([state])}) > 1:
        raise ModelError(f"the processes do not find the same state in {out}", "BAD_ARGUMENT", "give an --out on a disk that all machines share")
    module = distributed.shard(_Losses(model, {}).to(accelerator.device), model) if shard else None
    if last and not state["step"]:
        checkpoint.restore(last, model)
    stopped, log = _StopOnSignal(), record.Log(out, chief)
    with stopped, contextlib.closing(log):
        for number, stage in enumerate(recipe.stages):
            if number < state["stage"]:
                continue
            run = _Stage(stage, number, seed, accelerator, model, found[number], tokenizer, sources, val, log, module, out)
            run.begin(last if number == state["stage"] else None, state)
            saved = time.monotonic()
            for step in run.steps(workers):
                stop, due = distributed.total(stopped.now, time.monotonic() - saved >= 60 * save_minutes)  # one decision for all
                if stop or due:
                    run.save({"stage": number, "step": step + 1})
                    corpus.left_out(out)
                    saved = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
            run.end()
            corpus.left_out(out)
            last = None
    if shard:
        held = distributed.whole(model)
        model = MedVLM(model.config)
        if chief:
            model.load_state_dict(held)
    if recipe.finish and chief:
        (out / "finish.json").write_text(json.dumps(recipe.finish(model.eval(), tokenizer, corpus.val_samples()), indent=1))
    if chief:
        save_model(model.eval(), tokenizer, out / "model")
        record.curves(out)
    distributed.wait()
    return out / "model"


def _same_run(out: Path, recipe, seed: int, data: dict[str, str], readers: int | None) -> None:
    """What must not change while a run goes on, or its steps would be no one's. readers: of shards, each of which reads its own."""
    try:
        before = json.loads((out / "recipe.json").read_text())
    except OSError:
        return
    if before["seed"] != seed:
        raise ModelError(f"the run was begun with seed {before['seed']}, not {seed}", "BAD_ARGUMENT", f"go on with --seed {before['seed']}")
    if changed := [n for n, mark in data.items() if before["data"].get(n, {}).get("sha256", mark) != mark]:
        raise ModelError(f"the data of {', '.join(changed)} have changed since the run was begun", "DATA_DIFFER", "go on with the data of the run, or begin another --out")
    now = json.loads(json.dumps({"args": dict(recipe.args), "stages": [dataclasses.asdict(s) for s in recipe.stages]}))
    names = [s["name"] for s in before["stages"]]
    if names != [s["name"] for s in now["stages"]]:
        raise ModelError(f"the run was begun with the stages {', '.join(names)}, not {', '.join(s['name'] for s in now['stages'])}", "BAD_ARGUMENT", "go on with the recipe of the run")
    pairs = [("args", before["args"], now["args"]), *((f"stages.{n}", a, b) for n, a, b in zip(names, before["stages"], now["stages"]))]
    for where, a, b in pairs:
        for key in a.keys() | b.keys() if where == "args" else a.keys() & b.keys() - FREE:
            if a.get(key) != b.get(key):
                raise ModelError(f"the run was begun with {where}.{key}={json.dumps(a.get(key))}, not {json.dumps(b.get(key))}", "BAD_ARGUMENT",
                                 "give --set and --scale as when it was begun, or begin another --out")  # fmt: skip
    held = before["processes"] * max(1, before["workers"])
    if readers not in (None, held):
        raise ModelError(f"the run was begun with {held} readers of its shards (processes times workers), not {readers}", "BAD_ARGUMENT", "go on with as many, or begin another --out")


def fast_bf16(device: str | None = None) -> bool:
    """Whether bf16 is a gain: GPUs that know it, and processors with instructions for it; others emulate it, much slower than float32."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _refuse_halved(model: MedVLM, stages) -> None:
    """Stages that halve what cannot be halved: a conversation has as many image tokens as a whole picture, and an encoder its stride."""
    for stage in stages:
        if stage.halved and stage.turns:
            raise ModelError(f"stage {stage.name}: halved is {stage.halved} with {stage.turns} turns, whose image tokens are those of whole pictures", "BAD_RECIPE", "give turns=0, or halved=0")
        for name, encoder in model.encoders.items() if stage.halved else ():
            if spec := getattr(encoder, "spec", None):
                try:
                    encoder.grid((*spec.size[:-2], *(n // 2 for n in spec.size[-2:])))
                except ModelError as error:
                    raise ModelError(f"stage {stage.name}: encoder {name} cannot see halved pictures: {error.message}", "BAD_RECIPE", "give it another size, or halved=0") from error


def channels_last(model: nn.Module) -> None:
    """Kernels of 2-D convolutions laid out with their channels last: in bf16 on processors several times as fast, with the same values."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _counted(recipe, sources):
    """The recipe with the steps that its epochs come to."""
    stages = []
    for stage in recipe.stages:
        if stage.steps is None:
            images = sum(len(sources[n]) for n, weight in stage.data.items() if weight > 0)
            stage = dataclasses.replace(stage, epochs=None, steps=max(1, math.ceil(stage.epochs * images / stage.batch)))
        stages.append(stage)
    return dataclasses.replace(recipe, stages=tuple(stages))


def save_model(model: MedVLM, tokenizer, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """The model and its tokenizer as a folder that ``medvlm.load`` and ``MedVLM.from_pretrained`` read, whole or not at all."""
    import copy
    import shutil

    model = copy.deepcopy(model)
    for parameter in model.parameters():  # buffers (rotary frequencies, running variances) need their full precision
        parameter.data = parameter.data.to(dtype).contiguous()
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


class _Losses(nn.Module):
    """Model and objectives as one module, so that what shares gradients over processes sees all that a loss goes through."""

    def __init__(self, model: MedVLM, found: dict):
        super().__init__()
        self.model, self.found = model, found
        self.plain = model.lm is not None and model.plain_head

    def forward(self, batch: Batch, between: bool = True) -> tuple[tuple, dict[str, dict], tuple]:
        """(vectors of the contrastive objective, {objective: {loss: mean}}, what its loss will read of the model).

        Its loss is among the others only when ``between``.
        """
        if len(batch.ids):
            told = batch.told()
            out = self.model(**batch.inputs(), logits_to_keep=told[:0] if self.plain else told)
        else:
            out = Output(features=self.model.encode(batch.images))
        vectors, losses, read = (), {}, ()
        for name, objective in self.found.items():
            if not between and hasattr(objective, "vectors"):
                vectors, head = objective.vectors(self.model, batch, out), self.model.heads["contrast"]
                read = (head.scale(), *([] if head.logit_bias is None else [head.logit_bias * 1]))
                continue
            losses[name] = objective(self.model, batch, out)
        if distributed.world() > 1 and self.training and not vectors and not any(losses.values()):  # the others wait for this process's gradients
            losses[next(iter(self.found))] = {NOTHING: sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0}
        return vectors, losses, read


class _Stage:
    """The steps of one stage; everything random comes from (seed, stage, step)."""

    def __init__(self, stage, number, seed, accelerator, model, found, tokenizer, sources, val, log, split, out):
        self.stage, self.number, self.seed, self.log, self.tokenizer, self.out = stage, number, seed, log, tokenizer, out
        self.accelerator, self.model, self.found, self.module, self.sharded = accelerator, model, found, split, split is not None
        self.sources = {name: sources[name] for name, weight in stage.data.items() if weight > 0 and len(sources[name])}
        if not self.sources:
            raise ModelError(f"stage {stage.name}: none of {', '.join(stage.data)} holds anything to learn from", "BAD_RECIPE", "check --data and the sets' splits")
        self.val = []
        for name in self.sources:
            cases = [c for c in val[name].all() if c.turns or c.pictures]  # of one image many, where it is cut into windows or slices
            some = np.random.default_rng(seed).permutation(len(cases))[:VAL_CASES]
            self.val += [cases[i] for i in sorted(some)]
        np.random.default_rng(seed).shuffle(self.val)  # pairs of one kind only would be hard for a contrastive loss to tell apart
        self.between = next((f for f in found.values() if hasattr(f, "vectors")), None)
        self.start, self.best, self.misses, self.skipped = 0, math.inf, 0, 0

    def begin(self, last: Path | None, state: dict) -> None:
        """Adapters, optimiser and, after a stop in the middle of this stage, the state it had."""
        self.accelerator.free_memory()  # else earlier stages' optimisers are kept, and unscaled once more at each step
        optim.optimizer(self.model, self.stage)  # sets what learns, which the adapters need to know
        seed_everything(self.seed, self.number)  # of the adapters, also where a run goes on at this stage
        optim.adapt(self.model, self.stage)
        if last and state["step"]:
            checkpoint.restore(last, self.model)
        if self.sharded:
            self.module.found = self.found
        else:
            module = _Losses(self.model, self.found).to(self.accelerator.device)
            self.module = self.accelerator.prepare(module) if distributed.world() > 1 else module
        optimizer = optim.optimizer(self.model, self.stage)
        self.optimizer = optimizer if self.sharded else self.accelerator.prepare(optimizer)
        if last and state["step"]:
            extra = checkpoint.restore_optimizer(last, self.model, self.optimizer.optimizer if not self.sharded else self.optimizer)
            if self.accelerator.scaler is not None and "scaler" in extra:
                self.accelerator.scaler.load_state_dict(extra["scaler"])
            self.start, self.best, self.misses, self.skipped = (state[k] for k in ("step", "best", "misses", "skipped"))

    def save(self, state: dict) -> None:
        scaler = self.accelerator.scaler
        state = {**state, "best": self.best, "misses": self.misses, "skipped": self.skipped}
        optimizer = self.optimizer if self.sharded else self.optimizer.optimizer
        checkpoint.save(self.out / "checkpoints", self.model, optimizer, state, {"scaler": scaler.state_dict()} if scaler else None, self.sharded)

    def end(self) -> None:
        """The model as the stage leaves it: its best weights where it was watched, adapters merged."""
        best = checkpoint.newest(self.out / "checkpoints/best") if self.stage.patience is not None else None
        if best and checkpoint.read_state(best)["stage"] == self.number:  # another stage's are not its own
            checkpoint.restore(best, self.model)
        if self.stage.lora:
            optim.merge(self.model)
        self.start = 0
        self.save({"stage": self.number + 1, "step": 0})

    def learn(self) -> None:
        """Training mode, but for frozen batch norms, whose running statistics would move all the same."""
        self.module.train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.affine and not module.weight.requires_grad:
                module.eval()

    def steps(self, workers: int):
        stage = self.stage
        total, began, stuck = defaultdict(list), time.monotonic(), 0
        batches = Batches(stage, (self.seed, self.number), self.sources, self.tokenizer, self.start, distributed.rank(), distributed.world())
        bar = tqdm(range(self.start, stage.steps), initial=self.start, total=stage.steps, desc=stage.name, disable=not self.accelerator.is_main_process)
        if stage.patience is not None and self.misses >= stage.patience:
            return
        for step, parts in zip(bar, loader(batches, workers)):
            self.learn()
            seed_everything(self.seed, self.number, step, distributed.rank())
            for group in self.optimizer.param_groups:
                group["lr"] = stage.lr * group["share"] * optim.schedule(step, stage.steps, stage.warmup)
            losses = self.backward([part.to(self.accelerator.device) for part in parts])
            norm = self.accelerator.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            if torch.isfinite(norm):
                self.optimizer.step()
                stuck = 0
            else:
                self.skipped, stuck = self.skipped + 1, stuck + 1
                if stuck == GIVE_UP:
                    raise ModelError(f"stage {stage.name}: the gradient was not finite {GIVE_UP} times in a row", "BAD_RECIPE", "lower lr or use precision no")
                if self.accelerator.scaler is not None:
                    self.optimizer.step()  # the scaler skips it and lowers its scale
            self.optimizer.zero_grad()
            for name, value in losses.items():
                total[name].append(value)
            if step % 20 == 19 or step + 1 == stage.steps:
                mean = {k: round(v, 4) for k, v in distributed.mean({k: float(np.mean(v)) for k, v in total.items()}).items()}
                rate = (step + 1 - self.start) * stage.batch / (time.monotonic() - began)
                memory = record.gigabytes()
                bar.set_postfix(mean | {"images/s": round(rate, 1), "GB": memory})
                rates = {"lr": stage.lr * optim.schedule(step, stage.steps, stage.warmup), "rate": round(rate, 2), "skipped": self.skipped, "memory": memory}
                self.log.write(stage.name, step + 1, "train", **rates, **mean)
                total.clear()
            looked = step % stage.every == stage.every - 1 or step + 1 == stage.steps
            if looked and self.worse(self.validate(), step):
                yield step
                tqdm.write(f"{stage.name}: {stage.watch} on val has not fallen for {self.misses} looks; stopped after {step + 1} steps", file=sys.stderr)
                return
            yield step

    def backward(self, parts: list[Batch]) -> dict[str, float]:
        """Gradients of the mean losses over the whole step, all its parts and processes; gives those losses.

        An objective's ``count`` says over how many of a batch each of its losses is a mean (answer tokens, say), so that parts
        weigh what they hold; what it does not count weighs by part.
        """
        counts = [{(name, k): float(c) for name, f in self.found.items() for k, c in (f.count(self.model, part) if hasattr(f, "count") else {}).items()} for part in parts]
        whole = dict(zip(counts[0], distributed.total(*(sum(c[k] for c in counts) for k in counts[0]))))
        share = [{k: c[k] * distributed.world() / max(whole[k], 1.0) for k in c} for c in counts]
        self.refuse_misspelt({k for _, k in whole})
        if self.sharded:
            self.refuse_unlike(parts)
        logged: dict[str, float] = defaultdict(float)
        order = {id(part): i for i, part in enumerate(parts)}

        def forward(part: Batch, between: bool):
            for objective in self.found.values():
                if hasattr(objective, "before"):
                    part = objective.before(self.model, part)
            with self.accelerator.autocast():
                return self.module(part, between)

        def weighed(losses: dict[str, dict], i: int) -> dict[str, torch.Tensor]:
            return {k: v * self.stage.weights.get(k, 1.0) * share[i].get((name, k), 1 / len(parts)) for name, group in losses.items() for k, v in group.items()}

        def note(losses):
            for name, value in losses.items() if NOTHING not in losses else ():
                logged[name] += float(value.detach()) / (self.stage.weights.get(name, 1.0) or 1.0)

        if self.between is not None and len(parts) > 1:
            labels = torch.cat([self.between.labels(part) for part in parts]) if hasattr(self.between, "labels") else None

            def chunk(part: Batch):
                vectors, losses, _ = forward(part, False)
                return vectors, weighed(losses, order[id(part)])

            def loss(*vectors):
                with self.accelerator.autocast():
                    return {k: v * self.stage.weights.get(k, 1.0) for k, v in self.between.between(self.model, *vectors, labels).items()}

            note(savers.cached(chunk, parts, loss, self.accelerator.backward, self.apart))
            return dict(logged)
        for i, part in enumerate(parts):
            with self.apart() if i + 1 < len(parts) else contextlib.nullcontext():
                losses = weighed(forward(part, True)[1], i)
                if losses:
                    self.accelerator.backward(sum(losses.values()))
            note(losses)
        return dict(logged)

    def refuse_misspelt(self, counted: set[str]) -> None:
        """Weights of losses that no objective of the stage has; which ones one without ``count`` has is not known."""
        if all(hasattr(f, "count") or hasattr(f, "vectors") for f in self.found.values()):
            losses = counted | {n for n, f in self.found.items() if hasattr(f, "vectors")}
            if unknown := [k for k in self.stage.weights if k not in losses]:
                raise ModelError(f"stage {self.stage.name}: weights hold {unknown[0]!r}, but its losses are {', '.join(sorted(losses))}", "BAD_RECIPE")
            if self.stage.watch not in ("loss", *losses):
                raise ModelError(f"stage {self.stage.name} watches {self.stage.watch!r}, but its losses are {', '.join(sorted(losses))}", "BAD_RECIPE")

    def refuse_unlike(self, parts: list[Batch]) -> None:
        """Processes that split parameters go through the same parts of the model together; one that passed over a part would leave the others waiting."""
        kinds = [(len(part.ids) > 0, sorted(part.images)) for part in parts]
        if any(other != kinds for other in distributed.gathered([kinds])):
            raise ModelError(f"stage {self.stage.name}: in one step the processes see different kinds of data (text or none, other encoders, or fewer images)", "BAD_RECIPE",
                             "leave out --shard, or mix only sets of one kind of image, all with text or all without")  # fmt: skip

    def apart(self):
        """Where a part's gradients are not yet added up over the processes."""
        return contextlib.nullcontext() if self.sharded else self.accelerator.no_sync(self.module)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses over the val cases without augmentation, every conversation drawn from the same seed; {} without any."""
        self.module.eval()
        total = defaultdict(list)
        size = self.stage.chunk or self.stage.batch
        for i in range(0, len(self.val), size):
            part = self.val[i : i + size]
            lots = [np.random.default_rng([self.seed, i + k]) for k in range(len(part))]
            batch = draw(part, self.tokenizer, lots, self.stage.turns * 2, self.stage.kinds, 0.0, self.stage.pack, "outline" in self.found).to(self.accelerator.device)
            seed_everything(self.seed, i)
            for objective in self.found.values():
                if hasattr(objective, "before"):
                    batch = objective.before(self.model, batch)
            with self.accelerator.autocast(), contrastive.alone():  # all processes look at the same pairs
                losses = self.module(batch)[1]
            for name, value in ((k, v) for group in losses.values() for k, v in group.items()):
                total[name].append(float(value))
        return {k: round(float(np.nanmean(v)), 4) for k, v in total.items()}

    def worse(self, scores: dict[str, float], step: int) -> bool:
        """Log a look at val; whether it was one too many without a lower score."""
        if not scores:
            return False
        self.log.write(self.stage.name, step + 1, "val", **scores)
        if self.stage.watch != "loss" and self.stage.watch not in scores:
            raise ModelError(f"stage {self.stage.name} watches {self.stage.watch!r}; val has {', '.join(scores)}", "BAD_RECIPE")
        now = scores[self.stage.watch] if self.stage.watch != "loss" else sum(self.stage.weights.get(k, 1.0) * v for k, v in scores.items())
        if now < self.best:
            self.best, self.misses = now, 0
            if self.stage.patience is not None:
                optimizer = self.optimizer if self.sharded else self.optimizer.optimizer
                checkpoint.save(self.out / "checkpoints/best", self.model, optimizer, {"stage": self.number, "step": step + 1}, None, self.sharded)
        else:
            self.misses += 1
        return self.stage.patience is not None and self.misses >= self.stage.patience


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
