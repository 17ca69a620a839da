"""Public data sets of studies, reports, labels and volumes, on small imitations of their layouts."""

import csv
import gzip
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from medvlm.datasets import amos, brats, chexpert, ct_rate, m3d, manifest, mimic_cxr, unopened
from medvlm.datasets.base import open_data
from medvlm.errors import ModelError
from medvlm.evaluate.labeller import FINDINGS
from medvlm.imaging import study
from medvlm.imaging.nifti import save_nifti
from medvlm.imaging.scan import Volume
from medvlm.sample import SEG

SETS = (amos, brats, chexpert, ct_rate, m3d, mimic_cxr)


def table(path, *rows, packed=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", newline="", encoding="utf-8") if packed else path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(dict.fromkeys(k for row in rows for k in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)


def paint(path, shade=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray(np.full((6, 8), shade, np.uint8)).save(path)


def scan(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_nifti(Volume("v", np.asarray(array)[None], np.diag([3.0, 2.0, 1.0, 1.0]) if affine is None else affine), path)
    return path


def only(module):
    """Every other adapter leaves a folder alone."""
    return lambda folder: [s.__name__.rpartition(".")[2] for s in SETS if s.DATASET.here(folder)] == [module.__name__.rpartition(".")[2]]


@pytest.fixture
def nothing_opened(monkeypatch):
    """Files that were read since: a listing must leave it empty."""
    opened, read = [], study.read

    def watched(source, *args, **more):
        opened.append(source)
        return read(source, *args, **more)

    monkeypatch.setattr(study, "read", watched)
    return opened


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ with cough  // pneumonia?

 FINDINGS:

 The lungs are clear.
 No effusion.

 IMPRESSION:

 No acute process.
"""


def mimic_folder(folder, ending=".jpg", apart=True, packed=True, files=True):
    rows = [("aa-1", "50414267", "10000032", "train", "PA"), ("aa-2", "50414267", "10000032", "train", "LATERAL"), ("bb-1", "50000001", "10000099", "validate", "AP"),
            ("cc-1", "50000002", "11000001", "test", ""), ("dd-1", "50000003", "19000001", "train", "AP")]  # fmt: skip
    name = f"mimic-cxr-2.0.0-{{}}.csv{'.gz' if packed else ''}"
    table(folder / name.format("split"), *({"dicom_id": d, "study_id": s, "subject_id": p, "split": x} for d, s, p, x, _ in rows), packed=packed)
    table(folder / name.format("metadata"), *({"dicom_id": d, "subject_id": p, "ViewPosition": v, "Rows": 6} for d, _, p, _, v in rows), packed=packed)
    blank = dict.fromkeys(FINDINGS, "")
    table(folder / name.format("chexpert"), {"subject_id": "10000032", "study_id": "50414267", **blank, "Edema": "-1.0", "Pneumonia": "0.0", "No Finding": "1.0"}, packed=packed)
    table(folder / name.format("negbio"), {"subject_id": "10000032", "study_id": "50414267", **blank, "Edema": "1.0"},
          {"subject_id": "10000099", "study_id": "50000001", **blank, "Fracture": "1.0"}, packed=packed)  # fmt: skip
    for d, s, p, _, _ in rows[:4]:  # p19 was not downloaded
        place = folder / "files" / f"p{p[:2]}" / f"p{p}"
        text = (folder / "mimic-cxr-reports" if apart else folder) / "files" / f"p{p[:2]}" / f"p{p}" / f"s{s}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(REPORT if s == "50414267" else "The heart is large.\n  No change.")
        if files:
            paint(place / f"s{s}" / f"{d}{ending}", 10 * int(d[-1]))
    return folder


@pytest.mark.parametrize("apart, packed", [(True, True), (False, False)])
def test_mimic_cxr(tmp_path, nothing_opened, apart, packed):
    folder = mimic_folder(tmp_path, apart=apart, packed=packed)
    assert only(mimic_cxr)(folder)
    (train,), (val,), (test,) = (list(mimic_cxr.DATASET.samples(folder, s)) for s in ("train", "val", "test"))
    assert nothing_opened == []
    assert [s.id for s in (train, val, test)] == ["s50414267", "s50000001", "s50000002"] and [s.patient for s in (train, val, test)] == ["p10000032", "p10000099", "p11000001"]
    assert train.answer == "FINDINGS: The lungs are clear. No effusion.\nIMPRESSION: No acute process." and val.answer == "The heart is large. No change."
    assert train.meta["sections"] == {"examination": "CHEST (PA AND LAT)", "indication": "___ with cough // pneumonia?",
                                      "findings": "The lungs are clear. No effusion.", "impression": "No acute process."}  # fmt: skip
    assert {"row": "s50414267", "split": "train", "modality": "xray", "organ": "chest", "views": {"xray-1": "PA", "xray-2": "LATERAL"}}.items() <= train.meta.items()
    assert set(train.labels) == set(FINDINGS) and {k: v for k, v in train.labels.items() if not math.isnan(v)} == {"Pneumonia": 0, "No Finding": 1}
    assert train.meta["labels"] == {"chexpert": {"Edema": "-1.0", "Pneumonia": "0.0", "No Finding": "1.0"}, "negbio": {"Edema": "1.0"}}
    assert val.labels["Fracture"] == 1 and list(val.meta["labels"]) == ["negbio"] and not test.labels and not test.meta["labels"]
    assert [(i.id, i.info["view"], i.modality) for i in train.images.values()] == [("xray-1", "PA", "xray"), ("xray-2", "LATERAL", "xray")]
    assert [i.pixels[0, 0, 0] for i in train.images.values()] == [10, 20] and train.images["xray-1"].shape == (1, 6, 8) and len(nothing_opened) > 0
    assert [s.id for s in open_data(folder, "mimic_cxr").samples("train", "val", "test")] == ["s50414267", "s50000001", "s50000002"]


def test_mimic_cxr_dicom(tmp_path, nothing_opened):
    from pydicom.data import get_testdata_file

    folder, source = mimic_folder(tmp_path, files=False), Path(get_testdata_file("MR_small.dcm"))
    for name in ("p10/p10000032/s50414267/aa-1.dcm", "p10/p10000032/s50414267/aa-2.dcm"):
        (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / name).write_bytes(source.read_bytes())
    (sample,) = mimic_cxr.DATASET.samples(folder, "train")
    assert nothing_opened == [] and [i.info["view"] for i in sample.images.values()] == ["PA", "LATERAL"]
    first, second = sample.images.values()
    plain = study.read(source).image()
    assert (first.pixels == plain.pixels).all() and first.spacing == plain.spacing and first.modality == "xray" and second.shape == plain.shape and second is not first
    assert first.info["view"] == "PA" and first.info["sop"] == plain.info["sop"]


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda f: (f / "files/p10/p10000032/s50414267/aa-2.jpg").unlink(), r"mimic-cxr-2.0.0-split.csv.gz record 1: the picture of field 'dicom_id' is not"),
        (lambda f: (f / "mimic-cxr-reports/files/p10/p10000032/s50414267.txt").unlink(), r"split.csv.gz record 0: the report of field 'study_id' is not"),
        (lambda f: (f / "mimic-cxr-reports/files/p10/p10000032/s50414267.txt").write_bytes(b"\xff\xfe\xff"), r"split.csv.gz record 0: its report cannot be read"),
        (lambda f: table(f / "mimic-cxr-2.0.0-chexpert.csv.gz", {"study_id": "50414267", "Edema": "perhaps 10000032"}, packed=True), r"chexpert.csv.gz record 0: field 'Edema'"),
        (lambda f: (f / "mimic-cxr-2.0.0-metadata.csv.gz").write_bytes(b"\x1f\x8bno"), "metadata.csv.gz cannot be read"),
        (lambda f: table(f / "mimic-cxr-2.0.0-split.csv.gz", {"dicom_id": "aa-1", "split": "train"}, packed=True), "split.csv.gz has no column 'study_id'"),
    ],
)
def test_broken_mimic_cxr_is_named_without_the_patient(tmp_path, break_it, words):
    folder = mimic_folder(tmp_path)
    break_it(folder)
    with pytest.raises(ModelError, match=words) as error:
        list(mimic_cxr.DATASET.samples(folder, "train"))
    assert error.value.code == "BAD_DATASET" and "10000032" not in str(error.value)


def test_a_damaged_picture_is_named_by_its_record_when_it_is_looked_at(tmp_path):
    folder = mimic_folder(tmp_path)
    whole = (folder / "files/p10/p10000032/s50414267/aa-2.jpg").read_bytes()
    (folder / "files/p10/p10000032/s50414267/aa-2.jpg").write_bytes(whole[: len(whole) // 2])
    (sample,) = mimic_cxr.DATASET.samples(folder, "train")
    with pytest.raises(ModelError, match=r"split.csv.gz record \d: its image cannot be read \(TRUNCATED\)") as error:
        _ = sample.images["xray-2"].pixels
    assert error.value.code == "BAD_DATASET" and "10000032" not in str(error.value) and "aa-2" not in str(error.value)


def chexpert_record(path, **more):
    front = "frontal" in path
    return {"Path": path, "Sex": "Female", "Age": "68", "Frontal/Lateral": "Frontal" if front else "Lateral", "AP/PA": "AP" if front else "", **dict.fromkeys(FINDINGS, ""), **more}


def chexpert_folder(folder, name="CheXpert-v1.0-small"):
    two = {"Edema": "-1.0", "Fracture": "0.0", "Support Devices": "1.0"}
    table(folder / "train.csv", chexpert_record(f"{name}/train/patient00001/study1/view1_frontal.jpg", **two),
          chexpert_record(f"{name}/train/patient00001/study2/view1_frontal.jpg"),
          chexpert_record(f"{name}/train/patient00001/study1/view2_lateral.jpg", **two))  # fmt: skip
    table(folder / "valid.csv", chexpert_record(f"{name}/valid/patient64541/study1/view1_frontal.jpg", **dict.fromkeys(FINDINGS, "0.0")))
    for n, place in enumerate(("train/patient00001/study1/view1_frontal", "train/patient00001/study1/view2_lateral", "train/patient00001/study2/view1_frontal",
                               "valid/patient64541/study1/view1_frontal")):  # fmt: skip
        paint(folder / f"{place}.jpg", 20 * n)
    return folder


def test_chexpert(tmp_path, nothing_opened):
    folder = chexpert_folder(tmp_path)
    assert only(chexpert)(folder)
    first, second = chexpert.DATASET.samples(folder, "train")
    (val,) = chexpert.DATASET.samples(folder, "val")
    assert nothing_opened == [] and list(chexpert.DATASET.samples(folder, "test")) == []
    assert [s.id for s in (first, second, val)] == ["patient00001/study1", "patient00001/study2", "patient64541/study1"] and first.patient == second.patient == "patient00001"
    assert {k: v for k, v in first.labels.items() if not math.isnan(v)} == {"Fracture": 0, "Support Devices": 1} and math.isnan(first.labels["Edema"])
    assert first.meta["labels"] == {"Edema": "-1.0", "Fracture": "0.0", "Support Devices": "1.0"} and len(first.labels) == 14 and set(val.labels.values()) == {0}
    about = {"row": "patient00001/study1", "split": "train", "modality": "xray", "organ": "chest", "sex": "Female", "age": "68", "views": {"xray-1": "AP", "xray-2": "LATERAL"}}
    assert about.items() <= first.meta.items() and first.turns == () and [i.info["view"] for i in first.images.values()] == ["AP", "LATERAL"]
    assert [i.pixels[0, 0, 0] for i in (*first.images.values(), *second.images.values())] == [0, 20, 40]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"Edema": "2"}, r"train.csv record 1: field 'Edema'"),
        ({"Path": "CheXpert-v1.0/train/patient00001/view1_frontal.jpg"}, r"train.csv record 1: field 'Path'"),
        ({"Path": "CheXpert-v1.0/train/../study1/view1_frontal.jpg"}, r"train.csv record 1: the picture of field 'Path'"),
        ({"Path": "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"}, r"train.csv record 1 has the same Path as train.csv record 0"),
        ({"Path": "CheXpert-v1.0/train/patient00001/study1/view2_lateral.jpg", "Edema": "1.0"}, r"train.csv record 1 and train.csv record 0 are of one study"),
    ],
)
def test_broken_chexpert_is_named(tmp_path, change, words):
    folder = chexpert_folder(tmp_path)
    record = chexpert_record("CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg")
    table(folder / "train.csv", record, {**record, "Path": "CheXpert-v1.0-small/train/patient00001/study2/view1_frontal.jpg", **change})
    with pytest.raises(ModelError, match=words) as error:
        list(chexpert.DATASET.samples(folder, "train"))
    assert error.value.code == "BAD_DATASET" and "patient00001" not in str(error.value)


def ct_rate_folder(folder):
    base, hu = folder / "dataset", np.full((3, 4, 5), -1000, np.int16)
    for name in ("train_1_a_1", "train_1_a_2", "valid_7_b_1"):
        split, patient, letter, _ = name.split("_")
        scan(base / f"{split}_fixed" / f"{split}_{patient}" / f"{split}_{patient}_{letter}" / f"{name}.nii.gz", hu + int(name[-1]))
    say = {"ClinicalInformation_EN": "Cough.", "Technique_EN": "Not given.", "Findings_EN": "Trachea is open.\nNo nodule.", "Impressions_EN": "Normal."}
    reports = [{"VolumeName": f"{n}.nii.gz", **say} for n in ("train_1_a_1", "train_1_a_2", "train_1_c_1", "train_2_a_1")]  # c shows a head, 2 was not downloaded
    table(base / "radiology_text_reports/train_reports.csv", *reports)
    table(base / "radiology_text_reports/validation_reports.csv", {"VolumeName": "valid_7_b_1.nii.gz", **say, "Findings_EN": "Not given."})
    labels = {"Medical material": "0", "Lung nodule": "1"}
    table(base / "multi_abnormality_labels/train_predicted_labels.csv", *({"VolumeName": r["VolumeName"], **labels} for r in reports))
    table(base / "multi_abnormality_labels/valid_predicted_labels.csv", {"VolumeName": "valid_7_b_1.nii.gz", **labels})
    table(base / "metadata/train_metadata.csv", {"VolumeName": "train_1_a_1.nii.gz", "PatientSex": "F", "PatientAge": "055Y", "Manufacturer": "SIEMENS"})
    (base / "metadata/no_chest_train.txt").write_text("train/train_1/train_1_c/train_1_c_1.nii.gz\n")
    return folder


def test_ct_rate(tmp_path, nothing_opened):
    folder = ct_rate_folder(tmp_path)
    assert only(ct_rate)(folder) and only(ct_rate)(folder / "dataset")
    first, second = ct_rate.DATASET.samples(folder, "train")
    (val,) = ct_rate.DATASET.samples(folder / "dataset", "val")
    assert nothing_opened == [] and [s.id for s in (first, second, val)] == ["train_1_a_1", "train_1_a_2", "valid_7_b_1"]
    assert first.patient == second.patient == "train_1" and val.patient == "valid_7"
    assert first.answer == "FINDINGS: Trachea is open. No nodule.\nIMPRESSION: Normal." and val.answer == "IMPRESSION: Normal."
    assert first.meta["sections"] == {"clinical information": "Cough.", "findings": "Trachea is open. No nodule.", "impression": "Normal."}
    assert first.labels == {"Medical material": 0, "Lung nodule": 1}
    about = {"row": "train_1_a_1", "scan": "train_1_a", "split": "train", "modality": "ct", "organ": "chest", "sex": "F", "age": "055Y", "scanner": "SIEMENS"}
    assert about.items() <= first.meta.items() and "sex" not in second.meta
    (image,) = second.images.values()
    assert isinstance(image, Volume) and nothing_opened == []
    assert image.id == "ct-1" and image.unit == "HU" and image.shape == (1, 3, 4, 5) and image.spacing == (3, 2, 1) and (image.voxels == -998).all() and len(nothing_opened) == 1


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda f: next((f / "train_fixed").rglob("train_1_a_2.nii.gz")).unlink(), r"train_reports.csv record 1: the picture of field 'VolumeName' is not"),
        (lambda f: table(f / "multi_abnormality_labels/train_predicted_labels.csv", {"VolumeName": "train_1_a_1.nii.gz", "Lung nodule": "1"}),
         r"train_reports.csv record 1: field 'VolumeName' is not in train_predicted_labels.csv"),
        (lambda f: table(f / "multi_abnormality_labels/train_predicted_labels.csv", {"VolumeName": "train_1_a_1.nii.gz", "Lung nodule": "0.7"}),
         r"train_predicted_labels.csv record 0: field 'Lung nodule'"),
        (lambda f: table(f / "radiology_text_reports/train_reports.csv", *[{"VolumeName": "train_1_a_1.nii.gz", "Findings_EN": "x", "Impressions_EN": ""}] * 2), r"record 1: .*VolumeName"),
    ],
)  # fmt: skip
def test_broken_ct_rate_is_named(tmp_path, break_it, words):
    folder = ct_rate_folder(tmp_path)
    break_it(folder / "dataset")
    with pytest.raises(ModelError, match=words) as error:
        list(ct_rate.DATASET.samples(folder, "train"))
    assert error.value.code == "BAD_DATASET" and "train_1" not in str(error.value)


def labels_of(shape=(3, 4, 5), values=(1, 2, 15)):
    array = np.zeros(shape, np.uint8)
    for n, value in enumerate(values):
        array[n % shape[0], n % shape[1], :2] = value
    return array


def amos_folder(folder):
    (folder / "dataset.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text("{}")
    for images, labels, names in (("imagesTr", "labelsTr", ("0001", "0507")), ("imagesVa", "labelsVa", ("0008",)), ("imagesTs", None, ("0500",))):
        for name in names:
            scan(folder / images / f"amos_{name}.nii.gz", np.full((3, 4, 5), -1000, np.int16))
            if labels:
                scan(folder / labels / f"amos_{name}.nii.gz", labels_of())
    return folder


def test_amos_is_what_a_manifest_of_its_files_is(tmp_path, nothing_opened):
    folder = amos_folder(tmp_path / "amos22")
    assert only(amos)(folder)
    found = {split: list(amos.DATASET.samples(folder, split)) for split in ("train", "val", "test")}
    assert nothing_opened == [] and {k: len(v) for k, v in found.items()} == {"train": 30, "val": 15, "test": 1}
    assert len({s.id for of in found.values() for s in of}) == 46
    row = {"id": "amos_0001", "image": "amos22/imagesTr/amos_0001.nii.gz", "modality": "ct", "split": "train", "organ": "abdomen",
           "mask": {"type": "volume_labelmap", "files": {"organs": "amos22/labelsTr/amos_0001.nii.gz"}, "labels": {str(k): v for k, v in amos.ORGANS.items()}}}  # fmt: skip
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    for a, b in zip(found["train"][:15], manifest.samples(tmp_path), strict=True):
        assert (a.id, a.meta, a.labels, a.turns, list(a.images), a.regions, a.patient, a.verb) == (b.id, b.meta, b.labels, b.turns, list(b.images), b.regions, b.patient, b.verb)
        (x,), (y,) = a.masks, b.masks
        assert (x.image, x.label, x.count) == (y.image, y.label, y.count) and (x.array == y.array).all() and x.array.dtype == bool
        assert a.images["ct-1"].same_grid(b.images["ct-1"]) and (a.images["ct-1"].voxels == b.images["ct-1"].voxels).all()
    drawn = {s.masks[0].label: int(s.masks[0].array.sum()) for s in found["train"][:15]}
    assert {k: n for k, n in drawn.items() if n} == {"spleen": 2, "right kidney": 2, "prostate or uterus": 2}
    assert [next(iter(s.images.values())).unit for s in (found["train"][0], found["train"][-1], *found["test"])] == ["HU", "raw", "raw"]
    assert [found[k][-1].meta["modality"] for k in ("train", "val", "test")] == ["mr", "ct", "ct_or_mr"] and found["test"][0].id == "amos_0500"


def test_what_is_not_opened_goes_to_worker_processes_and_so_does_what_is(tmp_path, nothing_opened):
    here = next(amos.DATASET.samples(amos_folder(tmp_path), "train"))
    sent = pickle.loads(pickle.dumps(here))
    assert nothing_opened == [] and (sent.masks[0].array == here.masks[0].array).all() and sent.masks[0].label == "spleen"
    again = pickle.loads(pickle.dumps(sent))
    assert again.images["ct-1"].shape == (1, 3, 4, 5) and (again.images["ct-1"].voxels == -1000).all() and again.images["ct-1"].modality == "ct"


def test_a_mask_may_lie_along_other_axes_but_not_on_another_grid(tmp_path):
    folder = amos_folder(tmp_path)
    array, grid = labels_of(), np.diag([3.0, 2.0, 1.0, 1.0])
    flipped = grid @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 4], [0, 0, 0, 1.0]])  # W runs the other way
    scan(folder / "labelsTr/amos_0001.nii.gz", array[:, :, ::-1], flipped)
    spleen = next(amos.DATASET.samples(folder, "train")).masks[0]
    assert (spleen.array == (array == 1)).all()
    scan(folder / "labelsTr/amos_0001.nii.gz", array, np.diag([3.0, 2.0, 1.5, 1.0]))
    with pytest.raises(ModelError, match=r"imagesTr file 0: its mask cannot be read \(GRID_MISMATCH\)") as error:
        _ = next(amos.DATASET.samples(folder, "train")).masks[0].array
    assert error.value.code == "BAD_DATASET"
    (folder / "labelsTr/amos_0507.nii.gz").unlink()
    with pytest.raises(ModelError, match=r"imagesTr file 1: labelsTr holds no label map"):
        list(amos.DATASET.samples(folder, "train"))


def brats_case(folder, name, values=(1, 3), sequences=("t1n", "t1c", "t2w", "t2f", "seg")):
    for n, s in enumerate(sequences):
        scan(folder / name / f"{name}-{s}.nii.gz", labels_of(values=values) if s == "seg" else np.full((3, 4, 5), 10 * n, np.int16))


@pytest.mark.parametrize("places", [("ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData", "ASNR-MICCAI-BraTS2023-GLI-Challenge-ValidationData"), ("", "validation_data")])
def test_brats(tmp_path, nothing_opened, places):
    brats_case(tmp_path / places[0], "BraTS-GLI-00000-000")
    brats_case(tmp_path / places[0], "BraTS-GLI-00005-101", values=(4,))
    brats_case(tmp_path / places[1], "BraTS-GLI-00001-000", sequences=brats.SEQUENCES)
    assert only(brats)(tmp_path)
    train, val = (list(brats.DATASET.samples(tmp_path, s)) for s in ("train", "val"))
    assert nothing_opened == [] and len(train) == 3 + 4 and [s.id for s in val] == ["BraTS-GLI-00001-000"] and val[0].masks == ()
    assert [s.masks[0].label for s in train] == [*brats.BEFORE.values(), *brats.AFTER.values()] and train[0].id == "BraTS-GLI-00000-000/necrotic tumor core"
    assert [bool(s.masks[0].array.any()) for s in train] == [True, False, True, False, False, False, True]  # what is absent is an empty mask
    about = {"row": "BraTS-GLI-00000-000", "organ": "brain", "modality": "mr", "visit": "000", "sequences": {"mr-1": "t1n", "mr-2": "t1c", "mr-3": "t2w", "mr-4": "t2f"}}
    assert about.items() <= train[0].meta.items() and train[0].patient == "BraTS-GLI-00000" and train[-1].patient == "BraTS-GLI-00005"
    assert [(i.id, float(i.voxels.max()), i.unit) for i in train[0].images.values()] == [("mr-1", 0, "raw"), ("mr-2", 10, "raw"), ("mr-3", 20, "raw"), ("mr-4", 30, "raw")]
    assert train[0].masks[0].image == "mr-1" and train[0].images is train[2].images


def test_broken_brats_is_named(tmp_path):
    brats_case(tmp_path, "BraTS-GLI-00000-000", sequences=("t1n", "t1c", "t2w", "seg"))
    with pytest.raises(ModelError, match=r"case 0: there is no -t2f.nii.gz"):
        list(brats.DATASET.samples(tmp_path, "train"))
    brats_case(tmp_path, "BraTS-GLI-00000-000", sequences=brats.SEQUENCES)
    (tmp_path / "BraTS-GLI-00000-000/BraTS-GLI-00000-000-seg.nii.gz").unlink()
    with pytest.raises(ModelError, match=r"case 0: there is no -seg.nii.gz"):  # a broken download is no validation case
        list(brats.DATASET.samples(tmp_path, "train"))
    brats_case(tmp_path / "more_training_data", "BraTS-GLI-00000-000")
    brats_case(tmp_path, "BraTS-GLI-00000-000")
    with pytest.raises(ModelError, match=r"more_training_data case 1 has the name of .* case 0"):
        list(brats.DATASET.samples(tmp_path, "train"))


def refseg_record(case, region, kind="0", answer="Sure, it is [SEG].", **more):
    return {"Image": f"{case}/ct.nii.gz", "Mask": f"{case}/mask.nii.gz", "Mask_ID": region, "Question_Type": kind, "Question": f"Where is {region}?", "Answer": answer, **more}


def m3d_folder(folder):
    table(folder / "M3D_RefSeg_train.csv", refseg_record("s0139", 1), refseg_record("s0200", 1), refseg_record("s0139", 2, "1", "Here <SEG>, and here [SEG]."))
    table(folder / "M3D_RefSeg_test.csv", refseg_record("s0139", 1, answer="Nowhere."))
    for case in ("s0139", "s0200"):
        scan(folder / "M3D_RefSeg" / case / "ct.nii.gz", np.full((3, 4, 5), -900, np.int16))
        scan(folder / "M3D_RefSeg" / case / "mask.nii.gz", labels_of(values=(1, 2)))
    return folder


def test_m3d(tmp_path, nothing_opened):
    folder = m3d_folder(tmp_path)
    assert only(m3d)(folder)
    train, test = (list(m3d.DATASET.samples(folder, s)) for s in ("train", "test"))
    assert nothing_opened == [] and list(m3d.DATASET.samples(folder, "val")) == []
    assert [s.id for s in (*train, *test)] == ["train 0", "train 2", "train 1", "test 0"] and [s.meta["row"] for s in train] == ["s0139", "s0139", "s0200"]
    assert train[0].answer == f"Sure, it is {SEG}." and train[1].answer == f"Here {SEG}, and here {SEG}." and len(train[1].masks) == 2 and len(test[0].masks) == 1
    assert (train[1].masks[0].array == (labels_of(values=(1, 2)) == 2)).all() and train[0].images is train[1].images and train[1].masks[0].label == "Where is 2?"
    assert {"category": ["reasoning"], "type": "OPEN", "region": 2, "modality": "ct", "split": "train"}.items() <= train[1].meta.items()
    for change, words in (({"Mask_ID": "x"}, "'Mask_ID'"), ({"Question_Type": "7"}, "'Question_Type'"), ({"Mask": "../mask.nii.gz"}, "'Mask'"), ({"Image": "s9/ct.nii.gz"}, "'Image'")):
        table(folder / "M3D_RefSeg_test.csv", refseg_record("s0139", 1), refseg_record("s0139", 2, **change))
        with pytest.raises(ModelError, match=f"M3D_RefSeg_test.csv record 1: .*{words}") as error:
            list(m3d.DATASET.samples(folder, "test"))
        assert error.value.code == "BAD_DATASET"


def test_what_is_opened_is_let_go_and_read_again(tmp_path, nothing_opened):
    file = scan(tmp_path / "a.nii.gz", np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    image = unopened.unopened(file, "ct-1", "ct", "t.csv record 0")
    image.info["view"] = "told"
    image.release()
    assert image.modality == "ct" and image.origin == file and nothing_opened == []
    first = image.voxels
    assert image.info["view"] == "told" and image.info["format"] and any("HU_IMPLAUSIBLE" in w for w in image.info["warnings"]) and len(nothing_opened) == 1
    image.release()
    other = unopened.unopened(scan(tmp_path / "b.nii.gz", np.zeros((2, 2, 2), np.int16)), "ct-1", "ct", "t.csv record 1")
    assert other.shape == (1, 2, 2, 2) and (image.voxels == first).all() and len(nothing_opened) == 3  # only what was opened last is held
    with pytest.raises(AttributeError):
        _ = image.nonsense
    assert not hasattr(unopened.unopened(tmp_path / "gone.png", "xray-1", "xray", "t.csv record 4"), "affine")
    picture = tmp_path / "c.png"
    paint(picture)
    with pytest.raises(ModelError, match="record 2: its image has 2 dimensions"):
        _ = unopened.unopened(picture.rename(tmp_path / "c.nii.gz"), "ct-1", "ct", "t.csv record 2").shape
    with pytest.raises(ModelError, match=r"record 3: its image cannot be read \(UNREADABLE\)"):
        _ = unopened.unopened(tmp_path / "gone.nii.gz", "ct-1", "ct", "t.csv record 3").affine


def test_tables_are_read_record_by_record(tmp_path):
    from medvlm.datasets.records import read_csv

    file = tmp_path / "t.csv"
    file.write_bytes('\ufeffa,b\r\n1,"x\ny"\r\n\r\n2,z\r\n'.encode())
    assert list(read_csv(file, ("b",))) == [{"a": "1", "b": "x\ny", "_at": "t.csv record 0"}, {"a": "2", "b": "z", "_at": "t.csv record 1"}]
    for text, words in ((b"a,b\n1,2\n3\n", "t.csv record 1 has 1 cells under 2 headings"), (b"a\n\xff", "not CSV in UTF-8"), (b"a\n1", "no column 'b'"), (b"", "no column 'b'"),
                        (b'a,b\n"1"2,3', "not CSV")):  # fmt: skip
        file.write_bytes(text)
        with pytest.raises(ModelError, match=words):
            list(read_csv(file, ("b",)))
