"""The model in the box, on the examples: what a newcomer sees first must be what the examples promise."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import medvlm
from medvlm.predictors import BUNDLED
from medvlm.reading import analyze

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def model():
    return medvlm.load()


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check", EXAMPLES / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_reading_is_the_expected_one(model, check, tmp_path):
    analyze(medvlm.read(EXAMPLES / "chest-xray"), model, tmp_path / "out")
    assert check.differences(tmp_path / "out", EXAMPLES / "expected" / "chest-xray") == []
    assert (tmp_path / "out" / "preview.png").stat().st_size > 50_000


def test_the_check_notices_a_changed_finding_and_a_moved_mask(check, tmp_path):
    import shutil

    from PIL import Image

    expected = EXAMPLES / "expected" / "chest-xray"
    shutil.copytree(expected, tmp_path / "out")
    record = json.loads((expected / "report.json").read_text())
    record["findings"][0]["probability"] = (record["findings"][0]["probability"] + 0.5) % 1
    (tmp_path / "out" / "report.json").write_text(json.dumps(record))
    mask = next((tmp_path / "out" / "masks").glob("*lung.png"))
    Image.fromarray(np.roll(np.asarray(Image.open(mask)), 20, axis=1)).save(mask)
    found = " ".join(check.differences(tmp_path / "out", expected))
    assert record["findings"][0]["label"] in found and mask.name in found


def test_left_is_left(model):
    study = medvlm.read(EXAMPLES / "chest-xray")
    right, left = (model.segment(study, f"{side} lung").mask for side in ("right", "left"))
    middle = study.images[0].shape[2] / 2
    assert right.any() and left.any()
    # on a frontal film the patient's right is on the viewer's left
    assert np.nonzero(right)[1].mean() < middle < np.nonzero(left)[1].mean()
    assert (right & left).sum() < 0.1 * min(right.sum(), left.sum())


@pytest.mark.parametrize("folder", ["ct-dicom", "fundus", "pathology"])
def test_other_kinds_of_picture_are_read_as_expected(model, check, folder, tmp_path):
    record = analyze(medvlm.read(EXAMPLES / folder), model, tmp_path / "out")
    assert check.differences(tmp_path / "out", EXAMPLES / "expected" / folder) == []
    assert record["sentences"] and not record["out_of_scope"]


def test_what_it_has_not_learned_it_says_and_answers_nothing(model, tmp_path):
    study = medvlm.read(EXAMPLES / "pathology", modality="ultrasound")
    record = analyze(study, model, tmp_path / "out")
    assert "ultrasound" in record["out_of_scope"] and record["findings"] == [] and record["sentences"] == []
    with pytest.raises(medvlm.MedVLMError) as error:
        model.ask(study, "Is there a gallstone?")
    assert error.value.code == "OUT_OF_SCOPE"


@pytest.mark.parametrize("folder, target", [("fundus", "left lung"), ("pathology", "liver"), ("ct-dicom", "nuclei"), ("chest-xray", "right kidney")])
def test_what_no_such_picture_shows_is_not_drawn(model, folder, target):
    found = model.segment(medvlm.read(EXAMPLES / folder), target)
    assert found.present < 0.5 and not found.mask.any()


def test_one_question_alone_and_among_others(model):
    study = medvlm.read(EXAMPLES / "chest-xray")
    alone = model.ask(study, "Is there consolidation?").probability
    model.ask(study, "What kind of image is this?")
    assert model.ask(study, "Is there consolidation?").probability == pytest.approx(alone, abs=1e-6)


def test_size_and_licence():
    folder = BUNDLED / "medvlm-tiny"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 40e6
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
    assert "CC-BY-NC-SA-4.0" in (BUNDLED / "LICENSE").read_text()
    assert "cc-by-nc-sa-4.0" in (folder / "README.md").read_text()
