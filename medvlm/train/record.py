"""A run's folder: what was run with what, a line a step, the curves as a picture."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "transformers", "timm", "monai", "open_clip_torch", "segment-anything", "accelerate", "peft", "albumentations",
            "numpy", "medvlm-toolkit")  # fmt: skip


def write(out: Path, recipe, data: dict, settings: dict) -> None:
    """``recipe.json``: the resolved recipe, the run's settings, package versions, the data's fingerprints and the state of the source."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    record = {
        "name": recipe.name, "source": recipe.source, "departs": recipe.departs, "args": dict(recipe.args),
        "stages": [dataclasses.asdict(s) for s in recipe.stages], "tasks": list(recipe.tasks), **settings,
        "data": data, "versions": versions, "git": git(Path(__file__).parent),
    }  # fmt: skip
    temporary = out / "recipe.json.new"
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, out / "recipe.json")


def git(folder: Path) -> dict | None:
    """{"commit", "changed": files that differ from it} of the checkout that holds a folder, None where there is none."""
    try:
        ask = lambda *words: subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=20).stdout  # noqa: E731
        return {"commit": ask("rev-parse", "HEAD").strip(), "changed": len(ask("status", "--porcelain", "--untracked-files=no").splitlines())}
    except (OSError, subprocess.SubprocessError):
        return None


def gigabytes() -> float:
    """The most memory used so far: of the GPU where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20), 2)


class Log:
    """``log.jsonl``, and tensorboard's event files where it is installed."""

    def __init__(self, out: Path, active: bool = True):
        self.file = (out / "log.jsonl").open("a+") if active else None
        if self.file is not None and self.file.tell():
            self.file.seek(self.file.tell() - 1)
            if self.file.read(1) != "\n":  # a kill tore the last line
                self.file.write("\n")
        self.board = _board(out) if active else None
        self.steps: dict[str, int] = {}

    def write(self, stage: str, step: int, split: str, **values) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps({"stage": stage, "step": step, "split": split, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            if self.board is not None and isinstance(value, int | float):
                self.board.add_scalar(f"{stage}/{name}/{split}", value, step)

    def close(self) -> None:
        for sink in (self.file, self.board):
            if sink is not None:
                sink.close()


def _board(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))


def lines(out: Path) -> list[dict]:
    """The whole lines of a run's log, of a step written twice (before and after a stop) the later one."""
    found: dict[tuple, dict] = {}
    for text in (out / "log.jsonl").read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the run was killed while it wrote
            continue
        found[line["stage"], line["step"], line["split"]] = line
    return list(found.values())


def curves(out: Path) -> Path:
    """``curves.png``: each loss of each stage over its steps, of train and of val."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    skip = {"stage", "step", "split", "lr", "rate", "skipped", "memory"}
    stages: dict[str, dict[str, dict[str, list]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in lines(out):
        for name in line.keys() - skip:
            stages[line["stage"]][name][line["split"]].append((line["step"], line[name]))
    wide = max((len(losses) for losses in stages.values()), default=1)
    figure = Figure(figsize=(3.2 * wide, 2.6 * max(1, len(stages))), layout="constrained")
    axes = figure.subplots(max(1, len(stages)), wide, squeeze=False)
    for row, (stage, losses) in zip(axes, stages.items()):
        for axis, (name, splits) in zip(row, sorted(losses.items())):
            for split, style in (("train", "-"), ("val", "o--")):
                if splits.get(split):
                    axis.plot(*zip(*sorted(splits[split])), style, markersize=3, linewidth=1, label=split)
            axis.set_title(f"{stage}: {name}", fontsize=9)
            axis.set_xlabel("step", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.legend(fontsize=7, frameon=False)
        for axis in row[len(losses) :]:
            axis.set_visible(False)
    figure.savefig(out / "curves.png", dpi=110)
    return out / "curves.png"
