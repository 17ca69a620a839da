"""Write what a recipe asks of pictures as data sets that ``medvlm evaluate`` scores: outlines, empty ones too, and yes/no questions.

    python benchmarks/recipe_questions.py RECIPE DATA OUT SET...

A data set's own masks say only what is there; a recipe also knows what is not. Every split is written, so that the blind
baselines learn from train. Pictures and masks are PNG files.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from medvlm.datasets.base import open_data
from medvlm.recipes.base import load


def main(recipe: str, data: str, out: str, *sets: str) -> None:
    for name in sets:
        folder, lines = Path(out) / name, []
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            for group in open_data(Path(data), name).groups(split):
                found = list(load(recipe).samples(group, name, split))
                if not found:
                    continue
                (image,), row, files = found[0].images.values(), str(found[0].meta["row"]), {}
                stem = row.replace("/", "_")
                _save(np.moveaxis(image.pixels, 0, -1).squeeze(), folder / f"images/{stem}.png")
                for s in found:
                    if s.meta["kind"] == "segment" and s.masks:
                        files[s.masks[0].label] = f"masks/{stem}_{s.masks[0].label.replace(' ', '_')}.png"
                        _save(s.masks[0].array, folder / files[s.masks[0].label])
                qa = [{"qid": s.id, "question": s.question, "answer": s.answer.lower(), "type": "CLOSED", "category": [s.meta["kind"]]}
                      for s in found if s.answer.lower() in ("yes", "no")]  # fmt: skip
                lines.append({"id": row, "image": f"images/{stem}.png", "modality": image.modality, "patient": group[0].patient, "split": split, "qa": qa}
                             | ({"mask": {"type": "binary", "files": files}} if files else {}))  # fmt: skip
        (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(name, len(lines), "pictures,", sum(len(r.get("mask", {"files": ()})["files"]) for r in lines), "outlines,", sum(len(r["qa"]) for r in lines), "questions")


def _save(array: np.ndarray, file: Path) -> None:
    Pillow.fromarray(array).save(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
