"""The verbs of our own models: closed questions, named targets, prompts, scope, and rows that are never lost."""

import json
import time

import numpy as np
import pytest
import test_study as studies
import tiny
import torch

from medvlm import cli
from medvlm.errors import MedVLMError
from medvlm.imaging.scan import Image, Study, Volume
from medvlm.predictors import load
from medvlm.predictors.base import Model, check_question, pick
from medvlm.predictors.native import NativeModel, _parts, _turns, cardiothoracic_ratio, choices_of
from medvlm.preprocess import Frame, inputs, tiles
from medvlm.sample import Mask, Prediction, Sample, Segmentation, Turn, box_of
from medvlm.vlm import MedVLM


@pytest.mark.parametrize(
    ("question", "choices"),
    [
        ("Is there a pneumothorax?", ("yes", "no")),
        ("is the heart enlarged", ("yes", "no")),
        ("Do you see cardiomegaly?", ("yes", "no")),
        ("Any evidence of epidural or subdural hematoma?", ("yes", "no")),
        ("Is there a mass or a nodule?", ("yes", "no")),
        ("Are there signs of edema or effusion?", ("yes", "no")),
        ("Is pneumonia or effusion present?", ("yes", "no")),
        ("Is a pneumonia or pleural effusion seen in this image?", ("yes", "no")),
        ("Does this image use contrast or not?", ("yes", "no")),
        ("Is this a PA or AP film?", ("PA", "AP")),
        ("Is this an AP or a PA film?", ("AP", "PA")),
        ("Was this image taken in the AP or PA plane?", ("AP", "PA")),
        ("Is the lesion on the left or right?", ("left", "right")),
        ("Is it on the left side or the right side?", ("left", "right")),
        ("Is the largest air collection on the patient's left or the right side?", ("left", "right")),
        ("Is this image normal or abnormal?", ("normal", "abnormal")),
        ("Is this patient male or female?", ("male", "female")),
        ("Is this a CT or an MRI?", ("CT", "MRI")),
        ("Is this a T1 weighted, T2 weighted, or FLAIR image?", None),
        ("Do you suspect a physical injury or a medical process?", None),
        ("Which side, left or right?", None),
        ("What is abnormal?", None),
        ("Island or isthmus?", None),
        ("", None),
    ],
)
def test_what_a_question_lets_one_answer(question, choices):
    assert choices_of(question) == choices


def outline(array, label="x", present=0.9):
    return Segmentation(Image("a", np.zeros((1, *array.shape), np.uint8)), label, array, present)


def box(top, left, bottom, right, size=(20, 40)):
    array = np.zeros(size, bool)
    array[top:bottom, left:right] = True
    return array


def test_the_cardiothoracic_ratio_by_hand():
    heart = box(4, 18, 8, 22) | box(8, 14, 16, 28)  # mediastinum 4 wide above, heart 14 wide below
    parts = {"heart and mediastinum": outline(heart), "right lung": outline(box(2, 5, 18, 16)), "left lung": outline(box(2, 24, 18, 35))}
    assert cardiothoracic_ratio(parts) == pytest.approx(14 / 30)
    for name in parts:
        assert cardiothoracic_ratio({k: v for k, v in parts.items() if k != name}) is None
        assert cardiothoracic_ratio(parts | {name: outline(np.zeros((20, 40), bool))}) is None


def test_connected_parts_come_largest_first_without_specks():
    mask = box(0, 0, 10, 10) | box(12, 0, 20, 10) | box(0, 30, 1, 31)
    assert [int(p.sum()) for p in _parts(mask)] == [100, 80] and _parts(np.zeros((3, 3), bool)) == []
    specks = np.zeros((20, 20), bool)
    specks[::2, ::2] = True  # 100 of them, each a hundredth of the whole
    assert [int(p.sum()) for p in _parts(specks)] == [1]


def refused(call) -> MedVLMError:
    with pytest.raises(MedVLMError) as e:
        call()
    return e.value


def test_an_unknown_target_lists_the_known(reader):
    error = refused(lambda: reader.segment(tiny.picture(), "spleen" * 50))
    assert error.code == "UNKNOWN_TARGET" and all(t in error.message for t in (*tiny.TARGETS, "lungs")) and len(error.message) < 400
    error = refused(lambda: reader.classify(tiny.picture(), ["pneumonia", "gout" * 100]))
    assert error.code == "UNKNOWN_TARGET" and all(f in error.message for f in tiny.FINDINGS) and len(error.message) < 400 and "modality:" not in error.message
    assert refused(lambda: reader.segment(tiny.picture())).code == "BAD_ARGUMENT"


@pytest.mark.parametrize(("name", "label"), [("right lung", "right lung"), (" Left  LUNG ", "left lung"), ("right_lung", "right lung"), ("heart", "heart and mediastinum"),
                                             ("cardiomediastinum", "heart and mediastinum"), ("Lungs", "lungs"), ("both lungs", "both lungs")])  # fmt: skip
def test_targets_go_by_their_usual_names(reader, name, label):
    found = reader.segment(tiny.picture(size=(33, 47)), name)
    assert found.label == label and found.mask.shape == (33, 47) and found.mask.dtype == bool and 0 <= found.present <= 1


def test_the_lungs_are_both_lungs(reader, monkeypatch):
    parts = {"right lung": box(2, 5, 18, 16), "left lung": box(2, 24, 18, 35)}
    monkeypatch.setattr(reader, "_outline", lambda picture, targets: [outline(parts[t], t, {"right lung": 0.6, "left lung": 0.9}[t]) for t in targets])
    monkeypatch.setattr(reader, "scope", lambda image: None)
    found = reader.segment(tiny.picture(size=(20, 40)), "lungs")
    assert np.array_equal(found.mask, parts["right lung"] | parts["left lung"]) and found.present == 0.9
    regions = reader.ground(tiny.picture(size=(20, 40)), "lungs")
    assert sorted(r.box for r in regions) == [((2, 5), (18, 16)), ((2, 24), (18, 35))]


def test_what_is_absent_has_an_empty_mask(tiny_folder):
    reader = load(tiny_folder, "cpu")
    assert reader.segment(tiny.picture(), "consolidation").present > 1e-3
    reader.vlm.heads["mask"].shift.fill_(-50)
    found = reader.segment(tiny.picture(), "consolidation")
    assert not found.mask.any() and found.present < 1e-6 and found.region.box is None and reader.ground(tiny.picture(), "consolidation") == []


def test_one_question_alone_among_others_and_again(reader):
    picture, questions = tiny.picture(), ["What is this?", "Where is the consolidation, and how large is it?"]
    together = reader._write({picture.id: picture}, [_turns(q) for q in questions])
    for i, question in enumerate(questions):
        (text,), (chance,) = reader._write({picture.id: picture}, [_turns(question)])
        assert text == together[0][i] and chance == pytest.approx(together[1][i], abs=1e-5)
    other = tiny.picture(seed=5)
    first, _, again = reader.choose(picture, "Is it?", ("yes", "no")), reader.choose(other, "Is it?", ("yes", "no")), reader.choose(picture, "Is it?", ("yes", "no"))
    assert first == again and sum(first.values()) == pytest.approx(1)


def test_closed_questions_are_answered_with_a_choice(reader):
    answer = reader.ask(tiny.picture(), "Is this a PA or AP film?")
    assert answer.text in ("PA", "AP") and answer.choices.keys() == {"PA", "AP"} and sum(answer.choices.values()) == pytest.approx(1)
    assert answer.probability == max(answer.choices.values())
    open_ = reader.ask(tiny.picture(), "What is this?")
    assert open_.choices is None and 0 <= open_.probability <= 1


def test_calibrated_answers_follow_their_calibration(tiny_folder):
    reader = load(tiny_folder, "cpu")
    before = reader.choose(tiny.picture(), "Is it?", ("yes", "no"))["yes"]
    reader.vlm.config.about = {**reader.vlm.config.about, "calibration": {"yes_no": [2.0, 0.5]}}
    after = reader.choose(tiny.picture(), "Is it?", ("yes", "no"))["yes"]
    assert np.log(after / (1 - after)) == pytest.approx(2 * np.log(before / (1 - before)) + 0.5, abs=1e-3)


def test_the_order_and_the_case_of_yes_and_no_change_nothing(tiny_folder):
    reader = load(tiny_folder, "cpu")
    reader.vlm.config.about = {**reader.vlm.config.about, "calibration": {"yes_no": [2.0, 0.5]}}
    one, other = reader.choose(tiny.picture(), "Is it?", ("yes", "no")), reader.choose(tiny.picture(), "Is it?", ("no", "yes"))
    assert one == {k: pytest.approx(v, abs=1e-6) for k, v in other.items()}
    assert set(reader.choose(tiny.picture(), "Is it?", ("No", "Yes"))) == {"Yes", "No"}


def test_a_marked_question_is_the_plain_one(reader):
    picture = tiny.picture()
    plain, marked = (Sample(str(k), images={picture.id: picture}, turns=(Turn("user", q),)) for k, q in enumerate(("Is there a spot?", f"<|image:{picture.id}|>Is there a spot?")))
    a, b = reader.predict([plain, marked])
    assert a.choices and b.choices and a.choices["yes"] == pytest.approx(b.choices["yes"], abs=1e-4)


def test_without_an_image_nothing_is_answered(reader):
    with pytest.raises(MedVLMError) as error:
        reader.ask([], "Is there consolidation?")
    assert error.value.code == "BAD_ARGUMENT"


def test_what_a_model_has_no_head_for_is_a_named_error(reader, monkeypatch):
    monkeypatch.setattr(reader, "targets", ("liver",))
    with pytest.raises(MedVLMError) as error:
        reader.segment(tiny.picture(), "lungs")
    assert error.value.code == "UNKNOWN_TARGET" and reader._mentioned({"xray-1": tiny.picture()}, "Describe the lungs.") == ()
    monkeypatch.setattr(reader.vlm, "head", lambda kind, name: None)
    with pytest.raises(MedVLMError) as error:
        reader.classify(tiny.picture(), ["pneumonia"])
    assert error.value.code == "UNSUPPORTED_VERB"


def test_a_question_of_a_book_is_refused_before_any_work(reader, monkeypatch):
    monkeypatch.setattr(NativeModel, "_look", lambda *_: pytest.fail("it looked"))
    began = time.perf_counter()
    error = refused(lambda: reader.ask(tiny.picture(), "Is there an effusion? " * 5000))
    assert error.code == "QUESTION_TOO_LONG" and "100" not in error.message[:4] and len(str(error)) < 300 and time.perf_counter() - began < 0.5
    assert refused(lambda: check_question("  \n ")).code == "BAD_ARGUMENT" and check_question(" a ") == "a"


def test_a_question_longer_than_the_model_reads_is_refused(reader):
    assert refused(lambda: reader.ask(tiny.picture(), "ß" * 1500)).code == "QUESTION_TOO_LONG"


@pytest.mark.parametrize("points", [(-1, 5), (5, 90), (70, 5), (float("nan"), 1), [(1, 2), (1, 999)], (1, 2, 3, 4), [], "here", [(1, 2), (3,)], [(1, 2, 7)]])
def test_points_outside_the_image_are_refused(reader, points):
    error = refused(lambda: reader.segment(tiny.picture(size=(70, 90)), points=points))
    assert error.code == "BAD_ARGUMENT" and len(error.message) < 300


@pytest.mark.parametrize("given", [((0, 0), (71, 90)), ((-1, 0), (5, 5)), ((5, 5), (5, 9)), ((9, 9), (5, 5)), (1, 2, 3), ((0, 0), (1, float("inf"))), [((0, 0), (5, 5))] * 2, "box"])
def test_boxes_outside_the_image_are_refused(reader, given):
    error = refused(lambda: reader.segment(tiny.picture(size=(70, 90)), boxes=given))
    assert error.code == "BAD_ARGUMENT" and len(error.message) < 300


def test_points_and_boxes_inside_are_drawn(reader):
    picture = tiny.picture(size=(70, 90))
    for given in ({"points": (69, 89)}, {"points": [(5, 5, 1), (60, 80, 0)]}, {"boxes": ((0, 0), (70, 90))}, {"points": (5, 5), "boxes": [((1, 2), (30, 40))]}):
        assert reader.segment(picture, **given).mask.shape == (70, 90)


def test_a_prompt_lands_where_it_was_set(reader, monkeypatch):
    """On a picture twice as wide as tall, (h, w) of the image becomes pixel centres of the padded input."""
    seen = []
    real = reader.vlm.heads["mask"].decode
    monkeypatch.setattr(reader.vlm.heads["mask"], "decode", lambda embedding, prompts: seen.append(prompts) or real(embedding, prompts))
    for given in ({"points": [(0, 0), (49, 99)]}, {"boxes": ((0, 0), (50, 100))}):
        reader.segment(tiny.picture(size=(50, 100)), **given)
    scale = 64 / 100
    np.testing.assert_allclose(seen[0].points[0].numpy(), [[16 + scale / 2 - 0.5, scale / 2 - 0.5], [16 + 49.5 * scale - 0.5, 99.5 * scale - 0.5]], rtol=1e-6)
    np.testing.assert_allclose(seen[1].boxes[0].numpy(), [[16, 0], [48, 64]], rtol=1e-6)


def volume(modality="ct"):
    return Volume(f"{modality}-1", np.zeros((1, 3, 64, 64)), np.eye(4), modality, "raw")


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (volume(), "ct volumes"),
        (volume("xray"), "volumes"),
        (tiny.picture(modality="mr"), "mr images"),
        (tiny.picture(modality="fundus"), "fundus images"),
        (tiny.picture(body_part="KNEE"), "another body part"),
        (tiny.picture(body_part="hand"), "another body part"),
        (tiny.picture(view="LL"), "lateral"),
        (tiny.picture(view="left lateral"), "lateral"),
    ],
)
def test_what_the_model_was_not_made_for_is_refused(reader, image, says):
    reason = reader.scope(image)
    assert says in reason and "tiny-test" in reason
    for verb in (lambda: reader.ask(image, "Is it?"), lambda: reader.segment(image, "left lung"), lambda: reader.classify(image, ["pneumonia"]), lambda: reader.ground(image, "left lung")):
        assert refused(verb).code == "OUT_OF_SCOPE"
    report = reader.report(image)
    assert report.out_of_scope == reason and not report.sentences and not report.looked_for and "No reading" in str(report)


def test_what_it_was_made_for_is_read(reader):
    for info in ({}, {"body_part": "CHEST"}, {"view": "PA"}, {"body_part": "Thorax", "view": "AP"}):
        assert reader.scope(tiny.picture(**info)) is None
    assert reader.scope(tiny.picture(modality="unknown")) is None  # a picture without a header, recognised by its looks


def test_looks_decide_where_the_header_does_not(tiny_folder):
    reader = load(tiny_folder, "cpu")
    with torch.no_grad():
        bias = reader.vlm.heads["classify"].bias
        names = reader.vlm.heads["classify"].labels
        bias[names.index("modality:ct")] += 10  # about as likely as an X-ray, or a little more
    assert "looks like a CT slice" in reader.scope(tiny.picture(modality="unknown"))
    assert reader.scope(tiny.picture(modality="xray")) is None or "looks like" in reader.scope(tiny.picture(modality="xray"))
    with torch.no_grad():
        bias[names.index("modality:ct")] += 20
    assert "looks like a CT slice" in reader.scope(tiny.picture(seed=9, modality="xray"))


def test_a_report_says_what_its_numbers_say(reader):
    report = reader.report(tiny.picture())
    assert [f.label for f in report.looked_for] == list(tiny.FINDINGS) and report.out_of_scope is None
    assert sorted(k for s in report.sentences for k in s.findings) == list(range(len(tiny.FINDINGS)))
    for s in report.sentences:
        (k,) = s.findings
        finding = report.looked_for[k]
        assert finding.label.lower() in s.text.lower() and s.section == ("impression" if finding.label == "pneumonia" else "findings")
        assert finding.present == (finding.probability >= 0.5)
        assert s.text.startswith("No ") or s.text.startswith("There is no") if finding.probability < 0.35 else "No" not in s.text.split()
        for r in s.regions:
            assert r.box == box_of(r.mask) and r.mask.shape == (70, 90)
    assert report.findings and report.impression and str(report).endswith("diagnosis.")


def test_a_study_of_several_images_asks_which(reader):
    two = Study("s", images=[tiny.picture("xray-1"), tiny.picture("xray-2", seed=1)])
    error = refused(lambda: reader.ask(two, "Is it?"))
    assert error.code == "MANY_IMAGES" and "xray-1" in error.message and "xray-2" in error.message
    assert reader.ask(two, "Is it?", image="xray-2").choices == reader.ask(two.images[1], "Is it?").choices
    assert refused(lambda: reader.ask(two, "Is it?", image="xray-3")).code == "NO_SUCH_IMAGE"
    mixed = Study("s", images=[tiny.picture("xray-1"), volume()])
    assert pick(mixed, None, reader.reads).id == "xray-1" and pick([mixed], None, reader.reads).id == "xray-1"
    assert refused(lambda: pick([mixed, mixed])).code == "UNSUPPORTED_VERB"


def samples():
    ask = (Turn("user", "Is it?"), Turn("assistant", "yes"))
    picture = tiny.picture()
    there = {picture.id: picture}
    return [
        Sample("good", images=there, turns=ask),
        Sample("volume", images={"ct-1": volume()}, turns=ask),
        Sample("none", turns=ask),
        Sample("mask", images=there, masks=(Mask(picture.id, "left_lung", np.zeros((70, 90), bool)), Mask(picture.id, "right_lung", np.zeros((70, 90), bool)))),
        Sample("spleen", images=there, masks=(Mask(picture.id, "spleen", np.zeros((70, 90), bool)),)),
        Sample("empty", images=there, turns=(Turn("user", " "),)),
        Sample("bad", images={"x": "no image"}, turns=ask),
        Sample("last", images=there, turns=ask),
    ]


def test_a_failure_is_a_row_and_never_a_missing_one(reader):
    found = reader.predict(samples())
    assert [p.id for p in found] == [s.id for s in samples()] and all(isinstance(p, Prediction) and p.seconds > 0 for p in found)
    errors = {p.id: (p.error or "").split(":")[0] for p in found}
    assert errors == {"good": "", "volume": "OUT_OF_SCOPE", "none": "", "mask": "", "spleen": "UNKNOWN_TARGET", "empty": "BAD_ARGUMENT", "bad": "INTERNAL", "last": ""}
    good, mask = found[0], found[3]
    assert good.text in ("yes", "no") and good.probability == max(good.choices.values()) and found[-1].text == good.text
    assert [m.array.shape for m in mask.masks] == [(70, 90)] * 2 and mask.masks[0].image == "xray-1"
    assert all(p.text == "" and p.probability is None for p in found if p.error)


def test_a_foreign_error_does_not_quote_the_patient():
    class Broken(Model):
        name = "broken"

        def ask(self, study, question, image=None):
            raise RuntimeError("Doe^Jane")

    (found,) = Broken().predict([samples()[0]])
    assert found.error == "INTERNAL: RuntimeError"
    error = refused(lambda: Broken().report(None))
    assert error.code == "UNSUPPORTED_VERB" and "broken cannot report; it can ask" in error.message


@pytest.fixture
def film(tmp_path):
    return studies.picture(tmp_path / "in" / "film.png")


def command(capsys, *argv):
    status = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def use(reader, monkeypatch):
    monkeypatch.setattr("medvlm.predictors.load", lambda *_: reader)


def test_the_commands_answer(use, film, tmp_path, capsys):
    status, out, err = command(capsys, "ask", film, "Is it?", "What is this?", "--modality", "xray", "--json")
    lines = [json.loads(x) for x in out.splitlines()]
    assert status == 0 and err == "" and [x["question"] for x in lines] == ["Is it?", "What is this?"]
    assert all(list(x) == ["question", "text", "probability", "choices", "regions"] for x in lines) and lines[1]["choices"] is None
    status, out, _ = command(capsys, "segment", film, "lungs", "right lung", "--modality", "xray", "--out", tmp_path / "masks", "--json")
    assert status == 0 and [json.loads(x)["label"] for x in out.splitlines()] == ["lungs", "right lung"]
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["lungs.png", "right-lung.png"]
    status, out, _ = command(capsys, "classify", film, "pneumonia", "--modality", "xray", "--json")
    assert status == 0 and 0 <= json.loads(out)["pneumonia"] <= 1
    status, out, _ = command(capsys, "report", film, "--modality", "xray", "--json")
    assert status == 0 and json.loads(out)["sentences"] and "Research use" in json.loads(out)["notice"]


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["ask", "FILM", "x" * 100_000, "--modality", "xray"], "QUESTION_TOO_LONG"),
        (["ask", "FILM", " ", "--modality", "xray"], "BAD_ARGUMENT"),
        (["ask", "FILM", "Is it?", "--modality", "ct"], "OUT_OF_SCOPE"),
        (["ask", "FILM", "Is it?", "--modality", "xray", "--image", "no"], "NO_SUCH_IMAGE"),
        (["ask", "nowhere.png", "Is it?"], "NOT_FOUND"),
        (["segment", "FILM", "spleen", "--modality", "xray", "--out", "OUT"], "UNKNOWN_TARGET"),
        (["classify", "FILM", "gout", "--modality", "xray"], "UNKNOWN_TARGET"),
        (["segment", "FILM", "left lung", "--modality", "xray", "--out", "OUT.jpg"], "BAD_ARGUMENT"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_2(use, film, tmp_path, capsys, argv, code):
    status, out, err = command(capsys, *[{"FILM": film, "OUT": tmp_path / "out", "OUT.jpg": tmp_path / "out.jpg"}.get(a, a) for a in argv])
    assert (status, out) == (2, "") and f"[{code}]" in err and err.count("\n") == 1 and err.startswith("medvlm: ")


def test_a_model_that_is_not_there_lists_what_there_is(film, tmp_path, capsys):
    for name in ("medvlm-huge", str(tmp_path), ""):
        status, out, err = command(capsys, "ask", film, "Is it?", "--model", name)
        assert (status, out) == (2, "") and "[NO_SUCH_PART]" in err and "bundled" in err


def test_windows_zoom_in_on_what_is_thin(tiny_folder, monkeypatch):
    """Twice as fine: every window is decoded with the words of the whole picture and joined; presence stays that of the whole."""
    monkeypatch.setattr(Frame, "masks", lambda self, maps, cut=Frame.masks: cut(self, maps - maps.median()))  # random weights draw all or nothing
    model = load(tiny_folder, "cpu")
    model.vlm.heads["mask"].presence[-1].bias.data += 20
    plain = model.segment(tiny.picture(size=(64, 80)), "left lung")
    model.vlm.config.about = {**model.vlm.config.about, "zoom": {"xray": 1.0}}
    assert np.array_equal(model.segment(tiny.picture(size=(64, 80)), "left lung").mask, plain.mask)
    model.vlm.config.about = {**model.vlm.config.about, "zoom": {"xray": 2.0}}
    picture = tiny.picture(size=(64, 80))
    looked = []
    monkeypatch.setattr(MedVLM, "encode", lambda self, images, real=MedVLM.encode: (looked.append(images["picture"][0]), real(self, images))[1])
    fine = model.segment(picture, "left lung")
    spec = model.vlm.encoders["picture"].spec
    windows = list(inputs(picture, spec, tiles(picture, spec, 2.0).frames))
    assert len(windows) >= 4 and len(looked) == 1 + len(windows) and all(torch.equal(a, b) for a, b in zip(looked[1:], windows))
    assert fine.mask.shape == (64, 80) and fine.present == plain.present and (fine.mask != plain.mask).any()


def test_what_was_outlined_is_not_outlined_again(reader, monkeypatch):
    picture = tiny.picture(seed=3)
    first = reader.segment(picture, "left lung")
    first.mask[:] = ~first.mask  # whoever changes it changes their own
    monkeypatch.setattr(NativeModel, "_outlined", lambda *_: pytest.fail("drawn twice"))
    again = reader.segment(picture, "left lung")
    assert again.present == first.present and np.array_equal(again.mask, ~first.mask)
