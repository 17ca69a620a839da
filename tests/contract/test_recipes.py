"""Every recipe of the folder takes one step per stage on made-up data at its small scale, and its larger scales are read."""

from dataclasses import replace

import pytest

from medvlm import parts
from medvlm.datasets import shapes
from medvlm.predictors import load as load_model
from medvlm.recipes.base import load
from medvlm.train.loop import train

NAMES = list(parts.names("recipes", "RECIPE"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    shapes.write(root / "flat", count=12, rank=2, size=(64, 64))
    shapes.write(root / "deep", count=12, rank=3)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_takes_a_step_in_every_stage(name, root, tmp_path):
    recipe = load(name)
    assert recipe.source and recipe.departs and recipe.tasks and all(parts.names("evaluate", "TASK").get(t) for t in recipe.tasks)
    deep = any(p["file"] in ("volume", "slices") for p in recipe.model(recipe.tokenizer(["a word"], recipe.args), **recipe.args).parts["encoders"].values())
    stages = tuple(replace(s, steps=1, epochs=None, batch=4, chunk=2, turns=0 if s.halved else 2, data={"deep" if deep else "flat": 1.0}, every=9) for s in recipe.stages)
    train(replace(recipe, stages=stages, finish=None), root, tmp_path / "run", device="cpu")
    assert load_model(tmp_path / "run", "cpu").name


@pytest.mark.parametrize("name", NAMES)
def test_the_larger_scales_of_a_recipe_name_what_there_is(name):
    recipe = load(name)
    for scale in recipe.scales:
        made = recipe.at(scale)
        assert made.stages != recipe.stages and made.args != recipe.args and [s.name for s in made.stages] == [s.name for s in recipe.stages]
