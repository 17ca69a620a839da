"""How much memory a file may ask for, checked before it is taken."""

from __future__ import annotations

from math import prod

import numpy as np

from ..errors import FileError

max_bytes = 4 << 30
"""Largest decoded image (bytes)."""
free_bytes = 64 << 20
"""A decoded image up to this size (bytes) is never refused for its ratio."""
max_ratio = 1000
"""Largest decoded size over encoded size; real compressed scans stay below 100, blank ones below 1000."""
max_files = 100_000
"""Most files in a folder or archive that is read at once."""
max_zip_bytes = 16 << 30
"""Largest sum of the files in one archive (bytes)."""
free_zip_bytes = 256 << 20
"""An archive that unpacks to at most this many bytes is never refused for its ratio; masks shrink 500 times."""
max_zip_ratio = 200
"""Largest unpacked size over packed size of an archive; DICOM and NIfTI scans shrink 2 to 10 times."""


def check_size(shape: tuple[int, ...], dtype, encoded: int, what: str) -> int:
    """Decoded bytes of an array of ``shape`` and ``dtype`` stored in ``encoded`` bytes.

    Raises:
        FileError: BOMB or TOO_LARGE, before anything is allocated.
    """
    decoded = prod(int(n) for n in shape) * np.dtype(dtype).itemsize
    if decoded > free_bytes and decoded > max_ratio * max(encoded, 1):
        raise FileError(
            f"{what} claims {' x '.join(map(str, shape))} pixels ({decoded >> 20} MiB) in {encoded} bytes", "BOMB"
        )
    if decoded > max_bytes:
        raise FileError(f"{what} would take {decoded >> 20} MiB; the limit is {max_bytes >> 20} MiB", "TOO_LARGE")
    return decoded
