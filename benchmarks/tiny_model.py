"""The figures of the bundled model's card, on the test split: lungs beside the U-Net, findings, closed questions.

    python benchmarks/tiny_model.py --data DIR --model medvlm-tiny [--unet runs/unet/scores.json] --out runs/card
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

import medvlm
from medvlm.datasets import manifest
from medvlm.datasets.facts import ANNOTATED, case_of, stated
from medvlm.evaluate.answers import normalise
from medvlm.evaluate.segment import dice
from medvlm.evaluate.statistics import Score, auroc_score, mean_score
from medvlm.evaluate.vqa import prior_answers
from medvlm.evaluate.vqa import score as vqa_scores
from medvlm.imaging.scan import Study
from medvlm.sample import Prediction

LUNGS = {"right_lung": "right lung", "left_lung": "left lung", "cardiomediastinum": "heart and mediastinum"}


def closed(rows):
    """The yes/no questions of these rows as samples."""
    return [s for row in rows for s in manifest.row_samples(row) if s.turns and s.choices == ("yes", "no") and s.images]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="medvlm-tiny")
    parser.add_argument("--unet", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--overlays", type=int, default=5)
    args = parser.parse_args()
    model = medvlm.load(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    scores: list[Score] = []
    rows = list(manifest.rows(args.data / "xray_covid", args.split))
    per_image, chances, facts, patients, refused = [], [], [], [], 0
    drawn = 0
    for row in rows:
        (image,) = manifest.open_images(row)
        report = model.report(Study(row["id"], None, (image,)))
        facts.append(stated(case_of(list(manifest.row_samples(row))), ANNOTATED))
        patients.append(row["patient"])
        native = {m.label: m.array for m in manifest.read_masks(row, image)}
        if report.out_of_scope:  # a refusal is an answer that finds nothing: it stays in every denominator
            refused += 1
            print("refused:", row["id"], report.out_of_scope)
        chances.append({f.label: f.probability for f in report.looked_for} or dict.fromkeys(model.findings, 0.0))
        if native:
            empty = np.zeros(image.shape[1:], bool)
            found = {n: empty if report.out_of_scope else model.segment(Study(row["id"], None, (image,)), target).mask for n, target in LUNGS.items()}
            per_image.append({"id": row["id"], "patient": row["patient"]} | {n: dice(found[n], native[n]) for n in LUNGS if n in native})
            if drawn < args.overlays and not report.out_of_scope:
                from medvlm.reading import analyze

                analyze(Study(row["id"], None, (image,)), model, args.out / f"overlay-{drawn}")
                drawn += 1
    peer = json.loads(args.unet.read_text()) if args.unet else {"minutes": 0, args.split: []}  # of segmentation_peer.py --set lungs
    unet, peer_name = peer[args.split], f"MONAI U-Net, {peer['minutes']:g} minutes"
    patient_of = {row["id"]: row["patient"] for row in rows}
    for name, target in LUNGS.items():
        for who, table in (("medvlm-tiny", per_image), (peer_name, unet)):
            kept = [r for r in table if name in r]
            if kept:
                scores.append(mean_score("Dice", [r[name] for r in kept], [patient_of[r["id"]] for r in kept], slice=f"{target}, {who}", convention="native grid"))
    for who, table in (("medvlm-tiny", per_image), (peer_name, unet)):
        values = [(r[n], patient_of[r["id"]]) for r in table for n in ("right_lung", "left_lung") if n in r]
        if values:
            scores.append(mean_score("Dice", [v for v, _ in values], [c for _, c in values], slice=f"both lungs, {who}", convention="native grid"))
    for finding in model.findings:
        truth = [f.get(finding, np.nan) for f in facts]
        known = [t for t in truth if np.isfinite(t)]
        if 0 < sum(known) < len(known):
            scores.append(auroc_score("presence AUROC", [c.get(finding, np.nan) for c in chances], truth, patients,
                                      slice=f"{finding} ({int(sum(known))} of {len(known)})", convention="xray_covid"))  # fmt: skip
    train = closed(list(manifest.rows(args.data / "xray_covid", "train"))) + closed([r for r in manifest.rows(args.data / "vqa_rad", "train") if r["modality"] == "xray"])
    for name, keep in (("xray_covid", lambda r: True), ("vqa_rad", lambda r: r["modality"] == "xray")):
        samples = closed([r for r in manifest.rows(args.data / name, args.split) if keep(r)])
        predictions = model.predict(samples)
        prior = [Prediction(s.id, a) for s, a in zip(samples, prior_answers(train, samples))]
        everyone = [Prediction(s.id, max(("yes", "no"), key=[normalise(t.answer) for t in train].count)) for s in samples]
        for who, answers in (("medvlm-tiny", predictions), ("commonest answer to the same question in train", prior), ("commonest answer in train", everyone)):
            score = next(s for s in vqa_scores(samples, answers, "exact") if s.name == "closed accuracy")
            scores.append(replace(score, slice=f"{name} chest X-rays, {who}"))
        failed = sum(p.error is not None for p in predictions)
        print(f"{name}: {len(samples)} closed questions, {failed} errors")
    (args.out / "scores.json").write_text(json.dumps({"scores": [s.to_json() for s in scores], "refused": refused, "per_image": per_image}, indent=1))
    lines = ["| score | slice | value | 95 % interval | n |", "| --- | --- | --- | --- | --- |"]
    for s in scores:
        span = "fewer than 5 clusters" if s.low is None else f"{s.low:.3f} to {s.high:.3f}"
        lines.append(f"| {s.name} | {s.slice} | {s.value:.3f} | {span} | {s.n} |")
    (args.out / "scores.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"{refused} of {len(rows)} pictures were refused as not a chest X-ray")


if __name__ == "__main__":
    main()
