"""Compare a reading with the expected one: python examples/check.py OUT EXPECTED"""

import json
import sys
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image


def differences(got: Path, expected: Path) -> list[str]:
    """What differs beyond rounding: findings by 0.02, masks by a Dice below 0.99, words at all."""
    a, b = (json.loads((folder / "report.json").read_text()) for folder in (got, expected))
    found = []
    if a["out_of_scope"] != b["out_of_scope"]:
        found.append(f"out_of_scope: {a['out_of_scope']!r}, expected {b['out_of_scope']!r}")
    chances = {f["label"]: f["probability"] for f in a["findings"]}
    for finding in b["findings"]:
        chance = chances.get(finding["label"])
        if chance is None or abs(chance - finding["probability"]) > 0.02:
            found.append(f"{finding['label']}: {chance}, expected {finding['probability']}")
    if [s["text"] for s in a["sentences"]] != [s["text"] for s in b["sentences"]]:
        found.append("the sentences differ")
    for path in sorted((expected / "masks").glob("*")):
        if not (got / "masks" / path.name).is_file():
            found.append(f"{path.name} is missing")
            continue
        x, y = (_mask(folder / "masks" / path.name) for folder in (got, expected))
        dice = 2 * (x & y).sum() / max(1, x.sum() + y.sum()) if x.shape == y.shape else 0.0
        if dice < 0.99:
            found.append(f"{path.name}: Dice {dice:.3f} with the expected mask")
    return found


def _mask(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj if path.name.endswith(".nii.gz") else Image.open(path)) > 0


if __name__ == "__main__":
    wrong = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(wrong) or "as expected")
    sys.exit(bool(wrong))
