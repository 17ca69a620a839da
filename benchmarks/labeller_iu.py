"""The rule labeller against the MeSH codes and Rad-ReStruct positives of the Indiana chest X-ray reports.

    python benchmarks/labeller_iu.py --data DIR/report_iu --split val [--errors]

Two indexers wrote the MeSH codes after reading the report, and Rad-ReStruct was made of these codes: both hold what is
there, never what is denied. A finding is positive where either says so, by the two tables below. Reports marked
"No Indexing" are left out and counted. --errors: instead, which metric notices which error put into these reports.
"""

import argparse
import time

import numpy as np

from medvlm.datasets.manifest import rows
from medvlm.evaluate import lexical
from medvlm.evaluate.injection import KINDS, sensitivity
from medvlm.evaluate.labeller import FINDINGS, FIVE, _read, label
from medvlm.evaluate.report import own_words, sides
from medvlm.evaluate.statistics import statistic_score

HEADS = {
    "Cardiomegaly": "Cardiomegaly", "Pulmonary Atelectasis": "Atelectasis", "Consolidation": "Consolidation", "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax", "Pleural Effusion": "Pleural Effusion", "Pulmonary Edema": "Edema", "Pulmonary Congestion": "Edema",
    "Heart Failure": "Edema", "Airspace Disease": "Lung Opacity", "Infiltrate": "Lung Opacity", "Lung Diseases, Interstitial": "Lung Opacity",
    "Pulmonary Fibrosis": "Lung Opacity", "Fractures, Bone": "Fracture", "Catheters, Indwelling": "Support Devices",
    "Tube, Inserted": "Support Devices", "Implanted Medical Device": "Support Devices", "Medical Device": "Support Devices",
    "Surgical Instruments": "Support Devices", "Stents": "Support Devices", "Spinal Fusion": "Support Devices", "Sutures": "Support Devices",
    "Breast Implants": "Support Devices",
}  # fmt: skip
"""MeSH heading -> finding, whatever its qualifiers. The other headings are read in ``mesh``."""
NODES = {
    "cardiovascular system_diseases_cardiomegaly": "Cardiomegaly", "lung_diseases_pulmonary atelectasis": "Atelectasis",
    "lung_signs_consolidation": "Consolidation", "lung_diseases_pneumonia": "Pneumonia", "pleura_diseases_pneumothorax": "Pneumothorax",
    "pleura_diseases_pleural effusion": "Pleural Effusion", "lung_diseases_pulmonary edema": "Edema", "lung_diseases_pulmonary congestion": "Edema",
    "cardiovascular system_diseases_heart failure": "Edema", "lung_signs_airspace disease": "Lung Opacity",
    "lung_diseases_infiltrate": "Lung Opacity", "lung_diseases_lung diseases, interstitial": "Lung Opacity",
    "lung_diseases_pulmonary fibrosis": "Lung Opacity", "lung_diseases_cicatrix": "Lung Opacity", "lung_diseases_mass": "Lung Lesion",
    "pleura_signs_thickening": "Pleural Other", "pleura_diseases_cicatrix": "Pleural Other", "pleura_diseases_calcinosis": "Pleural Other",
    "skeletal system_diseases_fractures, bone": "Fracture", "foreign objects_objects_catheters, indwelling": "Support Devices",
    "foreign objects_objects_tube, inserted": "Support Devices", "foreign objects_objects_implanted medical device": "Support Devices",
    "foreign objects_objects_medical device": "Support Devices", "foreign objects_objects_surgical instruments": "Support Devices",
    "foreign objects_objects_stents": "Support Devices", "foreign objects_objects_sutures": "Support Devices",
    "foreign objects_objects_breast implants": "Support Devices", "skeletal system_signs_spinal fusion": "Support Devices",
}  # fmt: skip
"""Rad-ReStruct node -> finding. Nodes of opacity, density, markings and nodules say less than MeSH says of them and are not read."""
NOT_LUNG = {"mediastinum", "ribs", "thoracic vertebrae", "lumbar vertebrae", "spine", "breast", "abdomen", "neck", "supracardiac", "aorta",
            "clavicle", "humerus", "shoulder", "pleura", "cardiophrenic angle", "heart", "trachea"}  # fmt: skip
NOTHING = {"normal", "Technical Quality of Image Unsatisfactory"}


def mesh(codes: list[str]) -> set[str]:
    """The findings that codes such as "Opacity/lung/base/left/streaky" say are there."""
    parts = [[p.strip() for p in c.split("/")] for c in codes]
    calcified = {frozenset(p[1:]) for p in parts if p[0] == "Calcinosis"}
    found = set()
    for head, *rest in parts:
        words = set(rest)
        in_lung, round_ = not words & NOT_LUNG, "round" in words
        if head in HEADS:
            found.add(HEADS[head])
        elif head == "Cardiac Shadow" and words & {"enlarged", "borderline", "prominent"}:
            found.add("Cardiomegaly")
        elif head == "Mediastinum" and words & {"enlarged", "prominent"} and "lymph nodes" not in words:
            found.add("Enlarged Cardiomediastinum")
        elif head in ("Hydropneumothorax", "Hemopneumothorax"):
            found |= {"Pneumothorax", "Pleural Effusion"}
        elif head in ("Nodule", "Mass") and "breast" not in words and words not in calcified:  # CheXpert leaves out calcified nodules
            found.add("Lung Lesion")
        elif head in ("Opacity", "Density") and in_lung:  # "nodular opacity" is coded as a round one
            found.add("Lung Lesion" if round_ else "Lung Opacity")
        elif head == "Cicatrix" and in_lung or head == "Lung" and "interstitial" in words:
            found.add("Lung Opacity")
        elif head == "Markings" and "bronchovascular" not in words:
            found.add("Lung Opacity")
        elif head in ("Thickening", "Cicatrix", "Calcinosis") and "pleura" in words:
            found.add("Pleural Other")
    if {p[0] for p in parts} <= NOTHING | {h for h, f in HEADS.items() if f == "Support Devices"}:
        found.add("No Finding")
    return found


def score(name: str, truth: np.ndarray, said: np.ndarray, ids: list[str]) -> str:
    """"value (low-high)" of precision, recall or F1; truth and said are bool (N, findings), pooled over all."""
    counts = np.stack([(truth & said).sum(1), (~truth & said).sum(1), (truth & ~said).sum(1)], 1).astype(float)

    def statistic(i: np.ndarray) -> float:
        hit, wrong, missed = counts[i].sum(0)
        below = {"precision": hit + wrong, "recall": hit + missed, "F1": hit + (wrong + missed) / 2}[name]
        return hit / below if below else float("nan")

    s = statistic_score(name, statistic, ids)
    return f"{s.value:.3f} ({s.low:.2f}-{s.high:.2f})" if s.low is not None else f"{s.value:.3f}"


def present(text: str) -> set[str]:
    return {f for f, v in label(text).items() if v in (1, -1)}


def finding_f1(said: str, truth: str) -> float:
    a, b = present(said), present(truth)
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else float("nan")


def same_sides(said: str, truth: str) -> float:
    a, b = sides(said), sides(truth)
    return sum(a.get(f) == b[f] for f in b) / len(b) if b else float("nan")


def errors(texts: list[str]) -> None:
    metrics = {
        "BLEU-1": lambda a, b: lexical.sentence_bleu(own_words(a), [own_words(b)], 1),
        "BLEU-4": lambda a, b: lexical.sentence_bleu(own_words(a), [own_words(b)], 4),
        "ROUGE-L": lambda a, b: lexical.rouge_l(own_words(a), own_words(b)),
        "METEOR": lambda a, b: lexical.meteor(own_words(a), own_words(b)),
        "F1 of findings": finding_f1,
        "same sides": same_sides,
    }
    print(f"| metric | {' | '.join(KINDS)} |\n| --- |{' --- |' * len(KINDS)}")
    for name, metric in metrics.items():
        drops = [s for s in sensitivity(metric, texts) if s.name == "drop"]
        print(f"| {name} | {' | '.join(f'{s.value:.3f} ({s.n})' for s in drops)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="val", choices=("train", "val"))
    parser.add_argument("--errors", action="store_true")
    args = parser.parse_args()
    every = list(rows(args.data, args.split))
    if args.errors:
        return errors([r["text"] for r in every])
    kept = [r for r in every if r["labels"]["mesh_major"] != ["No Indexing"]]
    ids = [r["id"] for r in kept]
    _read("warm.")
    started = time.perf_counter()
    labels = [label(r["text"]) for r in kept]
    took = time.perf_counter() - started
    _read.cache_clear()
    started = time.perf_counter()
    for r in kept:
        _read.cache_clear()
        label(r["text"])
    alone = time.perf_counter() - started

    truth = np.zeros((len(kept), len(FINDINGS)), bool)
    for row, report in zip(truth, kept):
        found = mesh(report["labels"]["mesh_major"]) | {NODES[n] for n in report["labels"].get("radrestruct_positive") or () if n in NODES}
        row[:] = [f in found for f in FINDINGS]
    said = {u: np.array([[v == 1 or (u and v == -1) for v in x.values()] for x in labels]) for u in (True, False)}

    print(f"split {args.split}: {len(kept)} reports, {len(every) - len(kept)} without codes left out")
    print(f"{len(kept) / took:.0f} reports/s, {len(kept) / alone:.0f} where no sentence is remembered\n")
    print("| finding | n | precision | recall | F1 | F1, doubt as absence |\n| --- | --- | --- | --- | --- | --- |")
    groups = [(f, [k]) for k, f in enumerate(FINDINGS)] + [("all 14, micro", list(range(14))), ("the five, micro", [FINDINGS.index(f) for f in FIVE])]
    for name, columns in groups:
        t, p, m = truth[:, columns], said[True][:, columns], said[False][:, columns]
        cells = [score("precision", t, p, ids), score("recall", t, p, ids), score("F1", t, p, ids), score("F1", t, m, ids)]
        print(f"| {name} | {t.sum()} | {' | '.join(cells)} |")
    f1 = [[2 * (truth[:, k] & s[:, k]).sum() / max(1, truth[:, k].sum() + s[:, k].sum()) for k in range(14)] for s in said.values()]
    print(f"| all 14, macro | | | | {np.mean(f1[0]):.3f} | {np.mean(f1[1]):.3f} |")


if __name__ == "__main__":
    main()
