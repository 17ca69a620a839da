"""PNG, JPEG, TIFF, BMP and WebP as images. Pictures carry no place in the patient and hardly ever a spacing.

What happens to a picture, each time with a warning where it changes anything:
8 bits stay uint8 and 16 bits stay uint16 (16-bit colour PNG is refused: no decoder here keeps it). The EXIF rotation is
applied. Transparency is laid on black. Palettes, CMYK and embedded colour profiles become sRGB; a grey profile is left
alone, since grey values may be measurements. A colour picture whose three channels are equal everywhere becomes one
channel, which is what a radiograph saved as RGB is. Resolution tags (JFIF, pHYs, TIFF ResolutionUnit) describe print,
not tissue, and are not a spacing; OME-TIFF's PhysicalSize is one.
"""

from __future__ import annotations

import logging
import math
import os
import re
import struct
import warnings
import xml.etree.ElementTree as ElementTree
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FileError, MedVLMError, UsageError
from . import limits
from .files import writing
from .scan import Image, Lazy

MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"II*\0": "tiff", b"MM\0*": "tiff", b"II+\0": "tiff", b"MM\0+": "tiff"}
MM_PER = {"m": 1e3, "dm": 100.0, "cm": 10.0, "mm": 1.0, "µm": 1e-3, "μm": 1e-3, "um": 1e-3, "nm": 1e-6, "Å": 1e-7}
"""Millimetres per OME unit of length. Source: OME schema 2016-06, UnitsLength; the default is µm."""

MAX_PAGES = 10_000


def kind(head: bytes) -> str | None:
    """'png', 'jpeg', 'tiff', 'bmp', 'webp' or None, from the first 32 bytes of a file."""
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    # a BMP's header length is one of a few numbers; "BM" alone begins many a text
    if head[:2] == b"BM" and len(head) >= 18 and struct.unpack("<I", head[14:18])[0] in (12, 40, 52, 56, 64, 108, 124):
        return "bmp"
    return None


def read_raster(path: Path, what: str, id: str, *, modality: str | None = None, keep: bool = True) -> list[Image]:
    """The pictures of one file: one, or one a page of a TIFF with ``-p1``, ``-p2`` ... after the id.

    Every picture is decoded here, so a damaged file is refused now.

    Args:
        what: how error messages call the file.
        keep: hold the pixels in memory instead of decoding again when they are used.

    Raises:
        FileError: BOMB, TOO_LARGE, TRUNCATED, CHECKSUM, CORRUPT, NO_CODEC, UNSUPPORTED, UNKNOWN_FORMAT.
    """
    with open(path, "rb") as f:
        form = kind(f.read(32))
    if form is None:
        raise FileError(f"{what} is not PNG, JPEG, TIFF, BMP or WebP", "UNKNOWN_FORMAT")
    if form == "tiff":
        count, left_out = _tiff_pages(path, what)
    else:
        count, left_out = [0], []
    images = []
    for n, page in enumerate(count):
        pixels, spacing, info = _decode(path, what, form, page)
        info["warnings"] = info["warnings"] + (left_out if n == 0 else [])
        if len(count) > 1:
            info["page"] = n
            if n == 0:
                info["warnings"].append(f"PAGES: {len(count)} pages became {len(count)} images")
        array = pixels if keep else Lazy(pixels.shape, pixels.dtype, lambda page=page: _decode(path, what, form, page)[0])
        unit = "uint8" if pixels.dtype == np.uint8 else "raw"
        images.append(Image(f"{id}-p{n + 1}" if len(count) > 1 else id, array, spacing, modality or "unknown", unit, info))
    return images


def save_mask(mask: np.ndarray, path: str | os.PathLike) -> Path:
    """Write a boolean (H, W) mask as a 1-bit PNG; the file appears whole or not at all."""
    from PIL import Image as Pillow

    path, mask = Path(path), np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool:
        raise UsageError(f"a mask is a boolean (H, W) array, not {mask.dtype} {mask.shape}", "BAD_ARGUMENT")
    with writing(path) as part:
        Pillow.fromarray(mask).save(part, "PNG")
    return path


def _decode(path: Path, what: str, form: str, page: int) -> tuple[np.ndarray, tuple[float, float] | None, dict[str, Any]]:
    """(C, H, W) pixels, spacing and info of one page."""
    notes: list[str] = []
    info: dict[str, Any] = {"format": form}
    spacing = None
    try:
        with _strict_pillow(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if form == "tiff":
                pixels, spacing = _tiff(path, what, page, info, notes)
            else:
                pixels = _pillow(path, what, form, notes)
    except (MedVLMError, MemoryError, FileNotFoundError, PermissionError):
        raise
    except (EOFError, zlib.error, struct.error, IndexError) as e:
        raise FileError(f"{what} ends before its picture does", "TRUNCATED") from e
    except Exception as e:  # decoders raise OSError, SyntaxError, ValueError and more on damaged pictures
        text = str(e).lower()
        code = "TRUNCATED" if any(w in text for w in ("truncated", "broken png", "unexpected end", "failed to read", "not enough", "eof")) else "CORRUPT"
        raise FileError(f"{what} {'ends before its picture does' if code == 'TRUNCATED' else 'cannot be decoded'}", code) from e
    if pixels.shape[0] == 3 and np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2]):
        pixels = pixels[:1].copy()
        info["grey_from_rgb"] = True
    if pixels.dtype.kind == "f" and (bad := int(pixels.size - np.count_nonzero(np.isfinite(pixels)))):
        notes.append(f"NOT_FINITE: {bad} of {pixels.size} pixels are NaN or infinite")
    info["warnings"] = notes
    return np.ascontiguousarray(pixels), spacing, info


@contextmanager
def _strict_pillow():
    """Pillow fills what is missing with grey when another library has set this switch; never here."""
    from PIL import ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _pillow(path: Path, what: str, form: str, notes: list[str]) -> np.ndarray:
    import PIL.BmpImagePlugin
    import PIL.JpegImagePlugin
    import PIL.PngImagePlugin
    import PIL.WebPImagePlugin

    size = path.stat().st_size
    if form == "webp":  # its decoder takes memory for the canvas when it opens the file
        limits.check_size((4, *_webp_size(path, what)), np.uint8, size, what)
    # The plugins themselves: Image.open has a fixed limit of pixels, ours looks at the bytes behind them
    plugin = {
        "png": PIL.PngImagePlugin.PngImageFile,
        "jpeg": PIL.JpegImagePlugin.JpegImageFile,
        "bmp": PIL.BmpImagePlugin.BmpImageFile,
        "webp": PIL.WebPImagePlugin.WebPImageFile,
    }[form]
    if form == "png":
        with open(path, "rb") as f:
            head = f.read(26)
        if len(head) < 26:
            raise FileError(f"{what} ends inside its header", "TRUNCATED")
        width, height, depth, colour = struct.unpack(">IIBB", head[16:26])
        limits.check_size(({2: 3, 6: 4, 4: 2}.get(colour, 1), height, width), np.uint16 if depth == 16 else np.uint8, size, what)
        if depth == 16 and colour != 0:
            raise FileError(f"{what} is a colour or transparent PNG of 16 bits, which would be cut to 8", "UNSUPPORTED", "save it as TIFF")
        _check_png(path, what)
    with plugin(str(path)) as picture:
        limits.check_size((len(picture.getbands()), *picture.size[::-1]), np.int32 if picture.mode in "IF" else np.uint8, size, what)
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and form != "jpeg":
            notes.append(f"FRAMES: the first of {frames} frames was read")
        picture.load()
        return _channels(_upright(picture, notes), notes)


def _upright(picture, notes: list[str]):
    from PIL import ImageOps

    turn = picture.getexif().get(0x0112, 1)
    if turn in range(2, 9):
        notes.append(f"EXIF_ROTATION: the picture was turned as its EXIF orientation {turn} says")
        return ImageOps.exif_transpose(picture)
    return picture


def _channels(picture, notes: list[str]) -> np.ndarray:
    """A loaded Pillow picture of any mode -> (1 or 3, H, W)."""
    from PIL import Image as Pillow

    if picture.mode == "P" or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        picture = picture.convert("LA" if picture.mode in ("LA", "La") else "RGBA")
        alpha = picture.getchannel("A")
        colour = picture.convert("L" if picture.mode == "LA" else "RGB")
        if alpha.getextrema() != (255, 255):
            notes.append("ALPHA: transparent parts were laid on black")
            black = Pillow.new(colour.mode, colour.size)
            black.paste(colour, mask=alpha)
            black.info = picture.info
            colour = black
        picture = colour
    if picture.mode in ("RGB", "CMYK"):
        picture = _to_srgb(picture, notes)
    elif picture.mode in ("1", "L"):
        picture = picture.convert("L")
    elif picture.mode not in ("I;16", "I;16B", "I;16L", "I", "F"):
        notes.append(f"COLOUR: {picture.mode} became RGB")
        picture = picture.convert("RGB")
    array = np.asarray(picture)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _to_srgb(picture, notes: list[str]):
    import io

    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            name = ImageCms.getProfileDescription(source).strip()
            if picture.mode == "RGB" and name.lower().startswith("srgb"):
                return picture
            notes.append("ICC: colours became sRGB as the embedded profile says")
            return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            notes[:] = [n for n in notes if not n.startswith("ICC:")]
            notes.append("ICC: the embedded colour profile is damaged and was left out")
    if picture.mode == "CMYK":
        notes.append("COLOUR: CMYK became RGB without a profile")
        return picture.convert("RGB")
    return picture


def _check_png(path: Path, what: str) -> None:
    """Every chunk is whole and passes its own checksum (Pillow does not look at all of them)."""
    with open(path, "rb") as f:
        f.seek(8)
        while True:
            head = f.read(8)
            if len(head) < 8:
                raise FileError(f"{what} ends before its picture does", "TRUNCATED")
            length, name = struct.unpack(">I4s", head)
            crc, left = zlib.crc32(name), length
            while left:
                block = f.read(min(left, 1 << 20))
                if not block:
                    raise FileError(f"{what} ends before its picture does", "TRUNCATED")
                crc, left = zlib.crc32(block, crc), left - len(block)
            told = f.read(4)
            if len(told) < 4:
                raise FileError(f"{what} ends before its picture does", "TRUNCATED")
            if struct.unpack(">I", told)[0] != crc:
                raise FileError(f"{what} fails its checksum", "CHECKSUM")
            if name == b"IEND":
                return


def _webp_size(path: Path, what: str) -> tuple[int, int]:
    """(H, W) of the canvas. Source: RFC 9649, sections 2.5 to 2.7."""
    with open(path, "rb") as f:
        head = f.read(32)
    if len(head) < 30 or int.from_bytes(head[4:8], "little") + 8 > path.stat().st_size:
        raise FileError(f"{what} ends before its picture does", "TRUNCATED")
    if head[12:16] == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
    elif head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return height, width


class _Ears(logging.Filter):
    """Keeps what tifffile would print: it says there, and nowhere else, that a page is missing."""

    def __init__(self):
        super().__init__()
        self.errors = 0

    def filter(self, record):
        self.errors += record.levelno >= logging.ERROR
        return False


@contextmanager
def _tiff_file(path: Path, what: str):
    import tifffile

    log, ears = logging.getLogger("tifffile"), _Ears()
    log.addFilter(ears)
    try:
        with tifffile.TiffFile(path) as tiff:
            yield tiff
    except tifffile.TiffFileError as e:
        raise FileError(f"{what} is not a whole TIFF file", "TRUNCATED") from e
    finally:
        log.removeFilter(ears)
    if ears.errors:
        raise FileError(f"{what} is not a whole TIFF file", "TRUNCATED")


def _tiff_pages(path: Path, what: str) -> tuple[list[int], list[str]]:
    """Indices of the pages that are pictures in their own right, and warnings about the others."""
    try:
        with _tiff_file(path, what) as tiff:
            if len(tiff.pages) > MAX_PAGES:
                raise FileError(f"{what} has more than {MAX_PAGES} pages", "TOO_LARGE")
            pages = [n for n, p in enumerate(tiff.pages) if not p.is_reduced]
            small = len(tiff.pages) - len(pages)
    except (MedVLMError, OSError):
        raise
    except Exception as e:  # tifffile on damaged directories
        raise FileError(f"{what} is not a whole TIFF file", "TRUNCATED") from e
    if not pages:
        raise FileError(f"{what} ends before its first page", "TRUNCATED")
    return pages, [f"PAGES: {small} reduced copies were left out"] if small else []


def _tiff(path: Path, what: str, page: int, info: dict, notes: list[str]) -> tuple[np.ndarray, tuple[float, float] | None]:
    with _tiff_file(path, what) as tiff:
        p = tiff.pages[page]
        size = path.stat().st_size
        limits.check_size(p.shape or (0,), p.dtype or np.uint8, size, what)
        if p.dtype is None or 0 in p.shape or not p.shape:
            raise FileError(f"{what} has a page of a kind that is not supported", "UNSUPPORTED")
        for start, length in zip(p.dataoffsets, p.databytecounts):
            if start <= 0 or length <= 0 or start + length > size:
                raise FileError(f"{what} ends before its picture does", "TRUNCATED")
        spacing = _ome_spacing(tiff)
        turn = p.tags.get(274).value if 274 in p.tags else 1
        photometric = int(p.photometric)
        if photometric == 0 and p.bitspersample != 1:
            info["inverted"] = True  # white is zero, as in MONOCHROME1; the stored values stay
        try:
            array = p.asarray()
        except ValueError as e:  # no codec for this compression in tifffile alone
            if "compression" not in str(e).lower() and "imagecodecs" not in str(e).lower():
                raise
            return _upright_array(_tiff_by_pillow(path, what, page, p, info, notes), turn, notes), spacing
        if photometric not in (0, 1, 2, 3):  # CMYK, YCbCr, Lab
            return _upright_array(_tiff_by_pillow(path, what, page, p, info, notes), turn, notes), spacing
        if p.axes.replace("Q", "").replace("I", "")[:3] not in ("YX", "YXS", "SYX") or array.ndim not in (2, 3):
            raise FileError(f"{what} has a page of shape {array.shape}, which is not a picture", "UNSUPPORTED")
        array = array.transpose(2, 0, 1) if p.axes.endswith("S") else array if array.ndim == 3 else array[None]
        if photometric == 3:
            colours = np.asarray(p.colormap)  # (3, 2**bits) of 16 bits
            array = (colours[:, array[0]] >> 8).astype(np.uint8)
            notes.append("COLOUR: palette became RGB")
        if array.dtype == bool or p.bitspersample == 1:
            array = (array != (0 if photometric else 1)).astype(np.uint8) * 255
        if array.shape[0] in (2, 4) and photometric in (0, 1, 2):
            array = _on_black(array, p, notes)
        if array.shape[0] not in (1, 3) or array.dtype.kind not in "iuf":
            raise FileError(f"{what} has {array.shape[0]} channels of {array.dtype}", "UNSUPPORTED", "save grey or RGB")
        return _upright_array(array.astype(array.dtype.newbyteorder("="), copy=False), turn, notes), spacing


def _tiff_by_pillow(path: Path, what: str, page: int, p, info: dict, notes: list[str]) -> np.ndarray:
    """LZW, JPEG and the like through libtiff, where it keeps every bit."""
    from PIL import Image as Pillow
    from PIL import TiffImagePlugin

    deep = p.bitspersample if isinstance(p.bitspersample, int) else max(p.bitspersample)
    samples = p.samplesperpixel
    if deep > 8 and samples > 1:
        raise FileError(f"{what} is {deep}-bit colour in a compression that needs the package imagecodecs", "NO_CODEC")
    with TiffImagePlugin.TiffImageFile(str(path)) as picture:
        picture.seek(page)
        try:
            picture.load()
        except (OSError, Pillow.DecompressionBombError) as e:
            code = "NO_CODEC" if "decoder" in str(e) and "not available" in str(e) else "TRUNCATED"
            raise FileError(f"{what} cannot be decoded with the codecs at hand", code) from e
        picture.getexif().pop(0x0112, None)
        if info.pop("inverted", False) and picture.mode == "L":
            info["min_is_white"] = True  # Pillow has turned 8-bit greys round already
        return _channels(picture, notes)


def _on_black(array: np.ndarray, p, notes: list[str]) -> np.ndarray:
    extra = [int(e) for e in (p.extrasamples or ())]
    colour, alpha = array[:-1], array[-1:]
    if not extra or extra[0] == 0 or array.dtype.kind != "u":
        notes.append("ALPHA: an extra channel was left out")
        return colour
    full = np.iinfo(array.dtype).max
    if (alpha != full).any():
        notes.append("ALPHA: transparent parts were laid on black")
        if extra[0] == 2:  # not multiplied in yet
            colour = np.rint(colour.astype(np.float64) * (alpha / full)).astype(array.dtype)
    return colour


def _upright_array(array: np.ndarray, turn: int, notes: list[str]) -> np.ndarray:
    """(C, H, W) turned as TIFF/EXIF orientation 2..8 says. Source: TIFF 6.0, Orientation (274)."""
    if turn not in range(2, 9):
        return array
    notes.append(f"EXIF_ROTATION: the picture was turned as its orientation {turn} says")
    if turn in (5, 6, 7, 8):
        array = array.transpose(0, 2, 1)
    rows = slice(None, None, -1 if turn in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if turn in (2, 3, 6, 7) else 1)
    return array[:, rows, columns]


def _ome_spacing(tiff) -> tuple[float, float] | None:
    """(H, W) mm per pixel of an OME-TIFF."""
    text = tiff.ome_metadata
    if not text or re.search(r"<!(DOCTYPE|ENTITY)", text):  # entities can be made to grow without end
        return None
    try:
        pixels = next(e for e in ElementTree.fromstring(text).iter() if e.tag.rpartition("}")[2] == "Pixels")
        steps = [float(pixels.attrib[f"PhysicalSize{a}"]) * MM_PER[pixels.attrib.get(f"PhysicalSize{a}Unit", "µm")] for a in "YX"]
    except (ElementTree.ParseError, StopIteration, KeyError, ValueError):
        return None
    return (steps[0], steps[1]) if all(math.isfinite(s) and s > 0 for s in steps) else None
