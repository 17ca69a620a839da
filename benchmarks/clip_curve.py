"""The CLIP loss of 50 steps of medvlm's training loop beside open_clip's own: same weights to begin with, same batches, same settings.

Ours: ``medvlm.train.loop`` with the objective "clip" on captions made of facts. The peer: the model as open_clip reads it after
``medvlm export --to open_clip``, its ClipLoss, torch's AdamW (no decay on vectors, gradient norm cut at 1, same learning rates), on the
pixels and words of the very batches that the loop drew, texts padded to the whole context. Single precision, two threads.

    python benchmarks/clip_curve.py --data DIR [--steps 50] [--batch 64] [--png docs/clip-curve.png] [--json FILE]
"""

import argparse
import copy
import json
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing

from medvlm.export import to_open_clip
from medvlm.language import END, train_tokenizer
from medvlm.preprocess import normalise
from medvlm.recipes import pubmedclip
from medvlm.recipes.base import Recipe, Stage
from medvlm.train import loop, optim
from medvlm.vlm import MedVLMConfig

CONTEXT, WIDTH, SEED = 77, 128, 0


def config(tokenizer) -> MedVLMConfig:
    vision = {"layers": 2, "width": WIDTH, "head_width": 64, "patch_size": 8, "image_size": 64}
    text = {"model_type": "clip_text_model", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu",
            "max_position_embeddings": CONTEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    return MedVLMConfig(
        {"encoders": {"picture": {"file": "image", "args": {"library": "open_clip", "model": {"embed_dim": 64, "vision_cfg": vision}, "size": [64, 64]}},
                      "text": {"file": "text", "args": text}},
         "heads": {"contrast": {"file": "contrast", "args": {"dim": WIDTH, "text_dim": WIDTH, "embed_dim": 64}}}},
        {"name": "curve", "routes": {"*": "picture"}},
    )  # fmt: skip


def tokenizer(texts, args):
    """One that ends each text itself, as open_clip expects."""
    made = train_tokenizer(texts, 1024)
    made.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, made.eos_token_id)])
    return made


def ours(recipe: Recipe, data: str, out: Path):
    """(losses, the model before the first step, its tokenizer, the batches) of a run of the loop."""
    losses, batches, kept = [], [], []
    plain = loop._Stage.backward

    def backward(stage, parts):
        if not kept:
            kept.extend((copy.deepcopy(stage.model), stage.tokenizer))
        found = plain(stage, parts)
        losses.append(found["clip"])
        batches.append(parts[0])
        return found

    loop._Stage.backward = backward
    try:
        loop.train(recipe, data, out, seed=SEED, device="cpu", precision="no")
    finally:
        loop._Stage.backward = plain
    return losses, *kept, batches


def peer(folder: Path, stage: Stage, batches, spec) -> list[float]:
    """open_clip's model and loss on the same batches."""
    import open_clip

    model = open_clip.create_model_from_pretrained(f"local-dir:{folder}", return_transform=False).float().train()
    loss_of, learnt = open_clip.ClipLoss(), [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learnt if (p.ndim > 1) == wide], "weight_decay": stage.weight_decay if wide else 0.0} for wide in (True, False)]
    optimizer, losses = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98)), []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * optim.schedule(step, stage.steps, stage.warmup)
        told = batch.targets["text"]
        images, texts, scale = model(normalise(batch.images["picture"], spec)[told["image"]], F.pad(told["ids"], (0, CONTEXT - told["ids"].shape[1])))
        loss = loss_of(images, texts, scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
    return losses


def draw(found: dict[str, list[float]], batch: int, gap: float, png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 3.2), layout="constrained")
    for (name, losses), style in zip(found.items(), ({"lw": 4, "alpha": 0.35}, {"lw": 1.2, "ls": "--"})):
        axes.plot(range(1, len(losses) + 1), losses, label=name, **style)
    axes.axhline(math.log(batch), color="grey", lw=0.8, ls=":")
    axes.annotate("by lot", (len(losses), math.log(batch)), ha="right", va="bottom", color="grey", fontsize=8)
    axes.set(xlabel="step", ylabel="CLIP loss", title=f"batches of {batch}; largest difference {gap:.1e}")
    axes.legend(frameon=False)
    figure.savefig(png, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    stage = Stage("pair", "clip", ("*",), pubmedclip.PICTURES, lr=1e-3, steps=args.steps, batch=args.batch, turns=0, warmup=10, augment=0.0, every=10**6)
    recipe = Recipe("curve", "benchmarks/clip_curve.py", config, pubmedclip.samples, tokenizer, (stage,))
    with tempfile.TemporaryDirectory() as work:
        losses, model, words, batches = ours(recipe, args.data, Path(work) / "run")
        start = to_open_clip(model.eval(), words, Path(work) / "open_clip")["open_clip"]
        other = peer(Path(work) / "open_clip", stage, batches, model.encoders["picture"].spec)
    gap = max(abs(a - b) for a, b in zip(losses, other))
    found = {"medvlm": losses, "open_clip": other}
    for name, values in found.items():
        print(f"{name}: step 1 {values[0]:.4f}, mean of the last ten {sum(values[-10:]) / len(values[-10:]):.4f}")
    print(f"largest difference over {args.steps} steps: {gap:.2e} (vectors before the first: {start:.1e})")
    if args.png:
        draw(found, args.batch, gap, args.png)
    if args.json:
        args.json.write_text(json.dumps({**found, "gap": gap}))


if __name__ == "__main__":
    main()
