"""Two runs on the same questions: which model is better, by how much, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from .page import cell, number
from .run import plan, run_of, told
from .statistics import Score, holm, mcnemar, paired_difference


@dataclass(frozen=True)
class Difference:
    """One score of two models. difference: A - B. p: bootstrap, two-sided; p_holm: corrected over the whole-set scores.

    mcnemar: exact, where answers are right or wrong. verdict: "win" for A, "loss", "tie" where the interval holds 0.
    """

    task: str
    name: str
    slice: str
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    mcnemar: float | None
    verdict: str
    n: int
    unit: str = ""
    convention: str = ""


def compare(a: str | Path, b: str | Path, where: str | Path | None = None, slices: bool = False) -> dict[str, Any]:
    """The scores of run ``a`` against those of run ``b``, paired sample by sample, clusters drawn together.

    Args:
        where: the data, if they have moved. slices: compare parts of the set too.

    Returns:
        {"a", "b": their models, "differences": [...], "wins", "ties", "losses": over the whole-set scores}.

    Raises:
        UsageError: RUNS_DIFFER when they are not of the same questions; DATA_DIFFER when the data are not those that were predicted.
    """
    a, b = Path(a), Path(b)
    runs = [run_of(a), run_of(b)]
    for key in ("task", "split", "limit", "fingerprint", "convention", "prompts"):
        if runs[0].get(key) != runs[1].get(key):
            raise UsageError(f"the runs differ in {key}: {runs[0].get(key)} and {runs[1].get(key)}", "RUNS_DIFFER", "compare runs of one task on the same data")
    data, jobs = plan(runs[0]["task"], where or runs[0]["data"], runs[0]["split"], runs[0]["convention"], runs[0]["limit"], runs[0].get("prompts"))
    if data.fingerprint != runs[0]["fingerprint"]:
        raise UsageError("the data have changed since they were predicted", "DATA_DIFFER", "give --data with the data of the runs, or predict again")
    found: list[Difference] = []
    for job in jobs:
        both = [told(job, job.predictions(folder / "predictions.jsonl")) for folder in (a, b)]
        sides = [{(s.name, s.slice): s for s in (*whole, *sure, *parts)} for whole, sure, parts in both]
        for key, left in sides[0].items():
            right = sides[1].get(key)
            if right is not None and (slices or left.slice == "all") and left.items and right.items and set(left.items.ids) & set(right.items.ids):
                found.append(_difference(left, right))
    whole = [i for i, d in enumerate(found) if d.slice == "all" and d.p is not None]
    for i, p in zip(whole, holm([found[i].p for i in whole])):
        found[i] = Difference(**{**asdict(found[i]), "p_holm": p})
    verdicts = [d.verdict for d in found if d.slice == "all"]
    return {
        "a": runs[0]["model"], "b": runs[1]["model"], "task": runs[0]["task"],
        "wins": verdicts.count("win"), "ties": verdicts.count("tie"), "losses": verdicts.count("loss"),
        "differences": [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(d).items()} for d in found],
    }  # fmt: skip


def _difference(a: Score, b: Score) -> Difference:
    value, low, high, p = paired_difference(a, b)
    binary, test = all(s.items.values is not None and set(np.unique(s.items.values)) <= {0.0, 1.0} for s in (a, b)), None
    if binary:
        there = dict(zip(b.items.ids, b.items.values))
        pairs = [(v, there[i]) for i, v in zip(a.items.ids, a.items.values) if i in there]
        test = mcnemar(*zip(*pairs))
    sign = {"higher": 1, "lower": -1, "neither": 0}[a.better]
    verdict = "none" if sign == 0 else "unknown" if low is None else "tie" if low <= 0 <= high else "win" if value * sign > 0 else "loss"
    return Difference(a.task, a.name, a.slice, a.value, b.value, value, low, high, p if math.isfinite(p) else None, None, test, verdict, a.n, a.unit, a.convention)


def table(found: dict[str, Any]) -> str:
    """What :func:`compare` found as a Markdown table; fractions are per cent."""
    lines = ["| task | score | slice | A | B | A − B | 95 % interval | p | p (Holm) | McNemar | A |", "|" + " --- |" * 11]
    for d in found["differences"]:
        p = ["" if d[k] is None else f"{d[k]:.3f}" for k in ("p", "p_holm", "mcnemar")]
        span = f"{number(d['low'], d['unit'])} to {number(d['high'], d['unit'])}" if d["low"] is not None else "–"
        lines.append(f"| {d['task']} | {d['name']} | {cell(d['slice'])} | {number(d['a'], d['unit'])} | {number(d['b'], d['unit'])} | {number(d['difference'], d['unit'])} | {span} | {' | '.join(p)} | {d['verdict']} |")
    return "\n".join(lines) + f"\n\nA: {found['a']['name']}, B: {found['b']['name']}; over the whole-set scores A wins {found['wins']}, ties {found['ties']}, loses {found['losses']}.\n"
