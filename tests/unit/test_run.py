"""Runs: predict then score, stopped and started again, with models that fail, and two models compared."""

import json

import numpy as np
import pytest
from PIL import Image as Picture

from medvlm import cli
from medvlm.datasets.predictions import append_predictions, read_predictions, rows, save_predictions
from medvlm.errors import MedVLMError
from medvlm.evaluate import run
from medvlm.evaluate.compare import compare
from medvlm.evaluate.run import evaluate, plan, restricted, score
from medvlm.predictors.file import load as saved
from medvlm.sample import Prediction, Region, Sample

BRIGHT = 8
"""Images of the set below; every second one is bright, and the question is about that."""


@pytest.fixture
def bright(tmp_path):
    """Eight pictures with two closed questions and an open one each; half of them train, four of each modality."""
    folder = tmp_path / "bright"
    folder.mkdir()
    lines = []
    for split in ("train", "test"):
        for i in range(BRIGHT):
            name = f"{split}{i}"
            Picture.fromarray(np.full((8, 8), 200 if i % 2 else 30, np.uint8)).save(folder / f"{name}.png")
            yes, no = ("yes", "no") if i % 2 else ("no", "yes")
            lines.append({
                "id": name, "image": f"{name}.png", "modality": "xray" if i < 4 else "fundus", "split": split, "patient": f"{split}-p{i}",
                "qa": [
                    {"qid": f"{name}a", "question": "Is it bright?", "answer": yes, "type": "CLOSED"},
                    {"qid": f"{name}b", "question": "Is it dark?", "answer": no, "type": "CLOSED"},
                    {"qid": f"{name}c", "question": "What is it?", "answer": "bright square" if i % 2 else "dark square", "type": "OPEN"},
                ],
            })  # fmt: skip
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Looks:
    """It looks at the picture, and counts what it was asked."""

    name, version, sha256 = "looks", "1", None

    def __init__(self, fails=(), stops_at=None):
        self.asked, self.fails, self.stops_at = [], fails, stops_at

    def predict(self, samples):
        found = []
        for s in samples:
            if self.stops_at is not None and len(self.asked) == self.stops_at:
                raise KeyboardInterrupt
            self.asked.append(s.id)
            if s.id in self.fails:
                raise RuntimeError("Jane Doe, born 1970")
            bright = next(iter(s.images.values())).pixels.mean() > 100
            text = {"Is it bright?": "yes" if bright else "no", "Is it dark?": "no" if bright else "yes"}.get(s.question, "bright square" if bright else "dark square")
            found.append(Prediction(s.id, text, 0.9))
        return found


class Constant:
    name, version, sha256 = "constant", "1", None

    def predict(self, samples):
        return [Prediction(s.id, "yes", 0.6) for s in samples]


def named(record, name, slice="all"):
    (found,) = [s for s in record["scores"] if s["name"] == name and s["slice"] == slice]
    return found


def test_a_run_says_what_a_model_is_worth(bright, tmp_path):
    record = evaluate("vqa", Looks(), bright, tmp_path / "run", quiet=True)
    closed = named(record, "closed accuracy")
    assert (closed["value"], closed["n"], closed["excluded"], closed["chance"], closed["task"]) == (1.0, 16, 0, 0.5, "vqa")
    assert closed["low"] == closed["high"] == 1.0 and closed["convention"]
    assert named(record, "open exact match")["value"] == 1.0
    assert record["samples"] == {"vqa": 24} and record["errors"] == {"vqa": 0} and record["seed"] == 0
    beside = {k: next(s["value"] for s in v if s["name"] == "closed accuracy") for k, v in record["baselines"].items()}
    assert set(beside) == {"yes", "random", "prior"} and beside["yes"] == 0.5  # half of the closed answers are yes
    assert beside["prior"] == 0.5  # a tie in train: the same answer to everybody
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == record
    assert "closed accuracy" in (tmp_path / "run" / "table.md").read_text() and "\\toprule" in (tmp_path / "run" / "table.tex").read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "closed accuracy" in page and "http" not in page.replace("http-equiv", "")  # one file that asks for nothing
    by = {s["slice"] for s in record["scores"]}
    assert {"modality=xray", "modality=fundus", "type=OPEN"} <= by


def test_what_is_wrong_is_shown_with_its_picture(bright, tmp_path):
    evaluate("vqa", Constant(), bright, tmp_path / "run", quiet=True)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 4 and "Is it bright?" in page and "reference: no" in page


def test_a_run_that_was_stopped_goes_on(bright, tmp_path):
    out, first = tmp_path / "run", Looks(stops_at=9)
    with pytest.raises(KeyboardInterrupt):
        evaluate("vqa", first, bright, out, quiet=True)
    kept = set(rows(out / "predictions.jsonl"))
    assert len(kept) == 9
    second = Looks()
    record = evaluate("vqa", second, bright, out, quiet=True)
    assert not kept & set(second.asked) and len(kept | set(second.asked)) == 24  # nothing twice, nothing lost
    assert record == evaluate("vqa", Looks(), bright, tmp_path / "whole", quiet=True) | {"run": record["run"]}
    third = Looks()
    assert evaluate("vqa", third, bright, out, quiet=True)["scores"] == record["scores"] and not third.asked


def test_a_line_that_was_never_finished_is_asked_again(bright, tmp_path):
    out = tmp_path / "run"
    whole = evaluate("vqa", Looks(), bright, out, quiet=True)
    text = (out / "predictions.jsonl").read_text()
    (out / "predictions.jsonl").write_text(text[:-20])
    again = Looks()
    assert evaluate("vqa", again, bright, out, quiet=True)["scores"] == whole["scores"] and len(again.asked) == 1
    assert sorted((out / "predictions.jsonl").read_text().splitlines()) != [] and len(rows(out / "predictions.jsonl")) == 24


def test_a_failure_is_a_row_and_a_zero(bright, tmp_path):
    record = evaluate("vqa", Looks(fails=("test2a",)), bright, tmp_path / "run", quiet=True)
    row = rows(tmp_path / "run" / "predictions.jsonl")["test2a"]
    assert row["error"] == "INTERNAL: RuntimeError"  # never the foreign text, which may tell of the patient
    closed = named(record, "closed accuracy")
    assert (closed["value"], closed["n"], record["errors"]) == (15 / 16, 16, {"vqa": 1})
    mended = evaluate("vqa", Looks(), bright, tmp_path / "run", retry_errors=True, quiet=True)
    assert named(mended, "closed accuracy")["value"] == 1.0


def test_answers_to_something_else_are_errors(bright, tmp_path):
    class Confused:
        name = "confused"

        def predict(self, samples):
            return [Prediction("x", "yes") for _ in samples]

    record = evaluate("vqa", Confused(), bright, tmp_path / "run", quiet=True)
    assert record["errors"] == {"vqa": 24} and named(record, "closed accuracy")["value"] == 0.0


def test_saved_predictions_score_the_same(bright, tmp_path):
    whole = evaluate("vqa", Looks(fails=("test2a",)), bright, tmp_path / "run", quiet=True)
    again = evaluate("vqa", saved(str(tmp_path / "run")), bright, tmp_path / "saved", quiet=True)
    assert again["scores"] == whole["scores"]
    assert score(tmp_path / "run")["scores"] == whole["scores"]


def test_rows_of_other_samples_are_left_out_and_counted(bright, tmp_path):
    _, jobs = plan("vqa", bright)
    file = save_predictions(tmp_path / "p.jsonl", [Prediction(s.id, "yes") for s in jobs[0].samples[1:]] + [Prediction("stranger", "yes")])
    record = evaluate("vqa", saved(str(file)), bright, tmp_path / "run", quiet=True)
    assert record["run"]["left_out_predictions"] == 1 and record["errors"] == {"vqa": 1}
    assert named(record, "closed accuracy")["n"] == 16  # the missing one is wrong, not gone
    with pytest.raises(MedVLMError, match="was used on line 1"):
        file.write_text(file.read_text().splitlines()[0] + "\n" + file.read_text())
        saved(str(file))


def test_one_folder_holds_one_run(bright, tmp_path):
    evaluate("vqa", Looks(), bright, tmp_path / "run", quiet=True)
    with pytest.raises(MedVLMError, match="model: .*looks.*constant"):
        evaluate("vqa", Constant(), bright, tmp_path / "run", quiet=True)
    with pytest.raises(MedVLMError, match="holds no run"):
        evaluate("vqa", Looks(), bright, bright, quiet=True)
    manifest = bright / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("Is it bright?", "Is it light?"))
    with pytest.raises(MedVLMError) as wrong:
        score(tmp_path / "run")
    assert wrong.value.code == "DATA_DIFFER"


def test_a_part_of_a_score_is_the_score_of_the_part(bright, tmp_path):
    _, (job,) = plan("vqa", bright)
    answers = Constant().predict(job.samples)
    whole = job.task.score(job.samples, answers, job.convention)
    mine = [i for i, s in enumerate(job.samples) if s.meta["modality"] == "fundus"]
    direct = job.task.score([job.samples[i] for i in mine], [answers[i] for i in mine], job.convention)
    for name in ("closed accuracy", "open token F1"):
        a = restricted(next(s for s in whole if s.name == name), {job.samples[i].id for i in mine}, "modality=fundus")
        b = next(s for s in direct if s.name == name)
        assert (a.value, a.n, a.low, a.high) == (b.value, b.n, b.low, b.high)


def test_two_runs_are_compared_pair_by_pair(bright, tmp_path):
    evaluate("vqa", Looks(), bright, tmp_path / "a", quiet=True)
    evaluate("vqa", Constant(), bright, tmp_path / "b", quiet=True)
    found = compare(tmp_path / "a", tmp_path / "b")
    (closed,) = [d for d in found["differences"] if d["name"] == "closed accuracy"]
    assert (closed["difference"], closed["verdict"], closed["n"]) == (0.5, "win", 16) and closed["low"] == closed["high"] == 0.5  # one of two right at every patient
    assert closed["mcnemar"] == pytest.approx(2 * 0.5**8) and closed["p"] == pytest.approx(2 / 1001) and closed["p_holm"] >= closed["p"]
    back = compare(tmp_path / "b", tmp_path / "a")
    assert back["losses"] == found["wins"] and len(back["differences"]) == len(found["differences"])
    assert all(x["difference"] == -y["difference"] for x, y in zip(back["differences"], found["differences"]) if y["difference"] is not None)
    same = compare(tmp_path / "a", tmp_path / "a")
    assert all(d["difference"] == 0 and d["p"] == 1.0 for d in same["differences"] if d["difference"] is not None) and not same["wins"] and not same["losses"]


def test_a_few_by_lot(bright, tmp_path):
    record = evaluate("vqa", Looks(), bright, tmp_path / "run", limit=5, quiet=True)
    assert record["samples"] == {"vqa": 5} and [s.id for s in plan("vqa", bright, limit=5)[1][0].samples] == list(rows(tmp_path / "run" / "predictions.jsonl"))


def test_several_data_sets_at_once(bright, tmp_path):
    import shutil

    shutil.copytree(bright, bright.parent / "other")
    (bright.parent / "notes").mkdir()
    data, (job,) = plan("vqa", bright.parent)
    assert set(data.folders) == {"bright", "other"} and len({s.id for s in job.samples}) == 48 and job.samples[0].id.startswith("bright/")
    record = evaluate("vqa", Looks(), bright.parent, tmp_path.parent / f"{tmp_path.name}-run", quiet=True)
    assert named(record, "closed accuracy", "dataset=other")["n"] == 16


@pytest.mark.parametrize(("name", "change", "code"), [
    ("nothing", {}, "NO_SUCH_DATA"), ("vqa", {"split": "val"}, "NO_SAMPLES"), ("segment", {}, "NO_SAMPLES"), ("vqa", {"convention": "mine"}, "BAD_ARGUMENT"),
])  # fmt: skip
def test_what_cannot_be_scored_is_said_by_name(bright, name, change, code):
    with pytest.raises(MedVLMError) as wrong:
        plan(name, bright, **change)
    assert wrong.value.code == code and wrong.value.hint


def test_the_command_line_scores_a_baseline(bright, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["evaluate", "vqa", "--model", "blind:yes", "--data", str(bright), "--out", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert named(record, "closed accuracy")["value"] == 0.5 and named(record, "yes rate")["value"] == 1.0
    assert cli.main(["score", str(out)]) == 0 and "| vqa | closed accuracy | all | 50.0 |" in capsys.readouterr().out
    assert cli.main(["evaluate", "vqa", "--model", "blind:prior", "--data", str(bright), "--out", str(tmp_path / "prior"), "--json"]) == 0
    prior = json.loads(capsys.readouterr().out)
    assert named(prior, "closed accuracy")["value"] == next(s["value"] for s in prior["baselines"]["prior"] if s["name"] == "closed accuracy")
    assert cli.main(["compare", str(out), str(tmp_path / "prior"), "--json"]) == 0
    assert {d["name"] for d in json.loads(capsys.readouterr().out)["differences"]} >= {"closed accuracy"}
    assert cli.main(["evaluate", "vqa", "--model", "blind:yes", "--data", str(bright), "--split", "val", "--out", str(out)]) == 2
    assert "[NO_SAMPLES]" in capsys.readouterr().err


def test_run_slices_name_what_the_sample_says():
    from medvlm.sample import Sample

    sample = Sample("x", meta={"modality": "ct", "labels": {"organ": "CHEST"}, "category": ["a", "b"]})
    assert run.values_of(sample, "organ") == ("CHEST",) and run.values_of(sample, "category") == ("a", "b") and run.values_of(sample, "lang") == ()


def with_val(folder):
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for row in [r for r in lines if r["split"] == "train"]:
        lines.append({**row, "id": f"val-{row['id']}", "split": "val", "patient": f"val-{row['patient']}", "qa": [{**q, "qid": f"val-{q['qid']}"} for q in row["qa"]]})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_calibration_is_fitted_on_val_and_scored_on_test(bright, tmp_path):
    """A constant yes at 0.6 is right half of the time: a gap of 0.1 before, about none after Platt's shift."""
    record = evaluate("vqa", Constant(), with_val(bright), tmp_path / "run", quiet=True, calibrate=True)
    assert named(record, "ECE")["value"] == pytest.approx(0.1) and named(record, "ECE after platt")["value"] < 0.05
    assert set(rows(tmp_path / "run" / "predictions-val.jsonl")) == {s.id for s in plan("vqa", bright, "val")[1][0].samples}
    assert "16 other answers" in named(record, "ECE after platt")["convention"]
    assert score(tmp_path / "run")["scores"] == record["scores"]


def test_a_model_is_asked_how_sure_it_is(bright, tmp_path):
    class Modest(Looks):
        def predict(self, samples):
            asked = [s for s in samples if not s.id.endswith("@sure")]
            said = {p.id: p for p in super().predict(asked)}
            return [said.get(s.id) or Prediction(s.id, "I am 70 % sure.") for s in samples]

    record = evaluate("vqa", Modest(), bright, tmp_path / "run", quiet=True, ask_sure=True)
    assert named(record, "confidence given", "confidence=asked")["value"] == 1.0
    assert named(record, "ECE", "confidence=asked")["value"] == pytest.approx(0.3)  # always right, 0.7 sure
    assert named(record, "ECE")["value"] == pytest.approx(0.1)  # and 0.9 by its own account
    assert "Answer given: yes" in next(s.question for s in run._sure(plan("vqa", bright)[1][0], [Prediction(s.id, "yes") for s in plan("vqa", bright)[1][0].samples]).asked())


def test_groups_that_fare_differently_are_told(bright, tmp_path):
    """Right about every X-ray and about no fundus photograph: a gap of 1."""

    class Partial(Looks):
        def predict(self, samples):
            found = super().predict(samples)
            return [p if s.meta["modality"] == "xray" else Prediction(p.id, "no idea") for s, p in zip(samples, found)]

    manifest = bright / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"modality": "xray"', '"modality": "xray", "site": "a"').replace('"modality": "fundus"', '"modality": "fundus", "site": "b"'))
    found = [s for s in evaluate("vqa", Partial(), bright, tmp_path / "run", quiet=True)["scores"] if "gap" in s["name"]]
    assert {s["name"] for s in found} == {"closed accuracy gap by site", "closed accuracy gap by modality"}
    assert all(s["value"] is None and "fewer than two groups" in s["note"] for s in found)  # four patients a group are too few


def test_a_judge_scores_open_answers_beside(bright, tmp_path):
    def judge(prompts):
        return ["1" if "bright square" in p.split("bright square", 1)[-1] else "0" for p in prompts]

    judge.name = "a test"
    record = evaluate("vqa", Looks(), bright, tmp_path / "run", quiet=True, judge=judge)
    judged = [s for s in record["scores"] if "judge" in s["name"] and s["slice"] == "all"]
    assert judged and any("a test" in s["convention"] for s in judged)


def test_a_model_is_asked_again_and_its_agreement_scored(bright, tmp_path):
    """It wavers about dark pictures only: drawn at a temperature it says yes and no by turns."""

    class Wavers(Looks):
        temperature, drawn = 0.0, 0

        def predict(self, samples):
            found = super().predict(samples)
            if not self.temperature:
                return found
            dark = next(iter(samples[0].images.values())).pixels.mean() < 100
            self.drawn += 1
            return [Prediction(p.id, ("yes", "no")[int(p.id[-1]) % 2]) if dark else p for p in found]

    model = Wavers()
    record = evaluate("vqa", model, bright, tmp_path / "run", quiet=True, again=4)
    assert model.temperature == 0.0 and model.drawn
    said = rows(tmp_path / "run" / "predictions-again.jsonl")
    assert len(said) == 4 * 24 and [said[f"test0a@{k}"]["text"] for k in (1, 2, 3, 4)] == ["no", "yes", "no", "yes"]
    # always right; agreement 1 on 8 closed answers, 1/2 on 8: a gap of 1/4 in the mean. Entropy: ln 2 of ln 4 is a half too
    for source in ("agreement", "semantic entropy"):
        assert named(record, "ECE", f"confidence={source}")["value"] == pytest.approx(0.25)
    with pytest.raises(MedVLMError, match="no temperature"):
        evaluate("vqa", Constant(), bright, tmp_path / "other", quiet=True, again=2)


def test_prompts_are_named_and_kept_with_the_run(bright, tmp_path):
    manifest = bright / "manifest.jsonl"
    lines = [json.loads(line) | {"findings": {"bright": i % 2, "dark": 1 - i % 2}} for i, line in enumerate(manifest.read_text().splitlines())]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = set()

    class Names:
        name = "names"

        def predict(self, samples):
            seen.update(s.meta["prompts"] for s in samples)
            return [Prediction(s.id, choices=dict.fromkeys(s.choices, 0.5)) for s in samples]

    evaluate("zeroshot", Names(), bright, tmp_path / "run", prompts="chexzero", quiet=True)
    assert seen == {"chexzero"} and json.loads((tmp_path / "run" / "run.json").read_text())["prompts"] == "chexzero"
    with pytest.raises(MedVLMError, match="there are no prompts"):
        plan("zeroshot", bright, prompts="mine")


def test_scores_that_need_weights_are_never_passed_over_in_silence(bright, tmp_path):
    manifest = bright / "manifest.jsonl"
    lines = [json.loads(line) | {"text": "FINDINGS: Clear lungs."} for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate("report", Constant(), bright, tmp_path / "run", quiet=True)
    with pytest.raises(MedVLMError) as wrong:
        score(tmp_path / "run", clinical=("no such score",))
    assert wrong.value.code in ("BAD_ARGUMENT", "MISSING_EXTRA")


def test_the_worst_outlines_are_shown_where_there_are_several_labels(tmp_path):
    """The score over labels is a mean of means; the cases are those of its labels."""
    from medvlm.evaluate.page import headline, number

    folder, lines = tmp_path / "masks", []
    folder.mkdir()
    for i in range(3):
        Picture.fromarray(np.full((16, 16), 90, np.uint8)).save(folder / f"{i}.png")
        for name in ("heart", "lung"):
            mask = np.zeros((16, 16), bool)
            mask[2:10, 2 : 8 if name == "lung" else 6] = True
            Picture.fromarray(mask).save(folder / f"{i}-{name}.png")
        lines.append({"id": str(i), "image": f"{i}.png", "modality": "xray", "mask": {"type": "binary", "files": {n: f"{i}-{n}.png" for n in ("heart", "lung")}}})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    class Lungs:
        name = "lungs"

        def predict(self, samples):
            return [Prediction(s.id, masks=tuple(m for m in s.masks if m.label == "lung")) for s in samples]

    record = evaluate("segment", Lungs(), folder, tmp_path / "run", quiet=True)
    assert named(record, "Dice")["value"] == 0.5 and named(record, "Dice", "label=lung")["value"] == 1.0
    _, (job,) = plan("segment", folder)
    head = headline(job.samples, job.task.score(job.samples, Lungs().predict(job.samples), job.convention))
    assert dict(zip(head.items.ids, head.items.values)) == {f"{i}/{n}": float(n == "lung") for i in range(3) for n in ("heart", "lung")}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Worst cases" in page and page.count("data:image/jpeg;base64,") == 3  # the three hearts, no lung
    assert (number(33.0, "cases"), number(12.345, "mm"), number(5027.4, "px"), number(0.5), number(float("nan"))) == ("33 cases", "12.35 mm", "5027 px", "50.0", "–")


def test_a_question_does_not_vanish_with_its_image(bright):
    """A broken file that nobody asks about is passed over; one that is asked about stops the run, with its line."""
    (bright / "broken.png").write_bytes(b"not a picture")
    manifest = bright / "manifest.jsonl"
    row = {"id": "broken", "image": "broken.png", "modality": "xray", "split": "test"}
    text = manifest.read_text()
    manifest.write_text(text + json.dumps(row) + "\n")
    assert len(plan("vqa", bright)[1][0].samples) == 24
    manifest.write_text(text + json.dumps(row | {"qa": [{"qid": "b", "question": "Is it?", "answer": "yes"}]}) + "\n")
    with pytest.raises(MedVLMError, match="line 17"):
        plan("vqa", bright)


def test_nothing_is_compared_on_other_answers_than_were_predicted(bright, tmp_path):
    for model in (Looks(), Constant()):
        evaluate("vqa", model, bright, tmp_path / model.name, quiet=True)
    manifest = bright / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("bright square", "light square"))
    with pytest.raises(MedVLMError) as wrong:
        compare(tmp_path / "looks", tmp_path / "constant")
    assert wrong.value.code == "DATA_DIFFER"


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_that_leaves_nothing_is_refused(bright, tmp_path, limit):
    with pytest.raises(MedVLMError) as wrong:
        evaluate("vqa", Looks(), bright, tmp_path / "run", limit=limit, quiet=True)
    assert wrong.value.code == "BAD_ARGUMENT"


def test_calibration_is_never_fitted_on_what_is_scored(bright, tmp_path):
    manifest = bright / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(json.loads(line) | {"split": None}) + "\n" for line in manifest.read_text().splitlines()).replace(', "split": null', ""))
    with pytest.raises(MedVLMError) as wrong:
        evaluate("vqa", Looks(), bright, tmp_path / "run", quiet=True, calibrate=True)
    assert wrong.value.code == "BAD_ARGUMENT" and not (tmp_path / "run").exists()


def test_rows_without_a_split_are_scored_only_where_no_row_names_one(bright, tmp_path):
    manifest = bright / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines[:BRIGHT]:
        del line["split"]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = Looks()
    evaluate("vqa", asked, bright, tmp_path / "mixed", quiet=True)
    assert {i[:4] for i in asked.asked} == {"test"}
    for line in lines[BRIGHT:]:
        del line["split"]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = Looks()
    evaluate("vqa", asked, bright, tmp_path / "none", quiet=True)
    assert {i[:4] for i in asked.asked} == {"test", "trai"}


def test_by_lot_whole_images_and_twins_are_drawn_and_what_is_fitted_on_stays():
    def named(name, group=None, **meta):
        return Sample(name, group=group, meta=meta)

    pairs = [named(f"{i}-{k}{side}", f"{i}-{k}", dataset="d", row=f"r{i}") for i in range(50) for k in range(4) for side in "ab"]
    drawn = run._by_lot(pairs, 80)
    assert len(drawn) == 80 and len({s.meta["row"] for s in drawn}) == 10
    twins = [s for i in range(50) for s in (named(f"q{i}"), named(f"q{i}-not", negation_of=f"q{i}"))]
    drawn = {s.id for s in run._by_lot(twins, 10)}
    assert len(drawn) == 10 and all(f"{i.removesuffix('-not')}-not" in drawn for i in drawn)
    fitted = [named(f"t{i}") for i in range(10)] + [named(f"v{i}", fit=True) for i in range(90)]
    drawn = run._by_lot(fitted, 5)
    assert len(drawn) == 95 and sum(not s.meta.get("fit") for s in drawn) == 5


def test_what_no_file_can_hold_is_an_error_of_its_sample(tmp_path):
    odd = [Prediction("a", "x", 1.0000001), Prediction("b", "x", 1.5), Prediction("c", "\ud800"), Prediction("d", "fine", 0.5, {"yes": float("nan")}),
           Prediction("e", regions=(Region("i", "spot", ((float("nan"), 0.0), (1.0, 1.0)), None, 0.5),)), Prediction("f", regions=(Region("i", "spot", ((0.0, 0.0), (1.0, 1.0)), None, float("nan")),))]  # fmt: skip
    append_predictions(tmp_path / "p.jsonl", odd)
    found = rows(tmp_path / "p.jsonl")
    assert found["a"]["probability"] == 1.0 and found["a"]["error"] is None and found["f"]["regions"][0]["probability"] == 0.0
    assert all(found[i]["error"].startswith("BAD_PREDICTIONS") for i in "bce") and found["d"]["error"] is None
    assert np.isnan(read_predictions(tmp_path / "p.jsonl", [Sample("d")])[0].choices["yes"])


def test_questions_of_one_id_are_refused_before_anything_is_asked(bright, tmp_path):
    manifest = bright / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"test1a"', '"test0a"'))
    asked = Looks()
    with pytest.raises(MedVLMError) as wrong:
        evaluate("vqa", asked, bright, tmp_path / "run", quiet=True)
    assert wrong.value.code == "BAD_DATASET" and "test0a" in wrong.value.message and not asked.asked
