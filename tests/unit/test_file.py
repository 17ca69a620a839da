"""Saved predictions: written and read back the same, in the place of a model, and what is said of a line that is wrong."""

import json
import math
import subprocess
import sys
import zipfile

import nibabel
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from medvlm.datasets.predictions import read_predictions, rows, save_predictions
from medvlm.errors import ModelError
from medvlm.imaging.export import save_mask_nifti, save_mask_png
from medvlm.imaging.scan import Volume
from medvlm.predictors import load
from medvlm.sample import Mask, Prediction, Region, Sample

PICTURE = tiny.picture("xray-1", (9, 12))
SCAN = Volume("ct-1", np.zeros((1, 3, 4, 5), np.int16), [[0, 0, 1, 7], [0, 2, 0, 8], [3, 0, 0, 9], [0, 0, 0, 1]], "ct", "HU")
SAMPLE = Sample("a", images={"xray-1": PICTURE, "ct-1": SCAN})


def drawn(shape, seed=0):
    return np.random.default_rng(seed).random(shape) > 0.5


def same(a: Prediction, b: Prediction):
    assert (a.id, a.text, a.probability, a.choices, a.seconds, a.error) == (b.id, b.text, b.probability, b.choices, b.seconds, b.error)
    assert [(m.image, m.label) for m in a.masks] == [(m.image, m.label) for m in b.masks] and all((m.array == n.array).all() and n.array.dtype == bool for m, n in zip(a.masks, b.masks))
    assert [(r.image, r.label, r.box, r.probability) for r in a.regions] == [(r.image, r.label, r.box, r.probability) for r in b.regions]
    assert all((r.mask is None) == (q.mask is None) and (r.mask is None or (r.mask == q.mask).all()) for r, q in zip(a.regions, b.regions))


def test_what_is_saved_is_read_back_as_it_was(tmp_path):
    outline = drawn((9, 12))
    whole = Prediction("a", "Größe\n\"1\"", 0.1 + 0.2, {"yes": 1 / 3, "no": 2 / 3}, (Region("xray-1", "nodule", ((1.25, 2.0), (3.5, 4.0)), outline, 1 / 7), Region("ct-1", "mass")),
                       (Mask("xray-1", "lung", outline), Mask("ct-1", "liver", drawn((3, 4, 5)).transpose(0, 2, 1).transpose(0, 2, 1)), Mask("ct-1", "spleen", np.zeros((3, 4, 5), bool))), 1.5)  # fmt: skip
    said = [whole, Prediction("b"), Prediction("c", error="OUT_OF_SCOPE: no")]
    path = save_predictions(tmp_path / "predictions.jsonl", iter(said))
    samples = [Sample("c"), SAMPLE, Sample("d"), Sample("b")]
    for found in (read_predictions(path, samples), load(f"file:{path}").predict(samples), load(f"file:{tmp_path}").predict(samples)):
        for p, q in zip((said[2], said[0], said[1]), (found[0], found[1], found[3])):
            same(p, q)
        assert found[2].id == "d" and found[2].error.startswith("MISSING: ")
    assert len(list((tmp_path / "predictions-masks").iterdir())) == 3  # the outline is stored once
    saved = path.read_bytes()
    assert save_predictions(path, said).read_bytes() == saved
    with pytest.raises(ModelError, match="two predictions have the id 'b'"):
        save_predictions(path, [said[1], said[1]])
    assert path.read_bytes() == saved  # whole or not at all


@settings(max_examples=30, deadline=None)
@given(st.text(), st.floats(0, 1), st.dictionaries(st.text(max_size=4), st.floats(0, 1), max_size=3))
def test_any_words_and_chances_survive(tmp_path_factory, text, chance, choices):
    path = save_predictions(tmp_path_factory.mktemp("p") / "p.jsonl", [Prediction("a", text, chance, choices)])
    same(Prediction("a", text, chance, choices), read_predictions(path, [Sample("a")])[0])


def test_nan_is_null(tmp_path):
    path = save_predictions(tmp_path / "p.jsonl", [Prediction("a", "x", math.nan, {"yes": math.nan})])
    assert json.loads(path.read_text())["probability"] is None
    (found,) = read_predictions(path, [Sample("a")])
    assert found.probability is None and math.isnan(found.choices["yes"])


def test_masks_of_other_programs_are_read_on_the_images_grid(tmp_path):
    flat, deep = drawn((9, 12)), drawn((3, 4, 5))
    save_mask_png(flat, tmp_path / "flat.png")
    save_mask_nifti(SCAN, deep, tmp_path / "deep.nii.gz")
    image = nibabel.load(tmp_path / "deep.nii.gz")
    turned = image.as_reoriented(nibabel.orientations.axcodes2ornt(("P", "S", "L")))  # the same voxels along other axes
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    names = (("xray-1", "flat.png"), ("ct-1", "deep.nii.gz"), ("ct-1", "turned.nii.gz"))
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", "masks": [{"image": i, "label": "x", "mask": n} for i, n in names]}))
    (found,) = read_predictions(tmp_path / "p.jsonl", [SAMPLE])
    assert found.error is None
    for mask, expected in zip(found.masks, (flat, deep, deep)):
        assert (mask.array == expected).all()


def test_a_mask_that_cannot_be_read_is_an_error_of_its_row(tmp_path):
    save_mask_png(drawn((9, 12)), tmp_path.parent / "outside.png")
    np.savez(tmp_path / "small.npz", mask=drawn((8, 12)))
    np.savez(tmp_path / "kind.npz", mask=np.ones((9, 12)))
    np.savez(tmp_path / "name.npz", other=drawn((9, 12)))
    np.savez(tmp_path / "code.npz", mask=np.array([[{}]], object))
    (tmp_path / "text.npz").write_text("no")
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, archive.open("mask.npy", "w") as raw:
        np.lib.format.write_array_header_1_0(raw, {"descr": "|b1", "fortran_order": False, "shape": (9, 12)})
    with zipfile.ZipFile(tmp_path / "vast.npz", "w") as archive, archive.open("mask.npy", "w") as raw:
        np.lib.format.write_array_header_1_0(raw, {"descr": "|b1", "fortran_order": False, "shape": (1 << 40, 1 << 20)})
    save_mask_png(drawn((9, 11)), tmp_path / "narrow.png")
    cases = {
        "small.npz": "GRID_MISMATCH", "kind.npz": "GRID_MISMATCH", "name.npz": "BAD_PREDICTIONS", "code.npz": "GRID_MISMATCH", "text.npz": "BAD_PREDICTIONS",
        "short.npz": "BAD_PREDICTIONS", "vast.npz": "GRID_MISMATCH", "narrow.png": "GRID_MISMATCH", "none.npz": "BAD_PREDICTIONS", "../outside.png": "BAD_PREDICTIONS",
        "/etc/passwd": "BAD_PREDICTIONS", "a\0b.npz": "BAD_PREDICTIONS",
    }  # fmt: skip
    lines = [{"id": name, "text": "kept", "masks": [{"image": "xray-1", "label": "x", "mask": name}]} for name in cases]
    lines.append({"id": "stranger", "masks": [{"image": "mr-9", "label": "x", "mask": "narrow.png"}]})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_predictions(tmp_path / "p.jsonl", [Sample(line["id"], images=SAMPLE.images) for line in lines])
    for k, (p, code) in enumerate(zip(found, [*cases.values(), "BAD_PREDICTIONS"]), 1):
        assert p.error.startswith(f"{code}: predictions line {k}, mask of 'x'") and p.masks == (), p


@pytest.mark.parametrize(("line", "said"), [
    ("{", "not JSON"), ("[]", "expected an object, got list"), ("{}", "'id' must be"), ('{"id": 3}', "'id' must be"), ('{"id": "b", "text": 1}', "'text' must be a string"),
    ('{"id": "b", "probability": 1.5}', "'probability' must be a number from 0 to 1"), ('{"id": "b", "probability": NaN}', "'probability'"),
    ('{"id": "b", "probability": true}', "'probability'"), ('{"id": "b", "choices": ["yes"]}', "'choices' must be an object"), ('{"id": "b", "choices": {"yes": "1"}}', "choice 'yes'"),
    ('{"id": "b", "masks": [{"image": "a", "label": "x"}]}', "masks[0] needs the path"), ('{"id": "b", "masks": ["x"]}', "masks[0] needs an image"),
    ('{"id": "b", "regions": [{"image": "a", "label": "x", "lower": [1, 2], "upper": [3]}]}', "regions[0] needs lower and upper"),
    ('{"id": "b", "regions": [{"image": "a", "label": "x", "lower": [1, Infinity], "upper": [3, 4]}]}', "regions[0] needs lower"),
    ('{"id": "b", "regions": [{"image": "a", "label": "x", "probability": -1}]}', "regions[0]: probability"), ('{"id": "b", "seconds": -1}', "'seconds'"),
    ('{"id": "a"}', "id 'a' was used on line 1"), ("[" * 100_000, "not JSON"),
])  # fmt: skip
def test_a_line_that_is_wrong_is_named_by_its_number(tmp_path, line, said):
    (tmp_path / "p.jsonl").write_text(f'{{"id": "a"}}\n\n{line}\n')
    with pytest.raises(ModelError) as e:
        rows(tmp_path / "p.jsonl")
    assert e.value.code == "BAD_PREDICTIONS" and e.value.message.startswith("p.jsonl line 3: ") and said in e.value.message


def test_a_file_that_is_none_and_verbs_that_were_not_saved(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe4"}')
    for name, said in (("nowhere.jsonl", "does not exist"), ("latin.jsonl", "not UTF-8")):
        with pytest.raises(ModelError, match=said):
            load(f"file:{tmp_path / name}")
    model = load(f"file:{save_predictions(tmp_path / 'p.jsonl', [Prediction('a', 'yes')])}")
    assert model.name == "p.jsonl" and len(model.sha256) == 64
    with pytest.raises(ModelError) as e:
        model.ask(PICTURE, "Is it?")
    assert e.value.code == "UNSUPPORTED_VERB"


def test_reading_and_writing_load_no_torch():
    done = subprocess.run([sys.executable, "-c", "import medvlm.datasets.predictions, sys; print('torch' in sys.modules)"], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
