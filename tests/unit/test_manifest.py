"""From a line of a manifest to samples, and what is said of a line that is wrong."""

import json
import math

import nibabel
import numpy as np
import pytest
from PIL import Image as Pillow

from medvlm.datasets import manifest
from medvlm.errors import MedVLMError
from medvlm.imaging.scan import Volume
from medvlm.imaging.study import read
from medvlm.sample import Mask


def png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two pictures of 6 x 8, masks of every 2-D kind."""
    folder = tmp_path / "set"
    png(folder / "images/a.png", np.arange(48, dtype=np.uint8).reshape(6, 8))
    png(folder / "images/b.png", np.arange(48, dtype=np.uint8).reshape(6, 8) * 2)
    lung = np.zeros((6, 8), bool)
    lung[1:3, 2:5] = True
    png(folder / "masks/lung.png", lung)
    png(folder / "masks/empty.png", np.zeros((6, 8), bool))
    png(folder / "masks/cells.png", np.where(lung, np.uint16(300), np.uint16(0)) + np.eye(6, 8, dtype=np.uint16))
    png(folder / "masks/map.png", np.where(lung, np.uint8(7), np.uint8(0)) + np.eye(6, 8, dtype=np.uint8))
    png(folder / "masks/small.png", np.zeros((5, 8), bool))
    png(folder / "masks/colour.png", np.arange(144, dtype=np.uint8).reshape(6, 8, 3))
    png(tmp_path / "outside.png", np.zeros((6, 8), np.uint8))
    return folder


def line(**more):
    return {"id": "row-1", "image": "images/a.png", "modality": "xray", "split": "train"} | more


def write(folder, *rows):
    (folder / "manifest.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return folder


def one(folder, **more):
    return list(manifest.samples(write(folder, line(**more))))


def test_each_question_is_a_sample(folder):
    qa = [
        {"qid": "q1", "question": "Is it?", "answer": "Yes", "type": "CLOSED", "pair": "p1", "category": ["x"]},
        {"qid": 2, "question": "Where?", "answer": "left lung", "type": "OPEN"},
        {"qid": "q3", "question": "PA or AP?", "answer": "AP", "choices": ["PA", "AP"]},
    ]
    first, second, third = one(folder, patient="p-9", qa=qa, findings={"pneumonia": 1, "normal": 0, "ARDS": None}, note="n", labels={"view": "PA"})
    assert [s.id for s in (first, second, third)] == ["q1", "2", "q3"]
    assert [s.group for s in (first, second, third)] == ["p1", None, None] and {s.patient for s in (first, second)} == {"p-9"}
    assert (first.question, first.answer) == ("Is it?", "Yes") and first.choices == ("yes", "no")
    assert second.choices is None and third.choices == ("PA", "AP")
    assert first.labels["pneumonia"] == 1 and first.labels["normal"] == 0 and math.isnan(first.labels["ARDS"])
    assert first.meta["row"] == "row-1" and first.meta["type"] == "CLOSED" and first.meta["note"] == "n" and first.meta["labels"] == {"view": "PA"}
    assert first.meta["split"] == "train" and first.meta["modality"] == "xray" and not {"qa", "findings", "pair", "answer"} & first.meta.keys()
    (image,) = first.images.values()
    assert image is next(iter(second.images.values())) and image.modality == "xray" and image.pixels.shape == (1, 6, 8)
    assert first.images.keys() == {"xray-1"}


def test_each_mask_is_a_sample(folder):
    lung = np.asarray(Pillow.open(folder / "masks/lung.png"))
    samples = one(folder, mask={"type": "binary", "files": {"lung": "masks/lung.png", "none": "masks/empty.png"}})
    assert [s.id for s in samples] == ["row-1/lung", "row-1/none"]
    (mask,) = samples[0].masks
    assert mask.image == "xray-1" and mask.label == "lung" and mask.array.dtype == bool and np.array_equal(mask.array, lung)
    assert not samples[1].masks[0].array.any() and samples[1].masks[0].array.shape == (6, 8)
    (cells,) = one(folder, mask={"type": "instance", "files": {"cell": "masks/cells.png"}})
    assert np.array_equal(cells.masks[0].array, lung | np.eye(6, 8, dtype=bool)) and cells.id == "row-1/cell"
    samples = one(folder, mask={"type": "labelmap", "files": {"total": "masks/map.png"}, "labels": {"7": "lung", "1": "line", "9": "none"}})
    assert [s.id for s in samples] == ["row-1/lung", "row-1/line", "row-1/none"]
    overlap = lung & np.eye(6, 8, dtype=bool)
    assert np.array_equal(samples[0].masks[0].array, lung & ~overlap) and not samples[2].masks[0].array.any()
    (whole,) = one(folder, mask={"type": "labelmap", "files": {"total": "masks/map.png"}, "labels": None})  # numbers that nobody named
    assert whole.id == "row-1/total" and np.array_equal(whole.masks[0].array, lung | np.eye(6, 8, dtype=bool))


def test_two_label_maps_keep_their_names_apart(folder):
    files = {"first": "masks/map.png", "second": "masks/map.png"}
    samples = one(folder, mask={"type": "labelmap", "files": files, "labels": {"7": "lung"}})
    assert [s.id for s in samples] == ["row-1/first/lung", "row-1/second/lung"]


def test_text_boxes_and_rows_with_nothing(folder):
    (sample,) = one(folder, text="All is well.", sections={"impression": "well"}, boxes=[{"label": "lung", "xyxy": [2, 1, 5.5, 3]}])
    assert sample.id == "row-1" and sample.answer == "All is well." and sample.question == "" and sample.meta["sections"] == {"impression": "well"}
    (region,) = sample.regions
    assert region.box == ((1, 2), (3, 5.5)) and region.label == "lung" and region.image == "xray-1"
    (bare,) = one(folder)
    assert bare.id == "row-1" and not bare.turns and not bare.masks and bare.images
    (text,) = one(folder, image=None, text="x")
    assert not text.images
    everything = one(folder, text="x", qa=[{"qid": "q", "question": "?", "answer": "no"}], mask={"type": "binary", "files": {"lung": "masks/lung.png"}})
    assert [s.id for s in everything] == ["q", "row-1/lung", "row-1"]


def test_splits_and_empty_lines(folder):
    rows = [line(id=f"r{i}", split=s) for i, s in enumerate(("train", "val", "test", "train"))]
    write(folder, rows[0], "", *rows[1:])
    assert [r["id"] for r in manifest.rows(folder, "train")] == ["r0", "r3"] and len(list(manifest.rows(folder))) == 4
    assert [r["_line"] for r in manifest.rows(folder / "manifest.jsonl")] == [1, 3, 4, 5]
    whole = [{k: v for k, v in r.items() if k != "split"} for r in rows]
    assert len(list(manifest.rows(write(folder, *whole), "test"))) == 4


BAD = {
    "not JSON": ("{", "not JSON"),
    "no object": ("[1]", "list"),
    "id": (line(id=7), "'id'", "7"),
    "empty id": (line(id=""), "'id'", "''"),
    "no image": ({k: v for k, v in line().items() if k != "image"}, "'image' is missing"),
    "image": (line(image=["a.png"]), "'image'", "['a.png']"),
    "modality": (line(modality="CXR"), "'CXR'", "xray"),
    "split": (line(split="dev"), "'dev'", "train, val or test"),
    "no split": (line(split=None), "None"),
    "mask": (line(mask="masks/lung.png"), "'mask'", "masks/lung.png", "an object"),
    "mask type": (line(mask={"type": "poly", "files": {}}), "poly", "binary"),
    "mask files": (line(mask={"type": "binary", "files": ["a"]}), "files", "['a']"),
    "mask path": (line(mask={"type": "binary", "files": {"a": 3}}), "3"),
    "labels": (line(mask={"type": "labelmap", "files": {"a": "masks/map.png"}, "labels": {}}), "labels", "{}"),
    "label value": (line(mask={"type": "labelmap", "files": {"a": "masks/map.png"}, "labels": {"x": "lung"}}), "{'x': 'lung'}"),
    "qa": (line(qa={"qid": 1}), "'qa'", "a list"),
    "qa entry": (line(qa=[{"qid": "1", "question": "a"}]), "qa[0]", "answer"),
    "boxes": (line(boxes=[{"label": "a", "xyxy": [1, 2, 3]}]), "boxes[0]", "[1, 2, 3]"),
    "box number": (line(boxes=[{"label": "a", "xyxy": [1, 2, "3", 4]}]), "boxes[0]", "'3'"),
    "box label": (line(boxes=[{"xyxy": [1, 2, 3, 4]}]), "boxes[0]", "label"),
    "finding": (line(findings={"ARDS": "yes"}), "'ARDS'", "'yes'", "1, 0 or null"),
    "findings": (line(findings=["ARDS"]), "'findings'", "an object"),
    "patient": (line(patient=12), "'patient'", "12"),
    "text": (line(text=["a"]), "'text'", "a string"),
    "twice": (line(id="good"), "'good'", "line 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_line_says_where_and_what(folder, name):
    row, *says = BAD[name]
    write(folder, line(id="good"), row)
    with pytest.raises(MedVLMError) as e:
        list(manifest.rows(folder))
    assert e.value.code == "BAD_MANIFEST" and "manifest.jsonl line 2" in e.value.message
    assert all(s in e.value.message for s in says), e.value.message


@pytest.mark.parametrize("path", ["../outside.png", "images/../../outside.png", "ABSOLUTE", "images/\0a.png"])
def test_nothing_outside_the_folder_is_read(folder, path):
    path = str(folder.parent / "outside.png") if path == "ABSOLUTE" else path
    for more in ({"image": path}, {"mask": {"type": "binary", "files": {"lung": path}}}):
        with pytest.raises(MedVLMError) as e:
            one(folder, **more)
        assert e.value.code == "BAD_MANIFEST" and "line 1" in e.value.message and "outside the manifest's folder" in e.value.message


def test_a_link_out_of_the_folder_is_not_followed(folder):
    (folder / "images/link.png").symlink_to(folder.parent / "outside.png")
    with pytest.raises(MedVLMError) as e:
        one(folder, image="images/link.png")
    assert e.value.code == "BAD_MANIFEST"


@pytest.mark.parametrize(
    ("file", "code", "says"),
    [("small", "GRID_MISMATCH", ("(5, 8)", "(6, 8)")), ("missing", "BAD_MANIFEST", ("does not exist",)), ("colour", "BAD_MANIFEST", ("one channel", "3"))],
)
def test_masks_that_do_not_fit_are_refused(folder, file, code, says):
    with pytest.raises(MedVLMError) as e:
        one(folder, mask={"type": "binary", "files": {"lung": f"masks/{file}.png"}})
    assert e.value.code == code and "line 1" in e.value.message and all(s in e.value.message for s in says)
    with pytest.raises(MedVLMError) as e:
        one(folder, image=None, mask={"type": "binary", "files": {"lung": "masks/lung.png"}})
    assert "needs an image" in e.value.message


def test_a_picture_that_cannot_be_read_says_its_line(folder):
    (folder / "images/bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 40)
    with pytest.raises(MedVLMError) as e:
        one(folder, image="images/bad.png")
    assert "line 1" in e.value.message and e.value.code in ("TRUNCATED", "CORRUPT", "BOMB")
    with pytest.raises(MedVLMError) as e:
        list(manifest.rows(folder / "nowhere"))
    assert e.value.code == "BAD_MANIFEST"


def volume(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def test_a_volume_mask_may_lie_along_other_axes_but_on_no_other_grid(folder):
    affine = np.diag([2.0, 3, 4, 1])
    values = np.zeros((4, 5, 6), np.uint8)
    values[1, 2, 3] = values[0, 0, 0] = 1
    volume(folder / "images/v.nii.gz", np.zeros((4, 5, 6), np.int16), affine)
    flipped = affine.copy()
    flipped[:, 0] *= -1
    flipped[0, 3] = 6
    volume(folder / "masks/flipped.nii.gz", values[::-1].copy(), flipped)
    (sample,) = one(folder, image="images/v.nii.gz", modality="ct", mask={"type": "volume_binary", "files": {"lesion": "masks/flipped.nii.gz"}})
    assert np.array_equal(sample.masks[0].array, values.transpose(2, 1, 0).astype(bool))
    moved = affine.copy()
    moved[0, 3] += 1
    for name, array, place in (("moved", values, moved), ("cropped", values[:, :, :5], affine), ("coarse", values, affine * [2, 2, 2, 1])):
        volume(folder / f"masks/{name}.nii.gz", array, place)
        with pytest.raises(MedVLMError) as e:
            one(folder, image="images/v.nii.gz", modality="ct", mask={"type": "volume_binary", "files": {"lesion": f"masks/{name}.nii.gz"}})
        assert e.value.code == "GRID_MISMATCH", name
    with pytest.raises(MedVLMError) as e:  # a picture's mask for a volume
        one(folder, image="images/v.nii.gz", modality="ct", mask={"type": "volume_binary", "files": {"lesion": "masks/lung.png"}})
    assert e.value.code == "GRID_MISMATCH"


def test_a_dicom_segmentation_of_a_picture_is_refused_and_never_skipped(folder):
    (folder / "masks/seg.dcm").write_bytes(b"not DICOM")
    with pytest.raises(MedVLMError) as e:
        one(folder, mask={"type": "dicom_seg", "files": {"liver": "masks/seg.dcm"}})
    assert e.value.code == "UNSUPPORTED" and "line 1" in e.value.message


def test_dicom_segmentations_lie_on_their_series(data):
    """Against highdicom's own frames, put on the slice each of them names as its source."""
    import pydicom

    (row,) = [r for r in manifest.rows(data / "dicom_series") if r["id"] == "dcmqi_ct_3slice"]
    (image,) = manifest.open_images(row)
    masks = {m.label: m.array for m in manifest.read_masks(row, image)}
    assert list(masks) == ["liver", "GREEN", "ORANGE", "PURPLE", "LIGHT_BLUE", "DARK_BLUE"]
    assert all(a.shape == image.shape[1:] and a.dtype == bool for a in masks.values())
    for file, names in (("liver", ["liver"]), ("partial_overlaps", list(masks)[1:])):
        stored = pydicom.dcmread(data / "dicom_series" / row["mask"]["files"][file])
        expected = {n: np.zeros(image.shape[1:], bool) for n in names}
        shared = stored.SharedFunctionalGroupsSequence[0]
        for frame, groups in zip(stored.pixel_array, stored.PerFrameFunctionalGroupsSequence):
            number = (groups.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence)[0].ReferencedSegmentNumber
            source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            expected[names[number - 1]][image.info["sop"].index(source)] |= frame.astype(bool)
        for name in names:
            assert np.array_equal(masks[name], expected[name]) and masks[name].any(), name
    ids = [s.id for s in manifest.row_samples(row)]
    assert ids[:2] == ["dcmqi_ct_3slice/liver", "dcmqi_ct_3slice/partial_overlaps/GREEN"] and len(ids) == len(set(ids)) == 6


def test_a_dicom_segmentation_elsewhere_is_refused(data):
    from medvlm.imaging.seg import read_seg

    (row,) = [r for r in manifest.rows(data / "dicom_series") if r["id"] == "dcmqi_ct_3slice"]
    (image,) = manifest.open_images(row)
    path = data / "dicom_series/masks/dcmqi_liver_seg.dcm"
    ours = read_seg(path, image)[0][1]
    turned = read_seg(path, image.reorient("LPI"))[0][1]
    assert np.array_equal(turned, ours.transpose(2, 1, 0)[..., ::-1])  # axes D, H, W of "SPL" seen as "LPI"
    for change in (np.diag([1.0, 1, 1, 1]), np.diag([1.0, 1, 0.5, 1])):
        affine = image.affine @ change
        affine[0, 3] += 0.3
        with pytest.raises(MedVLMError) as e:
            read_seg(path, Volume("v", image.voxels, affine))
        assert e.value.code == "GRID_MISMATCH"
    with pytest.raises(MedVLMError) as e:
        read_seg(path, Volume("v", image.voxels, image.affine, info={"frame_of_reference": "1.2.3"}))
    assert e.value.code == "MIXED_FRAME"
    with pytest.raises(MedVLMError) as e:
        read_seg(next((data / "dicom_series/dcmqi_ct_3slice").glob("*.dcm")), image)
    assert e.value.code == "CORRUPT"


@pytest.mark.parametrize(("name", "questions"), [("vqa_rad", 2790), ("xray_covid", 226)])
def test_every_question_of_a_set_becomes_a_sample(data, name, questions):
    """As many as its README counts, under ids of their own."""
    ids = [s.id for row in manifest.rows(data / name) for s in manifest.row_samples(row | {"image": None, "mask": None, "text": None}) if s.turns]
    assert len(ids) == len(set(ids)) == questions
    assert f"| {name} |" in (data / "README.md").read_text() and f"| {questions} |" in (data / "README.md").read_text()


def test_masks_of_every_set_lie_on_their_images(data):
    """One row of each set and kind of mask."""
    seen = set()
    for path in sorted(data.glob("*/manifest.jsonl")):
        for row in manifest.rows(path):
            kind = (path.parent.name, (row.get("mask") or {}).get("type"), str(row["image"])[-4:])
            if row.get("mask") and kind not in seen:
                seen.add(kind)
                (image,) = manifest.open_images(row)
                masks = manifest.read_masks(row, image)
                assert masks and all(m.array.shape == image.shape[1:] for m in masks) and any(m.array.any() for m in masks), row["id"]
    assert len(seen) >= 6
    assert read(data / "vol_totalseg").images


def test_a_text_with_headings_is_a_report(tmp_path):
    lines = [{"id": "a", "image": None, "modality": "ct", "text": "FINDINGS: No mass.\nIMPRESSION: Normal."}, {"id": "b", "image": None, "modality": "ct", "text": "A CT of the chest."}]
    lines.append({"id": "c", "image": None, "modality": "xray", "text": "Presentation: a cough. Imaging Findings: a white lung."})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report, caption, note = (next(manifest.row_samples(r)) for r in manifest.rows(tmp_path))
    assert report.meta["sections"] == {"findings": "No mass.", "impression": "Normal."} and "sections" not in caption.meta and "sections" not in note.meta


def test_large_masks_are_kept_packed():
    lot = np.random.default_rng(0)
    array = lot.random((130, 101, 97)) < 0.01
    held = manifest._held("ct-1", "tumour", array, 3)
    assert np.array_equal(held.array, array) and held.array.dtype == bool and (held.label, held.count) == ("tumour", 3)
    assert isinstance(held, manifest.Outline) and len(held._draw.args[0]) < array.nbytes / 8
    assert type(manifest._held("ct-1", "tumour", array[:2])) is Mask
