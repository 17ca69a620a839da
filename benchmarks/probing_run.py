"""A whole probing run over 200 images, nine questions each: `medvlm evaluate probe` beside a loop over the questions.

``run``: medvlm.evaluate.run.evaluate, files written, scores with intervals, tables and page included. ``loop``: the same
model asked question by question, the picture opened, encoded and prefilled each time, as the evaluation scripts of
LLaVA-Med (model_vqa.py) and ProbMed do; nothing is scored or written. Both must give the same answers, and the same
chance of yes within 1e-4. Pictures of 336 pixels, 576 tokens; vision tower and language model of random weights.
Rules: pairs.py.

    python benchmarks/probing_run.py [--images 200] [--pairs 3] [--json FILE]
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from pairs import heading, pairs, ratio_text, record
from PIL import Image as Picture
from shared_prefix import FINDINGS, build

from medvlm.datasets import manifest
from medvlm.datasets.predictions import rows
from medvlm.evaluate.run import evaluate

FLOOR = 6.0


def probes(folder: Path, count: int) -> Path:
    """A data set of ``count`` pictures with four pairs and one single question each."""
    rng = np.random.default_rng(0)
    with (folder / "manifest.jsonl").open("w") as lines:
        for i in range(count):
            Picture.fromarray(rng.integers(0, 255, (336, 336), np.uint8)).save(folder / f"{i}.png")
            names = [FINDINGS[k] for k in rng.permutation(len(FINDINGS))[:9]]
            qa = [{"qid": f"{i}-{k}", "question": f"Is there {n} in this chest X-ray?", "answer": "no" if k % 2 else "yes", "type": "CLOSED", "category": ["finding"],
                   "pair": f"{i}-{k // 2}"} for k, n in enumerate(names)]  # fmt: skip
            lines.write(json.dumps({"id": str(i), "image": f"{i}.png", "modality": "xray", "split": "test", "qa": qa}) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    reader = build(384, 8, 384, 8)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "probes"
        data.mkdir()
        probes(data, args.images)
        out = Path(place) / "run"

        def run():
            shutil.rmtree(out, ignore_errors=True)
            evaluate("probe", reader, data, out, quiet=True)

        answers = {}

        def loop():
            for row in manifest.rows(data, "test"):
                for k in range(len(row["qa"])):  # a new image each time: nothing is remembered
                    (sample,) = list(manifest.row_samples({**row, "qa": [row["qa"][k]]}))
                    answers[sample.id] = reader.predict([sample])[0]

        found = pairs(run, loop, args.pairs)
        mine = rows(out / "predictions.jsonl")
        same = sum(mine[i]["text"] == p.text for i, p in answers.items())
        gap = max(abs(mine[i]["choices"]["yes"] - p.choices["yes"]) for i, p in answers.items())
        print(f"{same} of {len(answers)} answers are the same, largest difference of P(yes) {gap:.1e}" + ("" if same == len(answers) and gap < 1e-4 else ": THE GATE IS CLOSED"))
        control = pairs(run, run, min(args.pairs, 3))
    print(heading(f"{args.images} images, {len(answers)} questions", control))
    print(f"| way | seconds | times the run (10-90 %) | floor |\n| --- | --- | --- | --- |\n| run | {found['ours']:.1f} | 1 | |\n| loop | {found['seconds']:.1f} | {ratio_text(found)} | {FLOOR} |")
    record({"images": args.images, "same": same, "gap": gap, "control": control, "loop": found}, args.json)


if __name__ == "__main__":
    main()
