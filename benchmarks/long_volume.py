"""Peak memory of one question about a CT of 300 slices of 512 x 512, through a 3-D encoder and through slices.

The scan is float32 HU in memory (315 MB). ``volume``: MONAI's SegResNet on 64 x 256 x 256. ``slices``: RegNetY-400MF over all
300 slices at 512 x 512, whose tokens the question weighs. Random weights; a small language model. Memory: growth of VmHWM
from before the scan is made to after the answer, in one fresh process a way.

    python benchmarks/long_volume.py [--json FILE]
"""

import argparse
import gc
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from pairs import alone, high_water, record

from medvlm.imaging.scan import Volume
from medvlm.language import IMAGE, SEG, train_tokenizer
from medvlm.predictors.native import NativeModel
from medvlm.vlm import MedVLM, MedVLMConfig

SHAPE, LIMIT = (300, 512, 512), 6.0
ENCODERS = {
    "volume": {"file": "volume", "args": {"net": "segresnet", "size": [64, 256, 256], "windows": ["medgemma"]}},
    "slices": {"file": "slices", "args": {"encoder": {"library": "timm", "model": "regnety_004", "channels": 3}, "size": list(SHAPE), "windows": ["medgemma"]}},
}


def build(way: str) -> NativeModel:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["Is there a nodule in this scan?", "yes", "no"] * 20, vocab_size=300)
    encoder = MedVLM(MedVLMConfig({"encoders": {way: ENCODERS[way]}})).encoders[way]
    grid = encoder.grid()
    projector = {"file": "interslice", "args": {"dim": encoder.dim, "lm_dim": 64}} if way == "slices" else {
        "file": "pool", "args": {"dim": encoder.dim, "lm_dim": 64, "factor": [1, grid[1] // 8, grid[2] // 8]}}  # fmt: skip
    lm = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
          "vocab_size": len(tokenizer), "max_position_embeddings": 4096, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    token = tokenizer.convert_tokens_to_ids
    parts = {"encoders": {way: ENCODERS[way]}, "projectors": {way: projector}, "language": {"lm": {"file": "language", "args": lm}}}
    model = MedVLM(MedVLMConfig(parts, {"routes": {"ct": way}, "reads": ["ct"]}, image_token_id=token(IMAGE), seg_token_id=token(SEG)))
    return NativeModel(model.eval(), tokenizer)


def measure(way: str) -> tuple[float, float, int]:
    """Bytes, seconds of the answer, tokens of the scan."""
    torch.set_num_threads(2)
    reader = build(way)
    gc.collect()
    before = high_water()
    voxels = np.random.default_rng(0).standard_normal((1, *SHAPE), np.float32)
    voxels *= 300
    scan = Volume("ct-1", voxels, np.diag([1.0, 0.7, 0.7, 1.0])[[2, 1, 0, 3]], "ct", "HU", {})
    began = time.perf_counter()
    reader.ask(scan, "Is there a nodule in this scan?")
    return high_water() - before, time.perf_counter() - began, reader.vlm.tokens("ct")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=ENCODERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        grown, seconds, tokens = measure(args.memory_of)
        print(f"{tokens} tokens in {seconds:.1f} s")
        print(int(grown))
        return
    print("| way | peak GB | limit |")
    print("| --- | --- | --- |")
    found = {way: alone(__file__, "--memory-of", way) / 1e9 for way in ENCODERS}
    for way, peak in found.items():
        print(f"| {way} | {peak:.2f} | {LIMIT} |")
    record({"shape": SHAPE, "peak_gb": found}, args.json)


if __name__ == "__main__":
    main()
