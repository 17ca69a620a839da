"""``manifest.jsonl``: any data set as one JSON object a line (schema: docs/manifest.md).

A row gives one Sample per ``qa`` entry (id = qid, group = pair), one per mask (id = row id / name), and one for its
text; a row with none of them gives one Sample that holds its image, labels and boxes.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import MedVLMError, ModelError
from ..evaluate import labeller
from ..imaging.scan import Image, Volume
from ..imaging.seg import read_seg
from ..sample import Mask, Region, Sample, Turn
from .checks import blank, leave_out, touch

KNOWN = {"id", "image", "modality", "split", "patient", "text", "findings", "mask", "boxes", "qa"}
MODALITIES = {"xray", "ct", "mr", "ct_or_mr", "pet", "nm", "fundus", "pathology", "ultrasound", "endoscopy",
              "dermoscopy", "oct", "other", "unknown"}  # fmt: skip
REPORTED = ("findings", "impression")
"""Headings that make a text a report, where the row has no ``sections``."""
MASK_TYPES = {"binary", "instance", "labelmap", "volume_binary", "volume_labelmap", "dicom_seg"}

PACKED = 1 << 20
"""Bytes from which on a mask is kept packed."""
_KINDS = {str: "a string", dict: "an object", list: "a list"}


def rows(path: str | Path, split: str | None = None, bad: list[dict] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a manifest file, or of the ``manifest.jsonl`` in a folder; checked.

    split: only rows of this split; all rows where the manifest has no row of that split and no split at all.
    bad: None to raise the first error, or a list that takes up the lines that break a rule (see :func:`.checks.leave_out`).

    Raises:
        ModelError: BAD_MANIFEST with the line number, the field, what was found and what was expected.
    """
    path = Path(path)
    path = path / "manifest.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ModelError(f"{path} does not exist", "BAD_MANIFEST")
    seen: dict[str, int] = {}
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = None
            try:
                row = parse(line, path.name, number)
                if row["id"] in seen:
                    raise ModelError(f"{path.name} line {number}: id {row['id']!r} was used on line {seen[row['id']]}", "BAD_MANIFEST")
            except ModelError as error:
                leave_out(bad, error, number, row and row["id"])
                continue
            seen[row["id"]] = number
            if split is None or row.get("split", split) == split:
                yield row | {"_folder": path.parent, "_line": number}


def samples(path: str | Path, split: str | None = None) -> Iterator[Sample]:
    """The samples of a manifest. Images are opened once a row and their pixels read when first used."""
    for row in rows(path, split):
        yield from row_samples(row)


def row_group(row: dict[str, Any], bad: list[dict] | None = None, pixels: bool = False) -> list[Sample]:
    """The samples of one row, fit to learn from: its texts are not blank, its image and masks are there and fit together.

    bad: None to raise what is wrong, or a list that takes it up: blank texts are then left out, else the whole row ([]).
    pixels: read every image whole too, see :func:`.checks.touch`.
    """
    row = filled(row, bad)
    try:
        group = list(row_samples(row))
        if pixels:
            touch(group, _at(row))
    except MedVLMError as error:
        leave_out(bad, error, row["_line"], row["id"])
        return []
    return group


def filled(row: dict[str, Any], bad: list[dict] | None = None) -> dict[str, Any]:
    """The row without texts, questions and answers that are blank.

    Raises:
        ModelError: EMPTY_TEXT, where ``bad`` is None and there is one.
    """

    def refuse(what: str) -> None:
        leave_out(bad, ModelError(f"{_at(row)}: {what} is blank", "EMPTY_TEXT", "fill it in, or leave it out of the manifest"), row["_line"], row["id"])

    whole = {**row}
    if row.get("text") is not None and blank(row["text"]):
        refuse("the text")
        whole["text"] = None
    if row.get("qa"):
        whole["qa"] = []
        for i, qa in enumerate(row["qa"]):
            if empty := next((field for field in ("question", "answer") if blank(str(qa[field]))), None):
                refuse(f"the {empty} of qa[{i}]")
            else:
                whole["qa"].append(qa)
    return whole


def row_samples(row: dict[str, Any]) -> Iterator[Sample]:
    """The samples of one row as :func:`rows` gives it."""
    images = {i.id: i for i in open_images(row)}
    first = next(iter(images), None)
    whole = Sample(
        id=row["id"], patient=row.get("patient"), images=images, regions=tuple(_regions(row, first)),
        labels={k: math.nan if v is None else float(v) for k, v in (row.get("findings") or {}).items()},
        meta={k: v for k, v in row.items() if k not in KNOWN - {"split", "modality"} and not k.startswith("_")} | {"row": row["id"]},
    )  # fmt: skip
    from dataclasses import replace

    for qa in row.get("qa") or ():
        yield replace(
            whole, id=str(qa["qid"]), group=qa.get("pair"), turns=(Turn("user", qa["question"]), Turn("assistant", str(qa["answer"]))),
            choices=tuple(qa["choices"]) if qa.get("choices") else ("yes", "no") if str(qa["answer"]).strip().lower() in ("yes", "no") else None,
            meta={**whole.meta, **{k: v for k, v in qa.items() if k not in ("question", "answer", "pair")}, "row": row["id"]},
        )  # fmt: skip
    names = list((row.get("mask") or {}).get("files", {}))
    for name in names:
        for mask in read_masks(row, images.get(first), only=name):
            suffix = mask.label if len(names) == 1 or mask.label == name else f"{name}/{mask.label}"
            yield replace(whole, id=f"{row['id']}/{suffix}", masks=(mask,))
    if row.get("text"):
        sections = row.get("sections") or _reported(row["text"])
        yield replace(whole, turns=(Turn("assistant", row["text"]),), meta={**whole.meta, **({"sections": sections} if sections else {})})
    if not (row.get("qa") or names or row.get("text")):
        yield whole


def _reported(text: str) -> dict[str, str]:
    """Findings and impression of a text that is a report, {} of others: it begins with a heading; a note may hold one."""
    found = labeller.sections(text)
    return {} if "" in found else {name: part for name, part in found.items() if name in REPORTED}


def open_images(row: dict[str, Any]) -> tuple[Image | Volume, ...]:
    """The images of a row; () for a row of text."""
    if not row.get("image"):
        return ()
    from ..imaging.study import read

    path = inside(row, "image", row["image"])
    modality = row["modality"] if row["modality"] not in ("ct_or_mr", "unknown") else None
    try:
        images = read(path, modality=modality).images
    except MedVLMError as error:
        said = error.message.replace(str(path), "of that name")  # which may be the name of a patient
        raise ModelError(f"{_at(row)}, image: {said}", error.code, error.hint) from error
    for image in images:
        image.origin = path
    return images


def read_masks(row: dict[str, Any], image: Image | Volume | None, only: str | None = None) -> list[Mask]:
    """The masks of a row as bool arrays on the image's grid.

    binary, instance and volume_binary files give one mask each (instances are joined), named as in ``files``; label maps
    one mask a label (one in all where the labels are not said), DICOM segmentations one a segment. Volumes may be stored along other axes than their image, never
    on another grid: nothing is resampled.

    Raises:
        ModelError: BAD_MANIFEST when a file is missing or is no mask; GRID_MISMATCH when its grid is not the image's.
    """
    spec = row.get("mask") or {}
    found: list[Mask] = []
    for name, file in spec.get("files", {}).items():
        if only is not None and name != only:
            continue
        path = inside(row, "mask file", file)
        if not path.is_file():
            raise ModelError(f"{_at(row)}: the mask file of {name!r} does not exist", "BAD_MANIFEST")
        if image is None:
            raise ModelError(f"{_at(row)}: a mask needs an image", "BAD_MANIFEST")
        try:
            if spec["type"] == "dicom_seg":
                segments = read_seg(path, image)
                found += [_held(image.id, name if len(segments) == 1 else label, array) for label, array in segments]
                continue
            array = mask_array(path, image)
        except MedVLMError as error:
            raise ModelError(f"{_at(row)}, mask {name!r}: {error.message}", error.code, error.hint) from error
        if "labelmap" in spec["type"] and spec.get("labels"):
            for label in dict.fromkeys(spec["labels"].values()):
                found.append(_held(image.id, label, np.logical_or.reduce([array == int(value) for value, own in spec["labels"].items() if own == label])))
        else:
            found.append(_held(image.id, name, array > 0, np.unique(array[array > 0]).size if spec["type"] == "instance" else None))
    return found


class Outline(Mask):
    """A mask that is drawn whenever it is looked at, and not kept. array: the mask, or what gives it."""

    def __init__(self, image: str, label: str, array: np.ndarray | Callable[[], np.ndarray], count: int | None = None):
        draw = array if callable(array) else lambda: array
        for name, value in (("image", image), ("label", label), ("count", count), ("_draw", draw)):
            object.__setattr__(self, name, value)

    @property
    def array(self) -> np.ndarray:
        return self._draw()


def _held(image: str, label: str, array: np.ndarray, count: int | None = None) -> Mask:
    """A mask as it is kept: of a data set of volumes the outlines would fill the memory, packed they are a hundredth."""
    if array.nbytes < PACKED:
        return Mask(image, label, array, count)
    return Outline(image, label, partial(_unpacked, zlib.compress(np.packbits(array), 1), array.shape), count)


def _unpacked(held: bytes, shape: tuple[int, ...]) -> np.ndarray:
    return np.unpackbits(np.frombuffer(zlib.decompress(held), np.uint8), count=math.prod(shape)).view(bool).reshape(shape)


def inside(row: dict[str, Any], what: str, name: str) -> Path:
    """A path of a row, or BAD_MANIFEST when it leads outside the manifest's folder."""
    path = row["_folder"] / name
    if "\0" in name or not path.resolve().is_relative_to(row["_folder"].resolve()):
        raise ModelError(f"{_at(row)}: the path of its {what} leads outside the manifest's folder", "BAD_MANIFEST")
    return path


def _at(row: dict[str, Any]) -> str:
    return f"manifest line {row['_line']}" + (f" ({row['_shard']})" if "_shard" in row else "")


def mask_array(path: Path, image: Image | Volume) -> np.ndarray:
    """The values of a mask file (picture or NIfTI) on the image's grid, its axes turned where a volume is stored along others.

    Raises:
        ModelError: BAD_MANIFEST when it is no mask; GRID_MISMATCH when its grid is not the image's.
    """
    from ..imaging.study import read

    mask = read(path, modality="other").image()
    if mask.shape[0] != 1:
        raise ModelError(f"a mask has one channel, not {mask.shape[0]}", "BAD_MANIFEST")
    if isinstance(image, Volume) and isinstance(mask, Volume):
        mask = mask.reorient(image.orientation)
        if not image.same_grid(mask, tolerance=0.1 * min(image.spacing)):
            raise ModelError(f"the mask is {mask.shape[1:]} but its image is {image.shape[1:]}, or it lies elsewhere", "GRID_MISMATCH")
        return mask.voxels[0]
    if mask.shape != (1, *image.shape[1:]):
        raise ModelError(f"the mask is {mask.shape[1:]} but its image is {image.shape[1:]}", "GRID_MISMATCH")
    return mask.pixels[0]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _regions(row: dict[str, Any], image: str | None) -> Iterator[Region]:
    for box in row.get("boxes") or ():
        left, top, right, bottom = box["xyxy"]
        yield Region(image or "", box["label"], ((top, left), (bottom, right)))


def parse(line: str, file: str, number: int) -> dict[str, Any]:
    """The row that a line holds; ``file`` and ``number`` are said in errors.

    Raises:
        ModelError: BAD_MANIFEST.
    """

    def refuse(what: str) -> NoReturn:
        raise ModelError(f"{file} line {number}: {what}", "BAD_MANIFEST")

    try:
        line.encode()
        row = json.loads(line)
    except UnicodeEncodeError:
        refuse("not UTF-8")
    except json.JSONDecodeError as error:
        refuse(f"not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        refuse(f"not JSON that can be read ({type(error).__name__})")
    if not isinstance(row, dict):
        refuse(f"expected an object, got {type(row).__name__}")
    for name in ("id", "modality"):
        if not isinstance(row.get(name), str) or not row[name]:
            refuse(f"field {name!r} must be a non-empty string, got {row.get(name)!r}")
    if "image" not in row:
        refuse("field 'image' is missing (null for a row of text)")
    if not isinstance(row["image"], str | None):
        refuse(f"field 'image' must be a path or null, got {row['image']!r}")
    if row["modality"] not in MODALITIES:
        refuse(f"modality {row['modality']!r} is not one of {', '.join(sorted(MODALITIES))}")
    if row.get("split", "train") not in ("train", "val", "test"):
        refuse(f"split {row['split']!r} is not train, val or test")
    for name, kind in (("patient", str), ("text", str), ("findings", dict), ("mask", dict), ("qa", list), ("boxes", list)):
        if not isinstance(row.get(name), kind | None):
            refuse(f"field {name!r} must be {_KINDS[kind]} or null, got {str(row[name])[:80]}")
    if mask := row.get("mask"):
        files = mask.get("files")
        if mask.get("type") not in MASK_TYPES or not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            refuse(f"mask needs a type ({', '.join(sorted(MASK_TYPES))}) and files {{name: path}}, got {str(mask)[:80]}")
        labels = mask.get("labels")
        if "labelmap" in mask["type"] and labels is not None:  # null: the file's own numbers mean something nobody wrote down
            if not isinstance(labels, dict) or not labels or not all(k.isdecimal() and isinstance(v, str) for k, v in labels.items()):
                refuse(f"a mask of type {mask['type']} needs labels {{value: name}}, got {str(labels)[:80]}")
    for i, qa in enumerate(row.get("qa") or ()):
        if not isinstance(qa, dict) or not {"qid", "question", "answer"} <= qa.keys():
            refuse(f"qa[{i}] needs qid, question and answer, got {str(qa)[:80]}")
        if not isinstance(qa["question"], str) or not isinstance(qa["answer"], str | int | float) or isinstance(qa["answer"], bool):
            refuse(f"qa[{i}]: question is a text, answer a text or a number, got {qa['question']!r:.40} and {qa['answer']!r:.40}")
        if not isinstance(qa.get("pair"), str | None) or not isinstance(choices := qa.get("choices") or [], list) or not all(isinstance(c, str) for c in choices):
            refuse(f"qa[{i}]: pair is a text, choices a list of texts, got {qa.get('pair')!r:.40} and {qa.get('choices')!r:.60}")
    for i, box in enumerate(row.get("boxes") or ()):
        corners = box.get("xyxy") if isinstance(box, dict) else None
        if not isinstance(corners, list) or len(corners) != 4 or not all(_finite(x) for x in corners) or not isinstance(box.get("label"), str):
            refuse(f"boxes[{i}] needs label and xyxy [left, top, right, bottom], got {str(box)[:80]}")
    for name, value in (row.get("findings") or {}).items():
        if value not in (0, 1, None):
            refuse(f"finding {name!r} must be 1, 0 or null, got {value!r}")
    return row
