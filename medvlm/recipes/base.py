"""What a system is: a model's configuration, the stages that train it, and the tasks that score it.

A file in this folder that defines ``RECIPE`` is a recipe; so is a user's own file given by path.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelError


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Args:
        objective: names of train/objectives.py joined by "+".
        train: patterns (fnmatch) of the parameters that learn; all others are frozen.
        data: {data set: weight}; a data set is a folder with a manifest.jsonl under the data root.
        lr: peak learning rate. steps: optimiser steps. batch: pictures a step. turns: conversations a picture.
        kinds: {kind of conversation: weight}. augment: strength, 0 = none. dropout is the parts' own.
    """

    name: str
    objective: str
    train: tuple[str, ...]
    data: Mapping[str, float]
    lr: float
    steps: int
    batch: int = 16
    turns: int = 4
    kinds: Mapping[str, float] = field(default_factory=dict)
    augment: float = 1.0
    warmup: int = 50
    weight_decay: float = 0.05


@dataclass(frozen=True)
class Recipe:
    """A system as one file.

    Args:
        source: the paper or repository it follows. departs: what differs from it.
        model: (tokenizer, **args) -> MedVLMConfig.
        samples: (data root, data set, split) -> samples to learn from or to validate on.
        tokenizer: (texts) -> tokenizer, trained once on the first stage's text.
        tasks: what scores it. finish: (model, tokenizer, val samples) -> None, e.g. calibration; or None.
    """

    name: str
    source: str
    model: Callable[..., Any]
    samples: Callable[[Path, str, str], Iterable[Any]]
    tokenizer: Callable[[Iterable[str]], Any]
    stages: tuple[Stage, ...]
    tasks: tuple[str, ...] = ()
    departs: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[..., dict] | None = None


def load(name: str) -> Recipe:
    """A recipe of this package or an installed one by name, or the RECIPE of a Python file given by path.

    Raises:
        ModelError: NO_SUCH_PART, listing the recipes; BAD_RECIPE when the file defines no RECIPE.
    """
    from ..parts import find

    if name.endswith(".py"):
        import runpy

        if not Path(name).is_file():
            raise ModelError(f"there is no recipe file {name}", "BAD_RECIPE")
        recipe = runpy.run_path(name).get("RECIPE")
        if not isinstance(recipe, Recipe):
            raise ModelError(f"{name} does not define RECIPE = Recipe(...)", "BAD_RECIPE")
        return recipe
    return find("recipes", name, "RECIPE").RECIPE


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """The recipe with ``stages.NAME.FIELD=VALUE`` and ``args.NAME=VALUE`` applied; values are JSON or plain words.

    Raises:
        ModelError: BAD_RECIPE, with the nearest name there is.
    """
    for setting in settings:
        path, eq, text = setting.partition("=")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        match path.split("."):
            case ["args", name] if eq:
                accepted = [p.name for p in list(inspect.signature(recipe.model).parameters.values())[1:]]
                if name not in accepted:
                    raise ModelError(f"the model of recipe {recipe.name} takes no {name!r}{_nearest(name, accepted)}", "BAD_RECIPE")
                recipe = dataclasses.replace(recipe, args={**recipe.args, name: value})
            case ["stages", stage, name] if eq:
                stages = {s.name: s for s in recipe.stages}
                if stage not in stages:
                    raise ModelError(f"recipe {recipe.name} has no stage {stage!r}{_nearest(stage, stages)}", "BAD_RECIPE")
                fields = {f.name: f for f in dataclasses.fields(Stage)}
                if name not in fields:
                    raise ModelError(f"Stage has no {name!r}{_nearest(name, fields)}", "BAD_RECIPE")
                old = getattr(stages[stage], name)
                if isinstance(old, tuple):
                    value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
                if isinstance(old, float) and isinstance(value, int):
                    value = float(value)
                if type(value) is not type(old):
                    raise ModelError(f"stages.{stage}.{name} is a {type(old).__name__}, not {text!r}", "BAD_RECIPE")
                stages[stage] = dataclasses.replace(stages[stage], **{name: value})
                recipe = dataclasses.replace(recipe, stages=tuple(stages.values()))
            case _:
                raise ModelError(f"cannot read {setting!r}: write stages.NAME.FIELD=VALUE or args.NAME=VALUE", "BAD_RECIPE")
    return recipe


def _nearest(word: str, there: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(there), 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(there)}"
