"""Public data sets in the layout that their authors publish, on small imitations."""

import json
import math

import numpy as np
import pytest
from PIL import Image as Picture

from medvlm.datasets import probmed, slake, vqa_rad
from medvlm.datasets.base import open_data
from medvlm.errors import ModelError
from medvlm.evaluate import probe
from medvlm.sample import Prediction


def paint(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray(np.arange(math.prod(size), dtype=np.uint8).reshape(size[::-1])).save(path)


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


def probmed_records(number="i"):
    kinds = ["modality_gt", "modality_hallu", "body_part_gt", "body_part_hallu", "abnormality", "entity_gt_0", "entity_hallu_0", "entity_gt_1", "entity_hallu_1",
             "grounding_gt_0", "grounding_hallu_0"]  # fmt: skip
    normal = ["modality_gt", "modality_hallu", "body_part_gt", "body_part_hallu", "abnormality", "entity_hallu"]
    records = []
    for image, kind, asked in (("7", "X-ray - Chest", kinds), ("8", "ct-scan_abdomen", normal)):
        for qa in asked:
            yes = "gt" in qa or (qa == "abnormality" and image == "7")
            records.append({"id": image, number: len(records), "image": f"{image}.jpg" if image == "8" else f"probmed/{image}.jpg", "image_type": kind,
                            "src_dataset": "MedICaT", "qa_type": qa, "question": f"<image>\nIs it {qa}? (please answer yes/no)", "answer": "yes" if yes else "no"})  # fmt: skip
    return records


def probmed_folder(folder, records=None):
    write(folder / "test.json", probmed_records() if records is None else records)
    for name in ("7", "8"):
        paint(folder / "probmed" / f"{name}.jpg")
    return folder


def test_probmed(tmp_path):
    folder = probmed_folder(tmp_path / "probmed")
    assert probmed.DATASET.here(folder) and not slake.DATASET.here(folder) and not vqa_rad.DATASET.here(folder)
    found = list(probmed.DATASET.samples(folder, "test"))
    assert [s.meta["qa_type"] for s in found] == [r["qa_type"] for r in probmed_records()] and len({s.id for s in found}) == 17
    by = {(s.meta["row"], s.meta["qa_type"]): s for s in found}
    groups = {k[1]: s.group for k, s in by.items() if k[0] == "7"}
    assert groups["modality_gt"] == groups["modality_hallu"] != groups["body_part_gt"] == groups["body_part_hallu"]
    assert groups["entity_gt_0"] == groups["entity_hallu_0"] != groups["entity_gt_1"] and groups["grounding_gt_0"] not in (None, groups["entity_gt_0"])
    assert by["7", "abnormality"].group is None and by["8", "entity_hallu"].group is None and by["8", "modality_gt"].group != groups["modality_gt"]
    s = by["7", "grounding_hallu_0"]
    assert s.question == "Is it grounding_hallu_0? (please answer yes/no)" and s.answer == "no" and s.choices == ("yes", "no")
    about = {"modality": "xray", "organ": "chest", "image_type": "X-ray - Chest", "probe_category": "position", "adversarial": True, "split": "test",
             "type": "CLOSED", "category": ["position"], "row": "7", "src_dataset": "MedICaT"}  # fmt: skip
    assert about.items() <= s.meta.items()
    assert by["8", "modality_gt"].meta["modality"] == "ct" and by["8", "modality_gt"].meta["organ"] == "abdomen"
    (image,) = s.images.values()
    assert image.modality == "xray" and image.shape == (1, 6, 8) and image is next(iter(by["7", "modality_gt"].images.values()))  # opened once an image
    assert list(probmed.DATASET.samples(folder, "train")) == []


def test_probmed_with_the_other_name_of_its_number_is_scored_as_probes(tmp_path):
    folder = probmed_folder(tmp_path / "probmed", probmed_records("gpt_idx"))
    samples = probe.prepare(open_data(folder).scored, "test")
    assert len(samples) == 17
    scores = {(s.name, s.slice): s for s in probe.score(samples, [Prediction(s.id, s.answer) for s in samples], "medvlm")}
    assert scores["pair accuracy", "all"].n == 5 + 1 + 2 + 2  # 7: 5 pairs, 1 single; 8: 2 pairs, 2 singles
    assert scores["pair accuracy", "all"].value == 1 and scores["image accuracy", "category=condition"].n == 2 and scores["question accuracy", "image_type=ct-scan_abdomen"].n == 6
    said = [Prediction(s.id, "Yes" if s.answer == "yes" else "No") for s in samples]
    assert probe.score(samples, said, "probmed-original")[0].note  # no position question on abdominal CT: the script has no number, and says so


@pytest.mark.parametrize(
    "change, words",
    [
        ({"qa_type": "nonsense"}, r"record 3: field 'qa_type'"),
        ({"answer": "maybe secret"}, r"record 3: field 'answer'"),
        ({"image": "gone secret.jpg"}, r"record 3: .*field 'image'"),
        ({"image": "../../secret.jpg"}, r"record 3: .*field 'image'"),
        ({"question": None}, r"record 3: field 'question' is NoneType"),
        ({"id": "7", "qa_type": "modality_gt", "i": 0}, r"record 3 has the same id and qa_type and i as test.json record 0"),
    ],
)
def test_broken_records_are_named_and_not_quoted(tmp_path, change, words):
    records = probmed_records()
    records[3] |= change
    if "image" in change:  # the first record of an image says where it is
        records[3]["id"] = "9"
    with pytest.raises(ModelError, match=words) as error:
        list(probmed.DATASET.samples(probmed_folder(tmp_path, records), "test"))
    assert error.value.code == "BAD_DATASET" and "secret" not in str(error.value)


def test_broken_files_are_named(tmp_path):
    folder = probmed_folder(tmp_path)
    for text, words in (('{"a": 1}', "holds dict"), ("[1]", "record 0 is int"), ("[", "not JSON"), ('[{"id": 1}]', "record 0: field 'image' is missing")):
        (folder / "test.json").write_text(text)
        with pytest.raises(ModelError, match=words):
            list(probmed.DATASET.samples(folder, "test"))
    write(folder / "test.json", probmed_records())
    (folder / "probmed" / "7.jpg").write_bytes(b"no picture")
    with pytest.raises(ModelError, match=r"test.json record 0: its picture cannot be read") as error:
        list(probmed.DATASET.samples(folder, "test"))
    assert error.value.code == "BAD_DATASET" and "7.jpg" not in str(error.value)


def rad_record(qid, image, organ, phrase, **more):
    return {
        "qid": qid, "phrase_type": phrase, "qid_linked_id": f"link{int(qid) // 2}", "image_case_url": f"https://medpix.nlm.nih.gov/case?id=case-{image}",
        "image_name": f"{image}.jpg", "image_organ": organ, "evaluation": "not evaluated", "question": f"Question {qid}? ", "question_rephrase": "NULL",
        "question_relation": "strict agreement", "question_frame": "NULL", "question_type": "PRES", "answer": "Yes", "answer_type": "CLOSED", **more,
    }  # fmt: skip


@pytest.mark.parametrize("names", [("VQA_RAD Dataset Public.json", "VQA_RAD Image Folder"), ("VQA_RAD_Dataset_Public.json", "VQA_RAD_Image_Folder")])
def test_vqa_rad(tmp_path, names):
    records = [
        rad_record("0", "synpic1", "HEAD", "freeform"), rad_record("1", "synpic2", "CHEST", "test_freeform", answer=4, answer_type="CLOSED ", question_type="COUNT, POS"),
        rad_record("2", "synpic1", "HEAD", "test_para", qid_linked_id="NULL", question_relation="NULL"), rad_record("3", "synpic3", "ABD", "para", answer="the left lobe", answer_type="OPEN"),
        rad_record("4", "synpic1", "HEAD", "freeform"),
    ]  # fmt: skip
    write(tmp_path / names[0], records)
    for i in (1, 2, 3):
        paint(tmp_path / names[1] / f"synpic{i}.jpg")
    assert vqa_rad.DATASET.here(tmp_path) and not probmed.DATASET.here(tmp_path) and not slake.DATASET.here(tmp_path)
    train, test = (list(vqa_rad.DATASET.samples(tmp_path, s)) for s in ("train", "test"))
    assert [s.id for s in train] == ["0", "4", "3"] and [s.id for s in test] == ["1", "2"] and list(vqa_rad.DATASET.samples(tmp_path, "val")) == []
    assert [s.meta["modality"] for s in train] == ["ct_or_mr", "ct_or_mr", "ct"] and train[0].images is train[1].images
    assert [next(iter(s.images.values())).modality for s in (*train, *test)] == ["unknown", "unknown", "ct", "xray", "unknown"]
    about = {"type": "CLOSED", "category": ["COUNT", "POS"], "organ": "chest", "phrase_type": "freeform", "split": "test", "row": "synpic2",
             "linked_id": "link0", "relation": "strict agreement"}  # fmt: skip
    assert test[0].answer == "4" and about.items() <= test[0].meta.items() and test[0].patient == "case-synpic2" and test[0].group is None
    assert train[2].choices is None and train[0].choices == ("yes", "no") and "linked_id" not in test[1].meta and test[1].meta["phrase_type"] == "para"
    write(tmp_path / names[0], [*records, records[1]])
    with pytest.raises(ModelError, match="record 5 has the same qid as .* record 1"):
        list(vqa_rad.DATASET.samples(tmp_path, "test"))


def slake_record(qid, image, lang="en", **more):
    return {
        "img_id": int(image), "img_name": f"xmlab{image}/source.jpg", "question": "Does the picture contain liver?", "answer": "Yes", "q_lang": lang,
        "location": "Abdomen", "modality": "MRI", "answer_type": "CLOSED", "base_type": "vqa", "content_type": "Organ", "triple": ["vhead", "_", "_"], "qid": qid, **more,
    }  # fmt: skip


def slake_folder(folder):
    chinese = {"lang": "zh", "question": "图中包含肝脏吗？", "answer": "包含"}
    write(folder / "train.json", [slake_record(0, "1"), slake_record(1, "1", **chinese)])
    write(folder / "validate.json", [slake_record(2, "2", modality="X-Ray", location="Chest_lung", answer="Left", answer_type="OPEN")])
    write(folder / "test.json", [slake_record(3, "3", modality="CT")])
    for i in (1, 2, 3):
        paint(folder / "imgs" / f"xmlab{i}" / "source.jpg", (30, 20))
    write(folder / "imgs/xmlab1/detection.json", [{"Liver": [2.0, 3.0, 10.0, 4.0]}, {"Spleen": [20, 5, 6, 7]}])
    return folder


def test_slake(tmp_path):
    folder = slake_folder(tmp_path)
    assert slake.DATASET.here(folder) and not probmed.DATASET.here(folder) and not vqa_rad.DATASET.here(folder)
    train, val, test = (list(slake.DATASET.samples(folder, s)) for s in ("train", "val", "test"))
    assert [s.id for s in (*train, *val, *test)] == ["0", "1", "2", "3"]
    assert [s.meta["lang"] for s in train] == ["en", "zh"] and train[1].answer == "包含" and train[0].choices == ("yes", "no")
    assert {"organ": "abdomen", "type": "CLOSED", "category": ["Organ"], "base_type": "vqa", "triple": ["vhead", "_", "_"], "row": "xmlab1"}.items() <= train[0].meta.items()
    assert [(r.label, r.box) for r in train[0].regions] == [("Liver", ((3.0, 2.0), (7.0, 12.0))), ("Spleen", ((5, 20), (12, 26)))]  # (h, w) corners
    assert all(r.image in train[0].images for r in train[0].regions) and test[0].regions == ()
    assert [next(iter(s.images.values())).modality for s in (train[0], val[0], test[0])] == ["mr", "xray", "ct"] and val[0].meta["organ"] == "chest lung"
    data = open_data(folder)
    assert [s.id for s in data.scored("test")] == ["3"] and data.tasks == ("vqa",)
    (folder / "validate.json").unlink()
    assert list(slake.DATASET.samples(folder, "val")) == []


@pytest.mark.parametrize("boxes", [{"Liver": [1, 2, 3, 4]}, [{"Liver": [1, 2, 3]}], [{"Liver": [1, 2, -3, 4]}], [{"Liver": ["1", 2, 3, 4]}], 5])
def test_broken_boxes_are_refused(tmp_path, boxes):
    folder = slake_folder(tmp_path)
    write(folder / "imgs/xmlab1/detection.json", boxes)
    with pytest.raises(ModelError, match=r"train.json record 0: .*detection.json") as error:
        list(slake.DATASET.samples(folder, "train"))
    assert error.value.code == "BAD_DATASET"


def test_a_folder_of_published_sets_is_found_by_name(tmp_path):
    probmed_folder(tmp_path / "one")
    slake_folder(tmp_path / "slake")
    both = open_data(tmp_path)
    assert sorted(both.folders) == ["probmed", "slake"]
    assert {s.id.split("/")[0] for s in both.samples("test")} == {"probmed", "slake"}
    assert list(open_data(tmp_path, "slake").folders) == ["slake"]
