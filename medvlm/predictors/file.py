"""Saved predictions in the place of a model, so that they are scored as it would be."""

from __future__ import annotations

from pathlib import Path

from ..datasets.predictions import prediction, rows
from .base import Model, digest


def load(path: str, device: str | None = None) -> FileModel:
    """Predictions as ``datasets.predictions.save_predictions`` writes them; a folder stands for its ``predictions.jsonl``.

    Raises:
        ModelError: BAD_PREDICTIONS with the number of the line that is wrong.
    """
    file = Path(path).expanduser()
    return FileModel(file / "predictions.jsonl" if file.is_dir() else file)


class FileModel(Model):
    """It answers for the samples it was saved for (:meth:`predict`), and nothing else."""

    version = "saved"

    def __init__(self, file: Path):
        self.rows, self.name = rows(file), file.name
        self.sha256 = digest(file)

    def predict(self, samples):
        """The saved prediction of each sample; one without a row is an error "MISSING: ..."."""
        return [prediction(self.rows.get(sample.id), sample) for sample in samples]
