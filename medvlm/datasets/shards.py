"""Webdataset shards: a manifest as tar files that are read from one end to the other, with ``shards.json`` beside them.

One entry a row: KEY.json is the row, KEY.image.png its image (KEY.images.000000.dcm and so on for a folder),
KEY.mask.0.png its masks; the row names them without the key. KEY counts the rows of a split. Names of the source's files
do not go along. ``shards.json``: {"format", "source" (SHA-256 of the manifest), "split_by_patient", "left_out",
"shards": [{name, split, entries, bytes, sha256, largest (bytes of an entry)}]}.
Source: the WebDataset format, github.com/webdataset/webdataset: files of one basename up to its first dot are one sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NoReturn

from ..errors import FileError, MedVLMError, ModelError, UsageError
from ..imaging import limits
from ..imaging.files import stem_and_ending, writing
from ..imaging.scan import Image, Volume
from ..sample import Sample
from . import manifest
from .checks import digest_of, files_of, leave_out, split_by_patient

INDEX = "shards.json"
FORMAT = "medvlm shards 1"
HELD = 1 << 30
"""Most bytes of entries that wait in a reader's shuffle buffer."""
_SHARD = re.compile(r"(?:train|val|test|rows)-\d{6}\.tar")
_MEMBER = re.compile(r"(\d{8})\.((?:json|image|images|mask)(?:\.[a-z0-9]+)*)")
_FIELDS = {"name": str, "split": str | None, "entries": int, "bytes": int, "sha256": str, "largest": int}


def write(data: Any, out: str | Path, size: int = 256 << 20, entries: int = 10_000, splits: Sequence[str] = (),
          shares: Mapping[str, float] | None = None, seed: int = 0, bad: list[dict] | None = None, quiet: bool = False) -> dict[str, Any]:  # fmt: skip
    """Write the shards of a manifest into ``out``, whole or not at all, and give what ``shards.json`` says.

    Every row is read back as a reader will read it, pixels too, so what is in a shard can be used.

    Args:
        data: a manifest, a folder that holds one, or the Data of one. size, entries: a shard is closed at so many bytes or rows. splits: only these; () for all.
        shares: {split: part of 1}: give rows a split by patient (:func:`.checks.split_by_patient`) where none names one.
        bad: None to raise the first error, or a list that takes up what is left out.

    Raises:
        ModelError: what is wrong with a row, by line; NO_SAMPLES when no row is left. UsageError: OUTPUT_EXISTS,
            BAD_ARGUMENT. FileError: CANNOT_WRITE.
    """
    from tqdm import tqdm

    source, out = _manifest(data), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already and not empty", "OUTPUT_EXISTS")
    if size < 1 or entries < 1:
        raise UsageError("a shard holds at least one byte and one row", "BAD_ARGUMENT")
    with source.open("rb") as lines:
        total = sum(1 for line in lines if line.strip())
    part = out.with_name(f".{out.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    found: dict[str, _Writer] = {}
    try:
        with _disk(out):
            part.mkdir(parents=True)
        for row in tqdm(manifest.rows(source, bad=bad), desc="rows", unit="row", total=total, disable=True if quiet else None):
            if shares is not None:
                if row.get("split"):
                    raise UsageError(f"manifest line {row['_line']} names a split already", "BAD_ARGUMENT", "leave --split-by-patient out, or take the splits out of the manifest")
                row["split"] = split_by_patient(row.get("patient"), row["id"], shares, seed)
            if splits and row.get("split") not in splits:
                continue
            try:
                entry = _entry(row, bad)
            except MedVLMError as error:
                leave_out(bad, error, row["_line"], row["id"])
                continue
            split = row.get("split")
            with _disk(out):
                found.setdefault(split or "rows", _Writer(part, split, size, entries)).add(entry)
        with _disk(out):
            shards = [shard for writer in found.values() for shard in writer.close()]
        if not shards:
            raise ModelError("there is no row to write", "NO_SAMPLES", f"look at --split and at the {len(bad or ())} rows that were left out")
        drawn = shares and {"shares": dict(shares), "seed": seed}
        index = {"format": FORMAT, "source": digest_of([source]), "split_by_patient": drawn, "left_out": bad or [], "shards": shards}
        with writing(part / INDEX) as file:
            file.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        with _disk(out):
            if out.exists():
                out.rmdir()
            os.replace(part, out)
    finally:
        for writer in found.values():
            with contextlib.suppress(OSError):  # a full disk was said already
                writer.open.close()
        shutil.rmtree(part, ignore_errors=True)
    return index


def read_index(folder: str | Path) -> dict[str, Any]:
    """What ``shards.json`` says.

    Raises:
        ModelError: BAD_SHARD.
    """
    path = Path(folder, INDEX)
    try:
        return _index(path, path.stat().st_mtime_ns)
    except (OSError, ValueError) as error:
        _refuse(f"{INDEX} of {path.parent.name!r} cannot be read", error)


@lru_cache(maxsize=100)  # it is asked for often while a stream is read
def _index(path: Path, _changed: int) -> dict[str, Any]:
    index = json.loads(path.read_text(encoding="utf-8"))
    shards = index.get("shards") if isinstance(index, dict) and index.get("format") == FORMAT else None
    if not isinstance(shards, list) or not all(isinstance(s, dict) and all(isinstance(s.get(k), kind) for k, kind in _FIELDS.items()) for s in shards):
        _refuse(f"{INDEX} of {path.parent.name!r} is not of the format {FORMAT!r}")
    if wrong := next((s["name"] for s in shards if not _SHARD.fullmatch(s["name"])), None):
        _refuse(f"{INDEX} of {path.parent.name!r} names a shard {wrong!r}")
    return index


def shards_of(folder: str | Path, split: str | None) -> list[dict[str, Any]]:
    """The shards of one split as ``shards.json`` lists them; None: of the rows that name no split.

    Raises:
        ModelError: BAD_SHARD when one is not there or not as long as it was.
    """
    shards = [s for s in read_index(folder)["shards"] if s["split"] == split]
    for s in shards:
        try:
            there = Path(folder, s["name"]).stat().st_size
        except OSError as error:
            _refuse(f"shard {s['name']} is not in {Path(folder).name!r}", error)
        if there != s["bytes"]:
            _refuse(f"shard {s['name']} has {there} bytes, {s['bytes']} were written")
    return shards


def length(folder: str | Path, split: str | None, seed: int | None = 0, epoch: int = 0, part: tuple[int, int] = (0, 1)) -> int:
    """How many groups :func:`groups` gives with these arguments, when nothing is skipped or left out."""
    shards, step = _plan([s for s in read_index(folder)["shards"] if s["split"] == split], seed, epoch, part)
    return len(range(step.start or 0, sum(s["entries"] for s in shards), step.step or 1))


def groups(folder: str | Path, split: str | None, seed: int | None = 0, epoch: int = 0, part: tuple[int, int] = (0, 1), skip: int = 0,
           buffer: int = 256, bad: list[dict] | None = None) -> Iterator[list[Sample]]:  # fmt: skip
    """The samples of one row after the other, pixels in memory, in an order that depends on (seed, epoch) only.

    Args:
        seed: None for the order of the manifest; else the shards are permuted and their entries drawn from a buffer.
        part: (i, n): this is reader i of n, which share the shards where they come out about even and else the entries;
            together they see every row once.
        skip: so many entries are passed over undecoded: what a reader gives from there is what it would have given next.
        buffer: entries that the next one is drawn from; fewer where the largest are more than ``HELD`` bytes together.
        bad: None to raise what is wrong with an entry, or a list that takes it up.

    Raises:
        ModelError: BAD_SHARD for one that is missing, cut short or exchanged; UNSAFE_PATH, TOO_LARGE for what is in it.
    """
    folder = Path(folder)
    everything = shards_of(folder, split)
    shards, step = _plan(everything, seed, epoch, part)
    largest = max((s["largest"] for s in everything), default=1)
    return _groups(folder, split, shards, step, None if seed is None else random.Random(f"{seed} {epoch} entries"), max(1, min(buffer, HELD // max(1, largest))), skip, bad)


def _groups(folder, split, shards, step, lot, buffer, skip, bad):
    import webdataset

    entries = islice(_entries(folder, shards), step.start, None, step.step)
    if lot is not None:
        entries = webdataset.shuffle(buffer, initial=buffer, rng=lot)(entries)
    for entry in islice(entries, skip, None):
        if group := _unpack(entry, split, bad):
            yield group


def rows(folder: str | Path, splits: Iterable[str | None]) -> Iterator[dict[str, Any]]:
    """The rows of these splits as :func:`.manifest.rows` gives them, without their images and masks."""
    for split in splits:
        for entry in _entries(Path(folder), shards_of(folder, split), lambda name: name.endswith(".json")):
            yield _row(entry, split) | {"image": None, "mask": None, "boxes": None}


def _entries(folder: Path, shards: Iterable[dict], wanted: Callable[[str], bool] | None = None) -> Iterator[dict[str, Any]]:
    """{"__key__", "__url__" (the shard), field: bytes} of every entry."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def opened():
        for s in shards:
            path = folder / s["name"]
            _verify(path, path.stat().st_mtime_ns, s["bytes"], s["sha256"], limits.max_bytes)
            with path.open("rb") as stream:
                yield {"url": s["name"], "stream": stream}

    return group_by_keys(tar_file_expander(opened(), select_files=wanted))


def _plan(shards: list[dict], seed: int | None, epoch: int, part: tuple[int, int]) -> tuple[list[dict], slice]:
    """The shards that a reader goes through, and which of their entries are its own."""
    i, n = part
    if not 0 <= i < n:
        raise UsageError(f"there is no reader {i} of {n}", "BAD_ARGUMENT")
    shards = list(shards)
    if seed is not None:
        random.Random(f"{seed} {epoch} shards").shuffle(shards)
    if len(shards) % n == 0 or len(shards) >= 4 * n:
        return shards[i::n], slice(None)
    return shards, slice(i, None, n)


@lru_cache(maxsize=100_000)
def _verify(path: Path, _changed: int, size: int, sha256: str, most: int) -> None:
    """Once a process and shard: its content is what was written, and only plain files of bounded size with names of ours."""
    with path.open("rb") as raw:
        if os.fstat(raw.fileno()).st_size != size or hashlib.file_digest(raw, "sha256").hexdigest() != sha256:
            _refuse(f"the content of shard {path.name} is not what was written: it was cut short, damaged or exchanged")
    try:
        with tarfile.open(path, "r:") as tar:  # no compression: nothing grows when it is read
            members = tar.getmembers()
    except tarfile.TarError as error:
        _refuse(f"shard {path.name} is not a tar file", error)
    for m in members:
        if not _MEMBER.fullmatch(m.name) or m.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or m.sparse is not None:
            raise ModelError(f"shard {path.name} holds a file that no shard holds: a path, a link or a name of its own", "UNSAFE_PATH", "do not trust it")
    for key, entry in groupby(members, lambda m: m.name[:8]):
        _check_size(sum(m.size for m in entry), f"shard {path.name}, entry {key}", most)


def _check_size(size: int, what: str, most: int) -> None:
    if size > most:
        raise ModelError(f"{what} takes {size} bytes; the limit is {most}", "TOO_LARGE")


def _row(entry: dict[str, Any], split: str | None) -> dict[str, Any]:
    where = f"shard {entry['__url__']}, entry {entry['__key__']}"
    if "json" not in entry:
        _refuse(f"{where} has no row")
    row = {"_line": 0} | manifest.parse(entry["json"].decode(errors="surrogateescape"), where, 1) | {"_shard": where}
    if row.get("split") != split:
        _refuse(f"{where} is of another split than its shard")
    return row


def _unpack(entry: dict[str, Any], split: str | None, bad: list[dict] | None) -> list[Sample]:
    row = _row(entry, split)
    with tempfile.TemporaryDirectory(prefix="medvlm-") as folder:
        for field, content in entry.items():
            if field != "json" and not field.startswith("__"):
                file = Path(folder, "images", field.removeprefix("images.")) if field.startswith("images.") else Path(folder, field)
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content)
        group = manifest.row_group({**row, "_folder": Path(folder)}, bad, pixels=True)
        # read now and held, as the files go
        held = {id: _held(image, row.get("_digest")) for id, image in group[0].images.items()} if group else {}
    return [replace(s, images=held) for s in group]


def _held(image: Image | Volume, digest: str | None) -> Image | Volume:
    held = image.with_voxels(image.voxels) if isinstance(image, Volume) else image.with_pixels(image.pixels)
    held.origin = digest
    return held


def _entry(row: dict[str, Any], bad: list[dict] | None) -> dict[str, bytes]:
    """{field: bytes} of a row that can be read back.

    Raises:
        ModelError: what is wrong with it, by the line of the manifest.
    """
    row = manifest.filled(row, bad)
    what = f"manifest line {row['_line']}"
    try:
        entry = _packed(row, what)
    except (FileError, OSError) as error:
        said = getattr(error, "message", f"a file of row {row['id']!r} cannot be read ({type(error).__name__})")
        raise ModelError(f"{what}: {said}", getattr(error, "code", "UNREADABLE")) from error
    try:
        _unpack({**entry, "__url__": "new", "__key__": row["id"]}, row.get("split"), None)
    except MedVLMError as error:
        manifest.row_group(row, pixels=True)  # the same, said with the names that the manifest uses
        raise ModelError(f"{what}: row {row['id']!r} cannot be read from a shard ({error.message})", error.code, error.hint) from error
    return entry


def _packed(row: dict[str, Any], what: str) -> dict[str, bytes]:
    kept = {k: v for k, v in row.items() if not k.startswith("_")} | {"_line": row["_line"]}
    files: dict[str, Path] = {}
    if row.get("image"):
        path = manifest.inside(row, "image", row["image"])
        own = files_of(path)
        if not own:
            raise ModelError(f"{what}: image {row['image']!r} is not there", "NOT_FOUND")
        kept["image"] = _named(path, own, "images" if path.is_dir() else "image", files)
        kept["_digest"] = digest_of(own)
    if row.get("mask"):
        names = {}
        for number, (name, file) in enumerate(row["mask"]["files"].items()):
            path = manifest.inside(row, "mask file", file)
            own = [] if path.is_dir() else files_of(path)
            if not own:
                raise ModelError(f"{what}: mask file {file!r} does not exist", "BAD_MANIFEST")
            names[name] = _named(path, own, f"mask.{number}", files)
        kept["mask"] = {**row["mask"], "files": names}
    _check_size(sum(f.stat().st_size for f in files.values()), f"{what}: row {row['id']!r}", limits.max_bytes)
    return {field: file.read_bytes() for field, file in files.items()} | {"json": json.dumps(kept).encode()}


def _named(path: Path, own: Sequence[Path], stem: str, files: dict[str, Path]) -> str:
    """Give each file its field, in the order it has, and say what the row calls the image: halves keep a stem, a folder its order."""
    if stem != "images":
        fields = {file: stem + stem_and_ending(file.name)[1] for file in own}
        files |= {field: file for file, field in fields.items()}
        return fields.get(path, stem + stem_and_ending(path.name)[1])
    numbers: dict[Path, int] = {}
    for n, file in enumerate(own):
        name, ending = stem_and_ending(file.name)
        number = numbers.setdefault(file.parent / name, n)
        field = f"images.{number:06d}{ending}"
        files[field if field not in files else f"images.{n:06d}x{ending}"] = file
    return "images"


class _Writer:
    """The shards of one split, one after the other."""

    def __init__(self, folder: Path, split: str | None, size: int, entries: int):
        self.folder, self.split, self.size, self.entries = folder, split, size, entries
        self.done: list[dict[str, Any]] = []
        self.count = 0
        self.open = contextlib.ExitStack()
        self.tar = None

    def add(self, entry: dict[str, bytes]) -> None:
        import webdataset

        weight = sum(map(len, entry.values()))
        if self.tar is not None and (self.now["entries"] >= self.entries or self.held + weight > self.size):
            self._finish()
        if self.tar is None:
            name = f"{self.split or 'rows'}-{len(self.done):06d}.tar"
            self.now, self.held = {"name": name, "split": self.split, "entries": 0, "bytes": 0, "sha256": "", "largest": 0}, 0
            file = self.open.enter_context((self.folder / name).open("wb"))
            self.tar = self.open.enter_context(webdataset.TarWriter(file, encoder=False, mtime=0))  # the same data, the same bytes
        self.tar.write({"__key__": f"{self.count:08d}", **entry})
        self.count += 1
        self.held += weight
        self.now["entries"] += 1
        self.now["largest"] = max(self.now["largest"], weight)

    def _finish(self) -> None:
        self.open.close()
        self.tar = None
        path = self.folder / self.now["name"]
        with path.open("rb") as raw:
            os.fsync(raw.fileno())
            self.now |= {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(raw, "sha256").hexdigest()}
        self.done.append(self.now)

    def close(self) -> list[dict[str, Any]]:
        if self.tar is not None:
            self._finish()
        return self.done


def _manifest(data: Any) -> Path:
    """The one manifest of some data."""
    from .base import Data, open_data

    data = data if isinstance(data, Data) else open_data(data)
    if len(data.folders) > 1:
        raise UsageError(f"there are several data sets: {', '.join(data.folders)}", "BAD_ARGUMENT", "write the shards of one at a time, each into a folder of its own")
    ((name, (folder, adapter)),) = data.folders.items()
    file = folder if folder.is_file() else folder / "manifest.jsonl"
    if adapter is not None or not file.is_file():
        raise UsageError(f"{name} has no manifest.jsonl", "BAD_ARGUMENT", "shards are written from manifests; see docs/manifest.md")
    return file


@contextlib.contextmanager
def _disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot write {out}: {error.strerror or type(error).__name__}", "CANNOT_WRITE") from error


def _refuse(what: str, error: Exception | None = None) -> NoReturn:
    raise ModelError(what, "BAD_SHARD", "fetch or write the shards again: medvlm shard") from error
