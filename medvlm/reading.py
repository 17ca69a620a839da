"""The main job: studies in; report.json, report.md, masks, preview.png and, of DICOM, seg.dcm and sr.dcm out, whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .datasets import sentences
from .datasets.checks import digest
from .errors import MedVLMError, UsageError
from .imaging import export
from .imaging.scan import Image, Study, Volume
from .imaging.seg import save_seg
from .predictors.base import Model, json_ready
from .sample import NOTICE, Region, Report, rounded
from .sr import Read, save_sr


def analyze(study: Study, model: Model, out: str | Path, image: str | None = None, asked: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a study and write the results into a folder; gives what report.json holds.

    Files of an earlier run in ``out`` are replaced, report.json last; anything else in it is left alone.
    image: id of the only image to read, all of them when None. asked: how the study was read, kept in the record.

    Raises:
        UsageError: CANNOT_WRITE when the folder cannot be made or written.
    """
    if image is not None:
        study = Study(study.id, study.patient, (study.image(image),), study.report, study._warnings)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror})", "CANNOT_WRITE") from error
    try:
        record = _write(study, model, fresh, asked or {})
        out.mkdir(exist_ok=True)
        for old in _written(out):  # report.json first: a folder without it is not whole
            old.unlink(missing_ok=True)
        for path in sorted((p for p in fresh.rglob("*") if p.is_file()), key=lambda p: p.name == "report.json"):
            target = out / path.relative_to(fresh)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror})", "CANNOT_WRITE") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return record


def analyze_many(sources: Sequence[str | Path], model: Model, out: str | Path, policy: str = "strict",
                 modality: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """Every study of every source into ``out/<study id>``; gives (source, record), an error as {"error": ...}.

    A study that this model has already read into ``out`` is not read again, so a stopped run goes on where it was; one
    that comes with other images than before is. Of sources that hold different images of one study the second is written into
    ``out/<study id>-2``. A study of which nothing could be read is an error, like one that the model fails on; the others go on.
    """
    from .imaging.study import studies

    asked = {"policy": policy, "modality": modality}
    taken: dict[Path, str] = {}
    for source in sources:
        try:
            for study in studies(source, policy, modality=modality):
                held = _held(study)
                names = (Path(out) / (study.id if k == 1 else f"{study.id}-{k}") for k in itertools.count(1))
                folder = next(f for f in names if taken.setdefault(f, held) == held)
                if old := _done(folder / "report.json", model, asked, held):
                    yield str(source), old
                elif not study.images:
                    yield str(source), {"study": study.id, "error": next(iter(study.warnings), "EMPTY_FOLDER: it holds no image")}
                else:
                    yield str(source), _tried(study, model, folder, asked)
                for image in study.images:
                    image.release()
        except MedVLMError as error:
            yield str(source), {"study": None, "error": f"{error.code}: {error.message}"}


def _written(out: Path) -> list[Path]:
    """The files that an earlier run put into a folder, report.json first; nothing that it does not name itself."""
    try:
        record = json.loads((out / "report.json").read_text(encoding="utf-8"))
        named = {r["mask"] for f in record["findings"] for r in f["regions"]} | {r["mask"] for r in record["structures"]}
        named |= {i.get(n) for i in record["images"] for n in ("preview", "seg")} | {record.get("sr")}
    except (OSError, ValueError, KeyError, TypeError):  # none, or not one of ours
        return []
    inside = [out / n for n in named if n and (out / n).resolve().is_relative_to(out.resolve())]
    return [out / "report.json", out / "report.md", *inside]


def _held(study: Study) -> str:
    """SHA-256 that tells the images of a study from others: of their DICOM UIDs, or of their files."""

    def told(image: Image | Volume) -> str:
        try:
            return json.dumps([image.id, list(image.shape), image.info.get("sop") or digest(image)])
        except MedVLMError as error:  # what cannot be read is said where it is read
            return f"{image.id} {error.code}"

    return hashlib.sha256("\n".join(map(told, study.images)).encode()).hexdigest()


def _done(path: Path, model: Model, asked: dict[str, Any], held: str) -> dict[str, Any] | None:
    """The record of a study that this very model has read with the same arguments and images."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record["model"] == _made_by(model) and record["asked"] == asked and record["held"] == held else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or not one of ours
        return None


def _tried(study: Study, model: Model, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        return analyze(study, model, folder, asked=asked)
    except MedVLMError as error:
        return {"study": study.id, "error": f"{error.code}: {error.message}"}
    except Exception as error:  # a foreign text may quote what is inside a patient's file
        return {"study": study.id, "error": f"INTERNAL: {type(error).__name__}"}


def _made_by(model: Model) -> dict[str, Any]:
    return {"name": model.name, "version": model.version, "sha256": model.sha256}


def _write(study: Study, model: Model, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    reports, failed = {}, []
    for image in study.images:
        try:
            reports[image.id] = (image, model.report(study, image=image.id))
        except MedVLMError as error:  # pixels are read only now; a damaged image does not lose the others
            failed.append(error)
            image.info["warnings"].append(f"{error.code}: {error.message}")
    if failed and not reports:
        raise failed[0]
    read = {name: pair for name, pair in reports.items() if pair[1].out_of_scope is None}
    reasons = {name: r.out_of_scope for name, (_, r) in reports.items() if r.out_of_scope}
    endings = {name: "" if name == next(iter(read)) else f"-{name}" for name in read}
    previews = {name: f"preview{ending}.png" for name, ending in endings.items()}
    findings, said, structures, for_sr, segs, trouble = [], [], [], [], {}, []
    for name, (image, report) in read.items():
        masks = _masks(report)
        paths = _save_masks(folder, image, masks)
        if "frames" in image.info:
            seg = None
            try:
                path = folder / f"seg{endings[name]}.dcm"
                seg = save_seg(image, masks, path, (model.name, model.version)) if masks else None
                segs |= {name: path.name} if masks else {}
            except MedVLMError as error:
                trouble.append(f"NO_SEG: {error.message} (image {name})")
            for_sr.append(Read(image, report, masks, seg))
        offset = len(findings)
        for finding in report.looked_for:
            findings.append({
                "image": name, "label": finding.label, "present": finding.present, "probability": rounded(finding.probability),
                "regions": [r.to_json(paths.get(r.label)) for r in finding.regions],
                "measurements": [{"name": m.name, "value": rounded(m.value), "unit": m.unit} for m in finding.measurements],
            })  # fmt: skip
        said += [{"image": name, "section": s.section, "text": s.text, "findings": [offset + k for k in s.findings]} for s in report.sentences]
        structures += [r.to_json(paths.get(r.label)) for r in _structures(report)]
        drawn = _structures(report) + [r for f in report.looked_for for r in f.regions if r.label == f.label]
        lines = [(" ".join([s.text, *(f"({chance(report.looked_for[k].probability)})" for k in s.findings if len(s.findings) == 1)]), [r.label for r in s.regions])
                 for s in report.sentences]  # fmt: skip
        export.save_preview(image, drawn, lines, folder / previews[name], f"{model.name} {model.version}", NOTICE)
    try:
        if for_sr:
            save_sr(for_sr, folder / "sr.dcm", (model.name, model.version))
    except MedVLMError as error:
        trouble.append(f"NO_SR: {error.message}")
    there = {report.looked_for[k].label for _, report in read.values() for s in report.sentences for k in s.findings
             if not sentences.denies(s.text)}  # fmt: skip
    absent = list(dict.fromkeys(f["label"] for f in findings if f["label"] not in there))
    warnings = list(study.warnings) + ([f"NOT_READ: {r} (image {name})" for name, r in reasons.items()] if read else []) + trouble
    record = json_ready({
        "study": study.id, "model": _made_by(model), "asked": asked, "held": _held(study),
        "images": [{"id": i.id, "modality": i.modality, "size": list(i.shape[1:]), "spacing": i.spacing and [rounded(s, 6) for s in i.spacing],
                    "preview": previews.get(i.id), "seg": segs.get(i.id), "warnings": list(i.info["warnings"])} for i in study.images],
        "findings": findings, "looked_for_absent": absent, "structures": structures, "sentences": said, "warnings": warnings,
        "sr": "sr.dcm" if (folder / "sr.dcm").exists() else None,
        "out_of_scope": None if read else "; ".join(dict.fromkeys(reasons.values())) or "the study holds no image", "notice": NOTICE,
    })  # fmt: skip
    (folder / "report.md").write_text(markdown(record), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
    return record


def _structures(report: Report) -> list[Region]:
    """Outlined anatomy: regions of the report whose label is no finding."""
    labels = {f.label for f in report.looked_for}
    return list({r.label: r for f in report.looked_for for r in f.regions if r.label not in labels}.values())


def _masks(report: Report) -> dict[str, np.ndarray]:
    """The first mask of every label that the report looked at."""
    found: dict[str, np.ndarray] = {}
    for region in (r for f in report.looked_for for r in f.regions):
        if region.mask is not None:
            found.setdefault(region.label, region.mask)
    return found


def _save_masks(folder: Path, image: Image | Volume, masks: Mapping[str, np.ndarray]) -> dict[str, str]:
    """{label: path relative to the folder} of every mask: PNG for pictures, NIfTI for volumes."""
    paths: dict[str, str] = {}
    for label, mask in masks.items():
        name = re.sub(r"[\W_]+", "-", label.lower()).strip("-") or "target"
        ending = ".png" if isinstance(image, Image) else ".nii.gz"
        path = folder / "masks" / f"{image.id}_{name}{ending}"
        if path.exists():  # two labels that differ in their marks alone
            path = path.with_name(f"{image.id}_{name}-{len(paths) + 1}{ending}")
        path.parent.mkdir(exist_ok=True)
        if ending == ".png":
            export.save_mask_png(mask, path)
        else:
            export.save_mask_nifti(image, mask, path)
        paths[label] = str(path.relative_to(folder))
    return paths


def markdown(record: dict[str, Any]) -> str:
    """report.json as a page to read."""
    lines = [f"# Reading of {record['study']}", "", f"> {record['notice']}", ""]
    lines += [f"Model: {record['model']['name']} {record['model']['version']}", ""]
    for image in record["images"]:
        spacing = "spacing unknown" if not image["spacing"] else " x ".join(f"{s:g}" for s in image["spacing"]) + " mm"
        lines.append(f"- {image['id']}: {image['modality']}, {' x '.join(map(str, image['size']))}, {spacing}")
    if record["out_of_scope"]:
        lines += ["", f"**No reading:** {record['out_of_scope']}."]
    read = [i for i in record["images"] if i["preview"]]
    for image in read:
        if len(read) > 1:
            lines += ["", f"# {image['id']}"]
        lines += ["", f"![outlines on {image['id']}]({image['preview']})"]
        for section in ("findings", "impression"):
            said = [s for s in record["sentences"] if s["section"] == section and s["image"] == image["id"]]
            if said:
                lines += ["", f"## {section.title()}", "", *[f"- {s['text']} ({_support(record, s)})" for s in said]]
        measured = [(f["label"], m) for f in record["findings"] if f["image"] == image["id"] for m in f["measurements"]]
        if measured:
            lines += ["", "## Measurements", ""]
            lines += [f"- {label}: {m['name']} {m['value']:g}{'' if m['unit'] == '1' else ' ' + m['unit']}" for label, m in measured]
    if record["warnings"]:
        lines += ["", "## Warnings", "", *[f"- {w}" for w in record["warnings"]]]
    return "\n".join(lines) + "\n"


def chance(probability: float | None) -> str:
    """ "present 12%"; never 0 % or 100 %, which no model can know."""
    if probability is None or probability != probability:
        return "chance unknown"
    return "present " + ("<1%" if probability < 0.01 else ">99%" if probability > 0.99 else f"{probability:.0%}")


def _support(record: dict[str, Any], sentence: dict[str, Any]) -> str:
    """What a sentence rests on: the chance of its finding, and where it was outlined or looked for."""
    parts, found = [], [record["findings"][k] for k in sentence["findings"]]
    if len(found) > 1 and not any(f["regions"] for f in found):  # a list of what is not there, or of what the picture is as a whole
        return ", ".join(f"{f['label']} {chance(f['probability']).removeprefix('present ')}" for f in found)
    for finding in found:
        places = [r["label"] for r in finding["regions"]]
        own = finding["label"] in places
        parts += [chance(finding["probability"]), "outlined" if own else f"looked for in {' and '.join(places)}" if places else "no outline to look in"]
    return "; ".join(parts) or "in the model's own words"


def spoken(record: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    if record.get("error"):
        return f"{record['study'] or 'no study'}: {record['error']}"
    if record["out_of_scope"]:
        return f"No reading: {record['out_of_scope']}.\n{record['notice']}"
    read = [i["id"] for i in record["images"] if i["preview"]]
    lines = []
    for image in read:
        for section in ("findings", "impression"):
            lines.append(section.upper() + (f" ({image})" if len(read) > 1 else ""))
            said = [s for s in record["sentences"] if s["section"] == section and s["image"] == image]
            lines += [f"  {s['text']:<44} {_support(record, s)}" for s in said]
    return "\n".join([*lines, *[f"warning: {w}" for w in record["warnings"]], record["notice"]])
