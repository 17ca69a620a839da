"""The fast path: headers and pixels of plain uncompressed little-endian single-frame DICOM files, without pydicom.

What it does not know it leaves to pydicom by returning None: compressed or big-endian data, colour, several frames,
look-up tables, functional groups, odd value representations, broken files.
"""

from __future__ import annotations

import os
import struct
from io import FileIO

import numpy as np

EXPLICIT, IMPLICIT = b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2"
PIXELS = 0x7FE00010
UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
LONG = frozenset(b"OB OW OF OD OL OV SQ UN UT UC UR SV UV".split())
SHORT = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
FIRST_READ, LAST_READ = 16 << 10, 4 << 20
DEPTH = 8
"""Sequences nested deeper than this, and headers longer than LAST_READ bytes, are left to pydicom."""
_explicit = struct.Struct("<HH2sH").unpack_from
_implicit = struct.Struct("<HHI").unpack_from
_long = struct.Struct("<I").unpack_from


def meta(head: bytes) -> tuple[bytes, int] | None:
    """(transfer syntax, where the data set starts) of a Part-10 file whose first bytes are ``head``, or None."""
    if head[128:132] != b"DICM":
        return None
    at, syntax = 132, b""
    while at + 12 <= len(head):
        group, element, vr, length = _explicit(head, at)
        if group != 2:
            return (syntax, at) if syntax else None
        if vr in LONG:
            length, at = _long(head, at + 8)[0], at + 4
        if element == 0x10:
            syntax = head[at + 8 : at + 8 + length].rstrip(b"\0 ")
        at += 8 + length
    return None


def header(path, wanted: frozenset[int], unknown: frozenset[int]):
    """(syntax, {tag: raw value} for the tags in ``wanted``, pixel offset, pixel length, file size), or None.

    unknown: tags at the outer level that this path cannot serve; a file that has one is left to pydicom.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        size, head, found = os.fstat(fd).st_size, b"", "short"
        while found == "short" and len(head) < min(size, LAST_READ) and (more := os.read(fd, 15 * len(head) or FIRST_READ)):
            head += more
            found = _parse(head, wanted, unknown)
    finally:
        os.close(fd)
    return None if found is None or found == "short" else (*found, size)


def _parse(head, wanted, unknown):
    start = meta(head)
    if start is None:
        return "short" if head[128:132] == b"DICM" else None
    syntax, at = start
    if syntax not in (EXPLICIT, IMPLICIT):
        return None
    explicit, end, values, last = syntax == EXPLICIT, len(head), {}, 0
    while at + 12 <= end:
        if explicit:
            group, element, vr, length = _explicit(head, at)
            at += 8
            if vr in LONG:
                length = _long(head, at)[0]
                at += 4
            elif vr not in SHORT:
                return None
        else:
            group, element, length = _implicit(head, at)
            at += 8
        tag = group << 16 | element
        if tag <= last or tag in unknown:
            return None
        if tag >= 0x7FE00000:
            return (syntax, values, at, length) if tag == PIXELS and length != UNDEFINED else None
        last = tag
        if length == UNDEFINED:
            at = _skip(head, at, explicit and vr != b"UN", DEPTH)
            if at is None or at < 0:
                return "short" if at is None else None
            continue
        if tag in wanted:
            values[tag] = head[at : at + length]
        at += length
    return "short"


def _skip(head, at, explicit, depth):
    """Where a sequence of undefined length ends; None when it goes beyond ``head``, -1 when it makes no sense."""
    if depth == 0:
        return -1
    while at + 8 <= len(head):
        group, element, length = _implicit(head, at)
        tag, at = group << 16 | element, at + 8
        if tag == SEQUENCE_END:
            return at
        if tag != ITEM:
            return -1
        if length != UNDEFINED:
            at += length
            continue
        while True:
            if at + 12 > len(head):
                return None
            group, element, length = _implicit(head, at)
            tag = group << 16 | element
            if tag == ITEM_END:
                at += 8
                break
            vr = head[at + 4 : at + 6]
            if explicit and vr in LONG:
                length, at = _long(head, at + 8)[0], at + 12
            elif explicit and vr in SHORT:
                length, at = length >> 16, at + 8
            elif explicit:
                return -1
            else:
                at += 8
            if length == UNDEFINED:
                at = _skip(head, at, explicit and vr != b"UN", depth - 1)
                if at is None or at < 0:
                    return at
            else:
                at += length
    return None


def pixels(path, offset: int, raw: np.ndarray, bits: int) -> None:
    """Read the stored values of one frame straight into ``raw`` (H, W), and clear what lies above ``bits``."""
    with FileIO(path) as file:
        file.seek(offset)
        got = file.readinto(raw.reshape(-1).view(np.uint8))
    if got != raw.nbytes:
        raise EOFError
    if unused := 8 * raw.itemsize - bits:
        np.left_shift(raw, unused, out=raw)
        np.right_shift(raw, unused, out=raw)  # arithmetic for signed values: the sign comes back
