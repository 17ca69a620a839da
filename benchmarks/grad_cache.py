"""How much time and memory the gradients of 256 image-text pairs take, 16 at a time with GradCache, beside all at once.

A ViT-Tiny of timm on 96 x 96 pixels and a text transformer of two layers on 32 tokens; CLIP's loss (medvlm's, the same on
both sides). Weights are not counted, gradients are. Rules: pairs.py. Loss and norm of the gradient must agree to 1e-6
(relative) before time or memory counts.

    python benchmarks/grad_cache.py [--pairs 3] [--chunk 16] [--json FILE]
"""

import argparse
import gc
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import torch.nn.functional as F
from pairs import alone, heading, high_water, pairs, record
from torch import nn

from medvlm.train.contrastive import clip_loss
from medvlm.train.savers import cached

BATCH, SIZE, TOKENS, WORDS, DIM, CLOSE = 256, 96, 32, 8192, 192, 1e-6
TIME_FLOOR, MEMORY_FLOOR = 1 / 1.15, 8.0


class Towers(nn.Module):
    def __init__(self):
        import timm

        super().__init__()
        self.image = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, num_classes=DIM)
        self.words = nn.Embedding(WORDS, DIM)
        self.text = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, 0.0, batch_first=True), 2)
        self.scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, pictures: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.normalize(self.image(pictures), dim=1), F.normalize(self.text(self.words(ids)).mean(1), dim=1)


def plain(model: Towers, pictures: torch.Tensor, ids: torch.Tensor, chunk: int) -> float:
    loss = clip_loss(*model(pictures, ids), model.scale.exp())
    loss.backward()
    return loss.item()


def medvlm(model: Towers, pictures: torch.Tensor, ids: torch.Tensor, chunk: int) -> float:
    chunks = list(zip(pictures.split(chunk), ids.split(chunk)))
    return cached(lambda c: (model(*c), {}), chunks, lambda a, b: {"clip": clip_loss(a, b, model.scale.exp())})["clip"].item()


WAYS = {"medvlm": medvlm, "plain": plain}


def given(batch: int = BATCH) -> tuple[Towers, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return Towers(), torch.randn(batch, 3, SIZE, SIZE), torch.randint(0, WORDS, (batch, TOKENS))


def step(way: str, chunk: int, model: Towers, pictures: torch.Tensor, ids: torch.Tensor) -> list[float]:
    """[loss, norm of the gradient]"""
    model.zero_grad()
    loss = WAYS[way](model, pictures, ids, chunk)
    return [loss, torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().item()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.memory_of:
        step(args.memory_of, 2, *given(4))  # imports and caches are not what is measured
        made = given()
        gc.collect()
        before = high_water()
        step(args.memory_of, args.chunk, *made)
        print(high_water() - before)
        return
    made = given()
    ours, theirs = (partial(step, way, args.chunk, *made) for way in WAYS)
    gap = max(abs(a - b) / abs(b) for a, b in zip(ours(), theirs()))
    control = pairs(ours, ours, args.pairs)
    row = {"control": control, "gap": gap, **pairs(ours, theirs, args.pairs)}
    row["memory"] = {way: alone(__file__, "--memory-of", way, "--chunk", str(args.chunk)) for way in WAYS}
    print(heading(f"{BATCH} pairs, {args.chunk} at a time", control))
    print("| way | seconds | times ours (10-90 %) | floor | peak MB | times ours | floor | loss and gradient |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print(f"| medvlm | {row['ours']:.2f} | 1 | | {row['memory']['medvlm'] / 1e6:.0f} | 1 | | |")
    print(f"| plain | {row['seconds']:.2f} | {row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f}) | {TIME_FLOOR:.2f} | {row['memory']['plain'] / 1e6:.0f} "
          f"| {row['memory']['plain'] / row['memory']['medvlm']:.1f} | {MEMORY_FLOOR} | {'agree' if gap < CLOSE else 'DIFFER'}, {gap:.1e} |")  # fmt: skip
    record({"batch": BATCH, "chunk": args.chunk, "size": SIZE, **row}, args.json)


if __name__ == "__main__":
    main()
