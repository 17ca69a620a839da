"""Predict, then score: one run is a folder that anyone can score again without the model.

``run.json`` says what was asked of whom, ``predictions.jsonl`` what was answered (one row a sample, errors included),
``scores.json``, ``table.md``, ``table.tex`` and ``report.html`` what it is worth. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .. import __version__, parts
from ..datasets.base import Data, open_data
from ..datasets.predictions import append_predictions, mend, read_predictions, rows
from ..errors import MedVLMError, ModelError, UsageError
from ..imaging.files import writing
from ..sample import NOTICE, Prediction, Sample
from . import blind, page, trust, zeroshot
from .base import Task
from .gaps import gaps
from .statistics import DRAWS, SEED, Score, mean_score, statistic_score

SLICES = ("dataset", "modality", "organ", "type", "category", "lang")
"""What scores are told apart by, read from ``Sample.meta``; a sample may belong to several categories."""
EXTRA = 6
"""Tasks of this rank or higher run only when they are asked for by name: they predict every question many times."""


NO_IMAGE, VAL, SURE, AGAIN = (f"predictions-{what}.jsonl" for what in ("no-image", "val", "sure", "again"))
"""Beside predictions.jsonl: the same without the image, the answers of val, how sure the model says it is, more answers."""
LOTS, LOTS_UP_TO = 20, 350
"""Lots drawn for the random baseline, and up to how many samples; fewer where there are more."""


TWINS = ("of", "negation_of", "order_of", "paraphrase_of")
"""What names the sample that another one is a copy or a twin of, in its ``meta``."""


class Predictor(Protocol):
    """All that a run needs of a model."""

    name: str

    def predict(self, samples: Sequence[Sample]) -> list[Prediction]: ...


@dataclass(frozen=True)
class Job:
    """One task of a run. samples: as the metric sees them; ids: theirs in predictions.jsonl, in the same order."""

    name: str
    task: Task
    convention: str
    samples: list[Sample]
    ids: list[str]

    def asked(self) -> list[Sample]:
        return [replace(s, id=i) for s, i in zip(self.samples, self.ids)]

    def predictions(self, file: Path) -> list[Prediction]:
        return [replace(p, id=s.id) for p, s in zip(read_predictions(file, self.asked()), self.samples)]


def plan(name: str, where: str | Path, split: str = "test", convention: str | None = None, limit: int | None = None,
         prompts: str | None = None) -> tuple[Data, list[Job]]:  # fmt: skip
    """What a run predicts. name: a task, or a data set, which is scored by every task that finds something in it.

    limit: only about so many samples of each task, chosen by lot with ``SEED``; pairs stay whole. prompts: the published set
    (``zeroshot.PROMPTS``) that a CLIP model is given for class names, in place of the one for the modality.

    Raises:
        UsageError: BAD_ARGUMENT for an unknown convention and a limit below 1. ModelError: NO_SUCH_DATA, NO_SAMPLES.
    """
    known: dict[str, Task] = parts.every("evaluate", "TASK")
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} leaves nothing to score", "BAD_ARGUMENT", "give 1 or more, or leave it out")
    if prompts is not None and prompts not in zeroshot.PROMPTS:
        raise UsageError(f"there are no prompts {prompts!r}", "BAD_ARGUMENT", f"use {', '.join(zeroshot.PROMPTS)}")
    try:
        data = open_data(where, None if name in known else name)
    except ModelError as e:
        if name in known or e.code != "NO_SUCH_DATA":
            raise
        raise ModelError(f"{name!r} is neither a task ({', '.join(known)}) nor a data set here: {e.message}", e.code, e.hint) from e
    read = _reader(data, split)
    read(split)  # so that an empty split is said before tasks look for other things
    wanted = [name] if name in known else [t for t in data.tasks or known if data.tasks or known[t].rank < EXTRA]
    jobs: list[Job] = []
    taken: dict[str, str] = {}
    for task in sorted(wanted, key=lambda t: known[t].rank):
        samples = known[task].prepare(read, split)
        if len(wanted) > 1:  # probes made for the purpose are a task of their own, to be asked for by name
            samples = [s for s in samples if "balanced" not in s.meta]
        if not samples:
            continue
        samples = _by_lot(samples, limit) if limit is not None else samples
        if prompts is not None:
            samples = [replace(s, meta={**s.meta, "prompts": prompts}) if s.verb == "classify" else s for s in samples]
        # one answer serves every task that asks the same; where a task asks something else of it, its name tells them apart
        if len({s.id for s in samples}) < len(samples):
            twice = next(i for i, n in Counter(s.id for s in samples).items() if n > 1)
            raise ModelError(f"two samples have the id {twice!r}", "BAD_DATASET", "give every question, mask and row an id of its own")
        ids = [s.id if taken.setdefault(s.id, f"{s.verb} {bool(s.masks)}") == f"{s.verb} {bool(s.masks)}" else f"{s.id}#{task}" for s in samples]
        jobs.append(Job(task, known[task], _convention(known[task], task, convention, len(wanted) == 1), samples, ids))
    if not jobs:
        what = f"the task {name!r}" if name in known else "any task"
        raise ModelError(f"the data hold nothing for {what} in split {split!r}", "NO_SAMPLES", "medvlm list tasks says what each needs")
    return data, jobs


def _by_lot(samples: list[Sample], limit: int) -> list[Sample]:
    """About ``limit`` samples: what is scored together (all pairs of an image; a sample and its altered copies or twins) is drawn
    together, and what something is fitted on (``meta["fit"]``) stays."""
    groups: dict[str, list[int]] = {}
    own = {s.id: f"{s.meta.get('dataset', '')}/{s.meta.get('row', s.group)}" if s.group else str(s.meta.get("linked_id") or s.id) for s in samples}
    kept = [i for i, s in enumerate(samples) if s.meta.get("fit")]
    limit += len(kept)
    for i, s in enumerate(samples):
        if not s.meta.get("fit"):
            first = next((own[x] for k in TWINS if (x := s.meta.get(k)) in own), own[s.id])
            groups.setdefault(first, []).append(i)
    for k in np.random.default_rng(SEED).permutation(len(groups)):
        if len(kept) >= limit:
            break
        kept += list(groups.values())[k]
    return [samples[i] for i in sorted(kept)]


def _reader(data: Data, scored: str, words: bool = False) -> Callable[[str], list[Sample]]:
    seen: dict[str, list[Sample]] = {}

    def read(split: str) -> list[Sample]:
        if split not in seen:
            seen[split] = data.scored(split) if split == scored else data.samples(split, words=words)
        return seen[split]

    return read


def _convention(task: Task, name: str, wanted: str | None, alone: bool) -> str:
    first = next(iter(task.conventions))
    if wanted is None:
        return first
    if wanted.split("/")[0] in task.conventions:
        return wanted
    if not alone:
        return first
    raise UsageError(f"task {name} has no convention {wanted!r}; it has {', '.join(task.conventions)}", "BAD_ARGUMENT")


def evaluate(name: str, model: Predictor, where: str | Path, out: str | Path, split: str = "test", convention: str | None = None,
             limit: int | None = None, words: Predictor | None = None, retry_errors: bool = False, judge: Callable | None = None,
             quiet: bool = False, planned: tuple[Data, list[Job]] | None = None, calibrate: bool = False, ask_sure: bool = False,
             again: int = 0, prompts: str | None = None, clinical: Sequence[str] = ()) -> dict[str, Any]:  # fmt: skip
    """Predict what is not yet in ``out/predictions.jsonl``, then :func:`score`.

    Args:
        words: the same model without the image, predicted and scored beside it ("no image").
        retry_errors: ask again where the file holds an error.
        judge: (prompts) -> texts, for open answers; its scores come beside the others.
        planned: what :func:`plan` gave for these arguments, where it was called before.
        calibrate: predict val too, fit temperature, Platt and isotonic calibration there, and score the confidence after each.
        ask_sure: ask the model after every answer how sure it is, and score that confidence too.
        prompts: see :func:`plan`. clinical: see :func:`score`.
        again: ask everything so many times more at ``temperature`` 1, and score how far those answers agree as confidence.

    Raises:
        UsageError: RUN_DIFFERS when ``out`` holds another run; BAD_ARGUMENT where a model that cannot be asked at a
            temperature is to be asked again, and where calibration would be fitted on what is scored.
    """
    out = Path(out)
    if again < 0:
        raise UsageError(f"nothing can be asked {again} times more", "BAD_ARGUMENT", "give 1 or more, or leave it out")
    if again and not hasattr(model, "temperature"):
        raise UsageError(f"{model.name} has no temperature, so asking it again tells nothing", "BAD_ARGUMENT", "leave --again out")
    data, jobs = planned or plan(name, where, split, convention, limit, prompts)
    val = [j for j in plan(name, where, "val", convention, limit)[1] if j.task.blind] if calibrate else []
    if {i for j in val for i in j.ids} & {i for j in jobs for i in j.ids}:
        raise UsageError("calibration is fitted on val, and that is what is scored here", "BAD_ARGUMENT", "score another split, in data whose rows name theirs")
    about = {
        "task": name, "data": str(Path(where).resolve()), "split": split, "convention": convention, "limit": limit, "seed": SEED, "prompts": prompts,
        "fingerprint": data.fingerprint,
        "model": {k: getattr(model, k, None) for k in ("name", "version", "sha256")},
    }  # fmt: skip
    _begin(out, about)
    if hasattr(model, "learn"):
        model.learn([s for job in jobs for s in answers_of_train(job, data, split)])
    if retry_errors:
        _forget_sure(out)
    left_out = _predict(jobs, model, out / "predictions.jsonl", retry_errors, quiet)
    if words is not None:
        _predict([j for j in jobs if j.task.blind], words, out / NO_IMAGE, retry_errors, quiet, "no image")
    if calibrate:
        _predict(val, model, out / VAL, retry_errors, quiet, "val")
    if ask_sure:
        _predict([_sure(j, j.predictions(out / "predictions.jsonl")) for j in jobs if j.task.blind], model, out / SURE, retry_errors, quiet, "how sure")
    if again:
        _note(out, again=again)
        before, model.temperature = model.temperature, 1.0
        try:
            _predict([_again(j, again) for j in jobs if j.task.blind], model, out / AGAIN, retry_errors, quiet, "again")
        finally:
            model.temperature = before
    if left_out:
        _note(out, left_out_predictions=left_out)
    return score(out, judge=judge, planned=(data, jobs), clinical=clinical)


def _begin(out: Path, about: dict[str, Any]) -> None:
    file = out / "run.json"
    out.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        keys = [k for k in about if k not in ("data", "convention") and before.get(k) != about[k]]
        if keys:
            said = "; ".join(f"{k}: {before.get(k)} there, {about[k]} now" for k in keys)
            raise UsageError(f"the folder holds another run ({said})", "RUN_DIFFERS", "give a new --out")
        about = before | about
    elif any(out.iterdir()):
        raise UsageError(f"the folder {out.name!r} is not empty and holds no run", "RUN_DIFFERS", "give a new --out")
    _write(file, json.dumps({**about, "medvlm": __version__}, indent=1))


def _note(out: Path, **more: Any) -> None:
    file = out / "run.json"
    _write(file, json.dumps(json.loads(file.read_text(encoding="utf-8")) | more, indent=1))


def _write(file: Path, text: str) -> None:
    with writing(file) as part:
        part.write_text(text, encoding="utf-8")


def _forget_sure(out: Path) -> None:
    """Drop what was said of answers that failed, and are asked for again."""
    file = out / SURE
    if file.is_file() and (out / "predictions.jsonl").is_file():
        failed = {f"{i}@sure" for i, row in rows(out / "predictions.jsonl").items() if row.get("error")}
        _write(file, "".join(f"{line}\n" for line in file.read_text(encoding="utf-8").splitlines() if line.strip() and json.loads(line)["id"] not in failed))


def _predict(jobs: Sequence[Job], model: Predictor, file: Path, retry_errors: bool, quiet: bool, what: str = "predict") -> int:
    """Ask for what is missing, image by image, each group safe on disk before the next. Gives how many rows of a file of
    saved predictions belong to no sample."""
    from tqdm import tqdm

    mend(file)
    done = rows(file) if file.is_file() else {}
    if retry_errors and any(row.get("error") for row in done.values()):
        kept = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip() and not json.loads(line).get("error")]
        _write(file, "".join(f"{line}\n" for line in kept))
        done = rows(file)
    asked = {s.id: s for job in jobs for s in job.asked()}
    groups: dict[tuple, list[Sample]] = {}
    for sample in asked.values():
        if sample.id not in done:
            groups.setdefault((sample.verb, *map(id, sample.images.values())) if sample.images else (sample.id,), []).append(sample)
    with tqdm(total=len(asked), initial=len(asked.keys() & done.keys()), desc=what, unit="sample", disable=quiet or None) as bar:
        for group in groups.values():
            append_predictions(file, ask(model, group))
            for image in group[0].images.values():
                image.release()
            bar.update(len(group))
    file.touch()
    return len(getattr(model, "rows", {}).keys() - asked.keys())


def ask(model: Predictor, samples: Sequence[Sample]) -> list[Prediction]:
    """One prediction a sample, in order. What a model raises, or answers to something else, is a row with an error."""
    began = time.perf_counter()
    try:
        found = list(model.predict(samples))
        if [p.id for p in found] == [s.id for s in samples]:
            return found
        error = f"BAD_PREDICTIONS: {len(found)} predictions that are not those of the {len(samples)} samples, one each, in order"
    except MedVLMError as e:
        error = f"{e.code}: {e.message}"
    except Exception as e:  # a foreign text may quote the patient's file
        error = f"INTERNAL: {type(e).__name__}"
    if len(samples) == 1:
        return [Prediction(samples[0].id, error=error, seconds=time.perf_counter() - began)]
    return [p for s in samples for p in ask(model, [s])]


def score(out: str | Path, where: str | Path | None = None, convention: str | None = None, judge: Callable | None = None,
          planned: tuple[Data, list[Job]] | None = None, clinical: Sequence[str] = ()) -> dict[str, Any]:  # fmt: skip
    """Score the predictions of a run again, without its model; writes scores.json, the tables and report.html.

    where: the data, if they have moved. convention: another than the run's. clinical: scores of reports that need downloaded
    weights, by the names of :mod:`.clinical`.

    Raises:
        UsageError: NOT_A_RUN; DATA_DIFFER when the data are not those that were predicted.
    """
    out = Path(out)
    about = run_of(out)
    data, jobs = planned or plan(about["task"], where or about["data"], about["split"], convention or about["convention"], about["limit"], about.get("prompts"))
    if data.fingerprint != about["fingerprint"]:
        raise UsageError("the data have changed since they were predicted", "DATA_DIFFER", "give --data with the data of the run, or predict again")
    results, calibration, val = [], {}, {}
    if (out / VAL).is_file():
        val = {j.name: j for j in plan(about["task"], where or about["data"], "val", convention or about["convention"], about["limit"])[1] if j.task.blind}
    for job in jobs:
        predictions = job.predictions(out / "predictions.jsonl")
        other: dict[str, list[float]] = {}
        if job.task.blind and (out / SURE).is_file():
            other["asked"] = [trust.said_sure(p.text) for p in _sure(job, predictions).predictions(out / SURE)]
        if job.task.blind and (out / AGAIN).is_file():
            texts = [p.text for p in _again(job, about["again"]).predictions(out / AGAIN)]
            drawn = [texts[k : k + about["again"]] for k in range(0, len(texts), about["again"])]
            other["agreement"] = [trust.agreement(p.text, texts) for p, texts in zip(predictions, drawn)]
            other["semantic entropy"] = [trust.semantic_confidence(texts) for texts in drawn]
        fitted = calibrators(val[job.name], val[job.name].predictions(out / VAL)) if job.name in val else []
        calibration |= {job.name: [c.to_json() for c in fitted]} if fitted else {}
        scores, sure, slices = told(job, predictions, judge, fitted, other)
        if clinical and job.name == "report":
            from .clinical import clinical as weighed

            scores += _named(job, weighed(job.samples, predictions, clinical, job.convention))
        baselines: dict[str, list[Score]] = {}
        if job.task.blind:
            train = answers_of_train(job, data, about["split"])
            for kind, say in blind.BASELINES.items():
                if kind == "random":
                    baselines[kind] = _named(job, _mean_of_lots(job, train))
                elif kind != "prior" or any(s.answer for s in train):
                    baselines[kind] = _named(job, job.task.score(job.samples, say(job.samples, train), job.convention))
        if job.task.blind and (out / NO_IMAGE).is_file():
            baselines["no image"] = _named(job, job.task.score(job.samples, job.predictions(out / NO_IMAGE), job.convention))
        results.append(page.Result(job.name, job.convention, job.task.conventions, job.samples, predictions, scores, sure, slices, baselines,
                                   job.task.beside(job.samples, predictions, job.convention) if job.task.beside else {}))  # fmt: skip
    record = {
        "run": about | {"convention": {j.name: j.convention for j in jobs}}, "draws": DRAWS, "seed": SEED,
        "samples": {r.task: len(r.samples) for r in results}, "errors": {r.task: sum(p.error is not None for p in r.predictions) for r in results}, "calibration": calibration,
        "scores": [s.to_json() for r in results for s in (*r.scores, *r.trust, *r.slices)],
        "baselines": {k: [s.to_json() for r in results for s in r.baselines.get(k, ())] for k in dict.fromkeys(k for r in results for k in r.baselines)},
        "notice": NOTICE,
    }  # fmt: skip
    _write(out / "scores.json", json.dumps(record, indent=1, allow_nan=False))
    _write(out / "table.md", page.markdown(results))
    _write(out / "table.tex", page.latex(results))
    _write(out / "report.html", page.html(record, results))
    return record


def _mean_of_lots(job: Job, train: Sequence[Sample]) -> list[Score]:
    """What choosing by lot is worth on average: one lot over a few questions may be far from it."""
    lots = max(1, min(LOTS, 20 * LOTS_UP_TO // len(job.samples)))
    tried = [job.task.score(job.samples, blind.random(job.samples, train, SEED + k), job.convention) for k in range(lots)]
    return [replace(group[0], value=float(np.mean([s.value for s in group])), low=None, high=None, items=None, note=f"mean of {lots} lots") for group in zip(*tried)]


def answers_of_train(job: Job, data: Data, split: str) -> list[Sample]:
    """The training samples of a job's task, for who answers without looking; [] when train is what is scored.

    No image is opened where the questions are there as text; probes that are made from outlines need them.
    """
    if split == "train":
        return []
    return job.task.prepare(_reader(data, split, words=True), "train") or job.task.prepare(_reader(data, split), "train")


def run_of(out: Path) -> dict[str, Any]:
    """What ``run.json`` of a run's folder says.

    Raises:
        UsageError: NOT_A_RUN.
    """
    if not (out / "run.json").is_file() or not (out / "predictions.jsonl").is_file():
        raise UsageError(f"{out.name!r} is no run: it lacks run.json or predictions.jsonl", "NOT_A_RUN", "medvlm evaluate makes one")
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def told(job: Job, predictions: Sequence[Prediction], judge: Callable | None = None, fitted: Sequence[trust.Calibrator] = (),
         other: Mapping[str, Sequence[float]] | None = None) -> tuple[list[Score], list[Score], list[Score]]:  # fmt: skip
    """The scores of a job, with the gaps between groups; how far its confidence can be trusted, where answers are right or
    wrong; the scores again by slices. other: confidence from elsewhere, by name, one a sample.
    """
    scores = _named(job, job.task.score(job.samples, predictions, job.convention))
    if judge is not None and job.name == "vqa":
        from .vqa import judged

        scores += _named(job, judged(job.samples, predictions, judge, job.convention, getattr(judge, "name", "a judge")))
    sure: list[Score] = []
    if right := _right(job, scores):
        at, values = right
        samples, kept = [job.samples[i] for i in at], [predictions[i] for i in at]
        sure = _named(job, trust.scores(samples, kept, values, calibrators=fitted))
        for name, confidence in (other or {}).items():
            told_so = trust.scores(samples, kept, values, [confidence[i] for i in at])
            sure += _named(job, (replace(s, slice=f"confidence={name}") for s in told_so))
    parts = sliced(scores, job.samples)
    if head := page.headline(job.samples, scores):
        scores += _named(job, gaps(head, job.samples))
    return scores, sure, parts


def _right(job: Job, scores: Sequence[Score]) -> tuple[list[int], np.ndarray] | None:
    """(indices into the samples, 1 or 0 for each) of the first score that says of every answer whether it is right."""
    found = next((s for s in scores if s.slice == "all" and s.better == "higher" and s.items and s.items.values is not None and set(np.unique(s.items.values)) <= {0.0, 1.0}), None)
    at = {s.id: i for i, s in enumerate(job.samples)}
    if not job.task.blind or found is None or not set(found.items.ids) <= at.keys():
        return None
    return [at[i] for i in found.items.ids], found.items.values


def calibrators(job: Job, predictions: Sequence[Prediction]) -> list[trust.Calibrator]:
    """Temperature, Platt and isotonic, fitted on these answers; failures, whose confidence is 0, are left out."""
    right = _right(job, job.task.score(job.samples, predictions, job.convention))
    if right is None:
        return []
    pairs = [(c, r) for c, r, i in zip(trust.confidences([predictions[i] for i in right[0]]), right[1], right[0]) if predictions[i].error is None]
    return [trust.Calibrator.fit(kind, *map(np.array, zip(*pairs))) for kind in ("temperature", "platt", "isotonic")] if pairs else []


def _again(job: Job, times: int) -> Job:
    """The job of asking everything so many times again; the answers to one sample follow one another."""
    asked = [replace(s, id=f"{s.id}@{k + 1}") for s in job.asked() for k in range(times)]
    return replace(job, samples=asked, ids=[s.id for s in asked])


def _sure(job: Job, predictions: Sequence[Prediction]) -> Job:
    """The job of asking the model, about each of its answers, how sure it is."""
    asked = [trust.how_sure(s, p) for s, p in zip(job.asked(), predictions)]
    return replace(job, samples=asked, ids=[s.id for s in asked])


def _named(job: Job, scores: Iterable[Score]) -> list[Score]:
    return [replace(s, task=job.name) for s in scores]


def values_of(sample: Sample, key: str) -> tuple[str, ...]:
    """What a sample is under ``key`` of ``SLICES``."""
    found = sample.meta.get(key)
    if found is None and key == "organ":
        labels = sample.meta.get("labels") or {}
        found = labels.get("organ") or labels.get("location") if isinstance(labels, dict) else None
    if found is None:
        return ()
    return tuple(dict.fromkeys(str(v).strip() for v in (found if isinstance(found, list | tuple) else [found]) if str(v).strip()))


def sliced(scores: Sequence[Score], samples: Sequence[Sample]) -> list[Score]:
    """The scores of the whole set again on each part of it that ``SLICES`` tells apart, where there are at least two.

    A score is recomputed from its own items, so the parts never see another rule than the whole.
    """
    found: list[Score] = []
    own = {s.slice.partition("=")[0] for s in scores}
    for key in (k for k in SLICES if k not in own):  # a task that tells them apart itself has its own rule
        where: dict[str, set[str]] = {}
        for sample in samples:
            for value in values_of(sample, key):
                where.setdefault(value, set()).update(i for i in (sample.id, sample.group) if i)
        if len(where) < 2:
            continue
        found += [part for value, ids in sorted(where.items()) for s in scores if s.slice == "all" and (part := restricted(s, ids, f"{key}={value}"))]
    return found


def restricted(score: Score, ids: set[str], name: str) -> Score | None:
    """A score on those of its items whose id is in ``ids``; None where it has none of them."""
    if score.items is None:
        return None
    kept = np.array([k for k, i in enumerate(score.items.ids) if i in ids], int)
    if not len(kept):
        return None
    whole = score.items
    groups, names = [whole.clusters[k] for k in kept], [whole.ids[k] for k in kept]
    if whole.values is not None:
        part = mean_score(score.name, whole.values[kept], groups, names)
    else:
        part = statistic_score(score.name, lambda i: whole.statistic(kept[i]), groups, names)
    rate = "AUPRC" in score.name or "Brier" in score.name  # by lot they get what the classes' shares give
    fixed = score.chance if score.chance in (0.5, 0.25) and not rate else None  # the others are means over all items
    return replace(part, chance=fixed, unit=score.unit, convention=score.convention, task=score.task, better=score.better, slice=name)
