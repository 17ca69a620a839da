"""What a system is: a model's configuration, the stages that train it, and the tasks that score it.

A file in this folder that defines ``RECIPE`` is a recipe; so is a user's own file given by path.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import ModelError


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Args:
        objective: names of train/objectives.py, or of heads that bring one, joined by "+".
        options: {objective: {argument: value}}, e.g. {"mask": {"tversky": (0.3, 0.7)}}. weights: {loss: factor}, 1 where none.
        train: {pattern (fnmatch) of parameters: share of ``lr``}; 0 freezes, the last pattern that fits counts, what none
            fits is frozen. A tuple of patterns: all at ``lr``.
        lora: {pattern of linear layers: rank}: the layers' own weights are frozen and what was added is merged into them
            when the stage ends.
        data: {data set: weight} of the mixture; a data set is a folder under the data root.
        lr: peak learning rate, reached after ``warmup`` steps; then a cosine down to 1 %.
        steps: optimiser steps; or epochs: times that as many cases are drawn as the sets hold, times their number.
        batch: cases a step, over all processes. chunk: cases a forward pass of one process, all of them when None; losses
            and gradients are those of the whole batch, contrastive ones too (GradCache).
        turns: conversations a case at most. kinds: {kind of conversation: weight}. pack: tokens of a row that several
            conversations share; None gives each its own row.
        halved: share of the steps, from the first, that see pictures at half their (H, W): a quarter of the work, for much of what
            there is to learn (progressive learning; Tan and Le 2021, arXiv:2104.00298, section 4). Only without ``turns``; val is looked at whole.
        augment: strength, 0 for none. flip: share of the cases drawn as their mirror image, words and sides exchanged.
        every: steps between two looks at val. watch: the val loss that is to fall, or "loss", their sum. patience: looks
            without a lower one after which the stage ends with its best weights; None goes on to the end.
        dropout is the parts' own.
    """

    name: str
    objective: str
    train: Mapping[str, float] | tuple[str, ...]
    data: Mapping[str, float]
    lr: float
    steps: int | None = None
    epochs: float | None = None
    batch: int = 16
    chunk: int | None = None
    turns: int = 4
    kinds: Mapping[str, float] = field(default_factory=dict)
    pack: int | None = None
    halved: float = 0.0
    augment: float = 1.0
    flip: float = 0.0
    warmup: int = 50
    weight_decay: float = 0.05
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    lora: Mapping[str, int] = field(default_factory=dict)
    every: int = 250
    watch: str = "loss"
    patience: int | None = None

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ModelError(f"stage {self.name}: give steps or epochs, one of them", "BAD_RECIPE")
        if wrong := next((n for n in ("batch", "every", "chunk") if not (isinstance(v := getattr(self, n), int) and v >= 1 or n == "chunk" and v is None)), None):
            raise ModelError(f"stage {self.name}: {wrong} is {getattr(self, wrong)!r}", "BAD_RECIPE", "give a whole number, 1 or more")
        if not 0 <= self.halved <= 1:
            raise ModelError(f"stage {self.name}: halved is {self.halved!r}", "BAD_RECIPE", "give a share of the steps, 0 to 1")
        for what in ("data", "weights", "kinds"):
            if wrong := next((f"{k}: {w!r}" for k, w in getattr(self, what).items() if not isinstance(w, int | float) or not w >= 0), None):
                raise ModelError(f"stage {self.name}: {what} holds {wrong}", "BAD_RECIPE", "a weight is a number, 0 or more")
        if not any(w > 0 for w in self.data.values()):
            raise ModelError(f"stage {self.name}: no data set has a weight above 0", "BAD_RECIPE")

    def share(self, parameter: str) -> float:
        """Share of ``lr`` that a parameter learns with, 0 when it is frozen."""
        patterns = self.train if isinstance(self.train, Mapping) else dict.fromkeys(self.train, 1.0)
        return next((share for pattern, share in reversed(patterns.items()) if fnmatch(parameter, pattern)), 0.0)


@dataclass(frozen=True)
class Recipe:
    """A system as one file.

    Args:
        source: the paper or repository it follows. departs: what differs from it.
        model: (tokenizer, **args) -> MedVLMConfig.
        samples: (samples of one image as the data set gives them, data set, split) -> conversations to learn from.
        tokenizer: (texts, args) -> tokenizer, made once for a run.
        stages: in order. tasks: what ``medvlm evaluate`` scores it by.
        args: of the model. scales: {name: settings as :func:`override` takes them}; ``stages`` and ``args`` are scale "tiny".
        finish: (model, tokenizer, val samples) -> what it found, e.g. calibration; or None.
    """

    name: str
    source: str
    model: Callable[..., Any]
    samples: Callable[[list[Any], str, str], Iterable[Any]]
    tokenizer: Callable[[Iterable[str], Mapping[str, Any]], Any]
    stages: tuple[Stage, ...]
    tasks: tuple[str, ...] = ()
    departs: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    finish: Callable[..., dict] | None = None

    def at(self, scale: str) -> Recipe:
        """The recipe at a scale.

        Raises:
            ModelError: BAD_RECIPE, naming the scales there are.
        """
        if scale == "tiny":
            return self
        if scale not in self.scales:
            raise ModelError(f"recipe {self.name} has no scale {scale!r}; there are: {', '.join(('tiny', *self.scales))}", "BAD_RECIPE")
        return override(self, self.scales[scale])


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
        try:
            recipe = runpy.run_path(name).get("RECIPE")
        except TypeError as error:  # a misspelt field of Stage or Recipe
            word = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if word is None:
                raise
            fields = [f.name for part in (Stage, Recipe) for f in dataclasses.fields(part)]
            raise ModelError(f"{name}: {error}{_nearest(word.group(1), fields)}", "BAD_RECIPE") from error
        except (ImportError, SyntaxError, NameError, AttributeError) as error:
            raise ModelError(f"{name} cannot be run: {type(error).__name__}: {error}", "BAD_RECIPE") from error
        if not isinstance(recipe, Recipe):
            raise ModelError(f"{name} does not define RECIPE = Recipe(...)", "BAD_RECIPE")
        return recipe
    return find("recipes", name, "RECIPE").RECIPE


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """The recipe with ``stages.NAME.FIELD=VALUE`` (FIELD.KEY=VALUE in a mapping; ``*`` for every stage) and ``args.NAME=VALUE`` applied; values are JSON or plain words.

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
            case ["stages", stage, name, *keys] if eq:
                stages = {s.name: s for s in recipe.stages}
                if stage not in (*stages, "*"):
                    raise ModelError(f"recipe {recipe.name} has no stage {stage!r}{_nearest(stage, stages)}", "BAD_RECIPE")
                fields = {f.name: f for f in dataclasses.fields(Stage)}
                if name not in fields:
                    raise ModelError(f"Stage has no {name!r}{_nearest(name, fields)}", "BAD_RECIPE")
                for one in stages if stage == "*" else (stage,):
                    stages[one] = dataclasses.replace(stages[one], **_fitting(stages[one], name, _within(getattr(stages[one], name), keys, value), text))
                recipe = dataclasses.replace(recipe, stages=tuple(stages.values()))
            case _:
                raise ModelError(f"cannot read {setting!r}: write stages.NAME.FIELD=VALUE or args.NAME=VALUE", "BAD_RECIPE")
    return recipe


def _fitting(stage: Stage, name: str, value: Any, text: str) -> dict[str, Any]:
    """The fields to set: a value of the field's own type; steps and epochs replace each other.

    Raises:
        ModelError: BAD_RECIPE for another type.
    """
    hint = typing.get_type_hints(Stage)[name]
    kinds = {typing.get_origin(h) or h for h in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,))}
    if tuple in kinds and isinstance(value, str | list):
        value = (value,) if isinstance(value, str) else tuple(value)
    if float in kinds and type(value) is int:
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, tuple(kinds)):
        raise ModelError(f"stages.{stage.name}.{name} is {' or '.join(sorted(k.__name__ for k in kinds))}, not {text!r}", "BAD_RECIPE")
    other = {"steps": "epochs", "epochs": "steps"}.get(name)
    return {name: value} | ({other: None} if other and value is not None else {})


def _within(there: Any, keys: Sequence[str], value: Any) -> Any:
    """A mapping with the value put at a path of keys: ``data.vqa_rad=2`` changes one weight and leaves the others."""
    if not keys:
        return value
    there = there if isinstance(there, Mapping) else {}
    return {**there, keys[0]: _within(there.get(keys[0]), keys[1:], value)}


def _nearest(word: str, there: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(there), 1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(there)}"
