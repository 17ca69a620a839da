"""One training step of a small CLIP model of open_clip: pairs a second, and memory at a batch of 2,048, beside open_clip's own step.

The peer is open_clip_train's ``train_one_epoch`` on an epoch of one batch (forward, ClipLoss, backward, AdamW as its main
sets it up). Ours trains the same modules in the same precision: texts padded to the longest of their batch as medvlm's
collation pads them (open_clip: always to 77 tokens; its causal text tower gives the same vectors), the tiled loss, and for
the memory GradCache, whose time the way ``in chunks`` is. ``77 tokens`` is ours without the shorter texts. Two layers a tower, 128 wide, 65 image tokens,
captions of 8 to 24 tokens, single precision. Rules: pairs.py. Loss and norm of the gradient must agree to 1e-5 (relative).

    python benchmarks/clip_step.py [--pairs 3] [--batch 256] [--large 2048] [--chunk 64] [--json FILE]
"""

import argparse
import gc
import math
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import torch.nn.functional as F
from pairs import alone, heading, high_water, pairs, record

from medvlm.train.contrastive import clip_loss
from medvlm.train.savers import cached

WORDS, CLOSE, TILE = 8192, 1e-5, 256
TIME_FLOOR, MEMORY_FLOOR = 1.0, 8.0
PEER = SimpleNamespace(device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True, grad_clip_norm=None, horovod=False,
                       log_every_n_steps=100, rank=0, local_rank=0, world_size=1, wandb=False)  # fmt: skip


def given(batch: int):
    """(model, its optimiser, pictures, token ids padded to 77)."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    model = CLIP(128, CLIPVisionCfg(layers=2, width=128, patch_size=8, image_size=64), CLIPTextCfg(vocab_size=WORDS, width=128, heads=2, layers=2), output_dict=True)
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    others = [p for p in model.parameters() if all(p is not q for q in plain)]
    optimizer = torch.optim.AdamW([{"params": plain, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.2}], lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    rng = torch.Generator().manual_seed(0)
    ids, long = torch.randint(1, WORDS - 1, (batch, 77), generator=rng), torch.randint(8, 25, (batch, 1), generator=rng)
    place = torch.arange(77)
    ids = ids.masked_fill(place == long - 1, WORDS - 1).masked_fill(place >= long, 0)  # the end of a text has the highest id
    return model, optimizer, torch.randn(batch, 3, 64, 64, generator=rng), ids


def open_clip(model, optimizer, pictures, ids, chunk):
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    class Loader(list):
        num_batches, num_samples = 1, len(ids)

    kept = []

    class Kept(ClipLoss):
        def forward(self, *args, **kwargs):
            losses = super().forward(*args, **kwargs)
            kept.append(losses["contrastive_loss"].detach())
            return losses

    PEER.batch_size = len(ids)
    train = SimpleNamespace(dataloader=Loader([(pictures, ids)]), set_epoch=lambda epoch: None)
    train_one_epoch(model, {"train": train}, Kept(), 0, optimizer, None, None, None, PEER)
    return kept[0].item()


def encode(model, pictures, ids):
    width = ids.shape[1]
    states = model.token_embedding(ids) + model.positional_embedding[:width]
    states = model.ln_final(model.transformer(states, attn_mask=model.attn_mask[:width, :width]))
    text = states[torch.arange(len(ids)), ids.argmax(1)] @ model.text_projection
    return model.encode_image(pictures, normalize=True), F.normalize(text, dim=1)


def medvlm(model, optimizer, pictures, ids, chunk, pad=False):
    model.train()
    optimizer.zero_grad()
    ids = ids if pad else ids[:, : int(ids.argmax(1).max()) + 1]
    if chunk:
        chunks = list(zip(pictures.split(chunk), ids.split(chunk)))
        loss = cached(lambda c: (encode(model, *c), {}), chunks, lambda a, b: {"clip": clip_loss(a, b, model.logit_scale.exp(), TILE)})["clip"]
    else:
        loss = clip_loss(*encode(model, pictures, ids), model.logit_scale.exp(), TILE)
        loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    return loss.item()


WAYS = {"medvlm": medvlm, "in chunks": medvlm, "77 tokens": partial(medvlm, pad=True), "open_clip": open_clip}
OURS = tuple(WAYS)[:-1]


def gate(batch: int, way: str, chunk: int) -> list[float]:
    """[loss, norm of the gradient] of a first step."""
    made = given(batch)
    return [WAYS[way](*made, chunk), torch.stack([p.grad.double().norm() for p in made[0].parameters()]).norm().item()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--large", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.memory_of:
        WAYS[args.memory_of](*given(4), 2)  # imports and caches are not what is measured
        made = given(args.large)
        gc.collect()
        before = high_water()
        WAYS[args.memory_of](*made, args.chunk)
        print(high_water() - before)
        return
    right = gate(64, "open_clip", 0)
    gap = max(abs(a - b) / abs(b) for way in ("medvlm", "77 tokens") for chunk in (0, 16) for a, b in zip(gate(64, way, chunk), right))
    steps = {name: partial(way, *given(args.batch), args.chunk if name == "in chunks" else 0) for name, way in WAYS.items()}
    for way in steps.values():
        way()  # the optimiser's state is made in the first step
    control = pairs(steps["open_clip"], steps["open_clip"], args.pairs)
    found = {name: pairs(steps[name], steps["open_clip"], args.pairs) for name in OURS}
    memory = {name: alone(__file__, "--memory-of", name, "--large", str(args.large), "--chunk", str(args.chunk)) for name in WAYS}
    print(heading(f"a batch of {args.batch}; memory at {args.large}, ours {args.chunk} at a time", control))
    print(f"loss and gradient {'agree' if gap < CLOSE else 'DIFFER'}, {gap:.1e}")
    print("| way | pairs a second | open_clip's time / ours (10-90 %) | floor | peak MB | open_clip's / ours | floor |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in WAYS:
        row = found.get(name)
        rate = args.batch / (row["ours"] if row else found["medvlm"]["seconds"])
        times = f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f}) | {TIME_FLOOR}" if row else "1 |"
        share = f"{memory['open_clip'] / memory[name]:.1f} | {MEMORY_FLOOR}" if row else "1 |"
        print(f"| {name} | {rate:.0f} | {times} | {memory[name] / 1e6:.0f} | {share} |")
    record({"batch": args.batch, "large": args.large, "chunk": args.chunk, "gap": gap, "control": control, "ways": found, "memory": memory}, args.json)


if __name__ == "__main__":
    main()
