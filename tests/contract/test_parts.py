"""Every file of the part folders keeps the contract of its kind; the folder is the registry."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

from medvlm import parts, vlm
from medvlm.encoders.base import Features
from medvlm.errors import ModelError
from medvlm.recipes.base import Recipe, load

HOUSE = Path(vlm.__file__).parent
PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
CLIP = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
THREE = {"hidden_size": 24, "mlp_dim": 32, "num_layers": 2, "num_heads": 2, "patch": (4, 8, 8)}
ENCODERS = {
    "timm pyramid": ("image", {"model": "test_byobnet", "size": (64, 64)}),
    "timm swin": ("image", {"model": {"name": "swin_tiny_patch4_window7_224", "depths": (1, 1, 1, 1), "embed_dim": 24}, "size": (64, 64)}),
    "timm vit": ("image", {"model": "test_vit", "size": (32, 32), "channels": 3}),
    "timm dinov2": ("image", {"model": {"name": "vit_small_patch14_reg4_dinov2", "depth": 2, "embed_dim": 48, "num_heads": 2}, "size": (28, 28)}),
    "timm dinov3": ("image", {"model": {"name": "vit_small_patch16_dinov3", "depth": 2, "embed_dim": 48, "num_heads": 2}, "size": (32, 32)}),
    "timm eva": ("image", {"model": {"name": "eva02_tiny_patch14_224", "depth": 2, "embed_dim": 48, "num_heads": 2}, "size": (28, 28)}),
    "timm siglip": ("image", {"model": {"name": "vit_base_patch16_siglip_224", "depth": 2, "embed_dim": 48, "num_heads": 2}, "size": (32, 32), "feature_layer": -2}),
    "open_clip vit": ("image", {"library": "open_clip", "model": {"embed_dim": 16, "vision_cfg": CLIP}}),
    "open_clip resnet": ("image", {"library": "open_clip", "model": {"embed_dim": 16, "vision_cfg": {"image_size": 64, "layers": (1, 1, 1, 1), "width": 8, "head_width": 16}}}),
    "open_clip timm": ("image", {"library": "open_clip", "model": {"vision_cfg": {"image_size": 32, "timm_model_name": "test_vit3", "timm_pool": "map"}}}),
    "transformers clip": ("image", {"library": "transformers", "model": {"model_type": "clip_vision_model", "intermediate_size": 48, **PLAIN}, "feature_layer": -2}),
    "transformers siglip": ("image", {"library": "transformers", "model": {"model_type": "siglip_vision_model", "intermediate_size": 48, **PLAIN}}),
    "transformers dinov2": ("image", {"library": "transformers", "model": {"model_type": "dinov2", **PLAIN}}),
    "transformers dinov3": ("image", {"library": "transformers", "model": {"model_type": "dinov3_vit", "intermediate_size": 48, **PLAIN}}),
    "monai vit": ("volume", {"net": "vit", "size": (8, 16, 16), "model": THREE, "windows": ("medgemma",)}),
    "monai swin": ("volume", {"net": "swin_unetr", "size": (32, 64, 64), "model": {"patch": (1, 2, 2), "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window": 3}}),
    "monai segresnet": ("volume", {"net": "segresnet", "size": (8, 16, 16), "model": {"blocks_down": (1, 1, 1)}}),
    "monai resnet": ("volume", {"net": "resnet", "size": (16, 32, 32), "model": {"layers": (1, 1, 1, 1), "block_inplanes": (8, 16, 32, 64)}}),
    "slices": ("slices", {"encoder": {"model": "test_vit"}, "size": (3, 32, 32), "windows": ("lung",), "chunk": 2, "levels": True}),
    "unet": ("unet", {"size": (32, 48), "dims": (16, 64)}),
    "tiles": ("tiles", {"encoder": {"model": "test_byobnet"}, "size": (64, 128), "tile": (64, 64)}),
}  # fmt: skip
"""Each kind of encoder of pictures and volumes, small enough for a test."""
PROJECTORS = {
    "linear": {}, "mlp": {}, "resampler": {"queries": 3, "heads": 2}, "shuffle": {"factor": (1, 2)}, "shuffle 3-D": {"factor": (1, 2, 2)},
    "pool": {"grid": (1, 2)}, "pool 3-D": {"grid": (1, 2, 2)}, "compress": {"keep": 1, "merge": 1}, "interslice": {},
}  # fmt: skip
"""Each projector's arguments beside its dimensions; the rest of the name after a space tells variants apart."""
GRIDS = ((2, 4), (4, 4), (2, 2, 4), (3, 2, 2))


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
    listed = parts.names(folder, attribute)
    assert files(folder, attribute).keys() <= listed.keys() and files(folder, attribute)
    assert "base" not in listed and "__init__" not in listed
    assert all(about.strip() and len(about) < 140 for about in listed.values()), listed


@pytest.mark.parametrize(("folder", "name"), PARTS)
def test_a_part_says_what_it_builds_from(folder, name):
    module = importlib.import_module(f"medvlm.{folder}.{name}")
    assert parts.find(folder, name) is module
    assert parts.names(folder)[name] == module.__doc__.splitlines()[0]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def encoder(name: str):
    file, args = ENCODERS.get(name, (name, {}))
    return vlm.build_part("encoders", file, args)


def projector(name: str, dim: int):
    return vlm.build_part("projectors", name.split()[0], {"dim": dim, "lm_dim": 12, **PROJECTORS.get(name, {})})


def project(made, features: Features):
    return made(features, torch.rand(len(features.tokens), 12)) if made.guided else made(features)


def strides(stride, rank: int) -> tuple[int, ...]:
    return (stride,) * rank if isinstance(stride, int) else stride


ALL_ENCODERS = [*ENCODERS, *(files("encoders", "build").keys() - {file for file, _ in ENCODERS.values()} - {"text"})]
ALL_PROJECTORS = [*PROJECTORS, *(files("projectors", "build").keys() - {name.split()[0] for name in PROJECTORS})]


@torch.no_grad()
@pytest.mark.parametrize("name", ALL_ENCODERS)
def test_an_encoder_gives_features_at_any_multiple_of_its_stride(name):
    made = encoder(name).eval()
    spec, stride = made.spec, strides(made.stride, len(made.spec.size))
    assert len(spec.mean) == len(spec.std) == spec.channels and (not spec.windows or len(spec.windows) == spec.channels)
    for size in (spec.size, (spec.size[0] + stride[0], *(s + 2 * k for s, k in zip(spec.size[1:], stride[1:])))):
        found = made(torch.rand(2, spec.channels, *size))
        assert found.grid == made.grid(size) == tuple(s // k for s, k in zip(size, stride))
        assert found.tokens.shape == (2, prod(found.grid), made.dim) and found.pooled.shape == (2, made.dim)
        assert [m.shape[1] for m in found.levels] == list(made.level_dims)
        levels = [strides(k, len(size)) for k in made.level_strides]
        assert [tuple(m.shape[2:]) for m in found.levels] == [tuple(s // k for s, k in zip(size, level)) for level in levels]
        assert sorted(levels) == levels
    with pytest.raises(ModelError, match="stride") as refused:
        made(torch.rand(1, spec.channels, *(s + 1 for s in spec.size)))
    assert refused.value.code == "BAD_ARGUMENT"


@torch.no_grad()
@pytest.mark.parametrize("name", ALL_ENCODERS)
def test_the_tokens_of_an_image_are_in_reading_order(name):
    """The last axis runs fastest: a mark in one block moves the tokens there most. No exchange of axes leaves that block."""
    made = encoder(name).eval()
    stride = strides(made.stride, len(made.spec.size))
    counts, at = ((2, 3), (1, 0)) if len(stride) == 2 else ((2, 3, 4), (1, 1, 0))
    block = [k * max(1, 8 // k) for k in stride]
    blank = torch.zeros(1, made.spec.channels, *(n * b for n, b in zip(counts, block)))
    marked = blank.clone()
    marked[(..., *(slice(i * b, (i + 1) * b) for i, b in zip(at, block)))] = torch.randn(block)
    change = (made(marked).tokens - made(blank).tokens).abs().sum(-1).reshape(1, *made.grid(tuple(blank.shape[2:])))
    shrink = torch.nn.functional.adaptive_avg_pool2d if len(stride) == 2 else torch.nn.functional.adaptive_avg_pool3d
    assert shrink(change, counts).argmax() == torch.arange(prod(counts)).reshape(counts)[at]


@pytest.mark.parametrize("name", ALL_ENCODERS)
def test_every_encoder_learns_through_every_projector_that_fits(name):
    """Every parameter that says it is trained gets a gradient from the language model's tokens alone."""
    made = encoder(name).train()
    found = made(torch.rand(2, made.spec.channels, *made.spec.size))
    fitting = 0
    for kind in ALL_PROJECTORS:
        through = projector(kind, made.dim)
        try:
            count = through.count(found.grid)
        except ModelError as refused:
            assert refused.code == "BAD_RECIPE" and str(tuple(found.grid)) in str(refused)
            continue
        fitting += 1
        out = project(through, found)
        assert out.shape == (2, count, 12)
        for p in (*made.parameters(), *through.parameters()):
            p.grad = None
        out.square().sum().backward(retain_graph=True)
        silent = [n for part in (made, through) for n, p in part.named_parameters() if p.requires_grad and p.grad is None]
        assert silent == [], (kind, silent)
    assert fitting >= 4


@torch.no_grad()
@pytest.mark.parametrize("name", ALL_ENCODERS)
def test_an_encoder_sees_the_same_after_its_weights_are_read_back(name):
    made = encoder(name).eval()
    torch.manual_seed(1)
    again = encoder(name).eval()
    x = torch.rand(1, made.spec.channels, *made.spec.size)
    assert not torch.equal(again(x).tokens, made(x).tokens)
    again.load_state_dict({k: v.clone() for k, v in made.state_dict().items()})
    for a, b in zip(made(x), again(x)):
        assert all(torch.equal(p, q) for p, q in zip(a, b)) if isinstance(a, tuple) and a and isinstance(a[0], torch.Tensor) else a == b if isinstance(a, tuple) else torch.equal(a, b)


@torch.no_grad()
def test_a_saved_model_of_every_encoder_sees_the_same(tmp_path):
    """from_pretrained builds on the meta device, which wipes buffers that are computed and not saved."""
    names = {name.replace(" ", "_"): name for name in ALL_ENCODERS}
    parts = {key: dict(zip(("file", "args"), ENCODERS.get(name, (name, {})))) for key, name in names.items()}
    made = vlm.MedVLM(vlm.MedVLMConfig(parts={"encoders": parts})).eval()
    made.save_pretrained(tmp_path)
    again = vlm.MedVLM.from_pretrained(tmp_path).eval()
    for key in names:
        spec = made.encoders[key].spec
        assert again.encoders[key].spec == spec
        x = torch.rand(1, spec.channels, *spec.size)
        seen, reseen = (m.encode({key: x})[key].tokens for m in (made, again))
        assert torch.equal(seen, reseen), (key, (seen - reseen).abs().max())


@pytest.mark.parametrize("name", ALL_PROJECTORS)
def test_a_projector_keeps_its_count_and_refuses_what_does_not_fit(name):
    made, taken = projector(name, 8), 0
    for grid in GRIDS:
        features = Features(torch.rand(2, prod(grid), 8), grid, torch.rand(2, 8))
        try:
            count = made.count(grid)
        except ModelError as refused:
            assert refused.code == "BAD_RECIPE" and str(grid) in str(refused)
            with pytest.raises(ModelError, match=re.escape(str(grid))):
                project(made, features)
            continue
        taken += 1
        assert project(made, features).shape == (2, count, 12)
        with pytest.raises(ModelError, match="16 numbers .* takes 8") as refused:
            project(made, features._replace(tokens=torch.rand(2, prod(grid), 16)))
        assert refused.value.code == "BAD_RECIPE"
    assert taken


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
            assert parts.find(folder, part["file"])


def run_guide(guide: str, folder: str, file: str, home: Path) -> str:
    """The file of a guide, dropped into a copy of the package, used by the guide's own example: what that prints."""
    part, use = re.findall(r"```python\n(.*?)```", (HOUSE.parent / "docs" / guide).read_text(), re.DOTALL)
    shutil.copytree(HOUSE, home / "medvlm", ignore=shutil.ignore_patterns("__pycache__", "models", "demo"))
    shutil.copytree(HOUSE.parent / "tests", home / "tests", ignore=shutil.ignore_patterns("__pycache__", "test_*"))
    (home / "medvlm" / folder / f"{file}.py").write_text(part)
    (home / "medvlm" / folder / "notes.py").write_text('"""No part: it builds nothing."""\n')
    code = f"from medvlm import cli, vlm\nassert cli.main(['list', {folder!r}]) == 0\n{use}\ntry: vlm.build_part({folder!r}, 'notes')\nexcept Exception as e: print(e.code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr
    listed = [line.split(None, 1) for line in done.stdout.splitlines()]
    assert [file, part.splitlines()[0].strip('"')] in listed and "notes" not in [line[0] for line in listed if line]
    assert done.stdout.splitlines()[-1] == "NO_SUCH_PART"
    return done.stdout


@pytest.mark.parametrize(("guide", "folder", "file"), [("add-an-encoder.md", "encoders", "mirror"), ("add-a-projector.md", "projectors", "corners")])
def test_a_new_file_is_a_new_part(guide, folder, file, tmp_path):
    """Dropped into the folder, the guide's part is listed, built and trained within a MedVLM; no table is edited."""
    told = run_guide(guide, folder, file, tmp_path)
    before, after = (float(x) for x in re.search(r"loss (\S+) -> (\S+)", told).groups())
    assert after < before


def test_lists_become_tuples_and_wrong_arguments_are_named():
    with pytest.raises(ModelError, match="side") as refused:
        vlm.build_part("projectors", "mlp", {"dim": 8, "lm_dim": 12, "side": [1, 2]})
    assert refused.value.code == "BAD_RECIPE"


def test_an_installed_distribution_brings_its_parts(tmp_path, monkeypatch):
    """They are listed and built by name beside our own; a file that is only there is not."""
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[medvlm.projectors]\nhalved = others_halved\n")
    (tmp_path / "others_halved.py").write_text("from medvlm.projectors.linear import build as whole\n\n\ndef build(dim, lm_dim):\n    return whole(dim, lm_dim)\n")
    monkeypatch.syspath_prepend(tmp_path)
    parts._installed.cache_clear()
    try:
        assert parts.names("projectors")["halved"] == "from others" and "halved" not in parts.names("encoders")
        assert parts.find("projectors", "halved").build(8, 4).count((2, 3)) == 6
        with pytest.raises(ModelError) as error:
            parts.find("projectors", "others_halved")
        assert error.value.code == "NO_SUCH_PART"
    finally:
        parts._installed.cache_clear()
