"""``medvlm VERB``: each verb is one function that reads its arguments and one that does the work.

The work is imported when the verb runs, so ``medvlm show`` loads no torch. Exit status: 0 done, 1 the work failed, 2 bad
input or usage, 130 interrupted. What goes wrong is one line on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import __version__
from .errors import MedVLMError, UsageError

FAILED = {"CANNOT_WRITE", "SERVER_ERROR", "OUT_OF_MEMORY", "DISK_FULL"}
"""Codes that mean the input was good and the work failed (exit status 1)."""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def add_study(parser: Parser, many: bool = False) -> None:
    """The arguments that every verb that reads a study has."""
    parser.add_argument("study", nargs="+" if many else None, metavar="STUDY", help="file, folder, zip or DICOMDIR")
    parser.add_argument("--policy", default="strict", choices=("strict", "fill", "resample"), help="what to do about gaps and uneven slices (default: strict, refuse)")
    parser.add_argument("--study", dest="study_id", metavar="ID", help="which study, where there are several")
    parser.add_argument("--modality", help="what kind of image it is, where the file does not say: xray, ct, mr, fundus, ...")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def read_study(args: argparse.Namespace, source: Any = None):
    """The study that the arguments of :func:`add_study` name."""
    from .imaging.study import read

    return read(args.study if source is None else source, args.policy, modality=args.modality, study=args.study_id)


def show_arguments(parser: Parser) -> None:
    add_study(parser)


def show(args: argparse.Namespace) -> int:
    """what is in a study: images, geometry, warnings"""
    from .imaging import show

    study = read_study(args)
    if args.json:
        print(json.dumps(show.summary(study), allow_nan=False))
    else:
        show.table(study)
    return 0


def add_model(parser: Parser, image: bool = True) -> None:
    """The arguments that every verb that runs a model has."""
    parser.add_argument("--model", default="medvlm-tiny", help="a bundled model, a model's folder, hf:, openclip:, sam:, openai:, file: or blind: (default: medvlm-tiny)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--allow-upload", action="store_true", help="openai: models only: images and questions may be sent to that server")
    if image:
        parser.add_argument("--image", metavar="ID", help="which image, where the study holds several (see medvlm show)")


def analyze_arguments(parser: Parser) -> None:
    add_study(parser, many=True)
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for report.json, report.md, masks and preview.png")


def analyze(args: argparse.Namespace) -> int:
    """the main job: report.json, report.md, masks and preview.png of a study; one folder a study when there are several"""
    from .errors import ChoiceError, UsageError
    from .imaging.study import read
    from .reading import analyze, analyze_many, spoken

    study = None
    if len(args.study) > 1 and (args.study_id or args.image):
        raise UsageError("--study and --image choose within one STUDY", "BAD_ARGUMENT")
    if len(args.study) == 1:
        try:
            study = read(args.study[0], args.policy, modality=args.modality, study=args.study_id)
        except ChoiceError as e:
            if e.code != "MANY_STUDIES" or args.image:
                raise
    model = _model(args)
    if study is not None:
        record = analyze(study, model, args.out, args.image, {"policy": args.policy, "modality": args.modality})
        print(json.dumps(record) if args.json else f"{spoken(record)}\nwritten to {args.out}")
        return 0
    from tqdm import tqdm

    failed = 0
    for source, record in tqdm(analyze_many(args.study, model, args.out, args.policy, args.modality), desc="studies", unit="study", disable=args.json or None):
        failed += "error" in record
        print(json.dumps({"source": source, **record}) if args.json else f"{record.get('study')}: {record.get('error') or record['out_of_scope'] or 'read'}")
    if failed:
        print(f"medvlm: {failed} of the studies could not be read; see the lines above", file=sys.stderr)
    return 1 if failed else 0


def ask_arguments(parser: Parser) -> None:
    add_study(parser)
    add_model(parser)
    parser.add_argument("question", nargs="+", metavar="QUESTION", help="one or more questions, each in quotes")


def ask(args: argparse.Namespace) -> int:
    """answers to questions about a study, each with its probability"""
    from .predictors.base import check_question

    questions = [check_question(q) for q in args.question]
    study = read_study(args)
    model = _model(args)
    for question in questions:
        answer = model.ask(study, question, image=args.image)
        if args.json:
            print(json.dumps(answer.to_json(question)))
        else:
            places = "" if not answer.regions else "   seen in: " + ", ".join(r.label for r in answer.regions)
            print(f"{question}\n  {answer.text}   ({_percent(answer.probability)}){places}")
    if not args.json:
        print(_notice())
    return 0


def report_arguments(parser: Parser) -> None:
    add_study(parser)
    add_model(parser)


def report(args: argparse.Namespace) -> int:
    """findings and impression in sentences, each tied to what was looked for and where"""
    study = read_study(args)
    found = _model(args).report(study, image=args.image)
    if args.json:
        sentences = [{"section": s.section, "text": s.text, "findings": list(s.findings), "regions": [r.to_json() for r in s.regions]} for s in found.sentences]
        print(json.dumps({"study": study.id, "findings": found.findings, "impression": found.impression, "sentences": sentences,
                          "out_of_scope": found.out_of_scope, "notice": found.notice}))  # fmt: skip
    else:
        print(found)
    return 0


def segment_arguments(parser: Parser) -> None:
    add_study(parser)
    add_model(parser)
    parser.add_argument("target", nargs="+", metavar="TARGET", help='what to outline, e.g. "left lung"')
    parser.add_argument("--out", required=True, metavar="PATH", help="a .nii.gz or .png file for one target, a .dcm file (DICOM SEG) or a folder for several")


def segment(args: argparse.Namespace) -> int:
    """outlines of named targets on the image's own grid; an absent target gives an empty mask"""
    from pathlib import Path

    from .imaging.seg import save_seg

    study = read_study(args)
    model = _model(args)
    out = Path(args.out)
    single = len(args.target) == 1 and out.suffix
    found = [model.segment(study, target, image=args.image) for target in args.target]
    together = out.suffix == ".dcm"
    named = lambda r: r.label.replace(" ", "-") + (".png" if r.mask.ndim == 2 else ".nii.gz")  # noqa: E731
    paths = [out if single or together else out / named(result) for result in found]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        if together:
            save_seg(found[0].image, {r.label: r.mask for r in found}, out, (model.name, model.version))
        else:
            for result, path in zip(found, paths):
                result.save(path)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror})", "CANNOT_WRITE") from error
    for result, path in zip(found, paths):
        if args.json:
            print(json.dumps(result.region.to_json(str(path)) | {"voxels": int(result.mask.sum())}))
        else:
            state = f"{int(result.mask.sum())} pixels" if result.mask.any() else "absent: the mask is empty"
            print(f"{result.label}: {state} (present {result.present:.0%}) -> {path}")
    if not args.json:
        print(_notice())
    return 0


def classify_arguments(parser: Parser) -> None:
    add_study(parser)
    add_model(parser)
    parser.add_argument("label", nargs="+", metavar="LABEL", help="findings, e.g. pneumonia")


def classify(args: argparse.Namespace) -> int:
    """probability of each label; calibrated where the model is our own"""
    from .sample import rounded

    study = read_study(args)
    chances = _model(args).classify(study, args.label, image=args.image)
    if args.json:
        print(json.dumps({k: rounded(v) for k, v in chances.items()}))
    else:
        for label, chance in chances.items():
            print(f"{label}: {_percent(chance)}")
        print(_notice())
    return 0


def embed_arguments(parser: Parser) -> None:
    add_study(parser)
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="FILE.npy", help="float32 vector of unit length")


def embed(args: argparse.Namespace) -> int:
    """the vector that a model sees an image as, for search and comparison"""
    import numpy as np

    from .imaging.files import writing

    if not args.out.endswith(".npy"):
        raise UsageError(f"--out must end in .npy, not {args.out}", "BAD_ARGUMENT")
    study = read_study(args)
    vector = _model(args).embed(study, image=args.image)
    with writing(args.out) as part, open(part, "wb") as file:
        np.save(file, vector, allow_pickle=False)
    print(json.dumps({"study": study.id, "size": len(vector), "out": args.out}) if args.json else f"{len(vector)} numbers -> {args.out}")
    return 0


def train_arguments(parser: Parser) -> None:
    parser.add_argument("recipe", metavar="RECIPE|FILE.py", help="a recipe of `medvlm list recipes`, or a file that defines RECIPE")
    parser.add_argument("--scale", default="tiny", help="a scale of the recipe, such as paper (default: tiny)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="e.g. stages.see.lr=2e-5 or args.size=320; may be repeated")
    parser.add_argument("--data", default="data", metavar="DIR", help="folder of data sets: manifests, shards or published layouts (default: data)")
    parser.add_argument("--out", required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "no"), help="of the forward pass; auto: bf16 where the hardware has it")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that make batches; 0 makes them between the steps (default)")
    parser.add_argument("--save-minutes", type=float, default=5.0, metavar="M", help="minutes between two saved states (default: 5)")
    parser.add_argument("--shard", action="store_true", help="split the parameters over the processes that torchrun starts (FSDP2)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images and rows that are bad, and list them in RUN/skipped.jsonl")
    parser.add_argument("--allow-leaks", action="store_true", help="train although a patient or a picture is in two of train, val and test")
    parser.add_argument("--device", help="cpu to stay off the GPU, cuda to refuse a machine without one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def train(args: argparse.Namespace) -> int:
    """train a recipe; the run's folder holds log, state and, at the end, the model"""
    from .recipes.base import load, override
    from .train.loop import train

    recipe = override(load(args.recipe).at(args.scale), args.set)
    folder = train(recipe, args.data, args.out, args.resume, args.seed, args.device, args.precision, args.save_minutes, args.workers,
                   args.shard, args.skip_bad, args.allow_leaks)  # fmt: skip
    print(json.dumps({"model": str(folder)}) if args.json else f"the model is in {folder}")
    return 0


def add_clinical(parser: Parser) -> None:
    parser.add_argument("--clinical", nargs="+", default=[], metavar="NAME", help="report: scores that download weights, through RadEval (see medvlm/evaluate/clinical.py)")


def evaluate_arguments(parser: Parser) -> None:
    parser.add_argument("task", metavar="TASK", help="a task of `medvlm list tasks`, or a data set by name: every task that finds something in it")
    add_model(parser, image=False)
    parser.add_argument("--data", default="data", metavar="DIR|MANIFEST", help="a manifest.jsonl, a data set's folder, or a folder of them (default: data)")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="what is scored (default: test)")
    parser.add_argument("--out", required=True, metavar="RUN", help="folder of the run: predictions.jsonl, scores.json, report.html; one that was stopped goes on")
    parser.add_argument("--convention", metavar="NAME", help="how answers are scored (see medvlm list tasks); the first is the default")
    parser.add_argument("--limit", type=int, metavar="N", help="only N samples a task, chosen by lot; said in the scores")
    parser.add_argument("--no-image", action="store_true", help="ask everything again without the image, and score it beside")
    parser.add_argument("--prompts", metavar="NAME", help="zeroshot: a published set of prompts for class names (default: the one for the modality)")
    add_clinical(parser)
    parser.add_argument("--calibrate", action="store_true", help="predict val too, fit calibration there, and score the confidence after it")
    parser.add_argument("--ask-sure", action="store_true", help="ask the model after every answer how sure it is, and score that confidence too")
    parser.add_argument("--again", type=int, default=0, metavar="N", help="ask everything N times more at temperature 1, and score agreement and semantic entropy as confidence")
    parser.add_argument("--judge", metavar="MODEL", help="a model that judges open answers too, e.g. openai:http://localhost:8000/v1")
    parser.add_argument("--retry-errors", action="store_true", help="ask again what failed in an earlier start of this run")
    parser.add_argument("--json", action="store_true", help="print scores.json")


def evaluate(args: argparse.Namespace) -> int:
    """predict, then score: any model on any data, with intervals, baselines and a report to read"""
    from .evaluate import run
    from .predictors import load

    planned = run.plan(args.task, args.data, args.split, args.convention, args.limit, args.prompts)  # what cannot be scored is said before a model loads
    model = _model(args)
    words = load(f"blind:{args.model}", args.device, args.allow_upload) if args.no_image else None
    judge = _judge(load(args.judge, args.device, args.allow_upload)) if args.judge else None
    record = run.evaluate(args.task, model, args.data, args.out, args.split, args.convention, args.limit, words, args.retry_errors, judge, args.json, planned, args.calibrate, args.ask_sure, args.again, args.prompts, args.clinical)
    return _scored(record, args)


def score_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder that `medvlm evaluate` wrote")
    parser.add_argument("--data", metavar="DIR|MANIFEST", help="the data, if they have moved since")
    parser.add_argument("--convention", metavar="NAME", help="score by another convention than the run's")
    add_clinical(parser)
    parser.add_argument("--json", action="store_true", help="print scores.json")


def score(args: argparse.Namespace) -> int:
    """score saved predictions again, without the model"""
    from .evaluate import run

    args.out = args.run
    return _scored(run.score(args.run, args.data, args.convention, clinical=args.clinical), args)


def compare_arguments(parser: Parser) -> None:
    parser.add_argument("runs", nargs=2, metavar="RUN", help="two runs of one task on the same data; the first is A")
    parser.add_argument("--data", metavar="DIR|MANIFEST", help="the data, if they have moved since")
    parser.add_argument("--slices", action="store_true", help="compare parts of the set too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def compare(args: argparse.Namespace) -> int:
    """paired difference of two runs, with interval, p-values corrected over the scores, and wins, ties, losses"""
    from .evaluate.compare import compare, table

    found = compare(*args.runs, args.data, args.slices)
    print(json.dumps(found) if args.json else table(found), end="\n" if args.json else "")
    return 0


def export_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a bundled model or a model's folder")
    parser.add_argument("--to", required=True, choices=("llava", "open_clip", "onnx", "torch"), help="the form to write")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--drop-heads", action="store_true", help="llava: leave masks and classes behind, which it has no place for")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def export(args: argparse.Namespace) -> int:
    """a model in a form that loads without this package, compared with the model once written"""
    from pathlib import Path

    from .export import export
    from .predictors import find

    gaps = export(find(args.model), args.to, Path(args.out), args.drop_heads)
    print(json.dumps({"out": args.out, "largest_differences": gaps}) if args.json else "\n".join(f"{name}: largest difference {gap:.2g}" for name, gap in gaps.items()))
    return 0


def shard_arguments(parser: Parser) -> None:
    parser.add_argument("data", metavar="DATA", help="a manifest.jsonl, or a folder that holds one")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder; it is a data set wherever --data is asked for")
    parser.add_argument("--size", type=int, default=256, metavar="MB", help="a shard is closed at so many megabytes (default: 256) ...")
    parser.add_argument("--entries", type=int, default=10_000, metavar="N", help="... or rows (default: 10000)")
    parser.add_argument("--split", nargs="+", default=[], choices=("train", "val", "test"), help="only these (default: all rows)")
    parser.add_argument("--split-by-patient", metavar="TRAIN,VAL,TEST", help="give every row a split, e.g. 0.8,0.1,0.1, all of a patient the same; refused where a row names one")
    parser.add_argument("--seed", type=int, default=0, help="of --split-by-patient (default: 0)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out rows and texts that are bad, and list them in shards.json")
    parser.add_argument("--json", action="store_true", help="print shards.json")


def shard(args: argparse.Namespace) -> int:
    """a manifest as webdataset shards, checked row by row, to train from disks that are slow at small files"""
    from collections import Counter

    from .datasets.checks import SHARES
    from .datasets.shards import write

    shares = None
    if args.split_by_patient is not None:
        try:
            shares = dict(zip(SHARES, map(float, args.split_by_patient.split(",")), strict=True))
        except ValueError as error:
            raise UsageError(f"--split-by-patient takes three numbers, not {args.split_by_patient!r}", "BAD_ARGUMENT", "e.g. 0.8,0.1,0.1") from error
    index = write(args.data, args.out, args.size << 20, args.entries, args.split, shares, args.seed, [] if args.skip_bad else None, args.json)
    if args.json:
        print(json.dumps(index))
        return 0
    for bad in index["left_out"]:
        print(f"left out: {bad['message']} [{bad['code']}]", file=sys.stderr)
    rows: Counter[str] = Counter()
    for s in index["shards"]:
        rows[s["split"] or "no split"] += s["entries"]
    print(f"{', '.join(f'{n} rows of {split}' for split, n in rows.items())} in {len(index['shards'])} shards -> {args.out}; {len(index['left_out'])} left out")
    return 0


def demo_arguments(parser: Parser) -> None:
    parser.add_argument("study", nargs="*", metavar="STUDY", help="studies to open (default: the examples)")
    parser.add_argument("--model", default="medvlm-tiny", help="a bundled model or a model's folder")
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--port", type=int, default=7860)


def demo(args: argparse.Namespace) -> int:
    """the review page in a browser, on this machine only"""
    from .demo.app import launch

    launch(args.study, args.model, args.device, args.port)
    return 0


def list_arguments(parser: Parser) -> None:
    parser.add_argument("what", choices=("encoders", "projectors", "heads", "datasets", "tasks", "recipes", "models"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def list_parts(args: argparse.Namespace) -> int:
    """what there is to build with, one line each"""
    if args.what == "models":
        from .parts import names
        from .predictors import BUNDLED, SCHEMES

        kinds = names("predictors", "load")
        found = {p.parent.name: "bundled" for p in sorted(BUNDLED.glob("*/config.json"))} | {f"{s}:": kinds[file] for s, file in SCHEMES.items()}
    else:
        from .parts import names

        found = names("evaluate", "TASK") if args.what == "tasks" else names(args.what, {"recipes": "RECIPE", "datasets": "DATASET"}.get(args.what, "build"))
    if args.json:
        print(json.dumps(found))
    else:
        width = max(map(len, found), default=0)
        print("\n".join(f"{name:<{width}}  {about}" for name, about in found.items()) or f"there are no {args.what}")
    return 0


def doctor_arguments(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def doctor(args: argparse.Namespace) -> int:
    """what works here: versions, devices, codecs, extras and the bundled model"""
    from .doctor import examine, spoken

    found = examine()
    print(json.dumps(found) if args.json else spoken(found))
    return 1 if found["problems"] else 0


def _model(args: argparse.Namespace):
    from .predictors import load

    return load(args.model, args.device, args.allow_upload)


def _judge(model):
    """(prompts) -> texts: what a model answers to each; "" where it fails."""
    from .sample import Sample, Turn

    def say(prompts):
        return [p.text for p in model.predict([Sample(str(i), turns=(Turn("user", text),)) for i, text in enumerate(prompts)])]

    say.name = model.name
    return say


def _scored(record: dict[str, Any], args: argparse.Namespace) -> int:
    """Print what a run is worth; 1 where every answer failed."""
    if args.json:
        print(json.dumps(record))
    else:
        from pathlib import Path

        print((Path(args.out) / "table.md").read_text(encoding="utf-8"))
        print(f"{sum(record['errors'].values())} of {sum(record['samples'].values())} failed; report: {Path(args.out) / 'report.html'}")
        print(_notice())
    return 1 if sum(record["errors"].values()) == sum(record["samples"].values()) else 0


def _percent(probability: float) -> str:
    return f"{probability:.0%}" if probability == probability else "no probability given"


def _notice() -> str:
    from .sample import NOTICE

    return NOTICE


VERBS: dict[str, tuple[Callable[[Parser], None], Callable[[argparse.Namespace], int]]] = {
    "show": (show_arguments, show),
    "analyze": (analyze_arguments, analyze),
    "ask": (ask_arguments, ask),
    "report": (report_arguments, report),
    "segment": (segment_arguments, segment),
    "classify": (classify_arguments, classify),
    "embed": (embed_arguments, embed),
    "train": (train_arguments, train),
    "evaluate": (evaluate_arguments, evaluate),
    "score": (score_arguments, score),
    "compare": (compare_arguments, compare),
    "export": (export_arguments, export),
    "shard": (shard_arguments, shard),
    "demo": (demo_arguments, demo),
    "list": (list_arguments, list_parts),
    "doctor": (doctor_arguments, doctor),
}


def parser() -> Parser:
    top = Parser(prog="medvlm", description="Medical images and language: read, ask, segment, report, train and score. Research use only.")
    top.add_argument("--version", action="version", version=f"medvlm {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for name, (arguments, work) in VERBS.items():
        about = " ".join((work.__doc__ or "").split())
        verb = verbs.add_parser(name, help=about, description=about[:1].upper() + about[1:] + ".")
        arguments(verb)
        verb.set_defaults(work=work)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and give its exit status."""
    try:
        args = parser().parse_args(argv)
        status = args.work(args)
        sys.stdout.flush()
        return status
    except SystemExit as e:  # argparse: --help, --version, usage
        return e.code if isinstance(e.code, int) else 2
    except MedVLMError as e:
        return _fail(str(e), 1 if e.code in FAILED else 2)
    except BrokenPipeError:  # the reader has seen enough, as in: medvlm show STUDY | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except MemoryError:
        return _fail("there is not enough memory for this [MEMORY]: close other programs or lower medvlm.imaging.limits", 1)
    except Exception as e:
        out = getattr(args, "out", None)
        if isinstance(e, OSError) and e.filename and out and os.path.realpath(e.filename).startswith(os.path.realpath(out)):
            return _fail(f"{out} cannot be written ({e.strerror}) [CANNOT_WRITE]: give another --out", 1)
        if sys.flags.dev_mode:
            raise
        # the text of a foreign error may quote what is inside a patient's file: only its kind and place are said
        return _fail(f"{type(e).__name__} in {_place(e)} [INTERNAL]: a defect in medvlm; python -X dev -m medvlm shows where", 1)


def _place(error: Exception) -> str:
    here, place, step = os.path.dirname(__file__), "an unknown place", error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if file.startswith(here):
            place = f"{os.path.relpath(file, here)}:{step.tb_lineno}"
        step = step.tb_next
    return place


def _fail(line: str, status: int) -> int:
    print(f"medvlm: {line}", file=sys.stderr)
    return status
