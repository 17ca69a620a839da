"""How fast a CT series becomes float32 Hounsfield units with a checked affine, beside SimpleITK, MONAI and pydicom.

Rules: pairs.py. Voxels and affine must be equal before any time counts.

    python benchmarks/read_ct.py [--slices 300] [--size 512] [--pairs 11] [--json FILE]
"""

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

for name in ("OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
    os.environ.setdefault(name, "2")

import numpy as np  # noqa: E402
from pairs import alone, heading, high_water, pairs, ratio_text, record  # noqa: E402

SPACING, STEP, ORIGIN = (0.7, 0.65), 1.25, (-180.0, -170.0, -300.0)
FLOORS = {"simpleitk": 3.5, "monai": 8.0, "pydicom": 1.6}
MEMORY = 1.2


def write_series(folder: Path, slices: int, size: int) -> None:
    """An explicit little-endian CT whose file names say nothing about the order."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    rng = np.random.default_rng(7)
    study, series, frame, names = generate_uid(), generate_uid(), generate_uid(), rng.permutation(slices)
    for i in range(slices):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        d = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        d.SOPClassUID = CTImageStorage
        d.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid()
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = study, series, frame
        d.Modality, d.PatientID, d.PatientPosition, d.ImageType = "CT", "1", "HFS", ["ORIGINAL", "PRIMARY", "AXIAL"]
        d.StudyDate, d.StudyTime, d.Manufacturer, d.KVP = "20200101", "101010", "none", 120
        d.SeriesNumber, d.InstanceNumber, d.SliceThickness = 2, i + 1, STEP
        d.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + STEP * i]
        d.ImageOrientationPatient, d.PixelSpacing = [1, 0, 0, 0, 1, 0], list(SPACING)
        d.Rows = d.Columns = size
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
        d.RescaleIntercept, d.RescaleSlope, d.RescaleType, d.WindowCenter, d.WindowWidth = -1024, 1, "HU", 40, 400
        d.PixelData = rng.integers(0, 3000, (size, size), dtype=np.int16).tobytes()
        d.save_as(folder / f"{names[i]:05d}.dcm", enforce_file_format=True)


def medvlm(folder: Path):
    """(D, H, W) float32 HU, and the (4, 4) affine of index (d, h, w, 1) to LPS mm."""
    from medvlm.imaging.dicom import read_dicom

    (study,) = read_dicom(sorted(folder.iterdir()))
    (image,) = study.images
    return image.voxels[0], image.affine


def simpleitk(folder: Path):
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    reader.SetOutputPixelType(sitk.sitkFloat32)
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = (np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing())[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayViewFromImage(image).copy(), affine


def monai(folder: Path):
    from monai.data import PydicomReader
    from monai.transforms import LoadImage

    image = LoadImage(reader=PydicomReader(), dtype=np.float32, image_only=True)(str(folder))
    affine = (np.diag([-1.0, -1, 1, 1]) @ np.asarray(image.affine, float))[:, [2, 1, 0, 3]]
    return np.asarray(image).transpose(2, 1, 0), affine


def pydicom(folder: Path):
    """The loop people write, with an output of the right type filled slice by slice."""
    import pydicom as dicom

    slices = sorted((dicom.dcmread(f) for f in folder.iterdir()), key=lambda d: d.ImagePositionPatient[2])
    first, last = slices[0], slices[-1]
    out = np.empty((len(slices), first.Rows, first.Columns), np.float32)
    for plane, d in zip(out, slices):
        plane[...] = d.pixel_array
        plane *= float(d.RescaleSlope)
        plane += float(d.RescaleIntercept)
    affine = np.eye(4)
    affine[:3, 0] = (np.array(last.ImagePositionPatient) - first.ImagePositionPatient) / (len(slices) - 1)
    affine[:3, 1] = np.array(first.ImageOrientationPatient[3:]) * first.PixelSpacing[0]
    affine[:3, 2] = np.array(first.ImageOrientationPatient[:3]) * first.PixelSpacing[1]
    affine[:3, 3] = first.ImagePositionPatient
    return out, affine


READERS = {"medvlm": medvlm, "simpleitk": simpleitk, "monai": monai, "pydicom": pydicom}


def measure_memory(name: str, folder: Path, tiny: Path) -> float:
    reader = READERS[name]
    reader(tiny)  # imports and caches are not what is measured
    gc.collect()
    before = high_water()
    voxels, _ = reader(folder)
    return (high_water() - before) / (voxels.size * 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.memory_of:
        with tempfile.TemporaryDirectory() as scratch:
            write_series(Path(scratch), 3, 16)
            print(measure_memory(args.memory_of, args.folder, Path(scratch)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_series(folder, args.slices, args.size)
        truth, affine = medvlm(folder)
        found: dict[str, dict] = {}
        for name, reader in READERS.items():
            try:
                voxels, at = reader(folder)
            except ImportError as missing:
                print(f"{name} is not installed ({missing.name})", file=sys.stderr)
                continue
            d = slice(None, None, -1) if at[2, 0] < 0 else slice(None)  # a reader may stack from the top; its affine then says so
            equal = voxels.dtype == np.float32 and np.array_equal(voxels[d], truth)
            top = at @ [len(voxels) - 1, 0, 0, 1] if at[2, 0] < 0 else at[:, 3]
            placed = np.allclose(np.abs(at[:3, :3]), np.abs(affine[:3, :3]), atol=1e-6) and np.allclose(top[:3], affine[:3, 3], atol=1e-4)
            found[name] = {"gate": bool(equal and placed)}
            del voxels
        del truth
        with contextlib.redirect_stderr(None):
            ours = partial(medvlm, folder)
            control = pairs(ours, ours, args.pairs)
            for name in found:
                if name != "medvlm":
                    found[name] |= pairs(ours, partial(READERS[name], folder), args.pairs)
        for name in found:
            found[name]["memory"] = alone(__file__, "--memory-of", name, "--folder", str(folder))
    found["medvlm"]["seconds"] = control["ours"]
    print(heading(f"{args.slices} slices of {args.size} x {args.size}", control))
    print("| reader | seconds | times ours (10-90 %) | floor | peak memory / output | equal voxels and affine |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, row in found.items():
        ratio = ratio_text(row)
        floor = FLOORS.get(name, f"memory {MEMORY}")
        print(f"| {name} | {row['seconds']:.3f} | {ratio} | {floor} | {row['memory']:.2f} | {'yes' if row['gate'] else 'NO'} |")
    record({"slices": args.slices, "size": args.size, "control": control, "readers": found}, args.json)


if __name__ == "__main__":
    main()
