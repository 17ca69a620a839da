"""``medvlm show`` and what every verb shares: exit status, one line of error, no torch."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import test_study as studies

from medvlm import cli, errors
from medvlm.imaging import show
from medvlm.imaging.scan import Image, Study, Volume


def run(capsys, *argv):
    status = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


def shell(*argv, **kw):
    return subprocess.run([sys.executable, "-m", "medvlm", *map(str, argv)], capture_output=True, text=True, **kw)


def test_show_prints_what_a_radiographer_looks_for(tmp_path, capsys):
    for n in range(3):
        studies.dicom(tmp_path / "in" / f"{n}.dcm", position=2.5 * n)
    status, out, err = run(capsys, "show", tmp_path / "in")
    assert (status, err) == (0, "")
    for text in ("ct-1", "3 x 4 x 4", "2.5 x 1 x 1", "axial SPL", "HU"):
        assert text in out
    assert "Doe" not in out


def test_show_json_is_one_object_with_the_geometry(tmp_path, capsys):
    status, out, err = run(capsys, "show", studies.nifti(tmp_path / "a.nii"), "--json")
    (image,) = json.loads(out)["images"]
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert image["id"] == "image-1" and image["size"] == [3, 4, 5] and image["spacing"] == [4, 3, 2] and image["orientation"] == "SAR"
    assert image["affine"] == [[0, 0, -2, 11], [0, -3, 0, -7], [4, 0, 0, 5], [0, 0, 0, 1]] and image["warnings"] == []
    status, out, _ = run(capsys, "show", studies.nifti(tmp_path / "b.nii", shift=900), "--json", "--modality", "ct")
    assert [w.split(":")[0] for w in json.loads(out)["images"][0]["warnings"]] == ["HU_IMPLAUSIBLE"]


def test_summary_says_what_is_unknown_and_table_prints_every_warning(capsys):
    bad = {"windows": [(float("nan"), 5, "")], "view": "AP\x1b[31m", "laterality": "L", "inverted": True, "warnings": ["NOT_FINITE: 3"]}
    study = Study("study-1", images=[Image("xray-1", np.zeros((1, 4, 5)), None, "xray", "raw", bad)], warnings=["SKIPPED: 1"])
    data = json.loads(json.dumps(show.summary(study), allow_nan=False))
    (image,) = data["images"]
    assert image["spacing"] is None and image["orientation"] is None and image["windows"] == [[None, 5.0]] and image["inverted"] is True
    assert "\x1b" not in image["view"] and data["warnings"] == ["SKIPPED: 1"] and image["warnings"] == ["NOT_FINITE: 3"]
    show.table(study)
    out = capsys.readouterr().out
    assert "unknown" in out and "inverted" in out and "! SKIPPED: 1" in out and "! xray-1: NOT_FINITE: 3" in out and "\x1b" not in out


def test_brackets_in_a_file_are_text_and_not_markup(capsys):
    study = Study("study-1", images=[Image("a", np.zeros((1, 4, 5)), info={"body_part": "[bold]CHEST[/bold]"})], warnings=["[red]x"])
    show.table(study)
    out = capsys.readouterr().out
    assert "[bold]CHEST[/bold]" in out and "[red]x" in out


@pytest.mark.parametrize("letters", ["SPL", "PSL", "LPS", "ASR"])
def test_the_plane_of_the_slices_is_named(letters, capsys):
    v = Volume("v", np.zeros((1, 2, 3, 4)), [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]).reorient(letters)
    show.table(Study("s", images=[v]))
    plane = {"S": "axial", "P": "coronal", "A": "coronal", "L": "sagittal"}[letters[0]]
    assert f"{plane} {letters}" in capsys.readouterr().out


def test_bad_use_is_one_clear_line_and_status_2(tmp_path, capsys):
    for name, (path, code) in studies.bad_uses(tmp_path / "in").items():
        status, out, err = run(capsys, "show", path)
        assert (status, out, err.count("\n")) == (2, "", 1), name
        assert err.startswith("medvlm: ") and str(path) in err and f"[{code}]" in err, name
        assert err.rstrip().endswith(errors.HINTS[code]), name


def test_what_cannot_be_opened_is_one_line(tmp_path, capsys, monkeypatch):
    folder = studies.picture(tmp_path / "f" / "a.png").parent

    def closed(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", closed)
    status, out, err = run(capsys, "show", folder)
    assert (status, out) == (2, "") and "[UNREADABLE]" in err and str(folder) in err and err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["paint"], ["show"], ["show", "a", "--policy", "guess"], ["show", "a", "--nonsense"]])
def test_wrong_usage_is_one_line_and_status_2(argv, capsys):
    status, out, err = run(capsys, *argv)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("medvlm") and "--help" in err


def test_help_and_version_are_no_errors(capsys):
    for argv in (["--help"], ["show", "--help"], ["--version"]):
        status, out, err = run(capsys, *argv)
        assert (status, err) == (0, "") and out


def test_a_chosen_study(tmp_path, capsys):
    studies.dicom(tmp_path / "1.dcm", "1.2.3"), studies.dicom(tmp_path / "2.dcm", "1.2.4")
    status, _, err = run(capsys, "show", tmp_path)
    assert status == 2 and "[MANY_STUDIES]" in err
    chosen = err.split("study-")[1].split()[0]
    status, out, _ = run(capsys, "show", tmp_path, "--study", f"study-{chosen}", "--json")
    assert status == 0 and json.loads(out)["study"] == f"study-{chosen}"


def test_what_nobody_foresaw_is_one_line_without_its_text(capsys, monkeypatch):
    def fail(*_, **__):
        raise ValueError("Doe^Jane was here")

    monkeypatch.setattr("medvlm.imaging.study.read", fail)
    status, _, err = run(capsys, "show", "x")
    assert status == 1 and "ValueError" in err and "Doe" not in err and err.count("\n") == 1 and "cli.py" in err
    for error, expected in ((KeyboardInterrupt(), 130), (MemoryError(), 1), (errors.FileError("no room", "CANNOT_WRITE"), 1)):
        monkeypatch.setattr("medvlm.imaging.study.read", lambda *_, e=error, **__: (_ for _ in ()).throw(e))
        status, _, err = run(capsys, "show", "x")
        assert status == expected and err.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    for n in range(200):
        studies.picture(tmp_path / f"{n:03d}.png", n % 100)
    for option in ([], ["--json"]):
        p = subprocess.Popen([sys.executable, "-m", "medvlm", "show", str(tmp_path), *option], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        p.stdout.close()
        assert p.stderr.read() == b"" and p.wait(30) == 0


def test_ctrl_c_is_130_and_one_line(tmp_path):
    """Sent while the study is being read. A shell that starts jobs in the background has them ignore it, children included."""
    code = "import signal, sys, time, medvlm.imaging.study as s; signal.signal(signal.SIGINT, signal.default_int_handler); s.read = lambda *a, **k: (print('ready', flush=True), time.sleep(3600)); from medvlm.cli import main; sys.exit(main(['show', 'x']))"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "ready\n"
    time.sleep(0.1)
    os.kill(p.pid, signal.SIGINT)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 130 and err == "medvlm: interrupted\n"


def test_show_loads_no_torch(tmp_path):
    path = studies.dicom(tmp_path / "a.dcm")
    code = f"import sys; from medvlm.cli import main; main(['show', {str(path)!r}]); print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'timm')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_python_dash_m_is_the_command(tmp_path):
    done = shell("show", tmp_path / "nothing")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    done = shell("show", studies.picture(tmp_path / "a.png"), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["images"][0]["unit"] == "uint8"


def test_embed_writes_a_vector_that_numpy_reads(tmp_path, capsys, monkeypatch):
    from medvlm.predictors.base import Model

    class Seer(Model):
        name = "seer"

        def embed(self, study_or_text, image=None):
            return np.array([0.6, 0.8], np.float32)

    monkeypatch.setattr("medvlm.predictors.load", lambda *_: Seer())
    picture = studies.picture(tmp_path / "a.png")
    status, out, _ = run(capsys, "embed", picture, "--out", tmp_path / "a.npy", "--json")
    assert status == 0 and json.loads(out)["size"] == 2 and np.load(tmp_path / "a.npy").tolist() == pytest.approx([0.6, 0.8])
    status, out, err = run(capsys, "embed", picture, "--out", tmp_path / "a.txt")
    assert (status, out) == (2, "") and ".npy" in err
    status, _, err = run(capsys, "classify", picture, "pneumonia")
    assert status == 2 and "seer cannot classify; it can embed" in err


def test_the_doctor_says_what_works_and_what_to_install(capsys, monkeypatch):
    from medvlm.imaging import dicom_pixels

    status, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert status == 0 and found["problems"] == [] and found["models"] == {"medvlm-tiny": "reads"}
    assert found["packages"]["torch"] and all(found["codecs"].values()) and found["devices"]["cores"] >= 1 and found["extras"]["test"] == []
    monkeypatch.setattr(dicom_pixels, "DECODERS", ((dicom_pixels.JPEG2000, (("no such", "pylibjpeg-openjpeg"),)), *dicom_pixels.DECODERS[1:]))
    status, out, _ = run(capsys, "doctor")
    assert status == 1 and "JPEG 2000: MISSING" in out and "pylibjpeg-openjpeg" in out.splitlines()[-1] + out.splitlines()[-2]


def test_a_place_that_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.jsonl").write_text('{"id": "a", "image": null, "modality": "other", "split": "test", "qa": [{"qid": "a", "question": "Is it?", "answer": "yes"}]}\n')
    (tmp_path / "file").write_text("")
    status, _, err = run(capsys, "evaluate", "vqa", "--model", "blind:yes", "--data", tmp_path / "data", "--out", tmp_path / "file")
    assert status == 1 and "[CANNOT_WRITE]" in err and len(err.splitlines()) == 1
