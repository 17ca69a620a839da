"""blind:yes, blind:random, blind:prior, and blind:MODEL, any other model given the words without the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import ModelError
from ..evaluate.blind import BASELINES, SOURCES
from ..sample import MARKED, Prediction, Sample, Turn
from .base import Model, verb_of


def load(rest: str, device: str | None = None, allow_upload: bool = False) -> Model:
    """A baseline by name, else the model of that name without its eyes."""
    if rest in BASELINES:
        return Blind(rest)
    from . import load

    return Words(load(rest, device, allow_upload))


class Blind(Model):
    """A baseline of :mod:`medvlm.evaluate.blind`. It answers samples only."""

    version = "1"

    def __init__(self, kind: str):
        self.kind, self.name = kind, f"blind:{kind}"
        self.train: list[Sample] = []

    def learn(self, train: Sequence[Sample]) -> None:
        """Take note of the training answers, whose images are never opened."""
        self.train = list(train)

    def predict(self, samples: Sequence[Sample]) -> list[Prediction]:
        refused = {s.id: self._cannot(verb_of(s)) for s in samples if verb_of(s) != "ask"}
        found = BASELINES[self.kind]([s for s in samples if s.id not in refused], self.train)
        rows = {p.id: p for p in found} | {i: Prediction(i, error=f"{e.code}: {e.message}") for i, e in refused.items()}
        return [rows[s.id] for s in samples]

    def _cannot(self, verb: str) -> ModelError:
        return ModelError(f"{self.name} only answers questions ({SOURCES[self.kind]}); it cannot {verb}", "UNSUPPORTED_VERB")


class Words(Model):
    """A model that is asked without the image: what its language alone knows."""

    def __init__(self, model: Model):
        self.model, self.name = model, f"blind:{model.name}"
        self.version, self.sha256 = model.version, model.sha256

    def predict(self, samples: Sequence[Sample]) -> list[Prediction]:
        bare = [replace(s, images={}, turns=tuple(Turn(t.role, MARKED.sub("", t.text)) for t in s.turns)) for s in samples]
        return self.model.predict(bare)
