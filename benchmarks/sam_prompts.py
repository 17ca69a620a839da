"""Sixteen boxes on one image: the image encoded once, beside encoding it for every box.

SAM ViT-B at 1024 pixels with random weights, written as a .pth and read through ``sam:``. The peer is segment-anything's
SamPredictor with the same weights, ``set_image`` and ``predict`` for each box. A further prompt on an image that was
seen is timed by itself.
Rules: pairs.py; the peer takes over 30 s, so five pairs suffice. Before any time counts, the masks must be equal.

    python benchmarks/sam_prompts.py [--boxes 16] [--pairs 5] [--json FILE]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from pairs import heading, pairs, ratio_text, record
from segment_anything import SamPredictor, sam_model_registry

from medvlm.imaging.scan import Image
from medvlm.predictors import load

SIZE, FLOOR, FURTHER = (768, 1024), 12.0, 0.060


def picture() -> Image:
    """A photograph's size, with smooth structure."""
    h, w = np.indices(SIZE)
    grey = (128 + 60 * np.sin(h / 37) * np.cos(w / 53) + 50 * np.sin((h + w) / 91)).clip(0, 255)
    return Image("photo", np.repeat(grey.astype(np.uint8)[None], 3, 0), None, "ultrasound", "uint8", {})


def boxes(count: int) -> np.ndarray:
    """(count, 2, 2) lower and upper corners (h, w)."""
    rng = np.random.default_rng(0)
    lower = rng.integers(0, np.array(SIZE) - 200, (count, 2))
    return np.stack([lower, lower + rng.integers(40, 200, (count, 2))], 1).astype(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    original = sam_model_registry["vit_b"]()
    with torch.no_grad():  # some weights start at zero
        for p in original.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(original.state_dict(), Path(scratch) / "sam.pth")
        model = load(f"sam:{scratch}/sam.pth", "cpu")
    image, prompts, theirs = picture(), boxes(args.boxes), SamPredictor(original)

    def ours():
        fresh = Image(image.id, image.pixels, None, image.modality, image.unit, {})  # a new image each time: nothing is remembered
        return [s.mask for s in model.segment_boxes(fresh, prompts)]

    def encoding_each():
        found = []
        for box in prompts:
            theirs.set_image(image.pixels.transpose(1, 2, 0))
            found.append(theirs.predict(box=box[:, ::-1].ravel(), multimask_output=False)[0][0])
        return found

    gate = bool(all(np.array_equal(a, b) for a, b in zip(ours(), encoding_each())) and np.ptp([m.mean() for m in ours()]) > 0)
    print("equal masks: " + ("yes" if gate else "NO: THE GATE IS CLOSED"))
    control = pairs(ours, ours, max(args.pairs, 5))
    found = pairs(ours, encoding_each, args.pairs)
    model.segment(image, boxes=prompts[0])
    further = []
    for box in prompts:
        began = time.perf_counter()
        model.segment(image, boxes=box)
        further.append(time.perf_counter() - began)
    print(heading(f"{args.boxes} boxes on one image, SAM ViT-B at 1024", control))
    print("| way | seconds | times ours (10-90 %) | floor |")
    print("| --- | --- | --- | --- |")
    print(f"| medvlm | {control['ours']:.3f} | 1 | |")
    print(f"| encoding for each box | {found['seconds']:.3f} | {ratio_text(found)} | {FLOOR} |")
    print(f"a further prompt: median {np.median(further) * 1000:.0f} ms, 90 % within {np.percentile(further, 90) * 1000:.0f} ms; floor {FURTHER * 1000:.0f} ms")
    record({"boxes": args.boxes, "gate": gate, "control": control, "encode_each": found, "further_prompt": float(np.median(further))}, args.json)


if __name__ == "__main__":
    main()
