"""medvlm: the toolkit for medical images and language. Research use only."""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "read": "imaging.study", "studies": "imaging.study",
    "Image": "imaging.scan", "Volume": "imaging.scan", "Study": "imaging.scan",
    "Turn": "sample", "Mask": "sample", "Region": "sample", "Sample": "sample", "Prediction": "sample",
    "Answer": "sample", "Sentence": "sample", "Report": "sample", "Segmentation": "sample",
    "load": "predictors", "MedVLMError": "errors",
}  # fmt: skip

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'medvlm' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
