"""A made-up data set of chest X-rays, and a recipe on it that trains in seconds; also given to the command as a file."""

import contextlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import tiny
from PIL import Image as Pillow

from medvlm.recipes.base import Recipe, Stage
from medvlm.sample import SEG, Mask, Turn
from medvlm.vlm import MedVLMConfig

WORDS = {"right_lung": "right lung", "left_lung": "left lung", "consolidation": "consolidation"}


def xray(rng, sick: bool):
    """Two dark lungs on a grey chest, a bright spot in the right one (image left) when it is ill."""
    h, w = np.ogrid[:56, :64]
    top, wide = rng.integers(-3, 4), rng.integers(9, 12)
    right = ((h - 28 - top) / 20) ** 2 + ((w - 18) / wide) ** 2 < 1
    left = ((h - 28 - top) / 20) ** 2 + ((w - 46) / wide) ** 2 < 1
    spot = ((h - 28 - top) ** 2 + (w - 18) ** 2 < 36) & bool(sick)
    picture = np.full((56, 64), 150.0) - 110 * (right | left) + 90 * spot + rng.normal(0, 6, (56, 64))
    return picture.clip(0, 255).astype(np.uint8), {"right_lung": right, "left_lung": left, **({"consolidation": spot} if sick else {})}


def write(root: Path, count: int = 10) -> Path:
    """``root/drawn``: every second one ill; the last two are val."""
    folder, rng, lines = root / "drawn", np.random.default_rng(0), []
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for i in range(count):
        picture, masks = xray(rng, i % 2)
        Pillow.fromarray(picture).save(folder / f"images/{i}.png")
        files = {}
        for name, mask in masks.items():
            files[name] = f"masks/{i}_{name}.png"
            Pillow.fromarray(mask).save(folder / files[name])
        qa = [{"qid": f"q{i}", "question": "Is there consolidation in the lungs?", "answer": "yes" if i % 2 else "no"}]
        lines.append({"id": f"x{i}", "image": f"images/{i}.png", "modality": "xray", "patient": f"p{i}", "labels": {"view": "PA"}, "split": "val" if i >= count - 2 else "train",
                      "findings": {"consolidation": i % 2, "cardiomegaly": None}, "mask": {"type": "binary", "files": files}, "qa": qa,
                      "text": ("Consolidation on the right." if i % 2 else "No consolidation.") + f" Film {i}."})  # fmt: skip
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def samples(group, name, split):
    """One mask a target, an empty one where the row says that it is absent; its question; a question a finding; its text."""
    labels = {**group[0].labels, "modality:xray": 1.0}
    (image,) = group[0].images.values()

    def said(sample, question, answer, kind, **more):
        asked = (Turn("user", question), Turn("assistant", answer))
        return replace(sample, turns=asked, labels=labels, meta={**sample.meta, "kind": kind}, **more)

    drawn = {WORDS[m.label]: m.array for s in group for m in s.masks}
    for target in ("right lung", "left lung", "consolidation"):
        mask = Mask(image.id, target, drawn.get(target, np.zeros(image.shape[1:], bool)))
        yield said(group[0], f"Segment the {target}.", SEG, "segment", masks=(mask,))
    for s in group:
        if s.question:
            yield said(s, s.question, s.answer, "asked", masks=())
        elif s.answer:
            yield said(s, "Describe the film.", s.answer, "report", masks=())
    yield said(group[0], "Is there consolidation in this chest X-ray?", "yes" if labels["consolidation"] else "no", "finding", masks=())


def config(tokenizer, width: int = 32):
    return tiny.config(tokenizer)


def contrast(tokenizer, width: int = 16) -> MedVLMConfig:
    """A picture tower without batch statistics and a text tower, for contrastive stages."""
    vit = {"file": "image", "args": {"library": "transformers", "size": [32, 32], "model": {
        "model_type": "vit", "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}}}  # fmt: skip
    text = {"model_type": "clip_text_model", "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(tokenizer),
            "max_position_embeddings": 32, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}  # fmt: skip
    return MedVLMConfig(
        {"encoders": {"picture": vit, "text": {"file": "text", "args": text}}, "heads": {"contrast": {"file": "contrast", "args": {"dim": width, "text_dim": width, "embed_dim": 8}}}},
        {"name": "contrast", "routes": {"*": "picture"}, "reads": ["xray"], "labels": list(tiny.FINDINGS)},
    )  # fmt: skip


ALL = ("*",)
RECIPE = Recipe(
    name="drawn", source="a test", model=config, samples=samples, tokenizer=lambda texts, args: tiny.tokenizer(),
    stages=(Stage("see", "lm+mask+classify", ALL, {"drawn": 1.0}, lr=2e-3, steps=4, batch=2, turns=3, warmup=1, augment=0.5),
            Stage("speak", "lm", ("projectors.*", "lm.*"), {"drawn": 1.0}, lr=1e-3, steps=2, batch=2, turns=2, warmup=1)),
)  # fmt: skip
CONTRAST = replace(
    RECIPE, name="contrast", model=contrast, stages=(Stage("pair", "clip", ALL, {"drawn": 1.0}, lr=1e-3, steps=4, batch=8, warmup=1, augment=0.0),),
)  # fmt: skip


@contextlib.contextmanager
def stopped_at(draw: int):
    """SIGTERM comes while a run in this process makes its batch of this number, from 1."""
    from unittest import mock

    import medvlm.train.batches as batches

    real, left = batches.draw, iter(range(draw - 1, -1, -1))

    def stops(*args):
        if next(left, None) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with mock.patch.object(batches, "draw", stops):
        yield
