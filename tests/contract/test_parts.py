"""Every file of the part folders keeps the contract of its kind; the folder is the registry."""

import importlib
import json
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

from medvlm import vlm
from medvlm.recipes.base import Recipe, load

HOUSE = Path(vlm.__file__).parent
TINY = {"image": {"model": "test_byobnet", "size": (64, 64)}}
"""Arguments that make an encoder small enough for a test; an encoder that is not here is built as it comes."""


def files(folder: str, attribute: str) -> dict[str, Path]:
    """The files of a folder that define ``attribute`` at their top, found without importing anything of ours."""
    found = {}
    for path in (HOUSE / folder).glob("*.py"):
        if any(line.startswith((f"def {attribute}(", f"{attribute} =", f"{attribute}:")) for line in path.read_text().splitlines()):
            found[path.stem] = path
    return found


PARTS = [(folder, name) for folder in ("encoders", "projectors", "heads") for name in files(folder, "build")]


@pytest.mark.parametrize(("folder", "attribute"), [("encoders", "build"), ("projectors", "build"), ("heads", "build"), ("recipes", "RECIPE")])
def test_the_folder_is_the_registry(folder, attribute):
    listed = vlm.names(folder, attribute)
    assert files(folder, attribute).keys() <= listed.keys() and files(folder, attribute)
    assert "base" not in listed and "__init__" not in listed
    assert all(about.strip() and len(about) < 140 for about in listed.values()), listed


@pytest.mark.parametrize(("folder", "name"), PARTS)
def test_a_part_says_what_it_builds_from(folder, name):
    module = importlib.import_module(f"medvlm.{folder}.{name}")
    assert vlm.find(folder, name) is module
    assert vlm.names(folder)[name] == module.__doc__.splitlines()[0]


@pytest.mark.parametrize("name", files("encoders", "build"))
def test_an_encoder_gives_features_at_any_multiple_of_its_stride(name):
    torch.set_num_threads(1)
    encoder = vlm.build_part("encoders", name, TINY.get(name)).eval()
    spec, stride = encoder.spec, encoder.stride
    assert all(s % stride == 0 for s in spec.size) and len(spec.mean) == len(spec.std) == spec.channels
    for size in (spec.size, (spec.size[0] + stride, *(s + 2 * stride for s in spec.size[1:]))):
        with torch.no_grad():
            found = encoder(torch.rand(2, spec.channels, *size))
        assert found.grid == tuple(s // stride for s in size)
        assert found.tokens.shape == (2, prod(found.grid), encoder.dim) and found.pooled.shape == (2, encoder.dim)
        assert [m.shape[1] for m in found.levels] == list(encoder.level_dims)
        assert [tuple(m.shape[2:]) for m in found.levels] == [tuple(s // k for s in size) for k in encoder.level_strides]
        assert sorted(encoder.level_strides) == list(encoder.level_strides)


@torch.no_grad()
def test_the_tokens_of_an_image_are_in_reading_order():
    """The last axis runs fastest: a mark in the lower left corner moves the tokens there most."""
    encoder = vlm.build_part("encoders", "image", {**TINY["image"], "size": (96, 128)}).eval()
    blank = torch.zeros(1, 1, 96, 128)
    marked = blank.clone()
    marked[..., -20:, :20] = 1
    change = (encoder(marked).tokens - encoder(blank).tokens).abs().sum(-1)[0].reshape(3, 4)
    assert divmod(int(change.argmax()), 4) == (2, 0)


@pytest.mark.parametrize("name", files("projectors", "build"))
def test_a_projector_keeps_its_count(name):
    from medvlm.encoders.base import Features

    projector = vlm.build_part("projectors", name, {"dim": 8, "lm_dim": 12})
    for grid in ((2, 3), (4, 4)):
        out = projector(Features(torch.rand(2, prod(grid), 8), grid, torch.rand(2, 8)))
        assert out.shape == (2, projector.count(grid), 12)


@pytest.mark.parametrize("name", files("recipes", "RECIPE"))
def test_a_recipe_is_complete_and_its_config_is_plain_json(name):
    recipe = load(name)
    assert isinstance(recipe, Recipe) and recipe.name == name and recipe.source and recipe.stages
    assert len({s.name for s in recipe.stages}) == len(recipe.stages)
    import tiny

    from medvlm.train import objectives

    for stage in recipe.stages:
        assert objectives.find(stage.objective) and stage.train and stage.data and 0 < stage.lr < 1 and stage.steps > 0
    config = recipe.model(tiny.tokenizer(), **recipe.args)
    assert json.loads(json.dumps(config.parts)) == json.loads(config.to_json_string())["parts"]
    for folder in vlm.FOLDERS:
        for part in config.parts.get(folder, {}).values():
            assert vlm.find(folder, part["file"])


def test_a_new_file_is_a_new_part(tmp_path):
    """Dropped into the folder, an encoder is listed, found, built and refused like any other; no table is edited."""
    shutil.copytree(HOUSE, tmp_path / "medvlm", ignore=shutil.ignore_patterns("__pycache__", "models", "demo"))
    (tmp_path / "medvlm" / "encoders" / "mirror.py").write_text('''"""A mirror, for a test."""
from ..preprocess import InputSpec
from .base import Encoder

class Mirror(Encoder):
    spec, dim, stride = InputSpec((8, 8)), 1, 8

def build(side: int = 8):
    return Mirror()
''')
    (tmp_path / "medvlm" / "encoders" / "notes.py").write_text('"""No part: it builds nothing."""\n')
    code = (
        "from medvlm import vlm, cli\nassert cli.main(['list', 'encoders']) == 0\n"
        "print(type(vlm.build_part('encoders', 'mirror', {'side': 3})).__name__)\n"
        "try: vlm.build_part('encoders', 'notes')\nexcept Exception as e: print(e.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.split() == ["mirror", "A", "mirror,", "for", "a", "test."] for line in lines) and "notes" not in lines[0]
    assert lines[-2:] == ["Mirror", "NO_SUCH_PART"]
