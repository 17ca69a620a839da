"""What this installation can do: packages, devices, codecs and the bundled models, each with what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from typing import Any

from . import __version__
from .errors import FileError, MedVLMError

DISTRIBUTION = "medvlm-toolkit"
SYNTAXES = {
    "JPEG baseline": "1.2.840.10008.1.2.4.50", "JPEG extended, 12 bits": "1.2.840.10008.1.2.4.51", "JPEG lossless": "1.2.840.10008.1.2.4.70",
    "JPEG-LS": "1.2.840.10008.1.2.4.80", "JPEG 2000": "1.2.840.10008.1.2.4.90", "HTJ2K": "1.2.840.10008.1.2.4.201", "RLE": "1.2.840.10008.1.2.5",
}  # fmt: skip
"""A transfer syntax of each family. Source: DICOM PS3.6, annex A."""


def examine() -> dict[str, Any]:
    """{"medvlm", "python", "platform", "packages", "extras", "devices", "codecs", "models", "problems"}, as plain data.

    packages: {name: version, None where it is missing}. extras: {name: what is missing for it}. codecs: {family: decoder, None
    where there is none}. models: {name: "reads" or the error's code}. problems: [what does not work, and the next step].
    """
    problems: list[str] = []
    packages, extras = _packages(problems)
    return {
        "medvlm": __version__, "python": platform.python_version(), "platform": platform.platform(), "packages": packages, "extras": extras,
        "devices": _devices(problems), "codecs": _codecs(problems), "models": _models(problems), "problems": problems,
    }  # fmt: skip


def _packages(problems: list[str]) -> tuple[dict[str, str | None], dict[str, list[str]]]:
    """What the distribution asks for, by its own metadata."""
    from packaging.requirements import Requirement

    packages: dict[str, str | None] = {}
    extras: dict[str, list[str]] = {}
    try:
        asked = [Requirement(r) for r in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        problems.append("medvlm is imported from a folder and not installed, so its packages are not known: pip install -e .")
        return packages, extras
    for wanted in asked:
        version = _version(wanted.name)
        fits = version is not None and wanted.specifier.contains(version, prereleases=True)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            packages[wanted.name] = version
            if not fits:
                problems.append(f"{wanted.name} is {version or 'missing'}, {wanted.specifier or 'any version'} is needed: pip install '{wanted.name}{wanted.specifier}'")
        elif wanted.name != DISTRIBUTION and (name := re.search(r'extra == "([\w-]+)"', str(wanted.marker))):
            extras.setdefault(name[1], []).extend([] if fits else [wanted.name])
    return packages, extras


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices(problems: list[str]) -> dict[str, Any]:
    try:
        import torch

        from .train.loop import fast_bf16
    except Exception as error:  # a broken wheel can raise anything
        problems.append(f"torch cannot be imported ({type(error).__name__}): install torch and torchvision again, both from the same index")
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cores": cores, "threads": torch.get_num_threads(), "bf16": fast_bf16("cpu"), "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "mps": torch.backends.mps.is_available()}  # fmt: skip


def _codecs(problems: list[str]) -> dict[str, str | None]:
    from .imaging.dicom_pixels import plugin

    found: dict[str, str | None] = {}
    for name, syntax in SYNTAXES.items():
        try:
            found[name] = plugin(syntax)
        except FileError as error:
            found[name] = None
            problems.append(f"DICOM files in {name} cannot be read: {error.message}")
    return found


def _models(problems: list[str]) -> dict[str, str]:
    from .predictors import BUNDLED, load

    found: dict[str, str] = {}
    for folder in sorted(p.parent for p in BUNDLED.glob("*/config.json")):
        try:
            load(folder.name)
            found[folder.name] = "reads"
        except MedVLMError as error:
            found[folder.name] = error.code
            problems.append(f"the bundled model {folder.name} cannot be loaded: {error}")
    return found


def spoken(found: dict[str, Any]) -> str:
    """:func:`examine` as lines to read."""
    devices = found["devices"]
    lines = [f"medvlm {found['medvlm']}, Python {found['python']}, {found['platform']}", ""]
    if devices:
        gpus = ", ".join(devices["cuda"]) or ("mps" if devices["mps"] else "none")
        lines += [f"processor   {devices['cores']} cores, {'with' if devices['bf16'] else 'without'} bf16", f"GPU         {gpus}"]
    lines += [f"{'codec' if k == 0 else '':<12}{name}: {by or 'MISSING'}" for k, (name, by) in enumerate(found["codecs"].items())]
    lines += [f"{'extra' if k == 0 else '':<12}{name}: {'installed' if not missing else 'lacks ' + ', '.join(missing)}" for k, (name, missing) in enumerate(found["extras"].items())]
    lines += [f"{'model' if k == 0 else '':<12}{name}: {state}" for k, (name, state) in enumerate(found["models"].items())]
    lines += [f"{'package' if k == 0 else '':<12}{name} {version or 'MISSING'}" for k, (name, version) in enumerate(found["packages"].items())]
    return "\n".join([*lines, "", *(f"problem: {p}" for p in found["problems"])] if found["problems"] else [*lines, "", "everything that is needed works"])
