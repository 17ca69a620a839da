"""How much time and memory a language-model head with its cross-entropy takes on 2,048 tokens of which half are answers.

128,256 words (Llama 3's) and states of 256 values, forward and backward with the head's own gradient. Beside medvlm's
``answer_loss``: the logits of all tokens at once and ``F.cross_entropy`` with what is no answer ignored, and the same on the
answers picked out first. Rules: pairs.py. Loss and norms of the gradients must agree to 1e-5 (relative). The head's
gradient of 131 MB is part of every way's peak.

    python benchmarks/answer_head.py [--pairs 3] [--chunk 128] [--json FILE]
"""

import argparse
import gc
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import torch.nn.functional as F
from pairs import alone, heading, high_water, pairs, ratio_text, record
from torch import nn

from medvlm.train.savers import answer_loss

TOKENS, WORDS, DIM, CLOSE = 2048, 128256, 256, 1e-5
FLOORS = {"all": (1.4, 10.0)}
"""Times as slow and times as much memory that a way is to be."""


def given(tokens: int = TOKENS, words: int = WORDS) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, words, (tokens,))
    labels[torch.randperm(tokens)[: tokens // 2]] = -100
    return nn.Linear(DIM, words, bias=False), torch.randn(tokens, DIM, requires_grad=True), labels


def medvlm(head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, chunk: int) -> torch.Tensor:
    return answer_loss(head, hidden, labels, chunk)


def whole(head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, chunk: int) -> torch.Tensor:
    return F.cross_entropy(head(hidden), labels)


def picked(head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, chunk: int) -> torch.Tensor:
    return F.cross_entropy(head(hidden[labels >= 0]), labels[labels >= 0])


WAYS = {"medvlm": medvlm, "all": whole, "answers": picked}


def step(way: str, chunk: int, head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """[loss, norm of the gradient of the states, of the head]"""
    head.weight.grad = hidden.grad = None
    loss = WAYS[way](head, hidden, labels, chunk)
    loss.backward()
    return [loss.item(), hidden.grad.norm().item(), head.weight.grad.norm().item()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.memory_of:
        step(args.memory_of, 8, *given(16, 32))  # imports and caches are not what is measured
        made = given()
        gc.collect()
        before = high_water()
        step(args.memory_of, args.chunk, *made)
        print(high_water() - before)
        return
    made = given()
    ours = partial(step, "medvlm", args.chunk, *made)
    mine, control = ours(), pairs(ours, ours, args.pairs)
    found = {"medvlm": {"seconds": control["ours"], "gap": 0.0}}
    for name in ("all", "answers"):
        way = partial(step, name, args.chunk, *made)
        gap = max(abs(a - b) / abs(b) for a, b in zip(mine, way()))
        found[name] = {"gap": gap, **pairs(ours, way, args.pairs)}
    for name, row in found.items():
        row["memory"] = alone(__file__, "--memory-of", name, "--chunk", str(args.chunk))
    print(heading(f"{TOKENS} tokens, half answers, {WORDS} words, {DIM} values, {args.chunk} rows a chunk", control))
    print("| way | seconds | times ours (10-90 %) | floor | peak MB | times ours | floor | loss and gradients |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, row in found.items():
        time_floor, memory_floor = FLOORS.get(name, ("", ""))
        print(f"| {name} | {row['seconds']:.2f} | {ratio_text(row)} | {time_floor} | {row['memory'] / 1e6:.0f} | {row['memory'] / found['medvlm']['memory']:.1f} "
              f"| {memory_floor} | {'agree' if row['gap'] < CLOSE else 'DIFFER'}, {row['gap']:.1e} |")  # fmt: skip
    record({"tokens": TOKENS, "words": WORDS, "dim": DIM, "chunk": args.chunk, "control": control, "ways": found}, args.json)


if __name__ == "__main__":
    main()
