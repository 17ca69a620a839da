"""Where files come from and go to: folders, archives that cannot reach outside themselves, writes that cannot be half done."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import FileError
from . import limits

LITTER = {"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db"}
"""Names (lower case) that operating systems leave behind."""

ENDINGS = (
    ".dcm", ".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz", ".mgh", ".mgh.gz", ".mgz", ".mnc", ".par", ".rec", ".tck", ".trk",
    ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp",
)  # fmt: skip
"""Endings of the files that are read."""


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well and vanishes when it does not.

    Raises:
        FileError: CANNOT_WRITE.
    """
    path = Path(path)
    part = path.with_name(f".{path.name[:80]}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise FileError(f"cannot write {path}: {e.strerror or type(e).__name__}", "CANNOT_WRITE") from e
    finally:
        part.unlink(missing_ok=True)


def walk(folder: Path, what: str) -> list[Path]:
    """Every visible regular file below ``folder`` in name order. Links to folders are not followed.

    Raises:
        FileError: UNREADABLE when the folder or one below it cannot be listed, TOO_LARGE.
    """

    def refuse(e: OSError):
        raise FileError(f"{what}, or a folder below it, cannot be listed ({e.strerror or type(e).__name__})", "UNREADABLE") from e

    found = []
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [n for n in folders if not litter(n)]
        found += [Path(here, n) for n in names if not litter(n) and os.path.isfile(os.path.join(here, n))]
        if len(found) > limits.max_files:
            raise FileError(f"{what} holds more than {limits.max_files} files", "TOO_LARGE")
    return sorted(found, key=lambda p: p.relative_to(folder).parts)


def litter(name: str) -> bool:
    """True for hidden files and what operating systems leave behind."""
    return name.startswith(".") or name.lower() in LITTER


class Scratch:
    """A private folder (0700) that lives as long as something refers to this object."""

    def __init__(self):
        self.path = Path(tempfile.mkdtemp(prefix="medvlm-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def unzip(path: Path, what: str) -> Scratch:
    """The files of a zip archive, flat in a private folder.

    Names inside the archive choose only the order, which of them share a stem, and one of ``ENDINGS``; they never become paths, so
    no name can leave the folder and none that tells of the patient reaches the disk. Archives inside are not opened.

    Raises:
        FileError: UNSAFE_PATH (``..``, absolute names, links), BOMB or TOO_LARGE (count, size, ratio, overlapping
            entries), TRUNCATED, CHECKSUM, UNSUPPORTED (password), before anything that cannot be trusted is written.
    """
    scratch = Scratch()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir()]
            _check_entries(archive.infolist(), entries, path.stat().st_size, what)
            entries = [e for e in entries if not any(litter(p) for p in PurePosixPath(e.filename).parts)]
            entries.sort(key=lambda e: PurePosixPath(e.filename).parts)
            numbers: dict[str, int] = {}
            for n, entry in enumerate(entries):
                stem, ending = stem_and_ending(entry.filename)
                target = scratch.path / f"{numbers.setdefault(stem, n):06d}{ending}"
                if target.exists():  # two entries of one name: keep both
                    target = scratch.path / f"{n:06d}-twin{ending}"
                with archive.open(entry) as source, open(target, "xb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as e:
        code = "CHECKSUM" if "CRC" in str(e) else "TRUNCATED"
        raise FileError(f"the archive {what} is {'damaged' if code == 'CHECKSUM' else 'not a whole zip file'}", code) from e
    except (EOFError, zlib.error) as e:
        raise FileError(f"the archive {what} ends too early", "TRUNCATED") from e
    except (NotImplementedError, RuntimeError) as e:
        raise FileError(f"the archive {what} is compressed or locked in a way that is not supported", "UNSUPPORTED") from e
    return scratch


def _check_entries(everything, entries, size: int, what: str) -> None:
    if len(everything) > limits.max_files:
        raise FileError(f"the archive {what} holds {len(everything)} entries; the limit is {limits.max_files}", "BOMB")
    for e in everything:
        name = e.orig_filename
        parts = re.split(r"[/\\]", name)
        kind = stat.S_IFMT(e.external_attr >> 16)
        if ".." in parts or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or "\0" in name:
            raise FileError(f"the archive {what} holds a name that points outside the archive", "UNSAFE_PATH")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise FileError(f"the archive {what} holds a link or a device", "UNSAFE_PATH")
        if e.flag_bits & 1:
            raise FileError(f"the archive {what} is locked with a password", "UNSUPPORTED", "unlock it and try again")
    packed, unpacked = sum(e.compress_size for e in entries), sum(e.file_size for e in entries)
    if packed > size:
        raise FileError(f"the entries of the archive {what} overlap or claim more bytes than it has", "BOMB")
    if unpacked > limits.free_zip_bytes and unpacked > limits.max_zip_ratio * max(packed, 1):
        raise FileError(f"the archive {what} claims {unpacked >> 20} MiB in {packed} bytes", "BOMB")
    if unpacked > limits.max_zip_bytes:
        raise FileError(f"the archive {what} would take {unpacked >> 20} MiB; the limit is {limits.max_zip_bytes >> 20} MiB", "TOO_LARGE")


def stem_and_ending(name: str) -> tuple[str, str]:
    """("scan.1", ".nii.gz") of "scan.1.NII.GZ"; the ending is "" where it is none of ``ENDINGS``."""
    ending = max((e for e in ENDINGS if name.lower().endswith(e)), key=len, default="")
    return name[: len(name) - len(ending)], ending
