"""What the card of medvlm-tiny says and no task scores: the kind of picture, what is not there, mirrors, and one study in many forms.

    python benchmarks/tiny_checks.py --data DIR --split test --out runs/checks

- kind: every picture and volume of the split is shown without its header's modality, and the model names it.
- parts: plane, part of the body, projection and eye, where the data say them; of volumes the part, and the plane of three slices in each plane.
- absent: each picture is asked for targets that no picture of its kind shows; an empty mask is right.
- mirror: a mirrored photograph of the eye is of the other eye; the left lung of a mirrored chest is the mirrored right one.
- names: the text of ``NAMES`` that lies nearest to a picture names its kind.
- border: AUROC of the findings of xray_covid as the films are, and with the outer tenth of each side and all that is burned in black.
- calibration: findings of xray_covid and yes/no questions of it and VQA-RAD: ECE in ten bins of as many items each, beside the 95 % range
  of answers that were drawn by those very probabilities; AUGRC with and without the fitted scales.
- forms: a chest X-ray as it is, as 8-bit and 16-bit PNG, as DICOM in 12 bits, as MONOCHROME1, twice as large, and in a wider
  window; a CT slab turned, flipped and with another window. Answers are compared with those to the first, masks by Dice.

Intervals are 95 %, by images drawn with replacement; ``scores.json`` holds each answer.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

import medvlm
from medvlm.datasets import manifest
from medvlm.datasets.facts import ANNOTATED, case_of, stated
from medvlm.datasets.slices import PLANES, sliced
from medvlm.evaluate.segment import dice
from medvlm.evaluate.statistics import auroc_score, mean_score
from medvlm.evaluate.trust import augrc, ece
from medvlm.imaging import window
from medvlm.imaging.scan import Image, Study, Volume
from medvlm.recipes.medvlm_tiny import ELSEWHERE, _whole
from medvlm.sample import Sample

SETS = ("xray_covid", "fundus_chase", "path_bccd", "path_dsb_nuclei", "vol_totalseg", "vol_deeplesion", "dicom_series", "vqa_rad")
MOST = 20
"""Pictures of a set that are asked for all that they do not show."""
NAMES = {
    "xray": ("A chest X-ray.", "An X-ray of the abdomen."), "ct": tuple(f"A CT slice of the {p}." for p in ("head", "chest", "abdomen")),
    "mr": ("An MR slice of the head.", "An MR slice of the abdomen."), "fundus": ("A fundus photograph of the eye.",),
    "pathology": ("A microscopy image showing nuclei.", "A microscopy image showing RBC and WBC."),
}  # fmt: skip
"""What the captions of train call the kinds of picture."""
LEFT_RIGHT = (("right lung", "left lung"), ("left lung", "right lung"))
QUESTIONS = ("What kind of image is this?", "Is this a CT scan?", "Is there consolidation?", "Is there cardiomegaly?", "Is there ground-glass opacity?",
             "Is there an endotracheal tube?", "Is there a pleural effusion?", "Is this an image of the chest?")  # fmt: skip


def pictures(data: Path, sets, split: str, most: int | None = None) -> Iterator[tuple[str, dict, Image | Volume]]:
    for name in sets:
        if (data / name / "manifest.jsonl").is_file():
            for row in list(manifest.rows(data / name, split))[:most]:
                for image in manifest.open_images(row)[:1]:
                    yield name, row, image
                    image.release()


def study(image) -> Study:
    return Study("study", None, (image,))


def like(image, array=None, modality: str | None = None):
    made = image.with_pixels(image.pixels if array is None else array) if isinstance(image, Image) else image.with_voxels(image.voxels if array is None else array)
    made.modality = modality or image.modality
    return made


def kinds(model, data: Path, split: str) -> list[dict]:
    found = []
    for name, row, image in pictures(data, SETS, split):
        if row["modality"] in ELSEWHERE:
            bare = like(image, modality="unknown")
            refused = model.scope(bare)
            said = None if refused else max((n for n in model._chances(bare) if n.startswith("modality:")), key=model._chances(bare).get)
            found.append({"set": name, "id": row["id"], "modality": row["modality"], "said": said, "value": float(said == f"modality:{row['modality']}")})
    return found


def parts(model, data: Path, split: str) -> list[dict]:
    found = []

    def told(name: str, row: dict, shown: Image | Volume, true: dict[str, str]) -> None:
        chances = model._chances(shown)
        for group, own in true.items():
            said = max((n for n in chances if n.startswith(f"{group}:")), key=chances.get).partition(":")[2]
            found.append({"set": name, "id": row["id"], "group": group, "true": own, "said": said, "value": float(said == own)})

    for name, row, image in pictures(data, SETS, split):
        if row["modality"] not in ELSEWHERE:
            continue
        known = dict(n.split(":") for n in _whole(case_of(list(manifest.row_samples(row)))))
        told(name, row, image, {g: n for g, n in known.items() if g in ("part", "view", "eye") or g == "plane" and isinstance(image, Image)})
        if isinstance(image, Volume):
            for plane in PLANES:
                for (one,) in sliced([Sample("volume", images={image.id: image})], 3, plane):
                    told(name, row, next(iter(one.images.values())), {"plane": plane})
    return found


def absent(model, data: Path, split: str) -> list[dict]:
    found = []
    for name, row, image in pictures(data, SETS, split, MOST):
        for target in (t for t in ELSEWHERE.get(row["modality"], ()) if t in model.targets):
            drawn = model.segment(study(image), target)
            found.append({"set": name, "id": row["id"], "modality": row["modality"], "target": target, "present": drawn.present, "value": float(not drawn.mask.any())})
    return found


def mirrors(model, data: Path, split: str) -> list[dict]:
    found = []
    for name, row, image in pictures(data, ("fundus_chase", "xray_covid"), split):
        turned = like(image, np.ascontiguousarray(image.pixels[..., ::-1]))
        if name == "fundus_chase":
            eyes = [max(("eye:right", "eye:left"), key=model._chances(x).get) for x in (image, turned)]
            found.append({"set": name, "id": row["id"], "said": eyes, "value": float(eyes[0] != eyes[1])})
            continue
        for one, other in LEFT_RIGHT:
            plain, mirrored = model.segment(study(image), one).mask, model.segment(study(turned), other).mask
            same = dice(plain[:, ::-1], mirrored)
            found.append({"set": name, "id": row["id"], "target": one, "dice": same, "value": float(same >= 0.8)})
    return found


def names(model, data: Path, split: str) -> list[dict]:
    kinds = [k for k, texts in NAMES.items() for _ in texts]
    texts = np.stack([model.embed(t) for group in NAMES.values() for t in group])
    found = []
    for name, row, image in pictures(data, SETS, split):
        if row["modality"] in kinds:
            said = kinds[int((texts @ model.embed(study(image))).argmax())]
            found.append({"set": name, "id": row["id"], "modality": row["modality"], "said": said, "value": float(said == row["modality"])})
    return found


def bare(image: Image) -> Image:
    """Without what stands at the border and what is burned in: as bright as anything, and small."""
    from scipy.ndimage import binary_dilation, label

    array, (high, wide) = image.pixels.copy(), image.shape[1:]
    bright, _ = label(array.max(0) >= np.percentile(array, 99.5))
    small = np.bincount(bright.ravel()) < 0.002 * high * wide
    array[:, binary_dilation(small[bright] & (bright > 0), iterations=3)] = 0
    array[:, : high // 10], array[:, -(high // 10) :], array[:, :, : wide // 10], array[:, :, -(wide // 10) :] = 0, 0, 0, 0
    return like(image, array)


def findings(model, data: Path, split: str, change=None) -> list[dict]:
    """The chance and the truth of each finding that is known of a film."""
    found = []
    for name, row, image in pictures(data, ("xray_covid",), split):
        truth = stated(case_of(list(manifest.row_samples(row))), ANNOTATED)
        chances = model._chances(image if change is None else change(image))
        found += [{"set": name, "id": row["id"], "patient": row["patient"], "finding": f, "p": chances[f], "y": truth[f]} for f in model.findings if np.isfinite(truth.get(f, np.nan))]
    return found


def border(model, data: Path, split: str) -> list[str]:
    lines = []
    for shown, change in (("as they are", None), ("borders and burned-in text black", bare)):
        rows = findings(model, data, split, change)
        for finding in (None, *model.findings):
            kept = [r for r in rows if finding in (None, r["finding"])]
            if 0 < sum(r["y"] for r in kept) < len(kept):
                s = auroc_score("AUROC", [r["p"] for r in kept], [r["y"] for r in kept], [r["patient"] for r in kept])
                span = "too few patients" if s.low is None else f"{s.low:.3f} to {s.high:.3f}"
                lines.append(f"| border | {finding or 'all findings together'}, {shown} ({sum(r['y'] for r in kept):g} of {len(kept)}) | {s.value:.3f} | {span} | {len(kept)} |")
    return lines


def calibration(model, data: Path, split: str) -> list[str]:
    asked = {n: [s for row in manifest.rows(data / n, split) for s in manifest.row_samples(row) if s.turns and s.images and s.choices == ("yes", "no")] for n in ("xray_covid", "vqa_rad")}

    def told() -> dict[str, tuple[np.ndarray, np.ndarray]]:
        rows = findings(model, data, split)
        found = {"findings": ([r["p"] for r in rows], [r["y"] for r in rows])}
        for name, samples in asked.items():
            pairs = [(p.choices["yes"], s.answer.strip().lower() == "yes") for s, p in zip(samples, model.predict(samples)) if p.error is None and p.choices]
            found[f"yes/no questions, {name}"] = tuple(zip(*pairs))
        return {k: (np.array(p, float), np.array(y, float)) for k, (p, y) in found.items()}

    fitted, head, about = told(), model.vlm.heads["classify"], model.vlm.config.about
    kept = head.scale.clone(), head.shift.clone(), about["calibration"]
    head.scale.fill_(1), head.shift.fill_(0)
    about["calibration"] = {"yes_no": [1.0, 0.0]}
    plain = told()
    head.scale.copy_(kept[0]), head.shift.copy_(kept[1])
    about["calibration"] = kept[2]
    lot, lines = np.random.default_rng(0), []
    for name, (p, y) in fitted.items():
        perfect = np.percentile([ece(p, lot.random(len(p)) < p, 10, True) for _ in range(1000)], [2.5, 97.5])
        risk = [augrc(np.maximum(q, 1 - q), (q >= 0.5) == (y == 1)) for q in (plain[name][0], p)]
        lines.append(f"| calibration | {name}: ECE; AUGRC {risk[0]:.3f} before, {risk[1]:.3f} after | {ece(p, y, 10, True):.3f} | by chance {perfect[0]:.3f} to {perfect[1]:.3f} | {len(p)} |")
    return lines


def films(image: Image, folder: Path) -> Iterator[tuple[str, Image | Volume]]:
    """One X-ray in several forms, read as a user would read each."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    grey = window.display(image)
    grey = (grey if grey.ndim == 2 else grey.mean(-1)).astype(np.uint8)

    def dicom(name: str, array: np.ndarray, photometric: str, bits: int, windows: tuple[float, float] | None = None) -> Path:
        ds = Dataset()
        ds.Modality, ds.ViewPosition, ds.SOPClassUID, ds.SOPInstanceUID = "DX", "PA", "1.2.840.10008.5.1.4.1.1.1.1", generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.BodyPartExamined = generate_uid(), generate_uid(), "CHEST"
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *array.shape, 1, photometric
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, 0
        ds.ImagerPixelSpacing = [0.8, 0.8]
        if windows:
            ds.WindowCenter, ds.WindowWidth = windows
        ds.PixelData = array.astype("<u2").tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, ds.SOPClassUID, ds.SOPInstanceUID
        ds.save_as(folder / f"{name}.dcm", enforce_file_format=True)
        return folder / f"{name}.dcm"

    def picture(name: str, array: np.ndarray) -> Path:
        Pillow.fromarray(array).save(folder / f"{name}.png")
        return folder / f"{name}.png"

    wide = grey.astype(np.uint16) * 16  # 12 bits
    files = {
        "8-bit PNG": picture("grey", grey), "16-bit PNG": picture("deep", grey.astype(np.uint16) * 257),
        "DICOM, 12 bits": dicom("dx", wide, "MONOCHROME2", 12, (2040, 4080)), "MONOCHROME1": dicom("inverted", 4080 - wide, "MONOCHROME1", 12, (2040, 4080)),
        "another window": dicom("window", wide, "MONOCHROME2", 12, (2040, 4800)),
    }  # fmt: skip
    for name, file in files.items():
        yield name, medvlm.read(file, modality="xray").images[0]
    large = np.asarray(Pillow.fromarray(grey).resize((grey.shape[1] * 2, grey.shape[0] * 2), Pillow.Resampling.BICUBIC))
    yield "twice as large", medvlm.read(picture("large", large), modality="xray").images[0]


def scans(volume: Volume) -> Iterator[tuple[str, Volume]]:
    yield "turned", volume.reorient("LAS")
    yield "flipped", volume.reorient("IRA" if volume.orientation != "IRA" else "SLP")
    other = volume.reorient(volume.orientation)
    other.info = {**volume.info, "windows": [(-600, 1500, "")]}
    yield "another window", other


def forms(model, data: Path, split: str) -> list[dict]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, row, image in pictures(data, ("xray_covid", "dicom_series"), split):
            if row["modality"] not in ("xray", "ct") or image.unit not in ("uint8", "HU"):
                continue
            targets = ("right lung", "left lung", "heart and mediastinum") if row["modality"] == "xray" else ("body", "bone", "liver")
            first = {t: model.segment(study(image), t).mask for t in targets}
            answers = {q: model.ask(study(image), q).text for q in QUESTIONS}
            for form, other in films(image, Path(folder)) if isinstance(image, Image) else scans(image):
                for q, said in answers.items():
                    found.append({"set": name, "id": row["id"], "form": form, "question": q, "value": float(model.ask(study(other), q).text == said)})
                for t, mask in first.items():
                    drawn = model.segment(study(other), t).mask
                    if isinstance(other, Volume):
                        from medvlm.imaging.scan import turned

                        drawn = turned(drawn, other.orientation, image.orientation)
                    elif drawn.shape != mask.shape:
                        drawn = drawn[::2, ::2]
                    same = 1.0 if not (drawn.any() or mask.any()) else dice(drawn, mask)
                    found.append({"set": name, "id": row["id"], "form": form, "target": t, "dice": same, "value": float(same >= 0.97)})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="medvlm-tiny")
    parser.add_argument("--split", default="test")
    parser.add_argument("--only", nargs="*", default=["kind", "parts", "names", "absent", "mirror", "border", "calibration", "forms"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = medvlm.load(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    checks = {"kind": (kinds, "modality"), "parts": (parts, "group"), "names": (names, "modality"), "absent": (absent, "modality"), "mirror": (mirrors, "set"), "forms": (forms, "form")}
    tables = {"border": border, "calibration": calibration}
    record, lines = {}, ["| check | slice | right (%), or the figure named | 95 % interval | n |", "| --- | --- | --- | --- | --- |"]
    for name in args.only:
        if name in tables:
            print(*(made := tables[name](model, args.data, args.split)), sep="\n", flush=True)
            lines += made
            continue
        check, by = checks[name]
        record[name] = check(model, args.data, args.split)
        for part in (None, *dict.fromkeys(r[by] for r in record[name])):
            rows = [r for r in record[name] if part in (None, r[by])]
            for what in ("question", "target") if name == "forms" else (None,):
                kept = [r for r in rows if what is None or what in r]
                if kept:
                    s = mean_score(name, [r["value"] for r in kept], [f"{r['set']}/{r['id']}" for r in kept])
                    span = "too few images" if s.low is None else f"{100 * s.low:.1f} to {100 * s.high:.1f}"
                    shown = " ".join(filter(None, (part or "all", {"question": "(answers)", "target": "(masks, Dice of 0.97)"}.get(what))))
                    lines.append(f"| {name} | {shown} | {100 * s.value:.1f} | {span} | {len(kept)} |")
                    print(lines[-1], flush=True)
    (args.out / "scores.json").write_text(json.dumps(record, indent=1))
    (args.out / "scores.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
