"""The review page: one study, its findings with their outlines, a question box, the user's own files. Loopback only.

Nothing leaves the host: the page loads no font or script from elsewhere, and its Content-Security-Policy makes the browser
refuse any other address. Pictures travel inside the page, so no pixel of a patient has a file or an address of its own.
Uploaded files are moved at once into a private folder under neutral names, and vanish with the session.
"""

import functools
import os
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MedVLMError, UsageError
from ..imaging.files import Scratch
from ..imaging.scan import Image, Study, Volume
from ..imaging.study import MODALITIES, read, studies
from ..predictors.base import Model, check_question
from ..sample import NOTICE, Answer, Region, Report
from . import viewer

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
PORTS = 50
"""How many ports after the wanted one are tried."""
MAX_UPLOAD = "2gb"
STATIC = Path(__file__).parent / "static"
EXAMPLES = Path(__file__).parents[2] / "examples"
OUTLINE, FILLED = "outline", "filled"
POLICY = (b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
          b"img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
          b"form-action 'self'; frame-ancestors 'self'")  # fmt: skip
"""Gradio's own page needs inline scripts and compiled templates; every address but this host's is refused."""
PICK = """
const pick = e => { const row = e.target.closest('[data-pick]'); if (row) trigger('click', {pick: row.dataset.pick}); };
element.addEventListener('click', pick);
element.addEventListener('keydown', e => { if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); pick(e); } });
"""
SCROLL = """
let wanted = null, since = 0, rolled = 0, waiting = false;   // slices turned faster than they are drawn add up
const turn = (by, e) => {
  const stage = element.querySelector('.mv-stage');
  if (!stage || +stage.dataset.count < 2) return;
  e.preventDefault();
  if (Date.now() - since > 3000) wanted = null;   // an answer that never came
  const to = Math.min(Math.max((wanted ?? +stage.dataset.at) + by, 0), +stage.dataset.count - 1);
  since = Date.now();
  wanted = to;
  if (!waiting) setTimeout(() => { waiting = false; if (wanted !== null) trigger('select', {to: wanted}); }, 40);
  waiting = true;
};
watch('value', () => { if (element.querySelector('.mv-stage')?.dataset.at == wanted) wanted = null; });
element.addEventListener('wheel', e => {
  rolled += e.deltaY * (e.deltaMode ? 33 : 1);  // a notch is 100 to 120; the browser may join several, a touchpad splits one
  const by = Math.trunc(rolled / 100);
  if (by) rolled = 0;
  turn(by, e);
}, {passive: false});
element.addEventListener('keydown', e => {
  const by = {ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -10, PageDown: 10}[e.key];
  if (by) turn(by, e);
});
"""


FORGET = "() => document.querySelectorAll('input[type=file]').forEach(i => { i.value = ''; })"
"""The browser keeps the name of the chosen file in its form; it may be the patient's."""


class Case:
    """One image on the table: how it is drawn, what the model said of it, what was asked."""

    def __init__(self, study: Study, image: Image | Volume):
        self.study, self.image, self.scene = study, image, viewer.Scene(image)
        self.untold = isinstance(image, Image) and image.modality == "unknown"
        """The file does not say what kind of picture it is, so the reader may."""
        self.report: Report | None = None
        self.at = self.scene.slices // 2
        self.asked: list[tuple[str, Answer | str]] = []
        self.chosen = ""  # the finding, sentence or answer whose places are shown, as in knows()
        self.regions: dict[str, list[Region]] = {}
        self._masks: dict[str, np.ndarray] = {}

    def read(self, model: Model) -> None:
        """Ask the model for its report, once."""
        if self.report is None:
            try:
                self.report = model.report(self.study, image=self.image.id)
            except MedVLMError as error:  # a model without this verb, for one
                self.report = Report(out_of_scope=error.message)
            self.add(r for f in self.report.looked_for for r in f.regions)
            self.add(r for s in self.report.sentences for r in s.regions)

    def add(self, regions) -> None:
        """Take regions up as overlays; those of one label are one overlay."""
        for region in regions:
            there = self.regions.setdefault(region.label, [])
            if region.image == self.image.id and not any(region is r for r in there):
                there.append(region)
                self._masks.pop(region.label, None)

    def mask(self, label: str) -> np.ndarray:
        if label not in self._masks:
            self._masks[label] = self.scene.masks(self.regions[label])
        return self._masks[label]

    def usual(self) -> list[str]:
        """What is drawn until something is picked: the anatomy and the findings that are present."""
        state = {f.label: f.present for f in self.report.looked_for} if self.report else {}
        return [label for label in self.regions if state.get(label, True)]

    def knows(self, pick: Any) -> bool:
        """True when ``pick`` names a finding ("f2"), sentence ("s0") or answer ("a1") of this image."""
        count = {"f": len(self.report.looked_for), "s": len(self.report.sentences), "a": len(self.asked)} if self.report else {}
        return bool(re.fullmatch(r"[fsa]\d{1,4}", str(pick))) and int(pick[1:]) < count.get(pick[0], 0)

    def picked(self) -> Sequence[Region]:
        """The regions behind ``chosen``."""
        kind, k = self.chosen[:1], int(self.chosen[1:] or 0)
        if kind == "a":
            answer = self.asked[k][1]
            return answer.regions if isinstance(answer, Answer) else ()
        return {"f": self.report.looked_for, "s": self.report.sentences}[kind][k].regions

    def turn_to(self, labels: Sequence[str]) -> None:
        """Go to the slice on which most of the labels' masks lies, unless there is something on this one."""
        area = sum((self.mask(x).sum((1, 2)) for x in labels), np.zeros(self.scene.slices, int))
        if area.any() and not area[self.at]:
            self.at = int(area.argmax())


class Desk:
    """What one visitor has open. studies: {key: (name, study)} in the order they came."""

    def __init__(self, opened: Sequence[tuple[str, Study]]):
        self.studies: dict[str, tuple[str, Study]] = {}
        self.cases: dict[tuple[str, str], Case] = {}
        self.key, self.case = "", None
        for name, study in opened:
            self.put(name, study)

    def put(self, name: str, study: Study) -> str:
        key = str(len(self.studies))
        self.studies[key] = (name, study)
        return key

    def open(self, key: str, image: str | None = None) -> None:
        study = self.studies[key][1]
        chosen = study.image(image) if image else study.images[0]
        self.key = key
        if (key, chosen.id) not in self.cases:
            self.cases[key, chosen.id] = Case(study, chosen)
        self.case = self.cases[key, chosen.id]

    def turn(self, at: Any) -> bool:
        """Go to a slice; False when nothing is open."""
        if self.case is not None:
            self.case.at = min(max(int(at), 0), self.case.scene.slices - 1)
        return self.case is not None

    def tell(self, kind: str) -> None:
        """Say what kind of picture the open one is; it is read again as such. Studies are shared, so it becomes a copy."""
        if self.case is None or kind not in MODALITIES or not self.case.untold:
            return
        image, study = self.case.image, self.case.study
        copy = image.with_pixels(image.pixels)
        copy.modality = kind
        images = tuple(copy if i is image else i for i in study.images)
        told = Study(study.id, study.patient, images, study.report, study._warnings)
        if hasattr(study, "scratch"):
            told.scratch = study.scratch  # or the files of its other images would go
        self.studies[self.key] = (self.studies[self.key][0], told)
        self.cases = {k: c for k, c in self.cases.items() if k[0] != self.key}
        self.open(self.key, copy.id)
        self.case.untold = True


@functools.cache
def _private() -> Scratch:
    """The folder that uploads pass through; it ends with the program."""
    return Scratch()


def _gradio():
    """Gradio without telemetry and with its files in the private folder.

    Raises:
        MedVLMError: MISSING_EXTRA.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(_private().path)
    try:
        import gradio
    except ImportError as error:
        raise MedVLMError("the review page needs gradio, which is not installed", "MISSING_EXTRA",
                          'install the demo extra: pip install "medvlm-toolkit[demo]", or in a checkout pip install -e ".[demo]"') from error  # fmt: skip
    return gradio


def build(model: Model, opened: Sequence[tuple[str, Study]] = ()):
    """The page as gradio.Blocks, not yet served (see :func:`serve`).

    Args:
        model: answers everything that is asked; runs one request at a time.
        opened: (name, study) pairs to begin with; the first is shown. Names are shown, so they must not tell of a patient.
    """
    gr = _gradio()
    with gr.Blocks(title="medvlm review", fill_width=True, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        desk = gr.State(None)
        digest = f" · {model.sha256[:8]}" if model.sha256 else ""
        gr.HTML(f'<header class="mv-header"><b>medvlm review</b><span class="mv-model">{viewer.text(f"{model.name} {model.version}{digest}")}</span>'
                f'<span class="mv-banner" role="note">{viewer.text(NOTICE)}</span><span class="mv-draft">AI draft, not reviewed</span></header>')  # fmt: skip
        with gr.Row(elem_classes="mv-main"):
            with gr.Column(scale=8, min_width=480):
                with gr.Row(elem_classes="mv-bar-row"):
                    study_box = gr.Dropdown(label="Study", choices=[], interactive=True, scale=3, min_width=180, elem_id="mv-study")
                    image_box = gr.Dropdown(label="Image", choices=[], interactive=True, scale=3, min_width=180, elem_id="mv-image", visible=False)
                    kind_box = gr.Dropdown(label="Kind of picture", choices=[(viewer.UNKNOWN if m == "unknown" else m, m) for m in MODALITIES], interactive=True,
                                           scale=2, min_width=150, elem_id="mv-kind", visible=False)  # fmt: skip
                    upload = gr.UploadButton("Open files…", file_count="multiple", scale=1, min_width=150, elem_id="mv-upload")
                status = gr.HTML("", elem_id="mv-status")
                stage = gr.HTML("", elem_id="mv-view", js_on_load=SCROLL)
                slices = gr.Slider(1, 2, value=1, step=1, label="Slice", visible=False, elem_id="mv-slice", buttons=[])
                with gr.Row(elem_classes="mv-bar-row"):
                    preset = gr.Radio([viewer.FILE_WINDOW], value=viewer.FILE_WINDOW, label="Window", visible=False, scale=5, elem_id="mv-preset")
                    grey = gr.Checkbox(False, label="Invert grey", scale=1, min_width=120, elem_id="mv-invert")
                notes = gr.HTML("", elem_id="mv-notes")
            with gr.Column(scale=5, min_width=400):
                overlays = gr.CheckboxGroup([], label="Overlays", visible=False, elem_id="mv-overlays")
                with gr.Row(elem_classes="mv-bar-row", visible=False) as drawing:
                    style = gr.Radio([OUTLINE, FILLED], value=OUTLINE, label="Draw as", scale=2, min_width=160, elem_id="mv-style")
                    opacity = gr.Slider(0, 1, value=0.9, step=0.05, label="Opacity", scale=3, min_width=160, elem_id="mv-opacity", buttons=[])
                with gr.Tabs():
                    with gr.Tab("Findings"):
                        findings = gr.HTML("", elem_id="mv-findings", js_on_load=PICK)
                    with gr.Tab("Report"):
                        sentences = gr.HTML("", elem_id="mv-sentences", js_on_load=PICK)
                    with gr.Tab("Study"):
                        about = gr.HTML("", elem_id="mv-about")
                with gr.Row(elem_classes="mv-bar-row"):
                    question = gr.Textbox(label="Ask about this image", placeholder="Is there a pleural effusion?", max_lines=3, scale=5, elem_id="mv-question")
                    go = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="mv-ask")
                answers = gr.HTML("", elem_id="mv-answers", js_on_load=PICK)

        looks = [preset, grey, overlays, opacity, style]
        told = [findings, sentences, answers]
        shown = [stage, status]  # not the slider: it must not jump under the hand that moves it
        places = [*told, overlays, drawing, slices, *shown]
        page = [desk, study_box, image_box, kind_box, preset, grey, notes, about, *places]

        def picture(case: Case, preset: str, invert: bool, labels: Sequence[str], opacity: float, style: str) -> dict:
            colour = viewer.colours(list(case.regions))
            drawn = [(colour[x], case.mask(x)) for x in case.regions if x in labels]
            return {stage: viewer.stage(case.scene, case.at, preset, invert, drawn, opacity, style == FILLED)}

        def said(case: Case) -> dict:
            """Findings, sentences and answers with what is chosen in them."""
            colour, report = viewer.colours(list(case.regions)), case.report
            if report is None:
                return {findings: viewer.alarm("Reading…", "note"), sentences: "", answers: ""}
            refused = viewer.alarm(f"No reading: {report.out_of_scope}.", "refused") if report.out_of_scope else None
            return {findings: refused or viewer.findings_table(report, colour, case.chosen),
                    sentences: refused or viewer.sentence_list(report, colour, case.chosen),
                    answers: viewer.answer_list(case.asked, colour, case.chosen)}  # fmt: skip

        def choice(case: Case, labels: Sequence[str]) -> dict:
            there = bool(case.regions)
            return {overlays: gr.update(choices=list(case.regions), value=list(labels), visible=there), drawing: gr.update(visible=there)}

        def lit(case: Case, preset, invert, opacity, style) -> dict:
            """The page with the places of what is chosen, or the usual ones."""
            labels = list(dict.fromkeys(r.label for r in case.picked())) if case.chosen else case.usual()
            case.turn_to(labels)
            return said(case) | choice(case, labels) | picture(case, preset, invert, labels, opacity, style) | {slices: case.at + 1}

        def opened_now(now: Desk, invert: bool, opacity: float, style: str) -> dict:
            """The page after another image was opened: its picture at once, the reading later."""
            names, case = [(name, key) for key, (name, _) in now.studies.items()], now.case
            if case is None:
                return {desk: now, study_box: gr.update(choices=names), stage: viewer.stage(None, 0, "", False, (), 0, False)}
            images = [(f"{i.id} ({viewer.kind(i)}, {' × '.join(map(str, i.shape[1:]))})", i.id) for i in case.study.images]
            scene = case.scene
            return {
                desk: now, status: "", study_box: gr.update(choices=names, value=now.key),
                image_box: gr.update(choices=images, value=case.image.id, visible=len(images) > 1),
                kind_box: gr.update(value=case.image.modality, visible=case.untold),
                preset: gr.update(choices=list(scene.presets), value=viewer.FILE_WINDOW, visible=len(scene.presets) > 1),
                grey: gr.update(visible=case.image.shape[0] == 1),
                notes: viewer.notes(case.study, scene), about: viewer.about_study(case.study, case.image),
                **lit(case, viewer.FILE_WINDOW, invert, opacity, style),
                slices: gr.update(maximum=max(2, scene.slices), value=case.at + 1, visible=scene.slices > 1),
            }  # fmt: skip

        @_said_on(status)
        def begin(invert, opacity, style):
            fresh = Desk(opened)
            if fresh.studies:
                fresh.open("0")
            return opened_now(fresh, invert, opacity, style)

        @_said_on(status)
        def open_study(now, key, *looks):
            _alive(now).open(key)
            return opened_now(now, *looks)

        @_said_on(status)
        def open_image(now, image, *looks):
            _alive(now).open(now.key, image)
            return opened_now(now, *looks)

        @_said_on(status)
        def tell_kind(now, kind, *looks):
            _alive(now).tell(kind)
            return opened_now(now, *looks)

        @_said_on(status)
        def receive(now, files, *looks):
            found = take(files or [])
            keys = [_alive(now).put(_name(study, "upload"), study) for study in found if study.images]
            now.open(keys[0])
            refused = [w for study in found if not study.images for w in study.warnings]
            return opened_now(now, *looks) | {status: viewer.alarm("; ".join(refused))}

        @_said_on(status, {findings: viewer.alarm("No reading: the model failed.", "refused")})
        def report(now, preset, invert, labels, opacity, style):
            case = _alive(now).case
            if case is None:
                return {}
            case.read(model)
            if now.case is not case:  # another image was opened meanwhile
                return {}
            # what was read before is shown too: a browser that asks twice has put "Reading…" over the first answer
            return lit(case, preset, invert, opacity, style) | {notes: viewer.notes(case.study, case.scene)}

        @_said_on(status)
        def draw(now, *looks):
            case = _alive(now).case
            return {} if case is None else picture(case, *looks)

        @_said_on(status)
        def slide(now, number, *looks):
            return draw(now, *looks) if _alive(now).turn(number - 1) else {}

        @_said_on(status)
        def turn(now, preset, invert, labels, opacity, style, event: gr.EventData):
            if not _alive(now).turn(event.to):
                return {}
            return draw(now, preset, invert, labels, opacity, style) | {slices: now.case.at + 1}

        @_said_on(status)
        def show_places(now, preset, invert, opacity, style, event: gr.EventData):
            case = _alive(now).case
            if case is None or not case.knows(event.pick):
                return {}
            case.chosen = "" if case.chosen == event.pick else event.pick  # a second click gives the usual view back
            return lit(case, preset, invert, opacity, style)

        @_said_on(status)
        def ask(now, words, preset, invert, labels, opacity, style):
            case = _alive(now).case
            if case is None:
                return {status: viewer.alarm("Open a study first.")}
            words = check_question(words)
            clear = {question: "", status: ""}
            try:
                answer = model.ask(case.study, words, image=case.image.id)
                case.add(answer.regions)
            except MedVLMError as error:
                answer = f"No answer: {error.message}."
            case.asked.append((words, answer))
            if now.case is not case:
                return clear
            if isinstance(answer, str) or not answer.regions:
                return said(case) | clear
            case.chosen = f"a{len(case.asked) - 1}"
            return lit(case, preset, invert, opacity, style) | clear

        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        waits = {"api_visibility": "private", "show_progress": "minimal"}
        busy = {**waits, "concurrency_limit": 1, "concurrency_id": "model"}
        still = [grey, opacity, style]
        for opening in (
            blocks.load(begin, still, page, **hidden),
            study_box.input(open_study, [desk, study_box, *still], page, trigger_mode="always_last", **hidden),
            image_box.input(open_image, [desk, image_box, *still], page, trigger_mode="always_last", **hidden),
            kind_box.input(tell_kind, [desk, kind_box, *still], page, trigger_mode="always_last", **hidden),
            upload.upload(receive, [desk, upload, *still], page, **waits, show_progress_on=[stage]),
        ):
            opening.then(report, [desk, *looks], [*places, notes], trigger_mode="multiple", **busy, show_progress_on=[findings])
        upload.upload(None, js=FORGET)
        fast = {**hidden, "concurrency_limit": 1, "concurrency_id": "draw"}  # one lane: what was asked last is shown last
        slices.input(slide, [desk, slices, *looks], shown, trigger_mode="always_last", **fast)
        gr.on([c.input for c in looks], draw, [desk, *looks], shown, trigger_mode="always_last", **fast)
        # always_last would send the data of the first of several events again
        stage.select(turn, [desk, *looks], [slices, *shown], trigger_mode="multiple", **fast)
        gr.on([c.click for c in told], show_places, [desk, preset, *still], places, trigger_mode="multiple", **fast)
        gr.on([question.submit, go.click], ask, [desk, question, *looks], [*places, question], **busy, show_progress_on=[answers])
    return blocks


def serve(blocks, port: int = 0) -> str:
    """Serve a page of :func:`build` on this machine only, in the background; gives its address. End it with ``blocks.close()``.

    port: the first that is free from here on; 0 for any.
    """
    gr = _gradio()
    font = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = gr.themes.Base(primary_hue="sky", neutral_hue="slate", font=font, font_mono=["ui-monospace", "Consolas", "monospace"])
    blocks.queue(max_size=64)
    _, address, _ = blocks.launch(
        server_name=HOST, server_port=free_port(port), share=False, inbrowser=False, prevent_thread_lock=True, quiet=True,
        show_error=False, footer_links=[], run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False,
        allowed_paths=[], max_file_size=MAX_UPLOAD, state_session_capacity=32, strict_cors=True, theme=theme, root_path="",
        css=(STATIC / "page.css").read_text(encoding="utf-8") + _swatches(), js="() => { document.body.classList.add('dark'); }",
        app_kwargs={"middleware": [(_Sealed, (), {})], "docs_url": None, "redoc_url": None, "openapi_url": None},
    )  # fmt: skip
    return address


def launch(sources: Sequence[str] = (), model: str | Path | Model = "medvlm-tiny", device: str | None = None, port: int = 7860) -> None:
    """Open studies (the examples when none is named), serve the page and stay until interrupted.

    Raises:
        MedVLMError: a study or the model cannot be read, gradio is missing, or no port is free; before anything is served.
    """
    _gradio()
    opened = [(_name(s, "study"), s) for source in sources for s in several(source)] if sources else examples()
    for refused in (s for _, s in opened if not s.images):
        print("\n".join(f"{refused.id} is left out: {w}" for w in refused.warnings), file=sys.stderr)
    opened = [(n, s) for n, s in opened if s.images]
    if not isinstance(model, Model):
        from ..predictors import load

        model = load(model, device)
    blocks = build(model, opened)
    address = serve(blocks, port)
    print(f"{NOTICE}\nThe review page is at {address} (on this machine only); Ctrl-C ends it.", flush=True)
    ended = threading.Event()
    if threading.current_thread() is threading.main_thread():  # a polite kill removes the uploads too
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        ended.wait()
    except KeyboardInterrupt:
        print()
    finally:
        blocks.close(verbose=False)


def examples() -> list[tuple[str, Study]]:
    """(name, study) of each folder of ``examples`` beside the package; none where it is installed without them."""
    found = []
    if not (EXAMPLES.parent / "pyproject.toml").is_file():  # beside an installed package another's folder may bear this name
        return found
    for folder in sorted(p for p in EXAMPLES.glob("*") if p.is_dir() and p.name != "expected"):
        found += [(f"example: {folder.name}", study) for study in several(folder)]
    return found


def several(source) -> list[Study]:
    """The study behind a source, or each of them where there are many."""
    try:
        return [read(source)]
    except MedVLMError as error:
        if error.code != "MANY_STUDIES":
            raise
    return list(studies(source))


def take(files: Sequence[str]) -> list[Study]:
    """The studies in uploaded files, which are moved to a private folder under neutral names.

    Files that share a stem keep sharing one, as header and data do.

    Raises:
        MedVLMError: nothing could be read.
    """
    scratch, stems, paths, moved = Scratch(), {}, [], set()
    for file in map(Path, files):
        if file in moved:  # files of the same content share a place
            continue
        moved.add(file)
        ending = re.search(r"(\.[A-Za-z][A-Za-z0-9]{0,7})?(\.gz)?$", file.name).group(0)
        number = stems.setdefault(file.name[: len(file.name) - len(ending)], len(stems) + 1)
        path = scratch.path / f"{number:06d}{ending.lower()}"
        if path.exists():  # the same name from two folders
            path = scratch.path / f"{number:06d}-{len(paths)}{ending.lower()}"
        shutil.move(file, path)
        paths.append(str(path))
    for file in moved:
        shutil.rmtree(file.parent, ignore_errors=True)
    found = several(paths[0] if len(paths) == 1 else paths)
    for study in found:
        study.scratch = scratch  # pixels are read later; the files go when the study does
    if not any(study.images for study in found):
        raise UsageError("; ".join(w for s in found for w in s.warnings) or "nothing was uploaded", "BAD_ARGUMENT", "open DICOM, NIfTI, PNG, JPEG or TIFF files")
    return found


def free_port(wanted: int) -> int:
    """The first free port of this machine from ``wanted`` on.

    Raises:
        UsageError: BAD_ARGUMENT when there is none.
    """
    if not 0 <= wanted <= 65535:
        raise UsageError(f"a port is a number from 0 to 65535, not {wanted}", "BAD_ARGUMENT", "try --port 7860")
    for port in range(wanted, min(wanted + PORTS, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            if wanted not in (0, port):
                print(f"port {wanted} is in use; taking {port}", file=sys.stderr)
            return probe.getsockname()[1]
    raise UsageError(f"no port from {wanted} to {wanted + PORTS - 1} is free", "BAD_ARGUMENT", "choose another --port")


def _name(study: Study, kind: str) -> str:
    """A name for a study that tells nothing of the patient: where it comes from, what it holds, its id."""
    kinds = ", ".join(dict.fromkeys(i.modality for i in study.images if i.modality != "unknown")) or "kind not stated"
    return f"{kind}: {kinds} · {study.id}"


def _alive(desk: Desk | None) -> Desk:
    if desk is None:
        raise UsageError("this session has ended", "BAD_ARGUMENT", "reload the page")
    return desk


def _said_on(status, besides: dict | None = None) -> Callable:
    """A handler whose errors become one line on the page; a foreign error says only its kind, for its text may quote a file.

    besides: what else of the page changes then.
    """

    def wrap(handler: Callable) -> Callable:
        @functools.wraps(handler)
        def guarded(*args: Any):
            import gradio

            try:
                return handler(*args) or gradio.skip()  # an empty dict is no answer to gradio
            except MedVLMError as error:
                return {**(besides or {}), status: viewer.alarm(str(error))}
            except Exception as error:
                if sys.flags.dev_mode:
                    raise
                line = f"{type(error).__name__} [INTERNAL]: a defect in medvlm; python -X dev -m medvlm demo shows where"
                return {**(besides or {}), status: viewer.alarm(line)}

        return guarded

    return wrap


def _swatches() -> str:
    """The colour of each overlay beside its checkbox."""
    count = len(viewer.COLOURS)
    return "".join(f"#mv-overlays label:nth-of-type({count}n+{i + 1})::after{{background:{c}}}\n" for i, c in enumerate(viewer.COLOURS))


class _Sealed:
    """Answers only those who ask for this host by name, and tells the browser to stay on it.

    A foreign site that points its own name at 127.0.0.1 would else read the page through its visitor's browser.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def sealed(message):
            if message["type"] == "http.response.start":
                extra = ((b"content-security-policy", POLICY), (b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff"))
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        asked = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        if scope["type"] != "lifespan" and asked.rpartition(":")[0] not in NAMES:
            await sealed({"type": "http.response.start", "status": 421, "headers": []})
            await sealed({"type": "http.response.body", "body": b"This page is served to this machine only."})
            return
        await self.app(scope, receive, sealed)
