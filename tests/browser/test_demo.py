"""The review page in a real browser: a model with known answers, known masks, and every request watched."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from medvlm.errors import ModelError, UsageError
from medvlm.imaging.scan import Image, Study, Volume
from medvlm.predictors.base import Model
from medvlm.sample import Answer, Finding, Measurement, Region, Report, Sentence

pytestmark = pytest.mark.browser
NAME = "Zyxwvut^Qwertz"
CHROMIUM = "/usr/bin/chromium"


class Oracle(Model):
    """Reads X-rays with one finding on the left half and one structure; refuses everything else."""

    name, version, sha256, reads = "oracle", "1.2", "abcdef0123456789", ("xray",)

    def __init__(self):
        self.reports = 0

    def _see(self, study, image):
        picture = study.image(image)
        if picture.modality != "xray":
            raise ModelError(f"oracle has not learned to read {picture.modality} images", "OUT_OF_SCOPE")
        high, wide = picture.shape[-2:]
        spot, lung = np.zeros((high, wide), bool), np.zeros((high, wide), bool)
        spot[high // 4 : high // 2, wide // 8 : wide // 4] = True
        lung[high // 8 : high - high // 8, wide // 2 : wide - wide // 8] = True
        return Region(picture.id, "opacity", mask=spot, probability=0.9), Region(picture.id, "left lung", mask=lung, probability=1.0)

    def report(self, study, image=None):
        self.reports += 1
        if study.image(image).modality == "oct":
            raise RuntimeError("what a library says of /home/someone/file")
        try:
            spot, lung = self._see(study, image)
        except ModelError as error:
            return Report(out_of_scope=error.message)
        findings = (Finding("opacity", True, 0.9, (spot,), (Measurement("area", 12.5, "mm2"),)), Finding("effusion <b>", False, 0.02, (lung,)))
        said = (Sentence("There is an opacity.", (spot,), "findings", (0,)), Sentence("No effusion <i>seen</i>.", (lung,), "impression", (1,)))
        return Report(said, findings)

    def ask(self, study, question, image=None):
        _, lung = self._see(study, image)
        return Answer("yes", 0.75, {"yes": 0.75, "no": 0.25}, (lung,))


def xray() -> Study:
    pixels = np.tile(np.linspace(40, 200, 80).astype(np.uint8), (64, 1))[None]
    return Study("study-aaaa", images=[Image("xray-1", pixels, (2.0, 1.0), "xray", "uint8")])


def ct() -> Study:
    """Slice k holds -900 + 100 k HU, air around it; feet first in memory: the slices grow towards the head."""
    voxels = np.full((1, 12, 40, 40), -1000, np.int16)
    for k in range(12):
        voxels[0, k, 8:32, 8:32] = -900 + 100 * k
    affine = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [3.0, 0, 0, -15], [0, 0, 0, 1]])
    return Study("study-bbbb", images=[Volume("ct-1", voxels, affine, "ct", "HU", {"windows": [(40, 400, "")]})])


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("gradio", reason="gradio is not installed")
    if not os.path.exists(CHROMIUM):
        pytest.skip("there is no Chromium")
    with driver.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--headless=new", "--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


class Visit:
    """A page, every address it asked for, and what it logged."""

    def __init__(self, browser, address):
        self.urls, self.wrong = [], []
        self.page = browser.new_page(viewport={"width": 1500, "height": 950})
        self.page.set_default_timeout(60000)  # the first page of a cold process on a busy machine
        self.page.on("request", lambda r: self.urls.append(r.url))
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.goto(address)

    def pixels(self) -> np.ndarray:
        """What the viewer shows, as (H, W, 3)."""
        from PIL import Image as Picture

        return np.asarray(Picture.open(io.BytesIO(self.page.locator(".mv-picture").screenshot())).convert("RGB")).astype(int)

    def changes(self, act) -> np.ndarray:
        """The viewer's pixels after ``act``, once they have changed and come to rest."""
        before = self.pixels()
        act()
        seen = before
        for _ in range(50):
            time.sleep(0.12)
            now = self.pixels()
            if (now.shape != before.shape or (now != before).any()) and now.shape == seen.shape and (now == seen).all():
                return now
            seen = now
        raise AssertionError("the picture did not change")

    def shows(self, where: str, says: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.page.locator(where, has_text=says).count():
            self.page.wait_for_timeout(200)
        return bool(self.page.locator(where, has_text=says).count())

    def text(self, where: str, says: str) -> None:
        self.page.locator(where, has_text=re.compile(says)).first.wait_for()


@pytest.fixture(scope="module")
def oracle():
    return Oracle()


@pytest.fixture(scope="module")
def called():
    """Every address that Python itself connects to or looks up while the pages are served."""
    seen, connect, lookup = [], socket.socket.connect, socket.getaddrinfo
    socket.socket.connect = lambda self, to: (seen.append(str(to[0] if isinstance(to, tuple) else to)), connect(self, to))[1]
    socket.getaddrinfo = lambda host, *args, **more: (seen.append(str(host)), lookup(host, *args, **more))[1]
    yield seen
    socket.socket.connect, socket.getaddrinfo = connect, lookup


@pytest.fixture(scope="module")
def address(browser, oracle, called):
    from medvlm.demo import app

    blocks = app.build(oracle, [("film", xray()), ("scan", ct())])
    yield app.serve(blocks)
    blocks.close(verbose=False)
    assert set(called) <= {"127.0.0.1", "localhost"}


@pytest.fixture
def visit(browser, address):
    visit = Visit(browser, address)
    visit.text("#mv-findings", "opacity|No reading")
    yield visit
    hosts = {u.split("/")[2].split(":")[0] for u in visit.urls if u.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"} and visit.wrong == []
    visit.page.close()


def choose(visit, name: str, shows: str, where: str = "#mv-findings", of: str = "study") -> None:
    """Choose from a list, and wait for what the page then says; again where a busy machine lost the click or what it set off."""
    box = visit.page.locator(f"#mv-{of} input")
    for _ in range(5):
        box.click()
        visit.page.get_by_role("option", name=name).click()
        if visit.shows(where, re.compile(shows), 20):
            return
    raise AssertionError(f"{of} {box.input_value()!r} was chosen, wanted {name!r}, but {where} does not say {shows!r}")


def colours(pixels: np.ndarray) -> int:
    """How many pixels are not grey: those of overlays."""
    return int((np.ptp(pixels, axis=-1) > 25).sum())


def test_the_page_says_what_it_is(visit):
    page = visit.page
    assert page.locator(".mv-banner").is_visible() and "Research use only. Not a medical device" in page.locator(".mv-banner").inner_text()
    assert "oracle 1.2 · abcdef01" in page.locator(".mv-header").inner_text()
    assert "dark" in page.evaluate("document.body.className")
    box = page.locator(".mv-picture").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(80 * 1.0 / (64 * 2.0), rel=0.01)  # mm, not pixels
    assert not page.locator("#mv-slice").is_visible() and not page.locator("#mv-preset").is_visible()
    assert page.locator(".mv-edge").count() == 0  # nothing says where left is
    rows = page.locator("#mv-findings tbody tr").all_inner_texts()
    assert ["90%" in rows[0] and "present" in rows[0] and "area 12.5 mm2" in rows[0], "2%" in rows[1] and "absent" in rows[1] and "effusion <b>" in rows[1]] == [True, True]


def test_overlays_are_switched_filled_and_faded(visit):
    usual = colours(visit.pixels())
    box = visit.page.locator("#mv-overlays label", has_text="opacity")
    without = visit.changes(box.click)
    assert 0 < colours(without) < usual  # the lung is still there
    again = visit.changes(box.click)
    assert colours(again) == usual
    filled = visit.changes(visit.page.locator("#mv-style").get_by_text("filled").click)
    assert colours(filled) > 2 * usual
    visit.changes(lambda: visit.page.locator("#mv-opacity input[type=number]").fill("0"))
    assert colours(visit.pixels()) == 0


def test_a_finding_and_a_sentence_show_their_place(visit):
    high, wide = visit.pixels().shape[:2]
    spot = visit.changes(visit.page.locator("#mv-findings tr", has_text="opacity").click)
    assert colours(spot[:, : wide // 2]) > 0 and colours(spot[:, wide // 2 :]) == 0
    visit.page.get_by_role("tab", name="Report").click()
    lung = visit.changes(visit.page.locator(".mv-sentence", has_text="No effusion <i>seen</i>.").click)
    assert colours(lung[:, : wide // 2 - 4]) == 0 and colours(lung[:, wide // 2 :]) > 0
    both = visit.changes(visit.page.locator(".mv-sentence", has_text="No effusion").click)
    assert colours(both[:, : wide // 2 - 4]) > 0 and colours(both[:, wide // 2 :]) > 0


def test_a_question_is_answered_with_its_place(visit):
    wide = visit.pixels().shape[1]
    visit.page.locator("#mv-question textarea").fill("Is <img src=x onerror=alert(1)> {{value}} there?")
    lit = visit.changes(visit.page.locator("#mv-ask").click)
    assert colours(lit[:, : wide // 2 - 4]) == 0 and colours(lit[:, wide // 2 :]) > 0
    said = visit.page.locator(".mv-answer").inner_text()
    assert "Is <img src=x onerror=alert(1)> {{value}} there?" in said and "yes" in said and "75%" in said and "no 25%" in said
    assert visit.page.locator(".mv-answer img").count() == 0
    visit.page.locator("#mv-ask").click()
    visit.text("#mv-status", r"the question is empty \[BAD_ARGUMENT\]")


def test_a_scan_is_shown_though_the_model_does_not_read_it(visit):
    choose(visit, "scan", "No reading: oracle has not learned to read ct images.")
    page = visit.page
    visit.text(".mv-corner", r"slice 7 of 12, S 3\.0 mm")
    assert page.locator(".mv-edge").all_inner_texts() == ["R", "L", "A", "P"]

    def middle():
        shown = visit.pixels()
        return shown[shown.shape[0] // 2, shown.shape[1] // 2, 0]

    assert middle() == 0  # -300 HU in the file's window, 40 +- 200
    visit.changes(lambda: page.locator("#mv-preset").get_by_text("lung").click())
    assert middle() == pytest.approx((-300 + 600) / 1500 * 255 + 127.5, abs=2)
    visit.changes(lambda: page.locator("#mv-slice input[type=number]").fill("9"))
    visit.text(".mv-corner", r"slice 9 of 12, S 9\.0 mm")
    assert middle() == pytest.approx((-100 + 600) / 1500 * 255 + 127.5, abs=2)
    page.locator("#mv-view").hover()
    visit.changes(lambda: [page.mouse.wheel(0, -100) for _ in range(4)])
    visit.text(".mv-corner", r"slice 5 of 12, I 3\.0 mm")
    assert middle() == pytest.approx((-500 + 600) / 1500 * 255 + 127.5, abs=2)
    assert page.locator("#mv-slice input[type=number]").input_value() == "5"
    visit.changes(lambda: page.locator("#mv-invert input").check())
    assert middle() == pytest.approx(255 - ((-500 + 600) / 1500 * 255 + 127.5), abs=2)
    page.locator("#mv-question textarea").fill("Is there a nodule?")
    page.locator("#mv-question textarea").press("Enter")
    visit.text(".mv-answer", "No answer: oracle has not learned to read ct images.")


def test_a_study_is_read_once_in_a_session(visit, oracle):
    choose(visit, "scan", "No reading")
    before = oracle.reports
    choose(visit, "film", "opacity")
    choose(visit, "scan", "No reading")
    assert oracle.reports == before


def upload(visit, *files) -> None:
    with visit.page.expect_file_chooser() as chooser:
        visit.page.locator("#mv-upload").click()
    chooser.value.set_files([str(f) for f in files] if len(files) > 1 else str(files[0]))


def test_an_own_picture_is_opened_and_its_kind_told(visit, tmp_path):
    from PIL import Image as Picture

    file = tmp_path / f"{NAME}.png"
    Picture.fromarray(np.tile(np.arange(50, 200, 3, dtype=np.uint8), (30, 1))).save(file)
    upload(visit, file)
    visit.text("#mv-findings", "No reading: oracle has not learned to read unknown images.")
    visit.text(".mv-corner", "kind not stated")
    choose(visit, "xray", "There is|opacity", of="kind")
    assert colours(visit.pixels()) > 0
    nothing_of_the_patient(visit)


def test_what_cannot_be_read_is_one_line(visit, tmp_path):
    file = tmp_path / f"{NAME}.dcm"
    file.write_text("this is no image\n" * 40)
    upload(visit, file)
    visit.text("#mv-status", r"the upload is in no known format \[UNKNOWN_FORMAT\]")
    assert "Traceback" not in visit.page.content() and visit.page.locator(".mv-base").is_visible()
    nothing_of_the_patient(visit)


def test_no_patient_in_the_page(visit, tmp_path):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    ds = Dataset()
    for name in ("PatientName", "PatientID", "InstitutionName", "StudyDescription", "SeriesDescription", "ProtocolName", "BodyPartExamined", "AccessionNumber"):
        setattr(ds, name, NAME[:16])
    ds.Modality, ds.ViewPosition, ds.SOPClassUID, ds.SOPInstanceUID = "DX", "PA", "1.2.840.10008.5.1.4.1.1.1.1", generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 40, 48, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.WindowCenter, ds.WindowWidth, ds.WindowCenterWidthExplanation = 2000, 4000, NAME[:16]
    ds.PixelData = np.arange(40 * 48, dtype="<u2").tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    file = tmp_path / f"{NAME}.dcm"
    ds.save_as(file, enforce_file_format=True)
    upload(visit, file)
    visit.text("#mv-notes", r"frontal view \(PA\)")
    visit.text("#mv-findings", "opacity")
    visit.page.get_by_role("tab", name="Study").click()
    visit.text("#mv-about", "xray-1")
    nothing_of_the_patient(visit)


def nothing_of_the_patient(visit) -> None:
    """No tag text and no file name in the page, in an address or on the disk."""
    part = NAME.split("^")[0].lower()
    inputs = visit.page.eval_on_selector_all("input, textarea", "all => all.map(e => e.value).join(' ')")
    for where in (visit.page.content(), inputs, " ".join(visit.urls), " ".join(visit.wrong)):
        assert part not in where.lower()
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.stat().st_mode & 0o077 == 0
    left = [p for p in folder.rglob("*") if p.is_file()]
    assert all(p.stat().st_size == 0 and part not in str(p).lower() for p in left)  # gradio leaves empty files of random names


def test_several_images_are_listed(browser, oracle, tmp_path):
    from medvlm.demo import app

    two = Study("study-cccc", images=[xray().images[0], Image("photo-1", np.zeros((3, 9, 9), np.uint8), None, "fundus", "uint8")])
    blocks = app.build(oracle, [("both", two)])
    visit = Visit(browser, app.serve(blocks))
    try:
        visit.text("#mv-findings", "opacity")
        choose(visit, "photo-1", "not learned to read fundus", of="image")
    finally:
        visit.page.close()
        blocks.close(verbose=False)


def test_a_model_that_breaks_is_said_without_its_words(browser, oracle):
    from medvlm.demo import app

    blocks = app.build(oracle, [("eye", Study("study-dddd", images=[Image("oct-1", np.zeros((1, 9, 9), np.uint8), None, "oct", "uint8")]))])
    visit = Visit(browser, app.serve(blocks))
    try:
        visit.text("#mv-findings", "No reading: the model failed.")
        visit.text("#mv-status", r"RuntimeError \[INTERNAL\]")
        assert "someone" not in visit.page.content() and visit.page.locator(".mv-base").is_visible()
    finally:
        visit.page.close()
        blocks.close(verbose=False)


def test_a_late_reading_does_not_land_on_another_image(browser):
    from medvlm.demo import app

    class Slow(Oracle):
        go = threading.Event()

        def report(self, study, image=None):
            if study.id == "study-aaaa":
                self.go.wait(20)
            return super().report(study, image)

    blocks = app.build(Slow(), [("film", xray()), ("scan", ct())])
    visit = Visit(browser, app.serve(blocks))
    try:
        visit.text("#mv-findings", "Reading")
        choose(visit, "scan", "slice 7 of 12", ".mv-corner")
        visit.text("#mv-findings", "Reading")
        Slow.go.set()
        visit.text("#mv-findings", "not learned to read ct")
        assert colours(visit.pixels()) == 0 and "slice 7 of 12" in visit.page.locator(".mv-corner").inner_text()
        choose(visit, "film", "opacity")
    finally:
        Slow.go.set()
        visit.page.close()
        blocks.close(verbose=False)


def test_an_empty_page_waits_for_files(browser, oracle):
    from medvlm.demo import app

    blocks = app.build(oracle)
    visit = Visit(browser, app.serve(blocks))
    try:
        visit.text(".mv-empty", "No study is open")
        visit.page.locator("#mv-question textarea").fill("Anything?")
        visit.page.locator("#mv-ask").click()
        visit.text("#mv-status", "Open a study first.")
    finally:
        visit.page.close()
        blocks.close(verbose=False)


def test_the_server_seals_the_page_and_hides_what_it_need_not_show(address):
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    with urlopen(address) as answer:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "connect-src 'self'" in policy and "http" not in policy
    assert address.startswith("http://127.0.0.1:")
    for path in ("docs", "openapi.json", "gradio_api/file=/etc/hostname", f"gradio_api/file={Path(__file__).resolve()}"):
        with pytest.raises(HTTPError) as refused:
            urlopen(f"{address}{path}")
        assert refused.value.code in (403, 404), path
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(address, headers={"Host": "elsewhere.example"}))
    assert refused.value.code == 421
    with urlopen(f"{address}gradio_api/info") as answer:
        assert b'"named_endpoints":{}' in answer.read().replace(b" ", b"")


def test_a_busy_port_gives_the_next_one(address, capsys):
    from medvlm.demo import app

    taken = int(address.rstrip("/").rpartition(":")[2])
    assert app.free_port(taken) != taken
    assert f"port {taken} is in use; taking" in capsys.readouterr().err
    with pytest.raises(UsageError, match="a port is a number"):
        app.free_port(70000)


def save_screenshot(visit, path) -> None:
    from PIL import Image as Picture

    visit.page.set_viewport_size({"width": 1400, "height": 860})
    time.sleep(1)
    Picture.open(io.BytesIO(visit.page.screenshot())).convert("RGB").quantize(256, method=Picture.Quantize.MAXCOVERAGE).save(path, optimize=True)


def test_what_stops_the_demo_is_one_line(tmp_path):
    without = "import sys; sys.modules['gradio'] = None\nfrom medvlm.cli import main\nsys.exit(main(['demo', *sys.argv[1:]]))"
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True)
    assert done.returncode == 2 and "[MISSING_EXTRA]" in done.stderr and done.stderr.count("\n") == 1
    done = subprocess.run([sys.executable, "-m", "medvlm", "demo", str(tmp_path / "nothing")], capture_output=True, text=True)
    assert done.returncode == 2 and "[NOT_FOUND]" in done.stderr and done.stderr.count("\n") == 1


def test_the_bundled_model_reads_the_examples(browser, tmp_path):
    from medvlm.demo.app import EXAMPLES
    from medvlm.predictors import BUNDLED, DEFAULT

    if not (BUNDLED / DEFAULT / "config.json").is_file() or not (EXAMPLES / "chest-xray").is_dir():
        pytest.skip("the bundled model or the examples are not here")
    run = [sys.executable, "-m", "medvlm", "demo", "--device", "cpu", "--port", "7900"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}) as served:
        try:
            assert "Research use only" in served.stdout.readline()
            visit = Visit(browser, re.search(r"http://127\.0\.0\.1:\d+/", served.stdout.readline()).group(0))
            visit.page.locator("#mv-findings tbody tr").first.wait_for(timeout=60000)
            assert colours(visit.pixels()) > 0  # outlines of the anatomy at least
            visit.page.locator("#mv-question textarea").fill("Is there a pneumothorax?")
            visit.page.locator("#mv-ask").click()
            visit.text(".mv-answer", r"(yes|no)\s*\d+%")
            if os.environ.get("MEDVLM_SCREENSHOT"):  # for docs/demo.png
                save_screenshot(visit, os.environ["MEDVLM_SCREENSHOT"])
            choose(visit, "ct-dicom", "liver")
            visit.text(".mv-corner", "slice 11 of 20")
            visit.page.close()
            assert {u.split("/")[2].split(":")[0] for u in visit.urls if u.startswith("http")} == {"127.0.0.1"}
        finally:
            served.send_signal(signal.SIGTERM)
            _, complaints = served.communicate(timeout=30)
    assert served.returncode == 0
    assert "Traceback" not in complaints, complaints
    assert not list(tmp_path.glob("medvlm-*"))  # nothing stays behind
