"""Report metrics that need weights, through RadEval: RadGraph-F1, CheXbert F1, GREEN and RaTEScore. Extra: medvlm-toolkit[clinical].

RadEval fetches the weights from the Hugging Face hub when a metric is first used; nothing here asks for them earlier. It loads
torch, which nothing else in this folder does, and so is imported by the one function that was called for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ModelError, UsageError
from ..sample import Prediction, Sample
from . import lexical
from .base import mean_of, statistic_of
from .labeller import FINDINGS, FIVE
from .report import CONVENTIONS, f1_macro_of_all, f1_micro, texts
from .statistics import Score

METRICS = {
    "radgraph": ("radgraph_simple", "radgraph_partial", "radgraph_complete"),
    "ratescore": ("ratescore",),
    "green": ("green",),
    "f1chexbert": (),
}
"""Name in RadEval -> its values of one report, higher is better. CheXbert gives labels, from which F1 is made here."""
HINT = "install the extra: pip install 'medvlm-toolkit[clinical]'"
RUNS_CODE = ("green",)
"""Metrics whose checkpoint brings Python code that RadEval runs (trust_remote_code)."""


def clinical(samples: Sequence[Sample], predictions: Sequence[Prediction], names: Sequence[str], convention: str = "medvlm",
             run_code: bool = False) -> list[Score]:  # fmt: skip
    """Scores of these metrics, each with its interval; a failed or empty prediction scores 0 and, for CheXbert, has no finding.

    names: keys of ``METRICS``. convention: which text is compared (``report.CONVENTIONS``); doubt is presence unless it is
    "uncertain-negative". run_code: allow what ``RUNS_CODE`` names.

    Raises:
        ModelError: MISSING_EXTRA without RadEval; BAD_CHECKPOINT when its weights cannot be had; BAD_ARGUMENT when the predictions are
            not those of these samples.
        UsageError: BAD_ARGUMENT for another metric or convention, or for one that runs code without leave.
    Source: RadEval 2.2 (jbdel/RadEval): radeval.py, metrics/*/adapter.py.
    """
    if unknown := [n for n in names if n not in METRICS]:
        raise UsageError(f"no metric {unknown[0]!r} through RadEval; there are {', '.join(METRICS)}", "BAD_ARGUMENT")
    if not run_code and (runs := [n for n in names if n in RUNS_CODE]):
        raise UsageError(f"{runs[0]} runs Python code out of its checkpoint", "BAD_ARGUMENT", "if you trust its authors: run_code=True")
    pairs = texts(samples, predictions, convention)
    try:
        from radeval import RadEval
    except ImportError as e:
        raise ModelError(f"{', '.join(names)} need RadEval, which is not installed", "MISSING_EXTRA", HINT) from e
    known = [bool(lexical.tokens(truth)) for _, truth in pairs]
    asked = [i for i, (said, _) in enumerate(pairs) if known[i] and lexical.tokens(said)]
    scores: list[Score] = []
    for name in names:
        try:
            scorer = RadEval(metrics=[name], per_sample=True, show_progress=False)
        except ImportError as e:
            raise ModelError(f"RadEval's {name} needs {e.name}", "MISSING_EXTRA", HINT) from e
        except (OSError, RuntimeError, ValueError) as e:
            hint = "its weights come from huggingface.co: is there a network, or a cache?"
            raise ModelError(f"RadEval cannot load {name}: {type(e).__name__}", "BAD_CHECKPOINT", hint) from e
        if name == "f1chexbert":
            scores += _chexbert(scorer.f1chexbert_scorer, samples, pairs, known, convention)
            continue
        got = scorer(refs=[pairs[i][1] for i in asked], hyps=[pairs[i][0] for i in asked]) if asked else {}
        for key in METRICS[name]:
            values = np.where(known, 0.0, np.nan)
            values[asked] = got.get(key, [])
            says = f"{key} of RadEval, mean over reports; {CONVENTIONS[convention]}"
            scores.append(mean_of(key.replace("_", " "), samples, values, convention=says))
    return scores


def _chexbert(scorer: Any, samples: Sequence[Sample], pairs: Sequence[tuple[str, str]], known: Sequence[bool], convention: str) -> list[Score]:
    kept = [i for i, k in enumerate(known) if k]
    names = list(scorer.TARGET_NAMES)

    def present(column: int) -> np.ndarray:
        """(reports, 14) bool in the order of FINDINGS; no finding, not even No Finding, where there is no word."""
        spoken = [i for i in kept if lexical.tokens(pairs[i][column])]
        labels = scorer.get_labels([pairs[i][column] for i in spoken], mode="classification") if spoken else []
        rows = dict(zip(spoken, labels))
        there = (1,) if convention == "uncertain-negative" else (1, -1)
        return np.array([[i in rows and rows[i][names.index(f)] in there for f in FINDINGS] for i in kept], bool).reshape(-1, 14)

    says, is_so = present(0), present(1)
    counts = np.stack([says & is_so, says & ~is_so, ~says & is_so], 2)
    scores = []
    for many, chosen in ((14, FINDINGS), (5, FIVE)):
        part = counts[:, [FINDINGS.index(f) for f in chosen]]
        for kind, statistic in (("micro", f1_micro), ("macro", f1_macro_of_all)):
            about = {"excluded": len(pairs) - len(kept), "convention": f"labels of CheXbert, macro as RadEval's; {CONVENTIONS[convention]}"}
            drawn = lambda i, p=part, s=statistic: s(p[i].sum(0))  # noqa: E731
            scores.append(statistic_of(f"CheXbert F1-{many} {kind}", [samples[i] for i in kept], drawn, **about))
    return scores
