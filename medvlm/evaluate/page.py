"""What a run is worth, for people: Markdown and LaTeX tables, and report.html, one file that needs nothing else."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import numpy as np

from ..errors import MedVLMError
from ..imaging.export import COLOURS, outlined
from ..sample import Prediction, Region, Sample
from . import trust
from .statistics import Items, Score

WORST = 12
"""Cases shown of each kind."""
THUMBNAIL = 300
"""Pixels of the longer side of a picture on the page."""


@dataclass(frozen=True)
class Result:
    """One task of a run, scored. trust: of its confidence. slices: the scores again on parts of the samples. baselines: {name: its scores}. cases: {sample id: what is to be said of it} beside a score."""

    task: str
    convention: str
    conventions: Mapping[str, str]
    samples: Sequence[Sample]
    predictions: Sequence[Prediction]
    scores: Sequence[Score]
    trust: Sequence[Score]
    slices: Sequence[Score]
    baselines: Mapping[str, Sequence[Score]]
    cases: Mapping[str, str] = field(default_factory=dict)


def number(value: float | None, unit: str = "") -> str:
    """A score for people: a fraction as per cent with one digit, other units with two, or none where it is whole or large; "–" where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if not unit:
        return f"{100 * value:.1f}"
    return f"{value:.0f} {unit}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.2f} {unit}"


def _span(score: Score) -> str:
    return f"{number(score.low, score.unit)} to {number(score.high, score.unit)}" if score.low is not None else "–"


def _rows(results: Sequence[Result]) -> list[tuple[list[str], bool]]:
    """The cells of the main table, head first; whether a row is one of the whole set."""
    names = list(dict.fromkeys(n for r in results for n in r.baselines))
    rows = [(["task", "score", "slice", "value", "95 % interval", "n", "excluded", "chance", *names], True)]
    for r in results:
        beside = {n: {(s.name, s.slice): s for s in r.baselines.get(n, ())} for n in names}
        for s in (*r.scores, *r.trust):
            others = [number(b.value, b.unit) if (b := beside[n].get((s.name, s.slice))) else "" for n in names]
            rows.append(([r.task, s.name, s.slice, number(s.value, s.unit), _span(s), str(s.n), str(s.excluded), number(s.chance, s.unit) if s.chance is not None else "", *others], s.slice == "all"))
    return rows


def markdown(results: Sequence[Result]) -> str:
    """The scores as a Markdown table; fractions are per cent."""
    (head, _), *body = _rows(results)
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"] + [f"| {' | '.join(map(cell, cells))} |" for cells, _ in body]
    conventions = "\n".join(f"- {r.task}: convention `{r.convention}`: {_meaning(r)}" for r in results)
    return "\n".join(lines) + f"\n\nFractions in per cent. 95 % percentile intervals of a bootstrap over patients or images.\n\n{conventions}\n"


def cell(text: str) -> str:
    """Text of the data inside a Markdown table, on paper and on a terminal."""
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|").replace("<", "&lt;")


def latex(results: Sequence[Result]) -> str:
    """The scores of the whole set as a LaTeX tabular for booktabs; fractions are per cent."""
    (head, _), *body = _rows(results)
    keep = [i for i, h in enumerate(head) if h not in ("slice", "excluded")]
    cells = [[_tex(c[i]) for i in keep] for c, whole in body if whole]
    lines = [" & ".join(_tex(head[i]) for i in keep), *(" & ".join(c) for c in cells)]
    return ("% needs \\usepackage{booktabs}\n\\begin{tabular}{" + "ll" + "r" * (len(keep) - 2) + "}\n\\toprule\n" + lines[0] + " \\\\\n\\midrule\n"
            + "".join(f"{line} \\\\\n" for line in lines[1:]) + "\\bottomrule\n\\end{tabular}\n")  # fmt: skip


def _tex(text: str) -> str:
    return "".join({"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "–": "--", "$": r"\$", "{": r"\{", "}": r"\}"}.get(c, c) for c in text)


def _meaning(result: Result) -> str:
    return result.conventions.get(result.convention.split("/")[0], "")


STYLE = """
:root{color-scheme:light dark;--ink:#14213d;--soft:#5c677d;--line:#d9dee7;--back:#fff;--panel:#f5f7fa;--blue:#0a6ebd;--bad:#c1121f;--good:#2a7f4f}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#9aa5b8;--line:#2c3442;--back:#11151c;--panel:#1a2029;--blue:#4cc9f0;--bad:#ff6b6b;--good:#7bd389}}
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);margin:0 auto;max-width:1180px;padding:28px 24px 60px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:20px;margin:40px 0 8px;border-bottom:1px solid var(--line);padding-bottom:6px}h3{font-size:16px;margin:24px 0 6px}
p{margin:6px 0;max-width:86ch}.soft{color:var(--soft)}.notice{border-left:4px solid var(--bad);padding:6px 12px;background:var(--panel);margin:14px 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:8px 0}th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600;font-size:13px}th:first-child,td:first-child{text-align:left}tr:hover td{background:var(--panel)}td.bar{padding:5px 6px}
.scroll{overflow-x:auto}.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(255px,1fr));gap:14px;margin:10px 0}
.card{border:1px solid var(--line);border-radius:8px;padding:10px;background:var(--panel);font-size:14px;overflow-wrap:anywhere}.card img{width:100%;border-radius:5px;display:block;margin-bottom:8px;background:#000}
.card b{display:block}.wrong{color:var(--bad)}.right{color:var(--good)}summary{cursor:pointer;color:var(--blue);margin:8px 0}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}.two{display:flex;gap:28px;flex-wrap:wrap;align-items:flex-start}code{background:var(--panel);padding:1px 4px;border-radius:3px}
"""


def html(record: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The page; images are opened again for the cases that are shown."""
    run, model = record["run"], record["run"]["model"]
    total, failed = sum(record["samples"].values()), sum(record["errors"].values())
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{escape(str(model['name']))} on {escape(run['task'])}</title><style>{STYLE}</style>",
        f"<h1>{escape(str(model['name']))} on {escape(run['task'])}</h1>",
        f"<p class=soft>split {escape(run['split'])} · {total} samples · {failed} failed · version {escape(str(model['version']))}"
        f"{' · a lot of ' + str(run['limit']) + ' samples a task' if run['limit'] else ''} · medvlm {escape(run['medvlm'])}</p>",
        f"<p class=notice>{escape(record['notice'])} Fractions are per cent. Intervals: 95 %, {record['draws']} bootstrap draws of whole patients or images, seed {record['seed']}. "
        "A failed or unreadable answer is wrong and stays in the denominator.</p>",
    ]  # fmt: skip
    if failed:
        kinds: dict[str, int] = {}
        for r in results:
            for p in r.predictions:
                if p.error:
                    kinds[p.error.split(":")[0]] = kinds.get(p.error.split(":")[0], 0) + 1
        parts.append("<p class=wrong>Failed: " + ", ".join(f"{escape(k)} ({n})" for k, n in sorted(kinds.items(), key=lambda x: -x[1])) + "</p>")
    for r in results:
        parts += [f"<h2>{escape(r.task)}</h2><p class=soft>{len(r.samples)} samples. Convention <code>{escape(r.convention)}</code>: {escape(_meaning(r))}</p>"]
        parts += [_table([s for s in r.scores if s.slice == "all"], r.baselines), _slices(r), _reliability(r), _conventions(r), _cases(r)]
    return "\n".join(p for p in parts if p)


def _table(scores: Sequence[Score], baselines: Mapping[str, Sequence[Score]]) -> str:
    beside = {n: {(s.name, s.slice): s for s in group} for n, group in baselines.items()}
    told = [k for k in ("excluded", "chance") if any((s.excluded if k == "excluded" else s.chance is not None) for s in scores)]
    head = "".join(f"<th>{h}</th>" for h in ("score", "value", "", "95 % interval", "n", *told, *map(escape, beside)))
    rows = []
    for s in scores:
        others = "".join(f"<td>{number(b.value, b.unit) if (b := group.get((s.name, s.slice))) else ''}</td>" for group in beside.values())
        why = f" title='{escape(s.note, quote=True)}'" if s.note else ""
        more = {"excluded": str(s.excluded or ""), "chance": number(s.chance, s.unit) if s.chance is not None else ""}
        span = _span(s) if s.low is not None or not s.note else f"<span class=soft>{escape(s.note)}</span>"
        rows.append(f"<tr{why}><td>{escape(s.name)}</td><td><b>{number(s.value, s.unit)}</b></td><td class=bar>{_bar(s, [b for g in beside.values() if (b := g.get((s.name, s.slice)))])}</td>"
                    f"<td>{span}</td><td>{s.n}</td>{''.join(f'<td>{more[k]}</td>' for k in told)}{others}</tr>")  # fmt: skip
    return f"<div class=scroll><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def _bar(score: Score, baselines: Sequence[Score], wide: int = 150) -> str:
    """A fraction on a line from 0 to 1: point, interval, chance (grey tick), baselines (small hollow points)."""
    if score.unit or not math.isfinite(score.value) or not 0 <= score.value <= 1:
        return ""
    marks = "".join(f"<circle cx={4 + b.value * wide:.1f} cy=9 r=2.5 fill=none stroke='#8d99ae'/>" for b in baselines if math.isfinite(b.value) and 0 <= b.value <= 1)
    if score.chance is not None:
        marks += f"<path d='M{4 + score.chance * wide:.1f} 3v12' stroke='#8d99ae' stroke-dasharray='2 2'/>"
    if score.low is not None:
        marks += f"<path d='M{4 + score.low * wide:.1f} 9H{4 + score.high * wide:.1f}' stroke='#0a6ebd' stroke-width=3 stroke-opacity=.5 />"
    return f"<svg width={wide + 8} height=18><path d='M4 9h{wide}' stroke='#c9d1dd'/>{marks}<circle cx={4 + score.value * wide:.1f} cy=9 r=4 fill='#0a6ebd'/></svg>"


def _slices(result: Result) -> str:
    """One table a kind of slice, scores side by side."""
    kinds: dict[str, dict[str, dict[str, Score]]] = {}
    for s in (*result.scores, *result.slices):
        if s.slice != "all":
            kinds.setdefault(s.slice.split("=")[0], {}).setdefault(s.slice.split("=", 1)[-1], {})[s.name] = s
    tables = []
    for kind, rows in kinds.items():
        names = list(dict.fromkeys(n for row in rows.values() for n in row))
        head = f"<th>{escape(kind)}</th><th>n</th>" + "".join(f"<th>{escape(n)}</th>" for n in names)
        body = ""
        for value, row in sorted(rows.items(), key=lambda x: -max(s.n for s in x[1].values())):
            cells = "".join(f"<td title='{escape(_span(row[n]), quote=True)}'>{number(row[n].value, row[n].unit)}</td>" if n in row else "<td></td>" for n in names)
            body += f"<tr><td>{escape(value)}</td><td>{max(s.n for s in row.values())}</td>{cells}</tr>"
        tables.append(f"<details{' open' if len(rows) <= 6 else ''}><summary>by {escape(kind)} ({len(rows)})</summary><div class=scroll><table><tr>{head}</tr>{body}</table></div></details>")
    return "".join(tables)


def _conventions(result: Result) -> str:
    said = dict.fromkeys((s.name, s.convention) for s in (*result.scores, *result.trust) if s.convention and s.slice == "all")
    if not said:
        return ""
    return "<details><summary>what each score means</summary><ul>" + "".join(f"<li><b>{escape(n)}</b>: {escape(c)}</li>" for n, c in said) + "</ul></details>"


def headline(samples: Sequence[Sample], scores: Sequence[Score]) -> Score | None:
    """The first score that is a mean over samples: its lowest items are the worst cases. Where the first score is a mean over
    labels, the items of its labels together.
    """
    known = {s.id for s in samples}
    if scores and scores[0].items and scores[0].items.values is None:
        parts = [s.items for s in scores if s.name == scores[0].name and s.slice.startswith("label=") and s.items and s.items.values is not None]
        ids, clusters = (tuple(x for p in parts for x in of(p)) for of in (lambda p: p.ids, lambda p: p.clusters))
        if parts and set(ids) <= known:
            values = np.concatenate([p.values for p in parts])
            return replace(scores[0], items=Items(ids, clusters, lambda i: float(values[i].mean()), values))
    return next((s for s in scores if s.slice == "all" and s.items and s.items.values is not None and set(s.items.ids) <= known), None)


def _confidence(p: Prediction) -> float:
    return p.probability if p.probability is not None and math.isfinite(p.probability) else float("nan")


def _reliability(result: Result) -> str:
    """How often answers of a given confidence are right, and how far down the confident ones can be trusted."""
    score = headline(result.samples, result.scores)
    if score is None or not set(np.unique(score.items.values)) <= {0.0, 1.0}:
        return ""
    of = {p.id: _confidence(p) for p in result.predictions}
    confidence, right = np.array([of[i] for i in score.items.ids]), score.items.values
    kept = np.isfinite(confidence)
    if not result.trust or kept.sum() < 10 or len(np.unique(confidence[kept])) < 2:
        return ""
    side, dots = 220, ""
    for b in trust.reliability(confidence[kept], right[kept]):
        x, y = 30 + b["confidence"] * side, 10 + (1 - b["accuracy"]) * side
        said = f"{b['n']} answers: confidence {b['confidence']:.2f}, right {b['accuracy']:.2f}"
        dots += f"<circle cx={x:.1f} cy={y:.1f} r={2 + 6 * math.sqrt(b['n'] / kept.sum()):.1f} fill='#0a6ebd' fill-opacity=.75><title>{said}</title></circle>"
    axes = "".join(f"<text x={30 + t * side:.0f} y={side + 26} text-anchor=middle>{t:g}</text><text x=24 y={14 + (1 - t) * side:.0f} text-anchor=end>{t:g}</text>" for t in (0, 0.5, 1))
    picture = (f"<svg width={side + 50} height={side + 50}><rect x=30 y=10 width={side} height={side} fill=none stroke='#c9d1dd'/><path d='M30 {10 + side}L{30 + side} 10' stroke='#8d99ae' stroke-dasharray='4 3'/>"
               f"{dots}{axes}<text x={30 + side / 2} y={side + 44} text-anchor=middle>confidence</text></svg>")  # fmt: skip
    return f"<div class=two><div><h3>Is its confidence honest?</h3>{picture}</div><p class=soft style='max-width:40ch;margin-top:48px'>Each point is one of the bins of the ECE, its size the number of answers, its height the share of them that is right. On the dashed line confidence and truth agree. {int((~kept).sum())} answers came without a probability.</p></div>" + _trusted(result.trust)


def _trusted(scores: Sequence[Score]) -> str:
    """One table for each source of confidence, the model's own first."""
    tables = []
    for part in dict.fromkeys(s.slice for s in scores):
        title = "" if part == "all" else f"<h3>Confidence by {escape(part.partition('=')[2])}</h3>"
        tables.append(title + _table([s for s in scores if s.slice == part], {}))
    return "".join(tables)


def _cases(result: Result) -> str:
    """The worst cases, and the wrong ones that the model was surest of."""
    score = headline(result.samples, result.scores)
    if score is None:
        return ""
    samples, predictions = {s.id: s for s in result.samples}, {p.id: p for p in result.predictions}
    worst_first = 1 if score.better == "higher" else -1
    value = dict(zip(score.items.ids, score.items.values))
    order = sorted(value, key=lambda i: (worst_first * value[i], -np.nan_to_num(_confidence(predictions[i]))))
    binary = set(value.values()) <= {0.0, 1.0} and not any(samples[i].masks for i in value)
    bad = [i for i in order if value[i] != (1.0 if worst_first > 0 else 0.0)]
    sure = [i for i in bad if _confidence(predictions[i]) >= 0.5] if binary else []
    groups = [("Wrong, and surest of it", sure[:WORST]), ("Other wrong answers", [i for i in bad if i not in sure][:WORST])] if binary else [("Worst cases", bad[:WORST])]
    parts = []
    for title, ids in groups:
        if ids:
            cards = "".join(_card(samples[i], predictions[i], value[i], score, result.cases.get(i, "")) for i in ids)
            parts.append(f"<h3>{title}</h3><div class=cards>{cards}</div>")
    return "".join(parts)


def _card(sample: Sample, prediction: Prediction, value: float, score: Score, note: str) -> str:
    lines = []
    if sample.question:
        lines.append(f"<b>{escape(sample.question[:300])}</b>")
    if sample.answer:
        lines.append(f"<span class=right>reference: {escape(sample.answer[:400])}</span>")
    if prediction.error:
        lines.append(f"<span class=wrong>failed: {escape(prediction.error[:200])}</span>")
    elif prediction.text or not prediction.masks:
        chance = _confidence(prediction)
        lines.append(f"<span class=wrong>said: {escape(prediction.text[:400]) or '(nothing)'}{f' ({chance:.0%})' if math.isfinite(chance) else ''}</span>")
    if sample.masks:
        lines.append(f"<b>{escape(', '.join(m.label for m in sample.masks))}</b> <span style='color:{COLOURS[0]}'>reference</span>, <span style='color:{COLOURS[1]}'>model</span>")
    if not set(score.items.values) <= {0.0, 1.0}:
        lines.append(f"{escape(score.name)} {number(value, score.unit)}")
    if note:
        lines.append(escape(note))
    return f"<div class=card>{_thumbnail(sample, prediction)}{'<br>'.join(lines)}<br><span class=soft>{escape(sample.id)}</span></div>"


def _thumbnail(sample: Sample, prediction: Prediction) -> str:
    from PIL import Image as Picture

    if not sample.images:
        return ""
    name, image = next(iter(sample.images.items()))
    regions = [Region(name, f"reference {m.label}", mask=m.array) for m in sample.masks if m.image == name]
    regions += [Region(name, f"model {m.label}", mask=m.array) for m in prediction.masks if m.image == name and m.array.shape == image.shape[1:]]
    try:
        canvas, _ = outlined(image, regions, THUMBNAIL, 1)
    except MedVLMError as error:
        return f"<span class=soft>the image cannot be shown ({escape(error.code)})</span><br>"
    finally:
        image.release()
    raw = io.BytesIO()
    Picture.fromarray(canvas).save(raw, format="JPEG", quality=80)
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(raw.getvalue()).decode()}'>"
