"""What is in a study, as a table a radiographer would recognise and as plain data."""

from __future__ import annotations

import math
from typing import IO, Any

from .scan import Study, Volume

PLAIN = ("body_part", "view", "laterality", "burned_in")


def summary(study: Study) -> dict[str, Any]:
    """The study as JSON-ready data; sizes and spacings are in array order (D, H, W) or (H, W), lengths in mm."""
    images = []
    for i in study.images:
        windows = i.info.get("windows") or []
        row = {
            "id": i.id,
            "modality": i.modality,
            "size": [int(n) for n in i.shape[1:]],
            "channels": int(i.shape[0]),
            "spacing": None if i.spacing is None else [float(s) for s in i.spacing],
            "orientation": i.orientation if isinstance(i, Volume) else None,
            "affine": i.affine.tolist() if isinstance(i, Volume) else None,
            "unit": i.unit,
            "type": str(i.dtype),
            "windows": [[_number(c), _number(w)] for c, w in (tuple(x)[:2] for x in windows)],
            "inverted": bool(i.info.get("inverted", False)),
            **{k: _plain(i.info.get(k)) for k in PLAIN},
            "warnings": [_text(w) for w in i.info["warnings"]],
        }
        images.append(row)
    return {
        "study": study.id,
        "patient": study.patient,
        "images": images,
        "report": study.report is not None,
        "warnings": [_text(w) for w in study._warnings],
    }


def table(study: Study, file: IO[str] | None = None) -> None:
    """Print the study to ``file`` (standard output when None)."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class Piped(Console):
        def on_broken_pipe(self) -> None:  # rich would end the program with status 1
            raise BrokenPipeError

    console = Piped(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160  # a pipe has no edge to wrap at
    data = summary(study)
    volumes = sum(isinstance(i, Volume) for i in study.images)
    parts = [f"{n} {word}{'' if n == 1 else 's'}" for n, word in ((volumes, "volume"), (len(study.images) - volumes, "picture")) if n]
    console.print(Text(f"{data['study']}   {', '.join(parts) or 'no images'}{'   with a report' if data['report'] else ''}", style="bold"))
    if data["images"]:
        grid = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in ("image", "modality", "size", "spacing (mm)", "orientation", "values", "window", "part, view, side"):
            grid.add_column(name, overflow="fold")
        for row in data["images"]:
            grid.add_row(*(Text(c) for c in _cells(row)))
        console.print(grid)
    for warning in data["warnings"]:
        console.print(Text(f"! {warning}", style="yellow"))
    for row in data["images"]:
        for warning in row["warnings"]:
            console.print(Text(f"! {row['id']}: {warning}", style="yellow"))


def _cells(row: dict[str, Any]) -> list[str]:
    colour = "" if row["channels"] == 1 else ", colour"
    window = row["windows"][0] if row["windows"] else None
    return [
        row["id"],
        row["modality"],
        " x ".join(map(str, row["size"])),
        "unknown" if row["spacing"] is None else " x ".join(f"{s:.4g}" for s in row["spacing"]),
        _orientation(row["orientation"]),
        f"{row['unit']} ({row['type']}{colour}{', inverted' if row['inverted'] else ''})",
        "-" if window is None else " / ".join(f"{n:g}" if n is not None else "?" for n in window),
        ", ".join(str(row[k]) for k in ("body_part", "view", "laterality") if row[k]) or "-",
    ]


def _orientation(letters: str | None) -> str:
    """Slices first: the plane a radiographer names, then the letters."""
    if letters is None:
        return "-"
    plane = {"S": "axial", "I": "axial", "P": "coronal", "A": "coronal", "L": "sagittal", "R": "sagittal"}[letters[0]]
    return f"{plane} {letters}"


def _number(value) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    return _text(value)


def _text(value: Any) -> str:
    """Text from a file, without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in str(value))
