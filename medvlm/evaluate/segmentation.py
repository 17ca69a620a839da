"""Overlap of masks on the image's own grid."""

from __future__ import annotations

import numpy as np

from ..errors import GeometryError


def dice(predicted: np.ndarray, reference: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|); 1 when both are empty, 0 when only one is.

    Source: Dice 1945, Ecology 26:297. The empty case is decided here, not left as NaN.

    Raises:
        GeometryError: GRID_MISMATCH when the shapes differ.
    """
    a, b = np.asarray(predicted, bool), np.asarray(reference, bool)
    if a.shape != b.shape:
        raise GeometryError(f"the predicted mask is {a.shape} but the reference is {b.shape}", "GRID_MISMATCH")
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2 * int((a & b).sum()) / total
