"""Every error this package raises on purpose, and the stable code each carries.

Messages quote what the caller typed and numbers read from headers; they never quote names, identifiers or file
names found inside the data, so a traceback can be shared without showing who the patient is.
"""

from __future__ import annotations

HINTS = {
    # files
    "NOT_FOUND": "check the path",
    "EMPTY_FOLDER": "give a folder that holds DICOM, NIfTI or picture files",
    "UNREADABLE": "check the permissions of the file or folder",
    "NOT_AN_IMAGE": "give an image: segmentations, reports, plans, waveforms and parametric maps are read by other tools",
    "UNKNOWN_FORMAT": "give DICOM, NIfTI, MGH, MINC, PAR/REC, PNG, JPEG or TIFF",
    "TRUNCATED": "the file is cut short; fetch it again from its source",
    "CORRUPT": "the file is damaged; fetch it again from its source",
    "CHECKSUM": "the compressed data do not match their own checksum; fetch the file again from its source",
    "NO_CODEC": "install the codec named above, or decompress the file (gdcmconv --raw)",
    "NO_DATA_FILE": "fetch both halves: the header and its data file must lie side by side",
    "NOT_FINITE": "replace NaN and infinite values first (numpy.nan_to_num), or export the file again",
    "BAD_VALUE": "repair the named attribute",
    "UNSUPPORTED": "convert the file to a supported form",
    "UNSAFE_PATH": "the archive or DICOMDIR points outside itself; do not trust it",
    "BOMB": "the header asks for far more memory than the data can fill; do not trust the file",
    "TOO_LARGE": "raise medvlm.imaging.limits if this is expected",
    # geometry
    "GAP": 'use policy="fill" to insert empty slices or policy="resample" to interpolate',
    "DUPLICATE": "remove one of the two slices, or read them as separate files",
    "UNEVEN_SPACING": 'use policy="resample" to interpolate onto even spacing',
    "NO_POSITION": "the slices have no position in space, so no volume can be built; read the files one by one",
    "BAD_SPACING": "repair PixelSpacing, or pass spacing= if you know it",
    "MIXED_SIZE": "remove the slices of another size",
    "MIXED_FRAME": "the slices lie in different frames of reference; read them as separate series",
    "BAD_ORIENTATION": "repair the orientation cosines",
    "BAD_AFFINE": "repair the header (nibabel: img.set_sform), or pass affine=",
    "ORIENTATION_UNKNOWN": "the header does not say how the patient lies; pass affine= if you know it (masks of pictures: save as .png)",
    "HU_IMPLAUSIBLE": "the stored values are probably signed but declared unsigned; repair PixelRepresentation",
    "GRID_MISMATCH": "put both on one grid first: mask.onto(volume, order=0)",
    # choices
    "MANY_STUDIES": "read one at a time: for study in medvlm.studies(folder)",
    "MANY_IMAGES": "say which one: image=ID",
    "NO_SUCH_STUDY": "use one of the ids above",
    "NO_SUCH_IMAGE": "use one of the ids above",
    # models, data and usage
    "UNKNOWN_TARGET": "ask for one of the names above",
    "QUESTION_TOO_LONG": "shorten the question",
    "OUT_OF_SCOPE": "use a model that was trained on this kind of image",
    "UNSUPPORTED_VERB": "use another model for this verb",
    "BAD_CHECKPOINT": "save the model again with save_pretrained",
    "NOT_EXPORTABLE": "export another model, or to another form",
    "NO_SUCH_PART": "run: medvlm list encoders (or projectors, heads, recipes, models)",
    "TOO_MANY_IMAGES": "show fewer, or ask about them one by one",
    "UPLOAD_NOT_ALLOWED": "images and questions would leave this program for the server; to allow it: --allow-upload, or load(..., allow_upload=True)",
    "BURNED_IN": "remove the text from the pixels first; images that may show a name are not uploaded",
    "SERVER_ERROR": "check the address, the server's log and the key in OPENAI_API_KEY",
    "BAD_PREDICTIONS": "see docs/predictions.md",
    "PLACEHOLDERS": "was the text cut? every image needs all of its placeholder tokens",
    "BAD_MANIFEST": "see docs/manifest.md",
    "BAD_RECIPE": "see the docstrings of medvlm/recipes/base.py",
    "BAD_ARGUMENT": "see --help",
    "MISSING_EXTRA": "install the extra named above",
    "OUTPUT_EXISTS": "choose another --out",
    "CANNOT_WRITE": "check the disk and the permissions of the output folder",
}


class MedVLMError(Exception):
    """An error with a stable ``code`` and a ``hint`` that says what to do next.

    ``str(error)`` is one line: what is wrong and where, the code in brackets, then the hint.
    """

    def __init__(self, message: str, code: str, hint: str | None = None):
        self.message = " ".join(str(message).split())
        self.code = code
        self.hint = HINTS[code] if hint is None else hint
        super().__init__(self.message, self.code, self.hint)  # what it is made of again in another process

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]" + (f": {self.hint}" if self.hint else "")


class FileError(MedVLMError):
    """A file, folder or archive cannot be opened, trusted or decoded."""


class GeometryError(MedVLMError):
    """The position, orientation, spacing or size of the image cannot be trusted."""


class ChoiceError(MedVLMError):
    """Several things answer to the request, or none does; the message lists them."""


class ModelError(MedVLMError):
    """A model, recipe or data set is wrong, or cannot do what was asked."""


class UsageError(MedVLMError):
    """An argument is wrong."""
