"""How much of a reference's wording a text shares: BLEU, ROUGE-L, METEOR and CIDEr-D, without downloads.

Everywhere: an empty text scores 0; an empty reference gives NaN, which a mean counts as excluded. All values are fractions
but CIDEr-D, which is 0..10. None of these knows what a word means: "no effusion" and "effusion" are close to all of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from ..errors import UsageError

Split = Callable[[str], list[str]]
"""A text -> its tokens, none of them empty or with white space inside."""
_TOKEN = re.compile(r"\d+(?:\.\d+)+|[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")


def tokens(text: str) -> list[str]:
    """Lower-cased words and numbers without punctuation; a Chinese character is a word of its own.

    >>> tokens("No x-ray change; 1.5 cm nodule.")
    ['no', 'x', 'ray', 'change', '1.5', 'cm', 'nodule']
    """
    return _TOKEN.findall(text.lower())


def sentence_bleu(hypothesis: str, references: Sequence[str], order: int = 4, smooth: bool = False, split: Split = tokens) -> float:
    """BLEU of one text against any of its references, by sacrebleu on our tokens.

    order: the longest n-gram; all orders up to it weigh the same. Without smoothing a text that lacks a match of any order
    scores 0, also one of fewer than ``order`` words. smooth: sacrebleu's own default for sentences, exponential smoothing and
    only the orders the text is long enough for.

    Raises:
        UsageError: BAD_ARGUMENT for an order below 1.
    Source: Papineni et al. 2002, ACL; mjpost/sacrebleu, metrics/bleu.py.
    """
    bleu = _bleu(order, smooth)
    words, others = split(hypothesis), [w for r in references if (w := split(r))]
    if not others:
        return math.nan
    return _fraction(bleu.corpus_score([" ".join(words)], [[" ".join(w)] for w in others])) if words else 0.0


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[str], order: int = 4, split: Split = tokens) -> float:
    """Unsmoothed BLEU of a whole set, one reference a text: matches and lengths are summed before the quotient.

    Samples with an empty reference are left out, empty texts are not. Raises: as :func:`bleu_counts`.
    """
    return bleu_of(bleu_counts(hypotheses, references, order, split))


def bleu_counts(hypotheses: Sequence[str], references: Sequence[str], order: int = 4, split: Split = tokens) -> np.ndarray:
    """(N, 2 + 2 * order) float: length, reference length, then matches and totals of each order; the rows of any subset sum
    to what :func:`bleu_of` needs. NaN rows where the reference is empty.

    Raises:
        UsageError: BAD_ARGUMENT for an order below 1, or without one reference a text.
    """
    bleu = _bleu(order, False)
    out = np.full((len(hypotheses), 2 + 2 * order), np.nan)
    for row, (hypothesis, reference) in zip(out, _pairs(hypotheses, references)):
        words, other = split(hypothesis), split(reference)
        if other and words:
            s = bleu.corpus_score([" ".join(words)], [[" ".join(other)]])
            row[:] = [s.sys_len, s.ref_len, *s.counts, *s.totals]
        elif other:
            row[:] = [0, len(other), *[0] * (2 * order)]
    return out


def bleu_of(counts: np.ndarray) -> float:
    """BLEU of the summed rows of :func:`bleu_counts`; NaN where no row has a reference."""
    from sacrebleu.metrics import BLEU

    known = counts[np.isfinite(counts[:, 0])]
    if not len(known):
        return math.nan
    order = (counts.shape[1] - 2) // 2
    length, other, *rest = (int(v) for v in known.sum(0))
    return _fraction(BLEU.compute_bleu(rest[:order], rest[order:], length, other, max_ngram_order=order))


def rouge_l(hypothesis: str, reference: str, beta: float = 1.0, split: Split = tokens) -> float:
    """F-measure of the longest common subsequence of words, by rouge-score on our tokens and without stemming.

    F = (1 + beta^2) P R / (R + beta^2 P); beta 1 is rouge-score's rougeL, beta 1.2 that of the COCO caption scorer.
    Source: Lin 2004, ACL workshop (the measure); google-research, rouge/rouge_scorer.py; tylin/coco-caption,
    pycocoevalcap/rouge/rouge.py (1.2).
    """
    words, other = split(hypothesis), split(reference)
    if not other:
        return math.nan
    s = _rouge().score(" ".join(other), " ".join(words))["rougeL"]
    return (1 + beta**2) * s.precision * s.recall / (s.recall + beta**2 * s.precision) if s.precision else 0.0


def meteor(hypothesis: str, reference: str, split: Split = tokens) -> float:
    """METEOR with its exact and Porter-stem stages; the synonym stage needs WordNet, a download, and is left out.

    (1 - 0.5 (chunks / matches)^3) P R / (0.9 P + 0.1 R): parameters and alignment of nltk, which are those of 2007, so that a
    text of m words equal to its reference scores 1 - 0.5 / m^3. It is not METEOR 1.5, which weighs function words apart and
    needs paraphrase tables; published values made with synonyms or with the Java program differ.
    Source: Lavie & Agarwal 2007, WMT; nltk/translate/meteor_score.py.
    """
    from nltk.translate.meteor_score import single_meteor_score

    words, other = split(hypothesis), split(reference)
    if not other:
        return math.nan
    return float(single_meteor_score(other, words, stemmer=_stemmer(), wordnet=_NoSynonyms())) if words else 0.0


def cider_d(hypotheses: Sequence[str], references: Sequence[str], split: Split = tokens) -> np.ndarray:
    """(N,) CIDEr-D of each text against its one reference, 0..10 as published; the set's value is the mean.

    n-grams of 1 to 4 words weighed by how rare they are among the references of this set, so a value means nothing outside
    its set, and a set of one reference, or of equal ones, scores 0 throughout. Length is counted in bigrams, sigma is 6.
    Words are not stemmed. Raises: as :func:`bleu_counts`.
    Source: Vedantam et al. 2015, CVPR, section 5; vrama91/cider, pyciderevalcap/ciderD/ciderD_scorer.py (the conventions).
    """
    grams = [(_grams(split(h)), _grams(split(r))) for h, r in _pairs(hypotheses, references)]
    documents = sum(1 for _, r in grams if r[0])
    frequency = Counter(g for _, r in grams for counts in r for g in counts)
    weight = {g: math.log(documents / n) for g, n in frequency.items()}
    unseen = math.log(documents) if documents else 0.0

    def vector(counts: Counter) -> dict[tuple[str, ...], float]:
        return {g: n * weight.get(g, unseen) for g, n in counts.items()}

    out = np.full(len(grams), np.nan)
    for i, (h, r) in enumerate(grams):
        if not r[0]:
            continue
        penalty = math.exp(-((h[1].total() - r[1].total()) ** 2) / (2 * 6.0**2))
        total = 0.0
        for a, b in zip(map(vector, h), map(vector, r)):
            norm = math.hypot(*a.values()) * math.hypot(*b.values())
            total += sum(min(v, b[g]) * b[g] for g, v in a.items() if g in b) / norm if norm else 0.0
        out[i] = 10 * penalty * total / 4
    return out


def _grams(words: list[str]) -> list[Counter]:
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, 5)]


def _pairs(hypotheses: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    if len(hypotheses) != len(references):
        raise UsageError(f"{len(hypotheses)} texts do not have one reference each: there are {len(references)}", "BAD_ARGUMENT")
    return list(zip(hypotheses, references))


def _fraction(bleu) -> float:
    return min(1.0, bleu.score / 100)  # 100 by way of logarithms is 100.00000000000004


@lru_cache
def _bleu(order: int, smooth: bool):
    from sacrebleu.metrics import BLEU

    if order < 1:
        raise UsageError(f"BLEU of order {order}: an n-gram has at least one word", "BAD_ARGUMENT")
    return BLEU(max_ngram_order=order, smooth_method="exp" if smooth else "none", effective_order=smooth, tokenize="none", force=True)


@lru_cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Spaces())


@lru_cache
def _stemmer():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


class _Spaces:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


class _NoSynonyms:
    def synsets(self, word: str) -> list:
        return []
